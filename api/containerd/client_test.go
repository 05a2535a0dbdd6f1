package containerd_test

import (
	"bytes"
	"context"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	ctrd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/epoch"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/semaphore"
)

func sorted(m map[string]string) []string { return slices.Sorted(maps.Keys(m)) }

// twoLayers is an image whose second layer changes, removes and adds.
func twoLayers(t *testing.T) v1.Image {
	return newImage(t, runtime.GOARCH,
		files{"etc/": "", "etc/a": "one", "etc/b": "two", "bin/": "", "bin/sh": "#!", "lnk": "->etc/a"},
		files{"etc/": "", "etc/.wh.b": "", "etc/a": "changed", "new": strings.Repeat("x", 100_000)})
}

// read gives the files of mounts.
func read(t *testing.T, ms []mount.Mount) files {
	t.Helper()
	out := files{}
	err := mount.WithTempMount(context.Background(), ms, func(root string) error {
		return filepath.Walk(root, func(p string, info os.FileInfo, err error) error {
			if err != nil || info.IsDir() {
				return err
			}
			rel, _ := filepath.Rel(root, p)
			if info.Mode()&os.ModeSymlink != 0 {
				to, err := os.Readlink(p)
				out[rel] = "->" + to
				return err
			}
			b, err := os.ReadFile(p)
			out[rel] = string(b)
			return err
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

var afterTwo = files{"etc/a": "changed", "bin/sh": "#!", "lnk": "->etc/a", "new": strings.Repeat("x", 100_000)}

func (r *rig) topOf(t *testing.T, name, snapshotter string) files {
	t.Helper()
	img, err := r.GetImage(r.ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := img.IsUnpacked(r.ctx, snapshotter); err != nil || !ok {
		t.Fatalf("image %s is not unpacked: %v", name, err)
	}
	ids, err := img.RootFS(r.ctx)
	if err != nil {
		t.Fatal(err)
	}
	key := "view-" + name
	ms, err := r.SnapshotService(snapshotter).View(r.ctx, key, identity.ChainID(ids).String())
	if err != nil {
		t.Fatal(err)
	}
	defer r.SnapshotService(snapshotter).Remove(r.ctx, key)
	return read(t, ms)
}

// TestClientPull: the client fetches into the content service, and lets layers be applied.
func TestClientPull(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	host := newRegistry(t, map[string]v1.Image{"x/y:1": twoLayers(t)})
	for _, sn := range []string{"overlayfs", "native"} {
		_, err := r.Pull(r.ctx, host+"/x/y:1", ctrd.WithPullUnpack, ctrd.WithPullSnapshotter(sn),
			ctrd.WithResolver(docker.NewResolver(docker.ResolverOptions{PlainHTTP: true})))
		if err != nil {
			t.Fatal(err)
		}
		if got := r.topOf(t, host+"/x/y:1", sn); !maps.Equal(got, afterTwo) {
			t.Errorf("%s: %v", sn, sorted(got))
		}
	}
	img, err := r.GetImage(r.ctx, host+"/x/y:1")
	if err != nil {
		t.Fatal(err)
	}
	// And the other way round.
	if err := r.Push(r.ctx, host+"/z:2", img.Target(), ctrd.WithResolver(docker.NewResolver(docker.ResolverOptions{PlainHTTP: true}))); err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	if err := r.Export(r.ctx, &buf, archive.WithImage(r.ImageService(), img.Name())); err != nil {
		t.Fatal(err)
	}
	other := namespaces.WithNamespace(r.ctx, "other")
	list, err := r.Import(other, &buf)
	if err != nil || len(list) != 1 || list[0].Target.Digest != img.Target().Digest {
		t.Fatalf("import: %v, %v", list, err)
	}
}

// TestParallelUnpack: a client that knows of rebasing applies layers onto mounts without their parents.
func TestParallelUnpack(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	host := newRegistry(t, map[string]v1.Image{"x/y:1": twoLayers(t)})
	_, err := r.Pull(r.ctx, host+"/x/y:1", ctrd.WithPullUnpack, ctrd.WithMaxConcurrentDownloads(3), ctrd.WithUnpackOpts([]ctrd.UnpackOpt{ctrd.WithUnpackLimiter(semaphore.NewWeighted(3))}),
		ctrd.WithResolver(docker.NewResolver(docker.ResolverOptions{PlainHTTP: true})))
	if err != nil {
		t.Fatal(err)
	}
	if got := r.topOf(t, host+"/x/y:1", "overlayfs"); !maps.Equal(got, afterTwo) {
		t.Errorf("%v", sorted(got))
	}
}

func TestImages(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	is := r.ImageService()
	target := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("a"), Size: 3}
	at := time.Unix(1000, 0).UTC()
	ctx := epoch.WithSourceDateEpoch(r.ctx, &at)
	img, err := is.Create(ctx, images.Image{Name: "i", Target: target, Labels: map[string]string{"a": "b", "c": "d"}})
	if err != nil || !img.CreatedAt.Equal(at) {
		t.Fatalf("%+v, %v", img, err)
	}
	if _, err := is.Create(r.ctx, images.Image{Name: "i", Target: target}); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), `image "i": already exists`) {
		t.Errorf("again: %v", err)
	}
	if _, err := is.Get(r.ctx, "j"); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), `image "j": not found`) {
		t.Errorf("unknown: %v", err)
	}
	img, err = is.Update(r.ctx, images.Image{Name: "i", Labels: map[string]string{"a": "x"}}, "labels.a", "labels.c")
	if err != nil || len(img.Labels) != 1 || img.Labels["a"] != "x" || img.Target.Digest != target.Digest {
		t.Errorf("%+v, %v", img, err)
	}
	// ctr images label NAME x= removes a label; so it does with whatever has some.
	if img, err = is.Update(r.ctx, images.Image{Name: "i", Labels: map[string]string{"x": "1", "y": ""}}, "labels.x", "labels.y"); err != nil || len(img.Labels) != 2 {
		t.Errorf("%+v, %v", img, err)
	}
	if img, err = is.Update(r.ctx, images.Image{Name: "i", Labels: map[string]string{"x": ""}}, "labels.x"); err != nil || len(img.Labels) != 1 {
		t.Errorf("%+v, %v", img, err)
	}
	if _, err := is.Update(r.ctx, images.Image{Name: "i"}, "name"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("update of the name: %v", err)
	}
	if list, err := is.List(r.ctx, `name==j`, `labels.a==x`); err != nil || len(list) != 1 {
		t.Errorf("%v, %v", list, err)
	}
	wrong := target
	wrong.Digest = digest.FromString("b")
	if err := is.Delete(r.ctx, "i", images.DeleteTarget(&wrong)); !errdefs.IsNotFound(err) {
		t.Errorf("delete of another target: %v", err)
	}
	if err := is.Delete(r.ctx, "i", images.DeleteTarget(&target), images.SynchronousDelete()); err != nil {
		t.Error(err)
	}
}

func TestLeases(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	lm := r.LeasesService()
	l, err := lm.Create(r.ctx, leases.WithID("l"), leases.WithLabels(map[string]string{"a": "b"}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lm.Create(r.ctx, leases.WithID("l")); !errdefs.IsAlreadyExists(err) {
		t.Errorf("again: %v", err)
	}
	leased := leases.WithLease(r.ctx, l.ID)
	d := digest.FromString("x")
	if err := content.WriteBlob(leased, r.ContentStore(), "x", strings.NewReader("x"), ocispec.Descriptor{Digest: d, Size: 1}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.SnapshotService("overlayfs").Prepare(leased, "s", ""); err != nil {
		t.Fatal(err)
	}
	got, err := lm.ListResources(r.ctx, l)
	if err != nil || !slices.Contains(got, leases.Resource{ID: d.String(), Type: "content"}) || !slices.Contains(got, leases.Resource{ID: "s", Type: "snapshots/overlayfs"}) {
		t.Errorf("%v, %v", got, err)
	}
	if err := lm.AddResource(r.ctx, l, leases.Resource{ID: "x", Type: "nothing"}); !errdefs.IsNotImplemented(err) {
		t.Errorf("unknown type: %v", err)
	}
	if err := lm.AddResource(r.ctx, l, leases.Resource{ID: "x", Type: "snapshots"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("of no snapshotter: %v", err)
	}
	if list, err := lm.List(r.ctx, "id==l"); err != nil || len(list) != 1 || list[0].Labels["a"] != "b" {
		t.Errorf("%v, %v", list, err)
	}
	if err := lm.Delete(r.ctx, l, leases.SynchronousDelete); err != nil {
		t.Fatal(err)
	}
	if _, err := r.ContentStore().Info(r.ctx, d); !errdefs.IsNotFound(err) {
		t.Errorf("content after its lease: %v", err)
	}
	if _, err := r.SnapshotService("overlayfs").Stat(r.ctx, "s"); !errdefs.IsNotFound(err) {
		t.Errorf("snapshot after its lease: %v", err)
	}
	if err := content.WriteBlob(leased, r.ContentStore(), "y", strings.NewReader("y"), ocispec.Descriptor{Digest: digest.FromString("y"), Size: 1}); !errdefs.IsNotFound(err) {
		t.Errorf("under a lease that has gone: %v", err)
	}
}

func TestNamespaces(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	ns := r.NamespaceService()
	if err := ns.Create(r.ctx, "n", map[string]string{"a": "b"}); err != nil {
		t.Fatal(err)
	}
	if err := ns.Create(r.ctx, "n", nil); !errdefs.IsAlreadyExists(err) {
		t.Errorf("again: %v", err)
	}
	if err := ns.Create(r.ctx, "no good", nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("bad name: %v", err)
	}
	// Clients ask for the defaults of the first namespace that they use, before anything is in it.
	if l, err := ns.Labels(r.ctx, "fresh"); err != nil || len(l) != 0 {
		t.Errorf("of nobody yet: %v, %v", l, err)
	}
	if err := ns.SetLabel(r.ctx, "n", "c", "d"); err != nil {
		t.Error(err)
	}
	if l, err := ns.Labels(r.ctx, "n"); err != nil || l["a"] != "b" || l["c"] != "d" {
		t.Errorf("%v, %v", l, err)
	}
	if err := ns.SetLabel(r.ctx, "n", "c", ""); err != nil {
		t.Error(err)
	}
	if l, err := ns.Labels(r.ctx, "n"); err != nil || len(l) != 1 {
		t.Errorf("%v, %v", l, err)
	}
	if _, err := r.LeasesService().Create(namespaces.WithNamespace(r.ctx, "n"), leases.WithID("l")); err != nil {
		t.Fatal(err)
	}
	if err := ns.Delete(r.ctx, "n"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("not empty: %v", err)
	}
	// A call without a namespace.
	bare, err := ctrd.New(r.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer bare.Close()
	if _, err := bare.ImageService().List(context.Background()); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("without a namespace: %v", err)
	}
	if v, err := bare.Version(context.Background()); err != nil || v.Version != "2.4.2+hako.1.2.3" || v.Revision != "abc" {
		t.Errorf("%v, %v", v, err)
	}
}

func TestIntrospection(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	s, err := r.Server(r.ctx)
	if err != nil || s.UUID == "" {
		t.Errorf("%v, %v", s, err)
	}
	caps, err := r.GetSnapshotterCapabilities(r.ctx, "overlayfs")
	if err != nil || !slices.Contains(caps, snapshots.RebaseCap) {
		t.Errorf("%v, %v", caps, err)
	}
	resp, err := r.IntrospectionService().Plugins(r.ctx, "type==io.containerd.snapshotter.v1,id==native")
	if err != nil || len(resp.Plugins) != 1 || resp.Plugins[0].Exports["root"] == "" || resp.Plugins[0].InitErr != nil {
		t.Errorf("%v, %v", resp, err)
	}
	if ok, err := r.IsServing(r.ctx); err != nil || !ok {
		t.Errorf("health: %v, %v", ok, err)
	}
}

func TestSnapshotsAndDiff(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for _, name := range []string{"overlayfs", "native"} {
		sn := r.SnapshotService(name)
		fill := func(ms []mount.Mount, f files, remove ...string) {
			t.Helper()
			err := mount.WithTempMount(r.ctx, ms, func(root string) error {
				for _, n := range remove {
					if err := os.RemoveAll(filepath.Join(root, n)); err != nil {
						return err
					}
				}
				for n, c := range f {
					if err := os.MkdirAll(filepath.Join(root, filepath.Dir(n)), 0o755); err != nil {
						return err
					}
					if err := os.WriteFile(filepath.Join(root, n), []byte(c), 0o644); err != nil {
						return err
					}
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		ms, err := sn.Prepare(r.ctx, "a", "", snapshots.WithLabels(map[string]string{"l": "1"}))
		if err != nil {
			t.Fatal(err)
		}
		fill(ms, files{"keep": "k", "dir/x": "x", "dir/y": "y", "gone": "g"})
		if err := sn.Commit(r.ctx, "base", "a"); err != nil {
			t.Fatal(err)
		}
		ms, err = sn.Prepare(r.ctx, "b", "base")
		if err != nil {
			t.Fatal(err)
		}
		fill(ms, files{"dir/x": "changed", "new": "n"}, "gone", "dir/y")
		if err := sn.Remove(r.ctx, "base"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "cannot remove snapshot with child") {
			t.Errorf("%s: remove of a parent: %v", name, err)
		}
		at := time.Unix(1000, 0)
		desc, err := rootfs.CreateDiff(r.ctx, "b", sn, r.DiffService())
		if err != nil {
			t.Fatal(err)
		}
		info, err := r.ContentStore().Info(r.ctx, desc.Digest)
		if err != nil || info.Labels["containerd.io/uncompressed"] == "" || desc.MediaType != ocispec.MediaTypeImageLayerGzip {
			t.Errorf("%s: %+v, %+v, %v", name, desc, info, err)
		}
		_ = at
		// Applied upon the same base it makes the same files.
		ms, err = sn.Prepare(r.ctx, "c", "base")
		if err != nil {
			t.Fatal(err)
		}
		plain, err := r.DiffService().Apply(r.ctx, desc, ms)
		if err != nil || plain.Digest.String() != info.Labels["containerd.io/uncompressed"] {
			t.Errorf("%s: applied %v, %v", name, plain, err)
		}
		want := files{"keep": "k", "dir/x": "changed", "new": "n"}
		if got := read(t, ms); !maps.Equal(got, want) {
			t.Errorf("%s: %v", name, got)
		}
		u, err := sn.Usage(r.ctx, "base")
		if err != nil || u.Inodes < 5 {
			t.Errorf("%s: usage %v, %v", name, u, err)
		}
		n := 0
		if err := sn.Walk(r.ctx, func(context.Context, snapshots.Info) error { n++; return nil }, "kind==active"); err != nil || n != 2 {
			t.Errorf("%s: walk %d, %v", name, n, err)
		}
		if _, err := sn.Update(r.ctx, snapshots.Info{Name: "b", Labels: map[string]string{"x": "y"}}, "labels.x"); err != nil {
			t.Error(err)
		}
		if i, err := sn.Stat(r.ctx, "b"); err != nil || i.Labels["x"] != "y" || i.Parent != "base" || i.Kind != snapshots.KindActive {
			t.Errorf("%s: %+v, %v", name, i, err)
		}
		for _, k := range []string{"b", "c", "base"} {
			if err := sn.Remove(r.ctx, k); err != nil {
				t.Error(err)
			}
		}
		if err := sn.(snapshots.Cleaner).Cleanup(r.ctx); err != nil {
			t.Error(err)
		}
	}
	if _, err := r.SnapshotService("nobody").Stat(r.ctx, "x"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unknown snapshotter: %v", err)
	}
}

func TestMounts(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	mm := r.MountManager()
	sn := r.SnapshotService("overlayfs")
	ms, err := sn.Prepare(r.ctx, "low", "")
	if err != nil {
		t.Fatal(err)
	}
	writable := t.TempDir()
	list := append(slices.Clone(ms), mount.Mount{Type: "bind", Source: writable, Options: []string{"rbind", "rw"}}, mount.Mount{
		Type: "format/mkdir/overlay", Source: "overlay",
		Options: []string{"X-containerd.mkdir.path={{ mount 1 }}/up:0755", "X-containerd.mkdir.path={{ mount 1 }}/work", "lowerdir={{ mount 0 }}", "upperdir={{ mount 1 }}/up", "workdir={{ mount 1 }}/work"},
	})
	if _, err := mm.Activate(r.ctx, "plain", ms); !errdefs.IsNotImplemented(err) {
		t.Errorf("mounts that the system can make: %v", err)
	}
	info, err := mm.Activate(r.ctx, "n", list, mount.WithLabels(map[string]string{"a": "b"}))
	if err != nil {
		t.Fatal(err)
	}
	if len(info.Active) != 2 || len(info.System) != 1 || info.System[0].Type != "overlay" || !strings.HasPrefix(info.System[0].Options[1], "upperdir="+info.Active[1].MountPoint) {
		t.Errorf("%+v", info)
	}
	if got := read(t, info.System); len(got) != 0 {
		t.Errorf("%v", got)
	}
	if _, err := mm.Activate(r.ctx, "n", list); !errdefs.IsAlreadyExists(err) {
		t.Errorf("again: %v", err)
	}
	// The diff service takes them, too, and leaves none.
	if err := os.WriteFile(filepath.Join(writable, "up", "new"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	desc, err := r.DiffService().Compare(r.ctx, ms, list)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(writable, "up", "new")); err != nil {
		t.Fatal(err)
	}
	if _, err := r.DiffService().Apply(r.ctx, desc, list); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(writable, "up", "new")); err != nil {
		t.Errorf("compared and applied: %v", err)
	}
	if all, err := mm.List(r.ctx); err != nil || len(all) != 1 {
		t.Errorf("left: %v, %v", all, err)
	}
	if all, err := mm.List(r.ctx, "labels.a==b"); err != nil || len(all) != 1 || all[0].Name != "n" {
		t.Errorf("%v, %v", all, err)
	}
	if err := mm.Deactivate(r.ctx, "n"); err != nil {
		t.Error(err)
	}
	if _, err := mm.Info(r.ctx, "n"); !errdefs.IsNotFound(err) {
		t.Errorf("after its end: %v", err)
	}
	// For temporary use everything is made, as long as the lease lives.
	l, err := r.LeasesService().Create(r.ctx, leases.WithID("l"))
	if err != nil {
		t.Fatal(err)
	}
	info, err = mm.Activate(leases.WithLease(r.ctx, "l"), "/mnt/x", list, mount.WithTemporary)
	if err != nil || len(info.System) != 1 || info.System[0].Type != "bind" || len(info.Active) != 3 {
		t.Fatalf("%+v, %v", info, err)
	}
	again := func() (mount.ActivationInfo, error) {
		return mm.Activate(leases.WithLease(r.ctx, "l"), "/mnt/y", ms, mount.WithTemporary)
	}
	first, err := again()
	if second, err2 := again(); err != nil || err2 != nil || second.System[0].Source != first.System[0].Source {
		t.Errorf("the same again: %v, %v", err, err2)
	}
	if err := r.LeasesService().Delete(r.ctx, l); err != nil {
		t.Fatal(err)
	}
	if all, err := mm.List(r.ctx); err != nil || len(all) != 0 {
		t.Errorf("after the lease: %v, %v", all, err)
	}
	// A link of the file system below leads nowhere.
	if err := os.Symlink("/etc", filepath.Join(writable, "link")); err != nil {
		t.Fatal(err)
	}
	for what, options := range map[string][]string{
		"upper": {"lowerdir={{ mount 0 }}", "upperdir={{ mount 1 }}/link", "workdir={{ mount 1 }}/work"},
		"lower": {"lowerdir={{ mount 1 }}/link/x:{{ mount 0 }}"},
		"index": {"lowerdir={{ mount 7 }}"},
		"words": {"lowerdir={{ printf 0 }}"},
	} {
		bad := append(slices.Clone(list[:2]), mount.Mount{Type: "format/overlay", Source: "overlay", Options: options})
		if _, err := mm.Activate(r.ctx, "bad", bad); !errdefs.IsPermissionDenied(err) && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	dirs := append(slices.Clone(list[:2]), mount.Mount{Type: "format/mkdir/overlay", Source: "overlay", Options: []string{"X-containerd.mkdir.path={{ mount 1 }}/link/hako-test", "lowerdir={{ mount 0 }}"}})
	_, _ = mm.Activate(r.ctx, "dirs", dirs)
	if _, err := os.Lstat("/etc/hako-test"); err == nil {
		os.Remove("/etc/hako-test")
		t.Error("a directory was made on the host")
	}
}
