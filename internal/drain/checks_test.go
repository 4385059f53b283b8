package drain

import (
	"fmt"
	"testing"
	"time"
)

// every calls Seen for one host from a time on, in that interval.
func every(cs *Checks, host string, from, interval time.Duration, n int) (last time.Duration) {
	for i := range time.Duration(n) {
		last = from + i*interval
		cs.Seen(host, last)
	}
	return last
}

func TestMissed(t *testing.T) {
	for _, tt := range []struct {
		name    string
		engines int
		seen    []time.Duration // health checks
		now     time.Duration
		want    time.Duration // 0: not waited for
	}{
		{"one check", 1, []time.Duration{10 * time.Second}, 11 * time.Second, 17 * time.Second},
		{"two", 1, []time.Duration{10 * time.Second, 10200 * ms}, 10300 * ms, 13600 * ms},
		{"the longest gap counts", 1, []time.Duration{0, 3 * time.Second, 4 * time.Second}, 5 * time.Second, 14 * time.Second},
		{"without NOTIFYs", 0, []time.Duration{10 * time.Second, 12 * time.Second}, 13 * time.Second, 0},
		{"ended", 1, []time.Duration{10 * time.Second, 12 * time.Second}, 17 * time.Second, 0},
		{"a gap too long", 1, []time.Duration{time.Second, checkWindow + 2*time.Second}, checkWindow + 3*time.Second, checkWindow + 9*time.Second},
		{"two backends, evenly spread", 2, []time.Duration{10 * time.Second, 11 * time.Second, 12 * time.Second}, 12 * time.Second, 19 * time.Second},
		{"four backends, one of them used", 1, []time.Duration{10000 * ms, 10500 * ms, 11000 * ms, 11500 * ms}, 12 * time.Second, 18500 * ms},
		{"five threads, often", 5, []time.Duration{10000 * ms, 10200 * ms}, 10300 * ms, 14200 * ms},
		{"four threads, seldom", 4, []time.Duration{10 * time.Second, 15 * time.Second}, 16 * time.Second, 31 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var cs Checks
			for i := range tt.engines {
				cs.Notified("h", fmt.Sprint("engine ", i), tt.now)
			}
			for _, at := range tt.seen {
				cs.Seen("h", at)
			}
			if have := cs.Missed("h", tt.now); have != tt.want {
				t.Errorf("want %v, have %v", tt.want, have)
			}
			if have := cs.AllMissed(tt.now); have != tt.want {
				t.Errorf("of all: want %v, have %v", tt.want, have)
			}
		})
	}
	var none Checks
	if have := none.Missed("h", time.Second); have != 0 {
		t.Errorf("of an unknown host: want 0, have %v", have)
	}
}

// Two checkers behind one address, a moment apart, each have their own interval.
func TestMissedPairs(t *testing.T) {
	var cs Checks
	cs.Notified("h", "engine", 0)
	last := time.Duration(0)
	for i := range time.Duration(5) {
		cs.Seen("h", i*2*time.Second)
		last = i*2*time.Second + 100*ms
		cs.Seen("h", last)
	}
	if least, have := last+missedFall*1900*ms, cs.Missed("h", last); have < least {
		t.Errorf("want no sooner than %v, have %v", least, have)
	}
}

// So do ten backends whose checks come one after another.
func TestMissedTen(t *testing.T) {
	var cs Checks
	cs.Notified("h", "engine", 0)
	last := time.Duration(0)
	for i := range time.Duration(5) {
		last = every(&cs, "h", i*2*time.Second, 10*ms, 10)
	}
	if least, have := last+missedFall*1900*ms, cs.Missed("h", last); have < least {
		t.Errorf("want no sooner than %v, have %v", least, have)
	}
}

// The last gaps count, not all that ever were.
func TestMissedForgetsGaps(t *testing.T) {
	var cs Checks
	cs.Notified("h", "engine", 0)
	cs.Seen("h", 0)
	last := every(&cs, "h", time.Minute, 2*time.Second, keptGaps+1)
	if want, have := last+missedFall*2*time.Second+QuietTime, cs.Missed("h", last); want != have {
		t.Errorf("want %v, have %v", want, have)
	}
}

// A host beyond the limit replaces the one that was not heard of for longest.
func TestHostsBounded(t *testing.T) {
	var cs Checks
	for i := range 3 * maxHosts {
		host := fmt.Sprint("h", i)
		at := time.Duration(i) * time.Second
		cs.Notified(host, "engine", at)
		cs.Seen(host, at)
		if cs.Missed(host, at) == 0 {
			t.Fatalf("want the health checks of host %d waited for", i)
		}
		if want := i >= maxHosts; want != cs.Forgot() {
			t.Fatalf("after %d hosts: want one forgotten %v, have %v", i+1, want, cs.Forgot())
		}
	}
	if len(cs.hosts) != maxHosts {
		t.Errorf("want %d hosts, have %d", maxHosts, len(cs.hosts))
	}
	if cs.hosts["h0"] != nil {
		t.Error("want the oldest host forgotten")
	}
}

func TestEnginesBounded(t *testing.T) {
	var cs Checks
	for i := range 10 * maxEngines {
		cs.Notified("h", fmt.Sprint(i), 0)
	}
	if have := len(cs.hosts["h"].engines); have != maxEngines {
		t.Errorf("want %d engines, have %d", maxEngines, have)
	}
}
