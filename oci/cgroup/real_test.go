//go:build linux

package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func TestRealApply(t *testing.T) {
	t.Parallel()
	keepSubtreeControl(t)
	c := real(t)
	needs(t, c, "memory", "cpu", "pids", "cpuset")
	if err := c.Apply(defaultResources()); err != nil {
		t.Fatal(err)
	}
	check := func(when string, memory, memsw, swap, pids string) {
		t.Helper()
		for _, v := range []struct{ got, want string }{
			{value(t, c, "memory", "memory.limit_in_bytes", "memory.max"), memory},
			{value(t, c, "pids", "pids.max", "pids.max"), pids},
		} {
			if v.got != v.want {
				t.Errorf("%s: got %s, want %s", when, v.got, v.want)
			}
		}
		want := swap
		if c.v1["memory"] != "" {
			want = memsw
		}
		if got := value(t, c, "memory", "memory.memsw.limit_in_bytes", "memory.swap.max"); got != want {
			t.Errorf("%s: swap is %s, want %s", when, got, want)
		}
	}
	check("at first", "268435456", "536870912", "268435456", "100")

	// Both ways, the limits of memory and of memory with swap pass each other.
	for _, mb := range []int64{1024, 16, 2048, 64} {
		r := &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(mb << 20), Swap: ptr(2 * mb << 20)}}
		if err := c.Apply(r); err != nil {
			t.Fatal(err)
		}
		check("updated", itoa(mb<<20), itoa(2*mb<<20), itoa(mb<<20), "100")
	}
	if err := c.Apply(&specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: ptr(int64(2000)), Period: ptr(uint64(1000))}}); err != nil {
		t.Error(err)
	}
	if err := c.Apply(&specs.LinuxResources{CPU: &specs.LinuxCPU{Idle: ptr(int64(1))}}); err != nil {
		t.Error(err)
	}
	if err := c.Apply(&specs.LinuxResources{CPU: &specs.LinuxCPU{Idle: ptr(int64(0)), Shares: ptr(uint64(300))}}); err != nil {
		t.Error(err)
	}
	// A failure takes back what was set before it. CPU comes first, then the CPU set,
	// then the rest; the device list comes last.
	shares := value(t, c, "cpu", "cpu.shares", "cpu.weight")
	for _, bad := range []*specs.LinuxResources{
		{CPU: &specs.LinuxCPU{Shares: ptr(uint64(4000)), Cpus: "1-2147483647"}, Pids: &specs.LinuxPids{Limit: ptr(int64(7))}},
		{CPU: &specs.LinuxCPU{Shares: ptr(uint64(4000)), Mems: "63"}},
		{CPU: &specs.LinuxCPU{Shares: ptr(uint64(4000)), Quota: ptr(int64(1<<63 - 1))}},
		{CPU: &specs.LinuxCPU{Shares: ptr(uint64(4000)), Period: ptr(uint64(1<<64 - 1))}},
		{Memory: &specs.LinuxMemory{Limit: ptr(int64(1 << 30)), Swap: ptr(int64(1 << 30))}, Pids: &specs.LinuxPids{Limit: ptr(int64(1<<63 - 1))}},
	} {
		err := c.Apply(bad)
		if !errors.Is(err, errdefs.ErrInvalidArgument) && !errors.Is(err, errdefs.ErrFailedPrecondition) {
			t.Errorf("error is %v", err)
		}
		t.Log(err)
	}
	check("after failures", "67108864", "134217728", "67108864", "100")
	if got := value(t, c, "cpu", "cpu.shares", "cpu.weight"); got != shares {
		t.Errorf("shares are %s, were %s", got, shares)
	}
	// The largest limit is no limit.
	if err := c.Apply(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(1<<63 - 1)), Swap: ptr(int64(1<<63 - 1))}}); err != nil {
		t.Error(err)
	}
	if err := c.Apply(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(-1))}, Pids: &specs.LinuxPids{Limit: ptr(int64(-1))}}); err != nil {
		t.Error(err)
	}
	// Huge pages are where the machine has them: on a hybrid one, often on v2 alone.
	if pages, err := os.ReadDir("/sys/kernel/mm/hugepages"); err == nil && len(pages) > 0 {
		if size, ok := pageSize(pages[0].Name()); ok {
			err := c.Apply(&specs.LinuxResources{HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: size, Limit: 0}}})
			var missing *MissingError
			if err != nil && !errors.As(err, &missing) {
				t.Error(err)
			}
			t.Logf("huge pages of %s: %v", size, err)
		}
	}
	if dir, ok := c.v1["devices"]; ok {
		list, err := readString(dir + "/devices.list")
		if err != nil || !strings.Contains(list, "c 10:229 rw\n") || !strings.Contains(list, "c 1:3 rwm") || strings.Contains(list, "a *:*") {
			t.Errorf("devices: %q, %v", list, err)
		}
	}
}

func TestRealProcesses(t *testing.T) {
	t.Parallel()
	c := real(t)
	p := startChild(t, "wait")
	if err := c.Add(p.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if err := c.Add(1 << 22); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("added a process that is not there: %v", err)
	}
	if pids, err := c.Procs(); err != nil || !slices.Equal(pids, []int{p.Process.Pid}) {
		t.Errorf("processes are %v, %v", pids, err)
	}
	// The kernel says the same, for each hierarchy that is mounted.
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	checked := 0
	for line := range strings.Lines(string(text)) {
		_, names, _ := strings.Cut(line, ":")
		names, _, _ = strings.Cut(names, ":")
		first, _, _ := strings.Cut(names, ",")
		if _, ours := c.Paths()[strings.TrimPrefix(first, "name=")]; !ours {
			continue
		}
		checked++
		if !strings.HasSuffix(line, "/sub\n") {
			t.Errorf("the process is in %s", line)
		}
	}
	if checked == 0 {
		t.Errorf("none of the hierarchies is in\n%s", text)
	}
	// A second container cannot have the same place; the same paths give the same cgroup.
	l, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	var path string
	for _, h := range l.Hierarchies {
		if rest, ok := strings.CutPrefix(c.dirs()[0], h.Mount+"/"); ok {
			path = "/" + rest
		}
	}
	if _, err := l.New(path); !errors.Is(err, errdefs.ErrAlreadyExists) {
		t.Errorf("a cgroup with processes was taken: %v", err)
	}
	again := l.Load(c.Paths())
	if pids, err := again.AllProcs(); err != nil || len(pids) != 1 {
		t.Errorf("processes are %v, %v", pids, err)
	}
	if err := again.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = p.Wait()
	if err := again.Delete(); err != nil {
		t.Fatal(err)
	}
	if err := again.Delete(); err != nil || again.Exists() {
		t.Errorf("deleted twice: %v", err)
	}
	if pids, err := again.AllProcs(); err != nil || len(pids) != 0 {
		t.Errorf("processes of nothing are %v, %v", pids, err)
	}
	if err := again.Kill(); err != nil {
		t.Errorf("killed nothing: %v", err)
	}
	if frozen, err := again.Frozen(); err != nil || frozen {
		t.Errorf("nothing is frozen: %v, %v", frozen, err)
	}
	if err := again.Freeze(); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("froze nothing: %v", err)
	}
	if _, err := again.Stats(); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("statistics of nothing: %v", err)
	}
	if _, err := again.OOMKills(); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("OOM kills of nothing: %v", err)
	}
	if _, err := again.Doors(); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("doors of nothing: %v", err)
	}
	if err := again.Add(os.Getpid()); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("entered nothing: %v", err)
	}
}

// TestRealDoors has a process enter by itself. Its first thread does, and only this one is
// asked about.
func TestRealDoors(t *testing.T) {
	t.Parallel()
	c := real(t)
	doors, err := c.Doors()
	if err != nil {
		t.Fatal(err)
	}
	var files []*os.File
	for _, d := range doors.V1 {
		files = append(files, os.NewFile(uintptr(d.FD), d.Dir+"/tasks"))
	}
	p := startChild(t, "doors", files...)
	for _, f := range files {
		f.Close()
	}
	deadline := time.Now().Add(hangLimit)
	for _, f := range files {
		want := itoa(int64(p.Process.Pid))
		for {
			got, err := readString(f.Name())
			if err == nil && slices.Contains(strings.Fields(got), want) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s is %q, %v, not %s", f.Name(), got, err, want)
			}
			time.Sleep(time.Millisecond)
		}
	}
	if doors.V2 < 0 {
		return
	}
	defer unix.Close(doors.V2)
	cmd := exec.Command("/bin/cat", "/proc/self/cgroup")
	cmd.SysProcAttr = &unix.SysProcAttr{UseCgroupFD: true, CgroupFD: doors.V2}
	out, err := cmd.Output()
	if err != nil || !strings.Contains(string(out), "0::") || !strings.Contains(string(out), filepath.Base(filepath.Dir(c.v2))+"/sub\n") {
		t.Errorf("cloned into the cgroup: %v\n%s", err, out)
	}
}

func TestRealFreeze(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, c *Cgroup) {
		p := startChild(t, "spin")
		if err := c.Add(p.Process.Pid); err != nil {
			t.Fatal(err)
		}
		p.ask(t)
		cpu := func() uint64 {
			t.Helper()
			s, err := c.Stats()
			if err != nil {
				t.Fatal(err)
			}
			return s.CPU.Total
		}
		for deadline := time.Now().Add(hangLimit); cpu() == 0; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("does not run")
			}
		}
		for range 2 {
			if err := c.Freeze(); err != nil {
				t.Fatal(err)
			}
			if frozen, err := c.Frozen(); !frozen || err != nil {
				t.Errorf("frozen: %v, %v", frozen, err)
			}
		}
		// A task counts as frozen just before it leaves its CPU, which it may have to wait for.
		before := cpu()
		for deadline := time.Now().Add(hangLimit); ; {
			time.Sleep(30 * time.Millisecond)
			after := cpu()
			if after == before {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("CPU time goes on while it is frozen: %d", after)
			}
			before = after
		}
		for range 2 {
			if err := c.Thaw(); err != nil {
				t.Fatal(err)
			}
			if frozen, err := c.Frozen(); frozen || err != nil {
				t.Errorf("frozen: %v, %v", frozen, err)
			}
		}
		for deadline := time.Now().Add(hangLimit); cpu() == before; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("does not run again")
			}
		}
		// Also a frozen one dies.
		if err := c.Freeze(); err != nil {
			t.Fatal(err)
		}
		if err := c.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = p.Wait()
	})
}

// TestRealKillTree kills processes that are in cgroups below, and fork.
func TestRealKillTree(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, c *Cgroup) {
		for _, dir := range c.dirs() {
			if err := os.MkdirAll(dir+"/a/b", 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if dir, ok := c.v1["cpuset"]; ok {
			h := Hierarchy{Mount: filepath.Dir(filepath.Dir(dir))}
			if err := h.inheritCpuset(dir+"/a/b", nil); err != nil {
				t.Fatal(err)
			}
		}
		below := &Cgroup{v1: map[string]string{}}
		for name, dir := range c.v1 {
			below.v1[name] = dir + "/a/b"
		}
		if c.v2 != "" {
			below.v2 = c.v2 + "/a/b"
		}
		p, q := startChild(t, "fork"), startChild(t, "wait")
		if err := below.Add(p.Process.Pid); err != nil {
			t.Fatal(err)
		}
		if err := c.Add(q.Process.Pid); err != nil {
			t.Fatal(err)
		}
		p.ask(t)
		for deadline := time.Now().Add(hangLimit); ; time.Sleep(time.Millisecond) {
			if pids, err := c.AllProcs(); err != nil || len(pids) > 15 {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("it does not fork")
			}
		}
		if pids, err := c.Procs(); err != nil || !slices.Equal(pids, []int{q.Process.Pid}) {
			t.Errorf("processes are %v, %v", pids, err)
		}
		if err := c.Kill(); err != nil {
			t.Fatal(err)
		}
		_, _ = p.Wait(), q.Wait()
		if err := c.Delete(); err != nil || c.Exists() {
			t.Error(err)
		}
	})
}

func TestRealDeleteBusy(t *testing.T) {
	t.Parallel()
	c := real(t)
	p := startChild(t, "wait")
	if err := c.Add(p.Process.Pid); err != nil {
		t.Fatal(err)
	}
	err := remove(c.dirs()[0], time.Now().Add(10*time.Millisecond))
	if !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), itoa(int64(p.Process.Pid))) {
		t.Errorf("error is %v", err)
	}
}

func TestRealOOM(t *testing.T) {
	t.Parallel()
	c := real(t)
	needs(t, c, "memory")
	ctx, cancel := context.WithTimeout(t.Context(), hangLimit)
	defer cancel()
	if err := c.Apply(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(24 << 20)), Swap: ptr(int64(24 << 20))}}); err != nil {
		t.Fatal(err)
	}
	ch, err := c.OOM(ctx)
	if err != nil {
		t.Fatal(err)
	}
	other, stop := context.WithCancel(ctx)
	stopped, err := c.OOM(other)
	if err != nil {
		t.Fatal(err)
	}
	stop()
	if _, ok := <-stopped; ok {
		t.Error("a notice instead of the end")
	}
	p := startChild(t, "eat")
	if err := c.Add(p.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(p.in, "\n"); err != nil {
		t.Fatal(err)
	}
	if _, ok := <-ch; !ok {
		t.Fatal("no notice")
	}
	_ = p.Wait()
	if n, err := c.OOMKills(); err != nil || n == 0 {
		t.Errorf("%d OOM kills, %v", n, err)
	}
	s, err := c.Stats()
	if err != nil {
		t.Fatal(err)
	}
	if s.Memory.OOMKills == 0 || s.Memory.Memory.Limit != 24<<20 || s.Memory.Memory.Max == 0 {
		t.Errorf("memory: %+v", s.Memory)
	}
	if err := c.Delete(); err != nil {
		t.Fatal(err)
	}
	for range ch { // ends with the cgroup
	}
	if ctx.Err() != nil {
		t.Error("the channel outlived the cgroup")
	}
}

func TestRealStats(t *testing.T) {
	t.Parallel()
	c := real(t)
	needs(t, c, "memory", "pids")
	r := defaultResources()
	r.CPU.Quota = ptr(int64(5000)) // little enough to be throttled on a machine that is busy with other things
	if err := c.Apply(r); err != nil {
		t.Fatal(err)
	}
	p := startChild(t, "spin")
	if err := c.Add(p.Process.Pid); err != nil {
		t.Fatal(err)
	}
	p.ask(t)
	var s *Stats
	for deadline := time.Now().Add(hangLimit); ; time.Sleep(5 * time.Millisecond) {
		var err error
		if s, err = c.Stats(); err != nil {
			t.Fatal(err)
		}
		// They come from two files, which are read one after the other.
		if s.CPU.ThrottledTime > 0 && s.CPU.Total > 0 || time.Now().After(deadline) {
			break
		}
	}
	if s.CPU.Total == 0 || s.CPU.Periods == 0 || s.CPU.ThrottledTime == 0 {
		t.Errorf("cpu: %+v", s.CPU)
	}
	if s.Pids.Current == 0 || s.Pids.Limit != 100 {
		t.Errorf("pids: %+v", s.Pids)
	}
	if s.Memory.Memory.Limit != 256<<20 || s.Memory.Swap.Limit == 0 || len(s.Memory.Stat) < 10 {
		t.Errorf("memory: %+v", s.Memory)
	}
	if c.v1["cpuacct"] != "" && len(s.CPU.PerCPU) < runtime.NumCPU() {
		t.Errorf("per CPU: %v", s.CPU.PerCPU)
	}
	t.Logf("%+v", s)
}

// TestRealDevices asks real processes what they can open, with the v1 controller and
// with an eBPF program on a v2 cgroup.
func TestRealDevices(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "full")
	ways := map[string]func(*Cgroup) *Cgroup{
		"v1": func(c *Cgroup) *Cgroup { return &Cgroup{v1: map[string]string{"devices": c.v1["devices"]}} },
		"v2": func(c *Cgroup) *Cgroup { return &Cgroup{v2: c.v2} },
	}
	for name, only := range ways {
		t.Run(name, func(t *testing.T) {
			all := real(t)
			c := only(all)
			if c.v1["devices"] == "" && c.v2 == "" {
				t.Skipf("needs cgroup %s with devices: %s", name, t.Name())
			}
			if !exists(path) {
				if err := unix.Mknod(path, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 7))); err != nil {
					t.Skipf("needs mknod: %s: %v", t.Name(), err)
				}
			}
			p := startChild(t, "open "+path+" r")
			if err := all.Add(p.Process.Pid); err != nil {
				t.Fatal(err)
			}
			for _, step := range []struct{ rules, want string }{
				{"allow a *:* rwm\n", "<nil>"},
				{"deny a *:* rwm\n", "operation not permitted"},
				{"deny a *:* rwm\nallow c 1:3 rwm\n", "operation not permitted"},
				{"deny a *:* rwm\nallow c 1:7 w\n", "operation not permitted"},
				{"deny a *:* rwm\nallow c 1:7 r\n", "<nil>"},
				{"deny a *:* rwm\nallow c *:7 rwm\n", "<nil>"},
				{"allow a *:* rwm\ndeny c 1:7 w\n", "<nil>"},
				{"allow a *:* rwm\ndeny c 1:7 r\n", "operation not permitted"},
				{"allow a *:* rwm\n", "<nil>"},
			} {
				if strings.HasPrefix(step.rules, "allow a") && name == "v1" {
					// A list that shows nothing cannot be changed into another one: the
					// test goes by "deny".
					if err := c.Apply(&specs.LinuxResources{Devices: rules(t, "deny a *:* rwm\n")}); err != nil {
						t.Fatal(err)
					}
				}
				if err := c.Apply(&specs.LinuxResources{Devices: rules(t, step.rules)}); err != nil {
					t.Fatal(err)
				}
				if got := p.ask(t); got != step.want {
					t.Errorf("%q: %s, want %s", step.rules, got, step.want)
				}
			}
			if name == "v2" {
				fd, err := open(c.v2, unix.O_RDONLY|unix.O_DIRECTORY)
				if err != nil {
					t.Fatal(err)
				}
				defer unix.Close(fd)
				ours, err := ourPrograms(fd)
				closeAll(ours)
				if err != nil || len(ours) != 1 {
					t.Errorf("%d programs are attached after updates, %v", len(ours), err)
				}
				// The longest list that is taken passes the kernel's verifier.
				var many []specs.LinuxDeviceCgroup
				for i := range maxRules {
					many = append(many, specs.LinuxDeviceCgroup{Allow: i%2 == 0, Type: "c", Major: ptr(int64(200 + i)), Minor: ptr(int64(i)), Access: "rw"})
				}
				if err := c.Apply(&specs.LinuxResources{Devices: many}); err != nil {
					t.Error(err)
				}
			}
		})
	}
}
