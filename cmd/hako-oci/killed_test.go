//go:build linux && (amd64 || arm64)

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// Whenever create is killed, delete --force leaves nothing of the container.
func TestDeleteAfterKilledCreate(t *testing.T) {
	t.Parallel()
	c := newCLI(t, "wait")
	for i := range 24 {
		cmd := exec.Command(os.Args[0], "--root", filepath.Join(c.bundle, "state"), "create", c.id)
		cmd.Env, cmd.Dir = append(os.Environ(), "HAKO_TEST_MAIN=1"), c.bundle
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(time.Duration(i)*time.Millisecond, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		if out, stderr, code := c.run("delete", "--force", c.id); code != 0 {
			t.Fatalf("killed after %d ms: %d %s%s", i, code, out, stderr)
		}
		if left, err := os.ReadDir(filepath.Join(c.bundle, "state")); err == nil && len(left) > 0 {
			t.Errorf("killed after %d ms: state is left: %v", i, left)
		}
		left, err := filepath.Glob("/sys/fs/cgroup/*/" + c.id)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Lstat("/sys/fs/cgroup/" + c.id); err == nil {
			left = append(left, "the unified one")
		}
		if len(left) > 0 {
			t.Fatalf("killed after %d ms: cgroups are left: %v", i, left)
		}
	}
}
