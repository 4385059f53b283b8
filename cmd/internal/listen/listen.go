// Package listen names, opens and dials the addresses of both commands: TCP with
// or without TLS, unix sockets, and sockets that systemd passes.
package listen

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
)

const (
	unixPrefix  = "unix:"
	systemdName = "systemd"
)

var errForm = errors.New("want host:port or unix:/path")

// Addr is an address to listen on or to dial. The zero Addr is none. As a
// flag.Value it has the form host:port or unix:/path.
type Addr struct {
	Network string // tcp, unix, or systemd for the sockets that it passes
	Address string // empty for systemd
}

// String returns the address in the form that Set takes.
func (a *Addr) String() string {
	switch a.Network {
	case "unix":
		return unixPrefix + a.Address
	case systemdName:
		return systemdName
	}
	return a.Address
}

// Set implements flag.Value. It does not look at the system.
func (a *Addr) Set(s string) error {
	if path, ok := strings.CutPrefix(s, unixPrefix); ok && path != "" {
		*a = Addr{"unix", path}
		return nil
	}
	_, port, err := net.SplitHostPort(s)
	if err != nil {
		return errForm
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return errForm
	}
	*a = Addr{"tcp", s}
	return nil
}

// IsSystemd reports whether a stands for the sockets that systemd passes.
func (a Addr) IsSystemd() bool { return a.Network == systemdName }

// Addrs is a repeatable flag of addresses, which may be systemd too.
type Addrs []Addr

// String implements flag.Value.
func (l *Addrs) String() string {
	all := make([]string, len(*l))
	for i := range *l {
		all[i] = (*l)[i].String()
	}
	return strings.Join(all, ",")
}

// Set implements flag.Value.
func (l *Addrs) Set(s string) error {
	a := Addr{Network: systemdName}
	if s != systemdName {
		if err := a.Set(s); err != nil {
			return fmt.Errorf("%w, or %s", err, systemdName)
		}
	}
	*l = append(*l, a)
	return nil
}

// Dial connects to the address.
func (a Addr) Dial(ctx context.Context) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, a.Network, a.Address)
}

// Listen opens the address, which must not be systemd. A unix socket gets these
// permissions, and replaces one that a dead process has left behind.
func (a Addr) Listen(mode fs.FileMode) (net.Listener, error) {
	if a.Network != "unix" {
		return net.Listen(a.Network, a.Address)
	}
	l, err := net.Listen("unix", a.Address)
	if errors.Is(err, syscall.EADDRINUSE) {
		if err := removeDead(a.Address); err != nil {
			return nil, err
		}
		l, err = net.Listen("unix", a.Address)
	}
	if err != nil {
		return nil, err
	}
	if strings.HasPrefix(a.Address, "@") { // abstract: no file
		return l, nil
	}
	if err := os.Chmod(a.Address, mode); err != nil {
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

// Systemd returns the sockets that systemd has opened for this process, if any.
// With an error it returns those that can be used.
func Systemd() ([]net.Listener, error) {
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
