//go:build linux

package plan

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/spec"
)

var update = flag.Bool("update", false, "write the golden files")

func hybrid() Facts {
	f := Facts{LastCap: 40, Sources: map[string]Source{}}
	for _, n := range []string{"cpu", "memory", "pids"} {
		f.Cgroup.Hierarchies = append(f.Cgroup.Hierarchies, Hierarchy{Name: n, Mountpoint: "/sys/fs/cgroup/" + n, Dir: "/sys/fs/cgroup/" + n + "/box", Options: []string{n}})
	}
	f.Cgroup.Hierarchies = append(f.Cgroup.Hierarchies,
		Hierarchy{Name: "systemd", Mountpoint: "/sys/fs/cgroup/systemd", Dir: "/sys/fs/cgroup/systemd/box", Options: []string{"none", "name=systemd"}},
		Hierarchy{Name: "unified", Mountpoint: "/sys/fs/cgroup/unified", Dir: "/sys/fs/cgroup/unified/box", V2: true})
	return f
}

func unified() Facts {
	f := Facts{LastCap: 40, Sources: map[string]Source{}}
	f.Cgroup = CgroupFacts{V2: true, Hierarchies: []Hierarchy{{Name: "cgroup", Mountpoint: "/sys/fs/cgroup", Dir: "/sys/fs/cgroup/box", V2: true}}}
	return f
}

func base(v2 bool) *specs.Spec {
	s := spec.Default(v2)
	s.Process.Terminal = false
	return s
}

var dockerCaps = []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE"}

func without(s *specs.Spec, typ specs.LinuxNamespaceType) {
	s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == typ })
}

type golden struct {
	spec  *specs.Spec
	facts Facts
	opts  Options
}

func goldens() map[string]golden {
	opts := Options{ID: "box", Bundle: "/bundle", Hold: true}
	out := map[string]golden{}

	out["default-hybrid"] = golden{base(false), hybrid(), Options{ID: "box", Bundle: "/bundle", Doors: []string{"cpu", "memory", "pids", "systemd"}, LateDoors: true}}
	out["default-v2"] = golden{base(true), unified(), opts}

	s, f := base(true), unified()
	s.Process.NoNewPrivileges = false
	s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: dockerCaps, Effective: dockerCaps, Permitted: dockerCaps}
	s.Process.Args, s.Process.Cwd = []string{"docker-entrypoint.sh", "redis-server"}, "/data"
	s.Mounts = append(s.Mounts,
		specs.Mount{Destination: "/etc/resolv.conf", Type: "bind", Source: "/var/lib/c/resolv.conf", Options: []string{"rbind", "rprivate"}},
		specs.Mount{Destination: "/data", Type: "bind", Source: "/var/lib/v/data", Options: []string{"rbind", "rw", "rprivate"}})
	f.Sources = map[string]Source{"/var/lib/c/resolv.conf": {Exists: true}, "/var/lib/v/data": {Exists: true, Dir: true}}
	s.Root.Readonly = false
	o := opts
	o.Filter = Filter{Program: []unix.SockFilter{{Code: 6, K: 0x7fff0000}}}
	o.Root = []Mount{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=/l2:/l1", "upperdir=/u", "workdir=/w"}}}
	out["docker"] = golden{s, f, o}

	s, f = base(true), unified()
	s.Process.User = specs.User{UID: 65535, GID: 65535, AdditionalGids: []uint32{65535}}
	for i := range s.Linux.Namespaces {
		switch n := &s.Linux.Namespaces[i]; n.Type {
		case specs.NetworkNamespace:
			n.Path = "/var/run/netns/pod"
		case specs.IPCNamespace, specs.UTSNamespace:
			n.Path = "/proc/77/ns/" + string(n.Type)
		}
	}
	s.Hostname = ""
	score := 1000
	s.Process.OOMScoreAdj = &score
	s.Linux.Sysctl = map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"}
	s.Mounts = append(s.Mounts, specs.Mount{Destination: "/var/run/secrets", Type: "bind", Source: "/var/lib/kubelet/s", Options: []string{"rbind", "rro", "rprivate"}})
	f.Sources = map[string]Source{"/var/lib/kubelet/s": {Exists: true, Dir: true}}
	o = opts
	o.Filter = Filter{Program: []unix.SockFilter{{Code: 6, K: 0x7fff0000}}}
	out["kubernetes"] = golden{s, f, o}

	s = base(false)
	var all []string
	for _, c := range capabilities {
		all = append(all, "CAP_"+c)
	}
	s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all}
	s.Process.NoNewPrivileges = false
	s.Linux.MaskedPaths, s.Linux.ReadonlyPaths, s.Root.Readonly = nil, nil, false
	s.Linux.RootfsPropagation = "rshared"
	s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229}}
	without(s, specs.NetworkNamespace)
	out["privileged-host-network"] = golden{s, hybrid(), opts}

	s = base(true)
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	s.Linux.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	s.Linux.GIDMappings = s.Linux.UIDMappings
	out["user-namespace"] = golden{s, unified(), opts}

	s, f = base(true), unified()
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	s.Linux.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	s.Linux.GIDMappings = s.Linux.UIDMappings
	own := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 1}, {ContainerID: 1, HostID: 1000, Size: 9}}
	s.Mounts = append(s.Mounts,
		specs.Mount{Destination: "/data", Source: "/data", Options: []string{"rbind", "idmap"}},
		specs.Mount{Destination: "/mine", Source: "/mine", Options: []string{"rbind", "ridmap", "rnoatime"}, UIDMappings: own, GIDMappings: own},
		specs.Mount{Destination: "/scratch", Type: "tmpfs", Options: []string{"size=1m"}, UIDMappings: own, GIDMappings: own})
	f.Sources = map[string]Source{"/data": {Exists: true, Dir: true}, "/mine": {Exists: true, Dir: true}}
	o = opts
	o.Root = []Mount{{Type: "overlay", Source: "overlay", Options: []string{"idmap", "lowerdir=/l2:/l\\:1", "upperdir=/s/fs", "workdir=/s/work", "volatile"}}}
	out["idmapped"] = golden{s, f, o}

	s = base(true)
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
	s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Secs: 10}}
	s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedFIFO, Priority: 3, Flags: []specs.LinuxSchedulerFlag{"SCHED_FLAG_RESET_ON_FORK"}}
	s.Process.IOPriority = &specs.LinuxIOPriority{Class: "IOPRIO_CLASS_BE", Priority: 5}
	s.Linux.Personality = &specs.LinuxPersonality{Domain: "LINUX32"}
	s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolInterleave, Nodes: "0-1,70", Flags: []specs.MemoryPolicyFlagType{"MPOL_F_STATIC_NODES"}}
	s.Linux.RootfsPropagation = "rslave"
	s.Linux.MountLabel = "system_u:object_r:container_file_t:s0:c1,c2"
	s.Process.SelinuxLabel = "system_u:system_r:container_t:s0:c1,c2"
	s.Process.ApparmorProfile = "docker-default"
	s.Mounts = append(s.Mounts,
		specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Options: []string{"remount", "ro", "size=1m"}},
		specs.Mount{Destination: "/sys", Options: []string{"remount", "bind", "rro", "rslave"}})
	f = unified()
	f.SELinux, f.AppArmor = true, true
	out["labels-and-scheduling"] = golden{s, f, opts}

	s, f = base(true), unified()
	spec.Rootless(s, 1000, 1000)
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
	s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"monotonic": {Secs: -1}, "boottime": {Secs: 10}}
	f.Rootless = true
	out["rootless-time"] = golden{s, f, opts}

	o = opts
	o.Filter = Filter{Program: []unix.SockFilter{{Code: 6, K: 0x7fc00000}}, Notify: true}
	out["seccomp-notify"] = golden{base(true), unified(), o}

	s = base(true)
	s.Process.Terminal, s.Process.ConsoleSize = true, &specs.Box{Width: 80, Height: 24}
	s.Process.User.UID = 1000
	out["terminal"] = golden{s, unified(), opts}

	s = base(true)
	spec.Rootless(s, 1000, 1000)
	s.Process.Terminal = true
	f = unified()
	f.Rootless = true
	f.Sources = map[string]Source{"/sys": {Exists: true, Dir: true}}
	out["rootless"] = golden{s, f, opts}

	s = base(true)
	s.Linux.Namespaces[0].Path = "/proc/77/ns/pid"
	s.Mounts = s.Mounts[:1]
	s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = nil, nil
	s.Process.User.GID = 5
	o = opts
	o.Preserve, o.NoPivot, o.Hooks = 2, true, true
	out["no-dev-preserve-hooks-nopivot"] = golden{s, unified(), o}
	return out
}

func check(t *testing.T, name, got string) {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		t.Skipf("needs amd64, whose structures and system calls the golden files show: %s", t.Name())
	}
	file := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		g, w := strings.Split(got, "\n"), strings.Split(string(want), "\n")
		for i := range g {
			if i >= len(w) || g[i] != w[i] {
				t.Fatalf("%s: line %d (go test ./oci/plan -update writes a new one)\ngot  %s\nwant %s", file, i+1, g[i], w[min(i, len(w)-1)])
			}
		}
		t.Fatalf("%s: %d lines, want %d", file, len(g), len(w))
	}
}

func TestGolden(t *testing.T) {
	for name, g := range goldens() {
		t.Run(name, func(t *testing.T) {
			if err := spec.Validate(g.spec); err != nil {
				t.Fatal(err)
			}
			p, err := Container(g.spec, g.facts, g.opts)
			if err != nil {
				t.Fatal(err)
			}
			check(t, name, p.Text())
			sound(t, p)
		})
	}
}

func TestGoldenExec(t *testing.T) {
	s := base(true)
	f := unified()
	f.Joined = []string{"pid", "network", "ipc", "uts", "cgroup", "mount"}
	proc := *s.Process
	proc.Args, proc.Terminal = []string{"sh", "-c", "id"}, true
	p, err := Exec(s, &proc, f, Options{ID: "box", Doors: []string{"memory"}})
	if err != nil {
		t.Fatal(err)
	}
	check(t, "exec-terminal", p.Text())
	sound(t, p)
	p, err = Hook(specs.Hook{Path: "/bin/hook", Args: []string{"hook", "arg"}}, "/proc/77/root", f, Options{ID: "box"})
	if err != nil {
		t.Fatal(err)
	}
	check(t, "hook", p.Text())
	sound(t, p)
}

// sound fails if a step refers to something that is not there.
func sound(t *testing.T, p *Plan) {
	t.Helper()
	for _, steps := range [][]Step{p.Host, p.Program} {
		for i, s := range steps {
			if s.OnOK < 0 || s.OnOK > len(steps) || s.OnFail < 0 || s.OnFail > len(steps) {
				t.Errorf("step %d (%s) goes to %d or %d of %d", i, s.Do, s.OnOK, s.OnFail, len(steps))
			}
			if s.OnOK < i || s.OnFail < i {
				t.Errorf("step %d (%s) goes back: a plan must end", i, s.Do)
			}
			if int(s.Fill) >= len(p.Slots) || len(s.Accept) > 6 {
				t.Errorf("step %d (%s): bad slot or too many accepted failures", i, s.Do)
			}
			for _, a := range s.Args {
				if a.Kind == ArgSlot && (a.Slot < 0 || int(a.Slot) >= len(p.Slots)) || a.Kind == ArgBuffer && int(a.Int) >= p.Buffers {
					t.Errorf("step %d (%s): bad argument", i, s.Do)
				}
			}
		}
	}
	if last := p.Program[len(p.Program)-2]; last.Name != "execveat" {
		t.Errorf("the program ends in %s", last.Name)
	}
	raw, err := json.Marshal(Explain(p, &specs.Spec{Linux: &specs.Linux{}}, Facts{}, nil))
	if err != nil || !json.Valid(raw) {
		t.Error(err)
	}
}

func TestUnknownCapabilitiesWarn(t *testing.T) {
	s := base(true)
	s.Process.Capabilities.Bounding = append(s.Process.Capabilities.Bounding, "CAP_TO_FLY")
	p, err := Container(s, unified(), Options{ID: "box"})
	if err != nil || len(p.Warnings) != 1 || !strings.Contains(p.Warnings[0], "CAP_TO_FLY") {
		t.Errorf("%v %v", p.Warnings, err)
	}
}

func TestKernelMemoryWarns(t *testing.T) {
	limit := int64(1 << 20)
	for name, k := range map[string]struct {
		m    specs.LinuxMemory
		v2   bool
		want int
	}{
		"kernel":         {specs.LinuxMemory{Kernel: &limit}, false, 1}, //nolint:staticcheck // deprecated
		"kernelTCP":      {specs.LinuxMemory{KernelTCP: &limit}, false, 0},
		"kernelTCP, v2":  {specs.LinuxMemory{KernelTCP: &limit}, true, 1},
		"both, v2":       {specs.LinuxMemory{Kernel: &limit, KernelTCP: &limit}, true, 2}, //nolint:staticcheck // deprecated
		"something else": {specs.LinuxMemory{Limit: &limit}, true, 0},
	} {
		s, f := base(true), unified()
		s.Linux.Resources, f.Cgroup.V2 = &specs.LinuxResources{Memory: &k.m}, k.v2
		p, err := Container(s, f, Options{ID: "box"})
		if err != nil || len(p.Warnings) != k.want {
			t.Errorf("%s: %v %v", name, p.Warnings, err)
		}
	}
}

// On a hybrid host cgroup2 is the unified hierarchy alone.
func TestCgroup2OfHybridHost(t *testing.T) {
	s, f := base(true), unified()
	f.Cgroup.V2 = false
	f.Cgroup.Hierarchies = []Hierarchy{
		{Name: "memory", Mountpoint: "/sys/fs/cgroup/memory", Dir: "/sys/fs/cgroup/memory/box", Options: []string{"memory"}},
		{Name: "unified", Mountpoint: "/sys/fs/cgroup/unified", Dir: "/sys/fs/cgroup/unified/box", V2: true},
	}
	for _, typ := range []string{"cgroup", "cgroup2"} {
		s.Mounts = []specs.Mount{{Destination: "/cg", Type: typ, Source: "cgroup"}}
		p, err := Container(s, f, Options{ID: "box"})
		if err != nil {
			t.Fatal(err)
		}
		v1 := slices.ContainsFunc(p.Program, func(s Step) bool {
			return slices.ContainsFunc(s.Args, func(a Arg) bool { return strings.Contains(a.Str, "memory") })
		})
		v2 := slices.ContainsFunc(p.Program, func(s Step) bool {
			return slices.ContainsFunc(s.Args, func(a Arg) bool { return a.Str == "cgroup2" || strings.Contains(a.Str, "unified") })
		})
		if v1 != (typ == "cgroup") || !v2 {
			t.Errorf("%s: memory %v, unified %v", typ, v1, v2)
		}
	}
}

func TestCapabilitiesOfOthersWarn(t *testing.T) {
	s := base(true)
	s.Process.Capabilities.Bounding = append(s.Process.Capabilities.Bounding, "CAP_SYS_RESOURCE")
	s.Process.Capabilities.Permitted = append(s.Process.Capabilities.Permitted, "CAP_SYS_RESOURCE")
	f := unified()
	f.Lacks = []string{"CAP_SYS_RESOURCE"}
	p, err := Container(s, f, Options{ID: "box"})
	if err != nil || len(p.Warnings) != 1 || !strings.Contains(p.Warnings[0], "CAP_SYS_RESOURCE") {
		t.Errorf("%v %v", p.Warnings, err)
	}
	dropped := func(p *Plan) bool {
		return slices.ContainsFunc(p.Program, func(s Step) bool {
			return s.Name == "prctl" && s.Args[0].Int == unix.PR_CAPBSET_DROP && s.Args[1].Int == unix.CAP_SYS_RESOURCE
		})
	}
	if !dropped(p) {
		t.Error("the capability stays in the bounding set")
	}
	// In a user namespace of its own the container has all of them.
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	s.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: 1000, Size: 1000}}
	s.Linux.GIDMappings = s.Linux.UIDMappings
	if p, err = Container(s, f, Options{ID: "box"}); err != nil || len(p.Warnings) != 0 || dropped(p) {
		t.Errorf("with a user namespace: %v %v, dropped %v", p.Warnings, err, dropped(p))
	}
}

func TestImpossibleRequestsAreErrors(t *testing.T) {
	for name, change := range map[string]func(*specs.Spec){
		"mount on /":         func(s *specs.Spec) { s.Mounts[0].Destination = "/" },
		"tmpfs on /proc":     func(s *specs.Spec) { s.Mounts[0].Type = "tmpfs" },
		"mount in /proc":     func(s *specs.Spec) { s.Mounts[1].Destination = "/proc/self/attr" },
		"idmap without maps": func(s *specs.Spec) { s.Mounts[1].Options = []string{"idmap"} },
		"only uids mapped": func(s *specs.Spec) {
			s.Mounts[1].UIDMappings = []specs.LinuxIDMapping{{Size: 1}}
		},
		"memory mode": func(s *specs.Spec) { s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: "MPOL_X"} },
		"memory flag": func(s *specs.Spec) {
			s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "0", Flags: []specs.MemoryPolicyFlagType{"MPOL_F_X"}}
		},
		"memory nodes": func(s *specs.Spec) {
			s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "1-0"}
		},
		"memory without nodes": func(s *specs.Spec) { s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolBind} },
		"local with nodes": func(s *specs.Spec) {
			s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolLocal, Nodes: "0"}
		},
		"nice":              func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedOther, Nice: 20} },
		"priority of other": func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedOther, Priority: 1} },
		"no priority":       func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedRR} },
		"deadline of batch": func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedBatch, Deadline: 1} },
		"scheduler flag": func(s *specs.Spec) {
			s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedOther, Flags: []specs.LinuxSchedulerFlag{"SCHED_FLAG_X"}}
		},
		"I/O class": func(s *specs.Spec) { s.Process.IOPriority = &specs.LinuxIOPriority{Class: "IOPRIO_CLASS_X"} },
		"I/O priority": func(s *specs.Spec) {
			s.Process.IOPriority = &specs.LinuxIOPriority{Class: "IOPRIO_CLASS_BE", Priority: 8}
		},
		"personality": func(s *specs.Spec) { s.Linux.Personality = &specs.LinuxPersonality{Domain: "MSDOS"} },
		"personality flag": func(s *specs.Spec) {
			s.Linux.Personality = &specs.LinuxPersonality{Domain: "LINUX", Flags: []specs.LinuxPersonalityFlag{"X"}}
		},
		"bind without source": func(s *specs.Spec) { s.Mounts[1] = specs.Mount{Destination: "/x", Type: "bind"} },
		"copyup of proc":      func(s *specs.Spec) { s.Mounts[0].Options = []string{"tmpcopyup"} },
		"rlimit":              func(s *specs.Spec) { s.Process.Rlimits[0].Type = "RLIMIT_X" },
		"soft above hard":     func(s *specs.Spec) { s.Process.Rlimits[0].Soft = 5000 },
		"device type":         func(s *specs.Spec) { s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/x", Type: "q"}} },
		"device number": func(s *specs.Spec) {
			s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/x", Type: "c", Major: 1 << 40}}
		},
		"two devices of one name": func(s *specs.Spec) {
			s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/x", Type: "c", Major: 1, Minor: 3}, {Path: "/dev/./x", Type: "c", Major: 1, Minor: 5}}
		},
		"initial CPUs of exec": func(s *specs.Spec) { s.Process.ExecCPUAffinity = &specs.CPUAffinity{Initial: "x"} },
		"CPUs of exec":         func(s *specs.Spec) { s.Process.ExecCPUAffinity = &specs.CPUAffinity{Initial: "0", Final: "3-1"} },
		"propagation":          func(s *specs.Spec) { s.Linux.RootfsPropagation = "sideways" },
		"scheduler":            func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{Policy: "SCHED_X"} },
		"no process":           func(s *specs.Spec) { s.Process = nil },
	} {
		s := base(true)
		change(s)
		if _, err := Container(s, unified(), Options{ID: "box"}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestBits(t *testing.T) {
	for list, want := range map[string]string{
		"": "", "0": "0100000000000000", "0-3,7": "8f00000000000000", "64": "00000000000000000100000000000000", " 1 , 2 ": "0600000000000000",
		"3-1": "!", "-1": "!", "a": "!", "100": "!", "1,": "!", "0-99999999": "!",
	} {
		got, err := Bits(list, 100)
		if s := fmt.Sprintf("%x", got); err == nil && s != want || err != nil && want != "!" {
			t.Errorf("%q: %s %v, want %s", list, s, err, want)
		}
	}
}

func FuzzCompile(f *testing.F) {
	for _, g := range goldens() {
		raw, err := json.Marshal(g.spec)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		s, err := spec.Parse(raw)
		if err != nil {
			return
		}
		for _, facts := range []Facts{hybrid(), unified()} {
			if p, err := Container(s, facts, Options{ID: "box", Bundle: "/b"}); err == nil {
				sound(t, p)
			}
		}
	})
}

func BenchmarkCompile(b *testing.B) {
	s, f := base(false), hybrid()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Container(s, f, Options{ID: "box", Bundle: "/b"}); err != nil {
			b.Fatal(err)
		}
	}
}

// Labels of a security module that the host does not have are no reason to fail, but
// nobody shall believe that they hold.
func TestLabelsWithoutTheirModule(t *testing.T) {
	t.Parallel()
	s := spec.Default(false)
	s.Process.ApparmorProfile, s.Process.SelinuxLabel = "profile", "label"
	p, err := Container(s, hybrid(), Options{ID: "x", Bundle: "/b"})
	if err != nil {
		t.Fatal(err)
	}
	if w := strings.Join(p.Warnings, "\n"); !strings.Contains(w, `process.apparmorProfile "profile" is ignored`) || !strings.Contains(w, `process.selinuxLabel "label" is ignored`) {
		t.Errorf("warnings %q", w)
	}
}

// A profile need not allow what only the runtime does, so that behind the step that
// loads it comes nothing but exec.
func TestFilterIsLoadedLast(t *testing.T) {
	t.Parallel()
	s := spec.Default(false)
	s.Process.NoNewPrivileges = false
	s.Process.Capabilities = nil
	p, err := Container(s, hybrid(), Options{ID: "x", Bundle: "/b", Filter: Filter{Program: make([]unix.SockFilter, 1)}})
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(p.Program, func(s Step) bool { return s.Name == "seccomp" })
	if i < 0 {
		t.Fatal("no filter")
	}
	for _, s := range p.Program[i+1:] {
		if s.Op == Call && !slices.Contains([]string{"capset", "fcntl", "execveat"}, s.Name) {
			t.Errorf("%s comes after the filter", s.Name)
		}
	}
}
