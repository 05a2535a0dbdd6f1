package ociexec

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/execfile"
	"github.com/hako-engine/hako/shim"
)

// fake makes a runtime of a shell script. It sees its command as $cmd, the log as
// $log and the pid file as $pidfile; every call is recorded in DIR/calls.
func fake(t *testing.T, script string) (*Runtime, string) {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "fake-runtime")
	text := `#!/bin/sh
echo "$@" >> ` + dir + `/calls
prev=
for a; do
	case "$prev" in
	--log) log=$a ;;
	--pid-file) pidfile=$a ;;
	--process) process=$a ;;
	esac
	case "$a" in create|start|exec|kill|delete|pause|resume|update|ps) [ -n "$cmd" ] || cmd=$a ;; esac
	prev=$a
done
fail() { echo '{"level":"info","msg":"x"}' >> $log; echo "{\"level\":\"error\",\"msg\":\"$1\"}" >> $log; exit 1; }
` + script
	if err := execfile.Write(path, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	return &Runtime{Binary: path, Root: filepath.Join(dir, "state")}, dir
}

func calls(t *testing.T, dir string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "calls"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestCommands(t *testing.T) {
	r, dir := fake(t, `case $cmd in
create) printf 42 > $pidfile; cat; echo "to stdout"; echo "to stderr" >&2 ;;
exec) grep -q '"args":\["/bin/true"\]' $process || fail "no process"; printf 43 > $pidfile ;;
ps) echo "[42,43]" ;;
update) cat > `+"$log"+`.res; grep -q '"limit":7' $log.res && rm $log.res || fail "no resources" ;;
esac`)
	r.SystemdCgroup = true
	bundle := t.TempDir()
	outR, outW, _ := os.Pipe()
	errR, errW, _ := os.Pipe()
	inR, inW, _ := os.Pipe()
	io.WriteString(inW, "from stdin\n")
	inW.Close()
	ctx := context.Background()
	c, err := r.Create(ctx, "c1", shim.CreateOptions{Bundle: bundle, Stdin: inR, Stdout: outW, Stderr: errW, NoPivot: true, NoNewKeyring: true})
	if err != nil {
		t.Fatal(err)
	}
	outW.Close()
	errW.Close()
	out, _ := io.ReadAll(outR)
	errs, _ := io.ReadAll(errR)
	if string(out) != "from stdin\nto stdout\n" || string(errs) != "to stderr\n" || c.Init().Pid != 42 {
		t.Errorf("out %q, err %q, %+v", out, errs, c.Init())
	}
	limit := int64(7)
	p, err := c.Exec(ctx, shim.ExecOptions{Process: &specs.Process{Args: []string{"/bin/true"}, Cwd: "/"}})
	if err != nil || p.Pid != 43 {
		t.Errorf("exec: %+v, %v", p, err)
	}
	pids, err := c.Pids(ctx)
	if err != nil || !reflect.DeepEqual(pids, []int{42, 43}) {
		t.Errorf("pids %v, %v", pids, err)
	}
	for name, err := range map[string]error{
		"start": c.Start(ctx), "pause": c.Pause(ctx), "resume": c.Resume(ctx),
		"kill": c.Kill(ctx, unix.SIGTERM, true), "delete": c.Delete(ctx),
		"update": c.Update(ctx, &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}),
	} {
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := c.Stats(ctx); !errdefs.IsNotImplemented(err) {
		t.Errorf("stats: %v", err)
	}
	got := calls(t, dir)
	for _, want := range []string{
		"--log-format json --systemd-cgroup create --bundle " + bundle + " --no-pivot --no-new-keyring --pid-file ",
		"kill --all c1 15", "delete --force c1", "start c1", "update --resources - c1", "exec --detach --process ",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no call %q in\n%s", want, got)
		}
	}
	if left, _ := os.ReadDir(bundle); len(left) != 0 {
		t.Errorf("left in the bundle: %v", left)
	}
}

func TestErrors(t *testing.T) {
	for _, c := range []struct {
		command, text string
		class         error
	}{
		{"create", "container with given ID already exists", errdefs.ErrAlreadyExists},
		{"create", `exec: \"nosuch\": executable file not found in $PATH`, errdefs.ErrUnknown},
		{"create", `exec: \"/etc\": permission denied`, errdefs.ErrUnknown},
		{"start", "container does not exist", errdefs.ErrNotFound},
		{"start", "cannot start an already running container", errdefs.ErrFailedPrecondition},
		{"kill", "container not running", errdefs.ErrNotFound},
		{"kill", "os: process already finished", errdefs.ErrNotFound},
		{"pause", "container not running", errdefs.ErrFailedPrecondition},
		{"resume", "container not paused", errdefs.ErrFailedPrecondition},
		{"start", "strange", errdefs.ErrUnknown},
	} {
		r, dir := fake(t, "[ $cmd = "+c.command+" ] && fail '"+c.text+"'; exit 0")
		ctx := context.Background()
		k := &container{r: r, id: "c", bundle: dir}
		var err error
		switch c.command {
		case "create":
			_, err = r.Create(ctx, "c", shim.CreateOptions{Bundle: dir})
			if !strings.Contains(calls(t, dir), "delete --force c") {
				t.Error("a failed create leaves the runtime's state")
			}
		case "start":
			err = k.Start(ctx)
		case "kill":
			err = k.Kill(ctx, unix.SIGKILL, false)
		case "pause":
			err = k.Pause(ctx)
		case "resume":
			err = k.Resume(ctx)
		}
		text := strings.ReplaceAll(c.text, `\"`, `"`)
		if !errors.Is(err, c.class) || !strings.Contains(err.Error(), c.command+": "+text) {
			t.Errorf("%s, %s: %v", c.command, c.text, err)
		}
	}
	r := &Runtime{Binary: "/nosuch", Root: t.TempDir()}
	if _, err := r.Create(context.Background(), "c", shim.CreateOptions{Bundle: t.TempDir()}); !errdefs.IsUnavailable(err) {
		t.Errorf("missing runtime: %v", err)
	}
	// What is gone is gone.
	r, dir := fake(t, "fail 'container does not exist'")
	if err := r.Remove(context.Background(), "c", dir); err != nil {
		t.Errorf("remove of nothing: %v", err)
	}
	// Without a log the text comes from stderr.
	r, dir = fake(t, "echo plain words >&2; exit 3")
	if err := (&container{r: r, id: "c", bundle: dir}).Start(context.Background()); err == nil || !strings.Contains(err.Error(), "plain words") {
		t.Errorf("error %v", err)
	}
}

func TestHangingRuntime(t *testing.T) {
	r, dir := fake(t, "exec sleep 10000") // whoever waited for it, would hang
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	err := (&container{r: r, id: "c", bundle: dir}).Start(ctx)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

func TestConsoleSocket(t *testing.T) {
	c, err := newConsoleSocket()
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	conn, err := net.Dial("unix", c.path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	r, w, _ := os.Pipe()
	defer r.Close()
	conn.(*net.UnixConn).WriteMsgUnix([]byte("/dev/ptmx"), unix.UnixRights(int(w.Fd())), nil)
	w.Close()
	f, err := c.receive()
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(f, "through")
	f.Close()
	if b, err := io.ReadAll(r); string(b) != "through" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
}

func TestMounts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skipf("needs root: %s", t.Name())
	}
	dir := t.TempDir()
	source, rootfs := filepath.Join(dir, "source"), filepath.Join(dir, "rootfs")
	os.MkdirAll(filepath.Join(source, "sub"), 0o755)
	os.Symlink("/", filepath.Join(source, "out"))
	defer unmountAll(rootfs)
	err := mountAll(rootfs, []shim.Mount{
		{Type: "bind", Source: source, Options: []string{"rbind", "ro"}},
		{Type: "tmpfs", Source: "tmpfs", Target: "/sub", Options: []string{"nosuid", "size=64k", "mode=700"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(rootfs, "x"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("write to a read-only root: %v", err)
	}
	if err := os.WriteFile(filepath.Join(rootfs, "sub/x"), nil, 0o600); err != nil {
		t.Error(err)
	}
	// A link in the image does not lead a mount out of it.
	err = mountOne(rootfs, shim.Mount{Type: "tmpfs", Source: "tmpfs", Target: "/out/proc"})
	info, _ := os.ReadFile("/proc/self/mountinfo")
	if err == nil || bytes.Contains(info, []byte(" /proc "+"rw - tmpfs")) {
		t.Errorf("mount by way of a link: %v", err)
	}
	for range 2 {
		if err := unmountAll(rootfs); err != nil {
			t.Error(err)
		}
	}
	if info, _ := os.ReadFile("/proc/self/mountinfo"); bytes.Contains(info, []byte(rootfs)) {
		t.Error("mounts are left")
	}
}
