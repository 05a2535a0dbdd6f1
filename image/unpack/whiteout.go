//go:build linux

package unpack

import (
	"archive/tar"
	"errors"
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// whiteout applies an entry whose name starts with ".wh.".
func (a *applier) whiteout(hdr *tar.Header, dir, base string) error {
	if base == opaqueMarker {
		return wrap(hdr.Name, a.opaque(hdr, dir))
	}
	if strings.HasPrefix(base, whiteout+whiteout) {
		return nil // aufs's own bookkeeping
	}
	hidden := strings.TrimPrefix(base, whiteout)
	if hidden == "" || hidden == "." || hidden == ".." {
		return refused(hdr.Name, "whiteout of %q", hidden)
	}
	if a.o.Mode == Base {
		return nil
	}
	fd, err := a.parent(dir, hdr.Name)
	if err != nil {
		return err
	}
	if a.o.Mode == Merged {
		return wrap(hdr.Name, a.removeLower(fd, path.Join(dir, hidden), hidden))
	}
	err = unix.Mknodat(fd, hidden, unix.S_IFCHR, 0)
	if errors.Is(err, unix.EEXIST) {
		// The layer has it as well: only what is below is hidden.
		err = a.markOpaque(fd, hidden)
	}
	return wrap(hdr.Name, err)
}

// opaque hides everything that the layers below have in a directory.
func (a *applier) opaque(hdr *tar.Header, dir string) error {
	if a.o.Mode == Base {
		return nil
	}
	if a.o.Mode == Diff && dir == "." {
		// overlayfs does not look for the marker on the root of a layer.
		return fmt.Errorf("layer entry %q: %w", hdr.Name, ErrNeedsParent)
	}
	fd, err := a.parent(dir, hdr.Name)
	if err != nil {
		return err
	}
	if a.o.Mode == Merged {
		return a.clearLower(fd, dir, 0)
	}
	if err := unix.Fsetxattr(fd, opaqueXattr, []byte("y"), 0); err != nil {
		return fmt.Errorf("mark opaque: %w", err)
	}
	return nil
}

// markOpaque marks base if it is a directory.
func (a *applier) markOpaque(dir int, base string) error {
	fd, err := unix.Openat(dir, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Fsetxattr(fd, opaqueXattr, []byte("y"), 0); err != nil {
		return fmt.Errorf("mark opaque: %w", err)
	}
	return nil
}

// replace makes room for an entry, whatever has its name. It says whether that was a
// whiteout of the same layer.
func (a *applier) replace(dir int, base string) (hidden bool, err error) {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return false, err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		a.stale = true
		return false, removeTree(dir, base, 0)
	case unix.S_IFLNK:
		a.stale = true
	}
	return isWhiteout(&st), unix.Unlinkat(dir, base, 0)
}

func isWhiteout(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}

// removeLower removes what the layers below have under a name, and leaves what this
// layer made (OCI image layer specification: whiteouts hide lower layers only).
func (a *applier) removeLower(dir int, name, base string) error {
	if !a.isMade(name) {
		a.stale = true
		err := removeTree(dir, base, 0)
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return err
	}
	fd, err := openChild(dir, base)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return a.clearLower(fd, name, 0)
}

// clearLower empties a directory of everything that this layer did not make.
func (a *applier) clearLower(fd int, name string, level int) error {
	if level > maxDepth {
		return fmt.Errorf("directories nested deeper than %d: %w", maxDepth, errdefs.ErrInvalidArgument)
	}
	names, err := list(fd)
	if err != nil {
		return err
	}
	for _, base := range names {
		full := path.Join(name, base)
		if !a.isMade(full) {
			a.stale = true
			if err := removeTree(fd, base, level); err != nil {
				return err
			}
			continue
		}
		child, err := openChild(fd, base)
		if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			continue
		}
		if err == nil {
			err = a.clearLower(child, full, level+1)
			unix.Close(child)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// maxDepth is more than a name of PATH_MAX can have.
const maxDepth = maxName / 2

// removeTree removes base and, without following anything, all that is in it.
func removeTree(dir int, base string, level int) error {
	if level > maxDepth {
		return fmt.Errorf("directories nested deeper than %d: %w", maxDepth, errdefs.ErrInvalidArgument)
	}
	err := unix.Unlinkat(dir, base, 0)
	if err == nil || !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM) {
		return err
	}
	fd, err := openChild(dir, base)
	if err != nil {
		return err
	}
	names, err := list(fd)
	for _, n := range names {
		if err == nil {
			err = removeTree(fd, n, level+1)
		}
	}
	unix.Close(fd)
	if err != nil {
		return err
	}
	return unix.Unlinkat(dir, base, unix.AT_REMOVEDIR)
}

func openChild(dir int, base string) (int, error) {
	return unix.Openat(dir, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
}

// list gives the names in an open directory, from its start.
func list(fd int) ([]string, error) {
	if _, err := unix.Seek(fd, 0, unix.SEEK_SET); err != nil {
		return nil, err
	}
	var names []string
	buf := make([]byte, 16<<10)
	for {
		n, err := unix.ReadDirent(fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return names, err
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
}
