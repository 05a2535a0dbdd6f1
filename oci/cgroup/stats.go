//go:build linux

package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Stats is a snapshot of what a cgroup, with all below it, uses. Parts whose
// controller is not there are zero or nil.
type Stats struct {
	CPU     CPUStats
	Memory  MemoryStats
	Pids    PidsStats
	IO      []IOStats              // a device each, ordered by device number
	IOPSI   *PSI                   // where there is a v2 hierarchy
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

	PSI *PSI // where there is a v2 hierarchy
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
	PSI       *PSI              // where there is a v2 hierarchy
}

// PidsStats counts processes and threads.
type PidsStats struct {
	Current, Limit uint64 // no limit is the largest number
}

// IOStats counts the transfers of one block device.
type IOStats struct {
	Major, Minor                        uint64
	ReadBytes, WriteBytes, DiscardBytes uint64
	ReadOps, WriteOps, DiscardOps       uint64
	SyncBytes, AsyncBytes               uint64 // v1 only
	SyncOps, AsyncOps                   uint64 // v1 only
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
	if !c.Exists() {
		return nil, fmt.Errorf("read statistics: cgroup is gone: %w", errdefs.ErrNotFound)
	}
	s := &Stats{}
	r := &reader{}
	if dir := c.v1["cpu"]; dir != "" {
		r.in(dir)
		s.CPU.addStat(keyed(r.read("cpu.stat")))
	}
	if dir := c.v1["cpuacct"]; dir != "" {
		r.in(dir)
		s.CPU.readAccounts(r)
	}
	if dir := c.v1["memory"]; dir != "" {
		r.in(dir)
		s.Memory.readV1(r)
	}
	if dir := c.v1["pids"]; dir != "" {
		r.in(dir)
		s.Pids = PidsStats{Current: r.uint("pids.current"), Limit: r.uint("pids.max")}
	}
	if dir := c.v1["blkio"]; dir != "" {
		r.in(dir)
		s.IO = readBlkio(r)
	}
	if dir := c.v1["hugetlb"]; dir != "" {
		r.in(dir)
		s.Hugetlb = readHugetlb(r, false)
	}
	if dir := c.v1["rdma"]; dir != "" {
		r.in(dir)
		s.Rdma = parseRdma(r.read("rdma.current"))
	}
	if c.v2 != "" {
		r.in(c.v2)
		s.readV2(c, r)
	}
	r.close()
	if r.err != nil {
		return nil, fmt.Errorf("read statistics: %w", r.err)
	}
	return s, nil
}

// readV2 reads what no v1 hierarchy has given.
func (s *Stats) readV2(c *Cgroup, r *reader) {
	has := map[string]bool{}
	for _, name := range strings.Fields(string(r.read("cgroup.controllers"))) {
		has[name] = true
	}
	// The v2 hierarchy keeps CPU time and pressure even where it has no controllers.
	if c.v1["cpu"] == "" && c.v1["cpuacct"] == "" {
		s.CPU.addStat(keyed(r.read("cpu.stat")))
	}
	s.CPU.PSI = parsePSI(r.read("cpu.pressure"))
	s.Memory.PSI = parsePSI(r.read("memory.pressure"))
	s.IOPSI = parsePSI(r.read("io.pressure"))
	if has["memory"] {
		s.V2 = true
		s.Memory.readV2(r)
	}
	if has["pids"] {
		s.Pids = PidsStats{Current: r.uint("pids.current"), Limit: r.uint("pids.max")}
	}
	if has["io"] {
		s.IO = parseIOStat(r.read("io.stat"))
	}
	if has["hugetlb"] {
		s.Hugetlb = readHugetlb(r, true)
	}
	if has["rdma"] {
		s.Rdma = parseRdma(r.read("rdma.current"))
	}
}

// userHz is the unit of cpuacct.stat, fixed in the kernel's interface.
const userHz = 100

// addStat takes cpu.stat: of v1 (times in ns) or v2 (µs).
func (s *CPUStats) addStat(m map[string]uint64) {
	s.Periods, s.ThrottledPeriods, s.Bursts = m["nr_periods"], m["nr_throttled"], m["nr_bursts"]
	s.ThrottledTime = m["throttled_time"] + 1000*m["throttled_usec"]
	s.BurstTime = m["burst_time"] + 1000*m["burst_usec"]
	s.Total, s.User, s.Kernel = 1000*m["usage_usec"], 1000*m["user_usec"], 1000*m["system_usec"]
}

// readAccounts reads the v1 cpuacct controller.
func (s *CPUStats) readAccounts(r *reader) {
	// usage_all has what was running at the ticks of the clock: nothing of short programs.
	// usage_percpu is measured.
	for f := range bytes.FieldsSeq(r.read("cpuacct.usage_percpu")) {
		n, _ := parseUint(string(f))
		s.PerCPU = append(s.PerCPU, n)
		s.Total += n
	}
	for line := range bytes.Lines(r.read("cpuacct.usage_all")) { // "cpu user system", a CPU each
		f := bytes.Fields(line)
		if len(f) != 3 {
			continue
		}
		user, err1 := parseUint(string(f[1]))
		kernel, err2 := parseUint(string(f[2]))
		if err1 != nil || err2 != nil {
			continue // the heading
		}
		s.PerCPUUser, s.PerCPUKernel = append(s.PerCPUUser, user), append(s.PerCPUKernel, kernel)
	}
	// The split by mode in usage_all is a guess at the moment of charging; cpuacct.stat
	// is scaled to what the processes were really measured to use.
	m := keyed(r.read("cpuacct.stat"))
	s.User, s.Kernel = m["user"]*(1e9/userHz), m["system"]*(1e9/userHz)
}

func (s *MemoryStats) readV1(r *reader) {
	usage := func(prefix string) MemoryUsage {
		u := r.read(prefix + "usage_in_bytes")
		if u == nil { // switched off in this kernel: spares looking for the others
			return MemoryUsage{}
		}
		n, _ := parseUint(string(bytes.TrimSpace(u)))
		return MemoryUsage{
			Usage: n, Max: r.uint(prefix + "max_usage_in_bytes"),
			Limit: unlimited(r.uint(prefix + "limit_in_bytes")), Failcnt: r.uint(prefix + "failcnt"),
		}
	}
	s.Memory, s.Swap = usage("memory."), usage("memory.memsw.")
	s.Kernel, s.KernelTCP = usage("memory.kmem."), usage("memory.kmem.tcp.")
	s.Stat = keyed(r.read("memory.stat"))
	s.Cache = s.Stat["total_cache"]
	s.OOMKills = keyed(r.read("memory.oom_control"))["oom_kill"]
}

// unlimited makes v1's largest page-aligned number the largest number.
func unlimited(n uint64) uint64 {
	if n >= math.MaxInt64&^0xffff {
		return math.MaxUint64
	}
	return n
}

func (s *MemoryStats) readV2(r *reader) {
	usage := func(prefix string) MemoryUsage {
		return MemoryUsage{Usage: r.uint(prefix + "current"), Max: r.uint(prefix + "peak"), Limit: r.uint(prefix + "max")}
	}
	s.Memory, s.Swap = usage("memory."), usage("memory.swap.")
	s.Events = keyed(r.read("memory.events"))
	s.Memory.Failcnt, s.OOMKills = s.Events["max"], s.Events["oom_kill"]
	s.Swap.Failcnt = keyed(r.read("memory.swap.events"))["max"]
	s.Stat = keyed(r.read("memory.stat"))
	s.Cache, s.Kernel.Usage, s.KernelTCP.Usage = s.Stat["file"], s.Stat["kernel"], s.Stat["sock"]
}

// readBlkio reads the v1 blkio controller: what passed the throttling layer, or where
// that has counted nothing, the BFQ scheduler.
func readBlkio(r *reader) []IOStats {
	for _, prefix := range []string{"blkio.throttle.", "blkio.bfq."} {
		io := ioMap{}
		parseBlkio(io, r.read(prefix+"io_service_bytes_recursive"), true)
		parseBlkio(io, r.read(prefix+"io_serviced_recursive"), false)
		if len(io) > 0 {
			return io.sorted()
		}
	}
	return nil
}

// readHugetlb reads the figures of all page sizes of the machine.
func readHugetlb(r *reader, v2 bool) map[string]HugetlbStat {
	entries, err := os.ReadDir("/sys/kernel/mm/hugepages")
	if err != nil {
		return nil
	}
	out := map[string]HugetlbStat{}
	for _, e := range entries {
		size, ok := pageSize(e.Name())
		if !ok {
			continue
		}
		p := "hugetlb." + size + "."
		if v2 {
			out[size] = HugetlbStat{
				Usage: r.uint(p + "current"), Limit: r.uint(p + "max"),
				Failcnt: keyed(r.read(p + "events"))["max"],
			}
			continue
		}
		out[size] = HugetlbStat{
			Usage: r.uint(p + "usage_in_bytes"), Max: r.uint(p + "max_usage_in_bytes"),
			Limit: unlimited(r.uint(p + "limit_in_bytes")), Failcnt: r.uint(p + "failcnt"),
		}
	}
	return out
}

// pageSize turns "hugepages-2048kB" into "2MB".
func pageSize(name string) (string, bool) {
	s, ok := strings.CutPrefix(name, "hugepages-")
	s, kb := strings.CutSuffix(s, "kB")
	if !ok || !kb {
		return "", false
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return "", false
	}
	for _, unit := range []string{"KB", "MB"} {
		if n%1024 != 0 {
			return utoa(n) + unit, true
		}
		n /= 1024
	}
	return utoa(n) + "GB", true
}

// reader reads small files of one directory after the other into one buffer. What is
// not there reads as nil: which files there are depends on the kernel's configuration,
// and a cgroup may be removed at any time.
type reader struct {
	dir    int
	open   bool
	prefix string
	buf    []byte
	err    error // the first failure of another kind
}

func (r *reader) in(dir string) {
	r.close()
	fd, err := open(dir, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		if !gone(err) && r.err == nil {
			r.err = err
		}
		return
	}
	r.dir, r.open, r.prefix = fd, true, dir
}

func (r *reader) close() {
	if r.open {
		unix.Close(r.dir)
		r.open = false
	}
}

// read gives a file's content, valid until the next call.
func (r *reader) read(name string) []byte {
	if !r.open {
		return nil
	}
	fail := func(op string, err error) []byte {
		// EOPNOTSUPP: pressure accounting is switched off at boot.
		if !gone(err) && !errors.Is(err, unix.EOPNOTSUPP) && r.err == nil {
			r.err = &fs.PathError{Op: op, Path: r.prefix + "/" + name, Err: err}
		}
		return nil
	}
	var fd int
	var err error
	for {
		if fd, err = unix.Openat(r.dir, name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return fail("open", err)
	}
	defer unix.Close(fd)
	if r.buf == nil {
		r.buf = make([]byte, 16<<10)
	}
	for n := 0; ; {
		if n == len(r.buf) {
			if n >= maxFile {
				return fail("read", unix.EFBIG)
			}
			r.buf = append(r.buf, make([]byte, n)...)
		}
		m, err := unix.Read(fd, r.buf[n:])
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fail("read", err)
		case m == 0:
			return r.buf[:n]
		default:
			n += m
		}
	}
}

func (r *reader) uint(name string) uint64 {
	n, err := parseUint(string(bytes.TrimSpace(r.read(name))))
	if err != nil {
		return 0
	}
	return n
}
