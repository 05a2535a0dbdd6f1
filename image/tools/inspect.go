package tools

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/manifest"
	"github.com/hako-engine/hako/image/transport"
)

// Report is what an image is, found out without fetching its layers.
type Report struct {
	Name        string            `json:"name"`
	Digest      digest.Digest     `json:"digest"`
	MediaType   string            `json:"mediaType"`
	Artifact    string            `json:"artifactType,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
	// Platforms that the image is there for; of an index, each of its images.
	Platforms []PlatformReport `json:"platforms"`
	// Image is the one that was asked for, or the host's, or the only one; nil: an artifact.
	Image *ImageReport `json:"image,omitempty"`
	// Referrers are signatures and other documents about it.
	Referrers []ReferrerReport `json:"referrers,omitempty"`
}

// PlatformReport is one image of an index.
type PlatformReport struct {
	Platform  string        `json:"platform"`
	Digest    digest.Digest `json:"digest"`
	MediaType string        `json:"mediaType"`
	// Size of all compressed layers and the config in bytes; 0 if the manifest was not read.
	Size        int64             `json:"size"`
	Layers      int               `json:"layers"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Attestation string            `json:"attestationOf,omitempty"`
}

// ReferrerReport is one document about the image.
type ReferrerReport struct {
	Digest       digest.Digest     `json:"digest"`
	ArtifactType string            `json:"artifactType"`
	Size         int64             `json:"size"`
	Annotations  map[string]string `json:"annotations,omitempty"`
}

// ImageReport is one image for one platform.
type ImageReport struct {
	Digest      digest.Digest                   `json:"digest"`
	ID          digest.Digest                   `json:"id"` // of the config
	Platform    string                          `json:"platform"`
	Created     *time.Time                      `json:"created,omitempty"`
	Author      string                          `json:"author,omitempty"`
	Size        int64                           `json:"size"` // bytes of all compressed layers
	Annotations map[string]string               `json:"annotations,omitempty"`
	Config      dockerspec.DockerOCIImageConfig `json:"config"`
	Layers      []LayerReport                   `json:"layers"`
	History     []HistoryReport                 `json:"history,omitempty"`
}

// LayerReport is one layer.
type LayerReport struct {
	Digest      digest.Digest     `json:"digest"`
	DiffID      digest.Digest     `json:"diffId,omitempty"`
	MediaType   string            `json:"mediaType"`
	Size        int64             `json:"size"`
	CreatedBy   string            `json:"createdBy,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// HistoryReport is one step of the build.
type HistoryReport struct {
	Created    *time.Time `json:"created,omitempty"`
	CreatedBy  string     `json:"createdBy,omitempty"`
	Comment    string     `json:"comment,omitempty"`
	EmptyLayer bool       `json:"emptyLayer,omitempty"`
	Size       int64      `json:"size,omitempty"` // bytes of the compressed layer
}

// InspectOptions of Inspect.
type InspectOptions struct {
	Access
	Platform *ocispec.Platform // nil: the host's if the image has it, else the first
	// Referrers lists what refers to the image, too.
	Referrers bool
}

const maxPlatformReads = 64

func hostPlatform() ocispec.Platform { return platforms.DefaultSpec() }

// Inspect looks at an image. Of an index, the manifests are read for their sizes, and one
// config; no layer is fetched.
func (t *Tools) Inspect(ctx context.Context, ref string, o InspectOptions) (*Report, error) {
	s, r, err := t.Open(ctx, ref, transport.Local, o.Access)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	d, doc, err := raw(ctx, s, nil)
	if err != nil {
		return nil, err
	}
	rep := &Report{Name: r.String(), Digest: d.Digest, MediaType: d.MediaType, Annotations: doc.Annotations(), Platforms: []PlatformReport{}}
	top, chosen := d, doc
	if doc.Index != nil {
		if err := rep.platforms(ctx, s, doc.Index); err != nil {
			return nil, err
		}
		p := hostPlatform()
		if o.Platform != nil {
			p = *o.Platform
		}
		d, chosen, err = choose(ctx, s, d, doc, p)
		if errdefs.IsNotFound(err) && o.Platform == nil {
			for _, m := range doc.Index.Manifests {
				if m.Platform != nil && !manifest.IsCompanion(m) {
					d, chosen, err = choose(ctx, s, top, doc, *m.Platform)
					break
				}
			}
		}
		if err != nil && (o.Platform != nil || !errdefs.IsNotFound(err)) {
			return nil, err
		}
	}
	if chosen.Manifest != nil {
		if chosen.IsImage() {
			if rep.Image, err = imageReport(ctx, s, d.Digest, chosen.Manifest); err != nil {
				return nil, err
			}
			if doc.Index == nil {
				rep.Platforms = append(rep.Platforms, PlatformReport{Platform: rep.Image.Platform, Digest: d.Digest, MediaType: d.MediaType, Size: rep.Image.Size + chosen.Manifest.Config.Size, Layers: len(rep.Image.Layers)})
			}
		} else {
			rep.Artifact = chosen.ArtifactType()
		}
	}
	if o.Referrers {
		list, err := s.Referrers(ctx, top.Digest)
		if err != nil {
			return nil, err
		}
		for _, e := range list {
			rep.Referrers = append(rep.Referrers, ReferrerReport{e.Digest, e.ArtifactType, e.Size, e.Annotations})
		}
		if sig, body, err := s.Tagged(ctx, strings.Replace(top.Digest.String(), ":", "-", 1)+".sig"); err == nil {
			rep.Referrers = append(rep.Referrers, ReferrerReport{Digest: sig.Digest, ArtifactType: "cosign signature (tag)", Size: int64(len(body))})
		}
	}
	return rep, nil
}

// platforms reads the manifests of an index for their sizes.
func (rep *Report) platforms(ctx context.Context, s transport.Source, idx *ocispec.Index) error {
	for i, m := range idx.Manifests {
		p := PlatformReport{Digest: m.Digest, MediaType: m.MediaType, Annotations: m.Annotations}
		if m.Platform != nil {
			p.Platform = platforms.FormatAll(*m.Platform)
		}
		if manifest.IsCompanion(m) {
			p.Attestation = manifest.About(m).String()
		}
		if i < maxPlatformReads && manifest.IsDocument(m.MediaType) && p.Attestation == "" {
			body, err := s.Document(ctx, m)
			if errdefs.IsNotFound(err) { // the local store has only some
				rep.Platforms = append(rep.Platforms, p)
				continue
			}
			if err != nil {
				return err
			}
			doc, err := manifest.Parse(m.Digest.String(), m.MediaType, body)
			if err != nil {
				return err
			}
			if doc.Manifest != nil {
				p.Layers, p.Size = len(doc.Manifest.Layers), doc.Manifest.Config.Size
				for _, l := range doc.Manifest.Layers {
					p.Size += l.Size
				}
			}
		}
		rep.Platforms = append(rep.Platforms, p)
	}
	return nil
}

// choose finds the image for a platform below an index. A manifest is what it is.
func choose(ctx context.Context, s transport.Source, d ocispec.Descriptor, doc manifest.Document, p ocispec.Platform) (ocispec.Descriptor, manifest.Document, error) {
	for depth := 0; doc.Index != nil; depth++ {
		list := manifest.Candidates(doc.Index, platforms.Only(platforms.Normalize(p)))
		if len(list) == 0 || depth > 4 {
			return d, doc, fmt.Errorf("no image for %s: %w", platforms.FormatAll(p), errdefs.ErrNotFound)
		}
		body, err := s.Document(ctx, list[0])
		if err != nil {
			return d, doc, err
		}
		if doc, err = manifest.Parse(list[0].Digest.String(), list[0].MediaType, body); err != nil {
			return d, doc, err
		}
		d = ocispec.Descriptor{MediaType: doc.MediaType, Digest: list[0].Digest, Size: int64(len(body))}
	}
	return d, doc, nil
}

func readConfig(ctx context.Context, s transport.Source, m *ocispec.Manifest) (dockerspec.DockerOCIImage, []byte, error) {
	var c dockerspec.DockerOCIImage
	body, err := transport.ReadBlob(ctx, s, m.Config, manifest.MaxSize)
	if err != nil {
		return c, nil, fmt.Errorf("config: %w", err)
	}
	if err := json.Unmarshal(body, &c); err != nil {
		return c, nil, fmt.Errorf("config %s: %w: %w", m.Config.Digest, err, errdefs.ErrInvalidArgument)
	}
	return c, body, nil
}

func imageReport(ctx context.Context, s transport.Source, dig digest.Digest, m *ocispec.Manifest) (*ImageReport, error) {
	c, _, err := readConfig(ctx, s, m)
	if err != nil {
		return nil, err
	}
	rep := &ImageReport{
		Digest: dig, ID: m.Config.Digest, Platform: platforms.FormatAll(platforms.Normalize(c.Platform)), Created: c.Created, Author: c.Author,
		Annotations: m.Annotations, Config: c.Config, Layers: []LayerReport{},
	}
	for i, l := range m.Layers {
		lr := LayerReport{Digest: l.Digest, MediaType: l.MediaType, Size: l.Size, Annotations: l.Annotations}
		if i < len(c.RootFS.DiffIDs) {
			lr.DiffID = c.RootFS.DiffIDs[i]
		}
		rep.Size += l.Size
		rep.Layers = append(rep.Layers, lr)
	}
	next := 0
	for _, h := range c.History {
		hr := HistoryReport{Created: h.Created, CreatedBy: h.CreatedBy, Comment: h.Comment, EmptyLayer: h.EmptyLayer}
		if !h.EmptyLayer && next < len(rep.Layers) {
			hr.Size = rep.Layers[next].Size
			rep.Layers[next].CreatedBy = h.CreatedBy
			next++
		}
		rep.History = append(rep.History, hr)
	}
	return rep, nil
}

// Raw gives the bytes of the manifest or index, or of the config, as they are at their place.
func (t *Tools) Raw(ctx context.Context, ref string, o InspectOptions, config bool) ([]byte, error) {
	s, _, err := t.Open(ctx, ref, transport.Local, o.Access)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	d, doc, err := raw(ctx, s, o.Platform)
	if err != nil || !config {
		return doc.Raw, err
	}
	if doc.Index != nil {
		if _, doc, err = choose(ctx, s, d, doc, hostPlatform()); err != nil {
			return nil, fmt.Errorf("%w (name a platform with --platform: %s)", err, strings.Join(platformsOf(doc), ", "))
		}
	}
	_, body, err := readConfig(ctx, s, doc.Manifest)
	return body, err
}

func platformsOf(doc manifest.Document) []string {
	all := map[string]bool{}
	if doc.Index != nil {
		for _, m := range doc.Index.Manifests {
			if m.Platform != nil && !manifest.IsCompanion(m) {
				all[platforms.Format(*m.Platform)] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(all))
}
