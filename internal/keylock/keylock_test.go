package keylock

import (
	"context"
	"errors"
	"sync"
	"testing"
)

func TestLock(t *testing.T) {
	t.Parallel()
	var l Locks
	a, err := l.Lock(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Lock(t.Context(), "b")
	if err != nil {
		t.Fatal(err)
	}
	gone := errors.New("gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(gone)
	if _, err := l.Lock(ctx, "a"); !errors.Is(err, gone) {
		t.Errorf("what somebody has was given to one who is gone: %v", err)
	}
	a()
	b()
	inside := 0
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			unlock, err := l.Lock(t.Context(), "a")
			if err != nil {
				t.Error(err)
				return
			}
			if inside++; inside != 1 {
				t.Errorf("%d have it", inside)
			}
			inside--
			unlock()
		})
	}
	wg.Wait()
	if len(l.m) != 0 {
		t.Errorf("%d keys are kept for nobody", len(l.m))
	}
}
