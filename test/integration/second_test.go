package integration

import (
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestSecondDaemon: a root and a bridge belong to one daemon.
func TestSecondDaemon(t *testing.T) {
	t.Parallel()
	n := sharedWithout(t)
	second := func(root, bridge string) string {
		dir := t.TempDir()
		cmd := exec.Command(filepath.Join(workDir, "hakod"), "--config", os.DevNull, "--root", root, "--state", filepath.Join(dir, "run"), "--bridge-name", bridge)
		out, err := cmd.CombinedOutput()
		if err == nil || cmd.ProcessState.ExitCode() != 1 {
			t.Errorf("a second daemon: %v", err)
		}
		return string(out)
	}
	if out := second(filepath.Join(n.dir, "lib"), n.bridge+"y"); !strings.Contains(out, "uses the root "+filepath.Join(n.dir, "lib")) {
		t.Error(out)
	}
	if out := second(filepath.Join(t.TempDir(), "lib"), n.bridge); !strings.Contains(out, "uses the bridge "+n.bridge) {
		t.Error(out)
	}
}

// TestStopWhileRequestsRun: requests that wait end with 503 when the daemon is stopped, and
// containers go on.
func TestStopWhileRequestsRun(t *testing.T) {
	n := own(t)
	n.docker(t, "run", "-d", "--name", "lives", testImage, "sleep", "1000")
	pid := n.docker(t, "inspect", "-f", "{{.State.Pid}}", "lives")
	type answer struct {
		code int
		body string
		err  error
	}
	answers := make(chan answer, 2)
	for _, path := range []string{"/containers/lives/stop?t=1000", "/containers/lives/restart?t=1000"} {
		go func() {
			code, body, err := n.request("POST", path, http.NoBody)
			answers <- answer{code, body, err}
		}()
	}
	eventually(t, "both requests to wait", func() bool {
		filters := url.QueryEscape(`{"container":["lives"],"event":["kill"]}`)
		_, body, err := n.request("GET", fmt.Sprintf("/events?since=1&until=%d&filters=%s", time.Now().Unix()+1, filters), nil)
		return err == nil && strings.Count(body, `"Action":"kill"`) >= 2
	})
	if err := n.signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	for range cap(answers) {
		if a := <-answers; a.err != nil || a.code != 503 || !strings.Contains(a.body, "shutting down") {
			t.Errorf("%d %s %v", a.code, a.body, a.err)
		}
	}
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	if got := n.docker(t, "inspect", "-f", "{{.State.Pid}} {{.State.Status}}", "lives"); got != pid+" running" {
		t.Errorf("%s, was %s", got, pid)
	}
}
