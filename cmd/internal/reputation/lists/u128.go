package lists

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
)

// u128 is an address as a number. An IPv4 address stands in the low 32 bits.
type u128 struct{ hi, lo uint64 }

func toU128(a netip.Addr) u128 {
	if a.Is4() {
		b := a.As4()
		return u128{lo: uint64(binary.BigEndian.Uint32(b[:]))}
	}
	b := a.As16()
	return u128{binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])}
}

// addr returns the address of the family with that many bits.
func (u u128) addr(width int) netip.Addr {
	if width == 32 {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], uint32(u.lo))
		return netip.AddrFrom4(b)
	}
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], u.hi)
	binary.BigEndian.PutUint64(b[8:], u.lo)
	return netip.AddrFrom16(b)
}

func (u u128) less(v u128) bool { return u.hi < v.hi || u.hi == v.hi && u.lo < v.lo }

// next returns u+1, and false if there is no such number.
func (u u128) next() (u128, bool) {
	lo, carry := bits.Add64(u.lo, 1, 0)
	hi, over := bits.Add64(u.hi, 0, carry)
	return u128{hi, lo}, over == 0
}

// ones returns the number whose lowest n bits are set.
func ones(n int) u128 {
	switch {
	case n >= 128:
		return u128{^uint64(0), ^uint64(0)}
	case n > 64:
		return u128{1<<(n-64) - 1, ^uint64(0)}
	case n == 64:
		return u128{0, ^uint64(0)}
	}
	return u128{0, 1<<n - 1}
}

func (u u128) or(v u128) u128 { return u128{u.hi | v.hi, u.lo | v.lo} }

func (u u128) trailingZeros() int {
	if u.lo != 0 {
		return bits.TrailingZeros64(u.lo)
	}
	return 64 + bits.TrailingZeros64(u.hi)
}

// rangePrefixes calls yield with the fewest prefixes that make up the range
// from first to last, which are of one family and in that order.
func rangePrefixes(first, last netip.Addr, yield func(netip.Prefix)) {
	width := first.BitLen()
	from, to := toU128(first), toU128(last)
	for {
		n := min(from.trailingZeros(), width)
		for n > 0 && to.less(from.or(ones(n))) {
			n--
		}
		yield(netip.PrefixFrom(from.addr(width), width-n))
		end := from.or(ones(n))
		next, ok := end.next()
		if !ok || !end.less(to) {
			return
		}
		from = next
	}
}
