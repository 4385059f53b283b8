package outbox

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// family is boxes that are siblings; frames that begin with "a" are carried.
type family struct {
	*Siblings
	dropped int
}

func newFamily() *family {
	f := new(family)
	f.Siblings = NewSiblings(
		func(frame []byte) bool { return frame[lengthSize] == 'a' },
		func(n int) { f.dropped += n })
	return f
}

func (f *family) box(maxFrame int) (*Box, *wire) {
	b, w := newBox(10)
	f.Join(b, maxFrame)
	return b, w
}

// Answers of a closed box leave by a sibling: those that a failed Write has left,
// those that were unsent, and later ones.
func TestSiblings(t *testing.T) {
	f := newFamily()
	gone, broken := f.box(100)
	_, w := f.box(100)
	if want, have := 1, gone.Siblings(); want != have {
		t.Errorf("want %d siblings, have %d", want, have)
	}
	gone.Begin(1)
	broken.err, broken.n = errBroken, 1
	gone.Send(frames("a1", "a2", "bye", "a3"), 3, 0)
	w.want(t, "a2 a3") // a byte of a1 was written
	answer(gone, "a4")
	gone.Flush()
	w.want(t, "a2 a3", "a4")
	if want, have := 1, gone.Siblings(); want != have {
		t.Errorf("after the end: want %d siblings, have %d", want, have)
	}
	if f.dropped != 0 || f.Len() != 1 {
		t.Errorf("want nothing dropped and 1 box, have %d and %d", f.dropped, f.Len())
	}
}

func TestSiblingsClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFamily()
		gone, own := f.box(100)
		_, w := f.box(100)
		gone.Begin(1)
		gone.Hold()
		gone.Send(frame("a1"), 1, 0)
		gone.Close(frame("a2"), 1, nil, false)
		synctest.Wait()
		own.want(t)
		w.want(t, "a1 a2")
		answer(gone, "a3")
		gone.Flush()
		w.want(t, "a1 a2", "a3")
	})
}

// Answers that were to leave with the goodbye leave by a sibling if that Write
// fails, and the box says why.
func TestSiblingsGoodbyeFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFamily()
		gone, broken := f.box(100)
		_, w := f.box(100)
		broken.err, broken.n = errBroken, 1
		if gone.Close(frames("a1", "a2"), 2, frame("bye"), true) {
			t.Error("want not everything written")
		}
		synctest.Wait()
		w.want(t, "a2") // a byte of a1 was written
		if err := gone.Err(); err != errBroken {
			t.Errorf("want %v, have %v", errBroken, err)
		}
	})
}

// A sibling whose peer does not read delays no end, and keeps no more than
// maxTaken and one answer.
func TestSiblingsMute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFamily()
		mute, w := f.box(1000)
		w.gate = make(chan struct{})
		long := "a" + strings.Repeat("x", 900)
		const n = 2 * maxTaken / 900
		for range n {
			gone, _ := f.box(1000)
			gone.Close(frame(long), 1, nil, false)
			synctest.Wait()
		}
		mute.mu.Lock()
		have := len(mute.frames)
		mute.mu.Unlock()
		if have < maxTaken || have > maxTaken+1000 {
			t.Errorf("want about %d bytes kept, have %d", maxTaken, have)
		}
		if f.dropped < n/3 {
			t.Errorf("want a third of %d answers dropped at least, have %d", n, f.dropped)
		}
		close(w.gate)
	})
}

// What is too large for one sibling leaves by another.
func TestSiblingsSizes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFamily()
		gone, _ := f.box(100)
		for range 3 {
			f.box(10)
		}
		_, large := f.box(100)
		long := "a" + strings.Repeat("x", 20)
		gone.Close(frame(long), 1, nil, false)
		synctest.Wait()
		large.want(t, long)
		gone.Begin(1)
		answer(gone, "a"+strings.Repeat("x", 200))
		gone.Flush()
		if f.dropped != 1 {
			t.Errorf("want 1 dropped, have %d", f.dropped)
		}
	})
}

func TestNoSiblings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFamily()
		gone, _ := f.box(100)
		if n := gone.Siblings(); n != 0 {
			t.Errorf("want no siblings, have %d", n)
		}
		gone.Close(frames("a1", "a2", "bye"), 2, nil, false)
		synctest.Wait()
		if f.dropped != 2 {
			t.Errorf("want 2 dropped, have %d", f.dropped)
		}
		only, _ := newBox(1)
		if n := only.Siblings(); n != 0 {
			t.Errorf("want no siblings of a box that has joined none, have %d", n)
		}
	})
}

// A box that was closed before it joined is none of the siblings.
func TestJoinClosed(t *testing.T) {
	f := newFamily()
	b, _ := newBox(1)
	b.Close(nil, 0, nil, false)
	f.Join(b, 100)
	if n := f.Len(); n != 0 {
		t.Errorf("want no box, have %d", n)
	}
}

// Of many connections that end at once the first few find out which are closed.
// The others send by a living one without another look at those.
func TestSiblingsMany(t *testing.T) {
	const n = 2000
	f := newFamily()
	boxes := make([]*Box, n)
	for i := range boxes {
		boxes[i], _ = f.box(100)
	}
	_, w := f.box(100)
	for i, b := range boxes {
		b.Begin(1)
		b.shutForTest()
		answer(b, fmt.Sprint("a", i))
	}
	first := 0
	for ; f.Len() > 1 && first < n/10; first++ {
		boxes[first].Flush()
	}
	if have := f.Len(); have != 1 {
		t.Fatalf("want 1 box left after the answers of %d, have %d", first, have)
	}
	for _, b := range boxes[first:] {
		b.mu.Lock() // whoever looks at it is stopped
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, b := range boxes[first:] {
			b.mu.Unlock()
			b.Flush()
			b.mu.Lock()
		}
	}()
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatal("a box that is known to be closed is looked at")
	}
	if len(w.writes) != n {
		t.Errorf("want %d answers by the one that is left, have %d", n, len(w.writes))
	}
}

// Of many living siblings no list is made for each answer, whether one of them can
// take it or none.
func TestSiblingsNoList(t *testing.T) {
	for _, text := range []string{"a", "a" + strings.Repeat("x", 100)} {
		const n = 2000
		f := newFamily()
		gone, _ := f.box(100)
		for range n {
			f.box(100)
		}
		gone.shutForTest()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for range n {
			gone.Begin(1)
			answer(gone, text)
			gone.Flush()
		}
		runtime.ReadMemStats(&after)
		if have := (after.TotalAlloc - before.TotalAlloc) / n; have > 2000 { // a list takes 16,000
			t.Errorf("%d bytes: want less than 2000 bytes for each answer, have %d", len(text), have)
		}
	}
}

// shutForTest closes b, which the siblings have yet to find out.
func (b *Box) shutForTest() {
	b.mu.Lock()
	b.shut(nil)
	b.mu.Unlock()
}
