package logging

import (
	"bytes"
	"encoding/json"
	stdlog "log"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/go-kit/log/level"
	"github.com/spoa-go/spoa/cmd/internal/linewriter"
)

func TestNew(t *testing.T) {
	addr := net.TCPAddrFromAddrPort(netip.MustParseAddrPort("192.0.2.1:1"))
	for _, tc := range []struct {
		format Format
		want   string
	}{
		{Format{}, "level=info msg=x addr=192.0.2.1:1\n"},
		{Format{Level: "debug"}, "level=info msg=x"},
		{Format{Level: "warn"}, ""},
		{Format{JSON: true}, `{"addr":"192.0.2.1:1","level":"info","msg":"x","ts":"`},
	} {
		var b bytes.Buffer
		level.Info(New(&b, tc.format)).Log("msg", "x", "addr", addr)
		if !strings.Contains(b.String(), tc.want) || tc.want == "" && b.Len() > 0 {
			t.Errorf("%+v: want %q, have %q", tc.format, tc.want, b.String())
		}
	}
}

// What package log is given becomes a record.
func TestOpen(t *testing.T) {
	defer stdlog.SetFlags(stdlog.Flags())
	defer stdlog.SetOutput(stdlog.Writer())
	var b bytes.Buffer
	w := linewriter.New(&b)
	Open(w, Format{JSON: true})
	stdlog.Print("of another\nlibrary")
	w.Close(time.Minute)
	var record struct{ Level, Msg string }
	if err := json.Unmarshal(b.Bytes(), &record); err != nil || record.Level != "warn" || record.Msg != "of another\nlibrary" {
		t.Errorf("want a warning, have %q, %v", b.String(), err)
	}
}
