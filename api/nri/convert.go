package nri

import (
	"maps"
	"slices"
	"strings"

	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/engine"
)

// To the wire.

func wireSandbox(s engine.Sandbox) *api.PodSandbox {
	c := s.Config
	w := &api.PodSandbox{
		Id: s.ID, Name: c.Name, Uid: c.UID, Namespace: c.Namespace, RuntimeHandler: c.Runtime, Pid: uint32(s.Pid),
		Labels: maps.Clone(c.Labels), Annotations: maps.Clone(c.Annotations),
		Linux: &api.LinuxPodSandbox{
			PodOverhead: wireResources(c.Overhead), PodResources: wireResources(c.Resources), CgroupParent: c.CgroupParent,
		},
	}
	for _, ip := range s.IPs {
		w.Ips = append(w.Ips, ip.String())
	}
	if c.Network == engine.NamespacePod && s.NetNS != "" {
		w.Linux.Namespaces = []*api.LinuxNamespace{{Type: string(specs.NetworkNamespace), Path: s.NetNS}}
	}
	return w
}

var states = map[engine.Status]api.ContainerState{
	engine.StatusCreated: api.ContainerState_CONTAINER_CREATED, engine.StatusRunning: api.ContainerState_CONTAINER_RUNNING,
	engine.StatusPaused: api.ContainerState_CONTAINER_PAUSED, engine.StatusExited: api.ContainerState_CONTAINER_STOPPED,
	engine.StatusRemoving: api.ContainerState_CONTAINER_STOPPED, engine.StatusDead: api.ContainerState_CONTAINER_STOPPED,
}

// wireContainer shows a container. It is made anew for each request, because the library
// changes it on the way from plugin to plugin.
func wireContainer(c engine.HookContainer) *api.Container {
	p := c.Config.Pod
	w := &api.Container{
		Id: c.ID, PodSandboxId: p.Sandbox, Name: p.Name, State: states[c.State.Status], Pid: uint32(c.State.Pid),
		Labels: maps.Clone(c.Config.Labels), Annotations: maps.Clone(c.Config.Annotations),
		Args: append([]string{c.Path}, c.Args...), Env: slices.Clone(c.Env),
		CreatedAt: c.Created.UnixNano(), ExitCode: int32(c.State.ExitCode), StatusMessage: c.State.Error,
		Image: &api.Image{Name: c.ImageName, ConfigDigest: c.ImageID},
		Linux: &api.LinuxContainer{
			Resources: wireResources(&c.Config.Resources), OomScoreAdj: api.Int(c.Config.OOMScoreAdj), SeccompProfile: seccompProfile(c.Config),
		},
	}
	if !c.State.StartedAt.IsZero() {
		w.StartedAt = c.State.StartedAt.UnixNano()
	}
	if !c.State.FinishedAt.IsZero() {
		w.FinishedAt = c.State.FinishedAt.UnixNano()
	}
	if u := p.User; u != nil {
		w.User = &api.User{Uid: u.UID, Gid: u.GID, AdditionalGids: slices.Clone(u.Groups)}
	}
	for _, name := range p.CDIDevices {
		w.CDIDevices = append(w.CDIDevices, &api.CDIDevice{Name: name})
	}
	if c.Spec != nil {
		wireSpec(w, c.Spec)
	}
	return w
}

// wireSpec shows what only the OCI configuration tells.
func wireSpec(w *api.Container, s *specs.Spec) {
	if w.Annotations == nil {
		w.Annotations = map[string]string{}
	}
	maps.Copy(w.Annotations, s.Annotations)
	w.Mounts, w.Hooks = api.FromOCIMounts(s.Mounts), api.FromOCIHooks(s.Hooks)
	if p := s.Process; p != nil {
		w.Args, w.Env = slices.Clone(p.Args), slices.Clone(p.Env)
		for _, l := range p.Rlimits {
			w.Rlimits = append(w.Rlimits, &api.POSIXRlimit{Type: l.Type, Hard: l.Hard, Soft: l.Soft})
		}
		w.Linux.OomScoreAdj = api.Int(p.OOMScoreAdj)
		w.Linux.IoPriority, w.Linux.Scheduler = api.FromOCILinuxIOPriority(p.IOPriority), api.FromOCILinuxScheduler(p.Scheduler)
	}
	l := s.Linux
	if l == nil {
		return
	}
	w.Linux.Namespaces, w.Linux.Devices = api.FromOCILinuxNamespaces(l.Namespaces), api.FromOCILinuxDevices(l.Devices)
	w.Linux.Resources, w.Linux.CgroupsPath, w.Linux.Sysctl = api.FromOCILinuxResources(l.Resources, nil), l.CgroupsPath, maps.Clone(l.Sysctl)
	w.Linux.NetDevices = api.FromOCILinuxNetDevices(l.NetDevices)
	if l.Seccomp != nil {
		w.Linux.SeccompPolicy = api.FromOCILinuxSeccomp(l.Seccomp)
	}
	if r := l.IntelRdt; r != nil {
		w.Linux.Rdt = &api.LinuxRdt{ClosId: api.String(r.ClosID), EnableMonitoring: api.Bool(r.EnableMonitoring)}
		if len(r.Schemata) > 0 {
			w.Linux.Rdt.Schemata = api.RepeatedString(r.Schemata)
		}
	}
}

func seccompProfile(c engine.Config) *api.SecurityProfile {
	p := &api.SecurityProfile{ProfileType: api.SecurityProfile_RUNTIME_DEFAULT}
	for _, o := range c.SecurityOpt {
		if v, ok := strings.CutPrefix(o, "seccomp="); ok && v == "unconfined" {
			p.ProfileType = api.SecurityProfile_UNCONFINED
		} else if ok {
			// The engine keeps what the profile holds, not where it lay.
			p.ProfileType = api.SecurityProfile_LOCALHOST
		}
	}
	if c.Privileged {
		p.ProfileType = api.SecurityProfile_UNCONFINED
	}
	return p
}

// wireResources shows the limits that are set.
func wireResources(r *engine.Resources) *api.LinuxResources {
	if r == nil {
		return nil
	}
	w := &api.LinuxResources{Memory: &api.LinuxMemory{}, Cpu: &api.LinuxCPU{Cpus: r.CpusetCPUs, Mems: r.CpusetMems}, Unified: maps.Clone(r.Unified)}
	for _, f := range []struct {
		from int64
		to   **api.OptionalInt64
	}{
		{r.Memory, &w.Memory.Limit}, {r.MemoryReservation, &w.Memory.Reservation}, {r.MemorySwap, &w.Memory.Swap},
		{r.CPUQuota, &w.Cpu.Quota}, {r.CPURTRuntime, &w.Cpu.RealtimeRuntime},
	} {
		if f.from != 0 {
			*f.to = api.Int64(f.from)
		}
	}
	for _, f := range []struct {
		from int64
		to   **api.OptionalUInt64
	}{{r.CPUShares, &w.Cpu.Shares}, {r.CPUPeriod, &w.Cpu.Period}, {r.CPURTPeriod, &w.Cpu.RealtimePeriod}} {
		if f.from > 0 {
			*f.to = api.UInt64(uint64(f.from))
		}
	}
	if s := r.MemorySwappiness; s != nil && *s >= 0 {
		w.Memory.Swappiness = api.UInt64(uint64(*s))
	}
	w.Memory.DisableOomKiller = api.Bool(r.OOMKillDisable)
	if r.PidsLimit != nil {
		w.Pids = &api.LinuxPids{Limit: *r.PidsLimit}
	}
	for _, size := range slices.Sorted(maps.Keys(r.Hugepages)) {
		w.HugepageLimits = append(w.HugepageLimits, &api.HugepageLimit{PageSize: size, Limit: r.Hugepages[size]})
	}
	return w
}

// From the wire.

// resourcesOf makes the engine's form of limits. What it has no word for is an error.
func resourcesOf(w *api.LinuxResources) (engine.Resources, error) {
	m, c := w.GetMemory(), w.GetCpu()
	r := engine.Resources{CpusetCPUs: c.GetCpus(), CpusetMems: c.GetMems(), OOMKillDisable: m.GetDisableOomKiller().Get()}
	for _, f := range []struct {
		from *api.OptionalInt64
		to   *int64
	}{
		{m.GetLimit(), &r.Memory}, {m.GetReservation(), &r.MemoryReservation}, {m.GetSwap(), &r.MemorySwap},
		{c.GetQuota(), &r.CPUQuota}, {c.GetRealtimeRuntime(), &r.CPURTRuntime},
	} {
		*f.to = f.from.GetValue()
	}
	for _, f := range []struct {
		name string
		from *api.OptionalUInt64
		to   *int64
	}{{"CPU shares", c.GetShares(), &r.CPUShares}, {"CPU period", c.GetPeriod(), &r.CPUPeriod}, {"real-time period", c.GetRealtimePeriod(), &r.CPURTPeriod}} {
		if *f.to = int64(f.from.GetValue()); *f.to < 0 {
			return r, invalidf("%s %d is out of range", f.name, f.from.GetValue())
		}
	}
	if s := m.GetSwappiness(); s != nil {
		if s.GetValue() > 100 {
			return r, invalidf("memory swappiness %d is not between 0 and 100", s.GetValue())
		}
		n := int64(s.GetValue())
		r.MemorySwappiness = &n
	}
	switch {
	case m.GetKernel() != nil:
		return r, notImplementedf("a limit of the kernel's memory is not supported: no kernel has it any more")
	case m.GetKernelTcp() != nil:
		return r, notImplementedf("a limit of the memory of TCP buffers is not supported")
	case w.GetBlockioClass().GetValue() != "":
		return r, notImplementedf("block I/O class %q: no classes are configured", w.GetBlockioClass().GetValue())
	}
	if p := w.GetPids(); p != nil {
		n := p.GetLimit()
		r.PidsLimit = &n
	}
	for _, h := range w.GetHugepageLimits() {
		if r.Hugepages == nil {
			r.Hugepages = map[string]uint64{}
		}
		r.Hugepages[h.GetPageSize()] = h.GetLimit()
	}
	if len(w.GetUnified()) > 0 {
		r.Unified = w.GetUnified()
	}
	return r, nil
}

// updatesOf makes the engine's form of updates. An update of nothing is left out.
func updatesOf(wire []*api.ContainerUpdate) ([]engine.ContainerUpdate, error) {
	var out []engine.ContainerUpdate
	for _, w := range wire {
		if w == nil || w.GetLinux().GetResources() == nil {
			continue
		}
		r, err := resourcesOf(w.GetLinux().GetResources())
		if err != nil {
			if w.GetIgnoreFailure() {
				continue
			}
			return nil, err
		}
		if c := w.GetLinux().GetResources().GetRdtClass().GetValue(); c != "" {
			return nil, notImplementedf("the RDT class of a container cannot be changed after its creation")
		}
		out = append(out, engine.ContainerUpdate{ID: w.GetContainerId(), Resources: r, IgnoreFailure: w.GetIgnoreFailure()})
	}
	return out, nil
}

// adjustmentOf makes the engine's form of an adjustment.
func adjustmentOf(w *api.ContainerAdjustment) (a engine.Adjustment, err error) {
	for k, v := range w.GetAnnotations() {
		if key, gone := api.IsMarkedForRemoval(k); gone {
			a.RemoveAnnotations = append(a.RemoveAnnotations, key)
		} else {
			put(&a.Annotations, k, v)
		}
	}
	for _, m := range w.GetMounts() {
		if to, gone := m.IsMarkedForRemoval(); gone {
			a.RemoveMounts = append(a.RemoveMounts, to)
		} else {
			a.Mounts = append(a.Mounts, m.ToOCI(nil))
		}
	}
	for _, e := range w.GetEnv() {
		if key, gone := e.IsMarkedForRemoval(); gone {
			a.RemoveEnv = append(a.RemoveEnv, key)
		} else {
			a.Env = append(a.Env, e.GetKey()+"="+e.GetValue())
		}
	}
	if args := w.GetArgs(); len(args) > 0 {
		a.Args = args
	}
	a.Hooks = hooksOf(w.GetHooks())
	for _, l := range w.GetRlimits() {
		a.Rlimits = append(a.Rlimits, specs.POSIXRlimit{Type: l.GetType(), Hard: l.GetHard(), Soft: l.GetSoft()})
	}
	for _, d := range w.GetCDIDevices() {
		a.CDIDevices = append(a.CDIDevices, d.GetName())
	}
	return a, linuxOf(&a, w.GetLinux())
}

func linuxOf(a *engine.Adjustment, w *api.LinuxContainerAdjustment) (err error) {
	for _, d := range w.GetDevices() {
		if p, gone := d.IsMarkedForRemoval(); gone {
			a.RemoveDevices = append(a.RemoveDevices, p)
		} else {
			a.Devices = append(a.Devices, d.ToOCI())
		}
	}
	if a.Resources, err = resourcesOf(w.GetResources()); err != nil {
		return err
	}
	for _, d := range w.GetResources().GetDevices() {
		a.DeviceRules = append(a.DeviceRules, specs.LinuxDeviceCgroup{
			Allow: d.GetAllow(), Type: d.GetType(), Major: d.GetMajor().Get(), Minor: d.GetMinor().Get(), Access: d.GetAccess(),
		})
	}
	a.OOMScoreAdj = w.GetOomScoreAdj().Get()
	a.CgroupsPath = w.GetCgroupsPath()
	a.IOPriority, a.Scheduler, a.MemoryPolicy = w.GetIoPriority().ToOCI(), w.GetScheduler().ToOCI(), w.GetMemoryPolicy().ToOCI()
	if p := w.GetSeccompPolicy(); p != nil {
		a.Seccomp = seccompOf(p)
	}
	for _, n := range w.GetNamespaces() {
		if t, gone := n.IsMarkedForRemoval(); gone {
			a.RemoveNamespaces = append(a.RemoveNamespaces, specs.LinuxNamespaceType(t))
		} else {
			a.Namespaces = append(a.Namespaces, specs.LinuxNamespace{Type: specs.LinuxNamespaceType(n.GetType()), Path: n.GetPath()})
		}
	}
	for k, v := range w.GetSysctl() {
		if key, gone := api.IsMarkedForRemoval(k); gone {
			a.RemoveSysctl = append(a.RemoveSysctl, key)
		} else {
			put(&a.Sysctl, k, v)
		}
	}
	for k, d := range w.GetNetDevices() {
		if key, gone := api.IsMarkedForRemoval(k); gone {
			a.RemoveNetDevices = append(a.RemoveNetDevices, key)
		} else {
			put(&a.NetDevices, k, d.ToOCI())
		}
	}
	a.RDT, a.RemoveRDT = rdtOf(w.GetRdt(), w.GetResources().GetRdtClass())
	return nil
}

func put[V any](m *map[string]V, k string, v V) {
	if *m == nil {
		*m = map[string]V{}
	}
	(*m)[k] = v
}

// rdtOf joins the two ways to ask for RDT. The library gives an empty request where there is none.
func rdtOf(w *api.LinuxRdt, class *api.OptionalString) (*specs.LinuxIntelRdt, bool) {
	r := specs.LinuxIntelRdt{ClosID: w.GetClosId().GetValue(), EnableMonitoring: w.GetEnableMonitoring().GetValue()}
	if s := w.GetSchemata(); s != nil {
		r.Schemata = s.GetValue()
	}
	if r.ClosID == "" {
		r.ClosID = class.GetValue()
	}
	if r.ClosID == "" && !r.EnableMonitoring && len(r.Schemata) == 0 {
		return nil, w.GetRemove()
	}
	return &r, w.GetRemove()
}

func hooksOf(w *api.Hooks) *specs.Hooks {
	if w.Hooks() == nil {
		return nil
	}
	list := func(in []*api.Hook) (out []specs.Hook) {
		for _, h := range in {
			out = append(out, h.ToOCI())
		}
		return out
	}
	return &specs.Hooks{
		Prestart: list(w.GetPrestart()), CreateRuntime: list(w.GetCreateRuntime()), CreateContainer: list(w.GetCreateContainer()), //nolint:staticcheck // plugins still give prestart hooks
		StartContainer: list(w.GetStartContainer()), Poststart: list(w.GetPoststart()), Poststop: list(w.GetPoststop()),
	}
}

func seccompOf(w *api.LinuxSeccomp) *specs.LinuxSeccomp {
	s := &specs.LinuxSeccomp{
		DefaultAction: specs.LinuxSeccompAction(w.GetDefaultAction()), ListenerPath: w.GetListenerPath(),
		ListenerMetadata: w.GetListenerMetadata(), Syscalls: api.ToOCILinuxSyscalls(w.GetSyscalls()),
	}
	if e := w.GetDefaultErrno().Get(); e != nil {
		n := uint(*e)
		s.DefaultErrnoRet = &n
	}
	for _, a := range w.GetArchitectures() {
		s.Architectures = append(s.Architectures, specs.Arch(a))
	}
	for _, f := range w.GetFlags() {
		s.Flags = append(s.Flags, specs.LinuxSeccompFlag(f))
	}
	return s
}

// removedUnsaid finds the removals of environment variables and devices that the library
// carries out on what it shows to the next plugin, and does not put into its answer.
func removedUnsaid(a *engine.Adjustment, before, after *api.Container) {
	has := func(list []string, key string) bool {
		return slices.ContainsFunc(list, func(kv string) bool { k, _, _ := strings.Cut(kv, "="); return k == key })
	}
	for _, kv := range before.GetEnv() {
		if k, _, _ := strings.Cut(kv, "="); !has(after.GetEnv(), k) && !slices.Contains(a.RemoveEnv, k) {
			a.RemoveEnv = append(a.RemoveEnv, k)
		}
	}
	for _, d := range before.GetLinux().GetDevices() {
		there := slices.ContainsFunc(after.GetLinux().GetDevices(), func(o *api.LinuxDevice) bool { return o.GetPath() == d.GetPath() })
		if !there && !slices.Contains(a.RemoveDevices, d.GetPath()) {
			a.RemoveDevices = append(a.RemoveDevices, d.GetPath())
		}
	}
}
