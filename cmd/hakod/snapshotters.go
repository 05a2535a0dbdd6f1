package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/hako-engine/hako/snapshot"
	"github.com/hako-engine/hako/store"
)

// autoSnapshotter stands for the best one that works here.
const autoSnapshotter = "auto"

// snapshotterSet are the snapshotters of a daemon.
type snapshotterSet struct {
	byName map[string]snapshots.Snapshotter
	used   string // where none is asked for
	close  func() error
}

// openSnapshotters opens all that work here. A root in which another one was in use until now
// goes on with that: its images are unpacked there.
func openSnapshotters(cfg config, st *store.Store, log *slog.Logger) (set snapshotterSet, err error) {
	set = snapshotterSet{byName: map[string]snapshots.Snapshotter{}}
	var opened []io.Closer
	set.close = func() error {
		var errs []error
		for _, sn := range opened {
			errs = append(errs, sn.Close())
		}
		return errors.Join(errs...)
	}
	failed := map[string]error{}
	for _, s := range []struct {
		name string
		open func(root string) (*snapshot.Snapshotter, error)
	}{
		{"erofs", func(root string) (*snapshot.Snapshotter, error) {
			if err := snapshot.ErofsSupported(root); err != nil {
				return nil, err
			}
			return snapshot.NewErofs(root, filepath.Join(cfg.State, "erofs"), st, snapshot.ErofsOptions{MergeFrom: cfg.ErofsMergeLayers})
		}},
		{"overlayfs", func(root string) (*snapshot.Snapshotter, error) { return snapshot.NewOverlay(root, st) }},
		{"native", func(root string) (*snapshot.Snapshotter, error) { return snapshot.NewNative(root, st) }},
	} {
		root := filepath.Join(cfg.Root, s.name)
		if err := os.MkdirAll(root, 0o711); err != nil {
			return set, errors.Join(err, set.close())
		}
		sn, err := s.open(root)
		if err != nil {
			failed[s.name] = err
			continue
		}
		opened = append(opened, sn)
		set.byName[s.name] = sn
	}
	for name, plugin := range cfg.ProxyPlugins {
		conn, err := grpc.NewClient("unix:"+strings.TrimPrefix(plugin.Address, "unix://"), grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(proxyMessage), grpc.MaxCallSendMsgSize(proxyMessage)))
		if err != nil {
			return set, errors.Join(fmt.Errorf("proxy_plugins.%s: %w", name, err), set.close())
		}
		p := snapshot.NewProxy(name, proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), name), st)
		opened = append(opened, p, conn)
		set.byName[name] = p
	}
	if set.used, err = chooseSnapshotter(cfg.Snapshotter, set.byName, failed); err != nil {
		return set, errors.Join(err, set.close())
	}
	if err := failed["erofs"]; err != nil && cfg.Snapshotter == autoSnapshotter {
		log.Info("EROFS is not used", "reason", err)
	}
	return set, nil
}

// proxyMessage is the longest message of another program's snapshotter, in bytes, as in containerd.
const proxyMessage = 16 << 20

// checkProxyPlugins looks at the table of the configuration.
func checkProxyPlugins(plugins map[string]proxyPlugin) error {
	for name, p := range plugins {
		switch {
		case !pluginName.MatchString(name) || slices.Contains([]string{autoSnapshotter, "erofs", "overlayfs", "native"}, name):
			return fmt.Errorf("proxy_plugins: %q cannot be the name of a snapshotter", name)
		case p.Type != "snapshot":
			return fmt.Errorf("proxy_plugins.%s: type %q is not supported, only snapshot", name, p.Type)
		case !filepath.IsAbs(strings.TrimPrefix(p.Address, "unix://")):
			return fmt.Errorf("proxy_plugins.%s: address %q is not the absolute path of a socket", name, p.Address)
		}
	}
	return nil
}

var pluginName = regexp.MustCompile(`^[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*$`)

// chooseSnapshotter gives the name of the one to use.
func chooseSnapshotter(asked string, there map[string]snapshots.Snapshotter, failed map[string]error) (string, error) {
	if asked != autoSnapshotter {
		if _, ok := there[asked]; ok {
			return asked, nil
		}
		if err := failed[asked]; err != nil {
			return "", fmt.Errorf("%w (--snapshotter native works everywhere, but copies files)", err)
		}
		return "", fmt.Errorf("snapshotter %q is not configured", asked)
	}
	inUse := func(name string) bool {
		sn, ok := there[name].(*snapshot.Snapshotter)
		return ok && !sn.Empty()
	}
	_, erofs := there["erofs"]
	_, overlay := there["overlayfs"]
	switch {
	case erofs && (inUse("erofs") || !inUse("overlayfs")):
		return "erofs", nil
	case overlay:
		return "overlayfs", nil
	}
	return "", fmt.Errorf("%w (--snapshotter native works everywhere, but copies files)", failed["overlayfs"])
}
