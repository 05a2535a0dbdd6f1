// Package transport reads and writes images where they are kept: registries, OCI layouts,
// archives, plain directories, the store of a daemon.
//
// In flow references as people write them (docker://, oci:, oci-archive:, docker-archive:,
// dir:, local:); out flow documents and blobs, one interface for all places. Everything
// read is hostile: paths out of archives and layouts lead nowhere else, documents are
// bounded, and whoever writes a blob checks its digest.
package transport

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/manifest"
)

// Source is one image at its place.
type Source interface {
	// Top gives the document that the reference names.
	Top(ctx context.Context) (ocispec.Descriptor, []byte, error)
	// Tagged gives a document by another tag of the same place: errdefs.ErrNotFound.
	Tagged(ctx context.Context, tag string) (ocispec.Descriptor, []byte, error)
	// Document gives a manifest or index by its digest, which is checked.
	Document(ctx context.Context, d ocispec.Descriptor) ([]byte, error)
	// Blob streams a blob from an offset on. Who reads it checks the digest.
	Blob(ctx context.Context, d ocispec.Descriptor, offset int64) (io.ReadCloser, error)
	// Referrers lists what has a subject of this digest.
	Referrers(ctx context.Context, d digest.Digest) ([]ocispec.Descriptor, error)
	// Close lets the place go.
	Close() error
}

// Outcome is what came of a blob.
type Outcome int

// Outcomes.
const (
	Sent    Outcome = iota
	Present         // it was there
	Mounted         // the registry took it from another repository
)

// Destination is where an image goes. Blobs come first, then the documents that name
// them, the top one last.
type Destination interface {
	// Complete says that a document is there with all that it names.
	Complete(ctx context.Context, d ocispec.Descriptor) bool
	// Current is what the reference names today; errdefs.ErrNotFound.
	Current(ctx context.Context) (digest.Digest, error)
	// Put takes a blob in, and checks its digest. What an earlier attempt left is used.
	Put(ctx context.Context, d ocispec.Descriptor, from Source, tell func(int64)) (Outcome, error)
	// PutDocument takes in a manifest or index that is known by its digest.
	PutDocument(ctx context.Context, d ocispec.Descriptor, raw []byte) error
	// PutTagged takes in a document by another tag of the same place.
	PutTagged(ctx context.Context, tag string, d ocispec.Descriptor, raw []byte) error
	// PutTop takes in the document that the reference will name.
	PutTop(ctx context.Context, d ocispec.Descriptor, raw []byte) error
	// AddReferrer lists a document, which is there, for its subject.
	AddReferrer(ctx context.Context, subject digest.Digest, d ocispec.Descriptor) error
	// Commit makes what was put lasting and visible.
	Commit(ctx context.Context) error
	// Close releases what is held. Without Commit before it, nothing appears but what
	// the next attempt can use.
	Close() error
}

// Kind is where an image is.
type Kind string

// Kinds, by what references begin with.
const (
	Registry      Kind = "docker"
	Layout        Kind = "oci"
	LayoutArchive Kind = "oci-archive"
	DockerArchive Kind = "docker-archive"
	Dir           Kind = "dir"
	Local         Kind = "local"
)

// Ref names an image at a place.
type Ref struct {
	Kind Kind
	Name reference.Named // complete; of registries and the local store
	Path string          // of files and folders
	Tag  string          // in a layout or an archive; "": the only one there
	// Digest names the document itself, in a layout.
	Digest digest.Digest
}

// Syntax says what references look like, for messages and help.
const Syntax = `docker://NAME          an image in its registry
oci:DIR[:TAG]          an OCI image layout (also oci:DIR@DIGEST)
oci-archive:FILE[:TAG] the same as a tar archive
docker-archive:FILE[:NAME]  an archive of docker save
dir:DIR                a folder with one image's files, as skopeo makes them
local:NAME             the daemon's images`

// foreign are places that other tools know, and what to do instead.
var foreign = map[string]string{
	"containers-storage": "the storage of podman and Buildah is not read: podman save --format oci-archive, then oci-archive:FILE",
	"ostree":             "OSTree repositories are not supported",
	"sif":                "SIF images are not supported",
	"tarball":            "use hako import for a root file system",
	"atomic":             "use docker://NAME",
}

// ParseRef reads a reference; one without a prefix is of the kind plain.
func ParseRef(s string, plain Kind) (Ref, error) {
	kind, rest, found := strings.Cut(s, ":")
	k := Kind(kind)
	// Followed by digits it is a port, or the tag of an image of that name.
	if text, ok := foreign[kind]; ok && found && !(rest != "" && rest[0] >= '0' && rest[0] <= '9') {
		return Ref{}, bad(s, "%s", text)
	}
	switch {
	case !found || !slices.Contains([]Kind{Registry, Layout, LayoutArchive, DockerArchive, Dir, Local, "docker-daemon"}, k):
		if !found || plain == Registry || plain == Local {
			if i := strings.Index(s, "://"); i > 0 {
				return Ref{}, bad(s, "unknown transport %q", s[:i])
			}
			return parseNamed(s, s, plain)
		}
		return Ref{}, bad(s, "unknown transport %q", kind)
	case k == Registry:
		name, ok := strings.CutPrefix(rest, "//")
		if !ok {
			// "docker" alone may also be the host of docker:5000/app.
			if plain == Registry || plain == Local {
				return parseNamed(s, s, plain)
			}
			return Ref{}, bad(s, "expected docker://NAME")
		}
		return parseNamed(s, name, Registry)
	case k == Local || k == "docker-daemon":
		return parseNamed(s, strings.TrimPrefix(rest, "//"), Local)
	}
	r := Ref{Kind: k, Path: rest}
	if k != Dir {
		if path, dig, ok := strings.Cut(rest, "@"); ok && strings.HasPrefix(dig, "sha") {
			r.Path, r.Digest = path, digest.Digest(dig)
			if err := manifest.ValidDigest(r.Digest); err != nil {
				return Ref{}, bad(s, "%v", err)
			}
		} else {
			r.Path, r.Tag, _ = strings.Cut(rest, ":")
		}
	}
	if r.Path == "" {
		return Ref{}, bad(s, "no path")
	}
	if strings.ContainsAny(r.Path+r.Tag, "\x00") {
		return Ref{}, bad(s, "it holds a zero byte")
	}
	if k == DockerArchive && r.Tag != "" {
		n, err := reference.ParseNormalizedNamed(r.Tag)
		if err != nil {
			return Ref{}, bad(s, "%v", err)
		}
		r.Tag = reference.TagNameOnly(n).String()
	}
	return r, nil
}

func bad(s, format string, args ...any) error {
	return fmt.Errorf("image reference %q: %s: %w", s, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}

func parseNamed(whole, name string, k Kind) (Ref, error) {
	n, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return Ref{}, bad(whole, "%v", err)
	}
	if d, ok := n.(reference.Digested); ok {
		if err := manifest.ValidDigest(d.Digest()); err != nil {
			return Ref{}, bad(whole, "%v", err)
		}
		// With tag and digest both, the digest counts.
		n, err = reference.WithDigest(reference.TrimNamed(n), d.Digest())
		if err != nil {
			return Ref{}, bad(whole, "%v", err)
		}
	}
	return Ref{Kind: k, Name: reference.TagNameOnly(n)}, nil
}

// String gives the reference in full.
func (r Ref) String() string {
	switch r.Kind {
	case Registry:
		return "docker://" + r.Name.String()
	case Local:
		return "local:" + r.Name.String()
	}
	s := string(r.Kind) + ":" + r.Path
	if r.Digest != "" {
		return s + "@" + r.Digest.String()
	}
	if r.Tag != "" {
		s += ":" + r.Tag
	}
	return s
}

// tagOrDigest is what a complete name ends in.
func tagOrDigest(n reference.Named) string {
	switch v := n.(type) {
	case reference.Digested:
		return v.Digest().String()
	case reference.Tagged:
		return v.Tag()
	}
	return ""
}

// checked passes a blob on and fails at its end if it is not what was promised.
type checked struct {
	io.ReadCloser
	d ocispec.Descriptor
	v digest.Verifier
	n int64
}

// Checked wraps the stream of a whole blob: its end is an error unless length and digest are right.
func Checked(rc io.ReadCloser, d ocispec.Descriptor) io.ReadCloser {
	return &checked{rc, d, d.Digest.Verifier(), 0}
}

func (c *checked) Read(p []byte) (int, error) {
	if left := c.d.Size - c.n; int64(len(p)) > left+1 {
		p = p[:left+1] // one more tells that it is longer
	}
	n, err := c.ReadCloser.Read(p)
	c.n += int64(n)
	_, _ = c.v.Write(p[:n]) // a hash does not fail
	if c.n > c.d.Size {
		return 0, fmt.Errorf("blob %s is longer than %d bytes: %w", c.d.Digest, c.d.Size, errdefs.ErrDataLoss)
	}
	if err == io.EOF {
		if c.n < c.d.Size {
			return n, fmt.Errorf("blob %s ends after %d of %d bytes: %w", c.d.Digest, c.n, c.d.Size, errdefs.ErrDataLoss)
		}
		if !c.v.Verified() {
			return n, fmt.Errorf("blob has another digest than %s: %w", c.d.Digest, errdefs.ErrDataLoss)
		}
	}
	return n, err
}

// ReadBlob reads a small blob whole, and checks it. limit is in bytes.
func ReadBlob(ctx context.Context, s Source, d ocispec.Descriptor, limit int64) ([]byte, error) {
	if d.Size > limit {
		return nil, fmt.Errorf("blob %s of %d bytes is larger than %d: %w", d.Digest, d.Size, limit, errdefs.ErrResourceExhausted)
	}
	rc, err := s.Blob(ctx, d, 0)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	return io.ReadAll(Checked(rc, d))
}

// describe makes the descriptor of a document; what is asked for by digest must have it.
func describe(what string, raw []byte, mediaType string, want digest.Digest) (ocispec.Descriptor, error) {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	if want != "" {
		if err := manifest.ValidDigest(want); err != nil {
			return d, err
		}
		d.Digest = want.Algorithm().FromBytes(raw)
		if d.Digest != want {
			return d, fmt.Errorf("%s: manifest has digest %s, not %s: %w", what, d.Digest, want, errdefs.ErrDataLoss)
		}
	}
	if d.MediaType == "" {
		doc, err := manifest.Parse(what, "", raw)
		if err != nil {
			return d, err
		}
		d.MediaType = doc.MediaType
	}
	return d, nil
}
