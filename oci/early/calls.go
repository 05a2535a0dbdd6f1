//go:build linux && (amd64 || arm64)

package early

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// here is AT_FDCWD as an argument.
const here = ^uintptr(-unix.AT_FDCWD - 1)

// call is a system call. A result from -4095 on is an errno.
func call(nr, a, b, c, d uintptr) uintptr {
	r, _, e := syscall.RawSyscall6(nr, a, b, c, d, 0, 0)
	if e != 0 {
		return -uintptr(e)
	}
	return r
}

// errno is how call gives it.
func errno(e unix.Errno) uintptr { return -uintptr(e) }

// text is b as a string that shares its bytes.
func text(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// path is the name of a file for the kernel.
type path struct {
	b [1024]byte
	n int
}

// set puts the name together. It fails if that is too long.
func (p *path) set(parts ...string) bool {
	p.n = 0
	for _, s := range parts {
		if len(s) >= len(p.b)-p.n {
			return false
		}
		p.n += copy(p.b[p.n:], s)
	}
	if p.n >= len(p.b) {
		return false
	}
	p.b[p.n] = 0
	return true
}

func (p *path) ptr() uintptr { return uintptr(unsafe.Pointer(&p.b)) }

// read reads as much of the file as fits.
func (p *path) read(buf []byte) (n int) {
	fd := int(int32(call(unix.SYS_OPENAT, here, p.ptr(), unix.O_RDONLY|unix.O_CLOEXEC, 0)))
	if fd >= 0 {
		n = readAll(fd, buf)
		closeFD(fd)
	}
	return n
}

// exists tells whether there is such a file, or might be.
func (p *path) exists() bool {
	return call(unix.SYS_FACCESSAT, here, p.ptr(), unix.F_OK, 0) != errno(unix.ENOENT)
}

// is tells whether the path leads to the file that is open as fd.
func (p *path) is(fd int) bool {
	var a, b unix.Statx_t
	empty := byte(0)
	return statx(uintptr(fd), uintptr(unsafe.Pointer(&empty)), unix.AT_EMPTY_PATH, &a) && statx(here, p.ptr(), 0, &b) &&
		a.Ino == b.Ino && a.Dev_major == b.Dev_major && a.Dev_minor == b.Dev_minor
}

func statx(dir, name, flags uintptr, st *unix.Statx_t) bool {
	_, _, e := syscall.RawSyscall6(unix.SYS_STATX, dir, name, flags, unix.STATX_INO|unix.STATX_NLINK, uintptr(unsafe.Pointer(st)), 0)
	return e == 0
}

// readAll reads until the end, or until buf is full.
func readAll(fd int, buf []byte) (n int) {
	for n < len(buf) {
		rest := buf[n:]
		r := call(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(rest))), uintptr(len(rest)), 0)
		switch {
		case r == errno(unix.EINTR):
		case int(r) < 0 || int(r) > len(rest):
			return -1
		case r == 0:
			return n
		default:
			n += int(r)
		}
	}
	return n
}

// openAt opens a file in a directory.
func openAt(dir int, name string, flags uintptr) int {
	var p path
	if !p.set(name) {
		return -1
	}
	return int(int32(call(unix.SYS_OPENAT, uintptr(dir), p.ptr(), flags, 0)))
}

func removeAt(dir int, name string) uintptr {
	var p path
	if !p.set(name) {
		return errno(unix.ENAMETOOLONG)
	}
	return call(unix.SYS_UNLINKAT, uintptr(dir), p.ptr(), 0, 0)
}

func closeFD(fd int) {
	if fd >= 0 {
		call(unix.SYS_CLOSE, uintptr(fd), 0, 0, 0)
	}
}

// wait waits until there is something to read, so many milliseconds at most. With -1 for fd it
// is all that it does.
func wait(fd int, ms int64) bool {
	t := unix.Timespec{Sec: ms / 1000, Nsec: ms % 1000 * 1000000}
	for {
		p := unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
		// The kernel writes into t what is left.
		r := call(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p)), 1, uintptr(unsafe.Pointer(&t)), 0)
		if r != errno(unix.EINTR) {
			return r == 1
		}
	}
}
