package transport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/manifest"
)

// A folder of skopeo's kind (containers-transports(5), "dir:"): manifest.json, blobs by
// the hexadecimal digits of their digests, further manifests as HEX.manifest.json.
const (
	dirManifest = "manifest.json"
	dirVersion  = "version"
	dirText     = "Directory Transport Version: 1.1\n"
)

func dirBlob(d digest.Digest) string {
	if d.Algorithm() != digest.SHA256 {
		return d.Algorithm().String() + "-" + d.Encoded()
	}
	return d.Encoded()
}

type dirSource struct {
	f   folder
	ref Ref
}

// OpenDir gives the image of a folder.
func OpenDir(r Ref) (Source, error) {
	f, err := openFolder(r.Path)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", r, err)
	}
	return &dirSource{f, r}, nil
}

func (s *dirSource) Top(context.Context) (ocispec.Descriptor, []byte, error) {
	raw, err := readSmall(s.f, dirManifest, manifest.MaxSize)
	if err != nil {
		return ocispec.Descriptor{}, nil, fmt.Errorf("%s: %w", s.ref, err)
	}
	d, err := describe(s.ref.String(), raw, "", "")
	return d, raw, err
}

func (s *dirSource) Tagged(_ context.Context, tag string) (ocispec.Descriptor, []byte, error) {
	return ocispec.Descriptor{}, nil, fmt.Errorf("%s: %s: %w", s.ref, tag, errdefs.ErrNotFound)
}

func (s *dirSource) Document(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
	if err := manifest.ValidDigest(d.Digest); err != nil {
		return nil, err
	}
	raw, err := readSmall(s.f, dirBlob(d.Digest)+"."+dirManifest, manifest.MaxSize)
	if err != nil {
		return nil, fmt.Errorf("%s: manifest %s: %w", s.ref, d.Digest, err)
	}
	_, err = describe(s.ref.String(), raw, "", d.Digest)
	return raw, err
}

func (s *dirSource) Blob(_ context.Context, d ocispec.Descriptor, offset int64) (io.ReadCloser, error) {
	return openBlob(s.f, s.ref, dirBlob, d, offset)
}

func (s *dirSource) Referrers(context.Context, digest.Digest) ([]ocispec.Descriptor, error) {
	return nil, nil
}
func (s *dirSource) Close() error { return s.f.Close() }

type dirDestination struct {
	root *os.Root
	ref  Ref
	top  []byte
}

// CreateDir makes a folder for one image. What another image left in it stays.
func CreateDir(r Ref) (Destination, error) {
	if err := os.MkdirAll(r.Path, 0o755); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(r.Path)
	if err != nil {
		return nil, err
	}
	t := &dirDestination{root: root, ref: r}
	if err := t.prepare(); err != nil {
		root.Close()
		return nil, fmt.Errorf("%s: %w", r, err)
	}
	return t, nil
}

func (t *dirDestination) prepare() error {
	raw, err := readSmall(folder{t.root}, dirVersion, 256)
	if err == nil {
		if string(raw) != dirText {
			return fmt.Errorf("folder of another kind, %q: %w", raw, errdefs.ErrFailedPrecondition)
		}
		return nil
	}
	if !errdefs.IsNotFound(err) {
		return err
	}
	entries, err := fs.ReadDir(t.root.FS(), ".")
	if err != nil {
		return err
	}
	if len(entries) > 0 {
		return fmt.Errorf("the folder is not empty: %w", errdefs.ErrFailedPrecondition)
	}
	return replace(t.root, dirVersion, []byte(dirText))
}

func (t *dirDestination) Complete(context.Context, ocispec.Descriptor) bool { return false }

func (t *dirDestination) Current(ctx context.Context) (digest.Digest, error) {
	d, _, err := (&dirSource{folder{t.root}, t.ref}).Top(ctx)
	return d.Digest, err
}

func (t *dirDestination) Put(ctx context.Context, d ocispec.Descriptor, from Source, tell func(int64)) (Outcome, error) {
	if err := manifest.ValidDigest(d.Digest); err != nil {
		return Sent, err
	}
	name := dirBlob(d.Digest)
	if st, err := t.root.Lstat(name); err == nil && st.Mode().IsRegular() && st.Size() == d.Size {
		return Present, nil
	}
	return Sent, putFile(ctx, t.root, name, d, from, tell)
}

func (t *dirDestination) PutDocument(_ context.Context, d ocispec.Descriptor, raw []byte) error {
	if err := manifest.ValidDigest(d.Digest); err != nil {
		return err
	}
	return replace(t.root, dirBlob(d.Digest)+"."+dirManifest, raw)
}

func (t *dirDestination) PutTagged(_ context.Context, tag string, _ ocispec.Descriptor, _ []byte) error {
	return fmt.Errorf("%s: a folder of this kind holds one image, and no %s: %w", t.ref, tag, errdefs.ErrNotImplemented)
}

func (t *dirDestination) PutTop(_ context.Context, _ ocispec.Descriptor, raw []byte) error {
	t.top = raw
	return nil
}

func (t *dirDestination) AddReferrer(context.Context, digest.Digest, ocispec.Descriptor) error {
	return fmt.Errorf("%s: a folder of this kind holds no referrers, use an OCI layout: %w", t.ref, errdefs.ErrNotImplemented)
}

func (t *dirDestination) Commit(context.Context) error {
	if t.top == nil {
		return errors.New("nothing to commit")
	}
	if err := replace(t.root, dirManifest, t.top); err != nil {
		return err
	}
	return syncDir(t.root, ".")
}

func (t *dirDestination) Close() error { return t.root.Close() }
