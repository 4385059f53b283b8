package crowdsec_test

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/spoa-go/spoa/cmd/internal/reputation"
	"github.com/spoa-go/spoa/cmd/internal/reputation/crowdsec"
	"github.com/spoa-go/spoa/cmd/internal/reputation/crowdsec/crowdsectest"
)

const patience = 30 * time.Second

// follow runs a source of the server until the test ends.
func follow(t *testing.T, server *crowdsectest.Server) *crowdsec.Source {
	t.Helper()
	s, err := crowdsec.New(crowdsec.Config{URL: server.URL, Key: crowdsectest.Key, Interval: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Pull(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return s
}

// await waits until the subject has that decision.
func await(t *testing.T, s *crowdsec.Source, sub reputation.Subject, decision string) {
	t.Helper()
	pause := time.NewTicker(10 * time.Millisecond)
	defer pause.Stop()
	for deadline := time.Now().Add(patience); ; <-pause.C {
		f := s.Judge(t.Context(), sub)
		if f.Decision == decision {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%v: want decision %q, have %+v, %+v", sub.Addr, decision, f, s.Status())
		}
	}
}

func TestRealServer(t *testing.T) {
	server := crowdsectest.Start(t)
	cscli := func(args ...string) {
		t.Helper()
		server.Command(t, append([]string{"decisions"}, args...)...)
	}
	at := func(addr string) reputation.Subject { return reputation.Subject{Addr: netip.MustParseAddr(addr)} }
	cscli("add", "--ip", "203.0.113.1", "--reason", "crowdsecurity/ssh-bf")
	s := follow(t, server)

	await(t, s, at("203.0.113.1"), "ban")
	if want, have := "crowdsec: ban for crowdsecurity/ssh-bf", s.Judge(t.Context(), at("203.0.113.1")).Reason; want != have {
		t.Errorf("reason: want %q, have %q", want, have)
	}
	cscli("add", "--range", "2001:db8::/32", "--type", "captcha")
	await(t, s, at("2001:db8::1"), "captcha")
	cscli("add", "--scope", "Country", "--value", "XX")
	await(t, s, reputation.Subject{Addr: netip.MustParseAddr("192.0.2.1"), Country: "XX"}, "ban")
	cscli("add", "--scope", "AS", "--value", "64496", "--type", "throttle")
	await(t, s, reputation.Subject{Addr: netip.MustParseAddr("192.0.2.1"), ASN: 64496}, "throttle")
	cscli("add", "--ip", "203.0.113.2", "--duration", "4s")
	await(t, s, at("203.0.113.2"), "ban")
	await(t, s, at("203.0.113.2"), "")
	cscli("delete", "--ip", "203.0.113.1")
	await(t, s, at("203.0.113.1"), "")

	server.Stop(t)
	await(t, s, at("2001:db8::1"), "captcha")
	server.Run(t)
	cscli("add", "--ip", "203.0.113.3")
	await(t, s, at("203.0.113.3"), "ban")
	await(t, s, at("2001:db8::1"), "captcha")
}

func TestRealServerWrongKey(t *testing.T) {
	server := crowdsectest.Start(t)
	s, err := crowdsec.New(crowdsec.Config{URL: server.URL, Key: "wrong"})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Pull(t.Context()); err == nil || !strings.Contains(err.Error(), "403 Forbidden: want a key") {
		t.Errorf("want 403, have %v", err)
	}
}

func TestRealServerMany(t *testing.T) {
	server := crowdsectest.Start(t)
	const n = 1_000
	var addrs []string
	for i := range n {
		addrs = append(addrs, fmt.Sprintf("100.64.%d.%d", i>>8, i&255))
	}
	server.Import(t, addrs)
	s := follow(t, server)
	if have := s.Status().Entries; have != n {
		t.Errorf("entries: want %d, have %d", n, have)
	}
}
