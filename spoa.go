// Package spoa makes a Go program an agent of HAProxy's Stream Processing
// Offload Engine: a SPOA, embedded in the program beside its other services.
//
// HAProxy sends messages, such as the address of a client, over a
// net.Listener; a [Handler] answers each with variables that HAProxy's rules
// then use:
//
//	agent := spoa.New(spoa.WithHandlerFunc("check-client-ip",
//		func(ctx context.Context, m *spoa.Message, a *spoa.Actions) error {
//			ip, ok := m.Arg(0).Value.Addr()
//			if !ok {
//				return errors.New("want an address")
//			}
//			a.SetVar(spoa.ScopeSess, "ip_score", spoa.Uint32(score(ip)))
//			return nil
//		}))
//	err := agent.Serve(listener)
//
// In a group of github.com/oklog/run an agent is an actor:
//
//	g.Add(agent.Actor(listener, 10*time.Second))
//
// Every NOTIFY is answered by exactly one ACK, whatever its handler does.
// [Agent.Shutdown] ends an agent without the loss of a request. What HAProxy
// sends is in section 3 of its doc/SPOE.txt.
package spoa

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/go-kit/log"
	"github.com/go-kit/log/level"
)

// ErrAgentClosed is what Serve returns after Shutdown or Close.
var ErrAgentClosed = errors.New("spoa: agent closed")

// Agent answers HAProxy on any number of listeners. It is made by New, and its
// methods may be called by several goroutines at once.
type Agent struct {
	*options
	err     error // of the options
	workers *workers
	ctx     context.Context // of all handlers
	cancel  context.CancelFunc

	mu         sync.Mutex
	listeners  map[*listener]struct{}
	conns      map[*conn]struct{}
	checks     checks
	firstCheck time.Duration
	partings   map[string]*partings
	notified   atomic.Bool   // a NOTIFY has come
	warnSilent atomic.Bool   // none had for long, and that was logged
	phase      atomic.Int32  // changed with mu held
	quietFrom  atomic.Int64  // the clock when a drain may end at the earliest
	emptied    chan struct{} // a drain: the last connection has gone
	done       chan struct{} // closed when nothing is served any more
}

// The phases of an agent.
const (
	serving  = iota
	draining // health checks are refused, quiet connections closed
	stopping // nothing more is read
	closed
)

// quietTime is how long a connection has to be without a NOTIFY to be closed in
// a drain: longer than HAProxy takes from choosing a connection to using it.
const quietTime = time.Second

// New returns an agent. It never fails: what is wrong with an option is
// returned by Serve.
func New(opts ...Option) *Agent {
	o := newOptions(opts)
	a := &Agent{
		options:   o,
		err:       o.err(),
		workers:   newWorkers(o),
		listeners: make(map[*listener]struct{}),
		conns:     make(map[*conn]struct{}),
		emptied:   make(chan struct{}, 1),
		done:      make(chan struct{}),
	}
	a.ctx, a.cancel = context.WithCancel(context.Background())
	return a
}

// listener is closed once, by Serve or by whoever ends the agent.
type listener struct {
	net.Listener
	once sync.Once
	err  error
	left atomic.Bool // closed during a drain, and not by the agent: another process accepts now
}

func (l *listener) Close() error {
	l.once.Do(func() { l.err = l.Listener.Close() })
	return l.err
}

// Serve accepts connections from nl and answers them. It owns nl and closes it.
// It always returns an error: what is wrong with the options, why Accept failed
// for good, or ErrAgentClosed after Shutdown or Close, even when called after
// them; then the drain is over, though handlers that ignore their context may
// still run. It may be called for several listeners at once.
func (a *Agent) Serve(nl net.Listener) error {
	if nl == nil {
		return errors.New("spoa: Serve: nil listener")
	}
	l := &listener{Listener: nl}
	defer l.Close()
	if a.err != nil {
		return a.err
	}
	a.mu.Lock()
	if a.phase.Load() == serving {
		a.listeners[l] = struct{}{}
	}
	_, ok := a.listeners[l]
	a.mu.Unlock()
	if !ok {
		<-a.done
		return ErrAgentClosed
	}
	err := a.accept(l)
	if a.leave(l) {
		<-a.done
		return ErrAgentClosed
	}
	return err
}

// leave forgets a listener that accepts no more, and tells whether the agent is
// coming to its end.
func (a *Agent) leave(l *listener) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.listeners, l)
	phase := a.phase.Load()
	if phase == draining {
		l.left.Store(true)
		for c := range a.conns {
			if c.listener == l {
				c.wake()
			}
		}
		a.empty()
	}
	return phase != serving
}

const maxAcceptDelay = time.Second

// accept serves connections until Accept fails for good.
func (a *Agent) accept(l *listener) error {
	var delay time.Duration
	for {
		nc, err := l.Accept()
		if err == nil {
			delay = 0
			a.serveConn(l, nc)
			continue
		}
		var ne net.Error
		//lint:ignore SA1019 Only Temporary tells a lack of descriptors from a closed listener.
		if !errors.As(err, &ne) || !ne.Temporary() {
			return err
		}
		delay = min(max(2*delay, 5*time.Millisecond), maxAcceptDelay)
		if n, ok := a.workers.limit.allow("accept"); ok {
			level.Warn(a.logger).Log("msg", "accept failed", "err", err, "retry", delay, "suppressed", n)
		}
		select {
		case <-time.After(delay):
		case <-a.done:
		}
	}
}

// serveConn has a goroutine of its own answer nc.
func (a *Agent) serveConn(l *listener, nc net.Conn) {
	c := newConn(a, l, nc)
	a.mu.Lock()
	ok := a.phase.Load() < stopping
	if ok {
		a.conns[c] = struct{}{}
	}
	a.mu.Unlock()
	if !ok {
		nc.Close()
		return
	}
	if a.hooks.ConnOpened != nil {
		a.hooks.ConnOpened(c.peer)
	}
	go c.rd.run()
}

// remove forgets a connection that has ended.
func (a *Agent) remove(c *conn) {
	a.mu.Lock()
	delete(a.conns, c)
	empty := len(a.conns) == 0
	a.mu.Unlock()
	if empty && a.phase.Load() != serving {
		a.empty()
	}
}

// Shutdown ends the agent without the loss of a request. From now on health
// checks are refused, so that `option spop-check` takes the agent out, while
// NOTIFYs are answered as ever, also on new connections. A connection on which
// nothing is in flight and nothing has come for a second is closed with an
// AGENT-DISCONNECT, but if health checks are seen, not before HAProxy has
// missed three of them, and then only together with those in use. When none is
// left, the listeners are closed. With nobody connected, and no health checks,
// Shutdown returns at once.
//
// HAProxy up to 3.0 goes on using its connections to a server that is down. Then
// answers are held back, for 50 ms at a time, until all who ask seem to wait, and
// leave together with the AGENT-DISCONNECT. What HAProxy sends in that very
// moment all the same is lost.
//
// If another process accepts from the same socket, or will soon, the listener
// is to be closed once Shutdown has begun: then health checks are the other's,
// and the listener's connections are closed in that manner at once.
//
// Shortly before the deadline of ctx (a tenth of what is left, a second at
// most) the listeners are closed, and within 100 ms reading ends, also if that
// may cost requests; what is in flight is answered. When ctx is over, Shutdown
// calls Close and returns the error of ctx.
func (a *Agent) Shutdown(ctx context.Context) error {
	a.advance(draining)
	var last <-chan time.Time
	if deadline, ok := ctx.Deadline(); ok {
		left := time.Until(deadline)
		t := time.NewTimer(left - min(left/10, time.Second))
		defer t.Stop()
		last = t.C
	}
	for {
		select {
		case <-a.done:
			return nil
		case <-last:
			a.advance(stopping)
			last = nil
		case <-ctx.Done():
			if !a.advance(closed) {
				return nil
			}
			return ctx.Err()
		}
	}
}

// Close ends the agent now: it cancels the contexts of the handlers and closes
// listeners and connections. It does not wait for handlers.
func (a *Agent) Close() error {
	a.advance(closed)
	return nil
}

// Actor returns the agent as an actor of an oklog/run group. Its interrupt only
// starts a Shutdown that may take as long as grace, so that it doesn't hold up
// the other actors' interrupts; execute returns when that is through. The drain
// has begun when interrupt returns.
func (a *Agent) Actor(l net.Listener, grace time.Duration) (execute func() error, interrupt func(error)) {
	execute = func() error { return a.Serve(l) }
	interrupt = func(error) {
		a.advance(draining)
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), grace)
			defer cancel()
			a.Shutdown(ctx)
		}()
	}
	return execute, interrupt
}

// advance brings the agent to a later phase, unless it is there already.
func (a *Agent) advance(to int32) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	from := a.phase.Load()
	if from >= to {
		return false
	}
	if from == serving {
		now := a.workers.clock()
		a.quietFrom.Store(int64(a.checks.missed(now)))
		go a.drain()
	}
	a.phase.Store(to)
	if to >= stopping {
		for l := range a.listeners {
			l.Close()
		}
	}
	if to == closed {
		a.cancel()
		close(a.done)
	}
	for c := range a.conns {
		if to == closed {
			c.nc.Close()
			go c.giveUp()
		} else {
			c.wake()
		}
	}
	if len(a.conns) == 0 {
		a.empty()
	}
	return true
}

// empty has drain look whether all is quiet.
func (a *Agent) empty() {
	select {
	case a.emptied <- struct{}{}:
	default:
	}
}

// drain waits until all is quiet and closes the agent.
func (a *Agent) drain() {
	for {
		select {
		case <-a.done:
			return
		case <-a.emptied:
		}
		a.mu.Lock()
		empty, left := len(a.conns) == 0, len(a.listeners) == 0
		a.mu.Unlock()
		if d := time.Duration(a.quietFrom.Load()) - a.workers.clock(); d > 0 && !left && a.phase.Load() == draining {
			time.AfterFunc(d, a.empty)
			continue
		}
		if empty {
			a.Close()
		}
	}
}

// checks remembers, by host, how often health checks come, so that a drain can
// tell when HAProxy must have noticed that they are refused.
type checks map[string]check

type check struct{ last, interval time.Duration }

const (
	maxChecks     = 64              // hosts
	missedFall    = 3               // refused checks that take a server out: HAProxy's default
	checkInterval = 2 * time.Second // likewise, until a second check has come
	checkWindow   = 5 * time.Minute // longer intervals than that are none
)

func (cs checks) seen(host string, now time.Duration) {
	old, ok := cs[host]
	if !ok && len(cs) >= maxChecks {
		return
	}
	k := check{last: now, interval: checkInterval}
	if d := now - old.last; ok && d < checkWindow {
		k.interval = d
	}
	cs[host] = k
}

// missed returns when everybody who checks must have missed missedFall checks.
func (cs checks) missed(now time.Duration) (at time.Duration) {
	for _, k := range cs {
		if now-k.last < 2*k.interval+quietTime {
			at = max(at, k.last+missedFall*k.interval+quietTime)
		}
	}
	return at
}

// ConnInfo is a look at one connection.
type ConnInfo struct {
	Peer
	Since    time.Time // when it was accepted
	Notifies uint64    // received so far
	InFlight int       // of these, handed to workers and not yet answered
}

// Conns returns a look at the agent's connections, in no order.
func (a *Agent) Conns() []ConnInfo {
	a.mu.Lock()
	defer a.mu.Unlock()
	infos := make([]ConnInfo, 0, len(a.conns))
	for c := range a.conns {
		c.mu.Lock()
		infos = append(infos, ConnInfo{c.peer, a.workers.epoch.Add(c.opened), c.notifies.Load(), c.pending})
		c.mu.Unlock()
	}
	return infos
}

// conn is a connection of HAProxy's. It owns the net.Conn. At any time one
// goroutine is its reader and owns all that mu does not guard; see reader.
type conn struct {
	lane
	agent     *Agent
	listener  *listener
	nc        net.Conn
	host      string // of its peer
	cancel    context.CancelFunc
	rd        *reader // the current one
	opened    time.Duration
	debugging bool
	notifies  atomic.Uint64

	// The reader's.
	agreed     bool // the HELLOs have been exchanged
	pipelining bool
	async      bool
	frameSize  int
	fragment   fragment
	window     int
	armed      time.Duration // when the read deadline is; 0: none
	began      time.Duration // when the frame that is being read began; 0: none is
	last       time.Duration // when what came last had been dealt with
	used       bool          // something has come since it was shrunk
	part       parting

	// Guarded by mu.
	peer       Peer
	out, spare []byte
	writing    bool          // somebody is; nobody else may
	held       bool          // nobody may; see parting
	writeArmed time.Duration // when the write deadline is; the writer's
	werr       error         // why writing failed
}

// fragment is a NOTIFY that is being put together from several frames.
type fragment struct {
	open       bool
	refused    bool // the last was too long: if its rest comes it is swallowed
	stream, id uint64
	buf        []byte
}

const (
	minBuffer = 4 << 10  // of an idle connection
	maxBuffer = 64 << 10 // to read into, unless frames are larger
	batchSize = 16 << 10 // of ACKs, before they are sent though more could follow
	backlog   = 64 << 10 // of ACKs unsent, before reading pauses
	shrinkIn  = time.Second
	eofGrace  = time.Second     // for handlers of a peer that sends no more
	endGrace  = 5 * time.Second // for the last answers
	lingerFor = 500 * time.Millisecond

	silentAfter = time.Minute // of health checks without a NOTIFY, to be warned of
)

func newConn(a *Agent, l *listener, nc net.Conn) *conn {
	c := &conn{agent: a, listener: l, nc: nc, opened: a.workers.clock(), frameSize: helloFrameSize, window: a.pipelining,
		debugging: a.options.debug}
	c.peer.Addr = nc.RemoteAddr()
	if c.peer.Addr != nil { // a net.Conn of the program's own may have none
		c.host = c.peer.Addr.String()
	}
	if h, _, err := net.SplitHostPort(c.host); err == nil {
		c.host = h
	}
	c.last = c.opened
	c.workers = a.workers
	c.ctx, c.cancel = context.WithCancel(a.ctx)
	c.lane.ack, c.lane.flush, c.lane.handOver = c.ack, c.flush, c.handOver
	c.moved.L = &c.mu
	c.rd = newReader(c)
	c.call.Store(&c.rd.call)
	return c
}

// ack appends an ACK to what is to be sent. With mu held.
func (c *conn) ack(j *job, actions, fault []byte) {
	actions = append(actions[:len(actions):len(actions)], fault...)
	if c.gone {
		if c.async {
			b := appendAck(nil, flagFIN, j.ids, actions)
			go c.agent.forward(c, b)
		}
		if c.pending == 0 {
			c.cancel() // nobody needs the context any more
		}
		return
	}
	start := len(c.out)
	c.out = appendAck(c.out, flagFIN, j.ids, actions)
	c.debug("sent", c.out[start:])
}

// flush sends what there is, unless somebody else is at it.
func (c *conn) flush() {
	c.mu.Lock()
	c.write(0)
	c.mu.Unlock()
}

// write sends what there is, unless somebody else is at it: who writes goes on
// until nothing is left. With mu held, which it gives up meanwhile. Now may be 0.
func (c *conn) write(now time.Duration) {
	if c.writing || c.held {
		return
	}
	c.writing = true
	for len(c.out) > 0 && !c.gone {
		b := c.out
		c.out = c.spare[:0]
		c.mu.Unlock()
		n, err := c.send(b, now)
		c.mu.Lock()
		now = 0
		c.spare = b[:0]
		if err != nil {
			c.werr = err
			c.lose(append(wholeFrames(b, n), c.out...))
		}
	}
	c.writing = false
	c.moved.Broadcast()
}

// send writes b, which ends or begins no frame in between, to the peer. Now may
// be 0.
func (c *conn) send(b []byte, now time.Duration) (int, error) {
	if now == 0 {
		now = c.workers.clock()
	}
	// The deadline is moved only now and then: that costs as much as a small
	// write does.
	if d := c.agent.writeTimeout; c.writeArmed < now+d {
		c.writeArmed = now + d + d/4
		c.nc.SetWriteDeadline(c.workers.epoch.Add(c.writeArmed))
	}
	return c.nc.Write(b)
}

// wholeFrames returns the frames of b of which not a byte lies before n.
func wholeFrames(b []byte, n int) []byte {
	for n > 0 && len(b) > 0 {
		size := lengthSize + int(binary.BigEndian.Uint32(b))
		b = b[size:]
		n -= size
	}
	return b
}

// lose notes that nobody reads any more, and lets siblings have the answers
// that are left. With mu held.
func (c *conn) lose(left []byte) {
	c.gone = true
	c.out, c.spare = nil, nil
	c.moved.Broadcast()
	c.nc.Close()
	if !c.async {
		return
	}
	for len(left) > 0 {
		size := lengthSize + int(binary.BigEndian.Uint32(left))
		if left[lengthSize] == frameAck {
			go c.agent.forward(c, left[:size:size])
		}
		left = left[size:]
	}
}

// giveUp ends a connection whatever may be in flight.
func (c *conn) giveUp() {
	c.cancel()
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.gone {
		c.lose(nil)
	}
}

// wake has the reader look at the agent's phase.
func (c *conn) wake() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nc.SetReadDeadline(time.Unix(1, 0))
}

// forward sends an ACK by another connection of the same engine (SPOE.txt
// 3.2.1, async).
func (a *Agent) forward(from *conn, ack []byte) {
	for _, c := range a.siblings(from) {
		c.mu.Lock()
		if ok := !c.gone && len(ack) <= lengthSize+c.frameSize; ok {
			c.out = append(c.out, ack...)
			c.write(0)
			c.mu.Unlock()
			return
		}
		c.mu.Unlock()
	}
	if n, ok := a.workers.limit.allow("dropped"); ok {
		level.Warn(a.logger).Log("msg", "answer dropped: no connection left", "engine", from.engine, "suppressed", n)
	}
}

// siblings returns the other async connections of c's engine.
func (a *Agent) siblings(c *conn) (list []*conn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for s := range a.conns {
		s.mu.Lock()
		if s != c && s.listener == c.listener && s.async && !s.gone && s.peer.EngineID == c.peer.EngineID {
			list = append(list, s)
		}
		s.mu.Unlock()
	}
	return list
}

// debug logs a frame, if that is asked for. It is short to be inlined.
func (c *conn) debug(what string, frame []byte) {
	if c.debugging {
		c.logFrame(what, frame)
	}
}

func (c *conn) logFrame(what string, frame []byte) {
	level.Debug(c.logger()).Log("msg", what, "frame", describe(frame))
}

func (c *conn) logger() log.Logger {
	return log.With(c.agent.options.logger, "peer", c.peer.Addr, "engine", c.engine)
}

// reader is a goroutine that reads a connection, and all that it needs for
// that. If a handler of its keeps it too long, another reader takes the
// connection over: then it only answers that NOTIFY.
type reader struct {
	call
	conn    *conn
	buf     []byte
	r, w    int // buf[r:w] has yet to be handled
	frame   frame
	out     []byte        // ACKs of the calls made
	leave   bool          // to run handlers
	calls   int           // made with this leave
	began   time.Duration // when they began; before the first, the time; 0: unknown
	arrived time.Duration // when the bytes came
}

func newReader(c *conn) *reader {
	rd := &reader{conn: c, buf: make([]byte, minBuffer)}
	rd.job = newJob(&c.lane)
	return rd
}

// handOver has a new reader go on where the current one stands.
func (c *conn) handOver() {
	old, rd := c.rd, newReader(c)
	rest := old.buf[old.r:old.w]
	if len(rest) > len(rd.buf) {
		rd.buf = make([]byte, len(old.buf))
	}
	rd.w = copy(rd.buf, rest)
	rd.out, old.out = old.out, nil
	rd.arrived, rd.began = old.arrived, c.workers.clock()
	c.rd = rd
	c.call.Store(&rd.call)
	go rd.run()
}

// Why a reader ends, besides what its connection says.
var (
	errTaken    = errors.New("another reader has the connection")
	errChecked  = errors.New("health check answered")
	errRotated  = errors.New("rotated")
	errStopping = errors.New("agent stops")
	errParted   = errors.New("agent stops, and has said so")
)

func (rd *reader) run() {
	exited := true
	defer func() {
		if !exited {
			return
		}
		// The handler has called runtime.Goexit.
		c := rd.conn
		c.mu.Lock()
		if rd.running() { // else the connection has gone to another reader
			c.takeOver(&rd.call, rd.seq.Load())
		}
		c.mu.Unlock()
		c.complete(rd.job)
	}()
	rd.flush() // what the reader before has answered
	err := rd.serve()
	exited = false
	if err != errTaken {
		rd.conn.end(rd, err)
	}
}

// serve handles frames: all that is there, then their ACKs leave, then it waits
// for more.
func (rd *reader) serve() error {
	for {
		for {
			ok, err := rd.next()
			if err != nil {
				return err
			}
			if !ok {
				break
			}
			if err := rd.handle(); err != nil {
				return err
			}
			if len(rd.out) >= batchSize {
				rd.pause()
			}
		}
		many := rd.calls > 1
		rd.pause()
		if many && rd.conn.workers.busy.Load() { // see workers.watch
			runtime.Gosched()
		}
		if err := rd.fill(); err != nil {
			return err
		}
	}
}

// next takes a complete frame, if there is one.
func (rd *reader) next() (bool, error) {
	b := rd.buf[rd.r:rd.w]
	if len(b) < lengthSize {
		return false, nil
	}
	size := binary.BigEndian.Uint32(b)
	switch {
	case size > uint32(rd.conn.frameSize):
		return false, fault(StatusFrameTooBig, "%d bytes, limit %d", size, rd.conn.frameSize)
	case size < minFrameLen:
		return false, fault(StatusInvalidFrame, "frame of %d bytes", size)
	case len(b)-lengthSize < int(size):
		return false, nil
	}
	end := lengthSize + int(size)
	if !rd.frame.parse(b[lengthSize:end]) {
		return false, fault(StatusInvalidFrame, "malformed ids")
	}
	rd.r += end
	rd.conn.began = 0
	rd.conn.debug("received", b[:end])
	return true, nil
}

// handle deals with one frame.
func (rd *reader) handle() error {
	f, c := &rd.frame, rd.conn
	if !c.agreed {
		return rd.hello()
	}
	switch f.kind {
	case frameNotify:
		switch {
		case f.abort():
			return nil
		case !f.fin():
			return rd.fragment()
		case c.fragment.open && !c.pipelining:
			return fault(StatusInterlaced, "NOTIFY within another one")
		}
		return rd.notify(f.payload, false)
	case frameUnset:
		return rd.fragment()
	case frameHAProxyDisconnect:
		return parseDisconnect(f.payload)
	case frameHAProxyHello:
		return fault(StatusInvalidFrame, "second HELLO")
	}
	return nil // other types are skipped
}

// hello answers the HAPROXY-HELLO (SPOE.txt 3.2.4, 3.2.5).
func (rd *reader) hello() error {
	f, c, a := &rd.frame, rd.conn, rd.conn.agent
	switch {
	case f.kind != frameHAProxyHello:
		return fault(StatusInvalidFrame, "first frame is of type %d, want HELLO", f.kind)
	case !f.fin():
		return fault(StatusNoFragmentation, "fragmented HELLO")
	case f.stream != 0 || f.id != 0:
		return fault(StatusInvalidFrame, "HELLO with ids %d, %d", f.stream, f.id)
	}
	var h hello
	if err := h.parse(frameHAProxyHello, f.payload); err != nil {
		return err
	}
	if h.healthcheck {
		if a.phase.Load() != serving {
			return errStopping
		}
		a.checked(c)
	}
	c.frameSize = min(int(min(h.frameSize, maxFrameSize)), a.frameSize)
	c.pipelining = a.pipelining > 1 && h.can("pipelining")
	async := a.options.async && h.can("async") && h.engineID != ""
	var caps []string
	for _, k := range []struct {
		name string
		on   bool
	}{
		{"pipelining", c.pipelining},
		{"async", async},
		{"fragmentation", a.fragmentation > 0}, // HAProxy does not offer it, yet uses it
	} {
		if k.on {
			caps = append(caps, k.name)
		}
	}
	c.ackSize = c.frameSize - (minFrameLen - 2) - len(a.faultVars[faultOverload])
	c.mu.Lock()
	c.peer = Peer{c.peer.Addr, h.engineID, strings.Join(caps, ","), c.frameSize, h.healthcheck}
	c.mu.Unlock()
	c.engine, rd.job.engine = h.engineID, h.engineID
	c.agreed = true
	rd.out = appendHello(rd.out, frameAgentHello, &hello{versions: version, frameSize: uint32(c.frameSize), capabilities: c.peer.Capabilities})
	c.debug("sent", rd.out)
	rd.flush()
	c.mu.Lock()
	c.async = async // not before: siblings' ACKs would overtake the HELLO
	c.mu.Unlock()
	if h.healthcheck {
		return errChecked
	}
	level.Debug(c.logger()).Log("msg", "hello", "capabilities", c.peer.Capabilities, "offered", h.capabilities, "frame_size", c.frameSize)
	return nil
}

// checked notes a health check.
func (a *Agent) checked(c *conn) {
	now := a.workers.clock()
	a.mu.Lock()
	if a.checks == nil {
		a.checks, a.firstCheck = make(checks), now
	}
	a.checks.seen(c.host, now)
	silent := now-a.firstCheck >= silentAfter && !a.notified.Load()
	a.mu.Unlock()
	if silent && a.warnSilent.CompareAndSwap(false, true) {
		level.Warn(a.logger).Log("msg", "health checks pass, but no NOTIFY has ever come: does a rule or event of HAProxy's configuration send the messages?")
	}
}

// notify has the handlers answer the NOTIFY in payload: here and now, or by
// workers. Whole tells that it was put together in fragment.buf.
func (rd *reader) notify(payload []byte, whole bool) error {
	c := rd.conn
	if c.notifies.Add(1) == 1 {
		c.agent.notified.Store(true)
	}
	f := &rd.frame
	if rd.calls == 0 && !rd.room() { // else there was room, and nothing has gone to workers
		return net.ErrClosed
	}
	if !c.pace.inline() || !rd.allowed() {
		return rd.spread(payload, whole)
	}
	j := rd.job
	if whole { // the job has it from now on
		j.buf, c.fragment.buf = payload, j.buf[:0]
	}
	j.begin(f, f.ids, rd.arrived)
	if err := j.decode(payload); err != nil {
		return err
	}
	if rd.began == 0 { // what others had before doesn't count
		rd.began = c.workers.clock()
	}
	rd.begin()
	c.workers.heat(&c.lane)
	c.workers.handle(j)
	if !rd.call.end() {
		c.complete(j)
		return errTaken
	}
	rd.calls++
	actions := j.actions.buf
	if j.fault != faultNone {
		actions = append(actions, c.workers.faultVars[j.fault]...)
	}
	start := len(rd.out)
	rd.out = appendAck(rd.out, flagFIN, j.ids, actions)
	c.debug("sent", rd.out[start:])
	if c.pace.slow {
		rd.endBatch()
	}
	return nil
}

// spread has workers answer the NOTIFY in payload.
func (rd *reader) spread(payload []byte, whole bool) error {
	f, c := &rd.frame, rd.conn
	rd.endBatch()
	rd.began = 0
	j := newJob(&c.lane)
	if whole { // the job has it from now on
		c.fragment.buf, j.buf = j.buf[:0], payload
	} else {
		j.buf = append(j.buf[:0], payload...)
	}
	j.buf = append(j.buf, f.ids...)
	n := len(payload)
	j.begin(f, j.buf[n:], rd.arrived)
	if err := j.decode(j.buf[:n:n]); err != nil {
		return err
	}
	c.workers.spread(j)
	return nil
}

// fragment adds a frame to the NOTIFY that is being put together (SPOE.txt
// 3.3).
func (rd *reader) fragment() error {
	f, c := &rd.frame, rd.conn
	g := &c.fragment
	switch limit := c.agent.fragmentation; {
	case limit == 0:
		return fault(StatusNoFragmentation, "")
	case g.open && (f.kind == frameNotify || f.stream != g.stream || f.id != g.id):
		return fault(StatusInterlaced, "fragment of %d, %d within %d, %d", f.stream, f.id, g.stream, g.id)
	case f.kind == frameNotify:
		*g = fragment{open: true, stream: f.stream, id: f.id, buf: g.buf[:0]}
	case g.refused && f.stream == g.stream && f.id == g.id:
		g.refused = !f.fin() && !f.abort()
		return nil
	case !g.open:
		return fault(StatusFrameIDNotFound, "fragment of %d, %d without a beginning", f.stream, f.id)
	}
	if f.fin() || f.abort() {
		g.open = false
	}
	if f.abort() {
		return nil
	}
	if len(g.buf)+len(f.payload) > c.agent.fragmentation {
		// HAProxy ends it here, or says the rest if that is on its way.
		g.refused, g.open, g.buf = g.open, false, nil
		start := len(rd.out)
		rd.out = appendAck(rd.out, flagFIN|flagAbort, f.ids, c.agent.faultVars[faultError])
		c.debug("sent", rd.out[start:])
		return nil
	}
	g.buf = append(g.buf, f.payload...)
	if !f.fin() {
		return nil
	}
	return rd.notify(g.buf, true)
}

// allowed tells whether the reader may run a handler itself: not while others
// wait for leave to.
func (rd *reader) allowed() bool {
	if rd.leave && rd.conn.workers.waiting.Load() > 0 {
		rd.pause()
	}
	if !rd.leave {
		rd.leave = rd.conn.workers.acquire()
	}
	return rd.leave
}

// endBatch ends a row of calls made inline, and has the pace judge it.
func (rd *reader) endBatch() {
	if rd.calls == 0 {
		return
	}
	c := rd.conn
	now := c.workers.clock()
	took := now - rd.began
	waited := rd.calls > 1 || rd.r < rd.w
	if !waited && took > slowCall {
		c.mu.Lock()
		waited = c.pending > 0
		c.mu.Unlock()
	}
	c.pace.batch(rd.calls, took, waited)
	rd.calls, rd.began = 0, now
}

// pause sends the ACKs and lets others run handlers: whatever may block comes
// after it.
func (rd *reader) pause() {
	rd.endBatch()
	if rd.leave {
		rd.leave = false
		rd.conn.workers.release()
	}
	rd.flush()
}

// flush sends the reader's ACKs. If too much is left unsent, it waits.
func (rd *reader) flush() {
	if len(rd.out) == 0 {
		return
	}
	c := rd.conn
	c.mu.Lock()
	rd.merge()
	c.write(rd.began)
	if !c.writing {
		rd.out, c.spare = c.spare[:0], rd.out // what has just been sent is in the cache
	}
	for c.writing && len(c.out) > backlog {
		rd.began = 0
		c.moved.Wait()
	}
	c.mu.Unlock()
}

// merge adds the reader's ACKs to what is to be sent. With mu held.
func (rd *reader) merge() {
	c := rd.conn
	if len(c.out) == 0 {
		c.out, rd.out = rd.out, c.out[:0]
		return
	}
	c.out = append(c.out, rd.out...)
	rd.out = rd.out[:0]
}

// full tells whether the connection has enough to do for now. With mu held.
func (c *conn) full() bool {
	return !c.gone && (c.pending >= c.window || c.writing && len(c.out) > backlog)
}

// room waits until the connection may have one more NOTIFY in flight. It may
// not if nobody is there any more for the answer: then what has been read of an
// async one, which is little, is answered all the same, by its siblings.
func (rd *reader) room() bool {
	c := rd.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.full() {
		c.mu.Unlock()
		rd.pause()
		rd.began = 0
		c.mu.Lock()
	}
	for c.full() {
		c.moved.Wait()
	}
	return !c.gone || c.async && c.ctx.Err() == nil
}

// fill reads what has come, and waits for it if nothing has.
func (rd *reader) fill() error {
	c := rd.conn
	if rd.r > 0 {
		rd.w = copy(rd.buf, rd.buf[rd.r:rd.w])
		rd.r = 0
	}
	if rd.w == len(rd.buf) {
		// The buffer was filled by what has come, never by what is announced.
		if limit := max(maxBuffer, lengthSize+c.frameSize); len(rd.buf) < limit {
			rd.grow(min(2*len(rd.buf), limit))
		}
	}
	// Time counts against the peer only while somebody reads. Writing may have
	// taken long; where that counts, the time since the last call won't do.
	now := rd.began
	if rd.w > 0 || now <= rd.arrived || c.agent.idleTimeout > 0 || c.agent.phase.Load() != serving {
		now = c.workers.clock()
	}
	c.last = now
	if rd.w > 0 && c.began == 0 {
		c.began = now
	}
	for ; ; now = c.workers.clock() {
		if err := rd.arm(now); err != nil {
			return err
		}
		n, err := c.nc.Read(rd.buf[rd.w:])
		if n > 0 {
			rd.w += n
			if rd.w == len(rd.buf) && rd.w < maxBuffer {
				rd.grow(2 * len(rd.buf))
			}
			rd.arrived = c.workers.clock()
			rd.began, c.used = rd.arrived, true
			return nil
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			if err == nil {
				continue
			}
			return err
		}
	}
}

func (rd *reader) grow(size int) {
	b := make([]byte, size)
	copy(b, rd.buf[:rd.w])
	rd.buf = b
}

// arm sees to it that reading ends when there is something else to do, and does
// that if it is time.
func (rd *reader) arm(now time.Duration) error {
	c := rd.conn
	a := c.agent
	phase, left := a.phase.Load(), c.listener.left.Load()
	// The deadline is moved once it is over, not with each frame.
	if now < c.armed && c.armed <= now+shrinkIn && c.used && c.agreed && c.began == 0 && a.rotation == 0 && phase == serving {
		return nil // nothing can be due before
	}
	next, err := rd.due(now, phase)
	if err != nil || c.armed > now && (next == 0 || c.armed <= next) && phase == serving {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if a.phase.Load() != phase || c.listener.left.Load() != left {
		return nil // wake has set, or will set, a deadline that is past
	}
	c.armed = next
	if next == 0 {
		c.nc.SetReadDeadline(time.Time{})
	} else {
		c.nc.SetReadDeadline(c.workers.epoch.Add(next))
	}
	return nil
}

// due returns when there is something to do besides reading, 0 for never, or
// why the connection is to end now.
func (rd *reader) due(now time.Duration, phase int32) (next time.Duration, _ error) {
	c := rd.conn
	a := c.agent
	at := func(t time.Duration) bool {
		if now >= t {
			return true
		}
		if next == 0 || t < next {
			next = t
		}
		return false
	}
	c.mu.Lock()
	answered, held := c.pending == 0 && !c.writing, c.held
	c.mu.Unlock()
	free := answered && rd.w == 0
	if phase >= stopping && c.part.until == 0 {
		c.part.until = now + 2*partFor
	}
	switch {
	case phase >= stopping && (!c.agreed || at(c.part.until)):
		return 0, errStopping
	case !c.agreed && at(c.opened+a.helloTimeout):
		return 0, fault(StatusTimeout, "no HELLO within %v", a.helloTimeout)
	case c.began > 0 && at(c.began+a.helloTimeout):
		return 0, fault(StatusTimeout, "no whole frame within %v", a.helloTimeout)
	case a.rotation > 0 && c.notifies.Load() >= uint64(a.rotation):
		if free {
			return 0, errRotated
		}
		at(now + tick)
	}
	if phase >= draining {
		// Who leaves because of its health checks does so in its own time; whose
		// listener has been closed, at once. These part, even if they are quiet:
		// HAProxy may come back to any of its connections while others are in use.
		from, left := time.Duration(a.quietFrom.Load()), c.listener.left.Load()
		if left {
			from = 0
		}
		parts := c.agreed && (left || from > 0)
		if !parts && at(max(c.last+quietTime, from)) {
			if answered {
				return 0, errStopping
			}
			at(now + quietTime/4)
		}
		full := held && c.notifies.Load()-c.part.count >= partWindow
		if c.agreed && phase >= stopping || parts && at(from) {
			if full || at(c.part.next) {
				if err := c.parts(now); err != nil {
					return 0, err
				}
			}
			at(c.part.next)
		}
	}
	if a.idleTimeout > 0 && c.agreed && at(c.last+a.idleTimeout) {
		if free {
			return 0, fault(StatusTimeout, "idle for %v", a.idleTimeout)
		}
		at(now + a.idleTimeout)
	}
	if c.used && at(c.last+shrinkIn) {
		if answered && rd.w < minBuffer { // else nothing more could be read
			rd.shrink()
		} else {
			at(now + shrinkIn)
		}
	}
	return next, nil
}

// shrink lets go of the memory that an idle connection can do without.
func (rd *reader) shrink() {
	c := rd.conn
	c.used = false
	if len(rd.buf) > minBuffer {
		b := make([]byte, minBuffer)
		copy(b, rd.buf[:rd.w])
		rd.buf = b
	}
	rd.frame = frame{} // a view
	rd.out, rd.job.buf, rd.job.actions.buf = nil, nil, nil
	rd.job.ids = nil
	rd.job.release()
	if !c.fragment.open {
		c.fragment.buf = nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.spare = nil
	if len(c.out) == 0 {
		c.out = nil
	}
}

// parting is how a drain closes a connection that is never quiet. HAProxy up to
// 3.0 goes on using its connections to a server that is down, and loses what it
// has sent when the AGENT-DISCONNECT comes. So the answers are held back for a
// moment, until it sends no more: because as many NOTIFYs are in flight as it
// allows, or because all who ask are waiting. Then they leave together with the
// AGENT-DISCONNECT, in one Write, which HAProxy deals with before it sends
// anything. If that moment doesn't come, the answers leave, and it is tried
// again. Those whom one connection answers ask again, perhaps by another one: so
// all of a host hold back, and one is closed after the other.
//
// That nobody has sent for a while proves little where processes wait for the
// processor. So, unless all of a host has been still for quietTime, as many have
// to wait as did in the rounds before: somebody who has only not come to sending
// would be missing.
type parting struct {
	until time.Duration // when to close the connection anyway; the reader's
	next  time.Duration // when to look again; likewise
	began time.Duration // of holding back; likewise
	tries int           // without success; likewise

	// Guarded by the connection's mu.
	count uint64        // NOTIFYs answered when holding back began
	seen  uint64        // NOTIFYs at the last look
	quiet time.Duration // since when looks have found no more of them
	looks int           // since then
	still bool          // for quietTime
	ready bool          // to be closed, at the last look
	done  bool          // its AGENT-DISCONNECT is among what is to be sent
}

// partings are those of a host's connections. Guarded by the agent's mu.
type partings struct {
	next   time.Duration // when to look again who is ready
	freed  time.Duration // when answers that were held back have left
	retry  time.Duration // when to hold back again
	rounds int           // of holding back that are over
	most   [partRounds]uint64
}

// waiting is told how many answers are held back, and tells whether that is as
// many as in any of the last rounds.
func (h *partings) waiting(n uint64) bool {
	m := &h.most[h.rounds%partRounds]
	*m = max(*m, n)
	return h.rounds >= partRounds-1 && n >= slices.Max(h.most[:])
}

// roundOver has the next round begin in a moment.
func (h *partings) roundOver(now time.Duration) {
	h.retry = now + partRetry
	h.rounds++
	h.most[h.rounds%partRounds] = 0
}

const (
	partFor    = 50 * time.Millisecond // that answers are held back at most
	partQuiet  = 20 * time.Millisecond // without a NOTIFY: nobody sends any more
	partLooks  = 5                     // in that time, since a process that has not run has seen nothing
	partFirst  = 40 * time.Millisecond // likewise, of a new connection: there is a reason for it
	partRetry  = 100 * time.Millisecond
	partRounds = 3  // to compare
	partTries  = 20 // rounds, for all at the same time
	partWindow = 20 // HAProxy's max-waiting-frames, by default
)

// parts returns why the connection can be closed now, if it can, and else does
// what is next to be done about it.
func (c *conn) parts(now time.Duration) error {
	p := &c.part
	c.mu.Lock()
	n := c.notifies.Load()
	if p.done {
		c.mu.Unlock()
		return errParted
	}
	p.next = now + tick
	if p.still = c.pending == 0 && now-c.last >= quietTime; p.still {
		p.next = now + partQuiet // there may be thousands
	}
	if p.looks++; n != p.seen || !c.held {
		p.seen, p.quiet, p.looks = n, now, 0
	}
	if !c.held {
		c.held = true
		p.began, p.count = now, n-uint64(c.pending)
	}
	enough := partQuiet
	if n == 0 {
		enough = partFirst
	}
	quiet := p.still || n-p.count >= partWindow || now-p.quiet >= enough && p.looks >= partLooks
	p.ready = quiet && c.pending == 0 && c.began == 0 && !c.fragment.open
	ready := p.ready
	c.mu.Unlock()
	if over := now-p.began >= partFor; ready || over {
		for _, s := range c.agent.part(c, now, over) {
			s.mu.Lock()
			s.held = false
			s.write(now)
			s.mu.Unlock()
		}
	}
	return nil
}

// part returns the connections the answers of which are to leave now. Those that
// are to be closed have an AGENT-DISCONNECT among them. If all of c's host are
// ready for that, these are all that have no answers, or else one that has; then
// the others have to be quiet again. If c can't wait any longer, it is c, which is
// closed only if it is ready and trying further is no use.
func (a *Agent) part(c *conn, now time.Duration, over bool) (list []*conn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	h := a.partings[c.host]
	if h == nil {
		h = new(partings)
		if a.partings == nil {
			a.partings = make(map[string]*partings)
		}
		a.partings[c.host] = h
	}
	if now < h.next && !over {
		return nil
	}
	h.next = now + tick // many may be waiting for one
	all, full, still := true, true, true
	held := uint64(0)
	var last *conn
	for s := range a.conns {
		if s.host != c.host || s.listener != c.listener {
			continue
		}
		s.mu.Lock()
		ready := s.part.ready && !s.part.done && s.part.seen == s.notifies.Load()
		counts := !s.gone && s.peer.FrameSize > 0 && !s.peer.HealthCheck && (ready || s.notifies.Load() > 0)
		answers := len(s.out) > 0
		still = still && (s.part.still || !counts)
		if s.held && !s.part.done {
			held += s.part.seen - s.part.count
			full = full && s.part.seen-s.part.count >= partWindow
		}
		s.mu.Unlock()
		switch {
		case !counts:
		case !ready:
			all = false
		case answers:
			last = s
		default:
			list = append(list, s)
		}
	}
	all = (h.waiting(held) || full || still) && all
	switch {
	case all && len(list) > 0:
	case all && last != nil:
		list = append(list, last)
		h.freed = now
	case !over:
		return nil
	default:
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.part.tries++; c.part.ready && now-h.freed >= partQuiet && (c.part.tries > partTries || a.phase.Load() >= stopping) {
			c.partNow()
		} else {
			if now >= h.retry {
				h.roundOver(now)
			}
			c.part.ready, c.part.next = false, h.retry
		}
		h.freed = now
		return []*conn{c}
	}
	for s := range a.conns {
		if s.host == c.host && s.listener == c.listener {
			s.mu.Lock()
			s.part.ready, s.part.quiet, s.part.looks = false, now, 0
			s.mu.Unlock()
		}
	}
	for _, s := range list {
		s.mu.Lock()
		s.partNow()
		s.mu.Unlock()
	}
	return list
}

// partNow says AGENT-DISCONNECT. With mu held.
func (c *conn) partNow() {
	c.part.done = true
	n := len(c.out)
	c.out = appendDisconnect(c.out, frameAgentDisconnect, StatusNormal, shuttingDown)
	c.debug("sent", c.out[n:])
}

const shuttingDown = "shutting down"

// end ends the connection: what is in flight is answered if the peer can still
// read it, it is told why, and the net.Conn is closed.
func (c *conn) end(rd *reader, why error) {
	rd.endBatch()
	if rd.leave {
		c.workers.release()
	}
	var d *DisconnectError
	say, wait := true, true
	status, message := StatusNormal, ""
	switch {
	case errors.As(why, &d) && d.Remote:
	case d != nil:
		status, message = d.Status, d.Error()
	case why == errStopping:
		message = shuttingDown
	case why == errRotated:
		message = "rotated"
	case why == io.EOF:
		say = false
		// The peer may have closed all of the connection, which only a write
		// would show. Its others are there for certain.
		if wait = !c.async || len(c.agent.siblings(c)) == 0; wait {
			defer time.AfterFunc(eofGrace, c.cancel).Stop()
		}
	default:
		say, wait = false, why == errChecked || why == errParted
	}
	if message == "" {
		message = status.String()
	}

	c.mu.Lock()
	rd.merge()
	if wait {
		defer time.AfterFunc(endGrace, c.giveUp).Stop()
		if c.pending > 0 || !say {
			c.held = false
			c.write(0)
		}
	}
	for wait && !c.gone && (c.pending > 0 || c.writing || !say && len(c.out) > 0) {
		c.moved.Wait()
	}
	answers := !c.gone // the peer may still be there
	async := c.async
	var last []byte
	switch {
	case answers && wait:
		if say { // in one Write with the last answers, see parting
			n := len(c.out)
			last = appendDisconnect(c.out, frameAgentDisconnect, status, message)
			c.debug("sent", last[n:])
		}
		c.gone = true
		c.out, c.spare = nil, nil
	case answers:
		c.lose(c.out)
	}
	left := c.pending
	c.mu.Unlock()

	if last != nil {
		c.send(last, 0)
	}
	if !async || left == 0 || len(c.agent.siblings(c)) == 0 {
		c.cancel()
	}
	if answers && (say || why == errChecked || why == errParted) {
		linger(c.nc)
	}
	c.nc.Close()
	c.agent.remove(c)
	c.ended(why)
}

// linger waits until the peer has seen what was written last: closing at once
// would reset the connection if the peer has sent what was not read.
func linger(nc net.Conn) {
	if cw, ok := nc.(interface{ CloseWrite() error }); ok && cw.CloseWrite() == nil {
		nc.SetReadDeadline(time.Now().Add(lingerFor))
		io.Copy(io.Discard, io.LimitReader(nc, 1<<20))
	}
}

// ended tells why the connection ended.
func (c *conn) ended(why error) {
	c.mu.Lock()
	if c.werr != nil {
		why = c.werr
	}
	c.mu.Unlock()
	var d *DisconnectError
	switch {
	case errors.As(why, &d):
	case why == io.EOF, why == errChecked, why == errRotated, why == errStopping, why == errParted, errors.Is(why, net.ErrClosed),
		errors.Is(why, syscall.ECONNRESET), errors.Is(why, syscall.EPIPE), errors.Is(why, io.ErrClosedPipe):
		why = nil
	}
	if c.agent.hooks.ConnClosed != nil {
		c.agent.hooks.ConnClosed(c.peer, why)
	}
	if why == nil || d != nil && d.Status <= StatusTimeout {
		level.Debug(c.logger()).Log("msg", "connection ended", "err", why)
		return
	}
	kind := "connection"
	if d != nil {
		kind = d.Status.String()
	}
	if n, ok := c.workers.limit.allow(kind); ok {
		level.Warn(c.logger()).Log("msg", "connection ended", "err", why, "suppressed", n)
	}
}
