//go:build linux

// Package safepath reaches files below an untrusted directory tree (a container's
// root file system, an image layer, a volume) without ever following a path out
// of it.
//
// In flow a directory and names that an attacker may have chosen; out flow file
// descriptors. Symbolic links resolve as they would for a process that is chrooted
// into the directory (openat2(2) with RESOLVE_IN_ROOT), magic links of procfs are
// refused, and nothing is ever looked up twice.
package safepath

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// retries bounds how often a lookup is tried again when the kernel reports that
// the tree was renamed under it (EAGAIN, see openat2(2)).
const retries = 128

// Root is an open directory that names are resolved in.
type Root struct {
	f *os.File
}

// OpenRoot opens the directory at a trusted host path.
func OpenRoot(hostPath string) (*Root, error) {
	f, err := os.OpenFile(hostPath, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return &Root{f}, nil
}

// NewRoot makes a root of an open directory, and owns it from now on.
func NewRoot(dir *os.File) *Root { return &Root{dir} }

// Fd is the directory's descriptor, valid until Close.
func (r *Root) Fd() int { return int(r.f.Fd()) }

// Close releases the directory.
func (r *Root) Close() error { return r.f.Close() }

// Open opens name inside the root with the flags and mode of openat2(2).
// O_CLOEXEC is added. Errors are *fs.PathError.
func (r *Root) Open(name string, flags int, mode uint32) (*os.File, error) {
	return r.open(name, flags, mode, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_MAGICLINKS)
}

// OpenNoXdev is Open that does not cross a mount point.
func (r *Root) OpenNoXdev(name string, flags int, mode uint32) (*os.File, error) {
	return r.open(name, flags, mode, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_MAGICLINKS|unix.RESOLVE_NO_XDEV)
}

func (r *Root) open(name string, flags int, mode uint32, resolve uint64) (*os.File, error) {
	if strings.ContainsRune(name, 0) {
		return nil, &fs.PathError{Op: "openat2", Path: name, Err: unix.EINVAL}
	}
	if name == "" {
		name = "."
	}
	how := unix.OpenHow{Flags: uint64(flags) | unix.O_CLOEXEC, Resolve: resolve}
	if flags&unix.O_CREAT != 0 || flags&unix.O_TMPFILE == unix.O_TMPFILE {
		how.Mode = uint64(mode)
	}
	for i := 0; ; i++ {
		fd, err := unix.Openat2(r.Fd(), name, &how)
		switch {
		case err == nil:
			return os.NewFile(uintptr(fd), name), nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN) && i < retries:
		default:
			return nil, &fs.PathError{Op: "openat2", Path: name, Err: err}
		}
	}
}

// OpenParent opens the directory that holds name, with links in the directory part
// resolved, and gives the last element. It fails for a name without last element
// ("/", "..").
func (r *Root) OpenParent(name string) (dir *os.File, base string, err error) {
	clean := path.Clean("/" + name)
	base = path.Base(clean)
	if clean == "/" {
		return nil, "", &fs.PathError{Op: "openparent", Path: name, Err: unix.EINVAL}
	}
	dir, err = r.Open(path.Dir(clean), unix.O_PATH|unix.O_DIRECTORY, 0)
	return dir, base, err
}

// MkdirAll makes name and its missing parents and gives the directory, opened
// O_PATH. Links on the way are resolved inside the root; a dangling one is an error.
// made is called for each directory that was made, with its descriptor.
func (r *Root) MkdirAll(name string, mode uint32, made func(fd int) error) (*os.File, error) {
	clean := path.Clean("/" + name)
	if f, err := r.Open(clean, unix.O_PATH|unix.O_DIRECTORY, 0); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return f, err
	}
	cur, err := r.Open("/", unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	prefix := "/"
	for elem := range strings.SplitSeq(strings.TrimPrefix(clean, "/"), "/") {
		prefix = path.Join(prefix, elem)
		// Always from the root: an absolute link in the middle must not be resolved
		// against the directory that holds it.
		next, err := r.Open(prefix, unix.O_PATH|unix.O_DIRECTORY, 0)
		if errors.Is(err, fs.ErrNotExist) {
			merr := unix.Mkdirat(int(cur.Fd()), elem, mode)
			if merr != nil && !errors.Is(merr, unix.EEXIST) {
				cur.Close()
				return nil, &fs.PathError{Op: "mkdirat", Path: prefix, Err: merr}
			}
			next, err = r.Open(prefix, unix.O_PATH|unix.O_DIRECTORY, 0)
			if err == nil && merr == nil && made != nil {
				if err := made(int(next.Fd())); err != nil {
					cur.Close()
					next.Close()
					return nil, fmt.Errorf("prepare %s: %w", prefix, err)
				}
			}
		}
		cur.Close()
		if err != nil {
			return nil, err
		}
		cur = next
	}
	return cur, nil
}

// ReadFile reads a regular file of at most limit bytes. Anything else (a FIFO, a
// device, a longer file) is an error, without blocking.
func (r *Root) ReadFile(name string, limit int64) ([]byte, error) {
	f, err := r.Open(name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "read", Path: name, Err: errors.New("not a regular file")}
	}
	if st.Size() > limit {
		return nil, &fs.PathError{Op: "read", Path: name, Err: unix.EFBIG}
	}
	buf := make([]byte, 0, st.Size()+1)
	for {
		if len(buf) == cap(buf) {
			buf = append(buf, 0)[:len(buf)]
		}
		n, err := unix.Read(int(f.Fd()), buf[len(buf):cap(buf)])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, &fs.PathError{Op: "read", Path: name, Err: err}
		}
		if n == 0 {
			return buf, nil
		}
		if buf = buf[:len(buf)+n]; int64(len(buf)) > limit {
			return nil, &fs.PathError{Op: "read", Path: name, Err: unix.EFBIG}
		}
	}
}

// Reopen opens the file behind an O_PATH descriptor with other flags, without
// looking its name up again.
func Reopen(f *os.File, flags int) (*os.File, error) {
	return os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), flags|unix.O_CLOEXEC, 0)
}
