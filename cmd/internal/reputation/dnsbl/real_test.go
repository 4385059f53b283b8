package dnsbl

import (
	"testing"

	"github.com/spoa-go/spoa/cmd/internal/reputation"
	"github.com/spoa-go/spoa/cmd/internal/reputation/dnsbl/dnsbltest"
)

func TestRealServer(t *testing.T) {
	server := dnsbltest.Start(t, zone, "203.0.113.9 :4:exploits", "198.51.100.0/24 :10:policy", "2001:db8::/32 :3:spam")
	f := &fake{addr: server.Addr}
	s := f.source(t, zone+"=2:0/3:10/4:20/10:60")
	if err := s.Test(); err != nil {
		t.Error(err)
	}
	for addr, want := range map[string]reputation.Finding{
		"203.0.113.9":  {State: reputation.Listed, Score: 20, Reason: "dnsbl bl.example: 127.0.0.4"},
		"198.51.100.7": {State: reputation.Listed, Score: 60, Reason: "dnsbl bl.example: 127.0.0.10"},
		"2001:db8::7":  {State: reputation.Listed, Score: 10, Reason: "dnsbl bl.example: 127.0.0.3"},
		"203.0.113.10": {},
		"2001:db9::7":  {},
	} {
		want.Source = zone
		if have := judge(t, s, addr); have != want {
			t.Errorf("%s: want %+v, have %+v", addr, want, have)
		}
	}
	server.Stop(t)
	wantState(t, atOnce(s, "203.0.113.9"), reputation.Listed) // from the cache
	wantState(t, judge(t, s, "203.0.113.11"), reputation.Unknown)
}
