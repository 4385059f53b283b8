package spoa

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// What an agent says, spelled out.
const (
	fullHello = "\x00\x00\x00\x40" + "\x65\x00\x00\x00\x01\x00\x00" +
		"\x07version\x08\x032.0" +
		"\x0emax-frame-size\x03\xfc\xf0\x06" + // 16380
		"\x0ccapabilities\x08\x0apipelining"
	plainHello = "\x00\x00\x00\x36" + "\x65\x00\x00\x00\x01\x00\x00" +
		"\x07version\x08\x032.0" +
		"\x0emax-frame-size\x03\xfc\xf0\x06" +
		"\x0ccapabilities\x08\x00"
	normalBye = "\x00\x00\x00\x25" + "\x66\x00\x00\x00\x01\x00\x00" +
		"\x0bstatus-code\x03\x00" +
		"\x07message\x08\x06normal"
	setScore = "\x01\x03\x01\x08ip_score\x04\x2a" // set-var sess.ip_score int64 42
)

func ackFrame(stream, id uint64, actions string) string {
	return string(appendAck(nil, flagFIN, ids(stream, id), []byte(actions)))
}

// script is the agent's end of a connection, for a test to speak.
type script struct {
	net.Conn
	t *testing.T
	r *bufio.Reader
}

func newScript(t *testing.T, conn net.Conn) *script {
	return &script{conn, t, bufio.NewReaderSize(conn, lengthLimit)}
}

// next returns the client's next frame.
func (s *script) next() frame {
	s.t.Helper()
	var f frame
	if err := readFrame(s.r, &f, defaultFrameSize); err != nil {
		s.t.Errorf("agent: %v", err)
	}
	f.payload = bytes.Clone(f.payload)
	return f
}

// say reports whether the client is there to listen.
func (s *script) say(frames ...string) bool {
	_, err := io.WriteString(s.Conn, strings.Join(frames, ""))
	return err == nil
}

// wantDisconnect reads the client's last frame.
func (s *script) wantDisconnect(want Status) {
	s.t.Helper()
	f := s.next()
	if f.kind != frameHAProxyDisconnect || f.flags != flagFIN || f.stream != 0 || f.id != 0 {
		s.t.Errorf("want HAPROXY-DISCONNECT, have %+v", f)
	} else if have := parseDisconnect(f.payload).Status; want != have {
		s.t.Errorf("disconnect: want %v, have %v", want, have)
	}
}

// clientBubble runs f in a synctest bubble, which ends only when every goroutine has,
// with a client that has had hello, on a net.Pipe.
func clientBubble(t *testing.T, hello string, f func(t *testing.T, c *Client, s *script)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer far.Close()
		s := newScript(t, far)
		go func() {
			s.next()
			s.say(hello)
		}()
		c, err := NewClient(t.Context(), near)
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		f(t, c, s)
		far.Close()
		c.Close()
	})
}

type notifyResult struct {
	actions []Action
	err     error
}

// goNotify calls Notify in a goroutine of its own.
func goNotify(ctx context.Context, c *Client, msgs ...*Message) <-chan notifyResult {
	ch := make(chan notifyResult, 1)
	go func() {
		actions, err := c.Notify(ctx, msgs...)
		ch <- notifyResult{actions, err}
	}()
	return ch
}

func show(actions []Action) string {
	var b []string
	for _, a := range actions {
		b = append(b, a.String())
	}
	return strings.Join(b, "; ")
}

func wantStatus(t *testing.T, err error, status Status, remote bool) {
	t.Helper()
	var d *DisconnectError
	if !errors.As(err, &d) || d.Status != status || d.Remote != remote {
		t.Errorf("want status %v, remote %v; have %v", status, remote, err)
	}
}

func checkIP(s string) *Message {
	return NewMessage("check-client-ip", Arg{"src", Addr(netip.MustParseAddr(s))})
}

func listenLocal(t *testing.T) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

func TestClientNotify(t *testing.T) {
	clientBubble(t, fullHello, func(t *testing.T, c *Client, s *script) {
		first := goNotify(t.Context(), c, checkIP("192.0.2.1"), NewMessage("two"))
		f := s.next()
		if want := "\x0fcheck-client-ip\x01\x03src\x06\xc0\x00\x02\x01" + "\x03two\x00"; string(f.payload) != want {
			t.Errorf("NOTIFY: want %q, have %q", want, f.payload)
		}
		if f.kind != frameNotify || f.flags != flagFIN || f.stream != 1 || f.id != 1 {
			t.Errorf("NOTIFY: %+v", f)
		}
		second := goNotify(t.Context(), c, checkIP("2001:db8::1"))
		if f := s.next(); f.stream != 3 || f.id != 1 {
			t.Errorf("second NOTIFY: %+v", f)
		}
		s.say(ackFrame(3, 1, setScore), ackFrame(1, 1, "\x01\x03\x02\x01s\x08\x02hi"+"\x02\x02\x04\x01u"))
		a, b := <-first, <-second
		s.say(strings.Repeat("\x00", lengthLimit)) // overwrites what the ACKs were read into
		if want, have := "set-var txn.s string hi; unset-var res.u", show(a.actions); want != have || a.err != nil {
			t.Errorf("want %s, have %s, %v", want, have, a.err)
		}
		if want, have := "set-var sess.ip_score int64 42", show(b.actions); want != have || b.err != nil {
			t.Errorf("want %s, have %s, %v", want, have, b.err)
		}
	})
}

func TestClientNotifyWithoutPipelining(t *testing.T) {
	clientBubble(t, plainHello, func(t *testing.T, c *Client, s *script) {
		var answers []<-chan notifyResult
		for range 3 {
			answers = append(answers, goNotify(t.Context(), c, NewMessage("m")))
		}
		synctest.Wait()
		if err := c.Start(ignore, NewMessage("m")); err != errBusy {
			t.Errorf("Start: want %v, have %v", errBusy, err)
		}
		for range answers {
			f := s.next()
			synctest.Wait()
			if n := s.r.Buffered(); n > 0 {
				t.Errorf("%d bytes more before the ACK", n)
			}
			s.say(ackFrame(f.stream, f.id, setScore))
		}
		for _, ch := range answers {
			if a := <-ch; a.err != nil || len(a.actions) != 1 {
				t.Errorf("have %v, %v", a.actions, a.err)
			}
		}
	})
}

func TestClientNotifyCancelled(t *testing.T) {
	for _, hello := range []string{fullHello, plainHello} {
		clientBubble(t, hello, func(t *testing.T, c *Client, s *script) {
			ctx, cancel := context.WithCancel(t.Context())
			first := goNotify(ctx, c, NewMessage("slow"))
			f := s.next()
			cancel()
			if a := <-first; a.err != context.Canceled {
				t.Errorf("want %v, have %v", context.Canceled, a.err)
			}
			if _, err := c.Notify(ctx, NewMessage("dead")); err != context.Canceled {
				t.Errorf("want %v, have %v", context.Canceled, err)
			}
			if hello == plainHello { // the slot is taken until the late ACK
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				if _, err := c.Notify(ctx, NewMessage("waits")); err != context.DeadlineExceeded {
					t.Errorf("want %v, have %v", context.DeadlineExceeded, err)
				}
			}
			second := goNotify(t.Context(), c, NewMessage("next"))
			synctest.Wait()
			go s.say(ackFrame(f.stream, f.id, setScore))
			f = s.next()
			s.say(ackFrame(f.stream, f.id, setScore))
			if a := <-second; a.err != nil || len(a.actions) != 1 {
				t.Errorf("have %v, %v", a.actions, a.err)
			}
		})
	}
}

// An agent that does not read holds up neither a Notify that gives up nor
// Close.
func TestClientWriteBlocked(t *testing.T) {
	clientBubble(t, fullHello, func(t *testing.T, c *Client, s *script) {
		ctx, cancel := context.WithCancel(t.Context())
		first := goNotify(ctx, c, NewMessage("m"))
		synctest.Wait()
		cancel()
		if a := <-first; a.err != context.Canceled {
			t.Errorf("want %v, have %v", context.Canceled, a.err)
		}
		second := goNotify(t.Context(), c, NewMessage("m"))
		synctest.Wait()
		wantStatus(t, c.Close(), StatusTimeout, false)
		wantStatus(t, (<-second).err, StatusNormal, false)
	})
}

// When the agent stops reading and says why, that is the error, not that of the
// write.
func TestClientWriteFails(t *testing.T) {
	for _, bye := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			near, far := net.Pipe()
			s := newScript(t, far)
			conn := &failingWrites{Conn: near, failed: make(chan struct{})}
			go func() {
				s.next()
				s.say(fullHello)
				<-conn.failed
				if bye {
					s.say(string(appendDisconnect(nil, frameAgentDisconnect, StatusTimeout, "")))
				}
			}()
			c, err := NewClient(t.Context(), conn)
			if err != nil {
				t.Fatal(err)
			}
			_, err = c.Notify(t.Context(), NewMessage("m"))
			if bye {
				wantStatus(t, err, StatusTimeout, true)
			} else if wantStatus(t, err, StatusIO, false); !errors.Is(err, errWrite) {
				t.Errorf("want %v, have %v", errWrite, err)
			}
			c.Close()
			far.Close()
		})
	}
}

// failingWrites takes one write.
type failingWrites struct {
	net.Conn
	n      int
	failed chan struct{}
}

var errWrite = errors.New("no more")

func (f *failingWrites) Write(b []byte) (int, error) {
	if f.n++; f.n == 1 {
		return f.Conn.Write(b)
	}
	close(f.failed)
	return 0, errWrite
}

func TestClientNotifyOwnErrors(t *testing.T) {
	clientBubble(t, fullHello, func(t *testing.T, c *Client, s *script) {
		const around = 7 + 2 + 1 + 2 + 1 + 3 // metadata, "m", 1 argument, "x", STRING and its length
		fits := strings.Repeat("x", 16380-around)
		if _, err := c.Notify(t.Context(), NewMessage("m", Arg{"x", String(fits + "y")})); err == nil {
			t.Error("want an error from a NOTIFY of 16381 bytes")
		}
		if err := c.Start(ignore, NewMessage("m", Arg{"x", String(fits + "y")})); err == nil {
			t.Error("want an error from a NOTIFY of 16381 bytes")
		}
		ch := goNotify(t.Context(), c, NewMessage("m", Arg{"x", String(fits)}))
		f := s.next()
		s.say(string(appendAck(nil, flagFIN|flagAbort, ids(f.stream, f.id), nil)))
		if a := <-ch; a.err == nil || errors.As(a.err, new(*DisconnectError)) {
			t.Errorf("aborted: have %v", a.err)
		}
		ch = goNotify(t.Context(), c, NewMessage("m"))
		if f := s.next(); f.stream != 3 {
			t.Errorf("want stream 3, have %+v", f)
		}
		s.say(ackFrame(3, 1, setScore))
		if a := <-ch; a.err != nil || len(a.actions) != 1 {
			t.Errorf("have %v, %v", a.actions, a.err)
		}
		ch = goNotify(t.Context(), c, NewMessage("m"))
		s.next()
		s.say(ackFrame(5, 1, ""))
		if a := <-ch; a.err != nil || a.actions != nil {
			t.Errorf("want no actions, have %#v, %v", a.actions, a.err)
		}
	})
}

func TestClientFaults(t *testing.T) {
	disconnect := string(appendDisconnect(nil, frameAgentDisconnect, StatusNoResources, "no"))
	for _, tc := range []struct {
		name, say string
		want      Status
		remote    bool
	}{
		{"unknown stream", ackFrame(3, 1, ""), StatusFrameIDNotFound, false},
		{"even stream", ackFrame(2, 1, ""), StatusFrameIDNotFound, false},
		{"stream 0", ackFrame(0, 0, ""), StatusFrameIDNotFound, false},
		{"unknown frame", ackFrame(1, 2, ""), StatusFrameIDNotFound, false},
		{"no FIN", string(appendAck(nil, 0, ids(1, 1), nil)), StatusNoFragmentation, false},
		{"length 0", "\x00\x00\x00\x00", StatusInvalidFrame, false},
		{"length 6", "\x00\x00\x00\x06\x67\x00\x00\x00\x01\x01\x01", StatusInvalidFrame, false},
		{"over the size", "\x00\x00\x3f\xfd", StatusFrameTooBig, false}, // 16381
		{"length 2^32-1", "\xff\xff\xff\xff", StatusInvalidFrame, false},
		{"endless varint", "\x00\x00\x00\x11\x67\x00\x00\x00\x01" + strings.Repeat("\xff", 12), StatusInvalidFrame, false},
		{"second AGENT-HELLO", fullHello, StatusInvalidFrame, false},
		{"NOTIFY", "\x00\x00\x00\x07\x03\x00\x00\x00\x01\x01\x01", StatusInvalidFrame, false},
		{"UNSET", "\x00\x00\x00\x07\x00\x00\x00\x00\x01\x01\x01", StatusInvalidFrame, false},
		{"action 3", ackFrame(1, 1, "\x03\x03\x01\x01x\x00"), StatusInvalidFrame, false},
		{"scope 5", ackFrame(1, 1, "\x01\x03\x05\x01x\x00"), StatusInvalidFrame, false},
		{"set-var of 2", ackFrame(1, 1, "\x01\x02\x01\x01x\x00"), StatusInvalidFrame, false},
		{"name beyond the frame", ackFrame(1, 1, "\x01\x03\x01\x09x\x00"), StatusInvalidFrame, false},
		{"good, then cut action", ackFrame(1, 1, setScore+"\x01"), StatusInvalidFrame, false},
		{"DISCONNECT", disconnect, StatusNoResources, true},
		{"empty DISCONNECT", "\x00\x00\x00\x07\x66\x00\x00\x00\x01\x00\x00", StatusUnknown, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			clientBubble(t, fullHello, func(t *testing.T, c *Client, s *script) {
				waiting := goNotify(t.Context(), c, NewMessage("m"))
				s.next()
				s.say(tc.say)
				if !tc.remote {
					s.wantDisconnect(tc.want)
				}
				a := <-waiting
				wantStatus(t, a.err, tc.want, tc.remote)
				if a.actions != nil {
					t.Errorf("want no actions, have %v", a.actions)
				}
				_, err := c.Notify(t.Context(), NewMessage("m"))
				wantStatus(t, err, tc.want, tc.remote)
				wantStatus(t, c.Start(ignore, NewMessage("m")), tc.want, tc.remote)
				if err := c.Close(); err != nil {
					t.Errorf("Close after the end: %v", err)
				}
			})
		})
	}
	t.Run("second ACK", func(t *testing.T) {
		clientBubble(t, fullHello, func(t *testing.T, c *Client, s *script) {
			ch := goNotify(t.Context(), c, NewMessage("m"))
			s.next()
			s.say(ackFrame(1, 1, ""), ackFrame(1, 1, ""))
			if a := <-ch; a.err != nil {
				t.Error(a.err)
			}
			s.wantDisconnect(StatusFrameIDNotFound)
		})
	})
}

// The agent goes away after every byte of what it says.
func TestClientCut(t *testing.T) {
	all := fullHello + ackFrame(1, 1, setScore)
	for n := range len(all) {
		synctest.Test(t, func(t *testing.T) {
			near, far := net.Pipe()
			s := newScript(t, far)
			go func() {
				s.next()
				s.say(all[:min(n, len(fullHello))])
				if n >= len(fullHello) {
					s.next()
					s.say(all[len(fullHello):n])
				}
				far.Close()
			}()
			c, err := NewClient(t.Context(), near)
			if ok := n >= len(fullHello); ok != (err == nil) {
				t.Fatalf("after %d bytes: %v", n, err)
			}
			if err == nil {
				_, err = c.Notify(t.Context(), NewMessage("m"))
				c.Close()
			}
			wantStatus(t, err, StatusIO, false)
			want := io.ErrUnexpectedEOF
			if n == 0 || n == len(fullHello) {
				want = io.EOF
			}
			if !errors.Is(err, want) {
				t.Errorf("after %d bytes: want %v, have %v", n, want, err)
			}
		})
	}
}

func TestClientClose(t *testing.T) {
	for _, tc := range []struct {
		name   string
		agent  func(s *script)
		want   Status // of what Close returns; StatusNormal: nil
		remote bool
	}{
		{"answered", func(s *script) { s.say(normalBye) }, StatusNormal, false},
		{"ACK first", func(s *script) { s.say(ackFrame(1, 1, setScore), normalBye) }, StatusNormal, false},
		{"closed", func(s *script) { s.Close() }, StatusIO, false},
		{"silent", func(s *script) {}, StatusTimeout, false},
		{"drip", func(s *script) {
			for s.say(ackFrame(1, 1, setScore)) {
				time.Sleep(farewellTimeout / 20)
			}
		}, StatusTimeout, false},
		{"another status", func(s *script) {
			s.say(string(appendDisconnect(nil, frameAgentDisconnect, StatusTimeout, "")))
		}, StatusTimeout, true},
		{"garbage", func(s *script) { s.say("\xff\xff\xff\xff") }, StatusInvalidFrame, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			clientBubble(t, fullHello, func(t *testing.T, c *Client, s *script) {
				waiting := goNotify(t.Context(), c, NewMessage("m"))
				s.next()
				var agent sync.WaitGroup
				defer agent.Wait()
				agent.Go(func() {
					s.wantDisconnect(StatusNormal)
					wantStatus(t, (<-waiting).err, StatusNormal, false)
					tc.agent(s)
				})
				if err := c.Close(); tc.want != StatusNormal {
					wantStatus(t, err, tc.want, tc.remote)
				} else if err != nil {
					t.Errorf("want nil, have %v", err)
				}
				_, err := c.Notify(t.Context(), NewMessage("m"))
				wantStatus(t, err, StatusNormal, false)
			})
		})
	}
}

// With one in flight at most, those that wait for their turn fail with Close
// too.
func TestClientCloseWaiting(t *testing.T) {
	clientBubble(t, plainHello, func(t *testing.T, c *Client, s *script) {
		var answers []<-chan notifyResult
		for range 5 {
			answers = append(answers, goNotify(t.Context(), c, NewMessage("m")))
		}
		s.next()
		synctest.Wait()
		go c.Close()
		s.wantDisconnect(StatusNormal)
		for _, ch := range answers { // no answer to the DISCONNECT yet
			wantStatus(t, (<-ch).err, StatusNormal, false)
		}
		s.say(normalBye)
	})
}

// scoreAgent answers every NOTIFY with its first argument as ip_score.
func scoreAgent(t *testing.T, ln net.Listener) {
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			r := bufio.NewReaderSize(conn, lengthLimit)
			var f frame
			var n notify
			for readFrame(r, &f, defaultFrameSize) == nil {
				var out []byte
				switch f.kind {
				case frameHAProxyHello:
					out = []byte(fullHello)
				case frameHAProxyDisconnect:
					out = []byte(normalBye)
				case frameNotify:
					if err := n.decode(f.payload); err != nil || !n.nextMessage() {
						t.Error(err)
						return
					}
					var a Actions
					a.SetVar(ScopeSess, "ip_score", n.current.Arg(0).Value)
					out = appendAck(nil, flagFIN, ids(f.stream, f.id), a.buf)
				}
				if _, err := conn.Write(out); err != nil {
					t.Error(err)
					return
				}
			}
		}()
	}
}

func TestClientNotifyParallel(t *testing.T) {
	ln := listenLocal(t)
	go scoreAgent(t, ln)
	c, err := Dial(t.Context(), "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			for j := range 200 {
				want := fmt.Sprint(i, "/", j)
				ctx, cancel := context.WithCancel(t.Context())
				if j%10 == 9 {
					go cancel()
				}
				actions, err := c.Notify(ctx, NewMessage("m", Arg{"", String(want)}))
				cancel()
				if err == context.Canceled && j%10 == 9 {
					continue
				}
				if err != nil || len(actions) != 1 || actions[0].Value.String() != want {
					t.Errorf("want %s, have %v, %v", want, actions, err)
					return
				}
			}
		})
	}
	wg.Wait()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func TestStart(t *testing.T) {
	ln := listenLocal(t)
	go scoreAgent(t, ln)
	c, err := Dial(t.Context(), "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	const chains, length = 20, 100
	ended := make(chan error, chains)
	for i := range chains {
		want := String(fmt.Sprint("chain ", i))
		m := NewMessage("m", Arg{"", want})
		n := 0
		var next func([]Action, error)
		next = func(actions []Action, err error) {
			if err == nil && (len(actions) != 1 || actions[0].Value.String() != want.String()) {
				err = fmt.Errorf("want %v, have %v", want, actions)
			}
			if n++; err == nil && n < length {
				err = c.Start(next, m)
			} else {
				ended <- err
				return
			}
			if err != nil {
				ended <- err
			}
		}
		if err := c.Start(next, m); err != nil {
			t.Fatal(err)
		}
	}
	for range chains {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// done may call Start even as the connection ends.
func TestStartAfterEnd(t *testing.T) {
	clientBubble(t, fullHello, func(t *testing.T, c *Client, s *script) {
		again := make(chan error, 1)
		err := c.Start(func(_ []Action, err error) {
			wantStatus(t, err, StatusIO, false)
			again <- c.Start(ignore, NewMessage("m"))
		}, NewMessage("m"))
		if err != nil {
			t.Fatal(err)
		}
		s.next()
		s.Close()
		wantStatus(t, <-again, StatusIO, false)
	})
}

func TestStartWindow(t *testing.T) {
	clientBubble(t, fullHello, func(t *testing.T, c *Client, s *script) {
		for range clientWindow {
			if err := c.Start(ignore, NewMessage("m")); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.Start(ignore, NewMessage("m")); err != errBusy {
			t.Errorf("want %v, have %v", errBusy, err)
		}
		for range clientWindow {
			s.next()
		}
	})
}

// Unix sockets and TLS are only other net.Conns.
func TestClientTransports(t *testing.T) {
	https := httptest.NewUnstartedServer(nil) // has a certificate, and clients that trust it
	https.StartTLS()
	defer https.Close()
	unix, err := net.Listen("unix", filepath.Join(t.TempDir(), "agent"))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close()
	plain := listenLocal(t)
	go scoreAgent(t, unix)
	go scoreAgent(t, tls.NewListener(plain, &tls.Config{Certificates: https.TLS.Certificates}))

	overUnix, err := Dial(t.Context(), "unix", unix.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	d := tls.Dialer{Config: https.Client().Transport.(*http.Transport).TLSClientConfig.Clone()}
	d.Config.ServerName = "example.com"
	conn, err := d.DialContext(t.Context(), "tcp", plain.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	overTLS, err := NewClient(t.Context(), conn)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []*Client{overUnix, overTLS} {
		actions, err := c.Notify(t.Context(), checkIP("192.0.2.1"))
		if want, have := "set-var sess.ip_score ipv4 192.0.2.1", show(actions); want != have || err != nil {
			t.Errorf("want %s, have %s, %v", want, have, err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}

func BenchmarkClient(b *testing.B) {
	// Nothing is decoded on the agent's side, to see the client.
	serve := func(conn net.Conn) {
		r := bufio.NewReaderSize(conn, lengthLimit)
		var f frame
		out := []byte(fullHello)
		for readFrame(r, &f, defaultFrameSize) == nil {
			if f.kind == frameNotify {
				out = appendAck(out, flagFIN, ids(f.stream, f.id), []byte(setScore))
			}
			if r.Buffered() == 0 {
				if _, err := conn.Write(out); err != nil {
					return
				}
				out = out[:0]
			}
		}
		conn.Close()
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go serve(conn)
		}
	}()
	dial := func(b *testing.B) *Client {
		c, err := Dial(b.Context(), "tcp", ln.Addr().String())
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { c.Close() })
		b.ReportAllocs()
		b.ResetTimer()
		return c
	}
	m := checkIP("192.0.2.1")
	b.Run("Notify", func(b *testing.B) {
		c := dial(b)
		for b.Loop() {
			if _, err := c.Notify(b.Context(), m); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("Start/20", func(b *testing.B) {
		c := dial(b)
		var wg sync.WaitGroup
		for i := range 20 {
			n := (b.N + i) / 20
			var next func([]Action, error)
			next = func(_ []Action, err error) {
				if n--; err != nil || n < 0 || c.Start(next, m) != nil {
					wg.Done()
				}
			}
			wg.Add(1)
			if err := c.Start(next, m); err != nil {
				b.Fatal(err)
			}
		}
		wg.Wait()
	})
}

func TestTrace(t *testing.T) {
	near, far := net.Pipe()
	var have []string
	conn := Trace(near, func(sent bool, frame string) {
		have = append(have, fmt.Sprint(sent, " ", frame))
	})
	said := fullHello + ackFrame(1, 1, setScore) + "HTTP/1.1 400"
	go func() {
		_, _ = io.WriteString(far, said)
		_, _ = io.Copy(io.Discard, far)
	}()
	for n := 0; n < len(said); { // frames in pieces
		k, err := conn.Read(make([]byte, 5))
		if err != nil {
			t.Fatal(err)
		}
		n += k
	}
	bye := appendDisconnect(nil, frameHAProxyDisconnect, StatusNormal, "bye")
	if _, err := conn.Write(bye); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	want := []string{
		`false AGENT-HELLO 0:0 version="2.0" max-frame-size="16380" capabilities="pipelining"`,
		`false ACK 1:1 set-var sess.ip_score int64 42`,
		`false no frame: "HTTP/1."`,
		`false no frame: "1 400"`,
		`true HAPROXY-DISCONNECT 0:0 status-code="0" message="bye"`,
	}
	for i, w := range want {
		if i >= len(have) || have[i] != w {
			t.Fatalf("want %q, have %q", want, have)
		}
	}
}

func TestParseMessage(t *testing.T) {
	ip := func(s string) Value { return Addr(netip.MustParseAddr(s)) }
	for _, tt := range []struct {
		text string
		want *Message
	}{
		{"ping", NewMessage("ping")},
		{"  ping  ", NewMessage("ping")},
		{"check-client-ip ip:192.0.2.1", NewMessage("check-client-ip", Arg{"", ip("192.0.2.1")})},
		{"m src=ip:2001:db8::1  n=null null str:a=b:c", NewMessage("m", Arg{"src", ip("2001:db8::1")}, Arg{"n", Value{}}, Arg{}, Arg{"", String("a=b:c")})},
		{`m null s=str:"two \"words\"" x=bin:"\x00" str:"" str:`, NewMessage("m", Arg{}, Arg{"s", String(`two "words"`)}, Arg{"x", Binary([]byte{0})}, Arg{"", String("")}, Arg{"", String("")})},
		{"m bool:true bool:false int:-3 int64:4 int32:-5 uint32:6 uint64:18446744073709551615 bin:b hex:00ff",
			NewMessage("m", Arg{"", Bool(true)}, Arg{"", Bool(false)}, Arg{"", Int64(-3)}, Arg{"", Int64(4)}, Arg{"", Int32(-5)}, Arg{"", Uint32(6)},
				Arg{"", Uint64(math.MaxUint64)}, Arg{"", Binary([]byte("b"))}, Arg{"", Binary([]byte{0, 255})})},
	} {
		m, err := ParseMessage(tt.text)
		if err != nil || !bytes.Equal(appendMessage(nil, tt.want), appendMessage(nil, m)) {
			t.Errorf("%s: want %s %v, have %v, error %v", tt.text, tt.want.Name(), argsOf(tt.want), m, err)
		}
	}
	for text, want := range map[string]string{
		"":                                 "want a name",
		"m x":                              `argument 0: "x": want [NAME=]TYPE:VALUE`,
		"m x str:y":                        `argument 0: "x": want [NAME=]TYPE:VALUE`,
		"m int:1 a=b":                      `argument 1: "a=b": want [NAME=]TYPE:VALUE`,
		"m int:x":                          `argument 0: "int:x": want an integer from -2^63 to 2^63-1`,
		"m int32:2147483648":               "want an integer from -2^31 to 2^31-1",
		"m uint32:-1":                      "want an integer from 0 to 2^32-1",
		"m uint64:18446744073709551616":    "want an integer from 0 to 2^64-1",
		"m bool:1":                         "want true or false",
		"m ip:localhost":                   "want an address",
		"m hex:0":                          "want an even number of hexadecimal digits",
		"m null:":                          `"null:": want [NAME=]TYPE:VALUE`,
		"m a=null:x":                       `"a=null:x": want [NAME=]TYPE:VALUE`,
		"m ip:fe80::1%lo":                  "want an address",
		"m float:1":                        `no type "float"`,
		`m str:"a"b`:                       "want a space",
		"m" + strings.Repeat(" null", 256): "more than 255 arguments",
	} {
		if m, err := ParseMessage(text); err == nil || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), "spoa: ParseMessage: ") {
			t.Errorf("%.40s: want an error with %s, have %v, %v", text, want, m, err)
		}
	}
	defer func() {
		if recover() == nil {
			t.Error("MustParseMessage: want a panic, have none")
		}
	}()
	MustParseMessage("")
}

func TestAckLookup(t *testing.T) {
	ack := Ack{{Scope: ScopeSess, Name: "v", Value: Int(1)}, {Scope: ScopeTxn, Name: "v", Unset: true}, {Scope: ScopeSess, Name: "v", Value: Int(2)},
		{Scope: ScopeSess, Name: "w", Value: Int(3)}, {Scope: ScopeSess, Name: "w", Unset: true}}
	for _, tt := range []struct {
		scope Scope
		name  string
		want  Value
		ok    bool
	}{{ScopeSess, "v", Int(2), true}, {ScopeTxn, "v", Value{}, false}, {ScopeSess, "w", Value{}, false}, {ScopeReq, "v", Value{}, false}} {
		if v, ok := ack.Lookup(tt.scope, tt.name); ok != tt.ok || !v.Equal(tt.want) {
			t.Errorf("%v.%s: want %v %v, have %v %v", tt.scope, tt.name, tt.want, tt.ok, v, ok)
		}
	}
}
