// Package convert brings layers into another form: gzip, zstd, eStargz, EROFS, or plain tar.
//
// In flow layers of a source; out flow layers with other digests but the same files, as
// files without a name in the temporary folder until Close.
package convert

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/copier"
	"github.com/hako-engine/hako/image/manifest"
	"github.com/hako-engine/hako/image/transport"
	"github.com/hako-engine/hako/image/unpack"
	"github.com/hako-engine/hako/internal/ctxio"
)

// Form of a layer.
type Form string

// Forms of layers.
const (
	Gzip    Form = "gzip"
	Zstd    Form = "zstd"
	EStargz Form = "estargz"
	EROFS   Form = "erofs"
	Plain   Form = "none"
)

const (
	// maxLayer bounds a layer's tar archive in bytes.
	maxLayer = 100 << 30
	// erofsLayer is the media type that containerd gives layers in EROFS form (core/images, MediaTypeErofsLayer).
	erofsLayer = "application/vnd.erofs.layer.v1"
	// annotationTOC marks a layer in eStargz form, and holds the digest of its table of
	// contents (stargz-snapshotter's docs/estargz.md).
	annotationTOC = estargz.TOCJSONDigestAnnotation
	// annotationSize tells the size of the uncompressed layer in bytes.
	annotationSize = estargz.StoreUncompressedSizeAnnotation
)

// Converter makes layers of one form. Close it when the copy is over.
type Converter struct {
	form  Form
	level int

	mu    sync.Mutex
	files []*os.File
}

// New gives a converter. level 0 is the form's default.
func New(form Form, level int) (*Converter, error) {
	most := map[Form]int{Gzip: 9, Zstd: 22, EStargz: 9, EROFS: 0, Plain: 0}
	n, ok := most[form]
	switch {
	case !ok:
		return nil, fmt.Errorf("form %q of layers: %w", form, errdefs.ErrInvalidArgument)
	case level < 0 || level > n:
		return nil, fmt.Errorf("level %d: %s has 1 to %d: %w", level, form, n, errdefs.ErrInvalidArgument)
	}
	return &Converter{form: form, level: level}, nil
}

// Close forgets the layers that were made.
func (c *Converter) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var err error
	for _, f := range c.files {
		err = errors.Join(err, f.Close())
	}
	c.files = nil
	return err
}

// temp makes a file without a name.
func (c *Converter) temp() (*os.File, error) {
	f, err := os.CreateTemp("", "hako-layer-*")
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	c.files = append(c.files, f)
	c.mu.Unlock()
	return f, os.Remove(f.Name())
}

// formOf says what a layer is by its media type.
func formOf(d ocispec.Descriptor) Form {
	switch {
	case d.Annotations[annotationTOC] != "":
		return EStargz
	case d.MediaType == erofsLayer:
		return EROFS
	case strings.HasSuffix(d.MediaType, "gzip"):
		return Gzip
	case strings.HasSuffix(d.MediaType, "zstd"):
		return Zstd
	}
	return Plain
}

// Layer converts a layer; one that has the form stays as it is, if no level was asked for.
func (c *Converter) Layer(ctx context.Context, from transport.Source, d ocispec.Descriptor, tell func(int64)) (copier.Layer, error) {
	if formOf(d) == EROFS && c.form == EROFS {
		return copier.Layer{Descriptor: d}, nil
	}
	if !strings.Contains(d.MediaType, "tar") || len(d.URLs) > 0 {
		return copier.Layer{Descriptor: d}, fmt.Errorf("layers of type %s are not converted: %w", d.MediaType, errdefs.ErrNotImplemented)
	}
	if formOf(d) == c.form && c.level == 0 {
		return copier.Layer{Descriptor: d}, nil
	}
	rc, err := from.Blob(ctx, d, 0)
	if err != nil {
		return copier.Layer{}, err
	}
	defer rc.Close()
	in := ctxio.Reader(ctx, transport.Checked(rc, d), tell)
	dec, err := unpack.NewDecoder(in, unpack.Limits{Size: maxLayer})
	if err != nil {
		return copier.Layer{}, err
	}
	defer dec.Close()
	var l copier.Layer
	switch c.form {
	case EStargz:
		l, err = c.estargz(dec, d)
	case EROFS:
		l, err = c.erofs(ctx, dec, d)
	default:
		l, err = c.compress(dec, d)
	}
	if err == nil {
		// What follows the tar archive counts for the digest, too.
		_, err = io.Copy(io.Discard, in)
	}
	return l, err
}

// compress writes a tar archive as gzip, zstd or as it is.
func (c *Converter) compress(tar io.Reader, d ocispec.Descriptor) (copier.Layer, error) {
	f, err := c.temp()
	if err != nil {
		return copier.Layer{}, err
	}
	hash := digest.SHA256.Hash()
	out := io.MultiWriter(f, hash)
	var w io.WriteCloser
	switch c.form {
	case Gzip:
		level := c.level
		if level == 0 {
			level = gzip.DefaultCompression
		}
		w, err = gzip.NewWriterLevel(out, level)
	case Zstd:
		level := c.level
		if level == 0 {
			level = 3
		}
		w, err = zstd.NewWriter(out, zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(level)), zstd.WithEncoderConcurrency(1))
	default:
		w = nopCloser{out}
	}
	if err != nil {
		return copier.Layer{}, err
	}
	if _, err := io.Copy(w, tar); err != nil {
		return copier.Layer{}, err
	}
	if err := w.Close(); err != nil {
		return copier.Layer{}, err
	}
	return made(f, digest.NewDigest(digest.SHA256, hash), d, c.form, nil)
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// made describes a new layer.
func made(f *os.File, dig digest.Digest, old ocispec.Descriptor, form Form, annotations map[string]string) (copier.Layer, error) {
	st, err := f.Stat()
	if err != nil {
		return copier.Layer{}, err
	}
	d := ocispec.Descriptor{MediaType: mediaType(old.MediaType, form), Digest: dig, Size: st.Size()}
	for k, v := range old.Annotations {
		if k == annotationTOC || k == annotationSize {
			continue
		}
		if d.Annotations == nil {
			d.Annotations = map[string]string{}
		}
		d.Annotations[k] = v
	}
	for k, v := range annotations {
		if d.Annotations == nil {
			d.Annotations = map[string]string{}
		}
		d.Annotations[k] = v
	}
	return copier.Layer{Descriptor: d, Blob: file{f: f, size: st.Size()}}, nil
}

// mediaType is that of a layer of a form, in the family of the old one. Docker's has no
// zstd that others understand.
func mediaType(old string, form Form) string {
	docker := strings.HasPrefix(old, "application/vnd.docker.")
	switch {
	case form == Zstd:
		return ocispec.MediaTypeImageLayerZstd
	case form == EROFS:
		return erofsLayer
	case form == Plain && docker:
		return manifest.DockerLayer
	case form == Plain:
		return ocispec.MediaTypeImageLayer
	case docker:
		return manifest.DockerLayerGzip
	}
	return ocispec.MediaTypeImageLayerGzip
}

// file is a source of one blob, a file.
type file struct {
	transport.Source
	f    *os.File
	size int64
}

func (s file) Blob(_ context.Context, _ ocispec.Descriptor, offset int64) (io.ReadCloser, error) {
	return io.NopCloser(io.NewSectionReader(s.f, offset, s.size-offset)), nil
}

// estargz writes a layer that can be read before all of it is there. It has more files in
// it (the table of contents, a landmark), so its uncompressed digest is another one.
func (c *Converter) estargz(tar io.Reader, d ocispec.Descriptor) (copier.Layer, error) {
	in, err := c.temp()
	if err != nil {
		return copier.Layer{}, err
	}
	n, err := io.Copy(in, tar)
	if err != nil {
		return copier.Layer{}, err
	}
	level := c.level
	if level == 0 {
		level = gzip.BestCompression
	}
	blob, err := estargz.Build(io.NewSectionReader(in, 0, n), estargz.WithCompressionLevel(level))
	if err != nil {
		return copier.Layer{}, fmt.Errorf("eStargz: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	defer blob.Close()
	f, err := c.temp()
	if err != nil {
		return copier.Layer{}, err
	}
	hash := digest.SHA256.Hash()
	if _, err := io.Copy(io.MultiWriter(f, hash), blob); err != nil {
		return copier.Layer{}, err
	}
	if err := blob.Close(); err != nil {
		return copier.Layer{}, err
	}
	size, err := blob.UncompressedSize()
	if err != nil {
		return copier.Layer{}, err
	}
	l, err := made(f, digest.NewDigest(digest.SHA256, hash), d, EStargz, map[string]string{
		annotationTOC: blob.TOCDigest().String(), annotationSize: strconv.FormatInt(size, 10)})
	l.DiffID = blob.DiffID()
	return l, err
}

// pieces hands a stream out in buffers.
type pieces struct{ r io.Reader }

func (p pieces) Next() ([]byte, func(), error) {
	buf := make([]byte, 256<<10)
	n, err := p.r.Read(buf)
	if n > 0 {
		return buf[:n], func() {}, nil // an error comes again
	}
	return nil, nil, err
}

// erofs writes a layer as a file system that the kernel mounts. What a layer deletes is in
// it as overlayfs has it. It is no tar archive any more, so the digest of the blob is the
// uncompressed one, too.
func (c *Converter) erofs(ctx context.Context, tar io.Reader, d ocispec.Descriptor) (copier.Layer, error) {
	f, err := c.temp()
	if err != nil {
		return copier.Layer{}, err
	}
	if _, err := unpack.Image(ctx, f, pieces{tar}, unpack.Options{Mode: unpack.Diff, Limits: unpack.Limits{Size: maxLayer}}); err != nil {
		return copier.Layer{}, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return copier.Layer{}, err
	}
	hash := digest.SHA256.Hash()
	if _, err := io.Copy(hash, f); err != nil {
		return copier.Layer{}, err
	}
	l, err := made(f, digest.NewDigest(digest.SHA256, hash), d, EROFS, nil)
	l.DiffID = l.Descriptor.Digest
	return l, err
}
