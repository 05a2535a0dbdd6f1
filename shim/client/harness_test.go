package client_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
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

	"github.com/hako-engine/hako/internal/execfile"
	"github.com/hako-engine/hako/shim/client"
)

// shimBinary builds the shim once for all tests.
var shimBinary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "hako-shim-test-*")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "hako-shim")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", path, "github.com/hako-engine/hako/cmd/hako-shim")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return path, nil
})

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "helper" {
		helper(os.Args[2:])
		return
	}
	code := m.Run()
	// The parent of the containers' cgroups, in every hierarchy.
	if dirs, err := filepath.Glob("/sys/fs/cgroup/*/shimtest"); err == nil {
		for _, d := range dirs {
			os.Remove(d)
		}
	}
	if path, err := shimBinary(); err == nil {
		os.RemoveAll(filepath.Dir(path))
	}
	os.Exit(code)
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skipf("needs root: %s", t.Name())
	}
}

// rootfs is a folder with busybox, shared by all tests.
var rootfs = sync.OnceValues(func() (string, error) {
	var busybox string
	for _, p := range []string{"/bin/busybox", "/usr/bin/busybox"} {
		if _, err := os.Stat(p); err == nil {
			busybox = p
		}
	}
	if busybox == "" {
		return "", errors.New("needs Debian's busybox-static")
	}
	path, err := shimBinary()
	if err != nil {
		return "", err
	}
	root := filepath.Join(filepath.Dir(path), "rootfs")
	for _, d := range []string{"bin", "proc", "dev", "sys", "tmp"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return "", err
		}
	}
	data, err := os.ReadFile(busybox)
	if err != nil {
		return "", err
	}
	if err := execfile.Write(filepath.Join(root, "bin/busybox"), data, 0o755); err != nil {
		return "", err
	}
	for _, name := range []string{"sh", "cat", "echo", "sleep", "true", "false", "yes", "head", "seq", "stty", "dd", "tail", "printf"} {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", name)); err != nil {
			return "", err
		}
	}
	return root, nil
})

// runtimes are those that the tests run with: hako's own, and one that is executed.
func runtimes(t *testing.T) []string {
	needRoot(t)
	out := []string{""}
	if path, err := exec.LookPath("runc"); err == nil {
		out = append(out, path)
	}
	return out
}

func name(runtime string) string {
	if runtime == "" {
		return "own"
	}
	return filepath.Base(runtime)
}

// each runs a test with every runtime.
func each(t *testing.T, f func(t *testing.T, e *env)) {
	for _, r := range runtimes(t) {
		t.Run(name(r), func(t *testing.T) {
			t.Parallel()
			f(t, newEnv(t, r))
		})
	}
}

// env is a shim with its bundle.
type env struct {
	t      *testing.T
	ctx    context.Context
	id     string
	bundle string
	opts   client.StartOptions
	shim   *client.Shim
	spec   *specs.Spec
	rootfs []client.Mount

	mu     sync.Mutex
	events []event
}

var counter atomic.Int64

func newEnv(t *testing.T, runtime string) *env {
	t.Helper()
	e := prepare(t, runtime)
	e.start()
	return e
}

// prepare makes a bundle without a shim.
func prepare(t *testing.T, runtime string) *env {
	t.Helper()
	needRoot(t)
	binary, err := shimBinary()
	if err != nil {
		t.Fatal(err)
	}
	root, err := rootfs()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute) // ends what hangs
	t.Cleanup(cancel)
	e := &env{t: t, ctx: ctx, bundle: t.TempDir(), id: fmt.Sprintf("shimtest-%d-%d", os.Getpid(), counter.Add(1))}
	server, err := listenEvents(filepath.Join(t.TempDir(), "events.sock"), func(ev event) error {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.events = append(e.events, ev)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.close)
	e.opts = client.StartOptions{
		Binary: binary, Namespace: "test", ID: e.id, Bundle: e.bundle, Runtime: runtime,
		EventsAddress: server.path,
	}
	e.rootfs = []client.Mount{{Type: "bind", Source: root, Options: []string{"rbind", "ro"}}}
	e.spec = spec(e.id)
	return e
}

func spec(id string) *specs.Spec {
	return &specs.Spec{
		Version:  "1.0.2",
		Root:     &specs.Root{Path: "rootfs"},
		Hostname: "shimtest",
		Process: &specs.Process{
			Args: []string{"/bin/true"}, Cwd: "/", Env: []string{"PATH=/bin", "TERM=xterm"},
			Capabilities: &specs.LinuxCapabilities{},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755", "size=64k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"newinstance", "ptmxmode=0666", "mode=0620"}},
			{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=1777"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: "/shimtest/" + id,
			Namespaces: []specs.LinuxNamespace{
				{Type: "pid"}, {Type: "mount"}, {Type: "ipc"}, {Type: "uts"}, {Type: "network"},
			},
		},
	}
}

func resources(memory int64) *specs.LinuxResources {
	return &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &memory}}
}

func (e *env) writeSpec() {
	e.t.Helper()
	b, err := json.Marshal(e.spec)
	if err == nil {
		err = os.WriteFile(filepath.Join(e.bundle, "config.json"), b, 0o600)
	}
	e.check(err)
}

func (e *env) check(err error) {
	e.t.Helper()
	if err != nil {
		if log, _ := os.ReadFile(filepath.Join(e.bundle, "shim.log")); len(log) > 0 {
			e.t.Logf("shim.log: %s", log)
		}
		e.t.Fatal(err)
	}
}

func (e *env) start() {
	e.t.Helper()
	s, err := client.Manager{}.Start(e.ctx, e.opts)
	e.check(err)
	e.shim = s
	pid, err := s.Pid(e.ctx)
	e.check(err)
	e.t.Cleanup(func() { e.cleanup(pid) })
}

// cleanup ends whatever a test left, and checks that nothing stays.
func (e *env) cleanup(shimPid int) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if s, err := (client.Manager{}).Connect(ctx, e.bundle); err == nil {
		s.Kill(ctx, e.id, "", 9, true)
		waitCtx, done := context.WithTimeout(ctx, 5*time.Minute)
		s.Wait(waitCtx, e.id, "")
		done()
		s.Delete(ctx, e.id, "")
		s.Shutdown(ctx)
		s.Close()
	} else {
		client.Manager{}.Reap(ctx, e.opts)
	}
	e.shim.Close()
	if !eventually(func() bool { return unix.Kill(shimPid, 0) == unix.ESRCH }) {
		e.t.Errorf("shim %d is still there", shimPid)
		unix.Kill(shimPid, unix.SIGKILL)
	}
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err == nil && bytes.Contains(mounts, []byte(e.bundle)) {
		e.t.Errorf("mounts of %s are left", e.bundle)
	}
	for _, dir := range []string{"memory", "pids", "systemd", "unified"} {
		path := filepath.Join("/sys/fs/cgroup", dir, "shimtest", e.id)
		if _, err := os.Stat(path); err == nil {
			e.t.Errorf("%s is left", path)
		}
	}
}

// eventually waits for what another process brings about. The limit ends a hang, no more.
func eventually(f func() bool) bool {
	for end := time.Now().Add(5 * time.Minute); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if f() {
			return true
		}
	}
	return f()
}

// create makes a container that runs a shell command.
func (e *env) create(io client.Stdio, command string) {
	e.t.Helper()
	e.spec.Process.Args = []string{"/bin/sh", "-c", command}
	e.spec.Process.Terminal = io.Terminal
	e.writeSpec()
	_, err := e.shim.Create(e.ctx, client.CreateOptions{ID: e.id, Bundle: e.bundle, Rootfs: e.rootfs, Stdio: io})
	e.check(err)
}

func (e *env) begin() {
	e.t.Helper()
	_, err := e.shim.Start(e.ctx, e.id, "")
	e.check(err)
}

func (e *env) wait() client.Exit {
	e.t.Helper()
	exit, err := e.shim.Wait(e.ctx, e.id, "")
	e.check(err)
	return exit
}

func (e *env) delete() {
	e.t.Helper()
	_, err := e.shim.Delete(e.ctx, e.id, "")
	e.check(err)
}

func (e *env) attach(o client.AttachOptions) client.Stream {
	e.t.Helper()
	o.ID = e.id
	st, err := e.shim.Attach(e.ctx, o)
	e.check(err)
	e.t.Cleanup(func() { st.Close() })
	return st
}

// read collects the frames of a stream to its end.
func read(st client.Stream) (out, errs string, err error) {
	var b [3]strings.Builder
	for {
		n, p, err := st.ReadFrame()
		if errors.Is(err, io.EOF) {
			return b[1].String(), b[2].String(), nil
		}
		if err != nil {
			return b[1].String(), b[2].String(), err
		}
		b[n].Write(p)
	}
}

func (e *env) jsonLog() (client.LogConfig, string) {
	path := filepath.Join(e.bundle, "json.log")
	return client.LogConfig{Format: "json-file", Path: path}, path
}

// topics gives the topics of the events so far, with the exec's id behind a colon.
func (e *env) topics() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []string
	for _, ev := range e.events {
		s := strings.TrimPrefix(ev.Topic, "/tasks/")
		if ev.ExecID != "" {
			s += ":" + ev.ExecID
		}
		out = append(out, s)
	}
	return out
}
