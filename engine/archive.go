//go:build linux

package engine

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/safepath"
)

// openFiles opens the file system of a container: the live one if it runs, volumes
// included, otherwise its snapshot, or the volume that the path lies in. inside is the
// path below root. done releases everything.
func (e *Engine) openFiles(ctx context.Context, c *container, p string, write bool) (root *safepath.Root, inside string, done func(), err error) {
	inside = path.Clean("/" + p)
	c.mu.Lock()
	r := c.run
	c.mu.Unlock()
	pid, ended := 0, (<-chan struct{})(nil)
	switch {
	case c.guest != nil:
		pid, ended = c.guest.rooted()
	case r != nil:
		pid, ended = int(r.pid.Load()), r.exited
	}
	if pid != 0 {
		if root, err = openProcessRoot(pid); err == nil {
			// The pid may have ended, and be another process's by now.
			c.mu.Lock()
			same := c.run == r
			c.mu.Unlock()
			select {
			case <-ended:
				same = false
			default:
			}
			if same {
				return root, inside, func() { root.Close() }, nil
			}
			root.Close()
		}
	}
	release := func() {}
	switch { // no start may mount the layer a second time meanwhile
	case write && c.guest != nil:
		if release, err = e.holdRoot(ctx, c.guest.key()); err != nil {
			return nil, "", nil, err
		}
		if g := e.newGuest(c.guest.namespace, c.guest.rec); g.t != c.guest.t { // there is another task since it was looked at
			release()
			return e.openFiles(ctx, e.guestContainer(ctx, g), p, write)
		} else if pid, _ := g.rooted(); pid != 0 {
			release()
			return nil, "", nil, conflictf("container %s is just ending: try again", c.id)
		}
	case write:
		if err := c.acquire(ctx); err != nil {
			return nil, "", nil, err
		}
		release = c.release
		if c.status() == StatusRunning {
			release()
			return e.openFiles(ctx, c, p, write)
		}
	}
	v := c.view()
	if m, rest := mountAt(v.Mounts, inside); m != nil {
		if write && m.ReadOnly {
			release()
			return nil, "", nil, invalidf("mounted volume is marked read-only")
		}
		user := "copy " + newID()
		drop, err := e.holdVolumes(ctx, []Mount{*m}, user)
		if err != nil {
			release()
			return nil, "", nil, err
		}
		unmount := func() {
			if err := drop(context.WithoutCancel(ctx)); err != nil {
				e.log.Error("unmount volume", "volume", m.Source, "error", err)
			}
		}
		if root, err = safepath.OpenRoot(m.Resolved); err == nil {
			return root, rest, func() { root.Close(); unmount(); release() }, nil
		}
		unmount()
	}
	if write && v.Config.ReadonlyRootfs {
		release()
		return nil, "", nil, invalidf("container rootfs is marked read-only")
	}
	if root, err = e.openSnapshot(e.snapshotNamespace(ctx, c), v, write); err != nil {
		release()
		return nil, "", nil, err
	}
	return root, inside, func() { root.Close(); release() }, nil
}

// mountAt finds the bind or volume that a path of a stopped container lies in, and the
// path inside it.
func mountAt(mounts []Mount, p string) (found *Mount, rest string) {
	for i, m := range mounts {
		if m.Kind == MountTmpfs || m.Resolved == "" || m.Subpath != "" {
			continue
		}
		if r, ok := strings.CutPrefix(p, m.Target); ok && (r == "" || r[0] == '/') && (found == nil || len(m.Target) > len(found.Target)) {
			if fi, err := os.Stat(m.Resolved); err == nil && fi.IsDir() {
				found, rest = &mounts[i], path.Clean("/"+r)
			}
		}
	}
	return found, rest
}

// followsLast tells whether a path asks for what its last element points to.
func followsLast(p string) bool {
	return strings.HasSuffix(p, "/") || strings.HasSuffix(p, "/.") || p == "."
}

// openAt opens a path O_PATH, without following a link in its last element unless the
// path asks for that.
func openAt(root *safepath.Root, inside, asked string) (*os.File, unix.Stat_t, error) {
	var st unix.Stat_t
	flags := unix.O_PATH
	if !followsLast(asked) {
		flags |= unix.O_NOFOLLOW
	}
	f, err := root.Open(inside, flags, 0)
	if err != nil {
		return nil, st, err
	}
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, st, err
	}
	return f, st, nil
}

func pathError(err error, ref, p string) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), isNotDir(err), errors.Is(err, unix.ELOOP):
		return notFoundf("Could not find the file %s in container %s", p, ref)
	}
	return fmt.Errorf("path %s in container %s: %w", p, ref, err)
}

// StatPath describes a path in a container.
func (e *Engine) StatPath(ctx context.Context, ref, p string) (PathStat, error) {
	c, err := e.find(ctx, ref)
	if err != nil {
		return PathStat{}, err
	}
	root, inside, done, err := e.openFiles(ctx, c, p, false)
	if err != nil {
		return PathStat{}, err
	}
	defer done()
	f, st, err := openAt(root, inside, p)
	if err != nil {
		return PathStat{}, pathError(err, ref, p)
	}
	defer f.Close()
	return pathStat(f, st, p)
}

func pathStat(f *os.File, st unix.Stat_t, p string) (PathStat, error) {
	out := PathStat{
		Name: path.Base(path.Clean("/" + p)), Size: st.Size, Mode: uint32(fileMode(st.Mode)),
		Mtime: time.Unix(st.Mtim.Unix()),
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		buf := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(int(f.Fd()), "", buf)
		if err != nil {
			return out, err
		}
		out.LinkTarget = string(buf[:n])
		if !path.IsAbs(out.LinkTarget) {
			out.LinkTarget = path.Join(path.Dir(path.Clean("/"+p)), out.LinkTarget)
		}
	}
	return out, nil
}

// fileMode turns st_mode into Go's.
func fileMode(m uint32) fs.FileMode {
	mode := fs.FileMode(m & 0o777)
	for _, b := range []struct {
		bit uint32
		go_ fs.FileMode
	}{{unix.S_ISUID, fs.ModeSetuid}, {unix.S_ISGID, fs.ModeSetgid}, {unix.S_ISVTX, fs.ModeSticky}} {
		if m&b.bit != 0 {
			mode |= b.go_
		}
	}
	switch m & unix.S_IFMT {
	case unix.S_IFDIR:
		mode |= fs.ModeDir
	case unix.S_IFLNK:
		mode |= fs.ModeSymlink
	case unix.S_IFIFO:
		mode |= fs.ModeNamedPipe
	case unix.S_IFSOCK:
		mode |= fs.ModeSocket
	case unix.S_IFCHR:
		mode |= fs.ModeDevice | fs.ModeCharDevice
	case unix.S_IFBLK:
		mode |= fs.ModeDevice
	}
	return mode
}

// GetArchive gives a path of a container as a tar stream. The caller closes it.
func (e *Engine) GetArchive(ctx context.Context, ref, p string) (io.ReadCloser, PathStat, error) {
	c, err := e.find(ctx, ref)
	if err != nil {
		return nil, PathStat{}, err
	}
	r, ps, err := e.getArchive(ctx, c, ref, p, false)
	if err != nil {
		return nil, ps, err
	}
	e.emit(c, "archive-path")
	return r, ps, nil
}

// Export writes the whole file system of a container as a tar stream, without what is
// mounted into it.
func (e *Engine) Export(ctx context.Context, ref string, out io.Writer) error {
	c, err := e.find(ctx, ref)
	if err != nil {
		return err
	}
	root, err := e.openSnapshot(e.snapshotNamespace(ctx, c), c.view(), false)
	if err != nil {
		return err
	}
	defer root.Close()
	f, _, err := openAt(root, "/", "/")
	if err != nil {
		return err
	}
	defer f.Close()
	w := tarWriter{tw: tar.NewWriter(out), links: map[[2]uint64]string{}}
	if err := w.below(ctx, f, ""); err != nil {
		return fmt.Errorf("export container %s: %w", ref, err)
	}
	if err := w.tw.Close(); err != nil {
		return fmt.Errorf("export container %s: %w", ref, err)
	}
	e.emit(c, "export")
	return nil
}

// tarWriter writes trees that it reaches only through descriptors.
type tarWriter struct {
	tw    *tar.Writer
	links map[[2]uint64]string // device and inode → first name
}

// tree writes one object, with what is below it if it is a directory.
func (w *tarWriter) tree(ctx context.Context, f *os.File, st unix.Stat_t, name string) error {
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return w.object(st, name, func() (*os.File, error) { return safepath.Reopen(f, unix.O_RDONLY|unix.O_NONBLOCK) }, func() (string, error) {
			buf := make([]byte, unix.PathMax)
			n, err := unix.Readlinkat(int(f.Fd()), "", buf)
			return string(buf[:max(n, 0)]), err
		})
	}
	if err := w.object(st, name, nil, nil); err != nil {
		return err
	}
	if name == "." {
		name = ""
	}
	return w.below(ctx, f, name)
}

// below writes what a directory holds. Kernel file systems are left out: they have no end.
func (w *tarWriter) below(ctx context.Context, dir *os.File, prefix string) error {
	return walk(ctx, dir, ".", func(n *entry) error {
		name := path.Join(prefix, n.rel)
		if n.isDir() {
			sub, err := n.open(unix.O_RDONLY | unix.O_DIRECTORY)
			if err != nil {
				return errSkipDir // replaced since it was looked at
			}
			defer sub.Close()
			var sfs unix.Statfs_t
			if err := unix.Fstatfs(int(sub.Fd()), &sfs); err == nil && isKernelFS(int64(sfs.Type)) {
				if err := w.object(n.stat, name, nil, nil); err != nil {
					return err
				}
				return errSkipDir
			}
			return w.object(n.stat, name, nil, nil)
		}
		return w.object(n.stat, name, func() (*os.File, error) { return n.open(unix.O_RDONLY) }, n.readlink)
	})
}

func isKernelFS(magic int64) bool {
	switch magic {
	case unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC, unix.DEVPTS_SUPER_MAGIC:
		return true
	}
	return false
}

// fileXattrs gives the extended attributes of a file that an archive holds.
func fileXattrs(f *os.File) map[string]string {
	const name = "security.capability"
	buf := make([]byte, 64) // struct vfs_ns_cap_data has 24 bytes
	n, err := unix.Fgetxattr(int(f.Fd()), name, buf)
	if err != nil {
		return nil
	}
	return map[string]string{"SCHILY.xattr." + name: string(buf[:n])}
}

// object writes one header, and the content of a regular file.
func (w *tarWriter) object(st unix.Stat_t, name string, open func() (*os.File, error), link func() (string, error)) error {
	h := &tar.Header{
		Name: name, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid),
		ModTime: time.Unix(st.Mtim.Unix()), Format: tar.FormatPAX,
	}
	var content *os.File
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		h.Typeflag = tar.TypeDir
		h.Name = name + "/"
	case unix.S_IFREG:
		f, err := open()
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ELOOP) {
			return nil
		}
		if err != nil {
			return err
		}
		defer f.Close()
		// What was opened counts, not what was looked at.
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFREG {
			return nil
		}
		h.Typeflag, h.Size = tar.TypeReg, st.Size
		if st.Nlink > 1 {
			key := [2]uint64{uint64(st.Dev), st.Ino}
			if first, ok := w.links[key]; ok {
				h.Typeflag, h.Size, h.Linkname = tar.TypeLink, 0, first
			} else {
				w.links[key] = name
			}
		}
		if h.Typeflag == tar.TypeReg {
			content = f
			h.PAXRecords = fileXattrs(f)
		}
	case unix.S_IFLNK:
		target, err := link()
		if err != nil {
			return nil // gone since
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, target
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeChar
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(unix.Major(uint64(st.Rdev))), int64(unix.Minor(uint64(st.Rdev)))
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	default:
		return nil // sockets mean nothing in an archive
	}
	if err := w.tw.WriteHeader(h); err != nil {
		return err
	}
	if content == nil {
		return nil
	}
	n, err := io.Copy(w.tw, io.LimitReader(content, h.Size))
	if err != nil {
		return err
	}
	_, err = io.CopyN(w.tw, zeros{}, h.Size-n) // it became shorter meanwhile
	return err
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
