//go:build linux && (amd64 || arm64)

package vm

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/execfile"
	"github.com/hako-engine/hako/oci"
	"github.com/hako-engine/hako/oci/spec"
)

var counter atomic.Int64

// box is a container to be, with busybox as its root file system.
type box struct {
	t    *testing.T
	rt   *oci.Runtime
	spec *specs.Spec
	id   string
	opts oci.CreateOptions
}

func newBox(t *testing.T) *box {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skipf("needs root: %s", t.Name())
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skipf("needs busybox: %s", t.Name())
	}
	dir := t.TempDir()
	b := &box{t: t, rt: &oci.Runtime{Root: filepath.Join(dir, "state")}, id: fmt.Sprintf("hakovm-%d-%d", os.Getpid(), counter.Add(1))}
	for _, d := range []string{"bin", "proc", "sys", "dev", "tmp", "etc"} {
		if err := os.MkdirAll(filepath.Join(dir, "rootfs", d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b.opts.Bundle = dir
	b.copy(busybox, "bin/busybox")
	if err := os.Symlink("busybox", filepath.Join(dir, "rootfs/bin/sh")); err != nil {
		t.Fatal(err)
	}
	b.spec = spec.Default(oci.CgroupV2())
	b.spec.Process.Terminal = false
	b.spec.Process.Rlimits = nil
	b.spec.Root.Readonly = false
	b.spec.Linux.CgroupsPath = "/" + b.id
	return b
}

func (b *box) copy(from, to string) {
	b.t.Helper()
	raw, err := os.ReadFile(from)
	if err == nil {
		err = execfile.Write(filepath.Join(b.opts.Bundle, "rootfs", to), raw, 0o755)
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// shell makes script the container's program. Busybox's applets are all there.
func (b *box) shell(script string) {
	b.spec.Process.Args = []string{"/bin/busybox", "sh", "-c", script}
}

// run runs the container to its end and gives what it wrote and its exit code.
func (b *box) run(script string) (string, int, error) {
	b.t.Helper()
	b.shell(script)
	b.opts.Spec = b.spec
	r, w, err := os.Pipe()
	if err != nil {
		b.t.Fatal(err)
	}
	b.opts.Stdout, b.opts.Stderr = w, w
	c, err := b.rt.Run(b.t.Context(), b.id, b.opts)
	w.Close()
	if err != nil {
		r.Close()
		return "", 0, err
	}
	from := io.Reader(r)
	if c.Console != nil {
		from = c.Console
		defer c.Console.Close()
	}
	var out bytes.Buffer
	io.Copy(&out, from) // the end of a terminal is EIO
	r.Close()
	code := reap(b.t, c.Pid())
	if err := c.Delete(context.Background(), true); err != nil {
		b.t.Error(err)
	}
	return out.String(), code, nil
}

// must is run for a program that succeeds.
func (b *box) must(script string) string {
	b.t.Helper()
	out, code, err := b.run(script)
	if err != nil || code != 0 {
		b.t.Fatalf("exit code %d, %v, output:\n%s", code, err, out)
	}
	return out
}

func reap(t *testing.T, pid int) int {
	t.Helper()
	for {
		var ws unix.WaitStatus
		_, err := unix.Wait4(pid, &ws, 0, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			t.Fatalf("wait for %d: %v", pid, err)
		}
		if ws.Signaled() {
			return 128 + int(ws.Signal())
		}
		return ws.ExitStatus()
	}
}

const profile = "hako-vm-test"

// loadProfile gives the kernel an AppArmor profile that denies /tmp/secret.
func loadProfile(t *testing.T) {
	t.Helper()
	if on, err := os.ReadFile("/sys/module/apparmor/parameters/enabled"); err != nil || on[0] != 'Y' {
		t.Skipf("needs AppArmor: %s", t.Name())
	}
	parser, err := exec.LookPath("apparmor_parser")
	if err != nil {
		t.Skipf("needs apparmor_parser: %s", t.Name())
	}
	text := "profile " + profile + ` flags=(attach_disconnected,mediate_deleted) {
  file,
  capability,
  network,
  signal,
  deny /tmp/secret rw,
}
`
	for _, arg := range []string{"-Kr", "-R"} {
		load := func() {
			cmd := exec.Command(parser, arg)
			cmd.Stdin = strings.NewReader(text)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("apparmor_parser %s: %v\n%s", arg, err, out)
			}
		}
		if arg == "-R" {
			t.Cleanup(load)
		} else {
			load()
		}
	}
}

func TestAppArmor(t *testing.T) {
	b := newBox(t)
	loadProfile(t)
	const script = "cat /proc/self/attr/current; echo x >/tmp/secret && echo written; true"
	for name, change := range map[string]func(*box){
		"unconfined": func(b *box) { b.spec.Process.ApparmorProfile = "" },
		"profile":    func(*box) {},
		"no new privileges": func(b *box) {
			b.spec.Process.NoNewPrivileges = true
		},
		"another user": func(b *box) {
			b.spec.Process.User = specs.User{UID: 1000, GID: 1000}
			b.spec.Process.Capabilities = nil
		},
		"user namespace": func(b *box) { userNamespace(b) },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBox(t)
			if err := os.Chmod(filepath.Join(b.opts.Bundle, "rootfs/tmp"), 0o1777); err != nil {
				t.Fatal(err)
			}
			b.spec.Process.ApparmorProfile = profile
			change(b)
			out := b.must(script)
			if name == "unconfined" {
				if !strings.HasPrefix(out, "unconfined") || !strings.Contains(out, "written") {
					t.Errorf("output: %s", out)
				}
				return
			}
			if !strings.HasPrefix(out, profile+" (enforce)") || strings.Contains(out, "written") {
				t.Errorf("output: %s", out)
			}
		})
	}
	b.spec.Process.ApparmorProfile = "hako-no-such-profile"
	if out, _, err := b.run("true"); err == nil || !strings.Contains(err.Error(), "hako-no-such-profile") {
		t.Errorf("a profile that does not exist: %v, output %s", err, out)
	}
}

// TestAppArmorExec enters a container whose own process is not confined.
func TestAppArmorExec(t *testing.T) {
	b := newBox(t)
	loadProfile(t)
	b.shell("sleep 1000")
	b.opts.Spec = b.spec
	c, err := b.rt.Run(t.Context(), b.id, b.opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.KillAll(context.Background(), unix.SIGKILL); err != nil {
			t.Error(err)
		}
		reap(t, c.Pid())
		if err := c.Delete(context.Background(), true); err != nil {
			t.Error(err)
		}
	})
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p := *b.spec.Process
	p.Args = []string{"/bin/busybox", "cat", "/proc/self/attr/current"}
	p.ApparmorProfile = profile
	e, err := c.Exec(t.Context(), oci.ExecOptions{Process: &p, Stdout: w, Stderr: w})
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	out, _ := io.ReadAll(r)
	reap(t, e.Pid)
	if !strings.HasPrefix(string(out), profile+" (enforce)") {
		t.Errorf("label of the process: %s", out)
	}
}

func userNamespace(b *box) {
	b.spec.Linux.Namespaces = append(b.spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	b.spec.Linux.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 200000, Size: 65536}}
	b.spec.Linux.GIDMappings = b.spec.Linux.UIDMappings
	// The way to the root file system has to be open for the container's root.
	for dir := b.opts.Bundle; dir != "/tmp" && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			b.t.Fatal(err)
		}
	}
}

var peerGroup = regexp.MustCompile(`shared:\d+`)

// TestNoMountIsSharedWithTheHost looks for mounts of the container in a peer group of the
// host's: whoever may mount in the container could cover the host's /dev/null with it.
func TestNoMountIsSharedWithTheHost(t *testing.T) {
	for name, change := range map[string]func(*box){
		"default":        func(*box) {},
		"terminal":       func(b *box) { b.spec.Process.Terminal = true },
		"user namespace": userNamespace,
		"nodes of the host": func(b *box) {
			// No /dev of its own: with a user namespace the nodes are bound.
			userNamespace(b)
			b.spec.Mounts = slices.DeleteFunc(b.spec.Mounts, func(m specs.Mount) bool { return strings.HasPrefix(m.Destination, "/dev") })
			if err := os.Chown(filepath.Join(b.opts.Bundle, "rootfs/dev"), 200000, 200000); err != nil {
				b.t.Fatal(err)
			}
		},
		"terminal of the host": func(b *box) {
			b.spec.Process.Terminal = true
			b.spec.Mounts = slices.DeleteFunc(b.spec.Mounts, func(m specs.Mount) bool { return m.Destination == "/dev/pts" })
		},
		"bind": func(b *box) {
			b.spec.Mounts = append(b.spec.Mounts, specs.Mount{Destination: "/mnt", Type: "bind", Source: b.t.TempDir(), Options: []string{"bind"}})
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBox(t)
			change(b)
			host, err := os.ReadFile("/proc/self/mountinfo")
			if err != nil {
				t.Fatal(err)
			}
			groups := peerGroup.FindAllString(string(host), -1)
			out := b.must("cat /proc/self/mountinfo")
			for line := range strings.Lines(out) {
				if g := peerGroup.FindString(line); g != "" && slices.Contains(groups, g) {
					t.Errorf("in a peer group of the host: %s", strings.TrimSpace(line))
				}
			}
			if !strings.Contains(out, " /proc ") {
				t.Errorf("no mounts: %s", out)
			}
		})
	}
}

// TestManyLayers runs a container from an overlay whose options are longer than what
// fsconfig(2) takes, and than what mount(2) does.
func TestManyLayers(t *testing.T) {
	for _, n := range []int{2, 12, 100} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			b := newBox(t)
			dirs := filepath.Join(b.opts.Bundle, strings.Repeat("long", 10))
			lower := []string{filepath.Join(dirs, "base")}
			if err := os.Mkdir(dirs, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(filepath.Join(b.opts.Bundle, "rootfs"), lower[0]); err != nil {
				t.Fatal(err)
			}
			for i := range n - 1 {
				l := filepath.Join(dirs, fmt.Sprint(i), "fs")
				if err := os.MkdirAll(l, 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(l, fmt.Sprint("file", i)), nil, 0o644); err != nil {
					t.Fatal(err)
				}
				lower = append(lower, l)
			}
			for _, d := range []string{"upper", "work"} {
				if err := os.Mkdir(filepath.Join(dirs, d), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			b.opts.Rootfs = []specs.Mount{{Type: "overlay", Source: "overlay", Options: []string{
				"lowerdir=" + strings.Join(lower, ":"), "upperdir=" + filepath.Join(dirs, "upper"), "workdir=" + filepath.Join(dirs, "work"),
			}}}
			out := b.must("ls / | grep -c file; echo x >/new; grep ' / / ' /proc/self/mountinfo")
			if !strings.HasPrefix(out, fmt.Sprintln(n-1)) || !strings.Contains(out, "overlay") {
				t.Errorf("files of %d layers: %s", n-1, out)
			}
			if _, err := os.Stat(filepath.Join(dirs, "upper/new")); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestDeviceRules: what a rule does not allow cannot be opened, though its node is there.
func TestDeviceRules(t *testing.T) {
	b := newBox(t)
	mode := os.FileMode(0o666)
	b.spec.Linux.Devices = []specs.LinuxDevice{
		{Path: "/dev/kmsg-allowed", Type: "c", Major: 1, Minor: 11, FileMode: &mode},
		{Path: "/dev/mem-denied", Type: "c", Major: 1, Minor: 1, FileMode: &mode},
	}
	for _, set := range []*[]string{&b.spec.Process.Capabilities.Bounding, &b.spec.Process.Capabilities.Permitted, &b.spec.Process.Capabilities.Effective} {
		*set = append(*set, "CAP_SYSLOG") // kmsg asks for it
	}
	major, minor := int64(1), int64(11)
	b.spec.Linux.Resources = &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{
		{Allow: false, Access: "rwm"}, {Allow: true, Type: "c", Major: &major, Minor: &minor, Access: "r"},
	}}
	out := b.must(`
for d in null kmsg-allowed mem-denied; do (exec 3</dev/$d) 2>/dev/null && echo read $d; done
for d in null kmsg-allowed; do (exec 3>/dev/$d) 2>/dev/null && echo write $d; done
true`)
	if want := "read null\nread kmsg-allowed\nwrite null\n"; out != want {
		t.Errorf("could:\n%swant:\n%s", out, want)
	}
}

// TestUnifiedLimits compares what the container is limited to with its files.
func TestUnifiedLimits(t *testing.T) {
	if !oci.CgroupV2() {
		t.Skipf("needs cgroup v2: %s", t.Name())
	}
	b := newBox(t)
	memory, swap, quota, period, pids, shares := int64(64<<20), int64(96<<20), int64(50000), uint64(100000), int64(20), uint64(512)
	b.spec.Linux.Resources = &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: &memory, Swap: &swap}, Pids: &specs.LinuxPids{Limit: &pids},
		CPU:     &specs.LinuxCPU{Quota: &quota, Period: &period, Shares: &shares, Cpus: "0"},
		Unified: map[string]string{"memory.high": "50331648"},
	}
	out := b.must("cd /sys/fs/cgroup; cat /proc/self/cgroup memory.max memory.swap.max memory.high cpu.max pids.max cpuset.cpus cpu.weight")
	want := "0::/\n67108864\n33554432\n50331648\n50000 100000\n20\n0\n59\n"
	if out != want {
		t.Errorf("limits:\n%swant:\n%s", out, want)
	}
}
