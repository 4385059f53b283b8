//go:build unix

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spoa-go/spoa/cmd/internal/reputation/crowdsec/crowdsectest"
	"github.com/spoa-go/spoa/cmd/internal/reputation/dnsbl/dnsbltest"
	"github.com/spoa-go/spoa/cmd/internal/reputation/mmdb/mmdbtest"
)

// Addresses that the sources of TestE2ESources know.
const (
	banned   = "203.0.113.1" // by CrowdSec
	onDNS    = "203.0.113.2"
	onASN    = "203.0.113.3"
	onList   = "203.0.113.4"
	allowed  = "203.0.113.5" // and on all the others
	clean    = "203.0.113.6"
	doubtful = "203.0.113.7" // says CrowdSec
	onOneASN = `{"asn":64496,"rir":"ripencc","cc":"ZZ","asname":"BAD-NET"}
{"type":"metadata","records":1}
`
)

// sourcesArgs starts the real servers, writes the files, and returns the flags.
func sourcesArgs(t *testing.T) []string {
	t.Helper()
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	cs := crowdsectest.Start(t)
	for _, addr := range []string{banned, allowed} {
		cs.Command(t, "decisions", "add", "--ip", addr, "--reason", "crowdsecurity/http-probing")
	}
	cs.Command(t, "decisions", "add", "--ip", doubtful, "--type", "captcha", "--reason", "crowdsecurity/crawl")
	dns := dnsbltest.Start(t, "bl.example", onDNS+" :4:exploits", allowed+" :4:exploits")
	places := filepath.Join(dir, "places.mmdb")
	mmdbtest.Write(t, places, mmdbtest.Networks{
		onASN + "/32": mmdbtest.ASN(64496, "Bad Network"), allowed + "/32": mmdbtest.ASN(64496, "Bad Network"),
	})
	return []string{
		"-reputation", file("block.txt", onList+"\n"+allowed+"\n"), "-allow", file("office.txt", allowed+"\n"),
		"-crowdsec", cs.URL, "-crowdsec-key", file("key", crowdsectest.Key+"\n"), "-crowdsec-interval", "200ms",
		"-dnsbl", dns.Zone + "=4:10", "-dns", dns.Addr, "-budget", "5s",
		"-mmdb", places, "-asn", file("asndrop.json", onOneASN),
	}
}

func TestE2ESources(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		agent := startAgent(t, "127.0.0.1:0", append(sourcesArgs(t), "-metrics", "127.0.0.1:0")...)
		front := freeAddr(t, "127.0.0.1")
		startHAProxy(t, bin, setup{
			agent: agent.addr, file: "sources.cfg",
			cfg: []string{"    filter spoe", "    bind " + front + " accept-proxy\n    filter spoe"},
		})
		for _, test := range []struct {
			addr   string
			code   int
			score  string
			reason string
		}{
			{banned, 403, "0", "crowdsec: ban for crowdsecurity/http-probing"},
			{onDNS, 403, "10", "dnsbl bl.example: 127.0.0.4"},
			{onASN, 403, "0", "network asndrop: AS64496 BAD-NET"},
			{onList, 403, "0", "list block"},
			{doubtful, 302, "30", "crowdsec: captcha for crowdsecurity/crawl"},
			{allowed, 200, "100", "allow list office"},
			{clean, 200, "100", ""},
		} {
			resp := getFrom(t, front, test.addr)
			h := resp.Header
			if resp.StatusCode != test.code || h.Get("X-IP-Score") != test.score || h.Get("X-IP-Reason") != test.reason || h.Get("X-IP-Missing") != "" {
				t.Errorf("%s: want %d, score %s, reason %q, have %d, %v", test.addr, test.code, test.score, test.reason, resp.StatusCode, h)
			}
		}
		web := agent.await(t, `msg=metrics\b.*\baddr="?([^\s"]+)`)[1]
		wantText(t, "http://"+web+"/", "crowdsec", "bl.example", "places.mmdb", "asndrop")
		wantText(t, "http://"+web+"/metrics", `spoa_source_listed_total{kind="crowdsec",source="crowdsec"} 3`,
			`spoa_source_up{kind="dnsbl",source="bl.example"} 1`, `spoa_source_missing_total{kind="dnsbl",source="bl.example"} 0`)
		wantExplained(t, "http://"+web+"/lookup?ip="+allowed)
	})
}

// With -monitor nothing is denied, and HAProxy's log and the agent's have what
// would have been.
func TestE2EMonitor(t *testing.T) {
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		list := filepath.Join(t.TempDir(), "block.txt")
		if err := os.WriteFile(list, []byte(onList+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		agent := startAgent(t, "127.0.0.1:0", "-monitor", "-reputation", list)
		front := freeAddr(t, "127.0.0.1")
		h := startHAProxy(t, bin, setup{
			agent: agent.addr, file: "sources.cfg",
			cfg: []string{"    filter spoe", "    bind " + front + " accept-proxy\n    filter spoe"},
		})
		if resp := getFrom(t, front, onList); resp.StatusCode != 200 || resp.Header.Get("X-IP-Score") != "100" {
			t.Errorf("want 200, score 100, have %d, %v", resp.StatusCode, resp.Header)
		}
		h.await(t, `(?m)^`+onList+` 200 .* score=100 monitor=0 reason="list block" sources=block `)
		agent.await(t, `msg="would deny" addr=`+onList+` score=0 reason="list block"`)
	})
}

// getFrom sends a request to addr that comes from that client, by way of the
// PROXY protocol.
func getFrom(t *testing.T, addr, client string) *http.Response {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(c, "PROXY TCP4 %s 127.0.0.1 1234 80\r\nGET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n", client)
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp
}

func wantText(t *testing.T, url string, want ...string) {
	t.Helper()
	resp, err := newClient().Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range want {
		if !strings.Contains(string(b), w) {
			t.Errorf("%s: want %q, have\n%s", url, w, b)
		}
	}
}

// wantExplained expects that every source says what it knows of the address.
func wantExplained(t *testing.T, url string) {
	t.Helper()
	resp, err := newClient().Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var have struct {
		Addr    netip.Addr
		ASN     uint32
		State   string
		Score   int
		Sources []struct{ Source, State, Reason string }
	}
	if err := json.NewDecoder(resp.Body).Decode(&have); err != nil {
		t.Fatal(err)
	}
	if have.State != "allowed" || have.Score != 100 || have.ASN != 64496 {
		t.Errorf("%s: want allowed, 100, AS64496, have %+v", url, have)
	}
	states := map[string]string{}
	for _, s := range have.Sources {
		states[s.Source] = s.State
	}
	for source, want := range map[string]string{"office": "allowed", "asndrop": "listed", "crowdsec": "listed", "bl.example": "listed"} {
		if states[source] != want {
			t.Errorf("%s: %s: want %s, have %q", url, source, want, states[source])
		}
	}
}
