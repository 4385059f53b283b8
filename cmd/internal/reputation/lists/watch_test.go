package lists

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/go-kit/log"
)

// patience bounds the wait for what is sure to come.
const patience = 30 * time.Second

func TestWatchRename(t *testing.T) {
	l := openTest(t, "192.0.2.1 0\n")
	path := (*l.sources.Load())[0].Path
	replace := func(data string) {
		writeFile(t, path+".new", data)
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	testWatch(t, l, func(score int) { replace(fmt.Sprintf("192.0.2.1 %d\n", score)) })
}

func TestWatchWrite(t *testing.T) {
	l := openTest(t, "192.0.2.1 0\n")
	testWatch(t, l, func(score int) {
		writeFile(t, (*l.sources.Load())[0].Path, fmt.Sprintf("192.0.2.1 %d%s\n", score, strings.Repeat(" ", score)))
	})
}

// A Kubernetes volume has list -> ..data/list and ..data -> ..version, and only ..data is ever replaced.
func TestWatchSymlinkSwap(t *testing.T) {
	dir := t.TempDir()
	swap := func(score int) {
		version := fmt.Sprintf("..%d", score)
		if err := os.Mkdir(filepath.Join(dir, version), 0o755); err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, version, "list"), fmt.Sprintf("192.0.2.1 %d\n", score))
		if err := os.Symlink(version, filepath.Join(dir, "..data_tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	swap(0)
	path := filepath.Join(dir, "list")
	if err := os.Symlink("..data/list", path); err != nil {
		t.Fatal(err)
	}
	l, err := openLists(t, Options{Block: []File{scored(path)}})
	if err != nil {
		t.Fatal(err)
	}
	testWatch(t, l, swap)
}

// testWatch has change give 192.0.2.1 one score after the other. After the first one Watch is sure to be under way,
// and with no poll only an event can tell it of the others.
func testWatch(t *testing.T, l *Lists, change func(score int)) {
	t.Helper()
	told := make(chan bool, 10)
	l.onReload = func(_ string, ok bool) { told <- ok }
	l.poll, l.settle = time.Hour, time.Millisecond
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- l.Watch(ctx) }()
	for want := 1; want <= 3; want++ {
		change(want)
		timeout := time.After(patience)
		for have := -1; have != want; have = score(l, "192.0.2.1") {
			select {
			case <-told:
			case <-timeout:
				t.Fatalf("want score %d, have %d", want, have)
			}
		}
	}
	cancel()
	select {
	case err := <-done:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("want %v, have %v", context.Canceled, err)
		}
	case <-time.After(patience):
		t.Error("want Watch to end with its context")
	}
}

// watchBubble runs watch in a synctest bubble, where time passes only when nothing else is to be done. What f gets
// last waits and returns the reloads since.
func watchBubble(t *testing.T, l *Lists, f func(events chan<- fsnotify.Event, errs chan<- error, wait func(time.Duration) []string)) {
	told := make(chan string, 100)
	l.onReload = func(list string, ok bool) { told <- fmt.Sprint(list, " ", ok) }
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		events, errs, done := make(chan fsnotify.Event), make(chan error), make(chan struct{})
		go func() {
			defer close(done)
			_ = l.watch(ctx, events, errs)
		}()
		synctest.Wait()
		f(events, errs, func(d time.Duration) (reloads []string) {
			<-time.After(d)
			synctest.Wait()
			for len(told) > 0 {
				reloads = append(reloads, <-told)
			}
			return reloads
		})
		cancel()
		<-done
	})
}

func TestWatchSettles(t *testing.T) {
	l := openTest(t, "192.0.2.1 5\n")
	path := (*l.sources.Load())[0].Path
	l.poll, l.settle = time.Hour, 100*time.Millisecond
	watchBubble(t, l, func(events chan<- fsnotify.Event, errs chan<- error, wait func(time.Duration) []string) {
		wait(time.Second)
		for i := range 20 { // a file written bit by bit, with pauses
			writeFile(t, path, "192.0.2.1 6\n"+strings.Repeat("192.0.2.2\n", i))
			for range 10 {
				events <- fsnotify.Event{Name: path, Op: fsnotify.Write}
			}
			if have := wait(40 * time.Millisecond); len(have) != 0 {
				t.Errorf("want no reload of a file being written, have %v", have)
			}
		}
		if have := wait(time.Second); len(have) != 1 {
			t.Errorf("want one reload, have %v", have)
		}
		for range 100 { // others come and go in the same directory
			events <- fsnotify.Event{Name: path + ".log", Op: fsnotify.Write}
			if have := wait(30 * time.Millisecond); len(have) != 0 {
				t.Errorf("want no reload of an unchanged file, have %v", have)
			}
		}
		writeFile(t, path, "192.0.2.1 77\n")
		errs <- fsnotify.ErrEventOverflow
		if have := wait(time.Second); len(have) != 1 {
			t.Errorf("want a reload after lost events, have %v", have)
		}
	})
	if have := score(l, "192.0.2.1"); have != 77 {
		t.Errorf("want 77, have %d", have)
	}
}

func TestWatchPolls(t *testing.T) {
	dir := t.TempDir()
	path, other := filepath.Join(dir, "list"), filepath.Join(dir, "other")
	writeFile(t, path, "192.0.2.1 5\n")
	writeFile(t, other, "192.0.2.2 7\n")
	l, err := openLists(t, Options{Block: []File{scored(path), scored(other)}})
	if err != nil {
		t.Fatal(err)
	}
	watchBubble(t, l, func(_ chan<- fsnotify.Event, _ chan<- error, wait func(time.Duration) []string) {
		for _, tc := range []struct {
			data string // empty: the file is removed
			want string
			ok   int
		}{
			{"192.0.2.1 6 # longer\n", "[list true]", 6},
			{"192.0.2.1 bad\n", "[list false]", 6}, // and not again by every poll
			{"192.0.2.1 8 # and back\n", "[list true]", 8},
			{"", "[list false]", 8},
			{"192.0.2.1 9\n", "[list true]", 9},
		} {
			if tc.data == "" {
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
			} else {
				writeFile(t, path, tc.data)
			}
			if have := fmt.Sprint(wait(10 * l.poll)); have != tc.want {
				t.Errorf("%q: want %s, have %s", tc.data, tc.want, have)
			}
			if have := score(l, "192.0.2.1"); have != tc.ok {
				t.Errorf("%q: want %d, have %d", tc.data, tc.ok, have)
			}
		}
		writeFile(t, path, "192.0.2.1 4\n") // of the same size
		if err := os.Chtimes(path, time.Time{}, time.Unix(1e9, 0)); err != nil {
			t.Fatal(err)
		}
		if have := fmt.Sprint(wait(10 * l.poll)); have != "[list true]" {
			t.Errorf("want a file of another time read, have %s", have)
		}
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
		if have := fmt.Sprint(wait(10 * l.poll)); have != "[list true]" {
			t.Errorf("want a file read that may have become readable, have %s", have)
		}
		if have := score(l, "192.0.2.2"); have != 7 {
			t.Errorf("want the other list untouched, have %d", have)
		}
	})
}

// A file that is being written comes into force whole, or is refused.
func TestStillWritten(t *testing.T) {
	for _, tc := range []struct {
		parts int
		want  Reason
	}{{2, ""}, {20, Changing}} {
		path := filepath.Join(t.TempDir(), "list")
		synctest.Test(t, func(t *testing.T) {
			part := func(i int) {
				f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
				if err != nil {
					t.Fatal(err)
				}
				fmt.Fprintf(f, "192.0.2.%d\n", i)
				f.Close()
				if err := os.Chtimes(path, time.Now(), time.Now()); err != nil {
					t.Fatal(err)
				}
			}
			part(0)
			go func() {
				for i := 1; i < tc.parts; i++ {
					time.Sleep(70 * time.Millisecond)
					part(i)
				}
			}()
			l, err := Open(t.Context(), Options{Block: []File{{Path: path}}})
			if tc.want != "" {
				if reasonOf(err) != tc.want {
					t.Errorf("want reason %q, have %v", tc.want, err)
				}
				time.Sleep(time.Minute)
				return
			}
			if err != nil || l.Stats()[0].Entries != tc.parts {
				t.Errorf("want %d entries, have %v, %v", tc.parts, l, err)
			}
		})
	}
}

func TestDirectory(t *testing.T) {
	for _, pattern := range []string{"", "*.txt"} {
		dir := t.TempDir()
		file := func(name string) string { return filepath.Join(dir, name) }
		writeFile(t, file("a.txt"), "192.0.2.1 10\n")
		writeFile(t, file(".hidden.txt"), "192.0.2.1 0\n")
		writeFile(t, file("old.txt~"), "192.0.2.1 0\n")
		var buf logBuffer
		l, err := openLists(t, Options{Logger: log.NewLogfmtLogger(&buf), Block: []File{scored(filepath.Join(dir, pattern))}})
		if err != nil {
			t.Fatal(err)
		}
		watchBubble(t, l, func(_ chan<- fsnotify.Event, _ chan<- error, wait func(time.Duration) []string) {
			check := func(step string, want int, lists ...string) {
				t.Helper()
				wait(10 * l.poll)
				var names []string
				for _, s := range l.Stats() {
					names = append(names, s.Name)
				}
				if have := score(l, "192.0.2.1"); have != want || !slices.Equal(names, lists) {
					t.Errorf("%q, %s: want %d of %v, have %d of %v", pattern, step, want, lists, have, names)
				}
			}
			check("one", 10, "a")
			writeFile(t, file("b.txt"), "192.0.2.0/24 5\n")
			check("another comes", 5, "a", "b")
			writeFile(t, file("b.txt"), "192.0.2.0/24 bad\n")
			check("it is bad", 5, "a", "b")
			if err := os.Remove(file("b.txt")); err != nil {
				t.Fatal(err)
			}
			check("it goes", 10, "a")
			writeFile(t, file("c.txt"), "bad\n")
			check("a bad one comes", 10, "a", "c")
			if !strings.Contains(buf.String(), `msg="list not loaded" list=c reason=malformed`) {
				t.Errorf("want the bad one in the log, have\n%s", &buf)
			}
			if err := os.Remove(file("c.txt")); err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(file("a.txt")); err != nil {
				t.Fatal(err)
			}
			check("all are gone", 100)
		})
	}
}
