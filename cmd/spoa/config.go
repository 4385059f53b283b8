package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/go-kit/log"
	"github.com/go-kit/log/level"
	"github.com/peterbourgon/ff/v3"
	"github.com/spoa-go/spoa/cmd/internal/listen"
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
  -n workers    handlers that run at once (default 5)
  -c name       announce a capability, repeatable: pipelining (always on),
                async, fragmentation
  -t time       wait before each answer: 15 (milliseconds), or 10us, 15ms, 1s
  -f frames     close a connection after that many frames

  -reputation list[=score][,column=kind][,field=name][,accept=fault]
                the addresses of this list have that score (default 0);
                repeatable. Without any list scores are random. A list is a
                file, a directory or glob of files, a URL, or - for standard
                input, in nearly any format. Between lists the worst score wins,
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
` + sourcesUsage + `
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
	reputation lists.Files
	allow      lists.AllowFiles
	refresh    time.Duration
	cache      string
	lookup     string
	sources    sourceFlags
	listen     listen.Addrs
	unixMode   fileMode
	cert       string
	key        string
	clientCA   string
	metrics    listen.Addr
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
type fileMode fs.FileMode

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
	flags := flag.NewFlagSet("spoa", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.Usage = func() {}
	flags.BoolVar(&c.debug, "d", false, "")
	flags.IntVar(&c.frame, "m", 65535, "")
	flags.UintVar(&c.port, "p", 12345, "")
	flags.IntVar(&c.workers, "n", 5, "")
	flags.Var(&c.caps, "c", "")
	flags.Var(&c.delay, "t", "")
	flags.IntVar(&c.frames, "f", 0, "")
	flags.Var(&c.reputation, "reputation", "")
	flags.Var(&c.allow, "allow", "")
	flags.DurationVar(&c.refresh, "refresh", time.Hour, "")
	flags.StringVar(&c.cache, "cache", "", "")
	flags.StringVar(&c.lookup, "lookup", "", "")
	c.sources.register(flags)
	flags.Var(&c.listen, "listen", "")
	flags.Var(&c.unixMode, "unix-mode", "")
	flags.StringVar(&c.cert, "tls-cert", "", "")
	flags.StringVar(&c.key, "tls-key", "", "")
	flags.StringVar(&c.clientCA, "tls-client-ca", "", "")
	flags.Var(&c.metrics, "metrics", "")
	flags.DurationVar(&c.drain, "drain", 10*time.Second, "")
	flags.StringVar(&c.logFormat, "log-format", "logfmt", "")
	flags.StringVar(&c.logLevel, "log-level", "info", "")
	flags.String("config", "", "")
	flags.BoolVar(&c.check, "check", false, "")
	flags.BoolFunc("version", "", func(s string) error {
		c.version = s == "true" // images often have a SPOA_VERSION=1.2.3 of another meaning
		return nil
	})
	return flags
}

func parse(args []string) (*config, error) {
	var c config
	flags := c.flags()
	err := ff.Parse(flags, args,
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
	if flags.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q", flags.Arg(0))
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
	if err := c.validateLists(); err != nil {
		return err
	}
	return c.sources.validate()
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

// loadTLS loads the certificates, and returns nil if there are none.
func (c *config) loadTLS() (*listen.TLS, error) {
	if c.cert == "" {
		return nil, nil
	}
	return listen.LoadTLS(c.cert, c.key, c.clientCA)
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
	if len(addrs) == 0 && passed == 0 {
		// SPOP knows no authentication, so only this machine gets in.
		port := strconv.FormatUint(uint64(c.port), 10)
		addrs = listen.Addrs{{Network: "tcp", Address: net.JoinHostPort("127.0.0.1", port)}}
	}
	for _, addr := range addrs {
		if addr.IsSystemd() {
			if passed == 0 {
				return all, 0, errors.New("-listen systemd: it has passed no socket")
			}
			continue
		}
		l, err := addr.Listen(fs.FileMode(c.unixMode))
		if err != nil {
			return all, 0, err
		}
		all = append(all, l)
	}
	return all, passed, nil
}

func closeAll(all []net.Listener) {
	for _, l := range all {
		l.Close()
	}
}
