//go:build linux && (amd64 || arm64)

package main

import (
	"bytes"
	"encoding/binary"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
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
	// Built without the linker's flag: it takes /proc, and CAP_SYS_NICE. Without, nothing
	// changes.
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
