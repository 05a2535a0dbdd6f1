package integration

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
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

	args := []string{"--config", filepath.Join(n.dir, "none.toml"), "--root", filepath.Join(n.dir, "lib"),
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
