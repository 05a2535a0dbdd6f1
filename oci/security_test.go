//go:build linux && (amd64 || arm64)

package oci

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// canary makes a directory on the host that no container may touch, and checks it.
func canary(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "ptmx"), []byte("keep"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 1 {
			t.Errorf("the canary directory was touched: %v %v", entries, err)
		}
		if b, err := os.ReadFile(filepath.Join(dir, "ptmx")); err != nil || string(b) != "keep" {
			t.Errorf("the canary was touched: %q %v", b, err)
		}
	})
	return dir
}

func withoutMount(b *box, dest string) {
	b.spec.Mounts = slices.DeleteFunc(b.spec.Mounts, func(m specs.Mount) bool { return m.Destination == dest })
}

// CVE-2026-41579: the image's /dev leads to the host.
func TestDevIsALinkToTheHost(t *testing.T) {
	t.Parallel()
	for _, mounted := range []bool{true, false} {
		b := newBox(t)
		b.symlink(canary(t), "/dev")
		if !mounted {
			b.spec.Mounts = slices.DeleteFunc(b.spec.Mounts, func(m specs.Mount) bool { return strings.HasPrefix(m.Destination, "/dev") })
		}
		if _, _, err := b.tryRun("true"); err == nil {
			t.Error("started with a dangling /dev")
		}
	}
}

// CVE-2025-52565, CVE-2026-88264: the image's /dev/console leads to the host.
func TestConsoleIsALink(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	dir := canary(t)
	b.spec.Mounts = slices.DeleteFunc(b.spec.Mounts, func(m specs.Mount) bool {
		return strings.HasPrefix(m.Destination, "/dev") && m.Destination != "/dev/pts"
	})
	b.symlink(filepath.Join(dir, "new"), "/dev/console")
	b.spec.Process.Terminal = true
	b.args("true")
	if c, err := b.rt.Run(t.Context(), b.id, CreateOptions{Bundle: b.bundle, Spec: b.spec}); err == nil {
		t.Error("started with a link as /dev/console")
		c.Delete(context.Background(), true)
	}
}

// CVE-2025-31133: the image's /dev/null is not the null device.
func TestMaskSourceIsNotTheImages(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	withoutMount(b, "/dev")
	b.symlink("/proc/sys/kernel/hostname", "/dev/null")
	b.spec.Mounts = slices.DeleteFunc(b.spec.Mounts, func(m specs.Mount) bool { return strings.HasPrefix(m.Destination, "/dev") })
	b.spec.Linux.MaskedPaths = []string{"/proc/interrupts"}
	if _, _, err := b.tryRun("true"); err == nil || !strings.Contains(err.Error(), "make /dev/null: something else has that name in the image") {
		t.Errorf("a link as /dev/null: %v", err)
	}
	b.symlink("null", "/dev/zero")
	if err := os.Remove(filepath.Join(b.rootfs, "dev/null")); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(b.rootfs, "dev/zero")); err != nil {
		t.Fatal(err)
	}
	out, _ := b.run("stat", "/proc/interrupts", "write", "/proc/interrupts", "owned", "size", "/proc/interrupts")
	if got, want := lines(out), []string{"20666 1:3 0:0", "written", "0"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// CVE-2019-16884 and others: something that is not procfs at /proc.
func TestForgedProc(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(b *box){
		"link":     func(b *box) { b.symlink("/tmp", "/proc") },
		"sys link": func(b *box) { b.symlink("/tmp", "/sys") },
		"volume":   func(b *box) { b.spec.Mounts[0] = specs.Mount{Destination: "/proc", Type: "bind", Source: t.TempDir()} },
		"tmpfs":    func(b *box) { b.spec.Mounts[0] = specs.Mount{Destination: "/proc", Type: "tmpfs", Source: "tmpfs"} },
		"attr": func(b *box) {
			b.spec.Mounts = append(b.spec.Mounts, specs.Mount{Destination: "/proc/self/attr", Type: "tmpfs", Source: "t"})
		},
		"sys": func(b *box) {
			b.spec.Mounts = append(b.spec.Mounts, specs.Mount{Destination: "/proc/sys", Type: "bind", Source: t.TempDir()})
		},
		"link to it": func(b *box) {
			b.symlink("/proc/sys", "/way")
			b.spec.Mounts = append(b.spec.Mounts, specs.Mount{Destination: "/way", Type: "tmpfs", Source: "t"})
		},
	} {
		b := newBox(t)
		change(b)
		if _, _, err := b.tryRun("true"); err == nil {
			t.Errorf("%s: started", name)
		}
	}
}

// CVE-2024-21626: a working directory that leads out of the container.
func TestWorkingDirectoryThroughDescriptors(t *testing.T) {
	t.Parallel()
	held, err := os.Open("/")
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	b := newBox(t)
	c, _ := b.start("sleep", "3600")
	for fd := 3; fd <= 40; fd++ {
		cwd := fmt.Sprintf("/proc/self/fd/%d", fd)
		if _, _, err := b.exec(c, func(p *specs.Process) { p.Cwd = cwd }, "cwd"); err == nil {
			t.Errorf("exec in %s worked", cwd)
		}
		if fd%6 != 0 {
			continue
		}
		o := newBox(t)
		o.spec.Process.Cwd = cwd
		if _, _, err := o.tryRun("cwd"); err == nil {
			t.Errorf("run in %s worked", cwd)
		}
		o.symlink(cwd, "/way")
		o.spec.Process.Cwd = "/way/sub"
		if _, _, err := o.tryRun("cwd"); err == nil {
			t.Errorf("run in a link to %s worked", cwd)
		}
	}
}

// CVE-2019-5736: the container gets hold of the runtime's binary. CVE-2016-9962: it looks
// into a process that is entering. The container may trace everything it sees.
func TestContainerCannotReachTheRuntime(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	sum := func() [32]byte {
		b, err := os.ReadFile(self)
		if err != nil {
			t.Fatal(err)
		}
		return sha256.Sum256(b)
	}
	before := sum()
	b := newBox(t)
	b.write("/bin/script", "#!/proc/self/exe\n", 0o755)
	b.symlink("/proc/self/exe", "/bin/link")
	caps := []string{"CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE", "CAP_SYS_ADMIN"}
	b.spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Permitted: caps, Effective: caps}
	c, o := b.start("peek", "/stop")
	for i := range 120 {
		args := []string{"/bin/guest", "true"}
		switch i % 4 {
		case 1:
			args = []string{"/bin/script"}
		case 2:
			args = []string{"/bin/link"}
		case 3:
			args = []string{"/proc/self/exe"}
		}
		_, _, err := b.exec(c, func(p *specs.Process) { p.Args = args })
		if i%4 == 0 && err != nil {
			t.Fatal(err)
		}
	}
	b.write("/stop", "", 0o644)
	reap(t, c.Pid())
	if got := lines(o.end()); len(got) != 1 || got[0] != "peeked true leaks 0" {
		t.Errorf("%q", got)
	}
	if sum() != before {
		t.Error("the runtime's binary was changed")
	}
}

// CVE-2021-43784: lengths that a 16 bit field cannot hold.
func TestHugeConfigurations(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	l := b.spec.Linux
	l.Namespaces = append(l.Namespaces, specs.LinuxNamespace{Type: "user"})
	for i := range uint32(5000) {
		l.UIDMappings = append(l.UIDMappings, specs.LinuxIDMapping{ContainerID: i, HostID: 100000 + i, Size: 1})
	}
	l.GIDMappings = l.UIDMappings[:1]
	if _, _, err := b.tryRun("true"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("5000 maps: %v", err)
	}
	b = newBox(t)
	for i := range b.spec.Linux.Namespaces {
		if b.spec.Linux.Namespaces[i].Type == "network" {
			b.spec.Linux.Namespaces[i].Path = "/" + strings.Repeat("x", 70000)
		}
	}
	if _, _, err := b.tryRun("true"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a path of 70000 bytes: %v", err)
	}
}

func TestSysctlsOfTheHostAreRefused(t *testing.T) {
	t.Parallel()
	for _, kv := range [][2]string{
		{"kernel.core_pattern", "x"}, {"kernel.shm_rmid_forced", "1\nkernel.core_pattern=x"}, {"net/../kernel/core_pattern", "x"}, {"vm.swappiness", "1"},
		{"kernel.shm_rmid_forced=1 kernel.core_pattern", "x"}, {"net.ipv4.conf.all/../../../../kernel.core_pattern", "x"}, {"net..x", "1"},
	} {
		b := newBox(t)
		b.spec.Linux.Sysctl = map[string]string{kv[0]: kv[1]}
		if _, _, err := b.tryRun("true"); err == nil {
			t.Errorf("%q=%q passed", kv[0], kv[1])
		}
	}
	b := newBox(t)
	b.spec.Linux.Namespaces = slices.DeleteFunc(b.spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == "network" })
	b.spec.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1"}
	if _, _, err := b.tryRun("true"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a sysctl of the host's network: %v", err)
	}
}

// ownUserNamespace gives the box a user namespace of its own, and the image to its root.
func ownUserNamespace(b *box) {
	b.t.Helper()
	l := b.spec.Linux
	l.Namespaces = append(l.Namespaces, specs.LinuxNamespace{Type: "user"})
	l.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 200000, Size: 65536}}
	l.GIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 300000, Size: 65536}}
	if err := unix.Chmod(b.bundle, 0o700); err != nil {
		b.t.Fatal(err)
	}
	for _, d := range []string{"", "proc", "sys", "dev", "tmp", "bin", "etc"} {
		if err := os.Chown(filepath.Join(b.rootfs, d), 200000, 300000); err != nil {
			b.t.Fatal(err)
		}
	}
}

func TestUserNamespace(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	ownUserNamespace(b)
	out, code := b.run("id", "cat", "/proc/self/uid_map", "stat", "/dev/null", "stat", "/dev", "stat", "/dev/shm", "write", "/dev/null", "x",
		"write", "/dev/shm/f", "x", "mkdir", "/dev/new", "stat", "/", "hostname", "create", "/tmp/mine", "open", "/proc/sysrq-trigger")
	if code != 0 {
		t.Errorf("exit code %d", code)
	}
	want := []string{"0 0 []", "0     200000      65536", "20666 1:3 0:0", "40755 0:0 0:0", "41777 0:0 0:0", "written", "written", "made", "40755 0:0 0:0", "hako", "created"}
	got := lines(out)
	if len(got) > 1 {
		got[1] = strings.TrimSpace(got[1])
	}
	if len(got) < len(want) || !slices.Equal(got[:len(want)], want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(b.rootfs, "tmp/mine"), &st); err != nil || st.Uid != 200000 || st.Gid != 300000 {
		t.Errorf("on the host the file belongs to %d:%d (%v)", st.Uid, st.Gid, err)
	}
	// And exec joins it.
	b = newBox(t)
	ownUserNamespace(b)
	c, _ := b.start("sleep", "3600")
	out, _, err := b.exec(c, func(p *specs.Process) { p.User.UID = 12 }, "id", "cat", "/proc/self/uid_map")
	if err != nil || !strings.HasPrefix(out, "12 0 []\n") || !strings.Contains(out, "200000") {
		t.Errorf("exec: %q %v", out, err)
	}
}

// The program does not run before it is written down which process it is, also where only
// its clone in a PID namespace that is joined executes it: else a runtime that is killed in
// between leaves a container that nobody knows.
func TestStateIsThereBeforeTheProgram(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c, _ := b.start("sleep", "3600")
	for _, path := range []string{"", fmt.Sprintf("/proc/%d/ns/pid", c.Pid())} {
		o := newBox(t)
		if err := os.MkdirAll(o.rt.Root, 0o711); err != nil {
			t.Fatal(err)
		}
		o.spec.Mounts = append(o.spec.Mounts, specs.Mount{Destination: "/state", Type: "bind", Source: o.rt.Root, Options: []string{"bind"}})
		i := slices.IndexFunc(o.spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.PIDNamespace })
		o.spec.Linux.Namespaces = slices.Clone(o.spec.Linux.Namespaces)
		o.spec.Linux.Namespaces[i].Path = path
		if out, _ := o.run("cat", "/state/"+o.id+"/state.json"); !strings.Contains(out, `"id":"`+o.id+`"`) {
			t.Errorf("PID namespace %q: no state: %q", path, out)
		}
	}
}

func TestJoinedNamespaces(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c, _ := b.start("sleep", "3600")
	for _, types := range [][]string{{"network", "ipc", "uts"}, {"pid"}, {"network", "ipc", "uts", "pid"}} {
		o := newBox(t)
		o.spec.Hostname = ""
		o.spec.Linux.Namespaces = slices.Clone(o.spec.Linux.Namespaces)
		for i, n := range o.spec.Linux.Namespaces {
			if slices.Contains(types, string(n.Type)) {
				o.spec.Linux.Namespaces[i].Path = fmt.Sprintf("/proc/%d/ns/%s", c.Pid(), namespaceFile(string(n.Type)))
			}
		}
		out, code := o.run("hostname", "pid", "ls", "/proc/1/task", "exit", "6")
		if code != 6 {
			t.Errorf("%v: exit code %d: %s", types, code, out)
		}
		got := lines(out)
		if slices.Contains(types, "pid") && (len(got) < 2 || got[1] == "1") || slices.Contains(types, "uts") && got[0] != "hako" {
			t.Errorf("%v: %q", types, got)
		}
	}
}

// census counts what a container could leave behind on the host.
func census(t *testing.T, bundle string) map[string]int {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return map[string]int{"mounts": strings.Count(string(mounts), bundle), "fds": len(fds)}
}

// Not parallel: it counts what the whole process holds.
func TestManyRunsLeaveNothing(t *testing.T) {
	b := newBox(t)
	b.run("true")
	before := census(t, b.bundle)
	start := time.Now()
	runs := 200
	if testing.Short() { // as in the VM, where a run takes a second
		runs = 20
	}
	for i := range runs {
		if _, code := b.run("exit", fmt.Sprint(i%100)); code != i%100 {
			t.Fatalf("run %d ended with %d", i, code)
		}
	}
	t.Logf("%d runs in %v", runs, time.Since(start))
	if after := census(t, b.bundle); after["mounts"] != before["mounts"] || after["fds"] > before["fds"]+2 {
		t.Errorf("before %v, after %v", before, after)
	}
	if left, err := os.ReadDir(b.rt.Root); err != nil || len(left) > 0 {
		t.Errorf("state directory: %v %v", left, err)
	}
	hierarchies, _ := filepath.Glob("/sys/fs/cgroup/*/" + b.id)
	if len(hierarchies) > 0 {
		t.Errorf("cgroups left: %v", hierarchies)
	}
	var ws unix.WaitStatus
	if pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil); err == nil && pid > 0 {
		t.Errorf("child %d was not reaped", pid)
	}
}

// A pod with a user namespace: its containers join that, and the network which belongs to
// it or to the host; what is new belongs to the user namespace.
func TestJoinedUserNamespace(t *testing.T) {
	t.Parallel()
	maps := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 200000, Size: 65536}}
	mapped := func() *box {
		b := newBox(t)
		b.spec.Linux.UIDMappings, b.spec.Linux.GIDMappings = maps, maps
		b.spec.Linux.Namespaces = append(slices.Clone(b.spec.Linux.Namespaces), specs.LinuxNamespace{Type: "user"})
		if err := os.Chmod(b.bundle, 0o711); err != nil {
			t.Fatal(err)
		}
		return b
	}
	first := mapped()
	pod, _ := first.start("sleep", "3600")
	plain := newBox(t)
	host, _ := plain.start("sleep", "3600")
	for _, tt := range []struct {
		name    string
		network *Container // nil: a new one
		also    []string   // joined, of the pod
	}{
		{name: "the user namespace alone"},
		{"the pod's network", pod, []string{"ipc", "uts"}},
		{"a network of the host", host, nil},
		{"all but the mounts", pod, []string{"ipc", "uts", "pid"}},
	} {
		b := mapped()
		for i, n := range b.spec.Linux.Namespaces {
			path := ""
			switch {
			case n.Type == "network" && tt.network != nil:
				path = fmt.Sprintf("/proc/%d/ns/net", tt.network.Pid())
			case n.Type == "user" || slices.Contains(tt.also, string(n.Type)):
				path = fmt.Sprintf("/proc/%d/ns/%s", pod.Pid(), n.Type)
			}
			b.spec.Linux.Namespaces[i].Path = path
		}
		if slices.Contains(tt.also, "uts") {
			b.spec.Hostname = ""
		}
		out, code := b.run("id", "readlink", "/proc/self/ns/user", "mkdir", "/dev/shm/x")
		want, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/user", pod.Pid()))
		if got := lines(out); err != nil || code != 0 || !slices.Equal(got, []string{"0 0 []", want, "made"}) {
			t.Errorf("%s: %q, exit code %d (%v)", tt.name, got, code, err)
		}
	}
}
