//go:build linux && (amd64 || arm64)

package oci

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/early"
	"github.com/hako-engine/hako/oci/internal/classed"
	"github.com/hako-engine/hako/oci/launch"
	"github.com/hako-engine/hako/oci/plan"
)

// Start lets a created container's process execute its program. It returns when it has.
// When a hook fails the container is deleted.
func (c *Container) Start(ctx context.Context) error {
	unlock, err := c.lock()
	if err != nil {
		return err
	}
	defer unlock()
	switch st, err := c.Status(); {
	case err != nil:
		return err
	case st == Stopped:
		return classed.Errorf(errdefs.ErrFailedPrecondition, "container %q: cannot start a container that has stopped", c.ID())
	case st == Paused:
		return classed.Errorf(errdefs.ErrFailedPrecondition, "container %q: cannot start a paused container", c.ID())
	case st != Created:
		return classed.Errorf(errdefs.ErrFailedPrecondition, "container %q: cannot start an already running container", c.ID())
	}
	s, err := c.readSpec()
	if err != nil {
		return err
	}
	if s.Process == nil {
		return classed.Errorf(errdefs.ErrFailedPrecondition, "container %q: cannot start it: its configuration has no process", c.ID())
	}
	defer c.forget()
	if err := c.startContainerHooks(ctx, s); err != nil {
		return c.abandon(ctx, err)
	}
	if err := c.release(ctx, s); err != nil {
		return c.startFailed(err)
	}
	if err := c.poststart(ctx, s); err != nil {
		return c.abandon(ctx, err)
	}
	return nil
}

// release writes the byte that the loader waits for, and learns how exec went: the
// loader holds the report FIFO open until then.
func (c *Container) release(ctx context.Context, s *specs.Spec) error {
	report, err := unix.Open(filepath.Join(c.dir, reportFifo), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", reportFifo, err)
	}
	defer unix.Close(report)
	start, err := unix.Open(filepath.Join(c.dir, startFifo), unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENXIO) {
		return classed.Errorf(errdefs.ErrFailedPrecondition, "the process has ended")
	}
	if err != nil {
		return fmt.Errorf("open %s: %w", startFifo, err)
	}
	defer unix.Close(start)
	if _, err := unix.Write(start, []byte{1}); err != nil {
		return fmt.Errorf("write %s: %w", startFifo, err)
	}
	word, errno, err := readReport(ctx, report)
	if err != nil {
		return err
	}
	os.Remove(filepath.Join(c.dir, reportFifo))
	if err := os.Remove(filepath.Join(c.dir, startFifo)); err != nil {
		return err
	}
	if word != 0 {
		return loaderError(s, word, errno)
	}
	return nil
}

func loaderError(s *specs.Spec, word int32, errno unix.Errno) error {
	p := &plan.Plan{Program: []plan.Step{{Do: plan.Say("exec %q", s.Process.Args[0]), Class: plan.ClassNoExec}}}
	return launch.LoaderError(p, word, errno)
}

func (c *Container) startFailed(err error) error {
	return fmt.Errorf("container %q: unable to start container process: %w", c.ID(), classify(err))
}

// EarlyFailure is the error of a start that package early has tried, and nil if it has not.
func (c *Container) EarlyFailure() error {
	f := &early.Failure
	if f.Word == 0 || f.ID != c.ID() {
		return nil
	}
	s, err := c.readSpec()
	if err != nil {
		return err
	}
	return c.startFailed(loaderError(s, f.Word, f.Errno))
}

// readReport waits for the loader's word, or for the end of the FIFO: exec has closed
// the other end.
func readReport(ctx context.Context, fd int) (word int32, errno unix.Errno, err error) {
	for {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(p, 1000); err != nil && err != unix.EINTR {
			return 0, 0, err
		}
		if p[0].Revents == 0 {
			if err := ctx.Err(); err != nil {
				return 0, 0, err
			}
			continue
		}
		var b [8]byte
		switch n, err := unix.Read(fd, b[:]); {
		case err == unix.EAGAIN || err == unix.EINTR:
		case err != nil:
			return 0, 0, err
		case n == 0:
			return 0, 0, nil
		case n == 8:
			return *(*int32)(unsafe.Pointer(&b[0])), unix.Errno(*(*int32)(unsafe.Pointer(&b[4]))), nil
		default:
			return 0, 0, fmt.Errorf("the loader wrote %d bytes", n)
		}
	}
}

// signalInit sends a signal to the first process, and to no other that has got its
// pid.
func (c *Container) signalInit(sig unix.Signal) error {
	fd, err := unix.PidfdOpen(c.state.Pid, 0)
	if err == nil {
		defer unix.Close(fd)
		if !alive(c.state.Pid, c.state.StartTime) {
			err = unix.ESRCH
		} else {
			err = unix.PidfdSendSignal(fd, sig, nil, 0)
		}
	}
	if errors.Is(err, unix.ESRCH) {
		return classed.Errorf(errdefs.ErrNotFound, "container %q: container not running", c.ID())
	}
	if err != nil {
		return fmt.Errorf("container %q: signal %d: %w", c.ID(), int(sig), err)
	}
	return nil
}

// Kill sends a signal to the container's first process. Signal 0 asks whether it lives.
func (c *Container) Kill(ctx context.Context, sig unix.Signal) error {
	if err := c.signalInit(sig); err != nil {
		return err
	}
	if sig == unix.SIGKILL {
		// A frozen process of cgroup v1 only dies when it is thawed.
		if frozen, err := c.frozen(); err == nil && frozen {
			return c.cgroup().Thaw()
		}
		if s, err := c.readBrief(); err == nil && !ownPidNamespace(s) {
			// Without a PID namespace nobody ends the others with the first.
			return c.KillAll(ctx, sig)
		}
	}
	return nil
}

// ownPidNamespace: the kernel ends all processes with the first one.
func ownPidNamespace(s *specs.Spec) bool {
	if s.Linux == nil {
		return false
	}
	for _, n := range s.Linux.Namespaces {
		if n.Type == specs.PIDNamespace {
			return n.Path == ""
		}
	}
	return false
}

// KillAll sends a signal to every process of the container. That there is none is no
// error.
func (c *Container) KillAll(ctx context.Context, sig unix.Signal) error {
	if len(c.state.Cgroups) > 0 && sig == unix.SIGKILL {
		if err := c.cgroup().Kill(); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("container %q: %w", c.ID(), err)
		}
		return nil
	}
	pids, err := c.Processes()
	if err != nil {
		return fmt.Errorf("container %q: %w", c.ID(), err)
	}
	var errs []error
	for _, pid := range pids {
		if err := unix.Kill(pid, sig); err != nil && err != unix.ESRCH {
			errs = append(errs, fmt.Errorf("container %q: signal %d to %d: %w", c.ID(), int(sig), pid, err))
		}
	}
	return errors.Join(errs...)
}

// Pause freezes all processes.
func (c *Container) Pause(context.Context) error {
	unlock, err := c.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := c.require("container not running", Running, Created); err != nil {
		return err
	}
	if err := c.needCgroup(); err != nil {
		return err
	}
	return c.cgroup().Freeze()
}

// Resume thaws them.
func (c *Container) Resume(context.Context) error {
	unlock, err := c.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := c.require("container not paused", Paused); err != nil {
		return err
	}
	return c.cgroup().Thaw()
}

// Update changes limits. When one cannot be set, those before it are taken back, but for
// device rules.
func (c *Container) Update(ctx context.Context, r *specs.LinuxResources) error {
	return c.UpdateAll(ctx, r, nil)
}

// UpdateAll is Update that changes the schemata of the container's resctrl group, too. It is
// an error if the container has none and i has one.
func (c *Container) UpdateAll(_ context.Context, r *specs.LinuxResources, i *specs.LinuxIntelRdt) error {
	unlock, err := c.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := c.require("container not running", Running, Created, Paused); err != nil {
		return err
	}
	if err := c.needCgroup(); err != nil {
		return err
	}
	if len(r.Devices) > 0 {
		r = withDevices(r)
	}
	undo, err := c.cgroup().Change(r)
	if err != nil {
		return fmt.Errorf("container %q: %w", c.ID(), err)
	}
	back, err := c.changeRdt(i)
	if err == nil {
		// What systemd has been told is not taken back: nothing after it can fail.
		if err = c.updateUnit(r); err == nil {
			return nil
		}
		err = errors.Join(err, back())
	}
	return fmt.Errorf("container %q: %w", c.ID(), errors.Join(err, undo()))
}

// deleteLimit bounds how long Delete waits for killed processes to go.
const deleteLimit = 10 * time.Second

// Delete removes a stopped container; with force also one that is not, by killing it.
func (c *Container) Delete(ctx context.Context, force bool) error {
	unlock, err := c.lock()
	if errdefs.IsNotFound(err) && len(c.state.Cgroups) > 0 {
		// Somebody has removed the state, perhaps not the rest. Only cgroups without processes go.
		if cerr := c.cgroup().Delete(); cerr != nil {
			c.r.log().Debug("cgroup of a container whose state is gone", "id", c.ID(), "error", cerr)
		}
	}
	if err != nil {
		return err
	}
	defer unlock()
	return c.remove(ctx, force)
}

// remove is Delete by somebody who holds the lock.
func (c *Container) remove(ctx context.Context, force bool) error {
	st, err := c.Status()
	if err != nil && !force {
		return err
	}
	if st != Stopped {
		if !force && st != Created && st != Creating {
			return classed.Errorf(errdefs.ErrFailedPrecondition, "cannot delete container %s that is not stopped: %s", c.ID(), st)
		}
		if err := c.destroy(); err != nil {
			return err
		}
	}
	s, specErr := c.readBrief()
	if len(c.state.Cgroups) > 0 {
		if specErr != nil || !ownPidNamespace(s) {
			// The first process may have left others behind.
			if err := c.cgroup().Kill(); err != nil && !errdefs.IsNotFound(err) {
				c.r.log().Warn("cannot kill what is left in the cgroup", "id", c.ID(), "error", err)
			}
		}
		if err := c.stopUnit(); err != nil {
			// Without its cgroup the unit ends by itself.
			c.r.log().Warn("cannot stop the systemd unit", "id", c.ID(), "error", err)
		}
		err := c.cgroup().Delete()
		if err != nil {
			err = errors.Join(c.cgroup().Kill(), c.cgroup().Delete())
		}
		if err != nil {
			return fmt.Errorf("container %q: %w", c.ID(), err)
		}
	}
	if c.state.Rdt != nil {
		if err := c.state.Rdt.Delete(); err != nil {
			return fmt.Errorf("container %q: %w", c.ID(), err)
		}
	}
	if err := c.removeDir(); err != nil {
		return err
	}
	if specErr == nil {
		c.poststop(ctx, s)
	}
	return nil
}

// removeDir removes the state, which makes the container unknown.
func (c *Container) removeDir() error {
	for _, name := range []string{stateFile, startFifo, reportFifo, configFile} {
		_ = unix.Unlink(filepath.Join(c.dir, name))
	}
	if unix.Rmdir(c.dir) == nil {
		return nil
	}
	return os.RemoveAll(c.dir)
}

// destroy kills the container's processes and waits until the first one has ended.
func (c *Container) destroy() error {
	fd, err := unix.PidfdOpen(c.state.Pid, 0)
	if err != nil || !alive(c.state.Pid, c.state.StartTime) {
		if err == nil {
			unix.Close(fd)
		}
		return nil
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && err != unix.ESRCH {
		return fmt.Errorf("container %q: kill: %w", c.ID(), err)
	}
	if frozen, err := c.frozen(); err == nil && frozen {
		if err := c.cgroup().Thaw(); err != nil {
			return fmt.Errorf("container %q: %w", c.ID(), err)
		}
	}
	if !ends(fd, deleteLimit) {
		return classed.Errorf(errdefs.ErrUnavailable, "container %q: its process %d does not die", c.ID(), c.state.Pid)
	}
	return nil
}
