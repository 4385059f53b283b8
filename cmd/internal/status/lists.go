package status

import (
	"fmt"
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
	return fmt.Sprintf("checked %s, last status %d, next in %s", ago(now, s.Checked), s.Status, short(s.Next.Sub(now)))
}

// lookupPage is an explanation for people.
type lookupPage struct {
	*explanation
	Matches []match
}

type match struct {
	lists.Match
	LoadedAgo, ModifiedAgo string
}

func newLookupPage(e *explanation, now time.Time) *lookupPage {
	p := &lookupPage{explanation: e}
	for _, m := range e.Lists {
		p.Matches = append(p.Matches, match{m, ago(now, m.Loaded), ago(now, m.Modified)})
	}
	return p
}
