package spoa

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spoa-go/spoa/internal/pace"
)

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
		synctest.Test(t, func(t *testing.T) {
			a, ln := startMem(t, WithHandlerFunc("echo", echo))
			peers := make([]*haproxy, test.peers)
			for i := range peers {
				peers[i] = ln.greet(t)
			}
			ask := func(h *haproxy, count int) {
				for i := range uint64(count) {
					h.send(notifyOf(i, 1, echoed("a")))
					h.wantActions(i, 1, sets("echo", "a"))
				}
			}
			for range 2 { // again after a rest
				for _, p := range peers {
					ask(p, test.each)
				}
				time.Sleep(2 * tick)
				if have := a.workers.busy.Load(); have != test.busy {
					t.Errorf("%d peers, %d calls each: want busy %v, have %v", test.peers, test.each, test.busy, have)
				}
				ask(peers[0], 1)
				time.Sleep(2 * tick)
				if a.workers.busy.Load() {
					t.Error("want one call not to be busy")
				}
			}
		})
	}
}

// Readers that look in time put the timer off, but not for long, and not if a
// handler can be late: then nobody may read when one is.
func TestSeldomTick(t *testing.T) {
	const timeout = time.Millisecond
	for name, tt := range map[string]struct {
		opts []Option
		most time.Duration // until the answer
	}{
		"a stall":           {nil, seldomTick + 2*lateTick},
		"a handler timeout": {[]Option{WithHandlerTimeout(timeout)}, timeout + 2*lateTick},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGate()
				_, ln := startMem(t, append(tt.opts, withNumbered(), WithHandler("wait", g))...)
				h := ln.greet(t)
				for id := uint64(100); id < 120; id++ {
					h.send(notifyFrame(1, id))
					h.wantAck(1, id)
					time.Sleep(tick / 2)
				}
				began := time.Now()
				h.send(notifyOf(1, 1, waiting("x")), notifyFrame(1, 2))
				if tt.opts == nil {
					h.wantAck(1, 2)
				} else {
					h.wantAcks(1, 1)
				}
				wantTook(t, "the answers", began, 0, tt.most)
				close(g.open)
			})
		})
	}
}

// Readers of many connections put the timer off for longer, since those that are
// left look as well. Only if the handlers of all stall at once is that noticed late.
func TestFarTick(t *testing.T) {
	for name, tt := range map[string]struct {
		stalled     int
		least, most time.Duration // until what is behind them is answered
	}{
		"all stall": {busyQueues, farTick - 2*tick, farTick + 2*lateTick},
		"one reads": {busyQueues - 1, 0, 3 * tick},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGate()
				_, ln := startMem(t, withNumbered(), WithHandler("wait", g))
				var all []*haproxy
				for range busyQueues {
					all = append(all, ln.greet(t))
				}
				id := uint64(100)
				call := func(peers []*haproxy) {
					for range 20 {
						for _, h := range peers {
							h.send(notifyFrame(1, id))
							h.wantAck(1, id)
							id++
						}
						time.Sleep(tick / 2)
					}
				}
				call(all)
				began := time.Now()
				stalled, others := all[:tt.stalled], all[tt.stalled:]
				for _, h := range stalled {
					h.send(notifyOf(1, 1, waiting("x")), notifyFrame(1, 2))
				}
				called := make(chan struct{})
				go func() {
					defer close(called)
					call(others)
				}()
				for _, h := range stalled {
					h.wantAck(1, 2)
				}
				wantTook(t, "the answers", began, tt.least, tt.most)
				<-called
				close(g.open)
			})
		})
	}
}

// A handler that stalls keeps neither those before it nor those after it on its
// connection waiting, and what it looks at stays as it is.
func TestHandOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		view := func(ctx context.Context, m *Message, a *Actions) error {
			v, same := m.Arg(0).Value, m.Arg(0).Value.String()
			g.entered <- same[:1]
			<-g.of(same[:1])
			if have := v.String(); have != same || m.Arg(0).Value.String() != same || m.Name() != "view" {
				t.Errorf("view: want %.20q..., have %.20q...", same, have)
			}
			return echo(ctx, m, a)
		}
		viewed := func(s string) *Message { return NewMessage("view", Arg{"s", String(s)}) }
		a, ln := startMem(t, WithHandler("wait", g), WithHandlerFunc("echo", echo), WithHandlerFunc("view", view))
		h := ln.greet(t)
		c := only(t, a)
		c.pace.Batch(pace.StallRun, 0, false) // so that one stall spreads nothing
		rest := notifyOf(1, 5, echoed("after"))
		long := strings.Repeat("long", 2000)
		began := time.Now()
		sent := make(chan struct{})
		go func() { // more than is read at once
			defer close(sent)
			h.send(notifyOf(1, 1, echoed("before")), notifyOf(1, 2, waiting("x")), notifyOf(1, 3, viewed("y")),
				notifyOf(1, 4, viewed(long)), rest[:9])
		}()
		// One look of the watch sees the call, the next finds it there still.
		for i, want := range []string{"x", "y", "l"} {
			if have := <-g.entered; want != have {
				t.Errorf("want the handler of %s, have that of %s", want, have)
			}
			if want, have := time.Duration(2*i)*lateTick, time.Since(began); have > want {
				t.Errorf("want call %d after %v, have it after %v", i, want, have)
			}
			if i == 1 {
				h.wantActions(1, 1, sets("echo", "before"))
				wantTook(t, "the answer before the stalled one", began, 0, 2*lateTick)
			}
		}
		<-sent
		h.send(rest[9:])
		h.wantActions(1, 5, sets("echo", "after"))
		// More comes, larger than all before, and is answered.
		for id := uint64(6); id < 40; id++ {
			h.send(notifyOf(1, id, echoed(strings.Repeat("z", 100*int(id)))))
			h.wantActions(1, id, sets("echo", strings.Repeat("z", 100*int(id))))
		}
		for _, s := range []string{"l", "y", "x"} {
			close(g.of(s))
		}
		got := make(map[uint64]string)
		for range 3 {
			f := h.want(frameAck)
			got[f.id] = inActions(f.payload)
		}
		for id, want := range map[uint64]string{2: sets("wait", "x"), 3: sets("view", "y"), 4: sets("view", long)} {
			if got[id] != want {
				t.Errorf("want %.60s, have %.60s", want, got[id])
			}
		}
		h.wantNothing()
	})
}
