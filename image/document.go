package image

import (
	"context"
	_ "crypto/sha256" // digests of descriptors
	_ "crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/manifest"
	"github.com/hako-engine/hako/image/registry"
)

const (
	maxDocument = registry.MaxManifest // bytes of a manifest, index or config
	maxLayers   = 500                  // what overlayfs stacks
	maxNesting  = 3                    // indexes within indexes
)

// Docker's media types that OCI's have no counterpart in image-spec for.
const (
	dockerConfig       = "application/vnd.docker.container.image.v1+json"
	dockerLayer        = "application/vnd.docker.image.rootfs.diff.tar"
	dockerLayerGzip    = "application/vnd.docker.image.rootfs.diff.tar.gzip"
	dockerLayerZstd    = "application/vnd.docker.image.rootfs.diff.tar.zstd"
	dockerForeignLayer = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
)

// Layers in EROFS form, as containerd names them (core/images, MediaTypeErofsLayer): no tar archives, so that the diff id
// is the digest of the image itself.
const (
	erofsLayer     = "application/vnd.erofs.layer.v1"
	erofsLayerZstd = erofsLayer + "+zstd"
)

// layerTypes are the media types of layers that can be unpacked. What a layer is
// compressed with, its first bytes tell.
var layerTypes = []string{
	ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd,
	ocispec.MediaTypeImageLayerNonDistributable, ocispec.MediaTypeImageLayerNonDistributableGzip, ocispec.MediaTypeImageLayerNonDistributableZstd, //nolint:staticcheck // old images have them
	dockerLayer, dockerLayerGzip, dockerLayerZstd, dockerForeignLayer,
	erofsLayer, erofsLayerZstd,
}

// document is a manifest or an index: exactly one of both is set.
type document struct {
	manifest *ocispec.Manifest
	index    *ocispec.Index
	// mediaType is the one that the document goes by.
	mediaType string
}

func invalid(what string, format string, args ...any) error {
	return fmt.Errorf("%s: %s: %w", what, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}

// parseDocument reads a manifest or index (manifest.Parse) of a container image. mediaType is
// what its descriptor or its registry called it, "" if that is not known.
func parseDocument(what, mediaType string, body []byte) (document, error) {
	d, err := manifest.Parse(what, mediaType, body)
	if err != nil {
		return document{}, err
	}
	if d.Index != nil {
		for i, c := range d.Index.Manifests {
			if c.Size > maxDocument && c.MediaType == "" { // of the types that manifest.Parse knows it has seen to that
				return document{}, fmt.Errorf("%s: manifest %d: larger than %d bytes: %w", what, i, maxDocument, errdefs.ErrResourceExhausted)
			}
		}
		return document{index: d.Index, mediaType: d.MediaType}, nil
	}
	m := d.Manifest
	if m.Layers == nil {
		return document{}, invalid(what, "layers is not a list")
	}
	if m.Config.MediaType != dockerConfig && m.Config.MediaType != ocispec.MediaTypeImageConfig {
		return document{}, invalid(what, "not a container image: its config has media type %q", m.Config.MediaType)
	}
	if m.Config.Size > maxDocument {
		return document{}, fmt.Errorf("%s: config is larger than %d bytes: %w", what, maxDocument, errdefs.ErrResourceExhausted)
	}
	if len(m.Layers) > maxLayers {
		return document{}, fmt.Errorf("%s: %d layers, more than %d: %w", what, len(m.Layers), maxLayers, errdefs.ErrResourceExhausted)
	}
	for i, l := range m.Layers {
		if !slices.Contains(layerTypes, l.MediaType) {
			return document{}, invalid(what, "layer %d has unknown media type %q", i, l.MediaType)
		}
		m.Layers[i].URLs = nil // foreign addresses are never asked
	}
	return document{manifest: m, mediaType: d.MediaType}, nil
}

func isManifestType(mt string) bool {
	return mt == "" || mt == ocispec.MediaTypeImageManifest || mt == registry.DockerManifest || mt == ocispec.MediaTypeImageIndex || mt == registry.DockerIndex
}

// config is an image's configuration, checked against the manifest.
type config struct {
	dockerspec.DockerOCIImage
	diffIDs []digest.Digest
	chain   []digest.Digest // chain id of each layer
}

// parseConfig reads an image's configuration.
func parseConfig(what string, body []byte) (config, error) {
	var c config
	if len(body) > maxDocument {
		return c, fmt.Errorf("%s: larger than %d bytes: %w", what, maxDocument, errdefs.ErrResourceExhausted)
	}
	if _, err := manifest.TopLevel(body); err != nil {
		return c, invalid(what, "%v", err)
	}
	if err := json.Unmarshal(body, &c.DockerOCIImage); err != nil {
		return c, invalid(what, "%v", err)
	}
	if len(c.RootFS.DiffIDs) > maxLayers {
		return c, fmt.Errorf("%s: %d layers, more than %d: %w", what, len(c.RootFS.DiffIDs), maxLayers, errdefs.ErrResourceExhausted)
	}
	if t := c.RootFS.Type; t != "" && t != "layers" {
		return c, invalid(what, "root file system of type %q", t)
	}
	for i, d := range c.RootFS.DiffIDs {
		if err := manifest.ValidDigest(d); err != nil {
			return c, fmt.Errorf("%s: diff id %d: %w", what, i, err)
		}
	}
	c.diffIDs = c.RootFS.DiffIDs
	c.chain = identity.ChainIDs(slices.Clone(c.diffIDs))
	return c, nil
}

// platform is what the image says that it runs on.
func (c config) platform() ocispec.Platform {
	p := c.Platform
	if p.OS == "" {
		p.OS = "linux"
	}
	if p.Architecture == "" {
		p.Architecture = runtime.GOARCH
	}
	return platforms.Normalize(p)
}

// fits checks that config and manifest speak of the same layers.
func (c config) fits(what string, m *ocispec.Manifest) error {
	if len(c.diffIDs) != len(m.Layers) {
		return invalid(what, "%d layers in the manifest, %d in the config", len(m.Layers), len(c.diffIDs))
	}
	return nil
}

// readBlob reads a small blob from the store.
func readBlob(ctx context.Context, p content.Provider, d ocispec.Descriptor) ([]byte, error) {
	ra, err := p.ReaderAt(ctx, d)
	if err != nil {
		return nil, err
	}
	defer ra.Close()
	if ra.Size() > maxDocument {
		return nil, fmt.Errorf("content %s: larger than %d bytes: %w", d.Digest, maxDocument, errdefs.ErrResourceExhausted)
	}
	b := make([]byte, ra.Size())
	if n, err := ra.ReadAt(b, 0); err != nil && (!errors.Is(err, io.EOF) || n < len(b)) {
		return nil, fmt.Errorf("read content %s: %w", d.Digest, err)
	}
	return b, nil
}

// documents keeps what was parsed of the store's blobs. They never change.
type documents struct {
	mu      sync.Mutex
	docs    map[digest.Digest]document
	configs map[digest.Digest]config
}

const cachedDocuments = 256

func cached[T any](d *documents, m *map[digest.Digest]T, key digest.Digest, read func() (T, error)) (T, error) {
	d.mu.Lock()
	v, ok := (*m)[key]
	d.mu.Unlock()
	if ok {
		return v, nil
	}
	v, err := read()
	if err != nil {
		return v, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if *m == nil || len(*m) >= cachedDocuments {
		*m = map[digest.Digest]T{}
	}
	(*m)[key] = v
	return v, nil
}

// document reads a manifest or index of the store.
func (s *Service) document(ctx context.Context, d ocispec.Descriptor) (document, error) {
	return cached(&s.docs, &s.docs.docs, d.Digest, func() (document, error) {
		b, err := readBlob(ctx, s.o.Content, d)
		if err != nil {
			return document{}, err
		}
		return parseDocument(d.Digest.String(), d.MediaType, b)
	})
}

func (s *Service) config(ctx context.Context, d ocispec.Descriptor) (config, error) {
	return cached(&s.docs, &s.docs.configs, d.Digest, func() (config, error) {
		b, err := readBlob(ctx, s.o.Content, d)
		if err != nil {
			return config{}, err
		}
		return parseConfig("config "+d.Digest.String(), b)
	})
}

// matcher prefers what runs best on a platform; nil is the host's.
func matcher(p *ocispec.Platform) platforms.MatchComparer {
	if p == nil {
		return platforms.Default()
	}
	return platforms.Only(platforms.Normalize(*p))
}

func platformName(p *ocispec.Platform) string {
	if p == nil {
		return platforms.Format(platforms.DefaultSpec())
	}
	return platforms.FormatAll(*p)
}
