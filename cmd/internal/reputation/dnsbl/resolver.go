package dnsbl

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/miekg/dns"
)

const (
	attemptTimeout = 2 * time.Second // of one server
	lookupTimeout  = 5 * time.Second // of all servers
	noTTL          = time.Minute     // of an answer that says nothing about how long it holds
)

// A Resolver asks DNS servers. It may be used concurrently.
type Resolver struct {
	servers  []string
	udp, tcp dns.Client
}

// NewResolver returns a Resolver that asks this server, host:port or host, or
// those that resolv.conf names now if server is empty.
func NewResolver(server string) (*Resolver, error) {
	r := &Resolver{udp: dns.Client{Net: "udp", Timeout: attemptTimeout}, tcp: dns.Client{Net: "tcp", Timeout: attemptTimeout}}
	if server != "" {
		if _, _, err := net.SplitHostPort(server); err != nil {
			server = net.JoinHostPort(strings.Trim(server, "[]"), "53")
		}
		r.servers = []string{server}
		return r, nil
	}
	c, err := dns.ClientConfigFromFile("/etc/resolv.conf")
	if err != nil {
		return nil, err
	}
	for _, s := range c.Servers {
		r.servers = append(r.servers, net.JoinHostPort(s, c.Port))
	}
	if len(r.servers) == 0 {
		return nil, errors.New("/etc/resolv.conf: no nameserver")
	}
	return r, nil
}

// lookup returns the addresses that a name has, none if there is no such name,
// and how long that holds.
func (r *Resolver) lookup(ctx context.Context, name string) (addrs []netip.Addr, ttl time.Duration, err error) {
	for _, server := range r.servers {
		var more error
		if addrs, ttl, more = r.ask(ctx, server, name); more == nil {
			return addrs, ttl, nil
		}
		err = errors.Join(err, fmt.Errorf("server %s: %w", server, more))
	}
	return nil, 0, err
}

func (r *Resolver) ask(ctx context.Context, server, name string) ([]netip.Addr, time.Duration, error) {
	q := new(dns.Msg).SetQuestion(name, dns.TypeA)
	m, _, err := r.udp.ExchangeContext(ctx, q, server)
	if err == nil && m.Truncated {
		m, _, err = r.tcp.ExchangeContext(ctx, q, server)
	}
	switch {
	case err != nil:
		return nil, 0, err
	case !m.Response || len(m.Question) != 1 || !strings.EqualFold(m.Question[0].Name, name) || m.Question[0].Qtype != dns.TypeA:
		return nil, 0, errors.New("answer to another question")
	case m.Truncated:
		return nil, 0, errors.New("answer cut even over TCP")
	case m.Rcode == dns.RcodeNameError:
		return nil, negativeTTL(m), nil
	case m.Rcode != dns.RcodeSuccess:
		return nil, 0, fmt.Errorf("answer %s", dns.RcodeToString[m.Rcode])
	}
	addrs, ttl := records(m, name)
	if len(addrs) == 0 {
		return nil, negativeTTL(m), nil
	}
	return addrs, ttl, nil
}

// records returns the addresses that m has for name, directly or by aliases,
// and the shortest time that one of the records holds.
func records(m *dns.Msg, name string) (addrs []netip.Addr, ttl time.Duration) {
	least := ^uint32(0)
	for _, rr := range m.Answer {
		if !strings.EqualFold(rr.Header().Name, name) {
			continue
		}
		switch rr := rr.(type) {
		case *dns.CNAME:
			name = rr.Target
		case *dns.A:
			addr, _ := netip.AddrFromSlice(rr.A) // an invalid one is none of a list's
			addrs = append(addrs, addr.Unmap())
		default:
			continue
		}
		least = min(least, rr.Header().Ttl)
	}
	return addrs, time.Duration(least) * time.Second
}

// negativeTTL returns how long it holds that there is nothing (RFC 2308,
// section 5).
func negativeTTL(m *dns.Msg) time.Duration {
	for _, rr := range m.Ns {
		if soa, ok := rr.(*dns.SOA); ok {
			return time.Duration(min(soa.Hdr.Ttl, soa.Minttl)) * time.Second
		}
	}
	return noTTL
}
