package spoa

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/oklog/run"
	"github.com/spoa-go/spoa/internal/drain"
)

func TestServeNilListener(t *testing.T) {
	if err := New().Serve(nil); err == nil || err == ErrAgentClosed {
		t.Errorf("want an error of its own, have %v", err)
	}
}

func TestServeListeners(t *testing.T) {
	a := New(withNumbered())
	served := make(chan error)
	var lns []*memListener
	for range 3 {
		ln := newMemListener()
		lns = append(lns, ln)
		go func() { served <- a.Serve(ln) }()
		h := ln.greet(t)
		h.wantAnswers()
	}
	if want, have := 3, len(a.Conns()); want != have {
		t.Errorf("want %d connections, have %d", want, have)
	}
	a.Close()
	for range lns {
		wantClosed(t, served)
	}
	for _, ln := range lns {
		if have := ln.closes.Load(); have != 1 {
			t.Errorf("want the listener closed once, have %d times", have)
		}
	}
}

// failingListener's Accept fails until it is closed.
type failingListener struct {
	*memListener
	err     error
	accepts chan time.Time
}

func (l *failingListener) Accept() (net.Conn, error) {
	select {
	case <-l.done:
		return nil, net.ErrClosed
	case l.accepts <- time.Now():
		return nil, l.err
	}
}

type temporary struct{}

func (temporary) Error() string { return "too many open files" }

func (temporary) Timeout() bool { return false }

func (temporary) Temporary() bool { return true }

func TestAcceptTemporary(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lines := new(logLines)
		l := &failingListener{newMemListener(), fmt.Errorf("accept: %w", temporary{}), make(chan time.Time, 1000)}
		a := New(WithLogger(lines))
		served := make(chan error)
		go func() { served <- a.Serve(l) }()
		var delays []time.Duration
		last := <-l.accepts
		for range 10 {
			at := <-l.accepts
			delays, last = append(delays, at.Sub(last)), at
		}
		const ms = time.Millisecond
		want := []time.Duration{5 * ms, 10 * ms, 20 * ms, 40 * ms, 80 * ms, 160 * ms, 320 * ms, 640 * ms, 1000 * ms, 1000 * ms}
		if !slices.Equal(want, delays) {
			t.Errorf("want %v, have %v", want, delays)
		}
		if have := lines.with("accept failed"); len(have) == 0 || len(have) > 4 {
			t.Errorf("want a line a second, have %q", have)
		}
		synctest.Wait()
		start := time.Now()
		a.Close()
		wantClosed(t, served)
		wantTook(t, "Serve after Close", start, 0, 0)
		if have := l.closes.Load(); have != 1 {
			t.Errorf("want the listener closed once, have %d times", have)
		}
	})
}

// An agent that drains goes on accepting, and waits longer after each failure.
func TestAcceptTemporaryInDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t, withNumbered())
		ln.greet(t)
		l := &failingListener{newMemListener(), temporary{}, make(chan time.Time, 10000)}
		served := make(chan error)
		go func() { served <- a.Serve(l) }()
		synctest.Wait()
		if err := a.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantClosed(t, served)
		if have := len(l.accepts); have > 20 {
			t.Errorf("want Accept called a few times, have %d", have)
		}
	})
}

func TestAcceptPermanent(t *testing.T) {
	want := errors.New("no such device")
	l := &failingListener{newMemListener(), want, make(chan time.Time, 1)}
	if have := New().Serve(l); have != want {
		t.Errorf("want %v, have %v", want, have)
	}
	if have := l.closes.Load(); have != 1 {
		t.Errorf("want the listener closed once, have %d times", have)
	}
}

func TestClosedForEver(t *testing.T) {
	for name, end := range map[string]func(*Agent) error{
		"Close":    (*Agent).Close,
		"Shutdown": func(a *Agent) error { return a.Shutdown(context.Background()) },
	} {
		t.Run(name, func(t *testing.T) {
			a := New()
			if err := end(a); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				ln := newMemListener()
				if err := a.Serve(ln); err != ErrAgentClosed {
					t.Errorf("want %v, have %v", ErrAgentClosed, err)
				}
				if have := ln.closes.Load(); have != 1 {
					t.Errorf("want the listener closed once, have %d times", have)
				}
				if err := end(a); err != nil {
					t.Errorf("again: want no error, have %v", err)
				}
			}
		})
	}
}

func TestCloseConcurrent(t *testing.T) {
	g := newGate()
	g.heeds = true
	a, dial := startTCP(t, WithHandler("number", g))
	h := newHAProxy(t, dial())
	h.hello()
	h.send(notifyFrame(1, 1))
	g.wait(t, 1)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			if i%2 == 0 {
				a.Close()
				return
			}
			ctx, cancel := context.WithTimeout(t.Context(), longWait)
			defer cancel()
			if err := a.Shutdown(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	h.untilGone() // there may be the answer of a handler that was cancelled
}

func TestActor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := newMemListener()
		a := New(withNumbered())
		execute, interrupt := a.Actor(ln, time.Minute)
		done := make(chan error)
		go func() { done <- execute() }()
		h := ln.greet(t)
		start := time.Now()
		interrupt(errors.New("another actor has ended"))
		wantTook(t, "interrupt", start, 0, 0)
		h.wantAnswers()
		wantClosed(t, done)
		wantTook(t, "execute", start, drain.QuietTime, drain.QuietTime)
		h.wantEnd(StatusNormal)
		interrupt(nil)
	})
}

func TestActorInterruptedFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := newMemListener()
		execute, interrupt := New().Actor(ln, time.Minute)
		start := time.Now()
		interrupt(nil)
		if err := execute(); err != ErrAgentClosed {
			t.Errorf("want %v, have %v", ErrAgentClosed, err)
		}
		wantTook(t, "execute", start, 0, 0)
		if have := ln.closes.Load(); have != 1 {
			t.Errorf("want the listener closed once, have %d times", have)
		}
	})
}

func TestActorGraceOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		defer close(g.open)
		ln := newMemListener()
		execute, interrupt := New(WithHandler("number", g)).Actor(ln, 5*time.Second)
		done := make(chan error)
		go func() { done <- execute() }()
		h := ln.greet(t)
		h.send(notifyFrame(1, 1))
		g.wait(t, 1)
		start := time.Now()
		interrupt(nil)
		wantClosed(t, done)
		wantTook(t, "execute", start, 5*time.Second, 5*time.Second)
	})
}

// A group of oklog/run interrupts the other actors, one after another, when the
// first has ended.
func TestActorInGroup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := newMemListener()
		var g run.Group
		g.Add(New(withNumbered()).Actor(ln, time.Minute))
		want := errors.New("enough")
		end := make(chan struct{})
		g.Add(func() error { <-end; return want }, func(error) {})
		done := make(chan error)
		go func() { done <- g.Run() }()
		h := ln.greet(t)
		h.wantAnswers()
		close(end)
		if have := receive(t, "Run to return", done); want != have {
			t.Errorf("want %v, have %v", want, have)
		}
		h.wantEnd(StatusNormal)
	})
}

// A connection that waits for room before it reads on does not read on after
// Close.
func TestCloseWindowFull(t *testing.T) {
	for _, opts := range [][]Option{nil, {WithAsync()}} {
		synctest.Test(t, func(t *testing.T) {
			g := newGate()
			hooks, closed := hooked()
			a, ln := startMem(t, append(opts, WithPipelining(2), WithHandler("number", g), hooks)...)
			h := asEngine(t, ln, "engine")
			h.send(notifyFrame(1, 1), notifyFrame(2, 2), notifyFrame(3, 3))
			g.wait(t, 2)
			synctest.Wait()
			a.Close()
			<-closed
			close(g.open)
			synctest.Wait()
			if have := len(g.entered); have > 0 {
				t.Errorf("want no call after Close, have %d", have)
			}
		})
	}
}

// Close may be called while an answer is being written.
func TestCloseWhileWriting(t *testing.T) {
	for range 50 {
		synctest.Test(t, func(t *testing.T) {
			g := newGate()
			a, ln := startMem(t, WithHandler("number", g))
			nc := ln.raw(t)
			rawHello(t, nc)
			io.WriteString(nc, notifyFrame(1, 1)+notifyFrame(2, 2))
			g.wait(t, 2)
			close(g.open)
			synctest.Wait()
			a.Close()
		})
	}
}

// Health checks without a NOTIFY are warned of, once: HAProxy's configuration is
// most likely not complete.
func TestSilenceWarned(t *testing.T) {
	for _, asked := range []bool{false, true} {
		t.Run(fmt.Sprintf("asked %v", asked), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				log := new(logLines)
				_, ln := startMem(t, withNumbered(), WithLogger(log))
				if asked {
					h := ln.greet(t)
					h.send(notifyFrame(1, 1))
					h.wantAck(1, 1)
				}
				const warning = "no NOTIFY has ever come"
				check := func() {
					h := ln.dial(t)
					h.helloAs(hello{versions: "2.0", frameSize: 16380, healthcheck: true})
					h.wantEOF()
				}
				for range 30 {
					check()
					time.Sleep(2 * time.Second)
				}
				if have := log.with(warning); len(have) != 0 {
					t.Errorf("within a minute: want no warning, have %q", have)
				}
				check()
				check()
				want := 1
				if asked {
					want = 0
				}
				if have := log.with(warning); len(have) != want {
					t.Errorf("after a minute: want %d warnings, have %q", want, have)
				}
			})
		})
	}
}
