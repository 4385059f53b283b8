// Package linewriter writes a log to where nobody may be reading.
package linewriter

import (
	"bytes"
	"io"
	"sync"
	"time"
)

// most is how many bytes wait to be written.
const most = 1 << 20

// Writer passes lines to a writer that may stand still or fail, and never waits
// for it: what does not fit into a buffer of 1 MiB, or cannot be written, is
// dropped and counted. It may be used by several goroutines at once.
type Writer struct {
	w io.Writer

	mu      sync.Mutex
	more    *sync.Cond // pending or closed has changed
	pending []byte
	notice  func(dropped uint64) []byte // nil: none
	lost    uint64                      // lines dropped since the last notice
	dropped uint64                      // in all
	closed  bool
	idle    chan struct{} // closed when everything is written and closed is set
}

// New returns a Writer of lines to w. Close ends its goroutine.
func New(w io.Writer) *Writer {
	l := &Writer{w: w, idle: make(chan struct{})}
	l.more = sync.NewCond(&l.mu)
	go l.run()
	return l
}

// Notice sets how a line says that lines were dropped. It is written before the
// next line that can be.
func (l *Writer) Notice(line func(dropped uint64) []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.notice = line
}

// Write takes one line or several whole ones. It never fails.
func (l *Writer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || len(l.pending)+len(p) > most {
		l.dropLocked(p)
		return len(p), nil
	}
	l.pending = append(l.pending, p...)
	l.more.Signal()
	return len(p), nil
}

// Dropped returns how many lines were dropped.
func (l *Writer) Dropped() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dropped
}

// Close waits until everything is written, but not for longer than d.
func (l *Writer) Close(d time.Duration) {
	l.mu.Lock()
	l.closed = true
	l.more.Signal()
	l.mu.Unlock()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-l.idle:
	case <-t.C:
	}
}

func (l *Writer) dropLocked(lines []byte) {
	n := uint64(bytes.Count(lines, []byte("\n")))
	l.lost += n
	l.dropped += n
}

// run writes what is pending until the Writer is closed.
func (l *Writer) run() {
	defer close(l.idle)
	var lines []byte
	for {
		l.mu.Lock()
		for len(l.pending) == 0 && !l.closed {
			l.more.Wait()
		}
		if len(l.pending) == 0 {
			l.mu.Unlock()
			return
		}
		lines, l.pending = l.pending, lines[:0]
		l.mu.Unlock()
		if l.writeNotice() {
			l.write(lines)
		} else {
			l.drop(lines)
		}
	}
}

// writeNotice says how many lines were dropped, if so, and reports whether w can
// be written to.
func (l *Writer) writeNotice() bool {
	l.mu.Lock()
	lost, notice := l.lost, l.notice
	l.mu.Unlock()
	if notice == nil || lost == 0 {
		return true
	}
	if _, err := l.w.Write(notice(lost)); err != nil {
		return false
	}
	l.mu.Lock()
	l.lost -= lost
	l.mu.Unlock()
	return true
}

func (l *Writer) write(lines []byte) {
	if n, err := l.w.Write(lines); err != nil {
		l.drop(lines[n:])
	}
}

func (l *Writer) drop(lines []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dropLocked(lines)
}
