package engine

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/shim/client"
)

const (
	restartFirst = 100 * time.Millisecond // wait before the first restart; doubled each time
	restartMost  = time.Minute
	// reconnectMost is the longest wait before a shim that does not answer is tried again.
	reconnectMost = 5 * time.Second
	restartReset  = 10 * time.Second // a run this long starts the count anew
	// cleanupLimit bounds what follows an exit: a stuck room must not keep the
	// container from being seen as exited.
	cleanupLimit = 30 * time.Second
	// exitUnknown is the code of a container whose end nobody saw: Docker's.
	exitUnknown = 255
)

// watch waits for the end of a run and handles it. It ends silently with the engine.
func (e *Engine) watch(c *container, r *run) {
	exit, err := e.waitExit(c, r)
	if err != nil {
		return // the daemon stops; the container runs on
	}
	close(r.exited)
	if err := c.acquire(e.ctx); err != nil {
		return
	}
	defer c.release()
	e.exited(c, r, exit)
}

// waitExit waits for the exit, whatever happens to the connection to the shim. A shim
// that hangs is waited for; only one that is gone is cleaned up after.
//
// Every container that runs has a goroutine here, so that what takes a large stack is a function of its own.
func (e *Engine) waitExit(c *container, r *run) (client.Exit, error) {
	pause := restartFirst
	for {
		exit, err := r.shim.get().Wait(e.ctx, c.id, "")
		if err == nil {
			return exit, nil
		}
		if e.ctx.Err() != nil {
			return exit, err
		}
		if gone := e.reconnect(c, r); e.ctx.Err() != nil {
			return exit, e.ctx.Err()
		} else if gone {
			e.log.Warn("the shim is gone", "container", c.id, "error", err)
			return e.reapContainer(c), nil
		}
		if err := e.rest(pause); err != nil { // no spinning, whether it broke again or does not answer
			return exit, err
		}
		pause = min(pause*2, reconnectMost)
	}
}

// rest waits, or fails with the end of the engine.
func (e *Engine) rest(d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-e.ctx.Done():
		return e.ctx.Err()
	}
}

// reconnect makes the connection to the shim of a run anew, and tells whether there is no shim any more.
//
//go:noinline
func (e *Engine) reconnect(c *container, r *run) (gone bool) {
	ctx, cancel := context.WithTimeout(e.ctx, cleanupLimit)
	defer cancel()
	next, err := e.connect(ctx, c.view())
	if err != nil {
		return errdefs.IsNotFound(err)
	}
	st, err := next.State(ctx, c.id, "")
	if err != nil {
		next.Close()
		return errdefs.IsNotFound(err)
	}
	old := r.shim.get()
	r.shim.set(next)
	old.Close()
	if st.Status == client.StatusCreated {
		// A daemon that died was about to start it; nobody will.
		_ = next.Kill(e.ctx, c.id, "", int(unix.SIGKILL), true)
	}
	if st.Pid != 0 {
		r.pid.Store(int64(st.Pid))
		c.mu.Lock()
		c.rec.State.Pid = st.Pid
		c.mu.Unlock()
	}
	return false
}

//go:noinline
func (e *Engine) reapContainer(c *container) client.Exit { return e.reap(c.view()) }

// reap ends what a dead shim left and gives the exit as far as it is known.
func (e *Engine) reap(v Container) client.Exit {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(e.ctx), cleanupLimit)
	defer cancel()
	exit, err := e.opt.Shims.Reap(ctx, e.shimOptions(v))
	if err != nil {
		e.log.Error("clean up after a dead shim", "container", v.ID, "error", err)
		exit = client.Exit{Status: exitUnknown}
	}
	if exit.ExitedAt.IsZero() {
		exit.ExitedAt = time.Now()
	}
	return exit
}

// exited handles the end of a run. The caller holds the ticket.
func (e *Engine) exited(c *container, r *run, exit client.Exit) {
	ctx, cancel := context.WithTimeout(e.ns(context.WithoutCancel(e.ctx)), cleanupLimit)
	defer cancel()
	v := c.view()
	if r.cancel != nil {
		r.cancel()
	}
	exit.OOMKilled = exit.OOMKilled || oomKilled(r.memory) // before the cgroup goes
	var g errgroup.Group
	g.Go(func() error { return e.releaseShim(ctx, v, r) })
	g.Go(func() error { return e.releaseNetwork(ctx, v) })
	if err := g.Wait(); err != nil {
		e.log.Error("clean up after exit", "container", c.id, "error", err)
	}
	e.dropVolumes(ctx, v)
	if exit.ExitedAt.IsZero() {
		exit.ExitedAt = time.Now()
	}

	c.mu.Lock()
	if exit.ExitedAt.Sub(r.started) > restartReset {
		c.failures = 0
	}
	restart := !c.removing && c.rec.Config.Restart.again(int(exit.Status), c.rec.RestartCount, c.rec.StoppedByUser)
	to := StatusExited
	if restart {
		to = StatusRestarting
		c.rec.RestartCount++
		c.failures++
	}
	wait := min(restartFirst<<max(0, min(c.failures-1, 20)), restartMost)
	err := c.changeLocked(to, func(s *State) {
		s.Pid, s.Error, s.Lost = 0, "", false
		s.ExitCode = int(exit.Status)
		s.OOMKilled = exit.OOMKilled
		s.FinishedAt = exit.ExitedAt.UTC()
		if s.Health != nil && s.Health.Status != "none" {
			h := *s.Health
			h.Status = "unhealthy"
			s.Health = &h
		}
		c.run = nil
		c.lastPid = v.State.Pid
		c.rec.SandboxKey = ""
		for _, x := range c.execs {
			x.ended(exitUnknown)
		}
	})
	networks := c.rec.Networks
	auto, duration := c.rec.Config.AutoRemove && c.restarts == 0, c.rec.State.runDuration()
	c.mu.Unlock()
	if err != nil {
		e.log.Error("record exit", "container", c.id, "error", err)
	}
	idle := e.idleEndpoints(ctx, networks)
	c.mu.Lock()
	c.rec.Endpoints = idle
	c.mu.Unlock()

	if exit.OOMKilled {
		e.emit(c, "oom")
	}
	e.tellDie(c, r, int(exit.Status), duration)
	c.notify(WaitNextExit)
	if !restart {
		c.notify(WaitNotRunning)
	}
	if auto && !restart {
		e.removeExited(c)
		return
	}
	// The bundle holds the exit file: until the record is on disk it is what a daemon
	// that is killed right now will know the exit from.
	if err := e.save(ctx, c); err != nil {
		e.log.Error("save container", "container", c.id, "error", err)
	} else if err := RemoveBundle(r.bundle); err != nil {
		e.log.Error("remove bundle", "container", c.id, "error", err)
	}
	if restart {
		e.scheduleRestart(c, wait)
	}
	e.tellEnd(ctx, c)
}

// again tells whether a policy wants another run.
func (p RestartPolicy) again(code, restarts int, stoppedByUser bool) bool {
	if stoppedByUser {
		return false
	}
	switch p.Name {
	case "always", "unless-stopped":
		return true
	case "on-failure":
		return code != 0 && (p.MaxRetries == 0 || restarts < p.MaxRetries)
	}
	return false
}

// releaseShim takes the task and its shim away after the end.
func (e *Engine) releaseShim(ctx context.Context, v Container, r *run) error {
	defer r.shim.get().Close()
	_, err := r.shim.get().Delete(ctx, v.ID, "")
	if err == nil || errdefs.IsNotFound(err) {
		if err = r.shim.get().Shutdown(ctx); err == nil {
			return nil
		}
	}
	// The shim is gone or does not answer.
	if _, rerr := e.opt.Shims.Reap(ctx, e.shimOptions(v)); rerr != nil {
		return errors.Join(fmt.Errorf("delete task: %w", err), rerr)
	}
	return nil
}

// releaseNetwork gives back endpoints and the namespace of a container.
func (e *Engine) releaseNetwork(ctx context.Context, v Container) error {
	var errs []error
	for _, ep := range v.Endpoints {
		if ep.ID == "" {
			continue
		}
		if err := e.opt.Networks.Disconnect(ctx, ep.NetworkID, ep.ID); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("leave network %s: %w", ep.NetworkName, err))
			continue
		}
		e.emitFor("network", "disconnect", ep.NetworkID, "container", v.ID, "name", ep.NetworkName, "type", "bridge")
	}
	if v.SandboxKey != "" {
		if err := e.opt.Networks.DeleteNetns(ctx, v.SandboxKey); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("delete network namespace: %w", err))
		}
	}
	return errors.Join(errs...)
}

// scheduleRestart starts the container again after a while, unless it is stopped,
// started or removed before.
func (e *Engine) scheduleRestart(c *container, wait time.Duration) {
	ctx, cancel := context.WithCancel(e.ctx)
	c.mu.Lock()
	c.restartCancel = cancel
	c.mu.Unlock()
	e.work.Go(func() {
		defer cancel()
		t := time.NewTimer(wait)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
		if err := c.acquire(ctx); err != nil {
			return
		}
		defer c.release()
		c.mu.Lock()
		stale := ctx.Err() != nil || c.rec.State.Status != StatusRestarting || c.removing
		if !stale {
			c.restartCancel = nil
		}
		c.mu.Unlock()
		if stale {
			return
		}
		if err := e.startHeld(e.ctx, c); err != nil {
			e.log.Error("restart container", "container", c.id, "error", err)
			_ = c.change(StatusExited, nil)
			e.saveLater(c)
			c.notify(WaitNotRunning)
		}
	})
}

// stopRestarting ends the waiting of a restarting container: it is exited then. It
// tells whether there was one.
func (c *container) stopRestarting() bool {
	c.mu.Lock()
	if c.rec.State.Status != StatusRestarting {
		c.mu.Unlock()
		return false
	}
	if c.restartCancel != nil {
		c.restartCancel()
		c.restartCancel = nil
	}
	err := c.changeLocked(StatusExited, nil)
	c.mu.Unlock()
	c.notify(WaitNotRunning)
	return err == nil
}
