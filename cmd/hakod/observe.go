package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"go.opentelemetry.io/otel"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/hako-engine/hako/api/metrics"
	"github.com/hako-engine/hako/api/trace"
	"github.com/hako-engine/hako/engine"
	"github.com/hako-engine/hako/internal/version"
)

// observers are metrics and traces, as far as they are turned on.
type observers struct {
	metrics *metrics.Metrics // nil: off
	tracer  *trace.Tracer    // nil: off
	unary   []grpc.UnaryServerInterceptor
	stream  []grpc.StreamServerInterceptor
	log     *slog.Logger
}

func newObservers(ctx context.Context, cfg config, log *slog.Logger) (*observers, error) {
	o := &observers{log: log}
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

// pulled and docker give the functions that the engine and the Docker door call, or nil.
func (o *observers) pulled() func(engine.Pull) {
	if o.metrics == nil {
		return nil
	}
	return o.metrics.Pulled
}

func (o *observers) docker() func(string, int, time.Duration) {
	if o.metrics == nil {
		return nil
	}
	return o.metrics.Docker
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
