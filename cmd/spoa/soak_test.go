//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spoa-go/spoa"
)

// holdings are what a process holds.
type holdings struct {
	heap                    uint64
	goroutines, descriptors int
}

// used returns the least of some looks, since what has ended takes a moment to be gone.
func used(t *testing.T) (least holdings) {
	t.Helper()
	pause := time.NewTicker(50 * time.Millisecond)
	defer pause.Stop()
	for i := range 40 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal("needs /proc: ", err)
		}
		now := holdings{m.HeapAlloc, runtime.NumGoroutine(), len(fds)}
		if i == 0 {
			least = now
		}
		least = holdings{min(least.heap, now.heap), min(least.goroutines, now.goroutines), min(least.descriptors, now.descriptors)}
		<-pause.C
	}
	return least
}

func (u holdings) String() string {
	return fmt.Sprintf("heap %d kB, %d goroutines, %d descriptors", u.heap>>10, u.goroutines, u.descriptors)
}

// Hours of what happens to an agent: load, slow and failing handlers, restarts, reloads of HAProxy, connections that
// break. Nothing may grow. SPOA_TEST_SOAK says how long, such as 10m.
func TestSoak(t *testing.T) {
	long, err := time.ParseDuration(os.Getenv("SPOA_TEST_SOAK"))
	if err != nil {
		t.Skip("takes long: set SPOA_TEST_SOAK=10m")
	}
	bins, err := haproxyBins()
	if err != nil || len(bins) == 0 {
		t.Fatalf("no haproxy: %v", err)
	}
	var handled atomic.Int64
	serve := func(addr string) (end func()) {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		agent := spoa.New(spoa.WithAsync(), spoa.WithFragmentation(1<<16), spoa.WithHandlerTimeout(200*time.Millisecond), spoa.WithWorkers(64),
			faultText(),
			spoa.WithHandlerFunc("check-client-ip", func(ctx context.Context, m *spoa.Message, a *spoa.Actions) error {
				handled.Add(1)
				switch rand.N(1000) {
				case 0:
					panic("now and then")
				case 1:
					return errors.New("now and then")
				case 2:
					<-ctx.Done()
				case 3, 4, 5, 6, 7, 8, 9:
					t := time.NewTimer(rand.N(50 * time.Millisecond))
					defer t.Stop()
					<-t.C
				}
				a.SetVar(spoa.ScopeSess, "ip_score", spoa.Uint32(20+rand.Uint32N(81)))
				return nil
			}))
		served := make(chan error, 1)
		go func() { served <- agent.Serve(l) }()
		return func() {
			ctx, cancel := context.WithTimeout(context.Background(), 4*time.Second)
			defer cancel()
			agent.Shutdown(ctx)
			if err := <-served; !errors.Is(err, spoa.ErrAgentClosed) {
				t.Errorf("Serve: %v", err)
			}
		}
	}

	type site struct {
		h      *haproxy
		l      *load
		agents [2]string
		end    [2]func()
		relay  *relay
	}
	var sites []*site
	for _, bin := range bins {
		s := &site{agents: [2]string{freeAddr(t, "127.0.0.1"), freeAddr(t, "127.0.0.1")}}
		for i, addr := range s.agents {
			s.end[i] = serve(addr)
		}
		// The way to the second one breaks now and then.
		s.relay = startRelay(t, s.agents[1], func() int { return 50 + rand.N(5000) })
		s.relay.forget = true
		s.h = startHAProxy(t, bin, setup{
			agent: s.agents[0], cfg: twoAgents(s.relay.addr), master: true, mayLose: true,
			spoe: []string{"processing 10s", "processing 1s"},
		})
		s.l = startLoad(t, s.h.url, 4)
		sites = append(sites, s)
	}

	begin, next := time.Now(), 1
	var first, last holdings
	for time.Since(begin) < long {
		for _, s := range sites {
			s.l.more(t, 100)
			i := rand.N(2)
			switch rand.N(4) {
			case 0:
				s.h.reload(t)
			case 1, 2:
				s.end[i]()
				s.end[i] = serve(s.agents[i])
			}
		}
		if time.Since(begin) < long/10*time.Duration(next) {
			continue
		}
		next++
		last = used(t)
		if first == (holdings{}) {
			first = last
		}
		t.Logf("%v: %v; %d handled", time.Since(begin).Round(time.Second), last, handled.Load())
	}
	for _, s := range sites {
		got := s.l.stop()
		got.checkAnswered(t)
		t.Logf("%d requests, %d without a score; SPOE log, by status: %v", got.requests, got.missing, s.h.spoeLog.counts())
	}
	last = used(t)
	t.Logf("after the first tenth: %v", first)
	t.Logf("at the end: %v", last)
	if last.heap > first.heap+first.heap/2+4<<20 || last.goroutines > first.goroutines+100 || last.descriptors > first.descriptors+100 {
		t.Error("something grows")
	}
	for _, s := range sites {
		for _, end := range s.end {
			end()
		}
	}
}
