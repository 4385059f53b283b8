package dnsbl

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-kit/log"
	"github.com/miekg/dns"
	"github.com/spoa-go/spoa/cmd/internal/reputation"
)

const (
	zone     = "bl.example"
	patience = 15 * time.Second
)

// A fake is a DNS server, over UDP and TCP, that answers as told.
type fake struct {
	addr string

	mu     sync.Mutex
	asked  map[string]int // by name
	answer func(w dns.ResponseWriter, q *dns.Msg)
}

func startFake(t testing.TB, answer func(w dns.ResponseWriter, q *dns.Msg)) *fake {
	t.Helper()
	f := &fake{asked: map[string]int{}, answer: answer}
	udp, tcp := listenBoth(t)
	f.addr = udp.LocalAddr().String()
	for _, s := range []*dns.Server{{PacketConn: udp}, {Listener: tcp}} {
		s.Handler = dns.HandlerFunc(f.serve)
		done := make(chan error, 1)
		go func() { done <- s.ActivateAndServe() }()
		t.Cleanup(func() {
			udp.Close()
			tcp.Close()
			<-done
		})
	}
	return f
}

// listenBoth listens to one port over UDP and TCP.
func listenBoth(t testing.TB) (net.PacketConn, net.Listener) {
	t.Helper()
	for range 100 { // the port may be free for one of them only
		udp, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		if tcp, err := net.Listen("tcp", udp.LocalAddr().String()); err == nil {
			return udp, tcp
		}
		udp.Close()
	}
	t.Fatal("no port is free")
	return nil, nil
}

func (f *fake) serve(w dns.ResponseWriter, q *dns.Msg) {
	f.mu.Lock()
	f.asked[q.Question[0].Name]++
	answer := f.answer
	f.mu.Unlock()
	answer(w, q)
}

func (f *fake) set(answer func(w dns.ResponseWriter, q *dns.Msg)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answer = answer
}

func (f *fake) count(addr string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	z := Zone{Name: zone}
	return f.asked[z.query(netip.MustParseAddr(addr))]
}

func (f *fake) source(t testing.TB, z string, w ...*bytes.Buffer) *Source {
	t.Helper()
	parsed, err := ParseZone(z)
	if err != nil {
		t.Fatal(err)
	}
	r, err := NewResolver(f.addr)
	if err != nil {
		t.Fatal(err)
	}
	logger := log.NewNopLogger()
	if len(w) > 0 {
		logger = log.NewLogfmtLogger(log.NewSyncWriter(w[0]))
	}
	return New(parsed, r, logger)
}

// listing answers with these addresses, with a TTL, or that there is no such name.
func listing(ttl uint32, addrs ...string) func(dns.ResponseWriter, *dns.Msg) {
	return func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		for _, a := range addrs {
			m.Answer = append(m.Answer, a4(q.Question[0].Name, ttl, a))
		}
		if len(addrs) == 0 {
			m.Rcode = dns.RcodeNameError
			m.Ns = []dns.RR{&dns.SOA{
				Hdr: dns.RR_Header{Name: zone + ".", Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: 2 * ttl},
				Ns:  "ns.example.", Mbox: "x.example.", Minttl: ttl,
			}}
		}
		w.WriteMsg(m)
	}
}

func a4(name string, ttl uint32, addr string) dns.RR {
	return &dns.A{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: ttl}, A: net.ParseIP(addr)}
}

// judge waits for an answer.
func judge(t testing.TB, s *Source, addr string) reputation.Finding {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	return s.Judge(ctx, reputation.Subject{Addr: netip.MustParseAddr(addr)})
}

// atOnce does not wait.
func atOnce(s *Source, addr string) reputation.Finding {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return s.Judge(ctx, reputation.Subject{Addr: netip.MustParseAddr(addr)})
}

func wantState(t *testing.T, f reputation.Finding, want reputation.State) {
	t.Helper()
	if f.State != want {
		t.Errorf("want %v, have %+v", want, f)
	}
}

func TestQuery(t *testing.T) {
	z := Zone{Name: "bl.example"}
	for addr, want := range map[string]string{
		"192.0.2.99":  "99.2.0.192.bl.example.",
		"2001:db8::1": "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.bl.example.",
	} {
		if have := z.query(netip.MustParseAddr(addr)); have != want {
			t.Errorf("%s: want %s, have %s", addr, want, have)
		}
	}
}

func TestParseZone(t *testing.T) {
	long := strings.Repeat("a.", 94) + "b"
	for _, text := range []string{
		"", "=5", "a b", "a..b", "a/b", "x=", "x=101", "x=-1", "x=2:", "x=2:5/", "x=256:1", "x=4-2:1", "x=1.2.3.4:5",
		"x=127.255.255.254:0", "x=2-x:1", "x=2:101", long + "c.d",
	} {
		if z, err := ParseZone(text); err == nil {
			t.Errorf("%q: want an error, have %+v", text, z)
		}
	}
	addr := func(n byte) netip.Addr { return netip.AddrFrom4([4]byte{127, 0, 0, n}) }
	for text, want := range map[string]Zone{
		"BL.example.":         {Name: "bl.example"},
		"bl.example=30":       {Name: "bl.example", Score: 30},
		"bl.example=2:7":      {Name: "bl.example", Codes: []Code{{addr(2), addr(2), 7}}},
		"x=4-7:1/127.0.0.9:2": {Name: "x", Codes: []Code{{addr(4), addr(7), 1}, {addr(9), addr(9), 2}}},
		long:                  {Name: long},
	} {
		have, err := ParseZone(text)
		if err != nil || fmt.Sprint(have) != fmt.Sprint(want) {
			t.Errorf("%s: want %v, have %v, %v", text, want, have, err)
		}
	}
	var z Zones
	for _, text := range []string{"a.example", "b.example=5"} {
		if err := z.Set(text); err != nil {
			t.Error(err)
		}
	}
	if z.Set("A.example=7") == nil {
		t.Error("a zone given twice: want an error")
	}
	if want, have := "a.example,b.example", z.String(); want != have {
		t.Errorf("want %s, have %s", want, have)
	}
}

func TestScores(t *testing.T) {
	for _, test := range []struct {
		zone    string
		answers []string
		state   reputation.State
		score   uint8
		code    string
	}{
		{zone, []string{"127.0.0.2"}, reputation.Listed, 0, "127.0.0.2"},
		{zone + "=40", []string{"127.0.0.2"}, reputation.Listed, 40, "127.0.0.2"},
		{zone + "=2:0/4-7:60", []string{"127.0.0.5"}, reputation.Listed, 60, "127.0.0.5"},
		{zone + "=2:0/4-7:60", []string{"127.0.0.5", "127.0.0.2", "127.0.0.9"}, reputation.Listed, 0, "127.0.0.2"},
		{zone + "=2:0/4-7:60", []string{"127.0.0.9"}, reputation.NotListed, 0, ""},
		{zone, nil, reputation.NotListed, 0, ""},
	} {
		f := startFake(t, listing(60, test.answers...))
		want := reputation.Finding{Source: zone, State: test.state, Score: test.score}
		if test.code != "" {
			want.Reason = "dnsbl bl.example: " + test.code
		}
		if have := judge(t, f.source(t, test.zone), "203.0.113.9"); have != want {
			t.Errorf("%s, %v: want %+v, have %+v", test.zone, test.answers, want, have)
		}
	}
}

// What is no listing must not look like one.
func TestLies(t *testing.T) {
	reply := func(f func(m *dns.Msg)) func(dns.ResponseWriter, *dns.Msg) {
		return func(w dns.ResponseWriter, q *dns.Msg) {
			m := new(dns.Msg).SetReply(q)
			f(m)
			w.WriteMsg(m)
		}
	}
	for name, test := range map[string]struct {
		answer func(dns.ResponseWriter, *dns.Msg)
		state  reputation.State
		why    string
	}{
		"refused":         {listing(60, "127.255.255.254"), reputation.Unknown, "refuses to answer with 127.255.255.254"},
		"also refused":    {listing(60, "127.0.0.2", "127.255.255.252"), reputation.Unknown, "refuses to answer"},
		"outside":         {listing(60, "192.0.2.1"), reputation.Unknown, "answer 192.0.2.1 is outside"},
		"servfail":        {reply(func(m *dns.Msg) { m.Rcode = dns.RcodeServerFailure }), reputation.Unknown, "SERVFAIL"},
		"refused by code": {reply(func(m *dns.Msg) { m.Rcode = dns.RcodeRefused }), reputation.Unknown, "REFUSED"},
		"no data":         {reply(func(*dns.Msg) {}), reputation.NotListed, ""},
		"another name": {reply(func(m *dns.Msg) {
			m.Answer = append(m.Answer, a4("x.bl.example.", 60, "127.0.0.2"))
		}), reputation.NotListed, ""},
		"alias": {reply(func(m *dns.Msg) {
			m.Answer = append(m.Answer, &dns.CNAME{
				Hdr:    dns.RR_Header{Name: m.Question[0].Name, Rrtype: dns.TypeCNAME, Class: dns.ClassINET, Ttl: 60},
				Target: "x.bl.example.",
			}, a4("X.bl.example.", 60, "127.0.0.2"))
		}), reputation.Listed, ""},
		"another question": {reply(func(m *dns.Msg) {
			m.Question[0].Name = "1.2.0.192.bl.example."
			m.Answer = append(m.Answer, a4(m.Question[0].Name, 60, "127.0.0.2"))
		}), reputation.Unknown, "answer to another question"},
		"no question":  {reply(func(m *dns.Msg) { m.Question = nil }), reputation.Unknown, "answer to another question"},
		"a question":   {reply(func(m *dns.Msg) { m.Response = false }), reputation.Unknown, "answer to another question"},
		"rubbish":      {func(w dns.ResponseWriter, q *dns.Msg) { w.Write([]byte{byte(q.Id >> 8), byte(q.Id), 1, 2, 3}) }, reputation.Unknown, ""},
		"cut for ever": {reply(func(m *dns.Msg) { m.Truncated = true }), reputation.Unknown, "cut even over TCP"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := startFake(t, test.answer)
			s := f.source(t, zone)
			have := judge(t, s, "203.0.113.9")
			wantState(t, have, test.state)
			if problem := s.Status().Problem; !strings.Contains(problem, test.why) || (problem != "") != (test.state == reputation.Unknown) {
				t.Errorf("problem: want %q, have %q", test.why, problem)
			}
		})
	}
}

func TestTruncated(t *testing.T) {
	f := startFake(t, func(w dns.ResponseWriter, q *dns.Msg) {
		if w.RemoteAddr().Network() == "tcp" {
			listing(60, "127.0.0.2")(w, q)
			return
		}
		m := new(dns.Msg).SetReply(q)
		m.Truncated = true
		w.WriteMsg(m)
	})
	wantState(t, judge(t, f.source(t, zone), "203.0.113.9"), reputation.Listed)
}

// An answer with another number is somebody else's; the right one still counts.
func TestForged(t *testing.T) {
	f := startFake(t, func(w dns.ResponseWriter, q *dns.Msg) {
		forged := q.Copy()
		forged.Id++
		listing(60, "127.0.0.2")(w, forged)
		listing(60)(w, q)
	})
	wantState(t, judge(t, f.source(t, zone), "203.0.113.9"), reputation.NotListed)
}

// Private addresses are nobody's business.
func TestNotAsked(t *testing.T) {
	f := startFake(t, listing(60, "127.0.0.2"))
	s := f.source(t, zone)
	for _, addr := range []string{"127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.1.1", "0.0.0.0", "224.0.0.1", "::1", "fe80::1", "fd00::1", "::"} {
		wantState(t, atOnce(s, addr), reputation.NotListed)
		if f.count(addr) > 0 {
			t.Errorf("%s was asked for", addr)
		}
	}
}

// A slow answer is there for the next request, and asked for once.
func TestSlow(t *testing.T) {
	release := make(chan struct{})
	f := startFake(t, func(w dns.ResponseWriter, q *dns.Msg) {
		<-release
		listing(60, "127.0.0.2")(w, q)
	})
	s := f.source(t, zone)
	for range 10 {
		wantState(t, atOnce(s, "203.0.113.9"), reputation.Pending)
	}
	addr := netip.MustParseAddr("203.0.113.9")
	if first, second := s.begin(addr), s.begin(addr); first != second {
		t.Error("two that find no answer at the same time ask twice")
	}
	close(release)
	wantState(t, judge(t, s, "203.0.113.9"), reputation.Listed)
	wantState(t, atOnce(s, "203.0.113.9"), reputation.Listed)
	if n := f.count("203.0.113.9"); n != 1 {
		t.Errorf("questions: want 1, have %d", n)
	}
}

func TestCache(t *testing.T) {
	for name, test := range map[string]struct {
		answer func(dns.ResponseWriter, *dns.Msg)
		ttl    time.Duration
		state  reputation.State
	}{
		"positive":      {listing(60, "127.0.0.2"), time.Minute, reputation.Listed},
		"negative":      {listing(30), 30 * time.Second, reputation.NotListed},
		"none":          {listing(0, "127.0.0.2"), leastTTL, reputation.Listed},
		"long":          {listing(1<<30, "127.0.0.2"), mostTTL, reputation.Listed},
		"long negative": {listing(1 << 30), mostNoTTL, reputation.NotListed},
		"no SOA": {func(w dns.ResponseWriter, q *dns.Msg) {
			w.WriteMsg(new(dns.Msg).SetRcode(q, dns.RcodeNameError))
		}, noTTL, reputation.NotListed},
		"error": {func(w dns.ResponseWriter, q *dns.Msg) {
			w.WriteMsg(new(dns.Msg).SetRcode(q, dns.RcodeServerFailure))
		}, errorTTL, reputation.Unknown},
	} {
		t.Run(name, func(t *testing.T) {
			f := startFake(t, test.answer)
			s := f.source(t, zone)
			before := time.Since(s.start)
			wantState(t, judge(t, s, "203.0.113.9"), test.state)
			after := time.Since(s.start)
			a, _ := s.cache.Get(netip.MustParseAddr("203.0.113.9"))
			if a.until < before+test.ttl || a.until > after+test.ttl {
				t.Errorf("holds: want %v, have %v to %v", test.ttl, a.until-after, a.until-before)
			}
			wantState(t, atOnce(s, "203.0.113.9"), test.state)
			a.until = 0 // nobody else reads it now
			wantState(t, judge(t, s, "203.0.113.9"), test.state)
			if n := f.count("203.0.113.9"); n != 2 {
				t.Errorf("questions: want 2, have %d", n)
			}
		})
	}
}

// Whatever addresses come, what is asked and kept is bounded.
func TestBounded(t *testing.T) {
	release := make(chan struct{})
	f := startFake(t, func(w dns.ResponseWriter, q *dns.Msg) {
		<-release
		listing(60)(w, q)
	})
	s := f.source(t, zone)
	s.inFlight = maxInFlight - 1
	wantState(t, atOnce(s, "203.0.113.1"), reputation.Pending)
	wantState(t, atOnce(s, "203.0.113.2"), reputation.Unknown)
	wantState(t, atOnce(s, "203.0.113.1"), reputation.Pending)
	close(release)
	for i := range cached + 10 {
		a := &answer{done: make(chan struct{})}
		s.cache.Add(netip.AddrFrom4([4]byte{100, byte(i >> 16), byte(i >> 8), byte(i)}), a)
	}
	if n := s.Status().Entries; n != cached {
		t.Errorf("kept: want %d, have %d", cached, n)
	}
}

// A zone that is gone is asked one question at a time, nobody waits for it, and
// the log says so once. It comes back by itself.
func TestGone(t *testing.T) {
	var b bytes.Buffer
	f := startFake(t, func(w dns.ResponseWriter, q *dns.Msg) { w.WriteMsg(new(dns.Msg).SetRcode(q, dns.RcodeRefused)) })
	s := f.source(t, zone, &b)
	addr := func(i int) string { return fmt.Sprintf("203.0.113.%d", i) }
	for i := range maxFailures {
		wantState(t, judge(t, s, addr(i)), reputation.Unknown)
	}
	if n := strings.Count(b.String(), "does not answer"); n != 1 {
		t.Errorf("log: want 1 line, have %d:\n%s", n, b.String())
	}
	release := make(chan struct{})
	f.set(func(w dns.ResponseWriter, q *dns.Msg) {
		<-release
		listing(60, "127.0.0.2")(w, q)
	})
	for i := range 5 { // returns at once: nothing is released yet
		wantState(t, judge(t, s, addr(100+i)), reputation.Unknown)
	}
	s.mu.Lock()
	if s.inFlight != 1 {
		t.Errorf("questions to a zone that is gone: want 1 at a time, have %d", s.inFlight)
	}
	s.mu.Unlock()
	close(release)
	a, _ := s.cache.Get(netip.MustParseAddr(addr(100)))
	<-a.done
	wantState(t, atOnce(s, addr(100)), reputation.Listed)
	wantState(t, judge(t, s, addr(101)), reputation.Listed)
	if p := s.Status().Problem; p != "" {
		t.Errorf("problem: want none, have %q", p)
	}
}

// Where nothing listens, the error comes back at once, and the second server is asked.
func TestServers(t *testing.T) {
	f := startFake(t, listing(60, "127.0.0.2"))
	l, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead := l.LocalAddr().String()
	l.Close()
	s := f.source(t, zone)
	s.resolver.servers = []string{dead, f.addr}
	wantState(t, judge(t, s, "203.0.113.9"), reputation.Listed)
	s.resolver.servers = []string{dead}
	wantState(t, judge(t, s, "203.0.113.10"), reputation.Unknown)
	if p := s.Status().Problem; !strings.Contains(p, dead) {
		t.Errorf("problem: want one that names %s, have %q", dead, p)
	}
}

func TestZoneTest(t *testing.T) {
	z := Zone{Name: zone}
	bad, good := z.query(netip.MustParseAddr("127.0.0.1")), z.query(netip.MustParseAddr("127.0.0.2"))
	lists := func(names ...string) func(dns.ResponseWriter, *dns.Msg) {
		return func(w dns.ResponseWriter, q *dns.Msg) {
			for _, name := range names {
				if name == "*" || name == q.Question[0].Name {
					listing(60, "127.0.0.2")(w, q)
					return
				}
			}
			listing(60)(w, q)
		}
	}
	servfail := func(w dns.ResponseWriter, q *dns.Msg) { w.WriteMsg(new(dns.Msg).SetRcode(q, dns.RcodeServerFailure)) }
	var b bytes.Buffer
	f := startFake(t, nil)
	s := f.source(t, zone, &b)
	for _, step := range []struct {
		name   string
		answer func(dns.ResponseWriter, *dns.Msg)
		want   error
		state  reputation.State
		logs   int // lines so far
	}{
		{"as it should be", lists(good), nil, reputation.NotListed, 0},
		{"lists everything", lists("*"), errListsAll, reputation.Unknown, 1},
		{"still does", lists(bad), errListsAll, reputation.Unknown, 1},
		{"gone, so still not believed", servfail, nil, reputation.Unknown, 2},
		{"well again", lists(good), nil, reputation.NotListed, 3},
		{"lists nothing", lists(), errListsNone, reputation.NotListed, 4},
	} {
		f.set(step.answer)
		err := s.Test()
		if step.name != "gone, so still not believed" && err != step.want {
			t.Errorf("%s: want %v, have %v", step.name, step.want, err)
		}
		wantState(t, judge(t, s, "203.0.113.9"), step.state)
		if n := strings.Count(b.String(), "\n"); n != step.logs {
			t.Errorf("%s: lines logged: want %d, have %d:\n%s", step.name, step.logs, n, b.String())
		}
	}
}

func TestRunEnds(t *testing.T) {
	f := startFake(t, listing(60))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := f.source(t, zone).Run(ctx); err != context.Canceled {
		t.Errorf("want %v, have %v", context.Canceled, err)
	}
}

// Many at once, for the race detector.
func TestConcurrent(t *testing.T) {
	f := startFake(t, listing(60, "127.0.0.2"))
	s := f.source(t, zone)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 100 {
				wantState(t, judge(t, s, fmt.Sprintf("203.0.113.%d", i)), reputation.Listed)
			}
		})
	}
	wg.Wait()
	for i := range 100 {
		if n := f.count(fmt.Sprintf("203.0.113.%d", i)); n != 1 {
			t.Errorf("203.0.113.%d: questions: want 1, have %d", i, n)
		}
	}
}

func TestJudgeAllocatesNothing(t *testing.T) {
	f := startFake(t, listing(60, "127.0.0.2"))
	s := f.source(t, zone)
	sub := reputation.Subject{Addr: netip.MustParseAddr("203.0.113.9")}
	wantState(t, judge(t, s, "203.0.113.9"), reputation.Listed)
	if n := testing.AllocsPerRun(100, func() { s.Judge(t.Context(), sub) }); n != 0 {
		t.Errorf("allocations: want 0, have %v", n)
	}
}

func BenchmarkJudge(b *testing.B) {
	f := startFake(b, listing(3600, "127.0.0.2"))
	s := f.source(b, zone)
	sub := reputation.Subject{Addr: netip.MustParseAddr("203.0.113.9")}
	judge(b, s, "203.0.113.9")
	b.ReportAllocs()
	for b.Loop() {
		s.Judge(b.Context(), sub)
	}
}

func FuzzRecords(f *testing.F) {
	m := new(dns.Msg).SetReply(new(dns.Msg).SetQuestion("2.0.0.127.bl.example.", dns.TypeA))
	m.Answer = append(m.Answer, a4("2.0.0.127.bl.example.", 60, "127.0.0.2"))
	packed, err := m.Pack()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(packed)
	f.Fuzz(func(t *testing.T, b []byte) {
		m := new(dns.Msg)
		if m.Unpack(b) != nil {
			return
		}
		records(m, "2.0.0.127.bl.example.")
		negativeTTL(m)
	})
}
