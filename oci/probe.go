//go:build linux && (amd64 || arm64)

package oci

import (
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"unsafe"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/cgroup"
	"github.com/hako-engine/hako/oci/plan"
)

// ownFacts are those of the runtime's own process.
func ownFacts() plan.Facts {
	f := plan.Facts{LastCap: lastCap(), Ignored: ignoredSignals(), Rootless: os.Geteuid() != 0}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	if f.Rootless || unix.Capget(&header, &sets[0]) != nil {
		return f
	}
	own := uint64(sets[1].Permitted)<<32 | uint64(sets[0].Permitted)
	for i, name := range plan.Capabilities() {
		if i <= f.LastCap && own&(1<<i) == 0 {
			f.Lacks = append(f.Lacks, name)
		}
	}
	return f
}

// probe collects what compiling the specification needs to know of this machine.
func probe(s *specs.Spec, bundle string, layout cgroup.Layout, paths map[string]string) plan.Facts {
	f := ownFacts()
	probeLabels(&f, s.Process)
	if s.Linux.MountLabel != "" {
		f.SELinux = selinux()
	}
	f.Sources = make(map[string]plan.Source, len(s.Mounts))
	for _, m := range s.Mounts {
		if m.Source == "" || m.Type != "bind" && !isBind(m.Options) {
			continue
		}
		src := m.Source
		if !filepath.IsAbs(src) {
			src = filepath.Join(bundle, src)
		}
		var st unix.Stat_t
		info, err := plan.Source{Exists: true}, statDirect(src, &st)
		if err != nil {
			info.ParentOnly, err = true, unix.Stat(src, &st)
		}
		if err != nil {
			f.Sources[src] = plan.Source{ParentOnly: true}
			continue
		}
		info.Dir = st.Mode&unix.S_IFMT == unix.S_IFDIR
		if info.Dir && !info.ParentOnly {
			var root unix.Stat_t
			info.ParentOnly = unix.Stat("/", &root) != nil || root.Ino == st.Ino && root.Dev == st.Dev
		}
		if strings.HasPrefix(filepath.Clean("/"+m.Destination), "/proc") {
			var fs unix.Statfs_t
			info.Procfs = unix.Statfs(src, &fs) == nil && fs.Type == unix.PROC_SUPER_MAGIC
		}
		f.Sources[src] = info
	}
	f.Cgroup = cgroupFacts(layout, paths)
	f.ProcOfOthers = s.Linux != nil && slices.ContainsFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool {
		return n.Type == specs.PIDNamespace && n.Path != ""
	}) && procOfOthers()
	return f
}

// statDirect is stat(2) of a path that means the same to every process: it neither is a
// link of procfs nor leads through one, and does not begin with a process.
func statDirect(path string, st *unix.Stat_t) error {
	if strings.HasPrefix(path, "/proc/") || strings.HasPrefix(path, "/dev/") {
		return unix.ELOOP
	}
	fd, err := unix.Openat2(unix.AT_FDCWD, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_MAGICLINKS})
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Fstat(fd, st)
}

// procOfOthers tells whether procfs takes the PID namespace that it shows as an option.
func procOfOthers() bool {
	fs, err := unix.Fsopen("proc", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return false
	}
	defer unix.Close(fs)
	ns, err := unix.Open("/proc/self/ns/pid", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(ns)
	return unix.FsconfigSetFd(fs, "pidns", ns) == nil
}

func probeLabels(f *plan.Facts, p *specs.Process) {
	if p == nil {
		return
	}
	if p.ApparmorProfile != "" {
		b, err := os.ReadFile("/sys/module/apparmor/parameters/enabled")
		f.AppArmor = err == nil && len(b) > 0 && b[0] == 'Y'
	}
	if p.SelinuxLabel != "" {
		f.SELinux = selinux()
	}
}

func selinux() bool { return unix.Access("/sys/fs/selinux/enforce", unix.F_OK) == nil }

func isBind(options []string) bool {
	for _, o := range options {
		if o == "bind" || o == "rbind" {
			return true
		}
	}
	return false
}

func cgroupFacts(l cgroup.Layout, paths map[string]string) plan.CgroupFacts {
	f := plan.CgroupFacts{V2: l.Mode == cgroup.V2}
	for _, h := range l.Hierarchies {
		e := plan.Hierarchy{Name: filepath.Base(h.Mount), Mountpoint: h.Mount, V2: h.V2}
		if h.V2 {
			e.Dir = paths[""]
		} else {
			e.Dir = paths[h.Controllers[0]]
			for _, c := range h.Controllers {
				if strings.HasPrefix(c, "name=") {
					// Without "none" the kernel takes all controllers that are free.
					e.Options = append(e.Options, "none")
				}
				e.Options = append(e.Options, c)
			}
		}
		if e.Dir == "" {
			continue
		}
		f.Hierarchies = append(f.Hierarchies, e)
	}
	return f
}

// lastCap asks the kernel for its highest capability.
func lastCap() int {
	n := len(plan.Capabilities()) - 1
	for n < 63 {
		if v, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(n+1), 0, 0, 0); err != nil || v < 0 {
			break
		}
		n++
	}
	for n > 0 {
		if _, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(n), 0, 0, 0); err == nil {
			break
		}
		n--
	}
	return n
}

// leftAlone are the signals that the Go runtime does not handle from the start: it does
// not know what became of them.
var leftAlone = []int{
	int(unix.SIGCONT), int(unix.SIGTSTP), int(unix.SIGTTIN), int(unix.SIGTTOU), 32, 33, 34,
}

// ignoredSignals lists those that the container's process would inherit as ignored.
func ignoredSignals() (out []int) {
	type sigaction struct {
		handler, flags, restorer uintptr
		mask                     uint64
	}
	for sig := 1; sig <= 64; sig++ {
		if !slices.Contains(leftAlone, sig) {
			if signal.Ignored(unix.Signal(sig)) {
				out = append(out, sig)
			}
			continue
		}
		var a sigaction
		_, _, e := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), 0, uintptr(unsafe.Pointer(&a)), 8, 0, 0)
		if e == 0 && a.handler == 1 {
			out = append(out, sig)
		}
	}
	return out
}
