package spoa

import (
	"context"
	"math"
	"strings"
	"sync"
	"time"

	"github.com/go-kit/log/level"
	"github.com/spoa-go/spoa/internal/pace"
)

// watchQueue makes the watch look at q, whose handlers are about to run. It is
// short to be inlined.
func (w *workers) watchQueue(q *queue) {
	if !q.watched.Load() {
		w.addWatched(q)
	}
}

// addWatched adds q to the queues that the watch looks at.
func (w *workers) addWatched(q *queue) {
	w.watchMu.Lock()
	if !q.watched.Swap(true) {
		w.watched = append(w.watched, q)
		if !w.watching {
			w.setWatch(w.clock(), lateTick)
		}
	}
	w.watchMu.Unlock()
}

// setWatch makes a reader run watch in a tick, or the timer within that time if no
// reader has. The caller must hold watchMu.
func (w *workers) setWatch(now, within time.Duration) {
	w.watching = true
	w.due.Store(int64(now + tick))
	w.latest = now + within
	if !w.armed || w.latest < w.expires {
		w.arm(within)
	}
}

// arm makes the timer expire at latest, after that time. The caller must hold
// watchMu.
func (w *workers) arm(after time.Duration) {
	w.armed, w.expires = true, w.latest
	w.timer.Reset(after)
}

// expired runs watch, unless latest has been put off since the timer was set.
func (w *workers) expired() {
	w.watchMu.Lock()
	w.armed = false
	rest := w.latest - w.clock()
	due := w.watching && rest <= 0
	if w.watching && !due {
		w.arm(rest)
	}
	w.watchMu.Unlock()
	if due {
		w.watch(false)
	}
}

// watchIfDue calls watch if it is due. A reader that has just read the clock calls
// it, so that the timer is seldom set: to set it wakes a thread, and so does its
// expiry; and while that is near, each wait of a thread costs more. To set it with
// every look would take a tenth of the CPU behind HAProxy. It is short to be inlined.
func (w *workers) watchIfDue(now time.Duration) {
	if now >= time.Duration(w.due.Load()) {
		w.watch(true)
	}
}

const (
	tick       = time.Millisecond
	lateTick   = tick + tick/4 // until the timer expires, if no reader reads
	seldomTick = 4 * tick      // the same while readers see no handler run, and no timeout is set
	farTick    = 50 * tick     // the same while many readers read besides: if one stalls, the next of them looks
	busyQueues = 3             // so many queues are many,
	busyCalls  = 128           // and so many calls inline since the last look
	slowWarn   = time.Second   // a handler that takes longer is warned of
)

// watch looks at the queues whose handlers run: it takes connections away from
// stalled readers, answers what is late, and warns of slow handlers. It runs every
// tick while there are such queues and a reader reads, or when the timer expires.
// ByReader tells which of the two calls it.
//
// It also sets busy when many readers have much to do. Then those whose
// NOTIFYs come several at a time let others run before they read again: meanwhile
// more has been received, mostly, so that neither a read that brings nothing nor
// a wait is needed. That takes a tenth to a fifth off the CPU of a NOTIFY (8 × 20
// in flight), but adds as much where no other goroutine has anything to do.
func (w *workers) watch(byReader bool) {
	now := w.clock()
	w.watchMu.Lock()
	if w.inWatch {
		w.watchMu.Unlock()
		return
	}
	w.inWatch = true
	w.looked, w.watched = w.watched, w.looked[:0]
	w.due.Store(int64(now + tick))
	w.watchMu.Unlock()
	kept := w.looked[:0]
	calls, callers, anyActive := uint64(0), 0, false
	w.shedBounded(now)
	for _, q := range w.looked {
		active, n := q.look(now)
		calls += n
		if n > 0 {
			callers++
		}
		anyActive = anyActive || active
		if active || byReader && n > 0 || q.keepWatching() {
			kept = append(kept, q)
		}
	}
	if callers >= busyQueues {
		w.manyUntil = now + farTick
	}
	if busy := len(w.looked) >= busyQueues && calls >= busyCalls; busy != w.busy.Load() {
		w.busy.Store(busy)
	}
	w.watchMu.Lock()
	w.inWatch = false // with the lock that the next look is set with, or the timer could expire in vain
	w.watched = append(w.watched, kept...)
	clear(w.looked)
	if len(w.watched) == 0 {
		w.watching = false
		w.due.Store(math.MaxInt64)
	} else {
		within := lateTick
		if byReader && !anyActive && !w.anyTimeout() {
			within = seldomTick
			if now < w.manyUntil {
				within = farTick
			}
		}
		w.setWatch(now, within)
	}
	w.watchMu.Unlock()
}

// keepWatching removes q from the watch and reports false, unless a handler was
// started since it was looked at, by a goroutine that still saw watched set.
func (q *queue) keepWatching() bool {
	q.watched.Store(false)
	q.mu.Lock()
	busy := q.running.head != nil || q.waiting.head != nil
	q.mu.Unlock()
	return (busy || q.turn.Load().running()) && q.watched.CompareAndSwap(false, true)
}

// look does the watch's work on one queue. It reports whether handlers run or
// wait to be run, and how many turns the reader has begun since the last look.
func (q *queue) look(now time.Duration) (active bool, calls uint64) {
	q.mu.Lock()
	t := q.turn.Load()
	s := t.seq.Load()
	inline := s&1 == 1
	switch {
	case s != q.seen:
		calls = (s - q.seen + 1) / 2
		q.seen, q.seenAt = s, now
	case !inline:
	case now-q.seenAt >= pace.StallAfter*9/10:
		q.takeOver(t, s)
	}
	var shed []*job
	var slow []string
	late := false
	if q.running.head != nil || q.waiting.head != nil {
		shed = q.shed(now)
		late = q.overdue(now)
		slow = q.slow(now)
	}
	active = inline || q.running.head != nil || q.waiting.head != nil
	q.mu.Unlock()
	if shed != nil || late {
		// In a goroutine of its own, since a peer that does not read blocks it.
		go q.answerShed(shed)
	}
	if slow != nil {
		go q.workers.warnSlow(slow) // a logger may block
	}
	return active, calls
}

// takeOver takes the connection's reading from the turn at s, unless that has
// ended, and leaves it the NOTIFY. The caller must hold mu.
func (q *queue) takeOver(t *turn, s uint64) {
	if !t.seq.CompareAndSwap(s, turnTaken) {
		return
	}
	q.seen = 0
	t.job.size = len(t.job.payload)
	q.box.Begin(t.job.size)
	q.running.push(t.job)
	q.pace.Stalled()
	q.taker.handOver()
}

// overdue answers the running jobs that are late, and reports whether there are
// any. The caller must hold mu.
func (q *queue) overdue(now time.Duration) (late bool) {
	if !q.workers.anyTimeout() {
		return false
	}
	for j := q.running.head; j != nil; j = j.next {
		if j.finished || j.answered || !j.over(now) {
			continue
		}
		j.answered, late = true, true
		f := FaultOverload // its goroutine has not come so far as to call a handler
		if j.ctx != nil {
			f = FaultTimeout
			j.ctx.cancel(context.DeadlineExceeded)
		}
		q.answer(j, j.done, q.workers.faultActions[f])
	}
	return late
}

// slow returns the messages of the running jobs that have just become slow, a
// few of each NOTIFY. The caller must hold mu.
func (q *queue) slow(now time.Duration) (messages []string) {
	for j := q.running.head; j != nil; j = j.next {
		if j.warned || now-j.started < slowWarn {
			continue
		}
		j.warned = true
		n := 0
		for name := range j.names() {
			if n++; n > maxSlow {
				break
			}
			messages = append(messages, name)
		}
	}
	return messages
}

const maxSlow = 4 // messages of a slow NOTIFY that are named

// warnSlow logs that a handler is slow. It cannot know which of the messages it
// is at.
func (w *workers) warnSlow(messages []string) {
	if n, ok := w.limit.Allow("slow"); ok {
		level.Warn(w.logger).Log("msg", "slow handler", "message", clip(strings.Join(messages, ",")), "running", slowWarn, "suppressed", n)
	}
}

// deadline is the context of a NOTIFY under WithHandlerTimeout. It needs no
// timer: the watch ends it, or a look at the clock. It is not
// used again, since a handler may have given it to a goroutine.
type deadline struct {
	context.Context // the connection's
	at              time.Time

	mu   sync.Mutex
	err  error
	done chan struct{} // made by the first call of Done
	stop func() bool   // made with done: ends the wait for the connection's context
}

func (d *deadline) Deadline() (time.Time, bool) { return d.at, true }

func (d *deadline) Done() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.done == nil {
		d.done = make(chan struct{})
		if d.err != nil {
			close(d.done)
		} else {
			d.stop = context.AfterFunc(d.Context, func() { d.cancel(d.Context.Err()) })
		}
	}
	return d.done
}

func (d *deadline) Err() error {
	if err := d.Context.Err(); err != nil {
		d.cancel(err)
	} else if !time.Now().Before(d.at) {
		d.cancel(context.DeadlineExceeded)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

func (d *deadline) cancel(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return
	}
	d.err = err
	if d.done != nil {
		close(d.done)
		d.stop()
	}
}
