//go:build linux && (amd64 || arm64)

package launch

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/internal/rawfile"
	"github.com/hako-engine/hako/oci/plan"
)

// What the parent and the child say to each other between the clone and the execution of the
// container's program: words over a socket (plan.MsgMaps and its kin), with descriptors beside them.

// accompany answers the child until it is ready.
func (r *runner) accompany() error {
	p := r.proc
	call := func(f func(int) error) error {
		if f == nil {
			return nil
		}
		return f(p.Pid)
	}
	if r.p.IDMaps && !r.mapped {
		if err := r.expect(plan.MsgMaps); err != nil {
			return err
		}
		if err := call(r.c.IDMaps); err != nil {
			return err
		}
		if err := r.goOn(); err != nil {
			return err
		}
	}
	if r.p.Refork && !r.p.IDMaps {
		if err := r.expect(plan.MsgPid); err != nil {
			return err
		}
	}
	if r.p.LimitsLate {
		if err := r.letIn(); err != nil {
			return errors.Join(err, r.peek())
		}
	}
	if err := call(r.c.Place); err != nil {
		return errors.Join(err, r.peek())
	}
	// Whoever is killed after this has told where the process is.
	early := func() error {
		if r.p.Hold || r.c.Ready == nil || r.forking() {
			return nil
		}
		ready := r.c.Ready
		r.c.Ready = nil
		return ready(p.Pid)
	}
	if !r.p.HooksInSetup {
		if err := early(); err != nil {
			return err
		}
	}
	switch {
	case !r.p.LimitsLate:
		if err := r.letIn(); err != nil {
			return errors.Join(err, r.peek())
		}
	case !r.p.HooksInSetup:
		if err := r.goOn(); err != nil {
			return errors.Join(err, r.peek())
		}
	}
	if r.p.HooksInSetup {
		if err := r.expect(plan.MsgMounted); err != nil {
			return err
		}
		if r.c.Early != nil {
			r.c.Early.unpin()
		}
		if err := call(r.c.Hooks); err != nil {
			return err
		}
		if err := early(); err != nil {
			return err
		}
		if err := r.goOn(); err != nil {
			return err
		}
	}
	want := int32(0)
	if r.p.Hold || r.p.Waits {
		want = plan.MsgReady
	}
	if err := r.expect(want); err != nil {
		return err
	}
	if r.p.Scheduler != nil {
		if err := r.schedule(); err != nil {
			return err
		}
	}
	if err := call(r.c.Ready); err != nil || !r.p.Waits {
		return err
	}
	if err := r.goOn(); err != nil {
		return err
	}
	return r.expect(0)
}

// letIn answers the child that waits for its cgroup.
func (r *runner) letIn() error {
	if r.c.LateDoors == nil {
		return r.goOn()
	}
	doors, err := r.c.LateDoors()
	defer rawfile.CloseAll(doors...)
	if err != nil {
		return err
	}
	return r.goOn(doors...)
}

// goOn answers the child that waits, and hands descriptors over.
func (r *runner) goOn(fds ...int) error {
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	_, err := unix.SendmsgN(r.sync, []byte{0}, rights, nil, unix.MSG_NOSIGNAL)
	if err == unix.EPIPE {
		return r.expect(0) // what it said before it went
	}
	return err
}

// part lets go of what only the child is to have, once it has it.
func (r *runner) part() error {
	if r.given == nil {
		return nil
	}
	if !r.given.begun() {
		return r.died()
	}
	r.given = nil
	r.closeChilds()
	return nil
}

// peek gives the failure that the child may have reported already.
func (r *runner) peek() error {
	if err := r.part(); err != nil {
		return err
	}
	var b [8]byte
	n, _, err := unix.Recvfrom(r.sync, b[:], unix.MSG_DONTWAIT|unix.MSG_PEEK)
	if err != nil || n == 0 {
		return nil
	}
	return r.expect(0)
}

// expect waits for a word of the child. 0 stands for the end of the connection, which
// means that the container's program was executed.
func (r *runner) expect(want int32) error {
	if err := r.part(); err != nil {
		return err
	}
	early := false
	var failure error // of a clone that is still to be named
	for {
		if r.listener != nil {
			if err := r.await(); err != nil {
				return err
			}
		}
		var b [8]byte
		oob := make([]byte, unix.CmsgSpace(4)+unix.CmsgSpace(unix.SizeofUcred))
		n, oobn, _, _, err := unix.Recvmsg(r.sync, b[:], oob, unix.MSG_CMSG_CLOEXEC)
		if err == unix.EINTR {
			continue
		}
		if err == unix.ECONNRESET {
			// It ended without reading our answer. The kernel says so once, before it gives
			// what the child had sent: the reason.
			continue
		}
		if err != nil {
			return fmt.Errorf("read from the container's first process: %w", err)
		}
		if n == 0 && failure != nil {
			return failure
		}
		if n == 0 {
			if want == 0 {
				return nil
			}
			return r.died()
		}
		if n != 8 {
			return fmt.Errorf("the container's first process sent %d bytes", n)
		}
		word, arg := *(*int32)(unsafe.Pointer(&b[0])), *(*int32)(unsafe.Pointer(&b[4]))
		switch {
		case word == plan.MsgConsole:
			if err := r.takeConsole(oob[:oobn]); err != nil {
				return err
			}
		case word == plan.MsgPid:
			if err := r.takePid(int(arg), sender(oob[:oobn])); err != nil || failure != nil || want == word {
				return errors.Join(failure, err)
			}
			if err := r.handOn(); err != nil {
				return err
			}
			if early {
				return nil
			}
		case word == plan.MsgListener:
			if err := r.takeListener(int(arg)); err != nil {
				return err
			}
		case want != 0 && word == want && r.forking() && sender(oob[:oobn]) != r.proc.Pid:
			// The process that the child has cloned was quicker than the child, whose word is
			// still to come: who it is.
			early = true
		case want != 0 && word == want:
			return nil
		default:
			if word >= 0 {
				failure = r.stepError(r.p.Program, int(word), len(r.p.Host), uintptr(arg))
			} else {
				failure = LoaderError(r.p, word, unix.Errno(arg))
			}
			// A clone that was quicker than the child has to be known, so that it is reaped.
			if !r.forking() || sender(oob[:oobn]) == r.proc.Pid {
				return failure
			}
		}
	}
}

// forking: the child clones once more, and has not named the clone so far.
func (r *runner) forking() bool { return !r.taken && (r.p.Refork || r.p.LoaderForks) }

// findClone ends a child that clones, and learns whom it has cloned: an unreaped process
// would keep the container's PID namespace from ending.
func (r *runner) findClone() {
	if !r.forking() {
		return
	}
	unix.Kill(r.proc.Pid, unix.SIGKILL)
	for unix.Waitid(unix.P_PID, r.proc.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
	for r.forking() {
		var b [8]byte
		oob := make([]byte, unix.CmsgSpace(4)+unix.CmsgSpace(unix.SizeofUcred))
		n, oobn, _, _, err := unix.Recvmsg(r.sync, b[:], oob, unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
		if err == unix.EINTR || err == unix.ECONNRESET {
			continue
		}
		if err != nil || n == 0 {
			return
		}
		if word, pid := *(*int32)(unsafe.Pointer(&b[0])), *(*int32)(unsafe.Pointer(&b[4])); n == 8 && word == plan.MsgPid {
			if r.takePid(int(pid), sender(oob[:oobn])) != nil {
				return
			}
		}
	}
}

// LoaderError explains a word of the loader.
func LoaderError(p *plan.Plan, word int32, errno unix.Errno) error {
	total := len(p.Host) + len(p.Program)
	e := &StepError{Index: total, Total: total, Errno: errno}
	if n := len(p.Program); n > 0 {
		e.Step = p.Program[n-1]
	}
	switch word {
	case plan.MsgFilter:
		e.Step.Do, e.Step.Class = plan.Say("load the seccomp filter"), plan.ClassSystem
	case plan.MsgClone:
		e.Step.Do, e.Step.Class = plan.Say("clone into the PID namespace"), plan.ClassSystem
	case plan.MsgHold:
		e.Step.Do, e.Step.Class = plan.Say("wait for start"), plan.ClassSystem
	case plan.MsgSession:
		e.Step.Do, e.Step.Class = plan.Say("start a session"), plan.ClassSystem
	case plan.MsgExec:
		e.Step.Text = e.Step.Do.String() + ": %e"
	}
	return e
}

// died tells of the end of the child, whose connection ended.
func (r *runner) died() error {
	how := "killed, or out of memory in its cgroup"
	if r.proc.PidFD != nil {
		// The connection ends a moment before the process.
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(r.proc.PidFD.Fd()), Events: unix.POLLIN}}, 1000)
	}
	// The beginning of siginfo_t for a child, see waitid(2). Somebody else reaps.
	var si struct {
		signo, errno, code, _, pid, uid, status int32
		_                                       [100]byte
	}
	const exited, killed, dumped = 1, 2, 3
	if unix.Waitid(unix.P_PID, r.proc.Pid, (*unix.Siginfo)(unsafe.Pointer(&si)), unix.WEXITED|unix.WNOWAIT|unix.WNOHANG, nil) == nil {
		switch si.code {
		case exited:
			how = fmt.Sprintf("with status %d", si.status)
		case killed, dumped:
			how = "killed by " + unix.SignalName(unix.Signal(si.status))
			if unix.Signal(si.status) == unix.SIGKILL {
				how += ": by somebody, or because its cgroup is out of memory"
			}
		}
	}
	return fmt.Errorf("the container's first process died before it was ready (%s)", how)
}

func (r *runner) takeConsole(oob []byte) error {
	if r.proc.Console != nil {
		return errors.New("a second terminal came from the container")
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	for i := range msgs {
		if msgs[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		if fds, err := unix.ParseUnixRights(&msgs[i]); err == nil && len(fds) == 1 {
			r.proc.Console = os.NewFile(uintptr(fds[0]), "console")
			return nil
		}
	}
	return fmt.Errorf("no terminal came with the message: %v", err)
}

// sender gives the process that sent a message, as the kernel says; 0 if it does not.
func sender(oob []byte) int {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return 0
	}
	for i := range msgs {
		if cred, err := unix.ParseUnixCredentials(&msgs[i]); err == nil {
			return int(cred.Pid)
		}
	}
	return 0
}

// takePid replaces the child by the one that it has cloned. The clone is visible in the
// container, where it can be traced: only the child itself, which is not, may name it.
// Else the container could name any process of the host as its own.
func (r *runner) takePid(pid, from int) error {
	old := r.proc.Pid
	if from != old || r.taken || !r.p.Refork && !r.p.LoaderForks {
		return fmt.Errorf("a process id came from process %d, not from the container's first process %d", from, old)
	}
	r.taken = true
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("pidfd_open: %w", err)
	}
	r.proc.PidFD.Close()
	r.proc.Pid, r.proc.PidFD = pid, os.NewFile(uintptr(fd), "pidfd")
	reap(old)
	return nil
}

// schedule sets the scheduler of the process that the loader has cloned, and lets it go on.
func (r *runner) schedule() error {
	attr := r.p.Scheduler
	if _, _, e := unix.RawSyscall(unix.SYS_SCHED_SETATTR, uintptr(r.proc.Pid), uintptr(unsafe.Pointer(&attr[0])), 0); e != 0 {
		return fmt.Errorf("set the scheduler to %s: %w", r.p.SchedulerName, e)
	}
	return nil
}
