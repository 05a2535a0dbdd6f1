//go:build linux

package unpack

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

// openDirs bounds the descriptors that one layer holds. The members of a layer come
// directory by directory, so a few are enough.
const openDirs = 48

// dirCache keeps the directories that were used last open, by name.
type dirCache struct {
	open    func(name string) (int, error)
	byName  map[string]*openDirectory
	lastKey string
	last    *openDirectory
	clock   uint64
}

type openDirectory struct {
	fd   int
	used uint64
}

// get gives a descriptor that is valid until the next call of get or flush.
func (c *dirCache) get(name string) (int, error) {
	c.clock++
	if c.last != nil && c.lastKey == name {
		c.last.used = c.clock
		return c.last.fd, nil
	}
	if d, ok := c.byName[name]; ok {
		d.used, c.last, c.lastKey = c.clock, d, name
		return d.fd, nil
	}
	fd, err := c.open(name)
	if err != nil {
		return -1, err
	}
	c.put(name, fd)
	return fd, nil
}

func (c *dirCache) put(name string, fd int) {
	if c.byName == nil {
		c.byName = make(map[string]*openDirectory, openDirs)
	}
	if len(c.byName) >= openDirs {
		var oldest string
		var at *openDirectory
		for n, d := range c.byName {
			if at == nil || d.used < at.used {
				oldest, at = n, d
			}
		}
		unix.Close(at.fd)
		delete(c.byName, oldest)
	}
	d := &openDirectory{fd, c.clock}
	c.byName[name], c.last, c.lastKey = d, d, name
}

// flush forgets everything: after a name that may be part of a cached one was removed.
func (c *dirCache) flush() {
	for _, d := range c.byName {
		unix.Close(d.fd)
	}
	clear(c.byName)
	c.last = nil
}

// openDir opens a directory of the layer; links on the way resolve inside the root.
func (a *applier) openDir(name string) (int, error) {
	return openat2(a.root, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_MAGICLINKS)
}

func openat2(at int, name string, flags, resolve uint64) (int, error) {
	how := unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: resolve}
	for range 128 {
		fd, err := unix.Openat2(at, name, &how)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
			continue
		}
		return fd, err
	}
	return -1, unix.EAGAIN
}

// futimens sets both times of an open file.
func futimens(fd int, ns int64) error {
	ts := [2]unix.Timespec{unix.NsecToTimespec(ns), unix.NsecToTimespec(ns)}
	_, _, e := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(&ts[0])), 0, 0, 0)
	if e != 0 {
		return e
	}
	return nil
}
