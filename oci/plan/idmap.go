//go:build linux

package plan

import (
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// UserNamespace is a user namespace that the parent makes before its steps, and in
// which nobody lives: it holds the maps of mounts.
type UserNamespace struct {
	Slot       Slot
	UIDs, GIDs []specs.LinuxIDMapping
}

// idmapOf finds the maps of a mount, as the slot of a user namespace.
func (c *compiler) idmapOf(m *mount) (Slot, error) {
	if c.f.Rootless {
		return NoSlot, fmt.Errorf("mount %s: mapping the ids of a mount needs privileges on the host", m.dest)
	}
	uids, gids := m.uids, m.gids
	if len(uids) == 0 {
		if !c.userns {
			return NoSlot, fmt.Errorf("mount %s: option idmap needs uidMappings and gidMappings of the mount, or a user namespace", m.dest)
		}
		uids, gids = c.spec.Linux.UIDMappings, c.spec.Linux.GIDMappings
		if s, ok := c.host.names["ns-user"]; ok {
			return s, nil
		}
	}
	for _, n := range c.p.UserNamespaces {
		if slices.Equal(n.UIDs, uids) && slices.Equal(n.GIDs, gids) {
			return n.Slot, nil
		}
	}
	n := UserNamespace{c.host.slot(fmt.Sprintf("idmap%d", len(c.p.UserNamespaces))), uids, gids}
	c.p.UserNamespaces = append(c.p.UserNamespaces, n)
	return n.Slot, nil
}

// idmap maps the ids of the detached mount in slot. what names it in the error of a kernel
// that cannot: tmpfs, for one, takes maps since Linux 6.3.
func (b *builder) idmap(slot Slot, rec bool, userns Slot, what string) {
	attr := b.buffer()
	for i, v := range []Arg{flags(unix.MOUNT_ATTR_IDMAP, "MOUNT_ATTR_IDMAP"), none, none, in(userns)} {
		b.poke(attr, 8*i, v)
	}
	f, text := uint64(unix.AT_EMPTY_PATH), "EMPTY_PATH"
	if rec {
		f, text = f|unix.AT_RECURSIVE, text+"|RECURSIVE"
	}
	why := what + ": this kernel cannot map the ids of its file system: %e"
	if rec {
		why = what + ": this kernel cannot map the ids of its file system, or of one that is mounted below: %e"
	}
	b.call(sysMountSetattr, in(slot), str(""), flags(f, text), attr, num(unix.MOUNT_ATTR_SIZE_VER0)).says(ClassInvalid, why)
}

// mapIDs maps the ids of a mount that asks for it.
func (c *compiler) mapIDs(b *builder, m *mount) error {
	if !m.idmap {
		return nil
	}
	userns, err := c.idmapOf(m)
	if err != nil {
		return err
	}
	if b != c.host && (c.userns || !m.bind) {
		return fmt.Errorf("mount %s: the ids of %s cannot be mapped", m.dest, m.typ)
	}
	b.do("map the ids of %s", m.dest)
	b.idmap(m.slot, m.ridmap, userns, "mount "+m.dest)
	return nil
}

// mappedOverlay makes an overlay of mapped lower layers: the kernel does not map an
// overlay itself. The layers are handed over as descriptors (Linux 6.13; of mounts that
// are detached, 6.15). The upper layer has the ids of the host, so the caller gives
// upperdir to the container's root.
func (c *compiler) mappedOverlay(b *builder, m *mount) error {
	userns, err := c.idmapOf(m)
	if err != nil {
		return err
	}
	o := overlayOf(m)
	fs := b.slot("fs")
	type layer struct {
		key string
		fd  Slot
	}
	var layers []layer
	for i, dir := range o.Lower {
		slot := b.slot(fmt.Sprintf("lower%d", i))
		b.do("map the ids of layer %s", dir)
		b.clone(atCwd, unescapeLayer(dir), false, slot)
		b.idmap(slot, false, userns, "root file system, layer "+dir)
		layers = append(layers, layer{"lowerdir+", slot})
	}
	if o.Upper != "" {
		// Not mapped: the kernel makes files in workdir as the parent, who has no id there.
		b.do("open layer %s", o.Upper)
		for _, d := range [][2]string{{"upperdir", o.Upper}, {"workdir", o.Work}} {
			dir := b.slot(d[0])
			b.call(sysOpenat, atCwd, str(unescapeLayer(d[1])), openFlag(unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC), none).into(dir)
			layers = append(layers, layer{d[0], dir})
		}
	}
	b.do("mount the root file system (overlay)")
	b.call(sysFsopen, str("overlay"), flags(unix.FSOPEN_CLOEXEC, "CLOEXEC")).into(fs)
	if m.source != "" {
		b.config(fs, unix.FSCONFIG_SET_STRING, "SET_STRING", str("source"), str(m.source))
	}
	for _, l := range layers {
		b.call(sysFsconfig, in(fs), flags(unix.FSCONFIG_SET_FD, "SET_FD"), str(l.key), none, in(l.fd)).
			says(ClassInvalid, "root file system: an overlay of layers with mapped ids needs Linux 6.15, which takes layers as descriptors: %e")
	}
	for _, opt := range o.Options {
		b.option(fs, opt)
	}
	b.config(fs, unix.FSCONFIG_CMD_CREATE, "CMD_CREATE", none, none)
	attr := m.set | m.recSet
	b.call(sysFsmount, in(fs), flags(unix.FSMOUNT_CLOEXEC, "CLOEXEC"), flags(attr, attrText(attr))).into(m.slot)
	return nil
}

// Layers gives the directories of an overlay with these options, the topmost first, also the
// one that is written to.
func Layers(options []string) (dirs []string) {
	o := overlayOf(&mount{data: options})
	if o.Upper != "" {
		dirs = append(dirs, o.Upper)
	}
	dirs = append(dirs, o.Lower...)
	for i, d := range dirs {
		dirs[i] = unescapeLayer(d)
	}
	return dirs
}

func unescapeLayer(dir string) string {
	return strings.NewReplacer(`\:`, ":", `\\`, `\`).Replace(dir)
}

// remount changes a mount that an earlier entry has made.
func (c *compiler) remount(m *mount) {
	b := c.child
	target := b.slot("target")
	b.do("remount %s", m.dest)
	b.openIn(c.root, m.dest, unix.O_PATH, inRoot, target)
	if m.set|m.clr != 0 {
		b.setattr(target, false, m.set, m.clr, 0)
	}
	if m.recSet|m.recClr != 0 {
		b.setattr(target, true, m.recSet, m.recClr, 0)
	}
	if m.propagation != 0 {
		b.setattr(target, m.propagationRec, 0, 0, m.propagation)
	}
	if len(m.data) == 0 {
		return
	}
	fs := b.slot("fs")
	const fspickCloexec, fspickEmptyPath = 1, 8
	b.call(sysFspick, in(target), str(""), flags(fspickCloexec|fspickEmptyPath, "CLOEXEC|EMPTY_PATH")).into(fs)
	for _, opt := range m.data {
		b.option(fs, opt)
	}
	b.config(fs, unix.FSCONFIG_CMD_RECONFIGURE, "CMD_RECONFIGURE", none, none)
}
