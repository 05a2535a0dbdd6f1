//go:build linux && (amd64 || arm64)

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci"
	"github.com/hako-engine/hako/oci/early"
)

// The container's process tells a socket of its own that it is ready (sd_notify(3)), and we
// tell whoever has called us: he need not be reachable from the container, and learns of the
// process as the host knows it.

const (
	notifyTarget = "/run/notify" // in the container
	notifyName   = "notify.sock"
	// barrierLimit bounds how long the receiver may take to say that it has read everything.
	barrierLimit = 30 * time.Second
)

// notifier is nil where nobody wants to be told.
type notifier struct {
	host string // the caller's socket
	dir  string // what the container sees
	made bool   // by us
	fd   int    // -1: not bound
}

// notifyDir has a name that is not one of a container.
func notifyDir(root, id string) string { return filepath.Join(root, id+early.NotifyDir) }

// removeNotify removes what the notifier of a container has left.
func removeNotify(root, id string) {
	dir := notifyDir(root, id)
	if unix.Rmdir(dir) == unix.ENOTEMPTY {
		_ = unix.Unlink(filepath.Join(dir, notifyName))
		_ = unix.Rmdir(dir)
	}
}

func (a *app) notifier(id string) (*notifier, error) {
	host := os.Getenv("NOTIFY_SOCKET")
	if host == "" || oci.CheckID(id) != nil {
		return nil, nil
	}
	root, err := filepath.Abs(a.rt.Root)
	if err != nil {
		return nil, err
	}
	return &notifier{host: host, dir: notifyDir(root, id), fd: -1}, nil
}

// show makes the socket visible in the container.
func (n *notifier) show(s *specs.Spec) {
	if n == nil {
		return
	}
	s.Mounts = append(s.Mounts, specs.Mount{Destination: notifyTarget, Source: n.dir, Options: []string{"bind", "nosuid", "noexec", "nodev", "ro"}})
	s.Process.Env = append(s.Process.Env, "NOTIFY_SOCKET="+notifyTarget+"/"+notifyName)
}

func (n *notifier) makeDir() error {
	if n == nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(n.dir), 0o711); err != nil {
		return err
	}
	if err := os.Mkdir(n.dir, 0o755); err != nil {
		if errors.Is(err, os.ErrExist) {
			return fmt.Errorf("container with given ID already exists, or its %s: %w", n.dir, err)
		}
		return err
	}
	n.made = true
	return os.Chmod(n.dir, 0o755)
}

// listen binds the container's socket. Without fresh nothing happens for a container that
// was created without a socket.
func (n *notifier) listen(fresh bool) error {
	if n == nil {
		return nil
	}
	if fresh {
		if err := n.makeDir(); err != nil {
			return err
		}
	}
	dir, err := unix.Open(n.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		if !fresh && err == unix.ENOENT {
			return nil
		}
		return &os.PathError{Op: "open", Path: n.dir, Err: err}
	}
	defer unix.Close(dir)
	if err := unix.Unlinkat(dir, notifyName, 0); err != nil && err != unix.ENOENT {
		return fmt.Errorf("notify socket: %w", err)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("notify socket: %w", err)
	}
	n.fd = fd
	// The name of a socket has 107 bytes at most.
	path := fmt.Sprintf("/proc/self/fd/%d/%s", dir, notifyName)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return fmt.Errorf("notify socket: bind: %w", err)
	}
	return unix.Fchmodat(dir, notifyName, 0o777, 0)
}

func (n *notifier) close() {
	if n != nil && n.fd >= 0 {
		unix.Close(n.fd)
	}
}

// remove takes back what makeDir and listen have made.
func (n *notifier) remove() error {
	if n == nil || !n.made {
		return nil
	}
	return os.RemoveAll(n.dir)
}

// forward waits until the container says that it is ready, or has ended, and passes that on.
func (n *notifier) forward(pid int, process *os.File) error {
	if n == nil || n.fd < 0 {
		return nil
	}
	buf := make([]byte, 4096)
	for {
		p := []unix.PollFd{{Fd: int32(n.fd), Events: unix.POLLIN}, {Fd: int32(process.Fd()), Events: unix.POLLIN}}
		if _, err := unix.Poll(p, -1); err != nil && err != unix.EINTR {
			return fmt.Errorf("notify socket: %w", err)
		}
		if p[0].Revents != 0 {
			k, err := unix.Read(n.fd, buf)
			if err != nil && err != unix.EAGAIN && err != unix.EINTR {
				return fmt.Errorf("notify socket: %w", err)
			}
			for line := range bytes.SplitSeq(buf[:max(k, 0)], []byte{'\n'}) {
				if bytes.HasPrefix(line, []byte("READY=")) {
					return n.tell(string(line), pid)
				}
			}
			continue
		}
		if p[1].Revents != 0 {
			return nil
		}
	}
}

// tell passes the word on, and waits until it has been read (sd_notify_barrier(3)): systemd
// looks up who has sent it, and we may end before.
func (n *notifier) tell(ready string, pid int) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("NOTIFY_SOCKET: %w", err)
	}
	defer unix.Close(fd)
	to := &unix.SockaddrUnix{Name: n.host}
	if err := unix.Sendto(fd, []byte(ready+"\nMAINPID="+strconv.Itoa(pid)+"\n"), 0, to); err != nil {
		return fmt.Errorf("NOTIFY_SOCKET: %w", err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	err = unix.Sendmsg(fd, []byte("BARRIER=1"), unix.UnixRights(int(w.Fd())), to, 0)
	w.Close()
	if err != nil {
		return fmt.Errorf("NOTIFY_SOCKET: %w", err)
	}
	p := []unix.PollFd{{Fd: int32(r.Fd()), Events: unix.POLLIN}}
	for deadline := time.Now().Add(barrierLimit); ; {
		left := time.Until(deadline)
		k, err := unix.Poll(p, int(max(left, 0).Milliseconds()))
		if k > 0 || left <= 0 || err != nil && err != unix.EINTR {
			return nil
		}
	}
}
