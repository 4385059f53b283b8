package reputation

import (
	"context"
	"os"
	"time"
)

// WatchFile calls changed whenever the file at path was replaced or changed and
// then stayed as it is for one interval. It looks at the file once in each
// interval, until ctx ends. Its caller has read the file as described by read,
// which may be nil.
func WatchFile(ctx context.Context, path string, interval time.Duration, read os.FileInfo, changed func(os.FileInfo)) {
	t := time.NewTicker(interval)
	defer t.Stop()
	last := read // as it was at the last look
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		fi, err := os.Stat(path)
		if err != nil { // as between a removal and what takes its place
			continue
		}
		if !sameFile(fi, read) && sameFile(fi, last) {
			read = fi
			changed(fi)
		}
		last = fi
	}
}

// sameFile reports whether a file seems untouched. The mode counts, for a file
// that could not be read and now can.
func sameFile(a, b os.FileInfo) bool {
	if a == nil || b == nil {
		return a == b
	}
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime()) && a.Mode() == b.Mode()
}
