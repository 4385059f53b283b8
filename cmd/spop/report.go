package main

import (
	"fmt"
	"maps"
	"math/bits"
	"os"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/HdrHistogram/hdrhistogram-go"
	"golang.org/x/term"
)

// width returns the columns of a terminal, or 0 if the file is none.
func width(f *os.File) int {
	columns, _, err := term.GetSize(int(f.Fd()))
	if err != nil {
		return 0
	}
	return columns
}

// progress shows lines on standard error: one over the other on a terminal.
type progress struct{ terminal, shown bool }

func newProgress() *progress { return &progress{terminal: term.IsTerminal(int(os.Stderr.Fd()))} }

// line shows the parts of a line, on a terminal only as many as fit into it: a
// line that wraps cannot be written over.
func (p *progress) line(parts ...string) {
	if p.terminal {
		fmt.Fprintf(os.Stderr, "\r%s\x1b[K", fitting(parts, width(os.Stderr)-1))
	} else {
		fmt.Fprintln(os.Stderr, fitting(parts, 0))
	}
	p.shown = true
}

// fitting joins as many of the parts as fit into that many columns, all if these
// are 0 or less.
func fitting(parts []string, columns int) string {
	line, used := "", 0
	for i, part := range parts {
		if i > 0 {
			part = "  " + part
		}
		used += utf8.RuneCountInString(part)
		if columns > 0 && used > columns {
			break
		}
		line += part
	}
	return line
}

func (p *progress) end() {
	if p.terminal && p.shown {
		fmt.Fprint(os.Stderr, "\r\x1b[K")
	}
}

// short returns a latency with three digits.
func short(ns int64) time.Duration {
	d := time.Duration(ns)
	for unit := time.Duration(10); unit < d/100; unit *= 10 {
		d = d.Round(unit)
	}
	return d
}

func quantile(h *hdrhistogram.Histogram, q float64) time.Duration { return short(h.ValueAtQuantile(q)) }

// summary prints the results, and returns errReported if not all is well.
func (l *load) summary(took time.Duration) error {
	rate := 0.0
	if took > 0 {
		rate = float64(l.total.TotalCount()) / took.Seconds()
	}
	if l.json {
		if err := l.summaryJSON(took, rate); err != nil {
			return err
		}
	} else {
		l.summaryText(took, rate)
	}
	if p99 := quantile(l.total, 99); l.p99 > 0 && p99 > l.p99 {
		return fmt.Errorf("p99 is %v: want at most %v", p99, l.p99)
	}
	if l.total.TotalCount() == 0 || l.sum.wrong > 0 || l.sum.errors > 0 {
		return errReported
	}
	return nil
}

func (l *load) summaryText(took time.Duration, rate float64) {
	h := l.total
	fmt.Printf("load      %s to %v, connections %d, in flight on each %d", l.message.Name(), &l.addr, l.conns, l.inflight)
	if l.rate > 0 {
		fmt.Printf(", %v/s", l.rate)
	}
	fmt.Printf("\nanswers   %d in %.2fs: %.0f/s\n", h.TotalCount(), took.Seconds(), rate)
	if h.TotalCount() > 0 {
		fmt.Printf("latency   p50 %v  p90 %v  p99 %v  p99.9 %v  max %v  mean %v\n",
			quantile(h, 50), quantile(h, 90), quantile(h, 99), quantile(h, 99.9), short(h.Max()), short(int64(h.Mean())))
	}
	if l.sum.unsent > 0 {
		fmt.Printf("not sent  %d that were due: the agent, or this machine, is slower than the rate\n", l.sum.unsent)
	}
	fmt.Printf("wrong     %d\nerrors    %d\n", l.sum.wrong, l.sum.errors)
	for _, k := range slices.Sorted(maps.Keys(l.sum.kinds)) {
		fmt.Printf("  %d × %s\n", l.sum.kinds[k], k)
	}
	printHistogram(h)
}

// printHistogram prints a bar for each doubling of the latency.
func printHistogram(h *hdrhistogram.Histogram) {
	var n [64]int64
	most := int64(0)
	for _, b := range h.Distribution() {
		i := bits.Len64(uint64(b.From) / 1000) // 0: below 1µs
		n[i] += b.Count
		most = max(most, n[i])
	}
	if most == 0 {
		return
	}
	first := slices.IndexFunc(n[:], func(c int64) bool { return c > 0 })
	last := len(n) - 1
	for n[last] == 0 {
		last--
	}
	bars := 50
	if w := width(os.Stdout); w > 0 {
		bars = max(1, min(bars, w-27))
	}
	fmt.Println()
	for i := first; i <= last; i++ {
		below := time.Duration(1<<i) * time.Microsecond
		bar := strings.Repeat("#", int((n[i]*int64(bars)+most-1)/most))
		fmt.Printf("  < %-12v %6.2f%%  %s\n", short(int64(below)), 100*float64(n[i])/float64(h.TotalCount()), bar)
	}
}

func (l *load) summaryJSON(took time.Duration, rate float64) error {
	us := func(ns float64) float64 { return ns / 1e3 }
	q := func(q float64) float64 { return us(float64(l.total.ValueAtQuantile(q))) }
	type latency struct {
		P50  float64 `json:"p50"`
		P90  float64 `json:"p90"`
		P99  float64 `json:"p99"`
		P999 float64 `json:"p99.9"`
		Max  float64 `json:"max"`
		Mean float64 `json:"mean"`
	}
	return printJSON(struct {
		Message  string           `json:"message"`
		Addr     string           `json:"addr"`
		Hello    helloJSON        `json:"hello"`
		Conns    int              `json:"conns"`
		Inflight int              `json:"inflight"`
		Wanted   float64          `json:"rate_wanted,omitempty"`
		Seconds  float64          `json:"seconds"`
		Answers  int64            `json:"answers"`
		Rate     float64          `json:"rate"`
		Latency  latency          `json:"latency_us"`
		Unsent   int64            `json:"unsent"`
		Wrong    int64            `json:"wrong"`
		Errors   int64            `json:"errors"`
		Kinds    map[string]int64 `json:"error_kinds,omitempty"`
	}{
		l.message.Name(), l.addr.String(), newHelloJSON(l.hello), l.conns, l.inflight, l.rate, took.Seconds(), l.total.TotalCount(), rate,
		latency{q(50), q(90), q(99), q(99.9), us(float64(l.total.Max())), us(l.total.Mean())},
		l.sum.unsent, l.sum.wrong, l.sum.errors, l.sum.kinds,
	})
}
