package spoa

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/go-kit/log"
	"github.com/go-kit/log/level"
)

// Option is an option of New. A bad one is reported by Serve.
type Option func(*options)

// options are the settings of an agent, fixed by New.
type options struct {
	handlers       map[string]Handler
	fallback       Handler
	workers        int
	pipelining     int
	async          bool
	fragmentation  int
	frameSize      int
	rotation       int
	maxConns       int
	helloTimeout   time.Duration
	idleTimeout    time.Duration
	writeTimeout   time.Duration
	handlerTimeout time.Duration
	faultVars      [faultCount][]byte // the action that tells of each fault; nil: none
	logger         log.Logger
	debug          bool
	hooks          Hooks
	errs           []error
}

func newOptions(opts []Option) *options {
	o := &options{
		handlers:     make(map[string]Handler),
		workers:      256,
		pipelining:   32,
		frameSize:    defaultFrameSize,
		maxConns:     defaultMaxConns,
		helloTimeout: 10 * time.Second,
		writeTimeout: 10 * time.Second,
		logger:       slogLogger{least: slog.LevelWarn},
	}
	for i, opt := range opts {
		if opt == nil {
			o.bad("option %d is nil", i)
			continue
		}
		opt(o)
	}
	return o
}

func (o *options) bad(format string, args ...any) {
	o.errs = append(o.errs, fmt.Errorf("spoa: "+format, args...))
}

// terms returns what the agent's HELLO can agree to.
func (o *options) terms() terms {
	return terms{frameSize: o.frameSize, pipelining: o.pipelining > 1, async: o.async, fragmentation: o.fragmentation > 0}
}

func (o *options) err() error { return errors.Join(o.errs...) }

// atLeast notes a bad option unless n is least or more.
func atLeast[N int | time.Duration](o *options, option string, n, least N) {
	if n < least {
		o.bad("%s(%v): want at least %v", option, n, least)
	}
}

// maxTimeout is as good as none; sums with it don't overflow.
const maxTimeout = 100 * 365 * 24 * time.Hour

// timeout returns d, of which it notes if it is too short.
func (o *options) timeout(option string, d, least time.Duration) time.Duration {
	atLeast(o, option, d, least)
	return min(d, maxTimeout)
}

// WithHandler has h answer the messages of that name: the name of the
// spoe-message section in HAProxy's configuration. Each name has one handler.
func WithHandler(message string, h Handler) Option {
	return func(o *options) {
		f, isFunc := h.(HandlerFunc)
		switch _, dup := o.handlers[message]; {
		case message == "":
			o.bad("WithHandler: empty message name")
		case h == nil || isFunc && f == nil:
			o.bad("WithHandler(%q): nil handler", message)
		case dup:
			o.bad("WithHandler(%q): second handler of that name", message)
		default:
			o.handlers[message] = h
		}
	}
}

// WithHandlerFunc is WithHandler for a function.
func WithHandlerFunc(message string, f HandlerFunc) Option { return WithHandler(message, f) }

// WithFallback has h answer the messages that no other handler is for. Without
// it they get no action, and the log says so once per name.
func WithFallback(h Handler) Option {
	return func(o *options) {
		if f, isFunc := h.(HandlerFunc); h == nil || isFunc && f == nil {
			o.bad("WithFallback: nil handler")
			return
		}
		o.fallback = h
	}
}

// WithWorkers bounds how many handlers of the agent run at once, 256 by
// default. Beyond that NOTIFYs wait, shared fairly between the connections.
func WithWorkers(n int) Option {
	return func(o *options) {
		atLeast(o, "WithWorkers", n, 1)
		o.workers = n
	}
}

// WithPipelining sets how many NOTIFYs of one connection may be waiting for
// their ACK, 32 by default; HAProxy uses up to 20. Beyond that the connection
// is not read. With n of 1 or less the capability is not announced, and HAProxy
// sends one at a time.
func WithPipelining(n int) Option {
	return func(o *options) { o.pipelining = max(n, 1) }
}

// WithAsync announces the capability async to a HAProxy that offers it and has
// an engine-id (HAProxy up to 3.0). An ACK still leaves on the connection of its
// NOTIFY; if that has gone, by another one of the same engine-id and Serve.
func WithAsync() Option {
	return func(o *options) { o.async = true }
}

// WithFragmentation announces the capability fragmentation and reassembles
// NOTIFYs that HAProxy (up to 3.0) sends in several frames, up to max bytes
// each. A longer one is refused with an ACK that carries ABORT.
func WithFragmentation(max int) Option {
	return func(o *options) {
		atLeast(o, "WithFragmentation", max, minFrameSize)
		o.fragmentation = max
	}
}

// WithMaxFrameSize sets the upper bound in the negotiation of the frame size,
// in bytes without the length field: 256 or more, 65535 by default. HAProxy
// offers its tune.bufsize less 4.
func WithMaxFrameSize(n int) Option {
	return func(o *options) {
		atLeast(o, "WithMaxFrameSize", n, minFrameSize)
		if int64(n) > maxFrameSize {
			o.bad("WithMaxFrameSize(%d): want at most %d", n, int64(maxFrameSize))
		}
		o.frameSize = n
	}
}

const defaultMaxConns = 16384

// WithMaxConns bounds how many connections the agent serves at once, on all
// listeners together: 1 or more, 16384 by default. One more is closed at once;
// its peer is sent an AGENT-DISCONNECT with StatusNoResources, unless another is
// being told so at that moment. An idle connection takes about 10 KiB of memory;
// a busy one up to its frame size and 64 KiB for reading and as much for ACKs.
func WithMaxConns(n int) Option {
	return func(o *options) {
		atLeast(o, "WithMaxConns", n, 1)
		o.maxConns = n
	}
}

// WithRotation closes a connection after that many NOTIFYs, as soon as none is
// in flight. HAProxy may lose the request that it sends at that very moment, so
// this is off by default.
func WithRotation(notifies int) Option {
	return func(o *options) {
		atLeast(o, "WithRotation", notifies, 1)
		o.rotation = notifies
	}
}

// WithHelloTimeout sets how long a peer may take for its HELLO, and for any
// later frame once that has begun: 10 s by default.
func WithHelloTimeout(d time.Duration) Option {
	return func(o *options) {
		o.helloTimeout = o.timeout("WithHelloTimeout", d, 1)
	}
}

// WithIdleTimeout closes connections on which nothing has come for that long
// and nothing is in flight. Off by default: HAProxy's connections are idle when
// its clients are.
func WithIdleTimeout(d time.Duration) Option {
	return func(o *options) {
		o.idleTimeout = o.timeout("WithIdleTimeout", d, 1)
	}
}

// WithWriteTimeout sets how long a peer may leave an ACK unread before its
// connection is closed, within a quarter: 10 s by default.
func WithWriteTimeout(d time.Duration) Option {
	return func(o *options) {
		o.writeTimeout = o.timeout("WithWriteTimeout", d, 1)
	}
}

// WithHandlerTimeout sets how long after its arrival a NOTIFY is answered at
// the latest, within about 2 ms, also if its handler goes on: a little less than
// HAProxy's `timeout processing`. The handler's context has that deadline. The
// actions of the messages already done are sent, those that a late handler sets
// are dropped. A NOTIFY whose turn comes only after that time is answered
// without a call of its handler. Off by default.
func WithHandlerTimeout(d time.Duration) Option {
	return func(o *options) {
		o.handlerTimeout = o.timeout("WithHandlerTimeout", d, time.Millisecond)
	}
}

// maxFaultVar also leaves room for other actions in the smallest frame.
const maxFaultVar = 63

// WithFaultVar has an ACK whose handler failed set this variable to "error",
// "panic", "timeout" or "overload". It is absent from others. HAProxy takes
// names of up to 63 bytes, scope and var-prefix included.
func WithFaultVar(s Scope, name string) Option {
	return func(o *options) {
		if len(name) > maxFaultVar {
			o.bad("WithFaultVar: name of %d bytes: want at most %d", len(name), maxFaultVar)
			return
		}
		for f := faultNone + 1; f < faultCount; f++ {
			var a Actions
			a.SetVar(s, name, String(f.String()))
			if a.err != nil {
				o.bad("WithFaultVar: %v", a.err)
				return
			}
			o.faultVars[f] = a.buf
		}
	}
}

// WithSlog makes the agent log to l. Levels are slog's; addresses, errors and
// other values that can are given as strings.
//
// By default the agent logs warnings and errors to slog.Default, as an
// http.Server without an ErrorLog does: an agent whose handlers fail lets
// requests pass, which must not happen in silence. To silence it, give it
// slog.New(slog.DiscardHandler).
func WithSlog(l *slog.Logger) Option {
	return func(o *options) {
		if l == nil {
			o.bad("WithSlog: nil logger")
			return
		}
		o.logger = slogLogger{l, slog.LevelDebug}
	}
}

// slogLogger is a log.Logger that logs to slog.
type slogLogger struct {
	logger *slog.Logger // nil: slog.Default at the time of each line
	least  slog.Level
}

func (s slogLogger) Log(keyvals ...any) error {
	logger := s.logger
	if logger == nil {
		logger = slog.Default()
	}
	ctx, l := context.Background(), slogLevel(keyvals)
	if l < s.least || !logger.Enabled(ctx, l) {
		return nil
	}
	r := slog.NewRecord(time.Now(), l, "", 0)
	for i := 0; i+1 < len(keyvals); i += 2 {
		switch k, v := keyvals[i], slogValue(keyvals[i+1]); k {
		case level.Key():
		case "msg":
			r.Message = v.String()
		default:
			r.AddAttrs(slog.Attr{Key: fmt.Sprint(k), Value: v})
		}
	}
	return logger.Handler().Handle(ctx, r)
}

func slogLevel(keyvals []any) slog.Level {
	for i := 0; i+1 < len(keyvals); i += 2 {
		if keyvals[i] == level.Key() {
			switch keyvals[i+1] {
			case level.DebugValue():
				return slog.LevelDebug
			case level.WarnValue():
				return slog.LevelWarn
			case level.ErrorValue():
				return slog.LevelError
			}
		}
	}
	return slog.LevelInfo
}

// slogValue makes a string of what would become a struct or numbers in JSON.
func slogValue(v any) slog.Value {
	switch v := v.(type) {
	case time.Duration:
		return slog.DurationValue(v)
	case error:
		return slog.StringValue(v.Error())
	case fmt.Stringer:
		return slog.StringValue(v.String())
	case []byte:
		return slog.StringValue(string(v))
	}
	return slog.AnyValue(v)
}

// WithLogger makes the agent log to l, in levels. See WithSlog for the default.
func WithLogger(l log.Logger) Option {
	return func(o *options) {
		if l == nil {
			o.bad("WithLogger: nil logger")
			return
		}
		o.logger = l
	}
}

// WithDebug logs every frame in readable form, at level debug.
func WithDebug(on bool) Option {
	return func(o *options) { o.debug = on }
}

// WithHooks sets functions that are called as things happen.
func WithHooks(h Hooks) Option {
	return func(o *options) { o.hooks = h }
}

// Hooks are called as things happen, to count them or to trace them. Each may
// be nil. They are called by many goroutines at once, must not block, and must
// not call the agent's Shutdown.
type Hooks struct {
	// ConnOpened: a connection was accepted. Only its Addr is known yet.
	ConnOpened func(p Peer)

	// ConnClosed: it has ended, with what its HELLO said if it had one. The
	// error is nil if it just ended, a *DisconnectError if either side said
	// why.
	ConnClosed func(p Peer, err error)

	// Handled: a message was dealt with, in that time. The error is the
	// handler's, a *PanicError, ErrNoHandler, ErrOverload if it was not called
	// for want of time, or context.DeadlineExceeded if it returned too late.
	Handled func(message string, took time.Duration, err error)
}

// Peer is the other end of a connection.
type Peer struct {
	Addr         net.Addr
	EngineID     string // of its HELLO, empty if it had none
	Capabilities string // those agreed on, a comma list
	FrameSize    int    // the one agreed on; 0 before the HELLO
	HealthCheck  bool   // the HELLO was a health check
}
