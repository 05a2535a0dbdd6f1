//go:build linux

package plan

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"unsafe"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/internal/defence"
)

type compiler struct {
	spec *specs.Spec
	f    Facts
	o    Options
	p    *Plan

	host, child *builder
	root        Slot

	userns, cgroupns, netns, pidns bool
	noMountns                      bool   // the mount namespace is the runtime's own
	joinsMounts                    bool   // it is somebody else's
	childMounts                    bool   // the child has made a file system
	rootUID, rootGID               uint32 // of the container's root, on the host
	rootPropagation                uint64
	mounted                        []*mount
	procMounted                    bool
	entered                        bool // the child has been told that it is in its cgroup
	devpts                         *mount
}

var namespaceFlags = []Namespace{
	{"user", unix.CLONE_NEWUSER, ""}, {"pid", unix.CLONE_NEWPID, ""}, {"ipc", unix.CLONE_NEWIPC, ""},
	{"uts", unix.CLONE_NEWUTS, ""}, {"network", unix.CLONE_NEWNET, ""}, {"cgroup", unix.CLONE_NEWCGROUP, ""},
	{"mount", unix.CLONE_NEWNS, ""}, {"time", unix.CLONE_NEWTIME, ""},
}

// NamespaceFlag gives the CLONE_NEW flag of a namespace type, 0 if there is none.
func NamespaceFlag(typ string) uint64 {
	for _, n := range namespaceFlags {
		if n.Type == typ {
			return n.Flag
		}
	}
	return 0
}

// Container compiles the plan that creates a container. The specification must have
// been validated (package spec).
func Container(s *specs.Spec, f Facts, o Options) (*Plan, error) {
	c := &compiler{spec: s, f: f, o: o}
	c.begin(containerSteps)
	if err := c.namespaces(); err != nil {
		return nil, err
	}
	if err := c.rootfs(); err != nil {
		return nil, err
	}
	if err := c.mounts(); err != nil {
		return nil, err
	}
	if err := c.devices(); err != nil {
		return nil, err
	}
	c.directories()
	c.console()
	c.enterCgroup()
	if c.o.Hooks {
		c.at("hooks")
		c.meet(MsgMounted, "wait for the hooks")
		c.p.HooksInSetup = true
	}
	if err := c.sysctls(); err != nil {
		return nil, err
	}
	c.pivot()
	c.protect()
	c.propagate()
	c.names()
	if err := c.process(s.Process); err != nil {
		return nil, err
	}
	c.kernelMemory()
	return c.end()
}

// kernelMemory warns of limits that are not set: the kernel has given up the one, and cgroup
// v2 the other.
func (c *compiler) kernelMemory() {
	r := c.spec.Linux.Resources
	if r == nil || r.Memory == nil {
		return
	}
	if k := r.Memory.Kernel; k != nil && *k > 0 { //nolint:staticcheck // it is deprecated, and said to be
		c.warnOnce("linux.resources.memory.kernel is ignored: Linux has no such limit any more")
	}
	if k := r.Memory.KernelTCP; k != nil && *k > 0 && c.f.Cgroup.V2 {
		c.warnOnce("linux.resources.memory.kernelTCP is ignored: cgroup v2 has no such limit")
	}
}

// begin makes the builders, that of the child with room for so many steps.
func (c *compiler) begin(steps int) {
	c.p = &Plan{Slots: slices.Clone(fixedSlots[:]), ConsoleSlot: NoSlot, Preserve: c.o.Preserve}
	names := make(map[string]Slot, 32)
	for i, n := range fixedSlots {
		names[n] = Slot(i)
	}
	c.host, c.child = newBuilder(c.p, names, 32), newBuilder(c.p, names, steps)
	if c.spec.Linux == nil {
		c.spec.Linux = &specs.Linux{}
	}
}

// meet sends a word to the parent and waits for its answer.
func (c *compiler) meet(msg int32, why string) {
	b := c.child
	b.do("%s", why)
	if msg != 0 {
		b.call(sysWrite, in(SlotSync), data(halves(uint32(msg), 0), fmt.Sprintf("%d", msg)), num(8)).expect(8)
	}
	b.call(sysRead, in(SlotSync), b.buffer(), num(1)).expect(1)
}

// prologue is what every child does first.
func (c *compiler) prologue() {
	b := c.child
	if defence.CheckedCwd {
		b.do("close descriptors of the runtime")
		b.next(CloseAll, nil)
	}
	if !c.f.Rootless {
		// Nobody in the container may trace the child, or look through its /proc files,
		// before it has become the container's program (CVE-2016-9962).
		b.do("hide from ptrace")
		b.call(sysPrctl, flags(unix.PR_SET_DUMPABLE, "PR_SET_DUMPABLE"), num(0), none, none, none)
	}
	for _, sig := range c.f.Ignored {
		b.do("reset signal %d", sig)
		b.call(sysSigaction, num(sig), data(make([]byte, 32), "SIG_DFL"), none, num(8))
	}
	b.do("unblock signals")
	b.call(sysSigprocmask, flags(unix.SIG_SETMASK, "SIG_SETMASK"), data(make([]byte, 8), "{}"), none, num(8))
	b.do("clear the umask")
	b.call(sysUmask, num(0))
}

func (c *compiler) namespaces() error {
	var fresh, joined []Namespace
	for _, n := range c.spec.Linux.Namespaces {
		flag := NamespaceFlag(string(n.Type))
		ns := Namespace{string(n.Type), flag, n.Path}
		if n.Path != "" {
			joined = append(joined, ns)
		} else {
			fresh = append(fresh, ns)
		}
		switch n.Type {
		case specs.UserNamespace:
			c.userns = true
		case specs.CgroupNamespace:
			c.cgroupns = n.Path == ""
		case specs.NetworkNamespace:
			c.netns = n.Path == ""
		case specs.PIDNamespace:
			c.pidns = true
		case specs.MountNamespace:
			c.joinsMounts = n.Path != ""
		}
	}
	c.noMountns = !slices.ContainsFunc(c.spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.MountNamespace })
	if c.userns {
		var ok1, ok2 bool
		c.rootUID, ok1 = hostID(c.spec.Linux.UIDMappings, 0)
		c.rootGID, ok2 = hostID(c.spec.Linux.GIDMappings, 0)
		if len(c.spec.Linux.UIDMappings) > 0 && (!ok1 || !ok2) {
			return errors.New("linux.uidMappings, gidMappings: the container's root is not mapped")
		}
	}
	// The user namespace first: it owns those that follow.
	order := func(a, b Namespace) int {
		i := slices.IndexFunc(namespaceFlags, func(n Namespace) bool { return n.Type == a.Type })
		j := slices.IndexFunc(namespaceFlags, func(n Namespace) bool { return n.Type == b.Type })
		return i - j
	}
	slices.SortFunc(fresh, order)
	slices.SortFunc(joined, order)
	c.prologue()
	c.at("linux.namespaces")
	var late uint64
	var ownTime bool
	for _, n := range fresh {
		switch n.Type {
		case "cgroup": // made once the child is in its cgroup
		case "time":
			c.p.NewTime = !c.f.Rootless
			ownTime = c.f.Rootless
		default:
			c.p.CloneFlags |= n.Flag
		}
	}
	newUser := c.p.CloneFlags&unix.CLONE_NEWUSER != 0
	if joinsUser := c.userns && !newUser; joinsUser || newUser && len(joined) > 0 {
		// What is joined may belong to the host: it is entered before the rights are gone.
		// What is new belongs to the user namespace: it is made behind it.
		late, c.p.CloneFlags = c.p.CloneFlags, 0
		if joinsUser && !c.f.Rootless {
			slices.Reverse(joined)
		}
	}
	// It takes as long as everything else that the clone makes. The child does it while the
	// parent goes on, which may not look for it before it waits for a word: it moves devices
	// before.
	ownNet := c.p.CloneFlags&unix.CLONE_NEWNET != 0 && len(c.spec.Linux.NetDevices) == 0
	if ownNet {
		c.p.CloneFlags &^= unix.CLONE_NEWNET
	}
	refork := late&unix.CLONE_NEWPID != 0
	b := c.child
	for _, n := range joined {
		c.atNamespace(n.Type)
		h := c.host
		h.do("open the %s namespace %s", n.Type, n.Path)
		slot := h.slot("ns-" + n.Type)
		h.call(sysOpenat, atCwd, str(n.Path), openFlag(unix.O_RDONLY|unix.O_NOCTTY|unix.O_CLOEXEC), none).into(slot)
		b.do("join the %s namespace %s", n.Type, n.Path)
		b.call(sysSetns, in(slot), flags(n.Flag, "CLONE_NEW"+strings.ToUpper(shortName(n.Type))))
		switch {
		case n.Type == "pid" && c.f.ProcOfOthers && defence.LateFork && !c.userns && !c.f.Rootless:
			// Whoever is in that namespace with CAP_SYS_PTRACE reaches through /proc what a
			// process in it has open, and its root: it enters as the loader, when there is
			// nothing of the host left.
			c.p.LoaderForks, c.p.Waits, b.pidns = true, !c.o.Hold, slot
		case n.Type == "pid":
			refork = true
		}
		if n.Type == "user" {
			c.becomeRoot()
		}
	}
	c.at("linux.namespaces")
	if late != 0 {
		b.do("make namespaces")
		b.call(sysUnshare, flags(late, cloneText(late)))
	}
	if refork {
		c.refork()
	}
	c.own()
	c.session()
	if newUser {
		c.at("linux.uidMappings")
		c.p.IDMaps = true
		first := b.n
		c.meet(MsgMaps, "wait for the maps of the user namespace")
		c.p.Made = append(c.p.Made, Span{first, b.n})
		c.becomeRoot()
	}
	if ownTime {
		c.at("linux.timeOffsets")
		c.makeTime()
	}
	c.own()
	if c.f.Rootless {
		b.do("hide from ptrace")
		b.call(sysPrctl, flags(unix.PR_SET_DUMPABLE, "PR_SET_DUMPABLE"), num(0), none, none, none)
	}
	if c.netns {
		c.atNamespace("network")
		first := b.n
		c.p.OwnNet = ownNet
		if ownNet {
			b.do("make the network namespace")
			b.call(sysUnshare, flags(unix.CLONE_NEWNET, "CLONE_NEWNET"))
		}
		sock := b.slot("socket")
		b.do("bring loopback up")
		b.call(sysSocket, flags(unix.AF_INET, "AF_INET"), flags(unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, "SOCK_DGRAM|CLOEXEC"), none).into(sock)
		ifreq := make([]byte, 40)
		copy(ifreq, "lo")
		copy(ifreq[16:], words(unix.IFF_UP | unix.IFF_RUNNING)[:2])
		b.call(sysIoctl, in(sock), flags(unix.SIOCSIFFLAGS, "SIOCSIFFLAGS"), data(ifreq, "{lo, IFF_UP}"))
		c.p.Made = append(c.p.Made, Span{first, b.n})
	}
	return nil
}

// session makes the process the leader of a session. It comes after the last clone:
// when a leader exits, the kernel hangs its terminal up.
func (c *compiler) session() {
	if c.p.LoaderForks {
		return // the loader does it
	}
	b := c.child
	first := b.n
	b.do("start a session")
	b.call(sysSetsid)
	c.p.Made = append(c.p.Made, Span{first, b.n})
}

// refork clones once more: only a child is inside a PID namespace that was joined, and
// only there does a new procfs show it. The parent takes over that child
// (CLONE_PARENT), whose pid it learns from the one that exits here.
func (c *compiler) refork() {
	b := c.child
	b.do("clone into the PID namespace")
	pid, buf := b.slot("pid"), b.buffer()
	exit, inside := b.label(), b.label()
	b.call(sysClone, flags(unix.CLONE_PARENT|uint64(unix.SIGCHLD), "CLONE_PARENT|SIGCHLD"), none, none, none, none).into(pid)
	b.next(Branch, []Arg{in(pid)}).onOK(inside).onFail(exit)
	b.here(exit)
	b.poke(buf, 0, flags(uint64(1<<64-1+MsgPid+1), "PID"))
	b.poke(buf, 4, in(pid))
	b.call(sysWrite, in(SlotSync), buf, num(8))
	b.call(sysExitGroup, num(0))
	b.here(inside)
	c.p.Refork = true
}

func shortName(typ string) string {
	switch typ {
	case "network":
		return "net"
	case "mount":
		return "ns"
	}
	return typ
}

func cloneText(v uint64) string {
	var names []flagName
	for _, n := range namespaceFlags {
		names = append(names, flagName{n.Flag, "CLONE_NEW" + strings.ToUpper(shortName(n.Type))})
	}
	return flagText(v, names)
}

func (c *compiler) becomeRoot() {
	b := c.child
	b.do("become root of the user namespace")
	b.call(sysSetresgid, num(0), num(0), num(0))
	b.call(sysSetresuid, num(0), num(0), num(0))
}

// hostID translates an id of the container.
func hostID(maps []specs.LinuxIDMapping, id uint32) (uint32, bool) {
	for _, m := range maps {
		if id >= m.ContainerID && uint64(id) < uint64(m.ContainerID)+uint64(m.Size) {
			return m.HostID + (id - m.ContainerID), true
		}
	}
	return 0, false
}

// Propagation parses linux.rootfsPropagation.
func propagation(s string) (uint64, error) {
	if s == "" {
		return unix.MS_SLAVE | unix.MS_REC, nil
	}
	if p, ok := propagations.find(s); ok {
		return p, nil
	}
	if p, ok := propagations.find(strings.TrimPrefix(s, "r")); ok {
		return p | unix.MS_REC, nil
	}
	return 0, fmt.Errorf("linux.rootfsPropagation: unknown value %q", s)
}

// rootfs makes the root a detached mount, and the child's "/" is covered by it: from
// then on everything is reached through its descriptor.
func (c *compiler) rootfs() (err error) {
	if c.rootPropagation, err = propagation(c.spec.Linux.RootfsPropagation); err != nil {
		return err
	}
	c.at("root.path")
	source := c.host
	if c.f.Rootless {
		source = c.child
	}
	var layers []*mount
	if len(c.o.Root) == 0 {
		m := &mount{dest: "/", source: c.spec.Root.Path, bind: true, rec: true}
		if !path.IsAbs(m.source) {
			m.source = path.Join(c.o.Bundle, m.source)
		}
		layers = append(layers, m)
	}
	for _, r := range c.o.Root {
		m, err := parseMount(specs.Mount{Destination: "/", Type: r.Type, Source: r.Source, Options: r.Options, UIDMappings: r.UIDMappings, GIDMappings: r.GIDMappings})
		if err != nil {
			return fmt.Errorf("root file system: %w", err)
		}
		layers = append(layers, m)
	}
	for i, m := range layers {
		m.slot = c.host.slot("root")
		if i < len(layers)-1 {
			m.slot = c.host.slot(fmt.Sprintf("root%d", i))
		}
		m.child = c.f.Rootless
		if m.bind {
			source.do("open the root file system %s", m.source)
			source.clone(atCwd, m.source, m.rec, m.slot)
			if err := c.mapIDs(source, m); err != nil {
				return err
			}
			c.ownPropagation(source, m)
			if c.rootPropagation&unix.MS_SHARED != 0 {
				// In the peer group of the host's, the root would show all that is mounted in
				// it on the host. It gets a group of its own in the end.
				source.setattr(m.slot, false, 0, 0, unix.MS_PRIVATE)
			}
			if m.set|m.clr|m.recSet|m.recClr != 0 {
				source.setattr(m.slot, m.recSet|m.recClr != 0, m.set|m.recSet, m.clr|m.recClr, 0)
			}
			continue
		}
		c.label(m)
		if m.typ == "overlay" && m.idmap {
			if err := c.mappedOverlay(source, m); err != nil {
				return err
			}
			continue
		}
		if m.typ == "overlay" && !c.f.LayerByLayer && LongOptions(m.data) {
			if c.f.Rootless {
				return errors.New("root file system: this kernel mounts an overlay of so many layers only with privileges (Linux 6.7 does without)")
			}
			c.p.Overlays = append(c.p.Overlays, overlayOf(m))
			continue
		}
		source.do("mount the root file system (%s)", m.typ)
		source.create(m.typ, m.source, c.splitLong(m), m.set|m.recSet, m.slot)
		if err := c.mapIDs(source, m); err != nil {
			return err
		}
	}
	c.root = c.child.slot("root")
	c.p.RootSlot = c.root
	if c.noMountns {
		// The host's mount table is left alone: the root stays detached, and what the
		// container mounts is mounted below it. That takes Linux 6.15.
		for i, m := range layers[1:] {
			c.child.attach(m.slot, layers[i].slot)
		}
		c.root = layers[len(layers)-1].slot
		return nil
	}
	b := c.child
	c.at("linux.rootfsPropagation")
	b.do("cut the mounts off from the host's")
	p := uint64(unix.MS_SLAVE)
	if c.rootPropagation&(unix.MS_PRIVATE|unix.MS_UNBINDABLE) != 0 {
		p = unix.MS_PRIVATE // not unbindable: copies are still to be made
	}
	// Never shared, whatever the root is to be in the end: when the host's file systems are
	// detached here, they would go from the host too.
	b.call(sysMountSetattr, atCwd, str("/"), flags(unix.AT_RECURSIVE, "AT_RECURSIVE"),
		data(words(0, 0, p, 0), "{"+propagationName(p)+"}"), num(unix.MOUNT_ATTR_SIZE_VER0))
	c.at("root.path")
	b.do("attach the root file system")
	over := NoSlot
	for _, m := range layers {
		if over == NoSlot {
			b.call(sysMoveMount, in(m.slot), str(""), atCwd, str("/"), flags(unix.MOVE_MOUNT_F_EMPTY_PATH, "F_EMPTY_PATH"))
		} else {
			b.attach(m.slot, over)
		}
		over = m.slot
	}
	return nil
}

// splitEscaped yields the directories of a colon separated list in which a backslash
// protects a colon.
func splitEscaped(s string) func(func(string) bool) {
	return func(yield func(string) bool) {
		var cur strings.Builder
		for i := 0; i < len(s); i++ {
			switch {
			case s[i] == '\\' && i+1 < len(s):
				i++
				cur.WriteByte(s[i])
			case s[i] == ':':
				if !yield(cur.String()) {
					return
				}
				cur.Reset()
			default:
				cur.WriteByte(s[i])
			}
		}
		yield(cur.String())
	}
}

func (c *compiler) mounts() error {
	for i, sm := range c.spec.Mounts {
		c.at("mounts", i)
		m, err := parseMount(sm)
		if err != nil {
			return err
		}
		if m.remount {
			c.remount(m)
			continue
		}
		if m.bind && !path.IsAbs(m.source) {
			m.source = path.Join(c.o.Bundle, m.source)
		}
		if err := c.checkDestination(m); err != nil {
			return err
		}
		c.label(m)
		m.slot = c.host.slot(fmt.Sprintf("mount%d", i))
		if m.typ == "cgroup" || m.typ == "cgroup2" {
			if !m.bind {
				m.child = true
				c.mountCgroup(m)
				continue
			}
		}
		if err := c.prepare(m); err != nil {
			return err
		}
		if m.typ == "devpts" && m.dest == "/dev/pts" {
			c.devpts = m
		}
		c.place(m)
	}
	return nil
}

// enterCgroup waits until the parent has put the child into its cgroup, and makes the
// cgroup namespace there.
func (c *compiler) enterCgroup() {
	b := c.child
	if c.entered {
		return
	}
	c.entered = true
	defer c.back(c.at("linux.cgroupsPath"))
	late := c.o.LateDoors && len(c.o.Doors) > 0
	rights := none
	if late {
		rights = b.buffer()
		b.do("wait for the cgroup")
		b.call(sysRecvmsg, in(SlotSync), Arg{Kind: ArgReceive, Int: rights.Int, Slot: NoSlot}, flags(unix.MSG_CMSG_CLOEXEC, "MSG_CMSG_CLOEXEC")).expect(1)
		b.check64(rights, 0, uint64(unix.CmsgLen(4*len(c.o.Doors))), unix.EPROTO) // cmsg_len
	} else {
		c.meet(0, "wait for the cgroup")
	}
	for i, name := range c.o.Doors {
		door := b.slot(fmt.Sprintf("door%d", i))
		b.do("enter the cgroup %s", name)
		if late {
			b.load(door, rights, unix.CmsgLen(4*i))
		}
		b.call(sysWrite, in(door), str("0"), num(1))
	}
	if c.cgroupns {
		c.atNamespace("cgroup")
		b.do("make the cgroup namespace")
		b.call(sysUnshare, flags(unix.CLONE_NEWCGROUP, "CLONE_NEWCGROUP"))
	}
}

// directories makes the working directory, which the specification lets be missing.
func (c *compiler) directories() {
	if p := c.spec.Process; p != nil && p.Cwd != "" && p.Cwd != "/" && defence.CheckedCwd {
		c.at("process.cwd")
		cwd := path.Clean(p.Cwd)
		c.child.do("chdir to cwd (%q) set in config.json", p.Cwd)
		first := c.child.n
		c.openOrMake(c.child, cwd, true, inRoot, c.child.slot("target"))
		// Whichever part of the path it is that cannot be opened or made.
		for s := range c.child.since(first) {
			s.says(ClassInvalid, fmt.Sprintf("chdir to cwd (%q) set in config.json failed: %%e", p.Cwd))
		}
	}
}

// pivot makes the attached root the root of the process, and lets go of the host's.
func (c *compiler) pivot() {
	b := c.child
	c.at("root.path")
	b.do("enter the root file system")
	b.call(sysFchdir, in(c.root))
	if c.o.NoPivot || c.noMountns {
		b.call(sysChroot, str("."))
	} else {
		b.do("pivot_root")
		b.call(sysPivotRoot, str("."), str("."))
		b.do("detach the host's file systems")
		b.call(sysUmount, str("."), flags(unix.MNT_DETACH, "MNT_DETACH"))
	}
	b.call(sysChdir, str("/"))
}

// propagate gives the root the propagation that it is to have. It comes after the last
// copy of a mount: one that is unbindable cannot be copied.
func (c *compiler) propagate() {
	if s := c.spec.Linux.RootfsPropagation; s != "" {
		p := c.rootPropagation
		c.at("linux.rootfsPropagation")
		c.child.do("set the propagation of / to %s", s)
		c.child.setattr(c.root, p&unix.MS_REC != 0, 0, 0, p&^unix.MS_REC)
	}
}

// protect makes read-only what must be, and masks paths.
func (c *compiler) protect() {
	b, l := c.child, c.spec.Linux
	for _, m := range c.mounted {
		if m.readOnlyLater {
			c.atMount(m)
			b.do("make %s read-only", m.dest)
			if c.noMountns {
				// Only the root of a detached tree takes attributes: a read-only copy goes on top.
				again := b.slot("again")
				b.clone(in(m.slot), "", true, again)
				b.setattr(again, false, unix.MOUNT_ATTR_RDONLY, 0, 0)
				b.attach(again, m.slot)
				continue
			}
			b.setattr(m.slot, false, unix.MOUNT_ATTR_RDONLY, 0, 0)
		}
	}
	if c.spec.Root.Readonly {
		c.at("root.readonly")
		b.do("make / read-only")
		b.setattr(c.root, false, unix.MOUNT_ATTR_RDONLY, 0, 0)
	}
	target, copySlot := b.slot("target"), b.slot("copy")
	for i, p := range l.ReadonlyPaths {
		c.at("linux.readonlyPaths", i)
		skip := b.label()
		b.do("make %s read-only", p)
		dir, name := c.within(p)
		b.openIn(dir, name, unix.O_PATH, inRoot, target).accept(unix.ENOENT).onFail(skip)
		b.clone(in(target), "", true, copySlot)
		b.setattr(copySlot, false, unix.MOUNT_ATTR_RDONLY, 0, 0)
		b.attach(copySlot, target)
		b.here(skip)
	}
	if len(l.MaskedPaths) == 0 {
		return
	}
	h := c.host
	if c.f.Rootless {
		h = b
	}
	c.at("linux.maskedPaths")
	// The host's own /dev/null, and verified: never that of the image (CVE-2025-31133).
	null, empty := h.slot("null"), h.slot("empty")
	h.do("take /dev/null as a mask")
	c.cloneDevice(h, "/dev/null", null)
	c.isDevice(h, null, unix.S_IFCHR, 1, 3)
	h.do("make an empty directory as a mask")
	h.create("tmpfs", "tmpfs", []string{"mode=755", "nr_blocks=1", "nr_inodes=1"}, unix.MOUNT_ATTR_RDONLY, empty)
	b.do("mask paths")
	b.set(b.slot("null-used"), num(0))
	b.set(b.slot("empty-used"), num(0))
	buf := b.buffer()
	var st unix.Stat_t
	for i, p := range l.MaskedPaths {
		c.at("linux.maskedPaths", i)
		skip, file := b.label(), b.label()
		b.do("mask %s", p)
		at, name := c.within(p)
		b.openIn(at, name, unix.O_PATH, inRoot, target).accept(unix.ENOENT, unix.ENOTDIR).onFail(skip)
		// Asked first: a copy that does not fit would stay detached, and the kernel waits when
		// it gives that back.
		b.call(sysFstat, in(target), buf)
		b.check(buf, unsafe.Offsetof(st.Mode), unix.S_IFMT, unix.S_IFDIR, 0).onFail(file).Any = true
		c.cover(empty, target, skip)
		b.here(file)
		c.cover(null, target, skip)
		b.here(skip)
	}
}

// within gives the mount that a path to protect lies on, and the name there. A path of
// procfs or sysfs is looked up from that mount: who can exchange directories of the root
// meanwhile would else make it seem to be missing, and it would stay unprotected.
func (c *compiler) within(p string) (Slot, string) {
	p = path.Clean(p)
	if !defence.OwnProc {
		return c.root, p
	}
	for _, m := range slices.Backward(c.mounted) {
		if rel, ok := strings.CutPrefix(p, m.dest+"/"); ok {
			if !m.bind && (m.typ == "proc" || m.typ == "sysfs") {
				return m.slot, rel
			}
			break
		}
	}
	return c.root, p
}

// cover attaches a mask. The first use takes the detached mount itself: only an
// attached mount can be cloned (before Linux 6.15).
func (c *compiler) cover(mask, target Slot, done label) {
	b := c.child
	used, copySlot := b.slot(c.p.Slots[mask]+"-used"), b.slot("copy")
	again := b.label()
	b.next(Branch, []Arg{in(used)}).onFail(again)
	b.attach(mask, target)
	b.set(used, num(1)).onOK(done)
	b.here(again)
	b.clone(in(mask), "", false, copySlot)
	b.attach(copySlot, target).onOK(done)
}

// cloneDevice makes a detached copy of a device node of the host. A copy of a shared mount
// is in the peer group of /dev: what the container mounted on it would cover the host's
// node as well.
func (c *compiler) cloneDevice(b *builder, path string, slot Slot) {
	b.clone(atCwd, path, false, slot)
	b.setattr(slot, false, 0, 0, unix.MS_PRIVATE)
}

// isDevice fails unless the descriptor in slot is this device.
func (c *compiler) isDevice(b *builder, slot Slot, typ uint32, major, minor uint32) {
	buf := b.buffer()
	var st unix.Stat_t
	b.call(sysFstat, in(slot), buf)
	b.check(buf, unsafe.Offsetof(st.Mode), unix.S_IFMT, typ, unix.ENODEV)
	b.check64(buf, unsafe.Offsetof(st.Rdev), unix.Mkdev(major, minor), unix.ENODEV)
}

// names sets what the UTS namespace holds.
func (c *compiler) names() {
	b := c.child
	if n := c.spec.Hostname; n != "" {
		c.at("hostname")
		b.do("set the host name to %q", n)
		b.call(sysSethostname, str(n), num(len(n)))
	}
	if n := c.spec.Domainname; n != "" {
		c.at("domainname")
		b.do("set the domain name to %q", n)
		b.call(sysSetdomain, str(n), num(len(n)))
	}
}

// sysctls are written through a procfs that the child has mounted itself.
func (c *compiler) sysctls() error {
	if len(c.spec.Linux.Sysctl) == 0 {
		return nil
	}
	b := c.child
	c.at("linux.sysctl")
	proc := NoSlot
	for _, m := range c.mounted {
		if m.typ == "proc" && !m.bind && m.set&unix.MOUNT_ATTR_RDONLY == 0 {
			proc = m.slot
			break
		}
	}
	if proc == NoSlot {
		b.do("mount a private /proc")
		proc = b.slot("proc")
		b.create("proc", "", nil, 0, proc)
	}
	keys := make([]string, 0, len(c.spec.Linux.Sysctl))
	for k := range c.spec.Linux.Sysctl {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	file := b.slot("file")
	for _, k := range keys {
		v := c.spec.Linux.Sysctl[k]
		c.atKey("linux.sysctl", k)
		b.do("set sysctl %s=%s", k, v)
		name := "sys/" + sysctlPath(k)
		resolve := uint64(unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_MAGICLINKS)
		if !defence.OwnProc {
			resolve = 0
		}
		b.openIn(proc, name, unix.O_WRONLY, resolve, file)
		b.call(sysWrite, in(file), str(v), num(len(v))).expect(int64(len(v)))
	}
	return nil
}

// sysctlPath accepts both separators, as sysctl(8) does: the first one decides.
func sysctlPath(key string) string {
	if i := strings.IndexAny(key, "./"); i >= 0 && key[i] == '.' {
		return strings.Map(func(r rune) rune {
			switch r {
			case '.':
				return '/'
			case '/':
				return '.'
			}
			return r
		}, key)
	}
	return key
}
