package mmdb

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
)

// randomNetworks returns networks that do not overlap, of few places: what bits
// at random leave of the whole.
func randomNetworks(r *rand.Rand, whole netip.Prefix, all []network) []network {
	if r.IntN(8) == 0 || whole.Bits() == whole.Addr().BitLen() {
		if place := r.Uint32N(4); place > 0 { // some have none
			all = append(all, network{whole, place})
		}
		return all
	}
	one := netip.PrefixFrom(whole.Addr(), whole.Bits()+1)
	b := whole.Addr().AsSlice()
	b[whole.Bits()/8] |= 0x80 >> (whole.Bits() % 8)
	addr, _ := netip.AddrFromSlice(b)
	halves := []netip.Prefix{one, netip.PrefixFrom(addr, whole.Bits()+1)}
	for _, half := range halves {
		if len(all) > 500 {
			break
		}
		all = randomNetworks(r, half, all)
	}
	return all
}

// last returns the last address of a prefix.
func last(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	addr, _ := netip.AddrFromSlice(b)
	return addr
}

// The runs agree with a search through all networks, at their ends and beside
// them.
func TestRuns(t *testing.T) {
	for seed := range uint64(20) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		all := randomNetworks(rnd, netip.MustParsePrefix("0.0.0.0/0"), nil)
		all = append(all, randomNetworks(rnd, netip.MustParsePrefix("::/0"), nil)...)
		rnd.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		slow := func(addr netip.Addr) uint32 {
			for _, n := range all {
				if n.prefix.Contains(addr) {
					return n.place
				}
			}
			return 0
		}
		r := newRuns(append([]network(nil), all...))
		for i := 1; i < len(r.v4); i++ {
			if r.v4[i-1].first >= r.v4[i].first {
				t.Fatalf("seed %d: runs out of order at %d", seed, i)
			}
		}
		for _, n := range all {
			first, end := n.prefix.Addr(), last(n.prefix)
			for _, addr := range []netip.Addr{first, end, first.Prev(), end.Next()} {
				if want, have := slow(addr), r.lookup(addr); addr.IsValid() && want != have {
					t.Fatalf("seed %d: %v: want %d, have %d", seed, addr, want, have)
				}
			}
		}
	}
}

func TestRunsEdges(t *testing.T) {
	p := netip.MustParsePrefix
	for _, prefix := range []string{"0.0.0.0/0", "128.0.0.0/1", "0.0.0.0/32", "255.255.255.255/32", "::/0", "8000::/1", "::/128", "ffff::/16", "1:2:3:4::/64", "1:2:3:4:8000::/65"} {
		r := newRuns([]network{{p(prefix), 7}})
		first, end := p(prefix).Addr(), last(p(prefix))
		for _, addr := range []netip.Addr{first, end} {
			if have := r.lookup(addr); have != 7 {
				t.Errorf("%s: %v: want 7, have %d", prefix, addr, have)
			}
		}
		for _, addr := range []netip.Addr{first.Prev(), end.Next()} {
			if have := r.lookup(addr); have != 0 {
				t.Errorf("%s: %v: want 0, have %d", prefix, addr, have)
			}
		}
	}
	// A place that goes on where a /16 begins.
	r := newRuns([]network{{p("192.0.128.0/17"), 7}, {p("192.1.0.0/16"), 7}, {p("192.2.0.0/17"), 7}})
	for addr, want := range map[string]uint32{"192.0.127.255": 0, "192.0.128.0": 7, "192.1.0.0": 7, "192.1.255.255": 7, "192.2.127.255": 7, "192.2.128.0": 0} {
		if have := r.lookup(netip.MustParseAddr(addr)); have != want {
			t.Errorf("%s: want %d, have %d", addr, want, have)
		}
	}
	none := newRuns(nil)
	for _, addr := range []netip.Addr{{}, netip.IPv6Unspecified(), netip.IPv4Unspecified()} {
		if have := none.lookup(addr); have != 0 {
			t.Errorf("%v: want 0, have %d", addr, have)
		}
	}
}

func BenchmarkRuns(b *testing.B) {
	rnd := rand.New(rand.NewPCG(1, 0))
	var all []network
	for i := range uint32(400_000) {
		all = append(all, network{netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(i >> 11), byte(i >> 3), byte(i << 5)}), 27), 1 + i%200})
	}
	r := newRuns(all)
	addrs := make([]netip.Addr, 1<<12)
	for i := range addrs {
		addrs[i] = netip.AddrFrom4([4]byte{byte(rnd.Uint32N(195)), byte(rnd.Uint32()), byte(rnd.Uint32()), 1})
	}
	sum := uint32(0)
	for i := 0; b.Loop(); i++ {
		sum += r.lookup(addrs[i&(len(addrs)-1)])
	}
	if fmt.Sprint(sum) == "" {
		b.Fail()
	}
}
