package engine

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
)

// A guest is a container that a client of containerd's API made in the namespace that Docker and
// CRI share, as Docker sees it. It is asked for anew each time: its record lies in the store, its
// process is a task. Docker can look at it, stop, kill, pause and remove it, wait for it, and execute
// in it. What only its client knows (how its streams are read, how it is started again) is refused
// with a word of whose it is.

// nerdctlName is the label under which nerdctl keeps a container's name.
const nerdctlName = "nerdctl/name"

// nerdctlNetworks is the annotation with the networks that nerdctl has put a container on.
const nerdctlNetworks = "nerdctl/networks"

// stopSignalLabel is where containerd's clients keep the signal that stops a container.
const stopSignalLabel = "io.containerd.image.config.stop-signal"

// guestLimit is how long the shim of a guest may take to be connected.
const guestLimit = 2 * time.Second

type guest struct {
	namespace string
	rec       containers.Container
	spec      *specs.Spec // not nil
	t         *task       // nil: no task
}

func shared(ctx context.Context) context.Context { return namespaces.WithNamespace(ctx, Namespace) }

// newGuest reads a record of a namespace. Docker knows guests of the one that is shared.
func (e *Engine) newGuest(ns string, rec containers.Container) *guest {
	g := &guest{namespace: ns, rec: rec, spec: &specs.Spec{}}
	if rec.Spec != nil {
		_ = json.Unmarshal(rec.Spec.GetValue(), g.spec) // what cannot be read is not shown
	}
	if t := e.tasks.get(taskKey{ns, rec.ID}); t != nil && t.status() != taskCreating {
		g.t = t
	}
	return g
}

// guest finds a guest by id, nerdctl's name, or unique prefix of the id.
func (e *Engine) guest(ctx context.Context, ref string) (*guest, error) {
	ref = strings.TrimPrefix(ref, "/")
	if e.opt.ContainerRecords == nil || ref == "" {
		return nil, notFoundf("No such container: %s", ref)
	}
	rec, err := e.opt.ContainerRecords.Get(shared(ctx), ref)
	if err == nil {
		return e.newGuest(Namespace, rec), nil
	}
	if !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err) {
		return nil, err
	}
	list, err := e.opt.ContainerRecords.List(shared(ctx))
	if err != nil {
		return nil, err
	}
	var found []containers.Container
	for _, rec := range list {
		if rec.Labels[nerdctlName] == ref {
			return e.newGuest(Namespace, rec), nil
		}
		if strings.HasPrefix(rec.ID, ref) {
			found = append(found, rec)
		}
	}
	switch len(found) {
	case 0:
		return nil, notFoundf("No such container: %s", ref)
	case 1:
		return e.newGuest(Namespace, found[0]), nil
	}
	return nil, invalidf("Multiple IDs found with provided prefix: %s", ref)
}

// nameFree refuses a name that a guest has.
func (e *Engine) nameFree(name string) error {
	guests, err := e.guests(e.ctx)
	if err != nil {
		return err
	}
	for _, g := range guests {
		if g.rec.ID == name || g.rec.Labels[nerdctlName] == name {
			return conflictf("Conflict. The container name %q is already in use by container %q, which was made through the containerd API.", "/"+name, g.rec.ID)
		}
	}
	return nil
}

// lookup finds a container of the engine's, or else a guest.
func (e *Engine) lookup(ctx context.Context, ref string) (*container, *guest, error) {
	c, err := e.containers.get(ref)
	if !errdefs.IsNotFound(err) {
		return c, nil, err
	}
	g, gerr := e.guest(ctx, ref)
	if errdefs.IsNotFound(gerr) {
		return nil, nil, err
	}
	return nil, g, gerr
}

// find finds a container to look at or to execute in. A guest comes as a container of this moment.
func (e *Engine) find(ctx context.Context, ref string) (*container, error) {
	c, g, err := e.lookup(ctx, ref)
	if err != nil || c != nil {
		return c, err
	}
	return e.guestContainer(ctx, g), nil
}

// foreignTo refuses what only the client of a guest can do.
func (g *guest) foreignTo(op string) error {
	return failedf("cannot %s container %s: it was made through the containerd API, and its client has to do it", op, g.rec.ID)
}

// process is that of the task; without one it is as if nothing ran yet.
func (g *guest) process() TaskProcess {
	if g.t == nil {
		return TaskProcess{ID: g.rec.ID, Status: TaskStatusCreated}
	}
	return g.t.process()
}

func (g *guest) key() taskKey { return taskKey{g.namespace, g.rec.ID} }

// rooted is a process whose root are the files of the guest, whether it runs or waits to be started, and
// what is closed when it has ended; 0: there is none.
func (g *guest) rooted() (pid int, ended <-chan struct{}) {
	if g.t == nil {
		return 0, nil
	}
	p := g.t.process()
	if p.Status == TaskStatusStopped {
		return 0, nil
	}
	return int(p.Pid), g.t.exited
}

func (g *guest) live() bool {
	s := g.process().Status
	return g.t != nil && s != TaskStatusStopped && s != TaskStatusCreated
}

// guestView is the guest in Docker's terms.
func (e *Engine) guestView(ctx context.Context, g *guest) Container {
	v := g.view()
	if img, err := e.opt.Images.Get(shared(ctx), g.rec.Image, nil); err == nil && g.rec.Image != "" {
		v.ImageID = img.ID.String()
	}
	return v
}

// view is guestView without the image's id, which takes a look into the store.
func (g *guest) view() Container {
	rec := g.rec
	v := Container{
		ID: rec.ID, Guest: true, Name: guestName(rec), Created: rec.CreatedAt, ImageName: rec.Image, Labels: rec.Labels, Snapshotter: rec.Snapshotter, SnapshotKey: rec.SnapshotKey,
		Hostname: g.spec.Hostname, StopSignal: rec.Labels[stopSignalLabel], Attached: []EndpointSettings{}, Args: []string{}, Env: []string{},
		Config: Config{Image: rec.Image, Labels: rec.Labels, Runtime: rec.Runtime.Name, NetworkMode: "host", Annotations: g.spec.Annotations, Log: LogConfig{Driver: "none"}},
	}
	if p := g.spec.Process; p != nil {
		v.Env, v.WorkingDir, v.Config.TTY, v.Config.Env = p.Env, p.Cwd, p.Terminal, p.Env
		if len(p.Args) > 0 {
			v.Path, v.Args, v.Cmd, v.Config.Cmd = p.Args[0], p.Args[1:], p.Args, p.Args
		}
	}
	if l := g.spec.Linux; l != nil {
		for _, ns := range l.Namespaces {
			if ns.Type == specs.NetworkNamespace {
				v.Config.NetworkMode = "none"
			}
		}
		if r := l.Resources; r != nil {
			v.Config.Resources = resourcesOf(r)
		}
	}
	if g.spec.Root != nil {
		v.Config.ReadonlyRootfs = g.spec.Root.Readonly
	}
	for _, m := range g.spec.Mounts {
		if m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind") {
			v.Mounts = append(v.Mounts, Mount{Kind: MountBind, Source: m.Source, Target: m.Destination, Resolved: m.Source, ReadOnly: slices.Contains(m.Options, "ro")})
		}
	}
	v.State = g.state()
	return v
}

func (g *guest) state() State {
	if g.t == nil {
		return State{Status: StatusCreated}
	}
	p := g.process()
	s := State{Status: StatusCreated, Pid: int(p.Pid), StartedAt: g.t.meta.CreatedAt}
	switch p.Status {
	case TaskStatusCreated:
		s.StartedAt = time.Time{}
	case TaskStatusPaused:
		s.Status = StatusPaused
	case TaskStatusStopped:
		s.Status, s.Pid, s.ExitCode, s.FinishedAt = StatusExited, 0, int(p.Exit.Status), p.Exit.At
	default: // running, or nobody knows
		s.Status = StatusRunning
	}
	return s
}

// guestContainer makes a container of a guest, for one operation. It is in no registry.
func (e *Engine) guestContainer(ctx context.Context, g *guest) *container {
	c := newContainer(record{Version: recordVersion, Container: e.guestView(ctx, g), Started: g.t != nil})
	c.guest = g
	if g.live() {
		c.run = newRun(e.guestShim(ctx, g.t), g.t.bundle, int(g.process().Pid), g.t.meta.CreatedAt)
	}
	return c
}

// guestShim is the connection by which Docker reaches a task: made once, and only to a shim of hako's.
func (e *Engine) guestShim(ctx context.Context, t *task) Shim {
	t.mu.Lock()
	shim := t.docker
	t.mu.Unlock()
	if shim != nil {
		select {
		case <-shim.Gone():
		default:
			return shim
		}
	}
	ctx, cancel := context.WithTimeout(ctx, guestLimit)
	defer cancel()
	shim, err := e.opt.Shims.Connect(ctx, t.bundle)
	if err != nil {
		return absentShim{}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if old := t.docker; old != nil {
		select {
		case <-old.Gone():
			old.Close()
		default: // somebody else was faster
			shim.Close()
			return old
		}
	}
	t.docker = shim
	return shim
}

// endGuest signals a guest and waits for its end; timeout < 0: for ever.
func (e *Engine) endGuest(ctx context.Context, g *guest, sig int, all bool, timeout time.Duration) (ended bool, err error) {
	shim, err := g.t.live("kill")
	if errdefs.IsNotFound(err) {
		return true, nil
	} else if err != nil {
		return false, err
	}
	kctx, cancel := context.WithTimeout(ctx, killLimit)
	_, err = shim.Kill(kctx, &taskapi.KillRequest{ID: g.rec.ID, Signal: uint32(sig), All: all})
	if g.t.status() == taskPaused { // so that it gets it
		_, _ = shim.Resume(kctx, &taskapi.ResumeRequest{ID: g.rec.ID})
		_ = g.t.change(taskRunning)
	}
	cancel()
	if err != nil && !errdefs.IsNotFound(err) {
		return false, err
	}
	var over <-chan time.Time
	if timeout >= 0 {
		timer := time.NewTimer(timeout)
		defer timer.Stop()
		over = timer.C
	}
	select {
	case <-g.t.exited:
		return true, nil
	case <-over:
		return false, nil
	case <-e.stopping:
		return false, errClosed
	}
}

// keepStopped notes that somebody wants a guest stopped, whatever its restart policy says, and gives it as it is then.
func (e *Engine) keepStopped(ctx context.Context, g *guest) (*guest, error) {
	if g.rec.Labels[labelRestartStatus] == "" {
		return g, nil
	}
	ctx = shared(ctx)
	done, err := e.holdRestart(ctx, g.key())
	if err != nil {
		return nil, err
	}
	defer done()
	labels := map[string]string{labelRestartStopped: "true"}
	rec, err := e.opt.ContainerRecords.Update(ctx, containers.Container{ID: g.rec.ID, Labels: labels}, "labels."+labelRestartStopped)
	if err != nil {
		return nil, err
	}
	return e.newGuest(g.namespace, rec), nil
}

func (e *Engine) stopGuest(ctx context.Context, g *guest, o StopOptions) error {
	g, err := e.keepStopped(ctx, g)
	if err != nil {
		return err
	}
	if !g.live() {
		return notModifiedf("container %s is already stopped", g.rec.ID)
	}
	sig, timeout, err := stopParameters(e.guestView(ctx, g), o)
	if err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	ended, err := e.endGuest(ctx, g, sig, false, timeout)
	if err != nil || ended {
		return err
	}
	return e.killGuest9(ctx, g)
}

func (e *Engine) killGuest9(ctx context.Context, g *guest) error {
	ended, err := e.endGuest(ctx, g, int(unix.SIGKILL), true, killLimit)
	if err == nil && !ended {
		return conflictf("container %s did not end within %v of SIGKILL", g.rec.ID, killLimit)
	}
	return err
}

func (e *Engine) killGuest(ctx context.Context, g *guest, sig int) error {
	if !g.live() {
		return conflictf("cannot kill container: %s: container %s is not running", g.rec.ID, g.rec.ID)
	}
	stop, _, _ := stopParameters(g.view(), StopOptions{})
	if sig == int(unix.SIGKILL) || sig == stop {
		var err error
		if g, err = e.keepStopped(ctx, g); err != nil {
			return err
		}
		if !g.live() {
			return conflictf("cannot kill container: %s: container %s is not running", g.rec.ID, g.rec.ID)
		}
	}
	ctx = context.WithoutCancel(ctx)
	if sig == int(unix.SIGKILL) {
		return e.killGuest9(ctx, g)
	}
	_, err := e.endGuest(ctx, g, sig, false, 0)
	return err
}

func (e *Engine) freezeGuest(ctx context.Context, g *guest, to Status) error {
	if to == StatusPaused {
		return e.PauseTask(shared(ctx), g.rec.ID)
	}
	return e.ResumeTask(shared(ctx), g.rec.ID)
}

// removeGuest removes task, record and, unless somebody else uses it, the snapshot.
func (e *Engine) removeGuest(ctx context.Context, g *guest, force bool) error {
	ctx = shared(context.WithoutCancel(ctx))
	done, err := e.holdRestart(ctx, g.key())
	if err != nil {
		return err
	}
	defer done()
	g = e.newGuest(g.namespace, g.rec) // it may have been started again since it was looked up
	if g.live() {
		if !force {
			return conflictf("cannot remove container %q: container is running: stop the container before removing or force remove", g.rec.ID)
		}
		if err := e.killGuest9(ctx, g); err != nil {
			return err
		}
	}
	if g.t != nil {
		if _, err := e.DeleteTask(ctx, g.rec.ID); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	err = e.opt.ContainerRecords.Delete(ctx, g.rec.ID)
	if errdefs.IsNotFound(err) { // its client was faster
		return nil
	} else if err != nil {
		return err
	}
	e.emitGuest(g.rec, "destroy")
	guests, err := e.guests(ctx)
	sn := e.opt.Snapshotters[g.rec.Snapshotter]
	if err != nil || sn == nil || g.rec.SnapshotKey == "" || slices.ContainsFunc(guests, func(o *guest) bool {
		return o.rec.Snapshotter == g.rec.Snapshotter && o.rec.SnapshotKey == g.rec.SnapshotKey
	}) {
		return err
	}
	if err := sn.Remove(ctx, g.rec.SnapshotKey); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
		return fmt.Errorf("remove the file system of container %s: %w", g.rec.ID, err)
	}
	return nil
}

// waitGuest is WaitContainer of a guest.
func (e *Engine) waitGuest(ctx context.Context, g *guest, cond WaitCondition) <-chan WaitResult {
	ch := make(chan WaitResult, 1)
	code := func() int {
		if g.t == nil {
			return 0
		}
		x, _ := g.t.ending()
		return int(x.Status)
	}
	if cond == WaitNotRunning && !g.live() {
		ch <- WaitResult{ExitCode: code()}
		return ch
	}
	e.work.Go(func() {
		ctx, stop := e.untilClosed(ctx)
		defer stop()
		if g.t != nil {
			select {
			case <-g.t.exited:
			case <-ctx.Done():
				return
			}
		}
		for g.t == nil || cond == WaitRemoved { // nobody tells of a removal, or of a task that may come
			_, err := e.opt.ContainerRecords.Get(shared(ctx), g.rec.ID)
			if errdefs.IsNotFound(err) {
				break
			}
			select {
			case <-time.After(restartFirst):
			case <-ctx.Done():
				return
			}
		}
		ch <- WaitResult{ExitCode: code()}
	})
	return ch
}

// guestProcess makes the OCI process of an exec in a guest: that of its configuration, with what the
// client changed.
func (e *Engine) guestProcess(x *execution, r *run) (*specs.Process, error) {
	p := specs.Process{}
	if g := x.c.guest.spec.Process; g != nil {
		p = *g
	}
	p.Args, p.Terminal, p.ConsoleSize, p.CommandLine = x.cfg.Cmd, x.cfg.TTY, nil, ""
	p.Env = mergeEnv(p.Env, x.cfg.Env)
	if x.cfg.WorkingDir != "" {
		p.Cwd = x.cfg.WorkingDir
	}
	p.Cwd = workingDir(p.Cwd)
	if p.Cwd[0] != '/' {
		return nil, invalidf("exec working directory %q is not an absolute path", p.Cwd)
	}
	if x.cfg.User != "" {
		acc, err := e.execAccount(x, r, x.cfg.User)
		if err != nil {
			return nil, err
		}
		p.User = specs.User{UID: acc.UID, GID: acc.GID, AdditionalGids: acc.Groups}
	}
	if x.cfg.Privileged {
		caps, err := capabilities(true, nil, nil)
		if err != nil {
			return nil, err
		}
		p.Capabilities = capabilitySets(e.host.availableCaps(caps), p.User.UID)
	}
	if x.cfg.TTY && x.cfg.ConsoleSize != [2]uint{} {
		p.ConsoleSize = &specs.Box{Height: x.cfg.ConsoleSize[0], Width: x.cfg.ConsoleSize[1]}
	}
	return &p, nil
}

// guests lists all of them.
func (e *Engine) guests(ctx context.Context) ([]*guest, error) {
	if e.opt.ContainerRecords == nil {
		return nil, nil
	}
	list, err := e.opt.ContainerRecords.List(shared(ctx))
	if err != nil {
		return nil, err
	}
	out := make([]*guest, len(list))
	for i, rec := range list {
		out[i] = e.newGuest(Namespace, rec)
	}
	return out, nil
}

// resourcesOf are the limits of an OCI configuration, as far as Docker has names for them.
func resourcesOf(r *specs.LinuxResources) (out Resources) {
	set := func(to *int64, from *int64) {
		if from != nil {
			*to = *from
		}
	}
	if m := r.Memory; m != nil {
		set(&out.Memory, m.Limit)
		set(&out.MemoryReservation, m.Reservation)
		set(&out.MemorySwap, m.Swap)
	}
	if c := r.CPU; c != nil {
		set(&out.CPUQuota, c.Quota)
		if c.Period != nil {
			out.CPUPeriod = int64(*c.Period)
		}
		if c.Shares != nil {
			out.CPUShares = int64(*c.Shares)
		}
		out.CpusetCPUs, out.CpusetMems = c.Cpus, c.Mems
	}
	if p := r.Pids; p != nil && p.Limit != nil && *p.Limit > 0 {
		out.PidsLimit = p.Limit
	}
	return out
}
