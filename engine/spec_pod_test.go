package engine

import (
	"slices"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestShareSys(t *testing.T) {
	t.Parallel()
	s := &specs.Spec{Mounts: []specs.Mount{{Destination: "/proc", Type: "proc"}, {Destination: "/sys", Type: "sysfs", Options: []string{"rw"}}}}
	shareSys(s)
	if m := s.Mounts[1]; m.Type != "bind" || m.Source != "/sys" || !slices.Contains(m.Options, "ro") || slices.Contains(m.Options, "rbind") || s.Mounts[0].Type != "proc" {
		t.Errorf("%+v", s.Mounts)
	}
}

// TestUsernsOnHostNetwork: the pod has a user namespace, and no network namespace of its own.
func TestUsernsOnHostNetwork(t *testing.T) {
	t.Parallel()
	c := hostPod("p")
	c.IPC = NamespacePod
	c.Userns = &Userns{UIDs: []IDMap{{Host: 100000, Size: 65536}}, GIDs: []IDMap{{Host: 100000, Size: 65536}}}
	n := newNode(t)
	if err := n.e.validateSandbox(c); err != nil {
		t.Error(err)
	}
	c.IPC = NamespaceNode
	if err := n.e.validateSandbox(c); err == nil {
		t.Error("with the host's IPC namespace")
	}
}
