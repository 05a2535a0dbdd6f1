package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/image/unpack"
	"github.com/hako-engine/hako/internal/ctxio"
)

// isErofs tells that a layer is no tar archive, but a file system.
func isErofs(mediaType string) bool { return mediaType == erofsLayer || mediaType == erofsLayerZstd }

// fromErofs unpacks a layer in EROFS form: read here, whatever the kernel would make of it, and handed on as a tar
// archive would be. With the EROFS snapshotter it so becomes an image of hako's own.
func (f *layerFlight) fromErofs(ctx context.Context, ra io.ReaderAt, size int64) error {
	image, err := openErofs(ctx, ra, size, f.l.desc, f.root, f.w.s.o.Limits)
	if err != nil {
		return err
	}
	defer image.close()
	if image.diffID != f.l.diffID {
		return fmt.Errorf("layer in EROFS form has diff id %s, not %s as the config says: %w", image.diffID, f.l.diffID, errdefs.ErrDataLoss)
	}
	feed := func(ctx context.Context, out *chunkWriter) error {
		f.say("Extracting", 0, image.size)
		w := &chunkSink{ctx: ctx, to: out}
		err := unpack.ErofsTar(ctx, w, image, image.size, f.w.s.o.Limits)
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

// erofsImage is the file system of a layer, whose digest is the diff id.
type erofsImage struct {
	io.ReaderAt
	size   int64
	diffID digest.Digest
	close  func()
}

// openErofs decompresses a blob of the store if that is needed, to a file in dir.
func openErofs(ctx context.Context, ra io.ReaderAt, size int64, desc ocispec.Descriptor, dir string, l unpack.Limits) (_ erofsImage, err error) {
	if desc.MediaType == erofsLayer {
		return erofsImage{ra, size, desc.Digest, func() {}}, nil // the store has seen to the digest
	}
	tmp, err := nameless(dir)
	if err != nil {
		return erofsImage{}, err
	}
	defer func() {
		if err != nil {
			tmp.Close()
		}
	}()
	dec, err := unpack.NewDecoder(io.NewSectionReader(ra, 0, size), l)
	if err != nil {
		return erofsImage{}, err
	}
	defer dec.Close()
	hash := digest.SHA256.Hash()
	n, err := io.Copy(io.MultiWriter(tmp, hash), ctxio.Reader(ctx, dec, nil))
	return erofsImage{tmp, n, digest.NewDigest(digest.SHA256, hash), func() { tmp.Close() }}, err
}

// applyErofs is applyStream for a layer in EROFS form.
func (s *Service) applyErofs(ctx context.Context, root *os.File, ra io.ReaderAt, size int64, desc ocispec.Descriptor, mode unpack.Mode) (digest.Digest, int64, error) {
	image, err := openErofs(ctx, ra, size, desc, fmt.Sprintf("/proc/self/fd/%d", root.Fd()), s.o.Limits)
	if err != nil {
		return "", 0, err
	}
	defer image.close()
	r, w := io.Pipe()
	written := make(chan struct{})
	go func() {
		defer close(written)
		w.CloseWithError(unpack.ErofsTar(ctx, w, image, image.size, s.o.Limits))
	}()
	_, _, err = s.applyStream(ctx, root, r, mode)
	r.Close()
	<-written
	return image.diffID, image.size, err
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
