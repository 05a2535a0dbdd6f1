package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// maxRecord bounds one record's JSON, in bytes.
const maxRecord = 16 << 20

// ErrStop, returned by a callback of ForEach, ends the walk without an error.
var ErrStop = errors.New("stop")

// Records keeps one kind of another room's objects as JSON, by id. It knows no
// namespaces.
type Records struct {
	s    *Store
	kind string
}

// Records gives the records of a kind, e.g. "containers".
func (s *Store) Records(kind string) *Records { return &Records{s, kind} }

// Change is one step of Write.
type Change struct {
	Kind, ID string
	Value    any // nil: remove the record
}

// Write makes all changes, of records of several kinds, or none.
func (s *Store) Write(ctx context.Context, changes ...Change) error {
	raws := make([][]byte, len(changes))
	for i, c := range changes {
		if c.Kind == "" || c.ID == "" || len(c.ID) > maxKey {
			return fmt.Errorf("record %s/%s: a kind and an id of at most %d bytes are needed: %w", c.Kind, c.ID, maxKey, errdefs.ErrInvalidArgument)
		}
		if c.Value == nil {
			continue
		}
		raw, err := encode(c.Value)
		if err == nil && len(raw) > maxRecord {
			err = fmt.Errorf("%d bytes, at most %d are possible: %w", len(raw), maxRecord, errdefs.ErrInvalidArgument)
		}
		if err != nil {
			return wrap(err, "record %s/%s", c.Kind, c.ID)
		}
		raws[i] = raw
	}
	err := s.db.Update(ctx, func(tx *bolt.Tx) error {
		for i, c := range changes {
			if err := putRecord(tx, c, raws[i]); err != nil {
				return wrap(err, "record %s/%s", c.Kind, c.ID)
			}
		}
		return nil
	})
	return wrap(err, "write records")
}

func putRecord(tx *bolt.Tx, c Change, raw []byte) error {
	if c.Value == nil {
		if b := Bucket(tx, string(bucketRecs), c.Kind); b != nil {
			return b.Delete([]byte(c.ID))
		}
		return nil
	}
	b, err := MakeBucket(tx, string(bucketRecs), c.Kind)
	if err != nil {
		return err
	}
	return b.Put([]byte(c.ID), raw)
}

// Put stores v as JSON, over what was there.
func (r *Records) Put(ctx context.Context, id string, v any) error {
	if v == nil {
		return fmt.Errorf("record %s/%s: no value: %w", r.kind, id, errdefs.ErrInvalidArgument)
	}
	return r.s.Write(ctx, Change{r.kind, id, v})
}

// PutAll stores all the values or none.
func (r *Records) PutAll(ctx context.Context, values map[string]any) error {
	changes := make([]Change, 0, len(values))
	for id, v := range values {
		if v == nil {
			return fmt.Errorf("record %s/%s: no value: %w", r.kind, id, errdefs.ErrInvalidArgument)
		}
		changes = append(changes, Change{r.kind, id, v})
	}
	return r.s.Write(ctx, changes...)
}

// Delete removes a record. One that does not exist is no error.
func (r *Records) Delete(ctx context.Context, id string) error {
	return r.s.Write(ctx, Change{r.kind, id, nil})
}

// Get reads a record into v: errdefs.ErrNotFound, or ErrDataLoss if it is damaged.
func (r *Records) Get(ctx context.Context, id string, v any) error {
	err := r.s.db.View(ctx, func(tx *bolt.Tx) error {
		var raw []byte
		if b := Bucket(tx, string(bucketRecs), r.kind); b != nil && id != "" {
			raw = b.Get([]byte(id))
		}
		if raw == nil {
			return errdefs.ErrNotFound
		}
		return decode(raw, v)
	})
	return wrap(err, "record %s/%s", r.kind, id)
}

// ForEach calls fn with every record, in the order of ids. A damaged record, or one
// that fn returns an error for, never hides the others: the walk goes on, and the
// result joins one error per such record, each naming it. ErrStop ends the walk.
// raw is fn's to keep.
func (r *Records) ForEach(fn func(id string, raw []byte) error) error {
	type record struct {
		id  string
		raw []byte
	}
	var all []record
	err := r.s.db.View(context.Background(), func(tx *bolt.Tx) error {
		b := Bucket(tx, string(bucketRecs), r.kind)
		if b == nil {
			return nil
		}
		return b.ForEach(func(k, v []byte) error {
			all = append(all, record{string(k), append([]byte(nil), v...)})
			return nil
		})
	})
	if err != nil {
		return wrap(err, "records %s", r.kind)
	}
	var errs []error
	for _, rec := range all {
		err := visit(rec.id, rec.raw, fn)
		if errors.Is(err, ErrStop) {
			break
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("record %s/%s: %w", r.kind, rec.id, err))
		}
	}
	return errors.Join(errs...)
}

func visit(id string, raw []byte, fn func(string, []byte) error) error {
	if !json.Valid(raw) {
		return fmt.Errorf("damaged record: not JSON: %w", errdefs.ErrDataLoss)
	}
	return fn(id, raw)
}
