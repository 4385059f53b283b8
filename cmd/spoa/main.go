// Command spoa is an IP reputation service acting as a Stream Processing
// Offload Agent of HAProxy: it answers the message check-client-ip, whose one
// argument is the client's address, with the session variable ip_score, an
// integer from 0 to 100. The score comes from reputation lists, or is random if
// there are none.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/go-kit/log"
	"github.com/go-kit/log/level"
	"github.com/oklog/run"
	"github.com/spoa-go/spoa"
	"github.com/spoa-go/spoa/cmd/internal/interrupt"
	"github.com/spoa-go/spoa/cmd/internal/judge"
	"github.com/spoa-go/spoa/cmd/internal/linewriter"
	"github.com/spoa-go/spoa/cmd/internal/listen"
	"github.com/spoa-go/spoa/cmd/internal/logging"
	"github.com/spoa-go/spoa/cmd/internal/reputation"
	"github.com/spoa-go/spoa/cmd/internal/status"
)

// flushTimeout is how long the end waits for the last lines of the log.
const flushTimeout = time.Second

func main() {
	signal.Ignore(syscall.SIGPIPE) // the reader of the log may end before the agent
	os.Exit(realMain(os.Args[1:], os.Stdout, os.Stderr))
}

func realMain(args []string, stdout, stderrFile io.Writer) int {
	stderr := linewriter.New(stderrFile)
	defer stderr.Close(flushTimeout)
	c, err := parse(args, os.Environ())
	switch {
	case errors.Is(err, flag.ErrHelp):
		io.WriteString(stdout, usage)
		return 0
	case err != nil:
		fmt.Fprintf(stderr, "spoa: %s (spoa -h shows what there is)\n", oneLine(err))
		return 2
	case c.version:
		fmt.Fprintln(stdout, "spoa", status.ReadBuild())
		return 0
	}
	switch {
	case c.check:
		err = c.tryOut(stdout, stderr)
	case c.judge.LookUp != "":
		err = c.judge.WriteLookUp(context.Background(), stdout)
	case c.judge.Replay != "":
		err = c.judge.WriteReplay(context.Background(), stdout, logging.New(stderr, c.format()))
	default:
		err = serve(c, stderr)
	}
	if err != nil {
		fmt.Fprintf(stderr, "spoa: %s\n", oneLine(err))
		return 1
	}
	return 0
}

// oneLine returns an error, which may join several and name files, for terminals.
func oneLine(err error) string {
	return reputation.Printable(strings.ReplaceAll(err.Error(), "\n", "; "))
}

const (
	message       = "check-client-ip"
	faultVariable = "ip_fault" // of scope txn: why an ACK has no verdict
	maxFragmented = 1 << 20    // bytes of a NOTIFY put together from fragments
)

// newAgent returns an agent with that handler.
func newAgent(c *config, logger log.Logger, handler spoa.HandlerFunc, hooks spoa.Hooks) *spoa.Agent {
	opts := []spoa.Option{
		spoa.WithHandlerFunc(message, handler),
		spoa.WithWorkers(c.workers),
		spoa.WithMaxFrameSize(c.frame),
		spoa.WithDebug(c.debug),
		spoa.WithLogger(logger),
		spoa.WithHooks(hooks),
		spoa.WithFaultFunc(spoa.ScopeTxn, faultVariable, func(f spoa.Fault, _ error) spoa.Value { return spoa.String(f.String()) }),
	}
	if d := c.timeout(); d > 0 {
		opts = append(opts, spoa.WithHandlerTimeout(d))
	}
	if c.frames > 0 {
		opts = append(opts, spoa.WithRotation(c.frames))
	}
	for _, name := range c.caps {
		switch name {
		case "pipelining":
		case "async":
			opts = append(opts, spoa.WithAsync())
		case "fragmentation":
			opts = append(opts, spoa.WithFragmentation(maxFragmented))
		default:
			level.Warn(logger).Log("msg", "unknown capability", "capability", name)
		}
	}
	return spoa.New(opts...)
}

// service is the agent, its listeners, and what runs beside it.
type service struct {
	config    *config
	logger    log.Logger
	judge     *judge.Judge
	tls       *listen.TLS // nil: none
	agent     *spoa.Agent
	status    *status.Status
	listeners []net.Listener // the first passed of them belong to systemd
	passed    int
	web       net.Listener // of the status server; nil: none
	drain     func()       // begins the end of the agent, once, and returns at once
}

// newService loads the lists and certificates, and opens the listeners.
func newService(ctx context.Context, c *config, logger log.Logger, stderr *linewriter.Writer) (*service, error) {
	s := &service{config: c, logger: logger}
	s.drain = sync.OnceFunc(s.begin)
	var err error
	if s.judge, err = c.judge.Open(ctx, logger); err != nil {
		return nil, err
	}
	if s.tls, err = c.tls.Load(); err != nil {
		return nil, err
	}
	s.status = status.New(status.Config{
		Conns:    func() []spoa.ConnInfo { return s.agent.Conns() },
		Lists:    s.judge.Lists(),
		Sources:  s.judge.Sources(),
		TLS:      s.tls,
		Build:    status.ReadBuild(),
		Messages: []string{message},
		Dropped:  stderr.Dropped,
	})
	var hooks spoa.Hooks
	if c.metrics.Network != "" {
		hooks = s.status.Hooks()
	}
	s.judge.Prepare(ctx)
	s.agent = newAgent(c, logger, s.judge.Handler(c.delay, s.status), hooks)
	if s.listeners, s.passed, err = c.listen.Open(c.defaultAddr(), c.unixMode); err != nil {
		return nil, err
	}
	if c.metrics.Network != "" {
		if s.web, err = c.metrics.Listen(c.unixMode); err != nil {
			listen.CloseAll(s.listeners)
			return nil, err
		}
	}
	return s, nil
}

// serve runs the agent until a signal ends it.
func serve(c *config, stderr *linewriter.Writer) error {
	// Before anything that takes time, so that no signal falls through.
	hup, end := make(chan os.Signal, 1), make(chan os.Signal, 2)
	signal.Notify(hup, syscall.SIGHUP)
	signal.Notify(end, syscall.SIGINT, syscall.SIGTERM)
	defer signal.Stop(hup)
	defer signal.Stop(end)

	logger := logging.Open(stderr, c.format())
	level.Debug(logger).Log("msg", "opening lists, certificates and sockets")
	s, err := interrupt.Wait(end, func(ctx context.Context) (*service, error) { return newService(ctx, c, logger, stderr) })
	switch {
	case errors.Is(err, run.ErrSignal):
		level.Info(logger).Log("msg", "ended before it was ready", "reason", err)
		return nil
	case err != nil:
		return err
	}
	for _, note := range c.notes {
		level.Warn(logger).Log("msg", note)
	}
	var g run.Group
	g.Add(func() error { return s.serve(end) }, func(error) { s.drain() })
	g.Add(interrupt.Actor(func(ctx context.Context) error { return s.reload(ctx, hup) }))
	if s.web != nil {
		level.Info(logger).Log("msg", "metrics", "addr", listen.Name(s.web.Addr()), "access", (*listen.TLS)(nil).Access(s.web.Addr()))
		g.Add(s.status.Actor(s.web))
	}
	for _, task := range s.judge.Tasks() {
		g.Add(interrupt.Actor(task))
	}
	s.notifySystemd(daemon.SdNotifyReady)
	err = g.Run()
	if errors.Is(err, run.ErrSignal) {
		level.Info(logger).Log("msg", "ended", "reason", err)
		return nil
	}
	return err
}

// begin announces the end of the agent and begins its drain.
func (s *service) begin() {
	s.notifySystemd(daemon.SdNotifyStopping)
	s.status.Drain()
	_, shutdown := s.agent.Actor(s.listeners[0], s.config.drain)
	shutdown(nil)
	// The next process has these sockets too; until it accepts, HAProxy waits.
	listen.CloseAll(s.listeners[:s.passed])
}

// serve runs the agent on all listeners and returns when its drain is over. The
// first signal, or a listener that fails, begins the drain; a second signal ends
// it. (run.SignalHandler listens only from its start to the first signal: earlier
// and later ones would kill the process.)
func (s *service) serve(end <-chan os.Signal) error {
	errs := make(chan error)
	for _, l := range s.listeners {
		level.Info(s.logger).Log("msg", "listening", "addr", listen.Name(l.Addr()), "access", s.tls.Access(l.Addr()))
		go func() { errs <- s.serveOne(l) }()
	}
	var failed, signalled error
	for left := len(s.listeners); left > 0; {
		select {
		case err := <-errs:
			failed = cmp.Or(failed, err)
			left--
		case sig := <-end:
			if signalled != nil {
				level.Warn(s.logger).Log("msg", "second signal: closing at once")
				s.agent.Close()
				continue
			}
			signalled = &run.SignalError{Signal: sig}
			s.drain()
		}
	}
	return cmp.Or(failed, signalled)
}

// serveOne serves a listener until the drain is over, and returns why it failed
// before, if so.
func (s *service) serveOne(l net.Listener) error {
	err := s.agent.Serve(s.tls.Wrap(l))
	if errors.Is(err, spoa.ErrAgentClosed) {
		return nil
	}
	s.drain()
	s.agent.Serve(l) // only waits
	return err
}

// reload reads lists and certificates again at each signal, until ctx ends.
func (s *service) reload(ctx context.Context, hup <-chan os.Signal) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hup:
			s.notifySystemd(daemon.SdNotifyReloading + "\n" + daemon.SdNotifyMonotonicUsec())
			s.reloadOnce(ctx)
			s.notifySystemd(daemon.SdNotifyReady)
		}
	}
}

// reloadOnce logs what cannot be used; the old stays in force.
func (s *service) reloadOnce(ctx context.Context) {
	level.Info(s.logger).Log("msg", "reloading")
	s.judge.Reload(ctx)
	if s.tls != nil {
		if err := s.tls.Reload(); err != nil {
			level.Error(s.logger).Log("msg", "certificates not reloaded, the old ones stay in force", "err", oneLine(err))
		}
	}
}

func (s *service) notifySystemd(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		level.Warn(s.logger).Log("msg", "cannot notify systemd", "err", err)
	}
}
