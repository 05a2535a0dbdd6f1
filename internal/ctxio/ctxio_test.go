package ctxio

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

func TestReader(t *testing.T) {
	t.Parallel()
	why := errors.New("why")
	ctx, cancel := context.WithCancelCause(context.Background())
	var told []int64
	r := Reader(ctx, iotest.OneByteReader(strings.NewReader("abc")), func(n int64) { told = append(told, n) })
	if b, err := io.ReadAll(io.LimitReader(r, 2)); string(b) != "ab" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	cancel(why)
	if n, err := r.Read(make([]byte, 1)); n != 0 || err != why {
		t.Errorf("after the end of the context %d, %v", n, err)
	}
	if len(told) != 2 || told[0] != 1 || told[1] != 2 {
		t.Errorf("told %v", told)
	}
	if b, err := io.ReadAll(Reader(context.Background(), strings.NewReader("abc"), nil)); string(b) != "abc" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
}
