package lists

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/go-kit/log"
)

func TestListFiles(t *testing.T) {
	dir := t.TempDir()
	odd := filepath.Join(dir, "a=abc")
	writeFile(t, odd, "192.0.2.1\n")
	writeFile(t, filepath.Join(dir, "b=7"), "192.0.2.1\n")
	writeFile(t, filepath.Join(dir, "c=-1"), "192.0.2.1\n")
	for _, tc := range []struct {
		in   string
		want File
		fail bool
	}{
		{in: "drop.txt", want: File{"drop.txt", 0}},
		{in: "drop.txt=0", want: File{"drop.txt", 0}},
		{in: "drop.txt=100", want: File{"drop.txt", 100}},
		{in: "a=b=30", want: File{"a=b", 30}},
		{in: odd, want: File{odd, 0}},
		{in: odd + "=5", want: File{odd, 5}},
		{in: dir + "/b=7", want: File{dir + "/b", 7}},
		{in: dir + "/b=7=8", want: File{dir + "/b=7", 8}},
		{in: dir + "/absent=abc", fail: true},
		{in: "drop.txt=", fail: true},
		{in: "drop.txt=101", fail: true},
		{in: "drop.txt=256", fail: true},
		{in: "drop.txt=-1", fail: true},
		{in: "drop.txt=+1", fail: true},
		{in: "drop.txt=1.5", fail: true},
		{in: dir + "/c=-1", fail: true}, // though there is such a file
		{in: "=5", fail: true},
		{in: "", fail: true},
	} {
		var have Files
		err := have.Set(tc.in)
		if tc.fail {
			if err == nil || !strings.Contains(err.Error(), "want FILE or FILE=SCORE") {
				t.Errorf("%q: want the right form in the error, have %v", tc.in, err)
			}
			if len(have) > 0 {
				t.Errorf("%q: want nothing, have %v", tc.in, have)
			}
			continue
		}
		if err != nil || len(have) != 1 || have[0] != tc.want {
			t.Errorf("%q: want %v, have %v, %v", tc.in, tc.want, have, err)
		}
	}
	var f Files
	for _, s := range []string{"a", "b=5"} {
		if err := f.Set(s); err != nil {
			t.Fatal(err)
		}
	}
	if want, have := "a=0,b=5", f.String(); want != have {
		t.Errorf("want %q, have %q", want, have)
	}
}

func TestParseLine(t *testing.T) {
	for _, tc := range []struct {
		line   string
		prefix string // empty: none
		score  int
		err    string
	}{
		{"192.0.2.1", "192.0.2.1/32", -1, ""},
		{"192.0.2.0/24", "192.0.2.0/24", -1, ""},
		{"192.0.2.0/24 30", "192.0.2.0/24", 30, ""},
		{"\t192.0.2.0/24 \t 0 # why", "192.0.2.0/24", 0, ""},
		{"192.0.2.0/24#30", "192.0.2.0/24", -1, ""},
		{"192.0.2.1\r", "192.0.2.1/32", -1, ""},
		{"31.13.0.77/16", "31.13.0.0/16", -1, ""},
		{"0.0.0.0/0", "0.0.0.0/0", -1, ""},
		{"2001:db8::1", "2001:db8::1/128", -1, ""},
		{"2001:DB8:ffff::/32 100", "2001:db8::/32", 100, ""},
		{"::/0", "::/0", -1, ""},
		{"::ffff:192.0.2.1", "192.0.2.1/32", -1, ""},
		{"::ffff:192.0.2.1/120", "192.0.2.0/24", -1, ""},
		{"::ffff:192.0.2.1/96", "0.0.0.0/0", -1, ""},
		{"1.10.16.0/20 ; SBL256894", "1.10.16.0/20", -1, ""},
		{`{"cidr":"1.10.16.0/20","sblid":"SBL256894","rir":"apnic"}`, "1.10.16.0/20", -1, ""},
		{`{"cidr":"2a06:e480::1/29","sblid":"SBL301771","rir":"ripencc"}` + "\r", "2a06:e480::/29", -1, ""},
		{"\ufeff192.0.2.1", "192.0.2.1/32", -1, ""},
		{"", "", -1, ""},
		{" \t\r", "", -1, ""},
		{"# Category : attacks", "", -1, ""},
		{"; Last-Modified: Tue, 30 Aug 2016 05:17:00 GMT", "", -1, ""},
		{`{"type":"metadata","timestamp":1700000000}`, "", -1, ""},
		{"fe80::1%eth0", "", -1, "zone"},
		{"fe80::%eth0/10", "", -1, "neither"},
		{"::ffff:192.0.2.1/95", "", -1, "shorter than /96"},
		{"192.0.2.0/33", "", -1, "neither"},
		{"192.0.2.0/", "", -1, "neither"},
		{"192.0.2", "", -1, "neither"},
		{"192.0.2.1-192.0.2.9", "", -1, "neither"},
		{"example.com", "", -1, "neither"},
		{"192.0.2.1 101", "", -1, "0 to 100"},
		{"192.0.2.1 -1", "", -1, "0 to 100"},
		{"192.0.2.1 1.5", "", -1, "0 to 100"},
		{"192.0.2.1 30 40", "", -1, "0 to 100"},
		{"192.0.2.1 bad", "", -1, "0 to 100"},
		{`{"cidr":"1.10.16.0/20"`, "", -1, "JSON"},
		{`{"asn":4134,"rir":"apnic"}`, "", -1, "without cidr"},
		{`{"cidr":"1.10.16.0/40"}`, "", -1, "neither"},
	} {
		have, err := parseLine(tc.line)
		if tc.err != "" {
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%q: want error with %q, have %v", tc.line, tc.err, err)
			}
			continue
		}
		prefix := ""
		if have.prefix.IsValid() {
			prefix = have.prefix.String()
		}
		if err != nil || prefix != tc.prefix || have.score != tc.score {
			t.Errorf("%q: want %q %d, have %q %d, %v", tc.line, tc.prefix, tc.score, prefix, have.score, err)
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

func TestLookup(t *testing.T) {
	dir := t.TempDir()
	file := func(name, data string) string {
		path := filepath.Join(dir, name)
		writeFile(t, path, data)
		return path
	}
	l, err := Open(log.NewNopLogger(), []File{
		{file("level1.netset", firehol), 0},
		{file("drop.txt", dropText), 10},
		{file("drop_v4.json", dropJSON), 20},
		{file("own", "192.0.2.0/24 60\n192.0.2.128/25 80\n192.0.2.200 40\n192.0.2.201\n192.0.2.202 100\n2001:db8::/32 70\n"+
			"198.18.0.0/15 50\n198.18.0.0/15 30\n198.18.0.0/15 50\n"), 90},
		{file("other", "192.0.2.0/24 59\n192.0.2.128/25 81\n192.0.2.200 40\n"), 0},
		{file(".hidden", "100.64.0.0/10\n"), 1},
	}, []string{
		file("office.txt", "203.0.113.0/28\n2001:db8:1::/48\n"),
		file("partners", "198.51.100.7\n198.51.100.0/25\n"),
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		addr  string
		score int
		list  string // empty: not listed
	}{
		{"198.51.100.200", 0, "level1"},
		{"1.10.31.255", 10, "drop"},
		{"1.19.3.4", 20, "drop_v4"},
		{"2a06:e487::1", 20, "drop_v4"},
		{"100.64.1.1", 1, ".hidden"},
		{"192.0.2.1", 59, "other"},    // the lowest of two for the same prefix
		{"192.0.2.129", 80, "own"},    // either way round
		{"192.0.2.200", 40, "own"},    // the first of equals
		{"192.0.2.201", 90, "own"},    // the file's, in a file of scores, and a longer prefix that is better
		{"192.0.2.202", 100, "own"},   // listed as good
		{"198.19.255.255", 30, "own"}, // the lowest of duplicates
		{"2001:db8:2::1", 70, "own"},
		{"::ffff:192.0.2.1", 59, "other"},
		{"2001:db8:2::1%eth0", 70, "own"},
		{"8.8.8.8", 100, ""},
		{"2001:4860::8888", 100, ""},
		{"203.0.113.9", 100, ""},  // allowed by a shorter prefix
		{"198.51.100.7", 100, ""}, // by the second list
		{"198.51.100.1", 100, ""},
		{"::ffff:203.0.113.9", 100, ""},
		{"2001:db8:1::1", 100, ""},
	} {
		score, list, listed := l.Lookup(netip.MustParseAddr(tc.addr))
		if score != tc.score || list != tc.list || listed != (tc.list != "") {
			t.Errorf("%s: want %d %q, have %d %q %v", tc.addr, tc.score, tc.list, score, list, listed)
		}
	}
	if score, list, listed := l.Lookup(netip.Addr{}); score != 100 || list != "" || listed {
		t.Errorf("zero Addr: want 100, have %d %q %v", score, list, listed)
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

func TestLookupAllocs(t *testing.T) {
	l := openTest(t, log.NewNopLogger(), "192.0.2.0/24\n2001:db8::/32\n")
	addrs := []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("::ffff:8.8.8.8")}
	if have := testing.AllocsPerRun(100, func() {
		for _, a := range addrs {
			l.Lookup(a)
		}
	}); have != 0 {
		t.Errorf("want no allocation, have %v", have)
	}
}

func TestNewListsRefuses(t *testing.T) {
	many := strings.Repeat("192.0.2.1\n", 98)
	for _, tc := range []struct {
		name, data string
		allow      bool
		err        string // empty: accepted
	}{
		{"one of a hundred bad", many + "192.0.2.2\nbad\n", false, ""},
		{"one of 99 bad", many + "bad\n", false, "list.txt: 1 of 99 lines are bad, the first: list.txt:99: "},
		{"comments are no lines", strings.Repeat("# x\n\n", 100) + many + "bad\n", false, "1 of 99 lines"},
		{"html", "<html>\n<body>\n", false, "2 of 2 lines"},
		{"empty", "", false, "no entries"},
		{"only comments", "# nothing\n; today\n\n", false, "no entries"},
		{"only metadata", `{"type":"metadata","records":0}`, false, "no entries"},
		{"long line", "192.0.2.1\n" + strings.Repeat("x", 1<<17), false, "list.txt:2: "},
		{"allow list", "192.0.2.1\n", true, ""},
		{"empty allow list", "", true, "no entries"},
		{"allow list with scores", "192.0.2.1 30\n", true, "a score on an allow list"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Chdir(t.TempDir())
			writeFile(t, "list.txt", tc.data)
			var err error
			if tc.allow {
				_, err = Open(log.NewNopLogger(), nil, []string{"list.txt"})
			} else {
				_, err = Open(log.NewNopLogger(), []File{{"list.txt", 0}}, nil)
			}
			if tc.err == "" && err != nil {
				t.Errorf("want none, have %v", err)
			}
			if tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)) {
				t.Errorf("want %q, have %v", tc.err, err)
			}
		})
	}
	absent := filepath.Join(t.TempDir(), "absent")
	for _, path := range []string{absent, t.TempDir()} {
		if _, err := Open(log.NewNopLogger(), []File{{path, 0}}, nil); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: want an error naming it, have %v", path, err)
		}
	}
	_, err := Open(log.NewNopLogger(), []File{{os.DevNull, 0}}, nil)
	if err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("%s: want an error saying what it is, have %v", os.DevNull, err)
	}
	if _, err := Open(log.NewNopLogger(), []File{{absent, 0}}, nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("want %v, have %v", os.ErrNotExist, err)
	}
}

func TestLog(t *testing.T) {
	good := strings.Repeat("192.0.2.1\n", 1000)
	for _, tc := range []struct {
		name, data string
		allow      bool
		want       []string // with how often, behind a space
		not        []string
	}{
		{"good", good, false, []string{`level=info list=list msg="list loaded" 1`, "entries=1 bad=0 1"}, []string{"level=warn"}},
		{"bad lines", "bad\n" + good + strings.Repeat("bad\n", 7), false,
			[]string{`msg="bad line" 5`, "list.txt:1: 1", "list.txt:1005: 1", `msg="more bad lines" 1`, "count=3 1", "bad=8 1"},
			[]string{"list.txt:1006: "}},
		{"five bad lines", good + strings.Repeat("bad\n", 5), false, []string{`msg="bad line" 5`}, []string{"more bad lines"}},
		{"records", dropJSON, false, nil, []string{"metadata"}},
		{"records with duplicate", `{"cidr":"1.19.0.0/16"}` + "\n" + `{"cidr":"1.19.0.0/16"}` + "\n" + `{"type":"metadata","records":2}`, false,
			[]string{"entries=1 1"}, []string{"metadata"}},
		{"records of two files in one", dropJSON + dropJSON, false, nil, []string{"metadata"}},
		{"records missing", strings.SplitN(dropJSON, "\n", 2)[1], false, []string{"differs from metadata 1", "want=2 have=1 1"}, nil},
		{"no records", `{"cidr":"1.19.0.0/16"}` + "\n" + `{"type":"metadata"}`, false, nil, []string{"metadata"}},
		{"none of no records", "192.0.2.1\n" + `{"type":"metadata","records":0}`, false, nil, []string{"metadata"}},
		{"bogons", "10.0.0.0/8\n127.0.0.1\n172.16.0.0/16\n192.168.0.0/16\n::1\nfc00::/8\n", false, []string{"-allow 1"}, nil},
		{"private v6", "fd00::/8", false, []string{"-allow 1"}, nil},
		{"all of IPv4", "0.0.0.0/0", false, []string{"-allow 1"}, nil},
		{"neighbours", "11.0.0.0/8\n128.0.0.0/8\n172.32.0.0/16\n192.169.0.0/16\n::2\nfe00::/9\n", false, nil, []string{"-allow"}},
		{"bogons and allow list", "10.0.0.0/8\n", true, nil, []string{"-allow"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Chdir(t.TempDir())
			writeFile(t, "list.txt", tc.data)
			writeFile(t, "allow.txt", "10.1.0.0/16\n")
			var allow []string
			if tc.allow {
				allow = []string{"allow.txt"}
			}
			var buf bytes.Buffer
			if _, err := Open(log.NewLogfmtLogger(&buf), []File{{"list.txt", 0}}, allow); err != nil {
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
		})
	}
}

// Whoever has seen the log counts on what it says.
func TestLoadedIsInForce(t *testing.T) {
	file := filepath.Join(t.TempDir(), "list")
	addr := netip.MustParseAddr("192.0.2.1")
	var l *Lists
	var have []int
	logger := log.LoggerFunc(func(keyvals ...any) error {
		if l != nil && slices.Contains(keyvals, any("list loaded")) {
			score, _, _ := l.Lookup(addr)
			have = append(have, score, l.Stats()[0].Entries)
		}
		return nil
	})
	writeFile(t, file, "192.0.2.1 5\n")
	first, err := Open(logger, []File{{file, 0}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	l = first
	writeFile(t, file, "192.0.2.1 77\n192.0.2.2 77\n")
	if err := l.Reload(); err != nil {
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
	var buf bytes.Buffer
	l, err := Open(log.NewLogfmtLogger(&buf), []File{{a, 0}, {b, 0}}, []string{allow})
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
			addr := netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)})
			if have, _, _ := l.Lookup(addr); want != have {
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
		if err := l.Reload(); err == nil || !strings.Contains(err.Error(), b) || strings.Contains(err.Error(), a+":") {
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
	want.Failures = 3
	if after[1] != want {
		t.Errorf("want %+v, have %+v", want, after[1])
	}

	writeFile(t, b, "192.0.2.2 21\n")
	writeFile(t, allow, "192.0.2.1\n")
	if err := l.Reload(); err != nil {
		t.Fatal(err)
	}
	check(100, 21, 12)

	writeFile(t, a, "192.0.2.1 10\n192.0.2.3 13\n")
	if err := os.Remove(allow); err != nil {
		t.Fatal(err)
	}
	if err := l.Reload(); err == nil {
		t.Error("want an error without the allow list, have none")
	}
	check(100, 21, 13)
}

// A lookup sees one state of all files or the other, never a mixture, and goes on during reloads.
func TestReloadAtOnce(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "list")
	states := []string{"192.0.2.0/24 10\n192.0.2.1 11\n", "192.0.2.0/24 20\n192.0.2.1 21\n"}
	writeFile(t, path, states[0])
	l, err := Open(log.NewNopLogger(), []File{{path, 0}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			addr := netip.MustParseAddr("192.0.2.1")
			for {
				if score, list, _ := l.Lookup(addr); (score != 11 && score != 21) || list != "list" {
					t.Errorf("want 11 or 21 of list, have %d of %q", score, list)
					return
				}
				l.Stats()
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
		if err := l.Reload(); err != nil {
			t.Error(err)
		}
	}
	close(done)
	wg.Wait()
}

func TestWatchRename(t *testing.T) {
	l := openTest(t, log.NewNopLogger(), "192.0.2.1 0\n")
	path := l.sources[0].Path
	replace := func(data string) {
		writeFile(t, path+".new", data)
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	testWatch(t, l, func(score int) { replace(fmt.Sprintf("192.0.2.1 %d\n", score)) })
}

func TestWatchWrite(t *testing.T) {
	l := openTest(t, log.NewNopLogger(), "192.0.2.1 0\n")
	testWatch(t, l, func(score int) {
		writeFile(t, l.sources[0].Path, fmt.Sprintf("192.0.2.1 %d%s\n", score, strings.Repeat(" ", score)))
	})
}

// A Kubernetes volume has list -> ..data/list and ..data -> ..version, and only ..data is ever replaced.
func TestWatchSymlinkSwap(t *testing.T) {
	dir := t.TempDir()
	swap := func(score int) {
		version := fmt.Sprintf("..%d", score)
		if err := os.Mkdir(filepath.Join(dir, version), 0o755); err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, version, "list"), fmt.Sprintf("192.0.2.1 %d\n", score))
		if err := os.Symlink(version, filepath.Join(dir, "..data_tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	swap(0)
	path := filepath.Join(dir, "list")
	if err := os.Symlink("..data/list", path); err != nil {
		t.Fatal(err)
	}
	l, err := Open(log.NewNopLogger(), []File{{path, 0}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	testWatch(t, l, swap)
}

// testWatch has change give 192.0.2.1 one score after the other. After the first one Watch is sure to be under way,
// and with no poll only an event can tell it of the others.
func testWatch(t *testing.T, l *Lists, change func(score int)) {
	t.Helper()
	told := make(chan bool, 10)
	l.onReload = func(_ string, ok bool) { told <- ok }
	l.poll, l.settle = time.Hour, time.Millisecond
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- l.Watch(ctx) }()
	for want := 1; want <= 3; want++ {
		change(want)
		timeout := time.After(10 * time.Second)
		for have := -1; have != want; have, _, _ = l.Lookup(netip.MustParseAddr("192.0.2.1")) {
			select {
			case <-told:
			case <-timeout:
				t.Fatalf("want score %d, have %d", want, have)
			}
		}
	}
	cancel()
	select {
	case err := <-done:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("want %v, have %v", context.Canceled, err)
		}
	case <-time.After(10 * time.Second):
		t.Error("want Watch to end with its context")
	}
}

// watchBubble runs watch in a synctest bubble, where time passes only when nothing else is to be done. What f gets
// last waits and returns the reloads since.
func watchBubble(t *testing.T, l *Lists, f func(events chan<- fsnotify.Event, errs chan<- error, wait func(time.Duration) []string)) {
	told := make(chan string, 100)
	l.onReload = func(list string, ok bool) { told <- fmt.Sprint(list, " ", ok) }
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		events, errs, done := make(chan fsnotify.Event), make(chan error), make(chan struct{})
		go func() {
			defer close(done)
			_ = l.watch(ctx, events, errs)
		}()
		synctest.Wait()
		f(events, errs, func(d time.Duration) (reloads []string) {
			<-time.After(d)
			synctest.Wait()
			for len(told) > 0 {
				reloads = append(reloads, <-told)
			}
			return reloads
		})
		cancel()
		<-done
	})
}

func TestWatchSettles(t *testing.T) {
	l := openTest(t, log.NewNopLogger(), "192.0.2.1 5\n")
	path := l.sources[0].Path
	l.poll = time.Hour
	watchBubble(t, l, func(events chan<- fsnotify.Event, errs chan<- error, wait func(time.Duration) []string) {
		wait(time.Second)
		for i := range 20 { // a file written bit by bit, with pauses
			writeFile(t, path, "192.0.2.1 6\n"+strings.Repeat("192.0.2.2\n", i))
			for range 10 {
				events <- fsnotify.Event{Name: path, Op: fsnotify.Write}
			}
			if have := wait(40 * time.Millisecond); len(have) != 0 {
				t.Errorf("want no reload of a file being written, have %v", have)
			}
		}
		if have := wait(time.Second); len(have) != 1 {
			t.Errorf("want one reload, have %v", have)
		}
		for range 100 { // others come and go in the same directory
			events <- fsnotify.Event{Name: path + ".log", Op: fsnotify.Write}
			if have := wait(30 * time.Millisecond); len(have) != 0 {
				t.Errorf("want no reload of an unchanged file, have %v", have)
			}
		}
		writeFile(t, path, "192.0.2.1 77\n")
		errs <- fsnotify.ErrEventOverflow
		if have := wait(time.Second); len(have) != 1 {
			t.Errorf("want a reload after lost events, have %v", have)
		}
	})
	if have, _, _ := l.Lookup(netip.MustParseAddr("192.0.2.1")); have != 77 {
		t.Errorf("want 77, have %d", have)
	}
}

func TestWatchPolls(t *testing.T) {
	dir := t.TempDir()
	path, other := filepath.Join(dir, "list"), filepath.Join(dir, "other")
	writeFile(t, path, "192.0.2.1 5\n")
	writeFile(t, other, "192.0.2.2 7\n")
	l, err := Open(log.NewNopLogger(), []File{{path, 0}, {other, 0}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	watchBubble(t, l, func(_ chan<- fsnotify.Event, _ chan<- error, wait func(time.Duration) []string) {
		for _, tc := range []struct {
			data string // empty: the file is removed
			want string
			ok   int
		}{
			{"192.0.2.1 6 # longer\n", "[list true]", 6},
			{"192.0.2.1 bad\n", "[list false]", 6}, // and not again by every poll
			{"192.0.2.1 8 # and back\n", "[list true]", 8},
			{"", "[list false]", 8},
			{"192.0.2.1 9\n", "[list true]", 9},
		} {
			if tc.data == "" {
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
			} else {
				writeFile(t, path, tc.data)
			}
			if have := fmt.Sprint(wait(10 * l.poll)); have != tc.want {
				t.Errorf("%q: want %s, have %s", tc.data, tc.want, have)
			}
			if have, _, _ := l.Lookup(netip.MustParseAddr("192.0.2.1")); have != tc.ok {
				t.Errorf("%q: want %d, have %d", tc.data, tc.ok, have)
			}
		}
		writeFile(t, path, "192.0.2.1 4\n") // of the same size
		if err := os.Chtimes(path, time.Time{}, time.Unix(1e9, 0)); err != nil {
			t.Fatal(err)
		}
		if have := fmt.Sprint(wait(10 * l.poll)); have != "[list true]" {
			t.Errorf("want a file of another time read, have %s", have)
		}
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
		if have := fmt.Sprint(wait(10 * l.poll)); have != "[list true]" {
			t.Errorf("want a file read that may have become readable, have %s", have)
		}
		if have, _, _ := l.Lookup(netip.MustParseAddr("192.0.2.2")); have != 7 {
			t.Errorf("want the other list untouched, have %d", have)
		}
	})
}

func FuzzList(f *testing.F) {
	for _, s := range []string{
		firehol, dropText, dropJSON, "::ffff:192.0.2.1/97 3", "fe80::1%a", "31.13.0.77/16", "192.0.2.1 101", "{}", `{"cidr":"::ffff:1.2.3.4/96"}`,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		check := func(p netip.Prefix) {
			if !p.IsValid() || p != p.Masked() || p.Addr().Is4In6() || p.Addr().Zone() != "" {
				t.Errorf("%q: have %v", s, p)
			}
			if again, err := parseLine(p.String()); err != nil || again.prefix != p {
				t.Errorf("%q: want %v again, have %v, %v", s, p, again.prefix, err)
			}
		}
		rec, err := parseLine(s)
		if err == nil && rec.prefix.IsValid() {
			check(rec.prefix)
		}
		if rec.score < -1 || rec.score > BestScore || rec.promised < -1 {
			t.Errorf("%q: have %+v", s, rec)
		}
		c, err := parseList(strings.NewReader(s), "list", BestScore, false)
		for i, e := range c.entries {
			if check(e.prefix); e.score > BestScore {
				t.Errorf("%q: have score %d", s, e.score)
			}
			if err == nil && i > 0 && c.entries[i-1].prefix.Compare(e.prefix) >= 0 {
				t.Errorf("%q: have %v before %v", s, c.entries[i-1].prefix, e.prefix)
			}
		}
		if want := min(c.bad, maxReported); want != len(c.errs) {
			t.Errorf("%q: want %d reports of bad lines, have %d", s, want, len(c.errs))
		}
	})
}

// million writes a list of a million prefixes, a tenth of them IPv6 and most of the others single addresses.
func million(b *testing.B) (path string, addrs []netip.Addr) {
	r := rand.New(rand.NewPCG(1, 2))
	var buf bytes.Buffer
	for i := range 1_000_000 {
		var p netip.Prefix
		switch v := r.Uint32(); {
		case i%10 == 0:
			p = netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 1, byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)}), 48)
		case i%4 == 0:
			p = netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)}), 20+int(v%12)).Masked()
		default:
			p = netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)}), 32)
		}
		fmt.Fprintln(&buf, p)
		if len(addrs) < 1<<16 {
			addrs = append(addrs, p.Addr())
		}
	}
	path = filepath.Join(b.TempDir(), "million")
	writeFile(b, path, buf.String())
	return path, addrs
}

func BenchmarkLoad(b *testing.B) {
	path, _ := million(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Open(log.NewNopLogger(), []File{{path, 0}}, nil); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLookup(b *testing.B) {
	path, addrs := million(b)
	l, err := Open(log.NewNopLogger(), []File{{path, 0}}, nil)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		if _, _, ok := l.Lookup(addrs[i&(len(addrs)-1)]); !ok {
			b.Fatal(addrs[i&(len(addrs)-1)])
		}
		i++
	}
}

func openTest(t *testing.T, logger log.Logger, data string) *Lists {
	t.Helper()
	path := filepath.Join(t.TempDir(), "list")
	writeFile(t, path, data)
	l, err := Open(logger, []File{{path, 0}}, nil)
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
