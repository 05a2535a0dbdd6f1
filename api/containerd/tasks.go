package containerd

import (
	"context"

	api "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/mount"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/hako-engine/hako/engine"
)

type taskService struct {
	api.UnimplementedTasksServer
	*Server
}

func (s *taskService) Create(ctx context.Context, req *api.CreateTaskRequest) (*api.CreateTaskResponse, error) {
	c := engine.TaskConfig{
		Rootfs: toMounts(req.GetRootfs()), Stdin: req.GetStdin(), Stdout: req.GetStdout(), Stderr: req.GetStderr(), Terminal: req.GetTerminal(),
		Options: toAny(req.GetOptions()), RuntimePath: req.GetRuntimePath(), APIAddress: req.GetTaskApiAddress(), APIVersion: int(req.GetTaskApiVersion()),
	}
	if d := req.GetCheckpoint(); d != nil {
		checkpoint := toDescriptor(d)
		c.Checkpoint = &checkpoint
	}
	if s.opt.Mounts != nil {
		c.Activate = func(ctx context.Context, ms []mount.Mount, own func() engine.MountAbilities) ([]mount.Mount, func(), error) {
			return s.activateFor(ctx, req.GetContainerID(), ms, own)
		}
	}
	pid, err := s.opt.Backend.CreateTask(ctx, req.GetContainerID(), c)
	if err != nil {
		return nil, err
	}
	return &api.CreateTaskResponse{ContainerID: req.GetContainerID(), Pid: pid}, nil
}

func (s *taskService) Start(ctx context.Context, req *api.StartRequest) (*api.StartResponse, error) {
	pid, err := s.opt.Backend.StartTask(ctx, req.GetContainerID(), req.GetExecID())
	if err != nil {
		return nil, err
	}
	return &api.StartResponse{Pid: pid}, nil
}

func (s *taskService) Delete(ctx context.Context, req *api.DeleteTaskRequest) (*api.DeleteResponse, error) {
	x, err := s.opt.Backend.DeleteTask(ctx, req.GetContainerID())
	if err != nil {
		return nil, err
	}
	s.deactivateFor(ctx, req.GetContainerID())
	return exitOf(req.GetContainerID(), x), nil
}

func (s *taskService) DeleteProcess(ctx context.Context, req *api.DeleteProcessRequest) (*api.DeleteResponse, error) {
	x, err := s.opt.Backend.DeleteTaskProcess(ctx, req.GetContainerID(), req.GetExecID())
	if err != nil {
		return nil, err
	}
	return exitOf(req.GetExecID(), x), nil
}

func exitOf(id string, x engine.TaskExit) *api.DeleteResponse {
	return &api.DeleteResponse{ID: id, Pid: x.Pid, ExitStatus: x.Status, ExitedAt: stampOf(x.At)}
}

func (s *taskService) Get(ctx context.Context, req *api.GetRequest) (*api.GetResponse, error) {
	p, err := s.opt.Backend.Task(ctx, req.GetContainerID(), req.GetExecID())
	if err != nil {
		return nil, err
	}
	return &api.GetResponse{Process: processOf(p)}, nil
}

func (s *taskService) List(ctx context.Context, _ *api.ListTasksRequest) (*api.ListTasksResponse, error) {
	list, err := s.opt.Backend.Tasks(ctx)
	if err != nil {
		return nil, err
	}
	resp := &api.ListTasksResponse{}
	for _, p := range list {
		resp.Tasks = append(resp.Tasks, processOf(p))
	}
	return resp, nil
}

var statuses = map[engine.TaskStatus]tasktypes.Status{
	engine.TaskStatusCreated: tasktypes.Status_CREATED, engine.TaskStatusRunning: tasktypes.Status_RUNNING,
	engine.TaskStatusPaused: tasktypes.Status_PAUSED, engine.TaskStatusStopped: tasktypes.Status_STOPPED,
}

func processOf(p engine.TaskProcess) *tasktypes.Process {
	out := &tasktypes.Process{
		ContainerID: p.ID, ID: p.ExecID, Pid: p.Pid, Status: statuses[p.Status], Stdin: p.Stdin, Stdout: p.Stdout, Stderr: p.Stderr, Terminal: p.Terminal,
		ExitStatus: p.Exit.Status, ExitedAt: stampOf(p.Exit.At),
	}
	if out.ID == "" { // the first process has the container's name
		out.ID = p.ID
	}
	return out
}

func (s *taskService) Kill(ctx context.Context, req *api.KillRequest) (*emptypb.Empty, error) {
	return done(s.opt.Backend.KillTask(ctx, req.GetContainerID(), req.GetExecID(), req.GetSignal(), req.GetAll()))
}

// done is the answer that says nothing.
func done(err error) (*emptypb.Empty, error) {
	if err != nil {
		return nil, err
	}
	return empty(), nil
}

func (s *taskService) Exec(ctx context.Context, req *api.ExecProcessRequest) (*emptypb.Empty, error) {
	return done(s.opt.Backend.ExecTask(ctx, req.GetContainerID(), engine.TaskExec{
		ExecID: req.GetExecID(), Stdin: req.GetStdin(), Stdout: req.GetStdout(), Stderr: req.GetStderr(), Terminal: req.GetTerminal(), Spec: toAny(req.GetSpec()),
	}))
}

func (s *taskService) ResizePty(ctx context.Context, req *api.ResizePtyRequest) (*emptypb.Empty, error) {
	return done(s.opt.Backend.ResizeTask(ctx, req.GetContainerID(), req.GetExecID(), req.GetWidth(), req.GetHeight()))
}

func (s *taskService) CloseIO(ctx context.Context, req *api.CloseIORequest) (*emptypb.Empty, error) {
	return done(s.opt.Backend.CloseTaskIO(ctx, req.GetContainerID(), req.GetExecID(), req.GetStdin()))
}

func (s *taskService) Pause(ctx context.Context, req *api.PauseTaskRequest) (*emptypb.Empty, error) {
	return done(s.opt.Backend.PauseTask(ctx, req.GetContainerID()))
}

func (s *taskService) Resume(ctx context.Context, req *api.ResumeTaskRequest) (*emptypb.Empty, error) {
	return done(s.opt.Backend.ResumeTask(ctx, req.GetContainerID()))
}

func (s *taskService) ListPids(ctx context.Context, req *api.ListPidsRequest) (*api.ListPidsResponse, error) {
	list, err := s.opt.Backend.TaskPids(ctx, req.GetContainerID())
	if err != nil {
		return nil, err
	}
	resp := &api.ListPidsResponse{}
	for _, p := range list {
		resp.Processes = append(resp.Processes, &tasktypes.ProcessInfo{Pid: p.Pid, Info: p.Info})
	}
	return resp, nil
}

func (s *taskService) Checkpoint(ctx context.Context, req *api.CheckpointTaskRequest) (*api.CheckpointTaskResponse, error) {
	list, err := s.opt.Backend.CheckpointTask(ctx, req.GetContainerID(), toAny(req.GetOptions()))
	if err != nil {
		return nil, err
	}
	resp := &api.CheckpointTaskResponse{}
	for _, d := range list {
		resp.Descriptors = append(resp.Descriptors, descriptorOf(d))
	}
	return resp, nil
}

func (s *taskService) Update(ctx context.Context, req *api.UpdateTaskRequest) (*emptypb.Empty, error) {
	return done(s.opt.Backend.UpdateTask(ctx, req.GetContainerID(), toAny(req.GetResources()), req.GetAnnotations()))
}

func (s *taskService) Metrics(ctx context.Context, req *api.MetricsRequest) (*api.MetricsResponse, error) {
	list, err := s.opt.Backend.MeasureTasks(ctx, req.GetFilters())
	if err != nil {
		return nil, err
	}
	resp := &api.MetricsResponse{}
	for _, m := range list {
		resp.Metrics = append(resp.Metrics, &types.Metric{Timestamp: stampOf(m.At), ID: m.ID, Data: m.Data})
	}
	return resp, nil
}

func (s *taskService) Wait(ctx context.Context, req *api.WaitRequest) (*api.WaitResponse, error) {
	ctx, cancel := s.untilShutdown(ctx)
	defer cancel()
	x, err := s.opt.Backend.WaitTask(ctx, req.GetContainerID(), req.GetExecID())
	if err != nil {
		return nil, err
	}
	return &api.WaitResponse{ExitStatus: x.Status, ExitedAt: stampOf(x.At)}, nil
}
