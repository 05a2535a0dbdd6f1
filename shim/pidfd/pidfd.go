// Package pidfd waits for the end of processes without a thread for each.
//
// In flow pids of processes that cannot have been reaped yet; out flows the moment
// of their end. Waiting parks a goroutine on the runtime's epoll.
package pidfd

import (
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// FD refers to one process, whatever becomes of its number (pidfd_open(2)).
type FD struct{ f *os.File }

// Open refers to a process that the caller knows to be its child, or not to have
// been reaped.
func Open(pid int) (*FD, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	return &FD{os.NewFile(uintptr(fd), "pidfd")}, nil
}

// Wait blocks until the process has ended, or Close is called (os.ErrClosed). It
// does not reap.
func (p *FD) Wait() error {
	raw, err := p.f.SyscallConn()
	if err == nil {
		err = raw.Read(func(fd uintptr) bool {
			poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			n, err := unix.Poll(poll, 0)
			return n > 0 || err != nil && !errors.Is(err, unix.EINTR)
		})
	}
	if err != nil {
		return os.ErrClosed // nothing else fails without a deadline
	}
	return nil
}

// Kill signals the process: errdefs.ErrNotFound if it has ended.
func (p *FD) Kill(sig unix.Signal) error {
	raw, err := p.f.SyscallConn()
	if err == nil {
		var serr error
		if err = raw.Control(func(fd uintptr) { serr = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err == nil {
			err = serr
		} else {
			err = unix.ESRCH // closed: it has been reaped
		}
	}
	switch {
	case errors.Is(err, os.ErrClosed), errors.Is(err, unix.ESRCH):
		return fmt.Errorf("process already finished: %w", errdefs.ErrNotFound)
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("signal %d: %w", sig, errdefs.ErrInvalidArgument)
	}
	return err
}

// Close releases the descriptor.
func (p *FD) Close() error { return p.f.Close() }
