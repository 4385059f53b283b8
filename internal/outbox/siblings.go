package outbox

import (
	"slices"
	"sync"
)

// Siblings are boxes that send each other's answers: those of one HAProxy
// engine, which allows it by the capability async (SPOE.txt 3.2.1).
type Siblings struct {
	carried func(frame []byte) bool
	dropped func(frames int)

	mu    sync.Mutex
	boxes []*Box // not closed when last seen
	next  int    // index of the box that was tried first last time
}

const (
	maxTried = 8       // boxes that are asked to send what one did not take
	maxTaken = 1 << 20 // bytes that are not written yet, beyond which a box takes no more
)

// NewSiblings returns siblings that carry the frames that carried reports true
// of. Dropped is called when no box is left for some.
func NewSiblings(carried func(frame []byte) bool, dropped func(frames int)) *Siblings {
	return &Siblings{carried: carried, dropped: dropped}
}

// Join makes b one of the siblings. It takes frames of up to maxFrame bytes,
// length field included.
func (s *Siblings) Join(b *Box, maxFrame int) {
	s.mu.Lock()
	b.index = len(s.boxes)
	s.boxes = append(s.boxes, b)
	s.mu.Unlock()
	b.mu.Lock()
	b.siblings, b.maxFrame = s, maxFrame
	closed := b.closed
	b.mu.Unlock()
	if closed {
		s.leave(b)
	}
}

// leave removes b from the boxes, in which it may not be any more.
func (s *Siblings) leave(b *Box) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := b.index
	if i < 0 {
		return
	}
	last := len(s.boxes) - 1
	s.boxes[i] = s.boxes[last]
	s.boxes[i].index = i
	s.boxes[last] = nil
	s.boxes = s.boxes[:last]
	b.index = -1
}

// Len returns the number of boxes.
func (s *Siblings) Len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.boxes)
}

// Siblings returns how many other boxes send b's answers once it is closed.
func (b *Box) Siblings() int {
	b.mu.Lock()
	s := b.siblings
	b.mu.Unlock()
	if s == nil {
		return 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.index >= 0 {
		return len(s.boxes) - 1
	}
	return len(s.boxes)
}

// some returns up to n of the boxes, the one to be tried first at the beginning.
func (s *Siblings) some(n int) []*Box {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.boxes) == 0 {
		return nil
	}
	s.next = (s.next + 1) % len(s.boxes)
	from := s.boxes[s.next:]
	if n <= len(from) {
		return slices.Clone(from[:n])
	}
	return append(slices.Clone(from), s.boxes[:min(n-len(from), s.next)]...)
}

// send sends those of the frames that are carried by other boxes.
func (s *Siblings) send(frames []byte) {
	frames = slices.Clip(s.filter(frames))
	for len(frames) > 0 {
		one := s.some(1)
		if one == nil {
			break
		}
		// Mostly one takes all. A closed one leaves, so that each is found once.
		var open bool
		if frames, open = s.sendBy(one, frames); open && len(frames) > 0 {
			frames, _ = s.sendBy(s.some(maxTried), frames)
			break
		}
	}
	n := 0
	for ; len(frames) > 0; n++ {
		frames = frames[FrameLen(frames):]
	}
	if n > 0 {
		s.dropped(n)
	}
}

// sendBy sends the frames by the boxes, each of which takes what it can, and
// returns those that none took. It reports whether the last one tried was open.
func (s *Siblings) sendBy(boxes []*Box, frames []byte) (rest []byte, open bool) {
	for _, b := range boxes {
		if frames, open = b.take(frames); open {
			b.Flush()
		} else {
			s.leave(b)
		}
		if len(frames) == 0 {
			break
		}
	}
	return frames, open
}

// filter returns the frames that are carried, in the memory of b.
func (s *Siblings) filter(b []byte) []byte {
	kept := b[:0]
	for len(b) > 0 {
		size := FrameLen(b)
		if frame := b[:size]; s.carried(frame) {
			kept = append(kept, frame...)
		}
		b = b[size:]
	}
	return kept
}

// take adds those of the frames that are not too large, and returns the others:
// all if b is closed, or if its peer has not read for long.
func (b *Box) take(frames []byte) (rest []byte, open bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return frames, false
	}
	for len(frames) > 0 {
		size := FrameLen(frames)
		if size <= b.maxFrame && len(b.frames) < maxTaken {
			b.frames = append(b.frames, frames[:size]...)
		} else {
			rest = append(rest, frames[:size]...)
		}
		frames = frames[size:]
	}
	b.changed.Broadcast()
	return rest, true
}
