// Package crowdsectest runs a real CrowdSec for tests: its local API alone,
// without scenarios and without its console.
package crowdsectest

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Key is that of the bouncer which a Server knows.
const Key = "sesame"

// patience bounds every wait for the server. Only failing tests come near it.
const patience = 30 * time.Second

// A Server is a process of crowdsec. It ends with the test.
type Server struct {
	URL string

	dir    string
	cmd    *exec.Cmd
	output *os.File
}

// Start runs the local API on a free port of 127.0.0.1. Without a crowdsec in
// the path it skips the test, in CI it fails it.
func Start(t testing.TB) *Server {
	t.Helper()
	for _, name := range []string{"crowdsec", "cscli"} {
		if _, err := exec.LookPath(name); err != nil && os.Getenv("CI") != "" {
			t.Fatalf("no %s found: apt-get install crowdsec", name)
		} else if err != nil {
			t.Skipf("no %s found: apt-get install crowdsec", name)
		}
	}
	s := &Server{dir: t.TempDir()}
	s.configure(t)
	s.Command(t, "machines", "add", "test", "--auto", "-f", s.file("credentials.yaml"))
	s.Command(t, "bouncers", "add", "spoa", "-k", Key)
	output, err := os.Create(s.file("output"))
	if err != nil {
		t.Fatal(err)
	}
	s.output = output
	t.Cleanup(func() {
		s.Stop(t)
		output.Close()
		if t.Failed() {
			b, _ := os.ReadFile(output.Name())
			t.Logf("crowdsec said:\n%s", b)
		}
	})
	s.Run(t)
	return s
}

func (s *Server) file(name string) string { return filepath.Join(s.dir, name) }

// configure writes the files that crowdsec wants.
func (s *Server) configure(t testing.TB) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	s.URL = "http://" + addr
	for _, dir := range []string{"data", "hub", "notifications", "plugins"} {
		if err := os.Mkdir(s.file(dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range map[string]string{
		"hub/.index.json":  "{}",
		"simulation.yaml":  "simulation: false\n",
		"profiles.yaml":    "name: none\nfilters:\n - \"false\"\n",
		"config.yaml":      strings.NewReplacer("DIR", s.dir, "ADDR", addr).Replace(config),
		"credentials.yaml": "",
	} {
		if err := os.WriteFile(s.file(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

const config = `
common: {daemonize: false, log_media: stdout, log_level: info}
config_paths:
  config_dir: DIR
  data_dir: DIR/data
  simulation_path: DIR/simulation.yaml
  hub_dir: DIR/hub
  index_path: DIR/hub/.index.json
  notification_dir: DIR/notifications
  plugin_dir: DIR/plugins
cscli: {output: raw}
db_config: {type: sqlite, db_path: DIR/data/crowdsec.db, use_wal: true}
api:
  client: {credentials_path: DIR/credentials.yaml}
  server: {listen_uri: ADDR, profiles_path: DIR/profiles.yaml}
prometheus: {enabled: false}
`

// Run starts the process again after Stop, with the decisions that it had.
func (s *Server) Run(t testing.TB) {
	t.Helper()
	s.cmd = exec.Command("crowdsec", "-c", s.file("config.yaml"), "-no-cs", "-no-capi")
	s.cmd.Stdout, s.cmd.Stderr = s.output, s.output
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pause := time.NewTicker(20 * time.Millisecond)
	defer pause.Stop()
	for deadline := time.Now().Add(patience); ; <-pause.C {
		resp, err := http.Get(s.URL + "/v1/decisions/stream")
		if err == nil { // refused for want of a key, but it serves
			resp.Body.Close()
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("crowdsec does not serve: %v", err)
		}
	}
}

// Stop ends the process.
func (s *Server) Stop(t testing.TB) {
	t.Helper()
	if s.cmd == nil {
		return
	}
	if err := s.cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	s.cmd.Wait() // says that it was killed
	s.cmd = nil
}

// Command runs cscli with these arguments.
func (s *Server) Command(t testing.TB, args ...string) {
	t.Helper()
	cmd := exec.Command("cscli", append([]string{"-c", s.file("config.yaml")}, args...)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Fatalf("cscli %s: %v\n%s", strings.Join(args, " "), err, &out)
	}
}

// Import adds decisions on many addresses at once.
func (s *Server) Import(t testing.TB, addrs []string) {
	t.Helper()
	var b bytes.Buffer
	b.WriteString("duration,scope,value,type,reason\n")
	for _, addr := range addrs {
		fmt.Fprintf(&b, "4h,ip,%s,ban,imported\n", addr)
	}
	path := s.file("import.csv")
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	s.Command(t, "decisions", "import", "-i", path)
}
