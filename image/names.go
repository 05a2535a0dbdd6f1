package image

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/manifest"
)

// naming runs fn as the only one who changes the namespace's image records. What fn finds
// there holds until it returns: an image that has a name does not become garbage between
// being found and being given another.
func (s *Service) naming(ctx context.Context, fn func() error) error {
	ns, _ := namespaces.Namespace(ctx)
	unlock, err := s.names.Lock(ctx, ns)
	if err != nil {
		return err
	}
	defer unlock()
	return fn()
}

// setName makes a name point to a target, whose contents the caller holds by a lease.
func (s *Service) setName(ctx context.Context, name string, target ocispec.Descriptor) error {
	return s.naming(ctx, func() error { return s.giveName(ctx, name, target) })
}

// giveName is setName for whoever is naming already. An image that loses its last name by
// that is kept under a record of its own until it is deleted, as Docker's users expect.
func (s *Service) giveName(ctx context.Context, name string, target ocispec.Descriptor) error {
	target = ocispec.Descriptor{MediaType: target.MediaType, Digest: target.Digest, Size: target.Size}
	for {
		old, err := s.o.Images.Get(ctx, name)
		switch {
		case errdefs.IsNotFound(err):
			_, err = s.o.Images.Create(ctx, images.Image{Name: name, Target: target})
			if errdefs.IsAlreadyExists(err) {
				continue
			}
			if err == nil && !strings.HasPrefix(name, danglingPrefix) {
				err = s.removeDangling(ctx, target)
			}
			return err
		case err != nil:
			return err
		case old.Target.Digest == target.Digest:
			return nil
		}
		if err := s.keepDangling(ctx, old); err != nil {
			return err
		}
		_, err = s.o.Images.Update(ctx, images.Image{Name: name, Target: target}, "target")
		if errdefs.IsNotFound(err) {
			continue
		}
		if err == nil {
			err = s.removeDangling(ctx, target)
		}
		return err
	}
}

// keepNameless makes a record for an image that has no name, unless it has one by now.
func (s *Service) keepNameless(ctx context.Context, target ocispec.Descriptor) error {
	return s.naming(ctx, func() error {
		all, err := s.o.Images.List(ctx)
		if err != nil {
			return err
		}
		for _, r := range all {
			if r.Target.Digest == target.Digest {
				return nil
			}
		}
		return s.giveName(ctx, danglingPrefix+target.Digest.String(), target)
	})
}

// keepDangling makes a record for the target of a name that is about to point elsewhere,
// unless other names keep it.
func (s *Service) keepDangling(ctx context.Context, old images.Image) error {
	all, err := s.o.Images.List(ctx)
	if err != nil {
		return err
	}
	for _, r := range all {
		if r.Target.Digest == old.Target.Digest && r.Name != old.Name {
			return nil
		}
	}
	_, err = s.o.Images.Create(ctx, images.Image{Name: danglingPrefix + old.Target.Digest.String(), Target: old.Target})
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	return err
}

// removeDangling removes the record that kept a target which has a name now.
func (s *Service) removeDangling(ctx context.Context, target ocispec.Descriptor) error {
	err := s.o.Images.Delete(ctx, danglingPrefix+target.Digest.String())
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// describe gives the image that a target is, for the manifest chosen of it.
func (s *Service) describe(ctx context.Context, target, chosen ocispec.Descriptor) (Image, error) {
	all, err := s.o.Images.List(ctx)
	if err != nil {
		return Image{}, err
	}
	img, err := s.assemble(ctx, target, chosen)
	if err != nil {
		return Image{}, err
	}
	for _, r := range all {
		if r.Target.Digest == target.Digest || s.sameImage(ctx, r, img) {
			img.addName(r)
		}
	}
	img.sortNames()
	return img, nil
}

// sameImage says whether another record leads to the same image by another manifest.
func (s *Service) sameImage(ctx context.Context, r images.Image, img Image) bool {
	chosen, err := s.choose(ctx, r.Target, platforms.OnlyStrict(img.Platform), false)
	if err != nil {
		return false
	}
	doc, err := s.document(ctx, chosen)
	return err == nil && doc.manifest.Config.Digest == img.ID
}

// assemble gives an image without its names.
func (s *Service) assemble(ctx context.Context, target, chosen ocispec.Descriptor) (Image, error) {
	doc, err := s.document(ctx, chosen)
	if err != nil {
		return Image{}, err
	}
	if doc.manifest == nil {
		return Image{}, invalid(chosen.Digest.String(), "not a manifest")
	}
	c, err := s.config(ctx, doc.manifest.Config)
	if err != nil {
		return Image{}, err
	}
	if err := c.fits("manifest "+chosen.Digest.String(), doc.manifest); err != nil {
		return Image{}, err
	}
	img := Image{
		ID:       doc.manifest.Config.Digest,
		Target:   ocispec.Descriptor{MediaType: target.MediaType, Digest: target.Digest, Size: target.Size},
		Manifest: ocispec.Descriptor{MediaType: doc.mediaType, Digest: chosen.Digest, Size: chosen.Size},
		Config:   doc.manifest.Config,
		Layers:   slices.Clone(doc.manifest.Layers),
		Platform: c.platform(),
		Labels:   map[string]string{},

		Annotations: doc.manifest.Annotations,
	}
	if n := len(c.chain); n > 0 {
		img.ChainID = c.chain[n-1]
	}
	if c.Created != nil {
		img.Created = *c.Created
	}
	for k, v := range c.Config.Labels {
		img.Labels[k] = v
	}
	for _, l := range doc.manifest.Layers {
		size := l.Size
		if info, err := s.o.Content.Info(ctx, l.Digest); err == nil {
			if n, err := strconv.ParseInt(info.Labels[labelSize], 10, 64); err == nil && n >= 0 {
				size = n
			}
		}
		img.LayerSizes = append(img.LayerSizes, size)
		img.Size += size
	}
	return img, nil
}

// addName adds a record's name, and the name by digest that follows from it.
func (img *Image) addName(r images.Image) {
	if r.UpdatedAt.After(img.Updated) {
		img.Updated = r.UpdatedAt
	}
	if strings.HasPrefix(r.Name, danglingPrefix) {
		return
	}
	named, err := reference.ParseNormalizedNamed(r.Name)
	if err != nil {
		return // of another client, by another convention
	}
	if _, ok := named.(reference.Tagged); ok && !isDigested(named) {
		img.Names = append(img.Names, named.String())
	}
	if byDigest, err := reference.WithDigest(reference.TrimNamed(named), r.Target.Digest); err == nil {
		img.Digests = append(img.Digests, byDigest.String())
	}
}

func (img *Image) sortNames() {
	slices.Sort(img.Names)
	img.Names = slices.Compact(img.Names)
	slices.Sort(img.Digests)
	img.Digests = slices.Compact(img.Digests)
}

// choose follows a target down to the manifest for a platform whose documents are here.
// With anyPlatform, an image for another platform will do.
func (s *Service) choose(ctx context.Context, target ocispec.Descriptor, m platforms.MatchComparer, anyPlatform bool) (ocispec.Descriptor, error) {
	return s.chooseAt(ctx, target, m, anyPlatform, 0)
}

func (s *Service) chooseAt(ctx context.Context, d ocispec.Descriptor, m platforms.MatchComparer, anyPlatform bool, depth int) (ocispec.Descriptor, error) {
	doc, err := s.document(ctx, d)
	if err != nil {
		return d, err
	}
	if doc.manifest != nil {
		c, err := s.config(ctx, doc.manifest.Config)
		if err != nil {
			return d, err
		}
		if !anyPlatform && !m.Match(c.platform()) {
			p := c.platform()
			return d, fmt.Errorf("platform %s is not here, but %s: %w", "wanted", platformName(&p), errdefs.ErrNotFound)
		}
		return d, nil
	}
	if depth == maxNesting {
		return d, invalid(d.Digest.String(), "indexes nested too deep")
	}
	list := manifest.Candidates(doc.index, m)
	if anyPlatform {
		list = append(list, manifest.Candidates(doc.index, platforms.All)...)
	}
	for _, child := range list {
		if _, err := s.o.Content.Info(ctx, child.Digest); err != nil {
			continue
		}
		if got, err := s.chooseAt(ctx, child, m, anyPlatform, depth+1); err == nil {
			return got, nil
		}
	}
	return d, fmt.Errorf("no image for this platform in %s is here: %w", d.Digest, errdefs.ErrNotFound)
}

// pick is choose for what a client asked for: nil is the host's platform, or the one
// that is here.
func (s *Service) pick(ctx context.Context, target ocispec.Descriptor, p *ocispec.Platform) (ocispec.Descriptor, error) {
	return s.choose(ctx, target, matcher(p), p == nil)
}

// List gives all images that are here, each once with all of its names.
func (s *Service) List(ctx context.Context) ([]Image, error) {
	ctx = namespaced(ctx)
	records, err := s.o.Images.List(ctx)
	if err != nil {
		return nil, err
	}
	byID := map[string]*Image{}
	var order []*Image
	for _, r := range records {
		chosen, err := s.pick(ctx, r.Target, nil)
		var img Image
		if err == nil {
			img, err = s.assemble(ctx, r.Target, chosen)
		}
		if err != nil {
			// Of another client, e.g. something that is no container image, or damaged.
			s.o.Log.Debug("image record left out", "name", r.Name, "err", err)
			continue
		}
		have := byID[img.ID.String()]
		if have == nil {
			have = &img
			byID[img.ID.String()] = have
			order = append(order, have)
		}
		have.addName(r)
	}
	out := make([]Image, len(order))
	for i, img := range order {
		img.sortNames()
		out[i] = *img
	}
	return out, nil
}

// Get finds an image by name, by name and digest, by id, or by the beginning of an id:
// errdefs.ErrNotFound, or ErrInvalidArgument if several ids begin like that.
func (s *Service) Get(ctx context.Context, ref string, platform *ocispec.Platform) (Image, error) {
	ctx = namespaced(ctx)
	r, err := s.find(ctx, ref)
	if err != nil {
		return Image{}, err
	}
	chosen, err := s.pick(ctx, r.Target, platform)
	if errdefs.IsNotFound(err) && platform != nil {
		return Image{}, fmt.Errorf("image %s is not here for platform %s: %w", ref, platformName(platform), errdefs.ErrNotFound)
	}
	if err != nil {
		return Image{}, fmt.Errorf("image %s: %w", ref, err)
	}
	return s.describe(ctx, r.Target, chosen)
}

// find gives a record for what a user calls an image.
func (s *Service) find(ctx context.Context, ref string) (images.Image, error) {
	notFound := fmt.Errorf("no such image: %s: %w", ref, errdefs.ErrNotFound)
	named, nameErr := parseName(ref)
	hex, isID := idPrefix(ref)
	if isID && len(hex) == 64 {
		nameErr = errdefs.ErrInvalidArgument // reference.ParseNormalizedNamed does not take it either
	}
	if nameErr == nil {
		r, err := s.o.Images.Get(ctx, named.String())
		if err == nil || !errdefs.IsNotFound(err) {
			return r, err
		}
	}
	if nameErr != nil && !isID {
		return images.Image{}, nameErr
	}
	records, err := s.o.Images.List(ctx)
	if err != nil {
		return images.Image{}, err
	}
	if nameErr == nil && isDigested(named) {
		for _, r := range records {
			n, err := reference.ParseNormalizedNamed(r.Name)
			if err == nil && n.Name() == named.Name() && s.leadsTo(ctx, r, tagOrDigest(named)) {
				return r, nil
			}
		}
		return images.Image{}, notFound
	}
	if !isID {
		return images.Image{}, notFound
	}
	var got images.Image
	ids := map[string]bool{}
	for _, r := range records {
		for _, id := range s.ids(ctx, r) {
			if strings.HasPrefix(strings.TrimPrefix(id, "sha256:"), hex) {
				if got.Name == "" || strings.HasPrefix(got.Name, danglingPrefix) {
					got = r
				}
				ids[id] = true
			}
		}
	}
	switch len(ids) {
	case 0:
		return images.Image{}, notFound
	case 1:
		return got, nil
	}
	return images.Image{}, fmt.Errorf("image id %s is ambiguous: %d images begin with it: %w", ref, len(ids), errdefs.ErrInvalidArgument)
}

// leadsTo says whether a digest is a record's target or the manifest chosen of it.
func (s *Service) leadsTo(ctx context.Context, r images.Image, digest string) bool {
	if r.Target.Digest.String() == digest {
		return true
	}
	chosen, err := s.pick(ctx, r.Target, nil)
	return err == nil && chosen.Digest.String() == digest
}

// ids gives the image id that a record leads to.
func (s *Service) ids(ctx context.Context, r images.Image) []string {
	chosen, err := s.pick(ctx, r.Target, nil)
	if err != nil {
		return nil
	}
	doc, err := s.document(ctx, chosen)
	if err != nil {
		return nil
	}
	return []string{doc.manifest.Config.Digest.String()}
}

// Config reads the image's configuration, with its history.
func (s *Service) Config(ctx context.Context, img Image) (dockerspec.DockerOCIImage, error) {
	// Not from what is kept in memory: the caller may change what it gets.
	b, err := readBlob(namespaced(ctx), s.o.Content, img.Config)
	if err != nil {
		return dockerspec.DockerOCIImage{}, fmt.Errorf("config of image %s: %w", img.ID, err)
	}
	c, err := parseConfig("config of image "+img.ID.String(), b)
	return c.DockerOCIImage, err
}

// Unpack makes sure that the image's snapshot exists, from the blobs in the store, and
// gives its key: "" for an image without layers.
func (s *Service) Unpack(ctx context.Context, img Image, snapshotter string) (string, error) {
	ctx = namespaced(ctx)
	name, sn, err := s.snapshotter(snapshotter)
	if err != nil {
		return "", err
	}
	if img.ChainID == "" {
		return "", nil
	}
	if _, err := sn.Stat(ctx, img.ChainID.String()); err == nil {
		return img.ChainID.String(), nil
	}
	c, err := s.config(ctx, img.Config)
	if err != nil {
		return "", fmt.Errorf("unpack image %s: %w", img.ID, err)
	}
	ctx, l, err := s.newLease(ctx)
	if err != nil {
		return "", err
	}
	defer l.release()
	w := s.newWork(l, name, nil)
	defer w.release()
	if err := w.unpack(ctx, img.Layers, c); err != nil {
		return "", fmt.Errorf("unpack image %s: %w", img.ID, err)
	}
	// The image holds its snapshot by a label of its config.
	if err := w.label(ctx, img.Config.Digest, map[string]string{labelSnapshot + name: img.ChainID.String()}); err != nil {
		return "", fmt.Errorf("unpack image %s: %w", img.ID, err)
	}
	return img.ChainID.String(), nil
}

// Tag gives an image one more name, or takes the name from another image.
func (s *Service) Tag(ctx context.Context, source, target string) error {
	ctx = namespaced(ctx)
	named, err := parseName(target)
	if err != nil {
		return err
	}
	if isDigested(named) {
		return fmt.Errorf("tag %s: a name with digest cannot be given: %w", target, errdefs.ErrInvalidArgument)
	}
	var allowed digest.Digest
	for again := true; again; {
		r, err := s.find(ctx, source)
		if err != nil {
			return err
		}
		// Not while names are held: a registry may be asked.
		if err := s.mayName(ctx, named.String(), r.Target); err != nil {
			return fmt.Errorf("tag %s: %w", target, err)
		}
		allowed = r.Target.Digest
		err = s.naming(ctx, func() error {
			r, err := s.find(ctx, source)
			if err != nil {
				return err
			}
			if again = r.Target.Digest != allowed; again {
				return nil
			}
			return wrapf(s.giveName(ctx, named.String(), r.Target), "tag %s", target)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Untag removes one name. An image that loses its last one is kept under a record of its
// own until it is deleted: only Delete removes images.
func (s *Service) Untag(ctx context.Context, name string) error {
	ctx = namespaced(ctx)
	named, err := parseName(name)
	if err != nil {
		return err
	}
	err = s.naming(ctx, func() error {
		old, err := s.o.Images.Get(ctx, named.String())
		if err != nil {
			return err
		}
		if err := s.keepDangling(ctx, old); err != nil {
			return err
		}
		return s.o.Images.Delete(ctx, old.Name)
	})
	if err != nil {
		if errdefs.IsNotFound(err) {
			return fmt.Errorf("no such image: %s: %w", name, errdefs.ErrNotFound)
		}
		return fmt.Errorf("untag %s: %w", name, err)
	}
	return nil
}

// Delete removes the names that img has, and with them the image, unless it has got
// another one since img was read: whoever gave that was told that the image is there. It
// gives the names that it removed.
func (s *Service) Delete(ctx context.Context, img Image) ([]string, error) {
	ctx = namespaced(ctx)
	var gone Image
	found := false
	err := s.naming(ctx, func() error {
		records, err := s.o.Images.List(ctx)
		if err != nil {
			return err
		}
		for _, r := range records {
			if r.Target.Digest != img.Target.Digest && !s.sameImage(ctx, r, img) {
				continue
			}
			found = true
			if !img.knows(r) {
				continue
			}
			if err := s.o.Images.Delete(ctx, r.Name); err != nil && !errdefs.IsNotFound(err) {
				return err
			}
			gone.addName(r)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("delete image %s: %w", img.ID, err)
	}
	if !found {
		return nil, fmt.Errorf("no such image: %s: %w", img.ID, errdefs.ErrNotFound)
	}
	gone.sortNames()
	return append(gone.Names, gone.Digests...), nil
}

// knows tells whether a record of the image was among those that img was read from. Those
// that give it no name always are.
func (img *Image) knows(r images.Image) bool {
	var one Image
	one.addName(r)
	if len(one.Names) > 0 {
		return slices.Contains(img.Names, one.Names[0])
	}
	return len(one.Digests) == 0 || slices.Contains(img.Digests, one.Digests[0])
}
