package lists

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-kit/log"
)

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	odd := filepath.Join(dir, "a=abc")
	writeFile(t, odd, "192.0.2.1\n")
	writeFile(t, filepath.Join(dir, "b=7"), "192.0.2.1\n")
	writeFile(t, filepath.Join(dir, "c=-1"), "192.0.2.1\n")
	count3 := Column{ColumnCount, 3}
	for _, tc := range []struct {
		in   string
		want File
		fail string
	}{
		{in: "drop.txt", want: File{Path: "drop.txt"}},
		{in: "drop.txt=0", want: File{Path: "drop.txt"}},
		{in: "drop.txt=100", want: File{Path: "drop.txt", Score: 100}},
		{in: "a=b=30", want: File{Path: "a=b", Score: 30}},
		{in: odd, want: File{Path: odd}},
		{in: odd + "=5", want: File{Path: odd, Score: 5}},
		{in: dir + "/b=7", want: File{Path: dir + "/b", Score: 7}},
		{in: dir + "/b=7=8", want: File{Path: dir + "/b=7", Score: 8}},
		{in: "ipsum.txt,column=count>=3", want: File{Path: "ipsum.txt", Column: count3}},
		{in: "ipsum.txt=20,column=count>=3", want: File{Path: "ipsum.txt", Score: 20, Column: count3}},
		{in: "a,b.txt=20,column=score", want: File{Path: "a,b.txt", Score: 20, Column: Column{Kind: ColumnScore}}},
		{in: "x.json,column=badness,field=abuseConfidenceScore", want: File{Path: "x.json", Column: Column{Kind: ColumnBadness}, Field: "abuseConfidenceScore"}},
		{in: "x,column=ignore,accept=cut+wide", want: File{Path: "x", Column: Column{Kind: ColumnIgnore}, Accept: AcceptCut | AcceptWide}},
		{in: "https://example.com/drop.txt", want: File{Path: "https://example.com/drop.txt"}},
		{in: "https://example.com/drop.txt=7", want: File{Path: "https://example.com/drop.txt", Score: 7}},
		{in: "https://example.com/?limit=50", want: File{Path: "https://example.com/?limit=50"}},
		{in: "https://example.com/?limit=50=7", want: File{Path: "https://example.com/?limit=50", Score: 7}},
		{in: "https://example.com/?a=b&limit=50", want: File{Path: "https://example.com/?a=b&limit=50"}},
		{in: "https://example.com/?key=abc", want: File{Path: "https://example.com/?key=abc"}},
		{in: dir + "/absent=abc", fail: "want FILE or FILE=SCORE"},
		{in: "drop.txt=", fail: "want FILE or FILE=SCORE"},
		{in: "drop.txt=101", fail: "want FILE or FILE=SCORE"},
		{in: "drop.txt=256", fail: "want FILE or FILE=SCORE"},
		{in: "drop.txt=-1", fail: "want FILE or FILE=SCORE"},
		{in: "drop.txt=+1", fail: "want FILE or FILE=SCORE"},
		{in: "drop.txt=1.5", fail: "want FILE or FILE=SCORE"},
		{in: dir + "/c=-1", fail: "want FILE or FILE=SCORE"}, // though there is such a file
		{in: "=5", fail: "want FILE or FILE=SCORE"},
		{in: "", fail: "want FILE or FILE=SCORE"},
		{in: "x,column=count", fail: "count>=N"}, // as the shell leaves it without quotes
		{in: "x,column=", fail: "badness"},
		{in: "x,field=", fail: "want the name"},
		{in: "x,accept=all", fail: "cut, wide, shrunk"},
		{in: "column=score", fail: "want a list before it"},
	} {
		var have Files
		err := have.Set(tc.in)
		if tc.fail != "" {
			if err == nil || !strings.Contains(err.Error(), tc.fail) || len(have) > 0 {
				t.Errorf("%q: want %q in the error, have %v, %v", tc.in, tc.fail, err, have)
			}
			continue
		}
		if err != nil || len(have) != 1 || have[0] != tc.want {
			t.Errorf("%q: want %+v, have %+v, %v", tc.in, tc.want, have, err)
		}
	}
}

// The environment's values are split at commas, options and all.
func TestFilesOfTheEnvironment(t *testing.T) {
	var f Files
	for s := range strings.SplitSeq("a=5,column=count>=3,accept=wide,b,c=1,column=score", ",") {
		if err := f.Set(s); err != nil {
			t.Fatal(err)
		}
	}
	if want, have := "a=5,column=count>=3,accept=wide,b=0,c=1,column=score", f.String(); want != have {
		t.Errorf("want %q, have %q", want, have)
	}
}

func TestAllowFiles(t *testing.T) {
	var f AllowFiles
	for _, s := range []string{"own=5", "all,accept=wide", "counts,column=count>=2"} {
		if err := f.Set(s); err != nil {
			t.Fatal(err)
		}
	}
	if f[0].Path != "own=5" || f[0].Score != BestScore || f[1].Accept != AcceptWide || f[2].Column.Min != 2 {
		t.Errorf("have %+v", f)
	}
	for _, s := range []string{"", "x,column=score", "x,column=badness"} {
		if err := f.Set(s); err == nil {
			t.Errorf("%q: want an error", s)
		}
	}
}

const (
	firehol = "#\n# level1\n#\n# ipv4 hash:net ipset\n#\n# Category : attacks\n# Entries : 2 subnets, 257 unique IPs\n#\n" +
		"198.51.100.0/24\n203.0.113.9\n"
	dropText = "; Spamhaus DROP List 2016/08/30 - (c) 2016 The Spamhaus Project\r\n1.10.16.0/20 ; SBL256894\r\n"
	dropJSON = `{"cidr":"1.19.0.0/16","sblid":"SBL434604","rir":"apnic"}
{"cidr":"2a06:e480::/29","sblid":"SBL301771","rir":"ripencc"}
{"type":"metadata","timestamp":1700000000,"size":150,"records":2,"copyright":"(c)","terms":"https://example.com/"}
`
)

// scored is a list whose second column is a score.
func scored(path string) File { return File{Path: path, Column: Column{Kind: ColumnScore}} }

func score(l *Lists, addr string) int { return int(l.Lookup(netip.MustParseAddr(addr)).Score) }

func TestLookup(t *testing.T) {
	dir := t.TempDir()
	file := func(name, data string) string {
		path := filepath.Join(dir, name)
		writeFile(t, path, data)
		return path
	}
	column := Column{Kind: ColumnScore}
	l, err := openLists(t, Options{
		Block: []File{
			{Path: file("level1.netset", firehol)},
			{Path: file("drop.txt", dropText), Score: 10},
			{Path: file("drop_v4.json", dropJSON), Score: 20},
			{Path: file("own", "192.0.2.0/24 60\n192.0.2.128/25 80\n192.0.2.200 40\n192.0.2.201\n192.0.2.202 100\n2001:db8::/32 70\n"+
				"198.18.0.0/15 50\n198.18.0.0/15 30\n198.18.0.0/15 50\n"), Score: 90, Column: column},
			{Path: file("other", "192.0.2.0/24 59\n192.0.2.128/25 81\n192.0.2.200 40\n"), Column: column},
			{Path: file(".hidden", "100.64.0.0/10\n"), Score: 1},
		},
		Allow: []File{
			{Path: file("office.txt", "203.0.113.0/28\n2001:db8:1::/48\n")},
			{Path: file("partners.txt.gz", "198.51.100.7\n198.51.100.0/25\n")},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		addr string
		want Verdict
	}{
		{"198.51.100.200", Verdict{Listed, 0, "level1"}},
		{"1.10.31.255", Verdict{Listed, 10, "drop"}},
		{"1.19.3.4", Verdict{Listed, 20, "drop_v4"}},
		{"2a06:e487::1", Verdict{Listed, 20, "drop_v4"}},
		{"100.64.1.1", Verdict{Listed, 1, ".hidden"}},
		{"192.0.2.1", Verdict{Listed, 59, "other"}},    // the lowest of two for the same prefix
		{"192.0.2.129", Verdict{Listed, 80, "own"}},    // either way round
		{"192.0.2.200", Verdict{Listed, 40, "own"}},    // the first of equals
		{"192.0.2.201", Verdict{Listed, 81, "other"}},  // own has 90 for it, by the flag
		{"192.0.2.202", Verdict{Listed, 81, "other"}},  // own has 100 for it
		{"198.19.255.255", Verdict{Listed, 30, "own"}}, // the lowest of duplicates
		{"2001:db8:2::1", Verdict{Listed, 70, "own"}},
		{"::ffff:192.0.2.1", Verdict{Listed, 59, "other"}},
		{"2001:db8:2::1%eth0", Verdict{Listed, 70, "own"}},
		{"8.8.8.8", Verdict{Unlisted, 100, ""}},
		{"2001:4860::8888", Verdict{Unlisted, 100, ""}},
		{"203.0.113.9", Verdict{Allowed, 100, "office"}}, // by a shorter prefix
		{"198.51.100.7", Verdict{Allowed, 100, "partners"}},
		{"198.51.100.1", Verdict{Allowed, 100, "partners"}},
		{"::ffff:203.0.113.9", Verdict{Allowed, 100, "office"}},
		{"2001:db8:1::1", Verdict{Allowed, 100, "office"}},
	} {
		if have := l.Lookup(netip.MustParseAddr(tc.addr)); have != tc.want {
			t.Errorf("%s: want %v, have %v", tc.addr, tc.want, have)
		}
	}
	for i, want := range []Stats{
		{Name: "level1", Entries: 2}, {Name: "drop", Entries: 1}, {Name: "drop_v4", Entries: 2}, {Name: "own", Entries: 7},
		{Name: "other", Entries: 3}, {Name: ".hidden", Entries: 1},
		{Name: "office", Entries: 2, Allow: true}, {Name: "partners", Entries: 2, Allow: true},
	} {
		have := l.Stats()[i]
		if have.Name != want.Name || have.Entries != want.Entries || have.Allow != want.Allow || have.Loaded.IsZero() {
			t.Errorf("stats %d: want %+v, have %+v", i, want, have)
		}
		if fi, err := os.Stat(have.File); err != nil || !fi.ModTime().Equal(have.Modified) {
			t.Errorf("stats %d: want the time of %s, have %v, %v", i, have.File, have.Modified, err)
		}
	}
}

func TestExplain(t *testing.T) {
	dir := t.TempDir()
	drop, own, office := filepath.Join(dir, "drop.txt"), filepath.Join(dir, "own"), filepath.Join(dir, "office")
	writeFile(t, drop, "198.51.96.0/20 ; SBL1\n198.51.100.0/24 ; SBL2\n")
	writeFile(t, own, "198.51.100.7 60 # a school\n203.0.113.9 60\n")
	writeFile(t, office, "203.0.113.0/24 # us\n")
	l, err := openLists(t, Options{Block: []File{scored(own), {Path: drop, Score: 5}}, Allow: []File{{Path: office}}})
	if err != nil {
		t.Fatal(err)
	}
	for addr, want := range map[string]string{
		"198.51.100.7":        "own 198.51.100.7/32 60 a school false; drop 198.51.100.0/24 5 SBL2 true; ",
		"::ffff:198.51.100.7": "own 198.51.100.7/32 60 a school false; drop 198.51.100.0/24 5 SBL2 true; ",
		"198.51.97.1":         "drop 198.51.96.0/20 5 SBL1 true; ",
		"203.0.113.9":         "own 203.0.113.9/32 60  false; office 203.0.113.0/24 100 us true; ",
		"192.0.2.1":           "",
	} {
		have := ""
		for _, m := range l.Explain(netip.MustParseAddr(addr)) {
			have += fmt.Sprintln(m.List, m.Prefix, m.Score, m.Note, m.Decided)
			if m.Loaded.IsZero() || m.Modified.IsZero() || m.Allow != (m.List == "office") {
				t.Errorf("%s: have %+v", addr, m)
			}
		}
		if have = strings.ReplaceAll(have, "\n", "; "); have != want {
			t.Errorf("%s: want %q, have %q", addr, want, have)
		}
	}
	if have := l.Explain(netip.Addr{}); have != nil {
		t.Errorf("zero Addr: want none, have %v", have)
	}
}

// What Explain says decided is what Lookup says.
func TestExplainAgreesWithLookup(t *testing.T) {
	dir := t.TempDir()
	var files []File
	for i, data := range []string{"192.0.2.0/24 9\n192.0.2.7 30\n", "192.0.2.0/25 20\n", "192.0.2.7 9\n192.0.2.64/26 9\n"} {
		files = append(files, scored(filepath.Join(dir, fmt.Sprint("list", i))))
		writeFile(t, files[i].Path, data)
	}
	allow := filepath.Join(dir, "allow")
	writeFile(t, allow, "192.0.2.96/27\n")
	l, err := openLists(t, Options{Block: files, Allow: []File{{Path: allow}}})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 256 {
		addr := netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})
		want, have := l.Lookup(addr), Verdict{Score: BestScore}
		for _, m := range l.Explain(addr) {
			if m.Decided {
				have = Verdict{Listed, m.Score, m.List}
				if m.Allow {
					have.State = Allowed
				}
			}
		}
		if want != have {
			t.Errorf("%v: want %v, have %v", addr, want, have)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	for _, tc := range []struct {
		name, data string
		allow      bool
		err        string // empty: accepted
	}{
		{"bad", "bad\n", false, "list.txt: 1 of 1 lines are bad, the first: list.txt:1: "},
		{"empty", "", false, "list.txt: empty"},
		{"blank", "\n \n", false, "list.txt: empty"},
		{"only comments", "# nothing\n; today\n\n", false, ""},
		{"only metadata", `{"type":"metadata","records":0}`, false, ""},
		{"empty array", "[]", false, ""},
		{"allow list", "192.0.2.1\n", true, ""},
		{"empty allow list", "", true, "empty"},
		{"allow list with numbers", "192.0.2.1 30\n", true, ""},
		{"allow list with scores", "# spoa: column=score\n192.0.2.1 30\n", true, "a score on an allow list"},
		{"allow list of all", "0.0.0.0/0\n", true, "wider"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Chdir(t.TempDir())
			writeFile(t, "list.txt", tc.data)
			o := Options{Block: []File{{Path: "list.txt"}}}
			if tc.allow {
				o = Options{Allow: []File{{Path: "list.txt"}}}
			}
			_, err := openLists(t, o)
			if tc.err == "" && err != nil {
				t.Errorf("want none, have %v", err)
			}
			if tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)) {
				t.Errorf("want %q, have %v", tc.err, err)
			}
		})
	}
	absent := filepath.Join(t.TempDir(), "absent")
	if _, err := openLists(t, Options{Block: []File{{Path: absent}}}); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), absent) {
		t.Errorf("want %v of %s, have %v", os.ErrNotExist, absent, err)
	}
	_, err := openLists(t, Options{Block: []File{{Path: os.DevNull}, {Path: absent}}})
	if err == nil || !strings.Contains(err.Error(), os.DevNull+": neither a file nor a pipe") || !strings.Contains(err.Error(), absent) {
		t.Errorf("want an error that names both, have %v", err)
	}
}

func TestLog(t *testing.T) {
	good := strings.Repeat("192.0.2.1\n", 1000)
	for _, tc := range []struct {
		name, data, options string
		allow               bool
		want                []string // with how often, behind a space
		not                 []string
	}{
		{"good", good, "", false, []string{`level=info list=list msg="list loaded" 1`, "entries=1 bad=0 1"}, []string{"level=warn"}},
		{"bad lines", "bad\n" + good + strings.Repeat("bad\n", 7), "", false,
			[]string{`msg="bad line" 5`, "list.txt:1: 1", "list.txt:1005: 1", `msg="more bad lines" 1`, "count=3 1", "bad=8 1"},
			[]string{"list.txt:1006: "}},
		{"five bad lines", good + strings.Repeat("bad\n", 5), "", false, []string{`msg="bad line" 5`}, []string{"more bad lines"}},
		{"records", dropJSON, "", false, nil, []string{"level=warn"}},
		{"records with duplicate", `{"cidr":"1.19.0.0/16"}` + "\n" + `{"cidr":"1.19.0.0/16"}` + "\n" + `{"type":"metadata","records":2}`, "", false,
			[]string{"entries=1 1"}, []string{"level=warn"}},
		{"records of two files in one", dropJSON + dropJSON, "", false, nil, []string{"level=warn"}},
		{"records missing", strings.SplitN(dropJSON, "\n", 2)[1], ",accept=cut", false, []string{"1 records of the 2 1", "by accept=cut 1"}, nil},
		{"records too many", `{"cidr":"1.19.0.0/16"}` + "\n" + dropJSON, "", false, []string{"3 entries, more than the 2 1"}, nil},
		{"no records", `{"cidr":"1.19.0.0/16"}` + "\n" + `{"type":"metadata"}`, "", false, nil, []string{"level=warn"}},
		{"none of no records", "192.0.2.1\n" + `{"type":"metadata","records":0}`, "", false, nil, []string{"level=warn"}},
		{"entries", firehol + "192.0.2.1\n", "", false, []string{"3 entries, more than the 2 1"}, nil},
		{"numbers", "# x\n198.51.100.7\t10\n203.0.113.9\t3\n", "=5", false,
			[]string{"(2, the first in line 2) are not used, each address scores 5 1", "# spoa: column=KIND 1", "badness 1"}, nil},
		{"numbers to ignore", "198.51.100.7\t10\n", ",column=ignore", false, nil, []string{"level=warn"}},
		{"counts", "198.51.100.7\t10\n203.0.113.9\t3\n", ",column=count>=4", false, []string{"entries=1 1"}, []string{"level=warn"}},
		{"counts too low", "198.51.100.7\t10\n203.0.113.9\t3\n", ",column=count>=40", false, []string{"none of 2 reaches count>=40 1"}, nil},
		{"no scores", "198.51.100.7\n", ",column=score", false, []string{"no address has a number behind it 1"}, nil},
		{"DShield", "198.51.100.0\t198.51.100.255\t24\t3021\tX\n", "", false, nil, []string{"level=warn"}},
		{"nothing", "# nothing today\n", "", false, []string{"no entries, a list of nothing 1"}, []string{"it had"}},
		{"all of IPv4", "0.0.0.0/0\n", ",accept=wide", false, []string{"msg=\"list.txt:1: 0.0.0.0/0 is wider 1", "by accept=wide 1", "-allow 1"}, nil},
		{"bogons", "10.0.0.0/8\n127.0.0.1\n172.16.0.0/16\n192.168.0.0/16\n::1\nfc00::/8\n", "", false, []string{"-allow 1"}, nil},
		{"private v6", "fd00::/8\n", "", false, []string{"-allow 1"}, nil},
		{"neighbours", "11.0.0.0/8\n128.0.0.0/8\n172.32.0.0/16\n192.169.0.0/16\n::2\nfe00::/9\n", "", false, nil, []string{"-allow"}},
		{"bogons and allow list", "10.0.0.0/8\n", "", true, nil, []string{"-allow"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Chdir(t.TempDir())
			writeFile(t, "list.txt", tc.data)
			writeFile(t, "allow.txt", "10.1.0.0/16\n")
			var files Files
			if err := files.Set("list.txt" + tc.options); err != nil {
				t.Fatal(err)
			}
			var buf logBuffer
			o := Options{Logger: log.NewLogfmtLogger(&buf), Block: files}
			if tc.allow {
				o.Allow = []File{{Path: "allow.txt"}}
			}
			l, err := openLists(t, o)
			if err != nil {
				t.Fatal(err)
			}
			for _, want := range tc.want {
				i := strings.LastIndexByte(want, ' ')
				if have := fmt.Sprint(strings.Count(buf.String(), want[:i])); have != want[i+1:] {
					t.Errorf("want %s times %s, have %s in\n%s", want[i+1:], want[:i], have, &buf)
				}
			}
			for _, not := range tc.not {
				if strings.Contains(buf.String(), not) {
					t.Errorf("want no %q, have\n%s", not, &buf)
				}
			}
			for _, w := range l.Stats()[0].Warnings { // as -check shows them
				if !strings.Contains(buf.String(), strings.ReplaceAll(w, `"`, `\"`)) {
					t.Errorf("want %q in the log, have\n%s", w, &buf)
				}
			}
		})
	}
}

// Whoever has seen the log counts on what it says.
func TestLoadedIsInForce(t *testing.T) {
	file := filepath.Join(t.TempDir(), "list")
	var l *Lists
	var have []int
	logger := log.LoggerFunc(func(keyvals ...any) error {
		if l != nil && slices.Contains(keyvals, any("list loaded")) {
			have = append(have, score(l, "192.0.2.1"), l.Stats()[0].Entries)
		}
		return nil
	})
	writeFile(t, file, "192.0.2.1 5\n")
	first, err := openLists(t, Options{Logger: logger, Block: []File{scored(file)}})
	if err != nil {
		t.Fatal(err)
	}
	l = first
	writeFile(t, file, "192.0.2.1 77\n192.0.2.2 77\n")
	if err := l.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	if want := []int{77, 2}; !slices.Equal(want, have) {
		t.Errorf("want score and entries %v, have %v", want, have)
	}
}

func TestReload(t *testing.T) {
	dir := t.TempDir()
	a, b, allow := filepath.Join(dir, "a"), filepath.Join(dir, "b"), filepath.Join(dir, "allow")
	writeFile(t, a, "192.0.2.1 10\n")
	writeFile(t, b, "192.0.2.2 20\n")
	writeFile(t, allow, "192.0.2.3\n")
	var buf logBuffer
	l, err := openLists(t, Options{Logger: log.NewLogfmtLogger(&buf), Block: []File{scored(a), scored(b)}, Allow: []File{{Path: allow}}})
	if err != nil {
		t.Fatal(err)
	}
	var told []string
	l.onReload = func(list string, ok bool) {
		told = append(told, fmt.Sprint(list, " ", ok))
		l.Stats() // no lock is held
		l.Lookup(netip.Addr{})
	}
	check := func(scores ...int) {
		t.Helper()
		for i, want := range scores {
			addr := fmt.Sprint("192.0.2.", i+1)
			if have := score(l, addr); want != have {
				t.Errorf("%v: want %d, have %d", addr, want, have)
			}
		}
	}
	check(10, 20, 100)
	before := l.Stats()

	for _, bad := range []string{"", "bad\n", "remove"} {
		writeFile(t, a, "192.0.2.1 11\n192.0.2.3 12\n")
		writeFile(t, b, bad)
		if bad == "remove" {
			if err := os.Remove(b); err != nil {
				t.Fatal(err)
			}
		}
		buf.Reset()
		told = nil
		if err := l.Reload(t.Context()); err == nil || !strings.Contains(err.Error(), b) || strings.Contains(err.Error(), a+":") {
			t.Errorf("%q: want an error naming %s only, have %v", bad, b, err)
		}
		if want, have := "[a true b false allow true]", fmt.Sprint(told); want != have {
			t.Errorf("%q: want %s, have %s", bad, want, have)
		}
		if want := `level=error msg="list not reloaded, previous content stays in force" list=b`; strings.Count(buf.String(), want) != 1 {
			t.Errorf("%q: want one %s, have\n%s", bad, want, &buf)
		}
		check(11, 20, 100)
	}
	after := l.Stats()
	if after[0].Entries != 2 || after[0].Reloads != 3 || after[0].Failures != 0 || !after[0].Loaded.After(before[0].Loaded) {
		t.Errorf("want 3 reloads of a, have %+v", after[0])
	}
	want := before[1]
	want.Failures, want.Refused = 3, map[Reason]uint64{Empty: 1, Malformed: 1, Unreadable: 1}
	want.Problem = after[1].Problem
	if !reflect.DeepEqual(after[1], want) || !strings.Contains(want.Problem, "no such file") {
		t.Errorf("want %+v, have %+v", want, after[1])
	}

	writeFile(t, b, "192.0.2.2 21\n")
	writeFile(t, allow, "192.0.2.1\n")
	if err := l.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	check(100, 21, 12)
	if have := l.Stats()[1].Problem; have != "" {
		t.Errorf("want no problem any more, have %q", have)
	}

	writeFile(t, a, "192.0.2.1 10\n192.0.2.3 13\n")
	if err := os.Remove(allow); err != nil {
		t.Fatal(err)
	}
	if err := l.Reload(t.Context()); err == nil {
		t.Error("want an error without the allow list, have none")
	}
	check(100, 21, 13)
}

// A list that shrank is refused, one that is empty by intention is not, and
// neither is a small one, or one whose flag accepts it.
func TestShrunk(t *testing.T) {
	lines := func(n int) (s string) {
		for i := range n {
			s += fmt.Sprintf("192.0.2.%d\n", i)
		}
		return s
	}
	for _, tc := range []struct {
		before, after string
		accept        Accept
		want          int // entries then
		reason        Reason
	}{
		{lines(100), lines(49), 0, 100, Shrunk},
		{lines(100), lines(50), 0, 50, ""},
		{lines(100), lines(49), AcceptShrunk, 49, ""},
		{lines(100), "# none\n", 0, 0, ""},
		{lines(100), "", 0, 100, Empty},
		{lines(100), "<html>\n", 0, 100, Malformed},
		{lines(100), "0.0.0.0/0\n" + lines(100), 0, 100, Wide},
		{lines(100), lines(100) + "192.0.2.0/2", 0, 100, Cut},
		{lines(9), lines(1), 0, 1, ""},
		{lines(10), lines(4), 0, 10, Shrunk},
		{"# none\n", lines(100), 0, 100, ""},
	} {
		path := filepath.Join(t.TempDir(), "list")
		writeFile(t, path, tc.before)
		l, err := openLists(t, Options{Block: []File{{Path: path, Accept: tc.accept}}})
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, path, tc.after)
		err = l.Reload(t.Context())
		if (err != nil) != (tc.reason != "") || err != nil && reasonOf(err) != tc.reason {
			t.Errorf("%.30q: want reason %q, have %v", tc.after, tc.reason, err)
		}
		s := l.Stats()[0]
		if s.Entries != tc.want || tc.reason != "" && s.Refused[tc.reason] != 1 || (s.Problem != "") != (tc.reason != "") {
			t.Errorf("%.30q: want %d entries, have %+v", tc.after, tc.want, s)
		}
		if tc.accept != 0 && len(s.Warnings) != 1 {
			t.Errorf("%.30q: want a warning, have %v", tc.after, s.Warnings)
		}
		if want := 100; tc.want == 0 && score(l, "192.0.2.1") != want {
			t.Errorf("%.30q: want nothing of it in force, have %d", tc.after, score(l, "192.0.2.1"))
		}
	}
}

// A lookup sees one state of all files or the other, never a mixture, and goes on during reloads.
func TestReloadAtOnce(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "list")
	states := []string{"192.0.2.0/24 10\n192.0.2.1 11\n", "192.0.2.0/24 20\n192.0.2.1 21\n"}
	writeFile(t, path, states[0])
	l, err := openLists(t, Options{Block: []File{scored(path)}})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			addr := netip.MustParseAddr("192.0.2.1")
			for {
				if v := l.Lookup(addr); (v.Score != 11 && v.Score != 21) || v.List != "list" {
					t.Errorf("want 11 or 21 of list, have %v", v)
					return
				}
				l.Stats()
				l.Explain(addr)
				select {
				case <-done:
					return
				default:
				}
			}
		})
	}
	for i := range 100 {
		writeFile(t, path, states[i%2])
		if err := l.Reload(t.Context()); err != nil {
			t.Error(err)
		}
	}
	close(done)
	wg.Wait()
}

// openLists opens lists whose files need no time to settle.
func openLists(t *testing.T, o Options) (*Lists, error) {
	o.settle, o.pause = time.Nanosecond, time.Millisecond
	return Open(t.Context(), o)
}

func openTest(t *testing.T, data string) *Lists {
	t.Helper()
	path := filepath.Join(t.TempDir(), "list")
	writeFile(t, path, data)
	l, err := openLists(t, Options{Block: []File{scored(path)}})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func writeFile(tb testing.TB, path, data string) {
	tb.Helper()
	if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
		tb.Fatal(err)
	}
}

// logBuffer takes what several goroutines log.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *logBuffer) Reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b.Reset()
}
