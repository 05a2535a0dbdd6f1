//go:build linux && (amd64 || arm64)

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/oci/spec"
)

// edit changes the configuration.
func (c cli) edit(f func(*specs.Spec)) {
	c.t.Helper()
	s, _, err := spec.Read(filepath.Join(c.bundle, "config.json"))
	if err != nil {
		c.t.Fatal(err)
	}
	f(s)
	c.config(s)
}

// nothing fails if there is a state, a cgroup or a process of the container.
func (c cli) nothing(when string) {
	c.t.Helper()
	left, err := filepath.Glob(filepath.Join(c.bundle, "state/*"))
	if err != nil {
		c.t.Fatal(err)
	}
	for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
		more, err := filepath.Glob(pattern + c.id)
		if err != nil {
			c.t.Fatal(err)
		}
		left = append(left, more...)
	}
	if len(left) > 0 {
		c.t.Errorf("%s: left behind: %v", when, left)
	}
}

// TestBegunFails: what is made before the Go runtime starts is taken back when the creation fails,
// wherever it does.
func TestBegunFails(t *testing.T) {
	t.Parallel()
	for name, f := range map[string]func(*specs.Spec){
		"validation": func(s *specs.Spec) { s.Process.Cwd = "relative" },
		"plan": func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/x", Type: "bind", Source: "/no/such"})
		},
		"step": func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/x", Type: "nosuch", Source: "x"})
		},
		"program": func(s *specs.Spec) { s.Process.Args = []string{"/no/such"} },
		"hook":    func(s *specs.Spec) { s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/false"}}} },
		"limits": func(s *specs.Spec) {
			n := int64(-7)
			s.Linux.Resources = &specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: &n}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCLI(t, "exit", "0")
			c.run("list") // makes no state, but builds the program
			if _, stderr, code := c.run("run", c.id); code != 0 {
				t.Fatal(stderr)
			}
			c.nothing("run")
			c.edit(f)
			if _, stderr, code := c.run("run", c.id); code == 0 || stderr == "" {
				t.Errorf("run: %d %s", code, stderr)
			}
			c.nothing("a run that fails")
		})
	}
}

// TestBegunTwice: a container is not harmed by another creation with its name.
func TestBegunTwice(t *testing.T) {
	t.Parallel()
	c := newCLI(t, "wait")
	for range 2 {
		_, stderr, code := c.run("create", c.id)
		if code != 0 && !strings.Contains(stderr, "already exists") {
			t.Fatal(stderr)
		}
	}
	if out, stderr, _ := c.run("state", c.id); !strings.Contains(out, `"status": "created"`) {
		t.Errorf("%s%s", out, stderr)
	}
	if _, stderr, code := c.run("delete", "--force", c.id); code != 0 {
		t.Error(stderr)
	}
	c.nothing("delete")
}

// TestBegunForNothing: a process that was made ahead and does not fit is replaced.
func TestBegunForNothing(t *testing.T) {
	t.Parallel()
	c := newCLI(t, "exit", "7")
	c.edit(func(s *specs.Spec) {
		for i := range 600 { // the program does not fit into the memory that is shared
			s.Linux.MaskedPaths = append(s.Linux.MaskedPaths, fmt.Sprintf("/no/such/%d", i))
		}
	})
	if _, stderr, code := c.run("run", c.id); code != 7 {
		t.Errorf("exit code %d, %s", code, stderr)
	}
	c.nothing("run")
}

// TestBegunIgnoredSignals: what the caller ignores, the container does not, as it does not where
// the Go runtime had handlers at the time of the clone.
func TestBegunIgnoredSignals(t *testing.T) {
	t.Parallel()
	c := newCLI(t, "show", "SigIgn")
	seen := map[string]string{}
	for _, program := range []string{os.Args[0], built(t)} {
		cmd := exec.Command("/bin/sh", "-c", `trap "" PIPE USR1 QUIT TSTP; exec "$@"`, "sh", program, "--root", filepath.Join(c.bundle, "state"), "run", c.id)
		cmd.Env, cmd.Dir = append(os.Environ(), "HAKO_TEST_MAIN=1"), c.bundle
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		seen[program] = string(out)
	}
	if a, b := seen[os.Args[0]], seen[built(t)]; a != b || !strings.Contains(a, "0000000000000000") {
		t.Errorf("without: %s\nwith: %s", a, b)
	}
}

// TestBegunAffinity: while it starts the runtime keeps to one CPU. Neither hooks nor the container
// inherit that, nor does the runtime keep it while the container runs.
func TestBegunAffinity(t *testing.T) {
	t.Parallel()
	own := func(status string) string {
		_, list, _ := strings.Cut(status, "Cpus_allowed_list:")
		list, _, _ = strings.Cut(list, "\n")
		return strings.TrimSpace(list)
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	want := own(string(status))
	for name, more := range map[string]func(*specs.Spec){
		"usual": func(*specs.Spec) {},
		"hooks": func(s *specs.Spec) {
			s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", `grep -x "Cpus_allowed_list:.` + want + `" /proc/self/status`}}}}
		},
		"a child that does not fit": func(s *specs.Spec) {
			for i := range 600 {
				s.Linux.MaskedPaths = append(s.Linux.MaskedPaths, fmt.Sprintf("/no/such/%d", i))
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCLI(t, "wait")
			c.edit(more)
			if err := os.MkdirAll(filepath.Join(c.bundle, "state"), 0o711); err != nil { // nothing is begun without
				t.Fatal(err)
			}
			cmd := exec.Command(built(t), "--root", filepath.Join(c.bundle, "state"), "run", c.id)
			cmd.Dir = c.bundle
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				c.run("delete", "--force", c.id)
				cmd.Wait()
			})
			// It is told to be running a moment before the runtime has heard of it.
			var elsewhere []string
			for deadline := time.Now().Add(hangLimit); ; time.Sleep(5 * time.Millisecond) {
				out, _, _ := c.run("state", c.id)
				tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", cmd.Process.Pid))
				if err != nil {
					t.Fatal(err)
				}
				elsewhere = nil
				for _, task := range tasks {
					if text, err := os.ReadFile(task); err == nil && own(string(text)) != want {
						elsewhere = append(elsewhere, task+": "+own(string(text)))
					}
				}
				if strings.Contains(out, `"status": "running"`) && len(tasks) > 1 && elsewhere == nil {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("%s, threads %v, not on %s: %v", out, tasks, want, elsewhere)
				}
			}
			out, _, _ := c.run("state", c.id)
			var state specs.State
			if err := json.Unmarshal([]byte(out), &state); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", state.Pid))
			if got := own(string(text)); err != nil || got != want {
				t.Errorf("the container runs on the CPUs %q, want %q (%v)", got, want, err)
			}
		})
	}
}
