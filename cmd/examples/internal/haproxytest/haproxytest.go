// Package haproxytest runs HAProxy with the configuration of an example.
package haproxytest

import (
	"bytes"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Start runs HAProxy with the haproxy.cfg and the SPOE file of a directory, in
// which it replaces the addresses that pairs lists, each with another. It ends
// HAProxy with the test, and skips the test if there is none. HAProxys are those
// of SPOA_TEST_HAPROXY, of which it takes the first, or the one in PATH.
func Start(t *testing.T, dir string, pairs ...string) {
	t.Helper()
	program := filepath.SplitList(os.Getenv("SPOA_TEST_HAPROXY") + string(os.PathListSeparator) + "haproxy")[0]
	if program == "" {
		program = "haproxy"
	}
	path, err := exec.LookPath(program)
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatalf("no HAProxy: %v", err)
		}
		t.Skipf("no HAProxy: %v", err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.c[fo]*")) // .cfg and .conf
	if err != nil {
		t.Fatal(err)
	}
	tmp := t.TempDir()
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		text = []byte(strings.NewReplacer(pairs...).Replace(string(text)))
		if err := os.WriteFile(filepath.Join(tmp, filepath.Base(name)), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	cmd := exec.Command(path, "-db", "-f", filepath.Join(tmp, "haproxy.cfg"))
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-done
		if t.Failed() {
			t.Logf("HAProxy: %s", out.String())
		}
	})
}

// FreeAddr returns an address on which nothing listens.
func FreeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// Await calls ready until it returns nil.
func Await(t *testing.T, ready func() error) {
	t.Helper()
	err := errors.New("not tried")
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if err = ready(); err == nil {
			return
		}
	}
	t.Fatal(err)
}
