package spoa_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"net/netip"
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
