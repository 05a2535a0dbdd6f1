package client_test

import (
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/shim/client"
)

// What a process inherits from the shim: no descriptor but its three, no ignored or
// blocked signal.
func TestInherited(t *testing.T) {
	const script = `for f in /proc/$$/fd/*; do [ -e $f ] && echo fd ${f##*/}; done; cat /proc/self/status | while read -r key value; do case $key in SigIgn:|SigBlk:) echo $key $value;; esac; done`
	const want = "fd 0\nfd 1\nfd 2\nSigBlk: 0000000000000000\nSigIgn: 0000000000000000\n"
	each(t, func(t *testing.T, e *env) {
		e.create(client.Stdio{}, script+"; read x < /dev/zero & sleep 600")
		st := e.attach(client.AttachOptions{Stdout: true})
		e.begin()
		var got strings.Builder
		for strings.Count(got.String(), "\n") < 5 {
			_, p, err := st.ReadFrame()
			e.check(err)
			got.Write(p)
		}
		if got.String() != want {
			t.Errorf("first process: %s", got.String())
		}
		p := &specs.Process{Args: []string{"/bin/sh", "-c", script}, Cwd: "/", Env: []string{"PATH=/bin"}, Capabilities: &specs.LinuxCapabilities{}}
		e.check(e.shim.Exec(e.ctx, client.ExecOptions{ID: e.id, ExecID: "x", Spec: p}))
		st = e.attach(client.AttachOptions{ExecID: "x", Stdout: true})
		_, err := e.shim.Start(e.ctx, e.id, "x")
		e.check(err)
		if out, _, err := read(st); out != want || err != nil {
			t.Errorf("added process: %s, %v", out, err)
		}
	})
}

func TestExecTerminal(t *testing.T) {
	each(t, func(t *testing.T, e *env) {
		e.create(client.Stdio{}, "sleep 600")
		e.begin()
		p := &specs.Process{
			Args: []string{"/bin/sh", "-c", "read x; stty size; echo got $x; sleep 30 & exit 6"}, Cwd: "/", Env: []string{"PATH=/bin"},
			Capabilities: &specs.LinuxCapabilities{}, Terminal: true,
		}
		e.check(e.shim.Exec(e.ctx, client.ExecOptions{ID: e.id, ExecID: "x", Spec: p, Stdio: client.Stdio{Terminal: true, OpenStdin: true, StdinOnce: true}}))
		st := e.attach(client.AttachOptions{ExecID: "x", Stdin: true, Stdout: true})
		_, err := e.shim.Start(e.ctx, e.id, "x")
		e.check(err)
		e.check(e.shim.Resize(e.ctx, e.id, "x", 100, 30))
		_, err = st.Write([]byte("hi\n"))
		e.check(err)
		if out, _, err := read(st); !strings.HasSuffix(out, "30 100\r\ngot hi\r\n") || err != nil {
			t.Errorf("read %q, %v", out, err)
		}
		if exit, err := e.shim.Delete(e.ctx, e.id, "x"); err != nil || exit.Status != 6 {
			t.Errorf("%+v, %v", exit, err)
		}
	})
}
