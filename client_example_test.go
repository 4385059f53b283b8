package spoa_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/spoa-go/spoa"
)

func ExampleClient_Notify() {
	agent := spoa.New(spoa.WithHandlerFunc("check-client-ip",
		func(_ context.Context, m *spoa.Message, a *spoa.Actions) error {
			if src, ok := m.Lookup("src"); ok && src.String() == "192.0.2.1" {
				a.SetVar(spoa.ScopeSess, "ip_score", spoa.Uint32(80))
			}
			return nil
		}))
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	go agent.Serve(ln)
	defer agent.Close()

	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	client, err := spoa.Dial(ctx, "tcp", ln.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	actions, err := client.Notify(ctx, spoa.NewMessage("check-client-ip",
		spoa.Arg{Name: "src", Value: spoa.Addr(netip.MustParseAddr("192.0.2.1"))}))
	if err != nil {
		log.Fatal(err)
	}
	for _, a := range actions {
		fmt.Println(a)
	}
	// Output: set-var sess.ip_score uint32 80
}

func ExampleCheck() {
	agent := spoa.New()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	go agent.Serve(ln)
	defer agent.Close()

	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	fmt.Println(spoa.Check(ctx, "tcp", ln.Addr().String()))
	// Output: <nil>
}

// Start keeps many NOTIFYs in flight without a goroutine for each.
func ExampleClient_Start() {
	agent := spoa.New(spoa.WithHandlerFunc("ping",
		func(_ context.Context, m *spoa.Message, a *spoa.Actions) error {
			a.SetVar(spoa.ScopeTxn, "pong", m.Value("n"))
			return nil
		}))
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	go agent.Serve(ln)
	defer agent.Close()
	client, err := spoa.Dial(context.Background(), "tcp", ln.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	const n = 20
	answers := make(chan string, n)
	for i := range n {
		err := client.Start(func(actions []spoa.Action, err error) {
			if err != nil || len(actions) != 1 {
				answers <- fmt.Sprint(actions, err)
				return
			}
			answers <- "pong" // what the callback gets is gone when it returns
		}, spoa.NewMessage("ping", spoa.Arg{Name: "n", Value: spoa.Int(i)}))
		if err != nil {
			log.Fatal(err)
		}
	}
	pongs := 0
	for range n {
		if <-answers == "pong" {
			pongs++
		}
	}
	fmt.Println(pongs)
	// Output: 20
}

// Trace shows what a client and an agent say.
func ExampleTrace() {
	agent := spoa.New(spoa.WithHandlerFunc("check-client-ip",
		func(_ context.Context, m *spoa.Message, a *spoa.Actions) error {
			a.SetVar(spoa.ScopeSess, "ip_score", spoa.Int(42))
			return nil
		}))
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	go agent.Serve(ln)
	defer agent.Close()
	conn, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	client, err := spoa.NewClient(context.Background(), spoa.Trace(conn, func(sent bool, frame string) {
		if strings.HasPrefix(frame, "NOTIFY") || strings.HasPrefix(frame, "ACK") {
			fmt.Println(sent, frame)
		}
	}))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	if _, err := client.Notify(context.Background(), spoa.MustParseMessage("check-client-ip src=ip:192.0.2.1")); err != nil {
		log.Fatal(err)
	}
	// Output:
	// true NOTIFY 1:1 check-client-ip(src=ipv4 192.0.2.1)
	// false ACK 1:1 set-var sess.ip_score int64 42
}
