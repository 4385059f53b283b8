package status

import (
	"bytes"
	_ "embed"
	"fmt"
	"html/template"
	"math"
	"net"
	"net/http"
	"slices"
	"strconv"
	"time"
	"unicode"

	dto "github.com/prometheus/client_model/go"
	"github.com/spoa-go/spoa"
)

// pageConns bounds the page.
const pageConns = 500

//go:embed page.html
var pageText string

var pageTemplate = template.Must(template.New("page").Parse(pageText))

// pageData is what page.html shows. Peers choose EngineID.
type pageData struct {
	Build                Build
	Draining, Random     bool
	Up                   string
	Refresh              int
	Conns                []pageConn
	More                 int // connections left out
	Total                int
	InFlight             int
	Opened, HealthChecks string
	Messages             []pageMessage
	Lists                []pageList
	Sources              []pageSource
	WouldDeny            string
	Unlisted             string
	RandomScores         string
	Faults               []pageFault
	Lookup               *lookupPage // nil: none was asked for
}

type pageConn struct {
	Peer, EngineID, Capabilities, State, Age, Notifies string
	FrameSize, InFlight                                int
}

type pageMessage struct {
	Name, Now, Peak, Mean, Median, P99, Total, Failed string
	Outcomes                                          []pageCount
}

type pageList struct {
	Name, File, Kind, Entries, Verdicts, Loaded, Age string
	BadLines                                         int
	Reloads, Failures                                uint64
	Checked                                          string // of a list by URL: when its server last answered, and how
	Problem                                          string
	Warnings                                         []string
}

type pageCount struct{ Name, Count string }

type pageFault struct{ Code, Name, By, Count string }

func (st *Status) page(w http.ResponseWriter, r *http.Request) {
	d := st.pageData(time.Now())
	if n, err := strconv.Atoi(r.FormValue("refresh")); err == nil && n > 0 {
		d.Refresh = min(n, 3600)
	}
	d.write(w)
}

func (d *pageData) write(w http.ResponseWriter) {
	var b bytes.Buffer
	if err := pageTemplate.Execute(&b, d); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy",
		"default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	w.Write(bytes.Map(printable, b.Bytes()))
}

// printable replaces what HTML must not have. Files may have any name; bytes that
// are not UTF-8 come as the replacement character already.
func printable(r rune) rune {
	if unicode.IsControl(r) && r != '\n' && r != '\t' {
		return unicode.ReplacementChar
	}
	return r
}

func (st *Status) pageData(now time.Time) *pageData {
	d := &pageData{
		Build: st.config.Build, Draining: st.draining.Load(), Random: st.random != nil, Up: short(now.Sub(st.started)),
		Opened: number(value(st.opened)), HealthChecks: number(value(st.checks)),
	}
	conns := st.config.Conns()
	slices.SortFunc(conns, func(a, b spoa.ConnInfo) int { return a.Since.Compare(b.Since) })
	d.Total = len(conns)
	for i, c := range conns {
		d.InFlight += c.InFlight
		if i >= pageConns {
			d.More++
			continue
		}
		d.Conns = append(d.Conns, pageConn{
			Peer: peerName(c.Addr), EngineID: abridged(c.EngineID), Capabilities: c.Capabilities, State: connState(c),
			FrameSize: c.FrameSize, Age: short(now.Sub(c.Since)), InFlight: c.InFlight, Notifies: number(float64(c.Notifies)),
		})
	}
	d.addMessages(st)
	d.addLists(st, now)
	d.addSources(st, now)
	for _, s := range faultCodes {
		d.addFault(st, s.String(), statusCode(s), byAgent, byHAProxy)
	}
	d.addFault(st, "codes that SPOP does not know", otherCode, byAgent, byHAProxy)
	d.addFault(st, "connection or TLS failed", networkCode, "")
	return d
}

func (d *pageData) addMessages(st *Status) {
	for _, mm := range st.all() {
		total, failed, by := mm.counts()
		if mm == st.other && total == 0 {
			continue
		}
		p := pageMessage{Name: mm.name, Total: number(total), Failed: number(failed)}
		for o := spoa.FaultError; o < outcomes; o++ {
			if by[o] > 0 {
				p.Outcomes = append(p.Outcomes, pageCount{outcomeNames[o], number(by[o])})
			}
		}
		mm.mu.Lock()
		p.Now, p.Peak = number(mm.now), number(mm.peak)
		mm.mu.Unlock()
		if h := read(mm.time).GetHistogram(); h.GetSampleCount() > 0 {
			p.Mean = seconds(h.GetSampleSum() / float64(h.GetSampleCount()))
			p.Median, p.P99 = quantile(h, 0.5), quantile(h, 0.99)
		}
		d.Messages = append(d.Messages, p)
	}
}

func (d *pageData) addLists(st *Status, now time.Time) {
	if d.Random {
		d.RandomScores = number(value(st.random))
		return
	}
	d.Unlisted = number(value(st.unlisted))
	if st.config.Lists == nil {
		return
	}
	for _, s := range st.config.Lists.Stats() {
		p := pageList{
			Name: s.Name, File: s.File, Kind: listKind(s), Entries: number(float64(s.Entries)), BadLines: s.BadLines,
			Loaded: ago(now, s.Loaded), Age: ago(now, s.Modified), Reloads: s.Reloads, Failures: s.Failures,
			Checked: checked(s, now), Problem: s.Problem, Warnings: s.Warnings,
		}
		if c := st.listed(s.Name); c != nil && !s.Allow {
			p.Verdicts = number(value(c))
		}
		d.Lists = append(d.Lists, p)
	}
}

func (d *pageData) addFault(st *Status, name, code string, by ...string) {
	for _, by := range by {
		if n := value(st.faults[origin{code, by}]); n > 0 {
			d.Faults = append(d.Faults, pageFault{code, name, by, number(n)})
		}
	}
}

// peerName is short for clients of a unix socket, which have no name.
func peerName(a net.Addr) string {
	if s := a.String(); s != "" && s != "@" {
		return s
	}
	return a.Network()
}

// abridged is for what a peer may fill with anything, and make as long as a
// frame.
func abridged(s string) string { return abridgedTo(s, 64) }

func abridgedTo(s string, most int) string {
	r := []rune(s)
	more := len(r) > most
	r = r[:min(len(r), most)]
	for i := range r {
		if !unicode.IsGraphic(r[i]) { // such as what changes the direction of writing
			r[i] = unicode.ReplacementChar
		}
	}
	if more {
		r = append(r, '…')
	}
	return string(r)
}

// number groups digits.
func number(f float64) string {
	s := strconv.FormatFloat(f, 'f', 0, 64)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "\u202f" + s[i:]
	}
	return s
}

// short is a duration of no more than two units.
func short(d time.Duration) string {
	switch d = max(d, 0); {
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm%ds", d/time.Minute, d%time.Minute/time.Second)
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%dm", d/time.Hour, d%time.Hour/time.Minute)
	}
	return fmt.Sprintf("%dd%dh", d/(24*time.Hour), d%(24*time.Hour)/time.Hour)
}

// ago says how long before now t was. The zero time never was.
func ago(now, t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return short(now.Sub(t)) + " ago"
}

// seconds is a time that a handler took, to three digits.
func seconds(s float64) string {
	switch {
	case s < 1e-3:
		return fmt.Sprintf("%.3g µs", s*1e6)
	case s < 1:
		return fmt.Sprintf("%.3g ms", s*1e3)
	}
	return fmt.Sprintf("%.3g s", s)
}

// quantile is the bound of the bucket that the quantile is in: at most so much.
func quantile(h *dto.Histogram, q float64) string {
	rank := uint64(math.Ceil(q * float64(h.GetSampleCount())))
	last := 0.0
	for _, b := range h.GetBucket() {
		if last = b.GetUpperBound(); b.GetCumulativeCount() >= rank {
			return "≤ " + seconds(last)
		}
	}
	return "> " + seconds(last)
}
