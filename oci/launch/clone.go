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

// stackSize is enough for runChild, which may not ask for more.
const stackSize = 16 << 10

func clone3(args unsafe.Pointer, size, start uintptr, p *loaded) (r uintptr)

// clone starts a child that runs m. Between beforeFork and afterFork all signals are
// blocked and the goroutine keeps its thread, and the child has no handlers, so that none of
// the Go runtime runs in it.
//
//go:noinline
//go:norace
//go:nocheckptr
func (m *machine) clone(args *cloneArgs) (pid int, err error) {
	stack := m.alloc(stackSize)
	if m.mem.err != nil {
		return 0, m.mem.err
	}
	args.flags |= clearSignals
	args.stack, args.stackSize = uint64(addr(stack)), stackSize
	start := runChild
	here := byte(0)
	// A child that os/exec makes in a user namespace of its own is a copy as well, and needs
	// the heap.
	syscall.ForkLock.Lock()
	defer syscall.ForkLock.Unlock()
	adviseHeap(unix.MADV_DONTFORK, unsafe.Pointer(m), unsafe.Pointer(&here))
	defer adviseHeap(unix.MADV_DOFORK, unsafe.Pointer(m), unsafe.Pointer(&here))
	beforeFork()
	if m.slack > 0 {
		syscall.RawSyscall(syscall.SYS_PRCTL, unix.PR_SET_TIMERSLACK, m.slack, 0)
	}
	r := clone3(unsafe.Pointer(args), unsafe.Sizeof(*args), **(**uintptr)(unsafe.Pointer(&start)), m.prog)
	afterFork()
	if e := -int(r); e > 0 {
		return 0, syscall.Errno(e)
	}
	return int(r), nil
}

// runChild is the child. It has a stack and p, and neither the Go heap nor a goroutine.
//
//go:nosplit
//go:norace
//go:nocheckptr
func runChild(p *loaded) {
	failed, errno := p.run()
	p.pair[0], p.pair[1] = failed, int32(errno)
	fd := *(*int64)(unsafe.Add(unsafe.Pointer(p.slots), plan.SlotSync*8))
	syscall.RawSyscall(syscall.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&p.pair)), 8)
	for {
		syscall.RawSyscall(syscall.SYS_EXIT_GROUP, 255, 0, 0)
	}
}
