//go:build linux

package pid1

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestMain lets the test binary be the init itself.
func TestMain(m *testing.M) {
	if os.Getenv("HAKO_TEST_PID1") != "" {
		os.Unsetenv("HAKO_TEST_PID1")
		os.Exit(Run(os.Args[1:], os.Stderr))
	}
	os.Exit(m.Run())
}

func command(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), "HAKO_TEST_PID1=1")
	return cmd
}

func TestStatus(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		args   []string
		status int
		stderr string
	}{
		{[]string{"--", "true"}, 0, ""},
		{[]string{"sh", "-c", "exit 7"}, 7, ""},
		{[]string{"--", "sh", "-c", "kill -9 $$"}, 137, ""},
		{[]string{"--", "no-such-command"}, 127, "exec no-such-command failed"},
		{[]string{"--", "/no/such"}, 127, "exec /no/such failed"},
		{[]string{"--", "/etc/passwd"}, 126, "permission denied"},
		{[]string{"--"}, 127, "no command"},
	} {
		cmd := command(c.args...)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		err := cmd.Run()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		if got := cmd.ProcessState.ExitCode(); got != c.status || !strings.Contains(stderr.String(), c.stderr) {
			t.Errorf("%q: status %d, want %d: %s", c.args, got, c.status, stderr.String())
		}
	}
}

func TestSignalsReachTheCommand(t *testing.T) {
	t.Parallel()
	cmd := command("--", "sh", "-c", `trap 'echo got; exit 5' TERM; echo ready; while :; do sleep 0.05; done`)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(5*time.Minute, func() { cmd.Process.Kill() })
	defer timer.Stop()
	buf := make([]byte, 64)
	n, _ := out.Read(buf)
	if got := string(buf[:n]); got != "ready\n" {
		t.Fatalf("output %q", got)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if got := cmd.ProcessState.ExitCode(); got != 5 {
		t.Errorf("status %d", got)
	}
}
