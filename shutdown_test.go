package spoa

import (
	"context"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-kit/log"
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
