// Package limit keeps a log readable that a peer could flood.
package limit

import (
	"sync"
	"time"
)

// Limiter lets a kind of log line through once a second, and counts the others.
// The kinds must be a fixed set, which no peer can add to.
type Limiter struct {
	Now   func() time.Duration
	mu    sync.Mutex
	kinds map[string]*limited
}

type limited struct {
	next       time.Duration
	suppressed int
}

// Allow reports whether a line of that kind may be logged, and how many were not
// since the last.
func (l *Limiter) Allow(kind string) (suppressed int, ok bool) {
	now := l.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	k := l.kinds[kind]
	if k == nil {
		if l.kinds == nil {
			l.kinds = make(map[string]*limited)
		}
		k = new(limited)
		l.kinds[kind] = k
	} else if now < k.next {
		k.suppressed++
		return 0, false
	}
	suppressed, k.suppressed = k.suppressed, 0
	k.next = now + time.Second
	return suppressed, true
}
