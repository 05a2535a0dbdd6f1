//go:build linux

// Package pid1 is the small init of containers that are started with --init, and of pods
// whose containers share a PID namespace.
//
// In flow a command line and the signals that the container gets; out flow the same
// signals to the command, and its exit status. Orphans that the kernel hands to it
// are reaped. It runs inside the container, with the container's rights.
package pid1

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

// Name is the file name under which a binary that holds this package acts as an init.
const Name = "docker-init"

// Exit statuses of a command that could not be started, as in a shell.
const (
	exitNotRunnable = 126
	exitNotFound    = 127
)

// Run starts args (after an optional --) and stays until it has ended. It gives the
// status to exit with: the command's own, or 128 and the signal that ended it. Instead of a
// command, --pause reaps until SIGTERM, and --hold waits for the end of the input.
func Run(args []string, stderr io.Writer) int {
	switch {
	case len(args) == 1 && args[0] == "--pause":
		return pause()
	case len(args) == 1 && args[0] == "--hold":
		_, _ = io.Copy(io.Discard, os.Stdin)
		return 0
	case len(args) > 0 && args[0] == "--":
		args = args[1:]
	}
	if len(args) == 0 {
		fmt.Fprintln(stderr, "docker-init: no command")
		return exitNotFound
	}
	signals := make(chan os.Signal, 64)
	signal.Notify(signals) // before the start, so that none is lost
	pid, err := start(args)
	if err != nil {
		fmt.Fprintf(stderr, "docker-init: exec %s failed: %v\n", args[0], err)
		if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
			return exitNotFound
		}
		return exitNotRunnable
	}
	for s := range signals {
		switch s {
		case unix.SIGCHLD:
			if status, ended := reap(pid); ended {
				return status
			}
		case unix.SIGURG, unix.SIGTTIN, unix.SIGTTOU: // Go's own preemption; job control of the terminal
		default:
			_ = unix.Kill(pid, s.(syscall.Signal))
		}
	}
	return exitNotRunnable
}

// pause is the init of a PID namespace that has no command of its own: it reaps until it is
// told to end.
func pause() int {
	signals := make(chan os.Signal, 64)
	signal.Notify(signals, unix.SIGCHLD, unix.SIGTERM, unix.SIGINT)
	for s := range signals {
		if s != unix.SIGCHLD {
			return 0
		}
		reap(0)
	}
	return 0
}

// start runs the command in a process group of its own, in the foreground of the
// terminal if there is one.
func start(args []string) (int, error) {
	path, err := exec.LookPath(args[0])
	if err != nil {
		return 0, err
	}
	attr := &syscall.SysProcAttr{Setpgid: true}
	if _, err := unix.IoctlGetTermios(0, unix.TCGETS); err == nil {
		attr.Foreground = true // Ctty is 0
	}
	p, err := os.StartProcess(path, args, &os.ProcAttr{Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}, Sys: attr})
	if err != nil {
		return 0, err
	}
	pid := p.Pid
	return pid, p.Release() // reap waits for it with all others
}

// reap collects every child that has ended; ended tells that the command was one.
func reap(command int) (status int, ended bool) {
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
		switch {
		case err == unix.EINTR:
		case err != nil || pid <= 0:
			return status, ended
		case pid == command && ws.Signaled():
			status, ended = 128+int(ws.Signal()), true
		case pid == command:
			status, ended = ws.ExitStatus(), true
		}
	}
}
