// Package metrics counts and times what the daemon does, for Prometheus.
//
// In flow calls of the doors (an interceptor for the CRI, a function for the Docker
// API), ended pulls, and, when somebody asks, a census of the engine's objects. Out
// flows the text format under /metrics. It sees names of methods and routes, codes and
// durations, and nothing of what a request holds.
package metrics

import (
	"context"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hako-engine/hako/engine"
)

// Buckets in seconds: a call takes a fraction of a millisecond to minutes, a pull
// seconds to many minutes.
var (
	callBuckets = []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10, 30, 120}
	pullBuckets = []float64{.1, .5, 1, 2.5, 5, 10, 30, 60, 180, 600, 1800}
)

// Metrics are the counters of one daemon.
type Metrics struct {
	registry *prometheus.Registry
	cri      *prometheus.HistogramVec
	docker   *prometheus.HistogramVec
	pulls    *prometheus.HistogramVec
	bytes    prometheus.Counter
}

// New makes the counters. version is hako's.
func New(version string) *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		cri: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "hako_cri_call_duration_seconds",
			Help: "How long calls of the CRI took, by method and gRPC code.", Buckets: callBuckets}, []string{"method", "code"}),
		docker: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "hako_docker_request_duration_seconds",
			Help: "How long requests of the Docker API took, streams included, by route and HTTP status.", Buckets: callBuckets}, []string{"route", "code"}),
		pulls: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "hako_image_pull_duration_seconds",
			Help: "How long pulls of images by Docker's API and the CRI took, by result (ok or error).", Buckets: pullBuckets}, []string{"result"}),
		bytes: prometheus.NewCounter(prometheus.CounterOpts{Name: "hako_image_pull_bytes_total",
			Help: "Bytes of layers that pulls got from registries."}),
	}
	info := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "hako_info", Help: "1, with the version of hako.",
		ConstLabels: prometheus.Labels{"version": version}}, func() float64 { return 1 })
	m.registry.MustRegister(m.cri, m.docker, m.pulls, m.bytes, info,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Watch adds the objects of an engine: count is called for each scrape.
func (m *Metrics) Watch(count func() engine.Census) {
	m.registry.MustRegister(&census{count: count,
		containers: prometheus.NewDesc("hako_containers", "Containers of Docker's API and of pods, by state.", []string{"state"}, nil),
		sandboxes:  prometheus.NewDesc("hako_pod_sandboxes", "Pod sandboxes by state.", []string{"state"}, nil),
		execs:      prometheus.NewDesc("hako_execs", "Commands that run in containers for clients.", nil, nil),
		shims:      prometheus.NewDesc("hako_shims", "Shim processes: one for each pod, and each lone container that runs; not those of tasks of containerd's clients.", nil, nil),
	})
}

// Handler answers under /metrics.
func (m *Metrics) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second}))
	return mux
}

// Docker takes a request of the Docker API.
func (m *Metrics) Docker(route string, status int, took time.Duration) {
	m.docker.WithLabelValues(route, strconv.Itoa(status)).Observe(took.Seconds())
}

// Pulled takes a pull.
func (m *Metrics) Pulled(p engine.Pull) {
	result := "ok"
	if p.Err != nil {
		result = "error"
	}
	m.pulls.WithLabelValues(result).Observe(p.Took.Seconds())
	m.bytes.Add(float64(p.Bytes))
}

// Unary takes calls of the CRI.
func (m *Metrics) Unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	began := time.Now()
	resp, err := next(ctx, req)
	m.call(info.FullMethod, began, err)
	return resp, err
}

// Stream takes streaming calls of the CRI, when they end.
func (m *Metrics) Stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	began := time.Now()
	err := next(srv, ss)
	m.call(info.FullMethod, began, err)
	return err
}

func (m *Metrics) call(method string, began time.Time, err error) {
	code := status.Code(err)
	if code == codes.Unknown { // what the context ended is no status yet
		code = status.FromContextError(err).Code()
	}
	m.cri.WithLabelValues(method[strings.LastIndexByte(method, '/')+1:], code.String()).Observe(time.Since(began).Seconds())
}

// census is a prometheus.Collector.
type census struct {
	count                               func() engine.Census
	containers, sandboxes, execs, shims *prometheus.Desc
}

func (c *census) Describe(to chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.containers, c.sandboxes, c.execs, c.shims} {
		to <- d
	}
}

func (c *census) Collect(to chan<- prometheus.Metric) {
	n := c.count()
	gauge := func(d *prometheus.Desc, v int, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v), labels...)
	}
	// A state that nothing is in is 0 and not absent.
	for _, s := range []engine.Status{engine.StatusCreated, engine.StatusRunning, engine.StatusPaused, engine.StatusRestarting, engine.StatusExited, engine.StatusDead} {
		gauge(c.containers, n.Containers[s], string(s))
	}
	for _, s := range []engine.SandboxState{engine.SandboxReady, engine.SandboxNotReady} {
		gauge(c.sandboxes, n.Sandboxes[s], string(s))
	}
	gauge(c.execs, n.Execs)
	gauge(c.shims, n.Shims)
}
