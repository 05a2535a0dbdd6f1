package copier

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/hako-engine/hako/image/manifest"
	"github.com/hako-engine/hako/image/transport"
)

// memory is a source of one small blob that was made here.
type memory struct {
	transport.Source
	raw []byte
}

func (m memory) Blob(_ context.Context, _ ocispec.Descriptor, offset int64) (io.ReadCloser, error) {
	return io.NopCloser(strings.NewReader(string(m.raw[min(offset, int64(len(m.raw))):]))), nil
}

// convert copies one image in another form.
func (c *copying) convert(ctx context.Context, n *node) error {
	m := *n.doc.Manifest
	m.Layers = slices.Clone(m.Layers)
	diffIDs := make([]digest.Digest, len(m.Layers))
	eg, egCtx := errgroup.WithContext(ctx)
	for i, d := range m.Layers {
		eg.Go(func() error {
			l, err := c.layer(egCtx, d)
			m.Layers[i], diffIDs[i] = l.Descriptor, l.DiffID
			return err
		})
	}
	if err := eg.Wait(); err != nil {
		return err
	}
	config, err := transport.ReadBlob(ctx, c.src, m.Config, manifest.MaxSize)
	if err != nil {
		return err
	}
	if config, err = withDiffIDs(config, diffIDs); err != nil {
		return fmt.Errorf("config of %s: %w", n.desc.Digest, err)
	}
	m.Config.Digest, m.Config.Size = digest.FromBytes(config), int64(len(config))
	mediaType := n.doc.MediaType
	switch {
	case c.o.Format == "oci" || c.o.Convert != nil && c.o.Format == "" && needsOCI(m.Layers):
		mediaType, m.Config.MediaType = ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig
	case c.o.Format == "docker":
		mediaType, m.Config.MediaType = manifest.DockerManifest, manifest.DockerConfig
		m.Annotations, m.ArtifactType, m.Subject = nil, "", nil // Docker's manifests have none
		m.Config.Annotations = nil
	}
	for i := range m.Layers {
		if m.Layers[i].MediaType, err = layerType(m.Layers[i].MediaType, mediaType == manifest.DockerManifest); err != nil {
			return err
		}
		if mediaType == manifest.DockerManifest && c.o.Format == "docker" {
			m.Layers[i].Annotations = nil
		}
	}
	m.MediaType = mediaType
	if err := c.blob(ctx, memory{raw: config}, m.Config); err != nil {
		return err
	}
	return n.replace(mediaType, m)
}

// needsOCI says whether layers are of a kind that Docker's manifests do not have.
func needsOCI(layers []ocispec.Descriptor) bool {
	return slices.ContainsFunc(layers, func(d ocispec.Descriptor) bool {
		return strings.Contains(d.MediaType, "zstd") || strings.Contains(d.MediaType, "erofs")
	})
}

func (c *copying) layer(ctx context.Context, d ocispec.Descriptor) (Layer, error) {
	if c.o.Convert == nil {
		return Layer{Descriptor: d}, c.blob(ctx, c.src, d)
	}
	if err := c.enter(ctx); err != nil {
		return Layer{}, err
	}
	defer func() { <-c.slots }()
	l, err := c.o.Convert.Layer(ctx, c.src, d, func(n int64) { c.o.Progress(Event{d.Digest, "Converting", n, d.Size}) })
	if err != nil {
		return Layer{}, fmt.Errorf("convert layer %s: %w", d.Digest, err)
	}
	src := l.Blob
	if src == nil {
		src = c.src
	}
	return l, c.once(ctx, l.Descriptor.Digest, func() error { return c.put(ctx, src, l.Descriptor) })
}

// layerType names a layer's type in the words of one family.
func layerType(mt string, docker bool) (string, error) {
	oci := map[string]string{
		manifest.DockerLayer: ocispec.MediaTypeImageLayer, manifest.DockerLayerGzip: ocispec.MediaTypeImageLayerGzip, manifest.DockerLayerZstd: ocispec.MediaTypeImageLayerZstd,
		manifest.DockerForeignLayer: ocispec.MediaTypeImageLayerNonDistributableGzip, //nolint:staticcheck // old images have them
	}
	if !docker {
		if t, ok := oci[mt]; ok {
			return t, nil
		}
		return mt, nil
	}
	for d, o := range oci {
		if mt == o || mt == d {
			return d, nil
		}
	}
	return "", fmt.Errorf("layers of type %s do not exist in Docker's format: %w", mt, errdefs.ErrInvalidArgument)
}

// withDiffIDs enters digests of uncompressed layers into a config; what it holds besides
// stays as it is, known to us or not.
func withDiffIDs(config []byte, ids []digest.Digest) ([]byte, error) {
	if !slices.ContainsFunc(ids, func(d digest.Digest) bool { return d != "" }) {
		return config, nil
	}
	var doc map[string]json.RawMessage
	if err := json.Unmarshal(config, &doc); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	var fs ocispec.RootFS
	if err := json.Unmarshal(doc["rootfs"], &fs); err != nil || len(fs.DiffIDs) != len(ids) {
		return nil, fmt.Errorf("%w: %w", errNoLayers, errdefs.ErrInvalidArgument)
	}
	for i, d := range ids {
		if d != "" {
			fs.DiffIDs[i] = d
		}
	}
	raw, err := json.Marshal(fs)
	if err != nil {
		return nil, err
	}
	doc["rootfs"] = raw
	return json.Marshal(doc)
}

// reindex makes an index name what its entries became.
func (c *copying) reindex(n *node) error {
	idx := *n.doc.Index
	idx.Manifests = slices.Clone(idx.Manifests)
	became := map[digest.Digest]digest.Digest{}
	for i, child := range n.children {
		if child != nil {
			became[idx.Manifests[i].Digest] = child.desc.Digest
			d := &idx.Manifests[i]
			d.MediaType, d.Digest, d.Size = child.desc.MediaType, child.desc.Digest, child.desc.Size
		}
	}
	for i := range idx.Manifests {
		d := &idx.Manifests[i]
		if about := manifest.About(*d); became[about] != "" {
			d.Annotations = maps.Clone(d.Annotations)
			d.Annotations["vnd.docker.reference.digest"] = became[about].String()
		}
	}
	mediaType := n.doc.MediaType
	switch {
	case c.o.Format == "docker":
		mediaType = manifest.DockerIndex
		idx.Annotations, idx.ArtifactType, idx.Subject = nil, "", nil
	case c.o.Format == "oci", slices.ContainsFunc(idx.Manifests, func(d ocispec.Descriptor) bool { return d.MediaType == ocispec.MediaTypeImageManifest }):
		mediaType = ocispec.MediaTypeImageIndex
	}
	idx.MediaType = mediaType
	return n.replace(mediaType, idx)
}
