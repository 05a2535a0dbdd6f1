package image

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/unpack"
)

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
