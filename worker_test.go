package spoa

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spoa-go/spoa/internal/outbox"
)

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

// Readers let each other run first while there are many of them and they have
// much to do, and only then.
func TestBusy(t *testing.T) {
	for _, test := range []struct {
		peers, each int
		busy        bool
	}{
		{busyQueues, busyCalls/busyQueues + 1, true},
		{busyQueues - 1, busyCalls, false},
		{busyQueues, 1, false},
	} {
		bubble(t, []Option{WithHandlerFunc("echo", echo)}, func(t *testing.T, b *bed) {
			peers := make([]*peer, test.peers)
			for i := range peers {
				peers[i] = b.peer()
			}
			ask := func(p *peer, count int) {
				for i := range uint64(count) {
					p.send(notifyOf(i, 1, echoed("a")))
					p.want(i, 1, sets("echo", "a"))
				}
			}
			for range 2 { // again after a rest
				for _, p := range peers {
					ask(p, test.each)
				}
				time.Sleep(2 * tick)
				if have := b.workers.busy.Load(); have != test.busy {
					t.Errorf("%d peers, %d calls each: want busy %v, have %v", test.peers, test.each, test.busy, have)
				}
				ask(peers[0], 1)
				time.Sleep(2 * tick)
				if b.workers.busy.Load() {
					t.Error("want one call not to be busy")
				}
			}
		})
	}
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
				*g = *newGates()
				p := b.peer()
				place.bring(p, g)
				f(t, b, p, g)
				synctest.Wait() // a worker returns its leave after its ACK has left
				if want, have := int64(b.options.workers), b.workers.permits.Load(); want != have {
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

// record is what Hooks.Handled was told.
type record struct {
	mu   sync.Mutex
	list []string
}

func (r *record) hook() Option {
	return WithHooks(Hooks{Handled: func(message string, _ time.Duration, err error) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.list = append(r.list, fmt.Sprintf("%s: %v", message, err))
	}})
}

// want compares what was told since the last time.
func (r *record) want(t testing.TB, want ...string) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.Equal(want, r.list) {
		t.Errorf("Handled: want %q, have %q", want, r.list)
	}
	r.list = nil
}

// The NOTIFY of a late handler is answered in time, with the actions of the
// messages before it. What it sets later is dropped.
func TestHandlerTimeout(t *testing.T) {
	const limit = 50 * time.Millisecond
	var r record
	opts := []Option{WithHandlerTimeout(limit), WithFaultVar(ScopeTxn, "fault"), WithHandlerFunc("echo", echo), r.hook()}
	everyplace(t, opts, func(t *testing.T, b *bed, p *peer, g *gates) {
		r.list = nil
		began := time.Now()
		p.send(notifyOf(1, 1, NewMessage("place"), echoed("before"), waiting("late"), echoed("after")), notifyOf(1, 2, echoed("x")))
		p.want(1, 2, sets("echo", "x"))
		a := p.want(1, 1, sets("echo", "before")+","+sets("fault", "timeout"))
		if took := a.at.Sub(began); took < limit || took > limit+2*tick {
			t.Errorf("want the answer after %v, have it after %v", limit, took)
		}
		// It keeps its worker until it returns.
		time.Sleep(time.Second)
		if want, have := int64(b.options.workers-1), b.workers.permits.Load(); want != have {
			t.Errorf("want leave for %d handlers, have %d", want, have)
		}
		close(g.gate("late"))
		p.wantNone()
		slices.Sort(r.list)
		r.want(t, "echo: <nil>", "echo: <nil>", "echo: spoa: waited too long for its turn", "place: <nil>", "wait: context deadline exceeded")
	})
}

// An error of its own says more than that the handler was late.
func TestHandlerTimeoutOwnError(t *testing.T) {
	var r record
	opts := []Option{WithHandlerTimeout(5 * time.Millisecond), r.hook(),
		WithHandlerFunc("error", func(ctx context.Context, _ *Message, _ *Actions) error {
			<-ctx.Done()
			return errors.New("own")
		}),
		WithHandlerFunc("panic", func(ctx context.Context, _ *Message, _ *Actions) error {
			<-ctx.Done()
			panic("own")
		})}
	everyplace(t, opts, func(t *testing.T, b *bed, p *peer, _ *gates) {
		r.list = nil
		p.send(notifyOf(1, 1, NewMessage("error")))
		p.want(1, 1, "")
		p.wantNone()
		p.send(notifyOf(1, 2, NewMessage("panic")))
		p.want(1, 2, "")
		p.wantNone()
		r.want(t, "error: own", "panic: spoa: handler panicked: own")
	})
}

// A NOTIFY whose turn comes too late is answered without its handler, also if
// it need not wait for a worker then: here for the window of its connection.
func TestHandlerTimeoutWindow(t *testing.T) {
	var r record
	g := new(gates)
	opts := []Option{WithHandlerTimeout(20 * time.Millisecond), WithPipelining(1), WithFaultVar(ScopeTxn, "fault"),
		WithHandlerFunc("wait", g.wait), WithHandlerFunc("echo", echo), r.hook()}
	bubble(t, opts, func(t *testing.T, b *bed) {
		*g = *newGates()
		p := b.peer()
		b.sole().pace.left = 3 // to be spread
		p.send(notifyOf(1, 1, waiting("late")), notifyOf(1, 2, echoed("x")), notifyOf(1, 3, echoed("y")))
		p.want(1, 1, sets("fault", "timeout"))
		for id := uint64(2); id <= 3; id++ {
			p.want(1, id, sets("fault", "overload"))
		}
		p.send(notifyOf(1, 4, echoed("z")))
		p.want(1, 4, sets("echo", "z"))
		close(g.gate("late"))
		p.wantNone()
		r.want(t, "echo: spoa: waited too long for its turn", "echo: spoa: waited too long for its turn", "echo: <nil>",
			"wait: context deadline exceeded")
	})
}

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

// A job may be late before its goroutine has got the processor for the first
// time. Its handlers are not called then: nobody would end their context.
func TestLateBeforeBegun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r record
		w := newWorkers(newOptions([]Option{WithHandlerTimeout(5 * time.Millisecond), WithFaultVar(ScopeTxn, "fault"), r.hook(),
			WithHandlerFunc("echo", func(context.Context, *Message, *Actions) error {
				t.Error("want no call of the handler")
				return nil
			})}))
		var sent bytes.Buffer
		var box outbox.Box
		box.Init(framesTo{&sent}, 1, &w.inFlight)
		q := &queue{workers: w, box: &box, ctx: context.Background()}
		q.turn.Store(new(turn))
		if !w.acquire() {
			t.Fatal("want a permit")
		}
		j := newJob(q)
		j.begin(&frame{stream: 1, id: 1}, ids(1, 1), w.clock())
		if err := j.decode(appendMessage(nil, echoed("x"))); err != nil {
			t.Fatal(err)
		}
		box.Begin(0)
		q.mu.Lock()
		q.running.push(j)
		q.mu.Unlock()
		w.watchQueue(q)
		time.Sleep(10 * time.Millisecond)
		j.run()
		synctest.Wait()
		f, err := frameFrom(&sent)
		if want, have := sets("fault", "overload"), inActions(f.payload); err != nil || want != have || sent.Len() > 0 {
			t.Errorf("want one ACK %q, have %q, error %v, and %d bytes more", want, have, err, sent.Len())
		}
		r.want(t, "echo: spoa: waited too long for its turn")
		if want, have := int64(w.options.workers), w.permits.Load(); want != have || box.Busy() {
			t.Errorf("want permits for %d handlers and nothing with workers, have %d and %v", want, have, box.Busy())
		}
	})
}

// framesTo is an io.Writer as an outbox writes to it.
type framesTo struct{ io.Writer }

func (w framesTo) WriteFrames(b []byte, _ time.Duration) (int, error) { return w.Write(b) }

// The context of a NOTIFY behaves as those of package context do.
func TestHandlerContext(t *testing.T) {
	const limit = 50 * time.Millisecond
	var arrived time.Time
	check := func(ctx context.Context, what string, err error, after time.Duration) {
		t.Helper()
		<-ctx.Done()
		if have := ctx.Err(); err != have {
			t.Errorf("%s: want %v, have %v", what, err, have)
		}
		if have := context.Cause(ctx); err != have {
			t.Errorf("%s: want cause %v, have %v", what, err, have)
		}
		if have := time.Since(arrived); have < after || have > after+2*tick {
			t.Errorf("%s: want its end after %v, have it after %v", what, after, have)
		}
	}
	kept := make(map[string]context.Context)
	opts := []Option{WithHandlerTimeout(limit),
		WithHandlerFunc("poll", func(ctx context.Context, _ *Message, _ *Actions) error {
			if at, ok := ctx.Deadline(); !ok || !at.Equal(arrived.Add(limit)) {
				t.Errorf("want deadline %v, have %v, %v", arrived.Add(limit), at, ok)
			}
			if err := ctx.Err(); err != nil {
				t.Errorf("want no error yet, have %v", err)
			}
			time.Sleep(limit - 1)
			if err := ctx.Err(); err != nil {
				t.Errorf("want no error before the deadline, have %v", err)
			}
			time.Sleep(time.Nanosecond)
			if want, have := context.DeadlineExceeded, ctx.Err(); want != have {
				t.Errorf("want %v, have %v", want, have)
			}
			check(ctx, "after Err", context.DeadlineExceeded, limit)
			return nil
		}),
		WithHandlerFunc("done", func(ctx context.Context, _ *Message, _ *Actions) error {
			cancelled, cancel := context.WithCancel(ctx)
			cancel()
			check(cancelled, "cancelled", context.Canceled, 0)
			shorter, cancel := context.WithTimeout(ctx, limit/2)
			defer cancel()
			check(shorter, "shorter", context.DeadlineExceeded, limit/2)
			longer, cancel := context.WithTimeout(ctx, limit)
			defer cancel()
			check(longer, "longer", context.DeadlineExceeded, limit)
			check(ctx, "done", context.DeadlineExceeded, limit)
			return nil
		}),
		WithHandlerFunc("keep", func(ctx context.Context, _ *Message, _ *Actions) error {
			kept["asked"] = ctx
			ctx.Done()
			return nil
		}),
		WithHandlerFunc("keep too", func(ctx context.Context, _ *Message, _ *Actions) error {
			kept["not asked"] = ctx
			return nil
		})}
	everyplace(t, opts, func(t *testing.T, b *bed, p *peer, _ *gates) {
		for i, name := range []string{"poll", "done", "keep", "keep too"} {
			arrived = time.Now()
			p.send(notifyOf(1, uint64(i), NewMessage(name)))
			p.want(1, uint64(i), "")
			synctest.Wait()
		}
		for name, ctx := range kept {
			<-ctx.Done()
			if want, have := context.Canceled, ctx.Err(); want != have {
				t.Errorf("%s: want %v after the handler's return, have %v", name, want, have)
			}
		}
	})
}

// The call that is tried inline after a run of spread ones is judged by its own
// time, not by the time that the reader waited for the others.
func TestPaceAfterSpread(t *testing.T) {
	g := new(gates)
	opts := []Option{WithPipelining(1), WithHandlerFunc("wait", g.wait), WithHandlerFunc("echo", echo)}
	bubble(t, opts, func(t *testing.T, b *bed) {
		*g = *newGates()
		p := b.peer()
		c := b.sole()
		c.pace.left, c.pace.slow = 2, true
		p.send(notifyOf(1, 1, waiting("a")), notifyOf(1, 2, waiting("b")), notifyOf(1, 3, echoed("c")))
		for _, s := range []string{"a", "b"} {
			<-g.in
			time.Sleep(time.Second)
			close(g.gate(s))
		}
		p.want(1, 1, sets("wait", "a"))
		p.want(1, 2, sets("wait", "b"))
		p.want(1, 3, sets("echo", "c"))
		synctest.Wait()
		if c.pace.left != 0 || c.pace.slow {
			t.Errorf("want the next calls inline, have %+v", c.pace)
		}
	})
}

// order is a handler that notes the order of the calls.
type order struct {
	mu   sync.Mutex
	took time.Duration
	list []string
}

func (o *order) ServeSPOE(_ context.Context, m *Message, _ *Actions) error {
	o.mu.Lock()
	o.list = append(o.list, m.Arg(0).Value.String())
	o.mu.Unlock()
	time.Sleep(o.took)
	return nil
}

// A flood on one connection delays another one by no more than the call that
// runs and one that may be first in the ring.
func TestWorkersFair(t *testing.T) {
	for _, took := range []time.Duration{
		stallAfter / 4, // all of a batch inline
		4 * stallAfter, // all but the first spread
	} {
		o := &order{took: took}
		bubble(t, []Option{WithWorkers(1), WithHandler("order", o)}, func(t *testing.T, b *bed) {
			flood, other := b.peer(), b.peer()
			ordered := func(s string) *Message { return NewMessage("order", Arg{"", String(s)}) }
			var frames [][]byte
			for id := range uint64(20) {
				frames = append(frames, notifyOf(1, id, ordered("flood")))
			}
			flood.send(frames...)
			synctest.Wait() // the first has begun
			other.send(notifyOf(1, 1, ordered("other")), notifyOf(1, 2, ordered("other")))
			other.want(1, 1, "")
			other.want(1, 2, "")
			o.mu.Lock()
			first := slices.Index(o.list, "other")
			second := first + 1 + slices.Index(o.list[first+1:], "other")
			if first > 2 || second > first+2 {
				t.Errorf("handlers of %v: want the other connection's turn early, have %q", took, o.list)
			}
			o.mu.Unlock()
			for range frames {
				<-flood.answers
			}
		})
	}
}

// What a closed connection has left in its buffer is not begun any more.
func TestWorkersClosed(t *testing.T) {
	g := new(gates)
	bubble(t, []Option{WithPipelining(2), WithHandlerFunc("wait", g.wait)}, func(t *testing.T, b *bed) {
		*g = *newGates()
		p := b.peer()
		b.sole().pace.left = 100
		var frames [][]byte
		for id := range uint64(50) {
			frames = append(frames, notifyOf(1, id, waiting("x")))
		}
		p.send(frames...)
		synctest.Wait()
		b.Close()
		synctest.Wait()
		close(g.gate("x"))
		synctest.Wait()
		if want, have := 2, len(g.in); want != have {
			t.Errorf("want %d calls, have %d", want, have)
		}
	})
}

// A handler that stalls keeps neither those before it nor those after it on its
// connection waiting, and what it looks at stays as it is.
func TestHandOver(t *testing.T) {
	g := new(gates)
	opts := []Option{WithHandlerFunc("wait", g.wait), WithHandlerFunc("echo", echo),
		WithHandlerFunc("view", func(ctx context.Context, m *Message, a *Actions) error {
			v, same := m.Arg(0).Value, m.Arg(0).Value.String()
			g.in <- same[:1]
			<-g.gate(same[:1])
			if have := v.String(); have != same || m.Arg(0).Value.String() != same || m.Name() != "view" {
				t.Errorf("view: want %.20q..., have %.20q...", same, have)
			}
			return echo(ctx, m, a)
		})}
	viewed := func(s string) *Message { return NewMessage("view", Arg{"s", String(s)}) }
	bubble(t, opts, func(t *testing.T, b *bed) {
		*g = *newGates()
		p := b.peer()
		c := b.sole()
		c.pace.calls = stallRun // so that one stall has nothing spread
		rest := notifyOf(1, 5, echoed("after"))
		long := strings.Repeat("long", 2000)
		began := time.Now()
		sent := make(chan struct{})
		go func() { // more than is read at once
			defer close(sent)
			p.send(notifyOf(1, 1, echoed("before")), notifyOf(1, 2, waiting("x")), notifyOf(1, 3, viewed("y")),
				notifyOf(1, 4, viewed(long)), rest[:9])
		}()
		// One look of the watch sees the call, the next finds it there still.
		for i, want := range []string{"x", "y", "l"} {
			if have := <-g.in; want != have {
				t.Errorf("want the handler of %s, have that of %s", want, have)
			}
			if want, have := time.Duration(2*i)*tick, time.Since(began); have > want {
				t.Errorf("want call %d after %v, have it after %v", i, want, have)
			}
		}
		if a := p.want(1, 1, sets("echo", "before")); a.at.Sub(began) > 2*tick {
			t.Errorf("want the answer before the stalled one within %v, have it after %v", 2*tick, a.at.Sub(began))
		}
		<-sent
		p.send(rest[9:])
		p.want(1, 5, sets("echo", "after"))
		// More comes, larger than all before, and is answered.
		for id := uint64(6); id < 40; id++ {
			p.send(notifyOf(1, id, echoed(strings.Repeat("z", 100*int(id)))))
			p.want(1, id, sets("echo", strings.Repeat("z", 100*int(id))))
		}
		for _, s := range []string{"l", "y", "x"} {
			close(g.gate(s))
		}
		got := make(map[string]bool)
		for range 3 {
			got[(<-p.answers).String()] = true
		}
		for _, want := range []answer{{1, 2, sets("wait", "x"), began}, {1, 3, sets("view", "y"), began}, {1, 4, sets("view", long), began}} {
			if !got[want.String()] {
				t.Errorf("want ACK %.60v", want)
			}
		}
		p.wantNone()
	})
}

// An idle connection gives back what a burst has had it grow: however that was
// answered, and whichever of its buffers it was.
func TestIdleShrinks(t *testing.T) {
	large := func(_ context.Context, m *Message, a *Actions) error {
		v, _ := m.Lookup("s")
		a.SetVar(ScopeTxn, "x", v)
		return nil
	}
	opts := []Option{WithHandlerFunc("large", large), WithFragmentation(60000)}
	everyplace(t, opts, func(t *testing.T, b *bed, p *peer, _ *gates) {
		c := b.sole()
		args := []Arg{{"s", String(strings.Repeat("x", 3000))}}
		for i := range 200 {
			args = append(args, Arg{"n" + strconv.Itoa(i), Int64(1)})
		}
		body := appendMessage(nil, NewMessage("large", append(args, args[0])...))
		go func() {
			for id := range uint64(20) {
				p.send(notifyOf(1, id, NewMessage("place"), NewMessage("large", args...)))
				p.send(finishFrame(append(beginFrame(nil, frameNotify, 0, 2, id), body[:3000]...), 0))
				p.send(finishFrame(append(beginFrame(nil, frameUnset, flagFIN, 2, id), body[3000:]...), 0))
			}
		}()
		for range 40 {
			<-p.answers
		}
		half := notifyOf(3, 3, echoed("x"))
		p.send(half[:5]) // also if it waits for the rest of a frame
		time.Sleep(3 * shrinkIn)
		synctest.Wait()
		rd := c.rd
		for name, have := range map[string]int{
			"read":      cap(rd.buf) - minBuffer,
			"answers":   cap(rd.out),
			"fragments": cap(c.fragments.buf),
			"job":       cap(rd.job.buf) + cap(rd.job.actions.buf) + cap(rd.job.payload) + cap(rd.job.current.args),
		} {
			if have > 0 {
				t.Errorf("want nothing kept of what was grown, have %d of %s", have, name)
			}
		}
		p.send(half[5:])
		p.want(3, 3, "")
	})
}

// The context of a handler ends with its connection, and with the agent.
func TestHandlerContextCancelled(t *testing.T) {
	for what, gone := range map[string]func(b *bed, p *peer){
		"reset": func(_ *bed, p *peer) { p.nc.Close() },
		"Close": func(b *bed, _ *peer) { b.Close() },
	} {
		for limit, opts := range map[string][]Option{"without": nil, "with": {WithHandlerTimeout(time.Hour)}} {
			t.Run(what+"/"+limit+" a timeout", func(t *testing.T) {
				var ended atomic.Int32
				opts = append(opts, WithHandlerFunc("hang", func(ctx context.Context, _ *Message, a *Actions) error {
					if err := ctx.Err(); err != nil {
						t.Errorf("want no error yet, have %v", err)
					}
					child, cancel := context.WithCancel(ctx)
					defer cancel()
					<-ctx.Done()
					<-child.Done()
					if want, have := context.Canceled, ctx.Err(); want != have {
						t.Errorf("want %v, have %v", want, have)
					}
					ended.Add(1)
					return nil
				}))
				everyplace(t, opts, func(t *testing.T, b *bed, p *peer, g *gates) {
					ended.Store(0)
					p.send(notifyOf(1, 1, NewMessage("place"), NewMessage("hang")), notifyOf(1, 2, NewMessage("hang")))
					time.Sleep(time.Second)
					if want, have := int32(0), ended.Load(); want != have {
						t.Errorf("want %d handlers that returned, have %d", want, have)
					}
					gone(b, p)
					synctest.Wait()
					if want, have := int32(2), ended.Load(); want != have {
						t.Errorf("want %d handlers that returned, have %d", want, have)
					}
					<-p.answers // closed
					p.answers = nil
				})
			})
		}
	}
}

// The context of an async connection that was reset lasts as long as handlers
// whose answers leave by a sibling, and no longer.
func TestHandlerContextAsync(t *testing.T) {
	opts := []Option{WithAsync()}
	everyplace(t, opts, func(t *testing.T, b *bed, p *peer, g *gates) {
		first := b.sole()
		second := b.peer()
		p.send(notifyOf(1, 1, NewMessage("place"), waiting("x")))
		<-g.in
		synctest.Wait() // the second is async once it has said HELLO
		p.nc.Close()
		time.Sleep(time.Minute)
		if err := first.ctx.Err(); err != nil {
			t.Errorf("want a context that lasts, have %v", err)
		}
		close(g.gate("x"))
		second.want(1, 1, sets("wait", "x"))
		synctest.Wait()
		if want, have := context.Canceled, first.ctx.Err(); want != have {
			t.Errorf("want %v, have %v", want, have)
		}
		<-p.answers
		p.answers = second.answers
	})
}

// Every one of very many NOTIFYs is answered once and by its own answer,
// wherever its handlers ran, and frames never mix.
func TestWorkersFlood(t *testing.T) {
	for _, tt := range []struct {
		name  string
		count int
		opts  []Option
	}{
		{"many workers", 100_000, []Option{WithWorkers(64)}},
		{"few workers", 20_000, []Option{WithWorkers(3)}},
		{"timeout", 20_000, []Option{WithWorkers(8), WithHandlerTimeout(2 * time.Millisecond)}},
		{"narrow window, hooks", 20_000, []Option{WithPipelining(4), WithHooks(Hooks{Handled: func(string, time.Duration, error) {}})}},
	} {
		const conns = 16
		perConn := tt.count / conns
		if testing.Short() {
			perConn = tt.count / conns / 20
		}
		t.Run(tt.name, func(t *testing.T) {
			checkLeaks(t)
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			var atOnce, most atomic.Int64
			flood := func(ctx context.Context, m *Message, a *Actions) error {
				defer atOnce.Add(-1)
				for n := atOnce.Add(1); ; {
					if old := most.Load(); n <= old || most.CompareAndSwap(old, n) {
						break
					}
				}
				v := m.Arg(0).Value
				if want, have := fmt.Sprintf("%d:%d.", m.StreamID(), m.FrameID()), string(v.Bytes()); !strings.HasPrefix(have, want) {
					t.Errorf("want an argument of %s, have %.20s", want, have)
				}
				a.SetVar(ScopeTxn, "half", v)
				err := floodWork(ctx, m.FrameID())
				a.SetVar(ScopeTxn, "whole", v)
				return err
			}
			b := newBed(t, l, append(tt.opts, WithFaultVar(ScopeTxn, "fault"), WithHandlerFunc("flood", flood))...)
			var clients sync.WaitGroup
			for range conns {
				p := b.quietPeer()
				p.late = b.handlerTimeout > 0
				clients.Go(func() { p.flood(perConn) })
			}
			clients.Wait()
			eventually(t, "leave to be given back", func() bool { return b.workers.permits.Load() == int64(b.options.workers) })
			if most, n := most.Load(), int64(b.options.workers); most > n {
				t.Errorf("want at most %d handlers at once, have had %d", n, most)
			}
			b.Close()
		})
	}
}

// floodWork is what a handler does for a NOTIFY of that id, and floodFault how
// it is to end, beside "timeout" and "overload".
func floodWork(ctx context.Context, id uint64) error {
	switch r := rand.IntN(1000); {
	case r < 10:
		time.Sleep(time.Duration(rand.IntN(3000)) * time.Microsecond)
	case r < 13:
		<-time.After(2 * stallAfter)
	case r < 14 && ctx.Done() != nil:
		ctx.Err()
	case r < 100:
		runtime.Gosched()
	case r < 200:
		for began := time.Now(); time.Since(began) < 50*time.Microsecond; {
		}
	}
	switch floodFault(id) {
	case "error":
		if id%2 == 0 {
			runtime.Goexit()
		}
		return errors.New("flood")
	case "panic":
		panic("flood")
	}
	return nil
}

func floodFault(id uint64) string {
	switch id % 301 {
	case 100, 101:
		return "error"
	case 200:
		return "panic"
	}
	return ""
}

// flood sends that many NOTIFYs, up to 40 in flight, and checks the answers.
func (p *peer) flood(count int) {
	const inFlight = 40
	var mu sync.Mutex
	sent := make(map[uint64]string)
	tokens := make(chan struct{}, inFlight)
	var sender sync.WaitGroup
	defer sender.Wait()
	defer p.nc.Close()
	sender.Go(func() {
		var batch []byte
		for id := range uint64(count) {
			s := fmt.Sprintf("%d:%d.%s", id%7, id, strings.Repeat("x", rand.IntN(100)))
			if rand.IntN(50) == 0 {
				s += strings.Repeat("y", rand.IntN(5000))
			}
			select {
			case tokens <- struct{}{}:
			case <-time.After(longWait):
				p.t.Errorf("want %d answers, have no more for %v", count, longWait)
				p.nc.Close()
				return
			}
			mu.Lock()
			sent[id] = s
			mu.Unlock()
			batch = append(batch, notifyOf(id%7, id, NewMessage("flood", Arg{"s", String(s)}))...)
			if len(tokens) < inFlight && rand.IntN(4) > 0 && id != uint64(count)-1 {
				continue
			}
			if _, err := p.nc.Write(batch); err != nil {
				p.t.Errorf("after %d: %v", id, err)
				return
			}
			batch = batch[:0]
		}
	})
	for n := range count {
		f, err := frameFrom(p.r)
		if err != nil || f.kind != frameAck {
			p.t.Errorf("answer %d of %d: want an ACK, have a frame of type %d, error %v", n, count, f.kind, err)
			return
		}
		mu.Lock()
		s, ok := sent[f.id]
		delete(sent, f.id)
		mu.Unlock()
		if !ok || f.stream != f.id%7 {
			p.t.Errorf("want an answer to what was asked and not answered yet, have %d:%d", f.stream, f.id)
			return
		}
		want := sets("half", s) + "," + sets("whole", s)
		if fault := floodFault(f.id); fault != "" {
			want = sets("fault", fault)
		}
		switch have := inActions(f.payload); have {
		case want:
		case sets("fault", "timeout"), sets("fault", "overload"):
			if !p.late {
				p.t.Errorf("%d:%d: want %s, have %s", f.stream, f.id, want, have)
			}
		default:
			p.t.Errorf("%d:%d: want %s, have %s", f.stream, f.id, want, have)
			return
		}
		<-tokens
	}
}

// A NOTIFY all of whose handlers returned in time is not late, even if the
// watch comes just before its answer.
func TestHandlerTimeoutFinished(t *testing.T) {
	const limit = 5 * time.Millisecond
	hook := WithHooks(Hooks{Handled: func(message string, _ time.Duration, err error) {
		if err != nil {
			t.Errorf("want no error, have %v", err)
		}
		if message == "echo" {
			time.Sleep(2 * limit) // what the scheduler may do
		}
	}})
	opts := []Option{WithHandlerTimeout(limit), WithFaultVar(ScopeTxn, "fault"), WithHandlerFunc("echo", echo), hook}
	everyplace(t, opts, func(t *testing.T, b *bed, p *peer, _ *gates) {
		p.send(notifyOf(1, 1, NewMessage("place"), echoed("x")))
		p.want(1, 1, sets("echo", "x"))
	})
}

// raceEnabled tells whether this is a build with the race detector, under which
// a sync.Pool drops things at random.
func raceEnabled() bool {
	info, _ := debug.ReadBuildInfo()
	return info != nil && slices.ContainsFunc(info.Settings, func(s debug.BuildSetting) bool { return s.Key == "-race" && s.Value == "true" })
}

// ipScore answers check-client-ip as the reputation agent does.
func ipScore(_ context.Context, m *Message, a *Actions) error {
	ip, ok := m.Arg(0).Value.Addr()
	if !ok {
		return errors.New("want an address")
	}
	last := ip.As16()[15]
	a.SetVar(ScopeSess, "ip_score", Uint32(uint32(last)))
	return nil
}

// lengths is a handler that looks at every argument.
func lengths(_ context.Context, m *Message, a *Actions) error {
	n := 0
	for name, v := range m.Args() {
		n += len(name) + len(v.Bytes())
	}
	if v, ok := m.Lookup("header-3"); ok {
		a.SetVar(ScopeTxn, "third", v)
	}
	a.SetVar(ScopeTxn, "length", Int64(int64(n)))
	return nil
}

var (
	ipMessage    = NewMessage("check-client-ip", Arg{"ip", Addr(netip.MustParseAddr("192.0.2.42"))})
	eightStrings = func() *Message {
		var args []Arg
		for i := range 8 {
			args = append(args, Arg{"header-" + strconv.Itoa(i), String(strings.Repeat("v", 10*i))})
		}
		return NewMessage("check-request", args...)
	}()
)

// From frame to frame nothing is allocated, wherever handlers run. A handler
// timeout costs one allocation, the context.
func TestWorkersAllocs(t *testing.T) {
	if raceEnabled() {
		t.Skip("a sync.Pool drops things at random under the race detector")
	}
	var handled atomic.Int64
	hooks := WithHooks(Hooks{Handled: func(string, time.Duration, error) { handled.Add(1) }})
	for _, tt := range []struct {
		name string
		opts []Option
		want float64
	}{
		{"plain", nil, 0},
		{"hooks", []Option{hooks}, 0},
		{"timeout", []Option{WithHandlerTimeout(time.Minute), hooks}, 1},
	} {
		for _, msg := range []*Message{ipMessage, eightStrings} {
			for place, left := range map[string]int{"inline": 0, "spread": math.MaxInt} {
				t.Run(tt.name+"/"+msg.Name()+"/"+place, func(t *testing.T) {
					l, err := net.Listen("tcp", "127.0.0.1:0")
					if err != nil {
						t.Fatal(err)
					}
					var c *conn
					b := newBed(t, l, append(tt.opts, WithHandlerFunc("check-client-ip", ipScore), WithHandlerFunc("check-request", lengths),
						WithHandlerFunc("place", func(context.Context, *Message, *Actions) error {
							c.pace.left = left // by the reader, whose it is
							return nil
						}))...)
					p := b.quietPeer()
					for c = range b.Agent.conns {
					}
					var ack []byte
					ask := func(frame []byte) func() {
						p.send(frame)
						f, err := frameFrom(p.r)
						if err != nil {
							t.Fatal(err)
						}
						ack = appendAck(nil, flagFIN, ids(f.stream, f.id), f.payload)
						buf := make([]byte, len(ack))
						return func() {
							if _, err := p.nc.Write(frame); err != nil {
								t.Fatal(err)
							}
							if _, err := io.ReadFull(p.nc, buf); err != nil || !bytes.Equal(ack, buf) {
								t.Fatalf("want %x, have %x, error %v", ack, buf, err)
							}
						}
					}
					ask(notifyOf(0, 0, NewMessage("place")))
					once := ask(notifyOf(1000, 1, msg))
					for range 100 {
						once()
					}
					if have := testing.AllocsPerRun(2000, once); have > tt.want {
						t.Errorf("want %v allocations, have %v", tt.want, have)
					}
				})
			}
		}
	}
}

// A connection that was used, also by a burst, and is idle again takes no more
// than 8 KiB besides its goroutine.
func TestIdleMemory(t *testing.T) {
	conns, most := 5000, uint64(8<<10)
	if testing.Short() || raceEnabled() {
		conns = 500
	}
	heap := func() uint64 {
		for range 3 { // a sync.Pool lives longer than one
			runtime.GC()
		}
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	synctest.Test(t, func(t *testing.T) {
		l := newMemListener()
		newBed(t, l, WithHandlerFunc("check-client-ip", ipScore), WithHandlerFunc("check-request", lengths))
		greeting := appendHello(nil, frameHAProxyHello, &hello{versions: "2.0", frameSize: 16380, capabilities: "pipelining"})
		burst := notifyOf(1, 1, ipMessage)
		for id := range uint64(100) {
			burst = append(burst, notifyOf(1, id, eightStrings)...)
		}
		burst = append(burst, notifyOf(9, 9, NewMessage("check-request", Arg{"large", String(strings.Repeat("x", 12<<10))}))...)
		ends := make([][2]net.Conn, conns)
		for i := range ends {
			ends[i][0], ends[i][1] = net.Pipe()
		}
		before := heap()
		for _, e := range ends {
			l.offer(t, e[1])
			read := func(frames int) {
				r := bufio.NewReader(e[0])
				for range frames {
					if _, err := frameFrom(r); err != nil {
						t.Fatal(err)
					}
				}
			}
			e[0].Write(greeting)
			read(1)
			go e[0].Write(burst)
			read(102)
		}
		time.Sleep(3 * shrinkIn)
		synctest.Wait()
		after := heap()
		have := (after - before) / uint64(conns)
		if have > most {
			t.Errorf("want at most %d bytes, have %d", most, have)
		}
		for _, e := range ends {
			e[0].Close()
		}
	})
}

// Each message has its handler, or the fallback, or none.
func TestHandlers(t *testing.T) {
	fallback := func(_ context.Context, m *Message, a *Actions) error {
		a.SetVar(ScopeReq, "fallback", String(m.Name()))
		return nil
	}
	var r record
	opts := []Option{WithHandlerFunc("echo", echo), r.hook()}
	everyplace(t, append(opts, WithFallback(HandlerFunc(fallback))), func(t *testing.T, b *bed, p *peer, _ *gates) {
		r.list = nil
		p.send(notifyOf(1, 1, NewMessage("place"), NewMessage("a"), echoed("x"), NewMessage("b")))
		p.want(1, 1, "set-var req.fallback string a,"+sets("echo", "x")+",set-var req.fallback string b")
		p.wantNone()
		r.want(t, "place: <nil>", "a: <nil>", "echo: <nil>", "b: <nil>")
	})

	var lines logLines
	opts = append(opts, WithFaultVar(ScopeTxn, "fault"), WithLogger(&lines))
	everyplace(t, opts, func(t *testing.T, b *bed, p *peer, _ *gates) {
		r.list = nil
		lines.forget()
		for id := range uint64(3) {
			p.send(notifyOf(1, id, NewMessage("place"), NewMessage("a"), echoed("x"), NewMessage("b")))
			p.want(1, id, sets("echo", "x"))
			p.wantNone()
			r.want(t, "place: <nil>", "a: spoa: no handler for this message", "echo: <nil>", "b: spoa: no handler for this message")
		}
		for _, name := range []string{"a", "b"} {
			if have := lines.with("level=warn", "message="+name, "handled=echo,place,wait"); len(have) != 1 {
				t.Errorf("want one warning of message %s, have %q", name, have)
			}
		}
		// A peer can invent any number of names.
		for id := range uint64(2 * maxUnknown) {
			p.send(notifyOf(2, id, NewMessage("invented-"+strconv.FormatUint(id, 10))))
			p.want(2, id, "")
		}
		if have := lines.with("no handler"); len(have) != maxUnknown {
			t.Errorf("want %d warnings, have %d", maxUnknown, len(have))
		}
	})
}

// A message that fails loses its own actions, and no other.
func TestHandlerFaults(t *testing.T) {
	own := errors.New("own")
	type done struct {
		message string
		err     error
	}
	var mu sync.Mutex
	var told []done
	fail := func(end func(a *Actions) error) HandlerFunc {
		return func(_ context.Context, m *Message, a *Actions) error {
			a.SetVar(ScopeTxn, "of."+m.Name(), Bool(true))
			return end(a)
		}
	}
	opts := []Option{WithFaultVar(ScopeTxn, "fault"), WithHandlerFunc("echo", echo),
		WithHandler("error", fail(func(*Actions) error { return fmt.Errorf("wrapped: %w", own) })),
		WithHandler("panic", fail(func(*Actions) error { panic(own) })),
		WithHandler("panic with text", fail(func(*Actions) error { panic("text") })),
		WithHandler("panic with nil", fail(func(*Actions) error { panic(nil) })),
		WithHandler("timeout", fail(func(*Actions) error { return fmt.Errorf("wrapped: %w", context.DeadlineExceeded) })),
		WithHandler("goexit", fail(func(*Actions) error { runtime.Goexit(); return nil })),
		WithHandler("actions", fail(func(a *Actions) error {
			a.SetVar(ScopeTxn, "", Bool(true))
			a.SetVar(ScopeTxn, "large", String(strings.Repeat("x", 17000)))
			a.SetVar(ScopeTxn, "fits", Bool(true))
			return nil
		})),
		WithHandler("actions returned", fail(func(a *Actions) error {
			a.SetVar(ScopeTxn, "", Bool(true))
			return a.Err()
		})),
		WithHooks(Hooks{Handled: func(message string, _ time.Duration, err error) {
			mu.Lock()
			defer mu.Unlock()
			told = append(told, done{message, err})
		}})}
	set := func(name string) string { return "set-var txn." + name + " bool true" }
	for _, tt := range []struct {
		message, fault, actions string
		is                      error
	}{
		{"error", "error", "", own},
		{"panic", "panic", "", own},
		{"panic with text", "panic", "", nil},
		{"panic with nil", "panic", "", new(runtime.PanicNilError)},
		{"timeout", "timeout", "", context.DeadlineExceeded},
		{"goexit", "error", "", errGoexit},
		{"actions", "error", set("of.actions") + "," + set("fits"), nil},
		{"actions returned", "error", "", nil},
	} {
		t.Run(tt.message, func(t *testing.T) {
			everyplace(t, opts, func(t *testing.T, b *bed, p *peer, _ *gates) {
				for id := range uint64(3) {
					told = nil
					p.send(notifyOf(1, id, NewMessage("place"), echoed("before"), NewMessage(tt.message), echoed("after")))
					want := []string{sets("echo", "before"), tt.actions, sets("echo", "after"), sets("fault", tt.fault)}
					if tt.message == "goexit" {
						want[2] = "" // there is no goroutine to call it
					}
					p.want(1, id, strings.Join(slices.DeleteFunc(want, func(s string) bool { return s == "" }), ","))
					p.wantNone()
					if len(told) < 3 || told[2].message != tt.message || told[2].err == nil {
						t.Fatalf("want Handled told of the error, have %v", told)
					}
					err := told[2].err
					if target := new(runtime.PanicNilError); tt.is != nil && !errors.Is(err, tt.is) && !errors.As(err, &target) {
						t.Errorf("want %v, have %v", tt.is, err)
					}
					var pe *PanicError
					if want, have := tt.fault == "panic", errors.As(err, &pe); want != have {
						t.Errorf("want a PanicError: %v, have %v", want, err)
					}
					if pe != nil && (!strings.Contains(string(pe.Stack), "TestHandlerFaults") ||
						!strings.HasPrefix(pe.Error(), "spoa: handler panicked: ")) {
						t.Errorf("want the stack of the panic, have %v\n%s", pe, pe.Stack)
					}
					// No fault, no variable.
					p.send(notifyOf(2, id, NewMessage("place"), echoed("good"), NewMessage("none")))
					p.want(2, id, sets("echo", "good"))
				}
			})
		})
	}
}

// Handlers of inline calls, of those handed over and of spread ones together
// are no more than WithWorkers allows, and as many if there is work.
func TestWorkersBound(t *testing.T) {
	for _, n := range []int{1, 2, 5} {
		var now, most atomic.Int64
		gate := new(chan struct{})
		opts := []Option{WithWorkers(n), WithHandlerFunc("hold", func(context.Context, *Message, *Actions) error {
			defer now.Add(-1)
			most.Store(max(most.Load(), now.Add(1)))
			<-*gate
			return nil
		})}
		bubble(t, opts, func(t *testing.T, b *bed) {
			*gate = make(chan struct{})
			var peers []*peer
			for range 4 {
				peers = append(peers, b.peer())
			}
			const each = 10
			for _, p := range peers {
				var frames [][]byte
				for id := range uint64(each) {
					frames = append(frames, notifyOf(1, id, NewMessage("hold")))
				}
				p.send(frames...)
			}
			for left := each * len(peers); left > 0; left-- {
				time.Sleep(3 * stallAfter)
				synctest.Wait()
				if want, have := int64(min(n, left)), now.Load(); want != have {
					t.Errorf("want %d handlers at once, have %d", want, have)
				}
				*gate <- struct{}{}
			}
			for _, p := range peers {
				for range each {
					<-p.answers
				}
			}
			synctest.Wait()
			if want, have := int64(n), most.Load(); want != have {
				t.Errorf("want %d handlers at once, have had %d", want, have)
			}
			if want, have := int64(n), b.workers.permits.Load(); want != have {
				t.Errorf("want leave for %d, have %d", want, have)
			}
		})
	}
}

func TestPace(t *testing.T) {
	const quick, slow = slowCall, slowCall + 1
	type step func(p *pace)
	batch := func(calls int, each time.Duration, waited bool) step {
		return func(p *pace) { p.batch(calls, time.Duration(calls)*each, waited) }
	}
	stall := step((*pace).stalled)
	for _, tt := range []struct {
		name  string
		steps []step
		want  int // NOTIFYs spread then
	}{
		{"new", nil, 0},
		{"quick", []step{batch(20, quick, true)}, 0},
		{"one slow batch", []step{batch(20, slow, true)}, 0},
		{"two slow batches", []step{batch(20, slow, true), batch(1, slow, true)}, spreadRun},
		{"nobody waited", []step{batch(1, slow, false), batch(1, slow, false), batch(1, slow, false)}, 0},
		{"a quick one between", []step{batch(20, slow, true), batch(1, quick, true), batch(20, slow, true)}, 0},
		{"stalled at once", []step{stall}, spreadRun},
		{"stalled once in a while", []step{batch(stallRun, quick, true), stall, batch(stallRun, quick, true), stall}, 0},
		{"stalled twice", []step{batch(stallRun, quick, true), stall, batch(stallRun-1, quick, true), stall}, spreadRun},
	} {
		var p pace
		for _, step := range tt.steps {
			step(&p)
		}
		have := 0
		for !p.inline() {
			have++
		}
		if tt.want != have {
			t.Errorf("%s: want %d spread, have %d", tt.name, tt.want, have)
		}
		if !p.inline() {
			t.Errorf("%s: want calls inline from then on", tt.name)
		}
	}

	// Is the call that is tried slow, the next ones are spread again; is it
	// quick, that was all.
	for _, tried := range []struct {
		step step
		want int
	}{
		{stall, spreadRun}, {batch(1, slow, true), spreadRun}, {batch(1, quick, true), 0},
	} {
		var p pace
		batch(20, slow, true)(&p)
		batch(20, slow, true)(&p)
		for !p.inline() {
		}
		tried.step(&p)
		if want, have := tried.want, p.left; want != have {
			t.Errorf("after a run of spread ones: want %d more, have %d", want, have)
		}
	}
}

func TestLimiter(t *testing.T) {
	var now time.Duration
	l := limiter{now: func() time.Duration { return now }}
	for _, tt := range []struct {
		at         time.Duration
		kind       string
		suppressed int
		ok         bool
	}{
		{0, "a", 0, true},
		{1, "a", 0, false},
		{2, "b", 0, true},
		{time.Second - 1, "a", 0, false},
		{time.Second, "a", 2, true},
		{time.Second + 2, "a", 0, false},
		{time.Second + 2, "b", 0, true},
		{time.Minute, "a", 1, true},
	} {
		now = tt.at
		if suppressed, ok := l.allow(tt.kind); suppressed != tt.suppressed || ok != tt.ok {
			t.Errorf("%s at %v: want %d, %v, have %d, %v", tt.kind, tt.at, tt.suppressed, tt.ok, suppressed, ok)
		}
	}
}

func (l *logLines) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = nil
}

// A handler that takes longer than a second is warned of once, and of one name
// no more than once a second.
func TestSlowHandlerWarned(t *testing.T) {
	var lines logLines
	opts := []Option{WithLogger(&lines),
		WithHandlerFunc("slow", func(context.Context, *Message, *Actions) error {
			time.Sleep(10 * slowWarn)
			return nil
		})}
	everyplace(t, opts, func(t *testing.T, b *bed, p *peer, _ *gates) {
		lines.forget()
		p.send(notifyOf(1, 1, NewMessage("place"), NewMessage("slow")), notifyOf(1, 2, NewMessage("slow")))
		time.Sleep(slowWarn - 2*tick)
		if have := lines.with("slow handler"); len(have) != 0 {
			t.Errorf("want no warning yet, have %q", have)
		}
		<-p.answers
		<-p.answers
		if have := lines.with("level=warn", "slow handler", "slow "); len(have) != 1 {
			t.Errorf("want one warning, have %q", have)
		}
	})
}

// In an overload, what is answered with a verdict in time stays near what the
// workers can do. In the order of their coming all would soon be late.
func TestOverload(t *testing.T) {
	const (
		workers = 4
		took    = 5 * time.Millisecond
		limit   = 20 * time.Millisecond
		conns   = 10
		lasts   = 2 * time.Second
	)
	capacity := workers * int(lasts/took)
	every := lasts / time.Duration(5*capacity) // NOTIFYs come
	var verdicts, overloads, late atomic.Int64
	opts := []Option{WithWorkers(workers), WithHandlerTimeout(limit), WithFaultVar(ScopeTxn, "fault"),
		WithHandlerFunc("sleep", func(_ context.Context, _ *Message, a *Actions) error {
			time.Sleep(took)
			a.SetVar(ScopeTxn, "verdict", Bool(true))
			return nil
		}),
		WithHooks(Hooks{Handled: func(_ string, took time.Duration, err error) {
			if err == ErrOverload {
				overloads.Add(1)
			}
		}})}
	bubble(t, opts, func(t *testing.T, b *bed) {
		var peers []*peer
		for range conns {
			peers = append(peers, b.peer())
		}
		began := time.Now()
		due := func(i int) time.Time { return began.Add(time.Duration(i) * every) }
		var both sync.WaitGroup
		for n, p := range peers {
			both.Go(func() {
				for i := n; i < 5*capacity; i += conns {
					time.Sleep(time.Until(due(i)))
					p.send(notifyOf(1, uint64(i), NewMessage("sleep")))
				}
			})
			both.Go(func() {
				for i := n; i < 5*capacity; i += conns {
					a := <-p.answers
					waited := a.at.Sub(due(int(a.id)))
					switch {
					case a.actions == sets("fault", "timeout"):
						late.Add(1)
					case a.actions == "set-var txn.verdict bool true" && waited > limit: // before the watch came
						late.Add(1)
					case a.actions == "set-var txn.verdict bool true":
						verdicts.Add(1)
					case a.actions != sets("fault", "overload"):
						t.Errorf("have %v after %v", a, waited)
					}
					if waited > limit+2*tick {
						t.Errorf("want an answer within %v, have it after %v", limit, waited)
					}
				}
			})
		}
		both.Wait()
		time.Sleep(took) // for the last late handlers
		synctest.Wait()

		// The same without a deadline, in the order of their coming.
		free := make([]time.Duration, workers)
		fifo := 0
		for i := range 5 * capacity {
			at := time.Duration(i) * every
			w := slices.Index(free, slices.Min(free))
			free[w] = max(free[w], at) + took
			if free[w]-at <= limit {
				fifo++
			}
		}
		share := func(n int) string { return fmt.Sprintf("%d %%", 100*n/capacity) }
		have := int(verdicts.Load())
		t.Logf("verdicts in time, of what the workers can do: %s; a plain queue: %s; late: %d, overloads: %d",
			share(have), share(fifo), late.Load(), overloads.Load())
		if want := capacity * 8 / 10; have < want {
			t.Errorf("want at least %d verdicts in time, have %d", want, have)
		}
		if want, have := 5*capacity, have+int(overloads.Load()+late.Load()); want != have {
			t.Errorf("want %d answers, have %d", want, have)
		}
	})
}
