//go:build linux && (amd64 || arm64)

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

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
	os.Exit(m.Run())
}

func guest() {
	switch os.Args[1] {
	case "exit":
		n, _ := strconv.Atoi(os.Args[2])
		os.Exit(n)
	case "id":
		fmt.Println(os.Getuid(), os.Getgid())
	case "wait":
		fmt.Println("waiting")
		time.Sleep(time.Minute)
	}
	os.Exit(0)
}

type cli struct {
	t      *testing.T
	bundle string
	id     string
}

func (c cli) run(args ...string) (stdout, stderr string, code int) {
	c.t.Helper()
	cmd := exec.Command(os.Args[0], append([]string{"--root", filepath.Join(c.bundle, "state")}, args...)...)
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
	if err := os.WriteFile(filepath.Join(c.bundle, "rootfs/guest"), raw, 0o755); err != nil {
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
		{1, "not found", []string{"run", "--bundle", "/no/such", "x"}},
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

func TestPlan(t *testing.T) {
	t.Parallel()
	c := newCLI(t, "id")
	raw, err := os.ReadFile(filepath.Join(c.bundle, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	must := func(args ...string) string {
		t.Helper()
		out, stderr, code := c.run(args...)
		if code != 0 {
			t.Fatalf("%v: %d %s", args, code, stderr)
		}
		return out
	}
	text := must("plan")
	if !strings.Contains(text, "mount /proc  (mounts[0], line 1)\n") || !strings.Contains(text, "execveat(") {
		t.Errorf("plan:\n%s", text)
	}
	if got := must("plan", filepath.Join(c.bundle, "config.json")); got != text {
		t.Error("the plan of a configuration is not that of its bundle")
	}
	if n := strings.Count(must("plan", "--brief"), "\n"); n > 100 {
		t.Errorf("brief: %d lines", n)
	}
	var doc struct {
		Version int
		Actions []struct{ Do string }
	}
	if err := json.Unmarshal([]byte(must("plan", "--json")), &doc); err != nil || doc.Version != 1 || len(doc.Actions) < 30 {
		t.Errorf("json: %v %+v", err, doc)
	}

	if out := must("plan", "--diff", "config.json"); out != "" {
		t.Errorf("a configuration differs from itself:\n%s", out)
	}
	other := strings.Replace(string(raw), `"hostname":"hako"`, `"hostname":"other"`, 1)
	if err := os.WriteFile(filepath.Join(c.bundle, "other.json"), []byte(other), 0o644); err != nil {
		t.Fatal(err)
	}
	want := "--- .\n+++ other.json\n## the container's first process\n@@ container -hostname, line 1 +hostname, line 1 @@\n" +
		"-set the host name to \"hako\"\n-    sethostname(\"hako\", 4)\n+set the host name to \"other\"\n+    sethostname(\"other\", 5)\n"
	if out := must("plan", "--diff", "other.json"); out != want {
		t.Errorf("diff:\n%s", out)
	}

	facts := must("plan", "--print-facts")
	if err := os.WriteFile(filepath.Join(c.bundle, "facts.json"), []byte(facts), 0o644); err != nil {
		t.Fatal(err)
	}
	if must("plan", "--facts", "facts.json") != text {
		t.Error("this host's own facts give another plan")
	}
	elsewhere := must("plan", "--brief", "--facts", "cgroup=v2,kernel=5.4")
	if !strings.Contains(elsewhere, "mount /sys/fs/cgroup: bind /sys/fs/cgroup ") || !strings.Contains(elsewhere, "Linux 5.4 does not know mount_setattr") {
		t.Errorf("elsewhere:\n%s", elsewhere)
	}
	for _, bad := range [][]string{{"--facts", "cgroup=v9"}, {"--facts", "nosuch.json"}, {"--json", "--brief"}, {"--diff", "nosuch.json"}, {"nosuch"}} {
		if out, stderr, code := c.run(append([]string{"plan"}, bad...)...); code != 1 || out != "" || stderr == "" {
			t.Errorf("%v: %d %s%s", bad, code, out, stderr)
		}
	}
}
