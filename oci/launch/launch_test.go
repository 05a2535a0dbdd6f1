//go:build linux && (amd64 || arm64)

package launch

import (
	"bytes"
	"debug/elf"
	"errors"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/plan"
)

func number(v uint64) plan.Arg { return plan.Arg{Kind: plan.ArgInt, Int: v, Slot: plan.NoSlot} }
func text(s string) plan.Arg   { return plan.Arg{Kind: plan.ArgString, Str: s, Slot: plan.NoSlot} }
func slot(s plan.Slot) plan.Arg {
	return plan.Arg{Kind: plan.ArgSlot, Slot: s}
}

// steps numbers the steps one after the other where the test does not say otherwise.
func steps(s ...plan.Step) []plan.Step {
	for i := range s {
		if s[i].OnOK == 0 {
			s[i].OnOK = i + 1
		}
		if s[i].OnFail == 0 {
			s[i].OnFail = i + 1
		}
		if s[i].Op == plan.Call {
			s[i].Expect = -1
		}
	}
	return s
}

var fixed = []string{"sync", "report", "start", "stdin", "stdout", "stderr", "loader", "pidfd", "console", "hostproc", "a", "b", "c"}

const (
	slotA = plan.SlotSelf + 1 + iota
	slotB
	slotC
)

const atCwd = ^uint64(99)

func open(path string, into plan.Slot) plan.Step {
	return plan.Step{Do: plan.Say("open %s", path), Nr: unix.SYS_OPENAT, Args: []plan.Arg{number(atCwd), text(path), number(unix.O_CLOEXEC), number(0)}, Fill: into}
}

func run(t *testing.T, buffers []byte, s []plan.Step) (*machine, int32, uintptr) {
	t.Helper()
	m := &machine{mem: new(memory), slots: make([]int64, len(fixed))}
	for i := range m.slots {
		m.slots[i] = -1
	}
	if err := m.load(s, buffers); err != nil {
		t.Fatal(err)
	}
	failed, errno := m.prog.run()
	return m, failed, errno
}

func TestMachine(t *testing.T) {
	buffers := make([]byte, plan.BufferSize)
	buf := plan.Arg{Kind: plan.ArgBuffer, Slot: plan.NoSlot}
	missing := open("/no/such/file", slotA)
	missing.Accept = []unix.Errno{unix.ENOENT}
	missing.OnFail = 2
	null := open("/dev/null", slotA)
	m, failed, errno := run(t, buffers, steps(
		missing,
		plan.Step{Op: plan.Fail, Errno: unix.EIO, Fill: plan.NoSlot}, // jumped over
		null,
		plan.Step{Op: plan.Set, Fill: slotB, Args: []plan.Arg{number(7)}},
		plan.Step{Op: plan.Poke, Off: 8, Args: []plan.Arg{buf, slot(slotB)}, Fill: plan.NoSlot},
		plan.Step{Op: plan.Check, Off: 8, Mask: 0xff, Want: 7, Args: []plan.Arg{buf}, Fill: plan.NoSlot, Errno: unix.EIO},
		plan.Step{Op: plan.Check, Off: 8, Mask: 0xff, Want: 8, Args: []plan.Arg{buf}, Fill: plan.NoSlot, Any: true, OnFail: 8},
		plan.Step{Op: plan.Fail, Errno: unix.EIO, Fill: plan.NoSlot}, // jumped over
		plan.Step{Op: plan.Branch, Args: []plan.Arg{slot(slotB)}, Fill: plan.NoSlot, OnFail: 10},
		plan.Step{Op: plan.Fail, Errno: unix.EIO, Fill: plan.NoSlot}, // jumped over
		plan.Step{Op: plan.Check, Off: 8, Mask: ^uint64(0), Want: 9, Wide: true, Args: []plan.Arg{buf}, Fill: plan.NoSlot, Errno: unix.EXDEV},
	))
	if failed != 10 || errno != uintptr(unix.EXDEV) {
		t.Errorf("failed at %d with %d", failed, errno)
	}
	unix.Close(int(m.slots[slotA]))
}

func TestFillingASlotClosesWhatWasThere(t *testing.T) {
	m, _, errno := run(t, nil, steps(open("/dev/null", slotA), open("/dev/null", slotB), open("/dev/zero", slotA)))
	if errno != 0 || m.slots[slotA] == m.slots[slotB] {
		t.Fatal(errno, m.slots)
	}
	defer unix.Close(int(m.slots[slotA]))
	defer unix.Close(int(m.slots[slotB]))
	link, err := os.Readlink("/proc/self/fd/" + string(rune('0'+m.slots[slotB]%10)))
	if m.slots[slotB] < 10 && (err != nil || link != "/dev/null") {
		t.Errorf("%q %v", link, err)
	}
}

// The child sees nothing of the Go heap.
func TestChildHasNoHeap(t *testing.T) {
	t.Parallel()
	var mem memory
	defer mem.release()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	slots := mem.words(make([]int64, len(fixed)))
	slots[plan.SlotSync] = int64(pair[1])
	m := &machine{mem: &mem, slots: slots}
	secret := bytes.Repeat([]byte("heap "), 1<<16)[:11]
	inHeap, outside := number(uint64(addr(secret))), number(uint64(m.bytes(secret)))
	write := func(from plan.Arg) plan.Step {
		return plan.Step{Nr: unix.SYS_WRITE, Args: []plan.Arg{slot(plan.SlotSync), from, number(uint64(len(secret)))}, Fill: plan.NoSlot}
	}
	if err := m.load(steps(write(outside), write(inHeap)), nil); err != nil {
		t.Fatal(err)
	}
	pid, err := m.clone(&cloneArgs{exitSignal: uint64(unix.SIGCHLD)})
	if err != nil {
		t.Fatal(err)
	}
	defer reap(pid)
	buf := make([]byte, 64)
	if n, err := unix.Read(pair[0], buf); err != nil || string(buf[:n]) != string(secret) {
		t.Errorf("of its own memory: %q, %v", buf[:max(n, 0)], err)
	}
	if n, err := unix.Read(pair[0], buf); err != nil || n != 8 || *(*[2]int32)(unsafe.Pointer(&buf[0])) != [2]int32{1, int32(unix.EFAULT)} {
		t.Errorf("of the heap: %q, %v", buf[:max(n, 0)], err)
	}
	runtime.KeepAlive(secret)
	// That is over with the clone: os/exec makes copies of the process in user namespaces.
	cmd := exec.Command("/bin/true")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("a copy of the process afterwards: %v: %s", err, out)
	}
}

func TestGaps(t *testing.T) {
	m := &machine{mem: new(memory), slots: []int64{5, -1, 9, 6}}
	_, n := m.gaps(&plan.Step{Op: plan.CloseAll})
	if n != 3 { // 3-4, 7-8, 10-
		t.Errorf("%d ranges", n)
	}
	_, n = m.gaps(&plan.Step{Op: plan.CloseAll, Off: 2, Args: []plan.Arg{slot(0)}})
	if n != 1 { // 6-
		t.Errorf("%d ranges", n)
	}
}

func TestLoaderIsAnELFFile(t *testing.T) {
	fd, err := loaderFile(loaderOptions{sync: 5, report: 6, start: 7, hold: true, filter: plan.Filter{Program: []unix.SockFilter{{Code: 6, K: 0x7fff0000}}}})
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "loader")
	defer f.Close()
	raw := make([]byte, 4096)
	n, _ := f.ReadAt(raw, 0)
	e, err := elf.NewFile(bytes.NewReader(raw[:n]))
	if err != nil {
		t.Fatal(err)
	}
	if e.Type != elf.ET_EXEC || e.Entry != loaderBase+loaderCode || len(e.Progs) != 2 || e.Progs[0].Flags != elf.PF_R|elf.PF_X || int(e.Progs[0].Filesz) != n {
		t.Errorf("%+v", e.FileHeader)
	}
	if _, err := f.WriteAt([]byte{1}, 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("the loader can be written: %v", err)
	}
}

// program ends steps with the loader, as every plan does.
func program(path string, s ...plan.Step) *plan.Plan {
	argv := plan.Strings([]string{path, path})
	env := plan.Strings(nil)
	buf := plan.Arg{Kind: plan.ArgBuffer, Slot: plan.NoSlot}
	s = append(s,
		plan.Step{Do: plan.Say("wait"), Nr: unix.SYS_READ, Args: []plan.Arg{slot(plan.SlotSync), buf, number(1)}, Fill: plan.NoSlot},
		plan.Step{Do: plan.Say("exec %q", path), Nr: unix.SYS_FCNTL, Args: []plan.Arg{slot(plan.SlotSync), number(unix.F_SETFD), number(0)}, Fill: plan.NoSlot},
		plan.Step{Do: plan.Say("exec %q", path), Nr: unix.SYS_EXECVEAT, Args: []plan.Arg{slot(plan.SlotLoader), text(""), argv, env, number(unix.AT_EMPTY_PATH)}, Fill: plan.NoSlot})
	return &plan.Plan{Program: steps(s...), Slots: fixed, ConsoleSlot: plan.NoSlot, Buffers: 1}
}

func TestStart(t *testing.T) {
	p, err := Start(program("/bin/true"), Config{CgroupFD: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer p.PidFD.Close()
	var ws unix.WaitStatus
	if _, err := unix.Wait4(p.Pid, &ws, 0, nil); err != nil || ws.ExitStatus() != 0 {
		t.Errorf("%v %v", ws, err)
	}
}

func TestErrorsNameTheStep(t *testing.T) {
	for _, tc := range []struct {
		plan *plan.Plan
		want string
	}{
		{program("/bin/true", open("/dev/null", slotA), open("/no/such", slotA)), "open /no/such: no such file or directory (step 2 of 5)"},
		{program("/no/such/program"), `exec "/no/such/program": no such file or directory`},
		{program("/etc/passwd"), `exec "/etc/passwd": permission denied`},
	} {
		before, _ := os.ReadDir("/proc/self/fd")
		p, err := Start(tc.plan, Config{CgroupFD: -1})
		if err == nil || err.Error() != tc.want {
			t.Errorf("got %v, want %s", err, tc.want)
		}
		var step *StepError
		if !errors.As(err, &step) {
			t.Errorf("%T is no StepError", err)
		}
		if p != nil {
			t.Error("a process although it failed")
		}
		if after, _ := os.ReadDir("/proc/self/fd"); len(after) > len(before) {
			t.Errorf("%d descriptors before, %d after", len(before), len(after))
		}
	}
	host := program("/bin/true")
	host.Host = steps(open("/no/such", slotA))
	if _, err := Start(host, Config{CgroupFD: -1}); err == nil || !strings.HasPrefix(err.Error(), "open /no/such: no such file or directory (step 1 of 4)") {
		t.Error(err)
	}
}

// TestEndBeforeReady: who starts a container hears what its first process died of.
func TestEndBeforeReady(t *testing.T) {
	self := plan.Step{Nr: unix.SYS_GETPID, Fill: slotA}
	for want, last := range map[string]plan.Step{
		"(with status 7)": {Nr: unix.SYS_EXIT_GROUP, Args: []plan.Arg{number(7)}, Fill: plan.NoSlot},
		"(killed by SIGKILL: by somebody, or because its cgroup is out of memory)": {Nr: unix.SYS_KILL, Args: []plan.Arg{slot(slotA), number(uint64(unix.SIGKILL))}, Fill: plan.NoSlot},
	} {
		p := program("/bin/true", self, last)
		p.IDMaps = true
		_, err := Start(p, Config{CgroupFD: -1, IDMaps: func(int) error { return nil }})
		if err == nil || err.Error() != "the container's first process died before it was ready "+want {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

func BenchmarkStart(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		p, err := Start(program("/bin/true"), Config{CgroupFD: -1})
		if err != nil {
			b.Fatal(err)
		}
		reap(p.Pid)
		p.PidFD.Close()
	}
}

// The loader is also a program of its own: with sync and report as descriptor 3.
// HAKO_LOADER_OUT keeps the file, to be tried on another machine or in an emulator.
func TestLoaderRuns(t *testing.T) {
	for name, o := range map[string]loaderOptions{
		"exec":   {sync: 3, report: 3},
		"filter": {sync: 3, report: 3, filter: plan.Filter{Program: []unix.SockFilter{{Code: 6, K: 0x7fff0000}}}},
		"refork": {sync: 3, report: 3, refork: true},
	} {
		fd, err := loaderFile(o)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), "loader")
		defer f.Close()
		raw := make([]byte, 4096)
		n, _ := f.ReadAt(raw, 0)
		if dir := os.Getenv("HAKO_LOADER_OUT"); dir != "" {
			if err := os.WriteFile(dir+"/"+name, raw[:n], 0o755); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if name == "filter" {
			continue // needs no_new_privs or privileges
		}
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		out, wout, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		p, err := os.StartProcess("/proc/self/fd/"+strconv.Itoa(fd), []string{"/bin/echo", "echo", "hello", "there"}, &os.ProcAttr{Env: []string{"X=y"}, Files: []*os.File{nil, wout, nil, w}})
		if err != nil {
			t.Fatal(err)
		}
		w.Close()
		wout.Close()
		words, _ := io.ReadAll(r)
		text, _ := io.ReadAll(out)
		p.Wait()
		r.Close()
		out.Close()
		if string(text) != "hello there\n" || (len(words) == 8) != o.refork {
			t.Errorf("%s: %q, words %v", name, text, words)
		}
		if o.refork {
			reap(int(*(*int32)(unsafe.Pointer(&words[4]))))
		}
	}
}
