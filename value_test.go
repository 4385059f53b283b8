package spoa

import (
	"bufio"
	"bytes"
	"fmt"
	"math"
	"net/netip"
	"net/textproto"
	"strings"
	"testing"
)

// ipv6 returns an IPV6, even of a 4-in-6 address, as HAProxy sends it; Addr
// makes that an IPV4.
func ipv6(s string) Value {
	b := netip.MustParseAddr(s).As16()
	var v Value
	cutValue(append([]byte{byte(KindIPv6)}, b[:]...), &v)
	return v
}

var valueTests = []struct {
	name string
	v    Value
	wire string
}{
	{"null", Value{}, "\x00"},
	{"false", Bool(false), "\x01"}, // 0x11 here would read as true
	{"true", Bool(true), "\x11"},
	{"int32 0", Int32(0), "\x02\x00"},
	{"int32 max", Int32(math.MaxInt32), "\x02\xff\xf0\xfe\xfe\x3e"},
	// Negative numbers are sign-extended: 2^64-1 takes 10 bytes.
	{"int32 -1", Int32(-1), "\x02\xff\xf0\xfe\xfe\xfe\xfe\xfe\xfe\xfe\x0e"},
	{"int32 min", Int32(math.MinInt32), "\x02\xf0\xf1\xfe\xfe\xbe\xfe\xfe\xfe\xfe\x0e"},
	{"uint32 42", Uint32(42), "\x03\x2a"},
	{"uint32 max", Uint32(math.MaxUint32), "\x03\xff\xf0\xfe\xfe\x7e"},
	{"int64 -42", Int64(-42), "\x04\xf6\xee\xfe\xfe\xfe\xfe\xfe\xfe\xfe\x0e"},
	{"int64 max", Int64(math.MaxInt64), "\x04\xff\xf0\xfe\xfe\xfe\xfe\xfe\xfe\xfe\x06"},
	{"int64 min", Int64(math.MinInt64), "\x04\xf0\xf1\xfe\xfe\xfe\xfe\xfe\xfe\xfe\x06"},
	{"uint64 240", Uint64(240), "\x05\xf0\x00"},
	{"uint64 max", Uint64(math.MaxUint64), "\x05\xff\xf0\xfe\xfe\xfe\xfe\xfe\xfe\xfe\x0e"},
	{"ipv4", Addr(netip.MustParseAddr("192.0.2.1")), "\x06\xc0\x00\x02\x01"},
	{"ipv6", Addr(netip.MustParseAddr("2001:db8::1")), "\x07\x20\x01\x0d\xb8" + "\x00\x00\x00\x00\x00\x00\x00\x00" + "\x00\x00\x00\x01"},
	{"ipv6 with zone", Addr(netip.MustParseAddr("fe80::1%eth0")), "\x07\xfe\x80\x00\x00" + "\x00\x00\x00\x00\x00\x00\x00\x00" + "\x00\x00\x00\x01"},
	{"4-in-6 is sent as ipv4", Addr(netip.MustParseAddr("::ffff:192.0.2.1")), "\x06\xc0\x00\x02\x01"},
	{"4-in-6 received as ipv6", ipv6("::ffff:192.0.2.1"), "\x07\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\xc0\x00\x02\x01"},
	{"no address", Addr(netip.Addr{}), "\x00"},
	{"string", String("hello"), "\x08\x05hello"},
	{"empty string", String(""), "\x08\x00"},
	{"string of 240", String(strings.Repeat("x", 240)), "\x08\xf0\x00" + strings.Repeat("x", 240)},
	{"binary", Binary([]byte{0, 0xff, 0x80}), "\x09\x03\x00\xff\x80"},
	{"empty binary", Binary(nil), "\x09\x00"},
}

func TestValueWire(t *testing.T) {
	for _, tt := range valueTests {
		if want, have := tt.wire, string(appendValue(nil, tt.v)); want != have {
			t.Errorf("%s: encode: want %x, have %x", tt.name, want, have)
		}
		v := String("stale") // what a slot held before must not shine through
		rest, ok := cutValue([]byte(tt.wire+"\x2a"), &v)
		if !ok || string(rest) != "\x2a" || !tt.v.Equal(v) {
			t.Errorf("%s: decode: want %v %v and 2a, have %v %v and %x, %v", tt.name, tt.v.kind, tt.v, v.kind, v, rest, ok)
		}
		for i := range len(tt.wire) {
			if _, ok := cutValue([]byte(tt.wire[:i]), &v); ok {
				t.Errorf("%s: decode %x of %x: want refusal, have %v", tt.name, tt.wire[:i], tt.wire, v)
			}
		}
	}
}

func TestValueRefused(t *testing.T) {
	for _, tt := range []struct{ name, wire string }{
		{"int32 max + 1", "\x02\xf0\xf1\xfe\xfe\x3e"},
		{"int32 -1, not sign-extended", "\x02\xff\xf0\xfe\xfe\x7e"}, // 2^32-1
		{"int32 min - 1", "\x02\xff\xf0\xfe\xfe\xbe\xfe\xfe\xfe\xfe\x0e"},
		{"uint32 max + 1", "\x03\xf0\xf1\xfe\xfe\x7e"},
		{"uint32 -1", "\x03\xff\xf0\xfe\xfe\xfe\xfe\xfe\xfe\xfe\x0e"},
		{"int64 of 11 bytes", "\x04\xf0\x80\x80\x80\x80\x80\x80\x80\x80\x80\x00"},
		{"string, one byte short", "\x08\x03ab"},
		{"string of 2^64-1", "\x08\xff\xf0\xfe\xfe\xfe\xfe\xfe\xfe\xfe\x0eab"},
		{"string of 2^63", "\x08\xf0\xf1\xfe\xfe\xfe\xfe\xfe\xfe\xfe\x06ab"},
		{"binary of 2^32", "\x09\xf0\xf1\xfe\xfe\x7eab"},
		{"type 10", "\x0a\x00\x00"},
		{"type 11", "\x0b\x00\x00"},
		{"type 12", "\x0c\x00\x00"},
		{"type 13", "\x0d\x00\x00"},
		{"type 14", "\x0e\x00\x00"},
		{"type 15", "\x0f\x00\x00"},
		{"type 15 with flags", "\xff\x00\x00"},
	} {
		var v Value
		if _, ok := cutValue([]byte(tt.wire), &v); ok {
			t.Errorf("%s: want refusal, have %v %v", tt.name, v.kind, v)
		}
	}
}

// Only a BOOL has a flag; on other types flags are reserved and ignored.
func TestValueFlags(t *testing.T) {
	for _, tt := range []struct {
		wire string
		want Value
	}{
		{"\xf0", Value{}},
		{"\xe1", Bool(false)},
		{"\xf1", Bool(true)},
		{"\x14\x2a", Int64(42)},
		{"\x16\xc0\x00\x02\x01", Addr(netip.MustParseAddr("192.0.2.1"))},
		{"\x18\x02ab", String("ab")},
	} {
		var v Value
		if _, ok := cutValue([]byte(tt.wire), &v); !ok || !tt.want.Equal(v) {
			t.Errorf("%x: want %v %v, have %v %v, %v", tt.wire, tt.want.kind, tt.want, v.kind, v, ok)
		}
	}
}

// A value of another kind, or one that does not fit, is the zero value and
// false, so that a caller who drops the bool never sees a wrapped number.
func TestValueAccessors(t *testing.T) {
	v4, v6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	type boolean struct{ b, ok bool }
	type integer struct {
		i  int64
		ok bool
	}
	type unsigned struct {
		u  uint64
		ok bool
	}
	type address struct {
		a  netip.Addr
		ok bool
	}
	for _, tt := range []struct {
		v     Value
		kind  Kind
		b     boolean
		i     integer
		u     unsigned
		a     address
		bytes string
		str   string
	}{
		{v: Value{}, kind: KindNull, str: "<null>"},
		{v: Bool(true), kind: KindBool, b: boolean{true, true}, str: "true"},
		{v: Bool(false), kind: KindBool, b: boolean{false, true}, str: "false"},
		{v: Int32(1), kind: KindInt32, i: integer{1, true}, u: unsigned{1, true}, str: "1"},
		{v: Int32(-1), kind: KindInt32, i: integer{-1, true}, str: "-1"},
		{v: Uint32(math.MaxUint32), kind: KindUint32, i: integer{math.MaxUint32, true}, u: unsigned{math.MaxUint32, true}, str: "4294967295"},
		{v: Int64(math.MaxInt64), kind: KindInt64, i: integer{math.MaxInt64, true}, u: unsigned{math.MaxInt64, true}, str: "9223372036854775807"},
		{v: Int64(math.MinInt64), kind: KindInt64, i: integer{math.MinInt64, true}, str: "-9223372036854775808"},
		{v: Uint64(math.MaxInt64), kind: KindUint64, i: integer{math.MaxInt64, true}, u: unsigned{math.MaxInt64, true}, str: "9223372036854775807"},
		{v: Uint64(math.MaxUint64), kind: KindUint64, u: unsigned{math.MaxUint64, true}, str: "18446744073709551615"},
		{v: Addr(v4), kind: KindIPv4, a: address{v4, true}, str: "192.0.2.1"},
		{v: Addr(v6), kind: KindIPv6, a: address{v6, true}, str: "2001:db8::1"},
		{v: ipv6("::ffff:192.0.2.1"), kind: KindIPv6, a: address{v4, true}, str: "192.0.2.1"},
		{v: String("true"), kind: KindString, bytes: "true", str: "true"},
		{v: String(""), kind: KindString},
		{v: Binary([]byte("\x00\xff")), kind: KindBinary, bytes: "\x00\xff", str: "\x00\xff"},
		{v: Binary(nil), kind: KindBinary},
	} {
		name := tt.kind.String() + " " + tt.str
		if want, have := tt.kind, tt.v.Kind(); want != have {
			t.Errorf("%s: Kind: want %v, have %v", name, want, have)
		}
		var b boolean
		if b.b, b.ok = tt.v.Bool(); b != tt.b {
			t.Errorf("%s: Bool: want %v, have %v", name, tt.b, b)
		}
		var i integer
		if i.i, i.ok = tt.v.Int(); i != tt.i {
			t.Errorf("%s: Int: want %v, have %v", name, tt.i, i)
		}
		var u unsigned
		if u.u, u.ok = tt.v.Uint(); u != tt.u {
			t.Errorf("%s: Uint: want %v, have %v", name, tt.u, u)
		}
		var a address
		if a.a, a.ok = tt.v.Addr(); a != tt.a {
			t.Errorf("%s: Addr: want %v, have %v", name, tt.a, a)
		}
		if want, have := tt.bytes, string(tt.v.Bytes()); want != have {
			t.Errorf("%s: Bytes: want %q, have %q", name, want, have)
		}
		if want, have := tt.str, tt.v.String(); want != have {
			t.Errorf("%s: String: want %q, have %q", name, want, have)
		}
		if c := tt.v.Clone(); !tt.v.Equal(c) {
			t.Errorf("%s: Clone: want the same, have %v %v", name, c.kind, c)
		}
	}
}

func TestValueFormat(t *testing.T) {
	for _, tt := range []struct {
		format string
		v      Value
		want   string
	}{
		{"%v", Value{}, "<null>"},
		{"%q", Value{}, "<null>"},
		{"%v", String("null"), "null"},
		{"%q", String("null"), `"null"`},
		{"%q", Binary([]byte{0}), `"\x00"`},
		{"%q", Int64(-1), "-1"},
		{"%s", Bool(true), "true"},
		{"%.2v", String("abc"), "ab"},
		{"%5v|", Uint32(42), "   42|"},
		{"%x", String("a"), "61"},
	} {
		if have := fmt.Sprintf(tt.format, tt.v); tt.want != have {
			t.Errorf("%s of %v: want %s, have %s", tt.format, tt.v.Kind(), tt.want, have)
		}
	}
}

func TestValueEqual(t *testing.T) {
	values := []Value{{}, Bool(false), Bool(true), Int32(1), Int64(1), Uint32(1), Uint64(1), Int(2), String("1"), String(""),
		Binary([]byte("1")), Binary(nil), Addr(netip.MustParseAddr("0.0.0.1")), Addr(netip.MustParseAddr("::1")), Addr(netip.MustParseAddr("1::1"))}
	for i, v := range values {
		for j, w := range values {
			if have := v.Equal(w.Clone()); have != (i == j) {
				t.Errorf("%v %v, %v %v: want equal %v, have %v", v.Kind(), v, w.Kind(), w, i == j, have)
			}
		}
	}
}

// headers returns the names and values of a header block, and its error.
func headers(v Value) string {
	var s []string
	for h, err := range v.Headers() {
		if err != nil {
			s = append(s, err.Error())
		} else {
			s = append(s, fmt.Sprintf("%s=%s", h.Name, h.Value))
		}
	}
	return strings.Join(s, "|")
}

func bin(names ...string) Value {
	var b []byte
	for _, name := range names {
		b = appendString(b, name)
	}
	return Binary(b)
}

func TestHeaders(t *testing.T) {
	long := strings.Repeat("x", 5000)
	const malformed = "spoa: header block: malformed or cut short at byte "
	for _, tt := range []struct {
		name string
		v    Value
		want string
	}{
		{"NULL", Value{}, ""},
		{"text", String("host: example.org\r\ncookie: a:b\r\nx:  y z\t\r\nempty:\r\n\r\n"), "host=example.org|cookie=a:b|x=y z|empty="},
		{"text, none", String("\r\n"), ""},
		{"text, long", String("a: " + long + "\r\n\r\n"), "a=" + long},
		{"text, empty", String(""), malformed + `0 of 0: ""`},
		{"text, no end", String("a: b\r\n"), "a=b|" + malformed + `6 of 6: ""`},
		{"text, cut short", String("a: b\r\nc: d"), "a=b|" + malformed + `6 of 10: "c: d"`},
		{"text, no colon", String("a: b\r\nc\r\n\r\n"), "a=b|" + malformed + `6 of 11: "c\r\n\r\n"`},
		{"text, no name", String(": b\r\n\r\n"), malformed + `0 of 7: ": b\r\n\r\n"`},
		{"text, more", String("a: b\r\n\r\nbody"), "a=b|spoa: header block: 4 bytes after its end"},
		{"bin", bin("host", "example.org", "empty", "", "", ""), "host=example.org|empty="},
		{"bin, none", bin("", ""), ""},
		{"bin, long", bin("a", long, "", ""), "a=" + long},
		{"bin, empty", Binary(nil), malformed + `0 of 0: ""`},
		{"bin, no end", bin("a", "b"), "a=b|" + malformed + `4 of 4: ""`},
		{"bin, cut short", bin("a", "b", "c"), "a=b|" + malformed + `4 of 6: "\x01c"`},
		{"bin, length", Binary([]byte("\x01a\xff\xff\xff")), malformed + `0 of 5: "\x01a\xff\xff\xff"`},
		{"bin, no name", bin("", "b", "", ""), malformed + `0 of 5: "\x00\x01b\x00\x00"`},
		{"bin, more", bin("a", "b", "", "", "c"), "a=b|spoa: header block: 2 bytes after its end"},
		{"another kind", Int64(1), "spoa: header block: want string or binary, have int64"},
	} {
		if have := headers(tt.v); tt.want != have {
			t.Errorf("%s: want %.100s, have %.100s", tt.name, tt.want, have)
		}
		for range tt.v.Headers() {
			break // must be possible anywhere
		}
	}
}

// blocks returns a block of n header fields, as a browser sends them, in both
// forms.
func blocks(n int) (text, binary Value) {
	fields := []string{"host", "shop.example.org", "user-agent", "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
		"accept", "text/html,application/xhtml+xml", "accept-language", "en-GB,en;q=0.5", "accept-encoding", "gzip, deflate, br",
		"cookie", "session=0123456789abcdef0123456789abcdef", "cache-control", "max-age=0", "connection", "keep-alive"}
	var s strings.Builder
	var list []string
	for i := range n {
		name, value := fields[2*i%len(fields)], fields[(2*i+1)%len(fields)]
		fmt.Fprintf(&s, "%s: %s\r\n", name, value)
		list = append(list, name, value)
	}
	return String(s.String() + "\r\n"), bin(append(list, "", "")...)
}

func TestHeadersAllocs(t *testing.T) {
	text, binary := blocks(8)
	for _, v := range []Value{text, binary} {
		n := 0
		wantAllocs(t, v.Kind().String(), 0, func() {
			for h, err := range v.Headers() {
				if err == nil && string(h.Name) == "cookie" {
					n++
				}
			}
		})
		if n == 0 {
			t.Errorf("%v: want a cookie, have none", v.Kind())
		}
	}
}

func BenchmarkHeaders(b *testing.B) {
	for _, n := range []int{8, 40} {
		text, binary := blocks(n)
		for _, v := range []Value{text, binary} {
			b.Run(fmt.Sprintf("%v/%d", v.Kind(), n), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					for _, err := range v.Headers() {
						if err != nil {
							b.Fatal(err)
						}
					}
				}
			})
		}
		b.Run(fmt.Sprintf("textproto/%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := textproto.NewReader(bufio.NewReader(bytes.NewReader(text.Bytes()))).ReadMIMEHeader(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
