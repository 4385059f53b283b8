package spoa

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-kit/log/level"
	"github.com/spoa-go/spoa/internal/pace"
)

// A DISCONNECT is answered after the NOTIFYs before it.
func TestDisconnectInFlight(t *testing.T) {
	g := newGate()
	_, ln := startMem(t, WithHandler("number", g))
	h := ln.greet(t)
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

// A handler that takes too long does not keep the connection of a peer that has
// left.
func TestDisconnectStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		g.heeds = true
		_, ln := startMem(t, WithHandler("number", g))
		h := ln.greet(t)
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
	h := ln.greet(t)
	h.send(notifyFrame(1, 1))
	g.wait(t, 1)
	h.send(rawFrame(frameNotify, flagFIN, 2, 2, "\x01"))
	close(g.open)
	h.wantAck(1, 1)
	h.wantEnd(StatusInvalidFrame)
}

// A connection that ends amid a row of NOTIFYs returns its permit to run
// handlers.
func TestFaultAfterNotify(t *testing.T) {
	_, ln := startMem(t, withNumbered(), WithWorkers(2))
	for range 3 {
		h := ln.greet(t)
		h.send(notifyFrame(1, 1), rawFrame(frameNotify, flagFIN, 2, 2, "\x01"))
		h.wantAck(1, 1)
		h.wantEnd(StatusInvalidFrame)
	}
	h := ln.greet(t)
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
	h := ln.greet(t)
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
	healthy := ln.greet(t)
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
			h := ln.greet(t)
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
				opts = append(opts, faultText(ScopeTxn, strings.Repeat("f", 63)))
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
			if want := size; want != largest {
				t.Errorf("stream %d, fault variable %v: want the largest ACK of %d bytes, have %d", stream, fault, want, largest)
			}
		}
	}
}

// A peer that goes is no fault, however it goes.
func TestNormalEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lines := new(logLines)
		hooks, closed := hooked()
		_, ln := startMem(t, withNumbered(), hooks, WithLogger(level.NewFilter(lines, level.AllowInfo())))
		end := func(err error) error {
			h := ln.greetBreaking(t, err)
			h.wantAnswers()
			h.nc.Close()
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

// A connection gives its buffer back when it has been quiet for a moment, also
// while it holds the beginning of a frame.
func TestShrinks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, ln := startMem(t, withNumbered())
		for held := minBuffer - 2; held <= minBuffer+2; held++ {
			h := ln.greet(t)
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

// As many handlers of a connection run as its window allows, and then it is not
// read.
func TestWindow(t *testing.T) {
	for _, window := range []int{1, 2, 5} {
		for _, before := range []int{0, pace.StallRun + 1} {
			t.Run(fmt.Sprintf("%d after %d", window, before), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					g := newGate()
					a, ln := startMem(t, WithPipelining(window), withNumbered(), WithHandler("slow", g))
					h := ln.greet(t)
					for range before {
						h.wantAnswers()
					}
					wire := strings.Repeat(notifyOf(1, 1, NewMessage("slow")), 1000)
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

// A reader that waits for its own handlers leaves them the worker.
func TestWindowLeavesWorker(t *testing.T) {
	for _, took := range []time.Duration{0, pace.SlowCall * 2, tick / 2, 2 * tick} {
		synctest.Test(t, func(t *testing.T) {
			_, ln := startMem(t, WithWorkers(1), WithPipelining(1), WithHandlerFunc("number", func(context.Context, *Message, *Actions) error {
				<-time.After(took)
				return nil
			}))
			h := ln.greet(t)
			for range 5 { // what comes at once decides where the next run
				h.send(strings.Repeat(notifyFrame(1, 1), 20))
				for range 20 {
					h.want(frameAck)
				}
			}
		})
	}
}

// A peer that sends no more may still read.
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

// The context of a handler ends some time after its peer has gone.
func TestContextOfHandler(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		g.heeds = true
		ended := make(chan error, 1)
		_, ln := startMem(t, WithHandler("number", g), WithHooks(Hooks{Handled: func(_ string, _ time.Duration, err error) { ended <- err }}))
		h := ln.greet(t)
		h.send(notifyFrame(1, 1))
		g.wait(t, 1)
		start := time.Now()
		h.nc.Close()
		if err := receive(t, "the handler's end", ended); err != context.Canceled {
			t.Errorf("want %v, have %v", context.Canceled, err)
		}
		wantTook(t, "the handler's end", start, eofGrace, eofGrace+10*pace.StallAfter) // the reader is to stall first
	})
}

// Unread input of the peer does not keep the AGENT-DISCONNECT from reaching it.
func TestReasonArrives(t *testing.T) {
	hooks, closed := hooked()
	_, dial := startTCP(t, hooks)
	nc := dial()
	if _, err := io.WriteString(nc, "GET / HTTP/1.1\r\n"+strings.Repeat("x", 200000)); err != nil {
		t.Fatal(err)
	}
	receive(t, "the end", closed)
	newHAProxy(t, nc).wantEnd(StatusInvalidFrame)
}
