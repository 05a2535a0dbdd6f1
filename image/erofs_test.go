package image

import (
	"archive/tar"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/hako-engine/hako/snapshot"
)

// withErofs adds the EROFS snapshotter to a rig.
func withErofs(t testing.TB, root string) func(*rig) {
	return func(r *rig) {
		t.Helper()
		if err := snapshot.ErofsSupported(root); err != nil {
			t.Skipf("needs a kernel with EROFS: %s (%v)", t.Name(), err)
		}
		sn, err := snapshot.NewErofs(filepath.Join(root, "erofs"), filepath.Join(root, "mounts"), r.store, snapshot.ErofsOptions{MergeFrom: 2})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := sn.Close(); err != nil {
				t.Error(err)
			}
		})
		r.o.Snapshotters["erofs"] = sn
	}
}

// treeOf describes what a container would see of an image.
func (r *rig) treeOf(t *testing.T, sn snapshots.Snapshotter, img Image) []string {
	t.Helper()
	key := "tree-" + t.Name()
	mounts, err := sn.View(r.ctx, key, img.ChainID.String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := sn.Remove(r.ctx, key); err != nil {
			t.Error(err)
		}
	}()
	f, err := snapshot.MountDetached(mounts)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	root := fmt.Sprintf("/proc/self/fd/%d/", f.Fd())
	var out []string
	inodes := map[uint64]string{}
	err = filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); errors.Is(err, fs.ErrNotExist) {
			return nil // overlayfs lists a deletion of nothing, and has no such file
		} else if err != nil {
			return &fs.PathError{Op: "lstat", Path: p, Err: err}
		}
		name := strings.TrimPrefix(p, root)
		line := fmt.Sprintf("%s %o %d:%d %d", name, st.Mode, st.Uid, st.Gid, st.Rdev)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %d %d %x", st.Size, st.Mtim.Nano(), sha256.Sum256(b))
			if st.Nlink > 1 {
				if first, ok := inodes[st.Ino]; ok {
					line += " = " + first
				} else {
					inodes[st.Ino] = name
				}
			}
		case unix.S_IFLNK:
			l, err := os.Readlink(p)
			if err != nil {
				return err
			}
			line += " -> " + l
		}
		var x [4096]byte
		if n, err := unix.Llistxattr(p, x[:]); err == nil && n > 0 {
			attrs := strings.Split(strings.Trim(string(x[:n]), "\x00"), "\x00")
			attrs = slices.DeleteFunc(attrs, func(a string) bool { return strings.HasPrefix(a, "trusted.overlay.") }) // of plain copies
			slices.Sort(attrs)
			line += fmt.Sprintf(" %q", attrs)
		}
		out = append(out, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// randomLayer makes a layer of n changes, in names that other layers use too.
func randomLayer(t *testing.T, r *rand.Rand, n int) []byte {
	name := func() string {
		parts := make([]string, 1+r.Intn(3))
		for i := range parts {
			parts[i] = string(rune('a' + r.Intn(4)))
		}
		return strings.Join(parts, "/")
	}
	stamp := func(e entry) entry {
		e.Mode = int64(r.Intn(0o7777) | 0o400)
		e.Uid, e.Gid = r.Intn(3), r.Intn(3)
		e.ModTime = time.Unix(1_700_000_000+int64(r.Intn(1000)), 0)
		return e
	}
	var list []entry
	var made []string
	used := map[string]bool{}
	for tries := 0; len(list) < n && tries < 300; tries++ {
		// What two entries of one layer make of each other is tested elsewhere; here no name is
		// both a directory and something else.
		p := name()
		if used[p] {
			continue
		}
		clash := false
		for dir := filepath.Dir(p); dir != "."; dir = filepath.Dir(dir) {
			clash = clash || used[dir] && !used[dir+"/"]
		}
		for u := range used {
			clash = clash || strings.HasPrefix(u, p+"/")
		}
		if clash {
			continue
		}
		used[p] = true
		for i, c := range p {
			if up := p[:i]; c == '/' && !used[up] {
				// A lower layer may have a file there.
				list = append(list, stamp(dir(up, 0o755)))
				used[up], used[up+"/"] = true, true
			}
		}
		switch k := r.Intn(12); {
		case k < 4:
			list = append(list, stamp(file(p, strings.Repeat(p, r.Intn(3000)))))
			made = append(made, p)
		case k < 7:
			list = append(list, stamp(dir(p, 0o755)))
			used[p+"/"] = true
		case k == 7:
			list = append(list, stamp(link(tar.TypeSymlink, p, name())))
		case k == 8 && len(made) > 0:
			list = append(list, stamp(link(tar.TypeLink, p, made[r.Intn(len(made))])))
		case k == 9:
			list = append(list, file(filepath.Join(filepath.Dir(p), ".wh."+filepath.Base(p)), ""))
		case k == 10 && filepath.Dir(p) != ".":
			list = append(list, file(filepath.Dir(p)+"/.wh..wh.opq", ""))
		case k == 11:
			// A link into a layer below, if it has the file; else the layer is refused by all.
			list = append(list, stamp(link(tar.TypeLink, p, "base/file")))
		}
	}
	return tarOf(t, list...)
}

// TestErofsIsLikeOverlayfs unpacks images with all snapshotters and compares what containers
// would see of them; with EROFS as a stack of layers, and as one file system.
func TestErofsIsLikeOverlayfs(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	r := newRigAt(t, root)
	withErofs(t, root)(r)
	s := newServer(t)
	base := tarOf(t, dir("base", 0o755), file("base/file", "linked"))
	images := map[string]*built{
		"three": threeLayers(t),
		"links": build(t, nil, base, tarOf(t, link(tar.TypeLink, "other", "base/file"), file("base/.wh.file", ""))),
		"root":  build(t, nil, tarOf(t, dir("./", 0o1777), file("a", "a"), dir("d", 0o2770)), tarOf(t, file("d/b", "b")), tarOf(t, file(".wh..wh.opq", ""), file("c", "c"))),
		"usr":   build(t, nil, tarOf(t, dir("usr", 0o755), dir("usr/lib", 0o711), link(tar.TypeSymlink, "lib", "usr/lib")), tarOf(t, file("lib/x", "x")), tarOf(t, file("lib/y/z", "z"))),
	}
	for i := range 12 {
		random := rand.New(rand.NewSource(int64(i)))
		layers := [][]byte{base}
		for range 2 + i%4 {
			layers = append(layers, randomLayer(t, random, 12))
		}
		images[fmt.Sprint("random", i)] = build(t, nil, layers...)
	}
	for name, b := range images {
		ref := s.push(t, name, "latest", b)
		img, err := r.Pull(r.ctx, ref, PullOptions{Snapshotter: "erofs"})
		if err != nil {
			if _, other := r.Pull(r.ctx, ref, PullOptions{Snapshotter: "overlayfs"}); other == nil {
				t.Errorf("%s: %v", name, err)
			}
			t.Logf("%s: no snapshotter takes it: %v", name, err)
			continue
		}
		want := map[string][]string{}
		for _, sn := range []string{"overlayfs", "native", "erofs"} {
			if _, err := r.Unpack(r.ctx, img, sn); err != nil {
				t.Fatalf("%s on %s: %v", name, sn, err)
			}
			want[sn] = r.treeOf(t, r.o.Snapshotters[sn], img)
		}
		sn := r.o.Snapshotters["erofs"].(*snapshot.Snapshotter)
		if err := sn.Merge(r.ctx, img.ChainID.String()); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		want["merged"] = r.treeOf(t, sn, img)
		for _, sn := range []string{"erofs", "merged", "native"} {
			if sn == "native" {
				// Overlayfs copies a file of a lower layer that gets another name.
				for _, at := range []string{"overlayfs", sn} {
					for i, line := range want[at] {
						want[at][i], _, _ = strings.Cut(line, " = ")
					}
				}
			}
			if a, b := strings.Join(want["overlayfs"], "\n"), strings.Join(want[sn], "\n"); a != b {
				t.Errorf("%s: overlayfs has\n%s\n%s has\n%s", name, a, sn, b)
			}
		}
	}
}
