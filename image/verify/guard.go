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
	rules func() *Policy
	open  func(reference.Named) (transport.Source, error)
	log   *slog.Logger
}

// Guard gives a store of image records for clients that fetch blobs themselves (ctr,
// nerdctl) and then name what they fetched: for them, this is the pull. Whether they did
// fetch it is not to be seen, so the rules' Local does not count. rules gives those in force,
// nil for none; open gives the repository of a name.
func Guard(s images.Store, rules func() *Policy, open func(reference.Named) (transport.Source, error), log *slog.Logger) images.Store {
	return &guarded{s, rules, open, log}
}

func (g *guarded) allow(ctx context.Context, name string, target ocispec.Descriptor) error {
	p := g.rules()
	if p == nil {
		return nil
	}
	n, err := reference.ParseNormalizedNamed(name)
	if err != nil || !p.Applies(n) {
		return nil // a name that no image can be pulled by is no matter of rules
	}
	records, err := g.Store.List(ctx)
	if err != nil {
		return err
	}
	for _, r := range records {
		// By another tag, what the repository has given already.
		if o, err := reference.ParseNormalizedNamed(r.Name); err == nil && r.Target.Digest == target.Digest && o.Name() == n.Name() {
			return nil
		}
	}
	src, err := g.open(n)
	if err != nil {
		return err
	}
	defer src.Close()
	_, warn, err := p.Check(ctx, n, target, src)
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
