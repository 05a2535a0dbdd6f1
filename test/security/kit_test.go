//go:build linux && (amd64 || arm64)

package security

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/execfile"
)

// starts is how many containers a race gets: few in make test, many in make test-security.
func starts() int {
	if n, err := strconv.Atoi(os.Getenv("HAKO_SECURITY_STARTS")); err == nil && n > 0 {
		return n
	}
	return 50
}

// thorough tells that races have the time to hit their control.
func thorough() bool { return starts() >= 1000 }

// workDir holds the binaries and bundles of the whole run.
var workDir string

func TestMain(m *testing.M) {
	if file := os.Getenv(measureEnv); file != "" {
		os.Exit(measure(file))
	}
	if os.Getenv(expandEnv) != "" {
		os.Exit(expand())
	}
	os.Exit(func() int {
		var err error
		if workDir, err = os.MkdirTemp("", "hksec"); err != nil { // short: sockets lie below it
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(workDir)
		code := m.Run()
		if daemon.n != nil {
			if err := daemon.n.stop(); err != nil {
				fmt.Fprintln(os.Stderr, err)
				code = 1
			}
		}
		results.print()
		// The last shims and their cgroups go when they come to it.
		left := census()
		for deadline := time.Now().Add(5 * time.Minute); len(left) > 0 && time.Now().Before(deadline); left = census() {
			time.Sleep(50 * time.Millisecond)
		}
		if len(left) > 0 {
			fmt.Fprintf(os.Stderr, "left behind:\n\t%s\n", strings.Join(left, "\n\t"))
			code = 1
		}
		return code
	}())
}

// measureEnv makes this program run its arguments as a command, and names the file for what that took.
const measureEnv = "HAKO_SECURITY_MEASURE"

// measure runs a command for took. A process of its own does: until it executes its program, a child has the memory of whoever starts
// it, which counts as its own (getrusage(2), ru_maxrss), and that of the tests is large.
func measure(file string) int {
	cmd := exec.Command(os.Args[1], os.Args[2:]...)
	cmd.Env = append(os.Environ(), measureEnv+"=")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := cmd.Run()
	if cmd.ProcessState == nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	text := fmt.Sprint(cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss, int64(cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime()))
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return cmd.ProcessState.ExitCode()
}

// took runs a command of the runtime to its end and gives the most memory (KiB) and the CPU time that it used.
func (b *bundle) took(e engine, args ...string) (rss int64, cpu time.Duration, err error) {
	b.t.Helper()
	self, serr := os.Executable()
	must(b.t, serr)
	file := filepath.Join(b.dir, "took")
	cmd := b.command(e, args...)
	cmd.Path, cmd.Args, cmd.Env = self, append([]string{self}, cmd.Args...), append(cmd.Env, measureEnv+"="+file)
	err = cmd.Run()
	raw, rerr := os.ReadFile(file)
	must(b.t, rerr)
	_, serr = fmt.Sscan(string(raw), &rss, &cpu)
	must(b.t, serr)
	return rss, cpu, err
}

// census (H5) lists what the battery has left on the machine.
func census() (left []string) {
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, workDir) {
			left = append(left, "mount "+line)
		}
	}
	groups, _ := filepath.Glob("/sys/fs/cgroup/*/" + groupPrefix() + "*")
	for _, g := range groups {
		left = append(left, "cgroup "+g)
	}
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		if b, err := os.ReadFile(p); err == nil && bytes.Contains(b, []byte(workDir)) {
			left = append(left, "process "+strings.ReplaceAll(string(b), "\x00", " "))
		}
	}
	return left
}

// table collects what the rows have seen.
type table struct {
	sync.Mutex
	rows [][3]string
}

var results table

func (t *table) add(row, control, ours string) {
	t.Lock()
	defer t.Unlock()
	t.rows = append(t.rows, [3]string{row, control, ours})
}

func (t *table) print() {
	t.Lock()
	defer t.Unlock()
	if len(t.rows) == 0 {
		return
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%-44s %-64s %s\n", "row", "control", "hako")
	for _, r := range t.rows {
		fmt.Fprintf(&b, "%-44s %-64s %s\n", r[0], r[1], r[2])
	}
	fmt.Print(b.String())
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skipf("%s needs root", t.Name())
	}
	if _, err := exec.LookPath("busybox"); err != nil {
		t.Skipf("%s needs the command busybox", t.Name())
	}
}

// build compiles a command of this module once.
func build(name string, args ...string) func() (string, error) {
	return sync.OnceValues(func() (string, error) {
		out := filepath.Join(workDir, "bin", name)
		cmd := exec.Command("go", append(append([]string{"build", "-o", out}, args[:len(args)-1]...), args[len(args)-1])...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if b, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("build %s: %w\n%s", name, err, b)
		}
		return out, nil
	})
}

var (
	// As make build does it: see package early.
	hakoBinary     = build("hako-oci", "-ldflags=-E main.entry", "../../cmd/hako-oci")
	insecureBinary = build("hako-oci-insecure", "-ldflags=-E main.entry", "-tags", "insecure", "../../cmd/hako-oci")
	guestBinary    = build("guest", "../../oci/testdata/guest")
)

func built(t *testing.T, f func() (string, error)) string {
	t.Helper()
	path, err := f()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// engine is a runtime behind runc's command line.
type engine struct {
	name    string
	command []string
	env     []string
}

func hako(t *testing.T) engine {
	t.Helper()
	needRoot(t)
	return engine{name: "hako", command: []string{built(t, hakoBinary)}}
}

// without is hako with the defence of a row taken out.
func without(t *testing.T, row string) engine {
	t.Helper()
	needRoot(t)
	return engine{name: "hako without " + row, command: []string{built(t, insecureBinary)}, env: []string{"HAKO_INSECURE=" + row}}
}

// peers gives those of the named runtimes that are installed.
func peers(t *testing.T, names ...string) (out []engine) {
	t.Helper()
	needRoot(t)
	for _, name := range names {
		path, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		e := engine{name: name, command: []string{path}}
		if _, err := os.Stat("/sys/fs/cgroup/unified"); name == "crun" && err == nil {
			// It refuses hybrid hierarchies of which the v2 one has controllers.
			e.command = []string{"unshare", "-m", "sh", "-c", `umount /sys/fs/cgroup/unified; exec "$@"`, "crun", path}
		}
		out = append(out, e)
	}
	return out
}

// attack runs an escape against a runtime, and says what it has reached; "" is nothing.
type attack func(t *testing.T, e engine) (hit string)

// battery shows that the attack hits a control, and that hako withstands it. A race may
// miss its control in a short run.
func battery(t *testing.T, row string, race bool, controls []engine, f attack) {
	t.Helper()
	ours := hako(t)
	seen := "no control is installed"
	if len(controls) > 0 {
		var hits, names []string
		for _, c := range controls {
			names = append(names, c.name)
			if hit := f(t, c); hit != "" {
				hits = append(hits, c.name+": "+hit)
			}
		}
		switch {
		case len(hits) > 0:
			seen = "HIT " + strings.Join(hits, "; ")
		case race && !thorough():
			seen = fmt.Sprintf("%s: not hit in %d starts", strings.Join(names, ", "), starts())
		default:
			seen = "not hit"
			t.Errorf("no control was hit (%s): the attack does not work", strings.Join(names, ", "))
		}
	}
	verdict(t, row, seen, f(t, ours))
}

// compared records a row whose control is the same request with the protection switched off, or the same check of something that
// has the flaw.
func compared(t *testing.T, row, control, controlHit, hit string) {
	t.Helper()
	if controlHit == "" {
		t.Errorf("the control (%s) was not hit: the attack does not work", control)
		verdict(t, row, control+": not hit", hit)
		return
	}
	verdict(t, row, "HIT "+control+": "+controlHit, hit)
}

func verdict(t *testing.T, row, control, hit string) {
	t.Helper()
	if hit != "" {
		t.Errorf("hako is hit: %s", hit)
		hit = "HIT " + hit
	} else {
		hit = "safe"
	}
	results.add(row, clip(control, 64), hit)
	t.Logf("%s: control: %s; hako: %s", row, control, hit)
}

func clip(s string, n int) string {
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > n {
		s = s[:n-1] + "…"
	}
	return s
}

var counter atomic.Int64

func groupPrefix() string { return fmt.Sprintf("hksec-%d-", os.Getpid()) }

// bundle is a hand-made root file system with its configuration.
type bundle struct {
	t           *testing.T
	dir, rootfs string
	id          string
	spec        *specs.Spec
	canary      *canary
}

// capabilities are those of a container with no restrictions to speak of: attackers have more rights than usual.
var capabilities = []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
	"CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE", "CAP_SYS_PTRACE"}

var applets = []string{"sh", "cat", "ls", "sleep", "id", "true", "mkdir", "grep", "readlink", "touch", "stat", "pwd", "mount", "head"}

func newBundle(t *testing.T, script string) *bundle {
	t.Helper()
	needRoot(t)
	n := counter.Add(1)
	b := &bundle{t: t, dir: filepath.Join(workDir, fmt.Sprint("b", n)), id: groupPrefix() + fmt.Sprint(n)}
	b.rootfs = filepath.Join(b.dir, "rootfs")
	for _, d := range []string{"bin", "proc", "sys", "tmp", "etc"} {
		must(t, os.MkdirAll(filepath.Join(b.rootfs, d), 0o755))
	}
	must(t, busyboxIn(filepath.Join(b.rootfs, "bin")))
	b.canary = newCanary(t)
	b.spec = &specs.Spec{
		Version: "1.0.2", Root: &specs.Root{Path: "rootfs"},
		Process: &specs.Process{
			Args: []string{"sh", "-c", script}, Env: []string{"PATH=/bin"}, Cwd: "/", NoNewPrivileges: true,
			Capabilities: &specs.LinuxCapabilities{Bounding: capabilities, Effective: capabilities, Permitted: capabilities},
		},
		Mounts: []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}},
		Linux: &specs.Linux{
			CgroupsPath: "/" + b.id,
			Namespaces:  []specs.LinuxNamespace{{Type: "pid"}, {Type: "ipc"}, {Type: "uts"}, {Type: "mount"}, {Type: "network"}},
			Resources:   &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}},
		},
	}
	t.Cleanup(func() { os.RemoveAll(b.dir) })
	return b
}

// busyboxIn puts busybox and its most used names into a directory.
func busyboxIn(dir string) error {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return err
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := execfile.Write(filepath.Join(dir, "busybox"), raw, 0o755); err != nil {
		return err
	}
	for _, a := range applets {
		if err := os.Symlink("busybox", filepath.Join(dir, a)); err != nil {
			return err
		}
	}
	return nil
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (b *bundle) link(target, name string) {
	b.t.Helper()
	full := filepath.Join(b.rootfs, name)
	must(b.t, os.MkdirAll(filepath.Dir(full), 0o755))
	must(b.t, os.RemoveAll(full))
	must(b.t, os.Symlink(target, full))
}

func (b *bundle) mount(dest, typ, source string, options ...string) {
	b.spec.Mounts = append(b.spec.Mounts, specs.Mount{Destination: dest, Type: typ, Source: source, Options: options})
}

// output is the end of a command.
type output struct {
	text string
	err  error
}

func (b *bundle) command(e engine, args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	b.t.Cleanup(cancel)
	argv := slices.Concat(e.command, []string{"--root", filepath.Join(b.dir, "state-"+strings.Fields(e.name)[0])}, args)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env, cmd.Dir, cmd.WaitDelay = append(os.Environ(), e.env...), b.dir, time.Minute
	return cmd
}

func (b *bundle) writeConfig() {
	b.t.Helper()
	raw, err := json.Marshal(b.spec)
	must(b.t, err)
	must(b.t, os.WriteFile(filepath.Join(b.dir, "config.json"), raw, 0o600))
}

// do runs a command of the runtime to its end. Its output goes to a file: what a container
// leaves running must not hold up the test.
func (b *bundle) do(e engine, args ...string) output {
	b.t.Helper()
	cmd := b.command(e, args...)
	f, err := os.CreateTemp(b.dir, "out")
	must(b.t, err)
	defer os.Remove(f.Name())
	defer f.Close()
	cmd.Stdout, cmd.Stderr = f, f
	err = cmd.Run()
	text, _ := os.ReadFile(f.Name())
	return output{string(text), err}
}

// run runs the container in the foreground.
func (b *bundle) run(e engine) output {
	b.t.Helper()
	b.writeConfig()
	out := b.do(e, "run", b.id)
	b.remove(e)
	return out
}

// start starts the container in the background, and gives its pid; 0 if it was refused.
func (b *bundle) start(e engine, verb ...string) (pid int, out output) {
	b.t.Helper()
	b.writeConfig()
	file := filepath.Join(b.dir, "pid")
	os.Remove(file)
	if len(verb) == 0 {
		verb = []string{"run", "-d"}
	}
	out = b.do(e, append(verb, "--pid-file", file, b.id)...)
	b.t.Cleanup(func() { b.remove(e) })
	if raw, err := os.ReadFile(file); err == nil && out.err == nil {
		pid, _ = strconv.Atoi(strings.TrimSpace(string(raw)))
	}
	return pid, out
}

func (b *bundle) remove(e engine) {
	if out := b.do(e, "delete", "--force", b.id); out.err != nil && !strings.Contains(out.text, "exist") && !strings.Contains(out.text, "No such file") {
		b.t.Errorf("%s: delete: %v %s", e.name, out.err, out.text)
	}
}

// terminal runs the container in the foreground on a terminal of its own.
func (b *bundle) terminal(e engine) output {
	b.t.Helper()
	b.spec.Process.Terminal = true
	b.writeConfig()
	master, slave := openTerminal(b.t)
	defer master.Close()
	cmd := b.command(e, "run", b.id)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	must(b.t, cmd.Start())
	slave.Close()
	var text bytes.Buffer
	done := make(chan struct{})
	go func() { defer close(done); text.ReadFrom(master) }()
	err := cmd.Wait()
	b.remove(e)
	select {
	case <-done:
	case <-time.After(5 * time.Minute):
		b.t.Error("the terminal does not end")
	}
	return output{text.String(), err}
}

func openTerminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	must(t, err)
	must(t, unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	must(t, err)
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	must(t, err)
	return os.NewFile(uintptr(fd), "ptmx"), slave
}

// canary (H1) is a tree on the host that nothing may touch, and that nobody may see.
type canary struct {
	dir    string
	before map[string]string
}

const secret = "canary-of-the-host"

func newCanary(t *testing.T) *canary {
	t.Helper()
	dir := filepath.Join(workDir, fmt.Sprint("canary", counter.Add(1)))
	for name, mode := range map[string]os.FileMode{"ptmx": 0o600, "sub/file": 0o640, "sub/null": 0o604, "kernel/shm_rmid_forced": 0o600, "host-secret": 0o600} {
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o711))
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(secret), mode))
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	c := &canary{dir: dir}
	c.before = c.look()
	return c
}

// look describes everything in the tree: kind, mode, owner, inode, content.
func (c *canary) look() map[string]string {
	out := map[string]string{}
	err := filepath.WalkDir(c.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		text := fmt.Sprintf("%o %d:%d inode %d device %x", st.Mode, st.Uid, st.Gid, st.Ino, st.Rdev)
		if d.Type().IsRegular() {
			raw, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text += fmt.Sprintf(" %x", sha256.Sum256(raw))
		}
		out[strings.TrimPrefix(path, c.dir+"/")] = text
		return nil
	})
	if err != nil {
		out["error"] = err.Error()
	}
	return out
}

// touched names what has changed, "" if nothing has. It makes the canary whole again for the next runtime.
func (c *canary) touched(t *testing.T) string {
	t.Helper()
	now := c.look()
	var diff []string
	for name, text := range now {
		if old, ok := c.before[name]; !ok {
			diff = append(diff, "made "+name)
		} else if old != text {
			diff = append(diff, "changed "+name)
		}
	}
	for name := range c.before {
		if _, ok := now[name]; !ok {
			diff = append(diff, "deleted "+name)
		}
	}
	if len(diff) == 0 {
		return ""
	}
	slices.Sort(diff)
	must(t, os.RemoveAll(c.dir))
	next := newCanary(t)
	must(t, os.Rename(next.dir, c.dir))
	c.before = c.look()
	return fmt.Sprintf("%d changes on the host: %s", len(diff), strings.Join(diff, ", "))
}

// hostFiles are settings of the host that attacks aim at.
func hostFiles() string {
	var b strings.Builder
	for _, f := range []string{"/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sys/kernel/shm_rmid_forced", "/proc/sys/kernel/modprobe"} {
		raw, err := os.ReadFile(f)
		fmt.Fprintln(&b, f, string(raw), errors.Is(err, fs.ErrNotExist))
	}
	return b.String()
}

// eventually waits for what another process brings about.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for: %s", what)
		}
	}
}
