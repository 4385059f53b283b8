package judge

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/go-kit/log"
	"github.com/spoa-go/spoa/cmd/internal/replay"
	"github.com/spoa-go/spoa/cmd/internal/reputation"
	"github.com/spoa-go/spoa/cmd/internal/reputation/lists"
)

// Check opens what Open would, and returns what there is in words for -check:
// one line, and one more for each warning.
func (c *Config) Check(ctx context.Context) (string, error) {
	j, err := c.Open(ctx, log.NewNopLogger())
	switch {
	case err != nil:
		return "", err
	case j.lists == nil && j.sources == nil:
		return "no lists: scores are random", nil
	case j.lists == nil:
		return fmt.Sprintf("no lists, other sources: %d", j.sources.count()), nil
	}
	entries, bad, all := 0, 0, j.lists.Stats()
	var warnings strings.Builder
	for _, s := range all {
		entries += s.Entries
		bad += s.BadLines
		for _, w := range s.Warnings {
			warnings.WriteString("\nwarning: " + w)
		}
	}
	for _, path := range j.lists.Empty() {
		fmt.Fprintf(&warnings, "\nwarning: %s: no list there", path)
	}
	others := ""
	if n := j.sources.count(); n > 0 {
		others = fmt.Sprintf(", other sources: %d", n)
	}
	return fmt.Sprintf("lists: %d, entries: %d, bad lines: %d%s%s", len(all), entries, bad, others, &warnings), nil
}

// WriteLookUp writes what each list and other source says of the address of
// -lookup.
func (c *Config) WriteLookUp(ctx context.Context, w io.Writer) error {
	addr, err := netip.ParseAddr(c.LookUp)
	if err != nil {
		return err
	}
	j, err := c.Open(ctx, log.NewNopLogger())
	if err != nil {
		return err
	}
	switch {
	case j.sources != nil:
		if err := j.sources.lookUp(ctx, w, addr); err != nil {
			return err
		}
	case j.lists != nil:
		v := j.lists.Lookup(addr)
		fmt.Fprintf(w, "%v: %v, score %d", addr, v.State, v.Score)
		if v.List != "" {
			fmt.Fprintf(w, ", by list %s", v.List)
		}
		fmt.Fprintln(w)
	default:
		return errors.New("-lookup: want lists, by -reputation or -allow, or other sources")
	}
	if j.lists == nil {
		return nil
	}
	return writeMatches(w, j.lists.Explain(addr))
}

func writeMatches(w io.Writer, matches []lists.Match) error {
	if len(matches) == 0 {
		return nil
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "\tLIST\tPREFIX\tSCORE\tAGE\tNOTE\tFILE")
	for _, m := range matches {
		mark, score := "", fmt.Sprint(m.Score)
		if m.Decided {
			mark = "*"
		}
		if m.Allow {
			score = "allow"
		}
		age := time.Since(m.Modified).Round(time.Second)
		fmt.Fprintf(t, "%s\t%s\t%v\t%s\t%v\t%s\t%s\n", mark, m.List, m.Prefix, score, age, reputation.Printable(m.Note), m.File)
	}
	return t.Flush()
}

// lookUpTimeout is how long -lookup waits for answers.
const lookUpTimeout = 5 * time.Second

// lookUp writes what all sources say of an address.
func (s *sources) lookUp(ctx context.Context, w io.Writer, addr netip.Addr) error {
	if err := s.prepare(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, lookUpTimeout)
	defer cancel()
	v, all := s.Explain(ctx, addr)
	fmt.Fprintf(w, "%v: %v, score %d", v.Addr, v.State, v.Score)
	for _, more := range []struct{ name, value string }{
		{"", v.Reason}, {"decision ", v.Decision}, {"country ", v.Country}, {"network ", network(&v)}, {"without an answer of ", v.Missing},
	} {
		if more.value != "" {
			fmt.Fprintf(w, ", %s%s", more.name, more.value)
		}
	}
	fmt.Fprintln(w)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "\tSOURCE\tSTATE\tSCORE\tREASON")
	for _, f := range all {
		mark, score := "", ""
		if f.Reason != "" && f.Reason == v.Reason {
			mark = "*"
		}
		if f.State == reputation.Listed {
			score = fmt.Sprint(f.Score)
		}
		fmt.Fprintf(t, "%s\t%s\t%v\t%s\t%s\n", mark, f.Source, f.State, score, f.Reason)
	}
	return t.Flush()
}

func network(v *reputation.Verdict) string {
	if v.ASN == 0 {
		return ""
	}
	return strings.TrimSpace(fmt.Sprintf("AS%d %s", v.ASN, v.Org))
}

// WriteReplay judges the addresses of the log that -replay names, and writes what
// would have been denied.
func (c *Config) WriteReplay(ctx context.Context, w io.Writer, logger log.Logger) error {
	j, err := c.Open(ctx, logger)
	if err != nil {
		return err
	}
	if err := j.sources.prepare(ctx); err != nil {
		return err
	}
	log := os.Stdin
	if c.Replay != "-" {
		if log, err = os.Open(c.Replay); err != nil {
			return fmt.Errorf("-replay: %w", err)
		}
		defer log.Close()
	}
	if err := replay.Run(w, log, j.sources.explainLists(j.lists), j.sources.denyBelow); err != nil {
		return fmt.Errorf("-replay %s: %w", c.Replay, err)
	}
	return nil
}

// explainLists returns what judges an address and names each list that has it,
// not only the one that decides.
func (s *sources) explainLists(l *lists.Lists) replay.Judge {
	if l == nil {
		return s.Explain
	}
	return func(ctx context.Context, addr netip.Addr) (reputation.Verdict, []reputation.Finding) {
		v, all := s.Explain(ctx, addr)
		all = all[1:] // the first are all lists together
		for _, m := range l.Explain(addr) {
			if !m.Allow {
				all = append(all, reputation.Finding{Source: m.List, State: reputation.Listed, Score: m.Score})
			}
		}
		return v, all
	}
}
