package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/hako-engine/hako/internal/durable"
	"github.com/hako-engine/hako/internal/erofs"
	"github.com/hako-engine/hako/store"
)

// A merged image is the metadata of a layer and of all layers below it in one file, over the data in
// the layers' own files. It is a cache: made from the layers, and made again when it is
// missing, damaged, or not of just these layers. It lies in the directory of the topmost layer and
// goes with it; that layer's record keeps the others.

// mergeFrom is from how many layers on a stack is slower than a merged image: see docs/performance.md.
const mergeFrom = 10

// mergedSuffix is that of its mount point.
const mergedSuffix = ".merged"

// merges is what is known of merged images.
type merges struct {
	from   int               // layers
	mounts map[layer][]layer // whose mounts were looked at; guarded by images.mu
	asked  map[layer]bool    // were to be made once; guarded by images.mu
	refuse error             // of the kernel; guarded by images.mu

	making sync.Mutex // one is made at a time
}

func newMerges(from int) merges {
	switch {
	case from == 0:
		from = mergeFrom
	case from < 0:
		from = math.MaxInt
	}
	return merges{from: max(from, 2), mounts: map[layer][]layer{}, asked: map[layer]bool{}}
}

func (l layer) merged() string        { return filepath.Join(string(l), "merged.erofs") }
func (l layer) mergedPartial() string { return filepath.Join(string(l), "merged.part") }

func (l layer) tag() string { return filepath.Base(string(l)) }

func (d *images) lower(chain []layer) (below []string, release func(), err error) {
	if len(chain) >= d.merged.from {
		d.mu.Lock()
		at := d.showMerged(chain)
		if at != "" {
			defer d.mu.Unlock()
			return []string{at}, d.pin(chain[:1]), nil
		}
		d.mu.Unlock()
	}
	release, err = d.show(chain)
	if err != nil {
		return nil, nil, err
	}
	for _, l := range chain {
		below = append(below, d.files(l))
	}
	return below, release, nil
}

func (d *images) unmerged(chain []layer) bool {
	if len(chain) < d.merged.from {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	top := chain[0]
	if d.merged.refuse != nil || d.merged.mounts[top] != nil || d.merged.asked[top] {
		return false
	}
	d.merged.asked[top] = true
	return true
}

// forgetMerged is part of hide. d.mu is held.
func (d *images) forgetMerged(in map[string]bool) {
	for l := range d.merged.mounts {
		if !in[l.tag()] {
			delete(d.merged.mounts, l)
		}
	}
}

// showMerged mounts the merged image of layers unless it is mounted, and tells where; "" if there is
// none. d.mu is held.
func (d *images) showMerged(chain []layer) string {
	top := chain[0]
	at := d.mountPoint(top) + mergedSuffix
	there := mounted(at)
	if d.merged.refuse != nil && !there || there && slices.Equal(d.merged.mounts[top], chain) {
		if !there {
			return ""
		}
		return at
	}
	delete(d.merged.mounts, top)
	err := verifyMerged(chain)
	if err == nil && !there {
		if err = os.MkdirAll(at, 0o700); err == nil {
			err = d.mountMerged(chain, at)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			// The kernel does not know this form, or its memory is full: the stack works.
			d.merged.refuse = err
		}
	}
	if err != nil {
		if there {
			_ = unmount(at) // of other layers; who stands on it keeps it
		}
		return ""
	}
	d.merged.mounts[top] = slices.Clone(chain)
	return at
}

// files of layers, the lowest first, in the order of the devices.
func layerFiles(chain []layer) (names []string) {
	for _, l := range slices.Backward(chain) {
		names = append(names, l.image())
	}
	return names
}

func (d *images) mountMerged(chain []layer, at string) error {
	m, err := d.mount(chain[0].merged(), layerFiles(chain)...)
	if err != nil {
		return err
	}
	return attach(m, at)
}

// verifyMerged tells whether the topmost layer has a whole merged image of just these.
// errdefs.ErrFailedPrecondition: it is of others; ErrDataLoss: it is damaged.
func verifyMerged(chain []layer) error {
	f, err := os.Open(chain[0].merged())
	if err != nil {
		return err
	}
	defer f.Close()
	devices, err := erofs.ReadMerged(f)
	if err != nil {
		return fmt.Errorf("merged image: %w: %w", err, errdefs.ErrDataLoss)
	}
	ok := len(devices) == len(chain)
	for i := 0; ok && i < len(devices); i++ {
		ok = devices[i].Tag == chain[len(chain)-1-i].tag()
	}
	if !ok {
		return fmt.Errorf("merged image is of other layers: %w", errdefs.ErrFailedPrecondition)
	}
	return nil
}

// dropMerged is drop for a merged mount. d.mu is held.
func (d *images) dropMerged(l layer) error {
	delete(d.merged.mounts, l)
	delete(d.merged.asked, l)
	return unmount(d.mountPoint(l) + mergedSuffix)
}

// merge makes the merged image of layers, unless they are few or it is there. They may be removed
// meanwhile: then there is no directory any more to put it into.
func (d *images) merge(ctx context.Context, chain []layer) (err error) {
	if len(chain) < d.merged.from {
		return nil
	}
	d.merged.making.Lock()
	defer d.merged.making.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if verifyMerged(chain) == nil {
		return nil
	}
	top := chain[0]
	var parts []erofs.Part
	defer func() {
		for _, p := range parts {
			p.File.Close()
		}
	}()
	for _, l := range slices.Backward(chain) {
		f, err := os.Open(l.image())
		if err != nil {
			return err
		}
		parts = append(parts, erofs.Part{Tag: l.tag(), File: f})
	}
	out, err := os.OpenFile(top.mergedPartial(), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, out.Close())
		if err != nil {
			_ = os.Remove(top.mergedPartial())
		}
	}()
	if err := erofs.Merge(out, parts); err != nil {
		if erofs.IsDamaged(err) {
			err = fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
		}
		return err
	}
	if err := out.Sync(); err != nil {
		return err
	}
	if err := os.Rename(top.mergedPartial(), top.merged()); err != nil {
		return err
	}
	return durable.SyncDir(string(top))
}

// Merge prepares a committed snapshot for many containers or many layers, where that pays: its layers are put
// into one file system. It is no error if that is not so here.
func (sn *Snapshotter) Merge(ctx context.Context, key string) error {
	ns, err := store.Namespace(ctx)
	if err != nil {
		return err
	}
	var chain []layer
	err = sn.store.DB().View(ctx, func(tx *bolt.Tx) (err error) {
		chain, err = sn.chain(sn.section(tx, ns), key)
		return err
	})
	if err == nil {
		err = sn.driver.merge(ctx, chain)
	}
	return wrap(err, "merge layers of snapshot %q", key)
}

// mergeSoon has layers merged in the background, for those who come later.
func (sn *Snapshotter) mergeSoon(chain []layer) {
	if !sn.driver.unmerged(chain) {
		return
	}
	sn.mu.Lock()
	defer sn.mu.Unlock()
	if sn.closed {
		return
	}
	sn.merging.Go(func() {
		err := sn.driver.merge(context.Background(), chain)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			sn.log.Warn("layers stay a stack", "layer", chain[0].tag(), "error", err)
		}
	})
}

// isUnpacking tells that a snapshot is on the way to become a layer.
func isUnpacking(key string) bool { return strings.HasPrefix(key, snapshots.UnpackKeyPrefix) }
