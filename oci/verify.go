//go:build linux && (amd64 || arm64)

package oci

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/internal/rawfile"
	"github.com/hako-engine/hako/oci/plan"
)

// What is restored comes of images that somebody else may have written: CRIU gives
// processes whatever credentials and mounts the images say. verify compares what the
// kernel says about them, before they run, with what the configuration allows.

func (k *restoration) verify() error {
	return allowed{
		spec: k.spec, bundle: k.o.Bundle, cgroups: k.c.state.Cgroups, member: k.criu,
		root: &k.root, profile: k.o.LSMProfile, emptyNetwork: slices.Contains(k.o.EmptyNamespaces, "network"),
	}.verify(k.c.Pid())
}

// allowed is what restored processes may be.
type allowed struct {
	spec    *specs.Spec
	bundle  string
	root    *unix.Stat_t      // the directory that is the container's "/"; nil: any
	cgroups map[string]string // the container's directories, by controller
	// member is a process whose cgroups are those that they may be in, or below.
	member       int
	profile      string // KIND:LABEL instead of that of spec
	emptyNetwork bool   // instead of one that is joined
}

// verify checks the process pid and all that descend from it.
func (a allowed) verify(pid int) error {
	s := a.spec
	if err := verifyNamespaces(s, pid, a.emptyNetwork); err != nil {
		return err
	}
	if err := a.mounts(pid); err != nil {
		return err
	}
	cgroups, err := cgroupPaths(a.member)
	if err != nil {
		return err
	}
	limits := newBounds(s, a.profile)
	for i, p := range append([]int{pid}, descendants(pid)...) {
		if i > 0 {
			if err := sameNamespaces(pid, p); err != nil {
				return err
			}
		}
		if err := limits.process(p, i == 0); err != nil {
			return fmt.Errorf("process %d %w", p, err)
		}
		its, err := cgroupPaths(p)
		if err != nil {
			return err
		}
		for name, dir := range its {
			if own, ok := cgroups[name]; !ok || dir != own && own != "/" && !strings.HasPrefix(dir, own+"/") {
				return fmt.Errorf("process %d is in the cgroup %s:%s", p, name, dir)
			}
		}
	}
	return nil
}

// descendants lists the processes below pid.
func descendants(pid int) (out []int) {
	tasks, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	for _, t := range tasks {
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", pid, t.Name()))
		if err != nil {
			continue
		}
		for _, f := range strings.Fields(string(raw)) {
			if child, err := strconv.Atoi(f); err == nil {
				out = append(append(out, child), descendants(child)...)
			}
		}
	}
	return out
}

func cgroupPaths(pid int) (map[string]string, error) {
	raw, err := rawfile.Read(fmt.Sprintf("/proc/%d/cgroup", pid), 1<<10, 1<<20)
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for line := range strings.Lines(string(raw)) {
		if f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3); len(f) == 3 {
			out[f[1]] = f[2]
		}
	}
	return out, nil
}

func namespaceOf(who string, file string) (st unix.Stat_t, err error) {
	name := "/proc/" + who + "/ns/" + file
	if err = unix.Stat(name, &st); err != nil {
		err = &os.PathError{Op: "stat", Path: name, Err: err}
	}
	return st, err
}

func sameFile(a, b *unix.Stat_t) bool { return a.Dev == b.Dev && a.Ino == b.Ino }

// verifyNamespaces: of its own where the configuration says so, joined where it gives a
// path, and else the runtime's.
func verifyNamespaces(s *specs.Spec, pid int, emptyNetwork bool) error {
	for _, typ := range namespaceTypes {
		file := namespaceFile(typ)
		ours, err := namespaceOf(strconv.Itoa(os.Getpid()), file)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the kernel has no such namespaces
		}
		if err != nil {
			return err
		}
		its, err := namespaceOf(strconv.Itoa(pid), file)
		if err != nil {
			return err
		}
		own, given := false, ""
		for _, n := range s.Linux.Namespaces {
			if string(n.Type) == typ {
				own, given = true, n.Path
			}
		}
		switch {
		case own && given != "" && !(emptyNetwork && typ == "network"):
			var st unix.Stat_t
			if err := unix.Stat(given, &st); err != nil {
				return &os.PathError{Op: "stat", Path: given, Err: err}
			}
			if !sameFile(&st, &its) {
				return fmt.Errorf("the %s namespace is not %s", typ, given)
			}
		case own && sameFile(&ours, &its):
			return fmt.Errorf("the %s namespace is the host's", typ)
		case !own && typ == "time":
			// CRIU makes one, in which the clocks go on from where they were.
		case !own && !sameFile(&ours, &its):
			return fmt.Errorf("there is a %s namespace, which the configuration has not", typ)
		}
	}
	if len(s.Linux.UIDMappings) == 0 {
		return nil
	}
	for file, want := range map[string][]specs.LinuxIDMapping{"uid_map": s.Linux.UIDMappings, "gid_map": s.Linux.GIDMappings} {
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
		if err != nil {
			return err
		}
		var got []specs.LinuxIDMapping
		for line := range strings.Lines(string(raw)) {
			var m specs.LinuxIDMapping
			if _, err := fmt.Sscan(line, &m.ContainerID, &m.HostID, &m.Size); err != nil {
				return fmt.Errorf("%s: %.80q", file, line)
			}
			got = append(got, m)
		}
		order := func(a, b specs.LinuxIDMapping) int { return int(a.ContainerID) - int(b.ContainerID) }
		want = slices.Clone(want)
		slices.SortFunc(got, order)
		slices.SortFunc(want, order)
		if !slices.Equal(got, want) {
			return fmt.Errorf("%s is %v, not %v", file, got, want)
		}
	}
	return nil
}

// sameNamespaces: what the first process is in has been checked; no other may be in
// something else.
func sameNamespaces(first, pid int) error {
	for _, typ := range namespaceTypes {
		file := namespaceFile(typ)
		a, err := namespaceOf(strconv.Itoa(first), file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		b, err := namespaceOf(strconv.Itoa(pid), file)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it has ended
		}
		if err != nil {
			return err
		}
		if !sameFile(&a, &b) {
			return fmt.Errorf("process %d has a %s namespace of its own", pid, typ)
		}
	}
	return nil
}

// bounds are what a process may have at most.
type bounds struct {
	spec       *specs.Process
	caps       uint64
	uids, gids []specs.LinuxIDMapping
	seccomp    bool
	label      string
	strictUser bool // nothing can change the user
}

func newBounds(s *specs.Spec, profile string) bounds {
	p := s.Process
	b := bounds{spec: p, uids: s.Linux.UIDMappings, gids: s.Linux.GIDMappings, seccomp: s.Linux.Seccomp != nil}
	if k := p.Capabilities; k != nil {
		for i, name := range plan.Capabilities() {
			if slices.Contains(k.Bounding, name) {
				b.caps |= 1 << i
			}
		}
	}
	var f plan.Facts
	probeLabels(&f, p)
	switch {
	case profile != "":
		_, b.label, _ = strings.Cut(profile, ":")
	case f.AppArmor && p.ApparmorProfile != "unconfined":
		b.label = p.ApparmorProfile
	case f.SELinux:
		b.label = p.SelinuxLabel
	}
	const setid = 1<<unix.CAP_SETUID | 1<<unix.CAP_SETGID
	b.strictUser = p.User.UID != 0 && p.NoNewPrivileges && b.caps&setid == 0
	return b
}

// process checks every thread of a process.
func (b *bounds) process(pid int, first bool) error {
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, t := range tasks {
		raw, err := rawfile.Read(fmt.Sprintf("/proc/%d/task/%s/status", pid, t.Name()), 4<<10, 1<<20)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			return err
		}
		if err := b.status(string(raw), first); err != nil {
			return err
		}
		if b.label == "" {
			continue
		}
		raw, err = rawfile.Read(fmt.Sprintf("/proc/%d/task/%s/attr/current", pid, t.Name()), 256, 64<<10)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			return err
		}
		label, _, _ := strings.Cut(strings.TrimRight(string(raw), "\x00\n"), " (")
		if label != b.label {
			return fmt.Errorf("has the label %q, not %q", label, b.label)
		}
	}
	limits, err := plan.ParseRlimits(b.spec.Rlimits)
	if err != nil {
		return err
	}
	for _, l := range limits {
		var cur unix.Rlimit
		if err := unix.Prlimit(pid, l.Resource, nil, &cur); err != nil {
			return fmt.Errorf("resource limit %d: %w", l.Resource, err)
		}
		if cur.Max > l.Hard {
			return fmt.Errorf("has a hard resource limit %d of %d, more than %d", l.Resource, cur.Max, l.Hard)
		}
	}
	return nil
}

// status checks one file /proc/PID/task/TID/status.
func (b *bounds) status(text string, first bool) error {
	for line := range strings.Lines(text) {
		key, v, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		v = strings.TrimSpace(v)
		switch key {
		case "State":
			if strings.HasPrefix(v, "Z") || strings.HasPrefix(v, "X") {
				return nil
			}
		case "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb":
			set, err := strconv.ParseUint(v, 16, 64)
			if err != nil {
				return fmt.Errorf("%s: %w", key, err)
			}
			if more := set &^ b.caps; more != 0 {
				return fmt.Errorf("has capabilities (%s %#x) that the configuration has not: %#x", key, set, more)
			}
		case "NoNewPrivs":
			if b.spec.NoNewPrivileges && v != "1" {
				return errors.New("has no no_new_privs")
			}
		case "Seccomp":
			if b.seccomp && v != "2" {
				return errors.New("has no seccomp filter")
			}
		case "Uid", "Gid":
			ids, maps := b.spec.User.UID, b.uids
			if key == "Gid" {
				ids, maps = b.spec.User.GID, b.gids
			}
			if len(maps) > 0 {
				ids = toHost(maps, ids)
			}
			f := strings.Fields(v)
			if !b.strictUser {
				if !first || key == "Gid" || b.spec.User.UID == 0 || b.caps&(1<<unix.CAP_SETUID) != 0 {
					continue
				}
				f = f[:1]
			}
			for _, id := range f {
				if id != strconv.FormatUint(uint64(ids), 10) {
					return fmt.Errorf("runs as %s %s, not %d", strings.ToLower(key), id, ids)
				}
			}
		}
	}
	return nil
}

func toHost(maps []specs.LinuxIDMapping, id uint32) uint32 {
	for _, m := range maps {
		if id >= m.ContainerID && id-m.ContainerID < m.Size {
			return m.HostID + (id - m.ContainerID)
		}
	}
	return id
}

// mounts: every mount is one of the configuration's, each of those is there with at least
// its restrictions, and what is to be masked or read-only is.
func (a allowed) mounts(pid int) error {
	s := a.spec
	v, err := viewMounts(pid)
	if err != nil {
		return err
	}
	defer v.close()
	known := map[int]bool{}
	root, err := v.at("/")
	if err != nil {
		return err
	}
	known[root.entry.id] = true
	if a.root != nil && (!root.isRoot || !sameFile(a.root, &root.stat)) {
		return errors.New("the root directory is not that of the configuration")
	}
	if s.Root.Readonly && root.fs.Flags&unix.ST_RDONLY == 0 {
		return errors.New("the root file system is not read-only")
	}
	for i := range s.Mounts {
		if err := verifyMount(v, s, i, a.bundle, known); err != nil {
			return fmt.Errorf("mount %s: %w", s.Mounts[i].Destination, err)
		}
	}
	for _, name := range s.Linux.ReadonlyPaths {
		p, err := v.at(name)
		if err != nil {
			continue // it does not exist
		}
		if p.fs.Flags&unix.ST_RDONLY == 0 {
			return fmt.Errorf("%s is not read-only", name)
		}
		known[p.entry.id] = true
	}
	for _, name := range s.Linux.MaskedPaths {
		p, err := v.at(name)
		if err != nil {
			continue
		}
		if !p.isRoot || !isNull(&p.stat) && (p.fs.Type != unix.TMPFS_MAGIC || p.fs.Flags&unix.ST_RDONLY == 0 || p.fs.Blocks > 1) {
			return fmt.Errorf("%s is not masked", name)
		}
		known[p.entry.id] = true
	}
	if s.Process.Terminal {
		if p, err := v.at("/dev/console"); err == nil && p.isRoot && p.fs.Type == unix.DEVPTS_SUPER_MAGIC {
			known[p.entry.id] = true
		}
	}
	for _, d := range s.Linux.Devices {
		if p, err := v.at(d.Path); err == nil && p.isRoot && p.stat.Mode&unix.S_IFMT != unix.S_IFDIR && p.stat.Rdev == unix.Mkdev(uint32(d.Major), uint32(d.Minor)) {
			known[p.entry.id] = true
		}
	}
	for i := range v.mounts {
		e := &v.mounts[i]
		if e.fstype == "cgroup" || e.fstype == "cgroup2" {
			if err := a.cgroupMount(v, e); err != nil {
				return fmt.Errorf("mount %s: %w", e.point, err)
			}
			if known[e.parent] {
				continue
			}
		}
		if known[e.id] {
			continue
		}
		return fmt.Errorf("%s is mounted (%s), which the configuration has not", e.point, e.fstype)
	}
	return nil
}

// cgroupMount: a cgroup file system shows the container's own directory. Without a cgroup
// namespace that of v2 shows all, read-only or not as the configuration says.
func (a allowed) cgroupMount(v *mountView, e *mountEntry) error {
	p, err := v.at(e.point)
	if err != nil {
		return err
	}
	for _, m := range a.spec.Mounts {
		if m.Type == "cgroup" && (m.Destination == e.point || strings.HasPrefix(e.point, m.Destination+"/")) &&
			slices.Contains(m.Options, "ro") && p.fs.Flags&unix.ST_RDONLY == 0 {
			return errors.New("it is not ro")
		}
	}
	for _, dir := range a.cgroups {
		var st unix.Stat_t
		if unix.Stat(dir, &st) == nil && sameFile(&st, &p.stat) {
			return nil
		}
	}
	own := slices.ContainsFunc(a.spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.CgroupNamespace })
	if !own && CgroupV2() {
		return nil
	}
	return errors.New("it is not the container's cgroup")
}

// restrictions are the attributes of a mount that take something away.
var restrictions = map[string]int64{"ro": unix.ST_RDONLY, "nosuid": unix.ST_NOSUID, "nodev": unix.ST_NODEV, "noexec": unix.ST_NOEXEC}

// magics are file systems by the number that statfs gives.
var magics = map[string]int64{
	"proc": unix.PROC_SUPER_MAGIC, "sysfs": unix.SYSFS_MAGIC, "tmpfs": unix.TMPFS_MAGIC, "devpts": unix.DEVPTS_SUPER_MAGIC,
	"mqueue": 0x19800202, "cgroup2": unix.CGROUP2_SUPER_MAGIC,
}

func verifyMount(v *mountView, s *specs.Spec, i int, bundle string, known map[int]bool) error {
	m := s.Mounts[i]
	p, err := v.at(m.Destination)
	if err != nil {
		return err
	}
	if !p.isRoot {
		return errors.New("nothing is mounted there")
	}
	known[p.entry.id] = true
	want := map[string]bool{}
	for _, o := range m.Options {
		name, on := o, true
		switch o {
		case "rw", "suid", "dev", "exec":
			name, on = map[string]string{"rw": "ro", "suid": "nosuid", "dev": "nodev", "exec": "noexec"}[o], false
		case "rro", "rnosuid", "rnodev", "rnoexec":
			name = o[1:]
		}
		if restrictions[name] != 0 {
			want[name] = on
		}
	}
	for name, on := range want {
		if on && int64(p.fs.Flags)&restrictions[name] == 0 {
			return fmt.Errorf("it is not %s", name)
		}
	}
	switch {
	case remounts(m):
	case isBindMount(m):
		var st unix.Stat_t
		source := sourceOf(m, bundle)
		if err := unix.Stat(source, &st); err != nil {
			return &os.PathError{Op: "stat", Path: source, Err: err}
		}
		if !sameFile(&st, &p.stat) {
			return fmt.Errorf("it is not %s", source)
		}
	case m.Type == "cgroup":
		if t := int64(p.fs.Type); t != unix.TMPFS_MAGIC && t != unix.CGROUP2_SUPER_MAGIC {
			return fmt.Errorf("it is no %s", m.Type)
		}
	default:
		if magic := magics[m.Type]; magic != 0 && int64(p.fs.Type) != magic {
			return fmt.Errorf("it is no %s", m.Type)
		}
	}
	return nil
}
