package store

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"time"

	apievents "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/epoch"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
)

// imageStore implements containerd's images.Store.
type imageStore Store

var _ images.Store = (*imageStore)(nil)

func (s *Store) imageTable() table[imageRecord, images.Image] {
	return table[imageRecord, images.Image]{s, sectionImages, `image %[1]q`, imageRecord.image, adaptImage}
}

func (s *imageStore) Get(ctx context.Context, name string) (images.Image, error) {
	return (*Store)(s).imageTable().get(ctx, name)
}

func (s *imageStore) List(ctx context.Context, fs ...string) ([]images.Image, error) {
	return (*Store)(s).imageTable().list(ctx, fs)
}

func (s *imageStore) Create(ctx context.Context, img images.Image) (images.Image, error) {
	ns, err := Namespace(ctx)
	if err != nil {
		return images.Image{}, err
	}
	if err := validateImage(img); err != nil {
		return images.Image{}, wrap(err, "create image %q", img.Name)
	}
	img.Labels = CloneLabels(img.Labels)
	err = s.db.Update(ctx, func(tx *bolt.Tx) error {
		b, err := MakeNamespaceBucket(tx, ns, sectionImages)
		if err != nil {
			return err
		}
		if b.Get([]byte(img.Name)) != nil {
			return errdefs.ErrAlreadyExists
		}
		img.CreatedAt = recordTime(ctx)
		img.UpdatedAt = img.CreatedAt
		if err := LeaseResource(ctx, tx, resourceImages, img.Name); err != nil {
			return err
		}
		return (*Store)(s).putImage(b, ns, img)
	})
	if err != nil {
		return images.Image{}, wrap(err, "create image %q", img.Name)
	}
	(*Store)(s).Publish(ctx, "/images/create", &apievents.ImageCreate{Name: img.Name, Labels: img.Labels})
	return img, nil
}

func (s *imageStore) Update(ctx context.Context, img images.Image, fieldpaths ...string) (images.Image, error) {
	ns, err := Namespace(ctx)
	if err != nil {
		return images.Image{}, err
	}
	if img.Name == "" {
		return images.Image{}, fmt.Errorf("update image: name is missing: %w", errdefs.ErrInvalidArgument)
	}
	var out images.Image
	err = s.db.Update(ctx, func(tx *bolt.Tx) error {
		b := NamespaceBucket(tx, ns, sectionImages)
		r, err := readRecord[imageRecord](b, img.Name)
		if err != nil {
			return err
		}
		out = r.image(img.Name)
		if len(fieldpaths) == 0 {
			out.Target, out.Labels = img.Target, CloneLabels(img.Labels)
		}
		for _, p := range fieldpaths {
			if err := updateImageField(&out, img, p); err != nil {
				return err
			}
		}
		if err := validateImage(out); err != nil {
			return err
		}
		out.UpdatedAt = recordTime(ctx)
		return (*Store)(s).putImage(b, ns, out)
	})
	if err != nil {
		return images.Image{}, wrap(err, "update image %q", img.Name)
	}
	// The blobs of an old target may have become garbage.
	s.gc.schedule()
	(*Store)(s).Publish(ctx, "/images/update", &apievents.ImageUpdate{Name: out.Name, Labels: out.Labels})
	return out, nil
}

func updateImageField(have *images.Image, want images.Image, path string) error {
	if l, ok := UpdateLabels(have.Labels, want.Labels, path); ok {
		have.Labels = l
		return nil
	}
	switch {
	case path == "target":
		have.Target = want.Target
	case path == "annotations" || path == "target.annotations":
		have.Target.Annotations = maps.Clone(want.Target.Annotations)
	case strings.HasPrefix(path, "annotations.") || strings.HasPrefix(path, "target.annotations."):
		key := strings.TrimPrefix(path, "target.")
		// The same rule as for labels, on another map.
		have.Target.Annotations, _ = UpdateLabels(have.Target.Annotations, want.Target.Annotations, "labels."+strings.TrimPrefix(key, "annotations."))
	default:
		return fmt.Errorf("field %q cannot be updated: %w", path, errdefs.ErrInvalidArgument)
	}
	return nil
}

func (s *imageStore) Delete(ctx context.Context, name string, opts ...images.DeleteOpt) error {
	var o images.DeleteOptions
	for _, opt := range opts {
		if err := opt(ctx, &o); err != nil {
			return wrap(err, "delete image %q", name)
		}
	}
	err := (*Store)(s).imageTable().delete(ctx, name, func(b *bolt.Bucket) error {
		if o.Target == nil {
			return nil
		}
		r, err := readRecord[imageRecord](b, name)
		if err != nil {
			return err
		}
		if !sameTarget(r.Target, *o.Target) {
			return fmt.Errorf("it has another target, %s: %w", r.Target.Digest, errdefs.ErrNotFound)
		}
		return nil
	})
	if err != nil {
		return err
	}
	(*Store)(s).Publish(ctx, "/images/delete", &apievents.ImageDelete{Name: name})
	if o.Synchronous {
		_, err := (*Store)(s).GC(ctx)
		return wrap(err, "delete image %q", name)
	}
	s.gc.schedule()
	return nil
}

// recordTime is now, or the time that ctx has for what shall be made alike each time
// (SOURCE_DATE_EPOCH).
func recordTime(ctx context.Context) time.Time {
	if t := epoch.FromContext(ctx); t != nil {
		return t.UTC().Round(0)
	}
	return now()
}

// sameTarget compares a target with what a client says of it, who may know no more than the digest.
func sameTarget(have, said ocispec.Descriptor) bool {
	return have.Digest == said.Digest && (said.Size == 0 || have.Size == said.Size) && (said.MediaType == "" || have.MediaType == said.MediaType)
}

// putImage also tells a collection under way that the image, and so what it refers
// to, is in use.
func (s *Store) putImage(b *bolt.Bucket, ns string, img images.Image) error {
	s.Touch(Node{Type: resourceImages, Namespace: ns, ID: img.Name})
	return writeRecord(b, img.Name, imageRecord{Target: img.Target, Created: img.CreatedAt, Updated: img.UpdatedAt, Labels: img.Labels})
}

func validateImage(img images.Image) error {
	if img.Name == "" {
		return fmt.Errorf("name is missing: %w", errdefs.ErrInvalidArgument)
	}
	if len(img.Name) > maxKey {
		return fmt.Errorf("name has %d bytes, at most %d are possible: %w", len(img.Name), maxKey, errdefs.ErrInvalidArgument)
	}
	if err := ValidateLabels(img.Labels); err != nil {
		return err
	}
	if err := img.Target.Digest.Validate(); err != nil {
		return fmt.Errorf("target digest %q: %w: %w", img.Target.Digest, err, errdefs.ErrInvalidArgument)
	}
	if img.Target.Size <= 0 {
		return fmt.Errorf("target size %d: %w", img.Target.Size, errdefs.ErrInvalidArgument)
	}
	if img.Target.MediaType == "" {
		return fmt.Errorf("target media type is missing: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}
