package reputation

import (
	"maps"
	"sync"
	"sync/atomic"
)

// maxJoined bounds what a Joiner keeps.
const maxJoined = 1024

// A Joiner joins strings. It allocates only for two that it meets for the first
// time, or if it has met too many. Its zero value is ready to use, also
// concurrently.
type Joiner struct {
	joined atomic.Pointer[map[[3]string]string] // never changed, only replaced
	mu     sync.Mutex                           // one replacement at a time
}

// Join returns a, sep and b as one string.
func (j *Joiner) Join(a, sep, b string) string {
	key := [3]string{a, sep, b}
	if m := j.joined.Load(); m != nil {
		if s, ok := (*m)[key]; ok {
			return s
		}
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	s := a + sep + b
	m := map[[3]string]string{}
	if old := j.joined.Load(); old != nil {
		if len(*old) >= maxJoined {
			return s
		}
		m = maps.Clone(*old)
	}
	m[key] = s
	j.joined.Store(&m)
	return s
}

// list returns the names in list, which are joined by commas, and another one.
func (j *Joiner) list(list, name string) string {
	if list == "" {
		return name
	}
	return j.Join(list, ",", name)
}
