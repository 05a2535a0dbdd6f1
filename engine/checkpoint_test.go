package engine

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/internal/execfile"
	"github.com/hako-engine/hako/snapshot"
	"github.com/hako-engine/hako/store"
)

// withCRIU puts a program of that name in $PATH: the fake shim calls none.
func withCRIU(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	if err := execfile.Write(filepath.Join(dir, "criu"), []byte("#!/bin/sh\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
}

func filesOf(t *testing.T, path string) map[string]string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	out := map[string]string{}
	for tr := tar.NewReader(f); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		raw, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		out[h.Name] = string(raw)
	}
}

// withFiles gives a node a snapshotter with files.
func withFiles(t *testing.T) (*node, snapshots.Snapshotter) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skipf("needs root: %s", t.Name()) // snapshots are owned by it
	}
	n := newNode(t)
	dir := t.TempDir()
	st, err := store.Open(dir, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	snaps, err := snapshot.NewNative(filepath.Join(dir, "native"), st)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { snaps.Close() })
	n.files, n.e.opt.Snapshotters["fake"] = snaps, snaps
	return n, snaps
}

func TestCheckpointContainer(t *testing.T) {
	n, _ := withFiles(t)
	pod := n.pod(hostPod("p"))
	id := n.member(pod, memberConfig("a"))
	out := t.TempDir()
	path := filepath.Join(out, "c.tar")

	t.Setenv("PATH", t.TempDir())
	if err := n.e.CheckpointContainer(bg, id, path); !errdefs.IsNotImplemented(err) {
		t.Errorf("without CRIU: %v", err)
	}
	withCRIU(t)
	for _, bad := range []string{"", "relative.tar", filepath.Join(out, "none", "c.tar")} {
		if err := n.e.CheckpointContainer(bg, id, bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("location %q: %v", bad, err)
		}
	}
	if err := n.e.CheckpointContainer(bg, "none", path); !errdefs.IsNotFound(err) {
		t.Errorf("an unknown container: %v", err)
	}

	if err := n.e.CheckpointContainer(bg, id, path); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("the archive: %v, %v", fi, err)
	}
	files := filesOf(t, path)
	if files["checkpoint/frozen"] != "true" || files["dump.log"] != "log" {
		t.Errorf("the images are not of a frozen container: %q", files)
	}
	var info checkpointInfo
	if err := json.Unmarshal([]byte(files[checkpointConfig]), &info); err != nil || info.ID != id || info.Name != "a" {
		t.Errorf("%s: %+v, %v", checkpointConfig, info, err)
	}
	for _, name := range []string{checkpointSpec, checkpointRootfs, checkpointNetwork} {
		if _, ok := files[name]; !ok {
			t.Errorf("%s is missing", name)
		}
	}

	n.breakStep("checkpoint", errors.New("no"))
	if err := n.e.CheckpointContainer(bg, id, filepath.Join(out, "failed.tar")); err == nil {
		t.Error("a checkpoint that failed is none")
	}
	n.breakStep("", nil)
	ended, cancel := context.WithCancel(bg)
	cancel()
	if err := n.e.CheckpointContainer(ended, id, filepath.Join(out, "cancelled.tar")); err == nil {
		t.Error("a checkpoint that was cancelled is none")
	}
	left, err := os.ReadDir(out)
	if err != nil || len(left) != 1 {
		t.Errorf("left beside the archive: %v, %v", left, err)
	}
	if left, _ := filepath.Glob(filepath.Join(n.e.dir(id), "checkpoint-*")); len(left) != 0 {
		t.Errorf("left in the container's folder: %v", left)
	}
	v, err := n.e.Container(bg, id)
	if err != nil || v.State.Status != StatusRunning {
		t.Errorf("it does not go on: %+v, %v", v.State, err)
	}
}
