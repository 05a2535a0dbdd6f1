package engine

import (
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"testing"
)

func cgroupFiles(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

const psiFile = "some avg10=1.50 avg60=0.00 avg300=0.00 total=2500000\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1000000\n"

// TestReadMetrics reads what both versions of cgroups have for the same container.
func TestReadMetrics(t *testing.T) {
	v1 := cgroupFiles(t, map[string]string{
		"cpuacct.usage": "3000000000\n", "cpuacct.stat": "user 200\nsystem 100\n", "cpu.stat": "nr_periods 5\nnr_throttled 2\nthrottled_time 1000000000\n",
		"cpu.shares": "512\n", "cpu.cfs_period_us": "100000\n", "cpu.cfs_quota_us": "20000\n",
		"memory.usage_in_bytes": "1000\n", "memory.max_usage_in_bytes": "2000\n", "memory.limit_in_bytes": "4096\n", "memory.memsw.limit_in_bytes": "8192\n",
		"memory.soft_limit_in_bytes": "9223372036854771712\n", "memory.failcnt": "1\n", "memory.kmem.usage_in_bytes": "77\n",
		"memory.stat":        "total_cache 300\ntotal_rss 400\ntotal_mapped_file 30\ntotal_inactive_file 100\npgfault 4\npgmajfault 1\ntotal_pgfault 5\ntotal_pgmajfault 2\ntotal_swap 9\nhierarchical_memory_limit 4096\nhierarchical_memsw_limit 8192\n",
		"memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n", "pids.current": "6\n", "pids.max": "100\n",
		"blkio.throttle.io_service_bytes": "8:0 Read 10\n8:0 Write 20\nTotal 30\n", "blkio.throttle.io_serviced": "8:0 Read 1\n8:0 Write 2\n",
		"cpu.pressure": psiFile, "memory.pressure": psiFile, "io.pressure": psiFile,
	})
	v2 := cgroupFiles(t, map[string]string{
		"cgroup.controllers": "cpu io memory pids\n", "cpu.stat": "usage_usec 3000000\nuser_usec 2000000\nsystem_usec 1000000\nnr_periods 5\nnr_throttled 2\nthrottled_usec 1000000\n",
		"cpu.weight": "20\n", "cpu.max": "20000 100000\n", "memory.current": "1000\n", "memory.peak": "2000\n", "memory.max": "4096\n", "memory.swap.max": "4096\n",
		"memory.swap.current": "9\n", "memory.low": "0\n", "memory.events": "max 1\noom_kill 3\n",
		"memory.stat":  "anon 400\nfile 300\nfile_mapped 30\nkernel 77\ninactive_file 100\npgfault 5\npgmajfault 2\n",
		"pids.current": "6\n", "pids.max": "100\n", "io.stat": "8:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n",
		"cpu.pressure": psiFile, "memory.pressure": psiFile, "io.pressure": psiFile,
	})
	for name, dirs := range map[string]map[string]string{
		"v1": {"cpu": v1, "cpuacct": v1, "memory": v1, "pids": v1, "blkio": v1, "unified": v1},
		"v2": {"v2-controllers": v2},
	} {
		t.Run(name, func(t *testing.T) {
			m, err := readMetrics(dirs)
			if err != nil {
				t.Fatal(err)
			}
			got := []uint64{
				m.Counts.CPUTotal, m.Counts.CPUUser, m.Counts.CPUKernel, m.Counts.Periods, m.Counts.Throttled, m.Counts.ThrottledNS,
				m.Period, m.Quota, m.Usage.Memory, m.Counts.MemMax, m.Usage.Limit, m.SwapLimit, m.Reservation, m.Counts.MemFailcnt, m.Kernel,
				m.Cache, m.Usage.RSS, m.Mapped, m.Usage.WorkingSet, m.Usage.Faults, m.Usage.MajorFault, m.Usage.Swap, m.OOMKills, m.Usage.Pids, m.Counts.PidsLimit,
			}
			want := []uint64{3e9, 2e9, 1e9, 5, 2, 1e9, 100000, 20000, 1000, 2000, 4096, 8192, 0, 1, 77, 300, 400, 30, 900, 5, 2, 9, 3, 6, 100}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got  %v\nwant %v", got, want)
			}
			if m.Shares < 500 || m.Shares > 525 {
				t.Errorf("shares %d, want about 512", m.Shares)
			}
			if p := m.Usage.CPUPressure; p == nil || p.Some.Total != 2500000000 || p.Full.Total != 1000000000 || p.Some.Avg10 != 1.5 {
				t.Errorf("pressure %+v", p)
			}
			io := map[string][2]uint64{}
			for _, b := range m.Counts.Blkio {
				io[b.Op] = [2]uint64{b.Bytes, b.Ops}
			}
			if want := map[string][2]uint64{"Read": {10, 1}, "Write": {20, 2}}; !reflect.DeepEqual(io, want) {
				t.Errorf("I/O %v, want %v", io, want)
			}
		})
	}
	if _, err := readMetrics(map[string]string{"memory": filepath.Join(v1, "gone")}); !os.IsNotExist(err) {
		t.Errorf("a cgroup that has gone: %v", err)
	}
}

// TestProcessMetrics measures the processes that the test itself is.
func TestProcessMetrics(t *testing.T) {
	dir := cgroupFiles(t, map[string]string{"cgroup.procs": ""})
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("2147483646\n"+strconv.Itoa(os.Getpid())+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	m := processMetrics(map[string]string{"pids": dir}, os.Getpid())
	if m.Processes != 2 || m.Descriptors < 3 || m.Limits["max_open_files"] == 0 {
		t.Errorf("%+v", m)
	}
	if _, sockets := countSockets(filepath.Join("/proc/self/fd"), 0); sockets != 0 {
		t.Error("a limit of 0 counts nothing")
	}
}

// TestSums: a pod without a cgroup of its own is what its containers are, and its CPU time never falls.
func TestSums(t *testing.T) {
	a := ContainerMetrics{Cgroup: CgroupMetrics{HasCPU: true, HasMemory: true, Usage: Usage{CPU: 5, Memory: 10, Limit: 100, Pids: 1}, Cache: 3,
		Counts: Stats{CPUUser: 2, MemStats: map[string]uint64{"x": 1}, Blkio: []BlkioEntry{{8, 0, "Read", 10, 1}}}}}
	b := ContainerMetrics{Cgroup: CgroupMetrics{HasCPU: true, Usage: Usage{CPU: 7, Memory: 20, Limit: 50, Pids: 2}, Cache: 4,
		Counts: Stats{CPUUser: 3, MemStats: map[string]uint64{"x": 2, "y": 1}, Blkio: []BlkioEntry{{8, 0, "Read", 20, 2}, {8, 0, "Write", 1, 1}}}}}
	m := sumMetrics([]ContainerMetrics{a, b})
	if u := m.Usage; u.CPU != 12 || u.Memory != 30 || u.Limit != 150 || u.Pids != 3 {
		t.Errorf("usage %+v", u)
	}
	if !m.HasCPU || m.HasMemory || m.Cache != 7 || m.Counts.CPUUser != 5 || m.Counts.MemStats["x"] != 3 || m.Counts.MemStats["y"] != 1 {
		t.Errorf("%+v", m)
	}
	if io := m.Counts.Blkio; len(io) != 2 || io[0] != (BlkioEntry{8, 0, "Read", 30, 3}) {
		t.Errorf("io %+v", io)
	}
	b.Cgroup.Usage.Limit = 0
	if m := sumMetrics([]ContainerMetrics{a, b}); m.Usage.Limit != 0 {
		t.Errorf("with one that has no limit: %d", m.Usage.Limit)
	}
	var meter meter
	for _, c := range [][2]uint64{{5, 5}, {12, 12}, {7, 12}, {13, 13}} {
		if got := meter.grown(c[0]); got != c[1] {
			t.Errorf("after %d: %d, want %d", c[0], got, c[1])
		}
	}
}
