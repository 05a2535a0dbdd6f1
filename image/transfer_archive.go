package image

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/transfer"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/manifest"
	"github.com/hako-engine/hako/image/unpack"
	"github.com/hako-engine/hako/internal/ctxio"
)

// TransferImport takes in an archive: an OCI layout, or what docker save makes; as tar, or
// compressed. The list of its images is an index of its own, which a name of to is for; the images get
// the names that the archive tells, as far as to.References take them. With compress plain layers of
// Docker's kind of archive are stored with gzip.
func (s *Service) TransferImport(ctx context.Context, r io.Reader, compress bool, to Stored, tell transfer.ProgressFunc) (err error) {
	ctx = namespaced(ctx)
	defer func() { err = wrapf(err, "import") }()
	t := newTransfer("", tell, "importing")
	t.say("Importing")
	ctx, l, err := s.newLease(ctx)
	if err != nil {
		return err
	}
	defer l.release()
	p := newProgress(t.line)
	defer p.close(ctx)
	w := s.newWork(l, "", p)
	defer w.release()
	a := &archive{w: w, docs: map[string][]byte{}, blobs: map[string]ocispec.Descriptor{}, links: map[string]string{}}
	if err := a.read(ctx, r); err != nil {
		return err
	}
	index, err := a.index(ctx, compress)
	if err != nil {
		return err
	}
	sel := to.selection()
	sel.lenient = true
	top, err := manifest.Parse(ocispec.ImageIndexFile, ocispec.MediaTypeImageIndex, index)
	if err != nil {
		return err
	}
	root := &part{doc: top, desc: ocispec.Descriptor{MediaType: top.MediaType, Digest: digest.FromBytes(index), Size: int64(len(index))}}
	type named struct {
		desc ocispec.Descriptor
		told map[string]string
	}
	var list []named
	for _, d := range top.Index.Manifests {
		list = append(list, named{d, d.Annotations})
		if sel.match != nil && d.Platform != nil && d.Platform.OS != "" && !sel.match.Match(*d.Platform) {
			continue
		}
		if d.MediaType != "" && !isDocument(d) {
			root.blobs = append(root.blobs, d)
			continue
		}
		child, err := tree(ctx, d, sel, s.readStored)
		if err != nil {
			return err
		}
		for _, b := range child.allBlobs() {
			if _, err := s.o.Content.Info(ctx, b.Digest); err != nil {
				return fmt.Errorf("image %s: %w", d.Digest, err)
			}
		}
		root.children = append(root.children, child)
	}
	list = append([]named{{desc: root.desc}}, list...)
	for i, n := range list {
		if n.told == nil && n.desc.Digest != root.desc.Digest {
			list[i].told = map[string]string{}
		}
		if err := s.mayStore(ctx, to, n.desc, list[i].told); err != nil {
			return err
		}
	}
	t.learn(root)
	for _, c := range root.children {
		if _, err := s.unpackTree(ctx, w, c, to.Unpacks); err != nil {
			return err
		}
	}
	if err := s.putTree(ctx, w, root); err != nil {
		return err
	}
	p.close(ctx)
	for _, n := range list {
		if _, err := s.storeNames(ctx, to, n.desc, n.told, t); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	t.say("Completed import")
	return nil
}

// isDocument says whether a descriptor is of a manifest or index.
func isDocument(d ocispec.Descriptor) bool { return manifest.IsDocument(d.MediaType) }

// index gives the list of an archive's images: the one of an OCI layout, or one made of
// Docker's manifest.json, whose manifests are stored.
func (a *archive) index(ctx context.Context, compress bool) ([]byte, error) {
	_, isLayout := a.docs[ocispec.ImageLayoutFile]
	if raw, ok := a.docs[ocispec.ImageIndexFile]; ok && isLayout {
		return raw, nil
	}
	dm, err := a.dockerManifest()
	if err != nil {
		return nil, err
	}
	if dm == nil {
		return nil, invalid("archive", "neither an OCI layout nor manifest.json in it")
	}
	list, err := a.fromDocker(ctx, dm, nil)
	if err != nil {
		return nil, err
	}
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}}
	for i := range list {
		f := &list[i]
		if compress {
			if err := a.compress(ctx, f); err != nil {
				return nil, err
			}
		}
		for d, body := range f.blobs {
			if err := a.w.s.storeDocument(ctx, d, body, nil); err != nil {
				return nil, err
			}
		}
		d := f.target
		p := f.config.platform()
		d.Platform = &p
		if len(f.names) == 0 {
			idx.Manifests = append(idx.Manifests, d)
		}
		for _, n := range f.names {
			d.Annotations = nameAnnotations(n)
			idx.Manifests = append(idx.Manifests, d)
		}
	}
	return json.Marshal(idx)
}

// compress stores the plain layers of an image with gzip, and makes its manifest anew.
func (a *archive) compress(ctx context.Context, f *found) error {
	for i, l := range f.manifest.Layers {
		if l.MediaType != dockerLayer {
			continue
		}
		d, _, err := a.w.s.storeStream(ctx, diff.Config{MediaType: dockerLayerGzip}, unpack.Gzip, func(w io.Writer) error {
			ra, err := a.w.s.o.Content.ReaderAt(ctx, l)
			if err != nil {
				return err
			}
			defer ra.Close()
			_, err = io.Copy(w, ctxio.Reader(ctx, io.NewSectionReader(ra, 0, ra.Size()), nil))
			return err
		})
		if err != nil {
			return err
		}
		f.manifest.Layers[i] = d
	}
	raw, err := json.Marshal(f.manifest)
	if err != nil {
		return err
	}
	delete(f.blobs, f.target.Digest)
	f.target.Digest, f.target.Size = digest.FromBytes(raw), int64(len(raw))
	f.chosen, f.blobs[f.target.Digest] = f.target, raw
	return nil
}

// nameAnnotations tell a name as containerd does: the whole of it, and its last part.
func nameAnnotations(name string) map[string]string {
	tag := name[strings.LastIndexByte(name, '/')+1:]
	if _, after, ok := strings.Cut(tag, "@"); ok {
		tag = after
	} else if _, after, ok := strings.Cut(tag, ":"); ok {
		tag = after
	}
	return map[string]string{annotationName: name, ocispec.AnnotationRefName: tag}
}

// ArchiveOptions of an export.
type ArchiveOptions struct {
	Platforms    []ocispec.Platform // none: the host's
	AllPlatforms bool
	// NoDocker leaves out Docker's manifest.json.
	NoDocker bool
	// NoForeign leaves out layers that must not be distributed.
	NoForeign bool
}

// TransferExport writes images of the store as an OCI layout, with Docker's manifest.json
// beside it. The indexes are whole even where only some platforms' images are.
func (s *Service) TransferExport(ctx context.Context, from Stored, w io.Writer, o ArchiveOptions, tell transfer.ProgressFunc) (err error) {
	ctx = namespaced(ctx)
	defer func() { err = wrapf(err, "export") }()
	t := newTransfer("", tell, "exporting")
	t.say("Exporting")
	records, err := s.records(ctx, from)
	if err != nil {
		return err
	}
	sel := selection{match: selectPlatforms(o.Platforms)}
	best := platforms.Default()
	switch {
	case len(o.Platforms) > 0:
		best = platforms.Ordered(o.Platforms...)
	case !o.AllPlatforms:
		sel.match = platforms.DefaultStrict()
	}
	var list []*saved
	var blobs []ocispec.Descriptor
	format, seen := "", map[digest.Digest]bool{}
	if o.NoDocker {
		format = "oci"
	}
	for _, r := range records {
		root, err := tree(ctx, r.Target, sel, s.readStored)
		if err != nil {
			return fmt.Errorf("image %s: %w", r.Name, err)
		}
		one := &saved{top: ocispec.Descriptor{MediaType: root.desc.MediaType, Digest: r.Target.Digest, Size: r.Target.Size, Platform: r.Target.Platform}, names: []string{r.Name}}
		found, _, err := s.imageOf(ctx, root, best)
		switch {
		case err == nil:
			one.config, one.layers = found.doc.Manifest.Config, found.doc.Manifest.Layers
		case errors.Is(err, errNoImage):
			format = "oci" // Docker could not load it
		default:
			return fmt.Errorf("image %s: %w", r.Name, err)
		}
		list = append(list, one)
		own := root.allBlobs()
		_ = root.each(func(p *part) error { own = append(own, p.desc); return nil })
		for _, b := range own {
			if seen[b.Digest] || o.NoForeign && images.IsNonDistributable(b.MediaType) {
				continue
			}
			seen[b.Digest] = true
			if _, err := s.o.Content.Info(ctx, b.Digest); err != nil {
				return fmt.Errorf("image %s: %w", r.Name, err)
			}
			blobs = append(blobs, b)
		}
	}
	docs, err := layoutDocuments(list, format)
	if err != nil {
		return err
	}
	tw := tar.NewWriter(w)
	if err := s.writeBlobs(ctx, tw, blobs); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(docs)) {
		if err := writeEntry(tw, name, docs[name]); err != nil {
			return err
		}
	}
	if err := tw.Close(); err != nil {
		return err
	}
	t.say("Completed export")
	return nil
}

// records finds the images that are named.
func (s *Service) records(ctx context.Context, from Stored) (list []images.Image, err error) {
	names := []string{}
	if from.Name != "" {
		names = append(names, from.Name)
	}
	for _, r := range from.References {
		if r.IsPrefix {
			return nil, fmt.Errorf("images by a prefix of their names: %w", errdefs.ErrNotImplemented)
		}
		names = append(names, r.Name)
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("no image named: %w", errdefs.ErrInvalidArgument)
	}
	for _, n := range names {
		img, err := s.o.Images.Get(ctx, n)
		if err != nil {
			return nil, err
		}
		list = append(list, img)
	}
	return list, nil
}

// dockerTag is a name as Docker's manifest.json has it; "" for one that Docker has not.
func dockerTag(name string) string {
	n, err := reference.ParseNormalizedNamed(name)
	if err != nil || isDigested(n) {
		return ""
	}
	return reference.FamiliarString(n)
}
