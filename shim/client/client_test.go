package client_test

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/shim/client"
)

func TestRunToEnd(t *testing.T) {
	each(t, func(t *testing.T, e *env) {
		log, path := e.jsonLog()
		e.create(client.Stdio{Log: log}, "echo out; echo err >&2; exit 7")
		st := e.attach(client.AttachOptions{Stdout: true, Stderr: true})
		e.begin()
		out, errs, err := read(st)
		if out != "out\n" || errs != "err\n" || err != nil {
			t.Errorf("attached client read %q, %q, %v", out, errs, err)
		}
		exit := e.wait()
		if exit.Status != 7 || exit.OOMKilled || time.Since(exit.ExitedAt) > time.Hour {
			t.Errorf("exit %+v", exit)
		}
		b, err := os.ReadFile(path)
		if err != nil || !strings.Contains(string(b), `{"log":"out\n","stream":"stdout","time":"`) ||
			!strings.Contains(string(b), `{"log":"err\n","stream":"stderr","time":"`) {
			t.Errorf("log %s, %v", b, err)
		}
		if b, err := os.ReadFile(e.bundle + "/exit.json"); err != nil || !strings.Contains(string(b), `"status":7`) {
			t.Errorf("exit file %s, %v", b, err)
		}
		if st, err := e.shim.State(e.ctx, e.id, ""); err != nil || st.Status != client.StatusStopped || st.Exit != exit {
			t.Errorf("state %+v, %v", st, err)
		}
		e.delete()
		if _, err := e.shim.State(e.ctx, e.id, ""); !errdefs.IsNotFound(err) {
			t.Errorf("state after delete: %v", err)
		}
		want := []string{"create", "start", "exit", "delete"}
		if !eventually(func() bool { return slices.Equal(e.topics(), want) }) {
			t.Errorf("events %v", e.topics())
		}
	})
}

func TestExec(t *testing.T) {
	each(t, func(t *testing.T, e *env) {
		e.create(client.Stdio{}, "sleep 600")
		e.begin()
		p := &specs.Process{
			Args: []string{"/bin/sh", "-c", "read x; echo got $x; exit 3"}, Cwd: "/", Env: []string{"PATH=/bin"},
			Capabilities: &specs.LinuxCapabilities{},
		}
		e.check(e.shim.Exec(e.ctx, client.ExecOptions{ID: e.id, ExecID: "x1", Spec: p, Stdio: client.Stdio{OpenStdin: true, StdinOnce: true}}))
		st := e.attach(client.AttachOptions{ExecID: "x1", Stdin: true, Stdout: true, Stderr: true})
		_, err := e.shim.Start(e.ctx, e.id, "x1")
		e.check(err)
		if _, err := st.Write([]byte("input\n")); err != nil {
			t.Error(err)
		}
		out, errs, err := read(st)
		if out != "got input\n" || errs != "" || err != nil {
			t.Errorf("read %q, %q, %v", out, errs, err)
		}
		exit, err := e.shim.Delete(e.ctx, e.id, "x1")
		if err != nil || exit.Status != 3 {
			t.Errorf("delete exec: %+v, %v", exit, err)
		}
		if _, err := e.shim.Delete(e.ctx, e.id, ""); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("delete of a running container: %v", err)
		}
		e.check(e.shim.Kill(e.ctx, e.id, "", 9, false))
		if exit := e.wait(); exit.Status != 137 || exit.OOMKilled {
			t.Errorf("exit %+v", exit)
		}
	})
}
