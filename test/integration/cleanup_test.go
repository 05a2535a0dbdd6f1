package integration

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/hako-engine/hako/internal/execfile"
)

// TestCleanup runs `hakod cleanup` after a daemon that was killed: running, paused and
// stopped containers end, those with a live shim as well as one whose shim is dead,
// and nothing is left on the machine.
func TestCleanup(t *testing.T) {
	n := own(t)
	n.docker(t, "network", "create", "-o", "com.docker.network.bridge.name="+n.bridge+"e", "extra")
	n.docker(t, "run", "-d", "--name", "runs", "-p", "127.0.0.1::8080", testImage, "sleep", "1000")
	n.docker(t, "run", "-d", "--name", "more", "--network", "extra", testImage, "sleep", "1000")
	n.docker(t, "run", "-d", "--name", "paused", testImage, "sleep", "1000")
	n.docker(t, "pause", "paused")
	n.docker(t, "run", "-d", "--name", "orphan", testImage, "sleep", "1000")
	n.docker(t, "run", "--name", "ended", testImage, "true")
	id := n.docker(t, "inspect", "-f", "{{.Id}}", "orphan")

	args := []string{"--config", os.DevNull, "--root", filepath.Join(n.dir, "lib"),
		"--state", filepath.Join(n.dir, "run"), "--bridge-name", n.bridge, "cleanup"}
	if out, err := exec.Command(filepath.Join(workDir, "hakod"), args...).CombinedOutput(); err == nil || !strings.Contains(string(out), "another daemon") {
		t.Errorf("beside a daemon that runs: %v %s", err, out)
	}
	if err := n.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	shims, err := n.processes()
	if err != nil {
		t.Fatal(err)
	}
	killed := false
	for _, p := range shims {
		pid, cmdline, _ := strings.Cut(p, " ")
		if strings.Contains(cmdline, "hako-shim") && strings.Contains(cmdline, id) {
			killed = exec.Command("kill", "-KILL", pid).Run() == nil
		}
	}
	if !killed {
		t.Fatalf("no shim of %s among %q", id, shims)
	}
	if out, err := exec.Command(filepath.Join(workDir, "hakod"), args...).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	// Nothing is waited for: what cleanup has not removed when it returns stays.
	now, err := n.census()
	if err != nil {
		t.Fatal(err)
	}
	if left := now.diff(n.before); len(left) > 0 {
		t.Errorf("left behind:\n\t%s", strings.Join(left, "\n\t"))
	}
	for _, p := range []string{"run/containers", "run/network/netns"} {
		if entries, err := os.ReadDir(filepath.Join(n.dir, p)); err != nil || len(entries) > 0 {
			t.Errorf("%s holds %v, %v", p, entries, err)
		}
	}
	if _, err := net.InterfaceByName(n.bridge + "e"); err == nil {
		t.Error("the bridge of a user's network is left")
	}
	if tables, err := exec.Command("nft", "list", "tables").Output(); err == nil && strings.Contains(string(tables), n.bridge) {
		t.Errorf("tables:\n%s", tables)
	}
	// The images are still there, and so are the containers, which a later daemon can start.
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	if got := n.state(t, "runs"); !strings.HasPrefix(got, "exited") {
		t.Errorf("after cleanup the container is %s", got)
	}
	n.docker(t, "start", "runs")
}

// TestCleanupHungShim has `hakod cleanup` end a shim that does not answer: one that is
// stopped with a container, and one whose binary was replaced since it began.
func TestCleanupHungShim(t *testing.T) {
	n := own(t)
	n.docker(t, "volume", "create", "--opt", "type=tmpfs", "--opt", "device=tmpfs", "scratch")
	n.docker(t, "run", "-d", "--name", "hung", "-p", "127.0.0.1::8080", "--tmpfs", "/t", "-v", "scratch:/s", testImage, "sleep", "1000")
	n.docker(t, "run", "-d", "--name", "live", testImage, "sleep", "1000")
	id := n.docker(t, "inspect", "-f", "{{.Id}}", "hung")
	// What only looks like its shim is left alone: a program with the same arguments.
	double := exec.Command("sh", "-c", "read x", "-bundle", filepath.Join(n.dir, "run", "containers", id), "serve")
	if _, err := double.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := double.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { double.Process.Kill(); double.Wait() }()
	if err := n.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	shims, err := n.processes()
	if err != nil {
		t.Fatal(err)
	}
	stopped := 0
	for _, p := range shims {
		if pid, cmdline, _ := strings.Cut(p, " "); strings.Contains(cmdline, "hako-shim") && strings.Contains(cmdline, id) {
			if err := exec.Command("kill", "-STOP", pid).Run(); err != nil {
				t.Fatal(err)
			}
			stopped++
		}
	}
	if stopped != 1 {
		t.Fatalf("stopped %d shims of %s among %q", stopped, id, shims)
	}
	// An update has replaced the binary that the shim runs.
	updated := filepath.Join(n.dir, "hako-shim")
	binary, err := os.ReadFile(filepath.Join(workDir, "hako-shim"))
	if err == nil {
		err = execfile.Write(updated, binary, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(filepath.Join(workDir, "hakod"), "--config", os.DevNull, "--root", filepath.Join(n.dir, "lib"), "--shim-binary", updated,
		"--state", filepath.Join(n.dir, "run"), "--bridge-name", n.bridge, "cleanup").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "killed a shim") || strings.Count(string(out), "killed a shim") != 1 {
		t.Errorf("%v\n%s", err, out)
	}
	if err := double.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("the double: %v", err)
	}
	double.Process.Kill()
	double.Wait()
	now, err := n.census()
	if err != nil {
		t.Fatal(err)
	}
	if left := now.diff(n.before); len(left) > 0 {
		t.Errorf("left behind:\n\t%s", strings.Join(left, "\n\t"))
	}
	if entries, err := os.ReadDir(filepath.Join(n.dir, "run/containers")); err != nil || len(entries) > 0 {
		t.Errorf("bundles: %v, %v", entries, err)
	}
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	n.docker(t, "start", "hung")
}
