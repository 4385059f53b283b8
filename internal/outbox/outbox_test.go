package outbox

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// frame returns a frame that says s.
func frame(s string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...)
}

func frames(words ...string) (b []byte) {
	for _, s := range words {
		b = append(b, frame(s)...)
	}
	return b
}

// inWords returns what the frames of b say, joined by spaces.
func inWords(b []byte) string {
	var words []string
	for len(b) > 0 {
		size := FrameLen(b)
		words = append(words, string(b[lengthSize:size]))
		b = b[size:]
	}
	return strings.Join(words, " ")
}

// wire is a Writer that keeps what was written, in words, a string for each
// Write.
type wire struct {
	mu     sync.Mutex
	writes []string
	gate   chan struct{} // if not nil, each Write takes a value first
	err    error         // of every Write
	n      int           // bytes of a Write that failed
}

func (w *wire) WriteFrames(b []byte, _ time.Duration) (int, error) {
	if w.gate != nil {
		<-w.gate
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return w.n, w.err
	}
	w.writes = append(w.writes, inWords(b))
	return len(b), nil
}

func (w *wire) want(t *testing.T, want ...string) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if !slices.Equal(want, w.writes) {
		t.Errorf("want writes %q, have %q", want, w.writes)
	}
}

func newBox(window int) (*Box, *wire) {
	b, w := new(Box), new(wire)
	b.Init(w, window, new(Total))
	return b, w
}

// answer answers a NOTIFY of one byte.
func answer(b *Box, s string) {
	b.Answer(1, func(to []byte) []byte { return append(to, frame(s)...) })
}

func TestAnswers(t *testing.T) {
	b, w := newBox(2)
	b.Begin(1)
	b.Begin(1)
	if room, open := b.Room(); room || !open {
		t.Errorf("want no room and an open box, have %v, %v", room, open)
	}
	answer(b, "a")
	if room, _ := b.Room(); !room {
		t.Error("want room after an answer")
	}
	answer(b, "b")
	w.want(t)
	b.Flush()
	w.want(t, "a b")
	if next, waited := b.Send(frame("c"), 1, 0); len(next) != 0 || waited {
		t.Errorf("want an empty buffer and no wait, have %q, %v", next, waited)
	}
	w.want(t, "a b", "c")
	if want, have := uint64(3), b.Answered(); want != have {
		t.Errorf("want %d answered, have %d", want, have)
	}
	if b.Busy() {
		t.Error("want nothing with workers")
	}
}

// What is added while a goroutine writes leaves in its next Write.
func TestOneWriter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, w := newBox(100)
		w.gate = make(chan struct{})
		go b.Send(frame("first"), 1, 0)
		synctest.Wait()
		if !b.Busy() {
			t.Error("want it busy while a goroutine writes")
		}
		for i := range 3 {
			b.Begin(1)
			answer(b, fmt.Sprint(i))
			b.Flush() // returns at once
		}
		close(w.gate)
		synctest.Wait()
		w.want(t, "first", "0 1 2")
	})
}

// A change while answers are held wakes who waits, too.
func TestHoldRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, w := newBox(1)
		b.Begin(1)
		b.Hold()
		woken := make(chan bool, 1)
		go func() { woken <- b.WaitForRoom() }()
		synctest.Wait()
		if len(woken) > 0 {
			t.Error("want it to wait for room")
		}
		answer(b, "a")
		b.Flush()
		synctest.Wait()
		select {
		case open := <-woken:
			if !open {
				t.Error("want an open box")
			}
		default:
			t.Error("want it woken by the answer, though that is held")
		}
		w.want(t)
		if !b.Release() {
			t.Error("want something to be flushed after Release")
		}
		b.Flush()
		w.want(t, "a")
		if b.Release() {
			t.Error("want nothing more to be flushed")
		}
	})
}

// An answer makes room though another goroutine is in a Write.
func TestRoomWhileWriting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, w := newBox(1)
		w.gate = make(chan struct{})
		go b.Send(frame("a"), 1, 0)
		synctest.Wait()
		b.Begin(1)
		room := make(chan bool, 1)
		go func() { room <- b.WaitForRoom() }()
		synctest.Wait()
		answer(b, "b")
		b.Flush()
		synctest.Wait()
		if len(room) == 0 {
			t.Error("want room")
		}
		close(w.gate)
	})
}

// A goroutine that is writing stops at a hold.
func TestHoldWriter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, w := newBox(1)
		w.gate = make(chan struct{}, 10)
		go b.Send(frame("a"), 1, 0)
		synctest.Wait()
		b.Hold()
		b.Send(frame("b"), 1, 0)
		w.gate <- struct{}{}
		synctest.Wait()
		w.want(t, "a")
		b.Release()
		w.gate <- struct{}{}
		b.Flush()
		w.want(t, "a", "b")
	})
}

func TestPart(t *testing.T) {
	for _, tt := range []struct {
		name           string
		seen, received uint64
		want           bool
	}{
		{"all answered", 2, 2, true},
		{"one more received", 2, 3, false},
		{"one not answered", 3, 3, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var notifies atomic.Uint64
			notifies.Store(tt.received)
			b, w := newBox(1)
			b.Hold()
			b.Send(frames("a", "b"), 2, 0)
			if have := b.Part(tt.seen, &notifies); have != tt.want {
				t.Fatalf("want %v, have %v", tt.want, have)
			}
			b.Begin(1)
			answer(b, "late")
			b.Hold()
			b.Flush()
			w.want(t) // all wait for Close
			if !b.Close(frame("last"), 1, frame("bye"), true) {
				t.Error("want everything written")
			}
			if tt.want {
				w.want(t, "a b late last bye")
			}
			if !b.Part(9, &notifies) {
				t.Error("want it parted for good")
			}
		})
	}
}

// Who waits until less is unsent goes on when the connection is parted.
func TestPartWakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, w := newBox(1)
		b.Hold()
		sent := make(chan bool, 1)
		go func() {
			_, waited := b.Send(frame(strings.Repeat("x", MaxUnsent)), 1, 0)
			sent <- waited
		}()
		synctest.Wait()
		if len(sent) > 0 {
			t.Error("want Send to wait")
		}
		var notifies atomic.Uint64
		notifies.Store(1)
		if !b.Part(1, &notifies) {
			t.Error("want it parted")
		}
		if waited := <-sent; !waited {
			t.Error("want Send to report that it waited")
		}
		if room, open := b.Room(); !room || !open {
			t.Errorf("want room, for what the reader has read: have %v, open %v", room, open)
		}
		w.want(t)
	})
}

func TestClose(t *testing.T) {
	for _, tt := range []struct {
		name    string
		bye     []byte
		wait    bool
		writes  []string
		written bool
	}{
		{"with a goodbye", frame("bye"), true, []string{"a", "late bye"}, true},
		{"without", nil, true, []string{"a", "late"}, true},
		{"without waiting", nil, false, nil, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b, w := newBox(1)
				b.Begin(1)
				b.Hold() // a drain's, which ends with Close
				closed := make(chan bool, 1)
				go func() { closed <- b.Close(frame("a"), 1, tt.bye, tt.wait) }()
				synctest.Wait()
				b.Hold()
				if ended := len(closed) > 0; ended == tt.wait {
					t.Errorf("want it to wait: %v, have ended %v", tt.wait, ended)
				}
				answer(b, "late")
				if have := <-closed; have != tt.written {
					t.Errorf("want everything written: %v, have %v", tt.written, have)
				}
				w.want(t, tt.writes...)
				if _, open := b.Room(); open {
					t.Error("want it closed")
				}
			})
		})
	}
}

// Close does not begin the goodbye within what another goroutine writes.
func TestCloseWhileWriting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, w := newBox(1)
		w.gate = make(chan struct{}, 10)
		go b.Send(frame("a"), 1, 0)
		synctest.Wait()
		closed := make(chan bool, 1)
		go func() { closed <- b.Close(nil, 0, frame("bye"), true) }()
		synctest.Wait()
		if len(closed) > 0 {
			t.Error("want Close to wait for the writer")
		}
		w.gate <- struct{}{}
		w.gate <- struct{}{}
		if !<-closed {
			t.Error("want everything written")
		}
		w.want(t, "a", "bye")
	})
}

func TestAbort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, w := newBox(1)
		b.Begin(1)
		b.Hold()
		closed := make(chan bool, 1)
		room := make(chan bool, 1)
		go func() { room <- b.WaitForRoom() }()
		go func() { closed <- b.Close(frame("a"), 1, frame("bye"), true) }()
		synctest.Wait()
		b.Abort()
		if <-closed || <-room {
			t.Error("want neither all written nor an open box")
		}
		answer(b, "late")
		b.WaitAnswered()
		if b.Err() != nil {
			t.Errorf("want no error of a Write, have %v", b.Err())
		}
		for _, s := range w.writes {
			if strings.Contains(s, "bye") {
				t.Errorf("want no goodbye after Abort, have %q", w.writes)
			}
		}
	})
}

var errBroken = errors.New("broken")

func TestWriteFails(t *testing.T) {
	b, w := newBox(1)
	w.err = errBroken
	b.Send(frames("a", "b"), 2, 0)
	if b.Err() != errBroken {
		t.Errorf("want %v, have %v", errBroken, b.Err())
	}
	if _, open := b.Room(); open {
		t.Error("want it closed")
	}
	w.err = nil
	b.Send(frame("c"), 1, 0)
	if b.Close(nil, 0, frame("bye"), true) {
		t.Error("want not everything written")
	}
	w.want(t)
}

func TestGoodbyeFails(t *testing.T) {
	b, w := newBox(1)
	w.err = errBroken
	if b.Close(nil, 0, frame("bye"), true) {
		t.Error("want not everything written")
	}
}

// More unsent answers than the limit stop the one who sends them, and then
// reading.
func TestUnsentBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, w := newBox(1)
		w.gate = make(chan struct{})
		go b.Send(frame("a"), 1, 0)
		synctest.Wait()
		half := frame(strings.Repeat("x", MaxUnsent/2))
		if _, waited := b.Send(slices.Clone(half), 1, 0); waited {
			t.Error("want no wait below the limit")
		}
		if room, _ := b.Room(); !room {
			t.Error("want room below the limit")
		}
		waited := make(chan bool, 1)
		go func() {
			_, w := b.Send(slices.Clone(half), 1, 0)
			waited <- w
		}()
		synctest.Wait()
		if len(waited) > 0 {
			t.Error("want a wait beyond the limit")
		}
		if room, _ := b.Room(); room {
			t.Error("want no room beyond the limit")
		}
		close(w.gate)
		if !<-waited {
			t.Error("want the wait reported")
		}
	})
}

func TestInFlightBounded(t *testing.T) {
	var all Total
	boxes := make([]Box, MaxAllInFlight/MaxInFlight+1)
	for i := range boxes {
		boxes[i].Init(new(wire), 100, &all)
	}
	b, last := &boxes[0], &boxes[len(boxes)-1]
	b.Begin(MaxInFlight - 1)
	if room, _ := b.Room(); !room {
		t.Error("want room below the connection's limit")
	}
	b.Begin(1)
	if room, _ := b.Room(); room {
		t.Error("want no room at the connection's limit")
	}
	for i := range boxes[1 : len(boxes)-1] {
		boxes[1+i].Begin(MaxInFlight)
	}
	if room, _ := last.Room(); !room {
		t.Error("want room for one NOTIFY of each connection")
	}
	last.Begin(1)
	if room, _ := last.Room(); room {
		t.Error("want no room at the limit of all")
	}
	b.Answer(MaxInFlight-1, func(b []byte) []byte { return b })
	for _, b := range []*Box{b, last} {
		if room, _ := b.Room(); !room {
			t.Error("want room again after an answer")
		}
	}
}

func TestShrink(t *testing.T) {
	b, _ := newBox(1)
	b.Send(frame(strings.Repeat("x", 10000)), 1, 0)
	b.Send(frame("a"), 1, 0)
	b.Shrink()
	if n := cap(b.frames) + cap(b.spare); n > 0 {
		t.Errorf("want no memory kept, have %d bytes", n)
	}
	b.Hold()
	b.Send(frame("b"), 1, 0)
	b.Shrink()
	b.Release()
	b.Flush()
	if w := b.w.(*wire).writes; w[len(w)-1] != "b" {
		t.Errorf("want what is unsent kept, have %q", w)
	}
}

// A frame of which a byte was written is not sent again.
func TestUnsentFrames(t *testing.T) {
	one, two := frame("one"), frame("second")
	for n := range len(one) + len(two) + 1 {
		want := ""
		switch {
		case n == 0:
			want = "one second"
		case n <= len(one):
			want = "second"
		}
		if have := inWords(unsentFrames(append(slices.Clip(one), two...), n)); want != have {
			t.Errorf("%d bytes written: want %q, have %q", n, want, have)
		}
	}
}

// Send costs no allocation: the buffers go round.
func TestSendAllocs(t *testing.T) {
	b := new(Box)
	b.Init(discard{}, 1, new(Total))
	out := make([]byte, 0, 100)
	ack := frame("ack")
	if n := testing.AllocsPerRun(1000, func() {
		out = append(out, ack...)
		out, _ = b.Send(out, 1, 0)
	}); n > 0 {
		t.Errorf("want no allocation, have %v", n)
	}
}

type discard struct{}

func (discard) WriteFrames(b []byte, _ time.Duration) (int, error) { return len(b), nil }

// Under the race detector: answers of many goroutines beside holds and releases
// all leave, each once.
func TestConcurrent(t *testing.T) {
	const n = 2000
	b, w := newBox(n)
	for range n {
		b.Begin(1)
	}
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			answer(b, fmt.Sprint(i))
			b.Flush()
		})
	}
	for range 10 {
		b.Hold()
		if b.Release() {
			b.Flush()
		}
	}
	wg.Wait()
	if !b.Close(nil, 0, nil, true) {
		t.Fatal("want everything written")
	}
	have := strings.Fields(strings.Join(w.writes, " "))
	slices.Sort(have)
	if have = slices.Compact(have); len(have) != n {
		t.Errorf("want %d answers, have %d", n, len(have))
	}
}
