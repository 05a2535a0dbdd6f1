package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	defaultStopTimeout = 10 * time.Second
	// maxStopTimeout is the longest grace, in seconds: a hundred years.
	maxStopTimeout = 100 * 365 * 24 * 3600
	// killLimit is how long a killed process may take to be gone.
	killLimit = 10 * time.Second
	// settleLimit is how long after its start a process may still be setting its handlers of signals.
	settleLimit = 3 * time.Second
	settlePoll  = 20 * time.Millisecond
)

// StopContainer asks a container to end, and kills it after the timeout. Others may
// stop, kill or remove it meanwhile. A container that does not run is ErrNotModified.
func (e *Engine) StopContainer(ctx context.Context, ref string, o StopOptions) error {
	c, g, err := e.lookup(ctx, ref)
	if err != nil {
		return err
	}
	if g != nil {
		return e.stopGuest(ctx, g, o)
	}
	if err := c.require("stop"); err != nil {
		return err
	}
	return e.stop(ctx, c, o)
}

func (e *Engine) stop(ctx context.Context, c *container, o StopOptions) error {
	v := c.view()
	sig, timeout, err := stopParameters(v, o)
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.rec.StoppedByUser = true
	r := c.run
	c.mu.Unlock()
	if c.stopRestarting() {
		// Its next start may be under way already.
		if err := c.acquire(ctx); err != nil {
			return fmt.Errorf("stop container %s: %w", c.id, err)
		}
		c.mu.Lock()
		r = c.run
		c.mu.Unlock()
		c.release()
		if r == nil {
			e.saveLater(c)
			e.emit(c, "stop")
			return nil
		}
	}
	if r == nil {
		return nil
	}
	// The client's going away does not stop the stopping.
	ctx = context.WithoutCancel(ctx)
	if err := e.signal(ctx, c, r, sig, false); err != nil {
		e.log.Warn("signal container", "container", c.id, "signal", sig, "error", err)
	}
	if time.Since(r.started) < settleLimit {
		e.work.Go(func() { e.signalAgain(c, r, sig) })
	}
	ended, err := e.waitStopped(r, timeout)
	if err != nil {
		return fmt.Errorf("stop container %s: %w", c.id, err)
	}
	if !ended {
		if err := e.signal(ctx, c, r, int(unix.SIGKILL), true); err != nil {
			e.log.Warn("kill container", "container", c.id, "error", err)
		}
		if !waitDone(r, killLimit) {
			return fmt.Errorf("cannot stop container: %s: tried to kill container, but did not receive an exit event: %w", c.id, errdefs.ErrUnavailable)
		}
	}
	e.emit(c, "stop")
	return nil
}

// signalAgain sends a signal once more to a process that was not yet prepared for it. The
// kernel drops what the first process of a PID namespace does not handle, and one that has
// just been started has not come to set its handlers.
func (e *Engine) signalAgain(c *container, r *run, sig int) {
	caught, first := signalCaught(int(r.pid.Load()), sig)
	if caught || !first {
		return
	}
	t := time.NewTicker(settlePoll)
	defer t.Stop()
	for time.Since(r.started) < settleLimit {
		select {
		case <-t.C:
		case <-r.done:
			return
		case <-e.stopping:
			return
		}
		if caught, first = signalCaught(int(r.pid.Load()), sig); !first {
			return
		}
		if caught {
			ctx, cancel := context.WithTimeout(e.ctx, killLimit)
			defer cancel()
			if err := r.shim.get().Kill(ctx, c.id, "", sig, false); err != nil && !errdefs.IsNotFound(err) {
				e.log.Warn("signal container", "container", c.id, "signal", sig, "error", err)
			}
			return
		}
	}
}

// signalCaught tells whether a process handles or ignores a signal, and whether it is the
// first one of its PID namespace (proc_pid_status(5)).
func signalCaught(pid, sig int) (caught, first bool) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return false, false
	}
	for line := range strings.Lines(string(b)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		switch key {
		case "NSpid":
			f := strings.Fields(value)
			first = len(f) > 1 && f[len(f)-1] == "1"
		case "SigCgt", "SigIgn":
			mask, _ := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
			caught = caught || mask&(1<<(sig-1)) != 0
		}
	}
	return caught, first
}

// stopParameters are the signal and timeout of a stop; timeout < 0: for ever.
func stopParameters(v Container, o StopOptions) (sig int, timeout time.Duration, err error) {
	name := o.Signal
	if name == "" {
		name = v.StopSignal
	}
	if name == "" {
		name = "SIGTERM"
	}
	if sig, err = parseSignal(name); err != nil {
		return 0, 0, err
	}
	timeout = defaultStopTimeout
	seconds := o.Timeout
	if seconds == nil {
		seconds = v.Config.StopTimeout
	}
	if seconds != nil {
		timeout = time.Duration(min(*seconds, maxStopTimeout)) * time.Second // the kubelet hands on any number that a pod has
	}
	return sig, timeout, nil
}

// waitStopped is waitDone until the daemon stops.
func (e *Engine) waitStopped(r *run, timeout time.Duration) (ended bool, err error) {
	var over <-chan time.Time
	if timeout >= 0 {
		t := time.NewTimer(timeout)
		defer t.Stop()
		over = t.C
	}
	select {
	case <-r.done:
		return true, nil
	case <-over:
		return false, nil
	case <-e.stopping:
		return false, errClosed
	}
}

// waitDone waits until the end of a run was handled.
func waitDone(r *run, timeout time.Duration) bool {
	if timeout < 0 {
		<-r.done
		return true
	}
	t := time.NewTimer(timeout)
	defer t.Stop()
	select {
	case <-r.done:
		return true
	case <-t.C:
		return false
	}
}

// signal sends a signal to a run, and thaws a paused one so that it gets it.
func (e *Engine) signal(ctx context.Context, c *container, r *run, sig int, all bool) error {
	if sig == int(unix.SIGKILL) {
		r.killed.Store(true) // before the signal: see freeze
	}
	if !e.tellKill(c, r, sig) {
		return nil
	}
	shim := r.shim.get()
	ctx, cancel := context.WithTimeout(ctx, killLimit)
	defer cancel()
	err := shim.Kill(ctx, c.id, "", sig, all)
	if errdefs.IsNotFound(err) {
		err = nil // ended already: the exit is on its way
	}
	e.thaw(ctx, c, r)
	return err
}

// tellKill publishes a signal that is about to be sent: once it is sent the end may be told at any time. It is false, and
// publishes nothing, if that was told already.
func (e *Engine) tellKill(c *container, r *run, sig int) bool {
	r.ending.Lock()
	defer r.ending.Unlock()
	select {
	case <-r.done:
		return false
	default:
		e.emit(c, "kill", "signal", strconv.Itoa(sig))
		return true
	}
}

// tellDie publishes the end of a run, which is then handled.
func (e *Engine) tellDie(c *container, r *run, exitCode int, ran time.Duration) {
	r.ending.Lock()
	defer r.ending.Unlock()
	e.emit(c, "die", "exitCode", strconv.Itoa(exitCode), "execDuration", strconv.Itoa(int(ran.Seconds())))
	close(r.done)
}

// KillContainer sends a signal ("": SIGKILL) to a running container. With SIGKILL it
// returns when the container has ended.
func (e *Engine) KillContainer(ctx context.Context, ref, signal string) error {
	if signal == "" {
		signal = "SIGKILL"
	}
	sig, err := parseSignal(signal)
	if err != nil {
		return err
	}
	c, g, err := e.lookup(ctx, ref)
	if err != nil {
		return err
	}
	if g != nil {
		return e.killGuest(ctx, g, sig)
	}
	r, err := c.live("kill")
	if err != nil {
		if c.status() == StatusRestarting && sig == int(unix.SIGKILL) {
			return e.stop(ctx, c, StopOptions{})
		}
		return err
	}
	stop, _, _ := stopParameters(c.view(), StopOptions{})
	if sig == int(unix.SIGKILL) || sig == stop {
		c.mu.Lock()
		c.rec.StoppedByUser = true // the policy shall not undo what the user did
		c.mu.Unlock()
	}
	ctx = context.WithoutCancel(ctx)
	if err := e.signal(ctx, c, r, sig, false); err != nil {
		return fmt.Errorf("cannot kill container: %s: %w", ref, err)
	}
	if sig == int(unix.SIGKILL) && !waitDone(r, killLimit) {
		return fmt.Errorf("cannot kill container: %s: tried to kill container, but did not receive an exit event: %w", ref, errdefs.ErrUnavailable)
	}
	return nil
}

// RestartContainer stops a container if it runs, and starts it.
func (e *Engine) RestartContainer(ctx context.Context, ref string, o StopOptions) error {
	c, g, err := e.lookup(ctx, ref)
	if err != nil {
		return err
	}
	if g != nil {
		return g.foreignTo("restart")
	}
	if err := c.require("restart"); err != nil {
		return err
	}
	if c.require("stop") == nil {
		// An automatic removal in between would leave nothing to start.
		c.mu.Lock()
		c.restarts++
		c.mu.Unlock()
		err := e.stop(ctx, c, o)
		c.mu.Lock()
		c.restarts--
		c.mu.Unlock()
		if err != nil {
			return err
		}
	}
	if err := e.StartContainer(ctx, c.id); err != nil && !errors.Is(err, errdefs.ErrNotModified) {
		return fmt.Errorf("Cannot restart container %s: %w", ref, err)
	}
	e.emit(c, "restart")
	return nil
}

// PauseContainer freezes the processes of a container.
func (e *Engine) PauseContainer(ctx context.Context, ref string) error {
	return e.freeze(ctx, ref, "pause", StatusPaused, Shim.Pause)
}

// pauseFor pauses a container for an operation that lets it go on at its end. It waits for the outcome, whether the
// client does or not: else nobody would let it go on.
func (e *Engine) pauseFor(ctx context.Context, ref string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*changeLimit)
	defer cancel()
	return e.PauseContainer(ctx, ref)
}

// UnpauseContainer thaws them.
func (e *Engine) UnpauseContainer(ctx context.Context, ref string) error {
	return e.freeze(ctx, ref, "unpause", StatusRunning, Shim.Resume)
}

// changeLimit bounds a change of what runs, which goes on if its client goes away: else nobody
// would know what it is.
const changeLimit = 30 * time.Second

func (e *Engine) freeze(ctx context.Context, ref, op string, to Status, do func(Shim, context.Context, string) error) error {
	c, g, err := e.lookup(ctx, ref)
	if err != nil {
		return err
	}
	if g != nil {
		return e.freezeGuest(ctx, g, to)
	}
	if err := c.acquire(ctx); err != nil {
		return fmt.Errorf("%s container %s: %w", op, ref, err)
	}
	r, err := c.live(op)
	if err != nil {
		c.release()
		return err
	}
	done := make(chan error, 1)
	e.work.Go(func() {
		defer c.release()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), changeLimit)
		defer cancel()
		done <- e.freezeHeld(ctx, c, r, op, to, do)
	})
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("%s container %s: %w", op, ref, context.Cause(ctx))
	}
}

// freezeHeld freezes or thaws a container whose ticket the caller holds.
func (e *Engine) freezeHeld(ctx context.Context, c *container, r *run, op string, to Status, do func(Shim, context.Context, string) error) error {
	if err := do(r.shim.get(), ctx, c.id); err != nil {
		return fmt.Errorf("Cannot %s container %s: %w", op, c.id, err)
	}
	if err := c.change(to, nil); err != nil {
		return err
	}
	e.emit(c, op)
	// Whoever killed it meanwhile saw it running, and thaws it only if it is paused: as long as it is frozen
	// it does not end.
	if to == StatusPaused && r.killed.Load() {
		e.thaw(ctx, c, r)
	}
	return nil
}

// thaw lets a paused container go on, so that it gets a signal.
func (e *Engine) thaw(ctx context.Context, c *container, r *run) {
	if c.status() != StatusPaused || r.shim.get().Resume(ctx, c.id) != nil {
		return
	}
	if c.change(StatusRunning, nil) == nil { // it may have ended since
		e.emit(c, "unpause")
	}
}
