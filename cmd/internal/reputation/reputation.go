// Package reputation judges addresses by any number of sources: lists, the
// decisions of CrowdSec, DNS block lists, countries, networks.
//
// Sources combine by one rule: the worst score wins, and an allow list beats
// all. A source that has no answer within the budget is left out and named in
// the verdict, so that whoever reads the verdict knows what it does not rest on.
package reputation

import (
	"context"
	"net/netip"
	"time"
)

// BestScore is the score of addresses that no source lists, and of those that
// are allowed. The worst is 0.
const BestScore = 100

// A Subject is an address, and where it belongs as far as a Locator knows.
type Subject struct {
	Addr    netip.Addr // unmapped and without a zone
	Country string     // ISO 3166-1 alpha-2, such as CH
	ASN     uint32     // number of the autonomous system; 0 if unknown
	Org     string     // who runs that system
}

// State is what a source has to say of an address.
type State uint8

// The states of a Finding. A source that is down says Unknown, and one that is
// still waiting for its answer says Pending.
const (
	NotListed State = iota
	Listed
	Allowed
	Unknown
	Pending
)

var stateNames = [...]string{"unlisted", "listed", "allowed", "unknown", "pending"}

// String returns the state in words.
func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return "no such state"
}

// A Finding is what one source says of a Subject.
type Finding struct {
	Source   string // the source's name
	State    State
	Score    uint8  // from 0 to BestScore, if listed
	Reason   string // for people, if listed or allowed; it names the source
	Decision string // what the source wants done, such as ban or captcha, if it says so
}

// A Source judges subjects. Its methods may be called concurrently.
type Source interface {
	// Judge returns at once if the answer is at hand. Otherwise it begins to look
	// for one, which it does whatever becomes of ctx, and returns Pending when ctx
	// ends first. An answer at hand costs no allocation.
	//
	// Only an answer at hand may be Allowed.
	Judge(ctx context.Context, s Subject) Finding
}

// An Excluder is a Source that can rule out, for less than it takes to judge, that
// it has anything to say of most addresses.
type Excluder interface {
	Source
	// Excludes reports whether Judge would return NotListed for each subject with
	// this address, which is unmapped and without a zone. It may be false although
	// that is so. It does not allocate.
	Excludes(addr netip.Addr) bool
}

// A Locator knows where addresses belong.
type Locator interface {
	// Locate returns s with those of its empty fields set that the Locator knows.
	// It does not allocate.
	Locate(s Subject) Subject
}

// A Reporter is a Source or Locator that can say how it is.
type Reporter interface {
	Status() Status
}

// Status describes a source for its operator.
type Status struct {
	Name    string
	Kind    string    // such as crowdsec or dnsbl
	Entries int       // what the source holds now: decisions, answers, networks
	Updated time.Time // when it last learned something; zero if never
	Problem string    // why it cannot be relied upon; empty if it can
}
