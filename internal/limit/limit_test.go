package limit

import (
	"testing"
	"time"
)

func TestLimiter(t *testing.T) {
	var now time.Duration
	l := Limiter{Now: func() time.Duration { return now }}
	for _, tt := range []struct {
		at         time.Duration
		kind       string
		suppressed int
		ok         bool
	}{
		{0, "a", 0, true},
		{1, "a", 0, false},
		{2, "b", 0, true},
		{time.Second - 1, "a", 0, false},
		{time.Second, "a", 2, true},
		{time.Second + 2, "a", 0, false},
		{time.Second + 2, "b", 0, true},
		{time.Minute, "a", 1, true},
	} {
		now = tt.at
		if suppressed, ok := l.Allow(tt.kind); suppressed != tt.suppressed || ok != tt.ok {
			t.Errorf("%s at %v: want %d, %v, have %d, %v", tt.kind, tt.at, tt.suppressed, tt.ok, suppressed, ok)
		}
	}
}
