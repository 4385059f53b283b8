// Command spop is a client for agents of HAProxy's Stream Processing Offload
// Engine: it sends a message and shows the answer, checks an agent's
// health as HAProxy does, and measures how fast an agent is.
package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spoa-go/spoa"
	"github.com/spoa-go/spoa/cmd/internal/listen"
	"github.com/spoa-go/spoa/cmd/internal/settings"
)

const usage = `Usage: spop notify|check|bench [flags] [MESSAGE [NAME=]TYPE:VALUE...]

Speaks HAProxy's side of SPOP, the protocol of SPOE agents.

  spop notify   sends a message and prints the actions of the answer
  spop check    does what HAProxy's "option spop-check" does
  spop bench    measures an agent under load

Each has more to say with -h. Results go to standard output, everything else
to standard error. Exit status: 0 well, 1 refused, failed or no answer, 2 usage.
`

const notifyUsage = `Usage: spop notify [-addr A] [-timeout T] [-n N] [-json] [-v] MESSAGE [NAME=]TYPE:VALUE...

Sends MESSAGE with its arguments in a NOTIFY, as HAProxy does, and prints the
actions of the answer, one per line:

  $ spop notify check-client-ip src=ip:192.0.2.1
  set-var sess.ip_score int 42

  -addr A      the agent: host:port or unix:/path (default 127.0.0.1:12345)
  -timeout T   for connecting, and for each answer (default 5s)
  -n N         send it N times, one after the other (default 1)
  -json        print each answer as one line of JSON, with its latency in µs
  -v           show every frame on standard error
` + tlsUsage + `
` + argsUsage + `
Exit status: 0 answered with actions, 1 refused, no answer, or no action in any
(an agent that does not know MESSAGE sends none), 2 usage.
`

const checkUsage = `Usage: spop check [-addr A] [-timeout T] [-json] [-v]

Says the HELLO of HAProxy's "option spop-check" and prints what the agent
agrees to. For scripts and the health checks of containers.

  -addr A      the agent: host:port or unix:/path (default 127.0.0.1:12345)
  -timeout T   for connecting and the answer (default 5s)
  -json        print one line of JSON
  -v           show every frame on standard error
` + tlsUsage + `
Exit status: 0 healthy, 1 not, 2 usage.
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	os.Exit(run(ctx, os.Args[1:]))
}

// usageError is an error in the command line.
type usageError string

func (e usageError) Error() string { return string(e) }

func misuse(format string, args ...any) error { return usageError(fmt.Sprintf(format, args...)) }

// errReported is for failures that the results on standard output show.
var errReported = errors.New("failed")

// run runs a subcommand and returns the exit status.
func run(ctx context.Context, args []string) int {
	if len(args) == 0 {
		fmt.Fprint(os.Stderr, usage)
		return 2
	}
	name := args[0]
	var err error
	switch name {
	case "notify":
		err = notify(ctx, args[1:])
	case "check":
		err = check(ctx, args[1:])
	case "bench":
		err = bench(ctx, args[1:])
	case "-h", "-help", "--help", "help":
		fmt.Print(usage)
		return 0
	default:
		fmt.Fprintf(os.Stderr, "spop: no subcommand %q: want spop notify, check or bench\n", name)
		return 2
	}
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return 0
	case errors.Is(err, errReported):
		return 1
	}
	fmt.Fprintf(os.Stderr, "spop %s: %v\n", name, err)
	if _, ok := errors.AsType[usageError](err); ok {
		return 2
	}
	return 1
}

// common holds the flags that all subcommands have.
type common struct {
	*flag.FlagSet
	addr    listen.Addr
	timeout time.Duration
	json    bool
	verbose bool
	tls     tlsFlags

	tlsConfig *tls.Config // nil: plain
	askOnce   sync.Once
	asked     *protocolError // what asking in other protocols has found
}

func newCommon() *common {
	c := &common{
		FlagSet: flag.NewFlagSet("", flag.ContinueOnError), addr: listen.Addr{Network: "tcp", Address: "127.0.0.1:12345"}, timeout: 5 * time.Second,
	}
	c.SetOutput(io.Discard)
	c.Var(&c.addr, "addr", "")
	c.Var(settings.Period(&c.timeout), "timeout", "")
	c.BoolVar(&c.json, "json", false, "")
	c.BoolVar(&c.tls.on, "tls", false, "")
	c.StringVar(&c.tls.ca, "tls-ca", "", "")
	c.StringVar(&c.tls.cert, "tls-cert", "", "")
	c.StringVar(&c.tls.key, "tls-key", "", "")
	c.StringVar(&c.tls.name, "tls-name", "", "")
	return c
}

// parse parses the flags. With -h it prints the help and returns flag.ErrHelp.
func (c *common) parse(args []string, help string) error {
	form, _, _ := strings.Cut(strings.TrimPrefix(help, "Usage: "), "\n")
	err := c.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Print(help)
		return err
	case err != nil:
		return misuse("%v: want %s", err, form)
	case c.timeout == 0:
		return misuse("-timeout %v: want more than 0, such as 5s", c.timeout)
	}
	c.tlsConfig, err = c.tls.config(c.addr)
	return err
}

func (c *common) trace(conn net.Conn) net.Conn {
	if !c.verbose {
		return conn
	}
	return spoa.Trace(conn, func(sent bool, frame string) {
		arrow := "<"
		if sent {
			arrow = ">"
		}
		fmt.Fprintln(os.Stderr, arrow, frame)
	})
}

// explain adds the agent's address to err, and says in plain words what a timeout
// is.
func (c *common) explain(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("%v: no answer within %v", &c.addr, c.timeout)
	case errors.Is(err, context.Canceled):
		return fmt.Errorf("%v: interrupted", &c.addr)
	case errors.As(err, new(*spoa.DisconnectError)):
		return fmt.Errorf("%v: %w", &c.addr, err)
	}
	return err
}

func notify(ctx context.Context, args []string) error {
	c := newCommon()
	n := 1
	c.Var(settings.Number(&n, 1, math.MaxInt32, "a number of times"), "n", "")
	c.BoolVar(&c.verbose, "v", false, "")
	if err := c.parse(args, notifyUsage); err != nil {
		return err
	}
	m, err := parseMessage(c.Args())
	if err != nil {
		return err
	}
	client, err := c.dial(ctx)
	if err != nil {
		return err
	}
	all := 0
	for range n {
		actions, err := c.notifyOnce(ctx, client, m)
		if err != nil {
			return c.explain(err) // an agent that owes an answer would be slow with a farewell too
		}
		all += actions
	}
	_ = client.Close() // all that was asked has been answered
	if all == 0 {
		return fmt.Errorf("no action in the answer: does the agent know the message %s?", printable(m.Name()))
	}
	return nil
}

// notifyOnce prints the actions of one answer and returns their number.
func (c *common) notifyOnce(ctx context.Context, client *spoa.Client, m *spoa.Message) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	start := time.Now()
	actions, err := client.Notify(ctx, m)
	if err != nil {
		return 0, err
	}
	if c.json {
		took := float64(time.Since(start).Nanoseconds()) / 1e3
		return len(actions), printJSON(answerJSON{took, actionsJSON(actions)})
	}
	for _, a := range actions {
		fmt.Println(formatAction(a))
	}
	return len(actions), nil
}

func check(ctx context.Context, args []string) error {
	c := newCommon()
	c.BoolVar(&c.verbose, "v", false, "")
	if err := c.parse(args, checkUsage); err != nil {
		return err
	}
	if c.NArg() > 0 {
		return misuse("unexpected argument %q: want flags only", c.Arg(0))
	}
	var h spoa.AgentHello
	err := c.greet(ctx, func(ctx context.Context, conn net.Conn) (err error) {
		h, err = spoa.Probe(ctx, conn)
		return err
	})
	if err != nil {
		return err
	}
	if c.json {
		return printJSON(newHelloJSON(h))
	}
	capabilities := "none"
	if h.Capabilities != nil {
		capabilities = strings.Join(h.Capabilities, ",")
	}
	fmt.Printf("version %s\nmax-frame-size %d\ncapabilities %s\n", printable(h.Version), h.MaxFrameSize, printable(capabilities))
	return nil
}

type helloJSON struct {
	Version      string   `json:"version"`
	MaxFrameSize int      `json:"max_frame_size"`
	Capabilities []string `json:"capabilities"`
}

func newHelloJSON(h spoa.AgentHello) helloJSON {
	return helloJSON{h.Version, h.MaxFrameSize, append([]string{}, h.Capabilities...)}
}

func printJSON(v any) error { return json.NewEncoder(os.Stdout).Encode(v) }
