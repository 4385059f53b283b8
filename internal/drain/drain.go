// Package drain decides when the connections of an agent that is to end can be
// closed without the loss of a request.
//
// It is a pure state machine: it knows no clock, lock, goroutine or I/O. Its
// caller shows each HAProxy's connections to a [Host], as often as that asks
// for, and carries out the verdicts.
//
// # Rules
//
// HAProxy loses what it has sent on a connection that is being closed, so a
// connection may be closed only while HAProxy is not about to send on it. What
// that takes depends on how HAProxy learns of the end:
//
//   - Early: while HAProxy has not missed enough health checks, every connection
//     is kept, since new requests still come.
//   - Idle: a HAProxy that sends no health checks does not learn of the end. Each
//     of its connections is parted when nothing was in flight on it for
//     QuietTime, which is longer than HAProxy takes from choosing a connection
//     to using it.
//   - Hold: HAProxy up to 3.0 goes on using its connections to a server that is
//     down. So the answers on all of its connections are held back for up to
//     holdFor: a stream of HAProxy's that waits for its answer sends nothing.
//   - Ready: a connection is ready to be parted when all of its NOTIFYs have an
//     answer, held or sent, no frame is half there, and it is quiet: idle for
//     QuietTime, or for fullLooks looks with as many NOTIFYs waiting as HAProxy
//     allows itself (window), or without a new one for quiet and quietLooks looks.
//     When others were parted it must be quiet anew in that last sense, even if it
//     was idle: HAProxy sends on it what it cannot send on those.
//   - Together: connections are parted only while all of the host are ready, and
//     some NOTIFYs wait, as many as in the fullest of the rounds before, of which
//     older ones count less, or all are idle for QuietTime. On a busy machine a
//     shorter silence proves little: HAProxy may not have been scheduled.
//   - Full: a connection on which exactly window NOTIFYs wait is parted whatever
//     the others do. HAProxy sends no more on it before it has the answers, which
//     leave in one Write with the AGENT-DISCONNECT.
//   - One by one: those without answers are parted first. Then one that has
//     answers: they leave in one Write with the AGENT-DISCONNECT, which HAProxy
//     handles before it sends anything. Whoever these answers reach asks again,
//     perhaps on another connection; so the others must be quiet anew. Of many
//     connections a few are parted together, which HAProxy hardly ever chooses
//     just then.
//   - Release: when the hold is over all held answers leave, and the next round
//     begins after pause.
//   - Bold: after patience rounds without success (patienceMany rounds for a host
//     with many connections), and when little time is left, connections that are
//     ready are parted though others are not, some in each round, before the
//     answers of the others are released. Those with and those without answers
//     are parted in different rounds. After twice as many rounds they need not be
//     quiet: requests come whether or not others wait.
//   - Spare: HAProxy up to 3.0 prefers some connections to others, which it uses
//     when these are full, as they are in a hold. So while it uses some often,
//     those that are idle for QuietTime are parted first, between the holds, when
//     NOTIFYs have come for evenFor without a long pause: then HAProxy runs, and
//     reads the AGENT-DISCONNECT before it has much to send. If that has not been
//     so for maxWait the rounds go on. Those of a host with more than a thousand
//     connections are parted in any case, since to hold all would delay many
//     answers.
//   - Few at a time: a look parts no more than perLook connections, since the end
//     of thousands at once would delay the answers of the others.
//   - Last: from Until on every connection is parted, whatever is in flight.
package drain

import (
	"math"
	"slices"
	"time"
)

// QuietTime is how long a connection must be without a NOTIFY to count as idle.
const QuietTime = time.Second

// Never is later than any time.
const Never = time.Duration(math.MaxInt64)

const (
	holdFor      = 50 * time.Millisecond  // longest time that an answer is held back
	pause        = 100 * time.Millisecond // between the rounds of holding
	quiet        = 20 * time.Millisecond  // without a NOTIFY: HAProxy sends no more
	quietNew     = 40 * time.Millisecond  // the same for a connection without a NOTIFY, which HAProxy opened to send one
	quietLooks   = 5                      // looks in that time, since a process that has not run has seen nothing
	fullLooks    = 2                      // at a connection that is full before it is parted: it has no more than window
	window       = 20                     // HAProxy's default of max-waiting-frames, and its streams on a connection from 3.1 on
	compared     = 3                      // rounds at least whose waiting NOTIFYs are compared
	fading       = 15. / 16               // what a round leaves of most
	patience     = 20                     // rounds before a host's connections are parted one without the others,
	patienceMany = 5                      // and of a host with many, which are hardly ever all ready
	many         = 100                    // connections
	boldAfter    = 30 * time.Millisecond  // of a hold: answers of the others must still be held
	boldParts    = 10                     // a bold round parts one in so many of those with answers
	oneIn        = 32                     // of many with answers are parted together
	often        = 10                     // NOTIFYs of one connection in QuietTime: others that have none are spare
	longPause    = 5 * time.Millisecond   // between NOTIFYs: HAProxy may not have run
	evenFor      = 30 * time.Millisecond  // without a long pause: HAProxy runs
	maxWait      = QuietTime / 4          // for HAProxy to be seen to run: after it none is spare
	manyIdle     = 1000                   // connections: those that are idle are parted first, without a hold
	perLook      = 64                     // connections parted by one look
	perLastLook  = 256                    // the same from Until on
	idleLook     = 20 * time.Millisecond  // least time between two looks for idle connections
	slowLook     = QuietTime / 4          // between looks at a connection with something in flight
)

// Verdict is what is to be done with a connection.
type Verdict uint8

// The verdicts.
const (
	Keep    Verdict = iota // nothing changes
	Hold                   // hold back its answers from now on
	Release                // send what is held, and hold back no more
	Part                   // send what is held, then the AGENT-DISCONNECT, and read no more
)

func (v Verdict) String() string {
	return [...]string{"keep", "hold", "release", "part"}[v]
}

// Look is what a connection looks like at one moment. Times are those of the
// caller's clock.
type Look struct {
	Agreed   bool          // the HELLOs have been exchanged
	Notifies uint64        // received
	Answered uint64        // of these, how many have an answer, sent or held
	Partial  bool          // a frame, or a fragmented NOTIFY, is half there
	LastUsed time.Duration // when the reader last went back to reading after it had received something
}

// Conn is a connection. The caller sets its Look before each Step, which sets
// its Verdict. The rest belongs to the Host.
type Conn struct {
	Look
	Verdict Verdict

	held    bool
	settled bool          // all NOTIFYs have an answer, and no frame is half there
	ready   bool          // settled and quiet
	counted uint64        // Notifies when the host last judged how often HAProxy uses each
	base    uint64        // Answered when the hold began
	seen    uint64        // Notifies at the last look
	used    bool          // it has received one since
	since   time.Duration // when Notifies last changed in this hold, or others were parted
	looks   int           // since then
	anew    bool          // others were parted: it must be quiet since then, even if it is idle
}

// Held reports whether the connection's answers are to be held back after the last
// Step.
func (c *Conn) Held() bool { return c.held }

func (c *Conn) idle(now time.Duration) bool {
	return c.Notifies == c.Answered && now-c.LastUsed >= QuietTime
}

// Host is the connections of one HAProxy on one listener or, if they have an
// engine-id of their own, those of one of its threads. The caller may change the
// exported fields between steps.
type Host struct {
	From   time.Duration // nothing is parted before
	Rounds bool          // HAProxy learns of the end by its health checks, or from another process on the same listener
	Until  time.Duration // everything is parted then; 0: no such time

	heard   time.Duration // when a look last saw that a NOTIFY had come
	even    time.Duration // since when that was so without a pause longer than longPause
	ran     time.Duration // when HAProxy was last seen to run
	counted time.Duration // when it was last judged how often HAProxy uses each
	picks   bool          // HAProxy uses some connections again and again before it uses others
	holding bool
	began   time.Duration // of the hold
	bold    bool          // this hold has parted some that were ready
	retry   time.Duration // when to hold again
	rounds  int           // that are over
	most    float64       // NOTIFYs that waited in a round, a little less for each round since
	left    uint64        // NOTIFYs that waited on connections parted in this round: hardly any of them is sent here again
}

// Step decides what is to be done with each of the host's connections. It
// returns when it wants to look again, Never if it has no more to decide.
func (h *Host) Step(now time.Duration, conns []*Conn) (next time.Duration) {
	active := false // one of them has received a NOTIFY since the last look
	for _, c := range conns {
		c.Verdict = Keep
		c.used, c.seen = c.Notifies != c.seen, c.Notifies
		active = active || c.used
	}
	runs := h.runs(now, active)
	h.count(now, conns)
	last := h.Until
	if last == 0 {
		last = Never
	}
	switch {
	case now >= last:
		for _, c := range conns[:min(perLastLook, len(conns))] {
			c.Verdict = Part
		}
		return now + Tick(len(conns))
	case now < h.From:
		h.ran = h.From // then it has maxWait to be seen to run
		return min(h.From, last)
	case !h.Rounds:
		return min(h.partIdle(now, conns), last)
	case !h.holding && h.hasSpare(now, conns):
		if runs || len(conns) > manyIdle || h.Until > 0 {
			partSome(now, conns)
		}
		return min(now+Tick(len(conns)), last)
	case now < h.retry && h.Until == 0:
		return h.retry
	}
	return min(h.round(now, conns), last)
}

// runs reports whether HAProxy is seen to run: it sends NOTIFYs, and has sent some
// all the time. After a pause it may have many to send, and use every connection.
func (h *Host) runs(now time.Duration, active bool) bool {
	if !active {
		return false
	}
	if now-h.heard > longPause {
		h.even = now
	}
	h.heard = now
	runs := now-h.even >= evenFor
	if runs {
		h.ran = now
	}
	return runs
}

// count judges, once in QuietTime, whether HAProxy picks some connections only: a
// connection that gets so many NOTIFYs is not used in turn with those that get
// none.
func (h *Host) count(now time.Duration, conns []*Conn) {
	took := now - h.counted
	if h.counted > 0 && took < QuietTime {
		return
	}
	most := uint64(0)
	for _, c := range conns {
		most = max(most, c.Notifies-c.counted)
		c.counted = c.Notifies
	}
	h.picks = h.counted > 0 && most*uint64(QuietTime) >= often*uint64(took)
	h.counted = now
}

// partIdle parts each connection that is idle.
func (h *Host) partIdle(now time.Duration, conns []*Conn) (next time.Duration) {
	next = Never
	parted := 0
	for _, c := range conns {
		switch {
		case c.idle(now):
			if parted++; parted > perLook {
				return now + Tick(len(conns))
			}
			c.Verdict = Part
		case c.Notifies != c.Answered:
			next = min(next, now+slowLook)
		default:
			next = min(next, c.LastUsed+QuietTime)
		}
	}
	return max(next, now+idleLook)
}

// hasSpare reports whether some connections are idle and are to be parted without
// a hold.
func (h *Host) hasSpare(now time.Duration, conns []*Conn) bool {
	busy := h.picks && now-h.ran < maxWait
	return (busy || len(conns) > manyIdle) && slices.ContainsFunc(conns, func(c *Conn) bool { return c.idle(now) })
}

// partSome parts the first connections that are idle.
func partSome(now time.Duration, conns []*Conn) {
	parted := 0
	for _, c := range conns {
		if parted < perLook && c.idle(now) {
			parted++
			c.Verdict = Part
		}
	}
}

// round is one look of a round of holding.
func (h *Host) round(now time.Duration, conns []*Conn) (next time.Duration) {
	if !h.holding {
		h.holding, h.bold, h.began = true, false, now
	}
	anyReady, all := false, true // of the connections in use
	full, still := true, true    // as many wait on each as HAProxy allows; each is idle
	waiting := uint64(0)
	for _, c := range conns {
		if !c.Agreed {
			if c.ready = c.idle(now); c.ready {
				c.Verdict = Part
			}
			continue
		}
		c.look(now)
		if !c.ready && c.Notifies == 0 {
			continue // it has never been used
		}
		n := c.Notifies - c.base
		waiting += n
		anyReady, all = anyReady || c.ready, all && c.ready
		full = full && n >= window
		still = still && c.idle(now)
	}
	switch enough := h.asMany(waiting) || full || still; {
	case partFull(now, conns):
	case anyReady && all && enough:
		part(now, conns)
	case now-h.began >= boldAfter && !h.bold && (h.rounds >= patienceWith(len(conns)) || h.Until > 0):
		h.bold = h.partReady(conns)
	}
	for _, c := range conns { // of those that were full many are sent here again
		if n := c.Notifies - c.base; c.held && c.Verdict == Part && n < window {
			h.left += n
		}
	}
	if now-h.began >= holdFor {
		h.release(now, conns)
		return h.retry
	}
	return now + Tick(len(conns))
}

// look holds back the connection's answers, if it does not yet, and judges
// whether it is ready to be parted.
func (c *Conn) look(now time.Duration) {
	switch {
	case !c.held:
		c.held, c.Verdict, c.base = true, Hold, c.Answered
		c.since, c.looks, c.anew = now, 0, false
	case c.used:
		c.since, c.looks = now, 0
	default:
		c.looks++
	}
	least := quiet
	if c.Notifies == 0 {
		least = quietNew
	}
	isFull := c.Notifies-c.base >= window && c.looks >= fullLooks
	isQuiet := c.idle(now) && !c.anew || isFull || now-c.since >= least && c.looks >= quietLooks
	half := c.Partial && now-c.LastUsed < QuietTime
	c.settled = c.Notifies == c.Answered && !half
	c.ready = c.settled && isQuiet
}

// asMany reports whether n NOTIFYs waiting are any, and as many as are to be
// expected from the rounds before.
func (h *Host) asMany(n uint64) bool {
	h.most = max(h.most, float64(n))
	return n > 0 && h.rounds >= compared-1 && float64(n) >= h.most
}

// patienceWith returns the number of rounds before the host's n connections are
// parted one without the others.
func patienceWith(n int) int {
	if n > many {
		return patienceMany
	}
	return patience
}

// partFull parts the connections on which as many NOTIFYs wait as HAProxy allows
// itself, and reports whether there are any. Then the others must be quiet anew.
func partFull(now time.Duration, conns []*Conn) bool {
	parted := 0
	for _, c := range conns {
		if c.settled && c.held && c.Notifies-c.base == window && c.looks >= fullLooks && parted < perLook {
			parted++
			c.Verdict = Part
		}
	}
	if parted > 0 {
		quietAnew(now, conns)
	}
	return parted > 0
}

// quietAnew makes all connections prove again that they are quiet.
func quietAnew(now time.Duration, conns []*Conn) {
	for _, c := range conns {
		c.since, c.looks, c.anew = now, 0, true
	}
}

// part parts the ready connections that have no answers, or else one that has, a
// few of many. Then the others must be quiet anew.
func part(now time.Duration, conns []*Conn) {
	parted := 0
	for _, c := range conns {
		if c.ready && c.Answered == c.base {
			if parted++; parted > perLook {
				return // the rest at the next look
			}
			c.Verdict = Part
		}
	}
	for some := 1 + len(conns)/oneIn; parted == 0 && some > 0; some-- {
		i := slices.IndexFunc(conns, func(c *Conn) bool { return c.ready && c.Verdict != Part })
		if i < 0 {
			break
		}
		conns[i].Verdict = Part
	}
	quietAnew(now, conns)
}

// partReady parts the ready connections that have no answers or, if there are
// none, some of those that have: whoever these answers reach asks again, perhaps
// on one of the former. When little time is left it parts all that are ready. It
// reports whether that is done.
func (h *Host) partReady(conns []*Conn) (done bool) {
	mustBeQuiet := h.rounds < 2*patienceWith(len(conns))
	parted := 0
	mark := func(answers bool, some int) {
		for _, c := range conns {
			if parted < some && (c.ready || !mustBeQuiet && c.settled) && (c.Answered != c.base) == answers {
				parted++
				c.Verdict = Part
			}
		}
	}
	mark(false, perLook)
	switch {
	case h.Until > 0:
		mark(true, perLook)
	case parted == 0:
		mark(true, min(perLook, 1+len(conns)/boldParts))
	}
	return parted < perLook
}

// release ends the hold.
func (h *Host) release(now time.Duration, conns []*Conn) {
	waited := h.left > 0
	for _, c := range conns {
		if c.held && c.Verdict != Part {
			c.Verdict = Release
			waited = waited || c.Notifies != c.base
		}
		c.held = false
	}
	h.holding = false
	h.retry = now + pause
	h.rounds++
	if waited {
		h.most = max(0, h.most-float64(h.left)) * fading
	}
	h.left = 0
}

// Tick returns the time between two looks of a round at n connections: short
// for the answers' sake, long enough that looking costs little, and a fourth of
// quiet at most.
func Tick(n int) time.Duration {
	return min(max(time.Duration(n)*4*time.Microsecond, time.Millisecond), 4*time.Millisecond)
}
