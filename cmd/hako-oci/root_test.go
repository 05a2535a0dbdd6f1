//go:build linux && (amd64 || arm64)

package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/hako-engine/hako/internal/execfile"
)

// A plain user's state is in $XDG_RUNTIME_DIR, in a directory that nobody clears away.
func TestStateOfPlainUser(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skipf("needs root: %s", t.Name())
	}
	raw, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	program, home := filepath.Join(dir, "hako-oci"), filepath.Join(dir, "run")
	err = execfile.Write(program, raw, 0o755)
	const user = 12345
	if err := errors.Join(err, os.Chmod(filepath.Dir(dir), 0o755), os.Chmod(dir, 0o755), os.Mkdir(home, 0o700), os.Chown(home, user, user)); err != nil {
		t.Fatal(err)
	}
	run := func(env string, uid uint32, args ...string) string {
		t.Helper()
		cmd := exec.Command(program, args...)
		cmd.Dir, cmd.Env = "/", []string{"HAKO_TEST_MAIN=1", "XDG_RUNTIME_DIR=" + home, env}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := cmd.CombinedOutput()
		if _, ok := err.(*exec.ExitError); err != nil && !ok {
			t.Fatal(err)
		}
		return string(out)
	}
	if out := run("", 0, "--help"); !strings.Contains(out, systemRoot) {
		t.Errorf("for root: %s", out)
	}
	if out := run("", user, "--help"); !strings.Contains(out, filepath.Join(home, "hako-oci")) {
		t.Errorf("for a user: %s", out)
	}
	run("", user, "list")
	if _, err := os.Stat(filepath.Join(home, "hako-oci")); err == nil {
		t.Error("list makes a directory")
	}
	if out := run("", user, "create", "--bundle", "/nosuch", "x"); !strings.Contains(out, "config.json not found") {
		t.Error(out)
	}
	st, err := os.Stat(filepath.Join(home, "hako-oci"))
	if err != nil || st.Mode() != os.ModeDir|os.ModeSticky|0o700 {
		t.Errorf("%v %v", st, err)
	}
}
