package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/manifest"
	"github.com/hako-engine/hako/image/registry"
	"github.com/hako-engine/hako/image/unpack"
)

const (
	dockerManifestFile = "manifest.json"
	// annotationName is what containerd and Docker name an image by in an index.json.
	annotationName = "io.containerd.image.name"

	maxArchiveEntries = 100_000
	maxArchiveSize    = 1 << 40  // bytes
	maxArchiveMemory  = 64 << 20 // bytes of small documents
	maxArchiveImages  = 10_000

	// smallBlob is what loads faster than anybody can see; most such are documents.
	smallBlob = 16 << 10
)

// archive is what a docker-archive or an OCI layout held, in whichever order.
type archive struct {
	w     *work
	docs  map[string][]byte             // small documents by name
	blobs map[string]ocispec.Descriptor // what is in the store, by name; media types are not set
	links map[string]string             // name to name
	bytes int64                         // of docs
}

// Load takes in the images of an archive: docker save's (of any version, also with
// compressed layers), or an OCI layout; as tar, or compressed with gzip or zstd.
// Layers are stored, checked and unpacked as those of a pull.
//
// Errors are as those of Pull: ErrInvalidArgument for what is no such archive.
func (s *Service) Load(ctx context.Context, r io.Reader, o LoadOptions) ([]Loaded, error) {
	ctx = namespaced(ctx)
	sName, _, err := s.snapshotter(o.Snapshotter)
	if err != nil {
		return nil, err
	}
	ctx, l, err := s.newLease(ctx)
	if err != nil {
		return nil, err
	}
	defer l.release()
	p := newProgress(o.Progress)
	defer p.close(ctx)
	w := s.newWork(l, sName, p)
	defer w.release()
	a := &archive{w: w, docs: map[string][]byte{}, blobs: map[string]ocispec.Descriptor{}, links: map[string]string{}}
	if err := a.read(ctx, r); err != nil {
		return nil, fmt.Errorf("load archive: %w", err)
	}
	found, err := a.images(ctx, o.Platform)
	if err != nil {
		return nil, fmt.Errorf("load archive: %w", err)
	}
	var loaded []Loaded
	for _, f := range found {
		one, err := a.load(ctx, f)
		if err != nil {
			return loaded, fmt.Errorf("load archive: %w", err)
		}
		loaded = append(loaded, one)
	}
	return loaded, nil
}

// load unpacks one image and names it.
func (a *archive) load(ctx context.Context, f found) (Loaded, error) {
	s := a.w.s
	what := f.chosen.Digest.String()
	if len(f.names) > 0 {
		what = f.names[0]
	}
	for _, n := range f.names {
		if err := s.mayName(ctx, n, f.target); err != nil {
			return Loaded{}, err
		}
	}
	if err := a.w.image(ctx, what, &f.resolved); err != nil {
		return Loaded{}, fmt.Errorf("image %s: %w", what, err)
	}
	for _, n := range f.names {
		if err := s.setName(ctx, n, f.target); err != nil {
			return Loaded{}, fmt.Errorf("image %s: %w", what, err)
		}
	}
	if len(f.names) == 0 {
		if err := s.keepNameless(ctx, f.target); err != nil {
			return Loaded{}, fmt.Errorf("image %s: %w", what, err)
		}
	}
	img, err := s.describe(ctx, f.target, f.chosen)
	if err != nil {
		return Loaded{}, fmt.Errorf("image %s: %w", what, err)
	}
	return Loaded{Image: img, Names: f.names}, nil
}

// read takes in the whole archive.
func (a *archive) read(ctx context.Context, r io.Reader) error {
	dec, err := unpack.NewDecoder(r, unpack.Limits{Size: maxArchiveSize, Ratio: a.w.s.o.Limits.Ratio, RatioFrom: a.w.s.o.Limits.RatioFrom})
	if err != nil {
		return err
	}
	defer dec.Close()
	tr := tar.NewReader(dec)
	for entries := 0; ; entries++ {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			if entries == 0 {
				return invalid("archive", "it is empty")
			}
			return nil
		}
		if err != nil {
			return readError(err)
		}
		if entries >= maxArchiveEntries {
			return fmt.Errorf("more than %d entries: %w", maxArchiveEntries, errdefs.ErrResourceExhausted)
		}
		if len(hdr.Name) > 1024 || len(hdr.Linkname) > 1024 {
			return invalid("archive", "entry with a name of more than 1024 bytes")
		}
		name := strings.TrimPrefix(path.Clean("/"+hdr.Name), "/")
		switch hdr.Typeflag {
		case tar.TypeReg:
			if err := a.file(ctx, name, hdr.Size, tr); err != nil {
				return fmt.Errorf("entry %q: %w", hdr.Name, err)
			}
		case tar.TypeSymlink:
			// Old versions of docker save have a layer that several images share once.
			a.links[name] = strings.TrimPrefix(path.Clean("/"+path.Join(path.Dir(name), hdr.Linkname)), "/")
		case tar.TypeLink:
			a.links[name] = strings.TrimPrefix(path.Clean("/"+hdr.Linkname), "/")
		}
	}
}

// readError gives errors of a broken archive their class; those of the stream pass.
func readError(err error) error {
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, tar.ErrFieldTooLong) {
		return fmt.Errorf("not a tar archive, or a truncated one: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return err
}

// file takes in one regular file.
func (a *archive) file(ctx context.Context, name string, size int64, r io.Reader) error {
	base := path.Base(name)
	isBlob := strings.HasPrefix(name, ocispec.ImageBlobsDir+"/")
	if !isBlob && (strings.HasSuffix(name, ".json") || base == "json" || base == "VERSION" || base == "repositories" || base == ocispec.ImageLayoutFile) {
		if size > maxDocument*4 {
			return fmt.Errorf("document of %d bytes: %w", size, errdefs.ErrResourceExhausted)
		}
		if a.bytes += size; a.bytes > maxArchiveMemory {
			return fmt.Errorf("documents of more than %d bytes: %w", maxArchiveMemory, errdefs.ErrResourceExhausted)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			return readError(err)
		}
		a.docs[name] = b
		return nil
	}
	var want digest.Digest
	if isBlob {
		alg, hex, _ := strings.Cut(strings.TrimPrefix(name, ocispec.ImageBlobsDir+"/"), "/")
		want = digest.NewDigestFromEncoded(digest.Algorithm(alg), hex)
		if err := manifest.ValidDigest(want); err != nil {
			return err
		}
	}
	d, err := a.blob(ctx, name, size, want, r)
	if err != nil {
		return err
	}
	a.blobs[name] = d
	return nil
}

// blob stores a file, and gives its digest. want may be "".
func (a *archive) blob(ctx context.Context, name string, size int64, want digest.Digest, r io.Reader) (ocispec.Descriptor, error) {
	store := a.w.s.o.Content
	ref := "load-" + a.w.l.l.ID + "-" + name
	cw, err := content.OpenWriter(ctx, store, content.WithRef(ref), content.WithDescriptor(ocispec.Descriptor{Digest: want, Size: size}))
	if errdefs.IsAlreadyExists(err) {
		return ocispec.Descriptor{Digest: want, Size: size}, nil
	}
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	done := false
	defer func() {
		cw.Close()
		if !done {
			if err := store.Abort(context.WithoutCancel(ctx), ref); err != nil && !errdefs.IsNotFound(err) {
				a.w.s.o.Log.Warn("unfinished blob stays", "ref", ref, "err", err)
			}
		}
	}()
	st, err := cw.Status()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if want != "" && st.Offset == size {
		r = bytes.NewReader(nil) // another namespace has it
	}
	var off int64
	for {
		c := newChunk()
		n, err := readChunk(r, c.buf[:])
		if n > 0 {
			if _, werr := cw.Write(c.buf[:n]); werr != nil {
				c.free()
				return ocispec.Descriptor{}, werr
			}
			off += int64(n)
			if size > smallBlob {
				a.w.p.line(Progress{ID: progressID(name, want), Action: "Loading layer", Current: off, Total: size})
			}
		}
		c.free()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return ocispec.Descriptor{}, readError(err)
		}
		if ctx.Err() != nil {
			return ocispec.Descriptor{}, context.Cause(ctx)
		}
	}
	got := cw.Digest()
	if want != "" && got != want {
		return ocispec.Descriptor{}, fmt.Errorf("its contents have digest %s: %w", got, errdefs.ErrDataLoss)
	}
	err = cw.Commit(ctx, size, got)
	done = err == nil || errdefs.IsAlreadyExists(err)
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return ocispec.Descriptor{}, err
	}
	return ocispec.Descriptor{Digest: got, Size: size}, nil
}

func progressID(name string, want digest.Digest) string {
	if want != "" {
		return short(want)
	}
	if name = path.Dir(name); len(name) > 12 {
		name = name[:12]
	}
	return name
}

// lookup finds a file by the name that a manifest.json uses, through links.
func (a *archive) lookup(name string) (string, error) {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	for range 10 {
		if _, ok := a.docs[name]; ok {
			return name, nil
		}
		if _, ok := a.blobs[name]; ok {
			return name, nil
		}
		next, ok := a.links[name]
		if !ok {
			break
		}
		name = next
	}
	return "", invalid("archive", "file %q is missing", name)
}

// document reads a file of the archive, wherever it was put.
func (a *archive) document(ctx context.Context, name string) ([]byte, error) {
	at, err := a.lookup(name)
	if err != nil {
		return nil, err
	}
	if b, ok := a.docs[at]; ok {
		return b, nil
	}
	return readBlob(ctx, a.w.s.o.Content, a.blobs[at])
}

// found is an image of the archive.
type found struct {
	resolved
	names []string // full
}

// images lists what the archive holds: by its index if it is an OCI layout, else by
// Docker's manifest.json.
func (a *archive) images(ctx context.Context, p *ocispec.Platform) ([]found, error) {
	dm, err := a.dockerManifest()
	if err != nil {
		return nil, err
	}
	_, isLayout := a.docs[ocispec.ImageLayoutFile]
	index, hasIndex := a.docs[ocispec.ImageIndexFile]
	switch {
	case hasIndex && (isLayout || dm == nil):
		return a.fromIndex(ctx, index, dm, p)
	case dm != nil:
		return a.fromDocker(ctx, dm, p)
	}
	return nil, invalid("archive", "neither manifest.json nor index.json in it")
}

// dockerImage is an element of manifest.json (moby's image specification, v1.2).
type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

func (a *archive) dockerManifest() ([]dockerImage, error) {
	raw, ok := a.docs[dockerManifestFile]
	if !ok {
		return nil, nil
	}
	var list []dockerImage
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, invalid(dockerManifestFile, "%v", err)
	}
	if len(list) == 0 {
		return nil, invalid(dockerManifestFile, "no image in it")
	}
	if len(list) > maxArchiveImages {
		return nil, fmt.Errorf("%s: more than %d images: %w", dockerManifestFile, maxArchiveImages, errdefs.ErrResourceExhausted)
	}
	return list, nil
}

// fromDocker makes manifests for the images of a manifest.json.
func (a *archive) fromDocker(ctx context.Context, list []dockerImage, p *ocispec.Platform) ([]found, error) {
	var out []found
	for _, di := range list {
		names, err := tagNames(di.RepoTags)
		if err != nil {
			return nil, err
		}
		body, err := a.document(ctx, di.Config)
		if err != nil {
			return nil, err
		}
		c, err := parseConfig(di.Config, body)
		if err != nil {
			return nil, err
		}
		if p != nil && !matcher(p).Match(c.platform()) {
			continue
		}
		m := ocispec.Manifest{
			Versioned: specs.Versioned{SchemaVersion: 2},
			MediaType: registry.DockerManifest,
			Config:    ocispec.Descriptor{MediaType: dockerConfig, Digest: digest.FromBytes(body), Size: int64(len(body))},
			Layers:    []ocispec.Descriptor{},
		}
		if len(di.Layers) != len(c.diffIDs) {
			return nil, invalid(dockerManifestFile, "%d layers, but %d in the config %s", len(di.Layers), len(c.diffIDs), di.Config)
		}
		for i, name := range di.Layers {
			d, err := a.layer(ctx, name, c.diffIDs[i])
			if err != nil {
				return nil, err
			}
			m.Layers = append(m.Layers, d)
		}
		raw, err := json.Marshal(m)
		if err != nil {
			return nil, err
		}
		target := ocispec.Descriptor{MediaType: m.MediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
		out = append(out, found{
			resolved: resolved{target: target, chosen: target, manifest: &m, config: c, blobs: map[digest.Digest][]byte{target.Digest: raw, m.Config.Digest: body}},
			names:    names,
		})
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("no image for %s in it: %w", platformName(p), errdefs.ErrNotFound)
	}
	return out, nil
}

// layer finds the blob of a layer, and what it is compressed with.
func (a *archive) layer(ctx context.Context, name string, diffID digest.Digest) (ocispec.Descriptor, error) {
	at, err := a.lookup(name)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d, ok := a.blobs[at]
	if !ok {
		return d, invalid("archive", "layer %q is a document", name)
	}
	ra, err := a.w.s.o.Content.ReaderAt(ctx, d)
	if err != nil {
		return d, err
	}
	defer ra.Close()
	head := make([]byte, 4)
	n, err := ra.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return d, err
	}
	switch unpack.Detect(head[:n]) {
	case unpack.Gzip:
		d.MediaType = dockerLayerGzip
	case unpack.Zstd:
		d.MediaType = dockerLayerZstd
	default:
		d.MediaType = dockerLayer
		if d.Digest.Algorithm() == diffID.Algorithm() && d.Digest != diffID {
			return d, fmt.Errorf("layer %q has diff id %s, not %s as the config says: %w", name, d.Digest, diffID, errdefs.ErrDataLoss)
		}
	}
	return d, nil
}

// tagNames completes names; they must have a tag, and none may claim a digest.
func tagNames(tags []string) ([]string, error) {
	var names []string
	for _, t := range tags {
		n, err := parseName(t)
		if err != nil {
			return nil, err
		}
		if isDigested(n) {
			return nil, invalid("archive", "name %q claims a digest", t)
		}
		names = append(names, n.String())
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// fromIndex reads the images of an OCI layout. Names come from annotations, or from a
// manifest.json beside.
func (a *archive) fromIndex(ctx context.Context, raw []byte, dm []dockerImage, p *ocispec.Platform) ([]found, error) {
	if bytes.Equal(bytes.TrimSpace(raw), []byte("null")) {
		return nil, invalid(ocispec.ImageIndexFile, "null")
	}
	doc, err := parseDocument(ocispec.ImageIndexFile, "", raw)
	if err != nil {
		return nil, err
	}
	if doc.index == nil {
		return nil, invalid(ocispec.ImageIndexFile, "not an index")
	}
	if len(doc.index.Manifests) > maxArchiveImages {
		return nil, fmt.Errorf("%s: more than %d images: %w", ocispec.ImageIndexFile, maxArchiveImages, errdefs.ErrResourceExhausted)
	}
	m := matcher(p)
	var out []found
	var skipped error
	for _, d := range doc.index.Manifests {
		if d.Platform != nil && (d.Platform.OS == "unknown" || p != nil && !m.Match(*d.Platform)) || !isManifestType(d.MediaType) {
			continue
		}
		f, err := a.fromDescriptor(ctx, d, p)
		if errdefs.IsNotFound(err) {
			skipped = err
			continue
		}
		if err != nil {
			return nil, err
		}
		if f.names, err = annotatedNames(d.Annotations); err != nil {
			return nil, err
		}
		for _, di := range dm {
			if len(f.names) == 0 && strings.Contains(di.Config, f.manifest.Config.Digest.Encoded()) {
				if f.names, err = tagNames(di.RepoTags); err != nil {
					return nil, err
				}
			}
		}
		if i := slices.IndexFunc(out, func(o found) bool { return o.target.Digest == f.target.Digest }); i >= 0 {
			out[i].names = append(out[i].names, f.names...) // one image, an entry per name
			continue
		}
		out = append(out, f)
	}
	if len(out) == 0 {
		return nil, errors.Join(fmt.Errorf("no image for %s in it: %w", platformName(p), errdefs.ErrNotFound), skipped)
	}
	return out, nil
}

// fromDescriptor follows an entry of the index to a manifest whose blobs are here.
func (a *archive) fromDescriptor(ctx context.Context, d ocispec.Descriptor, p *ocispec.Platform) (found, error) {
	s := a.w.s
	f := found{resolved: resolved{target: d, blobs: map[digest.Digest][]byte{}}}
	body, err := readBlob(ctx, s.o.Content, d)
	if err != nil {
		return f, err
	}
	doc, err := f.add(d.Digest.String(), &f.target, body)
	if err != nil {
		return f, err
	}
	f.chosen = f.target
	for depth := 0; doc.index != nil; depth++ {
		list := manifest.Candidates(doc.index, matcher(p))
		if p == nil {
			list = append(list, doc.index.Manifests...)
		}
		i := slices.IndexFunc(list, func(c ocispec.Descriptor) bool {
			_, err := s.o.Content.Info(ctx, c.Digest)
			return err == nil && isManifestType(c.MediaType)
		})
		if i < 0 || depth == maxNesting {
			return f, fmt.Errorf("no image for %s in index %s: %w", platformName(p), f.chosen.Digest, errdefs.ErrNotFound)
		}
		f.indexes = append(f.indexes, f.chosen)
		f.chosen = list[i]
		if body, err = readBlob(ctx, s.o.Content, f.chosen); err != nil {
			return f, err
		}
		if doc, err = f.add(f.chosen.Digest.String(), &f.chosen, body); err != nil {
			return f, err
		}
	}
	f.manifest = doc.manifest
	if body, err = readBlob(ctx, s.o.Content, f.manifest.Config); err != nil {
		if errdefs.IsNotFound(err) {
			return f, invalid("archive", "config %s is missing", f.manifest.Config.Digest)
		}
		return f, err
	}
	f.blobs[f.manifest.Config.Digest] = body
	if f.config, err = parseConfig("config "+f.manifest.Config.Digest.String(), body); err != nil {
		return f, err
	}
	for _, l := range f.manifest.Layers {
		if _, err := s.o.Content.Info(ctx, l.Digest); errdefs.IsNotFound(err) {
			return f, invalid("archive", "layer %s is missing", l.Digest)
		}
	}
	return f, f.config.fits(f.chosen.Digest.String(), f.manifest)
}

// annotatedNames reads an image's name from its entry in an index.json.
func annotatedNames(annotations map[string]string) ([]string, error) {
	if n := annotations[annotationName]; n != "" {
		return tagNames([]string{n})
	}
	// By the specification just a tag; some tools put the whole name there.
	n := annotations[ocispec.AnnotationRefName]
	if !strings.ContainsAny(n, "/:") {
		return nil, nil
	}
	if _, err := reference.ParseNormalizedNamed(n); err != nil {
		return nil, nil
	}
	return tagNames([]string{n})
}
