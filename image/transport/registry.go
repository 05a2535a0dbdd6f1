package transport

import (
	"context"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/manifest"
	"github.com/hako-engine/hako/image/registry"
)

// registrySource is an image in its registry.
type registrySource struct {
	r    *registry.Repository
	name reference.Named
}

// OpenRegistry gives an image in a repository. name is complete.
func OpenRegistry(r *registry.Repository, name reference.Named) Source {
	return &registrySource{r, name}
}

func (s *registrySource) Top(ctx context.Context) (ocispec.Descriptor, []byte, error) {
	return s.Tagged(ctx, tagOrDigest(s.name))
}

func (s *registrySource) Tagged(ctx context.Context, tag string) (ocispec.Descriptor, []byte, error) {
	d, raw, err := s.r.Manifest(ctx, tag)
	if err != nil {
		return d, nil, err
	}
	doc, err := manifest.Parse("manifest of "+reference.FamiliarString(s.name), d.MediaType, raw)
	d.MediaType = doc.MediaType
	return d, raw, err
}

func (s *registrySource) Document(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	_, raw, err := s.r.Manifest(ctx, d.Digest.String())
	if err == nil && d.Size > 0 && int64(len(raw)) != d.Size {
		err = fmt.Errorf("manifest %s has %d bytes, not %d: %w", d.Digest, len(raw), d.Size, errdefs.ErrDataLoss)
	}
	return raw, err
}

func (s *registrySource) Blob(ctx context.Context, d ocispec.Descriptor, offset int64) (io.ReadCloser, error) {
	return s.r.Blob(ctx, d, offset)
}

func (s *registrySource) Referrers(ctx context.Context, d digest.Digest) ([]ocispec.Descriptor, error) {
	return s.r.Referrers(ctx, d, "")
}

func (s *registrySource) Close() error { return nil }

// registryDestination is a repository that an image goes to.
type registryDestination struct {
	r    *registry.Repository
	name reference.Named
}

// CreateRegistry gives a repository to write to. name is complete; one with a digest takes
// that image only.
func CreateRegistry(r *registry.Repository, name reference.Named) Destination {
	return &registryDestination{r: r, name: name}
}

func (t *registryDestination) Complete(ctx context.Context, d ocispec.Descriptor) bool {
	got, err := t.r.Head(ctx, d.Digest.String())
	return err == nil && got.Digest == d.Digest
}

func (t *registryDestination) Current(ctx context.Context) (digest.Digest, error) {
	d, err := t.r.Head(ctx, tagOrDigest(t.name))
	return d.Digest, err
}

func (t *registryDestination) Put(ctx context.Context, d ocispec.Descriptor, from Source, tell func(int64)) (Outcome, error) {
	done, err := t.r.Turn(ctx, d.Digest)
	if err != nil {
		return Sent, err
	}
	defer done()
	have, err := t.r.HasBlob(ctx, d.Digest)
	if err != nil {
		return Sent, err
	}
	if have {
		return Present, nil
	}
	mount := ""
	if s, ok := from.(*registrySource); ok && s.r.Domain() == t.r.Domain() && s.r.Name().Name() != t.r.Name().Name() {
		mount = reference.Path(s.r.Name())
	}
	mounted, err := t.r.PutBlob(ctx, d, mount, func(ctx context.Context, offset int64) (io.ReadCloser, error) {
		rc, err := from.Blob(ctx, d, offset)
		if err == nil && offset == 0 {
			rc = Checked(rc, d)
		}
		return rc, err
	}, tell)
	if mounted {
		return Mounted, err
	}
	return Sent, err
}

func (t *registryDestination) PutDocument(ctx context.Context, d ocispec.Descriptor, raw []byte) error {
	return t.put(ctx, d.Digest.String(), d, raw)
}

func (t *registryDestination) PutTagged(ctx context.Context, tag string, d ocispec.Descriptor, raw []byte) error {
	return t.put(ctx, tag, d, raw)
}

func (t *registryDestination) PutTop(ctx context.Context, d ocispec.Descriptor, raw []byte) error {
	if dig, ok := t.name.(reference.Digested); ok && dig.Digest() != d.Digest {
		return fmt.Errorf("%s: the image has digest %s: %w", reference.FamiliarString(t.name), d.Digest, errdefs.ErrFailedPrecondition)
	}
	return t.put(ctx, tagOrDigest(t.name), d, raw)
}

func (t *registryDestination) put(ctx context.Context, tag string, d ocispec.Descriptor, raw []byte) error {
	done, err := t.r.Turn(ctx, d.Digest)
	if err != nil {
		return err
	}
	defer done()
	if tag == d.Digest.String() && t.Complete(ctx, d) {
		return nil // another image has the document, too, and had its turn
	}
	listed, err := t.r.PutManifest(ctx, d, raw, tag)
	if err != nil || listed {
		return err
	}
	doc, err := manifest.Parse(tag, d.MediaType, raw)
	if err != nil || doc.Subject() == nil {
		return nil
	}
	e := ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size, ArtifactType: doc.ArtifactType(), Annotations: doc.Annotations()}
	return t.r.AddReferrer(ctx, doc.Subject().Digest, e)
}

// AddReferrer does nothing: who puts a document with a subject into a registry has it listed.
func (t *registryDestination) AddReferrer(context.Context, digest.Digest, ocispec.Descriptor) error {
	return nil
}

func (t *registryDestination) Commit(context.Context) error { return nil }
func (t *registryDestination) Close() error                 { return nil }
