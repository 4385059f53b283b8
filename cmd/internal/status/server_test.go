//go:build unix

package status

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func do(h http.Handler, path string) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("GET", path, nil))
	return w
}

// Who asks just after another gets the same answer, and later a new one.
func TestShared(t *testing.T) {
	var made atomic.Int32
	s := &shared{next: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if len(r.Header) > 0 {
			t.Errorf("want nobody's header passed on, have %v", r.Header)
		}
		w.Header().Set("X-Made", "here")
		w.WriteHeader(http.StatusTeapot)
		fmt.Fprint(w, made.Add(1))
	})}
	synctest.Test(t, func(t *testing.T) {
		for range 100 {
			w := httptest.NewRecorder()
			r := httptest.NewRequest("GET", "/", nil)
			r.Header.Set("Accept-Encoding", "gzip")
			s.ServeHTTP(w, r)
			if have := fmt.Sprint(w.Code, w.Header().Get("X-Made"), w.Body); have != "418here1" {
				t.Errorf("want the first answer, have %s", have)
			}
		}
		<-time.After(fresh + 1)
		if have := do(s, "/").Body.String(); have != "2" {
			t.Errorf("want a new answer, have %s", have)
		}
	})
}

func TestLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		leave := make(chan struct{})
		h := limited(make(chan struct{}, 3), http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-leave }))
		codes := make(chan int, 3)
		for range 3 {
			go func() { codes <- do(h, "/").Code }()
		}
		synctest.Wait()
		if have := do(h, "/").Code; have != http.StatusServiceUnavailable {
			t.Errorf("want the fourth refused, have %d", have)
		}
		close(leave)
		for range 3 {
			if have := <-codes; have != http.StatusOK {
				t.Errorf("want three answered, have %d", have)
			}
		}
		if have := do(h, "/").Code; have != http.StatusOK {
			t.Errorf("want room again, have %d", have)
		}
	})
}

func TestScript(t *testing.T) {
	h := newTestStatus().handler()
	w := do(h, "/page.js")
	if w.Code != http.StatusOK || !strings.HasPrefix(w.Header().Get("Content-Type"), "text/javascript") {
		t.Errorf("want a script, have %d, %v", w.Code, w.Header())
	}
	page := do(h, "/").Body.String()
	for _, id := range []string{"now", "numbers", "live"} { // what the script looks for
		if !strings.Contains(w.Body.String(), "'"+id+"'") || strings.Count(page, `id="`+id+`"`) != 1 {
			t.Errorf("want one %s in page and script", id)
		}
	}
}
