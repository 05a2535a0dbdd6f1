package snapshot

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/hako-engine/hako/internal/erofs"
	"github.com/hako-engine/hako/store"
)

// stackOf commits n layers upon each other and gives the name of the topmost.
func stackOf(t testing.TB, sn *Snapshotter, n int, fill func(i int, dir string)) (top string) {
	t.Helper()
	for i := range n {
		key := fmt.Sprint("filling", i)
		_, err := sn.Prepare(testContext(), key, "")
		must(t, err)
		own, _, err := sn.layers(testContext(), key)
		must(t, err)
		fill(i, own.fs())
		name := fmt.Sprint("layer", i)
		must(t, sn.Commit(testContext(), name, key, parentOf(top)...))
		top = name
	}
	return top
}

// lowers gives the lower directories of an overlay.
func lowers(t testing.TB, ms []mount.Mount) []string {
	t.Helper()
	o, err := parseOverlay(ms[0].Options)
	must(t, err)
	return o.lower
}

// TestMerged: layers are merged for those who come later, once; the merged image is a cache that is made
// again when it is damaged or of other layers, and goes with its layer.
func TestMerged(t *testing.T) {
	needsRoot(t)
	sn := openTest(t, erofsWith(ErofsOptions{MergeFrom: 3}))
	ctx := testContext()
	top := stackOf(t, sn, 4, func(i int, dir string) {
		write(t, dir, fmt.Sprint("f", i), fmt.Sprint(i))
		write(t, dir, "same", fmt.Sprint(i))
		if i == 2 {
			whiteout(t, dir, "f1")
		}
	})
	const want = "f0=0 f2=2 f3=3 same=3"
	look := func(key string, merged bool) {
		t.Helper()
		ms, err := sn.Prepare(ctx, key, top)
		must(t, err)
		low := lowers(t, ms)
		if one := len(low) == 1 && strings.HasSuffix(low[0], mergedSuffix); one != merged || !merged && len(low) != 4 {
			t.Errorf("%s: lower directories %v, merged %v", key, low, merged)
		}
		if got := tree(t, detached(t, ms)); got != want {
			t.Errorf("%s: %s, want %s", key, got, want)
		}
	}
	if _, err := sn.View(ctx, "view", top); err != nil { // a view asks for nothing
		t.Fatal(err)
	}
	sn.merging.Wait()
	look("first", false)
	sn.merging.Wait() // what it asked for
	look("second", true)
	own, _, err := sn.layers(ctx, top)
	must(t, err)
	if ms, err := sn.Mounts(ctx, "first"); err != nil || len(lowers(t, ms)) != 1 {
		t.Errorf("mounts %v, %v", ms, err)
	}
	// The layers below count as in use, too.
	sn.hideUnused()
	look("third", true)
	for _, key := range []string{"view", "first", "second", "third"} {
		must(t, sn.Remove(ctx, key))
	}
	sn.hideUnused()
	if left, err := os.ReadDir(sn.driver.(*images).state); err != nil || len(left) > 0 {
		t.Errorf("left mounted: %v, %v", left, err)
	}
	// Damage is found before the kernel sees it, and mended.
	for name, damage := range map[string]func(){
		"cut":     func() { must(t, os.Truncate(own.merged(), 8192)) },
		"flipped": func() { flip(t, own.merged(), 2*erofs.BlockSize+64) },
		"missing": func() { must(t, os.Remove(own.merged())) },
		"other": func() {
			other := erofsOf(t, sn, "layer2")
			must(t, os.Link(other.merged(), own.merged()+"x"))
			must(t, os.Rename(own.merged()+"x", own.merged()))
		},
	} {
		damage()
		found, err := sn.Check(ctx, store.CheckOptions{Deep: true})
		must(t, err)
		if name != "missing" && (len(found) != 1 || found[0].Problem != ProblemMerged) {
			t.Errorf("%s: check found %+v", name, found)
		}
		for _, f := range found {
			_, err := sn.Repair(ctx, f, nil)
			must(t, err)
		}
		look(name+"-before", false)
		must(t, sn.Merge(ctx, top))
		look(name+"-after", true)
		if found, err := sn.Check(ctx, store.CheckOptions{Deep: true}); err != nil || len(found) > 0 {
			t.Errorf("%s: %+v, %v", name, found, err)
		}
		for _, key := range []string{name + "-before", name + "-after"} {
			must(t, sn.Remove(ctx, key))
		}
		sn.hideUnused()
	}
	must(t, sn.Remove(ctx, top))
	must(t, sn.Cleanup(ctx))
	if there, err := exists(string(own)); there || err != nil {
		t.Errorf("the layer's directory is there: %v, %v", there, err)
	}
	if err := sn.driver.merge(ctx, []layer{own, own, own}); err == nil {
		t.Error("layers that are gone were merged")
	}
}

// erofsOf merges a layer and those below it, and gives the layer.
func erofsOf(t testing.TB, sn *Snapshotter, key string) layer {
	t.Helper()
	must(t, sn.Merge(testContext(), key))
	own, _, err := sn.layers(testContext(), key)
	must(t, err)
	return own
}

func flip(t testing.TB, name string, at int64) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	var b [1]byte
	_, err = f.ReadAt(b[:], at)
	must(t, err)
	b[0] ^= 1
	_, err = f.WriteAt(b[:], at)
	must(t, err)
}

// A container goes on to read what lies below it when the merged image, its layers and the mounts of it are gone.
func TestMergedOutlivesItsLayers(t *testing.T) {
	needsRoot(t)
	sn := openTest(t, erofsWith(ErofsOptions{MergeFrom: 2}))
	ctx := testContext()
	big := strings.Repeat("x", 3<<20)
	top := stackOf(t, sn, 3, func(i int, dir string) { write(t, dir, fmt.Sprint("f", i), big) })
	must(t, sn.Merge(ctx, top))
	ms, err := sn.View(ctx, "view", top)
	must(t, err)
	root := detached(t, ms)
	must(t, sn.Remove(ctx, "view"))
	for i := 2; i >= 0; i-- {
		must(t, sn.Remove(ctx, fmt.Sprint("layer", i)))
	}
	must(t, sn.Cleanup(ctx))
	sn.hideUnused()
	for i := range 3 {
		b, err := os.ReadFile(filepath.Join(root, fmt.Sprint("f", i)))
		if err != nil || string(b) != big {
			t.Errorf("file %d: %d bytes, %v", i, len(b), err)
		}
	}
}

// Many ask at once, while layers go: nothing is left, and whoever was served can read.
func TestMergedBesideAllElse(t *testing.T) {
	needsRoot(t)
	sn := openTest(t, erofsWith(ErofsOptions{MergeFrom: 2}))
	top := stackOf(t, sn, 3, func(i int, dir string) { write(t, dir, fmt.Sprint("f", i), "x") })
	ctx := testContext()
	done := make(chan error)
	for w := range 4 {
		go func() {
			var err error
			for i := 0; i < 20 && err == nil; i++ {
				key := fmt.Sprintf("c-%d-%d", w, i)
				err = useOnce(ctx, sn, key, top)
				if w == 0 {
					sn.hideUnused()
				}
			}
			done <- err
		}()
	}
	for range 4 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func useOnce(ctx context.Context, sn *Snapshotter, key, top string) error {
	ms, err := sn.Prepare(ctx, key, top)
	if err != nil {
		return err
	}
	f, err := MountDetached(ms)
	if err != nil {
		return err
	}
	defer f.Close()
	names, err := os.ReadDir(fmt.Sprintf("/proc/self/fd/%d/", f.Fd()))
	if err != nil || len(names) != 3 {
		return fmt.Errorf("%d names: %w", len(names), err)
	}
	return sn.Remove(ctx, key)
}

func parentOf(parent string) []snapshots.Opt {
	if parent == "" {
		return nil
	}
	return []snapshots.Opt{snapshots.WithParent(parent)}
}
