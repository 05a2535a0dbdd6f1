package integration

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ctrd is a client of a node's containerd API.
type ctrd struct {
	*client.Client
	t *testing.T
	n *node
}

// ownContainerd is own with the containerd API.
func ownContainerd(t *testing.T) (*node, *ctrd) {
	t.Helper()
	dir := t.TempDir()
	socket := filepath.Join(dir, "c.sock")
	n := own(t, "--containerd-socket", socket)
	return n, connectContainerd(t, n, socket)
}

func connectContainerd(t *testing.T, n *node, socket string) *ctrd {
	t.Helper()
	c, err := client.New(socket, client.WithTimeout(hangLimit))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return &ctrd{c, t, n}
}

// back waits for the daemon to answer again, and for the client to have noticed: it does not
// look for it all the time.
func (c *ctrd) back() {
	c.t.Helper()
	eventually(c.t, "the containerd API after a restart", func() bool { _, err := c.Version(c.shared()); return err == nil })
}

// shared is the namespace that Docker and the CRI are in, too.
func (c *ctrd) shared() context.Context { return namespaces.WithNamespace(ctx(c.t), "k8s.io") }

const fullImage = "docker.io/library/" + testImage

// container makes a container; it is removed at the end, if it is still there.
func (c *ctrd) container(id string, opts []oci.SpecOpts, more ...client.NewContainerOpts) client.Container {
	c.t.Helper()
	cx := c.shared()
	img, err := c.GetImage(cx, fullImage)
	if err != nil {
		c.t.Fatal(err)
	}
	if done, err := img.IsUnpacked(cx, snapshotterName()); err != nil || !done {
		if err := img.Unpack(cx, snapshotterName()); err != nil {
			c.t.Fatal(err)
		}
	}
	spec := append([]oci.SpecOpts{oci.WithImageConfig(img)}, opts...)
	ctr, err := c.NewContainer(cx, id, append([]client.NewContainerOpts{
		client.WithImage(img), client.WithSnapshotter(snapshotterName()), client.WithNewSnapshot(id, img), client.WithNewSpec(spec...), client.WithRuntime("io.containerd.runc.v2", nil),
	}, more...)...)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() {
		cx, cancel := context.WithTimeout(namespaces.WithNamespace(context.Background(), "k8s.io"), hangLimit)
		defer cancel()
		if task, err := ctr.Task(cx, nil); err == nil {
			_, _ = task.Delete(cx, client.WithProcessKill)
		}
		if err := ctr.Delete(cx, client.WithSnapshotCleanup); err != nil && !errdefs.IsNotFound(err) {
			c.t.Errorf("remove %s: %v", id, err)
		}
	})
	return ctr
}

func snapshotterName() string {
	if s := os.Getenv("HAKO_TEST_SNAPSHOTTER"); s != "" {
		return s
	}
	return "overlayfs"
}

func (c *ctrd) task(ctr client.Container, io cio.Creator) client.Task {
	c.t.Helper()
	task, err := ctr.NewTask(c.shared(), io)
	if err != nil {
		c.t.Fatal(err)
	}
	return task
}

func args(a ...string) []oci.SpecOpts { return []oci.SpecOpts{oci.WithProcessArgs(a...)} }

// sleeping makes a container that sleeps, and starts it.
func (c *ctrd) sleeping(id string, more ...client.NewContainerOpts) (client.Container, client.Task) {
	c.t.Helper()
	ctr := c.container(id, args("sleep", "100000"), more...)
	task := c.task(ctr, cio.NullIO)
	if err := task.Start(c.shared()); err != nil {
		c.t.Fatal(err)
	}
	return ctr, task
}

// topics collects what is published of tasks.
type topics struct {
	mu   sync.Mutex
	list map[string][]string // container/process: topics
}

func (c *ctrd) watch() *topics {
	c.t.Helper()
	ts := &topics{list: map[string][]string{}}
	c.hear(ts.take, "/tasks/oom", &eventsapi.TaskOOM{ContainerID: "probe"}, func() bool {
		ts.mu.Lock()
		defer ts.mu.Unlock()
		return len(ts.list["probe"]) > 0
	}, `topic~="^/tasks/"`)
	return ts
}

// hear gives what is published to take until the test ends. A subscription has no answer of its own: it is there when
// a probe that is published has come.
func (c *ctrd) hear(take func(*events.Envelope), topic string, probe events.Event, heard func() bool, filters ...string) {
	c.t.Helper()
	cx, cancel := context.WithCancel(c.shared())
	c.t.Cleanup(cancel)
	ch, _ := c.EventService().Subscribe(cx, filters...)
	go func() {
		for {
			select {
			case e := <-ch:
				take(e)
			case <-cx.Done():
				return
			}
		}
	}()
	eventually(c.t, "the subscription", func() bool {
		if err := c.EventService().Publish(cx, topic, probe); err != nil {
			c.t.Fatal(err)
		}
		return heard()
	})
}

// printed is what a command that is executed in a task prints.
func printed(cx context.Context, t *testing.T, task client.Task, args ...string) string {
	t.Helper()
	spec, err := task.Spec(cx)
	if err != nil {
		t.Fatal(err)
	}
	p := *spec.Process
	p.Args, p.Terminal = args, false
	var out syncBuffer
	x, err := task.Exec(cx, "printed", &p, cio.NewCreator(cio.WithStreams(nil, &out, &out)))
	if err != nil {
		t.Fatal(err)
	}
	wait, err := x.Wait(cx)
	if err != nil {
		t.Fatal(err)
	}
	if err := x.Start(cx); err != nil {
		t.Fatal(err)
	}
	<-wait
	if _, err := x.Delete(cx); err != nil {
		t.Error(err)
	}
	return out.String()
}

func (ts *topics) take(e *events.Envelope) {
	if e == nil {
		return
	}
	v, err := typeurl.UnmarshalAny(e.Event)
	if err != nil {
		return
	}
	key := ""
	switch v := v.(type) {
	case *eventsapi.TaskExit:
		key = v.ContainerID
		if v.ID != v.ContainerID {
			key += "/" + v.ID
		}
	case *eventsapi.TaskDelete:
		key = v.ContainerID
		if v.ID != "" {
			key += "/" + v.ID
		}
	case *eventsapi.TaskExecAdded:
		key = v.ContainerID + "/" + v.ExecID
	case *eventsapi.TaskExecStarted:
		key = v.ContainerID + "/" + v.ExecID
	case interface{ GetContainerID() string }:
		key = v.GetContainerID()
	}
	ts.mu.Lock()
	defer ts.mu.Unlock()
	ts.list[key] = append(ts.list[key], strings.TrimPrefix(e.Topic, "/tasks/"))
}

func (ts *topics) expect(t *testing.T, key string, want ...string) {
	t.Helper()
	var got []string
	for deadline := time.Now().Add(hangLimit); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		ts.mu.Lock()
		got = slices.Clone(ts.list[key])
		ts.mu.Unlock()
		// More than is wanted does not become less.
		if slices.Equal(got, want) {
			return
		}
		if len(got) >= len(want) {
			break
		}
	}
	t.Errorf("events of %s: %v, want %v", key, got, want)
}

// TestContainerdTask shows the life of a task through containerd's own client.
func TestContainerdTask(t *testing.T) {
	t.Parallel()
	n, c := ownContainerd(t)
	ts := c.watch()
	cx := c.shared()

	// However short it lives, nobody misses its end, nor what it said, and events have their order.
	for i := range 10 {
		id := fmt.Sprint("quick", i)
		ctr := c.container(id, args("sh", "-c", fmt.Sprintf("echo out %d; exit %d", i, i)))
		var out, errs syncBuffer
		task := c.task(ctr, cio.NewCreator(cio.WithStreams(nil, &out, &errs)))
		wait, err := task.Wait(cx)
		if err != nil {
			t.Fatal(err)
		}
		if err := task.Start(cx); err != nil {
			t.Fatal(err)
		}
		if x := <-wait; x.ExitCode() != uint32(i) || x.Error() != nil {
			t.Errorf("exit %d, %v", x.ExitCode(), x.Error())
		}
		x, err := task.Delete(cx)
		if err != nil || x.ExitCode() != uint32(i) || x.ExitTime().IsZero() {
			t.Errorf("deleted: %v, %v", x, err)
		}
		if want := fmt.Sprintf("out %d\n", i); out.String() != want {
			t.Errorf("output %q", out.String())
		}
		ts.expect(t, id, "create", "start", "exit", "delete")
	}

	ctr, task := c.sleeping("long")
	if _, err := ctr.NewTask(cx, cio.NullIO); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second task: %v", err)
	}
	if _, err := c.TaskService().Delete(cx, deleteRequest("long")); !errdefs.IsFailedPrecondition(toNative(err)) {
		t.Errorf("deletion of one that runs: %v", err)
	}
	spec, err := ctr.Spec(cx)
	if err != nil {
		t.Fatal(err)
	}
	p := *spec.Process
	p.Args = []string{"sh", "-c", "read line; echo got $line; exit 5"}
	var out syncBuffer
	x, err := task.Exec(cx, "x", &p, cio.NewCreator(cio.WithStreams(strings.NewReader("hello\n"), &out, &out)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := task.Exec(cx, "x", &p, cio.NullIO); !errdefs.IsAlreadyExists(err) {
		t.Errorf("an exec of the same name: %v", err)
	}
	wait, err := x.Wait(cx)
	if err != nil {
		t.Fatal(err)
	}
	if err := x.Start(cx); err != nil {
		t.Fatal(err)
	}
	if r := <-wait; r.ExitCode() != 5 {
		t.Errorf("exec: %d, %v", r.ExitCode(), r.Error())
	}
	if _, err := x.Delete(cx); err != nil || out.String() != "got hello\n" {
		t.Errorf("exec said %q, %v", out.String(), err)
	}
	ts.expect(t, "long/x", "exec-added", "exec-started", "exit")

	p.Args, p.Terminal = []string{"sh", "-c", "stty size; sleep 100000"}, true
	var tty syncBuffer
	y, err := task.Exec(cx, "y", &p, cio.NewCreator(cio.WithStreams(new(bytes.Buffer), &tty, nil), cio.WithTerminal))
	if err != nil {
		t.Fatal(err)
	}
	if err := y.Start(cx); err != nil {
		t.Fatal(err)
	}
	if err := y.Resize(cx, 100, 40); err != nil {
		t.Error(err)
	}
	pids, err := task.Pids(cx)
	if err != nil || !slices.ContainsFunc(pids, func(p client.ProcessInfo) bool { return p.Pid == y.Pid() && p.Info != nil }) {
		t.Errorf("processes %+v, %v", pids, err)
	}
	if m, err := task.Metrics(cx); err != nil || m.Data == nil {
		t.Errorf("metrics %v, %v", m, err)
	}
	if err := y.Kill(cx, syscall.SIGKILL); err != nil {
		t.Error(err)
	}
	eventually(t, "the end of the exec on a terminal", func() bool { s, err := y.Status(cx); return err == nil && s.Status == client.Stopped })
	if s, err := y.Delete(cx); err != nil || s.ExitCode() != 137 {
		t.Errorf("exec on a terminal: %v, %v", s, err)
	}

	if err := task.Pause(cx); err != nil {
		t.Error(err)
	}
	if s, err := task.Status(cx); err != nil || s.Status != client.Paused {
		t.Errorf("%v, %v", s, err)
	}
	if err := task.Pause(cx); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("second pause: %v", err)
	}
	if err := task.Resume(cx); err != nil {
		t.Error(err)
	}

	// The daemon is killed: what runs goes on, and what ends meanwhile is known.
	_, other := c.sleeping("other")
	if err := n.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	syscall.Kill(int(other.Pid()), syscall.SIGTERM)
	syscall.Kill(int(other.Pid()), syscall.SIGKILL)
	eventually(t, "the end of the task", func() bool { return syscall.Kill(int(other.Pid()), 0) == syscall.ESRCH })
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	c.back()
	if s, err := task.Status(cx); err != nil || s.Status != client.Running {
		t.Errorf("after the restart: %v, %v", s, err)
	}
	eventually(t, "the end to be known", func() bool { s, err := other.Status(cx); return err == nil && s.Status == client.Stopped })
	if s, err := other.Status(cx); err != nil || s.Status != client.Stopped || s.ExitStatus != 137 {
		t.Errorf("what ended meanwhile: %+v, %v", s, err)
	}
	if s, err := other.Delete(cx); err != nil || s.ExitCode() != 137 {
		t.Errorf("%v, %v", s, err)
	}

	// The shim is killed: what is left of the task ends, and everybody is told.
	ts = c.watch()
	wait, err = task.Wait(cx)
	if err != nil {
		t.Fatal(err)
	}
	killProcess(t, parentOf(t, task.Pid()))
	select {
	case r := <-wait:
		if r.ExitCode() != 137 {
			t.Errorf("exit of a task whose shim died: %d, %v", r.ExitCode(), r.Error())
		}
	case <-time.After(hangLimit):
		t.Error("nobody tells of the end of a task whose shim died")
	}
	ts.expect(t, "long", "exit", "delete")
	if _, err := ctr.Task(cx, nil); !errdefs.IsNotFound(err) {
		t.Errorf("the task of a dead shim: %v", err)
	}
}

// TestContainerdShims shows that shims of others work by the published protocol, and that ours is one.
func TestContainerdShims(t *testing.T) {
	t.Parallel()
	n, c := ownContainerd(t)
	cx := c.shared()
	programs := map[string]string{"hako": filepath.Join(workDir, "hako-shim"), "grpc": filepath.Join(workDir, "grpcshim"), "grpc-old": filepath.Join(t.TempDir(), "grpcshim-old")}
	if err := os.Symlink(programs["grpc"], programs["grpc-old"]); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("/usr/bin/containerd-shim-runc-v2"); err == nil {
		programs["runc"] = "/usr/bin/containerd-shim-runc-v2"
	}
	for name, program := range programs {
		ts := c.watch()
		_, task := c.sleeping("s-"+name, client.WithRuntime(program, nil))
		// Before the restart, which ends the subscription: the shim tells in its own time.
		ts.expect(t, "s-"+name, "create", "start")
		if err := n.signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if err := n.start(); err != nil {
			t.Fatal(err)
		}
		c.back()
		if s, err := task.Status(cx); err != nil || s.Status != client.Running {
			t.Errorf("%s: after a restart: %v, %v", name, s, err)
		}
		ts = c.watch()
		if s, err := task.Delete(cx, client.WithProcessKill); err != nil || s.ExitCode() != 137 {
			t.Errorf("%s: %v, %v", name, s, err)
		}
		ts.expect(t, "s-"+name, "exit", "delete")
		if left, err := filepath.Glob(filepath.Join(n.dir, "run", "io.containerd.runtime.v2.task", "*", "*")); err != nil || len(left) != 0 {
			t.Errorf("%s: bundles left: %v, %v", name, left, err)
		}
	}
	ctr := c.container("none", args("true"), client.WithRuntime("io.containerd.nosuch.v2", nil))
	if _, err := ctr.NewTask(cx, cio.NullIO); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "containerd-shim-nosuch-v2") {
		t.Errorf("a shim that is not there: %v", err)
	}
}

// TestContainerdShimOverGRPC shows what a shim that speaks gRPC does beyond a life: it makes mounts itself if it says that it
// can, has further processes, is a sandbox, and is missed when it dies.
func TestContainerdShimOverGRPC(t *testing.T) {
	t.Parallel()
	n, c := ownContainerd(t)
	cx := c.shared()
	programs := map[string]string{"new": filepath.Join(workDir, "grpcshim"), "old": filepath.Join(t.TempDir(), "grpcshim-old"), "own": "io.containerd.runc.v2"}
	if err := os.Symlink(programs["new"], programs["old"]); err != nil {
		t.Fatal(err)
	}
	for name, program := range programs {
		ctr := c.container("g-"+name, args("sleep", "100000"), client.WithRuntime(program, nil))
		mounts, err := c.SnapshotService(snapshotterName()).Mounts(cx, "g-"+name)
		if err != nil {
			t.Fatal(err)
		}
		for i := range mounts {
			mounts[i].Type = "format/" + mounts[i].Type
		}
		task, err := ctr.NewTask(cx, cio.NullIO, client.WithRootFS(mounts))
		if err != nil {
			t.Fatal(name, err)
		}
		bundle := filepath.Join(n.dir, "run", "io.containerd.runtime.v2.task", "k8s.io", "g-"+name)
		if name != "own" {
			got, err := os.ReadFile(filepath.Join(bundle, "rootfs-types"))
			if err != nil || !strings.Contains(string(got), "format/") {
				t.Errorf("%s: the shim mounts %q (%v), and does so itself", name, got, err)
			}
		}
		if err := task.Start(cx); err != nil {
			t.Fatal(name, err)
		}
		spec, err := ctr.Spec(cx)
		if err != nil {
			t.Fatal(err)
		}
		spec.Process.Args = []string{"echo", "hello"}
		var out bytes.Buffer
		exec, err := task.Exec(cx, "x", spec.Process, cio.NewCreator(cio.WithStreams(nil, &out, nil)))
		if err != nil {
			t.Fatal(name, err)
		}
		done, err := exec.Wait(cx)
		if err == nil {
			err = exec.Start(cx)
		}
		if err != nil {
			t.Fatal(name, err)
		}
		if s := <-done; s.ExitCode() != 0 || s.Error() != nil {
			t.Errorf("%s: %v", name, s)
		}
		exec.IO().Wait()
		if out.String() != "hello\n" {
			t.Errorf("%s: %q", name, out.String())
		}
		if _, err := exec.Delete(cx); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		// The class of an error comes through both protocols.
		if err := task.Resume(cx); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: resumed, and not paused: %v", name, err)
		}
		if _, err := task.LoadProcess(cx, "none", nil); !errdefs.IsNotFound(err) {
			t.Errorf("%s: a process that is not there: %v", name, err)
		}
	}

	// The death of the program that speaks gRPC is noticed, although the hako-shim behind it would go on.
	ts := c.watch()
	ctr, task := c.sleeping("dies", client.WithRuntime(programs["new"], nil))
	ended, err := task.Wait(cx)
	if err != nil {
		t.Fatal(err)
	}
	ts.expect(t, "dies", "create", "start")
	killBySocket(t, filepath.Join(n.dir, "run", "io.containerd.runtime.v2.task", "k8s.io", "dies"))
	select {
	case s := <-ended:
		if s.ExitCode() != 137 {
			t.Errorf("%v", s)
		}
	case <-time.After(hangLimit):
		t.Error("nobody tells of the end of a task whose shim died")
	}
	ts.expect(t, "dies", "create", "start", "exit", "delete")
	if _, err := ctr.Task(cx, nil); !errdefs.IsNotFound(err) {
		t.Errorf("the task of a dead shim: %v", err)
	}
}

// killBySocket kills the grpcshim that serves in a bundle.
func killBySocket(t *testing.T, bundle string) {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range dirs {
		cwd, err := os.Readlink(filepath.Join(d, "cwd"))
		if err != nil || cwd != bundle {
			continue
		}
		if line, err := os.ReadFile(filepath.Join(d, "cmdline")); err != nil || !strings.HasSuffix(string(line), "\x00serve\x00") || !strings.HasPrefix(string(line), "/proc/self/exe\x00") {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(d))
		if err == nil {
			err = syscall.Kill(pid, syscall.SIGKILL)
		}
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatalf("no shim serves in %s", bundle)
}

// view is what one API says and does of containers.
type view struct {
	listed  func(id string) bool
	running func(id string) bool // as inspected
	exec    func(id string) string
	stop    func(id string)
	remove  func(id string)
}

// TestThreeViews shows that a container made through one API is listed, inspected, executed in, stopped and
// removed through each of the others: all nine combinations. The CRI's lists hold what lies in pods alone,
// because the kubelet deletes what it does not know.
func TestThreeViews(t *testing.T) {
	t.Parallel()
	n, c := ownContainerd(t)
	k := newKubelet(t, n)
	cx := c.shared()
	config := k.config("views", cri.NamespaceMode_CONTAINER)
	pod := k.runPod(config)
	defer k.end(pod)

	count := 0
	name := func(by string) string { count++; return fmt.Sprint(by, count) }
	makers := map[string]func() string{
		"docker": func() string {
			return strings.TrimSpace(n.docker(t, "run", "-d", "--name", name("docker"), testImage, "sleep", "100000"))
		},
		"cri":        func() string { return k.run(pod, config, name("cri"), "sleep", "100000") },
		"containerd": func() string { id := name("containerd"); c.sleeping(id); return id },
	}
	load := func(id string) client.Container {
		ctr, err := c.LoadContainer(cx, id)
		if err != nil {
			t.Fatalf("load %s: %v", id, err)
		}
		return ctr
	}
	views := map[string]view{
		"docker": {
			listed: func(id string) bool { return strings.Contains(n.docker(t, "ps", "-a", "-q", "--no-trunc"), id) },
			running: func(id string) bool {
				return strings.TrimSpace(n.docker(t, "inspect", "-f", "{{.State.Running}}", id)) == "true"
			},
			exec:   func(id string) string { return n.docker(t, "exec", id, "echo", "from", "inside") },
			stop:   func(id string) { n.docker(t, "stop", "-t", "0", id) },
			remove: func(id string) { n.docker(t, "rm", id) },
		},
		"cri": {
			listed: func(id string) bool {
				l, err := k.ListContainers(ctx(t), &cri.ListContainersRequest{Filter: &cri.ContainerFilter{Id: id}})
				return err == nil && len(l.Containers) == 1
			},
			running: func(id string) bool { return k.status(id).State == cri.ContainerState_CONTAINER_RUNNING },
			exec:    func(id string) string { return k.sh(id, "echo from inside") },
			stop: func(id string) {
				if _, err := k.StopContainer(ctx(t), &cri.StopContainerRequest{ContainerId: id}); err != nil {
					t.Error(err)
				}
			},
			remove: func(id string) {
				if _, err := k.RemoveContainer(ctx(t), &cri.RemoveContainerRequest{ContainerId: id}); err != nil {
					t.Error(err)
				}
			},
		},
		"containerd": {
			listed: func(id string) bool {
				l, err := c.Containers(cx)
				return err == nil && slices.ContainsFunc(l, func(c client.Container) bool { return c.ID() == id })
			},
			running: func(id string) bool {
				task, err := load(id).Task(cx, nil)
				if err != nil {
					return false
				}
				s, err := task.Status(cx)
				return err == nil && s.Status == client.Running
			},
			exec: func(id string) string {
				ctr := load(id)
				task, err := ctr.Task(cx, nil)
				if err != nil {
					t.Fatal(err)
				}
				return printed(cx, t, task, "echo", "from", "inside")
			},
			stop: func(id string) {
				task, err := load(id).Task(cx, nil)
				if err != nil {
					t.Fatal(err)
				}
				wait, err := task.Wait(cx)
				if err != nil {
					t.Fatal(err)
				}
				if err := task.Kill(cx, syscall.SIGKILL); err != nil {
					t.Error(err)
				}
				if x := <-wait; x.ExitCode() != 137 {
					t.Errorf("%s ended with %d, %v", id, x.ExitCode(), x.Error())
				}
			},
			remove: func(id string) {
				ctr := load(id)
				if task, err := ctr.Task(cx, nil); err == nil {
					if _, err := task.Delete(cx); err != nil {
						t.Error(err)
					}
				}
				if err := ctr.Delete(cx); err != nil {
					t.Error(err)
				}
			},
		},
	}
	for by, create := range makers {
		for through, v := range views {
			what := "made by " + by + ", seen through " + through
			id := create()
			if through == "cri" && by != "cri" {
				if v.listed(id) {
					t.Errorf("%s: listed, and the kubelet would delete it", what)
				}
				views[by].stop(id)
				views[by].remove(id)
				continue
			}
			if !v.listed(id) {
				t.Errorf("%s: not listed", what)
			}
			if !v.running(id) {
				t.Errorf("%s: does not run", what)
			}
			if out := strings.TrimSpace(v.exec(id)); out != "from inside" {
				t.Errorf("%s: exec says %q", what, out)
			}
			v.stop(id)
			for other, o := range views { // nobody's view lies
				if (other != "cri" || by == "cri") && o.running(id) {
					t.Errorf("%s: stopped, and %s says it runs", what, other)
				}
			}
			v.remove(id)
			for other, o := range views {
				if o.listed(id) {
					t.Errorf("%s: removed, and %s lists it", what, other)
				}
			}
		}
	}
}

func deleteRequest(id string) *tasks.DeleteTaskRequest {
	return &tasks.DeleteTaskRequest{ContainerID: id}
}

func toNative(err error) error { return errgrpc.ToNative(err) }

// parentOf gives the number of a process's parent.
func parentOf(t *testing.T, pid uint32) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "PPid:"); ok {
			return strings.TrimSpace(v)
		}
	}
	t.Fatal("no parent")
	return ""
}

// syncBuffer is a buffer that a copy still writes to while it is read.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}
