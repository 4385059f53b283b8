package spoa

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"net/textproto"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func TestOtherProtocol(t *testing.T) {
	for _, tt := range []struct{ bytes, want string }{
		{"GET / HTTP/1.1\r\n", "HTTP"}, {"POST /", "HTTP"}, {"HEAD /", "HTTP"}, {"PUT /", "HTTP"}, {"DELETE /", "HTTP"},
		{"OPTIONS *", "HTTP"}, {"CONNECT a:1", "HTTP"}, {"TRACE /", "HTTP"}, {"PATCH /", "HTTP"}, {"HTTP/1.1 400 Bad Request", "HTTP"},
		{"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/2"},
		{"\x16\x03\x01\x02\x00\x01", "TLS"}, {"\x15\x03\x03\x00\x02\x02\x0a", "TLS"},
		{"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n", "the PROXY protocol"},
		{"\r\n\r\n\x00\r\nQUIT\n\x21", "the PROXY protocol"},
		{"SSH-2.0-OpenSSH_9.9\r\n", "SSH"},
		{"\x00\x00\x00\x7d\x01", ""}, {"\x00\x03\x16\x03", ""}, {"\x16\x04\x00\x00", ""}, {"GETS", ""}, {"\x00\x00\x00\x00", ""},
	} {
		have := otherProtocol([]byte(tt.bytes))
		switch {
		case tt.want == "":
			if have != nil {
				t.Errorf("%q: want nothing, have %v", tt.bytes, have)
			}
		case have == nil:
			t.Errorf("%q: want %s, have nothing", tt.bytes, tt.want)
		default:
			words := "invalid frame received (4): the peer speaks " + tt.want + ", not SPOP; "
			if text := have.Error(); !strings.HasPrefix(text, words) || strings.Contains(text, "really") || strings.Contains(text, "\n") {
				t.Errorf("%q: want %s and what to do, have %s", tt.bytes, words, text)
			}
			if size := binary.BigEndian.Uint32([]byte(tt.bytes)); size <= defaultFrameSize {
				t.Errorf("%q: want what is no length of a frame, have %d bytes", tt.bytes, size)
			}
		}
		if other := otherProtocol([]byte(tt.bytes[:lengthSize])); (other == nil) != (have == nil) {
			t.Errorf("%q: want the first 4 bytes to do, have %v", tt.bytes, other)
		}
	}
}

// ids encodes the ids of a frame.
func ids(stream, id uint64) []byte { return appendVarint(appendVarint(nil, stream), id) }

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func sameArg(a, b Arg) bool { return a.Name == b.Name && a.Value.Equal(b.Value) }

func sameAction(a, b Action) bool {
	return a.Scope == b.Scope && a.Name == b.Name && a.Unset == b.Unset && a.Value.Equal(b.Value)
}

func mustDecode(t testing.TB, payload string) *notify {
	t.Helper()
	n := new(notify)
	if err := n.decode([]byte(payload)); err != nil {
		t.Fatalf("decode %q: %v", payload, err)
	}
	return n
}

// messagesOf returns the messages of n that are still to be cut off.
func messagesOf(n *notify) (msgs []*Message) {
	for n.nextMessage() {
		m := n.current
		msgs = append(msgs, &m)
	}
	return msgs
}

func argsOf(m *Message) (args []Arg) {
	for name, v := range m.Args() {
		args = append(args, Arg{name, v})
	}
	return args
}

// ipv6 returns an IPV6, even of a 4-in-6 address, as HAProxy sends it; Addr
// makes that an IPV4.
func ipv6(s string) Value {
	b := netip.MustParseAddr(s).As16()
	var v Value
	cutValue(append([]byte{byte(KindIPv6)}, b[:]...), &v)
	return v
}

// Each pair is the last number of one length and the first of the next.
var varintTests = []struct {
	v   uint64
	hex string
}{
	{0, "00"},
	{239, "ef"},
	{240, "f0 00"},
	{2287, "ff 7f"},
	{2288, "f0 80 00"},
	{264431, "ff ff 7f"},
	{264432, "f0 80 80 00"},
	{33818863, "ff ff ff 7f"},
	{33818864, "f0 80 80 80 00"},
	{4328786159, "ff ff ff ff 7f"},
	{4328786160, "f0 80 80 80 80 00"},
	{16380, "fc f0 06"},
	{math.MaxInt64, "ff f0 fe fe fe fe fe fe fe 06"},
	{math.MaxUint64, "ff f0 fe fe fe fe fe fe fe 0e"},
}

func TestVarint(t *testing.T) {
	for _, tt := range varintTests {
		enc := unhex(t, tt.hex)
		if want, have := enc, appendVarint(nil, tt.v); !bytes.Equal(want, have) {
			t.Errorf("encode %d: want %x, have %x", tt.v, want, have)
		}
		for _, tail := range []string{"", "\x00", "\xff"} {
			v, n := varint(append(enc[:len(enc):len(enc)], tail...))
			if v != tt.v || n != len(enc) {
				t.Errorf("decode %x and %x: want %d of %d bytes, have %d of %d", enc, tail, tt.v, len(enc), v, n)
			}
		}
		for i := range enc {
			if _, n := varint(enc[:i]); n != 0 {
				t.Errorf("decode %x of %x: want refusal, have %d bytes", enc[:i], enc, n)
			}
		}
	}
}

func TestVarintRefused(t *testing.T) {
	for _, tt := range []struct{ name, hex string }{
		{"2^64", "f0 f1 fe fe fe fe fe fe fe 0e"},
		// the last byte alone, shifted by 60, is 2^64
		{"10 bytes, overflow by shift", "f0 80 80 80 80 80 80 80 80 10"},
		// 15<<60, and the 128<<53 before it carries
		{"10 bytes, overflow by sum", "f0 80 80 80 80 80 80 80 80 0f"},
		{"10 bytes, all ones", "ff ff ff ff ff ff ff ff ff 7f"},
		{"11 bytes", "f0 80 80 80 80 80 80 80 80 80 00"},
		{"11 bytes, all ones", "ff ff ff ff ff ff ff ff ff ff 7f"},
		{"without end", strings.Repeat("ff", 100)},
	} {
		if v, n := varint(unhex(t, tt.hex)); n != 0 {
			t.Errorf("%s: want refusal, have %d of %d bytes", tt.name, v, n)
		}
	}
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

// What a handler is told it may keep must not change when the payload's buffer
// and the notify are used again.
func TestLifetime(t *testing.T) {
	buf := []byte("\x05login\x02" + "\x04user\x08\x04anna" + "\x02id\x09\x03abc")
	other := "\x05other\x02" + "\x04name\x08\x04bert" + "\x02xy\x09\x03xyz"
	var n notify
	if err := n.decode(buf); err != nil || !n.nextMessage() {
		t.Fatalf("want a message, have none, error %v", err)
	}
	m := &n.current
	user, id := m.Arg(0), m.Arg(1)
	var dst struct {
		User string `spoe:"user"`
		ID   []byte `spoe:"id"`
	}
	if err := m.Decode(&dst); err != nil {
		t.Fatal(err)
	}
	var acts Actions
	acts.SetVar(ScopeTxn, "user", user.Value)
	kept := []struct{ want, have string }{
		{"login", m.Name()}, {"user", user.Name}, {"id", id.Name},
		{"anna", user.Value.String()}, {"anna", user.Value.Clone().s}, {"abc", id.Value.Clone().s},
		{"anna", dst.User},
	}
	set, _ := acts.Lookup(ScopeTxn, "user")

	copy(buf, other)
	if err := n.decode(buf); err != nil || !n.nextMessage() {
		t.Fatalf("want another message, have none, error %v", err)
	}
	for _, k := range kept {
		if k.want != k.have {
			t.Errorf("want %q kept, have %q", k.want, k.have)
		}
	}
	if string(dst.ID) != "abc" || set.String() != "anna" {
		t.Errorf("want abc and anna kept, have %s and %v", dst.ID, set)
	}
	if m.Name() != "other" || m.Arg(0).Name != "name" || m.Arg(0).Value.String() != "bert" {
		t.Errorf("want the second message, have %s %v", m.Name(), argsOf(m))
	}
}

// A notify is used for as long as a connection lasts: what it held before must
// not be seen, and a payload that was answered can be freed.
func TestNotifyReuse(t *testing.T) {
	var n notify
	for _, payload := range []string{"\x01a\x02\x01x\x08\x01v\x01y\x00" + "\x01b\x01\x01z\x11", "\x01b\x00", "", "\x01a\x00"} {
		if err := n.decode([]byte(payload)); err != nil {
			t.Fatal(err)
		}
		var enc []byte
		for n.nextMessage() {
			enc = appendMessage(enc, &n.current)
		}
		if want := payload; want != string(enc) {
			t.Errorf("want %q, have %q", want, enc)
		}
		m := &n.current
		n.release()
		if n.payload != nil || m.args != nil || m.Len() != 0 || n.nextMessage() {
			t.Errorf("want no view after release, have %q and %q", n.payload, m.args)
		}
	}
}

// A handler must not keep its Message. If it does, it may get anything, but the
// process lives on.
func TestMessageUsedTooLate(t *testing.T) {
	first := []byte("\x01a\x03" + "\x01x\x08\x04abcd" + "\x01y\x04\xf0\x01" + "\x01z\x07" + strings.Repeat("\x01", 16))
	var dst struct {
		Z netip.Addr `spoe:"z,optional"`
		Y int        `spoe:"#1,optional"`
	}
	for c := range 256 {
		for at := range len(first) {
			var n notify
			b := bytes.Clone(first)
			if err := n.decode(b); err != nil || !n.nextMessage() {
				t.Fatalf("want a message, have none, error %v", err)
			}
			m := &n.current
			for i := at; i < len(b); i++ {
				b[i] = byte(c)
			}
			for i := range m.Len() {
				m.Arg(i)
			}
			m.Lookup("none")
			argsOf(m)
			_ = m.Decode(&dst)
			appendMessage(nil, m)
			n.nextMessage()
		}
	}
}

func TestNewMessageCopies(t *testing.T) {
	b := []byte("before")
	args := []Arg{{"b", Binary(b)}}
	m := NewMessage("m", args...)
	copy(b, "after!")
	args[0] = Arg{"c", Int64(1)}
	if a := m.Arg(0); a.Name != "b" || a.Value.String() != "before" {
		t.Errorf("want b before, have %s %v", a.Name, a.Value)
	}
}

// What a NOTIFY costs is bounded by its bytes, whatever they say.
func TestNotifyMemory(t *testing.T) {
	const size = 64000
	for name, payload := range map[string][]byte{
		"tiny arguments": bytes.Repeat([]byte("\x00\xff"+strings.Repeat("\x00\x00", 255)), size/512),
		"empty messages": bytes.Repeat([]byte("\x00\x00"), size/2),
	} {
		msgs, args := 0, 0
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		n := new(notify)
		if err := n.decode(payload); err != nil {
			t.Fatal(err)
		}
		for n.nextMessage() {
			msgs++
			for range n.current.Args() {
				args++
			}
		}
		runtime.ReadMemStats(&after)
		if msgs+args < size/2-100 {
			t.Fatalf("%s: want about %d, have %d messages and %d arguments", name, size/2, msgs, args)
		}
		// The bytes themselves are there already.
		if took := after.TotalAlloc - before.TotalAlloc; took > size {
			t.Errorf("%s: want at most the %d bytes of the payload, have %d allocated", name, len(payload), took)
		}
	}
}

func TestStrings(t *testing.T) {
	for want, have := range map[string]interface{ String() string }{
		"null": KindNull, "bool": KindBool, "int32": KindInt32, "uint32": KindUint32, "int64": KindInt64,
		"uint64": KindUint64, "ipv4": KindIPv4, "ipv6": KindIPv6, "string": KindString, "binary": KindBinary,
		"kind 10": Kind(10), "kind 255": Kind(255),
		"proc": Scope(0), "sess": Scope(1), "txn": Scope(2), "req": Scope(3), "res": Scope(4),
		"scope 5": Scope(5), "scope 255": Scope(255),
		"normal": Status(0), "I/O error": Status(1), "a timeout occurred": Status(2), "frame is too big": Status(3),
		"invalid frame received": Status(4), "version value not found": Status(5),
		"max-frame-size value not found": Status(6), "capabilities value not found": Status(7),
		"unsupported version": Status(8), "max-frame-size too big or too small": Status(9),
		"fragmentation not supported": Status(10), "invalid interlaced frames": Status(11),
		"frame-id not found": Status(12), "resource allocation error": Status(13), "unknown error": Status(99),
		"status 14": Status(14), "status 4294967295": Status(math.MaxUint32),
		"set-var sess.ip_score uint32 42": Action{Scope: ScopeSess, Name: "ip_score", Value: Uint32(42)},
		"unset-var txn.a":                 Action{Scope: ScopeTxn, Name: "a", Unset: true},
	} {
		if have := have.String(); want != have {
			t.Errorf("want %q, have %q", want, have)
		}
	}
}

func TestDisconnectErrorText(t *testing.T) {
	for _, tt := range []struct {
		err  DisconnectError
		want string
	}{
		{DisconnectError{}, "normal (0)"},
		{DisconnectError{Status: StatusIO, Remote: true}, "peer closed: I/O error (1)"},
		{DisconnectError{Status: StatusUnknown, Message: "out of cheese"}, "unknown error (99): out of cheese"},
		{DisconnectError{Status: 355, Message: "x", Remote: true}, "peer closed: status 355 (355): x"},
		// HAProxy's message is the status in words: once is enough.
		{DisconnectError{Status: StatusInterlaced, Message: "invalid interlaced frames", Remote: true}, "peer closed: invalid interlaced frames (11)"},
		{DisconnectError{Status: StatusFrameTooBig}, "frame is too big (3); raise max-frame-size or enable fragmentation"},
	} {
		if have := tt.err.Error(); tt.want != have {
			t.Errorf("want %q, have %q", tt.want, have)
		}
	}
}

// fin0 is the metadata of HELLO and DISCONNECT: FIN, STREAM-ID 0, FRAME-ID 0.
const fin0 = "\x00\x00\x00\x01\x00\x00"

const (
	agentHello = "\x07version\x08\x032.0" +
		"\x0emax-frame-size\x03\xfc\xf0\x06" + // 16380
		"\x0ccapabilities\x08\x0apipelining"
	haproxyHello = "\x12supported-versions\x08\x032.0" +
		"\x0emax-frame-size\x03\xfc\xf0\x06" +
		"\x0ccapabilities\x08\x00" +
		"\x09engine-id\x08\x02e1" +
		"\x0bhealthcheck\x11"
	haproxyDisconnect = "\x0bstatus-code\x03\x02" + "\x07message\x08\x12a timeout occurred"
	agentDisconnect   = "\x0bstatus-code\x03\x00" + "\x07message\x08\x03bye"
	ackActions        = "\x02\x02\x01\x03old" + // unset-var, 2 arguments, sess; no value
		"\x01\x03\x02\x08ip_score\x03\x2a" // set-var, 3 arguments, txn, UINT32
	ipNotify = "\x0fcheck-client-ip\x01" + "\x00\x06\x7f\x00\x00\x01"
)

func TestFrames(t *testing.T) {
	var acts Actions
	acts.UnsetVar(ScopeSess, "old")
	acts.SetVar(ScopeTxn, "ip_score", Uint32(42))
	notify := beginFrame(nil, frameNotify, flagFIN, 2288, 239)
	notify = appendMessage(notify, NewMessage("check-client-ip", Arg{"", Addr(netip.MustParseAddr("127.0.0.1"))}))
	for _, tt := range []struct {
		name string
		have []byte
		want string
	}{
		{"AGENT-HELLO", appendHello(nil, frameAgentHello, &hello{versions: "2.0", frameSize: 16380, capabilities: "pipelining"}),
			"\x00\x00\x00\x40\x65" + fin0 + agentHello},
		{"HAPROXY-HELLO", appendHello(nil, frameHAProxyHello, &hello{versions: "2.0", frameSize: 16380, engineID: "e1", healthcheck: true}),
			"\x00\x00\x00\x5c\x01" + fin0 + haproxyHello},
		{"HAPROXY-DISCONNECT", appendDisconnect(nil, frameHAProxyDisconnect, StatusTimeout, "a timeout occurred"),
			"\x00\x00\x00\x31\x02" + fin0 + haproxyDisconnect},
		{"AGENT-DISCONNECT", appendDisconnect(nil, frameAgentDisconnect, StatusNormal, "bye"),
			"\x00\x00\x00\x22\x66" + fin0 + agentDisconnect},
		{"ACK", appendAck(nil, flagFIN, ids(240, 1), acts.buf),
			"\x00\x00\x00\x1d\x67" + "\x00\x00\x00\x01" + "\xf0\x00\x01" + ackActions},
		{"empty ACK", appendAck(nil, flagFIN, ids(0, 1), nil),
			"\x00\x00\x00\x07\x67" + "\x00\x00\x00\x01" + "\x00\x01"},
		{"aborting ACK", appendAck(nil, flagFIN|flagAbort, ids(0, 1), nil),
			"\x00\x00\x00\x07\x67" + "\x00\x00\x00\x03" + "\x00\x01"},
		{"NOTIFY", finishFrame(notify, 0),
			"\x00\x00\x00\x20\x03" + "\x00\x00\x00\x01" + "\xf0\x80\x00\xef" + ipNotify},
		{"second frame of a buffer", finishFrame(beginFrame([]byte("first"), frameAck, flagFIN, 1, 2), 5),
			"first" + "\x00\x00\x00\x07\x67" + "\x00\x00\x00\x01" + "\x01\x02"},
	} {
		if string(tt.have) != tt.want {
			t.Errorf("%s: want %q, have %q", tt.name, tt.want, tt.have)
		}
	}
}

func TestFrameParse(t *testing.T) {
	var f frame
	b := []byte("\x03" + "\x80\x00\x00\x02" + "\xf0\x80\x00" + "\xf0\x00" + "payload")
	if !f.parse(b) || f.kind != frameNotify || f.flags != 0x80000002 || f.stream != 2288 || f.id != 240 || string(f.payload) != "payload" {
		t.Errorf("want NOTIFY 80000002 2288 240 payload, have %+v", f)
	}
	if f.fin() || !f.abort() {
		t.Errorf("want ABORT without FIN, have %v, %v", f.abort(), f.fin())
	}
	for i := range 1 + 4 + 3 + 2 {
		if f.parse(b[:i]) {
			t.Errorf("want %q refused, have %+v", b[:i], f)
		}
	}
	if !f.parse([]byte("\x67"+"\x00\x00\x00\x01"+"\x00\x01")) || len(f.payload) != 0 || !f.fin() || f.abort() {
		t.Errorf("want the shortest ACK, have %+v", f)
	}
}

func TestNotify(t *testing.T) {
	many, manyArgs := "\x04many\xff", make([]Arg, 255)
	for i := range manyArgs {
		many += "\x01a\x02" + string(rune(i%100))
		manyArgs[i] = Arg{"a", Int32(int32(i % 100))}
	}
	type msg struct {
		name string
		args []Arg
	}
	for _, tt := range []struct {
		name, payload string
		want          []msg
	}{
		{"no message", "", nil},
		{"unnamed argument", ipNotify, []msg{{"check-client-ip", []Arg{{"", Addr(netip.MustParseAddr("127.0.0.1"))}}}}},
		{"no argument", "\x04ping\x00", []msg{{"ping", nil}}},
		{"empty name", "\x00\x00", []msg{{"", nil}}},
		// Without regard for NB-ARGS the second message reads as arguments of the first.
		{"two messages", "\x01a\x02" + "\x01x\x00" + "\x01y\x11" + "\x01b\x01" + "\x01x\x04\x07",
			[]msg{{"a", []Arg{{"x", Value{}}, {"y", Bool(true)}}}, {"b", []Arg{{"x", Int64(7)}}}}},
		{"two messages, the first without arguments", "\x01a\x00" + "\x01b\x01" + "\x00\x08\x01s",
			[]msg{{"a", nil}, {"b", []Arg{{"", String("s")}}}}},
		{"255 arguments and another message", many + "\x04ping\x00", []msg{{"many", manyArgs}, {"ping", nil}}},
	} {
		n := mustDecode(t, tt.payload)
		var have []msg
		var enc []byte
		for _, m := range messagesOf(n) {
			have = append(have, msg{m.Name(), argsOf(m)})
			enc = appendMessage(enc, m)
		}
		if !slices.EqualFunc(tt.want, have, func(a, b msg) bool {
			return a.name == b.name && slices.EqualFunc(a.args, b.args, sameArg)
		}) {
			t.Errorf("%s: want %v, have %v", tt.name, tt.want, have)
		}
		if string(enc) != tt.payload {
			t.Errorf("%s: encode: want %q, have %q", tt.name, tt.payload, enc)
		}
	}
}

func TestNotifyRefused(t *testing.T) {
	for _, tt := range []struct{ name, payload string }{
		{"NB-ARGS beyond the payload", "\x01a\x02" + "\x01x\x00"},
		{"NB-ARGS 255, no argument", "\x01a\xff"},
		{"no NB-ARGS", "\x01a"},
		{"trailing byte", ipNotify + "\x01"},
		{"argument of type 10", "\x01a\x01" + "\x01x\x0a"},
		{"argument of type 15", "\x01a\x01" + "\x01x\x0f"},
		{"name longer than the payload", "\xff\x7fa\x00"},
		{"name of 2^64-1", "\xff\xf0\xfe\xfe\xfe\xfe\xfe\xfe\xfe\x0e"},
		{"name of 11 bytes' length", "\xf0\x80\x80\x80\x80\x80\x80\x80\x80\x80\x00"},
		{"argument's name longer than the payload", "\x01a\x01" + "\x05x\x00"},
		{"second message broken", ipNotify + "\x01b\x01\x00"},
	} {
		var disconnect *DisconnectError
		err := new(notify).decode([]byte(tt.payload))
		if !errors.As(err, &disconnect) || disconnect.Status != StatusInvalidFrame || disconnect.Remote {
			t.Errorf("%s: want our %v, have %v", tt.name, StatusInvalidFrame, err)
		}
	}
}

// A payload that ends too early is refused wherever it ends, except where it
// ends between two messages.
func TestNotifyCutShort(t *testing.T) {
	first := "\x01a\x06" + "\x00\x06\x7f\x00\x00\x01" + "\x01i\x04\xf6\xee\xfe\xfe\xfe\xfe\xfe\xfe\xfe\x0e" +
		"\x01b\x11" + "\x01n\x00" + "\x01s\x08\x05hello" + "\x016\x07" + strings.Repeat("\x01", 16)
	payload := first + "\x01b\x01\x01x\x09\x02\x00\xff"
	var n notify
	for i := range len(payload) {
		err := n.decode([]byte(payload[:i]))
		if want, have := i == 0 || i == len(first), err == nil; want != have {
			t.Errorf("%d of %d bytes: want accepted %v, have %v", i, len(payload), want, err)
		}
	}
}

func kv(name string, wire string) string { return string(appendString(nil, name)) + wire }

func TestHello(t *testing.T) {
	const (
		versions = "\x12supported-versions\x08\x032.0"
		size     = "\x0emax-frame-size\x03\xfc\xf0\x06"
		caps     = "\x0ccapabilities\x08\x00"
		agent    = "\x07version\x08\x032.0"
	)
	ok := Status(math.MaxUint32)
	list := func(s string) string { return kv("supported-versions", "\x08"+string(appendString(nil, s))) }
	all := versions + size + caps
	for _, tt := range []struct {
		name    string
		kind    byte
		payload string
		want    Status
	}{
		{"the least", frameHAProxyHello, all, ok},
		{"any order", frameHAProxyHello, caps + size + versions, ok},
		{"healthcheck", frameHAProxyHello, haproxyHello, ok},
		{"agent", frameAgentHello, agentHello, ok},
		{"versions 2.0, 1.5", frameHAProxyHello, list("2.0, 1.5") + size + caps, ok},
		{"versions 1.5,2.0", frameHAProxyHello, list("1.5,2.0") + size + caps, ok},
		{"version in spaces", frameHAProxyHello, list(" 2.0 ") + size + caps, ok},
		// Whoever announces a version has all minor versions before it.
		{"version 2.1", frameHAProxyHello, list("2.1") + size + caps, ok},
		{"version 1.0", frameHAProxyHello, list("1.0") + size + caps, StatusBadVersion},
		{"version 3.0", frameHAProxyHello, list("3.0") + size + caps, StatusBadVersion},
		{"version 12.0", frameHAProxyHello, list("12.0") + size + caps, StatusBadVersion},
		{"version 2", frameHAProxyHello, list("2") + size + caps, StatusBadVersion},
		{"version 2.", frameHAProxyHello, list("2.") + size + caps, StatusBadVersion},
		{"version 2.x", frameHAProxyHello, list("2.x") + size + caps, StatusBadVersion},
		{"version 2.-1", frameHAProxyHello, list("2.-1") + size + caps, StatusBadVersion},
		{"version 20", frameHAProxyHello, list("20") + size + caps, StatusBadVersion},
		{"version 2.0 1.0", frameHAProxyHello, list("2.0 1.0") + size + caps, StatusBadVersion},
		{"empty version", frameHAProxyHello, list("") + size + caps, StatusBadVersion},
		{"nothing", frameHAProxyHello, "", StatusNoVersion},
		{"no versions", frameHAProxyHello, size + caps, StatusNoVersion},
		{"no max-frame-size", frameHAProxyHello, versions + caps, StatusNoFrameSize},
		{"no capabilities", frameHAProxyHello, versions + size, StatusNoCapabilities},
		{"the agent's key from HAProxy", frameHAProxyHello, agent + size + caps, StatusNoVersion},
		{"HAProxy's key from the agent", frameAgentHello, versions + size + caps, StatusNoVersion},
		{"prefix of supported-versions", frameHAProxyHello, kv("supported-version", "\x08\x032.0") + size + caps, StatusNoVersion},
		{"prefix of max-frame-size", frameHAProxyHello, versions + kv("max-frame-siz", "\x03\xfc\xf0\x06") + caps, StatusNoFrameSize},
		{"prefix of capabilities", frameHAProxyHello, versions + size + kv("capabilitie", "\x08\x00"), StatusNoCapabilities},
		{"more than capabilities", frameHAProxyHello, versions + size + kv("capabilitiess", "\x08\x00"), StatusNoCapabilities},
		{"max-frame-size 0", frameHAProxyHello, versions + caps + kv("max-frame-size", "\x03\x00"), StatusBadFrameSize},
		{"max-frame-size 255", frameHAProxyHello, versions + caps + kv("max-frame-size", "\x03\xff\x00"), StatusBadFrameSize},
		{"max-frame-size 256", frameHAProxyHello, versions + caps + kv("max-frame-size", "\x03\xf0\x01"), ok},
		{"max-frame-size as int64", frameHAProxyHello, versions + caps + kv("max-frame-size", "\x04\xf0\x01"), ok},
		{"versions as binary", frameHAProxyHello, kv("supported-versions", "\x09\x032.0") + size + caps, StatusInvalidFrame},
		{"versions as null", frameHAProxyHello, kv("supported-versions", "\x00") + size + caps, StatusInvalidFrame},
		{"max-frame-size as string", frameHAProxyHello, versions + kv("max-frame-size", "\x08\x0516380") + caps, StatusInvalidFrame},
		{"max-frame-size as null", frameHAProxyHello, versions + kv("max-frame-size", "\x00") + caps, StatusInvalidFrame},
		{"max-frame-size -1", frameHAProxyHello, versions + kv("max-frame-size", "\x04\xff\xf0\xfe\xfe\xfe\xfe\xfe\xfe\xfe\x0e") + caps, StatusInvalidFrame},
		{"capabilities as bool", frameHAProxyHello, versions + size + kv("capabilities", "\x11"), StatusInvalidFrame},
		{"engine-id as integer", frameHAProxyHello, all + kv("engine-id", "\x03\x01"), StatusInvalidFrame},
		{"healthcheck as integer", frameHAProxyHello, all + kv("healthcheck", "\x03\x01"), StatusInvalidFrame},
		{"healthcheck as string", frameHAProxyHello, all + kv("healthcheck", "\x08\x04true"), StatusInvalidFrame},
		{"unknown keys of every kind", frameHAProxyHello, kv("null", "\x00") + kv("bool", "\x11") + kv("int32", "\x02\x01") +
			kv("uint32", "\x03\x01") + versions + kv("int64", "\x04\x01") + kv("uint64", "\x05\x01") + kv("ipv4", "\x06\x7f\x00\x00\x01") + size +
			kv("ipv6", "\x07"+strings.Repeat("\x01", 16)) + kv("string", "\x08\x01s") + kv("", "\x09\x01b") + caps, ok},
		{"unknown key of type 10", frameHAProxyHello, all + kv("new", "\x0a\x00"), StatusInvalidFrame},
		{"key without a value", frameHAProxyHello, all + "\x03new", StatusInvalidFrame},
		{"trailing byte", frameHAProxyHello, all + "\x01", StatusInvalidFrame},
	} {
		var disconnect *DisconnectError
		have := ok
		if err := new(hello).parse(tt.kind, []byte(tt.payload)); errors.As(err, &disconnect) {
			have = disconnect.Status
		}
		if tt.want != have {
			t.Errorf("%s: want %v, have %v", tt.name, tt.want, have)
		}
	}
}

func TestHelloFields(t *testing.T) {
	const least = "\x12supported-versions\x08\x032.0" + "\x0emax-frame-size\x03\xfc\xf0\x06"
	for _, tt := range []struct {
		name, payload string
		want          hello
	}{
		{"all", haproxyHello, hello{versions: "2.0", frameSize: 16380, engineID: "e1", healthcheck: true}},
		{"healthcheck=false, no engine-id", least + "\x0ccapabilities\x08\x00" + "\x0bhealthcheck\x01", hello{versions: "2.0", frameSize: 16380}},
		{"max-frame-size 2^32, too big for any peer", least + "\x0ccapabilities\x08\x00" + kv("max-frame-size", "\x05\xf0\xf1\xfe\xfe\x7e"),
			hello{versions: "2.0", frameSize: math.MaxUint32}},
	} {
		var h hello
		if err := h.parse(frameHAProxyHello, []byte(tt.payload)); err != nil || h != tt.want {
			t.Errorf("%s: want %+v, have %+v, %v", tt.name, tt.want, h, err)
		}
	}
}

func TestCapabilities(t *testing.T) {
	for _, tt := range []struct {
		list string
		want bool
	}{
		{"pipelining", true},
		{"pipelining,async", true},
		{"async, pipelining", true},
		{" async ,\tpipelining ", true},
		{"async,,pipelining", true},
		{"", false},
		{",", false},
		{"async", false},
		{"pipelinin", false},
		{"pipelinings", false},
		{"no-pipelining", false},
		{"pipe lining", false},
	} {
		if have := (&hello{capabilities: tt.list}).can("pipelining"); tt.want != have {
			t.Errorf("%q: want %v, have %v", tt.list, tt.want, have)
		}
	}
}

// The mandatory keys of AGENT-HELLO are all there is, so every beginning is a
// fault.
func TestHelloCutShort(t *testing.T) {
	for i := range len(agentHello) {
		if err := new(hello).parse(frameAgentHello, []byte(agentHello[:i])); err == nil {
			t.Errorf("%d of %d bytes: want an error, have none", i, len(agentHello))
		}
	}
	least := len(haproxyHello) - len("\x09engine-id\x08\x02e1"+"\x0bhealthcheck\x11")
	for i := range len(haproxyHello) {
		err := new(hello).parse(frameHAProxyHello, []byte(haproxyHello[:i]))
		between := i == least || i == len(haproxyHello)-len("\x0bhealthcheck\x11")
		if (err == nil) != between {
			t.Errorf("%d of %d bytes: want accepted %v, have %v", i, len(haproxyHello), between, err)
		}
	}
}

func TestDisconnect(t *testing.T) {
	for _, tt := range []struct {
		name, payload string
		want          DisconnectError
	}{
		{"timeout", haproxyDisconnect, DisconnectError{Status: StatusTimeout, Message: "a timeout occurred", Remote: true}},
		{"normal", agentDisconnect, DisconnectError{Message: "bye", Remote: true}},
		{"other order, unknown key", "\x07message\x08\x01m" + "\x03new\x11" + "\x0bstatus-code\x03\x03", DisconnectError{Status: StatusFrameTooBig, Message: "m", Remote: true}},
		{"own code", "\x0bstatus-code\x03\xff\x07", DisconnectError{Status: 367, Remote: true}}, // 255 + 7<<4
		{"nothing", "", DisconnectError{Status: StatusUnknown, Remote: true}},
		{"status as string", "\x0bstatus-code\x08\x010", DisconnectError{Status: StatusUnknown, Remote: true}},
		{"status beyond 32 bits", "\x0bstatus-code\x05\xf0\xf1\xfe\xfe\x7e", DisconnectError{Status: StatusUnknown, Remote: true}},
		{"status negative", "\x0bstatus-code\x02\xff\xf0\xfe\xfe\xfe\xfe\xfe\xfe\xfe\x0e", DisconnectError{Status: StatusUnknown, Remote: true}},
		{"broken after the status", "\x0bstatus-code\x03\x01" + "\x07message\x08\xff", DisconnectError{Status: StatusIO, Remote: true}},
	} {
		if have := *parseDisconnect([]byte(tt.payload)); tt.want != have {
			t.Errorf("%s: want %+v, have %+v", tt.name, tt.want, have)
		}
	}
}

// What is there of a DISCONNECT counts, however short: the connection ends
// anyway.
func TestDisconnectCutShort(t *testing.T) {
	status := len("\x0bstatus-code\x03\x02")
	for i := range len(haproxyDisconnect) {
		want := DisconnectError{Status: StatusUnknown, Remote: true}
		if i >= status {
			want.Status = StatusTimeout
		}
		if have := *parseDisconnect([]byte(haproxyDisconnect[:i])); want != have {
			t.Errorf("%d of %d bytes: want %+v, have %+v", i, len(haproxyDisconnect), want, have)
		}
	}
}

func TestMessage(t *testing.T) {
	args := []Arg{{"", Int64(1)}, {"a", Int64(2)}, {"b", Value{}}, {"a", Int64(3)}, {"", Int64(4)}}
	m := NewMessage("check", args...)
	if m.Name() != "check" || m.Len() != 5 || m.StreamID() != 0 || m.FrameID() != 0 || m.EngineID() != "" {
		t.Errorf("want check of 5 arguments, have %s of %d", m.Name(), m.Len())
	}
	for i, want := range args {
		if have := m.Arg(i); !sameArg(want, have) {
			t.Errorf("Arg(%d): want %v, have %v", i, want, have)
		}
	}
	for _, i := range []int{-1, 5, math.MinInt, math.MaxInt} {
		if have := m.Arg(i); !sameArg(Arg{}, have) {
			t.Errorf("Arg(%d): want the zero Arg, have %v", i, have)
		}
	}
	for _, tt := range []struct {
		name string
		want Value
		ok   bool
	}{
		{"a", Int64(2), true}, // the first of two
		{"", Int64(1), true},
		{"b", Value{}, true}, // NULL is there
		{"A", Value{}, false},
		{"c", Value{}, false},
	} {
		if v, ok := m.Lookup(tt.name); ok != tt.ok || !tt.want.Equal(v) {
			t.Errorf("Lookup(%q): want %v %v, have %v %v", tt.name, tt.want, tt.ok, v, ok)
		}
	}
	var have []Arg
	for name, v := range m.Args() {
		have = append(have, Arg{name, v})
	}
	if !slices.EqualFunc(args, have, sameArg) {
		t.Errorf("Args: want %v, have %v", args, have)
	}
	have = have[:0]
	for name, v := range m.Args() {
		if have = append(have, Arg{name, v}); len(have) == 2 {
			break
		}
	}
	if !slices.EqualFunc(args[:2], have, sameArg) {
		t.Errorf("Args to the second: want %v, have %v", args[:2], have)
	}
	for range NewMessage("").Args() {
		t.Error("Args of a message without any: want none, have one")
	}
}

func TestMessageIDs(t *testing.T) {
	n := notify{stream: 7, id: 8, peer: &Peer{EngineID: "e", FrameSize: 256}}
	if err := n.decode([]byte("\x01a\x00\x01b\x00")); err != nil {
		t.Fatal(err)
	}
	for _, m := range messagesOf(&n) {
		if m.StreamID() != 7 || m.FrameID() != 8 || m.EngineID() != "e" || m.Peer().FrameSize != 256 {
			t.Errorf("%s: want 7, 8, e, have %d, %d, %s", m.Name(), m.StreamID(), m.FrameID(), m.EngineID())
		}
	}
}

func TestNewMessageLimit(t *testing.T) {
	args := make([]Arg, 256)
	for i := range args {
		args[i] = Arg{strconv.Itoa(i), Int64(int64(i))}
	}
	if m := NewMessage("m", args[:255]...); m.Len() != 255 || m.Arg(254).Name != "254" {
		t.Errorf("want 255 arguments, have %d", m.Len())
	}
	defer func() {
		if have := recover(); have != "spoa: NewMessage: 256 arguments" {
			t.Errorf("want a panic that says 256 arguments, have %v", have)
		}
	}()
	NewMessage("m", args...)
}

func TestDecode(t *testing.T) {
	type (
		score uint8
		host  string
		blob  []byte
		flag  bool
	)
	type all struct {
		Int     int        `spoe:"n"`
		Int8    int8       `spoe:"n"`
		Int16   int16      `spoe:"n"`
		Int32   int32      `spoe:"n"`
		Int64   int64      `spoe:"n"`
		Uint    uint       `spoe:"n"`
		Uint8   uint8      `spoe:"n"`
		Uint16  uint16     `spoe:"n"`
		Uint32  uint32     `spoe:"n"`
		Uint64  uint64     `spoe:"n"`
		Uintptr uintptr    `spoe:"n"`
		Bool    bool       `spoe:"b"`
		String  string     `spoe:"s"`
		Binary  []byte     `spoe:"s"`
		Text    string     `spoe:"bin"`
		IP      netip.Addr `spoe:"#0"`
		First   int        `spoe:"#1"`
		Unnamed netip.Addr `spoe:""`

		Score score `spoe:"n"`
		Host  host  `spoe:"s"`
		Blob  blob  `spoe:"s"`
		Flag  flag  `spoe:"b"`

		Absent  int    `spoe:"absent,optional"`
		Beyond  int    `spoe:"#255,optional"`
		Null    string `spoe:"null,optional"`
		Present int    `spoe:"n,optional"`

		Untagged int
		Other    int `json:"n"`
		hidden   int
	}
	ip := netip.MustParseAddr("192.0.2.1")
	m := NewMessage("m", Arg{"", ipv6("::ffff:192.0.2.1")}, Arg{"n", Int64(42)}, Arg{"b", Bool(true)},
		Arg{"s", String("text")}, Arg{"bin", Binary([]byte("\x00\xff"))}, Arg{"null", Value{}}, Arg{"n", Int64(43)})
	have := all{Absent: 1, Beyond: 2, Null: "kept", Untagged: 3, Other: 4, hidden: 5}
	if err := m.Decode(&have); err != nil {
		t.Fatal(err)
	}
	want := all{
		Int: 42, Int8: 42, Int16: 42, Int32: 42, Int64: 42, Uint: 42, Uint8: 42, Uint16: 42, Uint32: 42, Uint64: 42, Uintptr: 42,
		Bool: true, String: "text", Binary: []byte("text"), Text: "\x00\xff", IP: ip, First: 42, Unnamed: ip,
		Score: 42, Host: "text", Blob: blob("text"), Flag: true,
		Absent: 1, Beyond: 2, Null: "kept", Present: 42, Untagged: 3, Other: 4, hidden: 5,
	}
	if !reflect.DeepEqual(want, have) {
		t.Errorf("want %+v, have %+v", want, have)
	}
}

// into returns a pointer to a struct whose only field, of type T, is tagged v.
func into[T any]() any {
	return new(struct {
		V T `spoe:"v"`
	})
}

func TestDecodeField(t *testing.T) {
	ip := netip.MustParseAddr("192.0.2.1")
	for _, tt := range []struct {
		v    Value
		dst  any
		want string // the field's value, or what the error says after "argument v: "
	}{
		{Int64(127), into[int8](), "127"},
		{Int64(128), into[int8](), "want int8, have int64 128"},
		{Int64(-128), into[int8](), "-128"},
		{Int64(-129), into[int8](), "want int8, have int64 -129"},
		{Int32(math.MinInt16), into[int16](), "-32768"},
		{Int32(math.MinInt16 - 1), into[int16](), "want int16, have int32 -32769"},
		{Uint32(math.MaxInt32), into[int32](), "2147483647"},
		{Uint32(math.MaxInt32 + 1), into[int32](), "want int32, have uint32 2147483648"},
		{Int64(math.MinInt64), into[int64](), "-9223372036854775808"},
		{Uint64(math.MaxInt64), into[int64](), "9223372036854775807"},
		{Uint64(math.MaxInt64 + 1), into[int64](), "want int64, have uint64 9223372036854775808"},
		{Int64(255), into[uint8](), "255"},
		{Int64(256), into[uint8](), "want uint8, have int64 256"},
		{Int64(-1), into[uint8](), "want uint8, have int64 -1"},
		{Int64(65536), into[uint16](), "want uint16, have int64 65536"},
		{Int64(1 << 32), into[uint32](), "want uint32, have int64 4294967296"},
		{Uint64(math.MaxUint64), into[uint64](), "18446744073709551615"},
		{Int64(-1), into[uint64](), "want uint64, have int64 -1"},
		{Int64(-1), into[uint](), "want uint, have int64 -1"},
		{Bool(true), into[int](), "want int, have bool true"},
		{String("1"), into[int](), "want int, have string 1"},
		{String(strings.Repeat("x", 8<<10)), into[int](), "want int, have string " + strings.Repeat("x", 40)},
		{Bool(false), into[bool](), "false"},
		{Int64(1), into[bool](), "want bool, have int64 1"},
		{String("true"), into[bool](), "want bool, have string true"},
		{Binary([]byte("ab")), into[string](), "ab"},
		{Int64(1), into[string](), "want string, have int64 1"},
		{Addr(ip), into[string](), "want string, have ipv4 192.0.2.1"},
		{String(""), into[[]byte](), "[]"},
		{Bool(true), into[[]byte](), "want []uint8, have bool true"},
		{Addr(ip), into[netip.Addr](), "192.0.2.1"},
		{String("192.0.2.1"), into[netip.Addr](), "want netip.Addr, have string 192.0.2.1"},
		{Value{}, into[netip.Addr](), "want netip.Addr, have null"},
		{Value{}, into[[]byte](), "want []uint8, have null"},
	} {
		err := NewMessage("m", Arg{"v", tt.v}).Decode(tt.dst)
		field := reflect.ValueOf(tt.dst).Elem().Field(0)
		have := fmt.Sprint(field)
		if err != nil {
			have = strings.TrimPrefix(err.Error(), "spoa: message m: argument v: ")
			if !field.IsZero() {
				t.Errorf("%v %.40v into %v: want the field as it was, have %v", tt.v.kind, tt.v, field.Type(), field)
			}
		}
		if tt.want != have {
			t.Errorf("%v %.40v into %v: want %s, have %.100s", tt.v.kind, tt.v, field.Type(), tt.want, have)
		}
	}
}

// A Value and a pointer tell what is absent, NULL and empty apart, also in a
// struct that is used again.
func TestDecodePresence(t *testing.T) {
	var dst struct {
		Value   Value       `spoe:"v,optional"`
		Text    *string     `spoe:"v,optional"`
		Null    Value       `spoe:"null"`
		Pointer *int16      `spoe:"null"`
		First   Value       `spoe:"#0"`
		Again   *Value      // no tag
		Addr    *netip.Addr `spoe:"ip,parse,optional"`
	}
	null, ip := Arg{"null", Value{}}, Arg{"ip", String("192.0.2.1")}
	for _, tt := range []struct {
		what string
		args []Arg
		want string
	}{
		{"a string", []Arg{{"v", String("x")}, null, ip}, `string "x" "x" ipv4 string`},
		{"an empty one", []Arg{{"v", String("")}, null}, `string "" "" string`},
		{"the first counts", []Arg{{"v", String("1")}, {"v", String("2")}, null}, `string "1" "1" string`},
		{"NULL", []Arg{{"v", Value{}}, null}, `null <null> nil null`},
		{"the first counts if it is NULL", []Arg{{"v", Value{}}, {"v", String("2")}, null}, `null <null> nil null`},
		{"none", []Arg{null}, `null <null> nil null`},
	} {
		if err := NewMessage("m", tt.args...).Decode(&dst); err != nil {
			t.Errorf("%s: %v", tt.what, err)
			continue
		}
		have := fmt.Sprintf("%v %q ", dst.Value.Kind(), dst.Value)
		if dst.Text == nil {
			have += "nil "
		} else {
			have += strconv.Quote(*dst.Text) + " "
		}
		if dst.Addr != nil {
			have += Addr(*dst.Addr).Kind().String() + " "
		}
		have += dst.First.Kind().String()
		if tt.want != have || !dst.Null.Equal(Value{}) || dst.Pointer != nil {
			t.Errorf("%s: want %s, have %s, with %v and %v for NULL", tt.what, tt.want, have, dst.Null, dst.Pointer)
		}
	}
	for _, tt := range []struct {
		args []Arg
		want string
	}{
		{nil, "spoa: message m: argument null: want spoa.Value, have nothing"},
		{[]Arg{{"null", Int64(1 << 15)}}, "spoa: message m: argument null: want int16, have int64 32768"},
		{[]Arg{null, {"v", Int64(1)}}, "spoa: message m: argument v: want string, have int64 1"},
	} {
		dst.Text, dst.Pointer = nil, nil
		if err := NewMessage("m", tt.args...).Decode(&dst); err == nil || err.Error() != tt.want || dst.Text != nil || dst.Pointer != nil {
			t.Errorf("want %s and no value, have %v, %v and %v", tt.want, err, dst.Text, dst.Pointer)
		}
	}
}

// A Value is a view, so Decode allocates nothing for it.
func TestDecodeView(t *testing.T) {
	body := []byte("\x04body\x09\x05hello")
	m := &Message{name: "m", count: 1, args: body}
	var dst struct {
		Body Value `spoe:"body"`
	}
	wantAllocs(t, "Decode a Value", 0, func() {
		if err := m.Decode(&dst); err != nil {
			t.Fatal(err)
		}
	})
	if &dst.Body.Bytes()[0] != &body[7] {
		t.Error("want a view of the frame, have a copy")
	}
}

func TestDecodeParse(t *testing.T) {
	for _, tt := range []struct {
		v    Value
		want string
	}{
		{String("192.0.2.1"), "192.0.2.1"},
		{String(" 2001:db8::1\t"), "2001:db8::1"}, // as a header field may have it
		{Binary([]byte("::ffff:192.0.2.1")), "192.0.2.1"},
		{Addr(netip.MustParseAddr("192.0.2.2")), "192.0.2.2"},
		{String("192.0.2.1, 192.0.2.2"), "want netip.Addr, have string 192.0.2.1, 192.0.2.2"},
		{String("fe80::1%eth0"), "want netip.Addr, have string fe80::1%eth0"},
		{String(""), "want netip.Addr, have string "},
		{Value{}, "want netip.Addr, have null"},
		{Int64(1), "want netip.Addr, have int64 1"},
	} {
		var dst struct {
			IP netip.Addr `spoe:"v,parse"`
		}
		have := ""
		if err := NewMessage("m", Arg{"v", tt.v}).Decode(&dst); err != nil {
			have = strings.TrimPrefix(err.Error(), "spoa: message m: argument v: ")
		} else {
			have = dst.IP.String()
		}
		if tt.want != have {
			t.Errorf("%v %v: want %s, have %s", tt.v.Kind(), tt.v, tt.want, have)
		}
	}
}

// More fields than arguments, in any order, and many.
func TestDecodeManyFields(t *testing.T) {
	var fields []reflect.StructField
	var args []Arg
	for i := range 100 {
		name := fmt.Sprintf("a%d", i)
		fields = append(fields, reflect.StructField{Name: "A" + name, Type: reflect.TypeFor[int](), Tag: reflect.StructTag(`spoe:"` + name + `"`)})
		args = append(args, Arg{name, Int(i)})
	}
	slices.Reverse(args)
	p := reflect.New(reflect.StructOf(fields))
	if err := NewMessage("m", args...).Decode(p.Interface()); err != nil {
		t.Fatal(err)
	}
	for i := range fields {
		if have := p.Elem().Field(i).Int(); int64(i) != have {
			t.Errorf("want %d, have %d", i, have)
		}
	}
	err := NewMessage("m", args[1:]...).Decode(p.Interface())
	if want := "spoa: message m: argument a99: want int, have nothing"; err == nil || err.Error() != want {
		t.Errorf("want %s, have %v", want, err)
	}
}

func TestDecodeErrors(t *testing.T) {
	type byName struct {
		V int `spoe:"ip_score"`
	}
	type byPosition struct {
		V int `spoe:"#1"`
	}
	type optional struct {
		V int `spoe:"v,optional"`
	}
	type unexported struct {
		v int `spoe:"v"`
	}
	type badOption struct {
		V int `spoe:"v,omitempty"`
	}
	type badPosition struct {
		V int `spoe:"#x"`
	}
	type farPosition struct {
		V int `spoe:"#256"`
	}
	type badType struct {
		V float64 `spoe:"v"`
	}
	type badElem struct {
		V []string `spoe:"v"`
	}
	type badParse struct {
		V string `spoe:"v,parse"`
	}
	type badPointer struct {
		V **int `spoe:"v"`
	}
	_ = unexported{}.v
	m := NewMessage("check", Arg{"v", String("x")})
	for _, tt := range []struct {
		dst  any
		want string
	}{
		{new(byName), "spoa: message check: argument ip_score: want int, have nothing"},
		{new(byPosition), "spoa: message check: argument #1: want int, have nothing"},
		// Optional is not a licence to be of the wrong kind.
		{new(optional), "spoa: message check: argument v: want int, have string x"},
		{new(unexported), "spoa: spoa.unexported.v: has a tag but is not exported"},
		{new(badOption), `spoa: spoa.badOption.V: tag "v,omitempty": unknown option omitempty`},
		{new(badParse), `spoa: spoa.badParse.V: tag "v,parse": option parse is for netip.Addr, not for string`},
		{new(badPointer), "spoa: spoa.badPointer.V: cannot decode into **int"},
		{new(badPosition), `spoa: spoa.badPosition.V: tag "#x": want a position from #0 to #255`},
		{new(farPosition), `spoa: spoa.farPosition.V: tag "#256": want a position from #0 to #255`},
		{new(badType), "spoa: spoa.badType.V: cannot decode into float64"},
		{new(badElem), "spoa: spoa.badElem.V: cannot decode into []string"},
		{byName{}, "spoa: message check: cannot decode into spoa.byName: want a pointer to a struct"},
		{(*byName)(nil), "spoa: message check: cannot decode into *spoa.byName: want a pointer to a struct"},
		{new(int), "spoa: message check: cannot decode into *int: want a pointer to a struct"},
		{nil, "spoa: message check: cannot decode into <nil>: want a pointer to a struct"},
	} {
		for range 2 { // found out, and from the cache
			if err := m.Decode(tt.dst); err == nil || err.Error() != tt.want {
				t.Errorf("%T: want %s, have %v", tt.dst, tt.want, err)
			}
		}
	}
}

func TestActions(t *testing.T) {
	var a Actions
	a.SetVar(ScopeProc, "p", Int64(-42))
	a.SetVar(ScopeTxn, "v", Bool(false))
	a.UnsetVar(ScopeRes, "gone")
	a.SetVar(ScopeTxn, "v", Value{})
	a.SetVar(ScopeSess, "v", String(""))
	a.UnsetVar(ScopeTxn, "w")
	a.SetVar(ScopeTxn, "w", Binary([]byte("w")))
	a.SetVar(ScopeReq, "x", Uint32(1))
	a.UnsetVar(ScopeReq, "x")
	if err := a.Err(); err != nil {
		t.Fatal(err)
	}
	want := []Action{
		{Scope: ScopeProc, Name: "p", Value: Int64(-42)},
		{Scope: ScopeTxn, Name: "v", Value: Bool(false)},
		{Scope: ScopeRes, Name: "gone", Unset: true},
		{Scope: ScopeTxn, Name: "v"},
		{Scope: ScopeSess, Name: "v", Value: String("")},
		{Scope: ScopeTxn, Name: "w", Unset: true},
		{Scope: ScopeTxn, Name: "w", Value: Binary([]byte("w"))},
		{Scope: ScopeReq, Name: "x", Value: Uint32(1)},
		{Scope: ScopeReq, Name: "x", Unset: true},
	}
	if have := slices.Collect(a.All()); !slices.EqualFunc(want, have, sameAction) {
		t.Errorf("want %v, have %v", want, have)
	}
	for act := range a.All() {
		if !sameAction(want[0], act) {
			t.Errorf("want %v, have %v", want[0], act)
		}
		break
	}
	for _, tt := range []struct {
		scope Scope
		name  string
		want  Value
		ok    bool
	}{
		{ScopeProc, "p", Int64(-42), true},
		{ScopeTxn, "v", Value{}, true}, // NULL, but set
		{ScopeSess, "v", String(""), true},
		{ScopeTxn, "w", Binary([]byte("w")), true},
		{ScopeReq, "x", Value{}, false},
		{ScopeRes, "gone", Value{}, false},
		{ScopeReq, "v", Value{}, false},
		{ScopeProc, "", Value{}, false},
	} {
		if v, ok := a.Lookup(tt.scope, tt.name); ok != tt.ok || !tt.want.Equal(v) {
			t.Errorf("Lookup(%v, %q): want %v %v, have %v %v", tt.scope, tt.name, tt.want, tt.ok, v, ok)
		}
	}
}

func TestActionsZero(t *testing.T) {
	var a Actions
	for act := range a.All() {
		t.Errorf("want no action, have %v", act)
	}
	if _, ok := a.Lookup(ScopeSess, "v"); ok || a.Err() != nil {
		t.Errorf("want no variable and no error, have %v and %v", ok, a.Err())
	}
}

func TestActionsRefused(t *testing.T) {
	long := strings.Repeat("n", 255)
	for _, tt := range []struct {
		name string
		do   func(*Actions)
		want string
	}{
		{"no name", func(a *Actions) { a.SetVar(ScopeSess, "", Int64(1)) }, "spoa: variable name of 0 bytes: want 1 to 255"},
		{"no name to unset", func(a *Actions) { a.UnsetVar(ScopeSess, "") }, "spoa: variable name of 0 bytes: want 1 to 255"},
		{"name of 255", func(a *Actions) { a.SetVar(ScopeSess, long, Int64(1)) }, ""},
		{"name of 256", func(a *Actions) { a.SetVar(ScopeSess, long+"n", Int64(1)) }, "spoa: variable name of 256 bytes: want 1 to 255"},
		{"scope 4", func(a *Actions) { a.SetVar(4, "v", Int64(1)) }, ""},
		{"scope 5", func(a *Actions) { a.SetVar(5, "v", Int64(1)) }, "spoa: variable v: no such scope: 5"},
		{"scope 255 to unset", func(a *Actions) { a.UnsetVar(255, "v") }, "spoa: variable v: no such scope: 255"},
	} {
		var a Actions
		tt.do(&a)
		have := ""
		if a.Err() != nil {
			have = a.Err().Error()
		}
		if n := len(slices.Collect(a.All())); tt.want != have || (n == 1) != (tt.want == "") {
			t.Errorf("%s: want error %q and no action with it, have %q and %d actions", tt.name, tt.want, have, n)
		}
	}
}

// Of what does not fit nothing is left, and what is smaller still goes in.
func TestActionsLimit(t *testing.T) {
	const (
		set   = "\x01\x03\x02\x08ip_score\x03\x2a" // 14 bytes
		unset = "\x02\x02\x01\x01a"                // 5 bytes
	)
	for _, tt := range []struct {
		name string
		max  int
		do   func(*Actions)
		want string
		ok   bool
	}{
		{"fits", 14, func(a *Actions) { a.SetVar(ScopeTxn, "ip_score", Uint32(42)) }, set, true},
		{"one byte more", 13, func(a *Actions) { a.SetVar(ScopeTxn, "ip_score", Uint32(42)) }, "", false},
		{"unset fits", 5, func(a *Actions) { a.UnsetVar(ScopeSess, "a") }, unset, true},
		{"unset, one byte more", 4, func(a *Actions) { a.UnsetVar(ScopeSess, "a") }, "", false},
		{"string fits", 10, func(a *Actions) { a.SetVar(ScopeTxn, "v", String("abc")) }, "\x01\x03\x02\x01v\x08\x03abc", true},
		{"string, one byte more", 9, func(a *Actions) { a.SetVar(ScopeTxn, "v", String("abc")) }, "", false},
		{"string much longer", 9, func(a *Actions) { a.SetVar(ScopeTxn, "v", String(strings.Repeat("x", 1<<20))) }, "", false},
		{"smaller one after it", 20, func(a *Actions) {
			a.SetVar(ScopeTxn, "ip_score", Uint32(42))
			a.SetVar(ScopeTxn, "v", String("abc"))
			a.SetVar(ScopeTxn, "v", String(strings.Repeat("x", 1<<20)))
			a.UnsetVar(ScopeSess, "a")
		}, set + unset, false},
	} {
		a := Actions{max: tt.max}
		tt.do(&a)
		if have := string(a.buf); tt.want != have || (a.Err() == nil) != tt.ok {
			t.Errorf("%s: want %q, ok %v, have %q, %v", tt.name, tt.want, tt.ok, have, a.Err())
		}
	}
}

func TestActionsFirstError(t *testing.T) {
	a := Actions{max: 8}
	a.SetVar(ScopeSess, "too_long", Int64(1))
	a.SetVar(ScopeSess, "", Int64(1))
	a.SetVar(ScopeSess, "v", Int64(1))
	const want = "spoa: variable too_long: the actions exceed the 8 bytes that the frame size leaves"
	if a.Err() == nil || a.Err().Error() != want {
		t.Errorf("want %s, have %v", want, a.Err())
	}
}

func TestActionRefused(t *testing.T) {
	for _, tt := range []struct{ name, wire string }{
		{"set-var with 2 arguments", "\x01\x02\x01\x01v\x00"},
		{"unset-var with 3 arguments", "\x02\x03\x01\x01v\x00"},
		{"action 0", "\x00\x03\x01\x01v\x00"},
		{"action 3", "\x03\x03\x01\x01v\x00"},
		{"scope 5", "\x01\x03\x05\x01v\x00"},
		{"no name", "\x01\x03\x01\x00\x00"},
		{"value of type 10", "\x01\x03\x01\x01v\x0a"},
	} {
		if act, _, ok := cutAction([]byte(tt.wire)); ok {
			t.Errorf("%s: want refusal, have %v", tt.name, act)
		}
	}
	for i := range len(ackActions) {
		want := 0
		if i >= len("\x02\x02\x01\x03old") {
			want = 1
		}
		a := Actions{buf: []byte(ackActions[:i])}
		if have := len(slices.Collect(a.All())); want != have {
			t.Errorf("%d of %d bytes: want %d actions, have %d", i, len(ackActions), want, have)
		}
	}
}

type capture struct {
	file, what string
	frame
}

// captures reads what real HAProxys sent: testdata/haproxy-*.hex.
func captures(t testing.TB) []capture {
	t.Helper()
	files, err := filepath.Glob("testdata/haproxy-*.hex")
	if err != nil || len(files) == 0 {
		t.Fatalf("want captures, have %v, %v", files, err)
	}
	var all []capture
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		c := capture{file: filepath.Base(file)}
		for line := range strings.Lines(string(b)) {
			line = strings.TrimSpace(line)
			if what, ok := strings.CutPrefix(line, "# "); ok {
				c.what = what
				continue
			}
			if !c.parse(unhex(t, line)) {
				t.Fatalf("%s: %s: want a frame, have %s", c.file, c.what, line)
			}
			all = append(all, c)
		}
	}
	return all
}

// kinds is what the captures' message of that name holds, but for the port.
var kinds = []Arg{
	{"", Addr(netip.MustParseAddr("127.0.0.1"))},
	{"ip", Addr(netip.MustParseAddr("127.0.0.1"))},
	{"port", Int64(0)},
	{"big", Int64(math.MaxInt64)},
	{"neg", Int64(-42)},
	{"min", Int64(math.MinInt64)},
	{"yes", Bool(true)},
	{"no", Bool(false)},
	{"str", String("hello")},
	{"none", Value{}},
	{"bin", Binary([]byte{0, 0xff, 0x80})},
	{"ip4", Addr(netip.MustParseAddr("192.0.2.1"))},
	{"ip6", Addr(netip.MustParseAddr("2001:db8::1"))},
	{"mapped", ipv6("::ffff:192.0.2.1")},
	{"method", String("POST")},
	{"path", String("/login")},
	{"ver", String("1.1")},
	{"x-none", Value{}},
	{"hdrs", Value{}}, // compared on its own
	{"body", Binary([]byte("user=anna"))},
}

// checkKinds wants the two messages of the captures, with an X-Long header of
// so many bytes.
func checkKinds(t *testing.T, c capture, payload []byte, long int) {
	t.Helper()
	n := mustDecode(t, string(payload))
	msgs := messagesOf(n)
	if len(msgs) != 2 || msgs[0].Name() != "kinds" || msgs[1].Name() != "ping" || msgs[1].Len() != 0 || msgs[0].Len() != len(kinds) {
		t.Fatalf("%s: %s: want kinds and ping, have %d messages of %q", c.file, c.what, len(msgs), payload)
	}
	for i, want := range kinds {
		have := msgs[0].Arg(i)
		switch want.Name {
		case "port":
			if port, ok := have.Value.Int(); !ok || have.Value.Kind() != KindInt64 || port < 1024 || port > math.MaxUint16 {
				t.Errorf("%s: %s: want a port, have %v", c.file, c.what, have)
			}
		case "hdrs": // names and values with their lengths; two empty strings at the end
			x := strings.Repeat("x", long)
			want := kv("host", kv("example.org", "")) + kv("user-agent", kv("test", "")) +
				kv("x-long", kv(x, "")) + kv("content-length", kv("9", "")) + "\x00\x00"
			if have.Value.Kind() != KindBinary || have.Value.String() != want {
				t.Errorf("%s: %s: want headers %q, have %v", c.file, c.what, want, have)
			}
		default:
			if !sameArg(want, have) {
				t.Errorf("%s: %s: want %v, have %v", c.file, c.what, want, have)
			}
		}
	}
}

// What HAProxy sends is understood, and written by us it is the same bytes.
func TestCaptures(t *testing.T) {
	seen := make(map[string]int)
	var whole []byte // of the fragments so far
	for _, c := range captures(t) {
		seen[c.what]++
		start := beginFrame(nil, c.kind, c.flags, c.stream, c.id)
		frame := finishFrame(append(start, c.payload...), 0)
		switch {
		case c.kind == frameHAProxyHello:
			var h hello
			if err := h.parse(c.kind, c.payload); err != nil {
				t.Errorf("%s: %s: %v", c.file, c.what, err)
				continue
			}
			if check := c.what == "HELLO of option spop-check"; h.healthcheck != check || h.can("pipelining") == check || (h.engineID == "") != check {
				t.Errorf("%s: %s: want healthcheck %v, have %+v", c.file, c.what, check, h)
			}
			if have := appendHello(nil, c.kind, &h); !bytes.Equal(frame, have) {
				t.Errorf("%s: %s: encode: want %q, have %q", c.file, c.what, frame, have)
			}
		case c.kind == frameHAProxyDisconnect:
			d := parseDisconnect(c.payload)
			if d.Status != StatusTimeout && d.Status != StatusBadVersion || d.Message != d.Status.String() {
				t.Errorf("%s: %s: want its status in words, have %+v", c.file, c.what, d)
			}
			if have := appendDisconnect(nil, c.kind, d.Status, d.Message); !bytes.Equal(frame, have) {
				t.Errorf("%s: %s: encode: want %q, have %q", c.file, c.what, frame, have)
			}
		case c.kind == frameNotify && c.fin():
			msgs := messagesOf(mustDecode(t, string(c.payload)))
			if m := msgs[0]; m.Name() == "kinds" {
				checkKinds(t, c, c.payload, 20)
			} else if m.Name() != "check-client-ip" || m.Len() != 1 || !sameArg(kinds[0], m.Arg(0)) {
				t.Errorf("%s: %s: want check-client-ip 127.0.0.1, have %s %v", c.file, c.what, m.Name(), argsOf(m))
			}
			have := beginFrame(nil, c.kind, c.flags, c.stream, c.id)
			for _, m := range msgs {
				have = appendMessage(have, m)
			}
			if have = finishFrame(have, 0); !bytes.Equal(frame, have) {
				t.Errorf("%s: %s: encode: want %q, have %q", c.file, c.what, frame, have)
			}
		default:
			if whole = append(whole, c.payload...); c.fin() {
				checkKinds(t, c, whole, 300)
				whole = nil
			} else if err := new(notify).decode(whole); err == nil {
				t.Errorf("%s: %s: want a fragment refused, have none", c.file, c.what)
			}
		}
	}
	if len(seen) != 9 || seen["HELLO of option spop-check"] != 3 || len(whole) != 0 {
		t.Errorf("want 9 sorts of frames, have %v and %d bytes of fragments", seen, len(whole))
	}
}

// ipPayload, httpPayload and bodyPayload are NOTIFYs as they come: an address,
// a request of about 700 bytes, a body of 8 KiB.
var (
	ipPayload   = []byte(ipNotify)
	httpPayload = appendMessage(nil, NewMessage("check-request",
		Arg{"ip", Addr(netip.MustParseAddr("2001:db8::1"))},
		Arg{"method", String("GET")},
		Arg{"path", String("/catalogue/search")},
		Arg{"query", String("q=garden+furniture&sort=price&page=2")},
		Arg{"ver", String("1.1")},
		Arg{"host", String("shop.example.org")},
		Arg{"agent", String("Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0")},
		Arg{"hdrs", Binary(bytes.Repeat([]byte("\x06accept\x03*/*"), 45))}))
	bodyPayload = appendMessage(nil, NewMessage("check-body",
		Arg{"", Addr(netip.MustParseAddr("192.0.2.1"))}, Arg{"body", Binary(make([]byte, 8<<10))}))
)

type request struct {
	IP      netip.Addr `spoe:"ip"`
	Port    uint16     `spoe:"port"`
	Score   int        `spoe:"score,optional"`
	Trusted bool       `spoe:"#3"`
}

var requestMessage = NewMessage("check", Arg{"ip", Addr(netip.MustParseAddr("192.0.2.1"))},
	Arg{"port", Int64(443)}, Arg{"score", Int64(-1)}, Arg{"", Bool(true)})

func wantAllocs(t *testing.T, name string, want float64, f func()) {
	t.Helper()
	if have := testing.AllocsPerRun(100, f); want != have {
		t.Errorf("%s: want %v allocations, have %v", name, want, have)
	}
}

func TestAllocs(t *testing.T) {
	var (
		n      notify
		acts   Actions
		m      = NewMessage("m", Arg{"a", Int64(1)}, Arg{"b", Int64(2)}, Arg{"c", Int64(3)})
		header = beginFrame(nil, frameNotify, flagFIN, 1<<40, 1)
		out    = make([]byte, 0, 256)
		addr   = netip.MustParseAddr("2001:db8::1")
		total  int64
	)
	strs := []byte("\x07strings\x08")
	for i := range 8 {
		strs = append(strs, kv("argument-"+strconv.Itoa(i), "\x08\x05hello")...)
	}
	decode := func(payload []byte) {
		if err := n.decode(payload); err != nil {
			t.Fatal(err)
		}
		for n.nextMessage() {
			for range n.current.Args() {
			}
		}
		n.release()
	}
	wantAllocs(t, "decode ip", 0, func() { decode(ipPayload) })
	wantAllocs(t, "decode eight strings", 0, func() { decode(strs) })
	// The name of the last message is but a guess.
	wantAllocs(t, "decode one and the other", 0, func() { decode(ipPayload); decode(strs); decode(httpPayload) })
	wantAllocs(t, "metadata", 0, func() {
		var f frame
		if !f.parse(header[lengthSize:]) {
			t.Fatal("want a frame")
		}
	})
	wantAllocs(t, "SetVar", 0, func() {
		acts.buf = acts.buf[:0]
		acts.SetVar(ScopeSess, "ip_score", Uint32(42))
		acts.SetVar(ScopeTxn, "client", Addr(addr))
		acts.SetVar(ScopeTxn, "reason", String("listed"))
		acts.UnsetVar(ScopeTxn, "old")
	})
	raw := ids(1<<40, 1)
	wantAllocs(t, "ACK", 0, func() { out = appendAck(out[:0], flagFIN, raw, acts.buf) })
	wantAllocs(t, "Lookup, Arg, Args", 0, func() {
		v, _ := m.Lookup("c")
		i, _ := v.Int()
		j, _ := m.Arg(1).Value.Int()
		total = i + j
		for _, v := range m.Args() {
			i, _ := v.Int()
			total += i
		}
	})
	if total != 11 {
		t.Errorf("want 3+2+1+2+3 = 11, have %d", total)
	}
	wantAllocs(t, "Decode", 0, func() {
		var r request // must not escape either
		if err := requestMessage.Decode(&r); err != nil || r.Port != 443 {
			t.Fatalf("want port 443, have %d, %v", r.Port, err)
		}
	})
}

func BenchmarkDecodeNotify(b *testing.B) {
	for _, bb := range []struct {
		name    string
		payload []byte
	}{{"ip", ipPayload}, {"http", httpPayload}, {"body", bodyPayload}} {
		b.Run(bb.name, func(b *testing.B) {
			var n notify
			b.ReportAllocs()
			b.SetBytes(int64(len(bb.payload)))
			for b.Loop() {
				if err := n.decode(bb.payload); err != nil || !n.nextMessage() {
					b.Fatalf("want a message, have none, error %v", err)
				}
			}
		})
	}
}

func BenchmarkEncodeAck(b *testing.B) {
	var (
		acts Actions
		out  []byte
		raw  = ids(12345, 1)
	)
	b.ReportAllocs()
	for b.Loop() {
		acts.buf = acts.buf[:0]
		acts.SetVar(ScopeSess, "ip_score", Uint32(42))
		out = appendAck(out[:0], flagFIN, raw, acts.buf)
	}
}

// nineArguments is what Coraza's agent asks for.
type nineArguments struct {
	App     string     `spoe:"app"`
	SrcIP   netip.Addr `spoe:"src-ip"`
	SrcPort uint16     `spoe:"src-port"`
	DstIP   netip.Addr `spoe:"dst-ip"`
	DstPort uint16     `spoe:"dst-port"`
	Method  string     `spoe:"method"`
	ID      string     `spoe:"id,optional"`
	Path    string     `spoe:"path"`
	Version string     `spoe:"version"`
}

var nineMessage = NewMessage("coraza-req", Arg{"app", String("default")},
	Arg{"src-ip", Addr(netip.MustParseAddr("192.0.2.1"))}, Arg{"src-port", Int64(44321)},
	Arg{"dst-ip", Addr(netip.MustParseAddr("192.0.2.2"))}, Arg{"dst-port", Int64(443)},
	Arg{"method", String("GET")}, Arg{"id", String("")}, Arg{"path", String("/index.html")}, Arg{"version", String("1.1")})

func BenchmarkDecodeStruct(b *testing.B) {
	b.Run("four", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			var r request
			if err := requestMessage.Decode(&r); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("nine", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			var r nineArguments
			if err := nineMessage.Decode(&r); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkArg is all that the codec does for a NOTIFY with one address.
func BenchmarkArg(b *testing.B) {
	b.ReportAllocs()
	var n notify
	for b.Loop() {
		if err := n.decode(ipPayload); err != nil || !n.nextMessage() {
			b.Fatalf("want a message, have none, error %v", err)
		}
		if _, ok := n.current.Arg(0).Value.Addr(); !ok {
			b.Fatal("want an address, have none")
		}
	}
}
