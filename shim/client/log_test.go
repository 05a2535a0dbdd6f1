package client_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/shim/client"
)

// A full disk costs records, and neither blocks nor ends the container.
func TestLogDiskFull(t *testing.T) {
	each(t, func(t *testing.T, e *env) {
		dir := filepath.Join(t.TempDir(), "small")
		e.check(os.Mkdir(dir, 0o700))
		e.check(unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"))
		defer unix.Unmount(dir, unix.MNT_DETACH)
		path := filepath.Join(dir, "c.log")
		e.create(client.Stdio{Log: client.LogConfig{Format: "json-file", Path: path}}, "seq 200000; exit 8")
		st := e.attach(client.AttachOptions{Stdout: true})
		e.begin()
		out, _, err := read(st)
		if !strings.HasSuffix(out, "\n200000\n") || err != nil {
			t.Errorf("attached client got %d bytes, %v", len(out), err)
		}
		if exit := e.wait(); exit.Status != 8 {
			t.Errorf("exit %+v", exit)
		}
		b, err := os.ReadFile(path)
		if err != nil || len(b) < 200<<10 || b[len(b)-1] != '\n' {
			t.Errorf("log has %d bytes, %v", len(b), err)
		}
		if b, _ := os.ReadFile(filepath.Join(e.bundle, "shim.log")); !strings.Contains(string(b), "log records dropped") {
			t.Errorf("shim.log: %s", b)
		}
		e.delete()
	})
}

// The kubelet's rotation: rename, then reopen; nothing is lost, and after the answer
// nothing goes to the old file.
func TestReopenLog(t *testing.T) {
	each(t, func(t *testing.T, e *env) {
		path := filepath.Join(e.bundle, "0.log")
		e.create(client.Stdio{OpenStdin: true, Log: client.LogConfig{Format: "cri", Path: path}}, "cat")
		st := e.attach(client.AttachOptions{Stdin: true, Stdout: true})
		e.begin()
		say := func(s string) {
			_, err := st.Write([]byte(s))
			e.check(err)
			_, _, err = st.ReadFrame() // it has come out, and so it is in the log
			e.check(err)
		}
		say("one\n")
		e.check(os.Rename(path, path+".1"))
		say("two\n")
		e.check(e.shim.ReopenLog(e.ctx, e.id, ""))
		say("three\n")
		e.check(e.shim.CloseStdin(e.ctx, e.id, ""))
		e.wait()
		a, _ := os.ReadFile(path + ".1")
		b, _ := os.ReadFile(path)
		if bytes.Count(a, []byte("\n")) != 2 || !bytes.HasSuffix(a, []byte(" stdout F two\n")) || !bytes.HasSuffix(b, []byte(" stdout F three\n")) || bytes.Count(b, []byte("\n")) != 1 {
			t.Errorf("old %q, new %q", a, b)
		}
	})
}
