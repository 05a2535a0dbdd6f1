package ociexec

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// consoleTimeout bounds the wait for a terminal after the runtime has returned.
const consoleTimeout = 5 * time.Second

// consoleSocket is where a runtime sends the pty master to (--console-socket).
type consoleSocket struct {
	dir, path string
	l         *net.UnixListener
}

func newConsoleSocket() (*consoleSocket, error) {
	// Not in the bundle: the runtime connects by the path, which may hold 107 bytes.
	dir, err := os.MkdirTemp("", "hako-tty-*")
	if err != nil {
		return nil, err
	}
	c := &consoleSocket{dir: dir, path: filepath.Join(dir, "s")}
	if c.l, err = net.ListenUnix("unix", &net.UnixAddr{Name: c.path, Net: "unix"}); err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	return c, nil
}

func (c *consoleSocket) close() {
	c.l.Close()
	os.RemoveAll(c.dir)
}

// receive gives the pty master.
func (c *consoleSocket) receive() (*os.File, error) {
	c.l.SetDeadline(time.Now().Add(consoleTimeout))
	conn, err := c.l.AcceptUnix()
	if err != nil {
		return nil, fmt.Errorf("receive terminal: %w", err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(consoleTimeout))
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4*4))
	_, n, _, _, err := conn.ReadMsgUnix(buf, oob)
	if err != nil {
		return nil, fmt.Errorf("receive terminal: %w", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return nil, fmt.Errorf("receive terminal: %w", err)
	}
	var fds []int
	for i := range msgs {
		got, err := unix.ParseUnixRights(&msgs[i])
		if err == nil {
			fds = append(fds, got...)
		}
	}
	if len(fds) == 0 {
		return nil, errors.New("receive terminal: no file descriptor in the message")
	}
	for _, fd := range fds[1:] {
		unix.Close(fd)
	}
	unix.CloseOnExec(fds[0])
	return os.NewFile(uintptr(fds[0]), "console"), nil
}
