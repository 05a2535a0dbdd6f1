//go:build linux

package plan

import (
	"path"
	"slices"
	"strings"
	"unsafe"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/internal/defence"
)

// protect makes read-only what must be, and masks paths.
func (c *compiler) protect() {
	b := c.child
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
	if !c.protected {
		c.protectPaths()
	}
}

// protectAhead protects paths while the parent makes the cgroup, if that is the same before the
// mounts that come after.
func (c *compiler) protectAhead(after []specs.Mount) {
	l := c.spec.Linux
	if !c.limitsLate() || c.entered || c.protected || c.o.Hooks || c.noMountns || len(l.Sysctl) > 0 {
		return
	}
	for _, paths := range [][]string{l.ReadonlyPaths, l.MaskedPaths} {
		for _, p := range paths {
			if at, _ := c.within(p); at == c.root { // links of the image may lead elsewhere later
				return
			}
			p = path.Clean(p) + "/"
			if slices.ContainsFunc(after, func(m specs.Mount) bool {
				d := path.Clean("/"+m.Destination) + "/"
				return strings.HasPrefix(d, p) || strings.HasPrefix(p, d)
			}) {
				return
			}
		}
	}
	c.protectPaths()
}

func (c *compiler) protectPaths() {
	c.protected = true
	b, l := c.child, c.spec.Linux
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
