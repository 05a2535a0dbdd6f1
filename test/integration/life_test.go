package integration

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"
)

func (n *node) state(t *testing.T, name string) string {
	t.Helper()
	return n.docker(t, "inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", name)
}

func TestLife(t *testing.T) {
	t.Parallel()
	n := shared(t)
	name := n.name(t, "")
	id := n.docker(t, "create", "--name", name, "--stop-timeout", "20", testImage, "helper", "trap")
	if len(id) != 64 || n.state(t, name) != "created 0" {
		t.Errorf("%s is %s", id, n.state(t, name))
	}
	if got := n.docker(t, "start", name); got != name {
		t.Error(got)
	}
	eventually(t, "the program to be ready", func() bool { return n.docker(t, "logs", name) == "ready" })
	if code, _, err := n.request("POST", "/containers/"+name+"/start", nil); code != 304 || err != nil {
		t.Errorf("start of a running container: %d %v", code, err)
	}
	n.docker(t, "pause", name)
	if got := n.state(t, name); got != "paused 0" {
		t.Error(got)
	}
	n.expect(t, 1, "is already paused", "pause", name)
	if r := n.run(nil, "exec", name, "true"); r.code == 0 || !strings.Contains(r.stderr, "is paused") {
		t.Error(r)
	}
	n.docker(t, "unpause", name)
	if r := n.expect(t, 1, "is not paused", "unpause", name); r.code != 1 {
		t.Error(r)
	}
	n.docker(t, "stop", name)
	if got := n.state(t, name); got != "exited 42" {
		t.Error(got)
	}
	if code, _, err := n.request("POST", "/containers/"+name+"/stop", nil); code != 304 || err != nil {
		t.Errorf("stop of a stopped container: %d %v", code, err)
	}
	n.docker(t, "restart", name)
	if got := n.state(t, name); got != "running 0" {
		t.Error(got)
	}
	renamed := n.name(t, "-renamed")
	n.docker(t, "rename", name, renamed)
	n.expect(t, 1, "No such container: "+name, "logs", name)
	n.expect(t, 1, "container is running", "rm", renamed)
	eventually(t, "the program to be ready again", func() bool { return n.docker(t, "logs", renamed) == "ready\nready" })
	n.docker(t, "kill", "-s", "TERM", renamed)
	eventually(t, "the signal to end it", func() bool { return n.state(t, renamed) == "exited 42" })
	n.expect(t, 1, "is not running", "kill", renamed)
	n.docker(t, "rm", renamed)
	n.expect(t, 1, "No such container: "+renamed, "rm", renamed)
}

func TestWait(t *testing.T) {
	t.Parallel()
	n := shared(t)
	name := n.name(t, "")
	n.docker(t, "run", "-d", "--name", name, testImage, "sh", "-c", "sleep 0.5; exit 9")
	if got := n.docker(t, "wait", name); got != "9" {
		t.Error(got)
	}
	if got := n.docker(t, "wait", name); got != "9" { // after the end
		t.Error(got)
	}
	// The headers tell that somebody waits.
	resp, err := n.client.Post("http://docker/v1.50/containers/"+name+"/wait?condition=removed", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	n.docker(t, "rm", name)
	if body, err := io.ReadAll(resp.Body); err != nil || strings.TrimSpace(string(body)) != `{"StatusCode":9}` {
		t.Errorf("%s, %v", body, err)
	}
}

func TestRestartPolicy(t *testing.T) {
	t.Parallel()
	n := shared(t)
	name := n.name(t, "")
	n.docker(t, "run", "-d", "--name", name, "--restart", "on-failure:2", testImage, "sh", "-c", "echo again; exit 1")
	eventually(t, "it to be given up", func() bool {
		return n.docker(t, "inspect", "-f", "{{.State.Status}} {{.RestartCount}}", name) == "exited 2"
	})
	if got := n.docker(t, "logs", name); got != "again\nagain\nagain" {
		t.Errorf("%q", got)
	}
	always := n.name(t, "-always")
	n.docker(t, "run", "-d", "--name", always, "--restart", "always", testImage, "sleep", "1000")
	n.docker(t, "stop", "-t", "0", always)
	time.Sleep(300 * time.Millisecond)
	if got := n.state(t, always); got != "exited 137" {
		t.Errorf("restarted although it was stopped: %s", got)
	}
}

func TestLogs(t *testing.T) {
	t.Parallel()
	n := shared(t)
	name := n.name(t, "")
	n.docker(t, "run", "--name", name, testImage, "sh", "-c", "echo err >&2; sleep 0.3; for i in 1 2 3 4 5; do echo line $i; done")
	if got := n.docker(t, "logs", "--tail", "2", name); got != "line 4\nline 5" {
		t.Errorf("%q", got)
	}
	r := n.run(nil, "logs", "-t", name)
	if first, _, _ := strings.Cut(r.out, " "); len(first) != len("2006-01-02T15:04:05.000000000Z") {
		t.Error(r)
	} else if _, err := time.Parse(time.RFC3339Nano, first); err != nil {
		t.Error(err)
	}
	if r.stderr == "" {
		t.Errorf("stderr is lost: %v", r)
	}
	if got := n.docker(t, "logs", "--since", "10m", name); !strings.HasPrefix(got, "line 1\n") {
		t.Errorf("%q", got)
	}
	if got := n.docker(t, "logs", "--until", "2001-01-01T00:00:00Z", name); got != "" {
		t.Errorf("%q", got)
	}
	// A line longer than any buffer comes back whole.
	long := n.name(t, "-long")
	n.docker(t, "run", "--name", long, testImage, "sh", "-c", "head -c 50000 /dev/zero | tr '\\0' x 2>/dev/null || dd if=/dev/zero bs=50000 count=1 2>/dev/null; echo")
	if got := n.docker(t, "logs", long); len(got) != 50000 {
		t.Errorf("%d bytes", len(got))
	}
	follow := n.name(t, "-follow")
	n.docker(t, "run", "-d", "--name", follow, testImage, "sh", "-c", "for i in 1 2 3; do echo $i; sleep 0.2; done; exit 4")
	if got := n.docker(t, "logs", "-f", follow); got != "1\n2\n3" {
		t.Errorf("%q", got)
	}
}

func TestAttachAndStartAttached(t *testing.T) {
	t.Parallel()
	n := shared(t)
	name := n.name(t, "")
	n.docker(t, "create", "-i", "--name", name, testImage, "sh", "-c", "cat; exit 8")
	r := n.run(strings.NewReader("typed"), "start", "-ai", name)
	if r.out != "typed" || r.code != 8 {
		t.Error(r)
	}
	second := n.name(t, "-second")
	n.docker(t, "run", "-d", "--name", second, testImage, "sh", "-c", "until [ -e /tmp/go ]; do echo early; sleep 0.1; done; echo late; exit 3")
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	cmd := n.command(ctx, "attach", second)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	if line, err := lines.ReadString('\n'); line != "early\n" {
		t.Errorf("%q, %v", line, err)
	}
	n.docker(t, "exec", second, "touch", "/tmp/go")
	rest, err := io.ReadAll(lines)
	_ = cmd.Wait()
	if !strings.HasSuffix(string(rest), "late\n") || err != nil || cmd.ProcessState.ExitCode() != 3 {
		t.Errorf("%q, %v, exit %d", rest, err, cmd.ProcessState.ExitCode())
	}
}

func TestExec(t *testing.T) {
	t.Parallel()
	n := shared(t)
	name := n.name(t, "")
	n.docker(t, "run", "-d", "--name", name, "-e", "BASE=1", testImage, "sleep", "1000")
	for want, args := range map[string][]string{
		"0 hello\n":     {"echo", "hello"},
		"12 ":           {"sh", "-c", "exit 12"},
		"0 /data\n":     {"-w", "/data", "pwd"},
		"0 1000\n":      {"-u", "user", "id", "-u"},
		"0 1:2\n":       {"-e", "MORE=2", "sh", "-c", "echo $BASE:$MORE"},
		"0 not a tty\n": {"tty"},
		"137 ":          {"sh", "-c", "kill -9 $$"},
	} {
		opts := []string{"exec"}
		for len(args) > 0 && strings.HasPrefix(args[0], "-") {
			opts = append(opts, args[:2]...)
			args = args[2:]
		}
		r := n.run(nil, append(append(opts, name), args...)...)
		if got := fmt.Sprint(r.code, " ", r.out); strings.TrimSuffix(got, "\n") != strings.TrimSuffix(want, "\n") && !(strings.HasPrefix(want, "0 not a tty") && r.code == 1) {
			t.Errorf("want %q:\n%v", want, r)
		}
	}
	if r := n.run(strings.NewReader("typed"), "exec", "-i", name, "cat"); r.out != "typed" || r.code != 0 {
		t.Error(r)
	}
	n.expect(t, 127, "nope", "exec", name, "nope")
	n.expect(t, 126, "permission denied", "exec", name, "/etc/noexec")
	n.docker(t, "exec", "-d", name, "sh", "-c", "echo detached > /tmp/d")
	eventually(t, "the detached exec", func() bool { return n.run(nil, "exec", name, "cat", "/tmp/d").out == "detached\n" })
	out, code := n.terminal(t, 33, 99, func(show func(string), typed io.Writer) {
		show("#")
		io.WriteString(typed, "stty size; exit 7\n")
		show("33 99")
	}, "exec", "-it", name, "sh")
	if code != 7 {
		t.Errorf("exit %d: %q", code, out)
	}
	n.docker(t, "stop", "-t", "0", name)
	n.expect(t, 1, "is not running", "exec", name, "true")
	n.expect(t, 1, "No such container", "exec", "nope-"+name, "true")
}

func TestTopStatsAndEvents(t *testing.T) {
	t.Parallel()
	n := own(t) // a daemon keeps 256 events, which tests beside it would use up
	name := n.name(t, "")
	since := fmt.Sprint(time.Now().Add(-time.Second).Unix())
	n.docker(t, "run", "-d", "--name", name, "--memory", "64m", testImage, "sh", "-c", "sleep 1000 & wait")
	if got := n.docker(t, "top", name); !strings.HasPrefix(got, "UID") || strings.Count(got, "sleep 1000") < 1 {
		t.Error(got)
	}
	if got := n.docker(t, "top", name, "-o", "pid,comm"); !strings.Contains(got, "COMMAND") {
		t.Error(got)
	}
	eventually(t, "its second process", func() bool { return len(strings.Split(n.docker(t, "top", name), "\n")) == 3 })
	if got := n.docker(t, "stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}} {{.PIDs}}", name); !strings.HasPrefix(got, name+" ") || !strings.Contains(got, "/ 64MiB") || !strings.HasSuffix(got, " 2") {
		t.Error(got)
	}
	events := func(args ...string) string {
		return n.docker(t, append([]string{"events", "--since", since, "--until", fmt.Sprint(time.Now().Unix()), "--filter", "container=" + name}, args...)...)
	}
	n.docker(t, "exec", name, "true")
	eventually(t, "the event of the exec's end", func() bool { return strings.Contains(events(), "exec_die") })
	n.docker(t, "kill", name)
	n.docker(t, "rm", "-f", name)
	eventually(t, "the event of the removal", func() bool { return strings.Contains(events(), "destroy") })
	got := events("--format", "{{.Type}} {{.Action}}")
	last := -1
	for _, want := range []string{"container create", "container start", "container exec_create: true", "container exec_start: true", "container exec_die", "container kill", "container die", "container destroy"} {
		i := strings.Index(got, want)
		if i < 0 || i < last {
			t.Errorf("no %q in its place in:\n%s", want, got)
		}
		last = i
	}
	die := events("--filter", "event=die", "--format", "{{json .}}")
	var e struct {
		Actor struct{ Attributes map[string]string }
	}
	if err := json.Unmarshal([]byte(die), &e); err != nil || e.Actor.Attributes["exitCode"] != "137" || e.Actor.Attributes["name"] != name || e.Actor.Attributes["image"] != testImage {
		t.Errorf("%s: %v", die, err)
	}
}

func TestEventsStream(t *testing.T) {
	t.Parallel()
	n := shared(t)
	name := n.name(t, "")
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	cmd := n.command(ctx, "events", "--filter", "container="+name, "--filter", "event=die", "--format", "{{.Action}} {{.Actor.Attributes.exitCode}}")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	told := make(chan error, 1)
	go func() {
		line, err := bufio.NewReader(out).ReadString('\n')
		if err == nil && line != "die 11\n" {
			err = fmt.Errorf("%q", line)
		}
		told <- err
	}()
	n.docker(t, "create", "--name", name, testImage, "sh", "-c", "exit 11")
	// docker events does not tell when it listens.
	eventually(t, "an event", func() bool {
		n.expect(t, 11, "", "start", "-a", name)
		select {
		case err := <-told:
			if err != nil {
				t.Error(err)
			}
			return true
		case <-time.After(100 * time.Millisecond):
			return false
		}
	})
	cancel()
	_ = cmd.Wait() // was killed
}

func TestInspectFormats(t *testing.T) {
	t.Parallel()
	n := shared(t)
	name := n.name(t, "")
	n.docker(t, "run", "-d", "--name", name, "--label", "a=b", "-e", "X=y", "-v", "/anon", "--init=false", testImage, "sleep", "1000")
	for format, want := range map[string]string{
		"{{.Name}}":                                            "/" + name,
		"{{.State.Running}}":                                   "true",
		"{{.Config.Image}}":                                    testImage,
		"{{.Path}} {{join .Args \",\"}}":                       "sleep 1000",
		"{{index .Config.Labels \"a\"}}":                       "b",
		"{{index .Config.Labels \"org.example.from\"}}":        "image",
		"{{.HostConfig.NetworkMode}}":                          "bridge",
		"{{.HostConfig.RestartPolicy.Name}}":                   "no",
		"{{.Config.WorkingDir}}":                               "/home",
		"{{(index .Mounts 0).Destination}}":                    "/anon",
		"{{(index .Mounts 0).Type}}":                           "volume",
		"{{len .NetworkSettings.Networks}}":                    "1",
		"{{.NetworkSettings.Gateway}}":                         gateway(n),
		"{{.Driver}}":                                          n.snapshotter(t),
		"{{json (index .NetworkSettings.Ports \"8080/tcp\")}}": "null",
	} {
		if got := n.docker(t, "inspect", "-f", format, name); got != want {
			t.Errorf("%s: %q, want %q", format, got, want)
		}
	}
	if got := n.docker(t, "inspect", "-s", "-f", "{{.SizeRootFs}}", name); got == "" || got == "0" || got == "<nil>" {
		t.Errorf("size %q", got)
	}
	if got := n.docker(t, "ps", "-s", "--filter", "name="+name, "--format", "{{.Size}}"); !strings.Contains(got, "virtual") {
		t.Error(got)
	}
	for _, args := range [][]string{
		{"ps", "-q", "--filter", "label=a=b", "--filter", "name=" + name},
		{"ps", "-q", "--filter", "ancestor=" + testImage, "--filter", "name=" + name},
		{"ps", "-q", "--filter", "status=running", "--filter", "name=" + name},
		{"ps", "-aq", "--filter", "network=bridge", "--filter", "name=" + name},
	} {
		if got := n.docker(t, args...); len(got) != 12 {
			t.Errorf("docker %v: %q", args, got)
		}
	}
	if got := n.docker(t, "ps", "-aq", "--filter", "status=exited", "--filter", "name="+name); got != "" {
		t.Error(got)
	}
}

func TestHealthcheck(t *testing.T) {
	t.Parallel()
	n := shared(t)
	name := n.name(t, "")
	n.docker(t, "run", "-d", "--name", name, "--health-cmd", "test -e /tmp/well", "--health-interval", "200ms", "--health-retries", "2", testImage, "sleep", "1000")
	health := func() string { return n.docker(t, "inspect", "-f", "{{.State.Health.Status}}", name) }
	eventually(t, "it to be unhealthy", func() bool { return health() == "unhealthy" })
	n.docker(t, "exec", name, "touch", "/tmp/well")
	eventually(t, "it to be healthy", func() bool { return health() == "healthy" })
	if got := n.docker(t, "ps", "--filter", "name="+name, "--format", "{{.Status}}"); !strings.Contains(got, "(healthy)") {
		t.Error(got)
	}
}
