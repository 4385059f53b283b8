package tracing

import (
	"context"
	"errors"
	"net"
	"testing"

	"github.com/spoa-go/spoa"
	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
)

func TestMiddleware(t *testing.T) {
	recorder := tracetest.NewSpanRecorder()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(recorder))
	agent := spoa.New(spoa.WithMiddleware(Middleware(provider.Tracer("test"))),
		spoa.WithHandlerFunc("check", func(ctx context.Context, m *spoa.Message, a *spoa.Actions) error {
			a.SetVar(spoa.ScopeTxn, "trace", spoa.String(trace.SpanContextFromContext(ctx).TraceID().String()))
			a.Keep()
			if m.Value("fail").Kind() != spoa.KindNull {
				return errors.New("as asked")
			}
			return nil
		}))
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
	const id, span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
	for _, tt := range []struct {
		message string
		child   bool
		status  codes.Code
	}{
		{"check traceparent=str:00-" + id + "-" + span + "-01", true, codes.Unset},
		{"check traceparent=null", false, codes.Unset},
		{"check", false, codes.Unset},
		{"check fail=bool:true traceparent=str:00-" + id + "-" + span + "-01", true, codes.Error},
	} {
		recorder.Reset()
		ack, err := client.Notify(t.Context(), spoa.MustParseMessage(tt.message))
		if err != nil {
			t.Fatal(err)
		}
		spans := recorder.Ended()
		if len(spans) != 1 {
			t.Fatalf("%s: want a span, have %d", tt.message, len(spans))
		}
		s := spans[0]
		child := s.Parent().SpanID().String() == span && s.SpanContext().TraceID().String() == id
		if child != tt.child || s.Name() != "check" || s.Status().Code != tt.status {
			t.Errorf("%s: want check, a child %v, %v, have %s, %v, %v", tt.message, tt.child, tt.status, s.Name(), child, s.Status())
		}
		if have, _ := ack.Lookup(spoa.ScopeTxn, "trace"); have.String() != s.SpanContext().TraceID().String() {
			t.Errorf("%s: want the span in the handler's context, have %s", tt.message, have)
		}
	}
}
