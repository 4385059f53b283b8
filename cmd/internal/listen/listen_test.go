//go:build unix

package listen

import (
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
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
		{"*:12345", Addr{"tcp", ":12345"}},
		{"[::1]:12345", Addr{"tcp", "[::1]:12345"}},
		{"unix:/run/a.sock", Addr{"unix", "/run/a.sock"}},
		{"unix:@a", Addr{"unix", "@a"}},
		{"abnsz@a", Addr{"unix", "@a"}},
		{"abns@a", Addr{"unix", "@a" + strings.Repeat("\x00", 106)}},
		{"abns@" + strings.Repeat("a", 107), Addr{"unix", "@" + strings.Repeat("a", 107)}},
		{"systemd", Addr{Network: "systemd"}},
		{"12345", Addr{}},
		{"127.0.0.1", Addr{}},
		{"127.0.0.1:http", Addr{}},
		{"127.0.0.1:65536", Addr{}},
		{"127.0.0.1:", Addr{}},
		{"unix:", Addr{}},
		{"unix:@", Addr{}},
		{"abns@", Addr{}},
		{"abnsz@", Addr{}},
		{"", Addr{}},
	} {
		var all Addrs
		err := all.Set(tc.in)
		if tc.want == (Addr{}) {
			if err == nil || len(all) > 0 || !strings.HasPrefix(err.Error(), "want host:port, unix:/path, or abns@name") {
				t.Errorf("%q: want the right form in the error, have %v, %v", tc.in, all, err)
			}
			continue
		}
		if err != nil || len(all) != 1 || all[0] != tc.want {
			t.Errorf("%q: want %v, have %v, %v", tc.in, tc.want, all, err)
			continue
		}
		var again Addrs
		if err := again.Set(all.String()); err != nil || again[0] != tc.want {
			t.Errorf("%q: want %q to be the same, have %v, %v", tc.in, all.String(), again, err)
		}
		if have := all[0].IsSystemd(); have != (tc.in == "systemd") {
			t.Errorf("%q: want systemd named alone, have %v", tc.in, have)
		}
	}
	for _, long := range []string{"unix:/" + strings.Repeat("a", 107), "abns@" + strings.Repeat("a", 108)} {
		if err := new(Addr).Set(long); err == nil || !strings.Contains(err.Error(), "bytes: want at most 107") {
			t.Errorf("%q: want its length refused, have %v", long, err)
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

// HAProxy connects to an abns name with an address of full length, and to an
// abnsz name with one that ends behind the name.
func TestAbstract(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("abstract sockets are Linux's own")
	}
	name := fmt.Sprintf("spoa-test-%d", os.Getpid())
	for _, form := range []string{"abns@", "abnsz@"} {
		var a Addr
		if err := a.Set(form + name); err != nil {
			t.Fatal(err)
		}
		l, err := a.Listen(0o600)
		if err != nil {
			t.Fatal(err)
		}
		if have := Name(l.Addr()); have != form+name {
			t.Errorf("want %s, have %s", form+name, have)
		}
		for _, other := range []string{"abns@", "abnsz@"} {
			if err := a.Set(other + name); err != nil {
				t.Fatal(err)
			}
			c, err := a.Dial(t.Context())
			if reached := err == nil; reached != (form == other) {
				t.Errorf("from %s to %s: %v", other, form, err)
			}
			if err == nil {
				c.Close()
			}
		}
		l.Close()
	}
}

// An IPv4 address and [::] can have one port.
func TestDualStack(t *testing.T) {
	probe, err := net.Listen("tcp", "[::]:0")
	if err != nil {
		t.Skip("no IPv6 here:", err)
	}
	port := strconv.Itoa(probe.Addr().(*net.TCPAddr).Port)
	probe.Close()
	for _, pair := range []Addrs{
		{{"tcp", "0.0.0.0:" + port}, {"tcp", "[::]:" + port}},
		{{"tcp", "[::]:" + port}, {"tcp", "127.0.0.1:" + port}},
	} {
		all, err := pair.Listen(0o600)
		if err != nil || len(all) != 2 {
			t.Fatalf("%v: want both, have %v", pair, err)
		}
		for _, host := range []string{"127.0.0.1", "::1"} {
			c, err := net.Dial("tcp", net.JoinHostPort(host, port))
			if err != nil {
				t.Error(err)
				continue
			}
			c.Close()
		}
		for _, l := range all {
			l.Close()
		}
	}
}

func TestListenAllOrNone(t *testing.T) {
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := free.Addr().String()
	free.Close()
	if all, err := (Addrs{{"tcp", addr}, {"unix", "/nonexistent/x"}}).Listen(0o600); err == nil || len(all) > 0 {
		t.Errorf("want an error alone, have %v, %v", all, err)
	}
	if l, err := net.Listen("tcp", addr); err != nil {
		t.Errorf("want the first closed again, have %v", err)
	} else {
		l.Close()
	}
}

func TestCheckAddr(t *testing.T) {
	dir := shortTempDir(t)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for addr, want := range map[Addr]string{
		{"tcp", "127.0.0.1:0"}:               "",
		{"tcp", taken.Addr().String()}:       "", // by the agent that is to be replaced, perhaps
		{"tcp", "192.0.2.1:0"}:               "assign requested address",
		{"unix", filepath.Join(dir, "s")}:    "",
		{"unix", filepath.Join(dir, "/x/s")}: "no such file",
		{"unix", filepath.Join(file, "s")}:   "not a directory",
		{"unix", file}:                       "no socket is in the way",
		{"unix", "@x"}:                       "",
		{Network: "systemd"}:                 "",
	} {
		err := addr.Check()
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%v: want %q, have %v", addr, want, err)
		}
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
		{&net.UnixAddr{Name: "/s", Net: "unix"}, &TLS{files: TLSFiles{ClientCA: "ca"}}, "this machine only"},
		{tcp("0.0.0.0"), nil, "there is no authentication"},
		{tcp("0.0.0.0"), &TLS{}, "TLS without -tls-client-ca"},
		{tcp("0.0.0.0"), &TLS{files: TLSFiles{ClientCA: "ca.pem"}}, "clients with a certificate of ca.pem"},
	} {
		if have := tc.tls.Access(tc.addr); !strings.Contains(have, tc.want) {
			t.Errorf("%v: want %q, have %q", tc.addr, tc.want, have)
		}
	}
}

func TestTLSFiles(t *testing.T) {
	for want, args := range map[string][]string{
		"-tls-cert and -tls-key need each other": {"-tls-cert", "x"},
		"-tls-client-ca needs -tls-cert":         {"-tls-client-ca", "x"},
	} {
		var f TLSFiles
		flags := flag.NewFlagSet("", flag.ContinueOnError)
		f.Register(flags)
		if err := flags.Parse(args); err != nil {
			t.Fatal(err)
		}
		if err := f.Validate(); err == nil || err.Error() != want {
			t.Errorf("%q: want %q, have %v", args, want, err)
		}
	}
	if certs, err := new(TLSFiles).Load(); certs != nil || err != nil {
		t.Errorf("without files: want no TLS, have %v, %v", certs, err)
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
	certs, err := (&TLSFiles{Cert: pem, Key: pem}).Load()
	if err != nil || !certs.Expiry().Equal(leaf.NotAfter) || certs.current.Load().ClientAuth != tls.NoClientCert {
		t.Errorf("want %v and no client asked for a certificate, have %v", leaf.NotAfter, err)
	}
	for _, c := range [][3]string{{pem, absent, ""}, {pem, ca.File("ca"), ""}, {pem, pem, absent}, {pem, pem, empty}} {
		if _, err := (&TLSFiles{c[0], c[1], c[2]}).Load(); err == nil || !strings.Contains(err.Error(), "-tls-") {
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
