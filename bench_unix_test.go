//go:build unix

package spoa

import (
	"syscall"
	"testing"
	"time"
)

// cpu returns the time that the process has used the processor.
func cpu(t testing.TB) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkDrain drains thousands of busy connections. x-cpu is how many times as
// much CPU a second of the drain takes as a second before it, with that of the
// clients in both.
func BenchmarkDrain(b *testing.B) {
	var before, during, worst time.Duration
	for range b.N {
		a, ln := startMem(b, withNumbered())
		c := newCrowd(b, ln)
		measure := func() (used time.Duration) {
			c.begin()
			from := cpu(b)
			time.Sleep(time.Second)
			return cpu(b) - from
		}
		before += measure()
		a.advance(draining)
		ln.Close()
		during += measure()
		worst = max(worst, time.Duration(c.now.Load().worst.Load()))
		a.Close()
		c.clients.Wait()
	}
	b.ReportMetric(float64(during)/float64(before), "x-cpu")
	b.ReportMetric(float64(worst.Milliseconds()), "worst-ms")
}
