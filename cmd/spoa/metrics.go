package main

import (
	"bytes"
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"html/template"
	"math"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
	"github.com/spoa-go/spoa"
)

// metrics counts what the agent does, and shows it over HTTP. A label never
// holds what a peer or a client chooses: no address, no engine-id, and names of
// messages only if there is a handler for them.
type metrics struct {
	registry *prometheus.Registry
	conns    func() []spoa.ConnInfo // set before anything is served
	lists    *lists                 // nil: scores are random
	started  time.Time
	draining atomic.Bool

	messages map[string]*messageMetrics
	other    *messageMetrics // of all other messages
	verdicts map[string]prometheus.Counter
	unlisted prometheus.Counter
	random   prometheus.Counter
	opened   prometheus.Counter
	checks   prometheus.Counter
	faults   map[origin]prometheus.Counter
	reloads  [2]prometheus.Counter // of certificates: failed, ok
}

// messageMetrics are those of one message. All children of vectors are looked
// up once, so that a NOTIFY costs no allocation.
type messageMetrics struct {
	name  string
	count [outcomes]prometheus.Counter
	time  prometheus.Histogram

	mu        sync.Mutex
	last      float64
	now, peak float64 // messages in the last second, and in the busiest one
}

const (
	outcomeOK = iota
	outcomeError
	outcomePanic
	outcomeTimeout
	outcomeOverload
	outcomeNoHandler
	outcomes
)

var outcomeNames = [outcomes]string{"ok", "error", "panic", "timeout", "overload", "no_handler"}

// origin is why a connection ended, and who said so.
type origin struct {
	code string
	by   string
}

// faultCodes are the status codes of SPOP but for 0, which is no fault.
var faultCodes = []spoa.Status{
	spoa.StatusIO, spoa.StatusTimeout, spoa.StatusFrameTooBig, spoa.StatusInvalidFrame, spoa.StatusNoVersion,
	spoa.StatusNoFrameSize, spoa.StatusNoCapabilities, spoa.StatusBadVersion, spoa.StatusBadFrameSize,
	spoa.StatusNoFragmentation, spoa.StatusInterlaced, spoa.StatusFrameIDNotFound, spoa.StatusNoResources, spoa.StatusUnknown,
}

const (
	byAgent     = "agent"
	byHAProxy   = "haproxy"
	otherCode   = "other"   // the peer can invent any
	networkCode = "network" // the connection failed, or its TLS
)

// newMetrics returns metrics of an agent with handlers for these messages.
func newMetrics(l *lists, certs *certificates, names ...string) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		conns:    func() []spoa.ConnInfo { return nil },
		lists:    l,
		started:  time.Now(),
		messages: make(map[string]*messageMetrics),
		verdicts: make(map[string]prometheus.Counter),
		faults:   make(map[origin]prometheus.Counter),
	}
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "spoa_" + name, Help: help}, labels)
		m.registry.MustRegister(v)
		return v
	}
	handled := counter("messages_total", "Messages of NOTIFYs by name (those with a handler) and outcome.", "message", "outcome")
	took := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "spoa_handler_duration_seconds", Help: "Time that handlers took.",
		Buckets: []float64{10e-6, 25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1, 2.5},
	}, []string{"message"})
	m.registry.MustRegister(took)
	newMessage := func(name string) *messageMetrics {
		mm := &messageMetrics{name: name, time: took.WithLabelValues(name).(prometheus.Histogram)}
		for o := range mm.count {
			mm.count[o] = handled.WithLabelValues(name, outcomeNames[o])
		}
		return mm
	}
	for _, name := range names {
		m.messages[name] = newMessage(name)
	}
	m.other = newMessage("other")

	verdicts := counter("verdicts_total",
		"Addresses judged: listed (and on which list), unlisted (or allowed), or given a random score.", "verdict", "list")
	if l == nil {
		m.random = verdicts.WithLabelValues("random", "")
	} else {
		m.unlisted = verdicts.WithLabelValues("unlisted", "")
		for _, s := range l.Stats() {
			if !s.Allow { // two files may have one name, and so one counter
				m.verdicts[s.Name] = verdicts.WithLabelValues("listed", s.Name)
			}
		}
	}
	m.opened = counter("connections_opened_total", "Connections accepted, those of health checks included.").WithLabelValues()
	m.checks = counter("health_checks_total", "Health checks answered.").WithLabelValues()
	faults := counter("faults_total",
		"Connections ended by a fault, by status code of SPOP and who told it; code network: by the network, or TLS.", "code", "by")
	for _, by := range []string{byAgent, byHAProxy} {
		for _, s := range faultCodes {
			o := origin{statusCode(s), by}
			m.faults[o] = faults.WithLabelValues(o.code, o.by)
		}
		o := origin{otherCode, by}
		m.faults[o] = faults.WithLabelValues(o.code, o.by)
	}
	o := origin{networkCode, ""}
	m.faults[o] = faults.WithLabelValues(o.code, o.by)
	if certs != nil {
		reloads := counter("certificate_reloads_total", "Reloads of the certificates by result.", "result")
		m.reloads = [2]prometheus.Counter{reloads.WithLabelValues("failed"), reloads.WithLabelValues("ok")}
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "spoa_certificate_expiry_timestamp_seconds", Help: "When the certificate runs out.",
		}, func() float64 { return float64(certs.expiry().Unix()) }))
	}
	v := version()
	m.registry.MustRegister(m, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "spoa_build_info", Help: "Always 1; the labels tell what runs.",
			ConstLabels: prometheus.Labels{"version": v.Version, "revision": v.Revision, "goversion": v.Go},
		}, func() float64 { return 1 }))
	return m
}

func statusCode(s spoa.Status) string { return strconv.FormatUint(uint64(s), 10) }

// hooks are for the agent to call.
func (m *metrics) hooks() spoa.Hooks {
	return spoa.Hooks{
		ConnOpened: func(spoa.Peer) { m.opened.Inc() },
		ConnClosed: m.connClosed,
		Handled:    m.handled,
	}
}

func (m *metrics) handled(name string, took time.Duration, err error) {
	mm, ok := m.messages[name]
	if !ok {
		mm = m.other
	}
	o := outcomeOf(err)
	mm.count[o].Inc()
	if o != outcomeOverload && o != outcomeNoHandler { // these were not called
		mm.time.Observe(took.Seconds())
	}
}

func outcomeOf(err error) int {
	switch {
	case err == nil:
		return outcomeOK
	case errors.Is(err, spoa.ErrNoHandler):
		return outcomeNoHandler
	case errors.Is(err, spoa.ErrOverload):
		return outcomeOverload
	case errors.Is(err, context.DeadlineExceeded):
		return outcomeTimeout
	}
	if _, ok := errors.AsType[*spoa.PanicError](err); ok {
		return outcomePanic
	}
	return outcomeError
}

func (m *metrics) connClosed(p spoa.Peer, err error) {
	if p.HealthCheck {
		m.checks.Inc()
	}
	if err == nil {
		return
	}
	o := origin{networkCode, ""}
	if d, ok := errors.AsType[*spoa.DisconnectError](err); ok {
		if d.Status == spoa.StatusNormal {
			return
		}
		o = origin{statusCode(d.Status), byAgent}
		if d.Remote {
			o.by = byHAProxy
		}
		if m.faults[o] == nil {
			o.code = otherCode
		}
	}
	m.faults[o].Inc()
}

// judged counts a verdict.
func (m *metrics) judged(list string, listed bool) {
	switch {
	case m.random != nil:
		m.random.Inc()
	case listed:
		m.verdicts[list].Inc()
	default:
		m.unlisted.Inc()
	}
}

func (m *metrics) certificatesReloaded(ok bool) {
	if ok {
		m.reloads[1].Inc()
	} else {
		m.reloads[0].Inc()
	}
}

// What is looked up only when somebody asks.
var (
	connsDesc = prometheus.NewDesc("spoa_connections",
		"Connections by state: before their HELLO, busy (something in flight), idle.", []string{"state"}, nil)
	inFlightDesc = prometheus.NewDesc("spoa_notifies_in_flight", "NOTIFYs handed to workers and not answered yet.", nil, nil)
	entriesDesc  = listDesc("list_entries", "Distinct prefixes of a list in force.")
	badDesc      = listDesc("list_bad_lines", "Lines of a list left out.")
	ageDesc      = listDesc("list_age_seconds", "Age of the file whose content is in force, by its modification time.")
	loadedDesc   = listDesc("list_loaded_timestamp_seconds", "When the content in force was read.")
	reloadsDesc  = listDesc("list_reloads_total",
		"Reloads of a list by result; after one that failed the previous content stays in force.", "result")
)

// A list's file is a label because two of them may have one name.
func listDesc(name, help string, more ...string) *prometheus.Desc {
	return prometheus.NewDesc("spoa_"+name, help, append([]string{"list", "file", "kind"}, more...), nil)
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{connsDesc, inFlightDesc, entriesDesc, badDesc, ageDesc, loadedDesc, reloadsDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	send := func(d *prometheus.Desc, t prometheus.ValueType, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, t, v, labels...)
	}
	states, inFlight := map[string]int{}, 0
	for _, c := range m.conns() {
		states[connState(c)]++
		inFlight += c.InFlight
	}
	for _, s := range []string{"hello", "idle", "busy"} {
		send(connsDesc, prometheus.GaugeValue, float64(states[s]), s)
	}
	send(inFlightDesc, prometheus.GaugeValue, float64(inFlight))
	if m.lists == nil {
		return
	}
	for _, s := range m.lists.Stats() {
		labels := []string{s.Name, s.File, listKind(s)}
		send(entriesDesc, prometheus.GaugeValue, float64(s.Entries), labels...)
		send(badDesc, prometheus.GaugeValue, float64(s.BadLines), labels...)
		send(ageDesc, prometheus.GaugeValue, time.Since(s.Modified).Seconds(), labels...)
		send(loadedDesc, prometheus.GaugeValue, float64(s.Loaded.UnixMilli())/1e3, labels...)
		send(reloadsDesc, prometheus.CounterValue, float64(s.Reloads), append(labels, "ok")...)
		send(reloadsDesc, prometheus.CounterValue, float64(s.Failures), append(labels, "failed")...)
	}
}

func connState(c spoa.ConnInfo) string {
	switch {
	case c.FrameSize == 0:
		return "hello"
	case c.InFlight > 0:
		return "busy"
	}
	return "idle"
}

func listKind(s listStats) string {
	if s.Allow {
		return "allow"
	}
	return "reputation"
}

// actor returns the HTTP server as an actor. When the group ends it goes on, to
// tell /readyz and /metrics of the drain, until that is over.
func (m *metrics) actor(l net.Listener, drained <-chan struct{}) (execute func() error, interrupt func(error)) {
	srv := &http.Server{Handler: m.handler(), ReadHeaderTimeout: 5 * time.Second, IdleTimeout: 2 * time.Minute}
	ctx, cancel := context.WithCancel(context.Background())
	execute = func() error {
		go func() {
			second := time.NewTicker(time.Second)
			defer second.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-second.C:
					m.sample()
				}
			}
		}()
		err := srv.Serve(l)
		if errors.Is(err, http.ErrServerClosed) {
			<-ctx.Done()
			return nil
		}
		return err
	}
	interrupt = func(error) {
		m.draining.Store(true)
		go func() {
			defer cancel()
			<-drained
			end, done := context.WithTimeout(context.Background(), time.Second)
			defer done()
			if srv.Shutdown(end) != nil {
				srv.Close()
			}
		}()
	}
	return execute, interrupt
}

func (m *metrics) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if m.draining.Load() {
			http.Error(w, "draining", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
	})
	mux.HandleFunc("GET /{$}", m.page)
	return mux
}

// sample is called every second, for rates.
func (m *metrics) sample() {
	for _, mm := range m.all() {
		n, _, _ := mm.counts()
		mm.mu.Lock()
		mm.now, mm.last = n-mm.last, n
		mm.peak = max(mm.peak, mm.now)
		mm.mu.Unlock()
	}
}

// all returns the messages by name, the others last.
func (m *metrics) all() (all []*messageMetrics) {
	for _, mm := range m.messages {
		all = append(all, mm)
	}
	slices.SortFunc(all, func(a, b *messageMetrics) int { return cmp.Compare(a.name, b.name) })
	return append(all, m.other)
}

// counts returns how many messages there were, how many failed, and by outcome.
func (mm *messageMetrics) counts() (total, failed float64, by [outcomes]float64) {
	for o, c := range mm.count {
		by[o] = value(c)
		total += by[o]
	}
	return total, total - by[outcomeOK], by
}

func value(c prometheus.Counter) float64 { return read(c).GetCounter().GetValue() }

func read(m prometheus.Metric) *dto.Metric {
	var d dto.Metric
	_ = m.Write(&d) // fails for what is no counter or histogram of this package
	return &d
}

// The page

// pageConns bounds the page.
const pageConns = 500

//go:embed page.html
var pageText string

var pageTemplate = template.Must(template.New("page").Parse(pageText))

// pageData is what page.html shows. Peers choose EngineID.
type pageData struct {
	Build                build
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
	Unlisted             string
	RandomScores         string
	Faults               []pageFault
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
}

type pageCount struct{ Name, Count string }

type pageFault struct{ Code, Name, By, Count string }

func (m *metrics) page(w http.ResponseWriter, r *http.Request) {
	d := m.pageData(time.Now())
	if n, err := strconv.Atoi(r.FormValue("refresh")); err == nil && n > 0 {
		d.Refresh = min(n, 3600)
	}
	var b bytes.Buffer
	if err := pageTemplate.Execute(&b, d); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy",
		"default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	w.Write(b.Bytes())
}

func (m *metrics) pageData(now time.Time) *pageData {
	d := &pageData{
		Build: version(), Draining: m.draining.Load(), Random: m.lists == nil, Up: short(now.Sub(m.started)),
		Opened: number(value(m.opened)), HealthChecks: number(value(m.checks)),
	}
	conns := m.conns()
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
	for _, mm := range m.all() {
		total, failed, by := mm.counts()
		if mm == m.other && total == 0 {
			continue
		}
		p := pageMessage{Name: mm.name, Total: number(total), Failed: number(failed)}
		for o := outcomeError; o < outcomes; o++ {
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
	if m.lists == nil {
		d.RandomScores = number(value(m.random))
	} else {
		d.Unlisted = number(value(m.unlisted))
		for _, s := range m.lists.Stats() {
			p := pageList{
				Name: s.Name, File: s.File, Kind: listKind(s), Entries: number(float64(s.Entries)), BadLines: s.BadLines,
				Loaded: short(now.Sub(s.Loaded)), Age: short(now.Sub(s.Modified)), Reloads: s.Reloads, Failures: s.Failures,
			}
			if c := m.verdicts[s.Name]; c != nil && !s.Allow {
				p.Verdicts = number(value(c))
			}
			d.Lists = append(d.Lists, p)
		}
	}
	for _, s := range faultCodes {
		d.addFault(m, s.String(), statusCode(s), byAgent, byHAProxy)
	}
	d.addFault(m, "codes that SPOP does not know", otherCode, byAgent, byHAProxy)
	d.addFault(m, "connection or TLS failed", networkCode, "")
	return d
}

func (d *pageData) addFault(m *metrics, name, code string, by ...string) {
	for _, by := range by {
		if n := value(m.faults[origin{code, by}]); n > 0 {
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
func abridged(s string) string {
	const most = 64
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
