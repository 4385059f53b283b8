package mmdb

import (
	"encoding/binary"
	"net/netip"
	"slices"
)

// A network is a prefix of a database, and the number of its place.
type network struct {
	prefix netip.Prefix
	place  uint32
}

// runs are all addresses, divided where the place changes. A lookup is a search
// for the last run that begins no later than the address, which for IPv4 an index
// by the upper half of the address makes short or spares. Walking the tree of the
// file bit by bit takes several times as long.
type runs struct {
	blocks [1<<16 + 1]block4 // each /16, and one behind the last
	v4     []run4            // without those that begin with a /16
	v6     []run6
}

type run4 struct{ first, place uint32 }

type block4 struct {
	runs  uint32 // number of runs before it
	place uint32 // of its first address
}

type run6 struct {
	hi, lo uint64 // the first address
	place  uint32
}

// newRuns makes runs of networks, which must not overlap.
func newRuns(networks []network) *runs {
	slices.SortFunc(networks, func(a, b network) int { return a.prefix.Addr().Compare(b.prefix.Addr()) })
	r := new(runs)
	for _, n := range networks {
		if n.prefix.Addr().Is4() {
			r.add4(n)
		} else {
			r.add6(n)
		}
	}
	r.index()
	r.v4, r.v6 = slices.Clip(r.v4), slices.Clip(r.v6)
	return r
}

// index fills the blocks, and takes out the runs that begin with one.
func (r *runs) index() {
	inner := r.v4[:0]
	i, place := 0, uint32(0)
	for key := range r.blocks {
		for ; i < len(r.v4) && uint64(r.v4[i].first) < uint64(key)<<16; i++ {
			inner = append(inner, r.v4[i])
			place = r.v4[i].place
		}
		if i < len(r.v4) && uint64(r.v4[i].first) == uint64(key)<<16 {
			place = r.v4[i].place
			i++
		}
		r.blocks[key] = block4{uint32(len(inner)), place}
	}
	r.v4 = inner
}

// add4 adds a network that begins after all others, and the run behind it. The
// last run that is there, of no place, either begins with it or remains before it.
func (r *runs) add4(n network) {
	b := n.prefix.Addr().As4()
	first := binary.BigEndian.Uint32(b[:])
	if i := len(r.v4) - 1; i >= 0 && r.v4[i].first == first {
		r.v4 = r.v4[:i]
	}
	if i := len(r.v4) - 1; i < 0 && n.place != 0 || i >= 0 && r.v4[i].place != n.place {
		r.v4 = append(r.v4, run4{first, n.place})
	}
	if next := first + 1<<(32-n.prefix.Bits()); next > first { // else it ends with the last address
		r.v4 = append(r.v4, run4{next, 0})
	}
}

func (r *runs) add6(n network) {
	hi, lo := halves(n.prefix.Addr())
	if i := len(r.v6) - 1; i >= 0 && r.v6[i].hi == hi && r.v6[i].lo == lo {
		r.v6 = r.v6[:i]
	}
	if i := len(r.v6) - 1; i < 0 && n.place != 0 || i >= 0 && r.v6[i].place != n.place {
		r.v6 = append(r.v6, run6{hi, lo, n.place})
	}
	nextHi, nextLo := hi, lo
	if bits := n.prefix.Bits(); bits <= 64 {
		nextHi += 1 << (64 - bits)
	} else if nextLo += 1 << (128 - bits); nextLo == 0 {
		nextHi++
	}
	if nextHi != 0 || nextLo != 0 { // else it ends with the last address
		r.v6 = append(r.v6, run6{nextHi, nextLo, 0})
	}
}

func halves(addr netip.Addr) (hi, lo uint64) {
	b := addr.As16()
	return binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])
}

// lookup returns the number of an address's place, 0 if it has none.
func (r *runs) lookup(addr netip.Addr) uint32 {
	addr = addr.Unmap()
	switch {
	case addr.Is4():
		b := addr.As4()
		return r.lookup4(binary.BigEndian.Uint32(b[:]))
	case addr.Is6():
		return r.lookup6(halves(addr))
	}
	return 0
}

func (r *runs) lookup4(addr uint32) uint32 {
	block := r.blocks[addr>>16]
	runs := r.v4[block.runs:r.blocks[addr>>16+1].runs]
	if len(runs) == 0 || runs[0].first > addr {
		return block.place
	}
	from := 0
	for n := len(runs); n > 1; { // runs[from] begins no later than addr, runs[from+n] after it
		half := n / 2
		if runs[from+half].first <= addr {
			from += half
		}
		n -= half
	}
	return runs[from].place
}

func (r *runs) lookup6(hi, lo uint64) uint32 {
	from, to := 0, len(r.v6)
	for from < to {
		mid := int(uint(from+to) / 2)
		if x := &r.v6[mid]; x.hi < hi || x.hi == hi && x.lo <= lo {
			from = mid + 1
		} else {
			to = mid
		}
	}
	if from == 0 {
		return 0
	}
	return r.v6[from-1].place
}
