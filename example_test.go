package spoa_test

import (
	"context"
	"errors"
	"fmt"
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
func ExampleNewMessage() {
	m := spoa.NewMessage("check-client-ip", spoa.Arg{Value: spoa.Addr(netip.MustParseAddr("10.1.2.3"))})
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
