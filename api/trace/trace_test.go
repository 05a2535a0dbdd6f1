package trace

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/grpc"
	grpccodes "google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

func TestSpans(t *testing.T) {
	t.Parallel()
	mem := tracetest.NewInMemoryExporter()
	tr := newTracer(mem, 0, "1.2.3") // only those of callers that sample
	info := &grpc.UnaryServerInfo{FullMethod: "/runtime.v1.RuntimeService/StopContainer"}
	ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs("traceparent", caller))
	_, err := tr.Unary(ctx, nil, info, func(ctx context.Context, _ any) (any, error) {
		if got := trace.SpanContextFromContext(ctx).TraceID().String(); got != caller[3:35] {
			t.Errorf("trace %s", got)
		}
		return nil, status.Error(grpccodes.NotFound, "no such container")
	})
	if status.Code(err) != grpccodes.NotFound {
		t.Error(err)
	}
	if _, err := tr.Unary(t.Context(), nil, info, func(context.Context, any) (any, error) { return nil, nil }); err != nil {
		t.Error(err)
	}
	if err := tr.Stream(nil, fakeStream{ctx: ctx}, &grpc.StreamServerInfo{FullMethod: "/runtime.v1.RuntimeService/GetContainerEvents"},
		func(_ any, ss grpc.ServerStream) error {
			if !trace.SpanContextFromContext(ss.Context()).IsSampled() {
				t.Error("the stream has no span")
			}
			return nil
		}); err != nil {
		t.Error(err)
	}
	if err := tr.provider.ForceFlush(t.Context()); err != nil {
		t.Fatal(err)
	}
	spans := mem.GetSpans()
	if len(spans) != 2 {
		t.Fatalf("%d spans", len(spans))
	}
	s := spans[0]
	if s.Name != "runtime.v1.RuntimeService/StopContainer" || s.SpanKind != trace.SpanKindServer || s.Status.Code != codes.Error ||
		s.Status.Description != "no such container" || s.Parent.SpanID().String() != caller[36:52] {
		t.Errorf("%+v", s)
	}
	if spans[1].Status.Code != codes.Unset {
		t.Errorf("%+v", spans[1].Status)
	}
	if err := tr.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
}

type fakeStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s fakeStream) Context() context.Context { return s.ctx }

// sink is a collector.
type sink struct {
	collector.UnimplementedTraceServiceServer
	got chan string
}

func (s *sink) Export(_ context.Context, r *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	for _, rs := range r.ResourceSpans {
		for _, ss := range rs.ScopeSpans {
			for _, sp := range ss.Spans {
				s.got <- fmt.Sprintf("%s of %s", sp.Name, rs.Resource.Attributes[0].Value.GetStringValue())
			}
		}
	}
	return &collector.ExportTraceServiceResponse{}, nil
}

// TestExport sends a span to a collector, and loses none at the end.
func TestExport(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &sink{got: make(chan string, 10)}
	srv := grpc.NewServer()
	collector.RegisterTraceServiceServer(srv, s)
	go srv.Serve(l)
	defer srv.Stop()
	tr, err := New(t.Context(), "http://"+l.Addr().String(), 1, "1.2.3")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tr.Unary(t.Context(), nil, &grpc.UnaryServerInfo{FullMethod: "/a.B/C"}, func(context.Context, any) (any, error) { return nil, nil }); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	if err := tr.Shutdown(ctx); err != nil {
		t.Fatal(err)
	}
	select {
	case got := <-s.got:
		if got != "a.B/C of hakod" {
			t.Error(got)
		}
	default:
		t.Error("no span")
	}
}

// TestNoCollector: no call waits for one.
func TestNoCollector(t *testing.T) {
	t.Parallel()
	tr, err := New(t.Context(), "http://127.0.0.1:1", 1, "")
	if err != nil {
		t.Fatal(err)
	}
	for range 10_000 { // more than are queued
		_, _ = tr.Unary(t.Context(), nil, &grpc.UnaryServerInfo{FullMethod: "/a.B/C"}, func(context.Context, any) (any, error) { return nil, nil })
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_ = tr.Shutdown(ctx)
}

func TestCheckEndpoint(t *testing.T) {
	t.Parallel()
	good := []string{"http://127.0.0.1:4317", "http://localhost:4317/", "http://[::1]:4317", "https://otel.example.org:4317"}
	bad := []string{"", "127.0.0.1:4317", "http://127.0.0.1", "http://10.0.0.1:4317", "http://example.org:1", "ftp://127.0.0.1:1", "https://u:p@x:1", "http://127.0.0.1:1/x", "http://127.0.0.1:1?x", ":1"}
	for _, e := range slices.Concat(good, bad) {
		err := CheckEndpoint(e)
		if (err == nil) != slices.Contains(good, e) || err != nil && !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%q: %v", e, err)
		}
	}
}
