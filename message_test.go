package spoa

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"net/textproto"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func sameArg(a, b Arg) bool { return a.Name == b.Name && a.Value.Equal(b.Value) }

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
