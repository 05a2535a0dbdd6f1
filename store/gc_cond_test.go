package store

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// fakeSnapshots is a room of snapshots that are nothing but labels.
type fakeSnapshots map[string]map[string]string

func (fakeSnapshots) Type() string { return resourceSnapshots + "fake" }

func (f fakeSnapshots) Nodes(_ *bolt.Tx, fn func(Object)) error {
	for k, l := range f {
		fn(Object{Node: SnapshotNode("fake", "a", k), Labels: l})
	}
	return nil
}

func (f fakeSnapshots) Node(_ *bolt.Tx, ns, id string) (Object, error) {
	l, ok := f[id]
	if !ok || ns != "a" {
		return Object{}, errdefs.ErrNotFound
	}
	return Object{Node: SnapshotNode("fake", ns, id), Labels: l}, nil
}

func (f fakeSnapshots) Remove(_ *bolt.Tx, _, id string) (int64, error) { delete(f, id); return 0, nil }

func (fakeSnapshots) Cleanup(context.Context) error { return nil }

func (f fakeSnapshots) keys() (out []string) {
	for k := range f {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

func TestGCConditions(t *testing.T) {
	t.Parallel()
	s := openTest(t, t.TempDir())
	ctx := inNamespace("a")
	ago := func(d time.Duration) map[string]string {
		return map[string]string{labelUsedAt: time.Now().Add(-d).Format(time.RFC3339)}
	}
	sn := fakeSnapshots{
		"recent": ago(time.Hour), "old": ago(3 * time.Hour), "second": ago(3 * time.Hour), "ofimage": ago(time.Minute), "ofgarbage": ago(time.Minute),
		"unlabelled": nil, "after|bar": ago(time.Minute), "atroot": nil, "expired": {labelExpire: "2001-01-01T00:00:00Z"},
		"unexpired": {labelExpire: time.Now().Add(time.Hour).Format(time.RFC3339)},
	}
	s.AddCollector(sn)
	manifest := blob(t, ctx, s, "manifest", labelRoot, "x",
		labelCondSnapshot+"fake", "usedat<2h|recent",
		labelCondSnapshot+"fake/1", "usedat<2h|old",
		labelCondSnapshot+"fake/2", "usedat<1m,usedat>=2h|second",
		labelCondSnapshot+"fake/3", "usedat<2h|unlabelled",
		labelCondSnapshot+"fake/4", "usedat<2h|after|bar",
		labelCondSnapshot+"fake/5", "nonsense|atroot",
		labelCondSnapshot+"other", "usedat<2h|recent",
	)
	blob(t, ctx, s, "garbage", labelCondSnapshot+"fake", "usedat<2h|ofgarbage")
	keep := blob(t, ctx, s, "keep", labelExpire, time.Now().Add(time.Hour).Format(time.RFC3339))
	_, err := s.Images().Create(ctx, images.Image{Name: "i", Target: manifest, Labels: map[string]string{labelCondSnapshot + "fake": "usedat<=1h|ofimage"}})
	must(t, err)
	var finished int
	s.AfterGC(func(context.Context) { finished++ })
	collect(t, s)
	if got, want := sn.keys(), []string{"after|bar", "ofimage", "recent", "second", "unexpired"}; !slices.Equal(got, want) {
		t.Errorf("%v stayed, want %v", got, want)
	}
	if !there(t, ctx, s, keep) {
		t.Error("a blob was collected before it expired")
	}
	// It is used no more: nobody else had to be told.
	sn["recent"] = ago(2 * time.Hour)
	_, err = s.Content().Update(ctx, content.Info{Digest: keep.Digest, Labels: map[string]string{labelExpire: "2001-01-01T00:00:00Z"}}, "labels."+labelExpire)
	must(t, err)
	collect(t, s)
	if slices.Contains(sn.keys(), "recent") || there(t, ctx, s, keep) || finished != 2 {
		t.Errorf("%v stayed, %d collections told", sn.keys(), finished)
	}
	for n, want := range map[Node]bool{
		ContentNode("a", manifest.Digest): true, ContentNode("b", manifest.Digest): false, {"images", "a", "i"}: true, {"images", "a", "j"}: false,
		SnapshotNode("fake", "a", "second"): true, SnapshotNode("fake", "a", "old"): false, {resourceContainers, "a", "x"}: false,
	} {
		if found, err := s.Exists(ctx, n); err != nil || found != want {
			t.Errorf("%+v: %v, %v", n, found, err)
		}
	}
	if _, err := s.Exists(ctx, SnapshotNode("none", "a", "x")); !errdefs.IsNotImplemented(err) {
		t.Errorf("a room that is not there: %v", err)
	}
}
