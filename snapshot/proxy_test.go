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
