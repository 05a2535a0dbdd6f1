package snapshot

import (
	"context"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
)

// layer is a directory of a snapshot: root/snapshots/N.
type layer string

// fs is the directory with the layer's files: the root of a container, if it is the
// top one.
func (l layer) fs() string   { return filepath.Join(string(l), "fs") }
func (l layer) work() string { return filepath.Join(string(l), "work") }

// driver is what differs between kinds of layers. Layers and directories below begin with the nearest.
type driver interface {
	// fill makes the contents of a new active snapshot's directory.
	fill(ctx context.Context, l layer, below []string) error
	// rebase makes a layer that was filled without parents fit upon them. It may be
	// called again if the commit failed.
	rebase(ctx context.Context, l layer, below []string) error
	// reopen takes back what rebase made, after a commit that failed: whoever fills the layer may go on with it.
	reopen(l layer) error
	// tidy removes what a layer needs no more once it is committed.
	tidy(l layer) error
	// whole tells that a layer holds everything, not only what differs from its parents.
	whole() bool
	// show makes the files of committed layers visible: until release is called and no
	// snapshot builds upon them any more.
	show(layers []layer) (release func(), err error)
	// files is the directory with the files of a committed layer that is shown.
	files(l layer) string
	// lower shows a committed layer and all its parents, in one directory or in several that
	// lie upon each other: as show does, until release is called and no snapshot builds upon them.
	lower(chain []layer) (below []string, release func(), err error)
	// unmerged tells, once, that it would pay to have these in one directory, and they are not.
	unmerged(chain []layer) bool
	// merge makes one of them, for lower.
	merge(ctx context.Context, chain []layer) error
	// hide ends what show did for layers that used does not hold.
	hide(used func() (map[layer]bool, error)) error
	// drop is called before a layer's directory is removed, and when a new one is made.
	drop(l layer) error
	// seal gives a layer that is being committed its final form. It is called again if
	// the commit failed: its client may have changed the layer since.
	seal(ctx context.Context, l layer) (sealed, error)
	// mounts gives what an active snapshot, or with readonly a view, is mounted with.
	// A view with parents has no layer of its own ("").
	mounts(l layer, below []string, readonly bool) []mount.Mount
}

// sealed is what a layer came to.
type sealed struct {
	durable bool
	usage   *snapshots.Usage // nil: to be measured
}

// directories is what drivers share whose layers are directories all the time.
type directories struct{}

func (directories) show([]layer) (func(), error)                { return func() {}, nil }
func (directories) files(l layer) string                        { return l.fs() }
func (directories) unmerged([]layer) bool                       { return false }
func (directories) merge(context.Context, []layer) error        { return nil }
func (directories) hide(func() (map[layer]bool, error)) error   { return nil }
func (directories) drop(layer) error                            { return nil }
func (directories) reopen(layer) error                          { return nil }
func (directories) seal(context.Context, layer) (sealed, error) { return sealed{}, nil }

func (directories) lower(chain []layer) (below []string, release func(), err error) {
	for _, l := range chain {
		below = append(below, l.fs())
	}
	return below, func() {}, nil
}
