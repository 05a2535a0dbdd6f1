//go:build linux

package plan

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// schedule sets what decides where and when the process runs, and from which memory it
// is served. All of it needs rights that the process may give up later.
func (c *compiler) schedule(p *specs.Process) error {
	if err := c.scheduler(p.Scheduler); err != nil {
		return err
	}
	if io := p.IOPriority; io != nil {
		class, ok := ioClasses.find(string(io.Class))
		if !ok {
			return fmt.Errorf("process.ioPriority: unknown class %q", io.Class)
		}
		if io.Priority < 0 || io.Priority > 7 {
			return fmt.Errorf("process.ioPriority: priority %d is not within 0 and 7", io.Priority)
		}
		c.at("process.ioPriority")
		c.child.do("set the I/O priority to %s/%d", io.Class, io.Priority)
		c.child.call(sysIoprioSet, num(1), num(0), num(class<<13|uint64(io.Priority)))
	}
	l := c.spec.Linux
	if l == nil {
		return nil
	}
	if l.Personality != nil {
		domain, ok := map[specs.LinuxPersonalityDomain]uint64{"LINUX": 0, "LINUX32": 8}[l.Personality.Domain]
		if !ok {
			return fmt.Errorf("linux.personality: unknown domain %q", l.Personality.Domain)
		}
		if len(l.Personality.Flags) > 0 {
			return fmt.Errorf("linux.personality: unknown flag %q", l.Personality.Flags[0])
		}
		c.at("linux.personality")
		c.child.do("set the personality to %s", l.Personality.Domain)
		c.child.call(sysPersonality, num(domain))
	}
	return c.memoryPolicy(l.MemoryPolicy)
}

var schedPolicies = table[uint64]{
	{"SCHED_OTHER", 0}, {"SCHED_FIFO", 1}, {"SCHED_RR", 2}, {"SCHED_BATCH", 3}, {"SCHED_ISO", 4}, {"SCHED_IDLE", 5}, {"SCHED_DEADLINE", 6},
}

var schedFlags = table[uint64]{
	{"SCHED_FLAG_RESET_ON_FORK", 1}, {"SCHED_FLAG_RECLAIM", 2}, {"SCHED_FLAG_DL_OVERRUN", 4}, {"SCHED_FLAG_KEEP_POLICY", 8},
	{"SCHED_FLAG_KEEP_PARAMS", 16}, {"SCHED_FLAG_UTIL_CLAMP_MIN", 32}, {"SCHED_FLAG_UTIL_CLAMP_MAX", 64},
}

var ioClasses = table[uint64]{{"IOPRIO_CLASS_RT", 1}, {"IOPRIO_CLASS_BE", 2}, {"IOPRIO_CLASS_IDLE", 3}}

// utilMax is the highest utilisation, which as an upper clamp clamps nothing.
const utilMax = 1024

func (c *compiler) scheduler(s *specs.Scheduler) error {
	if s == nil {
		return nil
	}
	policy, ok := schedPolicies.find(string(s.Policy))
	if !ok {
		return fmt.Errorf("process.scheduler: unknown policy %q", s.Policy)
	}
	var fl uint64
	for _, f := range s.Flags {
		bit, ok := schedFlags.find(string(f))
		if !ok {
			return fmt.Errorf("process.scheduler: unknown flag %q", f)
		}
		fl |= bit
	}
	realtime := s.Policy == specs.SchedFIFO || s.Policy == specs.SchedRR
	switch {
	case s.Nice < -20 || s.Nice > 19:
		return fmt.Errorf("process.scheduler: nice %d is not within -20 and 19", s.Nice)
	case s.Priority != 0 && !realtime:
		return fmt.Errorf("process.scheduler: priority %d: %s has none", s.Priority, s.Policy)
	case realtime && (s.Priority < 1 || s.Priority > 99):
		return fmt.Errorf("process.scheduler: priority %d of %s is not within 1 and 99", s.Priority, s.Policy)
	case (s.Runtime != 0 || s.Deadline != 0 || s.Period != 0) && s.Policy != specs.SchedDeadline:
		return fmt.Errorf("process.scheduler: runtime, deadline and period are for SCHED_DEADLINE, not for %s", s.Policy)
	}
	// struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period,
	// util_min, util_max. The specification has flags for clamps but no values: these
	// clamp nothing.
	attr := append(halves(56, uint32(policy)), words(fl)...)
	attr = append(attr, halves(uint32(s.Nice), uint32(s.Priority))...)
	attr = append(attr, words(s.Runtime, s.Deadline, s.Period)...)
	attr = append(attr, halves(0, utilMax)...)
	if c.p.LoaderForks {
		c.p.Scheduler, c.p.SchedulerName, c.p.Waits = attr, string(s.Policy), !c.o.Hold
		return nil
	}
	c.at("process.scheduler")
	c.child.do("set the scheduler to %s", s.Policy)
	c.child.call(sysSchedSetattr, num(0), data(attr, fmt.Sprintf("{%s nice=%d priority=%d}", s.Policy, s.Nice, s.Priority)), num(0))
	return nil
}

// The numbers of set_mempolicy(2).
var (
	memoryModes = table[uint64]{
		{string(specs.MpolDefault), 0}, {string(specs.MpolPreferred), 1}, {string(specs.MpolBind), 2}, {string(specs.MpolInterleave), 3}, {string(specs.MpolLocal), 4},
		{string(specs.MpolPreferredMany), 5}, {string(specs.MpolWeightedInterleave), 6},
	}
	memoryFlags = table[uint64]{
		{string(specs.MpolFNumaBalancing), 1 << 13}, {string(specs.MpolFRelativeNodes), 1 << 14}, {string(specs.MpolFStaticNodes), 1 << 15},
	}
)

// MemoryPolicies lists the modes and flags of linux.memoryPolicy that are known.
func MemoryPolicies() (modes, flags []string) {
	for _, m := range memoryModes {
		modes = append(modes, m.name)
	}
	for _, f := range memoryFlags {
		flags = append(flags, f.name)
	}
	slices.Sort(modes)
	slices.Sort(flags)
	return modes, flags
}

// The highest numbers that the kernel can be built for.
const (
	maxNode = 1024
	maxCPU  = 8192
)

func (c *compiler) memoryPolicy(m *specs.LinuxMemoryPolicy) error {
	if m == nil {
		return nil
	}
	mode, ok := memoryModes.find(string(m.Mode))
	if !ok {
		return fmt.Errorf("linux.memoryPolicy: unknown mode %q", m.Mode)
	}
	text := string(m.Mode)
	for _, f := range m.Flags {
		bit, ok := memoryFlags.find(string(f))
		if !ok {
			return fmt.Errorf("linux.memoryPolicy: unknown flag %q", f)
		}
		mode |= bit
		text += "|" + string(f)
	}
	mask, err := Bits(m.Nodes, maxNode)
	if err != nil {
		return fmt.Errorf("linux.memoryPolicy.nodes: %w", err)
	}
	some := len(mask) > 0
	switch m.Mode {
	case specs.MpolDefault, specs.MpolLocal:
		if some {
			return fmt.Errorf("linux.memoryPolicy: %s takes no nodes", m.Mode)
		}
	case specs.MpolPreferred: // without nodes it is MPOL_LOCAL
	default:
		if !some {
			return fmt.Errorf("linux.memoryPolicy: %s needs nodes", m.Mode)
		}
	}
	c.at("linux.memoryPolicy")
	c.child.do("set the memory policy to %s %s", m.Mode, m.Nodes)
	if !some {
		c.child.call(sysMempolicy, flags(mode, text), none, none)
		return nil
	}
	// One more than there are bits: the kernel subtracts one.
	c.child.call(sysMempolicy, flags(mode, text), data(mask, "{"+m.Nodes+"}"), num(8*len(mask)+1))
	return nil
}

// affinity lets the process run on some CPUs only. Where it runs before, while it is
// cloned, is Plan.Affinity.
func (c *compiler) affinity(a *specs.CPUAffinity) error {
	if a == nil {
		return nil
	}
	if err := checkAffinity(a); err != nil {
		return err
	}
	c.p.Affinity, _ = Bits(a.Initial, maxCPU)
	if final, _ := Bits(a.Final, maxCPU); len(final) > 0 {
		c.at("process.execCPUAffinity.final")
		c.child.do("run on the CPUs %s", a.Final)
		c.child.call(sysAffinity, num(0), num(len(final)), data(final, "{"+a.Final+"}"))
	}
	return nil
}

// checkAffinity is for the configuration of a container, whose first process it does not
// concern.
func checkAffinity(a *specs.CPUAffinity) error {
	if a == nil {
		return nil
	}
	if _, err := Bits(a.Initial, maxCPU); err != nil {
		return fmt.Errorf("process.execCPUAffinity.initial: %w", err)
	}
	if _, err := Bits(a.Final, maxCPU); err != nil {
		return fmt.Errorf("process.execCPUAffinity.final: %w", err)
	}
	return nil
}

// Bits turns a list like "0-3,7" into a mask of whole 64 bit words. An empty list is an
// empty mask.
func Bits(list string, limit int) ([]byte, error) {
	var mask []uint64
	if strings.TrimSpace(list) == "" {
		return nil, nil
	}
	if len(list) > 1<<16 {
		return nil, fmt.Errorf("%d bytes are too many", len(list))
	}
	for part := range strings.SplitSeq(list, ",") {
		first, last, isRange := strings.Cut(strings.TrimSpace(part), "-")
		a, err := strconv.ParseUint(first, 10, 16)
		b := a
		if err == nil && isRange {
			b, err = strconv.ParseUint(last, 10, 16)
		}
		if err != nil || b < a || b >= uint64(limit) {
			return nil, fmt.Errorf("%.40q is not a number or range below %d", part, limit)
		}
		for i := a; i <= b; i++ {
			for len(mask) <= int(i/64) {
				mask = append(mask, 0)
			}
			mask[i/64] |= 1 << (i % 64)
		}
	}
	return words(mask...), nil
}

// Namespaces lists the types of namespaces that are known.
func Namespaces() []string {
	out := make([]string, 0, len(namespaceFlags))
	for _, n := range namespaceFlags {
		out = append(out, n.Type)
	}
	slices.Sort(out)
	return out
}
