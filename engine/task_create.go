package engine

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/hako-engine/hako/internal/durable"
	"github.com/hako-engine/hako/internal/undo"
	"github.com/hako-engine/hako/shim/client"
)

// groupAnnotations name the group of containers that share a shim.
var groupAnnotations = []string{"io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"}

// CreateTask makes the task of a container: a process that waits to be started. What was done
// is taken back if it fails.
func (e *Engine) CreateTask(ctx context.Context, id string, c TaskConfig) (pid uint32, err error) {
	k, err := keyOf(ctx, id)
	if err != nil {
		return 0, err
	}
	if c := e.ours(ctx, id); c != nil {
		if _, running := ourProcess(c); running {
			return 0, fmt.Errorf("task %s: %w", id, errdefs.ErrAlreadyExists)
		}
		return 0, failedf("container %s was made by Docker or the CRI, and is started there", id)
	}
	rec, err := e.opt.ContainerRecords.Get(ctx, id)
	if err != nil {
		return 0, err
	}
	t, err := e.plannedTask(k, rec, c)
	if err != nil {
		return 0, fmt.Errorf("create task %s: %w", id, err)
	}
	t.ticket <- struct{}{}
	defer t.release()
	if !e.tasks.add(t) {
		return 0, fmt.Errorf("task %s: %w", id, errdefs.ErrAlreadyExists)
	}
	var u undo.Stack
	defer func() {
		if err != nil {
			err = fmt.Errorf("create task %s: %w", id, err)
		}
		err = errors.Join(err, u.Run(ctx))
	}()
	u.Add("task", func(context.Context) error { e.tasks.remove(t); close(t.gone); e.leaveGroup(t); return nil })
	free, err := e.holdRoot(ctx, k)
	if err != nil {
		return 0, err
	}
	defer free()
	if err := e.makeTask(ctx, t, rec, c, &u); err != nil {
		return 0, err
	}
	u.Release()
	e.work.Go(func() { e.watchTied(t) })
	return t.process().Pid, nil
}

// plannedTask is what the request and the container's record make of a task.
func (e *Engine) plannedTask(k taskKey, rec containers.Container, c TaskConfig) (*task, error) {
	meta := taskMeta{
		Version: taskMetaVersion, Runtime: rec.Runtime.Name, Sandbox: rec.SandboxID,
		Stdin: c.Stdin, Stdout: c.Stdout, Stderr: c.Stderr, Terminal: c.Terminal, CreatedAt: time.Now().UTC(),
	}
	if c.RuntimePath != "" {
		meta.Runtime = c.RuntimePath
	}
	var err error
	if meta.Program, meta.Binary, err = e.taskRuntime(meta.Runtime); err != nil {
		return nil, err
	}
	if rec.Spec == nil || len(rec.Spec.GetValue()) == 0 {
		return nil, invalidf("the container has no OCI configuration")
	}
	var spec struct {
		Annotations map[string]string `json:"annotations"`
	}
	if err := json.Unmarshal(rec.Spec.GetValue(), &spec); err != nil {
		return nil, invalidf("the OCI configuration is no JSON: %v", err)
	}
	for _, a := range groupAnnotations {
		if meta.Group == "" {
			meta.Group = spec.Annotations[a]
		}
	}
	t := e.newTask(k, meta)
	o := c.Options
	if o == nil || len(o.GetValue()) == 0 {
		o = rec.Runtime.Options
	}
	opts, known, err := taskOptions(meta.Program == "", meta.Runtime, o)
	if err != nil {
		return nil, err
	}
	if known != nil && known.TaskApiAddress != "" && c.APIAddress == "" { //nolint:staticcheck // an older client's way to say it
		t.meta.Foreign = true
	}
	t.shims = e.tieOptions(&t.shimTie, t.meta.Program, t.meta.Binary, opts)
	return t, nil
}

// tieOptions tell how the shim of a task or room is started and found.
func (e *Engine) tieOptions(t *shimTie, program, binary string, opts *anypb.Any) client.TaskOptions {
	self, _ := os.Executable()
	return client.TaskOptions{
		StartOptions: client.StartOptions{
			Binary: e.opt.ShimBinary, Namespace: t.namespace, ID: t.id, Bundle: t.bundle, Runtime: binary,
			EventsAddress: e.opt.TTRPCAddress,
		},
		Program: program, Address: e.opt.GRPCAddress, Daemon: self, Options: opts, Log: e.log,
	}
}

// makeTask makes bundle, shim and process.
func (e *Engine) makeTask(ctx context.Context, t *task, rec containers.Container, c TaskConfig, u *undo.Stack) error {
	u.Add("bundle", func(context.Context) error { return removeTaskBundle(t.bundle) })
	if err := e.makeTaskBundle(t, rec.Spec.GetValue()); err != nil {
		return fmt.Errorf("bundle: %w", err)
	}
	checkpoint, err := checkpointFolder(c.Options)
	if err != nil {
		return err
	}
	if checkpoint == "" && c.Checkpoint != nil {
		dir, err := e.unpackCheckpoint(ctx, t, *c.Checkpoint)
		if err != nil {
			return fmt.Errorf("checkpoint: %w", err)
		}
		defer os.RemoveAll(dir)
		checkpoint = dir
	}
	shim, err := e.findTaskShim(ctx, t, c)
	if err != nil {
		return fmt.Errorf("shim: %w", err)
	}
	t.mu.Lock()
	t.shim = shim
	t.mu.Unlock()
	deactivate := func() {}
	u.Add("mounts", func(context.Context) error { deactivate(); return nil })
	u.Add("shim", func(ctx context.Context) error { return e.dropTaskShim(ctx, t, shim) })
	rootfs := c.Rootfs
	if c.Activate != nil {
		var undo func()
		if rootfs, undo, err = c.Activate(ctx, rootfs, func() MountAbilities { return e.mountAbilities(ctx, t, shim) }); err != nil {
			return err
		}
		deactivate = undo
	}
	resp, err := shim.Create(ctx, &taskapi.CreateTaskRequest{
		ID: t.id, Bundle: t.bundle, Rootfs: mountMessages(rootfs), Terminal: c.Terminal,
		Stdin: c.Stdin, Stdout: c.Stdout, Stderr: c.Stderr, Checkpoint: checkpoint, Options: t.shims.Options,
	})
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pid = resp.Pid
	return t.changeLocked(taskCreated)
}

// mountAbilities tells what the shim of a task mounts itself.
func (e *Engine) mountAbilities(ctx context.Context, t *task, shim TaskShim) MountAbilities {
	if m := shim.Bootstrap().Mounts; m != nil {
		return *m
	}
	if t.meta.Program == "" {
		return MountAbilities{}
	}
	info, err := e.opt.TaskShims.RuntimeInfo(ctx, t.meta.Program, t.shims.Options)
	if err != nil {
		e.log.Debug("ask a shim what it mounts itself", "task", t.id, "namespace", t.namespace, "error", err)
		return MountAbilities{}
	}
	if m := client.MountsOf(info); m != nil {
		return *m
	}
	return MountAbilities{}
}

// checkpointFolder gives the folder of CRIU's images that the options of a request name; "" if they name none.
func checkpointFolder(o typeurl.Any) (string, error) {
	_, opts, err := taskOptions(false, "", o)
	if err != nil || opts == nil {
		return "", err
	}
	if opts.CriuImagePath != "" && !filepath.IsAbs(opts.CriuImagePath) {
		return "", invalidf("criu_image_path %q is no absolute path", opts.CriuImagePath)
	}
	return opts.CriuImagePath, nil
}

func mountMessages(ms []mount.Mount) []*types.Mount {
	out := make([]*types.Mount, len(ms))
	for i, m := range ms {
		out[i] = &types.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options}
	}
	return out
}

// makeTaskBundle lays the bundle down. What another task left there goes.
func (e *Engine) makeTaskBundle(t *task, spec []byte) error {
	if err := removeTaskBundle(t.bundle); err != nil {
		return err
	}
	parent := filepath.Dir(t.bundle)
	// 0711: a shim's runtime in a user namespace comes by.
	for _, dir := range []string{filepath.Dir(parent), parent} {
		if err := os.Mkdir(dir, 0o711); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	if err := os.Mkdir(t.bundle, 0o700); err != nil {
		return err
	}
	// The first process of a user namespace must reach its root file system, if that is mounted here.
	if gid, ok := mappedRoot(spec); ok {
		if err := errors.Join(os.Chown(t.bundle, -1, gid), os.Chmod(t.bundle, 0o710)); err != nil {
			return err
		}
	}
	if err := os.Mkdir(filepath.Join(t.bundle, "rootfs"), 0o711); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(t.bundle, "config.json"), spec, 0o600); err != nil {
		return err
	}
	program := t.meta.Program
	if program == "" {
		var err error
		if program, err = t.shims.StartOptions.Program(); err != nil {
			return err
		}
	}
	// As containerd has it, for whoever looks into bundles.
	if err := os.WriteFile(filepath.Join(t.bundle, "shim-binary-path"), []byte(program), 0o600); err != nil {
		return err
	}
	return writeTaskMeta(t)
}

func writeTaskMeta(t *task) error {
	raw, err := json.Marshal(t.meta)
	if err != nil {
		return err
	}
	return durable.WriteVolatile(filepath.Join(t.bundle, taskMetaFile), append(raw, '\n'), 0o600)
}

// mappedRoot gives the group of the host that is the container's root.
func mappedRoot(raw []byte) (gid int, ok bool) {
	var spec struct {
		Linux *struct {
			GIDMappings []struct {
				ContainerID, HostID uint32
			} `json:"gidMappings"`
		} `json:"linux"`
	}
	if json.Unmarshal(raw, &spec) != nil || spec.Linux == nil {
		return 0, false
	}
	for _, m := range spec.Linux.GIDMappings {
		if m.ContainerID == 0 {
			return int(m.HostID), true
		}
	}
	return 0, false
}

// findTaskShim gives the shim that shall hold a task: somebody's that the request names, that of
// the group, or a new one.
func (e *Engine) findTaskShim(ctx context.Context, t *task, c TaskConfig) (TaskShim, error) {
	address, version := c.APIAddress, uint32(c.APIVersion)
	var mounts *MountAbilities
	if b := e.rooms.get(taskKey{t.namespace, t.meta.Sandbox}); b != nil && address == "" {
		b.mu.Lock()
		shim := b.shim
		b.mu.Unlock()
		if shim == nil {
			return nil, fmt.Errorf("the shim of sandbox %s does not answer: %w", b.id, errdefs.ErrUnavailable)
		}
		address, version = endpoint(shim)
		mounts = shim.Bootstrap().Mounts
	}
	if address != "" {
		t.meta.Foreign = true
		if err := writeTaskMeta(t); err != nil {
			return nil, err
		}
		protocol, _, _ := strings.Cut(address, "+")
		if version == 0 {
			version = 3
		}
		return e.opt.TaskShims.JoinTask(ctx, t.shims, client.Bootstrap{Version: int(version), Address: address, Protocol: protocol, Mounts: mounts})
	}
	if !t.grouped() {
		return e.opt.TaskShims.StartTask(ctx, t.shims)
	}
	done, err := e.tasks.turns.Lock(ctx, "group/"+t.groupKey())
	if err != nil {
		return nil, err
	}
	defer done()
	for _, o := range e.tasks.group(t) {
		o.mu.Lock()
		shim := o.shim
		o.mu.Unlock()
		if shim == nil {
			continue
		}
		joined, err := e.opt.TaskShims.JoinTask(ctx, t.shims, shim.Bootstrap())
		if err != nil {
			continue
		}
		if joined.Reserve(ctx) == nil {
			return joined, nil
		}
		joined.Close()
	}
	// It outlives the task that it is started for, so it has a folder of its own.
	o := t.shims
	o.Bundle = e.groupDir(t)
	if err := errors.Join(os.RemoveAll(o.Bundle), os.MkdirAll(o.Bundle, 0o700)); err != nil {
		return nil, err
	}
	shim, err := e.opt.TaskShims.StartTask(ctx, o)
	if err != nil {
		return nil, err
	}
	defer shim.Close()
	return e.opt.TaskShims.JoinTask(ctx, t.shims, shim.Bootstrap())
}

// grouped tells whether the engine finds the shim of a group; other shims do that themselves.
func (t *task) grouped() bool { return t.meta.Group != "" && t.meta.Program == "" && !t.meta.Foreign }

func (t *task) groupKey() string {
	return strings.Join([]string{t.namespace, t.meta.Runtime, t.meta.Group}, "\x00")
}

// group lists the others of a task's group.
func (r *tasks) group(t *task) (out []*task) {
	for _, o := range r.in(t.namespace) {
		if o != t && o.grouped() && o.groupKey() == t.groupKey() {
			out = append(out, o)
		}
	}
	return out
}

// groupDir is the folder of a group's shim.
func (e *Engine) groupDir(t *task) string {
	sum := sha256.Sum256([]byte(t.groupKey()))
	return filepath.Join(e.opt.State, groupFolder, hex.EncodeToString(sum[:16]))
}

// groupFolder holds the folders of shims that several tasks share.
const groupFolder = "shims"

// shimDir is the folder that a task's shim has its socket in; "" if that is not known.
func (t *task) shimDir() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.shim == nil {
		return ""
	}
	_, path, _ := strings.Cut(t.shim.Bootstrap().Address, "unix://")
	return filepath.Dir(path)
}

// leaveGroup removes the folder of a shim that others use, too, with the last of its tasks.
func (e *Engine) leaveGroup(t *task) {
	if t.meta.Foreign {
		e.leaveRoom(t.namespace, t.shimDir())
	}
	if !t.grouped() {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(e.ctx), cleanupLimit)
	defer cancel()
	done, err := e.tasks.turns.Lock(ctx, "group/"+t.groupKey())
	if err != nil {
		return
	}
	defer done()
	if len(e.tasks.group(t)) == 0 {
		if err := os.RemoveAll(e.groupDir(t)); err != nil {
			e.log.Error("remove the folder of a shim", "task", t.id, "namespace", t.namespace, "error", err)
		}
	}
}

// holdRoot makes the caller the only one that mounts the files of a client's container to write to them: its
// task that is being created, or Docker, that copies into a container without a task. The kernel does not say
// what becomes of a layer that is mounted twice.
func (e *Engine) holdRoot(ctx context.Context, k taskKey) (done func(), err error) {
	done, err = e.tasks.turns.Lock(ctx, "root/"+k.namespace+"/"+k.id)
	if err != nil {
		return nil, fmt.Errorf("files of container %s: another operation is under way: %w", k.id, err)
	}
	return done, nil
}

// dropTaskShim takes back a shim that was found for a task, with what it may have made for it.
func (e *Engine) dropTaskShim(ctx context.Context, t *task, shim TaskShim) error {
	defer shim.Close()
	_, _ = shim.Kill(ctx, &taskapi.KillRequest{ID: t.id, Signal: uint32(unix.SIGKILL), All: true})
	_, err := shim.Delete(ctx, &taskapi.DeleteRequest{ID: t.id})
	if t.meta.Foreign {
		return nil
	}
	if err == nil || errdefs.IsNotFound(err) {
		if _, serr := shim.Shutdown(ctx, &taskapi.ShutdownRequest{ID: t.id}); serr == nil || errdefs.IsUnavailable(serr) {
			if t.meta.Program == "" {
				return nil
			}
		}
	}
	// It does not listen, or nobody knows how well it cleans up: it is done from outside.
	_, rerr := e.opt.TaskShims.ReapTask(ctx, t.shims)
	if errdefs.IsNotFound(rerr) {
		rerr = nil
	}
	if t.meta.Program != "" && rerr != nil { // programs of others fail for less
		e.log.Warn("clean up after a failed start", "task", t.id, "namespace", t.namespace, "error", rerr)
		return nil
	}
	return rerr
}

// StartTask starts the first process of a task (execID ""), or one that was added.
func (e *Engine) StartTask(ctx context.Context, id, execID string) (pid uint32, err error) {
	if c := e.ours(ctx, id); c != nil {
		if execID == "" {
			return 0, failedf("container %s was made by Docker or the CRI, and is started there", id)
		}
		return e.startOurExec(ctx, c, execID)
	}
	t, err := e.task(ctx, id)
	if err != nil {
		return 0, err
	}
	op := "start"
	if execID != "" {
		op = "exec"
	} else {
		if err := t.acquire(ctx); err != nil {
			return 0, err
		}
		defer t.release()
		// It goes on if the client goes away: else nobody would know what the task is.
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), startLimit)
		defer cancel()
	}
	shim, err := t.live(op)
	if err != nil {
		return 0, err
	}
	resp, err := shim.Start(ctx, &taskapi.StartRequest{ID: id, ExecID: execID})
	if err != nil {
		return 0, fmt.Errorf("start task %s: %w", id, err)
	}
	if execID == "" {
		e.taskStarted(t)
		t.mu.Lock()
		defer t.mu.Unlock()
		t.pid = resp.Pid
		if t.state == taskCreated { // it may have ended by now
			return resp.Pid, t.changeLocked(taskRunning)
		}
	}
	return resp.Pid, nil
}
