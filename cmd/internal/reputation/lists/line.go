package lists

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
)

// record is what a line, or an object of JSON, says.
type record struct {
	prefix netip.Prefix // invalid if it names none
	last   netip.Addr   // the end of a range that begins with prefix; invalid if it is none
	all    bool         // all addresses, by that word
	number []byte       // the number behind the address, if there is one
	aside  bool         // the format says that this number is no score
	note   []byte       // what the line says of the address
}

var (
	errNoAddress   = errors.New("no address")
	errTwo         = errors.New("two addresses on a line: want one, or a range a-b, or a netmask")
	errLeadingZero = errors.New("an octet has a leading zero, which could be decimal or octal")
)

// cutComment cuts what follows one of the marks # and ;, or // behind a space.
func cutComment(line []byte) (body, comment []byte) {
	i := bytes.IndexAny(line, "#;")
	if j := bytes.Index(line, []byte(" //")); j >= 0 && (i < 0 || j < i) {
		i = j
	}
	if i < 0 {
		return line, nil
	}
	return bytes.TrimSpace(line[:i]), bytes.Trim(line[i:], "#;/ \t\r\n")
}

// isComment reports whether a line, which has no space before it, is a comment.
func isComment(line []byte) bool {
	return line[0] == '#' || line[0] == ';' || line[0] == '!' || bytes.HasPrefix(line, []byte("//"))
}

// parseLine parses a line of text that is not empty and no comment. The record
// holds parts of line. Ignore says that nothing behind an address counts.
func parseLine(line []byte, allow, ignore bool) (record, error) {
	body, comment := cutComment(line)
	word, rest := cutField(body)
	var rec record
	var err error
	switch string(word) {
	case "add":
		return parseIPSet(line)
	case "create", "flush", "destroy", "swap", "COMMIT": // of ipset
		return rec, nil
	case "ExitNode", "Published", "LastStatus": // of Tor's exit-addresses
		return rec, nil
	case "ExitAddress":
		word, _ = cutField(rest)
		rec.prefix, err = parsePrefix(word)
		return rec, err
	case "deny", "allow":
		rec, err = parseNginx(word, rest, allow)
	case "Start": // the line of titles of DShield
		if next, _ := cutField(rest); string(next) == "End" {
			return rec, nil
		}
		fallthrough
	default:
		rec, err = parseColumns(body, ignore)
		if err != nil && len(comment) > 0 { // the name before a range may have any byte
			if r, e := parseP2P(line); e == nil {
				return r, nil
			}
		}
	}
	if len(rec.note) == 0 {
		rec.note = comment
	}
	return rec, err
}

// cutField cuts the first field, which ends before a space, a tab or a comma.
func cutField(s []byte) (field, rest []byte) {
	i := bytes.IndexAny(s, " \t,")
	if i < 0 {
		return s, nil
	}
	rest = bytes.TrimLeft(s[i:], " \t")
	if len(rest) > 0 && rest[0] == ',' {
		rest = bytes.TrimLeft(rest[1:], " \t")
	}
	return s[:i], rest
}

// parseColumns parses an address, prefix or range and what is behind it.
func parseColumns(body []byte, ignore bool) (record, error) {
	var rec record
	if i := bytes.IndexByte(body, '-'); i > 0 {
		if from, err := parseAddr(bytes.TrimSpace(body[:i])); err == nil {
			to, rest := cutField(bytes.TrimLeft(body[i+1:], " \t"))
			if rec, err = parseRange(from, to); err != nil {
				return rec, err
			}
			return rec, rec.columns(rest, ignore)
		}
		if rec, err := parseP2P(body); err == nil {
			return rec, nil
		}
	}
	field, rest := cutField(body)
	prefix, err := parsePrefix(field)
	if err != nil || len(rest) == 0 {
		return record{prefix: prefix}, err
	}
	rec.prefix = prefix
	second, more := cutField(rest)
	if bits, ok := parseMask(second); ok && prefix.IsSingleIP() && prefix.Addr().Is4() {
		rec.prefix, err = prefix.Addr().Prefix(bits)
		return rec, errors.Join(err, rec.columns(more, ignore))
	}
	if to, err := parseAddr(second); err == nil {
		return parseDShield(prefix.Addr(), to, more)
	}
	return rec, rec.columns(rest, ignore)
}

// columns takes a number behind an address, and refuses what else is there,
// unless that does not count.
func (r *record) columns(rest []byte, ignore bool) error {
	if len(rest) == 0 {
		return nil
	}
	second, _ := cutField(rest)
	if isNumber(second) {
		r.number = second
		return nil
	}
	if _, err := parsePrefix(second); err == nil {
		return errTwo
	}
	if ignore {
		return nil
	}
	return fmt.Errorf("%.60q behind the address: want nothing, a number, a netmask or a comment behind #; column=ignore leaves it out", rest)
}

func isNumber(s []byte) bool {
	digits := true
	for _, c := range s {
		digits = digits && '0' <= c && c <= '9'
	}
	if digits || len(s) > 40 {
		return digits && len(s) > 0
	}
	_, err := strconv.ParseFloat(string(s), 64)
	return err == nil
}

func parseRange(from netip.Addr, to []byte) (record, error) {
	last, err := parseAddr(to)
	switch {
	case err != nil:
		return record{}, fmt.Errorf("the end of a range: %w", err)
	case from.BitLen() != last.BitLen():
		return record{}, errors.New("a range from one address family to the other")
	case last.Less(from):
		return record{}, fmt.Errorf("a range whose end %v is before its start %v", last, from)
	}
	return record{prefix: netip.PrefixFrom(from, from.BitLen()), last: last}, nil
}

// parseP2P parses a line of the P2P format, NAME:FIRST-LAST.
func parseP2P(line []byte) (record, error) {
	i := bytes.LastIndexByte(line, '-')
	if i < 0 {
		return record{}, errNoAddress
	}
	colon := bytes.LastIndexByte(line[:i], ':')
	if colon < 0 {
		return record{}, errNoAddress
	}
	from, err := parseAddr(bytes.TrimSpace(line[colon+1 : i]))
	if err != nil {
		return record{}, err
	}
	rec, err := parseRange(from, bytes.TrimSpace(line[i+1:]))
	rec.note = bytes.TrimSpace(line[:colon])
	return rec, err
}

// parseDShield parses the start, end, length, attacks and name of a network.
// The first three vouch for each other.
func parseDShield(from, to netip.Addr, rest []byte) (record, error) {
	length, rest := cutField(rest)
	bits, err := strconv.Atoi(string(length))
	if err != nil {
		return record{}, errTwo
	}
	p, err := from.Prefix(bits)
	if err != nil || p.Addr() != from || toU128(from).or(ones(from.BitLen()-bits)) != toU128(to) {
		return record{}, fmt.Errorf("start %v, end %v and length %.20s are not one network", from, to, length)
	}
	rec := record{prefix: p}
	attacks, rest := cutField(rest)
	if isNumber(attacks) {
		rec.number, rec.aside = attacks, true
		name, _, _ := bytes.Cut(rest, []byte("\t"))
		rec.note = bytes.TrimSpace(name)
	}
	return rec, nil
}

// parseIPSet parses a line "add SET ENTRY [options]" of ipset save.
func parseIPSet(line []byte) (record, error) {
	_, rest := cutField(line)
	_, rest = cutField(rest)
	end := bytes.IndexAny(rest, " \t")
	if end < 0 {
		end = len(rest)
	}
	entry, options := rest[:end], rest[end:]
	entry, _, _ = bytes.Cut(entry, []byte(",")) // a port or another address may follow
	var quoted []byte
	if before, after, ok := bytes.Cut(options, []byte(` comment "`)); ok {
		options = before
		quoted, _, _ = bytes.Cut(after, []byte(`"`))
	}
	if bytes.Contains(options, []byte(" nomatch")) {
		return record{}, errors.New("an exception (nomatch): want it on an allow list")
	}
	rec, err := parseEntry(entry)
	rec.note = quoted
	return rec, err
}

// parseEntry parses an address, a prefix or a range without spaces.
func parseEntry(s []byte) (record, error) {
	if from, to, ok := bytes.Cut(s, []byte("-")); ok {
		if first, err := parseAddr(bytes.TrimSpace(from)); err == nil {
			return parseRange(first, bytes.TrimSpace(to))
		}
	}
	p, err := parsePrefix(s)
	return record{prefix: p}, err
}

// parseNginx parses the address of "deny X" or "allow X". What closes such a list
// says nothing: "allow all" behind denials, "deny all" behind permissions.
func parseNginx(verb, rest []byte, allow bool) (record, error) {
	same := allow == (string(verb) == "allow")
	switch {
	case string(rest) == "all" && same:
		return record{all: true}, nil
	case string(rest) == "all":
		return record{}, nil
	case same:
		p, err := parsePrefix(rest)
		return record{prefix: p}, err
	case allow:
		return record{}, errors.New("deny on an allow list")
	}
	return record{}, errors.New("allow on a block list: want it on an allow list")
}

func parseAddr(s []byte) (netip.Addr, error) {
	p, err := parsePrefix(s)
	if err == nil && bytes.IndexByte(s, '/') >= 0 {
		err = fmt.Errorf("%.60q is a prefix, want an address", s)
	}
	return p.Addr(), err
}

// parsePrefix parses an address or a prefix, whose length may be a netmask. Host
// bits may be set, and a port may stand behind an address. Addresses embedded in
// IPv6 count as IPv4.
func parsePrefix(s []byte) (netip.Prefix, error) {
	if p, ok := parsePrefix4(s); ok {
		return p, nil
	}
	if p, ok := parsePrefix6(s); ok {
		return p, nil
	}
	if addr, mask, ok := bytes.Cut(s, []byte("/")); ok && bytes.IndexByte(mask, '.') >= 0 {
		p, ok := parsePrefix4(addr)
		bits, contiguous := parseMask(mask)
		if !ok || !contiguous {
			return netip.Prefix{}, fmt.Errorf("%.60q: want a netmask such as 255.255.255.0", s)
		}
		return p.Addr().Prefix(bits)
	}
	p, err := parseOther(string(s[:min(len(s), 80)]))
	if err != nil {
		if hasLeadingZero(s) {
			return netip.Prefix{}, fmt.Errorf("%.60q: %w", s, errLeadingZero)
		}
		return netip.Prefix{}, err
	}
	if addr := p.Addr(); addr.Is4In6() {
		if p.Bits() < 96 {
			return netip.Prefix{}, fmt.Errorf("%.60q embeds an IPv4 address but is shorter than /96", s)
		}
		p = netip.PrefixFrom(addr.Unmap(), p.Bits()-96)
	}
	return p.Masked(), nil
}

// parseOther parses what parsePrefix4 and parsePrefix6 leave.
func parseOther(s string) (p netip.Prefix, err error) {
	var addr netip.Addr
	n := len(s)
	switch colon := bytes.IndexByte([]byte(s), ':'); {
	case n > 0 && s[0] == '[' && s[n-1] == ']':
		addr, err = netip.ParseAddr(s[1 : n-1])
	case n > 0 && s[0] == '[' || colon > 0 && bytes.Count([]byte(s), []byte(":")) == 1:
		var port netip.AddrPort
		port, err = netip.ParseAddrPort(s)
		addr = port.Addr()
	case bytes.IndexByte([]byte(s), '/') >= 0:
		if p, err = netip.ParsePrefix(s); err == nil {
			return p, nil
		}
	default:
		addr, err = netip.ParseAddr(s)
	}
	switch {
	case err != nil:
		return p, fmt.Errorf("%.60q is neither an address nor a prefix", s)
	case addr.Zone() != "":
		return p, fmt.Errorf("%.60q has a zone", s)
	}
	return netip.PrefixFrom(addr, addr.BitLen()), nil
}

// parsePrefix4 parses the most frequent form, an IPv4 address or prefix, without
// an allocation.
func parsePrefix4(s []byte) (netip.Prefix, bool) {
	var b [4]byte
	bits, rest, ok := 32, s, true
	for i := range b {
		if i > 0 {
			if len(rest) == 0 || rest[0] != '.' {
				return netip.Prefix{}, false
			}
			rest = rest[1:]
		}
		var n int
		if n, rest, ok = parseSmall(rest, 255); !ok {
			return netip.Prefix{}, false
		}
		b[i] = byte(n)
	}
	if len(rest) > 0 && rest[0] == '/' {
		if bits, rest, ok = parseSmall(rest[1:], 32); !ok {
			return netip.Prefix{}, false
		}
	}
	return netip.PrefixFrom(netip.AddrFrom4(b), bits).Masked(), len(rest) == 0
}

// parsePrefix6 parses an IPv6 address in groups of hexadecimal digits, alone or
// with a prefix length, without the string that netip needs. One that embeds an
// IPv4 address is left to parseOther.
func parsePrefix6(s []byte) (netip.Prefix, bool) {
	text, length, hasLength := bytes.Cut(s, []byte("/"))
	bits, rest, ok := 128, length, true
	if hasLength {
		bits, rest, ok = parseSmall(length, 128)
	}
	b, valid := parseGroups(text)
	addr := netip.AddrFrom16(b)
	return netip.PrefixFrom(addr, bits).Masked(), ok && valid && len(rest) == 0 && !addr.Is4In6()
}

// parseGroups parses the groups of an IPv6 address, of which :: stands for one or
// more that are zero.
func parseGroups(s []byte) (b [16]byte, ok bool) {
	n, gap := 0, -1 // bytes written, and those before ::
	if s, ok = bytes.CutPrefix(s, []byte("::")); ok {
		gap = 0
	}
	for len(s) > 0 && n < len(b) {
		group, digits := 0, 0
		for ; digits < min(len(s), 5); digits++ {
			d := unhex(s[digits])
			if d < 0 {
				break
			}
			group = group<<4 | d
		}
		if digits == 0 || digits > 4 {
			return b, false
		}
		b[n], b[n+1] = byte(group>>8), byte(group)
		n, s = n+2, s[digits:]
		switch {
		case len(s) == 0:
		case gap < 0 && bytes.HasPrefix(s, []byte("::")):
			gap, s = n, s[2:]
		case s[0] == ':' && len(s) > 1:
			s = s[1:]
		default:
			return b, false
		}
	}
	if len(s) > 0 || (n == len(b)) == (gap >= 0) {
		return b, false
	}
	if gap >= 0 {
		copy(b[len(b)-n+gap:], b[gap:n])
		clear(b[gap : len(b)-n+gap])
	}
	return b, true
}

func unhex(c byte) int {
	switch {
	case '0' <= c && c <= '9':
		return int(c - '0')
	case 'a' <= c|0x20 && c|0x20 <= 'f':
		return int(c|0x20-'a') + 10
	}
	return -1
}

// parseSmall parses up to three digits without a leading zero.
func parseSmall(s []byte, most int) (n int, rest []byte, ok bool) {
	i := 0
	for ; i < len(s) && i < 3 && '0' <= s[i] && s[i] <= '9'; i++ {
		n = n*10 + int(s[i]-'0')
	}
	return n, s[i:], i > 0 && n <= most && (s[0] != '0' || i == 1)
}

// parseMask parses a netmask of at least 8 bits. A shorter one could as well be
// an address.
func parseMask(s []byte) (bits int, ok bool) {
	p, ok := parsePrefix4(s)
	if !ok || !p.IsSingleIP() || !bytes.HasPrefix(s, []byte("255.")) {
		return 0, false
	}
	inverse := ^uint32(toU128(p.Addr()).lo)
	for bits = 32; inverse&1 == 1; bits-- {
		inverse >>= 1
	}
	return bits, inverse == 0
}

// hasLeadingZero reports whether s would be an IPv4 address if its octets had no
// zeros before them.
func hasLeadingZero(s []byte) bool {
	octets := bytes.Split(s, []byte("."))
	for _, o := range octets {
		if n, err := strconv.ParseUint(string(o), 10, 8); err != nil || n > 255 {
			return false
		}
	}
	return len(octets) == 4
}
