package main

import (
	"fmt"

	"github.com/hako-engine/hako/oci/cgroup"
	"github.com/hako-engine/hako/shim/wire"
)

// memoryV1 and memoryV2 are the keys of memory.stat, at the number of their field in
// containerd's MemoryStat messages.
var (
	memoryV1 = []string{
		1: "cache", "rss", "rss_huge", "mapped_file", "dirty", "writeback", "pgpgin", "pgpgout", "pgfault", "pgmajfault",
		"inactive_anon", "active_anon", "inactive_file", "active_file", "unevictable",
		"hierarchical_memory_limit", "hierarchical_memsw_limit",
		"total_cache", "total_rss", "total_rss_huge", "total_mapped_file", "total_dirty", "total_writeback",
		"total_pgpgin", "total_pgpgout", "total_pgfault", "total_pgmajfault",
		"total_inactive_anon", "total_active_anon", "total_inactive_file", "total_active_file", "total_unevictable",
	}
	memoryV2 = []string{
		1: "anon", "file", "kernel_stack", "slab", "sock", "shmem", "file_mapped", "file_dirty", "file_writeback", "anon_thp",
		"inactive_anon", "active_anon", "inactive_file", "active_file", "unevictable", "slab_reclaimable", "slab_unreclaimable",
		"pgfault", "pgmajfault", "workingset_refault", "workingset_activate", "workingset_nodereclaim",
		"pgrefill", "pgscan", "pgsteal", "pgactivate", "pgdeactivate", "pglazyfree", "pglazyfreed",
		"thp_fault_alloc", "thp_collapse_alloc",
	}
)

func memoryStat(keys []string, stat map[string]uint64) *wire.Record {
	r := new(wire.Record)
	for field, key := range keys {
		if key != "" {
			r.Uint(field, stat[key])
		}
	}
	return r
}

func pids(p cgroup.PidsStats) *wire.Record {
	r := new(wire.Record)
	r.Uint(1, p.Current)
	if p.Limit != ^uint64(0) {
		r.Uint(2, p.Limit)
	}
	return r
}

// metricsV1 is io.containerd.cgroups.v1.Metrics (github.com/containerd/cgroups).
func metricsV1(st *cgroup.Stats) *wire.Record {
	m := new(wire.Record)
	for size, h := range st.Hugetlb {
		r := new(wire.Record)
		r.Uint(1, h.Usage)
		r.Uint(2, h.Max)
		r.Uint(3, h.Failcnt)
		r.String(4, size)
		m.Message(1, r)
	}
	m.Message(2, pids(st.Pids))

	usage, throttle, cpu := new(wire.Record), new(wire.Record), new(wire.Record)
	usage.Uint(1, st.CPU.Total)
	usage.Uint(2, st.CPU.Kernel)
	usage.Uint(3, st.CPU.User)
	usage.Packed(4, st.CPU.PerCPU)
	throttle.Uint(1, st.CPU.Periods)
	throttle.Uint(2, st.CPU.ThrottledPeriods)
	throttle.Uint(3, st.CPU.ThrottledTime)
	if st.CPU.Total > 0 {
		cpu.Always(1, usage)
		cpu.Always(2, throttle)
	}
	m.Message(3, cpu)

	mem := memoryStat(memoryV1, st.Memory.Stat)
	for field, u := range map[int]cgroup.MemoryUsage{33: st.Memory.Memory, 34: st.Memory.Swap, 35: st.Memory.Kernel, 36: st.Memory.KernelTCP} {
		r := new(wire.Record)
		r.Uint(1, u.Limit)
		r.Uint(2, u.Usage)
		r.Uint(3, u.Max)
		r.Uint(4, u.Failcnt)
		mem.Message(field, r)
	}
	m.Message(4, mem)

	blkio := new(wire.Record)
	for _, d := range st.IO {
		entry := func(field int, op string, v uint64) {
			r := new(wire.Record)
			r.String(1, op)
			r.String(2, fmt.Sprintf("%d:%d", d.Major, d.Minor))
			r.Uint(3, d.Major)
			r.Uint(4, d.Minor)
			r.Uint(5, v)
			blkio.Message(field, r)
		}
		entry(1, "Read", d.ReadBytes)
		entry(1, "Write", d.WriteBytes)
		entry(2, "Read", d.ReadOps)
		entry(2, "Write", d.WriteOps)
	}
	m.Always(5, blkio)

	oom := new(wire.Record)
	oom.Uint(3, st.Memory.OOMKills)
	// Readers look into it where there is memory, also for 0.
	if len(st.Memory.Stat) > 0 {
		m.Always(9, oom)
	}
	return m
}

// metricsV2 is io.containerd.cgroups.v2.Metrics.
func metricsV2(st *cgroup.Stats) *wire.Record {
	m := new(wire.Record)
	m.Message(1, pids(st.Pids))

	const us = 1000
	cpu := new(wire.Record)
	cpu.Uint(1, st.CPU.Total/us)
	cpu.Uint(2, st.CPU.User/us)
	cpu.Uint(3, st.CPU.Kernel/us)
	cpu.Uint(4, st.CPU.Periods)
	cpu.Uint(5, st.CPU.ThrottledPeriods)
	cpu.Uint(6, st.CPU.ThrottledTime/us)
	cpu.Uint(8, st.CPU.Bursts)
	cpu.Uint(9, st.CPU.BurstTime/us)
	m.Message(2, cpu)

	mem := memoryStat(memoryV2, st.Memory.Stat)
	mem.Uint(32, st.Memory.Memory.Usage)
	mem.Uint(33, st.Memory.Memory.Limit)
	mem.Uint(34, st.Memory.Swap.Usage)
	mem.Uint(35, st.Memory.Swap.Limit)
	mem.Uint(36, st.Memory.Memory.Max)
	m.Message(4, mem)

	io := new(wire.Record)
	for _, d := range st.IO {
		r := new(wire.Record)
		r.Uint(1, d.Major)
		r.Uint(2, d.Minor)
		r.Uint(3, d.ReadBytes)
		r.Uint(4, d.WriteBytes)
		r.Uint(5, d.ReadOps)
		r.Uint(6, d.WriteOps)
		io.Message(1, r)
	}
	m.Message(5, io)

	events := new(wire.Record)
	for field, key := range []string{1: "low", "high", "max", "oom", "oom_kill", "oom_group_kill"} {
		if key != "" {
			events.Uint(field, st.Memory.Events[key])
		}
	}
	if len(st.Memory.Stat) > 0 {
		m.Always(8, events)
	}
	return m
}
