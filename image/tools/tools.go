// Package tools is what people do with images wherever they are: look at them, copy,
// convert, compare, list and delete them, without a daemon or beside one.
//
// In flow references as people write them and how to get access; out flow reports and
// images at other places. The rooms below do the work: transport knows the places, copier
// brings images from one to another.
package tools

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/copier"
	"github.com/hako-engine/hako/image/manifest"
	"github.com/hako-engine/hako/image/registry"
	"github.com/hako-engine/hako/image/transport"
)

// Local gives access to the images of a daemon.
type Local interface {
	// Open gives an image; its sources and destinations are used with the context that Open was called with.
	Open(ctx context.Context, name reference.Named) (transport.Source, error)
	// Create gives a place for an image. from is the registry's name that it comes from; nil: none.
	Create(ctx context.Context, name, from reference.Named) (transport.Destination, error)
}

// Options of New.
type Options struct {
	// RegistryDir is the certs.d folder (HOST/hosts.toml); "": none.
	RegistryDir string
	UserAgent   string
	Local       Local // nil: no daemon
	// Registry overrides timeouts and retries, for tests.
	Registry registry.Options
	Log      *slog.Logger // nil: none
}

// Tools works with images. It is safe for concurrent use.
type Tools struct{ o Options }

// New gives the tools. It connects to nothing.
func New(o Options) *Tools {
	if o.Registry.Uploads == nil {
		o.Registry.Uploads = &registry.Uploads{}
	}
	return &Tools{o}
}

// Access says how to get at a registry.
type Access struct {
	Credentials registry.Credentials // zero: from docker's config.json
	Anonymous   bool                 // without any
	// Insecure accepts any certificate, and plain http.
	Insecure bool
	CertDir  string // certificates for this registry; "": what certs.d has
	// AuthDir is the folder of docker's config.json; "": $DOCKER_CONFIG or ~/.docker.
	AuthDir string
	// AuthFile is such a file itself; "": that in AuthDir.
	AuthFile string
}

func (t *Tools) client(a Access) *registry.Client {
	o := t.o.Registry
	o.Dir, o.UserAgent, o.Log = t.o.RegistryDir, t.o.UserAgent, t.o.Log
	o.Anonymous, o.Insecure, o.CertDir = a.Anonymous, a.Insecure, a.CertDir
	if a.AuthDir != "" {
		o.DockerConfig = a.AuthDir
	}
	o.AuthFile = a.AuthFile
	return registry.New(o)
}

func (t *Tools) repository(name reference.Named, a Access) (*registry.Repository, error) {
	return t.client(a).Repository(reference.TrimNamed(name), a.Credentials)
}

// Open gives an image for reading. plain is what a reference without a prefix means.
func (t *Tools) Open(ctx context.Context, ref string, plain transport.Kind, a Access) (transport.Source, transport.Ref, error) {
	r, err := transport.ParseRef(ref, plain)
	if err != nil {
		return nil, r, err
	}
	s, err := t.open(ctx, r, a)
	return s, r, err
}

func (t *Tools) open(ctx context.Context, r transport.Ref, a Access) (transport.Source, error) {
	switch r.Kind {
	case transport.Registry:
		repo, err := t.repository(r.Name, a)
		if err != nil {
			return nil, err
		}
		return transport.OpenRegistry(repo, r.Name), nil
	case transport.Layout:
		return transport.OpenLayout(r)
	case transport.LayoutArchive, transport.DockerArchive:
		return transport.OpenArchive(ctx, r)
	case transport.Dir:
		return transport.OpenDir(r)
	case transport.Local:
		if t.o.Local == nil {
			return nil, fmt.Errorf("%s: no daemon: %w", r, errdefs.ErrUnavailable)
		}
		return t.o.Local.Open(ctx, r.Name)
	}
	return nil, fmt.Errorf("%s: %w", r, errdefs.ErrNotImplemented)
}

// create gives a place for an image that comes from another.
func (t *Tools) create(ctx context.Context, r, from transport.Ref, a Access) (transport.Destination, error) {
	switch r.Kind {
	case transport.Registry:
		repo, err := t.repository(r.Name, a)
		if err != nil {
			return nil, err
		}
		return transport.CreateRegistry(repo, r.Name), nil
	case transport.Layout:
		return transport.CreateLayout(r)
	case transport.LayoutArchive, transport.DockerArchive:
		return transport.CreateArchive(r)
	case transport.Dir:
		return transport.CreateDir(r)
	case transport.Local:
		if t.o.Local == nil {
			return nil, fmt.Errorf("%s: no daemon: %w", r, errdefs.ErrUnavailable)
		}
		var source reference.Named
		if from.Kind == transport.Registry {
			source = from.Name
		}
		return t.o.Local.Create(ctx, r.Name, source)
	}
	return nil, fmt.Errorf("%s: %w", r, errdefs.ErrNotImplemented)
}

// CopyOptions of Copy.
type CopyOptions struct {
	copier.Options
	Source, Destination Access
}

// Copy copies an image. References without a prefix are the daemon's images.
func (t *Tools) Copy(ctx context.Context, src, dst string, o CopyOptions) (copier.Result, error) {
	from, err := transport.ParseRef(src, transport.Local)
	if err != nil {
		return copier.Result{}, err
	}
	to, err := transport.ParseRef(dst, transport.Local)
	if err != nil {
		return copier.Result{}, err
	}
	return t.CopyRef(ctx, from, to, o)
}

// Pending says what a copy without changes would end with, and whether the destination has
// it under its name already. Nothing is written.
func (t *Tools) Pending(ctx context.Context, from, to transport.Ref, o CopyOptions) (d ocispec.Descriptor, pending bool, err error) {
	s, err := t.open(ctx, from, o.Source)
	if err != nil {
		return d, false, err
	}
	defer s.Close()
	if d, err = copier.Target(ctx, s, o.Options); err != nil {
		return d, false, err
	}
	there, err := t.open(ctx, to, o.Destination)
	if err != nil {
		if errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err) {
			return d, true, nil // not begun
		}
		return d, false, err
	}
	defer there.Close()
	now, _, err := there.Top(ctx)
	if errdefs.IsNotFound(err) {
		return d, true, nil
	}
	return d, now.Digest != d.Digest, err
}

// CopyRef copies an image between places.
func (t *Tools) CopyRef(ctx context.Context, from, to transport.Ref, o CopyOptions) (res copier.Result, err error) {
	s, err := t.open(ctx, from, o.Source)
	if err != nil {
		return res, err
	}
	defer s.Close()
	if transport.NeedsOne(to) && len(o.Platforms) != 1 {
		if len(o.Platforms) > 1 {
			return res, fmt.Errorf("%s holds one platform: name one: %w", to, errdefs.ErrInvalidArgument)
		}
		o.Platforms = []ocispec.Platform{hostPlatform()}
	}
	for _, tag := range o.Tags {
		switch to.Kind {
		case transport.Registry:
			_, err = reference.WithTag(reference.TrimNamed(to.Name), tag)
		case transport.DockerArchive:
			var n reference.Named
			if n, err = reference.ParseNormalizedNamed(tag); err == nil && reference.IsNameOnly(n) {
				err = errors.New("a name with a tag is meant")
			}
		case transport.Layout, transport.LayoutArchive:
		default:
			err = fmt.Errorf("%s takes no further tags", to)
		}
		if err == nil && tag == "" {
			err = errors.New("it is empty")
		}
		if err != nil {
			return res, fmt.Errorf("tag %q: %w: %w", tag, err, errdefs.ErrInvalidArgument)
		}
	}
	d, err := t.create(ctx, to, from, o.Destination)
	if err != nil {
		return res, err
	}
	defer func() {
		if cerr := d.Close(); err == nil {
			err = cerr
		}
	}()
	res, err = copier.Copy(ctx, s, d, o.Options)
	if err != nil {
		return res, fmt.Errorf("copy %s to %s: %w", from, to, err)
	}
	return res, nil
}

// Tags lists the tags of a repository, or the names in a layout or an archive.
func (t *Tools) Tags(ctx context.Context, ref string, a Access) (name string, tags []string, err error) {
	r, err := transport.ParseRef(ref, transport.Registry)
	if err != nil {
		return "", nil, err
	}
	switch r.Kind {
	case transport.Registry:
		repo, err := t.repository(r.Name, a)
		if err != nil {
			return "", nil, err
		}
		tags, err = repo.Tags(ctx)
		return reference.TrimNamed(r.Name).String(), tags, err
	case transport.Layout, transport.LayoutArchive, transport.DockerArchive:
		s, err := t.open(ctx, r, a)
		if err != nil {
			return "", nil, err
		}
		defer s.Close()
		return string(r.Kind) + ":" + r.Path, transport.Names(s), nil
	}
	return "", nil, fmt.Errorf("%s has no tags: %w", r, errdefs.ErrInvalidArgument)
}

// Delete removes an image from its registry: the manifest, and with it all tags of the
// same digest. It gives the digest.
func (t *Tools) Delete(ctx context.Context, ref string, a Access, dryRun bool) (digest.Digest, error) {
	r, err := transport.ParseRef(ref, transport.Registry)
	if err != nil {
		return "", err
	}
	if r.Kind != transport.Registry {
		return "", fmt.Errorf("%s: only images in registries are deleted so: %w", r, errdefs.ErrInvalidArgument)
	}
	repo, err := t.repository(r.Name, a)
	if err != nil {
		return "", err
	}
	d, ok := r.Name.(reference.Digested)
	dig := digest.Digest("")
	if ok {
		dig = d.Digest()
	} else {
		top, _, err := transport.OpenRegistry(repo, r.Name).Top(ctx)
		if err != nil {
			return "", err
		}
		dig = top.Digest
	}
	if dryRun {
		return dig, nil
	}
	return dig, repo.Delete(ctx, dig)
}

// Login asks a registry whether it takes credentials.
func (t *Tools) Login(ctx context.Context, address string, a Access) error {
	return t.client(a).Login(ctx, address, a.Credentials)
}

// raw reads the top document of an image, or that of one platform.
func raw(ctx context.Context, s transport.Source, p *ocispec.Platform) (ocispec.Descriptor, manifest.Document, error) {
	d, body, err := s.Top(ctx)
	if err != nil {
		return d, manifest.Document{}, err
	}
	doc, err := manifest.Parse("manifest", d.MediaType, body)
	if err != nil || p == nil {
		return d, doc, err
	}
	return choose(ctx, s, d, doc, *p)
}
