package linewriter

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// gate is a writer that stands still, or fails.
type gate struct {
	mu   sync.Mutex
	open *sync.Cond
	shut bool
	err  error
	text bytes.Buffer
}

func newGate() *gate {
	g := new(gate)
	g.open = sync.NewCond(&g.mu)
	return g
}

func (g *gate) Write(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.shut {
		g.open.Wait()
	}
	if g.err != nil {
		return 0, g.err
	}
	return g.text.Write(p)
}

// set shuts the gate, or opens it and lets writes fail with err.
func (g *gate) set(shut bool, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shut, g.err = shut, err
	g.open.Broadcast()
}

func (g *gate) String() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.text.String()
}

func notice(n uint64) []byte { return fmt.Appendf(nil, "dropped %d\n", n) }

func TestInOrder(t *testing.T) {
	g := newGate()
	l := New(g)
	var want strings.Builder
	for i := range 1000 {
		fmt.Fprintln(l, i)
		fmt.Fprintln(&want, i)
	}
	l.Close(time.Minute)
	if have := g.String(); have != want.String() || l.Dropped() != 0 {
		t.Errorf("want all lines, have %d bytes and %d dropped", len(have), l.Dropped())
	}
	if n, err := l.Write([]byte("late\n")); n != 5 || err != nil || l.Dropped() != 1 {
		t.Errorf("want what comes after Close counted, have %d, %v, %d dropped", n, err, l.Dropped())
	}
}

// Nobody who writes waits, memory is bounded, and what was lost is said.
func TestStandsStill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		g.set(true, nil)
		l := New(g)
		l.Notice(notice)
		line := []byte(strings.Repeat("x", 99) + "\n")
		const lines = 3 * most / 100
		for i := range lines {
			if n, err := l.Write(line); n != len(line) || err != nil {
				t.Fatal(n, err)
			}
			if i == 0 {
				synctest.Wait() // until that line is being written
			}
		}
		dropped := l.Dropped()
		if kept := lines - dropped; kept > 2*most/100 || kept < most/100 {
			t.Errorf("want about %d lines kept, have %d", most/100, kept)
		}
		g.set(false, nil)
		synctest.Wait()
		l.Write([]byte("again\n"))
		l.Close(time.Minute)
		text := g.String()
		if want := fmt.Sprintf("dropped %d\n", dropped); strings.Count(text, want) != 1 || strings.Count(text, "dropped") != 1 {
			t.Errorf("want one line %q, have %q", want, text[max(0, len(text)-200):])
		}
		if want, have := int(lines-dropped), strings.Count(text, string(line)); want != have {
			t.Errorf("want %d lines, have %d", want, have)
		}
	})
}

func TestFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		g.set(false, errors.New("broken pipe"))
		l := New(g)
		l.Notice(notice)
		for range 3 {
			l.Write([]byte("lost\n"))
			synctest.Wait()
		}
		g.set(false, nil)
		l.Write([]byte("kept\n"))
		l.Close(time.Minute)
		if want, have := "dropped 3\nkept\n", g.String(); want != have {
			t.Errorf("want %q, have %q", want, have)
		}
		if l.Dropped() != 3 {
			t.Errorf("want 3 lines dropped, have %d", l.Dropped())
		}
	})
}

// A reader that stands still cannot hold up the end.
func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		g.set(true, nil)
		l := New(g)
		l.Write([]byte("x\n"))
		began := time.Now()
		l.Close(time.Second)
		if took := time.Since(began); took != time.Second {
			t.Errorf("want a second, have %v", took)
		}
		g.set(false, nil)
	})
}
