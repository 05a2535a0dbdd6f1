package engine

import (
	"context"
	"sync"

	"github.com/hako-engine/hako/image"
)

// imageUse keeps apart who needs an image for a while, without a container that shows it,
// and who removes it. The zero value is ready.
type imageUse struct {
	mu      sync.Mutex
	users   map[string]int           // by image id
	leaving map[string]chan struct{} // by image id; closed when the removal has ended
	removed uint64                   // removals that ended
}

// use waits for a removal under way, and then keeps others from beginning.
func (u *imageUse) use(ctx context.Context, id string) (done func(), err error) {
	for {
		u.mu.Lock()
		leaving := u.leaving[id]
		if leaving == nil {
			if u.users == nil {
				u.users = map[string]int{}
			}
			u.users[id]++
			u.mu.Unlock()
			return func() { u.unuse(id) }, nil
		}
		u.mu.Unlock()
		select {
		case <-leaving:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func (u *imageUse) unuse(id string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.users[id]--; u.users[id] <= 0 {
		delete(u.users, id)
	}
}

// remove waits for another removal, and then keeps others from using the image. busy
// tells that some use it already.
func (u *imageUse) remove(ctx context.Context, id string) (done func(), busy bool, err error) {
	for {
		u.mu.Lock()
		leaving := u.leaving[id]
		if leaving == nil {
			if u.leaving == nil {
				u.leaving = map[string]chan struct{}{}
			}
			mine := make(chan struct{})
			u.leaving[id] = mine
			busy = u.users[id] > 0
			u.mu.Unlock()
			return func() {
				u.mu.Lock()
				defer u.mu.Unlock()
				delete(u.leaving, id)
				u.removed++
				close(mine)
			}, busy, nil
		}
		u.mu.Unlock()
		select {
		case <-leaving:
		case <-ctx.Done():
			return nil, false, context.Cause(ctx)
		}
	}
}

func (u *imageUse) removals() uint64 {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.removed
}

// useImage finds an image, and keeps it from being removed until done is called.
func (e *Engine) useImage(ctx context.Context, find func() (image.Image, error)) (img image.Image, done func(), err error) {
	u := &e.containers.images
	for {
		before := u.removals()
		if img, err = find(); err != nil {
			return img, nil, err
		}
		if done, err = u.use(ctx, img.ID.String()); err != nil {
			return img, nil, err
		}
		if u.removals() == before {
			return img, done, nil
		}
		done() // it may have been removed after it was found
	}
}

// removingImage finds an image, and keeps it from coming into use until done is called.
func (e *Engine) removingImage(ctx context.Context, ref string) (img image.Image, busy bool, done func(), err error) {
	for {
		if img, err = e.image(ctx, ref); err != nil {
			return img, false, nil, err
		}
		if done, busy, err = e.containers.images.remove(ctx, img.ID.String()); err != nil {
			return img, false, nil, err
		}
		again, err := e.image(ctx, ref)
		if err == nil && again.ID == img.ID {
			return again, busy, done, nil
		}
		done()
		if err != nil {
			return img, false, nil, err
		}
	}
}
