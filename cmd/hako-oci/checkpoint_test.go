//go:build linux && (amd64 || arm64)

package main

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// piped runs the command line with pipes that a container may keep, as engines do.
func (c cli) piped(w *os.File, args ...string) (string, error) {
	c.t.Helper()
	log := filepath.Join(c.bundle, "log")
	os.Remove(log)
	cmd := exec.Command(os.Args[0], append([]string{"--root", filepath.Join(c.bundle, "state"), "--log", log}, args...)...)
	cmd.Env = append(os.Environ(), "HAKO_TEST_MAIN=1")
	cmd.Dir, cmd.Stdout, cmd.Stderr = c.bundle, w, w
	err := cmd.Run()
	text, _ := os.ReadFile(log)
	return string(text), err
}

func TestCheckpointCommand(t *testing.T) {
	t.Parallel()
	c := newCLI(t, "wait")
	config := filepath.Join(c.bundle, "config.json")
	raw, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	// CRIU before 3.19 does not keep no_new_privs.
	text := strings.Replace(string(raw), `"noNewPrivileges":true`, `"noNewPrivileges":false`, 1)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if text, err := c.piped(w, "run", "-d", c.id); err != nil {
		t.Fatal(err, text)
	}
	t.Cleanup(func() { c.run("delete", "-f", c.id) })
	for _, wrong := range []struct{ text, args string }{
		{"container does not exist", "checkpoint nosuch"},
		{"manage-cgroups-mode", "checkpoint --manage-cgroups-mode x ID"},
		{"empty namespace", "checkpoint --empty-ns pid ID"},
		{"no descriptor that can be written", "checkpoint --status-fd 77 ID"},
		{"config.json", "restore --bundle nosuch other"},
		{"no such file or directory", "restore -d --image-path nosuch other"},
	} {
		args := strings.Fields(strings.ReplaceAll(wrong.args, "ID", c.id))
		if _, stderr, code := c.run(args...); code != 1 || !strings.Contains(stderr, wrong.text) {
			t.Errorf("%s: %d %s", wrong.args, code, stderr)
		}
	}
	if _, err := exec.LookPath("criu"); err != nil {
		if _, stderr, code := c.run("checkpoint", "--image-path", "images", c.id); code != 1 || !strings.Contains(stderr, "there is no program criu in $PATH") {
			t.Errorf("without CRIU: %d %s", code, stderr)
		}
		if out, _, _ := c.run("state", c.id); !strings.Contains(out, `"status": "running"`) {
			t.Errorf("state: %s", out)
		}
		return
	}
	if out, err := exec.Command("criu", "check").CombinedOutput(); err != nil {
		t.Skipf("needs a CRIU that knows this kernel: %s: %.200s", t.Name(), out)
	}
	if _, stderr, code := c.run("checkpoint", "--image-path", "images", "--work-path", "work", "--leave-running", c.id); code != 0 {
		t.Fatalf("checkpoint --leave-running: %d %s", code, stderr)
	}
	if out, _, _ := c.run("state", c.id); !strings.Contains(out, `"status": "running"`) {
		t.Errorf("state after --leave-running: %s", out)
	}
	if _, stderr, code := c.run("checkpoint", "--image-path", "images2", "--file-locks", "--tcp-established", c.id); code != 0 {
		t.Fatalf("checkpoint: %d %s", code, stderr)
	}
	if _, stderr, code := c.run("state", c.id); code != 1 || !strings.Contains(stderr, "does not exist") {
		t.Errorf("state after checkpoint: %d %s", code, stderr)
	}
	for _, images := range []string{"images", "images2"} {
		if text, err := c.piped(w, "restore", "-d", "--bundle", c.bundle, "--image-path", images, "--work-path", "work", "--file-locks", "--tcp-established", "--pid-file", "pid", c.id); err != nil {
			t.Fatal(err, text)
		}
		out, _, _ := c.run("state", c.id)
		pid, err := os.ReadFile(filepath.Join(c.bundle, "pid"))
		if err != nil || !strings.Contains(out, `"status": "running"`) || !strings.Contains(out, `"pid": `+string(pid)+",") {
			t.Errorf("after restore: %s, pid file %q, %v", out, pid, err)
		}
		if _, stderr, code := c.run("delete", "--force", c.id); code != 0 {
			t.Errorf("delete: %d %s", code, stderr)
		}
	}
	// In the foreground: it ends with the program.
	done := make(chan string, 1)
	go func() {
		text, err := c.piped(w, "restore", "--image-path", "images2", c.id)
		if e, ok := err.(*exec.ExitError); ok && e.ExitCode() == 137 {
			err = nil
		}
		if err != nil {
			text += err.Error()
		}
		done <- text
	}()
	for deadline := time.Now().Add(hangLimit); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if out, _, _ := c.run("state", c.id); strings.Contains(out, `"status": "running"`) {
			break
		}
	}
	if _, stderr, code := c.run("kill", c.id, "KILL"); code != 0 {
		t.Errorf("kill: %d %s", code, stderr)
	}
	if text := <-done; text != "" {
		t.Errorf("restore in the foreground: %s", text)
	}
	w.Close()
	if out, _ := io.ReadAll(r); !strings.HasPrefix(string(out), "waiting\n") {
		t.Errorf("output %q", out)
	}
}
