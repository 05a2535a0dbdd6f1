//go:build linux && (amd64 || arm64)

package launch

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/internal/rawfile"
	"github.com/hako-engine/hako/oci/plan"
)

// Config is what a plan's execution needs from outside. The functions are called in
// the order of the fields, each at most once, but for Listener, which comes when the child
// has one; an error ends the child.
type Config struct {
	Stdin, Stdout, Stderr *os.File // nil: /dev/null
	Preserve              []*os.File
	Doors                 []int    // descriptors, see plan.Options
	Pidfd                 *os.File // of the process whose namespaces are joined
	Start, Report         *os.File // with plan.Hold: see plan.SlotStart and plan.SlotReport
	CgroupFD              int      // cgroup v2 directory to clone into, -1 for none
	TimeOffsets           string   // content of timens_offsets, with plan.NewTime
	// TimerSlack of the child in nanoseconds. 0: it inherits the calling thread's.
	TimerSlack int

	Overlay func(plan.Overlay) (*os.File, error)         // mounts it, detached
	CopyUp  func(root int, dest string, tmpfs int) error // fills a tmpfs
	IDMaps  func(pid int) error                          // writes the maps
	// Listener takes a seccomp listener of the process pid; it does not own it.
	Listener func(pid int, f *os.File) error
	Place    func(pid int) error // cgroup, limits
	// Early is the child, if it exists already: it is used if it fits the plan, and else killed.
	Early *Early
	// OpenDoors gives Doors at the last moment. They are then the launcher's.
	OpenDoors func() ([]int, error)
	// LateDoors opens the descriptors of plan.Options.LateDoors, which are then the launcher's.
	LateDoors func() ([]int, error)
	Hooks     func(pid int) error
	Ready     func(pid int) error // the process is created (with plan.Hold), or about to be executed
}

// Process is the child. It is a child of the calling process, which has to wait for it.
type Process struct {
	Pid     int
	PidFD   *os.File
	Console *os.File // master of the terminal
}

// Kill ends the child after a failure, and reaps it.
func (p *Process) Kill() {
	unix.Kill(p.Pid, unix.SIGKILL)
	reap(p.Pid)
	if p.PidFD != nil {
		p.PidFD.Close()
	}
	if p.Console != nil {
		p.Console.Close()
	}
}

func reap(pid int) {
	for {
		if _, err := unix.Wait4(pid, nil, 0, nil); err != unix.EINTR {
			return
		}
	}
}

// StepError is a step that failed.
type StepError struct {
	Step  plan.Step
	Index int // counted from 1 over the parent's and the child's steps
	Total int
	Errno unix.Errno
}

func (e *StepError) Error() string {
	if t := e.Step.Text; t != "" {
		if s, ok := strings.CutSuffix(t, "%e"); ok {
			return s + e.Errno.Error()
		}
		return t
	}
	return fmt.Sprintf("%s: %v (step %d of %d)", e.Step.Do, e.Errno, e.Index, e.Total)
}

func (e *StepError) Unwrap() error { return e.Errno }

// Start executes a plan. The process that it gives is being executed already, or waits
// for its start (plan.Hold).
func Start(p *plan.Plan, c Config) (_ *Process, err error) {
	r := &runner{p: p, c: c, sync: -1, mem: new(memory)}
	if c.Early != nil {
		r.mem = &c.Early.mem
		defer c.Early.unpin()
	}
	defer r.close()
	if err := r.prepare(); err != nil {
		return nil, err
	}
	if err := r.runHost(); err != nil {
		return nil, err
	}
	if err := r.clone(); err != nil {
		return nil, err
	}
	if err := r.accompany(); err != nil {
		r.findClone()
		r.proc.Kill()
		return nil, err
	}
	return r.proc, nil
}

type runner struct {
	p        *plan.Plan
	c        Config
	mem      *memory
	slots    []int64
	buffers  []byte
	own      []int // descriptors to close at the end
	sync     int   // the parent's end
	proc     *Process
	taken    bool     // the child was replaced by its clone
	mapped   bool     // its id maps are written
	given    *Early   // may still share our descriptors
	listener *os.File // one that is to be handed on
}

func (r *runner) close() {
	rawfile.CloseAll(append(r.own, r.sync)...)
	if r.listener != nil {
		r.listener.Close()
	}
	runtime.KeepAlive(r.c)
	r.mem.release()
}

// high duplicates a descriptor to a number above those that the program gets.
func (r *runner) high(fd int) (int64, error) {
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3+r.p.Preserve)
	if err != nil {
		return -1, fmt.Errorf("duplicate a descriptor: %w", err)
	}
	r.own = append(r.own, n)
	return int64(n), nil
}

// prepare fills the fixed slots.
func (r *runner) prepare() error {
	if len(r.c.Preserve) != r.p.Preserve {
		return fmt.Errorf("%d descriptors to hand on, the plan says %d", len(r.c.Preserve), r.p.Preserve)
	}
	r.slots = make([]int64, len(r.p.Slots))
	for i := range r.slots {
		r.slots[i] = -1
	}
	r.buffers = r.mem.alloc((r.p.Buffers + 1) * plan.BufferSize)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socketpair: %w", err)
	}
	r.sync = pair[0]
	r.own = append(r.own, pair[1])
	if err := unix.SetsockoptInt(r.sync, unix.SOL_SOCKET, unix.SO_PASSCRED, 1); err != nil {
		return fmt.Errorf("ask for the sender of words: %w", err)
	}
	set := func(s plan.Slot, fd int) {
		if err == nil {
			r.slots[s], err = r.high(fd)
		}
	}
	// keep is set for a descriptor that is ours: close-on-exec, and open until the end.
	keep := func(s plan.Slot, fd int) {
		if fd >= 3+r.p.Preserve {
			r.slots[s] = int64(fd)
			return
		}
		set(s, fd)
	}
	keep(plan.SlotSync, pair[1])
	r.slots[plan.SlotReport] = r.slots[plan.SlotSync]
	if r.p.Hold {
		keep(plan.SlotReport, int(r.c.Report.Fd()))
		keep(plan.SlotStart, int(r.c.Start.Fd()))
	} else if r.p.Waits {
		// The parent answers, and hears of exec, over the same socket.
		set(plan.SlotReport, pair[1])
		set(plan.SlotStart, pair[1])
	}
	if !r.p.Terminal {
		null := -1
		for s, f := range map[plan.Slot]*os.File{plan.SlotStdin: r.c.Stdin, plan.SlotStdout: r.c.Stdout, plan.SlotStderr: r.c.Stderr} {
			if f != nil {
				set(s, int(f.Fd()))
				continue
			}
			if null < 0 {
				if null, err = openNull(); err != nil {
					return err
				}
				r.own = append(r.own, null)
			}
			keep(s, null)
		}
	}
	if r.c.Pidfd != nil {
		keep(plan.SlotPidfd, int(r.c.Pidfd.Fd()))
	}
	if r.p.ConsoleSent {
		set(plan.SlotConsole, pair[1]) // only the number matters
	}
	for i, s := range r.p.Slots {
		if digits, ok := strings.CutPrefix(s, "preserve"); ok {
			if n, e := strconv.Atoi(digits); e == nil && n < len(r.c.Preserve) {
				set(plan.Slot(i), int(r.c.Preserve[n].Fd()))
			}
		}
		if digits, ok := strings.CutPrefix(s, "door"); ok {
			if n, e := strconv.Atoi(digits); e == nil && n < len(r.c.Doors) {
				keep(plan.Slot(i), r.c.Doors[n])
			}
		}
	}
	if err != nil {
		return err
	}
	if r.p.NeedsProc {
		fd, err := unix.Open("/proc", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open /proc: %w", err)
		}
		r.own = append(r.own, fd)
		var st unix.Statfs_t
		if err := unix.Fstatfs(fd, &st); err != nil || st.Type != unix.PROC_SUPER_MAGIC {
			return errors.New("/proc of the host is not a proc file system")
		}
		r.slots[plan.SlotSelf] = int64(fd)
	}
	loader, err := loaderFile(loaderOptions{
		sync: int(r.slots[plan.SlotSync]), report: int(r.slots[plan.SlotReport]), start: int(r.slots[plan.SlotStart]),
		refork: r.p.LoaderForks, terminal: r.p.Terminal, hold: r.p.Hold || r.p.Waits, filter: r.p.Filter,
	})
	if err != nil {
		return err
	}
	r.own = append(r.own, loader)
	keep(plan.SlotLoader, loader)
	return err
}

// openNull opens the host's null device, and makes sure that it is one.
func openNull() (int, error) {
	fd, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return -1, fmt.Errorf("open /dev/null: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != unix.Mkdev(1, 3) {
		unix.Close(fd)
		return -1, errors.New("/dev/null of the host is not the null device")
	}
	return fd, nil
}

// runHost executes the parent's steps.
func (r *runner) runHost() error {
	before := append([]int64(nil), r.slots...)
	for _, n := range r.p.UserNamespaces {
		f, err := userNamespace(n.UIDs, n.GIDs)
		if err != nil {
			return fmt.Errorf("make a user namespace for the ids of mounts: %w", err)
		}
		fd, err := r.high(int(f.Fd()))
		f.Close()
		if err != nil {
			return err
		}
		r.slots[n.Slot], before[n.Slot] = fd, fd
	}
	for _, o := range r.p.Overlays {
		f, err := r.c.Overlay(o)
		if err != nil {
			return err
		}
		fd, err := r.high(int(f.Fd()))
		f.Close()
		if err != nil {
			return err
		}
		r.slots[o.Slot], before[o.Slot] = fd, fd
	}
	m := &machine{mem: r.mem, slots: r.slots}
	if err := m.load(r.p.Host, r.buffers); err != nil {
		return err
	}
	failed, errno := m.prog.run()
	runtime.KeepAlive(m)
	for i, fd := range r.slots {
		if fd >= 0 && fd != before[i] {
			if plan.Slot(i) == r.p.ConsoleSlot && errno == 0 {
				continue
			}
			r.own = append(r.own, int(fd))
		}
	}
	if errno != 0 {
		return r.stepError(r.p.Host, int(failed), 0, errno)
	}
	if s := r.p.ConsoleSlot; s >= 0 && r.slots[s] >= 0 {
		r.proc = &Process{Console: os.NewFile(uintptr(r.slots[s]), "console")}
	} else {
		r.proc = &Process{}
	}
	for _, u := range r.p.CopyUps {
		root := r.slots[r.p.RootSlot]
		if err := r.c.CopyUp(int(root), u.Dest, int(r.slots[u.Slot])); err != nil {
			return fmt.Errorf("copy the image's %s into its tmpfs: %w", u.Dest, err)
		}
	}
	return nil
}

func (r *runner) stepError(steps []plan.Step, i, base int, errno uintptr) error {
	total := len(r.p.Host) + len(r.p.Program)
	if i < 0 || i >= len(steps) {
		return fmt.Errorf("the container's first process reported an unknown step %d: %w", i, unix.Errno(errno))
	}
	return &StepError{Step: steps[i], Index: base + i + 1, Total: total, Errno: unix.Errno(errno)}
}

// maxLazy leaves room below every usual limit of open files.
const maxLazy = 128

func (r *runner) clone() (err error) {
	defer func() {
		if err != nil && r.proc.Console != nil {
			r.proc.Console.Close()
		}
	}()
	if r.c.OpenDoors != nil {
		if err := r.openDoors(); err != nil {
			return err
		}
	}
	if r.c.Early != nil {
		if done, err := r.handOver(r.c.Early); done || err != nil {
			return err
		}
	}
	m := &machine{mem: r.mem, slots: r.mem.words(r.slots), lazy: maxLazy, slack: uintptr(r.c.TimerSlack)}
	if err := m.load(r.p.Program, r.buffers); err != nil {
		return err
	}
	pidfd := new(int32)
	args := &cloneArgs{
		flags: r.p.CloneFlags | unix.CLONE_PIDFD, exitSignal: uint64(unix.SIGCHLD),
		pidfd: uint64(uintptr(unsafe.Pointer(pidfd))),
	}
	if r.c.CgroupFD >= 0 {
		args.flags |= unix.CLONE_INTO_CGROUP
		args.cgroup = uint64(r.c.CgroupFD)
	}
	switch {
	case r.p.NewTime:
		r.proc.Pid, err = cloneInNewTime(m, args, r.c.TimeOffsets)
	case len(r.p.Affinity) > 0:
		r.proc.Pid, err = cloneOn(r.p.Affinity, m, args)
	default:
		r.proc.Pid, err = m.clone(args)
	}
	runtime.KeepAlive(m)
	runtime.KeepAlive(args)
	if err != nil {
		return fmt.Errorf("clone: %w", err)
	}
	r.proc.PidFD = os.NewFile(uintptr(*pidfd), "pidfd")
	r.closeChilds()
	return nil
}

// openDoors fills the slots of the doors.
func (r *runner) openDoors() error {
	doors, err := r.c.OpenDoors()
	r.own = append(r.own, doors...)
	if err != nil {
		return err
	}
	for i, s := range r.p.Slots {
		if digits, ok := strings.CutPrefix(s, "door"); ok {
			if n, e := strconv.Atoi(digits); e == nil && n < len(doors) {
				r.slots[i] = int64(doors[n])
			}
		}
	}
	return nil
}

// handOver lets a child that exists already run the program. If it cannot, it is gone.
func (r *runner) handOver(e *Early) (done bool, err error) {
	if !e.fits(r.p) {
		e.Kill()
		return false, nil
	}
	if r.p.IDMaps {
		// Its namespace is there since the clone.
		if err := r.c.IDMaps(e.Pid); err != nil {
			return false, err
		}
	}
	m := &machine{mem: r.mem, slots: r.mem.words(r.slots), lazy: maxLazy, skip: r.p.Made}
	if err := m.load(r.p.Program, r.buffers); err != nil {
		return false, err
	}
	if len(r.mem.chunks) > 0 || !e.give(m.prog) {
		e.Kill()
		return false, nil
	}
	r.mapped = r.p.IDMaps
	r.proc.Pid, r.proc.PidFD = e.Pid, os.NewFile(uintptr(e.pidfd), "pidfd")
	r.given = e
	return true, nil
}

// closeChilds closes descriptors that only the child is to have.
func (r *runner) closeChilds() {
	// From here on EOF on the sync socket means that the child is gone, or has executed
	// the container's program.
	for i, fd := range r.own {
		if int64(fd) == r.slots[plan.SlotSync] || int64(fd) == r.slots[plan.SlotConsole] || fd == r.own[0] ||
			!r.p.Hold && (int64(fd) == r.slots[plan.SlotReport] || int64(fd) == r.slots[plan.SlotStart]) {
			unix.Close(fd)
			r.own[i] = -1
		}
	}
}

// cloneInNewTime makes a time namespace for children of a thread that is then thrown
// away, because a thread cannot go back. Offsets can only be set while nobody is in it.
func cloneInNewTime(m *machine, args *cloneArgs, offsets string) (pid int, err error) {
	done := make(chan struct{})
	slack, slackErr := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if slackErr == nil {
			// The container inherits it from the thread that clones, which shall not matter.
			_ = unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(slack), 0, 0, 0)
		}
		if err = unix.Unshare(unix.CLONE_NEWTIME); err != nil {
			return
		}
		if offsets != "" {
			if err = os.WriteFile(fmt.Sprintf("/proc/%d/timens_offsets", unix.Gettid()), []byte(offsets), 0); err != nil {
				return
			}
		}
		pid, err = m.clone(args)
	}()
	<-done
	return pid, err
}
