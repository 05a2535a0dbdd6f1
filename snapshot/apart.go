package snapshot

import (
	"errors"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/ownthread"
)

// maxApart bounds the options of a mount that MountAny makes by mount(2), in bytes: the library
// would take longer ones to another thread, and so to the host's mounts.
const maxApart = 3000

// MountAny mounts what a snapshotter gave, its own or another program's, and returns the root
// of the mount as MountDetached does. What that does not know (other file systems, FUSE, several mounts
// one upon the other) is mounted in a mount namespace which ends at once: of it, too, nothing
// appears in the host's mount table, and it is gone when the file is closed.
func MountAny(mounts []mount.Mount) (*os.File, error) {
	f, err := MountDetached(mounts)
	if len(mounts) > 1 || errdefs.IsNotImplemented(err) {
		return mountApart(mounts)
	}
	return f, err
}

// apart is a folder of every Linux that holds nothing which a mount could need.
const apart = "/proc/tty"

func mountApart(mounts []mount.Mount) (f *os.File, err error) {
	for _, m := range mounts {
		n := 0
		for _, o := range m.Options {
			n += len(o) + 1
		}
		if n > maxApart {
			return nil, fmt.Errorf("mount %s: %d bytes of options: %w", m.Type, n, errdefs.ErrNotImplemented)
		}
	}
	ownthread.Run(func() {
		if err = unix.Unshare(unix.CLONE_NEWNS); err != nil {
			err = os.NewSyscallError("unshare", err)
			return
		}
		if err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			err = os.NewSyscallError("make mounts private", err)
			return
		}
		// The folder goes with the namespace, however this process ends.
		if err = unix.Mount("tmpfs", apart, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
			err = os.NewSyscallError("mount tmpfs on "+apart, err)
			return
		}
		// Not only when the thread has ended: the clone is then the last that holds the file systems.
		defer func() { _ = unix.Unmount(apart, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) }()
		dir := apart + "/mount"
		if err = os.Mkdir(dir, 0o700); err != nil {
			return
		}
		if err = mount.All(mounts, dir); err != nil {
			err = mountClass(err)
			return
		}
		fd, oerr := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
		if oerr != nil {
			err = os.NewSyscallError("open_tree", oerr)
			return
		}
		attr := unix.MountAttr{Attr_set: protect}
		if aerr := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); aerr != nil {
			unix.Close(fd)
			err = os.NewSyscallError("mount_setattr", aerr)
			return
		}
		f = os.NewFile(uintptr(fd), dir)
	})
	return f, err
}

// mountClass gives what the kernel said of a mount its class.
func mountClass(err error) error {
	for class, numbers := range map[error][]unix.Errno{
		errdefs.ErrNotImplemented:   {unix.ENODEV},
		errdefs.ErrNotFound:         {unix.ENOENT, unix.ENXIO},
		errdefs.ErrPermissionDenied: {unix.EPERM, unix.EACCES},
		errdefs.ErrInvalidArgument:  {unix.EINVAL, unix.ENOTDIR, unix.ENOTBLK, unix.ELOOP, unix.ENAMETOOLONG},
	} {
		for _, n := range numbers {
			if errors.Is(err, n) {
				return fmt.Errorf("%w: %w", err, class)
			}
		}
	}
	return err
}
