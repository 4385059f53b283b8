package spoa

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-kit/log"
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
		for _, file := range ownFile.FindAllStringSubmatch(g, -1) {
			if !strings.HasSuffix(file[1], "_test") {
				own = append(own, g)
				break
			}
		}
	}
	return own
}

// ownFile matches the files of this package and of those below internal, in a
// stack.
var ownFile = func() *regexp.Regexp {
	_, file, _, _ := runtime.Caller(0)
	return regexp.MustCompile(regexp.QuoteMeta(path.Dir(file)) + `/(?:internal/\w+/)?(\w+)\.go:`)
}()

// descriptors returns the number of open ones, 0 where it can't be told.
func descriptors() int {
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0
	}
	return len(d)
}

// eventually waits until ok reports true, where no event shows that.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(longWait); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("want %s, have waited %v", what, longWait)
		}
		<-time.After(time.Millisecond)
	}
}

// checkLeaks makes the test fail if goroutines or descriptors are left behind.
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

// offer makes Accept return c.
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

// greet returns a connection after the HELLOs.
func (l *memListener) greet(t testing.TB) *haproxy {
	t.Helper()
	h := l.dial(t)
	h.hello()
	return h
}

// greetBreaking returns a connection after the HELLOs whose end will show as err.
func (l *memListener) greetBreaking(t testing.TB, err error) *haproxy {
	t.Helper()
	client, server := net.Pipe()
	l.offer(t, breaking{server, err})
	t.Cleanup(func() { client.Close() })
	h := newHAProxy(t, client)
	h.hello()
	return h
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

// halves reads from one pipe and writes to another, so that either can end.
type halves struct {
	net.Conn
	in net.Conn
}

func (h halves) Read(b []byte) (int, error) { return h.in.Read(b) }

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
	a := New(append([]Option{WithLogger(log.NewNopLogger())}, opts...)...)
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

// startTCP serves on the loopback, until the test ends, and checks that nothing
// is left then.
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

// receive returns the next value of c.
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
		f, err := frameFrom(r)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		do(f)
	}
}

// frameFrom reads one frame, into memory of its own. It returns io.EOF only if
// there is none.
func frameFrom(r io.Reader) (f frame, err error) {
	var size [lengthSize]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return f, err
	}
	n := binary.BigEndian.Uint32(size[:])
	if n > 1<<20 {
		return f, fmt.Errorf("frame of %d bytes", n)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return f, fmt.Errorf("within a frame: %w", err)
	}
	if !f.parse(b) {
		return f, fmt.Errorf("malformed frame %x", b)
	}
	return f, nil
}

// send writes frames in one go.
func (h *haproxy) send(frames ...string) {
	h.t.Helper()
	h.nc.SetWriteDeadline(time.Now().Add(longWait))
	if _, err := io.WriteString(h.nc, strings.Join(frames, "")); err != nil {
		h.t.Errorf("send: %v", err)
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

// wantActions takes the ACK of these ids with these actions, in words.
func (h *haproxy) wantActions(stream, id uint64, actions string) {
	h.t.Helper()
	f := h.want(frameAck)
	have := inActions(f.payload)
	if f.stream != stream || f.id != id || f.flags != flagFIN || have != actions {
		h.t.Errorf("want ACK %d, %d %q, have %d, %d, flags %d %q", stream, id, actions, f.stream, f.id, f.flags, have)
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

// untilGone takes what is left, and the end, however it comes.
func (h *haproxy) untilGone() {
	h.t.Helper()
	for ok := true; ok; {
		_, ok = h.next()
	}
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

// wantAnswers sends a NOTIFY and takes its answer.
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

// gate is a handler that waits until it is opened, for all calls or for those
// with one first argument. It answers as echo does, or without an argument as
// numbered does.
type gate struct {
	entered chan string   // the first argument of every call
	open    chan struct{} // closed: all calls return
	heeds   bool          // the end of its context

	mu  sync.Mutex
	let map[string]chan struct{} // closed: the calls with that argument return
}

func newGate() *gate {
	return &gate{entered: make(chan string, 10000), open: make(chan struct{}), let: make(map[string]chan struct{})}
}

// of returns what to close for the calls with that argument to return.
func (g *gate) of(s string) chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	c := g.let[s]
	if c == nil {
		c = make(chan struct{})
		g.let[s] = c
	}
	return c
}

func (g *gate) ServeSPOE(ctx context.Context, m *Message, a *Actions) error {
	var s string
	answer := numbered
	if m.Len() > 0 {
		s, answer = m.Arg(0).Value.String(), echo
	}
	g.entered <- s
	var done <-chan struct{}
	if g.heeds {
		done = ctx.Done()
	}
	select {
	case <-g.open:
	case <-g.of(s):
	case <-done:
		return ctx.Err()
	}
	return answer(ctx, m, a)
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

// hooked returns an option, and the errors of the connections that end.
func hooked() (Option, chan error) {
	c := make(chan error, 10000)
	return WithHooks(Hooks{ConnClosed: func(_ Peer, err error) { c <- err }}), c
}

// wantNothing checks that no frame was received, in a bubble.
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

// inActions returns the payload of an ACK in words.
func inActions(payload []byte) string {
	var words []string
	for len(payload) > 0 {
		act, rest, ok := cutAction(payload)
		if !ok {
			return fmt.Sprintf("malformed: %x", payload)
		}
		words = append(words, act.String())
		payload = rest
	}
	return strings.Join(words, ",")
}

// notifyOf returns a NOTIFY of these messages.
func notifyOf(stream, id uint64, msgs ...*Message) string {
	var payload []byte
	for _, m := range msgs {
		payload = appendMessage(payload, m)
	}
	return rawFrame(frameNotify, flagFIN, stream, id, string(payload))
}

// waiting is the message that a gate is for, by the name "wait".
func waiting(s string) *Message { return NewMessage("wait", Arg{"s", String(s)}) }

// echoed is the message that echo answers.
func echoed(s string) *Message { return NewMessage("echo", Arg{"s", String(s)}) }

// echo sets a variable to the first argument.
func echo(_ context.Context, m *Message, a *Actions) error {
	a.SetVar(ScopeTxn, m.Name(), m.Arg(0).Value)
	return nil
}

func sets(name, s string) string { return "set-var txn." + name + " string " + s }

// only returns the connection of the agent's only peer.
func only(t testing.TB, a *Agent) *conn {
	t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.conns) != 1 {
		t.Fatalf("want one connection, have %d", len(a.conns))
	}
	for c := range a.conns {
		return c
	}
	panic("unreachable")
}

// framesTo is an io.Writer as an outbox writes to it.
type framesTo struct{ io.Writer }

func (w framesTo) WriteFrames(b []byte, _ time.Duration) (int, error) { return w.Write(b) }

// raceEnabled reports whether this is a build with the race detector, under
// which a sync.Pool drops things at random.
func raceEnabled() bool {
	info, _ := debug.ReadBuildInfo()
	return info != nil && slices.ContainsFunc(info.Settings, func(s debug.BuildSetting) bool { return s.Key == "-race" && s.Value == "true" })
}

func (l *logLines) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = nil
}
