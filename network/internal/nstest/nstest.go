//go:build linux

// Package nstest runs the tests of the network room in a network and a mount namespace of their own: nothing of the
// host's is touched.
//
// In flows a testing.M; out flows the end of the process.
package nstest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// inside is the variable of the environment that tells the process in the namespaces that it is there.
const inside = "HAKO_NETWORK_TEST_NAMESPACE"

// Main is for a package's TestMain, and does not return. The tests run in a child of this process, where prepare (which may be
// nil) is called first; without root, or where the kernel refuses the namespaces, they run here.
func Main(m *testing.M, prepare func() error) {
	if os.Geteuid() != 0 {
		os.Exit(m.Run())
	}
	if os.Getenv(inside) != "" {
		err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		if err == nil && prepare != nil {
			err = prepare()
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "prepare the namespaces of the tests:", err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	c := exec.Command("/proc/self/exe", os.Args[1:]...)
	c.Env = append(os.Environ(), inside+"=1")
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := c.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		os.Exit(0)
	case errors.As(err, &exit):
		os.Exit(max(exit.ExitCode(), 1))
	}
	fmt.Fprintln(os.Stderr, "the tests have no namespaces of their own:", err)
	os.Exit(m.Run())
}

// NeedRoot skips a test that runs without such namespaces.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Getenv(inside) == "" {
		t.Skip("needs root: " + t.Name())
	}
}
