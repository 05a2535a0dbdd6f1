package store

import (
	"context"
	"fmt"
	"maps"
	"time"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// sandboxStore implements containerd's sandbox.Store: what clients of its API say of their
// sandboxes.
type sandboxStore Store

var _ sandbox.Store = (*sandboxStore)(nil)

// Sandboxes is the store of sandbox records.
func (s *Store) Sandboxes() sandbox.Store { return (*sandboxStore)(s) }

type sandboxRecord struct {
	Labels         map[string]string     `json:"labels,omitempty"`
	Runtime        string                `json:"runtime"`
	RuntimeOptions *anyRecord            `json:"runtimeOptions,omitempty"`
	Spec           *anyRecord            `json:"spec,omitempty"`
	Sandboxer      string                `json:"sandboxer,omitempty"`
	Extensions     map[string]*anyRecord `json:"extensions,omitempty"`
	Created        time.Time             `json:"created"`
	Updated        time.Time             `json:"updated"`
}

func (r sandboxRecord) sandbox(id string) sandbox.Sandbox {
	return sandbox.Sandbox{
		ID: id, Labels: r.Labels, Runtime: sandbox.RuntimeOpts{Name: r.Runtime, Options: r.RuntimeOptions.any()}, Spec: r.Spec.any(),
		Sandboxer: r.Sandboxer, Extensions: anys(r.Extensions), CreatedAt: r.Created, UpdatedAt: r.Updated,
	}
}

func (s *Store) sandboxTable() table[sandboxRecord, sandbox.Sandbox] {
	return table[sandboxRecord, sandbox.Sandbox]{s, sectionSandboxes, `sandbox %q in namespace %q`, sandboxRecord.sandbox, AdaptSandbox}
}

func (s *sandboxStore) Get(ctx context.Context, id string) (sandbox.Sandbox, error) {
	return (*Store)(s).sandboxTable().get(ctx, id)
}

func (s *sandboxStore) List(ctx context.Context, fs ...string) ([]sandbox.Sandbox, error) {
	return (*Store)(s).sandboxTable().list(ctx, fs)
}

// AdaptSandbox lets containerd's filters look at a sandbox.
func AdaptSandbox(b sandbox.Sandbox) filters.Adaptor {
	return Adapt(b.Labels, func(p []string) string {
		switch p[0] {
		case "id":
			return b.ID
		case "runtime":
			return runtimeField(b.Runtime.Name, p)
		case "sandboxer":
			return b.Sandboxer
		}
		return ""
	})
}

func (s *sandboxStore) Create(ctx context.Context, b sandbox.Sandbox) (sandbox.Sandbox, error) {
	ns, err := Namespace(ctx)
	if err != nil {
		return sandbox.Sandbox{}, err
	}
	if err := validateSandbox(b); err != nil {
		return sandbox.Sandbox{}, wrap(err, "create sandbox %q", b.ID)
	}
	b.Labels, b.Extensions = maps.Clone(b.Labels), maps.Clone(b.Extensions)
	err = s.db.Update(ctx, func(tx *bolt.Tx) error {
		bucket, err := MakeNamespaceBucket(tx, ns, sectionSandboxes)
		if err != nil {
			return err
		}
		if bucket.Get([]byte(b.ID)) != nil {
			return errdefs.ErrAlreadyExists
		}
		b.CreatedAt = now()
		b.UpdatedAt = b.CreatedAt
		return putSandbox(bucket, b)
	})
	if err != nil {
		return sandbox.Sandbox{}, wrap(err, "sandbox %q", b.ID)
	}
	return b, nil
}

func (s *sandboxStore) Update(ctx context.Context, b sandbox.Sandbox, fieldpaths ...string) (out sandbox.Sandbox, err error) {
	ns, err := Namespace(ctx)
	if err != nil {
		return out, err
	}
	if b.ID == "" {
		return out, fmt.Errorf("update sandbox: id is missing: %w", errdefs.ErrInvalidArgument)
	}
	err = s.db.Update(ctx, func(tx *bolt.Tx) error {
		bucket := NamespaceBucket(tx, ns, sectionSandboxes)
		r, err := readRecord[sandboxRecord](bucket, b.ID)
		if err != nil {
			return err
		}
		out = r.sandbox(b.ID)
		paths := fieldpaths
		if len(paths) == 0 {
			if b.Runtime.Name != out.Runtime.Name {
				return fmt.Errorf("the runtime cannot be changed: %w", errdefs.ErrInvalidArgument)
			}
			paths = []string{"labels", "extensions", "spec", "runtime"}
		}
		for _, p := range paths {
			if err := updateSandboxField(&out, b, p); err != nil {
				return err
			}
		}
		if err := validateSandbox(out); err != nil {
			return err
		}
		out.UpdatedAt = now()
		return putSandbox(bucket, out)
	})
	if err != nil {
		return sandbox.Sandbox{}, wrap(err, "update sandbox %q", b.ID)
	}
	return out, nil
}

func updateSandboxField(have *sandbox.Sandbox, want sandbox.Sandbox, path string) error {
	if updateMaps(&have.Labels, &have.Extensions, want.Labels, want.Extensions, path) {
		return nil
	}
	switch path {
	case "spec":
		have.Spec = want.Spec
	case "runtime":
		have.Runtime = want.Runtime
	default:
		return fmt.Errorf("field %q cannot be updated: %w", path, errdefs.ErrInvalidArgument)
	}
	return nil
}

func (s *sandboxStore) Delete(ctx context.Context, id string) error {
	if err := (*Store)(s).sandboxTable().delete(ctx, id, nil); err != nil {
		return err
	}
	s.gc.schedule()
	return nil
}

func putSandbox(bucket *bolt.Bucket, b sandbox.Sandbox) error {
	return writeRecord(bucket, b.ID, sandboxRecord{
		Labels: CloneLabels(b.Labels), Runtime: b.Runtime.Name, RuntimeOptions: recordAny(b.Runtime.Options), Spec: recordAny(b.Spec), Sandboxer: b.Sandboxer,
		Extensions: recordAnys(b.Extensions), Created: b.CreatedAt, Updated: b.UpdatedAt,
	})
}

func validateSandbox(b sandbox.Sandbox) error {
	if err := identifiers.Validate(b.ID); err != nil {
		return fmt.Errorf("id: %w", err)
	}
	return validateMaps(b.Labels, b.Extensions)
}

// markSandboxes adds what the labels of sandboxes name.
func (s *Store) markSandboxes(tx *bolt.Tx, ns string, w *walk) {
	s.sandboxTable().mark(tx, w, ns, func(_ string, r sandboxRecord) {
		w.roots = append(w.roots, labelRefs(ns, r.Labels)...)
	})
}
