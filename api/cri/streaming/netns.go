package streaming

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// dialLimit bounds a connection to a pod's loopback, where an answer takes microseconds.
const dialLimit = 10 * time.Second

// dialLoopback connects to a TCP port of the loopback of a network namespace, over
// IPv4, or IPv6 if that fails. An empty path is the namespace of this process.
//
// Only the sockets are made inside the namespace, on a thread that goes back or ends.
// A socket belongs to its namespace for ever, so everything else happens outside. The
// thread runs nothing of the pod, and nothing but its network changes.
func dialLoopback(ctx context.Context, netns string, port uint16) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel()
	v4, err4 := dialFamily(ctx, netns, &unix.SockaddrInet4{Port: int(port), Addr: [4]byte{127, 0, 0, 1}})
	if err4 == nil {
		return v4, nil
	}
	v6, err6 := dialFamily(ctx, netns, &unix.SockaddrInet6{Port: int(port), Addr: [16]byte{15: 1}})
	if err6 == nil {
		return v6, nil
	}
	if errdefs.IsNotFound(err4) { // there is no such namespace
		return nil, err4
	}
	p := strconv.Itoa(int(port))
	return nil, fmt.Errorf("connect to 127.0.0.1:%s: %w; to [::1]:%s: %w: %w", p, err4, p, err6, errdefs.ErrUnavailable)
}

func dialFamily(ctx context.Context, netns string, to unix.Sockaddr) (*net.TCPConn, error) {
	family := unix.AF_INET
	if _, ok := to.(*unix.SockaddrInet6); ok {
		family = unix.AF_INET6
	}
	fd, err := socketIn(netns, family)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close() // net.FileConn has its own descriptor
	if err := connect(ctx, f, to); err != nil {
		return nil, err
	}
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}

// connect waits for the connection on the runtime's poller.
func connect(ctx context.Context, f *os.File, to unix.Sockaddr) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	started := false
	var result error
	err = raw.Write(func(fd uintptr) bool {
		if !started {
			started = true
			result = unix.Connect(int(fd), to)
			return !errors.Is(result, unix.EINPROGRESS)
		}
		errno, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if result = err; err == nil && errno != 0 {
			result = unix.Errno(errno)
		}
		return true
	})
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return err
	}
	return result
}

// socketIn makes a non-blocking TCP socket inside a network namespace.
func socketIn(netns string, family int) (int, error) {
	socket := func() (int, error) {
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		if err != nil {
			return -1, os.NewSyscallError("socket", err)
		}
		return fd, nil
	}
	if netns == "" {
		return socket()
	}
	ns, err := openNetns(netns)
	if err != nil {
		return -1, err
	}
	defer unix.Close(ns)
	type result struct {
		fd  int
		err error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // a goroutine that ends locked takes its thread with it
		home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			runtime.UnlockOSThread()
			done <- result{-1, &os.PathError{Op: "open", Path: "/proc/thread-self/ns/net", Err: err}}
			return
		}
		defer unix.Close(home)
		if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			done <- result{-1, os.NewSyscallError("setns", err)}
			return
		}
		fd, err := socket()
		if unix.Setns(home, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- result{fd, err}
	}()
	r := <-done
	return r.fd, r.err
}

// openNetns opens the path of a network namespace, and nothing else that may lie there.
func openNetns(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		class := error(errdefs.ErrInternal)
		if errors.Is(err, unix.ENOENT) {
			class = errdefs.ErrNotFound
		}
		return -1, fmt.Errorf("open network namespace %s: %w: %w", path, err, class)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil || int64(st.Type) != unix.NSFS_MAGIC {
		unix.Close(fd)
		return -1, fmt.Errorf("%s is no namespace: %w", path, errdefs.ErrNotFound)
	}
	return fd, nil
}
