package snapshot

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/store"
)

// forEachDriver runs a contract that every driver holds.
func forEachDriver(t *testing.T, run func(t *testing.T, sn *Snapshotter)) {
	needsRoot(t)
	for name, open := range drivers {
		t.Run(name, func(t *testing.T) { run(t, openTest(t, open)) })
	}
}

// whiteout and opaque write a deletion in overlayfs's form, as an unpacker does.
func whiteout(t testing.TB, root, name string) {
	t.Helper()
	must(t, unix.Mknod(filepath.Join(root, name), unix.S_IFCHR, 0))
}

func opaque(t testing.TB, dir string) {
	t.Helper()
	must(t, os.MkdirAll(dir, 0o755))
	must(t, unix.Setxattr(dir, "trusted.overlay.opaque", []byte("y"), 0))
}

func view(t testing.TB, sn *Snapshotter, key, parent string) string {
	t.Helper()
	m, err := sn.View(testContext(), key, parent)
	must(t, err)
	return detached(t, m)
}

func tree(t testing.TB, root string) string {
	t.Helper()
	var list []string
	must(t, filepath.WalkDir(root+"/", func(p string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel := strings.TrimPrefix(p, root+"/")
		if d.Type().IsRegular() {
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			rel += "=" + string(b)
		}
		if rel != "" {
			list = append(list, rel)
		}
		return nil
	}))
	return strings.Join(list, " ")
}

func TestRebase(t *testing.T) {
	forEachDriver(t, func(t *testing.T, sn *Snapshotter) {
		ctx := testContext()
		// All three are filled side by side, none with a parent.
		var roots [3]string
		var wg sync.WaitGroup
		for i := range roots {
			wg.Go(func() { roots[i] = prepare(t, sn, fmt.Sprint("l", i), "") })
		}
		wg.Wait()
		write(t, roots[0], "keep", "0")
		write(t, roots[0], "gone", "0")
		write(t, roots[0], "dir/a", "0")
		write(t, roots[0], "dir/sub/b", "0")
		write(t, roots[0], "merged/a", "0")
		write(t, roots[0], "file", "0")
		write(t, roots[0], "other/x", "0")
		must(t, os.Chmod(roots[0], 0o750))
		must(t, os.Chown(roots[0], 7, 8))
		whiteout(t, roots[1], "gone")
		whiteout(t, roots[1], "never-there")
		opaque(t, filepath.Join(roots[1], "dir"))
		write(t, roots[1], "dir/c", "1")
		write(t, roots[1], "merged/b", "1")
		must(t, os.Chmod(filepath.Join(roots[1], "merged"), 0o711))
		write(t, roots[1], "file/now-a-dir", "1")
		write(t, roots[1], "other", "1")
		write(t, roots[2], "gone", "2")
		whiteout(t, filepath.Join(roots[2]), "other")

		must(t, sn.Commit(ctx, "c0", "l0"))
		must(t, sn.Commit(ctx, "c1", "l1", snapshots.WithParent("c0")))
		must(t, sn.Commit(ctx, "c2", "l2", snapshots.WithParent("c1"), WithSynced(), WithUsage(snapshots.Usage{Size: 42, Inodes: 7})))
		info, err := sn.Stat(ctx, "c2")
		must(t, err)
		if info.Parent != "c1" || info.Kind != snapshots.KindCommitted || len(info.Labels) != 0 {
			t.Error(info)
		}
		// What the caller measured holds no parent's files, and a native layer does.
		if u, err := sn.Usage(ctx, "c2"); err != nil || (u == snapshots.Usage{Size: 42, Inodes: 7}) == sn.driver.whole() {
			t.Error(u, err)
		}
		if u, err := sn.Usage(ctx, "c1"); err != nil || u.Size == 0 || u.Inodes < 7 {
			t.Error(u, err)
		}
		for name, want := range map[string]string{
			"c1": "dir dir/c=1 file file/now-a-dir=1 keep=0 merged merged/a=0 merged/b=1 other=1",
			"c2": "dir dir/c=1 file file/now-a-dir=1 gone=2 keep=0 merged merged/a=0 merged/b=1",
		} {
			root := view(t, sn, "view-"+name, name)
			if got := tree(t, root); got != want {
				t.Errorf("%s\ngot  %s\nwant %s", name, got, want)
			}
			var st unix.Stat_t
			must(t, unix.Stat(root, &st))
			if st.Mode&0o7777 != 0o750 || st.Uid != 7 || st.Gid != 8 {
				t.Errorf("%s: the root is %o %d:%d", name, st.Mode, st.Uid, st.Gid)
			}
			must(t, unix.Stat(filepath.Join(root, "merged"), &st))
			if st.Mode&0o7777 != 0o711 {
				t.Errorf("%s: merged has mode %o", name, st.Mode)
			}
			if n, err := unix.Getxattr(filepath.Join(root, "dir"), "trusted.overlay.opaque", nil); err == nil {
				t.Errorf("an attribute of overlayfs's own shows: %d", n)
			}
		}
		if err := sn.Remove(ctx, "c1"); !errdefs.IsFailedPrecondition(err) {
			t.Error(err)
		}
	})
}

func TestRebaseRefuses(t *testing.T) {
	forEachDriver(t, func(t *testing.T, sn *Snapshotter) {
		ctx := testContext()
		root := prepare(t, sn, "l0", "")
		write(t, root, "a", "0")
		write(t, root, "b", "0")
		must(t, sn.Commit(ctx, "c0", "l0"))
		prepare(t, sn, "x", "")
		must(t, sn.Commit(ctx, "cx", "x"))
		prepare(t, sn, "with-parent", "c0")
		l1 := prepare(t, sn, "l1", "")
		whiteout(t, l1, "a")
		if err := sn.Commit(ctx, "c1", "with-parent", snapshots.WithParent("cx")); !errdefs.IsInvalidArgument(err) {
			t.Error(err)
		}
		if err := sn.Commit(ctx, "c1", "l1", snapshots.WithParent("none")); !errdefs.IsNotFound(err) {
			t.Error(err)
		}
		if err := sn.Commit(ctx, "c1", "l1", snapshots.WithParent("with-parent")); !errdefs.IsInvalidArgument(err) {
			t.Error(err)
		}
		if err := sn.Commit(ctx, "c0", "l1", snapshots.WithParent("cx")); !errdefs.IsAlreadyExists(err) {
			t.Error(err)
		}
		// The last step fails; the layer can be committed all the same later.
		for range 2 {
			if err := sn.Commit(leases.WithLease(ctx, "none"), "c1", "l1", snapshots.WithParent("c0")); !errdefs.IsNotFound(err) {
				t.Error(err)
			}
		}
		must(t, sn.Commit(ctx, "c1", "l1", snapshots.WithParent("c0")))
		if got := tree(t, view(t, sn, "v", "c1")); got != "b=0" {
			t.Error(got)
		}
		must(t, sn.Commit(ctx, "c2", "with-parent", snapshots.WithParent("c0")))
	})
}

// TestKnownTarget: whoever says what a snapshot will become hears that it is there already.
func TestKnownTarget(t *testing.T) {
	forEachDriver(t, func(t *testing.T, sn *Snapshotter) {
		ctx := testContext()
		target := snapshots.WithLabels(map[string]string{"containerd.io/snapshot.ref": "layer"})
		_, err := sn.Prepare(ctx, "a", "", target)
		must(t, err)
		must(t, sn.Commit(ctx, "layer", "a"))
		lm := sn.store.Leases()
		l, err := lm.Create(ctx, leases.WithRandomID())
		must(t, err)
		if _, err := sn.Prepare(leases.WithLease(ctx, l.ID), "b", "", target); !errdefs.IsAlreadyExists(err) {
			t.Errorf("a layer that is there is prepared again: %v", err)
		}
		if held, err := lm.ListResources(ctx, l); err != nil || len(held) != 1 || held[0].ID != "layer" {
			t.Errorf("the lease holds %v, %v", held, err)
		}
		if _, err := sn.Stat(ctx, "b"); !errdefs.IsNotFound(err) {
			t.Errorf("it left something: %v", err)
		}
	})
}

func TestErrors(t *testing.T) {
	forEachDriver(t, func(t *testing.T, sn *Snapshotter) {
		ctx := testContext()
		prepare(t, sn, "a", "")
		_, taken := sn.Prepare(ctx, "a", "")
		_, noParent := sn.Prepare(ctx, "b", "none")
		_, active := sn.View(ctx, "b", "a")
		_, noKey := sn.Prepare(ctx, "", "")
		_, noNamespace := sn.Prepare(context.Background(), "b", "")
		_, noLease := sn.Prepare(leases.WithLease(ctx, "none"), "b", "")
		_, statErr := sn.Stat(ctx, "b")
		_, mountErr := sn.Mounts(ctx, "b")
		_, badUsage := sn.Prepare(ctx, "b", "", snapshots.WithLabels(map[string]string{labelUsage: "x"}))
		_, idmap := sn.Prepare(ctx, "b", "", snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotUIDMapping: "0:1000:1"}))
		for name, c := range map[string]struct {
			err error
			is  func(error) bool
		}{
			"taken": {taken, errdefs.IsAlreadyExists}, "no parent": {noParent, errdefs.IsNotFound}, "active parent": {active, errdefs.IsInvalidArgument},
			"no key": {noKey, errdefs.IsInvalidArgument}, "no namespace": {noNamespace, errdefs.IsFailedPrecondition}, "no lease": {noLease, errdefs.IsNotFound},
			"stat": {statErr, errdefs.IsNotFound}, "mounts": {mountErr, errdefs.IsNotFound}, "remove": {sn.Remove(ctx, "b"), errdefs.IsNotFound},
			"commit": {sn.Commit(ctx, "c", "b"), errdefs.IsNotFound}, "usage": {badUsage, errdefs.IsInvalidArgument},
			"id map": {idmap, errdefs.IsInvalidArgument},
		} {
			if !c.is(c.err) {
				t.Errorf("%s: %v", name, c.err)
			}
		}
		must(t, sn.Commit(ctx, "c", "a"))
		if _, err := sn.Mounts(ctx, "c"); !errdefs.IsFailedPrecondition(err) {
			t.Error(err)
		}
		if err := sn.Commit(ctx, "d", "c"); !errdefs.IsFailedPrecondition(err) {
			t.Error(err)
		}
		must(t, sn.Cleanup(ctx))
		if left, err := os.ReadDir(sn.dir()); err != nil || len(left) != 1 {
			t.Errorf("left %v, %v", left, err)
		}
		if _, err := sn.Stat(namespaces.WithNamespace(ctx, "other"), "c"); !errdefs.IsNotFound(err) {
			t.Error("another namespace sees it:", err)
		}
	})
}

func TestCollected(t *testing.T) {
	forEachDriver(t, func(t *testing.T, sn *Snapshotter) {
		ctx := testContext()
		s := sn.store
		layer := func(name, parent string, opts ...snapshots.Opt) {
			write(t, prepare(t, sn, "tmp-"+name, parent), name, "some bytes")
			must(t, sn.Commit(ctx, name, "tmp-"+name, opts...))
		}
		layer("base", "")
		layer("used", "base")
		layer("rooted", "base", snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "x"}))
		layer("dead1", "base")
		layer("dead2", "dead1")
		l, err := s.Leases().Create(ctx, leases.WithID("l"))
		must(t, err)
		_, err = sn.Prepare(leases.WithLease(ctx, "l"), "leased", "used")
		must(t, err)
		_, err = sn.Prepare(leases.WithLease(ctx, "l"), "container", "used")
		must(t, err)
		_, err = sn.Prepare(ctx, "held", "used")
		must(t, err)
		s.AddSource(source{store.SnapshotNode(sn.Name(), "test", "container")})

		st, err := s.GC(ctx)
		must(t, err)
		if st.Snapshots != 2 || st.Bytes == 0 {
			t.Errorf("%+v", st)
		}
		have := func() (names []string) {
			must(t, sn.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
				names = append(names, i.Name)
				return nil
			}))
			return names
		}
		if got := fmt.Sprint(have()); got != "[base container held leased rooted used]" {
			t.Error(got)
		}
		if left, err := os.ReadDir(sn.dir()); err != nil || len(left) != 6 {
			t.Errorf("left %v, %v", left, err)
		}
		must(t, s.Leases().Delete(ctx, l, leases.SynchronousDelete))
		if got := fmt.Sprint(have()); got != "[base container held rooted used]" {
			t.Error(got)
		}
	})
}

type source []store.Node

func (s source) Roots(_ context.Context, add func(store.Node)) error {
	for _, n := range s {
		add(n)
	}
	return nil
}

// A crash leaves directories without records; a power cut may take those of active
// snapshots, which are never synced.
func TestRestore(t *testing.T) {
	needsRoot(t)
	for name, open := range drivers {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			t.Cleanup(func() { must(t, unmountAll(dir+"/sn")) })
			ctx := testContext()
			s := openStore(t, dir+"/store")
			sn, err := open(dir+"/sn", s)
			must(t, err)
			write(t, prepare(t, sn, "a", ""), "file", "x")
			must(t, sn.Commit(ctx, "c", "a"))
			_, err = sn.Prepare(ctx, "lost", "c")
			must(t, err)
			must(t, sn.Close())
			must(t, s.Close())
			must(t, os.RemoveAll(filepath.Join(dir, "sn/snapshots/2")))
			must(t, os.MkdirAll(filepath.Join(dir, "sn/snapshots/17/fs/deep"), 0o700))
			must(t, os.MkdirAll(filepath.Join(dir, "sn/snapshots/lost+found"), 0o700))

			s = openStore(t, dir+"/store")
			defer s.Close()
			sn, err = open(dir+"/sn", s)
			must(t, err)
			defer sn.Close()
			must(t, sn.Cleanup(ctx))
			if there, err := exists(filepath.Join(dir, "sn/snapshots/17")); err != nil || there {
				t.Error("an orphan is left", err)
			}
			if there, err := exists(filepath.Join(dir, "sn/snapshots/lost+found")); err != nil || !there {
				t.Error("removed what is not a snapshot's", err)
			}
			m, err := sn.Mounts(ctx, "lost")
			must(t, err)
			if got := tree(t, detached(t, m)); got != "file=x" {
				t.Error(got)
			}
			// No id is used twice.
			prepare(t, sn, "next", "c")
			if there, err := exists(filepath.Join(dir, "sn/snapshots/18")); err != nil || !there {
				t.Error("the next id is not 18", err)
			}
		})
	}
}

// 300 layers are far beyond what mount(2) can be told.
func TestMountManyLayers(t *testing.T) {
	needsRoot(t)
	sn := openTest(t, NewOverlay)
	ctx := testContext()
	parent := ""
	const n = 300
	for i := range n {
		key, name := fmt.Sprint("a", i), fmt.Sprint("c", i)
		_, err := sn.Prepare(ctx, key, parent)
		must(t, err)
		own, _, err := sn.layers(ctx, key)
		must(t, err)
		write(t, own.fs(), fmt.Sprint("f", i), "x")
		must(t, sn.Commit(ctx, name, key, WithSynced(), WithUsage(snapshots.Usage{})))
		parent = name
	}
	root := prepare(t, sn, "top", parent)
	names, err := os.ReadDir(root + "/")
	if err != nil || len(names) != n {
		t.Errorf("%d names, %v", len(names), err)
	}
	table, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	if strings.Contains(string(table), sn.root) {
		t.Error("a detached mount shows in the mount table")
	}
}

func TestOverlaySupported(t *testing.T) {
	needsRoot(t)
	dir := t.TempDir()
	must(t, OverlaySupported(dir))
	// procfs takes no directories at all.
	if err := OverlaySupported("/proc"); err == nil {
		t.Error("overlayfs on procfs")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left %v, %v", left, err)
	}
	for _, bad := range []string{"a:b", "a,b", `a\b`, strings.Repeat("long/", 50)} {
		if _, err := NewOverlay(filepath.Join(dir, bad), nil); !errdefs.IsInvalidArgument(err) {
			t.Error(err)
		}
	}
}

// A damaged record takes nothing else with it.
func TestDamagedRecord(t *testing.T) {
	forEachDriver(t, func(t *testing.T, sn *Snapshotter) {
		ctx := testContext()
		prepare(t, sn, "a", "")
		must(t, sn.Commit(ctx, "parent", "a"))
		prepare(t, sn, "b", "parent")
		must(t, sn.Commit(ctx, "child", "b"))
		prepare(t, sn, "c", "")
		must(t, sn.Commit(ctx, "alone", "c"))
		must(t, sn.store.DB().Update(ctx, func(tx *bolt.Tx) error {
			return sn.section(tx, "test").keys.Put([]byte("child"), []byte("{"))
		}))
		if _, err := sn.Stat(ctx, "child"); !errdefs.IsDataLoss(err) {
			t.Error(err)
		}
		var names []string
		must(t, sn.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
			names = append(names, i.Name)
			return nil
		}))
		if fmt.Sprint(names) != "[alone parent]" {
			t.Error(names)
		}
		st, err := sn.store.GC(ctx)
		must(t, err)
		dirs, err := os.ReadDir(sn.dir())
		must(t, err)
		if st.Snapshots != 0 || len(dirs) != 3 {
			t.Errorf("%+v, %v", st, dirs)
		}
		if err := sn.Remove(ctx, "parent"); !errdefs.IsFailedPrecondition(err) {
			t.Error(err)
		}
	})
}

func TestMountDetachedRefuses(t *testing.T) {
	for _, m := range [][]mount.Mount{
		nil,
		{{Type: "bind"}, {Type: "bind"}},
		{{Type: "ext4", Source: "/dev/sda"}},
		{{Type: "bind", Source: "/", Target: "sub"}},
		{{Type: "bind", Source: "/", Options: []string{"shared"}}},
		{{Type: "overlay", Options: []string{"index=off"}}},
		{{Type: "overlay", Options: []string{"lowerdir=/a", "upperdir=/b"}}},
		{{Type: "overlay", Options: []string{"lowerdir=/a::/b"}}},
		{{Type: "overlay", Options: []string{"lowerdir=/a", "context=x"}}},
	} {
		if f, err := MountDetached(m); err == nil || !errdefs.IsNotImplemented(err) && !errdefs.IsInvalidArgument(err) {
			f.Close()
			t.Errorf("%v: %v", m, err)
		}
	}
}

func TestDetachedMountIsProtected(t *testing.T) {
	needsRoot(t)
	sn := openTest(t, NewOverlay)
	ctx := testContext()
	root := prepare(t, sn, "a", "")
	must(t, unix.Mknod(filepath.Join(root, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	if f, err := os.Open(filepath.Join(root, "null")); err == nil {
		f.Close()
		t.Error("opened a device")
	}
	must(t, sn.Commit(ctx, "c", "a"))
	ro := view(t, sn, "v", "c")
	if err := os.WriteFile(filepath.Join(ro, "x"), nil, 0o600); err == nil {
		t.Error("wrote into a view")
	}
	f, err := MountDetached([]mount.Mount{{Type: "bind", Source: filepath.Join(t.TempDir(), "none")}})
	if err == nil {
		f.Close()
		t.Error("mounted what is not there")
	}
}

// Everything that a file can be is as it was in a copy.
func TestNativeCopyIsFaithful(t *testing.T) {
	needsRoot(t)
	sn := openTest(t, NewNative)
	ctx := testContext()
	root := prepare(t, sn, "a", "")
	write(t, root, "d/file", "text")
	must(t, os.Link(filepath.Join(root, "d/file"), filepath.Join(root, "hard")))
	must(t, os.Symlink("/etc/shadow", filepath.Join(root, "link")))
	must(t, unix.Mkfifo(filepath.Join(root, "fifo"), 0o640))
	must(t, unix.Mknod(filepath.Join(root, "dev"), unix.S_IFBLK|0o600, int(unix.Mkdev(7, 200))))
	must(t, unix.Mknod(filepath.Join(root, "sock"), unix.S_IFSOCK|0o600, 0))
	must(t, unix.Mknod(filepath.Join(root, "white"), unix.S_IFCHR, 0))
	f, err := os.Create(filepath.Join(root, "sparse"))
	must(t, err)
	must(t, f.Truncate(64<<20))
	_, err = f.WriteAt([]byte("middle"), 32<<20)
	must(t, err)
	must(t, f.Close())
	file := filepath.Join(root, "d/file")
	must(t, os.Chown(file, 11, 12))
	must(t, unix.Chmod(file, 0o6755))
	must(t, unix.Setxattr(file, "user.x", []byte("value"), 0))
	must(t, unix.Setxattr(file, "trusted.y", []byte{0, 1}, 0))
	must(t, unix.Setxattr(file, "security.capability", []byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0))
	must(t, os.Lchown(filepath.Join(root, "link"), 13, 14))
	must(t, unix.Lsetxattr(filepath.Join(root, "link"), "trusted.z", []byte("link"), 0))
	must(t, os.Chmod(filepath.Join(root, "d"), 0o1711))
	when := []unix.Timespec{{Sec: 1000, Nsec: 5}, {Sec: 2000, Nsec: 7}}
	for _, n := range []string{"d/file", "link", "fifo", "sparse", "d"} {
		must(t, unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(root, n), when, unix.AT_SYMLINK_NOFOLLOW))
	}
	must(t, sn.Commit(ctx, "c", "a"))
	copied := prepare(t, sn, "b", "c")
	original := view(t, sn, "v", "c")
	for _, n := range []string{"", "d", "d/file", "hard", "link", "fifo", "dev", "sock", "white", "sparse"} {
		var a, b unix.Stat_t
		must(t, unix.Fstatat(unix.AT_FDCWD, filepath.Join(original, n), &a, unix.AT_SYMLINK_NOFOLLOW))
		must(t, unix.Fstatat(unix.AT_FDCWD, filepath.Join(copied, n), &b, unix.AT_SYMLINK_NOFOLLOW))
		if n == "" {
			must(t, unix.Stat(original, &a))
			must(t, unix.Stat(copied, &b))
		}
		if a.Mode != b.Mode || a.Uid != b.Uid || a.Gid != b.Gid || a.Rdev != b.Rdev || a.Mtim != b.Mtim || a.Nlink != b.Nlink || n != "" && n != "d" && a.Size != b.Size || a.Ino == b.Ino {
			t.Errorf("%q\nwas %+v\nis  %+v", n, a, b)
		}
		if n == "sparse" && b.Blocks*512 > 1<<20 {
			t.Errorf("the holes were filled: %d blocks", b.Blocks)
		}
		for _, x := range []string{"user.x", "trusted.y", "trusted.z", "security.capability"} {
			var va, vb [64]byte
			na, ea := unix.Lgetxattr(filepath.Join(original, n), x, va[:])
			nb, eb := unix.Lgetxattr(filepath.Join(copied, n), x, vb[:])
			if n != "" && ((ea == nil) != (eb == nil) || ea == nil && string(va[:na]) != string(vb[:nb])) {
				t.Errorf("%q: %s was %q, %v, is %q, %v", n, x, va[:max(na, 0)], ea, vb[:max(nb, 0)], eb)
			}
		}
	}
	var a, b unix.Stat_t
	must(t, unix.Stat(filepath.Join(copied, "hard"), &a))
	must(t, unix.Stat(filepath.Join(copied, "d/file"), &b))
	if a.Ino != b.Ino {
		t.Error("hard links came apart")
	}
}

func TestUsage(t *testing.T) {
	needsRoot(t)
	sn := openTest(t, NewOverlay)
	ctx := testContext()
	root := prepare(t, sn, "a", "")
	write(t, root, "f", strings.Repeat("x", 100_000))
	must(t, os.Link(filepath.Join(root, "f"), filepath.Join(root, "g")))
	outside := t.TempDir()
	write(t, outside, "large", strings.Repeat("x", 1<<20))
	must(t, os.Symlink(outside, filepath.Join(root, "link")))
	u, err := sn.Usage(ctx, "a")
	must(t, err)
	if u.Inodes != 3 || u.Size < 100_000 || u.Size > 150_000 {
		t.Error(u)
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := sn.Usage(cancelled, "a"); err == nil {
		t.Error("measured for nobody")
	}
	must(t, sn.Commit(ctx, "c", "a"))
	if c, err := sn.Usage(ctx, "c"); err != nil || c != u {
		t.Error(c, err)
	}
	// Deeper than any path can name: an error, not a stack or a table of files used up.
	_, err = sn.Prepare(ctx, "deep", "")
	must(t, err)
	own, _, err := sn.layers(ctx, "deep")
	must(t, err)
	dir, err := os.Open(own.fs())
	must(t, err)
	for range maxTreeDepth + 10 {
		must(t, unix.Mkdirat(int(dir.Fd()), "directory", 0o700))
		next, err := openAt(dir, "directory", unix.O_RDONLY|unix.O_DIRECTORY, 0)
		must(t, err)
		dir.Close()
		dir = next
	}
	dir.Close()
	if _, err := sn.Usage(ctx, "deep"); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	must(t, sn.Remove(ctx, "deep"))
	must(t, sn.Cleanup(ctx))
	if there, err := exists(string(own)); err != nil || there {
		t.Error("a deep tree is left", err)
	}
}

// Removing is quick, however large the snapshot is; its files go in the background.
func TestRemoveIsQuick(t *testing.T) {
	needsRoot(t)
	sn := openTest(t, NewOverlay)
	ctx := testContext()
	prepare(t, sn, "a", "")
	own, _, err := sn.layers(ctx, "a")
	must(t, err)
	for i := range 3000 {
		write(t, own.fs(), fmt.Sprintf("%d/%d", i%30, i), "")
	}
	must(t, sn.Remove(ctx, "a"))
	prepare(t, sn, "a", "") // the key is free at once
	deadline := time.Now().Add(5 * time.Minute)
	for {
		there, err := exists(string(own))
		must(t, err)
		if !there {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the directory is still there")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"id":1,"kind":"Active","parent":"x","labels":{"a":"b"},"created":"2026-01-01T00:00:00Z"}`))
	f.Add([]byte(`{"id":0,"kind":"view"}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		r, err := parseRecord(raw)
		if err == nil && (r.kind() == snapshots.KindUnknown || r.ID == 0 && r.Parent == "") {
			t.Errorf("accepted %+v", r)
		}
		adapt(r.info("x")).Field([]string{"labels", "a"})
	})
}

func FuzzOverlayOptions(f *testing.F) {
	f.Add("lowerdir=/a:/b\nupperdir=/u\nworkdir=/w\nindex=off")
	f.Fuzz(func(t *testing.T, options string) {
		o, err := parseOverlay(strings.Split(options, "\n"))
		if err == nil && (len(o.lower) == 0 || (o.upper == "") != (o.work == "")) {
			t.Errorf("accepted %+v", o)
		}
	})
}

// TestCommitAgain: after a commit that failed at its end a client goes on with the layer, and what it wrote then is committed the
// next time.
func TestCommitAgain(t *testing.T) {
	forEachDriver(t, func(t *testing.T, sn *Snapshotter) {
		ctx := testContext()
		base := prepare(t, sn, "l0", "")
		write(t, base, "base", "0")
		must(t, sn.Commit(ctx, "c0", "l0"))
		for key, opts := range map[string][]snapshots.Opt{"rebased": {snapshots.WithParent("c0")}, "alone": nil, "upon": nil} {
			parent := ""
			if key == "upon" {
				parent = "c0"
			}
			write(t, prepare(t, sn, key, parent), "a", "old")
			if err := sn.Commit(leases.WithLease(ctx, "none"), "c-"+key, key, opts...); !errdefs.IsNotFound(err) {
				t.Fatal(err)
			}
			m, err := sn.Mounts(ctx, key)
			must(t, err)
			root := detached(t, m)
			write(t, root, "a", "new")
			write(t, root, "b", "new")
			must(t, sn.Commit(ctx, "c-"+key, key, opts...))
			want := "a=new b=new"
			if key != "alone" {
				want += " base=0"
			}
			if got := tree(t, view(t, sn, "v-"+key, "c-"+key)); got != want {
				t.Errorf("%s: %s, want %s", key, got, want)
			}
		}
	})
}

// TestCommitBesideCommit: of two who commit one snapshot side by side, one does, and the layer is whole.
func TestCommitBesideCommit(t *testing.T) {
	forEachDriver(t, func(t *testing.T, sn *Snapshotter) {
		ctx := testContext()
		write(t, prepare(t, sn, "l0", ""), "base", "0")
		must(t, sn.Commit(ctx, "c0", "l0"))
		for i := range 5 {
			key := fmt.Sprint("key", i)
			root := prepare(t, sn, key, "")
			for f := range 20 {
				write(t, root, fmt.Sprintf("f%02d", f), "text")
			}
			var errs [2]error
			var wg sync.WaitGroup
			for j := range errs {
				wg.Go(func() {
					errs[j] = sn.Commit(ctx, fmt.Sprintf("c%d-%d", i+1, j), key, snapshots.WithParent("c0"))
				})
			}
			wg.Wait()
			for j, err := range errs {
				switch {
				case err == nil && errdefs.IsNotFound(errs[1-j]):
					if got := tree(t, view(t, sn, "v-"+key, fmt.Sprintf("c%d-%d", i+1, j))); strings.Count(got, "=text") != 20 || !strings.HasPrefix(got, "base=0 ") {
						t.Errorf("%s", got)
					}
				case !errdefs.IsNotFound(err) || errs[1-j] != nil:
					t.Fatalf("%v", errs)
				}
			}
		}
	})
}
