package snapshot

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/store"
)

func testContext() context.Context {
	return namespaces.WithNamespace(context.Background(), "test")
}

type opener func(root string, s *store.Store) (*Snapshotter, error)

func openTest(t testing.TB, open opener) *Snapshotter {
	t.Helper()
	dir := t.TempDir()
	s := openStore(t, filepath.Join(dir, "store"))
	sn, err := open(filepath.Join(dir, "sn"), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(sn.Close(), unmountAll(filepath.Join(dir, "sn"))); err != nil {
			t.Error(err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return sn
}

// detached gives a path through which a detached mount can be used by ordinary code.
func detached(t testing.TB, mounts []mount.Mount) string {
	t.Helper()
	f, err := MountDetached(mounts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return filepath.Join("/proc/self/fd", itoa(int(f.Fd())))
}

func prepare(t testing.TB, sn snapshots.Snapshotter, key, parent string) string {
	t.Helper()
	m, err := sn.Prepare(testContext(), key, parent)
	if err != nil {
		t.Fatal(err)
	}
	return detached(t, m)
}

func write(t testing.TB, root, name, text string) {
	t.Helper()
	p := filepath.Join(root, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestChanges(t *testing.T) {
	needsRoot(t)
	for name, open := range drivers {
		t.Run(name, func(t *testing.T) {
			sn := openTest(t, open)
			ctx := testContext()
			root := prepare(t, sn, "base-a", "")
			write(t, root, "etc/passwd", "root")
			write(t, root, "etc/group", "root")
			write(t, root, "dir/one", "1")
			write(t, root, "dir/two/three", "3")
			write(t, root, "old/file", "x")
			write(t, root, "swap", "file")
			write(t, root, "deep/a/b/c", "c")
			must(t, os.Symlink("/etc/passwd", filepath.Join(root, "link")))
			must(t, sn.Commit(ctx, "base", "base-a"))
			root = prepare(t, sn, "mid-a", "base")
			must(t, os.RemoveAll(filepath.Join(root, "old")))
			write(t, root, "mid", "m")
			must(t, sn.Commit(ctx, "mid", "mid-a"))

			root = prepare(t, sn, "c", "mid")
			if list, err := Changes(ctx, sn, "c"); err != nil || len(list) != 0 {
				t.Fatalf("fresh container: %v, %v", list, err)
			}
			write(t, root, "etc/passwd", "toor")
			write(t, root, "new/file", "n")
			write(t, root, "old/other", "o") // /old was deleted below: it is new
			must(t, os.Remove(filepath.Join(root, "etc/group")))
			must(t, os.RemoveAll(filepath.Join(root, "dir")))
			write(t, root, "dir/four", "4") // an opaque directory
			must(t, os.Remove(filepath.Join(root, "swap")))
			must(t, os.Mkdir(filepath.Join(root, "swap"), 0o755))
			must(t, os.Chmod(filepath.Join(root, "mid"), 0o600))
			must(t, os.Remove(filepath.Join(root, "link")))
			must(t, os.Symlink("/etc/group", filepath.Join(root, "link")))
			write(t, root, "deep/a/b/d", "d")
			write(t, root, "gone", "g")
			must(t, os.Remove(filepath.Join(root, "gone")))
			// Touched, which overlayfs copies up, and set back.
			st, err := os.Stat(filepath.Join(root, "deep/a/b/c"))
			must(t, err)
			must(t, os.Chtimes(filepath.Join(root, "deep/a/b/c"), st.ModTime(), st.ModTime()))

			list, err := Changes(ctx, sn, "c")
			must(t, err)
			want := []Change{
				{Modified, "/deep"}, {Modified, "/deep/a"}, {Modified, "/deep/a/b"}, {Added, "/deep/a/b/d"},
				{Modified, "/dir"}, {Added, "/dir/four"}, {Deleted, "/dir/one"}, {Deleted, "/dir/two"},
				{Modified, "/etc"}, {Deleted, "/etc/group"}, {Modified, "/etc/passwd"},
				{Modified, "/link"}, {Modified, "/mid"}, {Added, "/new"}, {Added, "/new/file"},
				{Added, "/old"}, {Added, "/old/other"}, {Modified, "/swap"},
			}
			if len(list) != len(want) {
				t.Fatalf("got  %v\nwant %v", list, want)
			}
			for i := range want {
				if list[i] != want[i] {
					t.Errorf("%d: got %v, want %v", i, list[i], want[i])
				}
			}
		})
	}
}

// A container may replace a directory by a link to the host while it is compared.
func TestChangesNeverLeavesTheLayer(t *testing.T) {
	needsRoot(t)
	sn := openTest(t, NewOverlay)
	outside := t.TempDir()
	write(t, outside, "secret", "s")
	root := prepare(t, sn, "c", "")
	must(t, os.Symlink(outside, filepath.Join(root, "link")))
	must(t, unix.Mkfifo(filepath.Join(root, "fifo"), 0o600))
	list, err := Changes(testContext(), sn, "c")
	must(t, err)
	if len(list) != 2 || list[0] != (Change{Added, "/fifo"}) || list[1] != (Change{Added, "/link"}) {
		t.Fatal(list)
	}
}
