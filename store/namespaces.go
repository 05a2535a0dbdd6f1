package store

import (
	"context"
	"errors"
	"fmt"
	"maps"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// namespaceStore implements containerd's namespaces.Store. A namespace is a bucket:
// it exists once it has been created or something was put into it.
type namespaceStore Store

var _ namespaces.Store = (*namespaceStore)(nil)

func (s *namespaceStore) Create(ctx context.Context, ns string, labels map[string]string) error {
	if err := errors.Join(validNamespace(ns), ValidateLabels(labels)); err != nil {
		return wrap(err, "create namespace %q", ns)
	}
	err := s.db.Update(ctx, func(tx *bolt.Tx) error {
		if Bucket(tx, string(bucketNS), ns) != nil {
			return errdefs.ErrAlreadyExists
		}
		return putNamespace(tx, ns, labels)
	})
	return wrap(err, "create namespace %q", ns)
}

func (s *namespaceStore) Labels(ctx context.Context, ns string) (labels map[string]string, err error) {
	err = s.db.View(ctx, func(tx *bolt.Tx) error {
		labels, err = namespaceLabels(tx, ns)
		return err
	})
	return labels, wrap(err, "namespace %q", ns)
}

func (s *namespaceStore) SetLabel(ctx context.Context, ns, key, value string) error {
	if err := errors.Join(validNamespace(ns), ValidateLabels(map[string]string{key: value})); err != nil {
		return wrap(err, "label namespace %q", ns)
	}
	err := s.db.Update(ctx, func(tx *bolt.Tx) error {
		labels, err := namespaceLabels(tx, ns)
		if err != nil {
			return err
		}
		labels = maps.Clone(labels)
		if value == "" {
			delete(labels, key)
		} else if labels == nil {
			labels = map[string]string{key: value}
		} else {
			labels[key] = value
		}
		return putNamespace(tx, ns, labels)
	})
	return wrap(err, "label namespace %q", ns)
}

func (s *namespaceStore) List(ctx context.Context) (list []string, err error) {
	err = s.db.View(ctx, func(tx *bolt.Tx) error {
		return EachNamespace(tx, func(ns string) error {
			list = append(list, ns)
			return nil
		})
	})
	return list, wrap(err, "list namespaces")
}

// Delete removes a namespace that is empty: errdefs.ErrFailedPrecondition otherwise.
func (s *namespaceStore) Delete(ctx context.Context, ns string, opts ...namespaces.DeleteOpts) error {
	for _, opt := range opts {
		if err := opt(ctx, &namespaces.DeleteInfo{Name: ns}); err != nil {
			return wrap(err, "delete namespace %q", ns)
		}
	}
	err := s.db.Update(ctx, func(tx *bolt.Tx) error {
		b := Bucket(tx, string(bucketNS), ns)
		if b == nil {
			return errdefs.ErrNotFound
		}
		err := b.ForEachBucket(func(k []byte) error {
			if !emptyBucket(b.Bucket(k)) {
				return fmt.Errorf("it still has %s: %w", k, errdefs.ErrFailedPrecondition)
			}
			return nil
		})
		if err != nil {
			return err
		}
		return Bucket(tx, string(bucketNS)).DeleteBucket([]byte(ns))
	})
	return wrap(err, "delete namespace %q", ns)
}

// emptyBucket tells whether there is nothing in a bucket but empty buckets.
func emptyBucket(b *bolt.Bucket) bool {
	err := b.ForEach(func(k, v []byte) error {
		if v == nil && emptyBucket(b.Bucket(k)) {
			return nil
		}
		return ErrStop
	})
	return err == nil
}

func namespaceLabels(tx *bolt.Tx, ns string) (labels map[string]string, err error) {
	b := Bucket(tx, string(bucketNS), ns)
	if b == nil {
		return nil, errdefs.ErrNotFound
	}
	if raw := b.Get(keyNSLabels); raw != nil {
		err = decode(raw, &labels)
	}
	return labels, err
}

func putNamespace(tx *bolt.Tx, ns string, labels map[string]string) error {
	b, err := MakeBucket(tx, string(bucketNS), ns)
	if err != nil {
		return err
	}
	raw, err := encode(labels)
	if err != nil {
		return err
	}
	return b.Put(keyNSLabels, raw)
}
