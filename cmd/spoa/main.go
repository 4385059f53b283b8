// Command spoa is a random IP reputation service acting as a Stream Processing
// Offload Agent of HAProxy: it answers the message check-client-ip, whose one
// argument is the client's address, with the session variable ip_score, an
// integer from 0 to 100.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/go-kit/log"
	"github.com/go-kit/log/level"
	"github.com/oklog/run"
	"github.com/spoa-go/spoa"
)

func main() {
	os.Exit(realMain(os.Args[1:], os.Stdout, os.Stderr))
}

const usage = `Usage: spoa [-h] [-d] [-m max-frame-size] [-p port] [-n workers] [-c capability]
            [-t time] [-f frames] [-listen addr] [-drain time]

Answers HAProxy's message check-client-ip with the session variable ip_score,
a random integer from 0 to 100.

  -h            show this text
  -d            log every frame
  -m bytes      largest frame to agree on, 256 or more (default 65535)
  -p port       listen on this port of 127.0.0.1 (default 12345)
  -n workers    handlers that run at once (default 5)
  -c name       announce a capability, repeatable: pipelining (always on),
                async, fragmentation
  -t time       wait before each answer: 15 (milliseconds), or 10us, 15ms, 1s
  -f frames     close a connection after that many frames
  -listen addr  listen here instead: host:port, or unix:/path
  -drain time   how long ending may take on SIGTERM or SIGINT (default 10s); a
                second signal ends it at once
`

// config is what the command line says.
type config struct {
	debug   bool
	frame   int
	port    uint
	workers int
	caps    capabilities
	delay   delay
	frames  int
	listen  string
	drain   time.Duration
}

// capabilities is a repeatable flag.
type capabilities []string

func (c *capabilities) String() string { return strings.Join(*c, ",") }

func (c *capabilities) Set(s string) error {
	*c = append(*c, s)
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

func parse(args []string) (*config, error) {
	var c config
	fs := flag.NewFlagSet("spoa", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.Usage = func() {}
	fs.BoolVar(&c.debug, "d", false, "")
	fs.IntVar(&c.frame, "m", 0, "")
	fs.UintVar(&c.port, "p", 12345, "")
	fs.IntVar(&c.workers, "n", 5, "")
	fs.Var(&c.caps, "c", "")
	fs.Var(&c.delay, "t", "")
	fs.IntVar(&c.frames, "f", 0, "")
	fs.StringVar(&c.listen, "listen", "", "")
	fs.DurationVar(&c.drain, "drain", 10*time.Second, "")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	switch {
	case fs.NArg() > 0:
		return nil, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	case c.port > 65535:
		return nil, fmt.Errorf("-p %d: want a port up to 65535", c.port)
	case c.frames < 0:
		return nil, fmt.Errorf("-f %d: want a number of frames", c.frames)
	}
	return &c, nil
}

func realMain(args []string, stdout, stderr io.Writer) int {
	c, err := parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		io.WriteString(stdout, usage)
		return 0
	case err != nil:
		fmt.Fprintf(stderr, "spoa: %v (spoa -h shows what there is)\n", err)
		return 2
	}
	if err := serve(c, stderr); err != nil {
		fmt.Fprintf(stderr, "spoa: %v\n", err)
		return 1
	}
	return 0
}

// serve runs the agent until a signal ends it.
func serve(c *config, stderr io.Writer) error {
	logger := log.NewLogfmtLogger(log.NewSyncWriter(stderr))
	logger = log.With(logger, "ts", log.DefaultTimestampUTC)
	if c.debug {
		logger = level.NewFilter(logger, level.AllowDebug())
	} else {
		logger = level.NewFilter(logger, level.AllowInfo())
	}
	opts := []spoa.Option{
		spoa.WithHandlerFunc("check-client-ip", checkClientIP(time.Duration(c.delay))),
		spoa.WithWorkers(c.workers),
		spoa.WithDebug(c.debug),
		spoa.WithLogger(logger),
	}
	if c.frame != 0 {
		opts = append(opts, spoa.WithMaxFrameSize(c.frame))
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
	l, err := listen(c)
	if err != nil {
		return err
	}
	level.Info(logger).Log("msg", "listening", "addr", l.Addr(), "access", access(l.Addr()))

	agent := spoa.New(opts...)
	var g run.Group
	g.Add(agent.Actor(l, c.drain))
	g.Add(run.SignalHandler(context.Background(), syscall.SIGINT, syscall.SIGTERM))
	err = g.Run()
	if errors.Is(err, run.ErrSignal) {
		level.Info(logger).Log("msg", "ended", "reason", err)
		return nil
	}
	return err
}

const maxFragmented = 1 << 20 // bytes of a NOTIFY put together from fragments

// listen opens what the configuration names. SPOP knows no authentication, so
// by default only this machine gets in.
func listen(c *config) (net.Listener, error) {
	if path, ok := strings.CutPrefix(c.listen, "unix:"); ok {
		return net.Listen("unix", path)
	}
	addr := c.listen
	if addr == "" {
		addr = net.JoinHostPort("127.0.0.1", strconv.FormatUint(uint64(c.port), 10))
	}
	return net.Listen("tcp", addr)
}

// access says in the log who can reach the agent.
func access(a net.Addr) string {
	if t, ok := a.(*net.TCPAddr); ok && !t.IP.IsLoopback() {
		return "whoever reaches this address: SPOP has no authentication"
	}
	return "this machine only"
}

// checkClientIP returns the handler of check-client-ip. It ignores what is no
// address.
func checkClientIP(delay time.Duration) spoa.HandlerFunc {
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
		if _, ok := m.Arg(0).Value.Addr(); ok {
			a.SetVar(spoa.ScopeSess, "ip_score", spoa.Uint32(rand.Uint32N(101)))
		}
		return nil
	}
}
