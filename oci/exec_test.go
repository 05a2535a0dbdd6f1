//go:build linux && (amd64 || arm64)

package oci

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func TestExec(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	errno := uint(unix.ENOTNAM)
	b.spec.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
		{Names: []string{"unshare"}, Action: specs.ActErrno, ErrnoRet: &errno},
	}}
	c, _ := b.start("sleep", "3600")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	out, code, err := b.exec(c, func(p *specs.Process) {
		p.User = specs.User{UID: 5, GID: 6, AdditionalGids: []uint32{7}}
		p.Cwd = "/tmp"
		p.Env = append(p.Env, "GREETING=hi")
	}, "id", "cwd", "env", "GREETING", "hostname", "fds", "status", "CapEff", "status", "CapBnd", "status", "NoNewPrivs", "status", "Seccomp", "unshare",
		"links", "readlink", "/proc/1/exe", "exit", "9")
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"5 6 [7]", "/tmp", "hi", "hako", "0 1 2", "0000000000000000", "0000000020000420", "1", "2", "error: not a XENIX named type file",
		"lo up|loopback|running", "", "error: readlink /proc/1/exe: permission denied"}
	if got := lines(out); !slices.Equal(got, want) || code != 9 {
		t.Errorf("exit %d\ngot  %q\nwant %q", code, got, want)
	}
	// It is in the container's cgroups and PID namespace.
	out, _, err = b.exec(c, nil, "cat", "/proc/self/cgroup", "pid")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range lines(out) {
		if f := strings.SplitN(l, ":", 3); len(f) == 3 && !strings.HasSuffix(f[2], "/"+b.id) && f[2] != "/" {
			t.Errorf("exec'd process is outside the container's cgroup: %s", l)
		}
	}
	if CgroupV2() {
		t.Log("cgroup paths are hidden by the cgroup namespace")
	}
	for _, tc := range []struct{ path, want string }{
		{"nosuch", `exec: "nosuch": executable file not found in $PATH`}, {"/x", `exec: "/x": stat /x: no such file or directory`},
		{"/bin", `exec: "/bin": is a directory`},
	} {
		_, _, err := b.exec(c, func(p *specs.Process) { p.Args = []string{tc.path} })
		if err == nil || !strings.HasSuffix(err.Error(), tc.want) || !strings.HasPrefix(err.Error(), "exec failed: ") {
			t.Errorf("exec %s: %v", tc.path, err)
		}
	}
	if _, _, err := b.exec(c, func(p *specs.Process) { p.User.UID = 1<<32 - 1 }, "id"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("uid -1: %v", err)
	}
	if err := c.Kill(t.Context(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	reap(t, c.Pid())
	if _, _, err := b.exec(c, nil, "true"); err == nil || !strings.Contains(err.Error(), "cannot exec in a stopped container") {
		t.Error(err)
	}
}

// typed waits until a terminal shows text, types a line, and gives all that the terminal shows to its end. The
// echo of a line that is typed before might come in the middle of another.
func typed(t *testing.T, console *os.File, text, line string) string {
	t.Helper()
	var b bytes.Buffer
	for buf := make([]byte, 4096); ; {
		n, err := console.Read(buf)
		b.Write(buf[:n])
		if err != nil { // nobody has it open inside any more
			return strings.ReplaceAll(b.String(), "\r", "")
		}
		if line != "" && strings.Contains(b.String(), text) {
			if _, err := console.WriteString(line); err != nil {
				t.Error(err)
			}
			line = ""
		}
	}
}

func TestTerminal(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	b.spec.Process.Terminal = true
	b.spec.Process.User.UID = 33
	b.spec.Process.ConsoleSize = &specs.Box{Width: 120, Height: 40}
	b.args("tty", "stat", "/dev/console", "readlink", "/proc/self/fd/0", "stat", "/proc/self/fd/0", "stat", "/dev/pts/0", "fds", "line", "exit", "4")
	c, err := b.rt.Run(t.Context(), b.id, CreateOptions{Bundle: b.bundle, Spec: b.spec})
	if err != nil {
		t.Fatal(err)
	}
	defer c.PidFD.Close()
	out := typed(t, c.Console, "0 1 2\r\n", "typed\n")
	if code := reap(t, c.Pid()); code != 4 {
		t.Errorf("exit code %d", code)
	}
	got := lines(out)
	c.Console.Close()
	got = slices.DeleteFunc(got, func(s string) bool { return s == "typed" }) // the echo
	want := []string{"tty 120x40", "20620 136:0 33:5", "/dev/pts/0", "", "20620 136:0 33:5", "0 1 2", "got typed"}
	if len(got) == len(want) {
		got[3] = ""
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if err := c.Delete(t.Context(), false); err != nil {
		t.Error(err)
	}
}

func TestExecTerminal(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c, _ := b.start("sleep", "3600")
	p, err := c.ExecProcess([]string{"/bin/guest", "tty", "readlink", "/proc/self/fd/1", "fds", "line"})
	if err != nil {
		t.Fatal(err)
	}
	p.Terminal = true
	p.ConsoleSize = &specs.Box{Width: 33, Height: 44}
	proc, err := c.Exec(t.Context(), ExecOptions{Process: p})
	if err != nil {
		t.Fatal(err)
	}
	defer proc.PidFD.Close()
	out := typed(t, proc.Console, "0 1 2\r\n", "typed\n")
	reap(t, proc.Pid)
	got := slices.DeleteFunc(lines(out), func(s string) bool { return s == "typed" })
	proc.Console.Close()
	if want := []string{"tty 33x44", "/dev/pts/0", "0 1 2", "got typed"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestStandardInputAndPreservedDescriptors(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	b.args("stdin", "fds", "readlink", "/proc/self/fd/4", "cat", "/proc/self/fd/3")
	in, err := os.CreateTemp(t.TempDir(), "in")
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	in.WriteString("from stdin")
	in.Seek(0, 0)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	w.WriteString("through three")
	w.Close()
	defer r.Close()
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	o := newOutput(t)
	c, err := b.rt.Run(t.Context(), b.id, CreateOptions{Bundle: b.bundle, Spec: b.spec, Stdin: in, Stdout: o.w, Stderr: o.w, PreserveFDs: []*os.File{r, null}})
	if err != nil {
		t.Fatal(err)
	}
	reap(t, c.Pid())
	c.PidFD.Close()
	if err := c.Delete(t.Context(), false); err != nil {
		t.Error(err)
	}
	want := []string{"got from stdin", "0 1 2 3 4", "/dev/null", "through three"}
	if got := lines(o.end()); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestHooks(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	log := filepath.Join(b.bundle, "log")
	b.write("/hooklog", "", 0o666)
	// On the host: shell; inside, the guest is what there is.
	host := func(name string) []specs.Hook {
		return []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", fmt.Sprintf(`echo %s $(cat | tr -d '\n' | sed 's/.*"status":"\([a-z]*\)".*/\1/') $X >>%s`, name, log)}, Env: []string{"X=y", "PATH=/usr/bin:/bin"}}}
	}
	// Runs before pivot_root: a path of the host, in the container's namespaces.
	setup := fmt.Sprintf(`echo createContainer $(cat | tr -d '\n' | sed 's/.*"pid":\([0-9]*\).*/\1/') $(cat /proc/sys/kernel/hostname) >>%s; tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' ' >>%s`, log, log)
	b.spec.Hooks = &specs.Hooks{
		Prestart: host("prestart"), CreateRuntime: host("createRuntime"), Poststart: host("poststart"), Poststop: host("poststop"),
		CreateContainer: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", setup}, Env: []string{"PATH=/usr/bin:/bin"}}},
		StartContainer:  []specs.Hook{{Path: "/bin/guest", Args: []string{"guest", "write", "/hooklog", "startContainer"}}},
	}
	out, code := b.run("cat", "/hooklog", "exit", "3")
	if out != "startContainer\n" || code != 3 {
		t.Errorf("in the container: %q, %d", out, code)
	}
	raw, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	hostname, _ := os.Hostname()
	want := []string{"prestart created y", "createRuntime created y", "createContainer 1 " + hostname, "lo", "poststart running y", "poststop stopped y"}
	if got := lines(string(raw)); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestFailingHooksLeaveNothing(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"prestart", "createRuntime", "createContainer", "startContainer", "poststart"} {
		b := newBox(t)
		one := 1
		h := []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "echo no good; exit 5"}}}
		want := "exit status 5, output: no good"
		switch kind {
		case "prestart":
			h[0].Args = []string{"sh", "-c", "sleep 100"}
			h[0].Timeout = &one
			want = "timed out after 1 s"
			b.spec.Hooks = &specs.Hooks{Prestart: h}
		case "createRuntime":
			b.spec.Hooks = &specs.Hooks{CreateRuntime: h}
		case "createContainer":
			b.spec.Hooks = &specs.Hooks{CreateContainer: h}
		case "startContainer":
			b.spec.Hooks = &specs.Hooks{StartContainer: []specs.Hook{{Path: "/bin/guest", Args: []string{"guest", "echo", "no good", "exit", "5"}}}}
		case "poststart":
			b.spec.Hooks = &specs.Hooks{Poststart: h}
		}
		ran := filepath.Join(b.bundle, "poststop")
		b.spec.Hooks.Poststop = []specs.Hook{
			{Path: "/bin/false"}, {Path: "/bin/sh", Args: []string{"sh", "-c", "grep -o stopped >>" + ran}, Env: []string{"PATH=/usr/bin:/bin"}},
		}
		_, _, err := b.tryRun("sleep", "3600")
		if kind == "startContainer" || kind == "poststart" {
			// Once more, in two steps.
			if raw, err := os.ReadFile(ran); err != nil || string(raw) != "stopped\n" {
				t.Errorf("%s: poststop hooks of run: %q %v", kind, raw, err)
			}
			os.Remove(ran)
			c, cerr := b.rt.Create(t.Context(), b.id, CreateOptions{Bundle: b.bundle, Spec: b.spec})
			if cerr != nil {
				t.Fatal(cerr)
			}
			err = c.Start(t.Context())
			reap(t, c.Pid())
			c.PidFD.Close()
			if err := c.Delete(t.Context(), true); !errdefs.IsNotFound(err) {
				t.Errorf("%s: the container is still there: %v", kind, err)
			}
		}
		if raw, err := os.ReadFile(ran); err != nil || string(raw) != "stopped\n" {
			t.Errorf("%s: poststop hooks: %q %v", kind, raw, err)
		}
		if err == nil || !strings.Contains(err.Error(), "error running "+kind+" hook #0") || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", kind, err)
		}
		if left, _ := b.rt.List(); len(left) != 0 {
			t.Errorf("%s: left %d containers", kind, len(left))
		}
		if _, err := os.Stat("/sys/fs/cgroup/pids/" + b.id); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: left a cgroup: %v", kind, err)
		}
	}
}

func TestKillAllAndForcedDelete(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	// Without a PID namespace of its own, processes survive the first one.
	b.spec.Linux.Namespaces = slices.DeleteFunc(b.spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == "pid" })
	b.spec.Linux.MaskedPaths, b.spec.Linux.ReadonlyPaths = nil, nil
	c, o := b.start("spawn", "sleep", "3600")
	o.await(t, "spawned")
	pids, err := c.Processes()
	if err != nil || len(pids) != 2 {
		t.Fatalf("processes %v %v: %s", pids, err, o.peek())
	}
	done := make(chan int, 1)
	go func() { done <- reap(t, c.Pid()) }()
	if err := c.Delete(context.Background(), true); err != nil {
		t.Fatal(err)
	}
	<-done
	for _, pid := range pids {
		if _, s, err := startTime(pid); err == nil && s != 'Z' && s != 'X' {
			t.Errorf("process %d lives", pid)
		}
	}
}

// HOME is the runtime's to set where the caller has not, from the container's own
// /etc/passwd, whose links lead nowhere outside.
func TestHome(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	write := func(content string) {
		if err := os.WriteFile(filepath.Join(b.rootfs, "etc/passwd"), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("root:x:0:0::/root:/bin/sh\nuser:x:7:7::/home/user:\nodd:x:8:8::relative:\nshort:x:9\n")
	for uid, want := range map[uint32]string{0: "/root", 7: "/home/user", 8: "/", 9: "/", 10: "/"} {
		b.spec.Process.User.UID = uid
		if out, _ := b.run("env", "HOME"); strings.TrimSpace(out) != want {
			t.Errorf("user %d: HOME=%q, want %q", uid, out, want)
		}
	}
	b.spec.Process.Env = append(b.spec.Process.Env, "HOME=/mine")
	if out, _ := b.run("env", "HOME"); strings.TrimSpace(out) != "/mine" {
		t.Errorf("HOME=%q", out)
	}
	b.spec.Process.Env, b.spec.Process.User.UID = append([]string{"HOME="}, b.spec.Process.Env[:len(b.spec.Process.Env)-1]...), 7
	if out, _ := b.run("env", "HOME"); strings.TrimSpace(out) != "/home/user" {
		t.Errorf("an empty HOME becomes %q", out)
	}
	// The same of a root that mounts make.
	lower, upper, work := t.TempDir(), t.TempDir(), t.TempDir()
	if err := os.MkdirAll(filepath.Join(lower, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(lower, "etc/passwd"), []byte("user:x:7:7::/lower:\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for want, m := range map[string]specs.Mount{
		"/lower":     {Type: "overlay", Source: "overlay", Options: []string{"lowerdir=" + lower + ":" + b.rootfs, "upperdir=" + upper, "workdir=" + work}},
		"/home/user": {Type: "bind", Source: b.rootfs, Options: []string{"rbind"}},
	} {
		o := newOutput(t)
		b.spec.Process.User.UID, b.spec.Process.Env = 7, []string{"PATH=/bin", "GOMAXPROCS=1"}
		b.args("env", "HOME")
		c, err := b.rt.Run(t.Context(), b.id, CreateOptions{Bundle: b.bundle, Spec: b.spec, Stdout: o.w, Stderr: o.w, Rootfs: []specs.Mount{m}})
		if err != nil {
			t.Fatal(err)
		}
		reap(t, c.Pid())
		c.PidFD.Close()
		if err := c.Delete(context.Background(), true); err != nil {
			t.Error(err)
		}
		if got := strings.TrimSpace(o.end()); got != want {
			t.Errorf("%s: HOME=%q, want %q", m.Type, got, want)
		}
	}
	if err := os.Remove(filepath.Join(b.rootfs, "etc/passwd")); err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(t.TempDir(), "passwd")
	if err := os.WriteFile(secret, []byte("root:x:0:0::/secret:\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(secret, filepath.Join(b.rootfs, "etc/passwd")); err != nil {
		t.Fatal(err)
	}
	if got := home(rootAt(b.rootfs), 0); got != "/" {
		t.Errorf("HOME=%q through a link to the host", got)
	}
}
