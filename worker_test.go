package spoa

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-kit/log"
	"github.com/spoa-go/spoa/internal/outbox"
	"github.com/spoa-go/spoa/internal/pace"
)

// A connection is read on after the time for its HELLO, and for a frame that
// came in two pieces, is over.
func TestWorkerAfterHelloTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, ln := startMem(t, WithHandlerFunc("echo", echo))
		h := ln.greet(t)
		frame := notifyOf(1, 1, echoed("a"))
		h.send(frame[:10])
		h.send(frame[10:])
		h.wantActions(1, 1, sets("echo", "a"))
		time.Sleep(time.Minute)
		h.send(notifyOf(2, 1, echoed("b")))
		h.wantActions(2, 1, sets("echo", "b"))
	})
}

// places are the three ways that a handler comes to run. Each brings a new
// connection there: the next handler runs inline and is not taken for stalled,
// or is if it waits, or is spread.
var places = []struct {
	name  string
	stall bool // have it wait for longer than pace.StallAfter
	bring func(h *haproxy, g *gate)
}{
	{"inline", false, func(*haproxy, *gate) {}},
	{"handed over", true, func(*haproxy, *gate) {}},
	{"spread", false, func(h *haproxy, g *gate) {
		h.send(notifyOf(0, 1, waiting("stall")))
		<-g.entered
		time.Sleep(3 * pace.StallAfter)
		close(g.of("stall"))
		h.wantActions(0, 1, sets("wait", "stall"))
	}},
}

// everyplace runs f in a bubble for each place, with a connection that has been
// brought there, and the gate of its messages "wait". The connection's end is
// seen as a reset.
func everyplace(t *testing.T, opts []Option, f func(t *testing.T, a *Agent, h *haproxy, g *gate)) {
	for _, place := range places {
		t.Run(place.name, func(t *testing.T) {
			stall := func(ctx context.Context, m *Message, a *Actions) error {
				if place.stall {
					time.Sleep(3 * pace.StallAfter)
				}
				return nil
			}
			synctest.Test(t, func(t *testing.T) {
				g := newGate()
				a, ln := startMem(t, append([]Option{WithHandler("wait", g), WithHandlerFunc("place", stall)}, opts...)...)
				h := ln.greetBreaking(t, syscall.ECONNRESET)
				place.bring(h, g)
				f(t, a, h, g)
				synctest.Wait() // a worker returns its permit after its ACK has left
				if want, have := int64(a.options.workers), a.workers.permits.Load(); want != have {
					t.Errorf("want permits for %d handlers, have %d", want, have)
				}
				select {
				case f, ok := <-h.frames:
					if ok {
						t.Errorf("want no more, have %s", inWordsFrame(f))
					}
				default:
				}
			})
		})
	}
}

// A handler that ends its goroutine is answered, wherever it ran, and the
// connection lives on.
func TestWorkerGoexit(t *testing.T) {
	exit := func(ctx context.Context, m *Message, a *Actions) error {
		a.SetVar(ScopeTxn, "lost", Bool(true))
		runtime.Goexit()
		return nil
	}
	opts := []Option{faultText(ScopeTxn, "fault"), WithHandlerFunc("exit", exit), WithHandlerFunc("echo", echo)}
	everyplace(t, opts, func(t *testing.T, a *Agent, h *haproxy, g *gate) {
		for n := range uint64(3) {
			h.send(notifyOf(1, n, echoed("a"), NewMessage("place"), NewMessage("exit")))
			h.wantActions(1, n, sets("echo", "a")+","+sets("fault", "error"))
			h.send(notifyOf(2, n, echoed("b")))
			h.wantActions(2, n, sets("echo", "b"))
		}
	})
}

// record keeps the calls of Hooks.Handled.
type record struct {
	mu   sync.Mutex
	list []string
}

func (r *record) hook() Option {
	return WithHooks(Hooks{Handled: func(message string, _ time.Duration, err error) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.list = append(r.list, fmt.Sprintf("%s: %v", message, err))
	}})
}

// want compares the calls since the last time.
func (r *record) want(t testing.TB, want ...string) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.Equal(want, r.list) {
		t.Errorf("Handled: want %q, have %q", want, r.list)
	}
	r.list = nil
}

// The NOTIFY of a late handler is answered in time, with the actions of the
// messages before it. What it sets later is dropped.
func TestHandlerTimeout(t *testing.T) {
	const limit = 50 * time.Millisecond
	var r record
	opts := []Option{WithHandlerTimeout(limit), faultText(ScopeTxn, "fault"), WithHandlerFunc("echo", echo), r.hook()}
	everyplace(t, opts, func(t *testing.T, a *Agent, h *haproxy, g *gate) {
		r.list = nil
		began := time.Now()
		h.send(notifyOf(1, 1, NewMessage("place"), echoed("before"), waiting("late"), echoed("after")), notifyOf(1, 2, echoed("x")))
		h.wantActions(1, 2, sets("echo", "x"))
		h.wantActions(1, 1, sets("echo", "before")+","+sets("fault", "timeout"))
		wantTook(t, "the answer", began, limit, limit+2*tick)
		// It keeps its worker until it returns.
		time.Sleep(time.Second)
		if want, have := int64(a.options.workers-1), a.workers.permits.Load(); want != have {
			t.Errorf("want permits for %d handlers, have %d", want, have)
		}
		close(g.of("late"))
		h.wantNothing()
		slices.Sort(r.list)
		r.want(t, "echo: <nil>", "echo: <nil>", "echo: spoa: waited too long for its turn", "place: <nil>", "wait: context deadline exceeded")
	})
}

// A late handler's own error is reported, rather than that it was late.
func TestHandlerTimeoutOwnError(t *testing.T) {
	var r record
	opts := []Option{WithHandlerTimeout(5 * time.Millisecond), r.hook(),
		WithHandlerFunc("error", func(ctx context.Context, _ *Message, _ *Actions) error {
			<-ctx.Done()
			return errors.New("own")
		}),
		WithHandlerFunc("panic", func(ctx context.Context, _ *Message, _ *Actions) error {
			<-ctx.Done()
			panic("own")
		})}
	everyplace(t, opts, func(t *testing.T, a *Agent, h *haproxy, _ *gate) {
		r.list = nil
		h.send(notifyOf(1, 1, NewMessage("error")))
		h.wantActions(1, 1, "")
		h.wantNothing()
		h.send(notifyOf(1, 2, NewMessage("panic")))
		h.wantActions(1, 2, "")
		h.wantNothing()
		r.want(t, "error: own", "panic: spoa: handler panicked: own")
	})
}

// A NOTIFY whose turn comes too late is answered without its handler, also if
// it need not wait for a worker then: here for the window of its connection.
func TestHandlerTimeoutWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r record
		g := newGate()
		a, ln := startMem(t, WithHandlerTimeout(20*time.Millisecond), WithPipelining(1), faultText(ScopeTxn, "fault"),
			WithHandler("wait", g), WithHandlerFunc("echo", echo), r.hook())
		h := ln.greet(t)
		only(t, a).pace.Spread(3) // to be spread
		h.send(notifyOf(1, 1, waiting("late")), notifyOf(1, 2, echoed("x")), notifyOf(1, 3, echoed("y")))
		h.wantActions(1, 1, sets("fault", "timeout"))
		for id := uint64(2); id <= 3; id++ {
			h.wantActions(1, id, sets("fault", "overload"))
		}
		h.send(notifyOf(1, 4, echoed("z")))
		h.wantActions(1, 4, sets("echo", "z"))
		close(g.of("late"))
		h.wantNothing()
		r.want(t, "echo: spoa: waited too long for its turn", "echo: spoa: waited too long for its turn", "echo: <nil>",
			"wait: context deadline exceeded")
	})
}

// A job may be late before its goroutine has got the processor for the first
// time. Its handlers are not called then, since nothing would end their context.
func TestLateBeforeBegun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r record
		w := newWorkers(newOptions([]Option{WithHandlerTimeout(5 * time.Millisecond), faultText(ScopeTxn, "fault"), r.hook(),
			WithHandlerFunc("echo", func(context.Context, *Message, *Actions) error {
				t.Error("want no call of the handler")
				return nil
			})}))
		var sent bytes.Buffer
		var box outbox.Box
		box.Init(framesTo{&sent}, 1, &w.inFlight)
		q := &queue{workers: w, box: &box, ctx: context.Background()}
		q.turn.Store(new(turn))
		if !w.acquire() {
			t.Fatal("want a permit")
		}
		j := newJob(q)
		j.begin(&frame{stream: 1, id: 1}, ids(1, 1), w.clock())
		if err := j.decode(appendMessage(nil, echoed("x"))); err != nil {
			t.Fatal(err)
		}
		box.Begin(0)
		q.mu.Lock()
		q.running.push(j)
		q.mu.Unlock()
		w.watchQueue(q)
		time.Sleep(10 * time.Millisecond)
		j.run()
		synctest.Wait()
		f, err := frameFrom(&sent)
		if want, have := sets("fault", "overload"), inActions(f.payload); err != nil || want != have || sent.Len() > 0 {
			t.Errorf("want one ACK %q, have %q, error %v, and %d bytes more", want, have, err, sent.Len())
		}
		r.want(t, "echo: spoa: waited too long for its turn")
		if want, have := int64(w.options.workers), w.permits.Load(); want != have || box.Busy() {
			t.Errorf("want permits for %d handlers and nothing with workers, have %d and %v", want, have, box.Busy())
		}
	})
}

// A NOTIFY is finished, and cannot be late any more, when its last message has no
// handler.
func TestFinishedWithoutHandler(t *testing.T) {
	w := newWorkers(newOptions([]Option{WithHandlerTimeout(time.Hour), WithLogger(log.NewNopLogger()), WithHandlerFunc("echo", echo)}))
	q := &queue{workers: w, ctx: context.Background(), ackSize: 1000}
	j := newJob(q)
	j.begin(&frame{}, nil, w.clock())
	if err := j.decode(appendMessage(appendMessage(nil, echoed("x")), NewMessage("nobody's"))); err != nil {
		t.Fatal(err)
	}
	w.handle(j)
	if want, have := sets("echo", "x"), inActions(j.done); !j.finished || want != have {
		t.Errorf("want it finished with %s, have %v, %s", want, j.finished, have)
	}
}

// A large buffer is not kept for later.
func TestPooledBuffers(t *testing.T) {
	w := newWorkers(newOptions(nil))
	for _, size := range []int{maxPooled, maxPooled + 1} {
		j := newJob(&queue{workers: w})
		j.buf, j.actions.buf = make([]byte, size), make([]byte, size)
		j.recycle()
		want := 0
		if size <= maxPooled {
			want = size
		}
		if have := cap(j.buf); want != have {
			t.Errorf("payload of %d bytes: want %d kept, have %d", size, want, have)
		}
		if have := cap(j.actions.buf); want != have {
			t.Errorf("actions of %d bytes: want %d kept, have %d", size, want, have)
		}
	}
}

// The context of a NOTIFY behaves as those of package context do.
func TestHandlerContext(t *testing.T) {
	const limit = 50 * time.Millisecond
	var arrived time.Time
	check := func(ctx context.Context, what string, err error, after time.Duration) {
		t.Helper()
		<-ctx.Done()
		if have := ctx.Err(); err != have {
			t.Errorf("%s: want %v, have %v", what, err, have)
		}
		if have := context.Cause(ctx); err != have {
			t.Errorf("%s: want cause %v, have %v", what, err, have)
		}
		if have := time.Since(arrived); have < after || have > after+2*tick {
			t.Errorf("%s: want its end after %v, have it after %v", what, after, have)
		}
	}
	kept := make(map[string]context.Context)
	opts := []Option{WithHandlerTimeout(limit),
		WithHandlerFunc("poll", func(ctx context.Context, _ *Message, _ *Actions) error {
			if at, ok := ctx.Deadline(); !ok || !at.Equal(arrived.Add(limit)) {
				t.Errorf("want deadline %v, have %v, %v", arrived.Add(limit), at, ok)
			}
			if err := ctx.Err(); err != nil {
				t.Errorf("want no error yet, have %v", err)
			}
			time.Sleep(limit - 1)
			if err := ctx.Err(); err != nil {
				t.Errorf("want no error before the deadline, have %v", err)
			}
			time.Sleep(time.Nanosecond)
			if want, have := context.DeadlineExceeded, ctx.Err(); want != have {
				t.Errorf("want %v, have %v", want, have)
			}
			check(ctx, "after Err", context.DeadlineExceeded, limit)
			return nil
		}),
		WithHandlerFunc("done", func(ctx context.Context, _ *Message, _ *Actions) error {
			cancelled, cancel := context.WithCancel(ctx)
			cancel()
			check(cancelled, "cancelled", context.Canceled, 0)
			shorter, cancel := context.WithTimeout(ctx, limit/2)
			defer cancel()
			check(shorter, "shorter", context.DeadlineExceeded, limit/2)
			longer, cancel := context.WithTimeout(ctx, limit)
			defer cancel()
			check(longer, "longer", context.DeadlineExceeded, limit)
			check(ctx, "done", context.DeadlineExceeded, limit)
			return nil
		}),
		WithHandlerFunc("keep", func(ctx context.Context, _ *Message, _ *Actions) error {
			kept["asked"] = ctx
			ctx.Done()
			return nil
		}),
		WithHandlerFunc("keep too", func(ctx context.Context, _ *Message, _ *Actions) error {
			kept["not asked"] = ctx
			return nil
		})}
	everyplace(t, opts, func(t *testing.T, a *Agent, h *haproxy, _ *gate) {
		for i, name := range []string{"poll", "done", "keep", "keep too"} {
			arrived = time.Now()
			h.send(notifyOf(1, uint64(i), NewMessage(name)))
			h.wantActions(1, uint64(i), "")
			synctest.Wait()
		}
		for name, ctx := range kept {
			<-ctx.Done()
			if want, have := context.Canceled, ctx.Err(); want != have {
				t.Errorf("%s: want %v after the handler's return, have %v", name, want, have)
			}
		}
	})
}

// The context of a handler ends with its connection, and with the agent.
func TestHandlerContextCancelled(t *testing.T) {
	for what, gone := range map[string]func(a *Agent, h *haproxy){
		"reset": func(_ *Agent, h *haproxy) { h.nc.Close() },
		"Close": func(a *Agent, _ *haproxy) { a.Close() },
	} {
		for limit, opts := range map[string][]Option{"without": nil, "with": {WithHandlerTimeout(time.Hour)}} {
			t.Run(what+"/"+limit+" a timeout", func(t *testing.T) {
				var ended atomic.Int32
				opts = append(opts, WithHandlerFunc("hang", func(ctx context.Context, _ *Message, a *Actions) error {
					if err := ctx.Err(); err != nil {
						t.Errorf("want no error yet, have %v", err)
					}
					child, cancel := context.WithCancel(ctx)
					defer cancel()
					<-ctx.Done()
					<-child.Done()
					if want, have := context.Canceled, ctx.Err(); want != have {
						t.Errorf("want %v, have %v", want, have)
					}
					ended.Add(1)
					return nil
				}))
				everyplace(t, opts, func(t *testing.T, a *Agent, h *haproxy, g *gate) {
					ended.Store(0)
					h.send(notifyOf(1, 1, NewMessage("place"), NewMessage("hang")), notifyOf(1, 2, NewMessage("hang")))
					time.Sleep(time.Second)
					if want, have := int32(0), ended.Load(); want != have {
						t.Errorf("want %d handlers that returned, have %d", want, have)
					}
					gone(a, h)
					synctest.Wait()
					if want, have := int32(2), ended.Load(); want != have {
						t.Errorf("want %d handlers that returned, have %d", want, have)
					}
					h.untilGone()
				})
			})
		}
	}
}

// The context of an async connection that was reset lasts as long as handlers
// whose answers leave by a sibling, and no longer.
func TestHandlerContextAsync(t *testing.T) {
	opts := []Option{WithAsync()}
	everyplace(t, opts, func(t *testing.T, a *Agent, h *haproxy, g *gate) {
		first := only(t, a)
		second := first.listener.Listener.(*memListener).greet(t)
		h.send(notifyOf(1, 1, NewMessage("place"), waiting("x")))
		<-g.entered
		synctest.Wait() // the second is async once it has said HELLO
		h.nc.Close()
		time.Sleep(time.Minute)
		if err := first.ctx.Err(); err != nil {
			t.Errorf("want a context that lasts, have %v", err)
		}
		close(g.of("x"))
		second.wantActions(1, 1, sets("wait", "x"))
		synctest.Wait()
		if want, have := context.Canceled, first.ctx.Err(); want != have {
			t.Errorf("want %v, have %v", want, have)
		}
		h.untilGone()
		second.wantNothing()
	})
}

// A NOTIFY all of whose handlers returned in time is not late, even if the
// watch comes just before its answer.
func TestHandlerTimeoutFinished(t *testing.T) {
	const limit = 5 * time.Millisecond
	hook := WithHooks(Hooks{Handled: func(message string, _ time.Duration, err error) {
		if err != nil {
			t.Errorf("want no error, have %v", err)
		}
		if message == "echo" {
			time.Sleep(2 * limit) // what the scheduler may do
		}
	}})
	opts := []Option{WithHandlerTimeout(limit), faultText(ScopeTxn, "fault"), WithHandlerFunc("echo", echo), hook}
	everyplace(t, opts, func(t *testing.T, a *Agent, h *haproxy, _ *gate) {
		h.send(notifyOf(1, 1, NewMessage("place"), echoed("x")))
		h.wantActions(1, 1, sets("echo", "x"))
	})
}

// Each message has its handler, or the fallback, or none.
func TestHandlers(t *testing.T) {
	fallback := func(_ context.Context, m *Message, a *Actions) error {
		a.SetVar(ScopeReq, "fallback", String(m.Name()))
		return nil
	}
	var r record
	opts := []Option{WithHandlerFunc("echo", echo), r.hook()}
	everyplace(t, append(opts, WithFallback(HandlerFunc(fallback))), func(t *testing.T, a *Agent, h *haproxy, _ *gate) {
		r.list = nil
		h.send(notifyOf(1, 1, NewMessage("place"), NewMessage("a"), echoed("x"), NewMessage("b")))
		h.wantActions(1, 1, "set-var req.fallback string a,"+sets("echo", "x")+",set-var req.fallback string b")
		h.wantNothing()
		r.want(t, "place: <nil>", "a: <nil>", "echo: <nil>", "b: <nil>")
	})

	var lines logLines
	opts = append(opts, faultText(ScopeTxn, "fault"), WithLogger(&lines))
	everyplace(t, opts, func(t *testing.T, a *Agent, h *haproxy, _ *gate) {
		r.list = nil
		lines.forget()
		for id := range uint64(3) {
			h.send(notifyOf(1, id, NewMessage("place"), NewMessage("a"), echoed("x"), NewMessage("b")))
			h.wantActions(1, id, sets("echo", "x")+","+sets("fault", "no-handler"))
			h.wantNothing()
			r.want(t, "place: <nil>", "a: spoa: no handler for this message", "echo: <nil>", "b: spoa: no handler for this message")
		}
		for _, name := range []string{"a", "b"} {
			if have := lines.with("level=warn", "message="+name, "handled=echo,place,wait"); len(have) != 1 {
				t.Errorf("want one warning of message %s, have %q", name, have)
			}
		}
		// A peer can invent any number of names.
		for id := range uint64(2 * maxUnknown) {
			h.send(notifyOf(2, id, NewMessage("invented-"+strconv.FormatUint(id, 10))))
			h.wantActions(2, id, sets("fault", "no-handler"))
		}
		if have := lines.with("no handler"); len(have) != maxUnknown {
			t.Errorf("want %d warnings, have %d", maxUnknown, len(have))
		}
	})
}

// A message that fails loses its own actions, and no other.
func TestHandlerFaults(t *testing.T) {
	own := errors.New("own")
	type done struct {
		message string
		err     error
	}
	var mu sync.Mutex
	var told []done
	fail := func(end func(a *Actions) error) HandlerFunc {
		return func(_ context.Context, m *Message, a *Actions) error {
			a.SetVar(ScopeTxn, "of."+m.Name(), Bool(true))
			return end(a)
		}
	}
	opts := []Option{faultText(ScopeTxn, "fault"), WithHandlerFunc("echo", echo),
		WithHandler("error", fail(func(*Actions) error { return fmt.Errorf("wrapped: %w", own) })),
		WithHandler("panic", fail(func(*Actions) error { panic(own) })),
		WithHandler("panic with text", fail(func(*Actions) error { panic("text") })),
		WithHandler("panic with nil", fail(func(*Actions) error { panic(nil) })),
		WithHandler("timeout", fail(func(*Actions) error { return fmt.Errorf("wrapped: %w", context.DeadlineExceeded) })),
		WithHandler("goexit", fail(func(*Actions) error { runtime.Goexit(); return nil })),
		WithHandler("actions", fail(func(a *Actions) error {
			a.SetVar(ScopeTxn, "", Bool(true))
			a.SetVar(ScopeTxn, "large", String(strings.Repeat("x", 17000)))
			a.SetVar(ScopeTxn, "fits", Bool(true))
			return nil
		})),
		WithHandler("actions returned", fail(func(a *Actions) error {
			a.SetVar(ScopeTxn, "", Bool(true))
			return a.Err()
		})),
		WithHooks(Hooks{Handled: func(message string, _ time.Duration, err error) {
			mu.Lock()
			defer mu.Unlock()
			told = append(told, done{message, err})
		}})}
	set := func(name string) string { return "set-var txn." + name + " bool true" }
	for _, tt := range []struct {
		message, fault, actions string
		is                      error
	}{
		{"error", "error", "", own},
		{"panic", "panic", "", own},
		{"panic with text", "panic", "", nil},
		{"panic with nil", "panic", "", new(runtime.PanicNilError)},
		{"timeout", "timeout", "", context.DeadlineExceeded},
		{"goexit", "error", "", errGoexit},
		{"actions", "error", set("of.actions") + "," + set("fits"), nil},
		{"actions returned", "error", "", nil},
	} {
		t.Run(tt.message, func(t *testing.T) {
			everyplace(t, opts, func(t *testing.T, a *Agent, h *haproxy, _ *gate) {
				for id := range uint64(3) {
					told = nil
					h.send(notifyOf(1, id, NewMessage("place"), echoed("before"), NewMessage(tt.message), echoed("after")))
					want := []string{sets("echo", "before"), tt.actions, sets("echo", "after"), sets("fault", tt.fault)}
					if tt.message == "goexit" {
						want[2] = "" // there is no goroutine to call it
					}
					h.wantActions(1, id, strings.Join(slices.DeleteFunc(want, func(s string) bool { return s == "" }), ","))
					h.wantNothing()
					if len(told) < 3 || told[2].message != tt.message || told[2].err == nil {
						t.Fatalf("want Handled told of the error, have %v", told)
					}
					err := told[2].err
					if target := new(runtime.PanicNilError); tt.is != nil && !errors.Is(err, tt.is) && !errors.As(err, &target) {
						t.Errorf("want %v, have %v", tt.is, err)
					}
					var pe *PanicError
					if want, have := tt.fault == "panic", errors.As(err, &pe); want != have {
						t.Errorf("want a PanicError: %v, have %v", want, err)
					}
					if pe != nil && (!strings.Contains(string(pe.Stack), "TestHandlerFaults") ||
						!strings.HasPrefix(pe.Error(), "spoa: handler panicked: ")) {
						t.Errorf("want the stack of the panic, have %v\n%s", pe, pe.Stack)
					}
					// No fault, no variable.
					h.send(notifyOf(2, id, NewMessage("place"), echoed("good")))
					h.wantActions(2, id, sets("echo", "good"))
				}
			})
		})
	}
}

// A handler that takes longer than a second is warned of once, and of one name
// no more than once a second.
func TestSlowHandlerWarned(t *testing.T) {
	var lines logLines
	opts := []Option{WithLogger(&lines),
		WithHandlerFunc("slow", func(context.Context, *Message, *Actions) error {
			time.Sleep(10 * slowWarn)
			return nil
		})}
	everyplace(t, opts, func(t *testing.T, a *Agent, h *haproxy, _ *gate) {
		lines.forget()
		h.send(notifyOf(1, 1, NewMessage("place"), NewMessage("slow")), notifyOf(1, 2, NewMessage("slow")))
		time.Sleep(slowWarn - 2*tick)
		if have := lines.with("slow handler"); len(have) != 0 {
			t.Errorf("want no warning yet, have %q", have)
		}
		h.want(frameAck)
		h.want(frameAck)
		if have := lines.with("level=warn", "slow handler", "slow "); len(have) != 1 {
			t.Errorf("want one warning, have %q", have)
		}
	})
}
