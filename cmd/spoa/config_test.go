//go:build unix

package main

import (
	"flag"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spoa-go/spoa/cmd/internal/listen"
	"github.com/spoa-go/spoa/cmd/internal/logging"
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
	// The text explains the flags that there are, and no others.
	explained := make(map[string]bool)
	for _, m := range regexp.MustCompile(`(?m)^  (-.*)$`).FindAllStringSubmatch(out, -1) {
		for _, name := range regexp.MustCompile(`(?:^|, )-([a-z-]+)`).FindAllStringSubmatch(m[1], -1) {
			explained[name[1]] = true
		}
	}
	delete(explained, "h") // of package flag
	flags := newConfig().flags()
	flags.VisitAll(func(f *flag.Flag) {
		if !explained[f.Name] {
			t.Errorf("want -%s explained", f.Name)
		}
		delete(explained, f.Name)
	})
	if len(explained) > 0 {
		t.Errorf("want no flags explained that do not exist, have %v", explained)
	}
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
	want := newConfig()
	want.notes = []string{"environment: no flag has the variable SPOA_ODDITY, it is ignored"}
	want.debug, want.frame, want.workers, want.caps, want.delay = true, 500, 8, []string{"async", "fragmentation"}, 15*time.Millisecond
	want.judge.Reputation = lists.Files{{Path: "drop.txt", Score: 20}}
	want.listen = listen.Addrs{{Network: "tcp", Address: "127.0.0.1:1"}, {Network: "unix", Address: "/run/a.sock"}}
	want.unixMode, want.tls, want.drain = 0o600, listen.TLSFiles{Cert: "cert.pem", Key: "key.pem"}, 3*time.Second
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

func TestNotes(t *testing.T) {
	c, err := parse([]string{"-p", "1", "-listen", ":2"}, []string{"SPOA_SOMETHING=1"})
	want := []string{
		"environment: no flag has the variable SPOA_SOMETHING, it is ignored",
		"-p does not count, since -listen is given",
		"no list: scores are random, for trying out only; want -reputation FILE, or -random to say so",
	}
	if err != nil || !slices.Equal(c.notes, want) {
		t.Errorf("want %q, have %q, %v", want, c.notes, err)
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

func TestLookupAndReplay(t *testing.T) {
	dir := t.TempDir()
	list, requests := filepath.Join(dir, "list"), filepath.Join(dir, "log")
	writeFile(t, list, "192.0.2.1\n")
	writeFile(t, requests, "192.0.2.1\n192.0.2.2\n")
	for args, want := range map[string]string{
		"-lookup 192.0.2.1":   `^192.0.2.1: listed, score 0, by list list\n`,
		"-replay " + requests: `(?m)^ +1 +1  denied, with a score below 20$`,
	} {
		exit, stdout, stderr := cli(append(strings.Fields(args), "-reputation", list, "-log-level", "warn")...)
		if exit != 0 || stderr != "" || !regexp.MustCompile(want).MatchString(stdout) {
			t.Errorf("%s: want %s, have %d, %q, %q", args, want, exit, stdout, stderr)
		}
	}
	if exit, _, stderr := cli("-lookup", "192.0.2.1"); exit != 1 || !strings.HasPrefix(stderr, "spoa: -lookup: want lists") {
		t.Errorf("without lists: want an error, have %d, %s", exit, stderr)
	}
}

func TestLogFormat(t *testing.T) {
	for args, want := range map[string]logging.Format{
		"":                                 {Level: "info"},
		"-log-level warn -log-format json": {Level: "warn", JSON: true},
		"-log-level warn -d":               {Level: "debug"},
	} {
		c, err := parse(strings.Fields(args), nil)
		if err != nil || c.format() != want {
			t.Errorf("%q: want %+v, have %+v, %v", args, want, c.format(), err)
		}
	}
}
