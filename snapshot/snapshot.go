// Package snapshot keeps the file systems of images and containers as layers.
//
// In flow keys, parents and labels, and, through the mounts that are handed out, the
// files of a layer; out flow mounts, changes, sizes. A committed layer's files have
// reached the disk before its name can be found. Metadata is in the store, in the
// namespace of the call; the files are in root/snapshots/N.
//
// Three drivers share all the bookkeeping: overlayfs; EROFS images below overlays, for
// kernels that have it; and plain directories ("native") that are copied, for file systems
// which overlayfs does not work on.
package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	apievents "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/hako-engine/hako/internal/keylock"
	"github.com/hako-engine/hako/store"
)

// Snapshotter implements containerd's snapshots.Snapshotter and snapshots.Cleaner,
// and supports commits with snapshots.WithParent (snapshots.RebaseCap). All methods
// may be called concurrently.
type Snapshotter struct {
	name   string
	root   string
	store  *store.Store
	driver driver
	log    *slog.Logger
	// mapsIDs tells that the ids of a snapshot's lower layers may be mapped.
	mapsIDs bool

	nextID  atomic.Uint64
	syncs   store.Coalescer
	commits keylock.Locks // by layer: one at a time gives it its form

	mu      sync.Mutex
	fresh   map[uint64]bool // directories whose record is not written yet
	doomed  []uint64        // directories to remove
	closed  bool
	wake    chan struct{}
	removed chan struct{} // closed when the remover has ended
	// removing is held while directories are removed; taken before mu.
	removing sync.Mutex
	resting  *time.Timer // guarded by mu: runs until unused layers are hidden
	// hiding is held while they are; taken before mu.
	hiding  sync.Mutex
	merging sync.WaitGroup // grows only while mu is held and closed is false
}

var (
	_ snapshots.Snapshotter = (*Snapshotter)(nil)
	_ snapshots.Cleaner     = (*Snapshotter)(nil)
	_ store.Collector       = (*collector)(nil)
)

// open is common to the drivers.
func open(name, root string, s *store.Store, d driver) (*Snapshotter, error) {
	return begin(name, root, s, d, (*Snapshotter).restore)
}

// begin opens a snapshotter; restore sees to what a crash left.
func begin(name, root string, s *store.Store, d driver, restore func(*Snapshotter) error) (*Snapshotter, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, fmt.Errorf("open snapshotter %s: %w", name, err)
	}
	sn := &Snapshotter{
		name: name, root: root, store: s, driver: d, log: s.Log(),
		fresh: map[uint64]bool{}, wake: make(chan struct{}, 1), removed: make(chan struct{}),
	}
	sn.syncs.Run = sn.syncfs
	if err := os.MkdirAll(sn.dir(), 0o700); err != nil {
		return nil, wrap(err, "open snapshotter %s", name)
	}
	if err := os.Chmod(sn.dir(), 0o700); err != nil {
		return nil, wrap(err, "open snapshotter %s", name)
	}
	if err := restore(sn); err != nil {
		return nil, wrap(err, "open snapshotter %s", name)
	}
	go sn.remover()
	sn.idle() // for what an earlier daemon left
	s.AddCollector((*collector)(sn))
	return sn, nil
}

// Name is that of the snapshotter in labels and lease resources: "overlayfs", "native".
func (sn *Snapshotter) Name() string { return sn.name }

func (sn *Snapshotter) dir() string { return filepath.Join(sn.root, "snapshots") }

func (sn *Snapshotter) layer(id uint64) layer {
	return layer(filepath.Join(sn.dir(), strconv.FormatUint(id, 10)))
}

// Stat gives a snapshot's record.
func (sn *Snapshotter) Stat(ctx context.Context, key string) (snapshots.Info, error) {
	ns, err := store.Namespace(ctx)
	if err != nil {
		return snapshots.Info{}, err
	}
	var r record
	err = sn.store.DB().View(ctx, func(tx *bolt.Tx) (err error) {
		r, err = sn.section(tx, ns).get(key)
		return err
	})
	if err != nil {
		return snapshots.Info{}, wrap(err, "snapshot %q", key)
	}
	return r.info(key), nil
}

// Update changes labels: all of them, or those that fieldpaths name.
func (sn *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (snapshots.Info, error) {
	ns, err := store.Namespace(ctx)
	if err != nil {
		return snapshots.Info{}, err
	}
	if len(fieldpaths) == 0 {
		fieldpaths = []string{"labels"}
	}
	var out snapshots.Info
	err = sn.store.DB().Update(ctx, func(tx *bolt.Tx) error {
		s := sn.section(tx, ns)
		r, err := s.get(info.Name)
		if err != nil {
			return err
		}
		for _, p := range fieldpaths {
			l, ok := store.UpdateLabels(r.Labels, info.Labels, p)
			if !ok {
				return fmt.Errorf("field %q cannot be updated: %w", p, errdefs.ErrInvalidArgument)
			}
			r.Labels = l
		}
		if err := store.ValidateLabels(r.Labels); err != nil {
			return err
		}
		r.Updated = now()
		out = r.info(info.Name)
		return s.put(info.Name, r)
	})
	if err != nil {
		return snapshots.Info{}, wrap(err, "update snapshot %q", info.Name)
	}
	return out, nil
}

// Usage is that of the snapshot without its parents: for a committed one as it was
// at the commit; an active one is measured, which takes time.
func (sn *Snapshotter) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	ns, err := store.Namespace(ctx)
	if err != nil {
		return snapshots.Usage{}, err
	}
	var r record
	err = sn.store.DB().View(ctx, func(tx *bolt.Tx) (err error) {
		r, err = sn.section(tx, ns).get(key)
		return err
	})
	if err != nil {
		return snapshots.Usage{}, wrap(err, "usage of snapshot %q", key)
	}
	if r.kind() != snapshots.KindActive {
		return snapshots.Usage{Size: r.Size, Inodes: r.Inodes}, nil
	}
	u, err := DiskUsage(ctx, sn.layer(r.ID).fs())
	return u, wrap(err, "usage of snapshot %q", key)
}

// Mounts gives the mounts of an active snapshot or view again.
func (sn *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	ns, err := store.Namespace(ctx)
	if err != nil {
		return nil, err
	}
	var r record
	var parents []layer
	err = sn.store.DB().View(ctx, func(tx *bolt.Tx) (err error) {
		s := sn.section(tx, ns)
		if r, err = s.get(key); err != nil {
			return err
		}
		if r.kind() == snapshots.KindCommitted {
			return fmt.Errorf("it is committed: %w", errdefs.ErrFailedPrecondition)
		}
		parents, err = sn.chain(s, r.Parent)
		return err
	})
	if err != nil {
		return nil, wrap(err, "mounts of snapshot %q", key)
	}
	below, release, err := sn.driver.lower(parents)
	if err != nil {
		return nil, wrap(err, "mounts of snapshot %q", key)
	}
	defer release()
	return sn.mounts(r, below), nil
}

func (sn *Snapshotter) mounts(r record, below []string) []mount.Mount {
	var own layer
	if r.ID != 0 {
		own = sn.layer(r.ID)
	}
	return mapMounts(sn.driver.mounts(own, below, r.kind() == snapshots.KindView), r.Labels)
}

// Prepare makes an active snapshot: errdefs.ErrAlreadyExists if the key is taken,
// ErrNotFound or ErrInvalidArgument for a parent that is not there or not committed.
// Garbage collection takes it only if it was made under a lease which then ended, and
// neither a label nor a store.Source names it; otherwise it stays until Remove.
func (sn *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return sn.create(ctx, snapshots.KindActive, key, parent, opts)
}

// View makes a read-only snapshot.
func (sn *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return sn.create(ctx, snapshots.KindView, key, parent, opts)
}

func (sn *Snapshotter) create(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt) (_ []mount.Mount, err error) {
	defer func() { err = wrap(err, "prepare snapshot %q", key) }()
	ns, r, err := newRecord(ctx, kind, key, parent, opts)
	if err != nil {
		return nil, err
	}
	if target := r.Labels[labelTarget]; target != "" && kind == snapshots.KindActive {
		if err := sn.refuseKnown(ctx, ns, target); err != nil {
			return nil, err
		}
	}
	mapping, _ := mappingOf(r.Labels)
	if mapping != nil && !sn.mapsIDs {
		return nil, fmt.Errorf("labels %s, %s: this snapshotter or kernel does not map ids: %w",
			snapshots.LabelSnapshotUIDMapping, snapshots.LabelSnapshotGIDMapping, errdefs.ErrNotImplemented)
	}
	var parents []layer
	// Looked at before, so that a mistake costs no directory; looked at again below.
	err = sn.store.DB().View(ctx, func(tx *bolt.Tx) (err error) {
		s := sn.section(tx, ns)
		if s.has(key) {
			return errdefs.ErrAlreadyExists
		}
		parents, err = sn.chain(s, parent)
		return err
	})
	if err != nil {
		return nil, err
	}
	below, release, err := sn.driver.lower(parents)
	if err != nil {
		return nil, err
	}
	defer release() // the record keeps them then
	if kind == snapshots.KindActive && !isUnpacking(key) {
		sn.mergeSoon(parents)
	}
	if kind == snapshots.KindActive || parent == "" {
		if r.ID, err = sn.makeLayer(ctx, below); err != nil {
			return nil, err
		}
		defer sn.settle(r.ID, &err)
		if mapping != nil {
			if err := mapping.own(sn.layer(r.ID)); err != nil {
				return nil, err
			}
		}
	}
	err = sn.store.DB().Update(ctx, func(tx *bolt.Tx) error {
		s, err := sn.makeSection(tx, ns)
		if err != nil {
			return err
		}
		if s.has(key) {
			return errdefs.ErrAlreadyExists
		}
		if _, err := sn.chain(s, parent); err != nil {
			return err
		}
		return sn.enter(ctx, tx, s, key, r)
	})
	if err != nil {
		return nil, err
	}
	sn.tellPrepared(ctx, key, parent)
	return sn.mounts(r, below), nil
}

// newRecord checks what a snapshot is to be, and makes the record of it, which is not stored yet.
func newRecord(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt) (ns string, r record, err error) {
	if ns, err = store.Namespace(ctx); err != nil {
		return "", r, err
	}
	if err := validKey(key); err != nil {
		return "", r, err
	}
	info, _, err := apply(opts)
	if err != nil {
		return "", r, err
	}
	// Nobody would keep a snapshot in use that no lease holds, so it keeps itself.
	lease, leased := leases.FromContext(ctx)
	return ns, record{Kind: kind.String(), Parent: parent, Labels: info.Labels, Held: !leased || lease == ""}, nil
}

// enter stores the record of a new snapshot, and puts it under the lease of ctx.
func (sn *Snapshotter) enter(ctx context.Context, tx *bolt.Tx, s section, key string, r record) error {
	if err := store.LeaseResource(ctx, tx, sn.resource(), key); err != nil {
		return err
	}
	r.Created = now()
	r.Updated = r.Created
	return s.add(key, r)
}

func (sn *Snapshotter) tellPrepared(ctx context.Context, key, parent string) {
	sn.store.Publish(ctx, "/snapshot/prepare", &apievents.SnapshotPrepare{Key: key, Parent: parent, Snapshotter: sn.name})
}

// labelTarget says what a snapshot that is prepared will be committed as.
const labelTarget = "containerd.io/snapshot.ref"

// refuseKnown is errdefs.ErrAlreadyExists if there is what the caller is about to unpack: it need
// not fetch it. The lease of ctx holds it from then on.
func (sn *Snapshotter) refuseKnown(ctx context.Context, ns, target string) error {
	known := func(s section) bool {
		r, err := s.get(target)
		return err == nil && r.kind() == snapshots.KindCommitted
	}
	there := false
	err := sn.store.DB().View(ctx, func(tx *bolt.Tx) error {
		there = known(sn.section(tx, ns))
		return nil
	})
	if err != nil || !there {
		return err
	}
	err = sn.store.DB().Update(ctx, func(tx *bolt.Tx) error {
		s, err := sn.makeSection(tx, ns)
		if err != nil {
			return err
		}
		if there = known(s); !there { // collected meanwhile
			return nil
		}
		sn.store.Touch(store.SnapshotNode(sn.name, ns, target))
		return store.LeaseResource(ctx, tx, sn.resource(), target)
	})
	if err != nil || !there {
		return err
	}
	return fmt.Errorf("target snapshot %q: %w", target, errdefs.ErrAlreadyExists)
}

// makeLayer makes a directory that no record names yet; settle ends this state.
func (sn *Snapshotter) makeLayer(ctx context.Context, below []string) (id uint64, err error) {
	id = sn.nextID.Add(1)
	sn.mu.Lock()
	if sn.closed {
		sn.mu.Unlock()
		return 0, fmt.Errorf("snapshotter is closed: %w", errdefs.ErrUnavailable)
	}
	sn.fresh[id] = true
	sn.mu.Unlock()
	err = sn.build(ctx, id, below)
	if err != nil {
		sn.settle(id, &err)
		return 0, err
	}
	return id, nil
}

// unborn is a directory before it gets its name.
func (sn *Snapshotter) unborn(id uint64) layer {
	return layer(filepath.Join(sn.dir(), unbornPrefix+strconv.FormatUint(id, 10)))
}

const unbornPrefix = "."

// build makes a directory. It gets its name last: after a power cut one that has it is
// whole, and one that has not is made anew. The parents are shown.
func (sn *Snapshotter) build(ctx context.Context, id uint64, below []string) error {
	if err := sn.driver.drop(sn.layer(id)); err != nil {
		return err
	}
	l := sn.unborn(id)
	if err := os.Mkdir(string(l), 0o700); err != nil {
		return err
	}
	if err := sn.driver.fill(ctx, l, below); err != nil {
		return err
	}
	if sn.driver.whole() && len(below) > 0 {
		// What is copied must last as long as the record that comes next.
		if err := sn.syncs.Do(); err != nil {
			return err
		}
	}
	return os.Rename(string(l), string(sn.layer(id)))
}

func (sn *Snapshotter) settle(id uint64, err *error) {
	sn.mu.Lock()
	delete(sn.fresh, id)
	sn.mu.Unlock()
	if *err != nil {
		sn.doom(id)
	}
}

// Commit makes an active snapshot a committed one, under name. What WithSynced and
// WithUsage save is done here otherwise: measuring the files and making them durable.
// With snapshots.WithParent a snapshot that was prepared without a parent is put
// upon one; its deletions must be there in overlayfs's form (see docs/store.md).
func (sn *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) (err error) {
	defer func() { err = wrap(err, "commit snapshot %q as %q", key, name) }()
	ns, err := store.Namespace(ctx)
	if err != nil {
		return err
	}
	if err := validKey(name); err != nil {
		return err
	}
	info, hints, err := apply(opts)
	if err != nil {
		return err
	}
	var active record
	var parents []layer
	var id uint64 // of the layer that is given its form
	check := func(s section) (err error) {
		if s.has(name) {
			return errdefs.ErrAlreadyExists
		}
		if active, err = s.get(key); err != nil {
			return err
		}
		if active.kind() != snapshots.KindActive {
			return fmt.Errorf("it is not active: %w", errdefs.ErrFailedPrecondition)
		}
		if id != 0 && active.ID != id {
			return fmt.Errorf("it was removed, and made anew meanwhile: %w", errdefs.ErrFailedPrecondition)
		}
		if info.Parent != "" && active.Parent != "" && info.Parent != active.Parent {
			return fmt.Errorf("it has parent %q already: %w", active.Parent, errdefs.ErrInvalidArgument)
		}
		if info.Parent == "" {
			info.Parent = active.Parent
		}
		parents, err = sn.chain(s, info.Parent)
		return err
	}
	if err := sn.store.DB().View(ctx, func(tx *bolt.Tx) error { return check(sn.section(tx, ns)) }); err != nil {
		return err
	}
	id = active.ID
	l := sn.layer(id)
	unlock, err := sn.commits.Lock(ctx, string(l))
	if err != nil {
		return err
	}
	defer unlock()
	// Whoever had the turn before may have committed it.
	if err := sn.store.DB().View(ctx, func(tx *bolt.Tx) error { return check(sn.section(tx, ns)) }); err != nil {
		return err
	}
	below, release, err := sn.driver.lower(parents)
	if err != nil {
		return err
	}
	defer release()
	if info.Parent != active.Parent {
		defer func() {
			if err != nil {
				err = errors.Join(err, sn.driver.reopen(l))
			}
		}()
		if err := sn.driver.rebase(ctx, l, below); err != nil {
			return err
		}
		if sn.driver.whole() {
			hints.synced, hints.usage = false, nil // the parent's files came to it
		}
	}
	done, err := sn.driver.seal(ctx, l)
	if err != nil {
		return err
	}
	hints.synced = hints.synced || done.durable
	if hints.usage == nil {
		hints.usage = done.usage
	}
	if hints.usage == nil {
		u, err := DiskUsage(ctx, l.fs())
		if err != nil {
			return err
		}
		hints.usage = &u
	}
	if !hints.synced {
		if err := sn.syncs.Do(); err != nil {
			return err
		}
	}
	err = sn.store.DB().Update(ctx, func(tx *bolt.Tx) error {
		s, err := sn.makeSection(tx, ns)
		if err != nil {
			return err
		}
		if err := check(s); err != nil {
			return err
		}
		if err := errors.Join(
			store.UnleaseResource(ctx, tx, sn.resource(), key),
			store.LeaseResource(ctx, tx, sn.resource(), name),
			s.remove(key, active),
		); err != nil {
			return err
		}
		t := now()
		return s.add(name, record{
			ID: id, Kind: snapshots.KindCommitted.String(), Parent: info.Parent, Labels: info.Labels,
			Created: t, Updated: t, Size: hints.usage.Size, Inodes: hints.usage.Inodes,
		})
	})
	if err != nil {
		return err
	}
	if err := sn.driver.tidy(l); err != nil {
		sn.log.Warn("a committed layer has leftovers", "snapshot", name, "error", err)
	}
	sn.store.Publish(ctx, "/snapshot/commit", &apievents.SnapshotCommit{Key: key, Name: name, Snapshotter: sn.name})
	return nil
}

// Remove removes a snapshot: errdefs.ErrFailedPrecondition if others build upon it.
// Its files are removed in the background; see Cleanup.
func (sn *Snapshotter) Remove(ctx context.Context, key string) (err error) {
	defer func() { err = wrap(err, "remove snapshot %q", key) }()
	ns, err := store.Namespace(ctx)
	if err != nil {
		return err
	}
	var r record
	err = sn.store.DB().Update(ctx, func(tx *bolt.Tx) (err error) {
		s := sn.section(tx, ns)
		if r, err = s.get(key); err != nil {
			return err
		}
		if s.hasChildren(key) {
			return fmt.Errorf("cannot remove snapshot with child: %w", errdefs.ErrFailedPrecondition)
		}
		if err := store.UnleaseResource(ctx, tx, sn.resource(), key); err != nil {
			return err
		}
		return s.remove(key, r)
	})
	if err != nil {
		return err
	}
	sn.doom(r.ID)
	sn.idle()
	sn.store.Publish(ctx, "/snapshot/remove", &apievents.SnapshotRemove{Key: key, Snapshotter: sn.name})
	return nil
}

// Walk calls fn for each snapshot that matches the filters. fn may use the snapshotter.
func (sn *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, fs ...string) error {
	ns, err := store.Namespace(ctx)
	if err != nil {
		return err
	}
	filter, err := store.ParseFilters(fs)
	if err != nil {
		return err
	}
	var list []snapshots.Info
	err = sn.store.DB().View(ctx, func(tx *bolt.Tx) error {
		return sn.section(tx, ns).each(func(key string, r record, err error) error {
			if err != nil {
				sn.log.Error("skipped a damaged snapshot record", "namespace", ns, "snapshot", key, "error", err)
				return nil
			}
			if info := r.info(key); filter.Match(adapt(info)) {
				list = append(list, info)
			}
			return nil
		})
	})
	if err != nil {
		return wrap(err, "walk snapshots")
	}
	for _, info := range list {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := fn(ctx, info); err != nil {
			return err
		}
	}
	return nil
}

// Sync makes what was written to any snapshot so far durable. Callers that wait at
// the same time share one syncfs(2).
func (sn *Snapshotter) Sync(context.Context) error { return wrap(sn.syncs.Do(), "sync snapshots") }

// chain gives the layers of a parent and its parents, the nearest first.
func (sn *Snapshotter) chain(s section, parent string) (list []layer, err error) {
	for parent != "" {
		r, err := s.get(parent)
		if err != nil {
			return nil, fmt.Errorf("parent %q: %w", parent, err)
		}
		if r.kind() != snapshots.KindCommitted {
			return nil, fmt.Errorf("parent %q is not committed: %w", parent, errdefs.ErrInvalidArgument)
		}
		if len(list) == maxDepth {
			return nil, fmt.Errorf("more than %d layers: %w", maxDepth, errdefs.ErrInvalidArgument)
		}
		list = append(list, sn.layer(r.ID))
		parent = r.Parent
	}
	return list, nil
}

// maxDepth is how many lower layers overlayfs can stack (OVL_MAX_STACK).
const maxDepth = 500

func (sn *Snapshotter) resource() string { return "snapshots/" + sn.name }

// hints are what a caller of Commit did already.
type hints struct {
	synced bool
	usage  *snapshots.Usage
}

// Labels that carry hints through snapshots.Opt. They are not kept.
const (
	labelSynced = "hako.snapshot.synced"
	labelUsage  = "hako.snapshot.usage"
)

// WithSynced tells Commit that the caller made the layer's files durable (Sync).
func WithSynced() snapshots.Opt {
	return snapshots.WithLabels(map[string]string{labelSynced: "1"})
}

// WithUsage tells Commit how much the layer uses, so that it need not be measured.
func WithUsage(u snapshots.Usage) snapshots.Opt {
	return snapshots.WithLabels(map[string]string{labelUsage: fmt.Sprintf("%d,%d", u.Size, u.Inodes)})
}

func apply(opts []snapshots.Opt) (info snapshots.Info, h hints, err error) {
	for _, opt := range opts {
		if err := opt(&info); err != nil {
			return info, h, err
		}
	}
	info.Labels = store.CloneLabels(info.Labels)
	h.synced = info.Labels[labelSynced] != ""
	if v, ok := info.Labels[labelUsage]; ok {
		var u snapshots.Usage
		if _, err := fmt.Sscanf(v, "%d,%d", &u.Size, &u.Inodes); err != nil || u.Size < 0 || u.Inodes < 0 {
			return info, h, fmt.Errorf("label %s=%q: %w", labelUsage, v, errdefs.ErrInvalidArgument)
		}
		h.usage = &u
	}
	delete(info.Labels, labelSynced)
	delete(info.Labels, labelUsage)
	if _, err := mappingOf(info.Labels); err != nil {
		return info, h, err
	}
	return info, h, store.ValidateLabels(info.Labels)
}

func validKey(key string) error {
	if key == "" || len(key) > 4096 {
		return fmt.Errorf("a key of 1 to 4096 bytes is needed: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

func adapt(i snapshots.Info) filters.Adaptor {
	return store.Adapt(i.Labels, func(p []string) string {
		switch p[0] {
		case "kind":
			switch i.Kind {
			case snapshots.KindActive:
				return "active"
			case snapshots.KindView:
				return "view"
			case snapshots.KindCommitted:
				return "committed"
			}
		case "name":
			return i.Name
		case "parent":
			return i.Parent
		}
		return ""
	})
}

func now() time.Time { return time.Now().UTC().Round(0) }

// wrap adds what was being done, and the class of a full disk.
func wrap(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf(format+": %w", append(args, store.Classify(err))...)
}

func exists(path string) (bool, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}
