package image

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/hako-engine/hako/image/manifest"
)

// danglingPrefix begins the name of a record that keeps an image which lost its last
// name, or never had one. What follows is the digest of its target.
const danglingPrefix = "hako-dangling@"

// parseName reads a reference as users write it and completes it: docker.io, library/,
// :latest. With tag and digest both, the digest counts.
func parseName(ref string) (reference.Named, error) {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if d, ok := named.(reference.Digested); ok {
		if err := manifest.ValidDigest(d.Digest()); err != nil {
			return nil, err
		}
		return reference.WithDigest(reference.TrimNamed(named), d.Digest())
	}
	return reference.TagNameOnly(named), nil
}

// tagOrDigest is what a completed name ends in.
func tagOrDigest(n reference.Named) string {
	switch v := n.(type) {
	case reference.Digested:
		return v.Digest().String()
	case reference.Tagged:
		return v.Tag()
	}
	return ""
}

func isDigested(n reference.Named) bool {
	_, ok := n.(reference.Digested)
	return ok
}

var hexID = regexp.MustCompile(`^[a-f0-9]{1,64}$`)

// idPrefix says whether ref can be (the beginning of) an image id, and gives its hex digits.
func idPrefix(ref string) (string, bool) {
	ref = strings.TrimPrefix(ref, "sha256:")
	return ref, hexID.MatchString(ref)
}

// short is a digest as people see it.
func short(d digest.Digest) string {
	if e := d.Encoded(); len(e) > 12 {
		return e[:12]
	}
	return d.Encoded()
}
