// Package ctxio makes streams end with a context.
//
// In flow a context and a reader; out flows what it reads, until the context is over.
package ctxio

import (
	"context"
	"io"
)

// Reader reads from r until ctx is over, and then fails with its cause. tell, if there is one, hears after each Read
// how many bytes have come so far. A Read that blocks is not interrupted.
func Reader(ctx context.Context, r io.Reader, tell func(bytes int64)) io.Reader {
	return &reader{ctx, r, tell, 0}
}

type reader struct {
	ctx  context.Context
	r    io.Reader
	tell func(int64)
	n    int64
}

func (r *reader) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	n, err := r.r.Read(p)
	if r.tell != nil {
		r.n += int64(n)
		r.tell(r.n)
	}
	return n, err
}
