package spoa

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// crowd is thousands of busy connections. One more is never quiet, so that no
// round of a drain succeeds.
type crowd struct {
	now     atomic.Pointer[period]
	clients sync.WaitGroup
}

const (
	crowdSize  = 3000
	crowdEvery = 500 * time.Millisecond // each sends a NOTIFY
)

// period is what the crowd, and the agent's ends of its connections, have seen in
// some time.
type period struct {
	answers atomic.Int64
	worst   atomic.Int64 // time that an answer took, a time.Duration
	calls   atomic.Int64 // of the agent's net.Conns
}

func newCrowd(t testing.TB, ln *memListener) *crowd {
	c := new(crowd)
	c.begin()
	for i := range crowdSize {
		client, server := net.Pipe()
		ln.offer(t, watchedConn{server, &c.now})
		rawHello(t, client)
		c.clients.Go(func() { asks(client, crowdEvery*time.Duration(i)/crowdSize, crowdEvery, c.answered) })
	}
	restless := ln.raw(t)
	rawHello(t, restless)
	c.clients.Go(func() { asks(restless, 0, 5*time.Millisecond, func(time.Duration) {}) })
	time.Sleep(crowdEvery) // all have begun
	return c
}

// begin begins a period.
func (c *crowd) begin() *period {
	p := new(period)
	c.now.Store(p)
	return p
}

func (c *crowd) answered(took time.Duration) {
	p := c.now.Load()
	p.answers.Add(1)
	for {
		worst := p.worst.Load()
		if int64(took) <= worst || p.worst.CompareAndSwap(worst, int64(took)) {
			return
		}
	}
}

// asks sends a NOTIFY at such intervals until the agent ends the connection.
func asks(nc net.Conn, first, every time.Duration, answered func(took time.Duration)) {
	defer nc.Close()
	acks := make(chan struct{})
	go func() {
		defer close(acks)
		eachFrame(nc, func(f frame) {
			if f.kind == frameAck {
				acks <- struct{}{}
			}
		})
	}()
	time.Sleep(first)
	for id := uint64(1); ; id++ {
		start := time.Now()
		if _, err := io.WriteString(nc, notifyFrame(1, id)); err != nil {
			return
		}
		if _, ok := <-acks; !ok {
			return
		}
		took := time.Since(start)
		answered(took)
		time.Sleep(every - took)
	}
}

// watchedConn counts the calls that a system would be called for.
type watchedConn struct {
	net.Conn
	now *atomic.Pointer[period]
}

func (c watchedConn) Read(b []byte) (int, error) {
	c.now.Load().calls.Add(1)
	return c.Conn.Read(b)
}

func (c watchedConn) Write(b []byte) (int, error) {
	c.now.Load().calls.Add(1)
	return c.Conn.Write(b)
}

func (c watchedConn) SetReadDeadline(at time.Time) error {
	c.now.Load().calls.Add(1)
	return c.Conn.SetReadDeadline(at)
}

func (c watchedConn) SetWriteDeadline(at time.Time) error {
	c.now.Load().calls.Add(1)
	return c.Conn.SetWriteDeadline(at)
}

// A drain of thousands of busy connections keeps no answer for longer than it may
// be held back, calls about as often as before for each, and ends the connections
// few at a time.
func TestDrainScale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const lasts = 2 * crowdEvery
		a, ln := startMem(t, withNumbered())
		c := newCrowd(t, ln)
		before := c.begin()
		time.Sleep(lasts)
		calls := before.calls.Load()
		takeOver(t, a, ln)
		during := c.begin()
		time.Sleep(lasts)
		answers, left := during.answers.Load(), len(a.Conns())
		a.Close()
		c.clients.Wait()

		if worst := time.Duration(during.worst.Load()); worst > held {
			t.Errorf("want each answer within %v, have one after %v", held, worst)
		}
		// Each that is left has asked twice, some of them a moment ago.
		if least := int64(2*(left-1) - 1 - int(crowdSize*held/crowdEvery)); answers < least {
			t.Errorf("want %d answers or more, have %d", least, answers)
		}
		if have := during.calls.Load(); have > 2*calls {
			t.Errorf("want up to %d calls of the connections, twice as many as before the drain, have %d", 2*calls, have)
		}
		if left < crowdSize/2 {
			t.Errorf("want at least half of the connections left, have %d", left)
		}
	})
}
