package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/go-kit/log"
	"github.com/go-kit/log/level"
	"github.com/oklog/run"
	"github.com/spoa-go/spoa"
	"github.com/spoa-go/spoa/cmd/internal/replay"
	"github.com/spoa-go/spoa/cmd/internal/reputation"
	"github.com/spoa-go/spoa/cmd/internal/reputation/crowdsec"
	"github.com/spoa-go/spoa/cmd/internal/reputation/dnsbl"
	"github.com/spoa-go/spoa/cmd/internal/reputation/lists"
	"github.com/spoa-go/spoa/cmd/internal/reputation/mmdb"
)

const sourcesUsage = `
  -crowdsec url follow the decisions of the CrowdSec local API there, such as
                http://127.0.0.1:8080
  -crowdsec-key file
                with the key in this file, from cscli bouncers add; or
                SPOA_CROWDSEC_KEY with the key itself
  -crowdsec-score type=score
                scores of decisions (default ban=0, captcha=30, other=50);
                repeatable
  -crowdsec-interval time
                how often it is asked (default 10s)
  -dnsbl zone[=score], -dnsbl zone=code:score/code:score...
                ask this DNS block list; a code is an answer, such as 127.0.0.4,
                or the last number of one, or a range of these: 4-7; repeatable
  -dns host:port
                ask this server (default those of /etc/resolv.conf)
  -mmdb file    find countries and networks in this MaxMind DB file; repeatable
  -country CC=score, -asn number=score
                scores of countries and networks; repeatable
  -asn file[=score]
                the networks of this list, such as Spamhaus ASN-DROP, have that
                score (default 0); repeatable
  -budget time  how long a verdict may wait for these (default 5ms); variable
                ip_missing names those that it could not wait for
  -monitor      score 100 whatever is found, and say in log and metrics what
                would have been denied
  -replay file  say which requests in this log would have been denied, and exit;
                - is standard input
  -deny-below score
                what -monitor and -replay take for denied (default 20)
`

// sourceFlags are the flags of all sources but lists.
type sourceFlags struct {
	crowdsec  string
	key       string // file, or the key itself if it comes from the environment
	scores    crowdsec.Scores
	interval  time.Duration
	zones     dnsbl.Zones
	dns       string
	databases stringList
	countries mmdb.Countries
	networks  mmdb.NetworkFlags
	budget    time.Duration
	monitor   bool
	replay    string
	denyBelow int
}

func (f *sourceFlags) register(flags *flag.FlagSet) {
	flags.StringVar(&f.crowdsec, "crowdsec", "", "")
	flags.StringVar(&f.key, "crowdsec-key", "", "")
	flags.Var(multi{&f.scores}, "crowdsec-score", "")
	flags.Var(period{&f.interval}, "crowdsec-interval", "")
	flags.Var(multi{&f.zones}, "dnsbl", "")
	flags.StringVar(&f.dns, "dns", "", "")
	flags.Var(multi{&f.databases}, "mmdb", "")
	flags.Var(multi{&f.countries}, "country", "")
	flags.Var(multi{&f.networks}, "asn", "")
	flags.Var(period{&f.budget}, "budget", "")
	flags.BoolVar(&f.monitor, "monitor", false, "")
	flags.StringVar(&f.replay, "replay", "", "")
	flags.Var(number{&f.denyBelow, 0, reputation.BestScore, "a score"}, "deny-below", "")
}

// validate finds what is wrong with the flags together.
func (f *sourceFlags) validate() error {
	scored := len(f.countries)+len(f.networks.Numbers)+len(f.networks.Files) > 0
	switch {
	case f.key != "" && f.crowdsec == "":
		return errors.New("-crowdsec-key needs -crowdsec")
	case f.crowdsec != "" && f.key == "":
		return errors.New("-crowdsec needs -crowdsec-key FILE, or SPOA_CROWDSEC_KEY with the key")
	case f.interval <= 0:
		return fmt.Errorf("-crowdsec-interval %v: want more than 0", f.interval)
	case scored && len(f.databases) == 0:
		return errors.New("-country and -asn need -mmdb, to know where addresses belong")
	}
	return nil
}

// any reports whether there is a source.
func (f *sourceFlags) any() bool { return f.crowdsec != "" || len(f.zones)+len(f.databases) > 0 }

// readKey returns the key of the local API. The flag takes its
// value from SPOA_CROWDSEC_KEY too, but that is not the name of a file.
func (f *sourceFlags) readKey() (string, error) {
	if f.key == os.Getenv("SPOA_CROWDSEC_KEY") {
		return f.key, nil
	}
	b, err := os.ReadFile(f.key)
	if err != nil {
		return "", fmt.Errorf("-crowdsec-key: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// sources are what addresses are judged by if there is more than lists.
type sources struct {
	*reputation.Combined
	logger    log.Logger
	monitor   bool
	denyBelow uint8
	run       []func(context.Context) error // until their context ends
	reload    []func() error                // which log their errors
	first     []func(context.Context) error // to know something before the first address comes, which log their errors
	places    []*mmdb.Database
	decisions bool // there is a CrowdSec
	zones     bool // there is a DNS block list
}

const (
	watchInterval  = time.Second     // how often files are looked at for changes
	prepareTimeout = 2 * time.Second // how long a start waits for what sources must know
	lookUpTimeout  = 5 * time.Second // how long -lookup waits for answers
)

// openSources opens all sources. It returns nil if there are none but lists, and
// they are not monitored.
func (c *config) openSources(l *lists.Lists, logger log.Logger) (*sources, error) {
	f := &c.sources
	if !f.any() && !f.monitor && f.replay == "" {
		return nil, nil
	}
	if !f.any() && l == nil {
		return nil, errors.New("-monitor and -replay need something to judge by: lists or other sources")
	}
	s := &sources{logger: logger, monitor: f.monitor, denyBelow: uint8(f.denyBelow)}
	var all []reputation.Source
	if l != nil {
		all = append(all, listSource{l, new(reputation.Joiner)})
	}
	locators, more, err := s.openPlaces(f)
	if err != nil {
		return nil, err
	}
	all = append(all, more...)
	if f.crowdsec != "" {
		source, err := s.openCrowdSec(f)
		if err != nil {
			return nil, err
		}
		all = append(all, source)
	}
	if more, err = s.openZones(f); err != nil {
		return nil, err
	}
	s.Combined, err = reputation.Combine(f.budget, locators, append(all, more...))
	return s, err
}

// openPlaces opens what knows countries and networks, and what scores these.
func (s *sources) openPlaces(f *sourceFlags) (locators []reputation.Locator, all []reputation.Source, err error) {
	for _, path := range f.databases {
		d, err := mmdb.Open(path, s.logger)
		if err != nil {
			return nil, nil, fmt.Errorf("-mmdb: %w", err)
		}
		locators = append(locators, d)
		s.addFile(d.Watch, d.Reload)
		s.places = append(s.places, d)
	}
	if len(f.countries) > 0 {
		all = append(all, f.countries)
	}
	if len(f.networks.Numbers) > 0 {
		all = append(all, mmdb.NewNetworks(f.networks.Numbers))
	}
	for _, file := range f.networks.Files {
		n, err := mmdb.OpenNetworks(file, s.logger)
		if err != nil {
			return nil, nil, fmt.Errorf("-asn: %w", err)
		}
		all = append(all, n)
		s.addFile(n.Watch, n.Reload)
	}
	return locators, all, nil
}

// addFile remembers how a file is read again.
func (s *sources) addFile(watch func(context.Context, time.Duration) error, reload func() error) {
	s.run = append(s.run, func(ctx context.Context) error { return watch(ctx, watchInterval) })
	s.reload = append(s.reload, reload)
}

func (s *sources) openCrowdSec(f *sourceFlags) (reputation.Source, error) {
	key, err := f.readKey()
	if err != nil {
		return nil, err
	}
	cs, err := crowdsec.New(crowdsec.Config{URL: f.crowdsec, Key: key, Scores: f.scores, Interval: f.interval, Logger: s.logger})
	if err != nil {
		return nil, fmt.Errorf("-crowdsec: %w", err)
	}
	s.decisions = true
	s.run = append(s.run, cs.Run)
	s.first = append(s.first, cs.Pull)
	return cs, nil
}

func (s *sources) openZones(f *sourceFlags) (all []reputation.Source, err error) {
	if len(f.zones) == 0 {
		return nil, nil
	}
	r, err := dnsbl.NewResolver(f.dns)
	if err != nil {
		return nil, fmt.Errorf("-dnsbl: %w", err)
	}
	for _, zone := range f.zones {
		z := dnsbl.New(zone, r, s.logger)
		s.run = append(s.run, z.Run)
		all = append(all, z)
		s.zones = true
	}
	return all, nil
}

// prepare lets sources learn what they must know before they can judge. Their
// errors are logged and returned.
func (s *sources) prepare(ctx context.Context) error {
	var errs []error
	for _, first := range s.first {
		errs = append(errs, first(ctx))
	}
	return errors.Join(errs...)
}

// count returns the number of sources that are no lists, places included.
func (s *sources) count() (n int) {
	if s == nil {
		return 0
	}
	s.Report(func(reputation.Status, reputation.Counts) { n++ })
	return n
}

// lookUp writes what all sources say of an address.
func (s *sources) lookUp(w io.Writer, addr netip.Addr) error {
	if err := s.prepare(context.Background()); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), lookUpTimeout)
	defer cancel()
	v, all := s.Explain(ctx, addr)
	fmt.Fprintf(w, "%v: %v, score %d", v.Addr, v.State, v.Score)
	for _, more := range []struct{ name, value string }{
		{"", v.Reason}, {"decision ", v.Decision}, {"country ", v.Country}, {"network ", network(&v)}, {"without an answer of ", v.Missing},
	} {
		if more.value != "" {
			fmt.Fprintf(w, ", %s%s", more.name, more.value)
		}
	}
	fmt.Fprintln(w)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "\tSOURCE\tSTATE\tSCORE\tREASON")
	for _, f := range all {
		mark, score := "", ""
		if f.Reason != "" && f.Reason == v.Reason {
			mark = "*"
		}
		if f.State == reputation.Listed {
			score = fmt.Sprint(f.Score)
		}
		fmt.Fprintf(t, "%s\t%s\t%v\t%s\t%s\n", mark, f.Source, f.State, score, f.Reason)
	}
	return t.Flush()
}

func network(v *reputation.Verdict) string {
	if v.ASN == 0 {
		return ""
	}
	return strings.TrimSpace(fmt.Sprintf("AS%d %s", v.ASN, v.Org))
}

// addTo lets the sources run in a group.
func (s *sources) addTo(g *run.Group) {
	if s == nil {
		return
	}
	for _, f := range s.run {
		g.Add(actor(f))
	}
}

// reloadAll reads all files again.
func (s *sources) reloadAll() {
	if s == nil {
		return
	}
	for _, reload := range s.reload {
		_ = reload() // logs
	}
}

// combined returns what judges, nil if there are no sources.
func (s *sources) combined() *reputation.Combined {
	if s == nil {
		return nil
	}
	return s.Combined
}

// replayLog judges the addresses of the log that -replay names.
func replayLog(c *config, stdout, stderr io.Writer) error {
	logger := c.logger(stderr)
	l, err := c.openLists(context.Background(), logger)
	if err != nil {
		return err
	}
	s, err := c.openSources(l, logger)
	if err != nil {
		return err
	}
	if err := s.prepare(context.Background()); err != nil {
		return err
	}
	log := os.Stdin
	if c.sources.replay != "-" {
		if log, err = os.Open(c.sources.replay); err != nil {
			return fmt.Errorf("-replay: %w", err)
		}
		defer log.Close()
	}
	if err := replay.Run(stdout, log, s.explainLists(l), s.denyBelow); err != nil {
		return fmt.Errorf("-replay %s: %w", c.sources.replay, err)
	}
	return nil
}

// explainLists returns what judges an address and names each list that has it,
// not only the one that decides.
func (s *sources) explainLists(l *lists.Lists) replay.Judge {
	if l == nil {
		return s.Explain
	}
	return func(ctx context.Context, addr netip.Addr) (reputation.Verdict, []reputation.Finding) {
		v, all := s.Explain(ctx, addr)
		all = all[1:] // the first are all lists together
		for _, m := range l.Explain(addr) {
			if !m.Allow {
				all = append(all, reputation.Finding{Source: m.List, State: reputation.Listed, Score: m.Score})
			}
		}
		return v, all
	}
}

// scorer returns one that goes by all sources, and reports to judged every
// verdict.
func (s *sources) scorer(judged func(source string, listed bool), denied func()) scorer {
	return func(ctx context.Context, ip netip.Addr, a *spoa.Actions) {
		v := s.Judge(ctx, ip)
		judged(v.Source, v.State == reputation.Listed)
		score := v.Score
		if s.monitor {
			if v.Score < s.denyBelow {
				denied()
				level.Info(s.logger).Log("msg", "would deny", "addr", v.Addr, "score", v.Score, "reason", v.Reason,
					"sources", v.Sources, "missing", v.Missing, "decision", v.Decision, "country", v.Country, "asn", v.ASN)
			}
			a.SetVar(spoa.ScopeSess, "ip_monitor", spoa.Uint32(uint32(v.Score)))
			score = reputation.BestScore
		}
		a.SetVar(spoa.ScopeSess, "ip_score", spoa.Uint32(uint32(score)))
		s.explain(&v, a)
	}
}

// explain sets the variables that say what a verdict rests on. What has no value
// is unset, since a session of several requests may have had one, unless none of
// the sources ever gives it one.
func (s *sources) explain(v *reputation.Verdict, a *spoa.Actions) {
	set := func(name, value string) {
		if value == "" {
			a.UnsetVar(spoa.ScopeSess, name)
			return
		}
		a.SetVar(spoa.ScopeSess, name, spoa.String(value))
	}
	list := ""
	if v.State == reputation.Listed {
		list = v.Source
	}
	set("ip_list", list)
	set("ip_reason", v.Reason)
	set("ip_sources", v.Sources)
	if s.decisions || s.zones {
		set("ip_missing", v.Missing)
	}
	if s.decisions {
		decision := v.Decision
		if s.monitor {
			decision = ""
		}
		set("ip_decision", decision)
	}
	if len(s.places) == 0 {
		return
	}
	set("ip_country", v.Country)
	if !slices.ContainsFunc(s.places, (*mmdb.Database).HasNetworks) {
		return
	}
	set("ip_org", v.Org)
	if v.ASN == 0 {
		a.UnsetVar(spoa.ScopeSess, "ip_asn")
	} else {
		a.SetVar(spoa.ScopeSess, "ip_asn", spoa.Uint32(v.ASN))
	}
}

// listSource makes a source of all lists. Its findings have the name of the list
// that decided.
type listSource struct {
	lists   *lists.Lists
	reasons *reputation.Joiner
}

// Judge implements reputation.Source. It never waits.
func (s listSource) Judge(_ context.Context, sub reputation.Subject) reputation.Finding {
	v := s.lists.Lookup(sub.Addr)
	switch v.State {
	case lists.Listed:
		return reputation.Finding{Source: v.List, State: reputation.Listed, Score: v.Score, Reason: s.reasons.Join("list", " ", v.List)}
	case lists.Allowed:
		return reputation.Finding{Source: v.List, State: reputation.Allowed, Reason: s.reasons.Join("allow list", " ", v.List)}
	}
	return reputation.Finding{Source: "lists"}
}
