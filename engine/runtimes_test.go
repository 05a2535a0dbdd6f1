package engine

import (
	"maps"
	"slices"
	"testing"
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
