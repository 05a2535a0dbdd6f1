package image

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/registry"
	"github.com/hako-engine/hako/image/unpack"
	"github.com/hako-engine/hako/internal/keylock"
)

// defaultNamespace is where Docker's and the kubelet's images live, if a context does
// not name another namespace.
const defaultNamespace = "k8s.io"

// leaseTime is after how long the objects of an operation that died with the daemon
// become garbage.
const leaseTime = 24 * time.Hour

const leasePrefix = "hako-image-"

// Options of New. Content, Images, Leases and Snapshotters are needed.
type Options struct {
	Content      content.Store
	Images       images.Store
	Leases       leases.Manager
	Snapshotters map[string]snapshots.Snapshotter // by name, e.g. "overlayfs"
	Default      string                           // the snapshotter where none is named
	// RegistryDir is the certs.d folder (HOST/hosts.toml); "": none.
	RegistryDir string
	UserAgent   string
	// Registry overrides timeouts and retries, for tests and special networks. Dir,
	// UserAgent and Log are taken from above.
	Registry registry.Options
	// Allow decides, when a pull has found out what it would fetch, whether it may: d is the
	// document that the name leads to, whose bytes were checked and which everything else of
	// the pull follows from. Its error ends the pull. It is also asked, with a nil repo, before
	// what did not come from a registry (loaded, imported, committed, tagged) gets a name that
	// its repository has not given it yet. nil: everything is allowed.
	Allow func(ctx context.Context, name reference.Named, d ocispec.Descriptor, repo *registry.Repository) error
	// Limits of one layer; zero fields mean the defaults.
	Limits unpack.Limits
	// Downloads is how many layers of one image are fetched side by side; 0: 5.
	Downloads int
	Log       *slog.Logger // nil: none
}

// Service works with images. It is safe for concurrent use.
type Service struct {
	o        Options
	registry *registry.Client
	layers   flights       // by namespace, snapshotter and chain id: work on one snapshot
	blobs    keylock.Locks // by namespace and digest: one fetches, the others find it there
	names    keylock.Locks // by namespace: held while image records change, from looking to writing
	commits  bell          // rings when a layer's snapshot was committed
	docs     documents
}

// New makes the service. It starts nothing.
func New(o Options) *Service {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Downloads == 0 {
		o.Downloads = 5
	}
	if o.Registry.Uploads == nil {
		o.Registry.Uploads = &registry.Uploads{}
	}
	ro := o.Registry
	ro.Dir, ro.UserAgent, ro.Log = o.RegistryDir, o.UserAgent, o.Log
	return &Service{o: o, registry: registry.New(ro)}
}

// Recover drops what operations held that died with an earlier daemon, so that it becomes
// garbage at once and not a day later. It is called when no operation runs. Interrupted
// downloads stay, and are resumed by the next pull.
func (s *Service) Recover(ctx context.Context) error {
	ctx = namespaced(ctx)
	list, err := s.o.Leases.List(ctx)
	if err != nil {
		return fmt.Errorf("recover images: %w", err)
	}
	for _, l := range list {
		if !strings.HasPrefix(l.ID, leasePrefix) {
			continue
		}
		if err := s.o.Leases.Delete(ctx, l); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("recover images: %w", err)
		}
	}
	return nil
}

func namespaced(ctx context.Context) context.Context {
	if _, ok := namespaces.Namespace(ctx); !ok {
		return namespaces.WithNamespace(ctx, defaultNamespace)
	}
	return ctx
}

func (s *Service) snapshotter(name string) (string, snapshots.Snapshotter, error) {
	if name == "" {
		name = s.o.Default
	}
	sn, ok := s.o.Snapshotters[name]
	if !ok {
		return name, nil, fmt.Errorf("snapshotter %q: %w", name, errdefs.ErrNotFound)
	}
	return name, sn, nil
}

// lease keeps what an operation made until a name refers to it. Operations that share
// work share the lease that it was done under.
type lease struct {
	s  *Service
	l  leases.Lease
	ns string

	mu   sync.Mutex
	refs int
}

// newLease makes a lease with one holder, and a context under which everything that is
// made belongs to it.
func (s *Service) newLease(ctx context.Context) (context.Context, *lease, error) {
	l, err := s.o.Leases.Create(ctx, leases.WithID(leasePrefix+rand.Text()), leases.WithExpiration(leaseTime))
	if err != nil {
		return nil, nil, fmt.Errorf("protect from garbage collection: %w", err)
	}
	ns, _ := namespaces.Namespace(ctx)
	return leases.WithLease(ctx, l.ID), &lease{s: s, l: l, ns: ns, refs: 1}, nil
}

// hold adds a holder; false if the lease is gone already.
func (l *lease) hold() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.refs == 0 {
		return false
	}
	l.refs++
	return true
}

func (l *lease) release() {
	l.mu.Lock()
	l.refs--
	last := l.refs == 0
	l.mu.Unlock()
	if !last {
		return
	}
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(context.Background(), l.ns), cleanupTime)
	defer cancel()
	if err := l.s.o.Leases.Delete(ctx, l.l); err != nil && !errdefs.IsNotFound(err) {
		l.s.o.Log.Warn("lease stays until it expires", "lease", l.l.ID, "err", err)
	}
}

// keep puts objects that are there already under the lease.
func (l *lease) keep(ctx context.Context, typ, id string) error {
	return l.s.o.Leases.AddResource(ctx, l.l, leases.Resource{Type: typ, ID: id})
}

// cleanupTime bounds what is taken back after a failure.
const cleanupTime = 30 * time.Second

// bell wakes all who wait for something to happen.
type bell struct {
	mu sync.Mutex
	ch chan struct{}
}

// next gives a channel that is closed when the bell rings next.
func (b *bell) next() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch == nil {
		b.ch = make(chan struct{})
	}
	return b.ch
}

func (b *bell) tell() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch != nil {
		close(b.ch)
		b.ch = nil
	}
}

// flights lets callers that want the same thing share the work. It goes on as long as
// one of them waits: a client that gave up and tries again joins what is under way.
type flights struct {
	mu sync.Mutex
	m  map[string]*flight
}

type flight struct {
	done   chan struct{}
	err    error
	lease  *lease
	cancel context.CancelCauseFunc

	mu      sync.Mutex
	waiters int
	next    int
	hear    map[int]func(Progress)
	last    *Progress
}

var errNobodyWaits = errors.New("given up by all who wanted it")

// do runs fn under key, or joins who does. hold gets the lease that protects the result
// of another caller's work, held on behalf of this one.
func (f *flights) do(ctx context.Context, key string, l *lease, hear func(Progress), hold func(*lease), fn func(context.Context, func(Progress)) error) error {
	for {
		f.mu.Lock()
		if f.m == nil {
			f.m = map[string]*flight{}
		}
		fl := f.m[key]
		mine := fl == nil
		if mine {
			run, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
			fl = &flight{done: make(chan struct{}), lease: l, cancel: cancel, hear: map[int]func(Progress){}}
			f.m[key] = fl
			l.hold()
			go func() {
				defer l.release()
				err := fn(run, fl.tell)
				f.mu.Lock()
				delete(f.m, key)
				f.mu.Unlock()
				fl.err = err
				close(fl.done)
				cancel(nil)
			}()
		}
		joined := fl.join(hear)
		if joined != nil && !mine && fl.lease != l && fl.lease.hold() {
			hold(fl.lease)
		}
		f.mu.Unlock()
		if joined == nil { // everybody has just given it up
			select {
			case <-fl.done:
				continue
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		select {
		case <-fl.done:
			joined()
			if !mine && errors.Is(fl.err, errNobodyWaits) && ctx.Err() == nil {
				continue
			}
			return fl.err
		case <-ctx.Done():
			joined()
			// The work must have ended before its caller goes on: it may still write.
			fl.mu.Lock()
			over := fl.waiters < 0
			fl.mu.Unlock()
			if over {
				<-fl.done
			}
			return context.Cause(ctx)
		}
	}
}

// join adds a waiter, and gives what takes it away again; nil if the flight is being
// given up.
func (fl *flight) join(hear func(Progress)) (leave func()) {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	if fl.waiters < 0 {
		return nil
	}
	fl.waiters++
	id := fl.next
	fl.next++
	if hear != nil {
		fl.hear[id] = hear
		if fl.last != nil {
			hear(*fl.last)
		}
	}
	return func() {
		fl.mu.Lock()
		defer fl.mu.Unlock()
		delete(fl.hear, id)
		if fl.waiters--; fl.waiters == 0 {
			fl.waiters = -1 << 30
			fl.cancel(errNobodyWaits)
		}
	}
}

func (fl *flight) tell(p Progress) {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	fl.last = &p
	for _, h := range fl.hear {
		h(p)
	}
}
