package engine

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// baseSpec is what a plugin finds.
func baseSpec() *specs.Spec {
	return &specs.Spec{
		Annotations: map[string]string{"keep": "1", "drop": "1"},
		Process: &specs.Process{
			Args: []string{"app"}, Env: []string{"KEEP=1", "DROP=1", "SET=old"},
			Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1, Hard: 1}},
		},
		Mounts: []specs.Mount{{Destination: "/proc", Type: "proc"}, {Destination: "/dev", Type: "tmpfs"}, {Destination: "/dev/shm", Type: "tmpfs"},
			{Destination: "/drop", Type: "bind"}, {Destination: "/data/deep", Type: "bind"}},
		Linux: &specs.Linux{
			Sysctl: map[string]string{"net.a": "1", "net.drop": "1"}, CgroupsPath: "/old",
			Namespaces: []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.PIDNamespace}, {Type: specs.IPCNamespace, Path: "/old"}},
			Devices:    []specs.LinuxDevice{{Path: "/dev/keep"}, {Path: "/dev/drop"}},
			Resources:  &specs.LinuxResources{},
		},
	}
}

func TestAdjustmentIsLaidOver(t *testing.T) {
	t.Parallel()
	a := Adjustment{
		Annotations: map[string]string{"new": "2"}, RemoveAnnotations: []string{"drop"},
		Mounts:       []specs.Mount{{Destination: "/data", Type: "bind", Source: "/x", Options: []string{"rbind", "rshared"}}, {Destination: "/dev/shm", Type: "tmpfs", Source: "mine"}},
		RemoveMounts: []string{"/drop/"},
		Env:          []string{"SET=new", "MORE=1"}, RemoveEnv: []string{"DROP"},
		Args:    []string{"other", "arg"},
		Hooks:   &specs.Hooks{Poststop: []specs.Hook{{Path: "/bin/true"}}},
		Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 5, Hard: 6}, {Type: "RLIMIT_CORE"}},
		Devices: []specs.LinuxDevice{{Path: "/dev/new", Type: "c", Major: 10, Minor: 200}}, RemoveDevices: []string{"/dev/drop"},
		DeviceRules: []specs.LinuxDeviceCgroup{{Allow: true, Type: "b", Access: "r"}},
		CgroupsPath: "/new", IOPriority: &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_BE, Priority: 3},
		Scheduler: &specs.Scheduler{Policy: specs.SchedBatch}, Seccomp: &specs.LinuxSeccomp{DefaultAction: specs.ActAllow},
		Namespaces: []specs.LinuxNamespace{{Type: specs.IPCNamespace, Path: "/new"}}, RemoveNamespaces: []specs.LinuxNamespaceType{specs.PIDNamespace},
		Sysctl: map[string]string{"net.b": "2"}, RemoveSysctl: []string{"net.drop"},
		NetDevices: map[string]specs.LinuxNetDevice{"eth7": {Name: "lan"}}, RDT: &specs.LinuxIntelRdt{ClosID: "gold"},
		MemoryPolicy: &specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "0"},
	}
	if err := a.validate(hostPod("p"), "cgroupfs"); err == nil {
		t.Error("a sysctl of the host's network namespace is possible")
	}
	s := baseSpec()
	a.apply(s)
	var mounts []string
	for _, m := range s.Mounts {
		mounts = append(mounts, m.Destination)
	}
	for _, c := range []struct {
		what string
		ok   bool
	}{
		{"annotations", len(s.Annotations) == 2 && s.Annotations["new"] == "2" && s.Annotations["keep"] == "1"},
		{"mounts", slices.Equal(mounts, []string{"/proc", "/dev", "/data", "/data/deep", "/dev/shm"}) && s.Mounts[4].Source == "mine"},
		{"propagation of the root", s.Linux.RootfsPropagation == "shared"},
		{"environment", slices.Equal(s.Process.Env, []string{"KEEP=1", "SET=new", "MORE=1"})},
		{"arguments", slices.Equal(s.Process.Args, []string{"other", "arg"})},
		{"hooks", s.Hooks != a.Hooks && len(s.Hooks.Poststop) == 1},
		{"limits", len(s.Process.Rlimits) == 2 && s.Process.Rlimits[0].Hard == 6},
		{"devices", len(s.Linux.Devices) == 2 && s.Linux.Devices[0].Path == "/dev/keep" && s.Linux.Devices[1].Path == "/dev/new"},
		{"device rules", len(s.Linux.Resources.Devices) == 2 && *s.Linux.Resources.Devices[0].Minor == 200 && s.Linux.Resources.Devices[0].Access == "rwm"},
		{"cgroup", s.Linux.CgroupsPath == "/new"},
		{"priorities", s.Process.IOPriority == a.IOPriority && s.Process.Scheduler == a.Scheduler},
		{"seccomp, RDT, memory policy", s.Linux.Seccomp == a.Seccomp && s.Linux.IntelRdt == a.RDT && s.Linux.MemoryPolicy == a.MemoryPolicy},
		{"namespaces", len(s.Linux.Namespaces) == 2 && s.Linux.Namespaces[1].Path == "/new"},
		{"sysctls", len(s.Linux.Sysctl) == 2 && s.Linux.Sysctl["net.b"] == "2"},
		{"network devices", s.Linux.NetDevices["eth7"].Name == "lan"},
	} {
		if !c.ok {
			t.Errorf("%s: %+v %+v %+v", c.what, s, s.Process, s.Linux)
		}
	}
	var none *Adjustment
	none.apply(baseSpec())
}

func TestAdjustmentsThatAreNotPossible(t *testing.T) {
	t.Parallel()
	own := hostPod("p")
	own.Network, own.IPC = NamespacePod, NamespacePod
	for text, a := range map[string]Adjustment{
		"annotation \"\"":                   {Annotations: map[string]string{"": "x"}},
		"mount destination \"data\"":        {Mounts: []specs.Mount{{Destination: "data", Type: "tmpfs"}}},
		"mount destination \"/..\"":         {Mounts: []specs.Mount{{Destination: "/..", Type: "tmpfs"}}},
		"NUL":                               {Mounts: []specs.Mount{{Destination: "/data", Source: "a\x00b", Type: "tmpfs"}}},
		"environment variable \"\"":         {Env: []string{"=x"}},
		"arguments":                         {Args: []string{""}},
		"hook \"true\"":                     {Hooks: &specs.Hooks{Poststart: []specs.Hook{{Path: "true"}}}},
		"time limit 0":                      {Hooks: &specs.Hooks{Poststart: []specs.Hook{{Path: "/bin/true", Timeout: ptr(0)}}}},
		"\"RLIMIT_FUN\" is not known":       {Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_FUN"}}},
		"soft limit 2 is above":             {Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_CORE", Soft: 2, Hard: 1}}},
		"device path":                       {Devices: []specs.LinuxDevice{{Path: "x", Type: "c"}}},
		"device /dev/x of type \"q\"":       {Devices: []specs.LinuxDevice{{Path: "/dev/x", Type: "q"}}},
		"device rule":                       {DeviceRules: []specs.LinuxDeviceCgroup{{Type: "c", Access: "x"}}},
		"a limit of the container":          {Resources: Resources{Memory: -5}},
		"invalid cpuset":                    {Resources: Resources{CpusetCPUs: "a-b"}},
		"oom_score_adj 2000":                {OOMScoreAdj: ptr(2000)},
		"cgroup path \"/a/../b\"":           {CgroupsPath: "/a/../b"},
		"I/O priority":                      {IOPriority: &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_BE, Priority: 8}},
		"seccomp action \"SCMP_ACT_MAYBE\"": {Seccomp: &specs.LinuxSeccomp{DefaultAction: "SCMP_ACT_MAYBE"}},
		"names no system call":              {Seccomp: &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Action: specs.ActErrno}}}},
		"seccomp listener":                  {Seccomp: &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, ListenerPath: "x"}},
		"namespace type \"space\"":          {Namespaces: []specs.LinuxNamespace{{Type: "space"}}},
		"path \"x\" of the ipc":             {Namespaces: []specs.LinuxNamespace{{Type: specs.IPCNamespace, Path: "x"}}},
		"the user namespace of a pod's":     {Namespaces: []specs.LinuxNamespace{{Type: specs.UserNamespace}}},
		"the mount namespace of a pod's":    {RemoveNamespaces: []specs.LinuxNamespaceType{specs.MountNamespace}},
		"sysctl \"vm.swappiness\"":          {Sysctl: map[string]string{"vm.swappiness": "1"}},
		"network device name \"a/b\"":       {NetDevices: map[string]specs.LinuxNetDevice{"a/b": {}}},
		"RDT class \"../x\"":                {RDT: &specs.LinuxIntelRdt{ClosID: "../x"}},
	} {
		err := a.validate(own, "cgroupfs")
		if err == nil || !strings.Contains(err.Error(), text) || !errdefs.IsInvalidArgument(err) && !errdefs.IsNotImplemented(err) {
			t.Errorf("%s: %v", text, err)
		}
	}
	if err := (&Adjustment{CgroupsPath: "/a/b"}).validate(own, "systemd"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a path for systemd: %v", err)
	}
	if err := (&Adjustment{Sysctl: map[string]string{"net.ipv4.ip_forward": "1"}}).validate(own, "cgroupfs"); err != nil {
		t.Errorf("a sysctl of the pod's network: %v", err)
	}
	file := filepath.Join(t.TempDir(), "there")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, m := range []specs.Mount{
		{Destination: "/d", Source: file + ".not", Type: "bind"}, {Destination: "/d", Source: "there", Options: []string{"rbind"}}, {Destination: "/d", Source: file},
	} {
		if err := checkAdjustedMount(m); !errdefs.IsInvalidArgument(err) {
			t.Errorf("mount %+v: %v", m, err)
		}
	}
	if err := checkAdjustedMount(specs.Mount{Destination: "/d", Source: file, Options: []string{"bind", "ro"}}); err != nil {
		t.Error(err)
	}
}

func TestAnImpossibleAdjustmentLeavesNothing(t *testing.T) {
	t.Parallel()
	n, h := newHookedNode(t)
	h.adj = Adjustment{Mounts: []specs.Mount{{Destination: "/d", Source: "/does/not/exist", Type: "bind"}}}
	pod := n.pod(hostPod("p"))
	h.take()
	_, err := n.e.CreatePodContainer(bg, pod, memberConfig("a", "sleep"))
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "adjustment by a plugin: source of mount /d") {
		t.Errorf("created with %v", err)
	}
	n.told(h, "create a", "ended a", "gone a")
	n.clean_()
	h.adj = Adjustment{CDIDevices: []string{"vendor.com/class=none"}}
	if _, err := n.e.CreatePodContainer(bg, pod, memberConfig("a", "sleep")); !errdefs.IsInvalidArgument(err) ||
		!strings.Contains(err.Error(), "unresolvable CDI devices vendor.com/class=none") {
		t.Errorf("created with %v", err)
	}
	if err := n.e.RemoveSandbox(bg, pod); err != nil {
		t.Fatal(err)
	}
	n.empty()
}

func TestDevicesByName(t *testing.T) {
	t.Parallel()
	n, h := newHookedNode(t)
	const description = `{"cdiVersion":"0.6.0","kind":"vendor.com/class","devices":[
		{"name":"one","containerEdits":{"env":["DEVICE=one"],"mounts":[{"hostPath":"/etc","containerPath":"/vendor"}]}},
		{"name":"two","containerEdits":{"env":["OTHER=two"],"deviceNodes":[{"path":"/dev/vendor","hostPath":"/dev/null"}]}}]}`
	if err := os.WriteFile(filepath.Join(n.cdiDir, "vendor.json"), []byte(description), 0o600); err != nil {
		t.Fatal(err)
	}
	h.adj = Adjustment{CDIDevices: []string{"vendor.com/class=two"}}
	pod := n.pod(hostPod("p"))
	c := memberConfig("a", "sleep")
	c.Pod.CDIDevices = []string{"vendor.com/class=one"}
	a := n.member(pod, c)
	s := n.spec(a)
	if !slices.Contains(s.Process.Env, "DEVICE=one") || !slices.Contains(s.Process.Env, "OTHER=two") {
		t.Errorf("environment: %q", s.Process.Env)
	}
	if !slices.ContainsFunc(s.Mounts, func(m specs.Mount) bool { return m.Destination == "/vendor" && m.Source == "/etc" }) {
		t.Errorf("mounts: %+v", s.Mounts)
	}
	if !slices.ContainsFunc(s.Linux.Devices, func(d specs.LinuxDevice) bool { return d.Path == "/dev/vendor" && d.Major == 1 && d.Minor == 3 }) {
		t.Errorf("devices: %+v", s.Linux.Devices)
	}
	c = memberConfig("b", "sleep")
	c.Pod.CDIDevices = []string{"vendor.com/class=three"}
	if _, err := n.e.CreatePodContainer(bg, pod, c); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an unknown device: %v", err)
	}
	if err := n.e.RemoveSandbox(bg, pod); err != nil {
		t.Fatal(err)
	}
	n.empty()
}

// Asking nobody must cost nothing: no configuration is made for eyes that are not there.
func TestNoHooksNoCost(t *testing.T) {
	n := newNode(t)
	pod := n.pod(hostPod("p"))
	a := n.member(pod, memberConfig("a", "sleep"))
	c, err := n.e.containers.get(a)
	if err != nil {
		t.Fatal(err)
	}
	if c.spec != nil || len(n.e.told.containers)+len(n.e.told.sandboxes) != 0 {
		t.Error("something was kept for hooks that are not there")
	}
	s, _ := n.e.pods.get(pod)
	calls := func() {
		_ = n.e.tellRun(bg, s)
		_ = n.e.tellStart(bg, c)
		n.e.tellPost(bg, c, "nothing", Hooks.PostStartContainer)
		n.e.tellEnd(bg, c)
		n.e.tellGone(bg, c)
		n.e.tellStop(bg, s)
		n.e.tellRemove(bg, s)
	}
	// What others allocate meanwhile is counted, too: one undisturbed try tells.
	got := 1.0
	for try := 0; got != 0 && try < 100; try++ {
		got = testing.AllocsPerRun(100, calls)
	}
	if got != 0 {
		t.Errorf("%v allocations", got)
	}
	if err := n.e.RemoveSandbox(bg, pod); err != nil {
		t.Fatal(err)
	}
	n.empty()
}
