package tools

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/image/copier"
	"github.com/hako-engine/hako/image/registry"
	"github.com/hako-engine/hako/image/transport"
)

// TestHostileRegistry copies from a registry that lies; nothing becomes visible.
func TestHostileRegistry(t *testing.T) {
	t.Parallel()
	src, _, b := source(t)
	k := kit(t)
	for name, lie := range map[string]func(w http.ResponseWriter, r *http.Request) bool{
		"a blob with other contents": func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
				raw := bytes.Clone(b[digest.Digest(r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:])])
				raw[len(raw)-1] ^= 1
				_, _ = w.Write(raw)
				return true
			}
			return false
		},
		"a blob that does not end": func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
				w.(http.Flusher).Flush()
				for range 200 {
					if _, err := w.Write(make([]byte, 4096)); err != nil {
						return true
					}
				}
				return true
			}
			return false
		},
		"another manifest than asked for": func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/manifests/sha256:") {
				w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
				_, _ = io.WriteString(w, `{"schemaVersion":2,"config":{"digest":"sha256:`+strings.Repeat("0", 64)+`","size":2},"layers":[]}`)
				return true
			}
			return false
		},
		"a huge manifest": func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/manifests/1") {
				w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
				for range 10 << 10 {
					if _, err := w.Write(make([]byte, 1<<10)); err != nil {
						return true
					}
				}
				return true
			}
			return false
		},
		"a redirect to a file": func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
				w.Header().Set("Location", "file:///etc/passwd")
				w.WriteHeader(http.StatusTemporaryRedirect)
				return true
			}
			return false
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var on atomic.Bool
			host := newRegistry(t, func(w http.ResponseWriter, r *http.Request) bool { return on.Load() && lie(w, r) })
			if _, err := k.Copy(context.Background(), src, "docker://"+host+"/app:1", CopyOptions{}); err != nil {
				t.Fatal(err)
			}
			on.Store(true)
			dir := t.TempDir()
			for _, to := range []string{"oci:" + dir + "/l:1", "oci-archive:" + dir + "/a.tar:1", "dir:" + dir + "/d", "docker://" + newRegistry(t, nil) + "/copy:1"} {
				res, err := k.Copy(context.Background(), "docker://"+host+"/app:1", to, CopyOptions{})
				if err == nil {
					t.Errorf("to %s: %+v", to, res)
				}
				if s, _, err := k.Open(context.Background(), to, transport.Registry, Access{}); err == nil {
					if _, _, err := s.Top(context.Background()); err == nil {
						t.Errorf("%s has an image", to)
					}
					s.Close()
				}
			}
			for _, f := range []string{"l/index.json", "a.tar", "d/manifest.json"} {
				if _, err := os.Stat(filepath.Join(dir, f)); err == nil {
					t.Errorf("%s appeared", f)
				}
			}
		})
	}
}

// TestCredentialsStayHome sends a password to the registry that it is for, and to no place
// that it sends us to: neither for a blob, nor for an upload.
func TestCredentialsStayHome(t *testing.T) {
	t.Parallel()
	var leaked atomic.Value
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for _, h := range []string{"Authorization", "Cookie", "X-Secret"} {
			if v := r.Header.Get(h); v != "" {
				leaked.Store(h + ": " + v + " with " + r.Method)
			}
		}
		_, _ = io.Copy(io.Discard, r.Body)
		w.WriteHeader(http.StatusNotFound)
	}))
	defer other.Close()
	asked := atomic.Int32{}
	host := newRegistry(t, func(w http.ResponseWriter, r *http.Request) bool {
		if u, p, ok := r.BasicAuth(); !ok || u != "me" || p != "secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		asked.Add(1)
		switch {
		case r.Method == http.MethodPost:
			w.Header().Set("Location", other.URL+"/upload")
			w.WriteHeader(http.StatusAccepted)
			return true
		case r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/"):
			http.Redirect(w, r, other.URL+"/blob", http.StatusTemporaryRedirect)
			return true
		}
		return false
	})
	acc := Access{Credentials: registry.Credentials{Username: "me", Password: "secret"}}
	k := kit(t)
	src, _, b := source(t)
	if _, err := k.Copy(context.Background(), src, "docker://"+host+"/app:1", CopyOptions{Destination: acc}); err == nil {
		t.Error("the upload went somewhere")
	}
	s, _, err := k.Open(context.Background(), "docker://"+host+"/app:1", transport.Registry, acc)
	if err != nil {
		t.Fatal(err)
	}
	for d, raw := range b {
		if _, err := transport.ReadBlob(context.Background(), s, ocispec.Descriptor{Digest: d, Size: int64(len(raw))}, 1<<30); err == nil {
			t.Error("a blob came from somewhere")
		}
		break
	}
	if l := leaked.Load(); l != nil {
		t.Errorf("told the other host %v", l)
	}
	if asked.Load() == 0 {
		t.Error("the registry itself was never told")
	}
}

// TestUploadElsewhere refuses to send an upload to what is no web server, or one without TLS.
func TestUploadElsewhere(t *testing.T) {
	t.Parallel()
	for _, loc := range []string{"file:///tmp/x", "gopher://example.com/", "//", "http://me:secret@127.0.0.1/"} {
		host := newRegistry(t, func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPost {
				w.Header().Set("Location", loc)
				w.WriteHeader(http.StatusAccepted)
				return true
			}
			return false
		})
		src, _, _ := source(t)
		if _, err := kit(t).Copy(context.Background(), src, "docker://"+host+"/app:1", CopyOptions{}); err == nil {
			t.Errorf("%s was followed", loc)
		}
	}
}

// TestHostileLayout reads a layout that wants to lead elsewhere.
func TestHostileLayout(t *testing.T) {
	t.Parallel()
	k, ctx := kit(t), context.Background()
	outside := filepath.Join(t.TempDir(), "secret")
	b := blobs{}
	top := b.image(t, "amd64", tarOf(t, "f", "x"))
	raw := b[top.Digest]
	if err := os.WriteFile(outside, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(dir string) error{
		"a blob that is a link out": func(dir string) error {
			p := filepath.Join(dir, "blobs", "sha256", top.Digest.Encoded())
			if err := os.Remove(p); err != nil {
				return err
			}
			return os.Symlink(outside, p)
		},
		"an index.json that is a link out": func(dir string) error {
			p := filepath.Join(dir, "index.json")
			if err := os.Rename(p, outside+".index"); err != nil {
				return err
			}
			return os.Symlink(outside+".index", p)
		},
		"a FIFO in the place of a blob": func(dir string) error {
			p := filepath.Join(dir, "blobs", "sha256", top.Digest.Encoded())
			if err := os.Remove(p); err != nil {
				return err
			}
			return unix.Mkfifo(p, 0o600)
		},
		"a digest that is a path": func(dir string) error {
			idx := fmt.Sprintf(`{"schemaVersion":2,"manifests":[{"mediaType":%q,"digest":"sha256:../../../secret","size":%d}]}`, top.MediaType, len(raw))
			return os.WriteFile(filepath.Join(dir, "index.json"), []byte(idx), 0o644)
		},
		"a huge index.json": func(dir string) error {
			return os.Truncate(filepath.Join(dir, "index.json"), 1<<30)
		},
	} {
		dir := b.layout(t, top)
		if err := spoil(dir); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() {
			_, err := k.Copy(ctx, "oci:"+dir+"", "oci:"+t.TempDir()+":v1", CopyOptions{})
			done <- err
		}()
		select {
		case err := <-done:
			if err == nil {
				t.Errorf("%s: was copied", name)
			}
		case <-time.After(5 * time.Minute):
			t.Errorf("%s: hangs", name)
		}
	}
}

// TestDestinationLinks does not write through links that lie in a destination.
func TestDestinationLinks(t *testing.T) {
	t.Parallel()
	k, ctx := kit(t), context.Background()
	src, top, b := source(t)
	dir, outside := t.TempDir(), t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "blobs"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(dir, "blobs", "sha256")); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Copy(ctx, src, "oci:"+dir+":v1", CopyOptions{}); err == nil {
		t.Error("written through a link to another folder")
	}
	dir2 := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir2, "blobs", "sha256"), 0o755); err != nil {
		t.Fatal(err)
	}
	victim := filepath.Join(outside, "victim")
	if err := os.WriteFile(victim, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	for d := range b {
		for _, suffix := range []string{"", ".partial", ".new"} {
			if err := os.Symlink(victim, filepath.Join(dir2, "blobs", "sha256", d.Encoded()+suffix)); err != nil {
				t.Fatal(err)
			}
		}
	}
	_, _ = k.Copy(ctx, src, "oci:"+dir2+":v1", CopyOptions{})
	if got, err := os.ReadFile(victim); err != nil || string(got) != "mine" {
		t.Errorf("the file outside holds %q, %v", got, err)
	}
	left, err := os.ReadDir(outside)
	if err != nil || len(left) != 1 {
		t.Errorf("outside: %v %v", left, err)
	}
	_ = top
}

// archiveOf writes an archive with headers as given.
func archiveOf(t *testing.T, entries ...any) string {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for i := 0; i < len(entries); i += 2 {
		h, body := entries[i].(tar.Header), entries[i+1].(string)
		h.Size, h.Mode = int64(len(body)), 0o644
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(tw, body); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "a.tar")
	if err := os.WriteFile(name, buf.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

// TestHostileArchives reads archives whose names lead elsewhere, or nowhere.
func TestHostileArchives(t *testing.T) {
	t.Parallel()
	k, ctx := kit(t), context.Background()
	reg := func(name string) tar.Header { return tar.Header{Typeflag: tar.TypeReg, Name: name} }
	link := func(name, to string) tar.Header {
		return tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to}
	}
	config := `{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[]}}`
	for name, file := range map[string]string{
		"a config out of the archive":    archiveOf(t, reg("manifest.json"), `[{"Config":"../../../../etc/passwd","Layers":[]}]`),
		"an absolute config":             archiveOf(t, reg("manifest.json"), `[{"Config":"/etc/passwd","Layers":[]}]`),
		"a layer that is a link out":     archiveOf(t, reg("manifest.json"), `[{"Config":"c.json","Layers":["l"]}]`, reg("c.json"), config, link("l", "/etc/passwd"), ""),
		"links in a circle":              archiveOf(t, reg("manifest.json"), `[{"Config":"a","Layers":[]}]`, link("a", "b"), "", link("b", "a"), ""),
		"neither layout nor docker's":    archiveOf(t, reg("x"), "y"),
		"not JSON":                       archiveOf(t, reg("manifest.json"), `[{`),
		"no image":                       archiveOf(t, reg("manifest.json"), `[]`),
		"a layout with a digest as path": archiveOf(t, reg("index.json"), `{"schemaVersion":2,"manifests":[{"digest":"sha256:../../x","size":1}]}`),
	} {
		if _, err := k.Copy(ctx, "docker-archive:"+file, "oci:"+t.TempDir()+":v1", CopyOptions{}); err == nil {
			t.Errorf("%s: was copied", name)
		}
	}
	truncated := archiveOf(t, reg("manifest.json"), strings.Repeat(" ", 5000))
	if err := os.Truncate(truncated, 1000); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{truncated, "/dev/null", t.TempDir(), filepath.Join(t.TempDir(), "missing")} {
		if _, err := k.Copy(ctx, "oci-archive:"+f, "oci:"+t.TempDir()+":v1", CopyOptions{}); err == nil {
			t.Errorf("%s: was copied", f)
		}
	}
}

// TestHostileDocuments refuses what readers would understand in different ways, and more
// than memory should hold.
func TestHostileDocuments(t *testing.T) {
	t.Parallel()
	k, ctx := kit(t), context.Background()
	for name, raw := range map[string]string{
		"manifest and index": `{"schemaVersion":2,"manifests":[],"layers":[],"config":{}}`,
		"a field twice":      `{"schemaVersion":2,"layers":[],"Layers":[],"config":{}}`,
		"negative size":      `{"schemaVersion":2,"layers":[],"config":{"digest":"sha256:` + strings.Repeat("0", 64) + `","size":-1}}`,
		"schema 1":           `{"schemaVersion":1,"fslayers":[]}`,
	} {
		b := blobs{}
		d := b.add(ocispec.MediaTypeImageManifest, []byte(raw))
		if _, err := k.Copy(ctx, "oci:"+b.layout(t, d)+":v1", "oci:"+t.TempDir(), CopyOptions{}); err == nil {
			t.Errorf("%s: was copied", name)
		}
	}
	// Indexes in indexes.
	b := blobs{}
	d := b.image(t, "amd64")
	for range 8 {
		d = b.json(t, ocispec.MediaTypeImageIndex, ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispec.Descriptor{d}})
	}
	if _, err := k.Copy(ctx, "oci:"+b.layout(t, d)+":v1", "oci:"+t.TempDir(), CopyOptions{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("nested too deep: %v", err)
	}
	// A layer with a bomb in it, converted.
	bomb := blobs{}
	top := bomb.image(t, "amd64", tarOf(t, "x", "y"))
	var m ocispec.Manifest
	if err := json.Unmarshal(bomb[top.Digest], &m); err != nil {
		t.Fatal(err)
	}
	m.Layers[0].Size++
	top = bomb.json(t, top.MediaType, m)
	if _, err := k.Copy(ctx, "oci:"+bomb.layout(t, top)+":v1", "oci:"+t.TempDir(), CopyOptions{Options: copier.Options{}}); !errdefs.IsDataLoss(err) {
		t.Errorf("a wrong size: %v", err)
	}
}
