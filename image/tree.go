package image

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/manifest"
)

// selection says how much of an image a transfer is about.
type selection struct {
	match    platforms.MatchComparer // nil: all platforms
	metadata bool                    // documents and configs of the other platforms as well
	limit    int                     // of manifests that match, per index; 0: none
	// lenient leaves out what an index lists and is not there.
	lenient bool
}

// selectPlatforms matches any of the platforms; none means all.
func selectPlatforms(ps []ocispec.Platform) platforms.MatchComparer {
	if len(ps) == 0 {
		return nil
	}
	return platforms.Ordered(ps...)
}

// part is a document with what a selection takes of what it lists. Any artifact can be one.
type part struct {
	desc     ocispec.Descriptor
	doc      manifest.Document
	children []*part              // documents
	blobs    []ocispec.Descriptor // config, layers, and whatever else an index lists
}

// tree reads the document d and those below it.
func tree(ctx context.Context, d ocispec.Descriptor, sel selection, read func(context.Context, ocispec.Descriptor) ([]byte, error)) (*part, error) {
	t := treeReader{sel: sel, read: read, seen: map[digest.Digest]*part{}}
	return t.part(ctx, d, true, 0)
}

// maxParts bounds the documents of one image.
const maxParts = 10_000

type treeReader struct {
	sel  selection
	read func(context.Context, ocispec.Descriptor) ([]byte, error)
	seen map[digest.Digest]*part
}

// part reads one document. With whole also its layers are wanted.
func (t *treeReader) part(ctx context.Context, d ocispec.Descriptor, whole bool, depth int) (*part, error) {
	if err := manifest.ValidDescriptor(d); err != nil {
		return nil, err
	}
	if p := t.seen[d.Digest]; p != nil {
		return p, nil
	}
	if depth > maxNesting+1 {
		return nil, invalid(d.Digest.String(), "indexes nested too deep")
	}
	if len(t.seen) >= maxParts {
		return nil, fmt.Errorf("image of more than %d documents: %w", maxParts, errdefs.ErrResourceExhausted)
	}
	raw, err := t.read(ctx, d)
	if err != nil {
		return nil, err
	}
	p := &part{desc: d}
	if p.doc, err = manifest.Parse("manifest "+d.Digest.String(), d.MediaType, raw); err != nil {
		return nil, err
	}
	p.desc.MediaType = p.doc.MediaType
	t.seen[d.Digest] = p
	if m := p.doc.Manifest; m != nil {
		p.blobs = append(p.blobs, m.Config)
		if whole {
			p.blobs = append(p.blobs, m.Layers...)
		}
		return p, nil
	}
	wanted, err := t.wanted(p.doc.Index, whole)
	if err != nil {
		return nil, fmt.Errorf("index %s: %w", d.Digest, err)
	}
	for _, c := range p.doc.Index.Manifests {
		full, want := wanted[c.Digest]
		switch {
		case !want:
			continue
		case !manifest.IsDocument(c.MediaType) && c.MediaType != "":
			p.blobs = append(p.blobs, c)
			continue
		}
		child, err := t.part(ctx, c, full, depth+1)
		if errdefs.IsNotFound(err) && t.sel.lenient {
			continue
		}
		if err != nil {
			return nil, err
		}
		p.children = append(p.children, child)
	}
	return p, nil
}

// wanted says of what an index lists whether it is wanted with its layers, or without.
func (t *treeReader) wanted(idx *ocispec.Index, whole bool) (map[digest.Digest]bool, error) {
	out := map[digest.Digest]bool{}
	var matching []ocispec.Descriptor
	others := false
	for _, c := range idx.Manifests {
		switch {
		case t.sel.match == nil || c.Platform == nil || c.Platform.OS == "" && c.Platform.Architecture == "":
			out[c.Digest] = whole
		case t.sel.match.Match(*c.Platform):
			matching = append(matching, c)
		default:
			others = true
			if t.sel.metadata {
				if _, said := out[c.Digest]; !said {
					out[c.Digest] = false // nothing of it
				}
			}
		}
	}
	if t.sel.match == nil {
		return out, nil
	}
	slices.SortStableFunc(matching, func(a, b ocispec.Descriptor) int {
		switch {
		case t.sel.match.Less(*a.Platform, *b.Platform):
			return -1
		case t.sel.match.Less(*b.Platform, *a.Platform):
			return 1
		}
		return 0
	})
	if t.sel.limit > 0 && len(matching) > t.sel.limit {
		matching = matching[:t.sel.limit]
	}
	for _, c := range matching {
		out[c.Digest] = whole
	}
	if len(matching) == 0 && others && len(out) == 0 {
		return nil, fmt.Errorf("no match for platform in manifest: %w", errdefs.ErrNotFound)
	}
	return out, nil
}

// each calls fn for the documents, those that are listed before those that list them.
func (p *part) each(fn func(*part) error) error {
	seen := map[*part]bool{}
	var visit func(*part) error
	visit = func(p *part) error {
		if seen[p] {
			return nil
		}
		seen[p] = true
		for _, c := range p.children {
			if err := visit(c); err != nil {
				return err
			}
		}
		return fn(p)
	}
	return visit(p)
}

// allBlobs gives all blobs that are no documents, each once.
func (p *part) allBlobs() (list []ocispec.Descriptor) {
	seen := map[digest.Digest]bool{}
	_ = p.each(func(d *part) error {
		for _, b := range d.blobs {
			if !seen[b.Digest] {
				seen[b.Digest] = true
				list = append(list, b)
			}
		}
		return nil
	})
	return list
}

// labels are those that garbage collection goes by.
func (p *part) labels() map[string]string {
	out := map[string]string{}
	if m := p.doc.Manifest; m != nil {
		out[labelContent+"config"] = m.Config.Digest.String()
		for i, l := range m.Layers {
			if slices.ContainsFunc(p.blobs, func(b ocispec.Descriptor) bool { return b.Digest == l.Digest }) {
				out[fmt.Sprintf("%sl.%d", labelContent, i)] = l.Digest.String()
			}
		}
		return out
	}
	for i, c := range p.doc.Index.Manifests {
		here := func(d digest.Digest) bool { return d == c.Digest }
		if slices.ContainsFunc(p.children, func(k *part) bool { return here(k.desc.Digest) }) ||
			slices.ContainsFunc(p.blobs, func(b ocispec.Descriptor) bool { return here(b.Digest) }) {
			out[fmt.Sprintf("%sm.%d", labelContent, i)] = c.Digest.String()
		}
	}
	return out
}

// errNoImage tells that nothing of a tree can be unpacked for a platform.
var errNoImage = errors.New("no image for the platform")

// image finds the manifest that runs best on a platform, and its config, which is in the store.
func (s *Service) imageOf(ctx context.Context, p *part, m platforms.MatchComparer) (*part, config, error) {
	if p.doc.Manifest != nil {
		if !p.doc.IsImage() {
			return nil, config{}, errNoImage
		}
		c, err := s.config(ctx, p.doc.Manifest.Config)
		if err != nil {
			return nil, config{}, err
		}
		if !m.Match(c.platform()) {
			return nil, config{}, errNoImage
		}
		return p, c, c.fits(p.desc.Digest.String(), p.doc.Manifest)
	}
	for _, d := range manifest.Candidates(p.doc.Index, m) {
		i := slices.IndexFunc(p.children, func(c *part) bool { return c.desc.Digest == d.Digest })
		if i < 0 {
			continue
		}
		found, c, err := s.imageOf(ctx, p.children[i], m)
		if !errors.Is(err, errNoImage) {
			return found, c, err
		}
	}
	return nil, config{}, errNoImage
}
