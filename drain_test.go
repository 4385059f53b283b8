package spoa

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spoa-go/spoa/internal/drain"
	"github.com/spoa-go/spoa/internal/pace"
)

// takeOver begins a drain in which another process accepts on the listener. It
// returns what Shutdown returns.
func takeOver(t *testing.T, a *Agent, ln *memListener) <-chan error {
	t.Helper()
	shut := make(chan error, 1)
	go func() { shut <- a.Shutdown(context.Background()) }()
	synctest.Wait()
	ln.Close()
	return shut
}

// held is how long a drain may hold an answer back, with the looks around it.
const held = 50*time.Millisecond + 5*tick

// An answer is held back for a moment only, though the window of its connection
// is full and nothing more can come.
func TestDrainFullWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		a, ln := startMem(t, WithHandler("number", g), WithPipelining(2))
		h := ln.greet(t)
		shut := takeOver(t, a, ln)
		time.Sleep(2 * tick) // the hold has begun
		h.send(notifyFrame(1, 1), notifyFrame(2, 2), notifyFrame(3, 3))
		g.wait(t, 2)
		synctest.Wait() // both are with workers, the third waits for room
		start := time.Now()
		close(g.open)
		h.wantAcks(1, 2, 3)
		wantTook(t, "the answers", start, 0, held)
		if err := receive(t, "the end of the drain", shut); err != nil {
			t.Error(err)
		}
		h.wantEnd(StatusNormal)
	})
}

// A held answer does not wait for a handler that is stuck on the same connection.
func TestDrainStuckNeighbour(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		a, ln := startMem(t, withNumbered(), WithHandler("wait", g), WithPipelining(2))
		h := ln.greet(t)
		takeOver(t, a, ln)
		time.Sleep(2 * tick)
		start := time.Now()
		h.send(notifyOf(1, 1, waiting("x")), notifyFrame(2, 2), notifyOf(3, 3, waiting("x")), notifyFrame(4, 4))
		h.wantAck(2, 2)
		wantTook(t, "the answer", start, 0, held+3*pace.StallAfter)
		time.Sleep(time.Second)
		close(g.open)
		h.wantAcks(1, 3, 4)
		h.wantEnd(StatusNormal)
	})
}

// A connection is not closed within a frame, or a fragmented NOTIFY: that is read
// to its end, and answered.
func TestDrainPartial(t *testing.T) {
	for name, wire := range map[string][]string{
		"frame":    {notifyFrame(1, 1)[:12], notifyFrame(1, 1)[12:]},
		"fragment": fragments(1, 1, number, 3),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, ln := startMem(t, withNumbered(), WithFragmentation(1000))
				h, other := ln.greet(t), ln.greet(t)
				h.wantAnswers()
				other.wantAnswers()
				// One that asks all the time, so that the rounds find something waiting.
				go func() {
					for id := uint64(1); ; id++ {
						other.try(notifyFrame(1, id))
						if f, ok := <-other.frames; !ok || f.kind != frameAck {
							return
						}
						time.Sleep(tick)
					}
				}()
				h.send(wire[0])
				takeOver(t, a, ln)
				time.Sleep(drain.QuietTime * 8 / 10)
				h.send(wire[1])
				h.wantAck(1, 1)
				h.wantEnd(StatusNormal)
			})
		})
	}
}

// What is held back leaves when the hold is over, though the connection that was
// then to be parted has received another NOTIFY.
func TestDrainPartRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t, withNumbered())
		h := ln.greet(t)
		h.wantAnswers()
		c := only(t, a)
		c.box.Hold()
		v := drain.Conn{Look: c.drainLook(drain.Look{}), Verdict: drain.Part}
		h.send(notifyFrame(7, 7))
		synctest.Wait()
		if c.carryOut(&v, false) {
			t.Error("want the connection not parted")
		}
		h.wantAck(7, 7)
	})
}

// A NOTIFY that a peer never completes does not keep an agent from ending.
func TestDrainFragmentLeftOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t, withNumbered(), WithFragmentation(1000))
		h := ln.greet(t)
		h.wantAnswers()
		h.send(fragments(1, 1, number, 3)[0])
		healthCheck(t, ln.dial(t))
		start := time.Now()
		if err := a.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		// Three health checks, of which one has come, every 2 s, and a second.
		wantTook(t, "Shutdown", start, drain.QuietTime, 8*time.Second)
		h.wantEnd(StatusNormal)
	})
}

// healthCheck does what HAProxy's health check does.
func healthCheck(t testing.TB, h *haproxy) {
	t.Helper()
	h.helloAs(hello{versions: "2.0", frameSize: 16380, healthcheck: true})
	h.wantEOF()
}

// addressed is a connection from a host.
type addressed struct {
	net.Conn
	host string
}

func (c addressed) RemoteAddr() net.Addr {
	return &net.TCPAddr{IP: net.ParseIP(c.host), Port: 1}
}

// dialFrom returns a connection from that host.
func (l *memListener) dialFrom(t testing.TB, host string) *haproxy {
	t.Helper()
	client, server := net.Pipe()
	l.offer(t, addressed{server, host})
	t.Cleanup(func() { client.Close() })
	return newHAProxy(t, client)
}

// A drain waits for the health checks of a HAProxy that sends NOTIFYs, however
// many others have sent health checks before.
func TestDrainManyHosts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t, withNumbered())
		for i := range 1000 {
			healthCheck(t, ln.dialFrom(t, fmt.Sprintf("10.0.%d.%d", i/250, i%250)))
		}
		time.Sleep(time.Hour)
		const last = "10.1.0.1"
		h := ln.dialFrom(t, last)
		h.hello()
		h.wantAnswers()
		for range 4 {
			time.Sleep(time.Second)
			healthCheck(t, ln.dialFrom(t, last))
		}
		start := time.Now()
		if err := a.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		wantTook(t, "Shutdown", start, 6*time.Second, 7*time.Second+held)
		h.wantEnd(StatusNormal)
	})
}

// A HAProxy whose health checks were forgotten, since too many hosts send some, is
// waited for as the others are.
func TestDrainForgottenHost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t, withNumbered())
		var hs []*haproxy
		for i, host := range []string{"10.0.0.1", "10.0.0.2"} {
			h := ln.dialFrom(t, host)
			h.hello()
			h.wantAnswers()
			healthCheck(t, ln.dialFrom(t, host))
			time.Sleep(time.Second)
			healthCheck(t, ln.dialFrom(t, host))
			hs = append(hs, h)
			time.Sleep(tick)
			a.mu.Lock()
			for j := 0; i == 0 && !a.checks.Forgot(); j++ {
				a.checks.Seen(fmt.Sprint("other ", j), a.workers.clock())
			}
			a.mu.Unlock()
		}
		start := time.Now()
		shut := make(chan error, 1)
		go func() { shut <- a.Shutdown(context.Background()) }()
		hs[0].wantEnd(StatusNormal)
		wantTook(t, "the end of the forgotten one", start, 6*time.Second, 7*time.Second+held)
		hs[1].wantEnd(StatusNormal)
		if err := receive(t, "the end of the drain", shut); err != nil {
			t.Error(err)
		}
	})
}

// Several backends that check an agent from one address are each waited for:
// the time between two checks of one of them counts, not that between any two.
func TestDrainSeveralBackends(t *testing.T) {
	const inter = 2 * time.Second
	for _, tt := range []struct {
		apart   time.Duration
		engines int
	}{
		{inter / 20, 2},
		{inter / 2, 2},
		{inter / 2, 1}, // the other backend is not in use
	} {
		t.Run(fmt.Sprint(tt), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, ln := startMem(t, withNumbered())
				var hs []*haproxy
				for _, engine := range []string{"one", "two"}[:tt.engines] {
					h := asEngine(t, ln, engine)
					h.wantAnswers()
					hs = append(hs, h)
				}
				for range 5 {
					healthCheck(t, ln.dial(t))
					time.Sleep(tt.apart)
					healthCheck(t, ln.dial(t))
					time.Sleep(inter - tt.apart)
				}
				start := time.Now() // a check of the first is due
				if err := a.Shutdown(t.Context()); err != nil {
					t.Error(err)
				}
				wantTook(t, "Shutdown", start, 2*inter+tt.apart, 3*inter+drain.QuietTime)
				for _, h := range hs {
					h.wantEnd(StatusNormal)
				}
			})
		})
	}
}

// A drain of two listeners of which one is closed parts the connections of that
// one at once, and keeps the others, though they are of the same host.
func TestDrainTwoListeners(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t, withNumbered())
		other := newMemListener()
		served := make(chan error, 1)
		go func() { served <- a.Serve(other) }()
		here, there := ln.greet(t), other.greet(t)
		here.wantAnswers()
		there.wantAnswers()
		for range 3 {
			healthCheck(t, ln.dial(t))
			time.Sleep(time.Second)
		}
		shut := takeOver(t, a, ln)
		start := time.Now()
		here.wantEnd(StatusNormal)
		wantTook(t, "the end of the connection of the closed listener", start, 0, time.Second)
		for time.Since(start) < 1500*time.Millisecond {
			there.wantAnswers()
			time.Sleep(tick)
		}
		wantTook(t, "1,500 ms of answers, none of them held back", start, 0, 1510*time.Millisecond)
		there.wantEnd(StatusNormal)
		wantTook(t, "the end of the other", start, 5*time.Second, 7*time.Second)
		if err := receive(t, "the end of the drain", shut); err != nil {
			t.Error(err)
		}
		wantClosed(t, served)
	})
}

// The connections of HAProxy's threads, each of which has an engine-id of its own,
// are not kept because those of another thread are in use.
func TestDrainThreads(t *testing.T) {
	for name, late := range map[string]bool{"HELLO before": false, "HELLO during the drain": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGate()
				a, ln := startMem(t, WithHandler("number", g))
				used := ln.dial(t)
				idle := make([]*haproxy, 300)
				for i := range idle {
					idle[i] = ln.dial(t)
				}
				var shut <-chan error
				if late {
					synctest.Wait()
					shut = takeOver(t, a, ln)
				}
				used.helloAs(offered)
				for i, h := range idle {
					own := offered
					own.engineID = fmt.Sprint("thread ", i)
					h.helloAs(own)
				}
				used.send(notifyFrame(1, 1))
				g.wait(t, 1)
				if !late {
					shut = takeOver(t, a, ln)
				}
				start := time.Now()
				for _, h := range idle {
					h.wantEnd(StatusNormal)
				}
				wantTook(t, "the end of the idle threads", start, 0, 1500*time.Millisecond)
				close(g.open)
				used.wantAck(1, 1)
				used.wantEnd(StatusNormal)
				if err := receive(t, "the end of the drain", shut); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// Thousands of connections are drained together, however many engines they have:
// then it is bounded how many of them end, and are held, at once.
func TestDrainApart(t *testing.T) {
	a := New(withNumbered())
	for range maxApart {
		a.conns[new(conn)] = struct{}{}
	}
	if !newDrainer(a).apart {
		t.Errorf("%d connections: want each engine drained by itself", len(a.conns))
	}
	a.conns[new(conn)] = struct{}{}
	if newDrainer(a).apart {
		t.Errorf("%d connections: want all drained together", len(a.conns))
	}
}

// A listener that comes during a drain is closed at once: nobody would accept
// what waits in its queue.
func TestServeDuringDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		a, ln := startMem(t, WithHandler("number", g))
		h := ln.greet(t)
		h.send(notifyFrame(1, 1))
		g.wait(t, 1)
		shut := make(chan error, 1)
		go func() { shut <- a.Shutdown(context.Background()) }()
		synctest.Wait()
		late := newMemListener()
		served := make(chan error, 1)
		go func() { served <- a.Serve(late) }()
		synctest.Wait()
		if want, have := int32(1), late.closes.Load(); want != have {
			t.Errorf("want the late listener closed %d time, have %d", want, have)
		}
		if len(served) > 0 {
			t.Error("want Serve to return when the drain is over, have it before")
		}
		close(g.open)
		h.wantAck(1, 1)
		h.wantEnd(StatusNormal)
		if err := receive(t, "the end of the drain", shut); err != nil {
			t.Error(err)
		}
		wantClosed(t, served)
	})
}

// No ACK follows an AGENT-DISCONNECT: what is sent in that very moment is not
// answered.
func TestDrainNothingAfterDisconnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t, withNumbered())
		var hs []*haproxy
		for range 20 {
			h := ln.greet(t)
			h.wantAnswers()
			hs = append(hs, h)
		}
		takeOver(t, a, ln)
		var wg sync.WaitGroup
		for _, h := range hs {
			wg.Go(func() {
				if f, _ := h.next(); f.kind != frameAgentDisconnect {
					t.Errorf("want AGENT-DISCONNECT, have %s", inWordsFrame(f))
				}
				h.try(notifyFrame(1, 1))
				if f, ok := h.next(); ok {
					t.Errorf("want the end, have %s", inWordsFrame(f))
				}
			})
		}
		wg.Wait()
	})
}

// lingering is a connection that can be closed for writing alone.
type lingering struct {
	net.Conn
	halved chan struct{}
}

func (c lingering) CloseWrite() error {
	close(c.halved)
	return nil
}

// A peer is given the time to read what was written last, whatever the agent
// does meanwhile, unless that is closed.
func TestLingerInDrain(t *testing.T) {
	for name, during := range map[string]func(a *Agent){
		"served":   func(*Agent) {},
		"draining": func(a *Agent) { a.advance(draining) },
		"stopping": func(a *Agent) { a.advance(draining); a.advance(stopping) },
		"parted":   func(a *Agent) { only(t, a).leave() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				hooks, closed := hooked()
				a, ln := startMem(t, withNumbered(), hooks)
				client, server := net.Pipe()
				c := lingering{server, make(chan struct{})}
				ln.offer(t, c)
				h := newHAProxy(t, client)
				h.hello()
				h.send(goodbye)
				<-c.halved
				start := time.Now()
				time.Sleep(50 * time.Millisecond)
				during(a)
				h.want(frameAgentDisconnect)
				// The peer may have more to send, which is read.
				h.send(strings.Repeat(notifyFrame(1, 1), 100))
				h.wantEOF()
				wantTook(t, "closing", start, lingerFor, lingerFor)
				receive(t, "ConnClosed", closed)
			})
		})
	}
}

// When Serve returns, every connection's end has been reported.
func TestServeAfterConnClosed(t *testing.T) {
	for name, end := range map[string]func(a *Agent){
		"Shutdown": func(a *Agent) { a.Shutdown(context.Background()) },
		"Close":    func(a *Agent) { a.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var ended atomic.Int32
				ln := newMemListener()
				a := New(withNumbered(), WithHooks(Hooks{ConnClosed: func(Peer, error) {
					time.Sleep(time.Millisecond)
					ended.Add(1)
				}}))
				served := make(chan error, 1)
				go func() { served <- a.Serve(ln) }()
				const conns = 5
				for range conns {
					ln.greet(t)
				}
				go end(a)
				wantClosed(t, served)
				if want, have := int32(conns), ended.Load(); want != have {
					t.Errorf("want %d ends reported, have %d", want, have)
				}
			})
		})
	}
}
