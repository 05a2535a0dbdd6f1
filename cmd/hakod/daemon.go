package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/hako-engine/hako/api/cri"
	"github.com/hako-engine/hako/api/docker"
	"github.com/hako-engine/hako/api/stream"
	"github.com/hako-engine/hako/engine"
	"github.com/hako-engine/hako/image"
	"github.com/hako-engine/hako/image/registry"
	"github.com/hako-engine/hako/internal/events"
	"github.com/hako-engine/hako/internal/version"
	"github.com/hako-engine/hako/network"
	"github.com/hako-engine/hako/shim/client"
	"github.com/hako-engine/hako/store"
)

// shutdownLimit is how long requests under way may take after SIGTERM.
const shutdownLimit = 5 * time.Second

// serve runs the daemon until ctx ends. This is where everything is wired: the rooms
// from the bottom up, then the front-ends.
func serve(ctx context.Context, cfg config, r *reloader, log *slog.Logger) (err error) {
	if cfg.DebugSocket != "" {
		runtime.MemProfileRate = profileMemory
	}
	unlock, err := lock(cfg)
	if err != nil {
		return err
	}
	defer unlock()
	if err := enterCgroup(cfg.CgroupPath); err != nil {
		return err
	}

	bus := &events.Bus{}
	st, err := store.Open(cfg.Root, store.Options{Log: log, Events: bus})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	roots := &engineRoots{}
	st.AddSource(roots)
	sns, err := openSnapshotters(cfg, st, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sns.close()) }()
	snapshotters := sns.byName
	cfg.Snapshotter = sns.used
	pullTimeout, _ := time.ParseDuration(cfg.PullTimeout) // checked by complete
	restartInterval, _ := time.ParseDuration(cfg.RestartInterval)
	rules, err := newPullRules(cfg, log)
	if err != nil {
		return err
	}
	images := image.New(image.Options{
		Allow:   rules.allow,
		Content: st.Content(), Images: st.Images(), Leases: st.Leases(), Snapshotters: snapshotters, Default: cfg.Snapshotter,
		RegistryDir: cfg.RegistryDir, UserAgent: "hako/" + version.Version, Log: log,
		Registry: registry.Options{Timeout: pullTimeout},
	})
	// What pulls of a daemon that was killed held on to; they are resumed, not kept.
	all, err := st.Namespaces().List(ctx)
	for _, ns := range all {
		err = errors.Join(err, images.Recover(namespaces.WithNamespace(ctx, ns)))
	}
	if err != nil {
		log.Warn("release what interrupted pulls left", "error", err)
	}
	nets, err := openNetwork(ctx, cfg, st, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, nets.Close()) }()
	if cfg.InitBinary == "" {
		if cfg.InitBinary, err = ownInit(cfg.Root, cfg.ShimBinary); err != nil {
			log.Warn("no init for containers that ask for one with --init", "error", err)
		}
	}
	observers, err := newObservers(ctx, cfg, log)
	if err != nil {
		return err
	}
	defer observers.close()
	pods, err := openPods(ctx, cfg, log)
	if err != nil {
		return err
	}
	var podNetwork engine.PodNetwork
	if pods != nil {
		defer func() { err = errors.Join(err, pods.Close()) }()
		podNetwork = cniPods{pods}
	}
	plugins, hooks, err := openPlugins(cfg, log)
	if err != nil {
		return err
	}
	eng, err := engine.New(ctx, engine.Options{
		Root: cfg.Root, State: cfg.State,
		Containers: st.Records("containers"), Volumes: st.Records("volumes"), Settings: st.Records("settings"),
		Sandboxes: st.Records("sandboxes"),
		Images:    images, Networks: nets, PodNetwork: podNetwork, Hooks: hooks, Shims: shims{}, TaskShims: taskShims{},
		ContainerNamespaces: st.Namespaces().List, RestartInterval: restartInterval,
		ContainerRecords: st.Containers(), SandboxRecords: st.Sandboxes(), Content: st.Content(), Publisher: bus, GRPCAddress: cfg.ContainerdSocket, TTRPCAddress: ttrpcSocket(cfg),
		Snapshotters: snapshotters, Snapshotter: cfg.Snapshotter, CgroupDriver: cfg.CgroupDriver,
		ShimBinary: cfg.ShimBinary, InitBinary: cfg.InitBinary, Runtimes: cfg.Runtimes,
		CDISpecDirs: filepath.SplitList(cfg.CDISpecDirs), RestoreCheckpoints: cfg.Restore,
		Checked: checked(st, images, snapshotters, newCheckedNetworks(cfg, st, false)), Garbage: st,
		Version: version.Version, RegistryDir: cfg.RegistryDir, Pulled: observers.pulled(), Log: log,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, eng.Close()) }()
	roots.engine.Store(eng)
	st.ScheduleGC() // of what a daemon that was killed left unfinished
	if plugins != nil {
		// Before any request: the plugins that are started here miss nothing.
		if err := plugins.Start(eng); err != nil {
			return err
		}
		defer plugins.Close()
	}

	g, gctx := errgroup.WithContext(ctx)
	if pods != nil {
		var alive []string
		for _, s := range eng.Sandboxes(ctx) {
			alive = append(alive, s.ID)
		}
		// Beside the work: pods that are made meanwhile are not touched.
		g.Go(func() error {
			if err := pods.GC(gctx, alive); err != nil && gctx.Err() == nil {
				log.Warn("collect what CNI plugins left", "error", err)
			}
			return nil
		})
	}
	if cfg.DockerSocket != "" {
		l, err := stream.Listen(cfg.DockerSocket, cfg.SocketGroup)
		if err != nil {
			return err
		}
		srv := docker.New(docker.Options{Backend: eng, Version: version.Version, GitCommit: version.Revision(), Observe: observers.docker(), Log: log})
		g.Go(func() error { return srv.Serve(l) })
		g.Go(func() error { <-gctx.Done(); return shutdown(srv) })
	}
	var kubernetes *cri.Server
	if cfg.CRISocket != "" {
		if kubernetes, err = serveCRI(gctx, g, cfg, eng, observers, log); err != nil {
			return err
		}
	}
	if cfg.ContainerdSocket != "" {
		rooms := containerdRooms{rules: rules, store: st, snapshotters: snapshotters, images: images, engine: eng, bus: bus, cri: kubernetes, busy: observers.busy}
		if err := serveContainerd(gctx, g, cfg, rooms, log); err != nil {
			return err
		}
	}
	if err := observers.serve(gctx, g, cfg, eng); err != nil {
		return err
	}
	if cfg.DebugSocket != "" {
		l, err := stream.Listen(cfg.DebugSocket, -1)
		if err != nil {
			return err
		}
		srv := &http.Server{Handler: debugHandler(), ReadHeaderTimeout: shutdownLimit}
		g.Go(func() error {
			if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				return err
			}
			return nil
		})
		g.Go(func() error { <-gctx.Done(); return srv.Close() })
	}
	g.Go(func() error { r.run(gctx, eng, rules); return nil })
	g.Go(func() error { <-gctx.Done(); eng.Interrupt(); return nil }) // also without any socket
	observers.busy()                                                  // the start was work
	log.Info("ready", "version", version.Version, "snapshotter", cfg.Snapshotter, "root", cfg.Root, "state", cfg.State, "docker", cfg.DockerSocket, "containerd", cfg.ContainerdSocket, "cri", cfg.CRISocket)
	err = g.Wait()
	log.Info("stopped; containers run on")
	return err
}

// shutdown lets requests end.
func shutdown(s *docker.Server) error {
	ctx, cancel := context.WithTimeout(context.Background(), shutdownLimit)
	defer cancel()
	if err := s.Shutdown(ctx); err != nil && !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("stop the Docker API: %w", err)
	}
	return nil
}

func openNetwork(ctx context.Context, cfg config, st *store.Store, log *slog.Logger) (*network.Manager, error) {
	o := network.Options{
		Root: filepath.Join(cfg.Root, "network"), State: filepath.Join(cfg.State, "network"), Records: st.Records("networks"),
		BridgeName: cfg.BridgeName, MTU: cfg.MTU, Log: log,
	}
	for _, s := range []struct {
		value string
		to    *netip.Prefix
	}{{cfg.BridgeSubnet, &o.BridgeSubnet}, {cfg.BridgeSubnet6, &o.BridgeSubnet6}} {
		if s.value != "" {
			*s.to = netip.MustParsePrefix(s.value) // checked by complete
		}
	}
	return network.Open(ctx, o)
}

// engineRoots is the engine as a source of the garbage collection. Until it is open
// nothing is collected, because it alone knows the containers.
type engineRoots struct{ engine atomic.Pointer[engine.Engine] }

func (r *engineRoots) Roots(ctx context.Context, add func(store.Node)) error {
	if e := r.engine.Load(); e != nil {
		return e.Roots(ctx, add)
	}
	return fmt.Errorf("the engine is not open yet: %w", errdefs.ErrUnavailable)
}

// shims gives the shim room's client the engine's interface types.
type shims struct{ m client.Manager }

func (s shims) Start(ctx context.Context, o client.StartOptions) (engine.Shim, error) {
	sh, err := s.m.Start(ctx, o)
	if err != nil {
		return nil, err
	}
	return sh, nil
}

func (s shims) Connect(ctx context.Context, bundle string) (engine.Shim, error) {
	sh, err := s.m.Connect(ctx, bundle)
	if err != nil {
		return nil, err
	}
	return sh, nil
}

func (s shims) Kill(ctx context.Context, o client.StartOptions) error { return s.m.Kill(ctx, o) }

func (s shims) Reap(ctx context.Context, o client.StartOptions) (client.Exit, error) {
	return s.m.Reap(ctx, o)
}

// taskShims is the same for the shims of tasks.
type taskShims struct{ m client.Manager }

// taskShim keeps a nil pointer from becoming an interface that is none.
func taskShim(t *client.Task, err error) (engine.TaskShim, error) {
	if err != nil {
		return nil, err
	}
	return t, nil
}

func (s taskShims) StartTask(ctx context.Context, o client.TaskOptions) (engine.TaskShim, error) {
	return taskShim(s.m.StartTask(ctx, o))
}

func (s taskShims) JoinTask(ctx context.Context, o client.TaskOptions, b client.Bootstrap) (engine.TaskShim, error) {
	return taskShim(o.JoinTask(ctx, b))
}

func (s taskShims) ConnectTask(ctx context.Context, o client.TaskOptions) (engine.TaskShim, error) {
	return taskShim(o.ConnectTask(ctx))
}

func (s taskShims) ReapTask(ctx context.Context, o client.TaskOptions) (*taskapi.DeleteResponse, error) {
	return s.m.ReapTask(ctx, o)
}

func (s taskShims) RuntimeInfo(ctx context.Context, program string, options *anypb.Any, args ...string) (*types.RuntimeInfo, error) {
	return s.m.RuntimeInfo(ctx, program, options, args...)
}

// profileMemory has one of so many allocated bytes noted, for the debug socket's profiles of the heap: Go's own figure.
const profileMemory = 512 << 10

func debugHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return mux
}
