// Package listen names, opens and dials the addresses of both commands: TCP with
// or without TLS, unix sockets, and sockets that systemd passes.
package listen

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
)

const (
	unixPrefix  = "unix:"
	abnsPrefix  = "abns@"
	abnszPrefix = "abnsz@"
	systemdName = "systemd"
)

// maxPath is the size of sun_path on Linux, where an abstract name may fill it.
const maxPath = 108

var errForm = errors.New("want host:port, unix:/path, or abns@name or abnsz@name as HAProxy calls abstract sockets")

// Addr is an address to listen on or to dial. The zero Addr is none. As a
// flag.Value it has the form host:port (also *:port, for all addresses),
// unix:/path, unix:@name, abns@name or abnsz@name.
type Addr struct {
	Network string // tcp, unix, or systemd for the sockets that it passes
	Address string // empty for systemd
}

// String returns the address in a form that Set takes.
func (a *Addr) String() string {
	switch {
	case a.Network == systemdName:
		return systemdName
	case a.Network == "unix" && len(a.Address) == maxPath:
		return abnsPrefix + strings.TrimRight(a.Address[1:], "\x00")
	case a.Network == "unix" && a.abstract():
		return abnszPrefix + a.Address[1:]
	case a.Network == "unix":
		return unixPrefix + a.Address
	}
	return a.Address
}

// Set implements flag.Value. It does not look at the system.
func (a *Addr) Set(s string) error {
	if path, ok := strings.CutPrefix(s, unixPrefix); ok {
		return a.setPath(path)
	}
	if name, ok := strings.CutPrefix(s, abnszPrefix); ok {
		return a.setPath("@" + name)
	}
	if name, ok := strings.CutPrefix(s, abnsPrefix); ok {
		// HAProxy's abns names are as long as sun_path, and filled up with zeros.
		return a.setPath("@" + name + strings.Repeat("\x00", max(0, maxPath-1-len(name))))
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return errForm
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return errForm
	}
	if host == "*" {
		host = ""
	}
	*a = Addr{"tcp", net.JoinHostPort(host, port)}
	return nil
}

func (a *Addr) setPath(path string) error {
	most := maxPath - 1 // a path ends with a zero
	if strings.HasPrefix(path, "@") {
		most = maxPath
	}
	switch {
	case strings.Trim(path, "@\x00") == "":
		return errForm
	case len(path) > most:
		return fmt.Errorf("a socket's path or name of %d bytes: want at most %d", len(path), maxPath-1)
	}
	*a = Addr{"unix", path}
	return nil
}

// abstract reports whether a unix socket has a name in place of a file.
func (a Addr) abstract() bool { return strings.HasPrefix(a.Address, "@") }

// Name returns a listener's address for people, abstract ones as Addr has them.
func Name(addr net.Addr) string {
	if a := (Addr{"unix", addr.String()}); addr.Network() == "unix" && a.abstract() {
		return a.String()
	}
	return addr.String()
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

// Listen opens all addresses but systemd's, or none.
func (l Addrs) Listen(mode fs.FileMode) (all []net.Listener, err error) {
	for _, a := range l {
		if a.IsSystemd() {
			continue
		}
		if l.besideIPv4(a) {
			a.Network = "tcp6"
		}
		opened, err := a.Listen(mode)
		if err != nil {
			CloseAll(all)
			return nil, err
		}
		all = append(all, opened)
	}
	return all, nil
}

// Open opens the addresses behind the sockets that systemd has passed: all or
// none. The first passed of them are systemd's. Without any socket or address it
// opens the fallback.
func (l Addrs) Open(fallback Addr, mode fs.FileMode) (all []net.Listener, passed int, err error) {
	defer func() {
		if err != nil {
			CloseAll(all)
		}
	}()
	if all, err = Systemd(); err != nil {
		return all, 0, err
	}
	passed = len(all)
	switch {
	case passed == 0 && len(l) == 0:
		l = Addrs{fallback}
	case passed == 0 && slices.ContainsFunc(l, Addr.IsSystemd):
		return all, 0, errors.New("-listen systemd: it has passed no socket")
	}
	opened, err := l.Listen(mode)
	return append(all, opened...), passed, err
}

// CloseAll closes all listeners.
func CloseAll(all []net.Listener) {
	for _, l := range all {
		l.Close()
	}
}

// besideIPv4 reports whether a is [::] with a port that an IPv4 address of l has
// too. Without such an address [::] takes IPv4 in as well.
func (l Addrs) besideIPv4(a Addr) bool {
	host, port, _ := net.SplitHostPort(a.Address)
	if a.Network != "tcp" || host != "::" {
		return false
	}
	return slices.ContainsFunc(l, func(other Addr) bool {
		addr, err := netip.ParseAddrPort(other.Address)
		return err == nil && addr.Addr().Is4() && port == strconv.Itoa(int(addr.Port()))
	})
}

// Check reports what keeps the address from being listened on, but for another
// process that listens there already. It listens for a moment.
func (a Addr) Check() error {
	if a.IsSystemd() {
		return nil
	}
	if a.Network != "unix" {
		l, err := net.Listen(a.Network, a.Address)
		if errors.Is(err, syscall.EADDRINUSE) {
			return nil
		}
		if err == nil {
			l.Close()
		}
		return err
	}
	if a.abstract() {
		return nil
	}
	if fi, err := os.Lstat(a.Address); err == nil && fi.Mode()&fs.ModeSocket == 0 {
		return fmt.Errorf("listen unix %s: a file that is no socket is in the way", a.Address)
	}
	dir, err := os.Stat(filepath.Dir(a.Address))
	if err == nil && !dir.IsDir() {
		err = &fs.PathError{Op: "listen unix", Path: a.Address, Err: syscall.ENOTDIR}
	}
	return err
}

// Dial connects to the address.
func (a Addr) Dial(ctx context.Context) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, a.Network, a.Address)
}

// Listen opens the address, which must not be systemd. A unix socket gets these
// permissions, and replaces one that a dead process has left behind.
func (a Addr) Listen(mode fs.FileMode) (net.Listener, error) {
	if a.Network != "unix" {
		if strings.HasPrefix(a.Address, "0.0.0.0:") {
			a.Network = "tcp4" // package net would take IPv6 in as well
		}
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
	if a.abstract() {
		return abstractListener{l, &net.UnixAddr{Net: "unix", Name: a.Address}}, nil
	}
	if err := os.Chmod(a.Address, mode); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// abstractListener has an address with the zeros that package net cuts off.
type abstractListener struct {
	net.Listener
	addr net.Addr
}

func (l abstractListener) Addr() net.Addr { return l.addr }

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
