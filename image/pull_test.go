package image

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

func TestPull(t *testing.T) {
	t.Parallel()
	r, s := newRig(t), newServer(t)
	b := threeLayers(t)
	ref := s.push(t, "some/app", "v1", b)
	var mu sync.Mutex
	var actions []string
	img, err := r.Pull(r.ctx, ref, PullOptions{Progress: func(p Progress) {
		mu.Lock()
		defer mu.Unlock()
		actions = append(actions, p.Action+p.Message)
	}})
	if err != nil {
		t.Fatal(err)
	}
	if img.ID != digest.FromBytes(b.config) || img.Target.Digest != digest.FromBytes(b.manifest) || len(img.Layers) != 3 {
		t.Errorf("image is %+v", img)
	}
	if !slices.Equal(img.Names, []string{ref}) || !slices.Equal(img.Digests, []string{strings.TrimSuffix(ref, ":v1") + "@" + img.Target.Digest.String()}) {
		t.Errorf("names %q, digests %q", img.Names, img.Digests)
	}
	if want := int64(len("root:x:0:0::/:/\n") + len("old") + len("keep") + len("x") + len("new") + len("last")); img.Size != want {
		t.Errorf("size is %d, want %d", img.Size, want)
	}
	for _, want := range []string{"Pulling from some/app", "Pulling fs layer", "Downloading", "Pull complete", "Digest: " + img.Target.Digest.String(), "Status: Downloaded newer image for " + ref} {
		if !slices.Contains(actions, want) {
			t.Errorf("progress lacks %q: %q", want, actions)
		}
	}
	dirs := r.layerDirs(t, img.ChainID)
	if len(dirs) != 3 {
		t.Fatalf("layers are %q", dirs)
	}
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(dirs[1], "gone"), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0 {
		t.Errorf("whiteout of gone: %v %o", err, st.Mode)
	}
	// The second layer does not describe the directories that it goes through.
	for name, mode := range map[string]uint32{"var": 0o711, "var/data": 0o700} {
		if err := unix.Lstat(filepath.Join(dirs[1], name), &st); err != nil || st.Mode&0o7777 != mode {
			t.Errorf("%s has mode %o (%v), want %o as below", name, st.Mode, err, mode)
		}
	}
	var opaque [4]byte
	if n, err := unix.Lgetxattr(filepath.Join(dirs[0], "var/data"), "trusted.overlay.opaque", opaque[:]); err != nil || string(opaque[:n]) != "y" {
		t.Errorf("opaque marker: %v", err)
	}
	if _, err := os.Lstat(filepath.Join(dirs[0], "var/data/.wh..wh.opq")); !os.IsNotExist(err) {
		t.Errorf("the marker's file is there: %v", err)
	}
	t.Run("merged", func(t *testing.T) {
		merged := r.mounted(t, img)
		if got := names(t, filepath.Join(merged, "var/data")); !slices.Equal(got, []string{"last"}) {
			t.Errorf("var/data holds %q", got)
		}
		if _, err := os.Lstat(filepath.Join(merged, "gone")); !os.IsNotExist(err) {
			t.Errorf("gone is there: %v", err)
		}
	})
	// Again: nothing is fetched.
	actions = nil
	s.intercept(onlyManifests(t))
	if _, err := r.Pull(r.ctx, ref, PullOptions{Progress: func(p Progress) {
		mu.Lock()
		defer mu.Unlock()
		actions = append(actions, p.Action+p.Message)
	}}); err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(actions, "Status: Image is up to date for "+ref) {
		t.Errorf("second pull says %q", actions)
	}
	// And the lease is gone: what stays does because the name refers to it.
	leases, err := r.store.Leases().List(r.ctx)
	if err != nil || len(leases) != 0 {
		t.Errorf("leases left: %v %v", leases, err)
	}
	if _, err := r.store.GC(r.ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := r.over.Stat(r.ctx, img.ChainID.String()); err != nil {
		t.Errorf("after garbage collection: %v", err)
	}
	if _, err := r.Delete(r.ctx, img); err != nil {
		t.Fatal(err)
	}
	if _, err := r.store.GC(r.ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := r.over.Stat(r.ctx, img.ChainID.String()); !errdefs.IsNotFound(err) {
		t.Errorf("after deletion: %v", err)
	}
	if _, err := r.Get(r.ctx, ref, nil); !errdefs.IsNotFound(err) {
		t.Errorf("after deletion: %v", err)
	}
}

func TestSaveAndLoad(t *testing.T) {
	t.Parallel()
	r, s := newRig(t), newServer(t)
	ref := s.push(t, "app", "v1", threeLayers(t))
	img, err := r.Pull(r.ctx, ref, PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Tag(r.ctx, img.ID.Encoded()[:10], "second:name"); err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{"docker", "oci"} {
		for _, pack := range []func([]byte) []byte{func(b []byte) []byte { return b }, gzipped, zstded} {
			var out bytes.Buffer
			if err := r.Save(r.ctx, []string{ref, "second:name"}, SaveOptions{Format: format}, &out); err != nil {
				t.Fatal(err)
			}
			other := newRig(t)
			loaded, err := other.Load(other.ctx, bytes.NewReader(pack(out.Bytes())), LoadOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if len(loaded) != 1 || loaded[0].Image.ID != img.ID || loaded[0].Image.Target.Digest != img.Target.Digest {
				t.Fatalf("%s: loaded %+v", format, loaded)
			}
			want := []string{ref, "docker.io/second:name"}
			want[1] = "docker.io/library/second:name"
			slices.Sort(want)
			slices.Sort(loaded[0].Names)
			if !slices.Equal(loaded[0].Names, want) || !slices.Equal(loaded[0].Image.Names, want) {
				t.Errorf("%s: names %q and %q", format, loaded[0].Names, loaded[0].Image.Names)
			}
			merged := other.mounted(t, loaded[0].Image)
			if got := names(t, filepath.Join(merged, "var/data")); !slices.Equal(got, []string{"last"}) {
				t.Errorf("%s: var/data holds %q", format, got)
			}
		}
	}
}
