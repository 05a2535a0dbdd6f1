//go:build linux

package plan

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"unsafe"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/internal/defence"
)

const procMagic = unix.PROC_SUPER_MAGIC

// bindsToNamespace are file systems whose content is that of the caller's namespaces:
// only the child can mount them.
var bindsToNamespace = []string{"proc", "sysfs", "mqueue", "cgroup", "cgroup2", "binfmt_misc"}

// below /proc these are replaced by lxcfs and the like; they cannot mislead the
// runtime, which never reads them.
var overProc = []string{
	"/proc/cpuinfo", "/proc/diskstats", "/proc/meminfo", "/proc/stat", "/proc/swaps", "/proc/uptime", "/proc/loadavg",
	"/proc/slabinfo", "/proc/net/dev", "/proc/sys/kernel/ns_last_pid", "/proc/sys/crypto/fips_enabled",
}

// create makes a file system of the given type, detached, in slot.
func (b *builder) create(typ, source string, data []string, attr uint64, slot Slot) []*Step {
	fs := b.slot("fs")
	return append(b.superblock(typ, source, data, fs), b.mount(fs, attr, slot))
}

// superblock makes a file system of the given type, of which no mount is made yet.
func (b *builder) superblock(typ, source string, data []string, fs Slot) []*Step {
	var steps []*Step
	add := func(s *Step) { steps = append(steps, s) }
	add(b.call(sysFsopen, str(typ), flags(unix.FSOPEN_CLOEXEC, "CLOEXEC")).into(fs))
	if source != "" {
		add(b.config(fs, unix.FSCONFIG_SET_STRING, "SET_STRING", str("source"), str(source)))
	}
	for _, o := range data {
		add(b.option(fs, o))
	}
	if typ == "proc" && b.pidns != NoSlot {
		add(b.call(sysFsconfig, in(fs), flags(unix.FSCONFIG_SET_FD, "SET_FD"), str("pidns"), none, in(b.pidns)))
	}
	add(b.config(fs, unix.FSCONFIG_CMD_CREATE, "CMD_CREATE", none, none))
	return steps
}

// mount makes a detached mount of a new file system.
func (b *builder) mount(fs Slot, attr uint64, slot Slot) *Step {
	return b.call(sysFsmount, in(fs), flags(unix.FSMOUNT_CLOEXEC, "CLOEXEC"), flags(attr, attrText(attr))).into(slot)
}

// option sets one mount option, "key" or "key=value".
func (b *builder) option(fs Slot, o string) *Step {
	if k, v, ok := strings.Cut(o, "="); ok {
		return b.config(fs, unix.FSCONFIG_SET_STRING, "SET_STRING", str(k), str(v))
	}
	return b.config(fs, unix.FSCONFIG_SET_FLAG, "SET_FLAG", str(o), none)
}

func (b *builder) config(fs Slot, cmd uint64, name string, key, value Arg) *Step {
	return b.call(sysFsconfig, in(fs), flags(cmd, name), key, value, num(0))
}

// clone makes a detached copy of what is open in dir (name "") or at a path.
func (b *builder) clone(dir Arg, name string, rec bool, into Slot) *Step {
	f, text := uint64(unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC), "CLONE|CLOEXEC"
	if rec {
		f, text = f|unix.AT_RECURSIVE, text+"|RECURSIVE"
	}
	if name == "" {
		f, text = f|unix.AT_EMPTY_PATH, text+"|EMPTY_PATH"
	}
	return b.call(sysOpenTree, dir, str(name), flags(f, text)).into(into)
}

func (b *builder) attach(from, to Slot) *Step {
	return b.call(sysMoveMount, in(from), str(""), in(to), str(""), flags(unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH, "F_EMPTY_PATH|T_EMPTY_PATH"))
}

// attachIn attaches on a directory that this plan has made in a tmpfs of its own: only
// there is a name as good as a descriptor. Links are not followed.
func (b *builder) attachIn(from, dir Slot, name string) *Step {
	return b.call(sysMoveMount, in(from), str(""), in(dir), str(name), flags(unix.MOVE_MOUNT_F_EMPTY_PATH, "F_EMPTY_PATH"))
}

// builderFor is where the detached mount is made: by the parent if it can be, so that
// the child needs neither the path of the source nor the rights to it.
func (c *compiler) builderFor(m *mount) *builder {
	switch {
	case c.f.Rootless || !m.bind && slices.Contains(bindsToNamespace, m.typ):
		m.child = true
	case !c.childMounts || c.userns:
	case m.bind:
		// The child sees the host's mounts as slaves, which is what is to be bound unless
		// the propagation of the root says otherwise.
		m.child = !c.joinsMounts && c.rootPropagation&^unix.MS_REC == unix.MS_SLAVE && !c.f.Sources[m.source].ParentOnly
	case m.typ == "tmpfs":
		m.child = !m.copyUp && !m.idmap
	case m.typ == "devpts":
		// The parent opens a terminal in it before the child runs.
		m.child = c.spec.Process == nil || !c.spec.Process.Terminal
	}
	if m.child {
		// The kernel lists mounts in the order in which they were made. What comes after
		// a mount that only the child can make is made by the child too, so that it comes
		// after it in the list.
		c.childMounts = true
		return c.child
	}
	return c.host
}

// outOfOrder tells whether the parent makes a file system, because the child has none of the
// rights for it in its user namespace, that is to be listed after what the child has mounted: the kernel lists
// mounts in the order in which they were made.
func (c *compiler) outOfOrder(m *mount) bool {
	return !m.child && !m.bind && c.childMounts && (m.typ != "devpts" || c.spec.Process == nil || !c.spec.Process.Terminal)
}

// untouched tells whether the parent needs no mount of a file system that it makes.
func (c *compiler) untouched(m *mount) bool {
	return !m.copyUp && !m.idmap && !m.relabel && m.dest != "/dev"
}

// reorder makes a copy of a file system that the parent has mounted: the copy comes later in the
// list. Before Linux 6.15 there are no copies of detached mounts.
func (c *compiler) reorder(m *mount) {
	if !c.outOfOrder(m) {
		return
	}
	next := c.child.label()
	c.child.do("copy %s, so that it is listed in its place", m.dest)
	c.child.clone(in(m.slot), "", false, m.slot).accept(unix.EINVAL).onFail(next)
	c.child.here(next)
}

// prepare emits the steps that make m, detached, in its slot.
func (c *compiler) prepare(m *mount) error {
	b := c.builderFor(m)
	if m.bind {
		return c.prepareBind(b, m)
	}
	b.do("mount %s", m.dest)
	data := m.data
	attr := m.set | m.recSet
	switch m.typ {
	case "tmpfs":
		// Mount points and nodes are still to be made in it.
		if attr&unix.MOUNT_ATTR_RDONLY != 0 {
			attr &^= unix.MOUNT_ATTR_RDONLY
			m.readOnlyLater = true
		}
		data = c.ownedByRoot(data, m.child || m.idmap)
		m.fresh = !m.copyUp
		if m.copyUp {
			if c.f.Rootless {
				return fmt.Errorf("mount %s: tmpcopyup needs privileges on the host", m.dest)
			}
			c.p.CopyUps = append(c.p.CopyUps, CopyUp{m.dest, m.slot})
		}
	case "devpts":
		data = c.ownedByRoot(data, m.child)
		if !slices.Contains(data, "newinstance") {
			data = append([]string{"newinstance"}, data...)
		}
	}
	if m.source == "" {
		m.source = m.typ
	}
	var steps []*Step
	inPlace := c.outOfOrder(m) && c.untouched(m)
	if inPlace {
		// The rights are needed for the file system, and not for a mount of it.
		fs := b.slot("fs-" + m.dest)
		b.superblock(m.typ, m.source, data, fs)
		b = c.child
		b.do("mount %s, in its place in the list of mounts", m.dest)
		b.mount(fs, attr, m.slot)
	} else {
		steps = b.create(m.typ, m.source, data, attr, m.slot)
	}
	if m.typ == "sysfs" && c.userns {
		// Sysfs shows the network namespace, and only its owner may mount it. With the
		// host's network in a user namespace there is the host's own to bind.
		use, done := b.label(), b.label()
		for _, s := range steps {
			s.accept(unix.EPERM).onFail(use)
		}
		steps[len(steps)-1].onOK(done)
		b.here(use)
		b.do("bind the host's /sys on %s", m.dest)
		b.clone(atCwd, "/sys", true, m.slot)
		b.setattr(m.slot, true, attr, 0, unix.MS_SLAVE)
		b.here(done)
	}
	if err := c.mapIDs(b, m); err != nil {
		return err
	}
	if m.relabel {
		c.relabel(m)
	}
	if m.propagation != 0 && m.propagation != unix.MS_UNBINDABLE {
		b.setattr(m.slot, m.propagationRec, 0, 0, m.propagation)
	}
	if !inPlace {
		c.reorder(m)
	}
	return nil
}

// ownedByRoot translates uid= and gid= of the container, and gives the file system to
// the container's root, when the parent makes it for a container with a user namespace.
func (c *compiler) ownedByRoot(data []string, child bool) []string {
	if !c.userns || child {
		return data
	}
	out := make([]string, 0, len(data)+2)
	var uid, gid bool
	for _, o := range data {
		k, v, _ := strings.Cut(o, "=")
		var id uint32
		if k == "uid" || k == "gid" {
			if _, err := fmt.Sscanf(v, "%d", &id); err == nil {
				maps := c.spec.Linux.UIDMappings
				if k == "gid" {
					maps = c.spec.Linux.GIDMappings
				}
				if host, ok := hostID(maps, id); ok {
					o = fmt.Sprintf("%s=%d", k, host)
				}
			}
			uid, gid = uid || k == "uid", gid || k == "gid"
		}
		out = append(out, o)
	}
	if !uid {
		out = append(out, fmt.Sprintf("uid=%d", c.rootUID))
	}
	if !gid {
		out = append(out, fmt.Sprintf("gid=%d", c.rootGID))
	}
	return out
}

func (c *compiler) prepareBind(b *builder, m *mount) error {
	if !path.IsAbs(m.source) {
		m.source = path.Join(c.o.Bundle, m.source)
	}
	b.do("bind %s on %s", m.source, m.dest)
	b.clone(atCwd, m.source, m.rec, m.slot)
	if err := c.mapIDs(b, m); err != nil {
		return err
	}
	c.ownPropagation(b, m)
	if m.set|m.clr != 0 {
		b.setattr(m.slot, false, m.set, m.clr, 0)
	}
	if m.recSet|m.recClr != 0 {
		b.setattr(m.slot, true, m.recSet, m.recClr, 0)
	}
	return nil
}

// ownPropagation cuts a copy of host mounts off from the host's peer groups, so that
// nothing that is mounted in the container shows on the host, unless the whole root is
// asked to be shared.
func (c *compiler) ownPropagation(b *builder, m *mount) {
	shared := c.rootPropagation&unix.MS_SHARED != 0
	unbindable := m.propagation == unix.MS_UNBINDABLE // only when it is in place
	if m.propagation != 0 && m.propagation != unix.MS_SHARED && !unbindable && m.propagationRec {
		b.setattr(m.slot, true, 0, 0, m.propagation)
		return
	}
	if !shared {
		first := uint64(unix.MS_SLAVE)
		if c.rootPropagation&(unix.MS_PRIVATE|unix.MS_UNBINDABLE) != 0 {
			first = unix.MS_PRIVATE
		}
		b.setattr(m.slot, true, 0, 0, first)
	}
	if m.propagation != 0 && !unbindable {
		b.setattr(m.slot, m.propagationRec, 0, 0, m.propagation)
	}
}

// checkDestination refuses mounts that would let the runtime or the container take a
// forged /proc for the real one.
func (c *compiler) checkDestination(m *mount) error {
	switch {
	case !defence.OwnProc:
		return nil
	case m.dest == "/":
		return fmt.Errorf("mount /: the root is given by root.path")
	case m.dest == "/proc":
		if m.typ == "proc" && !m.bind || m.bind && c.f.Sources[m.source].Procfs {
			return nil
		}
		return fmt.Errorf("mount /proc: only proc can be mounted there, not %s", m.typ)
	case strings.HasPrefix(m.dest, "/proc/"):
		if slices.Contains(overProc, m.dest) || m.bind && c.f.Sources[m.source].Procfs {
			return nil
		}
		return fmt.Errorf("mount %s: inside /proc", m.dest)
	}
	return nil
}

// place emits the steps that find or make the mount's target, and attach it.
func (c *compiler) place(m *mount) {
	b := c.child
	if m.bind {
		b.do("bind %s on %s", m.source, m.dest)
	} else {
		b.do("mount %s", m.dest)
	}
	defer func() {
		if m.propagation == unix.MS_UNBINDABLE {
			// The kernel does not attach an unbindable mount to a shared one, which the root
			// may be.
			b.setattr(m.slot, m.propagationRec, 0, 0, m.propagation)
		}
		c.mounted = append(c.mounted, m)
	}()
	target := b.slot("target")
	dir := !m.bind || c.f.Sources[m.source].Dir || !c.f.Sources[m.source].Exists
	switch parent, rel := c.freshParent(m.dest); {
	case parent != nil && dir:
		if !slices.Contains(parent.made, rel) {
			b.call(sysMkdirat, in(parent.slot), str(rel), num(0o755))
			parent.made = append(parent.made, rel)
		}
		b.attachIn(m.slot, parent.slot, rel)
		return
	case m.typ == "proc" || m.typ == "sysfs":
		s := c.openOrMake(b, m.dest, true, inRoot|unix.RESOLVE_NO_SYMLINKS, target)
		for _, s := range s {
			s.says(ClassInvalid, "mount "+m.dest+": not an ordinary directory: %e")
		}
	default:
		if m.typ == "tmpfs" && !m.bind && !m.copyUp && !slices.ContainsFunc(m.data, func(o string) bool { return strings.HasPrefix(o, "mode=") }) {
			c.modeOfCovered(m)
		}
		c.openOrMake(b, m.dest, dir, inRoot, target)
		if defence.OwnProc && c.procMounted && !slices.Contains(overProc, m.dest) && m.dest != "/proc" {
			c.notInProc(b, m.dest, target)
		}
	}
	b.attach(m.slot, target)
	if m.typ == "proc" && m.dest == "/proc" && !m.bind {
		c.procMounted = true
	}
}

// modeOfCovered gives a tmpfs that nobody has given a mode that of the directory that it is to
// cover, as programs expect of theirs, and callers of a runtime. Where there is none the
// kernel's default stays.
func (c *compiler) modeOfCovered(m *mount) {
	b := c.child
	covered, mode, buf, next := b.slot("covered"), b.slot("mode"), b.buffer(), b.label()
	b.openIn(c.root, m.dest, unix.O_PATH|unix.O_DIRECTORY, inRoot, covered).accept(unix.ENOENT).onFail(next)
	b.call(sysFstat, in(covered), buf)
	var st unix.Stat_t
	b.load(mode, buf, int(unsafe.Offsetof(st.Mode)))
	b.call(sysFchmodat, in(m.slot), str("."), in(mode))
	b.here(next)
}

// notInProc fails if the directory or file in slot lies on procfs: a link in the image
// led the mount there.
func (c *compiler) notInProc(b *builder, dest string, slot Slot) {
	buf, good := b.buffer(), b.label()
	b.call(sysFstatfs, in(slot), buf)
	b.check64(buf, 0, procMagic, unix.EPERM).onFail(good).Any = true
	b.fail(unix.EPERM).says(ClassInvalid, "mount "+dest+": it leads into /proc: %e")
	b.here(good)
}

// freshParent finds the empty tmpfs, mounted by this plan, that holds dest directly.
func (c *compiler) freshParent(dest string) (*mount, string) {
	for _, m := range slices.Backward(c.mounted) {
		rel, ok := strings.CutPrefix(dest, m.dest+"/")
		if !ok {
			if m.dest == dest {
				return nil, ""
			}
			continue
		}
		if m.fresh && !strings.Contains(rel, "/") {
			return m, rel
		}
		return nil, ""
	}
	return nil, ""
}

// openOrMake opens name below the container's root, O_PATH; what is missing is made.
// Every lookup starts at the root again and stays in it, whatever the image's links
// say. It gives the lookups of the name itself.
func (c *compiler) openOrMake(b *builder, name string, dir bool, resolve uint64, into Slot) (final []*Step) {
	f := unix.O_PATH
	if dir {
		f |= unix.O_DIRECTORY
	}
	missing, done := b.label(), b.label()
	final = append(final, b.openIn(c.root, name, f, resolve, into).accept(unix.ENOENT).onFail(missing).onOK(done))
	b.here(missing)
	parents := strings.Split(strings.TrimPrefix(name, "/"), "/")
	last := parents[len(parents)-1]
	if !dir {
		parents = parents[:len(parents)-1]
	}
	at := b.slot("parent")
	b.openIn(c.root, "/", unix.O_PATH|unix.O_DIRECTORY, resolve, at)
	prefix := "/"
	for i, elem := range parents {
		prefix = path.Join(prefix, elem)
		slot := at
		if dir && i == len(parents)-1 {
			slot = into
		}
		mk, next := b.label(), b.label()
		b.openIn(c.root, prefix, unix.O_PATH|unix.O_DIRECTORY, resolve, slot).accept(unix.ENOENT).onFail(mk).onOK(next)
		b.here(mk)
		b.call(sysMkdirat, in(at), str(elem), num(0o755)).accept(unix.EEXIST)
		s := b.openIn(c.root, prefix, unix.O_PATH|unix.O_DIRECTORY, resolve, slot)
		if slot == into {
			final = append(final, s)
		}
		b.here(next)
	}
	if !dir {
		b.call(sysMknodat, in(at), str(last), flags(unix.S_IFREG|0o755, "S_IFREG|0755"), none).accept(unix.EEXIST)
		final = append(final, b.openIn(c.root, name, unix.O_PATH, resolve, into))
	}
	b.here(done)
	return final
}

// mountCgroup shows the container its cgroups.
func (c *compiler) mountCgroup(m *mount) {
	b := c.child
	c.enterCgroup()
	b.do("mount %s", m.dest)
	attr := m.set | m.recSet
	if c.f.Cgroup.V2 {
		h := Hierarchy{Mountpoint: "/sys/fs/cgroup", V2: true}
		if len(c.f.Cgroup.Hierarchies) > 0 {
			h = c.f.Cgroup.Hierarchies[0]
		}
		// Without a cgroup namespace the container sees the host's whole tree.
		h.Dir = h.Mountpoint
		c.hierarchy(h, attr, m.slot)
		c.place(m)
		return
	}
	if i := slices.IndexFunc(c.f.Cgroup.Hierarchies, func(h Hierarchy) bool { return h.V2 }); i >= 0 && m.typ == "cgroup2" {
		h := c.f.Cgroup.Hierarchies[i]
		if !c.cgroupns {
			h.Dir = h.Mountpoint
		}
		c.hierarchy(h, attr, m.slot)
		c.place(m)
		return
	}
	// A directory of hierarchies. It becomes read-only when they are in it.
	b.create("tmpfs", "cgroup", []string{"mode=755"}, attr&^unix.MOUNT_ATTR_RDONLY, m.slot)
	m.fresh, m.readOnlyLater = true, attr&unix.MOUNT_ATTR_RDONLY != 0
	c.place(m)
	sub := b.slot("hierarchy")
	// One call for all of them, unless something is still to be mounted below.
	together := !c.cgroupns && !c.noMountns && !slices.ContainsFunc(c.spec.Mounts, func(o specs.Mount) bool {
		return strings.HasPrefix(path.Clean("/"+o.Destination), m.dest+"/")
	})
	for _, h := range c.f.Cgroup.Hierarchies {
		b.do("mount %s", path.Join(m.dest, h.Name))
		if together {
			b.clone(atCwd, h.Dir, false, sub)
		} else {
			c.hierarchy(h, attr, sub)
		}
		b.call(sysMkdirat, in(m.slot), str(h.Name), num(0o755))
		b.attachIn(sub, m.slot, h.Name)
		if names := strings.Split(h.Name, ","); len(names) > 1 {
			for _, n := range names {
				b.call(sysSymlinkat, str(h.Name), in(m.slot), str(n))
			}
		}
	}
	if together {
		b.do("limit what can be done in %s", m.dest)
		b.setattr(m.slot, true, attr, 0, unix.MS_PRIVATE)
		m.readOnlyLater = false
	}
}

func (c *compiler) hierarchy(h Hierarchy, attr uint64, slot Slot) {
	b := c.child
	if !c.cgroupns {
		b.clone(atCwd, h.Dir, false, slot)
		b.setattr(slot, true, attr, 0, unix.MS_PRIVATE)
		return
	}
	typ, source := "cgroup", "cgroup"
	if h.V2 {
		typ, source = "cgroup2", "cgroup"
		h.Options = nil
	}
	b.create(typ, source, h.Options, attr, slot)
}
