package tools

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/compare"
	"github.com/hako-engine/hako/image/manifest"
	"github.com/hako-engine/hako/image/transport"
)

// DiffReport is in what two images differ.
type DiffReport struct {
	Old    string         `json:"old"`
	New    string         `json:"new"`
	Same   bool           `json:"same"`
	Config []ConfigDiff   `json:"config"`
	Layers []LayerDiff    `json:"layers"`
	Files  []compare.File `json:"files"`
	// FilesRead says that layers were read to compare files.
	FilesRead    bool  `json:"filesRead"`
	OldSize      int64 `json:"oldSize"` // bytes of all compressed layers
	NewSize      int64 `json:"newSize"`
	AddedBytes   int64 `json:"addedBytes"`   // of files that are new or larger
	RemovedBytes int64 `json:"removedBytes"` // of files that are gone or smaller
}

// ConfigDiff is one value of the configuration; "" where it is not set.
type ConfigDiff struct {
	Key string `json:"key"`
	Old string `json:"old,omitempty"`
	New string `json:"new,omitempty"`
}

// LayerDiff is a layer that only one of the images has.
type LayerDiff struct {
	Change    string        `json:"change"` // "+" or "-"
	Digest    digest.Digest `json:"digest"`
	Size      int64         `json:"size"` // bytes, compressed
	CreatedBy string        `json:"createdBy,omitempty"`
}

// side is one of the images.
type side struct {
	src transport.Source
	d   ocispec.Descriptor
	m   *ocispec.Manifest
	c   dockerspec.DockerOCIImage
	rep *ImageReport
}

func (t *Tools) side(ctx context.Context, ref string, a Access, p ocispec.Platform) (*side, error) {
	s, r, err := t.Open(ctx, ref, transport.Local, a)
	if err != nil {
		return nil, err
	}
	one := &side{src: s}
	err = func() error {
		d, doc, err := raw(ctx, s, nil)
		if err != nil {
			return err
		}
		top := doc
		if one.d, doc, err = choose(ctx, s, d, doc, p); err != nil {
			return fmt.Errorf("%s: %w (it is there for %s)", r, err, strings.Join(platformsOf(top), ", "))
		}
		if !doc.IsImage() {
			return fmt.Errorf("%s is no container image: %w", r, errdefs.ErrInvalidArgument)
		}
		one.m = doc.Manifest
		if one.c, _, err = readConfig(ctx, s, doc.Manifest); err != nil {
			return err
		}
		one.rep, err = imageReport(ctx, s, one.d.Digest, doc.Manifest)
		return err
	}()
	if err != nil {
		s.Close()
		return nil, err
	}
	return one, nil
}

// Diff compares two images. files says whether to read layers, too.
func (t *Tools) Diff(ctx context.Context, old, new string, oldAccess, newAccess Access, platform *ocispec.Platform, files bool) (*DiffReport, error) {
	p := hostPlatform()
	if platform != nil {
		p = *platform
	}
	a, err := t.side(ctx, old, oldAccess, p)
	if err != nil {
		return nil, err
	}
	defer a.src.Close()
	b, err := t.side(ctx, new, newAccess, p)
	if err != nil {
		return nil, err
	}
	defer b.src.Close()
	rep := &DiffReport{Old: old, New: new, Same: a.d.Digest == b.d.Digest, Config: configDiff(a, b), Layers: []LayerDiff{}, Files: []compare.File{}, OldSize: a.rep.Size, NewSize: b.rep.Size}
	shared := 0 // layers from the bottom on
	for shared < min(len(a.m.Layers), len(b.m.Layers)) && a.same(b, shared) {
		shared++
	}
	for _, l := range a.rep.Layers[shared:] {
		rep.Layers = append(rep.Layers, LayerDiff{"-", l.Digest, l.Size, l.CreatedBy})
	}
	for _, l := range b.rep.Layers[shared:] {
		rep.Layers = append(rep.Layers, LayerDiff{"+", l.Digest, l.Size, l.CreatedBy})
	}
	if files && len(rep.Layers) > 0 {
		if err := rep.readFiles(ctx, a, b, shared); err != nil {
			return nil, err
		}
	}
	return rep, nil
}

// same says whether a layer is the same in both, perhaps compressed in another way.
func (s *side) same(o *side, i int) bool {
	return s.m.Layers[i].Digest == o.m.Layers[i].Digest ||
		i < len(s.c.RootFS.DiffIDs) && i < len(o.c.RootFS.DiffIDs) && s.c.RootFS.DiffIDs[i] == o.c.RootFS.DiffIDs[i]
}

func (rep *DiffReport) readFiles(ctx context.Context, a, b *side, shared int) error {
	base := compare.NewTree()
	add := func(t *compare.Tree, s *side, layers []ocispec.Descriptor) error {
		for _, l := range layers {
			rc, err := s.src.Blob(ctx, l, 0)
			if err != nil {
				return err
			}
			err = t.Add(ctx, transport.Checked(rc, l))
			rc.Close()
			if err != nil {
				return fmt.Errorf("layer %s: %w", l.Digest, err)
			}
		}
		return nil
	}
	if err := add(base, a, a.m.Layers[:shared]); err != nil {
		return err
	}
	other := base.Clone()
	if err := add(base, a, a.m.Layers[shared:]); err != nil {
		return err
	}
	if err := add(other, b, b.m.Layers[shared:]); err != nil {
		return err
	}
	rep.FilesRead = true
	rep.Files = append(rep.Files, compare.Diff(base, other)...)
	for _, f := range rep.Files {
		if d := f.New - f.Old; d > 0 {
			rep.AddedBytes += d
		} else {
			rep.RemovedBytes -= d
		}
	}
	return nil
}

// configDiff compares configurations value by value.
func configDiff(a, b *side) []ConfigDiff {
	x, y := values(a), values(b)
	out := []ConfigDiff{}
	all := maps.Clone(x)
	maps.Copy(all, y)
	for _, k := range slices.Sorted(maps.Keys(all)) {
		if x[k] != y[k] {
			out = append(out, ConfigDiff{k, x[k], y[k]})
		}
	}
	return out
}

func values(s *side) map[string]string {
	c := s.c.Config
	v := map[string]string{}
	set := func(k, val string) {
		if val != "" {
			v[k] = val
		}
	}
	set("Platform", s.rep.Platform)
	set("User", c.User)
	set("WorkingDir", c.WorkingDir)
	set("StopSignal", c.StopSignal)
	set("Author", s.c.Author)
	if len(c.Entrypoint) > 0 {
		set("Entrypoint", fmt.Sprintf("%q", c.Entrypoint))
	}
	if len(c.Cmd) > 0 {
		set("Cmd", fmt.Sprintf("%q", c.Cmd))
	}
	if c.Healthcheck != nil {
		set("Healthcheck", fmt.Sprintf("%q every %v", c.Healthcheck.Test, c.Healthcheck.Interval))
	}
	for _, e := range c.Env {
		name, val, _ := strings.Cut(e, "=")
		v["Env "+name] = name + "=" + val
	}
	for k, val := range c.Labels {
		v["Label "+k] = "\"" + val + "\""
	}
	for k := range c.ExposedPorts {
		v["Port "+k] = k
	}
	for k := range c.Volumes {
		v["Volume "+k] = k
	}
	for k, val := range s.m.Annotations {
		v["Annotation "+k] = "\"" + val + "\""
	}
	if manifest.IsDocument(s.d.MediaType) {
		set("MediaType", s.d.MediaType)
	}
	return v
}
