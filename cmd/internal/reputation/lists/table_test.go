package lists

import (
	"math/rand/v2"
	"net/netip"
	"testing"
)

func grow(n int) int { return 2*n + 8 }

func newSet(entries ...entry) *set {
	s := new(set)
	for _, e := range entries {
		s.add(e, grow)
	}
	s.sort()
	return s
}

// randomEntries returns prefixes that crowd at a few places, so that they nest,
// touch and repeat, and reach both ends of the address space.
func randomEntries(r *rand.Rand, n int) (entries []entry) {
	for range n {
		var a netip.Addr
		if r.IntN(2) == 0 {
			b := [4]byte{byte(r.IntN(3) * 127), byte(r.IntN(2) * 255), byte(r.IntN(4) * 85), byte(r.IntN(256))}
			b[0] += b[0] & 1 // 0, 128, 254
			b[0] += byte(r.IntN(2)) * (b[0] >> 7)
			a = netip.AddrFrom4(b)
		} else {
			b := [16]byte{0: byte(r.IntN(2) * 255), 7: byte(r.IntN(3)), 8: byte(r.IntN(2) * 255), 15: byte(r.IntN(256))}
			a = netip.AddrFrom16(b)
		}
		if r.IntN(20) == 0 {
			a = netip.MustParseAddr("255.255.255.255")
		}
		bits := a.BitLen() - r.IntN(12)
		if r.IntN(10) == 0 {
			bits = r.IntN(a.BitLen() + 1)
		}
		p, _ := a.Prefix(bits)
		entries = append(entries, entry{prefix: p, score: uint8(r.IntN(scores))})
	}
	return entries
}

// slowLookup is the rule of scores word by word.
func slowLookup(lists []ruler, entries [][]entry, addr netip.Addr) Verdict {
	have := Verdict{Score: BestScore}
	for i, l := range lists {
		longest, score := -1, uint8(0)
		for _, e := range entries[i] {
			if e.prefix.Contains(addr) && (e.prefix.Bits() > longest || e.prefix.Bits() == longest && e.score < score) {
				longest, score = e.prefix.Bits(), e.score
			}
		}
		switch {
		case longest < 0:
		case l.allow:
			if have.State != Allowed {
				have = Verdict{Allowed, BestScore, l.name}
			}
		case have.State == Unlisted || have.State == Listed && score < have.Score:
			have = Verdict{Listed, score, l.name}
		}
	}
	return have
}

func TestTableAgreesWithTheRule(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for round := range 200 {
		var lists []ruler
		var entries [][]entry
		for i := range 1 + r.IntN(4) {
			es := randomEntries(r, r.IntN(40))
			entries = append(entries, es)
			lists = append(lists, ruler{string(rune('a' + i)), r.IntN(4) == 0, newSet(es...)})
		}
		table := newTable(lists)
		check := func(a netip.Addr) {
			if want, have := slowLookup(lists, entries, a), table.lookup(a); want != have {
				t.Errorf("round %d, %v: want %v, have %v", round, a, want, have)
			}
			if have := table.lookup(a); have.State != Unlisted && table.excludes(a) {
				t.Errorf("round %d, %v: excluded, want %v", round, a, have)
			}
		}
		for _, es := range append(entries, randomEntries(r, 50)) {
			for _, e := range es {
				first := e.prefix.Addr()
				last := toU128(first).or(ones(first.BitLen() - e.prefix.Bits())).addr(first.BitLen())
				for _, a := range []netip.Addr{first, last, first.Prev(), last.Next()} {
					if a.IsValid() {
						check(a)
					}
				}
			}
		}
		if t.Failed() {
			return
		}
	}
}

// Adding a mild list never lifts an address out of a severe one, and a list that
// refines itself does: the example of README and -h.
func TestWorstWins(t *testing.T) {
	set := func(prefix string, score uint8) *set {
		return newSet(entry{prefix: netip.MustParsePrefix(prefix), score: score})
	}
	severe, mild := ruler{"severe", false, set("198.51.96.0/20", 0)}, ruler{"mild", false, set("198.51.100.7/32", 60)}
	office := ruler{"office", true, set("198.51.100.0/24", 0)}
	refined := ruler{"severe", false, newSet(
		entry{prefix: netip.MustParsePrefix("198.51.96.0/20")}, entry{prefix: netip.MustParsePrefix("198.51.100.7/32"), score: 60})}
	addr := netip.MustParseAddr("198.51.100.7")
	for _, tc := range []struct {
		name  string
		lists []ruler
		want  Verdict
	}{
		{"severe before mild", []ruler{severe, mild}, Verdict{Listed, 0, "severe"}},
		{"mild before severe", []ruler{mild, severe}, Verdict{Listed, 0, "severe"}},
		{"mild alone", []ruler{mild}, Verdict{Listed, 60, "mild"}},
		{"one list refines itself", []ruler{refined}, Verdict{Listed, 60, "severe"}},
		{"allowed, by a shorter prefix", []ruler{severe, mild, office}, Verdict{Allowed, 100, "office"}},
		{"none", nil, Verdict{Unlisted, 100, ""}},
	} {
		if have := newTable(tc.lists).lookup(addr); have != tc.want {
			t.Errorf("%s: want %v, have %v", tc.name, tc.want, have)
		}
	}
}

func TestExcludes(t *testing.T) {
	table := newTable([]ruler{{"a", true, newSet(entry{prefix: netip.MustParsePrefix("192.0.2.0/24")})}})
	for addr, want := range map[string]bool{"192.0.2.1": false, "198.51.100.1": true, "2001:db8::1": false, "::ffff:192.0.2.1": false} {
		if have := table.excludes(netip.MustParseAddr(addr)); have != want {
			t.Errorf("%s: want %v, have %v", addr, want, have)
		}
	}
}

func TestLookupOfNoAddress(t *testing.T) {
	table := newTable([]ruler{{"all", false, newSet(entry{prefix: netip.MustParsePrefix("0.0.0.0/0")}, entry{prefix: netip.MustParsePrefix("::/0")})}})
	for _, tc := range []struct {
		addr netip.Addr
		want State
	}{
		{netip.Addr{}, Unlisted},
		{netip.MustParseAddr("::ffff:192.0.2.1"), Listed},
		{netip.MustParseAddr("fe80::1%eth0"), Listed},
		{netip.MustParseAddr("255.255.255.255"), Listed},
		{netip.MustParseAddr("0.0.0.0"), Listed},
		{netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"), Listed},
	} {
		if have := table.lookup(tc.addr); have.State != tc.want {
			t.Errorf("%v: want %v, have %v", tc.addr, tc.want, have)
		}
	}
}

func TestLookupAllocates(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	table := newTable([]ruler{{"a", false, newSet(randomEntries(r, 100)...)}, {"b", true, newSet(randomEntries(r, 10)...)}})
	addrs := []netip.Addr{netip.MustParseAddr("128.0.0.7"), netip.MustParseAddr("::7"), netip.MustParseAddr("::ffff:8.8.8.8")}
	if have := testing.AllocsPerRun(100, func() {
		for _, a := range addrs {
			table.lookup(a)
		}
	}); have != 0 {
		t.Errorf("want no allocation, have %v", have)
	}
}

func TestLongest(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for range 50 {
		entries := randomEntries(r, 60)
		s := newSet(entries...)
		for _, e := range randomEntries(r, 60) {
			addr := e.prefix.Addr()
			want := slowLookup([]ruler{{name: "a"}}, [][]entry{entries}, addr)
			have, ok := s.longest(addr)
			if ok != (want.State == Listed) || ok && (have.score != want.Score || !have.prefix.Contains(addr)) {
				t.Fatalf("%v: want %v, have %v, %v", addr, want, have, ok)
			}
		}
	}
	if e, ok := newSet(randomEntries(r, 9)...).longest(netip.Addr{}); ok {
		t.Errorf("zero Addr: want none, have %v", e)
	}
}

func TestRangePrefixes(t *testing.T) {
	for _, tc := range []struct {
		first, last string
		want        []string
	}{
		{"198.51.100.0", "198.51.100.255", []string{"198.51.100.0/24"}},
		{"203.0.113.8", "203.0.113.15", []string{"203.0.113.8/29"}},
		{"192.0.2.1", "192.0.2.1", []string{"192.0.2.1/32"}},
		{"192.0.2.1", "192.0.2.6", []string{"192.0.2.1/32", "192.0.2.2/31", "192.0.2.4/31", "192.0.2.6/32"}},
		{"0.0.0.0", "255.255.255.255", []string{"0.0.0.0/0"}},
		{"255.255.255.254", "255.255.255.255", []string{"255.255.255.254/31"}},
		{"2001:db8::", "2001:db8:0:1:ffff:ffff:ffff:ffff", []string{"2001:db8::/63"}},
		{"::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", []string{"::/0"}},
		{"ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
			[]string{"ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe/127"}},
	} {
		var have []string
		rangePrefixes(netip.MustParseAddr(tc.first), netip.MustParseAddr(tc.last), func(p netip.Prefix) { have = append(have, p.String()) })
		if len(have) != len(tc.want) {
			t.Errorf("%s-%s: want %v, have %v", tc.first, tc.last, tc.want, have)
			continue
		}
		for i := range have {
			if have[i] != tc.want[i] {
				t.Errorf("%s-%s: want %v, have %v", tc.first, tc.last, tc.want, have)
			}
		}
	}
}
