//go:build linux

package cgroup

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

func writeAll(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCPUSet(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := &Cgroup{v1: map[string]string{"cpuset": dir}}
	writeAll(t, dir, map[string]string{
		"cpuset.cpus": "0-2,7\n", "cpuset.mems": "0\n", "cpuset.cpu_exclusive": "1\n", "cpuset.memory_pressure": "12\n",
		"cpuset.sched_load_balance": "1\n", "cpuset.sched_relax_domain_level": "-1\n",
	})
	got, err := c.CPUSet()
	want := CPUSetStats{CPUs: []uint16{0, 1, 2, 7}, Mems: []uint16{0}, CPUExclusive: 1, MemoryPressure: 12, SchedLoadBalance: 1, SchedRelaxDomainLevel: -1}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v %v", got, err)
	}
	if got, err := (&Cgroup{v2: dir}).CPUSet(); err != nil || !reflect.DeepEqual(got, CPUSetStats{}) {
		t.Errorf("v2: %+v %v", got, err)
	}
	for text, want := range map[string]int{"": 0, "3-1": 0, "x,1": 1, "65530-65535": 6, "65530-65536": 0, "-1": 0} {
		if got := parseList(text); len(got) != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}

// CPU time is what the kernel has measured, not what was running at ticks of the clock.
func TestCPUTimeOfShortPrograms(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	writeAll(t, dir, map[string]string{
		"cpuacct.usage_percpu": "1500 2500 \n", "cpuacct.usage_all": "cpu user system\n0 0 0\n1 4000000 0\n", "cpuacct.stat": "user 0\nsystem 0\n",
	})
	s, err := (&Cgroup{v1: map[string]string{"cpuacct": dir}}).Stats()
	if err != nil {
		t.Fatal(err)
	}
	if s.CPU.Total != 4000 || !reflect.DeepEqual(s.CPU.PerCPU, []uint64{1500, 2500}) || !reflect.DeepEqual(s.CPU.PerCPUUser, []uint64{0, 4000000}) {
		t.Errorf("%+v", s.CPU)
	}
}

// What Change gives takes all of it back.
func TestChangeIsTakenBack(t *testing.T) {
	t.Parallel()
	c, root := fakeV2(t)
	writeAll(t, root, map[string]string{"pids.max": "777\n", "cpu.weight": "100\n", "cpu.max": "10000 100000\n"})
	before := readTree(t, root)
	undo, err := c.Change(&specs.LinuxResources{
		CPU: &specs.LinuxCPU{Shares: ptr(uint64(2048)), Quota: ptr(int64(20000))}, Pids: &specs.LinuxPids{Limit: ptr(int64(555))},
	})
	if err != nil {
		t.Fatal(err)
	}
	if after := readTree(t, root); reflect.DeepEqual(before, after) {
		t.Fatal("nothing was changed")
	}
	if err := undo(); err != nil {
		t.Fatal(err)
	}
	if after := readTree(t, root); !reflect.DeepEqual(before, after) {
		t.Errorf("%v\nwant %v", after, before)
	}
}

func readTree(t *testing.T, root string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		raw, err := os.ReadFile(path)
		out[path] = strings.TrimSpace(string(raw))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}
