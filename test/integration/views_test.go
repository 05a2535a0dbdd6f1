package integration

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// heard are events in their order, by the object that they are of.
type heard struct {
	mu sync.Mutex
	by map[string][]string
}

func (h *heard) add(id, what string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.by == nil {
		h.by = map[string][]string{}
	}
	h.by[id] = append(h.by[id], what)
}

func (h *heard) expect(t *testing.T, who, id string, want ...string) {
	t.Helper()
	var got []string
	defer func() {
		if !slices.Equal(got, want) {
			t.Errorf("%s hears of %s: %v, want %v", who, id, got, want)
		}
	}()
	for range 15000 {
		h.mu.Lock()
		got = slices.Clone(h.by[id])
		h.mu.Unlock()
		if slices.Equal(got, want) {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (h *heard) has(id string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.by[id]) > 0
}

// hearContainerd hears topics of containers, tasks and sandboxes until the test ends.
func (c *ctrd) hearContainerd() *heard {
	c.t.Helper()
	h := &heard{}
	c.hear(h.take, "/tasks/paused", &eventsapi.TaskPaused{ContainerID: "probe"}, func() bool { return h.has("probe") })
	return h
}

func (h *heard) take(e *events.Envelope) {
	if e == nil {
		return
	}
	v, err := typeurl.UnmarshalAny(e.Event)
	if err != nil {
		return
	}
	switch v := v.(type) {
	case interface{ GetContainerID() string }:
		h.add(v.GetContainerID(), e.Topic)
	case interface{ GetSandboxID() string }:
		h.add(v.GetSandboxID(), e.Topic)
	case interface{ GetID() string }:
		h.add(v.GetID(), e.Topic)
	}
}

// hearDocker hears events of containers by the Docker API until the test ends.
func (n *node) hearDocker(t *testing.T) *heard {
	t.Helper()
	cx, cancel := context.WithCancel(context.Background())
	cmd := n.command(cx, "events", "--format", "{{json .}}", "--since", "0", "--filter", "type=container")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); _ = cmd.Wait() })
	h := &heard{}
	go func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			var ev struct {
				Action string
				Actor  struct{ ID string }
			}
			if json.Unmarshal(lines.Bytes(), &ev) == nil {
				h.add(ev.Actor.ID, ev.Action)
			}
		}
	}()
	return h
}

// TestViewsHearAll: what happens through one API is heard through the others, as it would be by those
// who made it there.
func TestViewsHearAll(t *testing.T) {
	t.Parallel()
	n, c := ownContainerd(t)
	k := newKubelet(t, n)
	byContainerd, byDocker := c.hearContainerd(), n.hearDocker(t)

	id := strings.TrimSpace(n.docker(t, "run", "-d", testImage, "sleep", "100000"))
	n.docker(t, "pause", id)
	n.docker(t, "unpause", id)
	n.docker(t, "rm", "-f", id)
	byContainerd.expect(t, "containerd's client", id,
		"/containers/create", "/tasks/create", "/tasks/start", "/tasks/paused", "/tasks/resumed", "/tasks/exit", "/tasks/delete", "/containers/delete")

	config := k.config("hear", cri.NamespaceMode_CONTAINER)
	pod := k.runPod(config)
	id = k.run(pod, config, "c", "sleep", "100000")
	k.end(pod)
	byContainerd.expect(t, "containerd's client", pod, "/containers/create", "/sandboxes/create", "/sandboxes/start", "/sandboxes/exit", "/containers/delete")
	byContainerd.expect(t, "containerd's client", id, "/containers/create", "/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete", "/containers/delete")
	byDocker.expect(t, "Docker's client", id, "create", "start", "kill", "die", "destroy")

	ctr, task := c.sleeping("guest")
	cx := c.shared()
	if err := task.Pause(cx); err != nil {
		t.Error(err)
	}
	if err := task.Resume(cx); err != nil {
		t.Error(err)
	}
	wait, err := task.Wait(cx)
	if err != nil {
		t.Fatal(err)
	}
	if err := task.Kill(cx, syscall.SIGKILL); err != nil {
		t.Error(err)
	}
	<-wait
	if _, err := task.Delete(cx); err != nil {
		t.Error(err)
	}
	if err := ctr.Delete(cx); err != nil {
		t.Error(err)
	}
	byDocker.expect(t, "Docker's client", "guest", "create", "start", "pause", "unpause", "die", "destroy")
}

// TestViewsUseImages: an image in use by a container of containerd's client is in use for Docker and the CRI.
func TestViewsUseImages(t *testing.T) {
	t.Parallel()
	n, c := ownContainerd(t)
	k := newKubelet(t, n)
	_, task := c.sleeping("user")
	if r := n.run(nil, "rmi", "-f", strings.TrimSpace(n.docker(t, "inspect", "-f", "{{.Id}}", "--type", "image", testImage))); r.code == 0 || !strings.Contains(r.stderr, "running container user") {
		t.Errorf("Docker removes the image: %v", r)
	}
	_, err := k.images.RemoveImage(ctx(t), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: testImage}})
	if status.Code(err) == codes.OK || !strings.Contains(err.Error(), "user") {
		t.Errorf("the CRI removes the image: %v", err)
	}
	if st, err := k.images.ImageStatus(ctx(t), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: testImage}}); err != nil || !st.GetImage().GetPinned() {
		t.Errorf("the kubelet may collect it: %v, %v", st, err)
	}
	n.docker(t, "image", "prune", "-a", "-f")
	cx := c.shared()
	// Its name can go by containerd's own rules; what runs stays whole.
	if err := c.ImageService().Delete(cx, fullImage); err != nil {
		t.Fatal(err)
	}
	n.docker(t, "system", "prune", "-a", "-f")
	if out := n.docker(t, "exec", "user", "sh", "-c", "cat /bin/sh | wc -c"); strings.TrimSpace(out) == "0" {
		t.Errorf("its files are gone: %s", out)
	}
	wait, err := task.Wait(cx)
	if err != nil {
		t.Fatal(err)
	}
	if err := task.Kill(cx, syscall.SIGKILL); err != nil && !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	<-wait
}

// TestCgroupPath: the daemon and its shims lie in the cgroup that is asked for, containers in their own; a restarted
// daemon finds its shims there.
func TestCgroupPath(t *testing.T) {
	t.Parallel()
	path := fmt.Sprintf("/hktest%d-daemon", os.Getpid())
	t.Cleanup(func() {
		for _, pattern := range []string{"/sys/fs/cgroup/*" + path, "/sys/fs/cgroup" + path} {
			dirs, _ := filepath.Glob(pattern)
			for _, dir := range dirs {
				eventually(t, "the daemon's cgroup is empty", func() bool { err := syscall.Rmdir(dir); return err == nil || os.IsNotExist(err) })
			}
		}
	})
	n := own(t, "--cgroup-path", path)
	inside := func() {
		t.Helper()
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", n.cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		for line := range bytes.Lines(bytes.TrimSpace(raw)) {
			parts := strings.SplitN(strings.TrimSpace(string(line)), ":", 3)
			if parts[1] != "" && !strings.HasPrefix(parts[1], "name=") && parts[2] != path {
				if _, err := os.Stat("/sys/fs/cgroup/" + parts[1]); err == nil { // not mounted: nobody can move there
					t.Errorf("the daemon is in %s", line)
				}
			}
		}
	}
	inside()
	id := strings.TrimSpace(n.docker(t, "run", "-d", testImage, "sleep", "100000"))
	pid := strings.TrimSpace(n.docker(t, "inspect", "-f", "{{.State.Pid}}", id))
	if raw, err := os.ReadFile("/proc/" + pid + "/cgroup"); err != nil || bytes.Contains(raw, []byte(path)) {
		t.Errorf("the container is in the daemon's cgroup: %s, %v", raw, err)
	}
	if err := n.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	inside()
	if out := n.docker(t, "exec", id, "echo", "alive"); strings.TrimSpace(out) != "alive" {
		t.Errorf("after the restart: %s", out)
	}
}
