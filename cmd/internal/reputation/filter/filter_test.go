package filter

import (
	"math/rand/v2"
	"net/netip"
	"testing"
)

// A filter has every address that was added, whatever its size, and of those
// that were not only few.
func TestFilter(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, n := range []int{0, 1, 10, 1000, 100_000, 3_000_000} {
		f := New(16 * n)
		if have := r.Uint32(); f.Has(have) {
			t.Errorf("%d: want none, have %d", n, have)
		}
		var added []uint32
		for range n {
			addr := r.Uint32()
			added = append(added, addr)
			f.Add(addr, addr)
		}
		for _, addr := range added {
			if !f.Has(addr) {
				t.Fatalf("%d: want %d, have it not", n, addr)
			}
		}
		const tries = 10_000
		wrong := 0
		for range tries {
			if f.Has(r.Uint32()) {
				wrong++
			}
		}
		if most := max(1, n/1_000_000) * tries / 10; wrong > most {
			t.Errorf("%d: want at most %d of %d others, have %d", n, most, tries, wrong)
		}
	}
}

// Prefixes of every length end where they should.
func TestFilterPrefixes(t *testing.T) {
	for _, size := range []int{0, 1000, 1 << 20} {
		for bits := range 33 {
			for _, addr := range []string{"0.0.0.0", "10.20.30.40", "255.255.255.255"} {
				p := netip.PrefixFrom(netip.MustParseAddr(addr), bits)
				f := New(16 * size)
				f.AddPrefix(p)
				first := number(p.Masked().Addr())
				last := first | uint32(uint64(1)<<(32-bits)-1)
				for _, in := range []uint32{first, last, first/2 + last/2} {
					if !f.Has(in) {
						t.Errorf("%d blocks, %v: want %d, have it not", len(f.blocks)*64, p, in)
					}
				}
				block := uint32(1) << f.shift
				if before := first - block; before < first && f.Has(before) {
					t.Errorf("%d blocks, %v: have the block before", len(f.blocks)*64, p)
				}
				if after := last + block; after > last && f.Has(after) {
					t.Errorf("%d blocks, %v: have the block after", len(f.blocks)*64, p)
				}
			}
		}
	}
}

func TestFilterZero(t *testing.T) {
	var f Filter
	if f.HasAddr(netip.MustParseAddr("0.0.0.0")) || f.HasAddr(netip.MustParseAddr("255.255.255.255")) {
		t.Error("want no address")
	}
}
