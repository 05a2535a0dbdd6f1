package image

import (
	"archive/tar"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// saved is one image of an archive.
type saved struct {
	top    ocispec.Descriptor // what the index lists: a manifest, or a whole index
	config ocispec.Descriptor
	layers []ocispec.Descriptor
	names  []string // full, with tag
}

// Save writes images as an archive: an OCI layout, with Docker's manifest.json beside
// it unless the format is "oci". A repository's name without a tag means all of its
// tags. Errors before the first byte leave nothing written.
func (s *Service) Save(ctx context.Context, refs []string, o SaveOptions, w io.Writer) error {
	ctx = namespaced(ctx)
	if o.Format != "" && o.Format != "docker" && o.Format != "oci" {
		return fmt.Errorf("save: format %q: %w", o.Format, errdefs.ErrInvalidArgument)
	}
	if len(refs) == 0 {
		return fmt.Errorf("save: no image named: %w", errdefs.ErrInvalidArgument)
	}
	list, blobs, err := s.collect(ctx, refs, o)
	if err != nil {
		return err
	}
	tw := tar.NewWriter(w)
	if err := s.writeBlobs(ctx, tw, blobs); err != nil {
		return fmt.Errorf("save: %w", err)
	}
	docs, err := layoutDocuments(list, o.Format)
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(docs)) {
		if err := writeEntry(tw, name, docs[name]); err != nil {
			return fmt.Errorf("save: %w", err)
		}
	}
	if err := tw.Close(); err != nil {
		return fmt.Errorf("save: %w", err)
	}
	return nil
}

// collect finds the images and the blobs that belong to them.
func (s *Service) collect(ctx context.Context, refs []string, o SaveOptions) ([]*saved, []ocispec.Descriptor, error) {
	byTop := map[digest.Digest]*saved{}
	var list []*saved
	var blobs []ocispec.Descriptor
	seen := map[digest.Digest]bool{}
	for _, ref := range refs {
		records, byName, err := s.findAll(ctx, ref)
		if err != nil {
			return nil, nil, fmt.Errorf("save: %w", err)
		}
		for _, r := range records {
			one, own, err := s.savedImage(ctx, r, o.Platform)
			if err != nil {
				return nil, nil, fmt.Errorf("save %s: %w", ref, err)
			}
			have := byTop[one.top.Digest]
			if have == nil {
				have = one
				byTop[one.top.Digest] = have
				list = append(list, have)
			}
			if byName {
				have.names = append(have.names, r.Name)
			}
			for _, b := range own {
				if !seen[b.Digest] {
					seen[b.Digest] = true
					blobs = append(blobs, b)
				}
			}
		}
	}
	for _, one := range list {
		slices.Sort(one.names)
		one.names = slices.Compact(one.names)
	}
	return list, blobs, nil
}

// findAll is find that takes a bare repository name for all of its tags. byName says
// whether ref was a name with a tag, which the archive then keeps.
func (s *Service) findAll(ctx context.Context, ref string) (records []images.Image, byName bool, err error) {
	named, err := reference.ParseNormalizedNamed(ref)
	if err == nil && reference.IsNameOnly(named) {
		all, err := s.o.Images.List(ctx)
		if err != nil {
			return nil, false, err
		}
		for _, r := range all {
			n, err := reference.ParseNormalizedNamed(r.Name)
			if err != nil || n.Name() != named.Name() {
				continue
			}
			if _, ok := n.(reference.Tagged); ok && !isDigested(n) {
				records = append(records, r)
			}
		}
		if len(records) > 0 {
			return records, true, nil
		}
	}
	r, err := s.find(ctx, ref)
	if err != nil {
		return nil, false, err
	}
	full, err := parseName(ref)
	return []images.Image{r}, err == nil && full.String() == r.Name && !isDigested(full), nil
}

// savedImage gives one image and its blobs, which are all here.
func (s *Service) savedImage(ctx context.Context, r images.Image, p *ocispec.Platform) (*saved, []ocispec.Descriptor, error) {
	chosen, err := s.pick(ctx, r.Target, p)
	if err != nil {
		return nil, nil, err
	}
	doc, err := s.document(ctx, chosen)
	if err != nil {
		return nil, nil, err
	}
	one := &saved{top: chosen, config: doc.manifest.Config, layers: doc.manifest.Layers}
	one.top.MediaType = doc.mediaType
	blobs, err := s.closure(ctx, chosen, 0)
	if err != nil {
		return nil, nil, err
	}
	if p == nil && r.Target.Digest != chosen.Digest {
		// The whole index, if all that it lists is here.
		if whole, err := s.closure(ctx, r.Target, 0); err == nil {
			one.top, blobs = r.Target, whole
		}
	}
	one.top = ocispec.Descriptor{MediaType: one.top.MediaType, Digest: one.top.Digest, Size: one.top.Size}
	return one, blobs, nil
}

// closure gives a document's blobs, children first: errdefs.ErrNotFound if one is missing.
func (s *Service) closure(ctx context.Context, d ocispec.Descriptor, depth int) ([]ocispec.Descriptor, error) {
	doc, err := s.document(ctx, d)
	if err != nil {
		return nil, err
	}
	var list []ocispec.Descriptor
	if doc.index != nil {
		if depth == maxNesting {
			return nil, invalid(d.Digest.String(), "indexes nested too deep")
		}
		for _, child := range doc.index.Manifests {
			sub, err := s.closure(ctx, child, depth+1)
			if err != nil {
				return nil, err
			}
			list = append(list, sub...)
		}
		d.MediaType = doc.mediaType
		return append(list, d), nil
	}
	for _, b := range append(slices.Clone(doc.manifest.Layers), doc.manifest.Config) {
		if _, err := s.o.Content.Info(ctx, b.Digest); err != nil {
			return nil, err
		}
		list = append(list, b)
	}
	if _, err := s.o.Content.Info(ctx, d.Digest); err != nil {
		return nil, err
	}
	d.MediaType = doc.mediaType
	return append(list, d), nil
}

func (s *Service) writeBlobs(ctx context.Context, tw *tar.Writer, blobs []ocispec.Descriptor) error {
	dirs := map[string]bool{}
	for _, b := range blobs {
		dir := path.Join(ocispec.ImageBlobsDir, b.Digest.Algorithm().String())
		for _, d := range []string{ocispec.ImageBlobsDir, dir} {
			if !dirs[d] {
				dirs[d] = true
				if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d + "/", Mode: 0o755}); err != nil {
					return err
				}
			}
		}
		if err := s.writeBlob(ctx, tw, path.Join(dir, b.Digest.Encoded()), b); err != nil {
			return err
		}
	}
	return nil
}

func (s *Service) writeBlob(ctx context.Context, tw *tar.Writer, name string, b ocispec.Descriptor) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	ra, err := s.o.Content.ReaderAt(ctx, b)
	if err != nil {
		return err
	}
	defer ra.Close()
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o444, Size: ra.Size()}); err != nil {
		return err
	}
	_, err = io.Copy(tw, io.NewSectionReader(ra, 0, ra.Size()))
	return err
}

func writeEntry(tw *tar.Writer, name string, b []byte) error {
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o444, Size: int64(len(b))}); err != nil {
		return err
	}
	_, err := tw.Write(b)
	return err
}

// layoutDocuments makes the files that list the images.
func layoutDocuments(list []*saved, format string) (map[string][]byte, error) {
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}}
	docker := []dockerImage{}
	blob := func(d ocispec.Descriptor) string {
		return path.Join(ocispec.ImageBlobsDir, d.Digest.Algorithm().String(), d.Digest.Encoded())
	}
	for _, one := range list {
		if len(one.names) == 0 {
			idx.Manifests = append(idx.Manifests, one.top)
		}
		di := dockerImage{Config: blob(one.config), Layers: []string{}}
		for _, name := range one.names {
			d := one.top
			d.Annotations = nameAnnotations(name)
			idx.Manifests = append(idx.Manifests, d)
			if t := dockerTag(name); t != "" {
				di.RepoTags = append(di.RepoTags, t)
			}
		}
		for _, l := range one.layers {
			di.Layers = append(di.Layers, blob(l))
		}
		docker = append(docker, di)
	}
	docs := map[string][]byte{ocispec.ImageLayoutFile: []byte(`{"imageLayoutVersion":"` + ocispec.ImageLayoutVersion + `"}`)}
	var err error
	if docs[ocispec.ImageIndexFile], err = json.Marshal(idx); err != nil {
		return nil, err
	}
	if format != "oci" {
		if docs[dockerManifestFile], err = json.Marshal(docker); err != nil {
			return nil, err
		}
	}
	return docs, nil
}
