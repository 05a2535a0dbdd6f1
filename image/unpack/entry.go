//go:build linux

package unpack

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const permissions = 0o7777

// file makes a regular file and fills it.
func (a *applier) file(dir int, base string, hdr *tar.Header) error {
	if a.size += hdr.Size; hdr.Size < 0 || a.size > a.o.Limits.Size || a.size < 0 {
		return fmt.Errorf("layer entry %q: files are larger than the limit: %w", hdr.Name, errdefs.ErrResourceExhausted)
	}
	perm := uint32(hdr.Mode) & permissions
	const flags = unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := create(dir, base, flags, perm&0o777)
	if errors.Is(err, unix.EEXIST) {
		if _, err := a.replace(dir, base); err != nil {
			return err
		}
		fd, err = create(dir, base, flags, perm&0o777)
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	sparse := isSparse(hdr)
	if sparse {
		err = a.fillSparse(fd, hdr.Size)
	} else {
		err = a.fill(fd, hdr.Size)
	}
	if err != nil {
		return err
	}
	a.res.Size += hdr.Size
	if !sparse {
		a.count(hdr.Size)
	}
	if a.o.Writeback && hdr.Size >= writebackFrom {
		// Advice: the sync at the end is what makes it durable.
		_ = unix.SyncFileRange(fd, 0, 0, unix.SYNC_FILE_RANGE_WRITE)
	}
	return a.attributes(fd, hdr, perm&^a.umask&0o777)
}

func create(dir int, base string, flags int, perm uint32) (int, error) {
	for {
		fd, err := unix.Openat(dir, base, flags, perm)
		if !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
}

func (a *applier) fill(fd int, size int64) error {
	for size > 0 {
		n, err := io.ReadFull(a.tr, a.buf[:min(size, int64(len(a.buf)))])
		if err != nil {
			return a.broken(err)
		}
		if err := writeAll(fd, a.buf[:n]); err != nil {
			return err
		}
		size -= int64(n)
	}
	return nil
}

// isSparse says whether the member was stored with holes (GNU's two formats).
func isSparse(hdr *tar.Header) bool {
	if hdr.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range hdr.PAXRecords {
		if strings.HasPrefix(k, sparsePrefix) {
			return true
		}
	}
	return false
}

// fillSparse leaves out pages of zeros.
func (a *applier) fillSparse(fd int, size int64) error {
	const page = 4096
	var off, written int64
	for off < size {
		if err := a.ctx.Err(); err != nil {
			return err
		}
		n, err := io.ReadFull(a.tr, a.buf[:min(size-off, int64(len(a.buf)))])
		if err != nil {
			return a.broken(err)
		}
		for b := a.buf[:n]; len(b) > 0; {
			run := min(page, len(b))
			data := !isZero(b[:run])
			for run < len(b) && !isZero(b[run:min(run+page, len(b))]) == data {
				run = min(run+page, len(b))
			}
			if data {
				if err := pwriteAll(fd, b[:run], off); err != nil {
					return err
				}
				written += int64(run)
			}
			off += int64(run)
			b = b[run:]
		}
	}
	a.count(written)
	return unix.Ftruncate(fd, size)
}

var zeros [4096]byte

func isZero(b []byte) bool {
	for len(b) > len(zeros) {
		if !bytes.Equal(b[:len(zeros)], zeros[:]) {
			return false
		}
		b = b[len(zeros):]
	}
	return bytes.Equal(b, zeros[:len(b)])
}

func writeAll(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

func pwriteAll(fd int, b []byte, off int64) error {
	for len(b) > 0 {
		n, err := unix.Pwrite(fd, b, off)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}

// directory makes a directory, or describes one that is there.
func (a *applier) directory(parent int, name, base string, hdr *tar.Header) error {
	perm := uint32(hdr.Mode) & permissions
	err := unix.Mkdirat(parent, base, perm&0o777)
	made := err == nil
	opaque := false
	if errors.Is(err, unix.EEXIST) {
		var st unix.Stat_t
		if err := unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			if opaque, err = a.replace(parent, base); err != nil {
				return err
			}
			if err := unix.Mkdirat(parent, base, perm&0o777); err != nil {
				return err
			}
			made = true
		}
	} else if err != nil {
		return err
	}
	fd, err := unix.Openat(parent, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	if opaque {
		// What lies below was removed by a whiteout of this layer before it made the directory anew.
		if err := unix.Fsetxattr(fd, opaqueXattr, []byte("y"), 0); err != nil {
			unix.Close(fd)
			return fmt.Errorf("mark opaque: %w", err)
		}
	}
	if !made {
		defer unix.Close(fd)
	} else {
		a.count(blockSize)
		a.dirs.put(name, fd) // entries below come next
	}
	return a.describe(name, fd, hdr)
}

// describe gives a directory the attributes of its entry; its time comes last.
func (a *applier) describe(name string, fd int, hdr *tar.Header) error {
	delete(a.missed, name)
	if _, ok := a.times[name]; !ok {
		if err := a.remember(name); err != nil {
			return err
		}
	}
	a.times[name] = timestamp(hdr.ModTime)
	a.setgid = a.setgid || hdr.Mode&unix.S_ISGID != 0
	return wrap(hdr.Name, a.owner(fd, hdr, math.MaxUint32))
}

// attributes sets owner, mode, extended attributes and times of an open file.
// has are the permissions that it has already.
func (a *applier) attributes(fd int, hdr *tar.Header, has uint32) error {
	if err := a.owner(fd, hdr, has); err != nil {
		return err
	}
	return futimens(fd, timestamp(hdr.ModTime))
}

func (a *applier) owner(fd int, hdr *tar.Header, has uint32) error {
	uid, gid, err := ids(hdr)
	if err != nil {
		return err
	}
	perm := uint32(hdr.Mode) & permissions
	if uid != 0 || gid != 0 || has == math.MaxUint32 || a.setgid {
		if err := unix.Fchown(fd, uid, gid); err != nil {
			return fmt.Errorf("chown to %d:%d: %w", uid, gid, err)
		}
	}
	// After chown, which clears setuid bits (chown(2)).
	if perm != has {
		if err := unix.Fchmod(fd, perm); err != nil {
			return fmt.Errorf("chmod to %#o: %w", perm, err)
		}
	}
	// After chown as well: it drops security.capability.
	kept, err := keptXattrs(hdr)
	if err != nil {
		return err
	}
	for _, attr := range kept {
		if err := unix.Fsetxattr(fd, attr, []byte(hdr.PAXRecords[xattrPrefix+attr]), 0); err != nil {
			if errors.Is(err, unix.EOPNOTSUPP) && attr != "security.capability" {
				continue
			}
			return fmt.Errorf("set attribute %s: %w", attr, err)
		}
	}
	return nil
}

// keptXattrs are the names of the extended attributes that an entry sets, in order.
func keptXattrs(hdr *tar.Header) (names []string, err error) {
	for key := range hdr.PAXRecords {
		attr, ok := strings.CutPrefix(key, xattrPrefix)
		if !ok {
			continue
		}
		keep, err := allowXattr(hdr.Name, attr)
		if err != nil {
			return nil, err
		}
		if keep {
			names = append(names, attr)
		}
	}
	slices.Sort(names)
	return names, nil
}

// allowXattr says which extended attributes an image may set. Those of overlayfs
// would redirect names inside the stack and are refused; labels of the machine that
// built the image (selinux, ima, acl) mean nothing here and are left out.
func allowXattr(name, attr string) (bool, error) {
	switch {
	case strings.HasPrefix(attr, "trusted."), strings.HasPrefix(attr, "user.overlay."):
		return false, refused(name, "extended attribute %q", attr)
	case attr == "security.capability", strings.HasPrefix(attr, "user."):
		return true, nil
	}
	return false, nil
}

func ids(hdr *tar.Header) (uid, gid int, err error) {
	const noID = math.MaxUint32 // (uid_t)-1: "leave as is" in chown(2)
	if hdr.Uid < 0 || int64(hdr.Uid) >= noID || hdr.Gid < 0 || int64(hdr.Gid) >= noID {
		return 0, 0, refused(hdr.Name, "owner %d:%d", hdr.Uid, hdr.Gid)
	}
	return hdr.Uid, hdr.Gid, nil
}

// timestamp gives ns since 1970, within what a file system keeps.
func timestamp(t time.Time) int64 {
	if t.IsZero() || t.Unix() < math.MinInt32 {
		return 0
	}
	if t.Unix() > 1<<33 {
		return 1 << 33 * int64(time.Second)
	}
	return t.UnixNano()
}

func (a *applier) symlink(dir int, base string, hdr *tar.Header) error {
	target := hdr.Linkname
	if target == "" || len(target) > maxName || strings.ContainsRune(target, 0) {
		return refused(hdr.Name, "target of the link")
	}
	err := unix.Symlinkat(target, dir, base)
	if errors.Is(err, unix.EEXIST) {
		if _, err := a.replace(dir, base); err != nil {
			return err
		}
		err = unix.Symlinkat(target, dir, base)
	}
	if err != nil {
		return err
	}
	uid, gid, err := ids(hdr)
	if err != nil {
		return err
	}
	if uid != 0 || gid != 0 || a.setgid {
		if err := unix.Fchownat(dir, base, uid, gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("chown to %d:%d: %w", uid, gid, err)
		}
	}
	a.count(0)
	return a.timesAt(dir, base, hdr)
}

func (a *applier) timesAt(dir int, base string, hdr *tar.Header) error {
	ts := unix.NsecToTimespec(timestamp(hdr.ModTime))
	return unix.UtimesNanoAt(dir, base, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
}

// link makes a hard link. What it links to has all the attributes already.
func (a *applier) link(name, dir, base string, hdr *tar.Header) error {
	target, err := cleanName(hdr.Linkname)
	if err != nil {
		return refused(hdr.Name, "hard link to %q", hdr.Linkname)
	}
	if target == name {
		return refused(hdr.Name, "hard link to itself")
	}
	if target == "." || strings.HasPrefix(name, target+"/") {
		return refused(hdr.Name, "hard link to directory %q", hdr.Linkname)
	}
	cached, err := a.dirs.get(path.Dir(target))
	if err != nil {
		return a.linkError(hdr, err)
	}
	// The next get may close what the cache holds.
	from, err := unix.FcntlInt(uintptr(cached), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return err
	}
	defer unix.Close(from)
	var st unix.Stat_t
	if err := unix.Fstatat(from, path.Base(target), &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return a.linkError(hdr, err)
	}
	switch {
	case st.Mode&unix.S_IFMT == unix.S_IFDIR:
		return refused(hdr.Name, "hard link to directory %q", hdr.Linkname)
	case isWhiteout(&st):
		return refused(hdr.Name, "hard link to %q, which the layer removes", hdr.Linkname)
	}
	fd, err := a.dirs.get(dir)
	if err != nil {
		return err
	}
	err = unix.Linkat(from, path.Base(target), fd, base, 0)
	if errors.Is(err, unix.EEXIST) {
		var old unix.Stat_t
		if err := unix.Fstatat(fd, base, &old, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		if old.Dev == st.Dev && old.Ino == st.Ino {
			return nil
		}
		if old.Mode&unix.S_IFMT == unix.S_IFDIR && strings.HasPrefix(target, name+"/") {
			return refused(hdr.Name, "hard link replaces the directory of its target")
		}
		if _, err := a.replace(fd, base); err != nil {
			return err
		}
		err = unix.Linkat(from, path.Base(target), fd, base, 0)
	}
	return a.linkError(hdr, err)
}

func (a *applier) linkError(hdr *tar.Header, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOENT) && a.o.Mode == Diff:
		return fmt.Errorf("layer entry %q: hard link to %q: %w", hdr.Name, hdr.Linkname, ErrNeedsParent)
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP), errors.Is(err, unix.EPERM):
		return refused(hdr.Name, "hard link to %q: %v", hdr.Linkname, err)
	}
	return err
}

// node makes a device or a FIFO.
func (a *applier) node(dir int, base string, hdr *tar.Header) error {
	perm := uint32(hdr.Mode) & permissions
	mode, dev := uint32(unix.S_IFIFO), uint64(0)
	if hdr.Typeflag != tar.TypeFifo {
		// The kernel's dev_t has 12 bits of major and 20 of minor number.
		if hdr.Devmajor < 0 || hdr.Devmajor >= 1<<12 || hdr.Devminor < 0 || hdr.Devminor >= 1<<20 {
			return refused(hdr.Name, "device %d:%d", hdr.Devmajor, hdr.Devminor)
		}
		mode, dev = unix.S_IFCHR, unix.Mkdev(uint32(hdr.Devmajor), uint32(hdr.Devminor))
		if hdr.Typeflag == tar.TypeBlock {
			mode = unix.S_IFBLK
		} else if dev == 0 {
			return refused(hdr.Name, "device 0:0 would remove a name from the layers below")
		}
	}
	err := unix.Mknodat(dir, base, mode|perm&0o777, int(dev))
	if errors.Is(err, unix.EEXIST) {
		if _, err := a.replace(dir, base); err != nil {
			return err
		}
		err = unix.Mknodat(dir, base, mode|perm&0o777, int(dev))
	}
	if err != nil {
		return err
	}
	uid, gid, err := ids(hdr)
	if err != nil {
		return err
	}
	if err := unix.Fchownat(dir, base, uid, gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("chown to %d:%d: %w", uid, gid, err)
	}
	if perm&^a.umask&0o777 != perm {
		if err := chmodNode(dir, base, perm); err != nil {
			return fmt.Errorf("chmod to %#o: %w", perm, err)
		}
	}
	a.count(0)
	return a.timesAt(dir, base, hdr)
}

// chmodNode changes what the name is now, and never what a link points to. fchmodat(2)
// cannot do that, and opening a device for real would have effects.
func chmodNode(dir int, base string, perm uint32) error {
	fd, err := unix.Openat(dir, base, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		return unix.ELOOP
	}
	return unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), perm)
}
