//go:build unix

package lists

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Standard input and pipes are read once, and stay in force.
func TestPipe(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Skip(err)
	}
	go func() { _ = os.WriteFile(fifo, []byte("192.0.2.2 7\n"), 0) }()
	stdin := File{Path: "-", Column: Column{Kind: ColumnScore}}
	l, err := openLists(t, Options{Block: []File{stdin, scored(fifo)}, Stdin: strings.NewReader("192.0.2.1 5\n")})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range l.Stats() {
		if s.Modified.IsZero() {
			t.Errorf("%s: want it as old as the process at most, have %v", s.Name, s.Modified)
		}
	}
	for range 2 {
		if v := l.Lookup(netip.MustParseAddr("192.0.2.1")); v != (Verdict{Listed, 5, "stdin"}) {
			t.Errorf("standard input: have %v", v)
		}
		if v := l.Lookup(netip.MustParseAddr("192.0.2.2")); v != (Verdict{Listed, 7, "fifo"}) {
			t.Errorf("pipe: have %v", v)
		}
		if err := l.Reload(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// A read that hangs ends with its context.
func TestHangingPipe(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Skip(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(10*time.Millisecond, cancel)
	if _, err := Open(ctx, Options{Block: []File{{Path: fifo}}}); !errors.Is(err, context.Canceled) {
		t.Errorf("want %v, have %v", context.Canceled, err)
	}
	if err := os.WriteFile(fifo, nil, 0); err != nil { // lets the reader go
		t.Error(err)
	}
}
