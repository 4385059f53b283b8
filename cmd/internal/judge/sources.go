package judge

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/go-kit/log"
	"github.com/spoa-go/spoa/cmd/internal/reputation"
	"github.com/spoa-go/spoa/cmd/internal/reputation/crowdsec"
	"github.com/spoa-go/spoa/cmd/internal/reputation/dnsbl"
	"github.com/spoa-go/spoa/cmd/internal/reputation/lists"
	"github.com/spoa-go/spoa/cmd/internal/reputation/mmdb"
)

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

// watchInterval is how often files are looked at for changes.
const watchInterval = time.Second

// openSources opens all sources. It returns nil if there are none but lists, and
// they are not monitored.
func (c *Config) openSources(l *lists.Lists, logger log.Logger) (*sources, error) {
	if !c.hasSources() && !c.Monitor && c.Replay == "" {
		return nil, nil
	}
	if !c.hasSources() && l == nil {
		return nil, errors.New("-monitor and -replay need something to judge by: lists or other sources")
	}
	s := &sources{
		logger: logger, monitor: c.Monitor, denyBelow: uint8(c.DenyBelow), decisions: c.CrowdSec != "", zones: len(c.Zones) > 0,
	}
	var all []reputation.Source
	if l != nil {
		all = append(all, listSource{l, new(reputation.Joiner)})
	}
	locators, more, err := s.openPlaces(c)
	if err != nil {
		return nil, err
	}
	all = append(all, more...)
	if c.CrowdSec != "" {
		source, err := s.openCrowdSec(c)
		if err != nil {
			return nil, err
		}
		all = append(all, source)
	}
	if more, err = s.openZones(c); err != nil {
		return nil, err
	}
	s.Combined, err = reputation.Combine(c.Budget, locators, append(all, more...))
	return s, err
}

// openPlaces opens what knows countries and networks, and what scores these.
func (s *sources) openPlaces(c *Config) (locators []reputation.Locator, all []reputation.Source, err error) {
	for _, path := range c.Databases {
		d, err := mmdb.Open(path, s.logger)
		if err != nil {
			return nil, nil, fmt.Errorf("-mmdb: %w", err)
		}
		locators, s.places = append(locators, d), append(s.places, d)
		s.addFile(d.Watch, d.Reload)
	}
	if len(c.Countries) > 0 {
		all = append(all, c.Countries)
	}
	if len(c.Networks.Numbers) > 0 {
		all = append(all, mmdb.NewNetworks(c.Networks.Numbers))
	}
	for _, file := range c.Networks.Files {
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

func (s *sources) openCrowdSec(c *Config) (reputation.Source, error) {
	key, err := c.readKey()
	if err != nil {
		return nil, err
	}
	cs, err := crowdsec.New(crowdsec.Config{URL: c.CrowdSec, Key: key, Scores: c.CrowdSecScores, Interval: c.CrowdSecInterval, Logger: s.logger})
	if err != nil {
		return nil, fmt.Errorf("-crowdsec: %w", err)
	}
	s.run = append(s.run, cs.Run)
	s.first = append(s.first, cs.Pull)
	return cs, nil
}

func (s *sources) openZones(c *Config) (all []reputation.Source, err error) {
	if len(c.Zones) == 0 {
		return nil, nil
	}
	r, err := dnsbl.NewResolver(c.DNS)
	if err != nil {
		return nil, fmt.Errorf("-dnsbl: %w", err)
	}
	for _, zone := range c.Zones {
		z := dnsbl.New(zone, r, s.logger)
		s.run = append(s.run, z.Run)
		all = append(all, z)
	}
	return all, nil
}

// prepare lets sources learn what they must know before they can judge. Their
// errors are logged and returned.
func (s *sources) prepare(ctx context.Context) error {
	if s == nil {
		return nil
	}
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

// listSource makes a source of all lists. Its findings have the name of the list
// that decided.
type listSource struct {
	lists   *lists.Lists
	reasons *reputation.Joiner
}

// Excludes implements reputation.Excluder.
func (s listSource) Excludes(addr netip.Addr) bool { return s.lists.Excludes(addr) }

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
