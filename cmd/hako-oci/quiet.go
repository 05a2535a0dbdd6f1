//go:build linux && (amd64 || arm64)

package main

import (
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/quiet"
)

// monitorSlack is how late the Go runtime's monitor may wake, in nanoseconds.
const monitorSlack = 2000000

// ownSlack is how late this process may wake, in nanoseconds, if entry_GOARCH.s has set
// monitorSlack instead.
var ownSlack int

// quietMonitor lets the thread on which the Go runtime watches over the others wake less
// often than every 70 µs, which costs a short-lived process an eighth of its time: the
// goroutines that it is there to interrupt do not exist here. The monitor is the first
// thread that the process makes, and inherits the slack of the one that makes it. So will
// every process: this thread gets its own back, and is the one that makes them.
func quietMonitor() {
	if ownSlack > 0 {
		runtime.LockOSThread()
		_ = unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(ownSlack), 0, 0, 0)
		return
	}
	quiet.Monitor(monitorSlack) // built without the linker's flag
}
