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
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/go-kit/log"
	"github.com/go-kit/log/level"
	"github.com/oklog/run"
	"github.com/peterbourgon/ff/v3"
	"github.com/spoa-go/spoa"
)

func main() {
	os.Exit(realMain(os.Args[1:], os.Stdout, os.Stderr))
}

const usage = `Usage: spoa [-h] [-d] [-m max-frame-size] [-p port] [-n workers] [-c capability]
            [-t time] [-f frames] [flags]

Answers HAProxy's message check-client-ip with the session variable ip_score,
from 0 for the worst addresses to 100 for those on no list.

  -h            show this text
  -d            log every frame
  -m bytes      largest frame to agree on, 256 or more (default 65535)
  -p port       listen on this port of 127.0.0.1 (default 12345)
  -n workers    handlers that run at once (default 5)
  -c name       announce a capability, repeatable: pipelining (always on),
                async, fragmentation
  -t time       wait before each answer: 15 (milliseconds), or 10us, 15ms, 1s
  -f frames     close a connection after that many frames

  -reputation file[=score]
                the addresses of this list have that score (default 0) unless a
                line names one; repeatable. Without any list scores are random
  -allow file   the addresses of this list score 100 whatever others say;
                repeatable

  -listen addr  listen here instead: host:port, unix:/path, or systemd, which
                must have passed sockets then (any are used); repeatable
  -unix-mode m  permissions of unix sockets (default 0660)
  -tls-cert file, -tls-key file
                speak TLS on TCP, with this certificate
  -tls-client-ca file
                let in only clients with a certificate of these authorities
  -metrics addr serve /metrics, /healthz, /readyz and a status page here
  -drain time   how long ending may take on SIGTERM or SIGINT (default 10s); a
                second signal ends it at once

  -log-format f logfmt (default) or json
  -log-level l  debug, info (default), warn or error
  -config file  read flags from a file of lines such as "listen 127.0.0.1:12345"
  -check        check flags, lists and certificates, and exit
  -version      show the version

Each flag can come from the environment too: SPOA_LISTEN, SPOA_TLS_CERT, and so
on, with commas between the values of a repeatable one. The command line wins
over the environment, and that over the file. SIGHUP reads lists and
certificates again; lists are also read when their files change.
`

// config is what the command line, the environment and the file say.
type config struct {
	debug      bool
	frame      int
	port       uint
	workers    int
	caps       stringList
	delay      delay
	frames     int
	reputation listFiles
	allow      stringList
	listen     stringList
	unixMode   fileMode
	cert       string
	key        string
	clientCA   string
	metrics    string
	drain      time.Duration
	logFormat  string
	logLevel   string
	check      bool
	version    bool
}

// stringList is a repeatable flag.
type stringList []string

func (l *stringList) String() string { return strings.Join(*l, ",") }

func (l *stringList) Set(s string) error {
	*l = append(*l, s)
	return nil
}

// delay is a flag: a duration, or milliseconds without a unit.
type delay time.Duration

func (d *delay) String() string { return time.Duration(*d).String() }

func (d *delay) Set(s string) error {
	if _, err := strconv.ParseUint(s, 10, 31); err == nil {
		s += "ms"
	}
	t, err := time.ParseDuration(s)
	if err != nil || t < 0 {
		return errors.New("want a time such as 15 (milliseconds), 10us, 15ms or 1s")
	}
	*d = delay(t)
	return nil
}

// fileMode is a flag: permissions, in octal.
type fileMode os.FileMode

func (m *fileMode) String() string { return fmt.Sprintf("%04o", uint32(*m)) }

func (m *fileMode) Set(s string) error {
	n, err := strconv.ParseUint(s, 8, 32)
	if err != nil || n > 0o777 {
		return errors.New("want permissions in octal, such as 0660")
	}
	*m = fileMode(n)
	return nil
}

// flags returns the flags, which fill c.
func (c *config) flags() *flag.FlagSet {
	c.unixMode = 0o660
	fs := flag.NewFlagSet("spoa", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.Usage = func() {}
	fs.BoolVar(&c.debug, "d", false, "")
	fs.IntVar(&c.frame, "m", 65535, "")
	fs.UintVar(&c.port, "p", 12345, "")
	fs.IntVar(&c.workers, "n", 5, "")
	fs.Var(&c.caps, "c", "")
	fs.Var(&c.delay, "t", "")
	fs.IntVar(&c.frames, "f", 0, "")
	fs.Var(&c.reputation, "reputation", "")
	fs.Var(&c.allow, "allow", "")
	fs.Var(&c.listen, "listen", "")
	fs.Var(&c.unixMode, "unix-mode", "")
	fs.StringVar(&c.cert, "tls-cert", "", "")
	fs.StringVar(&c.key, "tls-key", "", "")
	fs.StringVar(&c.clientCA, "tls-client-ca", "", "")
	fs.StringVar(&c.metrics, "metrics", "", "")
	fs.DurationVar(&c.drain, "drain", 10*time.Second, "")
	fs.StringVar(&c.logFormat, "log-format", "logfmt", "")
	fs.StringVar(&c.logLevel, "log-level", "info", "")
	fs.String("config", "", "")
	fs.BoolVar(&c.check, "check", false, "")
	fs.BoolFunc("version", "", func(s string) error {
		c.version = s == "true" // images often have a SPOA_VERSION=1.2.3 of another meaning
		return nil
	})
	return fs
}

func parse(args []string) (*config, error) {
	var c config
	fs := c.flags()
	err := ff.Parse(fs, args,
		ff.WithEnvVarPrefix("SPOA"),
		ff.WithEnvVarSplit(","),
		ff.WithConfigFileFlag("config"),
		ff.WithConfigFileParser(ff.PlainParser))
	if err != nil {
		if s, ok := strings.CutPrefix(err.Error(), "error parsing commandline arguments: "); ok && !errors.Is(err, flag.ErrHelp) {
			return nil, errors.New(s)
		}
		return nil, err
	}
	if fs.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	return &c, c.validate()
}

const (
	minFrame = 256     // of SPOP
	maxFrame = 1 << 28 // of HAProxy
)

// validate finds what is wrong with a flag's value by name, before the library
// does.
func (c *config) validate() error {
	switch {
	case c.port > 65535:
		return fmt.Errorf("-p %d: want a port up to 65535", c.port)
	case c.frame < minFrame || c.frame > maxFrame:
		return fmt.Errorf("-m %d: want %d to %d bytes", c.frame, minFrame, maxFrame)
	case c.workers < 1:
		return fmt.Errorf("-n %d: want at least 1 worker", c.workers)
	case c.frames < 0:
		return fmt.Errorf("-f %d: want a number of frames", c.frames)
	case c.drain < 0:
		return fmt.Errorf("-drain %v: want no less than 0", c.drain)
	case (c.cert == "") != (c.key == ""):
		return errors.New("-tls-cert and -tls-key need each other")
	case c.clientCA != "" && c.cert == "":
		return errors.New("-tls-client-ca needs -tls-cert")
	case c.logFormat != "logfmt" && c.logFormat != "json":
		return fmt.Errorf("-log-format %q: want logfmt or json", c.logFormat)
	}
	if _, err := level.Parse(c.logLevel); err != nil {
		return fmt.Errorf("-log-level %q: want debug, info, warn or error", c.logLevel)
	}
	for _, addr := range c.listen {
		if err := checkAddr(addr); err != nil && addr != bySystemd {
			return fmt.Errorf("-listen %q: %w, or %s", addr, err, bySystemd)
		}
	}
	if c.metrics != "" {
		if err := checkAddr(c.metrics); err != nil {
			return fmt.Errorf("-metrics %q: %w", c.metrics, err)
		}
	}
	for i, f := range c.reputation {
		if slices.ContainsFunc(c.reputation[:i], func(g listFile) bool { return f.path == g.path }) {
			return fmt.Errorf("-reputation %s: given twice", f.path)
		}
	}
	for i, path := range c.allow {
		switch {
		case path == "":
			return errors.New("-allow: no file named")
		case slices.Contains(c.allow[:i], path):
			return fmt.Errorf("-allow %s: given twice", path)
		}
	}
	return nil
}

func realMain(args []string, stdout, stderr io.Writer) int {
	c, err := parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		io.WriteString(stdout, usage)
		return 0
	case err != nil:
		fmt.Fprintf(stderr, "spoa: %s (spoa -h shows what there is)\n", oneLine(err))
		return 2
	case c.version:
		fmt.Fprintln(stdout, "spoa", version())
		return 0
	case c.check:
		said, err := check(c)
		if err != nil {
			fmt.Fprintf(stderr, "spoa: %s\n", oneLine(err))
			return 1
		}
		fmt.Fprintf(stdout, "spoa: %s\n", said)
		return 0
	}
	if err := serve(c, stderr); err != nil {
		fmt.Fprintf(stderr, "spoa: %s\n", oneLine(err))
		return 1
	}
	return 0
}

// oneLine is for errors that join several.
func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// build is what the program knows of its making.
type build struct{ Version, Revision, Go string }

func version() (b build) {
	if info, ok := debug.ReadBuildInfo(); ok {
		b = build{Version: info.Main.Version, Go: info.GoVersion}
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				b.Revision = s.Value[:min(12, len(s.Value))]
			}
		}
	}
	b.Version = cmp.Or(b.Version, "(devel)")
	return b
}

func (b build) String() string {
	if b.Revision == "" {
		return fmt.Sprintf("%s (%s)", b.Version, b.Go)
	}
	return fmt.Sprintf("%s (%s, %s)", b.Version, b.Revision, b.Go)
}

// check tries what serve would load.
func check(c *config) (string, error) {
	l, err := c.lists(log.NewNopLogger())
	if err != nil {
		return "", err
	}
	if _, err := c.certificates(); err != nil {
		return "", err
	}
	if l == nil {
		return "configuration ok, no lists: scores are random", nil
	}
	entries, bad, all := 0, 0, l.Stats()
	for _, s := range all {
		entries += s.Entries
		bad += s.BadLines
	}
	return fmt.Sprintf("configuration ok, lists: %d, entries: %d, bad lines: %d", len(all), entries, bad), nil
}

func (c *config) logger(w io.Writer) log.Logger {
	w = log.NewSyncWriter(w)
	logger := log.NewLogfmtLogger(w)
	if c.logFormat == "json" {
		logger = log.NewJSONLogger(w)
	}
	least := level.ParseDefault(c.logLevel, level.InfoValue())
	if c.debug {
		least = level.DebugValue()
	}
	return level.NewFilter(log.With(logger, "ts", log.DefaultTimestampUTC), level.Allow(least))
}

// lists loads the lists, and returns nil if there are none.
func (c *config) lists(logger log.Logger) (*lists, error) {
	if len(c.reputation)+len(c.allow) == 0 {
		return nil, nil
	}
	return newLists(logger, c.reputation, c.allow)
}

const (
	message       = "check-client-ip"
	maxFragmented = 1 << 20 // bytes of a NOTIFY put together from fragments
)

// agent returns an agent with that handler.
func (c *config) agent(logger log.Logger, handler spoa.HandlerFunc, m *metrics) *spoa.Agent {
	opts := []spoa.Option{
		spoa.WithHandlerFunc(message, handler),
		spoa.WithWorkers(c.workers),
		spoa.WithMaxFrameSize(c.frame),
		spoa.WithDebug(c.debug),
		spoa.WithLogger(logger),
	}
	if c.metrics != "" {
		opts = append(opts, spoa.WithHooks(m.hooks()))
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

// serve runs the agent until a signal ends it.
func serve(c *config, stderr io.Writer) error {
	// Before anything that takes time, so that no signal falls through.
	hup, end := make(chan os.Signal, 1), make(chan os.Signal, 2)
	signal.Notify(hup, syscall.SIGHUP)
	signal.Notify(end, syscall.SIGINT, syscall.SIGTERM)
	defer signal.Stop(hup)
	defer signal.Stop(end)

	logger := c.logger(stderr)
	lists, err := c.lists(logger)
	if err != nil {
		return err
	}
	certs, err := c.certificates()
	if err != nil {
		return err
	}
	m := newMetrics(lists, certs, message)
	agent := c.agent(logger, checkClientIP(time.Duration(c.delay), newScorer(lists, m.judged)), m)
	m.conns = agent.Conns
	listeners, shared, err := c.listeners(certs)
	if err != nil {
		return err
	}
	var status net.Listener
	if c.metrics != "" {
		if status, err = listen(c.metrics, os.FileMode(c.unixMode)); err != nil {
			closeAll(listeners)
			return err
		}
	}

	var g run.Group
	for i, l := range listeners {
		level.Info(logger).Log("msg", "listening", "addr", l.Addr(), "access", access(l, c))
		execute, interrupt := agent.Actor(l, c.drain)
		if i < shared {
			// The next process has the socket too; until it accepts, HAProxy waits.
			drain := interrupt
			interrupt = func(err error) {
				drain(err)
				l.Close()
			}
		}
		g.Add(execute, interrupt)
	}
	// Not run.SignalHandler, which listens only from its start to the first
	// signal: earlier and later ones would kill the process.
	g.Add(actor(func(ctx context.Context) error {
		select {
		case <-ctx.Done():
			return nil
		case sig := <-end:
			return &run.SignalError{Signal: sig}
		}
	}))
	ending, drained := make(chan struct{}), make(chan struct{})
	if status != nil {
		level.Info(logger).Log("msg", "metrics", "addr", status.Addr())
		g.Add(m.actor(status, drained))
	}
	g.Add(func() error {
		<-ending
		select {
		case <-end:
			level.Warn(logger).Log("msg", "second signal: closing at once")
			agent.Close()
			<-drained
		case <-drained:
		}
		return nil
	}, func(error) {
		notifySystemd(logger, daemon.SdNotifyStopping)
		close(ending)
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), c.drain)
			defer cancel()
			agent.Shutdown(ctx)
			close(drained)
		}()
	})
	g.Add(actor(func(ctx context.Context) error {
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-hup:
				reload(logger, lists, certs, m)
			}
		}
	}))
	if lists != nil {
		g.Add(actor(lists.Watch))
	}
	notifySystemd(logger, daemon.SdNotifyReady)
	err = g.Run()
	if errors.Is(err, run.ErrSignal) {
		level.Info(logger).Log("msg", "ended", "reason", err)
		return nil
	}
	return err
}

// actor makes an actor of what runs until its context ends.
func actor(f func(context.Context) error) (execute func() error, interrupt func(error)) {
	ctx, cancel := context.WithCancel(context.Background())
	return func() error { return f(ctx) }, func(error) { cancel() }
}

// reload reads lists and certificates again. What cannot be used is logged, and
// the old stays in force.
func reload(logger log.Logger, l *lists, certs *certificates, m *metrics) {
	notifySystemd(logger, daemon.SdNotifyReloading+"\n"+daemon.SdNotifyMonotonicUsec())
	level.Info(logger).Log("msg", "reloading")
	if l != nil {
		_ = l.Reload() // logs
	}
	if certs != nil {
		err := certs.load()
		m.certificatesReloaded(err == nil)
		if err != nil {
			level.Error(logger).Log("msg", "certificates not reloaded, the old ones stay in force", "err", oneLine(err))
		}
	}
	notifySystemd(logger, daemon.SdNotifyReady)
}

func notifySystemd(logger log.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		level.Warn(logger).Log("msg", "cannot notify systemd", "err", err)
	}
}

// scorer sets the variables of an address.
type scorer func(netip.Addr, *spoa.Actions)

// newScorer returns one that goes by lists, or by chance if there are none, and
// tells judged of every verdict.
func newScorer(l *lists, judged func(list string, listed bool)) scorer {
	if l == nil {
		return func(_ netip.Addr, a *spoa.Actions) {
			judged("", false)
			a.SetVar(spoa.ScopeSess, "ip_score", spoa.Uint32(rand.Uint32N(bestScore+1)))
		}
	}
	return func(ip netip.Addr, a *spoa.Actions) {
		score, list, listed := l.Lookup(ip)
		judged(list, listed)
		a.SetVar(spoa.ScopeSess, "ip_score", spoa.Uint32(uint32(score)))
		if listed {
			a.SetVar(spoa.ScopeSess, "ip_list", spoa.String(list))
		} else {
			// A session of several requests may have had one before a reload.
			a.UnsetVar(spoa.ScopeSess, "ip_list")
		}
	}
}

// checkClientIP returns the handler of check-client-ip. It ignores what is no
// address.
func checkClientIP(delay time.Duration, score scorer) spoa.HandlerFunc {
	return func(ctx context.Context, m *spoa.Message, a *spoa.Actions) error {
		if delay > 0 {
			t := time.NewTimer(delay)
			defer t.Stop()
			select {
			case <-t.C:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if m.Len() != 1 {
			return nil
		}
		if ip, ok := m.Arg(0).Value.Addr(); ok {
			score(ip, a)
		}
		return nil
	}
}
