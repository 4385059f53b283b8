package reputation

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestWatchFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "list")
	write := func(text string) {
		t.Helper()
		next := path + ".next"
		if err := os.WriteFile(next, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(next, path); err != nil {
			t.Fatal(err)
		}
	}
	write("a")
	read, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	changed, done := make(chan string), make(chan struct{})
	go func() {
		defer close(done)
		WatchFile(ctx, path, time.Millisecond, read, func(os.FileInfo) {
			b, _ := os.ReadFile(path)
			changed <- string(b)
		})
	}()
	// An unchanged file would be reported as "a" first.
	for _, text := range []string{"bb", "ccc"} {
		write(text)
		if have := <-changed; have != text {
			t.Errorf("want %q, have %q", text, have)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	write("dd")
	if have := <-changed; have != "dd" {
		t.Errorf("after its removal: want %q, have %q", "dd", have)
	}
	cancel()
	<-done
}
