package spoa

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// pipes is a listener of net.Pipes, so that an agent and its peers can be in a
// synctest bubble.
type pipes struct {
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), done: make(chan struct{})} }

func (l *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *pipes) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }

func (l *pipes) dial() (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case l.conns <- theirs:
		return ours, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// bed is an agent that serves one listener until the test is over.
type bed struct {
	*Agent
	t    testing.TB
	dial func() (net.Conn, error)
}

func newBed(t testing.TB, l net.Listener, opts ...Option) *bed {
	t.Helper()
	b := &bed{Agent: New(opts...), t: t}
	if p, ok := l.(*pipes); ok {
		b.dial = p.dial
	} else {
		b.dial = func() (net.Conn, error) { return net.Dial(l.Addr().Network(), l.Addr().String()) }
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

// bubble runs f with an agent and its peers in a synctest bubble.
func bubble(t *testing.T, opts []Option, f func(t *testing.T, b *bed)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(t, newBed(t, newPipes(), opts...)) })
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
	nc, err := b.dial()
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { nc.Close() })
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
	case <-time.After(patience):
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

// patience bounds the waits for what should come soon.
const patience = 20 * time.Second

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
	mu   sync.Mutex
	open map[string]chan struct{}
	in   chan string // the arguments of those that have begun
}

func newGates() *gates {
	return &gates{open: make(map[string]chan struct{}), in: make(chan string, 1000)}
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

// A connection is read on after the time for its HELLO, and for a frame that
// came in two pieces, is over.
func TestWorkerAfterHelloTimeout(t *testing.T) {
	bubble(t, []Option{WithHandlerFunc("echo", echo)}, func(t *testing.T, b *bed) {
		p := b.peer()
		frame := notifyOf(1, 1, echoed("a"))
		p.send(frame[:10])
		p.send(frame[10:])
		p.want(1, 1, sets("echo", "a"))
		time.Sleep(time.Minute)
		p.send(notifyOf(2, 1, echoed("b")))
		p.want(2, 1, sets("echo", "b"))
	})
}

// places are the three ways that a handler comes to run. Each brings a new
// connection there: the next handler runs inline and is not taken for stalled,
// or is if it waits, or is spread.
var places = []struct {
	name  string
	stall bool // have it wait for longer than stallAfter
	bring func(p *peer, g *gates)
}{
	{"inline", false, func(*peer, *gates) {}},
	{"handed over", true, func(*peer, *gates) {}},
	{"spread", false, func(p *peer, g *gates) {
		p.send(notifyOf(0, 1, waiting("stall")))
		<-g.in
		time.Sleep(3 * stallAfter)
		close(g.gate("stall"))
		p.want(0, 1, sets("wait", "stall"))
	}},
}

// everyplace runs f in a bubble for each place, with a connection that has been
// brought there, and the gates of its messages "wait".
func everyplace(t *testing.T, opts []Option, f func(t *testing.T, b *bed, p *peer, g *gates)) {
	for _, place := range places {
		t.Run(place.name, func(t *testing.T) {
			g := new(gates)
			stall := func(ctx context.Context, m *Message, a *Actions) error {
				if place.stall {
					time.Sleep(3 * stallAfter)
				}
				return nil
			}
			opts := append([]Option{WithHandlerFunc("wait", g.wait), WithHandlerFunc("place", stall)}, opts...)
			bubble(t, opts, func(t *testing.T, b *bed) {
				g.open, g.in = make(map[string]chan struct{}), make(chan string, 1000)
				p := b.peer()
				place.bring(p, g)
				f(t, b, p, g)
				if want, have := int64(b.options.workers), b.workers.free.Load(); want != have {
					t.Errorf("want leave for %d handlers, have %d", want, have)
				}
				p.wantNone()
			})
		})
	}
}

// A handler that ends its goroutine is answered, wherever it ran, and the
// connection lives on.
func TestWorkerGoexit(t *testing.T) {
	exit := func(ctx context.Context, m *Message, a *Actions) error {
		a.SetVar(ScopeTxn, "lost", Bool(true))
		runtime.Goexit()
		return nil
	}
	opts := []Option{WithFaultVar(ScopeTxn, "fault"), WithHandlerFunc("exit", exit), WithHandlerFunc("echo", echo)}
	everyplace(t, opts, func(t *testing.T, b *bed, p *peer, g *gates) {
		for n := range uint64(3) {
			p.send(notifyOf(1, n, echoed("a"), NewMessage("place"), NewMessage("exit")))
			p.want(1, n, sets("echo", "a")+","+sets("fault", "error"))
			p.send(notifyOf(2, n, echoed("b")))
			p.want(2, n, sets("echo", "b"))
		}
	})
}
