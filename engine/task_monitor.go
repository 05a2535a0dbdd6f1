package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Labels by which a client of containerd's API says what shall become of a container when its
// task ends (containerd's package core/runtime/restart). Without the first one: nothing.
const (
	labelRestartStatus  = "containerd.io/restart.status"             // running or stopped: what it shall be
	labelRestartPolicy  = "containerd.io/restart.policy"             // no, always, unless-stopped, on-failure[:MAX]
	labelRestartCount   = "containerd.io/restart.count"              // written here
	labelRestartStopped = "containerd.io/restart.explicitly-stopped" // true: somebody wanted it so
	labelRestartLog     = "containerd.io/restart.loguri"             // what takes the output of the next task
)

// RestartPolicies are the policies that those labels may ask for.
func RestartPolicies() []string { return []string{"no", "always", "on-failure", "unless-stopped"} }

// defaultRestartInterval is how often it is looked for tasks that have ended, as containerd does it.
const defaultRestartInterval = 10 * time.Second

// wish is what labels say.
type wish struct {
	status, policy string
	max, count     int // of restarts; max 0: any number
	stopped        bool
}

func wishOf(labels map[string]string) (w wish, err error) {
	w.status = labels[labelRestartStatus]
	w.stopped, _ = strconv.ParseBool(labels[labelRestartStopped])
	name, most, limited := strings.Cut(labels[labelRestartPolicy], ":")
	switch w.policy = name; {
	case name == "":
		w.policy = "always"
	case name == "no" || name == "always" || name == "unless-stopped" || name == "on-failure":
	default:
		return w, invalidf("label %s: unknown policy %q", labelRestartPolicy, name)
	}
	if limited {
		if w.max, err = strconv.Atoi(most); err != nil || w.max < 0 || w.policy != "on-failure" {
			return w, invalidf("label %s: %q", labelRestartPolicy, labels[labelRestartPolicy])
		}
	}
	if text := labels[labelRestartCount]; text != "" {
		if w.count, err = strconv.Atoi(text); err != nil {
			return w, invalidf("label %s: %q", labelRestartCount, text)
		}
	}
	return w, nil
}

// move is what has to be done so that a task is as it shall be.
type move int

const (
	moveNone move = iota
	moveStart
	moveStop
)

// move decides by the state of the task: there or not, over or not, and how it ended.
func (w wish) move(there, over bool, status uint32) move {
	switch w.status {
	case string(TaskStatusStopped):
		if there && !over {
			return moveStop
		}
	case string(TaskStatusRunning):
		switch {
		case there && !over, w.stopped, w.policy == "no":
		case w.policy == "on-failure":
			// How an earlier task ended that is no more, nobody knows.
			if (!there || status != 0) && (w.max == 0 || w.count < w.max) {
				return moveStart
			}
		default:
			return moveStart
		}
	}
	return moveNone
}

// monitorTasks starts tasks anew, and ends them, as their containers' labels say, until ctx ends.
func (e *Engine) monitorTasks(ctx context.Context) {
	every := e.opt.RestartInterval
	if every <= 0 {
		every = defaultRestartInterval
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		list, err := e.opt.ContainerNamespaces(ctx)
		if err != nil {
			e.log.Error("list namespaces for restarts", "error", err)
			continue
		}
		var g errgroup.Group
		g.SetLimit(8)
		for _, ns := range list {
			ctx := namespaces.WithNamespace(ctx, ns)
			recs, err := e.opt.ContainerRecords.List(ctx, `labels."`+labelRestartStatus+`"`)
			if err != nil {
				e.log.Error("list containers for restarts", "namespace", ns, "error", err)
				continue
			}
			for _, rec := range recs {
				if time.Since(rec.CreatedAt) < every && e.tasks.get(taskKey{ns, rec.ID}) == nil {
					continue // its client is about to make the first one
				}
				g.Go(func() error {
					if err := e.fulfil(ctx, rec); err != nil && !errdefs.IsNotFound(err) {
						e.log.Warn("restart", "container", rec.ID, "namespace", ns, "error", err)
					}
					return nil
				})
			}
		}
		_ = g.Wait()
	}
}

// fulfil makes the task of a container be as its labels want it.
func (e *Engine) fulfil(ctx context.Context, rec containers.Container) error {
	ctx, cancel := context.WithTimeout(ctx, cleanupLimit)
	defer cancel()
	if m, _, _, err := e.due(ctx, rec); err != nil || m == moveNone {
		return err
	}
	done, err := e.holdRestart(ctx, taskKey{namespaceOf(ctx), rec.ID})
	if err != nil {
		return err
	}
	defer done()
	// Somebody may have stopped or removed it since the list was made.
	if rec, err = e.opt.ContainerRecords.Get(ctx, rec.ID); err != nil {
		return err
	}
	m, w, there, err := e.due(ctx, rec)
	if err != nil {
		return err
	}
	switch m {
	case moveStop:
		if err := e.KillTask(ctx, rec.ID, "", uint32(unix.SIGKILL), true); err != nil {
			return err
		}
		if _, err := e.WaitTask(ctx, rec.ID, ""); err != nil {
			return err
		}
		_, err := e.DeleteTask(ctx, rec.ID)
		return err
	case moveStart:
		return e.restartTask(ctx, rec, w, there)
	}
	return nil
}

// due is what has to be done with the task of a container, what its labels say, and whether there is one.
func (e *Engine) due(ctx context.Context, rec containers.Container) (m move, w wish, there bool, err error) {
	if w, err = wishOf(rec.Labels); err != nil {
		return m, w, false, err
	}
	p, err := e.Task(ctx, rec.ID, "")
	if err != nil && !errdefs.IsNotFound(err) {
		return m, w, false, err
	}
	there = err == nil
	return w.move(there, p.Status == TaskStatusStopped, p.Exit.Status), w, there, nil
}

// holdRestart makes the caller the only one that decides whether a container has a task: the monitor, or somebody who
// stops or removes it.
func (e *Engine) holdRestart(ctx context.Context, k taskKey) (done func(), err error) {
	done, err = e.tasks.turns.Lock(ctx, "restart/"+k.namespace+"/"+k.id)
	if err != nil {
		return nil, fmt.Errorf("restarts of container %s: another operation is under way: %w", k.id, err)
	}
	return done, nil
}

func (e *Engine) restartTask(ctx context.Context, rec containers.Container, w wish, there bool) error {
	if there {
		if _, err := e.DeleteTask(ctx, rec.ID); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	c, err := e.againConfig(ctx, rec)
	if err != nil {
		return err
	}
	labels := map[string]string{labelRestartCount: strconv.Itoa(w.count + 1)}
	if _, err := e.opt.ContainerRecords.Update(ctx, containers.Container{ID: rec.ID, Labels: labels}, "labels."+labelRestartCount); err != nil {
		return err
	}
	if _, err := e.CreateTask(ctx, rec.ID, c); err != nil {
		return err
	}
	if _, err := e.StartTask(ctx, rec.ID, ""); err != nil {
		_, derr := e.DeleteTask(ctx, rec.ID)
		return errors.Join(err, derr)
	}
	e.log.Info("restarted", "container", rec.ID, "namespace", namespaceOf(ctx), "policy", w.policy, "restarts", w.count+1)
	return nil
}

// againConfig is how another task of a container is made without its client.
func (e *Engine) againConfig(ctx context.Context, rec containers.Container) (c TaskConfig, err error) {
	var spec struct {
		Process struct {
			Terminal bool `json:"terminal"`
		} `json:"process"`
	}
	if rec.Spec != nil {
		if err := json.Unmarshal(rec.Spec.GetValue(), &spec); err != nil {
			return c, invalidf("the OCI configuration is no JSON: %v", err)
		}
	}
	c.Terminal = spec.Process.Terminal
	c.Stdout = rec.Labels[labelRestartLog]
	if !c.Terminal {
		c.Stderr = c.Stdout
	}
	if rec.SnapshotKey == "" {
		return c, nil
	}
	sn := e.opt.Snapshotters[rec.Snapshotter]
	if sn == nil {
		return c, notFoundf("snapshotter %q of container %s: not found", rec.Snapshotter, rec.ID)
	}
	if c.Rootfs, err = sn.Mounts(ctx, rec.SnapshotKey); err != nil {
		return c, fmt.Errorf("root of container %s: %w", rec.ID, err)
	}
	return c, nil
}

func namespaceOf(ctx context.Context) string {
	ns, _ := namespaces.Namespace(ctx)
	return ns
}
