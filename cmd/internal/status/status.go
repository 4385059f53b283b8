// Package status shows over HTTP what the agent does: Prometheus metrics, health
// and readiness, and a page for people.
package status

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	dto "github.com/prometheus/client_model/go"
	"github.com/spoa-go/spoa"
	"github.com/spoa-go/spoa/cmd/internal/listen"
	"github.com/spoa-go/spoa/cmd/internal/reputation"
	"github.com/spoa-go/spoa/cmd/internal/reputation/lists"
)

// Config names what a Status shows.
type Config struct {
	Conns    func() []spoa.ConnInfo // the agent's
	Lists    *lists.Lists           // nil: none
	Sources  *reputation.Combined   // nil: none but lists
	TLS      *listen.TLS            // nil: none
	Build    Build
	Messages []string      // that have a handler
	Dropped  func() uint64 // how many lines the log has lost; nil: none
}

// Status counts what the agent does, and shows it over HTTP. A label never
// holds what a peer or a client chooses: no address, no engine-id, and names of
// messages only if there is a handler for them.
type Status struct {
	config   Config
	registry *prometheus.Registry
	started  time.Time
	draining atomic.Bool

	messages map[string]*messageMetrics
	other    *messageMetrics               // of all other messages
	verdicts map[string]prometheus.Counter // by list or other source that was there at the start
	verdict  *prometheus.CounterVec
	lateMu   sync.RWMutex
	late     map[string]prometheus.Counter // by list that came later; guarded by lateMu
	unlisted prometheus.Counter
	random   prometheus.Counter
	opened   prometheus.Counter
	checks   prometheus.Counter
	denied   prometheus.Counter // that would be, with sources
	faults   map[origin]prometheus.Counter
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

// outcomeNames are the labels of what becomes of a message, by its fault.
var outcomeNames = [outcomes]string{"ok", "error", "panic", "timeout", "overload", "no_handler"}

const outcomes = spoa.FaultNoHandler + 1

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

// New returns the status of an agent, which must have its Hooks.
func New(c Config) *Status {
	st := &Status{
		config:   c,
		registry: prometheus.NewRegistry(),
		started:  time.Now(),
		messages: make(map[string]*messageMetrics),
		verdicts: make(map[string]prometheus.Counter),
		late:     make(map[string]prometheus.Counter),
		faults:   make(map[origin]prometheus.Counter),
	}
	st.registerMessages()
	st.registerVerdicts()
	st.registerSources()
	st.opened = st.counter("connections_opened_total", "Connections accepted, those of health checks included.").WithLabelValues()
	st.checks = st.counter("health_checks_total", "Health checks answered.").WithLabelValues()
	st.registerFaults()
	if c.TLS != nil {
		st.registerTLS()
	}
	if c.Dropped != nil {
		st.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "spoa_log_lines_dropped_total", Help: "Lines of the log that could not be written.",
		}, func() float64 { return float64(c.Dropped()) }))
	}
	st.registry.MustRegister(st, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "spoa_build_info", Help: "Always 1; the labels say what runs.",
			ConstLabels: prometheus.Labels{"version": c.Build.Version, "revision": c.Build.Revision, "goversion": c.Build.Go},
		}, func() float64 { return 1 }))
	return st
}

// counter returns a counter vector that is registered.
func (st *Status) counter(name, help string, labels ...string) *prometheus.CounterVec {
	v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "spoa_" + name, Help: help}, labels)
	st.registry.MustRegister(v)
	return v
}

func (st *Status) registerMessages() {
	handled := st.counter("messages_total", "Messages of NOTIFYs by name (those with a handler) and outcome.", "message", "outcome")
	took := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "spoa_handler_duration_seconds", Help: "Time that handlers took.",
		Buckets: []float64{10e-6, 25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1, 2.5},
	}, []string{"message"})
	st.registry.MustRegister(took)
	newMessage := func(name string) *messageMetrics {
		mm := &messageMetrics{name: name, time: took.WithLabelValues(name).(prometheus.Histogram)}
		for o := range mm.count {
			mm.count[o] = handled.WithLabelValues(name, outcomeNames[o])
		}
		return mm
	}
	for _, name := range st.config.Messages {
		st.messages[name] = newMessage(name)
	}
	st.other = newMessage("other")
}

func (st *Status) registerVerdicts() {
	verdicts := st.counter("verdicts_total",
		"Addresses judged: listed (by which list or other source; \"(other)\" after 1000 names), unlisted (or allowed), or given a random score.", "verdict", "list")
	random := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "spoa_random_scores", Help: "1 if there is no list or other source: scores are random then, for trying out only.",
	})
	st.registry.MustRegister(random)
	if st.config.Lists == nil && st.config.Sources == nil {
		random.Set(1)
		st.random = verdicts.WithLabelValues("random", "")
		return
	}
	st.verdict = verdicts
	st.unlisted = verdicts.WithLabelValues("unlisted", "")
	if st.config.Lists != nil {
		for _, s := range st.config.Lists.Stats() {
			if !s.Allow { // two files may have one name, and so one counter
				st.verdicts[s.Name] = verdicts.WithLabelValues("listed", label(s.Name))
			}
		}
	}
	if st.config.Sources != nil {
		st.config.Sources.Report(func(s reputation.Status, _ reputation.Counts) {
			if s.Kind != "mmdb" { // which judges nothing
				st.verdicts[s.Name] = verdicts.WithLabelValues("listed", label(s.Name))
			}
		})
	}
}

func (st *Status) registerFaults() {
	faults := st.counter("faults_total",
		"Connections ended by a fault, by status code of SPOP and who reported it; code network: by the network, or TLS.", "code", "by")
	origins := []origin{{networkCode, ""}}
	for _, by := range []string{byAgent, byHAProxy} {
		origins = append(origins, origin{otherCode, by})
		for _, s := range faultCodes {
			origins = append(origins, origin{statusCode(s), by})
		}
	}
	for _, o := range origins {
		st.faults[o] = faults.WithLabelValues(o.code, o.by)
	}
}

func (st *Status) registerTLS() {
	reloads := func(result string, n func() uint64) {
		st.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "spoa_certificate_reloads_total", Help: "Reloads of the certificates by result.",
			ConstLabels: prometheus.Labels{"result": result},
		}, func() float64 { return float64(n()) }))
	}
	reloads("ok", func() uint64 { ok, _ := st.config.TLS.Reloads(); return ok })
	reloads("failed", func() uint64 { _, failed := st.config.TLS.Reloads(); return failed })
	st.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "spoa_certificate_expiry_timestamp_seconds", Help: "When the certificate runs out.",
	}, func() float64 { return float64(st.config.TLS.Expiry().Unix()) }))
}

func statusCode(s spoa.Status) string { return strconv.FormatUint(uint64(s), 10) }

// Hooks returns the functions that the agent has to call.
func (st *Status) Hooks() spoa.Hooks {
	return spoa.Hooks{
		ConnOpened: func(spoa.Peer) { st.opened.Inc() },
		ConnClosed: st.connClosed,
		Message:    st.handled,
	}
}

func (st *Status) handled(e spoa.MessageEvent) {
	mm, ok := st.messages[e.Message]
	if !ok {
		mm = st.other
	}
	mm.count[e.Fault].Inc()
	if e.Fault != spoa.FaultOverload && e.Fault != spoa.FaultNoHandler { // these were not called
		mm.time.Observe(e.Took.Seconds())
	}
}

func (st *Status) connClosed(p spoa.Peer, err error) {
	if p.HealthCheck {
		st.checks.Inc()
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
		if st.faults[o] == nil {
			o.code = otherCode
		}
	}
	st.faults[o].Inc()
}

// Judged counts a verdict, and the list or other source that it rests on.
func (st *Status) Judged(list string, listed bool) {
	switch {
	case st.random != nil:
		st.random.Inc()
	case listed:
		c := st.listed(list)
		if c == nil {
			c = st.listedLate(list)
		}
		c.Inc()
	default:
		st.unlisted.Inc()
	}
}

const (
	// maxListed bounds the names of lists that have a verdict counter of their own:
	// the files of a directory may have a new name each day.
	maxListed   = 1000
	otherListed = "(other)"
)

// listed returns the verdict counter that a list or other source has of its own,
// nil if it has none.
func (st *Status) listed(name string) prometheus.Counter {
	if c := st.verdicts[name]; c != nil {
		return c
	}
	st.lateMu.RLock()
	defer st.lateMu.RUnlock()
	return st.late[name]
}

// listedLate returns the verdict counter of a list that is new in a directory. It
// is shared if there have been too many.
func (st *Status) listedLate(name string) prometheus.Counter {
	st.lateMu.Lock()
	defer st.lateMu.Unlock()
	if len(st.verdicts)+len(st.late) >= maxListed {
		return st.verdict.WithLabelValues("listed", otherListed)
	}
	c := st.verdict.WithLabelValues("listed", label(name))
	st.late[name] = c
	return c
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
func (st *Status) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{connsDesc, inFlightDesc, entriesDesc, badDesc, ageDesc, loadedDesc, reloadsDesc,
		refusedDesc, warningsDesc, checkedDesc, statusDesc, nextDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (st *Status) Collect(ch chan<- prometheus.Metric) {
	send := func(d *prometheus.Desc, t prometheus.ValueType, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, t, v, labels...)
	}
	states, inFlight := map[string]int{}, 0
	for _, c := range st.config.Conns() {
		states[connState(c)]++
		inFlight += c.InFlight
	}
	for _, s := range []string{"hello", "idle", "busy"} {
		send(connsDesc, prometheus.GaugeValue, float64(states[s]), s)
	}
	send(inFlightDesc, prometheus.GaugeValue, float64(inFlight))
	if st.config.Lists == nil {
		return
	}
	for _, s := range st.config.Lists.Stats() {
		labels := []string{label(s.Name), label(s.File), listKind(s)}
		send(entriesDesc, prometheus.GaugeValue, float64(s.Entries), labels...)
		send(badDesc, prometheus.GaugeValue, float64(s.BadLines), labels...)
		if !s.Loaded.IsZero() { // a new file of a directory may never have been in force
			send(ageDesc, prometheus.GaugeValue, time.Since(s.Modified).Seconds(), labels...)
			send(loadedDesc, prometheus.GaugeValue, float64(s.Loaded.UnixMilli())/1e3, labels...)
		}
		send(reloadsDesc, prometheus.CounterValue, float64(s.Reloads), append(labels, "ok")...)
		send(reloadsDesc, prometheus.CounterValue, float64(s.Failures), append(labels, "failed")...)
		collectList(s, labels, send)
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

// maxLabel bounds the bytes of a label. The longest name of a file has 255.
const maxLabel = 300

// label returns the name of a list, a file or a source as a label: as it is, but
// for what is not printable, or endless. Different names stay so.
func label(s string) string {
	s = reputation.Printable(s)
	if len(s) > maxLabel {
		h := fnv.New64a()
		h.Write([]byte(s))
		s = fmt.Sprintf("%s… %x", strings.ToValidUTF8(s[:maxLabel], ""), h.Sum64())
	}
	return s
}

func listKind(s lists.Stats) string {
	if s.Allow {
		return "allow"
	}
	return "reputation"
}

// sampleUntil samples until ctx ends.
func (st *Status) sampleUntil(ctx context.Context) {
	second := time.NewTicker(time.Second)
	defer second.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-second.C:
			st.sample()
		}
	}
}

// sample is called every second, for rates.
func (st *Status) sample() {
	for _, mm := range st.all() {
		n, _, _ := mm.counts()
		mm.mu.Lock()
		mm.now, mm.last = n-mm.last, n
		mm.peak = max(mm.peak, mm.now)
		mm.mu.Unlock()
	}
}

// all returns the messages by name, the others last.
func (st *Status) all() (all []*messageMetrics) {
	for _, mm := range st.messages {
		all = append(all, mm)
	}
	slices.SortFunc(all, func(a, b *messageMetrics) int { return cmp.Compare(a.name, b.name) })
	return append(all, st.other)
}

// counts returns how many messages there were, how many failed, and by outcome.
func (mm *messageMetrics) counts() (total, failed float64, by [outcomes]float64) {
	for o, c := range mm.count {
		by[o] = value(c)
		total += by[o]
	}
	return total, total - by[0], by
}

func value(c prometheus.Counter) float64 { return read(c).GetCounter().GetValue() }

func read(m prometheus.Metric) *dto.Metric {
	var d dto.Metric
	_ = m.Write(&d) // fails for what is no counter or histogram of this package
	return &d
}
