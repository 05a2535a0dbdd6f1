package image

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/unpack"
)

// piecesOf hands out a whole layer.
type piecesOf struct{ r io.Reader }

func (p piecesOf) Next() ([]byte, func(), error) {
	b := make([]byte, 4096)
	n, err := p.r.Read(b)
	if n > 0 {
		return b[:n], func() {}, nil
	}
	return nil, nil, err
}

// erofsOf is a layer in EROFS form.
func erofsOf(t testing.TB, layer []byte) []byte {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := unpack.Image(t.Context(), f, piecesOf{bytes.NewReader(layer)}, unpack.Options{Mode: unpack.Diff}); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// buildErofs makes an image of layers in EROFS form, every other one in zstd.
func buildErofs(t testing.TB, layers ...[]byte) *built {
	t.Helper()
	b := &built{}
	var descs []ocispec.Descriptor
	for i, l := range layers {
		packed, mt := l, erofsLayer
		if i%2 == 1 {
			packed, mt = zstded(l), erofsLayerZstd
		}
		b.layers = append(b.layers, packed)
		b.diffIDs = append(b.diffIDs, digest.FromBytes(l))
		descs = append(descs, ocispec.Descriptor{MediaType: mt, Digest: digest.FromBytes(packed), Size: int64(len(packed))})
	}
	whole := build(t, func(c *ocispec.Image, m *ocispec.Manifest) {
		c.RootFS.DiffIDs, m.Layers = b.diffIDs, descs
	})
	whole.layers, whole.diffIDs = b.layers, b.diffIDs
	return whole
}

// TestErofsLayers pulls an image whose layers are file systems, for all snapshotters: it is like the one of
// tar archives that it was made of.
func TestErofsLayers(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	r := newRigAt(t, root)
	withErofs(t, root)(r)
	s := newServer(t)
	layers := [][]byte{
		tarOf(t, dir("etc", 0o755), file("etc/passwd", "root"), link(tar.TypeLink, "etc/same", "etc/passwd"), dir("var", 0o711), dir("var/data", 0o700), file("var/data/old", "old"), dir("gone", 0o755), file("gone/x", "x")),
		tarOf(t, dir("var", 0o711), dir("var/data", 0o700), file("var/data/new", strings.Repeat("new", 9999)), file("var/data/.wh.old", ""), file(".wh.gone", "")),
		tarOf(t, dir("var", 0o711), dir("var/data", 0o750), file("var/data/.wh..wh.opq", ""), file("var/data/last", "last"), link(tar.TypeSymlink, "link", "/etc/passwd")),
	}
	plain, err := r.Pull(r.ctx, s.push(t, "plain", "latest", build(t, nil, layers...)), PullOptions{Snapshotter: "overlayfs"})
	if err != nil {
		t.Fatal(err)
	}
	want := r.treeOf(t, r.o.Snapshotters["overlayfs"], plain)
	var images [][]byte
	for _, l := range layers {
		images = append(images, erofsOf(t, l))
	}
	ref := s.push(t, "erofs", "latest", buildErofs(t, images...))
	for _, name := range []string{"erofs", "overlayfs", "native"} {
		img, err := r.Pull(r.ctx, ref, PullOptions{Snapshotter: name})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		got := r.treeOf(t, r.o.Snapshotters[name], img)
		if name == "native" {
			for i := range got {
				got[i], _, _ = strings.Cut(got[i], " = ")
			}
		}
		for i := range want {
			if name == "native" {
				want[i], _, _ = strings.Cut(want[i], " = ")
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s has\n%s\ninstead of\n%s", name, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}

// A registry may send anything under the name of a file system: it is refused, and nothing of it stays.
func TestErofsLayerRefused(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	r := newRigAt(t, root)
	withErofs(t, root)(r)
	s := newServer(t)
	good := erofsOf(t, tarOf(t, file("a", "a")))
	damage := func(change func([]byte)) []byte {
		b := bytes.Clone(good)
		change(b)
		return b
	}
	compressed := damage(func(b []byte) { b[1024+80] = 2; b[1024+8] = 0 })
	wrong := buildErofs(t, good)
	wrongID := build(t, func(c *ocispec.Image, m *ocispec.Manifest) {
		c.RootFS.DiffIDs = []digest.Digest{digest.FromString("other")}
		m.Layers = []ocispec.Descriptor{{MediaType: erofsLayer, Digest: digest.FromBytes(good), Size: int64(len(good))}}
	})
	wrongID.layers = wrong.layers
	for name, c := range map[string]struct {
		b    *built
		want func(error) bool
	}{
		"garbage":    {buildErofs(t, []byte(strings.Repeat("garbage ", 4000))), errdefs.IsInvalidArgument},
		"cut":        {buildErofs(t, good[:len(good)-4096]), errdefs.IsInvalidArgument},
		"a tar":      {buildErofs(t, tarOf(t, file("a", "a"))), errdefs.IsInvalidArgument},
		"compressed": {buildErofs(t, compressed), errdefs.IsNotImplemented},
		"diff id":    {wrongID, errdefs.IsDataLoss},
	} {
		for _, sn := range []string{"erofs", "overlayfs"} {
			if _, err := r.Pull(r.ctx, s.push(t, "bad", "latest", c.b), PullOptions{Snapshotter: sn}); err == nil || !c.want(err) {
				t.Errorf("%s on %s: %v", name, sn, err)
			}
		}
	}
}

// A client that unpacks by itself has the server apply such layers, too.
func TestApplyErofsLayer(t *testing.T) {
	t.Parallel()
	r := newRigAt(t, t.TempDir())
	s := newServer(t)
	first := erofsOf(t, tarOf(t, dir("d", 0o711), file("d/a", "a")))
	second := erofsOf(t, tarOf(t, dir("d", 0o711), file("d/.wh.a", ""), file("d/b", "b")))
	img, err := r.Pull(r.ctx, s.push(t, "erofs", "latest", buildErofs(t, first, second)), PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	sn := r.o.Snapshotters["native"]
	mounts, err := sn.Prepare(r.ctx, "applied", "")
	if err != nil {
		t.Fatal(err)
	}
	for i, l := range img.Layers {
		d, err := r.Apply(r.ctx, l, mounts)
		if err != nil {
			t.Fatal(err)
		}
		if want := digest.FromBytes([][]byte{first, second}[i]); d.Digest != want || d.MediaType != erofsLayer {
			t.Errorf("layer %d: applied as %+v, its diff id is %s", i, d, want)
		}
	}
	names, err := os.ReadDir(filepath.Join(mounts[0].Source, "d"))
	if err != nil || len(names) != 1 || names[0].Name() != "b" {
		t.Errorf("there are %v, %v", names, err)
	}
}
