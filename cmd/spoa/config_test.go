//go:build unix

package main

import (
	"bytes"
	"flag"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-kit/log/level"
	"github.com/spoa-go/spoa/cmd/internal/listen"
	"github.com/spoa-go/spoa/cmd/internal/reputation/lists"
	"github.com/spoa-go/spoa/cmd/internal/status"
)

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
		{"SPOA_REPUTATON=drop.txt", "", "environment: no flag has the variable SPOA_REPUTATON: the nearest is SPOA_REPUTATION"},
		{"SPOA_TLS_CRT=x", "", "the nearest is SPOA_TLS_CERT"},
		{"", "n abc", ":1: n abc: want a number of workers"},
		{"", "# x\n\nn abc", ":3: n abc: want"},
		{"", "listen = 127.0.0.1:1", `:1: "listen = 127.0.0.1:1": want "listen 127.0.0.1:1", without = or colon`},
		{"", "listen=127.0.0.1:1", `want "listen 127.0.0.1:1"`},
		{"", "listen: 127.0.0.1:1", `want "listen 127.0.0.1:1"`},
		{"", "listen : 127.0.0.1:1", `want "listen 127.0.0.1:1"`},
		{"", `metrics "127.0.0.1:1"`, "want the value without quotes"},
		{"", "metrics '127.0.0.1:1'", "want the value without quotes"},
		{"", "d maybe", "d maybe: want true or false"},
		{"", "listn 127.0.0.1:1", `no flag "listn": the nearest is listen`},
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
