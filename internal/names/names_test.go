package names

import (
	"strconv"
	"strings"
	"sync"
	"testing"
	"unsafe"
)

// Names are kept up to a bound, by several goroutines at once.
func TestCache(t *testing.T) {
	var c Cache
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range 4 * len(c.slots) {
				want := "name-" + strconv.Itoa(i)
				if have := c.Intern([]byte(want)); want != have {
					t.Errorf("want %s, have %s", want, have)
				}
			}
		})
	}
	wg.Wait()
	for _, size := range []int{0, 1, maxLen, maxLen + 1, 1 << 20} {
		long := strings.Repeat("x", size)
		have := c.Intern([]byte(long))
		if long != have {
			t.Errorf("want %d x, have %q", size, have)
		}
		again := unsafe.StringData(c.Intern([]byte(long))) == unsafe.StringData(have)
		if kept := size <= maxLen; kept != again {
			t.Errorf("name of %d bytes: want kept %v, have %v", size, kept, again)
		}
	}
}

// The names of a usual configuration cost no allocation.
func TestAllocs(t *testing.T) {
	var c Cache
	usual := make([][]byte, 50)
	for i := range usual {
		usual[i] = []byte("usual-" + strconv.Itoa(i))
	}
	if n := testing.AllocsPerRun(100, func() {
		for _, name := range usual {
			c.Intern(name)
		}
	}); n > 0 {
		t.Errorf("want no allocation, have %v", n)
	}
}
