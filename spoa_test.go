package spoa

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-kit/log"
	"github.com/go-kit/log/level"
	"github.com/oklog/run"
	"github.com/spoa-go/spoa/internal/drain"
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

var ownCode = regexp.MustCompile(`/(spoa|conn|worker|client|outbox|siblings)\.go:`)

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

// halves reads from one pipe and writes to another, so that either can end.
type halves struct {
	net.Conn
	in net.Conn
}

func (h halves) Read(b []byte) (int, error)         { return h.in.Read(b) }
func (h halves) SetReadDeadline(at time.Time) error { return h.in.SetReadDeadline(at) }
func (h halves) Close() error {
	h.in.Close()
	return h.Conn.Close()
}

// dialHalves returns the client's ends of what the agent reads, and writes,
// after the HELLOs.
func (l *memListener) dialHalves(t testing.TB) (in, out net.Conn) {
	t.Helper()
	in, reads := net.Pipe()
	out, writes := net.Pipe()
	t.Cleanup(func() { in.Close(); out.Close() })
	l.offer(t, halves{writes, reads})
	rawHello(t, halves{in, out})
	return in, out
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
	h := &haproxy{t: t, nc: nc, frames: make(chan frame, 1000)}
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
	want := inWordsFrame(frame{kind: frameAck, flags: flagFIN, stream: stream, id: id, payload: numberedActions(id)})
	if have := inWordsFrame(f); want != have {
		h.t.Fatalf("want %s, have %s", want, have)
	}
}

// wantAcks takes the ACKs of these streams, rising, in whatever order they come:
// a handler kept from running may be overtaken.
func (h *haproxy) wantAcks(streams ...uint64) {
	h.t.Helper()
	var have []uint64
	for range streams {
		have = append(have, h.want(frameAck).stream)
	}
	if slices.Sort(have); !slices.Equal(streams, have) {
		h.t.Errorf("want ACKs of the streams %d, have %d", streams, have)
	}
}

// wantEnd takes an AGENT-DISCONNECT, of which it returns the message, and the
// end.
func (h *haproxy) wantEnd(status Status) (message string) {
	h.t.Helper()
	f := h.want(frameAgentDisconnect)
	d := parseDisconnect(f.payload)
	if d.Status != status || f.flags != flagFIN || f.stream != 0 || f.id != 0 {
		h.t.Fatalf("want AGENT-DISCONNECT %d, have %s", status, inWordsFrame(f))
	}
	h.wantEOF()
	return d.Message
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

// rawHello exchanges HELLOs and reads not a byte more.
func rawHello(t testing.TB, nc net.Conn) {
	t.Helper()
	rawHelloAs(t, nc, offered)
}

func rawHelloAs(t testing.TB, nc net.Conn, offer hello) {
	t.Helper()
	if _, err := io.WriteString(nc, helloFrame(offer)); err != nil {
		t.Fatal(err)
	}
	var size [lengthSize]byte
	if _, err := io.ReadFull(nc, size[:]); err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, nc, int64(binary.BigEndian.Uint32(size[:]))); err != nil {
		t.Fatal(err)
	}
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
		hooks, closed := hooked()
		a, ln := startMem(t, withNumbered(), hooks)
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
		wantTook(t, "Shutdown", start, drain.QuietTime, drain.QuietTime)
		for _, h := range append(hs, mute) {
			if want, have := "shutting down", h.wantEnd(StatusNormal); want != have {
				t.Errorf("want message %q, have %q", want, have)
			}
			if err := <-closed; err != nil {
				t.Errorf("want a normal end, have %v", err)
			}
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
		wantTook(t, "four Shutdowns", start, drain.QuietTime, drain.QuietTime)
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
			<-time.After(drain.QuietTime / 2)
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
		wantTook(t, "the rest of the drain", start, drain.QuietTime, drain.QuietTime)
		old.wantEnd(StatusNormal)
	})
}

// With health checks seen, the agent stays until HAProxy has missed some.
func TestShutdownAfterHealthChecks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t, withNumbered())
		asks := ln.dial(t)
		asks.hello()
		asks.wantAnswers()
		asks.nc.Close()
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
			<-time.After(drain.QuietTime / 2)
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

// A listener that is closed in a drain: its connections are closed soon, those in use one after the other, each with the
// answers that were held back while everybody who asks was waiting; health checks are waited for no longer.
func TestShutdownListenerClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hooks, closed := hooked()
		a, ln := startMem(t, withNumbered(), hooks)
		check := ln.dial(t)
		check.helloAs(hello{versions: "2.0", frameSize: 16380, healthcheck: true})
		check.wantEOF()
		idle, first, second := ln.dial(t), ln.dial(t), ln.dial(t)
		for _, h := range []*haproxy{idle, first, second} {
			h.hello()
			h.wantAnswers()
		}
		shut := make(chan error)
		go func() { shut <- a.Shutdown(context.Background()) }()
		synctest.Wait()
		start := time.Now()
		ln.Close()
		var waiting atomic.Int32
		ends := make(chan time.Duration)
		var others atomic.Int32
		others.Store(1)
		// client asks again and again until it is answered together with the end.
		client := func(h *haproxy, pause func(n int) time.Duration) {
			for n := 1; ; n++ {
				<-time.After(pause(n))
				h.send(notifyFrame(1, uint64(n)))
				waiting.Add(1)
				h.wantAck(1, uint64(n))
				<-time.After(time.Microsecond) // for what is in the same Write
				all := waiting.Add(-1)
				select {
				case f := <-h.frames:
					if f.kind != frameAgentDisconnect || all != others.Load() {
						t.Errorf("%s while %d others wait, want the end and %d", inWordsFrame(f), all, others.Load())
					}
					others.Add(-1)
					ends <- time.Since(start)
					return
				default:
				}
			}
		}
		go client(first, func(int) time.Duration { return tick })
		go client(second, func(n int) time.Duration { // for want of a processor, say
			if n%100 < 10 {
				return (20 * time.Millisecond) + (20*time.Millisecond)/2
			}
			return tick
		})
		idle.wantEnd(StatusNormal)
		last := time.Since(start)
		for range 2 {
			end := <-ends
			if end-last < (20*time.Millisecond)-tick { // their looks are out of step
				t.Errorf("connections closed after %v and %v, want about %v in between", last, end, (20 * time.Millisecond))
			}
			last = end
		}
		if err := <-shut; err != nil {
			t.Error(err)
		}
		wantTook(t, "Shutdown", start, (20 * time.Millisecond), 2*time.Second)
		for range 4 {
			if err := <-closed; err != nil {
				t.Errorf("want a normal end, have %v", err)
			}
		}
	})
}

// Answers that are held back leave when the peer has sent its last.
func TestShutdownHalfClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t, withNumbered())
		in, out := ln.dialHalves(t)
		go a.Shutdown(t.Context())
		synctest.Wait()
		ln.Close()
		synctest.Wait()
		h := newHAProxy(t, out)
		start := time.Now()
		if _, err := io.WriteString(in, notifyFrame(1, 1)); err != nil {
			t.Fatal(err)
		}
		h.wantNothing()
		in.Close()
		h.wantAck(1, 1)
		h.wantEOF()
		wantTook(t, "the answer", start, 0, 0)
	})
}

// A connection that is never quiet is held back for a moment only, and loses nothing.
func TestShutdownNeverQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t, withNumbered())
		h := ln.dial(t)
		h.hello()
		shut := make(chan error, 1)
		go func() { shut <- a.Shutdown(context.Background()) }()
		synctest.Wait()
		ln.Close()
		var sent [200]time.Time
		go func() {
			for id := range sent {
				sent[id] = time.Now()
				h.send(notifyFrame(uint64(id), uint64(id)))
				<-time.After((20 * time.Millisecond) / 2)
			}
		}()
		held := 0
		for id := range sent {
			h.wantAck(uint64(id), uint64(id))
			wantTook(t, "an answer", sent[id], 0, 50*time.Millisecond+2*tick)
			if time.Since(sent[id]) > tick {
				held++
			}
		}
		if held == 0 || held > len(sent)/2 {
			t.Errorf("%d of %d answers held back, want some", held, len(sent))
		}
		h.wantEnd(StatusNormal)
		if err := <-shut; err != nil {
			t.Error(err)
		}
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
		wantTook(t, "execute", start, drain.QuietTime, drain.QuietTime)
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

func TestHandshake(t *testing.T) {
	const all = "pipelining,async,fragmentation"
	for _, tt := range []struct {
		name         string
		opts         []Option
		versions     string
		frameSize    uint32
		capabilities string
		engine       string
		want         hello
	}{
		{"HAProxy 2.6", nil, "2.0", 16380, "pipelining,async", "e", hello{capabilities: "pipelining", frameSize: 16380}},
		{"HAProxy 3.2", nil, "2.0", 16380, "pipelining", "e", hello{capabilities: "pipelining", frameSize: 16380}},
		{"list of versions", nil, "1.0, 2.0 ,3.1", 16380, "", "", hello{frameSize: 16380}},
		{"later minor version", nil, "2.7", 16380, "", "", hello{frameSize: 16380}},
		{"no capability, no engine", nil, "2.0", 16380, "", "", hello{frameSize: 16380}},
		{"capabilities with spaces", nil, "2.0", 16380, " async , pipelining ", "e", hello{capabilities: "pipelining", frameSize: 16380}},
		{"unknown capabilities", nil, "2.0", 16380, "pipe,,pipeliningx,xasync", "e", hello{frameSize: 16380}},
		{"least frame size", nil, "2.0", 256, "", "", hello{frameSize: 256}},
		{"peer's frame size is higher", nil, "2.0", 1 << 20, "", "", hello{frameSize: defaultFrameSize}},
		{"greatest frame size", nil, "2.0", math.MaxUint32, "", "", hello{frameSize: defaultFrameSize}},
		{"own frame size is lower", []Option{WithMaxFrameSize(1000)}, "2.0", 16380, "", "", hello{frameSize: 1000}},
		{"own frame size is higher", []Option{WithMaxFrameSize(100000)}, "2.0", 16380, "", "", hello{frameSize: 16380}},
		{"async", []Option{WithAsync()}, "2.0", 16380, all, "e", hello{capabilities: "pipelining,async", frameSize: 16380}},
		{"async without an engine", []Option{WithAsync()}, "2.0", 16380, all, "", hello{capabilities: "pipelining", frameSize: 16380}},
		{"async not offered", []Option{WithAsync()}, "2.0", 16380, "pipelining", "e", hello{capabilities: "pipelining", frameSize: 16380}},
		{"pipelining of 2", []Option{WithPipelining(2)}, "2.0", 16380, all, "e", hello{capabilities: "pipelining", frameSize: 16380}},
		{"pipelining of 1", []Option{WithPipelining(1)}, "2.0", 16380, all, "e", hello{frameSize: 16380}},
		{"pipelining of -1", []Option{WithPipelining(-1)}, "2.0", 16380, all, "e", hello{frameSize: 16380}},
		{"fragmentation", []Option{WithFragmentation(1 << 20)}, "2.0", 16380, "", "", hello{capabilities: "fragmentation", frameSize: 16380}},
		{"everything", []Option{WithFragmentation(1 << 20), WithAsync()}, "2.0", 16380, all, "e", hello{capabilities: all, frameSize: 16380}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, ln := startMem(t, append(tt.opts, withNumbered())...)
			h := ln.dial(t)
			have := h.helloAs(hello{versions: tt.versions, frameSize: tt.frameSize, capabilities: tt.capabilities, engineID: tt.engine})
			tt.want.versions = version
			if have != tt.want {
				t.Errorf("want %+v, have %+v", tt.want, have)
			}
			h.wantAnswers()
			info := a.Conns()[0]
			if info.Capabilities != tt.want.capabilities || info.FrameSize != int(tt.want.frameSize) || info.EngineID != tt.engine || info.HealthCheck {
				t.Errorf("want what was agreed on, have %+v", info)
			}
			h.send(goodbye)
			h.wantEnd(StatusNormal)
		})
	}
}

// The payload of a HELLO, in parts.
var (
	helloVersions     = kv("supported-versions", "\x08\x032.0")
	helloSize         = kv("max-frame-size", "\x03\xfc\xf0\x06")
	helloCapabilities = kv("capabilities", "\x08\x00")
	helloPayload      = helloVersions + helloSize + helloCapabilities
)

func TestHandshakeUnknownKeys(t *testing.T) {
	_, ln := startMem(t, withNumbered())
	for kind := KindNull; kind <= KindBinary; kind++ {
		h := ln.dial(t)
		v := appendValue(nil, valueOf(byte(kind), 7, []byte("text")))
		h.send(rawFrame(frameHAProxyHello, flagFIN, 0, 0, kv("", string(v))+helloPayload+kv("colour", string(v))))
		h.want(frameAgentHello)
		h.wantAnswers()
	}
}

func TestHandshakeRefused(t *testing.T) {
	_, ln := startMem(t)
	good := func(payload string) string { return rawFrame(frameHAProxyHello, flagFIN, 0, 0, payload) }
	for _, tt := range []struct {
		name string
		want Status
		wire string
	}{
		{"empty payload", StatusNoVersion, good("")},
		{"no version", StatusNoVersion, good(helloSize + helloCapabilities)},
		{"the agent's key of the version", StatusNoVersion, good(kv("version", "\x08\x032.0") + helloSize + helloCapabilities)},
		{"no frame size", StatusNoFrameSize, good(helloVersions + helloCapabilities)},
		{"no capabilities", StatusNoCapabilities, good(helloVersions + helloSize)},
		{"version 1", StatusBadVersion, good(kv("supported-versions", "\x08\x071.0,3.0") + helloSize + helloCapabilities)},
		{"no such version", StatusBadVersion, good(kv("supported-versions", "\x08\x022.") + helloSize + helloCapabilities)},
		{"empty version", StatusBadVersion, good(kv("supported-versions", "\x08\x00") + helloSize + helloCapabilities)},
		{"frame size 0", StatusBadFrameSize, good(helloVersions + kv("max-frame-size", "\x03\x00") + helloCapabilities)},
		{"frame size 255", StatusBadFrameSize, good(helloVersions + kv("max-frame-size", "\x03\xff\x00") + helloCapabilities)},
		{"no FIN", StatusNoFragmentation, rawFrame(frameHAProxyHello, 0, 0, 0, helloPayload)},
		{"stream id", StatusInvalidFrame, rawFrame(frameHAProxyHello, flagFIN, 1, 0, helloPayload)},
		{"frame id", StatusInvalidFrame, rawFrame(frameHAProxyHello, flagFIN, 0, 1, helloPayload)},
		{"version is no string", StatusInvalidFrame, good(kv("supported-versions", "\x09\x032.0") + helloSize + helloCapabilities)},
		{"frame size is a string", StatusInvalidFrame, good(helloVersions + kv("max-frame-size", "\x08\x0516380") + helloCapabilities)},
		{"frame size is negative", StatusInvalidFrame, good(helloVersions + kv("max-frame-size", string(appendValue(nil, Int32(-1)))) + helloCapabilities)},
		{"capabilities are null", StatusInvalidFrame, good(helloVersions + helloSize + kv("capabilities", "\x00"))},
		{"engine-id is a number", StatusInvalidFrame, good(helloPayload + kv("engine-id", "\x03\x01"))},
		{"healthcheck is a string", StatusInvalidFrame, good(helloPayload + kv("healthcheck", "\x08\x04true"))},
		{"unknown key of a reserved type", StatusInvalidFrame, good(helloPayload + kv("colour", "\x0a"))},
		{"key cut short", StatusInvalidFrame, good(helloPayload + "\x05colo")},
		{"key without a value", StatusInvalidFrame, good(helloPayload + "\x06colour")},
		{"NOTIFY", StatusInvalidFrame, notifyFrame(1, 1)},
		{"UNSET", StatusInvalidFrame, rawFrame(frameUnset, flagFIN, 0, 0, "")},
		{"HAPROXY-DISCONNECT", StatusInvalidFrame, goodbye},
		{"AGENT-HELLO", StatusInvalidFrame, string(appendHello(nil, frameAgentHello, &offered))},
		{"unknown type", StatusInvalidFrame, rawFrame(42, flagFIN, 0, 0, helloPayload)},
		{"HTTP", StatusFrameTooBig, "GET / HTTP/1.1\r\nHost: a\r\n\r\n"},
		{"TLS", StatusFrameTooBig, "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"},
		{"length 0", StatusInvalidFrame, "\x00\x00\x00\x00"},
		{"length 6", StatusInvalidFrame, "\x00\x00\x00\x06\x01\x00\x00\x00\x01\x00"},
		{"length 16385", StatusFrameTooBig, "\x00\x00\x40\x01\x01"},
		{"length 2^31", StatusFrameTooBig, "\x80\x00\x00\x00"},
		{"length 2^32-1", StatusFrameTooBig, "\xff\xff\xff\xff"},
		{"ids cut short", StatusInvalidFrame, "\x00\x00\x00\x07\x01\x00\x00\x00\x01\x00\xff"},
		{"second HELLO", StatusInvalidFrame, good(helloPayload) + good(helloPayload)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := ln.dial(t)
			h.try(tt.wire)
			if tt.name == "second HELLO" {
				h.want(frameAgentHello)
			}
			h.wantEnd(tt.want)
		})
	}
}

// What a peer says is not echoed to it beyond the least frame size.
func TestRefusalIsShort(t *testing.T) {
	_, ln := startMem(t)
	h := ln.dial(t)
	long := strings.Repeat("\x00", 10000)
	h.try(rawFrame(frameHAProxyHello, flagFIN, 0, 0, kv("supported-versions", string(appendValue(nil, String(long))))+helloSize+helloCapabilities))
	f := h.want(frameAgentDisconnect)
	if n := len(f.payload) + minFrameLen; n > minFrameSize {
		t.Errorf("want at most %d bytes, have %d", minFrameSize, n)
	}
}

func TestHealthCheck(t *testing.T) {
	for _, on := range []bool{true, false} {
		t.Run(fmt.Sprint(on), func(t *testing.T) {
			closed := make(chan Peer, 1)
			_, ln := startMem(t, withNumbered(), WithHooks(Hooks{ConnClosed: func(p Peer, err error) {
				if err != nil {
					t.Error(err)
				}
				closed <- p
			}}))
			h := ln.dial(t)
			h.send(rawFrame(frameHAProxyHello, flagFIN, 0, 0, helloPayload+kv("healthcheck", string(appendValue(nil, Bool(on))))))
			var have hello
			if err := have.parse(frameAgentHello, h.want(frameAgentHello).payload); err != nil {
				t.Fatal(err)
			}
			if want := (hello{versions: version, frameSize: 16380}); want != have {
				t.Errorf("want %+v, have %+v", want, have)
			}
			if !on {
				h.wantAnswers()
				h.nc.Close()
			} else {
				h.wantEOF()
			}
			if p := receive(t, "ConnClosed", closed); p.HealthCheck != on {
				t.Errorf("want HealthCheck %v, have %+v", on, p)
			}
		})
	}
}

// A DISCONNECT is answered after the NOTIFYs before it.
func TestDisconnectInFlight(t *testing.T) {
	g := newGate()
	_, ln := startMem(t, WithHandler("number", g))
	h := ln.dial(t)
	h.hello()
	want := make(map[uint64]bool)
	for id := range uint64(20) {
		h.send(notifyFrame(id, id+1))
		want[id] = true
	}
	g.wait(t, 20)
	h.send(goodbye)
	close(g.open)
	for range 20 {
		f := h.want(frameAck)
		if !want[f.stream] || f.id != f.stream+1 {
			t.Fatalf("want one of %v, have %s", want, inWordsFrame(f))
		}
		delete(want, f.stream)
	}
	if want, have := "normal", h.wantEnd(StatusNormal); want != have {
		t.Errorf("want message %q, have %q", want, have)
	}
}

// A handler that takes too long does not keep the connection of who has left.
func TestDisconnectStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		g.heeds = true
		_, ln := startMem(t, WithHandler("number", g))
		h := ln.dial(t)
		h.hello()
		h.send(notifyFrame(1, 1))
		g.wait(t, 1)
		start := time.Now()
		h.send(goodbye)
		h.wantEOF()
		wantTook(t, "the end", start, endGrace, endGrace+time.Second)
	})
}

// A fault ends the connection, but what was asked before it is answered: HAProxy
// has other streams wait on that connection.
func TestFaultInFlight(t *testing.T) {
	g := newGate()
	_, ln := startMem(t, WithHandler("number", g))
	h := ln.dial(t)
	h.hello()
	h.send(notifyFrame(1, 1))
	g.wait(t, 1)
	h.send(rawFrame(frameNotify, flagFIN, 2, 2, "\x01"))
	close(g.open)
	h.wantAck(1, 1)
	h.wantEnd(StatusInvalidFrame)
}

// Who ends amid a row of NOTIFYs leaves the workers to the others.
func TestFaultAfterNotify(t *testing.T) {
	_, ln := startMem(t, withNumbered(), WithWorkers(2))
	for range 3 {
		h := ln.dial(t)
		h.hello()
		h.send(notifyFrame(1, 1), rawFrame(frameNotify, flagFIN, 2, 2, "\x01"))
		h.wantAck(1, 1)
		h.wantEnd(StatusInvalidFrame)
	}
	h := ln.dial(t)
	h.hello()
	h.wantAnswers()
}

// writesConn counts Writes and notes those that don't end where a frame ends.
type writesConn struct {
	net.Conn
	mu     sync.Mutex
	writes [][]byte
}

func (c *writesConn) Write(b []byte) (int, error) {
	c.mu.Lock()
	c.writes = append(c.writes, slices.Clone(b))
	c.mu.Unlock()
	return c.Conn.Write(b)
}

// haproxy#3478: an AGENT-HELLO in two segments makes HAProxy reset the
// connection.
func TestOneWrite(t *testing.T) {
	g := newGate()
	_, ln := startMem(t, withNumbered(), WithHandler("slow", g), WithFragmentation(1000))
	client, server := net.Pipe()
	defer client.Close()
	w := &writesConn{Conn: server}
	ln.offer(t, w)
	h := newHAProxy(t, client)
	h.hello()
	slow := string(appendMessage(nil, NewMessage("slow")))
	for id := range uint64(100) {
		h.send(notifyFrame(id, 1), notifyFrame(id, 2))
		if id < 20 {
			h.send(rawFrame(frameNotify, flagFIN, id, 3, slow))
		}
	}
	close(g.open)
	for range 220 {
		h.want(frameAck)
	}
	h.send(goodbye)
	h.wantEnd(StatusNormal)

	w.mu.Lock()
	defer w.mu.Unlock()
	frames := 0
	for i, b := range w.writes {
		n := 0
		if err := eachFrame(strings.NewReader(string(b)), func(f frame) {
			if n++; f.kind != frameAck && n > 1 {
				t.Errorf("write %d: want %s alone", i, frameNames[f.kind])
			}
		}); err != nil {
			t.Errorf("write %d: want whole frames, have %v", i, err)
		}
		frames += n
	}
	if want := 222; want != frames {
		t.Errorf("want %d frames, have %d", want, frames)
	}
}

// byteConn reads and writes a byte at a time.
type byteConn struct{ net.Conn }

func (c byteConn) Read(b []byte) (int, error) { return c.Conn.Read(b[:min(len(b), 1)]) }

func (c byteConn) Write(b []byte) (n int, err error) {
	for ; n < len(b) && err == nil; n++ {
		_, err = c.Conn.Write(b[n : n+1])
	}
	return n, err
}

func TestByteByByte(t *testing.T) {
	_, ln := startMem(t, withNumbered(), WithFragmentation(1000))
	client, server := net.Pipe()
	defer client.Close()
	ln.offer(t, byteConn{server})
	h := newHAProxy(t, byteConn{client})
	h.hello()
	for id := range uint64(50) {
		h.send(notifyFrame(1<<40+id, id))
		h.wantAck(1<<40+id, id)
	}
	h.send(goodbye)
	h.wantEnd(StatusNormal)
}

// Ids are 64 bits wide and come back as they came, those of each connection on
// it.
func TestIDs(t *testing.T) {
	_, ln := startMem(t, withNumbered())
	ids := []uint64{0, 1, 239, 240, 2287, 2288, math.MaxInt32, math.MaxUint32, 1 << 40, math.MaxInt64, math.MaxUint64}
	var hs []*haproxy
	for _, engine := range []string{"one", "two", "two"} {
		h := ln.dial(t)
		offer := offered
		offer.engineID = engine
		h.helloAs(offer)
		hs = append(hs, h)
	}
	for _, stream := range ids {
		for _, id := range ids {
			for _, h := range hs {
				h.send(notifyFrame(stream, id))
			}
			for _, h := range hs {
				h.wantAck(stream, id)
			}
		}
	}
}

// notifySized returns a NOTIFY whose length field says n.
func notifySized(n int) string {
	pad := n - 5 - 2 // type, flags, ids
	for l := pad; ; l-- {
		payload := string(appendMessage(nil, NewMessage("number", Arg{"", String(strings.Repeat("x", l))})))
		if len(payload) == pad {
			return rawFrame(frameNotify, flagFIN, 1, 2, payload)
		}
	}
}

func TestFrameSize(t *testing.T) {
	for _, size := range []int{300, 4092, 4093, 16380, 65535, 1 << 20} {
		_, ln := startMem(t, withNumbered(), WithMaxFrameSize(1<<20))
		offer := offered
		offer.frameSize = uint32(size)
		h := ln.dial(t)
		h.helloAs(offer)
		h.send(notifySized(size))
		h.wantAck(1, 2)
		h.send(notifySized(size-1), notifySized(size))
		h.wantAck(1, 2)
		h.wantAck(1, 2)
		h.try(notifySized(size + 1))
		h.wantEnd(StatusFrameTooBig)
	}
}

func TestUnknownFrames(t *testing.T) {
	_, ln := startMem(t, withNumbered())
	h := ln.dial(t)
	h.hello()
	for kind := range 256 {
		switch kind {
		case frameUnset, frameNotify, frameHAProxyHello, frameHAProxyDisconnect:
			continue
		}
		h.send(rawFrame(byte(kind), flagFIN, 1, 1, "\xff\xff"), rawFrame(byte(kind), 0, 1<<40, 1, ""))
	}
	h.wantAnswers()
}

func TestNotifyRefusedByAgent(t *testing.T) {
	_, ln := startMem(t, withNumbered())
	healthy := ln.dial(t)
	healthy.hello()
	argument := func(value string) string { return "\x01m\x01\x01a" + value }
	for name, payload := range map[string]string{
		"type 10":                 argument("\x0a"),
		"type 15":                 argument("\x0f\x00"),
		"type 26, flags":          argument("\x1a\x00"),
		"no number of arguments":  "\x01m",
		"arguments beyond":        "\x01m\xff\x01a\x00",
		"second message cut":      number + "\x06numb",
		"string beyond":           argument("\x08\x05abc"),
		"string of 2^64-1":        argument("\x08\xff\xf1\xfe\xfe\xfe\xfe\xfe\xfe\xfe\x0eabc"),
		"varint of 11 bytes":      argument("\x05\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x00"),
		"varint beyond 64 bits":   argument("\x05\xff\xf1\xfe\xfe\xfe\xfe\xfe\xfe\xfe\x7f"),
		"int32 of 2^31":           argument("\x02" + string(appendVarint(nil, 1<<31))),
		"uint32 of 2^32":          argument("\x03" + string(appendVarint(nil, 1<<32))),
		"IPv4 of 3 bytes":         argument("\x06\x01\x02\x03"),
		"IPv6 of 15 bytes":        argument("\x07\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f"),
		"name of 2^31 bytes":      string(appendVarint(nil, 1<<31)) + "m\x00",
		"argument of 2^63 length": "\x01m\x01" + string(appendVarint(nil, 1<<63)),
	} {
		t.Run(name, func(t *testing.T) {
			h := ln.dial(t)
			h.hello()
			h.send(notifyFrame(1, 1))
			h.send(rawFrame(frameNotify, flagFIN, 2, 2, payload))
			h.wantAck(1, 1)
			h.wantEnd(StatusInvalidFrame)
			healthy.wantAnswers()
		})
	}
}

// An ACK fills the negotiated frame to the last byte, and no further.
func TestAckSize(t *testing.T) {
	const size = 256
	for _, stream := range []uint64{0, math.MaxUint64} {
		for _, fault := range []bool{false, true} {
			errs := make(chan error, 1)
			opts := []Option{
				WithHandlerFunc("fill", func(_ context.Context, m *Message, a *Actions) error {
					n, _ := m.Arg(0).Value.Int()
					a.SetVar(ScopeSess, "v", String(strings.Repeat("x", int(n))))
					errs <- a.Err()
					return nil
				}),
			}
			if fault {
				opts = append(opts, WithFaultVar(ScopeTxn, strings.Repeat("f", 63)))
			}
			_, ln := startMem(t, opts...)
			h := ln.dial(t)
			offer := offered
			offer.frameSize = size
			h.helloAs(offer)
			largest := 0
			for n := 100; n < size; n++ {
				h.send(rawFrame(frameNotify, flagFIN, stream, 1, string(appendMessage(nil, NewMessage("fill", Arg{"", Int64(int64(n))})))))
				f := h.want(frameAck)
				err := receive(t, "a call", errs)
				length := 5 + len(ids(stream, f.id)) + len(f.payload)
				if length > size {
					t.Fatalf("%d bytes of value: want an ACK of at most %d, have %d", n, size, length)
				}
				if err == nil {
					largest = max(largest, length)
				}
			}
			want := size
			if fault {
				want -= len("\x01\x03\x02\x3f") + 63 + len("\x08\x08overload")
			}
			if want != largest {
				t.Errorf("stream %d, fault variable %v: want the largest ACK of %d bytes, have %d", stream, fault, want, largest)
			}
		}
	}
}

// half closes the writing half.
func (h *haproxy) half() {
	h.t.Helper()
	if err := h.nc.(*net.TCPConn).CloseWrite(); err != nil {
		h.t.Fatal(err)
	}
}

// A conversation may break off after any byte: what was said until then is
// answered.
func TestBreaksOff(t *testing.T) {
	_, dial := startTCP(t, withNumbered())
	healthy := newHAProxy(t, dial())
	healthy.hello()
	conversation := []string{helloFrame(offered), notifyFrame(1, 2), notifyFrame(3, 4), goodbye}
	all := strings.Join(conversation, "")
	for cut := range all {
		h := newHAProxy(t, dial())
		h.send(all[:cut])
		h.half()
		end, acks := 0, 0
		for i, f := range conversation {
			if end += len(f); cut < end {
				break
			}
			switch i {
			case 0:
				h.want(frameAgentHello)
			case 1, 2:
				acks++
			}
		}
		h.wantAcks([]uint64{1, 3}[:acks]...)
		h.wantEOF()
		healthy.wantAnswers()
	}
}

// A frame may be cut short after any byte, with a length that says so.
func TestCutFrames(t *testing.T) {
	_, ln := startMem(t, withNumbered())
	healthy := ln.dial(t)
	healthy.hello()
	message := string(appendMessage(nil, NewMessage("number", Arg{"a", Uint64(1 << 40)}, Arg{"", String("text")})))
	for _, whole := range []string{rawFrame(frameHAProxyHello, flagFIN, 0, 0, helloPayload), rawFrame(frameNotify, flagFIN, 1<<40, 1<<50, message), goodbye} {
		for n := range len(whole) - lengthSize {
			wire := string(binary.BigEndian.AppendUint32(nil, uint32(n))) + whole[lengthSize:lengthSize+n]
			h := ln.dial(t)
			kind := whole[lengthSize]
			if kind != frameHAProxyHello {
				h.hello()
			}
			h.try(wire)
			var f frame
			s := slow{}
			if f.parse([]byte(wire[lengthSize:])) {
				s.b = f.payload
			} else {
				s.bad = true
			}
			switch {
			case kind == frameNotify && !s.bad && len(s.messages()) >= 0 && !s.bad:
				h.want(frameAck)
			case kind == frameHAProxyDisconnect && n >= minFrameLen:
				h.wantEnd(StatusNormal)
			case kind == frameHAProxyHello && n >= minFrameLen:
				f := h.want(frameAgentDisconnect)
				if d := parseDisconnect(f.payload); d.Status < StatusInvalidFrame || d.Status > StatusNoCapabilities {
					t.Errorf("%q: want status 4 to 7, have %v", wire, d)
				}
			default:
				h.wantEnd(StatusInvalidFrame)
			}
			healthy.wantAnswers()
		}
	}
}

// Memory is taken for what has come, not for what is announced.
func TestLengthTakesNoMemory(t *testing.T) {
	_, ln := startMem(t, withNumbered(), WithMaxFrameSize(maxFrameSize), WithFragmentation(1<<30))
	offer := offered
	offer.frameSize = maxFrameSize
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 20 {
		h := ln.dial(t)
		h.helloAs(offer)
		h.send("\x0f\xff\xff\xff\x03\x00\x00\x00\x01\x01\x01\x06number\x01\x00\x08" + string(appendVarint(nil, 1<<27)) + strings.Repeat("x", 5000))
		h = ln.dial(t)
		h.helloAs(offer)
		h.send(rawFrame(frameNotify, 0, 1, 1, "\x06number\x01\x00\x08"+string(appendVarint(nil, 1<<29))))
		h.send(rawFrame(frameNotify, flagFIN, 2, 2, number))
		h.wantAck(2, 2)
		h = ln.dial(t)
		h.try("\xff\xff\xff\xff\x03\x00\x00\x00\x01\x01\x01\x06number")
		h.wantEnd(StatusFrameTooBig)
	}
	runtime.ReadMemStats(&after)
	if taken := after.TotalAlloc - before.TotalAlloc; taken > 16<<20 {
		t.Errorf("want less than 16 MiB taken, have %d bytes", taken)
	}
}

// hooked tells of connections that end.
func hooked() (Option, chan error) {
	c := make(chan error, 10000)
	return WithHooks(Hooks{ConnClosed: func(_ Peer, err error) { c <- err }}), c
}

// One answer that isn't read is enough for the connection to end.
func TestAnswerNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hooks, closed := hooked()
		_, ln := startMem(t, withNumbered(), hooks, WithWriteTimeout(4*time.Second))
		nc := ln.raw(t)
		rawHello(t, nc)
		start := time.Now()
		if _, err := io.WriteString(nc, notifyFrame(1, 1)); err != nil {
			t.Fatal(err)
		}
		if err := <-closed; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("want %v, have %v", os.ErrDeadlineExceeded, err)
		}
		wantTook(t, "closing", start, 4*time.Second, 5*time.Second)
	})
}

// breaking is a connection the end of which shows as err.
type breaking struct {
	net.Conn
	err error
}

func (b breaking) Read(p []byte) (int, error) {
	n, err := b.Conn.Read(p)
	if err == io.EOF {
		err = b.err
	}
	return n, err
}

// However a peer goes, that is no fault of anybody's.
func TestNormalEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lines := new(logLines)
		hooks, closed := hooked()
		_, ln := startMem(t, withNumbered(), hooks, WithLogger(level.NewFilter(lines, level.AllowInfo())))
		end := func(err error) error {
			near, far := net.Pipe()
			ln.offer(t, breaking{far, err})
			h := newHAProxy(t, near)
			h.hello()
			h.wantAnswers()
			near.Close()
			defer synctest.Wait() // it is logged after that
			return <-closed
		}
		for _, err := range []error{
			io.EOF, io.ErrClosedPipe, net.ErrClosed,
			&net.OpError{Op: "read", Err: os.NewSyscallError("read", syscall.ECONNRESET)},
			&net.OpError{Op: "write", Err: os.NewSyscallError("write", syscall.EPIPE)},
		} {
			if have := end(err); have != nil {
				t.Errorf("%v: want nil, have %v", err, have)
			}
		}
		if len(lines.lines) > 0 {
			t.Errorf("want no line above debug, have %q", lines.lines)
		}
		odd := errors.New("odd")
		if have := end(odd); have != odd {
			t.Errorf("want %v, have %v", odd, have)
		}
		if have := lines.with("level=warn", "connection ended", "odd"); len(have) != 1 {
			t.Errorf("want one line, have %q", lines.lines)
		}
	})
}

// A peer that doesn't read costs its own connection, and bounded memory.
func TestPeerDoesNotRead(t *testing.T) {
	for _, tt := range []struct {
		name   string
		sleep  time.Duration // of the handler
		value  int           // bytes that it answers with
		spread int           // NOTIFYs that go to workers
		most   int32         // calls
	}{
		{"quick", 0, 10, 0, 10000},
		{"slow", 5 * time.Millisecond, 10, 0, 10000},
		{"long answers", 0, 10000, 0, 100},
		{"slow, long answers", 5 * time.Millisecond, 10000, 0, 100},
		{"long answers behind a worker's", 0, 10000, 1, 100},
		{"long answers of workers", 0, 10000, 1 << 30, 100},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				hooks, closed := hooked()
				var calls atomic.Int32
				a, ln := startMem(t, withNumbered(), hooks, WithWriteTimeout(4*time.Second),
					WithHandlerFunc("flood", func(ctx context.Context, _ *Message, a *Actions) error {
						calls.Add(1)
						if tt.sleep > 0 {
							select {
							case <-time.After(tt.sleep):
							case <-ctx.Done():
							}
						}
						a.SetVar(ScopeSess, "v", String(strings.Repeat("x", tt.value)))
						return nil
					}))
				nc := ln.raw(t)
				rawHello(t, nc)
				synctest.Wait()
				for c := range a.conns {
					c.pace.left = tt.spread
				}
				start := time.Now()
				go func() {
					flood := strings.Repeat(rawFrame(frameNotify, flagFIN, 1, 1, string(appendMessage(nil, NewMessage("flood")))), 100)
					for {
						if _, err := io.WriteString(nc, flood); err != nil {
							return
						}
					}
				}()
				healthy := ln.dial(t)
				healthy.hello()
				for range 30 {
					healthy.wantAnswers()
					<-time.After(100 * time.Millisecond)
				}
				if err := <-closed; !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("want %v, have %v", os.ErrDeadlineExceeded, err)
				}
				wantTook(t, "closing", start, 4*time.Second, 6*time.Second)
				if have := calls.Load(); have > tt.most {
					t.Errorf("want at most %d calls, have %d", tt.most, have)
				}
				healthy.wantAnswers()
			})
		})
	}
}

func TestTimeouts(t *testing.T) {
	const timeout = 3 * time.Second
	for _, tt := range []struct {
		name string
		opt  Option
		say  func(h *haproxy)
		want time.Duration
	}{
		{"nothing", WithHelloTimeout(timeout), func(h *haproxy) {}, timeout},
		{"half a HELLO", WithHelloTimeout(timeout), func(h *haproxy) { h.send(helloFrame(offered)[:20]) }, timeout},
		{"a byte a second", WithHelloTimeout(timeout), func(h *haproxy) {
			for i := range 3 {
				h.send(helloFrame(offered)[i : i+1])
				<-time.After(timeout * 3 / 10)
			}
		}, timeout},
		{"half a NOTIFY", WithHelloTimeout(timeout), func(h *haproxy) {
			h.hello()
			<-time.After(time.Hour)
			h.send(notifyFrame(1, 1)[:13])
		}, time.Hour + timeout},
		{"a byte of NOTIFY a second", WithHelloTimeout(timeout), func(h *haproxy) {
			h.hello()
			for i := range 3 {
				h.send(notifyFrame(1, 1)[i : i+1])
				<-time.After(timeout * 3 / 10)
			}
		}, timeout},
		{"half a NOTIFY behind one", WithHelloTimeout(timeout), func(h *haproxy) {
			h.hello()
			h.send(notifyFrame(1, 1), notifyFrame(1, 1)[:13])
			h.wantAck(1, 1)
		}, timeout},
		{"idle", WithIdleTimeout(timeout), func(h *haproxy) { h.hello() }, timeout},
		{"idle after a NOTIFY", WithIdleTimeout(timeout), func(h *haproxy) {
			h.hello()
			for range 10 {
				<-time.After(timeout - 1)
				h.wantAnswers()
			}
		}, 11*timeout - 10},
		{"idle within a frame", WithIdleTimeout(timeout), func(h *haproxy) {
			h.hello()
			<-time.After(timeout - 1)
			h.send(notifyFrame(1, 1)[:10])
			<-time.After(timeout - 1)
			h.send(notifyFrame(1, 1)[10:])
			h.wantAck(1, 1)
		}, 3*timeout - 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				hooks, closed := hooked()
				_, ln := startMem(t, withNumbered(), tt.opt, hooks)
				<-time.After(1) // the agent's clock takes 0 for never
				start := time.Now()
				h := ln.dial(t)
				tt.say(h)
				h.wantEnd(StatusTimeout)
				wantTook(t, "the end", start, tt.want, tt.want)
				var d *DisconnectError
				if err := <-closed; !errors.As(err, &d) || d.Status != StatusTimeout || d.Remote {
					t.Errorf("want %v, have %v", StatusTimeout, err)
				}
			})
		})
	}
}

// The time for a frame begins with that frame, though every read ends within
// one.
func TestFrameTimeoutBeginsAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, ln := startMem(t, withNumbered(), WithHelloTimeout(3*time.Second))
		h := ln.dial(t)
		h.hello()
		const half = 13
		h.send(notifyFrame(0, 0)[:half])
		for id := range uint64(20) {
			<-time.After(time.Second)
			h.send(notifyFrame(0, id)[half:], notifyFrame(0, id+1)[:half])
			h.wantAck(0, id)
		}
	})
}

// The peer isn't blamed for what the agent was too busy to read.
func TestTimeoutsWhileNotReading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		_, ln := startMem(t, WithHandler("number", g), WithPipelining(2), WithHelloTimeout(time.Second), WithIdleTimeout(2*time.Second))
		h := ln.dial(t)
		h.hello()
		h.send(notifyFrame(1, 1), notifyFrame(1, 1), notifyFrame(1, 1), notifyFrame(2, 2)[:13])
		g.wait(t, 2)
		<-time.After(time.Minute)
		close(g.open)
		for range 3 {
			h.wantAck(1, 1)
		}
		<-time.After(900 * time.Millisecond)
		h.send(notifyFrame(2, 2)[13:])
		h.wantAck(2, 2)
		<-time.After(1900 * time.Millisecond)
		h.wantAnswers()
	})
}

// A connection gives its buffer back when it has been quiet for a moment, also
// while it holds the beginning of a frame.
func TestShrinks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, ln := startMem(t, withNumbered())
		for held := minBuffer - 2; held <= minBuffer+2; held++ {
			h := ln.dial(t)
			h.hello()
			wire := notifySized(16000)
			h.send(wire)
			h.wantAck(1, 2)
			h.send(wire[:held])
			<-time.After(3 * time.Second)
			h.send(wire[held:])
			h.wantAck(1, 2)
		}
	})
}

// Handlers of a connection run in its window only, and then it is not read.
func TestWindow(t *testing.T) {
	for _, window := range []int{1, 2, 5} {
		for _, before := range []int{0, stallRun + 1} {
			t.Run(fmt.Sprintf("%d after %d", window, before), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					g := newGate()
					a, ln := startMem(t, WithPipelining(window), withNumbered(), WithHandler("slow", g))
					h := ln.dial(t)
					h.hello()
					for range before {
						h.wantAnswers()
					}
					wire := strings.Repeat(rawFrame(frameNotify, flagFIN, 1, 1, string(appendMessage(nil, NewMessage("slow")))), 1000)
					written := make(chan error, 1)
					go func() {
						_, err := io.WriteString(h.nc, wire)
						written <- err
					}()
					<-time.After(10 * time.Second)
					if have := len(g.entered); have != window {
						t.Errorf("want %d calls, have %d", window, have)
					}
					if want, have := window+1, a.Conns()[0].InFlight; want != have { // one waits to be begun
						t.Errorf("want %d in flight, have %d", want, have)
					}
					if len(written) > 0 {
						t.Error("want reading to stop, have all read")
					}
					close(g.open)
					for range 1000 {
						h.want(frameAck)
					}
				})
			})
		}
	}
}

// Who waits for its own handlers leaves them the worker.
func TestWindowLeavesWorker(t *testing.T) {
	for _, took := range []time.Duration{0, slowCall * 2, tick / 2, 2 * tick} {
		synctest.Test(t, func(t *testing.T) {
			_, ln := startMem(t, WithWorkers(1), WithPipelining(1), WithHandlerFunc("number", func(context.Context, *Message, *Actions) error {
				<-time.After(took)
				return nil
			}))
			h := ln.dial(t)
			h.hello()
			for range 5 { // what comes at once decides where the next run
				h.send(strings.Repeat(notifyFrame(1, 1), 20))
				for range 20 {
					h.want(frameAck)
				}
			}
		})
	}
}

// A connection that waits for handlers before it reads on does not after Close.
func TestCloseWindowFull(t *testing.T) {
	for _, opts := range [][]Option{nil, {WithAsync()}} {
		synctest.Test(t, func(t *testing.T) {
			g := newGate()
			hooks, closed := hooked()
			a, ln := startMem(t, append(opts, WithPipelining(2), WithHandler("number", g), hooks)...)
			h := asEngine(t, ln, "engine")
			h.send(notifyFrame(1, 1), notifyFrame(2, 2), notifyFrame(3, 3))
			g.wait(t, 2)
			synctest.Wait()
			a.Close()
			<-closed
			close(g.open)
			synctest.Wait()
			if have := len(g.entered); have > 0 {
				t.Errorf("want no call after Close, have %d", have)
			}
		})
	}
}

// Close while an answer is being written.
func TestCloseWhileWriting(t *testing.T) {
	for range 50 {
		synctest.Test(t, func(t *testing.T) {
			g := newGate()
			a, ln := startMem(t, WithHandler("number", g))
			nc := ln.raw(t)
			rawHello(t, nc)
			io.WriteString(nc, notifyFrame(1, 1)+notifyFrame(2, 2))
			g.wait(t, 2)
			close(g.open)
			synctest.Wait()
			a.Close()
		})
	}
}

// reset has the connection end with an RST.
func (h *haproxy) reset() {
	h.nc.(*net.TCPConn).SetLinger(0)
	h.nc.Close()
}

// A reset costs the connection, in whatever state it is.
func TestReset(t *testing.T) {
	g := newGate()
	g.heeds = true
	lines := new(logLines)
	a, dial := startTCP(t, withNumbered(), WithHandler("slow", g), WithFragmentation(1000), WithAsync(), WithLogger(lines),
		WithHandlerFunc("long", func(_ context.Context, _ *Message, a *Actions) error {
			a.SetVar(ScopeSess, "v", String(strings.Repeat("x", 16000)))
			return nil
		}))
	healthy := newHAProxy(t, dial())
	healthy.helloAs(hello{versions: "2.0", frameSize: 16380}) // no sibling of the others
	slow := rawFrame(frameNotify, flagFIN, 1, 1, string(appendMessage(nil, NewMessage("slow"))))
	for _, tt := range []struct {
		name string
		say  func(h *haproxy)
	}{
		{"nothing said", func(h *haproxy) {}},
		{"half a length", func(h *haproxy) { h.send("\x00\x00") }},
		{"half a HELLO", func(h *haproxy) { h.send(helloFrame(offered)[:20]) }},
		{"HELLO not awaited", func(h *haproxy) { h.send(helloFrame(offered)) }},
		{"agreed", func(h *haproxy) { h.hello() }},
		{"half a NOTIFY", func(h *haproxy) { h.hello(); h.send(notifyFrame(1, 1)[:10]) }},
		{"half of a fragmented NOTIFY", func(h *haproxy) { h.hello(); h.send(rawFrame(frameNotify, 0, 1, 1, number[:3])) }},
		{"ACK not awaited", func(h *haproxy) { h.hello(); h.send(notifyFrame(1, 1)) }},
		{"20 in flight", func(h *haproxy) { h.hello(); h.send(strings.Repeat(slow, 20)); g.wait(t, 20) }},
		{"ACKs not read", func(h *haproxy) {
			rawHello(t, h.nc)
			long := rawFrame(frameNotify, flagFIN, 1, 1, string(appendMessage(nil, NewMessage("long"))))
			h.send(strings.Repeat(long, 500))
		}},
		{"DISCONNECT not awaited", func(h *haproxy) { h.hello(); h.send(goodbye) }},
		{"DISCONNECT of the agent", func(h *haproxy) { h.send("GET / HTTP/1.1\r\n\r\n"); h.wantEnd(StatusFrameTooBig) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for range 5 {
				var h *haproxy
				if tt.name == "ACKs not read" {
					h = &haproxy{t: t, nc: dial()}
				} else {
					h = newHAProxy(t, dial())
				}
				tt.say(h)
				h.reset()
			}
			healthy.wantAnswers()
			eventually(t, "one connection left", func() bool { return len(a.Conns()) == 1 })
		})
	}
	if have := lines.with("level=warn", "connection ended", "reset"); len(have) > 0 {
		t.Errorf("want a reset to be a normal end, have %q", have)
	}
}

// Who sends no more may still read.
func TestHalfClose(t *testing.T) {
	g := newGate()
	_, dial := startTCP(t, withNumbered(), WithHandler("slow", g))
	h := newHAProxy(t, dial())
	h.hello()
	slow := string(appendMessage(nil, NewMessage("slow")))
	h.send(notifyFrame(1, 1), rawFrame(frameNotify, flagFIN, 2, 2, slow), notifyFrame(3, 3)[:10])
	h.half()
	h.wantAck(1, 1)
	g.wait(t, 1)
	close(g.open)
	h.wantAck(2, 2)
	h.wantEOF()
}

// Half-open connections don't keep a healthy one waiting.
func TestHalfOpen(t *testing.T) {
	n := 2000
	if testing.Short() {
		n = 200
	}
	hooks, closed := hooked()
	a, dial := startTCP(t, withNumbered(), hooks)
	healthy := newHAProxy(t, dial())
	healthy.hello()
	var ncs []net.Conn
	for i := range n {
		nc := dial()
		switch i % 4 {
		case 1:
			io.WriteString(nc, helloFrame(offered)[:30])
		case 2:
			io.WriteString(nc, helloFrame(offered)+notifyFrame(1, 1)[:8])
		case 3:
			io.WriteString(nc, "\x00\x00\x3f\xff")
		}
		if ncs = append(ncs, nc); i%100 == 0 {
			healthy.wantAnswers()
		}
	}
	eventually(t, "all accepted", func() bool { return len(a.Conns()) == n+1 })
	healthy.wantAnswers()
	for _, nc := range ncs {
		nc.Close()
	}
	for range ncs {
		if err := receive(t, "a connection's end", closed); err != nil {
			t.Errorf("want a normal end, have %v", err)
		}
	}
	healthy.wantAnswers()
}

// Connections come and go as fast as they can.
func TestChurn(t *testing.T) {
	n := 5000
	if testing.Short() {
		n = 500
	}
	a, dial := startTCP(t, withNumbered())
	healthy := newHAProxy(t, dial())
	healthy.hello()
	addr := healthy.nc.RemoteAddr().String()
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range n / 4 {
				nc, err := net.Dial("tcp", addr)
				if err != nil {
					t.Error(err)
					return
				}
				switch (w + i) % 3 {
				case 1:
					io.WriteString(nc, helloFrame(offered)+notifyFrame(1, 1))
				case 2:
					nc.(*net.TCPConn).SetLinger(0)
				}
				nc.Close()
			}
		})
	}
	wg.Wait()
	healthy.wantAnswers()
	eventually(t, "one connection left", func() bool { return len(a.Conns()) == 1 })
}

// fragments cuts payload into frames, behind each of the cuts.
func fragments(stream, id uint64, payload string, cuts ...int) (frames []string) {
	begin, kind := 0, byte(frameNotify)
	for _, cut := range append(cuts, len(payload)) {
		flags := uint32(0)
		if cut == len(payload) {
			flags = flagFIN
		}
		frames = append(frames, rawFrame(kind, flags, stream, id, payload[begin:cut]))
		begin, kind = cut, frameUnset
	}
	return frames
}

// A NOTIFY may be cut anywhere, and its values come out whole.
func TestFragments(t *testing.T) {
	got := make(chan string, 10)
	_, ln := startMem(t, WithFragmentation(1000), WithFallback(HandlerFunc(func(ctx context.Context, m *Message, a *Actions) error {
		s := m.Name()
		for name, v := range m.Args() {
			s += fmt.Sprintf(" %s=%v:%q", name, v.Kind(), v.String())
		}
		got <- s
		return numbered(ctx, m, a)
	})))
	payload := string(appendMessage(appendMessage(nil, NewMessage("one", Arg{"n", Uint64(math.MaxUint64)}, Arg{"long", String(strings.Repeat("s", 250))})),
		NewMessage("two", Arg{"", Bool(true)}, Arg{"b", Binary([]byte("\x00\xff"))}, Arg{"null", Value{}})))
	want := []string{fmt.Sprintf("one n=uint64:\"18446744073709551615\" long=string:%q", strings.Repeat("s", 250)),
		`two =bool:"true" b=binary:"\x00\xff" null=null:"<null>"`}
	h := ln.dial(t)
	if agreed := h.hello(); !agreed.can("fragmentation") {
		t.Fatalf("want fragmentation announced, have %+v", agreed)
	}
	check := func(frames []string) {
		t.Helper()
		h.send(frames...)
		f := h.want(frameAck)
		if f.stream != 1<<40 || f.id != 7 || f.flags != flagFIN || f.abort() {
			t.Fatalf("want an ACK of the ids, have %s", inWordsFrame(f))
		}
		for _, want := range want {
			if have := receive(t, "a call", got); want != have {
				t.Fatalf("want %s, have %s", want, have)
			}
		}
	}
	for cut := range len(payload) {
		check(fragments(1<<40, 7, payload, cut))
		check(fragments(1<<40, 7, payload, cut/2, cut))
	}
	var all []int
	for cut := range payload {
		all = append(all, cut)
	}
	check(fragments(1<<40, 7, payload, all...))
}

func TestFragmentRules(t *testing.T) {
	const max = 300
	message := func(n int) string { // a payload of n bytes
		return string(appendMessage(nil, NewMessage("number", Arg{"", String(strings.Repeat("x", n-len("\x06number\x01\x00\x08\xf0\x00")))})))
	}
	first := func(stream, id uint64) string { return rawFrame(frameNotify, 0, stream, id, number[:3]) }
	last := func(stream, id uint64) string { return rawFrame(frameUnset, flagFIN, stream, id, number[3:]) }
	type step struct {
		send       string
		stream, id uint64 // of the ACK; 0, 0: none
		refused    bool   // the ACK says ABORT
	}
	for _, tt := range []struct {
		name         string
		off          bool
		capabilities string
		steps        []step
		end          Status // 0: it goes on
	}{
		{name: "not announced", off: true, steps: []step{{send: first(1, 1)}}, end: StatusNoFragmentation},
		{name: "not announced, UNSET", off: true, steps: []step{{send: last(1, 1)}}, end: StatusNoFragmentation},
		{name: "one frame and another", steps: []step{
			{first(1, 1) + last(1, 1), 1, 1, false}, {first(2, 1) + last(2, 1), 2, 1, false}}},
		{name: "abort at once", steps: []step{
			{send: rawFrame(frameNotify, flagAbort, 1, 1, number)}, {send: rawFrame(frameNotify, flagAbort|flagFIN, 1, 1, number)}}},
		{name: "abort later", steps: []step{
			{send: first(1, 1) + rawFrame(frameUnset, flagAbort|flagFIN, 1, 1, "")}, {first(1, 1) + last(1, 1), 1, 1, false}}},
		{name: "abort later without FIN", steps: []step{
			{send: first(1, 1) + rawFrame(frameUnset, flagAbort, 1, 1, "xxx")}, {first(1, 1) + last(1, 1), 1, 1, false}}},
		{name: "another stream's begins", steps: []step{{send: first(1, 1) + first(2, 1)}}, end: StatusInterlaced},
		{name: "another frame's begins", steps: []step{{send: first(1, 1) + first(1, 2)}}, end: StatusInterlaced},
		{name: "the same begins", steps: []step{{send: first(1, 1) + first(1, 1)}}, end: StatusInterlaced},
		{name: "another one's end", steps: []step{{send: first(1, 1) + last(2, 1)}}, end: StatusInterlaced},
		{name: "another frame's end", steps: []step{{send: first(1, 1) + last(1, 2)}}, end: StatusInterlaced},
		{name: "a whole one in between", capabilities: "pipelining", steps: []step{
			{first(1, 1) + notifyFrame(2, 2), 2, 2, false}, {last(1, 1), 1, 1, false}}},
		{name: "a whole one in between, without pipelining", steps: []step{
			{send: first(1, 1) + notifyFrame(2, 2)}}, end: StatusInterlaced},
		{name: "no beginning", steps: []step{{send: last(1, 1)}}, end: StatusFrameIDNotFound},
		{name: "no beginning any more", steps: []step{
			{first(1, 1) + last(1, 1), 1, 1, false}, {send: last(1, 1)}}, end: StatusFrameIDNotFound},
		{name: "no beginning but aborted", steps: []step{
			{send: first(1, 1) + rawFrame(frameUnset, flagAbort|flagFIN, 1, 1, "") + last(1, 1)}}, end: StatusFrameIDNotFound},
		{name: "malformed when whole", steps: []step{
			{send: first(1, 1) + rawFrame(frameUnset, flagFIN, 1, 1, "x")}}, end: StatusInvalidFrame},
		{name: "the longest", steps: []step{{strings.Join(fragments(1, 1, message(max), 250), ""), 1, 1, false}}},
		{name: "too long", steps: []step{
			{strings.Join(fragments(1, 1, message(max+1), 250), ""), 1, 1, true}, {notifyFrame(2, 2), 2, 2, false}}},
		{name: "too long, the rest swallowed", steps: []step{
			{strings.Join(fragments(1, 1, message(max+100), 200, 301, 310, 320), ""), 1, 1, true},
			{first(2, 1) + last(2, 1), 2, 1, false}, {notifyFrame(2, 2), 2, 2, false}}},
		// HAProxy sends no more of what the agent has given up.
		{name: "too long, no rest", steps: []step{
			{rawFrame(frameNotify, 0, 1, 1, message(max+1)), 1, 1, true},
			{notifyFrame(2, 2), 2, 2, false}, {first(3, 1) + last(3, 1), 3, 1, false}}},
		{name: "too long, and again", steps: []step{
			{rawFrame(frameNotify, 0, 1, 1, message(max+1)), 1, 1, true},
			{rawFrame(frameNotify, 0, 2, 1, message(max+1)) + rawFrame(frameUnset, 0, 2, 1, "rest"), 2, 1, true},
			{first(1, 1) + last(1, 1), 1, 1, false}}},
		{name: "too long, no beginning of others", steps: []step{
			{rawFrame(frameNotify, 0, 1, 1, message(max+1)), 1, 1, true}, {send: last(2, 1)}}, end: StatusFrameIDNotFound},
		{name: "too long, no beginning of another frame", steps: []step{
			{rawFrame(frameNotify, 0, 1, 1, message(max+1)), 1, 1, true}, {send: last(1, 2)}}, end: StatusFrameIDNotFound},
		{name: "too long, aborted, no beginning", steps: []step{
			{rawFrame(frameNotify, 0, 1, 1, message(max+1)) + rawFrame(frameUnset, flagAbort, 1, 1, ""), 1, 1, true}, {send: last(1, 1)}}, end: StatusFrameIDNotFound},
		{name: "too long, ended, no beginning", steps: []step{
			{rawFrame(frameNotify, 0, 1, 1, message(max+1)) + last(1, 1), 1, 1, true}, {send: last(1, 1)}}, end: StatusFrameIDNotFound},
	} {
		t.Run(tt.name, func(t *testing.T) {
			opts := []Option{withNumbered(), WithFragmentation(max)}
			if tt.off {
				opts = opts[:1]
			}
			_, ln := startMem(t, opts...)
			h := ln.dial(t)
			offer := offered
			offer.capabilities = tt.capabilities
			h.helloAs(offer)
			for _, s := range tt.steps {
				h.send(s.send)
				switch {
				case s.refused:
					want := inWordsFrame(frame{kind: frameAck, flags: flagFIN | flagAbort, stream: s.stream, id: s.id})
					if have := inWordsFrame(h.want(frameAck)); want != have {
						t.Fatalf("want %s, have %s", want, have)
					}
				case s.stream > 0:
					h.wantAck(s.stream, s.id)
				}
			}
			if tt.end != 0 {
				h.wantEnd(tt.end)
				return
			}
			h.wantAnswers()
		})
	}
}

// asEngine returns a connection of that engine.
func asEngine(t testing.TB, ln *memListener, engine string) *haproxy {
	t.Helper()
	h := ln.dial(t)
	offer := offered
	offer.engineID = engine
	h.helloAs(offer)
	synctest.Wait() // it is a sibling once it has said HELLO
	return h
}

// wantNothing checks that nothing has come, in a bubble.
func (h *haproxy) wantNothing() {
	h.t.Helper()
	synctest.Wait()
	select {
	case f, ok := <-h.frames:
		if !ok {
			h.t.Errorf("want the connection to live, have its end (%v)", h.err)
			return
		}
		h.t.Errorf("want nothing, have %s", inWordsFrame(f))
	default:
	}
}

// An ACK whose connection has gone leaves by another one of the same engine and
// listener, once.
func TestAsync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		a, ln := startMem(t, WithAsync(), withNumbered(), WithHandler("slow", g))
		elsewhere := newMemListener()
		served := make(chan error, 1)
		go func() { served <- a.Serve(elsewhere) }()
		slow := string(appendMessage(nil, NewMessage("slow")))

		gone := asEngine(t, ln, "one")
		sibling := asEngine(t, ln, "one")
		cold := asEngine(t, ln, "") // has no part in it
		others := []*haproxy{asEngine(t, ln, "two"), asEngine(t, elsewhere, "one"), cold}
		plain := ln.dial(t) // did not offer it
		plain.helloAs(hello{versions: "2.0", frameSize: 16380, engineID: "one"})
		others = append(others, plain)

		gone.wantAnswers() // on its own connection
		for id := range uint64(10) {
			gone.send(rawFrame(frameNotify, flagFIN, id, id, slow))
		}
		g.wait(t, 10)
		gone.nc.Close()
		synctest.Wait()
		close(g.open)
		seen := make(map[uint64]bool)
		for range 10 {
			f := sibling.want(frameAck)
			if f.stream != f.id || f.id > 9 || seen[f.id] || string(f.payload) != string(numberedActions(f.id)) {
				t.Errorf("want each of the ten once, have %s", inWordsFrame(f))
			}
			seen[f.id] = true
		}
		for _, h := range append(others, sibling) {
			h.wantNothing()
			h.wantAnswers()
		}
	})
}

// Without a sibling the answer is dropped, and the log says so now and then.
func TestAsyncNobodyLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		lines := new(logLines)
		_, ln := startMem(t, WithAsync(), WithHandler("number", g), WithLogger(lines))
		other := asEngine(t, ln, "two")
		gone := asEngine(t, ln, "one")
		sibling := asEngine(t, ln, "one")
		for id := range uint64(10) {
			gone.send(notifyFrame(id, id))
		}
		g.wait(t, 10)
		gone.nc.Close()
		synctest.Wait()
		sibling.nc.Close()
		synctest.Wait()
		close(g.open)
		other.wantNothing()
		if have := lines.with("level=warn", "answers dropped", "engine=one"); len(have) != 1 {
			t.Errorf("want one line, have %q", have)
		}
	})
}

// An ACK leaves by a sibling that has agreed to its size.
func TestAsyncSizes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		_, ln := startMem(t, WithAsync(), WithHandlerFunc("number", func(ctx context.Context, m *Message, a *Actions) error {
			a.SetVar(ScopeSess, "v", String(strings.Repeat("x", 1000)))
			return g.ServeSPOE(ctx, m, new(Actions))
		}))
		gone := asEngine(t, ln, "engine")
		small := ln.dial(t)
		small.helloAs(hello{versions: "2.0", frameSize: 256, capabilities: "async", engineID: "engine"})
		sibling := asEngine(t, ln, "engine")
		for id := range uint64(10) {
			gone.send(notifyFrame(id, id))
		}
		g.wait(t, 10)
		gone.nc.Close()
		synctest.Wait()
		close(g.open)
		for range 10 {
			sibling.want(frameAck)
		}
		small.wantNothing()
	})
}

// Who has not agreed on async has no siblings.
func TestAsyncNotAgreed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := newGate(), newGate()
		_, ln := startMem(t, withNumbered(), WithAsync(), WithHandler("first", first), WithHandler("second", second))
		sibling := asEngine(t, ln, "engine")
		gone := ln.raw(t)
		rawHelloAs(t, gone, hello{versions: "2.0", frameSize: 16380, capabilities: "pipelining", engineID: "engine"})
		for _, name := range []string{"first", "second"} {
			if _, err := io.WriteString(gone, rawFrame(frameNotify, flagFIN, 1, 1, string(appendMessage(nil, NewMessage(name))))); err != nil {
				t.Fatal(err)
			}
		}
		first.wait(t, 1)
		second.wait(t, 1)
		close(first.open) // its ACK is being written
		synctest.Wait()
		gone.Close()
		synctest.Wait()
		close(second.open)
		sibling.wantNothing()
		sibling.wantAnswers()
	})
}

// Nothing but ACKs leaves by a sibling.
func TestAsyncForwardsNoHello(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t, WithAsync(), withNumbered())
		sibling := asEngine(t, ln, "engine")
		nc := ln.raw(t)
		if _, err := io.WriteString(nc, helloFrame(offered)); err != nil {
			t.Fatal(err)
		}
		nc.Close()
		sibling.wantNothing()
		sibling.wantAnswers()
		if want, have := 1, len(a.Conns()); want != have {
			t.Errorf("want %d connection, have %d", want, have)
		}
	})
}

// A peer that sends no more and does not read either: what it has not taken is
// the sibling's, and nothing is left of its connection.
func TestAsyncUnread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := newGate(), newGate()
		a, ln := startMem(t, WithAsync(), WithHandler("first", first), WithHandler("second", second))
		in, _ := ln.dialHalves(t)
		var gone *conn
		a.mu.Lock()
		for gone = range a.conns {
		}
		a.mu.Unlock()
		sibling := asEngine(t, ln, offered.engineID)
		for id, name := range []string{"first", "second"} {
			if _, err := io.WriteString(in, rawFrame(frameNotify, flagFIN, uint64(id), 7, string(appendMessage(nil, NewMessage(name))))); err != nil {
				t.Fatal(err)
			}
		}
		first.wait(t, 1)
		second.wait(t, 1)
		close(first.open) // its ACK is being written
		synctest.Wait()
		close(second.open) // its ACK is behind that
		sibling.wantNothing()
		in.Close()
		sibling.wantAcks(0, 1)
		sibling.wantNothing()
		if gone.ctx.Err() == nil {
			t.Error("want the context of the connection to have ended")
		}
	})
}

// What had been read when the peer went, but had to wait for its turn, is the
// sibling's too.
func TestAsyncNotBegun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gates := make(map[string]*gate)
		opts := []Option{WithAsync(), WithPipelining(2)}
		frames := ""
		for i, name := range []string{"a", "b", "c", "d", "e"} {
			gates[name] = newGate()
			opts = append(opts, WithHandler(name, gates[name]))
			frames += rawFrame(frameNotify, flagFIN, uint64(i), 7, string(appendMessage(nil, NewMessage(name))))
		}
		_, ln := startMem(t, opts...)
		in, out := ln.dialHalves(t)
		sibling := asEngine(t, ln, offered.engineID)
		if _, err := io.WriteString(in, frames); err != nil {
			t.Fatal(err)
		}
		gates["a"].wait(t, 1)
		gates["b"].wait(t, 1)
		close(gates["a"].open) // its ACK is being written
		sibling.wantNothing()
		out.Close()
		for _, name := range []string{"c", "d", "e"} {
			gates[name].wait(t, 1)
		}
		for _, name := range []string{"b", "c", "d", "e"} {
			close(gates[name].open)
		}
		sibling.wantAcks(0, 1, 2, 3, 4)
	})
}

// No ACK of a sibling's comes before the AGENT-HELLO.
func TestAsyncHelloFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		hellos, resume := make(chan struct{}), make(chan struct{})
		_, ln := startMem(t, WithAsync(), WithHandler("number", g), WithDebug(true), WithLogger(log.LoggerFunc(func(kv ...any) error {
			if strings.Contains(fmt.Sprint(kv...), "AGENT-HELLO") {
				hellos <- struct{}{}
				<-resume
			}
			return nil
		})))
		gone, sibling := ln.dial(t), ln.dial(t)
		gone.send(helloFrame(offered))
		<-hellos
		resume <- struct{}{}
		gone.want(frameAgentHello)
		gone.send(notifyFrame(1, 1))
		g.wait(t, 1)
		gone.nc.Close()
		synctest.Wait()
		sibling.send(helloFrame(offered))
		<-hellos
		close(g.open)
		synctest.Wait()
		resume <- struct{}{}
		sibling.want(frameAgentHello)
	})
}

// The context of a handler ends some time after its peer has.
func TestContextOfHandler(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		g.heeds = true
		ended := make(chan error, 1)
		_, ln := startMem(t, WithHandler("number", g), WithHooks(Hooks{Handled: func(_ string, _ time.Duration, err error) { ended <- err }}))
		h := ln.dial(t)
		h.hello()
		h.send(notifyFrame(1, 1))
		g.wait(t, 1)
		start := time.Now()
		h.nc.Close()
		if err := receive(t, "the handler's end", ended); err != context.Canceled {
			t.Errorf("want %v, have %v", context.Canceled, err)
		}
		wantTook(t, "the handler's end", start, eofGrace, eofGrace+10*stallAfter) // the reader is to stall first
	})
}

// What the peer has sent and nobody has read must not cost it the reason.
func TestReasonArrives(t *testing.T) {
	hooks, closed := hooked()
	_, dial := startTCP(t, hooks)
	nc := dial()
	if _, err := io.WriteString(nc, "GET / HTTP/1.1\r\n"+strings.Repeat("x", 200000)); err != nil {
		t.Fatal(err)
	}
	receive(t, "the end", closed)
	newHAProxy(t, nc).wantEnd(StatusFrameTooBig)
}

// Who checks an agent's health but sends it nothing has most likely forgotten something; once is enough to say so.
func TestSilenceWarned(t *testing.T) {
	for _, asked := range []bool{false, true} {
		t.Run(fmt.Sprintf("asked %v", asked), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				log := new(logLines)
				_, ln := startMem(t, withNumbered(), WithLogger(log))
				if asked {
					h := ln.dial(t)
					h.hello()
					h.send(notifyFrame(1, 1))
					h.wantAck(1, 1)
				}
				const warning = "no NOTIFY has ever come"
				check := func() {
					h := ln.dial(t)
					h.helloAs(hello{versions: "2.0", frameSize: 16380, healthcheck: true})
					h.wantEOF()
				}
				for range 30 {
					check()
					time.Sleep(2 * time.Second)
				}
				if have := log.with(warning); len(have) != 0 {
					t.Errorf("within a minute: want no warning, have %q", have)
				}
				check()
				check()
				want := 1
				if asked {
					want = 0
				}
				if have := log.with(warning); len(have) != want {
					t.Errorf("after a minute: want %d warnings, have %q", want, have)
				}
			})
		})
	}
}
