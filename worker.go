package spoa

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-kit/log/level"
	"github.com/spoa-go/spoa/internal/limit"
	"github.com/spoa-go/spoa/internal/outbox"
	"github.com/spoa-go/spoa/internal/pace"
)

// Handler answers one kind of message.
//
// ServeSPOE reads the arguments from m and adds the actions of its answer to a.
// Neither may be used after it has returned: values that are kept must be copied
// first. It is called by many goroutines at once.
//
// The handlers of a NOTIFY are called one after the other, in the order of its
// messages, and share its Actions: a handler sees what earlier ones have set, by
// Actions.Lookup, and can remove it.
//
// If it returns an error or panics, none of its own actions is sent, except those
// before a call of Actions.Keep; the NOTIFY is answered all the same, and
// WithFaultVar says how. A panic is recovered and logged.
//
// The context is cancelled when the connection is lost or the agent is closed: a
// second after HAProxy has closed its side, five after a DISCONNECT; with WithAsync
// and another connection of the same engine not before all is answered. It has a
// deadline if there is a handler timeout. After the deadline no action
// of the handler is sent, so a handler that keeps state for a later message should
// look at ctx.Err before. HAProxy does not report that it has given up on a
// request: what may take long needs a timeout.
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
	Value any    // of the panic
	Stack []byte // as runtime/debug.Stack returns it
}

// Error returns the value of the panic in words.
func (e *PanicError) Error() string { return fmt.Sprintf("spoa: handler panicked: %v", e.Value) }

// Unwrap returns the value of the panic, if that is an error.
func (e *PanicError) Unwrap() error {
	err, _ := e.Value.(error)
	return err
}

// The errors of messages for which no handler was called, in Hooks.
var (
	ErrNoHandler = errors.New("spoa: no handler for this message")
	ErrOverload  = errors.New("spoa: waited too long for its turn")
)

// errGoexit is the error of a handler that ended its goroutine.
var errGoexit = errors.New("spoa: handler called runtime.Goexit")

// Fault says why a message has not got the answer of its handler. The zero Fault
// is none.
type Fault uint8

// The faults, which WithFaultVar reports to HAProxy.
const (
	FaultError     Fault = iota + 1 // the handler returned an error, or Actions.Err
	FaultPanic                      // it panicked
	FaultTimeout                    // it was late, or returned context.DeadlineExceeded
	FaultOverload                   // it was not called, because its turn came too late
	FaultNoHandler                  // there is no handler for the message
	faultCount
)

var faultNames = [faultCount]string{"none", "error", "panic", "timeout", "overload", "no-handler"}

// String returns error, panic, timeout, overload or no-handler; for 0 none.
func (f Fault) String() string {
	if f < faultCount {
		return faultNames[f]
	}
	return fmt.Sprintf("fault %d", uint8(f))
}

// MarshalText returns what String does, for logs and JSON.
func (f Fault) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

// faultOf returns the fault of a handler that failed with err.
func faultOf(err error) Fault {
	var p *PanicError
	switch {
	case errors.As(err, &p):
		return FaultPanic
	case errors.Is(err, context.DeadlineExceeded):
		return FaultTimeout
	}
	return FaultError
}

// job is a NOTIFY on its way from frame to ACK. It belongs to the goroutine
// that runs its handlers, to its queue, or to the bound whose slot it waits for;
// what the watch reads and writes too is guarded by the queue's lock.
type job struct {
	notify
	queue   *queue
	ids     []byte // of the frame, as they came
	actions Actions
	fault   Fault
	faulty  []byte        // the actions that tell of it
	timeout time.Duration // of its handlers; 0: none
	buf     []byte        // what ids and the views point to, unless it is the reader's buffer
	arrived time.Duration // since the workers' epoch
	work    func()        // bound once, so that `go j.work()` allocates nothing
	message string        // the message that handler serves, cached: the next one mostly has the same name
	handler Handler
	size    int      // bytes that it keeps in memory while it is with workers
	bounds  []*bound // of its messages
	slots   int      // that it has: those of bounds[:slots]

	prev, next *job // in a list, guarded by the list's lock

	// Guarded by queue.mu.
	ctx      *deadline // with a handler timeout, once handlers run
	started  time.Duration
	done     []byte // the actions of the messages already done
	finished bool   // all of them are
	answered bool   // by the watch; what the handlers still do is dropped
	warned   bool   // of being slow
}

const maxPooled = 32 << 10 // bytes of a buffer that is kept for later

// newJob returns a job for a NOTIFY of q, to be given to begin and decode.
func newJob(q *queue) *job {
	j, _ := q.workers.jobs.Get().(*job)
	if j == nil {
		j = new(job)
		j.work = j.run
	}
	j.queue, j.peer = q, q.hello
	return j
}

// run handles and answers j. It is what a worker does.
func (j *job) run() {
	defer j.queue.complete(j) // deferred: a handler's runtime.Goexit is answered too
	j.queue.workers.handle(j)
}

// begin makes j ready for the NOTIFY of f. The ids are those of f, or a copy.
func (j *job) begin(f *frame, ids []byte, arrived time.Duration) {
	j.stream, j.id, j.ids = f.stream, f.id, ids
	j.arrived, j.started = arrived, arrived
	j.fault, j.faulty, j.ctx, j.done = 0, nil, nil, nil
	j.finished, j.answered, j.warned = false, false, false
	j.actions.buf, j.actions.max = j.actions.buf[:0], j.queue.ackSize-len(ids)
}

// decode checks the payload b of j's NOTIFY, and finds its handler timeout and
// bounds.
func (j *job) decode(b []byte) error {
	err := j.notify.decode(b)
	if err != nil {
		return err
	}
	w := j.queue.workers
	j.timeout = w.timeoutOf(&j.notify)
	if w.bounds != nil {
		j.bounds = w.boundsOf(&j.notify, j.bounds[:0])
	}
	return nil
}

// trim drops the views, and a buffer that is too large to keep.
func (j *job) trim() {
	j.release()
	if cap(j.buf) > maxPooled {
		j.buf = nil
	}
}

// shrink lets go of memory that is not used.
func (j *job) shrink() {
	j.release()
	j.buf, j.actions, j.ids = nil, Actions{}, nil
}

// recycle returns j to the pool.
func (j *job) recycle() {
	w := j.queue.workers
	j.trim()
	if cap(j.actions.buf) > maxPooled {
		j.actions.buf = nil
	}
	j.actions.before, j.actions.kept = nil, nil
	j.queue, j.peer, j.ids, j.ctx, j.done, j.faulty = nil, nil, nil, nil, nil, nil
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

// next returns the job to be taken next. That is the oldest, until it has waited
// for half of its handler timeout: then it is the newest, since in an overload the
// oldest would be late anyway, and taking them in their order would make every one
// late.
func (q *jobList) next(now time.Duration) *job {
	if j := q.head; j == nil || j.timeout == 0 || now-j.arrived <= j.timeout/2 {
		return j
	}
	return q.tail
}

// shed removes and returns the jobs that have waited for too long.
func (q *jobList) shed(now time.Duration) (shed []*job) {
	for j := q.head; j != nil; {
		next := j.next
		if j.over(now) {
			q.remove(j)
			shed = append(shed, j)
		}
		j = next
	}
	return shed
}

// queue is a connection as the workers see it: its NOTIFYs that wait for a
// worker or are with one. The connection's current reader owns what no lock
// guards.
type queue struct {
	workers *workers
	box     *outbox.Box // for the answers
	taker   taker       // the connection
	ctx     context.Context
	engine  string
	hello   *Peer // as the HELLO said; it does not change
	ackSize int   // what an ACK may hold besides its ids
	pace    pace.Pace
	turn    atomic.Pointer[turn] // of the current reader
	watched atomic.Bool          // in workers.watched

	mu      sync.Mutex
	waiting jobList // for a worker
	running jobList // with workers, not with the reader

	// Guarded by workers.mu.
	tokens int    // jobs that were to wait, less those that were begun; some of them may have been shed
	after  *queue // in that ring

	// The watch's.
	seen   uint64        // the turn's seq at the last look
	seenAt time.Duration // when it changed
}

// taker is a connection whose reader can be replaced.
type taker interface {
	// handOver makes a new goroutine read on from where the reader stands. The
	// caller must have taken the reader's turn.
	handOver()
}

// turn is a reader's handler call as the watch sees it. Seq is odd while a
// handler runs. Whoever changes it from an odd value owns the connection's
// reading from then on: the reader when the handler has returned, the watch when
// that takes too long.
type turn struct {
	seq atomic.Uint64
	job *job
}

const turnTaken = 1 << 63 // even: the watch leaves it alone

func (t *turn) begin() { t.seq.Store(t.seq.Load() + 1) }

func (t *turn) running() bool { return t.seq.Load()&1 == 1 }

// end reports whether the connection is still the reader's.
func (t *turn) end() bool {
	s := t.seq.Load()
	return s&1 == 1 && t.seq.CompareAndSwap(s, s+1)
}

// workers runs the handlers of an agent.
type workers struct {
	*options
	epoch    time.Time // the zero of clock
	limit    limit.Limiter
	inFlight outbox.Total
	stats    stats // nil: not asked for

	jobs    sync.Pool    // of *job
	permits atomic.Int64 // handlers that may still be begun
	_       [56]byte     // permits changes with every batch, waiting is read with every call
	waiting atomic.Int64 // jobs that wait for a permit, and some that were shed
	busy    atomic.Bool  // see watch
	due     atomic.Int64 // when a reader is to call watch: a time.Duration

	mu          sync.Mutex
	first, last *queue // ring of the queues with jobs that wait, next first

	bounds  map[string]*bound // by message; nil: none
	boundMu sync.Mutex

	watchMu  sync.Mutex
	watched  []*queue      // that have, or had a moment ago, handlers running
	inWatch  bool          // watch is running; others do not wait for it
	watching bool          // due and latest are set
	latest   time.Duration // when the timer is to run watch, if no reader has
	timer    *time.Timer
	armed    bool          // the timer is set
	expires  time.Duration // when it expires if armed: at latest, or earlier

	looked    []*queue      // watch's own
	manyUntil time.Duration // until when many readers are taken to read; watch's own

	unknownMu sync.Mutex
	unknown   map[string]bool // names without a handler that were warned of
}

func newWorkers(o *options) *workers {
	w := &workers{options: o, epoch: time.Now(), unknown: make(map[string]bool), bounds: newBounds(o.maxConcurrent)}
	if o.stats {
		w.stats = newStats(o.handlers)
	}
	w.limit.Now = w.clock
	w.permits.Store(int64(o.workers))
	w.timer = time.AfterFunc(time.Hour, w.expired)
	w.timer.Stop()
	w.due.Store(math.MaxInt64)
	return w
}

// anyTimeout reports whether a NOTIFY may have a handler timeout.
func (w *workers) anyTimeout() bool { return w.handlerTimeout > 0 || w.timeouts != nil }

// timeoutOf returns the handler timeout of a NOTIFY: the longest of its messages',
// 0 if one of them has none.
func (w *workers) timeoutOf(n *notify) time.Duration {
	if w.timeouts == nil {
		return w.handlerTimeout
	}
	longest := time.Duration(-1)
	for name := range n.names() {
		limit, ok := w.timeouts[w.kind(name)]
		if !ok {
			limit = w.handlerTimeout
		}
		if limit == 0 {
			return 0
		}
		longest = max(longest, limit)
	}
	if longest < 0 {
		return w.handlerTimeout
	}
	return longest
}

// clock returns the time since the epoch: monotonic, at half the cost of time.Now.
func (w *workers) clock() time.Duration { return time.Since(w.epoch) }

// acquire takes a permit to run a handler, unless others wait for one.
func (w *workers) acquire() bool { return w.waiting.Load() == 0 && w.take() }

func (w *workers) take() bool {
	for {
		n := w.permits.Load()
		if n <= 0 {
			return false
		}
		if w.permits.CompareAndSwap(n, n-1) {
			return true
		}
	}
}

// release returns a permit, for which others may wait.
func (w *workers) release() {
	w.permits.Add(1)
	w.dispatch()
}

// dispatch starts waiting jobs while there are permits. Whoever adds a job or
// returns a permit calls it afterwards, so that one of them sees both.
func (w *workers) dispatch() {
	for w.waiting.Load() > 0 && w.take() {
		if j := w.nextJob(); j != nil {
			go j.work()
		} else {
			w.permits.Add(1)
		}
	}
}

// nextJob takes a waiting job, from each queue in turn.
func (w *workers) nextJob() *job {
	for {
		w.mu.Lock()
		q := w.first
		if q == nil {
			w.mu.Unlock()
			return nil
		}
		w.waiting.Add(-1)
		w.first, q.after = q.after, nil
		if q.tokens--; q.tokens > 0 {
			w.pushQueue(q)
		}
		w.mu.Unlock()
		if j := q.dequeue(); j != nil {
			return j
		}
	}
}

// pushQueue adds q to the ring. The caller must hold mu.
func (w *workers) pushQueue(q *queue) {
	if w.first == nil {
		w.first = q
	} else {
		w.last.after = q
	}
	w.last = q
}

// spread gives j, which is decoded and owns its memory, to a worker now or later.
func (w *workers) spread(j *job) {
	j.size = cap(j.buf)
	j.queue.box.Begin(j.size)
	if w.enter(j) {
		w.start(j)
	}
}

// start gives j, which has its slots, to a worker as soon as there is a permit.
func (w *workers) start(j *job) {
	q := j.queue
	now := w.acquire()
	q.mu.Lock()
	if now {
		q.running.push(j)
	} else {
		q.waiting.push(j)
	}
	q.mu.Unlock()
	w.watchQueue(q)
	if now {
		go j.work()
		return
	}
	w.mu.Lock()
	if q.tokens++; q.tokens == 1 {
		w.pushQueue(q)
	}
	w.waiting.Add(1)
	w.mu.Unlock()
	w.dispatch()
}

// dequeue takes the job to run next. Jobs that have waited for longer than the
// handler timeout are answered instead.
func (q *queue) dequeue() *job {
	now := q.workers.clock()
	q.mu.Lock()
	shed := q.shed(now)
	j := q.waiting.next(now)
	if j != nil {
		q.waiting.remove(j)
		q.running.push(j)
		j.started = now
	}
	q.mu.Unlock()
	if shed != nil {
		go q.answerShed(shed)
	}
	return j
}

// shed takes the jobs that have waited for too long. The caller must hold mu, and
// pass them to answerShed after releasing it.
func (q *queue) shed(now time.Duration) []*job {
	if !q.workers.anyTimeout() {
		return nil
	}
	return q.waiting.shed(now)
}

// answerShed answers the jobs that shed returned.
func (q *queue) answerShed(shed []*job) {
	for _, j := range shed {
		q.answer(j, nil, q.workers.faultActions[FaultOverload])
		q.workers.releaseSlots(j)
	}
	q.box.Flush()
	for _, j := range shed {
		q.workers.reportOverload(j)
		j.recycle()
	}
}

// answer adds j's answer to the outbox.
func (q *queue) answer(j *job, actions, faulty []byte) {
	q.box.Answer(j.size, func(b []byte) []byte {
		return appendAck(b, flagFIN, j.ids, j.beside(actions, faulty), faulty)
	})
}

// beside returns the actions that are sent beside those of a fault: none if the
// frame has no room for both.
func (j *job) beside(actions, faulty []byte) []byte {
	if len(actions)+len(faulty) > j.actions.max {
		return nil
	}
	return actions
}

// reportOverload reports that j's messages were not handled for want of time.
func (w *workers) reportOverload(j *job) {
	for j.nextMessage() {
		w.handled(j, 0, ErrOverload, FaultOverload, true)
	}
	if n, ok := w.limit.Allow("overload"); ok {
		level.Warn(w.logger).Log("msg", "overload: answered without calling the handler", "suppressed", n)
	}
}

// complete answers a job of the running ones, and returns its permit.
func (q *queue) complete(j *job) {
	w := q.workers
	q.mu.Lock()
	q.running.remove(j)
	late := j.answered
	q.mu.Unlock()
	if !late {
		q.answer(j, j.actions.buf, j.faulty)
	}
	w.releaseSlots(j)
	j.recycle()
	// Sending may block, so not while others wait for the permit.
	w.release()
	if !late {
		q.box.Flush()
	}
}

// exited answers the NOTIFY whose handler, called by rd, has called
// runtime.Goexit.
func (q *queue) exited(rd *reader) {
	q.mu.Lock()
	if rd.turn.running() { // else the connection has gone to another reader
		q.takeOver(&rd.turn, rd.turn.seq.Load())
	}
	q.mu.Unlock()
	q.complete(rd.job)
}

// handle runs the handlers of j's messages in their order.
func (w *workers) handle(j *job) {
	if j.timeout > 0 {
		w.handleInTime(j)
		return
	}
	for j.nextMessage() {
		w.message(j.queue.ctx, j)
	}
}

// handleInTime is handle with a handler timeout.
func (w *workers) handleInTime(j *job) {
	ctx := &deadline{Context: j.queue.ctx, at: w.epoch.Add(j.arrived + j.timeout)}
	defer ctx.cancel(context.Canceled)
	if !j.setContext(ctx) {
		w.fault(j, FaultOverload, ErrOverload)
		w.reportOverload(j)
		return
	}
	for j.nextMessage() {
		if j.late() {
			w.fault(j, FaultTimeout, context.DeadlineExceeded)
			w.handled(j, 0, ErrOverload, FaultOverload, true)
			continue
		}
		w.message(ctx, j)
	}
}

// setContext makes the watch cancel ctx when j is late. It reports false if j is
// late already.
func (j *job) setContext(ctx *deadline) bool {
	j.queue.mu.Lock()
	defer j.queue.mu.Unlock()
	if j.answered || j.over(j.queue.workers.clock()) {
		return false
	}
	j.ctx = ctx
	return true
}

// over reports whether the time for j's answer is over.
func (j *job) over(now time.Duration) bool { return j.timeout > 0 && now-j.arrived >= j.timeout }

// late reports whether j's time is over; it may have been answered.
func (j *job) late() bool {
	j.queue.mu.Lock()
	defer j.queue.mu.Unlock()
	return j.answered || j.over(j.queue.workers.clock())
}

// commit makes the actions of j's messages up to the current one final: they are
// sent even if a later message is late. It reports whether there was still time;
// if not, those of the current one are not sent, so that a handler can rely on
// its context.
func (j *job) commit() bool {
	j.queue.mu.Lock()
	defer j.queue.mu.Unlock()
	if j.answered || j.over(j.queue.workers.clock()) {
		return false
	}
	j.done = j.actions.buf
	j.finished = j.left == 0
	return true
}

// message runs the handler of j's current message.
func (w *workers) message(ctx context.Context, j *job) {
	m, a := &j.current, &j.actions
	a.begin()
	if m.name != j.message || j.handler == nil {
		j.message, j.handler = m.name, w.handlers[m.name]
		if j.handler == nil {
			j.handler = w.fallback
		}
	}
	h := j.handler
	if h == nil {
		w.noHandler(j)
		return
	}
	var began time.Duration
	if w.observed() {
		began = w.clock()
		w.stats.called(m.name)
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
		a.fallBack()
		w.returned(j, began, err)
	}()
	err := h.ServeSPOE(ctx, m, a)
	returned = true
	if err != nil {
		a.fallBack()
	} else {
		err = a.err
	}
	w.returned(j, began, err)
}

// returned deals with the end of the handler of j's current message.
func (w *workers) returned(j *job, began time.Duration, err error) {
	late := j.timeout > 0 && !j.commit()
	if late {
		j.actions.buf = j.actions.before
		if err == nil {
			err = context.DeadlineExceeded
		}
	}
	var f Fault
	if err != nil {
		f = faultOf(err)
		w.failed(j, f, err)
	}
	if w.observed() {
		took := w.clock() - began
		w.stats.returned(j.current.name, took, late)
		w.handled(j, took, err, f, late)
	}
}

// observed reports whether a hook or Agent.Stats needs to know how messages are
// dealt with.
func (w *workers) observed() bool {
	return w.hooks.Handled != nil || w.hooks.Message != nil || w.stats != nil
}

// handled reports how j's current message was dealt with.
func (w *workers) handled(j *job, took time.Duration, err error, f Fault, late bool) {
	w.stats.handled(j.current.name, f)
	if w.hooks.Handled != nil {
		w.hooks.Handled(j.current.name, took, err)
	}
	if w.hooks.Message != nil {
		w.hooks.Message(MessageEvent{j.current.name, j.current.Peer(), took, err, f, late})
	}
}

// fault makes j's answer tell of a fault, unless there was one before.
func (w *workers) fault(j *job, f Fault, err error) {
	if j.fault != 0 {
		return
	}
	j.fault, j.faulty = f, w.faultActions[f]
	if w.faultFuncs && err != faultErrors[f] {
		j.faulty = w.newFaultActions(f, err, j.actions.max)
	}
}

// logKind returns the kind of log line about a message, of which there are as
// many as handlers: a peer can invent names.
func (w *workers) logKind(m *Message) string {
	if _, ok := w.handlers[m.name]; ok {
		return "handler " + m.name
	}
	return "handler"
}

// failed notes and logs that the handler of j's current message failed.
func (w *workers) failed(j *job, f Fault, err error) {
	w.fault(j, f, err)
	m := &j.current
	var p *PanicError
	errors.As(err, &p)
	n, ok := w.limit.Allow(w.logKind(m))
	switch {
	case !ok:
	case p != nil:
		level.Error(w.logger).Log("msg", "handler panicked", "message", clip(m.name), "err", err, "suppressed", n, "stack", p.Stack)
	default:
		level.Warn(w.logger).Log("msg", "handler failed", "message", clip(m.name), "err", err, "suppressed", n)
	}
}

const maxUnknown = 100 // names of messages to warn of, since a peer can invent any number

// noHandler deals with j's current message, which has no handler.
func (w *workers) noHandler(j *job) {
	m := &j.current
	w.fault(j, FaultNoHandler, ErrNoHandler)
	w.handled(j, 0, ErrNoHandler, FaultNoHandler, false)
	if j.timeout > 0 {
		j.commit()
	}
	w.unknownMu.Lock()
	warn := !w.unknown[m.name] && len(w.unknown) < maxUnknown
	if warn {
		w.unknown[m.name] = true
	}
	w.unknownMu.Unlock()
	if warn {
		level.Warn(w.logger).Log("msg", "no handler for this message", "message", clip(m.name),
			"handled", strings.Join(slices.Sorted(maps.Keys(w.handlers)), ","))
	}
}
