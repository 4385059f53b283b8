package crowdsec

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-kit/log"
	"github.com/spoa-go/spoa/cmd/internal/reputation"
)

const key = "sesame"

// localAPI is a fake of CrowdSec's, without a network.
type localAPI struct {
	mu        sync.Mutex
	decisions []fakeDecision
	pulled    time.Time
	asked     []url.Values
	answer    func(*http.Request) (*http.Response, error) // instead of the stream
}

type fakeDecision struct {
	decision
	made, until time.Time
}

// add makes a decision and returns its number.
func (l *localAPI) add(scope, value, kind string, lasting time.Duration) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	id := int64(len(l.decisions) + 1)
	d := decision{ID: id, Scope: scope, Value: value, Type: kind, Scenario: "test/" + kind}
	l.decisions = append(l.decisions, fakeDecision{d, time.Now(), time.Now().Add(lasting)})
	return id
}

func (l *localAPI) delete(id int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.decisions[id-1].until = time.Now()
}

func (l *localAPI) set(answer func(*http.Request) (*http.Response, error)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answer = answer
}

// startups returns of each request whether it asked for all decisions.
func (l *localAPI) startups() (all []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, q := range l.asked {
		all = append(all, q.Get("startup"))
	}
	return all
}

func (l *localAPI) RoundTrip(r *http.Request) (*http.Response, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	q := r.URL.Query()
	l.asked = append(l.asked, q)
	switch {
	case r.URL.Path != "/v1/decisions/stream":
		return answer(404, "no such page"), nil
	case r.Header.Get("X-Api-Key") != key:
		return answer(403, `{"message":"access forbidden"}`), nil
	case q.Get("dedup") != "false" || q.Get("scopes") != "ip,range,country,as":
		return answer(400, "the fake serves no other query"), nil
	}
	since := l.pulled
	if q.Get("startup") == "true" {
		since = time.Time{}
	}
	l.pulled = time.Now() // even if the answer is lost
	if l.answer != nil {
		return l.answer(r)
	}
	stream := map[string][]decision{"new": nil, "deleted": nil}
	for _, d := range l.decisions {
		d.Duration = time.Until(d.until).String()
		switch over := !d.until.After(time.Now()); {
		case over && d.until.After(since.Add(-2*time.Second)):
			stream["deleted"] = append(stream["deleted"], d.decision)
		case !over && d.made.After(since):
			stream["new"] = append(stream["new"], d.decision)
		}
	}
	b, err := json.Marshal(stream)
	return answer(200, string(b)), err
}

func answer(code int, body string) *http.Response {
	return &http.Response{
		StatusCode: code, Status: fmt.Sprint(code, " ", http.StatusText(code)),
		Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body)),
	}
}

func newSource(t testing.TB, rt http.RoundTripper) *Source {
	t.Helper()
	s, err := New(Config{URL: "http://crowdsec.test", Key: key, Transport: rt})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func pull(t testing.TB, s *Source) {
	t.Helper()
	if err := s.Pull(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func judge(s *Source, addr string) reputation.Finding {
	return s.Judge(context.Background(), reputation.Subject{Addr: netip.MustParseAddr(addr)})
}

// want fails the test unless the address has a decision of that type; "" is for none.
func want(t *testing.T, s *Source, addr, kind string) {
	t.Helper()
	if f := judge(s, addr); f.Decision != kind || (f.State == reputation.Listed) != (kind != "") {
		t.Errorf("%s: want decision %q, have %+v", addr, kind, f)
	}
	if kind != "" {
		excludes(t, s, addr, false)
	}
}

func excludes(t *testing.T, s *Source, addr string, want bool) {
	t.Helper()
	if have := s.Excludes(netip.MustParseAddr(addr)); have != want {
		t.Errorf("%s excluded: want %v, have %v", addr, want, have)
	}
}

func TestScopes(t *testing.T) {
	api := new(localAPI)
	api.add("Ip", "192.0.2.1", "ban", time.Hour)
	api.add("ip", "::ffff:192.0.2.2", "captcha", time.Hour)
	api.add("Ip", "2001:db8::1", "Throttle", time.Hour)
	api.add("Range", "198.51.100.77/24", "ban", time.Hour)
	api.add("Range", "2001:db8:1::/48", "captcha", time.Hour)
	api.add("Country", "xx", "ban", time.Hour)
	api.add("AS", "64496", "captcha", time.Hour)
	api.add("as", "AS64497", "ban", time.Hour)
	for _, v := range []string{"", "192.0.2", "192.0.2.0/33", "x"} {
		api.add("Ip", v, "ban", time.Hour)
	}
	api.add("AS", "-1", "ban", time.Hour)
	api.add("username", "root", "ban", time.Hour)
	s := newSource(t, api)
	pull(t, s)

	type subject = reputation.Subject
	addr := netip.MustParseAddr
	for _, test := range []struct {
		subject
		kind  string
		score uint8
	}{
		{subject{Addr: addr("192.0.2.1")}, "ban", 0},
		{subject{Addr: addr("192.0.2.2")}, "captcha", 30},
		{subject{Addr: addr("192.0.2.3")}, "", 0},
		{subject{Addr: addr("2001:db8::1")}, "throttle", 50},
		{subject{Addr: addr("198.51.100.255")}, "ban", 0},
		{subject{Addr: addr("198.51.101.0")}, "", 0},
		{subject{Addr: addr("2001:db8:1:2::3")}, "captcha", 30},
		{subject{Addr: addr("192.0.2.3"), Country: "XX"}, "ban", 0},
		{subject{Addr: addr("192.0.2.3"), Country: "CH"}, "", 0},
		{subject{Addr: addr("192.0.2.3"), ASN: 64496}, "captcha", 30},
		{subject{Addr: addr("192.0.2.3"), ASN: 64497}, "ban", 0},
		{subject{Addr: addr("192.0.2.2"), ASN: 64497}, "ban", 0}, // the worst of two
	} {
		have := s.Judge(t.Context(), test.subject)
		want := reputation.Finding{Source: "crowdsec"}
		if test.kind != "" {
			want.State, want.Score, want.Decision = reputation.Listed, test.score, test.kind
			want.Reason = "crowdsec: " + test.kind + " for test/" + test.kind
			want.Reason = strings.Replace(want.Reason, "for test/throttle", "for test/Throttle", 1)
		}
		if have != want {
			t.Errorf("%+v: want %+v, have %+v", test.subject, want, have)
		}
	}
	if have := s.Status(); have.Entries != 8 || have.Problem != "" {
		t.Errorf("status: want 8 entries and no problem, have %+v", have)
	}
	if n := s.table.Load().ignored; n != 6 {
		t.Errorf("ignored: want 6, have %d", n)
	}
}

func TestScoresFlag(t *testing.T) {
	var s Scores
	for _, text := range []string{"captcha=5", "Throttle=60", "other=100"} {
		if err := s.Set(text); err != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
	if want, have := "ban=0,captcha=5,other=100,throttle=60", s.String(); have != want {
		t.Errorf("want %s, have %s", want, have)
	}
	for _, text := range []string{"", "ban", "ban=", "=5", "ban=101", "ban=-1", "ban=1x"} {
		if err := s.Set(text); err == nil {
			t.Errorf("%q: want an error", text)
		}
	}
}

// A decision on a range stays in force where one on an address inside it ends,
// and the worse of both wins meanwhile.
func TestOverlap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := new(localAPI)
		api.add("Range", "192.0.2.0/24", "captcha", 3*time.Hour)
		api.add("Ip", "192.0.2.1", "ban", time.Hour)
		api.add("Ip", "192.0.2.2", "other", time.Hour)
		s := newSource(t, api)
		pull(t, s)
		want(t, s, "192.0.2.1", "ban")
		want(t, s, "192.0.2.2", "captcha")
		time.Sleep(time.Hour)
		want(t, s, "192.0.2.1", "captcha")
		time.Sleep(2 * time.Hour)
		want(t, s, "192.0.2.1", "")
	})
}

func TestExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := new(localAPI)
		api.add("Ip", "192.0.2.1", "ban", 90*time.Second)
		s := newSource(t, api)
		pull(t, s)
		api.set(func(*http.Request) (*http.Response, error) { return nil, errors.New("gone") })
		ctx, cancel := context.WithCancel(t.Context())
		go s.Run(ctx)
		time.Sleep(90*time.Second - 1)
		want(t, s, "192.0.2.1", "ban")
		time.Sleep(1 * time.Nanosecond)
		want(t, s, "192.0.2.1", "")
		cancel()
		synctest.Wait()
		time.Sleep(time.Hour)
	})
}

// Several decisions on one address are told apart by number.
func TestDeltas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := new(localAPI)
		first := api.add("Ip", "192.0.2.1", "ban", 2*time.Hour)
		second := api.add("Ip", "192.0.2.1", "ban", time.Hour)
		country := api.add("Country", "XX", "ban", time.Hour)
		s := newSource(t, api)
		pull(t, s)
		step := func(f func()) {
			time.Sleep(10 * time.Second)
			f()
			time.Sleep(time.Second)
			pull(t, s)
		}
		step(func() { api.delete(first) })
		want(t, s, "192.0.2.1", "ban")
		step(func() { api.delete(second) })
		want(t, s, "192.0.2.1", "")
		step(func() { api.add("Ip", "192.0.2.9", "captcha", time.Hour) })
		want(t, s, "192.0.2.9", "captcha")
		step(func() { api.delete(country) })
		if n := s.Status().Entries; n != 1 {
			t.Errorf("entries: want 1, have %d", n)
		}
		for i, have := range api.startups() {
			if want := fmt.Sprint(i == 0); have != want {
				t.Errorf("request %d: startup: want %s, have %s", i, want, have)
			}
		}
		time.Sleep(time.Hour)
	})
}

func TestSimulated(t *testing.T) {
	api := new(localAPI)
	id := api.add("Ip", "192.0.2.1", "ban", time.Hour)
	api.decisions[id-1].Simulated = true
	s := newSource(t, api)
	pull(t, s)
	want(t, s, "192.0.2.1", "")
}

// What the API says becomes a header: no line of it begins another one.
func TestUnprintable(t *testing.T) {
	api := new(localAPI)
	api.add("Ip", "192.0.2.1", "ban\r\nX: y", time.Hour)
	s := newSource(t, api)
	pull(t, s)
	f := judge(s, "192.0.2.1")
	if f.Decision != "ban??x: y" || strings.ContainsAny(f.Reason, "\r\n") {
		t.Errorf("have %q", f)
	}
}

// What the API counts as delivered and was not must come with the next pull.
func TestLostAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := new(localAPI)
		s := newSource(t, api)
		pull(t, s)
		time.Sleep(time.Second)
		api.add("Ip", "192.0.2.1", "ban", time.Hour)
		api.set(func(*http.Request) (*http.Response, error) {
			return answer(200, `{"deleted":null,"new":[{"id":1,"scope":"Ip","value":"192.0.2.1","type":"ban","duration":"1h"},{"id":2,`), nil
		})
		time.Sleep(time.Second)
		if err := s.Pull(t.Context()); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut answer: want %v, have %v", io.ErrUnexpectedEOF, err)
		}
		want(t, s, "192.0.2.1", "") // nothing of a cut answer comes into force
		api.set(nil)
		time.Sleep(time.Second)
		pull(t, s)
		want(t, s, "192.0.2.1", "ban")
		time.Sleep(time.Hour)
	})
}

func TestResync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := new(localAPI)
		s := newSource(t, api)
		ctx, cancel := context.WithCancel(t.Context())
		go s.Run(ctx)
		time.Sleep(resyncAfter + time.Minute)
		cancel()
		synctest.Wait()
		startups := 0
		for _, startup := range api.startups() {
			if startup == "true" {
				startups++
			}
		}
		if startups != 2 {
			t.Errorf("startups of %d pulls: want 2, have %d", len(api.startups()), startups)
		}
		time.Sleep(time.Hour)
	})
}

func TestUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := new(localAPI)
		api.add("Ip", "192.0.2.1", "ban", time.Hour)
		s := newSource(t, api)
		state := func(addr string, want reputation.State) {
			t.Helper()
			if have := judge(s, addr).State; have != want {
				t.Errorf("%s: want %v, have %v", addr, want, have)
			}
		}
		state("192.0.2.1", reputation.Unknown)
		pull(t, s)
		state("192.0.2.2", reputation.NotListed)
		time.Sleep(minStale / 2)
		pull(t, s)
		time.Sleep(minStale - 1)
		state("192.0.2.2", reputation.NotListed)
		time.Sleep(2 * time.Nanosecond)
		state("192.0.2.2", reputation.Unknown)
		state("192.0.2.1", reputation.Listed)
		pull(t, s)
		state("192.0.2.2", reputation.NotListed)
		time.Sleep(time.Hour)
	})
}

// Excluded is only what has no decision, whatever its country and network, and
// only while that is known.
func TestExcludes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := new(localAPI)
		api.add("Ip", "192.0.2.1", "ban", 2*time.Hour)
		api.add("Range", "198.51.100.0/24", "ban", 2*time.Hour)
		s := newSource(t, api)
		excludes(t, s, "203.0.113.1", false)
		pull(t, s)
		excludes(t, s, "192.0.2.1", false)
		excludes(t, s, "198.51.100.9", false)
		excludes(t, s, "203.0.113.1", true)
		excludes(t, s, "2001:db8::1", false)
		for _, scope := range []string{"Country", "AS"} {
			time.Sleep(time.Second)
			id := api.add(scope, "64496", "ban", 2*time.Hour)
			pull(t, s)
			excludes(t, s, "203.0.113.1", false)
			api.delete(id)
			time.Sleep(time.Second)
			pull(t, s)
			excludes(t, s, "203.0.113.1", true)
		}
		time.Sleep(minStale + 1)
		excludes(t, s, "203.0.113.1", false)
	})
}

func TestBadAnswers(t *testing.T) {
	for name, test := range map[string]struct {
		code int
		body string
		want string
	}{
		"forbidden":     {403, "{}", "403 Forbidden: want a key"},
		"error":         {500, "database is locked", `500 Internal Server Error: "database is locked"`},
		"redirect":      {302, "", "302 Found"},
		"web page":      {200, "<html>", "invalid character"},
		"empty":         {200, "", "unexpected EOF"},
		"array":         {200, "[]", "want {, have"},
		"another API":   {200, `{"status":"ok","more":{"a":[1]}}`, "want a stream of decisions"},
		"half":          {200, `{"new":[]}`, "want a stream of decisions"},
		"no array":      {200, `{"new":{},"deleted":null}`, "new: want an array"},
		"number":        {200, `{"new":[1],"deleted":null}`, "new: "},
		"cut in array":  {200, `{"new":[`, "unexpected EOF"},
		"cut after key": {200, `{"new":`, "unexpected EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			api := new(localAPI)
			api.set(func(*http.Request) (*http.Response, error) { return answer(test.code, test.body), nil })
			s := newSource(t, api)
			err := s.Pull(t.Context())
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("want %q, have %v", test.want, err)
			}
			if st := s.Status(); st.Problem != fmt.Sprint(err) {
				t.Errorf("problem: want %v, have %q", err, st.Problem)
			}
			if strings.Contains(fmt.Sprint(err), key) {
				t.Errorf("the error has the key: %v", err)
			}
		})
	}
}

// An error is logged once, however often it occurs, and its end once.
func TestLogOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b bytes.Buffer
		api := new(localAPI)
		s := newSource(t, api)
		s.Logger = log.NewLogfmtLogger(&b)
		api.set(func(*http.Request) (*http.Response, error) { return nil, errors.New("gone") })
		ctx, cancel := context.WithCancel(t.Context())
		go s.Run(ctx)
		time.Sleep(time.Minute)
		api.set(nil)
		time.Sleep(time.Minute)
		cancel()
		synctest.Wait()
		if n := strings.Count(b.String(), "level=error"); n != 1 {
			t.Errorf("errors logged: want 1, have %d:\n%s", n, b.String())
		}
		if n := strings.Count(b.String(), "decisions pulled"); n != 1 {
			t.Errorf("pulls logged: want 1, have %d:\n%s", n, b.String())
		}
		time.Sleep(time.Hour)
	})
}

// While there is no answer, pulls soon follow each other at the interval only.
func TestBackOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		var have []int
		api := new(localAPI)
		api.set(func(*http.Request) (*http.Response, error) {
			have = append(have, int(time.Since(start)/time.Second))
			return nil, errors.New("gone")
		})
		ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
		defer cancel()
		if err := newSource(t, api).Run(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Run: want %v, have %v", context.DeadlineExceeded, err)
		}
		if want := []int{0, 1, 3, 7, 15, 25, 35}; !slices.Equal(want, have) {
			t.Errorf("pulls: want %v, have %v", want, have)
		}
	})
}

// The key goes to no other server.
func TestRedirect(t *testing.T) {
	other := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("the other server was asked, with key %q", r.Header.Get("X-Api-Key"))
	}))
	defer other.Close()
	first := httptest.NewServer(http.RedirectHandler(other.URL, http.StatusTemporaryRedirect))
	defer first.Close()
	s, err := New(Config{URL: first.URL, Key: key})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Pull(t.Context()); err == nil || !strings.Contains(err.Error(), "307") {
		t.Errorf("want an error with 307, have %v", err)
	}
}

func TestNewErrors(t *testing.T) {
	for _, c := range []Config{
		{}, {URL: "127.0.0.1:8080", Key: key}, {URL: "http://", Key: key}, {URL: "ftp://x", Key: key}, {URL: "http://x\x00", Key: key},
		{URL: "http://x"}, {URL: "http://x", Key: "two words"}, {URL: "http://x", Key: "line\n"},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("%+v: want an error", c)
		}
	}
	s, err := New(Config{URL: "https://x/prefix/", Key: key})
	if err != nil {
		t.Fatal(err)
	}
	if want, have := "https://x/prefix/v1/decisions/stream", s.stream.String(); have != want {
		t.Errorf("want %s, have %s", want, have)
	}
}

// many returns a source of n bans and a range, from 100.0.0.0 on.
func many(t testing.TB, n int) *Source {
	api := new(localAPI)
	for i := range n {
		api.add("Ip", netip.AddrFrom4([4]byte{100, byte(i >> 16), byte(i >> 8), byte(i)}).String(), "ban", time.Hour)
	}
	api.add("Range", "100.0.0.0/9", "captcha", time.Hour)
	s := newSource(t, api)
	pull(t, s)
	return s
}

func TestJudgeAllocatesNothing(t *testing.T) {
	s := many(t, 1000)
	for _, sub := range []reputation.Subject{
		{Addr: netip.MustParseAddr("100.0.1.2")}, {Addr: netip.MustParseAddr("100.99.0.1")},
		{Addr: netip.MustParseAddr("192.0.2.1"), Country: "CH", ASN: 64496},
	} {
		if n := testing.AllocsPerRun(100, func() { s.Judge(t.Context(), sub) }); n != 0 {
			t.Errorf("%v: allocations: want 0, have %v", sub.Addr, n)
		}
	}
}

func BenchmarkJudge(b *testing.B) {
	s := many(b, 100_000)
	for name, addr := range map[string]string{"listed": "100.0.1.2", "unlisted": "192.0.2.1"} {
		sub := reputation.Subject{Addr: netip.MustParseAddr(addr)}
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				s.Judge(b.Context(), sub)
			}
		})
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(`{"deleted":null,"new":[{"duration":"1h","id":2,"scenario":"x","scope":"Country","type":"captcha","value":"CN"}]}`)
	f.Add(`{"new":[{"duration":"1h","id":2,"scope":"Range","type":"ban","value":"::ffff:1.2.3.4/96"}],"deleted":[{"id":1,"scope":"AS","value":"AS1"}]}`)
	f.Fuzz(func(t *testing.T, text string) {
		s := newSource(t, new(localAPI))
		tab := newTable()
		for range 2 { // the second time they are there already
			decode(strings.NewReader(text), func(deleted bool, d *decision) {
				if deleted {
					tab.remove(d)
				} else {
					s.add(tab, d, 0)
				}
			})
			tab.worst(&reputation.Subject{Addr: netip.MustParseAddr("1.2.3.4"), Country: "CN", ASN: 1}, s.start)
		}
	})
}
