package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/execfile"
	"github.com/hako-engine/hako/oci"
	"github.com/hako-engine/hako/oci/spec"
	"github.com/hako-engine/hako/shim"
)

// lines collects what a container writes.
type lines struct {
	sync.Mutex
	bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.Lock()
	defer l.Unlock()
	return l.Buffer.Write(b)
}

func (l *lines) text() string {
	l.Lock()
	defer l.Unlock()
	return l.String()
}

// TestNativeCheckpoint: what the shim's Checkpoint writes, its Create takes; the container
// runs on when it is started, and not before. CRIU works in the virtual machine:
// test/vm/suite.sh ./cmd/hako-shim
func TestNativeCheckpoint(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skipf("needs root: %s", t.Name())
	}
	if _, err := exec.LookPath("criu"); err != nil {
		t.Skipf("needs CRIU: %s", t.Name())
	}
	if out, err := exec.Command("criu", "check").CombinedOutput(); err != nil {
		t.Skipf("needs a CRIU that knows this kernel: %s: %.200s", t.Name(), out)
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skipf("needs busybox: %s", t.Name())
	}
	dir := t.TempDir()
	for _, d := range []string{"lower/bin", "lower/proc", "lower/sys", "lower/dev", "lower/tmp", "upper", "work", "bundle"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := os.ReadFile(busybox)
	if err == nil {
		err = execfile.Write(filepath.Join(dir, "lower/bin/busybox"), raw, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	id := fmt.Sprintf("hakoshim-%d", os.Getpid())
	s := spec.Default(oci.CgroupV2())
	s.Process.Terminal, s.Process.NoNewPrivileges, s.Process.Rlimits = false, false, nil
	s.Process.Args = []string{"/bin/busybox", "sh", "-c", "echo begun; while read x; do echo got $x; done"}
	s.Root.Readonly = false
	s.Linux.CgroupsPath = "/" + id
	if raw, err = json.Marshal(s); err == nil {
		err = os.WriteFile(filepath.Join(dir, "bundle/config.json"), raw, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	rt := native{&oci.Runtime{Root: filepath.Join(dir, "state")}}
	create := func(restore *shim.Restore) (shim.Container, *os.File, *lines) {
		t.Helper()
		in, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		r, out, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		got := new(lines)
		go func() {
			buf := make([]byte, 4096)
			for {
				n, err := r.Read(buf)
				if got.Write(buf[:n]); err != nil {
					r.Close()
					return
				}
			}
		}()
		c, err := rt.Create(t.Context(), id, shim.CreateOptions{
			Bundle: filepath.Join(dir, "bundle"), Stdin: in, Stdout: out, Stderr: out, Restore: restore,
			Rootfs: []shim.Mount{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=" + dir + "/lower", "upperdir=" + dir + "/upper", "workdir=" + dir + "/work"}}},
		})
		in.Close()
		out.Close()
		if err != nil {
			t.Fatal(err)
		}
		return c, w, got
	}
	expect := func(l *lines, text string) {
		t.Helper()
		for range 600 {
			if l.text() == text {
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
		t.Fatalf("output %q, want %q", l.text(), text)
	}
	end := func(c shim.Container) {
		t.Helper()
		if _, err := unix.Wait4(c.Init().Pid, nil, 0, nil); err != nil {
			t.Error(err)
		}
		if err := c.Delete(context.Background()); err != nil {
			t.Error(err)
		}
	}
	c, in, out := create(nil)
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	expect(out, "begun\n")
	images := filepath.Join(dir, "images")
	if err := c.Checkpoint(t.Context(), shim.CheckpointOptions{ImagePath: images, Exit: true, FileLocks: true}); err != nil {
		t.Fatal(err)
	}
	in.Close()
	end(c)
	c, in, out = create(&shim.Restore{ImagePath: images})
	fmt.Fprintln(in, "word")
	time.Sleep(500 * time.Millisecond)
	if text := out.text(); text != "" {
		t.Errorf("a container that is not started has written %q", text)
	}
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	expect(out, "got word\n")
	in.Close()
	end(c)
	// One that is not started is killed.
	c, in, _ = create(&shim.Restore{ImagePath: images})
	if err := c.Kill(t.Context(), unix.SIGKILL, false); err != nil {
		t.Error(err)
	}
	in.Close()
	end(c)
	if text, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(text), dir) {
		t.Errorf("mounts are left: %v", err)
	}
}
