package image

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/manifest"
	"github.com/hako-engine/hako/image/registry"
	"github.com/hako-engine/hako/store"
)

// Problems that Check finds.
const (
	ProblemIncomplete = "image-incomplete"
	ProblemUnlabelled = "image-unlabelled"
	ProblemUnpacked   = "image-not-unpacked"
	ProblemLayer      = "layer-absent"
)

const room = "image"

// Check follows every image record of the namespace of ctx down to its layers. It changes
// nothing, and runs beside all other work: an image must look wrong twice under one record.
func (s *Service) Check(ctx context.Context, o store.CheckOptions) (found []store.Finding, err error) {
	ctx = namespaced(ctx)
	records, err := s.o.Images.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("check images: %w", err)
	}
	for i, r := range records {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		o.Report("following images", int64(i), int64(len(records)))
		if len(s.checkImage(ctx, r)) == 0 {
			continue
		}
		again := s.checkImage(ctx, r)
		if now, err := s.o.Images.Get(ctx, r.Name); err == nil && now.Target.Digest == r.Target.Digest {
			found = append(found, again...)
		}
	}
	return found, nil
}

// Checker checks the images of all namespaces.
type Checker struct {
	*Service
	Namespaces namespaces.Store
}

// Check is Service.Check for each namespace.
func (c Checker) Check(ctx context.Context, o store.CheckOptions) (found []store.Finding, err error) {
	list, err := c.Namespaces.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("check images: %w", err)
	}
	for _, ns := range list {
		fs, err := c.Service.Check(namespaces.WithNamespace(ctx, ns), o)
		if err != nil {
			return nil, err
		}
		found = append(found, fs...)
	}
	return found, nil
}

// Repair is Service.Repair in the finding's namespace.
func (c Checker) Repair(ctx context.Context, f store.Finding, inUse func(store.Node) bool) (string, error) {
	return c.Service.Repair(namespaces.WithNamespace(ctx, f.Namespace), f, inUse)
}

// inspection is the check of one image.
type inspection struct {
	s     *Service
	ns    string
	name  string
	found []store.Finding
	seen  map[digest.Digest]bool
}

func (s *Service) checkImage(ctx context.Context, r images.Image) []store.Finding {
	ns, _ := store.Namespace(ctx)
	c := &inspection{s: s, ns: ns, name: r.Name, seen: map[digest.Digest]bool{}}
	c.document(ctx, r.Target, 0)
	return c.found
}

func (c *inspection) add(problem string, sev store.Severity, format string, args ...any) {
	f := store.Finding{Room: room, Problem: problem, Severity: sev, Namespace: c.ns, Object: c.name, Detail: fmt.Sprintf(format, args...)}
	if i := slices.IndexFunc(c.found, func(g store.Finding) bool { return g.Key() == f.Key() }); i >= 0 {
		c.found[i].Detail += "; " + f.Detail
		return
	}
	c.found = append(c.found, f)
}

// read gives a small blob, after checking its digest: one that is torn must not be followed.
func (c *inspection) read(ctx context.Context, what string, d ocispec.Descriptor) ([]byte, bool) {
	b, err := readBlob(ctx, c.s.o.Content, d)
	switch {
	case errdefs.IsNotFound(err):
		c.add(ProblemIncomplete, store.Damage, "%s %s is not here", what, d.Digest)
	case err != nil:
		c.add(ProblemIncomplete, store.Damage, "%s: %v", what, err)
	case manifest.ValidDigest(d.Digest) == nil && d.Digest.Algorithm().FromBytes(b) != d.Digest:
		c.found = append(c.found, store.Finding{Room: "store", Problem: store.ProblemDigest, Severity: store.Damage, Namespace: c.ns, Object: d.Digest.String(), Detail: "its bytes have another digest"})
		c.add(ProblemIncomplete, store.Damage, "%s %s is damaged", what, d.Digest)
	default:
		return b, true
	}
	return nil, false
}

func (c *inspection) document(ctx context.Context, d ocispec.Descriptor, depth int) {
	if c.seen[d.Digest] || depth > maxNesting {
		return
	}
	c.seen[d.Digest] = true
	if depth == 0 && !isManifestType(d.MediaType) {
		c.blob(ctx, "its target", d) // no image of hako's
		return
	}
	body, ok := c.read(ctx, "manifest", d)
	if !ok {
		return
	}
	doc, err := parseDocument(d.Digest.String(), d.MediaType, body)
	if err != nil {
		return // an artifact; whoever put it here knows what belongs to it
	}
	if doc.manifest != nil {
		c.manifest(ctx, d, doc.manifest)
		return
	}
	var here []ocispec.Descriptor
	for _, child := range doc.index.Manifests {
		if _, err := c.s.o.Content.Info(ctx, child.Digest); !errdefs.IsNotFound(err) {
			here = append(here, child)
			c.document(ctx, child, depth+1)
		}
	}
	if len(here) == 0 && len(doc.index.Manifests) > 0 {
		c.add(ProblemIncomplete, store.Damage, "none of the manifests of index %s is here", d.Digest)
	}
	c.labelled(ctx, d, here)
}

func (c *inspection) manifest(ctx context.Context, d ocispec.Descriptor, m *ocispec.Manifest) {
	raw, ok := c.read(ctx, "config", m.Config)
	if !ok {
		return
	}
	cfg, err := parseConfig(m.Config.Digest.String(), raw)
	if err != nil || cfg.fits("", m) != nil {
		return // an artifact
	}
	here := []ocispec.Descriptor{m.Config}
	for i, l := range m.Layers {
		_, err := c.s.o.Content.Info(ctx, l.Digest)
		if errdefs.IsNotFound(err) {
			// A client may fetch into a snapshotter of its own alone, or let layers go.
			if name, ok := c.unpacked(ctx, cfg.chain[i]); ok && (!canRebase(c.s.o.Snapshotters[name]) || !c.wanted(ctx, d, l.Digest)) {
				c.add(ProblemLayer, store.Note, "layer %s is only here as a snapshot of %s: the image runs, but cannot be pushed", l.Digest, name)
			} else {
				c.add(ProblemIncomplete, store.Damage, "layer %s is not here", l.Digest)
			}
			continue
		}
		here = append(here, l)
		c.blob(ctx, "layer", l)
	}
	c.labelled(ctx, d, here)
	// The config's labels tell for which snapshotters it was unpacked.
	info, err := c.s.o.Content.Info(ctx, m.Config.Digest)
	if err != nil {
		return
	}
	for k, v := range info.Labels {
		name, ok := strings.CutPrefix(k, labelSnapshot)
		sn := c.s.o.Snapshotters[name]
		if !ok || sn == nil || len(cfg.chain) == 0 || v != cfg.chain[len(cfg.chain)-1].String() {
			continue
		}
		for _, key := range cfg.chain {
			if info, err := sn.Stat(ctx, key.String()); errdefs.IsNotFound(err) || err == nil && info.Kind != snapshots.KindCommitted {
				c.add(ProblemUnpacked, store.Damage, "%s: snapshot %s is not there, though the image was unpacked", name, key)
			}
		}
	}
}

// wanted tells whether a document's labels keep a blob from being collected.
func (c *inspection) wanted(ctx context.Context, d ocispec.Descriptor, blob digest.Digest) bool {
	info, err := c.s.o.Content.Info(ctx, d.Digest)
	if err != nil {
		return false
	}
	for k, v := range info.Labels {
		if v == blob.String() && strings.HasPrefix(k, strings.TrimSuffix(labelContent, ".")) {
			return true
		}
	}
	return false
}

func (c *inspection) unpacked(ctx context.Context, chain digest.Digest) (string, bool) {
	for name, sn := range c.s.o.Snapshotters {
		if _, err := sn.Stat(ctx, chain.String()); err == nil {
			return name, true
		}
	}
	return "", false
}

// blob looks whether a blob's bytes are there; the store checks what they are.
func (c *inspection) blob(ctx context.Context, what string, d ocispec.Descriptor) {
	ra, err := c.s.o.Content.ReaderAt(ctx, d)
	if err != nil {
		c.add(ProblemIncomplete, store.Damage, "%s %s: %v", what, d.Digest, err)
		return
	}
	ra.Close()
}

// labelled checks that garbage collection knows what a document refers to. Clients may label
// only some of it, but never nothing.
func (c *inspection) labelled(ctx context.Context, d ocispec.Descriptor, children []ocispec.Descriptor) {
	info, err := c.s.o.Content.Info(ctx, d.Digest)
	if err != nil || len(children) == 0 {
		return
	}
	for k := range info.Labels {
		if strings.HasPrefix(k, strings.TrimSuffix(labelContent, ".")) {
			return
		}
	}
	c.add(ProblemUnlabelled, store.Damage, "nothing keeps what %s refers to from being collected", d.Digest)
}

// Repair makes an image whole again: from what is here if that is enough, else from the
// registry that its blobs say they came from. Where they do not say so, or the registry
// has it no more, the image's name is dropped, unless inUse tells that containers use it.
// An image that a registry cannot be asked for now stays as it is: ErrUnavailable.
func (s *Service) Repair(ctx context.Context, f store.Finding, inUse func(store.Node) bool) (done string, err error) {
	ctx = namespaced(ctx)
	defer func() {
		if err != nil {
			err = fmt.Errorf("repair image %s: %w", f.Object, err)
		}
	}()
	r, err := s.o.Images.Get(ctx, f.Object)
	if errdefs.IsNotFound(err) {
		return "it is gone", nil
	}
	if err != nil {
		return "", err
	}
	snapshotter := ""
	if f.Problem == ProblemUnpacked {
		snapshotter, _, _ = strings.Cut(f.Detail, ":")
	}
	localErr := s.restore(ctx, r, nil, snapshotter)
	if localErr == nil && !slices.ContainsFunc(s.checkImage(ctx, r), func(f store.Finding) bool { return f.Severity == store.Damage }) {
		return "made whole from what is here", nil
	}
	if localErr == nil {
		localErr = errors.New("its bytes are not here")
	}
	named, ok := s.source(ctx, r)
	if ok {
		err = s.restore(ctx, r, named, snapshotter)
		if err == nil {
			return "fetched what was missing from " + reference.FamiliarName(named), nil
		}
		if !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err) {
			return "", fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
		}
	}
	if inUse(store.Node{Type: "images", Namespace: f.Namespace, ID: r.Name}) {
		return "", fmt.Errorf("it cannot be fetched again, and containers use it: %w: %w", localErr, errdefs.ErrFailedPrecondition)
	}
	if err := s.o.Images.Delete(ctx, r.Name); err != nil && !errdefs.IsNotFound(err) {
		return "", err
	}
	return "dropped: it cannot be fetched again", nil
}

// source gives the repository that an image can be fetched from: its name must lead to
// a registry, and a blob say that it came from there. Which one does not matter: those of
// this image may be what was lost.
func (s *Service) source(ctx context.Context, r images.Image) (reference.Named, bool) {
	named, err := reference.ParseNormalizedNamed(r.Name)
	if err != nil {
		return nil, false
	}
	named = reference.TrimNamed(named)
	label := labelDistribution + (&url.URL{Host: reference.Domain(named)}).Hostname()
	found := errors.New("found")
	err = s.o.Content.Walk(ctx, func(info content.Info) error {
		if slices.Contains(strings.Split(info.Labels[label], ","), reference.Path(named)) {
			return found
		}
		return nil
	})
	return named, errors.Is(err, found)
}

// restore brings all of an image into the store again, unpacked and labelled, and leaves
// its name alone. Without a repository only what is here is used.
func (s *Service) restore(ctx context.Context, r images.Image, repository reference.Named, snapshotter string) error {
	name, _, err := s.snapshotter(snapshotter)
	if err != nil {
		return err
	}
	ctx, l, err := s.newLease(ctx)
	if err != nil {
		return err
	}
	defer l.release()
	work := s.newWork(l, name, nil)
	defer work.release()
	var res *resolved
	if repository == nil {
		if res, err = s.resolveHere(ctx, r.Target); err != nil {
			return err
		}
	} else {
		repo, err := s.registry.Repository(repository, registry.Credentials{})
		if err != nil {
			return err
		}
		work.repo = repo
		digested, err := reference.WithDigest(repository, r.Target.Digest)
		if err != nil {
			return err
		}
		if res, err = s.resolve(ctx, repo, digested, nil); err != nil {
			return err
		}
	}
	return work.image(ctx, r.Name, res)
}

// resolveHere is resolve for an image whose documents are all in the store.
func (s *Service) resolveHere(ctx context.Context, target ocispec.Descriptor) (*resolved, error) {
	r := &resolved{target: target, blobs: map[digest.Digest][]byte{}}
	read := func(d ocispec.Descriptor) ([]byte, error) {
		b, err := readBlob(ctx, s.o.Content, d)
		if err == nil && d.Digest.Algorithm().FromBytes(b) != d.Digest {
			err = fmt.Errorf("content %s has another digest: %w", d.Digest, errdefs.ErrDataLoss)
		}
		return b, err
	}
	what := target.Digest.String()
	body, err := read(target)
	if err != nil {
		return nil, err
	}
	doc, err := r.add(what, &r.target, body)
	if err != nil {
		return nil, err
	}
	r.chosen = r.target
	for depth := 0; doc.index != nil; depth++ {
		if depth == maxNesting {
			return nil, invalid(what, "indexes nested too deep")
		}
		r.indexes = append(r.indexes, r.chosen)
		here := slices.IndexFunc(doc.index.Manifests, func(d ocispec.Descriptor) bool {
			_, err := s.o.Content.Info(ctx, d.Digest)
			return err == nil
		})
		if here < 0 {
			return nil, fmt.Errorf("no manifest of %s is here: %w", what, errdefs.ErrNotFound)
		}
		r.chosen = doc.index.Manifests[here]
		if body, err = read(r.chosen); err != nil {
			return nil, err
		}
		if doc, err = r.add(what, &r.chosen, body); err != nil {
			return nil, err
		}
	}
	r.manifest = doc.manifest
	if body, err = read(r.manifest.Config); err != nil {
		return nil, err
	}
	r.blobs[r.manifest.Config.Digest] = body
	if r.config, err = parseConfig("config of "+what, body); err != nil {
		return nil, err
	}
	return r, r.config.fits(what, r.manifest)
}
