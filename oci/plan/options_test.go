//go:build linux

package plan

import (
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// FuzzMountOptions: whatever a mount asks for, the plan of it is sound or there is none.
func FuzzMountOptions(f *testing.F) {
	f.Add("/data", "bind", "/src", "rbind,ro,rnosuid,norelatime,rshared,nosymfollow", false)
	f.Add("a/../b", "tmpfs", "tmpfs", "mode=755,size=1m,tmpcopyup,uid=3,lazytime,private", true)
	f.Add("/proc/cpuinfo", "", "/x", "bind,remount,unbindable,", false)
	f.Add("/dev/pts", "devpts", "", "newinstance,gid=5,idmap,rro,rrw", true)
	f.Add("/o", "overlay", "overlay", "lowerdir=/a\\:b:/c,upperdir=/u,workdir=/w", false)
	f.Fuzz(func(t *testing.T, dest, typ, source, options string, userns bool) {
		m := specs.Mount{Destination: dest, Type: typ, Source: source, Options: strings.Split(options, ",")}
		p, err := parseMount(m)
		if err != nil {
			return
		}
		if !strings.HasPrefix(p.dest, "/") || strings.Contains(p.dest, "/../") {
			t.Errorf("destination %q", p.dest)
		}
		// A way to count accesses is set in place of all the others.
		if p.set&p.clr&^unix.MOUNT_ATTR__ATIME != 0 || p.recSet&p.recClr&^unix.MOUNT_ATTR__ATIME != 0 {
			t.Errorf("%q sets and clears the same: %#x %#x, %#x %#x", options, p.set, p.clr, p.recSet, p.recClr)
		}
		known := MountOptions()
		for _, d := range p.data {
			if flag, _ := superblock.find(d); slices.Contains(known, d) && flag != d {
				t.Errorf("%q is handed to the file system", d)
			}
		}
		s := base(userns)
		if userns {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
			s.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: 1000, Size: 1000}}
			s.Linux.GIDMappings = s.Linux.UIDMappings
		}
		s.Mounts = slices.Insert(s.Mounts, len(s.Mounts)/2, m)
		for _, facts := range []Facts{hybrid(), unified()} {
			if p, err := Container(s, facts, Options{ID: "box", Bundle: "/b", Root: []Mount{{Type: typ, Source: source, Options: m.Options}}}); err == nil {
				sound(t, p)
			}
		}
		_ = Layers(m.Options)
	})
}
