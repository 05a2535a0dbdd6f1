package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
)

// Types of resources that a lease holds; "snapshots/NAME" besides.
const (
	resourceContent   = "content"
	resourceIngests   = "ingests"
	resourceImages    = "images"
	resourceLeases    = "leases" // not leasable: the type of a lease's own node
	resourceSnapshots = "snapshots/"

	resourceContainers = "containers" // the type of a container's own node

	maxKey = 4096 // of ids and names that become keys
)

var (
	keyLeaseInfo   = []byte("info")
	bucketResource = []byte("resources")
)

// leaseManager implements containerd's leases.Manager.
type leaseManager Store

var _ leases.Manager = (*leaseManager)(nil)

func (s *leaseManager) Create(ctx context.Context, opts ...leases.Opt) (leases.Lease, error) {
	ns, err := Namespace(ctx)
	if err != nil {
		return leases.Lease{}, err
	}
	var l leases.Lease
	for _, opt := range opts {
		if err := opt(&l); err != nil {
			return leases.Lease{}, wrap(err, "create lease")
		}
	}
	if l.ID == "" || len(l.ID) > maxKey {
		return leases.Lease{}, fmt.Errorf("create lease: an id of 1 to %d bytes is needed: %w", maxKey, errdefs.ErrInvalidArgument)
	}
	if err := ValidateLabels(l.Labels); err != nil {
		return leases.Lease{}, wrap(err, "create lease %q", l.ID)
	}
	l.Labels = CloneLabels(l.Labels)
	err = s.db.Update(ctx, func(tx *bolt.Tx) error {
		all, err := MakeNamespaceBucket(tx, ns, sectionLeases)
		if err != nil {
			return err
		}
		b, err := all.CreateBucket([]byte(l.ID))
		if err != nil {
			if all.Bucket([]byte(l.ID)) != nil {
				return errdefs.ErrAlreadyExists
			}
			return err
		}
		l.CreatedAt = now()
		raw, err := encode(leaseRecord{Created: l.CreatedAt, Labels: l.Labels})
		if err != nil {
			return err
		}
		return b.Put(keyLeaseInfo, raw)
	})
	if err != nil {
		return leases.Lease{}, wrap(err, "create lease %q", l.ID)
	}
	return l, nil
}

func (s *leaseManager) Delete(ctx context.Context, l leases.Lease, opts ...leases.DeleteOpt) error {
	ns, err := Namespace(ctx)
	if err != nil {
		return err
	}
	var o leases.DeleteOptions
	for _, opt := range opts {
		if err := opt(ctx, &o); err != nil {
			return wrap(err, "delete lease %q", l.ID)
		}
	}
	held := false
	err = s.db.Update(ctx, func(tx *bolt.Tx) error {
		b := leaseBucket(tx, ns, l.ID)
		if b == nil {
			return errdefs.ErrNotFound
		}
		held = b.Bucket(bucketResource) != nil
		return NamespaceBucket(tx, ns, sectionLeases).DeleteBucket([]byte(l.ID))
	})
	if err != nil {
		return wrap(err, "delete lease %q", l.ID)
	}
	if o.Synchronous {
		_, err := (*Store)(s).GC(ctx)
		return wrap(err, "delete lease %q", l.ID)
	}
	if held {
		s.gc.schedule()
	}
	return nil
}

func (s *leaseManager) List(ctx context.Context, fs ...string) ([]leases.Lease, error) {
	ns, err := Namespace(ctx)
	if err != nil {
		return nil, err
	}
	filter, err := ParseFilters(fs)
	if err != nil {
		return nil, err
	}
	var list []leases.Lease
	err = s.db.View(ctx, func(tx *bolt.Tx) error {
		all := NamespaceBucket(tx, ns, sectionLeases)
		if all == nil {
			return nil
		}
		return all.ForEachBucket(func(k []byte) error {
			r, err := readLease(all.Bucket(k))
			if err != nil {
				s.log.Error("skipped a damaged lease", "namespace", ns, "lease", string(k), "error", err)
				return nil
			}
			if l := r.lease(string(k)); filter.Match(adaptLease(l)) {
				list = append(list, l)
			}
			return nil
		})
	})
	return list, wrap(err, "list leases")
}

func (s *leaseManager) AddResource(ctx context.Context, l leases.Lease, r leases.Resource) error {
	ns, err := Namespace(ctx)
	if err != nil {
		return err
	}
	err = s.db.Update(ctx, func(tx *bolt.Tx) error {
		s.touchResource(ns, r)
		return addResource(tx, ns, l.ID, r)
	})
	return wrap(err, "add %s %q to lease %q", r.Type, r.ID, l.ID)
}

// touchResource keeps a collection under way from removing what was just leased.
func (s *leaseManager) touchResource(ns string, r leases.Resource) {
	(*Store)(s).Touch(Node{Type: r.Type, Namespace: ns, ID: r.ID})
}

func (s *leaseManager) DeleteResource(ctx context.Context, l leases.Lease, r leases.Resource) error {
	ns, err := Namespace(ctx)
	if err != nil {
		return err
	}
	err = s.db.Update(ctx, func(tx *bolt.Tx) error {
		b := leaseBucket(tx, ns, l.ID)
		if b == nil {
			return errdefs.ErrNotFound
		}
		if err := validResource(r); err != nil {
			return err
		}
		if b = b.Bucket(bucketResource); b == nil {
			return nil
		}
		return b.Delete(resourceKey(r))
	})
	if err != nil {
		return wrap(err, "remove %s %q from lease %q", r.Type, r.ID, l.ID)
	}
	s.gc.schedule()
	return nil
}

func (s *leaseManager) ListResources(ctx context.Context, l leases.Lease) ([]leases.Resource, error) {
	ns, err := Namespace(ctx)
	if err != nil {
		return nil, err
	}
	var list []leases.Resource
	err = s.db.View(ctx, func(tx *bolt.Tx) error {
		b := leaseBucket(tx, ns, l.ID)
		if b == nil {
			return errdefs.ErrNotFound
		}
		list = leaseResources(b)
		return nil
	})
	return list, wrap(err, "list resources of lease %q", l.ID)
}

// LeaseResource adds an object that is being made to the lease of ctx, if it has
// one. A lease that does not exist is errdefs.ErrNotFound: its object would be lost.
func LeaseResource(ctx context.Context, tx *bolt.Tx, typ, id string) error {
	lid, ok := leases.FromContext(ctx)
	if !ok || lid == "" {
		return nil
	}
	ns, err := Namespace(ctx)
	if err != nil {
		return err
	}
	return wrap(addResource(tx, ns, lid, leases.Resource{ID: id, Type: typ}), "lease %q", lid)
}

// UnleaseResource takes an object that goes away from the lease of ctx, if it has one.
func UnleaseResource(ctx context.Context, tx *bolt.Tx, typ, id string) error {
	lid, ok := leases.FromContext(ctx)
	if !ok || lid == "" {
		return nil
	}
	ns, err := Namespace(ctx)
	if err != nil {
		return err
	}
	b := leaseBucket(tx, ns, lid)
	if b == nil {
		return nil
	}
	if b = b.Bucket(bucketResource); b == nil {
		return nil
	}
	return b.Delete(resourceKey(leases.Resource{ID: id, Type: typ}))
}

func leaseBucket(tx *bolt.Tx, ns, id string) *bolt.Bucket {
	all := NamespaceBucket(tx, ns, sectionLeases)
	if all == nil || id == "" {
		return nil
	}
	return all.Bucket([]byte(id))
}

func addResource(tx *bolt.Tx, ns, lease string, r leases.Resource) error {
	b := leaseBucket(tx, ns, lease)
	if b == nil {
		return errdefs.ErrNotFound
	}
	if err := validResource(r); err != nil {
		return err
	}
	b, err := b.CreateBucketIfNotExists(bucketResource)
	if err != nil {
		return err
	}
	key := resourceKey(r)
	if b.Get(key) != nil {
		return nil
	}
	return b.Put(key, []byte{})
}

func validResource(r leases.Resource) error {
	if r.ID == "" || len(r.ID) > maxKey {
		return fmt.Errorf("resource needs an id of 1 to %d bytes: %w", maxKey, errdefs.ErrInvalidArgument)
	}
	switch name, isSnapshot := strings.CutPrefix(r.Type, resourceSnapshots); {
	case isSnapshot && name != "" && !strings.Contains(name, "\x00") && len(name) < 256:
		return nil
	case r.Type == resourceContent:
		if err := digest.Digest(r.ID).Validate(); err != nil {
			return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
		return nil
	case r.Type == resourceIngests, r.Type == resourceImages:
		return nil
	}
	if strings.TrimSuffix(r.Type, "/") == strings.TrimSuffix(resourceSnapshots, "/") {
		return fmt.Errorf("resource type %q names no snapshotter: %w", r.Type, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("resource type %q: %w", r.Type, errdefs.ErrNotImplemented)
}

// resourceKey is TYPE, a zero byte, ID: types hold no zero byte.
func resourceKey(r leases.Resource) []byte { return []byte(r.Type + "\x00" + r.ID) }

func leaseResources(b *bolt.Bucket) (list []leases.Resource) {
	if b = b.Bucket(bucketResource); b == nil {
		return nil
	}
	c := b.Cursor()
	for k, _ := c.First(); k != nil; k, _ = c.Next() {
		if typ, id, ok := strings.Cut(string(k), "\x00"); ok {
			list = append(list, leases.Resource{ID: id, Type: typ})
		}
	}
	return list
}

func readLease(b *bolt.Bucket) (r leaseRecord, err error) {
	if b == nil {
		return r, errdefs.ErrNotFound
	}
	raw := b.Get(keyLeaseInfo)
	if raw == nil {
		return r, errors.Join(errors.New("lease without record"), errdefs.ErrDataLoss)
	}
	return r, decode(raw, &r)
}

// expired tells whether a lease is over. A time that cannot be read never is: what
// somebody wanted to keep is kept.
func (r leaseRecord) expired(at time.Time) bool { return expired(r.Labels, at) }

func expired(labels map[string]string, at time.Time) bool {
	v, ok := labels[labelExpire]
	if !ok {
		return false
	}
	t, err := time.Parse(time.RFC3339, v)
	return err == nil && at.After(t)
}

func leaseOf(ctx context.Context) (string, bool) {
	id, ok := leases.FromContext(ctx)
	return id, ok && id != ""
}

func leaseHolds(tx *bolt.Tx, ns, lease, typ, id string) bool {
	b := leaseBucket(tx, ns, lease)
	if b == nil {
		return false
	}
	b = b.Bucket(bucketResource)
	return b != nil && b.Get(resourceKey(leases.Resource{ID: id, Type: typ})) != nil
}
