package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// maxReconnects bounds how often one blob is asked for again in all, even if each
	// connection brings a little.
	maxReconnects = 100
	// minProgress is what a host has to send within each timeout.
	minProgress = 16 << 10
)

// errStalled ends a connection that brings next to nothing.
var errStalled = errors.New("registry sends too slowly")

// Blob streams a blob from an offset on. The stream is exactly as long as the
// descriptor says or ends in an error; a lost connection is taken up where it broke.
// The digest is for the reader to check.
func (r *Repository) Blob(ctx context.Context, desc ocispec.Descriptor, offset int64) (io.ReadCloser, error) {
	b := &blob{r: r, ctx: ctx, desc: desc, off: offset}
	if err := b.connect(); err != nil {
		return nil, err
	}
	return b, nil
}

type blob struct {
	r    *Repository
	ctx  context.Context
	desc ocispec.Descriptor
	off  int64

	body       io.ReadCloser
	watch      *watch
	fails      int // in a row, without a byte
	stalls     int
	reconnects int
}

// watch ends a connection that brings too little.
type watch struct {
	cancel context.CancelCauseFunc
	every  time.Duration
	got    atomic.Int64 // bytes since it looked last

	mu    sync.Mutex
	timer *time.Timer // nil: stopped
}

func newWatch(every time.Duration, cancel context.CancelCauseFunc) *watch {
	w := &watch{cancel: cancel, every: every}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.timer = time.AfterFunc(every, w.look)
	return w
}

func (w *watch) look() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.timer == nil {
		return
	}
	if w.got.Swap(0) < minProgress {
		w.cancel(errStalled)
		return
	}
	w.timer.Reset(w.every)
}

func (w *watch) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.timer != nil {
		w.timer.Stop()
		w.timer = nil
	}
	w.cancel(nil)
}

// connect asks the hosts for the rest of the blob.
func (b *blob) connect() error {
	b.disconnect()
	if b.off == b.desc.Size {
		b.body = http.NoBody
		return nil
	}
	ctx, cancel := context.WithCancelCause(b.ctx)
	err := b.r.each(ctx, docker.HostCapabilityPull, func(h docker.RegistryHost) error {
		header := http.Header{"Accept-Encoding": {"identity"}, "Accept": {b.desc.MediaType + ", */*"}}
		if b.off > 0 {
			// Some registries do not know ranges with an open end.
			header.Set("Range", fmt.Sprintf("bytes=%d-%d", b.off, b.desc.Size-1))
		}
		resp, err := b.r.get(ctx, h, http.MethodGet, "blobs/"+b.desc.Digest.String(), nil, header)
		if err != nil {
			return err
		}
		if err := b.position(resp, h); err != nil {
			resp.Body.Close()
			return err
		}
		b.body = resp.Body
		return nil
	})
	if err != nil {
		cancel(nil)
		return fmt.Errorf("fetch blob %s: %w", b.desc.Digest, err)
	}
	b.watch = newWatch(b.r.c.o.Timeout, cancel)
	return nil
}

// position checks that an answer continues at the offset.
func (b *blob) position(resp *http.Response, h docker.RegistryHost) error {
	switch resp.StatusCode {
	case http.StatusOK:
		if n := resp.ContentLength; n >= 0 && n != b.desc.Size {
			return fmt.Errorf("registry %s has %d bytes, not %d: %w", h.Host, n, b.desc.Size, errdefs.ErrDataLoss)
		}
		// The host does not know ranges.
		if n, err := io.CopyN(io.Discard, resp.Body, b.off); n < b.off {
			return fmt.Errorf("registry %s: %w: %w", h.Host, err, errdefs.ErrUnavailable)
		}
		return nil
	case http.StatusPartialContent:
		// Content-Range: bytes FIRST-LAST/SIZE (RFC 9110, 14.4)
		first, _, _ := strings.Cut(strings.TrimPrefix(resp.Header.Get("Content-Range"), "bytes "), "-")
		if n, err := strconv.ParseInt(first, 10, 64); err != nil || n != b.off {
			return fmt.Errorf("registry %s sent range %q instead of one from %d: %w", h.Host, clip(resp.Header.Get("Content-Range"), 80), b.off, errdefs.ErrInvalidArgument)
		}
		return nil
	case http.StatusNotFound:
		return fmt.Errorf("registry %s does not have it: %w", h.Host, errdefs.ErrNotFound)
	}
	return b.r.statusError(resp, h, b.desc.Digest.String())
}

func (b *blob) Read(p []byte) (int, error) {
	for {
		left := b.desc.Size - b.off
		if left == 0 {
			return 0, b.end()
		}
		if int64(len(p)) > left {
			p = p[:left]
		}
		n, err := b.body.Read(p)
		if errors.Is(err, context.Canceled) && b.ctx.Err() == nil {
			err = errStalled
		}
		if n > 0 {
			b.off += int64(n)
			b.watch.got.Add(int64(n))
			b.fails = 0
			return n, nil // an error comes again with the next call
		}
		if err == nil {
			continue
		}
		if b.ctx.Err() != nil {
			return 0, context.Cause(b.ctx)
		}
		if err := b.again(err); err != nil {
			return 0, err
		}
	}
}

// again connects anew after the connection broke with err.
func (b *blob) again(err error) error {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	for {
		b.fails++
		b.reconnects++
		if errors.Is(err, errStalled) {
			b.stalls++
		}
		if max(b.fails, b.stalls) >= b.r.c.o.Attempts || b.reconnects > maxReconnects {
			return fmt.Errorf("fetch blob %s: at byte %d of %d: %w: %w", b.desc.Digest, b.off, b.desc.Size, redact(err), errdefs.ErrUnavailable)
		}
		b.r.c.o.Log.Debug("blob interrupted, resuming", "digest", b.desc.Digest, "offset", b.off, "err", redact(err))
		select {
		case <-time.After(delay(b.r.c.o.Backoff, b.fails)):
		case <-b.ctx.Done():
			return context.Cause(b.ctx)
		}
		err = b.connect()
		if err == nil || !errdefs.IsUnavailable(err) {
			return err
		}
	}
}

// end checks that the host has nothing more to send than was announced.
func (b *blob) end() error {
	if b.body == http.NoBody {
		return io.EOF
	}
	var one [1]byte
	n, _ := b.body.Read(one[:])
	b.disconnect()
	b.body = http.NoBody
	if n > 0 {
		return fmt.Errorf("blob %s is longer than %d bytes: %w", b.desc.Digest, b.desc.Size, errdefs.ErrDataLoss)
	}
	return io.EOF
}

func (b *blob) disconnect() {
	if b.watch != nil {
		b.watch.stop()
	}
	if b.body != nil {
		b.body.Close()
	}
	b.body, b.watch = nil, nil
}

// Close ends the connection.
func (b *blob) Close() error {
	b.disconnect()
	b.body = http.NoBody
	return nil
}
