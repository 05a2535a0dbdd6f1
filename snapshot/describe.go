package snapshot

import "github.com/containerd/containerd/v2/core/snapshots"

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
