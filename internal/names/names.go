// Package names turns names that come as bytes into strings that last, without an
// allocation for those that come again and again.
package names

import (
	"hash/maphash"
	"sync/atomic"
)

// Cache keeps the names that were seen lately. Several goroutines may use it at
// once, without a lock. It is bounded: a peer that invents names replaces others,
// which are then copied again. The zero value is ready.
type Cache struct {
	slots [sets * ways]atomic.Pointer[string]
}

const (
	sets   = 256
	ways   = 4 // slots that a name may be in
	maxLen = 64
)

var seed = maphash.MakeSeed() // a peer cannot choose names that collide

// Intern returns b as a string that may be kept.
func (c *Cache) Intern(b []byte) string {
	switch {
	case len(b) == 0:
		return ""
	case len(b) > maxLen:
		return string(b)
	}
	hash := maphash.Bytes(seed, b)
	set := c.slots[hash%sets*ways:][:ways]
	for i := range set {
		if p := set[i].Load(); p != nil && *p == string(b) {
			return *p
		}
	}
	// First in, first out. If another goroutine does so too, a name may get lost
	// or be there twice, which costs a copy.
	for i := ways - 1; i > 0; i-- {
		set[i].Store(set[i-1].Load())
	}
	s := string(b)
	set[0].Store(&s)
	return s
}
