//go:build linux && (amd64 || arm64)

package oci

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/cgroup"
)

func TestRunSeesWhatTheConfigurationSays(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	p := b.spec.Process
	p.User = specs.User{UID: 1000, GID: 2000, AdditionalGids: []uint32{2000, 3000}}
	umask := uint32(0o077)
	p.User.Umask = &umask
	p.Cwd = "/work/here"
	p.Env = append(p.Env, "GREETING=hello")
	p.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 100, Hard: 200}, {Type: "RLIMIT_MSGQUEUE", Soft: 100, Hard: 200}, {Type: "RLIMIT_CORE", Soft: 0, Hard: 0}}
	b.spec.Hostname, b.spec.Domainname = "box", "example.org"
	b.spec.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1", "kernel.msgmax": "4096"}
	out, code := b.run("id", "umask", "cwd", "env", "GREETING", "rlimit", "12", "hostname", "cat", "/proc/sys/kernel/domainname",
		"cat", "/proc/sys/net/ipv4/ip_forward", "cat", "/proc/sys/kernel/msgmax", "pid", "fds", "status", "NoNewPrivs", "status", "CapEff",
		"status", "CapBnd", "status", "CapInh", "status", "CapAmb", "status", "SigBlk", "readlink", "/proc/self/exe", "exit", "42")
	want := []string{"1000 2000 [2000 3000]", "0077", "/work/here", "hello", "100 200", "box", "example.org", "1", "4096", "1", "0 1 2", "1",
		"0000000000000000", "0000000020000420", "0000000000000000", "0000000000000000", "0000000000000000", "/bin/guest"}
	if got := lines(out); !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if code != 42 {
		t.Errorf("exit code %d", code)
	}
}

func TestDevices(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	mode, uid := os.FileMode(0o640), uint32(7)
	b.spec.Linux.Devices = []specs.LinuxDevice{
		{Path: "/dev/net/tun", Type: "c", Major: 10, Minor: 200, FileMode: &mode},
		{Path: "/dev/pipe", Type: "p"}, {Path: "/other/zero", Type: "c", Major: 1, Minor: 5, UID: &uid},
	}
	out, _ := b.run("ls", "/dev", "stat", "/dev/null", "stat", "/dev/net/tun", "stat", "/dev/pipe", "stat", "/other/zero", "readlink", "/dev/ptmx",
		"readlink", "/dev/stdin", "write", "/dev/null", "x", "open", "/dev/net/tun", "size", "/dev/null", "ls", "/dev/pts")
	want := []string{
		"fd full mqueue net null pipe ptmx pts random shm stderr stdin stdout tty urandom zero",
		"20666 1:3 0:0", "20640 10:200 0:0", "10666 0:0 0:0", "20666 1:5 7:0", "pts/ptmx", "/proc/self/fd/0", "written",
		"error: open /dev/net/tun: operation not permitted", "0", "ptmx",
	}
	if got := lines(out); !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestMounts(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	src := t.TempDir()
	if err := os.MkdirAll(filepath.Join(src, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(src, "file"), []byte("from the host"), 0o644); err != nil {
		t.Fatal(err)
	}
	b.write("/filled/deep/data", "image data", 0o600)
	b.symlink("/filled", "/link")
	b.spec.Mounts = append(b.spec.Mounts,
		specs.Mount{Destination: "/missing/dir", Type: "bind", Source: src, Options: []string{"rbind", "ro", "nosuid"}},
		specs.Mount{Destination: "/missing/file", Source: filepath.Join(src, "file"), Options: []string{"bind"}},
		specs.Mount{Destination: "/filled", Type: "tmpfs", Source: "tmpfs", Options: []string{"tmpcopyup", "size=1m"}},
		specs.Mount{Destination: "relative", Type: "tmpfs", Source: "tmpfs", Options: []string{"ro", "mode=700"}},
		specs.Mount{Destination: "/relative/inner", Type: "tmpfs", Source: "tmpfs", Options: []string{"noexec"}},
		specs.Mount{Destination: "/link/deep/inner", Type: "tmpfs", Source: "tmpfs"},
		specs.Mount{Destination: "/dev/shm/x/y", Type: "tmpfs", Source: "tmpfs"},
		specs.Mount{Destination: "/rro", Source: src, Options: []string{"rbind", "rro", "rprivate"}},
	)
	b.spec.Root.Readonly = true
	out, _ := b.run("cat", "/missing/dir/file", "write", "/missing/dir/file", "x", "cat", "/missing/file", "cat", "/filled/deep/data",
		"stat", "/filled/deep/data", "write", "/filled/new", "x", "write", "/relative/new", "x", "write", "/relative/inner/new", "x",
		"write", "/link/deep/inner/new", "x", "write", "/rro/new", "x", "write", "/root", "x", "mounts")
	got := lines(out)
	want := []string{
		"from the host", "error: open /missing/dir/file: read-only file system", "from the host", "image data", "100600 0:0 0:0", "written",
		"error: open /relative/new: read-only file system", "written", "written", "error: open /rro/new: read-only file system",
		"error: open /root: read-only file system",
	}
	if len(got) < len(want) || !slices.Equal(got[:len(want)], want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	table := strings.Join(got, "\n")
	for _, m := range []string{"/missing/dir ro,nosuid", "/relative ro", "/relative/inner rw,noexec", "/filled/deep/inner rw", "/dev/shm/x/y rw", "/sys/fs/cgroup ro"} {
		if !strings.Contains(table, " "+m) {
			t.Errorf("no mount %q in\n%s", m, table)
		}
	}
	if b, err := os.ReadFile(filepath.Join(b.rootfs, "filled/deep/data")); err != nil || string(b) != "image data" {
		t.Errorf("the image was changed: %q %v", b, err)
	}
	host, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(host), b.bundle) {
		t.Errorf("the host sees mounts of the container: %v", err)
	}
}

// A tmpfs without a mode has that of the directory that it covers; one that covers nothing, the
// kernel's.
func TestModeOfTmpfs(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*box){"": func(*box) {}, "with a user namespace": ownUserNamespace} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBox(t)
			change(b)
			dir := filepath.Join(b.rootfs, "private")
			if err := errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, 0o750), os.Mkdir(filepath.Join(b.rootfs, "other"), 0o711)); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink("/private", filepath.Join(b.rootfs, "away")); err != nil {
				t.Fatal(err)
			}
			for _, m := range []specs.Mount{
				{Destination: "/private", Options: []string{"ro"}}, {Destination: "/away/new"}, {Destination: "/other", Options: []string{"mode=700"}}, {Destination: "/new"},
			} {
				m.Type, m.Source = "tmpfs", "tmpfs"
				b.spec.Mounts = append(b.spec.Mounts, m)
			}
			out, _ := b.run("stat", "/private", "stat", "/other", "stat", "/new", "stat", "/away/new")
			if got, want := lines(out), []string{"40750 0:0 0:0", "40700 0:0 0:0", "41777 0:0 0:0", "41777 0:0 0:0"}; !slices.Equal(got, want) {
				t.Errorf("%q, want %q", got, want)
			}
		})
	}
}

// A device may be given twice.
func TestDeviceGivenTwice(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	for _, d := range []string{"/dev/twice", "/elsewhere/twice"} {
		one := specs.LinuxDevice{Path: d, Type: "c", Major: 1, Minor: 3}
		b.spec.Linux.Devices = append(b.spec.Linux.Devices, one, one)
	}
	if out, _ := b.run("stat", "/dev/twice", "stat", "/elsewhere/twice"); !slices.Equal(lines(out), []string{"20666 1:3 0:0", "20666 1:3 0:0"}) {
		t.Error(out)
	}
}

func TestMaskedAndReadonlyPaths(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	b.spec.Linux.MaskedPaths = append(b.spec.Linux.MaskedPaths, "/etc/secret", "/secrets", "/no/such", "/etc/secret/below")
	b.spec.Linux.ReadonlyPaths = append(b.spec.Linux.ReadonlyPaths, "/tmp", "/no/such")
	b.write("/etc/secret", "x", 0o644)
	b.write("/secrets/a", "x", 0o644)
	out, _ := b.run("size", "/etc/secret", "stat", "/etc/secret", "ls", "/secrets", "write", "/secrets/new", "x", "write", "/tmp/new", "x",
		"size", "/proc/keys", "ls", "/sys/firmware", "write", "/proc/sys/kernel/msgmax", "1", "write", "/etc/new", "x")
	want := []string{"0", "20666 1:3 0:0", "", "error: open /secrets/new: read-only file system", "error: open /tmp/new: read-only file system",
		"0", "", "error: open /proc/sys/kernel/msgmax: read-only file system", "written"}
	if got := lines(out); !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestLimitsAreSeen(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	mem, pids, shares := int64(64<<20), int64(30), uint64(512)
	b.spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &mem}
	b.spec.Linux.Resources.Pids = &specs.LinuxPids{Limit: &pids}
	b.spec.Linux.Resources.CPU = &specs.LinuxCPU{Shares: &shares}
	if CgroupV2() {
		out, _ := b.run("cat", "/sys/fs/cgroup/memory.max", "cat", "/sys/fs/cgroup/pids.max")
		if want := []string{"67108864", "30"}; !slices.Equal(lines(out), want) {
			t.Errorf("got %q, want %q", lines(out), want)
		}
		return
	}
	out, _ := b.run("cat", "/sys/fs/cgroup/memory/memory.limit_in_bytes", "cat", "/sys/fs/cgroup/pids/pids.max", "cat", "/sys/fs/cgroup/cpu/cpu.shares",
		"mkdir", "/sys/fs/cgroup/memory/x", "open", "/dev/kmsg")
	want := []string{"67108864", "30", "512", "error: mkdir /sys/fs/cgroup/memory/x: read-only file system", "error: open /dev/kmsg: no such file or directory"}
	if got := lines(out); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	_, code := b.run("alloc", "200")
	if code != 128+9 {
		t.Errorf("a process above its memory limit ended with %d", code)
	}
}

func TestCgroupNamespace(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	if !slices.ContainsFunc(b.spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == "cgroup" }) {
		b.spec.Linux.Namespaces = append(b.spec.Linux.Namespaces, specs.LinuxNamespace{Type: "cgroup"})
	}
	out, _ := b.run("cat", "/proc/self/cgroup", "mounts")
	for _, l := range lines(out) {
		if f := strings.SplitN(l, ":", 3); len(f) == 3 && f[2] != "/" {
			t.Errorf("the container sees where its cgroup is: %s", l)
		}
		if strings.Contains(l, " /sys/fs/cgroup/memory ") && !strings.HasPrefix(l, "/ ") {
			t.Errorf("mount shows more than the container's own cgroup: %s", l)
		}
	}
}

func TestNetworkNamespaceHasLoopback(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	out, _ := b.run("links")
	if got := strings.TrimSpace(out); !strings.HasPrefix(got, "lo up|loopback") || strings.Contains(got, "\n") {
		t.Errorf("got %q", got)
	}
}

func TestSeccomp(t *testing.T) {
	t.Parallel()
	for _, nnp := range []bool{true, false} {
		b := newBox(t)
		b.spec.Process.NoNewPrivileges = nnp
		b.spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: []string{"CAP_SYS_ADMIN"}, Permitted: []string{"CAP_SYS_ADMIN"}, Effective: []string{"CAP_SYS_ADMIN"}}
		errno := uint(unix.ENOTNAM)
		b.spec.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"unshare"}, Action: specs.ActErrno, ErrnoRet: &errno},
		}}
		out, _ := b.run("unshare", "status", "Seccomp", "status", "NoNewPrivs")
		want := []string{"error: not a XENIX named type file", "2", map[bool]string{true: "1", false: "0"}[nnp]}
		if got := lines(out); !slices.Equal(got, want) {
			t.Errorf("no_new_privs %t: got %q, want %q", nnp, got, want)
		}
	}
}

func TestErrorsAreThoseOfRunc(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	b.write("/notexec", "x", 0o644)
	b.write("/garbage", "\x00\x01\x02", 0o755)
	b.write("/script", "#!/no/such/interpreter\n", 0o755)
	for _, tc := range []struct {
		args  []string
		want  string
		class func(error) bool
	}{
		{[]string{"nosuch"}, `exec: "nosuch": executable file not found in $PATH`, errdefs.IsNotFound},
		{[]string{"/x"}, `exec: "/x": stat /x: no such file or directory`, errdefs.IsNotFound},
		{[]string{"/notexec"}, `exec: "/notexec": permission denied`, errdefs.IsPermissionDenied},
		{[]string{"/bin"}, `exec: "/bin": is a directory`, nil},
		{[]string{"/bin/guest/x"}, `exec: "/bin/guest/x": stat /bin/guest/x: not a directory`, nil},
		{[]string{"/garbage"}, `exec "/garbage": exec format error`, nil},
		{[]string{"/script"}, `exec "/script": no such file or directory`, errdefs.IsNotFound},
	} {
		b.spec.Process.Args = tc.args
		_, _, err := b.tryRun()
		if err == nil || !strings.HasSuffix(err.Error(), tc.want) || !strings.HasPrefix(err.Error(), "unable to start container process: ") {
			t.Errorf("%q: got %v, want %s", tc.args, err, tc.want)
		}
		if err != nil && tc.class != nil && !tc.class(err) {
			t.Errorf("%q: %v has a wrong class", tc.args, err)
		}
		if left, _ := b.rt.List(); len(left) > 0 {
			t.Fatalf("%q left a container", tc.args)
		}
	}
	b.spec.Process.Args = []string{"/garbage"}
	c, err := b.rt.Create(t.Context(), b.id, CreateOptions{Bundle: b.bundle, Spec: b.spec})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(t.Context()); err == nil || !strings.HasSuffix(err.Error(), `exec "/garbage": exec format error`) {
		t.Errorf("start: %v", err)
	}
	if code := reap(t, c.Pid()); code != 255 {
		t.Errorf("the process ended with %d", code)
	}
	c.PidFD.Close()
	if st, _ := c.Status(); st != Stopped {
		t.Errorf("status %s", st)
	}
	if err := c.Delete(t.Context(), false); err != nil {
		t.Error(err)
	}
	if _, err := b.rt.Load("nosuch"); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "does not exist") {
		t.Error(err)
	}
	if _, err := b.rt.Create(t.Context(), "../x", CreateOptions{}); err == nil || !strings.Contains(err.Error(), "invalid container ID format") {
		t.Error(err)
	}
}

func TestStepErrorsNameTheStep(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	b.spec.Mounts = append(b.spec.Mounts, specs.Mount{Destination: "/x", Type: "bind", Source: "/no/such/source"})
	_, _, err := b.tryRun("true")
	if err == nil || !strings.Contains(err.Error(), "bind /no/such/source on /x: no such file or directory (step ") {
		t.Error(err)
	}
	b.spec.Mounts[len(b.spec.Mounts)-1] = specs.Mount{Destination: "/x", Type: "tmpfs", Source: "x", Options: []string{"size=nonsense"}}
	if _, _, err = b.tryRun("true"); err == nil || !strings.Contains(err.Error(), "mount /x: invalid argument (step ") {
		t.Error(err)
	}
}

// TestRefusedCgroupIsNamed: a kernel with group scheduling for real-time processes lets none into
// a v1 cpu cgroup that has no time for them.
func TestRefusedCgroupIsNamed(t *testing.T) {
	b := newBox(t)
	mount := ""
	l, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range l.Hierarchies {
		if !h.V2 && slices.Contains(h.Controllers, "cpu") {
			mount = h.Mount
		}
	}
	if mount == "" {
		t.Skipf("needs cgroup v1: %s", t.Name())
	}
	runtime.LockOSThread() // which the container is cloned from
	defer runtime.UnlockOSThread()
	if err := unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 1}, 0); err != nil {
		t.Skipf("needs the right to be real-time: %s: %v", t.Name(), err)
	}
	_, _, err = b.tryRun("exit", "0")
	if err := unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL}, 0); err != nil {
		t.Fatal(err)
	}
	if err == nil {
		t.Skipf("needs a kernel with RT_GROUP_SCHED: %s", t.Name())
	}
	if !strings.Contains(err.Error(), "enter the cgroup "+mount+"/") {
		t.Errorf("the cgroup in %s refuses real-time processes, and the error is: %v", mount, err)
	}
}

func TestLifecycle(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	ctx := context.Background()
	b.args("trap")
	o := newOutput(t)
	c, err := b.rt.Create(ctx, b.id, CreateOptions{Bundle: b.bundle, Spec: b.spec, Stdout: o.w})
	if err != nil {
		t.Fatal(err)
	}
	defer c.PidFD.Close()
	is := func(want Status) {
		t.Helper()
		l, err := b.rt.Load(b.id)
		if err != nil {
			t.Fatal(err)
		}
		if st, err := l.Status(); st != want {
			t.Fatalf("status %s %v, want %s", st, err, want)
		}
	}
	is(Created)
	if _, err := b.rt.Create(ctx, b.id, CreateOptions{Bundle: b.bundle, Spec: b.spec}); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), "container with given ID already exists") {
		t.Errorf("second create: %v", err)
	}
	if err := c.Resume(ctx); err == nil || !strings.Contains(err.Error(), "container not paused") {
		t.Error(err)
	}
	if err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	is(Running)
	if err := c.Start(ctx); err == nil || !strings.Contains(err.Error(), "cannot start an already running container") {
		t.Error(err)
	}
	if err := c.Delete(ctx, false); err == nil || !strings.Contains(err.Error(), "cannot delete container "+b.id+" that is not stopped: running") {
		t.Error(err)
	}
	if err := c.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	is(Paused)
	if _, err := c.Exec(ctx, ExecOptions{Process: b.spec.Process}); err == nil || !strings.Contains(err.Error(), "cannot exec in a paused container (use --ignore-paused to override)") {
		t.Error(err)
	}
	if err := c.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	limit := int64(40)
	if err := c.Update(ctx, &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: &limit}}); err != nil {
		t.Error(err)
	}
	if out, _, err := b.exec(c, nil, "cat", map[bool]string{true: "/sys/fs/cgroup/pids.max", false: "/sys/fs/cgroup/pids/pids.max"}[CgroupV2()]); err != nil || out != "40\n" {
		t.Errorf("after update: %q %v", out, err)
	}
	o.await(t, "trapped")
	if err := c.Kill(ctx, unix.SIGTERM); err != nil {
		t.Error(err)
	}
	if code := reap(t, c.Pid()); code != 7 {
		t.Errorf("exit code %d", code)
	}
	is(Stopped)
	if err := c.Kill(ctx, 0); err == nil || !strings.Contains(err.Error(), "container not running") {
		t.Error(err)
	}
	if err := c.KillAll(ctx, unix.SIGKILL); err != nil {
		t.Error(err)
	}
	if err := c.Delete(ctx, false); err != nil {
		t.Fatal(err)
	}
	if _, err := b.rt.Load(b.id); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	o.end()
}

// TestStateThatVanished: whoever has made a container can end it after somebody has removed its state, and nothing of it is left.
func TestStateThatVanished(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	ctx := context.Background()
	b.args("sleep", "3600")
	c, err := b.rt.Run(ctx, b.id, CreateOptions{Bundle: b.bundle, Spec: b.spec})
	if err != nil {
		t.Fatal(err)
	}
	defer c.PidFD.Close()
	if err := os.RemoveAll(filepath.Join(b.rt.Root, b.id)); err != nil {
		t.Fatal(err)
	}
	if err := c.Kill(ctx, unix.SIGKILL); err != nil {
		t.Error(err)
	}
	if code := reap(t, c.Pid()); code != 137 {
		t.Errorf("exit code %d", code)
	}
	if err := c.Kill(ctx, unix.SIGKILL); !errdefs.IsNotFound(err) {
		t.Errorf("kill after the end: %v", err)
	}
	if err := c.Delete(ctx, false); !errdefs.IsNotFound(err) {
		t.Errorf("delete: %v", err)
	}
	if len(c.CgroupPaths()) == 0 {
		t.Error("it has no cgroups")
	}
	for _, dir := range c.CgroupPaths() {
		if _, err := os.Stat(dir); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", dir, err)
		}
	}
}

func TestUserCanOpenItsStandardOutput(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	b.spec.Process.User = specs.User{UID: 1000, GID: 1000}
	if out, _ := b.run("write", "/dev/stdout", "again\n"); out != "again\nwritten\n" {
		t.Errorf("got %q", out)
	}
}

func BenchmarkRun(b *testing.B) {
	x := newBox(b)
	x.args("true")
	for b.Loop() {
		if _, code, err := x.tryRun(); err != nil || code != 0 {
			b.Fatal(code, err)
		}
	}
}

// Without a mount namespace of its own the container is in the runtime's, and yet has its
// root and its mounts, and none of them shows on the host.
func TestWithoutMountNamespace(t *testing.T) {
	t.Parallel()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	if !kernelAtLeast(unix.ByteSliceToString(u.Release[:]), 6, 15) {
		t.Skipf("needs Linux 6.15 (mounts below detached ones): %s", t.Name())
	}
	b := newBox(t)
	b.spec.Linux.Namespaces = slices.DeleteFunc(b.spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.MountNamespace })
	out, _ := b.run("readlink", "/proc/self/ns/mnt", "pid", "stat", "/dev/null", "cat", "/proc/self/mountinfo")
	ns, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	l := lines(out)
	if len(l) < 3 || l[0] != ns || l[1] != "1" || l[2] != "20666 1:3 0:0" {
		t.Errorf("got %q, the host's namespace is %s", l, ns)
	}
	if raw, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(raw), b.bundle) {
		t.Errorf("mounts of the container are on the host: %s, %v", raw, err)
	}
}

func kernelAtLeast(release string, major, minor int) bool {
	var a, b int
	_, err := fmt.Sscanf(release, "%d.%d", &a, &b)
	return err == nil && (a > major || a == major && b >= minor)
}

// A profile with nothing but what the program itself needs: openat2(2), close_range(2)
// and the like are the runtime's.
func TestNarrowProfileWithoutNoNewPrivileges(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	b.spec.Process.NoNewPrivileges = false
	b.spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: []string{"CAP_KILL"}, Effective: []string{"CAP_KILL"}, Permitted: []string{"CAP_KILL"}}
	denied := uint(unix.ENOSYS)
	b.spec.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{
		Names:  []string{"openat2", "close_range", "faccessat2", "setgroups", "setresuid", "setresgid", "umask", "getcwd", "prlimit64", "seccomp"},
		Action: specs.ActErrno, ErrnoRet: &denied,
	}}}
	for _, user := range []uint32{0, 1000} {
		b.spec.Process.User.UID = user
		want := map[uint32]string{0: "0000000000000020", 1000: "0000000000000000"}[user]
		out, _ := b.run("status", "CapEff", "status", "CapBnd", "status", "Seccomp")
		if got := lines(out); !slices.Equal(got, []string{want, "0000000000000020", "2"}) {
			t.Errorf("user %d: %q", user, got)
		}
	}
}

// The kernel's list of mounts shows the order of the configuration, sources included.
func TestMountsAreListedInOrder(t *testing.T) {
	t.Parallel()
	for _, userns := range []bool{false, true} {
		b := newBox(t)
		src := t.TempDir()
		if userns {
			ownUserNamespace(b)
		} else {
			at := len(b.spec.Mounts) / 2
			b.spec.Mounts = slices.Insert(b.spec.Mounts, at,
				specs.Mount{Destination: "/in-between", Source: src, Options: []string{"rbind", "ro"}},
				specs.Mount{Destination: "/file", Source: "/etc/passwd", Options: []string{"bind", "rprivate"}})
		}
		out, _ := b.run("cat", "/proc/self/mountinfo")
		var got []string
		for _, l := range lines(out) {
			if f := strings.Fields(l); len(f) > 4 {
				got = append(got, f[4])
			}
		}
		at := 0
		for _, m := range b.spec.Mounts {
			i := slices.Index(got[at:], m.Destination)
			if i < 0 {
				t.Fatalf("user namespace %v: %s (%s) is not listed in its order: %q", userns, m.Destination, m.Source, got)
			}
			at += i + 1
		}
	}
}

// Sources that mean something else to the container's first process than to the runtime.
func TestSourcesOfTheRuntime(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("of the runtime"), 0o644); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "root")
	if err := os.Symlink("/", link); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	self := fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	magic := filepath.Join(t.TempDir(), "magic")
	if err := os.Symlink(self, magic); err != nil {
		t.Fatal(err)
	}
	var ops []string
	for i, source := range []string{"/", link, self, magic, "/proc/self/root"} {
		dest := fmt.Sprintf("/m%d", i)
		b.spec.Mounts = append(b.spec.Mounts, specs.Mount{Destination: dest, Source: source, Options: []string{"rbind", "ro"}})
		if i == 0 || i == 1 || i == 4 {
			dest += dir
		}
		ops = append(ops, "cat", dest+"/file")
	}
	out, _ := b.run(ops...)
	if got := lines(out); len(got) != 5 || strings.Count(out, "of the runtime") != 5 {
		t.Errorf("got %q", got)
	}
}

// A configuration without a process can be created, and not be started.
func TestWithoutProcess(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	b.spec.Process = nil
	c, err := b.rt.Create(t.Context(), b.id, CreateOptions{Bundle: b.bundle, Spec: b.spec})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(t.Context()); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("start: %v", err)
	}
	if st, err := c.Status(); st != Created {
		t.Errorf("status %v, %v", st, err)
	}
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.Pid()))
	if err != nil || !strings.Contains(string(raw), "CapPrm:\t0000000000000000") {
		t.Errorf("it has rights: %v\n%s", err, raw)
	}
	if err := c.Kill(t.Context(), unix.SIGKILL); err != nil {
		t.Error(err)
	}
	reap(t, c.Pid())
	if err := c.Delete(t.Context(), false); err != nil {
		t.Error(err)
	}
	if _, err := b.rt.Run(t.Context(), b.id, CreateOptions{Bundle: b.bundle, Spec: b.spec}); err == nil {
		t.Error("run succeeds without a process")
	}
}

// TestForeignCgroup: a cgroup that is somebody else's in one hierarchy stays, and nothing is
// made beside it.
func TestForeignCgroup(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	b.args("exit", "0")
	l, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	h := l.Hierarchies[0]
	for _, v1 := range l.Hierarchies {
		if !v1.V2 && slices.Contains(v1.Controllers, "freezer") {
			h = v1 // made after the clone
		}
	}
	theirs := filepath.Join(h.Mount, b.id)
	if err := os.Mkdir(theirs, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(theirs)
	sleeper := exec.Command("sleep", "1000")
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	defer sleeper.Wait()
	defer sleeper.Process.Kill()
	if err := os.WriteFile(filepath.Join(theirs, "cgroup.procs"), []byte(strconv.Itoa(sleeper.Process.Pid)), 0o644); err != nil {
		t.Fatal(err)
	}
	_, err = b.rt.Create(context.Background(), b.id, CreateOptions{Bundle: b.bundle, Spec: b.spec})
	if !errdefs.IsAlreadyExists(err) {
		t.Errorf("error is %v", err)
	}
	for _, other := range l.Hierarchies {
		if dir := filepath.Join(other.Mount, b.id); dir != theirs && unix.Access(dir, unix.F_OK) == nil {
			t.Errorf("%s is left", dir)
		}
	}
	if raw, err := os.ReadFile(filepath.Join(theirs, "cgroup.procs")); err != nil || strings.TrimSpace(string(raw)) != strconv.Itoa(sleeper.Process.Pid) {
		t.Errorf("the foreign cgroup: %q, %v", raw, err)
	}
	if _, err := os.Stat(filepath.Join(b.rt.Root, b.id)); !os.IsNotExist(err) {
		t.Errorf("the state: %v", err)
	}
}
