//go:build linux && (amd64 || arm64)

package oci

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/plan"
)

// same fails unless out has exactly these lines.
func same(t *testing.T, out string, want ...string) {
	t.Helper()
	if got := lines(out); !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestSchedulingPolicyAndMemory(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	p := b.spec.Process
	p.Scheduler = &specs.Scheduler{Policy: specs.SchedBatch, Nice: 3, Flags: []specs.LinuxSchedulerFlag{specs.SchedFlagResetOnFork}}
	p.IOPriority = &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_BE, Priority: 6}
	b.spec.Linux.Personality = &specs.LinuxPersonality{Domain: specs.PerLinux32}
	b.spec.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "0", Flags: []specs.MemoryPolicyFlagType{specs.MpolFStaticNodes}}
	machine := map[bool]string{true: "i686", false: "armv8l"}[isAMD64]
	want := []string{"3 1 3 0", "2 6", machine, fmt.Sprint(2|1<<15, 1)}
	ops := []string{"scheduler", "ioprio", "uname", "mempolicy"}
	out, _ := b.run(ops...)
	same(t, out, want...)

	c, _ := b.start("sleep", "3600")
	out, _, err := b.exec(c, nil, ops...)
	if err != nil {
		t.Fatal(err)
	}
	same(t, out, want...)
}

func TestSchedulerPolicies(t *testing.T) {
	t.Parallel()
	for _, k := range []struct {
		s    specs.Scheduler
		want string
	}{
		{specs.Scheduler{Policy: specs.SchedOther, Nice: 5}, "0 0 5 0"},
		{specs.Scheduler{Policy: specs.SchedIdle}, "5 0 0 0"},
		{specs.Scheduler{Policy: specs.SchedFIFO, Priority: 2}, "1 0 0 2"},
		{specs.Scheduler{Policy: specs.SchedRR, Priority: 1, Flags: []specs.LinuxSchedulerFlag{specs.SchedFlagResetOnFork}}, "2 1 0 1"},
		{specs.Scheduler{Policy: specs.SchedDeadline, Runtime: 1e6, Deadline: 1e8, Period: 1e8, Flags: []specs.LinuxSchedulerFlag{specs.SchedFlagResetOnFork}}, "6 1 0 0"},
		{specs.Scheduler{Policy: specs.SchedISO}, "error"},
	} {
		b := newBox(t)
		b.spec.Process.Scheduler = &k.s
		out, _, err := b.tryRun("scheduler")
		if err != nil {
			// Realtime needs a budget in the cgroups above (v1), the kernel has no SCHED_ISO.
			if !strings.Contains(err.Error(), "set the scheduler to "+string(k.s.Policy)) || k.s.Policy == specs.SchedOther || k.s.Policy == specs.SchedIdle {
				t.Errorf("%s: %v", k.s.Policy, err)
			}
			continue
		}
		if k.s.Policy != specs.SchedOther {
			// The kernel leaves the nice value alone here: it is that of whoever runs the tests.
			f := strings.Fields(out)
			out = strings.Join([]string{f[0], f[1], "0", f[3]}, " ")
		}
		if strings.TrimSpace(out) != k.want {
			t.Errorf("%s: got %q, want %q", k.s.Policy, out, k.want)
		}
	}
}

// The runtime sets the scheduler where the loader clones, also of a container that waits for
// its start.
func TestSchedulerInJoinedPIDNamespace(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c, _ := b.start("sleep", "3600")
	o := newBox(t)
	o.spec.Linux.Namespaces = slices.Clone(o.spec.Linux.Namespaces)
	i := slices.IndexFunc(o.spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.PIDNamespace })
	o.spec.Linux.Namespaces[i].Path = fmt.Sprintf("/proc/%d/ns/pid", c.Pid())
	o.spec.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedIdle}
	if out, code := o.run("scheduler"); code != 0 || !strings.HasPrefix(out, "5 ") {
		t.Errorf("run: %q, %d", out, code)
	}
	_, out := o.start("scheduler", "sleep", "3600")
	out.await(t, "\n")
	if !strings.HasPrefix(out.peek(), "5 ") {
		t.Errorf("create and start: %q", out.peek())
	}
}

func TestExecCPUAffinity(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	b.spec.Process.ExecCPUAffinity = &specs.CPUAffinity{Initial: "0", Final: "0"}
	var online unix.CPUSet
	if err := unix.SchedGetaffinity(0, &online); err != nil {
		t.Fatal(err)
	}
	before := online
	c, o := b.start("status", "Cpus_allowed_list", "sleep", "3600")
	out, _, err := b.exec(c, nil, "status", "Cpus_allowed_list")
	if err != nil {
		t.Fatal(err)
	}
	same(t, out, "0")
	out, _, err = b.exec(c, func(p *specs.Process) { p.ExecCPUAffinity = &specs.CPUAffinity{Final: "1"} }, "status", "Cpus_allowed_list")
	if online.IsSet(1) && (err != nil || out != "1\n") {
		t.Errorf("final CPU 1: %q %v", out, err)
	}
	if _, _, err := b.exec(c, func(p *specs.Process) { p.ExecCPUAffinity = &specs.CPUAffinity{Initial: "8000"} }, "true"); err == nil || !strings.Contains(err.Error(), "execCPUAffinity.initial") {
		t.Errorf("a CPU that is not there: %v", err)
	}
	// The first process is not concerned, and neither is the runtime afterwards.
	if got := lines(o.peek())[0]; online.Count() > 1 && got == "0" {
		t.Errorf("the first process runs on %s", got)
	}
	if err := unix.SchedGetaffinity(0, &online); err != nil || online != before {
		t.Errorf("the runtime is left on other CPUs: %v", err)
	}
}

func TestTimeNamespace(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	b.spec.Linux.Namespaces = append(b.spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
	b.spec.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"monotonic": {Secs: 864000}, "boottime": {Secs: 1728000, Nanosecs: 5}}
	c, _ := b.start("sleep", "3600")
	for range 2 {
		out, _, err := b.exec(c, nil, "cat", "/proc/self/timens_offsets")
		if err != nil {
			t.Fatal(err)
		}
		got := strings.Fields(out)
		if want := strings.Fields("monotonic 864000 0 boottime 1728000 5"); !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	own, err := os.Readlink("/proc/thread-self/ns/time")
	its, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/time", c.Pid()))
	if err != nil || err2 != nil || own == its {
		t.Errorf("time namespaces: ours %s, the container's %s, %v %v", own, its, err, err2)
	}
	other := newBox(t) // joins it
	other.spec.Linux.Namespaces = append(other.spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace, Path: fmt.Sprintf("/proc/%d/ns/time", c.Pid())})
	out, _ := other.run("readlink", "/proc/self/ns/time")
	same(t, out, its)
}

// kernelBefore tells whether the kernel is older than that version.
func kernelBefore(t *testing.T, major, minor int) bool {
	t.Helper()
	var u unix.Utsname
	var a, b int
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &a, &b); err != nil {
		t.Fatal(err)
	}
	return a < major || a == major && b < minor
}

// inUserns gives the box a user namespace.
func (b *box) inUserns() {
	b.spec.Linux.Namespaces = append(b.spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	b.spec.Linux.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	b.spec.Linux.GIDMappings = b.spec.Linux.UIDMappings
}

// owned makes a directory with a file, and gives both to uid and gid.
func owned(t *testing.T, id int) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "data")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{dir, filepath.Join(dir, "file")} {
		if err := os.Chown(f, id, id); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestIDMappedMounts(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	b.inUserns()
	plain, mapped, own := owned(t, 0), owned(t, 5), owned(t, 7)
	rec := owned(t, 0)
	if err := os.Mkdir(filepath.Join(rec, "sub"), 0o777); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", filepath.Join(rec, "sub"), "tmpfs", 0, "mode=755"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(filepath.Join(rec, "sub"), unix.MNT_DETACH) })
	for _, d := range []string{"plain", "mapped", "own", "rec", "norec", "tmpfs"} {
		b.write(d+"/.keep", "", 0o644) // the container's root may make no directories here
	}
	maps := []specs.LinuxIDMapping{{ContainerID: 7, HostID: 100003, Size: 1}}
	b.spec.Mounts = append(b.spec.Mounts,
		specs.Mount{Destination: "/plain", Source: plain, Options: []string{"rbind"}},
		specs.Mount{Destination: "/mapped", Source: mapped, Options: []string{"rbind", "idmap"}},
		specs.Mount{Destination: "/own", Source: own, Options: []string{"bind"}, UIDMappings: maps, GIDMappings: maps},
		specs.Mount{Destination: "/norec", Source: rec, Options: []string{"rbind", "idmap"}},
	)
	with := []specs.Mount{
		{Destination: "/rec", Source: rec, Options: []string{"rbind", "ridmap"}},
		{Destination: "/tmpfs", Type: "tmpfs", Options: []string{"idmap", "uid=9", "gid=9", "mode=755"}},
	}
	if kernelBefore(t, 6, 3) {
		// It cannot map the ids of a tmpfs, and says so.
		mounts := b.spec.Mounts
		for _, m := range with {
			b.spec.Mounts = append(slices.Clip(mounts), m)
			if _, _, err := b.tryRun("true"); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "mount "+m.Destination+": this kernel cannot map the ids of its file system") {
				t.Errorf("%s: %v", m.Destination, err)
			}
		}
		if err := unix.Unmount(filepath.Join(rec, "sub"), 0); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(rec, "sub"), 0o755); err != nil {
			t.Fatal(err)
		}
		b.spec.Mounts = append(mounts, with[0])
		out, _ := b.run("stat", "/plain/file", "stat", "/mapped/file", "stat", "/own/file", "stat", "/rec/sub", "stat", "/norec/file", "write", "/rec/new", "x", "write", "/plain/new", "x")
		same(t, out, "100644 0:0 65534:65534", "100644 0:0 5:5", "100644 0:0 3:3", "40755 0:0 0:0", "100644 0:0 0:0", "written", "error: open /plain/new: permission denied")
		return
	}
	b.spec.Mounts = append(b.spec.Mounts, with...)
	out, _ := b.run("stat", "/plain/file", "stat", "/mapped/file", "stat", "/own/file", "stat", "/rec/sub", "stat", "/norec/file", "stat", "/norec/sub", "stat", "/tmpfs",
		"write", "/rec/new", "x", "write", "/plain/new", "x")
	same(t, out, "100644 0:0 65534:65534", "100644 0:0 5:5", "100644 0:0 3:3", "40755 0:0 0:0", "100644 0:0 0:0", "40755 0:0 65534:65534", "40755 0:0 9:9",
		"written", "error: open /plain/new: permission denied")
	// On the disk it is the container's root that owns what the container made.
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(rec, "new"), &st); err != nil || st.Uid != 0 {
		t.Errorf("a new file belongs to %d, want 0: %v", st.Uid, err)
	}

	b = newBox(t) // without a user namespace
	maps = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 4000, Size: 10}}
	b.spec.Mounts = append(b.spec.Mounts, specs.Mount{Destination: "/mapped", Source: mapped, Options: []string{"rbind", "idmap", "ro"}, UIDMappings: maps, GIDMappings: maps})
	out, _ = b.run("stat", "/mapped/file")
	same(t, out, "100644 0:0 4005:4005")
	b = newBox(t)
	b.spec.Mounts = append(b.spec.Mounts, specs.Mount{Destination: "/mapped", Source: mapped, Options: []string{"rbind", "idmap"}})
	if _, _, err := b.tryRun("true"); err == nil || !strings.Contains(err.Error(), "uidMappings") {
		t.Errorf("no maps: %v", err)
	}
}

func TestIDMappedRoot(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"bind", "overlay"} {
		b := newBox(t)
		b.inUserns()
		b.write("/etc/mine", "x", 0o600)
		m := specs.Mount{Type: "bind", Source: b.rootfs, Options: []string{"rbind", "idmap"}}
		upper := filepath.Join(b.bundle, "s")
		if kind == "overlay" {
			for _, d := range []string{"fs", "work", "empty"} {
				if err := os.MkdirAll(filepath.Join(upper, d), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			for _, d := range []string{"fs", "fs/etc"} {
				os.MkdirAll(filepath.Join(upper, d), 0o755)
				if err := os.Chown(filepath.Join(upper, d), 100000, 100000); err != nil {
					t.Fatal(err)
				}
			}
			m = specs.Mount{Type: "overlay", Source: "overlay", Options: []string{
				"idmap", "lowerdir=" + upper + "/empty:" + b.rootfs, "upperdir=" + upper + "/fs", "workdir=" + upper + "/work",
			}}
		}
		b.args("stat", "/etc/mine", "cat", "/etc/mine", "write", "/etc/new", "y")
		o := newOutput(t)
		c, err := b.rt.Run(t.Context(), b.id, CreateOptions{Bundle: b.bundle, Spec: b.spec, Stdout: o.w, Stderr: o.w, Rootfs: []specs.Mount{m}})
		if err != nil {
			o.end()
			if kind == "overlay" && kernelBefore(t, 6, 15) {
				if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "an overlay of layers with mapped ids needs Linux 6.15") {
					t.Errorf("a kernel that takes no descriptors as layers: %v", err)
				}
				continue
			}
			t.Fatalf("%s: %v", kind, err)
		}
		reap(t, c.Pid())
		c.PidFD.Close()
		if err := c.Delete(t.Context(), true); err != nil {
			t.Error(err)
		}
		same(t, o.end(), "100600 0:0 0:0", "x", "written")
		where, owner := b.rootfs+"/etc/new", uint32(0)
		if kind == "overlay" {
			where, owner = upper+"/fs/etc/new", 100000
		}
		var st unix.Stat_t
		if err := unix.Stat(where, &st); err != nil || st.Uid != owner {
			t.Errorf("%s: a new file belongs to %d, want %d: %v", kind, st.Uid, owner, err)
		}
	}
}

func TestRecursiveAttributes(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	src := t.TempDir()
	sub := filepath.Join(src, "sub")
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", sub, "tmpfs", unix.MS_NOEXEC, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(sub, unix.MNT_DETACH) })
	cases := map[string]string{ // option: what the mount below has then
		"rro": "ro,noexec", "rnosuid": "rw,nosuid,noexec", "rnodev": "rw,nodev,noexec", "rexec": "rw", "rnoatime": "rw,noexec,noatime",
		"rstrictatime": "rw,noexec", "rnodiratime": "rw,noexec,nodiratime", "rnosymfollow": "rw,noexec,nosymfollow", "rrelatime": "rw,noexec,relatime",
		"ro": "rw,noexec", "noatime": "rw,noexec",
	}
	for o := range cases {
		b.spec.Mounts = append(b.spec.Mounts, specs.Mount{Destination: "/m/" + o, Source: src, Options: []string{"rbind", o}})
	}
	b.spec.Mounts = append(b.spec.Mounts,
		specs.Mount{Destination: "/again", Source: src, Options: []string{"rbind"}},
		specs.Mount{Destination: "/again", Options: []string{"remount", "bind", "ro", "nosuid"}},
		specs.Mount{Destination: "/tmp", Type: "tmpfs", Options: []string{"size=4k"}},
		specs.Mount{Destination: "/tmp", Options: []string{"remount", "size=1m"}})
	out, _ := b.run("mounts", "write", "/tmp/a", strings.Repeat("x", 10000), "write", "/again/x", "y")
	options := map[string][]string{}
	for _, l := range lines(out) {
		if f := strings.Fields(l); len(f) > 2 {
			options[f[1]] = strings.Split(f[2], ",")
		}
	}
	for o, want := range cases {
		got := slices.DeleteFunc(options["/m/"+o+"/sub"], func(s string) bool { return s == "relatime" && o != "rrelatime" })
		slices.Sort(got)
		w := strings.Split(want, ",")
		slices.Sort(w)
		if !slices.Equal(got, w) {
			t.Errorf("%s: the mount below has %v, want %v", o, got, w)
		}
	}
	if got := options["/again"]; !slices.Contains(got, "ro") || !slices.Contains(got, "nosuid") {
		t.Errorf("remounted: %v", got)
	}
	if !strings.Contains(out, "\nwritten\nerror: open /again/x: read-only file system\n") {
		t.Errorf("remount of a file system: %.200q", out[max(0, len(out)-200):])
	}
}

// TestSharedRoot: what is mounted in a container with a shared root does not show on the
// host, where the root lies on a shared mount as it does under systemd.
func TestSharedRoot(t *testing.T) {
	t.Parallel()
	needRoot(t)
	// Peers of the host's mounts must not be unmounted on the way.
	shared := t.TempDir()
	below := filepath.Join(shared, "below")
	for _, dir := range []string{shared, below} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
		if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
			t.Fatal(err)
		}
	}
	for _, kind := range []string{"shared", "rshared"} {
		b := newBox(t)
		if err := unix.Mount(b.rootfs, b.rootfs, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(b.rootfs, unix.MNT_DETACH) })
		if err := unix.Mount("", b.rootfs, "", unix.MS_SHARED, ""); err != nil {
			t.Fatal(err)
		}
		b.spec.Linux.RootfsPropagation = kind
		b.spec.Mounts = append(b.spec.Mounts, specs.Mount{Destination: "/unbindable", Source: t.TempDir(), Options: []string{"rbind", "unbindable"}})
		c, _ := b.start("sleep", "3600")
		raw, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		var kept bool
		for _, l := range lines(string(raw)) {
			if strings.Contains(l, " "+b.rootfs+"/") {
				t.Errorf("%s: on the host: %s", kind, l)
			}
			kept = kept || strings.Contains(l, " "+below+" ")
		}
		if !kept {
			t.Errorf("%s: the container has unmounted a mount of the host, below a shared one", kind)
		}
		if out, _, err := b.exec(c, nil, "mounts"); err != nil || !strings.Contains(out, "shared:") {
			t.Errorf("%s: %v %s", kind, err, out)
		}
	}
}

func TestPropagation(t *testing.T) {
	t.Parallel()
	for root, want := range map[string]string{
		"": "master", "private": "", "rprivate": "", "slave": "master", "rslave": "master", "shared": "shared", "rshared": "shared",
		"unbindable": "unbindable", "runbindable": "unbindable",
	} {
		b := newBox(t)
		src := t.TempDir()
		if err := unix.Mount("tmpfs", src, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(src, unix.MNT_DETACH) })
		if err := unix.Mount("", src, "", unix.MS_SHARED, ""); err != nil {
			t.Fatal(err)
		}
		// What lies on a shared mount of the host is not unmounted there when the container lets go of it.
		sub := filepath.Join(src, "sub")
		if err := errors.Join(os.Mkdir(sub, 0o755), unix.Mount("tmpfs", sub, "tmpfs", 0, "")); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(sub, unix.MNT_DETACH) })
		b.spec.Linux.RootfsPropagation = root
		b.spec.Mounts = append(b.spec.Mounts,
			specs.Mount{Destination: "/plain", Source: src, Options: []string{"rbind"}},
			specs.Mount{Destination: "/rprivate", Source: src, Options: []string{"rbind", "rprivate"}},
			specs.Mount{Destination: "/rslave", Source: src, Options: []string{"rbind", "rslave"}},
			specs.Mount{Destination: "/rshared", Source: src, Options: []string{"rbind", "rshared"}},
			specs.Mount{Destination: "/unbindable", Source: src, Options: []string{"rbind", "unbindable"}})
		out, _ := b.run("mounts")
		if m, err := os.ReadFile("/proc/self/mountinfo"); err != nil || !strings.Contains(string(m), " "+sub+" ") {
			t.Errorf("rootfsPropagation %q: a mount of the host is gone: %v", root, err)
		}
		kinds := map[string]string{}
		for _, l := range lines(out) {
			if f := strings.Fields(l); len(f) > 3 {
				var k []string
				for _, o := range strings.Split(strings.Join(f[3:len(f)-1], ","), ",") {
					kind, _, _ := strings.Cut(o, ":")
					k = append(k, kind)
				}
				kinds[f[1]] = strings.Join(k, ",")
			}
		}
		t.Logf("%q: / %q, plain %q, rprivate %q, rslave %q, rshared %q, unbindable %q", root, kinds["/"], kinds["/plain"], kinds["/rprivate"], kinds["/rslave"], kinds["/rshared"], kinds["/unbindable"])
		for _, k := range []struct{ mount, want string }{
			{"/rprivate", ""}, {"/rslave", "master"}, {"/unbindable", "unbindable"}, {"/rshared", "shared"},
		} {
			if strings.HasPrefix(root, "r") {
				break // the whole tree has the propagation of the root
			}
			if got := kinds[k.mount]; !strings.Contains(got, k.want) || k.want == "" && got != "" {
				t.Errorf("rootfsPropagation %q: %s is %q, want %q", root, k.mount, got, k.want)
			}
		}
		if got := kinds["/"]; want == "shared" && !strings.Contains(got, want) || want == "" && got != "" || want == "unbindable" && got != want {
			t.Errorf("rootfsPropagation %q: / is %q, want %q", root, got, want)
		}
	}
}

const isAMD64 = unix.SYS_READ == 0

func TestNetDevices(t *testing.T) {
	b := newBox(t)
	name := fmt.Sprintf("hkd%d", os.Getpid()%100000)
	ip := func(args ...string) error {
		out, err := exec.Command("ip", args...).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("ip %v: %w: %s", args, err, out)
		}
		return err
	}
	if err := errors.Join(ip("link", "add", name, "type", "veth", "peer", "name", name+"p"), ip("addr", "add", "192.0.2.9/24", "dev", name)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { exec.Command("ip", "link", "del", name+"p").Run() })
	addr := func() string { out, _ := exec.Command("ip", "-br", "addr", "show", name).Output(); return string(out) }

	// What fails late leaves the device where it was.
	b.spec.Linux.NetDevices = map[string]specs.LinuxNetDevice{name: {Name: "inner0"}}
	b.spec.Process.Args = []string{"/no/such/program"}
	if _, _, err := b.tryRun(); err == nil {
		t.Fatal("no error")
	}
	if got := addr(); !strings.Contains(got, "192.0.2.9/24") {
		t.Errorf("after a failed start the device is %q", got)
	}
	b = newBox(t)
	b.spec.Linux.NetDevices = map[string]specs.LinuxNetDevice{name: {Name: "inner0"}, name + "p": {Name: "nosuch/x"}}
	if _, _, err := b.tryRun("true"); err == nil || !strings.Contains(err.Error(), "linux.netDevices") {
		t.Errorf("a bad name: %v", err)
	}
	b = newBox(t)
	b.spec.Linux.NetDevices = map[string]specs.LinuxNetDevice{name: {Name: "inner0"}}
	out, _ := b.run("links", "addresses", "inner0")
	if !strings.Contains(out, "inner0 up|broadcast|multicast") || !strings.Contains(out, "192.0.2.9/24") {
		t.Errorf("in the container: %q", out)
	}
}

func TestIntelRdtIsRefusedWhereThereIsNone(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	if raw, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(raw), " - resctrl ") {
		t.Skip("this machine has resctrl: TestIntelRdtIsRefusedWhereThereIsNone")
	}
	b.spec.Linux.IntelRdt = &specs.LinuxIntelRdt{ClosID: "x"}
	if _, _, err := b.tryRun("true"); err == nil || !strings.Contains(err.Error(), "linux.intelRdt: no resctrl file system") {
		t.Error(err)
	}
}

// TestEveryMountOption mounts a tmpfs and a bind mount with each option that the
// specification says must or should work.
func TestEveryMountOption(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	src := t.TempDir()
	var names []string
	for _, o := range plan.MountOptions() {
		if slices.Contains([]string{"bind", "rbind", "remount", "idmap", "ridmap", "tmpcopyup"}, o) {
			continue
		}
		b.spec.Mounts = append(b.spec.Mounts,
			specs.Mount{Destination: "/t/" + o, Type: "tmpfs", Source: "tmpfs", Options: []string{o}},
			specs.Mount{Destination: "/b/" + o, Type: "none", Source: src, Options: []string{"rbind", o}})
		names = append(names, o)
	}
	out, _ := b.run("mounts")
	for _, o := range names {
		if !strings.Contains(out, " /t/"+o+" ") || !strings.Contains(out, " /b/"+o+" ") {
			t.Errorf("%s: not mounted", o)
		}
	}
}
