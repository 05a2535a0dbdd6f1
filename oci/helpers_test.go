//go:build linux && (amd64 || arm64)

package oci

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/spec"
)

// needRoot skips a test that makes containers when it cannot.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skipf("needs root: %s", t.Name())
	}
}

// buildGuest builds the program that runs in the containers, once.
var buildGuest = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "hako-guest")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "guest")
	cmd := exec.Command("go", "build", "-o", path, "./testdata/guest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the guest: %w\n%s", err, out)
	}
	return path, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if path, err := buildGuest(); err == nil {
		os.RemoveAll(filepath.Dir(path))
	}
	os.Exit(code)
}

var counter atomic.Int64

// box is a bundle and a runtime for one test.
type box struct {
	t      testing.TB
	rt     *Runtime
	bundle string
	rootfs string
	spec   *specs.Spec
	id     string
}

func newBox(t testing.TB) *box {
	t.Helper()
	needRoot(t)
	guest, err := buildGuest()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	b := &box{t: t, rt: &Runtime{Root: filepath.Join(dir, "state")}, bundle: dir, rootfs: filepath.Join(dir, "rootfs")}
	for _, d := range []string{"bin", "proc", "sys", "dev", "tmp", "etc"} {
		if err := os.MkdirAll(filepath.Join(b.rootfs, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(guest, filepath.Join(b.rootfs, "bin/guest")); err != nil {
		t.Fatal(err)
	}
	b.id = fmt.Sprintf("hakotest-%d-%d", os.Getpid(), counter.Add(1))
	b.spec = spec.Default(CgroupV2())
	b.spec.Process.Terminal = false
	b.spec.Process.Rlimits = nil
	b.spec.Process.Env = append(b.spec.Process.Env, "GOMAXPROCS=1")
	b.spec.Root.Readonly = false
	b.spec.Linux.CgroupsPath = "/" + b.id
	return b
}

func (b *box) args(ops ...string) {
	b.spec.Process.Args = append([]string{"/bin/guest"}, ops...)
}

// output collects what a process writes.
type output struct {
	w    *os.File
	done chan struct{}
	mu   sync.Mutex
	buf  bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(b)
}

// peek gives what has come so far.
func (o *output) peek() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

func newOutput(t testing.TB) *output {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	o := &output{w: w, done: make(chan struct{})}
	go func() {
		defer close(o.done)
		io.Copy(o, r)
		r.Close()
	}()
	return o
}

// hangLimit ends what hangs. Nothing is measured by it.
const hangLimit = 5 * time.Minute

// await waits until text was written.
func (o *output) await(t testing.TB, text string) {
	t.Helper()
	for deadline := time.Now().Add(hangLimit); !strings.Contains(o.peek(), text); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %q in %q", text, o.peek())
		}
	}
}

func (o *output) end() string {
	o.w.Close()
	select {
	case <-o.done:
	case <-time.After(hangLimit):
		return "(output did not end)"
	}
	return o.buf.String()
}

func reap(t testing.TB, pid int) int {
	t.Helper()
	var ws unix.WaitStatus
	for {
		_, err := unix.Wait4(pid, &ws, 0, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			t.Fatalf("wait for %d: %v", pid, err)
		}
		if ws.Signaled() {
			return 128 + int(ws.Signal())
		}
		return ws.ExitStatus()
	}
}

// run runs a container to its end.
func (b *box) run(ops ...string) (out string, code int) {
	b.t.Helper()
	out, code, err := b.tryRun(ops...)
	if err != nil {
		b.t.Fatal(err)
	}
	return out, code
}

func (b *box) tryRun(ops ...string) (string, int, error) {
	b.t.Helper()
	if len(ops) > 0 {
		b.args(ops...)
	}
	o := newOutput(b.t)
	c, err := b.rt.Run(b.t.Context(), b.id, CreateOptions{Bundle: b.bundle, Spec: b.spec, Stdout: o.w, Stderr: o.w})
	if err != nil {
		o.end()
		return "", 0, err
	}
	code := reap(b.t, c.Pid())
	c.PidFD.Close()
	if err := c.Delete(context.Background(), true); err != nil {
		b.t.Error(err)
	}
	return o.end(), code, nil
}

// start starts a container that runs on, and ends it with the test.
func (b *box) start(ops ...string) (*Container, *output) {
	b.t.Helper()
	b.args(ops...)
	o := newOutput(b.t)
	c, err := b.rt.Create(b.t.Context(), b.id, CreateOptions{Bundle: b.bundle, Spec: b.spec, Stdout: o.w, Stderr: o.w})
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() {
		c.Kill(context.Background(), unix.SIGKILL)
		unix.Wait4(c.Pid(), nil, 0, nil)
		c.PidFD.Close()
		if _, err := b.rt.Load(b.id); err == nil {
			if err := c.Delete(context.Background(), true); err != nil {
				b.t.Error(err)
			}
		}
		o.end()
	})
	if err := c.Start(b.t.Context()); err != nil {
		b.t.Fatal(err)
	}
	return c, o
}

// exec runs a process in a container to its end.
func (b *box) exec(c *Container, change func(*specs.Process), ops ...string) (string, int, error) {
	b.t.Helper()
	p, err := c.ExecProcess(append([]string{"/bin/guest"}, ops...))
	if err != nil {
		b.t.Fatal(err)
	}
	if change != nil {
		change(p)
	}
	o := newOutput(b.t)
	proc, err := c.Exec(b.t.Context(), ExecOptions{Process: p, Stdout: o.w, Stderr: o.w})
	if err != nil {
		o.end()
		return "", 0, err
	}
	code := reap(b.t, proc.Pid)
	proc.PidFD.Close()
	return o.end(), code, nil
}

func lines(s string) []string { return strings.Split(strings.TrimRight(s, "\n"), "\n") }

func (b *box) write(path, content string, mode os.FileMode) {
	b.t.Helper()
	full := filepath.Join(b.rootfs, path)
	if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(full, []byte(content), mode); err != nil {
		b.t.Fatal(err)
	}
}

func (b *box) symlink(target, path string) {
	b.t.Helper()
	full := filepath.Join(b.rootfs, path)
	os.RemoveAll(full)
	if err := os.Symlink(target, full); err != nil {
		b.t.Fatal(err)
	}
}
