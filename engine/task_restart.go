package engine

import (
	"context"
	"maps"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Labels by which clients of containerd's API ask for containers to be kept running.
const (
	restartStatus  = "containerd.io/restart.status"             // running or stopped: what it shall be
	restartPolicy  = "containerd.io/restart.policy"             // no, always (the default), on-failure[:N], unless-stopped
	restartCount   = "containerd.io/restart.count"              // restarts until now
	restartStopped = "containerd.io/restart.explicitly-stopped" // true: a user stopped it
	restartLog     = "containerd.io/restart.loguri"             // where its output goes from then on
)

// restartPoll is how often containers are looked at, whatever happens, as containerd does.
const restartPoll = 10 * time.Second

// restartTasks keeps containers running until the engine closes. It looks whenever a task ends, and now
// and then: labels may have changed.
func (e *Engine) restartTasks() {
	t := time.NewTicker(restartPoll)
	defer t.Stop()
	for {
		e.restartDue()
		select {
		case <-t.C:
		case <-e.taskEnded:
			select { // its client may be about to delete it, or to say that it stopped it
			case <-time.After(restartFirst):
			case <-e.ctx.Done():
				return
			}
		case <-e.ctx.Done():
			return
		}
	}
}

// noteEnd has the containers looked at soon.
func (e *Engine) noteEnd() {
	select {
	case e.taskEnded <- struct{}{}:
	default:
	}
}

// restartDue brings all containers to where their labels want them.
func (e *Engine) restartDue() {
	list, err := e.opt.Namespaces.List(e.ctx)
	if err != nil {
		return
	}
	for _, ns := range list {
		ctx := namespaces.WithNamespace(e.ctx, ns)
		recs, err := e.opt.ContainerRecords.List(ctx, `labels."`+restartStatus+`"`)
		if err != nil {
			e.log.Error("look for containers to restart", "namespace", ns, "error", err)
			continue
		}
		for _, rec := range recs {
			if e.ctx.Err() != nil {
				return
			}
			k := taskKey{ns, rec.ID}
			if !e.restarts.begin(k) {
				continue // a shim that does not answer holds up nobody else
			}
			e.work.Go(func() {
				defer e.restarts.end(k)
				if err := e.reconcile(ctx, k, rec); err != nil && e.ctx.Err() == nil {
					e.log.Error("restart a container by its labels", "container", rec.ID, "namespace", ns, "error", err)
				}
			})
		}
	}
}

// restarts are what is being restarted, and when that was done last.
type restarts struct {
	mu   sync.Mutex
	busy map[taskKey]bool
	last map[taskKey]time.Time
}

func (r *restarts) begin(k taskKey) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.busy[k] {
		return false
	}
	if r.busy == nil {
		r.busy, r.last = map[taskKey]bool{}, map[taskKey]time.Time{}
	}
	r.busy[k] = true
	return true
}

func (r *restarts) end(k taskKey) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.busy, k)
}

// due tells whether a restart may be tried again, and takes it for tried.
func (r *restarts) due(k taskKey, pause time.Duration) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	maps.DeleteFunc(r.last, func(_ taskKey, t time.Time) bool { return time.Since(t) > restartMost })
	if time.Since(r.last[k]) < pause {
		return false
	}
	r.last[k] = time.Now()
	return true
}

func (e *Engine) reconcile(ctx context.Context, k taskKey, rec containers.Container) error {
	t := e.tasks.get(k)
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	switch rec.Labels[restartStatus] {
	case "stopped":
		if t == nil || t.status() == taskStopped {
			return nil
		}
		if err := e.KillTask(ctx, rec.ID, "", uint32(unix.SIGKILL), true); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		if _, err := e.WaitTask(ctx, rec.ID, ""); err != nil {
			return err
		}
		_, err := e.DeleteTask(ctx, rec.ID)
		return err
	case "running":
		if t != nil && t.status() != taskStopped || !wantsRestart(rec.Labels, t) || !e.restarts.due(k, restartPause(rec.Labels)) {
			return nil
		}
		return e.restartTask(ctx, rec, t)
	}
	return nil
}

// restartPause keeps a container that ends at once from being restarted all the time.
func restartPause(labels map[string]string) time.Duration {
	n, _ := strconv.Atoi(labels[restartCount])
	return min(restartFirst<<min(n, 10), restartPoll)
}

// wantsRestart is what the policy of a container says that does not run.
func wantsRestart(labels map[string]string, t *task) bool {
	if stopped, _ := strconv.ParseBool(labels[restartStopped]); stopped {
		return false
	}
	name, most, _ := strings.Cut(labels[restartPolicy], ":")
	switch name {
	case "", "always", "unless-stopped":
		return true
	case "on-failure":
		if t != nil {
			if x, known := t.ending(); known && x.Status == 0 {
				return false
			}
		}
		limit, _ := strconv.Atoi(most)
		count, _ := strconv.Atoi(labels[restartCount])
		return limit == 0 || count < limit
	}
	return false
}

// restartTask makes the task of a container anew, with the output where its label says.
func (e *Engine) restartTask(ctx context.Context, rec containers.Container, t *task) error {
	count, _ := strconv.Atoi(rec.Labels[restartCount])
	upd := rec
	upd.Labels = maps.Clone(rec.Labels)
	upd.Labels[restartCount] = strconv.Itoa(count + 1)
	if _, err := e.opt.ContainerRecords.Update(ctx, upd, "labels."+restartCount); err != nil {
		return err
	}
	c := TaskConfig{Stdout: rec.Labels[restartLog], Stderr: rec.Labels[restartLog]}
	if t != nil {
		c.Terminal = t.meta.Terminal && c.Stdout == ""
		if _, err := e.DeleteTask(ctx, rec.ID); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	if rec.SnapshotKey != "" {
		sn := e.opt.Snapshotters[rec.Snapshotter]
		if sn == nil {
			return notFoundf("snapshotter %q is not there any more", rec.Snapshotter)
		}
		var mounts []mount.Mount
		mounts, err := sn.Mounts(ctx, rec.SnapshotKey)
		if err != nil {
			return err
		}
		c.Rootfs = mounts
	}
	if _, err := e.CreateTask(ctx, rec.ID, c); err != nil {
		return err
	}
	_, err := e.StartTask(ctx, rec.ID, "")
	return err
}
