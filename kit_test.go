package spoa

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
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

// hooked tells of connections that end.
func hooked() (Option, chan error) {
	c := make(chan error, 10000)
	return WithHooks(Hooks{ConnClosed: func(_ Peer, err error) { c <- err }}), c
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

// bed is an agent that serves one listener until the test is over.
type bed struct {
	*Agent
	t    testing.TB
	dial func() net.Conn
}

func newBed(t testing.TB, l net.Listener, opts ...Option) *bed {
	t.Helper()
	b := &bed{Agent: New(opts...), t: t}
	b.dial = func() net.Conn {
		if mem, ok := l.(*memListener); ok {
			client, server := net.Pipe()
			mem.offer(t, resets{server})
			t.Cleanup(func() { client.Close() })
			return client
		}
		nc, err := net.Dial(l.Addr().Network(), l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { nc.Close() })
		return nc
	}
	served := make(chan error, 1)
	go func() { served <- b.Serve(l) }()
	t.Cleanup(func() {
		b.Close()
		if want, have := ErrAgentClosed, <-served; want != have {
			t.Errorf("Serve: want %v, have %v", want, have)
		}
	})
	return b
}

// resets is a net.Conn whose peer resets it when it closes its end.
type resets struct{ net.Conn }

func (c resets) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err == io.EOF {
		err = syscall.ECONNRESET
	}
	return n, err
}

// bubble runs f with an agent and its peers in a synctest bubble.
func bubble(t *testing.T, opts []Option, f func(t *testing.T, b *bed)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(t, newBed(t, newMemListener(), opts...)) })
}

// answer is an ACK as the peer sees it.
type answer struct {
	stream, id uint64
	actions    string // in words, joined by commas
	at         time.Time
}

func (a answer) String() string { return fmt.Sprintf("%d:%d %s", a.stream, a.id, a.actions) }

// peer is HAProxy's side of a connection, frame by frame, so that the test says
// what comes together.
type peer struct {
	t       testing.TB
	nc      net.Conn
	r       *bufio.Reader
	answers chan answer // closed when the connection has ended
	late    bool        // "timeout" and "overload" are expected
}

// peer connects, exchanges the HELLOs, and reads the ACKs from then on.
func (b *bed) peer() *peer {
	b.t.Helper()
	p := b.quietPeer()
	p.answers = make(chan answer, 100)
	go p.read()
	return p
}

// quietPeer is a peer that reads nothing but the HELLO.
func (b *bed) quietPeer() *peer {
	b.t.Helper()
	nc := b.dial()
	p := &peer{t: b.t, nc: nc, r: bufio.NewReader(nc)}
	p.send(appendHello(nil, frameHAProxyHello,
		&hello{versions: "2.0", frameSize: 16380, capabilities: "pipelining,async", engineID: "engine"}))
	if f, err := frameFrom(p.r); err != nil || f.kind != frameAgentHello {
		b.t.Fatalf("want AGENT-HELLO, have a frame of type %d, error %v", f.kind, err)
	}
	return p
}

func frameFrom(r io.Reader) (f frame, err error) {
	var size [lengthSize]byte
	if _, err = io.ReadFull(r, size[:]); err != nil {
		return f, err
	}
	n := binary.BigEndian.Uint32(size[:])
	if n > defaultFrameSize {
		return f, fmt.Errorf("frame of %d bytes", n)
	}
	b := make([]byte, n)
	if _, err = io.ReadFull(r, b); err != nil {
		return f, err
	}
	if !f.parse(b) {
		return f, fmt.Errorf("malformed frame %x", b)
	}
	return f, nil
}

func (p *peer) read() {
	defer close(p.answers)
	for {
		f, err := frameFrom(p.r)
		if err != nil || f.kind == frameAgentDisconnect {
			return
		}
		if f.kind != frameAck || !f.fin() || f.abort() {
			p.t.Errorf("want an ACK, have a frame of type %d with flags %x", f.kind, f.flags)
			return
		}
		p.answers <- answer{f.stream, f.id, inActions(f.payload), time.Now()}
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

// send writes the frames at once: they come together.
func (p *peer) send(frames ...[]byte) {
	p.t.Helper()
	var all []byte
	for _, f := range frames {
		all = append(all, f...)
	}
	if _, err := p.nc.Write(all); err != nil {
		p.t.Errorf("send: %v", err)
	}
}

// want waits for the next ACK.
func (p *peer) want(stream, id uint64, actions string) answer {
	p.t.Helper()
	select {
	case have, ok := <-p.answers:
		if want := (answer{stream: stream, id: id, actions: actions}); !ok || want.String() != have.String() {
			p.t.Errorf("want ACK %v, have %v (connection lives: %v)", want, have, ok)
		}
		return have
	case <-time.After(longWait):
		p.t.Fatalf("want ACK %d:%d, have none", stream, id)
	}
	panic("unreachable")
}

// wantNone checks, in a bubble, that no ACK leaves though there is time for it.
func (p *peer) wantNone() {
	p.t.Helper()
	synctest.Wait()
	select {
	case have, ok := <-p.answers:
		p.t.Errorf("want no ACK, have %v (connection lives: %v)", have, ok)
	default:
	}
}

func notifyOf(stream, id uint64, msgs ...*Message) []byte {
	b := beginFrame(nil, frameNotify, flagFIN, stream, id)
	for _, m := range msgs {
		b = appendMessage(b, m)
	}
	return finishFrame(b, 0)
}

// echoed is the message that echo answers.
func echoed(s string) *Message { return NewMessage("echo", Arg{"s", String(s)}) }

// echo sets a variable to the first argument.
func echo(_ context.Context, m *Message, a *Actions) error {
	a.SetVar(ScopeTxn, m.Name(), m.Arg(0).Value)
	return nil
}

func sets(name, s string) string { return "set-var txn." + name + " string " + s }

// gates are handlers that wait until the test lets them go.
type gates struct {
	mu   *sync.Mutex
	open map[string]chan struct{}
	in   chan string // the arguments of those that have begun
}

// newGates is called in the bubble of those who use them.
func newGates() *gates {
	return &gates{mu: new(sync.Mutex), open: make(map[string]chan struct{}), in: make(chan string, 1000)}
}

func (g *gates) gate(s string) chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	c := g.open[s]
	if c == nil {
		c = make(chan struct{})
		g.open[s] = c
	}
	return c
}

// wait is a handler that waits for its argument's gate, then echoes.
func (g *gates) wait(ctx context.Context, m *Message, a *Actions) error {
	s := m.Arg(0).Value.String()
	g.in <- s
	<-g.gate(s)
	return echo(ctx, m, a)
}

func waiting(s string) *Message { return NewMessage("wait", Arg{"s", String(s)}) }

// sole returns the connection of the agent's only peer, while the reader waits.
func (b *bed) sole() *conn {
	synctest.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	for c := range b.conns {
		return c
	}
	panic("no connection")
}

// framesTo is an io.Writer as an outbox writes to it.
type framesTo struct{ io.Writer }

func (w framesTo) WriteFrames(b []byte, _ time.Duration) (int, error) { return w.Write(b) }

// raceEnabled tells whether this is a build with the race detector, under which
// a sync.Pool drops things at random.
func raceEnabled() bool {
	info, _ := debug.ReadBuildInfo()
	return info != nil && slices.ContainsFunc(info.Settings, func(s debug.BuildSetting) bool { return s.Key == "-race" && s.Value == "true" })
}

func (l *logLines) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = nil
}
