package dnsbl

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/miekg/dns"
	"github.com/spoa-go/spoa/cmd/internal/reputation"
)

// A Zone is a block list and what its answers are worth.
type Zone struct {
	Name  string // such as zen.spamhaus.org, in lower case
	Score uint8  // of all answers, if there are no Codes
	Codes []Code // the answers that count; others do not
}

// A Code is a range of answers with one score.
type Code struct {
	First, Last netip.Addr
	Score       uint8
}

// Zones is a flag.Value of ZONE, ZONE=SCORE or ZONE=CODE:SCORE/CODE:SCORE.
type Zones []Zone

// String returns the names of the zones.
func (z *Zones) String() string {
	var names []string
	for _, zone := range *z {
		names = append(names, zone.Name)
	}
	return strings.Join(names, ",")
}

// Set adds a zone.
func (z *Zones) Set(text string) error {
	zone, err := ParseZone(text)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(*z, func(other Zone) bool { return other.Name == zone.Name }) {
		return fmt.Errorf("%s is given twice", zone.Name)
	}
	*z = append(*z, zone)
	return nil
}

// ParseZone parses ZONE, which gives all answers the score 0, ZONE=SCORE, or
// ZONE=CODE:SCORE/CODE:SCORE and so on, where a code is an answer's address, a
// number N that stands for 127.0.0.N, or a range of these, such as 4-7.
func ParseZone(text string) (Zone, error) {
	name, worth, has := strings.Cut(text, "=")
	zone := Zone{Name: strings.ToLower(strings.TrimSuffix(name, "."))}
	// The longest name in front of a zone is that of an IPv6 address.
	_, ok := dns.IsDomainName(strings.Repeat("0.", 32) + zone.Name)
	if !ok || zone.Name == "" || strings.ContainsAny(zone.Name, " \t/:\\") {
		return zone, fmt.Errorf("%.80q is no name of a zone", name)
	}
	if !has {
		return zone, nil
	}
	var err error
	if !strings.Contains(worth, ":") {
		zone.Score, err = parseScore(worth)
		return zone, err
	}
	for part := range strings.SplitSeq(worth, "/") {
		code, err := parseCode(part)
		if err != nil {
			return zone, err
		}
		zone.Codes = append(zone.Codes, code)
	}
	return zone, nil
}

func parseScore(s string) (uint8, error) {
	n, err := strconv.ParseUint(s, 10, 8)
	if err != nil || n > reputation.BestScore {
		return 0, fmt.Errorf("%.20q: want a score from 0 to %d", s, reputation.BestScore)
	}
	return uint8(n), nil
}

func parseCode(s string) (c Code, err error) {
	codes, score, ok := strings.Cut(s, ":")
	if !ok {
		return c, fmt.Errorf("%.40q: want CODE:SCORE", s)
	}
	if c.Score, err = parseScore(score); err != nil {
		return c, err
	}
	first, last, ranged := strings.Cut(codes, "-")
	if c.First, err = parseAnswer(first); err != nil {
		return c, err
	}
	if !ranged {
		c.Last = c.First
		return c, nil
	}
	if c.Last, err = parseAnswer(last); err == nil && c.Last.Less(c.First) {
		err = fmt.Errorf("%.40q: the range ends before it begins", codes)
	}
	return c, err
}

var errCode = errors.New("want an address of 127.0.0.0/8, or a number from 0 to 255")

func parseAnswer(s string) (netip.Addr, error) {
	if n, err := strconv.ParseUint(s, 10, 8); err == nil {
		return netip.AddrFrom4([4]byte{127, 0, 0, byte(n)}), nil
	}
	addr, err := netip.ParseAddr(s)
	if err != nil || !answers.Contains(addr) || refusals.Contains(addr) {
		return addr, fmt.Errorf("code %.40q: %w", s, errCode)
	}
	return addr, nil
}

var (
	answers  = netip.MustParsePrefix("127.0.0.0/8")
	refusals = netip.MustParsePrefix("127.255.255.0/24") // to say that one must not ask, or not so often
)

// score returns the worst score of these answers; listed is false if none of
// them counts.
func (z *Zone) score(codes []netip.Addr) (score uint8, code netip.Addr, listed bool) {
	for _, addr := range codes {
		if n, ok := z.worth(addr); ok && (!listed || n < score) {
			score, code, listed = n, addr, true
		}
	}
	return score, code, listed
}

func (z *Zone) worth(addr netip.Addr) (score uint8, ok bool) {
	if z.Codes == nil {
		return z.Score, true
	}
	for _, c := range z.Codes {
		if !addr.Less(c.First) && !c.Last.Less(addr) {
			return c.Score, true
		}
	}
	return 0, false
}

// query returns the name to ask for: the address backwards, in front of the zone.
func (z *Zone) query(addr netip.Addr) string {
	b := make([]byte, 0, 64+len(z.Name)+1)
	if addr.Is4() {
		a := addr.As4()
		for _, n := range slices.Backward(a[:]) {
			b = append(strconv.AppendUint(b, uint64(n), 10), '.')
		}
	} else {
		const digits = "0123456789abcdef"
		a := addr.As16()
		for _, n := range slices.Backward(a[:]) {
			b = append(b, digits[n&15], '.', digits[n>>4], '.')
		}
	}
	return string(append(append(b, z.Name...), '.'))
}
