//go:build linux

package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// maxFile bounds what is read of one cgroup file: a cgroup.procs of a million
// processes fits.
const maxFile = 16 << 20

// open opens a file of a cgroup directory. cgroup file systems have no links; that
// the last element is none is asked for all the same, for trees that are something
// else. The os package is avoided: it would add epoll and finalizers to what is
// one write.
func open(path string, flags int) (int, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
		if err == nil {
			return fd, nil
		}
		if !errors.Is(err, unix.EINTR) {
			return -1, &fs.PathError{Op: "open", Path: path, Err: err}
		}
	}
}

// writeFile writes value in one write(2), which is one command to the kernel.
func writeFile(path, value string) error {
	fd, err := open(path, unix.O_WRONLY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return writeFD(fd, path, value)
}

func writeFD(fd int, path, value string) error {
	for {
		n, err := unix.Write(fd, []byte(value))
		switch {
		case err == nil && n == len(value):
			return nil
		case err == nil:
			err = unix.EIO
		case errors.Is(err, unix.EINTR):
			continue
		}
		return &fs.PathError{Op: "write " + strconv.Quote(short(value)) + " to", Path: path, Err: err}
	}
}

func short(s string) string {
	s = strings.TrimSuffix(s, "\n")
	if len(s) > 64 {
		return s[:64] + "..."
	}
	return s
}

// readFile reads a whole file.
func readFile(path string) ([]byte, error) {
	fd, err := open(path, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	return readFD(fd, path, make([]byte, 0, 4096))
}

// readFD is readFile into buf, as long as that has room.
func readFD(fd int, path string, buf []byte) ([]byte, error) {
	for {
		if len(buf) == cap(buf) {
			if len(buf) >= maxFile {
				return nil, &fs.PathError{Op: "read", Path: path, Err: unix.EFBIG}
			}
			buf = append(buf, 0)[:len(buf)]
		}
		n, err := unix.Read(fd, buf[len(buf):cap(buf)])
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return nil, &fs.PathError{Op: "read", Path: path, Err: err}
		case n == 0:
			return buf, nil
		default:
			room := cap(buf) - len(buf)
			buf = buf[:len(buf)+n]
			if n < maxLine && room-n >= maxLine {
				return buf, nil
			}
		}
	}
}

// maxLine is longer than any line of a cgroup file. The kernel gives as many whole lines
// as there is room for: where one more would have fitted, there is none.
const maxLine = 1 << 10

func readString(path string) (string, error) {
	fd, err := open(path, unix.O_RDONLY)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	var room [2 * maxLine]byte // most files are one short line
	b, err := readFD(fd, path, room[:0])
	return string(bytes.TrimSpace(b)), err
}

// readUint reads a file with one number. "max" is the largest one.
func readUint(path string) (uint64, error) {
	s, err := readString(path)
	if err != nil {
		return 0, err
	}
	n, err := parseUint(s)
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", path, err)
	}
	return n, nil
}

func parseUint(s string) (uint64, error) {
	if s == "max" {
		return 1<<64 - 1, nil
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		if strings.HasPrefix(s, "-") {
			if _, err := strconv.ParseInt(s, 10, 64); err == nil {
				return 1<<64 - 1, nil // v1 prints "no limit" as -1 in some files
			}
		}
		return 0, fmt.Errorf("%q is not a number: %w", short(s), errdefs.ErrDataLoss)
	}
	return n, nil
}

func exists(path string) bool {
	var st unix.Stat_t
	return unix.Lstat(path, &st) == nil
}

// gone tells whether err says that the cgroup (or the file in it) is not there.
func gone(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) }

// classed gives err a class of errdefs without changing its text.
func classed(err, class error) error { return &classedError{err, class} }

type classedError struct{ err, class error }

func (e *classedError) Error() string   { return e.err.Error() }
func (e *classedError) Unwrap() []error { return []error{e.err, e.class} }
