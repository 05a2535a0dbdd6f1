//go:build linux && (amd64 || arm64)

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// hangLimit ends what hangs. Nothing is measured by it.
const hangLimit = 5 * time.Minute

// The container's word that it is ready reaches the caller's socket, from start, from run
// in the background and in the foreground, and the sockets go with the container.
func TestNotify(t *testing.T) {
	t.Parallel()
	c := newCLI(t, "notify")
	dir, err := os.MkdirTemp("", "hako") // short: a socket's path has 107 bytes at most
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	host := filepath.Join(dir, "host")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: host}); err != nil {
		t.Fatal(err)
	}
	// Receiving without room for descriptors ends the barrier.
	words := make(chan string, 16)
	go func() {
		defer close(words)
		buf := make([]byte, 4096)
		for {
			n, _, err := unix.Recvfrom(fd, buf, 0)
			if err == unix.EINTR {
				continue
			}
			if err != nil || n == 0 { // it was shut down
				return
			}
			words <- string(buf[:n])
		}
	}()
	defer func() {
		_ = unix.Shutdown(fd, unix.SHUT_RD)
		for range words {
		}
	}()
	ready := regexp.MustCompile(`^READY=1\nMAINPID=[1-9][0-9]*\n$`)
	expect := func(what string) {
		t.Helper()
		for _, want := range []*regexp.Regexp{ready, regexp.MustCompile("^BARRIER=1$")} {
			select {
			case got := <-words:
				if !want.MatchString(got) {
					t.Errorf("%s: %q", what, got)
				}
			case <-time.After(hangLimit):
				t.Fatalf("%s: no word", what)
			}
		}
	}
	run := func(want int, args ...string) {
		t.Helper()
		out, err := os.CreateTemp(dir, "out")
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		cmd := exec.Command(os.Args[0], append([]string{"--root", filepath.Join(c.bundle, "state")}, args...)...)
		cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr = append(os.Environ(), "HAKO_TEST_MAIN=1", "NOTIFY_SOCKET="+host), c.bundle, out, out
		_ = cmd.Run()
		if code := cmd.ProcessState.ExitCode(); code != want {
			raw, _ := os.ReadFile(out.Name())
			t.Errorf("%v: exit code %d, want %d: %s", args, code, want, raw)
		}
	}
	run(0, "create", c.id)
	run(1, "create", c.id)
	run(0, "start", c.id)
	expect("start")
	run(0, "delete", "--force", c.id)

	run(0, "run", "--detach", c.id)
	expect("run --detach")
	run(0, "delete", "--force", c.id)

	run(7, "run", c.id)
	expect("run")
	if left, err := os.ReadDir(filepath.Join(c.bundle, "state")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

func TestCompletionAndManual(t *testing.T) {
	t.Parallel()
	c := newCLI(t)
	script, _, code := c.run("completion", "bash")
	if code != 0 {
		t.Fatal(code)
	}
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("needs bash: TestCompletionAndManual")
	}
	for line, want := range map[string]string{
		"hako-oci cre":                     "create",
		"hako-oci --root /x exec --consol": "--console-socket",
		"hako-oci completion z":            "zsh",
		"hako-oci plan --ex":               "--exec",
		"hako-oci exec --process x":        "",
	} {
		cmd := exec.Command(bash, "-c", script+`
COMP_WORDS=($1); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _hako_oci; echo "${COMPREPLY[*]}"`, "bash", line)
		cmd.Env = []string{"PATH=/nowhere"}
		if out, err := cmd.CombinedOutput(); err != nil || strings.TrimSpace(string(out)) != want {
			t.Errorf("%s: %q %v, want %q", line, out, err, want)
		}
	}
	for shell, want := range map[string]string{"zsh": "'exec:run a process in a container'", "fish": "-l console-socket -r"} {
		if out, _, code := c.run("completion", shell); code != 0 || !strings.Contains(out, want) {
			t.Errorf("%s: %d %s", shell, code, out)
		}
	}
	if _, _, code := c.run("completion", "csh"); code != 1 {
		t.Errorf("csh: %d", code)
	}
	if _, stderr, code := c.run("completion", "man", c.bundle); code != 0 {
		t.Fatal(stderr)
	}
	for _, command := range commandTable() {
		raw, err := os.ReadFile(filepath.Join(c.bundle, "hako-oci-"+command.name+".1"))
		if err != nil || !strings.HasPrefix(string(raw), ".TH HAKO\\-OCI\\-") || !strings.Contains(string(raw), `\fB\-\-help\fP`) {
			t.Errorf("%s: %v %.200s", command.name, err, raw)
		}
	}
	if raw, err := os.ReadFile(filepath.Join(c.bundle, "hako-oci.1")); err != nil || !strings.Contains(string(raw), "NOTIFY_SOCKET") {
		t.Error(err)
	}
}
