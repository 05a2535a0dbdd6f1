//go:build linux

package seccomp

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// childEnv holds the profile for a copy of the test binary that puts itself under it.
const childEnv = "HAKO_TEST_SECCOMP_PROFILE"

func TestMain(m *testing.M) {
	if p := os.Getenv(childEnv); p != "" {
		runtime.LockOSThread()
		if err := underFilter(p); err != nil {
			fmt.Println("error:", err)
			os.Exit(3)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// underFilter installs the filter and reports what some system calls then do.
func underFilter(text string) error {
	var p specs.LinuxSeccomp
	if err := json.Unmarshal([]byte(text), &p); err != nil {
		return err
	}
	f, err := Compile(&p, Options{})
	if err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	prog := unix.SockFprog{Len: uint16(len(f.Program)), Filter: &f.Program[0]}
	const setModeFilter = 1
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, setModeFilter, uintptr(f.Flags), uintptr(unsafe.Pointer(&prog))); errno != 0 {
		return fmt.Errorf("seccomp(2): %w", errno)
	}
	say := func(name string, nr uintptr, args ...uintptr) {
		var a [3]uintptr
		copy(a[:], args)
		_, _, errno := unix.RawSyscall(nr, a[0], a[1], a[2])
		fmt.Printf("%s %d\n", name, int(errno))
	}
	say("getpid", unix.SYS_GETPID)
	say("personality-query", unix.SYS_PERSONALITY, 0xffffffff)
	say("personality-odd", unix.SYS_PERSONALITY, 0x1234)
	say("socket-40", unix.SYS_SOCKET, 40, 1, 0) // AF_VSOCK
	say("setns", unix.SYS_SETNS, ^uintptr(0), 0)
	say("future", 1000)
	say("sethostname", unix.SYS_SETHOSTNAME, 0, 0)
	say("exit", unix.SYS_EXIT_GROUP, 0)
	return errors.New("exit_group came back")
}

// TestInstalled puts real processes under filters.
func TestInstalled(t *testing.T) {
	t.Parallel()
	run := func(t *testing.T, p *specs.LinuxSeccomp) (string, syscall.WaitStatus) {
		t.Helper()
		text, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), childEnv+"="+string(text))
		out, _ := cmd.CombinedOutput()
		return string(out), cmd.ProcessState.Sys().(syscall.WaitStatus)
	}
	t.Run("docker", func(t *testing.T) {
		t.Parallel()
		p := dockerProfile(t, runtime.GOARCH)
		p.Flags = []specs.LinuxSeccompFlag{"SECCOMP_FILTER_FLAG_TSYNC"}
		out, status := run(t, p)
		got := strings.Fields(out)
		for _, want := range [][]string{
			{"getpid", "0"}, {"personality-query", "0"}, {"personality-odd", "1"}, {"socket-40", "1"}, {"setns", "1"}, {"future", "38"}, {"sethostname", "1"},
		} {
			if i := slices.Index(got, want[0]); i < 0 || got[i+1] != want[1] {
				t.Errorf("%v is not in:\n%s", want, out)
			}
		}
		if status != 0 {
			t.Errorf("wait status is %#x", status)
		}
	})
	t.Run("kill", func(t *testing.T) {
		t.Parallel()
		out, status := run(t, &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
			callRule(specs.ActErrno, uintp(uint(unix.EXDEV)), "setns"),
			callRule(specs.ActKillProcess, nil, "sethostname", arg(1, specs.OpEqualTo, 0)),
		}})
		if !strings.Contains(out, "setns 18\n") || strings.Contains(out, "sethostname") || !status.Signaled() || status.Signal() != unix.SIGSYS {
			t.Errorf("wait status is %#x, output:\n%s", status, out)
		}
	})
}
