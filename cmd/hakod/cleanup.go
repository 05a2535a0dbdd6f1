package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/engine"
	"github.com/hako-engine/hako/shim/client"
	"github.com/hako-engine/hako/snapshot"
	"github.com/hako-engine/hako/snapshot/mounts"
	"github.com/hako-engine/hako/store"
)

const (
	// endLimit is how long the end of one container may take.
	endLimit = 20 * time.Second
	// endWidth is how many containers are ended side by side.
	endWidth = 16
)

// cleanup ends all containers of a root and removes what the daemon made outside its
// folders.
func cleanup(ctx context.Context, cfg config, log *slog.Logger) error {
	unlock, err := lock(cfg)
	if err != nil {
		return err
	}
	defer unlock()
	bundles, err := filepath.Glob(filepath.Join(cfg.State, "containers", "*"))
	errs := make([]error, len(bundles), len(bundles)+4)
	var g errgroup.Group
	g.SetLimit(endWidth)
	for i, b := range bundles {
		g.Go(func() error {
			if err := endContainer(ctx, cfg, b, log); err != nil {
				errs[i] = fmt.Errorf("end container %s: %w", filepath.Base(b), err)
			}
			return nil
		})
	}
	errs = append(errs, err, g.Wait())
	// The shims of pods, once their containers have ended.
	pods, err := filepath.Glob(filepath.Join(cfg.State, "sandboxes", "*"))
	errs = append(errs, err)
	for _, dir := range pods {
		if err := endSandbox(ctx, cfg, dir, log); err != nil {
			errs = append(errs, fmt.Errorf("end sandbox %s: %w", filepath.Base(dir), err))
		}
	}
	errs = append(errs, mounts.Purge(mountsDir(cfg)), engine.UnmountVolumes(cfg.Root), snapshot.UnmountAll(filepath.Join(cfg.State, "erofs")))
	st, err := store.Open(cfg.Root, store.Options{Log: log})
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	defer st.Close()
	nets, err := openNetwork(ctx, cfg, st, log)
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	errs = append(errs, nets.Purge(ctx), nets.Close())
	// The parents of containers' cgroups, unless another daemon has containers there.
	var parents []string
	for _, pattern := range []string{"/sys/fs/cgroup/*/hako", "/sys/fs/cgroup/hako"} {
		for _, dir := range pods {
			found, _ := filepath.Glob(filepath.Join(pattern, "pod"+filepath.Base(dir)))
			parents = append(parents, found...)
		}
		found, _ := filepath.Glob(pattern)
		parents = append(parents, found...)
	}
	for _, p := range parents {
		_ = unix.Rmdir(p)
	}
	leaveCgroup(cfg.CgroupPath)
	sockets := []string{cfg.DockerSocket, cfg.CRISocket, cfg.ContainerdSocket, cfg.DebugSocket}
	if cfg.ContainerdSocket != "" {
		sockets = append(sockets, cfg.ContainerdSocket+".ttrpc")
	}
	for _, path := range sockets {
		removeDeadSocket(path)
	}
	return errors.Join(errs...)
}

// removeDeadSocket removes a socket that nobody listens on. The path may be another
// daemon's, which has the same one in its flags.
func removeDeadSocket(path string) {
	if path == "" {
		return
	}
	conn, err := net.Dial("unix", path)
	if err == nil {
		conn.Close()
	} else if errors.Is(err, unix.ECONNREFUSED) {
		_ = os.Remove(path)
	}
}

// endContainer ends the container of a bundle and its shim. A live shim does that
// itself, or it would go on to keep what it believes it has.
func endContainer(ctx context.Context, cfg config, bundle string, log *slog.Logger) error {
	ctx, cancel := context.WithTimeout(ctx, endLimit)
	defer cancel()
	id := filepath.Base(bundle)
	shim, err := client.Manager{}.Connect(ctx, bundle)
	switch {
	case err == nil && sharesShim(bundle):
		err = endTask(ctx, shim, id)
		shim.Close()
	case err == nil:
		err = endShim(ctx, shim, id)
		shim.Close()
	}
	if err != nil {
		err = endHung(ctx, cfg, bundle, err, log)
	}
	return errors.Join(err, engine.RemoveBundle(bundle))
}

// endSandbox ends the shim of a pod, with the init that it may hold, and lets the namespaces go.
func endSandbox(ctx context.Context, cfg config, dir string, log *slog.Logger) error {
	ctx, cancel := context.WithTimeout(ctx, endLimit)
	defer cancel()
	id := filepath.Base(dir)
	shim, err := client.Manager{}.Connect(ctx, dir)
	if err == nil {
		err = endShim(ctx, shim, id)
		shim.Close()
	}
	if err != nil {
		err = endHung(ctx, cfg, dir, err, log)
	}
	return errors.Join(err, engine.RemoveSandboxDir(dir))
}

// endHung ends the shim of a bundle that failed with cause: it is dead, or does not do as it
// is told. It must not go on beside those who take away what its container held.
func endHung(ctx context.Context, cfg config, bundle string, cause error, log *slog.Logger) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endLimit)
	defer cancel()
	o := client.StartOptions{Binary: cfg.ShimBinary, Namespace: engine.Namespace, ID: filepath.Base(bundle), Bundle: bundle}
	shim := o
	shim.Bundle = shimBundle(bundle)
	err := client.Manager{}.Kill(ctx, shim)
	switch {
	case err == nil:
		log.Warn("killed a shim that does not do as it is told", "container", o.ID, "error", cause)
	case !errdefs.IsNotFound(err):
		err = errors.Join(cause, err)
	case errdefs.IsNotFound(cause):
		err = nil
	default: // the shim of a pod may have been killed for another container of it
		s, cerr := client.Manager{}.Connect(ctx, bundle)
		if cerr == nil {
			s.Close()
		}
		if err = cause; errdefs.IsNotFound(cerr) {
			err = nil
		}
	}
	_, rerr := client.Manager{}.Reap(ctx, o)
	return errors.Join(err, rerr)
}

// sharesShim tells that the container of a bundle lies in the shim of a pod.
func sharesShim(bundle string) bool { return shimBundle(bundle) != filepath.Clean(bundle) }

// shimBundle is the bundle that the shim of a container was started for: the pod's, or its own.
func shimBundle(bundle string) string {
	b, err := os.ReadFile(filepath.Join(bundle, "address"))
	if err != nil {
		return filepath.Clean(bundle)
	}
	return filepath.Dir(strings.TrimPrefix(strings.TrimSpace(string(b)), "unix://"))
}

// endShim kills and deletes the container of a live shim, and waits for the shim's end.
func endShim(ctx context.Context, shim *client.Shim, id string) error {
	if err := endTask(ctx, shim, id); err != nil {
		return err
	}
	if err := shim.Shutdown(ctx); err != nil {
		return fmt.Errorf("shut the shim down: %w", err)
	}
	select {
	case <-shim.Gone():
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the shim does not end: %w", ctx.Err())
	}
}

// endTask kills and deletes the container of a live shim.
func endTask(ctx context.Context, shim *client.Shim, id string) error {
	err := shim.Kill(ctx, id, "", int(unix.SIGKILL), true)
	if err == nil {
		_, err = shim.Wait(ctx, id, "")
	}
	if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
		return fmt.Errorf("kill: %w", err)
	}
	if _, err := shim.Delete(ctx, id, ""); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("delete: %w", err)
	}
	return nil
}
