//go:build linux && (amd64 || arm64)

package main

import (
	"math"

	"github.com/hako-engine/hako/oci"
	"github.com/hako-engine/hako/oci/cgroup"
	"github.com/hako-engine/hako/oci/rdt"
)

// The types below are the JSON of runc's events command, as its callers read it
// (go-runc's Stats).

type eventStats struct {
	CPU      eventCPU                `json:"cpu"`
	CPUSet   eventCPUSet             `json:"cpuset"`
	Memory   eventMemory             `json:"memory"`
	Pids     eventPids               `json:"pids"`
	Blkio    eventBlkio              `json:"blkio"`
	Hugetlb  map[string]eventHugetlb `json:"hugetlb"`
	IntelRdt *rdt.Stats              `json:"intel_rdt"`
	// Of interfaces that the runtime has made: none.
	Interfaces []struct{} `json:"network_interfaces"`
}

type eventCPUSet struct {
	CPUs                  []uint16 `json:"cpus,omitempty"`
	CPUExclusive          uint64   `json:"cpu_exclusive"`
	Mems                  []uint16 `json:"mems,omitempty"`
	MemHardwall           uint64   `json:"mem_hardwall"`
	MemExclusive          uint64   `json:"mem_exclusive"`
	MemoryMigrate         uint64   `json:"memory_migrate"`
	MemorySpreadPage      uint64   `json:"memory_spread_page"`
	MemorySpreadSlab      uint64   `json:"memory_spread_slab"`
	MemoryPressure        uint64   `json:"memory_pressure"`
	SchedLoadBalance      uint64   `json:"sched_load_balance"`
	SchedRelaxDomainLevel int64    `json:"sched_relax_domain_level"`
}

type eventCPU struct {
	Usage struct {
		Total        uint64   `json:"total,omitempty"`
		Percpu       []uint64 `json:"percpu,omitempty"`
		PercpuKernel []uint64 `json:"percpu_kernel,omitempty"`
		PercpuUser   []uint64 `json:"percpu_user,omitempty"`
		Kernel       uint64   `json:"kernel"`
		User         uint64   `json:"user"`
	} `json:"usage"`
	Throttling struct {
		Periods          uint64 `json:"periods,omitempty"`
		ThrottledPeriods uint64 `json:"throttledPeriods,omitempty"`
		ThrottledTime    uint64 `json:"throttledTime,omitempty"`
	} `json:"throttling"`
	PSI *eventPSI `json:"psi,omitempty"`
}

type eventUsage struct {
	Limit   uint64 `json:"limit"`
	Usage   uint64 `json:"usage,omitempty"`
	Max     uint64 `json:"max,omitempty"`
	Failcnt uint64 `json:"failcnt"`
}

type eventMemory struct {
	Cache     uint64            `json:"cache,omitempty"`
	Usage     eventUsage        `json:"usage"`
	Swap      eventUsage        `json:"swap"`
	Kernel    eventUsage        `json:"kernel"`
	KernelTCP eventUsage        `json:"kernelTCP"`
	Raw       map[string]uint64 `json:"raw,omitempty"`
	PSI       *eventPSI         `json:"psi,omitempty"`
}

type eventPids struct {
	Current uint64 `json:"current,omitempty"`
	Limit   uint64 `json:"limit,omitempty"`
}

type eventBlkioEntry struct {
	Major uint64 `json:"major"`
	Minor uint64 `json:"minor"`
	Op    string `json:"op"`
	Value uint64 `json:"value"`
}

type eventBlkio struct {
	Bytes []eventBlkioEntry `json:"ioServiceBytesRecursive,omitempty"`
	Ops   []eventBlkioEntry `json:"ioServicedRecursive,omitempty"`
	PSI   *eventPSI         `json:"psi,omitempty"`
}

type eventHugetlb struct {
	Usage   uint64 `json:"usage,omitempty"`
	Max     uint64 `json:"max,omitempty"`
	Failcnt uint64 `json:"failcnt"`
}

type eventPressure struct {
	Avg10  float64 `json:"avg10"`
	Avg60  float64 `json:"avg60"`
	Avg300 float64 `json:"avg300"`
	Total  uint64  `json:"total"`
}

type eventPSI struct {
	Some eventPressure `json:"some"`
	Full eventPressure `json:"full"`
}

// noLimitV1 is what the files of cgroup v1 say.
const noLimitV1 = math.MaxInt64 &^ 4095

func pressure(p *cgroup.PSI) *eventPSI {
	if p == nil {
		return nil
	}
	return &eventPSI{Some: eventPressure(p.Some), Full: eventPressure(p.Full)}
}

func readEventStats(c *oci.Container) (e eventStats, err error) {
	s, err := c.Stats()
	if err != nil {
		return e, err
	}
	set, err := c.CPUSet()
	if err != nil {
		return e, err
	}
	e = eventData(s)
	e.CPUSet = eventCPUSet{
		CPUs: set.CPUs, CPUExclusive: set.CPUExclusive, Mems: set.Mems, MemHardwall: set.MemHardwall, MemExclusive: set.MemExclusive,
		MemoryMigrate: set.MemoryMigrate, MemorySpreadPage: set.MemorySpreadPage, MemorySpreadSlab: set.MemorySpreadSlab,
		MemoryPressure: set.MemoryPressure, SchedLoadBalance: set.SchedLoadBalance, SchedRelaxDomainLevel: set.SchedRelaxDomainLevel,
	}
	if e.IntelRdt, err = c.IntelRdtStats(); e.IntelRdt == nil {
		e.IntelRdt = new(rdt.Stats)
	}
	return e, err
}

func eventData(s *cgroup.Stats) eventStats {
	var e eventStats
	u := &e.CPU.Usage
	u.Total, u.User, u.Kernel = s.CPU.Total, s.CPU.User, s.CPU.Kernel
	u.Percpu, u.PercpuUser, u.PercpuKernel = s.CPU.PerCPU, s.CPU.PerCPUUser, s.CPU.PerCPUKernel
	t := &e.CPU.Throttling
	t.Periods, t.ThrottledPeriods, t.ThrottledTime = s.CPU.Periods, s.CPU.ThrottledPeriods, s.CPU.ThrottledTime
	e.CPU.PSI = pressure(s.CPU.PSI)
	usage := func(m cgroup.MemoryUsage) eventUsage {
		if m.Limit == math.MaxUint64 && !s.V2 {
			m.Limit = noLimitV1
		}
		return eventUsage{Limit: m.Limit, Usage: m.Usage, Max: m.Max, Failcnt: m.Failcnt}
	}
	m := s.Memory
	if s.V2 { // with memory, as on v1
		m.Swap.Usage += m.Memory.Usage
		if m.Swap.Limit != math.MaxUint64 && m.Memory.Limit != math.MaxUint64 {
			m.Swap.Limit += m.Memory.Limit
		} else {
			m.Swap.Limit = math.MaxUint64
		}
	}
	e.Memory = eventMemory{
		Cache: m.Cache, Usage: usage(m.Memory), Swap: usage(m.Swap), Kernel: usage(m.Kernel), KernelTCP: usage(m.KernelTCP), Raw: m.Stat, PSI: pressure(m.PSI),
	}
	e.Pids = eventPids{Current: s.Pids.Current, Limit: s.Pids.Limit}
	if s.Pids.Limit == 1<<64-1 {
		e.Pids.Limit = 0 // no limit
	}
	for _, d := range s.IO {
		add := func(to *[]eventBlkioEntry, op string, n uint64) {
			*to = append(*to, eventBlkioEntry{d.Major, d.Minor, op, n})
		}
		add(&e.Blkio.Bytes, "Read", d.ReadBytes)
		add(&e.Blkio.Bytes, "Write", d.WriteBytes)
		add(&e.Blkio.Ops, "Read", d.ReadOps)
		add(&e.Blkio.Ops, "Write", d.WriteOps)
		if s.V2 {
			continue
		}
		add(&e.Blkio.Bytes, "Sync", d.SyncBytes)
		add(&e.Blkio.Bytes, "Async", d.AsyncBytes)
		add(&e.Blkio.Bytes, "Discard", d.DiscardBytes)
		add(&e.Blkio.Bytes, "Total", d.ReadBytes+d.WriteBytes+d.DiscardBytes)
		add(&e.Blkio.Ops, "Sync", d.SyncOps)
		add(&e.Blkio.Ops, "Async", d.AsyncOps)
		add(&e.Blkio.Ops, "Discard", d.DiscardOps)
		add(&e.Blkio.Ops, "Total", d.ReadOps+d.WriteOps+d.DiscardOps)
	}
	e.Blkio.PSI = pressure(s.IOPSI)
	e.Hugetlb = make(map[string]eventHugetlb, len(s.Hugetlb))
	for size, h := range s.Hugetlb {
		e.Hugetlb[size] = eventHugetlb{Usage: h.Usage, Max: h.Max, Failcnt: h.Failcnt}
	}
	return e
}
