package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	apievents "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
)

// contentStore implements containerd's content.Store. A blob's bytes are shared by
// all namespaces; that a namespace has it, and its labels, are the namespace's.
type contentStore Store

var (
	_ content.Store  = (*contentStore)(nil)
	_ content.Writer = (*writer)(nil)
	_ content.Syncer = (*writer)(nil)
)

func (s *contentStore) Info(ctx context.Context, d digest.Digest) (content.Info, error) {
	ns, err := Namespace(ctx)
	if err != nil {
		return content.Info{}, err
	}
	var r blobRecord
	err = s.db.View(ctx, func(tx *bolt.Tx) error {
		r, err = readBlob(tx, ns, d)
		return err
	})
	if err != nil {
		return content.Info{}, wrap(err, "content %s", d)
	}
	return r.info(d), nil
}

func (s *contentStore) Update(ctx context.Context, info content.Info, fieldpaths ...string) (content.Info, error) {
	ns, err := Namespace(ctx)
	if err != nil {
		return content.Info{}, err
	}
	if len(fieldpaths) == 0 {
		fieldpaths = []string{"labels"}
	}
	var out content.Info
	err = s.db.Update(ctx, func(tx *bolt.Tx) error {
		r, err := readBlob(tx, ns, info.Digest)
		if err != nil {
			return err
		}
		for _, p := range fieldpaths {
			l, ok := UpdateLabels(r.Labels, info.Labels, p)
			if !ok {
				return fmt.Errorf("field %q cannot be updated: %w", p, errdefs.ErrInvalidArgument)
			}
			r.Labels = l
		}
		if err := ValidateLabels(r.Labels); err != nil {
			return err
		}
		r.Updated = now()
		out = r.info(info.Digest)
		return (*Store)(s).putBlob(tx, ns, info.Digest, r)
	})
	if err != nil {
		return content.Info{}, wrap(err, "update content %s", info.Digest)
	}
	return out, nil
}

func (s *contentStore) Walk(ctx context.Context, fn content.WalkFunc, fs ...string) error {
	ns, err := Namespace(ctx)
	if err != nil {
		return err
	}
	filter, err := ParseFilters(fs)
	if err != nil {
		return err
	}
	var list []content.Info
	err = s.db.View(ctx, func(tx *bolt.Tx) error {
		b := NamespaceBucket(tx, ns, sectionContent)
		if b == nil {
			return nil
		}
		return b.ForEach(func(k, v []byte) error {
			var r blobRecord
			if err := decode(v, &r); err != nil {
				s.log.Error("skipped a damaged content record", "namespace", ns, "digest", string(k), "error", err)
				return nil
			}
			if info := r.info(digest.Digest(k)); filter.Match(adaptBlob(info)) {
				list = append(list, info)
			}
			return nil
		})
	})
	if err != nil {
		return wrap(err, "walk content")
	}
	// Outside the transaction, so that fn may use the store.
	for _, info := range list {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := fn(info); err != nil {
			return err
		}
	}
	return nil
}

// Delete takes a blob from the namespace; its file goes when no namespace has it.
func (s *contentStore) Delete(ctx context.Context, d digest.Digest) error {
	ns, err := Namespace(ctx)
	if err != nil {
		return err
	}
	err = s.db.Update(ctx, func(tx *bolt.Tx) error {
		b := NamespaceBucket(tx, ns, sectionContent)
		if b == nil || b.Get([]byte(d)) == nil {
			return errdefs.ErrNotFound
		}
		return b.Delete([]byte(d))
	})
	if err != nil {
		return wrap(err, "delete content %s", d)
	}
	s.gc.schedule()
	(*Store)(s).Publish(ctx, "/content/delete", &apievents.ContentDelete{Digest: d.String()})
	_, err = (*Store)(s).removeUnnamed(ctx, d)
	return wrap(err, "delete content %s", d)
}

func (s *contentStore) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	info, err := s.Info(ctx, desc.Digest)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(s.blobs.path(desc.Digest))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("content %s: its file is missing: %w", desc.Digest, errdefs.ErrDataLoss)
	}
	if err != nil {
		return nil, wrap(err, "content %s", desc.Digest)
	}
	st, err := f.Stat()
	if err == nil && st.Size() != info.Size {
		err = fmt.Errorf("its file has %d bytes instead of %d: %w", st.Size(), info.Size, errdefs.ErrDataLoss)
	}
	if err != nil {
		f.Close()
		return nil, wrap(err, "content %s", desc.Digest)
	}
	return &blobReader{f, info.Size}, nil
}

// blobReader is an open blob. It stays readable when the blob is removed.
type blobReader struct {
	*os.File
	size int64
}

func (r *blobReader) Size() int64 { return r.size }

// removeUnnamed removes a blob's file if no namespace has it, and gives its size.
func (s *Store) removeUnnamed(ctx context.Context, d digest.Digest) (int64, error) {
	l := s.blobs.lock(d)
	l.Lock()
	defer l.Unlock()
	named := false
	err := s.db.View(ctx, func(tx *bolt.Tx) error {
		named = blobNamed(tx, d)
		return nil
	})
	if err != nil || named {
		return 0, err
	}
	size, err := s.blobs.size(d)
	if err == nil {
		err = os.Remove(s.blobs.path(d))
	}
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	return size, err
}

func blobNamed(tx *bolt.Tx, d digest.Digest) bool {
	err := EachNamespace(tx, func(ns string) error {
		if b := NamespaceBucket(tx, ns, sectionContent); b != nil && b.Get([]byte(d)) != nil {
			return ErrStop
		}
		return nil
	})
	return err != nil
}

// addBlob records that a namespace has a blob, whose file is there, and leases it; had
// tells that the namespace had it before. To find it and to lease it is one step: between
// two, it could be collected.
func (s *Store) addBlob(ctx context.Context, tx *bolt.Tx, ns string, d digest.Digest, size int64, labels map[string]string) (had bool, err error) {
	b, err := MakeNamespaceBucket(tx, ns, sectionContent)
	if err != nil {
		return false, err
	}
	if err := LeaseResource(ctx, tx, resourceContent, d.String()); err != nil {
		return false, err
	}
	if b.Get([]byte(d)) != nil {
		s.Touch(ContentNode(ns, d))
		return true, nil
	}
	t := now()
	return false, s.putBlob(tx, ns, d, blobRecord{Size: size, Created: t, Updated: t, Labels: CloneLabels(labels)})
}

func (s *Store) putBlob(tx *bolt.Tx, ns string, d digest.Digest, r blobRecord) error {
	raw, err := encode(r)
	if err != nil {
		return err
	}
	s.Touch(Node{Type: resourceContent, Namespace: ns, ID: d.String()})
	return NamespaceBucket(tx, ns, sectionContent).Put([]byte(d), raw)
}

func readBlob(tx *bolt.Tx, ns string, d digest.Digest) (r blobRecord, err error) {
	b := NamespaceBucket(tx, ns, sectionContent)
	var raw []byte
	if b != nil && d != "" {
		raw = b.Get([]byte(d))
	}
	if raw == nil {
		return r, errdefs.ErrNotFound
	}
	return r, decode(raw, &r)
}

// errGone tells that a blob that was there has been collected.
var errGone = errors.New("content is gone")

// leaseExisting makes the lease of ctx hold a blob that is there already. In the
// usual case, when it does or there is no lease, nothing is written.
func (s *Store) leaseExisting(ctx context.Context, ns string, d digest.Digest) error {
	id, ok := leaseOf(ctx)
	if !ok {
		return nil
	}
	s.Touch(Node{Type: resourceContent, Namespace: ns, ID: d.String()})
	held := false
	err := s.db.View(ctx, func(tx *bolt.Tx) error {
		held = leaseHolds(tx, ns, id, resourceContent, d.String())
		return nil
	})
	if err != nil || held {
		return err
	}
	return s.db.Update(ctx, func(tx *bolt.Tx) error {
		// It may have been collected since it was seen.
		if _, err := readBlob(tx, ns, d); err != nil {
			return errors.Join(errGone, err)
		}
		s.Touch(Node{Type: resourceContent, Namespace: ns, ID: d.String()})
		return LeaseResource(ctx, tx, resourceContent, d.String())
	})
}
