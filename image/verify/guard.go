package verify

import (
	"context"
	"log/slog"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/transport"
)

// guarded lets an image have a name only if the rules for the name let it be pulled.
type guarded struct {
	images.Store
	p    *Policy
	open func(reference.Named) (transport.Source, error)
	log  *slog.Logger
}

// Guard gives a store of image records for clients that fetch blobs themselves (ctr,
// nerdctl) and then name what they fetched: for them, this is the pull. open gives the
// repository of a name.
func (p *Policy) Guard(s images.Store, open func(reference.Named) (transport.Source, error), log *slog.Logger) images.Store {
	return &guarded{s, p, open, log}
}

func (g *guarded) allow(ctx context.Context, name string, target ocispec.Descriptor) error {
	n, err := reference.ParseNormalizedNamed(name)
	if err != nil || !g.p.Applies(n) {
		return nil // a name that no image can be pulled by is no matter of rules
	}
	if old, err := g.Store.Get(ctx, name); err == nil && old.Target.Digest == target.Digest {
		return nil
	}
	src, err := g.open(n)
	if err != nil {
		return err
	}
	defer src.Close()
	_, warn, err := g.p.Check(ctx, n, target, src)
	if warn != nil {
		g.log.Warn("image without a good signature is named: the rule only warns", "image", name, "digest", target.Digest, "error", warn)
	}
	return err
}

// Create makes a record, if the rules allow it.
func (g *guarded) Create(ctx context.Context, image images.Image) (images.Image, error) {
	if err := g.allow(ctx, image.Name, image.Target); err != nil {
		return images.Image{}, err
	}
	return g.Store.Create(ctx, image)
}

// Update changes a record; the rules have a say if its target is among what changes.
func (g *guarded) Update(ctx context.Context, image images.Image, fieldpaths ...string) (images.Image, error) {
	target := func(p string) bool { return p == "target" || strings.HasPrefix(p, "target.") }
	if len(fieldpaths) == 0 || slices.ContainsFunc(fieldpaths, target) {
		if err := g.allow(ctx, image.Name, image.Target); err != nil {
			return images.Image{}, err
		}
	}
	return g.Store.Update(ctx, image, fieldpaths...)
}
