package snapshot

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"strconv"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"

	"github.com/hako-engine/hako/store"
)

// needsRoot leaves a test out, by name, where it cannot work.
func needsRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: " + t.Name())
	}
}

func openStore(t testing.TB, root string) *store.Store {
	t.Helper()
	s, err := store.Open(root, store.Options{NoBackgroundGC: true, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func suite(open func(root string, s *store.Store) (*Snapshotter, error)) testsuite.SnapshotterFunc {
	return func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		s, err := store.Open(root+"/store", store.Options{NoBackgroundGC: true, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			return nil, nil, err
		}
		sn, err := open(root+"/sn", s)
		if err != nil {
			s.Close()
			return nil, nil, err
		}
		return sn, func() error {
			return errors.Join(sn.Close(), unmountAll(root+"/sn"), s.Close())
		}, nil
	}
}

func TestOverlaySuite(t *testing.T) {
	needsRoot(t)
	testsuite.SnapshotterSuite(t, "overlayfs", suite(NewOverlay))
}

// "merged" keeps all that has a parent merged, "loop" is EROFS for kernels that mount no files.
var drivers = map[string]opener{
	"overlayfs": NewOverlay, "native": NewNative, "erofs": newErofs,
	"merged": erofsWith(ErofsOptions{MergeFrom: 2}), "loop": erofsWith(ErofsOptions{Loop: true}),
}

// newErofs mounts beside the layers. Where the kernel cannot, tests fail: this is where they are
// meant to run.
func newErofs(root string, s *store.Store) (*Snapshotter, error) {
	return NewErofs(root, root+"/mnt", s, ErofsOptions{MergeFrom: -1})
}

func erofsWith(o ErofsOptions) opener {
	return func(root string, s *store.Store) (*Snapshotter, error) {
		return NewErofs(root, root+"/mnt", s, o)
	}
}

// unmountAll ends what newErofs's snapshotter leaves for those who hold snapshots.
func unmountAll(root string) error { return UnmountAll(root + "/mnt") }

func TestErofsSuite(t *testing.T) {
	needsRoot(t)
	testsuite.SnapshotterSuite(t, "erofs", suite(newErofs))
}

func TestMergedSuite(t *testing.T) {
	needsRoot(t)
	testsuite.SnapshotterSuite(t, "erofs", suite(drivers["merged"]))
}

func TestLoopSuite(t *testing.T) {
	needsRoot(t)
	testsuite.SnapshotterSuite(t, "erofs", suite(drivers["loop"]))
}

func itoa(n int) string { return strconv.Itoa(n) }

func TestNativeSuite(t *testing.T) {
	needsRoot(t)
	testsuite.SnapshotterSuite(t, "native", suite(NewNative))
}
