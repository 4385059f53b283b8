//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spoa-go/spoa"
	"github.com/spoa-go/spoa/cmd/internal/reputation/lists"
)

// The seed's whole duty, with chance and with lists.
func TestCheckClientIP(t *testing.T) {
	dir := t.TempDir()
	drop, own := filepath.Join(dir, "drop.txt"), filepath.Join(dir, "own")
	writeFile(t, drop, "# spoa: column=score\n192.0.2.0/24\n2001:db8::/32 35\n")
	writeFile(t, own, "192.0.2.99\n")
	l, err := lists.Open(t.Context(), lists.Options{Block: []lists.File{{Path: drop, Score: 10}}, Allow: []lists.File{{Path: own}}})
	if err != nil {
		t.Fatal(err)
	}
	addr := func(name, s string) spoa.Arg { return spoa.Arg{Name: name, Value: spoa.Addr(netip.MustParseAddr(s))} }
	for _, tc := range []struct {
		args  []spoa.Arg
		score int64 // with lists; -1: no action at all
		list  string
	}{
		{[]spoa.Arg{addr("", "192.0.2.1")}, 10, "drop"},
		{[]spoa.Arg{addr("ip", "192.0.2.1")}, 10, "drop"},
		{[]spoa.Arg{addr("ip", "::ffff:192.0.2.1")}, 10, "drop"},
		{[]spoa.Arg{addr("", "2001:db8::1")}, 35, "drop"},
		{[]spoa.Arg{addr("ip", "2001:db8::1")}, 35, "drop"},
		{[]spoa.Arg{addr("", "192.0.2.99")}, 100, ""},
		{[]spoa.Arg{addr("", "198.51.100.1")}, 100, ""},
		{[]spoa.Arg{{Value: spoa.String("192.0.2.1")}}, 10, "drop"},
		{nil, -1, ""},
		{[]spoa.Arg{{}}, -1, ""},
		{[]spoa.Arg{{Value: spoa.Uint32(1)}}, -1, ""},
		{[]spoa.Arg{{Value: spoa.Binary([]byte{192, 0, 2, 1})}}, -1, ""},
		{[]spoa.Arg{addr("", "192.0.2.1"), addr("", "192.0.2.2")}, -1, ""},
	} {
		m := spoa.NewMessage(message, tc.args...)
		for _, l := range []*lists.Lists{nil, l} {
			var judged []string
			var a spoa.Actions
			h := checkClientIP(0, finder{}, newScorer(l, func(list string, listed bool) {
				judged = append(judged, fmt.Sprint(list, " ", listed))
			}))
			if err := h(t.Context(), m, &a); (err != nil) != (tc.score < 0) {
				t.Errorf("%v: want an error where no address can be judged alone, have %v", tc.args, err)
			}
			v, set := a.Lookup(spoa.ScopeSess, "ip_score")
			score, _ := v.Uint()
			list, listed := a.Lookup(spoa.ScopeSess, "ip_list")
			n := len(slices.Collect(a.All()))
			switch {
			case tc.score < 0:
				if n > 0 || len(judged) > 0 {
					t.Errorf("%v: want no action, have %d", tc.args, n)
				}
			case l == nil:
				if !set || n != 1 || score > 100 || len(judged) != 1 {
					t.Errorf("%v: want a random score alone, have %v and %d actions", tc.args, v, n)
				}
			case !set || int64(score) != tc.score || listed && list.String() != tc.list || listed != (tc.list != "") || n != 2:
				t.Errorf("%v: want %d of %q, have %v of %v, %d actions", tc.args, tc.score, tc.list, v, list, n)
			case !slices.Equal(judged, []string{fmt.Sprint(tc.list, " ", tc.list != "")}):
				t.Errorf("%v: want one verdict, have %v", tc.args, judged)
			}
		}
	}
}

func TestFinder(t *testing.T) {
	text := func(s string) []spoa.Arg { return []spoa.Arg{{Name: "x", Value: spoa.String(s)}} }
	ip := func(s string) spoa.Value { return spoa.Addr(netip.MustParseAddr(s)) }
	path := spoa.Arg{Name: "path", Value: spoa.String("/192.0.2.9")}
	var cdn prefixes
	for _, s := range []string{"198.51.100.0/24", "2001:db8:cd::/48", "203.0.113.7"} {
		if err := cdn.Set(s); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		args    []spoa.Arg
		proxies prefixes
		want    string // or the error
	}{
		{text("192.0.2.1"), nil, "192.0.2.1"},
		{text(" 192.0.2.1 "), nil, "192.0.2.1"},
		{text("2001:db8::1"), nil, "2001:db8::1"},
		{text("::ffff:192.0.2.1"), nil, "192.0.2.1"},
		{text("192.0.2.1:65000"), nil, "192.0.2.1"},
		{text("[2001:db8::1]:65000"), nil, "2001:db8::1"},
		{text("[2001:db8::1]"), nil, "2001:db8::1"},
		{text("fe80::1%eth0"), nil, "fe80::1"},
		// What a client has made up stands before what proxies have added.
		{text("6.6.6.6, 192.0.2.1"), nil, "192.0.2.1"},
		{text("6.6.6.6, 192.0.2.1"), cdn, "192.0.2.1"},
		{text("6.6.6.6, 192.0.2.1, 198.51.100.3"), cdn, "192.0.2.1"},
		{text("6.6.6.6,192.0.2.1,2001:db8:cd::1,203.0.113.7"), cdn, "192.0.2.1"},
		{text("6.6.6.6, 198.51.100.3, 192.0.2.1"), cdn, "192.0.2.1"},
		{text("198.51.100.4, 198.51.100.3"), cdn, "198.51.100.4"},
		{text("6.6.6.6, unknown, 198.51.100.3"), cdn, `text "unknown": want an address`},
		{text("6.6.6.6, "), nil, `text ""`},
		{text(""), nil, `text ""`},
		{text("localhost"), nil, `text "localhost"`},
		{text(strings.Repeat("x", 16000)), nil, `text "` + strings.Repeat("x", 64) + `": want`},
		{[]spoa.Arg{{Value: spoa.Uint32(1)}}, nil, "argument is uint32: want an address"},
		{[]spoa.Arg{{}}, nil, "argument is null: want an address"},
		{nil, nil, "no argument"},
		{[]spoa.Arg{path, {Name: "src", Value: ip("192.0.2.1")}}, nil, "192.0.2.1"},
		{[]spoa.Arg{path, {Name: "ip", Value: ip("192.0.2.1")}, {Name: "dst", Value: ip("192.0.2.2")}}, nil, "192.0.2.1"},
		{[]spoa.Arg{{Name: "addr", Value: ip("192.0.2.2")}, {Name: "ip", Value: ip("192.0.2.1")}}, nil, "192.0.2.1"},
		{[]spoa.Arg{path, {Value: ip("192.0.2.1")}}, nil, "192.0.2.1"},
		{[]spoa.Arg{path, {Name: "ip"}, {Value: ip("192.0.2.1")}}, nil, "argument is null"},
		{[]spoa.Arg{path, {Name: "dst", Value: ip("192.0.2.2")}, {Value: ip("192.0.2.1")}}, nil, "2 addresses in 3 arguments: want one of them named ip"},
		{[]spoa.Arg{path, path}, nil, "0 addresses in 2 arguments"},
	} {
		have, err := finder{tc.proxies}.address(spoa.NewMessage(message, tc.args...))
		if err != nil && strings.Contains(err.Error(), tc.want) {
			continue
		}
		if err != nil || have.String() != tc.want {
			t.Errorf("%v: want %s, have %v, %v", tc.args, tc.want, have, err)
		}
	}
	if err := new(prefixes).Set("example.com"); err == nil || !strings.Contains(err.Error(), "want an address or a prefix") {
		t.Errorf("want the right form in the error, have %v", err)
	}
}

func TestRandomScoreRange(t *testing.T) {
	score := newScorer(nil, func(string, bool) {})
	seen := map[uint64]bool{}
	for range 20_000 { // any of 101 is missing once in 10^84
		var a spoa.Actions
		score(t.Context(), netip.Addr{}, &a)
		v, _ := a.Lookup(spoa.ScopeSess, "ip_score")
		n, _ := v.Uint()
		seen[n] = true
	}
	if len(seen) != 101 || !seen[0] || !seen[100] {
		t.Errorf("want 0 to 100, have %d different scores", len(seen))
	}
}

func TestDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := spoa.NewMessage(message, spoa.Arg{Value: spoa.Addr(netip.MustParseAddr("192.0.2.1"))})
		h := checkClientIP(15*time.Millisecond, finder{}, newScorer(nil, func(string, bool) {}))
		var a spoa.Actions
		began := time.Now()
		if err := h(t.Context(), m, &a); err != nil || time.Since(began) != 15*time.Millisecond {
			t.Errorf("want 15 ms, have %v, %v", time.Since(began), err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if err := h(ctx, m, &a); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != 16*time.Millisecond {
			t.Errorf("want the context obeyed, have %v after %v", err, time.Since(began))
		}
	})
}
