package chaos

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"time"

	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/leases"
	leaseproxy "github.com/containerd/containerd/v2/core/leases/proxy"
	"github.com/containerd/containerd/v2/core/snapshots"
	snapshotproxy "github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// remotes are the daemon's sockets that speak gRPC.
type remotes struct {
	once      sync.Once
	err       error
	snapshots snapshots.Snapshotter
	leases    leases.Manager
	images    runtimeapi.ImageServiceClient
}

// namespace of the snapshots that clients make through containerd's API.
const namespace = "chaos"

// rootLabel keeps a committed snapshot.
const rootLabel = "containerd.io/gc.root"

func (l *Load) remote() (*remotes, error) {
	r := &l.remotes
	r.once.Do(func() {
		dial := func(socket string) *grpc.ClientConn {
			c, err := grpc.NewClient("unix://"+filepath.Join(filepath.Dir(l.Socket), socket), grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond}}))
			r.err = errors.Join(r.err, err)
			return c
		}
		ctrd, cri := dial("containerd.sock"), dial("cri.sock")
		if r.err == nil {
			r.snapshots = snapshotproxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(ctrd), "overlayfs")
			r.leases = leaseproxy.NewLeaseManager(leasesapi.NewLeasesClient(ctrd))
			r.images = runtimeapi.NewImageServiceClient(cri)
		}
	})
	return r, r.err
}

// definite marks an error that the daemon answered with.
func definite(err error) error {
	if err != nil && !errdefs.IsUnavailable(err) && !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) && !errdefs.IsUnknown(err) {
		return fmt.Errorf("%w: %w", err, errNotDone)
	}
	return err
}

// pullCRI is pull as the kubelet does it.
func (p *player) pullCRI(ctx context.Context, name string) error {
	r, err := p.l.remote()
	if err != nil {
		return err
	}
	_, err = r.images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: name}})
	return err
}

// snapshotStep does one thing to a snapshot or a lease of this client.
func (p *player) snapshotStep(ctx context.Context) error {
	r, err := p.l.remote()
	if err != nil {
		return err
	}
	ctx = namespaces.WithNamespace(ctx, namespace)
	slot := p.rng.IntN(3)
	active, base := fmt.Sprintf("c%d-active%d", p.n, slot), fmt.Sprintf("c%d-base%d", p.n, slot)
	leased := fmt.Sprintf("c%d-leased%d", p.n, slot)
	lease := leases.Lease{ID: fmt.Sprintf("c%d-lease%d", p.n, slot)}
	switch n := p.rng.IntN(10); {
	case n < 3:
		parent := ""
		if p.rng.IntN(2) == 0 {
			parent = fmt.Sprintf("c%d-base%d", p.n, p.rng.IntN(3))
		}
		return p.do("snapshot/"+active, "active", func() error {
			_, err := r.snapshots.Prepare(ctx, active, parent)
			if errdefs.IsAlreadyExists(err) {
				err = nil
			}
			return definite(err)
		})
	case n < 5:
		// Two things change at once: neither may be half.
		return p.do("snapshot/"+base, "committed", func() error {
			return p.do("snapshot/"+active, "", func() error {
				return definite(r.snapshots.Commit(ctx, base, active, snapshots.WithLabels(map[string]string{rootLabel: "x"})))
			})
		})
	case n < 6:
		return p.do("snapshot/"+active, "", func() error { return missing(r.snapshots.Remove(ctx, active)) })
	case n < 7:
		return p.do("snapshot/"+base, "", func() error { return missing(r.snapshots.Remove(ctx, base)) })
	case n < 9:
		err := p.do("lease/"+lease.ID, "1", func() error {
			_, err := r.leases.Create(ctx, leases.WithID(lease.ID))
			if errdefs.IsAlreadyExists(err) {
				err = nil
			}
			return definite(err)
		})
		if err != nil {
			return err
		}
		return p.do(leasedKind+leased, "active", func() error {
			// One that is there already may be what an earlier lease held, and about to go.
			_, err := r.snapshots.Prepare(leases.WithLease(ctx, lease.ID), leased, "")
			return definite(err)
		})
	default:
		// What it held may go from now on, at any time.
		p.l.Journal.add(Entry{"try", p.n, leasedKind + leased, ""})
		return p.do("lease/"+lease.ID, "", func() error {
			var opts []leases.DeleteOpt
			if p.rng.IntN(2) == 0 {
				opts = append(opts, leases.SynchronousDelete)
			}
			return missing(r.leases.Delete(ctx, lease, opts...))
		})
	}
}

// missing makes "there is none" a success.
func missing(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return definite(err)
}

// remoteState adds what containerd's API tells to a state.
func (l *Load) remoteState(ctx context.Context, s State) error {
	r, err := l.remote()
	if err != nil {
		return err
	}
	ctx = namespaces.WithNamespace(ctx, namespace)
	err = r.snapshots.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		kind := "snapshot/"
		if strings.Contains(i.Name, "-leased") {
			kind = leasedKind
		}
		s[kind+i.Name] = map[snapshots.Kind]string{snapshots.KindActive: "active", snapshots.KindCommitted: "committed", snapshots.KindView: "view"}[i.Kind]
		return nil
	})
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("list snapshots: %w", err)
	}
	list, err := r.leases.List(ctx)
	if err != nil {
		return fmt.Errorf("list leases: %w", err)
	}
	for _, l := range list {
		s["lease/"+l.ID] = "1"
	}
	return nil
}
