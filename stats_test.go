package spoa

import (
	"context"
	"errors"
	"log/slog"
	"reflect"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// Stats counts what becomes of each message, wherever its handler runs.
func TestStats(t *testing.T) {
	const limit, took = 50 * time.Millisecond, 10 * time.Millisecond
	for _, fallback := range []bool{false, true} {
		opts := []Option{WithStats(), WithWorkers(3), WithHandlerTimeout(limit), WithSlog(slog.New(slog.DiscardHandler)),
			WithHandlerFunc("good", func(context.Context, *Message, *Actions) error {
				time.Sleep(took)
				return nil
			}),
			WithHandlerFunc("error", func(context.Context, *Message, *Actions) error { return errors.New("as asked") }),
			WithHandlerFunc("panic", func(context.Context, *Message, *Actions) error { panic("as asked") }),
			WithHandlerFunc("idle", numbered),
		}
		others := counted(FaultNoHandler, 2)
		if fallback {
			opts = append(opts, WithFallback(HandlerFunc(echo)))
			others = counted(0, 2)
		}
		everyplace(t, opts, func(t *testing.T, a *Agent, h *haproxy, g *gate) {
			synctest.Wait()
			before := a.Stats() // of what has brought the connection to its place
			h.send(notifyOf(1, 1, NewMessage("place"), NewMessage("good"), NewMessage("error"), NewMessage("good"), NewMessage("panic")))
			h.want(frameAck)
			h.send(notifyOf(1, 2, NewMessage("invented"), NewMessage("invented too")))
			h.want(frameAck)
			h.send(notifyOf(2, 1, waiting("late")), notifyOf(2, 2, waiting("late")), notifyOf(2, 3, waiting("late")), notifyOf(2, 4, NewMessage("error")))
			for range 4 {
				h.want(frameAck)
			}
			synctest.Wait()
			running := statsOf(t, a, "wait")
			if running.Running != 3 || running.Count[FaultTimeout] > 0 || running.Late > 0 {
				t.Errorf("want 3 that run, have %+v", running)
			}
			close(g.of("late"))
			synctest.Wait()
			after := a.Stats()
			var names []string
			for i := range after {
				names = append(names, after[i].Message)
				after[i].Took -= before[i].Took
				for f := range after[i].Count {
					after[i].Count[f] -= before[i].Count[f]
				}
			}
			if want := []string{"", "error", "good", "idle", "panic", "place", "wait"}; !slices.Equal(want, names) {
				t.Fatalf("want %q, have %q", want, names)
			}
			bad := counted(FaultError, 1)
			bad[FaultOverload] = 1
			for i, want := range []MessageStats{
				{Count: others},
				{Count: bad},
				{Count: counted(0, 2), Took: 2 * took},
				{Count: counted(0, 0)},
				{Count: counted(FaultPanic, 1)},
				{Count: counted(0, 1), Took: after[5].Took},
				{Count: counted(FaultTimeout, 3), Late: 3, Took: after[6].Took},
			} {
				if want.Message = names[i]; !reflect.DeepEqual(want, after[i]) {
					t.Errorf("want %+v, have %+v", want, after[i])
				}
			}
			if have := after[6].Took; have < 3*limit || have > 3*(limit+3*tick) {
				t.Errorf("want three times %v, have %v", limit, have)
			}
		})
	}
}

// counted returns a count of n messages with the fault f.
func counted(f Fault, n uint64) map[Fault]uint64 {
	m := make(map[Fault]uint64)
	for f := range faultCount {
		m[f] = 0
	}
	m[f] = n
	return m
}

func statsOf(t testing.TB, a *Agent, message string) MessageStats {
	t.Helper()
	for _, s := range a.Stats() {
		if s.Message == message {
			return s
		}
	}
	t.Fatalf("want stats of %s, have none", message)
	panic("unreachable")
}

// Without WithStats nothing is counted.
func TestNoStats(t *testing.T) {
	a, ln := startMem(t, withNumbered())
	h := ln.greet(t)
	h.wantAnswers()
	if have := a.Stats(); have != nil {
		t.Errorf("want nil, have %v", have)
	}
}
