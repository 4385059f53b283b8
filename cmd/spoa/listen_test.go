//go:build unix

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/spoa-go/spoa"
	"github.com/spoa-go/spoa/cmd/internal/certtest"
)

// What a killed agent leaves behind does not keep the next one from starting, and modes come from -unix-mode.
func TestUnixAfterKill(t *testing.T) {
	path := filepath.Join(shortTempDir(t), "s")
	a := startAgent(t, "unix:"+path, "-unix-mode", "0606")
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o606 {
		t.Errorf("want mode 0606, have %v, %v", fi, err)
	}
	if status, _, stderr := cli("-listen", "unix:"+path); status != 1 || !strings.Contains(stderr, "another process listens") {
		t.Errorf("want a second agent refused, have %d, %q", status, stderr)
	}
	a.stop(syscall.SIGKILL)
	if _, err := os.Stat(path); err != nil {
		t.Fatal("want the socket left behind", err)
	}
	a = startAgent(t, "unix:"+path, "-drain", "10ms")
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o660 {
		t.Errorf("want mode 0660, have %v, %v", fi, err)
	}
	if err := spoa.Check(t.Context(), "unix", path); err != nil {
		t.Error(err)
	}
	a.shutdown(t)
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("want the socket removed, have %v", err)
	}
}

func TestSeveralListeners(t *testing.T) {
	path := filepath.Join(shortTempDir(t), "s")
	a := startAgent(t, "127.0.0.1:0", "-listen", "unix:"+path, "-listen", "127.0.0.1:0", "-drain", "10ms")
	a.awaitTimes(t, "msg=listening", 3)
	if err := spoa.Check(t.Context(), "tcp", a.addr); err != nil {
		t.Error(err)
	}
	if err := spoa.Check(t.Context(), "unix", path); err != nil {
		t.Error(err)
	}
	a.shutdown(t)
}

// The default is the port of -p, on this machine only.
func TestDefaultAddress(t *testing.T) {
	addr := freeAddr(t, "127.0.0.1")
	_, port, _ := net.SplitHostPort(addr)
	p := startProcess(t, asCommand(t, "-p", port), syscall.SIGKILL)
	p.await(t, `msg=listening addr=127\.0\.0\.1:`+port+` access="this machine only"`)
}

// probe is a health check over TLS.
func probe(t *testing.T, addr string, conf *tls.Config) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	nc, err := (&tls.Dialer{Config: conf}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	_, err = spoa.Probe(ctx, nc)
	return err
}

func TestTLS(t *testing.T) {
	dir := shortTempDir(t)
	ours, theirs := certtest.New(t, dir, "ca"), certtest.New(t, dir, "stranger-ca")
	ours.Issue(t, "agent", "127.0.0.1")
	ours.Issue(t, "haproxy", "127.0.0.1")
	theirs.Issue(t, "stranger", "127.0.0.1")
	path := filepath.Join(dir, "s")

	a := startAgent(t, "127.0.0.1:0", "-tls-cert", ours.File("agent"), "-tls-key", ours.File("agent"), "-tls-client-ca", ours.File("ca"),
		"-listen", "unix:"+path, "-drain", "10ms", "-metrics", "unix:"+filepath.Join(dir, "m"))
	a.await(t, `access="clients with a certificate of `)
	if err := probe(t, a.addr, ours.Client(t, "haproxy")); err != nil {
		t.Errorf("want HAProxy let in, have %v", err)
	}
	if err := spoa.Check(t.Context(), "unix", path); err != nil {
		t.Errorf("want no TLS on a unix socket, have %v", err)
	}
	strange := ours.Client(t, "")
	strange.Certificates = theirs.Client(t, "stranger").Certificates
	for name, conf := range map[string]*tls.Config{"nobody": ours.Client(t, ""), "a stranger": strange} {
		if err := probe(t, a.addr, conf); err == nil {
			t.Errorf("want %s refused", name)
		}
	}
	if err := spoa.Check(t.Context(), "tcp", a.addr); err == nil {
		t.Error("want plain SPOP refused")
	}

	// A signal changes the certificates, for new connections, unless they are bad.
	metric := func(want string) {
		t.Helper()
		eventually(t, want, func() bool {
			return strings.Contains(fetch(t, unixClient(filepath.Join(dir, "m")), "/metrics"), want)
		})
	}
	metric(`spoa_faults_total{by="",code="network"} 3`)
	writeFile(t, ours.File("agent"), "rubbish")
	a.cmd.Process.Signal(syscall.SIGHUP)
	metric(`spoa_certificate_reloads_total{result="failed"} 1`)
	a.await(t, `level=error msg="certificates not reloaded`)
	if err := probe(t, a.addr, ours.Client(t, "haproxy")); err != nil {
		t.Errorf("want the old certificate in force, have %v", err)
	}
	theirs.Issue(t, "agent", "127.0.0.1") // of another authority
	a.cmd.Process.Signal(syscall.SIGHUP)
	metric(`spoa_certificate_reloads_total{result="ok"} 1`)
	if err := probe(t, a.addr, theirs.Client(t, "")); err == nil || strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("want the new certificate known and the client refused, have %v", err)
	}
	if err := probe(t, a.addr, ours.Client(t, "haproxy")); err == nil || !strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("want the new certificate in force, have %v", err)
	}
	a.shutdown(t)
}

// passed starts the agent as systemd does, with these sockets from descriptor 3 on.
func passed(t *testing.T, files []*os.File, args ...string) *process {
	t.Helper()
	cmd := asCommand(t, args...)
	// LISTEN_PID is the agent's own, which only a shell that becomes the agent knows.
	cmd.Args = append([]string{"sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, cmd.Path}, args...)
	cmd.Path = "/bin/sh"
	cmd.ExtraFiles = files
	cmd.Env = append(cmd.Env, "LISTEN_FDS="+string(rune('0'+len(files))))
	return startProcess(t, cmd, syscall.SIGKILL)
}

// socketFile returns a socket that listens, for another process.
func socketFile(t *testing.T, network, addr string) (f *os.File, at string) {
	t.Helper()
	l, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false)
	}
	if f, err = l.(interface{ File() (*os.File, error) }).File(); err != nil {
		t.Fatal(err)
	}
	l.Close()
	t.Cleanup(func() { f.Close() })
	return f, l.Addr().String()
}

func TestSystemdSockets(t *testing.T) {
	path := filepath.Join(shortTempDir(t), "s")
	tcp, addr := socketFile(t, "tcp", "127.0.0.1:0")
	sock, _ := socketFile(t, "unix", path)
	for _, args := range [][]string{{"-drain", "10ms"}, {"-drain", "10ms", "-listen", "systemd", "-listen", "127.0.0.1:0"}} {
		p := passed(t, []*os.File{tcp, sock}, args...)
		p.awaitTimes(t, "msg=listening", 2+len(args)/5)
		if err := spoa.Check(t.Context(), "tcp", addr); err != nil {
			t.Error(err)
		}
		if err := spoa.Check(t.Context(), "unix", path); err != nil {
			t.Error(err)
		}
		if err := p.stop(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(path); err != nil {
			t.Errorf("want systemd's socket left, have %v", err)
		}
	}
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	f, err := udp.(*net.UDPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := passed(t, []*os.File{f})
	<-p.ctx.Done()
	p.said(t, `^spoa: socket 0 passed by systemd is not a stream socket`)
}
