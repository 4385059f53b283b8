//go:build unix

package status

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/spoa-go/spoa"
	"github.com/spoa-go/spoa/cmd/internal/reputation/lists"
)

const (
	message  = "check-client-ip"
	patience = 15 * time.Second
)

// newTestStatus returns the status of an agent without lists and connections.
func newTestStatus() *Status {
	return New(Config{Conns: noConns, Build: ReadBuild(), Messages: []string{message}})
}

func noConns() []spoa.ConnInfo { return nil }

// eventually waits until ok reports true, for what another goroutine does.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	pause := time.NewTicker(time.Millisecond)
	defer pause.Stop()
	for deadline := time.Now().Add(patience); !ok(); <-pause.C {
		if time.Now().After(deadline) {
			t.Fatalf("waited %v for: %s", patience, what)
		}
	}
}

func writeFile(t *testing.T, path, data string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
		t.Fatal(err)
	}
}

// get returns what the server of st says.
func (st *Status) get(t *testing.T, path string) string {
	t.Helper()
	w := httptest.NewRecorder()
	st.handler().ServeHTTP(w, httptest.NewRequest("GET", path, nil))
	if w.Code != http.StatusOK {
		t.Errorf("%s: status %d: %s", path, w.Code, w.Body)
	}
	return w.Body.String()
}

func wantLines(t *testing.T, text string, lines ...string) {
	t.Helper()
	for _, line := range lines {
		if !strings.Contains("\n"+text, "\n"+line+"\n") {
			t.Errorf("want the line %s", line)
		}
	}
}

func TestHandledAllocs(t *testing.T) {
	st := newTestStatus()
	for f := range outcomes {
		for _, name := range []string{message, "another"} {
			if n := testing.AllocsPerRun(100, func() {
				st.handled(spoa.MessageEvent{Message: name, Took: time.Millisecond, Fault: f})
				st.Judged("", false)
			}); n != 0 {
				t.Errorf("%s, %v: want no allocation, have %v", name, f, n)
			}
		}
	}
}

func TestOutcomes(t *testing.T) {
	st := newTestStatus()
	for f := range outcomes {
		for range f + 1 {
			st.handled(spoa.MessageEvent{Message: message, Took: 3 * time.Millisecond, Fault: f})
		}
	}
	st.handled(spoa.MessageEvent{Message: "one", Fault: spoa.FaultNoHandler})
	st.handled(spoa.MessageEvent{Message: "two", Fault: spoa.FaultNoHandler})
	text := st.get(t, "/metrics")
	wantLines(t, text,
		`spoa_messages_total{message="check-client-ip",outcome="ok"} 1`,
		`spoa_messages_total{message="check-client-ip",outcome="error"} 2`,
		`spoa_messages_total{message="check-client-ip",outcome="panic"} 3`,
		`spoa_messages_total{message="check-client-ip",outcome="timeout"} 4`,
		`spoa_messages_total{message="check-client-ip",outcome="overload"} 5`,
		`spoa_messages_total{message="check-client-ip",outcome="no_handler"} 6`,
		`spoa_messages_total{message="other",outcome="no_handler"} 2`,
		`spoa_handler_duration_seconds_count{message="check-client-ip"} 10`, // the others were not called
		`spoa_handler_duration_seconds_bucket{message="check-client-ip",le="0.0025"} 0`,
		`spoa_handler_duration_seconds_bucket{message="check-client-ip",le="0.005"} 10`,
		`spoa_handler_duration_seconds_count{message="other"} 0`)
	if strings.Contains(text, `"one"`) {
		t.Error("want no label that a peer can choose")
	}
	if !regexp.MustCompile(`(?m)^spoa_build_info\{goversion="go1[^"]*",revision="[^"]*",version="[^"]+"\} 1$`).MatchString(text) {
		t.Error("want build info")
	}
}

func TestFaults(t *testing.T) {
	st := newTestStatus()
	for _, err := range []error{
		nil,
		&spoa.DisconnectError{Remote: true},
		&spoa.DisconnectError{Status: spoa.StatusFrameTooBig},
		&spoa.DisconnectError{Status: spoa.StatusTimeout, Remote: true},
		&spoa.DisconnectError{Status: 12345, Remote: true},
		&spoa.DisconnectError{Status: 54321, Remote: true},
		errors.New("tls: bad certificate"),
	} {
		st.connClosed(spoa.Peer{HealthCheck: err == nil}, err)
	}
	text := st.get(t, "/metrics")
	wantLines(t, text,
		`spoa_faults_total{by="agent",code="3"} 1`,
		`spoa_faults_total{by="haproxy",code="2"} 1`,
		`spoa_faults_total{by="haproxy",code="other"} 2`,
		`spoa_faults_total{by="",code="network"} 1`,
		`spoa_faults_total{by="agent",code="2"} 0`,
		`spoa_health_checks_total 1`)
	if strings.Contains(text, "12345") || strings.Contains(text, `code="0"`) {
		t.Error("want faults of SPOP's codes alone")
	}
}

// serve runs an agent with the hooks of st in this process, and returns its address.
func serve(t *testing.T, agent *spoa.Agent) string {
	t.Helper()
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

// All that metrics say of real connections, and no peer's words in it.
func TestMetricsOfConnections(t *testing.T) {
	var agent *spoa.Agent
	st := New(Config{Messages: []string{message}, Conns: func() []spoa.ConnInfo {
		return append(agent.Conns(), spoa.ConnInfo{Peer: spoa.Peer{EngineID: "engine-of-mine", FrameSize: 16380}})
	}})
	agent = spoa.New(spoa.WithHooks(st.Hooks()), spoa.WithHandlerFunc(message, func(context.Context, *spoa.Message, *spoa.Actions) error {
		st.Judged("", false)
		return nil
	}))
	addr := serve(t, agent)
	if err := spoa.Check(t.Context(), "tcp", addr); err != nil {
		t.Fatal(err)
	}
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	c, err := spoa.Dial(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, name := range []string{message, message, "invented"} {
		if _, err := c.Notify(t.Context(), spoa.NewMessage(name, spoa.Arg{Value: spoa.Addr(netip.MustParseAddr("192.0.2.77"))})); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the health check to end", func() bool { return value(st.checks) == 1 })
	eventually(t, "all accepted", func() bool { return value(st.opened) == 3 })
	text := st.get(t, "/metrics")
	wantLines(t, text,
		`spoa_connections{state="hello"} 1`,
		`spoa_connections{state="idle"} 2`,
		`spoa_connections{state="busy"} 0`,
		`spoa_connections_opened_total 3`,
		`spoa_health_checks_total 1`,
		`spoa_messages_total{message="check-client-ip",outcome="ok"} 2`,
		`spoa_messages_total{message="other",outcome="no_handler"} 1`,
		`spoa_verdicts_total{list="",verdict="random"} 2`,
		`spoa_random_scores 1`)
	for _, never := range []string{"127.0.0.1", "192.0.2.77", "engine-of-mine", "invented"} {
		if strings.Contains(text, never) {
			t.Errorf("want nothing of peers, have %q", never)
		}
	}
}

// Lists may share a name, or be both kinds.
func TestMetricsOfLists(t *testing.T) {
	a, b := filepath.Join(t.TempDir(), "drop.txt"), filepath.Join(t.TempDir(), "drop.netset")
	writeFile(t, a, "192.0.2.1\n")
	writeFile(t, b, strings.Repeat("192.0.2.2\n", 200)+"192.0.2.3\nbad\n")
	l, err := lists.Open(t.Context(), lists.Options{Block: []lists.File{{Path: a}, {Path: b, Score: 10}}, Allow: []lists.File{{Path: a}}})
	if err != nil {
		t.Fatal(err)
	}
	st := New(Config{Conns: noConns, Lists: l})
	for _, listed := range []bool{true, true, false, false} {
		if listed {
			st.Judged("drop", true)
		} else {
			st.Judged("", false)
		}
	}
	writeFile(t, a, "bad\n")
	if l.Reload(t.Context()) == nil {
		t.Fatal("want a reload that fails")
	}
	text := st.get(t, "/metrics")
	wantLines(t, text,
		`spoa_random_scores 0`,
		`spoa_verdicts_total{list="drop",verdict="listed"} 2`,
		`spoa_verdicts_total{list="",verdict="unlisted"} 2`,
		fmt.Sprintf(`spoa_list_entries{file="%s",kind="reputation",list="drop"} 1`, a),
		fmt.Sprintf(`spoa_list_entries{file="%s",kind="reputation",list="drop"} 2`, b),
		fmt.Sprintf(`spoa_list_entries{file="%s",kind="allow",list="drop"} 1`, a),
		fmt.Sprintf(`spoa_list_bad_lines{file="%s",kind="reputation",list="drop"} 1`, b),
		fmt.Sprintf(`spoa_list_reloads_total{file="%s",kind="reputation",list="drop",result="ok"} 1`, b),
		fmt.Sprintf(`spoa_list_reloads_total{file="%s",kind="reputation",list="drop",result="failed"} 1`, a),
		fmt.Sprintf(`spoa_list_reloads_total{file="%s",kind="allow",list="drop",result="failed"} 1`, a))
	for _, re := range []string{
		`(?m)^spoa_list_age_seconds\{[^}]*\} [0-9.e-]+$`,
		`(?m)^spoa_list_loaded_timestamp_seconds\{[^}]*\} 1\.\d+e\+09$`,
	} {
		if n := len(regexp.MustCompile(re).FindAllString(text, -1)); n != 3 {
			t.Errorf("want %s thrice, have %d", re, n)
		}
	}
	wantCell(t, readPage(t, st.get(t, "/")), "list: drop", "file: "+b, "bad lines: 1", "entries: 2")
}

func TestActor(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	st := newTestStatus()
	execute, interrupt := st.Actor(l)
	ended := make(chan error, 1)
	go func() { ended <- execute() }()
	client := &http.Client{Timeout: patience}
	fetch := func(path string) string {
		t.Helper()
		resp, err := client.Get("http://" + l.Addr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("%d %s", resp.StatusCode, b)
	}
	if have := fetch("/readyz"); have != "200 ready\n" {
		t.Errorf("want ready, have %q", have)
	}
	st.Drain()
	if have := fetch("/readyz"); have != "503 draining\n" {
		t.Errorf("want draining, have %q", have)
	}
	if have := fetch("/healthz"); have != "200 ok\n" {
		t.Errorf("want alive, have %q", have)
	}
	if have := fetch("/metrics"); !strings.HasPrefix(have, "200 ") {
		t.Errorf("want metrics to the end, have %q", have)
	}
	if have := fetch("/nosuch"); !strings.HasPrefix(have, "404 ") {
		t.Errorf("want nothing else, have %q", have)
	}
	interrupt(nil)
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestActorFails(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	execute, interrupt := newTestStatus().Actor(l)
	if err := execute(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("want the listener's error, have %v", err)
	}
	interrupt(nil)
}

// The page

// readPage parses a page and returns each table row as "column: text" cells, and the rest as one such row.
func readPage(t *testing.T, page string) (rows []string) {
	t.Helper()
	d := xml.NewDecoder(strings.NewReader(page))
	d.Strict, d.AutoClose, d.Entity = false, xml.HTMLAutoClose, xml.HTMLEntity
	var row, open []string
	label, text := "", ""
	for {
		tok, err := d.Token()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatalf("want HTML, have %v in\n%s", err, page)
		}
		switch tok := tok.(type) {
		case xml.StartElement:
			open = append(open, tok.Name.Local)
			switch tok.Name.Local {
			case "img", "iframe", "object":
				t.Errorf("want no <%s>", tok.Name.Local)
			case "form":
				if !slices.Contains(tok.Attr, xml.Attr{Name: xml.Name{Local: "action"}, Value: "/lookup"}) {
					t.Errorf("want no form but for looking up, have %v", tok.Attr)
				}
			case "td":
				label, text = "", ""
			}
			for _, a := range tok.Attr {
				switch {
				case a.Name.Local == "data-label":
					label = a.Value
				case strings.HasPrefix(a.Name.Local, "on"), a.Name.Local == "src" && a.Value != "/page.js":
					t.Errorf("want no attribute %s", a.Name.Local)
				}
			}
		case xml.CharData:
			text += string(tok)
		case xml.EndElement:
			open = open[:len(open)-1]
			switch tok.Name.Local {
			case "td":
				row = append(row, label+": "+text)
			case "tr":
				if len(row) > 0 {
					rows = append(rows, strings.Join(row, "\n")+"\n")
				}
				row, text = nil, ""
			case "dt", "dd", "p", "h1":
				rows = append(rows, strings.TrimSpace(text)+"\n")
				text = ""
			}
		}
	}
	if len(open) > 0 {
		t.Errorf("want all closed, have %v", open)
	}
	return rows
}

// wantCell expects one row with all these cells.
func wantCell(t *testing.T, rows []string, cells ...string) {
	t.Helper()
rows:
	for _, row := range rows {
		for _, cell := range cells {
			if !strings.Contains("\n"+row, "\n"+cell+"\n") {
				continue rows
			}
		}
		return
	}
	t.Errorf("want a row with %q in %q", cells, rows)
}

func TestPage(t *testing.T) {
	evil := `"><script>alert('1')</script><img src=x onerror=alert(2)>`
	tcp := func(port int) net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: port} }
	st := New(Config{Messages: []string{message}, Conns: func() []spoa.ConnInfo {
		return []spoa.ConnInfo{
			{Peer: spoa.Peer{Addr: tcp(1), EngineID: evil, FrameSize: 16380, Capabilities: "pipelining"}},
			{Peer: spoa.Peer{Addr: tcp(2), EngineID: "\u202e" + strings.Repeat("long", 500), FrameSize: 16380}},
			{Peer: spoa.Peer{Addr: tcp(3)}},
		}
	}})
	for i := range 1234 {
		st.handled(spoa.MessageEvent{Message: message, Took: time.Duration(i) * time.Microsecond})
	}
	st.sample()
	st.handled(spoa.MessageEvent{Message: message, Took: time.Hour, Fault: spoa.FaultError})
	st.handled(spoa.MessageEvent{Message: message, Fault: spoa.FaultOverload})
	st.sample()
	st.connClosed(spoa.Peer{}, &spoa.DisconnectError{Status: spoa.StatusInvalidFrame})

	page := st.get(t, "/?refresh=7")
	rows := readPage(t, page)
	wantCell(t, rows, "peer: 192.0.2.1:1", "engine-id: "+evil, "state: idle", "capabilities: pipelining",
		"in flight: 0", "notifies: 0", "frame size: 16380")
	wantCell(t, rows, "peer: 192.0.2.1:2", "engine-id: \ufffd"+strings.Repeat("long", 500)[:63]+"…")
	wantCell(t, rows, "peer: 192.0.2.1:3", "state: hello", "engine-id: ")
	wantCell(t, rows, "name: "+message, "per second: 2", "most: 1\u202f234", "total: 1\u202f236", "failed: 2", "median: ≤ 1 ms",
		"99 %: ≤ 2.5 ms", "of these: error 1, overload 1")
	wantCell(t, rows, "fault: invalid frame received", "code: 4", "told by: agent", "connections: 1")
	wantCell(t, rows, "None: scores are random, 0 so far. That is for trying out only.")
	if n := strings.Count(page, "<script"); n != 1 || !strings.Contains(page, `<script src="/page.js" defer></script>`) {
		t.Errorf("want one script, have %d", n)
	}
	if !strings.Contains(page, `http-equiv="refresh" content="7"`) || strings.Contains(st.get(t, "/"), "http-equiv") {
		t.Error("want a refresh when asked for")
	}
	w := httptest.NewRecorder()
	st.handler().ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
	if csp := w.Header().Get("Content-Security-Policy"); !strings.Contains(csp, "default-src 'none'; script-src 'self'; connect-src 'self'") {
		t.Errorf("want no script but page.js, have %q", csp)
	}
}

func TestPageBounded(t *testing.T) {
	st := New(Config{Conns: func() []spoa.ConnInfo {
		all := make([]spoa.ConnInfo, pageConns+42)
		for i := range all {
			all[i].Addr, all[i].InFlight = &net.UnixAddr{Net: "unix"}, 1
		}
		return all
	}})
	st.Drain()
	rows := readPage(t, st.get(t, "/"))
	n := 0
	for _, row := range rows {
		if strings.Contains(row, "peer: unix\n") {
			n++
		}
	}
	if n != pageConns {
		t.Errorf("want %d connections, have %d", pageConns, n)
	}
	wantCell(t, rows, "And 42 more.")
	wantCell(t, rows, "542")
	wantCell(t, rows, "spoa draining")
}

// Files may have any name, and sources say what others have sent.
func TestOddNames(t *testing.T) {
	dir := t.TempDir()
	var block []lists.File
	for _, name := range []string{"a\xff\xfe\x00"[:3], "a\ufffd\ufffd", "new\nline\x1b[31m", `"quoted"`, `<b>`, strings.Repeat("n", 200)} {
		path := filepath.Join(dir, name)
		writeFile(t, path, "192.0.2.1\n")
		block = append(block, lists.File{Path: path})
	}
	l, err := lists.Open(t.Context(), lists.Options{Block: block})
	if err != nil {
		t.Fatal(err)
	}
	st := New(Config{Conns: noConns, Lists: l})
	st.Judged(`a\xff\xfe`, true) // as lists call it
	text := st.get(t, "/metrics")
	if !utf8.ValidString(text) || strings.Count(text, "spoa_list_entries{") != len(block) {
		t.Errorf("want metrics of %d lists in UTF-8, have %q", len(block), text)
	}
	wantLines(t, text, `spoa_verdicts_total{list="a\\xff\\xfe",verdict="listed"} 1`)
	page := st.get(t, "/")
	if !utf8.ValidString(page) || strings.Contains(page, "<b>") {
		t.Error("want a page in UTF-8")
	}
	if rows := readPage(t, page); len(rows) < len(block) {
		t.Errorf("want a row for each list, have %q", rows)
	}
	if a, b := label(strings.Repeat("x", 16000)), label(strings.Repeat("x", 16001)); a == b || len(a) > 2*maxLabel {
		t.Errorf("want long labels short and different, have %q and %q", a, b)
	}
}

// The files of a directory may have new names for ever.
func TestListedBounded(t *testing.T) {
	l, _ := openTestLists(t)
	st := New(Config{Conns: noConns, Lists: l})
	const odd = 50 // more than there is room for
	for range 2 {
		for i := range maxListed + odd - 2 { // two are there from the start
			st.Judged(fmt.Sprintf("drop-%d", i), true)
		}
	}
	text := st.get(t, "/metrics")
	if n := strings.Count(text, `spoa_verdicts_total{`); n != maxListed+2 { // and one for others, and one for unlisted
		t.Errorf("want %d counters, have %d", maxListed+2, n)
	}
	wantLines(t, text, `spoa_verdicts_total{list="drop-0",verdict="listed"} 2`, fmt.Sprintf(`spoa_verdicts_total{list="(other)",verdict="listed"} %d`, 2*odd))
}

func TestFormats(t *testing.T) {
	for want, have := range map[string]string{
		"0": number(0), "999": number(999), "1\u202f000": number(1000), "12\u202f345\u202f678": number(12345678),
		"0s": short(-1), "59s": short(59 * time.Second), "1m1s": short(61 * time.Second),
		"3h2m": short(3*time.Hour + 2*time.Minute), "2d1h": short(49 * time.Hour),
		"1.5 µs": seconds(1.5e-6), "12.3 ms": seconds(0.0123), "2 s": seconds(2),
	} {
		if want != have {
			t.Errorf("want %q, have %q", want, have)
		}
	}
}
