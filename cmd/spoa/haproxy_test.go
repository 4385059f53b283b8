//go:build unix

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spoa-go/spoa"
)

// asAgent in the environment makes the test binary the command itself, so that tests run it as a process
// without building it, under the race detector if they are.
const asAgent = "SPOA_TEST_AS_AGENT"

// patience bounds every wait for another process. Only failing tests come near it.
const patience = time.Minute

func TestMain(m *testing.M) {
	if os.Getenv(asAgent) != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// Binaries

type haproxyBin struct {
	path, version string
}

// haproxyBins finds the programs to test with: those that SPOA_TEST_HAPROXY lists, or else the installed one.
var haproxyBins = sync.OnceValues(func() ([]haproxyBin, error) {
	paths := filepath.SplitList(os.Getenv("SPOA_TEST_HAPROXY"))
	if len(paths) == 0 {
		path, err := exec.LookPath("haproxy")
		if err != nil {
			path, err = exec.LookPath("/usr/sbin/haproxy") // often not in a user's PATH
		}
		if err != nil {
			return nil, nil
		}
		paths = []string{path}
	}
	var bins []haproxyBin
	for _, path := range paths {
		path, err := filepath.Abs(path) // tests start it elsewhere
		if err != nil {
			return nil, err
		}
		about, err := exec.Command(path, "-vv").Output()
		if err != nil {
			return nil, fmt.Errorf("%s -vv: %w", path, err)
		}
		version := regexp.MustCompile(`(?i)^HAProxy version (\d+\.\d+(?:\.\d+|-dev\d+)?)`).FindSubmatch(about)
		if version == nil {
			return nil, fmt.Errorf("%s -vv names no version: %q", path, firstLine(about))
		}
		if !bytes.Contains(about, []byte("[SPOE]")) { // an option of the build from 3.5 on
			return nil, fmt.Errorf("%s is built without SPOE", path)
		}
		bins = append(bins, haproxyBin{path, string(version[1])})
	}
	return bins, nil
})

func firstLine(b []byte) []byte {
	line, _, _ := bytes.Cut(b, []byte("\n"))
	return line
}

// forEachHAProxy runs f for every HAProxy found, as parallel subtests named by its version.
func forEachHAProxy(t *testing.T, f func(t *testing.T, bin haproxyBin)) {
	t.Helper()
	bins, err := haproxyBins()
	switch {
	case err != nil:
		t.Fatal(err)
	case len(bins) == 0 && os.Getenv("CI") != "":
		t.Fatal("no haproxy found: apt-get install -y haproxy")
	case len(bins) == 0:
		t.Skip("no haproxy found: apt-get install -y haproxy, or list programs in SPOA_TEST_HAPROXY")
	}
	t.Parallel()
	for _, bin := range bins {
		t.Run(bin.version, func(t *testing.T) {
			t.Parallel()
			f(t, bin)
		})
	}
}

// Processes

// A transcript collects what a process says and lets tests wait for it.
type transcript struct {
	mu   sync.Mutex
	text []byte
	more chan struct{} // closed when text grows
}

func (tr *transcript) Write(p []byte) (int, error) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.text = append(tr.text, p...)
	if tr.more != nil {
		close(tr.more)
		tr.more = nil
	}
	return len(p), nil
}

func (tr *transcript) String() string {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return string(tr.text)
}

// wait waits until ok says yes to the text, and reports whether it did before ctx
// ended.
func (tr *transcript) wait(ctx context.Context, ok func(text string) bool) bool {
	for {
		over := ctx.Err() != nil
		tr.mu.Lock()
		text := string(tr.text)
		if tr.more == nil {
			tr.more = make(chan struct{})
		}
		more := tr.more
		tr.mu.Unlock()
		switch {
		case ok(text):
			return true
		case over:
			return false
		}
		select {
		case <-more:
		case <-ctx.Done():
		}
	}
}

// find waits for a match of re and returns its groups, or nil when ctx ends first.
func (tr *transcript) find(ctx context.Context, re *regexp.Regexp) (groups []string) {
	tr.wait(ctx, func(text string) bool {
		groups = re.FindStringSubmatch(text)
		return groups != nil
	})
	return groups
}

// A process is a command that runs until it is stopped, or the test ends. It owns its own pid only.
type process struct {
	cmd  *exec.Cmd
	out  transcript      // both stdout and stderr
	ctx  context.Context // ends with the process
	err  error           // of Wait, once ctx is done
	gone atomic.Bool     // stop was called
}

// startProcess starts cmd; last is the signal that ends it with the test, if it is still there.
func startProcess(t *testing.T, cmd *exec.Cmd, last syscall.Signal) *process {
	t.Helper()
	p := &process{cmd: cmd}
	cmd.Stdout, cmd.Stderr = &p.out, &p.out
	cmd.WaitDelay = patience // a grandchild may hold the pipe
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p.ctx = ctx
	go func() {
		p.err = cmd.Wait()
		cancel()
	}()
	t.Cleanup(func() {
		p.stop(last)
		if t.Failed() {
			t.Logf("%s said:\n%s", filepath.Base(cmd.Path), p.out.String())
		}
	})
	return p
}

// stop signals the process, waits for its end and returns its exit error.
func (p *process) stop(sig syscall.Signal) error {
	if !p.gone.Swap(true) && p.ctx.Err() == nil {
		p.cmd.Process.Signal(sig)
	}
	select {
	case <-p.ctx.Done():
		return p.err
	case <-time.After(patience):
		p.cmd.Process.Kill()
		<-p.ctx.Done()
		return fmt.Errorf("did not end within %v of %v", patience, sig)
	}
}

// await returns what find finds for re, and fails the test when the process ends first or takes too long.
func (p *process) await(t *testing.T, re string) []string {
	t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	m := p.out.find(ctx, regexp.MustCompile(re))
	if m == nil {
		t.Fatalf("%s did not say %q (ended: %v)", filepath.Base(p.cmd.Path), re, p.ctx.Err() != nil)
	}
	return m
}

// awaitTimes waits until the process has said s that often. A regular expression
// for that takes seconds on a long text.
func (p *process) awaitTimes(t *testing.T, s string, times int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	if !p.out.wait(ctx, func(text string) bool { return strings.Count(text, s) >= times }) {
		t.Fatalf("%s did not say %q %d times (ended: %v)", filepath.Base(p.cmd.Path), s, times, p.ctx.Err() != nil)
	}
}

// eventually asks again, with short pauses, until ok says yes: for the state of other processes, which no event
// reports.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	pause := time.NewTicker(5 * time.Millisecond)
	defer pause.Stop()
	for deadline := time.Now().Add(patience); !ok(); <-pause.C {
		if time.Now().After(deadline) {
			t.Fatalf("waited %v for: %s", patience, what)
		}
	}
}

// The agent

type agentProcess struct {
	*process
	addr string // where it listens, as it says itself
}

// startAgent runs the command of this package and waits until it listens.
func startAgent(t *testing.T, listen string, args ...string) *agentProcess {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, append([]string{"-listen", listen}, args...)...)
	cmd.Env = append(os.Environ(), asAgent+"=1")
	p := startProcess(t, cmd, syscall.SIGKILL) // SIGTERM takes its time, see shutdown
	said := p.await(t, `msg=listening\b.*\baddr="?([^\s"]+)`)
	return &agentProcess{p, said[1]}
}

// shutdown asks the agent to end and expects that it does so cleanly.
func (a *agentProcess) shutdown(t *testing.T) {
	t.Helper()
	if err := a.stop(syscall.SIGTERM); err != nil {
		t.Errorf("agent after SIGTERM: %v", err)
	}
}

// serveHere runs an agent in the test's own process and returns its address.
func serveHere(t *testing.T, opts ...spoa.Option) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	agent := spoa.New(opts...)
	served := make(chan error, 1)
	go func() { served <- agent.Serve(l) }()
	t.Cleanup(func() {
		agent.Close()
		if err := <-served; !errors.Is(err, spoa.ErrAgentClosed) {
			t.Errorf("Serve: %v", err)
		}
	})
	return l.Addr().String()
}

// HAProxy

// setup says how a test's HAProxy differs from the files that the README shows.
type setup struct {
	agent     string   // address of the agent's server line
	file      string   // instead of haproxy.cfg
	cfg       []string // pairs of old and new text in that file
	spoe      []string // the same in ip-reputation.conf
	master    bool     // run master and worker, for reloads
	mayLose   bool     // the agent's server may go down
	ipv6      bool     // listen to ::1 too
	logNormal bool     // log successful SPOE processing as well
}

type haproxy struct {
	*process
	url, url6 string // of the frontend
	spoeLog   *syslog
	stats     string // socket of the worker
	master    string // socket of the master
}

// startHAProxy runs bin with the README's configuration and waits until it serves. Health checks are quicker
// and the processing timeout is longer: a test that misses an ACK fails by that, a slow machine does not.
func startHAProxy(t *testing.T, bin haproxyBin, s setup) *haproxy {
	t.Helper()
	dir := shortTempDir(t)
	front := freeAddr(t, "127.0.0.1")
	bind := "bind " + front
	h := &haproxy{
		url:     "http://" + front + "/",
		spoeLog: startSyslog(t),
		stats:   filepath.Join(dir, "stats"),
		master:  filepath.Join(dir, "master"),
	}
	if s.ipv6 {
		front6 := freeAddr(t, "::1")
		bind += "\n    bind " + front6
		h.url6 = "http://" + front6 + "/"
	}
	spoeLogging := "\n    log global"
	if !s.logNormal {
		spoeLogging += "\n    option dontlog-normal"
	}
	file := cmp.Or(s.file, "haproxy.cfg")
	edit(t, dir, file, append([]string{
		"global\n", "global\n    stats socket " + h.stats + " level admin\n    log " + h.spoeLog.addr + " local0\n",
		"bind 127.0.0.1:8080", bind,
		"option spop-check", "option spop-check\n    timeout check 5s", // not inter, too short for a busy machine
		"127.0.0.1:12345 check", s.agent + " check inter 100ms fall 2 rise 1",
	}, s.cfg...))
	edit(t, dir, "ip-reputation.conf", append([]string{
		"spoe-agent iprep-agent", "spoe-agent iprep-agent" + spoeLogging,
		"processing 500ms", "processing 10s",
	}, s.spoe...))

	mode := []string{"-db"}
	if s.master {
		mode = []string{"-W", "-S", h.master}
	}
	cmd := exec.Command(bin.path, append(mode, "-f", filepath.Join(dir, file))...)
	cmd.Dir = dir // HAProxy forgets default-path after the first filter with a file of its own
	h.process = startProcess(t, cmd, syscall.SIGTERM)
	t.Cleanup(func() { // runs before the process is stopped, which a master calls an ALERT too
		if h.ctx.Err() != nil {
			t.Errorf("haproxy ended by itself: %v", h.err)
		}
		for line := range strings.Lines(h.out.String()) {
			if strings.Contains(line, "[ALERT]") && !(s.mayLose && strings.Contains(line, "has no server available")) {
				t.Errorf("haproxy: %s", line)
			}
		}
	})
	eventually(t, "haproxy's frontends", func() bool {
		if h.ctx.Err() != nil {
			t.Fatalf("haproxy did not start: %v", h.err)
		}
		info, err := command(h.stats, "show info") // answered when it listens to all its addresses
		return err == nil && info != ""
	})
	return h
}

// edit copies a file of the directory haproxy to dir with each old text replaced, and insists that there is one.
func edit(t *testing.T, dir, name string, oldnew []string) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("haproxy", name))
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for i := 0; i < len(oldnew); i += 2 {
		if n := strings.Count(text, oldnew[i]); n != 1 {
			t.Fatalf("%s has %d times the text %q, want 1", name, n, oldnew[i])
		}
		text = strings.Replace(text, oldnew[i], oldnew[i+1], 1)
	}
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// shortTempDir is for sockets, whose paths must be shorter than t.TempDir's can be.
func shortTempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "spoa")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

var givenAddrs sync.Map // to tests of this process

// freeAddr returns an address that nobody listens to, below the ports which the kernel gives to anybody who asks for any.
func freeAddr(t *testing.T, host string) string {
	t.Helper()
	for range 100 {
		addr := net.JoinHostPort(host, strconv.Itoa(20000+rand.N(12000)))
		if _, given := givenAddrs.LoadOrStore(addr, true); given {
			continue
		}
		if l, err := net.Listen("tcp", addr); err == nil {
			l.Close()
			return addr
		}
	}
	t.Fatalf("no free port of %s", host)
	return ""
}

// command runs a command on the socket of a worker or a master.
func command(socket, command string) (string, error) {
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c, command+"\n"); err != nil {
		return "", err
	}
	c.CloseWrite() // a master would wait for more
	b, err := io.ReadAll(c)
	return string(b), err
}

// server returns what `show stat` says of a server of the agents: its status (UP, DOWN) and its last check (L7OK).
func (h *haproxy) server(t *testing.T, name string) (status, check string) {
	t.Helper()
	out, err := command(h.stats, "show stat iprep-backend 4 -1")
	if err != nil {
		return "", "" // a worker that is being replaced
	}
	rows, err := csv.NewReader(strings.NewReader(strings.TrimPrefix(strings.TrimSpace(out), "# "))).ReadAll()
	if err != nil || len(rows) < 2 {
		t.Fatalf("show stat: %v: %q", err, out)
	}
	column := func(row []string, name string) string { return row[slices.Index(rows[0], name)] }
	for _, row := range rows[1:] {
		if column(row, "svname") == name {
			status, _, _ = strings.Cut(column(row, "status"), " ")        // UP 1/2 while it goes down
			check = strings.TrimPrefix(column(row, "check_status"), "* ") // a check is under way
		}
	}
	return status, check
}

// awaitServer waits for a status and check result of the agent's server; an empty one may be anything.
func (h *haproxy) awaitServer(t *testing.T, status, check string) {
	t.Helper()
	h.awaitServerNamed(t, "iprep-server", status, check)
}

// awaitServerNamed is awaitServer for one of several.
func (h *haproxy) awaitServerNamed(t *testing.T, name, status, check string) {
	t.Helper()
	eventually(t, name+" "+status+" "+check, func() bool {
		s, c := h.server(t, name)
		return cmp.Or(status, s) == s && cmp.Or(check, c) == c
	})
}

// reload has the master replace its worker, and waits until the new one serves and the old one is gone.
func (h *haproxy) reload(t *testing.T) {
	t.Helper()
	var old, now int
	// The signal is lost on a master that does not answer yet.
	eventually(t, "haproxy's master", func() bool {
		old = h.worker()
		return old != 0
	})
	if err := h.cmd.Process.Signal(syscall.SIGUSR2); err != nil {
		t.Fatal(err)
	}
	eventually(t, "new worker", func() bool {
		now = h.worker()
		return now != 0 && now != old
	})
	// The master is no help here: 3.0 can miss that a worker ends while it starts again itself.
	eventually(t, "old worker's end", func() bool { return syscall.Kill(old, 0) == syscall.ESRCH })
}

var workerLine = regexp.MustCompile(`# workers\n(\d+)`)

// worker asks the master for the pid of its worker; 0 is none, or no answer.
func (h *haproxy) worker() int {
	out, err := command(h.master, "show proc")
	if m := workerLine.FindStringSubmatch(out); err == nil && m != nil {
		pid, _ := strconv.Atoi(m[1])
		return pid
	}
	return 0
}

// Syslog

// A syslog receives what HAProxy logs.
type syslog struct {
	addr string
	transcript
}

func startSyslog(t *testing.T) *syslog {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &syslog{addr: conn.LocalAddr().String()}
	var receiver sync.WaitGroup
	receiver.Go(func() {
		for b := make([]byte, 64<<10); ; {
			n, _, err := conn.ReadFrom(b)
			if err != nil {
				return
			}
			s.Write(append(bytes.TrimRight(b[:n], "\n\x00"), '\n'))
		}
	})
	t.Cleanup(func() {
		conn.Close()
		receiver.Wait()
		if t.Failed() {
			t.Logf("SPOE log:\n%s", s.String())
		}
	})
	return s
}

var spoeStatus = regexp.MustCompile(`SPOE: \[.*\] <.*> sid=\d+ st=(\d+)`)

// counts returns how many events HAProxy logged by their status: "0" is a success, "1" a timeout, "256" and above
// 256 more than the code of SPOP.
func (s *syslog) counts() map[string]int {
	n := map[string]int{}
	for _, m := range spoeStatus.FindAllStringSubmatch(s.String(), -1) {
		n[m[1]]++
	}
	return n
}

// Clients

// A tally says how requests went.
type tally struct {
	requests, denied, missing int // missing counts answers without a score
	scores                    [101]int
	faults                    map[string]int
}

// distinct returns how many different scores there were.
func (ta *tally) distinct() (n int) {
	for _, k := range ta.scores {
		n += min(k, 1)
	}
	return n
}

func (ta *tally) add(o tally) {
	ta.requests += o.requests
	ta.denied += o.denied
	ta.missing += o.missing
	for i, n := range o.scores {
		ta.scores[i] += n
	}
	for fault, n := range o.faults {
		ta.fault(fault, n)
	}
}

func (ta *tally) fault(what string, n int) {
	if ta.faults == nil {
		ta.faults = map[string]int{}
	}
	ta.faults[what] += n
}

// check expects that every request was answered, and with a score.
func (ta *tally) check(t *testing.T) {
	t.Helper()
	if ta.missing > 0 {
		t.Errorf("%d of %d answers have no score", ta.missing, ta.requests)
	}
	ta.checkAnswered(t)
}

// checkAnswered expects that every request was answered as its score demands.
func (ta *tally) checkAnswered(t *testing.T) {
	t.Helper()
	for fault, n := range ta.faults {
		t.Errorf("%d of %d requests: %s", n, ta.requests, fault)
	}
}

// record judges one answer.
func (ta *tally) record(resp *http.Response, err error) {
	ta.requests++
	if err != nil {
		if ue := errors.Unwrap(err); ue != nil {
			err = ue // without the URL
		}
		ta.fault(err.Error(), 1)
		return
	}
	header := resp.Header["X-Ip-Score"]
	want := http.StatusOK
	if header == nil {
		ta.missing++
	} else {
		score, err := strconv.Atoi(header[0])
		if err != nil || score < 0 || score > 100 {
			ta.fault("score "+strconv.Quote(header[0]), 1)
			return
		}
		ta.scores[score]++
		if score < 20 {
			want = http.StatusForbidden
			ta.denied++
		}
	}
	if resp.StatusCode != want {
		ta.fault(fmt.Sprintf("score %v has status %d", header, resp.StatusCode), 1)
	}
}

// A load is a number of clients that ask one after another, each time on a new connection, until stopped.
type load struct {
	done    atomic.Int64 // requests answered so far
	ctx     context.Context
	halt    context.CancelFunc
	clients sync.WaitGroup
	mu      sync.Mutex
	total   tally
}

func startLoad(t *testing.T, url string, clients int) *load {
	t.Helper()
	l := new(load)
	l.ctx, l.halt = context.WithCancel(context.Background())
	for range clients {
		l.clients.Go(func() {
			var own tally
			client := newClient()
			for l.ctx.Err() == nil {
				own.record(get(client, url))
				l.done.Add(1)
			}
			l.mu.Lock()
			defer l.mu.Unlock()
			l.total.add(own)
		})
	}
	t.Cleanup(func() { l.stop() })
	return l
}

// more waits until n more requests are answered.
func (l *load) more(t *testing.T, n int64) {
	t.Helper()
	goal := l.done.Load() + n
	eventually(t, fmt.Sprintf("%d more answers", n), func() bool { return l.done.Load() >= goal })
}

// stop lets requests under way finish and returns how all went.
func (l *load) stop() tally {
	l.halt()
	l.clients.Wait()
	return l.total
}

// ask makes n requests by some clients, each on a new connection.
func ask(t *testing.T, url string, n int64) tally {
	t.Helper()
	l := startLoad(t, url, 4)
	l.more(t, n)
	return l.stop()
}

// newClient returns a client whose every request has its own connection, and its own session in HAProxy.
func newClient() *http.Client {
	return &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 2 * patience}
}

// get returns the answer without its body, which has been read.
func get(client *http.Client, url string) (*http.Response, error) {
	resp, err := client.Get(url)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return resp, err
}

// unixClient speaks HTTP over a unix socket.
func unixClient(path string) *http.Client {
	return &http.Client{Timeout: patience, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
	}}
}

// fetch returns status and body.
func fetch(t *testing.T, c *http.Client, path string) string {
	t.Helper()
	resp, err := c.Get("http://spoa" + path)
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%d %s", resp.StatusCode, b)
}

func wantLines(t *testing.T, text string, lines ...string) {
	t.Helper()
	for _, line := range lines {
		if !strings.Contains("\n"+text, "\n"+line+"\n") {
			t.Errorf("want the line %s", line)
		}
	}
}
