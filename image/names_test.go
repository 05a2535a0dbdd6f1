package image

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestParseName(t *testing.T) {
	t.Parallel()
	d := digest.FromString("x").String()
	for in, want := range map[string]string{
		"alpine":                          "docker.io/library/alpine:latest",
		"alpine:3":                        "docker.io/library/alpine:3",
		"me/app":                          "docker.io/me/app:latest",
		"localhost:5000/app":              "localhost:5000/app:latest",
		"alpine@" + d:                     "docker.io/library/alpine@" + d,
		"alpine:3@" + d:                   "docker.io/library/alpine@" + d,
		"[::1]:5000/app:v1":               "[::1]:5000/app:v1",
		"ALPINE":                          "",
		"alpine:":                         "",
		"":                                "",
		"a/../b":                          "",
		"alpine@sha256:short":             "",
		"http://host/app":                 "",
		"app:" + strings.Repeat("x", 200): "",
		strings.Repeat("x", 300):          "",
		digest.FromString("x").Encoded():  "",
	} {
		n, err := parseName(in)
		switch {
		case want == "" && !errdefs.IsInvalidArgument(err):
			t.Errorf("%q: %v %v", in, n, err)
		case want != "" && (err != nil || n.String() != want):
			t.Errorf("%q: %v %v, want %s", in, n, err, want)
		}
	}
}

func TestNames(t *testing.T) {
	t.Parallel()
	r, s := newRig(t), newServer(t)
	first, err := r.Pull(r.ctx, s.push(t, "app", "v1", build(t, nil, tarOf(t, file("a", "1")))), PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	repo := s.host() + "/app"
	for _, ref := range []string{repo + ":v1", first.ID.String(), first.ID.Encoded(), first.ID.Encoded()[:12], "sha256:" + first.ID.Encoded()[:3], repo + "@" + first.Target.Digest.String(), repo + ":other@" + first.Target.Digest.String()} {
		img, err := r.Get(r.ctx, ref, nil)
		if err != nil || img.ID != first.ID {
			t.Errorf("get %q: %v", ref, err)
		}
	}
	for _, ref := range []string{repo, repo + ":v2", "alpine", repo + "@" + digest.FromString("x").String(), digest.FromString("x").String(), "0000000"} {
		if _, err := r.Get(r.ctx, ref, nil); !errdefs.IsNotFound(err) {
			t.Errorf("get %q: %v", ref, err)
		}
	}
	if _, err := r.Get(r.ctx, "No Such", nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("bad reference: %v", err)
	}
	if _, err := r.Get(r.ctx, repo+":v1", &ocispec.Platform{OS: "linux", Architecture: "s390x"}); !errdefs.IsNotFound(err) {
		t.Errorf("another platform: %v", err)
	}

	// The tag moves to a second image; the first stays, without a name.
	second, err := r.Pull(r.ctx, s.push(t, "app", "v1", build(t, nil, tarOf(t, file("a", "2")))), PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if img, err := r.Get(r.ctx, repo+":v1", nil); err != nil || img.ID != second.ID {
		t.Errorf("v1 is %s (%v), want %s", img.ID, err, second.ID)
	}
	dangling, err := r.Get(r.ctx, first.ID.String(), nil)
	if err != nil || len(dangling.Names) != 0 || len(dangling.Digests) != 0 {
		t.Errorf("first image: %+v %v", dangling, err)
	}
	list, err := r.List(r.ctx)
	if err != nil || len(list) != 2 {
		t.Errorf("list: %+v %v", list, err)
	}
	if _, err := r.store.GC(r.ctx); err != nil {
		t.Fatal(err)
	}
	// A name for it again ends the record that kept it.
	if err := r.Tag(r.ctx, first.ID.Encoded()[:8], "kept"); err != nil {
		t.Fatal(err)
	}
	recs, err := r.store.Images().List(r.ctx)
	if err != nil || len(recs) != 2 {
		t.Errorf("records: %v %v", recs, err)
	}
	if err := r.Tag(r.ctx, "kept", "also:kept"); err != nil {
		t.Fatal(err)
	}
	if err := r.Tag(r.ctx, "kept", "x@"+first.Target.Digest.String()); !errdefs.IsInvalidArgument(err) {
		t.Errorf("tag with a digest: %v", err)
	}
	if err := r.Tag(r.ctx, "nothing", "x"); !errdefs.IsNotFound(err) {
		t.Errorf("tag of nothing: %v", err)
	}
	if err := r.Untag(r.ctx, "kept"); err != nil {
		t.Fatal(err)
	}
	if err := r.Untag(r.ctx, "kept"); !errdefs.IsNotFound(err) {
		t.Errorf("untag twice: %v", err)
	}
	if err := r.Untag(r.ctx, "also:kept"); err != nil { // its last name
		t.Fatal(err)
	}
	if _, err := r.store.GC(r.ctx); err != nil {
		t.Fatal(err)
	}
	if dangling, err := r.Get(r.ctx, first.ID.String(), nil); err != nil || len(dangling.Names) != 0 {
		t.Errorf("an image without a name: %+v %v", dangling, err)
	}
	if err := r.Tag(r.ctx, first.ID.String(), "also:kept"); err != nil {
		t.Fatal(err)
	}
	img, err := r.Get(r.ctx, "also:kept", nil)
	if err != nil {
		t.Fatal(err)
	}
	gone, err := r.Delete(r.ctx, img)
	if err != nil || !slices.Equal(gone, []string{"docker.io/library/also:kept", "docker.io/library/also@" + first.Target.Digest.String()}) {
		t.Errorf("delete: %q %v", gone, err)
	}
	if _, err := r.Delete(r.ctx, img); !errdefs.IsNotFound(err) {
		t.Errorf("delete twice: %v", err)
	}
	cfg, err := r.Config(r.ctx, second)
	if err != nil || !slices.Equal(cfg.Config.Cmd, []string{"/bin/true"}) {
		t.Errorf("config: %+v %v", cfg, err)
	}
	if second.Labels["a"] != "b" || second.Created.Year() != 2026 {
		t.Errorf("second image: %+v", second)
	}
}

func TestUnpackAgain(t *testing.T) {
	t.Parallel()
	r, s := newRig(t), newServer(t)
	img, err := r.Pull(r.ctx, s.push(t, "app", "v1", threeLayers(t)), PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	key, err := r.Unpack(r.ctx, img, "native")
	if err != nil || key != img.ChainID.String() {
		t.Fatalf("unpack: %q %v", key, err)
	}
	sn := r.o.Snapshotters["native"]
	mounts, err := sn.View(r.ctx, "v", key)
	if err != nil {
		t.Fatal(err)
	}
	if got := names(t, mounts[0].Source+"/var/data"); !slices.Equal(got, []string{"last"}) {
		t.Errorf("native: var/data holds %q", got)
	}
	if err := sn.Remove(r.ctx, "v"); err != nil {
		t.Fatal(err)
	}
	if _, err := r.store.GC(r.ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := sn.Stat(r.ctx, key); err != nil {
		t.Errorf("after garbage collection: %v", err)
	}
	if _, err := r.Unpack(r.ctx, img, "zfs"); !errdefs.IsNotFound(err) {
		t.Errorf("unknown snapshotter: %v", err)
	}
	if key, err := r.Unpack(r.ctx, Image{}, ""); key != "" || err != nil {
		t.Errorf("image without layers: %q %v", key, err)
	}
}

// index serves an index of images for several platforms.
func (s *server) index(t *testing.T, repo, tag string, images ...*built) string {
	t.Helper()
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	attestation := []byte(`{"schemaVersion":2,"config":{},"layers":[]}`)
	s.put(t, "/v2/"+repo+"/manifests/"+digest.FromBytes(attestation).String(), ocispec.MediaTypeImageManifest, attestation)
	idx.Manifests = append(idx.Manifests, ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(attestation), Size: int64(len(attestation)),
		Platform: &ocispec.Platform{OS: "unknown", Architecture: "unknown"}, Annotations: map[string]string{"vnd.docker.reference.type": "attestation-manifest"},
	})
	for _, b := range images {
		d := digest.FromBytes(b.manifest)
		s.push(t, repo, d.Encoded()[:10], b)
		s.put(t, "/v2/"+repo+"/manifests/"+d.String(), ocispec.MediaTypeImageManifest, b.manifest)
		p := b.platform
		idx.Manifests = append(idx.Manifests, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: d, Size: int64(len(b.manifest)), Platform: &p})
	}
	s.put(t, "/v2/"+repo+"/manifests/"+tag, ocispec.MediaTypeImageIndex, marshal(t, idx))
	return s.host() + "/" + repo + ":" + tag
}

func forPlatform(arch, variant string) func(*ocispec.Image, *ocispec.Manifest) {
	return func(c *ocispec.Image, _ *ocispec.Manifest) {
		c.Platform = ocispec.Platform{OS: "linux", Architecture: arch, Variant: variant}
	}
}

func TestPlatforms(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	amd := build(t, forPlatform("amd64", ""), tarOf(t, file("amd64", "")))
	arm := build(t, forPlatform("arm64", "v8"), tarOf(t, file("arm64", "")))
	ref := s.index(t, "app", "v1", amd, arm)
	for arch, want := range map[string]*built{"amd64": amd, "arm64": arm} {
		r := newRig(t)
		p := &ocispec.Platform{OS: "linux", Architecture: arch}
		img, err := r.Pull(r.ctx, ref, PullOptions{Platform: p})
		if err != nil {
			t.Fatalf("%s: %v", arch, err)
		}
		if img.ID != digest.FromBytes(want.config) || img.Platform.Architecture != arch || img.Target.MediaType != ocispec.MediaTypeImageIndex {
			t.Errorf("%s: image %+v", arch, img)
		}
		// The one that is here is what is meant.
		if got, err := r.Get(r.ctx, ref, nil); err != nil || got.ID != img.ID {
			t.Errorf("%s: get: %v", arch, err)
		}
		if list, err := r.List(r.ctx); err != nil || len(list) != 1 || list[0].ID != img.ID {
			t.Errorf("%s: list: %+v %v", arch, list, err)
		}
	}
	r := newRig(t)
	_, err := r.Pull(r.ctx, ref, PullOptions{Platform: &ocispec.Platform{OS: "linux", Architecture: "riscv64"}})
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "no matching manifest for linux/riscv64 in the manifest list entries") {
		t.Errorf("platform that is not there: %v", err)
	}
	single := s.push(t, "single", "v1", arm)
	_, err = r.Pull(r.ctx, single, PullOptions{Platform: &ocispec.Platform{OS: "linux", Architecture: "amd64"}})
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "does not match the specified platform") {
		t.Errorf("single manifest of another platform: %v", err)
	}
	r.clean(t)
}

func TestNotFound(t *testing.T) {
	t.Parallel()
	r, s := newRig(t), newServer(t)
	s.push(t, "app", "v1", build(t, nil))
	_, err := r.Pull(r.ctx, s.host()+"/app:nothing", PullOptions{})
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "manifest for "+s.host()+"/app:nothing not found: manifest unknown") {
		t.Errorf("unknown tag: %v", err)
	}
	_, err = r.Pull(r.ctx, s.host()+"/app@"+digest.FromString("x").String(), PullOptions{})
	if !errdefs.IsNotFound(err) {
		t.Errorf("unknown digest: %v", err)
	}
	_, err = r.Pull(r.ctx, "127.0.0.1:1/app:v1", PullOptions{})
	if !errdefs.IsUnavailable(err) {
		t.Errorf("no registry: %v", err)
	}
	img, err := r.Pull(r.ctx, s.host()+"/app:v1", PullOptions{})
	if err != nil || img.ChainID != "" {
		t.Errorf("image without layers: %+v %v", img, err)
	}
}

func TestAllTags(t *testing.T) {
	t.Parallel()
	r, s := newRig(t), newServer(t)
	for _, tag := range []string{"a", "b", "c"} {
		s.push(t, "app", tag, build(t, nil, tarOf(t, file(tag, ""))))
	}
	if _, err := r.Pull(r.ctx, s.host()+"/app", PullOptions{AllTags: true}); err != nil {
		t.Fatal(err)
	}
	if list, err := r.List(r.ctx); err != nil || len(list) != 3 {
		t.Errorf("list: %+v %v", list, err)
	}
}

// TestRecover drops what an operation held whose daemon died.
func TestRecover(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	ctx, _, err := r.newLease(r.ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.over.Prepare(ctx, "extract-dead", ""); err != nil {
		t.Fatal(err)
	}
	if _, err := r.store.GC(r.ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := r.over.Stat(r.ctx, "extract-dead"); err != nil {
		t.Errorf("before: %v", err)
	}
	if err := r.Recover(r.ctx); err != nil {
		t.Fatal(err)
	}
	r.clean(t)
}
