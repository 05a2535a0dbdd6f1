package engine

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// FsUsage is what something takes of a file system.
type FsUsage struct {
	Path   string // on that file system
	Bytes  uint64
	Inodes uint64
	Time   time.Time // of the measurement
}

// DropImage removes an image with all its names, unless a container runs from it or is
// being created. Of one that is not there it is no error.
func (e *Engine) DropImage(ctx context.Context, ref string) error {
	ctx = e.ns(ctx)
	img, busy, done, err := e.removingImage(ctx, ref)
	if errdefs.IsNotFound(err) {
		return nil
	} else if err != nil {
		return fmt.Errorf("remove image %s: %w", ref, err)
	}
	defer done()
	id := img.ID.String()
	users, err := e.imageUsers(ctx)
	if err != nil {
		return fmt.Errorf("remove image %s: %w", ref, err)
	}
	if i := slices.IndexFunc(users[id], func(v Container) bool { return v.State.live() }); i >= 0 {
		return failedf("image %s is in use by running container %s", ref, users[id][i].ID)
	}
	if busy {
		return failedf("image %s is in use by a container that is being created", ref)
	}
	if _, err := e.deleteImage(ctx, img); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}

// PinnedImages are those that containers outside any pod use: the kubelet, which does not
// know these, shall leave them.
func (e *Engine) PinnedImages(ctx context.Context) map[string]bool {
	out := map[string]bool{}
	users, err := e.imageUsers(ctx)
	if err != nil {
		e.log.Error("images that containers outside pods use", "error", err)
	}
	for id, list := range users {
		if slices.ContainsFunc(list, func(v Container) bool { return v.Config.Pod == nil }) {
			out[id] = true
		}
	}
	return out
}

// ImageFsUsage is what the layers of images take.
func (e *Engine) ImageFsUsage(ctx context.Context) (FsUsage, error) {
	ctx = e.ns(ctx)
	out := FsUsage{Path: filepath.Join(e.opt.Root, e.opt.Snapshotter), Time: time.Now()}
	sn := e.opt.Snapshotters[e.opt.Snapshotter]
	err := sn.Walk(ctx, func(ctx context.Context, i snapshots.Info) error {
		if i.Kind != snapshots.KindCommitted {
			return nil
		}
		u, err := sn.Usage(ctx, i.Name)
		if err != nil {
			return nil // it went away meanwhile
		}
		out.Bytes += uint64(u.Size)
		out.Inodes += uint64(u.Inodes)
		return nil
	})
	if err != nil {
		return out, fmt.Errorf("usage of images: %w", err)
	}
	return out, nil
}
