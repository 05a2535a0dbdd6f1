package engine

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
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

// TestAnnotatedCDI: devices that annotations name are those of the field.
func TestAnnotatedCDI(t *testing.T) {
	t.Parallel()
	c := memberConfig("c")
	c.Pod.CDIDevices = []string{"vendor.com/class=b"}
	c.Annotations = map[string]string{"cdi.k8s.io/vendor.class_2": "vendor.com/class=d,vendor.com/class=c", "cdi.k8s.io/vendor.class_1": "vendor.com/class=b,vendor.com/class=a", "other": "x"}
	if err := annotatedCDI(&c); err != nil {
		t.Fatal(err)
	}
	if want := []string{"vendor.com/class=b", "vendor.com/class=a", "vendor.com/class=c", "vendor.com/class=d"}; !slices.Equal(c.Pod.CDIDevices, want) {
		t.Errorf("devices %q", c.Pod.CDIDevices)
	}
	n := newNode(t)
	if _, err := n.e.CreatePodContainer(bg, n.pod(hostPod("p")), c); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "unresolvable") {
		t.Errorf("devices that are not there: %v", err)
	}
	c.Annotations = map[string]string{"cdi.k8s.io/x": "none"}
	if err := annotatedCDI(&c); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no name of a device: %v", err)
	}
}

// TestMergeUnified: a kubelet that changes one file of a cgroup says nothing of the others.
func TestMergeUnified(t *testing.T) {
	t.Parallel()
	old := Resources{Unified: map[string]string{"memory.oom.group": "1", "memory.high": "5"}}
	got := mergePodResources(old, Resources{Unified: map[string]string{"memory.high": "max"}})
	if want := map[string]string{"memory.oom.group": "1", "memory.high": "max"}; !maps.Equal(got.Unified, want) || old.Unified["memory.high"] != "5" {
		t.Errorf("%v, and %v before", got.Unified, old.Unified)
	}
}
