package integration

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// TestSystemdDriver is a daemon on a machine where systemd is PID 1: each container is a
// scope that systemd knows, with its limits, and is gone with the container.
func TestSystemdDriver(t *testing.T) {
	if comm, err := os.ReadFile("/proc/1/comm"); err != nil || strings.TrimSpace(string(comm)) != "systemd" {
		t.Skipf("needs systemd as PID 1: %s", t.Name())
	}
	n := own(t)
	if got := n.docker(t, "info", "-f", "{{.CgroupDriver}}"); got != "systemd" {
		t.Fatalf("cgroup driver is %s", got)
	}
	show := func(unit, property string) string {
		t.Helper()
		out, err := exec.Command("systemctl", "show", "-P", property, unit).Output()
		if err != nil {
			t.Fatalf("systemctl show %s: %v", unit, err)
		}
		return strings.TrimSpace(string(out))
	}
	memory := "MemoryMax"
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err != nil {
		memory = "MemoryLimit" // cgroup v1
	}
	id := n.docker(t, "run", "-d", "--name", "one", "-m", "64m", testImage, "sleep", "1000")
	unit := "hako-" + id + ".scope"
	for property, want := range map[string]string{"ActiveState": "active", "Slice": "system.slice", memory: "67108864"} {
		if got := show(unit, property); got != want {
			t.Errorf("%s of %s is %q, want %q", property, unit, got, want)
		}
	}
	n.docker(t, "update", "-m", "96m", "--memory-swap", "96m", "one")
	if got := show(unit, memory); got != "100663296" {
		t.Errorf("%s after the update: %s", memory, got)
	}
	n.expect(t, 0, "96MiB", "stats", "--no-stream", "one")
	n.expect(t, 0, "in", "exec", "one", "echo", "in")
	two := n.docker(t, "run", "-d", "--name", "two", "--cgroup-parent", "hakotest.slice", testImage, "sleep", "1000")
	if got := show("hako-"+two+".scope", "Slice"); got != "hakotest.slice" {
		t.Errorf("slice of the second: %s", got)
	}
	n.expect(t, 125, `cgroup-parent for systemd cgroup should be a valid slice named as "xxx.slice"`, "run", "--rm", "--cgroup-parent", "/x", testImage, "true")

	// Another daemon takes them up, and so does one that finds a dead shim.
	if err := n.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	shims, err := n.processes()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range shims {
		if pid, cmdline, _ := strings.Cut(p, " "); strings.Contains(cmdline, "hako-shim") && strings.Contains(cmdline, two) {
			if err := exec.Command("kill", "-KILL", pid).Run(); err != nil {
				t.Error(err)
			}
		}
	}
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	if got := n.state(t, "one"); !strings.HasPrefix(got, "running") {
		t.Errorf("the first is %s", got)
	}
	eventually(t, "the end of a container without a shim", func() bool { return strings.HasPrefix(n.state(t, "two"), "exited") })
	eventually(t, "the end of its scope", func() bool { return show("hako-"+two+".scope", "ActiveState") == "inactive" })
	n.docker(t, "start", "two")
	n.docker(t, "rm", "-f", "one", "two")
	for _, u := range []string{unit, "hako-" + two + ".scope"} {
		eventually(t, "the end of "+u, func() bool { return show(u, "LoadState") == "not-found" })
	}
	_ = exec.Command("systemctl", "stop", "hakotest.slice").Run()
}
