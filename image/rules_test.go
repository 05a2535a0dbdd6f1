package image

import (
	"bytes"
	"context"
	"io"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/registry"
)

// guardedNames refuses names of rules.example for all digests but those that are good.
type guardedNames struct {
	mu    sync.Mutex
	good  map[digest.Digest]bool
	asked []string
}

func (g *guardedNames) allow(_ context.Context, name reference.Named, d ocispec.Descriptor, repo *registry.Repository) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if repo != nil || reference.Domain(name) != "rules.example" {
		return nil
	}
	g.asked = append(g.asked, name.String())
	if !g.good[d.Digest] {
		return errdefs.ErrPermissionDenied
	}
	return nil
}

// TestRulesHoldForNames has every way in which an image gets a name without being pulled by
// it refused, and leave no name.
func TestRulesHoldForNames(t *testing.T) {
	t.Parallel()
	g := &guardedNames{good: map[digest.Digest]bool{}}
	r, s := newRig(t, func(o *Options) { o.Allow = g.allow }), newServer(t)
	ref := s.push(t, "app", "v1", threeLayers(t))
	img, err := r.Pull(r.ctx, ref, PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	const name = "rules.example/team/app:1"
	// An archive with an image of that name, of a service without rules.
	free := newRig(t)
	if _, err := free.Pull(free.ctx, ref, PullOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := free.Tag(free.ctx, ref, name); err != nil {
		t.Fatal(err)
	}
	var saved bytes.Buffer
	if err := free.Save(free.ctx, []string{name}, SaveOptions{}, &saved); err != nil {
		t.Fatal(err)
	}
	archive := saved.Bytes()
	remote := Remote{Reference: ref}
	for way, do := range map[string]func() error{
		"tag":       func() error { return r.Tag(r.ctx, ref, name) },
		"tag an id": func() error { return r.Tag(r.ctx, img.ID.String(), name) },
		"load":      func() error { _, err := r.Load(r.ctx, bytes.NewReader(archive), LoadOptions{}); return err },
		"commit": func() error {
			_, err := r.Commit(r.ctx, CommitOptions{Base: &img, Name: name, Config: dockerspec.DockerOCIImage{Image: ocispec.Image{Platform: img.Platform}}})
			return err
		},
		"import": func() error {
			_, err := r.Import(r.ctx, bytes.NewReader(tarOf(t, file("x", "x"))), ImportOptions{Name: name})
			return err
		},
		"transfer: tag":  func() error { return r.TransferTag(r.ctx, Stored{Name: ref}, Stored{Name: name}, nil) },
		"transfer: pull": func() error { return r.TransferPull(r.ctx, remote, Stored{Name: name}, nil) },
		"transfer: pull, further names": func() error {
			return r.TransferPull(r.ctx, remote, Stored{Name: ref, References: []NameRule{{Name: "rules.example/team/app", AddDigest: true}}}, nil)
		},
		"transfer: import": func() error {
			return r.TransferImport(r.ctx, bytes.NewReader(archive), false, Stored{References: []NameRule{{Name: "rules.example/team", IsPrefix: true}}}, nil)
		},
		"transfer: import, the list": func() error {
			return r.TransferImport(r.ctx, bytes.NewReader(archive), false, Stored{Name: name}, nil)
		},
	} {
		g.asked = nil
		if err := do(); !errdefs.IsPermissionDenied(err) {
			t.Errorf("%s: %v", way, err)
		}
		if len(g.asked) == 0 {
			t.Errorf("%s: not asked", way)
		}
		records, err := r.store.Images().List(r.ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, rec := range records {
			if strings.HasPrefix(rec.Name, "rules.example") {
				t.Errorf("%s: made %s", way, rec.Name)
			}
		}
	}
	// A good one, and then further tags of the repository without a question.
	g.good[img.Target.Digest] = true
	if err := r.Tag(r.ctx, ref, name); err != nil {
		t.Fatal(err)
	}
	g.asked = nil
	if err := r.Tag(r.ctx, name, "rules.example/team/app:2"); err != nil || len(g.asked) > 0 {
		t.Errorf("a second tag: %v, asked %v", err, g.asked)
	}
	if err := r.Tag(r.ctx, name, "rules.example/team/other:1"); err != nil || len(g.asked) != 1 {
		t.Errorf("another repository: %v, asked %v", err, g.asked)
	}
	// Names that the rules are not for, and images without one.
	if err := r.Tag(r.ctx, ref, "free.example/app:1"); err != nil {
		t.Error(err)
	}
	if _, err := r.Commit(r.ctx, CommitOptions{Base: &img, Config: dockerspec.DockerOCIImage{Image: ocispec.Image{Platform: img.Platform}}, Layer: func(_ context.Context, w io.Writer) error {
		_, err := w.Write(tarOf(t, file("y", "y")))
		return err
	}}); err != nil {
		t.Error(err)
	}
	if _, err := r.store.Images().Create(r.ctx, images.Image{Name: "not a reference", Target: img.Target}); err != nil {
		t.Fatal(err)
	}
	if err := r.TransferTag(r.ctx, Stored{Name: ref}, Stored{Name: "NEITHER IS THIS"}, nil); err != nil {
		t.Error(err)
	}
}
