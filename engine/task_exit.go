package engine

import (
	"context"
	"fmt"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/hako-engine/hako/shim/client"
)

func (t *task) tie() *shimTie { return &t.shimTie }

func (t *task) connection() TaskShim {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.shim
}

func (t *task) follow(e *Engine, shim TaskShim) (done bool) {
	if _, known := t.ending(); !known {
		resp, err := shim.Wait(e.ctx, &taskapi.WaitRequest{ID: t.id})
		if err == nil {
			e.taskEnded(t, TaskExit{Status: resp.ExitStatus, At: stamp(resp.ExitedAt)})
		} else if e.ctx.Err() == nil && !errdefs.IsUnavailable(err) {
			e.log.Debug("wait for a task", "task", t.id, "namespace", t.namespace, "error", err)
		}
	}
	_, known := t.ending()
	return known
}

func (t *task) reconnected(ctx context.Context, e *Engine, shim TaskShim) error {
	st, err := shim.State(ctx, &taskapi.StateRequest{ID: t.id})
	if err != nil {
		return err
	}
	e.takeTask(t, shim, st)
	return nil
}

func (t *task) lost(e *Engine) { e.taskLost(t) }

// takeTask makes a connection the task's, and believes what the shim says of it.
func (e *Engine) takeTask(t *task, shim TaskShim, st *taskapi.StateResponse) {
	p := processOf(st)
	t.mu.Lock()
	t.shim = shim
	if p.Pid != 0 {
		t.pid = p.Pid
	}
	switch p.Status {
	case client.StatusCreated:
		if t.state == taskCreating {
			t.state = taskCreated
		}
	case client.StatusRunning:
		if t.state == taskCreating || t.state == taskCreated || t.state == taskPaused {
			t.state = taskRunning
		}
		if t.started.IsZero() { // an earlier daemon has told of it
			t.started = t.meta.CreatedAt
		}
	case client.StatusPaused:
		if t.state == taskCreating || t.state == taskCreated || t.state == taskRunning {
			t.state = taskPaused
		}
		if t.started.IsZero() {
			t.started = t.meta.CreatedAt
		}
	}
	t.mu.Unlock()
	if p.Status == client.StatusStopped {
		e.taskEnded(t, p.Exit)
	}
}

// taskLost ends a task whose shim is gone: it cleans up after that, tells the end, and forgets the
// task. The caller holds the ticket.
func (e *Engine) taskLost(t *task) TaskExit {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(e.ctx), cleanupLimit)
	defer cancel()
	x, known := t.ending()
	var resp *taskapi.DeleteResponse
	var err error
	if t.meta.Foreign {
		err = fmt.Errorf("somebody else's shim is gone: %w", errdefs.ErrUnavailable)
	} else {
		resp, err = e.opt.TaskShims.ReapTask(ctx, t.shims)
	}
	switch {
	case err != nil:
		e.log.Error("clean up after a dead shim", "task", t.id, "namespace", t.namespace, "error", err)
		if !known {
			x = TaskExit{Status: exitUnknown}
		}
	case !known:
		x = TaskExit{Pid: resp.Pid, Status: resp.ExitStatus, At: stamp(resp.ExitedAt)}
	}
	if x.At.IsZero() {
		x.At = time.Now().UTC()
	}
	e.taskEnded(t, x)
	x, _ = t.ending()
	if !known {
		e.announce(t.namespace, "/tasks/exit", &eventsapi.TaskExit{ContainerID: t.id, ID: t.id, Pid: x.Pid, ExitStatus: x.Status, ExitedAt: timestamppb.New(x.At)})
	}
	e.forgetTask(t)
	e.announce(t.namespace, "/tasks/delete", &eventsapi.TaskDelete{ContainerID: t.id, Pid: x.Pid, ExitStatus: x.Status, ExitedAt: timestamppb.New(x.At)})
	return x
}

// forgetTask is the end of a task. The caller holds the ticket.
func (e *Engine) forgetTask(t *task) {
	e.removeBundle(&t.shimTie)
	t.mu.Lock()
	shim, docker := t.shim, t.docker
	t.mu.Unlock()
	e.tasks.remove(t)
	close(t.gone)
	if docker != nil {
		docker.Close()
		e.execs.removeOf(t.id)
	}
	if shim != nil {
		shim.Close()
	}
	e.leaveGroup(t)
}

// DeleteTask takes away a task that was not started or has ended, and gives how it ended.
func (e *Engine) DeleteTask(ctx context.Context, id string) (TaskExit, error) {
	if c := e.ours(ctx, id); c != nil {
		return ourExit(c) // the engine has taken it away
	}
	t, err := e.task(ctx, id)
	if err != nil {
		return TaskExit{}, err
	}
	if err := t.acquire(ctx); err != nil {
		return TaskExit{}, err
	}
	defer t.release()
	// It goes on if the client goes away.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupLimit)
	defer cancel()
	if s := t.status(); s == taskRunning || s == taskPaused {
		// Its end may be on its way to us, and known to the client already.
		if shim, err := t.live("look at"); err == nil {
			if st, err := shim.State(ctx, &taskapi.StateRequest{ID: id}); err == nil {
				e.takeTask(t, shim, st)
			}
		}
	}
	shim, err := t.live("delete")
	if errdefs.IsUnavailable(err) {
		return TaskExit{}, err
	} else if err != nil {
		return TaskExit{}, fmt.Errorf("task must be stopped before deletion: %w", err)
	}
	before := t.status()
	if err := t.change(taskDeleting); err != nil {
		return TaskExit{}, err
	}
	resp, err := shim.Delete(ctx, &taskapi.DeleteRequest{ID: id})
	if err != nil && !errdefs.IsNotFound(err) {
		if e.shimGone(ctx, t, shim) {
			return e.taskLost(t), nil
		}
		if _, over := t.ending(); over {
			before = taskStopped
		}
		t.mu.Lock()
		t.state = before // the inverse of the change above
		t.mu.Unlock()
		return TaskExit{}, fmt.Errorf("delete task %s: %w", id, err)
	}
	x, _ := t.ending()
	if err == nil {
		x = TaskExit{Pid: resp.Pid, Status: resp.ExitStatus, At: stamp(resp.ExitedAt)}
	}
	e.taskEnded(t, x)
	if !t.meta.Foreign {
		// Of a shim that others use, too, it has no effect.
		if _, err := shim.Shutdown(ctx, &taskapi.ShutdownRequest{ID: id}); err != nil && !errdefs.IsUnavailable(err) {
			e.log.Warn("end the shim of a task", "task", id, "namespace", t.namespace, "error", err)
		}
	}
	e.forgetTask(t)
	return x, nil
}

// shimGone tells whether nobody is there any more to answer for a task.
func (e *Engine) shimGone(ctx context.Context, t *task, shim TaskShim) bool {
	select {
	case <-shim.Gone():
	default:
		return false
	}
	next, err := e.opt.TaskShims.ConnectTask(ctx, t.shims)
	if err == nil {
		next.Close()
	}
	return errdefs.IsNotFound(err)
}

// DeleteTaskProcess takes away a process that was added and has ended.
func (e *Engine) DeleteTaskProcess(ctx context.Context, id, execID string) (TaskExit, error) {
	if execID == "" {
		return TaskExit{}, invalidf("which process of task %s?", id)
	}
	var x TaskExit
	err := e.onTask(ctx, id, "delete a process of", func(s TaskShim) error {
		resp, err := s.Delete(ctx, &taskapi.DeleteRequest{ID: id, ExecID: execID})
		if err == nil {
			x = TaskExit{Pid: resp.Pid, Status: resp.ExitStatus, At: stamp(resp.ExitedAt)}
		}
		return err
	})
	return x, err
}

// WaitTask waits for the end of a process. It may be called before the start.
func (e *Engine) WaitTask(ctx context.Context, id, execID string) (x TaskExit, err error) {
	if c := e.ours(ctx, id); c != nil {
		if execID == "" {
			return e.waitOurs(ctx, c)
		}
		err = e.onOurs(ctx, c, func(s TaskShim) error {
			resp, err := s.Wait(ctx, &taskapi.WaitRequest{ID: id, ExecID: execID})
			if err == nil {
				x = TaskExit{Status: resp.ExitStatus, At: stamp(resp.ExitedAt)}
			}
			return err
		})
		return x, err
	}
	t, err := e.task(ctx, id)
	if err != nil {
		return TaskExit{}, err
	}
	if execID == "" {
		select {
		case <-t.exited:
			x, _ := t.ending()
			return x, nil
		case <-t.gone: // its creation was undone
			if x, known := t.ending(); known {
				return x, nil
			}
			return TaskExit{}, t.notFound()
		case <-ctx.Done():
			return TaskExit{}, context.Cause(ctx)
		case <-e.stopping:
			return TaskExit{}, errClosed
		}
	}
	for {
		shim, err := t.live("look at")
		if err != nil {
			return TaskExit{}, err
		}
		resp, err := shim.Wait(ctx, &taskapi.WaitRequest{ID: id, ExecID: execID})
		if err == nil {
			return TaskExit{Status: resp.ExitStatus, At: stamp(resp.ExitedAt)}, nil
		}
		if !errdefs.IsUnavailable(err) {
			return TaskExit{}, fmt.Errorf("wait for process %s of task %s: %w", execID, id, err)
		}
		// The connection broke: it is made anew, or the shim is gone with all its processes.
		select {
		case <-t.gone:
			x, _ := t.ending()
			return TaskExit{Status: 128 + uint32(unix.SIGKILL), At: x.At}, nil
		case <-time.After(restartFirst):
		case <-ctx.Done():
			return TaskExit{}, context.Cause(ctx)
		case <-e.stopping:
			return TaskExit{}, errClosed
		}
	}
}

func stamp(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

// announce tells containerd's clients of an event.
func (e *Engine) announce(namespace, topic string, event any) {
	if e.opt.Publisher == nil {
		return
	}
	ctx := namespaces.WithNamespace(context.WithoutCancel(e.ctx), namespace)
	if err := e.opt.Publisher.Publish(ctx, topic, event); err != nil {
		e.log.Warn("publish an event", "topic", topic, "error", err)
	}
}
