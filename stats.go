package spoa

import (
	"maps"
	"slices"
	"sync/atomic"
	"time"
)

// MessageStats are the figures of one kind of message since New.
type MessageStats struct {
	Message string           // its name; empty: all messages that have no handler of their own
	Count   map[Fault]uint64 // messages done with, by fault; those without one are Count[0]
	Late    uint64           // handlers that returned after the handler timeout
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
