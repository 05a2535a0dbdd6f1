//go:build linux && (amd64 || arm64)

package launch

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// takeListener takes a seccomp listener out of the child. From here on the child may be
// stopped in any system call until somebody has the listener.
func (r *runner) takeListener(number int) error {
	fd, err := unix.PidfdGetfd(int(r.proc.PidFD.Fd()), number, 0)
	if err != nil {
		return fmt.Errorf("take the seccomp listener from the container's process: %w", err)
	}
	r.listener = os.NewFile(uintptr(fd), "seccomp listener")
	if !r.p.LoaderForks {
		if err := r.handOn(); err != nil {
			return err
		}
	}
	return r.goOn()
}

// handOn hands the listener on, if there is one.
func (r *runner) handOn() error {
	if r.listener == nil {
		return nil
	}
	f := r.listener
	r.listener = nil
	defer f.Close()
	return r.c.Listener(r.proc.Pid, f)
}

// await waits for a word of the child while the listener is still here: it is handed on
// with the pid of the process that is yet to be cloned, or at once if the child is
// stopped before that.
func (r *runner) await() error {
	for {
		p := []unix.PollFd{{Fd: int32(r.sync), Events: unix.POLLIN}, {Fd: int32(r.listener.Fd()), Events: unix.POLLIN}}
		_, err := unix.Poll(p, -1)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return fmt.Errorf("wait for the container's process: %w", err)
		case p[0].Revents != 0:
			return nil
		default:
			return r.handOn()
		}
	}
}
