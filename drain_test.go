package spoa

import (
	"context"
	"fmt"
	"io"
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

func TestShutdownNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t)
		h := ln.greet(t)
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
			h := ln.greet(t)
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
		h := ln.greet(t)
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
		h := ln.greet(t)
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
		h := ln.greet(t)
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
		old := ln.greet(t)
		done := make(chan error)
		go func() { done <- a.Shutdown(context.Background()) }()
		for range 20 {
			<-time.After(drain.QuietTime / 2)
			old.wantAnswers()
			h := ln.greet(t)
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
		asks := ln.greet(t)
		asks.wantAnswers()
		asks.nc.Close()
		for i := range 3 {
			if i > 0 {
				<-time.After(100 * time.Millisecond)
			}
			h := ln.dial(t)
			h.helloAs(hello{versions: "2.0", frameSize: 16380, healthcheck: true})
			h.wantEOF()
		}
		start := time.Now()
		done := make(chan error)
		go func() { done <- a.Shutdown(context.Background()) }()
		<-time.After(1200 * time.Millisecond)
		h := ln.greet(t)
		h.wantAnswers()
		h.nc.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
		wantTook(t, "Shutdown", start, 2200*time.Millisecond, 2200*time.Millisecond)
	})
}

// Near its deadline a Shutdown reads no more, but what is in flight is
// answered.
func TestShutdownNearDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		a, ln := startMem(t, withNumbered(), WithHandler("slow", g))
		h := ln.greet(t)
		h.send(notifyOf(5, 6, NewMessage("slow")))
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

// When its listener is closed in a drain, a connection is closed soon, without
// waiting for health checks. Those in use are closed one after the other, each
// together with the answers that were held back while all peers that ask were
// waiting.
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

// Answers that are held back leave when the peer has closed its half.
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

// The answers of a connection that is never quiet are held back for a moment
// only, and none is lost.
func TestShutdownNeverQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t, withNumbered())
		h := ln.greet(t)
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
