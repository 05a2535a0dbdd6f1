package engine

import (
	"context"
	"fmt"
	"io/fs"
	"syscall"

	"github.com/hako-engine/hako/snapshot"
)

// Changes gives what a container changed in its image's file system.
func (e *Engine) Changes(ctx context.Context, ref string) ([]Change, error) {
	c, err := e.containers.get(ref)
	if err != nil {
		return nil, err
	}
	v := c.view()
	sn := e.opt.Snapshotters[v.Snapshotter]
	if sn == nil {
		return nil, notFoundf("snapshotter %q of container %s is not there any more", v.Snapshotter, v.ID)
	}
	list, err := snapshot.Changes(e.ns(ctx), sn, v.SnapshotKey)
	if err != nil {
		return nil, fmt.Errorf("changes of container %s: %w", ref, err)
	}
	out := make([]Change, 0, len(list))
	for _, ch := range list {
		out = append(out, Change{Path: ch.Path, Kind: int(ch.Kind)})
	}
	return out, nil
}

// sysStat is the stat(2) result of a file that came from this system.
func sysStat(fi fs.FileInfo) *syscall.Stat_t {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return st
	}
	return &syscall.Stat_t{}
}
