package spoa

import (
	"cmp"
	"maps"
	"slices"
	"time"
)

// bound is a semaphore: what MaxConcurrent allows one kind of message. A NOTIFY
// with such a message needs a slot before it may wait for a permit. Without one
// it waits here, so that it keeps neither a worker nor other NOTIFYs from their
// turn. It is guarded by workers.boundMu.
type bound struct {
	order   int // in which a NOTIFY takes the slots of several
	free    int // slots
	waiting jobList
}

// newBounds returns a bound for each message of limits.
func newBounds(limits map[string]int) map[string]*bound {
	if len(limits) == 0 {
		return nil
	}
	bounds := make(map[string]*bound, len(limits))
	for order, message := range slices.Sorted(maps.Keys(limits)) {
		bounds[message] = &bound{order: order, free: limits[message]}
	}
	return bounds
}

// boundsOf appends the bounds of n's messages to list, in their order.
func (w *workers) boundsOf(n *notify, list []*bound) []*bound {
	for name := range n.names() {
		if b := w.bounds[w.kind(name)]; b != nil && !slices.Contains(list, b) {
			list = append(list, b)
		}
	}
	slices.SortFunc(list, func(a, b *bound) int { return cmp.Compare(a.order, b.order) })
	return list
}

// enter takes a slot of each of j's bounds. If it reports false, j waits for one
// and releaseSlots starts it.
func (w *workers) enter(j *job) bool {
	if len(j.bounds) == 0 {
		return true
	}
	w.boundMu.Lock()
	defer w.boundMu.Unlock()
	return j.takeSlots()
}

// takeSlots takes the slots that j lacks, in the order of the bounds, so that jobs
// never wait for each other's. If there is none j waits for it, and it reports
// false. The caller must hold workers.boundMu.
func (j *job) takeSlots() bool {
	for ; j.slots < len(j.bounds); j.slots++ {
		b := j.bounds[j.slots]
		if b.free == 0 {
			b.waiting.push(j)
			return false
		}
		b.free--
	}
	return true
}

// releaseSlots passes j's slots to the jobs that wait for them, and starts those
// that lack no other.
func (w *workers) releaseSlots(j *job) {
	if j.slots == 0 {
		return
	}
	now := w.clock()
	var ready jobList
	w.boundMu.Lock()
	for _, b := range j.bounds[:j.slots] {
		next := b.waiting.next(now)
		if next == nil {
			b.free++
			continue
		}
		b.waiting.remove(next)
		if next.slots++; next.takeSlots() {
			ready.push(next)
		}
	}
	w.boundMu.Unlock()
	j.slots = 0
	for next := ready.head; next != nil; next = ready.head {
		ready.remove(next)
		next.started = now
		w.start(next)
	}
}

// shedBounded answers the jobs that have waited for a slot for too long.
func (w *workers) shedBounded(now time.Duration) {
	if len(w.bounds) == 0 || !w.anyTimeout() {
		return
	}
	var shed []*job
	w.boundMu.Lock()
	for _, b := range w.bounds {
		shed = append(shed, b.waiting.shed(now)...)
	}
	w.boundMu.Unlock()
	for _, j := range shed {
		go j.queue.answerShed([]*job{j}) // a peer that does not read blocks it
	}
}
