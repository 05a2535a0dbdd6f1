//go:build linux

package plan

import (
	"fmt"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/internal/defence"
)

// Exec compiles the plan that runs one more process in a container: p with the
// container's own specification s.
func Exec(s *specs.Spec, p *specs.Process, f Facts, o Options) (*Plan, error) {
	c := &compiler{spec: &specs.Spec{Process: p, Linux: s.Linux}, f: f, o: o}
	c.begin(insideSteps)
	c.join()
	if err := c.affinity(p.ExecCPUAffinity); err != nil {
		return nil, err
	}
	c.execConsole(p)
	if err := c.process(p); err != nil {
		return nil, err
	}
	return c.end()
}

// Hook compiles the plan that runs a hook in the namespaces of a container. Its root
// is that of the container's first process, which the parent opens at rootPath.
func Hook(h specs.Hook, rootPath string, f Facts, o Options) (*Plan, error) {
	c := &compiler{spec: &specs.Spec{}, f: f, o: o}
	c.begin(insideSteps)
	host, b := c.host, c.child
	root := host.slot("root")
	host.do("open the root of the container's process")
	host.call(sysOpenat, atCwd, str(rootPath), openFlag(unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC), none).into(root)
	c.join()
	b.do("enter the root of the container's process")
	b.call(sysFchdir, in(root))
	b.call(sysChroot, str("."))
	c.stdio()
	c.handOn()
	args := h.Args
	if len(args) == 0 {
		args = []string{h.Path}
	}
	path := b.slot("path")
	b.do("exec %q", h.Path)
	b.set(path, str(h.Path))
	c.exec(args, h.Env, path)
	return c.end()
}

// join enters the cgroup and the namespaces of the process behind SlotPidfd.
func (c *compiler) join() {
	c.prologue()
	b := c.child
	var all uint64
	for _, t := range c.f.Joined {
		all |= NamespaceFlag(t)
		switch t {
		case "user":
			c.userns = true
		case "pid":
			c.p.LoaderForks = defence.LateFork
		}
	}
	early := !defence.LateFork && slices.Contains(c.f.Joined, "pid")
	if !early {
		c.enterCgroup()
		c.session()
	}
	if all != 0 {
		b.do("join the container's namespaces")
		b.call(sysSetns, in(SlotPidfd), flags(all, cloneText(all)))
	}
	if early {
		// The parent waits for the clone before it places anybody.
		c.refork()
		c.enterCgroup()
		c.session()
	}
	if c.userns {
		c.becomeRoot()
	}
}

// execConsole opens a terminal in the container's devpts, and makes sure that it is
// one: the container may have put something else there.
func (c *compiler) execConsole(p *specs.Process) {
	if !p.Terminal {
		return
	}
	c.at("terminal")
	b := c.child
	master, tty := b.slot("master"), b.slot("tty")
	b.do("open a terminal in the container's /dev/pts")
	flag := unix.O_RDWR | unix.O_NOCTTY | unix.O_CLOEXEC
	resolve := uint64(unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_SYMLINKS)
	how := openHow(flag, resolve)
	b.call(sysOpenat2, atCwd, str("/dev/pts/ptmx"), how, num(24)).into(master)
	buf := b.buffer()
	b.call(sysFstatfs, in(master), buf)
	b.check64(buf, 0, unix.DEVPTS_SUPER_MAGIC, unix.ENODEV)
	c.isDevice(b, master, unix.S_IFCHR, 5, 2)
	c.openTTY(b, master, tty)
	c.p.Terminal = true
	c.sendConsole(b, master)
	c.adoptTTY(b, tty)
}

func (c *compiler) end() (*Plan, error) {
	c.p.Host, c.p.Program = c.host.finish(), c.child.finish()
	if len(c.p.Slots) > MaxSlots {
		return nil, fmt.Errorf("the configuration needs %d descriptors, the limit is %d", len(c.p.Slots), MaxSlots)
	}
	return c.p, nil
}
