//go:build linux && (amd64 || arm64)

package main

import (
	"bytes"
	"encoding/binary"
	"runtime/debug"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// monitorSlack is how late the Go runtime's monitor may wake, in nanoseconds.
const monitorSlack = 2000000

// What entry_GOARCH.s has found, where that was the way in.
var (
	// ownSlack is how late this process may wake, in nanoseconds. Its threads have
	// monitorSlack instead.
	ownSlack int
	// ownFiles is the limit of descriptors, soft and hard. The soft one is noFiles', 0,
	// until main begins.
	ownFiles, noFiles [2]uint64
)

// quietRuntime keeps the Go runtime from work that a process of a few milliseconds has
// nothing of: collecting garbage, and looking after goroutines that run too long. slack is
// the timer slack of processes that are made, see [oci.Runtime].
func quietRuntime() (slack int) {
	if ownSlack > 0 {
		return ownSlack
	}
	debug.SetGCPercent(-1)
	quietMonitor()
	return 0
}

// quietMonitor lets the thread on which the Go runtime watches over the others wake less
// often than every 70 µs, which costs a short-lived process an eighth of its time: the
// goroutines that it is there to interrupt do not exist here. It takes /proc, and
// CAP_SYS_NICE; without, nothing changes.
//
// With entry_GOARCH.s the monitor inherits the slack, and so do all other threads. To give
// one of them its own back, and let no other make processes, would take a goroutine that is
// locked to its thread, for which the Go runtime makes one more.
func quietMonitor() {
	dir, err := unix.Open("/proc/self/task", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	var buf [512]byte
	n, err := unix.Getdents(dir, buf[:])
	unix.Close(dir)
	for b := buf[:max(n, 0)]; err == nil && len(b) > 19; {
		size := int(binary.NativeEndian.Uint16(b[16:]))
		if size < 20 || size > len(b) {
			return
		}
		name, _, _ := bytes.Cut(b[19:size], []byte{0})
		b = b[size:]
		tid, err := strconv.Atoi(string(name))
		if err != nil || tid == unix.Getpid() {
			continue
		}
		fd, err := unix.Open("/proc/"+string(name)+"/timerslack_ns", unix.O_WRONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			_, _ = unix.Write(fd, []byte(strconv.Itoa(monitorSlack)))
			unix.Close(fd)
		}
		return
	}
}

// returnFiles gives the descriptors back that entry_GOARCH.s has taken away. The Go runtime
// has raised the soft limit meanwhile, and would restore what it has found, nothing, in the
// processes that it makes.
func returnFiles() {
	if ownFiles != noFiles {
		_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: ownFiles[0], Max: ownFiles[1]})
	}
}
