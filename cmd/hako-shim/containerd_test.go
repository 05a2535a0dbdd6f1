package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hako-engine/hako/internal/execfile"
	"github.com/hako-engine/hako/shim/wire"
)

// ctd is an upstream containerd of our own, with this shim installed.
type ctd struct {
	t      *testing.T
	dir    string
	ns     string
	rootfs string
	cmd    *exec.Cmd
}

func newContainerd(t *testing.T) *ctd {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skipf("needs root: %s", t.Name())
	}
	for _, tool := range []string{"containerd", "ctr"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s (Debian's containerd): %s", tool, t.Name())
		}
	}
	c := &ctd{t: t, dir: t.TempDir(), ns: fmt.Sprintf("shimtest-%d", os.Getpid())}
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(c.dir, "bin/containerd-shim-hako-v2"), ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	c.rootfs = filepath.Join(c.dir, "rootfs")
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("needs Debian's busybox-static: %v", err)
	}
	for _, d := range []string{"bin", "proc", "dev", "sys", "tmp", "run", "etc"} {
		os.MkdirAll(filepath.Join(c.rootfs, d), 0o755)
	}
	execfile.Write(filepath.Join(c.rootfs, "bin/busybox"), busybox, 0o755)
	for _, name := range []string{"sh", "echo", "cat", "sleep", "true"} {
		os.Symlink("busybox", filepath.Join(c.rootfs, "bin", name))
	}
	os.WriteFile(filepath.Join(c.dir, "config.toml"), fmt.Appendf(nil, `version = 2
root = %q
state = %q
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = %q
`, filepath.Join(c.dir, "root"), filepath.Join(c.dir, "state"), c.socket()), 0o600)
	c.start()
	t.Cleanup(c.close)
	return c
}

// hangLimit ends what hangs. Nothing is measured by it.
const hangLimit = 5 * time.Minute

func (c *ctd) socket() string { return filepath.Join(c.dir, "c.sock") }

func (c *ctd) start() {
	c.t.Helper()
	log, err := os.OpenFile(filepath.Join(c.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		c.t.Fatal(err)
	}
	defer log.Close()
	c.cmd = exec.Command("containerd", "--config", filepath.Join(c.dir, "config.toml"))
	c.cmd.Env = append(os.Environ(), "PATH="+filepath.Join(c.dir, "bin")+":"+os.Getenv("PATH"))
	c.cmd.Stdout, c.cmd.Stderr = log, log
	if err := c.cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	for deadline := time.Now().Add(hangLimit); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if _, _, err := c.ctr("version"); err == nil {
			return
		}
	}
	b, _ := os.ReadFile(log.Name())
	c.t.Fatalf("containerd does not start: %s", b)
}

func (c *ctd) stop() {
	c.cmd.Process.Signal(syscall.SIGTERM)
	c.cmd.Wait()
}

// close ends everything, and checks that no shim is left.
func (c *ctd) close() {
	out, _, _ := c.ctr("containers", "ls", "-q")
	for id := range strings.FieldsSeq(out) {
		c.ctr("task", "rm", "-f", id)
		c.ctr("containers", "rm", id)
	}
	for deadline := time.Now().Add(hangLimit); ; {
		left := c.shims()
		if len(left) == 0 {
			break
		}
		if time.Now().After(deadline) {
			c.t.Errorf("shims are left: %v", left)
			for pid := range left {
				syscall.Kill(pid, syscall.SIGKILL)
			}
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	c.stop()
	// The parent that ctr puts containers into, in every hierarchy.
	if dirs, err := filepath.Glob("/sys/fs/cgroup/*/" + c.ns); err == nil {
		for _, d := range dirs {
			os.Remove(d)
		}
	}
}

// shims gives the pids of our shims, with their command lines.
func (c *ctd) shims() map[int]string {
	out := map[int]string{}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		b, _ := os.ReadFile(d + "/cmdline")
		if bytes.HasPrefix(b, []byte(filepath.Join(c.dir, "bin"))) {
			var pid int
			fmt.Sscan(filepath.Base(d), &pid)
			out[pid] = string(bytes.ReplaceAll(b, []byte{0}, []byte{' '}))
		}
	}
	return out
}

func (c *ctd) ctr(args ...string) (stdout, stderr string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "ctr", append([]string{"-a", c.socket(), "-n", c.ns}, args...)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = time.Minute
	err = cmd.Run()
	return out.String(), errs.String(), err
}

func (c *ctd) must(args ...string) string {
	c.t.Helper()
	out, errs, err := c.ctr(args...)
	if err != nil {
		c.t.Fatalf("ctr %v: %v: %s%s", args, err, out, errs)
	}
	return out
}

// TestUnderContainerd runs containers of an upstream containerd with this shim.
func TestUnderContainerd(t *testing.T) {
	c := newContainerd(t)
	run := []string{"run", "--runtime", runtimeName}
	if out := c.must(append(run, "--rm", "--rootfs", c.rootfs, "a", "/bin/echo", "hello")...); out != "hello\n" {
		t.Errorf("output %q", out)
	}
	_, errs, err := c.ctr(append(run, "--rm", "--rootfs", c.rootfs, "a", "/bin/sh", "-c", "echo oops >&2; exit 7")...)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 7 || errs != "oops\n" {
		t.Errorf("exit %v, stderr %q", err, errs)
	}
	_, errs, err = c.ctr(append(run, "--rm", "--rootfs", c.rootfs, "a", "/nosuch")...)
	if err == nil || !strings.Contains(errs, "/nosuch") {
		t.Errorf("missing command: %v, %q", err, errs)
	}
	c.ctr("containers", "rm", "a")

	c.must(append(run, "-d", "--memory-limit", "33554432", "--rootfs", c.rootfs, "b", "/bin/sleep", "100000")...)
	if out := c.must("task", "exec", "--exec-id", "x", "b", "/bin/echo", "from exec"); out != "from exec\n" {
		t.Errorf("exec %q", out)
	}
	if out := c.must("task", "metrics", "b"); !strings.Contains(out, "33554432") && !strings.Contains(out, "memory.usage") {
		t.Errorf("metrics %s", out)
	}
	if out := c.must("task", "ps", "b"); len(strings.Split(strings.TrimSpace(out), "\n")) != 2 {
		t.Errorf("ps %s", out)
	}
	c.must("task", "pause", "b")
	if out := c.must("task", "ls"); !strings.Contains(out, "PAUSED") {
		t.Errorf("tasks %s", out)
	}
	c.must("task", "resume", "b")

	// The daemon is restarted under a running container.
	c.stop()
	c.start()
	if out := c.must("task", "ls"); !strings.Contains(out, "RUNNING") {
		t.Errorf("tasks after restart: %s", out)
	}
	if out := c.must("task", "exec", "--exec-id", "y", "b", "/bin/echo", "again"); out != "again\n" {
		t.Errorf("exec after restart %q", out)
	}

	// A container of the same group shares the shim.
	before := len(c.shims())
	c.must(append(run, "-d", "--annotation", "io.containerd.runc.v2.group=pod", "--rootfs", c.rootfs, "p1", "/bin/sleep", "100000")...)
	c.must(append(run, "-d", "--annotation", "io.containerd.runc.v2.group=pod", "--rootfs", c.rootfs, "p2", "/bin/sleep", "100000")...)
	if n := len(c.shims()); n != before+1 {
		t.Errorf("%d shims, %d before: %v", n, before, c.shims())
	}

	// The shim is killed: containerd cleans up with `delete`.
	address, _ := os.ReadFile(filepath.Join(c.dir, "state/io.containerd.runtime.v2.task", c.ns, "b/address"))
	pid := 0
	for p, line := range c.shims() {
		if strings.Contains(line, " -id b ") {
			pid = p
		}
	}
	syscall.Kill(pid, syscall.SIGKILL)
	deadline := time.Now().Add(hangLimit)
	for {
		if out, _, _ := c.ctr("task", "ls"); !strings.Contains(out, "b ") {
			break
		}
		if time.Now().After(deadline) {
			t.Errorf("task of a dead shim stays: %s", c.must("task", "ls"))
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	for {
		_, err := os.Stat(strings.TrimPrefix(string(address), "unix://"))
		if len(address) > 0 && errors.Is(err, os.ErrNotExist) {
			break
		}
		if time.Now().After(deadline) {
			t.Errorf("socket %q of the dead shim: %v", address, err)
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	for _, id := range []string{"p1", "p2"} {
		c.must("task", "rm", "-f", id)
		c.must("containers", "rm", id)
	}
	c.must("containers", "rm", "b")
}

// TestBootstrap speaks the form of the protocol that containerd from 2.3 on uses.
func TestBootstrap(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skipf("needs root: %s", t.Name())
	}
	dir := t.TempDir()
	bin := filepath.Join(dir, "containerd-shim-hako-v2")
	build := exec.Command("go", "build", "-o", bin, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	bundle := filepath.Join(dir, "bundle")
	os.MkdirAll(bundle, 0o700)
	os.WriteFile(filepath.Join(bundle, "config.json"), []byte(`{"ociVersion":"1.0.2"}`), 0o600)
	sockets := filepath.Join(dir, "s")
	start := func(stdin []byte, args ...string) []byte {
		t.Helper()
		cmd := exec.Command(bin, append(args, "start")...)
		cmd.Dir, cmd.Stdin = bundle, bytes.NewReader(stdin)
		out, err := cmd.Output()
		if err != nil {
			var exit *exec.ExitError
			errors.As(err, &exit)
			t.Fatalf("start: %v: %s", err, exit.Stderr)
		}
		return out
	}
	params := wire.Marshal(&wire.BootstrapParams{
		InstanceID: "x", Namespace: "ns", ContainerdVersion: "2.4.2", GRPCAddress: "/nosuch", SocketDir: sockets,
	})
	var res wire.BootstrapResult
	if err := wire.Unmarshal(start(params), &res); err != nil || res.Version != 3 || res.Protocol != "ttrpc" || !strings.HasPrefix(res.Address, "unix://"+sockets) {
		t.Fatalf("%+v, %v", res, err)
	}
	if b, _ := os.ReadFile(filepath.Join(bundle, "address")); string(b) != res.Address {
		t.Errorf("address file %q", b)
	}
	path := strings.TrimPrefix(res.Address, "unix://")
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", st, err)
	}
	conn, err := wire.Dial(path)
	if err != nil {
		t.Fatal(err)
	}
	c := wire.NewClient(conn, "")
	defer c.Close()
	call := func(method string, req, resp wire.Message) error {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		return c.Call(ctx, wire.ServiceTaskV3, method, req, resp)
	}
	var who wire.ConnectResponse
	if err := call("Connect", &wire.ProcessRequest{}, &who); err != nil || who.ShimPid == 0 {
		t.Errorf("%+v, %v", who, err)
	}
	// The same group leads to the same shim.
	var again wire.BootstrapResult
	if err := wire.Unmarshal(start(params), &again); err != nil || again.Address != res.Address {
		t.Errorf("%+v, %v", again, err)
	}
	call("Shutdown", &wire.ShutdownRequest{Now: true}, nil) // the second start has reserved the shim
	select {
	case <-c.Done():
	case <-time.After(5 * time.Minute):
		t.Error("the shim does not end")
		syscall.Kill(int(who.ShimPid), syscall.SIGKILL)
	}

	out, err := exec.Command(bin, "-v").Output()
	if err != nil || !strings.Contains(string(out), "Version:") {
		t.Errorf("-v: %s, %v", out, err)
	}
	out, err = exec.Command(bin, "-info").Output()
	var info wire.RuntimeInfo
	if err != nil || wire.Unmarshal(out, &info) != nil || info.Name != runtimeName {
		t.Errorf("-info: %+v, %v", info, err)
	}
	if info.Features == nil || !strings.Contains(string(info.Features.Value), `"rro"`) {
		t.Errorf("-info: features %+v", info.Features)
	}
	// Of a program that the options name.
	other := filepath.Join(t.TempDir(), "other")
	if err := execfile.Write(other, []byte("#!/bin/sh\necho '{\"mountOptions\":[\"'$1'\"]}'\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "-info")
	cmd.Stdin = bytes.NewReader(wire.Marshal(&wire.Any{TypeURL: wire.RuntimeOptionsURL, Value: wire.Marshal(&wire.RuntimeOptions{BinaryName: other})}))
	out, err = cmd.Output()
	info = wire.RuntimeInfo{}
	if err != nil || wire.Unmarshal(out, &info) != nil || info.Features == nil || strings.TrimSpace(string(info.Features.Value)) != `{"mountOptions":["features"]}` {
		t.Errorf("-info: %+v, %v", info.Features, err)
	}
	if err := exec.Command(bin, "nosuch").Run(); err == nil {
		t.Error("unknown command is taken")
	}
}
