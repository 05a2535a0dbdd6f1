package cri

import (
	"context"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	api "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hako-engine/hako/engine"
)

// fake is a Backend with objects that a test puts there.
type fake struct {
	mu         sync.Mutex // guards faces
	sandboxes  []engine.Sandbox
	containers []engine.Container
	faces      map[string]*engine.PodContainerFace
	images     []engine.ImageDetail
	pinned     map[string]bool
	metrics    []engine.PodMetrics
	events     chan engine.Event
	netErr     error
	err        error // of calls that change something

	ran     *engine.SandboxConfig
	created *engine.Config
	stopped *engine.StopOptions
	updated *engine.Resources
	pulled  *engine.PullOptions
	cidrs   []netip.Prefix

	checkpointed string
	hold         chan struct{} // what a checkpoint waits for, beside its context
	exec         func(ctx context.Context, cmd []string, timeout time.Duration, limit int) (engine.ExecOutput, error)
}

func missing(what, ref string) error { return notFoundf("%s %q", what, ref) }

func (f *fake) RunSandbox(_ context.Context, c engine.SandboxConfig) (string, error) {
	f.ran = &c
	return "sandbox", f.err
}

func (f *fake) StopSandbox(ctx context.Context, ref string) error {
	_, err := f.Sandbox(ctx, ref)
	return err
}

func (f *fake) RemoveSandbox(ctx context.Context, ref string) error {
	_, err := f.Sandbox(ctx, ref)
	return err
}

func (f *fake) Sandbox(_ context.Context, ref string) (engine.Sandbox, error) {
	for _, s := range f.sandboxes {
		if ref != "" && strings.HasPrefix(s.ID, ref) {
			return s, nil
		}
	}
	return engine.Sandbox{}, missing("sandbox", ref)
}
func (f *fake) Sandboxes(context.Context) []engine.Sandbox { return f.sandboxes }

func (f *fake) SandboxContainers(_ context.Context, id string) []engine.Container {
	var out []engine.Container
	for _, c := range f.containers {
		if c.Config.Pod != nil && c.Config.Pod.Sandbox == id {
			out = append(out, c)
		}
	}
	return out
}

func (f *fake) UpdateSandboxResources(ctx context.Context, ref string, _, _ *engine.Resources) error {
	_, err := f.Sandbox(ctx, ref)
	return err
}

func (f *fake) SandboxUsage(ctx context.Context, ref string) (engine.SandboxUsage, error) {
	s, err := f.Sandbox(ctx, ref)
	return engine.SandboxUsage{Sandbox: s, Networks: map[string]engine.NetStats{"eth0": {RxBytes: 7}, "net1": {}}}, err
}

func (f *fake) SandboxUsages(_ context.Context, want func(engine.Sandbox) bool) []engine.SandboxUsage {
	var out []engine.SandboxUsage
	for _, s := range f.sandboxes {
		if want(s) {
			out = append(out, engine.SandboxUsage{Sandbox: s})
		}
	}
	return out
}

func (f *fake) PodMetrics(context.Context) []engine.PodMetrics { return f.metrics }

func (f *fake) CreatePodContainer(_ context.Context, _ string, c engine.Config) (string, error) {
	f.created = &c
	return "container", f.err
}
func (f *fake) SandboxSpec(context.Context, string) (*specs.Spec, error) {
	return &specs.Spec{Hostname: "of the sandbox"}, f.err
}
func (f *fake) ContainerSpec(context.Context, string) (*specs.Spec, error) {
	return &specs.Spec{Hostname: "of the container"}, f.err
}
func (f *fake) StartPodContainer(context.Context, string) error { return f.err }
func (f *fake) StopContainer(_ context.Context, _ string, o engine.StopOptions) error {
	f.stopped = &o
	return f.err
}
func (f *fake) RemovePodContainer(context.Context, string) error { return f.err }
func (f *fake) UpdatePodContainer(_ context.Context, _ string, r engine.Resources, _ *int) error {
	f.updated = &r
	return f.err
}

func (f *fake) Container(_ context.Context, ref string) (engine.Container, error) {
	for _, c := range f.containers {
		if ref != "" && strings.HasPrefix(c.ID, ref) {
			return c, nil
		}
	}
	return engine.Container{}, missing("container", ref)
}

func (f *fake) PodContainers(context.Context) []engine.PodContainer {
	var out []engine.PodContainer
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.podContainers() {
		if f.faces[c.ID] == nil {
			if f.faces == nil {
				f.faces = map[string]*engine.PodContainerFace{}
			}
			f.faces[c.ID] = c.Face()
		}
		out = append(out, engine.PodContainer{PodContainerFace: f.faces[c.ID], Status: c.State.Status})
	}
	return out
}

func (f *fake) podContainers() []engine.Container {
	return slices.DeleteFunc(slices.Clone(f.containers), func(c engine.Container) bool { return c.Config.Pod == nil })
}

func (f *fake) PodContainerUsage(_ context.Context, want func(engine.Container) bool) []engine.ContainerUsage {
	var out []engine.ContainerUsage
	for _, c := range f.podContainers() {
		if want(c) && c.State.Status == engine.StatusRunning {
			out = append(out, engine.ContainerUsage{Container: &c, Usage: engine.Usage{CPU: 5}})
		}
	}
	return out
}
func (f *fake) ReopenLog(context.Context, string) error { return f.err }
func (f *fake) CheckpointContainer(ctx context.Context, ref, path string) error {
	f.checkpointed = path
	if f.hold == nil {
		return f.err
	}
	select {
	case <-f.hold:
	case <-ctx.Done():
	}
	return ctx.Err()
}
func (f *fake) ExecSync(ctx context.Context, _ string, cmd []string, timeout time.Duration, limit int) (engine.ExecOutput, error) {
	return f.exec(ctx, cmd, timeout, limit)
}

func (f *fake) Images(context.Context, engine.Filters) ([]engine.ImageSummary, error) {
	var out []engine.ImageSummary
	for _, i := range f.images {
		out = append(out, engine.ImageSummary{Image: i.Image})
	}
	return out, nil
}

func (f *fake) Image(_ context.Context, ref string) (engine.ImageDetail, error) {
	for _, i := range f.images {
		if i.ID.String() == ref || len(i.Names) > 0 && i.Names[0] == ref {
			return i, nil
		}
	}
	return engine.ImageDetail{}, missing("image", ref)
}

func (f *fake) PullImage(ctx context.Context, ref string, o engine.PullOptions) (engine.ImageRecord, error) {
	f.pulled = &o
	i, err := f.Image(ctx, ref)
	if f.err != nil {
		err = f.err
	}
	return i.Image, err
}

func (f *fake) DropImage(ctx context.Context, ref string) error {
	_, err := f.Image(ctx, ref)
	return err
}
func (f *fake) PinnedImages(context.Context) map[string]bool { return f.pinned }
func (f *fake) ImageFsUsage(context.Context) (engine.FsUsage, error) {
	return engine.FsUsage{Path: "/r", Bytes: 1, Inodes: 2, Time: time.Unix(1, 0)}, nil
}

func (f *fake) PodFeatures(context.Context) engine.PodFeatures {
	return engine.PodFeatures{CgroupDriver: "cgroupfs", UserNamespaces: true}
}
func (f *fake) NetworkReady(context.Context) error { return f.netErr }
func (f *fake) SetPodCIDR(_ context.Context, p []netip.Prefix) error {
	f.cidrs = p
	return nil
}

func (f *fake) Events(context.Context, time.Time, time.Time, engine.Filters) (<-chan engine.Event, error) {
	if f.events == nil {
		return nil, errdefs.ErrUnavailable
	}
	return f.events, nil
}

// serve starts a Server on the backend and gives a connection to it.
func serve(t testing.TB, f *fake) *grpc.ClientConn {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := New(Options{Backend: f, Version: "1.2.3", StateDir: "/state", Handlers: func() []string { return []string{"runc"} }})
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		s.Shutdown(context.Background())
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return conn
}

func clients(t testing.TB, f *fake) (api.RuntimeServiceClient, api.ImageServiceClient) {
	conn := serve(t, f)
	return api.NewRuntimeServiceClient(conn), api.NewImageServiceClient(conn)
}
