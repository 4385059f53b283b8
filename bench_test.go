package spoa

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/go-kit/log"
)

// serveFloor answers NOTIFYs with empty ACKs and does nothing else: what an
// agent in Go can't do without. All that has come is answered by one write.
func serveFloor(l net.Listener) {
	for {
		nc, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer nc.Close()
			buf, out := make([]byte, maxBuffer), make([]byte, 0, maxBuffer)
			w := 0
			for {
				n, err := nc.Read(buf[w:])
				if err != nil {
					return
				}
				w += n
				r := 0
				for w-r >= lengthSize {
					end := r + lengthSize + int(binary.BigEndian.Uint32(buf[r:]))
					if end > w {
						break
					}
					var f frame
					f.parse(buf[r+lengthSize : end])
					if f.kind == frameHAProxyHello {
						out = appendHello(out, frameAgentHello, &hello{versions: version, frameSize: 16380, capabilities: "pipelining"})
					} else {
						out = appendAck(out, flagFIN, f.ids, nil)
					}
					r = end
				}
				w = copy(buf, buf[r:w])
				if len(out) > 0 {
					nc.Write(out)
					out = out[:0]
				}
			}
		}()
	}
}

// load keeps NOTIFYs in flight on connections to one agent.
type load struct {
	conns    []net.Conn
	readers  []*bufio.Reader
	inFlight int
	batch    []byte // of the NOTIFYs in flight
}

func newLoad(b *testing.B, l net.Listener, conns, inFlight int) *load {
	ld := &load{inFlight: inFlight}
	for i := range inFlight {
		ld.batch = append(ld.batch, notifyOf(uint64(1000+i), 1, ipMessage)...)
	}
	for range conns {
		nc, err := net.Dial(l.Addr().Network(), l.Addr().String())
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { nc.Close() })
		nc.Write(appendHello(nil, frameHAProxyHello, &hello{versions: version, frameSize: 16380, capabilities: "pipelining"}))
		r := bufio.NewReaderSize(nc, 16<<10)
		if f, err := frameFrom(r); err != nil || f.kind != frameAgentHello {
			b.Fatalf("want AGENT-HELLO, have a frame of type %d, error %v", f.kind, err)
		}
		ld.conns, ld.readers = append(ld.conns, nc), append(ld.readers, r)
	}
	return ld
}

// run has rounds batches answered on every connection, and says how long that
// took. As HAProxy does, it sends what may be in flight, and more as answers
// come: half of it is enough to write again.
func (ld *load) run(b *testing.B, rounds int) time.Duration {
	began := time.Now()
	var wg sync.WaitGroup
	size := len(ld.batch) / ld.inFlight
	for i, nc := range ld.conns {
		wg.Go(func() {
			r := ld.readers[i]
			if _, err := nc.Write(ld.batch); err != nil {
				b.Error(err)
				return
			}
			toSend, owed := (rounds-1)*ld.inFlight, 0
			for range rounds * ld.inFlight {
				head, err := r.Peek(lengthSize)
				if err == nil {
					_, err = r.Discard(lengthSize + int(binary.BigEndian.Uint32(head)))
				}
				if err != nil {
					b.Error(err)
					return
				}
				owed++
				if n := min(owed, toSend); n > 0 && (2*owed >= ld.inFlight || r.Buffered() == 0) && r.Buffered() < lengthSize {
					if _, err := nc.Write(ld.batch[:n*size]); err != nil {
						b.Error(err)
						return
					}
					toSend -= n
					owed -= n
				}
			}
		})
	}
	wg.Wait()
	return time.Since(began)
}

// BenchmarkAgent is the time per NOTIFY over a network. Chunks of the agent and
// of the floor take turns, so that both see the same machine; x-floor is how
// many times as long the agent takes.
func BenchmarkAgent(b *testing.B) {
	for _, network := range []string{"tcp", "unix"} {
		for _, conns := range []int{1, 8, 64} {
			for _, inFlight := range []int{1, 20} {
				b.Run(fmt.Sprintf("%s/%dx%d", network, conns, inFlight), func(b *testing.B) {
					address := "127.0.0.1:0"
					if network == "unix" {
						address = filepath.Join(b.TempDir(), "spoa")
					}
					listen := func(suffix string) net.Listener {
						l, err := net.Listen(network, address+suffix)
						if err != nil {
							b.Fatal(err)
						}
						return l
					}
					fl := listen("")
					defer fl.Close()
					go serveFloor(fl)
					if network == "unix" {
						address += "-agent"
					}
					al := listen("")
					startAgent(b, al, WithHandlerFunc("check-client-ip", ipScore))
					agent, floor := newLoad(b, al, conns, inFlight), newLoad(b, fl, conns, inFlight)
					const chunk = 4000 // NOTIFYs
					rounds := max(1, chunk/conns/inFlight)
					perChunk := rounds * conns * inFlight
					agent.run(b, rounds)
					floor.run(b, rounds)
					var ours, theirs time.Duration
					n := 0
					for n < b.N {
						ours += agent.run(b, rounds)
						theirs += floor.run(b, rounds)
						n += perChunk
					}
					b.ReportMetric(float64(ours.Nanoseconds())/float64(n), "ns/op")
					b.ReportMetric(float64(ours)/float64(theirs), "x-floor")
					b.ReportMetric(float64(n)/ours.Seconds(), "NOTIFY/s")
				})
			}
		}
	}
}

// BenchmarkCut is the time per connection of many that are cut off at once, each
// with an answer that another one of its engine has to send. Those of one engine
// and as many of several take turns; x-engines is how many times as long the
// former take.
func BenchmarkCut(b *testing.B) {
	const conns, engines = 8000, 16
	var one, several time.Duration
	for range b.N {
		one += cutOff(b, conns, 1)
		several += cutOff(b, conns, engines)
	}
	b.ReportMetric(float64(one.Nanoseconds())/float64(b.N*conns), "ns/conn")
	b.ReportMetric(float64(one)/float64(several), "x-engines")
}

// cutOff cuts off connections, spread over the engines, and returns how long it
// takes until their answers have come on the one that each engine has left.
func cutOff(b *testing.B, conns, engines int) time.Duration {
	g := newGate()
	hook, closed := hooked()
	ln := newMemListener()
	a := New(WithLogger(log.NewNopLogger()), WithAsync(), WithHandler("number", g), WithWorkers(conns), hook)
	go a.Serve(ln)
	defer a.Close()
	open := func(engine int) net.Conn {
		nc := ln.raw(b)
		offer := offered
		offer.engineID = strconv.Itoa(engine)
		rawHelloAs(b, nc, offer)
		return nc
	}
	var last, cut []net.Conn
	for i := range engines {
		last = append(last, open(i))
	}
	for i := range conns {
		nc := open(i % engines)
		if _, err := io.WriteString(nc, notifyFrame(uint64(i), 1)); err != nil {
			b.Fatal(err)
		}
		cut = append(cut, nc)
	}
	g.wait(b, conns)
	runtime.GC() // of what was before
	began := time.Now()
	for _, nc := range cut {
		nc.Close()
	}
	for range cut {
		receive(b, "the end of a connection", closed)
	}
	close(g.open)
	for i := range conns {
		if f, err := frameFrom(last[i%engines]); err != nil || f.kind != frameAck {
			b.Fatalf("want ACK, have a frame of type %d, error %v", f.kind, err)
		}
	}
	return time.Since(began)
}
