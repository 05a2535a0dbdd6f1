package snapshot

import (
	"context"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/mount"

	"github.com/hako-engine/hako/store"
)

// NewNative opens the snapshotter of plain directories below root. Each layer is a
// whole copy of its parent with the changes in it: slow and large, unless the file
// system can share blocks (btrfs, XFS), but it works everywhere.
func NewNative(root string, s *store.Store) (*Snapshotter, error) {
	return open("native", root, s, native{})
}

type native struct{ directories }

func (native) fill(ctx context.Context, l layer, below []string) error {
	if len(below) == 0 {
		return mkdir(l.fs(), 0o755)
	}
	return copyTree(ctx, below[0], l.fs())
}

// diff is where rebase puts what was unpacked without a parent.
func (native) diff(l layer) string { return filepath.Join(string(l), "diff") }

// rebase makes fs anew from the parent and the difference, which it keeps aside: a
// commit that fails later can begin again.
func (n native) rebase(ctx context.Context, l layer, below []string) error {
	kept, err := exists(n.diff(l))
	if err != nil {
		return err
	}
	if !kept {
		if err := os.Rename(l.fs(), n.diff(l)); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(l.fs()); err != nil {
		return err
	}
	if len(below) == 0 {
		return os.Rename(n.diff(l), l.fs())
	}
	if err := copyTree(ctx, below[0], l.fs()); err != nil {
		return err
	}
	return applyDiff(ctx, n.diff(l), l.fs())
}

// reopen makes the difference the layer's files again.
func (n native) reopen(l layer) error {
	kept, err := exists(n.diff(l))
	if err != nil || !kept {
		return err
	}
	if err := os.RemoveAll(l.fs()); err != nil {
		return err
	}
	return os.Rename(n.diff(l), l.fs())
}

func (n native) tidy(l layer) error { return os.RemoveAll(n.diff(l)) }

func (native) whole() bool { return true }

func (native) mounts(l layer, below []string, readonly bool) []mount.Mount {
	if readonly {
		dir := l.fs()
		if len(below) > 0 {
			dir = below[0]
		}
		return []mount.Mount{{Type: "bind", Source: dir, Options: []string{"ro", "rbind"}}}
	}
	return []mount.Mount{{Type: "bind", Source: l.fs(), Options: []string{"rw", "rbind"}}}
}
