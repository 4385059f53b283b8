package spoa

import (
	"fmt"
	"math"
	"strings"
	"testing"
)

func TestHandshake(t *testing.T) {
	const all = "pipelining,async,fragmentation"
	for _, tt := range []struct {
		name         string
		opts         []Option
		versions     string
		frameSize    uint32
		capabilities string
		engine       string
		want         hello
	}{
		{"HAProxy 2.6", nil, "2.0", 16380, "pipelining,async", "e", hello{capabilities: "pipelining", frameSize: 16380}},
		{"HAProxy 3.2", nil, "2.0", 16380, "pipelining", "e", hello{capabilities: "pipelining", frameSize: 16380}},
		{"list of versions", nil, "1.0, 2.0 ,3.1", 16380, "", "", hello{frameSize: 16380}},
		{"later minor version", nil, "2.7", 16380, "", "", hello{frameSize: 16380}},
		{"no capability, no engine", nil, "2.0", 16380, "", "", hello{frameSize: 16380}},
		{"capabilities with spaces", nil, "2.0", 16380, " async , pipelining ", "e", hello{capabilities: "pipelining", frameSize: 16380}},
		{"unknown capabilities", nil, "2.0", 16380, "pipe,,pipeliningx,xasync", "e", hello{frameSize: 16380}},
		{"least frame size", nil, "2.0", 256, "", "", hello{frameSize: 256}},
		{"peer's frame size is higher", nil, "2.0", 1 << 20, "", "", hello{frameSize: defaultFrameSize}},
		{"greatest frame size", nil, "2.0", math.MaxUint32, "", "", hello{frameSize: defaultFrameSize}},
		{"own frame size is lower", []Option{WithMaxFrameSize(1000)}, "2.0", 16380, "", "", hello{frameSize: 1000}},
		{"own frame size is higher", []Option{WithMaxFrameSize(100000)}, "2.0", 16380, "", "", hello{frameSize: 16380}},
		{"async", []Option{WithAsync()}, "2.0", 16380, all, "e", hello{capabilities: "pipelining,async", frameSize: 16380}},
		{"async without an engine", []Option{WithAsync()}, "2.0", 16380, all, "", hello{capabilities: "pipelining", frameSize: 16380}},
		{"async not offered", []Option{WithAsync()}, "2.0", 16380, "pipelining", "e", hello{capabilities: "pipelining", frameSize: 16380}},
		{"pipelining of 2", []Option{WithPipelining(2)}, "2.0", 16380, all, "e", hello{capabilities: "pipelining", frameSize: 16380}},
		{"pipelining of 1", []Option{WithPipelining(1)}, "2.0", 16380, all, "e", hello{frameSize: 16380}},
		{"pipelining of -1", []Option{WithPipelining(-1)}, "2.0", 16380, all, "e", hello{frameSize: 16380}},
		{"fragmentation", []Option{WithFragmentation(1 << 20)}, "2.0", 16380, "", "", hello{capabilities: "fragmentation", frameSize: 16380}},
		{"everything", []Option{WithFragmentation(1 << 20), WithAsync()}, "2.0", 16380, all, "e", hello{capabilities: all, frameSize: 16380}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, ln := startMem(t, append(tt.opts, withNumbered())...)
			h := ln.dial(t)
			have := h.helloAs(hello{versions: tt.versions, frameSize: tt.frameSize, capabilities: tt.capabilities, engineID: tt.engine})
			tt.want.versions = version
			if have != tt.want {
				t.Errorf("want %+v, have %+v", tt.want, have)
			}
			h.wantAnswers()
			info := a.Conns()[0]
			if info.Capabilities != tt.want.capabilities || info.FrameSize != int(tt.want.frameSize) || info.EngineID != tt.engine || info.HealthCheck {
				t.Errorf("want what was agreed on, have %+v", info)
			}
			h.send(goodbye)
			h.wantEnd(StatusNormal)
		})
	}
}

// The payload of a HELLO, in parts.
var (
	helloVersions     = kv("supported-versions", "\x08\x032.0")
	helloSize         = kv("max-frame-size", "\x03\xfc\xf0\x06")
	helloCapabilities = kv("capabilities", "\x08\x00")
	helloPayload      = helloVersions + helloSize + helloCapabilities
)

func TestHandshakeUnknownKeys(t *testing.T) {
	_, ln := startMem(t, withNumbered())
	for kind := KindNull; kind <= KindBinary; kind++ {
		h := ln.dial(t)
		v := appendValue(nil, valueOf(byte(kind), 7, []byte("text")))
		h.send(rawFrame(frameHAProxyHello, flagFIN, 0, 0, kv("", string(v))+helloPayload+kv("colour", string(v))))
		h.want(frameAgentHello)
		h.wantAnswers()
	}
}

func TestHandshakeRefused(t *testing.T) {
	_, ln := startMem(t)
	good := func(payload string) string { return rawFrame(frameHAProxyHello, flagFIN, 0, 0, payload) }
	for _, tt := range []struct {
		name string
		want Status
		wire string
	}{
		{"empty payload", StatusNoVersion, good("")},
		{"no version", StatusNoVersion, good(helloSize + helloCapabilities)},
		{"the agent's key of the version", StatusNoVersion, good(kv("version", "\x08\x032.0") + helloSize + helloCapabilities)},
		{"no frame size", StatusNoFrameSize, good(helloVersions + helloCapabilities)},
		{"no capabilities", StatusNoCapabilities, good(helloVersions + helloSize)},
		{"version 1", StatusBadVersion, good(kv("supported-versions", "\x08\x071.0,3.0") + helloSize + helloCapabilities)},
		{"no such version", StatusBadVersion, good(kv("supported-versions", "\x08\x022.") + helloSize + helloCapabilities)},
		{"empty version", StatusBadVersion, good(kv("supported-versions", "\x08\x00") + helloSize + helloCapabilities)},
		{"frame size 0", StatusBadFrameSize, good(helloVersions + kv("max-frame-size", "\x03\x00") + helloCapabilities)},
		{"frame size 255", StatusBadFrameSize, good(helloVersions + kv("max-frame-size", "\x03\xff\x00") + helloCapabilities)},
		{"no FIN", StatusNoFragmentation, rawFrame(frameHAProxyHello, 0, 0, 0, helloPayload)},
		{"stream id", StatusInvalidFrame, rawFrame(frameHAProxyHello, flagFIN, 1, 0, helloPayload)},
		{"frame id", StatusInvalidFrame, rawFrame(frameHAProxyHello, flagFIN, 0, 1, helloPayload)},
		{"version is no string", StatusInvalidFrame, good(kv("supported-versions", "\x09\x032.0") + helloSize + helloCapabilities)},
		{"frame size is a string", StatusInvalidFrame, good(helloVersions + kv("max-frame-size", "\x08\x0516380") + helloCapabilities)},
		{"frame size is negative", StatusInvalidFrame, good(helloVersions + kv("max-frame-size", string(appendValue(nil, Int32(-1)))) + helloCapabilities)},
		{"capabilities are null", StatusInvalidFrame, good(helloVersions + helloSize + kv("capabilities", "\x00"))},
		{"engine-id is a number", StatusInvalidFrame, good(helloPayload + kv("engine-id", "\x03\x01"))},
		{"healthcheck is a string", StatusInvalidFrame, good(helloPayload + kv("healthcheck", "\x08\x04true"))},
		{"unknown key of a reserved type", StatusInvalidFrame, good(helloPayload + kv("colour", "\x0a"))},
		{"key cut short", StatusInvalidFrame, good(helloPayload + "\x05colo")},
		{"key without a value", StatusInvalidFrame, good(helloPayload + "\x06colour")},
		{"NOTIFY", StatusInvalidFrame, notifyFrame(1, 1)},
		{"UNSET", StatusInvalidFrame, rawFrame(frameUnset, flagFIN, 0, 0, "")},
		{"HAPROXY-DISCONNECT", StatusInvalidFrame, goodbye},
		{"AGENT-HELLO", StatusInvalidFrame, string(appendHello(nil, frameAgentHello, &offered))},
		{"unknown type", StatusInvalidFrame, rawFrame(42, flagFIN, 0, 0, helloPayload)},
		{"HTTP", StatusInvalidFrame, "GET / HTTP/1.1\r\nHost: a\r\n\r\n"},
		{"TLS", StatusInvalidFrame, "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"},
		{"length 0", StatusInvalidFrame, "\x00\x00\x00\x00"},
		{"length 6", StatusInvalidFrame, "\x00\x00\x00\x06\x01\x00\x00\x00\x01\x00"},
		{"length 16385", StatusFrameTooBig, "\x00\x00\x40\x01\x01"},
		{"length 2^31", StatusFrameTooBig, "\x80\x00\x00\x00"},
		{"length 2^32-1", StatusFrameTooBig, "\xff\xff\xff\xff"},
		{"ids cut short", StatusInvalidFrame, "\x00\x00\x00\x07\x01\x00\x00\x00\x01\x00\xff"},
		{"second HELLO", StatusInvalidFrame, good(helloPayload) + good(helloPayload)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := ln.dial(t)
			h.try(tt.wire)
			if tt.name == "second HELLO" {
				h.want(frameAgentHello)
			}
			h.wantEnd(tt.want)
		})
	}
}

// An AGENT-DISCONNECT that quotes the peer is no longer than the least frame size.
func TestRefusalIsShort(t *testing.T) {
	_, ln := startMem(t)
	h := ln.dial(t)
	long := strings.Repeat("\x00", 10000)
	h.try(rawFrame(frameHAProxyHello, flagFIN, 0, 0, kv("supported-versions", string(appendValue(nil, String(long))))+helloSize+helloCapabilities))
	f := h.want(frameAgentDisconnect)
	if n := len(f.payload) + minFrameLen; n > minFrameSize {
		t.Errorf("want at most %d bytes, have %d", minFrameSize, n)
	}
}

func TestHealthCheck(t *testing.T) {
	for _, on := range []bool{true, false} {
		t.Run(fmt.Sprint(on), func(t *testing.T) {
			closed := make(chan Peer, 1)
			_, ln := startMem(t, withNumbered(), WithHooks(Hooks{ConnClosed: func(p Peer, err error) {
				if err != nil {
					t.Error(err)
				}
				closed <- p
			}}))
			h := ln.dial(t)
			h.send(rawFrame(frameHAProxyHello, flagFIN, 0, 0, helloPayload+kv("healthcheck", string(appendValue(nil, Bool(on))))))
			var have hello
			if err := have.parse(frameAgentHello, h.want(frameAgentHello).payload); err != nil {
				t.Fatal(err)
			}
			if want := (hello{versions: version, frameSize: 16380}); want != have {
				t.Errorf("want %+v, have %+v", want, have)
			}
			if !on {
				h.wantAnswers()
				h.nc.Close()
			} else {
				h.wantEOF()
			}
			if p := receive(t, "ConnClosed", closed); p.HealthCheck != on {
				t.Errorf("want HealthCheck %v, have %+v", on, p)
			}
		})
	}
}

func TestNegotiate(t *testing.T) {
	all := terms{frameSize: 1000, pipelining: true, async: true, fragmentation: true}
	for _, tt := range []struct {
		name string
		peer hello
		own  terms
		want terms
		caps string
	}{
		{"all", hello{frameSize: 2000, capabilities: "pipelining,async", engineID: "e"}, all, all, "pipelining,async,fragmentation"},
		{"nothing offered", hello{frameSize: 2000, engineID: "e"}, all, terms{frameSize: 1000, fragmentation: true}, "fragmentation"},
		{"nothing of our own", hello{frameSize: 2000, capabilities: "pipelining,async,fragmentation", engineID: "e"}, terms{frameSize: 1000}, terms{frameSize: 1000}, ""},
		{"async without an engine-id", hello{frameSize: 2000, capabilities: "async"}, all, terms{frameSize: 1000, fragmentation: true}, "fragmentation"},
		{"spaces and unknown names", hello{frameSize: 2000, capabilities: " pipelining , other"}, terms{frameSize: 1000, pipelining: true}, terms{frameSize: 1000, pipelining: true}, "pipelining"},
		{"the peer's frame size is less", hello{frameSize: 256}, terms{frameSize: 1000}, terms{frameSize: 256}, ""},
		{"the largest frame size", hello{frameSize: math.MaxUint32}, terms{frameSize: maxFrameSize}, terms{frameSize: maxFrameSize}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			have := negotiate(&tt.peer, tt.own)
			if have != tt.want {
				t.Errorf("want %+v, have %+v", tt.want, have)
			}
			if caps := have.capabilities(); caps != tt.caps {
				t.Errorf("want capabilities %q, have %q", tt.caps, caps)
			}
		})
	}
}
