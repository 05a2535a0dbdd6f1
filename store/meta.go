package store

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// blobRecord is what a namespace knows about a blob.
type blobRecord struct {
	Size    int64             `json:"size"`
	Created time.Time         `json:"created"`
	Updated time.Time         `json:"updated"`
	Labels  map[string]string `json:"labels,omitempty"`
}

type imageRecord struct {
	Target  ocispec.Descriptor `json:"target"`
	Created time.Time          `json:"created"`
	Updated time.Time          `json:"updated"`
	Labels  map[string]string  `json:"labels,omitempty"`
}

type leaseRecord struct {
	Created time.Time         `json:"created"`
	Labels  map[string]string `json:"labels,omitempty"`
}

func encode(v any) ([]byte, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return raw, nil
}

// decode reads one JSON value. A record that cannot be read is errdefs.ErrDataLoss.
func decode(raw []byte, v any) error {
	if err := json.Unmarshal(raw, v); err != nil {
		return fmt.Errorf("damaged record: %w: %w", err, errdefs.ErrDataLoss)
	}
	return nil
}

func (r blobRecord) info(d digest.Digest) content.Info {
	return content.Info{Digest: d, Size: r.Size, CreatedAt: r.Created, UpdatedAt: r.Updated, Labels: r.Labels}
}

func (r imageRecord) image(name string) images.Image {
	return images.Image{Name: name, Labels: r.Labels, Target: r.Target, CreatedAt: r.Created, UpdatedAt: r.Updated}
}

func (r leaseRecord) lease(id string) leases.Lease {
	return leases.Lease{ID: id, CreatedAt: r.Created, Labels: r.Labels}
}

// now is the time that records carry: UTC, without a monotonic part, so that what is
// returned equals what is read back.
func now() time.Time { return time.Now().UTC().Round(0) }

// Namespace gives the namespace of a call: errdefs.ErrFailedPrecondition without one.
func Namespace(ctx context.Context) (string, error) {
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return "", err
	}
	return ns, validNamespace(ns)
}

func validNamespace(ns string) error {
	if err := identifiers.Validate(ns); err != nil {
		return fmt.Errorf("namespace: %w", err)
	}
	return nil
}

// ValidateLabels refuses labels that are too long (containerd's limit of 4096 bytes).
func ValidateLabels(m map[string]string) error {
	for k, v := range m {
		if err := labels.Validate(k, v); err != nil {
			return err
		}
	}
	return nil
}

// CloneLabels copies labels as containerd keeps them: an empty value is none. It is how its clients remove one.
func CloneLabels(m map[string]string) map[string]string {
	m = maps.Clone(m)
	maps.DeleteFunc(m, func(_, v string) bool { return v == "" })
	return m
}

// UpdateLabels applies a field mask to labels: "labels" replaces all of them,
// "labels.KEY" sets KEY, or removes it if want lacks it. ok is false for another path.
func UpdateLabels(have, want map[string]string, path string) (_ map[string]string, ok bool) {
	if path == "labels" {
		return CloneLabels(want), true
	}
	key, ok := strings.CutPrefix(path, "labels.")
	if !ok {
		return have, false
	}
	out := maps.Clone(have)
	if v := want[key]; v != "" {
		if out == nil {
			out = map[string]string{}
		}
		out[key] = v
	} else {
		delete(out, key)
	}
	return out, true
}

// LabelField is the "labels.KEY" part of a filter adaptor. A key may hold dots.
func LabelField(m map[string]string, path []string) (string, bool) {
	if len(path) == 0 {
		return "", false
	}
	v, ok := m[strings.Join(path, ".")]
	return v, ok
}

// ParseFilters compiles containerd's filter syntax; none matches everything.
func ParseFilters(fs []string) (filters.Filter, error) {
	return filters.ParseAll(fs...) // its errors are errdefs.ErrInvalidArgument
}

// Adapt lets containerd's filters look at an object: at its labels, and at what field gives for a path ("" where there is
// none) of at least one element.
func Adapt(labels map[string]string, field func(path []string) string) filters.Adaptor {
	return filters.AdapterFunc(func(p []string) (string, bool) {
		switch {
		case len(p) == 0:
			return "", false
		case p[0] == "labels":
			return LabelField(labels, p[1:])
		}
		v := field(p)
		return v, v != ""
	})
}

func adaptBlob(i content.Info) filters.Adaptor {
	return Adapt(i.Labels, func(p []string) string {
		switch p[0] {
		case "digest":
			return i.Digest.String()
		case "size":
			return fmt.Sprint(i.Size)
		}
		return ""
	})
}

func adaptImage(i images.Image) filters.Adaptor {
	return filters.AdapterFunc(func(p []string) (string, bool) {
		if len(p) == 0 {
			return "", false
		}
		switch p[0] {
		case "name":
			return i.Name, i.Name != ""
		case "target":
			if len(p) < 2 {
				return "", false
			}
			switch p[1] {
			case "digest":
				return i.Target.Digest.String(), true
			case "mediatype":
				return i.Target.MediaType, true
			case "annotations":
				return LabelField(i.Target.Annotations, p[2:])
			}
		case "labels":
			return LabelField(i.Labels, p[1:])
		case "annotations":
			return LabelField(i.Target.Annotations, p[1:])
		}
		return "", false
	})
}

func adaptLease(l leases.Lease) filters.Adaptor {
	return Adapt(l.Labels, func(p []string) string {
		if p[0] == "id" {
			return l.ID
		}
		return ""
	})
}
