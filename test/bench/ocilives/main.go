//go:build linux && (amd64 || arm64)

// Command ocilives makes and ends containers with hako-oci, side by side, and kills
// hako-oci itself in some of them: test/bench/oci-lives.sh runs it.
//
// In flow its flags and the path of hako-oci; out flow a summary and, if anything was wrong, an exit code of 1.
//
// A life is create, start, the end of the process, delete. In a killed life one of the
// three commands gets SIGKILL at a random moment, and delete --force has to clear up after
// it. Every exit code is checked, and after each life and at the end what is left: state,
// cgroups, processes, mounts, network namespaces.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci"
	"github.com/hako-engine/hako/oci/spec"
)

// guestName is the name under which the program runs in the containers.
const guestName = "guest"

type bench struct {
	oci, dir, state, mark string
	killed                float64
	wrong                 atomic.Int64
	kills                 [3]atomic.Int64
	children              sync.Mutex // of exits
	exits                 map[int]chan exit
}

// exit is the end of a child.
type exit struct {
	status unix.WaitStatus
	when   time.Time
}

func main() {
	if filepath.Base(os.Args[0]) == guestName {
		n, _ := strconv.Atoi(os.Args[1])
		os.Exit(n)
	}
	lives := flag.Int("lives", 1000, "containers")
	side := flag.Int("side", 8, "so many side by side")
	killed := flag.Float64("killed", 0.01, "share of the lives in which hako-oci is killed")
	path := flag.String("oci", "bin/hako-oci", "the runtime")
	flag.Parse()
	if err := run(*path, *lives, *side, *killed); err != nil {
		fmt.Fprintln(os.Stderr, "ocilives:", err)
		os.Exit(1)
	}
}

func run(path string, lives, side int, killed float64) error {
	// Containers' processes become ours when hako-oci ends.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "ocilives")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if path, err = filepath.Abs(path); err != nil {
		return err
	}
	b := &bench{oci: path, dir: dir, state: filepath.Join(dir, "state"), mark: "ocilives-" + strconv.Itoa(os.Getpid()), killed: killed, exits: map[int]chan exit{}}
	rootfs := filepath.Join(dir, "rootfs")
	for _, d := range []string{"proc", "sys", "dev"} {
		if err := os.MkdirAll(filepath.Join(rootfs, d), 0o755); err != nil {
			return err
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	raw, err := os.ReadFile(self)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(rootfs, guestName), raw, 0o755); err != nil {
		return err
	}
	numbers := make(chan int)
	var wg sync.WaitGroup
	t0 := time.Now()
	go b.reap()
	for range side {
		wg.Go(func() {
			for i := range numbers {
				if err := b.life(i); err != nil {
					b.wrong.Add(1)
					fmt.Printf("life %d: %v\n", i, err)
				}
			}
		})
	}
	for i := range lives {
		numbers <- i
	}
	close(numbers)
	wg.Wait()
	took := time.Since(t0)
	left := b.left("")
	if n := b.mounts(); n > 0 {
		left = append(left, fmt.Sprintf("%d mounts", n))
	}
	if n, _ := os.ReadDir(b.state); len(n) > 0 {
		left = append(left, fmt.Sprintf("%d directories of state", len(n)))
	}
	fmt.Printf("%d lives, %d side by side: %v, %.1f ms each; hako-oci killed in create %d, start %d, delete %d times; %d lives went wrong\n", lives, side,
		took.Round(time.Millisecond), float64(took.Microseconds())/1000/float64(lives), b.kills[0].Load(), b.kills[1].Load(), b.kills[2].Load(), b.wrong.Load())
	if len(left) > 0 {
		return fmt.Errorf("%d things were left behind: %s", len(left), strings.Join(left[:min(len(left), 20)], ", "))
	}
	fmt.Println("nothing was left behind")
	if b.wrong.Load() > 0 {
		return errors.New("not every life went well")
	}
	return nil
}

// errKilled is the end of a command that was to be killed.
var errKilled = errors.New("killed")

// command runs hako-oci, and kills it after a while if that is positive.
func (b *bench) command(after time.Duration, args ...string) error {
	cmd := exec.Command(b.oci, append([]string{"--root", b.state}, args...)...)
	// A file: who is left of a container that was killed keeps a pipe open.
	out, err := os.CreateTemp(b.dir, "out")
	if err != nil {
		return err
	}
	defer os.Remove(out.Name())
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	status, err := b.spawn(cmd.Path, cmd.Args, []*os.File{null, out, out}, after)
	if err != nil {
		return err
	}
	if after > 0 && status.Signaled() {
		return errKilled
	}
	if status != 0 {
		text, _ := os.ReadFile(out.Name())
		return fmt.Errorf("%s: status %#x: %s", args[0], uint32(status), bytes.TrimSpace(text))
	}
	return nil
}

// spawn starts a process and waits for it, as reap tells.
func (b *bench) spawn(path string, args []string, files []*os.File, after time.Duration) (unix.WaitStatus, error) {
	b.children.Lock()
	p, err := os.StartProcess(path, args, &os.ProcAttr{Env: os.Environ(), Files: files})
	if err != nil {
		b.children.Unlock()
		return 0, err
	}
	pid := p.Pid
	done := make(chan exit, 1) // not that of somebody who had the pid before
	b.exits[pid] = done
	b.children.Unlock()
	if after > 0 {
		time.AfterFunc(after, func() { _ = p.Signal(unix.SIGKILL) })
	}
	return b.await(pid, done, time.Time{})
}

func (b *bench) exitLocked(pid int) chan exit {
	c, ok := b.exits[pid]
	if !ok {
		c = make(chan exit, 1)
		b.exits[pid] = c
	}
	return c
}

// await waits for the end of a child that began after a time.
func (b *bench) await(pid int, done chan exit, begin time.Time) (unix.WaitStatus, error) {
	limit := time.After(time.Minute)
	for {
		select {
		case e := <-done:
			if e.when.Before(begin) {
				continue // of somebody who had the pid before
			}
			b.children.Lock()
			delete(b.exits, pid)
			b.children.Unlock()
			return e.status, nil
		case <-limit:
			return 0, fmt.Errorf("process %d does not end", pid)
		}
	}
}

// reap collects all children: those that hako-oci leaves behind are ours.
func (b *bench) reap() {
	for {
		var info unix.Siginfo
		// The status is only taken under the lock, so that a pid has one owner at a time.
		err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOWAIT, nil)
		if err == unix.ECHILD {
			time.Sleep(time.Millisecond)
			continue
		}
		b.children.Lock()
		var s unix.WaitStatus
		if pid, err := unix.Wait4(-1, &s, unix.WNOHANG, nil); err == nil && pid > 0 {
			c := b.exitLocked(pid)
			select {
			case <-c: // of an orphan nobody asked for
			default:
			}
			c <- exit{s, time.Now()}
		}
		b.children.Unlock()
	}
}

func (b *bench) bundle(id string, code int) (string, error) {
	dir := filepath.Join(b.dir, id)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	s := spec.Default(oci.CgroupV2())
	s.Root.Path = filepath.Join(b.dir, "rootfs")
	s.Process.Terminal, s.Process.Args, s.Process.Rlimits = false, []string{"/" + guestName, strconv.Itoa(code)}, nil
	s.Process.Env = append(s.Process.Env, "GOMAXPROCS=1")
	s.Linux.CgroupsPath = "/" + id
	s.Linux.Resources = &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: new(int64(100))}}
	raw, err := json.Marshal(s)
	if err != nil {
		return "", err
	}
	return dir, os.WriteFile(filepath.Join(dir, "config.json"), raw, 0o644)
}

// life is one container from create to delete.
func (b *bench) life(i int) error {
	id := fmt.Sprintf("%s-%d", b.mark, i)
	code := rand.IntN(256)
	dir, err := b.bundle(id, code)
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	victim := -1
	var after time.Duration
	if rand.Float64() < b.killed {
		victim = rand.IntN(3)
		after = time.Duration(1 + rand.IntN(int(25*time.Millisecond)))
	}
	if err := b.steps(id, dir, code, victim, after); err != nil && !errors.Is(err, errKilled) {
		return errors.Join(err, b.clear(id))
	}
	if victim < 0 {
		return b.gone(id)
	}
	return b.clear(id)
}

// steps are the commands of a life.
func (b *bench) steps(id, dir string, code, victim int, after time.Duration) error {
	when := func(step int) time.Duration {
		if step != victim {
			return 0
		}
		b.kills[step].Add(1)
		return after
	}
	pidFile := filepath.Join(dir, "pid")
	begin := time.Now()
	if err := b.command(when(0), "create", "--bundle", dir, "--pid-file", pidFile, id); err != nil {
		return err
	}
	raw, err := os.ReadFile(pidFile)
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(string(raw))
	if err != nil {
		return err
	}
	b.children.Lock()
	done := b.exitLocked(pid)
	b.children.Unlock()
	if err := b.command(when(1), "start", id); err != nil {
		if errors.Is(err, errKilled) {
			err = errors.Join(err, b.clear(id))
			if s, aerr := b.await(pid, done, begin); aerr != nil || s.Exited() && s.ExitStatus() != code || s.Signaled() && s.Signal() != unix.SIGKILL {
				err = fmt.Errorf("start was killed: the process ended with %#x, want %d or a kill: %w", uint32(s), code, aerr)
			}
		}
		return err
	}
	s, err := b.await(pid, done, begin)
	if err != nil {
		return err
	}
	if !s.Exited() || s.ExitStatus() != code {
		return fmt.Errorf("the process ended with %#x, want %d", uint32(s), code)
	}
	return b.command(when(2), "delete", id)
}

// clear deletes what is left of a life by force.
func (b *bench) clear(id string) error {
	if err := b.command(0, "delete", "--force", id); err != nil {
		return err
	}
	return b.gone(id)
}

func (b *bench) gone(id string) error {
	if left := b.left(id); len(left) > 0 {
		return fmt.Errorf("left behind: %s", strings.Join(left, ", "))
	}
	return nil
}

// left finds state, cgroups and processes of one life, or of all with "".
func (b *bench) left(id string) (out []string) {
	if id != "" {
		if _, err := os.Lstat(filepath.Join(b.state, id)); err == nil {
			out = append(out, "state")
		}
		hierarchies, _ := filepath.Glob("/sys/fs/cgroup/*")
		for _, h := range append(hierarchies, "/sys/fs/cgroup") {
			if _, err := os.Lstat(filepath.Join(h, id)); err == nil {
				procs, _ := os.ReadFile(filepath.Join(h, id, "cgroup.procs"))
				out = append(out, fmt.Sprintf("cgroup %s/%s %q", h, id, procs))
			}
		}
		return out
	}
	_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.HasPrefix(d.Name(), b.mark) {
			out = append(out, "cgroup "+path)
		}
		return nil
	})
	// Processes that are ours, and with them their namespaces.
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		raw, err := os.ReadFile(p + "/stat")
		if err != nil || p == "/proc/"+strconv.Itoa(os.Getpid()) {
			continue
		}
		_, rest, _ := strings.Cut(string(raw), ") ")
		if f := strings.Fields(rest); len(f) > 1 && f[1] == strconv.Itoa(os.Getpid()) {
			out = append(out, fmt.Sprintf("process %s in state %s", filepath.Base(p), f[0]))
		}
	}
	return out
}

// mounts counts those of the host's mounts that have to do with us.
func (b *bench) mounts() (n int) {
	raw, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(raw)) {
		if strings.Contains(line, b.dir) || strings.Contains(line, b.mark) {
			n++
		}
	}
	return n
}
