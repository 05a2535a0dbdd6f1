//go:build linux

package cgroup

import (
	"bytes"
	"math"
	"strconv"
	"strings"
)

// CPUSetStats are the settings of a cpuset on cgroup v1.
type CPUSetStats struct {
	CPUs, Mems                         []uint16
	CPUExclusive, MemExclusive         uint64
	MemHardwall, MemoryMigrate         uint64
	MemorySpreadPage, MemorySpreadSlab uint64
	MemoryPressure                     uint64
	SchedLoadBalance                   uint64
	SchedRelaxDomainLevel              int64
}

// CPUSet reads them; all is zero where there is no cpuset of v1.
func (c *Cgroup) CPUSet() (CPUSetStats, error) {
	var s CPUSetStats
	dir := c.v1["cpuset"]
	if dir == "" {
		return s, nil
	}
	r := &reader{}
	r.in(dir)
	defer r.close()
	list := func(name string) []uint16 { return parseList(string(bytes.TrimSpace(r.read("cpuset." + name)))) }
	s.CPUs, s.Mems = list("cpus"), list("mems")
	for name, to := range map[string]*uint64{
		"cpu_exclusive": &s.CPUExclusive, "mem_exclusive": &s.MemExclusive, "mem_hardwall": &s.MemHardwall, "memory_migrate": &s.MemoryMigrate,
		"memory_spread_page": &s.MemorySpreadPage, "memory_spread_slab": &s.MemorySpreadSlab, "memory_pressure": &s.MemoryPressure,
		"sched_load_balance": &s.SchedLoadBalance,
	} {
		*to = r.uint("cpuset." + name)
	}
	s.SchedRelaxDomainLevel, _ = strconv.ParseInt(string(bytes.TrimSpace(r.read("cpuset.sched_relax_domain_level"))), 10, 64)
	return s, r.err
}

// parseList reads "0-3,7". What is no list of numbers below 65536 is left out.
func parseList(text string) (out []uint16) {
	for part := range strings.SplitSeq(text, ",") {
		first, last, ok := strings.Cut(part, "-")
		if !ok {
			last = first
		}
		from, err1 := strconv.ParseUint(first, 10, 16)
		to, err2 := strconv.ParseUint(last, 10, 16)
		if err1 != nil || err2 != nil {
			continue
		}
		for n := from; n <= to && n <= math.MaxUint16; n++ {
			out = append(out, uint16(n))
		}
	}
	return out
}
