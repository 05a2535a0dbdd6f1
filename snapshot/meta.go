package snapshot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/store"
)

// record is a snapshot's metadata; see docs/store.md.
type record struct {
	ID      uint64            `json:"id,omitempty"` // of its directory; 0: a view of its parent
	Kind    string            `json:"kind"`
	Parent  string            `json:"parent,omitempty"`
	Held    bool              `json:"held,omitempty"` // made without a lease: stays until it is removed
	Labels  map[string]string `json:"labels,omitempty"`
	Created time.Time         `json:"created"`
	Updated time.Time         `json:"updated"`
	Size    int64             `json:"size,omitempty"` // bytes; of a committed one
	Inodes  int64             `json:"inodes,omitempty"`
	Remote  string            `json:"remote,omitempty"` // its name in the program of a proxy snapshotter
}

func (r record) kind() snapshots.Kind { return snapshots.ParseKind(r.Kind) }

func (r record) info(key string) snapshots.Info {
	return snapshots.Info{Kind: r.kind(), Name: key, Parent: r.Parent, Labels: r.Labels, Created: r.Created, Updated: r.Updated}
}

func parseRecord(raw []byte) (r record, err error) {
	if err := json.Unmarshal(raw, &r); err != nil {
		return r, fmt.Errorf("damaged record: %w: %w", err, errdefs.ErrDataLoss)
	}
	if k := r.kind(); k == snapshots.KindUnknown || r.ID == 0 && (k != snapshots.KindView || r.Parent == "") {
		return r, fmt.Errorf("damaged record: %w", errdefs.ErrDataLoss)
	}
	return r, nil
}

// Buckets of a section: records by key, and PARENT, a zero byte, KEY of every
// snapshot that has a parent.
var (
	bucketKeys     = []byte("keys")
	bucketChildren = []byte("children")
)

// section is what a namespace has of a snapshotter. The zero value is empty.
type section struct {
	sn             *Snapshotter
	ns             string
	keys, children *bolt.Bucket
}

func (sn *Snapshotter) sectionName() string { return "snapshots." + sn.name }

func (sn *Snapshotter) section(tx *bolt.Tx, ns string) section {
	b := store.NamespaceBucket(tx, ns, sn.sectionName())
	if b == nil {
		return section{sn: sn, ns: ns}
	}
	return section{sn, ns, b.Bucket(bucketKeys), b.Bucket(bucketChildren)}
}

func (sn *Snapshotter) makeSection(tx *bolt.Tx, ns string) (section, error) {
	b, err := store.MakeNamespaceBucket(tx, ns, sn.sectionName())
	if err != nil {
		return section{}, err
	}
	keys, err := b.CreateBucketIfNotExists(bucketKeys)
	if err != nil {
		return section{}, err
	}
	children, err := b.CreateBucketIfNotExists(bucketChildren)
	return section{sn, ns, keys, children}, err
}

func (s section) has(key string) bool { return s.keys != nil && s.keys.Get([]byte(key)) != nil }

func (s section) get(key string) (record, error) {
	var raw []byte
	if s.keys != nil && key != "" {
		raw = s.keys.Get([]byte(key))
	}
	if raw == nil {
		return record{}, errdefs.ErrNotFound
	}
	return parseRecord(raw)
}

// put also tells a garbage collection under way that the snapshot is in use.
func (s section) put(key string, r record) error {
	raw, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	s.sn.store.Touch(store.SnapshotNode(s.sn.name, s.ns, key))
	return s.keys.Put([]byte(key), raw)
}

func (s section) add(key string, r record) error {
	if r.Parent != "" {
		if err := s.children.Put(childKey(r.Parent, key), []byte{}); err != nil {
			return err
		}
	}
	return s.put(key, r)
}

func (s section) remove(key string, r record) error {
	if r.Parent != "" {
		if err := s.children.Delete(childKey(r.Parent, key)); err != nil {
			return err
		}
	}
	return s.keys.Delete([]byte(key))
}

func (s section) hasChildren(key string) bool {
	if s.children == nil {
		return false
	}
	prefix := childKey(key, "")
	k, _ := s.children.Cursor().Seek(prefix)
	return strings.HasPrefix(string(k), string(prefix))
}

func childKey(parent, key string) []byte { return []byte(parent + "\x00" + key) }

// each calls fn with every record; err tells that one is damaged.
func (s section) each(fn func(key string, r record, err error) error) error {
	if s.keys == nil {
		return nil
	}
	return s.keys.ForEach(func(k, v []byte) error {
		r, err := parseRecord(v)
		return fn(string(k), r, err)
	})
}

// restore finds the directories that no record names, which a crash left, and makes
// those of active snapshots that a power cut took: what was in them was lost with them.
func (sn *Snapshotter) restore() error {
	last, err := sn.sweepDirs(context.Background(), true)
	if err != nil {
		return err
	}
	sn.nextID.Store(max(last, sn.nextID.Load()))
	return nil
}

// directory is what the records say about a directory.
type directory struct {
	ns string
	r  record
}

// known maps ids to what the records say. damaged tells that one could not be read:
// then no directory can be told to be an orphan.
func (sn *Snapshotter) known(tx *bolt.Tx) (ids map[uint64]directory, damaged bool, err error) {
	ids = map[uint64]directory{}
	err = store.EachNamespace(tx, func(ns string) error {
		return sn.section(tx, ns).each(func(key string, r record, err error) error {
			if err != nil {
				sn.log.Error("a snapshot's record is damaged", "namespace", ns, "snapshot", key, "error", err)
				damaged = true
				return nil
			}
			if r.ID != 0 {
				ids[r.ID] = directory{ns, r}
			}
			return nil
		})
	})
	return ids, damaged, err
}

// sweepDirs dooms orphans and gives the highest id in use. With heal it makes lost
// directories anew: only at the start, when they can be what a power cut took. Later, somebody
// else took them, and that is for a check to find.
func (sn *Snapshotter) sweepDirs(ctx context.Context, heal bool) (last uint64, err error) {
	// The directories first: one that is made later is not looked at.
	entries, err := os.ReadDir(sn.dir())
	if err != nil {
		return 0, err
	}
	sn.mu.Lock()
	present := make(map[uint64]bool, len(entries)) // and whether a record will come
	var unborn []uint64
	for _, e := range entries {
		if id, err := strconv.ParseUint(e.Name(), 10, 64); err == nil {
			present[id] = sn.fresh[id]
			last = max(last, id)
		} else if id, err := strconv.ParseUint(strings.TrimPrefix(e.Name(), unbornPrefix), 10, 64); err == nil && heal {
			unborn = append(unborn, id)
			last = max(last, id)
		}
	}
	sn.mu.Unlock()
	for _, id := range unborn { // of a process that is no more
		if err := os.RemoveAll(string(sn.unborn(id))); err != nil {
			return 0, err
		}
	}
	lost := map[uint64][]layer{}
	err = sn.store.DB().View(ctx, func(tx *bolt.Tx) error {
		ids, damaged, err := sn.known(tx)
		if err != nil {
			return err
		}
		for id, fresh := range present {
			if _, ok := ids[id]; !ok && !fresh && !damaged {
				sn.doom(id)
			}
		}
		for id, d := range ids {
			last = max(last, id)
			if _, ok := present[id]; ok || !heal || d.r.kind() == snapshots.KindCommitted {
				continue
			}
			if lost[id], err = sn.chain(sn.section(tx, d.ns), d.r.Parent); err != nil {
				sn.log.Error("a snapshot's parents are damaged", "id", id, "error", err)
				delete(lost, id)
			}
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	for id, parents := range lost {
		sn.heal(ctx, id, parents)
	}
	return last, nil
}

func (sn *Snapshotter) heal(ctx context.Context, id uint64, parents []layer) {
	below, release, err := sn.driver.lower(parents)
	if err == nil {
		err = sn.build(ctx, id, below)
		release()
	}
	sn.log.Warn("made an active snapshot's lost directory anew", "id", id, "error", err)
}

// doom has a directory removed in the background.
func (sn *Snapshotter) doom(id uint64) {
	if id == 0 {
		return
	}
	sn.mu.Lock()
	sn.doomed = append(sn.doomed, id)
	sn.mu.Unlock()
	select {
	case sn.wake <- struct{}{}:
	default:
	}
}

func (sn *Snapshotter) remover() {
	defer close(sn.removed)
	for range sn.wake {
		if err := sn.removeDoomed(); err != nil {
			sn.log.Error("remove snapshot directories", "error", err)
		}
		sn.mu.Lock()
		closed := sn.closed
		sn.mu.Unlock()
		if closed {
			return
		}
	}
}

// removeDoomed removes the directories that are due. One at a time does, so that the
// directories which another has begun with are gone as well when it returns.
func (sn *Snapshotter) removeDoomed() error {
	sn.removing.Lock()
	defer sn.removing.Unlock()
	sn.mu.Lock()
	ids := sn.doomed
	sn.doomed = nil
	sn.mu.Unlock()
	var errs []error
	for _, id := range ids {
		err := sn.driver.drop(sn.layer(id))
		if err == nil {
			err = os.RemoveAll(string(sn.layer(id)))
		}
		errs = append(errs, err, os.RemoveAll(string(sn.unborn(id))))
	}
	return errors.Join(errs...)
}

// Cleanup removes the directories of removed snapshots now, and those that a crash left.
func (sn *Snapshotter) Cleanup(ctx context.Context) error {
	_, err := sn.sweepDirs(ctx, false)
	sn.idle()
	return wrap(errors.Join(err, sn.removeDoomed()), "clean up snapshots")
}

// Close waits for removals under way. Snapshots and mounts stay.
func (sn *Snapshotter) Close() error {
	sn.mu.Lock()
	if sn.closed {
		sn.mu.Unlock()
		return nil
	}
	sn.closed = true
	sn.mu.Unlock()
	select {
	case sn.wake <- struct{}{}:
	default:
	}
	<-sn.removed
	sn.merging.Wait()
	sn.hideUnused()
	return nil
}

func (sn *Snapshotter) syncfs() error {
	d, err := os.Open(sn.dir())
	if err != nil {
		return err
	}
	defer d.Close()
	return os.NewSyscallError("syncfs", unix.Syncfs(int(d.Fd())))
}

// collector is the snapshotter as the garbage collection sees it.
type collector Snapshotter

func (c *collector) Type() string { return (*Snapshotter)(c).resource() }

func (c *collector) Nodes(tx *bolt.Tx, fn func(store.Object)) error {
	sn := (*Snapshotter)(c)
	return store.EachNamespace(tx, func(ns string) error {
		return sn.section(tx, ns).each(func(key string, r record, err error) error {
			o := sn.object(ns, key, r)
			if o.Damaged = err != nil; o.Damaged {
				sn.log.Error("a damaged record stops the collection of its namespace", "namespace", ns, "snapshot", key, "error", err)
			}
			fn(o)
			return nil
		})
	})
}

func (c *collector) Node(tx *bolt.Tx, ns, id string) (store.Object, error) {
	sn := (*Snapshotter)(c)
	r, err := sn.section(tx, ns).get(id)
	return sn.object(ns, id, r), err
}

func (sn *Snapshotter) object(ns, key string, r record) store.Object {
	o := store.Object{Node: store.SnapshotNode(sn.name, ns, key), Labels: r.Labels, Root: r.Held}
	if r.Parent != "" {
		o.Refs = []store.Node{store.SnapshotNode(sn.name, ns, r.Parent)}
	}
	return o
}

// Remove leaves the directory to Cleanup: the transaction may yet be rolled back.
func (c *collector) Remove(tx *bolt.Tx, ns, id string) (int64, error) {
	s := (*Snapshotter)(c).section(tx, ns)
	r, err := s.get(id)
	if err != nil {
		return 0, err
	}
	if s.hasChildren(id) {
		return 0, fmt.Errorf("others build upon it: %w", errdefs.ErrFailedPrecondition)
	}
	return r.Size, s.remove(id, r)
}

func (c *collector) Cleanup(ctx context.Context) error { return (*Snapshotter)(c).Cleanup(ctx) }
