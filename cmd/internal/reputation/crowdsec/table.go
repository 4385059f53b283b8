package crowdsec

import (
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gaissmai/bart"
	"github.com/spoa-go/spoa/cmd/internal/reputation"
	"github.com/spoa-go/spoa/cmd/internal/reputation/filter"
)

// maxFindings bounds the findings that decisions share.
const maxFindings = 10_000

// table holds decisions. Once it is in force, it is only read.
type table struct {
	prefixes  *bart.Table[[]inForce]
	filter    filter.Filter // of the IPv4 prefixes, once it is sealed
	countries map[string][]inForce
	systems   map[uint32][]inForce
	ignored   int // decisions that make no sense here
}

// inForce is a decision until its time is over.
type inForce struct {
	id      int64
	until   time.Duration // since the source's start
	finding *reputation.Finding
}

func newTable() *table {
	return &table{prefixes: new(bart.Table[[]inForce]), countries: map[string][]inForce{}, systems: map[uint32][]inForce{}}
}

// clone returns a copy, not sealed. The slices are shared: they are replaced, not
// changed.
func (t *table) clone() *table {
	return &table{prefixes: t.prefixes.Clone(), countries: maps.Clone(t.countries), systems: maps.Clone(t.systems), ignored: t.ignored}
}

// seal makes t ready to be read. It must not change afterwards.
func (t *table) seal() {
	t.filter = filter.New(16 * t.prefixes.Size4())
	for p := range t.prefixes.All4() {
		t.filter.AddPrefix(p)
	}
}

// has reports whether there is a decision on a prefix of an address.
func (t *table) has(addr netip.Addr) bool {
	return (!addr.Is4() || t.filter.HasAddr(addr)) && t.prefixes.Contains(addr)
}

// excludes reports whether there is surely no decision on any subject with that
// address.
func (t *table) excludes(addr netip.Addr) bool {
	return addr.Is4() && !t.filter.HasAddr(addr) && len(t.countries)+len(t.systems) == 0
}

// size returns the number of subjects that have decisions.
func (t *table) size() int { return t.prefixes.Size() + len(t.countries) + len(t.systems) }

// worst returns the worst finding of all decisions that apply to a subject and
// are not over, or nil.
func (t *table) worst(sub *reputation.Subject, start time.Time) (f *reputation.Finding) {
	here := t.has(sub.Addr)
	country, system := t.countries[sub.Country], t.systems[sub.ASN]
	if !here && country == nil && system == nil {
		return nil
	}
	now := time.Since(start)
	if here {
		for _, all := range t.prefixes.Supernets(netip.PrefixFrom(sub.Addr, sub.Addr.BitLen())) {
			f = worse(f, all, now)
		}
	}
	return worse(worse(f, country, now), system, now)
}

// worse returns f, or the finding of a decision that is worse than f.
func worse(f *reputation.Finding, all []inForce, now time.Duration) *reputation.Finding {
	for i := range all {
		if d := &all[i]; d.until > now && (f == nil || d.finding.Score < f.Score) {
			f = d.finding
		}
	}
	return f
}

func (t *table) add(d *decision, in inForce) {
	t.change(d, func(all []inForce) []inForce { return append(without(all, d.ID), in) })
}

func (t *table) remove(d *decision) {
	t.change(d, func(all []inForce) []inForce { return without(all, d.ID) })
}

// without returns a copy of all without one of them.
func without(all []inForce, id int64) []inForce {
	return slices.DeleteFunc(slices.Clone(all), func(d inForce) bool { return d.id == id })
}

// change replaces the decisions on what d is about.
func (t *table) change(d *decision, f func([]inForce) []inForce) {
	switch strings.ToLower(d.Scope) {
	case "ip", "range":
		p, err := parsePrefix(d.Value)
		if err != nil {
			t.ignored++
			return
		}
		t.prefixes.Modify(p, func(all []inForce, _ bool) ([]inForce, bool) {
			all = f(all)
			return all, len(all) == 0
		})
	case "country":
		change(t.countries, strings.ToUpper(d.Value), f)
	case "as":
		number := d.Value
		if len(number) > 2 && strings.EqualFold(number[:2], "AS") {
			number = number[2:]
		}
		n, err := strconv.ParseUint(number, 10, 32)
		if err != nil || n == 0 {
			t.ignored++
			return
		}
		change(t.systems, uint32(n), f)
	default:
		t.ignored++
	}
}

func change[K comparable](m map[K][]inForce, k K, f func([]inForce) []inForce) {
	if all := f(m[k]); len(all) > 0 {
		m[k] = all
	} else {
		delete(m, k)
	}
}

// parsePrefix parses an address or a prefix.
func parsePrefix(s string) (netip.Prefix, error) {
	if !strings.Contains(s, "/") {
		addr, err := netip.ParseAddr(s)
		if err != nil {
			return netip.Prefix{}, err
		}
		addr = addr.Unmap().WithZone("")
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, err
	}
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked(), nil
}
