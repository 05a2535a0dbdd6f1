//go:build linux && (amd64 || arm64)

package oci

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/oci/cgroup"
)

// needSystemd skips a test of the systemd cgroup driver where systemd is not PID 1.
func needSystemd(t *testing.T) {
	t.Helper()
	needRoot(t)
	if comm, err := os.ReadFile("/proc/1/comm"); err != nil || string(comm) != "systemd\n" {
		t.Skipf("needs systemd as PID 1: %s", t.Name())
	}
}

func newSystemdBox(t *testing.T) *box {
	needSystemd(t)
	b := newBox(t)
	b.rt.CgroupDriver = "systemd"
	b.spec.Linux.CgroupsPath = "hakotest-sub.slice:pre:" + b.id
	return b
}

// show asks systemd for properties of a unit.
func show(t *testing.T, unit string, names ...string) string {
	t.Helper()
	out, err := exec.Command("systemctl", "show", "--property="+strings.Join(names, ","), unit).Output()
	if err != nil {
		t.Fatal(err)
	}
	got := lines(string(out))
	slices.Sort(got)
	return strings.Join(got, " ")
}

func TestSystemdDriver(t *testing.T) {
	t.Parallel()
	b := newSystemdBox(t)
	limit, shares, pids := int64(64<<20), uint64(1024), int64(50)
	b.spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit}
	b.spec.Linux.Resources.CPU = &specs.LinuxCPU{Shares: &shares}
	b.spec.Linux.Resources.Pids = &specs.LinuxPids{Limit: &pids}
	b.spec.Annotations = map[string]string{"org.systemd.property.TimeoutStopSec": "7", "org.systemd.property.CollectMode": "'inactive-or-failed'"}
	unit := "pre-" + b.id + ".scope"
	c, _ := b.start("sleep", "3600")

	got := show(t, unit, "ActiveState", "Slice", "Delegate", "MemoryMax", "TasksMax", "CPUWeight", "TimeoutStopUSec", "CollectMode")
	want := "ActiveState=active CPUWeight=100 CollectMode=inactive-or-failed Delegate=yes MemoryMax=67108864 Slice=hakotest-sub.slice TasksMax=50 TimeoutStopUSec=7s"
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", c.Pid()))
	if err != nil || !strings.Contains(string(raw), "/hakotest.slice/hakotest-sub.slice/"+unit) {
		t.Errorf("the process is in %s %v", raw, err)
	}
	if CgroupV2() {
		dir := c.CgroupPaths()[""]
		if max, err := os.ReadFile(filepath.Join(dir, "memory.max")); err != nil || string(max) != "67108864\n" {
			t.Errorf("memory.max: %s %v", max, err)
		}
	}
	out, _, err := b.exec(c, nil, "open", "/dev/null", "cat", "/proc/self/cgroup")
	if err != nil || !strings.HasPrefix(out, "opened\n") {
		t.Errorf("exec: %q %v", out, err)
	}
	if procs, err := c.Processes(); err != nil || !slices.Equal(procs, []int{c.Pid()}) {
		t.Errorf("processes %v %v", procs, err)
	}
	limit, pids = 96<<20, 60
	if err := c.Update(t.Context(), &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}, Pids: &specs.LinuxPids{Limit: &pids}}); err != nil {
		t.Fatal(err)
	}
	// Systemd writes its values again.
	if out, err := exec.Command("systemctl", "daemon-reload").CombinedOutput(); err != nil {
		t.Errorf("daemon-reload: %v %s", err, out)
	}
	if got := show(t, unit, "MemoryMax", "TasksMax"); got != "MemoryMax=100663296 TasksMax=60" {
		t.Errorf("after the update: %s", got)
	}
	if out, _, err := b.exec(c, nil, "open", "/dev/null", "open", "/dev/full"); err != nil || out != "opened\nopened\n" {
		t.Errorf("devices after the reload: %q %v", out, err)
	}
	if err := c.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if st, err := c.Status(); err != nil || st != Paused {
		t.Error(st, err)
	}
	if err := c.Delete(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	if got := show(t, unit, "ActiveState", "LoadState"); got != "ActiveState=inactive LoadState=not-found" {
		t.Errorf("after the deletion: %s", got)
	}
	for _, dir := range c.CgroupPaths() {
		if _, err := os.Stat(dir); err == nil {
			t.Errorf("left %s", dir)
		}
	}
}

func TestSystemdDriverOfOtherKinds(t *testing.T) {
	t.Parallel()
	b := newSystemdBox(t)
	b.inUserns()
	if out, code := b.run("echo", "userns"); out != "userns\n" || code != 0 {
		t.Errorf("%q %d", out, code)
	}
	b = newSystemdBox(t) // a joined PID namespace: the process is cloned twice
	first, _ := b.start("sleep", "3600")
	other := newSystemdBox(t)
	for i := range other.spec.Linux.Namespaces {
		if n := &other.spec.Linux.Namespaces[i]; n.Type == specs.PIDNamespace {
			n.Path = fmt.Sprintf("/proc/%d/ns/pid", first.Pid())
		}
	}
	other.spec.Linux.CgroupsPath = ""
	c, _ := other.start("sleep", "3600")
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", c.Pid()))
	if err != nil || !strings.Contains(string(raw), "/system.slice/hako-"+other.id+".scope") {
		t.Errorf("the process is in %s %v", raw, err)
	}
}

func TestSystemdDriverFailsClean(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*box){
		"cgroupsPath":                     func(b *box) { b.spec.Linux.CgroupsPath = "/x/y" },
		"this property may not be set":    func(b *box) { b.spec.Annotations = map[string]string{"org.systemd.property.ExecStart": "'x'"} },
		`exec: "/no/such": stat /no/such`: func(b *box) { b.spec.Process.Args = []string{"/no/such"} },
		"memory.swap (memory and swap together) is ": func(b *box) {
			l := int64(5)
			b.spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &l, Swap: new(int64)}
			*b.spec.Linux.Resources.Memory.Swap = 4
		},
	} {
		b := newSystemdBox(t)
		b.args("true")
		change(b)
		if _, _, err := b.tryRun(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
		if got := show(t, "pre-"+b.id+".scope", "LoadState"); got != "LoadState=not-found" {
			t.Errorf("%s: left a unit: %s", name, got)
		}
	}
	if l, err := cgroup.Detect(); err != nil || len(l.Hierarchies) == 0 {
		t.Error(l, err)
	}
}
