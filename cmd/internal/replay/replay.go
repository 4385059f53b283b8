// Package replay judges the addresses of a log: what would have been denied?
package replay

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/spoa-go/spoa/cmd/internal/reputation"
)

const (
	workers = 64              // addresses judged at once, most of which wait for DNS
	timeout = 3 * time.Second // for one address
	longest = 1 << 20         // bytes of a line
)

// A Judge returns the verdict on an address and what it rests on: what each list
// and other source says. It waits no longer than until ctx ends.
type Judge func(ctx context.Context, addr netip.Addr) (reputation.Verdict, []reputation.Finding)

// Run judges the first address of each line that it reads from log, and writes
// to w how many requests would have been denied for a score below that, and by
// which sources. Lines may be those of HAProxy, of a web server, or any that
// begin with an address, which may have a port.
func Run(w io.Writer, log io.Reader, judge Judge, below uint8) error {
	l, err := readLog(log)
	if err != nil {
		return err
	}
	return judgeLog(l, judge, below).write(w, below)
}

// accessLog is how often each address occurs in a log.
type accessLog struct {
	requests map[netip.Addr]int
	without  int // lines that name no address
}

// readLog reads lines, each of which is a request of the first address in it.
func readLog(r io.Reader) (*accessLog, error) {
	log := &accessLog{requests: make(map[netip.Addr]int)}
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, longest)
	for sc.Scan() {
		if addr, ok := findAddr(sc.Text()); ok {
			log.requests[addr]++
		} else if strings.TrimSpace(sc.Text()) != "" {
			log.without++
		}
	}
	if err := sc.Err(); err != nil {
		return nil, err
	}
	if len(log.requests) == 0 {
		return nil, errors.New("no line with an address")
	}
	return log, nil
}

// findAddr returns the first address of a line, with or without a port.
func findAddr(line string) (netip.Addr, bool) {
	for field := range strings.FieldsFuncSeq(line, func(r rune) bool { return strings.ContainsRune(" \t\"',;=()<>", r) }) {
		if addr, ok := parseAddr(field); ok {
			return addr.Unmap().WithZone(""), true
		}
	}
	return netip.Addr{}, false
}

func parseAddr(s string) (netip.Addr, bool) {
	if addr, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil {
		return addr, true
	}
	if ap, err := netip.ParseAddrPort(s); err == nil {
		return ap.Addr(), true
	}
	// HAProxy writes 2001:db8::1:54321. A port of four digits is taken for a part of
	// the address; clients hardly have such.
	if i := strings.LastIndexByte(s, ':'); i > 0 {
		if addr, err := netip.ParseAddr(s[:i]); err == nil && addr.Is6() {
			return addr, true
		}
	}
	return netip.Addr{}, false
}

// report is what would have happened.
type report struct {
	accessLog
	denied, allowed, unsure tally // unsure: passed, but not all sources had an answer
	sources                 map[string]*sourceTally
}

type tally struct{ requests, addrs int }

func (t *tally) add(requests int) {
	t.requests += requests
	t.addrs++
}

// sourceTally is what one source would have denied, and the requests that no
// other would have.
type sourceTally struct {
	all   tally
	alone int
}

// judgeLog judges each address once.
func judgeLog(log *accessLog, judge Judge, below uint8) *report {
	rep := &report{accessLog: *log, sources: make(map[string]*sourceTally)}
	addrs := make(chan netip.Addr)
	var mu sync.Mutex // guards rep
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for addr := range addrs {
				ctx, cancel := context.WithTimeout(context.Background(), timeout)
				v, all := judge(ctx, addr)
				cancel()
				mu.Lock()
				rep.add(&v, all, log.requests[addr], below)
				mu.Unlock()
			}
		})
	}
	for addr := range log.requests {
		addrs <- addr
	}
	close(addrs)
	wg.Wait()
	return rep
}

func (r *report) add(v *reputation.Verdict, all []reputation.Finding, requests int, below uint8) {
	switch {
	case v.State == reputation.Allowed:
		r.allowed.add(requests)
		return
	case v.Score < below:
		r.denied.add(requests)
	case v.Missing != "":
		r.unsure.add(requests)
	}
	var by []string
	for _, f := range all {
		if f.State == reputation.Listed && f.Score < below {
			by = append(by, f.Source)
		}
	}
	for _, name := range by {
		t := r.sources[name]
		if t == nil {
			t = new(sourceTally)
			r.sources[name] = t
		}
		t.all.add(requests)
		if len(by) == 1 {
			t.alone += requests
		}
	}
}

func (r *report) write(w io.Writer, below uint8) error {
	requests := 0
	for _, n := range r.requests {
		requests += n
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	row := func(name string, t tally, more ...any) {
		fmt.Fprintf(tw, "%d\t%d\t", t.requests, t.addrs)
		for _, m := range more {
			fmt.Fprintf(tw, "%v\t", m)
		}
		fmt.Fprintf(tw, "  %s\n", name)
	}
	fmt.Fprintf(tw, "requests\taddresses\t\n")
	row("in the log", tally{requests, len(r.requests)})
	row(fmt.Sprintf("denied, with a score below %d", below), r.denied)
	row("allowed by a list", r.allowed)
	row("passed, but a source had no answer", r.unsure)
	if err := tw.Flush(); err != nil {
		return err
	}
	if r.without > 0 {
		fmt.Fprintf(w, "Lines without an address: %d.\n", r.without)
	}
	if len(r.sources) == 0 {
		return nil
	}
	fmt.Fprintf(w, "\nDenied by each source, and by it alone:\n\n")
	fmt.Fprintf(tw, "requests\taddresses\talone\t\n")
	names := slices.SortedFunc(maps.Keys(r.sources), func(a, b string) int {
		return cmp.Or(r.sources[b].all.requests-r.sources[a].all.requests, strings.Compare(a, b))
	})
	for _, name := range names {
		row(name, r.sources[name].all, r.sources[name].alone)
	}
	return tw.Flush()
}
