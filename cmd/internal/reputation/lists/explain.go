package lists

import (
	"net/netip"
	"time"
)

// Match says what one list says of an address.
type Match struct {
	List     string       `json:"list"`
	File     string       `json:"file"` // path, or URL without its user and query
	Allow    bool         `json:"allow"`
	Prefix   netip.Prefix `json:"prefix"` // the longest of the list that contains the address
	Score    uint8        `json:"score"`
	Note     string       `json:"note,omitempty"` // what the line says of it, such as a number of Spamhaus
	Loaded   time.Time    `json:"loaded"`         // when the list was read
	Modified time.Time    `json:"modified"`       // when it was last changed
	Decided  bool         `json:"decided"`        // whether the verdict is this list's
}

// Explain returns what each list that has addr says of it, in the order of the
// flags, allow lists last. It is for people: it takes longer than Lookup, and
// allocates.
func (l *Lists) Explain(addr netip.Addr) (matches []Match) {
	addr = addr.Unmap().WithZone("")
	decided := -1
	for _, s := range *l.sources.Load() {
		set, stats := s.set.Load(), s.stats.Load()
		if set == nil {
			continue
		}
		e, ok := set.longest(addr)
		if !ok {
			continue
		}
		matches = append(matches, Match{
			List: s.name, File: s.shown, Allow: s.allow, Prefix: e.prefix, Score: e.score, Note: set.notes.get(e.note),
			Loaded: stats.Loaded, Modified: stats.Modified,
		})
		m, i := &matches[len(matches)-1], len(matches)-1
		switch {
		case decided < 0, m.Allow && !matches[decided].Allow:
			decided = i
		case !matches[decided].Allow && m.Score < matches[decided].Score:
			decided = i
		}
	}
	if decided >= 0 {
		matches[decided].Decided = true
	}
	return matches
}
