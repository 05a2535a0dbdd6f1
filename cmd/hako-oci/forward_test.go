//go:build linux && (amd64 || arm64)

package main

import (
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestForward sends this process a signal that would end it, and finds that a child got it.
func TestForward(t *testing.T) {
	child := exec.Command("sleep", "3600")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(child.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	var before sigaction
	if err := actionOf(unix.SIGUSR2, nil, &before); err != nil {
		t.Fatal(err)
	}
	if err := forward(fd, unix.SIGUSR2); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = actionOf(unix.SIGUSR2, &before, nil) }()
	if err := unix.Kill(unix.Getpid(), unix.SIGUSR2); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait()
	if ws := child.ProcessState.Sys().(syscall.WaitStatus); ws.Signal() != syscall.SIGUSR2 {
		t.Errorf("the child ended with %v", child.ProcessState)
	}
}
