//go:build linux

package containerd

import (
	"bufio"
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The clients are not in this repository: their folder is $HAKO_CLIENTS (ctr, nerdctl, buildkitd and
// buildctl), or they are in $PATH. What is not there is skipped by its name.
func client(t *testing.T, name string) string {
	t.Helper()
	if dir := os.Getenv("HAKO_CLIENTS"); dir != "" {
		if path := filepath.Join(dir, name); exec.Command(path, "--version").Run() == nil {
			return path
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("needs %s (in $HAKO_CLIENTS or $PATH): %s", name, t.Name())
	}
	return path
}

func script(t *testing.T, name string, args ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skipf("needs root: %s", t.Name())
	}
	for _, tool := range []string{"busybox", "script", "ip", "curl"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s (a package of Debian): %s", tool, t.Name())
		}
	}
	bin := t.TempDir()
	for _, b := range []string{"hakod", "hako-shim"} {
		cmd := exec.Command("go", "build", "-tags", "nri_no_wasm", "-o", filepath.Join(bin, b), "../../cmd/"+b)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v: %s", b, err, out)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "./"+name, append([]string{bin}, args...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 20 * time.Second
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	n := 0
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		if what, failed := strings.CutPrefix(lines.Text(), "FAIL  "); failed {
			t.Error(what)
		} else if !strings.HasPrefix(lines.Text(), "ok    ") {
			t.Log(lines.Text())
			continue
		}
		n++
	}
	if err != nil || n < 15 {
		t.Errorf("%s: %v after %d checks: %s", name, err, n, errs.Bytes())
	}
}

// One at a time: each has a machine of its own, but not processors.

// ctr is that of containerd 2: an older one has other flags and says other things.
func ctr(t *testing.T) string {
	t.Helper()
	path := client(t, "ctr")
	if out, err := exec.Command(path, "--version").Output(); err != nil || !strings.Contains(string(out), "/containerd/v2 ") {
		t.Skipf("needs the ctr of containerd 2 or later: %s", t.Name())
	}
	return path
}

func TestCtr(t *testing.T) { script(t, "ctr.sh", ctr(t)) }

func TestNerdctl(t *testing.T) {
	if _, err := os.Stat("/usr/lib/cni/bridge"); err != nil {
		t.Skipf("needs containernetworking-plugins (a package of Debian): %s", t.Name())
	}
	script(t, "nerdctl.sh", client(t, "nerdctl"))
}

func TestBuildKit(t *testing.T) {
	client(t, "buildctl")
	ctr(t)
	script(t, "buildkit.sh", filepath.Dir(client(t, "buildkitd")))
}
