package clientip

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/spoa-go/spoa"
)

func TestFind(t *testing.T) {
	text := func(s string) []spoa.Arg { return []spoa.Arg{{Name: "x", Value: spoa.String(s)}} }
	ip := func(s string) spoa.Value { return spoa.Addr(netip.MustParseAddr(s)) }
	path := spoa.Arg{Name: "path", Value: spoa.String("/192.0.2.9")}
	cdn := []netip.Prefix{
		netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("2001:db8:cd::/48"), netip.MustParsePrefix("203.0.113.7/32"),
	}
	for _, tc := range []struct {
		args    []spoa.Arg
		proxies []netip.Prefix
		want    string // or the error
	}{
		{text("192.0.2.1"), nil, "192.0.2.1"},
		{text(" 192.0.2.1 "), nil, "192.0.2.1"},
		{text("2001:db8::1"), nil, "2001:db8::1"},
		{text("::ffff:192.0.2.1"), nil, "192.0.2.1"},
		{text("192.0.2.1:65000"), nil, "192.0.2.1"},
		{text("[2001:db8::1]:65000"), nil, "2001:db8::1"},
		{text("[2001:db8::1]"), nil, "2001:db8::1"},
		{text("fe80::1%eth0"), nil, "fe80::1"},
		// What a client has made up stands before what proxies have added.
		{text("6.6.6.6, 192.0.2.1"), nil, "192.0.2.1"},
		{text("6.6.6.6, 192.0.2.1"), cdn, "192.0.2.1"},
		{text("6.6.6.6, 192.0.2.1, 198.51.100.3"), cdn, "192.0.2.1"},
		{text("6.6.6.6,192.0.2.1,2001:db8:cd::1,203.0.113.7"), cdn, "192.0.2.1"},
		{text("6.6.6.6, 198.51.100.3, 192.0.2.1"), cdn, "192.0.2.1"},
		{text("198.51.100.4, 198.51.100.3"), cdn, "198.51.100.4"},
		{text("6.6.6.6, unknown, 198.51.100.3"), cdn, `text "unknown": want an address`},
		{text("6.6.6.6, "), nil, `text ""`},
		{text(""), nil, `text ""`},
		{text("localhost"), nil, `text "localhost"`},
		{text(strings.Repeat("x", 16000)), nil, `text "` + strings.Repeat("x", 64) + `": want`},
		{[]spoa.Arg{{Value: spoa.Uint32(1)}}, nil, "argument is uint32: want an address"},
		{[]spoa.Arg{{}}, nil, "argument is null: want an address"},
		{nil, nil, "no argument"},
		{[]spoa.Arg{path, {Name: "src", Value: ip("192.0.2.1")}}, nil, "192.0.2.1"},
		{[]spoa.Arg{path, {Name: "ip", Value: ip("192.0.2.1")}, {Name: "dst", Value: ip("192.0.2.2")}}, nil, "192.0.2.1"},
		{[]spoa.Arg{{Name: "addr", Value: ip("192.0.2.2")}, {Name: "ip", Value: ip("192.0.2.1")}}, nil, "192.0.2.1"},
		{[]spoa.Arg{path, {Value: ip("192.0.2.1")}}, nil, "192.0.2.1"},
		{[]spoa.Arg{path, {Name: "ip"}, {Value: ip("192.0.2.1")}}, nil, "argument is null"},
		{[]spoa.Arg{path, {Name: "dst", Value: ip("192.0.2.2")}, {Value: ip("192.0.2.1")}}, nil, "2 addresses in 3 arguments: want one of them named ip"},
		{[]spoa.Arg{path, path}, nil, "0 addresses in 2 arguments"},
	} {
		have, err := Finder{tc.proxies}.Find(spoa.NewMessage("check-client-ip", tc.args...))
		if err != nil && strings.Contains(err.Error(), tc.want) {
			continue
		}
		if err != nil || have.String() != tc.want {
			t.Errorf("%v: want %s, have %v, %v", tc.args, tc.want, have, err)
		}
	}
}
