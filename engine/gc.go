package engine

import (
	"context"

	"github.com/hako-engine/hako/store"
)

// Roots names the snapshots of containers for the store's garbage collection: the
// engine is a store.Source. A container that is being created is named before its
// snapshot exists.
func (e *Engine) Roots(ctx context.Context, add func(store.Node)) error {
	e.containers.mu.RLock()
	making := make(map[string]string, len(e.containers.beingMade))
	for id, sn := range e.containers.beingMade {
		making[id] = sn
	}
	e.containers.mu.RUnlock()
	for key, sn := range making {
		add(store.SnapshotNode(sn, Namespace, key))
	}
	for _, c := range e.containers.all() {
		v := c.view()
		for _, key := range append(imageKeys(v.ID, v.Config), v.SnapshotKey) {
			add(store.SnapshotNode(v.Snapshotter, Namespace, key))
		}
	}
	return nil
}
