package transport

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/image/manifest"
	"github.com/hako-engine/hako/image/unpack"
	"github.com/hako-engine/hako/internal/ctxio"
)

const (
	maxEntries     = 200_000
	maxNameLength  = 1024
	maxArchiveSize = 1 << 40 // bytes, decompressed
	maxLayers      = 500
)

// tarball is an archive whose files are read in place.
type tarball struct {
	f     *os.File
	temp  bool
	at    map[string]extent
	links map[string]string
}

type extent struct{ off, size int64 }

// openTarball indexes an archive. A compressed one is decompressed into an unnamed file in
// the temporary folder first.
func openTarball(ctx context.Context, name string) (_ *tarball, err error) {
	f, err := os.Open(name)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
		}
		return nil, err
	}
	t := &tarball{f: f}
	defer func() {
		if err != nil {
			t.Close()
		}
	}()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.IsDir() {
		return nil, fmt.Errorf("%s is a folder, not an archive: %w", name, errdefs.ErrInvalidArgument)
	}
	var magic [4]byte
	n, _ := io.ReadFull(f, magic[:])
	if compressed(magic[:n]) || !st.Mode().IsRegular() {
		in := io.MultiReader(bytes.NewReader(magic[:n]), f)
		if err := t.spool(ctx, in); err != nil {
			return nil, err
		}
		f.Close()
	}
	return t, t.index(ctx)
}

func compressed(magic []byte) bool {
	return bytes.HasPrefix(magic, []byte{0x1f, 0x8b}) || bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd})
}

// readTarball indexes an archive that comes as a stream.
func readTarball(ctx context.Context, r io.Reader) (*tarball, error) {
	t := &tarball{}
	err := t.spool(ctx, r)
	if err == nil {
		err = t.index(ctx)
	}
	if err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

// spool puts a stream, decompressed, into a file that has no name any more.
func (t *tarball) spool(ctx context.Context, r io.Reader) error {
	dec, err := unpack.NewDecoder(bufio.NewReaderSize(r, 256<<10), unpack.Limits{Size: maxArchiveSize})
	if err != nil {
		return err
	}
	defer dec.Close()
	f, err := os.CreateTemp("", "hako-archive-*")
	if err != nil {
		return err
	}
	t.f, t.temp = f, true
	if err := os.Remove(f.Name()); err != nil {
		return err
	}
	_, err = io.Copy(f, ctxio.Reader(ctx, dec, nil))
	return err
}

// index notes where each file lies.
func (t *tarball) index(ctx context.Context) error {
	if _, err := t.f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	t.at, t.links = map[string]extent{}, map[string]string{}
	tr := tar.NewReader(t.f)
	for n := 0; ; n++ {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			if n == 0 {
				return fmt.Errorf("the archive is empty: %w", errdefs.ErrInvalidArgument)
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("not a tar archive, or a truncated one: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		if n >= maxEntries {
			return fmt.Errorf("more than %d entries: %w", maxEntries, errdefs.ErrResourceExhausted)
		}
		if len(hdr.Name) > maxNameLength || len(hdr.Linkname) > maxNameLength {
			return fmt.Errorf("an entry has a name of more than %d bytes: %w", maxNameLength, errdefs.ErrInvalidArgument)
		}
		name := inside(hdr.Name)
		switch hdr.Typeflag {
		case tar.TypeReg:
			off, err := t.f.Seek(0, io.SeekCurrent)
			if err != nil {
				return err
			}
			t.at[name] = extent{off, hdr.Size}
			delete(t.links, name)
		case tar.TypeSymlink: // docker save of old shares layers so
			t.links[name] = inside(path.Join(path.Dir("/"+name), hdr.Linkname))
		case tar.TypeLink:
			t.links[name] = inside(hdr.Linkname)
		}
	}
}

// inside keeps a name below the root of the archive.
func inside(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

func (t *tarball) open(name string, offset int64) (io.ReadCloser, int64, error) {
	name = inside(name)
	for range 10 {
		if e, ok := t.at[name]; ok {
			return io.NopCloser(io.NewSectionReader(t.f, e.off+offset, max(e.size-offset, 0))), e.size, nil
		}
		next, ok := t.links[name]
		if !ok {
			break
		}
		name = next
	}
	return nil, 0, fmt.Errorf("%s: %w", name, errdefs.ErrNotFound)
}

func (t *tarball) Close() error {
	if t.f == nil {
		return nil
	}
	return t.f.Close()
}

// OpenArchive gives an image of an archive: an OCI layout's, or docker save's.
func OpenArchive(ctx context.Context, r Ref) (Source, error) {
	t, err := openTarball(ctx, r.Path)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", r, err)
	}
	s, err := newArchive(ctx, t, r)
	if err != nil {
		t.Close()
		return nil, err
	}
	return s, nil
}

// ReadArchive gives an image of an archive that comes as a stream. Tag is the image's name
// in it, "" the only one.
func ReadArchive(ctx context.Context, r Ref, stream io.Reader) (Source, error) {
	t, err := readTarball(ctx, stream)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", r, err)
	}
	s, err := newArchive(ctx, t, r)
	if err != nil {
		t.Close()
		return nil, err
	}
	return s, nil
}

func newArchive(ctx context.Context, t *tarball, r Ref) (Source, error) {
	_, isLayout := t.at[ocispec.ImageIndexFile]
	if isLayout || r.Kind == LayoutArchive {
		return newLayout(t, r)
	}
	return newDockerArchive(ctx, t, r)
}

// dockerImage is an entry of docker save's manifest.json.
type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// dockerArchive is an archive of docker save without an OCI layout in it: the manifest that
// it lacks is made up of what it has.
type dockerArchive struct {
	t     *tarball
	ref   Ref
	desc  ocispec.Descriptor
	raw   []byte
	files map[digest.Digest]string
}

func newDockerArchive(ctx context.Context, t *tarball, r Ref) (*dockerArchive, error) {
	raw, err := readSmall(t, dockerManifestFile, maxIndex)
	if err != nil {
		if errdefs.IsNotFound(err) {
			return nil, fmt.Errorf("%s: not an archive of images: it has neither %s nor %s: %w", r, ocispec.ImageIndexFile, dockerManifestFile, errdefs.ErrInvalidArgument)
		}
		return nil, fmt.Errorf("%s: %w", r, err)
	}
	var list []dockerImage
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, fmt.Errorf("%s: %s: %w: %w", r, dockerManifestFile, err, errdefs.ErrInvalidArgument)
	}
	img, err := pickDockerImage(r, list)
	if err != nil {
		return nil, err
	}
	if len(img.Layers) > maxLayers {
		return nil, fmt.Errorf("%s: %d layers, more than %d: %w", r, len(img.Layers), maxLayers, errdefs.ErrResourceExhausted)
	}
	a := &dockerArchive{t: t, ref: r, files: map[digest.Digest]string{}}
	config, err := readSmall(t, img.Config, manifest.MaxSize)
	if err != nil {
		return nil, fmt.Errorf("%s: config: %w", r, err)
	}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: manifest.DockerManifest, Layers: []ocispec.Descriptor{}}
	m.Config = ocispec.Descriptor{MediaType: manifest.DockerConfig, Digest: digest.FromBytes(config), Size: int64(len(config))}
	a.files[m.Config.Digest] = img.Config
	for i, name := range img.Layers {
		d, err := a.layer(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("%s: layer %d: %w", r, i, err)
		}
		m.Layers = append(m.Layers, d)
	}
	if a.raw, err = json.Marshal(m); err != nil {
		return nil, err
	}
	a.desc = ocispec.Descriptor{MediaType: m.MediaType, Digest: digest.FromBytes(a.raw), Size: int64(len(a.raw))}
	return a, nil
}

func pickDockerImage(r Ref, list []dockerImage) (dockerImage, error) {
	var all []string
	for _, i := range list {
		for _, t := range i.RepoTags {
			n, err := reference.ParseNormalizedNamed(t)
			if err != nil {
				continue
			}
			if all = append(all, n.String()); r.Tag != "" && n.String() == r.Tag {
				return i, nil
			}
		}
	}
	switch {
	case r.Tag != "":
		return dockerImage{}, fmt.Errorf("%s: no such image, there are: %s: %w", r, clipList(all), errdefs.ErrNotFound)
	case len(list) != 1:
		return dockerImage{}, fmt.Errorf("%s holds %d images, name one of: %s: %w", r, len(list), clipList(all), errdefs.ErrInvalidArgument)
	}
	return list[0], nil
}

// layer describes a layer's file.
func (a *dockerArchive) layer(ctx context.Context, name string) (ocispec.Descriptor, error) {
	rc, size, err := a.t.open(name, 0)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer rc.Close()
	hash := digest.SHA256.Hash()
	head := bytes.Buffer{}
	if _, err := io.CopyN(io.MultiWriter(&head, hash), rc, min(4, size)); err != nil {
		return ocispec.Descriptor{}, err
	}
	if _, err := io.Copy(hash, ctxio.Reader(ctx, rc, nil)); err != nil {
		return ocispec.Descriptor{}, err
	}
	d := ocispec.Descriptor{MediaType: manifest.DockerLayer, Digest: digest.NewDigest(digest.SHA256, hash), Size: size}
	switch {
	case bytes.HasPrefix(head.Bytes(), []byte{0x1f, 0x8b}):
		d.MediaType = manifest.DockerLayerGzip
	case compressed(head.Bytes()):
		d.MediaType = manifest.DockerLayerZstd
	}
	a.files[d.Digest] = name
	return d, nil
}

func (a *dockerArchive) Top(context.Context) (ocispec.Descriptor, []byte, error) {
	return a.desc, a.raw, nil
}

func (a *dockerArchive) Tagged(_ context.Context, tag string) (ocispec.Descriptor, []byte, error) {
	return ocispec.Descriptor{}, nil, fmt.Errorf("%s: %s: %w", a.ref, tag, errdefs.ErrNotFound)
}

func (a *dockerArchive) Document(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
	if d.Digest != a.desc.Digest {
		return nil, fmt.Errorf("%s: manifest %s: %w", a.ref, d.Digest, errdefs.ErrNotFound)
	}
	return a.raw, nil
}

func (a *dockerArchive) Blob(_ context.Context, d ocispec.Descriptor, offset int64) (io.ReadCloser, error) {
	name, ok := a.files[d.Digest]
	if !ok {
		return nil, fmt.Errorf("%s: blob %s: %w", a.ref, d.Digest, errdefs.ErrNotFound)
	}
	rc, _, err := a.t.open(name, offset)
	return rc, err
}

func (a *dockerArchive) Referrers(context.Context, digest.Digest) ([]ocispec.Descriptor, error) {
	return nil, nil
}
func (a *dockerArchive) Close() error { return a.t.Close() }

// archiveDestination writes an archive: an OCI layout, with docker save's manifest.json
// beside it if it is for Docker, so that digests are kept.
type archiveDestination struct {
	ref    Ref
	docker bool
	w      io.Writer
	done   func(ok bool) error

	lock   chan struct{} // holds a token while an entry is written
	tw     *tar.Writer
	dirs   map[string]bool
	have   map[digest.Digest]bool
	index  ocispec.Index
	top    *manifest.Document
	names  []string // of it
	broken error    // an entry that was begun cannot be taken back
}

// CreateArchive makes a file; it appears when it is whole. An old one is replaced.
func CreateArchive(r Ref) (Destination, error) {
	if r.Digest != "" {
		return nil, fmt.Errorf("%s: a digest names no destination: %w", r, errdefs.ErrInvalidArgument)
	}
	if st, err := os.Stat(r.Path); err == nil && !st.Mode().IsRegular() {
		// A pipe, /dev/stdout: what is written is out.
		f, err := os.OpenFile(r.Path, os.O_WRONLY, 0)
		if err != nil {
			return nil, err
		}
		return WriteArchive(r, f, func(bool) error { return f.Close() }), nil
	}
	// One name for all attempts: what a killed one left is written over by the next.
	partial := r.Path + ".partial"
	tmp, err := os.OpenFile(partial, os.O_WRONLY|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o644)
	if err != nil {
		return nil, err
	}
	if st, serr := tmp.Stat(); serr != nil || !st.Mode().IsRegular() {
		tmp.Close()
		return nil, errors.Join(fmt.Errorf("%s is no regular file: %w", partial, errdefs.ErrFailedPrecondition), serr)
	}
	if err := unix.Flock(int(tmp.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		tmp.Close()
		return nil, fmt.Errorf("%s is being written by another program: %w", partial, errdefs.ErrFailedPrecondition)
	}
	if err := tmp.Truncate(0); err != nil {
		tmp.Close()
		return nil, err
	}
	return WriteArchive(r, tmp, func(ok bool) error {
		defer tmp.Close() // holds the lock
		if !ok {
			return os.Remove(partial)
		}
		err := tmp.Sync()
		if err == nil {
			err = os.Rename(partial, r.Path)
		}
		if err != nil {
			err = errors.Join(err, os.Remove(partial))
		}
		return err
	}), nil
}

// WriteArchive writes an archive to a stream. done is called once, at the end.
func WriteArchive(r Ref, w io.Writer, done func(ok bool) error) Destination {
	buf := bufio.NewWriterSize(w, 256<<10)
	return &archiveDestination{
		ref: r, docker: r.Kind != LayoutArchive, w: buf, done: done, lock: make(chan struct{}, 1), tw: tar.NewWriter(buf), dirs: map[string]bool{}, have: map[digest.Digest]bool{},
		index: ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}},
	}
}

func (t *archiveDestination) Complete(context.Context, ocispec.Descriptor) bool { return false }
func (t *archiveDestination) Current(context.Context) (digest.Digest, error) {
	return "", errdefs.ErrNotFound
}

// enter waits for the turn to write.
func (t *archiveDestination) enter(ctx context.Context) (leave func(), err error) {
	select {
	case t.lock <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if t.broken != nil {
		<-t.lock
		return nil, t.broken
	}
	return func() { <-t.lock }, nil
}

func (t *archiveDestination) Put(ctx context.Context, d ocispec.Descriptor, from Source, tell func(int64)) (Outcome, error) {
	leave, err := t.enter(ctx)
	if err != nil {
		return Sent, err
	}
	defer leave()
	if t.have[d.Digest] {
		return Present, nil
	}
	rc, err := from.Blob(ctx, d, 0)
	if err != nil {
		return Sent, err
	}
	defer rc.Close()
	if err := t.header(d); err != nil {
		return Sent, err
	}
	if _, err := copyTold(t.tw, Checked(rc, d), 0, tell); err != nil {
		t.broken = fmt.Errorf("%s: %w", t.ref, err)
		return Sent, t.broken
	}
	t.have[d.Digest] = true
	return Sent, nil
}

func (t *archiveDestination) header(d ocispec.Descriptor) error {
	dir := path.Join(ocispec.ImageBlobsDir, d.Digest.Algorithm().String())
	for _, p := range []string{ocispec.ImageBlobsDir, dir} {
		if !t.dirs[p] {
			t.dirs[p] = true
			if err := t.tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: p + "/", Mode: 0o755}); err != nil {
				return err
			}
		}
	}
	return t.tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: blobPath(d.Digest), Mode: 0o444, Size: d.Size})
}

func (t *archiveDestination) PutDocument(ctx context.Context, d ocispec.Descriptor, raw []byte) error {
	leave, err := t.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	if t.have[d.Digest] {
		return nil
	}
	t.have[d.Digest] = true
	if err := t.header(d); err != nil {
		return err
	}
	_, err = t.tw.Write(raw)
	return err
}

func (t *archiveDestination) PutTagged(ctx context.Context, tag string, d ocispec.Descriptor, raw []byte) error {
	if err := t.PutDocument(ctx, d, raw); err != nil {
		return err
	}
	merge(&t.index, []ocispec.Descriptor{entry(d, tag)})
	if t.top != nil && d.Digest.Algorithm().FromBytes(t.top.Raw) == d.Digest {
		t.names = append(t.names, tag)
	}
	return nil
}

func (t *archiveDestination) PutTop(ctx context.Context, d ocispec.Descriptor, raw []byte) error {
	doc, err := manifest.Parse(t.ref.String(), d.MediaType, raw)
	if err != nil {
		return err
	}
	name := t.ref.Tag
	t.top = &doc
	if t.ref.Kind == Local {
		name = t.ref.Name.String()
	}
	return t.PutTagged(ctx, name, d, raw)
}

func (t *archiveDestination) AddReferrer(_ context.Context, _ digest.Digest, d ocispec.Descriptor) error {
	merge(&t.index, []ocispec.Descriptor{{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size, ArtifactType: d.ArtifactType, Annotations: without(d.Annotations)}})
	return nil
}

func (t *archiveDestination) Commit(ctx context.Context) error {
	leave, err := t.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	docs := map[string]any{ocispec.ImageLayoutFile: ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}, ocispec.ImageIndexFile: t.index}
	if t.docker && t.top != nil && t.top.Manifest != nil && t.top.IsImage() {
		img := dockerImage{Config: blobPath(t.top.Manifest.Config.Digest), Layers: []string{}}
		for _, name := range t.names {
			if n, err := reference.ParseNormalizedNamed(name); err == nil {
				if _, tagged := n.(reference.Tagged); tagged {
					img.RepoTags = append(img.RepoTags, reference.FamiliarString(n))
				}
			}
		}
		for _, l := range t.top.Manifest.Layers {
			img.Layers = append(img.Layers, blobPath(l.Digest))
		}
		docs[dockerManifestFile] = []dockerImage{img}
	}
	for _, name := range []string{ocispec.ImageLayoutFile, ocispec.ImageIndexFile, dockerManifestFile} {
		v, ok := docs[name]
		if !ok {
			continue
		}
		raw, err := json.Marshal(v)
		if err != nil {
			return err
		}
		if err := t.tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o444, Size: int64(len(raw))}); err != nil {
			return err
		}
		if _, err := t.tw.Write(raw); err != nil {
			return err
		}
	}
	if err := t.tw.Close(); err != nil {
		return err
	}
	if err := t.w.(*bufio.Writer).Flush(); err != nil {
		return err
	}
	done := t.done
	t.done = nil
	return done(true)
}

func (t *archiveDestination) Close() error {
	if t.done == nil {
		return nil
	}
	done := t.done
	t.done = nil
	return done(false)
}

// NeedsOne says that a destination holds one image for one platform, and no index.
func NeedsOne(r Ref) bool { return r.Kind == DockerArchive }

// Names lists the images of a layout or an archive, by name.
func Names(s Source) []string {
	l, ok := s.(*layoutSource)
	if !ok {
		return nil
	}
	var out []string
	for _, d := range l.index.Manifests {
		out = append(out, names(d)...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}
