package image

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/registry"
	"github.com/hako-engine/hako/image/unpack"
	"github.com/hako-engine/hako/internal/ctxio"
)

// CommitOptions of a commit.
type CommitOptions struct {
	// Base is the image that the new one builds upon; nil: none.
	Base *Image
	// Config is the new image's. RootFS is filled in; History holds its own steps, those of
	// the base are put before them.
	Config dockerspec.DockerOCIImage
	// Layer writes the new layer as a tar, deletions as whiteouts of the OCI layer format; nil:
	// the image has the base's layers.
	Layer       func(ctx context.Context, w io.Writer) error
	Name        string // as users write it; "": the image is known by its id
	Snapshotter string
}

// ImportOptions of an import.
type ImportOptions struct {
	Config      dockerspec.DockerOCIImage // as in CommitOptions
	Name        string
	Snapshotter string
}

// Commit makes an image of a base and a new layer, unpacks it and names it. What is stored
// and unpacked is checked as for a pull.
func (s *Service) Commit(ctx context.Context, o CommitOptions) (Image, error) {
	img, err := s.commit(namespaced(ctx), o)
	if err != nil {
		return Image{}, fmt.Errorf("commit: %w", err)
	}
	return img, nil
}

func (s *Service) commit(ctx context.Context, o CommitOptions) (Image, error) {
	name := ""
	if o.Name != "" {
		named, err := parseName(o.Name)
		if err != nil {
			return Image{}, err
		}
		if isDigested(named) {
			return Image{}, invalid(o.Name, "a name with digest cannot be given")
		}
		name = named.String()
	}
	sName, _, err := s.snapshotter(o.Snapshotter)
	if err != nil {
		return Image{}, err
	}
	ctx, l, err := s.newLease(ctx)
	if err != nil {
		return Image{}, err
	}
	defer l.release()
	w := s.newWork(l, sName, nil)
	defer w.release()
	r, err := w.compose(ctx, o)
	if err != nil {
		return Image{}, err
	}
	if name != "" {
		if err := s.mayName(ctx, name, r.target); err != nil {
			return Image{}, err
		}
	}
	if err := w.image(ctx, r.chosen.Digest.String(), r); err != nil {
		return Image{}, err
	}
	if name != "" {
		err = s.setName(ctx, name, r.target)
	} else {
		err = s.keepNameless(ctx, r.target)
	}
	if err != nil {
		return Image{}, err
	}
	return s.describe(ctx, r.target, r.chosen)
}

// compose stores the layer, and makes the documents of the new image.
func (w *work) compose(ctx context.Context, o CommitOptions) (*resolved, error) {
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{}}
	cfg := o.Config
	cfg.RootFS = ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{}}
	if o.Base != nil {
		doc, err := w.s.document(ctx, o.Base.Manifest)
		if err != nil {
			return nil, err
		}
		base, err := w.s.config(ctx, o.Base.Config)
		if err != nil {
			return nil, err
		}
		m.MediaType, m.Layers = doc.mediaType, slices.Clone(doc.manifest.Layers)
		cfg.RootFS.DiffIDs = append(cfg.RootFS.DiffIDs, base.diffIDs...)
		cfg.History = slices.Concat(base.History, cfg.History)
	}
	m.Config.MediaType = ocispec.MediaTypeImageConfig
	layerType := ocispec.MediaTypeImageLayerGzip
	if m.MediaType == registry.DockerManifest {
		m.Config.MediaType, layerType = dockerConfig, dockerLayerGzip
	}
	if o.Layer != nil {
		if len(m.Layers) >= maxLayers {
			return nil, fmt.Errorf("the image has %d layers already: %w", len(m.Layers), errdefs.ErrResourceExhausted)
		}
		d, diffID, err := w.storeLayer(ctx, o.Layer)
		if err != nil {
			return nil, err
		}
		d.MediaType = layerType
		m.Layers = append(m.Layers, d)
		cfg.RootFS.DiffIDs = append(cfg.RootFS.DiffIDs, diffID)
	}
	body, err := json.Marshal(cfg)
	if err != nil {
		return nil, err
	}
	m.Config.Digest, m.Config.Size = digest.FromBytes(body), int64(len(body))
	parsed, err := parseConfig("config", body)
	if err != nil {
		return nil, err
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	if len(raw) > maxDocument || len(body) > maxDocument {
		return nil, fmt.Errorf("the image's documents are larger than %d bytes: %w", maxDocument, errdefs.ErrResourceExhausted)
	}
	target := ocispec.Descriptor{MediaType: m.MediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	return &resolved{
		target: target, chosen: target, manifest: &m, config: parsed,
		blobs: map[digest.Digest][]byte{target.Digest: raw, m.Config.Digest: body},
	}, parsed.fits("manifest", &m)
}

// storeLayer compresses and stores what write gives.
func (w *work) storeLayer(ctx context.Context, write func(context.Context, io.Writer) error) (d ocispec.Descriptor, diffID digest.Digest, err error) {
	store := w.s.o.Content
	ref := "commit-" + w.l.l.ID
	cw, err := content.OpenWriter(ctx, store, content.WithRef(ref))
	if err != nil {
		return d, "", err
	}
	done := false
	defer func() {
		cw.Close()
		if !done {
			if err := store.Abort(context.WithoutCancel(ctx), ref); err != nil && !errdefs.IsNotFound(err) {
				w.s.o.Log.Warn("unfinished blob stays", "ref", ref, "err", err)
			}
		}
	}()
	hash := digest.SHA256.Digester()
	z := gzip.NewWriter(cw)
	if err := write(ctx, io.MultiWriter(z, hash.Hash())); err != nil {
		return d, "", err
	}
	if err := z.Close(); err != nil {
		return d, "", err
	}
	st, err := cw.Status()
	if err != nil {
		return d, "", err
	}
	d.Digest, d.Size, diffID = cw.Digest(), st.Offset, hash.Digest()
	err = cw.Commit(ctx, d.Size, d.Digest, content.WithLabels(map[string]string{labelUncompressed: diffID.String()}))
	if done = err == nil || errdefs.IsAlreadyExists(err); !done {
		return d, "", err
	}
	return d, diffID, nil
}

// Import makes an image of one layer of an archive of files, a tar that may be compressed.
func (s *Service) Import(ctx context.Context, r io.Reader, o ImportOptions) (Image, error) {
	ctx = namespaced(ctx)
	plain := bufio.NewReader(r)
	r = plain
	switch head, _ := plain.Peek(6); {
	case bytes.HasPrefix(head, []byte("BZh")):
		r = bzip2.NewReader(plain)
	case bytes.HasPrefix(head, []byte("\xfd7zXZ\x00")):
		return Image{}, fmt.Errorf("import: archives compressed with xz are not read, decompress it before: %w", errdefs.ErrNotImplemented)
	}
	dec, err := unpack.NewDecoder(r, s.o.Limits)
	if err != nil {
		return Image{}, fmt.Errorf("import: %w", err)
	}
	defer dec.Close()
	img, err := s.commit(ctx, CommitOptions{
		Config: o.Config, Name: o.Name, Snapshotter: o.Snapshotter,
		Layer: func(ctx context.Context, w io.Writer) error {
			n, err := io.Copy(w, ctxio.Reader(ctx, dec, nil))
			if err == nil && n == 0 {
				err = invalid("archive", "it is empty")
			}
			return err
		},
	})
	if err != nil {
		return Image{}, fmt.Errorf("import: %w", err)
	}
	return img, nil
}

// HistoryStep is a step of an image's history that was made now.
func HistoryStep(createdBy, author, comment string, empty bool) ocispec.History {
	now := time.Now().UTC()
	return ocispec.History{Created: &now, CreatedBy: createdBy, Author: author, Comment: comment, EmptyLayer: empty}
}
