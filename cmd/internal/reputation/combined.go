package reputation

import (
	"context"
	"fmt"
	"math/bits"
	"net/netip"
	"sync/atomic"
	"time"
)

// maxSources is the number of bits in the set of those that are waited for.
const maxSources = 64

// A Verdict is what all sources together say of an address.
type Verdict struct {
	Subject
	State    State  // NotListed, Listed or Allowed
	Score    uint8  // the worst of all findings; BestScore if the address is allowed or not listed
	Source   string // name of the source that decided
	Reason   string // of the finding that decided
	Decision string // of the worst finding that has one; none if the address is allowed
	Sources  string // names, joined by commas, of the sources that list the address, or allow it
	Missing  string // names, joined by commas, of the sources that had no answer in time

	decisive uint8 // score of the finding that Decision is from
}

// Combined asks several sources. It may be used concurrently.
type Combined struct {
	budget    time.Duration
	locators  []Locator
	sources   []Source
	excluders []Excluder // of each source, nil if it is none
	counts    []counts   // of each source
	names     Joiner
}

type counts struct{ listed, missing atomic.Uint64 }

// Counts says how often a source listed a subject, and how often it had no
// answer in time.
type Counts struct{ Listed, Missing uint64 }

// Combine returns what asks the sources in their order, of subjects that the
// locators complete in theirs. All sources together get the budget to look for
// answers that are not at hand; 0 waits for none.
func Combine(budget time.Duration, locators []Locator, sources []Source) (*Combined, error) {
	if len(sources) > maxSources {
		return nil, fmt.Errorf("%d sources, want at most %d", len(sources), maxSources)
	}
	c := &Combined{budget: budget, locators: locators, sources: sources, counts: make([]counts, len(sources))}
	for _, s := range sources {
		e, _ := s.(Excluder)
		c.excluders = append(c.excluders, e)
	}
	return c, nil
}

// ended is the context of those who do not wait.
var ended = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// Judge asks all sources and returns within the budget, or when ctx ends. It
// does not allocate if all answers are at hand. It waits for no answer that
// cannot change the verdict.
func (c *Combined) Judge(ctx context.Context, addr netip.Addr) Verdict {
	var v Verdict
	excluded := c.exclude(addr)
	v.Subject, v.Score = c.Locate(addr), BestScore
	var pending uint64
	for i, s := range c.sources {
		if excluded&(1<<i) != 0 {
			continue
		}
		switch f := s.Judge(ended, v.Subject); f.State {
		case NotListed: // as mostly
		case Pending:
			pending |= 1 << i
		default:
			c.add(&v, i, f)
		}
	}
	if pending != 0 && !v.settled() {
		c.wait(ctx, &v, pending)
	}
	return v
}

// exclude returns the set of sources that have nothing to say of an address. They
// are asked one right after the other because what each looks at is seldom in the
// processor's caches, and it can wait for all of that at the same time.
func (c *Combined) exclude(addr netip.Addr) (excluded uint64) {
	addr = addr.Unmap().WithZone("")
	for i, e := range c.excluders {
		if e != nil && e.Excludes(addr) {
			excluded |= 1 << i
		}
	}
	return excluded
}

// wait adds to v what the pending sources say within the budget.
func (c *Combined) wait(ctx context.Context, v *Verdict, pending uint64) {
	if c.budget > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.budget)
		defer cancel()
	} else {
		ctx = ended
	}
	for ; pending != 0; pending &= pending - 1 {
		i := bits.TrailingZeros64(pending)
		c.add(v, i, c.sources[i].Judge(ctx, v.Subject))
	}
}

// settled reports whether no further finding can change the score.
func (v *Verdict) settled() bool {
	return v.State == Allowed || v.State == Listed && v.Score == 0
}

// add counts what source i found and combines v with it.
func (c *Combined) add(v *Verdict, i int, f Finding) {
	switch f.State {
	case Unknown, Pending:
		c.counts[i].missing.Add(1)
	case Listed:
		c.counts[i].listed.Add(1)
	}
	c.combine(v, f)
}

// combine combines v with a finding.
func (c *Combined) combine(v *Verdict, f Finding) {
	switch f.State {
	case Unknown, Pending:
		v.Missing = c.names.list(v.Missing, f.Source)
	case Allowed:
		if v.State != Allowed {
			v.State, v.Score, v.Source, v.Reason, v.Decision, v.Sources = Allowed, BestScore, f.Source, f.Reason, "", ""
		}
		v.Sources = c.names.list(v.Sources, f.Source)
	case Listed:
		if v.State == Allowed {
			return
		}
		if f.Decision != "" && (v.Decision == "" || f.Score < v.decisive) {
			v.Decision, v.decisive = f.Decision, f.Score
		}
		if v.State != Listed || f.Score < v.Score {
			v.State, v.Score, v.Source, v.Reason = Listed, f.Score, f.Source, f.Reason
		}
		v.Sources = c.names.list(v.Sources, f.Source)
	}
}

// Explain returns the verdict on an address and what each source says of it,
// waiting for answers until ctx ends. It counts nothing.
func (c *Combined) Explain(ctx context.Context, addr netip.Addr) (Verdict, []Finding) {
	v := Verdict{Subject: c.Locate(addr), Score: BestScore}
	all := make([]Finding, len(c.sources))
	for i, source := range c.sources {
		all[i] = source.Judge(ended, v.Subject) // so that all look for their answers at the same time
	}
	for i, source := range c.sources {
		if all[i].State == Pending {
			all[i] = source.Judge(ctx, v.Subject)
		}
		c.combine(&v, all[i])
	}
	return v, all
}

// Locate returns the Subject of an address.
func (c *Combined) Locate(addr netip.Addr) Subject {
	s := Subject{Addr: addr.Unmap().WithZone("")}
	for _, l := range c.locators {
		s = l.Locate(s)
	}
	return s
}

// Report calls f for each locator and then each source that is a Reporter, with
// what was counted of it.
func (c *Combined) Report(f func(Status, Counts)) {
	for _, l := range c.locators {
		if r, ok := l.(Reporter); ok {
			f(r.Status(), Counts{})
		}
	}
	for i, s := range c.sources {
		if r, ok := s.(Reporter); ok {
			f(r.Status(), Counts{c.counts[i].listed.Load(), c.counts[i].missing.Load()})
		}
	}
}
