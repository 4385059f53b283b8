//go:build unix

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-kit/log"
	"github.com/go-kit/log/level"
	"github.com/spoa-go/spoa"
	"github.com/spoa-go/spoa/cmd/internal/certtest"
	"github.com/spoa-go/spoa/cmd/internal/listen"
	"github.com/spoa-go/spoa/cmd/internal/reputation/lists"
	"github.com/spoa-go/spoa/cmd/internal/status"
)

// cli runs the command to its end, within this process.
func cli(args ...string) (exit int, stdout, stderr string) {
	var out, err bytes.Buffer
	exit = realMain(args, &out, &err)
	return exit, out.String(), err.String()
}

func TestUsage(t *testing.T) {
	exit, out, stderr := cli("-h")
	if exit != 0 || stderr != "" {
		t.Errorf("want 0 and silence, have %d and %q", exit, stderr)
	}
	for line := range strings.Lines(out) {
		if len(line) > 81 {
			t.Errorf("want no more than 80 characters, have %q", line)
		}
	}
	newConfig().flags().VisitAll(func(f *flag.Flag) {
		if !regexp.MustCompile(`(?m)^ .*-` + f.Name + ` `).MatchString(out) {
			t.Errorf("want -%s explained", f.Name)
		}
	})
}

func TestBadFlags(t *testing.T) {
	dir := t.TempDir()
	list, bad, conf := filepath.Join(dir, "list"), filepath.Join(dir, "bad"), filepath.Join(dir, "conf")
	writeFile(t, list, "192.0.2.1\n")
	writeFile(t, bad, "x\n")
	writeFile(t, conf, "nonsense 1\n")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	taken := l.Addr().String()
	_, port, _ := net.SplitHostPort(taken)
	for _, tc := range []struct {
		args []string
		exit int
		want string
	}{
		{[]string{"-n", "0"}, 2, `"0" for flag -n: want a number of workers from 1 to 65536`},
		{[]string{"-n", "65537"}, 2, "from 1 to 65536"},
		{[]string{"-n", "x"}, 2, "-n: want a number of workers"},
		{[]string{"-m", "10"}, 2, "from 256 to"},
		{[]string{"-m", "999999999"}, 2, "from 256 to"},
		{[]string{"-p", "65536"}, 2, "want a port from 0 to 65535"},
		{[]string{"-p", "-1"}, 2, "want a port"},
		{[]string{"-p", "abc"}, 2, `command line: invalid value "abc" for flag -p: want a port from 0 to 65535`},
		{[]string{"-f", "-1"}, 2, "want a number of frames"},
		{[]string{"-t", "-1ms"}, 2, "want a time"},
		{[]string{"-t", "soon"}, 2, "want a time"},
		{[]string{"-drain", "-1s"}, 2, "want a time with its unit"},
		{[]string{"-drain", "5"}, 2, "want a time with its unit, such as 500ms or 10s"},
		{[]string{"-nosuch"}, 2, "-nosuch"},
		{[]string{"extra"}, 2, "extra"},
		{[]string{"-listen", "12345"}, 2, "want host:port, unix:/path"},
		{[]string{"-listen", "127.0.0.1:http"}, 2, "want host:port"},
		{[]string{"-listen", "unix:"}, 2, "want host:port"},
		{[]string{"-metrics", "systemd"}, 2, "want host:port"},
		{[]string{"-unix-mode", "999"}, 2, "want permissions"},
		{[]string{"-unix-mode", "1777"}, 2, "want permissions"},
		{[]string{"-tls-cert", "x"}, 2, "-tls-key"},
		{[]string{"-tls-client-ca", "x"}, 2, "-tls-client-ca"},
		{[]string{"-log-format", "xml"}, 2, "want logfmt or json"},
		{[]string{"-log-level", "loud"}, 2, "want debug, info, warn or error"},
		{[]string{"-handler-timeout", "1us"}, 2, "want 1ms or more, or 0"},
		{[]string{"-random", "-allow", list}, 2, "-random and lists"},
		{[]string{"-random=false"}, 2, "want -reputation FILE"},
		{[]string{"-random=maybe"}, 2, "-random"},
		{[]string{"-reputation", list + "=101"}, 2, "-reputation"},
		{[]string{"-reputation", list, "-reputation", list + "=7"}, 2, "twice"},
		{[]string{"-allow", list, "-allow", list}, 2, "twice"},
		{[]string{"-allow", ""}, 2, "-allow"},
		{[]string{"-config", filepath.Join(dir, "absent")}, 2, "absent"},
		{[]string{"-config", conf}, 2, conf + ":1: no flag \"nonsense\""},
		{[]string{"-check", "-n", "0"}, 2, "for flag -n"},
		{[]string{"-check", "-random", "-listen", "192.0.2.1:0"}, 1, "assign requested address"},
		{[]string{"-check", "-random", "-metrics", "unix:" + dir + "/no/such"}, 1, "no such file"},
		{[]string{"-check", "-reputation", bad}, 1, bad},
		{[]string{"-check", "-reputation", bad, "-allow", filepath.Join(dir, "absent")}, 1, "absent"},
		{[]string{"-check", "-tls-cert", list, "-tls-key", list}, 1, "-tls-cert"},
		{[]string{"-reputation", bad, "-log-level", "error"}, 1, bad},
		{[]string{"-p", port}, 1, "address already in use"},
		{[]string{"-listen", "127.0.0.1:0", "-listen", taken}, 1, "address already in use"},
		{[]string{"-listen", "127.0.0.1:0", "-metrics", taken}, 1, "address already in use"},
		{[]string{"-listen", "systemd"}, 1, "systemd"},
		{[]string{"-listen", "unix:" + dir + "/no/such"}, 1, "no such file"},
	} {
		exit, stdout, stderr := cli(tc.args...)
		if exit != tc.exit || stdout != "" {
			t.Errorf("%q: want status %d and silence, have %d and %q", tc.args, tc.exit, exit, stdout)
		}
		if !strings.HasPrefix(stderr, "spoa: ") || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, tc.want) {
			t.Errorf("%q: want one line about %q, have %q", tc.args, tc.want, stderr)
		}
	}
}

// The command line wins over the environment, and that over the file.
func TestPrecedence(t *testing.T) {
	dir := t.TempDir()
	conf := filepath.Join(dir, "conf")
	writeFile(t, conf, `# where to listen
listen 127.0.0.1:1
listen unix:/run/a.sock # and here
n 7
m 300
drain 3s
unix-mode 0600
reputation drop.txt=20
d
`)
	t.Setenv("SPOA_N", "8")
	t.Setenv("SPOA_M", "400")
	t.Setenv("SPOA_C", "async,fragmentation")
	t.Setenv("SPOA_T", "15")
	t.Setenv("SPOA_TLS_CERT", "cert.pem")
	t.Setenv("SPOA_TLS_KEY", "key.pem")
	t.Setenv("SPOA_TEST_HAPROXY", "/usr/sbin/haproxy") // somebody else's
	t.Setenv("SPOA_VERSION", "1.2.3")
	t.Setenv("SPOA_ODDITY", "x")
	t.Setenv("SPOA_PORT", "tcp://10.0.0.1:12345") // as Kubernetes sets it for a service called spoa
	have, err := parse([]string{"-config", conf, "-m", "500"}, os.Environ())
	if err != nil {
		t.Fatal(err)
	}
	want := &config{
		notes: []string{"environment: no flag has the variable SPOA_ODDITY, it is ignored"},
		debug: true, frame: 500, port: 12345, workers: 8, caps: stringList{"async", "fragmentation"}, delay: delay(15 * time.Millisecond),
		reputation: lists.Files{{Path: "drop.txt", Score: 20}}, listen: listen.Addrs{{Network: "tcp", Address: "127.0.0.1:1"}, {Network: "unix", Address: "/run/a.sock"}}, unixMode: 0o600,
		cert: "cert.pem", key: "key.pem", drain: 3 * time.Second, refresh: time.Hour, logFormat: "logfmt", logLevel: "info",
		sources: newConfig().sources, handlerTimeout: -1,
	}
	if !reflect.DeepEqual(want, have) {
		t.Errorf("want %+v\nhave %+v", want, have)
	}
	t.Setenv("SPOA_CONFIG", conf)
	if have, err = parse([]string{"-listen", "127.0.0.1:2"}, os.Environ()); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(have.listen, listen.Addrs{{Network: "tcp", Address: "127.0.0.1:2"}}) || have.frame != 400 {
		t.Errorf("want the command line's address alone, have %v and -m %d", have.listen, have.frame)
	}
}

func TestDefaults(t *testing.T) {
	have, err := parse(nil, nil)
	want := newConfig()
	want.notes = []string{"no list: scores are random, for trying out only; want -reputation FILE, or -random to say so"}
	if err != nil || !reflect.DeepEqual(want, have) {
		t.Errorf("want %+v\nhave %+v, %v", want, have, err)
	}
}

// Each error names the place, the flag, the value and the right form.
func TestBadSources(t *testing.T) {
	conf := filepath.Join(t.TempDir(), "conf")
	for _, tc := range []struct{ environ, file, want string }{
		{"SPOA_N=abc", "", "environment: SPOA_N=abc: want a number of workers from 1 to 65536"},
		{"SPOA_D=yes", "", "environment: SPOA_D=yes: want true or false"},
		{"SPOA_LISTEN=127.0.0.1:1,x", "", "environment: SPOA_LISTEN=x: want host:port"},
		{"SPOA_REPUTATON=drop.txt", "", "environment: no flag has the variable SPOA_REPUTATON: want SPOA_REPUTATION?"},
		{"SPOA_TLS_CRT=x", "", "want SPOA_TLS_CERT?"},
		{"", "n abc", ":1: n abc: want a number of workers"},
		{"", "# x\n\nn abc", ":3: n abc: want"},
		{"", "listen = 127.0.0.1:1", `:1: "listen = 127.0.0.1:1": want "listen 127.0.0.1:1", without = or colon`},
		{"", "listen=127.0.0.1:1", `want "listen 127.0.0.1:1"`},
		{"", "listen: 127.0.0.1:1", `want "listen 127.0.0.1:1"`},
		{"", "listen : 127.0.0.1:1", `want "listen 127.0.0.1:1"`},
		{"", `metrics "127.0.0.1:1"`, "want the value without quotes"},
		{"", "metrics '127.0.0.1:1'", "want the value without quotes"},
		{"", "d maybe", "d maybe: want true or false"},
		{"", "listn 127.0.0.1:1", `no flag "listn": want listen?`},
		{"", "config x", "cannot name another"},
		{"", "drain", "drain true: want a time"},
	} {
		writeFile(t, conf, tc.file)
		_, err := parse([]string{"-config", conf}, []string{tc.environ})
		if err == nil || !strings.Contains(err.Error(), tc.want) || tc.file != "" && !strings.HasPrefix(err.Error(), conf+":") {
			t.Errorf("%q %q: want %s, have %v", tc.environ, tc.file, tc.want, err)
		}
	}
}

// What is odd but no error is said.
func TestNotes(t *testing.T) {
	conf := filepath.Join(t.TempDir(), "conf")
	writeFile(t, conf, "\ufeffmetrics :1\r\nmetrics :2\r\nlisten :3\r\nlisten :4\r\n")
	for _, tc := range []struct {
		args, environ []string
		want          []string
	}{
		{[]string{"-drain", "1s", "-drain", "2s"}, nil, []string{"-drain is given 2 times on the command line: the last one counts"}},
		{[]string{"-listen", ":1", "-listen", ":2"}, nil, nil},
		{[]string{"-p", "1", "-listen", ":2"}, nil, []string{"-p does not count, since -listen is given"}},
		{[]string{"-config", conf}, nil, []string{"-metrics is given 2 times in " + conf + ": the last one counts"}},
		{nil, []string{"SPOA_SOMETHING=1", "SPOA_PORT=12345"}, []string{
			"environment: no flag has the variable SPOA_PORT, it is ignored",
			"environment: no flag has the variable SPOA_SOMETHING, it is ignored",
		}},
		{nil, []string{ // of Kubernetes, Docker, and these tests
			"SPOA_PORT=tcp://10.0.0.1:12345", "SPOA_SERVICE_HOST=10.0.0.1", "SPOA_SERVICE_PORT=12345", "SPOA_SERVICE_PORT_SPOP=12345",
			"SPOA_PORT_12345_TCP=tcp://10.0.0.1:12345", "SPOA_PORT_12345_TCP_ADDR=10.0.0.1", "SPOA_PORT_12345_TCP_PORT=12345",
			"SPOA_PORT_12345_TCP_PROTO=tcp", "SPOA_AGENT_PORT=tcp://10.0.0.1:12345", "SPOA_NAME=/web/spoa", "SPOA_ENV_PATH=/bin",
			"SPOA_TEST_HAPROXY=x", "SPOA_ALLOW=",
		}, nil},
	} {
		c, err := parse(append(tc.args, "-random"), tc.environ)
		if err != nil || !slices.Equal(c.notes, tc.want) {
			t.Errorf("%q %q: want %q, have %q, %v", tc.args, tc.environ, tc.want, c.notes, err)
		}
	}
}

func TestDelayFlag(t *testing.T) {
	for in, want := range map[string]time.Duration{
		"0": 0, "15": 15 * time.Millisecond, "10us": 10 * time.Microsecond, "15ms": 15 * time.Millisecond, "1s": time.Second,
	} {
		c, err := parse([]string{"-t", in}, nil)
		if err != nil || time.Duration(c.delay) != want {
			t.Errorf("%s: want %v, have %v, %v", in, want, c, err)
		}
	}
}

func TestCheckAndVersion(t *testing.T) {
	dir := t.TempDir()
	list, own := filepath.Join(dir, "list"), filepath.Join(dir, "own")
	writeFile(t, list, strings.Repeat("192.0.2.1\n192.0.2.2\n", 100)+"oops\n")
	writeFile(t, own, "192.0.2.2\n")
	for _, tc := range []struct{ args, want string }{
		{"-check -random", "spoa: configuration ok, no lists: scores are random"},
		{"-check -reputation " + list + "=5 -allow " + own, "spoa: configuration ok, lists: 2, entries: 3, bad lines: 1"},
		{"-version", "spoa " + status.ReadBuild().String()},
	} {
		exit, stdout, stderr := cli(strings.Fields(tc.args)...)
		if exit != 0 || stderr != "" || stdout != tc.want+"\n" {
			t.Errorf("%s: want %q, have %d, %q, %q", tc.args, tc.want, exit, stdout, stderr)
		}
	}
}

func TestLogger(t *testing.T) {
	for _, tc := range []struct {
		args, want string
	}{
		{"", `level=info msg=x addr=192.0.2.1:1`},
		{"-log-level warn", ``},
		{"-log-level warn -d", `level=info msg=x addr=192.0.2.1:1`},
	} {
		c, err := parse(strings.Fields(tc.args), nil)
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		level.Info(c.logger(&b)).Log("msg", "x", "addr", net.TCPAddrFromAddrPort(netip.MustParseAddrPort("192.0.2.1:1")))
		if !strings.Contains(b.String(), tc.want) || tc.want == "" && b.Len() > 0 {
			t.Errorf("%s: want %q, have %q", tc.args, tc.want, b.String())
		}
	}
}

// The seed's whole duty, with chance and with lists.
func TestCheckClientIP(t *testing.T) {
	dir := t.TempDir()
	drop, own := filepath.Join(dir, "drop.txt"), filepath.Join(dir, "own")
	writeFile(t, drop, "# spoa: column=score\n192.0.2.0/24\n2001:db8::/32 35\n")
	writeFile(t, own, "192.0.2.99\n")
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
		m := spoa.NewMessage(message, tc.args...)
		for _, l := range []*lists.Lists{nil, l} {
			var judged []string
			var a spoa.Actions
			h := checkClientIP(0, finder{}, newScorer(l, func(list string, listed bool) {
				judged = append(judged, fmt.Sprint(list, " ", listed))
			}))
			if err := h(t.Context(), m, &a); (err != nil) != (tc.score < 0) {
				t.Errorf("%v: want an error where no address can be judged alone, have %v", tc.args, err)
			}
			v, set := a.Lookup(spoa.ScopeSess, "ip_score")
			score, _ := v.Uint()
			list, listed := a.Lookup(spoa.ScopeSess, "ip_list")
			n := len(slices.Collect(a.All()))
			switch {
			case tc.score < 0:
				if n > 0 || len(judged) > 0 {
					t.Errorf("%v: want no action, have %d", tc.args, n)
				}
			case l == nil:
				if !set || n != 1 || score > 100 || len(judged) != 1 {
					t.Errorf("%v: want a random score alone, have %v and %d actions", tc.args, v, n)
				}
			case !set || int64(score) != tc.score || listed && list.String() != tc.list || listed != (tc.list != "") || n != 2:
				t.Errorf("%v: want %d of %q, have %v of %v, %d actions", tc.args, tc.score, tc.list, v, list, n)
			case !slices.Equal(judged, []string{fmt.Sprint(tc.list, " ", tc.list != "")}):
				t.Errorf("%v: want one verdict, have %v", tc.args, judged)
			}
		}
	}
}

func TestFinder(t *testing.T) {
	text := func(s string) []spoa.Arg { return []spoa.Arg{{Name: "x", Value: spoa.String(s)}} }
	ip := func(s string) spoa.Value { return spoa.Addr(netip.MustParseAddr(s)) }
	path := spoa.Arg{Name: "path", Value: spoa.String("/192.0.2.9")}
	var cdn prefixes
	for _, s := range []string{"198.51.100.0/24", "2001:db8:cd::/48", "203.0.113.7"} {
		if err := cdn.Set(s); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		args    []spoa.Arg
		proxies prefixes
		want    string // or the error
	}{
		{text("192.0.2.1"), nil, "192.0.2.1"},
		{text(" 192.0.2.1 "), nil, "192.0.2.1"},
		{text("2001:db8::1"), nil, "2001:db8::1"},
		{text("::ffff:192.0.2.1"), nil, "192.0.2.1"},
		{text("192.0.2.1:65000"), nil, "192.0.2.1"},
		{text("[2001:db8::1]:65000"), nil, "2001:db8::1"},
		{text("[2001:db8::1]"), nil, "2001:db8::1"},
		{text("fe80::1%eth0"), nil, "fe80::1"},
		// What a client has made up stands before what proxies have added.
		{text("6.6.6.6, 192.0.2.1"), nil, "192.0.2.1"},
		{text("6.6.6.6, 192.0.2.1"), cdn, "192.0.2.1"},
		{text("6.6.6.6, 192.0.2.1, 198.51.100.3"), cdn, "192.0.2.1"},
		{text("6.6.6.6,192.0.2.1,2001:db8:cd::1,203.0.113.7"), cdn, "192.0.2.1"},
		{text("6.6.6.6, 198.51.100.3, 192.0.2.1"), cdn, "192.0.2.1"},
		{text("198.51.100.4, 198.51.100.3"), cdn, "198.51.100.4"},
		{text("6.6.6.6, unknown, 198.51.100.3"), cdn, `text "unknown": want an address`},
		{text("6.6.6.6, "), nil, `text ""`},
		{text(""), nil, `text ""`},
		{text("localhost"), nil, `text "localhost"`},
		{text(strings.Repeat("x", 16000)), nil, `text "` + strings.Repeat("x", 64) + `": want`},
		{[]spoa.Arg{{Value: spoa.Uint32(1)}}, nil, "argument is uint32: want an address"},
		{[]spoa.Arg{{}}, nil, "argument is null: want an address"},
		{nil, nil, "no argument"},
		{[]spoa.Arg{path, {Name: "src", Value: ip("192.0.2.1")}}, nil, "192.0.2.1"},
		{[]spoa.Arg{path, {Name: "ip", Value: ip("192.0.2.1")}, {Name: "dst", Value: ip("192.0.2.2")}}, nil, "192.0.2.1"},
		{[]spoa.Arg{{Name: "addr", Value: ip("192.0.2.2")}, {Name: "ip", Value: ip("192.0.2.1")}}, nil, "192.0.2.1"},
		{[]spoa.Arg{path, {Value: ip("192.0.2.1")}}, nil, "192.0.2.1"},
		{[]spoa.Arg{path, {Name: "ip"}, {Value: ip("192.0.2.1")}}, nil, "argument is null"},
		{[]spoa.Arg{path, {Name: "dst", Value: ip("192.0.2.2")}, {Value: ip("192.0.2.1")}}, nil, "2 addresses in 3 arguments: want one of them named ip"},
		{[]spoa.Arg{path, path}, nil, "0 addresses in 2 arguments"},
	} {
		have, err := finder{tc.proxies}.address(spoa.NewMessage(message, tc.args...))
		if err != nil && strings.Contains(err.Error(), tc.want) {
			continue
		}
		if err != nil || have.String() != tc.want {
			t.Errorf("%v: want %s, have %v, %v", tc.args, tc.want, have, err)
		}
	}
	if err := new(prefixes).Set("example.com"); err == nil || !strings.Contains(err.Error(), "want an address or a prefix") {
		t.Errorf("want the right form in the error, have %v", err)
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
		m := spoa.NewMessage(message, spoa.Arg{Value: spoa.Addr(netip.MustParseAddr("192.0.2.1"))})
		h := checkClientIP(15*time.Millisecond, finder{}, newScorer(nil, func(string, bool) {}))
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

// serveConfig runs the agent that the flags describe, and returns its address.
func serveConfig(t *testing.T, logger log.Logger, args ...string) string {
	t.Helper()
	c, err := parse(args, nil)
	if err != nil {
		t.Fatal(err)
	}
	agent := newAgent(c, logger, checkClientIP(time.Duration(c.delay), finder{}, newScorer(nil, func(string, bool) {})), spoa.Hooks{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- agent.Serve(l) }()
	t.Cleanup(func() {
		agent.Close()
		if err := <-served; !errors.Is(err, spoa.ErrAgentClosed) {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

// hello says a HAPROXY-HELLO and returns the payload of the answer as text.
func hello(t *testing.T, addr, capabilities, engineID string) (net.Conn, string) {
	t.Helper()
	str := func(b []byte, s string) []byte {
		switch n := len(s); {
		case n < 240:
			b = append(b, byte(n))
		case n < 240+16<<7:
			b = append(b, byte(n)|240, byte((n-240)>>4))
		default:
			t.Fatal("too long")
		}
		return append(b, s...)
	}
	b := []byte{1, 0, 0, 0, 1, 0, 0} // type, flags with FIN, no ids
	b = str(append(str(b, "supported-versions"), 8), "2.0")
	b = append(str(b, "max-frame-size"), 3, 0xfc, 0xf0, 0x06) // 16380
	b = str(append(str(b, "capabilities"), 8), capabilities)
	b = str(append(str(b, "engine-id"), 8), engineID)
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(patience))
	if _, err := nc.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)); err != nil {
		t.Fatal(err)
	}
	var size [4]byte
	if _, err := io.ReadFull(nc, size[:]); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, binary.BigEndian.Uint32(size[:]))
	if _, err := io.ReadFull(nc, answer); err != nil {
		t.Fatal(err)
	}
	return nc, string(answer[7:])
}

func TestCapabilities(t *testing.T) {
	for args, want := range map[string]string{
		"":                                 "\x0apipelining",
		"-c pipelining":                    "\x0apipelining",
		"-c async":                         "\x10pipelining,async",
		"-c fragmentation":                 "\x18pipelining,fragmentation",
		"-c async -c fragmentation -c odd": "\x1epipelining,async,fragmentation",
	} {
		var out transcript
		addr := serveConfig(t, log.NewLogfmtLogger(&out), strings.Fields(args)...)
		if _, answer := hello(t, addr, "pipelining,async,fragmentation", "me"); !strings.HasSuffix(answer, want) {
			t.Errorf("%q: want %q, have %q", args, want, answer)
		}
		warned := strings.Contains(out.String(), `level=warn msg="unknown capability" capability=odd`)
		if warned != strings.Contains(args, "odd") {
			t.Errorf("%q: want a warning of unknown ones alone, have %q", args, out.String())
		}
	}
}

func TestFrameSizeAndRotation(t *testing.T) {
	addr := serveConfig(t, log.NewNopLogger(), "-m", "1000", "-f", "3")
	c, err := spoa.Dial(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if have := c.Hello().MaxFrameSize; have != 1000 {
		t.Errorf("want frames of 1000 bytes, have %d", have)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	m := spoa.NewMessage(message, spoa.Arg{Value: spoa.Addr(netip.MustParseAddr("192.0.2.1"))})
	n := 0
	for ; err == nil && n < 100; n++ {
		var actions []spoa.Action
		actions, err = c.Notify(ctx, m)
		if err == nil && (len(actions) != 1 || actions[0].Name != "ip_score" || actions[0].Scope != spoa.ScopeSess) {
			t.Errorf("want a score, have %v", actions)
		}
	}
	var d *spoa.DisconnectError
	if n != 4 || !errors.As(err, &d) || !d.Remote || d.Status != spoa.StatusNormal {
		t.Errorf("want the connection closed after 3, have %d answered and %v", n-1, err)
	}
}

// What cannot be judged is said in the answer, too.
func TestFaultVariable(t *testing.T) {
	addr := serveConfig(t, log.NewNopLogger())
	c, err := spoa.Dial(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for name, want := range map[string]string{message: "error", "another": "no-handler"} {
		actions, err := c.Notify(t.Context(), spoa.NewMessage(name))
		if err != nil || len(actions) != 1 || actions[0].Scope != spoa.ScopeTxn || actions[0].Name != "ip_fault" || actions[0].Value.String() != want {
			t.Errorf("%s: want txn.ip_fault %s, have %v, %v", name, want, actions, err)
		}
	}
}

// pipes is a listener within a synctest bubble.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { close(p.done); return nil }
func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Net: "pipe"} }

// No more than -n handlers run at once.
func TestWorkers(t *testing.T) {
	c, err := parse([]string{"-n", "3"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		var running atomic.Int64
		leave := make(chan struct{})
		agent := newAgent(c, log.NewNopLogger(), func(context.Context, *spoa.Message, *spoa.Actions) error {
			running.Add(1)
			defer running.Add(-1)
			<-leave
			return nil
		}, spoa.Hooks{})
		l := &pipes{make(chan net.Conn), make(chan struct{})}
		go agent.Serve(l)
		ours, theirs := net.Pipe()
		l.conns <- theirs
		client, err := spoa.NewClient(t.Context(), ours)
		if err != nil {
			t.Fatal(err)
		}
		answered := make(chan error, 10)
		for range 10 {
			if err := client.Start(func(_ []spoa.Action, err error) { answered <- err }, spoa.NewMessage(message)); err != nil {
				t.Fatal(err)
			}
		}
		<-time.After(time.Second) // of the bubble: all that can run does
		if n := running.Load(); n != 3 {
			t.Errorf("want 3 handlers at once, have %d", n)
		}
		close(leave)
		for range 10 {
			if err := <-answered; err != nil {
				t.Error(err)
			}
		}
		client.Close()
		agent.Close()
	})
}

// Processes, with signals

func TestSignals(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		a := startAgent(t, "127.0.0.1:0")
		a.await(t, `access="this machine only"`)
		if err := a.stop(sig); err != nil {
			t.Errorf("%v: want status 0, have %v", sig, err)
		}
		a.said(t, `msg=ended`)
	}
}

// asCommand returns this test binary as the command.
func asCommand(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), asAgent+"=1")
	return cmd
}

// said expects that a process that has ended said that.
func (p *process) said(t *testing.T, re string) {
	t.Helper()
	if !regexp.MustCompile(re).MatchString(p.out.String()) {
		t.Errorf("want %q said, have %q", re, p.out.String())
	}
}

// An answer under way holds a drain up, until a second signal.
func TestSecondSignal(t *testing.T) {
	dir := shortTempDir(t)
	sock := filepath.Join(dir, "s")
	a := startAgent(t, "unix:"+sock, "-t", "1h", "-drain", "1h", "-metrics", "unix:"+filepath.Join(dir, "m"))
	c, err := spoa.Dial(t.Context(), "unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	failed := make(chan error, 1)
	if err := c.Start(func(_ []spoa.Action, err error) { failed <- err }, spoa.NewMessage(message)); err != nil {
		t.Fatal(err)
	}
	web := unixClient(filepath.Join(dir, "m"))
	eventually(t, "the NOTIFY to arrive", func() bool { return strings.Contains(fetch(t, web, "/metrics"), "spoa_notifies_in_flight 1") })
	if have := fetch(t, web, "/readyz"); have != "200 ready\n" {
		t.Errorf("want ready, have %q", have)
	}
	if err := a.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the drain", func() bool { return fetch(t, web, "/readyz") == "503 draining\n" })
	if have := fetch(t, web, "/healthz"); have != "200 ok\n" {
		t.Errorf("want alive, have %q", have)
	}
	if err := a.stop(syscall.SIGINT); err != nil {
		t.Errorf("want status 0, have %v", err)
	}
	a.said(t, `level=warn msg="second signal`)
	<-failed // by the connection's end, or by the handler's just before
	if left, _ := filepath.Glob(dir + "/*"); len(left) > 0 {
		t.Errorf("want the sockets removed, have %v", left)
	}
}

// -drain bounds how long an answer under way may hold the end up.
func TestDrainFlag(t *testing.T) {
	a := startAgent(t, "127.0.0.1:0", "-t", "1h", "-drain", "10ms")
	c, err := spoa.Dial(t.Context(), "tcp", a.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Start(func([]spoa.Action, error) {}, spoa.NewMessage(message)); err != nil {
		t.Fatal(err)
	}
	a.shutdown(t)
}

func TestHUP(t *testing.T) {
	dir := shortTempDir(t)
	list, notify := filepath.Join(dir, "list"), filepath.Join(dir, "n")
	writeFile(t, list, "192.0.2.1 5\n")
	before, err := os.Stat(list)
	if err != nil {
		t.Fatal(err)
	}
	systemd, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer systemd.Close()
	said := func(want string) {
		t.Helper()
		b := make([]byte, 1000)
		systemd.SetDeadline(time.Now().Add(patience))
		n, err := systemd.Read(b)
		if err != nil || !regexp.MustCompile(`^`+want+`$`).Match(b[:n]) {
			t.Fatalf("want systemd told %q, have %q, %v", want, b[:n], err)
		}
	}
	t.Setenv("NOTIFY_SOCKET", notify)
	a := startAgent(t, "127.0.0.1:0", "-reputation", list+",column=score")
	said(`READY=1`)
	score := func() string {
		c, err := spoa.Dial(t.Context(), "tcp", a.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		actions, err := c.Notify(t.Context(), spoa.NewMessage(message, spoa.Arg{Value: spoa.Addr(netip.MustParseAddr("192.0.2.1"))}))
		if err != nil {
			t.Fatal(err)
		}
		s := ""
		for _, x := range actions {
			s += x.Name + "=" + x.Value.String() + " "
		}
		return s
	}
	if want, have := "ip_score=5 ip_list=list ", score(); want != have {
		t.Errorf("want %q, have %q", want, have)
	}
	// Written so that only being told can make it read.
	f, err := os.OpenFile(list, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(f, "192.0.2.1 6")
	f.Close()
	if err := os.Chtimes(list, time.Time{}, before.ModTime()); err != nil {
		t.Fatal(err)
	}
	if err := a.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	said(`RELOADING=1\nMONOTONIC_USEC=\d+\n?`)
	said(`READY=1`)
	if want, have := "ip_score=6 ip_list=list ", score(); want != have {
		t.Errorf("want %q, have %q", want, have)
	}
	// And a file that changes is read without a signal.
	writeFile(t, list, "192.0.2.1 77\n")
	a.await(t, `(?s)(msg="list loaded".*){3}`)
	if want, have := "ip_score=77 ip_list=list ", score(); want != have {
		t.Errorf("want %q, have %q", want, have)
	}
	a.shutdown(t)
	said(`STOPPING=1`)
}

// A file that hangs, here a FIFO without a writer, keeps no signal from ending the agent.
func TestHangingFile(t *testing.T) {
	dir := shortTempDir(t)
	ca := certtest.New(t, dir, "ca")
	ca.Issue(t, "agent", "127.0.0.1")
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	p := startProcess(t, asCommand(t, "-listen", "127.0.0.1:0", "-tls-cert", ca.File("agent"), "-tls-key", fifo, "-log-level", "debug"), syscall.SIGKILL)
	p.await(t, `msg="opening`)
	if err := p.stop(syscall.SIGTERM); err != nil {
		t.Errorf("at the start: want status 0, have %v", err)
	}
	key := filepath.Join(dir, "key")
	if err := os.Symlink(ca.File("agent"), key); err != nil {
		t.Fatal(err)
	}
	a := startAgent(t, "127.0.0.1:0", "-tls-cert", ca.File("agent"), "-tls-key", key)
	if err := os.Remove(key); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(fifo, key); err != nil {
		t.Fatal(err)
	}
	if err := a.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	a.await(t, `msg=reloading`)
	if err := probe(t, a.addr, ca.Client(t, "")); err != nil {
		t.Errorf("want answers while a file hangs, have %v", err)
	}
	a.shutdown(t)
}

// An answer that is late is given up for one that says so.
func TestHandlerTimeout(t *testing.T) {
	addr := serveConfig(t, log.NewNopLogger(), "-t", "1h", "-handler-timeout", "10ms")
	c, err := spoa.Dial(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	actions, err := c.Notify(ctx, spoa.NewMessage(message, spoa.Arg{Value: spoa.Addr(netip.MustParseAddr("192.0.2.1"))}))
	if err != nil || len(actions) != 1 || actions[0].Name != "ip_fault" || actions[0].Value.String() != "timeout" {
		t.Errorf("want txn.ip_fault timeout alone, have %v, %v", actions, err)
	}
	for args, want := range map[string]time.Duration{
		"": 0, "-dnsbl bl.example.org": 500 * time.Millisecond, "-t 2s": 2500 * time.Millisecond, "-t 2s -handler-timeout 15ms": 15 * time.Millisecond, "-handler-timeout 0s": 0,
	} {
		if c, err := parse(strings.Fields(args), nil); err != nil || c.timeout() != want {
			t.Errorf("%q: want %v, have %v, %v", args, want, c.timeout(), err)
		}
	}
}

// Whoever reads the log may end or stand still: answers go on, and so does the end.
func TestLogReader(t *testing.T) {
	for name, gone := range map[string]bool{"ends": true, "stands still": false} {
		t.Run(name, func(t *testing.T) {
			dir := shortTempDir(t)
			sock := filepath.Join(dir, "s")
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if gone {
				r.Close()
			}
			cmd := asCommand(t, "-listen", "unix:"+sock, "-metrics", "unix:"+filepath.Join(dir, "m"), "-d", "-drain", "10ms")
			cmd.Stderr = w
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			w.Close()
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			defer cmd.Process.Kill()
			eventually(t, "an agent", func() bool { return spoa.Check(t.Context(), "unix", sock) == nil })
			c, err := spoa.Dial(t.Context(), "unix", sock)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			m := spoa.NewMessage(message, spoa.Arg{Name: "ip", Value: spoa.Addr(netip.MustParseAddr("192.0.2.1"))},
				spoa.Arg{Value: spoa.String(strings.Repeat("x", 4000))})
			for range 1000 { // each is a line of 4 kB and more
				if _, err := c.Notify(ctx, m); err != nil {
					t.Fatal(err)
				}
			}
			text := fetch(t, unixClient(filepath.Join(dir, "m")), "/metrics")
			if !regexp.MustCompile(`(?m)^spoa_log_lines_dropped_total [1-9]`).MatchString(text) {
				t.Error("want lines dropped and counted")
			}
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			select {
			case err := <-ended:
				if err != nil {
					t.Errorf("want status 0, have %v", err)
				}
			case <-ctx.Done():
				t.Error("want the end after SIGTERM")
			}
		})
	}
}

func TestJSONLog(t *testing.T) {
	p := startProcess(t, asCommand(t, "-listen", "127.0.0.1:0", "-log-format", "json", "-c", "odd"), syscall.SIGKILL)
	p.await(t, `"msg":"listening"`)
	if err := p.stop(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	for line := range strings.Lines(p.out.String()) {
		var v struct{ TS, Level, Msg, Addr string }
		if err := json.Unmarshal([]byte(line), &v); err != nil || v.TS == "" || v.Level == "" || v.Msg == "" {
			t.Errorf("want JSON, have %q, %v", line, err)
		}
		if _, err := netip.ParseAddrPort(v.Addr); v.Msg == "listening" && err != nil {
			t.Errorf("want an address, have %q", line)
		}
	}
}

func writeFile(t *testing.T, path, data string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
		t.Fatal(err)
	}
}
