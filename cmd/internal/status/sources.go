package status

import (
	"context"
	"encoding/json"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spoa-go/spoa/cmd/internal/reputation"
	"github.com/spoa-go/spoa/cmd/internal/reputation/lists"
)

var (
	sourceEntriesDesc = sourceDesc("source_entries", "What a source of verdicts holds: decisions, answers, networks.")
	sourceUpDesc      = sourceDesc("source_up", "Whether a source can be relied upon.")
	sourceUpdatedDesc = sourceDesc("source_updated_timestamp_seconds", "When a source last learned something; a database: when it was built.")
	sourceListedDesc  = sourceDesc("source_listed_total", "Addresses judged that a source lists.")
	sourceMissingDesc = sourceDesc("source_missing_total", "Addresses judged without a source, which had no answer in time.")
)

func sourceDesc(name, help string) *prometheus.Desc {
	return prometheus.NewDesc("spoa_"+name, help, []string{"source", "kind"}, nil)
}

// registerSources registers the metrics of the sources, if there are any but
// lists.
func (st *Status) registerSources() {
	if st.config.Sources == nil {
		return
	}
	st.denied = st.counter("monitor_denied_total", "Addresses that would be denied if -monitor were not set.").WithLabelValues()
	st.registry.MustRegister(sourceCollector{st.config.Sources})
}

// WouldDeny counts an address that is let through only to see what happens.
func (st *Status) WouldDeny() { st.denied.Inc() }

// sourceCollector collects what sources report.
type sourceCollector struct{ sources *reputation.Combined }

// Describe implements prometheus.Collector.
func (c sourceCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{sourceEntriesDesc, sourceUpDesc, sourceUpdatedDesc, sourceListedDesc, sourceMissingDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c sourceCollector) Collect(ch chan<- prometheus.Metric) {
	known := map[[2]string]bool{} // two sources that have one name would spoil all metrics
	c.sources.Report(func(s reputation.Status, n reputation.Counts) {
		if known[[2]string{s.Name, s.Kind}] {
			return
		}
		known[[2]string{s.Name, s.Kind}] = true
		send := func(d *prometheus.Desc, t prometheus.ValueType, v float64) {
			ch <- prometheus.MustNewConstMetric(d, t, v, label(s.Name), s.Kind)
		}
		up := 1.0
		if s.Problem != "" {
			up = 0
		}
		send(sourceUpDesc, prometheus.GaugeValue, up)
		send(sourceEntriesDesc, prometheus.GaugeValue, float64(s.Entries))
		if !s.Updated.IsZero() {
			send(sourceUpdatedDesc, prometheus.GaugeValue, float64(s.Updated.UnixMilli())/1e3)
		}
		send(sourceListedDesc, prometheus.CounterValue, float64(n.Listed))
		send(sourceMissingDesc, prometheus.CounterValue, float64(n.Missing))
	})
}

type pageSource struct {
	Name, Kind, Entries, Listed, Missing, Updated, Problem string
}

func (d *pageData) addSources(st *Status, now time.Time) {
	if st.config.Sources == nil {
		return
	}
	d.WouldDeny = number(value(st.denied))
	st.config.Sources.Report(func(s reputation.Status, n reputation.Counts) {
		p := pageSource{
			Name: s.Name, Kind: s.Kind, Entries: number(float64(s.Entries)), Problem: abridgedTo(s.Problem, 300),
			Listed: number(float64(n.Listed)), Missing: number(float64(n.Missing)), Updated: "never",
		}
		if !s.Updated.IsZero() {
			p.Updated = short(now.Sub(s.Updated)) + " ago"
		}
		d.Sources = append(d.Sources, p)
	})
}

// lookupTimeout bounds how long /lookup waits for sources.
const lookupTimeout = 3 * time.Second

// An explanation is what /lookup answers.
type explanation struct {
	Addr     netip.Addr    `json:"addr"`
	Country  string        `json:"country,omitempty"`
	ASN      uint32        `json:"asn,omitempty"`
	Org      string        `json:"org,omitempty"`
	State    string        `json:"state"`
	Score    uint8         `json:"score"` // from 0, the worst, to 100
	Reason   string        `json:"reason,omitempty"`
	Decision string        `json:"decision,omitempty"`
	Missing  string        `json:"missing,omitempty"` // names of sources that had no answer
	Lists    []lists.Match `json:"lists"`             // those that have the address
	Sources  []finding     `json:"sources"`           // what each says, all lists together being one
}

type finding struct {
	Source   string `json:"source"`
	State    string `json:"state"`
	Score    *uint8 `json:"score,omitempty"` // if listed
	Reason   string `json:"reason,omitempty"`
	Decision string `json:"decision,omitempty"`
}

// lookup answers what each list and other source says of an address: browsers
// with the page, others with JSON.
func (st *Status) lookup(w http.ResponseWriter, r *http.Request) {
	addr, err := netip.ParseAddr(strings.TrimSpace(r.FormValue("ip")))
	if err != nil {
		http.Error(w, "want /lookup?ip=ADDRESS", http.StatusBadRequest)
		return
	}
	if strings.Contains(r.Header.Get("Accept"), "text/html") {
		now := time.Now()
		d := st.pageData(now)
		d.Lookup = newLookupPage(st.explain(r.Context(), addr), now)
		d.write(w)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	_ = enc.Encode(st.explain(r.Context(), addr)) // fails if the client has gone
}

func (st *Status) explain(ctx context.Context, addr netip.Addr) *explanation {
	e := &explanation{
		Addr: addr.Unmap().WithZone(""), Score: reputation.BestScore, State: reputation.NotListed.String(),
		Lists: []lists.Match{}, Sources: []finding{}, // [] in JSON where there are none
	}
	if l := st.config.Lists; l != nil {
		e.Lists = append(e.Lists, l.Explain(addr)...)
		v := l.Lookup(addr)
		e.State, e.Score = v.State.String(), v.Score
	}
	if st.config.Sources == nil {
		return e
	}
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	v, all := st.config.Sources.Explain(ctx, addr)
	e.Country, e.ASN, e.Org = v.Country, v.ASN, v.Org
	e.State, e.Score, e.Reason, e.Decision, e.Missing = v.State.String(), v.Score, v.Reason, v.Decision, v.Missing
	for _, f := range all {
		found := finding{Source: f.Source, State: f.State.String(), Reason: f.Reason, Decision: f.Decision}
		if f.State == reputation.Listed {
			found.Score = &f.Score
		}
		e.Sources = append(e.Sources, found)
	}
	return e
}
