//go:build linux

package features

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/oci/plan"
	"github.com/hako-engine/hako/oci/seccomp"
	"github.com/hako-engine/hako/oci/spec"
)

// compile says whether a changed default configuration can be compiled.
func compile(change func(*specs.Spec)) (*plan.Plan, error) {
	s := spec.Default(true)
	s.Process.Terminal = false
	change(s)
	if err := spec.Validate(s); err != nil {
		return nil, err
	}
	return plan.Container(s, plan.Facts{LastCap: 40, SELinux: true, AppArmor: true, Sources: map[string]plan.Source{"/src": {Exists: true, Dir: true}}}, plan.Options{ID: "box", Bundle: "/b"})
}

func profile(change func(*specs.LinuxSeccomp)) error {
	p := &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdirat"}, Action: specs.ActErrno}}}
	change(p)
	_, err := seccomp.Compile(p, seccomp.Options{})
	return err
}

// TestTruth compares each list with what the packages accept: all that is listed, and
// nothing that is made up.
func TestTruth(t *testing.T) {
	f := Get("1.2.3")
	check := func(what string, list []string, accept func(string) error) {
		t.Helper()
		if len(list) == 0 {
			t.Errorf("%s: nothing is listed", what)
		}
		for _, v := range list {
			if err := accept(v); err != nil {
				t.Errorf("%s: %s is listed and refused: %v", what, v, err)
			}
		}
		if err := accept(list[0] + "_X"); err == nil {
			t.Errorf("%s: %s_X is accepted", what, list[0])
		}
		if !slices.IsSorted(list) {
			t.Errorf("%s: not sorted: %v", what, list)
		}
	}
	l := f.Linux
	check("namespaces", l.Namespaces, func(v string) error {
		_, err := compile(func(s *specs.Spec) {
			for _, n := range s.Linux.Namespaces {
				if string(n.Type) == v {
					return
				}
			}
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.LinuxNamespaceType(v)})
			if v == "user" {
				s.Linux.UIDMappings = []specs.LinuxIDMapping{{Size: 1}}
				s.Linux.GIDMappings = s.Linux.UIDMappings
			}
		})
		return err
	})
	check("seccomp actions", l.Seccomp.Actions, func(v string) error {
		return profile(func(p *specs.LinuxSeccomp) { p.Syscalls[0].Action = specs.LinuxSeccompAction(v) })
	})
	check("seccomp operators", l.Seccomp.Operators, func(v string) error {
		return profile(func(p *specs.LinuxSeccomp) {
			p.Syscalls[0].Args = []specs.LinuxSeccompArg{{Op: specs.LinuxSeccompOperator(v)}}
		})
	})
	check("seccomp architectures", l.Seccomp.Archs, func(v string) error {
		return profile(func(p *specs.LinuxSeccomp) { p.Architectures = []specs.Arch{specs.Arch(v)} })
	})
	for _, flags := range [][]string{l.Seccomp.KnownFlags, l.Seccomp.SupportedFlags} {
		check("seccomp flags", flags, func(v string) error {
			return profile(func(p *specs.LinuxSeccomp) { p.Flags = []specs.LinuxSeccompFlag{specs.LinuxSeccompFlag(v)} })
		})
	}
	check("memory policies", l.MemoryPolicy.Modes, func(v string) error {
		_, err := compile(func(s *specs.Spec) {
			s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MemoryPolicyModeType(v), Nodes: "0"}
			if v == "MPOL_DEFAULT" || v == "MPOL_LOCAL" {
				s.Linux.MemoryPolicy.Nodes = ""
			}
		})
		return err
	})
	check("memory policy flags", l.MemoryPolicy.Flags, func(v string) error {
		_, err := compile(func(s *specs.Spec) {
			s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "0", Flags: []specs.MemoryPolicyFlagType{specs.MemoryPolicyFlagType(v)}}
		})
		return err
	})
	for _, v := range l.Capabilities {
		p, err := compile(func(s *specs.Spec) { s.Process.Capabilities.Bounding = []string{v} })
		if err != nil || len(p.Warnings) != 0 {
			t.Errorf("capability %s: %v %v", v, err, p.Warnings)
		}
	}
	for name, change := range map[string]func(*specs.Spec){
		"apparmor": func(s *specs.Spec) { s.Process.ApparmorProfile = "x" },
		"selinux":  func(s *specs.Spec) { s.Process.SelinuxLabel, s.Linux.MountLabel = "x", "y" },
		"intelRdt": func(s *specs.Spec) {
			s.Linux.IntelRdt = &specs.LinuxIntelRdt{Schemata: []string{"L3:0=f"}, EnableMonitoring: true}
		},
		"idmap": func(s *specs.Spec) {
			m := []specs.LinuxIDMapping{{Size: 1}}
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/m", Source: "/src", Options: []string{"rbind", "ridmap"}, UIDMappings: m, GIDMappings: m})
		},
		"netDevices": func(s *specs.Spec) { s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"eth0": {}} },
	} {
		if p, err := compile(change); err != nil || len(p.Warnings) != 0 {
			t.Errorf("%s is listed and refused: %v", name, err)
		}
	}
	if raw, err := json.Marshal(f); err != nil || !strings.Contains(string(raw), `"ociVersionMax":"`+specs.Version+`"`) {
		t.Errorf("%s %v", raw, err)
	}
}

// TestMountOptions: what is listed is not handed to the file system, and what is not
// listed is. Those that the specification names are there.
func TestMountOptions(t *testing.T) {
	list := Get("").MountOptions
	for _, o := range append([]string{"made-up"}, list...) {
		p, err := compile(func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
			s.Linux.UIDMappings = []specs.LinuxIDMapping{{Size: 10}}
			s.Linux.GIDMappings = s.Linux.UIDMappings
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/m", Type: "tmpfs", Source: "/src", Options: []string{o}})
		})
		if err != nil {
			t.Errorf("%s: %v", o, err)
			continue
		}
		// The kernel knows these as flags of any file system.
		generic := []string{"sync", "dirsync", "mand", "lazytime"}
		handed := strings.Contains(p.Text(), `SET_FLAG, "`+o+`"`)
		if handed != (o == "made-up" || slices.Contains(generic, o)) {
			t.Errorf("%s: handed to the file system: %t", o, handed)
		}
	}
	const must = "async atime bind defaults dev diratime dirsync exec iversion lazytime loud noatime nodev nodiratime noexec noiversion nolazytime norelatime nostrictatime nosuid nosymfollow private ratime rbind rdev rdiratime relatime remount rexec rnoatime rnodiratime rnoexec rnorelatime rnostrictatime rnosuid rnosymfollow ro rprivate rrelatime rro rrw rshared rslave rstrictatime rsuid rsymfollow runbindable rw shared silent slave strictatime suid symfollow sync tmpcopyup unbindable idmap ridmap mand nomand"
	for _, o := range strings.Fields(must) {
		if !slices.Contains(list, o) {
			t.Errorf("the specification's option %s is not listed", o)
		}
	}
}
