//go:build linux

package plan

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

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
	protected                      bool // paths are masked and read-only
	devpts                         *mount
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
	c.limits()
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
				c.protectAhead(c.spec.Mounts[i:])
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

// limitsLate tells whether the child enters its cgroup before that has limits. A runtime with a
// real-time priority could not enter one that is still to be given real-time.
func (c *compiler) limitsLate() bool {
	r := c.spec.Linux.Resources
	return c.o.LateDoors && len(c.o.Doors) > 0 && (r == nil || r.CPU == nil || r.CPU.RealtimeRuntime == nil)
}

// limits waits until the parent has set the limits, if that was not waited for before.
func (c *compiler) limits() {
	if !c.limitsLate() {
		return
	}
	c.p.LimitsLate = true
	if !c.o.Hooks { // they come after the limits
		c.at("linux.resources")
		c.meet(0, "wait for the limits")
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
