package store

import (
	"context"
	"errors"
	"fmt"

	apievents "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// Namespaces implements containerd's namespaces.Store. A namespace is a bucket:
// it exists once it has been created or something was put into it.
type Namespaces Store

var _ namespaces.Store = (*Namespaces)(nil)

// Create makes a namespace: errdefs.ErrAlreadyExists if there is one, ErrInvalidArgument for a name or labels that cannot be.
func (s *Namespaces) Create(ctx context.Context, ns string, labels map[string]string) error {
	if err := errors.Join(validNamespace(ns), ValidateLabels(labels)); err != nil {
		return wrap(err, "create namespace %q", ns)
	}
	labels = CloneLabels(labels)
	err := s.db.Update(ctx, func(tx *bolt.Tx) error {
		if Bucket(tx, string(bucketNS), ns) != nil {
			return errdefs.ErrAlreadyExists
		}
		return putNamespace(tx, ns, labels)
	})
	if err != nil {
		return wrap(err, "create namespace %q", ns)
	}
	(*Store)(s).Publish(namespaces.WithNamespace(ctx, ns), "/namespaces/create", &apievents.NamespaceCreate{Name: ns, Labels: labels})
	return nil
}

// Labels gives the labels of a namespace: errdefs.ErrNotFound if there is none.
func (s *Namespaces) Labels(ctx context.Context, ns string) (labels map[string]string, err error) {
	err = s.db.View(ctx, func(tx *bolt.Tx) error {
		labels, err = namespaceLabels(tx, ns)
		return err
	})
	return labels, wrap(err, "namespace %q", ns)
}

// SetLabel sets one label; an empty value removes it. A namespace that does not exist is made.
func (s *Namespaces) SetLabel(ctx context.Context, ns, key, value string) error {
	labels := map[string]string{}
	if value != "" {
		labels[key] = value
	}
	_, err := s.Relabel(ctx, ns, labels, "labels."+key)
	return err
}

// Relabel replaces labels and gives all that there are then: those that paths ("labels.KEY")
// name, or all of them ("labels", or no path). A value that is empty removes the label. As
// every write to a namespace does, this one makes it.
func (s *Namespaces) Relabel(ctx context.Context, ns string, labels map[string]string, paths ...string) (out map[string]string, err error) {
	if err := errors.Join(validNamespace(ns), ValidateLabels(labels)); err != nil {
		return nil, wrap(err, "label namespace %q", ns)
	}
	if len(paths) == 0 {
		paths = []string{"labels"}
	}
	labels = CloneLabels(labels)
	err = s.db.Update(ctx, func(tx *bolt.Tx) error {
		have, err := namespaceLabels(tx, ns)
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		for _, p := range paths {
			var ok bool
			if have, ok = UpdateLabels(have, labels, p); !ok {
				return fmt.Errorf("field %q cannot be updated: %w", p, errdefs.ErrInvalidArgument)
			}
		}
		out = have
		return putNamespace(tx, ns, have)
	})
	if err != nil {
		return nil, wrap(err, "label namespace %q", ns)
	}
	(*Store)(s).Publish(namespaces.WithNamespace(ctx, ns), "/namespaces/update", &apievents.NamespaceUpdate{Name: ns, Labels: out})
	return out, nil
}

// List gives the names of all namespaces, sorted.
func (s *Namespaces) List(ctx context.Context) (list []string, err error) {
	err = s.db.View(ctx, func(tx *bolt.Tx) error {
		return EachNamespace(tx, func(ns string) error {
			list = append(list, ns)
			return nil
		})
	})
	return list, wrap(err, "list namespaces")
}

// Delete removes a namespace that is empty: errdefs.ErrFailedPrecondition otherwise.
func (s *Namespaces) Delete(ctx context.Context, ns string, opts ...namespaces.DeleteOpts) error {
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
	if err != nil {
		return wrap(err, "delete namespace %q", ns)
	}
	(*Store)(s).Publish(namespaces.WithNamespace(ctx, ns), "/namespaces/delete", &apievents.NamespaceDelete{Name: ns})
	return nil
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
