package engine

import (
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

const (
	defaultPath     = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	defaultShmSize  = 64 << 20
	initInContainer = "/sbin/docker-init"
)

// specInput is all that a container's OCI specification is made of. Everything that
// had to be looked up on the host is in it, so that buildSpec is a pure function.
type specInput struct {
	C          Container
	Account    account
	Host       hostFacts
	Mounts     []specs.Mount // of the client, sources resolved
	Devices    []specs.LinuxDevice
	DevRules   []specs.LinuxDeviceCgroup
	Throttle   []blockDevice // resolved paths of blkio limits
	CgroupPath string        // linux.cgroupsPath
	// Shown: nothing is started with it, it is only looked at.
	Shown bool
	// Paths of namespaces to join. NetNS "" with NetHost false is impossible: the
	// network room always gives one.
	NetHost      bool
	NetNS        string
	NetShared    bool // the namespace is another container's
	PidNS, IpcNS string
	UTSNS        string
	ShmPath      string // host directory for /dev/shm: "" for a private one
	Hostname     string
	ResolvConf   string // host paths of the injected files
	HostsFile    string
	HostnameFile string
	InitBinary   string
	Pod          *podInput // nil: no container of a pod
}

// buildSpec makes the OCI specification of a container, with Docker's defaults.
func buildSpec(in specInput) (*specs.Spec, error) {
	c := in.C.Config
	sec, err := parseSecurity(c.SecurityOpt)
	if err != nil {
		return nil, err
	}
	profile, err := sec.apparmorProfile(in.Host, c.Privileged)
	if err != nil {
		return nil, err
	}
	caps, err := capabilities(c.Privileged, c.CapAdd, c.CapDrop)
	if err != nil {
		return nil, err
	}
	caps = in.Host.availableCaps(caps)

	s := &specs.Spec{
		Version: "1.0.2", // the features used are no newer, and older runtimes accept it
		Root:    &specs.Root{Path: "rootfs", Readonly: c.ReadonlyRootfs},
		Process: &specs.Process{
			Terminal:        c.TTY,
			Args:            append([]string{in.C.Path}, in.C.Args...),
			Env:             processEnv(in.C, in.Hostname, in.Account.Home),
			Cwd:             workingDir(in.C.WorkingDir),
			User:            specs.User{UID: in.Account.UID, GID: in.Account.GID, AdditionalGids: in.Account.Groups},
			NoNewPrivileges: sec.noNewPrivileges,
			ApparmorProfile: profile,
			Rlimits:         rlimits(c.Resources.Ulimits, in.Host.FileLimit),
			Capabilities:    capabilitySets(caps, in.Account.UID),
		},
		Linux: &specs.Linux{
			CgroupsPath:   in.CgroupPath,
			MaskedPaths:   c.MaskedPaths,
			ReadonlyPaths: c.ReadonlyPaths,
			Sysctl:        map[string]string{},
			Resources:     linuxResources(in.Host.applicable(c.Resources), in.Throttle),
			Devices:       in.Devices,
		},
	}
	if c.TTY && c.ConsoleSize != [2]uint{} {
		s.Process.ConsoleSize = &specs.Box{Height: c.ConsoleSize[0], Width: c.ConsoleSize[1]}
	}
	s.Process.OOMScoreAdj = oomScoreAdj(c, in.Host)
	if in.InitBinary != "" {
		s.Process.Args = append([]string{initInContainer, "--"}, s.Process.Args...)
	}

	if err := in.namespaces(s); err != nil {
		return nil, err
	}
	if c.UTSMode != "host" && in.UTSNS == "" {
		s.Hostname = in.Hostname
		s.Domainname = c.Domainname
	}

	for k, v := range c.Sysctls {
		s.Linux.Sysctl[strings.ReplaceAll(k, "/", ".")] = v
	}
	if !in.NetHost && !in.NetShared {
		for k, v := range map[string]string{
			"net.ipv4.ip_unprivileged_port_start": "0",
			"net.ipv4.ping_group_range":           "0 2147483647",
		} {
			if _, ok := s.Linux.Sysctl[k]; !ok {
				s.Linux.Sysctl[k] = v
			}
		}
	}

	if c.Privileged {
		s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = nil, nil
		s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	} else {
		if c.MaskedPaths == nil && !sec.systemPathsUnconfined {
			s.Linux.MaskedPaths = slices.Concat(defaultMaskedPaths, in.Host.ThermalPaths)
		}
		if c.ReadonlyPaths == nil && !sec.systemPathsUnconfined {
			s.Linux.ReadonlyPaths = slices.Clone(defaultReadonlyPaths)
		}
		s.Linux.Resources.Devices = append(defaultDeviceRules(), in.DevRules...)
	}
	if c.Pod != nil { // before the filter, which follows from the capabilities
		if err := addAmbient(s.Process.Capabilities, c.Pod.AmbientCaps, c.CapDrop, in.Host); err != nil {
			return nil, err
		}
	}
	if s.Linux.Seccomp, err = seccompProfile(sec, c.Privileged, s, in.Host); err != nil {
		return nil, err
	}

	in.mounts(s, sec)
	if in.Pod != nil {
		in.pod(s)
		in.C.Adjustment.apply(s)
		return s, nil
	}
	for k, v := range c.Annotations {
		if s.Annotations == nil {
			s.Annotations = map[string]string{}
		}
		s.Annotations[k] = v
	}
	return s, nil
}

// oomScoreAdj is what was asked for. Where nothing was, the daemon's own is not lowered. What a pod asks
// for is raised to it where the daemon may not lower it: the pods that a node needs most would not start there.
func oomScoreAdj(c Config, h hostFacts) *int {
	adj := c.OOMScoreAdj
	if adj == 0 && h.OOMScoreAdj > 0 {
		adj = h.OOMScoreAdj
	}
	if c.Pod != nil {
		adj = h.possibleOOMScore(adj)
	}
	return &adj
}

// namespaces lists the namespaces to make or join.
func (in *specInput) namespaces(s *specs.Spec) error {
	c := in.C.Config
	add := func(t specs.LinuxNamespaceType, path string) {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: t, Path: path})
	}
	add(specs.MountNamespace, "")
	if !in.NetHost {
		if in.NetNS == "" {
			return invalidf("container %s has no network namespace", in.C.ID)
		}
		add(specs.NetworkNamespace, in.NetNS)
	}
	if c.UTSMode != "host" {
		add(specs.UTSNamespace, in.UTSNS)
	}
	if c.PidMode != "host" {
		add(specs.PIDNamespace, in.PidNS)
	}
	if c.IpcMode != "host" {
		add(specs.IPCNamespace, in.IpcNS)
	}
	// As Docker: its own cgroup namespace on cgroup v2, the host's on v1.
	if c.CgroupnsMode == "private" || c.CgroupnsMode == "" && in.Host.CgroupV2 && !c.Privileged {
		add(specs.CgroupNamespace, "")
	}
	return nil
}

// processEnv is the environment of the container's process.
func processEnv(v Container, hostname, home string) []string {
	base := []string{"PATH=" + defaultPath, "HOSTNAME=" + hostname}
	if v.Config.TTY {
		base = append(base, "TERM=xterm")
	}
	env := mergeEnv(base, v.Env)
	if _, ok := lookupEnv(env, "HOME"); !ok {
		env = append(env, "HOME="+home)
	}
	return env
}

func workingDir(dir string) string {
	if dir == "" {
		return "/"
	}
	return path.Clean(dir)
}

// cgroupsPath names the cgroup of a container.
func cgroupsPath(driver, parent, id string) string {
	parent = cgroupParent(driver, parent)
	if driver == "systemd" {
		if parent == "" {
			parent = "system.slice"
		}
		return parent + ":hako:" + id
	}
	if parent == "" {
		parent = "/hako"
	}
	return path.Join("/", parent, id)
}

// cgroupParent is a parent as the driver knows it. For systemd that is a slice: the kubelet
// may give the whole path of one, and "" stands for what is none.
func cgroupParent(driver, parent string) string {
	if driver != "systemd" {
		return parent
	}
	if slice := path.Base(parent); strings.HasSuffix(slice, ".slice") {
		return slice
	}
	return ""
}

// slicePath is where the cgroup of a slice lies: "a-b.slice" in "a.slice" (systemd.slice(5)).
func slicePath(slice string) string {
	name := strings.TrimSuffix(slice, ".slice")
	at := "/"
	for i := range len(name) {
		if name[i] == '-' && i > 0 {
			at = path.Join(at, name[:i]+".slice")
		}
	}
	return path.Join(at, slice)
}

// rlimitNames maps Docker's names of limits to the kernel's.
var rlimitNames = map[string]string{
	"as": "RLIMIT_AS", "core": "RLIMIT_CORE", "cpu": "RLIMIT_CPU", "data": "RLIMIT_DATA", "fsize": "RLIMIT_FSIZE",
	"locks": "RLIMIT_LOCKS", "memlock": "RLIMIT_MEMLOCK", "msgqueue": "RLIMIT_MSGQUEUE", "nice": "RLIMIT_NICE",
	"nofile": "RLIMIT_NOFILE", "nproc": "RLIMIT_NPROC", "rss": "RLIMIT_RSS", "rtprio": "RLIMIT_RTPRIO",
	"rttime": "RLIMIT_RTTIME", "sigpending": "RLIMIT_SIGPENDING", "stack": "RLIMIT_STACK",
}

// rlimits makes the OCI form. Without a word on nofile it is files, soft and hard:
// the daemon's own soft limit is what the Go runtime raised it to, and an endless one
// makes programs slow that close every descriptor they may have.
func rlimits(us []Ulimit, files uint64) []specs.POSIXRlimit {
	var out []specs.POSIXRlimit
	if files > 0 && !slices.ContainsFunc(us, func(u Ulimit) bool { return strings.EqualFold(u.Name, "nofile") }) {
		out = append(out, specs.POSIXRlimit{Type: "RLIMIT_NOFILE", Soft: files, Hard: files})
	}
	for _, u := range us {
		// -1 becomes RLIM_INFINITY, all bits set.
		out = append(out, specs.POSIXRlimit{Type: rlimitNames[strings.ToLower(u.Name)], Soft: uint64(u.Soft), Hard: uint64(u.Hard)})
	}
	return out
}
