package image

import (
	"bytes"
	"fmt"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// whole checks that an image that somebody was told of is here, with all that is in it.
func (r *rig) whole(name string, img Image) error {
	got, err := r.Get(r.ctx, name, nil)
	if err != nil {
		return err
	}
	if got.ID != img.ID {
		return fmt.Errorf("%s is %s, not %s", name, got.ID, img.ID)
	}
	for _, d := range append([]ocispec.Descriptor{img.Target, img.Manifest, img.Config}, img.Layers...) {
		b, err := content.ReadBlob(r.ctx, r.store.Content(), d)
		if err != nil {
			return err
		}
		if d.Digest.Algorithm().FromBytes(b) != d.Digest {
			return fmt.Errorf("%s holds something else", d.Digest)
		}
	}
	key := "whole-" + name
	if _, err := r.over.View(r.ctx, key, img.ChainID.String()); err != nil {
		return err
	}
	return r.over.Remove(r.ctx, key)
}

// Loads, pulls, tags and removals of images that share their layers, beside a garbage
// collection that never rests: none of them fails, and what was acknowledged is there.
func TestNothingIsLostBesideGC(t *testing.T) {
	t.Parallel()
	r, s := newRig(t), newServer(t)
	shared := tarOf(t, dir("etc", 0o755), file("etc/shared", "shared"))
	images := make([]*built, 2)
	plain := make([][][]byte, 2)
	for i := range images {
		plain[i] = [][]byte{shared, shared, tarOf(t, file("etc/shared", fmt.Sprint(i)))}
		images[i] = build(t, nil, plain[i]...)
		s.push(t, "app", fmt.Sprint("v", i), images[i])
	}
	stop := make(chan struct{})
	var gc, work sync.WaitGroup
	gc.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				if _, err := r.store.GC(r.ctx); err != nil {
					t.Error(err)
				}
			}
		}
	})
	for w := range 6 {
		work.Go(func() {
			for round := range 15 {
				i := (w + round) % len(images)
				name := fmt.Sprintf("docker.io/library/w%d:latest", w)
				var img Image
				var err error
				switch w % 3 {
				case 0: // compressed layers by names that tell nothing of their digests
					var loaded []Loaded
					if loaded, err = r.Load(r.ctx, bytes.NewReader(legacy(t, images[i], images[i].layers, name)), LoadOptions{}); err == nil {
						img = loaded[0].Image
					}
				case 1: // plain layers: the same snapshots from other blobs
					var loaded []Loaded
					if loaded, err = r.Load(r.ctx, bytes.NewReader(legacy(t, images[i], plain[i], name)), LoadOptions{}); err == nil {
						img = loaded[0].Image
					}
				case 2:
					name = fmt.Sprintf("%s/app:v%d", s.host(), i)
					if img, err = r.Pull(r.ctx, name, PullOptions{}); err == nil {
						// Others pull and remove that name as well.
						mine := fmt.Sprintf("docker.io/library/w%d:latest", w)
						if err = r.Tag(r.ctx, name, mine); errdefs.IsNotFound(err) {
							continue
						}
						_ = r.Untag(r.ctx, name)
						name = mine
					}
				}
				if err == nil {
					err = r.whole(name, img)
				}
				if err != nil {
					t.Errorf("worker %d, round %d: %v", w, round, err)
					continue
				}
				if round%2 == 0 {
					// Others know the image by names of theirs, so it may have none left.
					if err = r.Untag(r.ctx, name); err == nil {
						img.Names, img.Digests = nil, nil
						if _, err = r.Delete(r.ctx, img); errdefs.IsNotFound(err) {
							err = nil
						}
					}
				} else { // as one who read it when it had no other name
					img.Names, img.Digests = []string{name}, nil
					_, err = r.Delete(r.ctx, img)
				}
				if err != nil {
					t.Errorf("worker %d, round %d: remove: %v", w, round, err)
				}
			}
		})
	}
	work.Wait()
	close(stop)
	gc.Wait()
}
