package judge

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-kit/log"
	"github.com/spoa-go/spoa/cmd/internal/reputation/mmdb/mmdbtest"
)

// The case of a list whose second column is no score of ours: nothing of it is
// taken for one, and -check says how to choose.
func TestCheckWarns(t *testing.T) {
	list := writeFile(t, "ipsum.txt", "198.51.100.7\t10\n203.0.113.9\t3\n192.0.2.4\t1\n")
	for _, tc := range []struct {
		option string
		want   []string
		lines  int
	}{
		{"", []string{"lists: 1, entries: 3, bad lines: 0", "warning: " + list, "(3, the first in line 1) are not used", "column=KIND"}, 2},
		{",column=count>=3", []string{"entries: 2"}, 1},
		{",column=score", []string{"entries: 3"}, 1},
		{",column=ignore", []string{"entries: 3"}, 1},
	} {
		c := configure(t, "-reputation", list+tc.option)
		said, err := c.Check(t.Context())
		if err != nil || strings.Count(said, "\n") != tc.lines-1 {
			t.Errorf("%q: want %d lines, have %q, %v", tc.option, tc.lines, said, err)
		}
		for _, want := range tc.want {
			if !strings.Contains(said, want) {
				t.Errorf("%q: want %q, have %q", tc.option, want, said)
			}
		}
	}
}

func TestCheck(t *testing.T) {
	list := writeFile(t, "list", strings.Repeat("192.0.2.1\n192.0.2.2\n", 100)+"oops\n")
	for args, want := range map[string]string{
		"-random":             "no lists: scores are random",
		"-reputation " + list: "lists: 1, entries: 2, bad lines: 1",
		"-reputation " + list + " -allow " + list + "[s]*":                               "lists: 1, entries: 2, bad lines: 1\nwarning: " + list + "[s]*: no list there",
		"-dnsbl bl.example -dns 127.0.0.1:53":                                            "no lists, other sources: 1",
		"-dnsbl bl.example -dns 127.0.0.1:53 -reputation " + list:                        "lists: 1, entries: 2, bad lines: 1, other sources: 1",
		"-monitor -reputation " + list + " -allow " + writeFile(t, "own", "192.0.2.2\n"): "lists: 2, entries: 3, bad lines: 1",
	} {
		c := configure(t, strings.Fields(args)...)
		if have, err := c.Check(t.Context()); err != nil || have != want {
			t.Errorf("%s: want %q, have %q, %v", args, want, have, err)
		}
	}
}

func TestLookUp(t *testing.T) {
	drop, own := writeFile(t, "drop.txt", "198.51.96.0/20 ; SBL1\n"), writeFile(t, "own", "198.51.100.7\n")
	for _, tc := range []struct {
		addr string
		want []string
	}{
		{"198.51.97.1", []string{"198.51.97.1: listed, score 7, by list drop\n", "*  drop  198.51.96.0/20  7 ", "SBL1"}},
		{"198.51.100.7", []string{"198.51.100.7: allowed, score 100, by list own\n", "   drop  198.51.96.0/20 ", "*  own   198.51.100.7/32  allow "}},
		{"8.8.8.8", []string{"8.8.8.8: unlisted, score 100\n"}},
	} {
		var b bytes.Buffer
		if err := configure(t, "-lookup", tc.addr, "-reputation", drop+"=7", "-allow", own).WriteLookUp(t.Context(), &b); err != nil {
			t.Error(err)
		}
		for _, want := range tc.want {
			if !strings.Contains(b.String(), want) {
				t.Errorf("%s: want %q, have %s", tc.addr, want, b.String())
			}
		}
	}
	err := configure(t, "-lookup", "8.8.8.8").WriteLookUp(t.Context(), new(bytes.Buffer))
	if err == nil || !strings.Contains(err.Error(), "-lookup: want lists") {
		t.Errorf("without lists: want an error, have %v", err)
	}
}

func TestLookUpSources(t *testing.T) {
	places := filepath.Join(t.TempDir(), "places.mmdb")
	mmdbtest.Write(t, places, mmdbtest.Networks{"203.0.113.0/24": mmdbtest.ASN(64496, "Bad Network")})
	var b bytes.Buffer
	if err := configure(t, "-lookup", "203.0.113.1", "-mmdb", places, "-asn", "64496=40").WriteLookUp(t.Context(), &b); err != nil {
		t.Fatal(err)
	}
	want := `203.0.113.1: listed, score 40, network AS64496, network AS64496 Bad Network
   SOURCE  STATE   SCORE  REASON
*  asn     listed  40     network AS64496
`
	if have := b.String(); have != want {
		t.Errorf("want %s, have %s", want, have)
	}
}

func TestReplay(t *testing.T) {
	c := configure(t,
		"-reputation", writeFile(t, "one.txt", "203.0.113.0/24\n"), "-reputation", writeFile(t, "two.txt", "203.0.113.1\n"), "-allow", writeFile(t, "office.txt", "203.0.113.9\n"),
		"-replay", writeFile(t, "log", "203.0.113.1\n203.0.113.1\n203.0.113.2\n203.0.113.9\n192.0.2.1\n"))
	var b bytes.Buffer
	if err := c.WriteReplay(t.Context(), &b, log.NewNopLogger()); err != nil {
		t.Fatal(err)
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
	if have := "\n" + b.String(); have != want {
		t.Errorf("want %s\nhave %s", want, have)
	}
}
