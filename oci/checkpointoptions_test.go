//go:build linux && (amd64 || arm64)

package oci

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// freePort is one that nobody listens on.
func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// listening waits until somebody listens, without a connection, which would count.
func listening(t *testing.T, port int) {
	t.Helper()
	for deadline := time.Now().Add(hangLimit); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		raw, err := os.ReadFile("/proc/net/tcp")
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(raw), fmt.Sprintf(":%04X 00000000:0000 0A ", port)) {
			return
		}
	}
	t.Fatalf("nobody listens on port %d", port)
}

// criuDaemon runs a server of CRIU's until the test ends or it has served.
func criuDaemon(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("criu", args...)
	log := filepath.Join(t.TempDir(), "log")
	f, err := os.Create(log)
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = f, f
	err = cmd.Start()
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			raw, _ := os.ReadFile(log)
			t.Logf("criu %s: %s", args[0], raw)
		}
	})
	return cmd
}

// TestCheckpointPageServer: the memory goes over the network to another folder, and with it
// the container comes back.
func TestCheckpointPageServer(t *testing.T) {
	b := newDump(t)
	k := b.talk("echo", "before", "line", "exit", "7")
	k.expect(t, "before\n")
	images := filepath.Join(b.bundle, "images")
	if err := os.Mkdir(images, 0o700); err != nil {
		t.Fatal(err)
	}
	elsewhere := t.TempDir()
	port := freePort(t)
	server := criuDaemon(t, "page-server", "--images-dir", elsewhere, "--address", "127.0.0.1", "--port", fmt.Sprint(port))
	listening(t, port)
	b.stop(k, CheckpointOptions{PageServer: fmt.Sprintf("127.0.0.1:%d", port)})
	if err := server.Wait(); err != nil {
		t.Fatalf("the page server: %v", err)
	}
	pages := func(dir string) []string {
		found, err := filepath.Glob(filepath.Join(dir, "pages-*.img"))
		if err != nil {
			t.Fatal(err)
		}
		return found
	}
	if here, there := pages(images), pages(elsewhere); len(here) != 0 || len(there) == 0 {
		t.Fatalf("memory in the images: %v; at the server: %v", here, there)
	}
	for _, kind := range []string{"pages-*.img", "pagemap-*.img"} {
		found, _ := filepath.Glob(filepath.Join(elsewhere, kind))
		for _, f := range found {
			raw, err := os.ReadFile(f)
			if err == nil {
				err = os.WriteFile(filepath.Join(images, filepath.Base(f)), raw, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	k, err := b.resume(RestoreOptions{})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(k.in, "on")
	k.expect(t, "got on\n")
	if code := reap(t, k.c.Pid()); code != 7 {
		t.Errorf("exit code %d", code)
	}
}

// TestCheckpointLazyPages: the container runs elsewhere before its memory is there.
func TestCheckpointLazyPages(t *testing.T) {
	b := newDump(t)
	k := b.talk("echo", "before", "line", "exit", "7")
	k.expect(t, "before\n")
	images, work := filepath.Join(b.bundle, "images"), t.TempDir()
	port := freePort(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	dumped := make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), hangLimit)
	defer cancel()
	go func() {
		err := k.c.Checkpoint(ctx, CheckpointOptions{
			PageServer: fmt.Sprintf("127.0.0.1:%d", port), Ready: w, CRIUOptions: CRIUOptions{ImagePath: images, LazyPages: true},
		})
		w.Close()
		dumped <- err
	}()
	if n, err := r.Read(make([]byte, 1)); n != 1 {
		t.Fatalf("the dump is not ready: %v, %v", err, <-dumped)
	}
	criuDaemon(t, "lazy-pages", "--page-server", "--images-dir", images, "--work-dir", work, "--address", "127.0.0.1", "--port", fmt.Sprint(port))
	for deadline := time.Now().Add(hangLimit); !exists(filepath.Join(work, "lazy-pages.socket")) && time.Now().Before(deadline); {
		time.Sleep(50 * time.Millisecond)
	}
	other := *b // as on another machine: the first one is still there
	other.id += "-again"
	s := *b.spec
	l := *b.spec.Linux
	l.CgroupsPath += "-again"
	s.Linux, other.spec = &l, &s
	again, err := other.resume(RestoreOptions{CRIUOptions: CRIUOptions{ImagePath: images, WorkPath: work, LazyPages: true}})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(again.in, "on")
	again.expect(t, "got on\n")
	if code := reap(t, again.c.Pid()); code != 7 {
		t.Errorf("exit code %d", code)
	}
	select {
	case err := <-dumped:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(hangLimit):
		k.c.Kill(context.Background(), unix.SIGKILL)
		t.Errorf("the dump does not end: %v", <-dumped)
	}
}

// TestCheckpointTCP: a connection is kept if that is asked for, and is else a reason to
// refuse.
func TestCheckpointTCP(t *testing.T) {
	b := newDump(t)
	k := b.talk("tcp", "exit", "7")
	k.expect(t, "connected\n")
	err := k.c.Checkpoint(t.Context(), CheckpointOptions{CRIUOptions: CRIUOptions{ImagePath: filepath.Join(b.bundle, "refused")}})
	if err == nil || !strings.Contains(err.Error(), "tcp-established") {
		t.Fatalf("without the option: %v", err)
	}
	if st, err := k.c.Status(); st != Running || err != nil {
		t.Errorf("after it: %s, %v", st, err)
	}
	b.stop(k, CheckpointOptions{CRIUOptions: CRIUOptions{TCPEstablished: true}})
	k, err = b.resume(RestoreOptions{CRIUOptions: CRIUOptions{TCPEstablished: true}})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(k.in, "over it")
	k.expect(t, "came over it\n")
	if code := reap(t, k.c.Pid()); code != 7 {
		t.Errorf("exit code %d", code)
	}
}
