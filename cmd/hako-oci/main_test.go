//go:build linux && (amd64 || arm64)

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/execfile"
	"github.com/hako-engine/hako/oci/spec"
)

// The test binary is the runtime, and also the program in the container.
func TestMain(m *testing.M) {
	switch {
	case os.Getenv("HAKO_TEST_GUEST") != "":
		guest()
	case os.Getenv("HAKO_TEST_MAIN") != "":
		os.Exit(Main(os.Args[1:]))
	}
	dir, err := os.MkdirTemp("", "hako-oci")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	buildDir = dir
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

func guest() {
	switch os.Args[1] {
	case "exit":
		n, _ := strconv.Atoi(os.Args[2])
		os.Exit(n)
	case "id":
		fmt.Println(os.Getuid(), os.Getgid())
	case "show": // environment, directory, a field of status, names of descriptors above 2
		for _, what := range os.Args[2:] {
			switch v, ok := os.LookupEnv(what); {
			case ok:
				fmt.Println(v)
			case what == "slack": // of timers, in nanoseconds
				n, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
				fmt.Println(n, err)
			case what == "cwd":
				dir, err := os.Getwd()
				fmt.Println(dir, err)
			case what == "fds": // the Go runtime has files of its own behind it
				b := make([]byte, 16)
				n, err := syscall.Pread(3, b, 0)
				fmt.Println(3, string(b[:max(n, 0)]), err == nil)
			default:
				raw, _ := os.ReadFile("/proc/self/status")
				for line := range strings.Lines(string(raw)) {
					if v, ok := strings.CutPrefix(line, what+":"); ok {
						fmt.Println(strings.TrimSpace(v))
					}
				}
			}
		}
	case "notify": // then ends with a code
		fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_DGRAM, 0)
		if err == nil {
			err = syscall.Sendto(fd, []byte("STATUS=nearly\nREADY=1\n"), 0, &syscall.SockaddrUnix{Name: os.Getenv("NOTIFY_SOCKET")})
		}
		if err != nil {
			fmt.Println(os.Getenv("NOTIFY_SOCKET"), err)
			os.Exit(1)
		}
		time.Sleep(3 * time.Second) // whoever passes it on may have to wait for a CPU
		os.Exit(7)
	case "wait": // until it is killed, also on a slow machine
		fmt.Println("waiting")
		time.Sleep(time.Hour)
	}
	os.Exit(0)
}

// built gives a program whose first instructions are those of the hako-oci of make build.
func built(t *testing.T) string {
	t.Helper()
	path, err := buildOnce()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

var buildOnce = sync.OnceValues(func() (string, error) {
	path := filepath.Join(buildDir, "hako-oci")
	if out, err := exec.Command("go", "build", "-ldflags=-E main.entry", "-o", path, ".").CombinedOutput(); err != nil {
		return "", fmt.Errorf("build: %w\n%s", err, out)
	}
	return path, nil
})

var buildDir string // removed at the end

type cli struct {
	t      *testing.T
	bundle string
	id     string
}

func (c cli) run(args ...string) (stdout, stderr string, code int) {
	c.t.Helper()
	program := os.Args[0]
	if len(args) > 0 && slices.Contains([]string{"create", "run", "start", "kill", "delete"}, args[0]) {
		program = built(c.t) // see package early
	}
	cmd := exec.Command(program, append([]string{"--root", filepath.Join(c.bundle, "state")}, args...)...)
	cmd.Env = append(os.Environ(), "HAKO_TEST_MAIN=1")
	cmd.Dir = c.bundle
	// Files, and not pipes: a container that runs on keeps them open.
	o, err := os.CreateTemp(c.bundle, "out")
	if err != nil {
		c.t.Fatal(err)
	}
	defer o.Close()
	e, err := os.CreateTemp(c.bundle, "err")
	if err != nil {
		c.t.Fatal(err)
	}
	defer e.Close()
	cmd.Stdout, cmd.Stderr = o, e
	if err := cmd.Run(); err != nil {
		if _, ok := err.(*exec.ExitError); !ok {
			c.t.Fatal(err)
		}
	}
	a, _ := os.ReadFile(o.Name())
	b, _ := os.ReadFile(e.Name())
	return string(a), string(b), cmd.ProcessState.ExitCode()
}

// with runs the command line with input, more environment and descriptors from 3 on.
func (c cli) with(input string, env []string, files []*os.File, args ...string) (string, int) {
	c.t.Helper()
	cmd := exec.Command(os.Args[0], append([]string{"--root", filepath.Join(c.bundle, "state")}, args...)...)
	cmd.Env = append(append(os.Environ(), "HAKO_TEST_MAIN=1"), env...)
	cmd.Dir, cmd.Stdin, cmd.ExtraFiles = c.bundle, strings.NewReader(input), files
	out, err := cmd.CombinedOutput()
	if _, ok := err.(*exec.ExitError); err != nil && !ok {
		c.t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

func newCLI(t *testing.T, args ...string) cli {
	t.Helper()
	c := cli{t: t, bundle: t.TempDir(), id: fmt.Sprintf("hakocli-%d-%s", os.Getpid(), strings.ToLower(strings.ReplaceAll(t.Name(), "/", "-")))}
	if os.Geteuid() != 0 {
		t.Skipf("needs root: %s", t.Name())
	}
	raw, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(c.bundle, "rootfs"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := execfile.Write(filepath.Join(c.bundle, "rootfs/guest"), raw, 0o755); err != nil {
		t.Fatal(err)
	}
	s := spec.Default(false)
	s.Root.Readonly = false
	s.Process.Terminal, s.Process.Rlimits = false, nil
	s.Process.Args = append([]string{"/guest"}, args...)
	s.Process.Env = append(s.Process.Env, "HAKO_TEST_GUEST=1", "GOMAXPROCS=1")
	s.Linux.CgroupsPath = "/" + c.id
	c.config(s)
	t.Cleanup(func() { c.run("delete", "--force", c.id) })
	return c
}

func (c cli) config(s *specs.Spec) {
	c.t.Helper()
	raw, err := json.Marshal(s)
	if err != nil {
		c.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(c.bundle, "config.json"), raw, 0o644); err != nil {
		c.t.Fatal(err)
	}
}

func TestExitCodes(t *testing.T) {
	t.Parallel()
	c := newCLI(t, "exit", "42")
	if _, stderr, code := c.run("run", c.id); code != 42 {
		t.Errorf("run: %d %s", code, stderr)
	}
	for _, tc := range []struct {
		code int
		text string
		args []string
	}{
		{3, "No help topic for 'nosuch'", []string{"nosuch"}},
		{1, "flag provided but not defined", []string{"run", "--nosuch", "x"}},
		{1, "container does not exist", []string{"state", "nosuch"}},
		{1, "container does not exist", []string{"delete", "nosuch"}},
		{0, "", []string{"delete", "--force", "nosuch"}},
		{255, "container does not exist", []string{"exec", "nosuch", "ls"}},
		{1, "container does not exist", []string{"kill", "nosuch", "9"}},
		{1, "invalid container ID format", []string{"run", "a/b"}},
		{1, "cannot use console socket if runc will not detach or allocate tty", []string{"run", "--console-socket", "/x", "x"}},
		{1, "runc run failed: JSON specification file config.json not found", []string{"run", "--bundle", "/no/such", "x"}},
		{1, "runc create failed: JSON specification file config.json not found", []string{"create", "--bundle", "/no/such", "x"}},
		{255, "exec failed: ", []string{"exec", "--process", "/nosuch", "nosuch"}},
		{1, "invalid log-format", []string{"--log-format", "xml", "list"}},
		{0, "", []string{"help"}},
		{0, "", []string{"help", "run"}},
		{3, "No help topic for 'nosuch'", []string{"help", "nosuch"}},
		{1, "remove it first", []string{"spec", "--bundle", c.bundle}},
		{0, "", []string{"list"}},
		{0, "", []string{"features"}},
		{0, "", []string{"plan"}},
		{0, "", []string{"--version"}},
	} {
		if _, stderr, code := c.run(tc.args...); code != tc.code || !strings.Contains(stderr, tc.text) {
			t.Errorf("%v: exit code %d, want %d: %s", tc.args, code, tc.code, stderr)
		}
	}
}

func TestVersionIsWhatCallersParse(t *testing.T) {
	t.Parallel()
	c := newCLI(t)
	out, _, _ := c.run("--version")
	l := strings.Split(out, "\n")
	if !strings.HasPrefix(l[0], "runc version ") || !strings.HasPrefix(l[1], "commit: ") || !strings.HasPrefix(l[2], "spec: ") || !strings.HasPrefix(l[3], "go: ") {
		t.Errorf("%q", l)
	}
}

func TestCreateStartExecKillDelete(t *testing.T) {
	t.Parallel()
	c := newCLI(t, "wait")
	pidFile := filepath.Join(c.bundle, "pid")
	if _, stderr, code := c.run("create", "--pid-file", pidFile, c.id); code != 0 {
		t.Fatal(stderr)
	}
	raw, err := os.ReadFile(pidFile)
	if _, aerr := strconv.Atoi(string(raw)); err != nil || aerr != nil {
		t.Errorf("pid file %q %v", raw, err)
	}
	state := func() (s struct {
		Pid                 int
		Status, ID, Bundle  string
		OCIVersion, Created string
	}) {
		out, stderr, _ := c.run("state", c.id)
		if err := json.Unmarshal([]byte(out), &s); err != nil {
			t.Fatalf("%v: %s%s", err, out, stderr)
		}
		return s
	}
	if s := state(); s.Status != "created" || strconv.Itoa(s.Pid) != string(raw) || s.Bundle != c.bundle || s.ID != c.id {
		t.Errorf("%+v", s)
	}
	if _, stderr, code := c.run("start", c.id); code != 0 {
		t.Fatal(stderr)
	}
	if s := state(); s.Status != "running" {
		t.Errorf("%+v", s)
	}
	for _, tc := range []struct{ user, want string }{{"5:6", "5 6\n"}, {"1", "1 0\n"}} {
		if out, stderr, code := c.run("exec", "--user", tc.user, c.id, "/guest", "id"); out != tc.want || code != 0 {
			t.Errorf("exec --user %s: %q %d %s", tc.user, out, code, stderr)
		}
	}
	// CVE-2016-3697 and others: numbers that wrap around to root.
	for _, user := range []string{"4294967296", "4294967295", "18446744073709551616", "-1", "0x0", "", ":", "root", "1:4294967296", "+0"} {
		if user == "" {
			continue
		}
		if out, _, code := c.run("exec", "--user", user, c.id, "/guest", "id"); code != 255 {
			t.Errorf("exec --user %s: %q %d", user, out, code)
		}
	}
	log := filepath.Join(c.bundle, "log")
	if _, stderr, code := c.run("--log", log, "--log-format", "json", "exec", c.id, "nosuch"); code != 255 || !strings.Contains(stderr, `exec: "nosuch": executable file not found in $PATH`) {
		t.Errorf("exec nosuch: %d %s", code, stderr)
	}
	line, _ := os.ReadFile(log)
	var entry struct{ Level, Msg, Time string }
	if err := json.Unmarshal(line, &entry); err != nil || entry.Level != "error" || entry.Time == "" || !strings.Contains(entry.Msg, "executable file not found") {
		t.Errorf("log %q %v", line, err)
	}
	if out, _, _ := c.run("ps", "--format", "json", c.id); out != "["+string(raw)+"]\n" {
		t.Errorf("ps: %s", out)
	}
	if out, _, _ := c.run("list", "-q"); out != c.id+"\n" {
		t.Errorf("list: %s", out)
	}
	if out, stderr, _ := c.run("events", "--stats", c.id); !strings.HasPrefix(out, `{"type":"stats"`) {
		t.Errorf("events: %s%s", out, stderr)
	}
	if _, stderr, code := c.run("update", "--pids-limit", "77", c.id); code != 0 {
		t.Errorf("update: %s", stderr)
	}
	for _, cmd := range []string{"pause", "resume"} {
		if _, stderr, code := c.run(cmd, c.id); code != 0 {
			t.Errorf("%s: %s", cmd, stderr)
		}
		if _, _, code := c.run(cmd, c.id); code != 1 {
			t.Errorf("%s twice: %d", cmd, code)
		}
	}
	if _, stderr, code := c.run("kill", c.id, "FOO"); code != 1 || !strings.Contains(stderr, `unknown signal \"FOO\"`) {
		t.Errorf("kill FOO: %d %s", code, stderr)
	}
	if _, stderr, code := c.run("delete", c.id); code != 1 || !strings.Contains(stderr, "that is not stopped: running") {
		t.Errorf("delete: %d %s", code, stderr)
	}
	if _, stderr, code := c.run("kill", "--all", c.id, "KILL"); code != 0 {
		t.Errorf("kill: %s", stderr)
	}
	if _, stderr, code := c.run("delete", "--force", c.id); code != 0 {
		t.Errorf("delete: %s", stderr)
	}
	if _, stderr, code := c.run("kill", c.id, "KILL"); code != 1 || !strings.Contains(stderr, "does not exist") {
		t.Errorf("kill: %d %s", code, stderr)
	}
}

// What engines rely on, call by call, in a container that runs.
func TestWhatEnginesRelyOn(t *testing.T) {
	t.Parallel()
	c := newCLI(t, "wait")
	s, _, err := spec.Read(filepath.Join(c.bundle, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	s.Process.User = specs.User{GID: 6, AdditionalGids: []uint32{9}}
	c.config(s)
	if out, _, code := c.run("list", "--format", "json"); out != "null\n" || code != 0 {
		t.Errorf("empty list: %q %d", out, code)
	}
	if _, stderr, code := c.run("run", "--detach", c.id); code != 0 {
		t.Fatal(stderr)
	}
	process := filepath.Join(c.bundle, "process.json")
	raw, err := json.Marshal(specs.Process{Cwd: "/", Args: []string{"/guest", "show", "GREETING", "HOME"}, Env: []string{"HAKO_TEST_GUEST=1", "GREETING=from a file"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(process, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	preserved, err := os.Create(filepath.Join(c.bundle, "preserved"))
	if err != nil {
		t.Fatal(err)
	}
	defer preserved.Close()
	fmt.Fprint(preserved, "kept")
	show := func(what ...string) []string { return append([]string{c.id, "/guest", "show"}, what...) }
	cmd := func(flags []string, rest []string) []string {
		return append(append([]string{"exec"}, flags...), rest...)
	}
	for _, tc := range []struct {
		name  string
		args  []string
		input string
		env   []string
		files []*os.File
		code  int
		want  string // the output begins with it
	}{
		{name: "kill 0", args: []string{"kill", c.id, "0"}},
		{name: "kill by name", args: []string{"kill", c.id, "SIGWINCH"}},
		{name: "kill by short name", args: []string{"kill", c.id, "winch"}},
		{name: "kill by number", args: []string{"kill", c.id, "28"}},
		{name: "exec --process", args: []string{"exec", "--process", process, c.id}, want: "from a file\n/\n"},
		{name: "exec --env, --cwd", args: cmd([]string{"--env", "A=b", "-e", "C=d", "--cwd", "/proc"}, show("A", "C", "cwd")), want: "b\nd\n/proc <nil>\n"},
		{name: "exec --env of what is set", args: cmd([]string{"-e", "GOMAXPROCS=2", "-e", "A=1", "-e", "A=2"}, show("GOMAXPROCS", "A")), want: "2\n2\n"},
		{name: "exec --process-label without SELinux", args: cmd([]string{"--process-label", "x"}, show("LISTEN_FDS")), code: 0},
		{name: "exec --cgroup of what is not there", args: cmd([]string{"--cgroup", "nosuch"}, show("A")), code: 255},
		{name: "exec --cgroup twice", args: cmd([]string{"--cgroup", "pids:a", "--cgroup", "pids:b"}, show("A")), code: 255},
		{name: "exec --cgroup without a name", args: cmd([]string{"--cgroup", ":a"}, show("A")), code: 255, want: "exec failed: --cgroup :a"},
		{name: "exec --cgroup mixed", args: cmd([]string{"--cgroup", "pids:/", "--cgroup", "/"}, show("A")), code: 255, want: "exec failed: --cgroup /"},
		{name: "exec --cgroup /", args: cmd([]string{"--cgroup", "/"}, show("Uid")), want: "0"},
		{name: "exec --pid-file", args: cmd([]string{"--pid-file", filepath.Join(c.bundle, "exec.pid")}, show("Uid")), want: "0"},
		{name: "exec --user keeps the groups", args: cmd([]string{"-u", "5"}, show("Uid", "Gid", "Groups")), want: "5\t5\t5\t5\n6\t6\t6\t6\n9\n"},
		{name: "exec --user of no number", args: cmd([]string{"-u", "root"}, show("Uid")), code: 255, want: "exec failed: parsing root as int"},
		{name: "exec --additional-gids", args: cmd([]string{"-u", "5:6", "-g", "7", "--additional-gids", "8"}, show("Uid", "Gid", "Groups")), want: "5\t5\t5\t5\n6\t6\t6\t6\n7 8 9\n"},
		{name: "exec --cap", args: cmd([]string{"--cap", "CAP_CHOWN"}, show("CapEff")), want: "0000000020000421\n"},
		{name: "exec --no-new-privs", args: cmd([]string{"--no-new-privs"}, show("NoNewPrivs")), want: "1\n"},
		{name: "exec --no-new-privs=false", args: cmd([]string{"--no-new-privs=false"}, show("NoNewPrivs")), want: "0\n"},
		{name: "exec without a command", args: []string{"exec", c.id}, code: 255, want: "exec failed: exec args cannot be empty"},
		{name: "exec with somebody else's LISTEN_FDS", args: cmd(nil, show("LISTEN_FDS")), env: []string{"LISTEN_FDS=90", "LISTEN_PID=1"}},
		{name: "exec --preserve-fds", args: cmd([]string{"--preserve-fds", "1"}, show("fds")), files: []*os.File{preserved}, want: "3 kept true\n"},
		{name: "exec with LISTEN_FDS", args: cmd(nil, show("LISTEN_FDS", "LISTEN_PID", "fds")), env: []string{"LISTEN_FDS=1"}, files: []*os.File{preserved}, want: "1\n1\n3 kept true\n"},
		{name: "exec of what is not open", args: cmd([]string{"--preserve-fds", "90"}, show("fds")), code: 255, want: ""},
		{name: "exec's exit code", args: []string{"exec", c.id, "/guest", "exit", "9"}, code: 9},
		{name: "exec --tty --detach without a socket", args: []string{"exec", "-t", "-d", c.id, "/guest", "exit", "0"}, code: 255},
		{name: "exec --console-socket without --tty", args: []string{"exec", "-d", "--console-socket", "/x", c.id, "/guest", "exit", "0"}, code: 255},
		{name: "update --resources -", args: []string{"update", "--resources", "-", c.id}, input: `{"pids":{"limit":55}}`},
		{name: "update --resources=-", args: []string{"update", "--resources=-", c.id}, input: `{"memory":{"limit":268435456}}`},
		{name: "update of bad JSON", args: []string{"update", "--resources", "-", c.id}, input: `{`, code: 1},
		{name: "update of a size with a unit", args: []string{"update", "--memory", "256 MiB", c.id}},
		{name: "update of no size", args: []string{"update", "--memory", "x", c.id}, code: 1, want: "invalid value for memory: invalid size: 'x'"},
		{name: "update of no schema", args: []string{"update", "--l3-cache-schema", "x", c.id}, code: 1},
		{name: "update of kernel memory", args: []string{"update", "--kernel-memory", "1m", c.id}, want: "limits of kernel memory"},
		{name: "ps of a wrong option", args: []string{"ps", c.id, "--nosuch"}, code: 1, want: "ps: exit status 1: error: unknown gnu long option"},
		{name: "start twice", args: []string{"start", c.id}, code: 1},
		{name: "create twice", args: []string{"create", c.id}, code: 1},
		{name: "pause", args: []string{"pause", c.id}},
		{name: "exec in a paused container", args: []string{"exec", c.id, "/guest", "exit", "0"}, code: 255},
		{name: "resume", args: []string{"resume", c.id}},
		{name: "checkpoint where there is no CRIU", args: []string{"checkpoint", c.id}, env: []string{"PATH=/nowhere"}, code: 1},
	} {
		out, code := c.with(tc.input, tc.env, tc.files, tc.args...)
		if code != tc.code || !strings.HasPrefix(out, tc.want) && (code == 0 || !strings.Contains(out, tc.want)) && !strings.Contains(out, "level=warning msg=\""+tc.want) {
			t.Errorf("%s: exit code %d, want %d; output %q, want %q", tc.name, code, tc.code, out, tc.want)
		}
	}
	out, _, _ := c.run("events", "--stats", c.id)
	var ev struct {
		Type, ID string
		Data     struct {
			Memory struct {
				Usage struct{ Limit, Usage uint64 }
				Raw   map[string]uint64
			}
			Pids struct{ Current, Limit uint64 }
		}
	}
	if err := json.Unmarshal([]byte(out), &ev); err != nil {
		t.Fatal(err)
	}
	if d := ev.Data; ev.Type != "stats" || ev.ID != c.id || d.Memory.Usage.Limit != 268435456 || d.Memory.Usage.Usage == 0 || len(d.Memory.Raw) == 0 || d.Pids.Current == 0 || d.Pids.Limit != 55 {
		t.Errorf("events: %s", out)
	}
	var list []struct{ ID, Status, Owner, Bundle, Rootfs, Created string }
	if out, _, _ := c.run("list", "--format", "json"); json.Unmarshal([]byte(out), &list) != nil || len(list) != 1 || list[0].ID != c.id || list[0].Status != "running" || list[0].Owner != "root" {
		t.Errorf("list: %s", out)
	}
}

func TestRunKeep(t *testing.T) {
	t.Parallel()
	c := newCLI(t, "exit", "3")
	if _, stderr, code := c.run("run", "--keep", c.id); code != 3 {
		t.Errorf("run --keep: %d %s", code, stderr)
	}
	if out, _, code := c.run("state", c.id); code != 0 || !strings.Contains(out, `"status": "stopped"`) {
		t.Errorf("state after run --keep: %d %s", code, out)
	}
	if _, stderr, code := c.run("kill", "--all", c.id, "9"); code != 0 {
		t.Errorf("kill --all of a stopped container: %d %s", code, stderr)
	}
	if _, stderr, code := c.run("kill", c.id, "9"); code != 1 || !strings.Contains(stderr, "container not running") {
		t.Errorf("kill of a stopped container: %d %s", code, stderr)
	}
	if _, stderr, code := c.run("delete", c.id); code != 0 {
		t.Errorf("delete: %d %s", code, stderr)
	}
}

// receive takes one descriptor from the next connection. It does without package net,
// which would make the guest a program with an interpreter.
func receive(t *testing.T, listener int) *os.File {
	t.Helper()
	p := []unix.PollFd{{Fd: int32(listener), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(p, int(hangLimit.Milliseconds()))
		if err == unix.EINTR {
			continue
		}
		if n != 1 {
			t.Fatalf("nobody connects: %v", err)
		}
		break
	}
	conn, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(conn)
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(conn, make([]byte, 64), oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		t.Fatalf("%d messages, %v", len(msgs), err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		t.Fatalf("descriptors %v, %v", fds, err)
	}
	f := os.NewFile(uintptr(fds[0]), "received")
	t.Cleanup(func() { f.Close() })
	return f
}

// Terminals and pidfds arrive over sockets, for the first process and for one more.
func TestSockets(t *testing.T) {
	t.Parallel()
	c := newCLI(t, "wait")
	raw, err := os.ReadFile(filepath.Join(c.bundle, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	s := new(specs.Spec)
	if err := json.Unmarshal(raw, s); err != nil {
		t.Fatal(err)
	}
	s.Process.Terminal = true
	c.config(s)
	dir, err := os.MkdirTemp("", "hako") // short: a socket's path has 107 bytes at most
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	listen := func(name string) int {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		if err := unix.Bind(fd, &unix.SockaddrUnix{Name: filepath.Join(dir, name)}); err != nil {
			t.Fatal(err)
		}
		if err := unix.Listen(fd, 1); err != nil {
			t.Fatal(err)
		}
		return fd
	}
	console, pidfd := listen("console"), listen("pidfd")
	flags := []string{"--console-socket", filepath.Join(dir, "console"), "--pidfd-socket", filepath.Join(dir, "pidfd")}
	check := func(what string) {
		master, process := receive(t, console), receive(t, pidfd)
		if n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN); err != nil || n < 0 {
			t.Errorf("%s: the console is no terminal: %v", what, err)
		}
		if err := unix.PidfdSendSignal(int(process.Fd()), 0, nil, 0); err != nil {
			t.Errorf("%s: the pidfd: %v", what, err)
		}
	}
	if _, stderr, code := c.run(append(append([]string{"create"}, flags...), c.id)...); code != 0 {
		t.Fatal(stderr)
	}
	check("create")
	if _, stderr, code := c.run("start", c.id); code != 0 {
		t.Fatal(stderr)
	}
	if _, stderr, code := c.run(append(append([]string{"exec", "-t", "-d"}, flags...), c.id, "/guest", "wait")...); code != 0 {
		t.Fatal(stderr)
	}
	check("exec")
}

// On a host whose mounts are shared, as with systemd, nothing that the container's first
// process detaches goes from the host, and nothing that it mounts shows there.
func TestMountsOfASharedHostStay(t *testing.T) {
	t.Parallel()
	for _, propagation := range []string{"", "rshared", "shared", "rprivate"} {
		c := newCLI(t, "exit", "0")
		raw, err := os.ReadFile(filepath.Join(c.bundle, "config.json"))
		if err != nil {
			t.Fatal(err)
		}
		var s specs.Spec
		if err := json.Unmarshal(raw, &s); err != nil {
			t.Fatal(err)
		}
		s.Linux.RootfsPropagation = propagation
		c.config(&s)
		cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-ec", `
			mount --make-rshared /
			cat /proc/self/mountinfo >before
			"$@" || exit 9
			cat /proc/self/mountinfo >after`, "sh",
			os.Args[0], "--root", filepath.Join(c.bundle, "state"), "run", "--bundle", c.bundle, c.id)
		cmd.Env, cmd.Dir = append(os.Environ(), "HAKO_TEST_MAIN=1"), c.bundle
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%q: %v %s", propagation, err, out)
		}
		before, err1 := os.ReadFile(filepath.Join(c.bundle, "before"))
		after, err2 := os.ReadFile(filepath.Join(c.bundle, "after"))
		if err1 != nil || err2 != nil || len(before) == 0 {
			t.Fatal(err1, err2)
		}
		// Others mount and unmount meanwhile, but never these.
		count := func(table []byte) (n int) {
			for l := range strings.Lines(string(table)) {
				if f := strings.Fields(l); len(f) > 4 && (f[4] == "/" || strings.HasPrefix(f[4], "/sys") || strings.HasPrefix(f[4], "/proc") || strings.HasPrefix(f[4], "/dev") || strings.HasPrefix(f[4], c.bundle)) {
					n++
				}
			}
			return n
		}
		if a, b := count(before), count(after); a < 4 || a != b {
			t.Errorf("%q: the host has %d mounts where it had %d", propagation, b, a)
		}
	}
}
