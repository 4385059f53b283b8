// Package dnsbltest runs a real rbldnsd for tests.
package dnsbltest

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// patience bounds every wait for the server. Only failing tests come near it.
const patience = 15 * time.Second

// A Server is a process of rbldnsd with one zone. It ends with the test.
type Server struct {
	Addr string // host:port, UDP only
	Zone string

	file   string
	cmd    *exec.Cmd
	output *os.File
}

// Start runs a server of the zone, whose entries are in the syntax of rbldnsd's
// data sets ip4set and, where there is a colon before any other, ip6trie. Without
// an rbldnsd to run it skips the test, in CI it fails it.
func Start(t testing.TB, zone string, entries ...string) *Server {
	t.Helper()
	path, err := exec.LookPath("rbldnsd")
	if err != nil {
		path, err = exec.LookPath("/usr/sbin/rbldnsd") // often not in a user's path
	}
	switch {
	case err != nil && os.Getenv("CI") != "":
		t.Fatal("no rbldnsd found: apt-get install rbldnsd")
	case err != nil:
		t.Skip("no rbldnsd found: apt-get install rbldnsd")
	}
	l, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{Addr: l.LocalAddr().String(), Zone: zone, file: filepath.Join(openDir(t), "zone")}
	l.Close()
	s.write(t, entries)
	args := []string{"-n", "-b", strings.Replace(s.Addr, ":", "/", 1), "-t", "30:5:60"}
	if os.Getuid() == 0 { // it insists on being somebody else
		args = append(args, "-u", "nobody")
	}
	s.cmd = exec.Command(path, append(args, zone+":ip4set:"+s.file+".4", zone+":ip6trie:"+s.file+".6", zone+":generic:"+s.file+".soa")...)
	if s.output, err = os.Create(s.file + ".output"); err != nil {
		t.Fatal(err)
	}
	s.cmd.Stdout, s.cmd.Stderr = s.output, s.output
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Stop(t)
		s.output.Close()
		if t.Failed() {
			b, _ := os.ReadFile(s.output.Name())
			t.Logf("rbldnsd said:\n%s", b)
		}
	})
	s.await(t)
	return s
}

// openDir returns a directory that another user can read, unlike t.TempDir.
func openDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "rbldnsd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// write writes the data sets.
func (s *Server) write(t testing.TB, entries []string) {
	t.Helper()
	four, six := []string{"127.0.0.2 :2:test", ":127.0.0.2:listed"}, []string{":127.0.0.2:listed"}
	for _, e := range entries {
		if colon := strings.Index(e, ":"); colon >= 0 && !strings.ContainsAny(e[:colon], ". ") {
			six = append(six, e)
		} else {
			four = append(four, e)
		}
	}
	for name, lines := range map[string][]string{
		".4": four, ".6": six, ".soa": {"$SOA 30 ns.example hostmaster.example 0 600 300 86400 30"},
	} {
		if err := os.WriteFile(s.file+name, []byte(strings.Join(lines, "\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// await waits until the server answers.
func (s *Server) await(t testing.TB) {
	t.Helper()
	c := dns.Client{Timeout: 100 * time.Millisecond}
	q := new(dns.Msg).SetQuestion("2.0.0.127."+dns.Fqdn(s.Zone), dns.TypeA)
	pause := time.NewTicker(10 * time.Millisecond)
	defer pause.Stop()
	for deadline := time.Now().Add(patience); ; <-pause.C {
		m, _, err := c.Exchange(q, s.Addr)
		if err == nil && len(m.Answer) == 1 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("rbldnsd does not list 127.0.0.2: %v, %v", m, err)
		}
	}
}

// Set replaces the entries. They are in force soon after it returns.
func (s *Server) Set(t testing.TB, entries ...string) {
	t.Helper()
	s.write(t, entries)
	if err := s.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
}

// Stop ends the server.
func (s *Server) Stop(t testing.TB) {
	t.Helper()
	if s.cmd == nil {
		return
	}
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	s.cmd.Wait() // says how it was ended
	s.cmd = nil
}
