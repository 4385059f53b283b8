package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spoa-go/spoa"
)

var spop string // the command

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "spop")
	if err != nil {
		panic(err)
	}
	spop = filepath.Join(dir, "spop")
	status := 1
	build := []string{"build", "-o", spop}
	if os.Getenv("GOCOVERDIR") != "" { // where the command then writes what was covered
		build = append(build, "-cover")
	}
	if out, err := exec.Command("go", append(build, ".")...).CombinedOutput(); err != nil {
		os.Stderr.Write(out)
	} else {
		status = m.Run()
	}
	os.RemoveAll(dir)
	os.Exit(status)
}

// command runs spop to its end.
func command(t *testing.T, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(t.Context(), spop, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// echo sets a variable for each argument.
func echo(_ context.Context, m *spoa.Message, a *spoa.Actions) error {
	for name, v := range m.Args() {
		if name == "" {
			name = "unnamed"
		}
		a.SetVar(spoa.ScopeTxn, name, v)
	}
	return nil
}

func unset(_ context.Context, _ *spoa.Message, a *spoa.Actions) error {
	a.UnsetVar(spoa.ScopeReq, "x")
	return nil
}

// agent serves on 127.0.0.1 and returns its address.
func agent(t *testing.T, opts ...spoa.Option) string {
	t.Helper()
	return serve(t, listenLocal(t, "tcp", "127.0.0.1:0"), opts...)
}

func listenLocal(t *testing.T, network, address string) net.Listener {
	t.Helper()
	ln, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

func serve(t *testing.T, ln net.Listener, opts ...spoa.Option) string {
	a := spoa.New(append(opts, spoa.WithHandlerFunc("echo", echo), spoa.WithHandlerFunc("unset", unset))...)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := a.Serve(ln); err != spoa.ErrAgentClosed {
			t.Errorf("Serve: %v", err)
		}
	}()
	t.Cleanup(func() {
		a.Close()
		<-done
	})
	return ln.Addr().String()
}

func TestNotify(t *testing.T) {
	addr := agent(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("from a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ args, want string }{
		{"unset", "unset-var req.x"},
		{"echo ip:192.0.2.1", "set-var txn.unnamed ip 192.0.2.1"},
		{"echo a=ip:2001:db8::1", "set-var txn.a ip 2001:db8::1"},
		{"echo a=ip:::ffff:192.0.2.1", "set-var txn.a ip 192.0.2.1"},
		{"echo a=null", "set-var txn.a null"},
		{"echo null", "set-var txn.unnamed null"},
		{"echo a=bool:true b=bool:false", "set-var txn.a bool true\nset-var txn.b bool false"},
		{"echo a=int:-3 b=int64:9223372036854775807", "set-var txn.a int -3\nset-var txn.b int 9223372036854775807"},
		{"echo a=int32:-2147483648", "set-var txn.a int32 -2147483648"},
		{"echo a=uint32:4294967295", "set-var txn.a uint32 4294967295"},
		{"echo a=uint64:18446744073709551615", "set-var txn.a uint64 18446744073709551615"},
		{"echo a=str:GET b=str:/?x=1&y=a:b c=str:", "set-var txn.a str GET\nset-var txn.b str /?x=1&y=a:b\nset-var txn.c str "},
		{"echo str:x=y", "set-var txn.unnamed str x=y"},
		{"echo =str:x", "set-var txn.unnamed str x"},
		{"echo a=str:two\nlines", `set-var txn.a str "two\nlines"`},
		{`echo a=str:"`, `set-var txn.a str "\""`},
		{`echo a=str:"quoted"\n`, `set-var txn.a str "\"quoted\"\\n"`},
		{"echo a=bin:\xff@", "set-var txn.a hex ff40"},
		{"echo a=bin:text", "set-var txn.a bin text"},
		{"echo a=bin:@" + file, "set-var txn.a bin from a file"},
		{"echo a=hex:00ff", "set-var txn.a hex 00ff"},
		{"echo a=hex:40", "set-var txn.a hex 40"}, // bin:@ would be a file
		{"-n 3 echo a=int:1", "set-var txn.a int 1\nset-var txn.a int 1\nset-var txn.a int 1"},
	} {
		args := append([]string{"notify", "-addr", addr}, strings.Split(tc.args, " ")...)
		stdout, stderr, status := command(t, args...)
		if want := strings.TrimPrefix(tc.want+"\n", "\n"); stdout != want || stderr != "" || status != 0 {
			t.Errorf("%s: want %q, have %q, %q, status %d", tc.args, want, stdout, stderr, status)
		}
	}
}

func TestNotifyNoAction(t *testing.T) {
	addr := agent(t)
	wantFailure(t, 1, "does the agent know the message unknown?", "notify", "-addr", addr, "unknown")
	wantFailure(t, 1, `does the agent know the message "two\nlines"?`, "notify", "-addr", addr, "-n", "2", "two\nlines")
}

func TestNotifyJSON(t *testing.T) {
	stdout, stderr, status := command(t, "notify", "-json", "-addr", agent(t), "echo",
		"a=uint64:18446744073709551615", "b=hex:00ff", "c=null", "d=bool:false", "e=ip:192.0.2.1", "f=str:x\ny")
	want := `"actions":[` +
		`{"action":"set-var","scope":"txn","name":"a","type":"uint64","value":18446744073709551615},` +
		`{"action":"set-var","scope":"txn","name":"b","type":"bin","value":"AP8="},` +
		`{"action":"set-var","scope":"txn","name":"c","type":"null"},` +
		`{"action":"set-var","scope":"txn","name":"d","type":"bool","value":false},` +
		`{"action":"set-var","scope":"txn","name":"e","type":"ip","value":"192.0.2.1"},` +
		`{"action":"set-var","scope":"txn","name":"f","type":"str","value":"x\ny"}]}` + "\n"
	head, have, _ := strings.Cut(stdout, ",")
	if want != have || !regexp.MustCompile(`^{"us":[0-9.]+$`).MatchString(head) || stderr != "" || status != 0 {
		t.Errorf("want %s, have %s, %q, status %d", want, stdout, stderr, status)
	}
}

func TestNotifyUnixVerbose(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent")
	serve(t, listenLocal(t, "unix", path))
	stdout, stderr, status := command(t, "notify", "-v", "-addr", "unix:"+path, "echo", "a=int:1")
	if stdout != "set-var txn.a int 1\n" || status != 0 {
		t.Errorf("have %q, status %d", stdout, status)
	}
	lines := strings.Split(stderr, "\n")
	for i, want := range []string{
		"> HAPROXY-HELLO ", "< AGENT-HELLO ", "> NOTIFY 1:1 echo(a=int64 ", "< ACK 1:1 set-var txn.a ",
		"> HAPROXY-DISCONNECT ", "< AGENT-DISCONNECT ",
	} {
		if i >= len(lines) || !strings.HasPrefix(lines[i], want) {
			t.Fatalf("line %d: want %s, have %q", i, want, stderr)
		}
	}
}

// deaf accepts and never answers.
func deaf(t *testing.T) string {
	return listenLocal(t, "tcp", "127.0.0.1:0").Addr().String()
}

func TestNoAnswer(t *testing.T) {
	gone := listenLocal(t, "tcp", "127.0.0.1:0")
	gone.Close()
	stop := make(chan struct{})
	defer close(stop)
	slow := agent(t, spoa.WithHandlerFunc("slow", func(ctx context.Context, _ *spoa.Message, _ *spoa.Actions) error {
		select {
		case <-stop:
		case <-ctx.Done():
		}
		return nil
	}))
	for _, tc := range []struct{ name, args, want string }{
		{"refused", "-addr " + gone.Addr().String() + " m", "connection refused"},
		{"no HELLO", "-addr " + deaf(t) + " -timeout 10ms m", "no answer within 10ms"},
		{"no ACK", "-addr " + slow + " -timeout 50ms slow", "no answer within 50ms"},
		{"no socket", "-addr unix:/nowhere/agent m", "/nowhere/agent"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			wantFailure(t, 1, tc.want, append([]string{"notify"}, strings.Split(tc.args, " ")...)...)
		})
	}
	t.Run("check", func(t *testing.T) {
		wantFailure(t, 1, "no answer within 10ms", "check", "-addr", deaf(t), "-timeout", "10ms")
	})
	t.Run("bench", func(t *testing.T) {
		wantFailure(t, 1, "connection refused", "bench", "-addr", gone.Addr().String(), "-conns", "3", "m")
	})
}

// wantFailure wants one line on standard error, which holds want, and nothing
// else.
func wantFailure(t *testing.T, status int, want string, args ...string) {
	t.Helper()
	stdout, stderr, have := command(t, args...)
	oneLine := stderr != "" && strings.Index(stderr, "\n") == len(stderr)-1
	if have != status || stdout != "" || !oneLine || !strings.Contains(stderr, want) {
		t.Errorf("%q: want status %d and a line with %q, have status %d, %q, %q", args, status, want, have, stdout, stderr)
	}
}

func TestUsage(t *testing.T) {
	const types = "want null, bool, int, int32, int64, uint32, uint64, ip, str, bin or hex"
	for _, tc := range []struct{ args, want string }{
		{"frobnicate", "want spop notify, check or bench"},
		{"notify", "want MESSAGE [NAME=]TYPE:VALUE..."},
		{"notify -frob m", "-frob: want spop notify [-addr A]"},
		{"notify -addr 12345 m", "want host:port, unix:/path"},
		{"notify -addr unix: m", "want host:port, unix:/path"},
		{"notify -timeout 0s m", "want more than 0"},
		{"notify -timeout 5 m", "for flag -timeout: want a time with its unit, such as 500ms or 10s"},
		{"notify -n 0 m", "for flag -n: want a number of times from 1 to"},
		{"notify m -json", "want flags before MESSAGE"},
		{"notify m x", "want [NAME=]TYPE:VALUE"},
		{"notify m null:", `argument "null:": want [NAME=]TYPE:VALUE`},
		{"notify m ", `argument "": want one argument`},
		{"notify m a=192.0.2.1", "want [NAME=]TYPE:VALUE"},
		{"notify m a=string:x", types},
		{"notify m a=bool:1", "want true or false"},
		{"notify m a=int:9223372036854775808", "from -2^63 to 2^63-1"},
		{"notify m a=int32:2147483648", "from -2^31 to 2^31-1"},
		{"notify m a=uint32:-1", "from 0 to 2^32-1"},
		{"notify m a=uint64:x", "from 0 to 2^64-1"},
		{"notify m a=ip:192.0.2.256", "want an address"},
		{"notify m a=ip:fe80::1%lo", "want an address"},
		{"notify m a=hex:0", "even number of hexadecimal digits"},
		{"notify m a=bin:@/nowhere/file", "/nowhere/file"},
		{"notify m" + strings.Repeat(" null", 256), "want at most 255"},
		{"check m", `unexpected argument "m"`},
		{"check -json=maybe", "want spop check"},
		{"bench", "want MESSAGE"},
		{"bench -conns 0 m", "for flag -conns: want a number of connections from 1 to 65536"},
		{"bench -inflight 1025 m", "for flag -inflight: want a number of NOTIFYs from 1 to 1024"},
		{"bench -rate -1 m", "-rate -1: want"},
		{"bench -rate NaN m", "-rate NaN: want"},
		{"bench -duration -1s m", "for flag -duration: want a time with its unit"},
		{"bench -count -1 m", "-count -1: want"},
		{"bench -p99 -1s m", "for flag -p99: want a time with its unit"},
		{"bench -warmup -1s m", "for flag -warmup: want a time with its unit"},
		{"bench -warmup 1s -count 1 m", "-warmup and -count: want one"},
		{"bench -expect ip_score m", "not of the form SCOPE.NAME"},
		{"bench -expect conn.ip_score m", "not of the form SCOPE.NAME"},
	} {
		wantFailure(t, 2, tc.want, strings.Split(tc.args, " ")...)
	}
	if stdout, stderr, status := command(t); stdout != "" || stderr != usage || status != 2 {
		t.Errorf("no arguments: have %q, %q, status %d", stdout, stderr, status)
	}
	for args, want := range map[string]string{
		"-h": usage, "help": usage, "notify -h": notifyUsage, "check -help": checkUsage, "bench -json -h": benchUsage,
	} {
		stdout, stderr, status := command(t, strings.Split(args, " ")...)
		if stdout != want || stderr != "" || status != 0 {
			t.Errorf("%s: have %q, %q, status %d", args, stdout, stderr, status)
		}
	}
}

func TestCheck(t *testing.T) {
	addr := agent(t)
	if stdout, stderr, status := command(t, "check", "-addr", addr); stdout != "version 2.0\nmax-frame-size 16380\ncapabilities none\n" ||
		stderr != "" || status != 0 {
		t.Errorf("have %q, %q, status %d", stdout, stderr, status)
	}
	if stdout, stderr, status := command(t, "check", "-json", "-v", "-addr", addr); stdout !=
		`{"version":"2.0","max_frame_size":16380,"capabilities":[]}`+"\n" || status != 0 ||
		!strings.HasPrefix(stderr, "> HAPROXY-HELLO ") || strings.Count(stderr, "\n") != 2 {
		t.Errorf("have %q, %q, status %d", stdout, stderr, status)
	}
}

// sshServer speaks first.
func sshServer(t *testing.T) string {
	ln := listenLocal(t, "tcp", "127.0.0.1:0")
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(conn, "SSH-2.0-x\r\n")
			_, _ = io.Copy(io.Discard, conn)
			conn.Close()
		}
	}()
	return ln.Addr().String()
}

// result is what the tests look at in bench -json.
type result struct {
	Answers int64 `json:"answers"`
	Hello   struct {
		Capabilities []string `json:"capabilities"`
	} `json:"hello"`
	Inflight int     `json:"inflight"`
	Seconds  float64 `json:"seconds"`
	Rate     float64 `json:"rate"`
	Latency  struct {
		P50 float64 `json:"p50"`
		Max float64 `json:"max"`
	} `json:"latency_us"`
	Unsent int64            `json:"unsent"`
	Wrong  int64            `json:"wrong"`
	Errors int64            `json:"errors"`
	Kinds  map[string]int64 `json:"error_kinds"`
}

func benchJSON(t *testing.T, args ...string) (r result, stderr string, status int) {
	t.Helper()
	stdout, stderr, status := command(t, append([]string{"bench", "-json"}, args...)...)
	if err := json.Unmarshal([]byte(stdout), &r); err != nil {
		t.Fatalf("%v: %q, %q", err, stdout, stderr)
	}
	return r, stderr, status
}

func TestBench(t *testing.T) {
	var calls atomic.Int64
	addr := agent(t, spoa.WithHandlerFunc("counted", func(_ context.Context, _ *spoa.Message, a *spoa.Actions) error {
		calls.Add(1)
		a.SetVar(spoa.ScopeSess, "n", spoa.Int64(1))
		return nil
	}))
	r, stderr, status := benchJSON(t, "-addr", addr, "-conns", "3", "-inflight", "7", "-count", "1000",
		"-expect", "sess.n", "counted", "int:1")
	if n := calls.Load(); n != 1000 || r.Answers != 1000 || r.Wrong != 0 || r.Errors != 0 || r.Unsent != 0 || status != 0 || stderr != "" {
		t.Errorf("%d calls, %+v, status %d, %q", n, r, status, stderr)
	}
	if r.Latency.P50 <= 0 || r.Latency.P50 > r.Latency.Max || r.Latency.Max > r.Seconds*1e6 || r.Rate < 999/r.Seconds {
		t.Errorf("%+v", r)
	}
	calls.Store(0)
	r, _, status = benchJSON(t, "-addr", addr, "-conns", "2", "-rate", "2000", "-count", "101", "counted")
	if n := calls.Load(); n != 101 || r.Answers != 101 || r.Errors != 0 || status != 0 || r.Seconds < 0.05 {
		t.Errorf("-rate: %d calls, %+v, status %d", n, r, status)
	}
	r, _, status = benchJSON(t, "-addr", addr, "-count", "10", "-expect", "txn.n", "counted")
	if r.Wrong != 10 || r.Kinds["answer without txn.n"] != 10 || status != 1 {
		t.Errorf("-expect: %+v, status %d", r, status)
	}
	stdout, _, status := command(t, "bench", "-addr", addr, "-count", "20", "counted")
	for _, want := range []string{`(?m)^answers   \d+ in `, `(?m)^latency   p50 .* p99.9 .* max `, `(?m)^errors    0$`, `(?m)^  < .*%  #+$`} {
		if !regexp.MustCompile(want).MatchString(stdout) {
			t.Errorf("want %s, have %q", want, stdout)
		}
	}
	if status != 0 {
		t.Errorf("status %d", status)
	}
}

func TestBenchP99(t *testing.T) {
	addr := agent(t, spoa.WithHandlerFunc("slow", func(context.Context, *spoa.Message, *spoa.Actions) error {
		<-time.After(20 * time.Millisecond)
		return nil
	}))
	args := []string{"bench", "-addr", addr, "-count", "10", "-p99"}
	if _, stderr, status := command(t, append(args, "1ms", "slow")...); status != 1 || !regexp.MustCompile(`^spop bench: p99 is \S+ms: want at most 1ms\n$`).MatchString(stderr) {
		t.Errorf("want failure and why, have status %d, %q", status, stderr)
	}
	if _, stderr, status := command(t, append(args, "1h", "slow")...); status != 0 || stderr != "" {
		t.Errorf("want success, have status %d, %q", status, stderr)
	}
}

// What happens in the warm-up does not count.
func TestBenchWarmup(t *testing.T) {
	var calls atomic.Int64
	addr := agent(t, spoa.WithHandlerFunc("cold", func(_ context.Context, _ *spoa.Message, a *spoa.Actions) error {
		if calls.Add(1) > 1 {
			a.SetVar(spoa.ScopeSess, "warm", spoa.Bool(true))
		}
		return nil
	}))
	const warmup = 1500 * time.Millisecond
	began := time.Now()
	r, stderr, status := benchJSON(t, "-addr", addr, "-rate", "200", "-warmup", warmup.String(), "-duration", "1s", "-expect", "sess.warm", "cold")
	rest := time.Since(began) - warmup
	if r.Wrong != 0 || status != 0 || r.Seconds > rest.Seconds() || r.Answers == 0 || r.Answers >= calls.Load() {
		t.Errorf("%d calls, %v besides the warm-up, %+v, status %d, %q", calls.Load(), rest, r, status, stderr)
	}
}

func TestFitting(t *testing.T) {
	parts := []string{"  1s", "100/s", "p50 12µs", "p99 1ms"}
	for columns, want := range map[int]string{
		0: "  1s  100/s  p50 12µs  p99 1ms", -1: "  1s  100/s  p50 12µs  p99 1ms", 30: "  1s  100/s  p50 12µs  p99 1ms",
		29: "  1s  100/s  p50 12µs", 21: "  1s  100/s  p50 12µs", 20: "  1s  100/s", 3: "",
	} {
		if have := fitting(parts, columns); have != want {
			t.Errorf("%d columns: want %q, have %q", columns, want, have)
		}
	}
}

func TestBenchWithoutPipelining(t *testing.T) {
	r, stderr, status := benchJSON(t, "-addr", agent(t, spoa.WithPipelining(1)), "-count", "100", "echo")
	if r.Answers != 100 || r.Inflight != 1 || status != 0 || !strings.Contains(stderr, "-inflight 1") {
		t.Errorf("%+v, status %d, %q", r, status, stderr)
	}
}

// What is due while the agent stalls counts from then: no coordinated omission.
func TestBenchStall(t *testing.T) {
	const stall = 300 * time.Millisecond
	var first atomic.Bool
	addr := agent(t, spoa.WithPipelining(1), spoa.WithHandlerFunc("stall", func(_ context.Context, _ *spoa.Message, _ *spoa.Actions) error {
		if !first.Swap(true) {
			<-time.After(stall)
		}
		return nil
	}))
	// All are due in the first 100ms, and none is answered in the first 300.
	r, _, status := benchJSON(t, "-addr", addr, "-rate", "1000", "-count", "100", "stall")
	if r.Answers != 100 || status != 0 || r.Latency.P50 < 200e3 {
		t.Errorf("want p50 of 200ms or more: %+v, status %d", r, status)
	}
}

// No answer at all is no rate either.
func TestBenchRefused(t *testing.T) {
	ln := listenLocal(t, "tcp", "127.0.0.1:0")
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(conn, agentHello)
			_, _ = io.ReadFull(conn, make([]byte, len(agentHello)+100)) // the HELLO and more
			conn.Close()
		}
	}()
	r, stderr, status := benchJSON(t, "-addr", ln.Addr().String(), "-count", "3", "m", "str:"+strings.Repeat("x", 200))
	if r.Answers != 0 || r.Rate != 0 || r.Errors != 3 || status != 1 {
		t.Errorf("%+v, status %d, %q", r, status, stderr)
	}
}

const agentHello = "\x00\x00\x00\x36\x65\x00\x00\x00\x01\x00\x00" +
	"\x07version\x08\x032.0" +
	"\x0emax-frame-size\x03\xfc\xf0\x06" + // 16380
	"\x0ccapabilities\x08\x00"

// Connections that end are replaced, and counted.
func TestBenchReconnects(t *testing.T) {
	var calls atomic.Int64
	addr := agent(t, spoa.WithRotation(10), spoa.WithPipelining(1), spoa.WithHandlerFunc("counted",
		func(_ context.Context, _ *spoa.Message, _ *spoa.Actions) error {
			calls.Add(1)
			return nil
		}))
	r, _, _ := benchJSON(t, "-addr", addr, "-count", "100", "counted")
	if r.Answers+r.Errors != 100 || r.Answers < 50 || calls.Load() < r.Answers {
		t.Errorf("%+v, %d calls", r, calls.Load())
	}
}

func TestBenchNoAnswers(t *testing.T) {
	stop := make(chan struct{})
	defer close(stop)
	addr := agent(t, spoa.WithHandlerFunc("slow", func(ctx context.Context, _ *spoa.Message, _ *spoa.Actions) error {
		select {
		case <-stop:
		case <-ctx.Done():
		}
		return nil
	}))
	args := []string{"-addr", addr, "-inflight", "5", "-duration", "100ms", "-timeout", "50ms"}
	r, _, status := benchJSON(t, append(args, "slow")...)
	if r.Answers != 0 || r.Errors != 5 || r.Kinds["no answer within 50ms"] != 5 || r.Unsent != 0 || status != 1 {
		t.Errorf("%+v, status %d", r, status)
	}
	r, _, status = benchJSON(t, append(args, "-rate", "1000", "slow")...)
	if r.Answers != 0 || r.Errors != 5 || r.Unsent < 90 || r.Unsent > 95 || status != 1 {
		t.Errorf("-rate: %+v, status %d", r, status)
	}
}

func TestBenchInterrupted(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), spop, "bench", "-addr", agent(t), "-duration", "1h", "echo", "int:1")
	var out bytes.Buffer
	cmd.Stdout = &out
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stderr).ReadString('\n')
	if want := regexp.MustCompile(`^ +1s +\d+/s  p50 .* p99 .* max .* wrong 0  errors 0\n$`); !want.MatchString(line) {
		t.Errorf("want %v, have %q, %v", want, line, err)
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil || !strings.HasPrefix(out.String(), "load      echo to ") {
		t.Errorf("have %v, %q", err, out.String())
	}
}

// With the agent that this repository has, all of it.
func TestAgainstSpoa(t *testing.T) {
	dir := t.TempDir()
	bin, path := filepath.Join(dir, "spoa"), filepath.Join(dir, "agent")
	if out, err := exec.Command("go", "build", "-o", bin, "../spoa").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	cmd := exec.CommandContext(t.Context(), bin, "-listen", "unix:"+path)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("spoa: %v", err)
		}
	}()
	log := bufio.NewScanner(stderr)
	for log.Scan() && !strings.Contains(log.Text(), path) {
	}
	go func() { _, _ = io.Copy(io.Discard, stderr) }()

	if _, stderr, status := command(t, "check", "-addr", "unix:"+path); status != 0 {
		t.Errorf("check: %q", stderr)
	}
	stdout, errs, status := command(t, "notify", "-addr", "unix:"+path, "check-client-ip", "ip:192.0.2.1")
	m := regexp.MustCompile(`^set-var sess.ip_score u?int(?:32|64)? (\d+)\n$`).FindStringSubmatch(stdout)
	if m == nil || status != 0 {
		t.Fatalf("notify: %q, %q, status %d", stdout, errs, status)
	}
	if score, _ := strconv.Atoi(m[1]); score > 100 {
		t.Errorf("score %d", score)
	}
	r, errs, status := benchJSON(t, "-addr", "unix:"+path, "-count", "1000", "-expect", "sess.ip_score", "check-client-ip", "ip:192.0.2.1")
	if r.Answers != 1000 || status != 0 {
		t.Errorf("bench: %+v, %q, status %d", r, errs, status)
	}
}
