package judge

import (
	"context"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/go-kit/log/level"
	"github.com/spoa-go/spoa"
	"github.com/spoa-go/spoa/cmd/internal/reputation"
	"github.com/spoa-go/spoa/cmd/internal/reputation/lists"
	"github.com/spoa-go/spoa/cmd/internal/reputation/mmdb"
)

// A Counter counts verdicts.
type Counter interface {
	// Judged counts a verdict and the list or other source that it rests on, which
	// is empty if the address is not listed.
	Judged(source string, listed bool)
	// WouldDeny counts an address that is let through only since it is monitored.
	WouldDeny()
}

// Handler returns the handler of a message that names an address: it waits for the
// delay and sets the variables of the address, ip_score and what explains it. It
// fails if the message names no address to judge.
func (j *Judge) Handler(delay time.Duration, counter Counter) spoa.HandlerFunc {
	score := newScorer(j.lists, counter.Judged)
	if j.sources != nil {
		score = j.sources.scorer(counter.Judged, counter.WouldDeny)
	}
	return func(ctx context.Context, m *spoa.Message, a *spoa.Actions) error {
		if delay > 0 {
			t := time.NewTimer(delay)
			defer t.Stop()
			select {
			case <-t.C:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		ip, err := j.find.Find(m)
		if err != nil {
			return err
		}
		score(ctx, ip, a)
		return nil
	}
}

// scorer sets the variables of an address.
type scorer func(context.Context, netip.Addr, *spoa.Actions)

// newScorer returns one that goes by lists, or by chance if there are none, and
// reports to judged every verdict.
func newScorer(l *lists.Lists, judged func(list string, listed bool)) scorer {
	if l == nil {
		return func(_ context.Context, _ netip.Addr, a *spoa.Actions) {
			judged("", false)
			a.SetVar(spoa.ScopeSess, "ip_score", spoa.Uint32(rand.Uint32N(lists.BestScore+1)))
		}
	}
	set := func(v lists.Verdict, a *spoa.Actions) {
		a.SetVar(spoa.ScopeSess, "ip_score", spoa.Uint32(uint32(v.Score)))
		if v.State == lists.Listed {
			a.SetVar(spoa.ScopeSess, "ip_list", spoa.String(v.List))
		} else {
			// A session of several requests may have had one before a reload.
			a.UnsetVar(spoa.ScopeSess, "ip_list")
		}
	}
	var best spoa.Actions // for the many that are not listed
	set(lists.Verdict{Score: lists.BestScore}, &best)
	return func(_ context.Context, ip netip.Addr, a *spoa.Actions) {
		v := l.Lookup(ip)
		if v.State == lists.Listed {
			judged(v.List, true)
			set(v, a)
			return
		}
		judged("", false)
		a.Append(&best)
	}
}

// scorer returns one that goes by all sources, and reports to judged every
// verdict.
func (s *sources) scorer(judged func(source string, listed bool), denied func()) scorer {
	var best spoa.Actions // for the many that no source lists
	s.explain(&reputation.Verdict{Score: reputation.BestScore}, &best)
	return func(ctx context.Context, ip netip.Addr, a *spoa.Actions) {
		v := s.Judge(ctx, ip)
		judged(v.Source, v.State == reputation.Listed)
		if s.monitor && v.Score < s.denyBelow {
			denied()
			level.Info(s.logger).Log("msg", "would deny", "addr", v.Addr, "score", v.Score, "reason", v.Reason,
				"sources", v.Sources, "missing", v.Missing, "decision", v.Decision, "country", v.Country, "asn", v.ASN)
		}
		if v.State == reputation.NotListed && v.Missing == "" {
			a.Append(&best)
		} else {
			s.explain(&v, a)
		}
		s.locate(&v, a)
	}
}

// explain sets the score of a verdict and the variables that say what it rests on.
// What has no value is unset, since a session of several requests may have had one,
// unless none of the sources ever gives it one.
func (s *sources) explain(v *reputation.Verdict, a *spoa.Actions) {
	score, list, decision := v.Score, "", v.Decision
	if v.State == reputation.Listed {
		list = v.Source
	}
	if s.monitor {
		a.SetVar(spoa.ScopeSess, "ip_monitor", spoa.Uint32(uint32(score)))
		score, decision = reputation.BestScore, ""
	}
	a.SetVar(spoa.ScopeSess, "ip_score", spoa.Uint32(uint32(score)))
	setText(a, "ip_list", list)
	setText(a, "ip_reason", v.Reason)
	setText(a, "ip_sources", v.Sources)
	if s.decisions || s.zones {
		setText(a, "ip_missing", v.Missing)
	}
	if s.decisions {
		setText(a, "ip_decision", decision)
	}
}

// locate sets the variables that say where the address of a verdict belongs, or
// unsets them as explain does.
func (s *sources) locate(v *reputation.Verdict, a *spoa.Actions) {
	if len(s.places) == 0 {
		return
	}
	setText(a, "ip_country", v.Country)
	if !slices.ContainsFunc(s.places, (*mmdb.Database).HasNetworks) {
		return
	}
	setText(a, "ip_org", v.Org)
	if v.ASN == 0 {
		a.UnsetVar(spoa.ScopeSess, "ip_asn")
	} else {
		a.SetVar(spoa.ScopeSess, "ip_asn", spoa.Uint32(v.ASN))
	}
}

func setText(a *spoa.Actions, name, value string) {
	if value == "" {
		a.UnsetVar(spoa.ScopeSess, name)
		return
	}
	a.SetVar(spoa.ScopeSess, name, spoa.String(value))
}
