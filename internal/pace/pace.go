// Package pace decides where handlers run. Like a drain's, its rules are a pure
// state machine.
package pace

import "time"

// Pace decides where the handlers of a connection run.
//
// Inline, on the goroutine that reads the connection, a NOTIFY costs no switch
// of goroutines, and all NOTIFYs of one read are answered by one write: less than
// a microsecond each, where a worker of its own costs 2 to 5. But a handler that
// waits delays all NOTIFYs behind it. So:
//
//   - A call that lasts longer than StallAfter loses the connection to another
//     goroutine. That costs a few microseconds, once, so it may be wrong: the
//     goroutine may just have been preempted.
//   - Two such calls within StallRun calls, or one among a connection's first,
//     or two batches in a row with more than SlowCall a call, the second while
//     others waited, and the next SpreadRun NOTIFYs go to workers. One alone proves
//     nothing, since wall time counts preemption.
//   - After that one call is tried inline. If it is slow, the next ones are spread
//     again: a slow handler costs its neighbours one call in SpreadRun; a false
//     alarm costs about a millisecond of CPU and is over.
//
// SlowCall is about ten times what spreading costs a call. StallAfter is what
// a neighbour may notice; a shorter one would need a finer clock than the tick
// of the runtime's timers that it is measured with.
//
// It belongs to the goroutine that reads the connection. The zero value is ready.
type Pace struct {
	spread int  // NOTIFYs still to be given to workers
	slow   bool // the last batch was
	calls  int  // since the last stall
}

// When a call is slow, and what follows.
const (
	StallAfter = time.Millisecond      // a call
	SlowCall   = 30 * time.Microsecond // the calls of a batch, each
	StallRun   = 64                    // calls within which a second stall counts
	SpreadRun  = 256                   // NOTIFYs given to workers then
)

// Inline reports whether the next NOTIFY is to be handled inline.
func (p *Pace) Inline() bool {
	if p.spread == 0 {
		return true
	}
	p.spread--
	return false
}

// Spread makes the next n NOTIFYs go to workers.
func (p *Pace) Spread(n int) { p.spread = n }

// Slow reports whether the last batch was slow.
func (p *Pace) Slow() bool { return p.slow }

// Batch takes note of calls made inline in a row, and whether other NOTIFYs
// waited meanwhile.
func (p *Pace) Batch(calls int, took time.Duration, waited bool) {
	p.calls = min(p.calls+calls, StallRun)
	if took <= time.Duration(calls)*SlowCall {
		p.slow = false
		return
	}
	if p.slow && waited {
		p.spread = SpreadRun
	}
	p.slow = true
}

// Stalled takes note of an inline call that has lost the connection.
func (p *Pace) Stalled() {
	if p.calls < StallRun {
		p.spread = SpreadRun
	}
	p.calls = 0
}
