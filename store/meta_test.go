package store

import (
	"fmt"
	"maps"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
)

func target(text string) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString(text), Size: 10}
}

func TestImages(t *testing.T) {
	s := openTest(t, t.TempDir())
	ctx := inNamespace("a")
	is := s.Images()
	before := time.Now().Add(-time.Second)
	img, err := is.Create(ctx, images.Image{Name: "docker.io/library/x:1", Target: target("x"), Labels: map[string]string{"a": "1", "b": "2"}})
	must(t, err)
	if img.CreatedAt.Before(before) || !img.CreatedAt.Equal(img.UpdatedAt) {
		t.Error(img)
	}
	got, err := is.Get(ctx, img.Name)
	must(t, err)
	if fmt.Sprint(got) != fmt.Sprint(img) {
		t.Errorf("got  %v\nwant %v", got, img)
	}
	if _, err := is.Create(ctx, img); !errdefs.IsAlreadyExists(err) {
		t.Error(err)
	}
	if _, err := is.Get(inNamespace("b"), img.Name); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	for _, bad := range []images.Image{{Target: target("x")}, {Name: "n"}, {Name: "n", Target: ocispec.Descriptor{MediaType: "m", Digest: "sha256:1", Size: 1}}, {Name: "n", Target: ocispec.Descriptor{MediaType: "m", Digest: digest.FromString("")}}} {
		if _, err := is.Create(ctx, bad); !errdefs.IsInvalidArgument(err) {
			t.Error(bad, err)
		}
	}

	for _, c := range []struct {
		labels map[string]string
		paths  []string
		want   map[string]string
		target string
	}{
		{map[string]string{"a": "9", "c": "3"}, []string{"labels.a"}, map[string]string{"a": "9", "b": "2"}, "x"},
		{map[string]string{}, []string{"labels.b", "target"}, map[string]string{"a": "9"}, "y"},
		{map[string]string{"z": "1"}, []string{"labels"}, map[string]string{"z": "1"}, "y"},
		{nil, nil, map[string]string{}, "z"},
	} {
		tgt := target("ignored")
		if c.target != "x" {
			tgt = target(c.target)
		}
		got, err := is.Update(ctx, images.Image{Name: img.Name, Labels: c.labels, Target: tgt}, c.paths...)
		must(t, err)
		if !maps.Equal(got.Labels, c.want) || got.Target.Digest != target(c.target).Digest || !got.CreatedAt.Equal(img.CreatedAt) || got.UpdatedAt.Before(img.UpdatedAt) {
			t.Errorf("%v: %v", c.paths, got)
		}
	}
	if _, err := is.Update(ctx, img, "name"); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	if _, err := is.Update(ctx, images.Image{Name: "none", Target: target("x")}); !errdefs.IsNotFound(err) {
		t.Error(err)
	}

	other, err := is.Create(ctx, images.Image{Name: "other", Target: target("o"), Labels: map[string]string{"k": "v"}})
	must(t, err)
	for filter, want := range map[string]int{"name==other": 1, `name~=".*"`: 2, "labels.k==v": 1, "target.digest==" + other.Target.Digest.String(): 1, "target.mediatype==" + other.Target.MediaType: 2} {
		list, err := is.List(ctx, filter)
		if err != nil || len(list) != want {
			t.Errorf("%s: %v, %v", filter, list, err)
		}
	}
	wrong := target("w")
	if err := is.Delete(ctx, "other", images.DeleteTarget(&wrong)); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	must(t, is.Delete(ctx, "other", images.DeleteTarget(&other.Target)))
	if err := is.Delete(ctx, "other"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	// A damaged record hides nothing, and can be deleted.
	must(t, s.DB().Update(ctx, func(tx *bolt.Tx) error {
		return NamespaceBucket(tx, "a", sectionImages).Put([]byte("bad"), []byte("{"))
	}))
	if list, err := is.List(ctx); err != nil || len(list) != 1 {
		t.Error(list, err)
	}
	must(t, is.Delete(ctx, "bad"))
}

func TestLeases(t *testing.T) {
	s := openTest(t, t.TempDir())
	ctx := inNamespace("a")
	m := s.Leases()
	l, err := m.Create(ctx, leases.WithID("one"), leases.WithLabels(map[string]string{"k": "v"}))
	must(t, err)
	if _, err := m.Create(ctx, leases.WithID("one")); !errdefs.IsAlreadyExists(err) {
		t.Error(err)
	}
	if _, err := m.Create(ctx); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	_, err = m.Create(ctx, leases.WithRandomID())
	must(t, err)
	for filter, want := range map[string]int{"": 2, "id==one": 1, "labels.k==v": 1, "labels.k!=v": 1} {
		list, err := m.List(ctx, filter)
		if err != nil || len(list) != want {
			t.Errorf("%s: %v, %v", filter, list, err)
		}
	}
	d := digest.FromString("x").String()
	good := []leases.Resource{{ID: d, Type: "content"}, {ID: "key", Type: "snapshots/overlayfs"}, {ID: "ref", Type: "ingests"}, {ID: "docker.io/x", Type: "images"}}
	for _, r := range append(good, good...) {
		must(t, m.AddResource(ctx, l, r))
	}
	for _, r := range []leases.Resource{{ID: "x", Type: "content"}, {ID: "", Type: "ingests"}, {ID: "x", Type: "snapshots/"}, {ID: "x", Type: "snapshots"}} {
		if err := m.AddResource(ctx, l, r); !errdefs.IsInvalidArgument(err) {
			t.Error(r, err)
		}
	}
	for _, r := range []leases.Resource{{ID: "x", Type: "leases"}, {ID: "x", Type: "y"}} {
		if err := m.AddResource(ctx, l, r); !errdefs.IsNotImplemented(err) {
			t.Error(r, err)
		}
	}
	list, err := m.ListResources(ctx, l)
	if err != nil || len(list) != len(good) {
		t.Error(list, err)
	}
	must(t, m.DeleteResource(ctx, l, good[0]))
	must(t, m.DeleteResource(ctx, l, good[0]))
	if list, err = m.ListResources(ctx, l); err != nil || len(list) != len(good)-1 {
		t.Error(list, err)
	}
	none := leases.Lease{ID: "none"}
	_, err = m.ListResources(ctx, none)
	for _, err := range []error{err, m.AddResource(ctx, none, good[0]), m.DeleteResource(ctx, none, good[0]), m.Delete(ctx, none)} {
		if !errdefs.IsNotFound(err) {
			t.Error(err)
		}
	}
	must(t, m.Delete(ctx, l))
	if !(leaseRecord{Labels: map[string]string{labelExpire: "2001-01-01T00:00:00Z"}}).expired(time.Now()) ||
		(leaseRecord{Labels: map[string]string{labelExpire: "nonsense"}}).expired(time.Now()) {
		t.Error("expiry")
	}
}

func TestNamespaces(t *testing.T) {
	s := openTest(t, t.TempDir())
	ctx := inNamespace("used")
	n := s.Namespaces()
	must(t, n.Create(ctx, "empty", map[string]string{"a": "b"}))
	if err := n.Create(ctx, "empty", nil); !errdefs.IsAlreadyExists(err) {
		t.Error(err)
	}
	if err := n.Create(ctx, "bad/name", nil); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	_, err := s.Images().Create(ctx, images.Image{Name: "x", Target: target("x")})
	must(t, err)
	if list, err := n.List(ctx); err != nil || fmt.Sprint(list) != "[empty used]" {
		t.Error(list, err)
	}
	must(t, n.SetLabel(ctx, "used", "k", "v"))
	must(t, n.SetLabel(ctx, "empty", "a", ""))
	if l, err := n.Labels(ctx, "used"); err != nil || l["k"] != "v" {
		t.Error(l, err)
	}
	if l, err := n.Labels(ctx, "empty"); err != nil || len(l) != 0 {
		t.Error(l, err)
	}
	_, err = n.Labels(ctx, "none")
	for _, err := range []error{err, n.Delete(ctx, "none")} {
		if !errdefs.IsNotFound(err) {
			t.Error(err)
		}
	}
	if err := n.Delete(ctx, "used"); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	must(t, s.Images().Delete(ctx, "x"))
	must(t, s.DB().Update(ctx, func(tx *bolt.Tx) error { // as the snapshot room leaves it
		b, err := MakeNamespaceBucket(tx, "used", "snapshots.x")
		if err == nil {
			_, err = b.CreateBucketIfNotExists([]byte("keys"))
		}
		return err
	}))
	must(t, n.Delete(ctx, "used"))
	must(t, n.Delete(ctx, "empty"))
}

func TestNamespaceLabels(t *testing.T) {
	t.Parallel()
	s := openTest(t, t.TempDir())
	ns, ctx := (*Namespaces)(s), inNamespace("a")
	// A label makes the namespace, as clients count on.
	must(t, ns.SetLabel(ctx, "new", "k", "v"))
	must(t, ns.SetLabel(ctx, "new", "l", "w"))
	must(t, ns.SetLabel(ctx, "new", "k", ""))
	labels, err := ns.Labels(ctx, "new")
	must(t, err)
	if len(labels) != 1 || labels["l"] != "w" {
		t.Error(labels)
	}
	if _, err := ns.Relabel(ctx, "new", nil, "name"); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	if _, err := ns.Labels(ctx, "other"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
}
