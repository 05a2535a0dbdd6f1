package engine

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// soon ends a test that hangs: a shim that is stuck never answers. It says nothing of how fast anything is.
const soon = 5 * time.Minute

// within fails the test if f takes long.
func within(t *testing.T, limit time.Duration, what string, f func() error) {
	t.Helper()
	begin := time.Now()
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	case <-time.After(limit):
		t.Fatalf("%s takes longer than %v", what, limit)
	}
	t.Logf("%s: %v", what, time.Since(begin))
}

// TestStuckShim: a shim that does not answer stalls its own pod and nothing else, and the pod can be
// stopped and removed all the same.
func TestStuckShim(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	bad, good := n.pod(hostPod("bad")), n.pod(hostPod("good"))
	stuck, fine := n.member(bad, memberConfig("a")), n.member(good, memberConfig("a"))
	n.shims.mu.Lock()
	shim := n.shims.live[n.e.sandboxDir(bad)]
	n.shims.mu.Unlock()
	if shim == nil {
		t.Fatal("the pod has no shim")
	}
	shim.stuck.Store(true)

	all := func(Container) bool { return true }
	within(t, soon, "lists", func() error { n.e.Sandboxes(bg); n.e.PodContainers(bg); n.e.SandboxContainers(bg, bad); return nil })
	within(t, soon, "status", func() error { _, err := n.e.Container(bg, stuck); return err })
	within(t, soon, "statistics", func() error {
		n.e.PodContainerUsage(bg, all)
		n.e.SandboxUsages(bg, func(Sandbox) bool { return true })
		n.e.PodMetrics(bg)
		return nil
	})
	if n := shim.asked.Load(); n != 0 {
		t.Errorf("the shim was asked %d times for what is known without it", n)
	}
	within(t, soon, "an impatient client", func() error {
		ctx, cancel := context.WithTimeout(bg, 200*time.Millisecond)
		defer cancel()
		if err := n.e.PauseContainer(ctx, stuck); err == nil {
			t.Error("a stuck shim has paused something")
		}
		return nil
	})
	within(t, soon, "another pod", func() error {
		if err := n.e.StopContainer(bg, fine, StopOptions{}); err != nil {
			return err
		}
		return n.e.RemoveSandbox(bg, good)
	})
	within(t, soon, "a new pod", func() error { n.member(n.pod(hostPod("new")), memberConfig("a")); return nil })
	within(t, soon, "the stop of its own pod", func() error { return n.e.StopSandbox(bg, bad) })
	if n.shims.breaker.count("kill shim") != 1 {
		t.Errorf("the shim was killed %d times", n.shims.breaker.count("kill shim"))
	}
	if v, err := n.e.Container(bg, stuck); err != nil || v.State.live() || v.State.ExitCode != 137 {
		t.Errorf("its container: %+v, %v", v.State, err)
	}
	within(t, soon, "its removal", func() error { return n.e.RemoveSandbox(bg, bad) })
}

// TestStuckStart: the start of a container that hangs, as on a mount whose server is gone, holds its
// pod alone, and ends with it.
func TestStuckStart(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	bad, good := n.pod(hostPod("bad")), n.pod(hostPod("good"))
	n.member(bad, memberConfig("a"))
	id, err := n.e.CreatePodContainer(bg, bad, memberConfig("b"))
	if err != nil {
		t.Fatal(err)
	}
	n.shims.mu.Lock()
	shim := n.shims.live[n.e.sandboxDir(bad)]
	n.shims.mu.Unlock()
	shim.stuck.Store(true)
	started := make(chan error, 1)
	go func() { started <- n.e.StartPodContainer(bg, id) }()
	n.eventually("the start hangs", func() bool { return shim.asked.Load() > 0 })

	within(t, soon, "lists", func() error { n.e.Sandboxes(bg); n.e.PodContainers(bg); return nil })
	within(t, soon, "statistics", func() error { n.e.PodMetrics(bg); _, err := n.e.SandboxUsage(bg, bad); return err })
	within(t, soon, "another pod", func() error { n.member(good, memberConfig("b")); return n.e.RemoveSandbox(bg, good) })
	select {
	case err := <-started:
		t.Fatalf("the start does not hang: %v", err)
	default:
	}
	within(t, soon, "the removal of its own pod", func() error { return n.e.RemoveSandbox(bg, bad) })
	if err := <-started; err == nil {
		t.Error("it has started")
	}
	n.empty()
}

// TestDamagedRecord: one record that cannot be read keeps no other object, and nothing of its
// own is deleted.
func TestDamagedRecord(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	bad, good := n.pod(hostPod("bad")), n.pod(hostPod("good"))
	lost, kept := n.member(bad, memberConfig("a")), n.member(good, memberConfig("a"))
	n.e.cancel(errClosed)
	n.e.work.Wait()
	for _, with := range []string{"", "\x00\x00", "{", `{"version":1}`, `{"version":99}`, `[]`, "null", strings.Repeat("[", 1<<16)} {
		n.containers.damage(lost, with)
		n.sandboxes.damage(bad, with)
		n.volumes.damage("v", with)
		n.boot()
		if got := n.podState(good); got != SandboxReady {
			t.Errorf("%.20q: the other pod is %s", with, got)
		}
		if v, err := n.e.Container(bg, kept); err != nil || v.State.Status != StatusRunning {
			t.Errorf("%.20q: the other container: %+v, %v", with, v.State, err)
		}
		if _, err := os.Stat(filepath.Join(n.e.dir(lost))); err != nil {
			t.Errorf("%.20q: the container's files: %v", with, err)
		}
		n.e.cancel(errClosed)
		n.e.work.Wait()
	}
	n.boot()
}
