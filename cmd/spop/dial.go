package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/spoa-go/spoa"
	"github.com/spoa-go/spoa/cmd/internal/listen"
)

const tlsUsage = `  -tls         speak TLS. The flags below imply it
  -tls-ca F    trust the authorities in this file, not the system's
  -tls-cert F, -tls-key F
               show this certificate
  -tls-name N  the name in the agent's certificate, if not the host of -addr
`

// tlsFlags are what the command line says of TLS.
type tlsFlags struct {
	on                  bool
	ca, cert, key, name string
}

// config returns nil if TLS is off.
func (f *tlsFlags) config(addr listen.Addr) (*tls.Config, error) {
	if !f.on && *f == (tlsFlags{}) {
		return nil, nil
	}
	if (f.cert == "") != (f.key == "") {
		return nil, misuse("-tls-cert and -tls-key need each other")
	}
	name := f.name
	if name == "" {
		host, _, err := net.SplitHostPort(addr.Address)
		if err != nil || addr.Network != "tcp" {
			return nil, misuse("TLS on %v: want -tls-name, the name in the agent's certificate", &addr)
		}
		name = host
	}
	return listen.ClientTLS(f.ca, f.cert, f.key, name)
}

// dial connects to the agent and does the HELLO.
func (c *common) dial(ctx context.Context) (client *spoa.Client, err error) {
	err = c.greet(ctx, func(ctx context.Context, conn net.Conn) (err error) {
		client, err = spoa.NewClient(ctx, conn)
		return err
	})
	return client, err
}

// silence is how long an agent may take for its HELLO before spop has a look at
// what else the port may speak.
const silence = 500 * time.Millisecond

// greet connects and calls hello, which owns the connection. If the peer does
// not speak SPOP, the error says what it speaks.
func (c *common) greet(ctx context.Context, hello func(context.Context, net.Conn) error) error {
	ctx, end := context.WithTimeout(ctx, c.timeout)
	defer end()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	conn, err := c.connect(ctx)
	if err != nil {
		return c.explain(err)
	}
	first := &opening{Conn: conn}
	if c.tlsConfig == nil {
		look := time.AfterFunc(silence, func() {
			if err := c.otherProtocol(ctx); err != nil {
				cancel(err)
			}
		})
		defer look.Stop()
	}
	err = hello(ctx, c.trace(first))
	if err == nil {
		return nil
	}
	if name := protocolOf(first.bytes()); name != "" {
		return c.notSPOP(name)
	}
	var other *protocolError
	if errors.As(context.Cause(ctx), &other) {
		return other
	}
	var d *spoa.DisconnectError
	if errors.As(err, &d) && !d.Remote && d.Status == spoa.StatusIO && ctx.Err() == nil && c.tlsConfig == nil {
		if err := c.otherProtocol(ctx); err != nil {
			return err
		}
	}
	return c.explain(err)
}

// connect connects to the agent, by TLS if that is asked for.
func (c *common) connect(ctx context.Context) (net.Conn, error) {
	conn, err := c.addr.Dial(ctx)
	if err != nil || c.tlsConfig == nil {
		return conn, err
	}
	secure := tls.Client(conn, c.tlsConfig)
	if err := secure.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, c.explainTLS(err)
	}
	return secure, nil
}

func (c *common) explainTLS(err error) error {
	var plain tls.RecordHeaderError
	var authority x509.UnknownAuthorityError
	var host x509.HostnameError
	switch {
	case errors.As(err, &plain):
		if name := protocolOf(plain.RecordHeader[:]); name != "" {
			return c.notSPOP(name)
		}
		return fmt.Errorf("%v: the peer does not speak TLS: leave out -tls", &c.addr)
	case errors.As(err, &authority):
		return fmt.Errorf("%v: %w: name its authority with -tls-ca", &c.addr, err)
	case errors.As(err, &host):
		return fmt.Errorf("%v: %w: give the right name with -tls-name", &c.addr, err)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return err // explain knows
	}
	return fmt.Errorf("%v: TLS: %w", &c.addr, err)
}

// opening is a connection that keeps the first bytes it has read.
type opening struct {
	net.Conn
	mu    sync.Mutex
	first []byte
}

const openingSize = 8

func (o *opening) Read(p []byte) (int, error) {
	n, err := o.Conn.Read(p)
	o.mu.Lock()
	if missing := openingSize - len(o.first); missing > 0 {
		o.first = append(o.first, p[:min(n, missing)]...)
	}
	o.mu.Unlock()
	return n, err
}

func (o *opening) bytes() []byte {
	o.mu.Lock()
	defer o.mu.Unlock()
	return bytes.Clone(o.first)
}

// protocolOf returns the name of the protocol whose server begins like that, or
// the empty string.
func protocolOf(first []byte) string {
	switch {
	case len(first) >= 2 && first[0] >= 0x14 && first[0] <= 0x17 && first[1] == 3: // a record of SSL 3.0 or later
		return "TLS"
	case bytes.HasPrefix(first, []byte("HTTP/")):
		return "HTTP"
	case bytes.HasPrefix(first, []byte("SSH-")):
		return "SSH"
	case bytes.HasPrefix(first, []byte("220 ")), bytes.HasPrefix(first, []byte("220-")):
		return "SMTP or FTP"
	}
	return ""
}

// protocolError says that a port speaks something else than plain SPOP.
type protocolError struct{ message string }

func (e *protocolError) Error() string { return e.message }

func (c *common) notSPOP(name string) *protocolError {
	advice := "not SPOP: want the address of an agent"
	if name == "TLS" {
		advice = "use -tls"
	}
	return &protocolError{fmt.Sprintf("%v: the peer speaks %s: %s", &c.addr, name, advice)}
}

// otherProtocol asks the peer in TLS and in HTTP, each on a connection of its
// own, and returns a *protocolError if one is answered. It asks only once,
// because a load generator connects often.
func (c *common) otherProtocol(ctx context.Context) error {
	c.askOnce.Do(func() {
		ctx, cancel := context.WithTimeout(ctx, silence)
		defer cancel()
		var asked sync.WaitGroup
		var inTLS, inHTTP string
		asked.Go(func() {
			inTLS = c.ask(ctx, func(conn net.Conn) {
				// It need not succeed: the first bytes of the answer are enough.
				_ = tls.Client(conn, &tls.Config{InsecureSkipVerify: true}).HandshakeContext(ctx)
			})
		})
		asked.Go(func() {
			inHTTP = c.ask(ctx, func(conn net.Conn) {
				if _, err := io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n"); err == nil {
					_, _ = io.ReadFull(conn, make([]byte, openingSize))
				}
			})
		})
		asked.Wait()
		switch { // a server of TLS may answer plain HTTP too, to say so
		case inTLS != "":
			c.asked = c.notSPOP(inTLS)
		case inHTTP != "":
			c.asked = c.notSPOP(inHTTP)
		}
	})
	if c.asked == nil {
		return nil
	}
	return c.asked
}

// ask returns the protocol in which talk was answered, or the empty string.
func (c *common) ask(ctx context.Context, talk func(net.Conn)) string {
	conn, err := c.addr.Dial(ctx)
	if err != nil {
		return ""
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	o := &opening{Conn: conn}
	talk(o)
	return protocolOf(o.bytes())
}
