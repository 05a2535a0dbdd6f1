package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/shim/log"
	"github.com/hako-engine/hako/shim/wire"
)

// Types of the JSON values in an Any.
const (
	processType   = "types.containerd.io/opencontainers/runtime-spec/1/Process"
	resourcesType = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
)

// Shim is a connection to a live shim. It is safe for concurrent use. Errors carry
// the class (errdefs) that they had in the shim; a lost connection is
// errdefs.ErrUnavailable.
type Shim struct {
	rpc  *wire.Client
	path string // of the socket
}

func (s *Shim) call(ctx context.Context, method string, req, resp wire.Message) error {
	return s.rpc.Call(ctx, wire.ServiceTaskV3, method, req, resp)
}

// uri says in the protocol's stdout string what the streams are.
func (s Stdio) uri() string {
	return wire.Stdio{OpenStdin: s.OpenStdin, StdinOnce: s.StdinOnce, Log: log.Config{
		Format: s.Log.Format, Path: s.Log.Path, MaxSize: s.Log.MaxSize, MaxFiles: s.Log.MaxFiles,
		Compress: s.Log.Compress, Attrs: s.Log.Attrs,
	}}.String()
}

// Create makes a container whose process waits to be started, and gives its pid.
func (s *Shim) Create(ctx context.Context, o CreateOptions) (pid int, err error) {
	req := wire.CreateTaskRequest{ID: o.ID, Bundle: o.Bundle, Terminal: o.Stdio.Terminal, Stdout: o.Stdio.uri(), Checkpoint: o.Checkpoint}
	for _, m := range o.Rootfs {
		req.Rootfs = append(req.Rootfs, wire.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options})
	}
	var resp wire.PidResponse
	if err := s.call(ctx, "Create", &req, &resp); err != nil {
		return 0, err
	}
	return int(resp.Pid), nil
}

// Start starts a container's process (execID "") or an added one, and gives its pid.
func (s *Shim) Start(ctx context.Context, id, execID string) (pid int, err error) {
	var resp wire.PidResponse
	if err := s.call(ctx, "Start", &wire.ProcessRequest{ID: id, ExecID: execID}, &resp); err != nil {
		return 0, err
	}
	return int(resp.Pid), nil
}

// Exec adds a process, which waits to be started. Clients may attach to it before.
func (s *Shim) Exec(ctx context.Context, o ExecOptions) error {
	spec, err := json.Marshal(o.Spec)
	if err != nil {
		return err
	}
	return s.call(ctx, "Exec", &wire.ExecProcessRequest{
		ID: o.ID, ExecID: o.ExecID, Terminal: o.Stdio.Terminal, Stdout: o.Stdio.uri(),
		Spec: &wire.Any{TypeURL: processType, Value: spec},
	}, nil)
}

// Kill signals a process; with all, every process of the container. A process that
// has ended is errdefs.ErrNotFound.
func (s *Shim) Kill(ctx context.Context, id, execID string, signal int, all bool) error {
	return s.call(ctx, "Kill", &wire.KillRequest{ID: id, ExecID: execID, Signal: uint32(signal), All: all}, nil)
}

// Wait blocks until the process has ended; it may be called before Start. The output
// has reached the log by then.
func (s *Shim) Wait(ctx context.Context, id, execID string) (Exit, error) {
	var r wire.WaitResponse
	if err := s.call(ctx, "Wait", &wire.ProcessRequest{ID: id, ExecID: execID}, &r); err != nil {
		return Exit{}, err
	}
	return Exit{Status: r.ExitStatus, ExitedAt: r.ExitedAt, OOMKilled: r.OOMKilled}, nil
}

// State asks for the state of a process.
func (s *Shim) State(ctx context.Context, id, execID string) (State, error) {
	var r wire.StateResponse
	if err := s.call(ctx, "State", &wire.ProcessRequest{ID: id, ExecID: execID}, &r); err != nil {
		return State{}, err
	}
	st := State{ID: r.ID, ExecID: r.ExecID, Pid: int(r.Pid)}
	switch r.Status {
	case wire.StatusCreated:
		st.Status = StatusCreated
	case wire.StatusRunning:
		st.Status = StatusRunning
	case wire.StatusPaused, wire.StatusPausing:
		st.Status = StatusPaused
	case wire.StatusStopped:
		st.Status = StatusStopped
		st.Exit = Exit{Status: r.ExitStatus, ExitedAt: r.ExitedAt, OOMKilled: r.OOMKilled}
	default:
		return State{}, fmt.Errorf("shim reports status %d of container %s: %w", r.Status, id, errdefs.ErrUnknown)
	}
	return st, nil
}

// Delete releases an ended process, or a container that was never started, and gives
// how it ended. One that runs is errdefs.ErrFailedPrecondition.
func (s *Shim) Delete(ctx context.Context, id, execID string) (Exit, error) {
	var r wire.DeleteResponse
	if err := s.call(ctx, "Delete", &wire.ProcessRequest{ID: id, ExecID: execID}, &r); err != nil {
		return Exit{}, err
	}
	return Exit{Status: r.ExitStatus, ExitedAt: r.ExitedAt, OOMKilled: r.OOMKilled}, nil
}

// Pause freezes a container.
func (s *Shim) Pause(ctx context.Context, id string) error {
	return s.call(ctx, "Pause", &wire.ProcessRequest{ID: id}, nil)
}

// Resume thaws a container.
func (s *Shim) Resume(ctx context.Context, id string) error {
	return s.call(ctx, "Resume", &wire.ProcessRequest{ID: id}, nil)
}

// Update changes the limits of a container.
func (s *Shim) Update(ctx context.Context, id string, r *specs.LinuxResources) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return s.call(ctx, "Update", &wire.UpdateTaskRequest{ID: id, Resources: &wire.Any{TypeURL: resourcesType, Value: b}}, nil)
}

// CheckpointOptions say how to write a container to files.
type CheckpointOptions struct {
	Images string // folder, made if it is missing
	Work   string // folder of CRIU's log and statistics
	// OpenTCP writes connections too, FileLocks locks.
	OpenTCP, FileLocks bool
}

// Checkpoint writes the processes of a container to files. They go on, or stay paused.
func (s *Shim) Checkpoint(ctx context.Context, id string, o CheckpointOptions) error {
	opts := wire.CheckpointOptions{OpenTCP: o.OpenTCP, FileLocks: o.FileLocks, ImagePath: o.Images, WorkPath: o.Work}
	return s.call(ctx, "Checkpoint", &wire.CheckpointTaskRequest{ID: id, Path: o.Images, Options: &wire.Any{TypeURL: wire.CheckpointOptionsURL, Value: wire.Marshal(&opts)}}, nil)
}

// Pids lists the processes of a container, by their numbers on the host.
func (s *Shim) Pids(ctx context.Context, id string) ([]int, error) {
	var r wire.PidsResponse
	if err := s.call(ctx, "Pids", &wire.ProcessRequest{ID: id}, &r); err != nil {
		return nil, err
	}
	pids := make([]int, len(r.Processes))
	for i, p := range r.Processes {
		pids[i] = int(p.Pid)
	}
	return pids, nil
}

// Resize sets the size of a terminal, in characters.
func (s *Shim) Resize(ctx context.Context, id, execID string, width, height uint32) error {
	return s.call(ctx, "ResizePty", &wire.ResizePtyRequest{ID: id, ExecID: execID, Width: width, Height: height}, nil)
}

// CloseStdin lets a process read the end of its input.
func (s *Shim) CloseStdin(ctx context.Context, id, execID string) error {
	return s.call(ctx, "CloseIO", &wire.CloseIORequest{ID: id, ExecID: execID, Stdin: true}, nil)
}

// ReopenLog opens the log file anew after the caller has renamed it. When it returns
// nothing more goes to the old file.
func (s *Shim) ReopenLog(ctx context.Context, id, execID string) error {
	return s.rpc.Call(ctx, wire.ServiceHako, "ReopenLog", &wire.ProcessRequest{ID: id, ExecID: execID}, nil)
}

// Pid is the number of the shim's process.
func (s *Shim) Pid(ctx context.Context) (int, error) {
	var r wire.ConnectResponse
	if err := s.call(ctx, "Connect", &wire.ProcessRequest{}, &r); err != nil {
		return 0, err
	}
	return int(r.ShimPid), nil
}

// Shutdown ends the shim if it holds no container. That it does hold one is no error.
func (s *Shim) Shutdown(ctx context.Context) error {
	err := s.call(ctx, "Shutdown", &wire.ShutdownRequest{}, nil)
	if errdefs.IsUnavailable(err) {
		return nil // it ended before its answer came
	}
	return err
}

// Gone is closed when the connection is lost.
func (s *Shim) Gone() <-chan struct{} { return s.rpc.Done() }

// Close ends the connection, and leaves the shim alone.
func (s *Shim) Close() error {
	if err := s.rpc.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}
