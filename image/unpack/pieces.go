//go:build linux

package unpack

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/erofs"
)

// pieceReader lets a tar reader pass over the contents of files, which it does with Seek,
// without copying them: what is passed over goes to the image as it lies in the
// stream's own buffers.
type pieceReader struct {
	in   Pieces
	left int64 // until the limit
	err  error // that ended the stream

	piece []byte // what is left of it
	done  func()
	pos   int64
	copy  int64 // the next bytes that go to out
	out   dataWriter
}

// copyNext has the next n bytes of the stream written to the image, at the returned address,
// when they are read or passed over.
func (r *pieceReader) copyNext(n int64) int64 {
	r.copy = n
	return r.out.begin()
}

// fill makes sure that there is a piece.
func (r *pieceReader) fill() error {
	for len(r.piece) == 0 {
		r.release()
		if r.out.err != nil {
			return r.out.err
		}
		if r.err != nil {
			return r.err
		}
		b, done, err := r.in.Next()
		if err != nil {
			r.err = err
			return err
		}
		r.piece, r.done = b, done
		if r.left -= int64(len(b)); r.left < 0 {
			r.piece, r.err = nil, fmt.Errorf("layer is larger than the limit: %w", errdefs.ErrResourceExhausted)
		}
	}
	return nil
}

// release gives the piece back, when what the image needs of it has been written.
func (r *pieceReader) release() {
	if r.done != nil {
		r.out.flush()
		r.done()
		r.done, r.piece = nil, nil
	}
}

// take consumes n bytes of the piece.
func (r *pieceReader) take(n int) []byte {
	b := r.piece[:n]
	r.piece = r.piece[n:]
	r.pos += int64(n)
	if m := min(r.copy, int64(n)); m > 0 {
		r.copy -= m
		r.out.add(b[:m])
	}
	return b
}

// Read is io.Reader.
func (r *pieceReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := r.fill(); err != nil {
		return 0, err
	}
	return copy(p, r.take(min(len(p), len(r.piece)))), nil
}

// Seek goes forward from where the reader is, which is all that a tar reader asks for.
func (r *pieceReader) Seek(offset int64, whence int) (int64, error) {
	if whence != io.SeekCurrent || offset < 0 {
		return 0, errors.ErrUnsupported
	}
	for offset > 0 {
		err := r.fill()
		if errors.Is(err, io.EOF) {
			return r.pos, io.ErrUnexpectedEOF
		}
		if err != nil {
			return r.pos, err
		}
		n := min(offset, int64(len(r.piece)))
		r.take(int(n))
		offset -= n
	}
	return r.pos, nil
}

// dataWriter writes files' data into an image, one behind the other, each at a block boundary.
// Slices are kept until flush.
type dataWriter struct {
	f         *os.File
	pos       int64 // where the next byte goes
	start     int64 // of what is queued
	queue     [][]byte
	slots     [maxQueued][]byte // what queue is made of
	flushed   int64             // the kernel was told to write what is before it
	writeback bool
	sum       *erofs.Sum // of all of it
	err       error
}

const (
	maxQueued = 512     // below UIO_MAXIOV
	writeFrom = 8 << 20 // how much is written before the disk is told to begin with it
)

var padding [erofs.BlockSize]byte

// aligned gives the next address at which data may begin.
func (w *dataWriter) aligned() int64 {
	return (w.pos + erofs.BlockSize - 1) &^ (erofs.BlockSize - 1)
}

// begin starts a new file.
func (w *dataWriter) begin() int64 {
	at := w.aligned()
	if len(w.queue) > 0 && w.pos < at {
		w.queue = append(w.queue, padding[:at-w.pos])
	}
	w.pos = at
	return at
}

func (w *dataWriter) add(b []byte) {
	if len(w.queue) == 0 {
		w.queue, w.start = w.slots[:0], w.pos
	}
	w.queue = append(w.queue, b)
	w.sum.Add(b, w.pos)
	w.pos += int64(len(b))
	if len(w.queue) >= maxQueued-1 { // padding comes on top
		w.flush()
	}
}

func (w *dataWriter) flush() {
	for len(w.queue) > 0 && w.err == nil {
		n, err := unix.Pwritev(int(w.f.Fd()), w.queue, w.start)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && n == 0 {
			err = io.ErrShortWrite
		}
		if err != nil {
			w.err = fmt.Errorf("write image: %w", err)
			break
		}
		w.start += int64(n)
		for len(w.queue) > 0 && n >= len(w.queue[0]) {
			n -= len(w.queue[0])
			w.queue = w.queue[1:]
		}
		if n > 0 {
			w.queue[0] = w.queue[0][n:]
		}
	}
	w.queue = w.slots[:0]
	if w.writeback && w.pos-w.flushed >= writeFrom {
		// Advice: the sync at the end is what makes it durable.
		_ = unix.SyncFileRange(int(w.f.Fd()), w.flushed, w.pos-w.flushed, unix.SYNC_FILE_RANGE_WRITE)
		w.flushed = w.pos
	}
}

// writeAt writes at a block boundary that aligned gave.
func (w *dataWriter) writeAt(b []byte, at int64) error {
	w.flush()
	if w.err != nil {
		return w.err
	}
	if err := pwriteAll(int(w.f.Fd()), b, at); err != nil {
		w.err = fmt.Errorf("write image: %w", err)
		return w.err
	}
	w.sum.Add(b, at)
	w.pos = at + int64(len(b))
	return nil
}
