package spoa

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-kit/log"
	"github.com/go-kit/log/level"
)

// faultText sets a variable to the name of the fault.
func faultText(s Scope, name string) Option {
	return WithFaultFunc(s, name, func(f Fault, _ error) Value { return String(f.String()) })
}

func TestBadOptions(t *testing.T) {
	h := HandlerFunc(numbered)
	for _, tt := range []struct {
		want string
		opt  Option
	}{
		{"WithHandler", WithHandler("m", nil)},
		{"WithHandler", WithHandler("m", HandlerFunc(nil))},
		{"WithHandler", WithHandlerFunc("m", nil)},
		{"WithHandler", WithHandler("", h)},
		{"WithHandler(\"twice\")", WithHandler("twice", h)},
		{"WithFallback", WithFallback(nil)},
		{"WithFallback", WithFallback(HandlerFunc(nil))},
		{"WithFallback", WithFallback(h, nil)},
		{"WithWorkers(0)", WithWorkers(0)},
		{"WithWorkers(-1)", WithWorkers(-1)},
		{"WithFragmentation(255)", WithFragmentation(255)},
		{"WithFragmentation(0)", WithFragmentation(0)},
		{"WithMaxFrameSize(255)", WithMaxFrameSize(255)},
		{"WithMaxFrameSize(-1)", WithMaxFrameSize(-1)},
		{"WithMaxFrameSize(268435457)", WithMaxFrameSize(maxFrameSize + 1)},
		{"WithRotation(0)", WithRotation(0)},
		{"WithHelloTimeout(0s)", WithHelloTimeout(0)},
		{"WithHelloTimeout(-1ns)", WithHelloTimeout(-1)},
		{"WithIdleTimeout(0s)", WithIdleTimeout(0)},
		{"WithIdleTimeout(-1s)", WithIdleTimeout(-time.Second)},
		{"WithWriteTimeout(0s)", WithWriteTimeout(0)},
		{"WithWriteTimeout(-2562047h47m16.854775808s)", WithWriteTimeout(math.MinInt64)},
		{"WithHandlerTimeout(999.999µs)", WithHandlerTimeout(time.Millisecond - 1)},
		{"WithFaultVar", WithFaultVar(ScopeTxn, "", Int(1))},
		{"WithFaultVar", WithFaultVar(ScopeRes+1, "v", Int(1))},
		{"WithFaultVar", WithFaultVar(ScopeTxn, strings.Repeat("v", 64), Int(1))},
		{"WithFaultVar", WithFaultVar(ScopeTxn, strings.Repeat("v", 1000), Int(1))},
		{"WithFaultVar(txn, \"v\")", WithFaultVar(ScopeTxn, "v", Value{})},
		{"WithFaultVar(txn, \"v\"): no such fault: none", WithFaultVar(ScopeTxn, "v", Int(1), 0)},
		{"WithFaultVar(txn, \"v\"): no such fault: fault 6", WithFaultVar(ScopeTxn, "v", Int(1), FaultError, faultCount)},
		{"WithFaultVar(txn, \"v\"): value of 129 bytes", WithFaultVar(ScopeTxn, "v", String(strings.Repeat("v", 129)))},
		{"200 bytes are too few for the variables of fault panic", func(o *options) {
			for _, name := range []string{"v", "w"} {
				WithFaultVar(ScopeTxn, name, String(strings.Repeat("v", 128)), FaultPanic)(o)
			}
		}},
		{"WithMiddleware: returned nil", func(o *options) {
			WithHandler("wrapped", h)(o)
			WithMiddleware(func(Handler) Handler { return nil })(o)
		}},
		{"WithFaultFunc(txn, \"v\")", WithFaultFunc(ScopeTxn, "v", nil)},
		{"WithMiddleware", WithMiddleware(nil)},
		{"WithHandler(\"option\")", WithHandler("option", h, nil)},
		{"Timeout(0s)", WithHandler("timeout", h, Timeout(0))},
		{"MaxConcurrent(0)", WithHandler("bounded", h, MaxConcurrent(0))},
		{"WithLogger", WithLogger(nil)},
		{"WithSlog", WithSlog(nil)},
		{"option 1 is nil", nil},
	} {
		ln := &failingListener{newMemListener(), errors.New("accepted"), make(chan time.Time, 1)}
		err := New(WithHandler("twice", h), tt.opt).Serve(ln)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("want an error with %q, have %v", tt.want, err)
		}
		if have := ln.closes.Load(); have != 1 {
			t.Errorf("%s: want the listener closed once, have %d times", tt.want, have)
		}
	}
	err := New(WithWorkers(0), nil, WithRotation(0)).Serve(newMemListener())
	for _, want := range []string{"WithWorkers", "option 1", "WithRotation"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want all errors, have %v", err)
		}
	}
	a := New(WithWorkers(0))
	if err := a.Shutdown(context.Background()); err != nil {
		t.Errorf("Shutdown with a bad option: want no error, have %v", err)
	}
	a.Close()
}

// The longest time there is means for ever.
func TestLongestTimeouts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const forever = math.MaxInt64
		_, ln := startMem(t, withNumbered(), WithHelloTimeout(forever), WithIdleTimeout(forever), WithWriteTimeout(forever), WithHandlerTimeout(forever))
		h := ln.dial(t)
		<-time.After(24 * time.Hour)
		h.hello()
		h.wantAnswers()
		<-time.After(24 * time.Hour)
		h.send(notifyFrame(1, 1)[:9])
		<-time.After(24 * time.Hour)
		h.send(notifyFrame(1, 1)[9:])
		h.wantAck(1, 1)
	})
}

// A connection is closed after so many NOTIFYs, and not before all of them are
// answered.
func TestRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		hooks, closed := hooked()
		_, ln := startMem(t, withNumbered(), WithHandler("slow", g), WithRotation(3), hooks)
		h := ln.dial(t)
		h.hello()
		h.wantAnswers()
		h.send(notifyOf(5, 5, NewMessage("slow")))
		g.wait(t, 1)
		for range 5 {
			h.wantAnswers()
			<-time.After(time.Second)
			h.wantNothing()
		}
		close(g.open)
		h.wantAck(5, 5)
		if want, have := "rotated", h.wantEnd(StatusNormal); want != have {
			t.Errorf("want message %q, have %q", want, have)
		}
		if err := <-closed; err != nil {
			t.Errorf("want a normal end, have %v", err)
		}
	})
}

func TestWorkers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, workers := range []int{1, 3} {
			g := newGate()
			_, ln := startMem(t, WithHandler("number", g), WithWorkers(workers))
			var hs []*haproxy
			for id := range uint64(4) {
				h := ln.dial(t)
				h.hello()
				h.send(notifyFrame(1, id), notifyFrame(2, id))
				hs = append(hs, h)
			}
			<-time.After(10 * time.Second)
			if have := len(g.entered); have != workers {
				t.Errorf("want %d handlers at once, have %d", workers, have)
			}
			close(g.open)
			for id, h := range hs {
				for range 2 {
					if f := h.want(frameAck); f.id != uint64(id) {
						t.Errorf("want an ACK of frame %d, have %s", id, inWordsFrame(f))
					}
				}
			}
		}
	})
}

func TestHandlersByName(t *testing.T) {
	called := func(name string) HandlerFunc {
		return func(_ context.Context, _ *Message, a *Actions) error {
			a.SetVar(ScopeTxn, name, Bool(true))
			return nil
		}
	}
	_, ln := startMem(t, WithHandler("a", called("a")), WithHandlerFunc("b", called("b")), WithFallback(called("other")))
	h := ln.dial(t)
	h.hello()
	payload := appendMessage(nil, NewMessage("b"))
	payload = appendMessage(payload, NewMessage("c"))
	payload = appendMessage(payload, NewMessage("a"))
	h.send(rawFrame(frameNotify, flagFIN, 1, 2, string(payload)))
	want := "ACK 1:2 set-var txn.b bool true set-var txn.other bool true set-var txn.a bool true"
	if have := inWordsFrame(h.want(frameAck)); want != have {
		t.Errorf("want %s, have %s", want, have)
	}
}

func TestFaultVar(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		opts := []Option{
			WithWorkers(1), WithHandlerTimeout(100 * time.Millisecond), faultText(ScopeTxn, "fault"), WithSlog(slog.New(slog.DiscardHandler)),
			withNumbered(),
			WithHandlerFunc("error", func(context.Context, *Message, *Actions) error { return errors.New("out of cheese") }),
			WithHandlerFunc("panic", func(context.Context, *Message, *Actions) error { panic("out of cheese") }),
			WithHandlerFunc("timeout", func(ctx context.Context, _ *Message, _ *Actions) error {
				<-ctx.Done()
				<-time.After(time.Second) // keeps the only worker
				return nil
			}),
		}
		_, ln := startMem(t, opts...)
		h := ln.dial(t)
		h.hello()
		notify := func(name string) {
			h.send(notifyOf(1, 1, NewMessage(name)))
		}
		want := func(fault string) {
			t.Helper()
			want := "ACK 1:1 set-var txn.fault string " + fault
			if have := inWordsFrame(h.want(frameAck)); want != have {
				t.Errorf("want %s, have %s", want, have)
			}
		}
		for _, fault := range []string{"error", "panic", "no-handler", "timeout"} {
			notify(fault)
			want(fault)
		}
		notify("number")
		want("overload")
		<-time.After(2 * time.Second)
		h.wantAnswers() // no fault, no variable
	})
}

// A fault is told in the terms of the rules that look for it.
func TestFaultVars(t *testing.T) {
	large := errors.New(strings.Repeat("x", 1000))
	opts := []Option{
		WithFaultVar(ScopeTxn, "error", Int(255)),
		WithFaultVar(ScopeSess, "failed", Bool(true), FaultError, FaultNoHandler),
		WithFaultFunc(ScopeTxn, "why", func(f Fault, err error) Value {
			switch {
			case f == FaultPanic:
				panic("in the function, too")
			case f == FaultNoHandler:
				return Value{}
			}
			return String(err.Error())
		}),
		WithHandlerFunc("error", func(_ context.Context, m *Message, a *Actions) error {
			a.SetVar(ScopeTxn, "lost", Int(1))
			return errors.New("out of cheese")
		}),
		WithHandlerFunc("large", func(context.Context, *Message, *Actions) error { return large }),
		WithHandlerFunc("panic", func(context.Context, *Message, *Actions) error { panic("out of cheese") }),
		WithHandlerFunc("keep", func(_ context.Context, m *Message, a *Actions) error {
			a.SetVar(ScopeTxn, "kept", Int(1))
			a.Keep()
			a.SetVar(ScopeTxn, "lost", Int(1))
			if m.Len() > 0 {
				panic("after Keep")
			}
			return errors.New("kept")
		}),
		WithHandlerFunc("fill", func(_ context.Context, m *Message, a *Actions) error {
			a.SetVar(ScopeTxn, "fill", String(strings.Repeat("x", 220)))
			return nil
		}),
		WithSlog(slog.New(slog.DiscardHandler)),
	}
	_, ln := startMem(t, opts...)
	h := ln.dial(t)
	offer := offered
	offer.frameSize = 256
	h.helloAs(offer)
	const error255, failed = " set-var txn.error int64 255", " set-var sess.failed bool true"
	const kept = " set-var txn.kept int64 1"
	for _, tt := range []struct {
		messages string
		want     string
	}{
		{"error", error255 + failed + " set-var txn.why string out of cheese"},
		{"panic", error255 + " set-var txn.why string panic"},
		{"none", error255 + failed},
		{"large", error255 + failed + " set-var txn.why string " + strings.Repeat("x", maxFaultText)},
		{"fill", " set-var txn.fill string " + strings.Repeat("x", 220)},
		{"none error", error255 + failed},
		{"fill error", error255 + failed + " set-var txn.why string out of cheese"}, // no room for both
		{"keep", kept + error255 + failed + " set-var txn.why string kept"},
		{"keep=1", kept + error255 + " set-var txn.why string panic"},
	} {
		var payload []byte
		for name := range strings.SplitSeq(tt.messages, " ") {
			if name, ok := strings.CutSuffix(name, "=1"); ok {
				payload = appendMessage(payload, NewMessage(name, Arg{"", Int(1)}))
				continue
			}
			payload = appendMessage(payload, NewMessage(name))
		}
		h.send(rawFrame(frameNotify, flagFIN, 1, 1, string(payload)))
		if have := inWordsFrame(h.want(frameAck)); "ACK 1:1"+tt.want != have {
			t.Errorf("%s: want%s, have %s", tt.messages, tt.want, have)
		}
	}
}

// Messages of a NOTIFY see and take back what earlier ones have set; a failure
// brings it back.
func TestDrop(t *testing.T) {
	opts := []Option{
		WithHandlerFunc("set", func(_ context.Context, m *Message, a *Actions) error {
			a.SetVar(ScopeTxn, "v", Int(1))
			a.SetVar(ScopeTxn, "w", Int(2))
			a.UnsetVar(ScopeTxn, "v")
			return nil
		}),
		WithHandlerFunc("drop", func(_ context.Context, m *Message, a *Actions) error {
			w, ok := a.Lookup(ScopeTxn, "w")
			if !a.Drop(ScopeTxn, "v") || a.Drop(ScopeTxn, "v") || a.Drop(ScopeSess, "w") || !ok || !w.Equal(Int(2)) {
				t.Errorf("want v dropped once, have actions %v", slices.Collect(a.All()))
			}
			a.SetVar(ScopeTxn, "v", Int(3))
			if m.Len() > 0 {
				return errors.New("failed")
			}
			return nil
		}),
		WithSlog(slog.New(slog.DiscardHandler)),
	}
	_, ln := startMem(t, opts...)
	h := ln.dial(t)
	h.hello()
	for _, tt := range []struct {
		drop *Message
		want string
	}{
		{NewMessage("drop"), "set-var txn.w int64 2 set-var txn.v int64 3"},
		{NewMessage("drop", Arg{"", Int(1)}), "set-var txn.v int64 1 set-var txn.w int64 2 unset-var txn.v"},
	} {
		payload := appendMessage(appendMessage(nil, NewMessage("set")), tt.drop)
		h.send(rawFrame(frameNotify, flagFIN, 1, 1, string(payload)))
		if have := inWordsFrame(h.want(frameAck)); "ACK 1:1 "+tt.want != have {
			t.Errorf("want %s, have %s", tt.want, have)
		}
	}
}

func TestMiddleware(t *testing.T) {
	sign := func(mark string) func(Handler) Handler {
		return func(next Handler) Handler {
			return HandlerFunc(func(ctx context.Context, m *Message, a *Actions) error {
				a.SetVar(ScopeTxn, mark, String(m.Name()))
				return next.ServeSPOE(ctx, m, a)
			})
		}
	}
	nothing := func(context.Context, *Message, *Actions) error { return nil }
	_, ln := startMem(t, WithMiddleware(sign("a"), sign("b")), WithHandlerFunc("one", nothing), WithFallback(HandlerFunc(nothing)), WithMiddleware(sign("c")))
	h := ln.dial(t)
	h.hello()
	for _, name := range []string{"one", "other"} {
		h.send(rawFrame(frameNotify, flagFIN, 1, 1, string(appendMessage(nil, NewMessage(name)))))
		want := fmt.Sprintf("ACK 1:1 set-var txn.a string %[1]s set-var txn.b string %[1]s set-var txn.c string %[1]s", name)
		if have := inWordsFrame(h.want(frameAck)); want != have {
			t.Errorf("want %s, have %s", want, have)
		}
	}
}

// Each kind of message has its own timeout, and a NOTIFY the longest of its
// messages'.
func TestMessageTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hang := func(ctx context.Context, m *Message, a *Actions) error {
			<-ctx.Done()
			return nil
		}
		_, ln := startMem(t, WithHandlerTimeout(10*time.Millisecond), WithHandlerFunc("quick", hang),
			WithHandlerFunc("slow", hang, Timeout(5*time.Second)), WithHandlerFunc("done", numbered, Timeout(time.Minute)),
			faultText(ScopeTxn, "fault"), WithSlog(slog.New(slog.DiscardHandler)))
		h := ln.dial(t)
		h.hello()
		for _, tt := range []struct {
			messages []string
			want     time.Duration
		}{
			{[]string{"quick"}, 10 * time.Millisecond},
			{[]string{"slow"}, 5 * time.Second},
			{[]string{"slow", "quick"}, 5 * time.Second},
			{[]string{"none", "quick"}, 10 * time.Millisecond},
			{[]string{"quick", "none", "slow"}, 5 * time.Second},
		} {
			var payload []byte
			for _, name := range tt.messages {
				payload = appendMessage(payload, NewMessage(name))
			}
			began := time.Now()
			h.send(rawFrame(frameNotify, flagFIN, 1, 1, string(payload)))
			h.want(frameAck)
			if took := time.Since(began); took < tt.want || took > tt.want+3*tick {
				t.Errorf("%v: want an answer after %v, have it after %v", tt.messages, tt.want, took)
			}
		}
	})
	synctest.Test(t, func(t *testing.T) {
		hang := func(ctx context.Context, m *Message, a *Actions) error {
			if _, ok := ctx.Deadline(); ok != (m.Name() == "slow") {
				t.Errorf("%s: want a deadline for slow alone, have %v", m.Name(), ok)
			}
			return nil
		}
		_, ln := startMem(t, WithHandlerFunc("endless", hang), WithHandlerFunc("slow", hang, Timeout(5*time.Second)))
		h := ln.dial(t)
		h.hello()
		for _, name := range []string{"endless", "slow"} {
			h.send(rawFrame(frameNotify, flagFIN, 1, 1, string(appendMessage(nil, NewMessage(name)))))
			h.want(frameAck)
		}
	})
}

// Once its context is done, nothing that a handler sets is sent: it can rely on
// that for what it keeps.
func TestContextDone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limit := 10 * time.Millisecond
		events := make(chan MessageEvent, 1)
		_, ln := startMem(t, WithHandlerTimeout(limit), WithHooks(Hooks{Message: func(e MessageEvent) { events <- e }}), WithSlog(slog.New(slog.DiscardHandler)),
			WithHandlerFunc("late", func(ctx context.Context, m *Message, a *Actions) error {
				for ctx.Err() == nil { // by the clock, which may be before the watch looks
					time.Sleep(100 * time.Microsecond)
				}
				a.SetVar(ScopeTxn, "v", Int(1))
				return nil
			}))
		h := ln.dial(t)
		h.hello()
		for range 20 {
			h.send(rawFrame(frameNotify, flagFIN, 1, 1, string(appendMessage(nil, NewMessage("late")))))
			if want, have := "ACK 1:1", inWordsFrame(h.want(frameAck)); want != have {
				t.Errorf("want %s, have %s", want, have)
			}
			if e := <-events; !e.Late || e.Fault != FaultTimeout || e.Err != context.DeadlineExceeded {
				t.Errorf("want it late, have %+v", e)
			}
			time.Sleep(300 * time.Microsecond)
		}
	})
}

func TestMessageHook(t *testing.T) {
	own := errors.New("own")
	events := make(chan MessageEvent, 1)
	peers := make(chan Peer, 1)
	opts := []Option{
		WithHooks(Hooks{Message: func(e MessageEvent) { events <- e }}),
		WithHandlerFunc("good", func(_ context.Context, m *Message, _ *Actions) error {
			peers <- m.Peer()
			return nil
		}),
		WithHandlerFunc("error", func(context.Context, *Message, *Actions) error { return own }),
		WithHandlerFunc("panic", func(context.Context, *Message, *Actions) error { panic(own) }),
		WithSlog(slog.New(slog.DiscardHandler)),
	}
	_, ln := startMem(t, opts...)
	h := ln.dial(t)
	h.hello()
	for _, tt := range []struct {
		message string
		fault   Fault
		err     error
	}{
		{"good", 0, nil},
		{"error", FaultError, own},
		{"panic", FaultPanic, own},
		{"none", FaultNoHandler, ErrNoHandler},
	} {
		h.send(rawFrame(frameNotify, flagFIN, 1, 1, string(appendMessage(nil, NewMessage(tt.message)))))
		h.want(frameAck)
		e := receive(t, "an event", events)
		if e.Message != tt.message || e.Fault != tt.fault || !errors.Is(e.Err, tt.err) || e.Late || e.Peer.EngineID != "engine" || e.Peer.Addr == nil {
			t.Errorf("%s: want %v, %v, have %+v", tt.message, tt.fault, tt.err, e)
		}
		if tt.message == "good" {
			if p := receive(t, "a peer", peers); p != e.Peer || p.FrameSize == 0 {
				t.Errorf("want the message's peer the hook's, have %+v and %+v", p, e.Peer)
			}
		}
	}
}

func TestDebug(t *testing.T) {
	for _, on := range []bool{true, false} {
		lines := new(logLines)
		_, ln := startMem(t, withNumbered(), WithLogger(lines), WithDebug(on), WithFragmentation(300))
		h := ln.dial(t)
		h.hello()
		h.wantAnswers()
		h.send(fragments(3, 4, number, 5)...)
		h.wantAck(3, 4)
		h.send(rawFrame(frameNotify, 0, 5, 6, strings.Repeat("x", 301)))
		h.want(frameAck)
		h.send(goodbye)
		h.wantEnd(StatusNormal)
		for _, want := range []string{
			`received frame=HAPROXY-HELLO 0:0 supported-versions="2.0" max-frame-size="16380"`,
			`sent frame=AGENT-HELLO 0:0 version="2.0" max-frame-size="16380"`,
			`received frame=NOTIFY 77:99 number()`,
			`sent frame=ACK 77:99 set-var txn.id uint64 99`,
			`received frame=NOTIFY unfinished 3:4 5 bytes`,
			`received frame=UNSET 3:4 3 bytes`,
			`sent frame=ACK 3:4 set-var txn.id uint64 4`,
			`sent frame=ACK ABORT 5:6`,
			`received frame=HAPROXY-DISCONNECT 0:0 status-code="0" message="bye"`,
			`sent frame=AGENT-DISCONNECT 0:0 status-code="0"`,
		} {
			if have := lines.with("level=debug", "msg="+want); len(have) != 1 && on || len(have) != 0 && !on {
				t.Errorf("debug %v: %s: have %q", on, want, have)
			}
		}
	}
}

func TestHooks(t *testing.T) {
	type handled struct {
		message string
		took    time.Duration
		err     error
	}
	opened, closed, calls := make(chan Peer, 10), make(chan Peer, 10), make(chan handled, 10)
	errs := make(chan error, 10)
	failure := errors.New("out of cheese")
	synctest.Test(t, func(t *testing.T) {
		_, ln := startMem(t, withNumbered(),
			WithHandlerFunc("late", func(context.Context, *Message, *Actions) error { <-time.After(10 * time.Second); return failure }),
			WithHooks(Hooks{
				ConnOpened: func(p Peer) { opened <- p },
				ConnClosed: func(p Peer, err error) { closed <- p; errs <- err },
				Handled:    func(m string, took time.Duration, err error) { calls <- handled{m, took, err} },
			}))
		h := ln.dial(t)
		h.hello()
		h.wantAnswers()
		payload := appendMessage(appendMessage(nil, NewMessage("late")), NewMessage("nobody's"))
		h.send(rawFrame(frameNotify, flagFIN, 1, 1, string(payload)))
		h.want(frameAck)
		for _, want := range []handled{{"number", 0, nil}, {"late", 10 * time.Second, failure}, {"nobody's", 0, ErrNoHandler}} {
			if have := <-calls; want != have {
				t.Errorf("want %+v, have %+v", want, have)
			}
		}
		h.send(string(appendDisconnect(nil, frameHAProxyDisconnect, StatusIO, "gone")))
		h.wantEnd(StatusNormal)
		if p := <-opened; p != (Peer{Addr: p.Addr}) || p.Addr == nil {
			t.Errorf("ConnOpened: want an address only, have %+v", p)
		}
		p := <-closed
		if want := (Peer{p.Addr, "engine", "pipelining", 16380, false}); want != p {
			t.Errorf("ConnClosed: want %+v, have %+v", want, p)
		}
		var d *DisconnectError
		if err := <-errs; !errors.As(err, &d) || *d != (DisconnectError{Status: StatusIO, Message: "gone", Remote: true}) {
			t.Errorf("ConnClosed: want what the peer said, have %v", err)
		}
	})
}

// Faults are logged once per kind and second, with a count; normal ends for who
// debugs only.
func TestLogging(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all, warn := new(logLines), new(logLines)
		both := log.LoggerFunc(func(kv ...any) error {
			all.Log(kv...)
			return level.NewFilter(warn, level.AllowInfo()).Log(kv...)
		})
		_, ln := startMem(t, withNumbered(), WithLogger(both), WithIdleTimeout(10*time.Second))
		for range 5 {
			h := ln.dial(t)
			h.hello()
			h.send(goodbye)
			h.wantEnd(StatusNormal)
			h = ln.dial(t)
			h.hello()
			h.nc.Close()
			ln.raw(t).Close()
			h = ln.dial(t)
			h.hello()
			h.wantEnd(StatusTimeout)
		}
		synctest.Wait()
		if len(warn.lines) != 0 {
			t.Errorf("want no line above debug, have %q", warn.lines)
		}
		if have := all.with("level=debug", "connection ended"); len(have) != 20 {
			t.Errorf("want 20 ends at debug, have %d", len(have))
		}
		faults := func() {
			for range 4 {
				h := ln.dial(t)
				h.try("\xff\xff\xff\xff")
				h.wantEnd(StatusFrameTooBig)
				h = ln.dial(t)
				h.try(goodbye)
				h.wantEnd(StatusInvalidFrame)
			}
			synctest.Wait()
		}
		faults()
		<-time.After(time.Second)
		faults()
		for _, want := range []string{"suppressed=0", "suppressed=3"} {
			for _, kind := range []Status{StatusFrameTooBig, StatusInvalidFrame} {
				if have := warn.with("level=warn", "connection ended", kind.String(), want); len(have) != 1 {
					t.Errorf("%v, %s: want one line, have %q", kind, want, have)
				}
			}
		}
		if want := 4; len(warn.lines) != want {
			t.Errorf("want %d lines, have %q", want, warn.lines)
		}
	})
}

func TestConns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		a, ln := startMem(t, withNumbered(), WithHandler("slow", g))
		if have := a.Conns(); len(have) != 0 {
			t.Errorf("want none, have %v", have)
		}
		<-time.After(time.Minute)
		since := time.Now()
		h := ln.dial(t)
		h.hello()
		<-time.After(time.Minute)
		h.wantAnswers()
		slow := notifyOf(1, 1, NewMessage("slow"))
		h.send(strings.Repeat(slow, 3))
		g.wait(t, 3)
		<-time.After(time.Second)
		infos := a.Conns()
		if len(infos) != 1 {
			t.Fatalf("want one, have %v", infos)
		}
		have := infos[0]
		if want := (ConnInfo{Peer{have.Addr, "engine", "pipelining", 16380, false}, have.Since, 4, 3}); want != have {
			t.Errorf("want %+v, have %+v", want, have)
		}
		if !have.Since.Equal(since) {
			t.Errorf("want it accepted at %v, have %v", since, have.Since)
		}
		close(g.open)
		for range 3 {
			h.want(frameAck)
		}
		h.nc.Close()
		synctest.Wait()
		if have := a.Conns(); len(have) != 0 {
			t.Errorf("want none, have %v", have)
		}
	})
}

// slogLines returns a logger to JSON, without times, and what has been logged.
func slogLines(least slog.Level) (*slog.Logger, *bytes.Buffer) {
	var b bytes.Buffer
	return slog.New(slog.NewJSONHandler(&b, &slog.HandlerOptions{Level: least, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}})), &b
}

func TestWithSlog(t *testing.T) {
	logger, lines := slogLines(slog.LevelDebug)
	l := log.With(newOptions([]Option{WithSlog(logger)}).logger, "peer", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 80})
	level.Debug(l).Log("msg", "what", "err", errors.New("broken"), "n", 1, "took", time.Second, "stack", []byte("main.go"))
	level.Info(l).Log("msg", "what", "err", nil)
	level.Warn(l).Log("odd")
	level.Error(l).Log("status", StatusIO, 1, true)
	l.Log("msg", errors.New("no level"))
	const peer = `"peer":"127.0.0.1:80"`
	want := `{"level":"DEBUG","msg":"what",` + peer + `,"err":"broken","n":1,"took":1000000000,"stack":"main.go"}
{"level":"INFO","msg":"what",` + peer + `,"err":null}
{"level":"WARN","msg":"",` + peer + `,"odd":"(MISSING)"}
{"level":"ERROR","msg":"",` + peer + `,"status":"I/O error","1":true}
{"level":"INFO","msg":"no level",` + peer + `}
`
	if have := lines.String(); want != have {
		t.Errorf("want\n%shave\n%s", want, have)
	}
	logger, lines = slogLines(slog.LevelError)
	level.Warn(newOptions([]Option{WithSlog(logger)}).logger).Log("msg", "below the handler's level")
	if have := lines.String(); have != "" {
		t.Errorf("want nothing, have %s", have)
	}
}

// What goes wrong is not lost where nobody has set a logger; the rest is.
func TestDefaultLogger(t *testing.T) {
	logger, lines := slogLines(slog.LevelDebug)
	o := newOptions(nil)
	old := slog.Default()
	slog.SetDefault(logger) // later than the agent was made
	defer slog.SetDefault(old)
	level.Debug(o.logger).Log("msg", "debug")
	level.Info(o.logger).Log("msg", "info")
	level.Warn(o.logger).Log("msg", "warn")
	level.Error(o.logger).Log("msg", "error")
	if want, have := `{"level":"WARN","msg":"warn"}`+"\n"+`{"level":"ERROR","msg":"error"}`+"\n", lines.String(); want != have {
		t.Errorf("want\n%shave\n%s", want, have)
	}
}

// The README's table names every option.
func TestOptionTable(t *testing.T) {
	source, err := os.ReadFile("options.go")
	if err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	options := regexp.MustCompile(`(?m)^func (With\w+)\(`).FindAllSubmatch(source, -1)
	if len(options) < 20 {
		t.Fatalf("want 20 options or more, have %d", len(options))
	}
	for _, o := range options {
		if !regexp.MustCompile(`(?m)^\|.*` + "`" + string(o[1]) + `\b.*\|$`).Match(readme) {
			t.Errorf("want %s in the table, have it not", o[1])
		}
	}
}
