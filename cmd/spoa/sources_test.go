package main

import (
	"bytes"
	"context"
	"encoding/json"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/go-kit/log"
	"github.com/spoa-go/spoa"
	"github.com/spoa-go/spoa/cmd/internal/reputation"
	"github.com/spoa-go/spoa/cmd/internal/reputation/mmdb/mmdbtest"
)

func TestSourceFlags(t *testing.T) {
	for flags, want := range map[string]string{
		"-crowdsec http://127.0.0.1:1": "-crowdsec needs -crowdsec-key",
		"-crowdsec-key x":              "-crowdsec-key needs -crowdsec",
		"-crowdsec http://127.0.0.1:1 -crowdsec-key /no/such/file": "-crowdsec-key: open /no/such/file",
		"-crowdsec 127.0.0.1:1 -crowdsec-key /dev/null":            "-crowdsec: ",
		"-crowdsec-interval 0s":                                    "-crowdsec-interval 0s: want more than 0",
		"-crowdsec-score ban=101":                                  "want TYPE=SCORE",
		"-budget -1ms":                                             "flag -budget: want a time",
		"-deny-below 101":                                          "flag -deny-below: want a score from 0 to 100",
		"-dnsbl a..b":                                              "no name of a zone",
		"-country XX=1":                                            "-country and -asn need -mmdb",
		"-asn 64496=1":                                             "-country and -asn need -mmdb",
		"-asn list":                                                "-country and -asn need -mmdb",
		"-country XX":                                              "want CC=SCORE",
		"-mmdb /no/such/file":                                      "-mmdb: /no/such/file: ",
		"-monitor":                                                 "-monitor and -replay need something to judge by",
		"-replay -":                                                "-monitor and -replay need something to judge by",
		"-replay /no/such/file -dnsbl bl.example -dns 127.0.0.1:53": "-replay: open /no/such/file",
	} {
		var stdout, stderr bytes.Buffer
		args := append(strings.Fields(flags), "-check")
		if strings.Contains(flags, "-replay /") {
			args = strings.Fields(flags)
		}
		if code := realMain(args, &stdout, &stderr); code == 0 || !strings.Contains(stderr.String(), want) {
			t.Errorf("%s: want %q, have %d, %s%s", flags, want, code, &stdout, &stderr)
		}
	}
}

// The key comes from a file, or itself from the environment.
func TestCrowdSecKey(t *testing.T) {
	var mu sync.Mutex
	var key string
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		key = r.Header.Get("X-Api-Key")
		mu.Unlock()
		w.Write([]byte(`{"new":null,"deleted":null}`))
	}))
	defer api.Close()
	path := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(path, []byte("from-file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		env, want string
		args      []string
	}{
		{"", "from-file", []string{"-crowdsec-key", path}},
		{"from-env", "from-env", nil},
		{"from-env", "from-file", []string{"-crowdsec-key", path}},
	} {
		t.Setenv("SPOA_CROWDSEC_KEY", test.env)
		c, err := parse(append(test.args, "-crowdsec", api.URL), os.Environ())
		if err != nil {
			t.Fatal(err)
		}
		s, err := c.openSources(nil, log.NewNopLogger())
		if err != nil {
			t.Fatal(err)
		}
		if err := s.prepare(t.Context()); err != nil {
			t.Fatal(err)
		}
		mu.Lock()
		if key != test.want {
			t.Errorf("environment %q, %v: want %s, have %s", test.env, test.args, test.want, key)
		}
		mu.Unlock()
	}
}

// withSources returns a handler with a list, a CrowdSec, a database and a list of
// networks.
func withSources(t testing.TB, out *bytes.Buffer, args ...string) (spoa.HandlerFunc, *verdicts) {
	t.Helper()
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		type m = map[string]any
		json.NewEncoder(w).Encode(m{"deleted": nil, "new": []m{{
			"id": 1, "scope": "Ip", "value": "203.0.113.1", "type": "captcha", "scenario": "probing", "duration": "4h",
		}}})
	}))
	t.Cleanup(api.Close)
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	places := filepath.Join(dir, "places.mmdb")
	mmdbtest.Write(t, places, mmdbtest.Networks{
		"203.0.113.0/25": mmdbtest.ASN(64496, "Bad Network"), "203.0.113.128/25": mmdbtest.Country("CH"),
	})
	c, err := parse(append(args, "-reputation", file("block.txt", "203.0.113.1\n203.0.113.2\n")+"=10", "-allow", file("office.txt", "203.0.113.9\n"),
		"-crowdsec", api.URL, "-crowdsec-key", file("key", "sesame"), "-mmdb", places, "-asn", "64496=40", "-country", "CH=60"), nil)
	if err != nil {
		t.Fatal(err)
	}
	logger := log.NewNopLogger()
	if out != nil {
		logger = log.NewLogfmtLogger(log.NewSyncWriter(out))
	}
	l, err := c.openLists(t.Context(), log.NewNopLogger())
	if err != nil {
		t.Fatal(err)
	}
	s, err := c.openSources(l, logger)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	v := new(verdicts)
	return checkClientIP(0, finder{}, s.scorer(v.judged, v.wouldDeny)), v
}

// verdicts is what a scorer reports.
type verdicts struct {
	source string
	listed bool
	denied int
}

func (v *verdicts) judged(source string, listed bool) { v.source, v.listed = source, listed }
func (v *verdicts) wouldDeny()                        { v.denied++ }

// variables asks the handler for an address.
func variables(t *testing.T, h spoa.HandlerFunc, addr string) map[string]string {
	t.Helper()
	var a spoa.Actions
	m := spoa.NewMessage(message, spoa.Arg{Value: spoa.Addr(netip.MustParseAddr(addr))})
	if err := h(t.Context(), m, &a); err != nil {
		t.Fatal(err)
	}
	vars := make(map[string]string)
	for action := range a.All() {
		if action.Unset {
			vars[action.Name] = ""
		} else {
			vars[action.Name] = action.Value.String()
		}
	}
	return vars
}

func TestSourceVariables(t *testing.T) {
	h, _ := withSources(t, nil)
	for addr, want := range map[string]map[string]string{
		"203.0.113.1": {
			"ip_score": "10", "ip_list": "block", "ip_reason": "list block", "ip_sources": "block,asn,crowdsec", "ip_missing": "",
			"ip_decision": "captcha", "ip_country": "", "ip_asn": "64496", "ip_org": "Bad Network",
		},
		"203.0.113.3": {
			"ip_score": "40", "ip_list": "asn", "ip_reason": "network AS64496", "ip_sources": "asn", "ip_missing": "",
			"ip_decision": "", "ip_country": "", "ip_asn": "64496", "ip_org": "Bad Network",
		},
		"203.0.113.9": {
			"ip_score": "100", "ip_list": "", "ip_reason": "allow list office", "ip_sources": "office", "ip_missing": "",
			"ip_decision": "", "ip_country": "", "ip_asn": "64496", "ip_org": "Bad Network",
		},
		"203.0.113.200": {
			"ip_score": "60", "ip_list": "country", "ip_reason": "country CH", "ip_sources": "country", "ip_missing": "",
			"ip_decision": "", "ip_country": "CH", "ip_asn": "", "ip_org": "",
		},
		"192.0.2.1": {
			"ip_score": "100", "ip_list": "", "ip_reason": "", "ip_sources": "", "ip_missing": "",
			"ip_decision": "", "ip_country": "", "ip_asn": "", "ip_org": "",
		},
	} {
		have := variables(t, h, addr)
		for name := range want {
			if v, ok := have[name]; !ok || v != want[name] {
				t.Errorf("%s: %s: want %q, have %q (set: %v)", addr, name, want[name], v, ok)
			}
		}
		if len(have) != len(want) {
			t.Errorf("%s: want %v, have %v", addr, want, have)
		}
	}
}

// A variable that no source ever gives a value is not unset; one that had a value
// before a reload is.
func TestSourceVariablesOfCountriesAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "places.mmdb")
	write := func(networks mmdbtest.Networks) { mmdbtest.Write(t, path, networks) }
	write(mmdbtest.Networks{"203.0.113.0/24": mmdbtest.Country("CH")})
	c, err := parse([]string{"-mmdb", path, "-country", "CH=60"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	s, err := c.openSources(nil, log.NewNopLogger())
	if err != nil {
		t.Fatal(err)
	}
	v := new(verdicts)
	h := checkClientIP(0, finder{}, s.scorer(v.judged, v.wouldDeny))
	want := map[string]string{"ip_score": "60", "ip_list": "country", "ip_reason": "country CH", "ip_sources": "country", "ip_country": "CH"}
	if have := variables(t, h, "203.0.113.1"); !maps.Equal(want, have) {
		t.Errorf("want %v, have %v", want, have)
	}
	write(mmdbtest.Networks{"203.0.113.0/24": mmdbtest.ASN(64496, "Some Network")})
	s.reloadAll()
	if have := variables(t, h, "203.0.113.1")["ip_asn"]; have != "64496" {
		t.Errorf("ip_asn: want 64496, have %q", have)
	}
	write(mmdbtest.Networks{"203.0.113.0/24": mmdbtest.Country("CH")})
	s.reloadAll()
	want["ip_asn"], want["ip_org"] = "", ""
	if have := variables(t, h, "203.0.113.1"); !maps.Equal(want, have) {
		t.Errorf("want %v, have %v", want, have)
	}
}

func TestMonitor(t *testing.T) {
	var b bytes.Buffer
	h, judged := withSources(t, &b, "-monitor")
	for addr, score := range map[string]string{"203.0.113.1": "10", "203.0.113.3": "40", "192.0.2.1": "100"} {
		have := variables(t, h, addr)
		if have["ip_score"] != "100" || have["ip_monitor"] != score || have["ip_decision"] != "" {
			t.Errorf("%s: want score 100, monitored %s, no decision, have %v", addr, score, have)
		}
	}
	if n := strings.Count(b.String(), "would deny"); n != 1 || judged.denied != 1 {
		t.Errorf("would deny: want 1, have %d logged, %d counted", n, judged.denied)
	}
	want := `addr=203.0.113.1 score=10 reason="list block" sources=block,asn,crowdsec`
	if !strings.Contains(b.String(), want) {
		t.Errorf("log: want %s, have %s", want, b.String())
	}
}

// A verdict costs no allocation but those of the actions themselves, which the
// library reuses between NOTIFYs.
func TestSourcesAllocateNothing(t *testing.T) {
	h, _ := withSources(t, nil)
	ctx := context.Background()
	for _, addr := range []string{"203.0.113.1", "203.0.113.9", "203.0.113.200", "192.0.2.1"} {
		m := spoa.NewMessage(message, spoa.Arg{Value: spoa.Addr(netip.MustParseAddr(addr))})
		var first spoa.Actions
		if err := h(ctx, m, &first); err != nil {
			t.Fatal(err)
		}
		var actions []spoa.Action
		for action := range first.All() {
			actions = append(actions, action)
		}
		same := func(_ context.Context, _ *spoa.Message, a *spoa.Actions) error {
			for _, action := range actions {
				if action.Unset {
					a.UnsetVar(action.Scope, action.Name)
				} else {
					a.SetVar(action.Scope, action.Name, action.Value)
				}
			}
			return nil
		}
		var allocs []float64
		for _, h := range []spoa.HandlerFunc{same, h} { // in a slice, so that none is inlined
			allocs = append(allocs, testing.AllocsPerRun(100, func() {
				var a spoa.Actions
				_ = h(ctx, m, &a) // did not fail before
			}))
		}
		if want, have := allocs[0], allocs[1]; want != have {
			t.Errorf("%s: allocations: want %v, have %v", addr, want, have)
		}
	}
}

func TestSourcesLookUp(t *testing.T) {
	dir := t.TempDir()
	places := filepath.Join(dir, "places.mmdb")
	mmdbtest.Write(t, places, mmdbtest.Networks{"203.0.113.0/24": mmdbtest.ASN(64496, "Bad Network")})
	var stdout, stderr bytes.Buffer
	if code := realMain([]string{"-lookup", "203.0.113.1", "-mmdb", places, "-asn", "64496=40"}, &stdout, &stderr); code != 0 {
		t.Fatalf("have %d, %s", code, &stderr)
	}
	want := `203.0.113.1: listed, score 40, network AS64496, network AS64496 Bad Network
   SOURCE  STATE   SCORE  REASON
*  asn     listed  40     network AS64496
`
	if have := stdout.String(); have != want {
		t.Errorf("want %s, have %s", want, have)
	}
}

func TestReplay(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	args := []string{
		"-reputation", file("one.txt", "203.0.113.0/24\n"), "-reputation", file("two.txt", "203.0.113.1\n"), "-allow", file("office.txt", "203.0.113.9\n"),
		"-replay", file("log", "203.0.113.1\n203.0.113.1\n203.0.113.2\n203.0.113.9\n192.0.2.1\n"),
	}
	var stdout, stderr bytes.Buffer
	if code := realMain(args, &stdout, &stderr); code != 0 {
		t.Fatalf("have %d, %s", code, &stderr)
	}
	want := `
  requests  addresses
         5          4  in the log
         3          2  denied, with a score below 20
         1          1  allowed by a list
         0          0  passed, but a source had no answer

Denied by each source, and by it alone:

  requests  addresses  alone
         3          2      1  one
         2          1      0  two
`
	if have := "\n" + stdout.String(); have != want {
		t.Errorf("want %s\nhave %s", want, have)
	}
}

func TestSourcesNone(t *testing.T) {
	c, err := parse(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := c.openSources(nil, log.NewNopLogger()); s != nil || err != nil {
		t.Errorf("want none, have %v, %v", s, err)
	}
	var s *sources
	if s.combined() != (*reputation.Combined)(nil) || s.count() != 0 {
		t.Error("no sources: want nothing")
	}
	s.reloadAll()
	s.addTo(nil)
}

// BenchmarkHandler is a verdict by lists alone, and by all sources.
func BenchmarkHandler(b *testing.B) {
	ctx := context.Background()
	all, _ := withSources(b, nil)
	c, err := parse([]string{"-reputation", os.DevNull}, nil)
	if err != nil {
		b.Fatal(err)
	}
	path := filepath.Join(b.TempDir(), "block.txt")
	if err := os.WriteFile(path, []byte("203.0.113.1\n"), 0o600); err != nil {
		b.Fatal(err)
	}
	c.reputation[0].Path = path
	l, err := c.openLists(ctx, log.NewNopLogger())
	if err != nil {
		b.Fatal(err)
	}
	lists := checkClientIP(0, finder{}, newScorer(l, func(string, bool) {}))
	for name, h := range map[string]spoa.HandlerFunc{"lists": lists, "all": all} {
		for _, addr := range []string{"192.0.2.1", "203.0.113.1"} {
			m := spoa.NewMessage(message, spoa.Arg{Value: spoa.Addr(netip.MustParseAddr(addr))})
			b.Run(name+"/"+addr, func(b *testing.B) {
				for b.Loop() {
					var a spoa.Actions
					if err := h(ctx, m, &a); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
