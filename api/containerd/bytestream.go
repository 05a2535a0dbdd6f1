package containerd

import (
	"context"
	"fmt"
	"io"
	"sync"

	transferapi "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/errdefs"
)

// Bytes go over a stream as Data messages; whoever reads them says with WindowUpdates how many
// it takes (api/types/transfer/streaming.proto).
const (
	byteWindow = 1 << 20  // that we take ahead of their being read
	byteChunk  = 32 << 10 // of a message that we send
)

// byteReader reads what a client sends.
type byteReader struct {
	st      *stream
	granted int64 // that the client may still send
	rest    []byte
	err     error
}

func (r *byteReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		if r.err != nil {
			return 0, r.err
		}
		if r.granted < byteWindow/2 {
			add := byteWindow - r.granted
			// A client that has sent all may have closed its side: then what it sent counts.
			if r.st.send(&transferapi.WindowUpdate{Update: int32(add)}) == nil {
				r.granted += add
			}
		}
		m, err := r.st.recv()
		if err != nil {
			r.err = err // io.EOF when the client has sent all
			continue
		}
		var d transferapi.Data
		if err := m.UnmarshalTo(&d); err != nil {
			r.err = invalidf("stream of bytes: %v", err)
			continue
		}
		r.rest = d.GetData()
		r.granted -= int64(len(r.rest))
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// byteWriter sends bytes to a client, not more than it takes.
type byteWriter struct {
	ctx context.Context
	st  *stream

	once    sync.Once
	mu      sync.Mutex
	window  int64
	err     error         // the client has gone
	changed chan struct{} // of one place
}

// listen hears what the client takes.
func (w *byteWriter) listen() {
	for {
		m, err := w.st.recv()
		var u transferapi.WindowUpdate
		if err == nil {
			if uerr := m.UnmarshalTo(&u); uerr != nil {
				continue
			}
		}
		w.mu.Lock()
		w.window += int64(max(u.GetUpdate(), 0))
		if err != nil && w.err == nil {
			w.err = fmt.Errorf("the client reads no more: %w", err)
		}
		w.mu.Unlock()
		select {
		case w.changed <- struct{}{}:
		default:
		}
		if err != nil {
			return
		}
	}
}

// take waits until the client takes bytes, and gives how many of n may be sent.
func (w *byteWriter) take(n int) (int, error) {
	for {
		w.mu.Lock()
		got, err := min(int64(n), w.window), w.err
		if got > 0 {
			w.window -= got
		}
		w.mu.Unlock()
		if got > 0 {
			return int(got), nil
		}
		if err != nil {
			return 0, err
		}
		select {
		case <-w.changed:
		case <-w.ctx.Done():
			return 0, context.Cause(w.ctx)
		}
	}
}

func (w *byteWriter) Write(p []byte) (total int, _ error) {
	w.once.Do(func() {
		w.changed = make(chan struct{}, 1)
		go w.listen() // ends with the stream
	})
	for len(p) > 0 {
		n, err := w.take(min(len(p), byteChunk))
		if err != nil {
			return total, err
		}
		if err := w.st.send(&transferapi.Data{Data: p[:n]}); err != nil {
			return total, fmt.Errorf("send bytes: %w: %w", err, errdefs.ErrUnavailable)
		}
		total, p = total+n, p[n:]
	}
	return total, nil
}

var (
	_ io.Reader = (*byteReader)(nil)
	_ io.Writer = (*byteWriter)(nil)
)
