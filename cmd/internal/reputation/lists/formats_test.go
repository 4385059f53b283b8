package lists

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

var update = flag.Bool("update", false, "write the golden files")

// options are those without which a file of testdata would not be read, or not so.
var options = map[string]string{
	"feodo.csv":      "",
	"abuseipdb.json": ",column=badness,field=abuseConfidenceScore",
}

// TestFormats reads each file of testdata and compares what is in it, or why it
// was refused, with testdata/golden.
func TestFormats(t *testing.T) {
	paths, err := filepath.Glob("testdata/*[.]*")
	if err != nil || len(paths) < 55 {
		t.Fatalf("want 55 files or more, have %d, %v", len(paths), err)
	}
	for _, path := range paths {
		t.Run(filepath.Base(path), func(t *testing.T) {
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			name := filepath.Base(path)
			have := dump(t, name, data)
			if refused := strings.HasPrefix(have, "refused"); refused != strings.HasPrefix(name, "refused-") {
				t.Errorf("want what the name says, have\n%s", have)
			}
			if *update {
				if err := os.WriteFile(filepath.Join("testdata/golden", name), []byte(have), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(filepath.Join("testdata/golden", name))
			if err != nil || string(want) != have {
				t.Errorf("want\n%s\nhave\n%s\n%v", want, have, err)
			}
		})
	}
}

func dump(t *testing.T, name string, data []byte) string {
	var files Files
	if err := files.Set(name + "=20" + options[name]); err != nil {
		t.Fatal(err)
	}
	c, err := parse(bytes.NewReader(data), files[0], false, name, int64(len(data)))
	slow, slowErr := parse(iotest.OneByteReader(bytes.NewReader(data)), files[0], false, name, 0)
	if fmt.Sprint(err) != fmt.Sprint(slowErr) || !slices.Equal(slices.Collect(c.set.all), slices.Collect(slow.set.all)) {
		t.Errorf("want the same of a slow reader, have %v in place of %v", slowErr, err)
	}
	var b strings.Builder
	if err != nil {
		fmt.Fprintf(&b, "refused as %s: %v\n", reasonOf(err), err)
		var r *refusal
		if !errors.As(err, &r) {
			t.Errorf("want a reason, have %v", err)
		}
		return b.String()
	}
	fmt.Fprintf(&b, "lines %d, bad %d, below %d, numbers %d, every %v\n", c.lines, c.bad, c.below, c.numbers, c.every)
	for e := range c.set.all {
		fmt.Fprintln(&b, e.prefix, e.score, c.set.notes.get(e.note))
	}
	return b.String()
}

// Case 19: a list on one line. JSON may have any length; addresses in a row are
// refused, and the error does not repeat them all.
func TestOneLine(t *testing.T) {
	var text, json, object strings.Builder
	json.WriteByte('[')
	object.WriteString(`{"data":[`)
	for i := range 8000 {
		if i > 0 {
			text.WriteByte(' ')
			json.WriteByte(',')
			object.WriteByte(',')
		}
		fmt.Fprintf(&text, "198.51.%d.%d", i/250, i%250)
		fmt.Fprintf(&json, `"198.51.%d.%d"`, i/250, i%250)
		fmt.Fprintf(&object, `{"ip":"198.51.%d.%d"}`, i/250, i%250)
	}
	json.WriteByte(']')
	object.WriteString("]}")
	for _, s := range []string{json.String(), object.String()} {
		if c, err := parse(strings.NewReader(s), File{}, false, "one.json", 0); err != nil || c.set.len() != 8000 {
			t.Errorf("%.20s: want 8000 entries, have %d, %v", s, c.set.len(), err)
		}
	}
	_, err := parse(strings.NewReader(text.String()), File{}, false, "one.txt", 0)
	if err == nil || !strings.Contains(err.Error(), "one.txt:1: two addresses on a line") || len(err.Error()) > 1000 {
		t.Errorf("want a short error of the line, have %.1000v", err)
	}
	long := "192.0.2.1\n" + strings.Repeat("x", maxLine+sniffed+1)
	if _, err := parse(strings.NewReader(long), File{}, false, "long.txt", 0); err == nil || !strings.Contains(err.Error(), "long.txt:2: a line of more than 16 MiB") {
		t.Errorf("want a short error of the line, have %.1000v", err)
	}
}

func TestBadLines(t *testing.T) {
	many := strings.Repeat("192.0.2.1\n", 98)
	for _, tc := range []struct{ name, data, err string }{
		{"one of a hundred", many + "192.0.2.2\nbad\n", ""},
		{"one of 99", many + "bad\n", "list:99: "},
		{"comments are no lines", strings.Repeat("# x\n\n", 100) + many + "bad\n", "1 of 99 lines"},
		{"CSV with a quote out of place", "ip,x\n" + strings.Repeat("192.0.2.1,\"a\"\n", 150) + "192.0.2.2,\"a\n" + strings.Repeat("192.0.2.3,a\n", 150), ""},
	} {
		c, err := parse(strings.NewReader(tc.data), File{}, false, "list", 0)
		if (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
			t.Errorf("%s: want %q, have %v", tc.name, tc.err, err)
		}
		if c.bad != 1 || len(c.errs) != 1 {
			t.Errorf("%s: want one bad line, have %d, %v", tc.name, c.bad, c.errs)
		}
		if tc.err == "" && c.set.len() != 2 {
			t.Errorf("%s: want 2 entries, have %d", tc.name, c.set.len())
		}
	}
}

// An accepted fault comes into force; a file that only looks like one always does.
func TestAccept(t *testing.T) {
	for _, tc := range []struct {
		file   string
		accept string
		length int
	}{
		{"refused-slash0.txt", "wide", 3},
		{"refused-half.txt", "wide", 1},
		{"refused-cut-length.txt", "cut+wide", 21},
		{"refused-cut-address.txt", "cut", 200},
		{"refused-cut-drop.json", "cut", 8},
		{"refused-cut.netset", "cut", 2},
	} {
		var files Files
		if err := files.Set("testdata/" + tc.file + ",accept=" + tc.accept); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(files[0].Path)
		if err != nil {
			t.Fatal(err)
		}
		c, err := parse(bytes.NewReader(data), files[0], false, tc.file, 0)
		if err != nil || c.set.len() != tc.length {
			t.Errorf("%s: want %d entries, have %d, %v", tc.file, tc.length, c.set.len(), err)
		}
	}
	for _, s := range []string{
		"192.0.2.1\n10.0.0.0/8", "192.0.2.0/24\n192.0.2.0/30", "224.0.0.0/3", "192.0.2.1\n224.0.0.0/3", "fe00::/9\nfc00::/7\n::/8",
		"192.0.2.1", "2001:db8::/32\n2001:db8::/16", "bad # but the only one\n" + strings.Repeat("192.0.2.1\n", 200) + "192.0.2.2",
	} {
		if _, err := parse(strings.NewReader(s), File{}, false, "list", 0); err != nil {
			t.Errorf("%.40q: want none, have %v", s, err)
		}
	}
}

func TestFrequency(t *testing.T) {
	for s, want := range map[string]time.Duration{
		"1 min": time.Minute, "12 hours": 12 * time.Hour, "1 day": 24 * time.Hour, "2 weeks": 14 * 24 * time.Hour, "": 0, "never": 0, "x min": 0,
	} {
		if have := parseFrequency(s); want != have {
			t.Errorf("%q: want %v, have %v", s, want, have)
		}
	}
}

func FuzzParse(f *testing.F) {
	paths, _ := filepath.Glob("testdata/*[.]*")
	for _, path := range paths {
		if data, err := os.ReadFile(path); err == nil {
			f.Add(data)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := parse(bytes.NewReader(data), File{Score: BestScore, Accept: AcceptCut | AcceptWide}, false, "list", int64(len(data)))
		if want := min(c.bad, maxReported); want != len(c.errs) {
			t.Errorf("%q: want %d reports of bad lines, have %d", data, want, len(c.errs))
		}
		if err != nil {
			return
		}
		var last entry
		for e := range c.set.all {
			p := e.prefix
			if !p.IsValid() || p != p.Masked() || p.Addr().Is4In6() || e.score > BestScore {
				t.Errorf("%q: have %v", data, e)
			}
			if last.prefix.IsValid() && last.prefix.Compare(p) >= 0 {
				t.Errorf("%q: have %v before %v", data, last.prefix, p)
			}
			if again, err := parsePrefix([]byte(p.String())); err != nil || again != p {
				t.Errorf("%q: want %v again, have %v, %v", data, p, again, err)
			}
			last = e
		}
	})
}
