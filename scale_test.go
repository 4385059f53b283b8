//go:build unix

package spoa

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// cpu returns the time that the process has used the processor.
func cpu(t testing.TB) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// period is what clients have seen in some time.
type period struct {
	answers atomic.Int64
	worst   atomic.Int64 // time that an answer took, a time.Duration
}

func (p *period) answered(took time.Duration) {
	p.answers.Add(1)
	for {
		worst := p.worst.Load()
		if int64(took) <= worst || p.worst.CompareAndSwap(worst, int64(took)) {
			return
		}
	}
}

// asks sends a NOTIFY at such intervals until the agent ends the connection.
func asks(nc net.Conn, every time.Duration, now *atomic.Pointer[period]) {
	defer nc.Close()
	time.Sleep(rand.N(every))
	for id := uint64(1); ; id++ {
		start := time.Now()
		if _, err := io.WriteString(nc, notifyFrame(1, id)); err != nil {
			return
		}
		if f, err := frameFrom(nc); err != nil || f.kind != frameAck {
			return
		}
		took := time.Since(start)
		now.Load().answered(took)
		time.Sleep(every - took)
	}
}

// A drain of thousands of busy connections costs about as much as serving them
// does, and keeps no answer for longer than it may be held back.
func TestDrainScale(t *testing.T) {
	const attempts = 3 // since other processes may use the machine
	for attempt := 1; ; attempt++ {
		problems := drainScale(t)
		if len(problems) == 0 {
			return
		}
		if attempt == attempts {
			t.Fatalf("want as before the drain, have each time, lastly: %s", strings.Join(problems, "; "))
		}
	}
}

// drainScale drains an agent under load, and returns what was worse than it
// should be. One client is never quiet, so that no round succeeds.
func drainScale(t *testing.T) (problems []string) {
	const conns, every, lasts = 3000, 500 * time.Millisecond, time.Second
	ln := newMemListener()
	a := New(withNumbered())
	served := make(chan error, 1)
	go func() { served <- a.Serve(ln) }()
	var now atomic.Pointer[period]
	now.Store(new(period))
	var clients sync.WaitGroup
	for i := range conns {
		nc := ln.raw(t)
		rawHello(t, nc)
		pause := every
		if i == 0 {
			pause = 5 * time.Millisecond
		}
		clients.Go(func() { asks(nc, pause, &now) })
	}
	time.Sleep(every) // all have begun
	measure := func() (answers int64, worst time.Duration, cores float64) {
		p := new(period)
		now.Store(p)
		used, start := cpu(t), time.Now()
		time.Sleep(lasts)
		cores = float64(cpu(t)-used) / float64(time.Since(start))
		return p.answers.Load(), time.Duration(p.worst.Load()), cores
	}
	answers, worst, cores := measure()
	a.advance(draining)
	ln.Close()
	answersNow, worstNow, coresNow := measure()
	left := len(a.Conns())
	a.Close()
	clients.Wait()
	wantClosed(t, served)

	t.Logf("before: %d answers, worst %v, %.2f cores; in the drain: %d, %v, %.2f", answers, worst, cores, answersNow, worstNow, coresNow)
	if left < conns/2 {
		t.Errorf("want a drain that goes on, have %d connections left", left)
	}
	if most := 2*cores + 0.1; coresNow > most {
		problems = append(problems, fmt.Sprintf("%.2f cores, at most %.2f", coresNow, most))
	}
	if most := held + max(100*time.Millisecond, 5*worst); worstNow > most {
		problems = append(problems, fmt.Sprintf("an answer after %v, at most %v", worstNow, most))
	}
	if least := answers * 7 / 10; answersNow < least {
		problems = append(problems, fmt.Sprintf("%d answers, at least %d", answersNow, least))
	}
	return problems
}
