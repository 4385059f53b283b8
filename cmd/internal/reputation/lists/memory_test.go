package lists

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"testing"
	"time"
)

// addresses writes a list of n addresses, of which a tenth are prefixes of IPv6,
// and returns some of them.
func addresses(tb testing.TB, n int, seed uint64) (path string, some []netip.Addr) {
	r := rand.New(rand.NewPCG(seed, 2))
	path = filepath.Join(tb.TempDir(), "list")
	f, err := os.Create(path)
	if err != nil {
		tb.Fatal(err)
	}
	w := bufio.NewWriter(f)
	for i := range n {
		v := r.Uint64()
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(11 + v%88), byte(v >> 16), byte(v >> 8), byte(v >> 24)}), 32)
		if i%10 == 0 {
			p = netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 1, byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)}), 48)
		}
		if p.IsSingleIP() {
			fmt.Fprintln(w, p.Addr())
		} else {
			fmt.Fprintln(w, p)
		}
		if len(some) < 1<<16 {
			some = append(some, p.Addr())
		}
	}
	if err := w.Flush(); err != nil {
		tb.Fatal(err)
	}
	f.Close()
	return path, some
}

func inUse() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapInuse
}

// resident returns the bytes of the heap that the system has not got back. They
// are more than are in use where something new does not fit into what was freed.
func resident() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapSys - m.HeapReleased
}

// peak returns a function that stops watching the heap and returns the most that
// was resident.
func peak() func() uint64 {
	var most atomic.Uint64
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			most.Store(max(most.Load(), resident()))
			select {
			case <-stop:
				return
			case <-time.After(2 * time.Millisecond):
			}
		}
	}()
	return func() uint64 {
		close(stop)
		<-done
		return most.Load()
	}
}

// An entry takes some twenty bytes, a tenth of them being of IPv6.
func TestMemory(t *testing.T) {
	const n = 200_000
	path, _ := addresses(t, n, 1)
	runtime.GC()
	before := inUse()
	l, err := Open(t.Context(), Options{Block: []File{{Path: path}}, settle: time.Nanosecond})
	if err != nil {
		t.Fatal(err)
	}
	if have := float64(inUse()-before) / n; have > 40 { // the index of a table alone is 2
		t.Errorf("want 40 bytes an entry at most, have %.1f", have)
	}
	runtime.KeepAlive(l)
}

// BenchmarkMemory reports what the lists take at rest, and how much more while
// they are read again, with the same content and with another; and how late an
// answer was at worst meanwhile.
func BenchmarkMemory(b *testing.B) {
	for _, n := range []int{1_000_000, 2_000_000, 5_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			path, some := addresses(b, n, 1)
			other, _ := addresses(b, n, 7)
			debug.FreeOSMemory()
			before := resident()
			l, err := Open(b.Context(), Options{Block: []File{{Path: path}}, settle: time.Nanosecond})
			if err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				rest := resident() - before
				b.ReportMetric(float64(rest)/float64(l.Stats()[0].Entries), "B/entry")
				for _, file := range []string{path, other} {
					name := "same"
					if file != path {
						name = "other"
						if err := os.Rename(file, path); err != nil {
							b.Fatal(err)
						}
					}
					stop, most := peak(), slowest(l, some)
					if err := l.Reload(b.Context()); err != nil {
						b.Fatal(err)
					}
					b.ReportMetric(float64(stop()-before)/float64(rest), "peak/rest,"+name)
					b.ReportMetric(float64(most().Microseconds())/1e3, "ms-max,"+name)
				}
			}
		})
	}
}

// slowest looks up an address each 100 µs until the function that it returns is
// called, which returns the longest time that an answer came after it was due.
func slowest(l *Lists, some []netip.Addr) func() time.Duration {
	stop, done := make(chan struct{}), make(chan time.Duration)
	go func() {
		most := time.Duration(0)
		for i := 0; ; i++ {
			due := time.Now().Add(100 * time.Microsecond)
			time.Sleep(time.Until(due))
			l.Lookup(some[i%len(some)])
			most = max(most, time.Since(due))
			select {
			case <-stop:
				done <- most
				return
			default:
			}
		}
	}()
	return func() time.Duration {
		close(stop)
		return <-done
	}
}

func BenchmarkLookup(b *testing.B) {
	path, some := addresses(b, 1_000_000, 1)
	l, err := Open(b.Context(), Options{Block: []File{{Path: path}}})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		if l.Lookup(some[i&(len(some)-1)]).State != Listed {
			b.Fatal(some[i&(len(some)-1)])
		}
		i++
	}
}

func BenchmarkLoad(b *testing.B) {
	path, _ := addresses(b, 1_000_000, 1)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Open(b.Context(), Options{Block: []File{{Path: path}}, settle: time.Nanosecond}); err != nil {
			b.Fatal(err)
		}
	}
}
