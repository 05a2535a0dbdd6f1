package engine

import (
	"context"
	"errors"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/network"
)

// CgroupMetrics is all that the kernel tells about one cgroup, those below it included.
type CgroupMetrics struct {
	HasCPU, HasMemory, HasPids, HasIO bool // whether the controller is there

	Usage  Usage
	Counts Stats // without networks

	Cache, Mapped, Kernel  uint64 // bytes
	OwnFaults, OwnMajor    uint64 // page faults, without cgroups below
	OOMKills               uint64
	Shares, Period         uint64 // of CPU time, in units of cgroup v1: 1024 is one share; µs
	Quota                  uint64 // µs; 0: none
	Reservation, SwapLimit uint64 // bytes; memory and swap together; 0: none
	Huge                   []HugeMetrics
}

// HugeMetrics is the use of huge pages of one size.
type HugeMetrics struct {
	Size       string // "2MB"
	Usage, Max uint64 // bytes; Max is 0 with cgroup v2, which does not keep it
	HasMax     bool
}

// ProcessMetrics is what the processes of a container hold.
type ProcessMetrics struct {
	Processes   uint64
	Descriptors uint64
	Sockets     uint64
	Limits      map[string]uint64 // soft limits of the first process that there are, by name
}

// VolumeMetrics is the file system that writable layers lie on.
type VolumeMetrics struct {
	Device             string
	Size               uint64 // bytes
	Inodes, InodesFree uint64
	Used               uint64 // bytes, by this container
}

// ContainerMetrics is all that can be measured of one container of a pod.
type ContainerMetrics struct {
	Container Container
	Cgroup    CgroupMetrics
	Path      string // of the cgroup, below the hierarchy's mount
	Process   ProcessMetrics
	Volume    VolumeMetrics
}

// PodMetrics is all that can be measured of a pod.
type PodMetrics struct {
	Sandbox    Sandbox
	Cgroup     *CgroupMetrics // nil: there is none yet
	Path       string
	Networks   map[string]NetStats // by interface; nil: the host's
	Containers []ContainerMetrics
}

// socketsRead is how many descriptors of a container are looked at to count its sockets: it
// may have millions.
const socketsRead = 1 << 16

// PodMetrics measures all ready pods. Like usage, it is read from the kernel's files.
func (e *Engine) PodMetrics(ctx context.Context) []PodMetrics {
	volumes := e.volumeMetrics()
	var picked []*sandbox
	for _, s := range e.pods.all() {
		if s.view().State == SandboxReady {
			picked = append(picked, s)
		}
	}
	out := make([]PodMetrics, len(picked))
	var g errgroup.Group
	g.SetLimit(statsWidth)
	for i, s := range picked {
		g.Go(func() error { out[i] = e.podMetrics(ctx, s, volumes); return nil })
	}
	_ = g.Wait()
	return out
}

func (e *Engine) podMetrics(ctx context.Context, s *sandbox, volumes map[string]VolumeMetrics) PodMetrics {
	out := PodMetrics{Sandbox: s.view()}
	dirs := e.podCgroupDirs(s)
	switch m, err := readMetrics(dirs); {
	case err == nil:
		out.Cgroup, out.Path = &m, cgroupName(dirs)
	case !errors.Is(err, fs.ErrNotExist):
		e.log.Warn("measure a sandbox", "sandbox", s.id, "error", err)
	}
	if out.Sandbox.NetNS != "" {
		if ifs, err := network.NetnsStats(out.Sandbox.NetNS); err == nil {
			out.Networks = map[string]NetStats{}
			for name, n := range ifs {
				out.Networks[name] = NetStats(n)
			}
		}
	}
	for _, c := range e.pods.containers(s.id) {
		v := c.view()
		if !v.State.live() || ctx.Err() != nil {
			continue
		}
		m, err := e.containerMetrics(ctx, c, v, volumes)
		switch {
		case err == nil:
			out.Containers = append(out.Containers, m)
		case !errors.Is(err, fs.ErrNotExist): // else it has just ended
			e.log.Warn("measure a container", "container", c.id, "error", err)
		}
	}
	if out.Cgroup == nil && len(out.Containers) > 0 {
		// Scopes of systemd need not have a slice for the pod: then it is what its containers are.
		out.Cgroup, out.Path = sumMetrics(out.Containers), "/"
		out.Cgroup.Usage.CPU = s.meter.grown(out.Cgroup.Usage.CPU)
		out.Cgroup.Counts.CPUTotal = out.Cgroup.Usage.CPU
	}
	return out
}

// sumMetrics adds up what can be added: not limits, peaks and weights.
func sumMetrics(of []ContainerMetrics) *CgroupMetrics {
	out := &CgroupMetrics{HasCPU: true, HasMemory: true, HasPids: true, HasIO: true}
	out.Usage.Time = time.Now()
	c := &out.Counts
	c.MemStats = map[string]uint64{}
	for i := range of {
		m := &of[i].Cgroup
		out.HasCPU, out.HasMemory = out.HasCPU && m.HasCPU, out.HasMemory && m.HasMemory
		out.HasPids, out.HasIO = out.HasPids && m.HasPids, out.HasIO && m.HasIO
		out.Usage.add(m.Usage)
		out.Cache += m.Cache
		out.Mapped += m.Mapped
		out.Kernel += m.Kernel
		out.OwnFaults += m.OwnFaults
		out.OwnMajor += m.OwnMajor
		out.OOMKills += m.OOMKills
		c.CPUTotal += m.Counts.CPUTotal
		c.CPUUser += m.Counts.CPUUser
		c.CPUKernel += m.Counts.CPUKernel
		c.Periods += m.Counts.Periods
		c.Throttled += m.Counts.Throttled
		c.ThrottledNS += m.Counts.ThrottledNS
		c.MemUsage += m.Counts.MemUsage
		c.MemFailcnt += m.Counts.MemFailcnt
		c.Pids += m.Counts.Pids
		for k, n := range m.Counts.MemStats {
			c.MemStats[k] += n
		}
		for _, b := range m.Counts.Blkio {
			at := slices.IndexFunc(c.Blkio, func(x BlkioEntry) bool { return x.Major == b.Major && x.Minor == b.Minor && x.Op == b.Op })
			if at < 0 {
				c.Blkio = append(c.Blkio, b)
				continue
			}
			c.Blkio[at].Bytes += b.Bytes
			c.Blkio[at].Ops += b.Ops
		}
	}
	return out
}

func (e *Engine) containerMetrics(ctx context.Context, c *container, v Container, volumes map[string]VolumeMetrics) (ContainerMetrics, error) {
	out := ContainerMetrics{Container: v}
	c.mu.Lock()
	r := c.run
	c.mu.Unlock()
	if r == nil {
		return out, fs.ErrNotExist
	}
	pid := int(r.pid.Load())
	dirs, err := r.meter.cgroups(pid)
	if err != nil {
		return out, err
	}
	if out.Cgroup, err = readMetrics(dirs); err != nil {
		return out, err
	}
	if v.Config.Resources.CPUShares > 0 { // a weight is less exact than what it was made of
		out.Cgroup.Shares = uint64(v.Config.Resources.CPUShares)
	}
	out.Path = cgroupName(dirs)
	out.Process = processMetrics(dirs, pid)
	out.Volume = volumes[v.Snapshotter]
	out.Volume.Used = e.writableUsage(ctx, r, &v).Bytes
	return out, nil
}

// cgroupName is the path of a cgroup as it is in every hierarchy.
func cgroupName(dirs map[string]string) string {
	for _, ctrl := range []string{"v2-controllers", "memory", "cpuacct", "pids"} {
		if dir, ok := dirs[ctrl]; ok {
			if _, rest, ok := strings.Cut(strings.TrimPrefix(dir, "/sys/fs/cgroup/"), "/"); ok && ctrl != "v2-controllers" {
				return "/" + rest
			}
			return strings.TrimPrefix(dir, "/sys/fs/cgroup")
		}
	}
	return "/"
}

// volumeMetrics looks at the file system of each snapshotter.
func (e *Engine) volumeMetrics() map[string]VolumeMetrics {
	out := map[string]VolumeMetrics{}
	for name := range e.opt.Snapshotters {
		var st unix.Stat_t
		var fs unix.Statfs_t
		path := filepath.Join(e.opt.Root, name)
		if unix.Stat(path, &st) != nil || unix.Statfs(path, &fs) != nil {
			continue
		}
		v := VolumeMetrics{Size: fs.Blocks * uint64(fs.Bsize), Inodes: fs.Files, InodesFree: fs.Ffree}
		if v.Device = DeviceName(uint64(unix.Major(st.Dev)), uint64(unix.Minor(st.Dev))); v.Device == "" {
			v.Device = path // a file system without a device of its own
		}
		out[name] = v
	}
	return out
}

// DeviceName finds the file of a block device; empty if there is none.
func DeviceName(major, minor uint64) string {
	b, err := os.ReadFile("/sys/dev/block/" + strconv.FormatUint(major, 10) + ":" + strconv.FormatUint(minor, 10) + "/uevent")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME="); ok {
			return "/dev/" + name
		}
	}
	return ""
}

// readMetrics reads all the files of a cgroup.
func readMetrics(dirs map[string]string) (CgroupMetrics, error) {
	var m CgroupMetrics
	var err error
	if m.Usage, err = readUsage(nil, dirs); err != nil {
		return m, err
	}
	if dir, v2 := dirs["v2-controllers"]; v2 {
		m.readV2(dir)
	} else {
		m.readV1(dirs)
	}
	m.Huge = readHuge(dirs)
	return m, nil
}

func (m *CgroupMetrics) readV1(dirs map[string]string) {
	cpu, mem := dirs["cpu"], dirs["memory"]
	m.HasCPU, m.HasMemory, m.HasPids, m.HasIO = dirs["cpuacct"] != "", mem != "", dirs["pids"] != "", dirs["blkio"] != ""
	readV1(&m.Counts, dirs)
	st := m.Counts.MemStats
	m.Cache, m.Mapped = st["total_cache"], st["total_mapped_file"]
	m.OwnFaults, m.OwnMajor = st["pgfault"], st["pgmajfault"]
	m.Kernel = readUint(mem, "memory.kmem.usage_in_bytes")
	m.OOMKills = readFlat(filepath.Join(mem, "memory.oom_control"))["oom_kill"]
	m.Shares, m.Period = readUint(cpu, "cpu.shares"), readUint(cpu, "cpu.cfs_period_us")
	m.Quota = readUint(cpu, "cpu.cfs_quota_us") // -1 reads as 0
	m.Reservation = limitV1(readUint(mem, "memory.soft_limit_in_bytes"))
	m.SwapLimit = limitV1(readUint(mem, "memory.memsw.limit_in_bytes"))
	m.Counts.MemLimit = limitV1(m.Counts.MemLimit)
}

func (m *CgroupMetrics) readV2(dir string) {
	have := " " + readLine(filepath.Join(dir, "cgroup.controllers")) + " "
	has := func(c string) bool { return strings.Contains(have, " "+c+" ") }
	m.HasCPU, m.HasMemory, m.HasPids, m.HasIO = true, has("memory"), has("pids"), has("io")
	readV2(&m.Counts, dir)
	st := m.Counts.MemStats
	m.Cache, m.Mapped, m.Kernel = st["file"], st["file_mapped"], st["kernel"]
	m.OwnFaults, m.OwnMajor = st["pgfault"], st["pgmajfault"] // the kernel has the sums only
	m.OOMKills = readFlat(filepath.Join(dir, "memory.events"))["oom_kill"]
	if w := readUint(dir, "cpu.weight"); w > 0 {
		m.Shares = sharesOf(w)
	}
	quota, period, _ := strings.Cut(readLine(filepath.Join(dir, "cpu.max")), " ")
	m.Quota, _ = strconv.ParseUint(quota, 10, 64) // "max" reads as 0
	m.Period, _ = strconv.ParseUint(period, 10, 64)
	m.Reservation = readUint(dir, "memory.low")
	if m.Usage.Limit > 0 && readLine(filepath.Join(dir, "memory.swap.max")) != "max" {
		m.SwapLimit = m.Usage.Limit + m.Usage.SwapLimit
	}
}

// sharesOf turns a weight of cgroup v2 back into the shares that it was made of.
func sharesOf(weight uint64) uint64 {
	return 2 + uint64(math.Ceil(float64(weight-1)*262142/9999))
}

// readHuge reads the use of huge pages of all sizes that the kernel has.
func readHuge(dirs map[string]string) []HugeMetrics {
	v1, dir := true, dirs["hugetlb"]
	if dir == "" {
		v1, dir = false, dirs["v2-controllers"]
	}
	if dir == "" {
		dir = dirs["unified"] // beside the controllers of cgroup v1
	}
	if dir == "" {
		return nil
	}
	sizes, err := os.ReadDir("/sys/kernel/mm/hugepages")
	if err != nil {
		return nil
	}
	var out []HugeMetrics
	for _, s := range sizes {
		kb, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimPrefix(s.Name(), "hugepages-"), "kB"), 10, 64)
		if err != nil {
			continue
		}
		h := HugeMetrics{Size: hugeSize(kb), HasMax: v1}
		usage, peak := ".current", ""
		if v1 {
			usage, peak = ".usage_in_bytes", ".max_usage_in_bytes"
		}
		if readLine(filepath.Join(dir, "hugetlb."+h.Size+usage)) == "" {
			continue
		}
		h.Usage = readUint(dir, "hugetlb."+h.Size+usage)
		if v1 {
			h.Max = readUint(dir, "hugetlb."+h.Size+peak)
		}
		out = append(out, h)
	}
	return out
}

// hugeSize writes a size of pages as the names of the kernel's files have it.
func hugeSize(kb uint64) string {
	switch {
	case kb >= 1<<20:
		return strconv.FormatUint(kb>>20, 10) + "GB"
	case kb >= 1<<10:
		return strconv.FormatUint(kb>>10, 10) + "MB"
	}
	return strconv.FormatUint(kb, 10) + "KB"
}

// processMetrics looks at the processes of a container. One that ends meanwhile is left out.
func processMetrics(dirs map[string]string, pid int) ProcessMetrics {
	dir := ""
	for _, ctrl := range []string{"v2-controllers", "pids", "memory", "cpuacct"} {
		if dir = dirs[ctrl]; dir != "" {
			break
		}
	}
	var out ProcessMetrics
	left := socketsRead
	for _, p := range cgroupProcesses(dir) {
		out.Processes++
		fds := "/proc/" + p + "/fd"
		var st unix.Stat_t
		if unix.Stat(fds, &st) != nil {
			continue
		}
		out.Descriptors += uint64(st.Size) // since Linux 6.2; else counted below
		n, sockets := countSockets(fds, left)
		left -= n
		out.Sockets += sockets
		if st.Size == 0 {
			out.Descriptors += uint64(n)
		}
	}
	out.Limits = softLimits(pid)
	return out
}

// cgroupProcesses lists the processes of a cgroup and of those below it.
func cgroupProcesses(dir string) []string {
	if dir == "" {
		return nil
	}
	var out []string
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil
		}
		b, _ := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		out = append(out, strings.Fields(string(b))...)
		return nil
	})
	return out
}

// countSockets looks at no more than limit descriptors.
func countSockets(dir string, limit int) (seen int, sockets uint64) {
	if limit <= 0 {
		return 0, 0
	}
	f, err := os.Open(dir)
	if err != nil {
		return 0, 0
	}
	defer f.Close()
	var buf [8]byte
	for seen < limit {
		names, err := f.Readdirnames(min(limit-seen, 1024))
		for _, name := range names {
			seen++
			if n, err := unix.Readlinkat(int(f.Fd()), name, buf[:]); err == nil && string(buf[:n]) == "socket:[" {
				sockets++
			}
		}
		if err != nil || len(names) == 0 {
			break
		}
	}
	return seen, sockets
}

// softLimits reads the soft limits of a process that are numbers: "Max open files" is
// max_open_files.
func softLimits(pid int) map[string]uint64 {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/limits")
	if err != nil {
		return nil
	}
	const nameWidth = 26 // the columns are as wide on every kernel
	out := map[string]uint64{}
	for line := range strings.Lines(string(b)) {
		if len(line) < nameWidth || !strings.HasPrefix(line, "Max ") {
			continue
		}
		f := strings.Fields(line[nameWidth:])
		if len(f) == 0 {
			continue
		}
		if n, err := strconv.ParseUint(f[0], 10, 64); err == nil {
			out[strings.ReplaceAll(strings.ToLower(strings.TrimSpace(line[:nameWidth])), " ", "_")] = n
		}
	}
	return out
}
