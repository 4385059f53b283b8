package main

import (
	"log"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spoa-go/spoa"
)

func hooks(r prometheus.Registerer) spoa.Hooks {
	conns := prometheus.NewGauge(prometheus.GaugeOpts{Name: "spoa_connections", Help: "Open connections."})
	took := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "spoa_message_duration_seconds", Help: "Time of handlers by message and fault.",
	}, []string{"message", "fault"})
	r.MustRegister(conns, took)
	return spoa.Hooks{
		ConnOpened: func(spoa.Peer) { conns.Inc() },
		ConnClosed: func(spoa.Peer, error) { conns.Dec() },
		Message: func(e spoa.MessageEvent) {
			if e.Fault == spoa.FaultNoHandler {
				e.Message = "unknown" // a peer could invent any number of names
			}
			took.WithLabelValues(e.Message, e.Fault.String()).Observe(e.Took.Seconds())
		},
	}
}

func main() {
	agent := spoa.New(spoa.WithHooks(hooks(prometheus.DefaultRegisterer)))
	http.Handle("/metrics", promhttp.Handler())
	go func() { log.Fatal(http.ListenAndServe("127.0.0.1:9090", nil)) }()
	log.Fatal(agent.ListenAndServe("tcp", "127.0.0.1:12345"))
}
