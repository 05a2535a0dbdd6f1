// Package manifest reads the documents of images and of what is kept beside them:
// manifests and indexes of OCI's and Docker's kind.
//
// In flow bytes of strangers; out flow documents that every reader understands in the
// same way, with valid digests. It is pure: it reads and writes nothing.
package manifest

import (
	"bytes"
	_ "crypto/sha256" // digests of descriptors
	_ "crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Media types of Docker's own formats; OCI's are in image-spec.
const (
	DockerManifest     = "application/vnd.docker.distribution.manifest.v2+json"
	DockerIndex        = "application/vnd.docker.distribution.manifest.list.v2+json"
	DockerConfig       = "application/vnd.docker.container.image.v1+json"
	DockerLayer        = "application/vnd.docker.image.rootfs.diff.tar"
	DockerLayerGzip    = "application/vnd.docker.image.rootfs.diff.tar.gzip"
	DockerLayerZstd    = "application/vnd.docker.image.rootfs.diff.tar.zstd"
	DockerForeignLayer = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
)

const (
	// MaxSize bounds a document in bytes (distribution-spec, "Pushing Manifests").
	MaxSize = 4 << 20
	// maxChildren bounds what one document lists.
	maxChildren = 10_000
)

// Document is a manifest or an index: exactly one of both is set.
type Document struct {
	Manifest *ocispec.Manifest
	Index    *ocispec.Index
	// MediaType is the one that the document goes by.
	MediaType string
	Raw       []byte
}

// Subject is what the document is about, if it is a referrer.
func (d Document) Subject() *ocispec.Descriptor {
	if d.Index != nil {
		return d.Index.Subject
	}
	return d.Manifest.Subject
}

// ArtifactType is what a list of referrers says of the document (image-spec, "Guidelines
// for Artifact Usage").
func (d Document) ArtifactType() string {
	switch {
	case d.Index != nil:
		return d.Index.ArtifactType
	case d.Manifest.ArtifactType != "":
		return d.Manifest.ArtifactType
	}
	return d.Manifest.Config.MediaType
}

// Annotations of the document.
func (d Document) Annotations() map[string]string {
	if d.Index != nil {
		return d.Index.Annotations
	}
	return d.Manifest.Annotations
}

// IsImage says whether a manifest is one of a container image, and no other artifact.
func (d Document) IsImage() bool {
	return d.Manifest != nil && (d.Manifest.Config.MediaType == ocispec.MediaTypeImageConfig || d.Manifest.Config.MediaType == DockerConfig)
}

// IsDocument says whether a media type is one of manifests or indexes.
func IsDocument(mt string) bool { return isKnown(mt) }

// IsIndex says whether a media type is one of indexes.
func IsIndex(mt string) bool { return known[mt] }

func isKnown(mt string) bool { _, ok := known[mt]; return ok }

// known says which media types of documents are those of indexes.
var known = map[string]bool{
	ocispec.MediaTypeImageIndex: true, DockerIndex: true,
	ocispec.MediaTypeImageManifest: false, DockerManifest: false,
}

func invalid(what string, format string, args ...any) error {
	return fmt.Errorf("%s: %s: %w", what, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}

// ValidDigest accepts sha256 and sha512, in their one spelling: what passes is safe as the
// name of a file.
func ValidDigest(d digest.Digest) error {
	if len(d) > 160 {
		return fmt.Errorf("digest of %d bytes: %w", len(d), errdefs.ErrInvalidArgument)
	}
	if err := d.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w: %w", string(d), err, errdefs.ErrInvalidArgument)
	}
	if a := d.Algorithm(); a != digest.SHA256 && a != digest.SHA512 {
		return fmt.Errorf("digest %q: algorithm: %w", string(d), errdefs.ErrInvalidArgument)
	}
	return nil
}

// ValidDescriptor checks digest and size.
func ValidDescriptor(d ocispec.Descriptor) error {
	if err := ValidDigest(d.Digest); err != nil {
		return err
	}
	if d.Size < 0 {
		return fmt.Errorf("%s has size %d: %w", d.Digest, d.Size, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Parse reads a manifest or index. mediaType is what its descriptor or its registry called
// it, "" if that is not known. A document that could be read as both, or as something else
// than announced, is refused (CVE-2021-41190). Any artifact is taken, not only images.
func Parse(what, mediaType string, raw []byte) (Document, error) {
	if len(raw) > MaxSize {
		return Document{}, fmt.Errorf("%s: larger than %d bytes: %w", what, MaxSize, errdefs.ErrResourceExhausted)
	}
	fields, err := TopLevel(raw)
	if err != nil {
		return Document{}, invalid(what, "%v", err)
	}
	var probe struct {
		MediaType     *string         `json:"mediaType"`
		SchemaVersion int             `json:"schemaVersion"`
		Layers        json.RawMessage `json:"layers"`
		Manifests     json.RawMessage `json:"manifests"`
		Config        json.RawMessage `json:"config"`
	}
	if err := json.Unmarshal(raw, &probe); err != nil {
		return Document{}, invalid(what, "%v", err)
	}
	has := func(f string) bool { return slices.Contains(fields, f) }
	isIndex, isManifest := has("manifests"), has("layers") || has("config")
	switch {
	case has("fslayers") || probe.SchemaVersion == 1:
		return Document{}, fmt.Errorf("%s: manifests of schema version 1 are not supported: %w", what, errdefs.ErrNotImplemented)
	case isIndex && isManifest:
		return Document{}, invalid(what, "it is a manifest and an index at once")
	case !isIndex && !isManifest:
		return Document{}, invalid(what, "it is neither a manifest nor an index")
	}
	own := ""
	if probe.MediaType != nil {
		own = *probe.MediaType
	}
	if mediaType, err = Type(mediaType, own, isIndex); err != nil {
		return Document{}, invalid(what, "%v", err)
	}
	d := Document{MediaType: mediaType, Raw: raw}
	var list []ocispec.Descriptor
	if isIndex {
		if !isArray(probe.Manifests) {
			return Document{}, invalid(what, "manifests is not a list")
		}
		if err := json.Unmarshal(raw, &d.Index); err != nil {
			return Document{}, invalid(what, "%v", err)
		}
		list = d.Index.Manifests
	} else {
		if !isObject(probe.Config) {
			return Document{}, invalid(what, "config is not an object")
		}
		if len(probe.Layers) > 0 && !isArray(probe.Layers) {
			return Document{}, invalid(what, "layers is not a list")
		}
		if err := json.Unmarshal(raw, &d.Manifest); err != nil {
			return Document{}, invalid(what, "%v", err)
		}
		list = append([]ocispec.Descriptor{d.Manifest.Config}, d.Manifest.Layers...)
	}
	if s := d.Subject(); s != nil {
		list = append(list, *s)
	}
	if len(list) > maxChildren {
		return Document{}, fmt.Errorf("%s: lists more than %d parts: %w", what, maxChildren, errdefs.ErrResourceExhausted)
	}
	for i, c := range list {
		if err := ValidDescriptor(c); err != nil {
			return Document{}, fmt.Errorf("%s: part %d: %w", what, i, err)
		}
		if isKnown(c.MediaType) && c.Size > MaxSize {
			return Document{}, fmt.Errorf("%s: part %d: larger than %d bytes: %w", what, i, MaxSize, errdefs.ErrResourceExhausted)
		}
	}
	return d, nil
}

// TopLevel gives the names of an object's fields in lower case, as encoding/json
// compares them. A name that is there twice is an error: readers differ on which counts.
func TopLevel(raw []byte) ([]string, error) {
	dec := json.NewDecoder(bytes.NewReader(raw))
	tok, err := dec.Token()
	if err != nil {
		return nil, err
	}
	if tok != json.Delim('{') {
		return nil, errors.New("not a JSON object")
	}
	var fields []string
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return nil, err
		}
		name, _ := key.(string)
		name = strings.ToLower(name)
		if slices.Contains(fields, name) {
			return nil, fmt.Errorf("field %q twice", name)
		}
		if fields = append(fields, name); len(fields) > 1000 {
			return nil, errors.New("too many fields")
		}
		var skip json.RawMessage
		if err := dec.Decode(&skip); err != nil {
			return nil, err
		}
	}
	if _, err := dec.Token(); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("data after the end")
	}
	return fields, nil
}

// Type brings together what others call a document and what it calls itself.
func Type(said, own string, isIndex bool) (string, error) {
	for _, t := range []string{said, own} {
		if index, ok := known[t]; ok && index != isIndex {
			return "", fmt.Errorf("media type %s does not fit its contents", t)
		}
	}
	switch {
	case own != "" && !isKnown(own):
		return "", fmt.Errorf("unknown media type %q", own)
	case isKnown(said) && isKnown(own) && said != own:
		return "", fmt.Errorf("media type %s, announced as %s", own, said)
	case isKnown(own):
		return own, nil
	case isKnown(said):
		return said, nil
	case isIndex:
		return ocispec.MediaTypeImageIndex, nil
	}
	return ocispec.MediaTypeImageManifest, nil
}

func isArray(raw json.RawMessage) bool  { return len(raw) > 0 && raw[0] == '[' }
func isObject(raw json.RawMessage) bool { return len(raw) > 0 && raw[0] == '{' }

// Candidates gives the manifests of an index that are for a platform, the best first.
// Those that say no platform come last; attestations and other companions not at all.
func Candidates(idx *ocispec.Index, m platforms.MatchComparer) []ocispec.Descriptor {
	var list, unsaid []ocispec.Descriptor
	for _, d := range idx.Manifests {
		switch {
		case d.MediaType != "" && !isKnown(d.MediaType):
		case d.Platform == nil || d.Platform.OS == "" && d.Platform.Architecture == "":
			if d.ArtifactType == "" {
				unsaid = append(unsaid, d)
			}
		case IsCompanion(d):
		case m.Match(*d.Platform):
			list = append(list, d)
		}
	}
	slices.SortStableFunc(list, func(a, b ocispec.Descriptor) int {
		switch {
		case m.Less(*a.Platform, *b.Platform):
			return -1
		case m.Less(*b.Platform, *a.Platform):
			return 1
		}
		return 0
	})
	return append(list, unsaid...)
}

// IsCompanion says whether an entry of an index is an attestation of BuildKit's about
// another one, and no image.
func IsCompanion(d ocispec.Descriptor) bool {
	return d.Platform != nil && d.Platform.OS == "unknown" || d.Annotations["vnd.docker.reference.type"] != ""
}

// About gives the digest that a companion is about; "" if it does not say.
func About(d ocispec.Descriptor) digest.Digest {
	return digest.Digest(d.Annotations["vnd.docker.reference.digest"])
}
