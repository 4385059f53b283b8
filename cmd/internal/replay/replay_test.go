package replay

import (
	"bytes"
	"context"
	"net/netip"
	"strings"
	"testing"

	"github.com/spoa-go/spoa/cmd/internal/reputation"
)

func TestFindAddr(t *testing.T) {
	for line, want := range map[string]string{
		"192.0.2.1": "192.0.2.1",
		`192.0.2.1 - - [10/Oct/2000:13:55:36 -0700] "GET /?a=198.51.100.1 HTTP/1.0" 200 2326`:                           "192.0.2.1",
		"Feb  6 12:14:14 localhost haproxy[14389]: 192.0.2.1:33317 [06/Feb/2009:12:14:14.655] http-in static/srv1 10/0": "192.0.2.1",
		"haproxy[1]: 2001:db8::1:33317 [06/Feb/2009:12:14:14.655]":                                                      "2001:db8::1",
		"haproxy[1]: ::ffff:192.0.2.1:33317 [06/Feb/2009:12:14:14.655]":                                                 "192.0.2.1",
		`2001:db8::8080 - - [x]`:      "2001:db8::8080",
		`[2001:db8::1]:443 GET`:       "2001:db8::1",
		`[2001:db8::1] GET`:           "2001:db8::1",
		`fe80::1%eth0 GET`:            "fe80::1",
		`level=info addr=192.0.2.1`:   "192.0.2.1",
		`{"src":"192.0.2.1","x":1}`:   "192.0.2.1",
		`{"src": "192.0.2.1", "x":1}`: "192.0.2.1",
		"12:14:14 no address 1.2.3":   "",
		"":                            "",
	} {
		have := ""
		if addr, ok := findAddr(line); ok {
			have = addr.String()
		}
		if have != want {
			t.Errorf("%s: want %q, have %q", line, want, have)
		}
	}
}

// about is a source of findings by address.
type about struct {
	name string
	say  map[string]reputation.Finding
}

func (a about) Judge(_ context.Context, s reputation.Subject) reputation.Finding {
	f := a.say[s.Addr.String()]
	f.Source = a.name
	return f
}

func TestRun(t *testing.T) {
	bad := reputation.Finding{State: reputation.Listed, Score: 10}
	better := reputation.Finding{State: reputation.Listed, Score: 20}
	allowed := reputation.Finding{State: reputation.Allowed}
	unknown := reputation.Finding{State: reputation.Unknown}
	judge, err := reputation.Combine(0, nil, []reputation.Source{
		about{"one", map[string]reputation.Finding{"192.0.2.1": bad, "192.0.2.2": bad, "192.0.2.3": better, "192.0.2.4": bad}},
		about{"two", map[string]reputation.Finding{"192.0.2.1": bad, "192.0.2.4": allowed, "192.0.2.5": unknown}},
	})
	if err != nil {
		t.Fatal(err)
	}
	log := "192.0.2.1\n192.0.2.1\n192.0.2.1\n192.0.2.2 x\n\n192.0.2.3\n192.0.2.4\n192.0.2.4\n192.0.2.5\nno address\n192.0.2.6\n"
	var b bytes.Buffer
	if err := Run(&b, strings.NewReader(log), judge.Explain, 20); err != nil {
		t.Fatal(err)
	}
	want := `
  requests  addresses
         9          6  in the log
         4          2  denied, with a score below 20
         2          1  allowed by a list
         1          1  passed, but a source had no answer
Lines without an address: 1.

Denied by each source, and by it alone:

  requests  addresses  alone
         4          2      1  one
         3          1      0  two
`
	if have := "\n" + b.String(); have != want {
		t.Errorf("want %s\nhave %s", want, have)
	}
}

func TestRunErrors(t *testing.T) {
	judge, err := reputation.Combine(0, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, log := range map[string]string{"empty": "", "no address": "x\ny\n", "long line": strings.Repeat("x", longest+1)} {
		if err := Run(new(bytes.Buffer), strings.NewReader(log), judge.Explain, 20); err == nil {
			t.Errorf("%s: want an error", name)
		}
	}
}

func FuzzFindAddr(f *testing.F) {
	f.Add("haproxy[1]: 2001:db8::1:33317 [x]")
	f.Add("[::1]:80 1.2.3.4:5")
	f.Fuzz(func(t *testing.T, line string) {
		if addr, ok := findAddr(line); ok && (!addr.IsValid() || addr.Is4In6() || addr.Zone() != "" || addr == netip.Addr{}) {
			t.Errorf("%q: %v", line, addr)
		}
	})
}
