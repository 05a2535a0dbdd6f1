package image

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/image/unpack"
	"github.com/hako-engine/hako/snapshot"
)

// finish brings a layer whose blob is in the store to its committed snapshot.
func (f *layerFlight) finish(ctx context.Context, sn snapshots.Snapshotter, alone bool) error {
	if alone && !f.applied && !f.needsParent {
		if err := f.fromStore(ctx); err != nil && !errors.Is(err, unpack.ErrNeedsParent) {
			return err
		}
	}
	if f.applied {
		var err error
		if f.file != nil {
			err = f.file.Sync() // what remains to be done after the parent is there, is little
		} else {
			err = syncFiles(ctx, sn, f.root)
		}
		if err != nil {
			return err
		}
	}
	if err := f.waitParent(ctx, sn); err != nil {
		return err
	}
	if f.applied {
		err := f.inherit(ctx, sn)
		if err == nil && f.file != nil {
			err = f.file.Seal()
		}
		if err == nil {
			return f.commit(ctx, sn, true)
		}
		if !errors.Is(err, unpack.ErrNeedsParent) {
			return err
		}
	}
	if f.key != "" {
		f.drop(ctx, sn) // and with it the image
	}
	return f.onParents(ctx, sn)
}

// waitParent waits until the snapshot below is there. Whoever waits for this layer
// sees to that one as well.
func (f *layerFlight) waitParent(ctx context.Context, sn snapshots.Snapshotter) error {
	if f.l.parent == "" {
		return nil
	}
	for {
		next := f.w.s.commits.next()
		_, err := sn.Stat(ctx, f.l.parent.String())
		if !errdefs.IsNotFound(err) {
			return err
		}
		select {
		case <-next:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// syncFiles makes what is below root durable.
func syncFiles(ctx context.Context, sn snapshots.Snapshotter, root string) error {
	if s, ok := sn.(*snapshot.Snapshotter); ok {
		return s.Sync(ctx)
	}
	f, err := os.Open(root)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", root, err)
	}
	return nil
}

// inherit gives directories that the layer only passes through the attributes that
// they have below.
func (f *layerFlight) inherit(ctx context.Context, sn snapshots.Snapshotter) error {
	implicit := f.res.Implicit
	if canRebase(sn) {
		// The root's owner and mode are seen to at the commit.
		implicit = slices.DeleteFunc(slices.Clone(implicit), func(n string) bool { return n == "." })
	}
	if f.l.parent == "" || len(implicit) == 0 {
		return nil
	}
	key := "view-" + rand.Text()
	mounts, err := sn.View(ctx, key, f.l.parent.String())
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
		defer cancel()
		if err := sn.Remove(ctx, key); err != nil {
			f.w.s.o.Log.Warn("view stays until its lease expires", "snapshot", key, "err", err)
		}
	}()
	paths, err := lowerDirs(mounts)
	if err != nil {
		return err
	}
	var lowers []*os.File
	defer func() {
		for _, l := range lowers {
			l.Close()
		}
	}()
	for _, p := range paths {
		l, err := os.Open(p)
		if err != nil {
			return err
		}
		lowers = append(lowers, l)
	}
	if f.file != nil {
		return unpack.InheritImage(f.file.File, f.made, lowers)
	}
	root, err := os.Open(f.root)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := unpack.Inherit(root, implicit, lowers); err != nil {
		return err
	}
	return syncFiles(ctx, sn, f.root) // these attributes came after the first one
}

// lowerDirs gives the directories of a view's layers, the topmost first.
func lowerDirs(mounts []mount.Mount) ([]string, error) {
	if len(mounts) == 1 {
		switch m := mounts[0]; m.Type {
		case "bind":
			return []string{m.Source}, nil
		case "overlay":
			var dirs []string
			for _, o := range m.Options {
				if v, ok := strings.CutPrefix(o, "lowerdir="); ok {
					dirs = append(dirs, strings.Split(v, ":")...)
				} else if v, ok := strings.CutPrefix(o, "lowerdir+="); ok {
					dirs = append(dirs, v)
				}
			}
			if len(dirs) > 0 && !slices.Contains(dirs, "") {
				return dirs, nil
			}
		}
	}
	return nil, fmt.Errorf("mounts %v of a view: %w", mounts, errdefs.ErrNotImplemented)
}

// onParents unpacks the layer in sight of the layers below, the slow way.
func (f *layerFlight) onParents(ctx context.Context, sn snapshots.Snapshotter) error {
	key := fmt.Sprintf(snapshots.UnpackKeyFormat, rand.Text(), f.l.chain)
	mounts, err := sn.Prepare(ctx, key, f.l.parent.String())
	if err != nil {
		return err
	}
	f.key, f.mode = key, unpack.Merged
	if f.l.parent == "" {
		f.mode = unpack.Base
	}
	fill := func(root string) error {
		f.root = root
		if err := f.fromStore(ctx); err != nil {
			return err
		}
		return syncFiles(ctx, sn, root)
	}
	if len(mounts) == 1 && mounts[0].Type == "bind" {
		err = fill(mounts[0].Source)
	} else {
		err = mount.WithTempMount(ctx, mounts, fill)
	}
	if err != nil {
		return err
	}
	return f.commit(ctx, sn, false)
}

// commit makes the layer's snapshot visible. Its files are on the disk.
// measured says that its size is known.
func (f *layerFlight) commit(ctx context.Context, sn snapshots.Snapshotter, measured bool) error {
	opts := []snapshots.Opt{}
	if f.l.parent != "" && measured {
		opts = append(opts, snapshots.WithParent(f.l.parent.String()))
	}
	if canRebase(sn) {
		opts = append(opts, snapshot.WithSynced())
		if measured {
			opts = append(opts, snapshot.WithUsage(snapshots.Usage{Size: f.res.Disk, Inodes: f.res.Inodes}))
		}
	}
	for {
		err := sn.Commit(ctx, f.l.chain.String(), f.key, opts...)
		if err == nil {
			f.key = ""
			break
		}
		if !errdefs.IsAlreadyExists(err) {
			return err
		}
		// Another layer with the same contents came first. That its snapshot stays, its own
		// image sees to, which may be gone a moment later.
		if there, err := f.unpacked(ctx, sn); err != nil {
			return err
		} else if there {
			break
		}
	}
	f.w.s.commits.tell()
	return f.w.label(ctx, f.l.desc.Digest, map[string]string{
		labelUncompressed: f.l.diffID.String(),
		labelSize:         fmt.Sprint(f.res.Size),
	})
}
