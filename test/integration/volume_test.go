package integration

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestVolumeMounts uses volumes with mount options: mounted for the first container,
// unmounted after the last, by whichever daemon; and what is mounted is never removed.
func TestVolumeMounts(t *testing.T) {
	n := own(t)
	host := filepath.Join(n.dir, "host")
	if err := os.Mkdir(host, 0o755); err != nil {
		t.Fatal(err)
	}
	precious := filepath.Join(host, "precious")
	if err := os.WriteFile(precious, []byte("kept\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	mounts := func(volume string) int {
		t.Helper()
		b, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(b), " "+filepath.Join(n.dir, "lib/volumes", volume, "_data")+" ")
	}
	expect := func(when, volume string, want int) {
		t.Helper()
		if got := mounts(volume); got != want {
			t.Errorf("%s: %s is mounted %d times, want %d", when, volume, got, want)
		}
	}
	n.docker(t, "volume", "create", "--opt", "type=none", "--opt", "o=bind", "--opt", "device="+host, "bound")
	n.docker(t, "volume", "create", "--opt", "type=tmpfs", "--opt", "device=tmpfs", "--opt", "o=size=1m,uid=1000", "memory")
	n.docker(t, "volume", "create", "--opt", "type=none", "--opt", "o=bind,ro", "--opt", "device="+host, "readonly")
	n.docker(t, "volume", "create", "--opt", "type=none", "--opt", "o=bind", "--opt", "device="+host+"/nope", "broken")
	n.expect(t, 1, `missing required option: "device"`, "volume", "create", "--opt", "type=none", "bad")
	n.expect(t, 1, `invalid option: "foo"`, "volume", "create", "--opt", "foo=bar", "bad")
	expect("before any use", "bound", 0)

	n.expect(t, 0, "kept", "run", "--rm", "-v", "bound:/v", testImage, "sh", "-c", "cat /v/precious && echo new >/v/new")
	if b, err := os.ReadFile(filepath.Join(host, "new")); err != nil || string(b) != "new\n" {
		t.Errorf("the device has %q, %v", b, err)
	}
	expect("after a run", "bound", 0)
	n.expect(t, 1, "Read-only file system", "run", "--rm", "-v", "readonly:/v", testImage, "touch", "/v/x")
	n.expect(t, 127, "failed to mount local volume: mount "+host+"/nope:", "run", "--rm", "-v", "broken:/v", testImage, "true")
	n.expect(t, 0, "size=1024k", "run", "--rm", "--mount", "type=volume,dst=/v,volume-opt=type=tmpfs,volume-opt=device=tmpfs,\"volume-opt=o=size=1m,mode=700\"", testImage, "grep", " /v ", "/proc/mounts")

	// Shared by those who use it at one time.
	n.docker(t, "run", "-d", "--name", "one", "-v", "memory:/v", "-v", "bound:/b", testImage, "sleep", "1000")
	n.docker(t, "exec", "-u", "1000", "one", "sh", "-c", "echo shared >/v/f")
	n.docker(t, "run", "-d", "--name", "two", "-v", "memory:/v:ro", testImage, "sleep", "1000")
	n.expect(t, 0, "shared", "exec", "two", "cat", "/v/f")
	expect("with two users", "memory", 1)
	n.docker(t, "rm", "-f", "one")
	expect("with one user left", "memory", 1)
	expect("without a user", "bound", 0)
	n.expect(t, 1, "volume is in use", "volume", "rm", "memory")

	// Another daemon takes the use over.
	if err := n.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	expect("after a restart", "memory", 1)
	n.expect(t, 0, "shared", "run", "--rm", "-v", "memory:/v", testImage, "cat", "/v/f")
	expect("after a restart and a second user", "memory", 1)
	n.expect(t, 0, "shared", "exec", "two", "cat", "/v/f")
	// This one dies while there is no daemon.
	if err := n.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	list, err := n.processes()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range list {
		if pid, cmdline, _ := strings.Cut(p, " "); strings.Contains(cmdline, "hako-shim") {
			killProcess(t, pid)
		}
	}
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the volume to be unmounted", func() bool { return mounts("memory") == 0 })

	// A stopped container's volume can be copied from and to.
	n.docker(t, "create", "--name", "stopped", "-v", "bound:/v", testImage, "true")
	n.docker(t, "cp", precious, "stopped:/v/copied")
	if _, err := os.Stat(filepath.Join(host, "copied")); err != nil {
		t.Error(err)
	}
	n.docker(t, "cp", "stopped:/v/precious", filepath.Join(n.dir, "out"))
	expect("after copies", "bound", 0)

	// A mount that a daemon which was killed left is no reason to lose what is behind it.
	n.docker(t, "rm", "-f", "stopped", "two")
	at := filepath.Join(n.dir, "lib/volumes/bound/_data")
	if err := syscall.Mount(host, at, "", syscall.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	n.docker(t, "volume", "rm", "bound", "memory", "readonly", "broken")
	n.docker(t, "volume", "create", "plain")
	at = filepath.Join(n.dir, "lib/volumes/plain/_data")
	if err := syscall.Mount(host, at, "", syscall.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	n.expect(t, 1, "is a mount point", "volume", "rm", "plain")
	if err := syscall.Unmount(at, 0); err != nil {
		t.Fatal(err)
	}
	n.docker(t, "volume", "rm", "plain")
	if b, err := os.ReadFile(precious); err != nil || string(b) != "kept\n" {
		t.Fatalf("the device's file: %q, %v", b, err)
	}
}
