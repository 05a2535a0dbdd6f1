package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/hako-engine/hako/network"
)

// The use of resources by pods is read from the files of their cgroups, by the daemon
// itself: no shim is asked, so that one that hangs holds nobody up, and a list of a hundred
// containers is a few hundred small reads.

// Pressure is one line of a PSI file: what part of the time, in percent, tasks waited.
type Pressure struct {
	Total                uint64 // ns
	Avg10, Avg60, Avg300 float64
}

// PSI tells of the pressure on one resource; nil where the kernel does not measure it.
type PSI struct{ Some, Full Pressure }

// Usage is what the processes of one cgroup use. Bytes, and nanoseconds of CPU time.
type Usage struct {
	Time      time.Time
	CPU       uint64  // since it was made
	NanoCores *uint64 // per second, since the measurement before; nil at the first one

	Memory     uint64
	WorkingSet uint64 // without what can be given back at once
	Limit      uint64 // 0: none
	RSS        uint64
	Faults     uint64
	MajorFault uint64
	Swap       uint64
	SwapLimit  uint64 // 0: none
	Pids       uint64

	CPUPressure, MemoryPressure, IOPressure *PSI
}

// ContainerUsage is what one container of a pod uses.
type ContainerUsage struct {
	Container *Container
	Usage     Usage
	Writable  FsUsage // of its own layer
}

// SandboxUsage is what a whole pod uses.
type SandboxUsage struct {
	Sandbox    Sandbox
	Usage      Usage
	Networks   map[string]NetStats // by interface; nil: the host's
	Containers []ContainerUsage
}

// meter keeps what is needed from one measurement to the next.
type meter struct {
	mu     sync.Mutex
	dirs   map[string]string // by controller
	last   sample
	before sample
	most   uint64 // see grown

	files     FsUsage // of the writable layer
	measuring bool

	reading sync.Mutex            // guards kept
	kept    map[statFile]*os.File // open; closed when the meter is garbage
}

type sample struct {
	at  time.Time
	cpu uint64
}

const (
	// rateWindow is the shortest time over which a rate of CPU use says anything.
	rateWindow = 500 * time.Millisecond
	// filesKept is how old the size of a writable layer may be: to measure it is to walk it.
	filesKept = 10 * time.Second
	// statsWidth is how many cgroups are read side by side.
	statsWidth = 4
)

// rate gives the use of CPU between two measurements that lie far enough apart.
func (m *meter) rate(now sample) *uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.last.at.IsZero() || now.at.Sub(m.last.at) >= rateWindow {
		m.before, m.last = m.last, now
	}
	from := m.before
	if from.at.IsZero() {
		return nil
	}
	d := m.last.at.Sub(from.at)
	if m.last.cpu < from.cpu || d <= 0 {
		return nil
	}
	r := uint64(float64(m.last.cpu-from.cpu) / d.Seconds())
	return &r
}

// grown gives the highest of the sums of CPU time that it was given: the container that ended took its own along.
func (m *meter) grown(cpu uint64) uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.most = max(m.most, cpu)
	return m.most
}

// add adds what another cgroup uses. A sum has no limit if one of its parts has none, and no pressure.
func (u *Usage) add(o Usage) {
	if u.Pids == 0 && u.Memory == 0 { // the first part
		u.Limit, u.SwapLimit = o.Limit, o.SwapLimit
	} else {
		u.Limit, u.SwapLimit = sumLimits(u.Limit, o.Limit), sumLimits(u.SwapLimit, o.SwapLimit)
	}
	u.CPU += o.CPU
	u.Memory += o.Memory
	u.WorkingSet += o.WorkingSet
	u.RSS += o.RSS
	u.Faults += o.Faults
	u.MajorFault += o.MajorFault
	u.Swap += o.Swap
	u.Pids += o.Pids
}

func sumLimits(a, b uint64) uint64 {
	if a == 0 || b == 0 {
		return 0
	}
	return a + b
}

// PodContainerUsage measures the running containers of pods that want accepts.
func (e *Engine) PodContainerUsage(ctx context.Context, want func(Container) bool) []ContainerUsage {
	var picked []*container
	var views []*Container
	for _, c := range e.containers.all() {
		if v := c.view(); v.Config.Pod != nil && v.State.live() && want(v) {
			picked, views = append(picked, c), append(views, clone(v))
		}
	}
	return e.measure(ctx, picked, views)
}

// clone makes a copy that can be kept. Containers are large: those that are only looked at stay on the stack.
func clone(v Container) *Container { return &v }

func (e *Engine) measure(ctx context.Context, picked []*container, views []*Container) []ContainerUsage {
	all := make([]ContainerUsage, len(picked))
	ok := make([]bool, len(picked))
	var g errgroup.Group
	var next atomic.Int64
	for range min(statsWidth, len(picked)) {
		g.Go(func() error {
			for i := int(next.Add(1)) - 1; i < len(picked); i = int(next.Add(1)) - 1 {
				u, err := e.containerUsage(ctx, picked[i], views[i])
				if err != nil && !errors.Is(err, fs.ErrNotExist) {
					e.log.Warn("measure a container", "container", picked[i].id, "error", err)
				}
				all[i], ok[i] = u, err == nil
			}
			return nil
		})
	}
	_ = g.Wait()
	out := all[:0]
	for i, u := range all {
		if ok[i] { // the others have just ended
			out = append(out, u)
		}
	}
	return out
}

func (e *Engine) containerUsage(ctx context.Context, c *container, v *Container) (ContainerUsage, error) {
	c.mu.Lock()
	r := c.run
	c.mu.Unlock()
	out := ContainerUsage{Container: v}
	if r == nil {
		return out, fs.ErrNotExist
	}
	dirs, err := r.meter.cgroups(int(r.pid.Load()))
	if err != nil {
		return out, err
	}
	if out.Usage, err = r.meter.usage(dirs); err != nil {
		return out, err
	}
	out.Usage.NanoCores = r.meter.rate(sample{out.Usage.Time, out.Usage.CPU})
	out.Writable = e.writableUsage(ctx, r, v)
	return out, nil
}

// cgroups finds the directories of a process's cgroup, once.
func (m *meter) cgroups(pid int) (map[string]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dirs != nil {
		return m.dirs, nil
	}
	dirs, err := cgroupDirs(pid)
	if err != nil {
		return nil, err
	}
	m.dirs = dirs
	return dirs, nil
}

// usage reads a cgroup that lives as long as the meter, whose files stay open.
func (m *meter) usage(dirs map[string]string) (Usage, error) {
	m.reading.Lock()
	defer m.reading.Unlock()
	if m.kept == nil {
		m.kept = map[statFile]*os.File{}
	}
	return readUsage(m.kept, dirs)
}

// writableUsage gives the size of a container's own layer as it was last measured, and
// measures it anew in the background if that is long ago.
func (e *Engine) writableUsage(ctx context.Context, r *run, v *Container) FsUsage {
	m := &r.meter
	m.mu.Lock()
	files, first := m.files, m.files.Time.IsZero()
	stale := time.Since(files.Time) > filesKept && !m.measuring
	if stale {
		m.measuring = true
	}
	m.mu.Unlock()
	if !stale {
		return files
	}
	snapshotter, key := v.Snapshotter, v.SnapshotKey
	measure := func(ctx context.Context) {
		u := FsUsage{Path: filepath.Join(e.opt.Root, snapshotter), Time: time.Now()}
		if sn := e.opt.Snapshotters[snapshotter]; sn != nil {
			if s, err := sn.Usage(e.ns(ctx), key); err == nil {
				u.Bytes, u.Inodes = uint64(s.Size), uint64(s.Inodes)
			}
		}
		m.mu.Lock()
		m.files, m.measuring = u, false
		files = u
		m.mu.Unlock()
	}
	if first && time.Since(v.State.StartedAt) < filesKept { // there cannot be much yet
		measure(ctx)
		return files
	}
	e.background(measure)
	if first {
		files = FsUsage{Path: filepath.Join(e.opt.Root, snapshotter), Time: time.Now()}
	}
	return files
}

// SandboxUsage measures a pod.
func (e *Engine) SandboxUsage(ctx context.Context, ref string) (SandboxUsage, error) {
	s, err := e.pods.get(ref)
	if err != nil {
		return SandboxUsage{}, err
	}
	return e.sandboxUsage(ctx, s)
}

// SandboxUsages measures the ready pods that want accepts. One that cannot be measured is left out.
func (e *Engine) SandboxUsages(ctx context.Context, want func(Sandbox) bool) []SandboxUsage {
	var out []SandboxUsage
	for _, s := range e.pods.all() {
		v := s.view()
		if v.State != SandboxReady || !want(v) {
			continue
		}
		u, err := e.sandboxUsage(ctx, s)
		if err != nil {
			e.log.Warn("measure a sandbox", "sandbox", s.id, "error", err)
			continue
		}
		out = append(out, u)
	}
	return out
}

func (e *Engine) sandboxUsage(ctx context.Context, s *sandbox) (SandboxUsage, error) {
	out := SandboxUsage{Sandbox: s.view()}
	if out.Sandbox.State != SandboxReady {
		return out, failedf("sandbox %s is %s, not ready", s.id, out.Sandbox.State)
	}
	var picked []*container
	var views []*Container
	for _, c := range e.pods.containers(s.id) {
		if v := c.view(); v.State.live() {
			picked, views = append(picked, c), append(views, clone(v))
		}
	}
	out.Containers = e.measure(ctx, picked, views)
	u, err := readUsage(nil, e.podCgroupDirs(s))
	switch {
	case errors.Is(err, fs.ErrNotExist): // no container has been started yet, or they are scopes of systemd without a slice for the pod
		u = Usage{Time: time.Now()}
		for _, c := range out.Containers {
			u.add(c.Usage)
		}
		u.CPU = s.meter.grown(u.CPU)
	case err != nil:
		return out, fmt.Errorf("measure sandbox %s: %w", s.id, err)
	}
	out.Usage = u
	out.Usage.NanoCores = s.meter.rate(sample{u.Time, u.CPU})
	if out.Sandbox.NetNS != "" {
		if ifs, err := network.NetnsStats(out.Sandbox.NetNS); err == nil {
			out.Networks = map[string]NetStats{}
			for name, n := range ifs {
				out.Networks[name] = NetStats(n)
			}
		}
	}
	return out, nil
}

// podCgroupDirs finds the directories of a pod's cgroup, once.
func (e *Engine) podCgroupDirs(s *sandbox) map[string]string {
	s.meter.mu.Lock()
	defer s.meter.mu.Unlock()
	if s.meter.dirs == nil {
		s.meter.dirs = e.findPodCgroup(s)
	}
	return s.meter.dirs
}

func (e *Engine) findPodCgroup(s *sandbox) map[string]string {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	path := e.podCgroup(s.id, s.rec.Config)
	if slice := cgroupParent(e.opt.CgroupDriver, path); e.opt.CgroupDriver == "systemd" && slice != "" {
		path = slicePath(slice)
	}
	dirs := map[string]string{}
	for name, m := range cgroupMounts(string(mounts)) {
		if name == "" {
			dir := filepath.Join(m.point, path)
			if isV2WithControllers(m.point) {
				dirs["v2-controllers"] = dir
			} else if path != "/" {
				dirs["unified"] = dir
			}
			continue
		}
		if ctrl := readController(name); ctrl != "" {
			dirs[ctrl] = filepath.Join(m.point, path)
		}
	}
	return dirs
}

// readUsage reads the files of a cgroup. A controller that is missing leaves its fields 0. kept: see statReader.
func readUsage(kept map[statFile]*os.File, dirs map[string]string) (Usage, error) {
	f := statReaders.Get().(*statReader)
	defer f.done()
	f.kept = kept
	u := Usage{Time: time.Now()}
	if dir, v2 := dirs["v2-controllers"]; v2 {
		if f.read(dir, "cpu.stat") == nil {
			return u, fs.ErrNotExist
		}
		var inactive uint64
		f.flat(dir, "cpu.stat", field{"usage_usec", &u.CPU})
		u.CPU *= 1000
		u.Memory, u.Limit = f.number(dir, "memory.current"), f.number(dir, "memory.max")
		f.flat(dir, "memory.stat",
			field{"inactive_file", &inactive}, field{"anon", &u.RSS}, field{"pgfault", &u.Faults}, field{"pgmajfault", &u.MajorFault})
		u.WorkingSet = u.Memory - min(u.Memory, inactive)
		u.Swap, u.SwapLimit = f.number(dir, "memory.swap.current"), f.number(dir, "memory.swap.max")
		u.Pids = f.number(dir, "pids.current")
		u.CPUPressure, u.MemoryPressure, u.IOPressure = f.psi(dir, "cpu.pressure"), f.psi(dir, "memory.pressure"), f.psi(dir, "io.pressure")
		return u, nil
	}
	cpu, mem := dirs["cpuacct"], dirs["memory"]
	if cpu == "" && mem == "" {
		return u, fmt.Errorf("no cgroup controller for CPU time and memory is mounted")
	}
	if cpu != "" {
		usage := f.read(cpu, "cpuacct.usage")
		if usage == nil {
			return u, fs.ErrNotExist
		}
		u.CPU = parseUint(usage)
	} else if f.read(mem, "memory.usage_in_bytes") == nil {
		return u, fs.ErrNotExist
	}
	if mem != "" {
		var inactive, limit, both uint64
		u.Memory = f.number(mem, "memory.usage_in_bytes")
		f.flat(mem, "memory.stat",
			field{"total_inactive_file", &inactive}, field{"total_rss", &u.RSS}, field{"total_pgfault", &u.Faults}, field{"total_pgmajfault", &u.MajorFault},
			field{"total_swap", &u.Swap}, field{"hierarchical_memory_limit", &limit}, field{"hierarchical_memsw_limit", &both})
		u.WorkingSet = u.Memory - min(u.Memory, inactive)
		u.Limit = limitV1(limit)
		if sw := limitV1(both); sw > u.Limit {
			u.SwapLimit = sw - u.Limit
		}
	}
	u.Pids = f.number(dirs["pids"], "pids.current")
	if dir := dirs["unified"]; dir != "" {
		u.CPUPressure, u.MemoryPressure, u.IOPressure = f.psi(dir, "cpu.pressure"), f.psi(dir, "memory.pressure"), f.psi(dir, "io.pressure")
	}
	return u, nil
}

// limitV1 gives 0 for what cgroup v1 writes where there is no limit.
func limitV1(n uint64) uint64 {
	if n >= 1<<62 {
		return 0
	}
	return n
}
