package spoa

import (
	"time"

	"github.com/spoa-go/spoa/internal/drain"
)

const (
	stopFor   = 100 * time.Millisecond // from the phase stopping on, until every connection is parted
	closeFor  = time.Second            // for connections to end after Close, before Serve returns
	maxApart  = 1000                   // connections, up to which each engine is drained by itself: package drain bounds what one host costs, not what many do
	manyConns = 100                    // of a drain whose looks are kept apart
	spacing   = 4 * time.Microsecond   // for each connection, beyond manyConns, between looks because one has ended
)

// drainer drives the drain of an agent: it looks at the connections and does
// what package drain decides. It belongs to one goroutine.
type drainer struct {
	agent *Agent
	phase int32         // of the agent, at the last look
	from  time.Duration // the listeners stay open until then: HAProxy may still send new connections
	until time.Duration // everything is closed then; 0: no such time
	seq   uint64        // of the agent's connections when they were last gathered
	early time.Duration // until then a change of the connections is no reason to look
	apart bool          // the connections of each engine are drained by themselves
	conns int
	hosts map[hostKey]*drainHost
}

// hostKey is what the connections have in common that are drained together. Up to
// 3.0 each thread of a HAProxy has an engine-id, and connections, of its own.
type hostKey struct {
	host     string
	listener *listener
	engine   string // its id; "" if all engines are drained together
}

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
			key.engine = c.peer.Load().EngineID
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
		h.views[i].Look = c.drainLook(h.views[i].Look)
	}
	next = h.Step(now, h.views)
	last := h.Until > 0 && now >= h.Until
	for i, c := range h.conns {
		if !c.carryOut(h.views[i], last) {
			next = now
		}
	}
	return next
}

// carryOut carries out a verdict, Part by force if it is the last look. It reports
// false if c was to be parted but has received a NOTIFY since the look.
func (c *conn) carryOut(v *drain.Conn, last bool) bool {
	switch v.Verdict {
	case drain.Hold:
		c.box.Hold()
	case drain.Release:
		c.release()
	case drain.Part:
		if c.part(v.Look, last) {
			break
		}
		if !v.Held() { // the hold ended with this look
			c.release()
		}
		return false
	}
	return true
}

// release sends what is held back.
func (c *conn) release() {
	if c.box.Release() {
		go c.box.Flush() // it blocks if the peer does not read
	}
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
