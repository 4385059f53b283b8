package settings

import (
	"flag"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// all has a flag of each kind.
type all struct {
	Debug    bool
	Workers  int
	Listen   []string
	Proxies  []netip.Prefix
	Cert     string
	Drain    time.Duration
	Wait     time.Duration
	Mode     fs.FileMode
	Format   string
	Metrics  string
	Database string
}

func (a *all) flags() *flag.FlagSet {
	f := flag.NewFlagSet("spoa", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.BoolVar(&a.Debug, "d", false, "")
	f.Var(Number(&a.Workers, 1, 65536, "a number of workers"), "n", "")
	f.Var(List(&a.Listen), "listen", "")
	f.Var(Prefixes(&a.Proxies), "trust-proxy", "")
	f.StringVar(&a.Cert, "tls-cert", "", "")
	f.Var(Period(&a.Drain), "drain", "")
	f.Var(Delay(&a.Wait), "t", "")
	f.Var(FileMode(&a.Mode), "unix-mode", "")
	f.Var(Choice(&a.Format, "logfmt", "json", "text"), "log-format", "")
	f.StringVar(&a.Metrics, "metrics", "", "")
	f.StringVar(&a.Database, "mmdb", "", "")
	f.String("config", "", "")
	return f
}

func writeFile(t *testing.T, text string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "conf")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// The command line wins over the environment, and that over the file.
func TestLoad(t *testing.T) {
	conf := writeFile(t, `# where to listen
listen 127.0.0.1:1
listen unix:/run/a.sock # and here
n 7
drain 3s
-metrics file
unix-mode 0600
d
`)
	environ := []string{"SPOA_N=8", "SPOA_METRICS=environment", "SPOA_TRUST_PROXY=192.0.2.1,2001:db8::1/32", "SPOA_TLS_CERT=cert.pem", "SPOA_T=15", "PATH=/bin", "SPOA_MMDB="}
	var have all
	flags := have.flags()
	notes, err := Load(flags, []string{"-config", conf, "-metrics", "line", "-log-format", "json"}, environ)
	if err != nil || notes != nil {
		t.Fatalf("want no note and no error, have %q, %v", notes, err)
	}
	want := all{
		Debug: true, Workers: 8, Listen: []string{"127.0.0.1:1", "unix:/run/a.sock"}, Cert: "cert.pem", Drain: 3 * time.Second, Wait: 15 * time.Millisecond,
		Mode: 0o600, Format: "json", Metrics: "line", Proxies: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("2001:db8::/32")},
	}
	if !reflect.DeepEqual(want, have) {
		t.Errorf("want %+v\nhave %+v", want, have)
	}
	for name, want := range map[string]bool{"n": true, "d": true, "log-format": true, "mmdb": false} {
		if have := Given(flags, name); have != want {
			t.Errorf("-%s given: want %v, have %v", name, want, have)
		}
	}
	// A repeatable flag of one source replaces those of the next.
	have = all{}
	if _, err := Load(have.flags(), []string{"-listen", "127.0.0.1:2"}, []string{"SPOA_CONFIG=" + conf, "SPOA_LISTEN=127.0.0.1:3"}); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(have.Listen, []string{"127.0.0.1:2"}) || have.Workers != 7 {
		t.Errorf("want the command line's address alone, have %v and -n %d", have.Listen, have.Workers)
	}
}

func TestHelp(t *testing.T) {
	if _, err := Load(new(all).flags(), []string{"-h"}, nil); err != flag.ErrHelp {
		t.Errorf("want flag.ErrHelp, have %v", err)
	}
}

// Each error names the place, the flag, the value and the right form.
func TestBadSources(t *testing.T) {
	for _, tc := range []struct{ args, environ, file, want string }{
		{"-n abc", "", "", `command line: invalid value "abc" for flag -n: want a number of workers from 1 to 65536`},
		{"-n 0", "", "", "from 1 to 65536"},
		{"-n 65537", "", "", "from 1 to 65536"},
		{"-t -1ms", "", "", "want a time such as 15 (milliseconds), 10us"},
		{"-t soon", "", "", "want a time"},
		{"-drain -1s", "", "", "want a time with its unit, such as 500ms or 10s"},
		{"-drain 5", "", "", "want a time with its unit"},
		{"-unix-mode 999", "", "", "want permissions in octal"},
		{"-unix-mode 1777", "", "", "want permissions in octal"},
		{"-log-format xml", "", "", "want logfmt, json or text"},
		{"-trust-proxy example.com", "", "", "want an address or a prefix"},
		{"-nosuch", "", "", "command line: flag provided but not defined: -nosuch"},
		{"-d extra", "", "", `command line: unexpected argument "extra": want flags only`},
		{"", "SPOA_N=abc", "", "environment: SPOA_N=abc: want a number of workers from 1 to 65536"},
		{"", "SPOA_D=yes", "", "environment: SPOA_D=yes: want true or false"},
		{"", "SPOA_TRUST_PROXY=127.0.0.1,x", "", "environment: SPOA_TRUST_PROXY=x: want an address"},
		{"", "SPOA_DRAN=1s", "", "environment: no flag has the variable SPOA_DRAN: the nearest is SPOA_DRAIN"},
		{"", "SPOA_TLS_CRT=x", "", "the nearest is SPOA_TLS_CERT"},
		{"", "", "n abc", ":1: n abc: want a number of workers"},
		{"", "", "# x\n\nn abc", ":3: n abc: want"},
		{"", "", "listen = 127.0.0.1:1", `:1: "listen = 127.0.0.1:1": want "listen 127.0.0.1:1", without = or colon`},
		{"", "", "listen=127.0.0.1:1", `want "listen 127.0.0.1:1"`},
		{"", "", "listen: 127.0.0.1:1", `want "listen 127.0.0.1:1"`},
		{"", "", "listen : 127.0.0.1:1", `want "listen 127.0.0.1:1"`},
		{"", "", `metrics "127.0.0.1:1"`, "want the value without quotes"},
		{"", "", "metrics '127.0.0.1:1'", "want the value without quotes"},
		{"", "", "d maybe", "d maybe: want true or false"},
		{"", "", "listn 127.0.0.1:1", `no flag "listn": the nearest is listen`},
		{"", "", "nonsense 1", `:1: no flag "nonsense"`},
		{"", "", "config x", "cannot name another"},
		{"", "", "drain", "drain true: want a time"},
	} {
		conf := writeFile(t, tc.file)
		_, err := Load(new(all).flags(), append([]string{"-config", conf}, strings.Fields(tc.args)...), []string{tc.environ})
		if err == nil || !strings.Contains(err.Error(), tc.want) || tc.file != "" && !strings.HasPrefix(err.Error(), conf+":") {
			t.Errorf("%q %q %q: want %s, have %v", tc.args, tc.environ, tc.file, tc.want, err)
		}
	}
	if _, err := Load(new(all).flags(), []string{"-config", "/no/such"}, nil); err == nil || !strings.HasPrefix(err.Error(), "-config: open /no/such") {
		t.Errorf("want the file named, have %v", err)
	}
}

// What is odd but no error is said.
func TestNotes(t *testing.T) {
	conf := writeFile(t, "\ufeffmetrics :1\r\nmetrics :2\r\nlisten :3\r\nlisten :4\r\n")
	for _, tc := range []struct {
		args, environ []string
		want          []string
	}{
		{[]string{"-drain", "1s", "-drain", "2s"}, nil, []string{"-drain is given 2 times on the command line: the last one counts"}},
		{[]string{"-listen", ":1", "-listen", ":2"}, nil, nil},
		{[]string{"-config", conf}, nil, []string{"-metrics is given 2 times in " + conf + ": the last one counts"}},
		{nil, []string{"SPOA_SOMETHING=1", "SPOA_PORT=12345"}, []string{
			"environment: no flag has the variable SPOA_PORT, it is ignored",
			"environment: no flag has the variable SPOA_SOMETHING, it is ignored",
		}},
		{nil, []string{ // of Kubernetes, Docker, and tests
			"SPOA_PORT=tcp://10.0.0.1:12345", "SPOA_SERVICE_HOST=10.0.0.1", "SPOA_SERVICE_PORT=12345", "SPOA_SERVICE_PORT_SPOP=12345",
			"SPOA_PORT_12345_TCP=tcp://10.0.0.1:12345", "SPOA_PORT_12345_TCP_ADDR=10.0.0.1", "SPOA_PORT_12345_TCP_PORT=12345",
			"SPOA_PORT_12345_TCP_PROTO=tcp", "SPOA_AGENT_PORT=tcp://10.0.0.1:12345", "SPOA_NAME=/web/spoa", "SPOA_ENV_PATH=/bin",
			"SPOA_TEST_HAPROXY=x", "SPOA_DRAIN=",
		}, nil},
	} {
		notes, err := Load(new(all).flags(), tc.args, tc.environ)
		if err != nil || !slices.Equal(notes, tc.want) {
			t.Errorf("%q %q: want %q, have %q, %v", tc.args, tc.environ, tc.want, notes, err)
		}
	}
}

func TestDelay(t *testing.T) {
	for in, want := range map[string]time.Duration{
		"0": 0, "15": 15 * time.Millisecond, "10us": 10 * time.Microsecond, "15ms": 15 * time.Millisecond, "1s": time.Second,
	} {
		var have time.Duration
		if err := Delay(&have).Set(in); err != nil || have != want {
			t.Errorf("%s: want %v, have %v, %v", in, want, have, err)
		}
	}
}
