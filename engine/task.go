package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/keylock"
	"github.com/hako-engine/hako/shim/client"
)

// A task is the running part of a container whose OCI configuration, root file system and
// streams its client made (containerd's API). It has no record: it lives in its bundle and in its
// shim, and is gone when it was deleted, or its shim died.
//
//	          Create                     Start
//	(none) ──────────► creating ──► created ──► running ◄──► paused
//	                      │ failed     │           │ Pause,    │
//	                      ▼            │ killed    │ Resume    │
//	                    (none)         ▼           ▼ exit      │
//	                                  stopped ◄────────────────┘
//	                                   │   ▲
//	                            Delete ▼   │ failed
//	                                 deleting ──► (none)
//
// Exit is told by the shim's Wait, which is called as soon as there is a task: so none is missed.
// A shim that is gone ends its task: what is left is killed, the exit told, the task deleted.
type taskState int

const (
	taskCreating taskState = iota
	taskCreated
	taskRunning
	taskPaused
	taskStopped
	taskDeleting
)

func (s taskState) String() string {
	return [...]string{"being created", "created", "running", "paused", "stopped", "being deleted"}[s]
}

var taskTransitions = map[taskState][]taskState{
	taskCreating: {taskCreated, taskRunning, taskPaused, taskStopped}, // all but the first when it is taken up again
	taskCreated:  {taskRunning, taskStopped, taskDeleting},
	taskRunning:  {taskPaused, taskStopped},
	taskPaused:   {taskRunning, taskStopped},
	taskStopped:  {taskDeleting},
	taskDeleting: {taskStopped, taskCreated},
}

// TaskConfig asks for a task.
type TaskConfig struct {
	Rootfs []mount.Mount // bottom first; empty: what the configuration says
	// Activate, if there is one, makes what the shim cannot of the mounts, and gives those that are left to it. undo takes
	// them back. own tells what the shim makes itself.
	Activate func(ctx context.Context, ms []mount.Mount, own func() MountAbilities) (left []mount.Mount, undo func(), err error)
	// Stdin, Stdout and Stderr are paths of FIFOs or URIs that the shim understands; "" is nothing.
	Stdin, Stdout, Stderr string
	Terminal              bool
	Checkpoint            *ocispec.Descriptor // what it is restored from; nil: it is new
	Options               typeurl.Any         // of the runtime; nil: those of the container
	RuntimePath           string              // "": the container's runtime
	// APIAddress is that of a task service that is there already, and APIVersion its version (2 or 3).
	APIAddress string
	APIVersion int
}

// TaskStatus is the state of a process as clients see it; "" if nobody knows.
type TaskStatus = client.Status

// MountAbilities are mounts that a shim makes itself.
type MountAbilities = client.MountAbilities

// Values of TaskStatus.
const (
	TaskStatusCreated = client.StatusCreated
	TaskStatusRunning = client.StatusRunning
	TaskStatusPaused  = client.StatusPaused
	TaskStatusStopped = client.StatusStopped
)

// TaskProcess is a process of a task: its first one, or one that was added.
type TaskProcess struct {
	ID, ExecID            string
	Pid                   uint32
	Status                TaskStatus
	Stdin, Stdout, Stderr string
	Terminal              bool
	Exit                  TaskExit // if Status is TaskStatusStopped
}

// TaskExit is how a process ended.
type TaskExit struct {
	Pid, Status uint32 // exit code, or 128 + signal
	At          time.Time
}

// task is one task.
type task struct {
	shimTie
	meta   taskMeta
	exited chan struct{} // closed when exit is known

	mu    sync.Mutex // guards all below; never held over a call to a shim
	state taskState
	shim  TaskShim
	// docker is another connection to the same shim, by which Docker executes in a guest; may be nil.
	docker Shim
	pid    uint32
	exit   TaskExit
	// started is when the start was told, and unsaid that it ended before it was.
	started time.Time
	unsaid  bool
}

// taskMeta is what is kept of a task in its bundle. Fields are only ever added.
type taskMeta struct {
	Version   int       `json:"version"`
	Runtime   string    `json:"runtime"`
	Program   string    `json:"program,omitempty"` // of a third party's shim
	Binary    string    `json:"binary,omitempty"`  // OCI runtime that hako's shim executes
	Group     string    `json:"group,omitempty"`   // tasks of a group share a shim
	Sandbox   string    `json:"sandbox,omitempty"`
	Foreign   bool      `json:"foreign,omitempty"` // somebody else started the shim, and ends it
	Stdin     string    `json:"stdin,omitempty"`
	Stdout    string    `json:"stdout,omitempty"`
	Stderr    string    `json:"stderr,omitempty"`
	Terminal  bool      `json:"terminal,omitempty"`
	CreatedAt time.Time `json:"createdAt"`
}

const (
	taskMetaVersion = 1
	taskMetaFile    = "hako-task.json"
	// taskFolder has containerd's name, so that agents which look into bundles find them.
	taskFolder = "io.containerd.runtime.v2.task"
)

// tasks finds tasks.
type tasks struct {
	tiedIndex[*task]
	// turns of those who look for the shim of a group, mount a root, or decide whether a container has a task. A key begins with
	// "group/", "root/" or "restart/".
	turns keylock.Locks
}

func (e *Engine) newTask(k taskKey, meta taskMeta) *task {
	return &task{shimTie: newTie(k, "task", e.taskBundle(k)), meta: meta, exited: make(chan struct{})}
}

func (e *Engine) taskBundle(k taskKey) string {
	return filepath.Join(e.opt.State, taskFolder, k.namespace, k.id)
}

// keyOf checks what becomes part of a path.
func keyOf(ctx context.Context, id string) (taskKey, error) {
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return taskKey{}, err
	}
	if err := identifiers.Validate(ns); err != nil {
		return taskKey{}, fmt.Errorf("namespace: %w", err)
	}
	if err := identifiers.Validate(id); err != nil {
		return taskKey{}, fmt.Errorf("container id: %w", err)
	}
	return taskKey{ns, id}, nil
}

// task finds a task of the context's namespace. One that is being created is not there yet.
func (e *Engine) task(ctx context.Context, id string) (*task, error) {
	k, err := keyOf(ctx, id)
	if err != nil {
		return nil, err
	}
	t := e.tasks.get(k)
	if t == nil || t.status() == taskCreating {
		return nil, noTask(k)
	}
	return t, nil
}

func noTask(k taskKey) error {
	return notTied("task", k)
}

func (t *task) status() taskState {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.state
}

// changeLocked moves a task to another state, or refuses. It is the only function that does.
func (t *task) changeLocked(to taskState) error {
	if !slices.Contains(taskTransitions[t.state], to) {
		return failedf("task %s cannot go from %s to %s", t.id, t.state, to)
	}
	t.state = to
	return nil
}

func (t *task) change(to taskState) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.changeLocked(to)
}

// live gives the connection to the shim of a task, if op is possible now. It is the only
// function that refuses an operation because of the state.
func (t *task) live(op string) (TaskShim, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var fits bool
	switch op {
	case "start":
		fits = t.state == taskCreated
	case "delete":
		fits = t.state == taskCreated || t.state == taskStopped
	case "pause":
		fits = t.state == taskRunning
	case "resume":
		fits = t.state == taskPaused
	case "exec", "update", "checkpoint", "resize", "close the input of":
		fits = t.state == taskCreated || t.state == taskRunning || t.state == taskPaused
	case "kill":
		if t.state == taskStopped || t.state == taskDeleting {
			return nil, notFoundf("process of task %s: it has ended already: not found", t.id)
		}
		fits = true
	default: // looks at it
		fits = true
	}
	switch {
	case t.state == taskCreating:
		return nil, t.notFound()
	case !fits:
		return nil, failedf("cannot %s task %s: it is %s", op, t.id, t.state)
	case t.shim == nil:
		return nil, fmt.Errorf("the shim of task %s does not answer: %w", t.id, errdefs.ErrUnavailable)
	}
	return t.shim, nil
}

// endedLocked records the exit once, and tells whether it was this time. The caller holds t.mu.
func (t *task) endedLocked(x TaskExit) (now bool) {
	select {
	case <-t.exited:
		return false
	default:
	}
	if t.state != taskDeleting {
		t.state = taskStopped
	}
	if x.Pid == 0 {
		x.Pid = t.pid
	}
	t.exit = x
	close(t.exited)
	return true
}

// ending gives the exit, if it is known.
func (t *task) ending() (x TaskExit, known bool) {
	select {
	case <-t.exited:
		t.mu.Lock()
		defer t.mu.Unlock()
		return t.exit, true
	default:
		return x, false
	}
}

// process is the first process as far as it is known here.
func (t *task) process() TaskProcess {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := TaskProcess{
		ID: t.id, Pid: t.pid, Stdin: t.meta.Stdin, Stdout: t.meta.Stdout, Stderr: t.meta.Stderr, Terminal: t.meta.Terminal, Exit: t.exit,
	}
	switch t.state {
	case taskCreating, taskCreated:
		p.Status = client.StatusCreated
	case taskRunning:
		p.Status = client.StatusRunning
	case taskPaused:
		p.Status = client.StatusPaused
	default:
		p.Status = client.StatusStopped
	}
	if t.shim == nil && p.Status != client.StatusStopped {
		p.Status = ""
	}
	return p
}

// removeTaskBundle unmounts what a shim left mounted, and removes the folder. It never goes into
// what is still mounted.
func removeTaskBundle(bundle string) error {
	rootfs := filepath.Join(bundle, "rootfs")
	for range 64 {
		err := unix.Unmount(rootfs, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break
		}
		if err != nil {
			return &os.PathError{Op: "unmount", Path: rootfs, Err: err}
		}
	}
	var outer, inner unix.Stat_t
	if unix.Lstat(bundle, &outer) == nil && unix.Lstat(rootfs, &inner) == nil && outer.Dev != inner.Dev {
		return fmt.Errorf("remove %s: something is mounted at rootfs: %w", bundle, errdefs.ErrFailedPrecondition)
	}
	return os.RemoveAll(bundle)
}
