package spoa

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-kit/log/level"
	"github.com/spoa-go/spoa/internal/outbox"
	"github.com/spoa-go/spoa/internal/pace"
)

// heap returns the bytes that are in use.
func heap() int64 {
	for range 3 { // a sync.Pool lives longer than one
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// greetWide returns a connection after the HELLOs, with the largest frames that
// the agent agrees to.
func (l *memListener) greetWide(t testing.TB) *haproxy {
	t.Helper()
	h := l.dial(t)
	h.helloAs(hello{versions: "2.0", frameSize: 1 << 20, capabilities: "pipelining", engineID: "engine"})
	return h
}

// tiny returns a NOTIFY of about that many bytes that consists of as many
// arguments, or messages, as fit.
func tiny(size int, arguments bool) string {
	message := "\x01m\x00"
	if arguments {
		message = "\x01m\xff" + strings.Repeat("\x00\x00", 255)
	}
	return rawFrame(frameNotify, flagFIN, 1, 1, strings.Repeat(message, size/len(message)))
}

// A NOTIFY in flight costs about twice its bytes in memory, whatever it consists
// of, and gives them back.
func TestInFlightMemory(t *testing.T) {
	const conns, size = 10, 60000
	for _, arguments := range []bool{true, false} {
		t.Run(fmt.Sprintf("arguments %v", arguments), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGate()
				_, ln := startMem(t, WithWorkers(10000), WithFallback(HandlerFunc(func(ctx context.Context, m *Message, a *Actions) error {
					select {
					case <-g.open:
					default:
						return g.ServeSPOE(ctx, m, new(Actions))
					}
					return nil
				})))
				var hs []*haproxy
				for range conns {
					hs = append(hs, ln.greetWide(t))
				}
				wire := tiny(size, arguments)
				before := heap()
				// More are sent than the agent has room for.
				const each = 20
				var sent sync.WaitGroup
				for _, h := range hs {
					sent.Go(func() {
						for range each {
							h.send(wire)
						}
					})
				}
				time.Sleep(time.Second)
				synctest.Wait()
				inFlight := int64(len(g.entered)) * size
				if least := int64(conns * outbox.MaxInFlight / 2); inFlight < least {
					t.Errorf("want at least %d bytes in flight, have %d", least, inFlight)
				}
				// The buffer that each connection is read into comes on top.
				most := 2*inFlight + conns*3*maxBuffer
				if have := heap() - before; have > most {
					t.Errorf("%d bytes in flight: want at most %d in memory, have %d", inFlight, most, have)
				}
				close(g.open)
				for _, h := range hs {
					for range each {
						h.want(frameAck)
					}
				}
				sent.Wait()
				time.Sleep(3 * shrinkIn)
				synctest.Wait()
				if have := heap() - before; have > conns*16<<10 {
					t.Errorf("idle again: want at most %d bytes in memory, have %d", conns*16<<10, have)
				}
			})
		})
	}
}

// A connection that is never idle keeps no more than the frame that it reads
// once.
func TestBusyMemory(t *testing.T) {
	const conns, size = 100, 60000
	synctest.Test(t, func(t *testing.T) {
		_, ln := startMem(t, withNumbered())
		before := heap()
		var hs []*haproxy
		for range conns {
			h := ln.greetWide(t)
			hs = append(hs, h)
			h.send(tiny(size, true))
			h.want(frameAck)
		}
		for range 5 {
			time.Sleep(shrinkIn * 8 / 10)
			for _, h := range hs {
				h.wantAnswers()
			}
		}
		if have, most := (heap()-before)/conns, int64(2*maxBuffer+maxBuffer/2); have > most {
			t.Errorf("want at most %d bytes a connection, have %d", most, have)
		}
	})
}

// The bytes of the NOTIFYs in flight are bounded for each connection and for
// all, though each connection may have one, and are given back.
func TestInFlightBytes(t *testing.T) {
	const size, each = 60000, outbox.MaxInFlight/60000 + 2
	wire := notifySized(size)
	for _, tt := range []struct{ conns, calls int }{
		{1, outbox.MaxInFlight/size + 1},
		{10, 10 * (outbox.MaxInFlight/size + 1)},
		{100, outbox.MaxAllInFlight/size + 100},
	} {
		t.Run(fmt.Sprint(tt.conns), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				open := make(chan struct{})
				var calls atomic.Int64
				_, ln := startMem(t, WithWorkers(10000), WithHandlerFunc("number", func(context.Context, *Message, *Actions) error {
					calls.Add(1)
					<-open
					return nil
				}))
				var hs []*haproxy
				for range tt.conns {
					hs = append(hs, ln.greetWide(t))
				}
				for range 2 {
					for _, h := range hs {
						go h.send(slices.Repeat([]string{wire}, each)...)
					}
					time.Sleep(time.Second)
					synctest.Wait()
					if have := int(calls.Swap(0)); have > tt.calls || have < tt.calls*8/10 {
						t.Errorf("want about %d calls, no more, have %d", tt.calls, have)
					}
					close(open)
					for _, h := range hs {
						for range each {
							h.want(frameAck)
						}
					}
					synctest.Wait()
					calls.Store(0)
					open = make(chan struct{})
				}
			})
		})
	}
}

// gatedWrites is a connection whose writes wait, all but that of the HELLO.
type gatedWrites struct {
	net.Conn
	writes, largest atomic.Int64
	open            chan struct{}
}

func (c *gatedWrites) Write(b []byte) (int, error) {
	c.largest.Store(max(c.largest.Load(), int64(len(b))))
	if c.writes.Add(1) > 1 {
		<-c.open
	}
	return c.Conn.Write(b)
}

// The bytes that are not sent yet are bounded, whatever frames they consist of
// and whether the reader or workers answer.
func TestUnsentBytes(t *testing.T) {
	const value = 10000
	for _, tt := range []struct {
		name   string
		spread int // NOTIFYs that go to workers
		wire   string
		beyond int64 // outbox.MaxUnsent
	}{
		{"inline", 0, notifyOf(2, 2, NewMessage("long")), batchSize + value + 100},
		{"workers", 1 << 30, notifyOf(2, 2, NewMessage("long")), 33 * (value + 100)},
		{"refused", 0, rawFrame(frameNotify, 0, 2, 2, strings.Repeat("x", 301)), batchSize + 100},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGate()
				a, ln := startMem(t, WithHandler("wait", g), WithFragmentation(300), WithWriteTimeout(time.Hour),
					WithHandlerFunc("long", func(_ context.Context, _ *Message, a *Actions) error {
						a.SetVar(ScopeSess, "v", String(strings.Repeat("x", value)))
						return nil
					}))
				client, server := net.Pipe()
				nc := &gatedWrites{Conn: server, open: make(chan struct{})}
				ln.offer(t, nc)
				h := newHAProxy(t, client)
				h.hello()
				// A worker is writing, so that others only add to what is unsent.
				h.send(notifyOf(1, 1, waiting("x")))
				time.Sleep(5 * pace.StallAfter)
				close(g.open)
				synctest.Wait()
				only(t, a).pace.Spread(tt.spread)
				go h.try(strings.Repeat(tt.wire, 10000))
				time.Sleep(time.Second)
				synctest.Wait()
				close(nc.open) // all that is unsent leaves in one Write
				synctest.Wait()
				if have, most := nc.largest.Load(), outbox.MaxUnsent+tt.beyond; have > most || have < outbox.MaxUnsent {
					t.Errorf("want %d to %d bytes unsent, have %d", outbox.MaxUnsent, most, have)
				}
				a.Close()
				h.untilGone()
			})
		})
	}
}

// The answers that a drain holds back are bounded too.
func TestHeldBytes(t *testing.T) {
	const value = 10000
	synctest.Test(t, func(t *testing.T) {
		var calls atomic.Int64
		a, ln := startMem(t, WithHandlerFunc("long", func(_ context.Context, _ *Message, a *Actions) error {
			calls.Add(1)
			a.SetVar(ScopeSess, "v", String(strings.Repeat("x", value)))
			return nil
		}))
		h := ln.greet(t)
		takeOver(t, a, ln)
		time.Sleep(2 * tick)
		go h.try(strings.Repeat(notifyOf(2, 2, NewMessage("long")), 1000))
		time.Sleep(10 * tick)
		if have, most := calls.Load()*value, int64(outbox.MaxUnsent+batchSize+value); have > most {
			t.Errorf("want at most %d bytes held back, have %d", most, have)
		}
		h.untilGone()
	})
}

// A connection beyond WithMaxConns is told so and closed, until another has
// ended; those that come at the same time are closed at once.
func TestMaxConns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lines := new(logLines)
		hooks, closed := hooked()
		a, ln := startMem(t, withNumbered(), WithMaxConns(3), WithLogger(lines), hooks)
		var hs []*haproxy
		for range 3 {
			hs = append(hs, ln.greet(t))
		}
		for range 5 {
			ln.dial(t).wantEnd(StatusNoResources)
			synctest.Wait()
		}
		mute := ln.raw(t) // does not read
		start := time.Now()
		ln.dial(t).wantEOF()
		wantTook(t, "closing while another is being told", start, 0, 0)
		if _, err := mute.Read(nil); err != nil {
			t.Errorf("want the first still there, have %v", err)
		}
		time.Sleep(refuseFor)
		synctest.Wait()
		ln.dial(t).wantEnd(StatusNoResources)
		if want, have := 3, len(a.Conns()); want != have {
			t.Errorf("want %d connections, have %d", want, have)
		}
		for _, h := range hs {
			h.wantAnswers()
		}
		if have := lines.with("level=warn", "too many", "max=3"); len(have) != 1 {
			t.Errorf("want one line, have %q", have)
		}
		if len(closed) > 0 {
			t.Error("want no ConnClosed of a connection that was never opened")
		}
		hs[0].nc.Close()
		synctest.Wait()
		ln.greet(t).wantAnswers()
	})
}

func TestMaxConnsTCP(t *testing.T) {
	a, dial := startTCP(t, withNumbered(), WithMaxConns(1))
	h := newHAProxy(t, dial())
	h.hello()
	second := newHAProxy(t, dial())
	second.try(helloFrame(offered))
	second.wantEnd(StatusNoResources)
	h.wantAnswers()
	h.nc.Close()
	eventually(t, "no connection", func() bool { return len(a.Conns()) == 0 })
	h = newHAProxy(t, dial())
	h.hello()
	h.wantAnswers()
}

// slowCloses is a connection that takes its time to close, as one of TLS does
// whose peer does not read.
type slowCloses struct {
	net.Conn
	took time.Duration
}

func (c slowCloses) Close() error {
	time.Sleep(c.took)
	return c.Conn.Close()
}

// offerSlow returns a connection that the agent takes 3 s to close.
func (l *memListener) offerSlow(t testing.TB) net.Conn {
	t.Helper()
	client, server := net.Pipe()
	t.Cleanup(func() { client.Close() })
	l.offer(t, slowCloses{server, 3 * time.Second})
	return client
}

// Close does not wait for connections that take long to close.
func TestSlowClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, ln := startMem(t, withNumbered())
		for range 20 {
			rawHello(t, ln.offerSlow(t))
		}
		start := time.Now()
		a.Close()
		wantTook(t, "Close", start, 0, 0)
		time.Sleep(time.Minute)
	})
}

// Peers that do not read, and whose connections take long to close, delay
// neither Conns nor the handler timeout of other connections.
func TestSlowCloseOfOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = 50 * time.Millisecond
		g := newGate()
		a, ln := startMem(t, WithHandler("wait", g), WithWriteTimeout(time.Second), WithHandlerTimeout(limit), faultText(ScopeTxn, "fault"))
		healthy := ln.greet(t)
		for range 10 {
			nc := ln.offerSlow(t)
			rawHello(t, nc)
			if _, err := io.WriteString(nc, notifyOf(1, 1, waiting("x"))); err != nil {
				t.Fatal(err)
			}
		}
		for range 100 {
			start := time.Now()
			if have := len(a.Conns()); have < 1 {
				t.Errorf("want the healthy connection, have %d", have)
			}
			healthy.send(notifyOf(1, 1, waiting("x")))
			healthy.wantActions(1, 1, sets("fault", "timeout"))
			wantTook(t, "a look and an answer", start, limit, limit+2*tick)
		}
		time.Sleep(10 * time.Second)
		if want, have := 1, len(a.Conns()); want != have {
			t.Errorf("want the others closed, have %d connections", have)
		}
		close(g.open)
	})
}

// The lines that peers can cause in the log are bounded, and so is their length.
func TestLogBounded(t *testing.T) {
	long := strings.Repeat("x", 16000)
	failing := HandlerFunc(func(ctx context.Context, m *Message, _ *Actions) error {
		if strings.HasPrefix(m.Name(), "slow") {
			<-ctx.Done()
		}
		return errors.New("no")
	})
	for _, tt := range []struct {
		name string
		opts []Option
		say  func(h *haproxy, i int)
		most int // lines
	}{
		{"invented status codes", nil, func(h *haproxy, i int) {
			h.hello()
			h.send(string(appendDisconnect(nil, frameHAProxyDisconnect, Status(1000+i), long)))
			h.untilGone()
		}, 2},
		{"long engine-ids", nil, func(h *haproxy, i int) {
			h.helloAs(hello{versions: "2.0", frameSize: 1 << 20, engineID: fmt.Sprint(i) + long[1000:]})
			h.send("GET / HTTP/1.1\r\n\r\n")
			h.untilGone()
		}, 2},
		{"long versions", nil, func(h *haproxy, i int) {
			h.send(helloFrame(hello{versions: long[1000:], frameSize: 16380}))
			h.untilGone()
		}, 2},
		{"invented messages that fail", []Option{WithFallback(failing)}, func(h *haproxy, i int) {
			h.hello()
			for n := range uint64(10) {
				h.send(notifyOf(1, n, NewMessage(fmt.Sprintf("invented-%d-%d-%s", i, n, long[:200]))))
				h.want(frameAck)
			}
			h.nc.Close()
		}, 2},
		{"invented messages that are slow", []Option{WithFallback(failing)}, func(h *haproxy, i int) {
			h.hello()
			var msgs []*Message
			for n := range 100 {
				msgs = append(msgs, NewMessage(fmt.Sprintf("slow-%d-%d", i, n)))
			}
			h.send(notifyOf(1, 1, msgs...))
			time.Sleep(slowWarn + 5*tick)
			h.nc.Close()
		}, 3},
		{"invented messages", nil, func(h *haproxy, i int) {
			h.hello()
			var msgs []*Message
			for n := range 50 {
				msgs = append(msgs, NewMessage(fmt.Sprintf("invented-%d-%d-%s", i, n, long[:200])))
			}
			h.send(notifyOf(1, 1, msgs...))
			h.want(frameAck)
			h.nc.Close()
		}, maxUnknown},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				lines := new(logLines)
				_, ln := startMem(t, append(tt.opts, WithLogger(level.NewFilter(lines, level.AllowInfo())))...)
				var peers sync.WaitGroup
				for i := range 200 {
					h := ln.dial(t)
					peers.Go(func() { tt.say(h, i) })
				}
				peers.Wait()
				time.Sleep(time.Millisecond)
				have := lines.with("")
				if len(have) == 0 || len(have) > tt.most {
					t.Errorf("want 1 to %d lines, have %d", tt.most, len(have))
				}
				for _, line := range have {
					if most := 2000; len(line) > most {
						t.Errorf("want lines of at most %d bytes, have %d: %.200s", most, len(line), line)
					}
				}
			})
		})
	}
}

// A peer that does not read while TLS is agreed on is not waited for longer than
// one that says nothing.
func TestHandshakeNotRead(t *testing.T) {
	config := selfSigned(t)
	synctest.Test(t, func(t *testing.T) {
		hooks, closed := hooked()
		_, ln := startMem(t, hooks, WithHelloTimeout(3*time.Second), WithWriteTimeout(3*time.Second))
		client, server := net.Pipe()
		ln.offer(t, tls.Server(server, config))
		start := time.Now()
		// The client's HELLO is read, but not what the agent answers.
		done := make(chan struct{})
		defer close(done)
		go tls.Client(writeOnly{client, done}, &tls.Config{InsecureSkipVerify: true}).Handshake()
		if err := receive(t, "the end", closed); err == nil {
			t.Error("want an error, have none")
		}
		wantTook(t, "the end", start, 3*time.Second, 4*time.Second)
	})
}

// writeOnly is a connection that is not read.
type writeOnly struct {
	net.Conn
	done chan struct{}
}

func (c writeOnly) Read([]byte) (int, error) {
	<-c.done
	return 0, io.EOF
}

// selfSigned returns the configuration of a TLS server.
func selfSigned(t testing.TB) *tls.Config {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{cert}, PrivateKey: key}}}
}
