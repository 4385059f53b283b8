// Package outbox sends the answers of a connection: many goroutines add them,
// one at a time writes them.
//
// It knows no net, frame format or log; of a frame it knows the length field.
// It is a package of its own so that only the methods of [Box] change what its
// lock guards, each of which wakes those who may wait for what it changes.
package outbox

import (
	"encoding/binary"
	"sync"
	"sync/atomic"
	"time"
)

// Limits of what is in flight, beyond which a connection is not read. The
// limits of bytes let each connection have one NOTIFY with workers all the same.
const (
	MaxUnsent      = 64 << 10 // bytes of a connection's answers that are not written yet
	MaxInFlight    = 1 << 20  // bytes of a connection's NOTIFYs that are with workers
	MaxAllInFlight = 64 << 20 // and of those of all connections that share a Total
)

// Writer writes whole frames. Now is the clock, 0 if the caller does not know
// it. It is called by one goroutine at a time.
type Writer interface {
	WriteFrames(b []byte, now time.Duration) (int, error)
}

// Total is the bytes of NOTIFYs with workers, of several boxes.
type Total struct{ bytes atomic.Int64 }

// Box holds what is to be sent on a connection. Its methods may be called by
// several goroutines at once. Its lock may be taken while others are held; it
// takes no other.
type Box struct {
	w      Writer
	window int // NOTIFYs that may be with workers
	total  *Total

	mu       sync.Mutex
	changed  sync.Cond
	frames   []byte // to be written
	spare    []byte // memory for the next frames
	answered uint64 // NOTIFYs whose answer was added
	pending  int    // NOTIFYs with workers
	bytes    int    // that these keep in memory
	writing  bool   // a goroutine is writing; others only add
	held     bool   // nothing is written until Release
	closing  bool   // Part or Close was called: no hold begins, and Send does not wait
	closed   bool   // nothing more is accepted
	broken   bool   // nothing more is written
	err      error  // why writing failed
	siblings *Siblings
	unsent   []byte // answers for the siblings to send, once closed

	maxFrame int // of what a sibling may leave here, with the length field
	index    int // in siblings.boxes, -1 if not there; guarded by siblings.mu
}

// Init makes b ready. The window is how many NOTIFYs may be with workers.
func (b *Box) Init(w Writer, window int, total *Total) {
	b.w, b.window, b.total = w, window, total
	b.changed.L = &b.mu
}

// Begin notes that a NOTIFY that keeps size bytes in memory is given to workers.
func (b *Box) Begin(size int) {
	b.total.bytes.Add(int64(size))
	b.mu.Lock()
	b.pending++
	b.bytes += size
	b.mu.Unlock()
}

// Answer adds the answer of a NOTIFY that was given to workers with that size:
// ack appends it to its argument. It is not written until Flush.
func (b *Box) Answer(size int, ack func([]byte) []byte) {
	b.total.bytes.Add(int64(-size))
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pending--
	b.bytes -= size
	b.answered++
	switch {
	case !b.closed:
		b.frames = ack(b.frames)
	case b.siblings != nil:
		b.unsent = ack(b.unsent)
	}
	b.changed.Broadcast()
}

// Send adds whole frames, with the answers of that many NOTIFYs among them, and
// writes them. It takes the memory of frames and returns other memory for the
// next. While more than MaxUnsent is left it waits, and reports that it did.
// Now is the clock, or 0.
func (b *Box) Send(frames []byte, answers int, now time.Duration) (next []byte, waited bool) {
	b.mu.Lock()
	next = b.add(frames, answers)
	b.write(now)
	if !b.writing {
		next, b.spare = b.spare[:0], next // what was just written is warm in the CPU's cache
	}
	for len(b.frames) > MaxUnsent && !b.closing && !b.closed {
		waited = true
		b.changed.Wait()
	}
	closed := b.closed
	b.mu.Unlock()
	if closed {
		b.forward(true)
	}
	return next, waited
}

// add adds whole frames, whose memory it takes, and returns other memory. The
// caller must hold mu.
func (b *Box) add(frames []byte, answers int) (next []byte) {
	b.answered += uint64(answers)
	switch {
	case b.closed && b.siblings != nil:
		b.unsent = append(b.unsent, frames...)
	case b.closed:
	case len(b.frames) == 0:
		frames, b.frames = b.frames, frames
	default:
		b.frames = append(b.frames, frames...)
	}
	b.changed.Broadcast()
	return frames[:0]
}

// Flush writes what is there. It blocks while the peer does not read, unless
// another goroutine is writing already.
func (b *Box) Flush() {
	b.mu.Lock()
	b.write(0)
	closed := b.closed
	b.mu.Unlock()
	if closed {
		b.forward(true)
	}
}

// write writes what is there. If another goroutine is writing it returns at
// once: that one goes on until nothing is left. The caller must hold mu; it is
// released during each write.
func (b *Box) write(now time.Duration) {
	if b.writing {
		return
	}
	b.writing = true
	for len(b.frames) > 0 && !b.held && !b.broken {
		out := b.frames
		b.frames = b.spare[:0]
		b.mu.Unlock()
		n, err := b.w.WriteFrames(out, now)
		b.mu.Lock()
		now = 0
		b.spare = out[:0]
		if err != nil {
			b.err = err
			b.shut(append(unsentFrames(out, n), b.frames...))
		}
	}
	b.writing = false
	b.changed.Broadcast()
}

// shut ends all writing. It leaves the frames to the siblings, if there are any.
// The caller must hold mu.
func (b *Box) shut(frames []byte) {
	b.closed, b.broken = true, true
	b.frames, b.spare = nil, nil
	if b.siblings != nil {
		b.unsent = append(b.unsent, frames...)
	}
	b.changed.Broadcast()
}

// forward gives the unsent answers of a closed box to its siblings, of which it
// is none any more. It blocks while the peer of one of these does not read, unless
// wait is false.
func (b *Box) forward(wait bool) {
	b.mu.Lock()
	unsent, s := b.unsent, b.siblings
	b.unsent = nil
	b.mu.Unlock()
	if s == nil {
		return
	}
	s.leave(b)
	switch {
	case len(unsent) == 0:
	case wait:
		s.send(unsent)
	default:
		go s.send(unsent)
	}
}

// Hold keeps answers from being written until Release or Close.
func (b *Box) Hold() {
	b.mu.Lock()
	b.held = b.held || !b.closing && !b.closed
	b.changed.Broadcast()
	b.mu.Unlock()
}

// Release ends a hold. It reports whether there is something for Flush to write.
func (b *Box) Release() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.held = false
	b.changed.Broadcast()
	return len(b.frames) > 0 && !b.writing
}

// Part reports whether every NOTIFY received so far has an answer and none has come
// since seen, or the box is closed. Notifies is how many were received. If so, Send
// waits no more from now on, and what is held stays held until Close.
func (b *Box) Part(seen uint64, notifies *atomic.Uint64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return true
	}
	if notifies.Load() != seen || b.answered != seen {
		return false
	}
	b.closing = true
	b.changed.Broadcast()
	return true
}

// Close closes the box after the frames, with the answers of that many NOTIFYs
// among them. With wait it first waits for the workers, and for all to be
// written; bye, if it is not nil, leaves in one Write with the last answers. It
// reports whether all was written. What was not is left to the siblings, for whose
// writes it does not wait.
func (b *Box) Close(frames []byte, answers int, bye []byte, wait bool) bool {
	b.mu.Lock()
	b.add(frames, answers)
	b.closing, b.held = true, false
	for wait && !b.broken && !b.finished(bye != nil) {
		if b.writing || len(b.frames) == 0 {
			b.changed.Wait()
		} else {
			b.write(0)
		}
	}
	whole := wait && !b.broken
	var last []byte
	if whole && bye != nil && !b.closed {
		last = append(b.frames, bye...)
		b.frames = nil
	}
	b.shut(b.frames)
	b.mu.Unlock()
	if last != nil {
		n, err := b.w.WriteFrames(last, 0)
		if whole = err == nil; !whole {
			b.mu.Lock()
			b.err = err
			b.shut(unsentFrames(last, n))
			b.mu.Unlock()
		}
	}
	b.forward(false)
	return whole
}

// finished reports whether nothing is left to be waited for before the end. The
// caller must hold mu.
func (b *Box) finished(bye bool) bool {
	if b.writing || b.pending > 0 && !b.closed {
		return false
	}
	return len(b.frames) == 0 || bye && !b.closed // those leave with bye
}

// Abort closes the box and drops what is not written. It does not block.
func (b *Box) Abort() {
	b.mu.Lock()
	b.frames = nil
	b.shut(nil)
	b.mu.Unlock()
	b.forward(false)
}

// full reports whether no more NOTIFYs may be in flight. A fall of the total wakes
// nobody: who waits for it goes on when a NOTIFY of this box is answered. The
// caller must hold mu.
func (b *Box) full() bool {
	return !b.closed && (b.pending >= b.window || len(b.frames) > MaxUnsent && !b.closing ||
		b.pending > 0 && (b.bytes >= MaxInFlight || b.total.bytes.Load() >= MaxAllInFlight))
}

// Room reports whether another NOTIFY may be in flight, and whether its answer
// could be sent.
func (b *Box) Room() (room, open bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !b.full(), !b.closed
}

// WaitForRoom waits until another NOTIFY may be in flight, and reports whether
// its answer could be sent.
func (b *Box) WaitForRoom() (open bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.full() {
		b.changed.Wait()
	}
	return !b.closed
}

// WaitAnswered waits until no NOTIFY is with workers.
func (b *Box) WaitAnswered() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.pending > 0 {
		b.changed.Wait()
	}
}

// Answered returns the number of NOTIFYs whose answer was added.
func (b *Box) Answered() uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.answered
}

// Busy reports whether NOTIFYs are with workers, or a goroutine is writing.
func (b *Box) Busy() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.pending > 0 || b.writing
}

// Err returns why writing failed.
func (b *Box) Err() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

// Shrink lets go of memory that is not used.
func (b *Box) Shrink() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.spare = nil
	if len(b.frames) == 0 {
		b.frames = nil
	}
}

const lengthSize = 4 // of a frame's length field, which does not count itself

// FrameLen returns the length of the first frame of b, length field included.
func FrameLen(b []byte) int { return lengthSize + int(binary.BigEndian.Uint32(b)) }

// unsentFrames returns the frames of b of which none of the first n bytes is a
// part.
func unsentFrames(b []byte, n int) []byte {
	for n > 0 && len(b) > 0 {
		size := FrameLen(b)
		b = b[size:]
		n -= size
	}
	return b
}
