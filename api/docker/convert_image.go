package docker

import (
	"strings"

	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/storage"

	"github.com/hako-engine/hako/engine"
)

// familiar shortens full references as Docker shows them: docker.io/library/alpine:3 is alpine:3.
func familiar(refs []string) []string {
	out := make([]string, 0, len(refs))
	for _, s := range refs {
		out = append(out, familiarName(s))
	}
	return out
}

func familiarName(s string) string {
	if named, err := reference.ParseNormalizedNamed(s); err == nil {
		return reference.FamiliarString(named)
	}
	return s
}

func imageSummaryOf(im *engine.ImageSummary) image.Summary {
	out := image.Summary{
		ID:          im.ID.String(),
		Containers:  int64(im.Containers),
		Created:     im.Created.Unix(),
		Labels:      dict(im.Labels),
		RepoTags:    familiar(im.Names),
		RepoDigests: familiar(im.Digests),
		SharedSize:  im.SharedSize,
		Size:        im.Size,
	}
	if im.Target.Digest != "" {
		target := im.Target
		out.Descriptor = &target
	}
	return out
}

func imageInspectOf(d *engine.ImageDetail, snapshotter string) image.InspectResponse {
	out := image.InspectResponse{
		ID:           d.ID.String(),
		RepoTags:     familiar(d.Names),
		RepoDigests:  familiar(d.Digests),
		Author:       d.Config.Author,
		Config:       &d.Config.Config,
		Architecture: d.Config.Architecture,
		Variant:      d.Config.Variant,
		Os:           d.Config.OS,
		OsVersion:    d.Config.OSVersion,
		Size:         d.Size,
		RootFS:       image.RootFS{Type: d.Config.RootFS.Type},
		Metadata:     image.Metadata{LastTagTime: d.Updated},
	}
	if snapshotter != "" {
		out.GraphDriver = &storage.DriverData{Name: snapshotter}
	}
	if d.Config.Created != nil {
		out.Created = timestamp(*d.Config.Created)
	}
	for _, l := range d.Config.RootFS.DiffIDs {
		out.RootFS.Layers = append(out.RootFS.Layers, l.String())
	}
	if n := len(d.Config.History); n > 0 {
		out.Comment = d.Config.History[n-1].Comment
	}
	if d.Target.Digest != "" {
		target := d.Target
		out.Descriptor = &target
	}
	return out
}

// manifestsOf describes the one manifest of an image that is here.
func manifestsOf(im *engine.ImageRecord) []image.ManifestSummary {
	m := image.ManifestSummary{
		ID: im.Manifest.Digest.String(), Descriptor: im.Manifest, Available: true, Kind: image.ManifestKindImage,
		ImageData: &image.ImageProperties{Platform: im.Platform, Containers: []string{}},
	}
	m.Size.Content = im.Manifest.Size + im.Config.Size
	for _, l := range im.Layers {
		m.Size.Content += l.Size
	}
	m.ImageData.Size.Unpacked = im.Size
	m.Size.Total = m.Size.Content + im.Size
	return []image.ManifestSummary{m}
}

// removedOf is the answer to a removal.
func removedOf(removed []engine.RemovedImage) []image.DeleteResponse {
	out := make([]image.DeleteResponse, 0, len(removed))
	for _, r := range removed {
		out = append(out, image.DeleteResponse{Deleted: r.Deleted, Untagged: r.Untagged})
	}
	return out
}

// pullReference joins the parameters of a pull: a name, and a tag or a digest.
// allTags tells that no tag was given at all.
func pullReference(name, tag string) (ref string, allTags bool, err error) {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return "", false, invalidf("%v", err)
	}
	switch {
	case strings.Contains(tag, ":"):
		ref = reference.TrimNamed(named).String() + "@" + tag
	case tag != "":
		ref = reference.TrimNamed(named).String() + ":" + tag
	default:
		return named.String(), reference.IsNameOnly(named), nil
	}
	if _, err := reference.ParseNormalizedNamed(ref); err != nil {
		return "", false, invalidf("%v", err)
	}
	return ref, false, nil
}
