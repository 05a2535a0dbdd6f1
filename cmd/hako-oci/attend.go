//go:build linux && (amd64 || arm64)

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"
)

// attend waits for a child in the foreground: it forwards signals, relays the terminal,
// reaps, and gives the exit code.
func attend(pid int, pidfd, console *os.File) (int, error) {
	err := forward(int(pidfd.Fd()), unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGCONT, unix.SIGTSTP)
	if err != nil {
		return 0, err
	}
	var t *terminal
	if console != nil {
		if t, err = relay(console); err != nil {
			return 0, err
		}
		defer t.restore()
		sizes := make(chan os.Signal, 1)
		signal.Notify(sizes, unix.SIGWINCH)
		defer signal.Stop(sizes)
		go func() {
			for range sizes {
				t.resize()
			}
		}()
	}
	var ws unix.WaitStatus
	for {
		_, err := unix.Wait4(pid, &ws, 0, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("wait for process %d: %w", pid, err)
		}
		break
	}
	if t != nil {
		t.drain()
	}
	if ws.Signaled() {
		return 128 + int(ws.Signal()), nil
	}
	return ws.ExitStatus(), nil
}

// terminal connects the container's terminal with ours.
type terminal struct {
	console *os.File
	saved   *unix.Termios
	done    chan struct{}
}

func relay(console *os.File) (*terminal, error) {
	t := &terminal{console: console, done: make(chan struct{})}
	in := int(os.Stdin.Fd())
	if saved, err := unix.IoctlGetTermios(in, unix.TCGETS); err == nil {
		raw := *saved
		raw.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
		raw.Oflag &^= unix.OPOST
		raw.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
		raw.Cflag = raw.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
		raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
		if err := unix.IoctlSetTermios(in, unix.TCSETS, &raw); err != nil {
			return nil, fmt.Errorf("set the terminal to raw mode: %w", err)
		}
		t.saved = saved
		t.resize()
	}
	go func() { _, _ = io.Copy(console, os.Stdin) }()
	go func() {
		defer close(t.done)
		// The end of a terminal reads as EIO.
		if _, err := io.Copy(os.Stdout, console); err != nil && !errors.Is(err, unix.EIO) {
			fmt.Fprintln(os.Stderr, "hako-oci: terminal:", err)
		}
	}()
	return t, nil
}

func (t *terminal) resize() {
	if ws, err := unix.IoctlGetWinsize(int(os.Stdin.Fd()), unix.TIOCGWINSZ); err == nil {
		_ = unix.IoctlSetWinsize(int(t.console.Fd()), unix.TIOCSWINSZ, ws)
	}
}

// drain waits for what is left to read. Somebody else may keep the terminal open.
func (t *terminal) drain() {
	select {
	case <-t.done:
	case <-time.After(time.Second):
	}
}

func (t *terminal) restore() {
	if t.saved != nil {
		_ = unix.IoctlSetTermios(int(os.Stdin.Fd()), unix.TCSETS, t.saved)
	}
}
