//go:build linux && (amd64 || arm64)

package launch

import (
	"syscall"
	"unsafe"
	_ "unsafe" // for go:linkname

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/plan"
)

// cloneArgs is struct clone_args of clone3(2).
type cloneArgs struct {
	flags, pidfd, childTID, parentTID, exitSignal uint64
	stack, stackSize, tls, setTID, setTIDSize     uint64
	cgroup                                        uint64
}

//go:linkname beforeFork syscall.runtime_BeforeFork
func beforeFork()

//go:linkname afterFork syscall.runtime_AfterFork
func afterFork()

// clearSignals is CLONE_CLEAR_SIGHAND: the child begins without handlers.
const clearSignals = 0x100000000

// clone starts a child that runs m. Between beforeFork and afterFork all signals are
// blocked, and the child has no handlers, so that none of the Go runtime runs in it.
//
//go:noinline
//go:norace
//go:nocheckptr
func (m *machine) clone(args *cloneArgs) (pid int, err error) {
	args.flags |= clearSignals
	beforeFork()
	r, _, e := syscall.RawSyscall6(unix.SYS_CLONE3, uintptr(unsafe.Pointer(args)), unsafe.Sizeof(*args), 0, 0, 0, 0)
	if e != 0 || r != 0 {
		afterFork()
		if e != 0 {
			return 0, e
		}
		return int(r), nil
	}
	failed, errno := m.run()
	m.pair[0], m.pair[1] = failed, int32(errno)
	fd := m.slots[plan.SlotSync]
	syscall.RawSyscall(syscall.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(m.pair)), 8)
	for {
		syscall.RawSyscall(syscall.SYS_EXIT_GROUP, 255, 0, 0)
	}
}
