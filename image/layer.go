package image

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/hako-engine/hako/image/registry"
	"github.com/hako-engine/hako/image/unpack"
	"github.com/hako-engine/hako/snapshot"
)

// work is what one operation does to bring layers into the store and the snapshotter.
type work struct {
	s               *Service
	l               *lease
	snapshotterName string
	p               *progress
	repo            *registry.Repository // nil: the layers' blobs are in the store already

	fetched atomic.Int64 // layers that were not here

	mu     sync.Mutex
	leases []*lease // of others, whose work this one used
}

func (s *Service) newWork(l *lease, snapshotter string, p *progress) *work {
	return &work{s: s, l: l, snapshotterName: snapshotter, p: p}
}

func (w *work) release() {
	for _, l := range w.leases {
		l.release()
	}
}

func (w *work) nothingNew() bool { return w.fetched.Load() == 0 }

// layer is one layer of an image at its place in the stack.
type layer struct {
	desc   ocispec.Descriptor
	diffID digest.Digest
	chain  digest.Digest // its snapshot
	parent digest.Digest // the snapshot below, "" for the lowest
}

// unpack makes the snapshots of all layers, side by side where the snapshotter can put
// layers upon each other afterwards.
func (w *work) unpack(ctx context.Context, descs []ocispec.Descriptor, c config) error {
	layers := make([]layer, len(descs))
	for i, d := range descs {
		layers[i] = layer{desc: d, diffID: c.diffIDs[i], chain: c.chain[i]}
		if i > 0 {
			layers[i].parent = c.chain[i-1]
		}
		if w.repo != nil {
			w.p.line(Progress{ID: short(d.Digest), Action: "Pulling fs layer"})
		}
	}
	all := ctx
	eg, ctx := errgroup.WithContext(ctx)
	slots := make(chan struct{}, w.s.o.Downloads)
	for _, l := range layers {
		// In order, so that a lower layer is never kept waiting by those above it.
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return eg.Wait()
		}
		eg.Go(func() error {
			var once sync.Once
			free := func() { once.Do(func() { <-slots }) }
			defer free()
			if err := w.layer(ctx, l, free); err != nil {
				return fmt.Errorf("layer %s: %w", l.desc.Digest, err)
			}
			return nil
		})
	}
	if err := eg.Wait(); err != nil || w.nothingNew() || len(layers) == 0 {
		return err
	}
	w.merge(all, layers[len(layers)-1].chain)
	return nil
}

// merge has a snapshotter that can put an image's layers into one file system, for its containers to
// start and run faster. They do without.
func (w *work) merge(ctx context.Context, chain digest.Digest) {
	_, sn, err := w.s.snapshotter(w.snapshotterName)
	if own, ok := sn.(*snapshot.Snapshotter); ok && err == nil {
		err = own.Merge(ctx, chain.String())
	}
	if err != nil {
		w.s.o.Log.Warn("an image's layers stay a stack", "snapshot", chain, "err", err)
	}
}

// layer makes sure that a layer's blob and snapshot are here. free is called when only
// waiting is left.
func (w *work) layer(ctx context.Context, l layer, free func()) error {
	ns, _ := namespaces.Namespace(ctx)
	key := ns + "\x00" + w.snapshotterName + "\x00" + l.chain.String() + "\x00" + l.desc.Digest.String()
	hold := func(other *lease) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.leases = append(w.leases, other)
	}
	return w.s.layers.do(ctx, key, w.l, w.p.line, hold, func(ctx context.Context, tell func(Progress)) error {
		defer free()
		f := &layerFlight{w: w, l: l, tell: tell, id: short(l.desc.Digest), free: free}
		return f.run(ctx)
	})
}

// layerFlight is the work on one layer, which several operations may wait for.
type layerFlight struct {
	w    *work
	l    layer
	id   string
	tell func(Progress)
	free func()

	key  string              // of the active snapshot
	root string              // directory that the layer is unpacked into
	file *snapshot.LayerFile // or the image that it becomes; nil: none
	mode unpack.Mode
	res  unpack.Result
	made unpack.ImageResult // of an image

	applied     bool // the layer is in root, and its diff id is right
	needsParent bool // it cannot be unpacked alone
}

func (f *layerFlight) say(action string, current, total int64) {
	f.tell(Progress{ID: f.id, Action: action, Current: current, Total: total})
}

func (f *layerFlight) run(ctx context.Context) error {
	_, sn, err := f.w.s.snapshotter(f.w.snapshotterName)
	if err != nil {
		return err
	}
	there, err := f.unpacked(ctx, sn)
	if err != nil {
		return err
	}
	ns, _ := namespaces.Namespace(ctx)
	unlock, err := f.w.s.blobs.Lock(ctx, ns+"\x00"+f.l.desc.Digest.String())
	if err != nil {
		return err
	}
	defer func() { unlock() }()
	stored, err := f.stored(ctx)
	if err != nil {
		return err
	}
	if there && stored {
		f.say("Already exists", 0, 0)
		return nil
	}
	f.w.fetched.Add(1)
	defer func() {
		f.closeFile()
		if f.key != "" {
			f.drop(ctx, sn)
		}
	}()
	alone := canRebase(sn)
	if !there && alone {
		if err := f.prepare(ctx, sn); err != nil {
			return err
		}
	}
	if !stored {
		if err := f.fetch(ctx); err != nil {
			return err
		}
	}
	unlock()
	unlock = func() {}
	if there {
		f.say("Download complete", 0, 0)
		return nil
	}
	f.free()
	if err := f.finish(ctx, sn, alone); err != nil {
		return err
	}
	if f.w.repo != nil {
		f.say("Pull complete", 0, 0)
	}
	return nil
}

// canRebase says whether a snapshotter can put an unpacked layer upon its parents when
// it is committed (containerd's snapshots.RebaseCap).
func canRebase(sn snapshots.Snapshotter) bool {
	_, ok := sn.(*snapshot.Snapshotter)
	return ok
}

// unpacked looks for the layer's snapshot, and puts it under the lease.
func (f *layerFlight) unpacked(ctx context.Context, sn snapshots.Snapshotter) (bool, error) {
	for leased := false; ; leased = true {
		info, err := sn.Stat(ctx, f.l.chain.String())
		if errdefs.IsNotFound(err) {
			return false, nil
		}
		if err != nil || leased { // seen again after it was leased: it is there to stay
			return err == nil, err
		}
		if info.Kind != snapshots.KindCommitted || info.Parent != f.l.parent.String() {
			return false, fmt.Errorf("snapshot %s exists, but is not this layer: %w", f.l.chain, errdefs.ErrFailedPrecondition)
		}
		if err := f.w.l.keep(ctx, "snapshots/"+f.w.snapshotterName, f.l.chain.String()); err != nil {
			return false, err
		}
	}
}

// stored looks for the layer's blob, and puts it under the lease.
func (f *layerFlight) stored(ctx context.Context) (bool, error) {
	for leased := false; ; leased = true {
		_, err := f.w.s.o.Content.Info(ctx, f.l.desc.Digest)
		if errdefs.IsNotFound(err) {
			if f.w.repo == nil {
				return false, fmt.Errorf("its blob is not in the store: %w", errdefs.ErrNotFound)
			}
			return false, nil
		}
		if err == nil && f.w.repo != nil && f.lost(ctx) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		if leased {
			break
		}
		if err := f.w.l.keep(ctx, "content", f.l.desc.Digest.String()); err != nil {
			return false, err
		}
	}
	labels := map[string]string{}
	f.w.source(labels)
	return true, f.w.label(ctx, f.l.desc.Digest, labels)
}

// lost tells that the store knows the layer's blob and has its bytes no more: they can be
// fetched again.
func (f *layerFlight) lost(ctx context.Context) bool {
	ra, err := f.w.s.o.Content.ReaderAt(ctx, f.l.desc)
	if err == nil {
		ra.Close()
	}
	return errdefs.IsDataLoss(err)
}

// prepare makes an empty active snapshot, to be put upon its parents later.
func (f *layerFlight) prepare(ctx context.Context, sn snapshots.Snapshotter) error {
	key := fmt.Sprintf(snapshots.UnpackKeyFormat, rand.Text(), f.l.chain)
	mounts, err := sn.Prepare(ctx, key, "")
	if err != nil {
		return err
	}
	f.key = key
	if len(mounts) != 1 || mounts[0].Type != "bind" {
		return fmt.Errorf("snapshotter %s gave %v for an empty snapshot: %w", f.w.snapshotterName, mounts, errdefs.ErrNotImplemented)
	}
	f.root = mounts[0].Source
	f.mode = unpack.Diff
	if f.l.parent == "" {
		f.mode = unpack.Base
	}
	if own, ok := sn.(*snapshot.Snapshotter); ok {
		f.file, err = own.NewLayerFile(ctx, key)
	}
	return err
}

func (f *layerFlight) drop(ctx context.Context, sn snapshots.Snapshotter) {
	f.closeFile()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
	defer cancel()
	if err := sn.Remove(ctx, f.key); err != nil && !errdefs.IsNotFound(err) {
		f.w.s.o.Log.Warn("unfinished snapshot stays until its lease expires", "snapshot", f.key, "err", err)
	}
	f.key = ""
}

func (f *layerFlight) closeFile() {
	if f.file != nil {
		f.file.Close() // what counts is synced
		f.file, f.made = nil, unpack.ImageResult{}
	}
}

// unpack brings a decompressed layer into the prepared image or directory.
func (f *layerFlight) unpack(ctx context.Context, plain *chunkReader) (err error) {
	o := unpack.Options{Mode: f.mode, Limits: f.w.s.o.Limits, Writeback: true}
	if f.file != nil {
		f.made, err = unpack.Image(ctx, f.file.File, plain, o)
		f.res = f.made.Result
		return err
	}
	root, err := os.Open(f.root)
	if err != nil {
		return err
	}
	defer root.Close()
	f.res, err = unpack.Apply(ctx, root, plain, o)
	return err
}

// apply unpacks what feed sends, and checks the diff id ("": that was done).
func (f *layerFlight) apply(ctx context.Context, feed func(context.Context, *chunkWriter) error, diffID digest.Digest) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	packed, in := newChunkPipe()
	plain, out := newChunkPipe()
	hashed, outHash := newChunkPipe()
	verifier := f.l.diffID.Algorithm().Hash()
	var (
		wg                           sync.WaitGroup
		feedErr, decodeErr, applyErr error
	)
	wg.Add(3)
	go func() {
		defer wg.Done()
		feedErr = feed(ctx, in)
		in.close(feedErr)
	}()
	go func() {
		defer wg.Done()
		decodeErr = f.decode(ctx, packed, out, outHash)
		packed.Close()
		out.close(decodeErr)
		outHash.close(decodeErr)
	}()
	go func() {
		defer wg.Done()
		defer hashed.Close()
		_, _ = io.Copy(verifier, hashed) // how the stream ended, the others tell
	}()
	applyErr = f.unpack(ctx, plain)
	plain.Close()
	if applyErr != nil {
		hashed.Close()
		if !errdefs.IsInvalidArgument(applyErr) && !errors.Is(applyErr, unpack.ErrNeedsParent) {
			cancel(applyErr)
		} // else the rest is still received: to know the digest, or to unpack it in another way
	}
	wg.Wait()
	switch {
	case feedErr != nil && !errors.Is(feedErr, applyErr):
		return feedErr
	case applyErr != nil:
		f.needsParent = errors.Is(applyErr, unpack.ErrNeedsParent)
		return applyErr
	case decodeErr != nil:
		return decodeErr
	}
	if got := digest.NewDigest(f.l.diffID.Algorithm(), verifier); diffID != "" && got != diffID {
		return fmt.Errorf("unpacked layer has diff id %s, not %s as the config says: %w", got, f.l.diffID, errdefs.ErrDataLoss)
	}
	f.applied = true
	return nil
}
