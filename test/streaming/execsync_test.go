package streaming

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/engine"
)

// first is what the containers' first process is.
const first = "sleep 1000000"

// commands are the command lines of a container's processes, beside its first.
func commands(t *testing.T, e *engine.Engine, id string) (out []string) {
	t.Helper()
	top, err := e.TopContainer(t.Context(), id, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range top.Processes {
		if cmd := row[len(row)-1]; cmd[0] != '[' && cmd != first { // a zombie, which the first process does not reap
			out = append(out, cmd)
		}
	}
	return out
}

// running waits until these commands are what runs in a container, beside its first process. What ExecSync kills on a busy
// machine may end a moment after it.
func running(t *testing.T, e *engine.Engine, id, what string, want ...string) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		left := commands(t, e, id)
		if slices.Equal(left, want) {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("%s: running is %q, not %q", what, left, want)
			return
		}
	}
}

// held are the goroutines and descriptors of this process.
func held(t *testing.T) (goroutines, files int) {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return runtime.NumGoroutine(), len(names)
}

// nothingLeft checks at the end of a test that it left no process in the container,
// no record of an exec, and nothing in the daemon.
func nothingLeft(t *testing.T, e *engine.Engine, id string) {
	t.Helper()
	goroutines, files := held(t)
	t.Cleanup(func() {
		deadline := time.Now().Add(5 * time.Minute)
		for {
			c, err := e.Container(context.Background(), id)
			if err != nil {
				t.Fatal(err)
			}
			left := c.ExecIDs
			if top, err := e.TopContainer(context.Background(), id, nil); err == nil && len(top.Processes) > 1 {
				left = append(left, fmt.Sprint(top.Processes[1:]))
			}
			g, f := held(t)
			if len(left) == 0 && g <= goroutines && f <= files {
				return
			}
			if time.Now().After(deadline) {
				buf := make([]byte, 1<<20)
				t.Fatalf("left: %v; %d goroutines and %d files before, %d and %d after:\n%s", left, goroutines, files, g, f, buf[:runtime.Stack(buf, true)])
			}
			time.Sleep(20 * time.Millisecond)
		}
	})
}

// maxOutput is what the tests keep of a command's output, in bytes.
const maxOutput = 16_000_000

func execSync(e *engine.Engine, ctx context.Context, id string, cmd []string, timeout time.Duration) (stdout, stderr []byte, code int, err error) {
	out, err := e.ExecSync(ctx, id, cmd, timeout, maxOutput)
	return out.Stdout, out.Stderr, out.ExitCode, err
}

// killOthers kills the processes of a container, but for the first.
var killOthers = []string{"sh", "-c", "kill -9 -1"}

func TestExecSync(t *testing.T) {
	e := open(t)
	id := run(t, e, nil)
	nothingLeft(t, e, id)
	ctx := t.Context()
	stdout, stderr, code, err := execSync(e, ctx, id, []string{"sh", "-c", "echo out; echo err >&2; exit 7"}, 5*time.Minute)
	if err != nil || string(stdout) != "out\n" || string(stderr) != "err\n" || code != 7 {
		t.Errorf("%q, %q, %d, %v", stdout, stderr, code, err)
	}
	if _, _, code, err = execSync(e, ctx, id, []string{"sh", "-c", "kill -9 $$"}, 0); err != nil || code != 137 {
		t.Errorf("killed: %d, %v", code, err)
	}
	if stdout, _, _, err := execSync(e, ctx, id, []string{"cat"}, 5*time.Minute); err != nil || len(stdout) > 0 {
		t.Errorf("stdin: %q, %v", stdout, err)
	}
	if _, _, _, err := execSync(e, ctx, id, []string{"no-such-program"}, 5*time.Minute); err == nil || !strings.Contains(err.Error(), "not found") {
		t.Errorf("no program: %v", err)
	}
	if _, _, _, err := execSync(e, ctx, id, nil, 0); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no command: %v", err)
	}
	if _, _, _, err := execSync(e, ctx, "no-such-container", []string{"true"}, 0); !errdefs.IsNotFound(err) {
		t.Errorf("no container: %v", err)
	}
	// A child that keeps the output open holds nobody up.
	stdout, _, code, err = execSync(e, ctx, id, []string{"sh", "-c", "sleep 3002 & echo started"}, 0)
	if err != nil || string(stdout) != "started\n" || code != 0 {
		t.Errorf("%q, %d, %v", stdout, code, err)
	}
	if _, _, code, err := execSync(e, ctx, id, killOthers, 0); err != nil || code != 0 {
		t.Errorf("the child: %d, %v", code, err)
	}
}

// TestExecSyncOutput: more than the API allows is dropped, and the command ends as ever.
func TestExecSyncOutput(t *testing.T) {
	e := open(t)
	id := run(t, e, nil)
	nothingLeft(t, e, id)
	stdout, stderr, code, err := execSync(e, t.Context(), id, []string{"sh", "-c", "yes out | head -c 20000000; yes err | head -c 1000000 >&2; exit 3"}, 5*time.Minute)
	if err != nil || code != 3 || len(stdout)+len(stderr) != maxOutput || len(stderr) != 1_000_000 {
		t.Errorf("%d and %d bytes, %d, %v", len(stdout), len(stderr), code, err)
	}
	if !bytes.HasPrefix(stdout, []byte("out\nout\n")) || !bytes.HasPrefix(stderr, []byte("err\nerr\n")) {
		t.Error("other output")
	}
}

// TestExecSyncDeadline: the whole tree is killed, in time, whatever it does.
func TestExecSyncDeadline(t *testing.T) {
	e := open(t)
	id := run(t, e, nil)
	nothingLeft(t, e, id)
	for name, script := range map[string]string{
		"one process":        "exec sleep 1000",
		"stubborn":           "trap '' TERM HUP INT; while :; do sleep 0.1; done",
		"child with stdout":  "sleep 1001 & sleep 1002",
		"orphan":             "(sleep 1003 & sleep 1004 &) ; sleep 1005",
		"sessions":           "setsid sh -c 'sleep 1006 & sleep 1007' & setsid sleep 1008 & wait",
		"output without end": "yes",
		"closed output":      "exec >/dev/null 2>&1; sleep 1009",
		"many forks":         "while :; do sleep 1010 & sleep 0.01; done",
	} {
		began := time.Now()
		_, _, _, err := execSync(e, t.Context(), id, []string{"sh", "-c", script}, 500*time.Millisecond)
		took := time.Since(began)
		if !errors.Is(err, context.DeadlineExceeded) || took < 500*time.Millisecond {
			t.Errorf("%s: after %v: %v", name, took, err)
		}
		running(t, e, id, name)
	}
	// What a caller that gives up started ends, too.
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, _, _, err := execSync(e, ctx, id, []string{"sh", "-c", "sleep 1011 & sleep 1012"}, 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("cancelled: %v", err)
	}
	for _, timeout := range []time.Duration{time.Nanosecond, time.Millisecond, 3 * time.Millisecond, 5 * time.Millisecond, 8 * time.Millisecond, 12 * time.Millisecond} {
		if _, _, _, err := execSync(e, t.Context(), id, []string{"sh", "-c", "sleep 1013 & sleep 1014"}, timeout); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v: %v", timeout, err)
		}
	}
}

// TestExecSyncLeavesOthersAlone: other execs, and daemons that an earlier one left on purpose.
func TestExecSyncLeavesOthersAlone(t *testing.T) {
	e := open(t)
	id := run(t, e, nil)
	ctx := t.Context()
	if _, _, _, err := execSync(e, ctx, id, []string{"sh", "-c", "setsid sleep 2001 >/dev/null 2>&1 &"}, 5*time.Minute); err != nil {
		t.Fatal(err)
	}
	other := make(chan int, 1)
	go func() {
		_, _, code, _ := execSync(e, ctx, id, []string{"sh", "-c", "sleep 1.5; exit 9"}, 0)
		other <- code
	}()
	time.Sleep(200 * time.Millisecond)
	if _, _, _, err := execSync(e, ctx, id, []string{"sleep", "1000"}, 300*time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if code := <-other; code != 9 {
		t.Errorf("another exec ended with %d", code)
	}
	running(t, e, id, "the others", "sleep 2001")
	if c, err := e.Container(ctx, id); err != nil || c.State.Status != engine.StatusRunning {
		t.Errorf("container: %v, %v", c.State.Status, err)
	}
}

// TestExecSyncContainerEnds: an exec ends with its container.
func TestExecSyncContainerEnds(t *testing.T) {
	e := open(t)
	id := run(t, e, nil)
	done := make(chan error, 1)
	go func() {
		_, _, code, err := execSync(e, t.Context(), id, []string{"sleep", "1000"}, 0)
		if err == nil && code != 137 {
			err = fmt.Errorf("code %d", code)
		} else if code == 137 {
			err = nil
		}
		done <- err
	}()
	time.Sleep(300 * time.Millisecond)
	if err := e.KillContainer(t.Context(), id, "KILL"); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-done:
		t.Log(err) // 137, or that the shim is gone: who is first
	case <-time.After(5 * time.Minute):
		t.Error("still waiting")
	}
}

func TestExecSyncManySideBySide(t *testing.T) {
	e := open(t)
	id := run(t, e, nil)
	nothingLeft(t, e, id)
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			want := fmt.Sprintf("%d\n", i)
			stdout, _, code, err := execSync(e, t.Context(), id, []string{"sh", "-c", fmt.Sprintf("echo %d; exit %d", i, i)}, 5*time.Minute)
			if err != nil || string(stdout) != want || code != i {
				t.Errorf("%d: %q, %d, %v", i, stdout, code, err)
			}
		})
	}
	wg.Wait()
}

func BenchmarkExecSync(b *testing.B) {
	e := open(b)
	id := run(b, e, nil)
	for b.Loop() {
		if _, _, _, err := execSync(e, b.Context(), id, []string{"true"}, 5*time.Minute); err != nil {
			b.Fatal(err)
		}
	}
}
