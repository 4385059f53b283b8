package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/go-kit/log"
	"github.com/spoa-go/spoa/cmd/internal/reputation/lists"
)

// validateLists finds lists that are named twice, and what cannot be in lists.
func (c *config) validateLists() error {
	for _, flag := range []struct {
		name  string
		files []lists.File
	}{{"-reputation", c.reputation}, {"-allow", c.allow}} {
		seen := make(map[string]bool)
		for _, f := range flag.files {
			if seen[f.Path] {
				return fmt.Errorf("%s %s: given twice", flag.name, f.Path)
			}
			seen[f.Path] = true
		}
	}
	if c.refresh < time.Minute {
		return fmt.Errorf("-refresh %v: want at least 1m", c.refresh)
	}
	if c.lookup != "" {
		if _, err := netip.ParseAddr(c.lookup); err != nil {
			return fmt.Errorf("-lookup %q: want an address", c.lookup)
		}
	}
	return nil
}

// openLists loads the lists, and returns nil if there are none.
func (c *config) openLists(ctx context.Context, logger log.Logger) (*lists.Lists, error) {
	if len(c.reputation)+len(c.allow) == 0 {
		return nil, nil
	}
	return lists.Open(ctx, lists.Options{
		Logger: logger, Block: c.reputation, Allow: c.allow, Refresh: c.refresh, Cache: c.cache,
	})
}

// check tries what serve would load.
func check(c *config) (string, error) {
	l, err := c.openLists(context.Background(), log.NewNopLogger())
	if err != nil {
		return "", err
	}
	sources, err := c.openSources(l, log.NewNopLogger())
	if err != nil {
		return "", err
	}
	if _, err := c.loadTLS(); err != nil {
		return "", err
	}
	if err := c.checkAddrs(); err != nil {
		return "", err
	}
	switch {
	case l == nil && sources == nil:
		return "configuration ok, no lists: scores are random", nil
	case l == nil:
		return fmt.Sprintf("configuration ok, no lists, other sources: %d", sources.count()), nil
	}
	entries, bad, all := 0, 0, l.Stats()
	var warnings strings.Builder
	for _, s := range all {
		entries += s.Entries
		bad += s.BadLines
		for _, w := range s.Warnings {
			warnings.WriteString("\nwarning: " + w)
		}
	}
	others := ""
	if n := sources.count(); n > 0 {
		others = fmt.Sprintf(", other sources: %d", n)
	}
	return fmt.Sprintf("configuration ok, lists: %d, entries: %d, bad lines: %d%s%s", len(all), entries, bad, others, &warnings), nil
}

// checkAddrs finds addresses that cannot be listened on.
func (c *config) checkAddrs() error {
	addrs := c.addrs()
	if c.metrics.Network != "" {
		addrs = append(slices.Clone(addrs), c.metrics)
	}
	for _, addr := range addrs {
		if err := addr.Check(); err != nil {
			return err
		}
	}
	return nil
}

// lookUp writes what each list and other source says of an address.
func lookUp(c *config, w io.Writer) error {
	l, err := c.openLists(context.Background(), log.NewNopLogger())
	if err != nil {
		return err
	}
	sources, err := c.openSources(l, log.NewNopLogger())
	if err != nil {
		return err
	}
	addr := netip.MustParseAddr(c.lookup) // validateLists did so before
	switch {
	case sources != nil:
		if err := sources.lookUp(w, addr); err != nil {
			return err
		}
	case l != nil:
		v := l.Lookup(addr)
		fmt.Fprintf(w, "%v: %v, score %d", addr, v.State, v.Score)
		if v.List != "" {
			fmt.Fprintf(w, ", by list %s", v.List)
		}
		fmt.Fprintln(w)
	default:
		return errors.New("-lookup: want lists, by -reputation or -allow, or other sources")
	}
	if l == nil {
		return nil
	}
	return writeMatches(w, l.Explain(addr))
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
		fmt.Fprintf(t, "%s\t%s\t%v\t%s\t%v\t%s\t%s\n", mark, m.List, m.Prefix, score, age, m.Note, m.File)
	}
	return t.Flush()
}
