package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"github.com/hako-engine/hako/store"

	"github.com/hako-engine/hako/internal/errtext"
)

// RemoveContainer removes a container with its file system and log. It is durable
// when it returns.
func (e *Engine) RemoveContainer(ctx context.Context, ref string, o RemoveOptions) error {
	c, g, err := e.lookup(ctx, ref)
	if err != nil {
		return err
	}
	if g != nil {
		return e.removeGuest(ctx, g, o.Force)
	}
	// The removal goes on if the client goes away.
	work := e.ns(context.WithoutCancel(ctx))
	if !o.Force {
		if err := c.claimable(); err != nil {
			return err
		}
		// A start that is under way is waited for: it decides whether this is possible.
		if err := c.acquire(ctx); err != nil {
			return fmt.Errorf("remove container %s: %w", ref, err)
		}
		defer c.release()
		if err := c.claim(false); err != nil {
			return err
		}
		return e.removeHeld(work, c, o.Volumes)
	}
	if err := c.claim(true); err != nil {
		return err
	}
	c.mu.Lock()
	r := c.run
	c.mu.Unlock()
	if err := e.kill9(work, c, r); err != nil {
		c.mu.Lock()
		c.removing = false
		c.mu.Unlock()
		return fmt.Errorf("cannot remove container %q: could not kill: %w", ref, err)
	}
	if err := c.acquire(work); err != nil {
		return err
	}
	defer c.release()
	return e.removeHeld(work, c, o.Volumes)
}

// claimable tells whether the container, as it is now, could be removed without force.
func (c *container) claimable() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.claimableLocked(false)
}

func (c *container) claimableLocked(force bool) error {
	switch {
	case c.gone:
		return notFoundf("No such container: %s", c.id)
	case c.removing:
		return conflictf("removal of container %s is already in progress", c.rec.Name)
	case force:
		return nil
	}
	return c.requireLocked("remove")
}

// claim makes the caller the only one that removes the container.
func (c *container) claim(force bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.claimableLocked(force); err != nil {
		return err
	}
	c.removing = true
	c.rec.StoppedByUser = true
	return nil
}

// kill9 ends a container for its removal. A start that is under way is waited for.
func (e *Engine) kill9(ctx context.Context, c *container, r *run) error {
	c.stopRestarting()
	for {
		if r != nil {
			begin := time.Now()
			if err := e.signal(ctx, c, r, 9, true); err != nil {
				e.log.Warn("kill container", "container", c.id, "error", err)
			}
			// The time for which a shim did not answer counts.
			if !waitDone(r, max(killLimit-time.Since(begin), time.Second)) {
				return fmt.Errorf("container %s did not end within %v of SIGKILL: %w", c.id, killLimit, errdefs.ErrUnavailable)
			}
		}
		// Its operation may have started another run just before the claim.
		if err := c.acquire(ctx); err != nil {
			return err
		}
		c.mu.Lock()
		next := c.run
		c.mu.Unlock()
		c.release()
		if next == nil || next == r {
			return nil
		}
		r = next
	}
}

// removeExited removes a container by its own wish (--rm). The caller holds the ticket.
func (e *Engine) removeExited(c *container) {
	c.mu.Lock()
	claimed := !c.removing
	c.removing = true
	c.mu.Unlock()
	if !claimed {
		return // a client's remove waits for the ticket
	}
	ctx, cancel := context.WithTimeout(e.ns(context.WithoutCancel(e.ctx)), cleanupLimit)
	defer cancel()
	if err := e.removeHeld(ctx, c, true); err != nil {
		e.log.Error("remove container after its exit", "container", c.id, "error", err)
	}
}

// removeHeld removes a container that has no process. The caller has claimed the
// removal and holds the ticket.
func (e *Engine) removeHeld(ctx context.Context, c *container, volumes bool) error {
	if err := c.change(StatusRemoving, nil); err != nil {
		c.mu.Lock()
		c.removing = false
		c.mu.Unlock()
		return err
	}
	v := c.view()
	select { // no older state may be written after the deletion
	case c.saving <- struct{}{}:
	case <-ctx.Done():
		return c.notRemoved(context.Cause(ctx))
	}
	defer func() { <-c.saving }()

	// Side by side, so that the snapshot's and the container's record share one fsync.
	var g errgroup.Group
	both := store.Together(ctx, 2)
	g.Go(func() error { return e.removeSnapshot(both, v) })
	g.Go(func() error {
		if err := e.opt.Containers.Delete(both, c.id); err != nil {
			return fmt.Errorf("delete record: %w", err)
		}
		return nil
	})
	g.Go(func() error { return RemoveBundle(e.bundle(c.id)) })
	err := g.Wait()
	if err == nil { // not before: a container that a crash leaves still has its log
		err = os.RemoveAll(e.dir(c.id))
	}
	if err != nil {
		return c.notRemoved(err)
	}
	c.mu.Lock()
	c.gone = true
	execs := c.execs
	pending := c.pending
	c.pending = nil
	c.mu.Unlock()
	for id := range execs {
		e.execs.remove(id)
	}
	for _, p := range pending {
		p.resolve(nil)
	}
	e.containers.remove(c, v.Name)
	if p := v.Config.Pod; p != nil {
		e.pods.leave(p.Sandbox, c)
		e.tellGone(ctx, c)
	}
	if volumes {
		e.removeAnonymous(ctx, v)
	}
	e.emit(c, "destroy")
	c.notify(WaitRemoved, WaitNextExit, WaitNotRunning)
	return nil
}

// notRemoved leaves a container whose removal failed to the next who tries.
func (c *container) notRemoved(err error) error {
	_ = c.change(StatusDead, func(s *State) { s.Error = errtext.Plain(err) })
	c.mu.Lock()
	c.removing = false
	c.mu.Unlock()
	return fmt.Errorf("unable to remove container %s: %w", c.id, err)
}

// removeAnonymous removes the volumes that were made for this container alone.
func (e *Engine) removeAnonymous(ctx context.Context, v Container) {
	for _, m := range v.Mounts {
		if m.Kind != MountVolume {
			continue
		}
		vol, err := e.Volume(ctx, m.Source)
		if err != nil || !vol.Anonymous {
			continue
		}
		if err := e.removeVolume(ctx, m.Source); err != nil && !errors.Is(err, errdefs.ErrConflict) && !errdefs.IsNotFound(err) {
			e.log.Error("remove anonymous volume", "volume", m.Source, "container", v.ID, "error", err)
		}
	}
}
