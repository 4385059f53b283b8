package spoa

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"iter"
	"math"
	"math/bits"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
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

// The status codes that SPOP knows, and when an Agent sends each.
const (
	StatusNormal          Status = 0  // a drain, WithRotation, or the answer to a HAPROXY-DISCONNECT
	StatusIO              Status = 1  // never; a Client reports a broken connection by it
	StatusTimeout         Status = 2  // WithHelloTimeout or WithIdleTimeout is over
	StatusFrameTooBig     Status = 3  // a frame exceeds the negotiated size
	StatusInvalidFrame    Status = 4  // a frame is malformed, or not one that may come here
	StatusNoVersion       Status = 5  // the HELLO has no supported-versions
	StatusNoFrameSize     Status = 6  // the HELLO has no max-frame-size
	StatusNoCapabilities  Status = 7  // the HELLO has no capabilities
	StatusBadVersion      Status = 8  // the HELLO does not list version 2.0
	StatusBadFrameSize    Status = 9  // the HELLO has a max-frame-size below 256
	StatusNoFragmentation Status = 10 // a frame is fragmented, without WithFragmentation
	StatusInterlaced      Status = 11 // a fragment is of another NOTIFY than the one before
	StatusFrameIDNotFound Status = 12 // a fragment has no beginning
	StatusNoResources     Status = 13 // there are as many connections as WithMaxConns allows
	StatusUnknown         Status = 99 // never; what a DISCONNECT without a status is taken for
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

// kind returns s's words as a kind of log line, of which there are few: all codes
// that SPOP does not know are of one kind.
func (s Status) kind() string {
	if t, ok := statusText[s]; ok {
		return t.name
	}
	return "unknown status"
}

// String returns the specification's words for s.
func (s Status) String() string {
	if t, ok := statusText[s]; ok {
		return t.name
	}
	return "status " + strconv.FormatUint(uint64(s), 10)
}

// DisconnectError says why a connection ended (SPOE.txt 3.2.8). With Remote the
// peer said so in a DISCONNECT frame; without, this side found the fault and told
// the peer.
type DisconnectError struct {
	Status Status

	// Message is what the peer or the decoder said beyond the status. The peer's
	// words are as they came: up to a frame long, and of any bytes.
	Message string

	Remote bool

	hint string // what to do, if it is not the status's
}

// Error returns the status in words and as a number, the message, and what can be
// done about it.
func (e *DisconnectError) Error() string {
	var b strings.Builder
	if e.Remote {
		b.WriteString("peer closed: ")
	}
	fmt.Fprintf(&b, "%v (%d)", e.Status, uint32(e.Status))
	if e.Message != "" && e.Message != e.Status.String() {
		b.WriteString(": " + e.Message)
	}
	hint := e.hint
	if hint == "" {
		hint = statusText[e.Status].hint
	}
	if hint != "" {
		b.WriteString("; " + hint)
	}
	return b.String()
}

func fault(s Status, format string, args ...any) *DisconnectError {
	return &DisconnectError{Status: s, Message: fmt.Sprintf(format, args...)}
}

// otherProtocols are the first bytes of peers that speak something else. As the
// length of a frame each of them is too big.
var otherProtocols = []struct{ prefix, name, hint string }{
	{"GET ", "HTTP", httpHint}, {"HEAD", "HTTP", httpHint}, {"POST", "HTTP", httpHint}, {"PUT ", "HTTP", httpHint},
	{"DELE", "HTTP", httpHint}, {"OPTI", "HTTP", httpHint}, {"CONN", "HTTP", httpHint}, {"TRAC", "HTTP", httpHint},
	{"PATC", "HTTP", httpHint}, {"HTTP", "HTTP", httpHint}, {"PRI ", "HTTP/2", httpHint},
	{"\x16\x03", "TLS", tlsHint}, {"\x15\x03", "TLS", tlsHint}, // a handshake; an alert
	{"PROX", "the PROXY protocol", proxyHint}, {"\r\n\r\n", "the PROXY protocol", proxyHint}, // versions 1 and 2
	{"SSH-", "SSH", "is it the right port?"},
}

const (
	httpHint  = "is it the right port? HAProxy reaches an agent by the backend of a spoe-agent, and checks it with option spop-check"
	tlsHint   = "use TLS on both sides or on neither, in HAProxy by ssl on the server line"
	proxyHint = "remove send-proxy from HAProxy's server line"
)

// otherProtocol returns the fault of a peer whose first bytes, at least 4 of them,
// are of a well-known protocol other than SPOP; nil if they are not.
func otherProtocol(b []byte) *DisconnectError {
	for _, p := range otherProtocols {
		if bytes.HasPrefix(b, []byte(p.prefix)) {
			e := fault(StatusInvalidFrame, "the peer speaks %s, not SPOP", p.name)
			e.hint = p.hint
			return e
		}
	}
	return nil
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

// varint decodes a varint at the beginning of b and returns how many bytes it
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
	if len(b) > 0 {
		if size := int(b[0]); size < 240 && size < len(b) { // nearly all
			end := 1 + size
			return b[1:end:end], b[end:], true
		}
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

// beginFrame appends the beginning of a frame. The length is filled in by
// finishFrame.
func beginFrame(b []byte, kind byte, flags uint32, stream, id uint64) []byte {
	b = append(b, 0, 0, 0, 0, kind)
	b = binary.BigEndian.AppendUint32(b, flags)
	return appendVarint(appendVarint(b, stream), id)
}

func finishFrame(b []byte, start int) []byte {
	binary.BigEndian.PutUint32(b[start:], uint32(len(b)-start-lengthSize))
	return b
}

// appendAck appends the ACK of a NOTIFY, whose ids go back as they came, with the
// actions one after the other.
func appendAck(b []byte, flags uint32, ids []byte, actions ...[]byte) []byte {
	const header = lengthSize + 1 + 4
	start, size := len(b), header+len(ids)
	for _, a := range actions {
		size += len(a)
	}
	b = slices.Grow(b, size)[:start+size]
	f := b[start:]
	binary.BigEndian.PutUint32(f, uint32(size-lengthSize))
	f[lengthSize] = frameAck
	binary.BigEndian.PutUint32(f[lengthSize+1:], flags)
	f = f[header:]
	f = f[copy(f, ids):]
	for _, a := range actions {
		f = f[copy(f, a):]
	}
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

// can reports whether the comma list of capabilities holds name.
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

// terms are what a side agrees to in its HELLO, or both sides do.
type terms struct {
	frameSize     int
	pipelining    bool
	async         bool
	fragmentation bool
}

// negotiate returns what HAProxy's HELLO and an agent's own terms have in common
// (SPOE.txt 3.2.4, 3.2.5). HAProxy does not offer fragmentation, yet uses it with
// an agent that announces it. Without an engine-id async means nothing.
func negotiate(h *hello, own terms) terms {
	return terms{
		frameSize:     min(int(min(h.frameSize, maxFrameSize)), own.frameSize),
		pipelining:    own.pipelining && h.can("pipelining"),
		async:         own.async && h.can("async") && h.engineID != "",
		fragmentation: own.fragmentation,
	}
}

// capabilities returns the comma list of t's capabilities.
func (t terms) capabilities() string {
	var names []string
	if t.pipelining {
		names = append(names, "pipelining")
	}
	if t.async {
		names = append(names, "async")
	}
	if t.fragmentation {
		names = append(names, "fragmentation")
	}
	return strings.Join(names, ",")
}

// hello returns the HELLO that f is, which must be the first frame of HAProxy's.
func (f *frame) hello() (*hello, error) {
	switch {
	case f.kind != frameHAProxyHello:
		return nil, fault(StatusInvalidFrame, "first frame is of type %d, want HELLO", f.kind)
	case !f.fin():
		return nil, fault(StatusNoFragmentation, "fragmented HELLO")
	case f.stream != 0 || f.id != 0:
		return nil, fault(StatusInvalidFrame, "HELLO with ids %d, %d", f.stream, f.id)
	}
	h := new(hello)
	return h, h.parse(frameHAProxyHello, f.payload)
}

// assembler puts together the NOTIFYs of one connection that come in several
// frames (SPOE.txt 3.3).
type assembler struct {
	max        int  // bytes of a NOTIFY; 0: fragmentation was not announced
	open       bool // a NOTIFY is being put together
	refused    bool // the last one was too long: its rest is dropped
	stream, id uint64
	buf        []byte
}

// assembly is what a fragment did.
type assembly uint8

const (
	unfinished assembly = iota // more fragments must follow, or none: the NOTIFY was aborted
	complete                   // the NOTIFY is whole
	tooLong                    // the NOTIFY exceeds the limit: its end is to be told to HAProxy
)

// add adds a frame, which is a NOTIFY without FIN or one of type UNSET. A whole
// payload is in the assembler's buffer; see swap.
func (g *assembler) add(f *frame) (payload []byte, _ assembly, _ error) {
	mine := f.stream == g.stream && f.id == g.id
	switch {
	case g.max == 0:
		return nil, 0, fault(StatusNoFragmentation, "")
	case g.open && (f.kind == frameNotify || !mine):
		return nil, 0, fault(StatusInterlaced, "fragment of %d, %d within %d, %d", f.stream, f.id, g.stream, g.id)
	case f.kind == frameNotify:
		*g = assembler{max: g.max, open: true, stream: f.stream, id: f.id, buf: g.buf[:0]}
	case g.refused && mine: // HAProxy had sent it before it was told
		g.refused = !f.fin() && !f.abort()
		return nil, unfinished, nil
	case !g.open:
		return nil, 0, fault(StatusFrameIDNotFound, "fragment of %d, %d without a beginning", f.stream, f.id)
	}
	if f.fin() || f.abort() {
		g.open = false
	}
	switch {
	case f.abort():
		return nil, unfinished, nil
	case len(g.buf)+len(f.payload) > g.max:
		g.refused, g.open, g.buf = g.open, false, nil
		return nil, tooLong, nil
	}
	g.buf = append(g.buf, f.payload...)
	if f.fin() {
		return g.buf, complete, nil
	}
	return nil, unfinished, nil
}

// swap returns the assembler's buffer, and gives it other memory instead.
func (g *assembler) swap(buf []byte) []byte {
	whole := g.buf
	g.buf = buf[:0]
	return whole
}

// speaksVersion2 reports whether a list of versions holds 2.0, or a later 2.x, which
// includes it.
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

// names keeps one copy of each name that was seen lately, so that names can be
// handed out as strings that last and yet cost no allocation. Several goroutines
// may use it at once. It is bounded: a peer that invents names replaces others,
// which are then copied again.
type names struct {
	slots [nameSets * nameWays]atomic.Pointer[string]
}

const (
	nameSets   = 256
	nameWays   = 4 // slots that a name may be in
	maxNameLen = 64
)

var (
	interned names
	nameSeed = maphash.MakeSeed() // a peer cannot choose names that collide
)

// intern returns b as a string that may be kept.
func (t *names) intern(b []byte) string {
	switch {
	case len(b) == 0:
		return ""
	case len(b) > maxNameLen:
		return string(b)
	}
	hash := maphash.Bytes(nameSeed, b)
	set := t.slots[hash%nameSets*nameWays:][:nameWays]
	for i := range set {
		if p := set[i].Load(); p != nil && *p == string(b) {
			return *p
		}
	}
	// First in, first out. If another goroutine does so too, a name may get lost
	// or be there twice, which costs a copy.
	for i := nameWays - 1; i > 0; i-- {
		set[i].Store(set[i-1].Load())
	}
	s := string(b)
	set[0].Store(&s)
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
		a.Name = interned.intern(name)
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
			if !ok || !yield(interned.intern(name), v) {
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
		m.name, m.from = interned.intern(name), n
	}
	m.count, m.args = count, args
}

// names iterates over the names of all messages. Another goroutine may call
// nextMessage meanwhile.
func (n *notify) names() iter.Seq[string] {
	return func(yield func(string) bool) {
		for b := n.payload; len(b) > 0; {
			name, count, rest, ok := cutMessage(b)
			if !ok || !yield(interned.intern(name)) {
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
	plan := decodePlanOf(p.Type().Elem())
	if plan.err != nil {
		return plan.err
	}
	var few [32]bool
	seen := few[:]
	if len(plan.fields) > len(few) {
		seen = make([]bool, len(plan.fields))
	}
	base := p.UnsafePointer()
	if err := plan.fill(m, base, seen); err != nil {
		return err
	}
	for i := range plan.fields {
		if f := &plan.fields[i]; !seen[i] {
			if !f.optional {
				return fmt.Errorf("spoa: message %s: argument %s: want %v, have nothing", m.name, f.name, f.elem)
			}
			f.clear(base)
		}
	}
	return nil
}

// fill stores the arguments of m in the fields of the struct at base, and marks
// the fields that have one as seen. It reads each argument once. Arguments that
// come in the order of the fields need no search.
func (p *decodePlan) fill(m *Message, base unsafe.Pointer, seen []bool) error {
	b := m.args
	named, at := 0, p.named // the next field by name, the next by position
	for i := range m.count {
		var v Value
		name, rest, ok := cutKV(b, &v)
		if !ok {
			break
		}
		b = rest
		for ; at < len(p.fields) && p.fields[at].pos == i; at++ {
			seen[at] = true
			if err := p.fields[at].set(m, base, v); err != nil {
				return err
			}
		}
		j := named
		if j >= p.named || p.fields[j].name != string(name) {
			if j, ok = p.byName[string(name)]; !ok {
				continue
			}
		}
		if seen[j] {
			continue // the first of a name counts
		}
		for ; j < p.named && p.fields[j].name == string(name); j++ {
			seen[j] = true
			if err := p.fields[j].set(m, base, v); err != nil {
				return err
			}
		}
		named = j
	}
	return nil
}

// decodeField is a field that Decode fills.
type decodeField struct {
	name     string
	pos      int // of the argument; -1: by name
	optional bool
	parse    bool
	pointer  bool
	elem     reflect.Type // of the field, or of what it points to
	store    fieldKind
	offset   uintptr
}

// decodePlan holds the fields of a struct type: first those by name, the ones of
// the same name side by side, then those by position in its order.
type decodePlan struct {
	fields []decodeField
	named  int            // how many are by name
	byName map[string]int // the first field of each name
	err    error
}

var decodePlans sync.Map // of *decodePlan by reflect.Type

func decodePlanOf(t reflect.Type) *decodePlan {
	if p, ok := decodePlans.Load(t); ok {
		return p.(*decodePlan)
	}
	p, _ := decodePlans.LoadOrStore(t, newDecodePlan(t))
	return p.(*decodePlan)
}

func newDecodePlan(t reflect.Type) *decodePlan {
	p := &decodePlan{byName: make(map[string]int)}
	var named, byPos []decodeField
	for i := range t.NumField() {
		sf := t.Field(i)
		tag, ok := sf.Tag.Lookup("spoe")
		if !ok {
			continue
		}
		f, err := newDecodeField(sf, tag)
		if err != nil {
			return &decodePlan{err: fmt.Errorf("spoa: %v.%s: %w", t, sf.Name, err)}
		}
		if f.pos >= 0 {
			byPos = append(byPos, f)
		} else {
			named = append(named, f)
		}
	}
	for _, f := range named {
		if _, ok := p.byName[f.name]; ok {
			continue
		}
		p.byName[f.name] = len(p.fields)
		for _, g := range named {
			if g.name == f.name {
				p.fields = append(p.fields, g)
			}
		}
	}
	p.named = len(p.fields)
	slices.SortStableFunc(byPos, func(a, b decodeField) int { return a.pos - b.pos })
	p.fields = append(p.fields, byPos...)
	return p
}

func newDecodeField(sf reflect.StructField, tag string) (decodeField, error) {
	name, opts, _ := strings.Cut(tag, ",")
	f := decodeField{name: name, pos: -1, elem: sf.Type, offset: sf.Offset}
	if digits, ok := strings.CutPrefix(name, "#"); ok {
		pos, err := strconv.ParseUint(digits, 10, 8)
		if err != nil {
			return f, fmt.Errorf("tag %q: want a position from #0 to #255", tag)
		}
		f.pos = int(pos)
	}
	for opts != "" {
		var o string
		switch o, opts, _ = strings.Cut(opts, ","); o {
		case "optional":
			f.optional = true
		case "parse":
			f.parse = true
		default:
			return f, fmt.Errorf("tag %q: unknown option %s", tag, o)
		}
	}
	if !sf.IsExported() {
		return f, errors.New("has a tag but is not exported")
	}
	if f.pointer = sf.Type.Kind() == reflect.Pointer; f.pointer {
		f.elem = sf.Type.Elem()
	}
	f.store = fieldKindOf(f.elem)
	switch {
	case f.store == 0, f.pointer && f.store == fieldValue:
		return f, fmt.Errorf("cannot decode into %v", sf.Type)
	case f.parse && f.store != fieldAddr:
		return f, fmt.Errorf("tag %q: option parse is for netip.Addr, not for %v", tag, sf.Type)
	}
	return f, nil
}

// fieldKind says how a field's value is stored.
type fieldKind uint8

const (
	fieldBool fieldKind = iota + 1
	fieldInt8
	fieldInt16
	fieldInt32
	fieldInt64
	fieldUint8
	fieldUint16
	fieldUint32
	fieldUint64
	fieldString
	fieldBytes
	fieldAddr
	fieldValue
)

// fieldKindOf returns 0 for a type that nothing can be decoded into.
func fieldKindOf(t reflect.Type) fieldKind {
	switch k := t.Kind(); {
	case t == reflect.TypeFor[netip.Addr]():
		return fieldAddr
	case t == reflect.TypeFor[Value]():
		return fieldValue
	case k == reflect.Bool:
		return fieldBool
	case k == reflect.String:
		return fieldString
	case k == reflect.Slice && t.Elem().Kind() == reflect.Uint8:
		return fieldBytes
	case k >= reflect.Int && k <= reflect.Int64:
		return fieldInt8 + fieldKind(bits.TrailingZeros(uint(t.Size())))
	case k >= reflect.Uint && k <= reflect.Uintptr:
		return fieldUint8 + fieldKind(bits.TrailingZeros(uint(t.Size())))
	}
	return 0
}

// set stores v into the field of the struct at base.
func (f *decodeField) set(m *Message, base unsafe.Pointer, v Value) error {
	if v.kind == KindNull && f.store != fieldValue {
		if f.optional || f.pointer {
			f.clear(base)
			return nil
		}
		return fmt.Errorf("spoa: message %s: argument %s: want %v, have null", m.name, f.name, f.elem)
	}
	p := unsafe.Add(base, f.offset)
	ok := false
	if f.pointer {
		elem := reflect.New(f.elem).UnsafePointer()
		if ok = f.setElem(elem, v); ok {
			*(*unsafe.Pointer)(p) = elem
		}
	} else {
		ok = f.setElem(p, v)
	}
	if !ok {
		return fmt.Errorf("spoa: message %s: argument %s: want %v, have %v %.40v", m.name, f.name, f.elem, v.kind, v)
	}
	return nil
}

// clear empties a field that can say that there is nothing.
func (f *decodeField) clear(base unsafe.Pointer) {
	switch p := unsafe.Add(base, f.offset); {
	case f.pointer:
		*(*unsafe.Pointer)(p) = nil
	case f.store == fieldValue:
		*(*Value)(p) = Value{}
	}
}

// setElem stores v at p and reports whether it fits. The type of what p points to
// is of the kind f.store.
func (f *decodeField) setElem(p unsafe.Pointer, v Value) (ok bool) {
	switch f.store {
	case fieldBool:
		var b bool
		if b, ok = v.Bool(); ok {
			*(*bool)(p) = b
		}
	case fieldInt8:
		ok = setInt[int8](p, v)
	case fieldInt16:
		ok = setInt[int16](p, v)
	case fieldInt32:
		ok = setInt[int32](p, v)
	case fieldInt64:
		ok = setInt[int64](p, v)
	case fieldUint8:
		ok = setUint[uint8](p, v)
	case fieldUint16:
		ok = setUint[uint16](p, v)
	case fieldUint32:
		ok = setUint[uint32](p, v)
	case fieldUint64:
		ok = setUint[uint64](p, v)
	case fieldString:
		if ok = v.isText(); ok {
			*(*string)(p) = strings.Clone(v.s)
		}
	case fieldBytes:
		if ok = v.isText(); ok {
			*(*[]byte)(p) = []byte(v.s)
		}
	case fieldAddr:
		if f.parse && v.isText() {
			v = parseAddr(v.s)
		}
		var a netip.Addr
		if a, ok = v.Addr(); ok {
			*(*netip.Addr)(p) = a
		}
	case fieldValue:
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
	if a.Value.kind == KindNull {
		return fmt.Sprintf("set-var %v.%s null", a.Scope, a.Name)
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
//
// The messages of a NOTIFY are handled in their order and share the Actions: All
// and Lookup also return what earlier messages have set, and Drop takes it back.
// If a handler fails, its own actions are not sent, but for those before Keep.
type Actions struct {
	buf []byte
	max int // of len(buf); 0: no limit
	err error

	before []byte // buf as it was when the handler was called
	kept   []byte // what buf becomes if it fails
}

// begin prepares a for a handler.
func (a *Actions) begin() {
	a.before, a.kept, a.err = a.buf, a.buf, nil
}

// fallBack leaves what is sent though the handler has failed.
func (a *Actions) fallBack() { a.buf = a.kept }

// Keep makes the actions so far final: they are sent even if the handler returns
// an error or panics. Those after it are not, unless it is called again. A
// handler that is late has none of its actions sent.
func (a *Actions) Keep() { a.kept = a.buf }

// Drop removes all actions on a variable, also those of earlier messages of the
// NOTIFY, and reports whether there were any. They are not sent, unless the handler
// fails and has not called Keep since.
func (a *Actions) Drop(s Scope, name string) bool {
	// Others may still read the old bytes, and may have to come back to them.
	var rest []byte
	dropped := false
	for b := a.buf; len(b) > 0; {
		act, after, ok := cutAction(b)
		if !ok {
			break
		}
		if act.Scope == s && act.Name == name {
			dropped = true
		} else {
			rest = append(rest, b[:len(b)-len(after)]...)
		}
		b = after
	}
	if dropped {
		a.buf = rest
	}
	return dropped
}

// SetVar sets a variable (SPOE.txt 3.4). HAProxy puts its scope and the agent's var-prefix in
// front of the name, and silently ignores a variable whose full name
// ("sess.iprep.ip_score") is longer than 63 bytes, or that no rule of its
// configuration mentions and nothing registers.
func (a *Actions) SetVar(s Scope, name string, v Value) {
	if b, ok := a.beginAction(actionSetVar, 3, s, name, len(v.s)); ok {
		a.endAction(appendValue(b, v), name)
	}
}

// UnsetVar unsets a variable (SPOE.txt 3.4).
func (a *Actions) UnsetVar(s Scope, name string) {
	if b, ok := a.beginAction(actionUnsetVar, 2, s, name, 0); ok {
		a.endAction(b, name)
	}
}

// beginAction returns the actions with the beginning of another one.
func (a *Actions) beginAction(action, nargs byte, s Scope, name string, size int) (b []byte, ok bool) {
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

// endAction makes b the actions, if it fits.
func (a *Actions) endAction(b []byte, name string) {
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

// Lookup returns what a variable is set to by the last action on it, be it of the
// same message or of an earlier one of the NOTIFY.
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
		if n.decode(f.payload) != nil {
			return s.String() + " malformed"
		}
		for n.nextMessage() {
			fmt.Fprintf(&s, " %s(", n.current.name)
			separator := ""
			for name, v := range n.current.Args() {
				fmt.Fprintf(&s, "%s%s=%v", separator, name, v.kind)
				if v.kind != KindNull {
					fmt.Fprintf(&s, " %q", v)
				}
				separator = ", "
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
