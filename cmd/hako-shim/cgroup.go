package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/oci/cgroup"
	"github.com/hako-engine/hako/shim/ociexec"
	"github.com/hako-engine/hako/shim/wire"
)

// foreignCgroup is the cgroup that a foreign runtime made.
type foreignCgroup struct{ c *cgroup.Cgroup }

// cgroupOf finds the cgroup of a process.
func cgroupOf(pid int) (ociexec.Cgroup, error) {
	layout, err := cgroup.Detect()
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return nil, err
	}
	at := map[string]string{} // controllers of a hierarchy, "" for v2: the process's path in it
	for line := range strings.Lines(string(b)) {
		if f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3); len(f) == 3 {
			at[f[1]] = f[2]
		}
	}
	paths := map[string]string{}
	for _, h := range layout.Hierarchies {
		names := h.Controllers
		key := strings.Join(names, ",")
		if h.V2 {
			names, key = []string{""}, ""
		}
		// A process in the root of a hierarchy has no cgroup of its own there.
		path, ok := at[key]
		if !ok || path == "/" {
			continue
		}
		for _, name := range names {
			paths[name] = filepath.Join(h.Mount, path)
		}
	}
	return foreignCgroup{layout.Load(paths)}, nil
}

func (f foreignCgroup) OOM(ctx context.Context) (<-chan struct{}, error) { return f.c.OOM(ctx) }
func (f foreignCgroup) OOMKilled() bool                                  { return killed(f.c) }

func (f foreignCgroup) Stats() (wire.Any, error) {
	st, err := f.c.Stats()
	if err != nil {
		return wire.Any{}, err
	}
	return metrics(st), nil
}

// oomKilled asks the cgroup of a container of our own runtime.
func oomKilled(paths map[string]string) bool {
	return killed(cgroup.Layout{}.Load(paths))
}

func killed(c *cgroup.Cgroup) bool {
	n, err := c.OOMKills()
	return err == nil && n > 0
}

// joinCgroup moves this process into a cgroup that is there, in the hierarchies that have it.
func joinCgroup(path string) error {
	layout, err := cgroup.Detect()
	if err != nil {
		return err
	}
	c, err := layout.At(path)
	if err != nil {
		return err
	}
	joined := map[string]bool{}
	for _, dir := range c.Paths() {
		if _, err := os.Stat(dir); err != nil || joined[dir] {
			continue
		}
		joined[dir] = true
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), strconv.AppendInt(nil, int64(os.Getpid()), 10), 0); err != nil {
			return err
		}
	}
	if len(joined) == 0 {
		return fmt.Errorf("there is no cgroup %s: %w", path, errdefs.ErrNotFound)
	}
	return nil
}

// metrics encodes statistics as containerd's message.
func metrics(st *cgroup.Stats) wire.Any {
	if st.V2 {
		return wire.Any{TypeURL: wire.MetricsV2URL, Value: wire.Marshal(metricsV2(st))}
	}
	return wire.Any{TypeURL: wire.MetricsV1URL, Value: wire.Marshal(metricsV1(st))}
}
