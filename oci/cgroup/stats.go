//go:build linux

package cgroup

// Stats is a snapshot of what a cgroup, with all below it, uses. Parts whose
// controller is not there are zero or nil.
type Stats struct {
	CPU     CPUStats
	Memory  MemoryStats
	Pids    PidsStats
	IO      []IOStats              // a device each, ordered by device number
	Hugetlb map[string]HugetlbStat // by page size, "2MB"
	Rdma    []RdmaStats
	// V2 tells that the memory figures (the names in Memory.Stat above all) are those
	// of cgroup v2.
	V2 bool
}

// CPUStats counts CPU time.
type CPUStats struct {
	Total, User, Kernel uint64   // ns
	PerCPU              []uint64 // ns, by CPU number; v1 only
	PerCPUUser          []uint64 // ns, v1 only
	PerCPUKernel        []uint64 // ns, v1 only

	Periods          uint64 // enforcement periods that passed
	ThrottledPeriods uint64
	ThrottledTime    uint64 // ns
	Bursts           uint64
	BurstTime        uint64 // ns

	PSI *PSI // v2 only
}

// MemoryUsage is one of the kernel's memory counters. Sizes are in bytes; no limit is
// the largest number.
type MemoryUsage struct {
	Usage   uint64
	Max     uint64 // largest Usage ever seen; 0 where the kernel does not keep it
	Limit   uint64
	Failcnt uint64 // how often Limit was hit
}

// MemoryStats counts memory.
type MemoryStats struct {
	Memory MemoryUsage
	// Swap is memory and swap together on v1 (memory.memsw.*), swap alone on v2.
	Swap      MemoryUsage
	Kernel    MemoryUsage       // v1; on v2 only Usage
	KernelTCP MemoryUsage       // v1; on v2 only Usage ("sock" of memory.stat)
	Cache     uint64            // page cache
	Stat      map[string]uint64 // memory.stat as the kernel prints it
	Events    map[string]uint64 // memory.events, v2 only
	OOMKills  uint64            // processes that the OOM killer took
	PSI       *PSI              // v2 only
}

// PidsStats counts processes and threads.
type PidsStats struct {
	Current, Limit uint64 // no limit is the largest number
}

// IOStats counts the transfers of one block device.
type IOStats struct {
	Major, Minor                          uint64
	ReadBytes, WriteBytes, DiscardBytes   uint64
	ReadOps, WriteOps, DiscardOps         uint64
	SyncBytes, AsyncBytes                 uint64 // v1 only
	SyncOps, AsyncOps                     uint64 // v1 only
}

// HugetlbStat counts huge pages of one size, in bytes.
type HugetlbStat struct {
	Usage, Max, Failcnt uint64
	Limit               uint64
}

// RdmaStats counts the handles of one RDMA device.
type RdmaStats struct {
	Device                 string
	HcaHandles, HcaObjects uint32
}

// PSI is pressure stall information, see the kernel's accounting/psi.rst.
type PSI struct{ Some, Full Pressure }

// Pressure is one line of a pressure file.
type Pressure struct {
	Avg10, Avg60, Avg300 float64 // per cent
	Total                uint64  // µs
}

// Stats reads the statistics. It is errdefs.ErrNotFound when the cgroup is gone.
func (c *Cgroup) Stats() (*Stats, error) {
	return nil, nil
}
