package main

import (
	"context"
	"errors"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/spoa-go/spoa"
)

// The README shows this program.
func TestReadme(t *testing.T) {
	program, err := os.ReadFile("main.go")
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile("../../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(page), "```go\n"+string(program)+"```\n") {
		t.Error("want main.go in the README as it is")
	}
}

func TestHooks(t *testing.T) {
	registry := prometheus.NewRegistry()
	agent := spoa.New(spoa.WithHooks(hooks(registry)),
		spoa.WithHandlerFunc("good", func(context.Context, *spoa.Message, *spoa.Actions) error { return nil }),
		spoa.WithHandlerFunc("bad", func(context.Context, *spoa.Message, *spoa.Actions) error { return errors.New("as asked") }))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go agent.Serve(l)
	defer agent.Close()
	client, err := spoa.Dial(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for _, name := range []string{"good", "good", "bad", "invented"} {
		if _, err := client.Notify(t.Context(), spoa.NewMessage(name)); err != nil {
			t.Fatal(err)
		}
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	have := make(map[string]uint64)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetValue())
			}
			name := f.GetName() + " " + strings.Join(labels, " ")
			if f.GetType() == dto.MetricType_HISTOGRAM {
				have[name] = m.GetHistogram().GetSampleCount()
			} else {
				have[name] = uint64(m.GetGauge().GetValue())
			}
		}
	}
	for name, want := range map[string]uint64{
		"spoa_connections ":                                1,
		"spoa_message_duration_seconds none good":          2,
		"spoa_message_duration_seconds error bad":          1,
		"spoa_message_duration_seconds no-handler unknown": 1,
	} {
		if have[name] != want {
			t.Errorf("%s: want %d, have %v", name, want, have)
		}
	}
}
