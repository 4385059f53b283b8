package spoa

import (
	"bytes"
	"errors"
	"math"
	"net/netip"
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
