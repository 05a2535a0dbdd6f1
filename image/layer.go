package image

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

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
	unlock, err := f.w.s.blobs.lock(ctx, ns+"\x00"+f.l.desc.Digest.String())
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

// fetch brings the blob into the store; if there is an empty snapshot and the blob is
// fetched from its beginning, it is unpacked at the same time.
func (f *layerFlight) fetch(ctx context.Context) error {
	d := f.l.desc
	ref := "layer-" + d.Digest.String()
	cw, err := content.OpenWriter(ctx, f.w.s.o.Content, content.WithRef(ref), content.WithDescriptor(ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}))
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer cw.Close()
	st, err := cw.Status()
	if err != nil {
		return err
	}
	if st.Offset > d.Size {
		if err := cw.Truncate(0); err != nil {
			return err
		}
		st.Offset = 0
	}
	f.say("Downloading", st.Offset, d.Size)
	body, err := f.w.repo.Blob(ctx, d, st.Offset)
	if err != nil {
		return err
	}
	defer body.Close()
	src := &download{f: f, body: body, to: cw, off: st.Offset}
	onePass := f.key != "" && st.Offset == 0 && !isErofs(f.l.desc.MediaType) // whose parts are not in the order of reading
	if onePass {
		err = f.apply(ctx, src.run, f.l.diffID)
		if errors.Is(err, unpack.ErrNeedsParent) {
			onePass, err = false, nil
		}
	} else {
		err = src.run(ctx, nil)
	}
	if got := cw.Digest(); src.off == d.Size && got != d.Digest && got.Algorithm() == d.Digest.Algorithm() {
		// Whatever else was wrong with the bytes, they were not the layer's.
		f.abort(ctx, cw, ref)
		return fmt.Errorf("registry sent %s instead: %w", got, errdefs.ErrDataLoss)
	}
	if err != nil {
		if errdefs.IsDataLoss(err) || errdefs.IsInvalidArgument(err) || errdefs.IsResourceExhausted(err) {
			f.abort(ctx, cw, ref)
		}
		return err
	}
	labels := map[string]string{}
	f.w.source(labels)
	if onePass {
		labels[labelUncompressed] = f.l.diffID.String()
		labels[labelSize] = fmt.Sprint(f.res.Size)
	}
	f.say("Verifying Checksum", 0, 0)
	err = cw.Commit(ctx, d.Size, d.Digest, content.WithLabels(labels))
	if errdefs.IsAlreadyExists(err) {
		err = nil
	}
	if errdefs.IsFailedPrecondition(err) {
		f.abort(ctx, cw, ref)
		err = fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	if err == nil && !onePass {
		f.say("Download complete", 0, 0)
	}
	return err
}

// abort forgets what was received: to resume from it would repeat the error.
func (f *layerFlight) abort(ctx context.Context, cw content.Writer, ref string) {
	cw.Close()
	if err := f.w.s.o.Content.Abort(context.WithoutCancel(ctx), ref); err != nil && !errdefs.IsNotFound(err) {
		f.w.s.o.Log.Warn("broken download stays", "ref", ref, "err", err)
	}
}

// download copies a blob to the store, and to the unpacker if there is one.
type download struct {
	f    *layerFlight
	body io.Reader
	to   io.Writer
	off  int64
}

// run ends when the blob has been stored, even if the unpacker gave up before.
func (d *download) run(ctx context.Context, out *chunkWriter) error {
	for {
		c := newChunk()
		n, err := readChunk(d.body, c.buf[:])
		c.n = n
		if n > 0 {
			if _, werr := d.to.Write(c.buf[:n]); werr != nil {
				c.free()
				return werr
			}
			d.off += int64(n)
			d.f.say("Downloading", d.off, d.f.l.desc.Size)
		}
		if out == nil || n == 0 {
			c.free()
		} else if werr := out.send(ctx, c); werr != nil && !errors.Is(werr, errReaderGone) {
			return werr
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
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

// decode decompresses, and hands each piece to the unpacker and to the hash.
func (f *layerFlight) decode(ctx context.Context, in io.Reader, to ...*chunkWriter) error {
	dec, err := unpack.NewDecoder(in, f.w.s.o.Limits)
	if err != nil {
		return err
	}
	defer dec.Close()
	for {
		c := newChunk()
		n, err := readChunk(dec, c.buf[:])
		c.n = n
		if n == 0 {
			c.free()
		} else {
			c.refs.Store(int32(len(to)))
			for i, w := range to {
				if werr := w.send(ctx, c); werr != nil {
					for range to[i+1:] {
						c.free()
					}
					return werr
				}
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

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

// fromStore unpacks the blob of the store.
func (f *layerFlight) fromStore(ctx context.Context) error {
	ra, err := f.w.s.o.Content.ReaderAt(ctx, f.l.desc)
	if err != nil {
		return err
	}
	defer ra.Close()
	size := ra.Size()
	if isErofs(f.l.desc.MediaType) {
		return f.fromErofs(ctx, ra, size)
	}
	src := &extraction{f: f, r: io.NewSectionReader(ra, 0, size), size: size}
	return f.apply(ctx, src.run, f.l.diffID)
}

// extraction feeds a stored blob to the unpacker.
type extraction struct {
	f         *layerFlight
	r         io.Reader
	off, size int64
}

func (e *extraction) run(ctx context.Context, out *chunkWriter) error {
	for {
		c := newChunk()
		n, err := readChunk(e.r, c.buf[:])
		c.n = n
		if n == 0 {
			c.free()
		} else if werr := out.send(ctx, c); werr != nil {
			if errors.Is(werr, errReaderGone) {
				return nil
			}
			return werr
		}
		e.off += int64(n)
		e.f.say("Extracting", e.off, e.size)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
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
