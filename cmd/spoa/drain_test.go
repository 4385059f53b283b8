//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spoa-go/spoa"
)

// twoAgents is the text of haproxy.cfg with a second server before the first.
func twoAgents(second string) []string {
	const first = "    server iprep-server"
	return []string{first, "    server second " + second + " check inter 100ms fall 2 rise 1\n" + first}
}

// checkNoError expects that HAProxy has logged no SPOE error and that each answer has a score.
func (h *haproxy) checkNoError(t *testing.T, got tally) {
	t.Helper()
	got.check(t)
	if n := h.spoeLog.counts(); len(n) > 0 {
		t.Errorf("%d requests; SPOE log has errors, by status: %v", got.requests, n)
	}
}

// Two agents that are restarted in turn, again and again, cost nothing.
func TestE2ERollingRestart(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		const clients, restarts = 50, 8
		const drain = 30 * time.Second // since on a busy machine health checks are late, and the agent waits for them
		names := [2]string{"iprep-server", "second"}
		var agents [2]*agentProcess
		for i := range agents {
			agents[i] = startAgent(t, freeAddr(t, "127.0.0.1"), "-drain", drain.String())
		}
		h := startHAProxy(t, bin, setup{
			agent:   agents[0].addr,
			cfg:     twoAgents(agents[1].addr),
			spoe:    []string{"processing 10s", "processing 3s"}, // how long one that is lost waits
			mayLose: true,                                        // when the test is over and the agents are stopped
		})
		for _, name := range names {
			h.awaitServerNamed(t, name, "UP", "L7OK")
		}
		l := startLoad(t, h.url, clients)
		var took []string
		for i := range restarts {
			l.more(t, 200)
			k := i % 2
			begin := time.Now()
			agents[k].shutdown(t)
			took = append(took, fmt.Sprintf("%.1f", time.Since(begin).Seconds()))
			// Restarted before HAProxy has looked again, it would still seem to be down.
			h.awaitServerNamed(t, names[k], "DOWN", "")
			agents[k] = startAgent(t, agents[k].addr, "-drain", drain.String())
			h.awaitServerNamed(t, names[k], "UP", "L7OK")
		}
		h.checkNoError(t, l.stop())
		t.Logf("%d requests; seconds of the drains: %s", l.total.requests, strings.Join(took, " "))
	})
}

// Other backends that check the same agent do not make it seem to have missed its health checks sooner.
func TestE2EDrainManyBackends(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		first := startAgent(t, freeAddr(t, "127.0.0.1"), "-drain", "30s", "-d")
		second := startAgent(t, freeAddr(t, "127.0.0.1"), "-drain", "30s")
		const inter = " check inter 2s fall 3 rise 1"
		servers := inter + "\n    server second " + second.addr + inter
		for i := range 3 {
			servers += fmt.Sprintf("\n\nbackend other%d\n    mode tcp\n    option spop-check\n    server other%d %s%s", i, i, first.addr, inter)
		}
		h := startHAProxy(t, bin, setup{
			agent:   first.addr,
			cfg:     []string{"global\n", "global\n    nbthread 1\n", " check inter 100ms fall 2 rise 1", servers},
			spoe:    []string{"processing 10s", "processing 1s"}, // HAProxy connects again after a second,
			mayLose: true,                                        // in the other backends
		})
		for _, name := range []string{"iprep-server", "second"} {
			h.awaitServerNamed(t, name, "UP", "L7OK")
		}
		first.awaitTimes(t, "healthcheck", 12) // three health checks of each backend
		l := startLoad(t, h.url, 4)
		l.more(t, 200)
		begin := time.Now()
		first.shutdown(t)
		took := time.Since(begin)
		h.awaitServerNamed(t, "iprep-server", "DOWN", "")
		l.more(t, 200)
		h.checkNoError(t, l.stop())
		t.Logf("%d requests; seconds of the drain: %.1f, until the server was down: %.1f", l.total.requests, took.Seconds(), time.Since(begin).Seconds())
	})
}

// An agent whose connections are idle ends soon, and HAProxy opens new ones when it needs them.
func TestE2EDrainIdle(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		const drain = 60 * time.Second // longer than stop waits
		agents := [2]*agentProcess{
			startAgent(t, freeAddr(t, "127.0.0.1"), "-drain", drain.String()),
			startAgent(t, freeAddr(t, "127.0.0.1"), "-drain", drain.String()),
		}
		h := startHAProxy(t, bin, setup{agent: agents[0].addr, cfg: twoAgents(agents[1].addr)})
		h.awaitServerNamed(t, "iprep-server", "UP", "L7OK")
		h.awaitServerNamed(t, "second", "UP", "L7OK")
		got := ask(t, h.url, 100)
		agents[0].shutdown(t)
		got.add(ask(t, h.url, 100))
		h.checkNoError(t, got)
	})
}

// Under load, with handlers that wait, the time for a drain is kept and a second signal ends it at once.
func TestE2EDrainEnds(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		for _, test := range []struct {
			name    string
			drain   string
			signals int
		}{
			{"time over", "500ms", 1},
			{"second signal", "60s", 2},
		} {
			t.Run(test.name, func(t *testing.T) {
				agent := startAgent(t, "127.0.0.1:0", "-t", "30s", "-n", "100", "-drain", test.drain, "-d")
				h := startHAProxy(t, bin, setup{agent: agent.addr, mayLose: true, spoe: []string{"processing 10s", "processing 2s"}})
				h.awaitServer(t, "UP", "L7OK")
				l := startLoad(t, h.url, 5)
				agent.await(t, `msg=received\b.*NOTIFY`)
				for range test.signals - 1 {
					if err := agent.cmd.Process.Signal(syscall.SIGTERM); err != nil {
						t.Fatal(err)
					}
					agent.await(t, `msg=sent\b.*AGENT-DISCONNECT`) // a health check refused
				}
				agent.shutdown(t)
				// Without an answer there is no score, and the request passes.
				got := l.stop()
				got.checkAnswered(t)
			})
		}
	})
}

// An agent whose listening socket the next one has too leaves soon, without another server in HAProxy, which never sees it
// go down: what it connects meanwhile waits in the socket. On a busy machine that may be for longer than HAProxy waits, and
// what waits in a socket of SO_REUSEPORT is lost when that is closed. So this wants few lost, where two servers lose none.
func TestE2ETakeover(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		socket, addr := socketFile(t, "tcp", "127.0.0.1:0")
		fromSystemd := func(t *testing.T) (end func()) {
			p := passed(t, []*os.File{socket})
			p.await(t, `msg=listening`)
			return func() {
				if err := p.stop(syscall.SIGTERM); err != nil {
					t.Errorf("agent after SIGTERM: %v", err)
				}
			}
		}
		shared := freeAddr(t, "127.0.0.1")
		reusePort := func(t *testing.T) (end func()) { return serveReusePort(t, shared) }
		for _, test := range []struct {
			name, addr string
			start      func(*testing.T) (end func())
			overlap    bool // the next one starts first
			unchecked  bool
		}{
			{"one after the other", addr, fromSystemd, false, false},
			{"both for a moment", addr, fromSystemd, true, false},
			{"both, no health checks", addr, fromSystemd, true, true},
			{"SO_REUSEPORT", shared, reusePort, true, false},
		} {
			t.Run(test.name, func(t *testing.T) {
				const clients, changes = 20, 3
				end := test.start(t)
				s := setup{agent: test.addr, mayLose: true, spoe: []string{"processing 10s", "processing 6s"}}
				if test.unchecked {
					s.cfg = []string{" check inter 100ms fall 2 rise 1", ""}
				}
				h := startHAProxy(t, bin, s)
				if !test.unchecked {
					h.awaitServer(t, "UP", "L7OK")
				}
				l := startLoad(t, h.url, clients)
				var took []string
				for range changes {
					l.more(t, 200)
					begin := time.Now()
					if test.overlap {
						next := test.start(t)
						end()
						end = next
					} else {
						end()
						end = test.start(t)
					}
					took = append(took, fmt.Sprintf("%.2f", time.Since(begin).Seconds()))
				}
				l.more(t, 200)
				got := l.stop()
				if strings.Contains(h.out.String(), "is DOWN") {
					t.Error("HAProxy has seen the server go down")
				}
				end()
				got.checkAnswered(t)
				if got.missing >= clients {
					t.Errorf("%d of %d answers have no score; SPOE log, by status: %v", got.missing, got.requests, h.spoeLog.counts())
				}
				t.Logf("%d requests, %d lost; seconds of the changes: %s", got.requests, got.missing, strings.Join(took, " "))
			})
		}
	})
}

// serveReusePort has an agent of this process serve an address that others have too.
func serveReusePort(t *testing.T, addr string) (end func()) {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("SO_REUSEPORT is another on ", runtime.GOOS)
	}
	const soReusePort = 15
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		c.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, soReusePort, 1) })
		return err
	}}
	l, err := lc.Listen(context.Background(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	agent := spoa.New(spoa.WithHandlerFunc(message, func(_ context.Context, _ *spoa.Message, a *spoa.Actions) error {
		a.SetVar(spoa.ScopeSess, "ip_score", spoa.Uint32(100))
		return nil
	}))
	execute, interrupt := agent.Actor(l, patience)
	served := make(chan error, 1)
	go func() { served <- execute() }()
	var once sync.Once
	end = func() {
		once.Do(func() {
			interrupt(nil)
			l.Close()
			if err := <-served; !errors.Is(err, spoa.ErrAgentClosed) {
				t.Errorf("Serve: %v", err)
			}
		})
	}
	t.Cleanup(end)
	return end
}
