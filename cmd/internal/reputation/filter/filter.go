// Package filter rules out, by one look at a small bitmap, that a source knows
// anything of an IPv4 address. Most addresses are on no list, and the table that
// holds those that are is too large for the processor's caches.
package filter

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
)

// Bounds of a filter's size.
const (
	minBits = 9  // 64 bytes
	maxBits = 24 // 2 MB, a block for each /24
)

// A Filter is a set of blocks of the IPv4 address space, all of one size. Once it
// is filled it may be used concurrently. The zero value has no block.
type Filter struct {
	shift  uint8
	blocks []uint64
}

// New returns an empty filter that divides the address space into about that many
// blocks: several for each prefix to be added, so that addresses beside these are
// seldom in the same block, but no more than the processor's caches have room for.
func New(blocks int) Filter {
	n := min(max(bits.Len(uint(blocks)), minBits), maxBits)
	return Filter{uint8(32 - n), make([]uint64, 1<<(n-6))}
}

// Add adds the blocks that the addresses from first to last touch.
func (f *Filter) Add(first, last uint32) {
	from, to := first>>f.shift, last>>f.shift
	low, high := ^uint64(0)<<(from&63), ^uint64(0)>>(63-to&63)
	if from>>6 == to>>6 {
		f.blocks[from>>6] |= low & high
		return
	}
	f.blocks[from>>6] |= low
	for i := from>>6 + 1; i < to>>6; i++ {
		f.blocks[i] = ^uint64(0)
	}
	f.blocks[to>>6] |= high
}

// AddPrefix adds the blocks that an IPv4 prefix touches.
func (f *Filter) AddPrefix(p netip.Prefix) {
	first := number(p.Masked().Addr())
	f.Add(first, first|uint32(uint64(1)<<(32-p.Bits())-1))
}

// Has reports whether the block of an address was added.
func (f *Filter) Has(addr uint32) bool {
	i := addr >> f.shift
	return uint64(i>>6) < uint64(len(f.blocks)) && f.blocks[i>>6]&(1<<(i&63)) != 0
}

// HasAddr is Has of an IPv4 address.
func (f *Filter) HasAddr(addr netip.Addr) bool { return f.Has(number(addr)) }

func number(addr netip.Addr) uint32 {
	b := addr.As4()
	return binary.BigEndian.Uint32(b[:])
}
