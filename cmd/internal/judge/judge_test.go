package judge

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
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
	"github.com/spoa-go/spoa/cmd/internal/reputation/mmdb/mmdbtest"
	"github.com/spoa-go/spoa/cmd/internal/settings"
)

// load fills a Config as the command does.
func load(args, environ []string) (*Config, error) {
	c := DefaultConfig()
	flags := flag.NewFlagSet("spoa", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	c.Register(flags)
	if _, err := settings.Load(flags, args, environ); err != nil {
		return nil, err
	}
	_, err := c.Validate()
	return &c, err
}

// configure fills a Config from flags that are right.
func configure(t testing.TB, args ...string) *Config {
	t.Helper()
	c, err := load(args, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// open opens a Config that can be opened, with what its sources must know.
func open(t testing.TB, c *Config, logger log.Logger) *Judge {
	t.Helper()
	j, err := c.Open(t.Context(), logger)
	if err != nil {
		t.Fatal(err)
	}
	if err := j.sources.prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	return j
}

func writeFile(t testing.TB, name, text string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestBadFlags(t *testing.T) {
	list := writeFile(t, "list", "192.0.2.1\n")
	for flags, want := range map[string]string{
		"-crowdsec http://127.0.0.1:1": "-crowdsec needs -crowdsec-key",
		"-crowdsec-key x":              "-crowdsec-key needs -crowdsec",
		"-crowdsec http://127.0.0.1:1 -crowdsec-key /no/such/file": "-crowdsec-key: open /no/such/file",
		"-crowdsec 127.0.0.1:1 -crowdsec-key " + list:              "-crowdsec: ",
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
		"-random -allow " + list:                                   "-random and lists or other sources: want one of them",
		"-random=false":                                            "want -reputation FILE, or -random to try out",
		"-random=maybe":                                            "-random",
		"-reputation " + list + "=101":                             "-reputation",
		"-reputation " + list + " -reputation " + list + "=7": "-reputation " + list + ": given twice",
		"-allow " + list + " -allow " + list:                  "-allow " + list + ": given twice",
		"-refresh 1s":                                         "-refresh 1s: want at least 1m",
		"-lookup 8.8.8":                                       `-lookup "8.8.8": want an address`,
		"-reputation " + writeFile(t, "bad", "x\n"):           "bad",
	} {
		c, err := load(strings.Fields(flags), nil)
		if err == nil {
			_, err = c.Open(t.Context(), log.NewNopLogger())
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: want %q, have %v", flags, want, err)
		}
	}
	err := configure(t, "-replay", "/no/such/file", "-allow", list).WriteReplay(t.Context(), io.Discard, log.NewNopLogger())
	if err == nil || !strings.Contains(err.Error(), "-replay: open /no/such/file") {
		t.Errorf("want the log named, have %v", err)
	}
}

func TestNotes(t *testing.T) {
	for args, want := range map[string]int{"": 1, "-random": 0, "-allow list": 0} {
		if notes, err := configure(t, strings.Fields(args)...).Validate(); err != nil || len(notes) != want {
			t.Errorf("%q: want %d notes, have %q, %v", args, want, notes, err)
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
	path := writeFile(t, "key", "from-file\n")
	for _, test := range []struct {
		env, want string
		args      []string
	}{
		{"", "from-file", []string{"-crowdsec-key", path}},
		{"from-env", "from-env", nil},
		{"from-env", "from-file", []string{"-crowdsec-key", path}},
	} {
		t.Setenv("SPOA_CROWDSEC_KEY", test.env)
		c, err := load(append(test.args, "-crowdsec", api.URL), os.Environ())
		if err != nil {
			t.Fatal(err)
		}
		open(t, c, log.NewNopLogger())
		mu.Lock()
		if key != test.want {
			t.Errorf("environment %q, %v: want %s, have %s", test.env, test.args, test.want, key)
		}
		mu.Unlock()
	}
}

// withSources returns a handler with a list, a CrowdSec, a database and a list of
// networks.
func withSources(t testing.TB, logger log.Logger, counter Counter, args ...string) spoa.HandlerFunc {
	t.Helper()
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		type m = map[string]any
		json.NewEncoder(w).Encode(m{"deleted": nil, "new": []m{{
			"id": 1, "scope": "Ip", "value": "203.0.113.1", "type": "captcha", "scenario": "probing", "duration": "4h",
		}}})
	}))
	t.Cleanup(api.Close)
	places := filepath.Join(t.TempDir(), "places.mmdb")
	mmdbtest.Write(t, places, mmdbtest.Networks{
		"203.0.113.0/25": mmdbtest.ASN(64496, "Bad Network"), "203.0.113.128/25": mmdbtest.Country("CH"),
	})
	c := configure(t, append(args, "-reputation", writeFile(t, "block.txt", "203.0.113.1\n203.0.113.2\n")+"=10", "-allow", writeFile(t, "office.txt", "203.0.113.9\n"),
		"-crowdsec", api.URL, "-crowdsec-key", writeFile(t, "key", "sesame"), "-mmdb", places, "-asn", "64496=40", "-country", "CH=60")...)
	return open(t, c, logger).Handler(0, counter)
}

// verdicts is a Counter.
type verdicts struct {
	judged []string
	denied int
}

// Judged implements Counter.
func (v *verdicts) Judged(source string, listed bool) {
	v.judged = append(v.judged, fmt.Sprint(source, " ", listed))
}

// WouldDeny implements Counter.
func (v *verdicts) WouldDeny() { v.denied++ }

// uncounted is a Counter of nothing.
type uncounted struct{}

func (uncounted) Judged(string, bool) {}
func (uncounted) WouldDeny()          {}

// variables asks the handler for an address.
func variables(t *testing.T, h spoa.HandlerFunc, addr string) map[string]string {
	t.Helper()
	var a spoa.Actions
	m := spoa.NewMessage("check-client-ip", spoa.Arg{Value: spoa.Addr(netip.MustParseAddr(addr))})
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
	h := withSources(t, log.NewNopLogger(), uncounted{})
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
	j := open(t, configure(t, "-mmdb", path, "-country", "CH=60"), log.NewNopLogger())
	h := j.Handler(0, uncounted{})
	want := map[string]string{"ip_score": "60", "ip_list": "country", "ip_reason": "country CH", "ip_sources": "country", "ip_country": "CH"}
	if have := variables(t, h, "203.0.113.1"); !maps.Equal(want, have) {
		t.Errorf("want %v, have %v", want, have)
	}
	write(mmdbtest.Networks{"203.0.113.0/24": mmdbtest.ASN(64496, "Some Network")})
	j.Reload(t.Context())
	if have := variables(t, h, "203.0.113.1")["ip_asn"]; have != "64496" {
		t.Errorf("ip_asn: want 64496, have %q", have)
	}
	write(mmdbtest.Networks{"203.0.113.0/24": mmdbtest.Country("CH")})
	j.Reload(t.Context())
	want["ip_asn"], want["ip_org"] = "", ""
	if have := variables(t, h, "203.0.113.1"); !maps.Equal(want, have) {
		t.Errorf("want %v, have %v", want, have)
	}
}

func TestMonitor(t *testing.T) {
	var b bytes.Buffer
	var counted verdicts
	h := withSources(t, log.NewLogfmtLogger(log.NewSyncWriter(&b)), &counted, "-monitor")
	for addr, score := range map[string]string{"203.0.113.1": "10", "203.0.113.3": "40", "192.0.2.1": "100"} {
		have := variables(t, h, addr)
		if have["ip_score"] != "100" || have["ip_monitor"] != score || have["ip_decision"] != "" {
			t.Errorf("%s: want score 100, monitored %s, no decision, have %v", addr, score, have)
		}
	}
	if n := strings.Count(b.String(), "would deny"); n != 1 || counted.denied != 1 {
		t.Errorf("would deny: want 1, have %d logged, %d counted", n, counted.denied)
	}
	want := `addr=203.0.113.1 score=10 reason="list block" sources=block,asn,crowdsec`
	if !strings.Contains(b.String(), want) {
		t.Errorf("log: want %s, have %s", want, b.String())
	}
}

// A verdict costs no allocation but those of the actions themselves, which the
// library reuses between NOTIFYs.
func TestSourcesAllocateNothing(t *testing.T) {
	h := withSources(t, log.NewNopLogger(), uncounted{})
	ctx := context.Background()
	for _, addr := range []string{"203.0.113.1", "203.0.113.9", "203.0.113.200", "192.0.2.1"} {
		m := spoa.NewMessage("check-client-ip", spoa.Arg{Value: spoa.Addr(netip.MustParseAddr(addr))})
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
		if most, have := allocs[0], allocs[1]; have > most {
			t.Errorf("%s: allocations: want %v at most, have %v", addr, most, have)
		}
	}
}

// A Judge by chance has nothing to keep up to date.
func TestChance(t *testing.T) {
	j := open(t, configure(t), log.NewNopLogger())
	if j.Lists() != nil || j.Sources() != nil || len(j.Tasks()) > 0 {
		t.Errorf("want no lists, sources and tasks, have %v, %v, %d", j.Lists(), j.Sources(), len(j.Tasks()))
	}
	j.Prepare(t.Context())
	j.Reload(t.Context())
}

// Reload reads files again that no task has looked at.
func TestReload(t *testing.T) {
	networks := writeFile(t, "networks", "AS64496\n")
	list := writeFile(t, "list", "192.0.2.1\n")
	places := filepath.Join(t.TempDir(), "places.mmdb")
	mmdbtest.Write(t, places, mmdbtest.Networks{"203.0.113.0/24": mmdbtest.ASN(64497, "Other Network")})
	j := open(t, configure(t, "-mmdb", places, "-asn", networks+"=40", "-reputation", list), log.NewNopLogger())
	if n := len(j.Tasks()); n != 3 {
		t.Errorf("want tasks for a list, a database and networks, have %d", n)
	}
	h := j.Handler(0, uncounted{})
	for addr, want := range map[string]string{"203.0.113.1": "100", "192.0.2.2": "100"} {
		if have := variables(t, h, addr)["ip_score"]; have != want {
			t.Errorf("%s before: want %s, have %s", addr, want, have)
		}
	}
	for path, text := range map[string]string{networks: "AS64496\nAS64497\n", list: "192.0.2.1\n192.0.2.2\n"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	j.Reload(t.Context())
	for addr, want := range map[string]string{"203.0.113.1": "40", "192.0.2.2": "0"} {
		if have := variables(t, h, addr)["ip_score"]; have != want {
			t.Errorf("%s after: want %s, have %s", addr, want, have)
		}
	}
}

// BenchmarkHandler is a verdict by lists alone, and by all sources.
func BenchmarkHandler(b *testing.B) {
	ctx := context.Background()
	all := withSources(b, log.NewNopLogger(), uncounted{})
	c := configure(b, "-reputation", writeFile(b, "block.txt", "203.0.113.1\n"))
	lists := open(b, c, log.NewNopLogger()).Handler(0, uncounted{})
	for name, h := range map[string]spoa.HandlerFunc{"lists": lists, "all": all} {
		for _, addr := range []string{"192.0.2.1", "203.0.113.1"} {
			m := spoa.NewMessage("check-client-ip", spoa.Arg{Value: spoa.Addr(netip.MustParseAddr(addr))})
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
