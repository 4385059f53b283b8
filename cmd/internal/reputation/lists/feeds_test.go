package lists_test

import (
	"bytes"
	"compress/gzip"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spoa-go/spoa/cmd/internal/reputation/lists"
	"github.com/spoa-go/spoa/cmd/internal/reputation/lists/liststest"
)

// Feeds of realistic size come into force whole, from files, compressed files
// and URLs, and nothing is to be said of them but of bogons. One that is cut does
// not, if it is of a kind that can show it.
func TestFeeds(t *testing.T) {
	dir := t.TempDir()
	server := httptest.NewTLSServer(http.FileServer(http.Dir(dir)))
	defer server.Close()
	for _, feed := range liststest.Feeds() {
		path := filepath.Join(dir, feed.Name)
		write(t, path, feed.Data)
		var z bytes.Buffer
		w := gzip.NewWriter(&z)
		_, _ = w.Write(feed.Data)
		w.Close()
		write(t, path+".gz", z.Bytes())
		for _, from := range []string{path, path + ".gz", server.URL + "/" + feed.Name} {
			var files lists.Files
			if err := files.Set(from + "=7" + feed.Options); err != nil {
				t.Fatal(err)
			}
			l, err := lists.Open(t.Context(), lists.Options{Block: files, Client: server.Client()})
			if err != nil {
				t.Error(err)
				continue
			}
			s, v, m := l.Stats()[0], l.Lookup(feed.Listed), l.Explain(feed.Listed)
			if s.Entries != feed.Entries || s.BadLines != 0 || v.State != lists.Listed || len(m) != 1 || m[0].Note != feed.Note {
				t.Errorf("%s: want %d entries, and %v with note %q, have %+v, %v, %+v", from, feed.Entries, feed.Listed, feed.Note, s, v, m)
			}
			for _, warning := range s.Warnings {
				if !strings.Contains(warning, "private addresses") {
					t.Errorf("%s: want no warning, have %s", from, warning)
				}
			}
		}
		for _, name := range []string{"firehol_level1.netset", "drop_v4.json", "feodo.json", "abuseipdb.json"} {
			if name != feed.Name {
				continue
			}
			for _, part := range []int{3, 2} {
				write(t, path, feed.Data[:len(feed.Data)*(part-1)/part])
				_, err := lists.Open(t.Context(), lists.Options{Block: []lists.File{{Path: path}}})
				if err == nil || !strings.Contains(err.Error(), "cut") && !strings.Contains(err.Error(), "the end of the JSON is missing") {
					t.Errorf("%s: want it refused as cut, have %v", name, err)
				}
			}
		}
	}
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}
