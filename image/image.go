// Package image turns references into unpacked images and back: references,
// registries, pull, push, unpack, import and export.
//
// In flow references, credentials and archives; out flow blobs (into the content
// store), committed snapshots and image records, each visible only when its
// digests match. Bytes from registries and archives are hostile.
package image

import (
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is one image for one platform, with every name it has. It is a value.
type Image struct {
	ID       digest.Digest      // of the config: what Docker and CRI call the image id
	Target   ocispec.Descriptor // what the names point to: a manifest or an index
	Manifest ocispec.Descriptor // the manifest chosen for the platform
	Names    []string           // full references with tag, e.g. docker.io/library/alpine:3, sorted
	Digests  []string           // full references by digest, e.g. docker.io/library/alpine@sha256:..., sorted
	Config   ocispec.Descriptor
	Layers   []ocispec.Descriptor
	ChainID  digest.Digest // snapshot key of the top layer; "" for an image without layers
	Platform ocispec.Platform
	Created  time.Time
	Updated  time.Time // last change of a name
	Size     int64     // bytes: unpacked layers (as Docker shows it)
	// LayerSizes are the unpacked layers, in bytes; a layer that was never unpacked
	// counts with the size of its blob.
	LayerSizes []int64
	Labels     map[string]string
	// Annotations are those of the manifest. They are not to be changed.
	Annotations map[string]string
}

// Auth is what a client gave for one registry. It is never logged nor stored.
type Auth struct {
	Username      string
	Password      string
	IdentityToken string
	RegistryToken string
	ServerAddress string
}

// Progress is one step of one part (a layer, a manifest) of a pull, push, load or save.
type Progress struct {
	ID      string // short digest, or "" for a line about the whole
	Action  string // Docker's words: "Pulling fs layer", "Downloading", "Extracting", "Pull complete", ...
	Current int64  // bytes
	Total   int64  // bytes; 0: unknown
	Message string // for lines about the whole: "Digest: sha256:...", "Status: ..."
}

// PullOptions of a pull.
type PullOptions struct {
	Platform    *ocispec.Platform // nil: the host's
	Auth        *Auth             // nil: from docker's config.json of the daemon's user, if any
	Snapshotter string            // "": the default
	AllTags     bool
	// Progress is called often and from several goroutines; nil for none.
	Progress func(Progress)
}

// PushOptions of a push.
type PushOptions struct {
	Platform *ocispec.Platform // nil: all that is here
	Auth     *Auth
	Progress func(Progress)
}

// LoadOptions of a load.
type LoadOptions struct {
	Platform    *ocispec.Platform
	Snapshotter string
	Progress    func(Progress)
}

// Loaded is one image that an archive held.
type Loaded struct {
	Image Image
	Names []string // that it was given; empty: none in the archive
}

// SaveOptions of a save.
type SaveOptions struct {
	Platform *ocispec.Platform
	Format   string // "" or "docker" (docker-archive that is an OCI layout as well), "oci"
}
