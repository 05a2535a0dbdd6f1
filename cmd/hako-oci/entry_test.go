//go:build linux && (amd64 || arm64)

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// TestEntry starts a program whose first instructions are those of hako-oci, and finds that
// it gets its arguments and its environment.
func TestEntry(t *testing.T) {
	t.Parallel()
	dir, binary := t.TempDir(), built(t)
	for _, args := range [][]string{{"--root", dir, "list", "-q"}, {"--root=" + dir, "list"}} { // even and odd
		cmd := exec.Command(binary, args...)
		cmd.Env = append(os.Environ(), "GOMAXPROCS=3", "GODEBUG=inittrace=1")
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "init runtime ") {
			t.Errorf("%q: %v, and nothing of GODEBUG=inittrace=1: %q", args, err, out)
		}
	}
	cmd := exec.Command(binary, "--root", dir, "state", "none")
	cmd.Env = []string{}
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "does not exist") {
		t.Errorf("without an environment: %v, %q", err, out)
	}

	// What only the Go runtime's monitor is to have is not handed on.
	c := newCLI(t, "show", "slack")
	raw, err := os.ReadFile(filepath.Join(c.bundle, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, namespace := range []string{"", `{"type":"time"},`} {
		config := strings.Replace(string(raw), `"namespaces":[`, `"namespaces":[`+namespace, 1)
		if err := os.WriteFile(filepath.Join(c.bundle, "config.json"), []byte(config), 0o644); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(binary, "--root", dir, "run", "--bundle", c.bundle, c.id)
		if out, err := cmd.CombinedOutput(); err != nil || string(out) != "50000 <nil>\n" {
			t.Errorf("the container's timer slack: %v, %q", err, out)
		}
	}

	// Hooks too have what our caller has: slack, and descriptors, which were gone meanwhile.
	// Here the limit is the caller's, and the same again without one of the descriptors 0 to 2.
	got := filepath.Join(dir, "hook")
	hook := `cat >/dev/null; { ulimit -Sn; ulimit -Hn; cat /proc/$$/timerslack_ns; } >` + got
	config := strings.Replace(string(raw), `"process":{`, `"hooks":{"createRuntime":[{"path":"/bin/sh","args":["sh","-c",`+strconv.Quote(hook)+`]}]},"process":{`, 1)
	if err := os.WriteFile(filepath.Join(c.bundle, "config.json"), []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, redirection := range []string{"", "<&-"} {
		cmd := exec.Command("sh", "-c", `ulimit -Sn 99; ulimit -Hn 101; exec "$@" `+redirection, "sh", binary, "--root", dir, "run", "--bundle", c.bundle, c.id)
		out, err := cmd.CombinedOutput()
		if hook, herr := os.ReadFile(got); err != nil || herr != nil || string(hook) != "99\n101\n50000\n" {
			t.Errorf("%q: %v, %q; the hook has %q, %v", redirection, err, out, hook, herr)
		}
	}
}
