//go:build linux && (amd64 || arm64)

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestEntry starts a program whose first instructions are those of hako-oci, and finds that
// it gets its arguments and its environment.
func TestEntry(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	binary := filepath.Join(dir, "hako-oci")
	if out, err := exec.Command("go", "build", "-ldflags=-E main.entry", "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
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
}
