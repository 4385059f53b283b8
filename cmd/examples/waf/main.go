// Command waf is an agent that judges requests and responses by the OWASP Core Rule
// Set. haproxy.cfg and waf.conf are HAProxy's side.
package main

import (
	"context"
	"errors"
	"log"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/corazawaf/coraza-coreruleset/v4"
	"github.com/corazawaf/coraza/v3"
	"github.com/corazawaf/coraza/v3/types"
	"github.com/oklog/run"
	"github.com/spoa-go/spoa"
)

// directives are Coraza's recommended settings and the rule set, which blocks.
const directives = `
Include @coraza.conf-recommended
Include @crs-setup.conf.example
Include @owasp_crs/*.conf
SecRuleEngine On`

// keepFor is longer than HAProxy's timeout server: a response may come that late.
const keepFor = time.Minute

func main() {
	agent, err := newAgent(slog.Default())
	if err != nil {
		log.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:12345")
	if err != nil {
		log.Fatal(err)
	}
	var g run.Group
	g.Add(agent.Actor(l, 10*time.Second))
	g.Add(run.SignalHandler(context.Background(), os.Interrupt, syscall.SIGTERM))
	slog.Info("ended", "reason", g.Run())
}

func newAgent(logger *slog.Logger) (*spoa.Agent, error) {
	rules, err := coraza.NewWAF(coraza.NewWAFConfig().WithRootFS(coreruleset.FS).WithDirectives(directives).
		WithErrorCallback(func(r types.MatchedRule) {
			logger.Warn("rule matched", "id", r.Rule().ID(), "transaction", r.TransactionID(), "message", r.Message())
		}))
	w := &waf{rules: rules}
	return spoa.New(
		spoa.WithHandlerFunc("check-request", w.checkRequest),
		spoa.WithHandlerFunc("check-response", w.checkResponse),
		spoa.WithHandlerTimeout(900*time.Millisecond),
		spoa.WithMaxFrameSize(1<<20), // for a tune.bufsize of up to 1 MiB
		spoa.WithSlog(logger),
	), err
}

// waf judges by rules. Transactions are kept from a request to its response.
type waf struct {
	rules coraza.WAF
	kept  sync.Map // of types.Transaction, by id
}

func (w *waf) checkRequest(ctx context.Context, m *spoa.Message, a *spoa.Actions) error {
	var req struct {
		ID      string     `spoe:"id"`
		SrcIP   netip.Addr `spoe:"src-ip"`
		SrcPort int        `spoe:"src-port"`
		DstIP   netip.Addr `spoe:"dst-ip"`
		DstPort int        `spoe:"dst-port"`
		Method  string     `spoe:"method"`
		URI     string     `spoe:"uri"`
		Version string     `spoe:"version"`
		Host    string     `spoe:"host,optional"`
		Headers spoa.Value `spoe:"headers"` // a view of the frame, as is the body
		Body    spoa.Value `spoe:"body"`
	}
	if err := m.Decode(&req); err != nil {
		return err
	}
	tx := w.rules.NewTransactionWithID(req.ID)
	tx.ProcessConnection(req.SrcIP.String(), req.SrcPort, req.DstIP.String(), req.DstPort)
	tx.ProcessURI(req.URI, req.Method, "HTTP/"+req.Version)
	tx.SetServerName(req.Host)
	err := judge(a, "request", req.Headers, tx.AddRequestHeader,
		func() (*types.Interruption, error) { return tx.ProcessRequestHeaders(), nil },
		func() (*types.Interruption, error) {
			it, _, err := tx.WriteRequestBody(req.Body.Bytes())
			return it, err
		},
		tx.ProcessRequestBody)
	if err != nil || tx.IsInterrupted() || ctx.Err() != nil { // there will be no response to judge
		finish(tx)
		return err
	}
	w.kept.Store(req.ID, tx)
	time.AfterFunc(keepFor, func() {
		if w.kept.CompareAndDelete(req.ID, tx) {
			finish(tx)
		}
	})
	return nil
}

func (w *waf) checkResponse(_ context.Context, m *spoa.Message, a *spoa.Actions) error {
	var res struct {
		ID      string     `spoe:"id"`
		Status  int        `spoe:"status"`
		Version string     `spoe:"version"`
		Headers spoa.Value `spoe:"headers"`
		Body    spoa.Value `spoe:"body"`
	}
	if err := m.Decode(&res); err != nil {
		return err
	}
	kept, ok := w.kept.LoadAndDelete(res.ID)
	if !ok {
		return errors.New("no request of that id, or too long ago")
	}
	tx := kept.(types.Transaction)
	defer finish(tx)
	return judge(a, "response", res.Headers, tx.AddResponseHeader,
		func() (*types.Interruption, error) {
			return tx.ProcessResponseHeaders(res.Status, "HTTP/"+res.Version), nil
		},
		func() (*types.Interruption, error) {
			it, _, err := tx.WriteResponseBody(res.Body.Bytes())
			return it, err
		},
		tx.ProcessResponseBody)
}

// judge adds the headers, takes the steps until one of them interrupts, and sets a
// variable to pass or deny. HAProxy denies as well if there is none.
func judge(a *spoa.Actions, name string, headers spoa.Value, add func(name, value string), steps ...func() (*types.Interruption, error)) error {
	for h, err := range headers.Headers() {
		if err != nil {
			return err
		}
		add(string(h.Name), string(h.Value))
	}
	verdict := "pass"
	for _, step := range steps {
		it, err := step()
		if err != nil {
			return err
		}
		if it != nil {
			a.SetVar(spoa.ScopeTxn, "rule", spoa.Int(it.RuleID))
			verdict = "deny"
			break
		}
	}
	a.SetVar(spoa.ScopeTxn, name, spoa.String(verdict))
	return nil
}

func finish(tx types.Transaction) {
	tx.ProcessLogging()
	_ = tx.Close() // removes temporary files of its bodies
}
