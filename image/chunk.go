package image

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
)

// chunkSize is what the stages of unpacking a layer hand to each other at a time, and
// chunksQueued how many may wait: enough that one stage does not stop the others at
// once, little enough that many layers side by side stay small.
const (
	chunkSize    = 128 << 10
	chunksQueued = 8
)

// chunk is a piece of a stream that has one or more readers.
type chunk struct {
	n    int
	refs atomic.Int32
	buf  [chunkSize]byte
}

var chunks = sync.Pool{New: func() any { return new(chunk) }}

func newChunk() *chunk {
	c := chunks.Get().(*chunk)
	c.refs.Store(1)
	return c
}

func (c *chunk) free() {
	if c.refs.Add(-1) == 0 {
		chunks.Put(c)
	}
}

// readChunk fills buf unless the stream ends before; n may be > 0 with an error.
func readChunk(r io.Reader, buf []byte) (n int, err error) {
	for n < len(buf) && err == nil {
		var m int
		m, err = r.Read(buf[n:])
		n += m
	}
	return n, err
}

var errReaderGone = errors.New("nobody reads any more")

// newChunkPipe connects two goroutines. Unlike io.Pipe it queues, and does not copy on
// the writer's side.
func newChunkPipe() (*chunkReader, *chunkWriter) {
	p := &chunkPipe{ch: make(chan *chunk, chunksQueued), gone: make(chan struct{})}
	return &chunkReader{p: p}, &chunkWriter{p}
}

type chunkPipe struct {
	ch   chan *chunk
	err  error // set before ch is closed
	gone chan struct{}
	once sync.Once
}

type chunkWriter struct{ p *chunkPipe }

// send hands over a chunk (one reference of it), in any case.
func (w *chunkWriter) send(ctx context.Context, c *chunk) error {
	select {
	case w.p.ch <- c:
		return nil
	case <-w.p.gone:
		c.free()
		return errReaderGone
	case <-ctx.Done():
		c.free()
		return context.Cause(ctx)
	}
}

// close ends the stream with err, nil for its regular end.
func (w *chunkWriter) close(err error) {
	w.p.err = err
	close(w.p.ch)
}

type chunkReader struct {
	p   *chunkPipe
	cur *chunk
	off int
}

func (r *chunkReader) Read(b []byte) (int, error) {
	for r.cur == nil {
		select {
		case <-r.p.gone:
			return 0, errReaderGone
		default:
		}
		c, ok := <-r.p.ch
		if !ok {
			if r.p.err != nil {
				return 0, r.p.err
			}
			return 0, io.EOF
		}
		r.cur, r.off = c, 0
	}
	n := copy(b, r.cur.buf[r.off:r.cur.n])
	if r.off += n; r.off == r.cur.n {
		r.cur.free()
		r.cur = nil
	}
	return n, nil
}

// Next hands out a chunk as it is, until done is called.
func (r *chunkReader) Next() (b []byte, done func(), err error) {
	for r.cur == nil {
		if _, err := r.Read(nil); err != nil {
			return nil, nil, err
		}
	}
	c := r.cur
	r.cur = nil
	return c.buf[r.off:c.n], c.free, nil
}

// WriteTo spares io.Copy its buffer.
func (r *chunkReader) WriteTo(w io.Writer) (total int64, err error) {
	for {
		var empty [0]byte
		if r.cur == nil {
			if _, err := r.Read(empty[:]); err != nil {
				if errors.Is(err, io.EOF) {
					err = nil
				}
				return total, err
			}
		}
		n, err := w.Write(r.cur.buf[r.off:r.cur.n])
		total += int64(n)
		r.cur.free()
		r.cur = nil
		if err != nil {
			return total, err
		}
	}
}

// Close tells the writer to stop. It may be called from any goroutine.
func (r *chunkReader) Close() { r.p.once.Do(func() { close(r.p.gone) }) }
