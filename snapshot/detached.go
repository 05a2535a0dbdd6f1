package snapshot

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/longoverlay"
)

// MountDetached mounts what a snapshotter gave and returns the root of the mount. It
// is attached nowhere: no path leads to it, no mount table lists it, and it is gone
// when the file is closed. Resolve names in it with internal/safepath. Set-uid bits
// and devices have no effect in it.
//
// Lower directories are handed over one by one, so that their number is bounded by
// the kernel's 500 and not by the 4096 bytes of mount(2)'s options (Linux 6.7; on older
// kernels see internal/longoverlay). Only kinds of mounts that a snapshotter makes are known,
// anything else is errdefs.ErrNotImplemented.
func MountDetached(mounts []mount.Mount) (*os.File, error) {
	if len(mounts) != 1 {
		return nil, fmt.Errorf("mount detached: one mount is needed, not %d: %w", len(mounts), errdefs.ErrInvalidArgument)
	}
	m := mounts[0]
	if m.Target != "" {
		return nil, fmt.Errorf("mount detached: target %q: %w", m.Target, errdefs.ErrNotImplemented)
	}
	var f *os.File
	var err error
	switch m.Type {
	case "bind":
		f, err = detachBind(m)
	case "overlay":
		f, err = detachOverlay(m)
	default:
		err = fmt.Errorf("type %q: %w", m.Type, errdefs.ErrNotImplemented)
	}
	return f, wrap(err, "mount detached %s", m.Source)
}

// protect are the attributes of a mount that root works on for others.
const protect = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV

func detachBind(m mount.Mount) (*os.File, error) {
	attr := unix.MountAttr{Attr_set: protect}
	for _, o := range m.Options {
		switch o {
		case "ro":
			attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
		case "rw", "bind", "rbind":
		default:
			return nil, fmt.Errorf("option %q: %w", o, errdefs.ErrNotImplemented)
		}
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, m.Source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("open_tree", err)
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("mount_setattr", err)
	}
	return os.NewFile(uintptr(fd), m.Source), nil
}

// overlayOptions are a snapshotter's mount options, taken apart.
type overlayOptions struct {
	lower       []string // the top one first
	upper, work string
	other       [][2]string // key, value ("" for a flag)
	attrs       int
}

// parseOverlay reads options in the form of mount(2).
func parseOverlay(options []string) (o overlayOptions, err error) {
	o.attrs = protect
	for _, opt := range options {
		key, value, _ := strings.Cut(opt, "=")
		switch key {
		case "lowerdir":
			o.lower = strings.Split(value, ":")
		case "upperdir":
			o.upper = value
		case "workdir":
			o.work = value
		case "index", "volatile", "userxattr", "metacopy", "redirect_dir", "xino":
			o.other = append(o.other, [2]string{key, value})
		case "ro":
			o.attrs |= unix.MOUNT_ATTR_RDONLY
		case "rw":
		default:
			return o, fmt.Errorf("option %q: %w", opt, errdefs.ErrNotImplemented)
		}
	}
	if len(o.lower) == 0 || slices.Contains(o.lower, "") || (o.upper == "") != (o.work == "") || strings.Contains(strings.Join(o.lower, ""), "\\") {
		return o, fmt.Errorf("overlay options %q: %w", options, errdefs.ErrInvalidArgument)
	}
	return o, nil
}

func detachOverlay(m mount.Mount) (*os.File, error) {
	o, err := parseOverlay(m.Options)
	if err != nil {
		return nil, err
	}
	if longoverlay.LayerByLayer() {
		return configureOverlay(o)
	}
	d := longoverlay.Overlay{Lower: o.lower, Upper: o.upper, Work: o.work, Attr: uint64(o.attrs)}
	for _, kv := range o.other {
		if kv[1] != "" {
			kv[0] += "=" + kv[1]
		}
		d.Options = append(d.Options, kv[0])
	}
	return d.Mount()
}

func configureOverlay(o overlayOptions) (*os.File, error) {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fsopen", err)
	}
	defer unix.Close(fs)
	set := func(key, value string) error {
		if err := unix.FsconfigSetString(fs, key, value); err != nil {
			return fmt.Errorf("fsconfig %s=%s: %w", key, value, kernelSays(fs, err))
		}
		return nil
	}
	if err := set("source", "overlay"); err != nil {
		return nil, err
	}
	for _, l := range o.lower {
		if err := set("lowerdir+", l); err != nil {
			return nil, err
		}
	}
	if o.upper != "" {
		if err := errors.Join(set("upperdir", o.upper), set("workdir", o.work)); err != nil {
			return nil, err
		}
	}
	for _, kv := range o.other {
		if kv[1] == "" {
			if err := unix.FsconfigSetFlag(fs, kv[0]); err != nil {
				return nil, fmt.Errorf("fsconfig %s: %w", kv[0], kernelSays(fs, err))
			}
			continue
		}
		if err := set(kv[0], kv[1]); err != nil {
			return nil, err
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, fmt.Errorf("fsconfig create: %w", kernelSays(fs, err))
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, o.attrs)
	if err != nil {
		return nil, fmt.Errorf("fsmount: %w", kernelSays(fs, err))
	}
	return os.NewFile(uintptr(fd), "overlay"), nil
}

// kernelSays adds the message that the kernel left in the file system context.
func kernelSays(fs int, err error) error {
	var buf [1024]byte
	n, rerr := unix.Read(fs, buf[:])
	if rerr != nil || n <= 0 {
		return err
	}
	return fmt.Errorf("%w (%s)", err, strings.TrimSpace(string(buf[:n])))
}
