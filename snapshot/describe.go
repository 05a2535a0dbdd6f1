package snapshot

import (
	"context"

	"github.com/containerd/containerd/v2/core/snapshots"
	bolt "go.etcd.io/bbolt"

	"github.com/hako-engine/hako/store"
)

// Root is the directory with the snapshotter's files.
func (sn *Snapshotter) Root() string { return sn.root }

// Capabilities are what containerd's clients may use of the snapshotter, in containerd's words.
func (sn *Snapshotter) Capabilities() []string {
	list := []string{snapshots.RebaseCap}
	if sn.mapsIDs {
		list = append(list, "remap-ids")
	}
	return list
}

// Empty tells whether no namespace has a snapshot here.
func (sn *Snapshotter) Empty() bool {
	empty := true
	err := sn.store.DB().View(context.Background(), func(tx *bolt.Tx) error {
		return store.EachNamespace(tx, func(ns string) error {
			return sn.section(tx, ns).each(func(string, record, error) error {
				empty = false
				return nil
			})
		})
	})
	return empty && err == nil
}
