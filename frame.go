package spoa

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"iter"
	"math"
	"slices"
	"strconv"
	"strings"
)

// Frame types (SPOE.txt 3.2.2).
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
	maxVarintLen     = 10
)

const version = "2.0"

// Status is a SPOP status code: why a connection was closed (SPOE.txt 3.5).
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
	StatusBadVersion      Status = 8  // the HELLO lists no version 2.x
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

// DisconnectError says why a connection ended (SPOE.txt 3.2.8, 3.2.9). With Remote the
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

// isAck reports whether a frame, with its length, is an ACK.
func isAck(frame []byte) bool { return frame[lengthSize] == frameAck }

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
// frames (SPOE.txt 3.2).
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
		g.buf = nil
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

// appendDisconnect appends the DISCONNECT of either side (SPOE.txt 3.2.8,
// 3.2.9).
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

// String returns the scope's name as HAProxy's rules have it, such as sess.
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

// SetVar sets a variable (SPOE.txt 3.4). Its name has 1 to 255 bytes. V is copied.
// What is not valid, or does not fit in the ACK, is left out; see Err.
//
// HAProxy puts the scope and the agent's var-prefix in front of the name, and
// silently ignores a variable whose full name ("sess.iprep.ip_score") is longer
// than 63 bytes, or that no rule of its configuration mentions and nothing
// registers.
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

// Append adds the actions of other, and why one was refused there, as if each had
// been set here. If all fits it is one copy, so a handler that often sets the same
// variables can prepare them. Several goroutines may append the same other at once,
// as long as none changes it.
func (a *Actions) Append(other *Actions) {
	if other.err != nil {
		a.fail(other.err)
	}
	if a.max == 0 || len(a.buf)+len(other.buf) <= a.max {
		a.buf = append(a.buf, other.buf...)
		return
	}
	for act := range other.All() {
		if act.Unset {
			a.UnsetVar(act.Scope, act.Name)
		} else {
			a.SetVar(act.Scope, act.Name, act.Value)
		}
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

func describeMessage(s *strings.Builder, m *Message) {
	fmt.Fprintf(s, " %s(", m.name)
	separator := ""
	for name, v := range m.Args() {
		fmt.Fprintf(s, "%s%s=%v", separator, name, v.kind)
		if v.kind != KindNull {
			fmt.Fprintf(s, " %q", v)
		}
		separator = ", "
	}
	s.WriteString(")")
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
			describeMessage(&s, &n.current)
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
