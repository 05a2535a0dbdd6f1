//go:build linux && (amd64 || arm64)

package oci

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/cgroup"
	"github.com/hako-engine/hako/oci/cgroup/systemd"
	"github.com/hako-engine/hako/oci/internal/classed"
	"github.com/hako-engine/hako/oci/rdt"
)

// endLimit bounds how long Purge waits for a process that is about to end by itself.
const endLimit = time.Second

// Purge removes what is left of a container whose creation was killed: its process if it
// waits for a start, its cgroup, its resctrl group, its state. It is errdefs.ErrNotFound if there is nothing,
// and refuses a container that Load finds.
func (r *Runtime) Purge(id string) error {
	if err := CheckID(id); err != nil {
		return err
	}
	c := &Container{r: r, dir: filepath.Join(r.Root, id)}
	c.state.ID = id
	unlock, err := c.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := c.readState(); !errors.Is(err, os.ErrNotExist) {
		return classed.Errorf(errdefs.ErrFailedPrecondition, "container %q exists", id)
	}
	// Without its whole configuration the creation had not got to the cgroup.
	if s, err := c.readSpec(); err == nil && s.Linux != nil {
		if err := c.purgeCgroup(s.Linux.CgroupsPath); err != nil {
			return fmt.Errorf("container %q: %w", id, err)
		}
		if err := purgeRdt(id, s.Linux.IntelRdt); err != nil {
			return fmt.Errorf("container %q: %w", id, err)
		}
	}
	return os.RemoveAll(c.dir)
}

// purgeRdt removes the resctrl group where a creation makes it.
func purgeRdt(id string, r *specs.LinuxIntelRdt) error {
	if r == nil {
		return nil
	}
	root, err := resctrl()
	if errors.Is(err, rdt.ErrNotMounted) {
		return nil // no creation has made one
	}
	if err != nil {
		return err
	}
	return rdt.Purge(root, id, r)
}

// purgeCgroup removes the cgroup where a creation makes it. Nothing tells whether this one
// had got so far: a cgroup with processes that are not its own is somebody else's.
func (c *Container) purgeCgroup(path string) error {
	l, err := cgroup.Detect()
	if err != nil {
		return err
	}
	if path == "" {
		path = c.ID()
	}
	if c.r.CgroupDriver == "systemd" {
		user := os.Geteuid() != 0
		u, err := systemd.Parse(path, c.ID(), user)
		if err != nil {
			return err
		}
		m, err := systemd.Connect(user)
		if err != nil {
			return err
		}
		defer m.Close()
		path = u.Path(m.ControlGroup()) // the unit ends with its processes
	}
	cg, err := l.At(path)
	if err != nil {
		return err
	}
	pids, err := cg.AllProcs()
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	for _, pid := range pids {
		ours, err := c.endWaiting(pid)
		if err != nil {
			return err
		}
		if !ours {
			return nil
		}
	}
	return cg.Delete()
}

// endWaiting kills a process that holds the FIFO from which a created container hears of
// its start, and waits for its end. It tells whether the process is gone.
func (c *Container) endWaiting(pid int) (gone bool, err error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return true, nil
	}
	defer unix.Close(fd)
	var fifo unix.Stat_t
	if unix.Stat(filepath.Join(c.dir, startFifo), &fifo) != nil {
		// One that was made ahead ends with the runtime.
		return ends(fd, endLimit), nil
	}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	open, err := os.ReadDir(dir)
	if err != nil {
		return ends(fd, endLimit), nil
	}
	holds := false
	for _, e := range open {
		var st unix.Stat_t
		holds = holds || unix.Stat(filepath.Join(dir, e.Name()), &st) == nil && st.Ino == fifo.Ino && st.Dev == fifo.Dev
	}
	if !holds {
		// One that was still making the container ends by itself, when it finds the runtime
		// gone.
		return ends(fd, endLimit), nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && err != unix.ESRCH {
		return false, fmt.Errorf("kill process %d: %w", pid, err)
	}
	if !ends(fd, deleteLimit) {
		return false, classed.Errorf(errdefs.ErrUnavailable, "process %d does not die", pid)
	}
	return true, nil
}

// ends waits for the end of a process.
func ends(pidfd int, limit time.Duration) bool {
	for deadline := time.Now().Add(limit); ; {
		left := time.Until(deadline)
		if left <= 0 {
			return false
		}
		p := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
		if n, err := unix.Poll(p, int(left.Milliseconds())+1); n > 0 && err == nil {
			return true
		}
	}
}
