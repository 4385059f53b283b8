package spoa

import (
	"bytes"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"slices"
	"testing"
)

// slow decodes as the specification reads, one thing at a time and with big
// numbers, for the fast decoder to be compared with. Once something is refused
// bad is set, and what comes after it means nothing.
type slow struct {
	b   []byte
	bad bool
}

func (r *slow) more() bool { return !r.bad && len(r.b) > 0 }

func (r *slow) bytes(n *big.Int) []byte {
	if r.bad || n.Cmp(big.NewInt(int64(len(r.b)))) > 0 {
		r.bad = true
		return nil
	}
	b := r.b[:n.Int64()]
	r.b = r.b[n.Int64():]
	return b
}

func (r *slow) byte() byte {
	if b := r.bytes(big.NewInt(1)); !r.bad {
		return b[0]
	}
	return 0
}

// varint reads b0 + b1<<4 + b2<<11 + …; after a b0 below 240 there is no other
// byte, and below 128 any other is the last.
func (r *slow) varint() *big.Int {
	sum := new(big.Int)
	b := r.byte()
	sum.SetUint64(uint64(b))
	more := b >= 240
	for shift := uint(4); more; shift += 7 {
		b = r.byte()
		sum.Add(sum, new(big.Int).Lsh(big.NewInt(int64(b)), shift))
		more = b >= 128
	}
	if sum.BitLen() > 64 {
		r.bad = true
	}
	return sum
}

func (r *slow) string() string { return string(r.bytes(r.varint())) }

// signed turns 64 bits into the number that they are in two's complement.
func signed(n *big.Int) *big.Int {
	if n.Bit(63) == 1 {
		return new(big.Int).Sub(n, new(big.Int).Lsh(big.NewInt(1), 64))
	}
	return n
}

// integer reads a number that must fit so many bits.
func (r *slow) integer(bits int, negative bool) string {
	n := r.varint()
	if negative {
		n = signed(n)
		bits--
		if n.Sign() < 0 && new(big.Int).Not(n).BitLen() > bits {
			r.bad = true
		}
	}
	if n.Sign() >= 0 && n.BitLen() > bits {
		r.bad = true
	}
	return n.String()
}

// value reads a typed value and returns it in words.
func (r *slow) value() string {
	b := r.byte()
	switch b & 15 {
	case 0:
		return "null <null>"
	case 1:
		return fmt.Sprint("bool ", b>>4&1 == 1)
	case 2:
		return "int32 " + r.integer(32, true)
	case 3:
		return "uint32 " + r.integer(32, false)
	case 4:
		return "int64 " + r.integer(64, true)
	case 5:
		return "uint64 " + r.integer(64, false)
	case 6:
		return "ipv4 " + net.IP(r.bytes(big.NewInt(4))).String()
	case 7:
		return "ipv6 " + net.IP(r.bytes(big.NewInt(16))).String()
	case 8:
		return "string " + r.string()
	case 9:
		return "binary " + r.string()
	}
	r.bad = true
	return ""
}

func words(v Value) string { return v.Kind().String() + " " + v.String() }

// messages reads the payload of a NOTIFY: each message as its name, then its
// arguments' names and values.
func (r *slow) messages() (msgs [][]string) {
	for r.more() {
		m := []string{r.string()}
		for range r.byte() {
			m = append(m, r.string(), r.value())
			if r.bad {
				break
			}
		}
		msgs = append(msgs, m)
	}
	return msgs
}

// actions reads the payload of an ACK up to the first action that is not one.
func (r *slow) actions() (acts []string) {
	for r.more() {
		head := [2]byte{r.byte(), r.byte()}
		scope := r.byte()
		name := r.string()
		act := fmt.Sprintf("%d %q", scope, name)
		switch head {
		case [2]byte{1, 3}:
			act += " = " + r.value()
		case [2]byte{2, 2}:
			act += " unset"
		default:
			r.bad = true
		}
		if r.bad || scope > 4 || name == "" {
			break
		}
		acts = append(acts, act)
	}
	return acts
}

func FuzzVarint(f *testing.F) {
	for _, tt := range varintTests {
		f.Add(unhex(f, tt.hex))
	}
	f.Add([]byte("\xf0\xf1\xfe\xfe\xfe\xfe\xfe\xfe\xfe\x0e")) // 2^64
	f.Add([]byte("\xf0\x80\x80\x80\x80\x80\x80\x80\x80\x80\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := slow{b: b}
		want := r.varint()
		v, n := varint(b)
		if r.bad != (n == 0) {
			t.Fatalf("%x: want refused %v, have %d of %d bytes", b, r.bad, v, n)
		}
		if r.bad {
			return
		}
		if !want.IsUint64() || want.Uint64() != v || n != len(b)-len(r.b) {
			t.Fatalf("%x: want %v of %d bytes, have %d of %d", b, want, len(b)-len(r.b), v, n)
		}
		// There is one way to write a number, so the encoder's is this one.
		if have := appendVarint(nil, v); !bytes.Equal(b[:n], have) {
			t.Fatalf("%d: want %x, have %x", v, b[:n], have)
		}
	})
}

func FuzzValue(f *testing.F) {
	for _, tt := range valueTests {
		f.Add([]byte(tt.wire))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r := slow{b: b}
		want := r.value()
		v := String("stale")
		rest, ok := cutValue(b, &v)
		if ok == r.bad {
			t.Fatalf("%x: want refused %v, have %v", b, r.bad, words(v))
		}
		if !ok {
			return
		}
		if have := words(v); want != have || !bytes.Equal(r.b, rest) {
			t.Fatalf("%x: want %q and %x, have %q and %x", b, want, r.b, have, rest)
		}
		checkAccessors(t, v)
		if enc := appendValue(nil, v); !bytes.Equal(b[1:len(b)-len(rest)], enc[1:]) || enc[0]&15 != b[0]&15 {
			t.Fatalf("%x: encode: have %x", b, enc)
		}
	})
}

// checkAccessors wants each accessor to agree with the value in words, or to
// return the zero value.
func checkAccessors(t *testing.T, v Value) {
	t.Helper()
	isNumber := KindInt32 <= v.Kind() && v.Kind() <= KindUint64
	n, _ := new(big.Int).SetString(v.String(), 10)
	if i, ok := v.Int(); ok != (isNumber && n.IsInt64()) || ok && n.Int64() != i || !ok && i != 0 {
		t.Errorf("%s: Int: have %d, %v", words(v), i, ok)
	}
	if u, ok := v.Uint(); ok != (isNumber && n.IsUint64()) || ok && n.Uint64() != u || !ok && u != 0 {
		t.Errorf("%s: Uint: have %d, %v", words(v), u, ok)
	}
	if b, ok := v.Bool(); ok != (v.Kind() == KindBool) || b && !ok {
		t.Errorf("%s: Bool: have %v, %v", words(v), b, ok)
	}
	address := v.Kind() == KindIPv4 || v.Kind() == KindIPv6
	if a, ok := v.Addr(); ok != address || a.IsValid() != ok || a.Is4In6() {
		t.Errorf("%s: Addr: have %v, %v", words(v), a, ok)
	}
	text := v.Kind() == KindString || v.Kind() == KindBinary
	if b := v.Bytes(); text && string(b) != v.String() || !text && b != nil {
		t.Errorf("%s: Bytes: have %q", words(v), b)
	}
	if c := v.Clone(); !v.Equal(c) {
		t.Errorf("%s: Clone: have %s", words(v), words(c))
	}
}

func FuzzFrame(f *testing.F) {
	for _, c := range captures(f) {
		b := beginFrame(nil, c.kind, c.flags, c.stream, c.id)
		f.Add(append(b[lengthSize:], c.payload...))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r := slow{b: b}
		kind := r.byte()
		flags := new(big.Int).SetBytes(r.bytes(big.NewInt(4)))
		stream, id := r.varint(), r.varint()
		var have frame
		if ok := have.parse(b); ok == r.bad {
			t.Fatalf("%x: want refused %v, have %+v", b, r.bad, have)
		} else if !ok {
			return
		}
		if have.kind != kind || uint64(have.flags) != flags.Uint64() || have.stream != stream.Uint64() || have.id != id.Uint64() ||
			!bytes.Equal(have.payload, r.b) {
			t.Fatalf("%x: want %d %v %v %v %x, have %+v", b, kind, flags, stream, id, r.b, have)
		}
		enc := finishFrame(append(beginFrame(nil, have.kind, have.flags, have.stream, have.id), have.payload...), 0)
		if size := new(big.Int).SetBytes(enc[:4]); size.Int64() != int64(len(b)) || !bytes.Equal(b, enc[4:]) {
			t.Fatalf("%x: encode: have %x", b, enc)
		}
	})
}

func FuzzHello(f *testing.F) {
	for _, c := range captures(f) {
		if c.kind == frameHAProxyHello {
			f.Add(false, c.payload)
		}
	}
	f.Add(true, []byte(agentHello))
	f.Add(false, []byte(haproxyHello))
	f.Fuzz(func(t *testing.T, agent bool, b []byte) {
		kind := byte(frameHAProxyHello)
		if agent {
			kind = frameAgentHello
		}
		var h, again hello
		if err := h.parse(kind, b); err != nil {
			var d *DisconnectError
			if !errors.As(err, &d) || d.Remote || d.Status < StatusInvalidFrame || d.Status > StatusBadFrameSize {
				t.Fatalf("%q: want a status from 4 to 9, have %v", b, err)
			}
			if r := (&slow{b: b}).list(); r.bad && d.Status != StatusInvalidFrame {
				t.Fatalf("%q: want %v, have %v", b, StatusInvalidFrame, err)
			}
			return
		}
		if r := (&slow{b: b}).list(); r.bad {
			t.Fatalf("%q: want it refused as malformed, have %+v", b, h)
		}
		if h.frameSize < minFrameSize {
			t.Fatalf("%q: want a frame size of 256 or more, have %d", b, h.frameSize)
		}
		var enc frame
		if !enc.parse(appendHello(nil, kind, &h)[lengthSize:]) || enc.kind != kind || enc.flags != flagFIN || enc.stream != 0 || enc.id != 0 {
			t.Fatalf("%q: want a HELLO, have %+v", b, enc)
		}
		if err := again.parse(kind, enc.payload); err != nil || again != h {
			t.Fatalf("%q: want %+v again, have %+v, %v", b, h, again, err)
		}
	})
}

// list reads a list of names and values to its end.
func (r *slow) list() *slow {
	for r.more() {
		r.string()
		r.value()
	}
	return r
}

func FuzzDisconnect(f *testing.F) {
	for _, c := range captures(f) {
		if c.kind == frameHAProxyDisconnect {
			f.Add(c.payload)
		}
	}
	f.Add([]byte(agentDisconnect))
	f.Fuzz(func(t *testing.T, b []byte) {
		d := parseDisconnect(b)
		if !d.Remote || d.Error() == "" {
			t.Fatalf("%q: want words from the peer, have %+v", b, d)
		}
		var enc frame
		if !enc.parse(appendDisconnect(nil, frameAgentDisconnect, d.Status, d.Message)[lengthSize:]) {
			t.Fatalf("%q: want a DISCONNECT, have none", b)
		}
		if have := parseDisconnect(enc.payload); *have != *d {
			t.Fatalf("%q: want %+v again, have %+v", b, d, have)
		}
	})
}

func FuzzNotify(f *testing.F) {
	var whole []byte
	for _, c := range captures(f) {
		switch {
		case c.kind == frameNotify && c.fin():
			f.Add(c.payload)
		case c.kind == frameNotify || c.kind == frameUnset:
			if whole = append(whole, c.payload...); c.fin() {
				f.Add(whole)
				whole = nil
			}
		}
	}
	f.Add([]byte("\x01a\x02\x01x\x00\x01y\x11\x01b\x01\x01x\x04\x07"))
	f.Fuzz(func(t *testing.T, b []byte) {
		// Used before, as on a connection: what was there must not be seen.
		var n notify
		if err := n.decode(httpPayload); err != nil {
			t.Fatal(err)
		}
		r := slow{b: b}
		want := r.messages()
		payload := bytes.Clone(b)
		err := n.decode(payload)
		if (err != nil) != r.bad {
			t.Fatalf("%q: want refused %v, have %v", b, r.bad, err)
		}
		if err != nil {
			return
		}
		var have [][]string
		var enc []byte
		names := slices.Collect(n.names())
		for n.nextMessage() {
			m := &n.current
			l := []string{m.Name()}
			for i, a := range argsOf(m) {
				if !sameArg(a, m.Arg(i)) {
					t.Fatalf("%q: Arg(%d): want %v, have %v", b, i, a, m.Arg(i))
				}
				l = append(l, a.Name, words(a.Value))
			}
			if len(names) <= len(have) || names[len(have)] != m.Name() || len(l) != 1+2*m.Len() {
				t.Fatalf("%q: want message %d named %q with %d arguments, have %q and %q", b, len(have), m.Name(), m.Len(), names, l)
			}
			have = append(have, l)
			enc = appendMessage(enc, m)
		}
		if !slices.EqualFunc(want, have, slices.Equal) {
			t.Fatalf("%q: want %q, have %q", b, want, have)
		}
		r = slow{b: enc}
		if again := r.messages(); r.bad || !slices.EqualFunc(want, again, slices.Equal) {
			t.Fatalf("%q: encode: want %q, have %q", b, want, again)
		}
		if !bytes.Equal(b, payload) {
			t.Fatalf("%q: want the payload as it was, have %q", b, payload)
		}
	})
}

func FuzzHeaders(f *testing.F) {
	f.Add([]byte("host: example.org\r\nempty:\r\n\r\n"))
	f.Add(bin("host", "example.org", "empty", "", "", "").Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, v := range []Value{String(string(b)), Binary(b)} {
			var list []string
			failed := false
			for h, err := range v.Headers() {
				if failed {
					t.Fatalf("%v %q: want nothing after an error, have %q", v.Kind(), b, h.Name)
				}
				if failed = err != nil; !failed {
					list = append(list, string(h.Name), string(h.Value))
				}
			}
			if v.Kind() == KindBinary && !failed {
				if again := bin(append(list, "", "")...); !bytes.Equal(b, again.Bytes()) {
					t.Fatalf("%q: want the same again, have %q", b, again.Bytes())
				}
			}
		}
	})
}

func FuzzActions(f *testing.F) {
	f.Add([]byte(ackActions))
	for _, tt := range valueTests {
		f.Add([]byte("\x01\x03\x01\x01v" + tt.wire + "\x02\x02\x04\x01v"))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		want := (&slow{b: b}).actions()
		var have, again []string
		var copied Actions
		for act := range (&Actions{buf: b}).All() {
			have = append(have, inWords(act))
			if len(act.Name) > 255 { // none that we would send
				return
			}
			if act.Unset {
				copied.UnsetVar(act.Scope, act.Name)
			} else {
				copied.SetVar(act.Scope, act.Name, act.Value)
			}
		}
		if !slices.Equal(want, have) {
			t.Fatalf("%q: want %q, have %q", b, want, have)
		}
		for act := range copied.All() {
			again = append(again, inWords(act))
		}
		if !slices.Equal(want, again) || copied.Err() != nil {
			t.Fatalf("%q: set again: want %q, have %q, %v", b, want, again, copied.Err())
		}
	})
}

func inWords(a Action) string {
	s := fmt.Sprintf("%d %q", a.Scope, a.Name)
	if a.Unset {
		return s + " unset"
	}
	return s + " = " + words(a.Value)
}

// FuzzRoundTrip sends any value under any names there and back.
func FuzzRoundTrip(f *testing.F) {
	for kind := range KindBinary + 1 {
		f.Add("check", "arg", byte(kind), uint64(1)<<63, []byte("text"), uint64(1), uint64(239), byte(1), 0)
		f.Add("", "", byte(kind), uint64(240), []byte(nil), uint64(240), uint64(2288), byte(4), 20)
	}
	f.Fuzz(func(t *testing.T, name, arg string, kind byte, number uint64, text []byte, stream, id uint64, scope byte, limit int) {
		v := valueOf(kind, number, text)
		m := NewMessage(name, Arg{arg, v}, Arg{arg, v})
		if m.Name() != name || m.Len() != 2 || !sameArg(m.Arg(1), Arg{arg, v}) {
			t.Fatalf("want %q with two of %q %s, have %q %v", name, arg, words(v), m.Name(), argsOf(m))
		}
		acts := Actions{max: max(limit, 0)}
		acts.SetVar(Scope(scope), arg, v)
		acts.UnsetVar(Scope(scope), name)
		var want []Action
		size := 0
		for _, act := range []Action{{Scope: Scope(scope), Name: arg, Value: v}, {Scope: Scope(scope), Name: name, Unset: true}} {
			enc := 3 + len(appendString(nil, act.Name))
			if !act.Unset {
				enc += len(appendValue(nil, v))
			}
			if scope <= 4 && act.Name != "" && len(act.Name) <= 255 && (acts.max == 0 || size+enc <= acts.max) {
				want = append(want, act)
				size += enc
			}
		}
		var ack frame
		if !ack.parse(appendAck(nil, flagFIN, ids(stream, id), acts.buf)[lengthSize:]) || ack.stream != stream || ack.id != id || ack.kind != frameAck || !ack.fin() {
			t.Fatalf("want ACK %d %d, have %+v", stream, id, ack)
		}
		have := slices.Collect((&Actions{buf: ack.payload}).All())
		if !slices.EqualFunc(want, have, sameAction) || (acts.Err() == nil) != (len(want) == 2) {
			t.Fatalf("want %v, have %v, %v", want, have, acts.Err())
		}
	})
}

// valueOf makes a Value of any kind by the constructor for it.
func valueOf(kind byte, number uint64, text []byte) Value {
	switch Kind(kind % 10) {
	case KindBool:
		return Bool(number&1 == 1)
	case KindInt32:
		return Int32(int32(number))
	case KindUint32:
		return Uint32(uint32(number))
	case KindInt64:
		return Int64(int64(number))
	case KindUint64:
		return Uint64(number)
	case KindIPv4:
		return Addr(netip.AddrFrom4([4]byte{byte(number), byte(number >> 8), byte(number >> 16), byte(number >> 24)}))
	case KindIPv6:
		var b [16]byte
		copy(b[:], text)
		return Addr(netip.AddrFrom16(b))
	case KindString:
		return String(string(text))
	case KindBinary:
		return Binary(text)
	}
	return Value{}
}
