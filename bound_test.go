package spoa

import (
	"context"
	"fmt"
	"maps"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// through returns a handler that calls the gate that g points to at the time.
func through(g **gate) Handler {
	return HandlerFunc(func(ctx context.Context, m *Message, a *Actions) error { return (*g).ServeSPOE(ctx, m, a) })
}

// wantAllSlots checks that no job has or waits for a slot or a permit any more.
func wantAllSlots(t testing.TB, a *Agent) {
	t.Helper()
	synctest.Wait() // a worker returns its slots after its ACK has left
	w := a.workers
	for message, b := range w.bounds {
		if want := w.maxConcurrent[message]; b.free != want || b.waiting.head != nil {
			t.Errorf("%s: want %d free slots and none who waits, have %d, %v", message, want, b.free, b.waiting.head)
		}
	}
	if want, have := int64(w.options.workers), w.permits.Load(); want != have || w.waiting.Load() != 0 {
		t.Errorf("want permits for %d and none who waits, have %d, %d", want, have, w.waiting.Load())
	}
}

// A slow kind of message leaves workers to a quick one, on its own connection and
// on others, wherever handlers run.
func TestMaxConcurrent(t *testing.T) {
	const workers, most, calls = 4, 3, 20
	var slow *gate
	opts := []Option{WithWorkers(workers), WithHandlerFunc("echo", echo), WithHandler("slow", through(&slow), MaxConcurrent(most))}
	everyplace(t, opts, func(t *testing.T, a *Agent, h *haproxy, _ *gate) {
		slow = newGate()
		h2 := only(t, a).listener.Listener.(*memListener).greet(t)
		var frames []string
		for id := range uint64(calls) {
			frames = append(frames, notifyOf(1, id, NewMessage("slow", Arg{"s", String(fmt.Sprint(id))})))
		}
		h.send(frames...)
		h2.send(frames...)
		slow.wait(t, most)
		for id := range uint64(5) {
			h.send(notifyOf(2, id, NewMessage("place"), echoed("x")))
			h.wantActions(2, id, sets("echo", "x"))
			h2.send(notifyOf(2, id, echoed("y"), echoed("z")))
			h2.wantActions(2, id, sets("echo", "y")+","+sets("echo", "z"))
		}
		synctest.Wait()
		if have := len(slow.entered); have > 0 {
			t.Errorf("want %d handlers of the slow kind at once, have %d more", most, have)
		}
		close(slow.open)
		for range calls {
			h.want(frameAck)
			h2.want(frameAck)
		}
		slow.wait(t, 2*calls-most)
		wantAllSlots(t, a)
	})
}

// All messages without a handler of their own are one kind: the options of
// WithFallback count them together, and concern no other.
func TestFallbackOptions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		_, ln := startMem(t, withNumbered(), WithHandlerTimeout(10*time.Millisecond), WithFallback(g, MaxConcurrent(1), Timeout(time.Second)))
		h := ln.greet(t)
		h.send(notifyOf(1, 1, NewMessage("one")), notifyOf(2, 2, NewMessage("other"), NewMessage("third")))
		g.wait(t, 1)
		h.send(notifyFrame(3, 3))
		h.wantAck(3, 3)
		time.Sleep(100 * time.Millisecond) // the agent's timeout is over, that of the kind is not
		synctest.Wait()
		if have := len(g.entered); have > 0 {
			t.Errorf("want one handler at once, have %d more", have)
		}
		g.open <- struct{}{}
		h.wantAck(1, 1)
		close(g.open)
		h.wantActions(2, 2, "set-var txn.id uint64 2,set-var txn.id uint64 2")
		g.wait(t, 2)
	})
}

// Jobs get slots in the order of their coming. A handler that fails gives its slot
// back however it ends.
func TestMaxConcurrentOrder(t *testing.T) {
	var called []string
	var lines logLines
	end := map[string]func() error{
		"ok":     func() error { return nil },
		"error":  func() error { return context.Canceled },
		"panic":  func() error { panic("as asked") },
		"goexit": func() error { runtime.Goexit(); return nil },
	}
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t, WithLogger(&lines), WithHandlerFunc("one", func(_ context.Context, m *Message, _ *Actions) error {
			called = append(called, m.Value("s").String())
			time.Sleep(slowWarn * 9 / 10)
			return end[m.Value("end").String()]()
		}, MaxConcurrent(1)))
		h := ln.greet(t)
		var want []string
		for i := range 3 {
			for name := range end {
				s := fmt.Sprint(name, i)
				want = append(want, s)
				h.send(notifyOf(1, uint64(len(want)), NewMessage("one", Arg{"s", String(s)}, Arg{"end", String(name)})))
				synctest.Wait()
			}
		}
		for i := range want {
			h.wantActions(1, uint64(i+1), "")
		}
		if fmt.Sprint(want) != fmt.Sprint(called) {
			t.Errorf("want calls %s, have %s", want, called)
		}
		if have := lines.with("slow handler"); len(have) > 0 {
			t.Errorf("want no warning of the time that they waited, have %q", have)
		}
		wantAllSlots(t, a)
	})
}

// A NOTIFY with messages of several kinds counts for each of them, whatever their
// order in it, once for each kind, and none waits for another in a circle.
func TestMaxConcurrentKinds(t *testing.T) {
	var mu sync.Mutex
	var now, most [3]int
	kind := func(i int) Option {
		return WithHandlerFunc(string(rune('a'+i)), func(context.Context, *Message, *Actions) error {
			mu.Lock()
			now[i]++
			most[i] = max(most[i], now[i])
			mu.Unlock()
			time.Sleep(10 * time.Millisecond)
			mu.Lock()
			now[i]--
			mu.Unlock()
			return nil
		}, MaxConcurrent(i+1))
	}
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t, kind(0), kind(1), kind(2))
		hs := []*haproxy{ln.greet(t), ln.greet(t)}
		groups := []string{"a", "b", "c", "c", "ab", "ba", "abc", "cba", "bcb", "aa", "cab"}
		for id, group := range groups {
			var msgs []*Message
			for _, name := range strings.Split(group, "") {
				msgs = append(msgs, NewMessage(name))
			}
			for _, h := range hs {
				h.send(notifyOf(1, uint64(id), msgs...), notifyOf(2, uint64(id), msgs...))
			}
		}
		for range 2 * len(groups) {
			for _, h := range hs {
				if f := h.want(frameAck); len(f.payload) > 0 {
					t.Errorf("want no fault, have %s", inActions(f.payload))
				}
			}
		}
		for i := range most {
			if want, have := i+1, most[i]; want != have {
				t.Errorf("%c: want %d handlers at once, have %d", 'a'+i, want, have)
			}
		}
		wantAllSlots(t, a)
	})
}

// A NOTIFY that waits for a slot until its handler timeout is answered without a
// call. A late handler keeps its slot until it returns.
func TestMaxConcurrentTimeout(t *testing.T) {
	const limit = 50 * time.Millisecond
	var r record
	var slow *gate
	opts := []Option{WithHandlerTimeout(limit), faultText(ScopeTxn, "fault"), r.hook(), WithHandlerFunc("echo", echo, MaxConcurrent(2)),
		WithHandler("slow", through(&slow), MaxConcurrent(1))}
	everyplace(t, opts, func(t *testing.T, a *Agent, h *haproxy, _ *gate) {
		slow = newGate()
		r.list = nil
		began := time.Now()
		h.send(notifyOf(1, 1, NewMessage("slow")))
		slow.wait(t, 1)
		h.send(notifyOf(1, 2, NewMessage("slow")), notifyOf(1, 3, NewMessage("slow")))
		acks := map[uint64]string{}
		for range 3 {
			f := h.want(frameAck)
			acks[f.id] = inActions(f.payload)
		}
		wantTook(t, "the answers", began, limit, limit+3*tick)
		want := map[uint64]string{1: sets("fault", "timeout"), 2: sets("fault", "overload"), 3: sets("fault", "overload")}
		if !maps.Equal(want, acks) {
			t.Errorf("want %v, have %v", want, acks)
		}
		h.send(notifyOf(1, 4, NewMessage("slow"), echoed("x")))
		h.wantActions(1, 4, sets("fault", "overload"))
		synctest.Wait() // for the hooks
		if want, have := 2, a.workers.bounds["echo"].free; want != have {
			t.Errorf("want the slot back that it had, %d free, have %d", want, have)
		}
		h.send(notifyOf(1, 5, echoed("y")))
		h.wantActions(1, 5, sets("echo", "y"))
		close(slow.open)
		h.send(notifyOf(1, 6, NewMessage("slow")))
		h.wantAck(1, 6)
		over := "slow: " + ErrOverload.Error()
		h.wantNothing()
		r.want(t, over, over, over, "echo: "+ErrOverload.Error(), "echo: <nil>", "slow: context deadline exceeded", "slow: <nil>")
		wantAllSlots(t, a)
	})
}

// In an overload of a kind that is bounded, its slots go to the newest: all would
// be late in the order of their coming.
func TestMaxConcurrentOverload(t *testing.T) {
	const took, limit, lasts = 5 * time.Millisecond, 20 * time.Millisecond, time.Second
	const every = took / 5 // NOTIFYs come
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t, WithPipelining(100), WithHandlerFunc("sleep", func(_ context.Context, _ *Message, a *Actions) error {
			time.Sleep(took)
			a.SetVar(ScopeTxn, "verdict", Bool(true))
			return nil
		}, MaxConcurrent(1), Timeout(limit)))
		h := ln.greet(t)
		go func() {
			for i := range uint64(lasts / every) {
				h.send(notifyOf(1, i, NewMessage("sleep")))
				time.Sleep(every)
			}
		}()
		verdicts := 0
		for range lasts / every {
			if f := h.want(frameAck); len(f.payload) > 0 {
				verdicts++
			}
		}
		if want := int(lasts/took) * 8 / 10; verdicts < want {
			t.Errorf("want %d verdicts in time, have %d", want, verdicts)
		}
		time.Sleep(took) // for the last late handler
		wantAllSlots(t, a)
	})
}

// A drain answers what waits for a slot, and Close leaves nothing behind.
func TestMaxConcurrentShutdown(t *testing.T) {
	const calls = 5
	var slow *gate
	opts := []Option{WithHandler("slow", through(&slow), MaxConcurrent(1))}
	notifies := func(h *haproxy) {
		slow = newGate()
		slow.heeds = true
		for id := range uint64(calls) {
			h.send(notifyOf(1, id, NewMessage("slow")))
		}
		slow.wait(t, 1)
		synctest.Wait() // the others have been read
	}
	everyplace(t, opts, func(t *testing.T, a *Agent, h *haproxy, _ *gate) {
		notifies(h)
		done := make(chan error, 1)
		go func() { done <- a.Shutdown(context.Background()) }()
		synctest.Wait()
		close(slow.open)
		for id := range uint64(calls) {
			h.wantAck(1, id)
		}
		slow.wait(t, calls-1)
		h.wantEnd(StatusNormal)
		if err := receive(t, "Shutdown", done); err != nil {
			t.Errorf("want no error, have %v", err)
		}
		wantAllSlots(t, a)
	})
	everyplace(t, opts, func(t *testing.T, a *Agent, h *haproxy, _ *gate) {
		notifies(h)
		a.Close()
		h.untilGone()
		slow.wait(t, calls-1)
		wantAllSlots(t, a)
	})
}

// What waits for a slot has memory of its own, also when it came in fragments.
func TestMaxConcurrentMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := newGate()
		_, ln := startMem(t, WithFragmentation(1<<20), WithHandler("slow", slow, MaxConcurrent(1)))
		h := ln.dial(t)
		h.helloAs(hello{versions: "2.0", frameSize: 16380, capabilities: "pipelining,fragmentation"})
		long := func(id uint64) string { return strings.Repeat(string(rune('a'+id)), 40000) }
		for id := range uint64(4) {
			b := string(appendMessage(nil, NewMessage("slow", Arg{"s", Binary([]byte(long(id)))})))
			h.send(rawFrame(frameNotify, 0, 1, id, b[:15000]), rawFrame(frameUnset, 0, 1, id, b[15000:30000]), rawFrame(frameUnset, flagFIN, 1, id, b[30000:]))
		}
		for id := range uint64(4) {
			if have := receive(t, "a handler", slow.entered); have != long(id) {
				t.Errorf("want 40000 times %c, have %.10q...", 'a'+rune(id), have)
			}
			close(slow.of(long(id)))
			h.want(frameAck)
		}
	})
}
