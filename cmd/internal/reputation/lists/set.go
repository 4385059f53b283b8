package lists

import (
	"cmp"
	"net/netip"
	"slices"
)

const (
	noteBits = 19               // of a packed entry
	maxNotes = 1<<noteBits - 1  // different notes kept for a list
	maxNote  = 80               // bytes kept of a note
	recent   = 1024             // notes remembered to find the same one again
	scoreAt  = noteBits         // position of the score in a packed entry
	bitsAt   = scoreAt + 7      // position of the prefix length in packed4
	addrAt   = 32               // position of the address in packed4
	lowScore = 1<<7 - 1         // mask of a score
	lowNote  = uint64(maxNotes) // mask of a note
	lowBits4 = 1<<(addrAt-bitsAt) - 1
)

// set is what one list holds, sorted by address and then by prefix length, one
// entry for each prefix. It takes 8 bytes for an IPv4 entry and 24 for another.
type set struct {
	v4    []uint64 // address, prefix length, score, note
	v6    []entry6
	notes notes
}

type entry6 struct {
	hi, lo uint64
	meta   uint64 // prefix length, score, note
}

// entry is a prefix, masked and unmapped, with its score and its note.
type entry struct {
	prefix netip.Prefix
	score  uint8
	note   uint32 // 0 for none
}

func (s *set) len() int { return len(s.v4) + len(s.v6) }

// add adds an entry at the end. The caller sorts when all are there. Grow
// returns the capacity to grow to when there is no room.
func (s *set) add(e entry, grow func(length int) int) {
	u, low := toU128(e.prefix.Addr()), uint64(e.score)<<scoreAt|uint64(e.note)
	if e.prefix.Addr().Is4() {
		if len(s.v4) == cap(s.v4) {
			s.v4 = slices.Grow(s.v4, grow(len(s.v4))-len(s.v4))
		}
		s.v4 = append(s.v4, u.lo<<addrAt|uint64(e.prefix.Bits())<<bitsAt|low)
		return
	}
	if len(s.v6) == cap(s.v6) {
		s.v6 = slices.Grow(s.v6, grow(len(s.v6))-len(s.v6))
	}
	s.v6 = append(s.v6, entry6{u.hi, u.lo, uint64(e.prefix.Bits())<<bitsAt | low})
}

// sort brings entries in order. Of several for one prefix the lowest score
// stays.
func (s *set) sort() {
	slices.Sort(s.v4)
	s.v4 = slices.CompactFunc(s.v4, func(a, b uint64) bool { return a>>bitsAt == b>>bitsAt })
	slices.SortFunc(s.v6, func(a, b entry6) int {
		return cmp.Or(cmp.Compare(a.hi, b.hi), cmp.Compare(a.lo, b.lo), cmp.Compare(a.meta, b.meta))
	})
	s.v6 = slices.CompactFunc(s.v6, func(a, b entry6) bool {
		return a.hi == b.hi && a.lo == b.lo && a.meta>>bitsAt == b.meta>>bitsAt
	})
}

func entryAt4(e uint64) entry {
	return entry{
		netip.PrefixFrom(u128{lo: e >> addrAt}.addr(32), int(e>>bitsAt&lowBits4)), uint8(e >> scoreAt & lowScore), uint32(e & lowNote),
	}
}

func entryAt6(e entry6) entry {
	return entry{
		netip.PrefixFrom(u128{e.hi, e.lo}.addr(128), int(e.meta>>bitsAt)), uint8(e.meta >> scoreAt & lowScore), uint32(e.meta & lowNote),
	}
}

// all yields the entries in order, IPv4 first.
func (s *set) all(yield func(entry) bool) {
	for _, e := range s.v4 {
		if !yield(entryAt4(e)) {
			return
		}
	}
	for _, e := range s.v6 {
		if !yield(entryAt6(e)) {
			return
		}
	}
}

// longest returns the entry of the longest prefix that contains addr.
func (s *set) longest(addr netip.Addr) (entry, bool) {
	for n := addr.BitLen(); n >= 0 && addr.IsValid(); n-- {
		p, _ := addr.Prefix(n)
		u := toU128(p.Addr())
		if addr.Is4() {
			want := u.lo<<addrAt | uint64(n)<<bitsAt
			i, _ := slices.BinarySearch(s.v4, want)
			if i < len(s.v4) && s.v4[i]>>bitsAt == want>>bitsAt {
				return entryAt4(s.v4[i]), true
			}
			continue
		}
		i, _ := slices.BinarySearchFunc(s.v6, entry6{u.hi, u.lo, uint64(n) << bitsAt}, func(a, b entry6) int {
			return cmp.Or(cmp.Compare(a.hi, b.hi), cmp.Compare(a.lo, b.lo), cmp.Compare(a.meta, b.meta))
		})
		if i < len(s.v6) && entryAt6(s.v6[i]).prefix == p {
			return entryAt6(s.v6[i]), true
		}
	}
	return entry{}, false
}

// notes are the words that a list has for its entries, such as a number of
// Spamhaus or the name of malware. The same words in a row of entries, or soon
// again, are kept once.
type notes struct {
	text  []byte
	ends  []uint32
	known map[string]uint32 // while the list is read
}

// add returns the number of a note, or 0 where it is empty or there are too many.
func (n *notes) add(note []byte) uint32 {
	note = note[:min(len(note), maxNote)]
	if len(note) == 0 {
		return 0
	}
	if i, ok := n.known[string(note)]; ok {
		return i
	}
	if len(n.ends) == maxNotes {
		return 0
	}
	n.text = append(n.text, note...)
	n.ends = append(n.ends, uint32(len(n.text)))
	i := uint32(len(n.ends))
	if n.known == nil || len(n.known) == recent {
		n.known = make(map[string]uint32)
	}
	n.known[string(note)] = i
	return i
}

func (n *notes) get(i uint32) string {
	if i == 0 {
		return ""
	}
	from := uint32(0)
	if i > 1 {
		from = n.ends[i-2]
	}
	return string(n.text[from:n.ends[i-1]])
}

// done gives back what only reading needed.
func (n *notes) done() {
	n.known = nil
	n.text, n.ends = slices.Clip(n.text), slices.Clip(n.ends)
}
