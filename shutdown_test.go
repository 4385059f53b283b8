package spoa

import (
	"context"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-kit/log"
	"github.com/spoa-go/spoa/internal/drain"
)

// Serve returns after the last ConnClosed, also when the deadline of Shutdown
// has cut the connections off.
func TestServeWaitsForConnClosed(t *testing.T) {
	for range 50 {
		synctest.Test(t, func(t *testing.T) {
			const conns = 20
			g := newGate()
			g.heeds = true
			var closed atomic.Int32
			ln := newMemListener()
			a := New(WithHandler("number", g), WithLogger(log.NewNopLogger()), WithHooks(Hooks{ConnClosed: func(Peer, error) { closed.Add(1) }}))
			served := make(chan int32, 1)
			go func() {
				a.Serve(ln)
				served <- closed.Load()
			}()
			for range conns {
				ln.greet(t).send(notifyFrame(1, 1))
			}
			g.wait(t, conns)
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			if err := a.Shutdown(ctx); err != context.DeadlineExceeded {
				t.Errorf("want %v, have %v", context.DeadlineExceeded, err)
			}
			if have := <-served; have != conns {
				t.Fatalf("want %d connections closed when Serve returns, have %d", conns, have)
			}
		})
	}
}

// A NOTIFY that the reader takes in the moment in which its connection is parted
// is answered, in one Write with what was held back and the end.
func TestPartedBesideNotify(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t, withNumbered())
		h := ln.greet(t)
		c := only(t, a)
		c.box.Hold()
		h.send(notifyFrame(1, 1))
		h.wantNothing()
		// The first half of conn.part: the reader comes before the second.
		if !c.box.Part(1, &c.notifies) {
			t.Fatal("want it parted")
		}
		h.send(notifyFrame(2, 2))
		h.wantNothing()
		c.leave()
		h.wantAck(1, 1)
		h.wantAck(2, 2)
		h.wantEnd(StatusNormal)
	})
}

// At the end of a drain answers are held back no longer, also if so many are
// that the connection is not read any more.
func TestShutdownReleasesFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		a, ln := startMem(t, WithHandler("wait", g), WithHandlerFunc("long", func(_ context.Context, _ *Message, a *Actions) error {
			a.SetVar(ScopeTxn, "v", String(strings.Repeat("x", 16000)))
			return nil
		}))
		const long = 100
		h, other := ln.greet(t), ln.greetBreaking(t, syscall.ECONNRESET)
		other.send(notifyOf(1, 1, waiting("b")))
		h.send(notifyOf(1, 1, waiting("a")))
		g.wait(t, 2)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		shut := make(chan error, 1)
		go func() { shut <- a.Shutdown(ctx) }()
		synctest.Wait()
		ln.Close() // its connections are held back in rounds
		<-time.After(9*time.Second + stopFor - 30*time.Millisecond)
		other.nc.Close() // the drain looks, and holds once more
		synctest.Wait()
		h.send(strings.Repeat(notifyOf(2, 2, NewMessage("long")), long))
		<-time.After(100 * time.Millisecond)
		close(g.open)
		acks := 0
		for f := h.want(frameAck); f.kind == frameAck; acks++ {
			f, _ = h.next()
		}
		if acks != 1+long {
			t.Errorf("want %d answers, have %d", 1+long, acks)
		}
		if err := <-shut; err != nil {
			t.Error(err)
		}
	})
}

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
