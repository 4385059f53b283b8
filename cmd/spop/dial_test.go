package main

import (
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/spoa-go/spoa/cmd/internal/certtest"
)

// What else may be listening is named, and what to do.
func TestOtherProtocol(t *testing.T) {
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	secure := httptest.NewTLSServer(http.NotFoundHandler())
	defer secure.Close()
	ca := certtest.New(t, t.TempDir(), "ca")
	ca.Issue(t, "agent", "127.0.0.1")
	byTLS := tlsAgent(t, ca, tls.NoClientCert)
	for _, tc := range []struct{ args, want string }{
		{"-addr " + plain.Listener.Addr().String(), "speaks HTTP: not SPOP"},
		{"-addr " + secure.Listener.Addr().String(), "speaks TLS: use -tls"},
		{"-addr " + byTLS, "speaks TLS: use -tls"},
		{"-addr " + sshServer(t), "speaks SSH: not SPOP"},
		{"-tls -addr " + plain.Listener.Addr().String(), "speaks HTTP: not SPOP"},
		{"-tls -addr " + sshServer(t), "speaks SSH: not SPOP"},
		{"-tls -addr " + agent(t), "does not speak TLS: leave out -tls"},
	} {
		// An hour, so that nothing but the peer's words can end it.
		for _, command := range []string{"check -timeout 1h", "notify -timeout 1h", "bench -timeout 1h"} {
			message := ""
			if !strings.HasPrefix(command, "check") {
				message = " m"
			}
			wantFailure(t, 1, tc.want, strings.Split(command+" "+tc.args+message, " ")...)
		}
	}
}

// tlsAgent runs an agent with the certificate "agent" of ca.
func tlsAgent(t *testing.T, ca *certtest.Authority, auth tls.ClientAuthType) string {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(ca.File("agent"), ca.File("agent"))
	if err != nil {
		t.Fatal(err)
	}
	conf := &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: auth, ClientCAs: x509.NewCertPool()}
	conf.ClientCAs.AddCert(ca.Cert)
	return serve(t, tls.NewListener(listenLocal(t, "tcp", "127.0.0.1:0"), conf))
}

func TestTLS(t *testing.T) {
	ca := certtest.New(t, t.TempDir(), "ca")
	ca.Issue(t, "agent", "127.0.0.1")
	ca.Issue(t, "client", "127.0.0.1")
	addr := tlsAgent(t, ca, tls.RequireAndVerifyClientCert)
	trusting := []string{"-addr", addr, "-tls-ca", ca.File("ca")}
	known := append(trusting, "-tls-cert", ca.File("client"), "-tls-key", ca.File("client"))
	for _, tc := range []struct{ args, want string }{
		{"check", "version 2.0\n"},
		{"notify echo a=int:1", "set-var txn.a int 1\n"},
		{"bench -count 10 echo", "answers   10 "},
	} {
		name, rest, _ := strings.Cut(tc.args, " ")
		args := append([]string{name}, known...)
		if rest != "" {
			args = append(args, strings.Split(rest, " ")...)
		}
		stdout, stderr, status := command(t, args...)
		if !strings.HasPrefix(stdout, tc.want) && !strings.Contains(stdout, "\n"+tc.want) || stderr != "" || status != 0 {
			t.Errorf("%s: want %q, have %q, %q, status %d", name, tc.want, stdout, stderr, status)
		}
	}
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"-addr", addr, "-tls"}, "-tls-ca"},
		{append(known, "-tls-name", "example.com"), "-tls-name"},
		{trusting, "certificate required"},
		{append(trusting, "-tls-cert", "/nowhere", "-tls-key", "/nowhere"), "-tls-cert /nowhere"},
		{[]string{"-tls-ca", "/nowhere"}, "-tls-ca: "},
	} {
		wantFailure(t, 1, tc.want, append([]string{"check"}, tc.args...)...)
	}
	wantFailure(t, 2, "-tls-cert and -tls-key need each other", "check", "-tls-cert", "x")
	wantFailure(t, 2, "want -tls-name", "check", "-tls", "-addr", "unix:/x")
}
