package spoa

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spoa-go/spoa/internal/pace"
)

// The call that is tried inline after a run of spread ones is judged by its own
// time, not by the time that the reader waited for the others.
func TestPaceAfterSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		a, ln := startMem(t, WithPipelining(1), WithHandler("wait", g), WithHandlerFunc("echo", echo))
		h := ln.greet(t)
		c := only(t, a)
		c.pace.Batch(1, time.Second, false)
		c.pace.Spread(2)
		h.send(notifyOf(1, 1, waiting("a")), notifyOf(1, 2, waiting("b")), notifyOf(1, 3, echoed("c")))
		for _, s := range []string{"a", "b"} {
			<-g.entered
			time.Sleep(time.Second)
			close(g.of(s))
		}
		h.wantActions(1, 1, sets("wait", "a"))
		h.wantActions(1, 2, sets("wait", "b"))
		h.wantActions(1, 3, sets("echo", "c"))
		synctest.Wait()
		if !c.pace.Inline() || c.pace.Slow() {
			t.Errorf("want the next calls inline, have %+v", c.pace)
		}
	})
}

// A slow handler stays inline while no NOTIFY waits behind it: to spread it would
// only cost more.
func TestPaceAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t, WithHandlerFunc("number", func(ctx context.Context, m *Message, a *Actions) error {
			time.Sleep(3 * pace.SlowCall)
			return numbered(ctx, m, a)
		}))
		h := ln.greet(t)
		for range 10 {
			h.wantAnswers()
		}
		synctest.Wait()
		if c := only(t, a); !c.pace.Inline() {
			t.Errorf("want the next calls inline, have %+v", c.pace)
		}
	})
}

// order is a handler that notes the order of the calls.
type order struct {
	mu   sync.Mutex
	took time.Duration
	list []string
}

func (o *order) ServeSPOE(_ context.Context, m *Message, _ *Actions) error {
	o.mu.Lock()
	o.list = append(o.list, m.Arg(0).Value.String())
	o.mu.Unlock()
	time.Sleep(o.took)
	return nil
}

// A flood on one connection delays another one by no more than the call that
// runs and one that may be first in the ring.
func TestWorkersFair(t *testing.T) {
	for _, took := range []time.Duration{
		pace.StallAfter / 4, // all of a batch inline
		4 * pace.StallAfter, // all but the first spread
	} {
		o := &order{took: took}
		synctest.Test(t, func(t *testing.T) {
			_, ln := startMem(t, WithWorkers(1), WithHandler("order", o))
			flood, other := ln.greet(t), ln.greet(t)
			ordered := func(s string) *Message { return NewMessage("order", Arg{"", String(s)}) }
			var frames []string
			for id := range uint64(20) {
				frames = append(frames, notifyOf(1, id, ordered("flood")))
			}
			flood.send(frames...)
			synctest.Wait() // the first has begun
			other.send(notifyOf(1, 1, ordered("other")), notifyOf(1, 2, ordered("other")))
			other.wantActions(1, 1, "")
			other.wantActions(1, 2, "")
			o.mu.Lock()
			first := slices.Index(o.list, "other")
			second := first + 1 + slices.Index(o.list[first+1:], "other")
			if first > 2 || second > first+2 {
				t.Errorf("handlers of %v: want the other connection's turn early, have %q", took, o.list)
			}
			o.mu.Unlock()
			for range frames {
				flood.want(frameAck)
			}
		})
	}
}

// The NOTIFYs that are left in the buffer of a closed connection are not handled.
func TestWorkersClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		a, ln := startMem(t, WithPipelining(2), WithHandler("wait", g))
		h := ln.greet(t)
		only(t, a).pace.Spread(100)
		var frames []string
		for id := range uint64(50) {
			frames = append(frames, notifyOf(1, id, waiting("x")))
		}
		h.send(frames...)
		synctest.Wait()
		a.Close()
		synctest.Wait()
		close(g.of("x"))
		synctest.Wait()
		if want, have := 2, len(g.entered); want != have {
			t.Errorf("want %d calls, have %d", want, have)
		}
	})
}

// An idle connection gives back every buffer that a burst has made it grow,
// however the burst was answered.
func TestIdleShrinks(t *testing.T) {
	large := func(_ context.Context, m *Message, a *Actions) error {
		v, _ := m.Lookup("s")
		a.SetVar(ScopeTxn, "x", v)
		return nil
	}
	opts := []Option{WithHandlerFunc("large", large), WithFragmentation(60000)}
	everyplace(t, opts, func(t *testing.T, a *Agent, h *haproxy, _ *gate) {
		c := only(t, a)
		args := []Arg{{"s", String(strings.Repeat("x", 3000))}}
		for i := range 200 {
			args = append(args, Arg{"n" + strconv.Itoa(i), Int64(1)})
		}
		body := string(appendMessage(nil, NewMessage("large", append(args, args[0])...)))
		go func() {
			for id := range uint64(20) {
				h.send(notifyOf(1, id, NewMessage("place"), NewMessage("large", args...)))
				h.send(fragments(2, id, body, 3000)...)
			}
		}()
		for range 40 {
			h.want(frameAck)
		}
		half := notifyOf(3, 3, echoed("x"))
		h.send(half[:5]) // also if it waits for the rest of a frame
		time.Sleep(3 * shrinkIn)
		synctest.Wait()
		rd := c.rd
		for name, have := range map[string]int{
			"read":      cap(rd.buf) - minBuffer,
			"answers":   cap(rd.out),
			"fragments": cap(c.fragments.buf),
			"job":       cap(rd.job.buf) + cap(rd.job.actions.buf) + cap(rd.job.payload) + cap(rd.job.current.args),
		} {
			if have > 0 {
				t.Errorf("want nothing kept of what was grown, have %d of %s", have, name)
			}
		}
		h.send(half[5:])
		h.wantActions(3, 3, "")
	})
}

// Every one of very many NOTIFYs is answered once and by its own answer,
// wherever its handlers ran, and frames never mix.
func TestWorkersFlood(t *testing.T) {
	for _, tt := range []struct {
		name  string
		count int
		opts  []Option
	}{
		{"many workers", 100_000, []Option{WithWorkers(64)}},
		{"few workers", 20_000, []Option{WithWorkers(3)}},
		{"timeout", 20_000, []Option{WithWorkers(8), WithHandlerTimeout(2 * time.Millisecond)}},
		{"narrow window, hooks", 20_000, []Option{WithPipelining(4), WithHooks(Hooks{Handled: func(string, time.Duration, error) {}})}},
	} {
		const conns = 16
		perConn := tt.count / conns
		if testing.Short() {
			perConn = tt.count / conns / 20
		}
		t.Run(tt.name, func(t *testing.T) {
			var atOnce, most atomic.Int64
			flood := func(ctx context.Context, m *Message, a *Actions) error {
				defer atOnce.Add(-1)
				for n := atOnce.Add(1); ; {
					if old := most.Load(); n <= old || most.CompareAndSwap(old, n) {
						break
					}
				}
				v := m.Arg(0).Value
				if want, have := fmt.Sprintf("%d:%d.", m.StreamID(), m.FrameID()), string(v.Bytes()); !strings.HasPrefix(have, want) {
					t.Errorf("want an argument of %s, have %.20s", want, have)
				}
				a.SetVar(ScopeTxn, "half", v)
				err := floodWork(ctx, m.FrameID())
				a.SetVar(ScopeTxn, "whole", v)
				return err
			}
			a, dial := startTCP(t, append(tt.opts, faultText(ScopeTxn, "fault"), WithHandlerFunc("flood", flood))...)
			var clients sync.WaitGroup
			for range conns {
				nc := dial()
				rawHello(t, nc)
				clients.Go(func() { floodConn(t, nc, perConn, a.handlerTimeout > 0) })
			}
			clients.Wait()
			eventually(t, "permits to be given back", func() bool { return a.workers.permits.Load() == int64(a.options.workers) })
			if most, n := most.Load(), int64(a.options.workers); most > n {
				t.Errorf("want at most %d handlers at once, have had %d", n, most)
			}
		})
	}
}

// floodWork is what a handler does for a NOTIFY of that id, and floodFault how
// it is to end, beside "timeout" and "overload".
func floodWork(ctx context.Context, id uint64) error {
	switch r := rand.IntN(1000); {
	case r < 10:
		time.Sleep(time.Duration(rand.IntN(3000)) * time.Microsecond)
	case r < 13:
		<-time.After(2 * pace.StallAfter)
	case r < 14 && ctx.Done() != nil:
		ctx.Err()
	case r < 100:
		runtime.Gosched()
	case r < 200:
		for began := time.Now(); time.Since(began) < 50*time.Microsecond; {
		}
	}
	switch floodFault(id) {
	case "error":
		if id%2 == 0 {
			runtime.Goexit()
		}
		return errors.New("flood")
	case "panic":
		panic("flood")
	}
	return nil
}

func floodFault(id uint64) string {
	switch id % 301 {
	case 100, 101:
		return "error"
	case 200:
		return "panic"
	}
	return ""
}

// floodConn sends that many NOTIFYs, up to 40 in flight, and checks the answers.
// Late reports whether "timeout" and "overload" are expected.
func floodConn(t *testing.T, nc net.Conn, count int, late bool) {
	const inFlight = 40
	var mu sync.Mutex
	sent := make(map[uint64]string)
	tokens := make(chan struct{}, inFlight)
	var sender sync.WaitGroup
	defer sender.Wait()
	defer nc.Close()
	sender.Go(func() {
		var batch []byte
		for id := range uint64(count) {
			s := fmt.Sprintf("%d:%d.%s", id%7, id, strings.Repeat("x", rand.IntN(100)))
			if rand.IntN(50) == 0 {
				s += strings.Repeat("y", rand.IntN(5000))
			}
			select {
			case tokens <- struct{}{}:
			case <-time.After(longWait):
				t.Errorf("want %d answers, have no more for %v", count, longWait)
				nc.Close()
				return
			}
			mu.Lock()
			sent[id] = s
			mu.Unlock()
			batch = append(batch, notifyOf(id%7, id, NewMessage("flood", Arg{"s", String(s)}))...)
			if len(tokens) < inFlight && rand.IntN(4) > 0 && id != uint64(count)-1 {
				continue
			}
			if _, err := nc.Write(batch); err != nil {
				t.Errorf("after %d: %v", id, err)
				return
			}
			batch = batch[:0]
		}
	})
	r := bufio.NewReader(nc)
	for n := range count {
		f, err := frameFrom(r)
		if err != nil || f.kind != frameAck {
			t.Errorf("answer %d of %d: want an ACK, have a frame of type %d, error %v", n, count, f.kind, err)
			return
		}
		mu.Lock()
		s, ok := sent[f.id]
		delete(sent, f.id)
		mu.Unlock()
		if !ok || f.stream != f.id%7 {
			t.Errorf("want an answer to what was asked and not answered yet, have %d:%d", f.stream, f.id)
			return
		}
		want := sets("half", s) + "," + sets("whole", s)
		if fault := floodFault(f.id); fault != "" {
			want = sets("fault", fault)
		}
		switch have := inActions(f.payload); have {
		case want:
		case sets("fault", "timeout"), sets("fault", "overload"):
			if !late {
				t.Errorf("%d:%d: want %s, have %s", f.stream, f.id, want, have)
			}
		default:
			t.Errorf("%d:%d: want %s, have %s", f.stream, f.id, want, have)
			return
		}
		<-tokens
	}
}

// ipScore answers check-client-ip as the reputation agent does.
func ipScore(_ context.Context, m *Message, a *Actions) error {
	ip, ok := m.Arg(0).Value.Addr()
	if !ok {
		return errors.New("want an address")
	}
	last := ip.As16()[15]
	a.SetVar(ScopeSess, "ip_score", Uint32(uint32(last)))
	return nil
}

// lengths is a handler that looks at every argument.
func lengths(_ context.Context, m *Message, a *Actions) error {
	n := 0
	for name, v := range m.Args() {
		n += len(name) + len(v.Bytes())
	}
	if v, ok := m.Lookup("header-3"); ok {
		a.SetVar(ScopeTxn, "third", v)
	}
	a.SetVar(ScopeTxn, "length", Int64(int64(n)))
	return nil
}

var (
	ipMessage    = NewMessage("check-client-ip", Arg{"ip", Addr(netip.MustParseAddr("192.0.2.42"))})
	eightStrings = func() *Message {
		var args []Arg
		for i := range 8 {
			args = append(args, Arg{"header-" + strconv.Itoa(i), String(strings.Repeat("v", 10*i))})
		}
		return NewMessage("check-request", args...)
	}()
)

// From frame to frame nothing is allocated, wherever handlers run. A handler
// timeout costs one allocation, the context.
func TestWorkersAllocs(t *testing.T) {
	if raceEnabled() {
		t.Skip("a sync.Pool drops things at random under the race detector")
	}
	var handled atomic.Int64
	hooks := WithHooks(Hooks{Handled: func(string, time.Duration, error) { handled.Add(1) }})
	for _, tt := range []struct {
		name string
		opts []Option
		want float64
	}{
		{"plain", nil, 0},
		{"hooks", []Option{hooks}, 0},
		{"stats", []Option{WithStats()}, 0},
		{"bounded", []Option{func(o *options) {
			MaxConcurrent(8)(o, "check-client-ip")
			MaxConcurrent(8)(o, "check-request")
		}}, 0},
		{"timeout", []Option{WithHandlerTimeout(time.Minute), hooks}, 1},
	} {
		for _, msg := range []*Message{ipMessage, eightStrings} {
			for place, left := range map[string]int{"inline": 0, "spread": math.MaxInt} {
				t.Run(tt.name+"/"+msg.Name()+"/"+place, func(t *testing.T) {
					var c *conn
					a, dial := startTCP(t, append(tt.opts, WithHandlerFunc("check-client-ip", ipScore), WithHandlerFunc("check-request", lengths),
						WithHandlerFunc("place", func(context.Context, *Message, *Actions) error {
							c.pace.Spread(left) // by the reader, whose it is
							return nil
						}))...)
					nc := dial()
					rawHello(t, nc)
					c = only(t, a)
					var ack []byte
					ask := func(notify string) func() {
						frame := []byte(notify)
						nc.Write(frame)
						f, err := frameFrom(nc)
						if err != nil {
							t.Fatal(err)
						}
						ack = appendAck(nil, flagFIN, ids(f.stream, f.id), f.payload)
						buf := make([]byte, len(ack))
						return func() {
							if _, err := nc.Write(frame); err != nil {
								t.Fatal(err)
							}
							if _, err := io.ReadFull(nc, buf); err != nil || !bytes.Equal(ack, buf) {
								t.Fatalf("want %x, have %x, error %v", ack, buf, err)
							}
						}
					}
					ask(notifyOf(0, 0, NewMessage("place")))
					once := ask(notifyOf(1000, 1, msg))
					for range 100 {
						once()
					}
					if have := testing.AllocsPerRun(2000, once); have > tt.want {
						t.Errorf("want %v allocations, have %v", tt.want, have)
					}
				})
			}
		}
	}
}

// A connection that was used, also by a burst, and is idle again takes no more
// than 8 KiB besides its goroutine.
func TestIdleMemory(t *testing.T) {
	conns, most := 5000, uint64(8<<10)
	if testing.Short() || raceEnabled() {
		conns = 500
	}
	heap := func() uint64 {
		for range 3 { // a sync.Pool lives longer than one
			runtime.GC()
		}
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	synctest.Test(t, func(t *testing.T) {
		_, ln := startMem(t, WithHandlerFunc("check-client-ip", ipScore), WithHandlerFunc("check-request", lengths))
		greeting := appendHello(nil, frameHAProxyHello, &hello{versions: "2.0", frameSize: 16380, capabilities: "pipelining"})
		burst := []byte(notifyOf(1, 1, ipMessage))
		for id := range uint64(100) {
			burst = append(burst, notifyOf(1, id, eightStrings)...)
		}
		burst = append(burst, notifyOf(9, 9, NewMessage("check-request", Arg{"large", String(strings.Repeat("x", 12<<10))}))...)
		ends := make([][2]net.Conn, conns)
		for i := range ends {
			ends[i][0], ends[i][1] = net.Pipe()
		}
		before := heap()
		for _, e := range ends {
			ln.offer(t, e[1])
			read := func(frames int) {
				r := bufio.NewReader(e[0])
				for range frames {
					if _, err := frameFrom(r); err != nil {
						t.Fatal(err)
					}
				}
			}
			e[0].Write(greeting)
			read(1)
			go e[0].Write(burst)
			read(102)
		}
		time.Sleep(3 * shrinkIn)
		synctest.Wait()
		after := heap()
		have := (after - before) / uint64(conns)
		if have > most {
			t.Errorf("want at most %d bytes, have %d", most, have)
		}
		for _, e := range ends {
			e[0].Close()
		}
	})
}

// Handlers of inline calls, of those handed over and of spread ones together
// are no more than WithWorkers allows, and as many if there is work.
func TestWorkersBound(t *testing.T) {
	for _, n := range []int{1, 2, 5} {
		var now, most atomic.Int64
		gate := new(chan struct{})
		opts := []Option{WithWorkers(n), WithHandlerFunc("hold", func(context.Context, *Message, *Actions) error {
			defer now.Add(-1)
			most.Store(max(most.Load(), now.Add(1)))
			<-*gate
			return nil
		})}
		synctest.Test(t, func(t *testing.T) {
			a, ln := startMem(t, opts...)
			*gate = make(chan struct{})
			var hs []*haproxy
			for range 4 {
				hs = append(hs, ln.greet(t))
			}
			const each = 10
			for _, h := range hs {
				var frames []string
				for id := range uint64(each) {
					frames = append(frames, notifyOf(1, id, NewMessage("hold")))
				}
				h.send(frames...)
			}
			for left := each * len(hs); left > 0; left-- {
				time.Sleep(3 * pace.StallAfter)
				synctest.Wait()
				if want, have := int64(min(n, left)), now.Load(); want != have {
					t.Errorf("want %d handlers at once, have %d", want, have)
				}
				*gate <- struct{}{}
			}
			for _, h := range hs {
				for range each {
					h.want(frameAck)
				}
			}
			synctest.Wait()
			if want, have := int64(n), most.Load(); want != have {
				t.Errorf("want %d handlers at once, have had %d", want, have)
			}
			if want, have := int64(n), a.workers.permits.Load(); want != have {
				t.Errorf("want permits for %d, have %d", want, have)
			}
		})
	}
}

// In an overload, what is answered with a verdict in time stays near what the
// workers can do. In the order of their coming all would soon be late.
func TestOverload(t *testing.T) {
	const (
		workers = 4
		took    = 5 * time.Millisecond
		limit   = 20 * time.Millisecond
		conns   = 10
		lasts   = 2 * time.Second
	)
	capacity := workers * int(lasts/took)
	every := lasts / time.Duration(5*capacity) // NOTIFYs come
	var verdicts, overloads, late atomic.Int64
	opts := []Option{WithWorkers(workers), WithHandlerTimeout(limit), faultText(ScopeTxn, "fault"),
		WithHandlerFunc("sleep", func(_ context.Context, _ *Message, a *Actions) error {
			time.Sleep(took)
			a.SetVar(ScopeTxn, "verdict", Bool(true))
			return nil
		}),
		WithHooks(Hooks{Handled: func(_ string, took time.Duration, err error) {
			if err == ErrOverload {
				overloads.Add(1)
			}
		}})}
	synctest.Test(t, func(t *testing.T) {
		_, ln := startMem(t, opts...)
		var hs []*haproxy
		for range conns {
			hs = append(hs, ln.greet(t))
		}
		began := time.Now()
		due := func(i int) time.Time { return began.Add(time.Duration(i) * every) }
		var both sync.WaitGroup
		for n, h := range hs {
			both.Go(func() {
				for i := n; i < 5*capacity; i += conns {
					time.Sleep(time.Until(due(i)))
					h.send(notifyOf(1, uint64(i), NewMessage("sleep")))
				}
			})
			both.Go(func() {
				for i := n; i < 5*capacity; i += conns {
					f := h.want(frameAck)
					waited, actions := time.Since(due(int(f.id))), inActions(f.payload)
					switch {
					case actions == sets("fault", "timeout"):
						late.Add(1)
					case actions == "set-var txn.verdict bool true" && waited > limit: // before the watch came
						late.Add(1)
					case actions == "set-var txn.verdict bool true":
						verdicts.Add(1)
					case actions != sets("fault", "overload"):
						t.Errorf("have %s after %v", actions, waited)
					}
					if waited > limit+2*tick {
						t.Errorf("want an answer within %v, have it after %v", limit, waited)
					}
				}
			})
		}
		both.Wait()
		time.Sleep(took) // for the last late handlers
		synctest.Wait()

		// The same without a deadline, in the order of their coming.
		free := make([]time.Duration, workers)
		fifo := 0
		for i := range 5 * capacity {
			at := time.Duration(i) * every
			w := slices.Index(free, slices.Min(free))
			free[w] = max(free[w], at) + took
			if free[w]-at <= limit {
				fifo++
			}
		}
		share := func(n int) string { return fmt.Sprintf("%d %%", 100*n/capacity) }
		have := int(verdicts.Load())
		t.Logf("verdicts in time, of what the workers can do: %s; a plain queue: %s; late: %d, overloads: %d",
			share(have), share(fifo), late.Load(), overloads.Load())
		if want := capacity * 8 / 10; have < want {
			t.Errorf("want at least %d verdicts in time, have %d", want, have)
		}
		if want, have := 5*capacity, have+int(overloads.Load()+late.Load()); want != have {
			t.Errorf("want %d answers, have %d", want, have)
		}
	})
}
