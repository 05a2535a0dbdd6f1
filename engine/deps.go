package engine

import (
	"context"
	"io"
	"net/netip"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/hako-engine/hako/image"
	"github.com/hako-engine/hako/network"
	"github.com/hako-engine/hako/shim/client"
)

// Images is what the engine needs of the image room.
type Images interface {
	// Get finds an image by name, digest, id or unique id prefix: errdefs.ErrNotFound, or ErrInvalidArgument if ambiguous.
	Get(ctx context.Context, ref string, platform *ocispec.Platform) (image.Image, error)
	// List gives all images, each once with all of its names.
	List(ctx context.Context) ([]image.Image, error)
	// Config reads the image's configuration.
	Config(ctx context.Context, img image.Image) (dockerspec.DockerOCIImage, error)
	// Unpack makes sure that the image's snapshot exists and gives its key ("" for no layers).
	Unpack(ctx context.Context, img image.Image, snapshotter string) (chainID string, err error)
	// Pull fetches an image from its registry and stores it under its name.
	Pull(ctx context.Context, ref string, o image.PullOptions) (image.Image, error)
	// Push sends an image to the registry that its name says.
	Push(ctx context.Context, ref string, o image.PushOptions) error
	// Tag gives an image a further name, and takes it from another one that has it.
	Tag(ctx context.Context, source, target string) error
	// Untag removes one name, and leaves the image; Delete removes an image with the names that img has.
	Untag(ctx context.Context, name string) error
	Delete(ctx context.Context, img image.Image) ([]string, error)
	// Load stores the images of an archive (docker save's, or an OCI layout).
	Load(ctx context.Context, r io.Reader, o image.LoadOptions) ([]image.Loaded, error)
	// Save writes such an archive.
	Save(ctx context.Context, refs []string, o image.SaveOptions, w io.Writer) error
	// Commit makes an image of a base and a new layer, Import one of an archive of files.
	Commit(ctx context.Context, o image.CommitOptions) (image.Image, error)
	Import(ctx context.Context, r io.Reader, o image.ImportOptions) (image.Image, error)
	// Login asks a registry whether it takes credentials.
	Login(ctx context.Context, a image.Auth) error
}

// Networks is what the engine needs of the network room.
type Networks interface {
	// Create makes a network: errdefs.ErrAlreadyExists if the name is taken.
	Create(ctx context.Context, c network.Config) (network.Network, error)
	// Remove removes one that nobody is on: errdefs.ErrFailedPrecondition otherwise.
	Remove(ctx context.Context, ref string) error
	Get(ctx context.Context, ref string) (network.Network, error) // name, id or unique prefix
	// List gives all networks.
	List(ctx context.Context) ([]network.Network, error)
	// NewNetns gives a network namespace with loopback up, made ahead where possible. The path stays until DeleteNetns.
	NewNetns(ctx context.Context, id string) (path string, err error)
	// DeleteNetns removes such a namespace; of a missing one it is no error.
	DeleteNetns(ctx context.Context, path string) error
	// KeepNetns is NewNetns of a namespace that exists already, at from.
	KeepNetns(ctx context.Context, id, from string) (path string, err error)
	// Netns lists the namespaces that NewNetns made and DeleteNetns did not delete. The
	// last element of a path is the id.
	Netns(ctx context.Context) ([]string, error)
	// Connect puts an interface into a namespace, with addresses, names and published ports.
	Connect(ctx context.Context, c network.EndpointConfig) (network.Endpoint, error)
	// Disconnect gives back everything that Connect took. It is idempotent, and works when the namespace is gone.
	Disconnect(ctx context.Context, networkRef, endpointID string) error
	// Endpoints lists who is on a network.
	Endpoints(ctx context.Context, networkRef string) ([]network.Endpoint, error)
	// Rename changes the DNS name of an endpoint.
	Rename(ctx context.Context, networkRef, endpointID, newName string) error
	// HostGateway is the address that host-gateway in a hosts file stands for.
	HostGateway(ctx context.Context) (netip.Addr, error)
}

// Shim is one live shim.
type Shim interface {
	// Create makes a container whose first process waits for Start.
	Create(ctx context.Context, o client.CreateOptions) (pid int, err error)
	// Start starts the first process (execID "") or one that Exec added.
	Start(ctx context.Context, id, execID string) (pid int, err error)
	// Exec adds a process, which waits for Start.
	Exec(ctx context.Context, o client.ExecOptions) error
	// Kill signals a process or, with all, every one of the container: errdefs.ErrNotFound if it has ended.
	Kill(ctx context.Context, id, execID string, signal int, all bool) error
	// Wait blocks until the process ended; it may be called before Start.
	Wait(ctx context.Context, id, execID string) (client.Exit, error)
	// State asks for the state of a process.
	State(ctx context.Context, id, execID string) (client.State, error)
	// Delete releases an ended process and gives how it ended.
	Delete(ctx context.Context, id, execID string) (client.Exit, error)
	// Pause freezes all processes of a container.
	Pause(ctx context.Context, id string) error
	// Resume thaws them.
	Resume(ctx context.Context, id string) error
	// Update changes limits; what r leaves out stays.
	Update(ctx context.Context, id string, r *specs.LinuxResources) error
	// Checkpoint writes the processes of a container to files, and leaves them as they are.
	Checkpoint(ctx context.Context, id string, o client.CheckpointOptions) error
	// Pids lists the processes of a container by their numbers on the host.
	Pids(ctx context.Context, id string) ([]int, error)
	// Resize sets the size of a terminal, in characters.
	Resize(ctx context.Context, id, execID string, width, height uint32) error
	// CloseStdin lets a process read the end of its input.
	CloseStdin(ctx context.Context, id, execID string) error
	// ReopenLog opens the log file anew after the caller renamed it.
	ReopenLog(ctx context.Context, id, execID string) error
	// Attach connects to the streams of a process, also of one that waits for Start.
	Attach(ctx context.Context, o client.AttachOptions) (client.Stream, error)
	// Shutdown ends the shim if it holds no container.
	Shutdown(ctx context.Context) error
	// Gone is closed when the connection to the shim is lost.
	Gone() <-chan struct{}
	// Close ends the connection, and leaves the shim alone.
	Close() error
}

// Shims starts shims and finds them again.
type Shims interface {
	// Start starts a shim for a bundle and connects to it.
	Start(ctx context.Context, o client.StartOptions) (Shim, error)
	// Connect finds the shim of a bundle after a restart: errdefs.ErrNotFound when there is none any more.
	Connect(ctx context.Context, bundle string) (Shim, error)
	// Kill ends a shim that does not do as it is told, and waits for its end: errdefs.ErrNotFound if
	// there is none. Reap has to follow.
	Kill(ctx context.Context, o client.StartOptions) error
	// Reap cleans up after a shim that died (kills what is left of its container, removes its cgroup)
	// and gives how its container ended, from the exit file if there is one.
	Reap(ctx context.Context, o client.StartOptions) (client.Exit, error)
}

// TaskShim is one live shim, of anybody, with the messages of containerd's shim v2 protocol.
type TaskShim interface {
	taskapi.TTRPCTaskService
	sandboxapi.TTRPCSandboxService
	// Bootstrap is how others reach it.
	Bootstrap() client.Bootstrap
	// Reserve asks it to stay for a container that is going to be created.
	Reserve(ctx context.Context) error
	// Gone is closed when the connection to the shim is lost.
	Gone() <-chan struct{}
	// Close ends the connection, and leaves the shim alone.
	Close() error
}

// TaskShims starts shims for tasks and finds them again.
type TaskShims interface {
	// StartTask starts a shim for a bundle, or joins the one that it belongs to, and connects to it.
	StartTask(ctx context.Context, o client.TaskOptions) (TaskShim, error)
	// JoinTask connects to a shim that is there, on behalf of another bundle.
	JoinTask(ctx context.Context, o client.TaskOptions, b client.Bootstrap) (TaskShim, error)
	// ConnectTask finds the shim of a bundle after a restart: errdefs.ErrNotFound when there is none any more.
	ConnectTask(ctx context.Context, o client.TaskOptions) (TaskShim, error)
	// ReapTask cleans up after a shim that died, and gives how its container ended.
	ReapTask(ctx context.Context, o client.TaskOptions) (*taskapi.DeleteResponse, error)
	// RuntimeInfo asks the program of a shim what it can do for a task with such options.
	RuntimeInfo(ctx context.Context, program string, options *anypb.Any, args ...string) (*types.RuntimeInfo, error)
}

// Records is durable storage of small JSON records (store.Records). Writes have
// reached the disk when they return; concurrent ones share an fsync.
type Records interface {
	// Put writes or replaces a record.
	Put(ctx context.Context, id string, v any) error
	Get(ctx context.Context, id string, v any) error // errdefs.ErrNotFound
	Delete(ctx context.Context, id string) error     // of a missing one: nil
	// ForEach goes on after a record that f refuses, and gives the errors joined.
	ForEach(f func(id string, raw []byte) error) error
}
