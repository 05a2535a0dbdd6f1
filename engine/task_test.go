package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/hako-engine/hako/internal/execfile"
	"github.com/hako-engine/hako/shim/client"
	"github.com/hako-engine/hako/store"
)

// fakeTaskShims are shims of tasks that a test tells what to do.
type fakeTaskShims struct {
	*breaker
	mu      sync.Mutex
	live    map[string]*fakeTaskShim // by bundle
	joined  map[string]string        // bundles that others' shims hold, too: theirs
	reaped  []string
	silent  atomic.Bool // nobody answers
	started int
	mounts  *client.MountAbilities // of all shims
}

type fakeTaskShim struct {
	taskapi.TTRPCTaskService
	sandboxapi.TTRPCSandboxService
	f      *fakeTaskShims
	bundle string
	once   sync.Once
	gone   chan struct{}

	mu      sync.Mutex
	status  tasktypes.Status // UNKNOWN: no task
	images  string           // what it was made from
	rootfs  []*types.Mount
	code    uint32
	exited  chan struct{}
	stuck   bool // State does not come back
	stopped bool
}

func (f *fakeTaskShims) StartTask(_ context.Context, o client.TaskOptions) (TaskShim, error) {
	if err := f.step("task shim.start"); err != nil {
		return nil, err
	}
	s := &fakeTaskShim{f: f, bundle: o.Bundle, gone: make(chan struct{}), exited: make(chan struct{})}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.live[o.Bundle] = s
	f.started++
	return s, nil
}

func (f *fakeTaskShims) JoinTask(_ context.Context, o client.TaskOptions, b client.Bootstrap) (TaskShim, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	path := strings.TrimSuffix(strings.TrimPrefix(b.Address, "unix://"), "/s")
	s := f.live[path]
	if s == nil {
		return nil, errdefs.ErrNotFound
	}
	f.joined[o.Bundle] = path
	return s, nil
}

func (f *fakeTaskShims) ConnectTask(ctx context.Context, o client.TaskOptions) (TaskShim, error) {
	if f.silent.Load() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.live[o.Bundle]
	if s == nil {
		s = f.live[f.joined[o.Bundle]]
	}
	if s == nil {
		return nil, fmt.Errorf("shim of %s: %w", o.Bundle, errdefs.ErrNotFound)
	}
	return s, nil
}

func (f *fakeTaskShims) ReapTask(_ context.Context, o client.TaskOptions) (*taskapi.DeleteResponse, error) {
	_ = f.step("task shim.reap")
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.live, o.Bundle)
	f.reaped = append(f.reaped, o.ID)
	return &taskapi.DeleteResponse{Pid: 7, ExitStatus: 137, ExitedAt: timestamppb.Now()}, nil
}

func (f *fakeTaskShims) RuntimeInfo(context.Context, string, *anypb.Any, ...string) (*types.RuntimeInfo, error) {
	return nil, errdefs.ErrNotImplemented
}

func (f *fakeTaskShims) shim(bundle string) *fakeTaskShim {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.live[bundle]
}

// die is a crash of the shim with its task.
func (s *fakeTaskShim) die() {
	s.f.mu.Lock()
	delete(s.f.live, s.bundle)
	s.f.mu.Unlock()
	s.once.Do(func() { close(s.gone) })
}

func (s *fakeTaskShim) end(code uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.status != tasktypes.Status_STOPPED {
		s.status, s.code = tasktypes.Status_STOPPED, code
		close(s.exited)
	}
}

func (s *fakeTaskShim) Create(_ context.Context, r *taskapi.CreateTaskRequest) (*taskapi.CreateTaskResponse, error) {
	if err := s.f.step("task.create"); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status, s.images, s.rootfs = tasktypes.Status_CREATED, r.Checkpoint, r.Rootfs
	return &taskapi.CreateTaskResponse{Pid: 7}, nil
}

func (s *fakeTaskShim) Start(context.Context, *taskapi.StartRequest) (*taskapi.StartResponse, error) {
	if err := s.f.step("task.start"); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status = tasktypes.Status_RUNNING
	return &taskapi.StartResponse{Pid: 7}, nil
}

func (s *fakeTaskShim) State(ctx context.Context, r *taskapi.StateRequest) (*taskapi.StateResponse, error) {
	s.mu.Lock()
	stuck, status, code := s.stuck, s.status, s.code
	s.mu.Unlock()
	if stuck {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if status == tasktypes.Status_UNKNOWN {
		return nil, errdefs.ErrNotFound
	}
	return &taskapi.StateResponse{ID: r.ID, Pid: 7, Status: status, ExitStatus: code, ExitedAt: timestamppb.Now()}, nil
}

func (s *fakeTaskShim) Wait(ctx context.Context, _ *taskapi.WaitRequest) (*taskapi.WaitResponse, error) {
	select {
	case <-s.exited:
		s.mu.Lock()
		defer s.mu.Unlock()
		return &taskapi.WaitResponse{ExitStatus: s.code, ExitedAt: timestamppb.Now()}, nil
	case <-s.gone:
		return nil, errdefs.ErrUnavailable
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (s *fakeTaskShim) Kill(_ context.Context, r *taskapi.KillRequest) (*emptypb.Empty, error) {
	s.end(128 + r.Signal)
	return &emptypb.Empty{}, nil
}

func (s *fakeTaskShim) Pause(context.Context, *taskapi.PauseRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

func (s *fakeTaskShim) Resume(context.Context, *taskapi.ResumeRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

func (s *fakeTaskShim) Delete(context.Context, *taskapi.DeleteRequest) (*taskapi.DeleteResponse, error) {
	if err := s.f.step("task.delete"); err != nil {
		return nil, err
	}
	s.end(137)
	s.mu.Lock()
	defer s.mu.Unlock()
	return &taskapi.DeleteResponse{Pid: 7, ExitStatus: s.code, ExitedAt: timestamppb.Now()}, nil
}

func (s *fakeTaskShim) Shutdown(context.Context, *taskapi.ShutdownRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	s.stopped = true
	s.mu.Unlock()
	s.f.mu.Lock()
	delete(s.f.live, s.bundle)
	s.f.mu.Unlock()
	return &emptypb.Empty{}, nil
}

func (s *fakeTaskShim) CreateSandbox(context.Context, *sandboxapi.CreateSandboxRequest) (*sandboxapi.CreateSandboxResponse, error) {
	return &sandboxapi.CreateSandboxResponse{}, s.f.step("sandbox.create")
}

func (s *fakeTaskShim) WaitSandbox(ctx context.Context, _ *sandboxapi.WaitSandboxRequest) (*sandboxapi.WaitSandboxResponse, error) {
	select {
	case <-s.gone:
		return nil, errdefs.ErrUnavailable
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (s *fakeTaskShim) ShutdownSandbox(context.Context, *sandboxapi.ShutdownSandboxRequest) (*sandboxapi.ShutdownSandboxResponse, error) {
	s.die()
	return &sandboxapi.ShutdownSandboxResponse{}, nil
}

func (s *fakeTaskShim) Reserve(context.Context) error { return nil }
func (s *fakeTaskShim) Gone() <-chan struct{}         { return s.gone }
func (s *fakeTaskShim) Close() error                  { return nil }

func (s *fakeTaskShim) Bootstrap() client.Bootstrap {
	return client.Bootstrap{Version: 3, Address: "unix://" + s.bundle + "/s", Protocol: "ttrpc", Mounts: s.f.mounts}
}

// fakeContainers are records in memory.
type fakeContainers struct {
	containers.Store
	mu  sync.Mutex
	all map[string]containers.Container // by namespace/id
	// before is called before a record is made, if it is not nil.
	before func()
}

func (f *fakeContainers) key(ctx context.Context, id string) string {
	ns, _ := namespaces.Namespace(ctx)
	return ns + "/" + id
}

func (f *fakeContainers) Get(ctx context.Context, id string) (containers.Container, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c, ok := f.all[f.key(ctx, id)]; ok {
		return c, nil
	}
	return containers.Container{}, fmt.Errorf("container %q: %w", id, errdefs.ErrNotFound)
}

func (f *fakeContainers) List(ctx context.Context, _ ...string) (list []containers.Container, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for k, c := range f.all {
		if k == f.key(ctx, c.ID) {
			list = append(list, c)
		}
	}
	return list, nil
}

func (f *fakeContainers) Create(ctx context.Context, c containers.Container) (containers.Container, error) {
	if f.before != nil {
		f.before()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.all[f.key(ctx, c.ID)] = c
	return c, nil
}

// Update changes labels; paths are needed.
func (f *fakeContainers) Update(ctx context.Context, c containers.Container, paths ...string) (containers.Container, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	have, ok := f.all[f.key(ctx, c.ID)]
	if !ok {
		return have, fmt.Errorf("container %q: %w", c.ID, errdefs.ErrNotFound)
	}
	for _, p := range paths {
		if have.Labels, ok = store.UpdateLabels(have.Labels, c.Labels, p); !ok {
			return have, fmt.Errorf("field %q: %w", p, errdefs.ErrInvalidArgument)
		}
	}
	f.all[f.key(ctx, c.ID)] = have
	return have, nil
}

func (f *fakeContainers) Delete(ctx context.Context, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.all, f.key(ctx, id))
	return nil
}

// fakePublisher keeps topics, with the ids of containers.
type fakePublisher struct {
	mu   sync.Mutex
	list []string
}

func (f *fakePublisher) Publish(_ context.Context, topic string, event events.Event) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if e, ok := event.(*eventsapi.TaskExit); ok {
		topic += fmt.Sprint(" ", e.ExitStatus)
	}
	f.list = append(f.list, topic)
	return nil
}

func (f *fakePublisher) topics() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.list)
}

// taskNode is a node with tasks.
type taskNode struct {
	*node
	tasks   *fakeTaskShims
	records *fakeContainers
	events  *fakePublisher
	ctx     context.Context
}

func newTaskNode(t *testing.T) *taskNode {
	t.Helper()
	n := &taskNode{node: newNode(t), events: &fakePublisher{}, records: &fakeContainers{all: map[string]containers.Container{}}, ctx: namespaces.WithNamespace(context.Background(), "test")}
	n.tasks = &fakeTaskShims{breaker: &n.breaker, live: map[string]*fakeTaskShim{}, joined: map[string]string{}}
	n.reboot()
	return n
}

// reboot is another daemon on the same node.
func (n *taskNode) reboot() {
	n.t.Helper()
	n.e.cancel(errClosed)
	n.e.work.Wait()
	e, err := New(context.Background(), Options{
		Root: n.root, State: n.state, Containers: n.containers, Volumes: n.volumes, Settings: n.settings, Sandboxes: n.sandboxes,
		Images: n.images, Networks: n.nets, PodNetwork: n.pods, Shims: n.shims, TaskShims: n.tasks, ContainerRecords: n.records, Publisher: n.events,
		Snapshotters: map[string]snapshots.Snapshotter{"fake": n.snaps}, Snapshotter: "fake", CDISpecDirs: []string{n.cdiDir}, probe: n.probe,
	})
	if err != nil {
		n.t.Fatal(err)
	}
	n.e = e
}

func (n *taskNode) record(id, spec string) {
	ns, _ := namespaces.Namespace(n.ctx)
	n.records.mu.Lock()
	defer n.records.mu.Unlock()
	n.records.all[ns+"/"+id] = containers.Container{
		ID: id, Runtime: containers.RuntimeInfo{Name: RuntimeRunc}, Spec: &anypb.Any{TypeUrl: specType, Value: []byte(spec)}, CreatedAt: time.Now(),
	}
}

func (n *taskNode) bundleOf(id string) string {
	ns, _ := namespaces.Namespace(n.ctx)
	return filepath.Join(n.state, taskFolder, ns, id)
}

// up makes a container with a running task, and gives its shim.
func (n *taskNode) up(id string) *fakeTaskShim {
	n.t.Helper()
	n.record(id, `{"ociVersion":"1.0.2"}`)
	if _, err := n.e.CreateTask(n.ctx, id, TaskConfig{}); err != nil {
		n.t.Fatal(err)
	}
	if _, err := n.e.StartTask(n.ctx, id, ""); err != nil {
		n.t.Fatal(err)
	}
	return n.tasks.shim(n.bundleOf(id))
}

func TestTaskLife(t *testing.T) {
	t.Parallel()
	n := newTaskNode(t)
	if _, err := n.e.CreateTask(n.ctx, "none", TaskConfig{}); !errdefs.IsNotFound(err) {
		t.Errorf("without a container: %v", err)
	}
	if _, err := n.e.CreateTask(context.Background(), "a", TaskConfig{}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("without a namespace: %v", err)
	}
	n.record("../../x", "{}")
	if _, err := n.e.CreateTask(n.ctx, "../../x", TaskConfig{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an id that is a path: %v", err)
	}
	n.record("bad", "no JSON")
	if _, err := n.e.CreateTask(n.ctx, "bad", TaskConfig{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a configuration that is none: %v", err)
	}
	s := n.up("a")
	if b, err := os.ReadFile(filepath.Join(n.bundleOf("a"), "config.json")); err != nil || string(b) != `{"ociVersion":"1.0.2"}` {
		t.Errorf("configuration %s, %v", b, err)
	}
	if _, err := n.e.CreateTask(n.ctx, "a", TaskConfig{}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second one: %v", err)
	}
	if _, err := n.e.StartTask(n.ctx, "a", ""); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a second start: %v", err)
	}
	if _, err := n.e.DeleteTask(n.ctx, "a"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("deletion while it runs: %v", err)
	}
	if err := n.e.ResumeTask(n.ctx, "a"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("resumed and not paused: %v", err)
	}
	if err := errors.Join(n.e.PauseTask(n.ctx, "a"), n.e.ResumeTask(n.ctx, "a")); err != nil {
		t.Error(err)
	}
	waited := make(chan TaskExit, 1)
	go func() {
		x, err := n.e.WaitTask(n.ctx, "a", "")
		if err != nil {
			t.Error(err)
		}
		waited <- x
	}()
	s.end(3)
	if x := <-waited; x.Status != 3 || x.Pid != 7 {
		t.Errorf("%+v", x)
	}
	if err := n.e.KillTask(n.ctx, "a", "", 9, false); !errdefs.IsNotFound(err) {
		t.Errorf("kill after the end: %v", err)
	}
	if x, err := n.e.DeleteTask(n.ctx, "a"); err != nil || x.Status != 3 {
		t.Errorf("%+v, %v", x, err)
	}
	if _, err := os.Stat(n.bundleOf("a")); !os.IsNotExist(err) {
		t.Errorf("the bundle is left: %v", err)
	}
	if _, err := n.e.Task(n.ctx, "a", ""); !errdefs.IsNotFound(err) {
		t.Errorf("after the deletion: %v", err)
	}
	if !s.stopped {
		t.Error("the shim was not ended")
	}
}

// TestTaskUndo breaks each step of a creation.
func TestTaskUndo(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"task shim.start", "task.create"} {
		n := newTaskNode(t)
		n.record("a", "{}")
		broken := fmt.Errorf("broken: %w", errdefs.ErrAborted)
		n.breakStep(step, broken)
		if _, err := n.e.CreateTask(n.ctx, "a", TaskConfig{}); !errors.Is(err, broken) {
			t.Errorf("%s: %v", step, err)
		}
		n.breakStep("", nil)
		if list, err := n.e.Tasks(n.ctx); err != nil || len(list) != 0 {
			t.Errorf("%s: tasks %v, %v", step, list, err)
		}
		if _, err := os.Stat(n.bundleOf("a")); !os.IsNotExist(err) {
			t.Errorf("%s: the bundle is left: %v", step, err)
		}
		if len(n.tasks.live) != 0 {
			t.Errorf("%s: a shim is left", step)
		}
		n.up("a") // nothing is in the way
	}
}

// TestTaskProcesses: what a shim says of a process keeps its class.
func TestTaskProcesses(t *testing.T) {
	t.Parallel()
	n := newTaskNode(t)
	n.up("b")
	n.breakStep("task.start", fmt.Errorf("process x of container b: %w", errdefs.ErrNotFound))
	if _, err := n.e.StartTask(n.ctx, "b", "x"); !errdefs.IsNotFound(err) {
		t.Errorf("a process that nobody added: %v", err)
	}
	n.breakStep("", nil)
	for _, id := range []string{"", "a/b", "..", "x y"} {
		if err := n.e.ExecTask(n.ctx, "b", TaskExec{ExecID: id}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("exec id %q: %v", id, err)
		}
	}
}

// TestTaskMounts: mounts of a task are made ahead when it is known what its shim makes itself, and taken back, behind the shim, if
// the task does not come to be.
func TestTaskMounts(t *testing.T) {
	t.Parallel()
	n := newTaskNode(t)
	n.record("a", "{}")
	n.tasks.mounts = &client.MountAbilities{Types: []string{"loop"}}
	var order []string
	c := TaskConfig{Rootfs: []mount.Mount{{Type: "format/bind"}}}
	c.Activate = func(_ context.Context, ms []mount.Mount, own func() MountAbilities) ([]mount.Mount, func(), error) {
		if len(ms) != 1 || ms[0].Type != "format/bind" || !slices.Equal(own().Types, []string{"loop"}) {
			t.Errorf("%v, of a shim with %v", ms, own())
		}
		order = append(order, "made")
		return []mount.Mount{{Type: "bind"}}, func() {
			if len(n.tasks.live) != 0 {
				t.Error("the mounts are taken back before their shim ends")
			}
			order = append(order, "taken back")
		}, nil
	}
	broken := errors.New("broken")
	n.breakStep("task.create", broken)
	if _, err := n.e.CreateTask(n.ctx, "a", c); !errors.Is(err, broken) || !slices.Equal(order, []string{"made", "taken back"}) {
		t.Errorf("%v, %v", err, order)
	}
	n.breakStep("", nil)
	order = nil
	if _, err := n.e.CreateTask(n.ctx, "a", c); err != nil || !slices.Equal(order, []string{"made"}) {
		t.Errorf("%v, %v", err, order)
	}
	if got := n.tasks.shim(n.bundleOf("a")).rootfs; len(got) != 1 || got[0].Type != "bind" {
		t.Errorf("the shim was given %v", got)
	}
	n.record("b", "{}")
	c.Activate = func(context.Context, []mount.Mount, func() MountAbilities) ([]mount.Mount, func(), error) {
		return nil, nil, broken
	}
	if _, err := n.e.CreateTask(n.ctx, "b", c); !errors.Is(err, broken) || n.tasks.shim(n.bundleOf("b")) != nil {
		t.Errorf("%v", err)
	}
}

// TestTaskLost is a shim that dies: everybody hears of the end.
func TestTaskLost(t *testing.T) {
	t.Parallel()
	n := newTaskNode(t)
	s := n.up("a")
	waited := make(chan TaskExit, 1)
	ctx := newReachContext(n.ctx)
	go func() { x, _ := n.e.WaitTask(ctx, "a", ""); waited <- x }()
	<-ctx.reached
	s.die()
	if x := <-waited; x.Status != 137 {
		t.Errorf("%+v", x)
	}
	n.eventually("two events", func() bool { return len(n.events.topics()) >= 2 })
	if got := n.events.topics(); !slices.Equal(got, []string{"/tasks/exit 137", "/tasks/delete"}) {
		t.Errorf("events %v", got)
	}
	if _, err := n.e.Task(n.ctx, "a", ""); !errdefs.IsNotFound(err) {
		t.Errorf("the task: %v", err)
	}
}

// TestTaskStuck is a shim that does not answer: it holds up nobody else.
func TestTaskStuck(t *testing.T) {
	t.Parallel()
	n := newTaskNode(t)
	s := n.up("stuck")
	n.up("well")
	s.mu.Lock()
	s.stuck = true
	s.mu.Unlock()
	list, err := n.e.Tasks(n.ctx) // it would hang
	if err != nil || len(list) != 2 {
		t.Errorf("%v, %v", list, err)
	}
	for _, p := range list {
		if want := map[string]TaskStatus{"stuck": "", "well": TaskStatusRunning}[p.ID]; p.Status != want {
			t.Errorf("%s is %q, want %q", p.ID, p.Status, want)
		}
	}
}

// TestTaskRestore is a daemon that comes back.
func TestTaskRestore(t *testing.T) {
	t.Parallel()
	n := newTaskNode(t)
	n.up("runs")
	ended, dead := n.up("ended"), n.up("dead")
	n.record("half", "{}")
	half := n.bundleOf("half") // a creation that was cut short
	if err := os.MkdirAll(half, 0o700); err != nil {
		t.Fatal(err)
	}
	n.e.cancel(errClosed)
	n.e.work.Wait()
	ended.end(4)
	dead.die()
	n.reboot()
	if p, err := n.e.Task(n.ctx, "runs", ""); err != nil || p.Status != TaskStatusRunning {
		t.Errorf("%+v, %v", p, err)
	}
	if p, err := n.e.Task(n.ctx, "ended", ""); err != nil || p.Status != TaskStatusStopped || p.Exit.Status != 4 {
		t.Errorf("%+v, %v", p, err)
	}
	if _, err := n.e.Task(n.ctx, "dead", ""); !errdefs.IsNotFound(err) || !slices.Equal(n.tasks.reaped, []string{"dead"}) {
		t.Errorf("%v, reaped %v", err, n.tasks.reaped)
	}
	if got := n.events.topics(); !slices.Equal(got, []string{"/tasks/exit 137", "/tasks/delete"}) {
		t.Errorf("events %v", got)
	}
	if _, err := os.Stat(half); !os.IsNotExist(err) {
		t.Errorf("half a bundle: %v", err)
	}

	// One whose shim does not answer is there, and holds nobody up.
	n.tasks.silent.Store(true)
	n.reboot() // it would hang
	if p, err := n.e.Task(n.ctx, "runs", ""); err != nil || p.Status != "" {
		t.Errorf("%+v, %v", p, err)
	}
	n.tasks.silent.Store(false)
	n.eventually("it is tried again", func() bool {
		p, err := n.e.Task(n.ctx, "runs", "")
		return err == nil && p.Status == TaskStatusRunning
	})
}

// TestTaskGroup shows that the tasks of a group share a shim.
func TestTaskGroup(t *testing.T) {
	t.Parallel()
	n := newTaskNode(t)
	for _, id := range []string{"a", "b"} {
		n.record(id, `{"annotations":{"io.containerd.runc.v2.group":"pod"}}`)
		if _, err := n.e.CreateTask(n.ctx, id, TaskConfig{}); err != nil {
			t.Fatal(err)
		}
	}
	n.record("c", `{}`)
	if _, err := n.e.CreateTask(n.ctx, "c", TaskConfig{}); err != nil {
		t.Fatal(err)
	}
	if n.tasks.started != 2 {
		t.Errorf("%d shims for two groups", n.tasks.started)
	}
}

func TestTaskRuntimes(t *testing.T) {
	n := newTaskNode(t)
	n.e.SetRuntimes(map[string]string{"crun": "/usr/bin/crun"})
	dir := t.TempDir()
	shim := filepath.Join(dir, "containerd-shim-fake-v2")
	if err := execfile.Write(shim, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	for name, want := range map[string][2]string{
		RuntimeHako: {}, RuntimeRunc: {}, "crun": {"", "/usr/bin/crun"}, "io.containerd.fake.v2": {shim, ""}, shim: {shim, ""},
	} {
		program, binary, err := n.e.taskRuntime(name)
		if err != nil || program != want[0] || binary != want[1] {
			t.Errorf("%s: %q, %q, %v", name, program, binary, err)
		}
	}
	for name, is := range map[string]func(error) bool{
		"io.containerd.nosuch.v2": errdefs.IsNotFound, "/nosuch": errdefs.IsNotFound, dir: errdefs.IsInvalidArgument,
		"nosuch": errdefs.IsInvalidArgument, "a/b.v2": errdefs.IsInvalidArgument,
	} {
		if _, _, err := n.e.taskRuntime(name); !is(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, err := taskOptions(true, RuntimeRunc, &anypb.Any{TypeUrl: "other.Options", Value: []byte{1}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("options of another runtime: %v", err)
	}
}

// TestTaskFromFolder: the options of a creation can name a folder of CRIU's images.
func TestTaskFromFolder(t *testing.T) {
	n := newTaskNode(t)
	create := func(id, images string) error {
		n.record(id, `{"ociVersion":"1.0.2"}`)
		raw, err := proto.Marshal(&options.Options{CriuImagePath: images})
		if err != nil {
			t.Fatal(err)
		}
		_, err = n.e.CreateTask(n.ctx, id, TaskConfig{Options: &anypb.Any{TypeUrl: runcOptions, Value: raw}})
		return err
	}
	for id, images := range map[string]string{"a": "", "b": "/images"} {
		if err := create(id, images); err != nil {
			t.Fatal(err)
		}
		if got := n.tasks.shim(n.bundleOf(id)).images; got != images {
			t.Errorf("made from %q, not %q", got, images)
		}
	}
	if err := create("c", "images"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("from a relative path: %v", err)
	}
}

// TestGuest shows containers of containerd's clients to Docker.
func TestGuest(t *testing.T) {
	t.Parallel()
	n := newTaskNode(t)
	n.ctx = shared(context.Background())
	n.up("web")
	v, err := n.e.Container(bg, "web")
	if err != nil || !v.Guest || v.State.Status != StatusRunning || v.State.Pid != 7 {
		t.Errorf("%+v, %v", v.State, err)
	}
	if list, err := n.e.Containers(bg, ListOptions{}); err != nil || len(list) != 1 {
		t.Errorf("%d listed, %v", len(list), err)
	}
	if _, _, err := n.e.CreateContainer(bg, "web", Config{Image: "test"}); !errdefs.IsConflict(err) {
		t.Errorf("a name that is taken: %v", err)
	}
	if err := n.e.RemoveContainer(bg, "web", RemoveOptions{}); !errdefs.IsConflict(err) {
		t.Errorf("removal while it runs: %v", err)
	}
	if p, err := n.e.PruneContainers(bg, nil); err != nil || len(p.IDs) != 0 {
		t.Errorf("pruned %v, %v", p, err)
	}
	if err := n.e.RestartContainer(bg, "web", StopOptions{}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("restart: %v", err)
	}
	ch, err := n.e.WaitContainer(bg, "web", WaitNotRunning)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.e.StopContainer(bg, "web", StopOptions{}); err != nil {
		t.Error(err)
	}
	if r := <-ch; r.ExitCode != 143 {
		t.Errorf("%+v", r)
	}
	if err := n.e.StopContainer(bg, "web", StopOptions{}); !errors.Is(err, ErrNotModified) {
		t.Errorf("second stop: %v", err)
	}
	if err := n.e.RemoveContainer(bg, "web", RemoveOptions{}); err != nil {
		t.Error(err)
	}
	if _, err := n.e.Container(bg, "web"); !errdefs.IsNotFound(err) {
		t.Errorf("after the removal: %v", err)
	}
}

// TestHalfARoom: a sandbox whose creation was cut short before it had a shim leaves nothing.
func TestHalfARoom(t *testing.T) {
	t.Parallel()
	n := newTaskNode(t)
	half, damaged := filepath.Join(n.state, roomFolder, "test", "half"), filepath.Join(n.state, roomFolder, "test", "damaged")
	for _, dir := range []string{half, damaged} {
		if err := os.MkdirAll(filepath.Join(dir, "rootfs"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(damaged, roomMetaFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	n.reboot()
	if _, err := os.Stat(half); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("half a bundle: %v", err)
	}
	if _, err := os.Stat(damaged); err != nil {
		t.Errorf("one that cannot be read, behind which there may be a shim: %v", err)
	}
}

// TestHalfACheckpoint: what could not be stored whole leaves nothing in the store.
func TestHalfACheckpoint(t *testing.T) {
	t.Parallel()
	n := newTaskNode(t)
	s, err := store.Open(t.TempDir(), store.Options{NoBackgroundGC: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	n.e.opt.Content = s.Content()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "image"), []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := n.e.storeFolder(n.ctx, "r", "x", filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a folder that is not there: %v", err)
	}
	ctx, cancel := context.WithCancel(n.ctx)
	cancel()
	if _, err := n.e.storeFolder(ctx, "r", "x", dir); !errors.Is(err, context.Canceled) {
		t.Errorf("of a client that has gone: %v", err)
	}
	if list, err := s.Content().ListStatuses(n.ctx); err != nil || len(list) != 0 {
		t.Errorf("left: %v, %v", list, err)
	}
	for range 2 { // known content is fine
		if d, err := n.e.storeFolder(n.ctx, "r", "x", dir); err != nil || d.Size == 0 {
			t.Errorf("%v, %v", d, err)
		}
	}
}
