package engine

import (
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestSetRuntimes(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	if kept := n.e.SetRuntimes(map[string]string{"a": "/a", "b": "/b"}); len(kept) != 0 {
		t.Errorf("kept %v", kept)
	}
	n.create("cc", Config{Runtime: "a"})
	c := hostPod("p")
	c.Runtime = "b"
	n.pod(c)
	if kept := n.e.SetRuntimes(map[string]string{"b": "/new", "d": "/d"}); !slices.Equal(slices.Sorted(slices.Values(kept)), []string{"a", "b"}) {
		t.Errorf("kept %v", kept)
	}
	if got := n.e.Runtimes(); !maps.Equal(got, map[string]string{"a": "/a", "b": "/b", "d": "/d"}) {
		t.Errorf("%v", got)
	}
	c = hostPod("q")
	c.Runtime = "gone"
	if _, err := n.e.RunSandbox(bg, c); err == nil {
		t.Error("a runtime that is not there")
	}
}

// After a restart with another configuration, what was made for a runtime that is gone does
// not run on hako's own.
func TestRuntimeThatIsGone(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.e.SetRuntimes(map[string]string{"vm": "/vm"})
	id := n.create("lone", Config{Runtime: "vm"})
	c := hostPod("p")
	c.Runtime = "vm"
	pod := n.pod(c)
	member := func() error {
		_, err := n.e.CreatePodContainer(bg, pod, memberConfig("a", "sleep"))
		return err
	}
	n.e.runtimesNow.Store(&map[string]string{}) // as a restart finds it
	if err := n.e.StartContainer(bg, id); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "runtime vm is not configured any more") {
		t.Errorf("lone: %v", err)
	}
	if err := member(); !errdefs.IsInvalidArgument(err) {
		t.Errorf("member: %v", err)
	}
	s, err := n.e.pods.get(pod)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.e.podShim(bg, s); !errdefs.IsFailedPrecondition(err) { // of a member made before
		t.Errorf("the pod's shim: %v", err)
	}
	if got := n.shims.count(); got != 0 {
		t.Errorf("%d shims were started", got)
	}
	n.e.SetRuntimes(map[string]string{"vm": "/vm"})
	if err := errors.Join(n.e.StartContainer(bg, id), member()); err != nil {
		t.Errorf("configured again: %v", err)
	}
}
