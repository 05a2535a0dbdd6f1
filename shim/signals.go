package shim

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ResetSignals takes back that the caller ignores the two signals which the C library
// keeps for itself (32 and 33) and which the Go runtime therefore leaves alone: GNU make,
// for one, hands them on ignored, and a foreign runtime would pass that to its container.
func ResetSignals() {
	var dfl [4]uint64 // struct kernel_sigaction of rt_sigaction(2), all zero: SIG_DFL
	for _, sig := range []uintptr{32, 33} {
		unix.RawSyscall6(unix.SYS_RT_SIGACTION, sig, uintptr(unsafe.Pointer(&dfl)), 0, 8, 0, 0)
	}
}
