package engine

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestCheckBesideRemovals: a volume whose removal is under way, or was cut short by the daemon's end, is nothing that a
// check finds; its folder is not a stray one that a repair would delete.
func TestCheckBesideRemovals(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	for _, name := range []string{"under-way", "lost", "whole"} {
		if _, err := n.e.CreateVolume(bg, Volume{Name: name}); err != nil {
			t.Fatal(err)
		}
	}
	volumes := filepath.Join(n.root, "volumes")
	if err := os.Rename(filepath.Join(volumes, "under-way"), n.e.doomedPath("under-way")); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{n.e.doomedPath("removed"), filepath.Join(volumes, "stray")} {
		if err := os.MkdirAll(filepath.Join(dir, "_data"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.RemoveAll(filepath.Join(volumes, "lost")); err != nil {
		t.Fatal(err)
	}
	found, err := n.e.recordCheck().check(bg)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range found {
		got = append(got, f.Problem+" "+f.Object)
	}
	slices.Sort(got)
	want := []string{ProblemVolumeFolder + " lost", ProblemStrayVolume + " " + doomedPrefix + "removed", ProblemStrayVolume + " stray"}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
