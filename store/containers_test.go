package store

import (
	"testing"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"
)

func TestContainers(t *testing.T) {
	t.Parallel()
	s := openTest(t, t.TempDir())
	cs, ctx := s.Containers(), inNamespace("a")
	spec := &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Spec", Value: []byte(`{"ociVersion":"1.0.2"}`)}
	for name, bad := range map[string]containers.Container{
		"no id":               {Spec: spec, Runtime: containers.RuntimeInfo{Name: "r"}},
		"bad id":              {ID: "a/b", Spec: spec, Runtime: containers.RuntimeInfo{Name: "r"}},
		"no runtime":          {ID: "x", Spec: spec},
		"key, no snapshotter": {ID: "x", Spec: spec, Runtime: containers.RuntimeInfo{Name: "r"}, SnapshotKey: "k"},
		"extension, no name":  {ID: "x", Spec: spec, Runtime: containers.RuntimeInfo{Name: "r"}, Extensions: map[string]typeurl.Any{"": spec}},
	} {
		if _, err := cs.Create(ctx, bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if c, err := cs.Create(ctx, containers.Container{ID: "bare", Labels: map[string]string{"a": "", "b": "c"}, Runtime: containers.RuntimeInfo{Name: "r"}}); err != nil || c.Spec != nil || len(c.Labels) != 1 { // it gets one later
		t.Errorf("without a specification: %+v %v", c, err)
	}
	if c, err := cs.Update(ctx, containers.Container{ID: "bare", Labels: map[string]string{"b": ""}}, "labels.b"); err != nil || len(c.Labels) != 0 {
		t.Errorf("an empty label is none: %+v %v", c, err)
	}
	if err := cs.Delete(ctx, "bare"); err != nil {
		t.Error(err)
	}
	want := containers.Container{
		ID: "c1", Labels: map[string]string{"k": "v", "a.b": "1"}, Image: "img", Spec: spec, Snapshotter: "overlayfs", SnapshotKey: "c1", SandboxID: "s",
		Runtime:    containers.RuntimeInfo{Name: "io.containerd.runc.v2", Options: &anypb.Any{TypeUrl: "opt", Value: []byte{1, 2, 3}}},
		Extensions: map[string]typeurl.Any{"e": &anypb.Any{TypeUrl: "ext", Value: []byte("x")}},
	}
	made, err := cs.Create(ctx, want)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cs.Create(ctx, want); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second creation: %v", err)
	}
	got, err := cs.Get(ctx, "c1")
	if err != nil || got.Image != "img" || got.SandboxID != "s" || string(got.Spec.GetValue()) != string(spec.Value) || got.Runtime.Options.GetTypeUrl() != "opt" ||
		string(got.Extensions["e"].GetValue()) != "x" || !got.CreatedAt.Equal(made.CreatedAt) || got.CreatedAt.IsZero() {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := cs.Get(inNamespace("b"), "c1"); !errdefs.IsNotFound(err) {
		t.Errorf("in another namespace: %v", err)
	}

	for filter, n := range map[string]int{
		`id==c1`: 1, `id~=^c`: 1, `image==img`: 1, `image==other`: 0, `runtime.name==io.containerd.runc.v2`: 1, `labels.k==v`: 1, `labels."a.b"==1`: 1,
		`labels.none`: 0, `snapshotter==overlayfs,snapshotkey==c1`: 1, `sandbox==s`: 1,
	} {
		if list, err := cs.List(ctx, filter); err != nil || len(list) != n {
			t.Errorf("%s: %d, %v", filter, len(list), err)
		}
	}

	upd := containers.Container{ID: "c1", Labels: map[string]string{"k": "w"}, Image: "new"}
	if got, err = cs.Update(ctx, upd, "labels.k", "image"); err != nil || got.Labels["k"] != "w" || got.Labels["a.b"] != "1" || got.Image != "new" || got.SnapshotKey != "c1" {
		t.Errorf("%+v, %v", got, err)
	}
	if !got.UpdatedAt.After(got.CreatedAt) {
		t.Errorf("updated %v, created %v", got.UpdatedAt, got.CreatedAt)
	}
	if got, err = cs.Update(ctx, containers.Container{ID: "c1", Extensions: map[string]typeurl.Any{"f": spec}}, "extensions.f", "extensions.e"); err != nil || len(got.Extensions) != 1 || got.Extensions["f"] == nil {
		t.Errorf("%+v, %v", got, err)
	}
	for _, path := range []string{"id", "runtime", "snapshotter", "createdat", "nosuch"} {
		if _, err := cs.Update(ctx, upd, path); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", path, err)
		}
	}
	all := want
	all.Runtime.Name = "other"
	if _, err := cs.Update(ctx, all); !errdefs.IsInvalidArgument(err) {
		t.Errorf("another runtime: %v", err)
	}
	if _, err := cs.Update(ctx, containers.Container{ID: "none"}, "labels"); !errdefs.IsNotFound(err) {
		t.Errorf("of none: %v", err)
	}
	if err := cs.Delete(ctx, "c1"); err != nil {
		t.Error(err)
	}
	if err := cs.Delete(ctx, "c1"); !errdefs.IsNotFound(err) {
		t.Errorf("second deletion: %v", err)
	}
}

// TestContainerRefs shows that what a container names is no garbage.
func TestContainerRefs(t *testing.T) {
	t.Parallel()
	refs := containerRefs("ns", containerRecord{
		Snapshotter: "overlayfs", SnapshotKey: "k", Labels: map[string]string{"containerd.io/gc.ref.content": "sha256:x", "other": "y"},
	})
	seen := map[Node]bool{}
	for _, n := range refs {
		seen[n] = true
	}
	if len(refs) != 2 || !seen[SnapshotNode("overlayfs", "ns", "k")] || !seen[Node{Type: resourceContent, Namespace: "ns", ID: "sha256:x"}] {
		t.Errorf("%v", refs)
	}
}
