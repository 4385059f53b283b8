//go:build unix

package main

import (
	"context"
	"encoding/csv"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/spoa-go/spoa/cmd/internal/certtest"
)

// startFleet runs bin with fleet.cfg and agents at these addresses. As in startHAProxy, timing is for tests: an answer
// that is missing must come to light as an error, not as a timeout.
func startFleet(t *testing.T, bin haproxyBin, agents [3]string, oldnew ...string) *haproxy {
	t.Helper()
	dir := shortTempDir(t)
	front := freeAddr(t, "127.0.0.1")
	h := &haproxy{url: "http://" + front + "/", stats: filepath.Join(dir, "stats")}
	edit(t, dir, "fleet.cfg", append([]string{
		"global\n", "global\n    stats socket " + h.stats + " level admin\n",
		"bind 127.0.0.1:8080", "bind " + front,
		"option spop-check", "option spop-check\n    timeout check 5s",
		"check inter 1s", "check inter 200ms",
		"127.0.0.1:12345", agents[0], "127.0.0.1:12346", agents[1], "127.0.0.1:12347", agents[2],
	}, oldnew...))
	edit(t, dir, "fleet-spoe.conf", []string{"processing 500ms", "processing 10s"})
	cmd := exec.Command(bin.path, "-db", "-f", filepath.Join(dir, "fleet.cfg"))
	cmd.Dir = dir
	h.process = startProcess(t, cmd, syscall.SIGTERM)
	h.awaitFleet(t, "UP", "UP", "UP")
	return h
}

// awaitFleet waits until the agents' servers have these states.
func (h *haproxy) awaitFleet(t *testing.T, want ...string) {
	t.Helper()
	eventually(t, fmt.Sprint("servers ", want), func() bool {
		if h.ctx.Err() != nil {
			t.Fatalf("haproxy ended: %v", h.err)
		}
		servers, err := h.fleet()
		if err != nil || len(servers) != len(want) {
			return false
		}
		for i, state := range want {
			// A server without a result of its first check is UP too.
			have := servers[i]
			if s, _, _ := strings.Cut(have["status"], " "); s != state || have["check_status"] == "INI" || have["check_status"] == "" {
				return false
			}
		}
		return true
	})
}

// fleet returns HAProxy's statistics of the agents' servers.
func (h *haproxy) fleet() (servers []map[string]string, err error) {
	out, err := command(h.stats, "show stat iprep-fleet 4 -1")
	if err != nil {
		return nil, err
	}
	rows, err := csv.NewReader(strings.NewReader(strings.TrimPrefix(strings.TrimSpace(out), "# "))).ReadAll()
	if err != nil || len(rows) == 0 {
		return nil, fmt.Errorf("statistics %q: %v", out, err)
	}
	for _, row := range rows[1:] {
		server := map[string]string{}
		for i, name := range rows[0] {
			server[name] = row[i]
		}
		servers = append(servers, server)
	}
	return servers, nil
}

// loopback returns a client that comes from another address of this machine with each connection.
func loopback() *http.Client {
	return &http.Client{Timeout: 2 * patience, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			from := net.IPv4(127, byte(1+rand.N(200)), byte(rand.N(255)), byte(1+rand.N(250)))
			return (&net.Dialer{LocalAddr: &net.TCPAddr{IP: from}}).DialContext(ctx, network, addr)
		},
	}}
}

func needLoopback(t *testing.T) {
	t.Helper()
	l, err := net.Listen("tcp", "127.1.2.3:0")
	if err != nil {
		t.Skipf("all of 127.0.0.0/8 is needed to look like many clients: %v", err)
	}
	l.Close()
}

func startAgents(t *testing.T, args ...string) (all [3]*agentProcess, addrs [3]string) {
	t.Helper()
	for i := range all {
		all[i] = startAgent(t, freeAddr(t, "127.0.0.1"), args...)
		addrs[i] = all[i].addr
	}
	return all, addrs
}

func TestE2EFleetWithoutWarning(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		out, err := exec.Command(bin.path, "-c", "-f", "haproxy/fleet.cfg").CombinedOutput()
		if s := string(out); err != nil || strings.Contains(s, "[WARNING]") || strings.Contains(s, "[ALERT]") {
			t.Errorf("haproxy -c: %v\n%s", err, s)
		}
	})
}

// A tap stands between HAProxy and an agent, and counts the NOTIFYs that have no ACK yet.
type tap struct {
	addr, agent string
	l           net.Listener
	unanswered  atomic.Int64
}

func startTap(t *testing.T, agent string) *tap {
	t.Helper()
	tp := &tap{addr: freeAddr(t, "127.0.0.1"), agent: agent}
	tp.listen(t)
	t.Cleanup(func() { tp.l.Close() })
	return tp
}

func (tp *tap) listen(t *testing.T) {
	t.Helper()
	l, err := net.Listen("tcp", tp.addr)
	if err != nil {
		t.Fatal(err)
	}
	tp.l = l
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go tp.forward(c.(*net.TCPConn))
		}
	}()
}

// forward ends what it says to HAProxy when the agent is gone, but counts what HAProxy still has to say.
func (tp *tap) forward(haproxy *net.TCPConn) {
	defer haproxy.Close()
	agent, err := net.Dial("tcp", tp.agent)
	if err != nil {
		return
	}
	go func() {
		frames(agent, haproxy, func(kind byte) {
			if kind == typeAck {
				tp.unanswered.Add(-1)
			}
		})
		haproxy.CloseWrite()
	}()
	frames(haproxy, agent, func(kind byte) {
		if kind == typeNotify {
			tp.unanswered.Add(1)
		}
	})
	agent.Close()
}

// frames copies frames, as long as they come, and tells the type of each.
func frames(from io.Reader, to io.Writer, tell func(kind byte)) {
	for {
		b, err := readFrame(from)
		if err != nil {
			return
		}
		tell(b[4])
		to.Write(b)
	}
}

// A fleetLoad is a number of clients, each with a new address for each request, that ask one after another until stopped.
type fleetLoad struct {
	answers, lost atomic.Int64 // lost are those without a verdict
	clients       sync.WaitGroup
	done          chan struct{}
}

func startFleetLoad(t *testing.T, url string, clients int) *fleetLoad {
	t.Helper()
	l := &fleetLoad{done: make(chan struct{})}
	for range clients {
		l.clients.Go(func() {
			c := loopback()
			for {
				select {
				case <-l.done:
					return
				default:
				}
				resp, err := get(c, url)
				switch {
				case err != nil:
					t.Errorf("HAProxy has not answered: %v", err)
					return
				case resp.StatusCode == http.StatusServiceUnavailable:
					l.lost.Add(1)
				case resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusForbidden:
					t.Errorf("status %d", resp.StatusCode)
				}
				l.answers.Add(1)
			}
		})
	}
	t.Cleanup(l.stop)
	return l
}

func (l *fleetLoad) more(t *testing.T, n int64) {
	t.Helper()
	goal := l.answers.Load() + n
	eventually(t, fmt.Sprintf("%d more answers", n), func() bool { return l.answers.Load() >= goal || t.Failed() })
}

func (l *fleetLoad) stop() {
	select {
	case <-l.done:
	default:
		close(l.done)
	}
	l.clients.Wait()
}

// An agent that is killed costs the requests that it held, and those who come later nothing, since a connection that is
// refused is not tried there again.
func TestE2EFleetKill(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		needLoopback(t)
		args := []string{"-t", "5ms", "-handler-timeout", "0s"} // so that no overload is answered
		agents, addrs := startAgents(t, args...)
		tap := startTap(t, addrs[1])
		h := startFleet(t, bin, [3]string{addrs[0], tap.addr, addrs[2]})
		load := startFleetLoad(t, h.url, 192)
		load.more(t, 1000)
		tap.l.Close()
		agents[1].stop(syscall.SIGKILL)
		load.more(t, 1000)
		h.awaitFleet(t, "UP", "DOWN", "UP")
		held, atOnce := tap.unanswered.Load(), load.lost.Load()
		load.more(t, 1000)
		startAgent(t, addrs[1], args...)
		tap.listen(t)
		h.awaitFleet(t, "UP", "UP", "UP")
		load.more(t, 1000)
		load.stop()
		if atOnce > held {
			t.Errorf("%d requests lost when the agent was killed that held %d", atOnce, held)
		}
		if n := load.lost.Load() - atOnce; n > 0 {
			t.Errorf("%d requests lost later, want none", n)
		}
		servers, err := h.fleet()
		if err != nil {
			t.Fatal(err)
		}
		if n := servers[1]["wretr"]; n != "0" {
			t.Errorf("%s connections tried again at the agent that was killed, want another agent at once", n)
		}
		t.Logf("%d of %d requests lost, %d held, %s connections sent to another agent", atOnce, load.answers.Load(), held, servers[1]["wredis"])
	})
}

// Without an agent no request passes, except for clients whose verdict is less than a minute old.
func TestE2EFleetFailsClosed(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		needLoopback(t)
		agents, addrs := startAgents(t)
		h := startFleet(t, bin, addrs)
		known := newClient()
		first, err := get(known, h.url)
		if err != nil || first.Header.Get("X-IP-Score") == "" {
			t.Fatalf("want a score, have %v, %v", first, err)
		}
		for range 20 { // random scores differ, those of the table don't
			resp, err := get(known, h.url)
			if err != nil || resp.Header.Get("X-IP-Score") != first.Header.Get("X-IP-Score") || resp.StatusCode != first.StatusCode {
				t.Fatalf("want the same score from the table, have %v, %v", resp, err)
			}
		}
		for _, a := range agents {
			a.stop(syscall.SIGKILL)
		}
		h.awaitFleet(t, "DOWN", "DOWN", "DOWN")
		for range 10 {
			resp, err := get(loopback(), h.url)
			if err != nil || resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("X-IP-Error") == "" {
				t.Fatalf("want a stranger refused with a reason, have %v, %v", resp, err)
			}
		}
		if resp, err := get(known, h.url); err != nil || resp.StatusCode != first.StatusCode {
			t.Errorf("want the verdict of the table, have %v, %v", resp, err)
		}
	})
}

// A verdict that is too old is asked for again, also by one connection, whose session remembers it.
func TestE2EFleetCacheEnds(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		agents, addrs := startAgents(t)
		h := startFleet(t, bin, addrs, "-m int lt 60", "-m int lt 0")
		client := &http.Client{Transport: &http.Transport{MaxConnsPerHost: 1}, Timeout: 2 * patience}
		defer client.CloseIdleConnections()
		scores := map[string]bool{}
		for range 30 {
			resp, err := get(client, h.url)
			if err != nil || resp.Header.Get("X-IP-Score") == "" {
				t.Fatalf("want a score, have %v, %v", resp, err)
			}
			scores[resp.Header.Get("X-IP-Score")] = true
		}
		if len(scores) < 10 {
			t.Errorf("want new scores, have %d of 30", len(scores))
		}
		for _, a := range agents {
			a.stop(syscall.SIGKILL)
		}
		h.awaitFleet(t, "DOWN", "DOWN", "DOWN")
		if resp, err := get(client, h.url); err != nil || resp.StatusCode != http.StatusServiceUnavailable {
			t.Errorf("want no stale verdict, have %v, %v", resp, err)
		}
	})
}

// The lists' verdicts, their names, and what an allow list is for.
func TestE2ELists(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		needLoopback(t)
		dir := t.TempDir()
		drop, own := filepath.Join(dir, "drop.txt"), filepath.Join(dir, "own.txt")
		writeFile(t, drop, "127.0.0.0/8 ; SBL1\n127.9.0.0/16 50\n")
		writeFile(t, own, "127.0.0.2\n")
		_, addrs := startAgents(t, "-reputation", drop+"=7,column=score", "-allow", own)
		h := startFleet(t, bin, addrs)
		for from, want := range map[string]string{"127.0.0.1": "403 7 drop", "127.9.0.1": "200 50 drop", "127.0.0.2": "200 100 "} {
			c := newClient()
			c.Transport.(*http.Transport).DialContext = (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}).DialContext
			resp, err := get(c, h.url)
			if err != nil {
				t.Fatal(err)
			}
			if have := fmt.Sprint(resp.StatusCode, " ", resp.Header.Get("X-IP-Score"), " ", resp.Header.Get("X-IP-List")); want != have {
				t.Errorf("%s: want %q, have %q", from, want, have)
			}
		}
	})
}

func TestE2EMutualTLS(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		dir := shortTempDir(t)
		ours, theirs := certtest.New(t, dir, "ca"), certtest.New(t, dir, "strange-ca")
		ours.Issue(t, "agent", "127.0.0.1")
		ours.Issue(t, "haproxy", "127.0.0.1")
		theirs.Issue(t, "stranger", "127.0.0.1")
		agent := startAgent(t, "127.0.0.1:0",
			"-tls-cert", ours.File("agent"), "-tls-key", ours.File("agent"), "-tls-client-ca", ours.File("ca"))
		server := agent.addr + " ssl verify required ca-file " + ours.File("ca")
		h := startHAProxy(t, bin, setup{agent: server + " crt " + ours.File("haproxy")})
		h.awaitServer(t, "UP", "L7OK")
		got := ask(t, h.url, 200)
		got.check(t)
		for what, s := range map[string]string{
			"no certificate":         server,
			"a strange certificate":  server + " crt " + ours.File("stranger"),
			"trust in somebody else": agent.addr + " ssl verify required ca-file " + ours.File("strange-ca") + " crt " + ours.File("haproxy"),
			"no TLS":                 agent.addr,
		} {
			h := startHAProxy(t, bin, setup{agent: s, mayLose: true})
			h.awaitServer(t, "DOWN", "")
			got := ask(t, h.url, 3)
			if got.missing != got.requests {
				t.Errorf("%s: want no score, have %d of %d", what, got.requests-got.missing, got.requests)
			}
		}
	})
}

func TestE2ESystemdSocket(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		tcp, addr := socketFile(t, "tcp", "127.0.0.1:0")
		passed(t, []*os.File{tcp}).await(t, `msg=listening`)
		h := startHAProxy(t, bin, setup{agent: addr})
		h.awaitServer(t, "UP", "L7OK")
		got := ask(t, h.url, 200)
		got.check(t)
	})
}

// The metrics agree with what HAProxy's clients have seen.
func TestE2EMetrics(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		path := filepath.Join(shortTempDir(t), "m")
		agent := startAgent(t, "127.0.0.1:0", "-metrics", "unix:"+path)
		h := startHAProxy(t, bin, setup{agent: agent.addr})
		h.awaitServer(t, "UP", "L7OK")
		got := ask(t, h.url, 100)
		got.check(t)
		text := fetch(t, unixClient(path), "/metrics")
		wantLines(t, text, fmt.Sprintf(`spoa_messages_total{message="check-client-ip",outcome="ok"} %d`, got.requests),
			fmt.Sprintf(`spoa_verdicts_total{list="",verdict="random"} %d`, got.requests))
		for _, re := range []string{`(?m)^spoa_health_checks_total [1-9]`, `(?m)^spoa_connections\{state="idle"\} [1-9]`} {
			if !regexp.MustCompile(re).MatchString(text) {
				t.Errorf("want %s", re)
			}
		}
		if page := fetch(t, unixClient(path), "/"); !strings.Contains(page, `<td data-label="failed">0</td>`) {
			t.Errorf("want a page without failures, have %q", page)
		}
	})
}

// The unit files, as systemd understands them.
func TestSystemdUnits(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("no systemd-analyze found: apt-get install -y systemd")
		}
		t.Skip("no systemd-analyze found: apt-get install -y systemd")
	}
	out, err := exec.Command(analyze, "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`systemd (\d+)`).FindSubmatch(out)
	if m == nil {
		t.Fatalf("systemd-analyze --version: %q", out)
	}
	version, _ := strconv.Atoi(string(m[1]))
	dir := t.TempDir()
	bin := filepath.Join(dir, "spoa")
	writeFile(t, bin, "#!/bin/sh\n")
	if err := os.Chmod(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, name := range []string{"spoa.service", "spoa.socket"} {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, filepath.Join(dir, name))
		writeFile(t, files[len(files)-1], strings.ReplaceAll(string(b), "/usr/local/bin/spoa", bin))
	}
	if version >= 253 { // the first to know notify-reload
		b, err := os.ReadFile("notify-reload.conf")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(filepath.Join(dir, "spoa.service.d"), 0o755); err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, "spoa.service.d", "notify-reload.conf"), string(b))
	}
	out, err = exec.Command(analyze, append([]string{"verify", "--man=no"}, files...)...).CombinedOutput()
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, dir) || strings.Contains(line, "spoa.s") { // others' units are not ours to judge
			t.Errorf("systemd-analyze: %s", line)
		}
	}
	if err != nil {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}

// HAProxy's own names for abstract sockets, of which it knows abnsz from 3.2 on.
func TestE2EAbstractSocket(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("abstract sockets are Linux's own")
	}
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		forms := []string{"abns@"}
		if !bin.older() {
			forms = append(forms, "abnsz@")
		}
		for _, form := range forms {
			addr := fmt.Sprintf("%sspoa-%d-%s", form, os.Getpid(), bin.version)
			agent := startAgent(t, addr)
			h := startHAProxy(t, bin, setup{agent: addr})
			h.awaitServer(t, "UP", "L7OK")
			got := ask(t, h.url, 10)
			got.check(t)
			agent.await(t, "addr="+regexp.QuoteMeta(addr))
		}
	})
}

// Behind a proxy the client's address is in a header, and the message may have other arguments.
func TestE2EForwardedFor(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		list := filepath.Join(t.TempDir(), "list")
		writeFile(t, list, "192.0.2.1\n")
		agent := startAgent(t, "127.0.0.1:0", "-reputation", list+"=33", "-trust-proxy", "198.51.100.0/24")
		h := startHAProxy(t, bin, setup{agent: agent.addr, spoe: []string{
			"    args src\n", "    args path=path ip=req.fhdr(x-forwarded-for)\n",
			"event on-client-session", "event on-frontend-http-request",
		}})
		h.awaitServer(t, "UP", "L7OK")
		for forwarded, want := range map[string]string{
			"192.0.2.1":                          "33",
			"192.0.2.1:1234":                     "33",
			"203.0.113.1, 192.0.2.1":             "33",
			"192.0.2.1, 203.0.113.1":             "100",
			"8.8.8.8, 192.0.2.1, 198.51.100.200": "33",
			"unknown":                            "error",
			"":                                   "error",
		} {
			req, err := http.NewRequest("GET", h.url, nil)
			if err != nil {
				t.Fatal(err)
			}
			if forwarded != "" {
				req.Header.Set("X-Forwarded-For", forwarded)
			}
			resp, err := do(newClient(), req)
			if err != nil {
				t.Fatal(err)
			}
			if have := resp.Header.Get("X-IP-Score") + resp.Header.Get("X-IP-Fault"); have != want {
				t.Errorf("%q: want %s, have %q", forwarded, want, have)
			}
		}
		agent.await(t, `msg="handler failed".*want an address`)
	})
}
