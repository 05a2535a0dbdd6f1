package engine

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/image"
	"github.com/hako-engine/hako/internal/errtext"
	"github.com/hako-engine/hako/internal/safepath"
	"github.com/hako-engine/hako/snapshot"
)

// Mounts of kind image show the files of an image to a container: a view of its top layer,
// mounted in the bundle, from which a folder is bound into the container.

// imageMounts is the folder of a bundle for them.
const imageMounts = "images"

// imageKeys are the snapshots of a container's mounts of images, by their number among its mounts.
func imageKeys(id string, c Config) []string {
	var keys []string
	for _, m := range c.Mounts {
		if m.Kind == MountImage {
			keys = append(keys, imageKey(id, m.Target))
		}
	}
	return keys
}

func imageKey(id, target string) string { return id + "-image-" + filepath.Clean(target) }

// viewImages makes the snapshots of a container's mounts of images.
func (e *Engine) viewImages(ctx context.Context, v *Container) error {
	for i := range v.Mounts {
		if m := &v.Mounts[i]; m.Kind == MountImage {
			err := e.viewImage(ctx, v, m)
			if err != nil && v.Config.Pod != nil {
				err = fmt.Errorf("ImageVolumeMountFailed: %w", err) // the kubelet reads the beginning of the text
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// viewImage makes the snapshot of one mount, and makes sure that there is what it is to show.
func (e *Engine) viewImage(ctx context.Context, v *Container, m *Mount) error {
	img, unuse, err := e.useImage(ctx, func() (image.Image, error) { return e.opt.Images.Get(ctx, m.Source, nil) })
	if err != nil {
		return fmt.Errorf("image of mount %s: %s: %w", m.Target, m.Source, err)
	}
	defer unuse()
	m.ImageID = img.ID.String()
	chain, err := e.opt.Images.Unpack(ctx, img, v.Snapshotter)
	if err != nil {
		return fmt.Errorf("unpack image %s of mount %s: %w", m.Source, m.Target, err)
	}
	sn := e.opt.Snapshotters[v.Snapshotter]
	mounts, err := sn.View(ctx, imageKey(v.ID, m.Target), chain, ownedBy(v.ID))
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("files of image %s for mount %s: %w", m.Source, m.Target, err)
	}
	if m.Subpath == "" {
		return nil
	}
	root, err := openMounts(mounts, false)
	if err != nil {
		return err
	}
	defer root.Close()
	f, err := openSubdir(root, *m)
	if err != nil {
		return err
	}
	return f.Close()
}

// mountImages mounts them in the bundle: index among the mounts → folder.
func (e *Engine) mountImages(v Container, bundle string) (map[int]string, error) {
	out := map[int]string{}
	for i, m := range v.Mounts {
		if m.Kind != MountImage {
			continue
		}
		sn := e.opt.Snapshotters[v.Snapshotter]
		mounts, err := sn.Mounts(e.ns(e.ctx), imageKey(v.ID, m.Target))
		if err != nil {
			return nil, fmt.Errorf("files of image %s for mount %s: %w", m.Source, m.Target, err)
		}
		dir := filepath.Join(bundle, imageMounts, strconv.Itoa(i))
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return nil, err
		}
		if err := mountFilesAt(mounts, dir); err != nil {
			return nil, fmt.Errorf("mount image %s: %w", m.Source, err)
		}
		out[i] = dir
	}
	return out, nil
}

// mountFilesAt mounts the files of a snapshot, for reading, at a folder of the engine's.
func mountFilesAt(mounts []mount.Mount, dir string) error {
	if len(mounts) != 1 {
		return fmt.Errorf("%d mounts: %w", len(mounts), errdefs.ErrNotImplemented)
	}
	m, err := readOnly(mounts[0])
	if err != nil {
		return err
	}
	f, err := snapshot.MountDetached([]mount.Mount{m})
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.MoveMount(int(f.Fd()), "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("move_mount: %w", err)
	}
	return nil
}

// openImageMount opens the folder of an image that a mount shows.
func openImageMount(dir string, m Mount) (*os.File, error) {
	root, err := safepath.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", m.Source, err)
	}
	defer root.Close()
	return openSubdir(root, m)
}

func openSubdir(root *safepath.Root, m Mount) (*os.File, error) {
	sub := m.Subpath
	if sub == "" {
		sub = "/"
	}
	f, err := root.Open(sub, unix.O_PATH, 0)
	if err != nil {
		return nil, invalidf("cannot access path %s of image %s: %v", m.Subpath, m.Source, errtext.Plain(err))
	}
	return f, nil
}
