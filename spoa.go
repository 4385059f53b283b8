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
	"net"
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
// Agent.mu may be held when outbox.Siblings.mu or outbox.Box.mu is taken, and
// queue.mu when outbox.Box.mu or deadline.mu is; every other lock is taken alone.
// None is held during a call of a net.Conn, a Handler, a hook or the logger.
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
	refuseFor   = 100 * time.Millisecond // for a peer beyond WithMaxConns to be told so
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
	if a.listenerEnded(l) {
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

// listenerEnded forgets a listener that accepts no more, and reports whether the agent
// is coming to its end.
func (a *Agent) listenerEnded(l *listener) bool {
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
		go nc.Close() // a net.Conn of the program's own may block, and others are to be accepted
	default:
		if a.hooks.ConnOpened != nil {
			a.hooks.ConnOpened(*c.peer.Load())
		}
		go c.rd.run()
	}
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

// Shutdown ends the agent without losing a request. It returns nil when that is
// done.
//
// From now on health checks are refused, so that `option spop-check` makes
// HAProxy use its other servers, while NOTIFYs are answered as before, also on
// new connections. The connections of a HAProxy that sends health checks stay
// open until it has missed three of them, whose interval is taken to be four
// times the longest time between the last checks, or as many times that as
// engine-ids have sent NOTIFYs, since several backends may check from one address;
// but no more than 2 s, HAProxy's default, unless that time itself is longer. (So
// several backends that check from one address less often than every 2 s may be
// waited for too briefly.) Then the connections are closed together, each with an
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
