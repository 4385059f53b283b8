package spoa

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/go-kit/log"
)

// asEngine returns a connection of that engine.
func asEngine(t testing.TB, ln *memListener, engine string) *haproxy {
	t.Helper()
	h := ln.dial(t)
	offer := offered
	offer.engineID = engine
	h.helloAs(offer)
	synctest.Wait() // it is a sibling once it has said HELLO
	return h
}

// An ACK whose connection has gone leaves by another one of the same engine and
// listener, once.
func TestAsync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		a, ln := startMem(t, WithAsync(), withNumbered(), WithHandler("slow", g))
		elsewhere := newMemListener()
		served := make(chan error, 1)
		go func() { served <- a.Serve(elsewhere) }()
		slow := string(appendMessage(nil, NewMessage("slow")))

		gone := asEngine(t, ln, "one")
		sibling := asEngine(t, ln, "one")
		cold := asEngine(t, ln, "") // has no part in it
		others := []*haproxy{asEngine(t, ln, "two"), asEngine(t, elsewhere, "one"), cold}
		plain := ln.dial(t) // did not offer it
		plain.helloAs(hello{versions: "2.0", frameSize: 16380, engineID: "one"})
		others = append(others, plain)

		gone.wantAnswers() // on its own connection
		for id := range uint64(10) {
			gone.send(rawFrame(frameNotify, flagFIN, id, id, slow))
		}
		g.wait(t, 10)
		gone.nc.Close()
		synctest.Wait()
		close(g.open)
		seen := make(map[uint64]bool)
		for range 10 {
			f := sibling.want(frameAck)
			if f.stream != f.id || f.id > 9 || seen[f.id] || string(f.payload) != string(numberedActions(f.id)) {
				t.Errorf("want each of the ten once, have %s", inWordsFrame(f))
			}
			seen[f.id] = true
		}
		for _, h := range append(others, sibling) {
			h.wantNothing()
			h.wantAnswers()
		}
	})
}

// Without a sibling the answer is dropped, and that is logged once a second at
// most.
func TestAsyncNobodyLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		lines := new(logLines)
		_, ln := startMem(t, WithAsync(), WithHandler("number", g), WithLogger(lines))
		other := asEngine(t, ln, "two")
		gone := asEngine(t, ln, "one")
		sibling := asEngine(t, ln, "one")
		for id := range uint64(10) {
			gone.send(notifyFrame(id, id))
		}
		g.wait(t, 10)
		gone.nc.Close()
		synctest.Wait()
		sibling.nc.Close()
		synctest.Wait()
		close(g.open)
		other.wantNothing()
		if have := lines.with("level=warn", "answers dropped", "engine=one"); len(have) != 1 {
			t.Errorf("want one line, have %q", have)
		}
	})
}

// An ACK leaves by a sibling that has agreed to its size.
func TestAsyncSizes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		_, ln := startMem(t, WithAsync(), WithHandlerFunc("number", func(ctx context.Context, m *Message, a *Actions) error {
			a.SetVar(ScopeSess, "v", String(strings.Repeat("x", 1000)))
			return g.ServeSPOE(ctx, m, new(Actions))
		}))
		gone := asEngine(t, ln, "engine")
		small := ln.dial(t)
		small.helloAs(hello{versions: "2.0", frameSize: 256, capabilities: "async", engineID: "engine"})
		sibling := asEngine(t, ln, "engine")
		for id := range uint64(10) {
			gone.send(notifyFrame(id, id))
		}
		g.wait(t, 10)
		gone.nc.Close()
		synctest.Wait()
		close(g.open)
		for range 10 {
			sibling.want(frameAck)
		}
		small.wantNothing()
	})
}

// A connection that has not agreed on async has no siblings.
func TestAsyncNotAgreed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := newGate(), newGate()
		_, ln := startMem(t, withNumbered(), WithAsync(), WithHandler("first", first), WithHandler("second", second))
		sibling := asEngine(t, ln, "engine")
		gone := ln.raw(t)
		rawHelloAs(t, gone, hello{versions: "2.0", frameSize: 16380, capabilities: "pipelining", engineID: "engine"})
		for _, name := range []string{"first", "second"} {
			if _, err := io.WriteString(gone, notifyOf(1, 1, NewMessage(name))); err != nil {
				t.Fatal(err)
			}
		}
		first.wait(t, 1)
		second.wait(t, 1)
		close(first.open) // its ACK is being written
		synctest.Wait()
		gone.Close()
		synctest.Wait()
		close(second.open)
		sibling.wantNothing()
		sibling.wantAnswers()
	})
}

// Nothing but ACKs leaves by a sibling.
func TestAsyncForwardsNoHello(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t, WithAsync(), withNumbered())
		sibling := asEngine(t, ln, "engine")
		nc := ln.raw(t)
		if _, err := io.WriteString(nc, helloFrame(offered)); err != nil {
			t.Fatal(err)
		}
		nc.Close()
		sibling.wantNothing()
		sibling.wantAnswers()
		if want, have := 1, len(a.Conns()); want != have {
			t.Errorf("want %d connection, have %d", want, have)
		}
	})
}

// A peer sends no more and does not read either: the ACKs that it has not read
// leave by a sibling, and nothing is left of its connection.
func TestAsyncUnread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := newGate(), newGate()
		a, ln := startMem(t, WithAsync(), WithHandler("first", first), WithHandler("second", second))
		in, _ := ln.dialHalves(t)
		var gone *conn
		a.mu.Lock()
		for gone = range a.conns {
		}
		a.mu.Unlock()
		sibling := asEngine(t, ln, offered.engineID)
		for id, name := range []string{"first", "second"} {
			if _, err := io.WriteString(in, rawFrame(frameNotify, flagFIN, uint64(id), 7, string(appendMessage(nil, NewMessage(name))))); err != nil {
				t.Fatal(err)
			}
		}
		first.wait(t, 1)
		second.wait(t, 1)
		close(first.open) // its ACK is being written
		synctest.Wait()
		close(second.open) // its ACK is behind that
		sibling.wantNothing()
		in.Close()
		sibling.wantAcks(0, 1)
		sibling.wantNothing()
		if gone.ctx.Err() == nil {
			t.Error("want the context of the connection to have ended")
		}
	})
}

// The NOTIFYs that had been read when the peer went, but had to wait for room,
// are answered by a sibling too.
func TestAsyncNotBegun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gates := make(map[string]*gate)
		opts := []Option{WithAsync(), WithPipelining(2)}
		frames := ""
		for i, name := range []string{"a", "b", "c", "d", "e"} {
			gates[name] = newGate()
			opts = append(opts, WithHandler(name, gates[name]))
			frames += rawFrame(frameNotify, flagFIN, uint64(i), 7, string(appendMessage(nil, NewMessage(name))))
		}
		_, ln := startMem(t, opts...)
		in, out := ln.dialHalves(t)
		sibling := asEngine(t, ln, offered.engineID)
		if _, err := io.WriteString(in, frames); err != nil {
			t.Fatal(err)
		}
		gates["a"].wait(t, 1)
		gates["b"].wait(t, 1)
		close(gates["a"].open) // its ACK is being written
		sibling.wantNothing()
		out.Close()
		for _, name := range []string{"c", "d", "e"} {
			gates[name].wait(t, 1)
		}
		for _, name := range []string{"b", "c", "d", "e"} {
			close(gates[name].open)
		}
		sibling.wantAcks(0, 1, 2, 3, 4)
	})
}

// No ACK of a sibling's comes before the AGENT-HELLO.
func TestAsyncHelloFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		hellos, resume := make(chan struct{}), make(chan struct{})
		_, ln := startMem(t, WithAsync(), WithHandler("number", g), WithDebug(true), WithLogger(log.LoggerFunc(func(kv ...any) error {
			if strings.Contains(fmt.Sprint(kv...), "AGENT-HELLO") {
				hellos <- struct{}{}
				<-resume
			}
			return nil
		})))
		gone, sibling := ln.dial(t), ln.dial(t)
		gone.send(helloFrame(offered))
		<-hellos
		resume <- struct{}{}
		gone.want(frameAgentHello)
		gone.send(notifyFrame(1, 1))
		g.wait(t, 1)
		gone.nc.Close()
		synctest.Wait()
		sibling.send(helloFrame(offered))
		<-hellos
		close(g.open)
		synctest.Wait()
		resume <- struct{}{}
		sibling.want(frameAgentHello)
	})
}

// breaksAfter is a connection that breaks when it has written so many bytes.
type breaksAfter struct {
	net.Conn
	left *atomic.Int64 // negative: any number
}

func (c breaksAfter) Write(b []byte) (int, error) {
	left := c.left.Load()
	if left < 0 || int64(len(b)) <= left {
		return c.Conn.Write(b)
	}
	n, _ := c.Conn.Write(b[:left])
	return n, errors.New("broken")
}

// Of an ACK that was written in part, nothing leaves by a sibling: the peer may
// have read it. What follows it does.
func TestAsyncPartlySent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, ln := startMem(t, WithAsync(), withNumbered())
		client, server := net.Pipe()
		left := new(atomic.Int64)
		left.Store(-1)
		ln.offer(t, breaksAfter{server, left})
		gone := newHAProxy(t, client)
		gone.hello()
		sibling := asEngine(t, ln, offered.engineID)
		size := int64(len(rawFrame(frameAck, flagFIN, 1, 1, string(numberedActions(1)))))
		left.Store(size + size/2)
		gone.send(notifyFrame(1, 1), notifyFrame(2, 1), notifyFrame(3, 1)) // answered in one Write
		gone.wantAck(1, 1)
		gone.untilGone()
		sibling.wantAcks(3)
		sibling.wantNothing()
	})
}
