package spoa

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
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
	timeouts       map[string]time.Duration // of the messages that have one of their own
	maxConcurrent  map[string]int           // of the messages that are bounded
	middleware     []func(Handler) Handler
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
	faultVars      []faultVar
	faultFuncs     bool               // one of them depends on the error
	faultActions   [faultCount][]byte // the variables of each fault, as actions
	logger         log.Logger
	debug          bool
	hooks          Hooks
	stats          bool
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
	for name, h := range o.handlers {
		o.handlers[name] = o.wrap(h)
	}
	if o.fallback != nil {
		o.fallback = o.wrap(o.fallback)
	}
	o.prepareFaults()
	return o
}

// wrap returns h within the middleware.
func (o *options) wrap(h Handler) Handler {
	for _, mw := range slices.Backward(o.middleware) {
		next := mw(h)
		if next == nil {
			o.bad("WithMiddleware: returned nil")
			return h
		}
		h = next
	}
	return h
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

// timeout returns d, and notes a bad option if that is less than least.
func (o *options) timeout(option string, d, least time.Duration) time.Duration {
	atLeast(o, option, d, least)
	return min(d, maxTimeout)
}

// WithHandler makes h answer the messages of that name: the name of the
// spoe-message section in HAProxy's configuration. Each name has one handler.
func WithHandler(message string, h Handler, opts ...HandlerOption) Option {
	return func(o *options) {
		switch _, dup := o.handlers[message]; {
		case message == "":
			o.bad("WithHandler: empty message name")
		case isNil(h):
			o.bad("WithHandler(%q): nil handler", message)
		case dup:
			o.bad("WithHandler(%q): second handler of that name", message)
		default:
			o.handlers[message] = h
		}
		o.configure(fmt.Sprintf("WithHandler(%q)", message), message, opts)
	}
}

// WithHandlerFunc is WithHandler for a function.
func WithHandlerFunc(message string, f HandlerFunc, opts ...HandlerOption) Option {
	return WithHandler(message, f, opts...)
}

func isNil(h Handler) bool {
	f, isFunc := h.(HandlerFunc)
	return h == nil || isFunc && f == nil
}

// HandlerOption is an option of WithHandler, for messages of that name, and of
// WithFallback, for all others together.
type HandlerOption func(o *options, kind string)

// kind returns what the options of a message's handler are kept by: its name, or
// nothing if it has no handler of its own.
func (o *options) kind(message string) string {
	if o.handlers[message] == nil {
		return ""
	}
	return message
}

// configure applies the options of a handler.
func (o *options) configure(option, kind string, opts []HandlerOption) {
	for _, opt := range opts {
		if opt == nil {
			o.bad("%s: nil option", option)
			continue
		}
		opt(o, kind)
	}
}

// Timeout sets a handler timeout for one kind of message, in place of that of
// WithHandlerTimeout: a millisecond or more. A NOTIFY with messages of several
// kinds has the longest of their timeouts, none if one of them has none.
func Timeout(d time.Duration) HandlerOption {
	return func(o *options, kind string) {
		if o.timeouts == nil {
			o.timeouts = make(map[string]time.Duration)
		}
		o.timeouts[kind] = o.timeout("Timeout", d, time.Millisecond)
	}
}

// MaxConcurrent bounds how many handlers of one kind of message run at once: 1 or
// more. If it is less than WithWorkers, a slow kind leaves workers to the others.
// NOTIFYs beyond it wait without a worker, and others pass them. Each counts as one
// in flight of WithPipelining, and waits until its handler timeout, if there is one.
//
// A NOTIFY runs on one worker. With messages of several kinds it counts for each
// of them until all are done, so a quick message should not share its spoe-group
// with a slow one. A handler that is late counts until it returns.
func MaxConcurrent(n int) HandlerOption {
	return func(o *options, kind string) {
		if o.maxConcurrent == nil {
			o.maxConcurrent = make(map[string]int)
		}
		atLeast(o, "MaxConcurrent", n, 1)
		o.maxConcurrent[kind] = n
	}
}

// WithMiddleware wraps every handler, also that of WithFallback, in mw, for what
// all have in common: tracing, authorization, a deadline. Of several the first is
// the outermost. It is called by New; a message that no handler is for does not
// pass through it.
func WithMiddleware(mw ...func(Handler) Handler) Option {
	return func(o *options) {
		for _, m := range mw {
			if m == nil {
				o.bad("WithMiddleware: nil function")
				continue
			}
			o.middleware = append(o.middleware, m)
		}
	}
}

// WithFallback makes h answer the messages that no other handler is for. Without
// it they get no action, and the log says so once per name. Its options count all
// these messages as one kind.
func WithFallback(h Handler, opts ...HandlerOption) Option {
	return func(o *options) {
		if isNil(h) {
			o.bad("WithFallback: nil handler")
			return
		}
		o.fallback = h
		o.configure("WithFallback", "", opts)
	}
}

// WithWorkers bounds how many handlers of the agent run at once: 1 or more, 256 by
// default. Beyond that NOTIFYs wait, and connections take turns. A handler that
// is late goes on counting until it returns. Goroutines are started as needed,
// none in advance.
func WithWorkers(n int) Option {
	return func(o *options) {
		atLeast(o, "WithWorkers", n, 1)
		o.workers = n
	}
}

// WithPipelining sets how many NOTIFYs of one connection may wait for their ACK,
// 32 by default; HAProxy uses up to 20. Beyond that the connection is not read.
// With n of 1 or less the capability pipelining is not announced (SPOE.txt 3.2.1),
// and HAProxy sends one at a time. There is no upper bound to n, but one of
// memory: a connection with 1 MiB of NOTIFYs in flight, or an agent with 64 MiB,
// reads no more until some are answered.
func WithPipelining(n int) Option {
	return func(o *options) { o.pipelining = max(n, 1) }
}

// WithAsync announces the capability async (SPOE.txt 3.2.1) to a HAProxy that
// offers it and has an engine-id, which is HAProxy up to 3.0. An ACK still leaves
// on the connection of its NOTIFY; if that was lost, by another one of the same
// engine-id and Serve.
func WithAsync() Option {
	return func(o *options) { o.async = true }
}

// WithFragmentation announces the capability fragmentation and reassembles
// NOTIFYs that HAProxy (up to 3.0) sends in several frames (SPOE.txt 3.2). Max is
// the size of a NOTIFY in bytes: 256 or more. A longer one is refused with an ACK
// that carries ABORT; one that is not complete within WithHelloTimeout ends its
// connection. A connection may take up to max bytes of memory beside others.
func WithFragmentation(max int) Option {
	return func(o *options) {
		atLeast(o, "WithFragmentation", max, minFrameSize)
		o.fragmentation = max
	}
}

// WithMaxFrameSize sets the upper bound in the negotiation of the frame size
// (SPOE.txt 3.2.4, 3.2.5), in bytes without the length field: from 256 to 1<<28,
// 65535 by default. HAProxy offers its tune.bufsize less 4. A connection's buffer
// grows to the largest frame that was received, and shrinks when it is idle.
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

// WithRotation closes a connection after that many NOTIFYs, 1 or more, as soon as
// none is in flight. HAProxy may lose the request that it sends at that very moment, so
// this is off by default.
func WithRotation(notifies int) Option {
	return func(o *options) {
		atLeast(o, "WithRotation", notifies, 1)
		o.rotation = notifies
	}
}

// WithHelloTimeout sets how long a peer may take for its HELLO, and for any later
// frame or fragmented NOTIFY once that has begun: more than 0, 10 s by default. A
// peer that takes longer is sent an AGENT-DISCONNECT with StatusTimeout.
func WithHelloTimeout(d time.Duration) Option {
	return func(o *options) {
		o.helloTimeout = o.timeout("WithHelloTimeout", d, 1)
	}
}

// WithIdleTimeout closes a connection that has received nothing for that long, more
// than 0, and has nothing in flight, with StatusTimeout. If something is in flight
// at that time it may take twice as long. It is off by default: HAProxy's
// connections are idle when its clients are.
func WithIdleTimeout(d time.Duration) Option {
	return func(o *options) {
		o.idleTimeout = o.timeout("WithIdleTimeout", d, 1)
	}
}

// WithWriteTimeout sets how long a peer may leave an ACK unread before its
// connection is closed: more than 0, 10 s by default. It may take a quarter
// longer.
func WithWriteTimeout(d time.Duration) Option {
	return func(o *options) {
		o.writeTimeout = o.timeout("WithWriteTimeout", d, 1)
	}
}

// WithHandlerTimeout sets how long after its arrival a NOTIFY is answered at the
// latest, within about 2 ms, even if its handler goes on. It is a millisecond or
// more and should be a little less than HAProxy's `timeout processing`. It is off
// by default. WithHandler takes a Timeout for one kind of message.
//
// The handler's context has that deadline. The actions of messages that are done
// are sent; those of the late handler are not, and it counts as one of
// WithWorkers until it returns. A NOTIFY whose turn comes only after that time is
// answered without a call of its handler. With a timeout a NOTIFY costs an
// allocation, for its context.
func WithHandlerTimeout(d time.Duration) Option {
	return func(o *options) {
		o.handlerTimeout = o.timeout("WithHandlerTimeout", d, time.Millisecond)
	}
}

const (
	maxFaultName    = 63  // bytes, HAProxy's own limit
	maxFaultText    = 128 // bytes of a string
	maxFaultActions = 200 // bytes of all variables together: less than the smallest frame
)

// WithFaultVar makes the agent set a variable to v in the ACK of a NOTIFY that
// has one of these faults, of any kind if none is given. Other ACKs do not set
// it. It may be given several times, for several variables.
//
// Rules that HAProxy's documentation and agents' examples show test an integer,
// since `option set-on-error` sets one: give them
//
//	spoa.WithFaultVar(spoa.ScopeTxn, "error", spoa.Int(255))
//
// with `http-request deny if { var(txn.iprep.error) -m int gt 0 }`. A string there
// lets the request pass.
//
// The name may have up to 63 bytes; HAProxy's limit of 63 counts scope and
// var-prefix too. A NOTIFY with several faults has the first one's variables. If
// they do not fit into the frame beside other actions, those are left out.
func WithFaultVar(s Scope, name string, v Value, faults ...Fault) Option {
	v = v.Clone()
	return func(o *options) {
		if v.kind == KindNull {
			o.bad("WithFaultVar(%v, %q): want a value, have NULL", s, name)
			return
		}
		if len(v.s) > maxFaultText {
			o.bad("WithFaultVar(%v, %q): value of %d bytes: want at most %d", s, name, len(v.s), maxFaultText)
			return
		}
		for _, f := range faults {
			if f == 0 || f >= faultCount {
				o.bad("WithFaultVar(%v, %q): no such fault: %v", s, name, f)
			}
		}
		o.addFaultVar("WithFaultVar", faultVar{s, name, func(f Fault, _ error) Value {
			if len(faults) > 0 && !slices.Contains(faults, f) {
				return Value{}
			}
			return v
		}})
	}
}

// WithFaultFunc is WithFaultVar with a value that depends on the fault: f is
// called with its kind and the error that Hooks report. The variable is not set
// if f returns NULL. A string is cut to 128 bytes. F may be called by several
// goroutines at once; it is also called by New, for the faults whose error is
// always the same.
func WithFaultFunc(s Scope, name string, f func(Fault, error) Value) Option {
	return func(o *options) {
		if f == nil {
			o.bad("WithFaultFunc(%v, %q): nil function", s, name)
			return
		}
		o.faultFuncs = true
		o.addFaultVar("WithFaultFunc", faultVar{s, name, f})
	}
}

// faultVar is a variable that is set in the ACK of a NOTIFY with a fault.
type faultVar struct {
	scope Scope
	name  string
	value func(Fault, error) Value
}

func (o *options) addFaultVar(option string, v faultVar) {
	var a Actions
	a.UnsetVar(v.scope, v.name)
	switch {
	case a.err != nil:
		o.bad("%s: %v", option, a.err)
	case len(v.name) > maxFaultName:
		o.bad("%s: name of %d bytes: want at most %d", option, len(v.name), maxFaultName)
	default:
		o.faultVars = append(o.faultVars, v)
	}
}

// faultErrors has an error for each fault: the one that the fault always has, or
// else one that stands for all that it may have.
var faultErrors = [faultCount]error{
	FaultError:     errors.New("spoa: handler failed"),
	FaultPanic:     &PanicError{Value: "panic"},
	FaultTimeout:   context.DeadlineExceeded,
	FaultOverload:  ErrOverload,
	FaultNoHandler: ErrNoHandler,
}

// prepareFaults computes the actions of each fault, for the errors that are known
// in advance.
func (o *options) prepareFaults() {
	for f := FaultError; f < faultCount; f++ {
		o.faultActions[f] = o.newFaultActions(f, faultErrors[f], maxFaultActions)
	}
}

// newFaultActions returns the actions that set the variables of a fault. They take
// up to size bytes.
func (o *options) newFaultActions(f Fault, err error, size int) []byte {
	a := Actions{max: size}
	for _, v := range o.faultVars {
		if value := v.valueOf(f, err); value.kind != KindNull {
			a.SetVar(v.scope, v.name, value)
		}
	}
	if a.err != nil && size == maxFaultActions {
		o.bad("WithFaultVar: %d bytes are too few for the variables of fault %v: %v", size, f, a.err)
	}
	return a.buf
}

// valueOf returns the value for a fault. If the user's function panics it is the
// name of the fault.
func (v *faultVar) valueOf(f Fault, err error) (value Value) {
	defer func() {
		if recover() != nil {
			value = String(f.String())
		}
	}()
	value = v.value(f, err)
	if value.isText() && len(value.s) > maxFaultText {
		value.s = value.s[:maxFaultText]
	}
	return value
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

// WithDebug logs every frame in readable form, at level debug. The logger must let
// that level through, which the default does not.
func WithDebug(on bool) Option {
	return func(o *options) { o.debug = on }
}

// WithHooks sets functions that are called as things happen. It replaces those of
// an earlier WithHooks.
func WithHooks(h Hooks) Option {
	return func(o *options) { o.hooks = h }
}

// WithStats makes the agent count what becomes of messages, for Agent.Stats. It is
// off by default because each call of a handler then reads the clock twice, as it
// does with hooks, which a quick handler's NOTIFY feels. It allocates nothing.
func WithStats() Option {
	return func(o *options) { o.stats = true }
}

// Hooks are called as things happen, to count them or to trace them. Each may be
// nil. They are called by many goroutines at once: ConnOpened by the one that
// accepts connections, the others by the one that serves a connection, or by a
// worker's. While a hook runs, that goroutine does nothing else, so it must not
// block. It must not panic either, which ends the program. It may call the agent's
// methods, but for Serve, ListenAndServe and Shutdown.
type Hooks struct {
	// ConnOpened: a connection was accepted. Only its Addr is known yet.
	ConnOpened func(p Peer)

	// ConnClosed: a connection has ended. The error is nil if the peer closed
	// it, or the agent did without a fault; it is a *DisconnectError if either
	// side sent a reason.
	ConnClosed func(p Peer, err error)

	// Handled: a message was handled, in that time. The error is the handler's,
	// a *PanicError, ErrNoHandler, ErrOverload if its turn came too late, or
	// context.DeadlineExceeded if it returned too late.
	Handled func(message string, took time.Duration, err error)

	// Message: the same, with all there is to know.
	Message func(e MessageEvent)
}

// MessageEvent is how a message was handled.
type MessageEvent struct {
	Message string        // its name, which the peer chose
	Peer    Peer          // of its connection
	Took    time.Duration // by the handler's call; 0 if there was none
	Err     error         // as Hooks.Handled has it
	Fault   Fault         // what WithFaultVar sends for Err; 0 if that is nil
	Late    bool          // the handler timeout was over when the handler returned, or before its call
}

// Peer is the other end of a connection.
type Peer struct {
	Addr         net.Addr // what net.Conn.RemoteAddr has returned, which may be nil
	EngineID     string   // of its HELLO, empty if it had none; any bytes, up to a frame
	Capabilities string   // those agreed on, a comma list
	FrameSize    int      // the one agreed on, in bytes without the length field; 0 before the HELLO
	HealthCheck  bool     // the HELLO was a health check
}
