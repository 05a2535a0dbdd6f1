package engine

import (
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// mounts lays the client's mounts over the default ones.
func (in *specInput) mounts(s *specs.Spec, sec security) {
	c := in.C.Config
	shm := c.ShmSize
	if shm == 0 {
		shm = defaultShmSize
	}
	ro := "ro"
	if c.Privileged {
		ro = "rw"
	}
	cgroupRO := ro
	if sec.writableCgroups {
		cgroupRO = "rw"
	}
	defaults := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", ro}},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{cgroupRO, "nosuid", "noexec", "nodev"}},
	}
	switch {
	case c.IpcMode == "host":
		// A mount of mqueue shows the queues of the IPC namespace that it is made in, so it
		// does not matter whether the host has one mounted.
		defaults = append(defaults,
			specs.Mount{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			specs.Mount{Destination: "/dev/shm", Type: "bind", Source: "/dev/shm", Options: []string{"rbind", "rprivate"}})
	default:
		defaults = append(defaults,
			specs.Mount{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}})
		switch {
		case in.ShmPath != "":
			defaults = append(defaults, specs.Mount{Destination: "/dev/shm", Type: "bind", Source: in.ShmPath, Options: []string{"rbind", "rprivate"}})
		case c.IpcMode != "none":
			defaults = append(defaults, specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm",
				Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=" + strconv.FormatInt(shm, 10)}})
		}
	}
	var files []specs.Mount // of the network: on top of a mount of the client at /etc
	for _, f := range []struct{ dst, src string }{
		{"/etc/resolv.conf", in.ResolvConf}, {"/etc/hostname", in.HostnameFile}, {"/etc/hosts", in.HostsFile},
	} {
		if f.src != "" {
			m := specs.Mount{Destination: f.dst, Type: "bind", Source: f.src, Options: []string{"rbind", "rprivate"}}
			if in.Pod != nil && c.ReadonlyRootfs { // the containers of a pod share them
				m.Options = append(m.Options, "ro")
			}
			files = append(files, m)
		}
	}
	if in.InitBinary != "" {
		defaults = append(defaults, specs.Mount{Destination: initInContainer, Type: "bind", Source: in.InitBinary, Options: []string{"bind", "ro"}})
	}

	// A mount of the client replaces the default one at the same place. One over /dev
	// takes the mounts below it away too.
	taken := map[string]bool{}
	for _, m := range in.Mounts {
		taken[path.Clean(m.Destination)] = true
	}
	for _, m := range defaults {
		if taken[m.Destination] || taken["/dev"] && strings.HasPrefix(m.Destination, "/dev/") {
			continue
		}
		s.Mounts = append(s.Mounts, m)
	}
	// Parents before what lies in them.
	user := slices.Concat(slices.DeleteFunc(files, func(m specs.Mount) bool { return taken[m.Destination] }), in.Mounts)
	slices.SortStableFunc(user, func(a, b specs.Mount) int {
		return strings.Count(path.Clean(a.Destination), "/") - strings.Count(path.Clean(b.Destination), "/")
	})
	s.Mounts = append(s.Mounts, user...)
}

// mountFlags are what a client may ask of a bind beyond ro.
var mountFlags = []string{"noexec", "nodev", "nosuid"}

// specMaps makes the OCI form of a map.
func specMaps(maps []IDMap) []specs.LinuxIDMapping {
	var out []specs.LinuxIDMapping
	for _, m := range maps {
		out = append(out, specs.LinuxIDMapping{ContainerID: m.Container, HostID: m.Host, Size: m.Size})
	}
	return out
}

// specMount makes the OCI form of a client's mount. source is the host path of a bind
// or volume.
func specMount(m Mount, source string, h hostFacts) specs.Mount {
	out := plainMount(m, source, h)
	out.UIDMappings, out.GIDMappings = specMaps(m.UIDs), specMaps(m.GIDs)
	return out
}

func plainMount(m Mount, source string, h hostFacts) specs.Mount {
	if m.Kind == MountTmpfs {
		opts := []string{"nosuid", "nodev", "noexec"}
		for _, o := range m.Options {
			// exec, suid and dev take a default back; the last word wins.
			opts = slices.DeleteFunc(opts, func(d string) bool { return d == "no"+o })
			opts = append(opts, o)
		}
		if m.TmpfsSize > 0 {
			opts = append(opts, "size="+strconv.FormatInt(m.TmpfsSize, 10))
		}
		if m.TmpfsMode != 0 {
			opts = append(opts, fmt.Sprintf("mode=%o", m.TmpfsMode))
		}
		if m.ReadOnly {
			opts = append(opts, "ro")
		}
		return specs.Mount{Destination: path.Clean(m.Target), Type: "tmpfs", Source: "tmpfs", Options: opts}
	}
	recursive := m.Kind == MountBind && !m.NonRecursive
	opts := []string{"bind"}
	if recursive {
		opts = []string{"rbind"}
	}
	switch m.Propagation {
	case "":
		opts = append(opts, "rprivate")
	default:
		opts = append(opts, m.Propagation)
	}
	if m.ReadOnly {
		opts = append(opts, "ro")
		if recursive && !m.ReadOnlyNonRecur && h.kernelAtLeast(5, 12) {
			opts = append(opts, "rro") // mount_setattr(2)
		}
	}
	for _, o := range m.Options { // others mean nothing here, as in -v SRC:DST:z
		if slices.Contains(mountFlags, o) {
			opts = append(opts, o)
		}
	}
	return specs.Mount{Destination: path.Clean(m.Target), Type: "bind", Source: source, Options: opts}
}

// validTmpfsOption tells whether an option is one of mount(8)'s flags or of tmpfs(5).
func validTmpfsOption(name string, hasValue bool) bool {
	switch name {
	case "size", "mode", "uid", "gid", "nr_inodes", "nr_blocks", "mpol", "huge":
		return hasValue
	case "defaults", "ro", "rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "sync", "async", "dirsync", "remount",
		"mand", "nomand", "atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime", "nostrictatime",
		"bind", "rbind", "unbindable", "runbindable", "private", "rprivate", "shared", "rshared", "slave", "rslave",
		"noswap", "inode32", "inode64":
		return !hasValue
	}
	return false
}
