package lists

import (
	"encoding/binary"
	"math"
	"net/netip"

	"github.com/spoa-go/spoa/cmd/internal/reputation/filter"
)

// State says how an address stands with the lists.
type State uint8

const (
	Unlisted State = iota // on no list
	Listed                // on a block list
	Allowed               // on an allow list, whatever the block lists say
)

func (s State) String() string {
	switch s {
	case Listed:
		return "listed"
	case Allowed:
		return "allowed"
	}
	return "unlisted"
}

// BestScore is the score of an address that is allowed or on no list.
const BestScore = 100

// Verdict is what all lists together say of an address.
type Verdict struct {
	State State
	Score uint8  // 0, the worst, to BestScore
	List  string // name of the list that decided, empty if the address is on none
}

const (
	scores   = BestScore + 1
	maxLists = (1<<16 - 1) / scores // so that a verdict has a number of 16 bits
)

// table is what is in force: for every address the verdict of all lists, worked
// out before and only read from then on. Addresses with one verdict that follow
// each other make a run, and a lookup searches for the run of an address. A
// single address among others of another verdict thus takes two runs, of 4 bytes
// each in IPv4, where the upper half of an address is an index and need not be
// kept, and of 18 in IPv6. For IPv4 a filter comes first.
type table struct {
	verdicts []Verdict // by number; 0 is that of an address on no list
	v4       table4
	v6       table6
}

type table4 struct {
	filter filter.Filter     // addresses that may have a verdict other than 0
	carry  [1 << 16]uint16   // verdict at the begin of each /16
	first  [1<<16 + 1]uint32 // index of the first run that begins within each /16
	runs   []uint32          // lower half of the first address, and the verdict
}

type table6 struct {
	hi, lo []uint64 // first addresses
	ids    []uint16
}

// lookup does not allocate.
func (t *table) lookup(addr netip.Addr) Verdict {
	addr = addr.Unmap()
	switch {
	case addr.Is4():
		b := addr.As4()
		return t.verdicts[t.v4.lookup(binary.BigEndian.Uint32(b[:]))]
	case addr.Is6():
		return t.verdicts[t.v6.lookup(toU128(addr))]
	}
	return t.verdicts[0]
}

func (t *table) excludes(addr netip.Addr) bool { return addr.Is4() && !t.v4.filter.HasAddr(addr) }

func (t *table4) lookup(addr uint32) uint16 {
	if !t.filter.Has(addr) {
		return 0
	}
	key, runs := addr<<16|0xffff, t.runs[t.first[addr>>16]:t.first[addr>>16+1]]
	if len(runs) == 0 || runs[0] > key {
		return t.carry[addr>>16]
	}
	from := 0
	for n := len(runs); n > 1; { // runs[from] begins at addr or before, runs[from+n] after
		half := n / 2
		if runs[from+half] <= key {
			from += half
		}
		n -= half
	}
	return uint16(runs[from])
}

func (t *table6) lookup(addr u128) uint16 {
	from, to := 0, len(t.ids)
	for from < to {
		if mid := int(uint(from+to) / 2); addr.less(u128{t.hi[mid], t.lo[mid]}) {
			to = mid
		} else {
			from = mid + 1
		}
	}
	if from == 0 {
		return 0
	}
	return t.ids[from-1]
}

// ruler is a list as it takes part in a table.
type ruler struct {
	name  string
	allow bool
	set   *set
}

// newTable works out the verdicts. Between lists the lowest score wins, the
// first list among equals; within one list it is the longest prefix; and an
// allow list wins over all block lists. There are at most maxLists.
func newTable(lists []ruler) *table {
	t := &table{verdicts: make([]Verdict, 1, 1+len(lists)*scores)}
	t.verdicts[0] = Verdict{Score: BestScore}
	for _, l := range lists {
		for score := range scores {
			v := Verdict{Listed, uint8(score), l.name}
			if l.allow {
				v.State, v.Score = Allowed, BestScore
			}
			t.verdicts = append(t.verdicts, v)
		}
	}
	n := 0
	merge(lists, 32, func(pos u128, _ uint16) {
		if pos.lo&0xffff != 0 {
			n++
		}
	})
	t.v4.fill(lists, n)
	n = 0
	merge(lists, 128, func(u128, uint16) { n++ })
	t.v6.fill(lists, n)
	return t
}

func (t *table4) fill(lists []ruler, n int) {
	t.runs, t.filter = make([]uint32, 0, n), filter.New(5*n)
	last, at := uint16(0), 0 // the verdict of the last run, and the next /16 to be begun
	since := uint32(0)       // its first address
	begin := func(until int) {
		for ; at < until; at++ {
			t.carry[at], t.first[at] = last, uint32(len(t.runs))
		}
	}
	merge(lists, 32, func(pos u128, id uint16) {
		if last != 0 {
			t.filter.Add(since, uint32(pos.lo)-1)
		}
		since = uint32(pos.lo)
		begin(int(pos.lo >> 16))
		if pos.lo&0xffff == 0 {
			last = id
		}
		begin(int(pos.lo>>16) + 1)
		if pos.lo&0xffff != 0 {
			t.runs = append(t.runs, uint32(pos.lo<<16)|uint32(id))
		}
		last = id
	})
	if last != 0 {
		t.filter.Add(since, math.MaxUint32)
	}
	begin(len(t.carry))
	t.first[len(t.carry)] = uint32(len(t.runs))
}

func (t *table6) fill(lists []ruler, n int) {
	t.hi, t.lo, t.ids = make([]uint64, 0, n), make([]uint64, 0, n), make([]uint16, 0, n)
	merge(lists, 128, func(pos u128, id uint16) {
		t.hi, t.lo, t.ids = append(t.hi, pos.hi), append(t.lo, pos.lo), append(t.ids, id)
	})
}

// merge calls emit, in order, with each address of a family at which the number
// of the verdict changes. Before the first it is 0.
func merge(lists []ruler, width int, emit func(pos u128, id uint16)) {
	walkers := make([]walker, len(lists))
	for i, l := range lists {
		walkers[i].start(l.set, width)
	}
	last := uint16(0)
	for {
		pos, more := u128{}, false
		for i := range walkers {
			if w := &walkers[i]; w.more && (!more || w.pos.less(pos)) {
				pos, more = w.pos, true
			}
		}
		if !more {
			return
		}
		for i := range walkers {
			for w := &walkers[i]; w.more && w.pos == pos; {
				w.step()
			}
		}
		if id := winner(lists, walkers); id != last {
			emit(pos, id)
			last = id
		}
	}
}

func winner(lists []ruler, walkers []walker) uint16 {
	best, score := 0, scores
	for i := range walkers {
		w := &walkers[i]
		if len(w.open) == 0 {
			continue
		}
		s := int(w.open[len(w.open)-1].score)
		switch {
		case lists[i].allow:
			return uint16(1 + i*scores)
		case s < score:
			best, score = 1+i*scores+s, s
		}
	}
	return uint16(best)
}

// walker goes over a set from the first address to the last and stops where a
// prefix begins or ends.
type walker struct {
	v4   []uint64 // still to come
	v6   []entry6
	wide int    // bits of an address
	open []span // prefixes around pos, each within the one before
	pos  u128   // the next stop
	more bool   // whether there is one
}

type span struct {
	last  u128
	score uint8
}

func (w *walker) start(s *set, width int) {
	w.wide = width
	if width == 32 {
		w.v4 = s.v4
	} else {
		w.v6 = s.v6
	}
	w.find()
}

// head returns the first entry still to come.
func (w *walker) head() (first u128, bits int, score uint8, ok bool) {
	switch {
	case len(w.v4) > 0:
		e := w.v4[0]
		return u128{lo: e >> addrAt}, int(e >> bitsAt & lowBits4), uint8(e >> scoreAt & lowScore), true
	case len(w.v6) > 0:
		e := w.v6[0]
		return u128{e.hi, e.lo}, int(e.meta >> bitsAt), uint8(e.meta >> scoreAt & lowScore), true
	}
	return u128{}, 0, 0, false
}

// find looks for the next stop.
func (w *walker) find() {
	first, _, _, begins := w.head()
	if len(w.open) > 0 {
		last := w.open[len(w.open)-1].last
		if !begins || last.less(first) {
			w.pos, w.more = last.next()
			w.more = w.more && (w.wide > 32 || w.pos.lo>>32 == 0)
			return
		}
	}
	w.pos, w.more = first, begins
}

// step goes to pos: past what ends before it, or into what begins there.
func (w *walker) step() {
	first, bits, score, begins := w.head()
	if n := len(w.open); n > 0 && (!begins || w.open[n-1].last.less(first)) {
		w.open = w.open[:n-1]
	} else {
		w.open = append(w.open, span{first.or(ones(w.wide - bits)), score})
		w.v4, w.v6 = w.v4[min(1, len(w.v4)):], w.v6[min(1, len(w.v6)):]
	}
	w.find()
}
