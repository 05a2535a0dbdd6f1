package engine

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

var update = flag.Bool("update", false, "rewrite testdata/spec")

func goldenHost() hostFacts {
	return hostFacts{CPUs: 4, FileLimit: 1 << 20, OnlineCPUs: "0-3", OnlineMems: "0", MemTotal: 8 << 30, Kernel: "6.12.0", Hostname: "node",
		Seccomp: true, SwapLimit: true, ThermalPaths: []string{"/sys/devices/system/cpu/cpu0/thermal_throttle"}}
}

func goldenInput(c Config) specInput {
	v := Container{ID: "0123456789ab", Config: c, Path: "/bin/app", Args: []string{"-x"}, Env: []string{"PATH=/bin", "A=1"}, Hostname: "0123456789ab"}
	return specInput{
		C: v, Host: goldenHost(), Account: account{Groups: []uint32{0}, Home: "/root"},
		CgroupPath: cgroupsPath("cgroupfs", c.Resources.CgroupParent, v.ID), NetNS: "/run/hako/netns/x", Hostname: v.Hostname,
		ResolvConf: "/c/resolv.conf", HostsFile: "/c/hosts", HostnameFile: "/c/hostname",
	}
}

// TestSpecGolden compares specifications with testdata/spec, without the seccomp
// profile, which belongs to its own module and depends on the architecture.
func TestSpecGolden(t *testing.T) {
	t.Parallel()
	pids, swappiness := int64(100), int64(10)
	cases := map[string]func() specInput{
		"default": func() specInput { return goldenInput(Config{}) },
		"terminal-user": func() specInput {
			in := goldenInput(Config{TTY: true, ConsoleSize: [2]uint{24, 80}, Domainname: "example.org", ReadonlyRootfs: true,
				SecurityOpt: []string{"no-new-privileges"}, OOMScoreAdj: 100})
			in.Account = account{UID: 1000, GID: 1000, Groups: []uint32{1000, 4}, Home: "/home/u"}
			in.C.WorkingDir = "/srv/../data"
			return in
		},
		"privileged": func() specInput { return goldenInput(Config{Privileged: true}) },
		"host": func() specInput {
			in := goldenInput(Config{NetworkMode: "host", PidMode: "host", IpcMode: "host", UTSMode: "host", CgroupnsMode: "host"})
			in.NetHost, in.NetNS = true, ""
			return in
		},
		"joined": func() specInput {
			in := goldenInput(Config{NetworkMode: "container:a", PidMode: "container:a", IpcMode: "container:a"})
			in.NetShared, in.NetNS, in.PidNS, in.IpcNS, in.ShmPath = true, "/proc/7/ns/net", "/proc/7/ns/pid", "/proc/7/ns/ipc", "/run/a/shm"
			return in
		},
		"cgroup2": func() specInput {
			in := goldenInput(Config{})
			in.Host.CgroupV2 = true
			return in
		},
		"limits": func() specInput {
			return goldenInput(Config{
				Resources: Resources{Memory: 64 << 20, MemorySwap: 128 << 20, MemoryReservation: 32 << 20, MemorySwappiness: &swappiness,
					NanoCPUs: 500_000_000, CPUShares: 512, CpusetCPUs: "0-1", PidsLimit: &pids, BlkioWeight: 300, CgroupParent: "/team",
					Ulimits: []Ulimit{{"nofile", 100, 200}, {"core", -1, -1}}},
				Sysctls: map[string]string{"net.core.somaxconn": "77", "net/ipv4/ip_unprivileged_port_start": "1024"},
				ShmSize: 1 << 20,
			})
		},
		"mounts": func() specInput {
			in := goldenInput(Config{})
			for _, m := range []Mount{
				{Kind: MountBind, Target: "/a/b", ReadOnly: true},
				{Kind: MountBind, Target: "/a", Propagation: "rshared"},
				{Kind: MountBind, Target: "/one", NonRecursive: true, ReadOnly: true},
				{Kind: MountVolume, Target: "/vol"},
				{Kind: MountTmpfs, Target: "/tmp", Options: []string{"exec", "size=1m"}, TmpfsMode: 0o1777},
				{Kind: MountBind, Target: "/dev/shm"},
				{Kind: MountBind, Target: "/etc/hosts"},
			} {
				in.Mounts = append(in.Mounts, specMount(m, "/src"+m.Target, in.Host))
			}
			return in
		},
		"caps": func() specInput {
			return goldenInput(Config{CapAdd: []string{"net_admin", "CAP_SYS_PTRACE"}, CapDrop: []string{"MKNOD", "chown"}})
		},
		"no-masks": func() specInput {
			return goldenInput(Config{MaskedPaths: []string{}, ReadonlyPaths: []string{}, SecurityOpt: []string{"seccomp=unconfined"}})
		},
		"init": func() specInput {
			in := goldenInput(Config{})
			in.InitBinary = "/usr/bin/tini"
			return in
		},
	}
	for name, make := range cases {
		t.Run(name, func(t *testing.T) {
			s, err := buildSpec(make())
			if err != nil {
				t.Fatal(err)
			}
			if s.Linux.Seccomp == nil && name != "privileged" && name != "no-masks" {
				t.Error("no seccomp profile")
			}
			s.Linux.Seccomp = nil
			got, err := json.MarshalIndent(s, "", "\t")
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, '\n')
			file := filepath.Join("testdata", "spec", name+".json")
			if *update {
				if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(file, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if string(got) != string(want) {
				t.Errorf("differs from %s (rewrite it with -update and look at the diff):\n%s", file, got)
			}
		})
	}
}

func TestSeccompFollowsCapabilities(t *testing.T) {
	t.Parallel()
	allows := func(c Config, call string) bool {
		s, err := buildSpec(goldenInput(c))
		if err != nil {
			t.Fatal(err)
		}
		if s.Linux.Seccomp.DefaultAction != specs.ActErrno {
			t.Errorf("default action is %s", s.Linux.Seccomp.DefaultAction)
		}
		for _, r := range s.Linux.Seccomp.Syscalls {
			if r.Action == specs.ActAllow && slices.Contains(r.Names, call) && len(r.Args) == 0 {
				return true
			}
		}
		return false
	}
	if allows(Config{}, "mount") || !allows(Config{CapAdd: []string{"SYS_ADMIN"}}, "mount") || !allows(Config{}, "read") {
		t.Error("the profile does not follow the capabilities")
	}
	s, err := buildSpec(goldenInput(Config{}))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]specs.Arch{"amd64": specs.ArchX86_64, "arm64": specs.ArchAARCH64}[runtime.GOARCH]
	if !slices.Contains(s.Linux.Seccomp.Architectures, want) {
		t.Errorf("architectures %v", s.Linux.Seccomp.Architectures)
	}
	profile := `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_ERRNO"}]}`
	s, err = buildSpec(goldenInput(Config{SecurityOpt: []string{"seccomp=" + profile}}))
	if err != nil || s.Linux.Seccomp.DefaultAction != specs.ActAllow {
		t.Errorf("custom profile: %v", err)
	}
	if _, err := buildSpec(goldenInput(Config{SecurityOpt: []string{"seccomp={"}})); !errdefs.IsInvalidArgument(err) {
		t.Errorf("broken profile: %v", err)
	}
}

func TestSecurityOptions(t *testing.T) {
	t.Parallel()
	with := func(apparmor bool, opts ...string) (*specs.Spec, error) {
		in := goldenInput(Config{SecurityOpt: opts})
		in.Host.AppArmor = apparmor
		return buildSpec(in)
	}
	for _, tt := range []struct {
		host      bool // AppArmor is on
		opt, want string
	}{
		{true, "apparmor=mine", "mine"}, {true, "apparmor:mine", "mine"}, {true, "apparmor=unconfined", "unconfined"},
		{true, "label=disable", ""}, {false, "apparmor=unconfined", ""}, {false, "label=type:x_t", ""},
	} {
		s, err := with(tt.host, tt.opt)
		if err != nil || s.Process.ApparmorProfile != tt.want || s.Process.SelinuxLabel != "" {
			t.Errorf("%s, host %v: %v", tt.opt, tt.host, err)
		}
	}
	if _, err := with(false, "apparmor=mine"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a profile without AppArmor: %v", err)
	}
	for opt, want := range map[string]bool{"no-new-privileges": true, "no-new-privileges:true": true, "no-new-privileges=1": true,
		"no-new-privileges:false": false, "seccomp=builtin": false} {
		if s, err := with(false, opt); err != nil || s.Process.NoNewPrivileges != want || s.Linux.Seccomp == nil {
			t.Errorf("%s: %v", opt, err)
		}
	}
	s, err := with(false, "systempaths=unconfined", "seccomp=unconfined")
	if err != nil || len(s.Linux.MaskedPaths)+len(s.Linux.ReadonlyPaths) > 0 || s.Linux.Seccomp != nil {
		t.Errorf("unconfined: %v", err)
	}
}

func TestCapabilities(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		priv      bool
		add, drop []string
		want      []string
	}{
		{false, nil, []string{"ALL"}, nil},
		{false, []string{"CHOWN"}, []string{"all"}, []string{"CAP_CHOWN"}},
		{true, nil, []string{"ALL"}, allCaps},
		{false, []string{"ALL"}, nil, allCaps},
		{false, []string{"SYS_ADMIN"}, []string{"SYS_ADMIN", "ALL"}, []string{"CAP_SYS_ADMIN"}},
	} {
		got, err := capabilities(c.priv, c.add, c.drop)
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%+v: %v, %v", c, got, err)
		}
	}
	if _, err := capabilities(false, []string{"NONSENSE"}, nil); !errdefs.IsInvalidArgument(err) || err.Error() != `invalid CapAdd: unknown capability: "CAP_NONSENSE"` {
		t.Errorf("unknown capability: %v", err)
	}
	got, _ := capabilities(false, nil, nil)
	if len(got) != len(defaultCaps) {
		t.Errorf("%d default capabilities", len(got))
	}
	h := hostFacts{Caps: 1 << 0}
	if got := h.availableCaps([]string{"CAP_CHOWN", "CAP_KILL"}); !slices.Equal(got, []string{"CAP_CHOWN"}) {
		t.Errorf("available: %v", got)
	}
	if s := capabilitySets(got, 1000); s.Effective != nil || s.Inheritable != nil || s.Ambient != nil || len(s.Bounding) != 14 {
		t.Errorf("sets of another user than root: %+v", s)
	}
}

func TestDevices(t *testing.T) {
	t.Parallel()
	d, rules, err := lookupDevices(Config{Resources: Resources{Devices: []Device{{HostPath: "/dev/null", ContainerPath: "/dev/x", Permissions: "rw"}}, DeviceCgroupRules: []string{"c 42:* rmw"}}})
	if err != nil || len(d) != 1 || d[0].Path != "/dev/x" || d[0].Major != 1 || d[0].Minor != 3 || len(rules) != 2 || rules[0].Access != "rw" || *rules[1].Major != 42 || rules[1].Minor != nil {
		t.Errorf("%+v %+v %v", d, rules, err)
	}
	for path, want := range map[string]string{
		"/dev/none-such": `error gathering device information while adding custom device "/dev/none-such": no such file or directory`,
		"/":              `error gathering device information while adding custom device "/": not a device node`,
		"/etc/passwd":    `error gathering device information while adding custom device "/etc/passwd": not a device node`,
	} {
		_, _, err := lookupDevices(Config{Resources: Resources{Devices: []Device{{HostPath: path, Permissions: "rwm"}}}})
		if err == nil || err.Error() != want {
			t.Errorf("%s: %v", path, err)
		}
	}
	for _, bad := range []string{"", "c", "x 1:2 r", "c 1 r", "c 1:2 z", "c -1:2 r", "c 99999999999:0 r"} {
		if _, err := parseDeviceRule(bad); err == nil {
			t.Errorf("rule %q was taken", bad)
		}
	}
}

func FuzzParseDeviceRule(f *testing.F) {
	f.Add("c 42:* rmw")
	f.Fuzz(func(t *testing.T, s string) { _, _ = parseDeviceRule(s) })
}

func TestCgroupsPath(t *testing.T) {
	t.Parallel()
	for _, tt := range [][4]string{
		{"cgroupfs", "", "c", "/hako/c"}, {"cgroupfs", "x", "c", "/x/c"}, {"cgroupfs", "/hako/podp", "c", "/hako/podp/c"},
		{"systemd", "", "c", "system.slice:hako:c"}, {"systemd", "my.slice", "c", "my.slice:hako:c"},
		{"systemd", "/kubepods.slice/kubepods-besteffort.slice", "c", "kubepods-besteffort.slice:hako:c"},
		{"systemd", "/hako/podp", "c", "system.slice:hako:c"}, // a pod that no kubelet made
	} {
		if got := cgroupsPath(tt[0], tt[1], tt[2]); got != tt[3] {
			t.Errorf("%v: %s", tt, got)
		}
	}
	for slice, want := range map[string]string{
		"a.slice": "/a.slice", "a-b-c.slice": "/a.slice/a-b.slice/a-b-c.slice", "system.slice": "/system.slice",
	} {
		if got := slicePath(slice); got != want {
			t.Errorf("%s: %s, want %s", slice, got, want)
		}
	}
}

// TestVoidHugepageLimits: the kubelet limits each size of huge pages, to 0 if the pod asks for none.
func TestVoidHugepageLimits(t *testing.T) {
	t.Parallel()
	r := Resources{Memory: 1 << 20, Hugepages: map[string]uint64{"2MB": 0, "1GB": 0}}
	for _, c := range []struct {
		able  bool
		limit uint64
		want  int
	}{{false, 0, 0}, {false, 1 << 30, 1}, {true, 0, 2}} {
		r.Hugepages["1GB"] = c.limit
		if got := linuxResources(hostFacts{HugeTLB: c.able}.applicable(r), nil).HugepageLimits; len(got) != c.want {
			t.Errorf("limits on a machine that can limit huge pages: %v, 1GB: %d: %v", c.able, c.limit, got)
		}
	}
	if len(r.Hugepages) != 2 {
		t.Errorf("what was asked for is changed: %v", r.Hugepages)
	}
}
