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
	waits := newReachContext(ctx)
	go func() {
		_, _, err := e.useImage(waits, find)
		got <- err
	}()
	<-waits.reached // it has found the image
	there.Store(false)
	end()
	if err := <-got; !errdefs.IsNotFound(err) {
		t.Errorf("use after the removal: %v", err)
	}
	if len(e.containers.images.users) != 0 || len(e.containers.images.leaving) != 0 {
		t.Errorf("left %+v", &e.containers.images)
	}
}

// staleImages lists what was there a moment ago.
type staleImages struct {
	*fakeImages
	listed []image.Image
}

func (s *staleImages) List(context.Context) ([]image.Image, error) { return s.listed, nil }

// An image that got a name, or a container, after a prune listed it, stays.
func TestPruneOfAnImageThatCameIntoUse(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	tagged := image.Image{ID: digest.FromString("tagged"), Names: []string{"docker.io/library/new:name"}}
	idle := image.Image{ID: digest.FromString("idle")}
	n.images.imgs = append(n.images.imgs, tagged, idle)
	before := tagged
	before.Names = nil
	n.e.opt.Images = &staleImages{n.images, []image.Image{before, idle}}
	removed, _, err := n.e.PruneImages(context.Background(), nil)
	if err != nil || len(removed) != 1 || removed[0].Deleted != idle.ID.String() {
		t.Errorf("%+v %v", removed, err)
	}
	if _, err := n.images.Get(context.Background(), "new:name", nil); err != nil {
		t.Error(err)
	}
	done, err := n.e.containers.images.use(context.Background(), tagged.ID.String())
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	if removed, _, err := n.e.PruneImages(context.Background(), Filters{"dangling": {"false"}}); err != nil || len(removed) != 0 {
		t.Errorf("one in use: %+v %v", removed, err)
	}
}
