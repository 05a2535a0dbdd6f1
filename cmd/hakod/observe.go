package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"time"

	"go.opentelemetry.io/otel"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/hako-engine/hako/api/metrics"
	"github.com/hako-engine/hako/api/trace"
	"github.com/hako-engine/hako/engine"
	"github.com/hako-engine/hako/internal/trim"
	"github.com/hako-engine/hako/internal/version"
)

// observers are metrics and traces, as far as they are turned on, and what gives memory back after work.
type observers struct {
	metrics *metrics.Metrics // nil: off
	tracer  *trace.Tracer    // nil: off
	unary   []grpc.UnaryServerInterceptor
	stream  []grpc.StreamServerInterceptor
	heap    *trim.Timer
	program *trim.Timer
	log     *slog.Logger
}

// How long after the beginning of a burst of work, and how often while work goes on, memory is given back: that of the heap, which takes some 10 ms
// of CPU time, and that of the program, which takes 1 to 2 ms.
const (
	heapAfter    = 10 * time.Second
	programAfter = 2 * time.Second
)

// heapGrowth is how much the heap grows until it is collected, in percent of what is in use. That is a few megabytes, whose collection is cheap.
const heapGrowth = 40

func newObservers(ctx context.Context, cfg config, log *slog.Logger) (*observers, error) {
	o := &observers{heap: trim.NewTimer(heapAfter, trim.Heap), program: trim.NewTimer(programAfter, trim.Program), log: log}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(heapGrowth)
	}
	o.unary, o.stream = append(o.unary, o.busyUnary), append(o.stream, o.busyStream)
	if cfg.MetricsAddress != "" {
		o.metrics = metrics.New(version.Version)
		o.unary, o.stream = append(o.unary, o.metrics.Unary), append(o.stream, o.metrics.Stream)
	}
	if cfg.TraceEndpoint != "" {
		otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { log.Warn("trace", "error", err) }))
		var err error
		if o.tracer, err = trace.New(ctx, cfg.TraceEndpoint, cfg.TraceRatio, version.Version); err != nil {
			return nil, err
		}
		o.unary, o.stream = append(o.unary, o.tracer.Unary), append(o.stream, o.tracer.Stream)
	}
	return o, nil
}

// busy notes that there is work.
func (o *observers) busy() {
	o.heap.Busy()
	o.program.Busy()
}

func (o *observers) busyUnary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	o.busy()
	return next(ctx, req)
}

func (o *observers) busyStream(srv any, s grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	o.busy()
	return next(srv, s)
}

// pulled gives the function that the engine calls, or nil.
func (o *observers) pulled() func(engine.Pull) {
	if o.metrics == nil {
		return nil
	}
	return o.metrics.Pulled
}

// docker gives the function that the Docker door calls.
func (o *observers) docker() func(string, int, time.Duration) {
	return func(route string, status int, took time.Duration) {
		o.busy()
		if o.metrics != nil {
			o.metrics.Docker(route, status, took)
		}
	}
}

// serve answers under /metrics until ctx ends.
func (o *observers) serve(ctx context.Context, g *errgroup.Group, cfg config, eng *engine.Engine) error {
	if o.metrics == nil {
		return nil
	}
	o.metrics.Watch(eng.Census)
	l, err := net.Listen("tcp", cfg.MetricsAddress)
	if err != nil {
		return fmt.Errorf("serve metrics: %w", err)
	}
	srv := &http.Server{Handler: o.metrics.Handler(), ReadHeaderTimeout: shutdownLimit, IdleTimeout: time.Minute,
		WriteTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(o.log.Handler(), slog.LevelDebug)}
	g.Go(func() error {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve metrics: %w", err)
		}
		return nil
	})
	g.Go(func() error { <-ctx.Done(); return srv.Close() })
	return nil
}

// close sends the spans that are left.
func (o *observers) close() {
	if o.tracer == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), shutdownLimit)
	defer cancel()
	if err := o.tracer.Shutdown(ctx); err != nil {
		o.log.Warn("send the last spans", "error", err)
	}
}
