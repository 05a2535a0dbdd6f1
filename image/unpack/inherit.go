//go:build linux

package unpack

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Inherit gives the directories that a layer did not describe (Result.Implicit) the
// attributes that the layers below show there, because in an overlay the topmost
// directory decides. lowers are the layers below, the topmost first. A directory that
// none of them has stays as it is. If one of them has something else there, the layer
// cannot stand alone: ErrNeedsParent.
func Inherit(root *os.File, implicit []string, lowers []*os.File) error {
	if len(lowers) == 0 {
		return nil
	}
	for _, name := range implicit {
		if err := inherit(root, name, lowers); err != nil {
			return classify(wrap(name, err))
		}
	}
	return nil
}

func inherit(root *os.File, name string, lowers []*os.File) error {
	from, err := lowerDir(name, lowers)
	if err != nil || from < 0 {
		return err
	}
	defer unix.Close(from)
	to, err := openat2(int(root.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_NONBLOCK,
		unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS|unix.RESOLVE_NO_MAGICLINKS)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil // the layer removed it again
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENOTDIR):
		// Reached through a link of this layer: the layers below may have another directory in mind.
		return fmt.Errorf("reached through a link: %w", ErrNeedsParent)
	case err != nil:
		return err
	}
	defer unix.Close(to)
	return copyAttributes(from, to)
}

// lowerDir opens the directory that the stack of layers shows under a name, -1 if none.
func lowerDir(name string, lowers []*os.File) (int, error) {
	var level []int
	defer func() {
		for _, fd := range level {
			unix.Close(fd)
		}
	}()
	for _, l := range lowers {
		fd, err := unix.FcntlInt(l.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return -1, err
		}
		level = append(level, fd)
	}
	elems := strings.Split(name, "/")
	if name == "." {
		elems = nil
	}
	for _, elem := range elems {
		next, err := descend(level, elem)
		for _, fd := range level {
			unix.Close(fd)
		}
		level = next
		if err != nil || len(level) == 0 {
			return -1, err
		}
	}
	return unix.FcntlInt(uintptr(level[0]), unix.F_DUPFD_CLOEXEC, 3)
}

// descend opens elem in each layer of a merged directory, as overlayfs merges: down to
// the first layer that hides those below.
func descend(level []int, elem string) (next []int, err error) {
	for _, dir := range level {
		var st unix.Stat_t
		err := unix.Fstatat(dir, elem, &st, unix.AT_SYMLINK_NOFOLLOW)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return next, err
		}
		if isWhiteout(&st) {
			return next, nil
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			if len(next) == 0 {
				return nil, fmt.Errorf("%s is not a directory in a layer below: %w", elem, ErrNeedsParent)
			}
			return next, nil
		}
		fd, err := openChild(dir, elem)
		if err != nil {
			return next, err
		}
		next = append(next, fd)
		var b [1]byte
		if n, err := unix.Fgetxattr(fd, opaqueXattr, b[:]); err == nil && n == 1 && b[0] == 'y' {
			return next, nil
		}
	}
	return next, nil
}

func copyAttributes(from, to int) error {
	var st unix.Stat_t
	if err := unix.Fstat(from, &st); err != nil {
		return err
	}
	if err := unix.Fchown(to, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := unix.Fchmod(to, st.Mode&permissions); err != nil {
		return err
	}
	names, err := listXattr(from)
	if err != nil {
		return err
	}
	for _, attr := range names {
		if keep, err := allowXattr("", attr); err != nil || !keep {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Fgetxattr(from, attr, value)
		if err != nil {
			return err
		}
		if err := unix.Fsetxattr(to, attr, value[:n], 0); err != nil {
			return err
		}
	}
	return futimens(to, unix.TimespecToNsec(st.Mtim))
}

func listXattr(fd int) ([]string, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Flistxattr(fd, buf)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if name != "" {
			names = append(names, name)
		}
	}
	return names, nil
}
