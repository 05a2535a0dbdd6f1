//go:build linux && (amd64 || arm64)

package oci

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// hookOutput bounds what an error quotes of a hook's output.
const hookOutput = 4096

// runSetupHooks runs the hooks between the mounts and pivot_root.
func (k *creation) runSetupHooks(pid int) (err error) {
	defer func() { k.hookFailed = err != nil }()
	k.c.state.Pid = pid
	if k.c.state.StartTime, _, err = startTime(pid); err != nil {
		return err
	}
	// The environment is made (step 2 of the life cycle), so the specification calls
	// the container created, although the create operation has not returned.
	st := k.c.specState(Created)
	h := k.spec.Hooks
	for _, list := range []struct {
		name  string
		hooks []specs.Hook
	}{{"prestart", h.Prestart}, {"createRuntime", h.CreateRuntime}} { //nolint:staticcheck // prestart is deprecated, not gone
		for i := range list.hooks {
			if err := k.r.runHook(k.ctx, list.name, i, list.hooks[i], st, nil); err != nil {
				return err
			}
		}
	}
	for i := range h.CreateContainer {
		if err := k.c.hookInside(k.ctx, "createContainer", i, h.CreateContainer[i], st); err != nil {
			return err
		}
	}
	return nil
}

func (c *Container) startContainerHooks(ctx context.Context, s *specs.Spec) error {
	if s.Hooks == nil {
		return nil
	}
	for i := range s.Hooks.StartContainer {
		if err := c.hookInside(ctx, "startContainer", i, s.Hooks.StartContainer[i], c.specState(Created)); err != nil {
			return err
		}
	}
	return nil
}

// poststart runs the hooks after the program has been executed.
func (c *Container) poststart(ctx context.Context, s *specs.Spec) error {
	if s.Hooks == nil {
		return nil
	}
	for i := range s.Hooks.Poststart {
		if err := c.r.runHook(ctx, "poststart", i, s.Hooks.Poststart[i], c.specState(Running), nil); err != nil {
			return err
		}
	}
	return nil
}

// abandon destroys a container one of whose hooks has failed, as the specification says
// since 1.3: it is stopped, deleted, and its poststop hooks run. The caller holds the lock.
func (c *Container) abandon(ctx context.Context, why error) error {
	if err := c.remove(context.WithoutCancel(ctx), true); err != nil {
		return errors.Join(why, err)
	}
	return why
}

// poststop runs the hooks after deletion. Failures are only reported.
func (c *Container) poststop(ctx context.Context, s *specs.Spec) {
	if s.Hooks == nil {
		return
	}
	for i := range s.Hooks.Poststop {
		if err := c.r.runHook(ctx, "poststop", i, s.Hooks.Poststop[i], c.specState(Stopped), nil); err != nil {
			c.r.log().Warn("poststop hook failed", "id", c.ID(), "error", err)
		}
	}
}

// hookProcess starts a hook with the given standard descriptors.
type hookProcess func(h specs.Hook, stdin, stdout, stderr *os.File) (pid int, err error)

// runHook runs one hook and waits for it. It gets the state on standard input.
func (r *Runtime) runHook(ctx context.Context, kind string, i int, h specs.Hook, st specs.State, start hookProcess) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("error running %s hook #%d: %s: %w", kind, i, h.Path, err)
		}
	}()
	if start == nil {
		start = r.hookOnHost
	}
	raw, err := json.Marshal(st)
	if err != nil {
		return err
	}
	// A file, so that a hook which does not read its input blocks nobody.
	in, err := memoryFile("hook-state", raw)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := memoryFile("hook-output", nil)
	if err != nil {
		return err
	}
	defer out.Close()
	pid, err := start(h, in, out, out)
	if err != nil {
		return err
	}
	status, err := waitHook(ctx, pid, h.Timeout)
	if err != nil {
		return err
	}
	if status.Exited() && status.ExitStatus() == 0 {
		return nil
	}
	buf := make([]byte, hookOutput)
	n, _ := out.ReadAt(buf, 0)
	text := bytes.TrimSpace(buf[:n])
	if status.Signaled() {
		return fmt.Errorf("signal: %v, output: %s", status.Signal(), text)
	}
	return fmt.Errorf("exit status %d, output: %s", status.ExitStatus(), text)
}

func memoryFile(name string, content []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.WriteAt(content, 0); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (r *Runtime) hookOnHost(h specs.Hook, stdin, stdout, stderr *os.File) (int, error) {
	if r.TimerSlack > 0 {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		r.setTimerSlack()
	}
	args := h.Args
	if len(args) == 0 {
		args = []string{h.Path}
	}
	p, err := os.StartProcess(h.Path, args, &os.ProcAttr{Env: append([]string{}, h.Env...), Files: []*os.File{stdin, stdout, stderr}})
	if err != nil {
		return 0, err
	}
	pid := p.Pid
	return pid, p.Release()
}

// setTimerSlack gives the calling thread the slack that processes are to inherit from it.
func (r *Runtime) setTimerSlack() {
	if r.TimerSlack > 0 {
		_ = unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(r.TimerSlack), 0, 0, 0)
	}
}

// waitHook reaps the hook, and kills it when its time is over.
func waitHook(ctx context.Context, pid int, timeout *int) (status unix.WaitStatus, err error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return 0, os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(fd)
	var deadline time.Time
	if timeout != nil {
		deadline = time.Now().Add(time.Duration(*timeout) * time.Second)
	}
	var fail error
	for fail == nil {
		wait := 500 * time.Millisecond
		if !deadline.IsZero() {
			wait = min(wait, time.Until(deadline))
			if wait <= 0 {
				fail = fmt.Errorf("timed out after %d s", *timeout)
				break
			}
		}
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, int(wait.Milliseconds())+1)
		if n > 0 {
			break
		}
		if err != nil && err != unix.EINTR {
			fail = err
		} else if err := ctx.Err(); err != nil {
			fail = err
		}
	}
	if fail != nil {
		unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	}
	for {
		_, err := unix.Wait4(pid, &status, 0, nil)
		if err != unix.EINTR {
			return status, errors.Join(fail, err)
		}
	}
}
