package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net"
	"slices"
	"strconv"
	"time"

	"github.com/go-kit/log"
	"github.com/go-kit/log/level"
	"github.com/spoa-go/spoa/cmd/internal/listen"
	"github.com/spoa-go/spoa/cmd/internal/reputation/crowdsec"
	"github.com/spoa-go/spoa/cmd/internal/reputation/lists"
)

const usage = `Usage: spoa [-h] [-d] [-m max-frame-size] [-p port] [-n workers] [-c capability]
            [-t time] [-f frames] [flags]

Answers HAProxy's message check-client-ip with the session variable ip_score,
from 0 for the worst addresses to 100 for those on no list.

  -h            show this text
  -d            log every frame
  -m bytes      largest frame to agree on, 256 or more (default 65535)
  -p port       listen on this port of 127.0.0.1 (default 12345)
  -n workers    handlers that run at once, up to 65536 (default 5)
  -c name       announce a capability, repeatable: pipelining (always on),
                async, fragmentation
  -t time       wait before each answer: 15 (milliseconds), or 10us, 15ms, 1s
  -handler-timeout time
                how long an answer may take before HAProxy gets one without a
                verdict; 0 is for ever. Let it be HAProxy's timeout processing
                (default 500ms and what -t waits, or 0 without -dnsbl and -t,
                since nothing else is waited for)
  -f frames     close a connection after that many frames

  -reputation list[=score][,column=kind][,field=name][,accept=fault]
                the addresses of this list have that score (default 0);
                repeatable. A list is a file, a directory or glob of files, a
                URL, or - for standard input, in nearly any format. Between
                lists the worst score wins,
                within one the longest prefix: 198.51.96.0/20 with 0 in one list
                and 198.51.100.7 with 60 in another give 198.51.100.7 a 0, and
                both in one list a 60
      column    what a number behind an address is: score (0 is worst), badness
                (100 is worst), 'count>=3' (listed from 3 on), or ignore.
                Without it the number is not used, and a warning says so. A list
                can say it too, before its first entry: # spoa: column=score
      field     where CSV or JSON has this number
      accept    take the list in spite of a fault for which it is refused: cut
                (its end is missing), wide (it has a prefix such as 0.0.0.0/0),
                shrunk (it lost more than half); several as cut+wide
  -allow list[,accept=fault]
                the addresses of this list score 100 whatever others say;
                repeatable
  -refresh time how often lists by URL are fetched (default 1h), or less often
                if their makers ask for that
  -cache dir    keep the last good copy of lists by URL here, for a start
                without the network
  -lookup addr  show what each list says of this address, and exit
` + sourcesUsage + `  -random       scores are random, for trying out: no list or other source is
                wanted. Without it a start without any warns; with
                -random=false it fails
  -trust-proxy prefix
                of a text such as X-Forwarded-For judge the last address that is
                not one of these proxies (default: the last one); repeatable

  -listen addr  listen here instead: host:port, unix:/path, abns@name or
                abnsz@name as HAProxy calls abstract sockets, or systemd, which
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
  -check        check flags, lists, certificates and addresses, and exit
  -version      show the version

Each flag can come from the environment too: SPOA_LISTEN, SPOA_TLS_CERT, and so
on, with commas between the values of a repeatable one. The command line wins
over the environment, and that over the file; what is empty counts as unset. A
variable that is nearly one of these is refused. SIGHUP reads lists and
certificates again; lists are also read when their files change.
`

// config is what the command line, the environment and the file say.
type config struct {
	debug          bool
	frame          int
	port           int
	workers        int
	caps           stringList
	delay          delay
	frames         int
	reputation     lists.Files
	allow          lists.AllowFiles
	random         *bool         // nil: not said
	handlerTimeout time.Duration // how long an answer may take; negative: not said
	proxies        prefixes
	refresh        time.Duration
	cache          string
	lookup         string
	sources        sourceFlags
	listen         listen.Addrs
	unixMode       fileMode
	cert           string
	key            string
	clientCA       string
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
		handlerTimeout: -1, frame: 65535, port: 12345, workers: 5, unixMode: 0o660, drain: 10 * time.Second, refresh: time.Hour, logFormat: "logfmt", logLevel: "info",
		sources: sourceFlags{interval: crowdsec.DefaultInterval, budget: 5 * time.Millisecond, denyBelow: 20},
	}
}

// flags returns the flags, which fill c.
func (c *config) flags() *flag.FlagSet {
	flags := flag.NewFlagSet("spoa", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.Usage = func() {}
	flags.BoolVar(&c.debug, "d", false, "")
	flags.Var(number{&c.frame, minFrame, maxFrame, "a number of bytes"}, "m", "")
	flags.Var(number{&c.port, 0, 65535, "a port"}, "p", "")
	flags.Var(number{&c.workers, 1, maxWorkers, "a number of workers"}, "n", "")
	flags.Var(multi{&c.caps}, "c", "")
	flags.Var(&c.delay, "t", "")
	flags.Var(period{&c.handlerTimeout}, "handler-timeout", "")
	flags.Var(number{&c.frames, 0, math.MaxInt32, "a number of frames"}, "f", "")
	flags.Var(multi{&c.reputation}, "reputation", "")
	flags.Var(multi{&c.allow}, "allow", "")
	flags.Var(period{&c.refresh}, "refresh", "")
	flags.StringVar(&c.cache, "cache", "", "")
	flags.StringVar(&c.lookup, "lookup", "", "")
	c.sources.register(flags)
	flags.BoolFunc("random", "", func(s string) error {
		random, err := strconv.ParseBool(s)
		c.random = &random
		return err
	})
	flags.Var(multi{&c.proxies}, "trust-proxy", "")
	flags.Var(multi{&c.listen}, "listen", "")
	flags.Var(&c.unixMode, "unix-mode", "")
	flags.StringVar(&c.cert, "tls-cert", "", "")
	flags.StringVar(&c.key, "tls-key", "", "")
	flags.StringVar(&c.clientCA, "tls-client-ca", "", "")
	flags.Var(&c.metrics, "metrics", "")
	flags.Var(period{&c.drain}, "drain", "")
	flags.Var(choice{&c.logFormat, []string{"logfmt", "json"}}, "log-format", "")
	flags.Var(choice{&c.logLevel, []string{"debug", "info", "warn", "error"}}, "log-level", "")
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
	s := settings{flags: c.flags()}
	if err := s.load(args, environ); err != nil {
		return nil, err
	}
	c.notes = s.notes
	if s.given["p"] && len(c.listen) > 0 {
		c.notes = append(c.notes, "-p does not count, since -listen is given")
	}
	return c, c.validate()
}

// validate finds values that do not go together.
func (c *config) validate() error {
	switch {
	case (c.cert == "") != (c.key == ""):
		return errors.New("-tls-cert and -tls-key need each other")
	case c.clientCA != "" && c.cert == "":
		return errors.New("-tls-client-ca needs -tls-cert")
	case c.handlerTimeout > 0 && c.handlerTimeout < time.Millisecond:
		return fmt.Errorf("-handler-timeout %v: want 1ms or more, or 0 for ever", c.handlerTimeout)
	case c.random != nil && *c.random && c.judges():
		return errors.New("-random and lists or other sources: want one of them")
	case c.random != nil && !*c.random && !c.judges():
		return errors.New("no list, and random scores are switched off: want -reputation FILE, or -random to try out")
	}
	if err := c.validateLists(); err != nil {
		return err
	}
	if !c.judges() && c.random == nil {
		c.notes = append(c.notes, "no list: scores are random, for trying out only; want -reputation FILE, or -random to say so")
	}
	return c.sources.validate()
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
	case c.delay > 0 || len(c.sources.zones) > 0:
		return defaultTimeout + time.Duration(c.delay)
	}
	return 0
}

// judges reports whether scores come from anything but chance.
func (c *config) judges() bool { return len(c.reputation)+len(c.allow) > 0 || c.sources.any() }

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

// loadTLS loads the certificates, and returns nil if there are none.
func (c *config) loadTLS() (*listen.TLS, error) {
	if c.cert == "" {
		return nil, nil
	}
	return listen.LoadTLS(c.cert, c.key, c.clientCA)
}

// addrs returns where to listen if systemd passes no sockets.
func (c *config) addrs() listen.Addrs {
	if len(c.listen) > 0 {
		return c.listen
	}
	// SPOP knows no authentication, so only this machine gets in.
	return listen.Addrs{{Network: "tcp", Address: net.JoinHostPort("127.0.0.1", strconv.Itoa(c.port))}}
}

// openListeners opens what the configuration names, behind the sockets that
// systemd has passed: all or none.
func (c *config) openListeners() (all []net.Listener, passed int, err error) {
	defer func() {
		if err != nil {
			closeAll(all)
		}
	}()
	if all, err = listen.Systemd(); err != nil {
		return all, 0, err
	}
	passed = len(all)
	addrs := c.listen
	if passed == 0 {
		addrs = c.addrs()
	}
	if passed == 0 && slices.ContainsFunc(addrs, listen.Addr.IsSystemd) {
		return all, 0, errors.New("-listen systemd: it has passed no socket")
	}
	opened, err := addrs.Listen(fs.FileMode(c.unixMode))
	return append(all, opened...), passed, err
}

func closeAll(all []net.Listener) {
	for _, l := range all {
		l.Close()
	}
}
