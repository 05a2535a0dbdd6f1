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
		cmd := exec.Command(built(t), "--root", filepath.Join(c.bundle, "state"), "create", c.id)
		cmd.Dir = c.bundle
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		after := time.Duration(i*i) * 50 * time.Microsecond // most of what happens before the Go runtime starts takes less than 1 ms
		time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		if out, stderr, code := c.run("delete", "--force", c.id); code != 0 {
			t.Fatalf("killed after %v: %d %s%s", after, code, out, stderr)
		}
		if left, err := os.ReadDir(filepath.Join(c.bundle, "state")); err == nil && len(left) > 0 {
			t.Errorf("killed after %v: state is left: %v", after, left)
		}
		left, err := filepath.Glob("/sys/fs/cgroup/*/" + c.id)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Lstat("/sys/fs/cgroup/" + c.id); err == nil {
			left = append(left, "the unified one")
		}
		if len(left) > 0 {
			t.Fatalf("killed after %v: cgroups are left: %v", after, left)
		}
	}
}
