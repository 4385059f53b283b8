package spoa

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"iter"
	"math"
	"net/netip"
	"reflect"
	"strconv"
	"strings"
	"unsafe"

	"github.com/spoa-go/spoa/internal/fields"
	"github.com/spoa-go/spoa/internal/names"
)

// Kind is the type of a Value on the wire (SPOE.txt 3.1).
type Kind uint8

// The kinds, numbered as on the wire.
const (
	KindNull Kind = iota
	KindBool
	KindInt32
	KindUint32
	KindInt64
	KindUint64
	KindIPv4
	KindIPv6
	KindString
	KindBinary
)

var kindNames = [...]string{"null", "bool", "int32", "uint32", "int64", "uint64", "ipv4", "ipv6", "string", "binary"}

// String returns the name of the type, such as string or ipv4.
func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return "kind " + strconv.Itoa(int(k))
}

// Value is a typed value: of an argument, of a variable to set. The zero Value
// is NULL.
//
// A string or binary Value of a Message is a view of the frame it came in. It
// is gone when the handler returns; Clone, String and a copy of Bytes outlive
// it. Other kinds are plain values.
type Value struct {
	_      [0]func()
	kind   Kind
	hi, lo uint64 // the integer, BOOL and IPV4 in lo, IPV6 in both
	s      string // STRING and BINARY
}

// Bool returns a BOOL.
func Bool(v bool) Value {
	if v {
		return Value{kind: KindBool, lo: 1}
	}
	return Value{kind: KindBool}
}

// Int32 returns an INT32.
func Int32(v int32) Value { return Value{kind: KindInt32, lo: uint64(int64(v))} }

// Uint32 returns a UINT32.
func Uint32(v uint32) Value { return Value{kind: KindUint32, lo: uint64(v)} }

// Int64 returns an INT64, the only integer kind that HAProxy itself sends.
func Int64(v int64) Value { return Value{kind: KindInt64, lo: uint64(v)} }

// Int returns an INT64. It is short for Int64(int64(v)).
func Int(v int) Value { return Int64(int64(v)) }

// Uint64 returns a UINT64.
func Uint64(v uint64) Value { return Value{kind: KindUint64, lo: v} }

// String returns a STRING. It keeps s and does not copy it.
func String(s string) Value { return Value{kind: KindString, s: s} }

// Binary returns a BINARY. It keeps b, which must not change while the Value is
// in use; SetVar and NewMessage copy it.
func Binary(b []byte) Value { return Value{kind: KindBinary, s: viewString(b)} }

// Addr returns an IPV4 or IPV6. An IPv4 address in IPv6 form is sent as IPV4, a
// zone is dropped, the zero Addr gives NULL.
func Addr(a netip.Addr) Value {
	a = a.Unmap()
	switch {
	case a.Is4():
		b := a.As4()
		return Value{kind: KindIPv4, lo: uint64(binary.BigEndian.Uint32(b[:]))}
	case a.Is6():
		b := a.As16()
		return Value{kind: KindIPv6, hi: binary.BigEndian.Uint64(b[:]), lo: binary.BigEndian.Uint64(b[8:])}
	}
	return Value{}
}

// Kind returns the kind of v.
func (v Value) Kind() Kind { return v.kind }

// Bool returns the value of a BOOL.
func (v Value) Bool() (b, ok bool) {
	ok = v.kind == KindBool
	return ok && v.lo == 1, ok
}

// Int returns the value of any integer kind that fits an int64.
func (v Value) Int() (int64, bool) {
	switch v.kind {
	case KindInt32, KindInt64, KindUint32:
		return int64(v.lo), true
	case KindUint64:
		if v.lo <= math.MaxInt64 {
			return int64(v.lo), true
		}
	}
	return 0, false
}

// Uint returns the value of any integer kind that is not negative.
func (v Value) Uint() (uint64, bool) {
	switch v.kind {
	case KindUint32, KindUint64:
		return v.lo, true
	case KindInt32, KindInt64:
		if int64(v.lo) >= 0 {
			return v.lo, true
		}
	}
	return 0, false
}

// Addr returns the value of an IPV4 or IPV6. An IPv4 address in IPv6 form comes
// back as IPv4.
func (v Value) Addr() (netip.Addr, bool) {
	switch v.kind {
	case KindIPv4:
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], uint32(v.lo))
		return netip.AddrFrom4(b), true
	case KindIPv6:
		var b [16]byte
		binary.BigEndian.PutUint64(b[:], v.hi)
		binary.BigEndian.PutUint64(b[8:], v.lo)
		return netip.AddrFrom16(b).Unmap(), true
	}
	return netip.Addr{}, false
}

func (v Value) isText() bool { return v.kind == KindString || v.kind == KindBinary }

// Bytes returns the bytes of a STRING or BINARY, nil for other kinds. It is a
// view: it must not be written to, and those of a Message are gone when the
// handler returns.
func (v Value) Bytes() []byte {
	if !v.isText() {
		return nil
	}
	return unsafe.Slice(unsafe.StringData(v.s), len(v.s))
}

// String returns v in readable form, of any kind, NULL as "<null>". It is a copy.
func (v Value) String() string {
	switch v.kind {
	case KindNull:
		return "<null>"
	case KindBool:
		return strconv.FormatBool(v.lo == 1)
	case KindInt32, KindInt64:
		return strconv.FormatInt(int64(v.lo), 10)
	case KindUint32, KindUint64:
		return strconv.FormatUint(v.lo, 10)
	case KindIPv4, KindIPv6:
		a, _ := v.Addr()
		return a.String()
	}
	return strings.Clone(v.s)
}

// Format formats what String returns. The verb q quotes a STRING or BINARY, but
// no other kind, so that NULL cannot be taken for a string.
func (v Value) Format(s fmt.State, verb rune) {
	if verb == 'q' && !v.isText() {
		verb = 's'
	}
	fmt.Fprintf(s, fmt.FormatString(s, verb), v.String())
}

// Equal reports whether v and w are of the same kind and have the same value.
// Int32(1) and Int64(1) are not equal. With it, go-cmp compares Values.
func (v Value) Equal(w Value) bool {
	return v.kind == w.kind && v.hi == w.hi && v.lo == w.lo && v.s == w.s
}

// Clone returns a Value that stays valid after the handler has returned.
func (v Value) Clone() Value {
	v.s = strings.Clone(v.s)
	return v
}

// Header is a field of a header block. Both are views, as Value.Bytes returns.
type Header struct{ Name, Value []byte }

// Headers iterates over the header fields in an argument of HAProxy's req.hdrs or
// res.hdrs, a STRING, or req.hdrs_bin or res.hdrs_bin, a BINARY, in their order.
// There are none in NULL. Values come without spaces around them. It ends with an
// error, and no Header, where the block is malformed or cut short; what it has
// given before stands. It allocates nothing but that error, and takes as much
// time as the block has bytes.
func (v Value) Headers() iter.Seq2[Header, error] {
	return func(yield func(Header, error) bool) {
		cut, b := cutHeader, v.Bytes()
		switch v.kind {
		case KindNull:
			return
		case KindBinary:
			cut = cutHeaderBin
		case KindString:
		default:
			yield(Header{}, fmt.Errorf("spoa: header block: want string or binary, have %v", v.kind))
			return
		}
		for rest := b; ; {
			h, after, ok := cut(rest)
			switch {
			case !ok:
				yield(Header{}, fmt.Errorf("spoa: header block: malformed or cut short at byte %d of %d: %.40q", len(b)-len(rest), len(b), rest))
				return
			case len(h.Name) == 0 && len(after) > 0:
				yield(Header{}, fmt.Errorf("spoa: header block: %d bytes after its end", len(after)))
				return
			case len(h.Name) == 0 || !yield(h, nil):
				return
			}
			rest = after
		}
	}
}

// cutHeader takes a line, "name: value", from the beginning of b. An empty one
// ends the block: the Header has no name then.
func cutHeader(b []byte) (h Header, rest []byte, ok bool) {
	line, rest, ok := bytes.Cut(b, []byte("\r\n"))
	if !ok || len(line) == 0 {
		return h, rest, ok
	}
	h.Name, h.Value, ok = bytes.Cut(line, []byte(":"))
	h.Value = bytes.Trim(h.Value, " \t")
	return h, rest, ok && len(h.Name) > 0
}

// cutHeaderBin takes a name and a value, each with its length, from the beginning
// of b. Two empty ones end the block.
func cutHeaderBin(b []byte) (h Header, rest []byte, ok bool) {
	if h.Name, rest, ok = cutString(b); !ok {
		return h, nil, false
	}
	h.Value, rest, ok = cutString(rest)
	return h, rest, ok && (len(h.Name) > 0 || len(h.Value) == 0)
}

// viewString returns a string that shares b's memory.
func viewString(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

const boolTrue = 0x10 // flag of a BOOL's type byte

func appendValue(b []byte, v Value) []byte {
	switch v.kind {
	case KindBool:
		return append(b, byte(KindBool)|byte(v.lo)*boolTrue)
	case KindInt32, KindUint32, KindInt64, KindUint64:
		return appendVarint(append(b, byte(v.kind)), v.lo)
	case KindIPv4:
		return binary.BigEndian.AppendUint32(append(b, byte(v.kind)), uint32(v.lo))
	case KindIPv6:
		b = binary.BigEndian.AppendUint64(append(b, byte(v.kind)), v.hi)
		return binary.BigEndian.AppendUint64(b, v.lo)
	case KindString, KindBinary:
		return appendString(append(b, byte(v.kind)), v.s)
	}
	return append(b, byte(KindNull))
}

// cutValue takes a typed value from the beginning of b into v. A STRING or
// BINARY is a view of b.
func cutValue(b []byte, v *Value) (rest []byte, ok bool) {
	if len(b) == 0 {
		return nil, false
	}
	kind := Kind(b[0] & 0x0f)
	*v = Value{kind: kind}
	switch kind {
	case KindNull:
		return b[1:], true
	case KindBool:
		if b[0]&boolTrue != 0 {
			v.lo = 1
		}
		return b[1:], true
	case KindInt32, KindUint32, KindInt64, KindUint64:
		u, n := varint(b[1:])
		v.lo = u
		ok = n > 0 &&
			(kind != KindInt32 || int64(u) == int64(int32(u))) &&
			(kind != KindUint32 || u <= math.MaxUint32)
		return b[1+n:], ok
	case KindIPv4:
		if len(b) < 1+4 {
			return nil, false
		}
		v.lo = uint64(binary.BigEndian.Uint32(b[1:]))
		return b[1+4:], true
	case KindIPv6:
		if len(b) < 1+16 {
			return nil, false
		}
		v.hi = binary.BigEndian.Uint64(b[1:])
		v.lo = binary.BigEndian.Uint64(b[1+8:])
		return b[1+16:], true
	case KindString, KindBinary:
		var s []byte
		s, rest, ok = cutString(b[1:])
		v.s = viewString(s)
		return rest, ok
	}
	return nil, false
}

// interned holds the names of messages and arguments, of all connections.
var interned names.Cache

// Arg is an argument of a Message.
type Arg struct {
	Name  string // empty for the unnamed, as `args src` sends it
	Value Value
}

// Message is one message of a NOTIFY (SPOE.txt 3.2.6). It is valid until the
// handler returns, and may be read by several goroutines until then. Names may
// be kept; Values are views, see there.
//
// Arguments are decoded when they are asked for, from the bytes of the frame.
type Message struct {
	name  string
	count int
	args  []byte // begins with the encoded arguments
	from  *notify
}

// NewMessage returns a Message as a handler would get it, for tests and for
// Client. It copies the arguments. It panics if there are more than 255, which
// no frame can hold.
func NewMessage(name string, args ...Arg) *Message {
	if len(args) > math.MaxUint8 {
		panic("spoa: NewMessage: " + strconv.Itoa(len(args)) + " arguments")
	}
	var b []byte
	for i := range args {
		b = appendKV(b, args[i].Name, args[i].Value)
	}
	return &Message{name: name, count: len(args), args: b}
}

// Name returns the message's name.
func (m *Message) Name() string { return m.name }

// StreamID returns the STREAM-ID of the NOTIFY: HAProxy's stream, counted per
// process up to HAProxy 3.0 and per connection from 3.1 on.
func (m *Message) StreamID() uint64 {
	if m.from == nil { // NewMessage's
		return 0
	}
	return m.from.stream
}

// FrameID returns the FRAME-ID of the NOTIFY.
func (m *Message) FrameID() uint64 {
	if m.from == nil {
		return 0
	}
	return m.from.id
}

// EngineID returns the engine-id of the connection's HELLO, empty if it had
// none.
func (m *Message) EngineID() string { return m.Peer().EngineID }

// Peer returns the other end of the connection that the message came on, the zero
// Peer for a Message of NewMessage.
func (m *Message) Peer() Peer {
	if m.from == nil || m.from.peer == nil {
		return Peer{}
	}
	return *m.from.peer
}

// Len returns the number of arguments, at most 255.
func (m *Message) Len() int { return m.count }

// Arg returns the argument at position i, from 0 to Len()-1; elsewhere the zero
// Arg. It reads past those before it: Args and Decode read each but once.
func (m *Message) Arg(i int) (a Arg) {
	if i < 0 || i >= m.count {
		return a
	}
	b := m.args
	if i > 0 {
		b, _ = skipArgs(b, i)
	}
	name, rest, ok := cutString(b)
	if !ok {
		return a
	}
	if _, ok = cutValue(rest, &a.Value); !ok {
		return Arg{}
	}
	if len(name) > 0 {
		a.Name = interned.Intern(name)
	}
	return a
}

// Lookup returns the first argument of that name.
func (m *Message) Lookup(name string) (Value, bool) {
	b := m.args
	for range m.count {
		var v Value
		have, rest, ok := cutString(b)
		if !ok {
			break
		}
		if b, ok = cutValue(rest, &v); !ok {
			break
		}
		if string(have) == name {
			return v, true
		}
	}
	return Value{}, false
}

// Value returns the value of the first argument of that name, NULL if there is
// none. Lookup tells an absent argument from one that is NULL.
func (m *Message) Value(name string) Value {
	v, _ := m.Lookup(name)
	return v
}

// Args iterates over the arguments in their order.
func (m *Message) Args() iter.Seq2[string, Value] {
	return func(yield func(string, Value) bool) {
		b := m.args
		for range m.count {
			var v Value
			name, rest, ok := cutKV(b, &v)
			if !ok || !yield(interned.Intern(name), v) {
				return
			}
			b = rest
		}
	}
}

func appendMessage(b []byte, m *Message) []byte {
	rest, _ := skipArgs(m.args, m.count)
	b = append(appendString(b, m.name), byte(m.count))
	return append(b, m.args[:len(m.args)-len(rest)]...)
}

// notify is a NOTIFY. Its payload is checked as a whole, but decoded only as it
// is read: many small arguments would take 25 times their bytes. Its messages are
// handled one after the other, so one Message does for all.
type notify struct {
	stream, id uint64
	peer       *Peer
	payload    []byte
	current    Message
	begun      bool // nextMessage has returned the first
	left       int  // messages that nextMessage has yet to return
}

var errNotify = fault(StatusInvalidFrame, "malformed NOTIFY")

// decode makes b, if it is well-formed, the payload of n. Messages and Values
// are views of it.
func (n *notify) decode(b []byte) error {
	n.payload, n.begun, n.left = b, false, 0
	for len(b) > 0 {
		name, count, args, ok := cutMessage(b)
		if !ok {
			return errNotify
		}
		if n.left == 0 {
			n.setCurrent(name, count, args)
		}
		if b, ok = skipArgs(args, count); !ok {
			return errNotify
		}
		n.left++
	}
	return nil
}

// nextMessage makes n.current the next message. It reports whether there was
// one.
func (n *notify) nextMessage() bool {
	if n.left == 0 {
		return false
	}
	n.left--
	if n.begun {
		b, _ := skipArgs(n.current.args, n.current.count)
		name, count, args, _ := cutMessage(b)
		n.setCurrent(name, count, args)
	}
	n.begun = true
	return true
}

func (n *notify) setCurrent(name []byte, count int, args []byte) {
	m := &n.current
	if m.name != string(name) || m.from != n {
		m.name, m.from = interned.Intern(name), n
	}
	m.count, m.args = count, args
}

// names iterates over the names of all messages. Another goroutine may call
// nextMessage meanwhile.
func (n *notify) names() iter.Seq[string] {
	return func(yield func(string) bool) {
		for b := n.payload; len(b) > 0; {
			name, count, rest, ok := cutMessage(b)
			if !ok || !yield(interned.Intern(name)) {
				return
			}
			b, _ = skipArgs(rest, count)
		}
	}
}

// release drops the views of the payload, so that its memory can be freed.
func (n *notify) release() {
	n.payload, n.left = nil, 0
	n.current.count, n.current.args = 0, nil
}

// cutMessage takes the name of a message and the number of its arguments from
// the beginning of b; args begins with the arguments.
func cutMessage(b []byte) (name []byte, count int, args []byte, ok bool) {
	name, args, ok = cutString(b)
	if !ok || len(args) == 0 {
		return nil, 0, nil, false
	}
	return name, int(args[0]), args[1:], true
}

// skipArgs returns b without the n arguments at its beginning. It reports
// whether they are well-formed.
func skipArgs(b []byte, n int) (rest []byte, ok bool) {
	for range n {
		size := shortArg(b)
		if size > 0 {
			b = b[size:]
			continue
		}
		var v Value
		if _, b, ok = cutKV(b, &v); !ok {
			return nil, false
		}
	}
	return b, true
}

// shortArg returns the size of the argument at the beginning of b if its name and
// its value are short, as nearly all are; otherwise, or if it is malformed, 0.
func shortArg(b []byte) int {
	if len(b) < 2 || b[0] >= 240 {
		return 0
	}
	at := 1 + int(b[0]) // of the type
	if at >= len(b) {
		return 0
	}
	size := at + 1
	switch Kind(b[at] & 0x0f) {
	case KindNull, KindBool:
	case KindInt32, KindUint32, KindInt64, KindUint64:
		if size == len(b) || b[size] >= 240 {
			return 0
		}
		size++
	case KindIPv4:
		size += 4
	case KindIPv6:
		size += 16
	case KindString, KindBinary:
		if size == len(b) || b[size] >= 240 {
			return 0
		}
		size += 1 + int(b[size])
	default:
		return 0
	}
	if size > len(b) {
		return 0
	}
	return size
}

// Decode fills the struct that dst points to from the arguments. Fields are
// tagged `spoe:"name"`, or `spoe:"#0"` for the argument at a position. They may
// be of any integer type (the range is checked), bool, string, []byte, types
// derived from these, netip.Addr, Value, or a pointer to one of the types before
// Value.
//
// Strings and byte slices are copied. A Value is a view, see there.
//
// An argument must be there, and must not be NULL, which is how HAProxy sends
// what a request does not have. To tell NULL from an empty string use a Value,
// which takes NULL as it takes any other kind, or a pointer, which is nil then.
// With `,optional` an argument may also be absent: a Value is NULL and a pointer
// is nil then; any other field is left as it is if the argument is absent or
// NULL.
//
// A netip.Addr with `,parse` also takes a string that is an address, such as
// that of a header field.
//
// Errors name the message, the argument, what was wanted and what came.
func (m *Message) Decode(dst any) error {
	p := reflect.ValueOf(dst)
	if p.Kind() != reflect.Pointer || p.IsNil() || p.Elem().Kind() != reflect.Struct {
		return fmt.Errorf("spoa: message %s: cannot decode into %v: want a pointer to a struct", m.name, reflect.TypeOf(dst))
	}
	plan := plans.Of(p.Type().Elem())
	if plan.Err != nil {
		return plan.Err
	}
	var few [32]bool
	seen := few[:]
	if len(plan.Fields) > len(few) {
		seen = make([]bool, len(plan.Fields))
	}
	base := p.UnsafePointer()
	if err := m.fill(plan, base, seen); err != nil {
		return err
	}
	for i := range plan.Fields {
		if f := &plan.Fields[i]; !seen[i] {
			if !f.Optional {
				return fmt.Errorf("spoa: message %s: argument %s: want %v, have nothing", m.name, f.Name, f.Elem)
			}
			clearField(f, base)
		}
	}
	return nil
}

var plans = fields.NewPlans(reflect.TypeFor[Value]())

// fill stores the arguments in the fields of the struct at base, and marks the
// fields that have one as seen. It reads each argument once. Arguments that
// come in the order of the fields need no search.
func (m *Message) fill(p *fields.Plan, base unsafe.Pointer, seen []bool) error {
	b := m.args
	named, at := 0, p.Named // the next field by name, the next by position
	for i := range m.count {
		var v Value
		name, rest, ok := cutKV(b, &v)
		if !ok {
			break
		}
		b = rest
		for ; at < len(p.Fields) && p.Fields[at].Pos == i; at++ {
			seen[at] = true
			if err := m.set(&p.Fields[at], base, v); err != nil {
				return err
			}
		}
		j := named
		if j >= p.Named || p.Fields[j].Name != string(name) {
			if j, ok = p.ByName[string(name)]; !ok {
				continue
			}
		}
		if seen[j] {
			continue // the first of a name counts
		}
		for ; j < p.Named && p.Fields[j].Name == string(name); j++ {
			seen[j] = true
			if err := m.set(&p.Fields[j], base, v); err != nil {
				return err
			}
		}
		named = j
	}
	return nil
}

// set stores v in the field of the struct at base.
func (m *Message) set(f *fields.Field, base unsafe.Pointer, v Value) error {
	if v.kind == KindNull && f.Kind != fields.KindValue {
		if f.Optional || f.Pointer {
			clearField(f, base)
			return nil
		}
		return fmt.Errorf("spoa: message %s: argument %s: want %v, have null", m.name, f.Name, f.Elem)
	}
	p := unsafe.Add(base, f.Offset)
	ok := false
	if f.Pointer {
		elem := reflect.New(f.Elem).UnsafePointer()
		if ok = setElem(f, elem, v); ok {
			*(*unsafe.Pointer)(p) = elem
		}
	} else {
		ok = setElem(f, p, v)
	}
	if !ok {
		return fmt.Errorf("spoa: message %s: argument %s: want %v, have %v %.40v", m.name, f.Name, f.Elem, v.kind, v)
	}
	return nil
}

// clearField empties a field that can say that there is nothing.
func clearField(f *fields.Field, base unsafe.Pointer) {
	switch p := unsafe.Add(base, f.Offset); {
	case f.Pointer:
		*(*unsafe.Pointer)(p) = nil
	case f.Kind == fields.KindValue:
		*(*Value)(p) = Value{}
	}
}

// setElem stores v at p and reports whether it fits. The type of what p points to
// is of the kind f.Kind.
func setElem(f *fields.Field, p unsafe.Pointer, v Value) (ok bool) {
	switch f.Kind {
	case fields.KindBool:
		var b bool
		if b, ok = v.Bool(); ok {
			*(*bool)(p) = b
		}
	case fields.KindInt8:
		ok = setInt[int8](p, v)
	case fields.KindInt16:
		ok = setInt[int16](p, v)
	case fields.KindInt32:
		ok = setInt[int32](p, v)
	case fields.KindInt64:
		ok = setInt[int64](p, v)
	case fields.KindUint8:
		ok = setUint[uint8](p, v)
	case fields.KindUint16:
		ok = setUint[uint16](p, v)
	case fields.KindUint32:
		ok = setUint[uint32](p, v)
	case fields.KindUint64:
		ok = setUint[uint64](p, v)
	case fields.KindString:
		if ok = v.isText(); ok {
			*(*string)(p) = strings.Clone(v.s)
		}
	case fields.KindBytes:
		if ok = v.isText(); ok {
			*(*[]byte)(p) = []byte(v.s)
		}
	case fields.KindAddr:
		if f.Parse && v.isText() {
			v = parseAddr(v.s)
		}
		var a netip.Addr
		if a, ok = v.Addr(); ok {
			*(*netip.Addr)(p) = a
		}
	case fields.KindValue:
		*(*Value)(p), ok = v, true
	}
	return ok
}

func setInt[T int8 | int16 | int32 | int64](p unsafe.Pointer, v Value) bool {
	i, ok := v.Int()
	if ok = ok && int64(T(i)) == i; ok {
		*(*T)(p) = T(i)
	}
	return ok
}

func setUint[T uint8 | uint16 | uint32 | uint64](p unsafe.Pointer, v Value) bool {
	u, ok := v.Uint()
	if ok = ok && uint64(T(u)) == u; ok {
		*(*T)(p) = T(u)
	}
	return ok
}

// parseAddr returns the address that s is, or NULL. Zones mean nothing to others.
func parseAddr(s string) Value {
	if strings.Contains(s, "%") {
		return Value{}
	}
	a, _ := netip.ParseAddr(strings.TrimSpace(s))
	return Addr(a)
}
