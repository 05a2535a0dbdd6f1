package engine

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/hako-engine/hako/shim/client"
)

// Containers of Docker and of the CRI, as containerd's clients see what runs in them: one that runs
// has a task. The engine starts it and takes it away; everything else can be asked of it here as well.

// ours finds the container of the engine's that a request for a task means; nil: none.
func (e *Engine) ours(ctx context.Context, id string) *container {
	if !isShared(ctx) {
		return nil
	}
	return e.containers.exact(id)
}

// onOurs makes a call to the shim of a container of the engine's, over a connection of its own.
func (e *Engine) onOurs(ctx context.Context, c *container, call func(TaskShim) error) error {
	shim, err := e.rawShim(ctx, c)
	if err != nil {
		return err
	}
	defer shim.Close()
	return call(shim)
}

func (e *Engine) rawShim(ctx context.Context, c *container) (TaskShim, error) {
	c.mu.Lock()
	r := c.run
	c.mu.Unlock()
	if r == nil {
		return nil, noTask(taskKey{Namespace, c.id})
	}
	shim, err := e.opt.TaskShims.ConnectTask(ctx, client.TaskOptions{StartOptions: client.StartOptions{Namespace: Namespace, ID: c.id, Bundle: r.bundle}})
	if errdefs.IsNotFound(err) {
		return nil, noTask(taskKey{Namespace, c.id})
	}
	return shim, err
}

// ourProcess is the first process of a container that runs.
func ourProcess(c *container) (p TaskProcess, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.run == nil {
		return p, false
	}
	p = TaskProcess{ID: c.id, Pid: uint32(c.run.pid.Load()), Status: TaskStatusRunning, Terminal: c.rec.Config.TTY}
	if c.rec.State.Status == StatusPaused {
		p.Status = TaskStatusPaused
	}
	return p, true
}

// ourExit is how a container that does not run ended.
func ourExit(c *container) (x TaskExit, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.run != nil:
		return x, failedf("task must be stopped before deletion: container %s is running", c.id)
	case c.rec.State.FinishedAt.IsZero():
		return x, noTask(taskKey{Namespace, c.id})
	}
	return TaskExit{Pid: uint32(c.lastPid), Status: uint32(c.rec.State.ExitCode), At: c.rec.State.FinishedAt}, nil
}

func (e *Engine) killOurs(ctx context.Context, c *container, signal uint32) error {
	err := e.KillContainer(ctx, c.id, strconv.Itoa(int(signal)))
	if errdefs.IsConflict(err) {
		return notFoundf("process of container %s: it has ended already: not found", c.id)
	}
	return err
}

func (e *Engine) waitOurs(ctx context.Context, c *container) (TaskExit, error) {
	ch, err := e.WaitContainer(ctx, c.id, WaitNotRunning)
	if err != nil {
		return TaskExit{}, err
	}
	select {
	case res := <-ch:
		x := TaskExit{Status: uint32(res.ExitCode), At: time.Now().UTC()}
		if known, err := ourExit(c); err == nil {
			x = known
		}
		return x, res.Err
	case <-ctx.Done():
		return TaskExit{}, context.Cause(ctx)
	case <-e.stopping:
		return TaskExit{}, errClosed
	}
}

// updateOurs changes limits where the container's record can tell of it.
func (e *Engine) updateOurs(ctx context.Context, c *container, resources typeurl.Any) error {
	var r specs.LinuxResources
	if err := json.Unmarshal(resources.GetValue(), &r); err != nil {
		return invalidf("update container %s: %v", c.id, err)
	}
	if c.pod {
		return e.onOurs(ctx, c, func(s TaskShim) error {
			_, err := s.Update(ctx, &taskapi.UpdateTaskRequest{ID: c.id, Resources: typeurl.MarshalProto(resources)})
			return err
		})
	}
	_, err := e.UpdateContainer(ctx, c.id, resourcesOf(&r), nil)
	return err
}

// startOurExec starts a process that was added to a container of the engine's through ExecTask.
func (e *Engine) startOurExec(ctx context.Context, c *container, execID string) (pid uint32, err error) {
	shim, err := e.rawShim(ctx, c)
	if err != nil {
		return 0, err
	}
	resp, err := shim.Start(ctx, &taskapi.StartRequest{ID: c.id, ExecID: execID})
	if err != nil {
		shim.Close()
		return 0, fmt.Errorf("start process %s of container %s: %w", execID, c.id, err)
	}
	// The shims of Docker's containers tell nobody of what they do.
	e.announce(Namespace, "/tasks/exec-started", &eventsapi.TaskExecStarted{ContainerID: c.id, ExecID: execID, Pid: resp.Pid})
	e.work.Go(func() {
		defer shim.Close()
		x, err := shim.Wait(e.ctx, &taskapi.WaitRequest{ID: c.id, ExecID: execID})
		if err != nil {
			return
		}
		e.announce(Namespace, "/tasks/exit", &eventsapi.TaskExit{ContainerID: c.id, ID: execID, Pid: resp.Pid, ExitStatus: x.ExitStatus, ExitedAt: x.ExitedAt})
	})
	return resp.Pid, nil
}

// tellTask tells containerd's clients what happened to a container of the engine's; action is
// Docker's name of it.
func (e *Engine) tellTask(c *container, action string, attrs map[string]string) {
	if e.opt.Publisher == nil || c.guest != nil {
		return
	}
	tell := func(topic string, event any) { e.announce(Namespace, topic, event) }
	verb, _, _ := strings.Cut(action, ":")
	v := c.view()
	switch verb {
	case "create":
		rec := e.containerRecord(c)
		tell("/containers/create", &eventsapi.ContainerCreate{ID: c.id, Image: rec.Image, Runtime: &eventsapi.ContainerCreate_Runtime{Name: rec.Runtime.Name}})
	case "rename", "update":
		tell("/containers/update", &eventsapi.ContainerUpdate{ID: c.id, Image: v.ImageName, Labels: v.Labels, SnapshotKey: v.SnapshotKey})
	case "destroy":
		tell("/containers/delete", &eventsapi.ContainerDelete{ID: c.id})
	case "start":
		pid := uint32(v.State.Pid)
		tell("/tasks/create", &eventsapi.TaskCreate{ContainerID: c.id, Bundle: e.bundle(c.id), IO: &eventsapi.TaskIO{Terminal: v.Config.TTY}, Pid: pid})
		tell("/tasks/start", &eventsapi.TaskStart{ContainerID: c.id, Pid: pid})
	case "pause":
		tell("/tasks/paused", &eventsapi.TaskPaused{ContainerID: c.id})
	case "unpause":
		tell("/tasks/resumed", &eventsapi.TaskResumed{ContainerID: c.id})
	case "oom":
		tell("/tasks/oom", &eventsapi.TaskOOM{ContainerID: c.id})
	case "die":
		if x, err := ourExit(c); err == nil && x.Pid != 0 {
			at := timestamppb.New(x.At)
			tell("/tasks/exit", &eventsapi.TaskExit{ContainerID: c.id, ID: c.id, Pid: x.Pid, ExitStatus: x.Status, ExitedAt: at})
			tell("/tasks/delete", &eventsapi.TaskDelete{ContainerID: c.id, Pid: x.Pid, ExitStatus: x.Status, ExitedAt: at})
		}
	case "exec_create":
		tell("/tasks/exec-added", &eventsapi.TaskExecAdded{ContainerID: c.id, ExecID: attrs["execID"]})
	case "exec_start":
		pid := 0
		if x, err := e.execs.get(attrs["execID"]); err == nil {
			c.mu.Lock()
			pid = x.pid
			c.mu.Unlock()
		}
		tell("/tasks/exec-started", &eventsapi.TaskExecStarted{ContainerID: c.id, ExecID: attrs["execID"], Pid: uint32(pid)})
	case "exec_die":
		code, _ := strconv.Atoi(attrs["exitCode"])
		tell("/tasks/exit", &eventsapi.TaskExit{ContainerID: c.id, ID: attrs["execID"], ExitStatus: uint32(code), ExitedAt: timestamppb.Now()})
	}
}
