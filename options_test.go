package spoa

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-kit/log"
	"github.com/go-kit/log/level"
)

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
		{"WithFaultVar", WithFaultVar(ScopeTxn, "")},
		{"WithFaultVar", WithFaultVar(ScopeRes+1, "v")},
		{"WithFaultVar", WithFaultVar(ScopeTxn, strings.Repeat("v", 64))},
		{"WithFaultVar", WithFaultVar(ScopeTxn, strings.Repeat("v", 1000))},
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
		h.send(rawFrame(frameNotify, flagFIN, 5, 5, string(appendMessage(nil, NewMessage("slow")))))
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
			WithWorkers(1), WithHandlerTimeout(100 * time.Millisecond), WithFaultVar(ScopeTxn, "fault"),
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
			h.send(rawFrame(frameNotify, flagFIN, 1, 1, string(appendMessage(nil, NewMessage(name)))))
		}
		want := func(fault string) {
			t.Helper()
			want := "ACK 1:1 set-var txn.fault string " + fault
			if have := inWordsFrame(h.want(frameAck)); want != have {
				t.Errorf("want %s, have %s", want, have)
			}
		}
		for _, fault := range []string{"error", "panic", "timeout"} {
			notify(fault)
			want(fault)
		}
		notify("number")
		want("overload")
		<-time.After(2 * time.Second)
		h.wantAnswers() // no fault, no variable
	})
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
				h.try("GET / HTTP/1.1\r\n\r\n")
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
		slow := rawFrame(frameNotify, flagFIN, 1, 1, string(appendMessage(nil, NewMessage("slow"))))
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
