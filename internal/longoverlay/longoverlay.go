//go:build linux

// Package longoverlay mounts overlays of many layers, shown by no mount table, on kernels
// that cannot do that by themselves.
//
// In flow layers and options; out flows a descriptor of a mount that is attached nowhere,
// as fsmount(2) gives it. fsconfig(2) takes at most 255 bytes a value. Since Linux 6.7
// overlay takes its layers one by one (lowerdir+); before, an image of more than a handful
// of layers can only be mounted with mount(2), which needs a place in a mount table: here
// that of a thread's own mount namespace, which ends with the thread.
package longoverlay

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/ownthread"
)

// MaxValue is the longest value of one option that fsconfig(2) takes, in bytes.
const MaxValue = 255

// maxData is what mount(2) takes as options: a page, with a NUL.
const maxData = 4095

// LayerByLayer tells whether overlay knows the option lowerdir+ (Linux 6.7).
func LayerByLayer() bool {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return false
	}
	defer unix.Close(fs)
	// Before Linux 6.5 overlay is of the old kind, for which any option is collected
	// until it is mounted.
	if unix.FsconfigSetFlag(fs, "hako-no-such-option") == nil {
		return false
	}
	return unix.FsconfigSetString(fs, "lowerdir+", "/") == nil
}

// Overlay is what an overlay is made of. Names are in the form of mount(2): a colon or a
// backslash in a layer's name is escaped with a backslash.
type Overlay struct {
	Lower       []string // absolute; the topmost first
	Upper, Work string   // absolute, or both ""
	Options     []string // further ones, "key" or "key=value"
	Attr        uint64   // MOUNT_ATTR_ flags of the mount
}

// Mount mounts o with mount(2) and gives the mount, detached. With more layers than fit
// into the options, errdefs.ErrInvalidArgument.
func (o Overlay) Mount() (*os.File, error) {
	if len(o.Lower) == 0 {
		return nil, fmt.Errorf("mount overlay: no layers: %w", errdefs.ErrInvalidArgument)
	}
	dir, data := "", o.data("")
	if len(data) > maxData {
		// Relative to the folder that holds them all.
		if dir = o.commonDir(); dir != "/" {
			data = o.data(dir + "/")
		}
	}
	if len(data) > maxData {
		return nil, fmt.Errorf("mount overlay of %d layers: their names take %d bytes, this kernel has room for %d: %w",
			len(o.Lower), len(data), maxData, errdefs.ErrInvalidArgument)
	}
	for _, s := range append([]string{o.Upper, o.Work}, o.Lower...) {
		if strings.ContainsAny(s, ",\x00") {
			return nil, fmt.Errorf("mount overlay: %q has a comma or NUL: %w", s, errdefs.ErrInvalidArgument)
		}
	}
	var f *os.File
	var err error
	ownthread.Run(func() { f, err = o.inOwnNamespace(dir, data) })
	if err != nil {
		return nil, fmt.Errorf("mount overlay of %d layers: %w", len(o.Lower), err)
	}
	return f, nil
}

func (o Overlay) inOwnNamespace(dir, data string) (*os.File, error) {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return nil, os.NewSyscallError("unshare", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, os.NewSyscallError("mount", err)
	}
	if dir != "" {
		if err := unix.Chdir(dir); err != nil {
			return nil, &os.PathError{Op: "chdir", Path: dir, Err: err}
		}
	}
	// Any directory will do as the place. The container does not write to /proc.
	const place = "/proc"
	if err := unix.Mount("overlay", place, "overlay", 0, data); err != nil {
		return nil, os.NewSyscallError("mount", err)
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, place, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("open_tree", err)
	}
	if o.Attr != 0 {
		if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: o.Attr, Attr_clr: atime(o.Attr)}); err != nil {
			unix.Close(fd)
			return nil, os.NewSyscallError("mount_setattr", err)
		}
	}
	return os.NewFile(uintptr(fd), "overlay"), nil
}

// atime gives what has to be cleared so that an access time policy can be set.
func atime(attr uint64) uint64 {
	if attr&unix.MOUNT_ATTR__ATIME != 0 {
		return unix.MOUNT_ATTR__ATIME
	}
	return 0
}

// data gives the options, without prefix before every name.
func (o Overlay) data(prefix string) string {
	var b strings.Builder
	b.WriteString("lowerdir=")
	for i, l := range o.Lower {
		if i > 0 {
			b.WriteByte(':')
		}
		b.WriteString(strings.TrimPrefix(l, prefix))
	}
	if o.Upper != "" {
		b.WriteString(",upperdir=" + strings.TrimPrefix(o.Upper, prefix) + ",workdir=" + strings.TrimPrefix(o.Work, prefix))
	}
	for _, s := range o.Options {
		b.WriteString("," + s)
	}
	return b.String()
}

// commonDir gives the deepest folder that all names are below of, "/" if there is none
// or an escaped name hides it.
func (o Overlay) commonDir() string {
	names := o.Lower
	if o.Upper != "" {
		names = append([]string{o.Upper, o.Work}, names...)
	}
	dir := filepath.Dir(names[0])
	for _, n := range names {
		if strings.Contains(n, `\`) {
			return "/"
		}
		for dir != "/" && dir != "." && !strings.HasPrefix(n, dir+"/") {
			dir = filepath.Dir(dir)
		}
	}
	if dir == "." {
		return "/"
	}
	return dir
}
