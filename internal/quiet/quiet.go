//go:build linux

// Package quiet lets the Go runtime disturb a program less often.
//
// In flows how late its monitor may wake; out flows nothing, and nothing fails: what cannot be set stays as it is.
package quiet

import (
	"bytes"
	"encoding/binary"
	"strconv"

	"golang.org/x/sys/unix"
)

// Monitor lets the thread on which the Go runtime watches over the others wake up to so many nanoseconds late. It
// wakes every 70 µs while there is something to do, mostly on the processor of the thread that does it, and so takes an eighth
// of the time of a program that works for some milliseconds. In return a goroutine whose processor is held by another one's system call
// waits up to that long for it.
//
// The monitor is the first thread that the runtime makes. It takes /proc, and CAP_SYS_NICE: without, nothing changes.
func Monitor(slack int) {
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
			_, _ = unix.Write(fd, []byte(strconv.Itoa(slack)))
			unix.Close(fd)
		}
		return
	}
}
