//go:build linux

package cgroup

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// planner turns resources into writes, without writing any of them. Of the cgroup it
// reads which files there are, and with checkBeforeUpdate how much memory is in use.
type planner struct {
	c     *Cgroup
	fresh bool
	steps []step
	group int
	v2has []string // controllers enabled for the v2 directory; nil: not read yet
}

// plan gives the writes for everything but the devices.
func (p *planner) plan(r *specs.LinuxResources) ([]step, error) {
	parts := []struct {
		asked bool
		plan  func(*specs.LinuxResources) error
	}{
		{r.CPU != nil, func(r *specs.LinuxResources) error { return p.cpu(r.CPU) }},
		{r.CPU != nil, func(r *specs.LinuxResources) error { return p.cpuset(r.CPU) }},
		{r.Memory != nil, func(r *specs.LinuxResources) error { return p.memory(r.Memory) }},
		{r.Pids != nil, func(r *specs.LinuxResources) error { return p.pids(r.Pids) }},
		{r.BlockIO != nil, func(r *specs.LinuxResources) error { return p.blockIO(r.BlockIO) }},
		{len(r.HugepageLimits) > 0, func(r *specs.LinuxResources) error { return p.hugetlb(r.HugepageLimits) }},
		{r.Network != nil, func(r *specs.LinuxResources) error { return p.network(r.Network) }},
		{len(r.Rdma) > 0, func(r *specs.LinuxResources) error { return p.rdma(r.Rdma) }},
		{len(r.Unified) > 0, func(r *specs.LinuxResources) error { return p.unified(r.Unified) }},
	}
	for _, part := range parts {
		if part.asked {
			if err := part.plan(r); err != nil {
				return nil, err
			}
		}
	}
	return p.steps, nil
}

// find gives the directory that has the controller, and whether it is a v2 one.
func (p *planner) find(controller, asked string) (dir string, v2 bool, err error) {
	if dir, ok := p.c.v1[controller]; ok {
		return dir, false, nil
	}
	name := controller
	if controller == "blkio" {
		name = "io"
	}
	has, err := p.enabled(name)
	if err != nil {
		return "", false, err
	}
	if !has {
		return "", false, &MissingError{name, asked}
	}
	return p.c.v2, true, nil
}

// enabled tells whether the v2 directory has the controller. One that the hierarchy
// has but has not handed down so far is handed down now.
func (p *planner) enabled(controller string) (bool, error) {
	if p.c.v2 == "" {
		return false, nil
	}
	for try := range 2 {
		if p.v2has == nil {
			names, err := readString(p.c.v2 + "/cgroup.controllers")
			if err != nil {
				return false, err
			}
			p.v2has = strings.Fields(names)
			if p.v2has == nil {
				p.v2has = []string{}
			}
		}
		if slices.Contains(p.v2has, controller) {
			return true, nil
		}
		if try == 0 && slices.Contains(delegated, controller) {
			if err := enable(p.c.v2, controller); err != nil {
				return false, err
			}
			p.v2has = nil
		}
	}
	return false, nil
}

func (p *planner) write(path, value string) {
	p.steps = append(p.steps, step{path: path, value: value})
}

// together adds steps whose order the kernel's present values decide.
func (p *planner) together(steps ...step) {
	p.group++
	for _, s := range steps {
		s.group = p.group
		p.steps = append(p.steps, s)
	}
}

func invalid(format string, a ...any) error {
	return classed(fmt.Errorf(format, a...), errdefs.ErrInvalidArgument)
}

func set[T comparable](v *T) bool {
	var zero T
	return v != nil && *v != zero
}

// weightOfShares converts v1's cpu.shares (2 to 262144, 1024 being normal) to v2's
// cpu.weight (1 to 10000, 100 being normal). The curve is the one that runtimes have
// agreed on (runc 1.4, crun 1.23): it meets both ends and the middle, where the linear
// one that they had before gave a normal container a weight of 39. Shares that v1 refuses are
// the least or the largest weight, as in other runtimes.
func weightOfShares(shares uint64) uint64 {
	switch {
	case shares <= 2:
		return 1
	case shares >= 262144:
		return 10000
	}
	l := math.Log2(float64(shares))
	return uint64(math.Ceil(math.Pow(10, (l*l+125*l)/612-7.0/34)))
}

const (
	minShares, maxShares = 2, 262144 // the kernel cuts other values off without a word
	defaultPeriod        = 100000    // µs, the kernel's
)

func (p *planner) cpu(r *specs.LinuxCPU) error {
	if !set(r.Shares) && !set(r.Quota) && !set(r.Period) && r.Burst == nil && r.Idle == nil && !set(r.RealtimeRuntime) && !set(r.RealtimePeriod) {
		return nil
	}
	if r.Quota != nil && *r.Quota < -1 {
		return invalid("cpu.quota is %d", *r.Quota)
	}
	if r.Idle != nil && *r.Idle != 0 && *r.Idle != 1 {
		return invalid("cpu.idle is %d, which is neither 0 nor 1", *r.Idle)
	}
	dir, v2, err := p.find("cpu", "cpu")
	if err != nil {
		return err
	}
	if v2 {
		return p.cpuV2(dir, r)
	}
	var weight []step
	if set(r.Shares) {
		if *r.Shares < minShares || *r.Shares > maxShares {
			return invalid("cpu.shares is %d, which is not within %d and %d", *r.Shares, minShares, maxShares)
		}
		weight = append(weight, step{path: dir + "/cpu.shares", value: utoa(*r.Shares)})
	}
	if r.Idle != nil && (*r.Idle != 0 || !p.fresh && exists(dir+"/cpu.idle")) {
		weight = append(weight, step{path: dir + "/cpu.idle", value: itoa(*r.Idle)})
	}
	p.together(weight...)

	var quota []step
	if set(r.Period) {
		quota = append(quota, step{path: dir + "/cpu.cfs_period_us", value: utoa(*r.Period)})
	}
	if set(r.Quota) {
		quota = append(quota, step{path: dir + "/cpu.cfs_quota_us", value: itoa(*r.Quota)})
	}
	if r.Burst != nil && (*r.Burst != 0 || !p.fresh && exists(dir+"/cpu.cfs_burst_us")) {
		quota = append(quota, step{path: dir + "/cpu.cfs_burst_us", value: utoa(*r.Burst)})
	}
	p.together(quota...)

	var realtime []step
	if set(r.RealtimePeriod) {
		realtime = append(realtime, step{path: dir + "/cpu.rt_period_us", value: utoa(*r.RealtimePeriod)})
	}
	if set(r.RealtimeRuntime) {
		realtime = append(realtime, step{path: dir + "/cpu.rt_runtime_us", value: itoa(*r.RealtimeRuntime)})
	}
	p.together(realtime...)
	return nil
}

func (p *planner) cpuV2(dir string, r *specs.LinuxCPU) error {
	if set(r.RealtimePeriod) || set(r.RealtimeRuntime) {
		return invalid("cpu.realtimeRuntime and realtimePeriod do not exist in cgroup v2")
	}
	var weight []step
	if set(r.Shares) {
		weight = append(weight, step{path: dir + "/cpu.weight", value: utoa(weightOfShares(*r.Shares))})
	}
	if r.Idle != nil && (*r.Idle != 0 || !p.fresh && exists(dir+"/cpu.idle")) {
		weight = append(weight, step{path: dir + "/cpu.idle", value: itoa(*r.Idle)})
	}
	p.together(weight...)

	var quota []step
	if set(r.Quota) || set(r.Period) {
		// One file holds both, so the one that is not asked for is read; a write of the
		// quota alone would leave the period as it is, but there is none of the period alone.
		quotaText, period := "max", uint64(defaultPeriod)
		if !p.fresh && (!set(r.Quota) || !set(r.Period)) {
			now, err := readString(dir + "/cpu.max")
			if err != nil {
				return err
			}
			q, per, _ := strings.Cut(now, " ")
			if n, err := strconv.ParseUint(per, 10, 64); err == nil {
				quotaText, period = q, n
			}
		}
		if set(r.Quota) {
			if quotaText = "max"; *r.Quota > 0 {
				quotaText = itoa(*r.Quota)
			}
		}
		if set(r.Period) {
			period = *r.Period
		}
		quota = append(quota, step{path: dir + "/cpu.max", value: quotaText + " " + utoa(period)})
	}
	if r.Burst != nil && (*r.Burst != 0 || !p.fresh && exists(dir+"/cpu.max.burst")) {
		quota = append(quota, step{path: dir + "/cpu.max.burst", value: utoa(*r.Burst)})
	}
	p.together(quota...)
	return nil
}

func (p *planner) cpuset(r *specs.LinuxCPU) error {
	if r.Cpus == "" && r.Mems == "" {
		return nil
	}
	for _, l := range []struct{ name, list string }{{"cpu.cpus", r.Cpus}, {"cpu.mems", r.Mems}} {
		if err := checkList(l.list); err != nil {
			return invalid("%s is %q: %v", l.name, short(l.list), err)
		}
	}
	dir, _, err := p.find("cpuset", "cpu.cpus")
	if err != nil {
		return err
	}
	if r.Cpus != "" {
		p.write(dir+"/cpuset.cpus", r.Cpus)
	}
	if r.Mems != "" {
		p.write(dir+"/cpuset.mems", r.Mems)
	}
	return nil
}

// checkList looks at the form of a list like "0-3,7". What numbers exist is the
// kernel's to say, and it says so at once whatever their size.
func checkList(s string) error {
	if len(s) > 16<<10 {
		return fmt.Errorf("%d bytes are too many", len(s))
	}
	if s == "" {
		return nil
	}
	for part := range strings.SplitSeq(s, ",") {
		from, to, isRange := strings.Cut(strings.TrimSpace(part), "-")
		a, err := strconv.ParseUint(from, 10, 31)
		if err != nil {
			return fmt.Errorf("%q is not a number of a CPU or memory node", short(from))
		}
		if isRange {
			// "0-15:1/2" (every second one) is the kernel's, and of no use here.
			b, err := strconv.ParseUint(to, 10, 31)
			if err != nil {
				return fmt.Errorf("%q is not a number of a CPU or memory node", short(to))
			}
			if b < a {
				return fmt.Errorf("%d-%d runs backwards", a, b)
			}
		}
	}
	return nil
}

func (p *planner) memory(r *specs.LinuxMemory) error {
	swappiness, oom := r.Swappiness != nil, r.DisableOOMKiller != nil
	if !set(r.Limit) && !set(r.Reservation) && !set(r.Swap) && !swappiness && !oom && r.UseHierarchy == nil {
		return nil
	}
	for _, v := range []struct {
		name  string
		value *int64
	}{{"limit", r.Limit}, {"reservation", r.Reservation}, {"swap", r.Swap}} {
		if v.value != nil && *v.value < -1 {
			return invalid("memory.%s is %d", v.name, *v.value)
		}
	}
	if set(r.Swap) && *r.Swap > 0 && set(r.Limit) {
		if *r.Limit == -1 {
			return invalid("memory.swap is %d, but memory.limit is unlimited", *r.Swap)
		}
		if *r.Swap < *r.Limit {
			return invalid("memory.swap (memory and swap together) is %d, below memory.limit %d", *r.Swap, *r.Limit)
		}
	}
	dir, v2, err := p.find("memory", "memory")
	if err != nil {
		return err
	}
	if r.CheckBeforeUpdate != nil && *r.CheckBeforeUpdate && set(r.Limit) && *r.Limit > 0 && !p.fresh {
		file := "/memory.usage_in_bytes"
		if v2 {
			file = "/memory.current"
		}
		usage, err := readUint(dir + file)
		if err != nil {
			return err
		}
		if usage > uint64(*r.Limit) {
			return fmt.Errorf("memory.limit %d is below the %d bytes in use: %w", *r.Limit, usage, errdefs.ErrFailedPrecondition)
		}
	}
	if v2 {
		return p.memoryV2(dir, r)
	}
	if r.UseHierarchy != nil {
		// Since Linux 5.11 there is nothing but hierarchies, and the kernel refuses 0.
		value := "0"
		if *r.UseHierarchy {
			value = "1"
		}
		p.write(dir+"/memory.use_hierarchy", value)
	}
	var limits []step
	if set(r.Limit) {
		limits = append(limits, step{path: dir + "/memory.limit_in_bytes", value: itoa(*r.Limit)})
	}
	const memsw = "/memory.memsw.limit_in_bytes"
	switch {
	case set(r.Swap):
		if !exists(dir + memsw) {
			if *r.Swap != -1 {
				return fmt.Errorf("memory.swap: swap accounting is not enabled in this kernel: %w", errdefs.ErrFailedPrecondition)
			}
			break
		}
		limits = append(limits, step{path: dir + memsw, value: itoa(*r.Swap)})
	case set(r.Limit) && *r.Limit == -1 && !p.fresh && exists(dir+memsw):
		// No limit of memory is above any limit of memory and swap together.
		limits = append(limits, step{path: dir + memsw, value: "-1"})
	}
	p.together(limits...)
	if set(r.Reservation) {
		p.write(dir+"/memory.soft_limit_in_bytes", itoa(*r.Reservation))
	}
	if file := dir + "/memory.kmem.tcp.limit_in_bytes"; set(r.KernelTCP) && *r.KernelTCP > 0 && exists(file) {
		p.write(file, itoa(*r.KernelTCP))
	}
	if swappiness {
		p.write(dir+"/memory.swappiness", utoa(*r.Swappiness))
	}
	if oom && (*r.DisableOOMKiller || !p.fresh) {
		value := "0"
		if *r.DisableOOMKiller {
			value = "1"
		}
		p.steps = append(p.steps, step{path: dir + "/memory.oom_control", value: value, field: "oom_kill_disable"})
	}
	return nil
}

func (p *planner) memoryV2(dir string, r *specs.LinuxMemory) error {
	if r.Swappiness != nil {
		return invalid("memory.swappiness does not exist in cgroup v2")
	}
	if r.DisableOOMKiller != nil && *r.DisableOOMKiller {
		return invalid("memory.disableOOMKiller does not exist in cgroup v2")
	}
	if r.UseHierarchy != nil && !*r.UseHierarchy {
		return invalid("memory.useHierarchy cannot be off in cgroup v2")
	}
	swap := ""
	switch {
	case set(r.Swap) && *r.Swap == -1:
		swap = "max"
	case set(r.Swap):
		if !set(r.Limit) {
			return invalid("memory.swap (memory and swap together) is %d, but memory.limit is not given", *r.Swap)
		}
		swap = itoa(*r.Swap - *r.Limit)
	case set(r.Limit) && *r.Limit == -1:
		swap = "max"
	}
	if swap != "" {
		switch file := dir + "/memory.swap.max"; {
		case exists(file):
			p.write(file, swap)
		case swap != "max" && swap != "0":
			return fmt.Errorf("memory.swap: swap accounting is not enabled in this kernel: %w", errdefs.ErrFailedPrecondition)
		}
	}
	if set(r.Limit) {
		p.write(dir+"/memory.max", maxOr(*r.Limit))
	}
	if set(r.Reservation) {
		p.write(dir+"/memory.low", maxOr(*r.Reservation))
	}
	return nil
}

func (p *planner) pids(r *specs.LinuxPids) error {
	if r.Limit == nil {
		return nil
	}
	limit := *r.Limit
	if limit < -1 {
		return invalid("pids.limit is %d", limit)
	}
	dir, _, err := p.find("pids", "pids.limit")
	if err != nil {
		return err
	}
	if limit == 0 {
		// "No more processes": 1 says the same, since the container's first process is
		// there already, and lets that one be cloned right into the cgroup.
		limit = 1
	}
	p.write(dir+"/pids.max", maxOr(limit))
	return nil
}

func (p *planner) hugetlb(limits []specs.LinuxHugepageLimit) error {
	dir, v2, err := p.find("hugetlb", "hugepageLimits")
	if err != nil {
		return err
	}
	suffix := ".limit_in_bytes"
	if v2 {
		suffix = ".max"
	}
	for _, l := range limits {
		size := strings.TrimRight(l.Pagesize, "KMGTB")
		if _, err := strconv.ParseUint(size, 10, 32); err != nil || len(l.Pagesize)-len(size) != 2 || l.Pagesize[len(l.Pagesize)-1] != 'B' {
			return invalid("hugepageLimits: page size %q", short(l.Pagesize))
		}
		file := dir + "/hugetlb." + l.Pagesize
		if !exists(file + suffix) {
			return invalid("hugepageLimits: this machine has no huge pages of %s", l.Pagesize)
		}
		p.write(file+suffix, utoa(l.Limit))
		if rsvd := file + ".rsvd" + suffix; exists(rsvd) {
			p.write(rsvd, utoa(l.Limit))
		}
	}
	return nil
}

func (p *planner) network(r *specs.LinuxNetwork) error {
	if r.ClassID != nil {
		dir, ok := p.c.v1["net_cls"]
		if !ok {
			return &MissingError{"net_cls", "network.classID"}
		}
		p.write(dir+"/net_cls.classid", utoa(uint64(*r.ClassID)))
	}
	for _, prio := range r.Priorities {
		dir, ok := p.c.v1["net_prio"]
		if !ok {
			return &MissingError{"net_prio", "network.priorities"}
		}
		if prio.Name == "" || strings.ContainsAny(prio.Name, " \t\n\x00/") {
			return invalid("network.priorities: interface %q", short(prio.Name))
		}
		p.steps = append(p.steps, step{
			path: dir + "/net_prio.ifpriomap", value: prio.Name + " " + utoa(uint64(prio.Priority)),
			key: prio.Name, none: "0",
		})
	}
	return nil
}

func (p *planner) rdma(r map[string]specs.LinuxRdma) error {
	dir, _, err := p.find("rdma", "rdma")
	if err != nil {
		return err
	}
	for _, device := range slices.Sorted(maps.Keys(r)) {
		if device == "" || strings.ContainsAny(device, " \t\n\x00") {
			return invalid("rdma: device %q", short(device))
		}
		value := device
		if h := r[device].HcaHandles; h != nil {
			value += " hca_handle=" + utoa(uint64(*h))
		}
		if o := r[device].HcaObjects; o != nil {
			value += " hca_object=" + utoa(uint64(*o))
		}
		if value == device {
			continue
		}
		p.steps = append(p.steps, step{
			path: dir + "/rdma.max", value: value,
			key: device, none: "hca_handle=max hca_object=max",
		})
	}
	return nil
}

// unified takes file names and contents of cgroup v2 as they are.
func (p *planner) unified(r map[string]string) error {
	if p.c.v2 == "" {
		return invalid("unified resources need cgroup v2")
	}
	for _, file := range slices.Sorted(maps.Keys(r)) {
		controller, _, ok := strings.Cut(file, ".")
		if !ok || controller == "" || strings.ContainsAny(file, "/\x00\n") {
			return invalid("unified: %q is not a file of cgroup v2", short(file))
		}
		// The core files move processes, freeze, kill and delegate: none is a resource.
		if controller == "cgroup" && file != "cgroup.max.depth" && file != "cgroup.max.descendants" {
			return invalid("unified: %s is not a resource", short(file))
		}
		if controller != "cgroup" {
			has, err := p.enabled(controller)
			if err != nil {
				return err
			}
			if !has {
				return &MissingError{short(controller), "unified." + short(file)}
			}
		}
		path := p.c.v2 + "/" + file
		if len(file) > 255 || !exists(path) {
			return invalid("unified: this kernel has no %s", short(file))
		}
		// A file with a line for each device takes one line in one write.
		for line := range strings.SplitSeq(strings.TrimRight(r[file], "\n"), "\n") {
			s := step{path: path, value: line}
			switch file {
			case "io.max":
				s.key, s.none = firstField(line), noIOMax
			case "io.weight", "io.bfq.weight":
				if k := firstField(line); strings.Contains(k, ":") {
					s.key, s.none = k, "default"
				}
			case "rdma.max":
				s.key, s.none = firstField(line), "hca_handle=max hca_object=max"
			}
			p.steps = append(p.steps, s)
		}
	}
	return nil
}

func firstField(s string) string {
	key, _, _ := strings.Cut(strings.TrimSpace(s), " ")
	return key
}

// maxOr prints a limit, -1 being none.
func maxOr(n int64) string {
	if n < 0 {
		return "max"
	}
	return itoa(n)
}

func itoa(n int64) string  { return strconv.FormatInt(n, 10) }
func utoa(n uint64) string { return strconv.FormatUint(n, 10) }
