package judge

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spoa-go/spoa"
	"github.com/spoa-go/spoa/cmd/internal/reputation/lists"
)

// The seed's whole duty, with chance and with lists.
func TestHandler(t *testing.T) {
	drop := writeFile(t, "drop.txt", "# spoa: column=score\n192.0.2.0/24\n2001:db8::/32 35\n")
	own := writeFile(t, "own", "192.0.2.99\n")
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
		m := spoa.NewMessage("check-client-ip", tc.args...)
		for _, l := range []*lists.Lists{nil, l} {
			var a spoa.Actions
			var v verdicts
			h := (&Judge{lists: l}).Handler(0, &v)
			if err := h(t.Context(), m, &a); (err != nil) != (tc.score < 0) {
				t.Errorf("%v: want an error where no address can be judged alone, have %v", tc.args, err)
			}
			value, set := a.Lookup(spoa.ScopeSess, "ip_score")
			score, _ := value.Uint()
			list, listed := a.Lookup(spoa.ScopeSess, "ip_list")
			n := len(slices.Collect(a.All()))
			switch {
			case tc.score < 0:
				if n > 0 || len(v.judged) > 0 {
					t.Errorf("%v: want no action, have %d", tc.args, n)
				}
			case l == nil:
				if !set || n != 1 || score > 100 || len(v.judged) != 1 {
					t.Errorf("%v: want a random score alone, have %v and %d actions", tc.args, value, n)
				}
			case !set || int64(score) != tc.score || listed && list.String() != tc.list || listed != (tc.list != "") || n != 2:
				t.Errorf("%v: want %d of %q, have %v of %v, %d actions", tc.args, tc.score, tc.list, value, list, n)
			case !slices.Equal(v.judged, []string{fmt.Sprint(tc.list, " ", tc.list != "")}):
				t.Errorf("%v: want one verdict, have %v", tc.args, v.judged)
			}
		}
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
		m := spoa.NewMessage("check-client-ip", spoa.Arg{Value: spoa.Addr(netip.MustParseAddr("192.0.2.1"))})
		h := new(Judge).Handler(15*time.Millisecond, new(verdicts))
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
