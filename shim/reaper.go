package shim

import (
	"errors"
	"os"
	"os/signal"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/shim/pidfd"
)

// statusUnknown is the exit status of a process whose status nobody can know.
const statusUnknown = 255

// reaper waits for all children. A process that we know has a pidfd of its own and
// is reaped when that becomes readable; an orphan that the kernel reparented to us
// is reaped by a sweep. A sweep runs only while no call to a runtime is under way,
// so a child that such a call waits for itself is never stolen from it.
type reaper struct {
	// calls is read-held by calls to a runtime, more than once where they nest, and
	// write-held by a sweep, which never waits for it.
	calls sync.RWMutex
	quit  chan struct{}

	mu       sync.Mutex
	children map[int]*child
}

// child is a process to wait for.
type child struct {
	pid    int
	fd     *pidfd.FD
	done   chan struct{}
	status uint32 // exit code or 128 + signal; valid when done is closed
	signal bool   // it was killed by SIGKILL
	at     time.Time
}

func newReaper() *reaper {
	return &reaper{quit: make(chan struct{}), children: map[int]*child{}}
}

// watch makes a pid that a runtime gave known. It must be called before the
// runtime call is over for the reaper (calls.RUnlock).
func (r *reaper) watch(pid int) (*child, error) {
	fd, err := pidfd.Open(pid)
	if err != nil {
		return nil, err
	}
	c := &child{pid: pid, fd: fd, done: make(chan struct{})}
	r.mu.Lock()
	r.children[pid] = c
	r.mu.Unlock()
	return c, nil
}

// await blocks until the child ended and was reaped.
func (r *reaper) await(c *child) {
	defer c.fd.Close()
	_ = c.fd.Wait() // nobody closes it but us
	// The process has ended. If it is not our child (yet), its parent is about to
	// leave it to us.
	for range 200 {
		if r.reap(c) {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.finish(c, statusUnknown, false)
}

func (r *reaper) reaped(c *child) bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

func (r *reaper) reap(c *child) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.reaped(c) {
		return true
	}
	var ws unix.WaitStatus
	pid, err := unix.Wait4(c.pid, &ws, unix.WNOHANG, nil)
	for errors.Is(err, unix.EINTR) {
		pid, err = unix.Wait4(c.pid, &ws, unix.WNOHANG, nil)
	}
	if err != nil || pid != c.pid {
		return false
	}
	r.finishStatus(c, ws)
	return true
}

// finishStatus and finish are called with the lock held.
func (r *reaper) finishStatus(c *child, ws unix.WaitStatus) {
	if ws.Signaled() {
		r.finish(c, 128+uint32(ws.Signal()), ws.Signal() == unix.SIGKILL)
	} else {
		r.finish(c, uint32(ws.ExitStatus()), false)
	}
}

func (r *reaper) finish(c *child, status uint32, killed bool) {
	if r.children[c.pid] == c {
		delete(r.children, c.pid)
	}
	c.status, c.signal, c.at = status, killed, time.Now().UTC()
	close(c.done)
}

// run sweeps whenever a child may have ended, until quit is closed.
func (r *reaper) run() {
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, unix.SIGCHLD)
	defer signal.Stop(sig)
	var again <-chan time.Time
	for {
		select {
		case <-sig:
		case <-again:
		case <-r.quit:
			return
		}
		again = nil
		if !r.sweep() {
			again = time.After(100 * time.Millisecond)
		}
	}
}

// sweep reaps every zombie; false if a runtime call is under way.
func (r *reaper) sweep() bool {
	if !r.calls.TryLock() {
		return false
	}
	defer r.calls.Unlock()
	for {
		r.mu.Lock()
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			r.mu.Unlock()
			continue
		}
		if err != nil || pid <= 0 {
			r.mu.Unlock()
			return true
		}
		if c := r.children[pid]; c != nil && !r.reaped(c) {
			r.finishStatus(c, ws)
		}
		r.mu.Unlock()
	}
}
