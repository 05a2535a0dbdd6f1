package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// maxTreeDepth bounds how deep a tree that is copied may be: every level keeps two
// descriptors open.
const maxTreeDepth = 1000

// copier copies a tree, whose contents are not to be trusted, entry by entry below
// open directories: no name with more than one element is ever looked up, and no
// link followed. Owners, modes, times, extended attributes, hard links, devices and
// holes are kept. Blocks are shared where the file system can.
type copier struct {
	ctx context.Context
	// merge makes it apply a layer in overlayfs's form to what is there.
	merge bool
	links map[inode]string // first name of an inode with several, below root
	root  *os.File         // of the copy
}

type inode struct{ dev, ino uint64 }

// copyTree makes to, which must not exist, a copy of the directory from.
func copyTree(ctx context.Context, from, to string) error {
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	return runCopier(ctx, from, to, false)
}

// applyDiff applies a layer's difference, with overlayfs's whiteouts, to a tree.
func applyDiff(ctx context.Context, diff, to string) error {
	return runCopier(ctx, diff, to, true)
}

func runCopier(ctx context.Context, from, to string, merge bool) error {
	src, err := os.OpenFile(from, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer dst.Close()
	c := &copier{ctx: ctx, merge: merge, links: map[inode]string{}, root: dst}
	if err := c.dir(src, dst, "", 0); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(src.Fd()), &st); err != nil {
		return err
	}
	if merge && st.Uid == 0 && st.Gid == 0 && st.Mode&0o7777 == 0o755 {
		return nil // the layer says nothing about its root: it stays as the parent's
	}
	return c.attributes(procPath(src), procPath(dst), &st)
}

// procPath names an open file for calls that take no descriptor.
func procPath(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

func (c *copier) dir(src, dst *os.File, name string, depth int) error {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	if depth > maxTreeDepth {
		return fmt.Errorf("directories are nested deeper than %d: %w", maxTreeDepth, errdefs.ErrInvalidArgument)
	}
	names, err := src.Readdirnames(-1)
	if err != nil {
		return err
	}
	if c.merge && isOpaque(src) {
		if err := removeEntries(dst); err != nil {
			return err
		}
	}
	for _, n := range names {
		if err := c.entry(src, dst, n, filepath.Join(name, n), depth); err != nil {
			return fmt.Errorf("%s: %w", n, err)
		}
	}
	return nil
}

func (c *copier) entry(src, dst *os.File, name, full string, depth int) error {
	var st unix.Stat_t
	if err := unix.Fstatat(int(src.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return os.NewSyscallError("fstatat", err)
	}
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	if c.merge {
		var have unix.Stat_t
		err := unix.Fstatat(int(dst.Fd()), name, &have, unix.AT_SYMLINK_NOFOLLOW)
		bothDirs := err == nil && isDir && have.Mode&unix.S_IFMT == unix.S_IFDIR
		if err == nil && !bothDirs {
			if err := os.RemoveAll(filepath.Join(procPath(dst), name)); err != nil {
				return err
			}
		}
		if isWhiteout(&st) {
			return nil
		}
	}
	if isDir {
		return c.subdir(src, dst, name, full, depth, &st)
	}
	if st.Nlink > 1 {
		k := inode{uint64(st.Dev), st.Ino}
		if first, ok := c.links[k]; ok {
			return os.NewSyscallError("linkat", unix.Linkat(int(c.root.Fd()), first, int(dst.Fd()), name, 0))
		}
		c.links[k] = full
	}
	if err := c.file(src, dst, name, &st); err != nil {
		return err
	}
	return c.attributes(filepath.Join(procPath(src), name), filepath.Join(procPath(dst), name), &st)
}

func (c *copier) subdir(src, dst *os.File, name, full string, depth int, st *unix.Stat_t) error {
	if err := unix.Mkdirat(int(dst.Fd()), name, 0o700); err != nil && !(c.merge && errors.Is(err, unix.EEXIST)) {
		return os.NewSyscallError("mkdirat", err)
	}
	s, err := openAt(src, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer s.Close()
	d, err := openAt(dst, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := c.dir(s, d, full, depth+1); err != nil {
		return err
	}
	return c.attributes(procPath(s), procPath(d), st)
}

func openAt(dir *os.File, name string, flags int, mode uint32) (*os.File, error) {
	fd, err := unix.Openat(int(dir.Fd()), name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
	if err != nil {
		return nil, os.NewSyscallError("openat", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// file makes anything but a directory.
func (c *copier) file(src, dst *os.File, name string, st *unix.Stat_t) error {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return c.regular(src, dst, name, st.Size)
	case unix.S_IFLNK:
		var buf [unix.PathMax]byte
		n, err := unix.Readlinkat(int(src.Fd()), name, buf[:])
		if err != nil {
			return os.NewSyscallError("readlinkat", err)
		}
		return os.NewSyscallError("symlinkat", unix.Symlinkat(string(buf[:n]), int(dst.Fd()), name))
	default:
		return os.NewSyscallError("mknodat", unix.Mknodat(int(dst.Fd()), name, st.Mode, int(st.Rdev)))
	}
}

func (c *copier) regular(src, dst *os.File, name string, size int64) error {
	s, err := openAt(src, name, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer s.Close()
	d, err := openAt(dst, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = copyData(c.ctx, s, d, size)
	return errors.Join(err, d.Close())
}

// copyData shares the blocks, or copies those that there are.
func copyData(ctx context.Context, s, d *os.File, size int64) error {
	if size == 0 || unix.IoctlFileClone(int(d.Fd()), int(s.Fd())) == nil {
		return nil
	}
	if err := d.Truncate(size); err != nil {
		return err
	}
	for pos := int64(0); pos < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		start, err := unix.Seek(int(s.Fd()), pos, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // only a hole is left
		}
		if err != nil {
			return os.NewSyscallError("lseek", err)
		}
		end, err := unix.Seek(int(s.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			return os.NewSyscallError("lseek", err)
		}
		if err := copyRange(s, d, start, end); err != nil {
			return err
		}
		pos = end
	}
	return nil
}

func copyRange(s, d *os.File, start, end int64) error {
	in, out := start, start
	for in < end {
		n, err := unix.CopyFileRange(int(s.Fd()), &in, int(d.Fd()), &out, int(min(end-in, 1<<30)), 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.EXDEV) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL) {
			_, err := io.Copy(io.NewOffsetWriter(d, in), io.NewSectionReader(s, in, end-in))
			return err
		}
		if err != nil {
			return os.NewSyscallError("copy_file_range", err)
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
	}
	return nil
}

// attributes copies owner, extended attributes, mode and times, in the order in which
// none undoes another. The last element of the paths is not followed unless it is an
// open file's.
func (c *copier) attributes(from, to string, st *unix.Stat_t) error {
	open := filepath.Dir(to) == "/proc/self/fd"
	isLink := st.Mode&unix.S_IFMT == unix.S_IFLNK
	chown, list, get, set := unix.Lchown, unix.Llistxattr, unix.Lgetxattr, unix.Lsetxattr
	flag := unix.AT_SYMLINK_NOFOLLOW
	if open {
		chown, list, get, set = unix.Chown, unix.Listxattr, unix.Getxattr, unix.Setxattr
		flag = 0
	}
	if err := chown(to, int(st.Uid), int(st.Gid)); err != nil {
		return os.NewSyscallError("chown", err)
	}
	keys, err := readXattrs(func(b []byte) (int, error) { return list(from, b) })
	if err != nil {
		return os.NewSyscallError("listxattr", err)
	}
	for k := range strings.SplitSeq(strings.TrimSuffix(string(keys), "\x00"), "\x00") {
		if k == "" || c.merge && slices.ContainsFunc(overlayPrefixes, func(p string) bool { return strings.HasPrefix(k, p) }) {
			continue
		}
		v, err := readXattrs(func(b []byte) (int, error) { return get(from, k, b) })
		if err == nil {
			err = set(to, k, v, 0)
		}
		if err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("extended attribute %s: %w", k, err)
		}
	}
	if !isLink {
		// Never a link: the mode was looked at, and nobody else changes the trees.
		if err := unix.Chmod(to, st.Mode&0o7777); err != nil {
			return os.NewSyscallError("chmod", err)
		}
	}
	times := []unix.Timespec{st.Atim, st.Mtim}
	return os.NewSyscallError("utimensat", unix.UtimesNanoAt(unix.AT_FDCWD, to, times, flag))
}

// readXattrs reads a value of unknown size.
func readXattrs(read func([]byte) (int, error)) ([]byte, error) {
	for {
		n, err := read(nil)
		if err != nil || n == 0 {
			if errors.Is(err, unix.EOPNOTSUPP) {
				err = nil
			}
			return nil, err
		}
		buf := make([]byte, n)
		n, err = read(buf)
		if errors.Is(err, unix.ERANGE) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return buf[:n], nil
	}
}

func removeEntries(dir *os.File) error {
	d, err := os.Open(procPath(dir))
	if err != nil {
		return err
	}
	names, err := d.Readdirnames(-1)
	d.Close()
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := os.RemoveAll(filepath.Join(procPath(dir), n)); err != nil {
			return err
		}
	}
	return nil
}
