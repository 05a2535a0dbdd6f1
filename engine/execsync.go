package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/shim/client"
)

const (
	// execSyncDead is how long ExecSync waits at its deadline for what it has killed to be gone.
	execSyncDead = time.Second
	// startPoll is how often the shim is asked how a start went.
	startPoll = 50 * time.Millisecond
)

// ExecOutput is what a command wrote and how it ended.
type ExecOutput struct {
	Stdout, Stderr []byte
	ExitCode       int
}

// ExecSync runs a command in a running container, with nothing on stdin. Of the output,
// limit bytes are kept of both streams together; the rest is dropped, and the command goes
// on. It returns when the command has ended, whatever holds its output open.
//
// At the deadline (a positive timeout, or ctx's end) the command is killed with all its
// descendants, and the error is context.DeadlineExceeded, or ctx's. Nothing else stays
// either: there is no record of the exec, and clients cannot inspect it.
func (e *Engine) ExecSync(ctx context.Context, ref string, cmd []string, timeout time.Duration, limit int) (ExecOutput, error) {
	c, err := e.containers.get(ref)
	if err != nil {
		return ExecOutput{}, err
	}
	cfg := ExecConfig{Container: c.id, Cmd: cmd, AttachStdout: true, AttachStderr: true}
	if err := cfg.validate(); err != nil {
		return ExecOutput{}, err
	}
	r, err := c.live("exec")
	if err != nil {
		return ExecOutput{}, err
	}
	fail := func(err error) (ExecOutput, error) {
		return ExecOutput{}, fmt.Errorf("exec in container %s: %w", c.id, err)
	}
	x := &execution{id: "sync-" + newID()[:24], c: c, cfg: cfg, done: make(chan struct{})}
	proc, err := e.execProcess(x, r)
	if err != nil {
		return fail(err)
	}
	deadline := context.Background()
	if timeout > 0 {
		var cancel context.CancelFunc
		deadline, cancel = context.WithTimeout(deadline, timeout)
		defer cancel()
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(deadline, func() {
		cancel(fmt.Errorf("command did not end in %v: %w", timeout, context.DeadlineExceeded))
	})()
	defer context.AfterFunc(e.ctx, func() { cancel(errClosed) })()

	run := syncExec{e: e, shim: r.shim.get(), id: c.id, execID: x.id, limit: limit}
	o := client.ExecOptions{ID: c.id, ExecID: x.id, Spec: proc}
	err = run.inOne(ctx, o)
	if run.old {
		if err = run.shim.Exec(ctx, o); err != nil {
			if ctx.Err() != nil {
				run.abandon() // it may have been added all the same
				return fail(context.Cause(ctx))
			}
			return fail(err)
		}
		err = run.do(ctx)
	}
	var start *client.StartError
	switch {
	case ctx.Err() != nil && !run.ended:
		run.abandon()
		return fail(context.Cause(ctx))
	case errors.As(err, &start):
		_, err = execError(err)
		return ExecOutput{}, err
	case err != nil && !run.started && !run.old:
		run.abandon() // the shim may do it yet
		return fail(err)
	case err != nil && !run.started:
		run.abandon()
		_, err = execError(err)
		return ExecOutput{}, err
	case err != nil:
		run.abandon()
		return fail(err)
	}
	if run.old {
		run.forget()
	}
	out := ExecOutput{ExitCode: run.code}
	out.Stdout, out.Stderr = fitOutput(run.out[0], run.out[1], limit)
	return out, nil
}

// syncExec is an exec under way.
type syncExec struct {
	e          *Engine
	shim       Shim
	id, execID string
	limit      int  // of each stream, in bytes
	old        bool // the shim does not know how to run a process in one exchange

	pid     int // 0: not known to run
	began   uint64
	asked   bool // its start was asked for
	started bool // it runs, or has run
	ended   bool // code and out are complete
	code    int
	out     [2][]byte
	late    chan runOutcome // of a start that nobody waits for any more
}

// runner is a shim that adds a process, attaches to it and starts it in one exchange (client.Shim.Run). Each of the three takes a
// wakeup of the other side and one back, and an exec is short.
type runner interface {
	Run(ctx context.Context, o client.ExecOptions) (client.RunStream, int, error)
}

// runOutcome is what such an exchange comes to.
type runOutcome struct {
	s   client.RunStream
	pid int
	err error
}

// inOne runs the process to its end with one exchange. If the shim cannot do that, old is set.
func (x *syncExec) inOne(ctx context.Context, o client.ExecOptions) error {
	shim := x.shim
	if m, ok := shim.(memberShim); ok {
		shim = m.Shim
	}
	r, ok := shim.(runner)
	if !ok {
		x.old = true
		return nil
	}
	// Whoever gives up has to know what became of it.
	outcome := make(chan runOutcome, 1)
	x.e.background(func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, startLimit)
		defer cancel()
		defer context.AfterFunc(x.e.ctx, cancel)()
		var got runOutcome
		got.s, got.pid, got.err = r.Run(ctx, o)
		outcome <- got
	})
	var got runOutcome
	select {
	case got = <-outcome:
	case <-ctx.Done():
		x.late = outcome
		return context.Cause(ctx)
	}
	s, pid, err := got.s, got.pid, got.err
	var start *client.StartError
	if errdefs.IsNotFound(err) && !errors.As(err, &start) {
		x.old = true
		return nil
	}
	x.asked = true
	if err != nil {
		return err
	}
	x.runs(pid)
	if err := x.read(ctx, s); err != nil {
		return err
	}
	x.code, x.ended = s.ExitStatus(), true
	return nil
}

// do runs the process to its end.
func (x *syncExec) do(ctx context.Context) error {
	s, err := x.shim.Attach(ctx, client.AttachOptions{ID: x.id, ExecID: x.execID, Stdout: true, Stderr: true})
	if err != nil {
		return err
	}
	x.asked = true
	pid, err := x.shim.Start(ctx, x.id, x.execID)
	if err != nil {
		s.Close()
		return err
	}
	x.runs(pid)
	if err := x.read(ctx, s); err != nil {
		return err
	}
	exit, err := x.shim.Wait(ctx, x.id, x.execID) // the end of the output comes after it
	if err != nil {
		return err
	}
	x.code, x.ended = int(exit.Status), true
	return nil
}

// runs notes that the process has been started.
func (x *syncExec) runs(pid int) {
	x.pid, x.started = pid, true
	x.began = processStart(pid)
}

// read collects the output to its end.
func (x *syncExec) read(ctx context.Context, s client.Stream) error {
	defer s.Close()
	defer context.AfterFunc(ctx, func() { s.Close() })()
	for {
		stream, p, err := s.ReadFrame()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read its output: %w", err)
		}
		if stream == 1 || stream == 2 {
			buf := &x.out[stream-1]
			*buf = append(*buf, p[:min(len(p), x.limit-len(*buf))]...)
		}
	}
}

// forget makes the shim forget an ended process.
func (x *syncExec) forget() {
	x.e.background(func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, cleanupLimit)
		defer cancel()
		if _, err := x.shim.Delete(ctx, x.id, x.execID); err != nil && !errdefs.IsNotFound(err) {
			x.e.log.Debug("delete exec", "container", x.id, "exec", x.execID, "error", err)
		}
	})
}

// abandon kills the process with its descendants, and forgets it. It returns when they
// are gone, or after execSyncDead; what is left to do then goes on without the caller.
func (x *syncExec) abandon() {
	gone := make(chan struct{})
	x.e.background(func(ctx context.Context) {
		defer close(gone)
		ctx, cancel := context.WithTimeout(ctx, cleanupLimit)
		defer cancel()
		switch {
		case x.late != nil:
			if got := <-x.late; got.err == nil {
				x.runs(got.pid)
				defer got.s.Close()
			}
		case x.asked && !x.started:
			x.find(ctx)
		}
		if x.pid > 0 && x.began > 0 {
			if err := killTree(x.pid, x.began, execSyncDead); err != nil {
				x.e.log.Warn("kill the processes of an exec", "container", x.id, "pid", x.pid, "error", err)
			}
		}
		err := x.shim.Kill(ctx, x.id, x.execID, int(unix.SIGKILL), false)
		if err == nil && x.pid > 0 {
			_, _ = x.shim.Wait(ctx, x.id, x.execID)
		}
		if _, err := x.shim.Delete(ctx, x.id, x.execID); err != nil && !errdefs.IsNotFound(err) {
			x.e.log.Debug("delete exec", "container", x.id, "exec", x.execID, "error", err)
		}
	})
	select {
	case <-gone:
	case <-time.After(execSyncDead):
	}
}

// find waits for the outcome of a start that was cut short.
func (x *syncExec) find(ctx context.Context) {
	for ctx.Err() == nil {
		st, err := x.shim.State(ctx, x.id, x.execID)
		if err != nil || st.Status == client.StatusStopped {
			return
		}
		if st.Status == client.StatusRunning && st.Pid > 0 {
			x.pid, x.began = st.Pid, processStart(st.Pid)
			return
		}
		select {
		case <-time.After(startPoll):
		case <-ctx.Done():
		}
	}
}

// fitOutput cuts two streams so that both together have no more than max bytes. Each may
// have half, and what the other leaves.
func fitOutput(a, b []byte, max int) ([]byte, []byte) {
	over := len(a) + len(b) - max
	switch {
	case over <= 0:
	case len(a) <= max/2:
		b = b[:max-len(a)]
	case len(b) <= max/2:
		a = a[:max-len(b)]
	default:
		a, b = a[:max/2], b[:max/2]
	}
	return a, b
}

// ReleaseExec says that nobody will ask for an exec any more. It is forgotten, or will be
// once it has ended. One that runs on a terminal is hung up: its client has gone.
func (e *Engine) ReleaseExec(ctx context.Context, id string) {
	x, err := e.execs.get(id)
	if err != nil {
		return
	}
	c := x.c
	forget := func() {
		e.execs.remove(x.id)
		c.mu.Lock()
		defer c.mu.Unlock()
		c.execs = without(c.execs, x.id)
	}
	c.mu.Lock()
	state, r := x.state, c.run
	c.mu.Unlock()
	if state != execRunning {
		forget()
		return
	}
	if x.cfg.TTY && r != nil {
		e.background(func(ctx context.Context) {
			ctx, cancel := context.WithTimeout(ctx, killLimit)
			defer cancel()
			if err := r.shim.get().Kill(ctx, c.id, x.id, int(unix.SIGHUP), false); err != nil && !errdefs.IsNotFound(err) {
				e.log.Debug("hang up exec", "container", c.id, "exec", x.id, "error", err)
			}
		})
	}
	e.work.Go(func() {
		select {
		case <-x.done:
			forget()
		case <-e.ctx.Done():
		}
	})
}

// without is a copy of m that lacks a key: readers of m hold no lock.
func without[V any](m map[string]V, key string) map[string]V {
	out := make(map[string]V, len(m))
	for k, v := range m {
		if k != key {
			out[k] = v
		}
	}
	return out
}
