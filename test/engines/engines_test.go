//go:build linux

package engines

import (
	"bufio"
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// build makes a binary of this tree, as it is shipped but for its size.
func build(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	cmd := exec.Command("go", "build", "-o", path, "../../cmd/"+name)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v: %s", name, err, out)
	}
	return path
}

// one engine at a time: each of them starts 20 containers side by side.
var one sync.Mutex

func script(t *testing.T, name string, args ...string) {
	t.Helper()
	one.Lock()
	defer one.Unlock()
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "./"+name, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // it cleans up
	cmd.WaitDelay = time.Minute
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	n := 0
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		what, ok := strings.CutPrefix(lines.Text(), "ok    ")
		if !ok {
			what, _, _ = strings.Cut(strings.TrimPrefix(lines.Text(), "FAIL  "), ": got")
		}
		n++
		t.Run(what, func(t *testing.T) {
			if !ok {
				t.Error(lines.Text())
			}
		})
	}
	if err != nil || n < 20 {
		t.Errorf("%s: %v after %d checks: %s", name, err, n, errs.Bytes())
	}
}

func need(t *testing.T, tools ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skipf("needs root: %s", t.Name())
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s (a package of Debian): %s", tool, t.Name())
		}
	}
}

func TestPodman(t *testing.T) {
	need(t, "podman", "conmon", "busybox", "script")
	script(t, "podman.sh", build(t, "hako-oci"))
}

func TestContainerdWithItsShim(t *testing.T) {
	need(t, "containerd", "containerd-shim-runc-v2", "ctr", "busybox", "jq", "script")
	script(t, "containerd.sh", build(t, "hako-oci"))
}

func TestContainerdWithOurShim(t *testing.T) {
	need(t, "containerd", "ctr", "busybox", "jq", "script")
	script(t, "containerd.sh", build(t, "hako-oci"), build(t, "hako-shim"))
}
