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
// sends is in section 3 of https://github.com/haproxy/haproxy/blob/master/doc/SPOE.txt,
// which the documentation here means by SPOE.txt.
package spoa

import (
	"context"
	"errors"
	"hash/maphash"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-kit/log/level"
	"github.com/spoa-go/spoa/internal/drain"
	"github.com/spoa-go/spoa/internal/outbox"
)

// ErrAgentClosed is what Serve returns after Shutdown or Close.
var ErrAgentClosed = errors.New("spoa: agent closed")

// Agent answers HAProxy on any number of listeners. It is made by New, and its
// methods may be called by several goroutines at once.
//
// Locks are taken in this order: Agent.mu, workers.watchMu, workers.mu,
// queue.mu, outbox.Siblings.mu, outbox.Box.mu; workers.boundMu and
// workers.unknownMu alone. None is held during a call of a net.Conn, a Handler, a
// hook or the logger.
type Agent struct {
	*options
	err     error // of the options
	workers *workers
	ctx     context.Context // of all handlers
	cancel  context.CancelFunc

	phase    atomic.Int32  // changed with mu held
	changed  chan struct{} // a drain is to look at once
	done     chan struct{} // closed when nothing is served any more
	noNotify atomic.Bool   // no NOTIFY has come yet, and that was warned of
	refusing atomic.Bool   // a peer beyond WithMaxConns is being told so

	mu         sync.Mutex
	listeners  map[*listener]struct{}
	conns      map[*conn]struct{}
	connsSeq   uint64 // changes with conns, and with their peers
	siblings   map[engine]*outbox.Siblings
	checks     drain.Checks
	anyCheck   bool
	firstCheck time.Duration // when the first health check came
	anyNotify  bool
}

// engine is what the connections have in common that may send each other's ACKs.
type engine struct {
	listener *listener
	id       string
}

// The phases of an agent.
const (
	serving  = iota
	draining // health checks are refused, quiet connections closed
	stopping // every connection is closed within stopFor
	closed
)

const (
	maxEngines  = 64                   // of a host that are drained by themselves
	maxApart    = 1000                 // connections of the agent at most for that, since package drain bounds what one host costs
	manyConns   = 100                  // of a drain whose looks are kept apart
	spacing     = 4 * time.Microsecond // for each connection, beyond manyConns, between looks because one has ended
	stopFor     = 100 * time.Millisecond
	refuseFor   = 100 * time.Millisecond // for a peer beyond WithMaxConns to be told so
	closeFor    = time.Second            // for connections to end after Close, before Serve returns
	silentAfter = time.Minute            // of health checks without a NOTIFY, to be warned of
)

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
		siblings:  make(map[engine]*outbox.Siblings),
		changed:   make(chan struct{}, 1),
		done:      make(chan struct{}),
	}
	a.ctx, a.cancel = context.WithCancel(context.Background())
	return a
}

// listener makes Close idempotent: Serve and whatever ends the agent may both
// call it.
type listener struct {
	net.Listener
	once sync.Once
	err  error
	left atomic.Bool // the program closed it during a drain: another process accepts on the socket
}

func (l *listener) Close() error {
	l.once.Do(func() { l.err = l.Listener.Close() })
	return l.err
}

// Serve accepts connections from nl and answers them. It owns nl and closes it.
// It always returns an error: what is wrong with the options, why Accept failed
// for good, or ErrAgentClosed after Shutdown or Close, even when called after
// them. In that case the drain is over and Hooks.ConnClosed was called for every
// connection (after Close it waits a second at most), though handlers that
// ignore their context may still run. It may be called for several listeners at
// once.
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
	ok := a.phase.Load() == serving
	if ok {
		a.listeners[l] = struct{}{}
	}
	a.mu.Unlock()
	if !ok {
		l.Close()
		<-a.done
		return ErrAgentClosed
	}
	err := a.accept(l)
	if a.ending(l) {
		l.Close()
		<-a.done
		return ErrAgentClosed
	}
	return err
}

// ListenAndServe listens on a network and address as net.Listen does, such as
// "tcp" and "127.0.0.1:9000", or "unix" and a path, and calls Serve. For TLS call
// Serve with the listener of tls.Listen. With the usual umask a unix socket is its
// owner's alone; to share it call net.Listen, os.Chmod and Serve.
func (a *Agent) ListenAndServe(network, address string) error {
	if a.phase.Load() != serving {
		return ErrAgentClosed
	}
	l, err := net.Listen(network, address)
	if err != nil {
		return err
	}
	return a.Serve(l)
}

// ending forgets a listener that accepts no more, and reports whether the agent
// is coming to its end.
func (a *Agent) ending(l *listener) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.listeners, l)
	phase := a.phase.Load()
	l.left.Store(phase == draining)
	a.wakeDrain()
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
		if n, ok := a.workers.limit.Allow("accept"); ok {
			level.Warn(a.logger).Log("msg", "accept failed", "err", err, "retry", delay, "suppressed", n)
		}
		select {
		case <-time.After(delay):
		case <-a.done:
		}
	}
}

// serveConn starts a goroutine that answers nc.
func (a *Agent) serveConn(l *listener, nc net.Conn) {
	c := newConn(a, l, nc)
	a.mu.Lock()
	ok := a.phase.Load() < stopping
	full := ok && len(a.conns) >= a.maxConns
	if ok && !full {
		a.conns[c] = struct{}{}
		a.connsSeq++
	}
	a.mu.Unlock()
	switch {
	case full:
		a.refuse(c)
	case !ok:
		c.cancel()
		nc.Close()
	default:
		if a.hooks.ConnOpened != nil {
			a.hooks.ConnOpened(*c.peer.Load())
		}
		go c.rd.run()
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
		c.nc.Close()
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

// forget forgets a connection that has ended.
func (a *Agent) forget(c *conn) {
	a.mu.Lock()
	delete(a.conns, c)
	a.connsSeq++
	e := engine{c.listener, c.engine}
	if s := a.siblings[e]; s != nil && s.Len() == 0 {
		delete(a.siblings, e)
	}
	a.mu.Unlock()
	a.wakeDrain()
}

// greeted notes that a connection's peer is known, by which it is drained.
func (a *Agent) greeted() {
	a.mu.Lock()
	a.connsSeq++
	a.mu.Unlock()
}

// join lets c send the answers of other connections of its engine, and these its
// answers, should one of them be lost.
func (a *Agent) join(c *conn) {
	e := engine{c.listener, c.engine}
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.siblings[e]
	if s == nil {
		s = outbox.NewSiblings(isAck, func(frames int) {
			if n, ok := a.workers.limit.Allow("dropped"); ok {
				level.Warn(a.logger).Log("msg", "answers dropped: no connection left", "engine", clip(e.id), "count", frames, "suppressed", n)
			}
		})
		a.siblings[e] = s
	}
	s.Join(&c.box, lengthSize+c.agreed.frameSize)
}

func isAck(frame []byte) bool { return frame[lengthSize] == frameAck }

// Shutdown ends the agent without losing a request. It returns nil when that is
// done.
//
// From now on health checks are refused, so that `option spop-check` makes
// HAProxy use its other servers, while NOTIFYs are answered as before, also on
// new connections. The connections of a HAProxy that sends health checks stay
// open until it has missed three of them, whose interval is taken to be up to
// four times that between the checks that have come: several backends may check
// from one address. Then the connections are closed together, each with an
// AGENT-DISCONNECT. Other connections are closed when nothing was in
// flight on them for a second. When no connection is left the listeners are
// closed. With no connection, and no health checks of a HAProxy that has sent
// NOTIFYs, Shutdown returns at once.
//
// HAProxy up to 3.0 goes on using its connections to a server that is down. So
// while they are being closed answers are held back, for 50 ms at a time, until
// everything that HAProxy wants to know is waiting for them; they leave in one
// Write with the AGENT-DISCONNECT. A NOTIFY that HAProxy sends in that very
// moment is lost all the same.
//
// If another process accepts connections from the same socket, close the
// listener once Shutdown has begun. Then HAProxy's health checks reach the other
// process, and the listener's connections are closed in that manner at once.
//
// Shortly before the deadline of ctx (a tenth of the time that is left, a second
// at most) the listeners are closed, and within 100 ms nothing more is read,
// even if requests are lost by it; what is in flight is answered. When ctx is
// over, Shutdown calls Close and returns the error of ctx. Without a deadline it
// waits for as long as handlers run and connections are in use.
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
// listeners and connections. It waits for neither. It always returns nil, and
// may be called more than once.
func (a *Agent) Close() error {
	a.advance(closed)
	return nil
}

// Actor returns the agent as an actor of a group of github.com/oklog/run. Its
// execute is Serve. A group calls interrupts one after another, so this one only
// begins a Shutdown that may last as long as grace, and returns; execute returns
// when that is done. An agent with several listeners is that many actors of one
// group: Actor is called for each.
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
	from := a.phase.Load()
	if from >= to {
		a.mu.Unlock()
		return false
	}
	a.phase.Store(to)
	var listeners []*listener
	if to >= stopping {
		for l := range a.listeners {
			listeners = append(listeners, l)
		}
	}
	var conns []*conn
	if to == closed {
		for c := range a.conns {
			conns = append(conns, c)
		}
	}
	a.mu.Unlock()

	for _, l := range listeners {
		l.Close()
	}
	if to == closed {
		a.cancel()
		for _, c := range conns {
			go c.abort() // a Close that takes long must not hold up the others'
		}
	}
	if from == serving {
		go newDrainer(a).run()
	}
	a.wakeDrain()
	return true
}

// wakeDrain makes the drain look at the agent at once.
func (a *Agent) wakeDrain() {
	if a.phase.Load() == serving {
		return
	}
	select {
	case a.changed <- struct{}{}:
	default:
	}
}

// checked notes a health check.
func (a *Agent) checked(c *conn) {
	now := a.workers.clock()
	a.mu.Lock()
	if !a.anyCheck {
		a.anyCheck, a.firstCheck = true, now
	}
	a.checks.Seen(c.host, now)
	silent := now-a.firstCheck >= silentAfter && !a.anyNotify
	a.mu.Unlock()
	if silent && a.noNotify.CompareAndSwap(false, true) {
		level.Warn(a.logger).Log("msg", "health checks pass, but no NOTIFY has ever come: does a rule or event of HAProxy's configuration send the messages?")
	}
}

// notified notes the first NOTIFY of a connection.
func (a *Agent) notified(c *conn) {
	a.mu.Lock()
	a.anyNotify = true
	a.checks.Notified(c.host, c.engine, a.workers.clock())
	a.mu.Unlock()
}

// drainer drives the drain of an agent: it looks at the connections and does
// what package drain decides. It belongs to one goroutine.
type drainer struct {
	agent *Agent
	phase int32         // of the agent, at the last look
	from  time.Duration // the listeners stay open until then: HAProxy may still send new connections
	until time.Duration // everything is closed then; 0: no such time
	seq   uint64        // of the agent's connections when they were last gathered
	early time.Duration // a change of the connections is no reason to look before
	apart bool          // the connections of each engine are drained by themselves
	conns int
	hosts map[hostKey]*drainHost
}

// hostKey is what the connections have in common that are drained together. Up to
// 3.0 each thread of a HAProxy has an engine-id, and connections, of its own.
type hostKey struct {
	host     string
	listener *listener
	engine   uint64 // one of maxEngines
}

var engineSeed = maphash.MakeSeed()

type drainHost struct {
	drain.Host
	conns []*conn
	views []*drain.Conn // of conns
}

func newDrainer(a *Agent) *drainer {
	a.mu.Lock()
	defer a.mu.Unlock()
	return &drainer{
		agent: a,
		from:  a.checks.AllMissed(a.workers.clock()),
		seq:   a.connsSeq - 1,
		apart: len(a.conns) <= maxApart,
		hosts: make(map[hostKey]*drainHost),
	}
}

// run drains the agent until nothing is left, and closes it.
func (d *drainer) run() {
	a := d.agent
	t := time.NewTimer(0)
	defer t.Stop()
	next := time.Duration(0) // when to look again anyway
	for {
		var now time.Duration
		select {
		case <-a.changed:
			if now = a.workers.clock(); now < d.early && !d.urgent() {
				t.Reset(max(0, min(next, d.early)-now))
				continue
			}
		case <-t.C:
			now = a.workers.clock()
		}
		var over bool
		if next, over = d.step(now); over {
			a.advance(closed)
			close(a.done)
			return
		}
		d.early = now + time.Duration(max(0, d.conns-manyConns))*spacing
		t.Reset(min(next-now, time.Hour))
	}
}

// urgent reports whether the agent is in another phase than at the last look, or
// has no connection left.
func (d *drainer) urgent() bool {
	a := d.agent
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.conns) == 0 || a.phase.Load() != d.phase
}

// step looks at every connection. It returns when to look again, or that nothing
// is left to be done.
func (d *drainer) step(now time.Duration) (next time.Duration, over bool) {
	a := d.agent
	phase := a.phase.Load()
	listening := d.gather(now)
	if phase != d.phase {
		d.phase = phase
		switch phase {
		case stopping:
			d.until = now + stopFor
		case closed:
			d.until = now + closeFor
		}
	}
	switch {
	case d.conns == 0 && (phase >= stopping || !listening || now >= d.from):
		return 0, true
	case phase == closed:
		return d.until, now >= d.until
	}
	next = drain.Never
	if d.conns == 0 {
		next = d.from
	}
	for key, h := range d.hosts {
		h.Until = d.until
		if phase == stopping || key.listener.left.Load() {
			h.From, h.Rounds = 0, true
		}
		next = min(next, h.step(now))
	}
	return max(next, now+drain.Tick(d.conns)), false
}

// gather groups the connections by host, if they have changed, and reports
// whether a listener is open.
func (d *drainer) gather(now time.Duration) (listening bool) {
	a := d.agent
	a.mu.Lock()
	defer a.mu.Unlock()
	listening = len(a.listeners) > 0
	if d.seq == a.connsSeq {
		return listening
	}
	d.seq, d.conns = a.connsSeq, len(a.conns)
	for _, h := range d.hosts {
		h.conns, h.views = h.conns[:0], h.views[:0]
	}
	for c := range a.conns {
		if c.leaving.Load() {
			continue
		}
		key := hostKey{host: c.host, listener: c.listener}
		if d.apart {
			key.engine = maphash.String(engineSeed, c.peer.Load().EngineID) % maxEngines
		}
		h := d.hosts[key]
		if h == nil {
			from := a.checks.Missed(c.host, now)
			if from == 0 && a.checks.Forgot() {
				from = d.from
			}
			h = &drainHost{Host: drain.Host{From: from, Rounds: from > 0}}
			d.hosts[key] = h
		}
		h.conns, h.views = append(h.conns, c), append(h.views, &c.draining)
	}
	for key, h := range d.hosts {
		if len(h.conns) == 0 {
			delete(d.hosts, key)
		}
	}
	return listening
}

// step looks at the host's connections, does what is decided, and returns when
// to look again.
func (h *drainHost) step(now time.Duration) (next time.Duration) {
	h.dropLeaving()
	for i, c := range h.conns {
		h.views[i].Look = c.look(h.views[i].Look)
	}
	next = h.Step(now, h.views)
	last := h.Until > 0 && now >= h.Until
	for i, c := range h.conns {
		switch v := h.views[i]; v.Verdict {
		case drain.Hold:
			c.box.Hold()
		case drain.Release:
			if c.box.Release() {
				go c.box.Flush() // it blocks if the peer does not read
			}
		case drain.Part:
			if !c.part(v.Look, last) {
				next = now // it has received a NOTIFY since the look
			}
		}
	}
	return next
}

// dropLeaving removes the connections that end.
func (h *drainHost) dropLeaving() {
	n := 0
	for i, c := range h.conns {
		if !c.leaving.Load() {
			h.conns[n], h.views[n] = c, h.views[i]
			n++
		}
	}
	clear(h.conns[n:])
	clear(h.views[n:])
	h.conns, h.views = h.conns[:n], h.views[:n]
}

// ConnInfo is a snapshot of one connection.
type ConnInfo struct {
	Peer
	Since    time.Time // when it was accepted
	Notifies uint64    // received so far
	InFlight int       // of these, those without an answer yet; one of them may wait to be begun
}

// Conns returns a snapshot of the agent's connections, in no order.
func (a *Agent) Conns() []ConnInfo {
	a.mu.Lock()
	conns := make([]*conn, 0, len(a.conns))
	for c := range a.conns {
		conns = append(conns, c)
	}
	a.mu.Unlock()
	infos := make([]ConnInfo, len(conns))
	for i, c := range conns {
		infos[i] = ConnInfo{*c.peer.Load(), a.workers.epoch.Add(c.opened), c.notifies.Load(), c.inFlight()}
	}
	return infos
}

// MessageStats are the figures of one kind of message since New.
type MessageStats struct {
	Message string           // its name; empty: all messages that have no handler of their own
	Count   map[Fault]uint64 // messages done with, by fault; those without one are Count[0]
	Late    uint64           // handlers that returned after the answer had left
	Running int              // handlers that have not returned yet, the late ones included
	Took    time.Duration    // by all calls of handlers that have returned
}

// Stats returns figures of each message that has a handler, in the order of their
// names, after those of all other messages together, since a peer can invent any
// number of names. It returns nil without WithStats. All faults are in Count, also
// those that have not occurred. Figures change one after the other, so they may
// differ by the messages of this moment.
func (a *Agent) Stats() []MessageStats {
	var list []MessageStats
	stats := a.workers.stats
	for _, message := range slices.Sorted(maps.Keys(stats)) {
		c := stats[message]
		s := MessageStats{message, make(map[Fault]uint64, faultCount), c.late.Load(), int(c.running.Load()), time.Duration(c.took.Load())}
		for f := range faultCount {
			s.Count[f] = c.count[f].Load()
		}
		list = append(list, s)
	}
	return list
}

// stats are the counters of each message that has a handler, and of all others by
// the empty name. It is nil if they are not asked for, and does not change.
type stats map[string]*counters

type counters struct {
	count         [faultCount]atomic.Uint64
	late          atomic.Uint64
	running, took atomic.Int64
}

func newStats(handlers map[string]Handler) stats {
	s := stats{"": new(counters)}
	for message := range handlers {
		s[message] = new(counters)
	}
	return s
}

func (s stats) of(message string) *counters {
	if c := s[message]; c != nil {
		return c
	}
	return s[""]
}

// called counts the call of a handler. It must be followed by returned.
func (s stats) called(message string) {
	if s != nil {
		s.of(message).running.Add(1)
	}
}

// returned counts the return of a handler.
func (s stats) returned(message string, took time.Duration, late bool) {
	if s == nil {
		return
	}
	c := s.of(message)
	c.running.Add(-1)
	c.took.Add(int64(took))
	if late {
		c.late.Add(1)
	}
}

// handled counts a message that is done with.
func (s stats) handled(message string, f Fault) {
	if s != nil {
		s.of(message).count[f].Add(1)
	}
}
