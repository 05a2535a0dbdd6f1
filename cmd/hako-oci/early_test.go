//go:build linux && (amd64 || arm64)

package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/execfile"
)

// command runs the program that make build makes, and tells whether the Go runtime has
// started.
func (c cli) command(env string, args ...string) (out string, early bool, code int) {
	c.t.Helper()
	cmd := exec.Command(built(c.t), append([]string{"--root", filepath.Join(c.bundle, "state"), "--log", filepath.Join(c.bundle, "log")}, args...)...)
	cmd.Env = append(os.Environ(), "GODEBUG=inittrace=1", env)
	raw, err := cmd.CombinedOutput()
	if _, ok := err.(*exec.ExitError); err != nil && !ok {
		c.t.Fatal(err)
	}
	var rest []string
	for line := range strings.Lines(string(raw)) {
		if strings.HasPrefix(line, "init ") {
			continue
		}
		rest = append(rest, line)
	}
	return strings.Join(rest, ""), len(rest) == strings.Count(string(raw), "\n"), cmd.ProcessState.ExitCode()
}

// TestEarly: a usual container is started, killed and deleted without the Go runtime; what is
// not usual, or fails, is left to it.
func TestEarly(t *testing.T) {
	t.Parallel()
	c := newCLI(t, "wait")
	create := func() {
		t.Helper()
		if _, stderr, code := c.run("create", c.id); code != 0 {
			t.Fatal(stderr)
		}
	}
	want := func(early bool, code int, text, env string, args ...string) {
		t.Helper()
		out, wasEarly, got := c.command(env, args...)
		if wasEarly != early || got != code || !strings.Contains(out, text) || text == "" && out != "" {
			t.Errorf("%v: exit code %d, early %v, %q", args, got, wasEarly, out)
		}
	}
	status := func(text string) {
		t.Helper()
		if out, stderr, _ := c.run("state", c.id); !strings.Contains(out, `"status": "`+text+`"`) {
			t.Errorf("%s, want %s; %s", out, text, stderr)
		}
	}
	create()
	want(false, 1, "3 arguments given", "", "kill", c.id, "BUS", "x")
	want(true, 0, "", "", "kill", c.id, "0")
	want(true, 0, "", "", "start", c.id)
	status("running")
	if _, err := os.Stat(filepath.Join(c.bundle, "log")); err != nil {
		t.Errorf("the file for messages: %v", err)
	}
	want(false, 1, "cannot start an already running container", "", "start", c.id)
	want(false, 1, "that is not stopped: running", "", "delete", c.id)
	if _, stderr, code := c.run("pause", c.id); code != 0 {
		t.Fatal(stderr)
	}
	want(false, 0, "", "", "kill", c.id, "KILL") // thaws it
	want(true, 0, "", "", "delete", "--force", c.id)
	want(false, 1, "does not exist", "", "delete", c.id)
	want(false, 0, "", "", "delete", "--force", c.id)

	create()
	want(true, 0, "", "", "delete", c.id)
	create()
	want(false, 0, "", "NOTIFY_SOCKET=/nobody", "start", c.id)
	// A cgroup that the container has made.
	below := "/sys/fs/cgroup/pids/" + c.id + "/below"
	if err := os.Mkdir(below, 0o755); err == nil {
		want(false, 0, "", "", "delete", "--force", c.id)
	} else {
		want(true, 0, "", "", "delete", "--force", c.id)
	}
	if _, err := os.Stat("/sys/fs/cgroup/pids/" + c.id); !os.IsNotExist(err) {
		t.Errorf("the cgroup: %v", err)
	}

	// What a checkpoint that was killed has left.
	create()
	work := filepath.Join(c.bundle, "state", c.id, "criu.work")
	if err := os.Mkdir(work, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(work, "dump.log"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	want(false, 0, "", "", "delete", c.id)
	if _, err := os.Lstat(filepath.Dir(work)); !os.IsNotExist(err) {
		t.Errorf("the state: %v", err)
	}

	// No file of a format that can be executed.
	if err := execfile.Write(filepath.Join(c.bundle, "rootfs/guest"), []byte("?"), 0o755); err != nil {
		t.Fatal(err)
	}
	create()
	want(false, 1, `exec "/guest": exec format error`, "", "start", c.id)
	want(true, 0, "", "", "delete", "--force", c.id)
}

// TestEarlyHooks: a container with hooks is nothing for package early.
func TestEarlyHooks(t *testing.T) {
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
	ran := filepath.Join(c.bundle, "ran")
	s.Hooks = &specs.Hooks{Poststop: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "touch " + ran}}}}
	c.config(s)
	if _, stderr, code := c.run("create", c.id); code != 0 {
		t.Fatal(stderr)
	}
	for _, args := range [][]string{{"start", c.id}, {"kill", c.id, "9"}, {"delete", "--force", c.id}} {
		if out, early, code := c.command("", args...); early || code != 0 {
			t.Errorf("%v: exit code %d, early %v, %q", args, code, early, out)
		}
	}
	if err := unix.Access(ran, unix.F_OK); err != nil {
		t.Errorf("the hook: %v", err)
	}
}
