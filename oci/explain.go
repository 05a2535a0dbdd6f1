//go:build linux && (amd64 || arm64)

package oci

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/longoverlay"
	"github.com/hako-engine/hako/oci/cgroup"
	"github.com/hako-engine/hako/oci/cgroup/systemd"
	"github.com/hako-engine/hako/oci/internal/classed"
	"github.com/hako-engine/hako/oci/plan"
	"github.com/hako-engine/hako/oci/spec"
)

// Plan explains what Create would do, and does nothing. change, if not nil, is given what
// is known of this machine, and makes of it what another one is like; the directory of a
// cgroup follows from its mount point.
func (r *Runtime) Plan(id string, o CreateOptions, change func(*plan.Facts) error) (*plan.Explanation, error) {
	k, facts, err := r.facts(id, o, change)
	if err != nil {
		return nil, err
	}
	p, err := k.compileFor(id, facts)
	if err != nil {
		return nil, err
	}
	raw := k.raw
	if o.Spec != nil {
		raw = o.Raw // what was made of the specification has no lines
	}
	return plan.Explain(p, k.spec, facts, raw), nil
}

// PlanExec explains what Exec of p would do in a container made with o. rawProcess is the
// text of p, for the numbers of lines; nil: there are none. See Plan.
func (r *Runtime) PlanExec(id string, o CreateOptions, p *specs.Process, rawProcess []byte, change func(*plan.Facts) error) (*plan.Explanation, error) {
	k, facts, err := r.factsInside(id, o, change)
	if err != nil {
		return nil, err
	}
	if err := spec.ValidateProcess(p); err != nil {
		return nil, err
	}
	whole := inherit(*p, k.spec.Process)
	po := k.optionsInside(id, facts)
	if po.Filter, err = filter(k.spec); err != nil {
		return nil, err
	}
	compiled, err := plan.Exec(k.spec, &whole, facts, po)
	if err != nil {
		return nil, err
	}
	return plan.ExplainExec(compiled, k.spec, &whole, facts, rawProcess, k.raw), nil
}

// PlanHook explains how a hook runs in the namespaces of a container made with o: name is
// createContainer or startContainer, i its place in the list. See Plan.
func (r *Runtime) PlanHook(id string, o CreateOptions, name string, i int, change func(*plan.Facts) error) (*plan.Explanation, error) {
	k, facts, err := r.factsInside(id, o, change)
	if err != nil {
		return nil, err
	}
	var hooks []specs.Hook
	switch h := k.spec.Hooks; {
	case name != "createContainer" && name != "startContainer":
		return nil, classed.Errorf(errdefs.ErrInvalidArgument, "hook %q: only createContainer and startContainer hooks run in the container's namespaces", name)
	case h != nil && name == "createContainer":
		hooks = h.CreateContainer
	case h != nil:
		hooks = h.StartContainer
	}
	if i < 0 || i >= len(hooks) {
		return nil, classed.Errorf(errdefs.ErrNotFound, "hook %s[%d]: the configuration has %d of them", name, i, len(hooks))
	}
	compiled, err := plan.Hook(hooks[i], "/proc/PID/root", facts, k.optionsInside(id, facts))
	if err != nil {
		return nil, err
	}
	return plan.ExplainHook(compiled, k.spec, fmt.Sprintf("hooks.%s[%d]", name, i), hooks[i], facts, k.raw), nil
}

// factsInside are the facts for a process in a container that does not exist: every
// namespace of its configuration is another one than the runtime's.
func (r *Runtime) factsInside(id string, o CreateOptions, change func(*plan.Facts) error) (*creation, plan.Facts, error) {
	k, f, err := r.facts(id, o, change)
	if err != nil {
		return nil, f, err
	}
	f.Joined = nil
	for _, typ := range namespaceTypes {
		if slices.ContainsFunc(k.spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return string(n.Type) == typ }) {
			f.Joined = append(f.Joined, typ)
		}
	}
	return k, f, nil
}

func (k *creation) optionsInside(id string, f plan.Facts) plan.Options {
	o := plan.Options{ID: id}
	for _, h := range f.Cgroup.Hierarchies {
		if !h.V2 {
			o.Doors = append(o.Doors, h.Name)
		}
	}
	return o
}

// Facts gives what compiling the plan of a container needs to know of this machine, or of
// one that change makes of it.
func (r *Runtime) Facts(id string, o CreateOptions, change func(*plan.Facts) error) (plan.Facts, error) {
	_, f, err := r.facts(id, o, change)
	return f, err
}

func (r *Runtime) facts(id string, o CreateOptions, change func(*plan.Facts) error) (*creation, plan.Facts, error) {
	if err := CheckID(id); err != nil {
		return nil, plan.Facts{}, err
	}
	k := &creation{r: r, o: o}
	if err := k.readSpec(); err != nil {
		return nil, plan.Facts{}, err
	}
	var err error
	if k.layout, err = cgroup.Detect(); err != nil {
		return nil, plan.Facts{}, err
	}
	path := k.spec.Linux.CgroupsPath
	if r.CgroupDriver == "systemd" {
		u, err := systemd.Parse(path, id, os.Geteuid() != 0)
		if err != nil {
			return nil, plan.Facts{}, err
		}
		path = u.Path("")
	}
	if path == "" {
		path = "/" + id
	}
	k.c = &Container{r: r, state: state{ID: id, Cgroups: map[string]string{}}}
	for _, h := range k.layout.Hierarchies {
		dir := filepath.Join(h.Mount, filepath.Clean("/"+path))
		if h.V2 {
			k.c.state.Cgroups[""] = dir
			continue
		}
		for _, name := range h.Controllers {
			k.c.state.Cgroups[name] = dir
		}
	}
	f := probe(k.spec, k.o.Bundle, k.layout, k.c.state.Cgroups)
	// A creation looks only at what its configuration needs. Here it is for people, and
	// for other configurations too.
	probeLabels(&f, &specs.Process{ApparmorProfile: "any", SelinuxLabel: "any"})
	f.LayerByLayer, f.ProcOfOthers = longoverlay.LayerByLayer(), procOfOthers()
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return nil, f, fmt.Errorf("read the kernel's release: %w", err)
	}
	f.Kernel = unix.ByteSliceToString(uts.Release[:])
	if change != nil {
		if err := change(&f); err != nil {
			return nil, f, err
		}
		f.Cgroup.Locate(path)
	}
	return k, f, nil
}
