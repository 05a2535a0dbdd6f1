//go:build linux && (amd64 || arm64)

package launch

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"unsafe"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/internal/rawfile"
	"github.com/hako-engine/hako/oci/plan"
)

// userNamespace makes a user namespace that nobody lives in: a child is born in it, and
// ends as soon as it is open.
func userNamespace(uids, gids []specs.LinuxIDMapping) (_ *os.File, err error) {
	const wait = 0 // slot of the pipe that the child reads from
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("pipe: %w", err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	var mem memory
	defer mem.release()
	m := &machine{mem: &mem, slots: mem.words([]int64{int64(pipe[0])})}
	next := func(i int, nr uintptr, args ...plan.Arg) plan.Step {
		return plan.Step{Nr: nr, Args: args, Fill: plan.NoSlot, Expect: -1, OnOK: i + 1}
	}
	num := func(v uint64) plan.Arg { return plan.Arg{Int: v} }
	steps := []plan.Step{
		next(0, unix.SYS_READ, plan.Arg{Kind: plan.ArgSlot, Slot: wait}, plan.Arg{Kind: plan.ArgBuffer}, num(1)),
		next(1, unix.SYS_EXIT_GROUP, num(0)),
	}
	if err := m.load(steps, mem.alloc(plan.BufferSize)); err != nil {
		return nil, err
	}
	args := &cloneArgs{flags: unix.CLONE_NEWUSER, exitSignal: uint64(unix.SIGCHLD)}
	pid, err := m.clone(args)
	runtime.KeepAlive(m)
	if err != nil {
		return nil, fmt.Errorf("clone: %w", err)
	}
	defer reap(pid)
	defer unix.Kill(pid, unix.SIGKILL)
	for _, k := range []struct {
		file string
		maps []specs.LinuxIDMapping
	}{{"uid_map", uids}, {"gid_map", gids}} {
		if err := rawfile.Put(fmt.Sprintf("/proc/%d/%s", pid, k.file), MapText(k.maps)); err != nil {
			return nil, err
		}
	}
	return os.Open(fmt.Sprintf("/proc/%d/ns/user", pid))
}

// MapText gives maps in the form of uid_map and gid_map.
func MapText(maps []specs.LinuxIDMapping) string {
	var b strings.Builder
	for _, e := range maps {
		fmt.Fprintf(&b, "%d %d %d\n", e.ContainerID, e.HostID, e.Size)
	}
	return b.String()
}

// cloneOn clones while the calling thread, and therefore the child, runs on the CPUs of
// mask only.
func cloneOn(mask []byte, m *machine, args *cloneArgs) (pid int, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	old := make([]byte, 1024) // 8192 CPUs
	n, _, e := unix.RawSyscall(unix.SYS_SCHED_GETAFFINITY, 0, uintptr(len(old)), uintptr(unsafe.Pointer(&old[0])))
	if e != 0 {
		return 0, os.NewSyscallError("sched_getaffinity", e)
	}
	set := func(mask []byte) error {
		_, _, e := unix.RawSyscall(unix.SYS_SCHED_SETAFFINITY, 0, uintptr(len(mask)), uintptr(unsafe.Pointer(&mask[0])))
		if e != 0 {
			return os.NewSyscallError("sched_setaffinity", e)
		}
		return nil
	}
	if err := set(mask); err != nil {
		return 0, fmt.Errorf("process.execCPUAffinity.initial: %w", err)
	}
	pid, err = m.clone(args)
	if e := set(old[:n]); e != nil && err == nil {
		// The thread is of no use any more, the child is all right.
		runtime.LockOSThread()
	}
	return pid, err
}
