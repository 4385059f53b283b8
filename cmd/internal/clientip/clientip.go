// Package clientip finds the client's address in a message of HAProxy's.
package clientip

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/spoa-go/spoa"
)

// Finder finds the address that a message is about. The zero Finder trusts no
// proxy.
type Finder struct {
	Proxies []netip.Prefix // whose word on where a request comes from is taken
}

// Find returns the address of the only argument; or of the argument that is named
// ip, src or addr; or the only address among the arguments. An argument that is a
// string may name an address, also in brackets or with a port, or several as
// X-Forwarded-For does: then it is the last that is not a proxy's. The address is
// unmapped and has no zone.
func (f Finder) Find(m *spoa.Message) (netip.Addr, error) {
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
func (f Finder) of(v spoa.Value) (netip.Addr, error) {
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
func (f Finder) last(text string) (netip.Addr, error) {
	for {
		i := strings.LastIndexByte(text, ',')
		addr, err := parse(strings.TrimSpace(text[i+1:]))
		if err != nil || i < 0 || !f.trusts(addr) {
			return addr, err
		}
		text = text[:i]
	}
}

func (f Finder) trusts(addr netip.Addr) bool {
	return slices.ContainsFunc(f.Proxies, func(prefix netip.Prefix) bool { return prefix.Contains(addr) })
}

// parse parses an address, also in brackets or with a port.
func parse(s string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(s, "["), "]"))
	if err == nil {
		return addr.Unmap().WithZone(""), nil
	}
	if ap, err := netip.ParseAddrPort(s); err == nil {
		return ap.Addr().Unmap().WithZone(""), nil
	}
	return netip.Addr{}, fmt.Errorf("text %.64q: want an address", s)
}
