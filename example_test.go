package spoa_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"time"

	"github.com/oklog/run"
	"github.com/spoa-go/spoa"
)

// score is the service that the examples offer.
func score(ip netip.Addr) uint32 {
	if ip.IsPrivate() {
		return 100
	}
	return 42
}

// checkClientIP is the handler of the examples.
func checkClientIP(ctx context.Context, m *spoa.Message, a *spoa.Actions) error {
	ip, ok := m.Arg(0).Value.Addr()
	if !ok {
		return fmt.Errorf("%s: want an address, have %v", m.Name(), m.Arg(0).Value.Kind())
	}
	a.SetVar(spoa.ScopeSess, "ip_score", spoa.Uint32(score(ip)))
	return nil
}

// An agent that answers one message, asked by a client in HAProxy's place.
func Example() {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	agent := spoa.New(spoa.WithHandlerFunc("check-client-ip", checkClientIP))
	served := make(chan error)
	go func() { served <- agent.Serve(ln) }()

	ctx := context.Background()
	client, err := spoa.Dial(ctx, "tcp", ln.Addr().String())
	if err != nil {
		fmt.Println(err)
		return
	}
	actions, err := client.Notify(ctx, spoa.NewMessage("check-client-ip",
		spoa.Arg{Value: spoa.Addr(netip.MustParseAddr("192.0.2.1"))}))
	if err != nil {
		fmt.Println(err)
	}
	for _, action := range actions {
		fmt.Println(action)
	}
	client.Close()

	agent.Shutdown(ctx)
	fmt.Println(<-served)
	// Output:
	// set-var sess.ip_score uint32 42
	// spoa: agent closed
}

// The agent beside an HTTP server in a group of oklog/run: when one ends, all
// do, the agent without losing a request.
func ExampleAgent_Actor() {
	spoe, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	web, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	var g run.Group

	agent := spoa.New(spoa.WithHandlerFunc("check-client-ip", checkClientIP))
	g.Add(agent.Actor(spoe, 10*time.Second))

	server := &http.Server{}
	g.Add(func() error { return server.Serve(web) }, func(error) { server.Close() })

	// Here a signal would end the group: g.Add(run.SignalHandler(ctx, syscall.SIGTERM)).
	g.Add(func() error { return errors.New("time to go") }, func(error) {})

	fmt.Println(g.Run())
	// Output: time to go
}

// An agent with several listeners is one actor for each. One that speaks TLS is
// made by tls.Listen.
func ExampleAgent_Actor_listeners() {
	agent := spoa.New(spoa.WithHandlerFunc("check-client-ip", checkClientIP))
	var g run.Group
	for range 2 {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			fmt.Println(err)
			return
		}
		g.Add(agent.Actor(ln, 10*time.Second))
	}
	g.Add(func() error { return errors.New("time to go") }, func(error) {})
	fmt.Println(g.Run())
	// Output: time to go
}

// A verdict that depends on two messages of a NOTIFY: their handlers run in the
// order of the messages and see each other's actions. Here whoever passes one
// check is let in, unless a check fails.
func ExampleActions_Lookup() {
	check := func(passes func(*spoa.Message) (bool, error)) spoa.HandlerFunc {
		return func(ctx context.Context, m *spoa.Message, a *spoa.Actions) error {
			ok, err := passes(m)
			if err != nil {
				a.Drop(spoa.ScopeTxn, "authenticated") // whatever earlier messages have said
				a.SetVar(spoa.ScopeTxn, "failed", spoa.Bool(true))
				a.Keep() // although the handler fails
				return err
			}
			_, failed := a.Lookup(spoa.ScopeTxn, "failed")
			if ok && !failed {
				a.SetVar(spoa.ScopeTxn, "authenticated", spoa.Bool(true))
			}
			return nil
		}
	}
	agent := spoa.New(
		spoa.WithHandler("try-cookie", check(func(m *spoa.Message) (bool, error) {
			return m.Value("cookie").String() == "good", nil
		})),
		spoa.WithHandler("try-password", check(func(m *spoa.Message) (bool, error) {
			if m.Value("password").Kind() == spoa.KindNull {
				return false, errors.New("no password")
			}
			return m.Value("password").String() == "secret", nil
		})),
		spoa.WithSlog(slog.New(slog.DiscardHandler)),
	)
	client, end := serve(agent)
	defer end()
	for _, password := range []string{"password=str:wrong", "password=null"} {
		ack, err := client.Notify(context.Background(),
			spoa.MustParseMessage("try-cookie cookie=str:good"), spoa.MustParseMessage("try-password "+password))
		fmt.Println(ack, err)
	}
	// Output:
	// [set-var txn.authenticated bool true] <nil>
	// [set-var txn.failed bool true] <nil>
}

// serve has the agent serve on the loopback, and returns a client, and a function
// that ends both.
func serve(agent *spoa.Agent) (client *spoa.Client, end func()) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	go agent.Serve(ln)
	client, err = spoa.Dial(context.Background(), "tcp", ln.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	return client, func() {
		client.Close()
		agent.Close()
	}
}

// Rules test an integer, as HAProxy's own `option set-on-error` sets one.
func ExampleWithFaultVar() {
	agent := spoa.New(
		spoa.WithHandlerFunc("check-client-ip", checkClientIP),
		spoa.WithFaultVar(spoa.ScopeTxn, "error", spoa.Int(255)),
		spoa.WithFaultFunc(spoa.ScopeTxn, "why", func(f spoa.Fault, err error) spoa.Value {
			return spoa.String(f.String() + ": " + err.Error())
		}),
		spoa.WithSlog(slog.New(slog.DiscardHandler)),
	)
	client, end := serve(agent)
	defer end()
	ack, err := client.Notify(context.Background(), spoa.MustParseMessage("check-client-ip null"))
	for _, action := range ack {
		fmt.Println(action)
	}
	fmt.Println(err)
	// Output:
	// set-var txn.error int64 255
	// set-var txn.why string error: check-client-ip: want an address, have null
	// <nil>
}

// Hooks count what happens; cmd/examples/metrics has them for Prometheus.
func ExampleHooks() {
	events := make(chan string, 2)
	agent := spoa.New(
		spoa.WithHandlerFunc("check-client-ip", checkClientIP),
		spoa.WithHooks(spoa.Hooks{Message: func(e spoa.MessageEvent) {
			events <- fmt.Sprintf("%s: fault %v, error %v", e.Message, e.Fault, e.Err)
		}}),
		spoa.WithSlog(slog.New(slog.DiscardHandler)),
	)
	client, end := serve(agent)
	defer end()
	client.Notify(context.Background(),
		spoa.MustParseMessage("check-client-ip ip:192.0.2.1"), spoa.MustParseMessage("check-client-ip null"))
	fmt.Println(<-events)
	fmt.Println(<-events)
	// Output:
	// check-client-ip: fault none, error <nil>
	// check-client-ip: fault error, error check-client-ip: want an address, have null
}

// Stats are figures of each message, without hooks and maps of one's own. With
// package expvar, /debug/vars shows them:
//
//	expvar.Publish("spoa", expvar.Func(func() any { return agent.Stats() }))
func ExampleAgent_Stats() {
	agent := spoa.New(
		spoa.WithHandlerFunc("check-client-ip", checkClientIP),
		spoa.WithStats(),
		spoa.WithSlog(slog.New(slog.DiscardHandler)),
	)
	client, end := serve(agent)
	defer end()
	client.Notify(context.Background(),
		spoa.MustParseMessage("check-client-ip ip:192.0.2.1"), spoa.MustParseMessage("check-client-ip null"), spoa.MustParseMessage("invented"))
	for _, s := range agent.Stats() {
		fmt.Printf("%q: %d answered, %d failed, %d unknown\n", s.Message, s.Count[0], s.Count[spoa.FaultError], s.Count[spoa.FaultNoHandler])
	}
	// Output:
	// "": 0 answered, 0 failed, 1 unknown
	// "check-client-ip": 1 answered, 1 failed, 0 unknown
}

// Without a group, a program ends its agent as it ends an http.Server.
func ExampleAgent_Shutdown() {
	agent := spoa.New(spoa.WithHandlerFunc("check-client-ip", checkClientIP))
	served := make(chan error, 1)
	go func() { served <- agent.ListenAndServe("tcp", "127.0.0.1:0") }()

	// Here the program waits for a signal.

	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := agent.Shutdown(ctx); err != nil {
		fmt.Println("not all was answered:", err)
	}
	fmt.Println(<-served)
	// Output: spoa: agent closed
}

// Middleware is around every handler.
func ExampleWithMiddleware() {
	timed := func(next spoa.Handler) spoa.Handler {
		return spoa.HandlerFunc(func(ctx context.Context, m *spoa.Message, a *spoa.Actions) error {
			err := next.ServeSPOE(ctx, m, a)
			fmt.Println(m.Name(), "from", m.Peer().Addr.Network(), "ended with", err)
			return err
		})
	}
	agent := spoa.New(spoa.WithMiddleware(timed), spoa.WithHandlerFunc("check-client-ip", checkClientIP))
	client, end := serve(agent)
	defer end()
	client.Notify(context.Background(), spoa.MustParseMessage("check-client-ip ip:192.0.2.1"))
	// Output: check-client-ip from tcp ended with <nil>
}

// An agent whose successor has the same listening socket, from systemd or with
// SO_REUSEPORT, closes its own listener once the drain has begun. So HAProxy's
// health checks and new connections are the successor's, and a restart takes a
// tenth of a second, without another server. A request that HAProxy sends at the
// very moment in which its connection is closed can still be lost; where there
// is another server, a Shutdown that leaves the listener open loses none.
func ExampleAgent_Actor_takeover() {
	socket, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	ln, err := listenToo(socket)
	if err != nil {
		fmt.Println(err)
		return
	}
	agent := spoa.New(spoa.WithHandlerFunc("check-client-ip", checkClientIP))
	execute, drain := agent.Actor(ln, 10*time.Second)
	var g run.Group
	g.Add(execute, func(err error) {
		drain(err)
		ln.Close()
	})
	g.Add(func() error { return errors.New("replaced") }, func(error) {})
	fmt.Println(g.Run())

	successor := spoa.New(spoa.WithHandlerFunc("check-client-ip", checkClientIP))
	go successor.Serve(socket)
	fmt.Println(spoa.Check(context.Background(), "tcp", socket.Addr().String()))
	successor.Close()
	// Output:
	// replaced
	// <nil>
}

// listenToo returns another listener of the same socket, as a process gets it
// from systemd.
func listenToo(l net.Listener) (net.Listener, error) {
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return net.FileListener(f)
}

// A handler is tested without a network.
func ExampleMustParseMessage() {
	m := spoa.MustParseMessage("check-client-ip ip:10.1.2.3")
	var a spoa.Actions
	err := checkClientIP(context.Background(), m, &a)
	v, ok := a.Lookup(spoa.ScopeSess, "ip_score")
	fmt.Println(v, ok, err)

	a = spoa.Actions{}
	fmt.Println(checkClientIP(context.Background(), spoa.NewMessage("check-client-ip"), &a))
	// Output:
	// 100 true <nil>
	// check-client-ip: want an address, have null
}

// The arguments of `args method path ip=src`: the first two have no name.
func ExampleMessage_Args() {
	m := spoa.NewMessage("http-req",
		spoa.Arg{Value: spoa.String("GET")},
		spoa.Arg{Value: spoa.String("/index.html")},
		spoa.Arg{Name: "ip", Value: spoa.Addr(netip.MustParseAddr("2001:db8::1"))})
	for name, value := range m.Args() {
		fmt.Printf("%q %v %v\n", name, value.Kind(), value)
	}
	// Output:
	// "" string GET
	// "" string /index.html
	// "ip" ipv6 2001:db8::1
}

// `args src` sends an argument without a name, so it is taken by position.
func ExampleMessage_Arg() {
	m := spoa.NewMessage("check-client-ip", spoa.Arg{Value: spoa.Addr(netip.MustParseAddr("::ffff:192.0.2.7"))})
	ip, ok := m.Arg(0).Value.Addr()
	fmt.Println(ip, ok)
	// Output: 192.0.2.7 true
}

// Decode fills a struct, and says what is wrong with a message that does not
// fit.
func ExampleMessage_Decode() {
	var req struct {
		Method string     `spoe:"#0"`
		IP     netip.Addr `spoe:"ip"`
		Port   uint16     `spoe:"port"`
		Agent  string     `spoe:"ua,optional"`
	}
	args := []spoa.Arg{
		{Value: spoa.String("GET")},
		{Name: "ip", Value: spoa.Addr(netip.MustParseAddr("192.0.2.1"))},
		{Name: "port", Value: spoa.Int64(443)}, // HAProxy sends every integer as INT64
		{Name: "ua"},                           // and NULL for what a request does not have
	}
	fmt.Println(spoa.NewMessage("http-req", args...).Decode(&req))
	fmt.Println(req.Method, req.IP, req.Port)

	args[2].Value = spoa.Int64(70000)
	fmt.Println(spoa.NewMessage("http-req", args...).Decode(&req))
	// Output:
	// <nil>
	// GET 192.0.2.1 443
	// spoa: message http-req: argument port: want uint16, have int64 70000
}

// What the agent logs goes where the program's own lines go.
func ExampleWithSlog() {
	logger := slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.Attr{} // the output is to be the same every day
			}
			return a
		},
	}))
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	agent := spoa.New(spoa.WithSlog(logger), spoa.WithHandlerFunc("check-client-ip", checkClientIP))
	go agent.Serve(ln)
	defer agent.Close()
	client, err := spoa.Dial(context.Background(), "tcp", ln.Addr().String())
	if err != nil {
		fmt.Println(err)
		return
	}
	client.Notify(context.Background(), spoa.NewMessage("check-client-port"))
	client.Close()
	// Output: level=WARN msg="no handler for this message" message=check-client-port handled=check-client-ip
}

// Headers reads the argument of `args hdrs=req.hdrs` or `hdrs=req.hdrs_bin`.
func ExampleValue_Headers() {
	m := spoa.NewMessage("check-request",
		spoa.Arg{Name: "hdrs", Value: spoa.String("host: example.org\r\naccept: text/html\r\n\r\n")})
	header := make(http.Header)
	for h, err := range m.Value("hdrs").Headers() {
		if err != nil {
			fmt.Println(err)
			return
		}
		header.Add(string(h.Name), string(h.Value))
	}
	fmt.Println(header)
	// Output: map[Accept:[text/html] Host:[example.org]]
}
