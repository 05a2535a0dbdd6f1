//go:build linux && (amd64 || arm64)

package launch

import (
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// cpus is a set of CPUs as in sched_setaffinity(2), of which n bytes are used.
type cpus struct {
	mask [1024]byte
	n    uintptr
}

func (c *cpus) get() bool {
	n, _, errno := syscall.RawSyscall(unix.SYS_SCHED_GETAFFINITY, 0, uintptr(len(c.mask)), uintptr(unsafe.Pointer(&c.mask)))
	c.n = n
	return errno == 0 && n <= uintptr(len(c.mask))
}

func (c *cpus) set(tid int) bool {
	_, _, errno := syscall.RawSyscall(unix.SYS_SCHED_SETAFFINITY, uintptr(tid), c.n, uintptr(unsafe.Pointer(&c.mask)))
	return errno == 0
}

// pin keeps this process, which has one thread yet, on the CPU that it is on. The Go runtime
// starts two threads and hands goroutines from one to the other, and the kernel, which sees that another CPU has nothing
// to do, would wake that each time.
//
// What the process makes would inherit it: it is given back (unpin) before it makes another.
//
//go:norace
//go:nocheckptr
func (e *Early) pin() {
	var cpu uint32
	if _, _, errno := syscall.RawSyscall(unix.SYS_GETCPU, uintptr(unsafe.Pointer(&cpu)), 0, 0); errno != 0 || !e.cpus.get() {
		return
	}
	one := cpus{n: e.cpus.n}
	if i := cpu / 8; i < uint32(len(one.mask)) {
		one.mask[i] = 1 << (cpu % 8)
	}
	e.pinned = one.set(0)
}

// unpin lets all threads of this process run where they might before the child was made.
func (e *Early) unpin() {
	if !e.pinned {
		return
	}
	e.pinned = false
	// Who has set no affinity follows the cpuset, also to CPUs that it gets later. So does who has
	// set that it may use all there are.
	all := cpus{n: e.cpus.n}
	for i := range all.mask {
		all.mask[i] = 0xff
	}
	var now cpus
	if !all.set(0) || !now.get() || now != e.cpus { // it was given fewer
		all = e.cpus
		all.set(0)
	}
	dir, err := unix.Open("/proc/self/task", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(dir)
	var buf [1024]byte
	for {
		n, err := unix.Getdents(dir, buf[:])
		if n <= 0 || err != nil {
			return
		}
		var room [32]string
		_, _, names := unix.ParseDirent(buf[:n], len(room), room[:0])
		for _, name := range names {
			if tid, err := strconv.Atoi(name); err == nil {
				all.set(tid)
			}
		}
	}
}
