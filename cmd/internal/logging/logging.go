// Package logging makes the logger of a command whose standard error may stand
// still.
package logging

import (
	"bytes"
	"io"
	stdlog "log"

	"github.com/go-kit/log"
	"github.com/go-kit/log/level"
	"github.com/spoa-go/spoa/cmd/internal/linewriter"
)

// Format is how lines of the log look, and which there are.
type Format struct {
	JSON  bool   // not logfmt
	Level string // the least that is logged: debug, info, warn or error
}

// New returns a logger to w, which may be used concurrently.
func New(w io.Writer, f Format) log.Logger {
	w = log.NewSyncWriter(w)
	logger := log.NewLogfmtLogger(w)
	if f.JSON {
		logger = log.NewJSONLogger(w)
	}
	least := level.ParseDefault(f.Level, level.InfoValue())
	return level.NewFilter(log.With(logger, "ts", log.DefaultTimestampUTC), level.Allow(least))
}

// Open returns the logger of the process. Dropped lines are a warning in it, and so
// is what others write to the default logger of package log, as net/http does: they
// would wait for standard error otherwise.
func Open(w *linewriter.Writer, f Format) log.Logger {
	logger := New(w, f)
	w.Notice(func(dropped uint64) []byte {
		var b bytes.Buffer
		level.Warn(New(&b, f)).Log("msg", "log lines dropped, which could not be written", "count", dropped)
		return b.Bytes()
	})
	stdlog.SetFlags(0)
	stdlog.SetOutput(log.NewStdlibAdapter(level.Warn(logger)))
	return logger
}
