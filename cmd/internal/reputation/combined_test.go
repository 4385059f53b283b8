package reputation

import (
	"context"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

var subject = netip.MustParseAddr("192.0.2.1")

// fixed always finds the same.
type fixed Finding

func (f fixed) Judge(context.Context, Subject) Finding { return Finding(f) }

// excluding finds what fixed does, but of one address only, and excludes all others.
type excluding struct {
	fixed
	addr netip.Addr
}

func (e excluding) Excludes(addr netip.Addr) bool { return addr != e.addr }

func (e excluding) Judge(ctx context.Context, s Subject) Finding {
	if s.Addr != e.addr {
		panic("judged what is excluded")
	}
	return e.fixed.Judge(ctx, s)
}

// late has its finding some time after it was first asked.
type late struct {
	after time.Duration
	found Finding
	ready chan struct{}
}

func (l *late) Judge(ctx context.Context, _ Subject) Finding {
	if l.ready == nil {
		l.ready = make(chan struct{})
		time.AfterFunc(l.after, func() { close(l.ready) })
	}
	select {
	case <-l.ready: // also if ctx has ended
		return l.found
	default:
	}
	select {
	case <-l.ready:
		return l.found
	case <-ctx.Done():
		return Finding{Source: l.found.Source, State: Pending}
	}
}

// place is a Locator that knows one address.
type place struct{ Subject }

func (p place) Locate(s Subject) Subject {
	if s.Addr == p.Addr && s.Country == "" {
		s.Country = p.Country
	}
	if s.Addr == p.Addr && s.ASN == 0 {
		s.ASN, s.Org = p.ASN, p.Org
	}
	return s
}

func combine(t testing.TB, budget time.Duration, sources ...Source) *Combined {
	t.Helper()
	c, err := Combine(budget, nil, sources)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestCombinedRule(t *testing.T) {
	var (
		clean   = fixed{Source: "clean"}
		bad     = fixed{Source: "bad", State: Listed, Score: 10, Reason: "bad: spam"}
		worse   = fixed{Source: "worse", State: Listed, Score: 0, Reason: "worse: attacks"}
		captcha = fixed{Source: "cs", State: Listed, Score: 30, Reason: "cs: captcha", Decision: "captcha"}
		ban     = fixed{Source: "cs2", State: Listed, Score: 0, Reason: "cs2: ban", Decision: "ban"}
		allow   = fixed{Source: "allow", State: Allowed, Reason: "allow: office"}
		gone    = fixed{Source: "gone", State: Unknown}
	)
	for name, test := range map[string]struct {
		sources []Source
		want    Verdict
	}{
		"none":                    {nil, Verdict{Score: 100}},
		"not listed":              {[]Source{clean}, Verdict{Score: 100}},
		"listed":                  {[]Source{clean, bad}, Verdict{State: Listed, Score: 10, Source: "bad", Reason: "bad: spam", Sources: "bad"}},
		"worst wins, last":        {[]Source{bad, worse}, Verdict{State: Listed, Score: 0, Source: "worse", Reason: "worse: attacks", Sources: "bad,worse"}},
		"worst wins, first":       {[]Source{worse, bad}, Verdict{State: Listed, Score: 0, Source: "worse", Reason: "worse: attacks", Sources: "worse,bad"}},
		"first of equals":         {[]Source{worse, ban}, Verdict{State: Listed, Score: 0, Source: "worse", Reason: "worse: attacks", Sources: "worse,cs2", Decision: "ban"}},
		"decision of another":     {[]Source{worse, captcha}, Verdict{State: Listed, Score: 0, Source: "worse", Reason: "worse: attacks", Sources: "worse,cs", Decision: "captcha"}},
		"worst decision":          {[]Source{worse, captcha, ban}, Verdict{State: Listed, Score: 0, Source: "worse", Reason: "worse: attacks", Sources: "worse,cs,cs2", Decision: "ban"}},
		"worst decision, first":   {[]Source{ban, captcha}, Verdict{State: Listed, Score: 0, Source: "cs2", Reason: "cs2: ban", Sources: "cs2,cs", Decision: "ban"}},
		"allow beats all, last":   {[]Source{ban, bad, allow}, Verdict{State: Allowed, Score: 100, Source: "allow", Reason: "allow: office", Sources: "allow"}},
		"allow beats all, first":  {[]Source{allow, ban, bad}, Verdict{State: Allowed, Score: 100, Source: "allow", Reason: "allow: office", Sources: "allow"}},
		"missing":                 {[]Source{gone, bad}, Verdict{State: Listed, Score: 10, Source: "bad", Reason: "bad: spam", Sources: "bad", Missing: "gone"}},
		"all missing is no score": {[]Source{gone, gone}, Verdict{Score: 100, Missing: "gone,gone"}},
	} {
		t.Run(name, func(t *testing.T) {
			have := combine(t, time.Second, test.sources...).Judge(t.Context(), subject)
			test.want.Addr = subject
			have.decisive = 0
			if have != test.want {
				t.Errorf("want %+v\nhave %+v", test.want, have)
			}
		})
	}
}

// A source that excludes an address is not asked, and the others are.
func TestCombinedExcluder(t *testing.T) {
	other := netip.MustParseAddr("192.0.2.2")
	c := combine(t, 0,
		excluding{fixed{Source: "a", State: Listed, Score: 9}, subject},
		fixed{Source: "b", State: Listed, Score: 8},
		excluding{fixed{Source: "c", State: Listed, Score: 7}, other},
	)
	for addr, want := range map[string]string{
		"192.0.2.1": "a,b", "::ffff:192.0.2.1": "a,b", "192.0.2.2": "b,c", "192.0.2.3": "b", "2001:db8::1%eth0": "b",
	} {
		if have := c.Judge(t.Context(), netip.MustParseAddr(addr)).Sources; have != want {
			t.Errorf("%s: want %s, have %s", addr, want, have)
		}
	}
	var v Verdict
	if n := testing.AllocsPerRun(100, func() { v = c.Judge(t.Context(), subject) }); n != 0 || v.Sources != "a,b" {
		t.Errorf("want a,b without an allocation, have %s and %v", v.Sources, n)
	}
}

func TestCombinedBudget(t *testing.T) {
	listed := func(name string, score uint8) Finding {
		return Finding{Source: name, State: Listed, Score: score, Reason: name}
	}
	for name, test := range map[string]struct {
		budget  time.Duration
		sources []Source
		took    time.Duration
		want    Verdict
	}{
		"in time":          {5, []Source{&late{4, listed("dns", 20), nil}}, 4, Verdict{State: Listed, Score: 20, Sources: "dns"}},
		"too late":         {5, []Source{&late{6, listed("dns", 20), nil}}, 5, Verdict{Score: 100, Missing: "dns"}},
		"together":         {5, []Source{&late{3, listed("a", 20), nil}, &late{4, listed("b", 10), nil}}, 4, Verdict{State: Listed, Score: 10, Sources: "a,b"}},
		"one of two":       {5, []Source{&late{9, listed("a", 20), nil}, &late{4, listed("b", 10), nil}}, 5, Verdict{State: Listed, Score: 10, Sources: "b", Missing: "a"}},
		"no budget":        {0, []Source{&late{1, listed("dns", 20), nil}}, 0, Verdict{Score: 100, Missing: "dns"}},
		"nothing is worse": {5, []Source{&late{9, listed("dns", 20), nil}, fixed(listed("list", 0))}, 0, Verdict{State: Listed, Sources: "list"}},
		"allowed":          {5, []Source{&late{9, listed("dns", 0), nil}, fixed{Source: "office", State: Allowed}}, 0, Verdict{State: Allowed, Score: 100, Sources: "office"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				have := combine(t, test.budget*time.Millisecond, ms(test.sources)...).Judge(t.Context(), subject)
				if took := time.Since(start); took != test.took*time.Millisecond {
					t.Errorf("took: want %v, have %v", test.took*time.Millisecond, took)
				}
				have.Subject, have.Source, have.Reason = Subject{}, "", ""
				if have != test.want {
					t.Errorf("want %+v\nhave %+v", test.want, have)
				}
				time.Sleep(time.Second) // for the timers of those that were too late
			})
		})
	}
}

// ms makes milliseconds of the times of late sources.
func ms(sources []Source) []Source {
	for _, s := range sources {
		if l, ok := s.(*late); ok {
			l.after *= time.Millisecond
		}
	}
	return sources
}

// The caller's context ends the wait too.
func TestCombinedContext(t *testing.T) {
	c := combine(t, time.Hour, &late{time.Hour, Finding{Source: "dns"}, nil})
	if have := c.Judge(ended, subject).Missing; have != "dns" {
		t.Errorf("missing: want dns, have %q", have)
	}
}

func TestCombinedLocate(t *testing.T) {
	country := place{Subject{Addr: subject, Country: "CH"}}
	network := place{Subject{Addr: subject, Country: "XX", ASN: 64496, Org: "Example"}}
	c, err := Combine(0, []Locator{country, network}, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := Subject{Addr: subject, Country: "CH", ASN: 64496, Org: "Example"}
	for _, addr := range []string{"192.0.2.1", "::ffff:192.0.2.1"} {
		if have := c.Judge(t.Context(), netip.MustParseAddr(addr)).Subject; have != want {
			t.Errorf("%s: want %+v, have %+v", addr, want, have)
		}
	}
}

func TestCombinedExplain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		bad := fixed{Source: "bad", State: Listed}
		slow := &late{time.Second, Finding{Source: "dns", State: Listed, Score: 7}, nil}
		never := &late{time.Hour, Finding{Source: "never"}, nil}
		c := combine(t, 0, slow, bad, never)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		v, have := c.Explain(ctx, subject)
		if v.Sources != "dns,bad" || v.Missing != "never" || v.Score != 0 {
			t.Errorf("verdict: want score 0 by dns,bad without never, have %+v", v)
		}
		want := []Finding{slow.found, Finding(bad), {Source: "never", State: Pending}}
		for i := range want {
			if have[i] != want[i] {
				t.Errorf("want %+v, have %+v", want[i], have[i])
			}
		}
		time.Sleep(time.Hour) // for the timer of the one that never answers
	})
}

// reporting is a source that can say how it is.
type reporting struct{ fixed }

func (r reporting) Status() Status { return Status{Name: r.Source, Kind: "test"} }

type locating struct{ place }

func (locating) Status() Status { return Status{Name: "place"} }

func TestCombinedCounts(t *testing.T) {
	c, err := Combine(0, []Locator{locating{}, place{}}, []Source{
		reporting{fixed{Source: "listed", State: Listed}},
		reporting{fixed{Source: "unknown", State: Unknown}},
		fixed{Source: "silent", State: Listed},
		reporting{fixed{Source: "clean"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		c.Judge(t.Context(), subject)
	}
	c.Explain(t.Context(), subject)
	want := map[string]Counts{"listed": {Listed: 3}, "unknown": {Missing: 3}, "clean": {}, "place": {}}
	have := map[string]Counts{}
	c.Report(func(s Status, n Counts) { have[s.Name] = n })
	if len(have) != len(want) {
		t.Errorf("want %v, have %v", want, have)
	}
	for name := range want {
		if have[name] != want[name] {
			t.Errorf("%s: want %+v, have %+v", name, want[name], have[name])
		}
	}
}

func TestCombineTooMany(t *testing.T) {
	if _, err := Combine(0, nil, make([]Source, maxSources+1)); err == nil {
		t.Errorf("%d sources: want an error", maxSources+1)
	}
}

func TestCombinedAllocatesNothing(t *testing.T) {
	c, err := Combine(time.Millisecond,
		[]Locator{place{Subject{Addr: subject, Country: "CH"}}},
		[]Source{
			fixed{Source: "a", State: Listed, Score: 1, Reason: "a"}, fixed{Source: "b", State: Unknown},
			fixed{Source: "c", State: Listed, Score: 2, Decision: "ban"}, fixed{Source: "d", State: Unknown}, fixed{Source: "e"},
		})
	if err != nil {
		t.Fatal(err)
	}
	var v Verdict
	if n := testing.AllocsPerRun(100, func() { v = c.Judge(t.Context(), subject) }); n != 0 {
		t.Errorf("allocations: want 0, have %v", n)
	}
	if v.Sources != "a,c" || v.Missing != "b,d" {
		t.Errorf("want a,c without b,d, have %s without %s", v.Sources, v.Missing)
	}
}

// However many names there are, what is kept of them is bounded.
func TestJoinerBounded(t *testing.T) {
	var j Joiner
	for i := range maxJoined + 10 {
		name := strings.Repeat("x", i%70) + string(rune('a'+i/70))
		if want, have := "a,"+name, j.list("a", name); have != want {
			t.Fatalf("want %q, have %q", want, have)
		}
	}
	if n := len(*j.joined.Load()); n > maxJoined {
		t.Errorf("kept: want at most %d, have %d", maxJoined, n)
	}
}

func BenchmarkCombined(b *testing.B) {
	c := combine(b, time.Millisecond,
		fixed{Source: "a", State: Listed, Score: 1, Reason: "a"}, fixed{Source: "b", State: Unknown},
		fixed{Source: "c", State: Listed, Score: 2, Decision: "ban"}, fixed{Source: "d"}, fixed{Source: "e"})
	b.ReportAllocs()
	for b.Loop() {
		c.Judge(b.Context(), subject)
	}
}
