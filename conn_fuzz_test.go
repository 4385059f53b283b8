package spoa

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-kit/log"
	"github.com/spoa-go/spoa/internal/pace"
)

// talk is what a whole conversation comes to: by the specification, one frame
// at a time.
type talk struct {
	fragmentation int
	pipelining    bool
	frameSize     uint64

	agreed  bool
	checked bool     // it was a health check
	acks    []string // ids and flags
	said    string   // of AGENT-DISCONNECT; empty if there is none
}

func (c *talk) ack(flags int, stream, id string) {
	c.acks = append(c.acks, fmt.Sprintf("%s:%s %d", stream, id, flags))
}

func (c *talk) end(status int) { c.said = fmt.Sprint(status) }

func (c *talk) run(b []byte) {
	limit := uint64(16384)
	var open, given string // ids of the NOTIFY begun, and of the one given up
	var whole []byte
	for len(b) >= 4 {
		size := uint64(binary.BigEndian.Uint32(b))
		switch {
		case !c.agreed && otherProtocol(b) != nil:
			c.end(4)
			return
		case size > limit:
			c.end(3)
			return
		case size < 7:
			c.end(4)
			return
		case uint64(len(b)-4) < size:
			return
		}
		r := &slow{b: b[4 : 4+size]}
		b = b[4+size:]
		kind, flags := r.byte(), binary.BigEndian.Uint32(r.bytes(big.NewInt(4)))
		stream, id := r.varint().String(), r.varint().String()
		if r.bad {
			c.end(4)
			return
		}
		ids := stream + ":" + id
		fin, abort := flags&1 != 0, flags&2 != 0
		if !c.agreed {
			if !c.hello(kind, fin, ids, r) || c.checked {
				return
			}
			limit = c.frameSize
			continue
		}
		piece := kind == 0 || kind == 3 && !fin
		switch {
		case kind == 1:
			c.end(4)
			return
		case kind == 2:
			c.end(0)
			return
		case kind != 0 && kind != 3, kind == 3 && abort:
			continue
		case piece && c.fragmentation == 0:
			c.end(10)
			return
		case !piece:
			if open != "" && !c.pipelining {
				c.end(11)
				return
			}
			if r.messages(); r.bad {
				c.end(4)
				return
			}
			c.ack(1, stream, id)
			continue
		case open != "" && (kind == 3 || ids != open):
			c.end(11)
			return
		case kind == 3:
			open, given, whole = ids, "", nil
		case given == ids:
			if fin || abort {
				given = ""
			}
			continue
		case open == "":
			c.end(12)
			return
		}
		if whole = append(whole, r.b...); abort {
			open = ""
			continue
		}
		if len(whole) > c.fragmentation {
			c.ack(3, stream, id)
			if open = ""; !fin {
				given = ids
			}
			continue
		}
		if !fin {
			continue
		}
		open = ""
		r = &slow{b: whole}
		if r.messages(); r.bad {
			c.end(4)
			return
		}
		c.ack(1, stream, id)
	}
}

// hello deals with the first frame.
func (c *talk) hello(kind byte, fin bool, ids string, r *slow) bool {
	switch {
	case kind != 1:
		c.end(4)
		return false
	case !fin:
		c.end(10)
		return false
	case ids != "0:0":
		c.end(4)
		return false
	}
	said := make(map[string]string)
	for r.more() {
		key := r.string()
		v := r.value()
		kind, text, _ := strings.Cut(v, " ")
		switch key {
		case "supported-versions", "capabilities", "engine-id":
			r.bad = r.bad || kind != "string"
		case "healthcheck":
			r.bad = r.bad || kind != "bool"
		case "max-frame-size":
			r.bad = r.bad || !strings.Contains(kind, "int") || text[0] == '-'
		}
		said[key] = text
	}
	if r.bad {
		c.end(4)
		return false
	}
	for i, key := range []string{"supported-versions", "max-frame-size", "capabilities"} {
		if _, ok := said[key]; !ok {
			c.end(5 + i)
			return false
		}
	}
	if !slices.ContainsFunc(strings.Split(said["supported-versions"], ","), func(v string) bool {
		minor, ok := strings.CutPrefix(strings.TrimSpace(v), "2.")
		n, isNumber := new(big.Int).SetString(minor, 10)
		return ok && isNumber && strings.Trim(minor, "0123456789") == "" && n.BitLen() <= 32
	}) {
		c.end(8)
		return false
	}
	size, _ := new(big.Int).SetString(said["max-frame-size"], 10)
	if size.Cmp(big.NewInt(256)) < 0 {
		c.end(9)
		return false
	}
	if size.Cmp(new(big.Int).SetUint64(c.frameSize)) < 0 {
		c.frameSize = size.Uint64()
	}
	c.pipelining = c.pipelining && slices.ContainsFunc(strings.Split(said["capabilities"], ","), func(s string) bool {
		return strings.TrimSpace(s) == "pipelining"
	})
	c.agreed, c.checked = true, said["healthcheck"] == "true"
	return true
}

// playedConn is a connection whose peer says it all, some bytes at a time, and
// ends.
type playedConn struct {
	net.Conn // for the methods that need not do anything; nil
	said     []byte
	step     int

	mu     sync.Mutex
	writes [][]byte
	closed atomic.Bool
}

func (c *playedConn) Read(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed.Load():
		return 0, net.ErrClosed
	case len(c.said) == 0:
		return 0, io.EOF
	}
	n := copy(b, c.said[:min(c.step, len(c.said))])
	c.said = c.said[n:]
	return n, nil
}

func (c *playedConn) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed.Load() {
		return 0, net.ErrClosed
	}
	c.writes = append(c.writes, slices.Clone(b))
	return len(b), nil
}

func (c *playedConn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed.Store(true)
	return nil
}

func (c *playedConn) RemoteAddr() net.Addr             { return &net.UnixAddr{Name: "played", Net: "unix"} }
func (c *playedConn) SetReadDeadline(time.Time) error  { return nil }
func (c *playedConn) SetWriteDeadline(time.Time) error { return nil }

// play has an agent answer what a peer says, and compares its answers with
// those by the specification.
func play(t *testing.T, setup, step byte, said []byte) {
	const fragmentation, ownFrameSize = 600, 2000
	want := talk{pipelining: true, frameSize: ownFrameSize}
	ended := make(chan error, 1)
	opts := []Option{
		WithLogger(log.NewNopLogger()), WithMaxFrameSize(ownFrameSize), WithPipelining(4), faultText(ScopeTxn, "fault"),
		WithHooks(Hooks{ConnClosed: func(_ Peer, err error) { ended <- err }}),
		WithHandlerFunc("panic", func(context.Context, *Message, *Actions) error { panic("out of cheese") }),
		WithHandlerFunc("exit", func(context.Context, *Message, *Actions) error { runtime.Goexit(); return nil }),
		WithHandlerFunc("stall", func(ctx context.Context, m *Message, a *Actions) error {
			<-time.After(2 * pace.StallAfter)
			return numbered(ctx, m, a)
		}),
		WithFallback(HandlerFunc(func(ctx context.Context, m *Message, a *Actions) error {
			for name, v := range m.Args() {
				a.SetVar(ScopeSess, name, v)
			}
			return numbered(ctx, m, a)
		})),
	}
	if setup&1 != 0 {
		want.fragmentation = fragmentation
		opts = append(opts, WithFragmentation(fragmentation))
	}
	if setup&2 != 0 {
		want.pipelining = false
		opts = append(opts, WithPipelining(1))
	}
	if setup&4 != 0 {
		opts = append(opts, WithAsync())
	}
	if setup&8 != 0 {
		opts = append(opts, WithDebug(true))
	}
	if setup&16 != 0 {
		opts = append(opts, WithWorkers(1))
	}
	if setup&32 != 0 {
		opts = append(opts, WithStats(), func(o *options) {
			for _, name := range []string{"panic", "exit", "stall", "number"} {
				MaxConcurrent(1)(o, name)
			}
		})
	}
	want.run(said)

	goroutines := runtime.NumGoroutine()
	nc := &playedConn{said: said, step: int(step) + 1}
	if step == 255 {
		nc.step = len(said) + 1
	}
	a := New(opts...)
	a.serveConn(new(listener), nc)
	err := receive(t, "the end", ended)
	a.Close()
	receive(t, "the agent to be closed", a.done)
	if n := len(a.Conns()); n != 0 || !nc.closed.Load() {
		t.Fatalf("%q: want it closed and forgotten, have %d connections", said, n)
	}
	eventually(t, "no goroutine left", func() bool { return runtime.NumGoroutine() <= goroutines })
	a.workers.boundMu.Lock() // the race detector does not see that all goroutines have ended
	defer a.workers.boundMu.Unlock()
	for name, b := range a.workers.bounds {
		if b.free != 1 || b.waiting.head != nil {
			t.Fatalf("%q: %s: want one free slot and none who waits, have %d, %v", said, name, b.free, b.waiting.head)
		}
	}
	for _, s := range a.Stats() {
		if s.Running != 0 {
			t.Fatalf("%q: %s: want no handler that runs, have %d", said, s.Message, s.Running)
		}
	}

	have := talk{}
	hello := 0
	for _, w := range nc.writes {
		if err := eachFrame(strings.NewReader(string(w)), func(f frame) {
			size := uint64(len(f.payload) + 5 + len(ids(f.stream, f.id)))
			switch {
			case have.said != "":
				t.Fatalf("%q: want nothing after AGENT-DISCONNECT, have %s", said, inWordsFrame(f))
			case f.kind == frameAgentHello && !have.agreed && len(have.acks) == 0 && len(w) == int(size)+lengthSize:
				have.agreed = true
				hello++
			case f.kind == frameAck && have.agreed && size <= want.frameSize:
				have.ack(int(f.flags), fmt.Sprint(f.stream), fmt.Sprint(f.id))
			case f.kind == frameAgentDisconnect && size <= minFrameSize:
				have.said = fmt.Sprint(uint32(parseDisconnect(f.payload).Status))
			default:
				t.Fatalf("%q: want a frame of an agent's, have %s", said, inWordsFrame(f))
			}
		}); err != nil {
			t.Fatalf("%q: want whole frames in a Write, have %v", said, err)
		}
	}
	slices.Sort(want.acks)
	slices.Sort(have.acks)
	if want.agreed != have.agreed || want.said != have.said || !slices.Equal(want.acks, have.acks) {
		t.Fatalf("%q: want HELLO %v, ACKs %q, DISCONNECT %q; have HELLO %v, ACKs %q, DISCONNECT %q",
			said, want.agreed, want.acks, want.said, have.agreed, have.acks, have.said)
	}
	var d *DisconnectError
	if isFault := errors.As(err, &d); isFault != (want.said != "") || isFault && !d.Remote && fmt.Sprint(uint32(d.Status)) != want.said {
		t.Fatalf("%q: want the reason for DISCONNECT %q, have %v", said, want.said, err)
	}
}

// conversations are valid, or nearly.
func conversations(t testing.TB) (list [][]byte) {
	add := func(frames ...string) { list = append(list, []byte(strings.Join(frames, ""))) }
	greeting := helloFrame(offered)
	named := func(stream, id uint64, name string) string {
		return rawFrame(frameNotify, flagFIN, stream, id, string(appendMessage(nil, NewMessage(name, Arg{"a", Uint64(1 << 50)}))))
	}
	values := string(appendMessage(appendMessage(nil, NewMessage("m", kinds...)), NewMessage("n", kinds...)))
	add(greeting, notifyFrame(1, 1), goodbye)
	add(greeting, named(1, 1, "panic"), named(2, 1, "stall"), named(3, 1, "exit"), named(4, 1, "x"), goodbye)
	add(greeting, named(1, 1, "stall"), named(2, 1, "stall"), named(3, 1, "x"), named(4, 1, "stall"), named(5, 1, "y"))
	add(greeting, rawFrame(frameNotify, flagFIN, 1<<60, 1<<50, values), rawFrame(frameNotify, flagFIN, 1, 1, ""))
	add(append([]string{greeting}, fragments(1, 1, values, 1, 2, 30)...)...)
	add(append([]string{greeting, notifyFrame(2, 2)}, fragments(1, 1, strings.Repeat(number, 100), 500, 590, 610)...)...)
	add(greeting, rawFrame(frameNotify, 0, 1, 1, "abc"), rawFrame(frameUnset, flagFIN|flagAbort, 1, 1, ""), notifyFrame(3, 3), goodbye)
	add(greeting, rawFrame(frameNotify, 0, 1, 1, number), notifyFrame(3, 3), rawFrame(frameUnset, flagFIN, 1, 1, number))
	add(helloFrame(hello{versions: "1.0,2.0", frameSize: 256, healthcheck: true}), notifyFrame(1, 1))
	add("GET / HTTP/1.1\r\n\r\n")
	var captured []string
	for _, c := range captures(t) {
		wire := rawFrame(c.kind, c.flags, c.stream, c.id, string(c.payload))
		add(wire)
		add(greeting, wire)
		if c.kind == frameHAProxyHello && !strings.Contains(string(c.payload), "healthcheck") {
			add(append(captured, goodbye)...)
			captured = nil
		}
		if c.kind != frameHAProxyHello || len(captured) == 0 && !strings.Contains(string(c.payload), "healthcheck") {
			captured = append(captured, wire)
		}
	}
	add(captured...)
	return list
}

func TestConversations(t *testing.T) {
	for _, said := range conversations(t) {
		for setup := range byte(64) {
			play(t, setup, []byte{0, 6, 255}[setup%3], said)
		}
	}
}

func FuzzConn(f *testing.F) {
	for i, said := range conversations(f) {
		f.Add(byte(i), byte(255), said)
		f.Add(byte(1), byte(i), said)
	}
	f.Fuzz(play)
}
