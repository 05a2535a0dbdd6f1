package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// DiskUsage measures a directory tree: the space that its files take up on disk, hard
// links once, and the number of inodes, dir's own too. A container may be at work in it:
// directories are opened one below the other, and no link is followed.
func DiskUsage(ctx context.Context, dir string) (snapshots.Usage, error) {
	d, err := os.OpenFile(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return snapshots.Usage{}, err
	}
	m := meter{ctx: ctx, linked: map[inode]bool{}}
	var st unix.Stat_t
	if err := unix.Fstat(int(d.Fd()), &st); err != nil {
		d.Close()
		return snapshots.Usage{}, &os.PathError{Op: "fstat", Path: dir, Err: err}
	}
	m.used = snapshots.Usage{Inodes: 1, Size: st.Blocks * 512}
	err = m.dir(d, 0)
	return m.used, err
}

type meter struct {
	ctx    context.Context
	linked map[inode]bool
	used   snapshots.Usage
}

// dir closes d.
func (m *meter) dir(d *os.File, depth int) error {
	defer d.Close()
	if err := m.ctx.Err(); err != nil {
		return err
	}
	if depth > maxTreeDepth {
		return fmt.Errorf("directories are nested deeper than %d: %w", maxTreeDepth, errdefs.ErrInvalidArgument)
	}
	names, err := d.Readdirnames(-1)
	if err != nil && !errors.Is(err, unix.ENOENT) { // removed meanwhile
		return err
	}
	for _, n := range names {
		var st unix.Stat_t
		err := unix.Fstatat(int(d.Fd()), n, &st, unix.AT_SYMLINK_NOFOLLOW)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return &os.PathError{Op: "fstatat", Path: n, Err: err}
		}
		isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
		if !isDir && st.Nlink > 1 {
			k := inode{uint64(st.Dev), st.Ino}
			if m.linked[k] {
				continue
			}
			m.linked[k] = true
		}
		m.used.Inodes++
		m.used.Size += st.Blocks * 512
		if !isDir {
			continue
		}
		sub, err := openAt(d, n, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			continue // replaced meanwhile
		}
		if err != nil {
			return err
		}
		if err := m.dir(sub, depth+1); err != nil {
			return err
		}
	}
	return nil
}
