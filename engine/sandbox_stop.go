package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// sandboxStopLimit bounds a stop that its client does not wait for.
const sandboxStopLimit = 2 * time.Minute

// StopSandbox kills the containers of a sandbox and gives back its network and namespaces.
// It is idempotent, and works when nothing of all that is left, as after a reboot.
func (e *Engine) StopSandbox(ctx context.Context, ref string) error {
	s, err := e.pods.get(ref)
	if err != nil {
		return err
	}
	if err := s.acquire(ctx); err != nil {
		return fmt.Errorf("stop sandbox %s: %w", ref, err)
	}
	defer s.release()
	return e.stopHeld(ctx, s)
}

// stopHeld stops a sandbox whose ticket the caller holds.
func (e *Engine) stopHeld(ctx context.Context, s *sandbox) error {
	s.mu.Lock()
	was := s.state
	if was == SandboxNotReady && s.released || was == SandboxRemoving { // removed, since the ticket is ours
		s.mu.Unlock()
		return nil
	}
	err := s.changeLocked(SandboxStopping)
	live := s.live
	s.mu.Unlock()
	if err != nil {
		return err
	}
	// The client's going away does not stop the stopping.
	ctx, cancel := context.WithTimeout(e.ns(context.WithoutCancel(ctx)), sandboxStopLimit)
	defer cancel()
	err = e.lower(ctx, s, live)
	s.mu.Lock()
	_ = s.changeLocked(SandboxNotReady)
	s.released = err == nil
	if err == nil {
		s.live = sandboxRun{}
	}
	s.mu.Unlock()
	if was == SandboxReady {
		e.emitSandbox(s, "stop")
	}
	if err != nil {
		return fmt.Errorf("stop sandbox %s: %w", s.id, err)
	}
	return nil
}

// lower takes back what runSandbox made.
func (e *Engine) lower(ctx context.Context, s *sandbox, live sandboxRun) error {
	dir := e.sandboxDir(s.id)
	if _, err := os.Lstat(dir); err == nil {
		// A daemon that is killed from here on must not take it for ready.
		r := live
		r.Version, r.Record, r.Ready, r.Stopping = runVersion, s.rec, false, true
		if err := writeSandboxRun(dir, r); err != nil {
			return err
		}
	}
	// A start that hangs, on a mount that does, has no process yet, and holds its container.
	soon, cancel := context.WithTimeout(ctx, killLimit+2*time.Second)
	err := e.killMembers(soon, s)
	cancel()
	if err != nil {
		if err := e.killShim(ctx, s, err); err != nil {
			return err
		}
		if err := e.killMembers(ctx, s); err != nil {
			return err
		}
	}
	e.tellStop(ctx, s)
	c := s.rec.Config
	var g errgroup.Group
	if c.Network == NamespacePod {
		g.Go(func() error {
			netns, err := e.netnsOf(ctx, s.id, live)
			if err != nil {
				return err
			}
			if err := e.opt.PodNetwork.Teardown(ctx, podEndpoint(s.id, c, netns)); err != nil {
				return err
			}
			if netns == "" {
				return nil
			}
			if err := e.opt.Networks.DeleteNetns(ctx, netns); err != nil && !errdefs.IsNotFound(err) {
				return fmt.Errorf("delete network namespace: %w", err)
			}
			return nil
		})
	}
	// Meanwhile, since plugins take their time, what takes a grace period of the kernel for each mount.
	g.Go(func() error {
		if err := e.endPodShim(ctx, s); err != nil {
			return err
		}
		e.removePodCgroup(s.id, c, live.CgroupMade)
		return unmountSandboxDir(dir)
	})
	if err := g.Wait(); err != nil {
		return err
	}
	return RemoveSandboxDir(dir)
}

// netnsOf gives the path of a sandbox's network namespace, if there is one. A run that was cut short
// has not written it down.
func (e *Engine) netnsOf(ctx context.Context, id string, live sandboxRun) (string, error) {
	paths, err := e.opt.Networks.Netns(ctx)
	if err != nil {
		return "", err
	}
	for _, p := range paths {
		if p == live.NetNS || filepath.Base(p) == id {
			return p, nil
		}
	}
	return "", nil
}

// killShim ends the shim of a sandbox that does not do as it is told, because of cause: a pod
// that is to end must not be kept by it.
func (e *Engine) killShim(ctx context.Context, s *sandbox, cause error) error {
	if ctx.Err() != nil {
		return cause
	}
	e.log.Warn("the shim of a sandbox is killed: it does not do as it is told", "sandbox", s.id, "error", cause)
	if err := e.opt.Shims.Kill(ctx, e.sandboxShim(s)); err != nil && !errdefs.IsNotFound(err) {
		return errors.Join(cause, err)
	}
	return nil
}

// killMembers kills the containers of a sandbox.
func (e *Engine) killMembers(ctx context.Context, s *sandbox) error {
	var g errgroup.Group
	for _, c := range e.pods.containers(s.id) {
		g.Go(func() error {
			c.mu.Lock()
			r := c.run
			c.rec.StoppedByUser = true
			c.mu.Unlock()
			err := e.kill9(ctx, c, r)
			if err != nil {
				return fmt.Errorf("kill container %s: %w", c.id, err)
			}
			return nil
		})
	}
	return g.Wait()
}

// makePodCgroup makes the cgroup that the containers of a sandbox will lie in, so that none of them has to wait for
// it: each of the hierarchies of cgroup v1 takes a directory. It says whether it has made one that the client named; that the kubelet
// has done so is the rule. What fails is for the first container to find.
func (e *Engine) makePodCgroup(id string, c SandboxConfig) (made bool) {
	path := e.podCgroup(id, c)
	if e.opt.CgroupDriver == "systemd" || path == "/" {
		return false
	}
	for _, point := range e.host.Hierarchies {
		dir := filepath.Join(point, path)
		err := unix.Mkdir(dir, 0o755)
		if errors.Is(err, unix.ENOENT) {
			if err = os.MkdirAll(filepath.Dir(dir), 0o755); err == nil {
				err = unix.Mkdir(dir, 0o755)
			}
		}
		switch {
		case err == nil:
			made = made || c.CgroupParent != ""
		case !errors.Is(err, unix.EEXIST):
			e.log.Debug("make the cgroup of a sandbox", "path", dir, "error", err)
		}
	}
	return made
}

// removePodCgroup removes the cgroup that the engine made as the parent of a sandbox's containers.
func (e *Engine) removePodCgroup(id string, c SandboxConfig, made bool) {
	if c.CgroupParent != "" && !made {
		return
	}
	points := slices.Clone(e.host.Hierarchies)
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err == nil { // another one may have been mounted meanwhile
		for _, m := range cgroupMounts(string(mounts)) {
			points = append(points, m.point)
		}
	}
	slices.Sort(points)
	for _, point := range slices.Compact(points) {
		dir := filepath.Join(point, e.podCgroup(id, c))
		err := unix.Rmdir(dir)
		switch {
		case err == nil || errors.Is(err, unix.ENOENT):
		case c.CgroupParent != "": // somebody else has put something into it
			e.log.Debug("remove the cgroup of a sandbox", "path", dir, "error", err)
		default:
			e.log.Warn("remove the cgroup of a sandbox", "path", dir, "error", err)
		}
	}
}

// RemoveSandbox removes a sandbox with its containers. It is stopped first if it is not yet.
func (e *Engine) RemoveSandbox(ctx context.Context, ref string) error {
	s, err := e.pods.get(ref)
	if err != nil {
		return err
	}
	if err := s.acquire(ctx); err != nil {
		return fmt.Errorf("remove sandbox %s: %w", ref, err)
	}
	defer s.release()
	if s.removed() {
		return nil
	}
	return e.removeSandbox(ctx, s)
}

// dropSandbox removes a sandbox that its client did not wait for. Others may have seen it already: it is listed as soon as
// it is ready, and whoever found it there may be removing it.
func (e *Engine) dropSandbox(ctx context.Context, s *sandbox) error {
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	if s.removed() {
		return nil
	}
	err := e.removeSandbox(ctx, s)
	if err != nil {
		e.pods.add(s) // it holds its name: whoever wants that must be able to remove it
	}
	return err
}

// removeSandbox removes a sandbox whose ticket the caller holds.
func (e *Engine) removeSandbox(ctx context.Context, s *sandbox) error {
	if err := e.stopHeld(ctx, s); err != nil {
		return err
	}
	if err := s.change(SandboxRemoving); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(e.ns(context.WithoutCancel(ctx)), sandboxStopLimit)
	defer cancel()
	if err := e.eraseSandbox(ctx, s); err != nil {
		_ = s.change(SandboxNotReady)
		return fmt.Errorf("remove sandbox %s: %w", s.id, err)
	}
	e.pods.remove(s)
	e.tellRemove(ctx, s)
	e.emitSandbox(s, "destroy")
	return nil
}

// eraseSandbox removes the containers and the record of a stopped sandbox.
func (e *Engine) eraseSandbox(ctx context.Context, s *sandbox) error {
	var g errgroup.Group
	for _, c := range e.pods.containers(s.id) {
		g.Go(func() error { return e.RemovePodContainer(ctx, c.id) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if err := e.opt.Sandboxes.Delete(ctx, s.id); err != nil {
		return fmt.Errorf("delete record: %w", err)
	}
	return nil
}
