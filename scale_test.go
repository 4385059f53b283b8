//go:build unix

package spoa

import (
	"io"
	"net"
	"syscall"
	"testing"
	"testing/synctest"
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

// Connections of one engine that end at once, each with answers for the others,
// cost as much each as fewer do.
func TestSiblingsCutAtOnce(t *testing.T) {
	cut := func(conns int) time.Duration {
		var took time.Duration
		synctest.Test(t, func(t *testing.T) {
			g := newGate()
			_, ln := startMem(t, WithAsync(), WithHandler("number", g), WithWorkers(1<<20))
			last := ln.greet(t)
			var ncs []net.Conn
			for i := range conns {
				nc := ln.raw(t)
				rawHello(t, nc)
				io.WriteString(nc, notifyFrame(uint64(i), 1))
				ncs = append(ncs, nc)
			}
			g.wait(t, conns)
			synctest.Wait()
			before := cpu(t)
			for _, nc := range ncs {
				nc.Close()
			}
			synctest.Wait()
			close(g.open)
			for range conns {
				last.want(frameAck)
			}
			synctest.Wait()
			took = cpu(t) - before
		})
		return took
	}
	cut(500)
	few, many := cut(1000), cut(8000)
	t.Logf("CPU for 1,000: %v, for 8,000: %v", few, many)
	if many > 24*few {
		t.Errorf("want 8 times as many connections to cost no more than 24 times as much CPU, have %v and %v", few, many)
	}
}
