package spoa

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"testing"
	"testing/synctest"
)

func TestClientHello(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		s := newScript(t, far)
		go func() {
			f := s.next()
			var h hello
			if err := h.parse(frameHAProxyHello, f.payload); err != nil {
				t.Error(err)
			}
			if f.kind != frameHAProxyHello || f.flags != flagFIN || f.stream != 0 || f.id != 0 ||
				h.versions != "2.0" || h.frameSize != 65535 || h.capabilities != "pipelining" || h.healthcheck || len(h.engineID) != 36 {
				t.Errorf("HAPROXY-HELLO: %+v in %+v", h, f)
			}
			s.say(fullHello)
			s.wantDisconnect(StatusNormal)
			s.say(normalBye)
			far.Close()
		}()
		c, err := NewClient(t.Context(), near)
		if err != nil {
			t.Fatal(err)
		}
		if h := c.Hello(); h.Version != "2.0" || h.MaxFrameSize != 16380 || !slices.Equal(h.Capabilities, []string{"pipelining"}) {
			t.Errorf("AGENT-HELLO: %+v", h)
		}
		for range 2 {
			if err := c.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		}
	})
}

// HAProxy takes a version in spaces, so a client does.
func TestClientHelloVersion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		s := newScript(t, far)
		go func() {
			s.next()
			s.say(string(appendHello(nil, frameAgentHello, &hello{versions: " 2.0\t", frameSize: 16380})))
			s.wantDisconnect(StatusNormal)
			far.Close()
		}()
		c, err := NewClient(t.Context(), near)
		if err != nil {
			t.Fatal(err)
		}
		if have := c.Hello().Version; have != "2.0" {
			t.Errorf("want 2.0, have %q", have)
		}
		c.Close()
	})
}

func TestClientRefusesHello(t *testing.T) {
	agent := func(versions string, size uint32, edit func(b []byte)) string {
		b := appendHello(nil, frameAgentHello, &hello{versions: versions, frameSize: size})
		if edit != nil {
			edit(b)
		}
		return string(b)
	}
	noKeys := string(finishFrame(beginFrame(nil, frameAgentHello, flagFIN, 0, 0), 0))
	for _, tc := range []struct {
		name, hello string
		want        Status
		remote      bool
	}{
		{"version 1.0", agent("1.0", 16380, nil), StatusBadVersion, false},
		{"version 2.0, 1.0", agent("2.0,1.0", 16380, nil), StatusBadVersion, false},
		{"version not offered", agent("2.1", 16380, nil), StatusBadVersion, false},
		{"size 255", agent("2.0", 255, nil), StatusBadFrameSize, false},
		{"size beyond ours", agent("2.0", 65536, nil), StatusBadFrameSize, false},
		{"no keys", noKeys, StatusNoVersion, false},
		{"no FIN", agent("2.0", 16380, func(b []byte) { b[8] = 0 }), StatusNoFragmentation, false},
		{"stream 1", agent("2.0", 16380, func(b []byte) { b[9] = 1 }), StatusInvalidFrame, false},
		{"frame 1", agent("2.0", 16380, func(b []byte) { b[10] = 1 }), StatusInvalidFrame, false},
		{"ACK", ackFrame(0, 0, ""), StatusInvalidFrame, false},
		{"echo", agent("2.0", 16380, func(b []byte) { b[4] = frameHAProxyHello }), StatusInvalidFrame, false},
		{"HTTP", "HTTP/1.1 400 Bad Request\r\n\r\n", StatusInvalidFrame, false},
		{"too big", "\x00\x01\x00\x00", StatusFrameTooBig, false},
		{"length 6", "\x00\x00\x00\x06", StatusInvalidFrame, false},
		{"refused", string(appendDisconnect(nil, frameAgentDisconnect, StatusNoResources, "draining")), StatusNoResources, true},
		{"nothing", "", StatusIO, false},
		{"half", fullHello[:40], StatusIO, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				near, far := net.Pipe()
				s := newScript(t, far)
				go func() {
					s.next()
					s.say(tc.hello)
					if !tc.remote && tc.want != StatusIO {
						s.wantDisconnect(tc.want)
					}
					far.Close()
				}()
				c, err := NewClient(t.Context(), near)
				if c != nil {
					t.Error("want no client")
				}
				wantStatus(t, err, tc.want, tc.remote)
				if _, err := near.Write(nil); !errors.Is(err, io.ErrClosedPipe) {
					t.Errorf("want the connection closed, have %v", err)
				}
			})
		})
	}
}

func TestNewClientContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer far.Close()
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			newScript(t, far).next()
			cancel()
		}()
		if _, err := NewClient(ctx, near); err != context.Canceled {
			t.Errorf("want %v, have %v", context.Canceled, err)
		}
	})
}

// SPOE.txt 3.2.4: a health check has no engine-id, and HAProxy's offers no
// capabilities.
func TestCheck(t *testing.T) {
	const want = "\x00\x00\x00\x4e" + "\x01\x00\x00\x00\x01\x00\x00" +
		"\x12supported-versions\x08\x032.0" +
		"\x0emax-frame-size\x03\xfc\xf0\x06" +
		"\x0ccapabilities\x08\x00" +
		"\x0bhealthcheck\x11"
	ln := listenLocal(t)
	answers := []string{
		plainHello,
		string(appendDisconnect(nil, frameAgentDisconnect, StatusUnknown, "draining")),
		"",
	}
	go func() {
		for _, a := range answers {
			conn, err := ln.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			have := make([]byte, len(want))
			if _, err := io.ReadFull(conn, have); err != nil || string(have) != want {
				t.Errorf("want %q, have %q, %v", want, have, err)
			}
			_, _ = io.WriteString(conn, a)
			conn.Close()
		}
	}()
	conn, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	h, err := Probe(t.Context(), conn)
	if err != nil || h.Version != "2.0" || h.MaxFrameSize != 16380 || h.Capabilities != nil {
		t.Errorf("have %+v, %v", h, err)
	}
	wantStatus(t, Check(t.Context(), "tcp", ln.Addr().String()), StatusUnknown, true)
	wantStatus(t, Check(t.Context(), "tcp", ln.Addr().String()), StatusIO, false)
	ln.Close()
	if err := Check(t.Context(), "tcp", ln.Addr().String()); err == nil {
		t.Error("want an error from a closed port")
	}
}
