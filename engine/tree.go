//go:build linux

package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/safepath"
)

// maxDepth bounds how deep a tree is walked: one descriptor is open per level, and
// the tree may be hostile.
const maxDepth = 512

// entry is one name in a directory that is being walked. It is reached only through
// the descriptor of its directory, and links are never followed.
type entry struct {
	dir  *os.File // open O_RDONLY or O_PATH
	name string
	rel  string // path from the walk's root, "." for itself
	stat unix.Stat_t
}

func (n *entry) isDir() bool { return n.stat.Mode&unix.S_IFMT == unix.S_IFDIR }

// open opens the entry with O_NOFOLLOW.
func (n *entry) open(flags int) (*os.File, error) {
	fd, err := unix.Openat(int(n.dir.Fd()), n.name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &os.PathError{Op: "openat", Path: n.rel, Err: err}
	}
	return os.NewFile(uintptr(fd), n.rel), nil
}

// readlink reads the target of a symbolic link.
func (n *entry) readlink() (string, error) {
	buf := make([]byte, unix.PathMax)
	c, err := unix.Readlinkat(int(n.dir.Fd()), n.name, buf)
	if err != nil {
		return "", &os.PathError{Op: "readlinkat", Path: n.rel, Err: err}
	}
	return string(buf[:c]), nil
}

// errSkipDir makes walk not enter a directory.
var errSkipDir = errors.New("skip this directory")

// walk calls visit for everything below dir, parents first, names sorted. What
// vanishes meanwhile is passed over.
func walk(ctx context.Context, dir *os.File, rel string, visit func(*entry) error) error {
	return walkDepth(ctx, dir, rel, visit, 0)
}

func walkDepth(ctx context.Context, dir *os.File, rel string, visit func(*entry) error, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("%s: more than %d directories deep", rel, maxDepth)
	}
	names, err := readNames(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		n := &entry{dir: dir, name: name, rel: name}
		if rel != "." && rel != "" {
			n.rel = rel + "/" + name
		}
		if err := unix.Fstatat(int(dir.Fd()), name, &n.stat, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			if errors.Is(err, unix.ENOENT) {
				continue
			}
			return &os.PathError{Op: "fstatat", Path: n.rel, Err: err}
		}
		err := visit(n)
		switch {
		case errors.Is(err, errSkipDir):
			continue
		case err != nil:
			return err
		case !n.isDir():
			continue
		}
		sub, err := n.open(unix.O_RDONLY | unix.O_DIRECTORY)
		if err != nil {
			if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
				continue // replaced since it was looked at
			}
			return err
		}
		err = walkDepth(ctx, sub, n.rel, visit, depth+1)
		sub.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// readNames lists a directory, sorted. The descriptor may be O_PATH.
func readNames(dir *os.File) ([]string, error) {
	fd, err := unix.Openat(int(dir.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir.Name(), Err: err}
	}
	f := os.NewFile(uintptr(fd), dir.Name())
	defer f.Close()
	names, err := f.Readdirnames(-1)
	slices.Sort(names)
	return names, err
}

// treeSize sums the sizes of a tree on the host, in bytes, counting hard links once.
func treeSize(path string) (int64, error) {
	root, err := safepath.OpenRoot(path)
	if err != nil {
		return 0, err
	}
	defer root.Close()
	return sizeBelow(context.Background(), root)
}

func sizeBelow(ctx context.Context, root *safepath.Root) (int64, error) {
	dir, err := root.Open("/", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return 0, err
	}
	defer dir.Close()
	var total int64
	seen := map[[2]uint64]bool{}
	err = walk(ctx, dir, ".", func(n *entry) error {
		if n.stat.Nlink > 1 && !n.isDir() {
			key := [2]uint64{uint64(n.stat.Dev), n.stat.Ino}
			if seen[key] {
				return nil
			}
			seen[key] = true
		}
		total += n.stat.Size
		return nil
	})
	return total, err
}

// copyTree copies what lies in src into the empty directory dst, with owners, modes,
// times, extended attributes and hard links.
func copyTree(ctx context.Context, src, dst *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(src.Fd()), &st); err != nil {
		return err
	}
	links := map[[2]uint64]linkTarget{}
	defer func() {
		for _, l := range links {
			l.dir.Close()
		}
	}()
	if err := copyDir(ctx, src, dst, links, 0); err != nil {
		return err
	}
	return setAttributes(dst, &st)
}

// linkTarget is where the first name of a hard link was copied to.
type linkTarget struct {
	dir  *os.File
	name string
}

func copyDir(ctx context.Context, src, dst *os.File, links map[[2]uint64]linkTarget, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("%s: more than %d directories deep", src.Name(), maxDepth)
	}
	names, err := readNames(src)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		n := &entry{dir: src, name: name, rel: name}
		if err := unix.Fstatat(int(src.Fd()), name, &n.stat, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return &os.PathError{Op: "fstatat", Path: name, Err: err}
		}
		if err := copyEntry(ctx, n, dst, links, depth); err != nil {
			return fmt.Errorf("copy %s: %w", name, err)
		}
	}
	return nil
}

func copyEntry(ctx context.Context, n *entry, dst *os.File, links map[[2]uint64]linkTarget, depth int) error {
	dfd := int(dst.Fd())
	if n.stat.Nlink > 1 && !n.isDir() {
		key := [2]uint64{uint64(n.stat.Dev), n.stat.Ino}
		if first, ok := links[key]; ok {
			return unix.Linkat(int(first.dir.Fd()), first.name, dfd, n.name, 0)
		}
		if dup, err := unix.Openat(dfd, ".", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err == nil && len(links) < 1<<16 {
			if len(links) < 256 { // one descriptor each: more links than that are copied
				links[key] = linkTarget{os.NewFile(uintptr(dup), "."), n.name}
			} else {
				unix.Close(dup)
			}
		}
	}
	switch n.stat.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if err := unix.Mkdirat(dfd, n.name, 0o700); err != nil {
			return err
		}
		from, err := n.open(unix.O_RDONLY | unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		defer from.Close()
		to, err := (&entry{dir: dst, name: n.name, rel: n.rel}).open(unix.O_RDONLY | unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		defer to.Close()
		if err := copyDir(ctx, from, to, links, depth+1); err != nil {
			return err
		}
		copyXattrs(from, to)
		return setAttributes(to, &n.stat)
	case unix.S_IFREG:
		from, err := n.open(unix.O_RDONLY)
		if err != nil {
			return err
		}
		defer from.Close()
		fd, err := unix.Openat(dfd, n.name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return err
		}
		to := os.NewFile(uintptr(fd), n.rel)
		defer to.Close()
		if _, err := io.Copy(to, from); err != nil {
			return err
		}
		copyXattrs(from, to)
		return setAttributes(to, &n.stat)
	case unix.S_IFLNK:
		target, err := n.readlink()
		if err != nil {
			return err
		}
		if err := unix.Symlinkat(target, dfd, n.name); err != nil {
			return err
		}
	case unix.S_IFCHR, unix.S_IFBLK, unix.S_IFIFO, unix.S_IFSOCK:
		if err := unix.Mknodat(dfd, n.name, n.stat.Mode, int(n.stat.Rdev)); err != nil {
			return err
		}
	default:
		return nil
	}
	if err := unix.Fchownat(dfd, n.name, int(n.stat.Uid), int(n.stat.Gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	ts := []unix.Timespec{n.stat.Atim, n.stat.Mtim}
	return unix.UtimesNanoAt(dfd, n.name, ts, unix.AT_SYMLINK_NOFOLLOW)
}

// setAttributes gives an open file the owner, mode and times of another. The owner
// first: chown clears the set-user-id bit.
func setAttributes(f *os.File, st *unix.Stat_t) error {
	fd := int(f.Fd())
	if err := unix.Fchown(fd, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := unix.Fchmod(fd, st.Mode&0o7777); err != nil {
		return err
	}
	// By the descriptor: an empty path is not known to utimensat(2) of all kernels.
	ts := []unix.Timespec{st.Atim, st.Mtim}
	return unix.UtimesNanoAt(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), ts, 0)
}

// copyXattrs copies what extended attributes it can: file systems differ in what
// they hold.
func copyXattrs(from, to *os.File) {
	buf := make([]byte, 64<<10)
	n, err := unix.Flistxattr(int(from.Fd()), buf)
	if err != nil || n <= 0 {
		return
	}
	val := make([]byte, 64<<10)
	for _, name := range splitNUL(buf[:n]) {
		if c, err := unix.Fgetxattr(int(from.Fd()), name, val); err == nil {
			_ = unix.Fsetxattr(int(to.Fd()), name, val[:c], 0)
		}
	}
}

func splitNUL(b []byte) []string {
	var out []string
	start := 0
	for i, c := range b {
		if c == 0 {
			if i > start {
				out = append(out, string(b[start:i]))
			}
			start = i + 1
		}
	}
	return out
}
