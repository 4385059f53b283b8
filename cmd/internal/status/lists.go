package status

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spoa-go/spoa/cmd/internal/reputation/lists"
)

var (
	refusedDesc  = listDesc("list_refused_total", "Times that a list was refused, by reason; the previous content stayed in force.", "reason")
	warningsDesc = listDesc("list_warnings", "What is to be known of a list in force; the log and the status page say it.")
	checkedDesc  = listDesc("list_checked_timestamp_seconds", "When the server of a list by URL last answered with it, or that it has not changed.")
	statusDesc   = listDesc("list_http_status", "The last status of HTTP for a list by URL; 0 without an answer.")
	nextDesc     = listDesc("list_next_fetch_timestamp_seconds", "When a list by URL is fetched next.")
)

func collectList(s lists.Stats, labels []string, send func(*prometheus.Desc, prometheus.ValueType, float64, ...string)) {
	for _, reason := range lists.Reasons {
		send(refusedDesc, prometheus.CounterValue, float64(s.Refused[reason]), append(labels[:len(labels):len(labels)], string(reason))...)
	}
	send(warningsDesc, prometheus.GaugeValue, float64(len(s.Warnings)), labels...)
	if s.URL {
		send(checkedDesc, prometheus.GaugeValue, float64(s.Checked.UnixMilli())/1e3, labels...)
		send(statusDesc, prometheus.GaugeValue, float64(s.Status), labels...)
		send(nextDesc, prometheus.GaugeValue, float64(s.Next.UnixMilli())/1e3, labels...)
	}
}

// checked says how the server of a list by URL last answered.
func checked(s lists.Stats, now time.Time) string {
	if !s.URL {
		return ""
	}
	return fmt.Sprintf("checked %s ago, last status %d, next in %s", short(now.Sub(s.Checked)), s.Status, short(s.Next.Sub(now)))
}

// lookup is what all lists say of an address.
type lookup struct {
	IP      netip.Addr `json:"ip"`
	State   string     `json:"state"` // listed, allowed, unlisted
	Score   uint8      `json:"score"`
	List    string     `json:"list,omitempty"` // that decided
	Matches []match    `json:"matches"`
}

type match struct {
	lists.Match
	LoadedAgo   string `json:"-"`
	ModifiedAgo string `json:"-"`
}

// lookup answers why an address scores so, to browsers with the page, to others
// with JSON.
func (st *Status) lookup(w http.ResponseWriter, r *http.Request) {
	addr, err := netip.ParseAddr(strings.TrimSpace(r.FormValue("ip")))
	switch {
	case st.config.Lists == nil:
		http.Error(w, "no lists: scores are random", http.StatusNotFound)
		return
	case err != nil:
		http.Error(w, "want an address, as in /lookup?ip=192.0.2.1", http.StatusBadRequest)
		return
	}
	now := time.Now()
	v := st.config.Lists.Lookup(addr)
	l := &lookup{IP: addr, State: v.State.String(), Score: v.Score, List: v.List, Matches: []match{}}
	for _, m := range st.config.Lists.Explain(addr) {
		l.Matches = append(l.Matches, match{m, short(now.Sub(m.Loaded)), short(now.Sub(m.Modified))})
	}
	if strings.Contains(r.Header.Get("Accept"), "text/html") {
		d := st.pageData(now)
		d.Lookup = l
		d.write(w)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	json.NewEncoder(w).Encode(l) // an error is the client's
}
