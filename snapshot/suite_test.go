package snapshot

import (
	"context"
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
			if err := sn.Close(); err != nil {
				return err
			}
			return s.Close()
		}, nil
	}
}

func TestOverlaySuite(t *testing.T) {
	needsRoot(t)
	testsuite.SnapshotterSuite(t, "overlayfs", suite(NewOverlay))
}

var drivers = map[string]opener{"overlayfs": NewOverlay, "native": NewNative}

func itoa(n int) string { return strconv.Itoa(n) }

func TestNativeSuite(t *testing.T) {
	needsRoot(t)
	testsuite.SnapshotterSuite(t, "native", suite(NewNative))
}
