//go:build linux && (amd64 || arm64)

package main

import (
	"runtime/debug"
	"syscall"

	"github.com/hako-engine/hako/internal/quiet"
	"github.com/hako-engine/hako/oci/early"
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

// beforeRuntime does what needs no Go runtime. With noG for the current goroutine no function
// finds its stack too small.
var (
	beforeRuntime = early.Run //lint:ignore U1000 the assembly uses it
	noG           [512]byte   //lint:ignore U1000 the assembly uses it
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
func quietMonitor() { quiet.Monitor(monitorSlack) }

// returnFiles gives the descriptors back that entry_GOARCH.s has taken away. The Go runtime
// has raised the soft limit meanwhile, and would restore what it has found, nothing, in the
// processes that it makes.
func returnFiles() {
	if ownFiles != noFiles {
		_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: ownFiles[0], Max: ownFiles[1]})
	}
}
