package mounts

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/store"
)

func needs(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("%s needs %s", t.Name(), p)
		}
	}
}

func TestMkfs(t *testing.T) {
	t.Parallel()
	needs(t, "mkfs.ext4")
	ctx := context.Background()
	dir := t.TempDir()
	file := filepath.Join(dir, "disk.img")
	m := mount.Mount{Type: "mkfs/loop", Source: file, Options: []string{
		"X-containerd.mkfs.size=16MiB", "ro", "X-containerd.mkfs.fs=ext4", "X-containerd.mkfs.uuid=550e8400-e29b-41d4-a716-446655440000"}}
	got, err := transform(ctx, m, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got.Type != "loop" || len(got.Options) != 1 || got.Options[0] != "ro" || got.Source != file {
		t.Errorf("%+v", got)
	}
	raw, err := os.ReadFile(file)
	if err != nil || len(raw) != 16<<20 || raw[1024+56] != 0x53 || raw[1024+57] != 0xef {
		t.Fatalf("%d bytes, %v: no ext4", len(raw), err)
	}
	if want := []byte{0x55, 0x0e, 0x84, 0x00}; !bytes.Equal(raw[1024+104:1024+108], want) {
		t.Errorf("uuid %x", raw[1024+104:1024+120])
	}
	// What is there is somebody's.
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := transform(ctx, m, nil); err != nil {
		t.Error(err)
	}
	if raw, err := os.ReadFile(file); err != nil || string(raw) != "mine" {
		t.Errorf("%q, %v", raw, err)
	}
	if list, err := os.ReadDir(dir); err != nil || len(list) != 1 {
		t.Errorf("%v, %v", list, err)
	}
	for _, o := range [][]string{
		nil, {"X-containerd.mkfs.fs=ext4"}, {"X-containerd.mkfs.size=0"}, {"X-containerd.mkfs.size=-5"}, {"X-containerd.mkfs.size=1000PiB"}, {"X-containerd.mkfs.size=x"},
		{"X-containerd.mkfs.size=1MiB", "X-containerd.mkfs.fs=../sh"}, {"X-containerd.mkfs.size=1MiB", "X-containerd.mkfs.uuid=-F"}, {"X-containerd.mkfs.size=1MiB", "X-containerd.mkfs.x=y"},
	} {
		if _, err := transform(ctx, mount.Mount{Type: "mkfs/loop", Source: filepath.Join(dir, "bad"), Options: o}, nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", o, err)
		}
	}
	for _, source := range []string{"relative", dir, dir + "/x/"} {
		if _, err := transform(ctx, mount.Mount{Type: "mkfs/loop", Source: source, Options: m.Options}, nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", source, err)
		}
	}
	// Too small for what is asked: nothing is left, and the program's words are told.
	tiny := filepath.Join(dir, "tiny")
	if _, err := transform(ctx, mount.Mount{Type: "mkfs/loop", Source: tiny, Options: []string{"X-containerd.mkfs.size=1KiB"}}, nil); err == nil {
		t.Error("a file system of 1 KiB")
	}
	if _, err := os.Lstat(tiny); err == nil {
		t.Error("a file without a file system is left")
	}
	// Below an earlier mount no link is followed out of it.
	inside := filepath.Join(dir, "inside")
	if err := os.Mkdir(inside, 0o700); err != nil {
		t.Fatal(err)
	}
	outside := t.TempDir()
	if err := os.Symlink(outside, filepath.Join(inside, "link")); err != nil {
		t.Fatal(err)
	}
	_, _ = transform(ctx, mount.Mount{Type: "mkfs/loop", Source: inside + "/link/x", Options: m.Options}, []mount.ActiveMount{{MountPoint: inside}})
	if list, err := os.ReadDir(outside); err != nil || len(list) != 0 {
		t.Errorf("made outside: %v, %v", list, err)
	}
}

func TestMkfsXFS(t *testing.T) {
	t.Parallel()
	needs(t, "mkfs.xfs")
	file := filepath.Join(t.TempDir(), "disk.img")
	_, err := transform(context.Background(), mount.Mount{Type: "mkfs/xfs", Source: file, Options: []string{
		"X-containerd.mkfs.size=300MiB", "X-containerd.mkfs.fs=xfs", "X-containerd.mkfs.uuid=550e8400-e29b-41d4-a716-446655440000"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	head := make([]byte, 36)
	if _, err := f.Read(head); err != nil || string(head[:4]) != "XFSB" || head[32] != 0x55 {
		t.Errorf("%x, %v", head, err)
	}
}

// TestKeepers: mounts stay as long as one of the objects that their labels name.
func TestKeepers(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skipf("needs root: %s", t.Name())
	}
	ctx := namespaces.WithNamespace(context.Background(), "test")
	gone := map[store.Node]bool{}
	m, err := New(Options{Dir: t.TempDir(), KeeperGone: func(_ context.Context, n store.Node) bool { return gone[n] }})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	activate := func(name string, labels map[string]string) {
		t.Helper()
		list := []mount.Mount{{Type: "bind", Source: dir, Options: []string{"rbind", "ro"}}}
		if _, err := m.Activate(ctx, name, list, mount.WithTemporary, mount.WithLabels(labels)); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = m.Deactivate(ctx, name) })
	}
	names := func() (out string) {
		m.Sweep(ctx)
		list, err := m.List(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range list {
			out += i.Name
		}
		return out
	}
	activate("a", map[string]string{"containerd.io/gc.bref.container": "c"})
	activate("b", map[string]string{"containerd.io/gc.bref.container": "c", "containerd.io/gc.bref.snapshot.overlayfs/x": "s"})
	activate("p", nil)
	if got := names(); got != "abp" {
		t.Error(got)
	}
	gone[store.ContainerNode("test", "c")] = true
	if got := names(); got != "bp" {
		t.Errorf("without the container: %s", got)
	}
	gone[store.SnapshotNode("overlayfs", "test", "s")] = true
	if got := names(); got != "p" {
		t.Errorf("without the snapshot: %s", got)
	}
}
