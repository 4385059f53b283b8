package spoa

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/go-kit/log"
	"github.com/go-kit/log/level"
	"github.com/spoa-go/spoa/internal/drain"
	"github.com/spoa-go/spoa/internal/outbox"
	"github.com/spoa-go/spoa/internal/pace"
)

const (
	minBuffer = 4 << 10  // of an idle connection
	maxBuffer = 64 << 10 // to read into, unless frames are larger
	batchSize = 16 << 10 // of ACKs, before they are sent though more could follow
	shrinkIn  = time.Second
	eofGrace  = time.Second     // for handlers of a peer that sends no more
	endGrace  = 5 * time.Second // for the last answers
	lingerFor = 500 * time.Millisecond
)

// conn is a connection of HAProxy's. It owns the net.Conn. At any time one
// goroutine is its reader.
type conn struct {
	queue            // its NOTIFYs with the workers
	box   outbox.Box // its answers

	// Set by newConn.
	agent    *Agent
	listener *listener
	nc       net.Conn
	host     string // of its peer
	cancel   context.CancelFunc
	opened   time.Duration

	// For any goroutine to read.
	peer     atomic.Pointer[Peer] // set anew at the HELLO
	notifies atomic.Uint64        // received
	lastUsed atomic.Int64         // when the reader had dealt with what it had read, and went on reading: a time.Duration
	partial  atomic.Bool          // what was read ends within a frame, or within a fragmented NOTIFY
	leaving  atomic.Bool          // the reader is to end the connection, or is about to

	sender   sender     // belongs to the goroutine that writes
	draining drain.Conn // belongs to the drain

	// The reader's.
	rd          *reader // the reader itself; changed by handOver
	greeted     bool    // the HELLOs have been exchanged
	agreed      terms
	fragments   assembler
	armed       time.Duration // when the read deadline is; 0: none
	frameStart  time.Duration // when the frame that is being read began; 0: none is
	notifyStart time.Duration // when the fragmented NOTIFY began, plus the time since in which nothing was read; 0: none is open
	used        bool          // something was received since the buffers were shrunk
}

func newConn(a *Agent, l *listener, nc net.Conn) *conn {
	c := &conn{agent: a, listener: l, nc: nc, opened: a.workers.clock()}
	addr := nc.RemoteAddr()
	if addr != nil { // a net.Conn of the program's own may have none
		c.host = addr.String()
	}
	if h, _, err := net.SplitHostPort(c.host); err == nil {
		c.host = h
	}
	c.peer.Store(&Peer{Addr: addr})
	c.agreed.frameSize = helloFrameSize
	c.fragments.max = a.fragmentation
	c.lastUsed.Store(int64(c.opened))
	c.sender = sender{conn: c, nc: nc}
	nc.SetWriteDeadline(a.workers.epoch.Add(c.opened + a.helloTimeout)) // of a TLS handshake, which writes within Read
	c.box.Init(&c.sender, a.pipelining, &a.workers.inFlight)
	c.queue.workers, c.queue.box, c.queue.taker = a.workers, &c.box, c
	c.ctx, c.cancel = context.WithCancel(a.ctx)
	c.rd = newReader(c)
	c.turn.Store(&c.rd.turn)
	return c
}

// inFlight returns how many NOTIFYs have no answer yet.
func (c *conn) inFlight() int {
	answered := c.box.Answered() // before notifies, so that it is not more
	return int(c.notifies.Load() - answered)
}

// drainLook returns what the connection looks like to the drain; seen is what it
// returned last.
func (c *conn) drainLook(seen drain.Look) drain.Look {
	answered := seen.Answered
	if answered != seen.Notifies || c.notifies.Load() != seen.Notifies { // else nothing was answered since
		answered = c.box.Answered() // before notifies, so that it is not more
	}
	return drain.Look{
		Agreed:   c.peer.Load().FrameSize > 0,
		Notifies: c.notifies.Load(),
		Answered: answered,
		Partial:  c.partial.Load(),
		LastUsed: time.Duration(c.lastUsed.Load()),
	}
}

// part ends the connection for the drain, which saw it as seen. The reader sends
// the AGENT-DISCONNECT in one Write with the answers held back, and with those to
// what it has read meanwhile. With force part does so though a NOTIFY has no
// answer yet; otherwise it then reports false. It does not block.
func (c *conn) part(seen drain.Look, force bool) bool {
	if seen.Agreed && !c.box.Part(seen.Notifies, &c.notifies) {
		if !force {
			return false
		}
		c.box.Release()  // the reader may wait until less is unsent
		go c.box.Flush() // it blocks if the peer does not read
	}
	c.leave()
	return true
}

// leave makes the reader end the connection.
func (c *conn) leave() {
	c.leaving.Store(true)
	c.nc.SetReadDeadline(time.Unix(1, 0))
}

// abort ends the connection whatever is in flight.
func (c *conn) abort() {
	c.cancel()
	c.box.Abort()
	c.nc.Close()
}

func (c *conn) logger() log.Logger {
	return log.With(c.agent.options.logger, "peer", c.peer.Load().Addr, "engine", clip(c.engine))
}

// debug logs a frame, if that is asked for. It is short to be inlined.
func (c *conn) debug(what string, frame []byte) {
	if c.agent.options.debug {
		c.logFrame(what, frame)
	}
}

func (c *conn) logFrame(what string, frame []byte) {
	level.Debug(c.logger()).Log("msg", what, "frame", describe(frame))
}

// sender writes to a net.Conn, for an outbox. It belongs to the goroutine that
// writes.
type sender struct {
	conn  *conn
	nc    net.Conn
	armed time.Duration // when the write deadline is
}

// WriteFrames implements outbox.Writer.
func (s *sender) WriteFrames(b []byte, now time.Duration) (int, error) {
	c := s.conn
	if now == 0 {
		now = c.workers.clock()
	}
	// The deadline is moved only now and then: that costs as much as a small
	// write does.
	if d := c.agent.writeTimeout; s.armed < now+d {
		s.armed = now + d + d/4
		s.nc.SetWriteDeadline(c.workers.epoch.Add(s.armed))
	}
	if c.agent.options.debug {
		for rest := b; len(rest) > 0; {
			size := outbox.FrameLen(rest)
			c.logFrame("sent", rest[:size])
			rest = rest[size:]
		}
	}
	n, err := s.nc.Write(b)
	if err != nil {
		s.nc.Close() // wakes the reader
	}
	return n, err
}

// ending is why a connection ends, and what is still done for its peer. As an
// error it ends the reader.
type ending struct {
	err     error // what the hook and the log are told; nil: a normal end
	status  Status
	message string
	say     bool // the peer is told, by an AGENT-DISCONNECT with status and message
	wait    bool // what is in flight is answered first
	linger  bool // the peer is given time to read what was written last
	eof     bool // the peer sends no more, and may be gone
}

func (e *ending) Error() string { return e.message }

// The endings that the agent chooses. Others follow from an error; see endingOf.
var (
	endChecked  = &ending{message: "health check answered", wait: true, linger: true}
	endRotated  = &ending{message: "rotated", say: true, wait: true, linger: true}
	endStopping = &ending{message: "shutting down", say: true, wait: true, linger: true}
)

// endingOf returns the ending of a connection whose reader has ended with err.
func endingOf(err error) *ending {
	var e *ending
	var d *DisconnectError
	switch {
	case errors.As(err, &e):
		return e
	case errors.As(err, &d) && d.Remote: // the answer to a DISCONNECT
		return &ending{err: d, message: StatusNormal.String(), say: true, wait: true, linger: true}
	case d != nil:
		return &ending{err: d, status: d.Status, message: d.Error(), say: true, wait: true, linger: true}
	case err == io.EOF:
		return &ending{wait: true, eof: true}
	case isClosed(err):
		return &ending{}
	}
	return &ending{err: err}
}

// isClosed reports whether err is of a connection that either side has closed.
func isClosed(err error) bool {
	return errors.Is(err, net.ErrClosed) || errors.Is(err, io.ErrClosedPipe) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// end ends the connection: what is in flight is answered if the peer can still
// read it, the peer is told why, and the net.Conn is closed.
func (c *conn) end(rd *reader, why error) {
	c.leaving.Store(true)
	rd.endBatch()
	if rd.permit {
		c.workers.release()
	}
	e := endingOf(why)
	wait := e.wait
	if e.eof {
		// The peer may have closed all of the connection, which only a write
		// would show. Its siblings are there for certain.
		if wait = c.box.Siblings() == 0; wait {
			defer time.AfterFunc(eofGrace, c.cancel).Stop()
		}
	}
	var bye []byte
	if e.say {
		bye = appendDisconnect(nil, frameAgentDisconnect, e.status, e.message)
	}
	if wait {
		defer time.AfterFunc(endGrace, c.abort).Stop()
	}
	alive := c.box.Close(rd.out, rd.acks, bye, wait)
	shared := c.box.Siblings() > 0 // they carry the answers of what is still in flight
	if !shared {
		c.cancel()
	}
	if alive && e.linger {
		linger(c.nc, lingerFor)
	}
	c.nc.Close()
	c.logEnd(e)
	c.agent.forget(c)
	if shared {
		c.box.WaitAnswered()
		c.cancel()
	}
}

// refuse closes a connection beyond WithMaxConns, and tells its peer why, as far
// as that takes no time.
func (a *Agent) refuse(c *conn) {
	c.cancel()
	if n, ok := a.workers.limit.Allow("max conns"); ok {
		level.Warn(a.logger).Log("msg", "connection refused: too many", "max", a.maxConns, "suppressed", n)
	}
	if !a.refusing.CompareAndSwap(false, true) {
		go c.nc.Close()
		return
	}
	go func() {
		defer a.refusing.Store(false)
		c.nc.SetDeadline(time.Now().Add(refuseFor))
		c.nc.Write(appendDisconnect(nil, frameAgentDisconnect, StatusNoResources, "too many connections"))
		linger(c.nc, refuseFor)
		c.nc.Close()
	}()
}

// linger waits until the peer has seen what was written last: closing at once
// would reset the connection if the peer has sent what was not read.
func linger(nc net.Conn, d time.Duration) {
	cw, ok := nc.(interface{ CloseWrite() error })
	if !ok || cw.CloseWrite() != nil {
		return
	}
	until := time.Now().Add(d)
	rest := io.LimitReader(nc, 1<<20)
	for {
		nc.SetReadDeadline(until)
		// The drain may set a deadline that is over, once, in this very moment.
		if _, err := io.Copy(io.Discard, rest); !errors.Is(err, os.ErrDeadlineExceeded) || !time.Now().Before(until) {
			return
		}
	}
}

// logEnd reports why the connection ended.
func (c *conn) logEnd(e *ending) {
	err := e.err
	if werr := c.box.Err(); werr != nil {
		if err = werr; isClosed(werr) {
			err = nil
		}
	}
	if c.agent.hooks.ConnClosed != nil {
		c.agent.hooks.ConnClosed(*c.peer.Load(), err)
	}
	var d *DisconnectError
	if err == nil || errors.As(err, &d) && d.Status <= StatusTimeout {
		level.Debug(c.logger()).Log("msg", "connection ended", "err", clipError(err))
		return
	}
	kind := "connection"
	if d != nil {
		kind = d.Status.kind()
	}
	if n, ok := c.workers.limit.Allow(kind); ok {
		level.Warn(c.logger()).Log("msg", "connection ended", "err", clipError(err), "suppressed", n)
	}
}

const maxLogged = 200 // bytes of what a peer chose

// clip cuts what a peer chose to a length fit for a log.
func clip(s string) string {
	if len(s) > maxLogged {
		return s[:maxLogged] + "..."
	}
	return s
}

// clipError cuts the text of err to a length fit for a log.
func clipError(err error) any {
	if err == nil {
		return nil
	}
	return clip(err.Error())
}

// reader is a goroutine that reads a connection, and what it needs for that. If
// a handler stalls, a new reader takes over the connection, and this one only
// answers its NOTIFY and ends.
type reader struct {
	turn
	conn       *conn
	buf        []byte
	r, w       int // buf[r:w] has yet to be handled
	frame      frame
	out        []byte        // ACKs of the calls made
	acks       int           // NOTIFYs that these answer
	permit     bool          // to run handlers
	calls      int           // of the batch: handler calls made inline in a row
	batchStart time.Duration // start of the batch; before its first call the last clock reading, 0 if that is too old
	arrived    time.Duration // when the bytes came
}

func newReader(c *conn) *reader {
	rd := &reader{conn: c, buf: make([]byte, minBuffer)}
	rd.job = newJob(&c.queue)
	return rd
}

// handOver makes a new reader go on where the current one stands, whose handler
// has stalled. The caller must have taken the reader's turn.
func (c *conn) handOver() {
	old, rd := c.rd, newReader(c)
	rest := old.buf[old.r:old.w]
	if len(rest) > len(rd.buf) {
		rd.buf = make([]byte, len(old.buf))
	}
	rd.w = copy(rd.buf, rest)
	rd.out, old.out = old.out, nil
	rd.acks, old.acks = old.acks, 0
	rd.arrived, rd.batchStart = old.arrived, c.workers.clock()
	c.rd = rd
	c.turn.Store(&rd.turn)
	go rd.run()
}

// errTaken ends a reader whose connection has another one.
var errTaken = errors.New("another reader has the connection")

func (rd *reader) run() {
	exited := true
	defer func() {
		if exited {
			rd.conn.queue.exited(rd)
		}
	}()
	rd.flush() // what the reader before has answered
	err := rd.serve()
	exited = false
	if err != errTaken {
		rd.conn.end(rd, err)
	}
}

// serve handles all the frames there are, sends their ACKs, and waits for more.
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
		if err := rd.read(); err != nil {
			return err
		}
	}
}

// next takes a complete frame, if there is one.
func (rd *reader) next() (bool, error) {
	c := rd.conn
	b := rd.buf[rd.r:rd.w]
	if len(b) < lengthSize {
		return false, nil
	}
	if !c.greeted {
		if d := otherProtocol(b); d != nil {
			return false, d
		}
	}
	size := binary.BigEndian.Uint32(b)
	switch {
	case size > uint32(c.agreed.frameSize):
		return false, fault(StatusFrameTooBig, "%d bytes, limit %d", size, c.agreed.frameSize)
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
	c.frameStart = 0
	c.debug("received", b[:end])
	return true, nil
}

// handle deals with one frame.
func (rd *reader) handle() error {
	f, c := &rd.frame, rd.conn
	if !c.greeted {
		return rd.hello()
	}
	switch f.kind {
	case frameNotify:
		switch {
		case f.abort():
			return nil
		case !f.fin():
			return rd.fragment()
		case c.fragments.open && !c.agreed.pipelining:
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
	c, a := rd.conn, rd.conn.agent
	h, err := rd.frame.hello()
	if err != nil {
		return err
	}
	if h.healthcheck {
		if a.phase.Load() != serving {
			return endStopping
		}
		a.checked(c)
	}
	c.agreed, c.greeted = negotiate(h, a.terms()), true
	c.ackSize = c.agreed.frameSize - (minFrameLen - 2)
	peer := &Peer{c.peer.Load().Addr, h.engineID, c.agreed.capabilities(), c.agreed.frameSize, h.healthcheck}
	c.engine, c.queue.hello, rd.job.peer = h.engineID, peer, peer
	c.peer.Store(peer) // last: from now on the drain may write, which logs the engine
	a.greeted()
	rd.out = appendHello(rd.out, frameAgentHello, &hello{versions: version, frameSize: uint32(c.agreed.frameSize), capabilities: c.agreed.capabilities()})
	rd.flush()
	if h.healthcheck {
		return endChecked
	}
	if c.agreed.async { // not before: siblings' ACKs would overtake the HELLO
		a.join(c)
	}
	level.Debug(c.logger()).Log("msg", "hello", "capabilities", c.agreed.capabilities(), "offered", clip(h.capabilities),
		"frame_size", c.agreed.frameSize)
	return nil
}

// notify answers the NOTIFY in payload: here and now, or by workers. Reassembled
// reports whether payload is the assembler's buffer, which then passes to the
// job.
func (rd *reader) notify(payload []byte, reassembled bool) error {
	c := rd.conn
	if c.notifies.Add(1) == 1 {
		c.agent.notified(c)
	}
	f := &rd.frame
	if rd.calls == 0 { // else there was room, and nothing has gone to workers
		if err := rd.waitForRoom(); err != nil {
			return err
		}
	}
	if !c.pace.Inline() || !rd.allowed() {
		return rd.spread(payload, reassembled)
	}
	j := rd.job
	if reassembled {
		j.buf = c.fragments.swap(j.buf)
	}
	j.begin(f, f.ids, rd.arrived)
	if err := j.decode(payload); err != nil {
		return err
	}
	if len(j.bounds) > 0 { // it may have to wait
		j.trim()
		return rd.spread(payload, false)
	}
	if rd.batchStart == 0 { // the first call of a batch: time spent before it is not its own
		rd.batchStart = c.workers.clock()
	}
	rd.turn.begin()
	c.workers.watchQueue(&c.queue)
	c.workers.handle(j)
	if !rd.turn.end() {
		c.complete(j)
		return errTaken
	}
	rd.calls++
	rd.out = appendAck(rd.out, flagFIN, j.ids, j.beside(j.actions.buf, j.faulty), j.faulty)
	rd.acks++
	if cap(j.buf) > maxPooled { // of a reassembled NOTIFY
		j.trim()
	}
	if c.pace.Slow() {
		rd.endBatch()
	}
	return nil
}

// spread gives the NOTIFY in payload to the workers.
func (rd *reader) spread(payload []byte, reassembled bool) error {
	f, c := &rd.frame, rd.conn
	rd.endBatch()
	rd.batchStart = 0
	j := newJob(&c.queue)
	if reassembled {
		j.buf = c.fragments.swap(j.buf)
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

// fragment adds a frame to the NOTIFY that is being put together.
func (rd *reader) fragment() error {
	f, c := &rd.frame, rd.conn
	payload, result, err := c.fragments.add(f)
	switch {
	case err != nil:
		return err
	case result == tooLong:
		rd.out = appendAck(rd.out, flagFIN|flagAbort, f.ids, c.agent.faultActions[FaultError])
	case result == complete:
		c.notifyStart = 0
		return rd.notify(payload, true)
	}
	switch {
	case !c.fragments.open:
		c.notifyStart = 0
	case c.notifyStart == 0:
		c.notifyStart = rd.arrived
	}
	return nil
}

// allowed reports whether the reader may run a handler itself: not while others
// wait for a permit.
func (rd *reader) allowed() bool {
	if rd.permit && rd.conn.workers.waiting.Load() > 0 {
		rd.pause()
	}
	if !rd.permit {
		rd.permit = rd.conn.workers.acquire()
	}
	return rd.permit
}

// endBatch ends a batch of calls made inline, and gives it to the pace to judge.
func (rd *reader) endBatch() {
	if rd.calls == 0 {
		return
	}
	c := rd.conn
	now := c.workers.clock()
	took := now - rd.batchStart
	waited := rd.calls > 1 || rd.r < rd.w
	if !waited && took > pace.SlowCall {
		waited = c.box.Busy()
	}
	c.pace.Batch(rd.calls, took, waited)
	rd.calls, rd.batchStart = 0, now
}

// pause sends the ACKs and lets others run handlers. It is called before
// whatever may block.
func (rd *reader) pause() {
	rd.endBatch()
	if rd.permit {
		rd.permit = false
		rd.conn.workers.release()
	}
	rd.flush()
}

// flush sends the reader's ACKs. If too much is left unsent, it waits.
func (rd *reader) flush() {
	if len(rd.out) == 0 {
		return
	}
	var waited bool
	rd.out, waited = rd.conn.box.Send(rd.out, rd.acks, rd.batchStart)
	rd.acks = 0
	if waited {
		rd.batchStart = 0
	}
}

// waitForRoom waits until another NOTIFY may be in flight. It fails if no answer
// can be sent any more, unless siblings can carry it.
func (rd *reader) waitForRoom() error {
	c := rd.conn
	room, open := c.box.Room()
	if !room {
		rd.pause()
		rd.batchStart = 0
		open = c.box.WaitForRoom()
	}
	if open || c.box.Siblings() > 0 && c.ctx.Err() == nil {
		return nil
	}
	return endStopping
}

// read reads what there is, and waits if there is nothing.
func (rd *reader) read() error {
	c := rd.conn
	if rd.r > 0 {
		rd.w = copy(rd.buf, rd.buf[rd.r:rd.w])
		rd.r = 0
	}
	if rd.w == len(rd.buf) {
		// The buffer was filled by what was sent, never by what is announced.
		if limit := max(maxBuffer, lengthSize+c.agreed.frameSize); len(rd.buf) < limit {
			rd.grow(min(2*len(rd.buf), limit))
		}
	}
	// Time counts against the peer only while its frames are read. Writing may
	// have taken long; where that counts, the time since the last call won't do.
	now := rd.batchStart
	if rd.w > 0 || now <= rd.arrived || c.agent.idleTimeout > 0 || c.fragments.open {
		now = c.workers.clock()
	}
	c.lastUsed.Store(int64(now))
	if rd.w > 0 && c.frameStart == 0 {
		c.frameStart = now
	}
	if c.notifyStart > 0 {
		c.notifyStart += now - rd.arrived
	}
	if partial := rd.w > 0 || c.fragments.open; partial != c.partial.Load() {
		c.partial.Store(partial)
	}
	for ; ; now = c.workers.clock() {
		if err := rd.setDeadline(now); err != nil {
			return err
		}
		n, err := c.nc.Read(rd.buf[rd.w:])
		if n > 0 {
			rd.received(n)
			return nil
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
	}
}

// received takes note of n bytes that were read.
func (rd *reader) received(n int) {
	rd.w += n
	if rd.w == len(rd.buf) && rd.w < maxBuffer {
		rd.grow(2 * len(rd.buf))
	}
	rd.arrived = rd.conn.workers.clock()
	rd.batchStart, rd.conn.used = rd.arrived, true
	rd.conn.workers.watchIfDue(rd.arrived)
}

func (rd *reader) grow(size int) {
	b := make([]byte, size)
	copy(b, rd.buf[:rd.w])
	rd.buf = b
}

// setDeadline sets the read deadline to the next time at which there is
// something to do besides reading, after what is due now. It returns why the
// connection is to end, if it is.
func (rd *reader) setDeadline(now time.Duration) error {
	c := rd.conn
	if c.leaving.Load() {
		return endStopping
	}
	// The deadline is moved once it is over, not with each frame.
	if now < c.armed && c.armed <= now+shrinkIn && c.used && c.greeted && c.frameStart == 0 &&
		c.notifyStart == 0 && c.agent.rotation == 0 {
		return nil // nothing can be due before
	}
	next, err := rd.nextTimer(now)
	if err != nil || c.armed > now && (next == 0 || c.armed <= next) {
		return err
	}
	if c.armed = next; next == 0 {
		c.nc.SetReadDeadline(time.Time{})
	} else {
		c.nc.SetReadDeadline(c.workers.epoch.Add(next))
	}
	if c.leaving.Load() { // the deadline that leave has set may be overwritten
		return endStopping
	}
	return nil
}

// nextTimer returns when there is something to do besides reading, 0 for never,
// or why the connection is to end now.
func (rd *reader) nextTimer(now time.Duration) (next time.Duration, _ error) {
	c := rd.conn
	a := c.agent
	due := func(t time.Duration) bool {
		if now >= t {
			return true
		}
		if next == 0 || t < next {
			next = t
		}
		return false
	}
	answered := !c.box.Busy()
	switch {
	case !c.greeted && due(c.opened+a.helloTimeout):
		return 0, fault(StatusTimeout, "no HELLO within %v", a.helloTimeout)
	case c.frameStart > 0 && due(c.frameStart+a.helloTimeout):
		return 0, fault(StatusTimeout, "no whole frame within %v", a.helloTimeout)
	case c.notifyStart > 0 && due(c.notifyStart+a.helloTimeout):
		return 0, fault(StatusTimeout, "no whole NOTIFY within %v", a.helloTimeout)
	case a.rotation > 0 && c.notifies.Load() >= uint64(a.rotation):
		if answered && rd.w == 0 {
			return 0, endRotated
		}
		due(now + tick)
	}
	last := time.Duration(c.lastUsed.Load())
	if a.idleTimeout > 0 && c.greeted && due(last+a.idleTimeout) {
		if answered && rd.w == 0 {
			return 0, fault(StatusTimeout, "idle for %v", a.idleTimeout)
		}
		due(now + a.idleTimeout)
	}
	if c.used && due(last+shrinkIn) {
		if answered && rd.w < minBuffer { // else nothing more could be read
			rd.shrink()
		} else {
			due(now + shrinkIn)
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
	rd.out = nil
	rd.job.shrink()
	if !c.fragments.open {
		c.fragments.buf = nil
	}
	c.box.Shrink()
}
