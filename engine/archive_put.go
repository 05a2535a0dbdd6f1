//go:build linux

package engine

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/safepath"
)

// PutArchive unpacks a tar stream (plain, gzip, bzip2 or zstd) into an existing
// directory of a container. Names in the archive cannot leave the directory, and links
// in the container resolve inside the container. No helper program is executed
// (CVE-2019-14271).
func (e *Engine) PutArchive(ctx context.Context, ref, p string, r io.Reader, o PutOptions) error {
	c, err := e.find(ctx, ref)
	if err != nil {
		return err
	}
	if err := e.putArchive(ctx, c, ref, p, r, o, nil); err != nil {
		return err
	}
	e.emit(c, "extract-to-dir")
	return nil
}

// decompress recognizes the compression of a stream by its first bytes.
func decompress(r io.Reader) (io.ReadCloser, error) {
	br := bufio.NewReaderSize(r, 64<<10)
	magic, err := br.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read archive: %w", err)
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(br)
		if err != nil {
			return nil, invalidf("archive: %v", err)
		}
		return z, nil
	case bytes.HasPrefix(magic, []byte("BZh")):
		return io.NopCloser(bzip2.NewReader(br)), nil
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(256<<20))
		if err != nil {
			return nil, invalidf("archive: %v", err)
		}
		return z.IOReadCloser(), nil
	case bytes.HasPrefix(magic, []byte{0xfd, '7', 'z', 'X', 'Z'}):
		return nil, invalidf("archive: xz is not supported here: send plain tar, gzip, bzip2 or zstd")
	}
	return io.NopCloser(br), nil
}

// extractor unpacks one archive. Every name is resolved from the root's descriptor.
type extractor struct {
	root     *safepath.Root
	base     string // directory in the root
	o        PutOptions
	uid, gid int // -1: the archive's
	dirs     []dirTime
}

// dirTime is a directory whose time is set at the end: what is put into it changes it.
type dirTime struct {
	name string
	h    *tar.Header
}

// dirTimes bounds how many of these are remembered.
const dirTimes = 1 << 16

func (x *extractor) extract(ctx context.Context, r io.Reader) error {
	tr := tar.NewReader(r)
	for {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return invalidf("archive: %v", err)
		}
		if err := x.one(h, tr); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
	}
	for i := len(x.dirs) - 1; i >= 0; i-- {
		d := x.dirs[i]
		if f, err := x.root.Open(d.name, unix.O_PATH|unix.O_DIRECTORY, 0); err == nil {
			setTimes(f, d.h)
			f.Close()
		}
	}
	return nil
}

// one makes one object.
func (x *extractor) one(h *tar.Header, content io.Reader) error {
	switch h.Typeflag {
	case tar.TypeXGlobalHeader:
		return nil
	case tar.TypeDir, tar.TypeReg, tar.TypeLink, tar.TypeSymlink, tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
	default:
		return invalidf("unhandled tar header type %q", h.Typeflag)
	}
	// A leading slash before cleaning: ".." cannot climb above it.
	name := path.Join(x.base, path.Clean("/"+h.Name))
	if name == path.Clean(x.base) {
		return nil // the directory itself stays as it is
	}
	parent, err := x.root.MkdirAll(path.Dir(name), 0o755, nil)
	if err != nil {
		return err
	}
	defer parent.Close()
	base := path.Base(name)
	pfd := int(parent.Fd())

	var old unix.Stat_t
	exists := unix.Fstatat(pfd, base, &old, unix.AT_SYMLINK_NOFOLLOW) == nil
	oldDir := exists && old.Mode&unix.S_IFMT == unix.S_IFDIR
	if exists && x.o.NoOverwriteDirNonDir {
		if oldDir && h.Typeflag != tar.TypeDir {
			return invalidf("cannot overwrite directory %q with non-directory %q", name, h.Name)
		}
		if !oldDir && h.Typeflag == tar.TypeDir {
			return invalidf("cannot overwrite non-directory %q with directory %q", name, h.Name)
		}
	}
	inPlace := false
	if exists && !(oldDir && h.Typeflag == tar.TypeDir) {
		err := removeAt(parent, base, oldDir)
		if inPlace = errors.Is(err, unix.EBUSY) && h.Typeflag == tar.TypeReg && !oldDir; err != nil && !inPlace {
			return err // EBUSY: a file that is mounted, such as /etc/hosts, is written in place
		}
	}
	perm := uint32(h.Mode & 0o7777)
	switch h.Typeflag {
	case tar.TypeDir:
		if !oldDir {
			if err := unix.Mkdirat(pfd, base, 0o700); err != nil {
				return &os.PathError{Op: "mkdirat", Path: name, Err: err}
			}
		}
		f, err := (&entry{dir: parent, name: base, rel: name}).open(unix.O_RDONLY | unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		defer f.Close()
		if len(x.dirs) < dirTimes {
			x.dirs = append(x.dirs, dirTime{name, h})
		}
		return x.finish(f, h, perm)
	case tar.TypeReg:
		flags := unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL
		if inPlace {
			flags = unix.O_WRONLY | unix.O_TRUNC
		}
		fd, err := unix.Openat(pfd, base, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0o600)
		if err != nil {
			return &os.PathError{Op: "openat", Path: name, Err: err}
		}
		f := os.NewFile(uintptr(fd), name)
		if _, err := io.Copy(f, content); err != nil {
			f.Close()
			return err
		}
		return errors.Join(x.finish(f, h, perm), f.Close())
	case tar.TypeLink:
		target, err := x.root.Open(path.Join(x.base, path.Clean("/"+h.Linkname)), unix.O_PATH|unix.O_NOFOLLOW, 0)
		if err != nil {
			return err
		}
		defer target.Close()
		return unix.Linkat(int(target.Fd()), "", pfd, base, unix.AT_EMPTY_PATH)
	case tar.TypeSymlink:
		if err := unix.Symlinkat(h.Linkname, pfd, base); err != nil {
			return &os.PathError{Op: "symlinkat", Path: name, Err: err}
		}
	default:
		mode := perm | map[byte]uint32{tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK, tar.TypeFifo: unix.S_IFIFO}[h.Typeflag]
		if err := unix.Mknodat(pfd, base, mode, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)))); err != nil {
			return &os.PathError{Op: "mknodat", Path: name, Err: err}
		}
	}
	uid, gid := x.owner(h)
	if err := unix.Fchownat(pfd, base, uid, gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	ts := timespecs(h)
	return unix.UtimesNanoAt(pfd, base, ts, unix.AT_SYMLINK_NOFOLLOW)
}

func (x *extractor) owner(h *tar.Header) (uid, gid int) {
	if x.uid >= 0 {
		return x.uid, x.gid
	}
	return h.Uid, h.Gid
}

// finish sets owner, mode, extended attributes and time of an open object.
func (x *extractor) finish(f *os.File, h *tar.Header, perm uint32) error {
	uid, gid := x.owner(h)
	if err := unix.Fchown(int(f.Fd()), uid, gid); err != nil {
		return err
	}
	if err := unix.Fchmod(int(f.Fd()), perm); err != nil {
		return err
	}
	for k, v := range h.PAXRecords {
		if name, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok && (name == "security.capability" || strings.HasPrefix(name, "user.")) {
			if err := unix.Fsetxattr(int(f.Fd()), name, []byte(v), 0); err != nil && !errors.Is(err, unix.ENOTSUP) {
				return fmt.Errorf("set %s: %w", name, err)
			}
		}
	}
	setTimes(f, h)
	return nil
}

func timespecs(h *tar.Header) []unix.Timespec {
	m := unix.NsecToTimespec(h.ModTime.UnixNano())
	a := m
	if !h.AccessTime.IsZero() {
		a = unix.NsecToTimespec(h.AccessTime.UnixNano())
	}
	return []unix.Timespec{a, m}
}

func setTimes(f *os.File, h *tar.Header) {
	_ = unix.UtimesNanoAt(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), timespecs(h), 0)
}

// removeAt removes a name below an open directory, with what is below it.
func removeAt(parent *os.File, name string, isDir bool) error {
	if !isDir {
		return unix.Unlinkat(int(parent.Fd()), name, 0)
	}
	return removeDirAt(parent, name, 0)
}

func removeDirAt(parent *os.File, name string, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("more than %d directories deep", maxDepth)
	}
	dir, err := (&entry{dir: parent, name: name, rel: name}).open(unix.O_RDONLY | unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer dir.Close()
	names, err := readNames(dir)
	if err != nil {
		return err
	}
	for _, n := range names {
		err := unix.Unlinkat(int(dir.Fd()), n, 0)
		if errors.Is(err, unix.EISDIR) {
			err = removeDirAt(dir, n, depth+1)
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return unix.Unlinkat(int(parent.Fd()), name, unix.AT_REMOVEDIR)
}
