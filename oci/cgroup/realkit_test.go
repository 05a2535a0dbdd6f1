//go:build linux

package cgroup

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// hangLimit ends what hangs. Nothing is measured by it.
const hangLimit = 5 * time.Minute

// childEnv makes a copy of the test binary do something inside a cgroup.
const childEnv = "HAKO_TEST_CGROUP_CHILD"

// A goroutine that an init function locks to its thread runs main on the process's first
// thread, whose ID is the process's. Without it main may be moved to another thread when a
// system call takes long, and what that one does to itself is not done to the first.
func init() {
	if os.Getenv(childEnv) != "" {
		runtime.LockOSThread()
	}
}

func TestMain(m *testing.M) {
	if what := os.Getenv(childEnv); what != "" {
		childMain(what)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// childMain waits for a line on stdin, which tells that it is in its cgroup.
func childMain(what string) {
	name, arg, _ := strings.Cut(what, " ")
	if name == "doors" { // comes in by itself
		for i := range 16 {
			if n, err := unix.Write(3+i, []byte("0")); err != nil || n != 1 {
				break
			}
		}
	}
	in := bufio.NewReader(os.Stdin)
	if _, err := in.ReadString('\n'); err != nil {
		os.Exit(1)
	}
	switch name {
	case "open": // "path r": prints the error of opening it
		path, how, _ := strings.Cut(arg, " ")
		flags := map[string]int{"r": unix.O_RDONLY, "w": unix.O_WRONLY, "rw": unix.O_RDWR}[how]
		for {
			fd, err := unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
			unix.Close(fd)
			fmt.Println(err)
			if _, err := in.ReadString('\n'); err != nil {
				return
			}
		}
	case "eat": // memory, without end
		var hold [][]byte
		for {
			b := make([]byte, 1<<20)
			for i := 0; i < len(b); i += 4096 {
				b[i] = 1
			}
			hold = append(hold, b)
			runtime.KeepAlive(hold)
		}
	case "spin":
		fmt.Println("spinning")
		for {
			runtime.Gosched()
		}
	case "fork": // fork without pause: each one does for a moment
		fmt.Println("forking")
		_ = exec.Command("/bin/sh", "-c", "f() { f & f & sleep 600; }; for i in 1 2 3 4 5 6 7; do (sleep 600 & sleep 600 & sleep 600 &) & done; sleep 600").Run()
	}
	_, _ = io.Copy(io.Discard, in) // until killed
}

type child struct {
	*exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startChild(t *testing.T, what string, files ...*os.File) *child {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+what, "GOMAXPROCS=1")
	cmd.ExtraFiles = files
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return &child{cmd, in, bufio.NewReader(out)}
}

func (c *child) ask(t *testing.T) string {
	t.Helper()
	if _, err := io.WriteString(c.in, "\n"); err != nil {
		t.Fatal(err)
	}
	line, err := c.out.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(line)
}

var counter atomic.Int64

// real makes a cgroup on this machine, and sees to it that nothing of it stays.
func real(t *testing.T) *Cgroup {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skipf("needs root: %s makes cgroups", t.Name())
	}
	l, err := Detect()
	if err != nil {
		t.Skipf("needs cgroups: %s: %v", t.Name(), err)
	}
	top := fmt.Sprintf("/hako-test-%d-%d", os.Getpid(), counter.Add(1))
	c, err := l.New(top + "/sub")
	if err != nil {
		if errors.Is(err, os.ErrPermission) || errors.Is(err, unix.EROFS) {
			t.Skipf("needs a writable cgroup file system: %s: %v", t.Name(), err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Kill(); err != nil {
			t.Error(err)
		}
		up := &Cgroup{v1: map[string]string{}}
		for name, dir := range c.v1 {
			up.v1[name] = filepath.Dir(dir)
		}
		if c.v2 != "" {
			up.v2 = filepath.Dir(c.v2)
		}
		if err := up.Delete(); err != nil || up.Exists() {
			t.Errorf("cgroup stays: %v", err)
		}
	})
	return c
}

// needs skips a test where the machine's cgroups lack the controller.
func needs(t *testing.T, c *Cgroup, controllers ...string) {
	t.Helper()
	p := planner{c: c}
	for _, name := range controllers {
		if _, _, err := p.find(name, name); err != nil {
			t.Skipf("needs the cgroup controller %s: %s", name, t.Name())
		}
	}
}

func defaultResources() *specs.LinuxResources {
	return &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(int64(256 << 20)), Swap: ptr(int64(512 << 20))},
		CPU:    &specs.LinuxCPU{Shares: ptr(uint64(512)), Quota: ptr(int64(50000)), Period: ptr(uint64(100000))},
		Pids:   &specs.LinuxPids{Limit: ptr(int64(100))},
		Devices: append(append([]specs.LinuxDeviceCgroup{{Access: "rwm"}}, specs.LinuxDeviceCgroup{
			Allow: true, Type: "c", Major: ptr(int64(10)), Minor: ptr(int64(229)), Access: "rw",
		}), DefaultDevices()...),
	}
}

// value reads a setting wherever this machine has it.
func value(t *testing.T, c *Cgroup, controller, v1, v2 string) string {
	t.Helper()
	file := c.v2 + "/" + v2
	if dir, ok := c.v1[controller]; ok {
		file = dir + "/" + v1
	}
	s, err := readString(file)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// keepSubtreeControl takes back, at the end of the test, what it has handed down from
// the top of a hybrid machine's v2 hierarchy.
func keepSubtreeControl(t *testing.T) {
	t.Helper()
	l, err := Detect()
	if err != nil || l.Mode != Hybrid {
		return
	}
	file := l.Hierarchies[len(l.Hierarchies)-1].Mount + "/cgroup.subtree_control"
	before, err := readString(file)
	if err != nil || strings.Contains(before, "hugetlb") {
		return
	}
	t.Cleanup(func() { _ = writeFile(file, "-hugetlb") }) // others may have come to use it
}

// each runs a test for the cgroup as it is, and in hybrid mode without v2 too, so that
// the v1 freezer is tried.
func each(t *testing.T, run func(t *testing.T, c *Cgroup)) {
	t.Run("as it is", func(t *testing.T) {
		t.Parallel()
		run(t, real(t))
	})
	t.Run("v1 alone", func(t *testing.T) {
		t.Parallel()
		c := real(t)
		if len(c.v1) == 0 {
			t.Skipf("needs cgroup v1: %s", t.Name())
		}
		run(t, &Cgroup{v1: c.v1})
	})
}
