// Package tracing makes the handlers of an agent part of the traces of OpenTelemetry.
package tracing

import (
	"context"

	"github.com/spoa-go/spoa"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// Middleware is for spoa.WithMiddleware: it makes a span of each call of a handler.
// Its parent is the one in the argument traceparent, if HAProxy sends that:
//
//	args traceparent=req.hdr(traceparent)
func Middleware(tracer trace.Tracer) func(spoa.Handler) spoa.Handler {
	return func(next spoa.Handler) spoa.Handler {
		return spoa.HandlerFunc(func(ctx context.Context, m *spoa.Message, a *spoa.Actions) error {
			parent := propagation.MapCarrier{"traceparent": string(m.Value("traceparent").Bytes())}
			ctx = propagation.TraceContext{}.Extract(ctx, parent)
			ctx, span := tracer.Start(ctx, m.Name(), trace.WithSpanKind(trace.SpanKindServer),
				trace.WithAttributes(attribute.String("spoe.engine_id", m.EngineID())))
			defer span.End()
			err := next.ServeSPOE(ctx, m, a)
			if err != nil {
				span.RecordError(err)
				span.SetStatus(codes.Error, err.Error())
			}
			return err
		})
	}
}
