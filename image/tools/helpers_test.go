package tools

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/manifest"
	"github.com/hako-engine/hako/image/registry"
	"github.com/hako-engine/hako/image/transport"
)

func kit(t testing.TB) *Tools {
	t.Helper()
	return New(Options{Registry: registry.Options{Timeout: 5 * time.Minute, Backoff: 5 * time.Millisecond, Attempts: 3, DockerConfig: t.TempDir()}})
}

// newRegistry serves an empty registry, and gives its host. before looks at each request and
// says whether it has answered it.
func newRegistry(t testing.TB, before func(w http.ResponseWriter, r *http.Request) bool) string {
	t.Helper()
	inner := ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)), ggcr.WithReferrersSupport(true))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if before == nil || !before(w, r) {
			inner.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

// blobs are the parts of an image that a test makes.
type blobs map[digest.Digest][]byte

func (b blobs) add(mediaType string, raw []byte) ocispec.Descriptor {
	d := digest.FromBytes(raw)
	b[d] = raw
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(raw))}
}

func (b blobs) json(t testing.TB, mediaType string, v any) ocispec.Descriptor {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b.add(mediaType, raw)
}

// tarOf makes an archive of name, contents, name, contents...
func tarOf(t testing.TB, files ...string) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for i := 0; i < len(files); i += 2 {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: files[i], Mode: 0o644, Size: int64(len(files[i+1]))}
		if strings.HasSuffix(files[i], "/") {
			h.Typeflag, h.Mode, h.Size = tar.TypeDir, 0o755, 0
		}
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := io.WriteString(tw, files[i+1]); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func gz(t testing.TB, raw []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	if _, err := w.Write(raw); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// image makes an image for a platform.
func (b blobs) image(t testing.TB, arch string, layers ...[]byte) ocispec.Descriptor {
	t.Helper()
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{}}
	c := map[string]any{"os": "linux", "architecture": arch, "created": "2026-01-02T03:04:05Z", "config": map[string]any{"Env": []string{"PATH=/bin", "ARCH=" + arch}, "Cmd": []string{"/run"}}}
	var ids []digest.Digest
	for _, l := range layers {
		ids = append(ids, digest.FromBytes(l))
		m.Layers = append(m.Layers, b.add(ocispec.MediaTypeImageLayerGzip, gz(t, l)))
	}
	c["rootfs"] = ocispec.RootFS{Type: "layers", DiffIDs: ids}
	m.Config = b.json(t, ocispec.MediaTypeImageConfig, c)
	return b.json(t, ocispec.MediaTypeImageManifest, m)
}

// multi makes an image for amd64 and arm64, which share a layer.
func (b blobs) multi(t testing.TB) ocispec.Descriptor {
	t.Helper()
	noise := make([]byte, 40_000) // does not compress
	r := rand.New(rand.NewPCG(1, 2))
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	shared := tarOf(t, "etc/", "", "etc/motd", "hello", "big", string(noise))
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	for _, arch := range []string{"amd64", "arm64"} {
		d := b.image(t, arch, shared, tarOf(t, "run", "program for "+arch))
		d.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
		idx.Manifests = append(idx.Manifests, d)
	}
	return b.json(t, ocispec.MediaTypeImageIndex, idx)
}

// layout writes everything as an OCI layout whose image top is named v1.
func (b blobs) layout(t testing.TB, top ocispec.Descriptor) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o755); err != nil {
		t.Fatal(err)
	}
	put := func(name string, raw []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), raw, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for d, raw := range b {
		put("blobs/sha256/"+d.Encoded(), raw)
	}
	top.Annotations = map[string]string{ocispec.AnnotationRefName: "v1"}
	idx, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispec.Descriptor{top}})
	if err != nil {
		t.Fatal(err)
	}
	put("index.json", idx)
	put("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	return dir
}

// source gives a new image for two platforms in a layout.
func source(t testing.TB) (ref string, top ocispec.Descriptor, b blobs) {
	t.Helper()
	b = blobs{}
	top = b.multi(t)
	return "oci:" + b.layout(t, top) + ":v1", top, b
}

// whole reads everything that a reference leads to, and checks it.
func whole(t testing.TB, k *Tools, ref string) (top digest.Digest, all map[digest.Digest]bool) {
	t.Helper()
	ctx := context.Background()
	s, _, err := k.Open(ctx, ref, transport.Registry, Access{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	all = map[digest.Digest]bool{}
	var visit func(d ocispec.Descriptor, raw []byte)
	visit = func(d ocispec.Descriptor, raw []byte) {
		all[d.Digest] = true
		doc, err := manifest.Parse(ref, d.MediaType, raw)
		if err != nil {
			t.Fatal(err)
		}
		if doc.Index != nil {
			for _, m := range doc.Index.Manifests {
				child, err := s.Document(ctx, m)
				if err != nil {
					t.Fatal(err)
				}
				visit(m, child)
			}
			return
		}
		for _, l := range append(doc.Manifest.Layers, doc.Manifest.Config) {
			if _, err := transport.ReadBlob(ctx, s, l, 1<<30); err != nil {
				t.Fatalf("%s: %s: %v", ref, l.Digest, err)
			}
			all[l.Digest] = true
		}
	}
	d, raw, err := s.Top(ctx)
	if err != nil {
		t.Fatalf("%s: %v", ref, err)
	}
	visit(d, raw)
	return d.Digest, all
}

// counter counts requests by method.
type counter struct{ post, patch, put, mount atomic.Int32 }

func (c *counter) before(_ http.ResponseWriter, r *http.Request) bool {
	switch r.Method {
	case http.MethodPost:
		c.post.Add(1)
		if r.URL.Query().Get("mount") != "" {
			c.mount.Add(1)
		}
	case http.MethodPatch:
		c.patch.Add(1)
	case http.MethodPut:
		c.put.Add(1)
	}
	return false
}
