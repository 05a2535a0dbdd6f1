package snapshot

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/hako-engine/hako/store"
)

// restTime is how long layers stay mounted that nobody uses any more: the next container of
// an image often comes soon.
const restTime = 5 * time.Second

// idle has unused layers hidden after a while.
func (sn *Snapshotter) idle() {
	sn.mu.Lock()
	defer sn.mu.Unlock()
	if sn.resting == nil && !sn.closed {
		sn.resting = time.AfterFunc(restTime, func() {
			sn.mu.Lock()
			closed := sn.closed
			sn.mu.Unlock()
			if !closed {
				sn.hideUnused()
			}
		})
	}
}

// hideUnused hides the layers that no active snapshot and no view builds upon.
func (sn *Snapshotter) hideUnused() {
	sn.hiding.Lock()
	defer sn.hiding.Unlock()
	sn.mu.Lock()
	if sn.resting != nil {
		sn.resting.Stop()
		sn.resting = nil
	}
	sn.mu.Unlock()
	if err := sn.driver.hide(sn.used); err != nil {
		sn.log.Error("hide unused layers", "snapshotter", sn.name, "error", err)
	}
}

// used gives the layers below active snapshots and views.
func (sn *Snapshotter) used() (map[layer]bool, error) {
	used := map[layer]bool{}
	err := sn.store.DB().View(context.Background(), func(tx *bolt.Tx) error {
		return store.EachNamespace(tx, func(ns string) error {
			s := sn.section(tx, ns)
			return s.each(func(key string, r record, err error) error {
				if err != nil {
					return fmt.Errorf("snapshot %q: %w", key, err)
				}
				if r.kind() == snapshots.KindCommitted {
					return nil
				}
				list, err := sn.chain(s, r.Parent)
				if err != nil && !errdefs.IsNotFound(err) {
					return fmt.Errorf("snapshot %q: %w", key, err)
				}
				for _, l := range list {
					used[l] = true
				}
				return nil
			})
		})
	})
	return used, err
}
