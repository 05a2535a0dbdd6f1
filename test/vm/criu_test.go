//go:build linux && (amd64 || arm64)

package vm

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci"
)

// TestAppArmorRestore (security.md, E1): a container comes back under the profile of the
// configuration, whatever its images say, or not at all.
func TestAppArmorRestore(t *testing.T) {
	if _, err := exec.LookPath("criu"); err != nil {
		t.Skipf("needs CRIU: %s", t.Name())
	}
	if out, err := exec.Command("criu", "check").CombinedOutput(); err != nil {
		t.Skipf("needs a CRIU that knows this kernel: %s: %.200s", t.Name(), out)
	}
	loadProfile(t)
	for _, before := range []string{profile, ""} {
		t.Run("from "+before, func(t *testing.T) {
			b := newBox(t)
			b.spec.Process.NoNewPrivileges = false
			b.spec.Process.ApparmorProfile = before
			b.shell("sleep 1000")
			b.opts.Spec = b.spec
			c, err := b.rt.Run(t.Context(), b.id, b.opts)
			if err != nil {
				t.Fatal(err)
			}
			images := filepath.Join(b.opts.Bundle, "images")
			err = c.Checkpoint(t.Context(), oci.CheckpointOptions{CRIUOptions: oci.CRIUOptions{ImagePath: images}})
			c.Kill(context.Background(), unix.SIGKILL)
			reap(t, c.Pid())
			c.PidFD.Close()
			if err := c.Delete(t.Context(), true); err != nil {
				t.Error(err)
			}
			if err != nil {
				t.Fatal(err)
			}
			b.spec.Process.ApparmorProfile = profile
			c, err = b.rt.Restore(t.Context(), b.id, oci.RestoreOptions{CreateOptions: b.opts, CRIUOptions: oci.CRIUOptions{ImagePath: images}})
			if err != nil {
				if before == profile || !strings.Contains(err.Error(), "has the label") {
					t.Error(err)
				}
				return
			}
			defer c.PidFD.Close()
			label, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(c.Pid()), "attr/current"))
			if err != nil || !strings.HasPrefix(string(label), profile+" ") {
				t.Errorf("restored with the label %q: %v", label, err)
			}
			c.Kill(context.Background(), unix.SIGKILL)
			reap(t, c.Pid())
			if err := c.Delete(t.Context(), true); err != nil {
				t.Error(err)
			}
		})
	}
}
