package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/registry"
	"github.com/hako-engine/hako/snapshot"
	"github.com/hako-engine/hako/store"
)

// needRoot names the test that is left out without root.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skipf("needs root: %s makes overlay snapshots", t.Name())
	}
}

// rig is a service with a store of its own.
type rig struct {
	*Service
	store *store.Store
	over  *snapshot.Snapshotter
	ctx   context.Context
	root  string
}

func newRig(t testing.TB, change ...func(*Options)) *rig {
	t.Helper()
	return newRigAt(t, t.TempDir(), change...)
}

func newRigAt(t testing.TB, root string, change ...func(*Options)) *rig {
	t.Helper()
	needRoot(t)
	st, err := store.Open(filepath.Join(root, "store"), store.Options{NoBackgroundGC: true})
	if err != nil {
		t.Fatal(err)
	}
	over, err := snapshot.NewOverlay(filepath.Join(root, "overlayfs"), st)
	if err != nil {
		t.Fatal(err)
	}
	native, err := snapshot.NewNative(filepath.Join(root, "native"), st)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		over.Close()
		native.Close()
		st.Close()
	})
	o := Options{
		Content: st.Content(), Images: st.Images(), Leases: st.Leases(),
		Snapshotters: map[string]snapshots.Snapshotter{"overlayfs": over, "native": native}, Default: "overlayfs",
		UserAgent: "hako/test",
		Registry:  registry.Options{Timeout: 5 * time.Minute, Backoff: 5 * time.Millisecond, DockerConfig: filepath.Join(root, "no-docker-config")},
	}
	for _, c := range change {
		c(&o)
	}
	return &rig{New(o), st, over, namespaces.WithNamespace(context.Background(), defaultNamespace), root}
}

// files gives the directory of a committed snapshot's layers, the topmost first.
func (r *rig) layerDirs(t *testing.T, chain digest.Digest) []string {
	t.Helper()
	key := "test-view-" + t.Name() + chain.Encoded()[:8]
	mounts, err := r.over.View(r.ctx, key, chain.String())
	if err != nil {
		t.Fatal(err)
	}
	defer r.over.Remove(r.ctx, key)
	dirs, err := lowerDirs(mounts)
	if err != nil {
		t.Fatal(err)
	}
	return dirs
}

// server is a registry on loopback.
type server struct {
	*httptest.Server
	wrap atomic.Pointer[func(http.ResponseWriter, *http.Request, http.Handler)]
}

// intercept puts f before the registry from the next request on; nil: nothing.
func (s *server) intercept(f func(http.ResponseWriter, *http.Request, http.Handler)) {
	if f == nil {
		s.wrap.Store(nil)
		return
	}
	s.wrap.Store(&f)
}

func newServer(t testing.TB) *server {
	t.Helper()
	s := &server{}
	inner := ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if f := s.wrap.Load(); f != nil {
			(*f)(w, r, inner)
			return
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return s
}

func (s *server) host() string { return strings.TrimPrefix(s.URL, "http://") }

func (s *server) put(t testing.TB, path, mediaType string, body []byte) {
	t.Helper()
	req, err := http.NewRequest(http.MethodPut, s.URL+path, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", mediaType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		b, _ := io.ReadAll(resp.Body)
		t.Fatalf("PUT %s: %s: %s", path, resp.Status, b)
	}
}

func (s *server) blob(t testing.TB, repo string, b []byte) digest.Digest {
	t.Helper()
	d := digest.FromBytes(b)
	resp, err := http.Post(s.URL+"/v2/"+repo+"/blobs/uploads/?digest="+d.String(), "application/octet-stream", bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		t.Fatalf("upload: %s", resp.Status)
	}
	return d
}

// entry is a member of a layer.
type entry struct {
	tar.Header
	body string
}

func file(name, body string) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(body))}, body}
}

func dir(name string, mode int64) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode}}
}

func link(typ byte, name, target string) entry {
	return entry{Header: tar.Header{Typeflag: typ, Name: name, Linkname: target, Mode: 0o777}}
}

func tarOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		if h.Format == tar.FormatUnknown && len(h.PAXRecords) > 0 {
			h.Format = tar.FormatPAX
		}
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(tw, e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gzipped(b []byte) []byte {
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	_, _ = z.Write(b)
	_ = z.Close()
	return out.Bytes()
}

func zstded(b []byte) []byte {
	z, err := zstd.NewWriter(nil)
	if err != nil {
		panic(err)
	}
	return z.EncodeAll(b, nil)
}

// built is an image made for a test.
type built struct {
	manifest, config []byte
	layers           [][]byte // packed
	diffIDs          []digest.Digest
	platform         ocispec.Platform
}

// build makes an image of layers (tars), packed with gzip.
func build(t testing.TB, change func(*ocispec.Image, *ocispec.Manifest), layers ...[]byte) *built {
	t.Helper()
	b := &built{platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}}
	created := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	cfg := ocispec.Image{Created: &created, Platform: b.platform, Config: ocispec.ImageConfig{Cmd: []string{"/bin/true"}, Labels: map[string]string{"a": "b"}}, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{}}}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{}}
	for i, l := range layers {
		packed, mt := gzipped(l), ocispec.MediaTypeImageLayerGzip
		switch i % 3 {
		case 1:
			packed, mt = zstded(l), ocispec.MediaTypeImageLayerZstd
		case 2:
			packed, mt = l, ocispec.MediaTypeImageLayer
		}
		b.layers = append(b.layers, packed)
		b.diffIDs = append(b.diffIDs, digest.FromBytes(l))
		m.Layers = append(m.Layers, ocispec.Descriptor{MediaType: mt, Digest: digest.FromBytes(packed), Size: int64(len(packed))})
	}
	cfg.RootFS.DiffIDs = append(cfg.RootFS.DiffIDs, b.diffIDs...)
	if change != nil {
		change(&cfg, &m)
	}
	b.platform = cfg.Platform
	b.config = marshal(t, cfg)
	if m.Config.Digest == "" {
		m.Config = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(b.config), Size: int64(len(b.config))}
	}
	b.manifest = marshal(t, m)
	return b
}

func marshal(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// push puts an image into the registry, and gives its reference.
func (s *server) push(t testing.TB, repo, tag string, b *built) string {
	t.Helper()
	for _, l := range b.layers {
		s.blob(t, repo, l)
	}
	s.blob(t, repo, b.config)
	s.put(t, "/v2/"+repo+"/manifests/"+tag, ocispec.MediaTypeImageManifest, b.manifest)
	return s.host() + "/" + repo + ":" + tag
}

// threeLayers is an image that uses what layers can do to each other.
func threeLayers(t testing.TB) *built {
	return build(t, nil,
		tarOf(t, dir("etc", 0o755), file("etc/passwd", "root:x:0:0::/:/\n"), dir("var", 0o711), dir("var/data", 0o700), file("var/data/old", "old"), file("var/data/keep", "keep"), dir("gone", 0o755), file("gone/x", "x")),
		tarOf(t, file("var/data/new", "new"), file("var/data/.wh.old", ""), file(".wh.gone", "")),
		tarOf(t, dir("var/data", 0o750), file("var/data/.wh..wh.opq", ""), file("var/data/last", "last"), link(tar.TypeSymlink, "etc/link", "/etc/passwd")),
	)
}

func readAll(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// mounted mounts an image's snapshot read-only until the test ends.
func (r *rig) mounted(t *testing.T, img Image) string {
	t.Helper()
	key := "mounted-" + t.Name()
	mounts, err := r.over.View(r.ctx, key, img.ChainID.String())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := mount.All(mounts, dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mount.UnmountAll(dir, 0); err != nil {
			t.Error(err)
		}
		_ = r.over.Remove(r.ctx, key)
	})
	return dir
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return list
}

// onlyManifests fails a test that fetches a blob.
func onlyManifests(t *testing.T) func(http.ResponseWriter, *http.Request, http.Handler) {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if strings.Contains(r.URL.Path, "/blobs/") {
			t.Errorf("blob asked for: %s %s", r.Method, r.URL)
		}
		next.ServeHTTP(w, r)
	}
}
