package spoa

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/oklog/run"
)

// longWait bounds every wait of these tests. It is long, since nothing that
// works takes that long; in a bubble it takes no time at all.
const longWait = 20 * time.Second

// running returns the stacks of the goroutines that run or were begun by the
// package's own code.
func running() []string {
	buf := make([]byte, 1<<20)
	for {
		n := runtime.Stack(buf, true)
		if n < len(buf) {
			buf = buf[:n]
			break
		}
		buf = make([]byte, 2*len(buf))
	}
	var own []string
	for g := range strings.SplitSeq(string(buf), "\n\n") {
		if ownCode.MatchString(g) {
			own = append(own, g)
		}
	}
	return own
}

var ownCode = regexp.MustCompile(`/(spoa|worker|client)\.go:`)

// descriptors returns the number of open ones, 0 where it can't be told.
func descriptors() int {
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0
	}
	return len(d)
}

// eventually waits for what no event tells of.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(longWait); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("want %s, have waited %v", what, longWait)
		}
		<-time.After(time.Millisecond)
	}
}

// checkLeaks has the test fail if goroutines or descriptors are left behind.
func checkLeaks(t testing.TB) {
	l, err := net.Listen("tcp", "127.0.0.1:0") // so that the poller's descriptors are there
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	goroutines, fds := len(running()), descriptors()
	t.Cleanup(func() {
		if t.Failed() {
			return
		}
		var left []string
		eventually(t, "no goroutine left", func() bool {
			left = running()
			return len(left) <= goroutines
		})
		eventually(t, "no descriptor left", func() bool { return descriptors() <= fds })
	})
}

// memListener is a listener without a network, for bubbles. It counts how
// often it is closed.
type memListener struct {
	conns  chan net.Conn
	done   chan struct{}
	closes atomic.Int32
}

func newMemListener() *memListener {
	return &memListener{conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *memListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *memListener) Close() error {
	if l.closes.Add(1) == 1 {
		close(l.done)
	}
	return nil
}

func (l *memListener) Addr() net.Addr { return &net.UnixAddr{Name: "mem", Net: "unix"} }

// offer has Accept return c.
func (l *memListener) offer(t testing.TB, c net.Conn) {
	t.Helper()
	select {
	case l.conns <- c:
	case <-l.done:
		t.Fatal("the listener is closed")
	case <-time.After(longWait):
		t.Fatal("nobody accepts")
	}
}

// raw returns the client's end of a new connection.
func (l *memListener) raw(t testing.TB) net.Conn {
	t.Helper()
	client, server := net.Pipe()
	l.offer(t, server)
	t.Cleanup(func() { client.Close() })
	return client
}

func (l *memListener) dial(t testing.TB) *haproxy {
	t.Helper()
	return newHAProxy(t, l.raw(t))
}

// startAgent serves on ln, until the test ends.
func startAgent(t testing.TB, ln net.Listener, opts ...Option) *Agent {
	t.Helper()
	a := New(opts...)
	served := make(chan error, 1)
	go func() { served <- a.Serve(ln) }()
	t.Cleanup(func() {
		a.Close()
		wantClosed(t, served)
	})
	return a
}

// startMem serves on a memListener, until the test ends.
func startMem(t testing.TB, opts ...Option) (*Agent, *memListener) {
	t.Helper()
	ln := newMemListener()
	return startAgent(t, ln, opts...), ln
}

// startTCP serves on the loopback, until the test ends, and has nothing be left
// then.
func startTCP(t testing.TB, opts ...Option) (*Agent, func() *net.TCPConn) {
	t.Helper()
	checkLeaks(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return startAgent(t, ln, opts...), func() *net.TCPConn {
		t.Helper()
		nc, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { nc.Close() })
		return nc.(*net.TCPConn)
	}
}

// receive takes what c sends.
func receive[T any](t testing.TB, what string, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(longWait):
		t.Fatalf("want %s, have nothing", what)
	}
	return v
}

func wantClosed(t testing.TB, served <-chan error) {
	t.Helper()
	if err := receive(t, "Serve to return", served); err != ErrAgentClosed {
		t.Errorf("Serve: want %v, have %v", ErrAgentClosed, err)
	}
}

// haproxy is the other end of a connection, byte by byte.
type haproxy struct {
	t      testing.TB
	nc     net.Conn
	frames chan frame // closed at the end
	err    error      // then: why
}

func newHAProxy(t testing.TB, nc net.Conn) *haproxy {
	h := &haproxy{t: t, nc: nc, frames: make(chan frame, 10000)}
	go func() {
		defer close(h.frames)
		h.err = eachFrame(nc, func(f frame) { h.frames <- f })
	}()
	return h
}

// eachFrame reads frames until the end, and returns why that was: nil if
// between two frames.
func eachFrame(r io.Reader, do func(frame)) error {
	for {
		var size [lengthSize]byte
		if _, err := io.ReadFull(r, size[:]); err != nil {
			if err == io.EOF {
				err = nil
			}
			return err
		}
		b := make([]byte, min(binary.BigEndian.Uint32(size[:]), 1<<20))
		if _, err := io.ReadFull(r, b); err != nil {
			return err
		}
		var f frame
		if !f.parse(b) {
			return fmt.Errorf("malformed frame %x", b)
		}
		do(f)
	}
}

// send writes frames in one go.
func (h *haproxy) send(frames ...string) {
	h.t.Helper()
	h.nc.SetWriteDeadline(time.Now().Add(longWait))
	if _, err := io.WriteString(h.nc, strings.Join(frames, "")); err != nil {
		h.t.Fatalf("send: %v", err)
	}
}

// try writes frames to an agent that may close before it has read them.
func (h *haproxy) try(frames ...string) {
	h.nc.SetWriteDeadline(time.Now().Add(longWait))
	io.WriteString(h.nc, strings.Join(frames, ""))
}

// next returns the next frame, if there is one.
func (h *haproxy) next() (f frame, ok bool) {
	h.t.Helper()
	select {
	case f, ok = <-h.frames:
	case <-time.After(longWait):
		h.t.Fatal("want a frame, or the end; have nothing")
	}
	return f, ok
}

func (h *haproxy) want(kind byte) frame {
	h.t.Helper()
	f, ok := h.next()
	if !ok {
		h.t.Fatalf("want %s, have the end (%v)", frameNames[kind], h.err)
	}
	if f.kind != kind {
		h.t.Fatalf("want %s, have %s", frameNames[kind], inWordsFrame(f))
	}
	return f
}

func inWordsFrame(f frame) string {
	b := beginFrame(nil, f.kind, f.flags, f.stream, f.id)
	return describe(finishFrame(append(b, f.payload...), 0))
}

// wantAck takes the ACK that the handler numbered gives to these ids.
func (h *haproxy) wantAck(stream, id uint64) {
	h.t.Helper()
	f := h.want(frameAck)
	want := inWordsFrame(frame{frameAck, flagFIN, stream, id, numberedActions(id)})
	if have := inWordsFrame(f); want != have {
		h.t.Fatalf("want %s, have %s", want, have)
	}
}

// wantEnd takes an AGENT-DISCONNECT and the end.
func (h *haproxy) wantEnd(status Status) {
	h.t.Helper()
	f := h.want(frameAgentDisconnect)
	if d := parseDisconnect(f.payload); d.Status != status || f.flags != flagFIN || f.stream != 0 || f.id != 0 {
		h.t.Fatalf("want AGENT-DISCONNECT %d, have %s", status, inWordsFrame(f))
	}
	h.wantEOF()
}

// wantEOF takes the end.
func (h *haproxy) wantEOF() {
	h.t.Helper()
	if f, ok := h.next(); ok {
		h.t.Fatalf("want the end, have %s", inWordsFrame(f))
	}
	if h.err != nil {
		h.t.Fatalf("want the end, have %v", h.err)
	}
}

// hello exchanges HELLOs.
func (h *haproxy) hello() hello {
	h.t.Helper()
	return h.helloAs(offered)
}

func (h *haproxy) helloAs(offer hello) (agreed hello) {
	h.t.Helper()
	h.send(helloFrame(offer))
	f := h.want(frameAgentHello)
	if err := agreed.parse(frameAgentHello, f.payload); err != nil {
		h.t.Fatal(err)
	}
	if f.flags != flagFIN || f.stream != 0 || f.id != 0 {
		h.t.Fatalf("want AGENT-HELLO with FIN and ids 0, have %s", inWordsFrame(f))
	}
	return agreed
}

// wantAnswers has the agent answer a NOTIFY.
func (h *haproxy) wantAnswers() {
	h.t.Helper()
	h.send(notifyFrame(77, 99))
	h.wantAck(77, 99)
}

// offered is the HELLO of HAProxy 2.6 with one thread.
var offered = hello{versions: "2.0", frameSize: 16380, capabilities: "pipelining,async", engineID: "engine"}

func helloFrame(h hello) string { return string(appendHello(nil, frameHAProxyHello, &h)) }

func rawFrame(kind byte, flags uint32, stream, id uint64, payload string) string {
	b := beginFrame(nil, kind, flags, stream, id)
	return string(finishFrame(append(b, payload...), 0))
}

// number is the message that numbered answers.
var number = string(appendMessage(nil, NewMessage("number")))

func notifyFrame(stream, id uint64) string { return rawFrame(frameNotify, flagFIN, stream, id, number) }

var goodbye = string(appendDisconnect(nil, frameHAProxyDisconnect, StatusNormal, "bye"))

// numbered answers with the FRAME-ID.
func numbered(_ context.Context, m *Message, a *Actions) error {
	a.SetVar(ScopeTxn, "id", Uint64(m.FrameID()))
	return nil
}

func numberedActions(id uint64) []byte {
	var a Actions
	a.SetVar(ScopeTxn, "id", Uint64(id))
	return a.buf
}

func withNumbered() Option { return WithHandlerFunc("number", numbered) }

// gate is a handler that answers as numbered does, but only when it is opened.
type gate struct {
	entered chan struct{} // a value for every call
	open    chan struct{}
	heeds   bool // the end of its context
}

func newGate() *gate {
	return &gate{entered: make(chan struct{}, 10000), open: make(chan struct{})}
}

func (g *gate) ServeSPOE(ctx context.Context, m *Message, a *Actions) error {
	g.entered <- struct{}{}
	var done <-chan struct{}
	if g.heeds {
		done = ctx.Done()
	}
	select {
	case <-g.open:
		return numbered(ctx, m, a)
	case <-done:
		return ctx.Err()
	}
}

func (g *gate) wait(t testing.TB, calls int) {
	t.Helper()
	for range calls {
		receive(t, "a handler to be called", g.entered)
	}
}

// wantTook checks how long something took that began at start, in a bubble.
func wantTook(t testing.TB, what string, start time.Time, least, most time.Duration) {
	t.Helper()
	if took := time.Since(start); took < least || took > most {
		t.Errorf("%s: want %v to %v, have %v", what, least, most, took)
	}
}

// logLines is a logger that keeps its lines.
type logLines struct {
	mu    sync.Mutex
	lines []string
}

func (l *logLines) Log(keyvals ...any) error {
	var b strings.Builder
	for i := 0; i+1 < len(keyvals); i += 2 {
		fmt.Fprintf(&b, "%v=%v ", keyvals[i], keyvals[i+1])
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, b.String())
	return nil
}

// with returns the lines that hold all of parts.
func (l *logLines) with(parts ...string) (lines []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
next:
	for _, line := range l.lines {
		for _, p := range parts {
			if !strings.Contains(line, p) {
				continue next
			}
		}
		lines = append(lines, line)
	}
	return lines
}

func TestServeNilListener(t *testing.T) {
	if err := New().Serve(nil); err == nil || err == ErrAgentClosed {
		t.Errorf("want an error of its own, have %v", err)
	}
}

func TestServeListeners(t *testing.T) {
	a := New(withNumbered())
	served := make(chan error)
	var lns []*memListener
	for range 3 {
		ln := newMemListener()
		lns = append(lns, ln)
		go func() { served <- a.Serve(ln) }()
		h := ln.dial(t)
		h.hello()
		h.wantAnswers()
	}
	if want, have := 3, len(a.Conns()); want != have {
		t.Errorf("want %d connections, have %d", want, have)
	}
	a.Close()
	for range lns {
		wantClosed(t, served)
	}
	for _, ln := range lns {
		if have := ln.closes.Load(); have != 1 {
			t.Errorf("want the listener closed once, have %d times", have)
		}
	}
}

// failingListener's Accept fails until it is closed.
type failingListener struct {
	*memListener
	err     error
	accepts chan time.Time
}

func (l *failingListener) Accept() (net.Conn, error) {
	select {
	case <-l.done:
		return nil, net.ErrClosed
	case l.accepts <- time.Now():
		return nil, l.err
	}
}

type temporary struct{}

func (temporary) Error() string   { return "too many open files" }
func (temporary) Timeout() bool   { return false }
func (temporary) Temporary() bool { return true }

func TestAcceptTemporary(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lines := new(logLines)
		l := &failingListener{newMemListener(), fmt.Errorf("accept: %w", temporary{}), make(chan time.Time, 1000)}
		a := New(WithLogger(lines))
		served := make(chan error)
		go func() { served <- a.Serve(l) }()
		var delays []time.Duration
		last := <-l.accepts
		for range 10 {
			at := <-l.accepts
			delays, last = append(delays, at.Sub(last)), at
		}
		const ms = time.Millisecond
		want := []time.Duration{5 * ms, 10 * ms, 20 * ms, 40 * ms, 80 * ms, 160 * ms, 320 * ms, 640 * ms, 1000 * ms, 1000 * ms}
		if !slices.Equal(want, delays) {
			t.Errorf("want %v, have %v", want, delays)
		}
		if have := lines.with("accept failed"); len(have) == 0 || len(have) > 4 {
			t.Errorf("want a line a second, have %q", have)
		}
		synctest.Wait()
		start := time.Now()
		a.Close()
		wantClosed(t, served)
		wantTook(t, "Serve after Close", start, 0, 0)
		if have := l.closes.Load(); have != 1 {
			t.Errorf("want the listener closed once, have %d times", have)
		}
	})
}

// While an agent drains it goes on accepting, and goes on being patient.
func TestAcceptTemporaryInDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t, withNumbered())
		h := ln.dial(t)
		h.hello()
		l := &failingListener{newMemListener(), temporary{}, make(chan time.Time, 10000)}
		served := make(chan error)
		go func() { served <- a.Serve(l) }()
		synctest.Wait()
		if err := a.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantClosed(t, served)
		if have := len(l.accepts); have > 20 {
			t.Errorf("want Accept called a few times, have %d", have)
		}
	})
}

func TestAcceptPermanent(t *testing.T) {
	want := errors.New("no such device")
	l := &failingListener{newMemListener(), want, make(chan time.Time, 1)}
	if have := New().Serve(l); have != want {
		t.Errorf("want %v, have %v", want, have)
	}
	if have := l.closes.Load(); have != 1 {
		t.Errorf("want the listener closed once, have %d times", have)
	}
}

func TestClosedForEver(t *testing.T) {
	for name, end := range map[string]func(*Agent) error{
		"Close":    (*Agent).Close,
		"Shutdown": func(a *Agent) error { return a.Shutdown(context.Background()) },
	} {
		t.Run(name, func(t *testing.T) {
			a := New()
			if err := end(a); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				ln := newMemListener()
				if err := a.Serve(ln); err != ErrAgentClosed {
					t.Errorf("want %v, have %v", ErrAgentClosed, err)
				}
				if have := ln.closes.Load(); have != 1 {
					t.Errorf("want the listener closed once, have %d times", have)
				}
				if err := end(a); err != nil {
					t.Errorf("again: want no error, have %v", err)
				}
			}
		})
	}
}

func TestCloseConcurrent(t *testing.T) {
	g := newGate()
	g.heeds = true
	a, dial := startTCP(t, WithHandler("number", g))
	h := newHAProxy(t, dial())
	h.hello()
	h.send(notifyFrame(1, 1))
	g.wait(t, 1)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			if i%2 == 0 {
				a.Close()
				return
			}
			ctx, cancel := context.WithTimeout(t.Context(), longWait)
			defer cancel()
			if err := a.Shutdown(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for ok := true; ok; {
		_, ok = h.next() // at most the answer of a handler that was cancelled
	}
}

func TestShutdownNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t)
		h := ln.dial(t)
		h.hello()
		h.nc.Close()
		synctest.Wait()
		start := time.Now()
		if err := a.Shutdown(context.Background()); err != nil {
			t.Fatal(err)
		}
		wantTook(t, "Shutdown", start, 0, 0)
	})
}

func TestShutdownIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t, withNumbered())
		var hs []*haproxy
		for range 5 {
			h := ln.dial(t)
			h.hello()
			h.wantAnswers()
			hs = append(hs, h)
		}
		ln.dial(t) // says nothing
		mute := ln.dial(t)
		mute.send(helloFrame(offered)[:9])
		start := time.Now()
		if err := a.Shutdown(context.Background()); err != nil {
			t.Fatal(err)
		}
		wantTook(t, "Shutdown", start, quietTime, quietTime)
		for _, h := range append(hs, mute) {
			h.wantEnd(StatusNormal)
		}
	})
}

func TestShutdownStuckHandler(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate() // deaf to its context
		defer close(g.open)
		a, ln := startMem(t, WithHandler("number", g))
		h := ln.dial(t)
		h.hello()
		h.send(notifyFrame(1, 1))
		g.wait(t, 1)
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		if err := a.Shutdown(ctx); err != context.DeadlineExceeded {
			t.Errorf("want %v, have %v", context.DeadlineExceeded, err)
		}
		wantTook(t, "Shutdown", start, 3*time.Second, 3*time.Second)
		h.wantEOF()
		synctest.Wait()
		if have := a.Conns(); len(have) != 0 {
			t.Errorf("want no connection, have %v", have)
		}
	})
}

func TestShutdownCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		g.heeds = true
		a, ln := startMem(t, WithHandler("number", g))
		h := ln.dial(t)
		h.hello()
		h.send(notifyFrame(1, 1))
		g.wait(t, 1)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Minute, cancel)
		start := time.Now()
		if err := a.Shutdown(ctx); err != context.Canceled {
			t.Errorf("want %v, have %v", context.Canceled, err)
		}
		wantTook(t, "Shutdown", start, time.Minute, time.Minute)
	})
}

func TestShutdownTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t, withNumbered())
		h := ln.dial(t)
		h.hello()
		start := time.Now()
		results := make(chan error)
		for range 3 {
			go func() { results <- a.Shutdown(context.Background()) }()
		}
		for range 3 {
			if err := <-results; err != nil {
				t.Error(err)
			}
		}
		if err := a.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
		wantTook(t, "four Shutdowns", start, quietTime, quietTime)
		h.wantEnd(StatusNormal)
	})
}

// A drain goes on answering, on old and new connections, and refuses health
// checks.
func TestShutdownAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t, withNumbered())
		old := ln.dial(t)
		old.hello()
		done := make(chan error)
		go func() { done <- a.Shutdown(context.Background()) }()
		for range 20 {
			<-time.After(quietTime / 2)
			old.wantAnswers()
			h := ln.dial(t)
			h.hello()
			h.wantAnswers()
			h.nc.Close()
			check := ln.dial(t)
			check.send(helloFrame(hello{versions: "2.0", frameSize: 16380, healthcheck: true}))
			check.wantEnd(StatusNormal)
		}
		start := time.Now()
		if err := <-done; err != nil {
			t.Error(err)
		}
		wantTook(t, "the rest of the drain", start, quietTime, quietTime)
		old.wantEnd(StatusNormal)
	})
}

// With health checks seen, the agent stays until HAProxy has missed some.
func TestShutdownAfterHealthChecks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t, withNumbered())
		for i := range 3 {
			if i > 0 {
				<-time.After(500 * time.Millisecond)
			}
			h := ln.dial(t)
			h.helloAs(hello{versions: "2.0", frameSize: 16380, healthcheck: true})
			h.wantEOF()
		}
		start := time.Now()
		done := make(chan error)
		go func() { done <- a.Shutdown(context.Background()) }()
		<-time.After(1200 * time.Millisecond)
		h := ln.dial(t)
		h.hello()
		h.wantAnswers()
		h.nc.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
		wantTook(t, "Shutdown", start, 2500*time.Millisecond, 2500*time.Millisecond)
	})
}

// Near its deadline a Shutdown reads no more, but what is in flight is
// answered.
func TestShutdownNearDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		a, ln := startMem(t, withNumbered(), WithHandler("slow", g))
		h := ln.dial(t)
		h.hello()
		h.send(rawFrame(frameNotify, flagFIN, 5, 6, string(appendMessage(nil, NewMessage("slow")))))
		g.wait(t, 1)
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		done := make(chan error)
		go func() { done <- a.Shutdown(ctx) }()
		for range 37 {
			<-time.After(quietTime / 2)
			h.wantAnswers()
		}
		<-time.After(19200*time.Millisecond - time.Since(start))
		close(g.open)
		h.wantAck(5, 6)
		h.wantEnd(StatusNormal)
		if err := <-done; err != nil {
			t.Error(err)
		}
		wantTook(t, "Shutdown", start, 19200*time.Millisecond, 19300*time.Millisecond)
	})
}

func TestShutdownDuringAccept(t *testing.T) {
	a, dial := startTCP(t, withNumbered())
	stop := make(chan struct{})
	var wg sync.WaitGroup
	addr := dial().RemoteAddr().String()
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if nc, err := net.Dial("tcp", addr); err == nil {
					nc.Close()
				}
			}
		})
	}
	eventually(t, "connections", func() bool { return len(a.Conns()) > 1 })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	a.Shutdown(ctx)
	close(stop)
	wg.Wait()
	eventually(t, "no connection", func() bool { return len(a.Conns()) == 0 })
}

func TestActor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := newMemListener()
		a := New(withNumbered())
		execute, interrupt := a.Actor(ln, time.Minute)
		done := make(chan error)
		go func() { done <- execute() }()
		h := ln.dial(t)
		h.hello()
		start := time.Now()
		interrupt(errors.New("another actor has ended"))
		wantTook(t, "interrupt", start, 0, 0)
		h.wantAnswers()
		wantClosed(t, done)
		wantTook(t, "execute", start, quietTime, quietTime)
		h.wantEnd(StatusNormal)
		interrupt(nil)
	})
}

func TestActorInterruptedFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := newMemListener()
		execute, interrupt := New().Actor(ln, time.Minute)
		start := time.Now()
		interrupt(nil)
		if err := execute(); err != ErrAgentClosed {
			t.Errorf("want %v, have %v", ErrAgentClosed, err)
		}
		wantTook(t, "execute", start, 0, 0)
		if have := ln.closes.Load(); have != 1 {
			t.Errorf("want the listener closed once, have %d times", have)
		}
	})
}

func TestActorGraceOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		defer close(g.open)
		ln := newMemListener()
		execute, interrupt := New(WithHandler("number", g)).Actor(ln, 5*time.Second)
		done := make(chan error)
		go func() { done <- execute() }()
		h := ln.dial(t)
		h.hello()
		h.send(notifyFrame(1, 1))
		g.wait(t, 1)
		start := time.Now()
		interrupt(nil)
		wantClosed(t, done)
		wantTook(t, "execute", start, 5*time.Second, 5*time.Second)
	})
}

// In a group of oklog/run the actor that ends first has the others interrupted,
// one after another.
func TestActorInGroup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := newMemListener()
		var g run.Group
		g.Add(New(withNumbered()).Actor(ln, time.Minute))
		want := errors.New("enough")
		end := make(chan struct{})
		g.Add(func() error { <-end; return want }, func(error) {})
		done := make(chan error)
		go func() { done <- g.Run() }()
		h := ln.dial(t)
		h.hello()
		h.wantAnswers()
		close(end)
		if have := receive(t, "Run to return", done); want != have {
			t.Errorf("want %v, have %v", want, have)
		}
		h.wantEnd(StatusNormal)
	})
}
