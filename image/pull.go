package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/hako-engine/hako/image/manifest"
	"github.com/hako-engine/hako/image/registry"
)

// Labels of containerd's conventions on blobs, and ours.
const (
	labelContent      = "containerd.io/gc.ref.content."
	labelSnapshot     = "containerd.io/gc.ref.snapshot."
	labelDistribution = "containerd.io/distribution.source."
	labelUncompressed = "containerd.io/uncompressed"
	labelSize         = "io.hako.layer.size" // bytes in the files of an unpacked layer
)

func (a *Auth) credentials() registry.Credentials {
	if a == nil {
		return registry.Credentials{}
	}
	return registry.Credentials{Username: a.Username, Password: a.Password, IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken}
}

// Login asks a registry whether it takes credentials: errdefs.ErrUnauthenticated if not.
func (s *Service) Login(ctx context.Context, a Auth) error {
	return s.registry.Login(ctx, a.ServerAddress, a.credentials())
}

// Pull fetches an image and unpacks it. Bytes of layers are hashed, stored, decompressed,
// hashed again and unpacked in one pass while they arrive, layers side by side; what is
// here already is not fetched again, and an interrupted pull goes on where it broke.
// The name is given, durably, when everything is in place and all digests match.
//
// Errors: errdefs.ErrNotFound (in Docker's words), ErrUnauthenticated, ErrUnavailable
// (network), ErrDataLoss (wrong digest), ErrInvalidArgument (broken image),
// ErrResourceExhausted (beyond a limit, full disk).
func (s *Service) Pull(ctx context.Context, ref string, o PullOptions) (Image, error) {
	ctx = namespaced(ctx)
	named, err := parseName(ref)
	if err != nil {
		return Image{}, err
	}
	sName, _, err := s.snapshotter(o.Snapshotter)
	if err != nil {
		return Image{}, err
	}
	repo, err := s.registry.Repository(reference.TrimNamed(named), o.Auth.credentials())
	if err != nil {
		return Image{}, err
	}
	p := newProgress(o.Progress)
	defer p.close(ctx)
	if !o.AllTags {
		return s.pull(ctx, repo, named, sName, o.Platform, p)
	}
	tags, err := repo.Tags(ctx)
	if err != nil {
		return Image{}, err
	}
	if len(tags) == 0 {
		return Image{}, fmt.Errorf("repository %s has no tags: %w", reference.FamiliarName(named), errdefs.ErrNotFound)
	}
	var last Image
	for _, tag := range tags {
		tagged, err := reference.WithTag(reference.TrimNamed(named), tag)
		if err != nil {
			return Image{}, fmt.Errorf("tag %q: %w: %w", tag, err, errdefs.ErrInvalidArgument)
		}
		if last, err = s.pull(ctx, repo, tagged, sName, o.Platform, p); err != nil {
			return Image{}, err
		}
	}
	return last, nil
}

// resolved is an image at its registry, for one platform.
type resolved struct {
	target   ocispec.Descriptor // a manifest or index
	chosen   ocispec.Descriptor // a manifest
	manifest *ocispec.Manifest
	config   config
	blobs    map[digest.Digest][]byte // all documents
	indexes  []ocispec.Descriptor     // from the target down to above chosen
}

// pull fetches one tag or digest.
func (s *Service) pull(ctx context.Context, repo *registry.Repository, named reference.Named, snapshotter string, platform *ocispec.Platform, p *progress) (Image, error) {
	what := reference.FamiliarString(named)
	id := tagOrDigest(named)
	p.line(Progress{ID: id, Action: "Pulling from " + reference.Path(named)})
	r, err := s.resolve(ctx, repo, named, platform)
	if err != nil {
		return Image{}, err
	}
	if err := s.allow(ctx, named, r.target, repo); err != nil {
		return Image{}, fmt.Errorf("pull %s: %w", what, err)
	}
	old, oldErr := s.o.Images.Get(ctx, named.String())
	ctx, l, err := s.newLease(ctx)
	if err != nil {
		return Image{}, err
	}
	defer l.release()
	work := s.newWork(l, snapshotter, p)
	defer work.release()
	work.repo = repo
	if err := work.image(ctx, what, r); err != nil {
		return Image{}, fmt.Errorf("pull %s: %w", what, err)
	}
	if err := s.setName(ctx, named.String(), r.target); err != nil {
		return Image{}, fmt.Errorf("pull %s: %w", what, err)
	}
	img, err := s.describe(ctx, r.target, r.chosen)
	if err != nil {
		return Image{}, fmt.Errorf("pull %s: %w", what, err)
	}
	p.line(Progress{Message: "Digest: " + r.target.Digest.String()})
	status := "Status: Downloaded newer image for "
	if oldErr == nil && old.Target.Digest == r.target.Digest && work.nothingNew() {
		status = "Status: Image is up to date for "
	}
	p.line(Progress{Message: status + what})
	return img, nil
}

// allow asks whether an image may be pulled by a name.
func (s *Service) allow(ctx context.Context, named reference.Named, d ocispec.Descriptor, repo *registry.Repository) error {
	if s.o.Allow == nil {
		return nil
	}
	return s.o.Allow(ctx, named, d, repo)
}

// mayName asks whether an image that was not pulled by it may have a name. What the
// repository of the name has here already, it may call by another tag.
func (s *Service) mayName(ctx context.Context, name string, target ocispec.Descriptor) error {
	if s.o.Allow == nil {
		return nil
	}
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return nil // no image can be pulled by it
	}
	records, err := s.o.Images.List(ctx)
	if err != nil {
		return err
	}
	for _, r := range records {
		if n, err := reference.ParseNormalizedNamed(r.Name); err == nil && r.Target.Digest == target.Digest && n.Name() == named.Name() {
			return nil
		}
	}
	return s.o.Allow(ctx, named, target, nil)
}

// resolve gets the documents of an image, from the registry or the store, and checks them.
func (s *Service) resolve(ctx context.Context, repo *registry.Repository, named reference.Named, platform *ocispec.Platform) (*resolved, error) {
	what := reference.FamiliarString(named)
	desc, body, err := repo.Manifest(ctx, tagOrDigest(named))
	if err != nil {
		return nil, err
	}
	r := &resolved{target: desc, blobs: map[digest.Digest][]byte{}}
	doc, err := r.add(what, &r.target, body)
	if err != nil {
		return nil, err
	}
	r.chosen = r.target
	m := matcher(platform)
	for depth := 0; doc.index != nil; depth++ {
		list := manifest.Candidates(doc.index, m)
		if len(list) == 0 || depth == maxNesting {
			return nil, fmt.Errorf("no matching manifest for %s in the manifest list entries of %s: %w", platformName(platform), what, errdefs.ErrNotFound)
		}
		r.indexes = append(r.indexes, r.chosen)
		r.chosen = list[0]
		if body, err = s.fetchDocument(ctx, repo, r.chosen); err != nil {
			return nil, err
		}
		if doc, err = r.add(what, &r.chosen, body); err != nil {
			return nil, err
		}
	}
	r.manifest = doc.manifest
	if body, err = s.fetchConfig(ctx, repo, r.manifest.Config); err != nil {
		return nil, fmt.Errorf("config of %s: %w", what, err)
	}
	r.blobs[r.manifest.Config.Digest] = body
	if r.config, err = parseConfig("config of "+what, body); err != nil {
		return nil, err
	}
	if err := r.config.fits(what, r.manifest); err != nil {
		return nil, err
	}
	if platform != nil && !m.Match(r.config.platform()) {
		p := r.config.platform()
		return nil, fmt.Errorf("image with reference %s was found but its platform (%s) does not match the specified platform: wanted %s: %w",
			what, platformName(&p), platformName(platform), errdefs.ErrNotFound)
	}
	return r, nil
}

// add takes in a document; its descriptor gets the media type that it turned out to have.
func (r *resolved) add(what string, d *ocispec.Descriptor, body []byte) (document, error) {
	if d.Size != int64(len(body)) {
		return document{}, fmt.Errorf("manifest %s of %s has %d bytes, not %d: %w", d.Digest, what, len(body), d.Size, errdefs.ErrDataLoss)
	}
	doc, err := parseDocument("manifest of "+what, d.MediaType, body)
	if err != nil {
		return document{}, err
	}
	d.MediaType = doc.mediaType
	r.blobs[d.Digest] = body
	return doc, nil
}

func (s *Service) fetchDocument(ctx context.Context, repo *registry.Repository, d ocispec.Descriptor) ([]byte, error) {
	if b, err := readBlob(ctx, s.o.Content, d); err == nil {
		return b, nil
	}
	_, body, err := repo.Manifest(ctx, d.Digest.String())
	return body, err
}

func (s *Service) fetchConfig(ctx context.Context, repo *registry.Repository, d ocispec.Descriptor) ([]byte, error) {
	if b, err := readBlob(ctx, s.o.Content, d); err == nil {
		return b, nil
	}
	rc, err := repo.Blob(ctx, d, 0)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	body, err := io.ReadAll(rc) // as long as the descriptor says, which parseDocument bounds
	if err != nil {
		return nil, err
	}
	if got := d.Digest.Algorithm().FromBytes(body); got != d.Digest {
		return nil, fmt.Errorf("it has digest %s, not %s: %w", got, d.Digest, errdefs.ErrDataLoss)
	}
	return body, nil
}

// image brings all of an image into the store, unpacked.
func (w *work) image(ctx context.Context, what string, r *resolved) error {
	eg, ctx := errgroup.WithContext(ctx)
	eg.Go(func() error { return w.documents(ctx, r) })
	eg.Go(func() error { return w.unpack(ctx, r.manifest.Layers, r.config) })
	return eg.Wait()
}

// documents stores the config, manifest and indexes with the labels that garbage
// collection and push go by.
func (w *work) documents(ctx context.Context, r *resolved) error {
	configLabels := map[string]string{}
	if n := len(r.config.chain); n > 0 {
		configLabels[labelSnapshot+w.snapshotterName] = r.config.chain[n-1].String()
	}
	refs := map[string]string{labelContent + "config": r.manifest.Config.Digest.String()}
	for i, l := range r.manifest.Layers {
		refs[fmt.Sprintf("%sl.%d", labelContent, i)] = l.Digest.String()
	}
	eg, ctx := errgroup.WithContext(ctx)
	put := func(d ocispec.Descriptor, labels map[string]string) {
		eg.Go(func() error { return w.put(ctx, d, r.blobs[d.Digest], labels) })
	}
	put(r.manifest.Config, configLabels)
	put(r.chosen, refs)
	child := r.chosen
	for _, idx := range slices.Backward(r.indexes) {
		doc, err := parseDocument(idx.Digest.String(), idx.MediaType, r.blobs[idx.Digest])
		if err != nil {
			return err
		}
		labels := map[string]string{}
		for i, d := range doc.index.Manifests {
			if d.Digest == child.Digest {
				labels[fmt.Sprintf("%sm.%d", labelContent, i)] = d.Digest.String()
			}
		}
		put(idx, labels)
		child = idx
	}
	return eg.Wait()
}

// put stores a small blob, or adds to the labels of one that is there.
func (w *work) put(ctx context.Context, d ocispec.Descriptor, body []byte, labels map[string]string) error {
	w.source(labels)
	if err := w.s.storeDocument(ctx, d.Digest, body, labels); err != nil {
		return err
	}
	return w.label(ctx, d.Digest, labels)
}

// storeDocument stores a small blob, whole or not at all. That it is there is no error.
func (s *Service) storeDocument(ctx context.Context, d digest.Digest, body []byte, labels map[string]string) error {
	ref := "doc-" + d.String()
	err := content.WriteBlob(ctx, s.o.Content, ref, bytes.NewReader(body), ocispec.Descriptor{Digest: d, Size: int64(len(body))}, content.WithLabels(labels))
	if err == nil || errdefs.IsAlreadyExists(err) {
		return nil
	}
	err = fmt.Errorf("store %s: %w", d, err)
	// Another who writes the same goes on.
	if aerr := s.o.Content.Abort(context.WithoutCancel(ctx), ref); aerr != nil && !errdefs.IsNotFound(aerr) && !errdefs.IsUnavailable(aerr) {
		err = errors.Join(err, aerr)
	}
	return err
}

// source adds to labels where a blob came from: a push to the same registry can mount it.
func (w *work) source(labels map[string]string) {
	if w.repo == nil {
		return
	}
	// containerd's convention leaves out the port.
	host := (&url.URL{Host: reference.Domain(w.repo.Name())}).Hostname()
	labels[labelDistribution+host] = reference.Path(w.repo.Name())
}

// label makes sure that a blob has labels, and is under the lease.
func (w *work) label(ctx context.Context, d digest.Digest, labels map[string]string) error {
	info, err := w.s.o.Content.Info(ctx, d)
	if err != nil {
		return err
	}
	var paths []string
	set := map[string]string{}
	for k, v := range labels {
		have := info.Labels[k]
		if strings.HasPrefix(k, labelDistribution) && have != "" && have != v {
			if slices.Contains(strings.Split(have, ","), v) || len(have) > 1024 {
				continue
			}
			v = have + "," + v
		}
		if have != v {
			set[k] = v
			paths = append(paths, "labels."+k)
		}
	}
	if len(paths) == 0 {
		return nil
	}
	_, err = w.s.o.Content.Update(ctx, content.Info{Digest: d, Labels: set}, paths...)
	return err
}
