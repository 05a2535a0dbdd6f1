package engine

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/shim/client"
)

const (
	// connectLimit is how long a shim may take to answer at the start of the daemon, and how long all of them together
	// are waited for. One that is slower is taken up in the background, so that it holds nobody up.
	connectLimit = 3 * time.Second
	// lateLimit is how long a shim may take that is asked later than that.
	lateLimit = 300 * time.Millisecond
	// lendAfter is how long a shim that does not answer keeps another one from being asked.
	lendAfter = 50 * time.Millisecond
	// undoLimit is how long a start that nobody waits for any more may take to be undone.
	undoLimit = 10 * time.Second
	// restoreWidth is how many shims are connected side by side.
	restoreWidth = 32
	// policyWidth is how many containers are started side by side by their policy.
	policyWidth = 4
)

// patience is how the start of the daemon waits for shims: some that do not answer must delay it by connectLimit, and
// not each by that.
type patience struct {
	until time.Time
	slots chan struct{} // restoreWidth of them are taken up at a time, less those that are waited for
}

func newPatience() *patience {
	return &patience{until: time.Now().Add(connectLimit), slots: make(chan struct{}, restoreWidth)}
}

// each calls f for all of list, and returns when that is done.
func each[T any](p *patience, list []T, f func(T)) {
	var wg sync.WaitGroup
	for _, x := range list {
		p.slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-p.slots }()
			f(x)
		})
	}
	wg.Wait()
}

// left is how long a shim may take that is asked now.
func (p *patience) left() time.Duration { return max(time.Until(p.until), lateLimit) }

// wait calls f, which asks a shim. If the answer takes long, another one is asked meanwhile.
func (p *patience) wait(ctx context.Context, f func(context.Context)) {
	ctx, cancel := context.WithTimeout(ctx, p.left())
	defer cancel()
	lend := time.AfterFunc(lendAfter, func() { <-p.slots })
	f(ctx)
	if !lend.Stop() {
		p.slots <- struct{}{}
	}
}

// restore takes up the containers: what runs is connected, what ended meanwhile is
// handled, what a reboot ended is marked, what its policy wants is started. A record or
// a container that makes trouble is reported and never keeps the others.
func (e *Engine) restore(ctx context.Context) error {
	e.patience = newPatience()
	whole := e.loadContainers(ctx)
	wholePods := e.loadSandboxes(ctx)
	if e.volumes.whole {
		e.finishVolumeRemovals()
	}
	e.healVolumes()
	if whole {
		e.finishRemovals(ctx)
	}
	each(e.patience, e.containers.all(), func(c *container) { e.take(ctx, c) })
	if wholePods { // before their namespaces are taken for strays
		e.dropStraySandboxes()
	}
	e.dropStrayEndpoints(ctx)
	if whole { // with a damaged database nothing is deleted
		e.dropStrayMounts(ctx)
		e.dropStrayFolders(ctx)
		e.dropStraySnapshots(ctx)
	}
	e.awaitUndone(ctx)
	e.work.Go(e.applyPolicies)
	return nil
}

// loadContainers reads the records. It tells whether all could be read.
func (e *Engine) loadContainers(ctx context.Context) (whole bool) {
	err := e.opt.Containers.ForEach(func(id string, raw []byte) error {
		r, err := parseRecord(id, raw)
		if err != nil {
			return err
		}
		for attempt := 1; e.containers.reserve(r.Name, id) != nil; attempt++ {
			e.log.Error("two containers have one name, the second is renamed", "container", id, "name", r.Name)
			r.Name = fmt.Sprintf("%s_%s", r.Name, id[:6*min(attempt, 10)])
		}
		c := newContainer(r)
		e.containers.add(c)
		if p := r.Config.Pod; p != nil {
			e.pods.join(p.Sandbox, c)
		}
		return nil
	})
	if err != nil {
		e.log.Error("some containers could not be read and are not shown", "error", err)
	}
	return err == nil
}

// parseRecord reads a container's record.
func parseRecord(id string, raw []byte) (r record, err error) {
	if err := json.Unmarshal(raw, &r); err != nil {
		return r, fmt.Errorf("container %s: %w", id, err)
	}
	if r.Version > recordVersion {
		return r, fmt.Errorf("container %s: record of version %d, this daemon knows %d: %w", id, r.Version, recordVersion, errdefs.ErrFailedPrecondition)
	}
	if r.ID != id || len(id) != 64 || !validName.MatchString(r.Name) {
		return r, fmt.Errorf("container %s: damaged record: %w", id, errdefs.ErrDataLoss)
	}
	if _, known := transitions[r.State.Status]; !known {
		return r, fmt.Errorf("container %s: unknown state %q: %w", id, r.State.Status, errdefs.ErrDataLoss)
	}
	return r, nil
}

// finishRemovals ends creations and removals that were cut short between the record and the
// snapshot, and makes folders anew that a power cut took.
func (e *Engine) finishRemovals(ctx context.Context) {
	for _, c := range e.containers.all() {
		v := c.view()
		sn := e.opt.Snapshotters[v.Snapshotter]
		if sn == nil {
			continue
		}
		_, err := sn.Stat(ctx, v.SnapshotKey)
		if _, berr := os.Lstat(filepath.Join(e.bundle(v.ID), "config.json")); errdefs.IsNotFound(err) && errors.Is(berr, fs.ErrNotExist) {
			e.log.Warn("a container without a file system is removed: its creation or removal was cut short", "container", v.ID, "name", v.Name)
			if err := e.opt.Containers.Delete(ctx, v.ID); err != nil {
				e.log.Error("remove container", "container", v.ID, "error", err)
				continue
			}
			e.containers.remove(c, v.Name)
			if p := v.Config.Pod; p != nil {
				e.pods.leave(p.Sandbox, c)
			}
			continue
		}
		if err := os.Mkdir(e.dir(v.ID), 0o710); err == nil {
			e.log.Warn("made a container's lost folder anew", "container", v.ID)
		} else if !errors.Is(err, fs.ErrExist) {
			e.log.Error("make a container's folder", "container", v.ID, "error", err)
		}
	}
}

// take finds out what a container does and takes it up.
func (e *Engine) take(ctx context.Context, c *container) {
	v := c.view()
	bundle := e.bundle(c.id)
	if _, err := os.Stat(bundle); err != nil {
		e.takeDead(ctx, c, !errors.Is(err, fs.ErrNotExist))
		return
	}
	rf, rerr := readRunFile(bundle)
	var shim Shim
	var err error
	e.patience.wait(ctx, func(ctx context.Context) { shim, err = e.connect(ctx, v) })
	switch {
	case errdefs.IsNotFound(err):
		recorded := !v.State.live() && v.State.StartedAt.Equal(rf.StartedAt)
		if rerr != nil && !v.State.live() || recorded {
			// It never ran, or its end is in the record already, and the daemon died while it
			// removed the bundle: the exit file may be gone.
			e.reap(v)
			e.emptyBundle(v)
			e.takeDead(ctx, c, true)
			return
		}
		e.adopt(c, newRun(absentShim{}, bundle, 0, startTime(rf, v)), rf)
		exit := e.reap(v)
		e.finish(c, exit)
		return
	case err != nil:
		// It exists and does not answer. It is shown as running, which is the last thing
		// known, and tried again until it answers or is gone.
		e.log.Warn("a shim does not answer, it is tried again in the background", "container", c.id, "error", err)
		e.adopt(c, newRun(absentShim{}, bundle, rf.Pid, startTime(rf, v)), rf)
		e.watchAdopted(c)
		return
	}
	var st client.State
	e.patience.wait(ctx, func(ctx context.Context) { st, err = shim.State(ctx, c.id, "") })
	switch {
	case errdefs.IsNotFound(err) && rerr == nil:
		// It ran, ended and was deleted: the daemon died before it wrote that down.
		if derr := e.endShim(ctx, v, shim); derr != nil {
			e.log.Error("end the shim of an ended container", "container", c.id, "error", derr)
		}
		e.adopt(c, newRun(absentShim{}, bundle, 0, startTime(rf, v)), rf)
		e.finish(c, e.reap(v))
	case errdefs.IsNotFound(err) || err == nil && st.Status == client.StatusCreated:
		// The daemon died in the middle of a start: nobody got an answer, so it is undone.
		if derr := errors.Join(removeRunFile(bundle), e.endShim(ctx, v, shim)); derr != nil {
			e.log.Error("undo an unfinished start", "container", c.id, "error", derr)
		}
		e.emptyBundle(v)
		e.takeDead(ctx, c, true)
	case err != nil:
		e.log.Warn("a shim does not answer, it is tried again in the background", "container", c.id, "error", err)
		shim.Close()
		e.adopt(c, newRun(absentShim{}, bundle, rf.Pid, startTime(rf, v)), rf)
		e.watchAdopted(c)
	case st.Status == client.StatusStopped:
		e.adopt(c, newRun(shim, bundle, 0, startTime(rf, v)), rf)
		e.finish(c, st.Exit)
	default:
		e.adopt(c, newRun(shim, bundle, st.Pid, startTime(rf, v)), rf)
		if st.Status == client.StatusPaused {
			_ = c.change(StatusPaused, nil)
		}
		e.watchAdopted(c)
	}
}

// endShim ends a shim that holds no container that was started, and waits for its end:
// what the dead daemon asked of it may still be on its way, and makes a container yet.
func (e *Engine) endShim(ctx context.Context, v Container, shim Shim) error {
	defer shim.Close()
	ctx, cancel := context.WithTimeout(ctx, undoLimit)
	defer cancel()
	for {
		if _, err := shim.State(ctx, v.ID, ""); err == nil {
			_ = shim.Kill(ctx, v.ID, "", int(unix.SIGKILL), true) // it may have no process any more
			if _, err := shim.Delete(ctx, v.ID, ""); err != nil && !errdefs.IsNotFound(err) {
				e.log.Debug("delete task of an unfinished start", "container", v.ID, "error", err)
			}
		}
		if err := shim.Shutdown(ctx); err != nil {
			break // it does not listen: clean up from outside
		}
		if v.Config.Pod != nil {
			if _, err := shim.State(ctx, v.ID, ""); errdefs.IsNotFound(err) {
				return nil // the shim stays for the others
			}
		}
		select {
		case <-shim.Gone():
			return nil
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
			continue // it got a container meanwhile
		}
		break
	}
	_, err := e.opt.Shims.Reap(context.WithoutCancel(ctx), e.shimOptions(v))
	return err
}

// emptyBundle removes what a start left, but not the mark of a container that removes
// itself and never ran.
func (e *Engine) emptyBundle(v Container) {
	err := RemoveBundle(e.bundle(v.ID))
	if err == nil && v.Config.AutoRemove && v.State.Status == StatusCreated {
		err = os.Mkdir(e.bundle(v.ID), 0o710)
	}
	if err != nil {
		e.log.Error("remove bundle", "container", v.ID, "error", err)
	}
}

func startTime(rf runFile, v Container) time.Time {
	if !rf.StartedAt.IsZero() {
		return rf.StartedAt
	}
	return cmp.Or(v.State.StartedAt, v.Created)
}

// adopt makes a run of an earlier daemon the container's.
func (e *Engine) adopt(c *container, r *run, rf runFile) {
	e.keepVolumes(c.view())
	if pid := int(r.pid.Load()); pid != 0 {
		r.memory = memoryCgroup(c.view(), pid)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	// Whatever the record says, this is what the kernel says.
	c.rec.State = State{Status: StatusRunning, Pid: int(r.pid.Load()), StartedAt: r.started, FinishedAt: c.rec.State.FinishedAt}
	c.run = r
	c.rec.Started = true
	if rf.Endpoints != nil {
		c.rec.Endpoints = rf.Endpoints
	}
	c.rec.SandboxKey = rf.SandboxKey
}

func (e *Engine) watchAdopted(c *container) {
	c.mu.Lock()
	r := c.run
	c.mu.Unlock()
	if r == nil {
		return
	}
	e.startHealth(c, r)
	e.work.Go(func() { e.watch(c, r) })
}

// finish handles an exit that happened while there was no daemon.
func (e *Engine) finish(c *container, exit client.Exit) {
	c.mu.Lock()
	r := c.run
	c.mu.Unlock()
	close(r.exited)
	if err := c.acquire(e.ctx); err != nil {
		return
	}
	defer c.release()
	e.exited(c, r, exit)
}

// takeDead settles a container that has no process and no shim. bundle tells that the
// volatile folder is still there: the machine was not rebooted since.
func (e *Engine) takeDead(ctx context.Context, c *container, bundle bool) {
	v := c.view()
	switch s := v.State.Status; s {
	case StatusRunning, StatusPaused, StatusRestarting:
		c.mu.Lock()
		c.rec.State = State{Status: StatusExited, ExitCode: exitUnknown, Lost: true, StartedAt: v.State.StartedAt, FinishedAt: time.Now().UTC()}
		if s == StatusRestarting { // its last exit is known
			c.rec.State.ExitCode, c.rec.State.FinishedAt, c.rec.State.Lost = v.State.ExitCode, v.State.FinishedAt, false
		}
		c.rec.SandboxKey = ""
		c.rec.Endpoints = nil
		c.mu.Unlock()
		idle := e.idleEndpoints(ctx, c.networks())
		c.mu.Lock()
		c.rec.Endpoints = idle
		c.mu.Unlock()
		e.saveLater(c)
	case StatusRemoving:
		c.mu.Lock()
		c.rec.State.Status = StatusExited
		c.mu.Unlock()
	}
	if v.SandboxKey != "" {
		if err := e.opt.Networks.DeleteNetns(ctx, v.SandboxKey); err != nil && !errdefs.IsNotFound(err) {
			e.log.Warn("delete network namespace", "container", c.id, "error", err)
		}
	}
	if e.withoutFiles(ctx, v) {
		// Creation and removal write the record and the snapshot side by side. Half of either
		// is what nobody got an answer for: it is taken back, or finished.
		e.log.Info("a creation or removal that was cut short is cleaned up", "container", c.id)
		if err := c.acquire(ctx); err != nil {
			return
		}
		defer c.release()
		c.mu.Lock()
		c.removing = true
		volumes := v.Config.AutoRemove || !c.rec.Started // nobody else can know of them
		c.mu.Unlock()
		if err := e.removeHeld(ctx, c, volumes); err != nil {
			e.log.Error("clean up after a creation or removal that was cut short", "container", c.id, "error", err)
		}
		return
	}
	if v.Config.AutoRemove && (!bundle || v.State.Status != StatusCreated) || v.State.Status == StatusRemoving {
		e.work.Go(func() {
			if err := c.acquire(e.ctx); err != nil {
				return
			}
			defer c.release()
			e.removeExited(c)
		})
	}
}

// withoutFiles tells that a container has no writable layer.
func (e *Engine) withoutFiles(ctx context.Context, v Container) bool {
	sn := e.opt.Snapshotters[v.Snapshotter]
	if sn == nil {
		return false
	}
	_, err := sn.Stat(ctx, v.SnapshotKey)
	return errdefs.IsNotFound(err)
}

// networks are those that the container shall be on.
func (c *container) networks() []EndpointSettings {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rec.Networks
}

// dropStrayEndpoints releases the endpoints and namespaces of containers that do not run: after a
// reboot, and when the daemon died between two steps.
func (e *Engine) dropStrayEndpoints(ctx context.Context) {
	live, kept := map[string]bool{}, map[string]bool{}
	for id := range e.pods.undone() {
		live[id] = true // the removal sees to it
	}
	for _, s := range e.pods.all() {
		s.mu.Lock()
		live[s.id] = s.state == SandboxReady
		// The namespace goes with the stop: CNI plugins look in there for what they undo.
		kept[s.id] = !s.released
		s.mu.Unlock()
	}
	for _, c := range e.containers.all() {
		c.mu.Lock()
		live[c.id] = c.run != nil
		c.mu.Unlock()
	}
	nets, err := e.opt.Networks.List(ctx)
	if err != nil {
		e.log.Error("list networks", "error", err)
		return
	}
	for _, n := range nets {
		eps, err := e.opt.Networks.Endpoints(ctx, n.ID)
		if err != nil {
			e.log.Error("list endpoints", "network", n.Name, "error", err)
			continue
		}
		for _, ep := range eps {
			if live[ep.ID] {
				continue
			}
			if err := e.opt.Networks.Disconnect(ctx, n.ID, ep.ID); err != nil {
				e.log.Error("release endpoint", "network", n.Name, "endpoint", ep.ID, "error", err)
			}
		}
	}
	paths, err := e.opt.Networks.Netns(ctx)
	if err != nil {
		e.log.Error("list network namespaces", "error", err)
	}
	for _, p := range paths {
		if id := filepath.Base(p); live[id] || kept[id] {
			continue
		}
		if err := e.opt.Networks.DeleteNetns(ctx, p); err != nil && !errdefs.IsNotFound(err) {
			e.log.Error("delete network namespace", "path", p, "error", err)
		}
	}
}

// dropStrayFolders removes what creations and removals that were cut short left on disk.
func (e *Engine) dropStrayFolders(ctx context.Context) {
	known := func(id string) bool { _, err := e.containers.get(id); return err == nil }
	for _, id := range folders(filepath.Join(e.opt.State, "containers")) {
		if known(id) || len(id) != 64 {
			continue
		}
		e.reap(Container{ID: id})
		if err := RemoveBundle(e.bundle(id)); err != nil {
			e.log.Error("remove stray bundle", "container", id, "error", err)
		}
	}
	for _, id := range folders(filepath.Join(e.opt.Root, "containers")) {
		if known(id) || len(id) != 64 {
			continue
		}
		if err := os.RemoveAll(e.dir(id)); err != nil {
			e.log.Error("remove stray folder", "container", id, "error", err)
		}
	}
}

// dropStraySnapshots removes the file systems of containers whose creation was cut short before
// the record was written. Those that others made have no owner's label.
func (e *Engine) dropStraySnapshots(ctx context.Context) {
	for name, sn := range e.opt.Snapshotters {
		var stray []string
		err := sn.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
			if owner := i.Labels[ownerLabel]; owner != "" {
				if _, err := e.containers.get(owner); errdefs.IsNotFound(err) {
					stray = append(stray, i.Name)
				}
			}
			return nil
		})
		if err != nil {
			e.log.Error("look for stray snapshots", "snapshotter", name, "error", err)
		}
		for _, key := range stray {
			e.log.Info("a creation that was cut short is cleaned up", "snapshot", key)
			if err := sn.Remove(ctx, key); err != nil && !errdefs.IsNotFound(err) {
				e.log.Error("remove a stray snapshot", "snapshot", key, "error", err)
			}
		}
	}
}

func folders(dir string) []string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	var out []string
	for _, d := range entries {
		if d.IsDir() {
			out = append(out, d.Name())
		}
	}
	return out
}

// applyPolicies starts what shall run: in the order of creation, those that join
// another container after the others.
func (e *Engine) applyPolicies() {
	var first, joined []*container
	list := e.containers.all()
	slices.SortFunc(list, func(a, b *container) int { return a.view().Created.Compare(b.view().Created) })
	for _, c := range list {
		c.mu.Lock()
		want := c.run == nil && !c.removing && c.rec.Started && c.rec.State.Status == StatusExited &&
			c.rec.Config.Restart.afterBoot(c.rec.State.ExitCode, c.rec.RestartCount, c.rec.StoppedByUser)
		cfg := c.rec.Config
		c.mu.Unlock()
		switch {
		case !want:
		case strings.HasPrefix(cfg.NetworkMode+cfg.IpcMode+cfg.PidMode, "container:"), strings.Contains(cfg.IpcMode+cfg.PidMode, "container:"):
			joined = append(joined, c)
		default:
			first = append(first, c)
		}
	}
	for _, group := range [][]*container{first, joined} {
		var wg sync.WaitGroup
		slots := make(chan struct{}, policyWidth)
		for _, c := range group {
			if e.ctx.Err() != nil {
				return
			}
			slots <- struct{}{}
			wg.Go(func() {
				defer func() { <-slots }()
				if err := c.acquire(e.ctx); err != nil {
					return
				}
				defer c.release()
				if c.require("start") != nil {
					return // a client was faster
				}
				if err := e.startHeld(e.ctx, c); err != nil {
					e.log.Error("start container by its restart policy", "container", c.id, "error", err)
				}
			})
		}
		wg.Wait()
	}
}

// afterBoot tells whether a policy wants a stopped container started with the daemon.
// `always` means that, even for one that a user stopped.
func (p RestartPolicy) afterBoot(code, restarts int, stoppedByUser bool) bool {
	if p.Name == "always" {
		return true
	}
	return p.again(code, restarts, stoppedByUser)
}

// absentShim stands for a shim that does not answer. Every call fails.
type absentShim struct{}

var errAbsent = fmt.Errorf("the container's shim does not answer: %w", errdefs.ErrUnavailable)

func (absentShim) Wait(context.Context, string, string) (client.Exit, error) {
	return client.Exit{}, errAbsent
}

func (absentShim) Create(context.Context, client.CreateOptions) (int, error) { return 0, errAbsent }
func (absentShim) Start(context.Context, string, string) (int, error)        { return 0, errAbsent }
func (absentShim) CloseStdin(context.Context, string, string) error          { return errAbsent }
func (absentShim) ReopenLog(context.Context, string, string) error           { return errAbsent }
func (absentShim) Gone() <-chan struct{}                                     { return nil }

func (absentShim) State(context.Context, string, string) (client.State, error) {
	return client.State{}, errAbsent
}

func (absentShim) Update(context.Context, string, *specs.LinuxResources) error { return errAbsent }

func (absentShim) Checkpoint(context.Context, string, client.CheckpointOptions) error {
	return errAbsent
}

func (absentShim) Kill(context.Context, string, string, int, bool) error { return errAbsent }
func (absentShim) Exec(context.Context, client.ExecOptions) error        { return errAbsent }
func (absentShim) Pause(context.Context, string) error                   { return errAbsent }
func (absentShim) Resume(context.Context, string) error                  { return errAbsent }
func (absentShim) Pids(context.Context, string) ([]int, error)           { return nil, errAbsent }
func (absentShim) Shutdown(context.Context) error                        { return errAbsent }
func (absentShim) Close() error                                          { return nil }

func (absentShim) Delete(context.Context, string, string) (client.Exit, error) {
	return client.Exit{}, errAbsent
}

func (absentShim) Resize(context.Context, string, string, uint32, uint32) error { return errAbsent }

func (absentShim) Attach(context.Context, client.AttachOptions) (client.Stream, error) {
	return nil, errAbsent
}
