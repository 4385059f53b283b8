// Package dnsbl asks DNS block lists (RFC 5782) for addresses, and remembers
// what they answer for as long as it holds.
//
// Only answers in 127.0.0.0/8 count. One in 127.255.255.0/24 says that the list
// does not want to answer; it and any address outside 127.0.0.0/8 are errors,
// never listings. A list that has 127.0.0.1, which none should have, is not
// believed.
package dnsbl

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-kit/log"
	"github.com/go-kit/log/level"
	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/spoa-go/spoa/cmd/internal/reputation"
)

const (
	cached      = 1 << 16          // answers kept of a zone
	leastTTL    = 5 * time.Second  // so that an answer is there when the address comes again
	mostTTL     = 24 * time.Hour   // of an answer that lists
	mostNoTTL   = time.Hour        // of one that does not
	errorTTL    = 5 * time.Second  // of none
	maxInFlight = 256              // questions to a zone
	maxFailures = 5                // in a row, after which one question at a time goes to a zone and nobody waits for it
	logPause    = time.Minute      // between errors of a zone that are logged
	checkPause  = 10 * time.Minute // between tests whether a zone can be believed
	retryPause  = time.Minute      // the same while it cannot
)

// Source is a reputation.Source of one zone.
type Source struct {
	Zone
	logger   log.Logger
	resolver *Resolver
	start    time.Time // what expiries count from, on the monotonic clock
	cache    *lru.Cache[netip.Addr, *answer]

	failures   atomic.Int32 // in a row
	disbelieve atomic.Bool

	mu         sync.Mutex // guards what follows; nothing else is locked while it is held but the cache
	inFlight   int
	answered   time.Time // last
	problem    string    // of the last question; empty if it was answered
	untested   string    // what the last test of the zone found; empty if nothing
	logged     time.Time // when an error was logged last
	suppressed int       // errors since
}

// answer is what a zone says of an address, or will say when done is closed.
type answer struct {
	done    chan struct{}
	finding reputation.Finding
	until   time.Duration // since the source's start
}

// New returns a Source of the zone. It asks nothing before Judge or Run.
func New(z Zone, r *Resolver, logger log.Logger) *Source {
	cache, _ := lru.New[netip.Addr, *answer](cached) // fails only for a size below 1
	return &Source{Zone: z, resolver: r, logger: logger, start: time.Now(), cache: cache}
}

// Judge implements reputation.Source.
func (s *Source) Judge(ctx context.Context, sub reputation.Subject) reputation.Finding {
	if !public(sub.Addr) {
		return reputation.Finding{Source: s.Name}
	}
	if s.disbelieve.Load() {
		return reputation.Finding{Source: s.Name, State: reputation.Unknown}
	}
	a, ok := s.cache.Get(sub.Addr)
	if !ok || a.over(s.start) {
		a = s.begin(sub.Addr)
	}
	if a == nil {
		return reputation.Finding{Source: s.Name, State: reputation.Unknown}
	}
	select {
	case <-a.done:
		return a.finding
	default:
	}
	if s.failing() {
		return reputation.Finding{Source: s.Name, State: reputation.Unknown}
	}
	select {
	case <-a.done:
		return a.finding
	case <-ctx.Done():
		return reputation.Finding{Source: s.Name, State: reputation.Pending}
	}
}

// public reports whether block lists know such addresses, and may hear of them.
func public(addr netip.Addr) bool {
	return addr.IsGlobalUnicast() && !addr.IsPrivate()
}

// over reports whether the answer is there and holds no longer.
func (a *answer) over(start time.Time) bool {
	select {
	case <-a.done:
		return time.Since(start) >= a.until
	default:
		return false
	}
}

func (s *Source) failing() bool { return s.failures.Load() >= maxFailures }

// begin asks for an address unless that is done already, and returns the answer
// to come, or nil if too many are to come.
func (s *Source) begin(addr netip.Addr) *answer {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a, ok := s.cache.Get(addr); ok && !a.over(s.start) {
		return a
	}
	limit := maxInFlight
	if s.failing() {
		limit = 1
	}
	if s.inFlight >= limit {
		return nil
	}
	s.inFlight++
	a := &answer{done: make(chan struct{})}
	s.cache.Add(addr, a)
	go s.complete(a, addr)
	return a
}

// complete asks for an address and completes its answer.
func (s *Source) complete(a *answer, addr netip.Addr) {
	codes, ttl, err := s.ask(addr)
	a.finding = reputation.Finding{Source: s.Name}
	switch score, code, listed := s.score(codes); {
	case err != nil:
		a.finding.State = reputation.Unknown
		ttl = errorTTL
	case listed:
		a.finding.State, a.finding.Score = reputation.Listed, score
		a.finding.Reason = fmt.Sprintf("dnsbl %s: %v", s.Name, code)
		ttl = min(ttl, mostTTL)
	default:
		ttl = min(ttl, mostNoTTL)
	}
	a.until = time.Since(s.start) + max(ttl, leastTTL)
	s.note(err)
	close(a.done)
}

// ask asks for an address and refuses answers that are none.
func (s *Source) ask(addr netip.Addr) ([]netip.Addr, time.Duration, error) {
	ctx, cancel := context.WithTimeout(context.Background(), lookupTimeout)
	defer cancel()
	codes, ttl, err := s.resolver.lookup(ctx, s.query(addr))
	for _, code := range codes {
		switch {
		case refusals.Contains(code):
			return nil, 0, fmt.Errorf("the zone refuses to answer with %v: is this resolver let in, and not asking too often?", code)
		case !answers.Contains(code):
			return nil, 0, fmt.Errorf("answer %v is outside %v", code, answers)
		}
	}
	return codes, ttl, err
}

// note counts the end of a question, and logs errors now and then.
func (s *Source) note(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inFlight--
	now := time.Now()
	if err == nil {
		s.failures.Store(0)
		s.answered, s.problem = now, ""
		return
	}
	s.failures.Add(1)
	s.problem = err.Error()
	if !s.logged.IsZero() && now.Sub(s.logged) < logPause {
		s.suppressed++
		return
	}
	level.Error(s.logger).Log("msg", "block list does not answer", "zone", s.Name, "err", err, "suppressed", s.suppressed)
	s.logged, s.suppressed = now, 0
}

// Status implements reputation.Reporter.
func (s *Source) Status() reputation.Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	return reputation.Status{
		Name: s.Name, Kind: "dnsbl", Entries: s.cache.Len(), Updated: s.answered,
		Problem: cmp.Or(s.untested, s.problem),
	}
}

// Run tests now and then whether the zone can be believed, until ctx ends.
func (s *Source) Run(ctx context.Context) error {
	for {
		pause := checkPause
		if err := s.Test(); err != nil {
			pause = retryPause
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-t.C:
		}
	}
}

var (
	errListsAll  = errors.New("the zone lists 127.0.0.1, which it must not: it seems to list everything and is not asked")
	errListsNone = errors.New("the zone does not list 127.0.0.2, as all do for tests: it may be empty or gone")
)

// Test asks for the addresses that each block list must have and must not have
// (RFC 5782, section 5). A zone that has the latter is not believed until it
// passes; one that lacks the former is, as private ones do. What it found
// is logged, unless it is the same as before.
func (s *Source) Test() error {
	err := s.test()
	found := ""
	if err != nil {
		found = err.Error()
	}
	if err == nil || errors.Is(err, errListsAll) || errors.Is(err, errListsNone) { // else it says nothing of the zone
		s.disbelieve.Store(errors.Is(err, errListsAll))
	}
	s.mu.Lock()
	again := s.untested == found
	s.untested = found
	s.mu.Unlock()
	switch {
	case again:
	case err != nil:
		level.Error(s.logger).Log("msg", "block list failed its test", "zone", s.Name, "err", err)
	default:
		level.Info(s.logger).Log("msg", "block list passes its test again", "zone", s.Name)
	}
	return err
}

func (s *Source) test() error {
	codes, _, err := s.ask(netip.AddrFrom4([4]byte{127, 0, 0, 1}))
	if err != nil {
		return err
	}
	if len(codes) > 0 {
		return errListsAll
	}
	codes, _, err = s.ask(netip.AddrFrom4([4]byte{127, 0, 0, 2}))
	if err == nil && len(codes) == 0 {
		err = errListsNone
	}
	return err
}
