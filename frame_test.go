package spoa

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"path/filepath"
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

func sameAction(a, b Action) bool {
	return a.Scope == b.Scope && a.Name == b.Name && a.Unset == b.Unset && a.Value.Equal(b.Value)
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

// What is appended is as if it had been set one by one, also where not all of it fits.
func TestActionsAppend(t *testing.T) {
	set := func(a *Actions) {
		a.SetVar(ScopeTxn, "text", String("abc"))
		a.SetVar(ScopeTxn, "long", String("abcdefghijklmnopqrstuvwxyz"))
		a.UnsetVar(ScopeSess, "gone")
	}
	var prepared Actions
	set(&prepared)
	size := len(prepared.buf)
	for _, max := range []int{0, size + 8, size + 7, size + 1, 30, 9} {
		want, have := Actions{max: max}, Actions{max: max}
		want.UnsetVar(ScopeReq, "own") // 7 bytes
		have.UnsetVar(ScopeReq, "own")
		set(&want)
		have.Append(&prepared)
		if !bytes.Equal(want.buf, have.buf) || fmt.Sprint(want.Err()) != fmt.Sprint(have.Err()) {
			t.Errorf("limit %d: want %q, %v, have %q, %v", max, want.buf, want.Err(), have.buf, have.Err())
		}
	}
	if len(prepared.buf) != size {
		t.Errorf("want what is appended unchanged, have %q", prepared.buf)
	}
	refused := Actions{max: 10}
	set(&refused)
	var a Actions
	a.Append(&refused)
	if a.Err() == nil || a.Err() != refused.Err() || !bytes.Equal(a.buf, refused.buf) {
		t.Errorf("want the error %v with the rest, have %v and %q", refused.Err(), a.Err(), a.buf)
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
