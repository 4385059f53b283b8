package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"github.com/spoa-go/spoa"
	"github.com/spoa-go/spoa/cmd/internal/settings"
)

const benchUsage = `Usage: spop bench [-addr A] [-conns N] [-inflight K] [-duration D] [flags] MESSAGE [NAME=]TYPE:VALUE...

Sends MESSAGE over and over and measures the answers. On a terminal it shows how
it goes, elsewhere it prints a line a second, both on standard error. Ctrl-C ends
it early, with the summary.

  -addr A       the agent: host:port or unix:/path (default 127.0.0.1:12345)
  -conns N      connections, 1 to 65536 (default 1)
  -inflight K   NOTIFYs in flight on each, 1 to 1024 (default 20, as HAProxy);
                1 with an agent that does not announce pipelining
  -duration D   how long (default 10s, without an end if -count is given)
  -count N      end after so many NOTIFYs
  -warmup D     send for this long before what counts (default 0; not with -count)
  -p99 D        fail if 1 % of the answers take longer
  -rate R       send R a second, however fast the answers are. The latency counts
                from when a NOTIFY was due, so that an agent that stalls is not
                spared those that it kept from being sent. Without -rate, each
                answer is followed by the next NOTIFY: as fast as it goes
  -expect VAR   count an answer that does not set VAR, such as sess.ip_score, as
                wrong
  -timeout T    for connecting, and for the last answers (default 5s)
  -json         print the summary as one line of JSON, latencies in µs
` + tlsUsage + `
` + argsUsage + `
A connection that ends is an error for each NOTIFY in flight, and is replaced.
An answer that breaks the protocol is wrong, and ends its connection.

Exit status: 0 every NOTIFY was answered well, and in time with -p99, 1 not,
2 usage.
`

const (
	maxConns    = 1 << 16     // more than a machine has ports for
	maxInflight = 1024        // the Client's own limit
	maxLatency  = time.Minute // longer ones count as that
	maxErrors   = 16          // kinds that are told apart
	redialPause = 10 * time.Millisecond
	resolution  = 3 // significant digits of a latency
)

// load is one run.
type load struct {
	*common
	message  *spoa.Message
	conns    int
	inflight int
	rate     float64
	p99      time.Duration // 0: any will do
	warmup   time.Duration
	warm     time.Duration // how long the warm-up took
	expect   variable
	count    int64
	left     atomic.Int64 // of count
	start    time.Time
	lanes    []*lane
	hello    spoa.AgentHello

	// What the ticker has gathered from the lanes.
	total, tick *hdrhistogram.Histogram
	last        time.Duration
	sum         counts
}

// counts is what was not answered well.
type counts struct {
	wrong, unsent int64
	errors        int64
	kinds         map[string]int64 // of wrong and errors
}

// lane is one connection at a time, and what was measured on it.
type lane struct {
	*load
	index int
	ctx   context.Context // nothing is sent after it

	mu sync.Mutex
	counts
	latency *hdrhistogram.Histogram
	last    time.Duration // when the latest answer came
}

// slot is one NOTIFY in flight.
type slot struct {
	*lane
	client *spoa.Client
	due    time.Duration // when it was sent, or should have been
	done   func([]spoa.Action, error)
	idle   chan<- *slot
}

func newHistogram() *hdrhistogram.Histogram {
	return hdrhistogram.New(1, int64(maxLatency), resolution)
}

func bench(ctx context.Context, args []string) error {
	l := &load{common: newCommon(), conns: 1, inflight: 20, total: newHistogram(), tick: newHistogram()}
	l.Var(settings.Number(&l.conns, 1, maxConns, "a number of connections"), "conns", "")
	l.Var(settings.Number(&l.inflight, 1, maxInflight, "a number of NOTIFYs"), "inflight", "")
	l.Float64Var(&l.rate, "rate", 0, "")
	l.Int64Var(&l.count, "count", 0, "")
	l.Var(&l.expect, "expect", "")
	l.Var(settings.Period(&l.p99), "p99", "")
	l.Var(settings.Period(&l.warmup), "warmup", "")
	var duration time.Duration
	l.Var(settings.Period(&duration), "duration", "")
	if err := l.parse(args, benchUsage); err != nil {
		return err
	}
	switch {
	case !(l.rate >= 0 && l.rate <= 1e9):
		return misuse("-rate %v: want a number of NOTIFYs a second", l.rate)
	case l.count < 0:
		return misuse("-count %d: want a number of NOTIFYs", l.count)
	case l.warmup > 0 && l.count > 0:
		return misuse("-warmup and -count: want one of them")
	}
	if duration == 0 && l.count == 0 {
		duration = 10 * time.Second
	}
	var err error
	if l.message, err = parseMessage(l.Args()); err != nil {
		return err
	}
	return l.run(ctx, duration)
}

func (l *load) run(ctx context.Context, duration time.Duration) error {
	debug.SetGCPercent(400) // the agent is to be the bottleneck
	clients := make([]*spoa.Client, 0, l.conns)
	for range l.conns {
		c, err := l.dial(ctx)
		if err != nil {
			for _, c := range clients {
				_ = c.Close()
			}
			return err
		}
		clients = append(clients, c)
	}
	l.hello = clients[0].Hello()
	if l.inflight > 1 && !slices.Contains(l.hello.Capabilities, "pipelining") {
		l.inflight = 1
		fmt.Fprintln(os.Stderr, "spop bench: the agent does not announce pipelining: -inflight 1")
	}
	if duration > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, l.warmup+duration)
		defer cancel()
	}
	l.left.Store(l.count)
	l.start = time.Now()
	var running sync.WaitGroup
	for i, c := range clients {
		ln := &lane{load: l, index: i, ctx: ctx, latency: newHistogram()}
		l.lanes = append(l.lanes, ln)
		running.Go(func() { ln.run(c) })
	}
	ended := make(chan struct{})
	go func() {
		running.Wait()
		close(ended)
	}()
	took := l.watch(ctx, ended)
	return l.summary(took)
}

// watch shows how it goes until the end, and returns how long sending took.
func (l *load) watch(ctx context.Context, ended <-chan struct{}) (took time.Duration) {
	p := newProgress()
	defer p.end()
	every := time.NewTicker(time.Second)
	defer every.Stop()
	over := ctx.Done()
	last := time.Duration(0)
	var warm <-chan time.Time
	if l.warmup > 0 {
		t := time.NewTimer(l.warmup)
		defer t.Stop()
		warm = t.C
	}
	for {
		select {
		case <-ended:
			l.gather()
			if over != nil { // what was to be sent was sent before its time
				took = l.last - l.warm
			}
			return took
		case <-warm:
			l.gather()
			l.total.Reset()
			l.sum = counts{}
			l.warm = time.Since(l.start)
		case <-over:
			took, over = time.Since(l.start)-l.warm, nil
		case <-every.C:
			l.gather()
			now := time.Since(l.start)
			rate := float64(l.tick.TotalCount()) / (now - last).Seconds()
			p.line(fmt.Sprintf("%3.0fs", now.Seconds()), fmt.Sprintf("%9.0f/s", rate),
				fmt.Sprintf("p50 %v", quantile(l.tick, 50)), fmt.Sprintf("p99 %v", quantile(l.tick, 99)), fmt.Sprintf("max %v", short(l.tick.Max())),
				fmt.Sprintf("wrong %d", l.sum.wrong), fmt.Sprintf("errors %d", l.sum.errors))
			last = now
		}
	}
}

// gather takes what the lanes have measured since the last time.
func (l *load) gather() {
	l.tick.Reset()
	for _, ln := range l.lanes {
		ln.mu.Lock()
		l.tick.Merge(ln.latency)
		ln.latency.Reset()
		l.sum.add(ln.counts)
		l.last = max(l.last, ln.last)
		ln.counts = counts{}
		ln.mu.Unlock()
	}
	l.total.Merge(l.tick)
}

func (c *counts) add(d counts) {
	c.wrong += d.wrong
	c.unsent += d.unsent
	c.errors += d.errors
	for k, n := range d.kinds {
		c.kind(k, n)
	}
}

func (c *counts) kind(k string, n int64) {
	if c.kinds == nil {
		c.kinds = make(map[string]int64)
	}
	if _, ok := c.kinds[k]; !ok && len(c.kinds) == maxErrors {
		k = "others"
	}
	c.kinds[k] += n
}

// run keeps the lane going, with a new connection when one ends.
func (ln *lane) run(c *spoa.Client) {
	slots := make(chan *slot, ln.inflight)
	for range ln.inflight {
		s := &slot{lane: ln, idle: slots}
		s.done = s.answered
		slots <- s
	}
	next := int64(ln.index) // the lane's NOTIFYs of the schedule: index, index+conns, ...
	for {
		if ln.rate > 0 {
			next = ln.sendAtRate(c, slots, next)
		} else {
			for range ln.inflight {
				if s := <-slots; !s.again(c, time.Since(ln.start)) {
					slots <- s
				}
			}
		}
		ln.settle(c, slots)
		_ = c.Close()
		for c = nil; c == nil; {
			if sleep(ln.ctx, redialPause); ln.over() {
				ln.unsentFrom(next)
				return
			}
			var err error
			if c, err = ln.dial(ln.ctx); err != nil && ln.ctx.Err() == nil {
				ln.failed(err)
			}
		}
	}
}

// over reports whether nothing more is to be sent.
func (ln *lane) over() bool {
	return ln.ctx.Err() != nil || ln.count > 0 && ln.left.Load() <= 0
}

// take reports whether one more NOTIFY may be sent, and counts it.
func (ln *lane) take() bool {
	return ln.ctx.Err() == nil && (ln.count == 0 || ln.left.Add(-1) >= 0)
}

// settle waits until all slots are idle: the connection has ended, or what is
// to be sent has been sent and answered. It leaves the slots idle.
func (ln *lane) settle(c *spoa.Client, slots chan *slot) {
	over := ln.ctx.Done()
	var late <-chan time.Time
	all := make([]*slot, 0, ln.inflight)
	for len(all) < ln.inflight {
		select {
		case s := <-slots:
			all = append(all, s)
		case <-over:
			over, late = nil, time.After(ln.timeout)
		case <-late:
			go c.Close() // the rest fails
		}
	}
	for _, s := range all {
		slots <- s
	}
}

// sendAtRate sends the NOTIFYs of the schedule from the lane's next one on, until
// it is over or the connection ends, and returns the next one then.
func (ln *lane) sendAtRate(c *spoa.Client, slots chan *slot, next int64) int64 {
	for {
		due := time.Duration(float64(next) / ln.rate * float64(time.Second))
		sleep(ln.ctx, due-time.Since(ln.start))
		var s *slot
		select {
		case s = <-slots:
		case <-ln.ctx.Done():
		}
		if s == nil {
			return next
		}
		if !ln.take() {
			slots <- s
			return next
		}
		s.due, s.client = due, c
		next += int64(ln.conns)
		if err := c.Start(s.done, ln.message); err != nil {
			ln.failed(err)
			slots <- s
			return next
		}
	}
}

// unsentFrom counts the NOTIFYs of the schedule, from the lane's next one on,
// that were due when sending ended.
func (ln *lane) unsentFrom(next int64) {
	end := time.Now()
	if d, ok := ln.ctx.Deadline(); ok && d.Before(end) {
		end = d
	}
	due := int64(end.Sub(ln.start).Seconds() * ln.rate)
	if ln.count > 0 {
		due = min(due, ln.count)
	}
	if due > next {
		ln.mu.Lock()
		ln.unsent += (due - next) / int64(ln.conns)
		ln.mu.Unlock()
	}
}

// again sends the next NOTIFY now, if one is to be sent.
func (s *slot) again(c *spoa.Client, now time.Duration) bool {
	if !s.take() {
		return false
	}
	s.due, s.client = now, c
	err := c.Start(s.done, s.message)
	if err != nil {
		s.failed(err)
	}
	return err == nil
}

// answered is called by the client with the answer.
func (s *slot) answered(actions []spoa.Action, err error) {
	now := time.Since(s.start)
	if err != nil {
		s.failed(err)
		s.idle <- s // the connection has ended, or is about to
		return
	}
	wrong := s.expect.name != "" && !slices.ContainsFunc(actions, func(a spoa.Action) bool {
		return !a.Unset && a.Scope == s.expect.scope && a.Name == s.expect.name
	})
	s.mu.Lock()
	s.last = now
	_ = s.latency.RecordValue(int64(min(max(now-s.due, 0), maxLatency)))
	if wrong {
		s.wrong++
		s.kind("answer without "+s.expect.String(), 1)
	}
	s.mu.Unlock()
	if s.rate > 0 || !s.again(s.client, now) {
		s.idle <- s
	}
}

// failed counts a NOTIFY that was not answered, or a connection that was not
// made.
func (ln *lane) failed(err error) {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	d, ok := errors.AsType[*spoa.DisconnectError](err)
	switch {
	case ok && !d.Remote && d.Status == spoa.StatusNormal: // it was settle that closed
		ln.errors++
		ln.kind(fmt.Sprintf("no answer within %v", ln.timeout), 1)
	case ok && !d.Remote && d.Status != spoa.StatusIO:
		ln.wrong++
		ln.kind(err.Error(), 1)
	default:
		ln.errors++
		ln.kind(err.Error(), 1)
	}
}

func sleep(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
