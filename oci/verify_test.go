//go:build linux && (amd64 || arm64)

package oci

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// TestVerifyRestored: what verify finds in a container that was made of its own
// configuration is what it allows, and every process that is more than another
// configuration is found. Restored processes are looked at in the same way, but CRIU
// makes them only in the virtual machine (test/vm).
func TestVerifyRestored(t *testing.T) {
	t.Parallel()
	type change = func(*box)
	check := func(t *testing.T, made, wanted change) error {
		b := newBox(t)
		for _, d := range []string{"data", "more"} {
			if err := os.MkdirAll(filepath.Join(b.bundle, d), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if made != nil {
			made(b)
		}
		c, _ := b.start("sleep", "3600")
		clone := newBox(t)
		clone.bundle, clone.rootfs = b.bundle, b.rootfs
		if wanted != nil {
			wanted(clone)
		}
		return allowed{spec: clone.spec, bundle: b.bundle, cgroups: c.CgroupPaths(), member: c.Pid()}.verify(c.Pid())
	}
	bind := func(b *box, source string, options ...string) {
		b.spec.Mounts = append(b.spec.Mounts, specs.Mount{Destination: "/data", Source: filepath.Join(b.bundle, source), Options: append([]string{"rbind"}, options...)})
	}
	user := func(b *box) {
		b.spec.Process.User = specs.User{UID: 1000, GID: 1000}
		b.spec.Process.Capabilities = &specs.LinuxCapabilities{}
	}
	filter := func(b *box) {
		b.spec.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"swapon"}, Action: specs.ActErrno}}}
	}
	limit := func(hard uint64) change {
		return func(b *box) {
			b.spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_CORE", Hard: hard}}
		}
	}
	onHostNetwork := func(b *box) {
		b.spec.Linux.Namespaces = slices.DeleteFunc(b.spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.NetworkNamespace })
	}
	for name, f := range map[string]change{
		"default": nil, "user": user, "filter": filter, "limit": limit(5),
		"bind":      func(b *box) { bind(b, "data", "ro", "nosuid") },
		"user ns":   (*box).inUserns,
		"read-only": func(b *box) { b.spec.Root.Readonly = true },
		"a bind file": func(b *box) {
			b.spec.Mounts = append(b.spec.Mounts, specs.Mount{Destination: "/etc/h", Source: "/etc/hostname", Options: []string{"bind", "ro"}})
		},
		"host's net": onHostNetwork,
	} {
		t.Run("same "+name, func(t *testing.T) {
			if err := check(t, f, f); err != nil {
				t.Error(err)
			}
		})
	}
	for name, k := range map[string]struct {
		made, wanted change
		text         string
	}{
		"capabilities": {nil, func(b *box) { b.spec.Process.Capabilities.Bounding = []string{"CAP_KILL"} }, "has capabilities"},
		"no filter":    {nil, filter, "has no seccomp filter"},
		"no new privileges": {func(b *box) { b.spec.Process.NoNewPrivileges = false }, nil,
			"has no no_new_privs"},
		"the user": {func(b *box) { user(b); b.spec.Process.User.UID = 0 }, user, "runs as uid 0"},
		"a limit":  {limit(9), limit(5), "hard resource limit"},
		"a mount":  {func(b *box) { bind(b, "data") }, nil, "is mounted"},
		"another directory": {func(b *box) { bind(b, "more") }, func(b *box) { bind(b, "data") },
			"it is not "},
		"writable":          {func(b *box) { bind(b, "data") }, func(b *box) { bind(b, "data", "ro") }, "it is not ro"},
		"a mount is gone":   {nil, func(b *box) { bind(b, "data") }, "mount /data"},
		"root is writable":  {nil, func(b *box) { b.spec.Root.Readonly = true }, "not read-only"},
		"nothing is masked": {func(b *box) { b.spec.Linux.MaskedPaths = nil }, nil, "is not masked"},
		"all is writable":   {func(b *box) { b.spec.Linux.ReadonlyPaths = nil }, nil, "is not read-only"},
		"writable cgroups": {func(b *box) {
			for i, m := range b.spec.Mounts {
				if m.Type == "cgroup" {
					b.spec.Mounts[i].Options = []string{"nosuid", "noexec", "nodev"}
				}
			}
		}, nil, "it is not ro"},
		"no user namespace":  {nil, (*box).inUserns, "user namespace is the host's"},
		"the host's network": {onHostNetwork, nil, "network namespace is the host's"},
		"other maps": {func(b *box) {
			b.inUserns()
			b.spec.Linux.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 0, Size: 65536}}
		}, (*box).inUserns, "uid_map"},
	} {
		t.Run("more "+name, func(t *testing.T) {
			if err := check(t, k.made, k.wanted); err == nil || !strings.Contains(err.Error(), k.text) {
				t.Errorf("got %v, want %q", err, k.text)
			}
		})
	}
	t.Run("another cgroup", func(t *testing.T) {
		a, b := newBox(t), newBox(t)
		c, _ := a.start("sleep", "3600")
		d, _ := b.start("sleep", "3600")
		may := allowed{spec: a.spec, bundle: a.bundle, cgroups: c.CgroupPaths(), member: d.Pid()}
		if err := may.verify(c.Pid()); err == nil || !strings.Contains(err.Error(), "is in the cgroup") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("another cgroup's directory", func(t *testing.T) {
		a, b := newBox(t), newBox(t)
		c, _ := a.start("sleep", "3600")
		d, _ := b.start("sleep", "3600")
		may := allowed{spec: a.spec, bundle: a.bundle, cgroups: d.CgroupPaths(), member: c.Pid()}
		if err := may.verify(c.Pid()); err == nil || !strings.Contains(err.Error(), "it is not the container's cgroup") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("another root", func(t *testing.T) {
		b := newBox(t)
		c, _ := b.start("sleep", "3600")
		for dir, good := range map[string]bool{b.rootfs: true, b.bundle: false} {
			var st unix.Stat_t
			if err := unix.Stat(dir, &st); err != nil {
				t.Fatal(err)
			}
			may := allowed{spec: b.spec, bundle: b.bundle, root: &st, cgroups: c.CgroupPaths(), member: c.Pid()}
			if err := may.verify(c.Pid()); (err == nil) != good {
				t.Errorf("%s: %v", dir, err)
			}
		}
	})
	t.Run("a child with namespaces of its own", func(t *testing.T) {
		b := newBox(t)
		c, _ := b.start("sleep", "3600")
		if err := sameNamespaces(c.Pid(), os.Getpid()); err == nil {
			t.Error("the namespaces of the test are taken for the container's")
		}
	})
}

// TestParseMountinfo: names are unescaped, optional fields skipped.
func TestParseMountinfo(t *testing.T) {
	got, err := parseMountinfo("36 35 98:0 /mnt1 /mnt\\0402 rw,noatime shared:2 master:1 - ext3 /dev/root rw\n7 6 0:4 / / rw - proc proc rw\n")
	if err != nil || len(got) != 2 || got[0] != (mountEntry{36, 35, "98:0", "/mnt1", "/mnt 2", "ext3"}) || got[1].fstype != "proc" {
		t.Errorf("%v %v", got, err)
	}
	for _, bad := range []string{"x\n", "36 35 98:0 / / rw\n", "a b c d e f - g h i\n"} {
		if _, err := parseMountinfo(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}
