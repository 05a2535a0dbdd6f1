//go:build linux

// Package trim gives memory back that a program does not need between its bursts of work.
//
// In flows that something was done; out flows memory, to the kernel.
package trim

import (
	"bufio"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Heap collects garbage and gives back what is free of the heap.
func Heap() { debug.FreeOSMemory() }

// Program unmaps the pages of the program that cannot have been written to. Those that its start and a burst of
// work went through stay mapped for as long as the machine has memory to spare, and with the 64 KiB around each that was touched they are
// most of the program. MADV_DONTNEED unmaps them; they stay in the page cache, and one that is needed again costs a minor fault.
func Program() {
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		// start-end perms offset dev inode path
		fields := strings.Fields(lines.Text())
		if len(fields) < 6 || strings.Join(fields[5:], " ") != self || fields[1] != "r-xp" && fields[1] != "r--p" {
			continue
		}
		from, to, _ := strings.Cut(fields[0], "-")
		start, err1 := strconv.ParseUint(from, 16, 64)
		end, err2 := strconv.ParseUint(to, 16, 64)
		if err1 != nil || err2 != nil || end <= start {
			continue
		}
		dontNeed(uintptr(start), uintptr(end-start))
	}
}

// dontNeed is madvise(MADV_DONTNEED) for memory that is not Go's to have a slice of.
func dontNeed(start, size uintptr) {
	_, _, _ = unix.Syscall(unix.SYS_MADVISE, start, size, unix.MADV_DONTNEED)
}

// Timer calls a function some time after work began, as long as there is work: while nothing is done it costs nothing.
type Timer struct {
	after time.Duration
	do    func()
	armed atomic.Bool
}

// NewTimer makes a Timer. do should take much less time than after.
func NewTimer(after time.Duration, do func()) *Timer { return &Timer{after: after, do: do} }

// Busy notes work.
func (t *Timer) Busy() {
	if t.armed.Load() || t.armed.Swap(true) {
		return
	}
	time.AfterFunc(t.after, func() {
		t.armed.Store(false) // what begins now is not seen by do
		t.do()
	})
}
