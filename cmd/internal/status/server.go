package status

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"
)

// What keeps those who ask often, or read slowly, from taking more than their
// share of the process.
const (
	maxConns   = 256
	maxAtOnce  = 4                      // pages with an address looked up, and the like
	fresh      = 100 * time.Millisecond // a page or metrics of that age may be served again
	maxHeaders = 16 << 10
)

// Drain makes the server say that the agent is coming to its end: it is not
// ready any more.
func (st *Status) Drain() { st.draining.Store(true) }

// Actor returns the HTTP server on l as an actor of an oklog/run group.
func (st *Status) Actor(l net.Listener) (execute func() error, interrupt func(error)) {
	srv := &http.Server{
		Handler: st.handler(), MaxHeaderBytes: maxHeaders,
		ReadTimeout: 5 * time.Second, WriteTimeout: 10 * time.Second, IdleTimeout: 30 * time.Second,
	}
	ctx, cancel := context.WithCancel(context.Background())
	execute = func() error {
		go st.sampleUntil(ctx)
		err := srv.Serve(netutil.LimitListener(l, maxConns))
		if errors.Is(err, http.ErrServerClosed) {
			<-ctx.Done()
			return nil
		}
		return err
	}
	interrupt = func(error) {
		defer cancel()
		ctx, done := context.WithTimeout(ctx, time.Second)
		defer done()
		if srv.Shutdown(ctx) != nil {
			srv.Close()
		}
	}
	return execute, interrupt
}

//go:embed page.js
var script []byte

func (st *Status) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", &shared{next: promhttp.HandlerFor(st.registry, promhttp.HandlerOpts{DisableCompression: true})})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if st.draining.Load() {
			http.Error(w, "draining", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
	})
	atOnce := make(chan struct{}, maxAtOnce)
	plain, others := &shared{next: http.HandlerFunc(st.page)}, limited(atOnce, http.HandlerFunc(st.page))
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.RawQuery == "" {
			plain.ServeHTTP(w, r)
			return
		}
		others.ServeHTTP(w, r)
	})
	mux.HandleFunc("GET /page.js", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/javascript; charset=utf-8")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Write(script)
	})
	if st.config.Lists != nil || st.config.Sources != nil {
		mux.Handle("GET /lookup", limited(atOnce, http.HandlerFunc(st.lookup)))
	}
	return mux
}

// response is an answer that is held in memory.
type response struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (r *response) Header() http.Header         { return r.header }
func (r *response) WriteHeader(status int)      { r.status = status }
func (r *response) Write(p []byte) (int, error) { return r.body.Write(p) }

func (r *response) writeTo(w http.ResponseWriter) {
	for name, values := range r.header {
		w.Header()[name] = values
	}
	w.WriteHeader(r.status)
	w.Write(r.body.Bytes())
}

// render returns the answer of h.
func render(h http.Handler, r *http.Request) *response {
	resp := &response{header: make(http.Header), status: http.StatusOK}
	h.ServeHTTP(resp, r)
	return resp
}

// shared is a handler whose answer, which depends on nothing in the request, all
// who ask within a moment get alike.
type shared struct {
	next http.Handler

	mu   sync.Mutex // held while next is asked, so that the others wait for its answer
	last *response
	at   time.Time // when next was asked
}

func (s *shared) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	if now := time.Now(); s.last == nil || now.Sub(s.at) > fresh {
		plain := r.Clone(r.Context())
		plain.Header = make(http.Header) // nobody's wishes for a form of the answer
		s.last, s.at = render(s.next, plain), now
	}
	last := s.last
	s.mu.Unlock()
	last.writeTo(w)
}

// limited returns a handler that refuses to make more answers at once than fit
// into atOnce. Writing them does not count.
func limited(atOnce chan struct{}, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case atOnce <- struct{}{}:
		default:
			http.Error(w, "busy, ask again later", http.StatusServiceUnavailable)
			return
		}
		resp := render(next, r)
		<-atOnce
		resp.writeTo(w)
	})
}
