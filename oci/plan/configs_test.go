//go:build linux

package plan

import (
	"encoding/json"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// input is everything that a plan is made of.
type input struct {
	spec  *specs.Spec
	facts Facts
	opts  Options
}

// config is one of the configurations whose plans are kept, as the difference to the plan
// of another.
type config struct {
	name, base string
	change     func(*input)
}

// host gives the facts of a usual host with cgroup v1 or v2.
func host(kind string) Facts {
	f := Facts{LastCap: 40, LayerByLayer: true, Kernel: "6.12", Sources: map[string]Source{}}
	if err := f.Cgroup.become(kind); err != nil {
		panic(err)
	}
	// A few of the hierarchies tell as much.
	f.Cgroup.Hierarchies = slices.DeleteFunc(f.Cgroup.Hierarchies, func(h Hierarchy) bool {
		return !h.V2 && !slices.Contains([]string{"cpu,cpuacct", "memory", "devices", "systemd"}, h.Name)
	})
	f.Cgroup.Locate("/box")
	return f
}

func (in *input) bind(source, dest string, options ...string) {
	in.spec.Mounts = append(in.spec.Mounts, specs.Mount{Destination: dest, Type: "bind", Source: source, Options: append([]string{"rbind"}, options...)})
	in.facts.Sources[source] = Source{Exists: true, Dir: path.Ext(source) == ""}
}

func (in *input) drop(dest string) {
	in.spec.Mounts = slices.DeleteFunc(in.spec.Mounts, func(m specs.Mount) bool { return m.Destination == dest })
}

func (in *input) mount(dest string) *specs.Mount {
	i := slices.IndexFunc(in.spec.Mounts, func(m specs.Mount) bool { return m.Destination == dest })
	return &in.spec.Mounts[i]
}

func (in *input) namespace(typ specs.LinuxNamespaceType, path string) {
	l := in.spec.Linux
	for i := range l.Namespaces {
		if l.Namespaces[i].Type == typ {
			l.Namespaces[i].Path = path
			return
		}
	}
	l.Namespaces = append(l.Namespaces, specs.LinuxNamespace{Type: typ, Path: path})
}

func (in *input) caps(names ...string) {
	in.spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: names, Effective: names, Permitted: names}
}

func (in *input) userns() {
	in.namespace(specs.UserNamespace, "")
	in.spec.Linux.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	in.spec.Linux.GIDMappings = in.spec.Linux.UIDMappings
}

func (in *input) privileged() {
	in.caps(Capabilities()...)
	l := in.spec.Linux
	l.MaskedPaths, l.ReadonlyPaths, l.Seccomp = nil, nil, nil
	in.mount("/sys").Options = []string{"nosuid", "noexec", "nodev", "rw"}
	in.mount("/sys/fs/cgroup").Options = []string{"rw", "nosuid", "noexec", "nodev"}
	l.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	l.Devices = append(l.Devices, specs.LinuxDevice{Path: "/dev/kvm", Type: "c", Major: 10, Minor: 232})
}

func number[T any](v T) *T { return &v }

// profile is like Docker's, but short.
func profile() *specs.LinuxSeccomp {
	return &specs.LinuxSeccomp{
		DefaultAction: specs.ActErrno, DefaultErrnoRet: number[uint](1), Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86},
		Syscalls: []specs.LinuxSyscall{
			{Names: []string{"read", "write", "openat", "close", "execve", "exit_group", "mmap", "futex", "clone3"}, Action: specs.ActAllow},
			{Names: []string{"personality"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 0, Value: 8, Op: specs.OpEqualTo}}},
		},
	}
}

// docker is what docker run makes of an image.
func docker(in *input) {
	s := in.spec
	s.Process.NoNewPrivileges, s.Root.Readonly = false, false
	s.Process.Args, s.Process.Cwd = []string{"docker-entrypoint.sh", "redis-server"}, "/data"
	s.Process.Rlimits = nil
	s.Hostname = "4bd5fa1a0b1c"
	in.caps(dockerCaps...)
	in.mount("/proc").Options = []string{"nosuid", "noexec", "nodev"}
	s.Linux.Seccomp = profile()
	s.Linux.CgroupsPath = "/docker/4bd5fa1a0b1c"
	in.bind("/var/lib/hako/c/resolv.conf", "/etc/resolv.conf", "rprivate")
	in.bind("/var/lib/hako/c/hosts.txt", "/etc/hosts", "rprivate")
	in.opts.Root = []Mount{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=/l2:/l1", "upperdir=/u", "workdir=/w"}}}
}

// kubernetes is what the kubelet makes of a container of a pod.
func kubernetes(in *input) {
	docker(in)
	s := in.spec
	in.namespace(specs.NetworkNamespace, "/var/run/netns/pod")
	in.namespace(specs.IPCNamespace, "/proc/77/ns/ipc")
	in.namespace(specs.UTSNamespace, "/proc/77/ns/uts")
	s.Hostname, s.Linux.Seccomp = "", nil
	s.Process.OOMScoreAdj = number(1000)
	s.Linux.CgroupsPath = "/kubepods/besteffort/pod1/4bd5fa1a0b1c"
	s.Linux.Resources.CPU = &specs.LinuxCPU{Shares: number[uint64](2)}
	in.drop("/dev/shm")
	in.bind("/run/hako/pod/shm", "/dev/shm", "ro")
	in.bind("/var/lib/kubelet/pods/1/volumes/token", "/var/run/secrets/kubernetes.io/serviceaccount", "rprivate", "rro")
	in.bind("/var/lib/kubelet/pods/1/termination.log", "/dev/termination-log", "rprivate")
}

// configs are those that engines and people use. Each is on its own line of descent: the
// plan of a config is kept as what differs from its base.
func configs() []config {
	return []config{
		{"docker", "default", docker},
		{"docker-privileged", "docker", (*input).privileged},
		{"docker-limits", "docker", func(in *input) {
			in.spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: number[int64](512 << 20), Swap: number[int64](512 << 20)}
			in.spec.Linux.Resources.CPU = &specs.LinuxCPU{Quota: number[int64](150000), Period: number[uint64](100000), Cpus: "0-1"}
			in.spec.Linux.Resources.Pids = &specs.LinuxPids{Limit: number[int64](100)}
			in.spec.Linux.Resources.BlockIO = &specs.LinuxBlockIO{Weight: number[uint16](300)}
			in.spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 4096}}
		}},
		{"docker-volumes", "docker", func(in *input) {
			in.bind("/srv/data", "/data", "rprivate", "rw")
			in.bind("/srv/conf.yaml", "/etc/app/conf.yaml", "rprivate", "ro")
			in.spec.Mounts = append(in.spec.Mounts, specs.Mount{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "nodev", "noexec", "size=1048576"}})
		}},
		{"docker-ports", "docker", func(in *input) { in.namespace(specs.NetworkNamespace, "/run/hako/netns/4bd5") }},
		{"docker-read-only", "docker", func(in *input) { in.spec.Root.Readonly = true }},
		{"docker-user", "docker", func(in *input) {
			in.spec.Process.User = specs.User{UID: 1000, GID: 1000, AdditionalGids: []uint32{44, 109}, Umask: number[uint32](0o77)}
			in.caps()
			in.spec.Process.Capabilities.Bounding = dockerCaps
		}},
		{"docker-tty", "docker", func(in *input) {
			in.spec.Process.Terminal, in.spec.Process.ConsoleSize = true, &specs.Box{Width: 120, Height: 40}
		}},
		{"docker-seccomp-unconfined", "docker", func(in *input) { in.spec.Linux.Seccomp = nil }},
		{"docker-seccomp-changed", "docker", func(in *input) {
			in.spec.Linux.Seccomp.Syscalls[0].Names = []string{"read", "write", "openat", "close", "execve", "exit_group", "mmap", "futex", "ptrace"}
			in.spec.Linux.Seccomp.Flags = []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagLog}
		}},
		{"docker-no-new-privileges", "docker", func(in *input) { in.spec.Process.NoNewPrivileges = true }},
		{"docker-host-network", "docker", func(in *input) { without(in.spec, specs.NetworkNamespace) }},
		{"docker-host-pid", "docker", func(in *input) { without(in.spec, specs.PIDNamespace) }},
		{"docker-host-ipc", "docker", func(in *input) {
			without(in.spec, specs.IPCNamespace)
			in.drop("/dev/shm")
			in.bind("/dev/shm", "/dev/shm", "rprivate")
		}},
		{"docker-container-network", "docker", func(in *input) { in.namespace(specs.NetworkNamespace, "/proc/77/ns/net") }},
		{"docker-container-pid", "docker", func(in *input) { in.namespace(specs.PIDNamespace, "/proc/77/ns/pid") }},
		{"docker-device", "docker", func(in *input) {
			in.spec.Linux.Devices = []specs.LinuxDevice{
				{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229}, {Path: "/dev/disk/by-id/x", Type: "b", Major: 8, Minor: 1, UID: number[uint32](5), GID: number[uint32](6)},
				{Path: "/run/fifo", Type: "p"},
			}
			in.spec.Linux.Resources.Devices = append(in.spec.Linux.Resources.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: number[int64](10), Minor: number[int64](229), Access: "rwm"})
		}},
		{"docker-sysctl", "docker", func(in *input) {
			in.spec.Linux.Sysctl = map[string]string{"net.core.somaxconn": "1024", "kernel.shmmax": "68719476736"}
		}},
		{"docker-userns", "docker", (*input).userns},
		{"hooks", "docker", func(in *input) {
			hook := func(name string) []specs.Hook {
				return []specs.Hook{{Path: "/usr/bin/" + name, Args: []string{name, "arg"}, Timeout: number(5)}}
			}
			in.spec.Hooks = &specs.Hooks{
				Prestart: hook("prestart"), CreateRuntime: hook("create-runtime"), CreateContainer: hook("create-container"),
				StartContainer: hook("start-container"), Poststart: hook("poststart"), Poststop: hook("poststop"),
			}
			in.opts.Hooks = true
		}},
		{"kubernetes", "docker", kubernetes},
		{"kubernetes-restricted", "kubernetes", func(in *input) {
			in.spec.Process.User = specs.User{UID: 65532, GID: 65532, AdditionalGids: []uint32{65532}}
			in.spec.Process.NoNewPrivileges, in.spec.Root.Readonly = true, true
			in.caps()
			in.spec.Linux.Seccomp = profile()
		}},
		{"kubernetes-privileged", "kubernetes", (*input).privileged},
		{"kubernetes-host-network", "kubernetes", func(in *input) {
			without(in.spec, specs.NetworkNamespace)
			without(in.spec, specs.UTSNamespace)
		}},
		{"kubernetes-shared-pid", "kubernetes", func(in *input) { in.namespace(specs.PIDNamespace, "/proc/77/ns/pid") }},
		{"kubernetes-shared-pid-new-kernel", "kubernetes", func(in *input) {
			in.namespace(specs.PIDNamespace, "/proc/77/ns/pid")
			if err := in.facts.Change("kernel=6.17"); err != nil {
				panic(err)
			}
		}},
		{"kubernetes-guaranteed", "kubernetes", func(in *input) {
			in.spec.Process.OOMScoreAdj = number(-997)
			in.spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: number[int64](1 << 30)}
			in.spec.Linux.Resources.CPU = &specs.LinuxCPU{Shares: number[uint64](2048), Quota: number[int64](200000), Period: number[uint64](100000), Cpus: "2-3"}
			in.spec.Linux.Resources.HugepageLimits = []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 1 << 26}}
			in.spec.Linux.Resources.Unified = map[string]string{"memory.high": "966367641"}
		}},
		{"kubernetes-userns", "kubernetes", func(in *input) {
			in.namespace(specs.UserNamespace, "/proc/77/ns/user")
			in.spec.Linux.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
			in.spec.Linux.GIDMappings = in.spec.Linux.UIDMappings
		}},
		{"kubernetes-propagation", "kubernetes", func(in *input) {
			in.bind("/var/lib/csi", "/csi", "rshared", "rw")
			in.bind("/mnt", "/mnt", "rslave", "ro")
			in.spec.Linux.RootfsPropagation = "rshared"
		}},
		{"kubernetes-sysctl", "kubernetes", func(in *input) {
			in.spec.Linux.Sysctl = map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"}
		}},
		{"systemd-container", "docker", func(in *input) {
			in.spec.Process.Args, in.spec.Process.Terminal = []string{"/sbin/init"}, true
			in.spec.Process.Env = append(in.spec.Process.Env, "container=hako")
			in.caps(append([]string{"CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_SYS_RESOURCE"}, dockerCaps...)...)
			in.mount("/sys/fs/cgroup").Options = []string{"rw", "nosuid", "noexec", "nodev"}
			for _, dest := range []string{"/run", "/run/lock", "/tmp"} {
				in.spec.Mounts = append(in.spec.Mounts, specs.Mount{Destination: dest, Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "nodev", "mode=755", "tmpcopyup"}})
			}
			in.namespace(specs.CgroupNamespace, "")
		}},
		{"rootless", "default", func(in *input) {
			rootless(in)
			in.facts.Rootless = true
		}},
		{"userns-default", "default", (*input).userns},
		{"time-namespace", "default", func(in *input) {
			in.namespace(specs.TimeNamespace, "")
			in.spec.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Secs: 3600}, "monotonic": {Secs: 60, Nanosecs: 5}}
		}},
		{"idmapped-mount", "docker-userns", func(in *input) {
			in.bind("/srv/data", "/data", "idmap")
			in.mount("/data").UIDMappings, in.mount("/data").GIDMappings = in.spec.Linux.UIDMappings, in.spec.Linux.GIDMappings
		}},
		{"apparmor", "docker", func(in *input) {
			in.facts.AppArmor, in.spec.Process.ApparmorProfile = true, "docker-default"
		}},
		{"selinux", "docker", func(in *input) {
			in.facts.SELinux, in.spec.Process.SelinuxLabel = true, "system_u:system_r:container_t:s0:c1,c2"
			in.spec.Linux.MountLabel = "system_u:object_r:container_file_t:s0:c1,c2"
		}},
		{"apparmor-missing", "docker", func(in *input) { in.spec.Process.ApparmorProfile = "docker-default" }},
		{"seccomp-notify", "docker", func(in *input) {
			in.spec.Linux.Seccomp.Syscalls = append(in.spec.Linux.Seccomp.Syscalls, specs.LinuxSyscall{Names: []string{"mount"}, Action: specs.ActNotify})
			in.spec.Linux.Seccomp.ListenerPath, in.spec.Linux.Seccomp.ListenerMetadata = "/run/agent.sock", "meta"
		}},
		{"scheduling", "default", func(in *input) {
			in.spec.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedFIFO, Priority: 3}
			in.spec.Process.IOPriority = &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_BE, Priority: 5}
			in.spec.Linux.Personality = &specs.LinuxPersonality{Domain: specs.PerLinux32}
		}},
		{"host-mounts", "default", func(in *input) { without(in.spec, specs.MountNamespace) }},
		{"memory-policy", "default", func(in *input) {
			in.spec.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolInterleave, Nodes: "0-1"}
		}},
		{"no-dev", "default", func(in *input) {
			for _, dest := range []string{"/dev", "/dev/pts", "/dev/shm", "/dev/mqueue"} {
				in.drop(dest)
			}
		}},
		{"host-dev", "default", func(in *input) {
			for _, dest := range []string{"/dev", "/dev/pts", "/dev/shm", "/dev/mqueue"} {
				in.drop(dest)
			}
			in.bind("/dev", "/dev", "rslave")
		}},
		{"lxcfs", "default", func(in *input) { in.bind("/var/lib/lxcfs/meminfo.txt", "/proc/meminfo", "ro") }},
		{"mount-attributes", "default", func(in *input) {
			in.bind("/srv", "/srv", "rro", "rnosuid", "noatime", "nosymfollow", "private")
		}},
		{"preserve-no-pivot-run", "default", func(in *input) { in.opts.Preserve, in.opts.NoPivot, in.opts.Hold = 2, true, false }},
		{"many-layers-old-kernel", "docker", func(in *input) {
			oldKernel(in)
			in.opts.Root[0].Options[0] = "lowerdir=" + strings.Repeat("/var/lib/hako/snapshots/1/fs:", 12) + "/l1"
		}},
		{"old-kernel", "default", oldKernel},
		{"hybrid-host", "default", func(in *input) {
			if err := in.facts.Change("cgroup=hybrid"); err != nil {
				panic(err)
			}
			in.facts.Cgroup.Locate("/box")
		}},
	}
}

func oldKernel(in *input) {
	if err := in.facts.Change("kernel=5.4"); err != nil {
		panic(err)
	}
}

// build makes the input of a config and of its base. The lists of a base are not shared.
func build(name, kind string) input {
	if name == "default" {
		in := input{base(kind == "v2"), host(kind), Options{ID: "box", Bundle: "/bundle", Hold: true}}
		in.spec.Linux.CgroupsPath = "/box"
		return in
	}
	all := configs()
	c := all[slices.IndexFunc(all, func(c config) bool { return c.name == name })]
	in := build(c.base, kind)
	c.change(&in)
	return in
}

// text gives the configuration as a file.
func (in *input) text() []byte {
	raw, err := json.MarshalIndent(in.spec, "", "\t")
	if err != nil {
		panic(err)
	}
	return raw
}
