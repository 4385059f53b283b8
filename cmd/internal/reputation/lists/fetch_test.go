package lists

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	stdlog "log"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-kit/log"
)

const listed = "192.0.2.1\n192.0.2.2\n"

// server answers with one handler after the other, the last for ever, and
// remembers the requests.
type server struct {
	*httptest.Server
	mu       sync.Mutex
	handlers []http.HandlerFunc
	requests []*http.Request
}

func newServer(t *testing.T, handlers ...http.HandlerFunc) *server {
	s := &server{handlers: handlers}
	s.Server = httptest.NewUnstartedServer(s)
	s.Config.ErrorLog = stdlog.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	h := s.handlers[0]
	if len(s.handlers) > 1 {
		s.handlers = s.handlers[1:]
	}
	s.requests = append(s.requests, r)
	s.mu.Unlock()
	h(w, r)
}

func (s *server) next(handlers ...http.HandlerFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.handlers, s.requests = handlers, nil
}

func (s *server) asked() []*http.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.requests
}

func (s *server) options(cache string) Options {
	return Options{Block: []File{{Path: s.URL + "/feeds/drop.txt", Score: 7}}, Cache: cache, Client: s.Client()}
}

func body(s string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, s) }
}

func status(code int, header ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(code)
	}
}

// tagged answers conditional requests, by either header.
func tagged(s string) http.HandlerFunc {
	const tag, date = `"one"`, "Mon, 01 Jan 2024 00:00:00 GMT"
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", tag)
		w.Header().Set("Last-Modified", date)
		if r.Header.Get("If-None-Match") == tag && r.Header.Get("If-Modified-Since") == date {
			w.WriteHeader(http.StatusNotModified)
			return
		}
		fmt.Fprint(w, s)
	}
}

func cut(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Length", "1000")
	fmt.Fprint(w, listed)
}

func abort(w http.ResponseWriter, _ *http.Request) {
	fmt.Fprint(w, listed)
	w.(http.Flusher).Flush()
	panic(http.ErrAbortHandler)
}

func zipped(w http.ResponseWriter, _ *http.Request) {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	fmt.Fprint(z, listed)
	z.Close()
	w.Header().Set("Content-Encoding", "gzip")
	w.Write(b.Bytes())
}

// Each answer of a server, once as the first and once as a later one.
func TestFetch(t *testing.T) {
	html := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		fmt.Fprint(w, "# not even a tag\n")
	}
	redirect := func(to string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, to, http.StatusFound) }
	}
	for _, tc := range []struct {
		name     string
		handlers []http.HandlerFunc
		asked    int
		err      string // empty: it comes into force
	}{
		{"ok", []http.HandlerFunc{body(listed)}, 1, ""},
		{"gzip", []http.HandlerFunc{zipped}, 1, ""},
		{"redirect", []http.HandlerFunc{redirect("/elsewhere"), body(listed)}, 2, ""},
		{"503, then ok", []http.HandlerFunc{status(503), body(listed)}, 2, ""},
		{"429 with Retry-After, then ok", []http.HandlerFunc{status(429, "Retry-After", "1"), body(listed)}, 2, ""},
		{"cut, then ok", []http.HandlerFunc{cut, body(listed)}, 2, ""},
		{"cut in a chunk, then ok", []http.HandlerFunc{abort, body(listed)}, 2, ""},
		{"404", []http.HandlerFunc{status(404)}, 1, "status 404"},
		{"500 for ever", []http.HandlerFunc{status(500)}, tries, "status 500"},
		{"429 for an hour", []http.HandlerFunc{status(429, "Retry-After", "3600")}, 1, "status 429"},
		{"cut for ever", []http.HandlerFunc{cut}, tries, "unexpected EOF"},
		{"a type of web pages", []http.HandlerFunc{html}, 1, "a web page"},
		{"a web page", []http.HandlerFunc{body("<html>")}, 1, "a web page"},
		{"empty", []http.HandlerFunc{body("")}, 1, "empty"},
		{"304 to no condition", []http.HandlerFunc{status(304)}, 1, "status 304"},
		{"cut by its own word", []http.HandlerFunc{body("# Entries : 3 unique IPs\n" + listed)}, 1, "2 entries of the 3"},
		{"redirects for ever", []http.HandlerFunc{redirect("/a")}, maxRedirects + 1, "more than 5 redirects"},
		{"redirect to http", []http.HandlerFunc{redirect("http://127.0.0.1:1/")}, 1, "from https to http"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := newServer(t, tc.handlers...)
			l, err := openLists(t, s.options(""))
			if (err != nil) != (tc.err != "") || err != nil && !strings.Contains(err.Error(), tc.err) {
				t.Fatalf("want %q, have %v", tc.err, err)
			}
			if have := len(s.asked()); have != tc.asked {
				t.Errorf("want %d requests, have %d", tc.asked, have)
			}
			if err == nil && (score(l, "192.0.2.1") != 7 || l.Stats()[0].Checked.IsZero() || l.Stats()[0].Status != 200) {
				t.Errorf("want it in force, have %+v", l.Stats()[0])
			}
			s.next(body("198.51.100.1\n"))
			if l, err = openLists(t, s.options("")); err != nil {
				t.Fatal(err)
			}
			s.next(tc.handlers...)
			if err := l.Reload(t.Context()); (err != nil) != (tc.err != "") || err != nil && !strings.Contains(err.Error(), tc.err) {
				t.Errorf("later: want %q, have %v", tc.err, err)
			}
			want := "192.0.2.1"
			if tc.err != "" {
				want = "198.51.100.1"
			}
			if s := l.Stats()[0]; score(l, want) != 7 || (s.Problem != "") != (tc.err != "") || s.Failures > 1 {
				t.Errorf("later: want %s in force, have %+v", want, s)
			}
		})
	}
}

func TestFetchCertificate(t *testing.T) {
	s := newServer(t, body(listed))
	o := s.options("")
	o.Client = nil
	_, err := openLists(t, o)
	if err == nil || !strings.Contains(err.Error(), "certificate") || len(s.asked()) > 0 {
		t.Errorf("want an error of the certificate and no request, have %v, %d", err, len(s.asked()))
	}
}

// A server that stops in the middle costs no more than the time for an answer.
func TestFetchSlow(t *testing.T) {
	slow := func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, listed)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}
	s := newServer(t, slow)
	o := s.options("")
	o.timeout = 50 * time.Millisecond
	_, err := openLists(t, o)
	if err == nil || !strings.Contains(err.Error(), "no whole answer within 50ms") {
		t.Errorf("want a timeout, have %v", err)
	}
	s.next(slow)
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(10*time.Millisecond, cancel)
	if _, err := Open(ctx, s.options("")); !errors.Is(err, context.Canceled) {
		t.Errorf("want %v, have %v", context.Canceled, err)
	}
}

func TestFetchConditional(t *testing.T) {
	s := newServer(t, tagged(listed))
	l, err := openLists(t, s.options(""))
	if err != nil {
		t.Fatal(err)
	}
	first := l.Stats()[0]
	if err := l.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	second := l.Stats()[0]
	if second.Status != 304 || second.Reloads != 0 || !second.Checked.After(first.Checked) || !second.Loaded.Equal(first.Loaded) {
		t.Errorf("want it unchanged and checked, have %+v, then %+v", first, second)
	}
	if want := time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC); !first.Modified.Equal(want) {
		t.Errorf("want it changed at %v, have %v", want, first.Modified)
	}
	if have := s.asked()[0].Header.Get("User-Agent"); !strings.HasPrefix(have, "spoa ") {
		t.Errorf("want our name, have %q", have)
	}
}

// A URL is fetched no more often than its list, or its server, asks for.
func TestFetchSchedule(t *testing.T) {
	for _, tc := range []struct {
		name    string
		handler http.HandlerFunc
		want    time.Duration
	}{
		{"flag", body(listed), time.Hour},
		{"max-age", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Cache-Control", "public, max-age=36000")
			fmt.Fprint(w, listed)
		}, 10 * time.Hour},
		{"short max-age", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Cache-Control", "max-age=60")
			fmt.Fprint(w, listed)
		}, time.Hour},
		{"Update Frequency", body("# Update Frequency: 1 day\n" + listed), 24 * time.Hour},
	} {
		s := newServer(t, tc.handler)
		l, err := openLists(t, s.options(""))
		if err != nil {
			t.Fatal(err)
		}
		if have := time.Until(l.Stats()[0].Next); have < tc.want-time.Minute || have > tc.want*11/10 {
			t.Errorf("%s: want %v and up to a tenth more, have %v", tc.name, tc.want, have)
		}
		s.next(status(429, "Retry-After", "7200"))
		_ = l.Reload(t.Context())
		if asked, want := len(s.asked()), tc.name != "flag"; (asked == 0) != want {
			t.Errorf("%s: want a reload to ask only where that was not asked for later, have %d requests", tc.name, asked)
		}
		if err := l.refresh(t.Context(), (*l.sources.Load())[0]); err == nil {
			t.Fatal("want an error")
		}
		s.next(body(listed))
		if err := l.Reload(t.Context()); err != nil || len(s.asked()) > 0 {
			t.Errorf("%s: want Retry-After obeyed, have %v, %d requests", tc.name, err, len(s.asked()))
		}
		if have := time.Until(l.Stats()[0].Next); have < 119*time.Minute || have > 133*time.Minute {
			t.Errorf("%s: want the 2 hours of Retry-After, have %v", tc.name, have)
		}
	}
}

// Watch fetches what is due, and goes on after a failure.
func TestFetchWatch(t *testing.T) {
	s := newServer(t, body(listed))
	l, err := openLists(t, s.options(""))
	if err != nil {
		t.Fatal(err)
	}
	told := make(chan bool, 10)
	l.onReload = func(_ string, ok bool) { told <- ok }
	s.next(body("192.0.2.1\n"))
	source := (*l.sources.Load())[0]
	stats := *source.stats.Load()
	stats.Next = time.Now()
	source.stats.Store(&stats)
	done := make(chan error, 1)
	ctx := t.Context()
	go func() { done <- l.Watch(ctx) }()
	select {
	case ok := <-told:
		if !ok || l.Stats()[0].Entries != 1 {
			t.Errorf("want one entry, have %v, %+v", ok, l.Stats()[0])
		}
	case <-time.After(patience):
		t.Fatal("want a fetch that is due")
	}
}

// With a cache a start needs no network, and asks for nothing too early.
func TestCache(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cache")
	s := newServer(t, tagged(listed))
	if _, err := openLists(t, s.options(dir)); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "????????????????????????????????.list"))
	if err != nil || len(files) != 1 {
		t.Fatalf("want one file, have %v, %v", files, err)
	}
	start := func(age time.Duration, handlers ...http.HandlerFunc) (*Lists, string) {
		t.Helper()
		if err := os.Chtimes(files[0], time.Time{}, time.Now().Add(-age)); err != nil {
			t.Fatal(err)
		}
		s.next(handlers...)
		var buf logBuffer
		o := s.options(dir)
		o.Logger = log.NewLogfmtLogger(&buf)
		l, err := openLists(t, o)
		if err != nil {
			t.Fatal(err)
		}
		if score(l, "192.0.2.1") != 7 {
			t.Errorf("want the list in force, have %+v", l.Stats()[0])
		}
		return l, buf.String()
	}

	l, out := start(10*time.Minute, status(404))
	if len(s.asked()) > 0 || !strings.Contains(out, `msg="last copy used"`) || !strings.Contains(out, "age=10m") {
		t.Errorf("young: want no request and a line, have %d in\n%s", len(s.asked()), out)
	}
	if have := time.Until(l.Stats()[0].Next); have > 56*time.Minute || have < 49*time.Minute {
		t.Errorf("young: want the rest of the hour, have %v", have)
	}

	l, _ = start(2*time.Hour, tagged(listed))
	if have := l.Stats()[0]; have.Status != 304 || time.Since(have.Checked) > time.Minute {
		t.Errorf("old and still good: want 304, have %+v", have)
	}
	if fi, err := os.Stat(files[0]); err != nil || time.Since(fi.ModTime()) > time.Minute {
		t.Errorf("old and still good: want the copy young again, have %v, %v", fi.ModTime(), err)
	}

	l, out = start(26*time.Hour, status(404))
	if have := l.Stats()[0]; have.Status != 404 || have.Problem == "" || !strings.Contains(out, "age=26h0m") {
		t.Errorf("old and no server: want the copy and its age, have %+v\n%s", have, out)
	}

	var many strings.Builder
	for i := range 100 {
		fmt.Fprintf(&many, "192.0.2.%d\n", i)
	}
	start(2*time.Hour, body(many.String()))
	l, _ = start(2*time.Hour, body(listed))
	if have := l.Stats()[0]; have.Entries != 100 || have.Refused[Shrunk] != 1 {
		t.Errorf("shrunk: want the copy, have %+v", have)
	}

	writeFile(t, files[0], "damaged\n192.0.2.9\n")
	start(time.Minute, body(listed))
	if n := len(s.asked()); n != 1 {
		t.Errorf("damaged: want it fetched, have %d requests", n)
	}
	crashed := filepath.Join(dir, ".fetched-1")
	writeFile(t, crashed, "")
	if err := os.Chtimes(crashed, time.Time{}, time.Now().Add(-2*time.Hour)); err != nil {
		t.Fatal(err)
	}
	start(time.Minute, body(listed))
	left, _ := os.ReadDir(dir)
	if len(left) != 1 {
		t.Errorf("want the copy alone, have %v", left)
	}
}

// A cache that cannot be written is a fetch that failed.
func TestCacheFull(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cache")
	s := newServer(t, body(listed))
	l, err := openLists(t, s.options(dir))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	writeFile(t, dir, "no directory") // as root anything else could be written
	s.next(body("192.0.2.9\n"))
	err = l.Reload(t.Context())
	var path *fs.PathError
	if !errors.As(err, &path) || len(s.asked()) != 1 || score(l, "192.0.2.1") != 7 {
		t.Errorf("want an error of the disk at once, and the old list, have %v, %d requests", err, len(s.asked()))
	}
}

// Secrets of a URL are not shown.
func TestFetchSecrets(t *testing.T) {
	s := newServer(t, status(404))
	var buf logBuffer
	o := s.options("")
	o.Logger = log.NewLogfmtLogger(&buf)
	o.Block[0].Path = strings.Replace(s.URL, "://", "://me:secret@", 1) + "/list?key=secret&b=c"
	_, err := openLists(t, o)
	if err == nil || strings.Contains(err.Error()+buf.String(), "secret") {
		t.Errorf("want an error without it, have %v\n%s", err, &buf)
	}
	s.next(body(listed))
	l, err := openLists(t, o)
	if err != nil {
		t.Fatal(err)
	}
	if _, password, _ := s.asked()[0].BasicAuth(); password != "secret" {
		t.Errorf("want the password sent, have %q", password)
	}
	if strings.Contains(fmt.Sprint(l.Stats(), l.Explain(netip.MustParseAddr("192.0.2.1")))+buf.String(), "secret") {
		t.Errorf("want no secret, have %+v\n%s", l.Stats(), &buf)
	}
	o.Block[0].Path = "https://127.0.0.1:1/secret\x7f"
	if _, err := openLists(t, o); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("want an error without it, have %v", err)
	}
}

func TestFetchTooBig(t *testing.T) {
	for size, want := range map[int]string{1 << 20: "", 1<<20 + 1: "more than 1 MiB"} {
		s := newServer(t, body(listed+strings.Repeat("#", size-len(listed))))
		for _, dir := range []string{"", t.TempDir()} {
			o := s.options(dir)
			o.most = 1 << 20
			_, err := openLists(t, o)
			if (err != nil) != (want != "") || err != nil && !strings.Contains(err.Error(), want) {
				t.Errorf("%d bytes: want %q, have %v", size, want, err)
			}
			if left, _ := filepath.Glob(filepath.Join(dir, ".*")); dir != "" && len(left) > 0 {
				t.Errorf("%d bytes: want nothing left, have %v", size, left)
			}
		}
	}
}
