package engine

import (
	"bufio"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// hostFacts is what the engine has to know of the host. It is probed once.
type hostFacts struct {
	CPUs       int
	OnlineCPUs string // "0-3"
	OnlineMems string
	MemTotal   int64 // bytes
	Kernel     string
	Hostname   string
	CgroupV2   bool // pure: the root of /sys/fs/cgroup is a cgroup2 file system
	// CgroupDriver is what makes the cgroups: "cgroupfs" or "systemd".
	CgroupDriver string
	// OOMScoreAdj is the daemon's own: lowering it takes CAP_SYS_RESOURCE.
	OOMScoreAdj int
	Seccomp     bool
	HugeTLB     bool // huge pages can be limited
	// Hierarchies are the mount points of the cgroup hierarchies, in which a pod's cgroup is made ahead.
	Hierarchies []string
	AppArmor    bool
	// AppArmorProfile is what confines containers by default; "" with AppArmorWhy if
	// AppArmor is on and none can.
	AppArmorProfile, AppArmorWhy string
	SELinux                      *selinux // nil: pods have no labels; with SELinuxWhy it is on nevertheless
	SELinuxWhy                   string
	SwapLimit                    bool
	Caps                         uint64   // the daemon's bounding set; 0: unknown
	ThermalPaths                 []string // per CPU, masked in containers
	// FileLimit is what a container may open if it does not say (RLIMIT_NOFILE); 0: what the daemon may.
	FileLimit uint64
}

// maxFiles is the most that a container may open if it does not ask for more, as
// with Docker's usual service unit.
const maxFiles = 1 << 20

// kernelAtLeast compares the kernel's version.
func (h hostFacts) kernelAtLeast(major, minor int) bool {
	var a, b int
	if _, err := fmt.Sscanf(h.Kernel, "%d.%d", &a, &b); err != nil {
		return false
	}
	return a > major || a == major && b >= minor
}

func probeHost() (hostFacts, error) {
	h := hostFacts{CPUs: runtime.NumCPU()}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return h, fmt.Errorf("uname: %w", err)
	}
	h.Kernel = unix.ByteSliceToString(u.Release[:])
	h.Hostname = unix.ByteSliceToString(u.Nodename[:])
	h.OnlineCPUs = readLine("/sys/devices/system/cpu/online")
	h.OnlineMems = readLine("/sys/devices/system/node/online")
	if h.OnlineMems == "" {
		h.OnlineMems = "0"
	}
	if set, err := parseCPUSet(h.OnlineCPUs); err == nil && len(set) > 0 {
		h.CPUs = len(set)
	}
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err == nil {
		h.MemTotal = int64(si.Totalram) * int64(si.Unit)
	}
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &st); err == nil {
		h.CgroupV2 = st.Type == unix.CGROUP2_SUPER_MAGIC
	}
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err == nil {
		h.FileLimit = min(files.Max, maxFiles)
	}
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err == nil {
		points := cgroupMounts(string(mounts))
		_, h.HugeTLB = points["hugetlb"]
		for _, m := range points {
			if !slices.Contains(h.Hierarchies, m.point) {
				h.Hierarchies = append(h.Hierarchies, m.point)
			}
		}
	}
	if h.CgroupV2 {
		h.HugeTLB = slices.Contains(strings.Fields(readLine("/sys/fs/cgroup/cgroup.controllers")), "hugetlb")
	}
	h.OOMScoreAdj, _ = strconv.Atoi(readLine("/proc/self/oom_score_adj"))
	if b, err := os.ReadFile("/proc/self/status"); err == nil {
		for line := range strings.Lines(string(b)) {
			if v, ok := strings.CutPrefix(line, "CapBnd:"); ok {
				h.Caps, _ = strconv.ParseUint(strings.TrimSpace(v), 16, 64)
			}
		}
	}
	for cpu := range h.CPUs {
		p := fmt.Sprintf("/sys/devices/system/cpu/cpu%d/thermal_throttle", cpu)
		if _, err := os.Stat(p); err == nil {
			h.ThermalPaths = append(h.ThermalPaths, p)
		}
	}
	_, err := os.Stat("/proc/sys/kernel/seccomp/actions_avail")
	h.Seccomp = err == nil
	h.AppArmor, h.AppArmorProfile, h.AppArmorWhy = probeAppArmor("/sys", apparmorParser())
	_, err = os.Stat("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes")
	h.SELinux, h.SELinuxWhy = probeSELinux("/sys", "/etc")
	h.SwapLimit = err == nil || h.CgroupV2
	return h, nil
}

// possibleOOMScore is the lowest score that the daemon can give, if adj is below it.
func (h hostFacts) possibleOOMScore(adj int) int {
	if h.Caps == 0 || h.Caps&(1<<unix.CAP_SYS_RESOURCE) != 0 {
		return adj
	}
	return max(adj, h.OOMScoreAdj)
}

// readLine gives the first line of a small trusted file, "" on any error.
func readLine(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	line, _ := bufio.NewReader(f).ReadString('\n')
	return strings.TrimSpace(line)
}

func validIP(s string) bool {
	_, err := netip.ParseAddr(s)
	return err == nil
}
