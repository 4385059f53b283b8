package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
)

const (
	bySystemd  = "systemd" // as an address: the sockets that it passes
	unixPrefix = "unix:"
)

// checkAddr tells what is wrong with an address, without a look at the system.
func checkAddr(addr string) error {
	if path, ok := strings.CutPrefix(addr, unixPrefix); ok && path != "" {
		return nil
	}
	if _, port, err := net.SplitHostPort(addr); err == nil {
		if _, err := strconv.ParseUint(port, 10, 16); err == nil {
			return nil
		}
	}
	return errors.New("want host:port or unix:/path")
}

// listeners opens what the configuration names, behind the first few, which
// systemd has passed: all or none.
func (c *config) listeners(certs *certificates) (all []net.Listener, shared int, err error) {
	defer func() {
		if err != nil {
			closeAll(all)
		}
	}()
	passed, err := fromSystemd()
	if err != nil {
		return passed, 0, err
	}
	all = passed
	addrs := c.listen
	if len(addrs) == 0 && len(passed) == 0 {
		// SPOP knows no authentication, so only this machine gets in.
		addrs = stringList{net.JoinHostPort("127.0.0.1", strconv.FormatUint(uint64(c.port), 10))}
	}
	for _, addr := range addrs {
		if addr == bySystemd {
			if len(passed) == 0 {
				return all, 0, errors.New("-listen systemd: it has passed no socket")
			}
			continue
		}
		l, err := listen(addr, os.FileMode(c.unixMode))
		if err != nil {
			return all, 0, err
		}
		all = append(all, l)
	}
	for i, l := range all {
		if certs != nil && l.Addr().Network() == "tcp" {
			all[i] = tls.NewListener(l, certs.config())
		}
	}
	return all, len(passed), nil
}

func closeAll(all []net.Listener) {
	for _, l := range all {
		l.Close()
	}
}

// fromSystemd returns the sockets that systemd has opened.
func fromSystemd() ([]net.Listener, error) {
	passed, err := activation.Listeners()
	var all []net.Listener
	for i, l := range passed {
		if l == nil {
			err = fmt.Errorf("socket %d passed by systemd is not a stream socket that listens", i)
			continue
		}
		all = append(all, l)
	}
	return all, err
}

// listen opens an address that checkAddr is content with.
func listen(addr string, mode os.FileMode) (net.Listener, error) {
	path, ok := strings.CutPrefix(addr, unixPrefix)
	if !ok {
		return net.Listen("tcp", addr)
	}
	l, err := net.Listen("unix", path)
	if errors.Is(err, syscall.EADDRINUSE) {
		if err := removeDead(path); err != nil {
			return nil, err
		}
		l, err = net.Listen("unix", path)
	}
	if err != nil {
		return nil, err
	}
	if strings.HasPrefix(path, "@") { // abstract: no file
		return l, nil
	}
	if err := os.Chmod(path, mode); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// removeDead removes the socket that a process left behind when it was killed.
func removeDead(path string) error {
	nc, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		nc.Close()
		return fmt.Errorf("listen unix %s: another process listens there", path)
	}
	// Anything but a refusal may be a process that is alive, or no socket.
	if fi, statErr := os.Lstat(path); statErr != nil || fi.Mode()&os.ModeSocket == 0 || !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("listen unix %s: in the way: %w", path, err)
	}
	return os.Remove(path)
}

// access says in the log who can reach the agent.
func access(l net.Listener, c *config) string {
	t, ok := l.Addr().(*net.TCPAddr)
	switch {
	case ok && c.clientCA != "":
		return "clients with a certificate of " + c.clientCA
	case !ok || t.IP.IsLoopback():
		return "this machine only"
	case c.cert != "":
		return "whoever reaches this address: TLS without -tls-client-ca asks for no certificate"
	}
	return "whoever reaches this address: SPOP has no authentication"
}

// certificates are those of the TLS listeners. They may be loaded again while
// in use.
type certificates struct {
	cert, key, clientCA string
	current             atomic.Pointer[tls.Config]
}

// certificates loads them, and returns nil if there are none.
func (c *config) certificates() (*certificates, error) {
	if c.cert == "" {
		return nil, nil
	}
	certs := &certificates{cert: c.cert, key: c.key, clientCA: c.clientCA}
	return certs, certs.load()
}

// load puts what the files hold in force for new connections, or changes
// nothing.
func (c *certificates) load() error {
	pair, err := tls.LoadX509KeyPair(c.cert, c.key)
	if err != nil {
		return fmt.Errorf("-tls-cert %s, -tls-key %s: %w", c.cert, c.key, err)
	}
	conf := &tls.Config{Certificates: []tls.Certificate{pair}}
	if c.clientCA != "" {
		b, err := os.ReadFile(c.clientCA)
		if err != nil {
			return fmt.Errorf("-tls-client-ca: %w", err)
		}
		conf.ClientCAs = x509.NewCertPool()
		if !conf.ClientCAs.AppendCertsFromPEM(b) {
			return fmt.Errorf("-tls-client-ca %s: no certificate in it", c.clientCA)
		}
		conf.ClientAuth = tls.RequireAndVerifyClientCert
	}
	c.current.Store(conf)
	return nil
}

// config is that of a listener.
func (c *certificates) config() *tls.Config {
	return &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return c.current.Load(), nil }}
}

// expiry is when the certificate runs out.
func (c *certificates) expiry() time.Time { return c.current.Load().Certificates[0].Leaf.NotAfter }
