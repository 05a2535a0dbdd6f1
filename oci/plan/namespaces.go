//go:build linux

package plan

import (
	"errors"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/internal/defence"
)

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
