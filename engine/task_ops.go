package engine

import (
	"context"
	"fmt"
	"sync"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/hako-engine/hako/shim/client"
)

// lookLimit is how long a list waits for a shim.
const lookLimit = 2 * time.Second

// TaskExec asks for another process in a task.
type TaskExec struct {
	ExecID                string
	Stdin, Stdout, Stderr string
	Terminal              bool
	Spec                  typeurl.Any // OCI process
}

// TaskPid is a process of a task. Info is what its shim says of it, and may be nil.
type TaskPid struct {
	Pid  uint32
	Info *anypb.Any
}

// TaskMetrics are measurements of a task: containerd's message for cgroup v1 or v2.
type TaskMetrics struct {
	ID   string
	At   time.Time
	Data *anypb.Any
}

func processOf(st *taskapi.StateResponse) TaskProcess {
	p := TaskProcess{
		ID: st.ID, ExecID: st.ExecID, Pid: st.Pid, Stdin: st.Stdin, Stdout: st.Stdout, Stderr: st.Stderr, Terminal: st.Terminal,
	}
	switch st.Status {
	case tasktypes.Status_CREATED:
		p.Status = client.StatusCreated
	case tasktypes.Status_RUNNING:
		p.Status = client.StatusRunning
	case tasktypes.Status_PAUSED, tasktypes.Status_PAUSING:
		p.Status = client.StatusPaused
	case tasktypes.Status_STOPPED:
		p.Status = client.StatusStopped
		p.Exit = TaskExit{Pid: st.Pid, Status: st.ExitStatus, At: stamp(st.ExitedAt)}
	}
	return p
}

// Task gives a process of a task: its first (execID "") or another one.
func (e *Engine) Task(ctx context.Context, id, execID string) (TaskProcess, error) {
	if c := e.ours(ctx, id); c != nil && execID == "" {
		p, ok := ourProcess(c)
		if !ok {
			return p, noTask(taskKey{Namespace, id})
		}
		return p, nil
	}
	if execID == "" {
		t, err := e.task(ctx, id)
		if err != nil {
			return TaskProcess{}, err
		}
		return t.look(ctx), nil
	}
	var p TaskProcess
	err := e.onTask(ctx, id, "look at", func(s TaskShim) error {
		st, err := s.State(ctx, &taskapi.StateRequest{ID: id, ExecID: execID})
		if err == nil {
			p = processOf(st)
			p.ID, p.ExecID = id, execID
		}
		return err
	})
	return p, err
}

// look asks the shim for the first process, but not for long.
func (t *task) look(ctx context.Context) TaskProcess {
	p := t.process()
	if p.Status == client.StatusStopped {
		return p
	}
	shim, err := t.live("look at")
	if err != nil {
		return p
	}
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	st, err := shim.State(ctx, &taskapi.StateRequest{ID: t.id})
	if err != nil {
		if p = t.process(); p.Status != client.StatusStopped {
			p.Status = "" // it may have ended since
		}
		return p
	}
	now := processOf(st)
	p.Status, p.Exit = now.Status, now.Exit
	if now.Pid != 0 {
		p.Pid = now.Pid
	}
	return p
}

// Tasks lists the first processes of a namespace's tasks. A shim that does not answer holds up
// nobody for long.
func (e *Engine) Tasks(ctx context.Context) ([]TaskProcess, error) {
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return nil, err
	}
	list := e.tasks.in(ns)
	out := make([]TaskProcess, 0, len(list))
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, t := range list {
		if t.status() == taskCreating {
			continue
		}
		wg.Go(func() {
			p := t.look(ctx)
			mu.Lock()
			defer mu.Unlock()
			out = append(out, p)
		})
	}
	wg.Wait()
	if isShared(ctx) {
		for _, c := range e.containers.all() {
			if p, ok := ourProcess(c); ok {
				out = append(out, p)
			}
		}
	}
	return out, nil
}

// KillTask sends a signal to a process of a task, or to all of them.
func (e *Engine) KillTask(ctx context.Context, id, execID string, signal uint32, all bool) error {
	if c := e.ours(ctx, id); c != nil && execID == "" {
		return e.killOurs(ctx, c, signal)
	}
	return e.onTask(ctx, id, "kill", func(s TaskShim) error {
		_, err := s.Kill(ctx, &taskapi.KillRequest{ID: id, ExecID: execID, Signal: signal, All: all})
		return err
	})
}

// onTask makes a call to the shim of a task.
func (e *Engine) onTask(ctx context.Context, id, op string, call func(TaskShim) error) error {
	if c := e.ours(ctx, id); c != nil {
		if err := e.onOurs(ctx, c, call); err != nil {
			return fmt.Errorf("%s task %s: %w", op, id, err)
		}
		return nil
	}
	t, err := e.task(ctx, id)
	if err != nil {
		return err
	}
	shim, err := t.live(op)
	if err != nil {
		return err
	}
	if err := call(shim); err != nil {
		return fmt.Errorf("%s task %s: %w", op, id, err)
	}
	return nil
}

// ExecTask adds a process, which waits to be started.
func (e *Engine) ExecTask(ctx context.Context, id string, x TaskExec) error {
	if x.ExecID == "" {
		return invalidf("a process that is added to task %s needs an id", id)
	}
	if err := identifiers.Validate(x.ExecID); err != nil {
		return fmt.Errorf("exec id %q: %w", x.ExecID, err)
	}
	err := e.onTask(ctx, id, "exec", func(s TaskShim) error {
		_, err := s.Exec(ctx, &taskapi.ExecProcessRequest{
			ID: id, ExecID: x.ExecID, Terminal: x.Terminal, Stdin: x.Stdin, Stdout: x.Stdout, Stderr: x.Stderr, Spec: typeurl.MarshalProto(x.Spec),
		})
		return err
	})
	if err == nil && e.ours(ctx, id) != nil {
		e.announce(Namespace, "/tasks/exec-added", &eventsapi.TaskExecAdded{ContainerID: id, ExecID: x.ExecID})
	}
	return err
}

// ResizeTask sets the size of a terminal, in characters.
func (e *Engine) ResizeTask(ctx context.Context, id, execID string, width, height uint32) error {
	return e.onTask(ctx, id, "resize", func(s TaskShim) error {
		_, err := s.ResizePty(ctx, &taskapi.ResizePtyRequest{ID: id, ExecID: execID, Width: width, Height: height})
		return err
	})
}

// CloseTaskIO lets a process read the end of its input.
func (e *Engine) CloseTaskIO(ctx context.Context, id, execID string, stdin bool) error {
	return e.onTask(ctx, id, "close the input of", func(s TaskShim) error {
		_, err := s.CloseIO(ctx, &taskapi.CloseIORequest{ID: id, ExecID: execID, Stdin: stdin})
		return err
	})
}

// PauseTask freezes a task.
func (e *Engine) PauseTask(ctx context.Context, id string) error {
	if c := e.ours(ctx, id); c != nil {
		return unfit(e.PauseContainer(ctx, id))
	}
	return e.freezeTask(ctx, id, "pause", taskPaused, func(ctx context.Context, s TaskShim) error {
		_, err := s.Pause(ctx, &taskapi.PauseRequest{ID: id})
		return err
	})
}

// ResumeTask thaws it.
func (e *Engine) ResumeTask(ctx context.Context, id string) error {
	if c := e.ours(ctx, id); c != nil {
		return unfit(e.UnpauseContainer(ctx, id))
	}
	return e.freezeTask(ctx, id, "resume", taskRunning, func(ctx context.Context, s TaskShim) error {
		_, err := s.Resume(ctx, &taskapi.ResumeRequest{ID: id})
		return err
	})
}

func (e *Engine) freezeTask(ctx context.Context, id, op string, to taskState, call func(context.Context, TaskShim) error) error {
	t, err := e.task(ctx, id)
	if err != nil {
		return err
	}
	if err := t.acquire(ctx); err != nil {
		return err
	}
	defer t.release()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), changeLimit)
	defer cancel()
	if err := e.onTask(ctx, id, op, func(s TaskShim) error { return call(ctx, s) }); err != nil {
		return err
	}
	t.mu.Lock()
	if t.state == taskRunning || t.state == taskPaused { // it may have ended by now
		err = t.changeLocked(to)
	}
	t.mu.Unlock()
	if err == nil {
		e.emitTask(t, map[string]string{"pause": "pause", "resume": "unpause"}[op])
	}
	return err
}

// TaskPids lists the processes of a task, by their numbers on the host.
func (e *Engine) TaskPids(ctx context.Context, id string) (out []TaskPid, err error) {
	err = e.onTask(ctx, id, "list the processes of", func(s TaskShim) error {
		r, err := s.Pids(ctx, &taskapi.PidsRequest{ID: id})
		for _, p := range r.GetProcesses() {
			out = append(out, TaskPid{p.Pid, p.Info})
		}
		return err
	})
	return out, err
}

// UpdateTask changes the limits of a task: resources is OCI's LinuxResources, in JSON.
func (e *Engine) UpdateTask(ctx context.Context, id string, resources typeurl.Any, annotations map[string]string) error {
	if resources == nil {
		return invalidf("update task %s without resources", id)
	}
	if c := e.ours(ctx, id); c != nil {
		return e.updateOurs(ctx, c, resources)
	}
	return e.onTask(ctx, id, "update", func(s TaskShim) error {
		_, err := s.Update(ctx, &taskapi.UpdateTaskRequest{ID: id, Resources: typeurl.MarshalProto(resources), Annotations: annotations})
		return err
	})
}

// MeasureTasks gives measurements of the tasks that one of the filters matches (fields id,
// namespace, runtime; none: all). Those that cannot be measured are left out.
func (e *Engine) MeasureTasks(ctx context.Context, fs []string) ([]TaskMetrics, error) {
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return nil, err
	}
	filter, err := filters.ParseAll(fs...)
	if err != nil {
		return nil, err
	}
	var out []TaskMetrics
	var mu sync.Mutex
	var wg sync.WaitGroup
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	for _, t := range e.tasks.in(ns) {
		if !filter.Match(taskAdaptor(t.taskKey, t.meta.Runtime)) {
			continue
		}
		wg.Go(func() {
			shim, err := t.live("measure")
			if err != nil {
				return
			}
			at := time.Now().UTC()
			r, err := shim.Stats(ctx, &taskapi.StatsRequest{ID: t.id})
			if err != nil {
				if !errdefs.IsNotFound(err) {
					e.log.Debug("measure a task", "task", t.id, "error", err)
				}
				return
			}
			mu.Lock()
			defer mu.Unlock()
			out = append(out, TaskMetrics{t.id, at, r.Stats})
		})
	}
	if isShared(ctx) {
		for _, c := range e.containers.all() {
			if _, running := ourProcess(c); !running || !filter.Match(taskAdaptor(taskKey{Namespace, c.id}, RuntimeHako)) {
				continue
			}
			wg.Go(func() {
				at := time.Now().UTC()
				_ = e.onOurs(ctx, c, func(s TaskShim) error {
					r, err := s.Stats(ctx, &taskapi.StatsRequest{ID: c.id})
					if err == nil {
						mu.Lock()
						defer mu.Unlock()
						out = append(out, TaskMetrics{c.id, at, r.Stats})
					}
					return err
				})
			})
		}
	}
	wg.Wait()
	return out, nil
}

func taskAdaptor(k taskKey, runtime string) filters.Adaptor {
	return filters.AdapterFunc(func(p []string) (string, bool) {
		if len(p) != 1 {
			return "", false
		}
		switch p[0] {
		case "id":
			return k.id, true
		case "namespace":
			return k.namespace, true
		case "runtime":
			return runtime, true
		}
		return "", false
	})
}

// unfit gives an error the class that containerd's clients know for a wrong state.
func unfit(err error) error {
	if errdefs.IsConflict(err) || errdefs.IsNotModified(err) {
		return failedf("%v", err)
	}
	return err
}
