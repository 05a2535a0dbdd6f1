package store

import (
	"testing"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/protobuf/types/known/anypb"
)

func TestSandboxes(t *testing.T) {
	t.Parallel()
	s := openTest(t, t.TempDir())
	bs, ctx := s.Sandboxes(), inNamespace("a")
	if _, err := bs.Create(ctx, sandbox.Sandbox{ID: "a/b"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("bad id: %v", err)
	}
	want := sandbox.Sandbox{
		ID: "s1", Labels: map[string]string{"k": "v"}, Sandboxer: "shim", Runtime: sandbox.RuntimeOpts{Name: "r", Options: &anypb.Any{TypeUrl: "o", Value: []byte("1")}},
		Spec: &anypb.Any{TypeUrl: "spec", Value: []byte("{}")}, Extensions: map[string]typeurl.Any{"e": &anypb.Any{TypeUrl: "x"}},
	}
	if _, err := bs.Create(ctx, want); err != nil {
		t.Fatal(err)
	}
	if _, err := bs.Create(ctx, want); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second creation: %v", err)
	}
	got, err := bs.Get(ctx, "s1")
	if err != nil || got.Sandboxer != "shim" || got.Runtime.Options.GetTypeUrl() != "o" || got.Spec.GetTypeUrl() != "spec" || got.Extensions["e"].GetTypeUrl() != "x" || got.CreatedAt.IsZero() {
		t.Errorf("%+v, %v", got, err)
	}
	for filter, n := range map[string]int{`id==s1`: 1, `sandboxer==shim`: 1, `runtime.name==r`: 1, `labels.k==v`: 1, `labels.none`: 0} {
		if list, err := bs.List(ctx, filter); err != nil || len(list) != n {
			t.Errorf("%s: %d, %v", filter, len(list), err)
		}
	}
	if got, err = bs.Update(ctx, sandbox.Sandbox{ID: "s1", Labels: map[string]string{"l": "w"}}, "labels.l"); err != nil || got.Labels["l"] != "w" || got.Labels["k"] != "v" {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := bs.Update(ctx, sandbox.Sandbox{ID: "s1"}, "sandboxer"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("of what cannot be changed: %v", err)
	}
	if _, err := bs.Update(ctx, sandbox.Sandbox{ID: "s1", Runtime: sandbox.RuntimeOpts{Name: "other"}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("another runtime: %v", err)
	}
	if err := bs.Delete(ctx, "s1"); err != nil {
		t.Error(err)
	}
	if err := bs.Delete(ctx, "s1"); !errdefs.IsNotFound(err) {
		t.Errorf("second deletion: %v", err)
	}
}

// TestCheckSandbox: a record that cannot be read, which stops the collection of its namespace, is found and dropped.
func TestCheckSandbox(t *testing.T) {
	t.Parallel()
	s := openTest(t, t.TempDir())
	ctx := inNamespace("a")
	must(t, s.DB().Update(ctx, func(tx *bolt.Tx) error {
		b, err := MakeNamespaceBucket(tx, "a", sectionSandboxes)
		if err != nil {
			return err
		}
		return b.Put([]byte("s1"), []byte("{"))
	}))
	found, err := s.Check(ctx, CheckOptions{})
	if err != nil || len(found) != 1 || found[0].Problem != ProblemRecord || found[0].Object != "sandboxes s1" || found[0].Severity != Damage {
		t.Fatalf("%+v, %v", found, err)
	}
	if done, err := s.Repair(ctx, found[0], nil); err != nil || done != "dropped" {
		t.Errorf("%q, %v", done, err)
	}
	if found, err = s.Check(ctx, CheckOptions{}); err != nil || len(found) != 0 {
		t.Errorf("after the repair: %+v, %v", found, err)
	}
}
