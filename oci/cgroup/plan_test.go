//go:build linux

package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

func ptr[T any](v T) *T { return &v }

// fake makes a tree of files like a cgroup's: "dir/file" to content.
func fake(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// fakeV1 has every v1 controller, fakeV2 every one of v2, fakeHybrid hugetlb on v2 only.
func fakeV1(t *testing.T) (*Cgroup, string) {
	root := fake(t, map[string]string{
		"memory/memory.memsw.limit_in_bytes": "9223372036854771712\n", "memory/memory.usage_in_bytes": "5000000\n",
		"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
		"blkio/blkio.bfq.weight": "100\n", "blkio/blkio.bfq.weight_device": "",
		"hugetlb/hugetlb.2MB.limit_in_bytes": "", "hugetlb/hugetlb.2MB.rsvd.limit_in_bytes": "", "hugetlb/hugetlb.1GB.limit_in_bytes": "",
		"cpu,cpuacct/cpu.idle": "0\n", "pids/pids.max": "max\n", "cpuset/cpuset.cpus": "0-1\n",
	})
	c := &Cgroup{v1: map[string]string{}}
	for _, name := range []string{"memory", "blkio", "hugetlb", "pids", "cpuset", "net_cls", "net_prio", "rdma", "freezer", "devices"} {
		c.v1[name] = root + "/" + name
	}
	c.v1["cpu"], c.v1["cpuacct"] = root+"/cpu,cpuacct", root+"/cpu,cpuacct"
	return c, root
}

func fakeV2(t *testing.T) (*Cgroup, string) {
	root := fake(t, map[string]string{
		"cgroup.controllers": "cpuset cpu io memory hugetlb pids rdma\n", "memory.swap.max": "max\n", "memory.current": "5000000\n",
		"io.bfq.weight": "default 100\n", "io.max": "8:0 rbps=1 wbps=max riops=max wiops=max\n", "hugetlb.2MB.max": "", "hugetlb.2MB.rsvd.max": "",
		"cpu.max": "50000 200000\n", "memory.high": "max\n", "cgroup.max.depth": "max\n", "cgroup.kill": "", "cpu.idle": "0\n", "pids.max": "max\n", "memory.max": "max\n",
		"cgroup.events": "populated 0\nfrozen 0\n",
	})
	return &Cgroup{v1: map[string]string{}, v2: root}, root
}

func fakeHybrid(t *testing.T) (*Cgroup, string) {
	root := fake(t, map[string]string{
		"unified/cgroup.controllers": "hugetlb\n", "unified/hugetlb.2MB.max": "max\n", "pids/pids.max": "max\n",
	})
	return &Cgroup{v1: map[string]string{"pids": root + "/pids"}, v2: root + "/unified"}, root
}

func everything() *specs.LinuxResources {
	dev := specs.LinuxWeightDevice{Weight: ptr(uint16(500))}
	dev.Major, dev.Minor = 8, 16
	rate := func(n uint64) []specs.LinuxThrottleDevice {
		d := specs.LinuxThrottleDevice{Rate: n}
		d.Major = 8
		return []specs.LinuxThrottleDevice{d}
	}
	return &specs.LinuxResources{
		CPU: &specs.LinuxCPU{
			Shares: ptr(uint64(1024)), Quota: ptr(int64(50000)), Period: ptr(uint64(100000)), Burst: ptr(uint64(1000)), Idle: ptr(int64(0)),
			Cpus: "0-1", Mems: "0",
		},
		Memory: &specs.LinuxMemory{
			Limit: ptr(int64(64 << 20)), Reservation: ptr(int64(32 << 20)), Swap: ptr(int64(128 << 20)), DisableOOMKiller: ptr(false),
			CheckBeforeUpdate: ptr(true), Kernel: ptr(int64(1)), KernelTCP: ptr(int64(1)), UseHierarchy: ptr(true),
		},
		Pids: &specs.LinuxPids{Limit: ptr(int64(100))},
		BlockIO: &specs.LinuxBlockIO{
			Weight: ptr(uint16(300)), WeightDevice: []specs.LinuxWeightDevice{dev},
			ThrottleReadBpsDevice: rate(1 << 20), ThrottleWriteBpsDevice: rate(2 << 20), ThrottleReadIOPSDevice: rate(100), ThrottleWriteIOPSDevice: rate(0),
		},
		HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 4 << 20}},
		Rdma:           map[string]specs.LinuxRdma{"mlx4_0": {HcaHandles: ptr(uint32(3))}, "hfi1_0": {HcaHandles: ptr(uint32(1)), HcaObjects: ptr(uint32(2))}},
	}
}

func planText(t *testing.T, c *Cgroup, root string, r *specs.LinuxResources) string {
	t.Helper()
	p := planner{c: c, fresh: c.fresh}
	steps, err := p.plan(r)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, s := range steps {
		fmt.Fprintf(&b, "%s = %s\n", strings.TrimPrefix(s.path, root+"/"), s.value)
	}
	return b.String()
}

func TestPlan(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		make   func(*testing.T) (*Cgroup, string)
		change func(*specs.LinuxResources)
		want   string
	}{
		{"v1 all", fakeV1, func(r *specs.LinuxResources) {
			r.CPU.RealtimePeriod, r.CPU.RealtimeRuntime = ptr(uint64(1000000)), ptr(int64(950000))
			r.Memory.Swappiness, r.Memory.UseHierarchy = ptr(uint64(10)), ptr(true)
			r.Network = &specs.LinuxNetwork{ClassID: ptr(uint32(0x100001)), Priorities: []specs.LinuxInterfacePriority{{Name: "eth0", Priority: 5}}}
		}, `cpu,cpuacct/cpu.shares = 1024
cpu,cpuacct/cpu.idle = 0
cpu,cpuacct/cpu.cfs_period_us = 100000
cpu,cpuacct/cpu.cfs_quota_us = 50000
cpu,cpuacct/cpu.cfs_burst_us = 1000
cpu,cpuacct/cpu.rt_period_us = 1000000
cpu,cpuacct/cpu.rt_runtime_us = 950000
cpuset/cpuset.cpus = 0-1
cpuset/cpuset.mems = 0
memory/memory.use_hierarchy = 1
memory/memory.limit_in_bytes = 67108864
memory/memory.memsw.limit_in_bytes = 134217728
memory/memory.soft_limit_in_bytes = 33554432
memory/memory.swappiness = 10
memory/memory.oom_control = 0
pids/pids.max = 100
blkio/blkio.bfq.weight = 300
blkio/blkio.bfq.weight_device = 8:16 500
blkio/blkio.throttle.read_bps_device = 8:0 1048576
blkio/blkio.throttle.write_bps_device = 8:0 2097152
blkio/blkio.throttle.read_iops_device = 8:0 100
blkio/blkio.throttle.write_iops_device = 8:0 0
hugetlb/hugetlb.2MB.limit_in_bytes = 4194304
hugetlb/hugetlb.2MB.rsvd.limit_in_bytes = 4194304
net_cls/net_cls.classid = 1048577
net_prio/net_prio.ifpriomap = eth0 5
rdma/rdma.max = hfi1_0 hca_handle=1 hca_object=2
rdma/rdma.max = mlx4_0 hca_handle=3
`},
		{"v2 all", fakeV2, func(r *specs.LinuxResources) {
			r.Unified = map[string]string{"memory.high": "1000\n", "io.max": "8:0 rbps=1\n8:16 wbps=2", "cgroup.max.depth": "3"}
		}, `cpu.weight = 100
cpu.idle = 0
cpu.max = 50000 100000
cpu.max.burst = 1000
cpuset.cpus = 0-1
cpuset.mems = 0
memory.swap.max = 67108864
memory.max = 67108864
memory.low = 33554432
pids.max = 100
io.bfq.weight = default 300
io.bfq.weight = 8:16 500
io.max = 8:0 rbps=1048576
io.max = 8:0 wbps=2097152
io.max = 8:0 riops=100
io.max = 8:0 wiops=max
hugetlb.2MB.max = 4194304
hugetlb.2MB.rsvd.max = 4194304
rdma.max = hfi1_0 hca_handle=1 hca_object=2
rdma.max = mlx4_0 hca_handle=3
cgroup.max.depth = 3
io.max = 8:0 rbps=1
io.max = 8:16 wbps=2
memory.high = 1000
`},
		{"hybrid", fakeHybrid, func(r *specs.LinuxResources) {
			*r = specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr(int64(0))}, HugepageLimits: r.HugepageLimits}
		}, "pids/pids.max = 1\nunified/hugetlb.2MB.max = 4194304\n"},
		{"v1 without limits", fakeV1, func(r *specs.LinuxResources) {
			*r = specs.LinuxResources{
				CPU:    &specs.LinuxCPU{Shares: ptr(uint64(0)), Quota: ptr(int64(-1)), Period: ptr(uint64(0)), Burst: ptr(uint64(0)), Cpus: ""},
				Memory: &specs.LinuxMemory{Limit: ptr(int64(-1)), Reservation: ptr(int64(0)), Swap: ptr(int64(0))},
				Pids:   &specs.LinuxPids{Limit: ptr(int64(-1))}, BlockIO: &specs.LinuxBlockIO{Weight: ptr(uint16(0))},
			}
		}, "cpu,cpuacct/cpu.cfs_quota_us = -1\nmemory/memory.limit_in_bytes = -1\nmemory/memory.memsw.limit_in_bytes = -1\npids/pids.max = max\n"},
		{"v2, shares beyond", fakeV2, func(r *specs.LinuxResources) { *r = specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: ptr(uint64(1))}} }, "cpu.weight = 1\n"},
		{"v2 without limits", fakeV2, func(r *specs.LinuxResources) {
			*r = specs.LinuxResources{
				CPU:    &specs.LinuxCPU{Quota: ptr(int64(-1))},
				Memory: &specs.LinuxMemory{Limit: ptr(int64(-1)), Swap: ptr(int64(-1)), Reservation: ptr(int64(-1))},
				Pids:   &specs.LinuxPids{Limit: ptr(int64(-1))},
			}
		}, "cpu.max = max 200000\nmemory.swap.max = max\nmemory.max = max\nmemory.low = max\npids.max = max\n"},
		{"v2 period alone", fakeV2, func(r *specs.LinuxResources) {
			*r = specs.LinuxResources{CPU: &specs.LinuxCPU{Period: ptr(uint64(10000))}}
		}, "cpu.max = 50000 10000\n"},
		{"nothing", fakeV2, func(r *specs.LinuxResources) {
			*r = specs.LinuxResources{CPU: &specs.LinuxCPU{}, Memory: &specs.LinuxMemory{}, Pids: &specs.LinuxPids{}, BlockIO: &specs.LinuxBlockIO{}, Network: &specs.LinuxNetwork{}}
		}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c, root := test.make(t)
			r := everything()
			test.change(r)
			if got := planText(t, c, root, r); got != test.want {
				t.Errorf("got\n%swant\n%s", got, test.want)
			}
		})
	}
}

func TestPlanRefuses(t *testing.T) {
	t.Parallel()
	type res = specs.LinuxResources
	weight := specs.LinuxWeightDevice{}
	weight.Major, weight.Weight = 1<<40, ptr(uint16(10))
	for name, c := range map[string]struct {
		make  func(*testing.T) (*Cgroup, string)
		r     res
		class error
		text  string
	}{
		"memory is missing": {fakeHybrid, res{Memory: &specs.LinuxMemory{Limit: ptr(int64(1 << 20))}}, errdefs.ErrFailedPrecondition, `"memory"`},
		"cpu is missing":    {fakeHybrid, res{CPU: &specs.LinuxCPU{Shares: ptr(uint64(2))}}, errdefs.ErrFailedPrecondition, `"cpu"`},
		"io is missing":     {fakeHybrid, res{BlockIO: &specs.LinuxBlockIO{Weight: ptr(uint16(10))}}, errdefs.ErrFailedPrecondition, `"io"`},
		"net_cls on v2":     {fakeV2, res{Network: &specs.LinuxNetwork{ClassID: ptr(uint32(1))}}, errdefs.ErrFailedPrecondition, `"net_cls"`},
		"no such pages":     {fakeV1, res{HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "3MB", Limit: 1}}}, errdefs.ErrInvalidArgument, "3MB"},
		"pages with a path": {fakeV1, res{HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "../2MB", Limit: 1}}}, errdefs.ErrInvalidArgument, "../2MB"},
		"shares of 1":       {fakeV1, res{CPU: &specs.LinuxCPU{Shares: ptr(uint64(1))}}, errdefs.ErrInvalidArgument, "cpu.shares is 1"},
		"too many shares":   {fakeV1, res{CPU: &specs.LinuxCPU{Shares: ptr(uint64(1 << 63))}}, errdefs.ErrInvalidArgument, "cpu.shares"},
		"quota":             {fakeV1, res{CPU: &specs.LinuxCPU{Quota: ptr(int64(-1 << 63))}}, errdefs.ErrInvalidArgument, "cpu.quota"},
		"idle":              {fakeV1, res{CPU: &specs.LinuxCPU{Idle: ptr(int64(2))}}, errdefs.ErrInvalidArgument, "cpu.idle"},
		"realtime on v2":    {fakeV2, res{CPU: &specs.LinuxCPU{RealtimeRuntime: ptr(int64(2))}}, errdefs.ErrInvalidArgument, "realtime"},
		"cpus backwards":    {fakeV1, res{CPU: &specs.LinuxCPU{Cpus: "3-1"}}, errdefs.ErrInvalidArgument, "backwards"},
		"cpus too large":    {fakeV1, res{CPU: &specs.LinuxCPU{Cpus: "0-99999999999"}}, errdefs.ErrInvalidArgument, "99999999999"},
		"cpus of nonsense":  {fakeV1, res{CPU: &specs.LinuxCPU{Cpus: "0\n1"}}, errdefs.ErrInvalidArgument, "cpu.cpus"},
		"mems too long":     {fakeV1, res{CPU: &specs.LinuxCPU{Mems: strings.Repeat("0,", 1<<20)}}, errdefs.ErrInvalidArgument, "too many"},
		"negative memory":   {fakeV1, res{Memory: &specs.LinuxMemory{Limit: ptr(int64(-2))}}, errdefs.ErrInvalidArgument, "memory.limit is -2"},
		"least memory":      {fakeV2, res{Memory: &specs.LinuxMemory{Reservation: ptr(int64(-1 << 63))}}, errdefs.ErrInvalidArgument, "memory.reservation"},
		"swap below memory": {fakeV2, res{Memory: &specs.LinuxMemory{Limit: ptr(int64(10)), Swap: ptr(int64(9))}}, errdefs.ErrInvalidArgument, "below memory.limit"},
		"swap, no limit":    {fakeV2, res{Memory: &specs.LinuxMemory{Swap: ptr(int64(9))}}, errdefs.ErrInvalidArgument, "memory.limit is not given"},
		"limited swap of unlimited memory": {
			fakeV1, res{Memory: &specs.LinuxMemory{Limit: ptr(int64(-1)), Swap: ptr(int64(9))}}, errdefs.ErrInvalidArgument, "unlimited",
		},
		"swappiness on v2": {fakeV2, res{Memory: &specs.LinuxMemory{Swappiness: ptr(uint64(9))}}, errdefs.ErrInvalidArgument, "swappiness"},
		"OOM killer on v2": {fakeV2, res{Memory: &specs.LinuxMemory{DisableOOMKiller: ptr(true)}}, errdefs.ErrInvalidArgument, "disableOOMKiller"},
		"limit below use": {
			fakeV2, res{Memory: &specs.LinuxMemory{Limit: ptr(int64(4096)), CheckBeforeUpdate: ptr(true)}}, errdefs.ErrFailedPrecondition, "5000000 bytes in use",
		},
		"negative pids":       {fakeV1, res{Pids: &specs.LinuxPids{Limit: ptr(int64(-2))}}, errdefs.ErrInvalidArgument, "pids.limit is -2"},
		"weight too small":    {fakeV1, res{BlockIO: &specs.LinuxBlockIO{Weight: ptr(uint16(9))}}, errdefs.ErrInvalidArgument, "blockIO.weight is 9"},
		"leaf weight":         {fakeV1, res{BlockIO: &specs.LinuxBlockIO{LeafWeight: ptr(uint16(10))}}, errdefs.ErrFailedPrecondition, "CFQ"},
		"device number":       {fakeV1, res{BlockIO: &specs.LinuxBlockIO{WeightDevice: []specs.LinuxWeightDevice{weight}}}, errdefs.ErrInvalidArgument, "not a device number"},
		"interface":           {fakeV1, res{Network: &specs.LinuxNetwork{Priorities: []specs.LinuxInterfacePriority{{Name: "a b"}}}}, errdefs.ErrInvalidArgument, "a b"},
		"rdma device":         {fakeV1, res{Rdma: map[string]specs.LinuxRdma{"a\nb": {}}}, errdefs.ErrInvalidArgument, "rdma"},
		"unified on v1":       {fakeV1, res{Unified: map[string]string{"memory.high": "1"}}, errdefs.ErrInvalidArgument, "need cgroup v2"},
		"unified path":        {fakeV2, res{Unified: map[string]string{"../memory.high": "1"}}, errdefs.ErrInvalidArgument, "memory.high"},
		"unified kills":       {fakeV2, res{Unified: map[string]string{"cgroup.kill": "1"}}, errdefs.ErrInvalidArgument, "cgroup.kill is not a resource"},
		"unified moves":       {fakeV2, res{Unified: map[string]string{"cgroup.procs": "1"}}, errdefs.ErrInvalidArgument, "cgroup.procs is not a resource"},
		"unified unknown":     {fakeV2, res{Unified: map[string]string{"memory.nosuch": "1"}}, errdefs.ErrInvalidArgument, "memory.nosuch"},
		"unified, missing":    {fakeV2, res{Unified: map[string]string{"misc.max": "1"}}, errdefs.ErrFailedPrecondition, `"misc"`},
		"unified of no class": {fakeV2, res{Unified: map[string]string{"memory": "1"}}, errdefs.ErrInvalidArgument, "not a file"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cg, _ := c.make(t)
			err := cg.Apply(&c.r)
			if !errors.Is(err, c.class) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("error is %v", err)
			}
			var missing *MissingError
			if strings.Contains(name, "missing") && !errors.As(err, &missing) {
				t.Errorf("%v is no *MissingError", err)
			}
		})
	}
}

func TestWeightOfShares(t *testing.T) {
	t.Parallel()
	for shares, want := range map[uint64]uint64{0: 1, 2: 1, 102: 17, 512: 59, 1024: 100, 2048: 174, 8192: 532, 262143: 10000, 262144: 10000, 1 << 63: 10000} {
		if got := weightOfShares(shares); got != want {
			t.Errorf("%d shares are a weight of %d, want %d", shares, got, want)
		}
	}
	for s := uint64(3); s <= 262144; s++ {
		if weightOfShares(s) < weightOfShares(s-1) {
			t.Fatalf("the weight of %d shares is below that of %d", s, s-1)
		}
	}
}

// TestApplyRestores breaks the last write and looks at the earlier ones. In this tree,
// a file keeps what is longer than what is written over it: all values have one length.
func TestApplyRestores(t *testing.T) {
	t.Parallel()
	c, root := fakeV2(t)
	write := func(name, value string) {
		t.Helper()
		if err := os.WriteFile(root+"/"+name, []byte(value), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("pids.max", "777\n")
	write("cpu.weight", "100\n")
	write("cpu.max", "10000 100000\n")
	write("io.max", "8:0 rbps=1 wbps=max\n9:9 rbps=2\n")
	err := c.Apply(&specs.LinuxResources{
		CPU:     &specs.LinuxCPU{Shares: ptr(uint64(2048)), Quota: ptr(int64(20000))},
		Pids:    &specs.LinuxPids{Limit: ptr(int64(555))},
		Unified: map[string]string{"hugetlb.2MB.max": "1", "memory.high": "2", "rdma.max": "3"},
	})
	if !errors.Is(err, errdefs.ErrInvalidArgument) { // no rdma.max in this tree: found before anything is written
		t.Fatalf("error is %v", err)
	}
	// A directory cannot be written to.
	if err := os.Mkdir(root+"/rdma.max", 0o755); err != nil {
		t.Fatal(err)
	}
	err = c.Apply(&specs.LinuxResources{
		CPU:  &specs.LinuxCPU{Shares: ptr(uint64(2048)), Quota: ptr(int64(20000))},
		Pids: &specs.LinuxPids{Limit: ptr(int64(555))},
		Rdma: map[string]specs.LinuxRdma{"x": {HcaHandles: ptr(uint32(1))}},
	})
	if err == nil || !strings.Contains(err.Error(), "rdma.max") {
		t.Fatalf("error is %v", err)
	}
	for name, want := range map[string]string{"pids.max": "777\n", "cpu.weight": "100\n", "cpu.max": "10000 100000\n"} {
		if got, err := os.ReadFile(root + "/" + name); err != nil || string(got) != want {
			t.Errorf("%s is %q, %v, want %q", name, got, err, want)
		}
	}
	for s, want := range map[step]string{
		{path: root + "/io.max", key: "9:9", none: noIOMax}:  "9:9 rbps=2",
		{path: root + "/io.max", key: "8:16", none: noIOMax}: "8:16 " + noIOMax,
		{path: root + "/cgroup.controllers"}:                 "cpuset cpu io memory hugetlb pids rdma\n",
		{path: root + "/cgroup.events", field: "frozen"}:     "0",
	} {
		if got, err := s.restore(); err != nil || got.value != want {
			t.Errorf("%+v is restored by %q, %v", s, got.value, err)
		}
	}
}

func TestFakeStats(t *testing.T) {
	t.Parallel()
	c, root := fakeV2(t)
	for name, content := range map[string]string{
		"cpu.stat":    "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_periods 5\nnr_throttled 2\nthrottled_usec 7\nnr_bursts 1\nburst_usec 3\n",
		"memory.stat": "anon 1\nfile 4096\nkernel 77\nsock 5\n", "memory.peak": "6000000\n", "memory.events": "low 0\nmax 4\noom 1\noom_kill 2\n",
		"memory.swap.current": "11\n", "pids.current": "3\n", "io.stat": "8:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n8:0 \n",
		"memory.pressure": "some avg10=1.50 avg60=0.00 avg300=0.25 total=9\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=8\n",
		"rdma.current":    "mlx4_0 hca_handle=2 hca_object=max\n",
	} {
		if err := os.WriteFile(root+"/"+name, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s, err := c.Stats()
	if err != nil {
		t.Fatal(err)
	}
	if s.CPU.Total != 30000 || s.CPU.User != 20000 || s.CPU.Kernel != 10000 || s.CPU.Periods != 5 || s.CPU.ThrottledTime != 7000 || s.CPU.BurstTime != 3000 {
		t.Errorf("cpu: %+v", s.CPU)
	}
	m := s.Memory
	if !s.V2 || m.Memory != (MemoryUsage{5000000, 6000000, 1<<64 - 1, 4}) || m.Swap.Usage != 11 || m.Cache != 4096 || m.Kernel.Usage != 77 || m.OOMKills != 2 || m.PSI.Some.Avg10 != 1.5 || m.PSI.Full.Total != 8 {
		t.Errorf("memory: %+v", m)
	}
	if s.Pids != (PidsStats{3, 1<<64 - 1}) || len(s.IO) != 1 || s.IO[0] != (IOStats{Major: 8, Minor: 16, ReadBytes: 1, WriteBytes: 2, ReadOps: 3, WriteOps: 4, DiscardBytes: 5, DiscardOps: 6}) {
		t.Errorf("pids: %+v, io: %+v", s.Pids, s.IO)
	}
	if len(s.Rdma) != 1 || s.Rdma[0] != (RdmaStats{"mlx4_0", 2, 1<<32 - 1}) {
		t.Errorf("rdma: %+v", s.Rdma)
	}
	if _, err := (&Cgroup{v2: root + "/gone"}).Stats(); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("statistics of nothing: %v", err)
	}
	for name, want := range map[string]string{"hugepages-2048kB": "2MB", "hugepages-1048576kB": "1GB", "hugepages-64kB": "64KB", "hugepages-x": "", "y": ""} {
		if got, ok := pageSize(name); got != want || ok != (want != "") {
			t.Errorf("%s is %q", name, got)
		}
	}
}

// TestNewFake makes cgroups in a tree that stands for a mount. The kernel would fill the
// directories that are made; here they are there before.
func TestNewFake(t *testing.T) {
	t.Parallel()
	root := fake(t, map[string]string{
		"v2/cgroup.controllers": "cpu memory misc pids\n", "v2/cgroup.subtree_control": "",
		"v2/a/cgroup.controllers": "cpu memory\n", "v2/a/cgroup.subtree_control": "",
		"v2/a/b/cgroup.procs": "",
		"cpuset/cpuset.cpus":  "0-3\n", "cpuset/cpuset.mems": "0-1\n",
		"cpuset/a/cpuset.cpus": "\n", "cpuset/a/cpuset.mems": "1\n",
		"cpuset/a/b/cpuset.cpus": "", "cpuset/a/b/cpuset.mems": "", "cpuset/a/b/cgroup.procs": "",
	})
	l := Layout{V2, []Hierarchy{{V2: true, Mount: root + "/v2", Own: "/"}}}
	c, err := l.New("/a/b")
	if err != nil {
		t.Fatal(err)
	}
	if paths := c.Paths(); len(paths) != 1 || paths[""] != root+"/v2/a/b" {
		t.Errorf("paths are %v", paths)
	}
	cpuset := Layout{V1, []Hierarchy{{Controllers: []string{"cpuset"}, Mount: root + "/cpuset", Own: "/a"}}}
	if c, err = cpuset.New("b"); err != nil {
		t.Fatal(err)
	}
	if paths := c.Paths(); len(paths) != 1 || paths["cpuset"] != root+"/cpuset/a/b" {
		t.Errorf("paths are %v", paths)
	}
	for file, want := range map[string]string{
		"v2/cgroup.subtree_control": "+cpu +memory +pids", "v2/a/cgroup.subtree_control": "+cpu +memory",
		"cpuset/a/cpuset.cpus": "0-3", "cpuset/a/b/cpuset.cpus": "0-3", "cpuset/a/cpuset.mems": "1\n", "cpuset/a/b/cpuset.mems": "1",
	} {
		got, err := os.ReadFile(root + "/" + file)
		if err != nil || strings.TrimSuffix(string(got), "\n") != strings.TrimSuffix(want, "\n") {
			t.Errorf("%s is %q, %v, want %q", file, got, err, want)
		}
	}
	// What fails leaves nothing behind: here there is no cpuset in the new directory.
	if _, err := cpuset.New("/a/c/d"); err == nil || exists(root+"/cpuset/a/c") {
		t.Errorf("error is %v, and a directory stays", err)
	}
	// A container may sit in a cgroup of its own already, if it is empty.
	if err := os.WriteFile(root+"/v2/a/b/cgroup.procs", []byte("17\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := l.New("/a/b"); !errors.Is(err, errdefs.ErrAlreadyExists) {
		t.Errorf("error is %v", err)
	}
	// A hybrid machine hands a controller down when it is asked for.
	hybrid := &Cgroup{v1: map[string]string{"pids": root}, v2: root + "/v2/a/b"}
	for name, content := range map[string]string{"v2/cgroup.controllers": "hugetlb\n", "v2/cgroup.subtree_control": "", "v2/a/cgroup.subtree_control": "", "v2/a/cgroup.controllers": "hugetlb\n", "v2/a/b/cgroup.controllers": ""} {
		if err := os.WriteFile(root+"/"+name, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	err = hybrid.Apply(&specs.LinuxResources{HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 1}}})
	var missing *MissingError
	if !errors.As(err, &missing) || missing.Controller != "hugetlb" { // no kernel is there to do it
		t.Errorf("error is %v", err)
	}
	for _, file := range []string{"v2/cgroup.subtree_control", "v2/a/cgroup.subtree_control"} {
		if got, err := os.ReadFile(root + "/" + file); err != nil || string(got) != "+hugetlb" {
			t.Errorf("%s is %q, %v", file, got, err)
		}
	}
}
