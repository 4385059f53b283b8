//go:build unix

package main

import (
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/spoa-go/spoa/cmd/internal/reputation/lists/liststest"
)

// Lists of the shape and size of those that are published, once from files and
// once by URL: requests from their addresses are denied by HAProxy, and the page
// and /lookup say why.
func TestE2EFeeds(t *testing.T) {
	dir := t.TempDir()
	server := httptest.NewTLSServer(http.FileServer(http.Dir(dir)))
	t.Cleanup(server.Close)
	authority := filepath.Join(t.TempDir(), "authority.pem")
	writeFile(t, authority, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})))
	feeds := liststest.Feeds()
	var byFile, byURL []string
	for i, feed := range feeds {
		writeFile(t, filepath.Join(dir, feed.Name), string(feed.Data))
		options := fmt.Sprintf("=%d%s", i, feed.Options)
		byFile = append(byFile, "-reputation", filepath.Join(dir, feed.Name)+options)
		byURL = append(byURL, "-reputation", server.URL+"/"+feed.Name+options)
	}
	forEachHAProxy(t, func(t *testing.T, bin haproxyBin) {
		cache := filepath.Join(t.TempDir(), "cache")
		common := []string{"-listen", "127.0.0.1:0", "-metrics", "127.0.0.1:0", "-cache", cache}
		for _, feedArgs := range [][]string{byFile, byURL} {
			cmd := asCommand(t, slices.Concat(feedArgs, common)...)
			cmd.Env = append(cmd.Env, "SSL_CERT_FILE="+authority)
			agent := startProcess(t, cmd, syscall.SIGKILL)
			front := freeAddr(t, "127.0.0.1")
			startHAProxy(t, bin, setup{
				agent: agent.await(t, `msg=listening\b.*\baddr="?([^\s"]+)`)[1],
				cfg:   []string{"    filter spoe", "    bind " + front + " accept-proxy\n    filter spoe"},
			})
			web := "http://" + agent.await(t, `msg=metrics\b.*\baddr="?([^\s"]+)`)[1]
			for i, feed := range feeds {
				resp := getFrom(t, front, feed.Listed.String())
				want := fmt.Sprint(i)
				if feed.Worst {
					want = "0"
				}
				if resp.StatusCode != http.StatusForbidden || resp.Header.Get("X-IP-Score") != want {
					t.Errorf("%s: want 403 and score %s, have %d, %v", feed.Name, want, resp.StatusCode, resp.Header)
				}
				wantText(t, web+"/", feed.Name)
				wantText(t, web+"/lookup?ip="+feed.Listed.String(), feed.Name, `"state": "listed"`, feed.Note)
			}
			if resp := getFrom(t, front, "198.51.100.1"); resp.StatusCode != http.StatusOK || resp.Header.Get("X-IP-Score") != "100" {
				t.Errorf("on no list: want 200 and score 100, have %d, %v", resp.StatusCode, resp.Header)
			}
		}
		if kept, err := os.ReadDir(cache); err != nil || len(kept) != len(feeds) {
			t.Errorf("want %d copies in the cache, have %d, %v", len(feeds), len(kept), err)
		}
	})
}
