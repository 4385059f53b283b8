package lists

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/go-kit/log/level"
)

// watched is what is known of a file. Lists.mu guards it.
type watched struct {
	tried os.FileInfo // as it was when last read, successfully or not; nil if missing
	seen  os.FileInfo // as it was at the last look
}

// expandPath returns the files of a directory or a glob, and whether it is one.
// Hidden files, and those whose name ends in ~, are none.
func expandPath(path string) (files []string, many bool) {
	pattern := path
	fi, err := os.Stat(path)
	switch {
	case err == nil && !fi.IsDir(), err != nil && !strings.ContainsAny(path, "*?["):
		return []string{path}, false
	case err == nil:
		pattern = filepath.Join(escapeGlob(path), "*")
	}
	found, _ := filepath.Glob(pattern)
	for _, f := range found {
		base := filepath.Base(f)
		if fi, err := os.Stat(f); err == nil && !fi.IsDir() && base[0] != '.' && !strings.HasSuffix(base, "~") {
			files = append(files, f)
		}
	}
	return files, true
}

var globEscaper = strings.NewReplacer("*", `\*`, "?", `\?`, "[", `\[`, `\`, `\\`)

func escapeGlob(path string) string { return globEscaper.Replace(path) }

// Watch reads files again as they change, and fetches URLs as they come due, until
// ctx ends. It watches the files' directories, because a file that is replaced (by
// rename, or through the symbolic links of a Kubernetes volume) takes a watch of
// its own away with it. Changes not seen from there, as to a bind-mounted file, to
// the target of a link, or in a directory that was itself replaced, are found by
// polling.
func (l *Lists) Watch(ctx context.Context) error {
	var urls sync.WaitGroup
	defer urls.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for _, s := range *l.sources.Load() {
		if s.url() {
			urls.Go(func() { l.keepFetching(ctx, s) })
		}
	}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		level.Warn(l.logger).Log("msg", "cannot watch lists, polling only", "every", l.poll, "err", err)
		return l.watch(ctx, nil, nil)
	}
	defer w.Close()
	for _, dir := range l.directories() {
		if err := w.Add(dir); err != nil {
			level.Warn(l.logger).Log("msg", "cannot watch directory, polling only", "dir", dir, "every", l.poll, "err", err)
		}
	}
	return l.watch(ctx, w.Events, w.Errors)
}

// directories returns those to be watched.
func (l *Lists) directories() (dirs []string) {
	for _, n := range l.named {
		dir := filepath.Dir(n.Path)
		if fi, err := os.Stat(n.Path); err == nil && fi.IsDir() {
			dir = n.Path
		}
		if !n.url() && n.Path != "-" && !strings.ContainsAny(dir, "*?[") && !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// watch looks at the files on every event and every poll, but at most once in the
// time a file has to settle.
func (l *Lists) watch(ctx context.Context, events <-chan fsnotify.Event, errs <-chan error) error {
	poll := time.NewTicker(l.poll)
	defer poll.Stop()
	pause := time.NewTimer(0) // the first look finds changes made since the load at start
	defer pause.Stop()
	pausing, due := true, true
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-events:
			due = true
		case err := <-errs:
			level.Warn(l.logger).Log("msg", "watching lists", "err", err)
			due = true // events may be lost
		case <-poll.C:
			due = true
		case <-pause.C:
			pausing = false
		}
		if due && !pausing {
			due = l.look(ctx)
			pause.Reset(l.settle)
			pausing = true
		}
	}
}

// look reads the files that differ from what was last read and no longer change.
// It reports whether others do.
func (l *Lists) look(ctx context.Context) (unsettled bool) {
	_ = l.loadFiles(ctx, func(s *source) bool { // logs
		fi, _ := os.Stat(s.Path)
		changed, settled := !same(fi, s.file.tried), same(fi, s.file.seen)
		s.file.seen = fi
		unsettled = unsettled || changed && !settled
		return changed && settled
	})
	return unsettled
}

// same reports whether a file seems untouched. The mode counts, for a file that
// could not be read and now can.
func same(a, b os.FileInfo) bool {
	if a == nil || b == nil {
		return a == b
	}
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime()) && a.Mode() == b.Mode()
}

// loadFiles reads the files that are due and puts what they hold in force, all at
// once. Only then it logs so.
func (l *Lists) loadFiles(ctx context.Context, due func(*source) bool) error {
	var results []result
	func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		changed := l.expand(false)
		for _, s := range *l.sources.Load() {
			if s.url() || s.read || !due(s) {
				continue
			}
			c, fi, err := l.readFile(ctx, s)
			if ctx.Err() != nil {
				results = append(results, result{source: s, err: ctx.Err()})
				break
			}
			modified := time.Now()
			if fi != nil {
				modified = fi.ModTime()
			}
			r := l.accept(s, c, err, modified)
			r.content = nil
			changed = changed || r.err == nil
			results = append(results, r)
		}
		if changed {
			l.enforce(results)
		}
	}()
	return l.report(results)
}

// attempts is how often a file is read that changes while it is read.
const attempts = 5

// readFile reads the file of s when nobody is writing it. A read that hangs is
// left alone when ctx ends. The caller must hold mu.
func (l *Lists) readFile(ctx context.Context, s *source) (*content, os.FileInfo, error) {
	type outcome struct {
		content *content
		fi      os.FileInfo
		err     error
	}
	done := make(chan outcome, 1)
	go func() {
		var o outcome
		for range attempts {
			o.content, o.fi, o.err = l.readOnce(ctx, s)
			if reasonOf(o.err) != Changing || ctx.Err() != nil {
				break
			}
		}
		done <- o
	}()
	select {
	case o := <-done:
		s.file.tried = o.fi
		s.read = o.err == nil && (s.Path == "-" || o.fi != nil && o.fi.Mode()&os.ModeNamedPipe != 0)
		return o.content, o.fi, o.err
	case <-ctx.Done():
		return new(content), nil, ctx.Err()
	}
}

// readOnce fails as Changing where the file changed within the time it has to
// settle, or while it was read.
func (l *Lists) readOnce(ctx context.Context, s *source) (*content, os.FileInfo, error) {
	if s.Path == "-" {
		c, err := parse(stdin(l.options.Stdin), s.File, s.allow, s.shown, 0)
		return c, nil, err
	}
	before, err := os.Stat(s.Path)
	switch {
	case err != nil:
		return new(content), nil, refuse(Unreadable, err)
	case !before.Mode().IsRegular() && before.Mode()&os.ModeNamedPipe == 0:
		return new(content), before, refuse(Unreadable, fmt.Errorf("%s: neither a file nor a pipe", s.Path))
	}
	f, err := os.Open(s.Path)
	if err != nil {
		return new(content), before, refuse(Unreadable, err)
	}
	defer f.Close()
	if before.Mode().IsRegular() {
		if age := time.Since(before.ModTime()); 0 <= age && age < l.settle {
			wait(ctx, l.settle)
		}
	}
	c, err := parse(f, s.File, s.allow, s.shown, before.Size())
	if after, statErr := os.Stat(s.Path); before.Mode().IsRegular() && (statErr != nil || !same(before, after)) {
		return new(content), before, refuse(Changing, fmt.Errorf("%s: changed while it was read", s.Path))
	}
	return c, before, err
}

func stdin(r io.Reader) io.Reader {
	if r == nil {
		return os.Stdin
	}
	return r
}

// wait returns when d is over or ctx ends.
func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
