package lists

import (
	"net/netip"
	"strings"
	"testing"
)

// parsePrefix6 takes what netip does, but for zones and embedded IPv4 addresses,
// and nothing else.
func FuzzParsePrefix6(f *testing.F) {
	for _, s := range []string{
		"::", "::/0", "::1", "1::", "2001:DB8::/32", "1:2:3:4:5:6:7:8", "1:2:3:4:5:6:7::", "::2:3:4:5:6:7:8", "1::8/127",
		"", ":", ":::", "1:", ":1", "1:::2", "1::2::3", "12345::", "1:2:3:4:5:6:7", "1:2:3:4:5:6:7:8:9", "1:2:3:4:5:6:7:8::", "g::",
		"1::/129", "1::/", "1::/01", "1::/1/2", "::ffff:1:2", "::ffff:192.0.2.1", "::1.2.3.4", "fe80::1%eth0", "1.2.3.4", "2001:db8",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		want, err := netip.ParsePrefix(s)
		if addr, addrErr := netip.ParseAddr(s); addrErr == nil {
			want, err = netip.PrefixFrom(addr, addr.BitLen()), nil
		}
		have, ok := parsePrefix6([]byte(s))
		addr := want.Addr()
		wanted := err == nil && addr.Is6() && !addr.Is4In6() && !strings.ContainsAny(s, ".%")
		if ok != wanted || ok && have != want.Masked() {
			t.Errorf("%q: want %v, %v, have %v, %v", s, want.Masked(), wanted, have, ok)
		}
	})
}

// Reading the lines of a list makes no garbage, which would be resident beside it.
func TestParsePrefixAllocs(t *testing.T) {
	for _, s := range []string{"192.0.2.1", "192.0.2.0/24", "2001:db8::1", "2001:db8::/32"} {
		line := []byte(s)
		if n := testing.AllocsPerRun(100, func() { parsePrefix(line) }); n != 0 {
			t.Errorf("%s: want no allocation, have %v", s, n)
		}
	}
}

func TestParseLine(t *testing.T) {
	for _, tc := range []struct {
		line string
		want string // prefix or range, then number and note if there are any
		err  string
	}{
		{"192.0.2.1", "192.0.2.1/32", ""},
		{"192.0.2.0/24", "192.0.2.0/24", ""},
		{"192.0.2.0/24 30", "192.0.2.0/24 number 30", ""},
		{"192.0.2.0/24 \t 0 # why", "192.0.2.0/24 number 0 note why", ""},
		{"192.0.2.0/24#30", "192.0.2.0/24 note 30", ""},
		{"198.51.100.7,60", "198.51.100.7/32 number 60", ""},
		{"198.51.100.7 // beside a school", "198.51.100.7/32 note beside a school", ""},
		{"31.13.0.77/16", "31.13.0.0/16", ""},
		{"0.0.0.0/0", "0.0.0.0/0", ""},
		{"2001:db8::1", "2001:db8::1/128", ""},
		{"2001:DB8:ffff::/32 100", "2001:db8::/32 number 100", ""},
		{"::/0", "::/0", ""},
		{"::ffff:192.0.2.1", "192.0.2.1/32", ""},
		{"::ffff:192.0.2.1/120", "192.0.2.0/24", ""},
		{"::ffff:192.0.2.1/96", "0.0.0.0/0", ""},
		{"1.10.16.0/20 ; SBL256894", "1.10.16.0/20 note SBL256894", ""},
		{"198.51.100.7\t10", "198.51.100.7/32 number 10", ""},
		{"198.51.100.0/24 1", "198.51.100.0/24 number 1", ""}, // a map of HAProxy
		{"198.51.100.7\t0.87\tx", "198.51.100.7/32 number 0.87", ""},
		{"185.176.26.100\t18701\t29043\t2019-02-13\t2019-04-17", "185.176.26.100/32 number 18701", ""},

		{"198.51.100.0-198.51.100.255", "198.51.100.0/32 to 198.51.100.255", ""},
		{"203.0.113.8 - 203.0.113.15", "203.0.113.8/32 to 203.0.113.15", ""},
		{"203.0.113.8- 203.0.113.15 7", "203.0.113.8/32 to 203.0.113.15 number 7", ""},
		{"2001:db8::-2001:db8::ff", "2001:db8::/128 to 2001:db8::ff", ""},
		{"Some Corp:198.51.100.0-198.51.100.255", "198.51.100.0/32 to 198.51.100.255 note Some Corp", ""},
		{"A-B: #1; C:198.51.100.0-198.51.100.255", "198.51.100.0/32 to 198.51.100.255 note A-B: #1; C", ""},
		{"203.0.113.15-203.0.113.8", "", "before its start"},
		{"203.0.113.15-2001:db8::", "", "address family"},
		{"203.0.113.0/24-203.0.113.255", "", "netmask such as"},
		{"203.0.113.0-203.0.113.0/24", "", "want an address"},
		{"203.0.113.1-203.0.113.2 203.0.113.3", "", "two addresses"},

		{"198.51.100.0 255.255.255.0", "198.51.100.0/24", ""},
		{"198.51.100.77 255.255.255.0 30", "198.51.100.0/24 number 30", ""},
		{"203.0.113.0/255.255.255.0", "203.0.113.0/24", ""},
		{"203.0.113.0/255.0.255.0", "", "netmask such as"},
		{"203.0.113.0 255.0.255.0", "", "two addresses"},
		{"10.0.0.0/255.0.0.0", "10.0.0.0/8", ""},
		{"10.0.0.0/0.255.255.255", "", "netmask such as"},

		{"198.51.100.0\t198.51.100.255\t24\t3021\tEXAMPLE-NET\tZZ\tabuse@example.net", "198.51.100.0/24 number 3021 note EXAMPLE-NET", ""},
		{"203.0.113.0\t203.0.113.255\t24\t2877", "203.0.113.0/24 number 2877", ""},
		{"Start\tEnd\tNetmask\tAttacks\tName\tCountry\temail", "", ""},
		{"203.0.113.0\t203.0.113.255\t25\t2877", "", "not one network"},
		{"192.0.2.1 192.0.2.2", "", "two addresses"},
		{"192.0.2.1,192.0.2.2", "", "two addresses"},

		{"198.51.100.10:8080", "198.51.100.10/32", ""},
		{"[2001:db8::1]:443", "2001:db8::1/128", ""},
		{"[2001:db8::1]", "2001:db8::1/128", ""},
		{"198.51.100.10:99999", "", "neither"},

		{"ExitNode 0011BD2485AD45D984EC4159C88FC066E5E3300E", "", ""},
		{"Published 2024-01-01 00:00:00", "", ""},
		{"LastStatus 2024-01-01 01:00:00", "", ""},
		{"ExitAddress 198.51.100.23 2024-01-01 01:10:00", "198.51.100.23/32", ""},
		{"ExitAddress 2024-01-01", "", "neither"},

		{"create bad hash:net family inet hashsize 1024 maxelem 65536 comment", "", ""},
		{"add bad 198.51.100.0/24", "198.51.100.0/24", ""},
		{"add bad 198.51.100.7 timeout 86389", "198.51.100.7/32", ""},
		{`add bad 198.51.100.7 timeout 86389 comment "ssh; #3"`, "198.51.100.7/32 note ssh; #3", ""},
		{"add bad 198.51.100.7,tcp:22", "198.51.100.7/32", ""},
		{"add bad 198.51.100.7-198.51.100.9", "198.51.100.7/32 to 198.51.100.9", ""},
		{"add bad 198.51.100.7 nomatch", "", "exception"},
		{`add bad 198.51.100.7 comment "a nomatch"`, "198.51.100.7/32 note a nomatch", ""},
		{"add bad", "", "neither"},

		{"deny 198.51.100.0/24;", "198.51.100.0/24", ""},
		{"deny 198.51.100.0/24; # SBL1", "198.51.100.0/24 note SBL1", ""},
		{"deny  2001:db8::/32 ;", "2001:db8::/32", ""},
		{"deny all;", "all", ""},
		{"allow all;", "", ""},
		{"allow 192.0.2.1;", "", "allow list"},

		{"fe80::1%eth0", "", "zone"},
		{"fe80::%eth0/10", "", "neither"},
		{"::ffff:192.0.2.1/95", "", "shorter than /96"},
		{"192.0.2.0/33", "", "neither"},
		{"192.0.2.0/", "", "neither"},
		{"192.0.2.0/024", "", "neither"},
		{"192.0.2", "", "neither"},
		{"192.0.2.256", "", "neither"},
		{"192.0.2.1.1", "", "neither"},
		{"1.2.3.4 5.6.7.8 9", "", "not one network"},
		{"example.com", "", "neither"},
		{"185.176.026.100\t18701", "", "leading zero"},
		{"192.0.2.1 bad", "", "behind the address"},
		{"[", "", "neither"},
		{"]", "", "neither"},
		{"-", "", "neither"},
		{":", "", "neither"},
	} {
		rec, err := parseLine([]byte(tc.line), false, false)
		if tc.err != "" {
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%q: want error with %q, have %v", tc.line, tc.err, err)
			}
			continue
		}
		if have := rec.String(); err != nil || have != tc.want {
			t.Errorf("%q: want %q, have %q, %v", tc.line, tc.want, have, err)
		}
	}
	rec, err := parseLine([]byte("192.0.2.1 anything 7"), false, true)
	if err != nil || rec.String() != "192.0.2.1/32" {
		t.Errorf("column=ignore: want the address, have %v, %v", rec, err)
	}
	for line, want := range map[string]string{"allow 192.0.2.0/24;": "192.0.2.0/24", "deny all;": "", "allow all;": "all"} {
		if rec, err := parseLine([]byte(line), true, false); err != nil || rec.String() != want {
			t.Errorf("%q on an allow list: want %q, have %v, %v", line, want, rec, err)
		}
	}
	if _, err := parseLine([]byte("deny 192.0.2.1;"), true, false); err == nil {
		t.Error("deny on an allow list: want an error")
	}
}

func (r record) String() string {
	var words []string
	if r.prefix.IsValid() {
		words = append(words, r.prefix.String())
	}
	if r.last.IsValid() {
		words = append(words, "to", r.last.String())
	}
	if r.all {
		words = append(words, "all")
	}
	if len(r.number) > 0 {
		words = append(words, "number", string(r.number))
	}
	if len(r.note) > 0 {
		words = append(words, "note", string(r.note))
	}
	return strings.Join(words, " ")
}
