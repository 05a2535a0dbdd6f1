//go:build linux && (amd64 || arm64)

package oci

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/criu"
)

// needCRIU skips a test that CRIU has to take part in where it cannot. Debian's CRIU 3.17
// works with Debian's own kernel, which make test-vm has.
func needCRIU(t *testing.T) {
	t.Helper()
	needRoot(t)
	if _, err := exec.LookPath("criu"); err != nil {
		t.Skipf("needs CRIU: %s", t.Name())
	}
	if out, err := exec.Command("criu", "check").CombinedOutput(); err != nil {
		t.Skipf("needs a CRIU that knows this kernel: %s: %.200s", t.Name(), out)
	}
}

// newDump is a box that CRIU 3.17 can checkpoint: it does not keep no_new_privs.
func newDump(t *testing.T) *box {
	needCRIU(t)
	b := newBox(t)
	b.spec.Process.NoNewPrivileges = false
	return b
}

// talker is a container that says what it is told, a line at a time.
type talker struct {
	c   *Container
	in  *os.File
	out *output
}

func (b *box) talk(ops ...string) *talker {
	b.t.Helper()
	return b.talkOn(nil, ops...)
}

func (b *box) talkOn(root []specs.Mount, ops ...string) *talker {
	b.t.Helper()
	b.args(ops...)
	r, w, err := os.Pipe()
	if err != nil {
		b.t.Fatal(err)
	}
	defer r.Close()
	k := &talker{in: w, out: newOutput(b.t)}
	k.c, err = b.rt.Run(b.t.Context(), b.id, CreateOptions{Bundle: b.bundle, Spec: b.spec, Rootfs: root, Stdin: r, Stdout: k.out.w, Stderr: k.out.w})
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { k.end(b) })
	return k
}

func (k *talker) end(b *box) {
	k.in.Close()
	k.c.Kill(context.Background(), unix.SIGKILL)
	unix.Wait4(k.c.Pid(), nil, 0, nil)
	if k.c.PidFD != nil {
		k.c.PidFD.Close()
	}
	if _, err := b.rt.Load(b.id); err == nil {
		if err := k.c.Delete(context.Background(), true); err != nil {
			b.t.Error(err)
		}
	}
	k.out.end()
}

// expect waits until the container has written text.
func (k *talker) expect(t *testing.T, text string) {
	t.Helper()
	k.out.await(t, text)
}

// stop writes the container to files and removes it.
func (b *box) stop(k *talker, o CheckpointOptions) string {
	b.t.Helper()
	if o.ImagePath == "" {
		o.ImagePath = filepath.Join(b.bundle, "images")
	}
	if err := k.c.Checkpoint(b.t.Context(), o); err != nil {
		b.t.Fatal(err)
	}
	if o.LeaveRunning || o.PreDump {
		return o.ImagePath
	}
	if code := reap(b.t, k.c.Pid()); code != 137 {
		b.t.Errorf("the container ended with %d", code)
	}
	if st, err := k.c.Status(); st != Stopped || err != nil {
		b.t.Errorf("after the checkpoint: %s, %v", st, err)
	}
	if err := k.c.Delete(b.t.Context(), false); err != nil {
		b.t.Fatal(err)
	}
	return o.ImagePath
}

// resume makes it again.
func (b *box) resume(o RestoreOptions) (*talker, error) {
	b.t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		b.t.Fatal(err)
	}
	defer r.Close()
	k := &talker{in: w, out: newOutput(b.t)}
	o.Bundle, o.Spec, o.Stdin, o.Stdout, o.Stderr = b.bundle, b.spec, r, k.out.w, k.out.w
	if o.ImagePath == "" {
		o.ImagePath = filepath.Join(b.bundle, "images")
	}
	k.c, err = b.rt.Restore(b.t.Context(), b.id, o)
	if err != nil {
		w.Close()
		k.out.end()
		return nil, err
	}
	b.t.Cleanup(func() { k.end(b) })
	return k, nil
}

// mountsOf lists a process's mounts, but for numbers that change.
func mountsOf(t *testing.T, pid int) (out []string) {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range lines(string(raw)) {
		f := strings.Fields(l)
		sep := slices.Index(f, "-")
		options := strings.Split(f[5], ",")
		slices.Sort(options)
		out = append(out, strings.Join([]string{f[3], f[4], strings.Join(options, ","), f[sep+1]}, " "))
	}
	slices.Sort(out)
	return out
}

func TestCheckpointRestore(t *testing.T) {
	for name, change := range map[string]func(*box){
		"plain": func(b *box) {
			data := filepath.Join(b.bundle, "data")
			os.Mkdir(data, 0o755)
			b.spec.Mounts = append(b.spec.Mounts,
				specs.Mount{Destination: "/data", Source: data, Options: []string{"rbind", "ro", "nosuid"}},
				specs.Mount{Destination: "/etc/hostname", Source: "/etc/hostname", Options: []string{"bind", "rprivate"}},
				specs.Mount{Destination: "/tmp", Type: "tmpfs", Options: []string{"size=1m", "nosuid"}})
		},
		"restricted": func(b *box) {
			b.spec.Root.Readonly = true
			b.spec.Process.User = specs.User{UID: 1000, GID: 1000}
			b.spec.Process.Capabilities = &specs.LinuxCapabilities{}
			b.spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_CORE", Hard: 5}}
			b.spec.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"swapon"}, Action: specs.ActErrno}}}
			b.spec.Linux.Resources = &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: new(int64(64))}}
			b.spec.Mounts = append(b.spec.Mounts, specs.Mount{Destination: "/tmp", Type: "tmpfs", Options: []string{"mode=1777"}})
		},
		"host's network": func(b *box) {
			b.spec.Linux.Namespaces = slices.DeleteFunc(b.spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.NetworkNamespace })
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newDump(t)
			change(b)
			k := b.talk("write", "/tmp/file", "kept", "echo", "before", "line", "cat", "/tmp/file", "exit", "7")
			k.expect(t, "before\n")
			mounts := mountsOf(t, k.c.Pid())
			dir := b.stop(k, CheckpointOptions{})
			if _, err := os.Stat(filepath.Join(dir, descriptorsFile)); err != nil {
				t.Error(err)
			}
			k, err := b.resume(RestoreOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if st, err := k.c.Status(); st != Running || err != nil {
				t.Errorf("%s, %v", st, err)
			}
			if got := mountsOf(t, k.c.Pid()); !slices.Equal(got, mounts) {
				t.Errorf("mounts\n%s\nwere\n%s", strings.Join(got, "\n"), strings.Join(mounts, "\n"))
			}
			if host, _ := os.ReadFile("/proc/self/mountinfo"); strings.Contains(string(host), b.rt.Root) {
				t.Error("the host's mount table shows the container")
			}
			if _, err := b.rt.Load(b.id); err != nil {
				t.Error(err)
			}
			if out, _, err := b.exec(k.c, nil, "echo", "in"); err != nil || out != "in\n" {
				t.Errorf("exec: %q %v", out, err)
			}
			fmt.Fprintln(k.in, "word")
			k.expect(t, "got word\nkept\n")
			if code := reap(t, k.c.Pid()); code != 7 {
				t.Errorf("exit code %d", code)
			}
			if err := k.c.Delete(t.Context(), false); err != nil {
				t.Error(err)
			}
			if left, _ := os.ReadDir(b.rt.Root); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// TestCheckpointTerminal: the terminal comes back, as another one.
func TestCheckpointTerminal(t *testing.T) {
	b := newDump(t)
	b.spec.Process.Terminal = true
	b.args("echo", "before", "line", "tty")
	c, err := b.rt.Run(t.Context(), b.id, CreateOptions{Bundle: b.bundle, Spec: b.spec})
	if err != nil {
		t.Fatal(err)
	}
	expect := func(f *os.File, text string) {
		t.Helper()
		var got []byte
		buf := make([]byte, 512)
		for !strings.Contains(string(got), text) {
			p := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLIN}}
			if n, err := unix.Poll(p, 30000); n == 0 || err != nil && err != unix.EINTR {
				t.Fatalf("no %q in %q: %v", text, got, err)
			}
			n, err := f.Read(buf)
			if got = append(got, buf[:n]...); err != nil {
				t.Fatalf("no %q in %q: %v", text, got, err)
			}
		}
	}
	expect(c.Console, "before\r\n")
	b.stop(&talker{c: c}, CheckpointOptions{})
	c.Console.Close()
	c.PidFD.Close()
	c, err = b.rt.Restore(t.Context(), b.id, RestoreOptions{
		CreateOptions: CreateOptions{Bundle: b.bundle, Spec: b.spec}, CRIUOptions: CRIUOptions{ImagePath: filepath.Join(b.bundle, "images")},
	})
	if err != nil {
		t.Fatal(err)
	}
	if c.Console == nil {
		t.Fatal("no terminal")
	}
	defer c.Console.Close()
	defer c.PidFD.Close()
	fmt.Fprintln(c.Console, "word")
	expect(c.Console, "got word\r\ntty ")
	if code := reap(t, c.Pid()); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if err := c.Delete(t.Context(), false); err != nil {
		t.Error(err)
	}
}

// TestCheckpointOverlay: the root file system is given as mounts, and systemd manages the
// cgroup where there is one.
func TestCheckpointOverlay(t *testing.T) {
	b := newDump(t)
	if _, err := os.Stat("/run/systemd/system"); err == nil {
		b.rt.CgroupDriver = "systemd"
		b.spec.Linux.CgroupsPath = "system.slice:hako:" + b.id
	}
	dir := filepath.Join(b.bundle, "o")
	for _, d := range []string{"upper", "work"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	root := []specs.Mount{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=" + b.rootfs, "upperdir=" + dir + "/upper", "workdir=" + dir + "/work"}}}
	b.spec.Root.Path = "nowhere"
	b.spec.Linux.Resources = &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: new(int64(64))}}
	k := b.talkOn(root, "write", "/etc/file", "kept", "echo", "before", "line", "cat", "/etc/file")
	k.expect(t, "before\n")
	b.stop(k, CheckpointOptions{})
	k, err := b.resume(RestoreOptions{CreateOptions: CreateOptions{Rootfs: root}})
	if err != nil {
		t.Fatal(err)
	}
	if raw, err := os.ReadFile(filepath.Join(k.c.CgroupPaths()[""], "pids.max")); CgroupV2() && (err != nil || strings.TrimSpace(string(raw)) != "64") {
		t.Errorf("pids.max: %q %v", raw, err)
	}
	fmt.Fprintln(k.in, "x")
	k.expect(t, "got x\nkept\n")
}

// TestCheckpointShared: network and IPC of another container, as in a pod.
func TestCheckpointShared(t *testing.T) {
	b, pod := newDump(t), newBox(t)
	holder, _ := pod.start("sleep", "3600")
	for i := range b.spec.Linux.Namespaces {
		n := &b.spec.Linux.Namespaces[i]
		if file := map[specs.LinuxNamespaceType]string{specs.NetworkNamespace: "net", specs.IPCNamespace: "ipc", specs.UTSNamespace: "uts"}[n.Type]; file != "" {
			n.Path = fmt.Sprintf("/proc/%d/ns/%s", holder.Pid(), file)
		}
	}
	b.spec.Hostname = ""
	k := b.talk("echo", "before", "line", "readlink", "/proc/self/ns/net", "readlink", "/proc/self/ns/ipc", "hostname")
	k.expect(t, "before\n")
	b.stop(k, CheckpointOptions{})
	k, err := b.resume(RestoreOptions{})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(k.in, "x")
	net, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", holder.Pid()))
	ipc, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/ipc", holder.Pid()))
	k.expect(t, "got x\n"+net+"\n"+ipc+"\n"+pod.spec.Hostname+"\n")
}

// TestCheckpointLeaveRunning: dumps while the container runs, one on top of the other.
func TestCheckpointLeaveRunning(t *testing.T) {
	b := newDump(t)
	k := b.talk("echo", "before", "line", "line")
	k.expect(t, "before\n")
	b.stop(k, CheckpointOptions{PreDump: true, CRIUOptions: CRIUOptions{ImagePath: filepath.Join(b.bundle, "first")}})
	b.stop(k, CheckpointOptions{LeaveRunning: true, CRIUOptions: CRIUOptions{ParentPath: "../first"}})
	if st, err := k.c.Status(); st != Running || err != nil {
		t.Errorf("%s, %v", st, err)
	}
	fmt.Fprintln(k.in, "on")
	k.expect(t, "got on\n")
	k.end(b)
	k, err := b.resume(RestoreOptions{Paused: true})
	if err != nil {
		t.Fatal(err)
	}
	if st, err := k.c.Status(); st != Paused || err != nil {
		t.Errorf("%s, %v", st, err)
	}
	fmt.Fprintln(k.in, "again")
	time.Sleep(300 * time.Millisecond)
	if out := k.out.peek(); out != "" {
		t.Errorf("a paused container has run: %q", out)
	}
	if err := k.c.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	k.expect(t, "got again\n")
}

// TestRestoreHostile (security.md, E1): images of a container that may more than the
// configuration says are not restored; without the comparison they would be.
func TestRestoreHostile(t *testing.T) {
	b := newDump(t)
	other := filepath.Join(b.bundle, "other")
	os.Mkdir(other, 0o755)
	b.spec.Mounts = append(b.spec.Mounts, specs.Mount{Destination: "/data", Source: other, Options: []string{"rbind"}})
	k := b.talk("echo", "before", "line")
	k.expect(t, "before\n")
	b.stop(k, CheckpointOptions{})
	generous := *b.spec
	for name, c := range map[string]struct {
		change func(s *specs.Spec)
		text   string
	}{
		"capabilities": {func(s *specs.Spec) {
			p := *s.Process
			p.Capabilities = &specs.LinuxCapabilities{Bounding: []string{"CAP_KILL"}}
			s.Process = &p
		}, "has capabilities"},
		"seccomp": {func(s *specs.Spec) {
			l := *s.Linux
			l.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"swapon"}, Action: specs.ActErrno}}}
			s.Linux = &l
		}, "no filter, where the configuration has one"},
		"user": {func(s *specs.Spec) {
			p := *s.Process
			p.User = specs.User{UID: 1000, GID: 1000}
			caps := *p.Capabilities
			caps.Bounding = slices.DeleteFunc(slices.Clone(caps.Bounding), func(n string) bool { return n == "CAP_SETUID" })
			p.Capabilities = &caps
			s.Process = &p
		}, "runs as uid 0"},
		"mount": {func(s *specs.Spec) { s.Mounts = s.Mounts[:len(s.Mounts)-1] }, "No mapping for"},
		"read-only": {func(s *specs.Spec) {
			s.Mounts = slices.Clone(s.Mounts)
			s.Mounts[len(s.Mounts)-1].Options = []string{"rbind", "ro"}
		}, "is not ro"},
	} {
		t.Run(name, func(t *testing.T) {
			s := generous
			c.change(&s)
			b.t, b.spec = t, &s
			k, err := b.resume(RestoreOptions{})
			if err == nil {
				k.end(b)
			}
			if err == nil || !strings.Contains(err.Error(), c.text) {
				t.Fatalf("got %v, want %q", err, c.text)
			}
			if cg := "/sys/fs/cgroup/" + b.id; CgroupV2() && exists(cg) {
				t.Errorf("%s is left", cg)
			}
			if left, _ := os.ReadDir(b.rt.Root); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
			if name == "mount" {
				return // CRIU itself refuses a mount that it is not given
			}
			// The control: nothing compared.
			k, err = b.resume(RestoreOptions{unverified: true})
			if err != nil {
				t.Fatalf("the control: %v", err)
			}
			k.end(b)
		})
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// TestCheckpointRefuses: what can be said without CRIU.
func TestCheckpointRefuses(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	for name, c := range map[string]struct {
		change func(s *specs.Spec)
		text   string
	}{
		// E3: a name that would become part of CRIU's options.
		"bracket": {func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/a]:/etc", Source: "/tmp", Options: []string{"bind"}})
		}, "bracket"},
		"newline": {func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/a\nexternal", Source: "/tmp", Options: []string{"bind"}})
		}, "control character"},
		"twice": {func(s *specs.Spec) { s.Mounts = append(s.Mounts, specs.Mount{Destination: "/proc/", Type: "proc"}) }, "two mounts in one place"},
		"mapped": {func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/a", Source: "/tmp", Options: []string{"bind", "ridmap"}})
		}, "mapped ids"},
		"no mount namespace": {func(s *specs.Spec) { s.Linux.Namespaces = nil }, "mount namespace"},
		"user namespace": {func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		}, "user namespace"},
		"joined time namespace": {func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace, Path: "/proc/1/ns/time"})
		}, "joined time namespace"},
		"agent":                 {func(s *specs.Spec) { s.Linux.Seccomp = &specs.LinuxSeccomp{ListenerPath: "/x"} }, "seccomp agent"},
		"configuration of CRIU": {func(s *specs.Spec) { s.Annotations = map[string]string{AnnotationCRIUConfig: "relative"} }, AnnotationCRIUConfig},
		"somebody's configuration of CRIU": {func(s *specs.Spec) {
			file := filepath.Join(b.bundle, "criu.conf")
			os.WriteFile(file, nil, 0o666)
			os.Chmod(file, 0o666)
			s.Annotations = map[string]string{AnnotationCRIUConfig: file}
		}, "only root can write"},
	} {
		s := newBox(t).spec
		c.change(s)
		if _, err := (CRIUOptions{ImagePath: "x"}).rpc(s); err == nil || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, o := range []CRIUOptions{{}, {ImagePath: "x", ManageCgroups: "maybe"}, {ImagePath: "x", EmptyNamespaces: []string{"pid"}}} {
		if _, err := o.rpc(b.spec); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", o, err)
		}
	}
	for in, want := range map[string]string{"10.0.0.1:27": "10.0.0.1 27", "[::1]:9": "::1 9", "host": "", ":9": "", "a:0": "", "a:70000": "", "a:": ""} {
		got := ""
		if p, err := pageServer(in); err == nil {
			got = fmt.Sprint(p.GetAddress(), " ", p.GetPort())
		}
		if got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
	// E2: only names of pipes and of files from outside are taken from the images.
	for in, want := range map[string]bool{
		"pipe:[12]": true, "file[1f:a0]": true, "": false, "/etc/passwd": false, "pipe:[12]x": false, "file[1:2]:x": false, "file[g:1]": false,
		"pipe:[-1]": false, "socket:[1]": false, "tty[1:2]": false, "file[1:2": false, "hako-net": false, "file[1]": false,
	} {
		if inheritable(in) != want {
			t.Errorf("%q is taken: %v", in, !want)
		}
	}
	if _, err := criu.Path(); err == nil {
		return // what follows is about its absence
	}
	c, _ := b.start("sleep", "3600")
	err := c.Checkpoint(t.Context(), CheckpointOptions{CRIUOptions: CRIUOptions{ImagePath: filepath.Join(b.bundle, "images")}})
	if !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "no program criu in $PATH") {
		t.Errorf("without CRIU: %v", err)
	}
	if st, err := c.Status(); st != Running || err != nil {
		t.Errorf("%s, %v", st, err)
	}
	images := filepath.Join(b.bundle, "images")
	if err := os.MkdirAll(images, 0o700); err != nil {
		t.Fatal(err)
	}
	r := newBox(t)
	if _, err := r.rt.Restore(t.Context(), r.id, RestoreOptions{CreateOptions: CreateOptions{Bundle: r.bundle, Spec: r.spec}, CRIUOptions: CRIUOptions{ImagePath: images}}); !errdefs.IsNotImplemented(err) {
		t.Errorf("restore without CRIU: %v", err)
	}
	if left, _ := os.ReadDir(r.rt.Root); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
