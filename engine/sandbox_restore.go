package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/shim/client"
)

// loadSandboxes takes up the sandboxes. It believes the kernel's namespaces and the
// volatile folder, not the record:
//
//	folder  run.json   namespaces   then
//	none                            the machine was rebooted, or it was stopped: not ready
//	there   ready      there        ready, as if nothing had been
//	there   ready      missing      not ready
//	there   stopping                not ready, to be stopped again
//	there   else                    a run was cut short and nobody got an answer: undone
//
// It tells whether all records could be read.
func (e *Engine) loadSandboxes(ctx context.Context) (whole bool) {
	var all []*sandbox
	err := e.opt.Sandboxes.ForEach(func(id string, raw []byte) error {
		var r sandboxRecord
		if err := json.Unmarshal(raw, &r); err != nil {
			return fmt.Errorf("sandbox %s: %w", id, err)
		}
		if r.Version > sandboxVersion {
			return fmt.Errorf("sandbox %s: record of version %d, this daemon knows %d: %w", id, r.Version, sandboxVersion, errdefs.ErrFailedPrecondition)
		}
		if r.ID != id || len(id) != 64 {
			return fmt.Errorf("sandbox %s: damaged record: %w", id, errdefs.ErrDataLoss)
		}
		all = append(all, newSandbox(r))
		return nil
	})
	if err != nil {
		e.log.Error("some sandboxes could not be read and are not shown", "error", err)
	}
	each(e.patience, all, func(s *sandbox) { e.takeSandbox(ctx, s) })
	return err == nil
}

func (e *Engine) takeSandbox(ctx context.Context, s *sandbox) {
	dir := e.sandboxDir(s.id)
	s.state = SandboxNotReady
	if _, err := os.Lstat(dir); err != nil {
		e.pods.add(s)
		return
	}
	run, err := readSandboxRun(dir)
	switch {
	case err == nil && !run.Ready && !run.Stopping, errors.Is(err, fs.ErrNotExist):
		e.log.Info("a run of a sandbox that was cut short is cleaned up", "sandbox", s.id)
		s.live = run
		e.undoSandbox(s)
		return
	case err != nil:
		e.log.Error("a sandbox is shown as not ready", "sandbox", s.id, "error", err)
	default:
		s.live = run
		if run.Ready && e.namespacesLive(s, dir) {
			s.state = SandboxReady
		}
	}
	e.pods.add(s)
	if s.state != SandboxReady || s.live.Init == 0 {
		return
	}
	// What the kernel says of the init, not the record.
	e.patience.wait(ctx, func(ctx context.Context) {
		var shim Shim
		if shim, err = e.reachShim(ctx, s, false); err != nil {
			return
		}
		var st client.State
		if st, err = shim.State(ctx, s.id, ""); err == nil && st.Status == client.StatusStopped {
			err = errdefs.ErrNotFound
		}
	})
	if errdefs.IsNotFound(err) {
		s.mu.Lock()
		s.state = SandboxNotReady
		s.mu.Unlock()
		return
	}
	e.work.Go(func() { e.watchInit(s) })
}

const (
	// undoWait is how long a start waits for sandboxes that are being removed. It is enough for plugins that work: so a
	// daemon that is killed again and again comes to an end with them.
	undoWait = 3 * time.Second
	// undoTries is how often a removal is tried at once: the first DEL of a plugin whose ADD was cut short may fail.
	undoTries = 3
)

// undoSandbox removes a sandbox that nobody got to know, in the background: a CNI plugin that hangs must not keep the daemon
// from its work. Who asks for one of the same name waits until it is gone. One that cannot be removed is shown: it
// holds its name.
func (e *Engine) undoSandbox(s *sandbox) {
	release := e.pods.flights.hold(s.rec.Config.key())
	done := e.pods.undo(s.id)
	e.work.Go(func() {
		defer release()
		defer done()
		var err error
		for range undoTries {
			if err = e.removeSandbox(e.ctx, s); err == nil {
				return
			}
		}
		e.log.Error("clean up after a run of a sandbox that was cut short", "sandbox", s.id, "error", err)
		e.pods.add(s)
	})
}

// awaitUndone waits until the sandboxes that are being removed are gone, but not for one that hangs. All of
// them have begun when it is called.
func (e *Engine) awaitUndone(ctx context.Context) {
	limit := time.NewTimer(undoWait)
	defer limit.Stop()
	for _, gone := range e.pods.undone() {
		select {
		case <-gone:
		case <-limit.C:
			e.log.Warn("sandboxes that were cut short are still being removed", "count", len(e.pods.undone()))
			return
		case <-ctx.Done():
			return
		}
	}
}

// namespacesLive tells whether the namespaces of a sandbox are there.
func (e *Engine) namespacesLive(s *sandbox, dir string) bool {
	c := s.rec.Config
	paths := []string{}
	if c.Network == NamespacePod {
		paths = append(paths, s.live.NetNS, nsPath(dir, "uts"))
	}
	if c.IPC != NamespaceNode {
		paths = append(paths, nsPath(dir, "ipc"))
	}
	if c.Userns != nil {
		paths = append(paths, nsPath(dir, "user"))
	}
	if c.PID == NamespacePod {
		paths = append(paths, nsPath(dir, "pid"))
	}
	for _, p := range paths {
		var st unix.Statfs_t
		if unix.Statfs(p, &st) != nil || st.Type != unix.NSFS_MAGIC {
			e.log.Warn("a namespace of a sandbox is gone", "sandbox", s.id, "path", p)
			return false
		}
	}
	return true
}

// dropStraySandboxes removes what runs of sandboxes that were cut short left before their
// record was written.
func (e *Engine) dropStraySandboxes() {
	undoing := e.pods.undone()
	for _, id := range folders(filepath.Join(e.opt.State, "sandboxes")) {
		if _, err := e.pods.get(id); err == nil || len(id) != 64 || undoing[id] != nil {
			continue
		}
		s := newSandbox(sandboxRecord{Version: sandboxVersion, ID: id})
		if run, err := readSandboxRun(e.sandboxDir(id)); err == nil {
			s.rec, s.live = run.Record, run
			s.rec.ID = id
		}
		s.state = SandboxNotReady
		e.undoSandbox(s)
	}
}
