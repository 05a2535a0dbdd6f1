package docker

import (
	"context"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/api/stream"
	"github.com/hako-engine/hako/engine"
)

// fake is a Backend of which a test fills in what its request reaches. What it does not fill in
// panics, which the server answers with 500.
type fake struct {
	Backend // nil

	create       func(name string, c engine.Config) (string, []string, error)
	start        func(ref string) error
	stop         func(ref string, o engine.StopOptions) error
	remove       func(ref string, o engine.RemoveOptions) error
	update       func(ref string, r engine.Resources, p *engine.RestartPolicy) ([]string, error)
	wait         func(ctx context.Context, ref string, cond engine.WaitCondition) (<-chan engine.WaitResult, error)
	containers   []engine.Container
	committed    *engine.CommitOptions
	listed       *engine.ListOptions
	logs         func(ctx context.Context, ref string, o engine.LogOptions) (iter.Seq2[engine.LogEntry, error], error)
	attach       func(ref string, o engine.AttachOptions) (engine.Attachment, error)
	resized      chan [2]uint32
	stats        func() (engine.Stats, error)
	exec         *engine.Exec
	execCreated  *engine.ExecConfig
	attachExec   func() (engine.Attachment, error)
	put          func(path string, r io.Reader, o engine.PutOptions) error
	get          func(path string) (io.ReadCloser, engine.PathStat, error)
	images       map[string]engine.ImageDetail
	pull         func(ref string, o engine.PullOptions) error
	push         func(ref string, o engine.PushOptions) error
	load         func(r io.Reader, o engine.LoadOptions) ([]engine.LoadedImage, error)
	save         func(refs []string, w io.Writer) error
	tagged       [2]string
	volumeFilter engine.Filters
	netCreated   *engine.NetworkConfig
	connected    *engine.EndpointSettings
	eventStream  func(ctx context.Context, since, until time.Time, f engine.Filters) (<-chan engine.Event, error)
	node         engine.Info
	usage        engine.DiskUsage
}

func (f *fake) CreateContainer(_ context.Context, name string, c engine.Config) (string, []string, error) {
	return f.create(name, c)
}
func (f *fake) StartContainer(_ context.Context, ref string) error { return f.start(ref) }
func (f *fake) StopContainer(_ context.Context, ref string, o engine.StopOptions) error {
	return f.stop(ref, o)
}
func (f *fake) RemoveContainer(_ context.Context, ref string, o engine.RemoveOptions) error {
	return f.remove(ref, o)
}
func (f *fake) UpdateContainer(_ context.Context, ref string, r engine.Resources, p *engine.RestartPolicy) ([]string, error) {
	return f.update(ref, r, p)
}
func (f *fake) WaitContainer(ctx context.Context, ref string, cond engine.WaitCondition) (<-chan engine.WaitResult, error) {
	return f.wait(ctx, ref, cond)
}
func (f *fake) Containers(_ context.Context, o engine.ListOptions) ([]engine.Container, error) {
	f.listed = &o
	return f.containers, nil
}
func (f *fake) Container(_ context.Context, ref string) (engine.Container, error) {
	for _, c := range f.containers {
		if c.ID == ref || c.Name == ref {
			return c, nil
		}
	}
	return engine.Container{}, notFoundf("No such container: %s", ref)
}
func (f *fake) Logs(ctx context.Context, ref string, o engine.LogOptions) (iter.Seq2[engine.LogEntry, error], error) {
	return f.logs(ctx, ref, o)
}
func (f *fake) Attach(_ context.Context, ref string, o engine.AttachOptions) (engine.Attachment, error) {
	return f.attach(ref, o)
}
func (f *fake) ResizeContainer(_ context.Context, _ string, w, h uint32) error {
	f.resized <- [2]uint32{w, h}
	return nil
}
func (f *fake) Stats(context.Context, string) (engine.Stats, error) { return f.stats() }
func (f *fake) CreateExec(_ context.Context, c engine.ExecConfig) (string, error) {
	f.execCreated = &c
	return "e1", nil
}
func (f *fake) Exec(_ context.Context, id string) (engine.Exec, error) {
	if f.exec == nil {
		return engine.Exec{}, notFoundf("No such exec instance: %s", id)
	}
	return *f.exec, nil
}
func (f *fake) AttachExec(context.Context, string) (engine.Attachment, error) { return f.attachExec() }
func (f *fake) PutArchive(_ context.Context, _, path string, r io.Reader, o engine.PutOptions) error {
	return f.put(path, r, o)
}
func (f *fake) GetArchive(_ context.Context, _, path string) (io.ReadCloser, engine.PathStat, error) {
	return f.get(path)
}
func (f *fake) Image(_ context.Context, ref string) (engine.ImageDetail, error) {
	d, ok := f.images[ref]
	if !ok {
		return d, notFoundf("No such image: %s", ref)
	}
	return d, nil
}
func (f *fake) Images(context.Context, engine.Filters) (out []engine.ImageSummary, err error) {
	for _, d := range f.images {
		out = append(out, engine.ImageSummary{Image: d.Image, Containers: -1, SharedSize: -1})
	}
	return out, nil
}
func (f *fake) PullImage(_ context.Context, ref string, o engine.PullOptions) (engine.ImageRecord, error) {
	return engine.ImageRecord{}, f.pull(ref, o)
}
func (f *fake) PushImage(_ context.Context, ref string, o engine.PushOptions) error {
	return f.push(ref, o)
}
func (f *fake) LoadImages(_ context.Context, r io.Reader, o engine.LoadOptions) ([]engine.LoadedImage, error) {
	return f.load(r, o)
}
func (f *fake) SaveImages(_ context.Context, refs []string, _ engine.SaveOptions, w io.Writer) error {
	return f.save(refs, w)
}
func (f *fake) TagImage(_ context.Context, source, target string) error {
	f.tagged = [2]string{source, target}
	return nil
}
func (f *fake) PruneVolumes(_ context.Context, filters engine.Filters) (engine.Pruned, error) {
	f.volumeFilter = filters
	return engine.Pruned{}, nil
}
func (f *fake) CreateNetwork(_ context.Context, c engine.NetworkConfig) (engine.Network, error) {
	f.netCreated = &c
	return engine.Network{ID: "n1", Name: c.Name}, nil
}
func (f *fake) ConnectNetwork(_ context.Context, _, _ string, s engine.EndpointSettings) error {
	f.connected = &s
	return nil
}
func (f *fake) Events(ctx context.Context, since, until time.Time, filters engine.Filters) (<-chan engine.Event, error) {
	return f.eventStream(ctx, since, until, filters)
}
func (f *fake) Info(context.Context) (engine.Info, error)           { return f.node, nil }
func (f *fake) DiskUsage(context.Context) (engine.DiskUsage, error) { return f.usage, nil }
func (f *fake) Check(_ context.Context, o engine.CheckOptions) (engine.CheckReport, error) {
	o.Progress("hashing blobs", 1, 2)
	if o.Repair {
		return engine.CheckReport{}, errdefs.ErrUnavailable
	}
	return engine.CheckReport{Deep: o.Deep, Findings: []engine.Finding{{Room: "store", Problem: "blob-missing"}}}, nil
}

// node is a server on a unix socket with a client for it.
type node struct {
	t      *testing.T
	socket string
	server *Server
	client *http.Client
}

func serve(t *testing.T, b Backend) *node {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "docker.sock")
	l, err := stream.Listen(socket, -1)
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, socket: socket, server: New(Options{Backend: b, Version: "0.1.0", GitCommit: "abc"})}
	n.client = &http.Client{
		Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	done := make(chan error, 1)
	go func() { done <- n.server.Serve(l) }()
	t.Cleanup(func() {
		n.client.CloseIdleConnections()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		if err := n.server.Shutdown(ctx); err != nil {
			t.Errorf("shutdown: %v", err)
		}
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return n
}

// do sends a request with an optional JSON body and gives the answer and its whole body.
func (n *node) do(method, path, body string, header ...string) (*http.Response, string) {
	n.t.Helper()
	var r io.Reader
	if body != "" {
		r = strings.NewReader(body)
	}
	req, err := http.NewRequest(method, "http://docker"+path, r)
	if err != nil {
		n.t.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := n.client.Do(req)
	if err != nil {
		n.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		n.t.Fatal(err)
	}
	return resp, string(b)
}

// expect is do for which only the status matters.
func (n *node) expect(code int, method, path, body string, header ...string) string {
	n.t.Helper()
	resp, got := n.do(method, path, body, header...)
	if resp.StatusCode != code {
		n.t.Errorf("%s %s: %s %s, want %d", method, path, resp.Status, got, code)
	}
	return got
}

// process is an Attachment that a test plays.
type process struct {
	frames chan frame
	stdin  chan string // everything written, at CloseWrite
	mu     sync.Mutex
	in     strings.Builder
	closed chan struct{}
	once   sync.Once
}

type frame struct {
	stream int
	data   string
}

func newProcess(frames ...frame) *process {
	p := &process{frames: make(chan frame, 100), stdin: make(chan string, 1), closed: make(chan struct{})}
	for _, f := range frames {
		p.frames <- f
	}
	return p
}

func (p *process) ReadFrame() (int, []byte, error) {
	select {
	case f, ok := <-p.frames:
		if !ok {
			return 0, nil, io.EOF
		}
		return f.stream, []byte(f.data), nil
	case <-p.closed:
		return 0, nil, net.ErrClosed
	}
}

func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.in.Write(b)
}

func (p *process) CloseWrite() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stdin <- p.in.String()
	return nil
}

func (p *process) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

func (f *fake) CommitContainer(_ context.Context, _ string, o engine.CommitOptions) (string, error) {
	f.committed = &o
	return "sha256:c", nil
}

func (f *fake) Login(_ context.Context, a engine.RegistryAuth) error {
	if a.Password != "right" {
		return fmt.Errorf("unauthorized: incorrect username or password: %w", errdefs.ErrUnauthenticated)
	}
	return nil
}
