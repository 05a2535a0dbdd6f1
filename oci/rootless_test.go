//go:build linux && (amd64 || arm64)

package oci

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/execfile"
	"github.com/hako-engine/hako/oci/cgroup"
	"github.com/hako-engine/hako/oci/spec"
)

// rootlessUser is a user without privileges, and without an entry anywhere.
const rootlessUser = 60123

// daemon is a user that systemd knows by name, as it must for a service.
const daemon = 1

// rootlessDir makes a directory for a plain user, with this program and the guest.
func rootlessDir(t *testing.T, uid int) (dir, self string) {
	b := newBox(t) // for its guest
	dir, err := os.MkdirTemp("", "hako-rootless")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	self = filepath.Join(dir, "test")
	for to, from := range map[string]string{self: "/proc/self/exe", filepath.Join(dir, "guest"): filepath.Join(b.rootfs, "bin/guest")} {
		raw, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := execfile.Write(to, raw, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	err = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Chown(path, uid, uid))
	})
	if err != nil {
		t.Fatal(err)
	}
	return dir, self
}

// TestRootless runs TestRootlessInside as a plain user.
func TestRootless(t *testing.T) {
	t.Parallel()
	dir, self := rootlessDir(t, rootlessUser)
	cmd := exec.Command(self, "-test.run=^TestRootlessInside$", "-test.v", "-test.timeout=20m")
	cmd.Dir = dir
	cmd.Env = []string{"HAKO_TEST_ROOTLESS=" + dir, "PATH=/usr/bin:/bin", "TMPDIR=" + dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: rootlessUser, Gid: rootlessUser}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestRootlessInside") {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestSystemdDriverOfAUser is TestRootless with the cgroup driver systemd: a service with
// a cgroup of its own starts a systemd of the user, and then the test.
func TestSystemdDriverOfAUser(t *testing.T) {
	needSystemd(t)
	dir, self := rootlessDir(t, daemon)
	script := `/lib/systemd/systemd --user & n=0
		until [ -S $XDG_RUNTIME_DIR/systemd/private ]; do n=$((n+1)); [ $n -lt 3000 ] || exit 9; sleep 0.1; done
		` + self + ` -test.run='^TestRootlessInside$' -test.v; code=$?; kill $!; exit $code`
	id := strconv.Itoa(daemon)
	cmd := exec.Command("systemd-run", "--quiet", "--wait", "--pipe", "--collect", "--uid="+id, "--gid="+id, "-p", "Delegate=yes", "-p", "RuntimeMaxSec=1200",
		"-E", "XDG_RUNTIME_DIR="+dir, "-E", "HAKO_TEST_ROOTLESS="+dir, "-E", "HAKO_TEST_DRIVER=systemd", "-E", "TMPDIR="+dir, "/bin/sh", "-c", script)
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestRootlessInside") {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestRootlessInside is the part of TestRootless that runs as a plain user.
func TestRootlessInside(t *testing.T) {
	dir := os.Getenv("HAKO_TEST_ROOTLESS")
	if dir == "" {
		t.Skip("is run by TestRootless: TestRootlessInside")
	}
	newRootless := func() *box {
		b := &box{t: t, bundle: dir, rootfs: filepath.Join(dir, "rootfs"), id: "box", rt: &Runtime{Root: filepath.Join(dir, "state"), CgroupDriver: os.Getenv("HAKO_TEST_DRIVER")}}
		for _, d := range []string{"bin", "proc", "sys", "dev", "tmp"} {
			if err := os.MkdirAll(filepath.Join(b.rootfs, d), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Link(filepath.Join(dir, "guest"), filepath.Join(b.rootfs, "bin/guest")); err != nil && !errors.Is(err, os.ErrExist) {
			t.Fatal(err)
		}
		b.spec = spec.Default(CgroupV2())
		spec.Rootless(b.spec, os.Getuid(), os.Getgid())
		b.spec.Process.Terminal, b.spec.Process.Rlimits, b.spec.Root.Readonly = false, nil, false
		return b
	}
	b := newRootless()
	b.spec.Hostname = "rootless"
	b.spec.Process.NoNewPrivileges = false
	b.spec.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdirat"}, Action: specs.ActErrno}}}
	out, code := b.run("id", "hostname", "cat", "/proc/self/uid_map", "write", "/tmp/x", "y", "mkdir", "/tmp/d", "write", "/dev/null", "x", "pid", "exit", "4")
	// A service has its group twice, and nobody may drop groups in such a namespace.
	f := strings.Replace(strings.Join(strings.Fields(out), " "), "0 0 [0]", "0 0 []", 1)
	if want := "0 0 [] rootless 0 " + strconv.Itoa(os.Getuid()) + " 1 written error: mkdir /tmp/d: operation not permitted written 1"; f != want || code != 4 {
		t.Errorf("got %q %d, want %q", f, code, want)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(b.rootfs, "tmp/x"), &st); err != nil || int(st.Uid) != os.Getuid() {
		t.Errorf("what it made belongs to %d %v", st.Uid, err)
	}

	b = newRootless()
	b.spec.Linux.Namespaces = append(b.spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
	b.spec.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Secs: 1000}}
	c, _ := b.start("sleep", "3600")
	out, _, err := b.exec(c, nil, "pid", "cat", "/proc/self/timens_offsets")
	if err != nil || !strings.Contains(strings.Join(strings.Fields(out), " "), "boottime 1000 0") {
		t.Errorf("exec: %q %v", out, err)
	}
	if os.Getenv("HAKO_TEST_DRIVER") != "" {
		raw, err := os.ReadFile("/proc/" + strconv.Itoa(c.Pid()) + "/cgroup")
		if err != nil || !strings.Contains(string(raw), "/user.slice/hako-box.scope") || len(c.CgroupPaths()) == 0 {
			t.Errorf("the process is in %s %v", raw, err)
		}
	}
	if len(c.CgroupPaths()) == 0 {
		if err := c.Pause(t.Context()); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("pause without a cgroup: %v", err)
		}
		if procs, err := c.Processes(); err != nil || len(procs) != 1 {
			t.Errorf("processes: %v %v", procs, err)
		}
	}
	if err := c.Kill(t.Context(), unix.SIGKILL); err != nil {
		t.Error(err)
	}
	reap(t, c.Pid())
	if err := c.Delete(t.Context(), false); err != nil {
		t.Error(err)
	}

	b = newRootless()
	limit := int64(1 << 26)
	b.spec.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}
	if l, err := cgroup.Detect(); err != nil || l.Mode != cgroup.V2 {
		if _, _, err := b.tryRun("true"); err == nil || !strings.Contains(err.Error(), "linux.resources.memory") {
			t.Errorf("a limit without a cgroup: %v", err)
		}
	}
	b = newRootless()
	b.spec.Mounts = append(b.spec.Mounts, specs.Mount{Destination: "/m", Source: dir, Options: []string{"rbind", "idmap"}})
	if _, _, err := b.tryRun("true"); err == nil || !strings.Contains(err.Error(), "needs privileges on the host") {
		t.Errorf("a mapped mount: %v", err)
	}
	if left, err := b.rt.List(); err != nil || len(left) != 0 {
		t.Errorf("left %d containers, %v", len(left), err)
	}
}
