// Package copier brings an image from one place to another: all of it, or some platforms,
// with its signatures if they are wanted, as it is or in another form.
//
// In flow a source and a destination of package transport; out flows the same image, with
// the same digests unless another form was asked for. Memory holds documents, bounded, and
// a buffer for each blob under way; blobs stream.
package copier

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/hako-engine/hako/image/manifest"
	"github.com/hako-engine/hako/image/transport"
)

const (
	// DefaultJobs is how many blobs are under way at once.
	DefaultJobs = 6

	maxNesting   = 4
	maxDocuments = 2_000
	maxMemory    = 128 << 20 // bytes of documents of one image
)

// Event is one step of one blob, or of a document.
type Event struct {
	Digest  digest.Digest
	Action  string // "Copying", "Copied", "Mounted", "Already there", "Converting", "Converted"
	Current int64  // bytes
	Total   int64  // bytes
}

// Layer is what a converter made of a layer: Open gives its bytes until the converter is closed.
type Layer struct {
	Descriptor ocispec.Descriptor
	DiffID     digest.Digest // of the uncompressed layer; "": the same as before
	Blob       transport.Source
}

// Converter makes other layers of layers. It is called from several goroutines.
type Converter interface {
	// Layer converts one, or gives it back as it is.
	Layer(ctx context.Context, from transport.Source, d ocispec.Descriptor, tell func(int64)) (Layer, error)
}

// Options of a copy. The zero value copies everything as it is.
type Options struct {
	// Platforms are copied of an index: one of them gives the image alone, several an index with
	// these only. Empty: all.
	Platforms []ocispec.Platform
	// Referrers copies what refers to the image, too: signatures, SBOMs, attestations, also
	// those that cosign keeps by tags.
	Referrers bool
	// Format of the documents: "" as they are, "oci" or "docker".
	Format string
	// Tags are further ones that the destination gives the image.
	Tags []string
	// Convert changes layers; nil: none.
	Convert Converter
	// Jobs is how many blobs are copied side by side; 0: DefaultJobs.
	Jobs int
	// Progress is called often and from several goroutines; nil for none.
	Progress func(Event)
}

// Result of a copy.
type Result struct {
	Top       ocispec.Descriptor // as it is at the destination
	Source    digest.Digest      // of the top document at the source
	Blobs     int                // that the image has
	Sent      int64              // bytes of blobs that were copied
	Mounted   int                // blobs that the registry took from another repository
	Present   int                // blobs that were there
	UpToDate  bool               // nothing was to do
	Referrers int                // documents that refer to the image and were copied
}

// Changes says whether the copy will have other digests.
func (o Options) Changes() bool { return o.Format != "" || o.Convert != nil }

// Copy copies an image. The reference of the destination names it when all of it is there.
//
// Errors: errdefs.ErrNotFound, ErrDataLoss (wrong digest), ErrInvalidArgument (a broken
// image), ErrUnavailable, and those of source and destination.
func Copy(ctx context.Context, src transport.Source, dst transport.Destination, o Options) (Result, error) {
	if o.Jobs <= 0 {
		o.Jobs = DefaultJobs
	}
	if o.Progress == nil {
		o.Progress = func(Event) {}
	}
	switch o.Format {
	case "", "oci", "docker":
	default:
		return Result{}, fmt.Errorf("format %q is neither oci nor docker: %w", o.Format, errdefs.ErrInvalidArgument)
	}
	c := newCopying(src, dst, o)
	root, err := c.root(ctx)
	if err != nil {
		return Result{}, err
	}
	before, err := dst.Current(ctx)
	if err != nil && !errdefs.IsNotFound(err) {
		return Result{}, err
	}
	if !o.Changes() && !o.Referrers && len(o.Tags) == 0 && before == root.desc.Digest && dst.Complete(ctx, root.desc) {
		c.res.Top, c.res.UpToDate = root.desc, true
		return c.res, nil
	}
	if err := c.image(ctx, root, true); err != nil {
		return c.res, err
	}
	c.res.Top = root.desc
	if o.Referrers {
		if o.Changes() {
			return c.res, fmt.Errorf("signatures are of the image as it is and do not fit a converted one: copy with referrers, or convert: %w", errdefs.ErrInvalidArgument)
		}
		if err := c.referrers(ctx, root); err != nil {
			return c.res, err
		}
	}
	if err := dst.PutTop(ctx, root.desc, root.doc.Raw); err != nil {
		return c.res, err
	}
	for _, tag := range o.Tags {
		if err := dst.PutTagged(ctx, tag, root.desc, root.doc.Raw); err != nil {
			return c.res, fmt.Errorf("tag %s: %w", tag, err)
		}
	}
	c.res.UpToDate = before == root.desc.Digest && c.res.Present == c.res.Blobs
	return c.res, dst.Commit(ctx)
}

func newCopying(src transport.Source, dst transport.Destination, o Options) *copying {
	return &copying{src: src, dst: dst, o: o, blobs: map[digest.Digest]*flight{}, slots: make(chan struct{}, o.Jobs)}
}

// Target gives the document that a copy without changes would end with.
func Target(ctx context.Context, src transport.Source, o Options) (ocispec.Descriptor, error) {
	if o.Changes() {
		return ocispec.Descriptor{}, fmt.Errorf("what a conversion gives is known afterwards: %w", errdefs.ErrInvalidArgument)
	}
	if o.Jobs <= 0 {
		o.Jobs = DefaultJobs
	}
	root, err := newCopying(src, nil, o).root(ctx)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return root.desc, nil
}

// root reads the documents of the wanted image.
func (c *copying) root(ctx context.Context) (*node, error) {
	top, raw, err := c.src.Top(ctx)
	if err != nil {
		return nil, err
	}
	c.res.Source = top.Digest
	root, err := c.tree(ctx, top, raw)
	if err == nil && len(c.o.Platforms) > 0 {
		root, err = c.choose(root)
	}
	return root, err
}

// node is a document with what it leads to.
type node struct {
	desc     ocispec.Descriptor
	doc      manifest.Document
	children []*node // of an index; nil entries: what is no document, a blob
}

type copying struct {
	src   transport.Source
	dst   transport.Destination
	o     Options
	slots chan struct{}

	documents atomic.Int64
	memory    atomic.Int64

	mu    sync.Mutex
	blobs map[digest.Digest]*flight
	res   Result
}

// flight is a blob that is, or was, under way: several images of an index share blobs.
type flight struct {
	done chan struct{}
	err  error
}

// once copies a blob one time, and lets all others who need it wait for that.
func (c *copying) once(ctx context.Context, d digest.Digest, f func() error) error {
	c.mu.Lock()
	fl, known := c.blobs[d]
	if !known {
		fl = &flight{done: make(chan struct{})}
		c.blobs[d] = fl
	}
	c.mu.Unlock()
	if known {
		select {
		case <-fl.done:
			return fl.err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	fl.err = f()
	close(fl.done)
	return fl.err
}

// tree reads all documents of an image.
func (c *copying) tree(ctx context.Context, d ocispec.Descriptor, raw []byte) (*node, error) {
	return c.grow(ctx, d, raw, 0)
}

func (c *copying) grow(ctx context.Context, d ocispec.Descriptor, raw []byte, depth int) (*node, error) {
	if c.documents.Add(1) > maxDocuments || c.memory.Add(int64(len(raw))) > maxMemory {
		return nil, fmt.Errorf("the image has more than %d manifests, or %d bytes of them: %w", maxDocuments, maxMemory, errdefs.ErrResourceExhausted)
	}
	doc, err := manifest.Parse("manifest "+d.Digest.String(), d.MediaType, raw)
	if err != nil {
		return nil, err
	}
	n := &node{desc: ocispec.Descriptor{MediaType: doc.MediaType, Digest: d.Digest, Size: int64(len(raw))}, doc: doc}
	if doc.Index == nil {
		return n, nil
	}
	if depth == maxNesting {
		return nil, fmt.Errorf("manifest %s: indexes nested too deep: %w", d.Digest, errdefs.ErrInvalidArgument)
	}
	n.children = make([]*node, len(doc.Index.Manifests))
	wanted := c.wanted(doc.Index)
	eg, ctx := errgroup.WithContext(ctx)
	eg.SetLimit(c.o.Jobs)
	for i, m := range doc.Index.Manifests {
		if m.MediaType != "" && !manifest.IsDocument(m.MediaType) || !wanted[m.Digest] {
			continue
		}
		eg.Go(func() error {
			body, err := c.src.Document(ctx, m)
			if err != nil {
				return err
			}
			n.children[i], err = c.grow(ctx, m, body, depth+1)
			return err
		})
	}
	return n, eg.Wait()
}

// wanted says which entries of an index have to be read.
func (c *copying) wanted(idx *ocispec.Index) map[digest.Digest]bool {
	all := map[digest.Digest]bool{}
	for _, p := range c.o.Platforms {
		for _, d := range manifest.Candidates(idx, platforms.Only(platforms.Normalize(p))) {
			all[d.Digest] = true
			break
		}
	}
	for _, d := range idx.Manifests {
		if len(c.o.Platforms) == 0 || manifest.IsIndex(d.MediaType) || manifest.IsCompanion(d) && all[manifest.About(d)] {
			all[d.Digest] = true
		}
	}
	return all
}

// choose keeps the wanted platforms: one gives its manifest, several an index of them.
func (c *copying) choose(root *node) (*node, error) {
	if root.doc.Index == nil {
		return root, nil // an image for one platform, whose digest was asked for
	}
	if len(c.o.Platforms) == 1 {
		return pick(root, c.o.Platforms[0])
	}
	idx := *root.doc.Index
	idx.Manifests = nil
	out := &node{}
	keep := map[digest.Digest]bool{}
	for _, p := range c.o.Platforms {
		one, err := pick(root, p)
		if err != nil {
			return nil, err
		}
		keep[one.desc.Digest] = true
	}
	for i, d := range root.doc.Index.Manifests {
		if keep[d.Digest] || manifest.IsCompanion(d) && keep[manifest.About(d)] {
			idx.Manifests = append(idx.Manifests, d)
			out.children = append(out.children, root.children[i])
		}
	}
	return out, out.replace(root.doc.MediaType, idx)
}

func pick(n *node, p ocispec.Platform) (*node, error) {
	for _, d := range manifest.Candidates(n.doc.Index, platforms.Only(platforms.Normalize(p))) {
		for i, m := range n.doc.Index.Manifests {
			if m.Digest != d.Digest || n.children[i] == nil {
				continue
			}
			if n.children[i].doc.Index != nil {
				return pick(n.children[i], p)
			}
			return n.children[i], nil
		}
	}
	var have []string
	for _, m := range n.doc.Index.Manifests {
		if m.Platform != nil && !manifest.IsCompanion(m) {
			have = append(have, platforms.Format(*m.Platform))
		}
	}
	return nil, fmt.Errorf("no image for %s, only for %s: %w", platforms.Format(p), strings.Join(have, ", "), errdefs.ErrNotFound)
}

// replace gives a node another document.
func (n *node) replace(mediaType string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	doc, err := manifest.Parse("manifest", mediaType, raw)
	if err != nil {
		return err
	}
	n.doc = doc
	n.desc = ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	return nil
}

// image copies all below a document, and the document itself unless it is the top.
func (c *copying) image(ctx context.Context, n *node, top bool) error {
	if !top && !c.o.Changes() && c.dst.Complete(ctx, n.desc) {
		return nil
	}
	eg, egCtx := errgroup.WithContext(ctx)
	if n.doc.Index != nil {
		for i, child := range n.children {
			eg.Go(func() error {
				if child == nil {
					return c.blob(egCtx, c.src, n.doc.Index.Manifests[i])
				}
				return c.image(egCtx, child, false)
			})
		}
	} else if c.o.Changes() && n.doc.IsImage() {
		eg.Go(func() error { return c.convert(egCtx, n) })
	} else {
		for _, d := range append(n.doc.Manifest.Layers, n.doc.Manifest.Config) {
			eg.Go(func() error { return c.blob(egCtx, c.src, d) })
		}
	}
	if err := eg.Wait(); err != nil {
		return err
	}
	if c.o.Changes() && n.doc.Index != nil {
		if err := c.reindex(n); err != nil {
			return err
		}
	}
	if top {
		return nil
	}
	return c.dst.PutDocument(ctx, n.desc, n.doc.Raw)
}

// enter waits for a slot.
func (c *copying) enter(ctx context.Context) error {
	select {
	case c.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// blob copies one blob, unless another document of the image has it copied.
func (c *copying) blob(ctx context.Context, src transport.Source, d ocispec.Descriptor) error {
	return c.once(ctx, d.Digest, func() error {
		if err := c.enter(ctx); err != nil {
			return err
		}
		defer func() { <-c.slots }()
		return c.put(ctx, src, d)
	})
}

func (c *copying) put(ctx context.Context, src transport.Source, d ocispec.Descriptor) error {
	var last int64
	out, err := c.dst.Put(ctx, d, src, func(n int64) {
		last = n
		c.o.Progress(Event{d.Digest, "Copying", n, d.Size})
	})
	if err != nil {
		if foreign(d) && (errdefs.IsNotFound(err) || errdefs.IsPermissionDenied(err)) {
			return nil // kept elsewhere by license: the manifest names it, and nobody has to have it
		}
		return fmt.Errorf("copy %s: %w", d.Digest, err)
	}
	c.mu.Lock()
	c.res.Blobs++
	action := "Copied"
	switch out {
	case transport.Present:
		c.res.Present++
		action = "Already there"
	case transport.Mounted:
		c.res.Mounted++
		action = "Mounted"
	default:
		c.res.Sent += max(last, 0)
	}
	c.mu.Unlock()
	c.o.Progress(Event{d.Digest, action, d.Size, d.Size})
	return nil
}

// foreign says whether a layer is one that registries need not have.
func foreign(d ocispec.Descriptor) bool {
	return len(d.URLs) > 0 || strings.Contains(d.MediaType, "nondistributable") || strings.Contains(d.MediaType, "foreign")
}

// referrers copies what refers to an image or to one of the images in it.
func (c *copying) referrers(ctx context.Context, root *node) error {
	subjects := []digest.Digest{root.desc.Digest}
	for _, n := range root.children {
		if n != nil {
			subjects = append(subjects, n.desc.Digest)
		}
	}
	done := map[digest.Digest]bool{}
	for i := 0; i < len(subjects); i++ { // grows: a referrer may have referrers
		if len(subjects) > maxDocuments {
			return fmt.Errorf("more than %d documents refer to the image: %w", maxDocuments, errdefs.ErrResourceExhausted)
		}
		list, err := c.src.Referrers(ctx, subjects[i])
		if err != nil {
			return fmt.Errorf("referrers of %s: %w", subjects[i], err)
		}
		for _, d := range list {
			if done[d.Digest] {
				continue
			}
			done[d.Digest] = true
			if err := c.referrer(ctx, subjects[i], d); err != nil {
				return fmt.Errorf("referrer %s: %w", d.Digest, err)
			}
			subjects = append(subjects, d.Digest)
		}
		// What cosign kept before there were referrers.
		for _, suffix := range []string{".sig", ".att", ".sbom"} {
			tag := strings.Replace(subjects[i].String(), ":", "-", 1) + suffix
			d, raw, err := c.src.Tagged(ctx, tag)
			if errdefs.IsNotFound(err) {
				continue
			}
			if err == nil {
				err = c.tagged(ctx, tag, d, raw)
			}
			if err != nil {
				return fmt.Errorf("%s: %w", tag, err)
			}
		}
	}
	return nil
}

func (c *copying) referrer(ctx context.Context, subject digest.Digest, d ocispec.Descriptor) error {
	if c.dst.Complete(ctx, d) {
		return nil
	}
	raw, err := c.src.Document(ctx, d)
	if err != nil {
		return err
	}
	n, err := c.tree(ctx, d, raw)
	if err != nil {
		return err
	}
	if err := c.image(ctx, n, false); err != nil {
		return err
	}
	c.res.Referrers++
	return c.dst.AddReferrer(ctx, subject, ocispec.Descriptor{
		MediaType: n.desc.MediaType, Digest: n.desc.Digest, Size: n.desc.Size, ArtifactType: n.doc.ArtifactType(), Annotations: n.doc.Annotations()})
}

func (c *copying) tagged(ctx context.Context, tag string, d ocispec.Descriptor, raw []byte) error {
	n, err := c.tree(ctx, d, raw)
	if err != nil {
		return err
	}
	if err := c.image(ctx, n, true); err != nil {
		return err
	}
	c.res.Referrers++
	return c.dst.PutTagged(ctx, tag, n.desc, n.doc.Raw)
}

var errNoLayers = errors.New("config and manifest have different numbers of layers")
