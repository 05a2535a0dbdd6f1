package main

import (
	"context"
	"log/slog"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/hako-engine/hako/api/containerd"
	"github.com/hako-engine/hako/api/cri"
	"github.com/hako-engine/hako/api/stream"
	"github.com/hako-engine/hako/engine"
	"github.com/hako-engine/hako/image"
	"github.com/hako-engine/hako/internal/events"
	"github.com/hako-engine/hako/internal/version"
	"github.com/hako-engine/hako/snapshot/mounts"
	"github.com/hako-engine/hako/store"
)

// containerdRooms are what the containerd API shows.
type containerdRooms struct {
	store        *store.Store
	snapshotters map[string]snapshots.Snapshotter
	images       *image.Service
	engine       *engine.Engine
	bus          *events.Bus
	cri          *cri.Server // nil: not on this socket
	rules        *pullRules
	busy         func() // notes work
}

// ttrpcSocket is where shims report to; "" without the API.
func ttrpcSocket(cfg config) string {
	if cfg.ContainerdSocket == "" {
		return ""
	}
	return cfg.ContainerdSocket + ".ttrpc"
}

// mountsDir is where mounts are made ahead for clients.
func mountsDir(cfg config) string { return filepath.Join(cfg.State, "mounts") }

// clientsSnapshotter is where containerd's clients unpack to if they name none: all of them
// (ctr, nerdctl, BuildKit) go on with overlayfs by themselves then, and would unpack once more.
func clientsSnapshotter(used string, all map[string]snapshots.Snapshotter) string {
	if all["overlayfs"] != nil {
		return "overlayfs"
	}
	return used
}

// gone tells that an object which keeps mounts is not there: for a container neither it nor its task.
func (r containerdRooms) gone(ctx context.Context, n store.Node) bool {
	if n.Type != store.ContainerNode("", "").Type {
		found, err := r.store.Exists(ctx, n)
		return err == nil && !found
	}
	if _, err := r.engine.ContainerStore().Get(ctx, n.ID); !errdefs.IsNotFound(err) {
		return false
	}
	_, err := r.engine.Task(ctx, n.ID, "")
	return errdefs.IsNotFound(err)
}

// serveContainerd adds the containerd API, for clients and for shims, to what runs until ctx ends.
func serveContainerd(ctx context.Context, g *errgroup.Group, cfg config, r containerdRooms, log *slog.Logger) error {
	info, err := r.engine.Info(ctx)
	if err != nil {
		return err
	}
	o := containerd.Options{
		Content: r.store.Content(), Images: r.rules.guard(r.store.Images()), Leases: r.store.Leases(), Namespaces: r.store.Namespaces(),
		Snapshotters: r.snapshotters, DefaultSnapshotter: clientsSnapshotter(cfg.Snapshotter, r.snapshotters), Bus: r.bus,
		Differ: r.images, Transfer: r.images, Backend: r.engine, Version: version.Version, Revision: version.Revision(), UUID: info.ID, Log: log,
		RuntimeInfo: r.engine.RuntimeInfo, Called: r.busy,
		Plugins: []containerd.Plugin{{Type: "io.containerd.monitor.container.v1", ID: "restart", Capabilities: engine.RestartPolicies()}},
	}
	made, err := mounts.New(mounts.Options{Dir: mountsDir(cfg), Log: log, LeaseGone: func(ctx context.Context, id string) bool {
		_, err := r.store.Leases().ListResources(ctx, leases.Lease{ID: id})
		return errdefs.IsNotFound(err)
	}, KeeperGone: r.gone})
	if err != nil {
		return err
	}
	o.Mounts = made
	r.store.AfterGC(made.Sweep)
	if r.cri != nil {
		o.Guests = append(o.Guests, func(reg grpc.ServiceRegistrar) { r.cri.Register(reg) })
	}
	srv, err := containerd.New(o)
	if err != nil {
		return err
	}
	l, err := stream.Listen(cfg.ContainerdSocket, cfg.SocketGroup)
	if err != nil {
		return err
	}
	shims, err := stream.Listen(ttrpcSocket(cfg), cfg.SocketGroup)
	if err != nil {
		l.Close()
		return err
	}
	g.Go(func() error { return srv.Serve(l) })
	g.Go(func() error { return srv.ServeTTRPC(shims) })
	g.Go(func() error {
		<-ctx.Done()
		limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownLimit)
		defer cancel()
		srv.Shutdown(limit)
		return nil
	})
	return nil
}
