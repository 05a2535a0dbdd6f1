package client_test

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/shim/client"
	"github.com/hako-engine/hako/shim/wire"
)

func sh(script string) *specs.Process {
	return &specs.Process{Args: []string{"/bin/sh", "-c", script}, Cwd: "/", Env: []string{"PATH=/bin", "PAD=" + strings.Repeat("x", 20<<10)}, Capabilities: &specs.LinuxCapabilities{}}
}

// TestRun: a process is added, attached to, started and forgotten in one exchange.
func TestRun(t *testing.T) {
	each(t, func(t *testing.T, e *env) {
		e.create(client.Stdio{}, "sleep 600")
		e.begin()
		st, pid, err := e.shim.Run(e.ctx, client.ExecOptions{ID: e.id, ExecID: "r1", Spec: sh("echo out; echo err >&2; exit 3")})
		e.check(err)
		defer st.Close()
		if pid <= 0 {
			t.Errorf("pid %d", pid)
		}
		out, errs, err := read(st)
		if out != "out\n" || errs != "err\n" || err != nil || st.ExitStatus() != 3 {
			t.Errorf("read %q, %q, %v; exit status %d", out, errs, err, st.ExitStatus())
		}
		gone := func(id string) bool {
			return eventually(func() bool {
				_, err := e.shim.State(e.ctx, e.id, id)
				return errdefs.IsNotFound(err)
			})
		}
		if !gone("r1") {
			t.Error("the process is not forgotten")
		}
		if want := []string{"create", "start", "exec-added:r1", "exec-started:r1", "exit:r1"}; !eventually(func() bool {
			return strings.Join(e.topics(), " ") == strings.Join(want, " ")
		}) {
			t.Errorf("events %v, want %v", e.topics(), want)
		}

		// A client that goes does not take the process along, which is forgotten all the same.
		st, _, err = e.shim.Run(e.ctx, client.ExecOptions{ID: e.id, ExecID: "r2", Spec: sh("sleep 0.3; exit 4")})
		e.check(err)
		st.Close()
		if exit, err := e.shim.Wait(e.ctx, e.id, "r2"); err != nil || exit.Status != 4 {
			t.Errorf("without its client: %+v, %v", exit, err)
		}
		if !gone("r2") {
			t.Error("the process without a client is not forgotten")
		}

		// What cannot be started leaves nothing.
		p := sh("")
		p.Args = []string{"/bin/missing"}
		var start *client.StartError
		if _, _, err := e.shim.Run(e.ctx, client.ExecOptions{ID: e.id, ExecID: "r3", Spec: p}); !errors.As(err, &start) || errdefs.IsNotFound(err) {
			t.Errorf("a missing program: %v", err)
		}
		if !gone("r3") {
			t.Error("the process that was not started is not forgotten")
		}
		if _, _, err := e.shim.Run(e.ctx, client.ExecOptions{ID: "other", ExecID: "r4", Spec: p}); !errdefs.IsNotFound(err) || errors.As(err, &start) {
			t.Errorf("another container: %v", err)
		}

		// So with one whose client does not wait for the answer.
		b, err := os.ReadFile(filepath.Join(e.bundle, "address"))
		e.check(err)
		conn, err := wire.Dial(strings.TrimPrefix(string(b), "unix://"))
		e.check(err)
		spec, err := json.Marshal(sh("exit 5"))
		e.check(err)
		e.check(wire.WriteRun(conn, wire.AttachRequest{ID: e.id, ExecID: "r5", Stdout: true}, spec))
		conn.Close()
		if !eventually(func() bool { return strings.Contains(strings.Join(e.topics(), " "), "exit:r5") }) || !gone("r5") {
			t.Errorf("the process whose client had gone is not forgotten: %v", e.topics())
		}
		e.check(e.shim.Kill(e.ctx, e.id, "", 9, false))
		e.wait()
	})
}
