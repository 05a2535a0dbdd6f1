//go:build linux

// Package rawfile reads and writes small files with nothing but open, read or write, and
// close. In flow trusted paths and bytes; out flow bytes, and files.
//
// The os package asks the poller about each file that it opens, which costs five system
// calls, and once an epoll instance with a thread that looks at it. A program that lives
// for a few milliseconds feels that.
package rawfile

import (
	"io/fs"
	"slices"

	"golang.org/x/sys/unix"
)

// Open opens a file, close-on-exec. The caller closes the descriptor.
func Open(path string, flags int, perm uint32) (int, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, perm)
		if err == nil {
			return fd, nil
		}
		if err != unix.EINTR {
			return -1, &fs.PathError{Op: "open", Path: path, Err: err}
		}
	}
}

// Read reads a whole file of at most limit bytes; a longer one is EFBIG. expect is how
// long it probably is.
func Read(path string, expect, limit int) ([]byte, error) {
	fd, err := Open(path, unix.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	b, err := ReadFD(fd, expect, limit)
	if err != nil {
		err = &fs.PathError{Op: "read", Path: path, Err: err}
	}
	return b, err
}

// ReadFD is Read from a descriptor.
func ReadFD(fd, expect, limit int) ([]byte, error) {
	buf := make([]byte, 0, expect+1)
	for {
		if len(buf) == cap(buf) {
			if len(buf) > limit {
				return nil, unix.EFBIG
			}
			buf = slices.Grow(buf, len(buf))
		}
		n, err := unix.Read(fd, buf[len(buf):cap(buf)])
		switch {
		case err == unix.EINTR:
		case err != nil:
			return nil, err
		case n == 0:
			if len(buf) > limit {
				return nil, unix.EFBIG
			}
			return buf, nil
		default:
			buf = buf[:len(buf)+n]
		}
	}
}

// Write makes the file, or empties it, and fills it.
func Write(path string, data []byte, perm uint32) error {
	fd, err := Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_NOFOLLOW, perm)
	if err != nil {
		return err
	}
	for len(data) > 0 {
		n, werr := unix.Write(fd, data)
		if werr == unix.EINTR {
			continue
		}
		if werr != nil {
			unix.Close(fd)
			return &fs.PathError{Op: "write", Path: path, Err: werr}
		}
		data = data[n:]
	}
	if err := unix.Close(fd); err != nil {
		return &fs.PathError{Op: "close", Path: path, Err: err}
	}
	return nil
}

// Put writes to a file that is there with one call, as those of procfs want it.
func Put(path, value string) error {
	fd, err := Open(path, unix.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte(value)); err != nil {
		return &fs.PathError{Op: "write", Path: path, Err: err}
	}
	return nil
}

// CloseAll closes descriptors, neighbours with one call. Negative numbers are skipped.
func CloseAll(fds ...int) {
	fds = slices.Clone(fds)
	slices.Sort(fds)
	for i := 0; i < len(fds); {
		j := i + 1
		for j < len(fds) && fds[j] <= fds[j-1]+1 {
			j++
		}
		if first, last := fds[i], fds[j-1]; first >= 0 {
			if unix.CloseRange(uint(first), uint(last), 0) != nil {
				for _, fd := range slices.Compact(fds[i:j]) {
					unix.Close(fd)
				}
			}
		}
		i = j
	}
}
