package spoa

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// half closes the writing half.
func (h *haproxy) half() {
	h.t.Helper()
	if err := h.nc.(*net.TCPConn).CloseWrite(); err != nil {
		h.t.Fatal(err)
	}
}

// A conversation may break off after any byte: the frames before that are
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
	healthy := ln.greet(t)
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

// Memory is taken for the bytes that were received, not for those announced.
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
					c.pace.Spread(tt.spread)
				}
				start := time.Now()
				go func() {
					flood := strings.Repeat(notifyOf(1, 1, NewMessage("flood")), 100)
					for {
						if _, err := io.WriteString(nc, flood); err != nil {
							return
						}
					}
				}()
				healthy := ln.greet(t)
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
		{"half of a fragmented NOTIFY", func(o *options) {
			WithHelloTimeout(timeout)(o)
			WithFragmentation(1000)(o)
		}, func(h *haproxy) {
			h.hello()
			h.send(fragments(1, 1, number, 3)[0])
			for range 2 { // whole ones in between do not count
				<-time.After(timeout / 4)
				h.wantAnswers()
			}
		}, timeout},
		{"an empty fragment a second", func(o *options) {
			WithHelloTimeout(timeout)(o)
			WithFragmentation(1000)(o)
		}, func(h *haproxy) {
			h.hello()
			h.send(fragments(1, 1, number, 3)[0])
			for range 2 {
				<-time.After(time.Second)
				h.send(rawFrame(frameUnset, 0, 1, 1, ""))
			}
		}, timeout},
		{"idle", WithIdleTimeout(timeout), func(h *haproxy) { h.hello() }, timeout},
		{"half a NOTIFY, idle for less than a frame may take", WithIdleTimeout(timeout), func(h *haproxy) {
			h.hello()
			h.send(notifyFrame(1, 1)[:13])
		}, 10 * time.Second},
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
		h := ln.greet(t)
		const half = 13
		h.send(notifyFrame(0, 0)[:half])
		for id := range uint64(20) {
			<-time.After(time.Second)
			h.send(notifyFrame(0, id)[half:], notifyFrame(0, id+1)[:half])
			h.wantAck(0, id)
		}
	})
}

// No timeout counts against the peer while the agent is too busy to read.
func TestTimeoutsWhileNotReading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		_, ln := startMem(t, WithHandler("number", g), WithPipelining(2), WithHelloTimeout(time.Second), WithIdleTimeout(2*time.Second))
		h := ln.greet(t)
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

// The time in which the agent does not read does not count against a fragmented
// NOTIFY either.
func TestFragmentsWhileNotReading(t *testing.T) {
	for _, more := range []int{0, 1} { // fragments that come before it stops
		t.Run(fmt.Sprint(more), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGate()
				_, ln := startMem(t, withNumbered(), WithHandler("wait", g), WithPipelining(2), WithHelloTimeout(time.Second), WithFragmentation(1000))
				<-time.After(time.Millisecond) // a time of 0 means none
				h := ln.greet(t)
				wait := func(id uint64) string { return notifyOf(id, id, NewMessage("wait")) }
				wire := fragments(9, 9, number, 3)
				h.send(wire[0])
				for range more {
					<-time.After(500 * time.Millisecond)
					h.send(rawFrame(frameUnset, 0, 9, 9, ""))
				}
				h.send(wait(1), wait(2), wait(3))
				g.wait(t, 2)
				sent := make(chan struct{})
				go func() { h.try(wire[1]); close(sent) }()
				<-time.After(longWait / 2)
				close(g.open)
				h.wantAcks(1, 2, 3, 9)
				<-sent
			})
		})
	}
}

// reset ends the connection with an RST.
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
	slow := notifyOf(1, 1, NewMessage("slow"))
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
			long := notifyOf(1, 1, NewMessage("long"))
			h.send(strings.Repeat(long, 500))
		}},
		{"DISCONNECT not awaited", func(h *haproxy) { h.hello(); h.send(goodbye) }},
		{"DISCONNECT of the agent", func(h *haproxy) { h.send("GET / HTTP/1.1\r\n\r\n"); h.wantEnd(StatusInvalidFrame) }},
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
