// Command probe makes system calls that a container should not be able to make, and prints
// a line with the name and the errno of each.
package main

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

func main() {
	call := func(name string, nr uintptr, a ...uintptr) {
		a = append(a, make([]uintptr, 6)...)
		r, _, errno := syscall.RawSyscall6(nr, a[0], a[1], a[2], a[3], a[4], a[5])
		if errno == 0 {
			fmt.Println(name, "OK", r)
			return
		}
		fmt.Println(name, unix.ErrnoName(errno))
	}
	call("AF_ALG", unix.SYS_SOCKET, unix.AF_ALG, unix.SOCK_SEQPACKET, 0)
	call("AF_VSOCK", unix.SYS_SOCKET, unix.AF_VSOCK, unix.SOCK_STREAM, 0)
	call("keyctl", unix.SYS_KEYCTL, unix.KEYCTL_GET_KEYRING_ID, ^uintptr(2), 1) // the session keyring
	call("userfaultfd", unix.SYS_USERFAULTFD, 0)
	call("bpf", unix.SYS_BPF, 0, 0, 0)
	call("io_uring", unix.SYS_IO_URING_SETUP, 1, 0)
	call("perf", unix.SYS_PERF_EVENT_OPEN, 0, 0, 0, 0, 0)
	call("kexec", unix.SYS_KEXEC_LOAD, 0, 0, 0, 0)
	call("init_module", unix.SYS_INIT_MODULE, 0, 0, 0)
	call("open_by_handle", unix.SYS_OPEN_BY_HANDLE_AT, ^uintptr(0), 0, 0)
	call("fsopen", unix.SYS_FSOPEN, 0, 0)
	call("setns", unix.SYS_SETNS, ^uintptr(0), 0)
	call("unshare_user", unix.SYS_UNSHARE, unix.CLONE_NEWUSER)
	call("clone_user", unix.SYS_CLONE, unix.CLONE_NEWUSER|unix.CLONE_SIGHAND) // invalid, when it passes the filter
}
