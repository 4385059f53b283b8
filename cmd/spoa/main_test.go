//go:build unix

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-kit/log"
	"github.com/spoa-go/spoa"
	"github.com/spoa-go/spoa/cmd/internal/certtest"
)

// cli runs the command to its end, within this process.
func cli(args ...string) (exit int, stdout, stderr string) {
	var out, err bytes.Buffer
	exit = realMain(args, &out, &err)
	return exit, out.String(), err.String()
}

// uncounted counts no verdict.
type uncounted struct{}

func (uncounted) Judged(string, bool) {}
func (uncounted) WouldDeny()          {}

// serveConfig runs the agent that the flags describe, and returns its address.
func serveConfig(t *testing.T, logger log.Logger, args ...string) string {
	t.Helper()
	c, err := parse(args, nil)
	if err != nil {
		t.Fatal(err)
	}
	j, err := c.judge.Open(t.Context(), logger)
	if err != nil {
		t.Fatal(err)
	}
	agent := newAgent(c, logger, j.Handler(c.delay, uncounted{}), spoa.Hooks{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- agent.Serve(l) }()
	t.Cleanup(func() {
		agent.Close()
		if err := <-served; !errors.Is(err, spoa.ErrAgentClosed) {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

// appendText appends a length as SPOP has it, and the text.
func appendText(b []byte, s string) []byte {
	n := len(s)
	if n < 240 {
		return append(append(b, byte(n)), s...)
	}
	b = append(b, byte(n)|240)
	for n = (n - 240) >> 4; n >= 128; n = (n - 128) >> 7 {
		b = append(b, byte(n)|128)
	}
	return append(append(b, byte(n)), s...)
}

// appendPair appends a name, and a string as its value.
func appendPair(b []byte, name, value string) []byte {
	return appendText(append(appendText(b, name), 8), value)
}

// hello says a HAPROXY-HELLO and returns the payload of the answer as text.
func hello(t *testing.T, addr, capabilities, engineID string) (net.Conn, string) {
	t.Helper()
	return helloOf(t, addr, "2.0", capabilities, engineID)
}

func helloOf(t *testing.T, addr, versions, capabilities, engineID string) (net.Conn, string) {
	t.Helper()
	b := []byte{1, 0, 0, 0, 1, 0, 0} // type, flags with FIN, no ids
	b = appendPair(b, "supported-versions", versions)
	b = append(appendText(b, "max-frame-size"), 3, 0xfc, 0xf0, 0x06) // 16380
	b = appendPair(b, "capabilities", capabilities)
	b = appendPair(b, "engine-id", engineID)
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(patience))
	if _, err := nc.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)); err != nil {
		t.Fatal(err)
	}
	var size [4]byte
	if _, err := io.ReadFull(nc, size[:]); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, binary.BigEndian.Uint32(size[:]))
	if _, err := io.ReadFull(nc, answer); err != nil {
		t.Fatal(err)
	}
	return nc, string(answer[7:])
}

func TestCapabilities(t *testing.T) {
	for args, want := range map[string]string{
		"":                                 "\x0apipelining",
		"-c pipelining":                    "\x0apipelining",
		"-c async":                         "\x10pipelining,async",
		"-c fragmentation":                 "\x18pipelining,fragmentation",
		"-c async -c fragmentation -c odd": "\x1epipelining,async,fragmentation",
	} {
		var out transcript
		addr := serveConfig(t, log.NewLogfmtLogger(&out), strings.Fields(args)...)
		if _, answer := hello(t, addr, "pipelining,async,fragmentation", "me"); !strings.HasSuffix(answer, want) {
			t.Errorf("%q: want %q, have %q", args, want, answer)
		}
		warned := strings.Contains(out.String(), `level=warn msg="unknown capability" capability=odd`)
		if warned != strings.Contains(args, "odd") {
			t.Errorf("%q: want a warning of unknown ones alone, have %q", args, out.String())
		}
	}
}

func TestFrameSizeAndRotation(t *testing.T) {
	addr := serveConfig(t, log.NewNopLogger(), "-m", "1000", "-f", "3")
	c, err := spoa.Dial(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if have := c.Hello().MaxFrameSize; have != 1000 {
		t.Errorf("want frames of 1000 bytes, have %d", have)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	m := spoa.NewMessage(message, spoa.Arg{Value: spoa.Addr(netip.MustParseAddr("192.0.2.1"))})
	n := 0
	for ; err == nil && n < 100; n++ {
		var actions []spoa.Action
		actions, err = c.Notify(ctx, m)
		if err == nil && (len(actions) != 1 || actions[0].Name != "ip_score" || actions[0].Scope != spoa.ScopeSess) {
			t.Errorf("want a score, have %v", actions)
		}
	}
	var d *spoa.DisconnectError
	if n != 4 || !errors.As(err, &d) || !d.Remote || d.Status != spoa.StatusNormal {
		t.Errorf("want the connection closed after 3, have %d answered and %v", n-1, err)
	}
}

// What cannot be judged is said in the answer, too.
func TestFaultVariable(t *testing.T) {
	addr := serveConfig(t, log.NewNopLogger())
	c, err := spoa.Dial(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for name, want := range map[string]string{message: "error", "another": "no-handler"} {
		actions, err := c.Notify(t.Context(), spoa.NewMessage(name))
		if err != nil || len(actions) != 1 || actions[0].Scope != spoa.ScopeTxn || actions[0].Name != "ip_fault" || actions[0].Value.String() != want {
			t.Errorf("%s: want txn.ip_fault %s, have %v, %v", name, want, actions, err)
		}
	}
}

// pipes is a listener within a synctest bubble.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { close(p.done); return nil }
func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Net: "pipe"} }

// No more than -n handlers run at once.
func TestWorkers(t *testing.T) {
	c, err := parse([]string{"-n", "3"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		var running atomic.Int64
		leave := make(chan struct{})
		agent := newAgent(c, log.NewNopLogger(), func(context.Context, *spoa.Message, *spoa.Actions) error {
			running.Add(1)
			defer running.Add(-1)
			<-leave
			return nil
		}, spoa.Hooks{})
		l := &pipes{make(chan net.Conn), make(chan struct{})}
		go agent.Serve(l)
		ours, theirs := net.Pipe()
		l.conns <- theirs
		client, err := spoa.NewClient(t.Context(), ours)
		if err != nil {
			t.Fatal(err)
		}
		answered := make(chan error, 10)
		for range 10 {
			if err := client.Start(func(_ []spoa.Action, err error) { answered <- err }, spoa.NewMessage(message)); err != nil {
				t.Fatal(err)
			}
		}
		<-time.After(time.Second) // of the bubble: all that can run does
		if n := running.Load(); n != 3 {
			t.Errorf("want 3 handlers at once, have %d", n)
		}
		close(leave)
		for range 10 {
			if err := <-answered; err != nil {
				t.Error(err)
			}
		}
		client.Close()
		agent.Close()
	})
}

// Processes, with signals

func TestSignals(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		a := startAgent(t, "127.0.0.1:0")
		a.await(t, `access="this machine only"`)
		if err := a.stop(sig); err != nil {
			t.Errorf("%v: want status 0, have %v", sig, err)
		}
		a.said(t, `msg=ended`)
	}
}

// asCommand returns this test binary as the command.
func asCommand(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), asAgent+"=1")
	return cmd
}

// said expects that a process that has ended said that.
func (p *process) said(t *testing.T, re string) {
	t.Helper()
	if !regexp.MustCompile(re).MatchString(p.out.String()) {
		t.Errorf("want %q said, have %q", re, p.out.String())
	}
}

// An answer under way holds a drain up, until a second signal.
func TestSecondSignal(t *testing.T) {
	dir := shortTempDir(t)
	sock := filepath.Join(dir, "s")
	a := startAgent(t, "unix:"+sock, "-t", "1h", "-drain", "1h", "-metrics", "unix:"+filepath.Join(dir, "m"))
	c, err := spoa.Dial(t.Context(), "unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	failed := make(chan error, 1)
	if err := c.Start(func(_ []spoa.Action, err error) { failed <- err }, spoa.NewMessage(message)); err != nil {
		t.Fatal(err)
	}
	web := unixClient(filepath.Join(dir, "m"))
	eventually(t, "the NOTIFY to arrive", func() bool { return strings.Contains(fetch(t, web, "/metrics"), "spoa_notifies_in_flight 1") })
	if have := fetch(t, web, "/readyz"); have != "200 ready\n" {
		t.Errorf("want ready, have %q", have)
	}
	if err := a.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the drain", func() bool { return fetch(t, web, "/readyz") == "503 draining\n" })
	if have := fetch(t, web, "/healthz"); have != "200 ok\n" {
		t.Errorf("want alive, have %q", have)
	}
	if err := a.stop(syscall.SIGINT); err != nil {
		t.Errorf("want status 0, have %v", err)
	}
	a.said(t, `level=warn msg="second signal`)
	<-failed // by the connection's end, or by the handler's just before
	if left, _ := filepath.Glob(dir + "/*"); len(left) > 0 {
		t.Errorf("want the sockets removed, have %v", left)
	}
}

// -drain bounds how long an answer under way may hold the end up.
func TestDrainFlag(t *testing.T) {
	a := startAgent(t, "127.0.0.1:0", "-t", "1h", "-drain", "10ms")
	c, err := spoa.Dial(t.Context(), "tcp", a.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Start(func([]spoa.Action, error) {}, spoa.NewMessage(message)); err != nil {
		t.Fatal(err)
	}
	a.shutdown(t)
}

func TestHUP(t *testing.T) {
	dir := shortTempDir(t)
	list, notify := filepath.Join(dir, "list"), filepath.Join(dir, "n")
	writeFile(t, list, "192.0.2.1 5\n")
	before, err := os.Stat(list)
	if err != nil {
		t.Fatal(err)
	}
	systemd, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer systemd.Close()
	said := func(want string) {
		t.Helper()
		b := make([]byte, 1000)
		systemd.SetDeadline(time.Now().Add(patience))
		n, err := systemd.Read(b)
		if err != nil || !regexp.MustCompile(`^`+want+`$`).Match(b[:n]) {
			t.Fatalf("want systemd told %q, have %q, %v", want, b[:n], err)
		}
	}
	t.Setenv("NOTIFY_SOCKET", notify)
	a := startAgent(t, "127.0.0.1:0", "-reputation", list+",column=score")
	said(`READY=1`)
	score := func() string {
		c, err := spoa.Dial(t.Context(), "tcp", a.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		actions, err := c.Notify(t.Context(), spoa.NewMessage(message, spoa.Arg{Value: spoa.Addr(netip.MustParseAddr("192.0.2.1"))}))
		if err != nil {
			t.Fatal(err)
		}
		s := ""
		for _, x := range actions {
			s += x.Name + "=" + x.Value.String() + " "
		}
		return s
	}
	if want, have := "ip_score=5 ip_list=list ", score(); want != have {
		t.Errorf("want %q, have %q", want, have)
	}
	// Written so that only being told can make it read.
	f, err := os.OpenFile(list, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(f, "192.0.2.1 6")
	f.Close()
	if err := os.Chtimes(list, time.Time{}, before.ModTime()); err != nil {
		t.Fatal(err)
	}
	if err := a.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	said(`RELOADING=1\nMONOTONIC_USEC=\d+\n?`)
	said(`READY=1`)
	if want, have := "ip_score=6 ip_list=list ", score(); want != have {
		t.Errorf("want %q, have %q", want, have)
	}
	// And a file that changes is read without a signal.
	writeFile(t, list, "192.0.2.1 77\n")
	a.awaitTimes(t, `msg="list loaded"`, 3)
	if want, have := "ip_score=77 ip_list=list ", score(); want != have {
		t.Errorf("want %q, have %q", want, have)
	}
	a.shutdown(t)
	said(`STOPPING=1`)
}

// A file that hangs, here a FIFO without a writer, keeps no signal from ending the agent.
func TestHangingFile(t *testing.T) {
	dir := shortTempDir(t)
	ca := certtest.New(t, dir, "ca")
	ca.Issue(t, "agent", "127.0.0.1")
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	p := startProcess(t, asCommand(t, "-listen", "127.0.0.1:0", "-tls-cert", ca.File("agent"), "-tls-key", fifo, "-log-level", "debug"), syscall.SIGKILL)
	p.await(t, `msg="opening`)
	if err := p.stop(syscall.SIGTERM); err != nil {
		t.Errorf("at the start: want status 0, have %v", err)
	}
	key := filepath.Join(dir, "key")
	if err := os.Symlink(ca.File("agent"), key); err != nil {
		t.Fatal(err)
	}
	a := startAgent(t, "127.0.0.1:0", "-tls-cert", ca.File("agent"), "-tls-key", key)
	if err := os.Remove(key); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(fifo, key); err != nil {
		t.Fatal(err)
	}
	if err := a.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	a.await(t, `msg=reloading`)
	if err := probe(t, a.addr, ca.Client(t, "")); err != nil {
		t.Errorf("want answers while a file hangs, have %v", err)
	}
	a.shutdown(t)
}

// An answer that is late is given up for one that says so.
func TestHandlerTimeout(t *testing.T) {
	addr := serveConfig(t, log.NewNopLogger(), "-t", "1h", "-handler-timeout", "10ms")
	c, err := spoa.Dial(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	actions, err := c.Notify(ctx, spoa.NewMessage(message, spoa.Arg{Value: spoa.Addr(netip.MustParseAddr("192.0.2.1"))}))
	if err != nil || len(actions) != 1 || actions[0].Name != "ip_fault" || actions[0].Value.String() != "timeout" {
		t.Errorf("want txn.ip_fault timeout alone, have %v, %v", actions, err)
	}
	for args, want := range map[string]time.Duration{
		"": 0, "-crowdsec http://127.0.0.1:1 -crowdsec-key key -mmdb file": 0, "-dnsbl bl.example.org": 500 * time.Millisecond, "-t 2s": 2500 * time.Millisecond, "-t 2s -handler-timeout 15ms": 15 * time.Millisecond, "-handler-timeout 0s": 0,
	} {
		if c, err := parse(strings.Fields(args), nil); err != nil || c.timeout() != want {
			t.Errorf("%q: want %v, have %v, %v", args, want, c.timeout(), err)
		}
	}
}

// Whoever reads the log may end or stand still, also while every frame is logged
// and HAProxy asks on: answers go on, and so does the end.
func TestLogReader(t *testing.T) {
	for name, gone := range map[string]bool{"ends": true, "stands still": false} {
		t.Run(name, func(t *testing.T) {
			dir := shortTempDir(t)
			sock, web, list := filepath.Join(dir, "s"), filepath.Join(dir, "m"), filepath.Join(dir, "list")
			writeFile(t, list, "192.0.2.1\n")
			cmd, ended := startUnread(t, gone, "-listen", "unix:"+sock, "-metrics", "unix:"+web, "-d", "-log-level", "debug",
				"-drain", "100ms", "-reputation", list, "-reputation", chatty(t))
			eventually(t, "an agent", func() bool { return spoa.Check(t.Context(), "unix", sock) == nil })
			var answered atomic.Int64
			var load sync.WaitGroup
			for range 4 {
				load.Go(func() { askOn(t, sock, &answered) })
			}
			eventually(t, "answers", func() bool { return answered.Load() > 1000 }) // each is a line of 4 kB and more
			if !regexp.MustCompile(`(?m)^spoa_log_lines_dropped_total [1-9]`).MatchString(fetch(t, unixClient(web), "/metrics")) {
				t.Error("want lines dropped and counted")
			}
			writeFile(t, list, "192.0.2.1\n192.0.2.2\n")
			if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the list", func() bool {
				return strings.Contains(fetch(t, unixClient(web), "/metrics"), `kind="reputation",list="list"} 2`)
			})
			before := answered.Load()
			eventually(t, "more answers", func() bool { return answered.Load() > before+1000 })
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			select {
			case err := <-ended:
				if err != nil {
					t.Errorf("want status 0, have %v", err)
				}
			case <-time.After(patience):
				t.Error("want the end after SIGTERM")
				cmd.Process.Kill()
			}
			load.Wait()
		})
	}
}

// chatty is the URL of a list whose server says more than it was asked for.
func chatty(t *testing.T) string {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		nc, b, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer nc.Close()
		b.WriteString("HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n198.51.100.1\r\n\x1b[31mmore\n\xff")
		b.Flush()
		io.Copy(io.Discard, nc) // until the client closes
	}))
	t.Cleanup(server.Close)
	return server.URL + "/chatty.txt"
}

// startUnread runs the command with a standard error that is closed, or that nobody
// reads.
func startUnread(t *testing.T, closed bool, args ...string) (cmd *exec.Cmd, ended <-chan error) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	t.Cleanup(func() { r.Close() })
	if closed {
		r.Close()
	}
	cmd = asCommand(t, args...)
	cmd.Stderr = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	t.Cleanup(func() { cmd.Process.Kill() })
	return cmd, done
}

// askOn sends NOTIFYs until the agent closes the connection, and counts the answers.
func askOn(t *testing.T, sock string, answered *atomic.Int64) {
	c, err := spoa.Dial(t.Context(), "unix", sock)
	if err != nil {
		t.Error(err)
		return
	}
	defer c.Close()
	m := spoa.NewMessage(message, spoa.Arg{Name: "ip", Value: spoa.Addr(netip.MustParseAddr("192.0.2.1"))},
		spoa.Arg{Value: spoa.String(strings.Repeat("x", 4000))})
	for {
		if _, err := c.Notify(t.Context(), m); err != nil {
			return
		}
		answered.Add(1)
	}
}

func TestJSONLog(t *testing.T) {
	p := startProcess(t, asCommand(t, "-listen", "127.0.0.1:0", "-log-format", "json", "-c", "odd"), syscall.SIGKILL)
	p.await(t, `"msg":"listening"`)
	if err := p.stop(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	for line := range strings.Lines(p.out.String()) {
		var v struct{ TS, Level, Msg, Addr string }
		if err := json.Unmarshal([]byte(line), &v); err != nil || v.TS == "" || v.Level == "" || v.Msg == "" {
			t.Errorf("want JSON, have %q, %v", line, err)
		}
		if _, err := netip.ParseAddrPort(v.Addr); v.Msg == "listening" && err != nil {
			t.Errorf("want an address, have %q", line)
		}
	}
}

func writeFile(t *testing.T, path, data string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
		t.Fatal(err)
	}
}
