package engine

import (
	"slices"
	"testing"
	"time"

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

// TestAmbient: an ambient capability is in all sets, also one that containers do not have by themselves.
func TestAmbient(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		names, drop, want []string
	}{
		{names: []string{"NET_ADMIN"}, want: []string{"CAP_NET_ADMIN"}},
		{names: []string{"NET_BIND_SERVICE"}, drop: []string{"ALL"}, want: []string{"CAP_NET_BIND_SERVICE"}},
		{names: []string{"NET_ADMIN", "KILL"}, drop: []string{"ALL", "KILL"}, want: []string{"CAP_NET_ADMIN"}},
		{names: []string{"KILL"}, drop: []string{"cap_kill"}},
	} {
		set := capabilitySets([]string{"CAP_CHOWN"}, 1000)
		if err := addAmbient(set, c.names, c.drop, hostFacts{}); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(set.Ambient, c.want) || !slices.Equal(set.Bounding, append([]string{"CAP_CHOWN"}, c.want...)) ||
			!slices.Equal(set.Effective, c.want) || !slices.Equal(set.Permitted, c.want) || !slices.Equal(set.Inheritable, c.want) {
			t.Errorf("%v without %v: %+v", c.names, c.drop, set)
		}
	}
	if err := addAmbient(&specs.LinuxCapabilities{}, []string{"NONE"}, nil, hostFacts{}); err == nil {
		t.Error("an unknown one")
	}
}

func TestLongGrace(t *testing.T) {
	t.Parallel()
	for _, seconds := range []int{1 << 33, 18446744074, 1<<63 - 1} { // 18446744074 s are 0.3 s, modulo 2^64 ns
		if _, timeout, err := stopParameters(Container{}, StopOptions{Timeout: &seconds}); err != nil || timeout < 99*365*24*time.Hour {
			t.Errorf("%d s became %v, %v", seconds, timeout, err)
		}
	}
	never := -1
	if _, timeout, err := stopParameters(Container{}, StopOptions{Timeout: &never}); err != nil || timeout >= 0 {
		t.Errorf("no end became %v, %v", timeout, err)
	}
}
