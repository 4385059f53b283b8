//go:build unix

package main

import (
	"context"
	"maps"
	"math"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spoa-go/spoa"
)

// The files as they are must not make any HAProxy warn.
func TestE2EConfigWithoutWarning(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		for _, file := range []string{"haproxy.cfg", "sources.cfg"} {
			out, err := exec.Command(bin.path, "-c", "-f", "haproxy/"+file).CombinedOutput()
			if s := string(out); err != nil || strings.Contains(s, "[WARNING]") || strings.Contains(s, "[ALERT]") {
				t.Errorf("haproxy -c -f %s: %v\n%s", file, err, s)
			}
		}
	})
}

func TestE2EScore(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		agent := startAgent(t, "127.0.0.1:0")
		h := startHAProxy(t, bin, setup{agent: agent.addr, ipv6: hasIPv6(), logNormal: true})
		h.awaitServer(t, "UP", "L7OK")

		asked := 0
		for family, url := range map[string]string{"IPv4": h.url, "IPv6": h.url6} {
			if url == "" {
				t.Log("this machine has no ::1")
				continue
			}
			got := ask(t, url, 200)
			got.check(t)
			// 200 random scores have 87 different ones on average, with a deviation of 3.
			if n := got.distinct(); n < 50 {
				t.Errorf("%s: %d requests have %d different scores, want more", family, got.requests, n)
			}
			asked += got.requests
		}

		// One event for one request, all of them without an error.
		eventually(t, "SPOE log of every request", func() bool { return h.spoeLog.counts()["0"] >= asked })
		if n := h.spoeLog.counts(); len(n) != 1 || n["0"] != asked {
			t.Errorf("SPOE log has %v, want %d with status 0", n, asked)
		}
	})
}

func hasIPv6() bool {
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		return false
	}
	l.Close()
	return true
}

// In a frontend of mode http the event on-client-session is one per request, not one per connection.
func TestE2EKeepAlive(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		agent := startAgent(t, "127.0.0.1:0")
		h := startHAProxy(t, bin, setup{agent: agent.addr, logNormal: true})

		client := &http.Client{Transport: &http.Transport{MaxConnsPerHost: 1}, Timeout: patience}
		defer client.CloseIdleConnections()
		var got tally
		for range 100 {
			got.record(get(client, h.url))
		}
		got.check(t)
		eventually(t, "SPOE log of every request", func() bool { return h.spoeLog.counts()["0"] >= got.requests })
	})
}

// What a handler gets from `args src`: one argument without a name, the client's address. Its connections outlive
// the time that a HELLO may take.
func TestE2EHandler(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		const helloTimeout = 500 * time.Millisecond
		var mu sync.Mutex
		seen := map[string]int{}
		addr := serveHere(t, spoa.WithHelloTimeout(helloTimeout),
			spoa.WithHandlerFunc("check-client-ip", func(_ context.Context, m *spoa.Message, a *spoa.Actions) error {
				mu.Lock()
				defer mu.Unlock()
				for name, value := range m.Args() {
					seen[name+"="+value.String()]++
				}
				a.SetVar(spoa.ScopeSess, "ip_score", spoa.Uint32(100))
				return nil
			}))
		h := startHAProxy(t, bin, setup{agent: addr, ipv6: hasIPv6()})
		want := map[string]int{}
		for source, url := range map[string]string{"127.0.0.1": h.url, "::1": h.url6} {
			if url == "" {
				continue
			}
			got := ask(t, url, 50)
			got.check(t)
			want["="+source] = got.requests
		}
		mu.Lock()
		if !maps.Equal(want, seen) {
			t.Errorf("arguments: want %v, have %v", want, seen)
		}
		mu.Unlock()

		l := startLoad(t, h.url, 2)
		for begin := time.Now(); time.Since(begin) < 2*helloTimeout; {
			l.more(t, 10)
		}
		got := l.stop()
		got.check(t)
	})
}

// The rule rejects scores below 20, and these are 20 of the 101 there are.
func TestE2EReject(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		agent := startAgent(t, "127.0.0.1:0")
		h := startHAProxy(t, bin, setup{agent: agent.addr})
		got := ask(t, h.url, 1500)
		got.check(t)
		const share = 20.0 / 101
		n := float64(got.requests)
		mean, sigma := n*share, math.Sqrt(n*share*(1-share))
		if math.Abs(float64(got.denied)-mean) > 6*sigma {
			t.Errorf("%d of %d denied, want %.0f ± %.0f", got.denied, got.requests, mean, 6*sigma)
		}
	})
}

func TestE2EAgentRestart(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		agent := startAgent(t, freeAddr(t, "127.0.0.1"), "-drain", "3s")
		h := startHAProxy(t, bin, setup{agent: agent.addr, mayLose: true})
		h.awaitServer(t, "UP", "L7OK")

		// Whatever happens to the agent, requests are answered.
		l := startLoad(t, h.url, 2)
		l.more(t, 50)
		agent.shutdown(t)
		h.awaitServer(t, "DOWN", "")
		l.more(t, 50)
		down := ask(t, h.url, 10)
		down.checkAnswered(t)
		if down.missing != down.requests {
			t.Errorf("%d of %d answers have a score and there is no agent", down.requests-down.missing, down.requests)
		}

		startAgent(t, agent.addr)
		h.awaitServer(t, "UP", "L7OK")
		back := ask(t, h.url, 100)
		back.check(t)
		total := l.stop()
		total.checkAnswered(t)
	})
}

// An agent that ends while another one serves must cost nothing either.
func TestE2EDrain(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		const clients = 20
		leaving := startAgent(t, "127.0.0.1:0", "-drain", "10s")
		staying := startAgent(t, "127.0.0.1:0")
		h := startHAProxy(t, bin, setup{
			agent: leaving.addr,
			cfg: []string{
				"    server iprep-server", "    server staying " + staying.addr + " check inter 200ms\n    server iprep-server",
			},
			spoe: []string{"processing 10s", "processing 3s"}, // how long one that is lost waits
		})
		l := startLoad(t, h.url, clients)
		h.awaitServer(t, "UP", "L7OK")
		l.more(t, 500)
		leaving.shutdown(t)
		h.awaitServer(t, "DOWN", "")
		l.more(t, 100)
		h.checkNoError(t, l.stop())
	})
}

// A reload must cost nothing: no request and no score.
func TestE2EReload(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		agent := startAgent(t, "127.0.0.1:0")
		h := startHAProxy(t, bin, setup{agent: agent.addr, master: true})
		l := startLoad(t, h.url, 3)
		for range 2 {
			l.more(t, 100)
			h.reload(t)
		}
		l.more(t, 100)
		got := l.stop()
		got.check(t)
		if n := h.spoeLog.counts(); len(n) > 0 {
			t.Errorf("SPOE log has errors, by status: %v", n)
		}
	})
}

// Two engines of one HAProxy ask the same agent and keep its answers apart.
func TestE2ETwoEngines(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		agent := startAgent(t, "127.0.0.1:0")
		h := startHAProxy(t, bin, setup{
			agent: agent.addr,
			cfg: []string{
				"config ip-reputation.conf\n", "config ip-reputation.conf\n    filter spoe engine second config ip-reputation.conf\n",
				"    # For the reader:", "    http-after-response set-header X-Second-Score %[var(sess.second.ip_score)]\n    # For the reader:",
			},
			spoe: []string{"    event on-client-session\n", `    event on-client-session

[second]

spoe-agent second-agent
    log global
    messages check-client-ip
    option var-prefix second
    timeout hello      2s
    timeout idle       2m
    timeout processing 10s
    use-backend iprep-backend

spoe-message check-client-ip
    args src
    event on-client-session
`},
		})
		var first tally
		differ := 0
		client := newClient()
		for range 200 {
			resp, err := get(client, h.url)
			first.record(resp, err)
			if err != nil {
				continue
			}
			second, err := strconv.Atoi(resp.Header.Get("X-Second-Score"))
			if err != nil || second < 0 || second > 100 {
				t.Errorf("second engine: score %q", resp.Header["X-Second-Score"])
			}
			if strconv.Itoa(second) != resp.Header.Get("X-IP-Score") {
				differ++
			}
		}
		first.check(t)
		// 2 of 200 random pairs are equal on average.
		if differ < 150 {
			t.Errorf("%d of 200 pairs of scores differ, want most", differ)
		}
	})
}

func TestE2EUnixSocket(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		path := filepath.Join(shortTempDir(t), "agent.sock")
		startAgent(t, "unix:"+path)
		h := startHAProxy(t, bin, setup{agent: "unix@" + path})
		h.awaitServer(t, "UP", "L7OK")
		got := ask(t, h.url, 200)
		got.check(t)
	})
}
