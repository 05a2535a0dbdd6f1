package engine

import (
	"context"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"syscall"

	"github.com/hako-engine/hako/snapshot"
)

// Changes gives what a container changed in its image's file system.
func (e *Engine) Changes(ctx context.Context, ref string) ([]Change, error) {
	c, err := e.find(ctx, ref)
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
	return withoutInjected(list), nil
}

// injected are the files that every container gets from the engine. Those below /etc are
// bound over; the places for them in its layer are not the container's changes.
var injected = []string{"/" + rootMark, "/etc/hostname", "/etc/hosts", "/etc/resolv.conf"}

func withoutInjected(list []snapshot.Change) []Change {
	out := make([]Change, 0, len(list))
	etc, inEtc := -1, false
	for _, ch := range list {
		if ch.Kind == snapshot.Added && slices.Contains(injected, ch.Path) {
			continue
		}
		if ch.Path == "/etc" && ch.Kind == snapshot.Modified {
			etc = len(out)
		}
		inEtc = inEtc || strings.HasPrefix(ch.Path, "/etc/")
		out = append(out, Change{Path: ch.Path, Kind: int(ch.Kind)})
	}
	if etc >= 0 && !inEtc && len(out) < len(list) { // it was changed by those files alone
		out = slices.Delete(out, etc, etc+1)
	}
	return out
}

// sysStat is the stat(2) result of a file that came from this system.
func sysStat(fi fs.FileInfo) *syscall.Stat_t {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return st
	}
	return &syscall.Stat_t{}
}
