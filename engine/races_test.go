package engine

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"testing"
	"time"

	boxes "github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// What two operations that meet may not do to each other. Each test holds one of them where the other comes by.

// TestCreateMeetsRemoval: a container that comes into a sandbox while that is being removed goes with it, however they meet.
func TestCreateMeetsRemoval(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	for _, step := range []string{"sandboxes.delete", "containers.put"} {
		pod := n.pod(hostPod("p"))
		var wg sync.WaitGroup
		create := func() {
			if _, err := n.e.CreatePodContainer(bg, pod, memberConfig("a", "sleep")); !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
				t.Errorf("%s: a container in a sandbox that is removed: %v", step, err)
			}
		}
		remove := func() {
			if err := n.e.RemoveSandbox(bg, pod); err != nil {
				t.Errorf("%s: %v", step, err)
			}
		}
		if step == "sandboxes.delete" { // the removal has looked for containers already
			reached, made := make(chan struct{}), make(chan struct{})
			n.at("containers.put", func() { close(reached); <-made }) // it was ready when this was asked for
			n.at(step, func() { close(made); wg.Wait() })
			wg.Go(create)
			<-reached
			remove()
		} else { // the removal is over before the container is there
			n.at(step, remove)
			create()
		}
		wg.Wait()
		n.empty()
	}
}

// TestUpdateMeetsRemoval: what waited for the ticket of a sandbox that was removed does not write its record again.
func TestUpdateMeetsRemoval(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	pod := n.pod(hostPod("p"))
	s, err := n.e.pods.get(pod)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.e.RemoveSandbox(bg, pod); err != nil {
		t.Fatal(err)
	}
	n.e.pods.add(s) // as it was found just before
	if err := n.e.UpdateSandboxResources(bg, pod, &Resources{Memory: 1 << 30}, nil); !errdefs.IsNotFound(err) {
		t.Errorf("an update of what is gone: %v", err)
	}
	n.e.pods.remove(s)
	n.empty()
}

// TestUnclaimedSandboxThatStays: one that nobody came for, and that cannot be removed, can be found: it holds its name.
func TestUnclaimedSandboxThatStays(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	broken := errors.New("broken")
	s, err := n.e.runSandbox(n.e.ns(bg), hostPod("p"))
	if err != nil {
		t.Fatal(err)
	}
	n.breakStep("sandboxes.delete", broken)
	if err := n.e.dropSandbox(bg, s); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
	n.breakStep("", nil)
	if err := n.e.RemoveSandbox(bg, s.id); err != nil {
		t.Error(err)
	}
	n.empty()
}

// TestNetworkFailsMeanwhile: the network fails while the shim makes the container. That is waited for, and taken back.
func TestNetworkFailsMeanwhile(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	id := n.create("web", Config{Image: "test", Cmd: []string{"sleep"}})
	broken := errors.New("broken")
	under := make(chan struct{})
	n.shims.slow = func(ctx context.Context) {
		close(under)
		select {
		case <-ctx.Done():
			t.Error("the creation was given up: nobody knows whether Shutdown comes to the shim before or after it")
		case <-time.After(100 * time.Millisecond):
		}
	}
	n.at("connect", func() { <-under })
	n.breakStep("connect", broken)
	if err := n.e.StartContainer(bg, id); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
	n.breakStep("", nil)
	n.shims.slow = nil
	if c := n.shims.count(); c != 0 {
		t.Errorf("%d shims left", c)
	}
	if err := n.e.StartContainer(bg, id); err != nil {
		t.Error(err)
	}
}

// TestAttachMeetsStart: a client that attaches in the moment of the start is connected to that run, not to the next one.
func TestAttachMeetsStart(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	id := n.create("web", Config{Image: "test", Cmd: []string{"sleep"}})
	var a Attachment
	n.at("task.start", func() {
		var err error
		if a, err = n.e.Attach(bg, id, AttachOptions{Stream: true, Stdout: true}); err != nil {
			t.Error(err)
		}
	})
	if err := n.e.StartContainer(bg, id); err != nil {
		t.Fatal(err)
	}
	if _, p, err := a.ReadFrame(); err != nil || string(p) != "hello\n" {
		t.Errorf("%q, %v", p, err)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() { a.Close() })
	}
	wg.Wait()
}

// TestStopMeetsRestart: the policy's next start is under way when a client stops the container.
func TestStopMeetsRestart(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	id := n.create("web", Config{Image: "test", Cmd: []string{"sleep"}, Restart: RestartPolicy{Name: "always"}})
	if err := n.e.StartContainer(bg, id); err != nil {
		t.Fatal(err)
	}
	stopped := make(chan error, 1)
	n.at("task.start", func() {
		waiting := make(chan struct{})
		go func() { close(waiting); stopped <- n.e.StopContainer(bg, id, StopOptions{}) }()
		<-waiting
		n.eventually("it is asked to stop", func() bool {
			c, _ := n.e.containers.get(id)
			c.mu.Lock()
			defer c.mu.Unlock()
			return c.rec.State.Status == StatusExited
		})
	})
	n.kill(id)
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	if s := n.state_(id); s.Status != StatusExited {
		t.Errorf("after the stop it is %s", s.Status)
	}
}

// TestKillMeetsPause: what is killed while it is being frozen is thawed, since it cannot end as long as it is frozen.
func TestKillMeetsPause(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.shims.freezes = true
	id := n.create("web", Config{Image: "test", Cmd: []string{"sleep"}})
	if err := n.e.StartContainer(bg, id); err != nil {
		t.Fatal(err)
	}
	c, err := n.e.containers.get(id)
	if err != nil {
		t.Fatal(err)
	}
	n.at("pause", func() { // it is frozen, and not yet known to be
		if err := n.e.signal(bg, c, c.run, int(unix.SIGKILL), true); err != nil {
			t.Error(err)
		}
	})
	_ = n.e.PauseContainer(bg, id)
	n.eventually("its end", func() bool { return n.state_(id).Status == StatusExited })
}

// TestPauseGoesOn: a client that goes away while a container is being frozen leaves it in a state that is known.
func TestPauseGoesOn(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	id := n.create("web", Config{Image: "test", Cmd: []string{"sleep"}})
	if err := n.e.StartContainer(bg, id); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(bg)
	left := make(chan struct{})
	n.at("pause", func() { cancel(); <-left })
	if err := n.e.PauseContainer(ctx, id); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	close(left)
	n.eventually("it is paused", func() bool { return n.state_(id).Status == StatusPaused })
	if err := n.e.UnpauseContainer(bg, id); err != nil {
		t.Error(err)
	}
}

// TestRestartsOfAutoRemoved: a container that removes itself is not removed by any of its restarts, and still removes itself then.
func TestRestartsOfAutoRemoved(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	id := n.create("web", Config{Image: "test", Cmd: []string{"sleep"}, AutoRemove: true})
	if err := n.e.StartContainer(bg, id); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if err := n.e.RestartContainer(bg, id, StopOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	n.kill(id)
	n.eventually("it has removed itself", func() bool { _, err := n.e.containers.get(id); return err != nil })
}

// TestPruneMeetsCreation: a volume or an image that a container is being made with is in use, until the container shows that.
func TestPruneMeetsCreation(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	prune := func() {
		if p, err := n.e.PruneVolumes(bg, Filters{"all": {"1"}}); err != nil || len(p.IDs) != 0 {
			t.Errorf("pruned %v, %v", p.IDs, err)
		}
		if _, err := n.e.RemoveImage(bg, "test", true, false); !errdefs.IsConflict(err) {
			t.Errorf("the image was removed: %v", err)
		}
	}
	n.at("containers.put", prune)
	m, err := n.e.makeContainer(n.e.ns(bg), "web", Config{Image: "test", Mounts: []Mount{{Kind: MountVolume, Target: "/data"}}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	prune() // nobody has come for it yet
	n.e.publish(m)
	if err := n.e.RemoveContainer(bg, m.c.id, RemoveOptions{Volumes: true}); err != nil {
		t.Error(err)
	}
	if list, err := n.e.Volumes(bg, nil); err != nil || len(list) != 0 {
		t.Errorf("%v, %v", list, err)
	}
	if _, err := n.e.RemoveImage(bg, "test", true, false); err != nil {
		t.Error(err)
	}
}

// TestRemovalThatCannotBegin: a removal that gave up leaves the container to the next one.
func TestRemovalThatCannotBegin(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	id := n.create("web", Config{Image: "test", Cmd: []string{"sleep"}})
	c, err := n.e.containers.get(id)
	if err != nil {
		t.Fatal(err)
	}
	c.saving <- struct{}{} // a write that hangs
	if err := errors.Join(c.claim(true), c.acquire(bg)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(bg)
	cancel()
	if err := n.e.removeHeld(ctx, c, false); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	c.release()
	<-c.saving
	if err := n.e.RemoveContainer(bg, id, RemoveOptions{}); err != nil {
		t.Error(err)
	}
}

// TestShutdownMeetsCreation: a sandbox of a client's that is shut down while it is being made is not given up half way.
func TestShutdownMeetsCreation(t *testing.T) {
	t.Parallel()
	for _, broken := range []error{nil, errors.New("broken")} {
		n := newTaskNode(t)
		n.breakStep("sandbox.create", broken)
		c, err := n.e.SandboxController("")
		if err != nil {
			t.Fatal(err)
		}
		down := make(chan error, 1)
		n.at("sandbox.create", func() {
			go func() { down <- c.Shutdown(n.ctx, "box") }()
			select {
			case <-down:
				t.Error("it was shut down while it was being made")
				down <- nil
			case <-time.After(20 * time.Millisecond): // it waits
			}
		})
		if err := c.Create(n.ctx, boxes.Sandbox{ID: "box", Runtime: boxes.RuntimeOpts{Name: RuntimeRunc}}); !errors.Is(err, broken) {
			t.Errorf("%v", err)
		}
		if err := <-down; err != nil {
			t.Error(err)
		}
		if list := n.e.rooms.in(""); len(list) != 0 {
			t.Errorf("%d are left", len(list))
		}
		n.tasks.mu.Lock()
		if len(n.tasks.live) != 0 {
			t.Errorf("%d shims are left", len(n.tasks.live))
		}
		n.tasks.mu.Unlock()
	}
}

// TestShutdownOfASilentShim: a sandbox whose shim does not answer is not forgotten, and can be shut down later. Its shim's
// folder goes with the last task.
func TestShutdownOfASilentShim(t *testing.T) {
	t.Parallel()
	n := newTaskNode(t)
	c, err := n.e.SandboxController("")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Create(n.ctx, boxes.Sandbox{ID: "box", Runtime: boxes.RuntimeOpts{Name: RuntimeRunc}}); err != nil {
		t.Fatal(err)
	}
	n.tasks.silent.Store(true)
	n.reboot()
	if c, err = n.e.SandboxController(""); err != nil {
		t.Fatal(err)
	}
	if err := c.Shutdown(n.ctx, "box"); !errdefs.IsUnavailable(err) {
		t.Errorf("%v", err)
	}
	if list := n.e.rooms.in(""); len(list) != 1 {
		t.Errorf("%d are left", len(list))
	}
	n.tasks.silent.Store(false)
	n.eventually("it answers", func() bool { return !errdefs.IsUnavailable(c.Shutdown(n.ctx, "box")) })
	if list := n.e.rooms.in(""); len(list) != 0 {
		t.Errorf("%d are left", len(list))
	}
	if left := folders(filepath.Join(n.state, groupFolder)); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	if len(n.tasks.live) != 0 {
		t.Errorf("%d shims are left", len(n.tasks.live))
	}
}

// TestDeletionThatFails: a task whose process ended while its deletion failed is stopped, and can be deleted.
func TestDeletionThatFails(t *testing.T) {
	t.Parallel()
	n := newTaskNode(t)
	n.record("a", `{}`)
	if _, err := n.e.CreateTask(n.ctx, "a", TaskConfig{}); err != nil {
		t.Fatal(err)
	}
	shim := n.tasks.shim(n.bundleOf("a"))
	task, err := n.e.task(n.ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	n.breakStep("task.delete", errors.New("broken"))
	n.at("task.delete", func() { shim.end(137); <-task.exited })
	if _, err := n.e.DeleteTask(n.ctx, "a"); err == nil {
		t.Error("it was deleted")
	}
	n.breakStep("", nil)
	if s := task.status(); s != taskStopped {
		t.Errorf("it is %v", s)
	}
	if _, err := n.e.StartTask(n.ctx, "a", ""); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("start: %v", err)
	}
	if _, err := n.e.DeleteTask(n.ctx, "a"); err != nil {
		t.Error(err)
	}
	if err := task.acquire(n.ctx); !errdefs.IsNotFound(err) {
		t.Errorf("the ticket of what is gone: %v", err)
	}
}

// kill ends a container as if it had ended by itself.
func (n *node) kill(id string) {
	n.t.Helper()
	n.shims.mu.Lock()
	s := n.shims.live[n.e.bundle(id)]
	n.shims.mu.Unlock()
	p, err := s.proc(id, "")
	if err != nil {
		n.t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p.end(1)
}
