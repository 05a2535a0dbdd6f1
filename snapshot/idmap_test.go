package snapshot

import (
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestParseIDMap(t *testing.T) {
	t.Parallel()
	got, err := ParseIDMap("0:33:100,100:333:65536")
	if err != nil || !slices.Equal(got, []IDMap{{0, 33, 100}, {100, 333, 65536}}) {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"", "0", "0:1", "0:1:0", "0:1:2:3", "a:1:2", "-1:1:2", "0:1:2,", "4294967295:0:2", "0:4294967295:2", "0:1:99999999999"} {
		if got, err := ParseIDMap(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v, %v", bad, got, err)
		}
	}
	for id, want := range map[uint32]uint32{0: 33, 99: 132, 100: 333, 65635: 65868} {
		if got, err := hostID("0:33:100,100:333:65536", id); err != nil || got != want {
			t.Errorf("%d: %d, %v", id, got, err)
		}
	}
	if _, err := hostID("0:33:100", 100); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
}

// A snapshot that a client wants with mapped ids belongs to the mapped root, and its mount says
// what the layers below are to be mapped by.
func TestMappedSnapshot(t *testing.T) {
	needsRoot(t)
	sn, ctx := openTest(t, NewOverlay), testContext()
	if !sn.mapsIDs {
		t.Skipf("needs Linux 6.15: %s", t.Name())
	}
	for _, k := range []string{"1", "2"} {
		parent := map[string]string{"2": "c1"}[k]
		if _, err := sn.Prepare(ctx, "a"+k, parent); err != nil {
			t.Fatal(err)
		}
		if err := sn.Commit(ctx, "c"+k, "a"+k); err != nil {
			t.Fatal(err)
		}
	}
	labels := func(uids, gids string) snapshots.Opt {
		return snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotUIDMapping: uids, snapshots.LabelSnapshotGIDMapping: gids})
	}
	ms, err := sn.Prepare(ctx, "x", "c2", labels("0:33:100", "0:44:100"))
	if err != nil {
		t.Fatal(err)
	}
	again, err := sn.Mounts(ctx, "x")
	if err != nil {
		t.Fatal(err)
	}
	for _, ms := range [][]mount.Mount{ms, again} {
		if o := ms[0].Options; !slices.Contains(o, "uidmap=0:33:100") || !slices.Contains(o, "gidmap=0:44:100") {
			t.Errorf("options %q", o)
		}
	}
	info, err := sn.Stat(ctx, "x")
	if err != nil || info.Labels[snapshots.LabelSnapshotUIDMapping] != "0:33:100" {
		t.Errorf("%+v, %v", info, err)
	}
	var st unix.Stat_t
	for _, o := range ms[0].Options {
		if len(o) > 9 && o[:9] == "upperdir=" {
			if err := unix.Stat(o[9:], &st); err != nil || st.Uid != 33 || st.Gid != 44 {
				t.Errorf("%s: %d:%d, %v", o, st.Uid, st.Gid, err)
			}
		}
	}
	for _, bad := range [][2]string{{"0:33:100", ""}, {"x", "0:1:1"}, {"5:33:100", "0:44:100"}} {
		if _, err := sn.Prepare(ctx, "bad", "c2", labels(bad[0], bad[1])); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if !slices.Contains(sn.Capabilities(), "remap-ids") {
		t.Error("clients do not learn of it")
	}
}
