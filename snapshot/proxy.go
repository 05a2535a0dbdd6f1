package snapshot

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"time"

	apievents "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/hako-engine/hako/store"
)

// Proxy is a snapshotter of another program. The records are in hako's store, as those of its own
// snapshotters are: names, parents, labels, leases and garbage collection work without the
// program. Only what concerns files asks it, and nothing is locked meanwhile: one that is
// dead or hangs keeps nobody waiting but those who want its files.
type Proxy struct {
	meta   *Snapshotter // the records; it has no files
	remote snapshots.Snapshotter

	mu     sync.Mutex
	fresh  map[string]bool // names in the other program that no record has yet
	closed bool

	// targets is held for reading from where the other program says that it has a layer until a record
	// says so, and for writing while it removes one that it named itself.
	targets sync.RWMutex
	wake    chan struct{}
	done    chan struct{}
	stop    context.CancelFunc
}

var (
	_ snapshots.Snapshotter = (*Proxy)(nil)
	_ snapshots.Cleaner     = (*Proxy)(nil)
)

const (
	// proxyLimit is how long the other program may take to tell something, workLimit to do
	// something: it may have to fetch a layer.
	proxyLimit = 20 * time.Second
	workLimit  = 10 * time.Minute
)

// bucketDoomed holds the names in the other program that it has to remove, or had to if hako
// ended at the wrong moment.
var bucketDoomed = []byte("doomed")

// NewProxy opens a snapshotter whose files are kept by remote, under a name of its own.
func NewProxy(name string, remote snapshots.Snapshotter, s *store.Store) *Proxy {
	ctx, cancel := context.WithCancel(context.Background())
	p := &Proxy{
		meta: &Snapshotter{name: name, store: s, log: s.Log()}, remote: remote, fresh: map[string]bool{},
		wake: make(chan struct{}, 1), done: make(chan struct{}), stop: cancel,
	}
	s.AddCollector((*proxyCollector)(p))
	go p.remover(ctx)
	p.nudge()
	return p
}

// Name is that of the snapshotter in labels and lease resources.
func (p *Proxy) Name() string { return p.meta.name }

// Stat gives a snapshot's record.
func (p *Proxy) Stat(ctx context.Context, key string) (snapshots.Info, error) {
	return p.meta.Stat(ctx, key)
}

// Update changes labels.
func (p *Proxy) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (snapshots.Info, error) {
	return p.meta.Update(ctx, info, fieldpaths...)
}

// Walk calls fn for each snapshot that matches the filters.
func (p *Proxy) Walk(ctx context.Context, fn snapshots.WalkFunc, fs ...string) error {
	return p.meta.Walk(ctx, fn, fs...)
}

// get reads a record.
func (p *Proxy) get(ctx context.Context, key string) (ns string, r record, err error) {
	if ns, err = store.Namespace(ctx); err != nil {
		return "", r, err
	}
	err = p.meta.store.DB().View(ctx, func(tx *bolt.Tx) (err error) {
		r, err = p.meta.section(tx, ns).get(key)
		return err
	})
	return ns, r, err
}

// Usage asks the other program.
func (p *Proxy) Usage(ctx context.Context, key string) (u snapshots.Usage, err error) {
	defer func() { err = wrap(err, "usage of snapshot %q", key) }()
	ns, r, err := p.get(ctx, key)
	if err != nil {
		return u, err
	}
	ctx, cancel := p.call(ctx, ns, proxyLimit)
	defer cancel()
	return p.remote.Usage(ctx, r.Remote)
}

// call bounds the time of a call to the other program.
func (p *Proxy) call(ctx context.Context, ns string, limit time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(namespaces.WithNamespace(ctx, ns), limit)
}

// Mounts asks the other program.
func (p *Proxy) Mounts(ctx context.Context, key string) (_ []mount.Mount, err error) {
	defer func() { err = wrap(err, "mounts of snapshot %q", key) }()
	ns, r, err := p.get(ctx, key)
	if err != nil {
		return nil, err
	}
	if r.kind() == snapshots.KindCommitted {
		return nil, fmt.Errorf("it is committed: %w", errdefs.ErrFailedPrecondition)
	}
	ctx, cancel := p.call(ctx, ns, proxyLimit)
	defer cancel()
	return p.remote.Mounts(ctx, r.Remote)
}

// Prepare makes an active snapshot.
func (p *Proxy) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return p.create(ctx, snapshots.KindActive, key, parent, opts)
}

// View makes a read-only snapshot.
func (p *Proxy) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return p.create(ctx, snapshots.KindView, key, parent, opts)
}

func (p *Proxy) create(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt) (_ []mount.Mount, err error) {
	defer func() { err = wrap(err, "prepare snapshot %q", key) }()
	ns, r, err := newRecord(ctx, kind, key, parent, opts)
	if err != nil {
		return nil, err
	}
	r.ID, r.Remote = 1, remoteName(ns, key)
	target := r.Labels[labelTarget]
	if kind != snapshots.KindActive {
		target = ""
	}
	if target != "" {
		if err := validKey(target); err != nil {
			return nil, err
		}
		if err := p.meta.refuseKnown(ctx, ns, target); err != nil {
			return nil, err
		}
		p.targets.RLock()
		defer func() {
			p.targets.RUnlock()
			p.nudge()
		}()
	}
	var below string
	check := func(s section) error {
		if s.has(key) {
			return errdefs.ErrAlreadyExists
		}
		if parent == "" {
			return nil
		}
		up, err := s.get(parent)
		if err == nil && up.kind() != snapshots.KindCommitted {
			err = fmt.Errorf("it is not committed: %w", errdefs.ErrInvalidArgument)
		}
		if err != nil {
			return fmt.Errorf("parent %q: %w", parent, err)
		}
		below = up.Remote
		return nil
	}
	settle, err := p.announce(ctx, ns, r.Remote, check)
	if err != nil {
		return nil, err
	}
	defer settle()
	call, cancel := p.call(ctx, ns, workLimit)
	defer cancel()
	prepare := p.remote.Prepare
	if kind == snapshots.KindView {
		prepare = p.remote.View
	}
	mounts, err := prepare(call, r.Remote, below, snapshots.WithLabels(maps.Clone(r.Labels)))
	if target != "" && errdefs.IsAlreadyExists(err) {
		return nil, p.adopt(call, ns, target, below, r)
	}
	if err != nil {
		return nil, err
	}
	err = p.meta.store.DB().Update(ctx, func(tx *bolt.Tx) error {
		s, err := p.meta.makeSection(tx, ns)
		if err != nil {
			return err
		}
		if err := check(s); err != nil {
			return err
		}
		return errors.Join(p.spare(tx, ns, r.Remote), p.meta.enter(ctx, tx, s, key, r))
	})
	if err != nil {
		return nil, err
	}
	p.meta.tellPrepared(ctx, key, parent)
	return mounts, nil
}

// adopt makes a record of a layer that the other program has without being given its files: it fetches them when
// they are used. The error is errdefs.ErrAlreadyExists then, as clients expect.
func (p *Proxy) adopt(ctx context.Context, ns, target, below string, r record) error {
	var found *snapshots.Info
	err := p.remote.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		if i.Kind == snapshots.KindCommitted && i.Parent == below && i.Labels[labelTarget] == target && (found == nil || i.Created.After(found.Created)) {
			found = &i
		}
		return nil
	}, fmt.Sprintf("labels.%q==%q", labelTarget, target))
	if err != nil {
		return fmt.Errorf("look for layer %q: %w", target, err)
	}
	if found == nil || validKey(found.Name) != nil {
		return fmt.Errorf("the snapshotter has layer %q, but does not show it: %w", target, errdefs.ErrUnavailable)
	}
	r.Kind, r.Remote, r.Held = snapshots.KindCommitted.String(), found.Name, false
	made := false
	err = p.meta.store.DB().Update(ctx, func(tx *bolt.Tx) error {
		s, err := p.meta.makeSection(tx, ns)
		if err != nil {
			return err
		}
		if made = !s.has(target); !made {
			return store.LeaseResource(ctx, tx, p.meta.resource(), target)
		}
		if r.Parent != "" {
			if up, err := s.get(r.Parent); err != nil || up.Remote != below {
				return errors.Join(fmt.Errorf("parent %q was removed meanwhile: %w", r.Parent, errdefs.ErrNotFound), err)
			}
		}
		// Another namespace may have let go of it.
		err = store.EachNamespace(tx, func(n string) error { return p.spare(tx, n, found.Name) })
		return errors.Join(err, p.meta.enter(ctx, tx, s, target, r))
	})
	if err != nil {
		return err
	}
	if made {
		p.meta.store.Publish(ctx, "/snapshot/commit", &apievents.SnapshotCommit{Key: target, Name: target, Snapshotter: p.meta.name})
	}
	return fmt.Errorf("layer %q: %w", target, errdefs.ErrAlreadyExists)
}

// adopted tells whether the other program named a snapshot itself: then several namespaces may have it.
func adopted(remote string) bool { return !strings.HasPrefix(remote, ownNames) }

// ownNames is what names begin with that are given here.
const ownNames = "hako/"

// remoteName is what a snapshot is called in the other program, which may have other masters.
func remoteName(ns, key string) string { return ownNames + ns + "/" + rand.Text() + "/" + key }

// announce notes, before the other program makes something, that it is to be removed unless a
// record names it in the end. settle must be called when that is decided.
func (p *Proxy) announce(ctx context.Context, ns, remote string, check func(section) error) (settle func(), err error) {
	p.mu.Lock()
	p.fresh[remote] = true
	p.mu.Unlock()
	settle = func() {
		p.mu.Lock()
		delete(p.fresh, remote)
		p.mu.Unlock()
		p.nudge()
	}
	err = p.meta.store.DB().Update(ctx, func(tx *bolt.Tx) error {
		s, err := p.meta.makeSection(tx, ns)
		if err != nil {
			return err
		}
		if err := check(s); err != nil {
			return err
		}
		return p.condemn(tx, ns, remote)
	})
	if err != nil {
		settle()
		return nil, err
	}
	return settle, nil
}

func (p *Proxy) condemn(tx *bolt.Tx, ns, remote string) error {
	b, err := store.MakeNamespaceBucket(tx, ns, p.meta.sectionName())
	if err != nil {
		return err
	}
	doomed, err := b.CreateBucketIfNotExists(bucketDoomed)
	if err != nil {
		return err
	}
	return doomed.Put([]byte(remote), []byte{})
}

func (p *Proxy) spare(tx *bolt.Tx, ns, remote string) error {
	if b := store.NamespaceBucket(tx, ns, p.meta.sectionName()); b != nil && b.Bucket(bucketDoomed) != nil {
		return b.Bucket(bucketDoomed).Delete([]byte(remote))
	}
	return nil
}

// Commit makes an active snapshot a committed one.
func (p *Proxy) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) (err error) {
	defer func() { err = wrap(err, "commit snapshot %q as %q", key, name) }()
	if err := validKey(name); err != nil {
		return err
	}
	info, _, err := apply(opts)
	if err != nil {
		return err
	}
	var active record
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
		if info.Parent != "" && info.Parent != active.Parent {
			return fmt.Errorf("its parent is %q and stays it: %w", active.Parent, errdefs.ErrNotImplemented)
		}
		return nil
	}
	ns, err := store.Namespace(ctx)
	if err != nil {
		return err
	}
	remote := remoteName(ns, name)
	settle, err := p.announce(ctx, ns, remote, check)
	if err != nil {
		return err
	}
	defer settle()
	call, cancel := p.call(ctx, ns, workLimit)
	defer cancel()
	if err := p.remote.Commit(call, remote, active.Remote, snapshots.WithLabels(maps.Clone(info.Labels))); err != nil {
		return err
	}
	err = p.meta.store.DB().Update(ctx, func(tx *bolt.Tx) error {
		s, err := p.meta.makeSection(tx, ns)
		if err != nil {
			return err
		}
		if err := check(s); err != nil {
			return err
		}
		t := now()
		return errors.Join(
			store.UnleaseResource(ctx, tx, p.meta.resource(), key),
			store.LeaseResource(ctx, tx, p.meta.resource(), name),
			s.remove(key, active), p.spare(tx, ns, remote),
			s.add(name, record{ID: 1, Kind: snapshots.KindCommitted.String(), Parent: active.Parent, Labels: info.Labels, Created: t, Updated: t, Remote: remote}),
		)
	})
	if err != nil {
		return err
	}
	p.meta.store.Publish(ctx, "/snapshot/commit", &apievents.SnapshotCommit{Key: key, Name: name, Snapshotter: p.meta.name})
	return nil
}

// Remove removes a snapshot; the other program does so in the background.
func (p *Proxy) Remove(ctx context.Context, key string) (err error) {
	defer func() { err = wrap(err, "remove snapshot %q", key) }()
	ns, err := store.Namespace(ctx)
	if err != nil {
		return err
	}
	err = p.meta.store.DB().Update(ctx, func(tx *bolt.Tx) error {
		if _, err := p.remove(tx, ns, key); err != nil {
			return err
		}
		return store.UnleaseResource(ctx, tx, p.meta.resource(), key)
	})
	if err != nil {
		return err
	}
	p.nudge()
	p.meta.store.Publish(ctx, "/snapshot/remove", &apievents.SnapshotRemove{Key: key, Snapshotter: p.meta.name})
	return nil
}

func (p *Proxy) remove(tx *bolt.Tx, ns, key string) (record, error) {
	s := p.meta.section(tx, ns)
	r, err := s.get(key)
	if err != nil {
		return r, err
	}
	if s.hasChildren(key) {
		return r, fmt.Errorf("others build upon it: %w", errdefs.ErrFailedPrecondition)
	}
	if err := s.remove(key, r); err != nil {
		return r, err
	}
	if used, err := p.used(tx, r.Remote); used || err != nil {
		return r, err
	}
	return r, p.condemn(tx, ns, r.Remote)
}

// used tells whether a record of any namespace has a snapshot that the other program named.
func (p *Proxy) used(tx *bolt.Tx, remote string) (used bool, err error) {
	if !adopted(remote) {
		return false, nil
	}
	err = store.EachNamespace(tx, func(ns string) error {
		return p.meta.section(tx, ns).each(func(_ string, r record, err error) error {
			used = used || err == nil && r.Remote == remote
			return nil
		})
	})
	return used, err
}

// Cleanup has the other program remove what is due, without waiting for it.
func (p *Proxy) Cleanup(context.Context) error {
	p.nudge()
	return nil
}

// Close ends what is done in the background.
func (p *Proxy) Close() error {
	p.mu.Lock()
	closed := p.closed
	p.closed = true
	p.mu.Unlock()
	if !closed {
		p.stop()
		<-p.done
	}
	return nil
}

func (p *Proxy) nudge() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// retryTime is when a program that failed is asked again.
const retryTime = time.Minute

func (p *Proxy) remover(ctx context.Context) {
	defer close(p.done)
	var again <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
		case <-again:
		}
		again = nil
		if err := p.removeDoomed(ctx); err != nil && ctx.Err() == nil {
			p.meta.log.Warn("a proxy snapshotter does not remove snapshots; it is asked again", "snapshotter", p.meta.name, "error", err)
			again = time.After(retryTime)
		}
	}
}

// removeDoomed removes what is due, the top layers first: those that others stand on
// are tried again as long as something goes.
func (p *Proxy) removeDoomed(ctx context.Context) error {
	for {
		due := map[string][]string{}
		err := p.meta.store.DB().View(ctx, func(tx *bolt.Tx) error {
			return store.EachNamespace(tx, func(ns string) error {
				b := store.NamespaceBucket(tx, ns, p.meta.sectionName())
				if b == nil || b.Bucket(bucketDoomed) == nil {
					return nil
				}
				p.mu.Lock()
				defer p.mu.Unlock()
				return b.Bucket(bucketDoomed).ForEach(func(k, _ []byte) error {
					if !p.fresh[string(k)] {
						due[ns] = append(due[ns], string(k))
					}
					return nil
				})
			})
		})
		if err != nil {
			return err
		}
		var errs []error
		gone := 0
		for ns, names := range due {
			for _, name := range names {
				err := p.removeRemote(ctx, ns, name)
				if err == nil {
					gone++
					continue
				}
				if errors.Is(err, errBusy) {
					continue
				}
				errs = append(errs, err)
				if !errdefs.IsFailedPrecondition(err) {
					return err // it does not work now; do not wait for each
				}
			}
		}
		if gone == 0 || len(errs) == 0 {
			return errors.Join(errs...)
		}
	}
}

// errBusy is of a snapshot that somebody may be getting just now; who is ready nudges.
var errBusy = errors.New("busy")

func (p *Proxy) removeRemote(ctx context.Context, ns, name string) error {
	call, cancel := p.call(ctx, ns, proxyLimit)
	defer cancel()
	if adopted(name) {
		if !p.targets.TryLock() {
			return errBusy
		}
		defer p.targets.Unlock()
		used := false
		err := p.meta.store.DB().View(ctx, func(tx *bolt.Tx) (err error) {
			used, err = p.used(tx, name)
			return err
		})
		if err != nil {
			return err
		}
		if used {
			return p.meta.store.DB().Update(ctx, func(tx *bolt.Tx) error { return p.spare(tx, ns, name) })
		}
	}
	if err := p.remote.Remove(call, name); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return p.meta.store.DB().Update(ctx, func(tx *bolt.Tx) error { return p.spare(tx, ns, name) })
}

// proxyCollector is the proxy as the garbage collection sees it.
type proxyCollector Proxy

func (c *proxyCollector) Type() string { return c.meta.resource() }

func (c *proxyCollector) Nodes(tx *bolt.Tx, fn func(store.Object)) error {
	return (*collector)(c.meta).Nodes(tx, fn)
}

func (c *proxyCollector) Node(tx *bolt.Tx, ns, id string) (store.Object, error) {
	return (*collector)(c.meta).Node(tx, ns, id)
}

func (c *proxyCollector) Remove(tx *bolt.Tx, ns, id string) (int64, error) {
	r, err := (*Proxy)(c).remove(tx, ns, id)
	return r.Size, err
}

func (c *proxyCollector) Cleanup(ctx context.Context) error { return (*Proxy)(c).Cleanup(ctx) }
