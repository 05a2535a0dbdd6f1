package containerd

import (
	"context"
	"io"
	"log/slog"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/typeurl/v2"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"

	"github.com/hako-engine/hako/engine"
)

// Options configure a Server. The stores, Bus and Version are needed.
type Options struct {
	Content            content.Store
	Images             images.Store
	Leases             leases.Manager
	Namespaces         Namespaces
	Snapshotters       map[string]snapshots.Snapshotter
	DefaultSnapshotter string // where neither a request nor the namespace names one
	Bus                Bus
	Differ             Differ        // nil: layers cannot be applied or made
	Transfer           Transfers     // nil: no transfers
	Backend            Backend       // nil: no containers
	Mounts             mount.Manager // nil: no mounts are made ahead

	Version  string
	Revision string
	// UUID identifies this node; it stays the same.
	UUID string
	// Plugins are told by Introspection, besides the services of this package and the snapshotters.
	Plugins []Plugin
	// Called is told that a call begins; nil: nobody is.
	Called func()
	// RuntimeInfo tells of a runtime; nil: errdefs.ErrNotImplemented.
	RuntimeInfo func(context.Context, *types.RuntimeRequest) (*types.RuntimeInfo, error)
	// Guests register further services on the same socket, and see to their errors themselves.
	Guests []func(grpc.ServiceRegistrar)
	Log    *slog.Logger // nil: discard
}

// Namespaces is containerd's store of namespaces, and what a field mask takes.
type Namespaces interface {
	namespaces.Store
	// Relabel replaces labels: all of them, or those that paths ("labels.KEY") name.
	Relabel(ctx context.Context, ns string, labels map[string]string, paths ...string) (map[string]string, error)
}

// Bus tells what happens.
type Bus interface {
	events.Publisher
	events.Forwarder
	events.Subscriber
}

// Differ applies and makes layers.
type Differ interface {
	diff.Applier
	diff.Comparer
}

// Backend is what the services of containers, tasks and sandboxes need of the engine, which documents each call.
type Backend interface {
	// ContainerStore are the records of all containers.
	ContainerStore() containers.Store
	// SandboxStore are the records of all sandboxes, and SandboxController who looks after them.
	SandboxStore() sandbox.Store
	SandboxController(name string) (sandbox.Controller, error)

	CreateTask(ctx context.Context, id string, c engine.TaskConfig) (pid uint32, err error)
	StartTask(ctx context.Context, id, execID string) (pid uint32, err error)
	DeleteTask(ctx context.Context, id string) (engine.TaskExit, error)
	DeleteTaskProcess(ctx context.Context, id, execID string) (engine.TaskExit, error)
	Task(ctx context.Context, id, execID string) (engine.TaskProcess, error)
	Tasks(ctx context.Context) ([]engine.TaskProcess, error)
	KillTask(ctx context.Context, id, execID string, signal uint32, all bool) error
	ExecTask(ctx context.Context, id string, x engine.TaskExec) error
	ResizeTask(ctx context.Context, id, execID string, width, height uint32) error
	CloseTaskIO(ctx context.Context, id, execID string, stdin bool) error
	PauseTask(ctx context.Context, id string) error
	ResumeTask(ctx context.Context, id string) error
	TaskPids(ctx context.Context, id string) ([]engine.TaskPid, error)
	CheckpointTask(ctx context.Context, id string, options typeurl.Any) ([]ocispec.Descriptor, error)
	UpdateTask(ctx context.Context, id string, resources typeurl.Any, annotations map[string]string) error
	MeasureTasks(ctx context.Context, filters []string) ([]engine.TaskMetrics, error)
	ReadTaskPath(ctx context.Context, id, path string, alone bool) (io.ReadCloser, error)
	WriteTaskPath(ctx context.Context, id, path string, r io.Reader, owners bool) error
	WaitTask(ctx context.Context, id, execID string) (engine.TaskExit, error)
}

// Plugin is a part of the daemon that clients look for by type and name.
type Plugin struct {
	Type, ID     string
	Requires     []string
	Exports      map[string]string
	Capabilities []string
}
