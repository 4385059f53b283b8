package main

import (
	"context"
	"crypto/ed25519"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/spoa-go/spoa"
	"github.com/spoa-go/spoa/cmd/examples/internal/haproxytest"
)

// token returns an Authorization header with a token of claims, signed by key.
func token(t *testing.T, method jwt.SigningMethod, key any, claims jwt.MapClaims) string {
	t.Helper()
	s, err := jwt.NewWithClaims(method, claims).SignedString(key)
	if err != nil {
		t.Fatal(err)
	}
	return "Bearer " + s
}

// Good tokens pass and the application sees whose they are; no other does.
func TestBehindHAProxy(t *testing.T) {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	_, other, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	agent := newAgent(public, "issuer", "shop")
	served := make(chan error, 1)
	go func() { served <- agent.Serve(l) }()
	defer agent.Close()
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "hello %s, %q", r.Header.Get("X-Subject"), r.Header.Get("Authorization"))
	}))
	defer app.Close()
	front := haproxytest.FreeAddr(t)
	haproxytest.Start(t, ".", "127.0.0.1:8080", front, "127.0.0.1:8081", app.Listener.Addr().String(), "127.0.0.1:12345", l.Addr().String())

	soon, ago := time.Now().Add(time.Hour).Unix(), time.Now().Add(-time.Hour).Unix()
	claims := func(pairs ...any) jwt.MapClaims {
		c := jwt.MapClaims{"iss": "issuer", "aud": "shop", "sub": "anna", "exp": soon}
		for i := 0; i < len(pairs); i += 2 {
			c[pairs[i].(string)] = pairs[i+1]
		}
		return c
	}
	good := token(t, jwt.SigningMethodEdDSA, private, claims())
	ask := func(authorization string) (int, string, error) {
		req, err := http.NewRequest("GET", "http://"+front, nil)
		if err != nil {
			return 0, "", err
		}
		req.Header.Set("X-Subject", "root")
		if authorization != "" {
			req.Header.Set("Authorization", authorization)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return 0, "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if resp.StatusCode != http.StatusOK {
			return resp.StatusCode, resp.Header.Get("WWW-Authenticate"), err
		}
		return resp.StatusCode, string(body), err
	}
	haproxytest.Await(t, func() error {
		status, _, err := ask(good)
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("status %d", status)
		}
		return err
	})
	for _, tt := range []struct {
		name, authorization string
		status              int
		want                string
	}{
		{"good", good, 200, `hello anna, ""`},
		{"none", "", 401, "no bearer token"},
		{"another scheme", "Basic YTpi", 401, "no bearer token"},
		{"no token", "Bearer x", 401, "bad token"},
		{"expired", token(t, jwt.SigningMethodEdDSA, private, claims("exp", ago)), 401, "token has expired"},
		{"endless", token(t, jwt.SigningMethodEdDSA, private, claims("exp", nil)), 401, "bad token"},
		{"another key", token(t, jwt.SigningMethodEdDSA, other, claims()), 401, "bad signature"},
		{"changed", strings.Replace(good, ".", ".e30", 1), 401, "bad"},
		{"unsigned", token(t, jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, claims()), 401, "bad"},
		{"signed with the public key as a secret", token(t, jwt.SigningMethodHS256, []byte(public), claims()), 401, "bad"},
		{"another issuer", token(t, jwt.SigningMethodEdDSA, private, claims("iss", "x")), 401, "bad token"},
		{"another audience", token(t, jwt.SigningMethodEdDSA, private, claims("aud", "x")), 401, "bad token"},
		{"no subject", token(t, jwt.SigningMethodEdDSA, private, claims("sub", "")), 401, "no subject"},
	} {
		status, text, err := ask(tt.authorization)
		if status != tt.status || !strings.Contains(text, tt.want) || err != nil {
			t.Errorf("%s: want %d and %s, have %d and %s, error %v", tt.name, tt.status, tt.want, status, text, err)
		}
	}
	agent.Close() // without an agent nobody gets in
	<-served
	if status, _, err := ask(good); status != http.StatusServiceUnavailable || err != nil {
		t.Errorf("no agent: want 503, have %d, error %v", status, err)
	}
}

// A message without its argument is an error that the log and HAProxy hear of.
func TestOtherMessage(t *testing.T) {
	public, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	c := &checker{key: public, parser: jwt.NewParser()}
	var a spoa.Actions
	if err := c.checkToken(context.Background(), spoa.MustParseMessage("check-token authorization=int:1"), &a); err == nil {
		t.Error("want an error, have none")
	}
	if _, ok := a.Lookup(spoa.ScopeTxn, "subject"); ok {
		t.Error("want no subject, have one")
	}
}
