package engine

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/hako-engine/hako/image"
)

// Whoever found an image before it was removed, and uses it afterwards, looks again.
func TestUseOfAnImageThatIsRemoved(t *testing.T) {
	t.Parallel()
	e := &Engine{}
	ctx := context.Background()
	id := digest.FromString("image")
	var there atomic.Bool
	there.Store(true)
	find := func() (image.Image, error) {
		if !there.Load() {
			return image.Image{}, errdefs.ErrNotFound
		}
		return image.Image{ID: id}, nil
	}
	_, done, err := e.useImage(ctx, find)
	if err != nil {
		t.Fatal(err)
	}
	end, busy, err := e.containers.images.remove(ctx, id.String())
	if err != nil || !busy {
		t.Fatalf("removal of an image in use: busy %v, %v", busy, err)
	}
	done()
	end()

	end, busy, err = e.containers.images.remove(ctx, id.String())
	if err != nil || busy {
		t.Fatalf("removal: busy %v, %v", busy, err)
	}
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if _, _, err := e.useImage(short, find); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("use during a removal: %v", err)
	}
	got := make(chan error)
	go func() {
		_, _, err := e.useImage(ctx, find)
		got <- err
	}()
	time.Sleep(20 * time.Millisecond) // it has found the image by now, or will not at all
	there.Store(false)
	end()
	if err := <-got; !errdefs.IsNotFound(err) {
		t.Errorf("use after the removal: %v", err)
	}
	if len(e.containers.images.users) != 0 || len(e.containers.images.leaving) != 0 {
		t.Errorf("left %+v", &e.containers.images)
	}
}
