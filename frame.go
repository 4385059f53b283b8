package spoa

import (
	"encoding/binary"
	"fmt"
	"iter"
	"math"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"unsafe"
)

// Frame types (SPOE.txt 3.2).
const (
	frameUnset             = 0
	frameHAProxyHello      = 1
	frameHAProxyDisconnect = 2
	frameNotify            = 3
	frameAgentHello        = 101
	frameAgentDisconnect   = 102
	frameAck               = 103
)

// Frame flags (SPOE.txt 3.2).
const (
	flagFIN   = 1
	flagAbort = 2
)

// Frame sizes are what a frame's length field says: without the field itself.
const (
	lengthSize       = 4     // the length field
	minFrameLen      = 7     // type, flags and two ids of one byte
	minFrameSize     = 256   // least that may be negotiated
	helloFrameSize   = 16384 // limit until a size has been negotiated
	defaultFrameSize = 64<<10 - 1
	maxFrameSize     = 1 << 28 // HAProxy's own limit of buffers
	maxHeaderLen     = 1 + 4 + 2*maxVarintLen
	maxVarintLen     = 10
)

const version = "2.0"

// Status is a SPOP status code: why a connection was closed (SPOE.txt 3.2.9).
type Status uint32

// The status codes that SPOP knows.
const (
	StatusNormal          Status = 0
	StatusIO              Status = 1
	StatusTimeout         Status = 2
	StatusFrameTooBig     Status = 3
	StatusInvalidFrame    Status = 4
	StatusNoVersion       Status = 5
	StatusNoFrameSize     Status = 6
	StatusNoCapabilities  Status = 7
	StatusBadVersion      Status = 8
	StatusBadFrameSize    Status = 9
	StatusNoFragmentation Status = 10
	StatusInterlaced      Status = 11
	StatusFrameIDNotFound Status = 12
	StatusNoResources     Status = 13
	StatusUnknown         Status = 99
)

// statusText holds the specification's words for a status and, where there is
// one, what a person can do about it.
var statusText = map[Status]struct{ name, hint string }{
	StatusNormal:          {"normal", ""},
	StatusIO:              {"I/O error", ""},
	StatusTimeout:         {"a timeout occurred", "answer sooner, or raise HAProxy's timeouts"},
	StatusFrameTooBig:     {"frame is too big", "raise max-frame-size or enable fragmentation"},
	StatusInvalidFrame:    {"invalid frame received", "is the peer really speaking SPOP?"},
	StatusNoVersion:       {"version value not found", ""},
	StatusNoFrameSize:     {"max-frame-size value not found", ""},
	StatusNoCapabilities:  {"capabilities value not found", ""},
	StatusBadVersion:      {"unsupported version", "version " + version + " is needed"},
	StatusBadFrameSize:    {"max-frame-size too big or too small", "at least 256, and no more than the peer's"},
	StatusNoFragmentation: {"fragmentation not supported", "enable fragmentation, or raise max-frame-size"},
	StatusInterlaced:      {"invalid interlaced frames", ""},
	StatusFrameIDNotFound: {"frame-id not found", ""},
	StatusNoResources:     {"resource allocation error", ""},
	StatusUnknown:         {"unknown error", ""},
}

// String returns the specification's words for s.
func (s Status) String() string {
	if t, ok := statusText[s]; ok {
		return t.name
	}
	return "status " + strconv.FormatUint(uint64(s), 10)
}

// DisconnectError says why a connection ended. With Remote the peer said so in
// a DISCONNECT frame; without, this side found the fault and told the peer.
type DisconnectError struct {
	Status  Status
	Message string // what the peer or the decoder said beyond the status
	Remote  bool
}

func (e *DisconnectError) Error() string {
	var b strings.Builder
	if e.Remote {
		b.WriteString("peer closed: ")
	}
	fmt.Fprintf(&b, "%v (%d)", e.Status, uint32(e.Status))
	if e.Message != "" && e.Message != e.Status.String() {
		b.WriteString(": " + e.Message)
	}
	if hint := statusText[e.Status].hint; hint != "" {
		b.WriteString("; " + hint)
	}
	return b.String()
}

func fault(s Status, format string, args ...any) *DisconnectError {
	return &DisconnectError{Status: s, Message: fmt.Sprintf(format, args...)}
}

// appendVarint appends v in the encoding of HAProxy's peers protocol
// (SPOE.txt 3.1).
func appendVarint(b []byte, v uint64) []byte {
	if v < 240 {
		return append(b, byte(v))
	}
	b = append(b, byte(v)|0xf0)
	v = (v - 240) >> 4
	for v >= 128 {
		b = append(b, byte(v)|0x80)
		v = (v - 128) >> 7
	}
	return append(b, byte(v))
}

// varint decodes a varint at the beginning of b and says how many bytes it
// takes: 0 if it is cut short, longer than 10 bytes, or beyond 64 bits.
func varint(b []byte) (v uint64, n int) {
	if len(b) > 0 && b[0] < 240 {
		return uint64(b[0]), 1
	}
	return longVarint(b)
}

func longVarint(b []byte) (v uint64, n int) {
	if len(b) == 0 {
		return 0, 0
	}
	v = uint64(b[0])
	shift := 4
	for i, c := range b[1:min(len(b), maxVarintLen)] {
		x := uint64(c) << shift
		if i == maxVarintLen-2 && (c >= 1<<4 || v+x < v) {
			return 0, 0
		}
		v += x
		if c < 128 {
			return v, i + 2
		}
		shift += 7
	}
	return 0, 0
}

func appendString(b []byte, s string) []byte {
	return append(appendVarint(b, uint64(len(s))), s...)
}

// cutString takes a length and that many bytes from the beginning of b.
func cutString(b []byte) (s, rest []byte, ok bool) {
	if len(b) > 0 && b[0] < 240 && int(b[0]) < len(b) { // nearly all
		end := 1 + int(b[0])
		return b[1:end:end], b[end:], true
	}
	size, n := varint(b)
	if n == 0 || size > uint64(len(b)-n) {
		return nil, nil, false
	}
	end := n + int(size)
	return b[n:end:end], b[end:], true
}

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

// Bytes returns the bytes of a STRING or BINARY, nil for other kinds. It is a
// view: it must not be written to, and those of a Message are gone when the
// handler returns.
func (v Value) Bytes() []byte {
	if v.kind != KindString && v.kind != KindBinary {
		return nil
	}
	return unsafe.Slice(unsafe.StringData(v.s), len(v.s))
}

// String returns v in readable form, of any kind. It is a copy.
func (v Value) String() string {
	switch v.kind {
	case KindNull:
		return "null"
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

// Clone returns a Value that stays valid after the handler has returned.
func (v Value) Clone() Value {
	v.s = strings.Clone(v.s)
	return v
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

// frame is a frame without its length; ids and payload are views.
type frame struct {
	kind       byte
	flags      uint32
	stream, id uint64
	ids        []byte // these two, as they came
	payload    []byte
}

func (f *frame) fin() bool   { return f.flags&flagFIN != 0 }
func (f *frame) abort() bool { return f.flags&flagAbort != 0 }

// parse decodes the metadata of a frame (SPOE.txt 3.2).
func (f *frame) parse(b []byte) bool {
	if len(b) < minFrameLen {
		return false
	}
	f.kind = b[0]
	f.flags = binary.BigEndian.Uint32(b[1:])
	b = b[5:]
	var n, m int
	f.stream, n = varint(b)
	if n == 0 {
		return false
	}
	f.id, m = varint(b[n:])
	f.ids, f.payload = b[:n+m], b[n+m:]
	return m > 0
}

// beginFrame appends the beginning of a frame; finishFrame, told where that
// was, fills in the length.
func beginFrame(b []byte, kind byte, flags uint32, stream, id uint64) []byte {
	b = append(b, 0, 0, 0, 0, kind)
	b = binary.BigEndian.AppendUint32(b, flags)
	return appendVarint(appendVarint(b, stream), id)
}

func finishFrame(b []byte, start int) []byte {
	binary.BigEndian.PutUint32(b[start:], uint32(len(b)-start-lengthSize))
	return b
}

// appendAck appends the ACK of a NOTIFY, whose ids go back as they came.
func appendAck(b []byte, flags uint32, ids, actions []byte) []byte {
	const header = lengthSize + 1 + 4
	start, size := len(b), header+len(ids)+len(actions)
	b = slices.Grow(b, size)[:start+size]
	f := b[start:]
	binary.BigEndian.PutUint32(f, uint32(size-lengthSize))
	f[lengthSize] = frameAck
	binary.BigEndian.PutUint32(f[lengthSize+1:], flags)
	copy(f[header:], ids)
	copy(f[header+len(ids):], actions)
	return b
}

// hello is what a HELLO of either side says (SPOE.txt 3.2.4, 3.2.5).
type hello struct {
	versions     string // HAProxy: a list; agent: the one chosen
	frameSize    uint32
	capabilities string // comma list
	engineID     string
	healthcheck  bool
}

// can tells whether the comma list of capabilities holds name.
func (h *hello) can(name string) bool {
	for c := range strings.SplitSeq(h.capabilities, ",") {
		if strings.TrimSpace(c) == name {
			return true
		}
	}
	return false
}

func appendKV(b []byte, name string, v Value) []byte {
	return appendValue(appendString(b, name), v)
}

// cutKV takes a name and its value from the beginning of b.
func cutKV(b []byte, v *Value) (name, rest []byte, ok bool) {
	if name, rest, ok = cutString(b); ok {
		rest, ok = cutValue(rest, v)
	}
	return name, rest, ok
}

// appendHello appends the HELLO of either side.
func appendHello(b []byte, kind byte, h *hello) []byte {
	start := len(b)
	b = beginFrame(b, kind, flagFIN, 0, 0)
	key := "version"
	if kind == frameHAProxyHello {
		key = "supported-versions"
	}
	b = appendKV(b, key, String(h.versions))
	b = appendKV(b, "max-frame-size", Uint32(h.frameSize))
	b = appendKV(b, "capabilities", String(h.capabilities))
	if h.engineID != "" {
		b = appendKV(b, "engine-id", String(h.engineID))
	}
	if h.healthcheck {
		b = appendKV(b, "healthcheck", Bool(true))
	}
	return finishFrame(b, start)
}

// parse decodes the payload of a HELLO of either side. Keys it does not know
// are skipped, whatever their type.
func (h *hello) parse(kind byte, payload []byte) error {
	var versions, size, caps bool
	for b := payload; len(b) > 0; {
		var v Value
		name, rest, ok := cutKV(b, &v)
		b = rest
		if !ok {
			return fault(StatusInvalidFrame, "malformed HELLO")
		}
		good := true
		switch string(name) {
		case "supported-versions", "version":
			if (string(name) == "version") == (kind == frameAgentHello) {
				h.versions, versions, good = v.String(), true, v.kind == KindString
			}
		case "max-frame-size":
			var u uint64
			u, good = v.Uint()
			h.frameSize, size = uint32(min(u, math.MaxUint32)), true
		case "capabilities":
			h.capabilities, caps, good = v.String(), true, v.kind == KindString
		case "engine-id":
			h.engineID, good = v.String(), v.kind == KindString
		case "healthcheck":
			h.healthcheck, good = v.Bool()
		}
		if !good {
			return fault(StatusInvalidFrame, "%s in HELLO is of type %v", name, v.kind)
		}
	}
	switch {
	case !versions:
		return fault(StatusNoVersion, "")
	case !size:
		return fault(StatusNoFrameSize, "")
	case !caps:
		return fault(StatusNoCapabilities, "")
	case !speaksVersion2(h.versions):
		return fault(StatusBadVersion, "peer has %.40q", h.versions)
	case h.frameSize < minFrameSize:
		return fault(StatusBadFrameSize, "%d", h.frameSize)
	}
	return nil
}

// speaksVersion2 tells whether a list of versions holds 2.0: whoever speaks 2.x
// speaks all before it back to 2.0.
func speaksVersion2(list string) bool {
	for v := range strings.SplitSeq(list, ",") {
		if minor, ok := strings.CutPrefix(strings.TrimSpace(v), "2."); ok {
			if _, err := strconv.ParseUint(minor, 10, 32); err == nil {
				return true
			}
		}
	}
	return false
}

// appendDisconnect appends the DISCONNECT of either side (SPOE.txt 3.2.8).
func appendDisconnect(b []byte, kind byte, s Status, message string) []byte {
	start := len(b)
	b = beginFrame(b, kind, flagFIN, 0, 0)
	b = appendKV(b, "status-code", Uint32(uint32(s)))
	b = appendKV(b, "message", String(message))
	return finishFrame(b, start)
}

// parseDisconnect decodes the payload of a peer's DISCONNECT.
func parseDisconnect(payload []byte) *DisconnectError {
	e := &DisconnectError{Status: StatusUnknown, Remote: true}
	for b := payload; len(b) > 0; {
		var v Value
		name, rest, ok := cutKV(b, &v)
		b = rest
		if !ok {
			break
		}
		switch string(name) {
		case "status-code":
			if u, ok := v.Uint(); ok && u <= math.MaxUint32 {
				e.Status = Status(u)
			}
		case "message":
			e.Message = v.String()
		}
	}
	return e
}

// names keeps one copy of each name seen, so that names can be handed out as
// strings that last and yet cost no allocation. It is bounded: a peer can fill
// it, and then it starts anew.
type names map[string]string

const (
	maxNames   = 256
	maxNameLen = 64
)

func (t *names) intern(b []byte) string {
	if s, ok := (*t)[string(b)]; ok {
		return s
	}
	s := string(b)
	if len(b) > maxNameLen {
		return s
	}
	if *t == nil || len(*t) == maxNames {
		*t = make(names)
	}
	(*t)[s] = s
	return s
}

// Arg is an argument of a Message.
type Arg struct {
	Name  string // empty for the unnamed, as `args src` sends it
	Value Value
}

// Message is one message of a NOTIFY (SPOE.txt 3.2.6). It is valid until the
// handler returns, and may be read by several goroutines until then. Names may
// be kept; Values are views, see there.
type Message struct {
	name string
	args []Arg
	from *notify
}

// NewMessage returns a Message as a handler would get it, for tests and for
// Client. It copies the arguments. It panics if there are more than 255, which
// no frame can hold.
func NewMessage(name string, args ...Arg) *Message {
	m := Message{name: name, args: args}
	n := new(notify)
	if len(args) > math.MaxUint8 || n.decode(appendMessage(nil, &m), new(names)) != nil {
		panic("spoa: NewMessage: " + strconv.Itoa(len(args)) + " arguments")
	}
	return &n.msgs[0]
}

// Name returns the message's name.
func (m *Message) Name() string { return m.name }

// StreamID returns the STREAM-ID of the NOTIFY: HAProxy's stream, counted per
// process up to HAProxy 3.0 and per connection from 3.1 on.
func (m *Message) StreamID() uint64 { return m.from.stream }

// FrameID returns the FRAME-ID of the NOTIFY.
func (m *Message) FrameID() uint64 { return m.from.id }

// EngineID returns the engine-id of the connection's HELLO, empty if it had
// none.
func (m *Message) EngineID() string { return m.from.engine }

// Len returns the number of arguments.
func (m *Message) Len() int { return len(m.args) }

// Arg returns the argument at position i, from 0 to Len()-1; elsewhere the zero
// Arg.
func (m *Message) Arg(i int) Arg {
	if i < 0 || i >= len(m.args) {
		return Arg{}
	}
	return m.args[i]
}

// Lookup returns the first argument of that name.
func (m *Message) Lookup(name string) (Value, bool) {
	for i := range m.args {
		if m.args[i].Name == name {
			return m.args[i].Value, true
		}
	}
	return Value{}, false
}

// Args iterates over the arguments in their order.
func (m *Message) Args() iter.Seq2[string, Value] {
	return func(yield func(string, Value) bool) {
		for i := range m.args {
			if !yield(m.args[i].Name, m.args[i].Value) {
				return
			}
		}
	}
}

func appendMessage(b []byte, m *Message) []byte {
	b = append(appendString(b, m.name), byte(len(m.args)))
	for i := range m.args {
		b = appendKV(b, m.args[i].Name, m.args[i].Value)
	}
	return b
}

// notify is a decoded NOTIFY. It is used again and again: what a slot held last
// time is the first guess at the names that it will hold.
type notify struct {
	stream, id uint64
	engine     string
	msgs       []Message
	args       []Arg // of all messages
}

var errNotify = fault(StatusInvalidFrame, "malformed NOTIFY")

// decode decodes the payload of a NOTIFY, whole or not at all. Values are views
// of b.
func (n *notify) decode(b []byte, t *names) error {
	n.msgs, n.args = n.msgs[:0], n.args[:0]
	for len(b) > 0 {
		name, rest, ok := cutString(b)
		if !ok || len(rest) == 0 {
			return errNotify
		}
		count := int(rest[0])
		b = rest[1:]
		if len(b) < 2*count { // an argument has at least a name's length and a type
			return errNotify
		}
		n.args = longer(n.args, count)
		args := n.args[len(n.args)-count : len(n.args) : len(n.args)]
		for i := range args {
			a := &args[i]
			name, rest, ok := cutString(b)
			if !ok {
				return errNotify
			}
			if a.Name != string(name) {
				a.Name = t.intern(name)
			}
			if b, ok = cutValue(rest, &a.Value); !ok {
				return errNotify
			}
		}
		n.msgs = longer(n.msgs, 1)
		m := &n.msgs[len(n.msgs)-1]
		if m.name != string(name) {
			m.name = t.intern(name)
		}
		m.args, m.from = args, n
	}
	return nil
}

// longer lengthens s by n elements, which are what they were the last time s was
// that long.
func longer[T any](s []T, n int) []T {
	return slices.Grow(s, n)[:len(s)+n]
}

const keptArgs = 256 // slots of a notify that are kept for the next

// release lets go of the memory that the views point to.
func (n *notify) release() {
	if cap(n.args) > keptArgs {
		n.msgs, n.args = nil, nil
	}
	for i := range n.msgs {
		n.msgs[i].args = nil // may be of an array that n.args has outgrown
	}
	for i := range n.args {
		n.args[i].Value = Value{}
	}
}

// Decode fills the struct that dst points to from the arguments. Fields are
// tagged `spoe:"name"`, or `spoe:"#0"` for the argument at a position, and
// `,optional` if the argument may be absent or NULL, which leaves the field as
// it is. Fields may be of any integer type (the range is checked), bool,
// string, []byte (also types derived from these), or netip.Addr. Strings and
// byte slices are copied. Errors name the message, the argument, what was wanted and what
// came.
func (m *Message) Decode(dst any) error {
	p := reflect.ValueOf(dst)
	if p.Kind() != reflect.Pointer || p.IsNil() || p.Elem().Kind() != reflect.Struct {
		return fmt.Errorf("spoa: message %s: cannot decode into %v: want a pointer to a struct", m.name, reflect.TypeOf(dst))
	}
	s := p.Elem()
	plan := decodePlanOf(s.Type())
	if plan.err != nil {
		return plan.err
	}
	for i := range plan.fields {
		f := &plan.fields[i]
		v, ok := m.Arg(f.pos).Value, f.pos < len(m.args)
		if f.pos < 0 {
			v, ok = m.Lookup(f.name)
		}
		if !ok || v.kind == KindNull {
			if f.optional {
				continue
			}
			have := "nothing"
			if ok {
				have = "null"
			}
			return fmt.Errorf("spoa: message %s: argument %s: want %v, have %s", m.name, f.name, f.typ, have)
		}
		if !setField(s.Field(f.index), v) {
			return fmt.Errorf("spoa: message %s: argument %s: want %v, have %v %.40v", m.name, f.name, f.typ, v.kind, v)
		}
	}
	return nil
}

type decodeField struct {
	index    int
	name     string
	pos      int // -1: by name
	optional bool
	typ      reflect.Type
}

type decodePlan struct {
	fields []decodeField
	err    error
}

var (
	decodePlans sync.Map // of *decodePlan by reflect.Type
	addrType    = reflect.TypeFor[netip.Addr]()
)

func decodePlanOf(t reflect.Type) *decodePlan {
	if p, ok := decodePlans.Load(t); ok {
		return p.(*decodePlan)
	}
	p, _ := decodePlans.LoadOrStore(t, newDecodePlan(t))
	return p.(*decodePlan)
}

func newDecodePlan(t reflect.Type) *decodePlan {
	p := new(decodePlan)
	for i := range t.NumField() {
		sf := t.Field(i)
		tag, ok := sf.Tag.Lookup("spoe")
		if !ok {
			continue
		}
		name, option, _ := strings.Cut(tag, ",")
		f := decodeField{index: i, name: name, pos: -1, optional: option == "optional", typ: sf.Type}
		if digits, ok := strings.CutPrefix(name, "#"); ok {
			pos, err := strconv.ParseUint(digits, 10, 8)
			if err != nil {
				return &decodePlan{err: fmt.Errorf("spoa: %v.%s: tag %q: want a position from #0 to #255", t, sf.Name, tag)}
			}
			f.pos = int(pos)
		}
		switch {
		case option != "" && option != "optional":
			return &decodePlan{err: fmt.Errorf("spoa: %v.%s: tag %q: unknown option %s", t, sf.Name, tag, option)}
		case !sf.IsExported():
			return &decodePlan{err: fmt.Errorf("spoa: %v.%s has a tag but is not exported", t, sf.Name)}
		case !decodable(sf.Type):
			return &decodePlan{err: fmt.Errorf("spoa: %v.%s: cannot decode into %v", t, sf.Name, sf.Type)}
		}
		p.fields = append(p.fields, f)
	}
	return p
}

func decodable(t reflect.Type) bool {
	switch k := t.Kind(); k {
	case reflect.Bool, reflect.String:
		return true
	case reflect.Slice:
		return t.Elem().Kind() == reflect.Uint8
	default:
		return k >= reflect.Int && k <= reflect.Uintptr || t == addrType
	}
}

// setField stores v, which is not NULL, into a field that is decodable.
func setField(f reflect.Value, v Value) bool {
	switch k := f.Kind(); {
	case k == reflect.Bool:
		b, ok := v.Bool()
		if ok {
			f.SetBool(b)
		}
		return ok
	case k >= reflect.Int && k <= reflect.Int64:
		i, ok := v.Int()
		if ok = ok && !f.OverflowInt(i); ok {
			f.SetInt(i)
		}
		return ok
	case k >= reflect.Uint && k <= reflect.Uintptr:
		u, ok := v.Uint()
		if ok = ok && !f.OverflowUint(u); ok {
			f.SetUint(u)
		}
		return ok
	case f.Type() == addrType:
		a, ok := v.Addr()
		if ok {
			*(*netip.Addr)(f.Addr().UnsafePointer()) = a
		}
		return ok
	case v.kind != KindString && v.kind != KindBinary:
		return false
	case k == reflect.String:
		f.SetString(strings.Clone(v.s))
	default:
		f.SetBytes([]byte(v.s))
	}
	return true
}

// Scope is the scope of a variable (SPOE.txt 3.1, 3.4).
type Scope uint8

// The scopes. HAProxy lets an agent change proc variables but not create them.
const (
	ScopeProc Scope = iota
	ScopeSess
	ScopeTxn
	ScopeReq
	ScopeRes
)

var scopeNames = [...]string{"proc", "sess", "txn", "req", "res"}

func (s Scope) String() string {
	if int(s) < len(scopeNames) {
		return scopeNames[s]
	}
	return "scope " + strconv.Itoa(int(s))
}

// Action is one action of an ACK (SPOE.txt 3.4): a variable is set, or unset.
type Action struct {
	Scope Scope
	Name  string
	Value Value // NULL if Unset
	Unset bool
}

// String returns the action in readable form, such as "set-var sess.ip_score
// uint32 42".
func (a Action) String() string {
	if a.Unset {
		return fmt.Sprintf("unset-var %v.%s", a.Scope, a.Name)
	}
	return fmt.Sprintf("set-var %v.%s %v %v", a.Scope, a.Name, a.Value.kind, a.Value)
}

const (
	actionSetVar   = 1
	actionUnsetVar = 2
)

// Actions collects the actions of one ACK. The zero value is ready, without a
// limit of size; a handler gets one that knows how much the negotiated frame
// size leaves. It must not be used after the handler has returned, nor by
// several goroutines at once.
type Actions struct {
	buf []byte
	max int // of len(buf); 0: no limit
	err error
}

// SetVar sets a variable. HAProxy puts its scope and the agent's var-prefix in
// front of the name, and silently ignores a variable whose full name
// ("sess.iprep.ip_score") is longer than 63 bytes, or that no rule of its
// configuration mentions and nothing registers.
func (a *Actions) SetVar(s Scope, name string, v Value) {
	if b, ok := a.begin(actionSetVar, 3, s, name, len(v.s)); ok {
		a.end(appendValue(b, v), name)
	}
}

// UnsetVar unsets a variable.
func (a *Actions) UnsetVar(s Scope, name string) {
	if b, ok := a.begin(actionUnsetVar, 2, s, name, 0); ok {
		a.end(b, name)
	}
}

// begin returns the actions with the beginning of another one.
func (a *Actions) begin(action, nargs byte, s Scope, name string, size int) (b []byte, ok bool) {
	switch {
	case name == "" || len(name) > math.MaxUint8:
		a.fail(fmt.Errorf("spoa: variable name of %d bytes: want 1 to 255", len(name)))
	case int(s) >= len(scopeNames):
		a.fail(fmt.Errorf("spoa: variable %s: no such scope: %d", name, s))
	case a.max > 0 && len(a.buf)+len(name)+size > a.max: // before it is copied
		a.fail(a.tooBig(name))
	default:
		return appendString(append(a.buf, action, nargs, byte(s)), name), true
	}
	return nil, false
}

// end takes b for the actions, if it fits.
func (a *Actions) end(b []byte, name string) {
	if a.max > 0 && len(b) > a.max {
		a.fail(a.tooBig(name))
		return
	}
	a.buf = b
}

func (a *Actions) tooBig(name string) error {
	return fmt.Errorf("spoa: variable %s: the actions exceed the %d bytes that the frame size leaves", name, a.max)
}

func (a *Actions) fail(err error) {
	if a.err == nil {
		a.err = err
	}
}

// Err returns why the first action that was refused was refused: a bad name or
// scope, or too big for the negotiated frame size. Such an action is left out
// whole, those before and after it stand. It counts as the handler's error
// where the handler returns none; a handler that returns it has none of its
// actions sent.
func (a *Actions) Err() error { return a.err }

// All iterates over the actions in their order. Values are views.
func (a *Actions) All() iter.Seq[Action] {
	return func(yield func(Action) bool) {
		for b := a.buf; len(b) > 0; {
			act, rest, ok := cutAction(b)
			if !ok || !yield(act) {
				return
			}
			b = rest
		}
	}
}

// Lookup returns what a variable is set to by the last action on it.
func (a *Actions) Lookup(s Scope, name string) (v Value, ok bool) {
	for act := range a.All() {
		if act.Scope == s && act.Name == name {
			v, ok = act.Value, !act.Unset
		}
	}
	return v, ok
}

// cutAction takes an action from the beginning of b. Its Value is a view of b.
func cutAction(b []byte) (a Action, rest []byte, ok bool) {
	if len(b) < 3 || int(b[2]) >= len(scopeNames) {
		return a, nil, false
	}
	action, nargs := b[0], b[1]
	a.Scope = Scope(b[2])
	name, rest, ok := cutString(b[3:])
	if !ok || len(name) == 0 {
		return a, nil, false
	}
	a.Name = string(name)
	switch {
	case action == actionSetVar && nargs == 3:
		rest, ok = cutValue(rest, &a.Value)
		return a, rest, ok
	case action == actionUnsetVar && nargs == 2:
		a.Unset = true
		return a, rest, true
	}
	return a, nil, false
}

var frameNames = map[byte]string{
	frameUnset:             "UNSET",
	frameHAProxyHello:      "HAPROXY-HELLO",
	frameHAProxyDisconnect: "HAPROXY-DISCONNECT",
	frameNotify:            "NOTIFY",
	frameAgentHello:        "AGENT-HELLO",
	frameAgentDisconnect:   "AGENT-DISCONNECT",
	frameAck:               "ACK",
}

// describe returns a frame, with its length, in readable form.
func describe(b []byte) string {
	var f frame
	if len(b) < lengthSize || !f.parse(b[lengthSize:]) {
		return fmt.Sprintf("malformed: %x", b)
	}
	var s strings.Builder
	name, ok := frameNames[f.kind]
	if !ok {
		name = "type " + strconv.Itoa(int(f.kind))
	}
	s.WriteString(name)
	if f.abort() {
		s.WriteString(" ABORT")
	}
	if !f.fin() {
		s.WriteString(" unfinished")
	}
	fmt.Fprintf(&s, " %d:%d", f.stream, f.id)
	switch {
	case f.kind == frameNotify && f.fin():
		var n notify
		if n.decode(f.payload, new(names)) != nil {
			return s.String() + " malformed"
		}
		for i := range n.msgs {
			fmt.Fprintf(&s, " %s(", n.msgs[i].name)
			for i, a := range n.msgs[i].args {
				if i > 0 {
					s.WriteString(", ")
				}
				fmt.Fprintf(&s, "%s=%v %q", a.Name, a.Value.kind, a.Value.String())
			}
			s.WriteString(")")
		}
	case f.kind == frameAck:
		a := Actions{buf: f.payload}
		for act := range a.All() {
			fmt.Fprintf(&s, " %v", act)
		}
	case f.kind == frameUnset || f.kind == frameNotify:
		fmt.Fprintf(&s, " %d bytes", len(f.payload))
	default:
		for b := f.payload; len(b) > 0; {
			var v Value
			key, rest, ok := cutKV(b, &v)
			b = rest
			if !ok {
				return s.String() + " malformed"
			}
			fmt.Fprintf(&s, " %s=%q", key, v.String())
		}
	}
	return s.String()
}
