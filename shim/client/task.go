package client

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/containerd/api/runtime/sandbox/v1"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/hako-engine/hako/shim/wire"
)

// Task is a connection to a shim of anybody, with the messages of containerd's shim v2
// protocol. It is safe for concurrent use. Errors carry the class that they had in the shim; a
// lost connection is errdefs.ErrUnavailable. It implements the generated task.TTRPCTaskService
// (version 3 of the service; the messages of version 2 are the same) and sandbox.TTRPCSandboxService.
type Task struct {
	// invoke makes a call of the connection's protocol.
	invoke  func(ctx context.Context, service, method string, req, resp proto.Message) error
	service string
	done    <-chan struct{}
	close   func() error

	bootstrap Bootstrap
}

var (
	_ task.TTRPCTaskService       = (*Task)(nil)
	_ sandbox.TTRPCSandboxService = (*Task)(nil)
)

// Task is the same connection with the messages of the protocol.
func (s *Shim) Task() *Task {
	return newTask(s.rpc, Bootstrap{Version: 3, Address: "unix://" + s.path, Protocol: "ttrpc"})
}

func newTask(rpc *wire.Client, b Bootstrap) *Task {
	t := &Task{service: taskService(b.Version), done: rpc.Done(), close: rpc.Close, bootstrap: b}
	t.invoke = func(ctx context.Context, service, method string, req, resp proto.Message) error {
		in, err := proto.Marshal(req)
		if err != nil {
			return err
		}
		out, err := rpc.CallRaw(ctx, service, method, in)
		if err != nil {
			return err
		}
		return proto.Unmarshal(out, resp)
	}
	return t
}

func taskService(version int) string {
	if version >= 3 {
		return wire.ServiceTaskV3
	}
	return wire.ServiceTaskV2
}

// Bootstrap is how the shim is reached.
func (t *Task) Bootstrap() Bootstrap { return t.bootstrap }

// Gone is closed when the connection is lost.
func (t *Task) Gone() <-chan struct{} { return t.done }

// Close ends the connection, and leaves the shim alone.
func (t *Task) Close() error { return t.close() }

// call is one call of the task service.
func call[T any, P interface {
	*T
	proto.Message
}](ctx context.Context, t *Task, service, method string, req proto.Message) (P, error) {
	resp := P(new(T))
	if err := t.invoke(ctx, service, method, req, resp); err != nil {
		return nil, err
	}
	return resp, nil
}

// The methods of the task service. Errors are those of the shim, of whoever made it; the classes named here are what hako's gives.

// State tells of a process (ExecID "": the first) its pid, status, streams and, once it has ended, its exit:
// errdefs.ErrNotFound for one that the shim does not know.
func (t *Task) State(ctx context.Context, r *task.StateRequest) (*task.StateResponse, error) {
	return call[task.StateResponse](ctx, t, t.service, "State", r)
}

// Create makes a container whose first process waits for Start, and gives the pid: errdefs.ErrAlreadyExists if the shim has
// one of that id.
func (t *Task) Create(ctx context.Context, r *task.CreateTaskRequest) (*task.CreateTaskResponse, error) {
	return call[task.CreateTaskResponse](ctx, t, t.service, "Create", r)
}

// Start starts the first process, or one that Exec added (ExecID), and gives the pid: errdefs.ErrFailedPrecondition for one that
// has been started.
func (t *Task) Start(ctx context.Context, r *task.StartRequest) (*task.StartResponse, error) {
	return call[task.StartResponse](ctx, t, t.service, "Start", r)
}

// Delete releases a process that has ended, or a container that was never started, and gives its exit (status 0 to 255,
// time): errdefs.ErrFailedPrecondition while it runs.
func (t *Task) Delete(ctx context.Context, r *task.DeleteRequest) (*task.DeleteResponse, error) {
	return call[task.DeleteResponse](ctx, t, t.service, "Delete", r)
}

// Pids lists the processes of a container by their numbers on the host; those that Exec added have their ExecID beside them.
func (t *Task) Pids(ctx context.Context, r *task.PidsRequest) (*task.PidsResponse, error) {
	return call[task.PidsResponse](ctx, t, t.service, "Pids", r)
}

// Pause freezes all processes of a container (freezer cgroup).
func (t *Task) Pause(ctx context.Context, r *task.PauseRequest) (*emptypb.Empty, error) {
	return call[emptypb.Empty](ctx, t, t.service, "Pause", r)
}

// Resume thaws what Pause froze.
func (t *Task) Resume(ctx context.Context, r *task.ResumeRequest) (*emptypb.Empty, error) {
	return call[emptypb.Empty](ctx, t, t.service, "Resume", r)
}

// Checkpoint has CRIU write the processes of a container to files at Path: errdefs.ErrNotImplemented where there is none. Whether they end
// is said in the options, which are the runtime's.
func (t *Task) Checkpoint(ctx context.Context, r *task.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return call[emptypb.Empty](ctx, t, t.service, "Checkpoint", r)
}

// Kill sends a signal (its number) to a process or, with All, to all of the container: errdefs.ErrNotFound if it has ended.
func (t *Task) Kill(ctx context.Context, r *task.KillRequest) (*emptypb.Empty, error) {
	return call[emptypb.Empty](ctx, t, t.service, "Kill", r)
}

// Exec adds a process (Spec: an OCI process as JSON), which waits for Start.
func (t *Task) Exec(ctx context.Context, r *task.ExecProcessRequest) (*emptypb.Empty, error) {
	return call[emptypb.Empty](ctx, t, t.service, "Exec", r)
}

// ResizePty sets the size of a terminal, in characters.
func (t *Task) ResizePty(ctx context.Context, r *task.ResizePtyRequest) (*emptypb.Empty, error) {
	return call[emptypb.Empty](ctx, t, t.service, "ResizePty", r)
}

// CloseIO lets a process read the end of its input.
func (t *Task) CloseIO(ctx context.Context, r *task.CloseIORequest) (*emptypb.Empty, error) {
	return call[emptypb.Empty](ctx, t, t.service, "CloseIO", r)
}

// Update changes the limits of a container. Resources is an OCI LinuxResources as JSON; what it leaves out stays.
func (t *Task) Update(ctx context.Context, r *task.UpdateTaskRequest) (*emptypb.Empty, error) {
	return call[emptypb.Empty](ctx, t, t.service, "Update", r)
}

// Wait blocks until a process has ended and gives its exit. It may be called before Start.
func (t *Task) Wait(ctx context.Context, r *task.WaitRequest) (*task.WaitResponse, error) {
	return call[task.WaitResponse](ctx, t, t.service, "Wait", r)
}

// Stats gives the metrics of a container's cgroup: containerd's message for cgroups v1 or v2, whichever the machine has.
func (t *Task) Stats(ctx context.Context, r *task.StatsRequest) (*task.StatsResponse, error) {
	return call[task.StatsResponse](ctx, t, t.service, "Stats", r)
}

// Connect gives the pids of the shim and of a container's first process.
func (t *Task) Connect(ctx context.Context, r *task.ConnectRequest) (*task.ConnectResponse, error) {
	return call[task.ConnectResponse](ctx, t, t.service, "Connect", r)
}

// Shutdown ends the shim if it holds no container. Its end may come before the answer.
func (t *Task) Shutdown(ctx context.Context, r *task.ShutdownRequest) (*emptypb.Empty, error) {
	return call[emptypb.Empty](ctx, t, t.service, "Shutdown", r)
}

// Reserve asks a shim of hako's to stay for a container that is going to be created; of
// others it is errdefs.ErrNotImplemented.
func (t *Task) Reserve(ctx context.Context) error {
	_, err := call[emptypb.Empty](ctx, t, wire.ServiceHako, "Reserve", &emptypb.Empty{})
	return err
}

// The methods of the sandbox service. Of a shim without it they are errdefs.ErrNotImplemented.

// CreateSandbox makes a sandbox of a bundle, with the mounts and the network namespace that are given. It does not run yet.
func (t *Task) CreateSandbox(ctx context.Context, r *sandbox.CreateSandboxRequest) (*sandbox.CreateSandboxResponse, error) {
	return call[sandbox.CreateSandboxResponse](ctx, t, wire.ServiceSandbox, "CreateSandbox", r)
}

// StartSandbox starts it, and gives the pid that stands for it and when that was.
func (t *Task) StartSandbox(ctx context.Context, r *sandbox.StartSandboxRequest) (*sandbox.StartSandboxResponse, error) {
	return call[sandbox.StartSandboxResponse](ctx, t, wire.ServiceSandbox, "StartSandbox", r)
}

// Platform tells what the sandbox's containers run on: OS and architecture.
func (t *Task) Platform(ctx context.Context, r *sandbox.PlatformRequest) (*sandbox.PlatformResponse, error) {
	return call[sandbox.PlatformResponse](ctx, t, wire.ServiceSandbox, "Platform", r)
}

// StopSandbox asks the tasks of the sandbox to end, and kills them TimeoutSecs seconds later (0: at once). It may be called
// again.
func (t *Task) StopSandbox(ctx context.Context, r *sandbox.StopSandboxRequest) (*sandbox.StopSandboxResponse, error) {
	return call[sandbox.StopSandboxResponse](ctx, t, wire.ServiceSandbox, "StopSandbox", r)
}

// WaitSandbox blocks until the sandbox has stopped, and gives its exit.
func (t *Task) WaitSandbox(ctx context.Context, r *sandbox.WaitSandboxRequest) (*sandbox.WaitSandboxResponse, error) {
	return call[sandbox.WaitSandboxResponse](ctx, t, wire.ServiceSandbox, "WaitSandbox", r)
}

// SandboxStatus tells pid, state and times of the sandbox and, if Verbose, whatever else the shim has to say.
func (t *Task) SandboxStatus(ctx context.Context, r *sandbox.SandboxStatusRequest) (*sandbox.SandboxStatusResponse, error) {
	return call[sandbox.SandboxStatusResponse](ctx, t, wire.ServiceSandbox, "SandboxStatus", r)
}

// PingSandbox asks whether the sandbox answers.
func (t *Task) PingSandbox(ctx context.Context, r *sandbox.PingRequest) (*sandbox.PingResponse, error) {
	return call[sandbox.PingResponse](ctx, t, wire.ServiceSandbox, "PingSandbox", r)
}

// ShutdownSandbox stops the sandbox and ends the shim, at the latest when its last task is deleted. Its end may come before
// the answer.
func (t *Task) ShutdownSandbox(ctx context.Context, r *sandbox.ShutdownSandboxRequest) (*sandbox.ShutdownSandboxResponse, error) {
	return call[sandbox.ShutdownSandboxResponse](ctx, t, wire.ServiceSandbox, "ShutdownSandbox", r)
}

// SandboxMetrics gives the metrics of the sandbox as a whole, in the form of Stats.
func (t *Task) SandboxMetrics(ctx context.Context, r *sandbox.SandboxMetricsRequest) (*sandbox.SandboxMetricsResponse, error) {
	return call[sandbox.SandboxMetricsResponse](ctx, t, wire.ServiceSandbox, "SandboxMetrics", r)
}

// UpdateSandbox changes the limits, and the annotations, of the sandbox.
func (t *Task) UpdateSandbox(ctx context.Context, r *sandbox.UpdateSandboxRequest) (*sandbox.UpdateSandboxResponse, error) {
	return call[sandbox.UpdateSandboxResponse](ctx, t, wire.ServiceSandbox, "UpdateSandbox", r)
}

// check makes sure that somebody answers: a process that is dying may still hold its socket.
func (t *Task) check(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	if _, err := t.Connect(ctx, &task.ConnectRequest{ID: id}); err != nil {
		return fmt.Errorf("connect to shim at %s: %w", t.bootstrap.Address, err)
	}
	return nil
}

func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
