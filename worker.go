package spoa

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-kit/log/level"
)

// Handler answers one kind of message.
//
// ServeSPOE reads the arguments from m and adds the actions of its answer to a.
// Neither may be used after it has returned: values that stay are copied first.
// It is called by many goroutines at once, for one NOTIFY in the order of its
// messages.
//
// If it returns an error or panics, none of its own actions is sent; the NOTIFY
// is answered all the same. A panic is recovered and logged.
//
// The context is cancelled when the connection has gone or the agent is closed,
// and has a deadline with WithHandlerTimeout. HAProxy doesn't tell when it has
// given up on a request, so whatever may take long should have one.
type Handler interface {
	ServeSPOE(ctx context.Context, m *Message, a *Actions) error
}

// HandlerFunc is a function as a Handler.
type HandlerFunc func(ctx context.Context, m *Message, a *Actions) error

// ServeSPOE calls f.
func (f HandlerFunc) ServeSPOE(ctx context.Context, m *Message, a *Actions) error {
	return f(ctx, m, a)
}

// PanicError is the error of a handler that panicked.
type PanicError struct {
	Value any
	Stack []byte
}

func (e *PanicError) Error() string { return fmt.Sprintf("spoa: handler panicked: %v", e.Value) }

// Unwrap returns the value of the panic, if that is an error.
func (e *PanicError) Unwrap() error {
	err, _ := e.Value.(error)
	return err
}

// What Hooks.Handled is told of a message that no handler was called for.
var (
	ErrNoHandler = errors.New("spoa: no handler for this message")
	ErrOverload  = errors.New("spoa: waited too long for its turn")
)

var errGoexit = errors.New("spoa: handler called runtime.Goexit")

// faultKind is what WithFaultVar tells of.
type faultKind uint8

const (
	faultNone faultKind = iota
	faultError
	faultPanic
	faultTimeout
	faultOverload
	faultCount
)

func (f faultKind) String() string {
	return [...]string{"", "error", "panic", "timeout", "overload"}[f]
}

// job is a NOTIFY on its way from frame to ACK. It belongs to the goroutine
// that runs its handlers, or to the queue of its lane; what the watch reads and
// writes too is guarded by the lane's lock.
type job struct {
	notify
	lane    *lane
	ids     []byte // of the frame, as they came
	actions Actions
	fault   faultKind
	buf     []byte        // what ids and the views point to, unless it is the reader's buffer
	arrived time.Duration // since the workers' epoch
	work    func()        // bound once, so that `go j.work()` allocates nothing
	message string        // that handler is of: the guess at who handles the next
	handler Handler

	// Guarded by lane.mu.
	prev, next *job
	ctx        *deadline // with a handler timeout, once handlers run
	started    time.Duration
	done       []byte // the actions of the messages already done
	finished   bool   // all of them are
	answered   bool   // by the watch; what the handlers still do is dropped
	warned     bool   // of being slow
}

const maxPooled = 64 << 10 // bytes of a buffer that is kept for later

// newJob returns a job that answers f. Its payload has yet to be decoded.
func newJob(l *lane) *job {
	j, _ := l.workers.jobs.Get().(*job)
	if j == nil {
		j = new(job)
		j.work = j.run
	}
	j.lane, j.engine = l, l.engine
	return j
}

// run is what a worker does.
func (j *job) run() {
	defer j.lane.complete(j) // deferred: a handler's runtime.Goexit is answered too
	j.lane.workers.handle(j)
}

// begin makes j ready for the NOTIFY of f; ids are f's, or a copy.
func (j *job) begin(f *frame, ids []byte, arrived time.Duration) {
	j.stream, j.id, j.ids = f.stream, f.id, ids
	j.arrived, j.started = arrived, arrived
	j.fault, j.ctx, j.done = faultNone, nil, nil
	j.finished, j.answered, j.warned = false, false, false
	j.actions.buf, j.actions.max = j.actions.buf[:0], j.lane.ackSize-len(ids)
}

func (j *job) recycle() {
	w := j.lane.workers
	j.release()
	if cap(j.buf) > maxPooled {
		j.buf = nil
	}
	if cap(j.actions.buf) > maxPooled {
		j.actions.buf = nil
	}
	j.lane, j.ids, j.ctx, j.done = nil, nil, nil, nil
	w.jobs.Put(j)
}

// jobList is a list of jobs in the order of their coming.
type jobList struct{ head, tail *job }

func (q *jobList) push(j *job) {
	j.prev, j.next = q.tail, nil
	if q.tail != nil {
		q.tail.next = j
	} else {
		q.head = j
	}
	q.tail = j
}

func (q *jobList) remove(j *job) {
	if j.prev != nil {
		j.prev.next = j.next
	} else {
		q.head = j.next
	}
	if j.next != nil {
		j.next.prev = j.prev
	} else {
		q.tail = j.prev
	}
	j.prev, j.next = nil, nil
}

// lane is a connection as the workers see it: its jobs, and how its answers
// leave. The connection's current reader owns what mu does not guard.
type lane struct {
	workers *workers
	ctx     context.Context
	engine  string
	ackSize int // what an ACK may hold besides its ids
	pace    pace
	call    atomic.Pointer[call] // of the current reader
	hot     atomic.Bool          // in workers.hot

	// ack appends an answer to what is to be sent, with mu held; flush sends
	// it, unless somebody else is at it, without.
	ack   func(j *job, actions, fault []byte)
	flush func()

	// handOver has a new goroutine read on from where the reader stands whose
	// handler has stalled. With mu held.
	handOver func()

	mu      sync.Mutex
	moved   sync.Cond // pending has sunk, or the connection is coming to its end
	queued  jobList   // waiting for a worker
	running jobList   // with workers, not with the reader
	pending int       // jobs not answered yet, queued or running
	gone    bool      // nobody is there to read an answer

	tokens int   // in workers.ring; guarded by workers.mu
	after  *lane // likewise

	seen   uint64 // the watch: the call seen last,
	seenAt time.Duration
}

// call is a reader's handler call as the watch sees it. The number is odd while
// a handler runs; who changes it from there owns the connection's reading: the
// reader when the handler returned, the watch when that took too long.
type call struct {
	seq atomic.Uint64
	job *job
}

const callTaken = 1 << 63 // even: the watch leaves it alone

func (c *call) begin() { c.seq.Store(c.seq.Load() + 1) }

func (c *call) running() bool { return c.seq.Load()&1 == 1 }

// end tells whether the connection is still the reader's.
func (c *call) end() bool {
	s := c.seq.Load()
	return s&1 == 1 && c.seq.CompareAndSwap(s, s+1)
}

// pace decides where the handlers of a connection run.
//
// Inline, on the goroutine that reads the connection, a NOTIFY costs no switch
// of goroutines, and all that one read brought is answered by one write: less
// than a microsecond each, where a worker of its own costs 2 to 5. But a handler
// that waits keeps waiting all that is behind it. So:
//
//   - A call that lasts longer than stallAfter loses the connection to another
//     goroutine (see workers.watch); that costs a few microseconds, once, so it
//     may be wrong: the goroutine may just have been preempted.
//   - Two such calls within stallRun calls, or one among a connection's first,
//     or two batches in a row with more than slowCall a call while others
//     waited, and the next spreadRun NOTIFYs go to workers. One alone proves
//     nothing, since wall time counts preemption.
//   - After that one call is tried inline. Is it slow, the next ones are spread
//     again: a slow handler costs its neighbours one call in spreadRun; a false
//     alarm costs about a millisecond of CPU and is over.
//
// slowCall is about ten times what spreading costs a call. stallAfter is what
// a neighbour may notice; a shorter one would need a finer clock than the tick
// of the runtime's timers that it is measured with.
type pace struct {
	left  int  // NOTIFYs still to be spread
	slow  bool // the last batch was
	calls int  // since the last stall
}

const (
	stallAfter = time.Millisecond
	stallRun   = 64
	slowCall   = 30 * time.Microsecond
	spreadRun  = 256
)

// inline tells whether the next NOTIFY is to be handled inline.
func (p *pace) inline() bool {
	if p.left == 0 {
		return true
	}
	p.left--
	return false
}

// batch is told of calls made inline in a row, and whether others waited
// meanwhile.
func (p *pace) batch(calls int, took time.Duration, waited bool) {
	p.calls = min(p.calls+calls, stallRun)
	if took <= time.Duration(calls)*slowCall {
		p.slow = false
		return
	}
	if p.slow && waited {
		p.left = spreadRun
	}
	p.slow = true
}

// stalled is told of a call inline that lost the connection.
func (p *pace) stalled() {
	if p.calls < stallRun {
		p.left = spreadRun
	}
	p.calls = 0
}

// workers runs the handlers of an agent.
type workers struct {
	*options
	epoch time.Time
	limit limiter

	jobs    sync.Pool    // of *job
	free    atomic.Int64 // handlers that may still be begun
	_       [56]byte     // free changes with every batch, waiting is read with every call
	waiting atomic.Int64 // jobs queued, or a little more
	busy    atomic.Bool  // see watch

	mu          sync.Mutex
	first, last *lane // ring of the lanes with jobs queued, next first

	watchMu  sync.Mutex
	hot      []*lane // that have, or had a moment ago, handlers running
	watching bool    // timer is to call watch, or has
	timer    *time.Timer
	looked   []*lane // watch's own
	outward  int     // likewise: ticks since a reader was seen with a handler to run

	unknownMu sync.Mutex
	unknown   map[string]bool // names that nobody handles, warned of
}

func newWorkers(o *options) *workers {
	w := &workers{options: o, epoch: time.Now(), unknown: make(map[string]bool)}
	w.limit.now = w.clock
	w.free.Store(int64(o.workers))
	w.timer = time.AfterFunc(time.Hour, w.watch)
	w.timer.Stop()
	return w
}

// clock is the time since the epoch: monotonic, and half the price of time.Now.
func (w *workers) clock() time.Duration { return time.Since(w.epoch) }

// acquire gets leave to run a handler, unless others wait for it.
func (w *workers) acquire() bool { return w.waiting.Load() == 0 && w.take() }

func (w *workers) take() bool {
	for {
		n := w.free.Load()
		if n <= 0 {
			return false
		}
		if w.free.CompareAndSwap(n, n-1) {
			return true
		}
	}
}

// release gives leave back, and on to who waits for it.
func (w *workers) release() {
	w.free.Add(1)
	w.dispatch()
}

// dispatch starts queued jobs while there is leave. Whoever queues a job or
// gives leave back calls it afterwards, so that one of them sees both.
func (w *workers) dispatch() {
	for w.waiting.Load() > 0 && w.take() {
		if j := w.nextJob(); j != nil {
			go j.work()
		} else {
			w.free.Add(1)
		}
	}
}

// nextJob takes a queued job, from each lane in turn.
func (w *workers) nextJob() *job {
	for {
		w.mu.Lock()
		l := w.first
		if l == nil {
			w.mu.Unlock()
			return nil
		}
		w.waiting.Add(-1)
		w.first, l.after = l.after, nil
		if l.tokens--; l.tokens > 0 {
			w.pushLane(l)
		}
		w.mu.Unlock()
		if j := l.dequeue(); j != nil {
			return j
		}
	}
}

func (w *workers) pushLane(l *lane) {
	if w.first == nil {
		w.first = l
	} else {
		w.last.after = l
	}
	w.last = l
}

// spread gives j, which is decoded, to a worker now or later.
func (w *workers) spread(j *job) {
	l := j.lane
	now := w.acquire()
	l.mu.Lock()
	l.pending++
	if now {
		l.running.push(j)
	} else {
		l.queued.push(j)
	}
	l.mu.Unlock()
	w.heat(l)
	if now {
		go j.work()
		return
	}
	w.mu.Lock()
	if l.tokens++; l.tokens == 1 {
		w.pushLane(l)
	}
	w.waiting.Add(1)
	w.mu.Unlock()
	w.dispatch()
}

// dequeue takes the job to run next. Jobs that have waited for longer than the
// handler timeout are answered instead. When the oldest has waited for half of
// it, the newest is taken: in an overload the oldest would be late anyway, and
// taking them in their order would make every one late.
func (l *lane) dequeue() *job {
	now, limit := l.workers.clock(), l.workers.handlerTimeout
	l.mu.Lock()
	shed := l.shed(now)
	j := l.queued.head
	if j != nil {
		if limit > 0 && now-j.arrived > limit/2 {
			j = l.queued.tail
		}
		l.queued.remove(j)
		l.running.push(j)
		j.started = now
	}
	l.mu.Unlock()
	if shed != nil {
		go l.overloaded(shed)
	}
	return j
}

// shed answers the queued jobs that have waited for too long. With mu held;
// what it returns goes to overloaded without.
func (l *lane) shed(now time.Duration) []*job {
	limit := l.workers.handlerTimeout
	if limit == 0 {
		return nil
	}
	var shed []*job
	for j := l.queued.head; j != nil && now-j.arrived >= limit; j = l.queued.head {
		l.queued.remove(j)
		l.pending--
		l.ack(j, nil, l.workers.faultVars[faultOverload])
		shed = append(shed, j)
	}
	return shed
}

// overloaded sends the answers to shed jobs, and tells of them.
func (l *lane) overloaded(shed []*job) {
	l.flush()
	for _, j := range shed {
		l.workers.overloaded(j)
		j.recycle()
	}
}

// overloaded tells that j's messages were not handled for want of time.
func (w *workers) overloaded(j *job) {
	for j.nextMessage() {
		w.handled(&j.current, 0, ErrOverload)
	}
	if n, ok := w.limit.allow("overload"); ok {
		level.Warn(w.logger).Log("msg", "overload: answered without calling the handler", "suppressed", n)
	}
}

// complete answers a job of the running.
func (l *lane) complete(j *job) {
	w := l.workers
	l.mu.Lock()
	l.running.remove(j)
	late := j.answered
	if !late {
		l.pending--
		l.ack(j, j.actions.buf, w.faultVars[j.fault])
	}
	l.mu.Unlock()
	j.recycle()
	// Sending may block, so not while others wait for the worker.
	w.release()
	if !late {
		l.flush()
	}
}

// handle runs the handlers of j's messages in their order.
func (w *workers) handle(j *job) {
	if w.handlerTimeout > 0 {
		w.handleInTime(j)
		return
	}
	for j.nextMessage() {
		w.message(j.lane.ctx, j)
	}
}

func (w *workers) handleInTime(j *job) {
	ctx := &deadline{Context: j.lane.ctx, at: w.epoch.Add(j.arrived + w.handlerTimeout)}
	defer ctx.cancel(context.Canceled)
	if !j.start(ctx) {
		j.fault = faultOverload
		w.overloaded(j)
		return
	}
	for j.nextMessage() {
		if j.late() {
			w.handled(&j.current, 0, ErrOverload)
			continue
		}
		w.message(ctx, j)
	}
}

// start has the watch cancel ctx when j is late, unless it is already.
func (j *job) start(ctx *deadline) bool {
	w := j.lane.workers
	j.lane.mu.Lock()
	defer j.lane.mu.Unlock()
	if j.answered || w.clock()-j.arrived >= w.handlerTimeout {
		return false
	}
	j.ctx = ctx
	return true
}

// late tells whether j has been answered, since its time is over.
func (j *job) late() bool {
	j.lane.mu.Lock()
	defer j.lane.mu.Unlock()
	return j.answered
}

// commit makes the actions of j's messages up to the current one final: they are
// sent even if a later message is late. It reports whether there was still time.
func (j *job) commit() bool {
	j.lane.mu.Lock()
	defer j.lane.mu.Unlock()
	j.done = j.actions.buf
	j.finished = j.left == 0
	return !j.answered
}

// message runs the handler of j's current message.
func (w *workers) message(ctx context.Context, j *job) {
	m, a := &j.current, &j.actions
	mark := len(a.buf)
	a.err = nil
	if m.name != j.message || j.handler == nil {
		j.message, j.handler = m.name, w.handlers[m.name]
		if j.handler == nil {
			j.handler = w.fallback
		}
	}
	h := j.handler
	if h == nil {
		w.noHandler(m)
		if w.handlerTimeout > 0 {
			j.commit()
		}
		return
	}
	var began time.Duration
	if w.hooks.Handled != nil {
		began = w.clock()
	}
	returned := false
	defer func() {
		if returned {
			return
		}
		err := errGoexit
		if v := recover(); v != nil {
			err = &PanicError{v, debug.Stack()}
		}
		a.buf = a.buf[:mark]
		w.returned(j, began, err)
	}()
	err := h.ServeSPOE(ctx, m, a)
	returned = true
	if err != nil {
		a.buf = a.buf[:mark]
	} else {
		err = a.err
	}
	w.returned(j, began, err)
}

// returned deals with the end of the handler of j's current message.
func (w *workers) returned(j *job, began time.Duration, err error) {
	if w.handlerTimeout > 0 && !j.commit() && err == nil {
		err = context.DeadlineExceeded
	}
	m := &j.current
	if err != nil {
		w.failed(j, m, err)
	}
	if w.hooks.Handled != nil {
		w.handled(m, w.clock()-began, err)
	}
}

func (w *workers) handled(m *Message, took time.Duration, err error) {
	if w.hooks.Handled != nil {
		w.hooks.Handled(m.name, took, err)
	}
}

// failed notes and logs that a handler failed.
func (w *workers) failed(j *job, m *Message, err error) {
	kind := faultError
	var p *PanicError
	if errors.As(err, &p) {
		kind = faultPanic
	} else if errors.Is(err, context.DeadlineExceeded) {
		kind = faultTimeout
	}
	if j.fault == faultNone {
		j.fault = kind
	}
	n, ok := w.limit.allow("handler " + m.name)
	switch {
	case !ok:
	case p != nil:
		level.Error(w.logger).Log("msg", "handler panicked", "message", m.name, "err", err, "suppressed", n, "stack", p.Stack)
	default:
		level.Warn(w.logger).Log("msg", "handler failed", "message", m.name, "err", err, "suppressed", n)
	}
}

const maxUnknown = 100 // names of messages to warn of, since a peer can invent any number

func (w *workers) noHandler(m *Message) {
	w.handled(m, 0, ErrNoHandler)
	w.unknownMu.Lock()
	warn := !w.unknown[m.name] && len(w.unknown) < maxUnknown
	if warn {
		w.unknown[m.name] = true
	}
	w.unknownMu.Unlock()
	if warn {
		level.Warn(w.logger).Log("msg", "no handler for this message", "message", m.name,
			"handled", strings.Join(slices.Sorted(maps.Keys(w.handlers)), ","))
	}
}

// heat has the watch look at l, whose handlers are about to run. It is short to
// be inlined.
func (w *workers) heat(l *lane) {
	if !l.hot.Load() {
		w.addHot(l)
	}
}

func (w *workers) addHot(l *lane) {
	w.watchMu.Lock()
	if !l.hot.Swap(true) {
		w.hot = append(w.hot, l)
		if !w.watching {
			w.watching = true
			w.timer.Reset(tick)
		}
	}
	w.watchMu.Unlock()
}

const (
	tick       = time.Millisecond
	coarseTick = 8 * time.Millisecond
	fineTicks  = 32          // without an inline call, then the tick is coarse
	busyLanes  = 3           // with a call at the last look or since,
	busyCalls  = 32          // and so many of them inline since then
	slowWarn   = time.Second // a handler that takes longer is warned of
)

// watch looks at the lanes whose handlers run: it takes connections away from
// stalled readers, answers what is late, and warns of slow handlers. It runs
// every tick while there are such lanes, and less often while none of their
// readers has a handler to run and nothing can be late.
//
// It also tells readers when they are many and have much to do. Then those whose
// NOTIFYs come several at a time let others run before they read again: meanwhile
// something has come, mostly, so that neither a read that brings nothing nor a
// wait is needed. That takes a tenth to a fifth off the CPU of a NOTIFY (8 × 20
// in flight), but adds as much where nobody else has anything to do.
func (w *workers) watch() {
	now := w.clock()
	w.watchMu.Lock()
	w.looked, w.hot = w.hot, w.looked[:0]
	w.watchMu.Unlock()
	kept := w.looked[:0]
	w.outward++
	calls := uint64(0)
	for _, l := range w.looked {
		inline, busy, n := l.look(now)
		calls += n
		if inline {
			w.outward = 0
		}
		if inline || busy || l.stillHot() {
			kept = append(kept, l)
		}
	}
	if busy := len(w.looked) >= busyLanes && calls >= busyCalls; busy != w.busy.Load() {
		w.busy.Store(busy)
	}
	next := tick
	if w.outward > fineTicks && w.handlerTimeout == 0 {
		next = coarseTick
	}
	w.watchMu.Lock()
	w.hot = append(w.hot, kept...)
	clear(w.looked)
	if w.watching = len(w.hot) > 0; w.watching {
		w.timer.Reset(next)
	}
	w.watchMu.Unlock()
}

// stillHot takes l out of the watch, unless a handler was begun since it was
// looked at, by somebody who still saw it in.
func (l *lane) stillHot() bool {
	l.hot.Store(false)
	l.mu.Lock()
	busy := l.running.head != nil || l.queued.head != nil
	l.mu.Unlock()
	return (busy || l.call.Load().running()) && l.hot.CompareAndSwap(false, true)
}

// look does the watch's work on one lane, and tells whether its reader runs a
// handler, whether others do, and how many the reader has run since the last look.
func (l *lane) look(now time.Duration) (inline, busy bool, calls uint64) {
	l.mu.Lock()
	c := l.call.Load()
	s := c.seq.Load()
	inline = s&1 == 1
	switch {
	case s != l.seen:
		calls = (s - l.seen + 1) / 2
		l.seen, l.seenAt = s, now
	case !inline:
	case now-l.seenAt >= stallAfter*9/10:
		l.takeOver(c, s)
	}
	var shed, slow []*job
	late := false
	if l.running.head != nil || l.queued.head != nil {
		shed = l.shed(now)
		late, slow = l.overdue(now)
	}
	busy = l.running.head != nil || l.queued.head != nil
	var names []string
	for _, j := range slow {
		names = slices.AppendSeq(names, j.names())
	}
	l.mu.Unlock()
	if shed != nil || late {
		// In a goroutine of its own, since a peer that does not read blocks it.
		go l.overloaded(shed)
	}
	for _, name := range names {
		if n, ok := l.workers.limit.allow("slow " + name); ok {
			level.Warn(l.workers.logger).Log("msg", "slow handler", "message", name, "running", slowWarn, "suppressed", n)
		}
	}
	return inline, busy, calls
}

// takeOver takes the connection's reading from call s, unless that has ended,
// and leaves it the NOTIFY. With mu held.
func (l *lane) takeOver(c *call, s uint64) {
	if !c.seq.CompareAndSwap(s, callTaken) {
		return
	}
	l.seen = 0
	l.pending++
	l.running.push(c.job)
	l.pace.stalled()
	l.handOver()
}

// overdue answers the running jobs that are late, and returns those that have
// just become slow. With mu held.
func (l *lane) overdue(now time.Duration) (late bool, slow []*job) {
	limit := l.workers.handlerTimeout
	for j := l.running.head; j != nil; j = j.next {
		if limit > 0 && !j.finished && !j.answered && now-j.arrived >= limit {
			j.answered, late = true, true
			kind := faultOverload // its goroutine has not come so far as to call a handler
			if j.ctx != nil {
				kind = faultTimeout
				j.ctx.cancel(context.DeadlineExceeded)
			}
			l.pending--
			l.ack(j, j.done, l.workers.faultVars[kind])
		}
		if !j.warned && now-j.started >= slowWarn {
			j.warned = true
			slow = append(slow, j)
		}
	}
	return late, slow
}

// deadline is the context of a NOTIFY under WithHandlerTimeout. It needs no
// timer: the watch, or a look at the clock, tells when it is over. It is not
// used again, since a handler may have given it to a goroutine.
type deadline struct {
	context.Context // the connection's
	at              time.Time

	mu   sync.Mutex
	err  error
	done chan struct{} // made when somebody asks
	stop func() bool   // likewise: ends the wait for the connection's
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

// limiter lets a kind of log line through once a second, and counts the others.
type limiter struct {
	now   func() time.Duration
	mu    sync.Mutex
	kinds map[string]*limited
}

type limited struct {
	next       time.Duration
	suppressed int
}

func (l *limiter) allow(kind string) (suppressed int, ok bool) {
	now := l.now()
	l.mu.Lock()
	defer l.mu.Unlock()
	k := l.kinds[kind]
	if k == nil {
		if l.kinds == nil || len(l.kinds) > 1000 { // kinds hold names that a peer can invent
			l.kinds = make(map[string]*limited)
		}
		k = new(limited)
		l.kinds[kind] = k
	} else if now < k.next {
		k.suppressed++
		return 0, false
	}
	suppressed, k.suppressed = k.suppressed, 0
	k.next = now + time.Second
	return suppressed, true
}
