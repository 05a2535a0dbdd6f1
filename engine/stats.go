package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/hako-engine/hako/network"
)

// Stats measures a running container from its cgroup's files and its interfaces. A
// container that does not run gives zero values.
func (e *Engine) Stats(ctx context.Context, ref string) (Stats, error) {
	c, err := e.find(ctx, ref)
	if err != nil {
		return Stats{}, err
	}
	st := Stats{Read: time.Now(), OnlineCPUs: e.host.CPUs, SystemCPU: hostCPU()}
	c.mu.Lock()
	r, limits := c.run, c.rec.Config.Resources
	c.mu.Unlock()
	if r == nil {
		return st, nil
	}
	dirs, err := cgroupDirs(int(r.pid.Load()))
	if errors.Is(err, fs.ErrNotExist) {
		return st, nil // it has just ended
	} else if err != nil {
		return st, fmt.Errorf("stats of container %s: %w", ref, err)
	}
	if dir, v2 := dirs["v2-controllers"]; v2 {
		readV2(&st, dir)
	} else {
		readV1(&st, dirs)
	}
	if st.MemLimit == 0 || st.MemLimit > uint64(e.host.MemTotal) {
		st.MemLimit = uint64(e.host.MemTotal)
	}
	if limits.PidsLimit != nil && *limits.PidsLimit > 0 {
		st.PidsLimit = uint64(*limits.PidsLimit)
	}
	if v := c.view(); v.Config.NetworkMode != "host" { // also of a namespace that is another container's
		if ifs, err := network.NetnsStats(fmt.Sprintf("/proc/%d/ns/net", r.pid.Load())); err == nil {
			st.Networks = map[string]NetStats{}
			for name, n := range ifs {
				st.Networks[name] = NetStats(n)
			}
		}
	}
	return st, nil
}

// cgroupDirs finds the directories of a process's cgroup by controller, of those in readControllers. With pure
// cgroup v2 it is the one of "v2-controllers". Beside cgroup v1, "unified" is the one of v2,
// if it is not that of other processes too: there the kernel measures pressure.
func cgroupDirs(pid int) (map[string]string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return nil, err
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	points := cgroupMounts(string(mounts))
	dirs := map[string]string{}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			continue
		}
		if f[1] == "" {
			if p, ok := points[""]; ok && isV2WithControllers(p.point) {
				dirs["v2-controllers"] = p.join(f[2])
			} else if ok && f[2] != "/" {
				dirs["unified"] = p.join(f[2])
			}
			continue
		}
		for name := range strings.SplitSeq(f[1], ",") {
			if ctrl := readController(name); ctrl != "" {
				if p, ok := points[ctrl]; ok {
					dirs[ctrl] = p.join(f[2])
				}
			}
		}
	}
	if u := dirs["unified"]; u != "" && filepath.Base(u) != filepath.Base(dirs["memory"]) && filepath.Base(u) != filepath.Base(dirs["cpuacct"]) {
		delete(dirs, "unified") // a runtime has left it where its parent was
	}
	return dirs, nil
}

// readControllers are those of cgroup v1 that have numbers for us.
var readControllers = [...]string{"cpu", "cpuacct", "memory", "pids", "blkio", "hugetlb"}

// readController gives a controller's name if it is one that we read, else "". The result is no part of a larger text: the
// directories of a container are kept as long as it runs.
func readController(name string) string {
	for _, c := range readControllers {
		if c == name {
			return c
		}
	}
	return ""
}

// memoryCgroup finds the memory cgroup of a container that has a limit: only such a
// one can run out of its own memory.
func memoryCgroup(v Container, pid int) string {
	if v.Config.Resources.Memory <= 0 {
		return ""
	}
	dirs, err := cgroupDirs(pid)
	if err != nil {
		return ""
	}
	if dir, v2 := dirs["v2-controllers"]; v2 {
		return dir
	}
	return dirs["memory"]
}

// oomKilled tells whether the kernel killed any process of a cgroup for want of memory:
// Docker's meaning, where the shim's is that the first process was killed.
func oomKilled(dir string) bool {
	if dir == "" {
		return false
	}
	return readFlat(filepath.Join(dir, "memory.oom_control"))["oom_kill"] > 0 || readFlat(filepath.Join(dir, "memory.events"))["oom_kill"] > 0
}

// cgroupMount is where a hierarchy is mounted, and which part of it.
type cgroupMount struct{ root, point string }

func (m cgroupMount) join(path string) string {
	if rel, ok := strings.CutPrefix(path, m.root); ok && m.root != "/" {
		path = rel
	}
	return filepath.Join(m.point, path)
}

// cgroupMounts reads mountinfo: controller ("" for v2) → mount, the first one each.
func cgroupMounts(mountinfo string) map[string]cgroupMount {
	points := map[string]cgroupMount{}
	for line := range strings.Lines(mountinfo) {
		pre, post, ok := strings.Cut(line, " - ")
		f, g := strings.Fields(pre), strings.Fields(post)
		if !ok || len(f) < 5 || len(g) < 3 {
			continue
		}
		m := cgroupMount{f[3], f[4]}
		var names []string
		switch g[0] {
		case "cgroup2":
			names = []string{""}
		case "cgroup":
			names = strings.Split(g[2], ",")
		}
		for _, n := range names {
			if _, have := points[n]; !have {
				points[n] = m
			}
		}
	}
	return points
}

func isV2WithControllers(point string) bool {
	return strings.Contains(readLine(filepath.Join(point, "cgroup.controllers")), "memory")
}

func readV1(st *Stats, dirs map[string]string) {
	cpu, mem, pids, blk := dirs["cpuacct"], dirs["memory"], dirs["pids"], dirs["blkio"]
	st.CPUTotal = readUint(cpu, "cpuacct.usage")
	for _, f := range strings.Fields(readLine(filepath.Join(cpu, "cpuacct.usage_percpu"))) {
		n, _ := strconv.ParseUint(f, 10, 64)
		st.PerCPU = append(st.PerCPU, n)
	}
	acct := readFlat(filepath.Join(cpu, "cpuacct.stat"))
	st.CPUUser, st.CPUKernel = acct["user"]*1e9/userHZ, acct["system"]*1e9/userHZ
	t := readFlat(filepath.Join(dirs["cpu"], "cpu.stat"))
	st.Periods, st.Throttled, st.ThrottledNS = t["nr_periods"], t["nr_throttled"], t["throttled_time"]
	st.MemUsage = readUint(mem, "memory.usage_in_bytes")
	st.MemMax = readUint(mem, "memory.max_usage_in_bytes")
	st.MemLimit = readUint(mem, "memory.limit_in_bytes")
	st.MemFailcnt = readUint(mem, "memory.failcnt")
	st.MemStats = readFlat(filepath.Join(mem, "memory.stat"))
	st.Pids = readUint(pids, "pids.current")
	st.PidsLimit = readUint(pids, "pids.max")
	bytes := readBlkio(filepath.Join(blk, "blkio.throttle.io_service_bytes"))
	ops := readBlkio(filepath.Join(blk, "blkio.throttle.io_serviced"))
	for k, n := range bytes {
		st.Blkio = append(st.Blkio, BlkioEntry{Major: k.major, Minor: k.minor, Op: k.op, Bytes: n, Ops: ops[k]})
	}
}

func readV2(st *Stats, dir string) {
	cpu := readFlat(filepath.Join(dir, "cpu.stat"))
	st.CPUTotal, st.CPUUser, st.CPUKernel = cpu["usage_usec"]*1000, cpu["user_usec"]*1000, cpu["system_usec"]*1000
	st.Periods, st.Throttled, st.ThrottledNS = cpu["nr_periods"], cpu["nr_throttled"], cpu["throttled_usec"]*1000
	st.MemUsage = readUint(dir, "memory.current")
	st.MemMax = readUint(dir, "memory.peak")
	st.MemLimit = readUint(dir, "memory.max") // "max" reads as 0
	st.MemStats = readFlat(filepath.Join(dir, "memory.stat"))
	st.MemFailcnt = readFlat(filepath.Join(dir, "memory.events"))["max"]
	st.Pids = readUint(dir, "pids.current")
	st.PidsLimit = readUint(dir, "pids.max")
	b, _ := os.ReadFile(filepath.Join(dir, "io.stat"))
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		var major, minor uint64
		if _, err := fmt.Sscanf(f[0], "%d:%d", &major, &minor); err != nil {
			continue
		}
		v := map[string]uint64{}
		for _, kv := range f[1:] {
			k, s, _ := strings.Cut(kv, "=")
			v[k], _ = strconv.ParseUint(s, 10, 64)
		}
		st.Blkio = append(st.Blkio,
			BlkioEntry{major, minor, "Read", v["rbytes"], v["rios"]},
			BlkioEntry{major, minor, "Write", v["wbytes"], v["wios"]})
	}
}

// readUint reads a file with one number; 0 for "max", a missing one and a missing controller.
func readUint(dir, name string) uint64 {
	if dir == "" {
		return 0
	}
	n, _ := strconv.ParseUint(readLine(filepath.Join(dir, name)), 10, 64)
	return n
}

// readFlat reads a flat-keyed file (see cgroups(7)): "key number" lines.
func readFlat(path string) map[string]uint64 {
	out := map[string]uint64{}
	b, err := os.ReadFile(path)
	if err != nil {
		return out
	}
	for line := range strings.Lines(string(b)) {
		k, v, ok := strings.Cut(strings.TrimSpace(line), " ")
		if n, err := strconv.ParseUint(v, 10, 64); ok && err == nil {
			out[k] = n
		}
	}
	return out
}

type blkioKey struct {
	major, minor uint64
	op           string
}

func readBlkio(path string) map[blkioKey]uint64 {
	out := map[blkioKey]uint64{}
	b, _ := os.ReadFile(path)
	for line := range strings.Lines(string(b)) {
		var k blkioKey
		var n uint64
		if _, err := fmt.Sscanf(line, "%d:%d %s %d", &k.major, &k.minor, &k.op, &n); err == nil {
			out[k] = n
		}
	}
	return out
}

// hostCPU is the CPU time of the whole host, in ns.
func hostCPU() uint64 {
	f := strings.Fields(readLine("/proc/stat"))
	if len(f) < 8 {
		return 0
	}
	var sum uint64
	for _, s := range f[1:8] { // user to softirq: guest time is in user already
		n, _ := strconv.ParseUint(s, 10, 64)
		sum += n
	}
	return sum * (1e9 / userHZ)
}
