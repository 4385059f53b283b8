package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spoa-go/spoa"
	"github.com/spoa-go/spoa/cmd/internal/reputation/lists"
)

// scorer sets the variables of an address.
type scorer func(context.Context, netip.Addr, *spoa.Actions)

// newScorer returns one that goes by lists, or by chance if there are none, and
// reports to judged every verdict.
func newScorer(l *lists.Lists, judged func(list string, listed bool)) scorer {
	if l == nil {
		return func(_ context.Context, _ netip.Addr, a *spoa.Actions) {
			judged("", false)
			a.SetVar(spoa.ScopeSess, "ip_score", spoa.Uint32(rand.Uint32N(lists.BestScore+1)))
		}
	}
	return func(_ context.Context, ip netip.Addr, a *spoa.Actions) {
		v := l.Lookup(ip)
		listed := v.State == lists.Listed
		if !listed {
			v.List = ""
		}
		judged(v.List, listed)
		a.SetVar(spoa.ScopeSess, "ip_score", spoa.Uint32(uint32(v.Score)))
		if listed {
			a.SetVar(spoa.ScopeSess, "ip_list", spoa.String(v.List))
		} else {
			// A session of several requests may have had one before a reload.
			a.UnsetVar(spoa.ScopeSess, "ip_list")
		}
	}
}

// checkClientIP returns the handler of check-client-ip. It fails if the message
// names no address to judge.
func checkClientIP(delay time.Duration, find finder, score scorer) spoa.HandlerFunc {
	return func(ctx context.Context, m *spoa.Message, a *spoa.Actions) error {
		if delay > 0 {
			t := time.NewTimer(delay)
			defer t.Stop()
			select {
			case <-t.C:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		ip, err := find.address(m)
		if err != nil {
			return err
		}
		score(ctx, ip, a)
		return nil
	}
}

// finder finds the address that a message is about.
type finder struct{ proxies prefixes }

// address returns that of the only argument; or of the argument that is named ip,
// src or addr; or the only address among the arguments.
func (f finder) address(m *spoa.Message) (netip.Addr, error) {
	switch m.Len() {
	case 0:
		return netip.Addr{}, errors.New("no argument: want the client's address, such as args src")
	case 1:
		return f.of(m.Arg(0).Value)
	}
	for _, name := range []string{"ip", "src", "addr"} {
		if v, ok := m.Lookup(name); ok {
			return f.of(v)
		}
	}
	var found []netip.Addr
	for _, v := range m.Args() {
		if addr, err := f.of(v); err == nil {
			found = append(found, addr)
		}
	}
	if len(found) != 1 {
		return netip.Addr{}, fmt.Errorf("%d addresses in %d arguments: want one of them named ip, such as args ip=src", len(found), m.Len())
	}
	return found[0], nil
}

// of returns the address that a value holds, or names in a text.
func (f finder) of(v spoa.Value) (netip.Addr, error) {
	if addr, ok := v.Addr(); ok {
		return addr, nil
	}
	if v.Kind() != spoa.KindString {
		return netip.Addr{}, fmt.Errorf("argument is %v: want an address, or a text that names one", v.Kind())
	}
	return f.last(v.String())
}

// last returns the last address of a list such as X-Forwarded-For that is not a
// trusted proxy's, or the first if all are. Proxies add the address that they see
// at the end; what stands before that of a proxy that is not trusted, the client
// may have made up.
func (f finder) last(text string) (netip.Addr, error) {
	for {
		i := strings.LastIndexByte(text, ',')
		addr, err := parseAddr(strings.TrimSpace(text[i+1:]))
		if err != nil || i < 0 || !f.proxies.contain(addr) {
			return addr, err
		}
		text = text[:i]
	}
}

// parseAddr parses an address, also in brackets or with a port.
func parseAddr(s string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(s, "["), "]"))
	if err == nil {
		return addr.Unmap().WithZone(""), nil
	}
	if ap, err := netip.ParseAddrPort(s); err == nil {
		return ap.Addr().Unmap().WithZone(""), nil
	}
	return netip.Addr{}, fmt.Errorf("text %.64q: want an address", s)
}

// prefixes is a repeatable flag: addresses and prefixes.
type prefixes []netip.Prefix

func (p *prefixes) String() string { return "" }

func (p *prefixes) Set(s string) error {
	prefix, err := netip.ParsePrefix(s)
	if err != nil {
		addr, err := netip.ParseAddr(s)
		if err != nil {
			return errors.New("want an address or a prefix, such as 192.0.2.0/24")
		}
		prefix = netip.PrefixFrom(addr, addr.BitLen())
	}
	*p = append(*p, prefix.Masked())
	return nil
}

func (p prefixes) contain(addr netip.Addr) bool {
	return slices.ContainsFunc(p, func(prefix netip.Prefix) bool { return prefix.Contains(addr) })
}
