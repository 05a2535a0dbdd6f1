//go:build linux && (amd64 || arm64)

package criu

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/internal/classed"
)

// CRIU reads its images as root and believes them, and it follows whatever link lies under
// a name that it is about to write. So a directory of images has to be nobody else's, and
// hold files only.

// maxParents bounds the chain of earlier dumps, maxImages the files of each.
const (
	maxParents = 64
	maxImages  = 1 << 20
)

// parentLink is the one link in a directory of images: to those of the dump before.
const parentLink = "parent"

// MakeImages opens a directory to write images to. It is made if missing, for its owner
// alone. What is in it already must be files.
func MakeImages(path string) (*os.File, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("directory for images: %w", err)
	}
	return OpenImages(path)
}

// OpenImages opens a directory of images. That it is none, is a link, belongs to somebody
// else, or holds anything but plain files is errdefs.ErrInvalidArgument.
func OpenImages(path string) (*os.File, error) {
	f, err := openDir(unix.AT_FDCWD, path, unix.O_NOFOLLOW)
	if err != nil {
		return nil, fmt.Errorf("images: %w", err)
	}
	if err := check(f, maxParents); err != nil {
		f.Close()
		return nil, classed.As(errdefs.ErrInvalidArgument, fmt.Errorf("images in %s: %w", path, err))
	}
	return f, nil
}

// Reopen opens the directory at path again, in the mount namespace of the calling thread,
// and fails unless it is the one that is open already.
func Reopen(path string, dir *os.File) (*os.File, error) {
	f, err := openDir(unix.AT_FDCWD, path, unix.O_NOFOLLOW)
	if err != nil {
		return nil, err
	}
	a, err1 := dir.Stat()
	b, err2 := f.Stat()
	if err1 != nil || err2 != nil || !os.SameFile(a, b) {
		f.Close()
		return nil, errors.Join(fmt.Errorf("%s has been replaced", path), err1, err2)
	}
	return f, nil
}

func openDir(at int, path string, flags int) (*os.File, error) {
	fd, err := unix.Openat(at, path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC|flags, 0)
	switch {
	case err == nil:
		return os.NewFile(uintptr(fd), path), nil
	case err == unix.ENOTDIR || err == unix.ELOOP:
		return nil, classed.As(errdefs.ErrInvalidArgument, &fs.PathError{Op: "open directory, not through a link", Path: path, Err: err})
	}
	return nil, &fs.PathError{Op: "open", Path: path, Err: err}
}

func check(dir *os.File, depth int) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &st); err != nil {
		return err
	}
	if err := ours(&st); err != nil {
		return fmt.Errorf("the directory %w", err)
	}
	for n := 0; ; {
		entries, err := dir.ReadDir(1024)
		if n += len(entries); n > maxImages {
			return fmt.Errorf("more than %d files", maxImages)
		}
		for _, e := range entries {
			if err := checkEntry(dir, e.Name(), depth); err != nil {
				return fmt.Errorf("%.64q %w", e.Name(), err)
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// lazySocket is where `criu lazy-pages` listens, in the directory for work.
const lazySocket = "lazy-pages.socket"

func checkEntry(dir *os.File, name string, depth int) error {
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	switch t := st.Mode & unix.S_IFMT; {
	case t == unix.S_IFLNK && name == parentLink:
		return checkParent(dir, depth)
	case t == unix.S_IFSOCK && name == lazySocket:
		return ours(&st)
	case t != unix.S_IFREG:
		return errors.New("is no plain file")
	case st.Nlink > 1:
		return errors.New("has another name elsewhere (a hard link)")
	}
	return ours(&st)
}

// ours fails for what somebody else could change meanwhile.
func ours(st *unix.Stat_t) error {
	if int(st.Uid) != os.Geteuid() && st.Uid != 0 {
		return fmt.Errorf("belongs to user %d", st.Uid)
	}
	if st.Mode&0o022 != 0 {
		return fmt.Errorf("can be written by others (mode %#o)", st.Mode&0o777)
	}
	return nil
}

// checkParent follows the link to the earlier dump, through no other link.
func checkParent(dir *os.File, depth int) error {
	if depth == 0 {
		return fmt.Errorf("leads on for more than %d dumps", maxParents)
	}
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(dir.Fd()), parentLink, buf)
	if err != nil {
		return err
	}
	f, err := openParent(dir, string(buf[:n]))
	if err != nil {
		return err
	}
	defer f.Close()
	if err := check(f, depth-1); err != nil {
		return fmt.Errorf("leads to images where %w", err)
	}
	return nil
}

func openParent(dir *os.File, path string) (*os.File, error) {
	if path == "" || filepath.IsAbs(path) {
		return nil, classed.Errorf(errdefs.ErrInvalidArgument, "parent images %.64q: the path is not relative to the images", path)
	}
	fd, err := unix.Openat2(int(dir.Fd()), path, &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return nil, classed.As(errdefs.ErrInvalidArgument, &fs.PathError{Op: "open parent images", Path: path, Err: err})
	}
	return os.NewFile(uintptr(fd), path), nil
}

// CheckParent tells whether path, relative to the images in dir, can be the dump before.
func CheckParent(dir *os.File, path string) error {
	f, err := openParent(dir, path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := check(f, maxParents); err != nil {
		return classed.As(errdefs.ErrInvalidArgument, fmt.Errorf("parent images %s: %w", path, err))
	}
	return nil
}

// ReadFile reads a small file of the images. One that is missing is os.ErrNotExist.
func ReadFile(dir *os.File, name string, limit int64) ([]byte, error) {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > limit {
		return nil, classed.Errorf(errdefs.ErrInvalidArgument, "%s: no plain file of at most %d bytes", name, limit)
	}
	return io.ReadAll(io.LimitReader(f, limit))
}

// WriteFile adds a small file to the images.
func WriteFile(dir *os.File, name string, data []byte) error {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &fs.PathError{Op: "open", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	_, err = f.Write(data)
	return errors.Join(err, f.Close())
}

// Magic numbers at the beginning of an image: of all since version 1.1, and of the kind.
const (
	magicCommon  = 0x54564319
	magicSeccomp = 0x64413049
	magicCgroup  = 0x59383330
)

const maxImage = 16 << 20

var errImage = errors.New("malformed image")

// entries gives the messages of an image. A missing image has none.
func entries(dir *os.File, name string, magic uint32) ([][]byte, error) {
	raw, err := ReadFile(dir, name, maxImage)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return split(raw, magic)
}

func split(raw []byte, magic uint32) (out [][]byte, err error) {
	if len(raw) < 8 || binary.LittleEndian.Uint32(raw) != magicCommon || binary.LittleEndian.Uint32(raw[4:]) != magic {
		return nil, errImage
	}
	for raw = raw[8:]; len(raw) > 0; {
		if len(raw) < 4 {
			return nil, errImage
		}
		n := binary.LittleEndian.Uint32(raw)
		if raw = raw[4:]; uint64(n) > uint64(len(raw)) {
			return nil, errImage
		}
		out = append(out, raw[:n])
		raw = raw[n:]
	}
	return out, nil
}

// visit calls f for each field of a protobuf message: with value for numbers, with b for
// everything that has a length.
func visit(msg []byte, f func(field int, value uint64, b []byte) error) error {
	for len(msg) > 0 {
		tag, n := binary.Uvarint(msg)
		if n <= 0 || tag>>3 == 0 || tag>>3 > 1<<29-1 {
			return errImage
		}
		msg = msg[n:]
		var value uint64
		var b []byte
		switch tag & 7 {
		case 0:
			if value, n = binary.Uvarint(msg); n <= 0 {
				return errImage
			}
		case 1:
			n = 8
		case 5:
			n = 4
		case 2:
			size, k := binary.Uvarint(msg)
			if k <= 0 || size > uint64(len(msg)-k) {
				return errImage
			}
			n = k + int(size)
			b = msg[k:n]
		default:
			return errImage
		}
		if n > len(msg) {
			return errImage
		}
		msg = msg[n:]
		if err := f(int(tag>>3), value, b); err != nil {
			return err
		}
	}
	return nil
}

// CheckFilters fails unless every chain of seccomp filters in the images begins with the
// program want, in the form of the kernel (struct sock_filter). Filters that were added
// later can only forbid more.
func CheckFilters(dir *os.File, want []byte) error {
	list, err := entries(dir, "seccomp.img", magicSeccomp)
	if err != nil {
		return classed.As(errdefs.ErrInvalidArgument, fmt.Errorf("seccomp.img: %w", err))
	}
	type link struct {
		program []byte
		prev    int // -1: the first of a chain
	}
	var filters []link
	for _, e := range list {
		err := visit(e, func(field int, _ uint64, filter []byte) error {
			if field != 1 {
				return nil
			}
			l := link{prev: -1}
			err := visit(filter, func(field int, value uint64, b []byte) error {
				switch field {
				case 1:
					l.program = b
				case 2:
					l.prev = int(min(value, maxImage))
				}
				return nil
			})
			filters = append(filters, l)
			return err
		})
		if err != nil {
			return classed.As(errdefs.ErrInvalidArgument, fmt.Errorf("seccomp.img: %w", err))
		}
	}
	if len(filters) == 0 {
		return classed.Errorf(errdefs.ErrInvalidArgument, "seccomp.img: no filter, where the configuration has one")
	}
	good := make([]bool, len(filters))
	for i := range filters {
		at, steps := i, 0
		for ; !good[at] && filters[at].prev >= 0; steps++ {
			if at = filters[at].prev; at >= len(filters) || steps > len(filters) {
				return classed.Errorf(errdefs.ErrInvalidArgument, "seccomp.img: a chain of filters leads nowhere")
			}
		}
		if !good[at] && !bytes.Equal(filters[at].program, want) {
			return classed.Errorf(errdefs.ErrInvalidArgument, "seccomp.img: a filter is not the one of the configuration")
		}
		for at = i; !good[at]; at = filters[at].prev {
			if good[at] = true; filters[at].prev < 0 {
				break
			}
		}
	}
	return nil
}

// maxCgroupDepth bounds how deep cgroups of a container are nested.
const maxCgroupDepth = 64

// CheckCgroups fails for images that name cgroups or their files by anything but plain
// names: CRIU makes paths of them.
func CheckCgroups(dir *os.File) error {
	list, err := entries(dir, "cgroup.img", magicCgroup)
	for i := 0; err == nil && i < len(list); i++ {
		err = visit(list[i], func(field int, _ uint64, b []byte) error {
			switch field {
			case 1: // a set: its members have a path
				return visit(b, func(field int, _ uint64, b []byte) error {
					if field != 2 {
						return nil
					}
					return visit(b, func(field int, _ uint64, b []byte) error {
						if field != 2 {
							return nil
						}
						return plainPath(b)
					})
				})
			case 2: // a controller
				return visit(b, func(field int, _ uint64, b []byte) error {
					switch field {
					case 1:
						return plainName(b)
					case 2:
						return checkCgroupDir(b, maxCgroupDepth)
					}
					return nil
				})
			}
			return nil
		})
	}
	if err != nil {
		return classed.As(errdefs.ErrInvalidArgument, fmt.Errorf("cgroup.img: %w", err))
	}
	return nil
}

func checkCgroupDir(msg []byte, depth int) error {
	if depth == 0 {
		return errors.New("cgroups are nested too deep")
	}
	return visit(msg, func(field int, _ uint64, b []byte) error {
		switch field {
		case 1:
			return plainPath(b)
		case 2:
			return checkCgroupDir(b, depth-1)
		case 3:
			return visit(b, func(field int, _ uint64, b []byte) error {
				if field != 1 {
					return nil
				}
				return plainName(b)
			})
		}
		return nil
	})
}

func plainName(b []byte) error {
	if s := string(b); s == "." || s == ".." || strings.ContainsAny(s, "/\x00") {
		return fmt.Errorf("the name %.64q", s)
	}
	return nil
}

func plainPath(b []byte) error {
	if bytes.IndexByte(b, 0) >= 0 {
		return fmt.Errorf("the path %.64q", b)
	}
	for _, elem := range strings.Split(string(b), "/") {
		if elem == ".." {
			return fmt.Errorf("the path %.64q", b)
		}
	}
	return nil
}
