package metrics

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hako-engine/hako/engine"
)

func scrape(t *testing.T, m *Metrics) string {
	t.Helper()
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if w.Code != http.StatusOK {
		t.Fatal(w.Code)
	}
	b, err := io.ReadAll(w.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	m := New("1.2.3")
	running := 2
	m.Watch(func() engine.Census {
		return engine.Census{Containers: map[engine.Status]int{engine.StatusRunning: running}, Sandboxes: map[engine.SandboxState]int{engine.SandboxReady: 3}, Execs: 4, Shims: 5}
	})
	info := &grpc.UnaryServerInfo{FullMethod: "/runtime.v1.RuntimeService/RunPodSandbox"}
	for _, err := range []error{nil, nil, status.Error(codes.NotFound, "x")} {
		resp, got := m.Unary(t.Context(), "req", info, func(context.Context, any) (any, error) { return "resp", err })
		if resp != "resp" || got != err {
			t.Errorf("%v, %v", resp, got)
		}
	}
	if err := m.Stream(nil, nil, &grpc.StreamServerInfo{FullMethod: "/runtime.v1.RuntimeService/GetContainerEvents"},
		func(any, grpc.ServerStream) error { return context.Canceled }); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	m.Docker("POST /containers/{id}/start", 204, 3*time.Millisecond)
	m.Pulled(engine.Pull{Took: 2 * time.Second, Bytes: 1000})
	m.Pulled(engine.Pull{Took: time.Second, Bytes: 24, Err: errors.New("x")})
	text := scrape(t, m)
	for _, want := range []string{
		`hako_info{version="1.2.3"} 1`,
		`hako_cri_call_duration_seconds_count{code="OK",method="RunPodSandbox"} 2`,
		`hako_cri_call_duration_seconds_count{code="NotFound",method="RunPodSandbox"} 1`,
		`hako_cri_call_duration_seconds_count{code="Canceled",method="GetContainerEvents"} 1`,
		`hako_docker_request_duration_seconds_bucket{code="204",route="POST /containers/{id}/start",le="0.005"} 1`,
		`hako_image_pull_duration_seconds_sum{result="ok"} 2`,
		`hako_image_pull_duration_seconds_count{result="error"} 1`,
		`hako_image_pull_bytes_total 1024`,
		`hako_containers{state="running"} 2`, `hako_containers{state="exited"} 0`,
		`hako_pod_sandboxes{state="ready"} 3`, `hako_execs 4`, `hako_shims 5`,
		"go_goroutines ", "process_open_fds ",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s", want)
		}
	}
	running = 7
	if !strings.Contains(scrape(t, m), `hako_containers{state="running"} 7`) {
		t.Error("an old census is shown")
	}
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/debug/pprof/", nil))
	if w.Code != http.StatusNotFound {
		t.Errorf("another path: %d", w.Code)
	}
}

// TestDocumented holds docs/metrics.md to the code: each metric is there, with its labels, and no other.
func TestDocumented(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	said := map[string]string{} // name → what the page says of its type and labels
	for _, m := range regexp.MustCompile("(?m)^\\| `(hako_[a-z_]+)` \\| ([^|]*) \\|").FindAllStringSubmatch(string(doc), -1) {
		said[m[1]] = m[2]
	}
	m := New("1.2.3")
	m.Watch(func() engine.Census { return engine.Census{} })
	m.call("/x/Y", time.Now(), nil)
	m.Docker("GET /x", 200, time.Second)
	m.Pulled(engine.Pull{})
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		name := f.GetName()
		if !strings.HasPrefix(name, "hako_") {
			if !strings.HasPrefix(name, "go_") && !strings.HasPrefix(name, "process_") {
				t.Errorf("docs/metrics.md does not have %s", name)
			}
			continue
		}
		text, ok := said[name]
		delete(said, name)
		if !ok || !strings.HasPrefix(text, strings.ToLower(f.GetType().String())) {
			t.Errorf("docs/metrics.md says of %s, a %s: %q", name, strings.ToLower(f.GetType().String()), text)
			continue
		}
		_, labels, _ := strings.Cut(text, ":")
		labels, _, _ = strings.Cut(labels, "(") // what they may be
		var got []string
		for _, l := range f.GetMetric()[0].GetLabel() {
			got = append(got, "`"+l.GetName()+"`")
		}
		want := strings.FieldsFunc(labels, func(r rune) bool { return r == ',' || r == ' ' })
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("docs/metrics.md: the labels of %s are %v, not %v", name, got, want)
		}
	}
	for name := range said {
		t.Errorf("docs/metrics.md has %s, which there is not", name)
	}
}
