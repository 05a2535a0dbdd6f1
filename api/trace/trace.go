// Package trace sends a span for each call of the CRI to an OpenTelemetry collector.
//
// In flow calls, with the caller's trace context in their metadata (W3C traceparent,
// as the kubelet sends it); out flow spans over OTLP (gRPC). A span holds the method, the code and
// the text of an error, and nothing of what a request holds. Spans are sent in the
// background and dropped when the collector does not take them: no call waits for it.
package trace

import (
	"context"
	"fmt"
	"net/netip"
	"net/url"
	"strings"

	"github.com/containerd/errdefs"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// Tracer makes spans.
type Tracer struct {
	provider *sdktrace.TracerProvider
	tracer   trace.Tracer
	from     propagation.TraceContext
}

// CheckEndpoint tells whether New takes an endpoint: http://HOST:PORT on this machine, or
// https://HOST:PORT. Errors are errdefs.ErrInvalidArgument.
func CheckEndpoint(endpoint string) error {
	u, err := url.Parse(endpoint)
	if err != nil || u.Host == "" || u.Port() == "" || u.Path != "" && u.Path != "/" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("%q is not http://HOST:PORT or https://HOST:PORT: %w", endpoint, errdefs.ErrInvalidArgument)
	}
	switch u.Scheme {
	case "https":
		return nil
	case "http":
		if ip, err := netip.ParseAddr(u.Hostname()); u.Hostname() == "localhost" || err == nil && ip.IsLoopback() {
			return nil
		}
		return fmt.Errorf("%s is not on this machine: spans would go over the network in the clear, use https: %w", endpoint, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("%q is neither http nor https: %w", endpoint, errdefs.ErrInvalidArgument)
}

// New makes a tracer. It does not wait for the collector. ratio of the traces that begin
// here are sent, 0 to 1; those of a caller that samples are.
func New(ctx context.Context, endpoint string, ratio float64, version string) (*Tracer, error) {
	if err := CheckEndpoint(endpoint); err != nil {
		return nil, fmt.Errorf("trace: %w", err)
	}
	exporter, err := otlptracegrpc.New(ctx, otlptracegrpc.WithEndpointURL(strings.TrimSuffix(endpoint, "/")))
	if err != nil {
		return nil, fmt.Errorf("trace to %s: %w", endpoint, err)
	}
	return newTracer(exporter, ratio, version), nil
}

func newTracer(exporter sdktrace.SpanExporter, ratio float64, version string) *Tracer {
	provider := sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(ratio))),
		sdktrace.WithResource(resource.NewSchemaless(
			attribute.String("service.name", "hakod"), attribute.String("service.version", version))),
	)
	return &Tracer{provider: provider, tracer: provider.Tracer("github.com/hako-engine/hako/api/trace")}
}

// Shutdown sends what is left, until ctx ends.
func (t *Tracer) Shutdown(ctx context.Context) error { return t.provider.Shutdown(ctx) }

// Unary makes a span of a call.
func (t *Tracer) Unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	ctx, span := t.begin(ctx, info.FullMethod)
	resp, err := next(ctx, req)
	end(span, err)
	return resp, err
}

// Stream makes a span of a streaming call.
func (t *Tracer) Stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	ctx, span := t.begin(ss.Context(), info.FullMethod)
	err := next(srv, &serverStream{ss, ctx})
	end(span, err)
	return err
}

func (t *Tracer) begin(ctx context.Context, method string) (context.Context, trace.Span) {
	md, _ := metadata.FromIncomingContext(ctx)
	ctx = t.from.Extract(ctx, carrier(md))
	service, name, _ := strings.Cut(strings.TrimPrefix(method, "/"), "/")
	return t.tracer.Start(ctx, service+"/"+name, trace.WithSpanKind(trace.SpanKindServer),
		trace.WithAttributes(attribute.String("rpc.system", "grpc"), attribute.String("rpc.service", service), attribute.String("rpc.method", name)))
}

func end(span trace.Span, err error) {
	st := status.Convert(err)
	span.SetAttributes(attribute.Int("rpc.grpc.status_code", int(st.Code())))
	if err != nil {
		span.SetStatus(codes.Error, st.Message())
	}
	span.End()
}

// serverStream has the span's context.
type serverStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *serverStream) Context() context.Context { return s.ctx }

// carrier is a propagation.TextMapCarrier.
type carrier metadata.MD

func (c carrier) Get(key string) string {
	if v := metadata.MD(c).Get(key); len(v) > 0 {
		return v[0]
	}
	return ""
}

func (c carrier) Set(key, value string) { metadata.MD(c).Set(key, value) }

func (c carrier) Keys() []string {
	var out []string
	for k := range c {
		out = append(out, k)
	}
	return out
}
