//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/spoa-go/spoa"
)

// odd are bytes that files, messages, engines and versions may be named with.
var odd = []string{
	"new\nline\r\x1b[31m\x00", "\xff\xfe\x80", `"quoted" = \n\`, "<b>&amp;</b>'", "\u202eright\u2028", "msg=forged level=info", strings.Repeat("n", 255), "}{a=\"b\"} 1\n",
}

// logRecord is a line of logfmt.
var logRecord = regexp.MustCompile(`^ts=\S+( [A-Za-z_.-]+=("([^"\\]|\\.)*"|[^\s"=]*))+$`)

// Whatever peers and files are called, what the agent writes stays well formed.
func TestOddBytes(t *testing.T) {
	for format, wellFormed := range map[string]func(string) bool{
		"logfmt": logRecord.MatchString,
		"json":   func(line string) bool { return json.Valid([]byte(line)) },
	} {
		t.Run(format, func(t *testing.T) {
			directory, web := t.TempDir(), filepath.Join(shortTempDir(t), "m")
			for i, name := range odd {
				writeFile(t, filepath.Join(directory, fileName(name)), fmt.Sprintf("192.0.2.%d ; %s\n", i, strings.ReplaceAll(name, "\n", "\v")))
			}
			addr := freeAddr(t, "127.0.0.1")
			p := startProcess(t, asCommand(t, "-listen", addr, "-metrics", "unix:"+web, "-log-format", format, "-d", "-drain", "10ms",
				"-reputation", directory, "-reputation", chatty(t)), syscall.SIGKILL)
			eventually(t, "an agent", func() bool { return spoa.Check(t.Context(), "tcp", addr) == nil })
			provoke(t, addr)
			// A list that comes late, and one that is refused.
			writeFile(t, filepath.Join(directory, "late\n\xff"), "192.0.2.100\n")
			writeFile(t, filepath.Join(directory, fileName(odd[0])), strings.Repeat("\x1b[31mx\xff \n", 10))
			p.awaitTimes(t, "list loaded", len(odd)+2)
			p.await(t, `list not reloaded`)
			p.await(t, `Unsolicited response`) // which net/http says
			client := unixClient(web)
			checkVariables(t, addr)
			checkMetrics(t, fetch(t, client, "/metrics"))
			page := fetch(t, client, "/")
			checkText(t, "page", page)
			if strings.Contains(page, "<b>") {
				t.Error("page: want what names it has escaped")
			}
			for i := range odd {
				checkJSON(t, client, fmt.Sprintf("/lookup?ip=192.0.2.%d", i))
			}
			if err := p.stop(syscall.SIGTERM); err != nil {
				t.Error(err)
			}
			records := strings.Split(strings.TrimSuffix(p.out.String(), "\n"), "\n")
			for _, line := range records {
				if !wellFormed(line) || !utf8.ValidString(line) || strings.ContainsFunc(line, unicode.IsControl) {
					t.Errorf("want a record on one line, have %.300q", line)
				}
			}
			checkCommands(t, directory)
		})
	}
}

// fileName makes a name of a file of any bytes.
func fileName(s string) string {
	s = strings.NewReplacer("\x00", "", "/", "").Replace(s)
	return s[:min(len(s), 255)]
}

// provoke names engines, versions and messages with odd bytes. The connections of
// the engines stay open.
func provoke(t *testing.T, addr string) {
	t.Helper()
	client, err := spoa.Dial(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	for _, name := range append(odd, strings.Repeat("\xff\n\"", 5000)) {
		hello(t, addr, "pipelining,"+name, name[:min(len(name), 7000)])
		helloOf(t, addr, name, "pipelining", name[:1])
		m := spoa.NewMessage(name, spoa.Arg{Name: name, Value: spoa.String(name)})
		if _, err := client.Notify(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		m = spoa.NewMessage(message, spoa.Arg{Name: name, Value: spoa.String(name)})
		if _, err := client.Notify(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
}

// checkVariables expects that HAProxy can put the variables into a header.
func checkVariables(t *testing.T, addr string) {
	t.Helper()
	client, err := spoa.Dial(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for i := range odd {
		actions, err := client.Notify(t.Context(), spoa.NewMessage(message, spoa.Arg{Value: spoa.String(fmt.Sprintf("192.0.2.%d", i))}))
		if err != nil || len(actions) != 2 || actions[1].Name != "ip_list" {
			t.Fatalf("want ip_score and ip_list, have %v, %v", actions, err)
		}
		if list := actions[1].Value.String(); !utf8.ValidString(list) || strings.ContainsFunc(list, unicode.IsControl) {
			t.Errorf("ip_list: want a text that can be shown, have %q", list)
		}
	}
}

func checkMetrics(t *testing.T, text string) {
	t.Helper()
	_, text, _ = strings.Cut(text, " ") // the status
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		t.Errorf("want metrics, have %v", err)
	}
	lists := len(families["spoa_list_entries"].GetMetric())
	if lists != len(odd)+2 {
		t.Errorf("want metrics of %d lists, have %d", len(odd)+2, lists)
	}
	messages := make(map[string]bool)
	for _, m := range families["spoa_messages_total"].GetMetric() {
		for _, l := range m.GetLabel() {
			if l.GetName() == "message" {
				messages[l.GetValue()] = true
			}
		}
	}
	if len(messages) != 2 { // check-client-ip and other
		t.Errorf("want labels of 2 messages, have %q", slices.Collect(maps.Keys(messages)))
	}
	for name, family := range families {
		for _, m := range family.GetMetric() {
			for _, l := range m.GetLabel() {
				if len(l.GetValue()) > 400 || strings.ContainsFunc(l.GetValue(), unicode.IsControl) {
					t.Errorf("%s: want a short label to read, have %q", name, l.GetValue())
				}
			}
		}
	}
}

// checkText expects UTF-8 without control characters but newlines and tabs.
func checkText(t *testing.T, what, text string) {
	t.Helper()
	control := func(r rune) bool { return unicode.IsControl(r) && r != '\n' && r != '\t' }
	if !utf8.ValidString(text) || strings.ContainsFunc(text, control) {
		t.Errorf("%s: want text that can be shown, have %q", what, text)
	}
}

func checkJSON(t *testing.T, client *http.Client, path string) {
	t.Helper()
	_, body, _ := strings.Cut(fetch(t, client, path), " ")
	var have struct {
		Lists []struct{ List, Note string }
	}
	if err := json.Unmarshal([]byte(body), &have); err != nil || len(have.Lists) != 1 {
		t.Errorf("%s: want JSON of one list, have %v in %s", path, err, body)
	}
	checkText(t, path, body)
}

// checkCommands has the command say on terminals what it says of such lists.
func checkCommands(t *testing.T, directory string) {
	t.Helper()
	if err := os.Remove(filepath.Join(directory, fileName(odd[0]))); err != nil {
		t.Fatal(err)
	}
	for i := range odd[1:] {
		exit, stdout, stderr := cli("-reputation", directory, "-lookup", fmt.Sprintf("192.0.2.%d", i+1))
		checkText(t, "-lookup", stdout+stderr)
		if lines := strings.Count(stdout, "\n"); exit != 0 || lines != 3 {
			t.Errorf("-lookup: want 3 lines, have %d: %q, %q", lines, stdout, stderr)
		}
	}
	bad := filepath.Join(directory, "bad\n\x1b[31m\xff")
	writeFile(t, bad, "\x1b[31m\n")
	exit, stdout, stderr := cli("-reputation", directory, "-check")
	checkText(t, "-check", stderr)
	if exit != 1 || stdout != "" || strings.Count(stderr, "\n") != 1 {
		t.Errorf("-check: want one line, have %d, %q, %q", exit, stdout, stderr)
	}
	for _, flag := range []string{"-reputation", "-listen", "-tls-cert", "-config", "-n", "-dnsbl", "-nosuch\n\x1b"} {
		exit, stdout, stderr := cli(flag, "/no/such\n\x1b\xff", "-check")
		checkText(t, flag, stderr)
		if exit == 0 || stdout != "" || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s: want one line, have %d, %q, %q", flag, exit, stdout, stderr)
		}
	}
}
