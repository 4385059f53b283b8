package reputation

import (
	"maps"
	"sync"
	"sync/atomic"
)

// maxJoined bounds what a joiner keeps.
const maxJoined = 1024

// A joiner joins names by commas. It allocates only when it meets two names for
// the first time, or has met too many. Its zero value is ready to use.
type joiner struct {
	joined atomic.Pointer[map[[2]string]string] // never changed, only replaced
	mu     sync.Mutex                           // one replacement at a time
}

func (j *joiner) join(a, b string) string {
	if a == "" {
		return b
	}
	if m := j.joined.Load(); m != nil {
		if s, ok := (*m)[[2]string{a, b}]; ok {
			return s
		}
	}
	return j.learn(a, b)
}

func (j *joiner) learn(a, b string) string {
	s := a + "," + b
	j.mu.Lock()
	defer j.mu.Unlock()
	m := map[[2]string]string{}
	if old := j.joined.Load(); old != nil {
		if len(*old) >= maxJoined {
			return s
		}
		m = maps.Clone(*old)
	}
	m[[2]string{a, b}] = s
	j.joined.Store(&m)
	return s
}
