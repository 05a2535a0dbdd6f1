//go:build linux

package plan

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// What the runtime does that is no step of the machine, in the words of explanations.

// cgroup tells of the container's cgroup.
func (x *explainer) cgroup() {
	l := x.s.Linux
	if l.CgroupsPath == "" {
		x.action(StagePrepare, "mkdir", "linux.cgroupsPath", "make a cgroup with the container's name")
		return
	}
	x.action(StagePrepare, "mkdir", "linux.cgroupsPath", "make the cgroup %s", l.CgroupsPath)
}

// limits tells of the leaves of linux.resources.
func (x *explainer) limits() {
	r := x.s.Linux.Resources
	if r == nil {
		r = &specs.LinuxResources{}
	}
	for i, d := range r.Devices {
		verb := "deny"
		if d.Allow {
			verb = "allow"
		}
		number := func(n *int64) string {
			if n == nil || *n < 0 {
				return "*"
			}
			return fmt.Sprint(*n)
		}
		typ := d.Type
		if typ == "" {
			typ = "a"
		}
		device := fmt.Sprintf("%s %s:%s %s", typ, number(d.Major), number(d.Minor), d.Access)
		x.action(StageAccompany, deviceCall(x.e.facts), element("linux.resources.devices", i), "%s devices %s", verb, device).subject = "rule:" + device
	}
	x.action(StageAccompany, deviceCall(x.e.facts), "", "allow the default devices, and mknod of all").Promise = "default devices"
	raw, err := json.Marshal(r)
	if err != nil {
		return
	}
	var tree map[string]any
	if json.Unmarshal(raw, &tree) != nil {
		return
	}
	delete(tree, "devices")
	x.leaves("linux.resources", tree)
}

func deviceCall(f Facts) string {
	if f.Cgroup.V2 {
		return "bpf"
	}
	return "write"
}

// leaves tells of every value below path.
func (x *explainer) leaves(path string, v any) {
	switch v := v.(type) {
	case map[string]any:
		for _, k := range slices.Sorted(maps.Keys(v)) {
			x.leaves(member(path, k), v[k])
		}
	case []any:
		for i, e := range v {
			raw, _ := json.Marshal(e) //nolint:errchkjson // it was JSON before
			x.action(StageAccompany, "write", element(path, i), "limit %s to %s", strings.TrimPrefix(path, "linux.resources."), raw)
		}
	case float64:
		x.action(StageAccompany, "write", path, "limit %s to %.0f", strings.TrimPrefix(path, "linux.resources."), v)
	default:
		x.action(StageAccompany, "write", path, "limit %s to %v", strings.TrimPrefix(path, "linux.resources."), v)
	}
}

// seccomp tells what the filter does, in the words of the profile.
func (x *explainer) seccomp() {
	sec := x.s.Linux.Seccomp
	if sec == nil || len(x.p.Filter.Program) == 0 && !x.loadsFilter() {
		return
	}
	act := func(a specs.LinuxSeccompAction, ret *uint) string {
		if ret != nil {
			return fmt.Sprintf("%s(%d)", a, *ret)
		}
		return string(a)
	}
	x.action(StagePrepare, "", "linux.seccomp.defaultAction", "compile a seccomp filter: %s by default", act(sec.DefaultAction, sec.DefaultErrnoRet))
	for i, f := range sec.Flags {
		x.action(StagePrepare, "", element("linux.seccomp.flags", i), "the filter has the flag %s", f).subject = "flag:" + string(f)
	}
	if sec.ListenerPath != "" {
		x.action(StagePrepare, "", "linux.seccomp.listenerPath", "the agent for notifications listens at %s", sec.ListenerPath)
	}
	for i, r := range sec.Syscalls {
		rule := act(r.Action, r.ErrnoRet)
		for j, a := range r.Args {
			word := " if"
			if j > 0 {
				word = " and"
			}
			rule += fmt.Sprintf("%s argument %d %s %d", word, a.Index, a.Op, a.Value)
			if a.ValueTwo != 0 {
				rule += fmt.Sprintf(",%d", a.ValueTwo)
			}
		}
		p := x.action(StagePrepare, "", element("linux.seccomp.syscalls", i), "the filter: %s", rule)
		p.subject = "seccomp:" + rule
		for _, name := range r.Names {
			p.Details = append(p.Details, visible(name))
		}
	}
}

// loadsFilter tells whether the program has a step that loads the filter.
func (x *explainer) loadsFilter() bool {
	return slices.ContainsFunc(x.p.Program, func(s Step) bool { return s.Name == "seccomp" })
}

// before tells what the runtime makes before its steps.
func (x *explainer) before() {
	for _, n := range x.p.UserNamespaces {
		x.action(StagePrepare, "clone(CLONE_NEWUSER), write", x.mapsOf(n), "make a user namespace that holds the maps of mounts: users %s, groups %s", idMapText(n.UIDs), idMapText(n.GIDs))
	}
	for _, o := range x.p.Overlays {
		x.action(StagePrepare, "mount, in a mount namespace of its own", "root.path", "mount an overlay of %d layers into %s", len(o.Lower), x.p.slotName(o.Slot))
	}
}

// mapsOf finds what asks for a user namespace of mounts.
func (x *explainer) mapsOf(n UserNamespace) string {
	for i, m := range x.s.Mounts {
		if len(m.UIDMappings) > 0 && slices.Equal(m.UIDMappings, n.UIDs) {
			return element("mounts", i) + ".uidMappings"
		}
	}
	return "linux.uidMappings"
}

func (x *explainer) clone() {
	for i, n := range x.s.Linux.Namespaces {
		if n.Type == specs.TimeNamespace && x.p.NewTime {
			x.action(StageClone, "unshare(CLONE_NEWTIME)", element("linux.namespaces", i), "make the time namespace for the children of this thread")
		}
	}
	p := x.action(StageClone, "clone("+x.p.cloneText()+")", "", "clone the container's first process")
	for i, n := range x.s.Linux.Namespaces {
		if n.Path == "" && x.p.CloneFlags&NamespaceFlag(string(n.Type)) != 0 {
			p.From = append(p.From, x.place(element("linux.namespaces", i)))
		}
	}
	p.subject = "clone"
}

func idMapText(maps []specs.LinuxIDMapping) string {
	var out []string
	for _, m := range maps {
		out = append(out, fmt.Sprintf("%d %d %d", m.ContainerID, m.HostID, m.Size))
	}
	return strings.Join(out, ", ")
}

// accompany tells what the runtime does while the child works.
func (x *explainer) accompany() {
	l := x.s.Linux
	if x.p.IDMaps {
		x.action(StageAccompany, "write, or newuidmap", "linux.uidMappings", "map the user ids %s", idMapText(l.UIDMappings))
		x.action(StageAccompany, "write, or newgidmap", "linux.gidMappings", "map the group ids %s", idMapText(l.GIDMappings))
	}
	if x.p.NewTime {
		for _, clock := range slices.Sorted(maps.Keys(l.TimeOffsets)) {
			o := l.TimeOffsets[clock]
			x.action(StageAccompany, "write", member("linux.timeOffsets", clock), "set the clock %s forward by %d s %d ns", clock, o.Secs, o.Nanosecs)
		}
	}
	x.limits()
	if n := x.p.OOMScoreAdj; n != nil {
		x.action(StageAccompany, "write", "process.oomScoreAdj", "set oom_score_adj to %d", *n)
	}
	x.raiseLimits()
	if l.IntelRdt != nil {
		if raw, err := json.Marshal(l.IntelRdt); err == nil {
			var tree map[string]any
			if json.Unmarshal(raw, &tree) == nil {
				x.leaves("linux.intelRdt", tree)
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(l.NetDevices)) {
		to := l.NetDevices[name].Name
		if to == "" {
			to = name
		}
		x.action(StageAccompany, "netlink", member("linux.netDevices", name), "move the network device %s into the container, as %s", name, to)
	}
	if h := x.s.Hooks; h != nil {
		x.hooks(StageAccompany, "prestart", "the runtime's namespaces", h.Prestart) //nolint:staticcheck // prestart is deprecated, not gone
		x.hooks(StageAccompany, "createRuntime", "the runtime's namespaces", h.CreateRuntime)
		x.hooks(StageAccompany, "createContainer", "the container's namespaces", h.CreateContainer)
	}
}

// raiseLimits tells of the limits that the child could not lift itself.
func (x *explainer) raiseLimits() {
	p := x.s.Process
	if p == nil {
		return
	}
	for i, r := range p.Rlimits {
		x.action(StageAccompany, "prlimit64", element("process.rlimits", i), "raise the hard limit of %s to %d where it is lower", r.Type, r.Hard).subject = "hard:" + r.Type
	}
}

func (x *explainer) hooks(stage, name, where string, hooks []specs.Hook) {
	for i, h := range hooks {
		limit := ""
		if h.Timeout != nil {
			limit = fmt.Sprintf(", for at most %d s", *h.Timeout)
		}
		args := h.Args
		if len(args) > 0 {
			args = args[1:]
		}
		x.action(stage, "clone, execve", element("hooks."+name, i), "run the hook %s in %s%s",
			strings.Join(append([]string{h.Path}, args...), " "), where, limit).subject = "hook:" + name + ":" + h.Path
	}
}

// start tells what happens from start on.
func (x *explainer) start() {
	h := x.s.Hooks
	if x.p.LoaderForks {
		path := "linux.namespaces"
		if i := slices.IndexFunc(x.s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.PIDNamespace }); i >= 0 {
			path = element(path, i)
		}
		x.action(StageProgram, "clone, setsid", path, "enter the PID namespace, and start a session there").By = "loader"
	}
	if x.p.Waits {
		x.action(StageProgram, "read", "", "wait until the runtime has written down which process it is").By = "loader"
	}
	if x.p.Hold {
		x.action(StageStart, "read", "", "wait for start").By = "loader"
	}
	if h != nil {
		x.hooks(StageStart, "startContainer", "the container's namespaces", h.StartContainer)
	}
	if n := len(x.p.Filter.Program); n > 0 {
		x.action(StageStart, fmt.Sprintf("seccomp(SET_MODE_FILTER, %d instructions)", n), "linux.seccomp", "load the seccomp filter").By = "loader"
	}
	if p := x.s.Process; p != nil && len(p.Args) > 0 {
		for i, v := range p.Env {
			name, _, _ := strings.Cut(v, "=")
			env := x.action(StageStart, "", element("process.env", i), "pass %s", v)
			env.By, env.subject = "loader", "env:"+name
		}
		x.action(StageStart, "execve", "process.args", "execute %q", p.Args).By = "loader"
	}
	if h != nil {
		x.hooks(StageStart, "poststart", "the runtime's namespaces", h.Poststart)
		x.hooks(StageStop, "poststop", "the runtime's namespaces", h.Poststop)
	}
}
