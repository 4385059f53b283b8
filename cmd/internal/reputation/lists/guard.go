package lists

import (
	"errors"
	"fmt"
	"net/netip"
)

// Reason is why a list was refused, in one word for metrics.
type Reason string

const (
	Unreadable Reason = "unreadable" // the file or the URL
	Malformed  Reason = "malformed"  // in no format that is known, or with too many bad lines
	Empty      Reason = "empty"      // without as much as a comment
	Cut        Reason = "cut"        // its end seems to be missing
	Wide       Reason = "wide"       // it has a prefix that no feed has by intention
	Shrunk     Reason = "shrunk"     // it has less than half the entries that it had
	Changing   Reason = "changing"   // it was being written
)

// Reasons are all that there are.
var Reasons = []Reason{Unreadable, Malformed, Empty, Cut, Wide, Shrunk, Changing}

// refusal is the error of a list that did not come into force.
type refusal struct {
	reason Reason
	error
}

func (r *refusal) Unwrap() error { return r.error }

func refuse(reason Reason, err error) error { return &refusal{reason, err} }

// reasonOf returns why err kept a list from coming into force.
func reasonOf(err error) Reason {
	var r *refusal
	if errors.As(err, &r) {
		return r.reason
	}
	return Unreadable
}

// privateRanges are often on block lists as bogons, and often where clients come from.
var privateRanges = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"),
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("::1/128"),
	netip.MustParsePrefix("fc00::/7"),
}

var (
	unicast4 = netip.MustParsePrefix("224.0.0.0/3") // multicast and reserved: no client is beyond here
	unicast6 = netip.MustParsePrefix("2000::/3")    // all that clients have
)

const (
	narrow4, narrow6 = 8, 16 // lengths of the shortest prefixes that feeds have
	small            = 10    // entries of a list that may shrink as it likes
	hint             = "want one a line of: an address, a prefix, a range a-b, a netmask a/m or a m, ip:port, NAME:a-b, " +
		"ipset save, nginx's deny, DShield, Tor's exit-addresses; or CSV with titles, or JSON; comments behind # ; // !"
)

// isWide reports whether a prefix has so many of the addresses that clients have
// that it can hardly be meant. FireHOL's level1 has 224.0.0.0/3, where none are.
func isWide(p netip.Prefix) bool {
	if p.Addr().Is4() {
		return p.Bits() < narrow4 && !(p.Bits() >= unicast4.Bits() && unicast4.Contains(p.Addr()))
	}
	return p.Bits() < narrow6 && p.Overlaps(unicast6)
}

// judge decides whether what has been read may come into force at all.
func (p *parser) judge() error {
	if p.blank {
		return refuse(Empty, fmt.Errorf("%s: empty; a list of nothing has a comment", p.name))
	}
	if p.cut = p.findCut(); p.cut != nil && p.Accept&AcceptCut == 0 {
		return refuse(Cut, fmt.Errorf("%w; accept=cut takes it nevertheless", p.cut))
	}
	if n := p.bad + p.lines; p.bad*100 > n {
		return refuse(Malformed, fmt.Errorf("%s: %d of %d lines are bad, the first: %w (%s)", p.name, p.bad, n, p.errs[0], hint))
	}
	if p.Field != "" && p.titles == nil && p.json.have == 0 && p.lines > 0 {
		return refuse(Malformed, fmt.Errorf("%s: field=%s: only CSV with titles and JSON have fields", p.name, p.Field))
	}
	if p.wide != nil && p.Accept&AcceptWide == 0 {
		return refuse(Wide, fmt.Errorf("%w; accept=wide takes it nevertheless", p.wide))
	}
	return nil
}

// findCut returns why the end of the list seems to be missing, or nil.
func (p *parser) findCut() error {
	t := &p.tail
	switch {
	case p.json.said && p.json.have < p.json.want:
		return fmt.Errorf("%s: cut: %d records of the %d that its metadata says", p.name, p.json.have, p.json.want)
	case p.text.said && p.text.have < p.text.want:
		return fmt.Errorf("%s: cut: %d entries of the %d that it says", p.name, p.text.have, p.text.want)
	case p.spamhaus && !p.json.said:
		return fmt.Errorf("%s: cut: the metadata is missing, Spamhaus' last line", p.name)
	case p.ends || p.lines+p.bad < 2:
	case t.bad:
		return fmt.Errorf("%s:%d: cut: the last line has no end and is bad", p.name, p.line)
	// What is left of a prefix length is at most /3, or /12 in IPv6.
	case t.entries == 1 && t.wide && (t.is4 && t.bits <= 3 && t.bits < t.least4 || !t.is4 && t.bits <= 12 && t.bits < t.least6):
		return fmt.Errorf("%s:%d: cut: the last line has no end and is /%d, shorter than all before", p.name, p.line, t.bits)
	}
	return nil
}

// hasShrunk reports whether a list lost more than half of its entries since it
// last came into force. One that is empty by intention is no loss.
func (c *content) hasShrunk(before int) bool {
	return before >= small && c.set.len()*2 < before && c.lines > 0
}

func (c *content) shrunk(f File, shown string, before int) error {
	if !c.hasShrunk(before) || f.Accept&AcceptShrunk != 0 {
		return nil
	}
	return refuse(Shrunk, fmt.Errorf("%s: %d entries, less than half of the %d in force; accept=shrunk takes it nevertheless",
		shown, c.set.len(), before))
}
