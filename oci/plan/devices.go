//go:build linux

package plan

import (
	"fmt"
	"path"
	"strings"
	"unsafe"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

type device struct {
	path         string
	mode         uint32 // with type
	major, minor uint32
	uid, gid     uint32 // of the container
}

// defaultDevices are those that the specification promises to every container.
var defaultDevices = []device{
	{"/dev/null", unix.S_IFCHR | 0o666, 1, 3, 0, 0}, {"/dev/zero", unix.S_IFCHR | 0o666, 1, 5, 0, 0},
	{"/dev/full", unix.S_IFCHR | 0o666, 1, 7, 0, 0}, {"/dev/random", unix.S_IFCHR | 0o666, 1, 8, 0, 0},
	{"/dev/urandom", unix.S_IFCHR | 0o666, 1, 9, 0, 0}, {"/dev/tty", unix.S_IFCHR | 0o666, 5, 0, 0, 0},
}

func toDevice(d specs.LinuxDevice) (device, error) {
	out := device{path: path.Clean("/" + d.Path), mode: 0o666, major: uint32(d.Major), minor: uint32(d.Minor)}
	switch d.Type {
	case "c", "u":
		out.mode |= unix.S_IFCHR
	case "b":
		out.mode |= unix.S_IFBLK
	case "p":
		out.mode |= unix.S_IFIFO
		out.major, out.minor = 0, 0
	default:
		return out, fmt.Errorf("device %s: unknown type %q", d.Path, d.Type)
	}
	if d.Type != "p" && (d.Major < 0 || d.Major > 0xfff || d.Minor < 0 || d.Minor > 0xfffff) {
		return out, fmt.Errorf("device %s: number %d:%d is out of range", d.Path, d.Major, d.Minor)
	}
	if out.path == "/" || strings.IndexByte(out.path, 0) >= 0 {
		return out, fmt.Errorf("device %q: bad path", d.Path)
	}
	if d.FileMode != nil {
		out.mode = out.mode&unix.S_IFMT | uint32(*d.FileMode)&0o7777
	}
	if d.UID != nil {
		out.uid = *d.UID
	}
	if d.GID != nil {
		out.gid = *d.GID
	}
	return out, nil
}

func (c *compiler) devMount() *mount {
	for _, m := range c.mounted {
		if m.dest == "/dev" {
			return m
		}
	}
	return nil
}

// devices makes the nodes and links of /dev. A /dev that is bound from the host is
// left as it is.
func (c *compiler) devices() error {
	dev := c.devMount()
	all := make([]device, 0, len(defaultDevices)+len(c.spec.Linux.Devices))
	given := map[string]device{}
	var from []int // of each in all
	for i, sd := range c.spec.Linux.Devices {
		d, err := toDevice(sd)
		if err != nil {
			return err
		}
		if first, twice := given[d.path]; twice {
			// Several that add devices to one configuration may add the same.
			if d.mode&unix.S_IFMT != first.mode&unix.S_IFMT || d.major != first.major || d.minor != first.minor {
				return fmt.Errorf("device %s: given twice, as %d:%d and %d:%d", d.path, first.major, first.minor, d.major, d.minor)
			}
			continue
		}
		given[d.path] = d
		all, from = append(all, d), append(from, i)
	}
	if dev == nil || !dev.bind {
		for _, d := range defaultDevices {
			if _, ok := given[d.path]; !ok {
				all = append(all, d)
			}
		}
	}
	for i, d := range all {
		if i < len(from) {
			c.at("linux.devices", from[i])
		} else {
			c.promised("default devices")
		}
		if dev != nil && dev.bind && strings.HasPrefix(d.path, "/dev/") {
			continue
		}
		if err := c.device(d, dev); err != nil {
			return err
		}
	}
	if dev == nil || !dev.bind {
		c.links(dev)
	}
	return nil
}

func (c *compiler) device(d device, dev *mount) error {
	if c.f.Rootless || c.userns && (dev == nil || !dev.fresh) {
		return c.bindDevice(d)
	}
	rel, below := strings.CutPrefix(d.path, "/dev/")
	if dev == nil || !dev.fresh || !below {
		c.nodeAnywhere(d)
		return nil
	}
	// The tmpfs is new and ours: names in it can be used as they are. With a user
	// namespace the child may not make devices, but the parent may.
	b := c.child
	if c.userns {
		b = c.host
	}
	b.do("make %s", d.path)
	for i, r := range rel {
		if r == '/' {
			if sub := rel[:i]; !contains(dev.made, sub) {
				b.call(sysMkdirat, in(dev.slot), str(sub), num(0o755))
				dev.made = append(dev.made, sub)
			}
		}
	}
	b.call(sysMknodat, in(dev.slot), str(rel), nodeMode(d.mode), nodeNumber(d))
	uid, gid := c.hostUID(d.uid), c.hostGID(d.gid)
	if uid != 0 || gid != 0 {
		b.call(sysFchownat, in(dev.slot), str(rel), num(uid), num(gid), flags(unix.AT_SYMLINK_NOFOLLOW, "NOFOLLOW"))
	}
	if c.userns {
		// The parent's umask applied.
		b.call(sysFchmodat, in(dev.slot), str(rel), num(d.mode&0o7777))
	}
	return nil
}

func contains(list []string, s string) bool {
	for _, v := range list {
		if v == s {
			return true
		}
	}
	return false
}

func nodeMode(mode uint32) Arg {
	t := map[uint32]string{unix.S_IFCHR: "S_IFCHR", unix.S_IFBLK: "S_IFBLK", unix.S_IFIFO: "S_IFIFO", unix.S_IFREG: "S_IFREG"}[mode&unix.S_IFMT]
	return flags(uint64(mode), fmt.Sprintf("%s|%#o", t, mode&0o7777))
}

func nodeNumber(d device) Arg {
	return flags(unix.Mkdev(d.major, d.minor), fmt.Sprintf("%d:%d", d.major, d.minor))
}

func (c *compiler) hostUID(id uint32) uint32 {
	if c.userns {
		if h, ok := hostID(c.spec.Linux.UIDMappings, id); ok {
			return h
		}
	}
	return id
}

func (c *compiler) hostGID(id uint32) uint32 {
	if c.userns {
		if h, ok := hostID(c.spec.Linux.GIDMappings, id); ok {
			return h
		}
	}
	return id
}

// nodeAnywhere makes a node in a directory that the image can have prepared. What is
// there already must be this very device.
func (c *compiler) nodeAnywhere(d device) {
	b := c.child
	dir, file := b.slot("target"), b.slot("file")
	b.do("make %s", d.path)
	c.openOrMake(b, path.Dir(d.path), true, inRoot, dir)
	base := path.Base(d.path)
	exists, done := b.label(), b.label()
	b.call(sysMknodat, in(dir), str(base), nodeMode(d.mode), nodeNumber(d)).accept(unix.EEXIST).onFail(exists)
	b.call(sysFchownat, in(dir), str(base), num(d.uid), num(d.gid), flags(unix.AT_SYMLINK_NOFOLLOW, "NOFOLLOW")).onOK(done)
	b.here(exists)
	b.call(sysOpenat, in(dir), str(base), openFlag(unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC), none).into(file)
	buf := b.buffer()
	var st unix.Stat_t
	text := "make " + d.path + ": something else has that name in the image: %e"
	b.call(sysFstat, in(file), buf)
	b.check(buf, unsafe.Offsetof(st.Mode), unix.S_IFMT, d.mode&unix.S_IFMT, unix.EEXIST).says(ClassInvalid, text)
	if d.mode&unix.S_IFMT != unix.S_IFIFO {
		b.check64(buf, unsafe.Offsetof(st.Rdev), unix.Mkdev(d.major, d.minor), unix.EEXIST).says(ClassInvalid, text)
	}
	b.here(done)
}

// bindDevice shows the host's node where making one is not allowed.
func (c *compiler) bindDevice(d device) error {
	if d.mode&unix.S_IFMT == unix.S_IFIFO {
		return fmt.Errorf("device %s: a FIFO cannot be bound from the host", d.path)
	}
	b := c.host
	if c.f.Rootless {
		b = c.child
	}
	slot, target := b.slot("node"+d.path), b.slot("target")
	b.do("take the host's %s", d.path)
	c.cloneDevice(b, d.path, slot)
	c.isDevice(b, slot, d.mode&unix.S_IFMT, d.major, d.minor)
	c.child.do("bind the host's %s", d.path)
	c.openOrMake(c.child, d.path, false, inRoot, target)
	c.child.attach(slot, target)
	return nil
}

// links makes the symbolic links of /dev that programs expect.
func (c *compiler) links(dev *mount) {
	b := c.child
	c.promised("links in /dev")
	b.do("make the links in /dev")
	dir := b.slot("target")
	if dev != nil && dev.fresh {
		dir = dev.slot
	} else {
		c.openOrMake(b, "/dev", true, inRoot, dir)
	}
	links := [][2]string{{"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"}, {"/proc/self/fd/2", "stderr"}}
	if c.devpts != nil {
		links = append(links, [2]string{"pts/ptmx", "ptmx"})
	}
	for _, l := range links {
		b.call(sysSymlinkat, str(l[0]), in(dir), str(l[1])).accept(unix.EEXIST)
	}
}

// console opens a pseudo terminal in the container's own devpts, makes it the
// process's terminal, and shows it as /dev/console.
func (c *compiler) console() {
	if c.spec.Process == nil || !c.spec.Process.Terminal {
		return
	}
	c.at("process.terminal")
	b := c.host
	if c.f.Rootless {
		b = c.child
	}
	master, tty := b.slot("master"), b.slot("tty")
	b.do("open a terminal")
	if c.devpts != nil {
		b.call(sysOpenat, in(c.devpts.slot), str("ptmx"), openFlag(unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC), none).into(master)
	} else {
		b.call(sysOpenat, atCwd, str("/dev/ptmx"), openFlag(unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC), none).into(master)
	}
	c.openTTY(b, master, tty)
	c.p.Terminal, c.p.ConsoleSlot = true, master
	if c.f.Rootless {
		c.sendConsole(b, master)
	}
	b = c.child
	c.adoptTTY(b, tty)
	target, copySlot := b.slot("target"), b.slot("tty-mount")
	b.do("bind the terminal on /dev/console")
	if dev := c.devMount(); dev != nil && dev.fresh {
		b.call(sysMknodat, in(dev.slot), str("console"), nodeMode(unix.S_IFREG|0o600), none)
		b.call(sysOpenat, in(dev.slot), str("console"), openFlag(unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC), none).into(target)
	} else {
		for _, s := range c.openOrMake(b, "/dev/console", false, inRoot|unix.RESOLVE_NO_SYMLINKS, target) {
			s.says(ClassInvalid, "bind the terminal on /dev/console: not an ordinary file: %e")
		}
	}
	// A descriptor is cloned, no path is followed. The terminal was opened through a
	// mount that is the container's /dev/pts by now, or else through the host's, which
	// only the parent can clone.
	if c.devpts != nil || c.f.Rootless {
		b.clone(in(tty), "", false, copySlot)
	} else {
		c.host.clone(in(tty), "", false, copySlot)
		c.host.setattr(copySlot, false, 0, 0, unix.MS_PRIVATE)
	}
	b.attach(copySlot, target)
}

func (c *compiler) openTTY(b *builder, master, tty Slot) {
	b.call(sysIoctl, in(master), flags(unix.TIOCSPTLCK, "TIOCSPTLCK"), data(halves(0), "0"))
	b.call(sysIoctl, in(master), flags(unix.TIOCGPTPEER, "TIOCGPTPEER"), openFlag(unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)).into(tty)
	if s := c.spec.Process.ConsoleSize; s != nil {
		ws := halves(uint32(uint16(s.Height))|uint32(uint16(s.Width))<<16, 0)
		b.call(sysIoctl, in(master), flags(unix.TIOCSWINSZ, "TIOCSWINSZ"), data(ws, fmt.Sprintf("%dx%d", s.Width, s.Height)))
	}
}

func (c *compiler) sendConsole(b *builder, master Slot) {
	b.do("hand the terminal to the parent")
	b.call(sysDup3, in(master), in(SlotConsole), openFlag(unix.O_CLOEXEC))
	b.call(sysSendmsg, in(SlotSync), Arg{Kind: ArgMessage, Slot: SlotConsole}, none)
	c.p.ConsoleSent = true
}

func (c *compiler) adoptTTY(b *builder, tty Slot) {
	b.do("take the terminal")
	if !c.p.LoaderForks {
		b.call(sysIoctl, in(tty), flags(unix.TIOCSCTTY, "TIOCSCTTY"), num(0))
	}
	if uid := c.spec.Process.User.UID; uid != 0 {
		b.call(sysFchown, in(tty), num(uid), flags(0xffffffff, "-1"))
	}
	for i := range 3 {
		b.call(sysDup3, in(tty), num(i), none)
	}
}
