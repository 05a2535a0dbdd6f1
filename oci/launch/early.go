//go:build linux && (amd64 || arm64)

package launch

import (
	"slices"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/plan"
)

// Early is a container's first process that is made before the Go runtime of its parent starts,
// while the process is small: it makes namespaces while its parent finds out what it is to do.
//
// It runs nothing but this package. Programs lie in memory that both have, which the parent only
// writes to: what the child leaves there is believed until it begins the program of the
// container, and not looked at afterwards. Until then the two share their descriptors, too.
type Early struct {
	Pid   int
	pidfd int32
	flags uint64 // of namespaces
	room  *room
	mem   memory // the rest of the shared memory
	spent bool   // it was told to run the program of the container, or is gone

	cpus   cpus // where this process may run
	pinned bool // it may not now
}

// room begins the shared memory.
type room struct {
	turn    uint32 // futex: turnFiles or turnLast, when the child is to do it
	ready   uint32 // futex: 1 when the child has its namespaces
	done    uint32 // futex: the turn that is done, or begun for the last
	claimed uint32 // who does turnFiles: 1
	mounts  uint32 // the length of mountinfo at the end of the room, 0: it is not there
	files   *loaded
	last    *loaded
}

const (
	turnFiles = 1 // run files
	turnLast  = 2 // run last, the program of the container
)

const (
	roomSize  = 64
	mountSize = 32 << 10 // for mountinfo
)

// futex operations, between processes.
const (
	futexWait = 0
	futexWake = 1
)

// Hatch makes the child, with new namespaces (the flags of clone(2)), in the v2 cgroup of the
// descriptor, if that is not negative. It needs no Go runtime.
//
//go:norace
//go:nocheckptr
func (e *Early) Hatch(flags uint64, cgroup int) bool {
	r, _, errno := syscall.RawSyscall6(syscall.SYS_MMAP, 0, chunkSize+mountSize, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED|syscall.MAP_ANON, ^uintptr(0), 0)
	if errno != 0 {
		return false
	}
	e.room = (*room)(pointer(r))
	e.mem.free = unsafe.Slice((*byte)(unsafe.Add(pointer(r), roomSize)), chunkSize-roomSize)
	e.flags = flags
	self, _, _ := syscall.RawSyscall(syscall.SYS_GETPID, 0, 0, 0)
	own, _, errno := syscall.RawSyscall(unix.SYS_PIDFD_OPEN, self, 0, 0)
	if errno != 0 {
		return false
	}
	args := cloneArgs{
		// What the child opens is there for the parent, and the other way about.
		flags:      flags&^unix.CLONE_NEWNET | clearSignals | unix.CLONE_FILES | unix.CLONE_PIDFD,
		exitSignal: uint64(unix.SIGCHLD),
		pidfd:      uint64(uintptr(unsafe.Pointer(&e.pidfd))),
	}
	if cgroup >= 0 {
		args.flags |= unix.CLONE_INTO_CGROUP
		args.cgroup = uint64(cgroup)
	}
	pid, _, errno := syscall.RawSyscall(unix.SYS_CLONE3, uintptr(unsafe.Pointer(&args)), unsafe.Sizeof(args), 0)
	if errno == 0 && pid == 0 {
		e.live(own)
	}
	if errno != 0 {
		syscall.RawSyscall(syscall.SYS_CLOSE, own, 0, 0)
		return false
	}
	e.Pid = int(pid)
	e.pin()
	return true
}

// live is the child.
//
//go:norace
//go:nocheckptr
func (e *Early) live(parent uintptr) {
	exit := func() {
		for {
			syscall.RawSyscall(syscall.SYS_EXIT_GROUP, 255, 0, 0)
		}
	}
	syscall.RawSyscall(syscall.SYS_PRCTL, unix.PR_SET_DUMPABLE, 0, 0)
	// It ends with its parent, also if that is gone by now.
	syscall.RawSyscall(syscall.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0)
	poll, now := unix.PollFd{Fd: int32(parent), Events: unix.POLLIN}, unix.Timespec{}
	if n, _, _ := syscall.RawSyscall6(syscall.SYS_PPOLL, uintptr(unsafe.Pointer(&poll)), 1, uintptr(unsafe.Pointer(&now)), 0, 0, 0); n != 0 {
		exit()
	}
	syscall.RawSyscall(syscall.SYS_CLOSE, parent, 0, 0)
	// Signals for which the Go runtime would have a handler by now are not ignored. The others
	// are the plan's.
	var action struct {
		handler, flags, restorer uintptr
		mask                     uint64
	}
	for sig := uintptr(unix.SIGQUIT); sig <= 64; sig++ {
		switch unix.Signal(sig) {
		case unix.SIGKILL, unix.SIGSTOP, unix.SIGCONT, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU, 32, 34:
		default:
			syscall.RawSyscall6(syscall.SYS_RT_SIGACTION, sig, uintptr(unsafe.Pointer(&action)), 0, 8, 0, 0)
		}
	}
	// The kernel makes a scheduler's group for the session, and waits with it for the cgroups
	// that the parent makes later.
	if _, _, errno := syscall.RawSyscall(syscall.SYS_SETSID, 0, 0, 0); errno != 0 {
		exit()
	}
	if e.flags&unix.CLONE_NEWNET != 0 && !makeNet() {
		exit()
	}
	tell(&e.room.ready, 1)
	e.readMounts()
	for seen := uint32(0); ; {
		turn := atomic.LoadUint32(&e.room.turn)
		switch {
		case turn == seen:
			syscall.RawSyscall6(syscall.SYS_FUTEX, uintptr(unsafe.Pointer(&e.room.turn)), futexWait, uintptr(seen), 0, 0, 0)
		case turn == turnFiles:
			if atomic.CompareAndSwapUint32(&e.room.claimed, 0, 1) {
				e.room.files.run()
			}
			tell(&e.room.done, turn)
		default:
			if _, _, errno := syscall.RawSyscall(syscall.SYS_UNSHARE, unix.CLONE_FILES, 0, 0); errno != 0 {
				exit()
			}
			syscall.RawSyscall(syscall.SYS_PRCTL, unix.PR_SET_PDEATHSIG, 0, 0)
			tell(&e.room.done, turn)
			runChild(e.room.last)
		}
		seen = turn
	}
}

// readMounts reads the mounts for the parent, whose they are as well: for the kernel it is as much
// work as opening fifty files.
//
//go:norace
//go:nocheckptr
func (e *Early) readMounts() {
	name := [...]byte{'/', 'p', 'r', 'o', 'c', '/', 's', 'e', 'l', 'f', '/', 'm', 'o', 'u', 'n', 't', 'i', 'n', 'f', 'o', 0}
	fd, _, errno := syscall.RawSyscall6(syscall.SYS_OPENAT, ^uintptr(-unix.AT_FDCWD-1), uintptr(unsafe.Pointer(&name)), syscall.O_RDONLY|syscall.O_CLOEXEC, 0, 0, 0)
	if errno != 0 {
		return
	}
	n := uintptr(0)
	for n < mountSize {
		r, _, errno := syscall.RawSyscall(syscall.SYS_READ, fd, uintptr(unsafe.Pointer(e.room))+chunkSize+n, mountSize-n)
		if errno != 0 {
			break
		}
		if r == 0 {
			atomic.StoreUint32(&e.room.mounts, uint32(n))
			break
		}
		n += r
	}
	syscall.RawSyscall(syscall.SYS_CLOSE, fd, 0, 0)
}

// Mounts gives /proc/self/mountinfo, or nil if the child has not got so far.
func (e *Early) Mounts() []byte {
	n := atomic.LoadUint32(&e.room.mounts)
	if n == 0 || n > mountSize || e.spent {
		return nil
	}
	return slices.Clone(unsafe.Slice((*byte)(unsafe.Add(unsafe.Pointer(e.room), chunkSize)), n))
}

// tell sets a futex.
func tell(word *uint32, v uint32) {
	atomic.StoreUint32(word, v)
	syscall.RawSyscall(syscall.SYS_FUTEX, uintptr(unsafe.Pointer(word)), futexWake, 1)
}

// makeNet makes a network namespace and brings its loopback device up.
func makeNet() bool {
	if _, _, errno := syscall.RawSyscall(syscall.SYS_UNSHARE, unix.CLONE_NEWNET, 0, 0); errno != 0 {
		return false
	}
	sock, _, errno := syscall.RawSyscall(syscall.SYS_SOCKET, unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if errno != 0 {
		return false
	}
	ifreq := [40]byte{0: 'l', 1: 'o', 16: unix.IFF_UP | unix.IFF_RUNNING}
	_, _, errno = syscall.RawSyscall(syscall.SYS_IOCTL, sock, unix.SIOCSIFFLAGS, uintptr(unsafe.Pointer(&ifreq)))
	syscall.RawSyscall(syscall.SYS_CLOSE, sock, 0, 0)
	return errno == 0
}

// settle waits until the child has set a futex to v. It is false if it has ended instead.
func (e *Early) settle(word *uint32, v uint32) bool {
	limit := unix.Timespec{Nsec: 5e6}
	for {
		is := atomic.LoadUint32(word)
		if is == v {
			return true
		}
		_, _, errno := syscall.RawSyscall6(syscall.SYS_FUTEX, uintptr(unsafe.Pointer(word)), futexWait, uintptr(is), uintptr(unsafe.Pointer(&limit)), 0, 0)
		if errno != syscall.ETIMEDOUT {
			continue
		}
		p := []unix.PollFd{{Fd: e.pidfd, Events: unix.POLLIN}}
		if n, err := unix.Poll(p, 0); n > 0 && err == nil {
			return atomic.LoadUint32(word) == v
		}
	}
}

// InUserNamespace tells whether the child is in a new one.
func (e *Early) InUserNamespace() bool { return e.flags&unix.CLONE_NEWUSER != 0 }

// Files lets the child make directories, and open a file in each of others for writing, and
// goes on meanwhile. See Opening.
func (e *Early) Files(dirs, files []string) *Opening {
	o := &Opening{e: e, dirs: len(dirs)}
	if e.spent {
		return o
	}
	step := func(nr uintptr, args ...plan.Arg) {
		i := len(o.steps)
		o.steps = append(o.steps, plan.Step{Nr: nr, Args: args, Fill: plan.Slot(i), Expect: -1, OnOK: i + 1, OnFail: i + 1, Any: true})
	}
	here, num := plan.Arg{Int: uint64(1<<64 + unix.AT_FDCWD)}, func(v uint64) plan.Arg { return plan.Arg{Int: v} }
	text := func(s string) plan.Arg { return plan.Arg{Kind: plan.ArgString, Str: s} }
	for _, d := range dirs {
		step(unix.SYS_MKDIRAT, here, text(d), num(0o755))
	}
	for _, f := range files {
		step(unix.SYS_OPENAT, here, text(f), num(unix.O_WRONLY|unix.O_CLOEXEC|unix.O_LARGEFILE), num(0))
	}
	slots := make([]int64, len(o.steps))
	for i := range slots {
		slots[i] = -1
	}
	// What a slot is filled with again is closed below lazy, which nothing is.
	m := &machine{mem: &e.mem, slots: e.mem.words(slots), lazy: 1 << 62}
	if m.load(o.steps, nil) != nil || len(e.mem.chunks) > 0 {
		return o
	}
	o.slots = m.slots
	e.room.files = m.prog
	tell(&e.room.turn, turnFiles)
	return o
}

// Opening is what Files has asked for.
type Opening struct {
	e     *Early
	dirs  int
	steps []plan.Step
	slots []int64 // nil: it was not asked
}

// Wait gives which directories were made, and descriptors: -1 for a file that was not opened. A
// child that has not come to it yet leaves it to the caller, who would wait longer.
func (o *Opening) Wait() (made []bool, fds []int) {
	made, fds = make([]bool, o.dirs), make([]int, len(o.steps)-o.dirs)
	r := o.e.room
	ok := o.slots != nil && !atomic.CompareAndSwapUint32(&r.claimed, 0, 1) && o.e.settle(&r.done, turnFiles)
	for i := range o.steps {
		switch {
		case i < o.dirs:
			made[i] = ok && o.slots[i] == 0
		case ok:
			fds[i-o.dirs] = int(o.slots[i])
		default:
			fds[i-o.dirs] = -1
		}
	}
	return made, fds
}

// fits: it has the namespaces of the plan, and can be given the program.
func (e *Early) fits(p *plan.Plan) bool {
	want := p.CloneFlags
	if p.OwnNet {
		want |= unix.CLONE_NEWNET
	}
	return !e.spent && e.flags == want && !p.NewTime && !p.Refork && !p.LoaderForks && len(p.Affinity) == 0 && len(e.mem.chunks) == 0
}

// give lets the child run the program of the container. The caller closes none of its descriptors
// before begun.
func (e *Early) give(p *loaded) bool {
	if !e.settle(&e.room.ready, 1) {
		return false
	}
	e.room.last, e.spent = p, true
	tell(&e.room.turn, turnLast)
	return true
}

// begun waits until the child has descriptors of its own. It is false if it has ended instead.
func (e *Early) begun() bool { return e.settle(&e.room.done, turnLast) }

// Kill ends and reaps a child that has not begun the program of the container.
func (e *Early) Kill() {
	if e.Pid == 0 || e.spent {
		return
	}
	e.spent = true
	e.unpin()
	unix.Kill(e.Pid, unix.SIGKILL)
	reap(e.Pid)
	unix.Close(int(e.pidfd))
}
