// Command jwt is an agent that checks the signed token of a request (a JWT in the
// header Authorization) and lets in whoever has a good one. haproxy.cfg and
// token.conf are HAProxy's side.
package main

import (
	"context"
	"crypto"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/oklog/run"
	"github.com/spoa-go/spoa"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:12345", "`address` to listen on")
	key := flag.String("key", "key.pem", "`file` with the Ed25519 public key of the issuer, in PEM")
	issuer := flag.String("issuer", "", "claim iss that a token must have")
	audience := flag.String("audience", "", "claim aud that a token must have")
	flag.Parse()
	err := serve(*listen, *key, *issuer, *audience)
	var signal run.SignalError
	if errors.As(err, &signal) {
		slog.Info("ended", "reason", err)
		return
	}
	slog.Error("ended", "err", err)
	os.Exit(1)
}

func serve(address, file, issuer, audience string) error {
	if issuer == "" || audience == "" {
		return errors.New("flags -issuer and -audience are needed: without them a token for anybody would do")
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	key, err := jwt.ParseEdPublicKeyFromPEM(text)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	agent := newAgent(key, issuer, audience, spoa.WithSlog(slog.Default()))
	var g run.Group
	g.Add(agent.Actor(l, 10*time.Second))
	g.Add(run.SignalHandler(context.Background(), os.Interrupt, syscall.SIGTERM))
	return g.Run()
}

func newAgent(key crypto.PublicKey, issuer, audience string, opts ...spoa.Option) *spoa.Agent {
	c := &checker{key: key, parser: jwt.NewParser(
		jwt.WithValidMethods([]string{jwt.SigningMethodEdDSA.Alg()}), // never what the token asks for
		jwt.WithIssuer(issuer),
		jwt.WithAudience(audience),
		jwt.WithExpirationRequired(),
	)}
	return spoa.New(append(opts,
		spoa.WithHandlerFunc("check-token", c.checkToken),
		spoa.WithHandlerTimeout(100*time.Millisecond))...)
}

type checker struct {
	key    crypto.PublicKey
	parser *jwt.Parser
}

// checkToken sets txn.token.subject if the token is good, and only then: HAProxy
// denies a request without it, also if the agent has failed or is away. A bad
// token is no failure of the handler: the reason is another variable.
func (c *checker) checkToken(_ context.Context, m *spoa.Message, a *spoa.Actions) error {
	var args struct {
		Authorization string `spoe:"authorization,optional"` // NULL if the request has none
	}
	if err := m.Decode(&args); err != nil {
		return err
	}
	subject, reason := c.check(args.Authorization)
	if reason != "" {
		a.SetVar(spoa.ScopeTxn, "reason", spoa.String(reason))
		return nil
	}
	a.SetVar(spoa.ScopeTxn, "subject", spoa.String(subject))
	return nil
}

func (c *checker) check(authorization string) (subject, reason string) {
	scheme, text, _ := strings.Cut(authorization, " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return "", "no bearer token"
	}
	var claims jwt.RegisteredClaims
	_, err := c.parser.ParseWithClaims(text, &claims, func(*jwt.Token) (any, error) { return c.key, nil })
	switch {
	case errors.Is(err, jwt.ErrTokenExpired):
		return "", "token has expired"
	case errors.Is(err, jwt.ErrTokenSignatureInvalid):
		return "", "bad signature"
	case err != nil:
		return "", "bad token"
	case claims.Subject == "":
		return "", "no subject"
	}
	return claims.Subject, ""
}
