package engine

import (
	"maps"
	"os"
	"path"
	"reflect"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// Adjustment is how a plugin wants a container to be that is being created. It is checked
// once, kept in the container's record, and laid over every configuration that is made of it.
// What a plugin asks for twice is as the last one says.
type Adjustment struct {
	Annotations       map[string]string `json:"annotations,omitempty"`
	RemoveAnnotations []string          `json:"removeAnnotations,omitempty"`
	Mounts            []specs.Mount     `json:"mounts,omitempty"` // in place of one at the same destination
	RemoveMounts      []string          `json:"removeMounts,omitempty"`
	Env               []string          `json:"env,omitempty"` // KEY=VALUE
	RemoveEnv         []string          `json:"removeEnv,omitempty"`
	Args              []string          `json:"args,omitempty"` // nil: as they are
	Hooks             *specs.Hooks      `json:"hooks,omitempty"`
	// Rlimits replace those of the same type.
	Rlimits    []specs.POSIXRlimit `json:"rlimits,omitempty"`
	CDIDevices []string            `json:"cdiDevices,omitempty"`

	Devices       []specs.LinuxDevice       `json:"devices,omitempty"`
	RemoveDevices []string                  `json:"removeDevices,omitempty"`
	DeviceRules   []specs.LinuxDeviceCgroup `json:"deviceRules,omitempty"`
	// Resources and OOMScoreAdj become the container's own: Config shows them, and not the record.
	Resources   Resources `json:"-"`
	OOMScoreAdj *int      `json:"-"`

	CgroupsPath      string                          `json:"cgroupsPath,omitempty"`
	IOPriority       *specs.LinuxIOPriority          `json:"ioPriority,omitempty"`
	Scheduler        *specs.Scheduler                `json:"scheduler,omitempty"`
	Seccomp          *specs.LinuxSeccomp             `json:"seccomp,omitempty"`
	Namespaces       []specs.LinuxNamespace          `json:"namespaces,omitempty"`
	RemoveNamespaces []specs.LinuxNamespaceType      `json:"removeNamespaces,omitempty"`
	Sysctl           map[string]string               `json:"sysctl,omitempty"`
	RemoveSysctl     []string                        `json:"removeSysctl,omitempty"`
	NetDevices       map[string]specs.LinuxNetDevice `json:"netDevices,omitempty"`
	RemoveNetDevices []string                        `json:"removeNetDevices,omitempty"`
	RDT              *specs.LinuxIntelRdt            `json:"rdt,omitempty"`
	RemoveRDT        bool                            `json:"removeRDT,omitempty"`
	MemoryPolicy     *specs.LinuxMemoryPolicy        `json:"memoryPolicy,omitempty"`
}

// adjust checks an adjustment and makes it part of a new container. After an error the
// container is not to be used.
func (e *Engine) adjust(v *Container, pod SandboxConfig, a Adjustment) error {
	if err := a.validate(pod, e.opt.CgroupDriver); err != nil {
		return err
	}
	for _, m := range a.Mounts {
		if err := checkAdjustedMount(m); err != nil {
			return err
		}
	}
	if err := e.checkCDI(a.CDIDevices); err != nil {
		return err
	}
	r := a.Resources
	r.Hugepages, r.Unified = over(v.Config.Resources.Hugepages, r.Hugepages), over(v.Config.Resources.Unified, r.Unified)
	v.Config.Resources = mergePodResources(v.Config.Resources, r)
	if a.OOMScoreAdj != nil {
		v.Config.OOMScoreAdj = *a.OOMScoreAdj
	}
	a.Resources, a.OOMScoreAdj = Resources{}, nil
	if !reflect.ValueOf(a).IsZero() {
		v.Adjustment = &a
	}
	return nil
}

func hasNUL(s ...string) bool {
	return slices.ContainsFunc(s, func(s string) bool { return strings.ContainsRune(s, 0) })
}

func absolute(p string) bool { return path.IsAbs(p) && !hasNUL(p) }

// validate checks all that can be checked without the host. A plugin is trusted; what it
// gets wrong shall be told when the container is created, and by its name.
func (a *Adjustment) validate(pod SandboxConfig, cgroupDriver string) error {
	for k, v := range a.Annotations {
		if k == "" || hasNUL(k, v) {
			return invalidf("annotation %q is not possible", k)
		}
	}
	for _, m := range a.Mounts {
		if !absolute(m.Destination) || path.Clean(m.Destination) == "/" {
			return invalidf("mount destination %q is not a path below the root", m.Destination)
		}
		if hasNUL(m.Source, m.Type) || hasNUL(m.Options...) {
			return invalidf("mount %s holds a NUL byte", m.Destination)
		}
	}
	for _, kv := range a.Env {
		if k, _, ok := strings.Cut(kv, "="); !ok || k == "" || hasNUL(kv) {
			return invalidf("environment variable %q is not possible", k)
		}
	}
	if a.Args != nil && (len(a.Args) == 0 || a.Args[0] == "" || hasNUL(a.Args...)) {
		return invalidf("arguments %q are not possible", a.Args)
	}
	if err := validateHooks(a.Hooks); err != nil {
		return err
	}
	for _, l := range a.Rlimits {
		if !slices.Contains(slices.Collect(maps.Values(rlimitNames)), l.Type) {
			return invalidf("resource limit %q is not known", l.Type)
		}
		if l.Soft > l.Hard {
			return invalidf("resource limit %s: soft limit %d is above the hard one, %d", l.Type, l.Soft, l.Hard)
		}
	}
	for _, d := range a.Devices {
		if !absolute(d.Path) || path.Clean(d.Path) == "/" {
			return invalidf("device path %q is not a path below the root", d.Path)
		}
		if !slices.Contains([]string{"b", "c", "u", "p"}, d.Type) || d.Major < 0 || d.Minor < 0 {
			return invalidf("device %s of type %q with number %d:%d is not possible", d.Path, d.Type, d.Major, d.Minor)
		}
	}
	for _, r := range a.DeviceRules {
		if !slices.Contains([]string{"", "a", "b", "c"}, r.Type) || r.Access != "" && !validDevicePermissions(r.Access) {
			return invalidf("device rule of type %q with access %q is not possible", r.Type, r.Access)
		}
	}
	if err := a.Resources.validatePod(); err != nil {
		return err
	}
	if n := a.OOMScoreAdj; n != nil && (*n < -1000 || *n > 1000) {
		return invalidf("oom_score_adj %d is not between -1000 and 1000", *n)
	}
	return a.validateLinux(pod, cgroupDriver)
}

func validateHooks(h *specs.Hooks) error {
	if h == nil {
		return nil
	}
	for _, hook := range slices.Concat(h.Prestart, h.CreateRuntime, h.CreateContainer, h.StartContainer, h.Poststart, h.Poststop) { //nolint:staticcheck // plugins still give prestart hooks
		if !absolute(hook.Path) || hasNUL(hook.Args...) || hasNUL(hook.Env...) {
			return invalidf("hook %q is not an absolute path, or holds a NUL byte", hook.Path)
		}
		if hook.Timeout != nil && *hook.Timeout <= 0 {
			return invalidf("hook %s: time limit %d s is not positive", hook.Path, *hook.Timeout)
		}
	}
	return nil
}

var (
	seccompActions = []specs.LinuxSeccompAction{specs.ActKill, specs.ActKillProcess, specs.ActKillThread, specs.ActTrap,
		specs.ActErrno, specs.ActTrace, specs.ActAllow, specs.ActLog, specs.ActNotify}
	namespaceTypes = []specs.LinuxNamespaceType{specs.PIDNamespace, specs.NetworkNamespace, specs.IPCNamespace,
		specs.UTSNamespace, specs.CgroupNamespace, specs.TimeNamespace}
)

func (a *Adjustment) validateLinux(pod SandboxConfig, cgroupDriver string) error {
	if p := a.CgroupsPath; p != "" {
		if hasNUL(p) || strings.Contains(p, "\n") || slices.Contains(strings.Split(p, "/"), "..") {
			return invalidf("cgroup path %q is not possible", p)
		}
		if cgroupDriver == "systemd" && strings.Count(p, ":") != 2 {
			return invalidf("cgroup path %q is not of systemd's form SLICE:PREFIX:NAME", p)
		}
	}
	if p := a.IOPriority; p != nil && (p.Priority < 0 || p.Priority > 7 ||
		!slices.Contains([]specs.IOPriorityClass{specs.IOPRIO_CLASS_RT, specs.IOPRIO_CLASS_BE, specs.IOPRIO_CLASS_IDLE}, p.Class)) {
		return invalidf("I/O priority %s/%d is not possible", p.Class, p.Priority)
	}
	if s := a.Seccomp; s != nil {
		actions := []specs.LinuxSeccompAction{s.DefaultAction}
		for _, c := range s.Syscalls {
			if len(c.Names) == 0 {
				return invalidf("a rule of the seccomp policy names no system call")
			}
			actions = append(actions, c.Action)
		}
		for _, act := range actions {
			if !slices.Contains(seccompActions, act) {
				return invalidf("seccomp action %q is not known", act)
			}
		}
		if s.ListenerPath != "" && !absolute(s.ListenerPath) {
			return invalidf("seccomp listener %q is not an absolute path", s.ListenerPath)
		}
	}
	types := slices.Clone(a.RemoveNamespaces)
	for _, n := range a.Namespaces {
		if n.Path != "" && !absolute(n.Path) {
			return invalidf("path %q of the %s namespace is not absolute", n.Path, n.Type)
		}
		types = append(types, n.Type)
	}
	for _, t := range types {
		switch {
		case t == specs.UserNamespace || t == specs.MountNamespace:
			return notImplementedf("the %s namespace of a pod's container cannot be adjusted", t)
		case !slices.Contains(namespaceTypes, t):
			return invalidf("namespace type %q is not known", t)
		}
	}
	// A namespace of the host's has none of its own, unless the plugin gives one.
	given := func(t specs.LinuxNamespaceType) bool {
		return slices.ContainsFunc(a.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == t })
	}
	modes := Config{Sysctls: a.Sysctl}
	if pod.Network == NamespaceNode && !given(specs.NetworkNamespace) {
		modes.NetworkMode = "host"
	}
	if pod.Network == NamespaceNode && !given(specs.UTSNamespace) {
		modes.UTSMode = "host"
	}
	if pod.IPC == NamespaceNode && !given(specs.IPCNamespace) {
		modes.IpcMode = "host"
	}
	if err := modes.validateSysctls(); err != nil {
		return err
	}
	for host, d := range a.NetDevices {
		for _, name := range []string{host, d.Name} {
			if len(name) > 15 || strings.ContainsAny(name, "/ \t\n\x00") || name == "." || name == ".." {
				return invalidf("network device name %q is not possible", name)
			}
		}
		if host == "" {
			return invalidf("a network device has no name")
		}
	}
	if r := a.RDT; r != nil {
		if strings.ContainsAny(r.ClosID, "/\n\x00") || r.ClosID == "." || r.ClosID == ".." {
			return invalidf("RDT class %q is not possible", r.ClosID)
		}
	}
	return nil
}

// checkAdjustedMount looks at the source of a bind mount on the host.
func checkAdjustedMount(m specs.Mount) error {
	if m.Type != "bind" && !slices.Contains(m.Options, "bind") && !slices.Contains(m.Options, "rbind") {
		if m.Type == "" {
			return invalidf("mount %s has no type", m.Destination)
		}
		return nil
	}
	if !absolute(m.Source) {
		return invalidf("source %q of mount %s is not an absolute path", m.Source, m.Destination)
	}
	if _, err := os.Stat(m.Source); err != nil {
		return invalidf("source of mount %s: %v", m.Destination, err)
	}
	return checkPropagation(Mount{Kind: MountBind, Source: m.Source, Target: m.Destination, Propagation: propagationOf(m)})
}

func propagationOf(m specs.Mount) string {
	out := ""
	for _, o := range m.Options {
		switch o {
		case "private", "rprivate", "slave", "rslave", "shared", "rshared":
			out = o
		}
	}
	return out
}

// apply lays an adjustment over a configuration. It is a pure function.
func (a *Adjustment) apply(s *specs.Spec) {
	if a == nil {
		return
	}
	if s.Annotations == nil {
		s.Annotations = map[string]string{}
	}
	maps.DeleteFunc(s.Annotations, func(k, _ string) bool { return slices.Contains(a.RemoveAnnotations, k) })
	maps.Copy(s.Annotations, a.Annotations)
	a.applyMounts(s)
	p, l := s.Process, s.Linux
	p.Env = slices.DeleteFunc(slices.Clone(p.Env), func(kv string) bool {
		k, _, _ := strings.Cut(kv, "=")
		return slices.Contains(a.RemoveEnv, k)
	})
	p.Env = mergeEnv(p.Env, a.Env)
	if a.Args != nil {
		p.Args = a.Args
	}
	if h := a.Hooks; h != nil {
		own := *h // devices by name may add to it
		s.Hooks = &own
	}
	for _, r := range a.Rlimits {
		p.Rlimits = slices.DeleteFunc(p.Rlimits, func(o specs.POSIXRlimit) bool { return o.Type == r.Type })
		p.Rlimits = append(p.Rlimits, r)
	}
	if a.IOPriority != nil {
		p.IOPriority = a.IOPriority
	}
	if a.Scheduler != nil {
		p.Scheduler = a.Scheduler
	}
	a.applyDevices(l)
	if a.CgroupsPath != "" {
		l.CgroupsPath = a.CgroupsPath
	}
	if a.Seccomp != nil {
		l.Seccomp = a.Seccomp
	}
	l.Namespaces = slices.DeleteFunc(l.Namespaces, func(n specs.LinuxNamespace) bool {
		return slices.Contains(a.RemoveNamespaces, n.Type) ||
			slices.ContainsFunc(a.Namespaces, func(o specs.LinuxNamespace) bool { return o.Type == n.Type })
	})
	l.Namespaces = append(l.Namespaces, a.Namespaces...)
	maps.DeleteFunc(l.Sysctl, func(k, _ string) bool { return slices.Contains(a.RemoveSysctl, k) })
	maps.Copy(l.Sysctl, a.Sysctl)
	if len(a.NetDevices) > 0 {
		l.NetDevices = a.NetDevices // the engine itself gives none
	}
	if a.RDT != nil {
		l.IntelRdt = a.RDT
	}
	if a.MemoryPolicy != nil {
		l.MemoryPolicy = a.MemoryPolicy
	}
}

func (a *Adjustment) applyMounts(s *specs.Spec) {
	gone := slices.Clone(a.RemoveMounts)
	for _, m := range a.Mounts {
		gone = append(gone, m.Destination)
		if strings.TrimPrefix(propagationOf(m), "r") == "shared" {
			s.Linux.RootfsPropagation = "shared"
		}
	}
	for i := range gone {
		gone[i] = path.Clean(gone[i])
	}
	s.Mounts = slices.DeleteFunc(s.Mounts, func(m specs.Mount) bool { return slices.Contains(gone, path.Clean(m.Destination)) })
	s.Mounts = append(s.Mounts, a.Mounts...)
	// Parents before what lies in them.
	slices.SortStableFunc(s.Mounts, func(x, y specs.Mount) int {
		return strings.Count(path.Clean(x.Destination), "/") - strings.Count(path.Clean(y.Destination), "/")
	})
}

func (a *Adjustment) applyDevices(l *specs.Linux) {
	gone := slices.Clone(a.RemoveDevices)
	for _, d := range a.Devices {
		gone = append(gone, d.Path)
	}
	l.Devices = slices.DeleteFunc(slices.Clone(l.Devices), func(d specs.LinuxDevice) bool { return slices.Contains(gone, d.Path) })
	l.Devices = append(l.Devices, a.Devices...)
	for _, d := range a.Devices {
		if d.Type == "p" {
			continue
		}
		kind := d.Type
		if kind == "u" {
			kind = "c"
		}
		l.Resources.Devices = append(l.Resources.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: kind, Major: &d.Major, Minor: &d.Minor, Access: "rwm"})
	}
	l.Resources.Devices = append(l.Resources.Devices, a.DeviceRules...)
}
