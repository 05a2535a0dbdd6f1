package image

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestCommitImage(t *testing.T) {
	t.Parallel()
	r, s := newRig(t), newServer(t)
	base, err := r.Pull(r.ctx, s.push(t, "app", "v1", threeLayers(t)), PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	layer := tarOf(t, file("etc/new", "new"), file("etc/.wh.passwd", ""))
	cfg := dockerspec.DockerOCIImage{Image: ocispec.Image{Platform: base.Platform}}
	cfg.Config.Cmd = []string{"/new"}
	cfg.History = []ocispec.History{HistoryStep("/new", "me", "why", false)}
	opts := CommitOptions{Base: &base, Config: cfg, Name: "committed:v1", Layer: func(_ context.Context, w io.Writer) error {
		_, err := w.Write(layer)
		return err
	}}
	img, err := r.Commit(r.ctx, opts)
	if err != nil {
		t.Fatal(err)
	}
	if len(img.Layers) != 4 || !reflect.DeepEqual(img.Layers[:3], base.Layers) || !slices.Equal(img.Names, []string{"docker.io/library/committed:v1"}) {
		t.Errorf("%+v", img)
	}
	got, err := r.Config(r.ctx, img)
	if err != nil || got.Config.Cmd[0] != "/new" || len(got.RootFS.DiffIDs) != 4 || got.History[len(got.History)-1].Comment != "why" {
		t.Errorf("%+v %v", got, err)
	}
	t.Run("merged", func(t *testing.T) {
		if list := names(t, filepath.Join(r.mounted(t, img), "etc")); !slices.Equal(list, []string{"link", "new"}) {
			t.Errorf("etc holds %q", list)
		}
	})
	// It stays without the base, and goes with its name.
	if _, err := r.Delete(r.ctx, base); err != nil {
		t.Fatal(err)
	}
	if _, err := r.store.GC(r.ctx); err != nil {
		t.Fatal(err)
	}
	if err := r.whole("committed:v1", img); err != nil {
		t.Error(err)
	}

	// No layer, no name: the same files under another configuration.
	opts = CommitOptions{Base: &img, Config: cfg}
	opts.Config.Config.Cmd = []string{"/other"}
	again, err := r.Commit(r.ctx, opts)
	if err != nil || len(again.Layers) != 4 || again.ChainID != img.ChainID || again.ID == img.ID || len(again.Names) != 0 {
		t.Errorf("%+v %v", again, err)
	}
	if _, err := r.Get(r.ctx, again.ID.String(), nil); err != nil {
		t.Error(err)
	}

	// What breaks leaves nothing.
	broken := errors.New("broken")
	for name, o := range map[string]CommitOptions{
		"a layer that breaks": {Base: &img, Config: cfg, Layer: func(_ context.Context, w io.Writer) error { _, _ = w.Write(layer[:100]); return broken }},
		"no tar": {Base: &img, Config: cfg, Layer: func(_ context.Context, w io.Writer) error {
			_, err := io.WriteString(w, strings.Repeat("junk", 1000))
			return err
		}},
		"a name with a digest": {Base: &img, Config: cfg, Name: "x@" + img.ID.String()},
		"a bad name":           {Base: &img, Config: cfg, Name: "UPPER"},
	} {
		if _, err := r.Commit(r.ctx, o); err == nil || name == "a layer that breaks" && !errors.Is(err, broken) || name != "a layer that breaks" && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, one := range []Image{img, again} {
		if _, err := r.Delete(r.ctx, one); err != nil {
			t.Error(err)
		}
	}
	r.clean(t)
}

func TestImportImage(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	files := tarOf(t, dir("etc", 0o755), file("etc/f", "f"))
	cfg := dockerspec.DockerOCIImage{Image: ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}}}
	var chain string
	for name, archive := range map[string][]byte{"plain": files, "gzip": gzipped(files), "zstd": zstded(files)} {
		img, err := r.Import(r.ctx, bytes.NewReader(archive), ImportOptions{Config: cfg, Name: "imported:" + name})
		if err != nil {
			t.Fatal(name, err)
		}
		if chain == "" {
			chain = img.ChainID.String()
		}
		if img.ChainID.String() != chain || len(img.Layers) != 1 {
			t.Errorf("%s: %+v", name, img)
		}
		dirs := r.layerDirs(t, img.ChainID)
		if b, err := os.ReadFile(filepath.Join(dirs[0], "etc/f")); err != nil || string(b) != "f" {
			t.Errorf("%s: %q %v", name, b, err)
		}
	}
	for name, archive := range map[string]string{"junk": strings.Repeat("junk", 1000), "nothing": "", "xz": "\xfd7zXZ\x00", "half a gzip": string(gzipped(files)[:40])} {
		if _, err := r.Import(r.ctx, strings.NewReader(archive), ImportOptions{Config: cfg}); !errdefs.IsInvalidArgument(err) && !errdefs.IsNotImplemented(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	img, err := r.Get(r.ctx, "imported:gzip", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Delete(r.ctx, img); err != nil {
		t.Fatal(err)
	}
	r.clean(t)
}
