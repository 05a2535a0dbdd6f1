package store

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// table is a section of each namespace with one record for each object.
type table[R, T any] struct {
	s       *Store
	section string
	name    string // of one object in errors: a format of its id and its namespace
	object  func(R, string) T
	adapt   func(T) filters.Adaptor // for filters
}

// readRecord reads one record of a section of a namespace: errdefs.ErrNotFound if it, or the section (b is nil), is not there.
func readRecord[R any](b *bolt.Bucket, id string) (r R, err error) {
	var raw []byte
	if b != nil && id != "" {
		raw = b.Get([]byte(id))
	}
	if raw == nil {
		return r, errdefs.ErrNotFound
	}
	return r, decode(raw, &r)
}

// writeRecord writes one record of a section: errdefs.ErrInvalidArgument if it is larger than maxRecord.
func writeRecord(b *bolt.Bucket, id string, r any) error {
	raw, err := encode(r)
	if err != nil {
		return err
	}
	if len(raw) > maxRecord {
		return fmt.Errorf("%d bytes, at most %d are possible: %w", len(raw), maxRecord, errdefs.ErrInvalidArgument)
	}
	return b.Put([]byte(id), raw)
}

// get gives one object of the context's namespace.
func (t table[R, T]) get(ctx context.Context, id string) (o T, err error) {
	ns, err := Namespace(ctx)
	if err != nil {
		return o, err
	}
	var r R
	err = t.s.db.View(ctx, func(tx *bolt.Tx) (err error) {
		r, err = readRecord[R](NamespaceBucket(tx, ns, t.section), id)
		return err
	})
	if err != nil {
		return o, wrap(err, "%s", fmt.Sprintf(t.name, id, ns))
	}
	return t.object(r, id), nil
}

// list gives what the filters match in the context's namespace. A damaged record is reported, and does not hide the
// others.
func (t table[R, T]) list(ctx context.Context, fs []string) (list []T, err error) {
	ns, err := Namespace(ctx)
	if err != nil {
		return nil, err
	}
	filter, err := ParseFilters(fs)
	if err != nil {
		return nil, err
	}
	err = t.s.db.View(ctx, func(tx *bolt.Tx) error {
		list = nil
		b := NamespaceBucket(tx, ns, t.section)
		if b == nil {
			return nil
		}
		return b.ForEach(func(k, v []byte) error {
			var r R
			if err := decode(v, &r); err != nil {
				t.s.log.Error("skipped a damaged record", "section", t.section, "namespace", ns, "id", string(k), "error", err)
				return nil
			}
			if o := t.object(r, string(k)); filter.Match(t.adapt(o)) {
				list = append(list, o)
			}
			return nil
		})
	})
	return list, wrap(err, "list %s", t.section)
}

// delete deletes one object of the context's namespace, unless refuse has something against it.
func (t table[R, T]) delete(ctx context.Context, id string, refuse func(*bolt.Bucket) error) error {
	ns, err := Namespace(ctx)
	if err != nil {
		return err
	}
	err = t.s.db.Update(ctx, func(tx *bolt.Tx) error {
		b := NamespaceBucket(tx, ns, t.section)
		if b == nil || id == "" || b.Get([]byte(id)) == nil {
			return errdefs.ErrNotFound
		}
		if refuse != nil {
			if err := refuse(b); err != nil {
				return err
			}
		}
		return b.Delete([]byte(id))
	})
	return wrap(err, "delete %s", fmt.Sprintf(t.name, id, ns))
}

// mark visits the records of a namespace for a collection, which a damaged one stops.
func (t table[R, T]) mark(tx *bolt.Tx, w *walk, ns string, visit func(id string, r R)) {
	b := NamespaceBucket(tx, ns, t.section)
	if b == nil {
		return
	}
	_ = b.ForEach(func(k, v []byte) error {
		var r R
		if err := decode(v, &r); err != nil {
			t.s.damage(w, ns, t.section, string(k), err)
			return nil
		}
		visit(string(k), r)
		return nil
	})
}
