//go:build unix

package status

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spoa-go/spoa/cmd/internal/reputation/lists"
)

// openTestLists opens a block list with a number that it does not use, a score
// behind another, and an allow list.
func openTestLists(t *testing.T) (l *lists.Lists, drop string) {
	t.Helper()
	dir := t.TempDir()
	drop = filepath.Join(dir, "drop.txt")
	own, office := filepath.Join(dir, "own"), filepath.Join(dir, "office")
	writeFile(t, drop, "198.51.96.0/20 7 ; <b>SBL1</b>\n")
	writeFile(t, own, "# spoa: column=score\n198.51.100.7 60 # a school\n")
	writeFile(t, office, "203.0.113.0/24\n")
	l, err := lists.Open(t.Context(), lists.Options{Block: []lists.File{{Path: drop, Score: 5}, {Path: own}}, Allow: []lists.File{{Path: office}}})
	if err != nil {
		t.Fatal(err)
	}
	return l, drop
}

func TestLookup(t *testing.T) {
	l, drop := openTestLists(t)
	st := New(Config{Conns: noConns, Lists: l})
	var have struct {
		Addr, State string
		Score       int
		Lists       []struct {
			List, File, Prefix, Note string
			Score                    int
			Allow, Decided           bool
		}
		Sources []string
	}
	own := filepath.Join(filepath.Dir(drop), "own")
	for addr, want := range map[string]string{
		"198.51.100.7": "{198.51.100.7 listed 5 [{drop " + drop + " 198.51.96.0/20 <b>SBL1</b> 5 false true} " +
			"{own " + own + " 198.51.100.7/32 a school 60 false false}] []}",
		"203.0.113.9": "{203.0.113.9 allowed 100 [{office " + filepath.Join(filepath.Dir(drop), "office") + " 203.0.113.0/24  100 true true}] []}",
		"8.8.8.8":     "{8.8.8.8 unlisted 100 [] []}",
	} {
		have.Lists, have.Sources = nil, nil
		if err := json.Unmarshal([]byte(st.get(t, "/lookup?ip="+addr)), &have); err != nil {
			t.Fatal(err)
		}
		if fmt.Sprint(have) != want || have.Lists == nil || have.Sources == nil {
			t.Errorf("want %s, have %v", want, have)
		}
	}
	for path, want := range map[string]int{"/lookup": 400, "/lookup?ip=x": 400, "/lookup?ip=1.2.3": 400} {
		w := httptest.NewRecorder()
		st.handler().ServeHTTP(w, httptest.NewRequest("GET", path, nil))
		if w.Code != want {
			t.Errorf("%s: want %d, have %d", path, want, w.Code)
		}
	}
	w := httptest.NewRecorder()
	New(Config{Conns: noConns}).handler().ServeHTTP(w, httptest.NewRequest("GET", "/lookup?ip=8.8.8.8", nil))
	if w.Code != http.StatusNotFound {
		t.Errorf("without lists: want 404, have %d", w.Code)
	}
}

func TestLookupPage(t *testing.T) {
	l, drop := openTestLists(t)
	st := New(Config{Conns: noConns, Lists: l})
	r := httptest.NewRequest("GET", "/lookup?ip=198.51.100.7", nil)
	r.Header.Set("Accept", "text/html,application/xhtml+xml")
	w := httptest.NewRecorder()
	st.handler().ServeHTTP(w, r)
	wantCell(t, readPage(t, w.Body.String()), "list: drop", "prefix: 198.51.96.0/20", "note: <b>SBL1</b>", "decided: yes", "file: "+drop)
	if have := w.Header().Get("Content-Type"); have != "text/html; charset=utf-8" {
		t.Errorf("want a page, have %q", have)
	}
}

// A new file of a directory that was never in force was never read, and has no
// age.
func TestNeverRead(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "good.txt"), "198.51.100.7\n")
	l, err := lists.Open(t.Context(), lists.Options{Block: []lists.File{{Path: dir}}})
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, "wrong.txt"), "<html>\n")
	if l.Reload(t.Context()) == nil {
		t.Fatal("want a reload that fails")
	}
	st := New(Config{Conns: noConns, Lists: l})
	wantCell(t, readPage(t, st.get(t, "/")), "list: wrong", "entries: 0", "read: never", "changed: never")
	for _, metric := range []string{"age_seconds", "loaded_timestamp_seconds"} {
		re := regexp.MustCompile(`(?m)^spoa_list_` + metric + `\{.*list="(\w+)"`)
		if have := re.FindAllStringSubmatch(st.get(t, "/metrics"), -1); len(have) != 1 || have[0][1] != "good" {
			t.Errorf("spoa_list_%s: want it of the list good only, have %q", metric, have)
		}
	}
}

// What is wrong with a list is on the page and in the metrics.
func TestListProblems(t *testing.T) {
	l, drop := openTestLists(t)
	st := New(Config{Conns: noConns, Lists: l})
	if page := st.get(t, "/"); !strings.Contains(page, "(1, the first in line 1) are not used") {
		t.Errorf("want the warning on the page, have\n%s", page)
	}
	writeFile(t, drop, "0.0.0.0/0\n")
	if l.Reload(t.Context()) == nil {
		t.Fatal("want a reload that fails")
	}
	if page := st.get(t, "/"); !strings.Contains(page, "0.0.0.0/0 is wider than any feed has by intention") {
		t.Errorf("want the problem on the page, have\n%s", page)
	}
	wantLines(t, st.get(t, "/metrics"),
		fmt.Sprintf(`spoa_list_refused_total{file="%s",kind="reputation",list="drop",reason="wide"} 1`, drop),
		fmt.Sprintf(`spoa_list_refused_total{file="%s",kind="reputation",list="drop",reason="cut"} 0`, drop),
		fmt.Sprintf(`spoa_list_warnings{file="%s",kind="reputation",list="drop"} 1`, drop))
}
