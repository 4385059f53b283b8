package mmdb

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-kit/log"
	"github.com/spoa-go/spoa/cmd/internal/reputation"
	"github.com/spoa-go/spoa/cmd/internal/reputation/mmdb/mmdbtest"
)

const asnDrop = `{"asn":64496,"rir":"ripencc","domain":"a.example","cc":"NL","asname":"A-NETWORKS"}
{"asn":64511,"rir":"arin","domain":"b.example","cc":"US","asname":"B"}
{"type":"metadata","timestamp":1700000000,"size":120,"records":2,"copyright":"x","terms":"y"}
`

func TestParseNetworks(t *testing.T) {
	for name, test := range map[string]struct {
		text string
		want map[uint32]string
		err  string
	}{
		"ASN-DROP":         {asnDrop, map[uint32]string{64496: "A-NETWORKS", 64511: "B"}, ""},
		"text":             {"\ufeff# numbers\nAS64496 ; A\n64497\tB\nas64498,x\n\n; end", map[uint32]string{64496: "", 64497: "", 64498: ""}, ""},
		"cut":              {asnDrop[:strings.Index(asnDrop, `{"type"`)], nil, "no line of metadata"},
		"cut in a line":    {asnDrop[:len(asnDrop)-10], nil, "line 3: "},
		"one less":         {asnDrop[strings.Index(asnDrop, "\n"):], nil, "1 records where the metadata says 2"},
		"empty":            {"", nil, "no networks"},
		"metadata only":    {`{"type":"metadata","records":0}`, nil, "no networks"},
		"list of prefixes": {"192.0.2.0/24\n", nil, `line 1: "192.0.2.0/24": want the number`},
		"DROP":             {`{"cidr":"192.0.2.0/24"}`, nil, "line 1: a record without"},
		"too large":        {"4294967296", nil, "want the number"},
		"zero":             {"AS0", nil, "want the number"},
		"long line":        {strings.Repeat("1", 1<<17), nil, "token too long"},
	} {
		t.Run(name, func(t *testing.T) {
			have, err := parseNetworks(strings.NewReader(test.text))
			if test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)) {
				t.Errorf("want an error with %q, have %v", test.err, err)
			}
			if test.err == "" && (err != nil || fmt.Sprint(have) != fmt.Sprint(test.want)) {
				t.Errorf("want %v, have %v, %v", test.want, have, err)
			}
		})
	}
}

func TestNetworks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "asndrop.json")
	mmdbtest.Replace(t, path, []byte(asnDrop))
	n, err := OpenNetworks(NetworkFile{path, 5}, log.NewNopLogger())
	if err != nil {
		t.Fatal(err)
	}
	listed := reputation.Finding{Source: "asndrop", State: reputation.Listed, Score: 5, Reason: "network asndrop: AS64496 A-NETWORKS"}
	for asn, want := range map[uint32]reputation.Finding{64496: listed, 64497: {Source: "asndrop"}, 0: {Source: "asndrop"}} {
		if have := n.Judge(t.Context(), subject{ASN: asn}); have != want {
			t.Errorf("AS%d: want %+v, have %+v", asn, want, have)
		}
	}
	if n := testing.AllocsPerRun(100, func() { n.Judge(t.Context(), subject{ASN: 64496}) }); n != 0 {
		t.Errorf("allocations: want 0, have %v", n)
	}

	mmdbtest.Replace(t, path, []byte(asnDrop[:100]))
	if err := n.Reload(); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a cut file: want an error that names it, have %v", err)
	}
	if have := n.Judge(t.Context(), subject{ASN: 64496}); have != listed {
		t.Errorf("after a cut file: want %+v, have %+v", listed, have)
	}
	if n.Status().Problem == "" {
		t.Error("after a cut file: want a problem")
	}
	watched(t, n.Watch)
	mmdbtest.Replace(t, path, []byte("AS64497\n"))
	eventually(t, func() bool { return n.Status().Entries == 1 })
	if have := n.Judge(t.Context(), subject{ASN: 64497}).Reason; have != "network asndrop: AS64497" {
		t.Errorf("reason: have %q", have)
	}
	if n.Status().Problem != "" {
		t.Errorf("after a good file: want no problem, have %q", n.Status().Problem)
	}
}

func TestOpenNetworksErrors(t *testing.T) {
	dir := t.TempDir()
	for _, path := range []string{dir, filepath.Join(dir, "missing")} {
		if _, err := OpenNetworks(NetworkFile{Path: path}, log.NewNopLogger()); err == nil || strings.Count(err.Error(), path) != 1 {
			t.Errorf("%s: want an error that names it once, have %v", path, err)
		}
	}
}

func TestNetworkFlags(t *testing.T) {
	var n NetworkFlags
	for _, text := range []string{"64496=10", "AS64497=0", "asndrop.json", "other.txt=30"} {
		if err := n.Set(text); err != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
	if want, have := "{map[64496:10 64497:0] [{asndrop.json 0} {other.txt 30}]}", fmt.Sprint(n); want != have {
		t.Errorf("want %s, have %s", want, have)
	}
	for _, text := range []string{"", "=5", "64496", "AS64496", "64496=101", "64496=x", "list=x"} {
		if err := n.Set(text); err == nil {
			t.Errorf("%q: want an error", text)
		}
	}
	s := NewNetworks(n.Numbers)
	want := reputation.Finding{Source: "asn", State: reputation.Listed, Score: 10, Reason: "network AS64496"}
	if have := s.Judge(t.Context(), subject{ASN: 64496}); have != want {
		t.Errorf("want %+v, have %+v", want, have)
	}
	if err := s.Reload(); err != nil {
		t.Errorf("nothing to reload: %v", err)
	}
}

func TestCountries(t *testing.T) {
	var c Countries
	for _, text := range []string{"xx=10", "CH=100"} {
		if err := c.Set(text); err != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
	want := reputation.Finding{Source: "country", State: reputation.Listed, Score: 10, Reason: "country XX"}
	if have := c.Judge(t.Context(), subject{Country: "XX"}); have != want {
		t.Errorf("want %+v, have %+v", want, have)
	}
	for _, country := range []string{"", "DE"} {
		if have := c.Judge(t.Context(), subject{Country: country}); have.State != reputation.NotListed {
			t.Errorf("%q: want not listed, have %+v", country, have)
		}
	}
	for _, text := range []string{"", "X=1", "XXX=1", "XX", "XX=", "XX=101", "1X=1", "Ä=1"} {
		if err := c.Set(text); err == nil {
			t.Errorf("%q: want an error", text)
		}
	}
	if want, have := "CH,XX", c.String(); want != have {
		t.Errorf("want %s, have %s", want, have)
	}
	if n := testing.AllocsPerRun(100, func() { c.Judge(t.Context(), subject{Country: "XX"}) }); n != 0 {
		t.Errorf("allocations: want 0, have %v", n)
	}
}

func FuzzParseNetworks(f *testing.F) {
	f.Add(asnDrop)
	f.Add("AS64496 ; x\n64497")
	f.Fuzz(func(t *testing.T, text string) {
		have, err := parseNetworks(strings.NewReader(text))
		if err == nil && len(have) == 0 {
			t.Error("no networks and no error")
		}
		if _, ok := have[0]; ok {
			t.Error("network 0")
		}
	})
}

func TestReadableByNobody(t *testing.T) {
	if os.Getuid() == 0 {
		t.Skip("root reads everything")
	}
	path := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(path, []byte("64496\n"), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenNetworks(NetworkFile{Path: path}, log.NewNopLogger()); err == nil {
		t.Error("want an error")
	}
}
