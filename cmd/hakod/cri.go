package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"github.com/hako-engine/hako/api/cri"
	"github.com/hako-engine/hako/api/cri/streaming"
	"github.com/hako-engine/hako/api/nri"
	"github.com/hako-engine/hako/api/stream"
	"github.com/hako-engine/hako/engine"
	"github.com/hako-engine/hako/internal/version"
	"github.com/hako-engine/hako/network/cni"
)

// serveCRI adds the Kubernetes CRI, and the server of its streams, to what runs until ctx ends.
func serveCRI(ctx context.Context, g *errgroup.Group, cfg config, eng *engine.Engine, obs *observers, log *slog.Logger) (*cri.Server, error) {
	o := streaming.Options{
		Runtime: &streaming.EngineRuntime{Engine: eng, Log: log, Netns: podNetns(eng.Sandbox)},
		Address: cfg.StreamAddress, Log: log,
	}
	if cfg.StreamCert != "" {
		cert, err := tls.LoadX509KeyPair(cfg.StreamCert, cfg.StreamKey)
		if err != nil {
			return nil, fmt.Errorf("certificate of the streaming server: %w", err)
		}
		o.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	}
	streams, err := streaming.New(o)
	if err != nil {
		return nil, err
	}
	l, err := stream.Listen(cfg.CRISocket, cfg.SocketGroup)
	if err != nil {
		return nil, errors.Join(err, streams.Close())
	}
	srv := cri.New(cri.Options{
		Backend: eng, Streams: streams, Version: version.Version, StateDir: cfg.State, Handlers: func() []string { return slices.Sorted(maps.Keys(eng.Runtimes())) },
		Config: map[string]string{"snapshotter": cfg.Snapshotter, "registryDir": cfg.RegistryDir, "network": cfg.Network},
		Unary:  obs.unary, Stream: obs.stream, Log: log,
	})
	g.Go(streams.Serve)
	g.Go(func() error { return srv.Serve(l) })
	g.Go(func() error {
		<-ctx.Done()
		limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownLimit)
		defer cancel()
		srv.Shutdown(limit)
		return streams.Close()
	})
	return srv, nil
}

// podNetns gives the network namespace of a pod. None is the host's only for a pod that was
// asked to be there: a pod that has just been stopped must not become the host.
func podNetns(sandbox func(context.Context, string) (engine.Sandbox, error)) func(context.Context, string) (string, error) {
	return func(ctx context.Context, id string) (string, error) {
		s, err := sandbox(ctx, id)
		switch {
		case err != nil:
			return "", err
		case s.State != engine.SandboxReady, s.NetNS == "" && s.Config.Network != engine.NamespaceNode:
			return "", fmt.Errorf("pod sandbox %s is not ready: %w", s.ID, errdefs.ErrFailedPrecondition)
		}
		return s.NetNS, nil
	}
}

// openPods gives the network of pods: nil, which is the engine's own bridge, or CNI.
func openPods(ctx context.Context, cfg config, log *slog.Logger) (*cni.Manager, error) {
	if cfg.Network == networkBuiltin {
		return nil, nil
	}
	return cni.Open(ctx, cni.Options{
		ConfDir: cfg.CNIConfDir, BinDirs: filepath.SplitList(cfg.CNIBinDir), Dir: filepath.Join(cfg.Root, "cni"), Log: log,
	})
}

// openPlugins makes the server of NRI plugins, and the same as the engine's hooks; both are
// nil without a socket.
func openPlugins(cfg config, log *slog.Logger) (*nri.Server, engine.Hooks, error) {
	if cfg.NRISocket == "" {
		return nil, nil, nil
	}
	nri.LogTo(log)
	s, err := nri.New(nri.Options{
		Socket: cfg.NRISocket, PluginDir: cfg.NRIPluginDir, ConfigDir: cfg.NRIConfigDir,
		RequestLimit: time.Duration(cfg.NRITimeout) * time.Second, Version: version.Version, Log: log,
	})
	if err != nil {
		return nil, nil, err
	}
	return s, s, nil
}

// cniPods gives the network of the pods by CNI plugins the engine's types.
type cniPods struct{ m *cni.Manager }

func (c cniPods) Ready() error { return c.m.Ready() }

func (c cniPods) SetPodCIDR(ctx context.Context, ranges []netip.Prefix) error {
	return c.m.SetPodCIDR(ctx, ranges)
}

func (c cniPods) Setup(ctx context.Context, p engine.PodEndpoint) (engine.PodAddresses, error) {
	r, err := c.m.Setup(ctx, cni.Pod{
		ID: p.ID, Name: p.Name, Namespace: p.Namespace, UID: p.UID, NetNS: p.NetNS, Ports: p.Ports,
		DNS: (*cni.DNS)(p.DNS), Annotations: p.Annotations, CgroupParent: p.CgroupParent,
	})
	return engine.PodAddresses{IPs: r.IPs}, err
}

func (c cniPods) Teardown(ctx context.Context, p engine.PodEndpoint) error {
	return c.m.Teardown(ctx, p.ID)
}
