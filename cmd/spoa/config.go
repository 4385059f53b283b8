package main

import (
	"context"
	_ "embed"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net"
	"strconv"
	"time"

	"github.com/spoa-go/spoa/cmd/internal/judge"
	"github.com/spoa-go/spoa/cmd/internal/listen"
	"github.com/spoa-go/spoa/cmd/internal/logging"
	"github.com/spoa-go/spoa/cmd/internal/settings"
)

//go:embed usage.txt
var usage string

// config is what the command line, the environment and the file say.
type config struct {
	debug          bool
	frame          int
	port           int
	workers        int
	caps           []string
	delay          time.Duration
	frames         int
	handlerTimeout time.Duration // how long an answer may take; negative: not said
	judge          judge.Config
	listen         listen.Addrs
	unixMode       fs.FileMode
	tls            listen.TLSFiles
	metrics        listen.Addr
	drain          time.Duration
	logFormat      string
	logLevel       string
	check          bool
	version        bool
	notes          []string // what is odd but no error
}

const (
	minFrame   = 256     // of SPOP
	maxFrame   = 1 << 28 // of HAProxy
	maxWorkers = 1 << 16
)

// newConfig returns the defaults.
func newConfig() *config {
	return &config{
		handlerTimeout: -1, frame: 65535, port: 12345, workers: 5, unixMode: 0o660, drain: 10 * time.Second, logFormat: "logfmt", logLevel: "info",
		judge: judge.DefaultConfig(),
	}
}

// flags returns the flags, which fill c.
func (c *config) flags() *flag.FlagSet {
	flags := flag.NewFlagSet("spoa", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.Usage = func() {}
	flags.BoolVar(&c.debug, "d", false, "")
	flags.Var(settings.Number(&c.frame, minFrame, maxFrame, "a number of bytes"), "m", "")
	flags.Var(settings.Number(&c.port, 0, 65535, "a port"), "p", "")
	flags.Var(settings.Number(&c.workers, 1, maxWorkers, "a number of workers"), "n", "")
	flags.Var(settings.List(&c.caps), "c", "")
	flags.Var(settings.Delay(&c.delay), "t", "")
	flags.Var(settings.Period(&c.handlerTimeout), "handler-timeout", "")
	flags.Var(settings.Number(&c.frames, 0, math.MaxInt32, "a number of frames"), "f", "")
	c.judge.Register(flags)
	flags.Var(settings.Multi(&c.listen), "listen", "")
	flags.Var(settings.FileMode(&c.unixMode), "unix-mode", "")
	c.tls.Register(flags)
	flags.Var(&c.metrics, "metrics", "")
	flags.Var(settings.Period(&c.drain), "drain", "")
	flags.Var(settings.Choice(&c.logFormat, "logfmt", "json"), "log-format", "")
	flags.Var(settings.Choice(&c.logLevel, "debug", "info", "warn", "error"), "log-level", "")
	flags.String("config", "", "")
	flags.BoolVar(&c.check, "check", false, "")
	flags.BoolFunc("version", "", func(s string) error {
		c.version = s == "true" // images often have a SPOA_VERSION=1.2.3 of another meaning
		return nil
	})
	return flags
}

func parse(args, environ []string) (*config, error) {
	c := newConfig()
	flags := c.flags()
	notes, err := settings.Load(flags, args, environ)
	if err != nil {
		return nil, err
	}
	if settings.Given(flags, "p") && len(c.listen) > 0 {
		notes = append(notes, "-p does not count, since -listen is given")
	}
	if err := c.tls.Validate(); err != nil {
		return nil, err
	}
	if d := c.handlerTimeout; d > 0 && d < time.Millisecond {
		return nil, fmt.Errorf("-handler-timeout %v: want 1ms or more, or 0 for ever", d)
	}
	more, err := c.judge.Validate()
	c.notes = append(notes, more...)
	return c, err
}

// defaultTimeout is the timeout processing of the example configurations. HAProxy
// forgets a request then, so that a later answer is wasted. A default as short as
// the 15 ms of HAProxy's own example would turn answers down that others wait for.
const defaultTimeout = 500 * time.Millisecond

// timeout returns how long an answer may take, 0 for ever. Only DNS block lists
// wait, and a timeout costs half as much again as an answer that waits for nothing.
func (c *config) timeout() time.Duration {
	switch {
	case c.handlerTimeout >= 0:
		return c.handlerTimeout
	case c.delay > 0 || c.judge.Waits():
		return defaultTimeout + c.delay
	}
	return 0
}

// format returns how to log.
func (c *config) format() logging.Format {
	f := logging.Format{JSON: c.logFormat == "json", Level: c.logLevel}
	if c.debug {
		f.Level = "debug"
	}
	return f
}

// defaultAddr is where to listen if nothing else is said. SPOP knows no
// authentication, so only this machine gets in.
func (c *config) defaultAddr() listen.Addr {
	return listen.Addr{Network: "tcp", Address: net.JoinHostPort("127.0.0.1", strconv.Itoa(c.port))}
}

// tryOut opens what serve would, for a moment, and writes what there is.
func (c *config) tryOut(stdout, stderr io.Writer) error {
	found, err := c.judge.Check(context.Background())
	if err != nil {
		return err
	}
	if _, err := c.tls.Load(); err != nil {
		return err
	}
	addrs := append(listen.Addrs{}, c.listen...)
	if len(addrs) == 0 {
		addrs = append(addrs, c.defaultAddr())
	}
	if c.metrics.Network != "" {
		addrs = append(addrs, c.metrics)
	}
	for _, addr := range addrs {
		if err := addr.Check(); err != nil {
			return err
		}
	}
	for _, note := range c.notes {
		fmt.Fprintf(stderr, "spoa: %s\n", note)
	}
	fmt.Fprintf(stdout, "spoa: configuration ok, %s\n", found)
	return nil
}
