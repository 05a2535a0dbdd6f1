package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/image/unpack"
)

// isErofs tells that a layer is no tar archive, but a file system.
func (l layer) isErofs() bool {
	return l.desc.MediaType == erofsLayer || l.desc.MediaType == erofsLayerZstd
}

// fromErofs unpacks a layer in EROFS form: read here, whatever the kernel would make of it, and handed on as a tar
// archive would be. With the EROFS snapshotter it so becomes an image of hako's own.
func (f *layerFlight) fromErofs(ctx context.Context, ra io.ReaderAt, size int64) error {
	image, size, done, err := f.erofsImage(ctx, ra, size)
	if err != nil {
		return err
	}
	defer done()
	feed := func(ctx context.Context, out *chunkWriter) error {
		f.say("Extracting", 0, size)
		w := &chunkSink{ctx: ctx, to: out}
		err := unpack.ErofsTar(ctx, w, image, size, f.w.s.o.Limits)
		if err == nil {
			err = w.flush()
		}
		w.drop()
		if errors.Is(err, errReaderGone) { // who reads knows why
			err = nil
		}
		return err
	}
	return f.apply(ctx, feed, "")
}

// erofsImage gives the file system itself, whose digest is the diff id.
func (f *layerFlight) erofsImage(ctx context.Context, ra io.ReaderAt, size int64) (image io.ReaderAt, n int64, done func(), err error) {
	wrong := func(got digest.Digest) error {
		return fmt.Errorf("layer in EROFS form has diff id %s, not %s as the config says: %w", got, f.l.diffID, errdefs.ErrDataLoss)
	}
	if f.l.desc.MediaType == erofsLayer {
		// The store has seen to the digest.
		if f.l.diffID != f.l.desc.Digest {
			return nil, 0, nil, wrong(f.l.desc.Digest)
		}
		return ra, size, func() {}, nil
	}
	tmp, err := nameless(f.root)
	if err != nil {
		return nil, 0, nil, err
	}
	defer func() {
		if err != nil {
			tmp.Close()
		}
	}()
	dec, err := unpack.NewDecoder(io.NewSectionReader(ra, 0, size), f.w.s.o.Limits)
	if err != nil {
		return nil, 0, nil, err
	}
	defer dec.Close()
	hash := f.l.diffID.Algorithm().Hash()
	n, err = io.Copy(io.MultiWriter(tmp, hash), readerFunc(func(p []byte) (int, error) {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		return dec.Read(p)
	}))
	if err != nil {
		return nil, 0, nil, err
	}
	if got := digest.NewDigest(f.l.diffID.Algorithm(), hash); got != f.l.diffID {
		return nil, 0, nil, wrong(got)
	}
	return tmp, n, func() { tmp.Close() }, nil
}

// nameless makes a file that is gone when it is closed: in dir, where the layer has room, if its file system can.
func nameless(dir string) (*os.File, error) {
	if fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600); err == nil {
		return os.NewFile(uintptr(fd), "layer"), nil
	}
	f, err := os.CreateTemp("", "hako-layer-*")
	if err != nil {
		return nil, err
	}
	return f, os.Remove(f.Name())
}

type readerFunc func([]byte) (int, error)

func (r readerFunc) Read(p []byte) (int, error) { return r(p) }

// chunkSink is an io.Writer before a pipe of chunks.
type chunkSink struct {
	ctx context.Context
	to  *chunkWriter
	c   *chunk
}

func (s *chunkSink) Write(p []byte) (n int, err error) {
	for n < len(p) {
		if s.c == nil {
			s.c = newChunk()
			s.c.n = 0
		}
		m := copy(s.c.buf[s.c.n:], p[n:])
		s.c.n += m
		n += m
		if s.c.n == len(s.c.buf) {
			if err := s.flush(); err != nil {
				return n, err
			}
		}
	}
	return n, nil
}

func (s *chunkSink) flush() error {
	c := s.c
	if c == nil || c.n == 0 {
		return nil
	}
	s.c = nil
	return s.to.send(s.ctx, c)
}

// drop gives back what was not sent.
func (s *chunkSink) drop() {
	if s.c != nil {
		s.c.free()
		s.c = nil
	}
}
