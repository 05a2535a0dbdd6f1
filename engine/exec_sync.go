package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ExecOutput is what a command wrote and how it ended.
type ExecOutput struct {
	Stdout, Stderr []byte
	ExitCode       int
}

// execDrain is how long output is waited for that may still come from a command that has
// ended: one of its children may keep its streams for ever.
const execDrain = 100 * time.Millisecond

// ExecSync runs a command in a container and waits for it. timeout 0 is no limit; one that
// is exceeded is context.DeadlineExceeded, and kills the command with all that it started. Of
// the output limit bytes are kept, the rest is read and thrown away.
func (e *Engine) ExecSync(ctx context.Context, ref string, cmd []string, timeout time.Duration, limit int) (ExecOutput, error) {
	var out ExecOutput
	id, err := e.CreateExec(ctx, ExecConfig{Container: ref, Cmd: cmd, AttachStdout: true, AttachStderr: true})
	if err != nil {
		return out, err
	}
	x, err := e.execs.get(id)
	if err != nil {
		return out, err
	}
	defer e.forgetExec(x)
	start := time.Now()
	a, err := e.AttachExec(ctx, id)
	if err != nil {
		return out, err
	}
	defer a.Close()
	read := make(chan error, 1)
	go func() { read <- collect(a, &out, limit) }()
	var over <-chan time.Time
	if timeout > 0 {
		t := time.NewTimer(timeout - time.Since(start))
		defer t.Stop()
		over = t.C
	}
	select {
	case err := <-read:
		if err != nil {
			return out, fmt.Errorf("read the output of a command in container %s: %w", ref, err)
		}
	case <-x.done:
		select {
		case <-read:
		case <-time.After(execDrain):
			a.Close() // the reader ends
			<-read
		}
	case <-over:
		e.killTree(x)
		a.Close()
		<-read
		return out, fmt.Errorf("command in container %s exceeded its timeout of %v: %w", ref, timeout, context.DeadlineExceeded)
	case <-ctx.Done():
		e.killTree(x)
		a.Close()
		<-read
		return out, context.Cause(ctx)
	}
	select {
	case <-x.done:
	case <-ctx.Done():
		return out, context.Cause(ctx)
	}
	x.c.mu.Lock()
	defer x.c.mu.Unlock()
	if x.code != nil {
		out.ExitCode = *x.code
	}
	return out, nil
}

// collect reads both streams to their end.
func collect(a Attachment, out *ExecOutput, limit int) error {
	for {
		stream, p, err := a.ReadFrame()
		to := &out.Stdout
		if stream == 2 {
			to = &out.Stderr
		}
		if room := limit - len(out.Stdout) - len(out.Stderr); room > 0 {
			*to = append(*to, p[:min(len(p), room)]...)
		}
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// forgetExec drops an exec that nobody can ask for.
func (e *Engine) forgetExec(x *execution) {
	e.execs.remove(x.id)
	x.c.mu.Lock()
	defer x.c.mu.Unlock()
	m := make(map[string]*execution, len(x.c.execs))
	for id, o := range x.c.execs {
		if id != x.id {
			m[id] = o
		}
	}
	x.c.execs = m
}

// killTree kills an exec'd process with everything that it started: its descendants, and
// those of its session that have lost their parent.
func (e *Engine) killTree(x *execution) {
	x.c.mu.Lock()
	pid, r := x.pid, x.c.run
	x.c.mu.Unlock()
	if pid == 0 || r == nil {
		return
	}
	// A process that forks while it is looked for is found by the next look.
	for range 5 {
		victims := processTree(pid)
		for _, v := range victims {
			v.kill()
		}
		if len(victims) == 0 {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// victim is a process that is held by a descriptor, so that its number cannot become another's.
type victim struct{ fd int }

func (v victim) kill() {
	_ = unix.PidfdSendSignal(v.fd, unix.SIGKILL, nil, 0)
	unix.Close(v.fd)
}

// processTree finds the live processes below a process and in its session. The process is
// the leader of a session of its own.
func processTree(root int) []victim {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil
	}
	parents, sessions := map[int]int{}, map[int]int{}
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		i := strings.LastIndexByte(string(b), ')')
		if i < 0 {
			continue
		}
		f := strings.Fields(string(b[i+1:])) // state, parent, group, session
		if len(f) < 4 || f[0] == "Z" || f[0] == "X" {
			continue
		}
		parents[pid], _ = strconv.Atoi(f[1])
		sessions[pid], _ = strconv.Atoi(f[3])
	}
	below := func(pid int) bool {
		for range 1000 { // a list that changed while it was read may hold a circle
			if pid == root {
				return true
			}
			next, ok := parents[pid]
			if !ok || next == 0 {
				return false
			}
			pid = next
		}
		return false
	}
	var out []victim
	for pid := range parents {
		if sessions[pid] != root && !below(pid) {
			continue
		}
		if fd, err := unix.PidfdOpen(pid, 0); err == nil {
			out = append(out, victim{fd})
		}
	}
	return out
}
