package transport

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/manifest"
)

const (
	labelRef    = "containerd.io/gc.ref.content."
	labelSource = "containerd.io/distribution.source."
	// storeLease is for how long what a copy that died left is kept, for the next to use.
	storeLease = 24 * time.Hour
)

// Store is a store of containerd's kind: hakod's, through its socket.
type Store struct {
	Content content.Store
	Images  Records
	Leases  leases.Manager
}

// Records is the part of containerd's images.Store that is needed.
type Records interface {
	Get(ctx context.Context, name string) (images.Image, error)
	Create(ctx context.Context, image images.Image) (images.Image, error)
	Update(ctx context.Context, image images.Image, fieldpaths ...string) (images.Image, error)
}

type storeSource struct {
	s    Store
	name reference.Named
}

// OpenStore gives an image of a store. The namespace is in the context of each call.
func OpenStore(s Store, name reference.Named) Source { return &storeSource{s, name} }

func (s *storeSource) Top(ctx context.Context) (ocispec.Descriptor, []byte, error) {
	r, err := s.s.Images.Get(ctx, s.name.String())
	if errdefs.IsNotFound(err) {
		return ocispec.Descriptor{}, nil, fmt.Errorf("no such image here: %s: %w", reference.FamiliarString(s.name), errdefs.ErrNotFound)
	}
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	raw, err := s.Document(ctx, r.Target)
	if err != nil {
		return r.Target, nil, err
	}
	doc, err := manifest.Parse(reference.FamiliarString(s.name), r.Target.MediaType, raw)
	return ocispec.Descriptor{MediaType: doc.MediaType, Digest: r.Target.Digest, Size: int64(len(raw))}, raw, err
}

func (s *storeSource) Tagged(_ context.Context, tag string) (ocispec.Descriptor, []byte, error) {
	return ocispec.Descriptor{}, nil, fmt.Errorf("%s: %w", tag, errdefs.ErrNotFound)
}

func (s *storeSource) Document(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	ra, err := s.s.Content.ReaderAt(ctx, d)
	if err != nil {
		return nil, s.missing(d, err)
	}
	defer ra.Close()
	if ra.Size() > manifest.MaxSize {
		return nil, fmt.Errorf("manifest %s is larger than %d bytes: %w", d.Digest, manifest.MaxSize, errdefs.ErrResourceExhausted)
	}
	raw := make([]byte, ra.Size())
	if n, err := ra.ReadAt(raw, 0); err != nil && (err != io.EOF || n < len(raw)) {
		return nil, err
	}
	_, err = describe(s.name.String(), raw, "", d.Digest)
	return raw, err
}

func (s *storeSource) missing(d ocispec.Descriptor, err error) error {
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("%s: %s is not here, only in its registry (choose with --platform what is here): %w", reference.FamiliarString(s.name), d.Digest, errdefs.ErrNotFound)
	}
	return err
}

func (s *storeSource) Blob(ctx context.Context, d ocispec.Descriptor, offset int64) (io.ReadCloser, error) {
	ra, err := s.s.Content.ReaderAt(ctx, d)
	if err != nil {
		return nil, s.missing(d, err)
	}
	if ra.Size() != d.Size {
		ra.Close()
		return nil, fmt.Errorf("blob %s has %d bytes, not %d: %w", d.Digest, ra.Size(), d.Size, errdefs.ErrDataLoss)
	}
	return &section{io.NewSectionReader(ra, offset, d.Size-offset), ra}, nil
}

type section struct {
	*io.SectionReader
	io.Closer
}

func (s *storeSource) Referrers(context.Context, digest.Digest) ([]ocispec.Descriptor, error) {
	return nil, nil
}
func (s *storeSource) Close() error { return nil }

// storeDestination puts an image into a store, under a lease until its record refers to it.
type storeDestination struct {
	s     Store
	name  reference.Named
	from  string // distribution source label's key and value
	value string

	mu    sync.Mutex
	lease string
	top   *ocispec.Descriptor
}

// CreateStore gives a store to write to. The namespace is in the context of each call.
// source is where the image comes from, so that a push can have it mounted; nil: no registry.
func CreateStore(s Store, name, source reference.Named) Destination {
	t := &storeDestination{s: s, name: name}
	if source != nil {
		// containerd's convention leaves out the port.
		t.from, t.value = labelSource+(&url.URL{Host: reference.Domain(source)}).Hostname(), reference.Path(source)
	}
	return t
}

// leased gives a context under which everything that is made belongs to the lease.
func (t *storeDestination) leased(ctx context.Context) (context.Context, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.lease == "" {
		l, err := t.s.Leases.Create(ctx, leases.WithID("hako-copy-"+rand.Text()), leases.WithExpiration(storeLease))
		if err != nil {
			return nil, fmt.Errorf("protect from garbage collection: %w", err)
		}
		t.lease = l.ID
	}
	return leases.WithLease(ctx, t.lease), nil
}

// Complete is never sure: a store may have a manifest of an image that it has for one platform only.
func (t *storeDestination) Complete(context.Context, ocispec.Descriptor) bool { return false }

func (t *storeDestination) Current(ctx context.Context) (digest.Digest, error) {
	r, err := t.s.Images.Get(ctx, t.name.String())
	return r.Target.Digest, err
}

func (t *storeDestination) Put(ctx context.Context, d ocispec.Descriptor, from Source, tell func(int64)) (Outcome, error) {
	ctx, err := t.leased(ctx)
	if err != nil {
		return Sent, err
	}
	// With a label for each place that it comes from, a push can have it mounted.
	var opts []content.Opt
	if t.from != "" {
		opts = append(opts, content.WithLabels(map[string]string{t.from: t.value}))
	}
	if _, err := t.s.Content.Info(ctx, d.Digest); err == nil {
		return Present, t.keep(ctx, d.Digest)
	}
	cw, err := content.OpenWriter(ctx, t.s.Content, content.WithRef("hako-copy-"+d.Digest.String()), content.WithDescriptor(d))
	if errdefs.IsAlreadyExists(err) {
		return Present, t.keep(ctx, d.Digest)
	}
	if err != nil {
		return Sent, err
	}
	defer cw.Close()
	st, err := cw.Status()
	if err != nil {
		return Sent, err
	}
	if st.Offset > d.Size {
		if err := cw.Truncate(0); err != nil {
			return Sent, err
		}
		st.Offset = 0
	}
	rc, err := from.Blob(ctx, d, st.Offset)
	if err != nil {
		return Sent, err
	}
	defer rc.Close()
	n, err := copyTold(cw, io.LimitReader(rc, d.Size-st.Offset+1), st.Offset, tell)
	if err != nil {
		return Sent, err
	}
	if st.Offset+n != d.Size {
		err = fmt.Errorf("blob %s has %d bytes or more, not %d: %w", d.Digest, st.Offset+n, d.Size, errdefs.ErrDataLoss)
	} else if err = cw.Commit(ctx, d.Size, d.Digest, opts...); errdefs.IsAlreadyExists(err) {
		err = nil
	}
	if err != nil && !errdefs.IsCanceled(err) && ctx.Err() == nil {
		cw.Close()
		if aerr := t.s.Content.Abort(ctx, "hako-copy-"+d.Digest.String()); aerr != nil && !errdefs.IsNotFound(aerr) {
			err = errors.Join(err, aerr)
		}
	}
	return Sent, err
}

// keep puts a blob that is there under the lease.
func (t *storeDestination) keep(ctx context.Context, d digest.Digest) error {
	return t.s.Leases.AddResource(ctx, leases.Lease{ID: t.lease}, leases.Resource{Type: "content", ID: d.String()})
}

func (t *storeDestination) PutDocument(ctx context.Context, d ocispec.Descriptor, raw []byte) error {
	ctx, err := t.leased(ctx)
	if err != nil {
		return err
	}
	doc, err := manifest.Parse(d.Digest.String(), d.MediaType, raw)
	if err != nil {
		return err
	}
	// What garbage collection goes by (containerd's docs/garbage-collection.md).
	refs := map[string]string{}
	if doc.Index != nil {
		for i, m := range doc.Index.Manifests {
			if _, err := t.s.Content.Info(ctx, m.Digest); err == nil {
				refs[labelRef+"m."+strconv.Itoa(i)] = m.Digest.String()
			}
		}
	} else {
		refs[labelRef+"config"] = doc.Manifest.Config.Digest.String()
		for i, l := range doc.Manifest.Layers {
			refs[labelRef+"l."+strconv.Itoa(i)] = l.Digest.String()
		}
	}
	if t.from != "" {
		refs[t.from] = t.value
	}
	err = content.WriteBlob(ctx, t.s.Content, "hako-copy-"+d.Digest.String(), strings.NewReader(string(raw)), ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}, content.WithLabels(refs))
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return err
	}
	var paths []string
	for k := range refs {
		paths = append(paths, "labels."+k)
	}
	if _, err := t.s.Content.Update(ctx, content.Info{Digest: d.Digest, Labels: refs}, paths...); err != nil {
		return err
	}
	return t.keep(ctx, d.Digest)
}

func (t *storeDestination) PutTagged(_ context.Context, tag string, _ ocispec.Descriptor, _ []byte) error {
	return fmt.Errorf("the local store keeps no %s: %w", tag, errdefs.ErrNotImplemented)
}

func (t *storeDestination) PutTop(ctx context.Context, d ocispec.Descriptor, raw []byte) error {
	if dig, ok := t.name.(reference.Digested); ok && dig.Digest() != d.Digest {
		return fmt.Errorf("%s: the image has digest %s: %w", reference.FamiliarString(t.name), d.Digest, errdefs.ErrFailedPrecondition)
	}
	if err := t.PutDocument(ctx, d, raw); err != nil {
		return err
	}
	t.top = &ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
	return nil
}

func (t *storeDestination) AddReferrer(context.Context, digest.Digest, ocispec.Descriptor) error {
	return fmt.Errorf("the local store keeps no referrers: %w", errdefs.ErrNotImplemented)
}

func (t *storeDestination) Commit(ctx context.Context) error {
	if t.top == nil {
		return errors.New("nothing to commit")
	}
	img := images.Image{Name: t.name.String(), Target: *t.top}
	_, err := t.s.Images.Create(ctx, img)
	if errdefs.IsAlreadyExists(err) {
		_, err = t.s.Images.Update(ctx, img, "target")
	}
	if err != nil {
		return fmt.Errorf("name the image %s: %w", t.name, err)
	}
	t.mu.Lock()
	lease := t.lease
	t.lease = ""
	t.mu.Unlock()
	if lease != "" {
		if err := t.s.Leases.Delete(ctx, leases.Lease{ID: lease}); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return nil
}

// Close leaves the lease to its end: another attempt finds what it keeps.
func (t *storeDestination) Close() error { return nil }
