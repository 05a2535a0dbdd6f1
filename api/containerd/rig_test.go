package containerd_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ctrd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/hako-engine/hako/api/containerd"
	"github.com/hako-engine/hako/image"
	"github.com/hako-engine/hako/image/registry"
	"github.com/hako-engine/hako/internal/events"
	"github.com/hako-engine/hako/snapshot"
	"github.com/hako-engine/hako/snapshot/mounts"
	"github.com/hako-engine/hako/store"
)

// rig is a server on stores of its own, with containerd's own client.
type rig struct {
	*ctrd.Client
	store  *store.Store
	server *containerd.Server
	socket string
	ctx    context.Context
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: " + t.Name())
	}
}

func newRig(t *testing.T) *rig {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	bus := &events.Bus{}
	st, err := store.Open(filepath.Join(dir, "store"), store.Options{NoBackgroundGC: true, Events: bus})
	if err != nil {
		t.Fatal(err)
	}
	over, err := snapshot.NewOverlay(filepath.Join(dir, "overlayfs"), st)
	if err != nil {
		t.Fatal(err)
	}
	native, err := snapshot.NewNative(filepath.Join(dir, "native"), st)
	if err != nil {
		t.Fatal(err)
	}
	sns := map[string]snapshots.Snapshotter{"overlayfs": over, "native": native}
	images := image.New(image.Options{
		Content: st.Content(), Images: st.Images(), Leases: st.Leases(), Snapshotters: sns, Default: "overlayfs",
		Registry: registry.Options{DockerConfig: filepath.Join(dir, "none")},
	})
	mm, err := mounts.New(mounts.Options{Dir: filepath.Join(dir, "mounts"), LeaseGone: func(ctx context.Context, id string) bool {
		_, err := st.Leases().ListResources(ctx, leases.Lease{ID: id})
		return errdefs.IsNotFound(err)
	}})
	if err != nil {
		t.Fatal(err)
	}
	srv, err := containerd.New(containerd.Options{
		Content: st.Content(), Images: st.Images(), Leases: st.Leases(), Namespaces: st.Namespaces(),
		Snapshotters: sns, DefaultSnapshotter: "overlayfs", Bus: bus, Differ: images, Transfer: images, Mounts: mm,
		Version: "1.2.3", Revision: "abc", UUID: "5e1f9c3d-0000-4000-8000-000000000001",
	})
	if err != nil {
		t.Fatal(err)
	}
	// The path of a socket is short, that of a test's folder may not be.
	sockets, err := os.MkdirTemp("", "ctrd")
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(sockets, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	c, err := ctrd.New(socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		end, cancel := context.WithCancel(context.Background())
		cancel()
		srv.Shutdown(end)
		if err := <-served; err != nil {
			t.Error(err)
		}
		if err := mounts.Purge(filepath.Join(dir, "mounts")); err != nil {
			t.Error(err)
		}
		over.Close()
		native.Close()
		st.Close()
		os.RemoveAll(sockets)
	})
	return &rig{c, st, srv, socket, namespaces.WithNamespace(context.Background(), "test")}
}

// files make a layer: a name that ends in / is a directory, contents that begin with -> a link.
type files map[string]string

func (f files) layer(t *testing.T) v1.Layer {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, n := range sorted(f) {
		h := &tar.Header{Name: n, Mode: 0o644, Size: int64(len(f[n])), Typeflag: tar.TypeReg}
		switch target, link := strings.CutPrefix(f[n], "->"); {
		case strings.HasSuffix(n, "/"):
			h.Typeflag, h.Mode, h.Size = tar.TypeDir, 0o755, 0
		case link:
			h.Typeflag, h.Linkname, h.Size = tar.TypeSymlink, target, 0
		}
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			io.WriteString(tw, f[n])
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func newImage(t *testing.T, arch string, layers ...files) v1.Image {
	t.Helper()
	img := v1.Image(empty.Image)
	for _, f := range layers {
		var err error
		if img, err = mutate.AppendLayers(img, f.layer(t)); err != nil {
			t.Fatal(err)
		}
	}
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cf.OS, cf.Architecture = "linux", arch
	if img, err = mutate.ConfigFile(img, cf); err != nil {
		t.Fatal(err)
	}
	return img
}

// newRegistry gives the address of a registry on loopback that holds images by their names.
func newRegistry(t *testing.T, images map[string]v1.Image) string {
	t.Helper()
	s := httptest.NewServer(ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(s.Close)
	host := strings.TrimPrefix(s.URL, "http://")
	for n, img := range images {
		push(t, s.URL, n, img)
	}
	return host
}

// newGuardedRegistry is one that wants the user u with the password p.
func newGuardedRegistry(t *testing.T, n string, img v1.Image) string {
	t.Helper()
	inner := ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))
	open := httptest.NewServer(inner)
	defer open.Close()
	push(t, open.URL, n, img)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if u, p, ok := req.BasicAuth(); !ok || u != "u" || p != "p" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		inner.ServeHTTP(w, req)
	}))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

// push stores an image as NAME:TAG.
func push(t *testing.T, url, n string, img v1.Image) {
	t.Helper()
	repo, tag, _ := strings.Cut(n, ":")
	do := func(method, path, contentType string, body []byte) {
		t.Helper()
		req, err := http.NewRequest(method, url+"/v2/"+repo+path, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", contentType)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusCreated {
			t.Fatalf("%s %s: %s", method, path, resp.Status)
		}
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		d, derr := l.Digest()
		r, err := l.Compressed()
		if derr != nil || err != nil {
			t.Fatal(derr, err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		do(http.MethodPost, "/blobs/uploads/?digest="+d.String(), "application/octet-stream", b)
	}
	cfg, cerr := img.RawConfigFile()
	d, derr := img.ConfigName()
	raw, rerr := img.RawManifest()
	mt, merr := img.MediaType()
	if err := errors.Join(cerr, derr, rerr, merr); err != nil {
		t.Fatal(err)
	}
	do(http.MethodPost, "/blobs/uploads/?digest="+d.String(), "application/octet-stream", cfg)
	do(http.MethodPut, "/manifests/"+tag, string(mt), raw)
}
