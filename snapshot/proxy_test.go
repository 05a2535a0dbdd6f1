package snapshot

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/hako-engine/hako/store"
)

// other is a program with a snapshotter, which can be stopped and started again.
type other struct {
	socket string
	store  *store.Store
	sn     *Snapshotter
	srv    *grpc.Server
}

func newOther(root string) (*other, error) {
	o := &other{socket: filepath.Join(root, "other.sock")}
	var err error
	if o.store, err = store.Open(filepath.Join(root, "other"), store.Options{NoBackgroundGC: true}); err != nil {
		return nil, err
	}
	if o.sn, err = NewOverlay(filepath.Join(root, "other-sn"), o.store); err != nil {
		return nil, err
	}
	return o, o.serve()
}

func (o *other) serve() error {
	l, err := net.Listen("unix", o.socket)
	if err != nil {
		return err
	}
	in := func(ctx context.Context) context.Context {
		ns, _ := namespaces.Namespace(ctx)
		return namespaces.WithNamespace(ctx, ns)
	}
	o.srv = grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
		return h(in(ctx), req)
	}))
	snapshotsapi.RegisterSnapshotsServer(o.srv, snapshotservice.FromSnapshotter(o.sn))
	go func() { _ = o.srv.Serve(l) }()
	return nil
}

func (o *other) close() error {
	o.srv.Stop()
	return errors.Join(o.sn.Close(), o.store.Close())
}

func dial(socket string) (snapshots.Snapshotter, func() error, error) {
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, err
	}
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "other"), conn.Close, nil
}

func TestProxySuite(t *testing.T) {
	needsRoot(t)
	// By the name of what stands behind it: the suite knows what an overlay cannot do.
	testsuite.SnapshotterSuite(t, "overlayfs", func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		o, err := newOther(root)
		if err != nil {
			return nil, nil, err
		}
		s, err := store.Open(root+"/store", store.Options{NoBackgroundGC: true})
		if err != nil {
			return nil, nil, err
		}
		remote, hangUp, err := dial(o.socket)
		if err != nil {
			return nil, nil, err
		}
		p := NewProxy("other", remote, s)
		return p, func() error { return errors.Join(p.Close(), hangUp(), o.close(), s.Close()) }, nil
	})
}

// TestProxyDead stops the other program: what concerns no files goes on, nothing waits, and
// what was removed meanwhile is removed there when it is back.
func TestProxyDead(t *testing.T) {
	needsRoot(t)
	root := t.TempDir()
	o, err := newOther(root)
	must(t, err)
	defer func() { must(t, o.close()) }()
	s := openStore(t, root+"/store")
	defer s.Close()
	remote, hangUp, err := dial(o.socket)
	must(t, err)
	defer hangUp()
	p := NewProxy("other", remote, s)
	defer p.Close()
	ctx := testContext()
	_, err = p.Prepare(ctx, "a", "")
	must(t, err)
	must(t, p.Commit(ctx, "c", "a"))
	for _, key := range []string{"b", "d"} { // b keeps c
		_, err = p.Prepare(ctx, key, "c")
		must(t, err)
	}

	o.srv.Stop()
	if _, err := p.Prepare(ctx, "x", "c"); !errdefs.IsUnavailable(err) {
		t.Errorf("prepare: %v", err)
	}
	if _, err := p.Mounts(ctx, "b"); !errdefs.IsUnavailable(err) {
		t.Errorf("mounts: %v", err)
	}
	if info, err := p.Stat(ctx, "b"); err != nil || info.Parent != "c" {
		t.Errorf("stat: %v %v", info, err)
	}
	must(t, p.Remove(ctx, "d"))
	if _, err := s.GC(ctx); err != nil {
		t.Error(err)
	}
	must(t, o.serve())
	count := func() (n int) {
		must(t, o.sn.Walk(ctx, func(context.Context, snapshots.Info) error { n++; return nil }))
		return n
	}
	for deadline := time.Now().Add(5 * time.Minute); count() != 2; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the other program has %d snapshots", count())
		}
		must(t, p.Cleanup(ctx))
	}
	_, err = p.Prepare(ctx, "y", "c")
	must(t, err)
}

// lazy is a snapshotter that has some layers without being given them, as stargz has.
type lazy struct {
	snapshots.Snapshotter
	has map[string]bool // by what they will be committed as
}

func (l lazy) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	var info snapshots.Info
	for _, o := range opts {
		if err := o(&info); err != nil {
			return nil, err
		}
	}
	target := info.Labels["containerd.io/snapshot.ref"]
	if !l.has[target] {
		delete(info.Labels, "containerd.io/snapshot.ref") // it is not what this one is asked
		return l.Snapshotter.Prepare(ctx, key, parent, snapshots.WithLabels(info.Labels))
	}
	if _, err := l.Snapshotter.Stat(ctx, target); errdefs.IsNotFound(err) {
		if _, err := l.Snapshotter.Prepare(ctx, key, parent); err != nil {
			return nil, err
		}
		if err := l.Commit(ctx, target, key, snapshots.WithLabels(info.Labels)); err != nil {
			return nil, err
		}
	}
	return nil, errdefs.ErrAlreadyExists
}

// everywhere has one set of names for all namespaces, as other programs have.
type everywhere struct{ snapshots.Snapshotter }

func one(ctx context.Context) context.Context { return namespaces.WithNamespace(ctx, "all") }

func (e everywhere) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return e.Snapshotter.Prepare(one(ctx), key, parent, opts...)
}
func (e everywhere) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	return e.Snapshotter.Commit(one(ctx), name, key, opts...)
}
func (e everywhere) Walk(ctx context.Context, fn snapshots.WalkFunc, fs ...string) error {
	return e.Snapshotter.Walk(one(ctx), fn, fs...)
}
func (e everywhere) Remove(ctx context.Context, key string) error {
	return e.Snapshotter.Remove(one(ctx), key)
}

// TestProxyLazy: a layer that the other program says that it has is there without anybody fetching it, for several
// namespaces, and is removed when the last one is done with it.
func TestProxyLazy(t *testing.T) {
	needsRoot(t)
	root := t.TempDir()
	far := openStore(t, root+"/far")
	defer far.Close()
	behind, err := NewOverlay(root+"/far-sn", far)
	must(t, err)
	defer behind.Close()
	s := openStore(t, root+"/store")
	defer s.Close()
	p := NewProxy("lazy", everywhere{lazy{behind, map[string]bool{"chain-1": true, "chain-2": true}}}, s)
	defer p.Close()
	target := func(name string) snapshots.Opt {
		return snapshots.WithLabels(map[string]string{"containerd.io/snapshot.ref": name})
	}
	ctx := testContext()
	other := namespaces.WithNamespace(ctx, "other")
	for _, c := range []context.Context{ctx, other, ctx} { // again: what is known is not asked for
		if _, err := p.Prepare(c, "extract-1", "", target("chain-1")); !errdefs.IsAlreadyExists(err) {
			t.Fatalf("first layer: %v", err)
		}
		if _, err := p.Prepare(c, "extract-2", "chain-1", target("chain-2")); !errdefs.IsAlreadyExists(err) {
			t.Fatalf("second layer: %v", err)
		}
	}
	if i, err := p.Stat(ctx, "chain-2"); err != nil || i.Kind != snapshots.KindCommitted || i.Parent != "chain-1" {
		t.Errorf("%+v %v", i, err)
	}
	if _, err := p.Stat(ctx, "extract-2"); !errdefs.IsNotFound(err) {
		t.Errorf("the key: %v", err)
	}
	// One that it does not have is unpacked as ever.
	if ms, err := p.Prepare(ctx, "extract-3", "chain-2", target("chain-3")); err != nil || len(ms) != 1 {
		t.Errorf("%v %v", ms, err)
	}
	must(t, p.Commit(ctx, "chain-3", "extract-3"))
	must(t, p.Remove(ctx, "chain-3"))
	count := func() (n int) {
		must(t, behind.Walk(one(ctx), func(context.Context, snapshots.Info) error { n++; return nil }))
		return n
	}
	until := func(want int) {
		t.Helper()
		for deadline := time.Now().Add(5 * time.Minute); count() != want; time.Sleep(20 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("the other program has %d snapshots, not %d", count(), want)
			}
			must(t, p.Cleanup(ctx))
		}
	}
	for _, key := range []string{"chain-2", "chain-1"} {
		must(t, p.Remove(ctx, key))
	}
	until(2) // the other namespace has them
	if _, err := p.Prepare(other, "use", "chain-2"); err != nil {
		t.Error(err)
	}
	for _, key := range []string{"use", "chain-2", "chain-1"} {
		must(t, p.Remove(other, key))
	}
	until(0)
	if _, err := p.Prepare(ctx, "extract-1", "", target("chain-1")); !errdefs.IsAlreadyExists(err) {
		t.Errorf("once more: %v", err)
	}
}
