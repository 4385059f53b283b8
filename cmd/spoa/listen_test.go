//go:build unix

package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spoa-go/spoa"
)

func TestUnixSocket(t *testing.T) {
	dir := shortTempDir(t)
	path := filepath.Join(dir, "s")
	l, err := listen("unix:"+path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	fi, err := os.Lstat(path)
	if want := fs.ModeSocket | 0o600; err != nil || fi.Mode() != want {
		t.Errorf("want %v, have %v, %v", want, fi.Mode(), err)
	}
	if _, err := listen("unix:"+path, 0o600); err == nil || !strings.Contains(err.Error(), "another process listens") {
		t.Errorf("want a live socket left alone, have %v", err)
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()

	l.(*net.UnixListener).SetUnlinkOnClose(false) // as if killed
	l.Close()
	if l, err = listen("unix:"+path, 0o666); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Lstat(path); err != nil || fi.Mode().Perm() != 0o666 {
		t.Errorf("want a dead socket replaced, have %v, %v", fi, err)
	}
	l.Close()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("want the socket removed, have %v", err)
	}

	writeFile(t, path, "precious")
	if _, err := listen("unix:"+path, 0o666); err == nil {
		t.Error("want no file replaced")
	}
	if b, err := os.ReadFile(path); string(b) != "precious" {
		t.Errorf("want the file untouched, have %q, %v", b, err)
	}
}

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
	a.await(t, `(?s)(msg=listening.*){3}`)
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

func TestAccess(t *testing.T) {
	for _, tc := range []struct {
		addr string
		c    config
		want string
	}{
		{"127.0.0.1:0", config{}, "this machine only"},
		{"unix:" + filepath.Join(shortTempDir(t), "s"), config{clientCA: "ca"}, "this machine only"},
		{"0.0.0.0:0", config{}, "SPOP has no authentication"},
		{"0.0.0.0:0", config{cert: "x"}, "TLS without -tls-client-ca"},
		{"0.0.0.0:0", config{cert: "x", clientCA: "ca.pem"}, "clients with a certificate of ca.pem"},
	} {
		l, err := listen(tc.addr, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if have := access(l, &tc.c); !strings.Contains(have, tc.want) {
			t.Errorf("%s: want %q, have %q", tc.addr, tc.want, have)
		}
		l.Close()
	}
}

// authority makes certificates, of this test only.
type authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, dir, name string) *authority {
	a := &authority{dir: dir}
	a.cert, a.key = a.issue(t, name, "")
	return a
}

// issue writes DIR/NAME.pem, with certificate and key as HAProxy wants it.
func (a *authority) issue(t *testing.T, name, host string) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	parent, signer := a.cert, a.key
	if host == "" {
		tmpl.IsCA, tmpl.BasicConstraintsValid, tmpl.KeyUsage, tmpl.ExtKeyUsage = true, true, x509.KeyUsageCertSign, nil
		parent, signer = tmpl, key
	} else {
		tmpl.IPAddresses = []net.IP{net.ParseIP(host)}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	priv, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: der})
	pem.Encode(&b, &pem.Block{Type: "PRIVATE KEY", Bytes: priv})
	if err := os.WriteFile(a.file(name), b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func (a *authority) file(name string) string { return filepath.Join(a.dir, name+".pem") }

// client returns the TLS of somebody who trusts a, with that certificate unless name is empty.
func (a *authority) client(t *testing.T, name string) *tls.Config {
	t.Helper()
	conf := &tls.Config{RootCAs: x509.NewCertPool(), ServerName: "127.0.0.1"}
	conf.RootCAs.AddCert(a.cert)
	if name != "" {
		pair, err := tls.LoadX509KeyPair(a.file(name), a.file(name))
		if err != nil {
			t.Fatal(err)
		}
		conf.Certificates = []tls.Certificate{pair}
	}
	return conf
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
	ours, theirs := newAuthority(t, dir, "ca"), newAuthority(t, dir, "stranger-ca")
	ours.issue(t, "agent", "127.0.0.1")
	ours.issue(t, "haproxy", "127.0.0.1")
	theirs.issue(t, "stranger", "127.0.0.1")
	path := filepath.Join(dir, "s")

	a := startAgent(t, "127.0.0.1:0", "-tls-cert", ours.file("agent"), "-tls-key", ours.file("agent"), "-tls-client-ca", ours.file("ca"),
		"-listen", "unix:"+path, "-drain", "10ms", "-metrics", "unix:"+filepath.Join(dir, "m"))
	a.await(t, `access="clients with a certificate of `)
	if err := probe(t, a.addr, ours.client(t, "haproxy")); err != nil {
		t.Errorf("want HAProxy let in, have %v", err)
	}
	if err := spoa.Check(t.Context(), "unix", path); err != nil {
		t.Errorf("want no TLS on a unix socket, have %v", err)
	}
	strange := ours.client(t, "")
	strange.Certificates = theirs.client(t, "stranger").Certificates
	for name, conf := range map[string]*tls.Config{"nobody": ours.client(t, ""), "a stranger": strange} {
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
	writeFile(t, ours.file("agent"), "rubbish")
	a.cmd.Process.Signal(syscall.SIGHUP)
	metric(`spoa_certificate_reloads_total{result="failed"} 1`)
	a.await(t, `level=error msg="certificates not reloaded`)
	if err := probe(t, a.addr, ours.client(t, "haproxy")); err != nil {
		t.Errorf("want the old certificate in force, have %v", err)
	}
	theirs.issue(t, "agent", "127.0.0.1") // of another authority
	a.cmd.Process.Signal(syscall.SIGHUP)
	metric(`spoa_certificate_reloads_total{result="ok"} 1`)
	if err := probe(t, a.addr, theirs.client(t, "")); err == nil || strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("want the new certificate known and the client refused, have %v", err)
	}
	if err := probe(t, a.addr, ours.client(t, "haproxy")); err == nil || !strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("want the new certificate in force, have %v", err)
	}
	a.shutdown(t)
}

func TestCertificates(t *testing.T) {
	dir := t.TempDir()
	ca := newAuthority(t, dir, "ca")
	leaf, _ := ca.issue(t, "agent", "127.0.0.1")
	pem := ca.file("agent")
	writeFile(t, filepath.Join(dir, "empty"), "")
	certs, err := (&config{cert: pem, key: pem}).certificates()
	if err != nil || !certs.expiry().Equal(leaf.NotAfter) || certs.current.Load().ClientAuth != tls.NoClientCert {
		t.Errorf("want %v and no client asked for a certificate, have %v", leaf.NotAfter, err)
	}
	for _, c := range []config{
		{cert: pem, key: filepath.Join(dir, "absent")},
		{cert: pem, key: ca.file("ca")},
		{cert: pem, key: pem, clientCA: filepath.Join(dir, "absent")},
		{cert: pem, key: pem, clientCA: filepath.Join(dir, "empty")},
	} {
		if _, err := c.certificates(); err == nil || !strings.Contains(err.Error(), "-tls-") {
			t.Errorf("%+v: want an error naming the flag, have %v", c, err)
		}
	}
	if c, err := new(config).certificates(); c != nil || err != nil {
		t.Errorf("want none, have %v, %v", c, err)
	}
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
		p.await(t, fmt.Sprintf(`(?s)(msg=listening.*){%d}`, 2+len(args)/5))
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

func TestListenersAllOrNone(t *testing.T) {
	c := &config{listen: stringList{"127.0.0.1:0", "unix:/nonexistent/x"}}
	if l, _, err := c.listeners(nil); err == nil || len(l) != 1 {
		t.Fatalf("want an error, have %v, %v", l, err)
	} else if _, err := l[0].Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("want the first listener closed again, have %v", err)
	}
}
