//go:build unix

package listen

import (
	"crypto/tls"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spoa-go/spoa/cmd/internal/certtest"
)

// shortTempDir returns a directory whose path leaves room for a socket's name.
func shortTempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "spoa")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestAddrFlag(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want Addr // zero: refused
	}{
		{"127.0.0.1:0", Addr{"tcp", "127.0.0.1:0"}},
		{":12345", Addr{"tcp", ":12345"}},
		{"[::1]:12345", Addr{"tcp", "[::1]:12345"}},
		{"unix:/run/a.sock", Addr{"unix", "/run/a.sock"}},
		{"systemd", Addr{Network: "systemd"}},
		{"12345", Addr{}},
		{"127.0.0.1", Addr{}},
		{"127.0.0.1:http", Addr{}},
		{"127.0.0.1:65536", Addr{}},
		{"127.0.0.1:", Addr{}},
		{"unix:", Addr{}},
		{"", Addr{}},
	} {
		var all Addrs
		err := all.Set(tc.in)
		if tc.want == (Addr{}) {
			if err == nil || len(all) > 0 || err.Error() != "want host:port or unix:/path, or systemd" {
				t.Errorf("%q: want the right form in the error, have %v, %v", tc.in, all, err)
			}
			continue
		}
		if err != nil || len(all) != 1 || all[0] != tc.want || all.String() != tc.in {
			t.Errorf("%q: want %v, have %v, %v", tc.in, tc.want, all, err)
		}
		if have := all[0].IsSystemd(); have != (tc.in == "systemd") {
			t.Errorf("%q: want systemd named alone, have %v", tc.in, have)
		}
	}
	if err := new(Addr).Set("systemd"); err == nil {
		t.Error("want systemd refused where one address is wanted")
	}
}

func TestUnixSocket(t *testing.T) {
	path := filepath.Join(shortTempDir(t), "s")
	at := Addr{"unix", path}
	l, err := at.Listen(0o600)
	if err != nil {
		t.Fatal(err)
	}
	fi, err := os.Lstat(path)
	if want := fs.ModeSocket | 0o600; err != nil || fi.Mode() != want {
		t.Errorf("want %v, have %v, %v", want, fi.Mode(), err)
	}
	if _, err := at.Listen(0o600); err == nil || !strings.Contains(err.Error(), "another process listens") {
		t.Errorf("want a live socket left alone, have %v", err)
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()

	l.(*net.UnixListener).SetUnlinkOnClose(false) // as if killed
	l.Close()
	if l, err = at.Listen(0o666); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Lstat(path); err != nil || fi.Mode().Perm() != 0o666 {
		t.Errorf("want a dead socket replaced, have %v, %v", fi, err)
	}
	l.Close()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("want the socket removed, have %v", err)
	}

	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := at.Listen(0o666); err == nil {
		t.Error("want no file replaced")
	}
	if b, err := os.ReadFile(path); string(b) != "precious" {
		t.Errorf("want the file untouched, have %q, %v", b, err)
	}
}

func TestAccess(t *testing.T) {
	tcp := func(ip string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip)} }
	for _, tc := range []struct {
		addr net.Addr
		tls  *TLS
		want string
	}{
		{tcp("127.0.0.1"), nil, "this machine only"},
		{&net.UnixAddr{Name: "/s", Net: "unix"}, &TLS{clientCA: "ca"}, "this machine only"},
		{tcp("0.0.0.0"), nil, "SPOP has no authentication"},
		{tcp("0.0.0.0"), &TLS{}, "TLS without -tls-client-ca"},
		{tcp("0.0.0.0"), &TLS{clientCA: "ca.pem"}, "clients with a certificate of ca.pem"},
	} {
		if have := tc.tls.Access(tc.addr); !strings.Contains(have, tc.want) {
			t.Errorf("%v: want %q, have %q", tc.addr, tc.want, have)
		}
	}
}

func TestLoadTLS(t *testing.T) {
	dir := t.TempDir()
	ca := certtest.New(t, dir, "ca")
	leaf, _ := ca.Issue(t, "agent", "127.0.0.1")
	pem := ca.File("agent")
	absent, empty := filepath.Join(dir, "absent"), filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	certs, err := LoadTLS(pem, pem, "")
	if err != nil || !certs.Expiry().Equal(leaf.NotAfter) || certs.current.Load().ClientAuth != tls.NoClientCert {
		t.Errorf("want %v and no client asked for a certificate, have %v", leaf.NotAfter, err)
	}
	for _, c := range [][3]string{{pem, absent, ""}, {pem, ca.File("ca"), ""}, {pem, pem, absent}, {pem, pem, empty}} {
		if _, err := LoadTLS(c[0], c[1], c[2]); err == nil || !strings.Contains(err.Error(), "-tls-") {
			t.Errorf("%q: want an error naming the flag, have %v", c, err)
		}
	}
}

func TestWrap(t *testing.T) {
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	unix, err := Addr{"unix", filepath.Join(shortTempDir(t), "s")}.Listen(0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close()
	if l := new(TLS).Wrap(tcp); l == tcp {
		t.Error("want TLS on TCP")
	}
	if l := new(TLS).Wrap(unix); l != unix {
		t.Error("want no TLS on a unix socket")
	}
	if l := (*TLS)(nil).Wrap(tcp); l != tcp {
		t.Error("want no TLS without certificates")
	}
}
