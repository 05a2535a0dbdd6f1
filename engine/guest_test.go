package engine

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"
)

// newGuestNode is a node whose tasks are those of guests.
func newGuestNode(t *testing.T) *taskNode {
	t.Helper()
	n := newTaskNode(t)
	n.ctx = shared(context.Background())
	return n
}

// guest makes a container through containerd's API, from an image, with a running task.
func (n *taskNode) guest(id, image string) *fakeTaskShim {
	n.t.Helper()
	_, err := n.e.ContainerStore().Create(n.ctx, containers.Container{
		ID: id, Image: image, Labels: map[string]string{nerdctlName: id + "-name"},
		Runtime: containers.RuntimeInfo{Name: RuntimeRunc}, Spec: &anypb.Any{TypeUrl: specType, Value: []byte("{}")},
	})
	if err != nil {
		n.t.Fatal(err)
	}
	if _, err := n.e.CreateTask(n.ctx, id, TaskConfig{}); err != nil {
		n.t.Fatal(err)
	}
	if _, err := n.e.StartTask(n.ctx, id, ""); err != nil {
		n.t.Fatal(err)
	}
	return n.tasks.shim(n.bundleOf(id))
}

// TestGuestUsesImage: an image that a container of containerd's client was made from is in use for all.
func TestGuestUsesImage(t *testing.T) {
	t.Parallel()
	n := newGuestNode(t)
	c := context.Background()
	s := n.guest("g", testImage)
	id := n.images.imgs[0].ID.String()
	conflicts := func(when string, force bool, want string) {
		t.Helper()
		if _, err := n.e.RemoveImage(c, id, force, false); !errdefs.IsConflict(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: Docker removes its image: %v", when, err)
		}
	}
	conflicts("while it runs", true, "running container g")
	if _, err := n.e.RemoveImage(c, testImage, false, false); !errdefs.IsConflict(err) {
		t.Errorf("by its name: %v", err)
	}
	if err := n.e.DropImage(c, testImage); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("the CRI removes its image: %v", err)
	}
	if !n.e.PinnedImages(c)[id] {
		t.Error("the kubelet may collect its image")
	}
	if list, err := n.e.Images(c, nil); err != nil || len(list) != 1 || list[0].Containers != 1 {
		t.Errorf("%+v, %v", list, err)
	}
	s.end(0)
	if _, err := n.e.WaitTask(n.ctx, "g", ""); err != nil {
		t.Fatal(err)
	}
	conflicts("after its end", false, "stopped container g")
	if _, _, err := n.e.PruneImages(c, Filters{"dangling": {"false"}}); err != nil || len(n.images.imgs) != 1 {
		t.Errorf("pruned, %v", err)
	}
	if err := n.e.RemoveContainer(c, "g", RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	if n.e.PinnedImages(c)[id] {
		t.Error("pinned by nobody")
	}
	if _, err := n.e.RemoveImage(c, id, false, false); err != nil {
		t.Errorf("nobody uses it any more: %v", err)
	}
}

// TestGuestEvents: Docker's clients hear of guests.
func TestGuestEvents(t *testing.T) {
	t.Parallel()
	n := newGuestNode(t)
	c, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	events, err := n.e.Events(c, time.Time{}, time.Time{}, Filters{"container": {"g"}})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	hear := func(until string) {
		t.Helper()
		for ev := range events {
			if ev.Attributes["name"] != "g-name" || ev.Attributes["image"] != testImage {
				t.Errorf("%+v", ev)
			}
			if got = append(got, ev.Action+ev.Attributes["exitCode"]); got[len(got)-1] == until {
				return
			}
		}
		t.Fatalf("no %s after %v", until, got)
	}
	s := n.guest("g", testImage)
	if err := n.e.PauseTask(n.ctx, "g"); err != nil {
		t.Fatal(err)
	}
	if err := n.e.UnpauseContainer(c, "g"); err != nil { // Docker's word for it
		t.Fatal(err)
	}
	s.end(3)
	hear("die3")
	if _, err := n.e.DeleteTask(n.ctx, "g"); err != nil {
		t.Fatal(err)
	}
	if err := n.e.ContainerStore().Delete(n.ctx, "g"); err != nil {
		t.Fatal(err)
	}
	hear("destroy")
	if want := []string{"create", "start", "pause", "unpause", "die3", "destroy"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// TestGuestEndsFast: the end of a task that is faster than the answer to its start is told after it.
func TestGuestEndsFast(t *testing.T) {
	t.Parallel()
	n := newGuestNode(t)
	k := taskKey{Namespace, "g"}
	x := n.e.newTask(k, taskMeta{})
	_, r := n.e.events.subscribe(time.Time{}, nil)
	defer n.e.events.unsubscribe(r)
	n.e.taskEnded(x, TaskExit{Status: 4})
	n.e.taskStarted(x)
	n.e.taskEnded(x, TaskExit{Status: 5})
	for _, want := range []string{"start", "die4"} {
		if ev := <-r.ch; ev.Action+ev.Attributes["exitCode"] != want {
			t.Errorf("%+v, want %s", ev, want)
		}
	}
	if len(r.ch) > 0 {
		t.Errorf("told twice: %+v", <-r.ch)
	}
	never := n.e.newTask(k, taskMeta{})
	n.e.taskEnded(never, TaskExit{})
	if len(r.ch) > 0 {
		t.Errorf("one that never ran: %+v", <-r.ch)
	}
}

// TestSandboxEvents: containerd's clients hear of pods.
func TestSandboxEvents(t *testing.T) {
	t.Parallel()
	n := newTaskNode(t)
	c := context.Background()
	id, err := n.e.RunSandbox(c, SandboxConfig{Name: "p", Namespace: "d", UID: "u", Network: NamespaceNode, PID: NamespaceContainer, IPC: NamespaceNode})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.e.StopSandbox(c, id); err != nil {
		t.Fatal(err)
	}
	if err := n.e.RemoveSandbox(c, id); err != nil {
		t.Fatal(err)
	}
	want := []string{"/containers/create", "/sandboxes/create", "/sandboxes/start", "/sandboxes/exit", "/containers/delete"}
	if got := n.events.topics(); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// TestCopyMeetsCreation: while Docker copies into a container of containerd's client, no task mounts its files a
// second time, and the other way round.
func TestCopyMeetsCreation(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skipf("needs root: %s opens the container's mounts", t.Name())
	}
	n := newGuestNode(t)
	if _, err := n.snaps.Prepare(n.ctx, "layer", ""); err != nil {
		t.Fatal(err)
	}
	_, err := n.e.ContainerStore().Create(n.ctx, containers.Container{
		ID: "g", Snapshotter: "fake", SnapshotKey: "layer",
		Runtime: containers.RuntimeInfo{Name: RuntimeRunc}, Spec: &anypb.Any{TypeUrl: specType, Value: []byte("{}")},
	})
	if err != nil {
		t.Fatal(err)
	}
	raw := makeTar(t, tar.Header{Name: "f", Typeflag: tar.TypeReg, Mode: 0o600})
	pr, pw := io.Pipe()
	copied := make(chan error, 1)
	go func() { copied <- n.e.PutArchive(bg, "g", "/", pr, PutOptions{}) }()
	if _, err := pw.Write(raw[:512]); err != nil { // it has been taken: the copy is under way
		t.Fatal(err)
	}
	file := filepath.Join(n.snaps.root, "layer", "f")
	n.at("task.create", func() {
		if _, err := os.Stat(file); err != nil {
			t.Error("a task was made of a container that is being copied into")
		}
	})
	ctx := newReachContext(n.ctx)
	created := make(chan error, 1)
	go func() {
		_, err := n.e.CreateTask(ctx, "g", TaskConfig{})
		created <- err
	}()
	select {
	case <-ctx.reached: // it waits
	case err := <-created:
		created <- err
	}
	go func() {
		_, err := pw.Write(raw[512:])
		pw.CloseWithError(errors.Join(err, io.EOF))
	}()
	if err := <-copied; err != nil {
		t.Error(err)
	}
	if err := <-created; err != nil {
		t.Error(err)
	}
	if got := n.count("task.create"); got != 1 {
		t.Errorf("%d tasks", got)
	}
}

// always makes a guest that is to be started again whenever it ends, and gives its record.
func (n *taskNode) always(id string) (*fakeTaskShim, containers.Container) {
	n.t.Helper()
	s := n.guest(id, testImage)
	labels := map[string]string{labelRestartStatus: "running", labelRestartPolicy: "always"}
	rec, err := n.e.ContainerStore().Update(n.ctx, containers.Container{ID: id, Labels: labels}, "labels."+labelRestartStatus, "labels."+labelRestartPolicy)
	if err != nil {
		n.t.Fatal(err)
	}
	return s, rec
}

// TestGuestStaysStopped: a guest that somebody ends through Docker's API is not started again by its restart policy, not even
// if it was to be just now.
func TestGuestStaysStopped(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		do    func(n *taskNode) error
		again int // tasks that are made after it
	}{
		"stop": {func(n *taskNode) error { return n.e.StopContainer(bg, "g", StopOptions{}) }, 0},
		"kill": {func(n *taskNode) error { return n.e.KillContainer(bg, "g", "KILL") }, 0},
		"term": {func(n *taskNode) error { return n.e.KillContainer(bg, "g", "TERM") }, 0},
		"rm":   {func(n *taskNode) error { return n.e.RemoveContainer(bg, "g", RemoveOptions{Force: true}) }, 0},
		"hup":  {func(n *taskNode) error { return n.e.KillContainer(bg, "g", "HUP") }, 1},
		"stop one that has ended": {func(n *taskNode) error {
			n.tasks.shim(n.bundleOf("g")).end(1)
			if _, err := n.e.WaitTask(n.ctx, "g", ""); err != nil {
				return err
			}
			if err := n.e.StopContainer(bg, "g", StopOptions{}); !errdefs.IsNotModified(err) {
				return err
			}
			return nil
		}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newGuestNode(t)
			_, rec := n.always("g")
			if err := c.do(n); err != nil {
				t.Fatal(err)
			}
			if name != "rm" {
				if _, err := n.e.WaitTask(n.ctx, "g", ""); err != nil {
					t.Fatal(err)
				}
			}
			before := n.count("task.create")
			if err := n.e.fulfil(n.ctx, rec); err != nil && !errdefs.IsNotFound(err) { // by the record of before
				t.Error(err)
			}
			if got := n.count("task.create") - before; got != c.again {
				t.Errorf("%d tasks, want %d", got, c.again)
			}
		})
	}
}

// TestNamesAreOneSet: Docker and containerd's clients do not get one name twice, not even at the same time.
func TestNamesAreOneSet(t *testing.T) {
	t.Parallel()
	n := newGuestNode(t)
	cs := n.e.ContainerStore()
	n.create("web", Config{Image: testImage})
	rec := func(id, name string) containers.Container {
		return containers.Container{ID: id, Labels: map[string]string{nerdctlName: name}, Runtime: containers.RuntimeInfo{Name: RuntimeRunc}, Spec: &anypb.Any{TypeUrl: specType, Value: []byte("{}")}}
	}
	for _, c := range []containers.Container{rec("web", ""), rec("g1", "web")} {
		if _, err := cs.Create(n.ctx, c); !errdefs.IsAlreadyExists(err) {
			t.Errorf("%s, %v: %v", c.ID, c.Labels, err)
		}
	}
	if _, err := cs.Create(n.ctx, rec("g1", "db")); err != nil {
		t.Fatal(err)
	}
	if _, err := cs.Update(n.ctx, rec("g1", "web"), "labels."+nerdctlName); !errdefs.IsAlreadyExists(err) {
		t.Errorf("renamed: %v", err)
	}
	for _, name := range []string{"g1", "db"} {
		if _, _, err := n.e.CreateContainer(bg, name, Config{Image: testImage}); !errdefs.IsConflict(err) {
			t.Errorf("Docker makes %s: %v", name, err)
		}
		if err := n.e.RenameContainer(bg, "web", name); !errdefs.IsConflict(err) {
			t.Errorf("Docker renames to %s: %v", name, err)
		}
	}
	// Between a look and a record.
	n.records.before = func() {
		n.records.before = nil
		if _, _, err := n.e.CreateContainer(bg, "both", Config{Image: testImage}); !errdefs.IsConflict(err) {
			t.Errorf("Docker takes a name that is being given: %v", err)
		}
	}
	if _, err := cs.Create(n.ctx, rec("h", "both")); err != nil {
		t.Error(err)
	}
	// What was refused holds no name.
	if err := n.e.RenameContainer(bg, "web", "www"); err != nil {
		t.Error(err)
	}
	if _, err := cs.Update(n.ctx, rec("g1", "web"), "labels."+nerdctlName); err != nil {
		t.Errorf("a name that is free: %v", err)
	}
}

// TestClientLabels: nerdctl finds Docker's containers by their names, and keeps notes on them whenever it stops one; what they are stays
// Docker's to change.
func TestClientLabels(t *testing.T) {
	t.Parallel()
	n := newGuestNode(t)
	id := n.create("web", Config{Image: testImage, Labels: map[string]string{"a": "b", "empty": ""}})
	cs := n.e.ContainerStore()
	get := func() containers.Container {
		t.Helper()
		rec, err := cs.Get(n.ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		return rec
	}
	rec := get()
	var spec struct{ Annotations map[string]string }
	if err := json.Unmarshal(rec.Spec.GetValue(), &spec); err != nil || spec.Annotations[nerdctlNetworks] != `["none"]` {
		t.Errorf("%v, %v", spec, err)
	}
	if rec.Labels[nerdctlName] != "web" || rec.Labels["a"] != "b" {
		t.Errorf("labels %v", rec.Labels)
	}
	// All of it comes back, as clients do it.
	rec.Labels[labelRestartStopped] = "true"
	if out, err := cs.Update(n.ctx, rec); err != nil || out.Labels[labelRestartStopped] != "true" {
		t.Fatalf("%v, %v", out.Labels, err)
	}
	if _, err := cs.Update(n.ctx, containers.Container{ID: id, Labels: map[string]string{"nerdctl/error": "e"}}, "labels.nerdctl/error"); err != nil {
		t.Error(err)
	}
	n.reboot()
	cs = n.e.ContainerStore()
	if got := get().Labels; got[labelRestartStopped] != "true" || got["nerdctl/error"] != "e" || got["a"] != "b" {
		t.Errorf("after a restart: %v", got)
	}
	if c, err := n.e.Container(bg, id); err != nil || len(c.Labels) != 2 {
		t.Errorf("Docker sees %v, %v", c.Labels, err)
	}
	for name, change := range map[string]func(*containers.Container){
		"image":      func(c *containers.Container) { c.Image = "other" },
		"spec":       func(c *containers.Container) { c.Spec = &anypb.Any{TypeUrl: specType, Value: []byte("{}")} },
		"no spec":    func(c *containers.Container) { c.Spec = nil },
		"snapshot":   func(c *containers.Container) { c.SnapshotKey = "other" },
		"label":      func(c *containers.Container) { c.Labels["a"] = "c" },
		"less":       func(c *containers.Container) { delete(c.Labels, "a") },
		"more":       func(c *containers.Container) { c.Labels["x"] = "y" },
		"name":       func(c *containers.Container) { c.Labels[nerdctlName] = "www" },
		"extensions": func(c *containers.Container) { c.Extensions = map[string]typeurl.Any{"x": &anypb.Any{}} },
	} {
		rec := get()
		change(&rec)
		if _, err := cs.Update(n.ctx, rec); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := cs.Update(n.ctx, get(), "spec"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("by its path: %v", err)
	}
	rec = get()
	delete(rec.Labels, labelRestartStopped)
	if out, err := cs.Update(n.ctx, rec); err != nil || out.Labels[labelRestartStopped] != "" || out.Labels["nerdctl/error"] != "e" {
		t.Errorf("taken back: %v, %v", out.Labels, err)
	}
}
