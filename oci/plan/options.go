//go:build linux

package plan

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// mount is a parsed mount of the specification.
type mount struct {
	dest, typ, source string

	bind, rec      bool
	set, clr       uint64 // MOUNT_ATTR_ of the mount itself
	recSet, recClr uint64 // of the mount and everything below it
	propagation    uint64 // MS_SHARED, ...; 0 if not given
	propagationRec bool
	data           []string // options for the file system
	copyUp         bool
	remount        bool
	idmap, ridmap  bool
	relabel        bool // a file system that takes its SELinux label as an attribute
	uids, gids     []specs.LinuxIDMapping
	readOnlyLater  bool // read-only once everything below is in place

	slot  Slot
	child bool // made by the child
	fresh bool // an empty tmpfs that nobody but us has seen
	made  []string
}

type attr struct{ set, clr uint64 }

// attrs maps an option to the MOUNT_ATTR_ bits that it sets and clears.
var attrs = table[attr]{
	{"ro", attr{unix.MOUNT_ATTR_RDONLY, 0}}, {"rw", attr{0, unix.MOUNT_ATTR_RDONLY}},
	{"nosuid", attr{unix.MOUNT_ATTR_NOSUID, 0}}, {"suid", attr{0, unix.MOUNT_ATTR_NOSUID}},
	{"nodev", attr{unix.MOUNT_ATTR_NODEV, 0}}, {"dev", attr{0, unix.MOUNT_ATTR_NODEV}},
	{"noexec", attr{unix.MOUNT_ATTR_NOEXEC, 0}}, {"exec", attr{0, unix.MOUNT_ATTR_NOEXEC}},
	{"nodiratime", attr{unix.MOUNT_ATTR_NODIRATIME, 0}}, {"diratime", attr{0, unix.MOUNT_ATTR_NODIRATIME}},
	{"relatime", attr{unix.MOUNT_ATTR_RELATIME, unix.MOUNT_ATTR__ATIME}}, {"norelatime", attr{unix.MOUNT_ATTR_STRICTATIME, unix.MOUNT_ATTR__ATIME}},
	{"noatime", attr{unix.MOUNT_ATTR_NOATIME, unix.MOUNT_ATTR__ATIME}}, {"atime", attr{unix.MOUNT_ATTR_RELATIME, unix.MOUNT_ATTR__ATIME}},
	{"strictatime", attr{unix.MOUNT_ATTR_STRICTATIME, unix.MOUNT_ATTR__ATIME}}, {"nostrictatime", attr{unix.MOUNT_ATTR_RELATIME, unix.MOUNT_ATTR__ATIME}},
	{"nosymfollow", attr{unix.MOUNT_ATTR_NOSYMFOLLOW, 0}}, {"symfollow", attr{0, unix.MOUNT_ATTR_NOSYMFOLLOW}},
}

var propagations = table[uint64]{
	{"private", unix.MS_PRIVATE}, {"shared", unix.MS_SHARED}, {"slave", unix.MS_SLAVE}, {"unbindable", unix.MS_UNBINDABLE},
}

// superblock are options that the kernel takes as flags of any file system; those
// mapped to "" are the default or without meaning.
var superblock = table[string]{
	{"sync", "sync"}, {"dirsync", "dirsync"}, {"mand", "mand"}, {"lazytime", "lazytime"},
	{"async", ""}, {"nomand", ""}, {"nolazytime", ""}, {"defaults", ""}, {"silent", ""}, {"loud", ""},
	// The file systems that count changes of inodes do it unasked since Linux 6.0, and
	// the mount interface has no flag for it.
	{"iversion", ""}, {"noiversion", ""},
}

// MountOptions lists the options that are not handed to the file system.
func MountOptions() []string {
	out := []string{"bind", "rbind", "tmpcopyup", "remount", "idmap", "ridmap"}
	for _, a := range attrs {
		out = append(out, a.name, "r"+a.name)
	}
	for _, p := range propagations {
		out = append(out, p.name, "r"+p.name)
	}
	for _, o := range superblock {
		out = append(out, o.name)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func (m *mount) apply(set, clr uint64) { m.set, m.clr = m.set&^clr|set, m.clr&^set|clr }

// parseMount sorts the options of one mount.
func parseMount(s specs.Mount) (*mount, error) {
	m := &mount{dest: path.Clean("/" + s.Destination), typ: s.Type, source: s.Source, slot: NoSlot}
	if strings.IndexByte(s.Destination, 0) >= 0 || strings.IndexByte(s.Source, 0) >= 0 || strings.IndexByte(s.Type, 0) >= 0 {
		return nil, fmt.Errorf("mount %q: NUL in a name", m.dest)
	}
	m.uids, m.gids = s.UIDMappings, s.GIDMappings
	if (len(m.uids) == 0) != (len(m.gids) == 0) {
		return nil, fmt.Errorf("mount %s: uidMappings and gidMappings must be given together", m.dest)
	}
	m.idmap = len(m.uids) > 0
	for _, o := range s.Options {
		if strings.IndexByte(o, 0) >= 0 {
			return nil, fmt.Errorf("mount %s: NUL in option %q", m.dest, o)
		}
		if a, ok := attrs.find(o); ok {
			m.apply(a.set, a.clr)
			continue
		}
		if a, ok := attrs.find(strings.TrimPrefix(o, "r")); ok && o[0] == 'r' {
			m.recSet, m.recClr = m.recSet&^a.clr|a.set, m.recClr&^a.set|a.clr
			continue
		}
		if p, ok := propagations.find(o); ok {
			m.propagation, m.propagationRec = p, false
			continue
		}
		if p, ok := propagations.find(strings.TrimPrefix(o, "r")); ok {
			m.propagation, m.propagationRec = p, true
			continue
		}
		if flag, ok := superblock.find(o); ok {
			if flag != "" {
				m.data = append(m.data, flag)
			}
			continue
		}
		switch o {
		case "":
		case "bind":
			m.bind = true
		case "rbind":
			m.bind, m.rec = true, true
		case "tmpcopyup":
			m.copyUp = true
		case "idmap":
			m.idmap = true
		case "ridmap":
			m.idmap, m.ridmap = true, true
		case "remount":
			m.remount = true
		default:
			m.data = append(m.data, o)
		}
	}
	if m.remount {
		// "remount,bind" restricts mount(2) to the flags of the mount. They are all that
		// there is without options for the file system.
		return m, nil
	}
	if m.typ == "bind" {
		m.bind = true
	}
	if m.typ == "" && !m.bind {
		return nil, fmt.Errorf("mount %s: neither a type nor option bind", m.dest)
	}
	if m.bind {
		if m.source == "" {
			return nil, fmt.Errorf("bind mount %s: no source", m.dest)
		}
		// A bind mount has no file system to hand these to.
		m.data = nil
	}
	if m.copyUp && m.typ != "tmpfs" {
		return nil, fmt.Errorf("mount %s: tmpcopyup needs type tmpfs", m.dest)
	}
	return m, nil
}

var attrFlags = []flagName{
	{unix.MOUNT_ATTR_RDONLY, "RDONLY"}, {unix.MOUNT_ATTR_NOSUID, "NOSUID"}, {unix.MOUNT_ATTR_NODEV, "NODEV"},
	{unix.MOUNT_ATTR_NOEXEC, "NOEXEC"}, {unix.MOUNT_ATTR__ATIME, "ATIME"}, {unix.MOUNT_ATTR_NOATIME, "NOATIME"},
	{unix.MOUNT_ATTR_STRICTATIME, "STRICTATIME"}, {unix.MOUNT_ATTR_NODIRATIME, "NODIRATIME"}, {unix.MOUNT_ATTR_NOSYMFOLLOW, "NOSYMFOLLOW"},
}

func attrText(v uint64) string {
	if v == 0 {
		return "0"
	}
	return flagText(v, attrFlags)
}

func propagationName(p uint64) string {
	for _, e := range propagations {
		if e.value == p {
			return strings.ToUpper(e.name)
		}
	}
	return "0"
}

// setattr changes the mount that is open in slot.
func (b *builder) setattr(slot Slot, rec bool, set, clr, propagation uint64) *Step {
	f, text := uint64(unix.AT_EMPTY_PATH), "EMPTY_PATH"
	if rec {
		f, text = f|unix.AT_RECURSIVE, text+"|RECURSIVE"
	}
	attr := data(words(set, clr, propagation, 0), "")
	attr.more.text = func() string {
		return "{set " + attrText(set) + ", clear " + attrText(clr) + ", " + propagationName(propagation) + "}"
	}
	return b.call(sysMountSetattr, in(slot), str(""), flags(f, text), attr, num(unix.MOUNT_ATTR_SIZE_VER0))
}
