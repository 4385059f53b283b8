package status

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/spoa-go/spoa"
	"github.com/spoa-go/spoa/cmd/internal/reputation"
)

// listing is a source that finds one address.
type listing struct {
	status reputation.Status
	state  reputation.State
}

func (l listing) Judge(_ context.Context, s reputation.Subject) reputation.Finding {
	if s.Addr.String() != "203.0.113.1" {
		return reputation.Finding{Source: l.status.Name}
	}
	return reputation.Finding{Source: l.status.Name, State: l.state, Score: 7, Reason: l.status.Name + " <b>", Decision: "ban"}
}

func (l listing) Status() reputation.Status { return l.status }

func sourcesHandler(t *testing.T) http.Handler {
	t.Helper()
	updated := time.Now().Add(-90 * time.Second)
	sources, err := reputation.Combine(0, nil, []reputation.Source{
		listing{reputation.Status{Name: "cs", Kind: "crowdsec", Entries: 1234, Updated: updated}, reputation.Listed},
		listing{reputation.Status{Name: "bl.example", Kind: "dnsbl", Problem: "<gone>"}, reputation.Unknown},
		listing{reputation.Status{Name: "cs", Kind: "crowdsec"}, reputation.NotListed}, // of the same name
	})
	if err != nil {
		t.Fatal(err)
	}
	st := New(Config{Conns: func() []spoa.ConnInfo { return nil }, Sources: sources})
	for range 3 {
		v := sources.Judge(t.Context(), netip.MustParseAddr("203.0.113.1"))
		st.Judged(v.Source, v.State == reputation.Listed)
	}
	st.Judged("", false)
	st.WouldDeny()
	return st.handler()
}

func body(t *testing.T, h http.Handler, path string, code int) string {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("GET", path, nil))
	if w.Code != code {
		t.Errorf("%s: want %d, have %d, %s", path, code, w.Code, w.Body)
	}
	return w.Body.String()
}

func TestSourceMetrics(t *testing.T) {
	h := sourcesHandler(t)
	have := body(t, h, "/metrics", 200)
	for _, want := range []string{
		`spoa_source_entries{kind="crowdsec",source="cs"} 1234`,
		`spoa_source_up{kind="crowdsec",source="cs"} 1`,
		`spoa_source_up{kind="dnsbl",source="bl.example"} 0`,
		`spoa_source_listed_total{kind="crowdsec",source="cs"} 3`,
		`spoa_source_missing_total{kind="dnsbl",source="bl.example"} 3`,
		`spoa_verdicts_total{list="cs",verdict="listed"} 3`,
		`spoa_verdicts_total{list="",verdict="unlisted"} 1`,
		`spoa_monitor_denied_total 1`,
	} {
		if !strings.Contains(have, want+"\n") {
			t.Errorf("want %s, have\n%s", want, have)
		}
	}
	if strings.Contains(have, `spoa_source_updated_timestamp_seconds{kind="dnsbl"`) {
		t.Error("a source that never learned anything has a time when it did")
	}
}

func TestSourcePage(t *testing.T) {
	h := sourcesHandler(t)
	have := body(t, h, "/", 200)
	for _, want := range []string{"Other sources", ">cs<", "1m30s ago", "&lt;gone&gt;", ">never<", "only to see what happens: 1."} {
		if !strings.Contains(have, want) {
			t.Errorf("want %s, have\n%s", want, have)
		}
	}
	if strings.Contains(have, "scores are random") {
		t.Error("scores are random, and there are sources")
	}
}

func TestSourcesLookup(t *testing.T) {
	h := sourcesHandler(t)
	for _, path := range []string{"/lookup", "/lookup?ip=", "/lookup?ip=x", "/lookup?ip=192.0.2.0/24"} {
		body(t, h, path, 400)
	}
	var have explanation
	if err := json.Unmarshal([]byte(body(t, h, "/lookup?ip=::ffff:203.0.113.1", 200)), &have); err != nil {
		t.Fatal(err)
	}
	if have.Addr != netip.MustParseAddr("203.0.113.1") || have.State != "listed" || have.Score != 7 || have.Reason != "cs <b>" || have.Decision != "ban" || have.Missing != "bl.example" {
		t.Errorf("have %+v", have)
	}
	if have.Lists == nil {
		t.Error("lists: want none as [], have null")
	}
	if len(have.Sources) != 3 || have.Sources[0].Source != "cs" || *have.Sources[0].Score != 7 || have.Sources[1].State != "unknown" || have.Sources[1].Score != nil {
		t.Errorf("sources: have %+v", have.Sources)
	}
	if err := json.Unmarshal([]byte(body(t, h, "/lookup?ip=192.0.2.1", 200)), &have); err != nil {
		t.Fatal(err)
	}
	if have.State != "unlisted" || have.Score != 100 {
		t.Errorf("want unlisted, 100, have %+v", have)
	}
}
