package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/image/registry"
	"github.com/hako-engine/hako/image/unpack"
)

// clean checks that a failed operation left nothing but, at most, a download to resume.
func (r *rig) clean(t *testing.T) {
	t.Helper()
	if l, err := r.store.Leases().List(r.ctx); err != nil || len(l) != 0 {
		t.Errorf("leases left: %v %v", l, err)
	}
	if l, err := r.store.Images().List(r.ctx); err != nil || len(l) != 0 {
		t.Errorf("images left: %v %v", l, err)
	}
	if _, err := r.store.GC(r.ctx); err != nil {
		t.Fatal(err)
	}
	err := r.over.Walk(r.ctx, func(_ context.Context, i snapshots.Info) error {
		t.Errorf("snapshot left: %+v", i)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// bigLayer does not compress, and is large enough to be interrupted.
func bigLayer(t testing.TB) []byte {
	var members []entry
	seed := []byte("seed")
	for i := range 40 {
		var body bytes.Buffer
		for body.Len() < 50<<10 {
			sum := digest.FromBytes(seed)
			seed = []byte(sum)
			body.WriteString(sum.Encoded())
		}
		members = append(members, file(fmt.Sprintf("f%d", i), body.String()))
	}
	return tarOf(t, members...)
}

func isBlob(r *http.Request) bool {
	return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/sha256:")
}

// cutting passes on only n bytes of a body, and then breaks the connection.
type cutting struct {
	http.ResponseWriter
	left int
}

func (c *cutting) Write(b []byte) (int, error) {
	if len(b) > c.left {
		_, _ = c.ResponseWriter.Write(b[:c.left])
		if f, ok := c.ResponseWriter.(http.Flusher); ok {
			f.Flush()
		}
		panic(http.ErrAbortHandler)
	}
	c.left -= len(b)
	return c.ResponseWriter.Write(b)
}

func TestPullFromBadRegistry(t *testing.T) {
	t.Parallel()
	layer := bigLayer(t)
	type test struct {
		name string
		wrap func(n *atomic.Int32) func(http.ResponseWriter, *http.Request, http.Handler)
		want func(error) bool // nil: success
	}
	unavailable := errdefs.IsUnavailable
	for _, c := range []test{
		{"cut off several times", func(n *atomic.Int32) func(http.ResponseWriter, *http.Request, http.Handler) {
			return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				if isBlob(r) && n.Add(1) < 5 {
					w = &cutting{w, 40 << 10}
				}
				next.ServeHTTP(w, r)
			}
		}, nil},
		{"reset before the answer", func(n *atomic.Int32) func(http.ResponseWriter, *http.Request, http.Handler) {
			return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				if n.Add(1)%3 != 0 {
					panic(http.ErrAbortHandler)
				}
				next.ServeHTTP(w, r)
			}
		}, nil},
		{"busy", func(n *atomic.Int32) func(http.ResponseWriter, *http.Request, http.Handler) {
			return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				if i := n.Add(1); i%3 != 0 {
					w.Header().Set("Retry-After", "0")
					w.WriteHeader([]int{429, 503, 500, 502}[i%4])
					return
				}
				next.ServeHTTP(w, r)
			}
		}, nil},
		{"broken for good", func(*atomic.Int32) func(http.ResponseWriter, *http.Request, http.Handler) {
			return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				if isBlob(r) {
					w.WriteHeader(500)
					return
				}
				next.ServeHTTP(w, r)
			}
		}, unavailable},
		{"always cut off", func(*atomic.Int32) func(http.ResponseWriter, *http.Request, http.Handler) {
			return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				if isBlob(r) {
					w = &cutting{w, 0}
				}
				next.ServeHTTP(w, r)
			}
		}, unavailable},
		{"without ranges", func(n *atomic.Int32) func(http.ResponseWriter, *http.Request, http.Handler) {
			return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				r.Header.Del("Range")
				if isBlob(r) && n.Add(1) < 4 {
					w = &cutting{w, 40 << 10}
				}
				next.ServeHTTP(w, r)
			}
		}, nil},
		{"wrong range", func(n *atomic.Int32) func(http.ResponseWriter, *http.Request, http.Handler) {
			return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				if isBlob(r) && r.Header.Get("Range") != "" {
					w.Header().Set("Content-Range", "bytes 0-9/10")
					w.WriteHeader(206)
					_, _ = w.Write(make([]byte, 10))
					return
				}
				if isBlob(r) && n.Add(1) > 1 {
					w = &cutting{w, 40 << 10}
				}
				next.ServeHTTP(w, r)
			}
		}, errdefs.IsInvalidArgument},
		{"wrong bytes", func(*atomic.Int32) func(http.ResponseWriter, *http.Request, http.Handler) {
			return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				if isBlob(r) {
					w = flipping{w}
				}
				next.ServeHTTP(w, r)
			}
		}, errdefs.IsDataLoss},
		{"wrong length", func(*atomic.Int32) func(http.ResponseWriter, *http.Request, http.Handler) {
			return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				if isBlob(r) {
					_, _ = w.Write([]byte("short"))
					return
				}
				next.ServeHTTP(w, r)
			}
		}, errdefs.IsDataLoss},
		{"endless", func(*atomic.Int32) func(http.ResponseWriter, *http.Request, http.Handler) {
			return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				if !isBlob(r) {
					next.ServeHTTP(w, r)
					return
				}
				for r.Context().Err() == nil {
					if _, err := w.Write(make([]byte, 64<<10)); err != nil {
						return
					}
				}
			}
		}, errdefs.IsDataLoss},
		{"endless manifest", func(*atomic.Int32) func(http.ResponseWriter, *http.Request, http.Handler) {
			return func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
				for r.Context().Err() == nil {
					if _, err := w.Write(bytes.Repeat([]byte(" "), 64<<10)); err != nil {
						return
					}
				}
			}
		}, errdefs.IsResourceExhausted},
		{"drip", func(*atomic.Int32) func(http.ResponseWriter, *http.Request, http.Handler) {
			return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				if !isBlob(r) {
					next.ServeHTTP(w, r)
					return
				}
				for r.Context().Err() == nil {
					_, _ = w.Write([]byte{0x1f})
					w.(http.Flusher).Flush()
					time.Sleep(20 * time.Millisecond)
				}
			}
		}, unavailable},
		{"silence", func(*atomic.Int32) func(http.ResponseWriter, *http.Request, http.Handler) {
			return func(_ http.ResponseWriter, r *http.Request, _ http.Handler) { <-r.Context().Done() }
		}, unavailable},
		{"redirects for ever", func(*atomic.Int32) func(http.ResponseWriter, *http.Request, http.Handler) {
			return func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
				http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect)
			}
		}, unavailable},
		{"header of a wrong digest", func(*atomic.Int32) func(http.ResponseWriter, *http.Request, http.Handler) {
			return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				next.ServeHTTP(&setting{w, "Docker-Content-Digest", digest.FromString("x").String()}, r)
			}
		}, errdefs.IsDataLoss},
		{"header of a bad digest", func(*atomic.Int32) func(http.ResponseWriter, *http.Request, http.Handler) {
			return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				next.ServeHTTP(&setting{w, "Docker-Content-Digest", "sha256:../../x"}, r)
			}
		}, errdefs.IsInvalidArgument},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newServer(t)
			ref := s.push(t, "app", "v1", build(t, nil, layer))
			r := newRig(t, func(o *Options) {
				o.Registry.Attempts = 4
				if c.name == "silence" || c.name == "drip" { // all others answer, as soon as the machine lets them
					o.Registry.Timeout = 300 * time.Millisecond
				}
			})
			bad, mended := c.wrap(new(atomic.Int32)), atomic.Bool{}
			s.intercept(func(w http.ResponseWriter, q *http.Request, next http.Handler) {
				if mended.Load() {
					next.ServeHTTP(w, q)
					return
				}
				bad(w, q, next)
			})
			_, err := r.Pull(r.ctx, ref, PullOptions{})
			if c.want == nil {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if err == nil || !c.want(err) {
				t.Fatalf("error is %v", err)
			}
			r.clean(t)
			mended.Store(true)
			if err := r.pullBusy(ref); err != nil {
				t.Errorf("next pull: %v", err)
			}
		})
	}
}

type flipping struct{ http.ResponseWriter }

func (f flipping) Write(b []byte) (int, error) {
	b = bytes.Clone(b)
	b[len(b)/2] ^= 0xff
	return f.ResponseWriter.Write(b)
}

// setting overrides a header.
type setting struct {
	http.ResponseWriter
	key, value string
}

func (s *setting) WriteHeader(code int) {
	s.Header().Set(s.key, s.value)
	s.ResponseWriter.WriteHeader(code)
}

func (s *setting) Write(b []byte) (int, error) {
	s.Header().Set(s.key, s.value)
	return s.ResponseWriter.Write(b)
}

// TestPullResumes cancels a pull in the middle of a layer; the next asks for the rest.
func TestPullResumes(t *testing.T) {
	t.Parallel()
	r, s := newRig(t), newServer(t)
	b := build(t, nil, bigLayer(t))
	ref := s.push(t, "app", "v1", b)
	ctx, cancel := context.WithCancel(r.ctx)
	s.intercept(func(w http.ResponseWriter, q *http.Request, next http.Handler) {
		if isBlob(q) && strings.Contains(q.URL.Path, digest.FromBytes(b.layers[0]).String()) {
			w = &stopping{w, 700 << 10, func() {
				// The client takes it in before it is cancelled.
				for q.Context().Err() == nil {
					if st, err := r.store.Content().ListStatuses(r.ctx); err == nil && len(st) == 1 && st[0].Offset >= 500<<10 {
						break
					}
					time.Sleep(time.Millisecond)
				}
				cancel()
				<-q.Context().Done()
			}}
		}
		next.ServeHTTP(w, q)
	})
	if _, err := r.Pull(ctx, ref, PullOptions{}); err == nil {
		t.Fatal("cancelled pull succeeded")
	}
	r.clean(t)
	if st, err := r.store.Content().ListStatuses(r.ctx); err != nil || len(st) != 1 || st[0].Offset < 500<<10 {
		t.Errorf("what was received: %+v %v", st, err)
	}
	var ranges []string
	var mu sync.Mutex
	s.intercept(func(w http.ResponseWriter, q *http.Request, next http.Handler) {
		if isBlob(q) {
			mu.Lock()
			ranges = append(ranges, q.Header.Get("Range"))
			mu.Unlock()
		}
		next.ServeHTTP(w, q)
	})
	img, err := r.Pull(r.ctx, ref, PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(ranges, func(s string) bool { return strings.HasPrefix(s, "bytes=") }) {
		t.Errorf("nothing was resumed: %q", ranges)
	}
	if got := len(names(t, r.layerDirs(t, img.ChainID)[0])); got != 40 {
		t.Errorf("%d files", got)
	}
}

// stopping calls a function after n bytes.
type stopping struct {
	http.ResponseWriter
	left int
	then func()
}

func (s *stopping) Write(b []byte) (int, error) {
	if s.left < len(b) {
		_, _ = s.ResponseWriter.Write(b[:s.left])
		s.ResponseWriter.(http.Flusher).Flush()
		s.then()
		return 0, http.ErrAbortHandler
	}
	s.left -= len(b)
	return s.ResponseWriter.Write(b)
}

// waiting is how many callers wait for that piece of work for which most do.
func (r *rig) waiting() (n int) {
	r.layers.mu.Lock()
	defer r.layers.mu.Unlock()
	for _, f := range r.layers.m {
		f.mu.Lock()
		n = max(n, f.waiters)
		f.mu.Unlock()
	}
	return n
}

// TestPullsShare runs pulls of two images with a common layer side by side; some are
// given up.
func TestPullsShare(t *testing.T) {
	t.Parallel()
	r, s := newRig(t), newServer(t)
	common := bigLayer(t)
	refs := []string{
		s.push(t, "app", "v1", build(t, nil, common)),
		s.push(t, "app", "v2", build(t, nil, common, tarOf(t, file("second", "2")))),
	}
	layer := digest.FromBytes(gzipped(common)).String()
	errs := make([]error, 12)
	together := sync.OnceFunc(func() { // all pulls wait for the common layer
		for end := time.Now().Add(5 * time.Minute); r.waiting() < len(errs) && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
	})
	var fetched sync.Map
	s.intercept(func(w http.ResponseWriter, q *http.Request, next http.Handler) {
		if isBlob(q) && q.Header.Get("Range") == "" {
			n, _ := fetched.LoadOrStore(q.URL.Path, new(atomic.Int32))
			n.(*atomic.Int32).Add(1)
			if strings.Contains(q.URL.Path, layer) {
				together()
			}
			time.Sleep(50 * time.Millisecond)
		}
		next.ServeHTTP(w, q)
	})
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() {
			ctx, cancel := context.WithCancel(r.ctx)
			defer cancel()
			if i%4 == 0 {
				go func() {
					together()
					time.AfterFunc(time.Duration(20+5*i)*time.Millisecond, cancel)
				}()
			}
			_, errs[i] = r.Pull(ctx, refs[i%2], PullOptions{Progress: func(Progress) {}})
			if i%4 == 0 {
				errs[i] = nil
			}
		})
	}
	wg.Wait()
	for i, err := range errs {
		if err != nil {
			t.Errorf("pull %d: %v", i, err)
		}
	}
	fetched.Range(func(k, v any) bool {
		if n := v.(*atomic.Int32).Load(); n > 1 && strings.Contains(k.(string), layer) {
			t.Errorf("%s was fetched %d times", k, n)
		}
		return true
	})
	if l, err := r.store.Leases().List(r.ctx); err != nil || len(l) != 0 {
		t.Errorf("leases left: %v %v", l, err)
	}
	if _, err := r.store.GC(r.ctx); err != nil {
		t.Fatal(err)
	}
	for _, ref := range refs {
		img, err := r.Get(r.ctx, ref, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.over.Stat(r.ctx, img.ChainID.String()); err != nil {
			t.Errorf("%s: %v", ref, err)
		}
	}
}

// TestBadDocuments serves manifests and configs that are not what they should be.
func TestBadDocuments(t *testing.T) {
	t.Parallel()
	good := build(t, nil, tarOf(t, file("a", "a")))
	var m map[string]any
	if err := json.Unmarshal(good.manifest, &m); err != nil {
		t.Fatal(err)
	}
	var cfg map[string]any
	if err := json.Unmarshal(good.config, &cfg); err != nil {
		t.Fatal(err)
	}
	invalidArg, exhausted := errdefs.IsInvalidArgument, errdefs.IsResourceExhausted
	layerDesc := m["layers"].([]any)[0].(map[string]any)
	many := func(n int) []any {
		l := make([]any, n)
		for i := range l {
			l[i] = layerDesc
		}
		return l
	}
	with := func(doc map[string]any, path string, v any) []byte {
		var c map[string]any
		_ = json.Unmarshal(marshal(t, doc), &c)
		at := c
		keys := strings.Split(path, ".")
		for _, k := range keys[:len(keys)-1] {
			at = at[k].(map[string]any)
		}
		at[keys[len(keys)-1]] = v
		return marshal(t, c)
	}
	type test struct {
		name     string
		manifest []byte
		config   []byte
		want     func(error) bool
	}
	tests := []test{
		{"null", []byte("null"), nil, invalidArg},
		{"list", []byte("[]"), nil, invalidArg},
		{"empty object", []byte("{}"), nil, invalidArg},
		{"nothing", []byte(""), nil, invalidArg},
		{"not json", []byte("<html>"), nil, invalidArg},
		{"two documents", append(bytes.Clone(good.manifest), good.manifest...), nil, invalidArg},
		{"field twice", bytes.Replace(good.manifest, []byte(`"layers"`), []byte(`"layers":[],"Layers"`), 1), nil, invalidArg},
		{"both kinds", with(m, "manifests", []any{}), nil, invalidArg},
		{"both kinds in capitals", with(m, "MANIFESTS", []any{}), nil, invalidArg},
		{"schema 1", []byte(`{"schemaVersion":1,"fsLayers":[],"history":[]}`), nil, errdefs.IsNotImplemented},
		{"media type of an index", with(m, "mediaType", ocispec.MediaTypeImageIndex), nil, invalidArg},
		{"media type unknown", with(m, "mediaType", "text/html"), nil, invalidArg},
		{"media type of docker", with(m, "mediaType", registry.DockerManifest), nil, invalidArg},
		{"media type number", with(m, "mediaType", 5), nil, invalidArg},
		{"config of an artifact", with(m, "config.mediaType", "application/vnd.cncf.helm.config.v1+json"), nil, invalidArg},
		{"config digest climbing", with(m, "config.digest", "sha256:../../../etc/passwd"), nil, invalidArg},
		{"config digest short", with(m, "config.digest", "sha256:abc"), nil, invalidArg},
		{"config digest in capitals", with(m, "config.digest", "sha256:"+strings.ToUpper(digest.FromString("x").Encoded())), nil, invalidArg},
		{"config digest unknown", with(m, "config.digest", "md5:d41d8cd98f00b204e9800998ecf8427e"), nil, invalidArg},
		{"config too large", with(m, "config.size", 5<<20), nil, exhausted},
		{"config negative", with(m, "config.size", -1), nil, invalidArg},
		{"layer of another type", with(m, "layers", []any{map[string]any{"mediaType": "application/zip", "digest": layerDesc["digest"], "size": 1}}), nil, invalidArg},
		{"layer negative", with(m, "layers", []any{map[string]any{"mediaType": ocispec.MediaTypeImageLayer, "digest": layerDesc["digest"], "size": -5}}), nil, invalidArg},
		{"layer digest", with(m, "layers", []any{map[string]any{"mediaType": ocispec.MediaTypeImageLayer, "digest": "sha256:/etc", "size": 5}}), nil, invalidArg},
		{"layer null", with(m, "layers", []any{nil}), nil, invalidArg},
		{"layers too many", with(m, "layers", many(501)), nil, exhausted},
		{"layers more than in config", with(m, "layers", many(2)), nil, invalidArg},
		{"layers none", with(m, "layers", []any{}), nil, invalidArg},
		{"index null", []byte(`{"schemaVersion":2,"manifests":null}`), nil, invalidArg},
		{"index of itself", []byte(`{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.index.v1+json","digest":"sha256:../x","size":3}]}`), nil, invalidArg},
		{"index empty", []byte(`{"schemaVersion":2,"manifests":[]}`), nil, errdefs.IsNotFound},
		{"diff id", nil, with(cfg, "rootfs.diff_ids", []any{"sha256:../../x"}), invalidArg},
		{"diff ids none", nil, with(cfg, "rootfs.diff_ids", []any{}), invalidArg},
		{"diff id of another layer", nil, with(cfg, "rootfs.diff_ids", []any{digest.FromString("x").String()}), errdefs.IsDataLoss},
		{"rootfs type", nil, with(cfg, "rootfs.type", "tree"), invalidArg},
		{"config null", nil, []byte("null"), invalidArg},
		{"config list", nil, []byte("[]"), invalidArg},
	}
	for _, field := range []string{"config", "layers", "schemaVersion"} {
		for _, v := range []any{nil, "text", []any{1}, map[string]any{"a": 1}, true} {
			if _, isMap := v.(map[string]any); isMap && field == "config" {
				continue
			}
			if v == nil && field == "schemaVersion" {
				continue
			}
			tests = append(tests, test{fmt.Sprintf("%s is %v", field, v), with(m, field, v), nil, invalidArg})
		}
	}
	for _, field := range []string{"created", "architecture", "os", "config", "rootfs", "history"} {
		for _, v := range []any{"text", []any{1}, map[string]any{"a": 1}, 3} {
			_, isMap := v.(map[string]any)
			_, isText := v.(string)
			if isMap && (field == "config") || isText && (field == "architecture" || field == "os") {
				continue
			}
			tests = append(tests, test{fmt.Sprintf("config's %s is %v", field, v), nil, with(cfg, field, v), invalidArg})
		}
	}
	r := newRig(t)
	for _, c := range tests {
		t.Run(c.name, func(t *testing.T) {
			bad := *good
			if c.config != nil {
				bad.config = c.config
				bad.manifest = with(m, "config", map[string]any{"mediaType": ocispec.MediaTypeImageConfig, "digest": digest.FromBytes(c.config), "size": len(c.config)})
			}
			if c.manifest != nil {
				bad.manifest = c.manifest
			}
			s := newServer(t)
			for _, l := range bad.layers {
				s.blob(t, "app", l)
			}
			s.blob(t, "app", bad.config)
			s.intercept(func(w http.ResponseWriter, q *http.Request, next http.Handler) {
				if strings.Contains(q.URL.Path, "/manifests/") {
					w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
					if bytes.Contains(bad.manifest, []byte(`"manifests":`)) {
						w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
					}
					_, _ = w.Write(bad.manifest)
					return
				}
				next.ServeHTTP(w, q)
			})
			_, err := r.Pull(r.ctx, s.host()+"/app:v1", PullOptions{})
			if err == nil || !c.want(err) {
				t.Errorf("error is %v", err)
			}
			r.clean(t)
		})
	}
}

// TestLayerLimits pulls layers that would wear out the machine.
func TestLayerLimits(t *testing.T) {
	t.Parallel()
	for name, layer := range map[string][]byte{
		"size":    tarOf(t, file("zeros", strings.Repeat("\x00", 2<<20))),
		"entries": tarOf(t, file("1", ""), file("2", ""), file("3", ""), file("4", "")),
	} {
		r, s := newRig(t, func(o *Options) { o.Limits = unpack.Limits{Size: 1 << 20, Entries: 3} }), newServer(t)
		ref := s.push(t, "app", "v1", build(t, nil, layer))
		if _, err := r.Pull(r.ctx, ref, PullOptions{}); !errdefs.IsResourceExhausted(err) {
			t.Errorf("%s: %v", name, err)
		}
		r.clean(t)
		if st, err := r.store.Content().ListStatuses(r.ctx); err != nil || len(st) != 0 {
			t.Errorf("%s: downloads left: %v %v", name, st, err)
		}
	}
}

// TestLayersReachingDown has layers that cannot be unpacked without those below.
func TestLayersReachingDown(t *testing.T) {
	t.Parallel()
	b := build(t, nil,
		tarOf(t, dir("usr", 0o755), dir("usr/lib", 0o755), file("usr/lib/a", "a"), link(tar.TypeSymlink, "lib", "usr/lib"), file("gone", "x")),
		tarOf(t, link(tar.TypeLink, "hard", "usr/lib/a"), file(".wh.gone", "")),
		tarOf(t, file("lib/b", "b")),
		tarOf(t, file(".wh..wh.opq", ""), file("only", "this")),
	)
	for _, snapshotter := range []string{"overlayfs", "native"} {
		r, s := newRig(t), newServer(t)
		ref := s.push(t, "app", "v1", b)
		img, err := r.Pull(r.ctx, ref, PullOptions{Snapshotter: snapshotter})
		if err != nil {
			t.Fatalf("%s: %v", snapshotter, err)
		}
		if snapshotter == "native" {
			sn := r.o.Snapshotters["native"]
			mounts, err := sn.View(r.ctx, "v", img.ChainID.String())
			if err != nil {
				t.Fatal(err)
			}
			if got := names(t, mounts[0].Source); !slices.Equal(got, []string{"only"}) {
				t.Errorf("native: %q", got)
			}
			continue
		}
		if got := names(t, r.mounted(t, img)); !slices.Equal(got, []string{"only"}) {
			t.Errorf("top: %q", got)
		}
		// Without the last layer.
		cfg, err := r.config(r.ctx, img.Config)
		if err != nil {
			t.Fatal(err)
		}
		below := img
		below.ChainID = cfg.chain[2]
		dirs := r.layerDirs(t, below.ChainID)
		if len(dirs) != 3 {
			t.Fatalf("layers: %q", dirs)
		}
		if got := readAll(t, filepath.Join(dirs[0], "usr/lib/b")); got != "b" {
			t.Errorf("lib/b is %q", got)
		}
		if got := readAll(t, filepath.Join(dirs[1], "hard")); got != "a" {
			t.Errorf("hard is %q", got)
		}
		if _, err := os.Lstat(filepath.Join(dirs[0], "lib")); !os.IsNotExist(err) {
			t.Errorf("the link lib was hidden: %v", err)
		}
	}
}

// TestCredentials follows where a password goes.
func TestCredentials(t *testing.T) {
	t.Parallel()
	const user, password = "somebody", "top-secret"
	b := threeLayers(t)
	var seen sync.Map // host to Authorization
	note := func(q *http.Request) {
		if a := q.Header.Get("Authorization"); a != "" {
			seen.Store(q.Host+" "+strings.Fields(a)[0], a)
		}
	}
	s, other := newServer(t), newServer(t)
	ref := s.push(t, "app", "v1", b)
	other.push(t, "app", "v1", b)
	other.intercept(func(w http.ResponseWriter, q *http.Request, next http.Handler) {
		note(q)
		if q.Header.Get("X-Secret") != "" {
			t.Error("a header of hosts.toml went to another host")
		}
		next.ServeHTTP(w, q)
	})
	realm := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		_ = q.ParseForm()
		u, p, _ := q.BasicAuth()
		if u != user || p != password {
			u, p = q.Form.Get("username"), q.Form.Get("password")
		}
		if u != user || p != password {
			w.WriteHeader(401)
			return
		}
		fmt.Fprint(w, `{"token":"the-token","access_token":"the-token"}`)
	}))
	t.Cleanup(realm.Close)
	for _, scheme := range []string{"Basic", "Bearer"} {
		s.intercept(func(w http.ResponseWriter, q *http.Request, next http.Handler) {
			note(q)
			u, p, ok := q.BasicAuth()
			if !(scheme == "Basic" && ok && u == user && p == password || scheme == "Bearer" && q.Header.Get("Authorization") == "Bearer the-token") {
				if scheme == "Basic" {
					w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
				} else {
					w.Header().Set("WWW-Authenticate", `Bearer realm="`+realm.URL+`",service="x"`)
				}
				w.WriteHeader(401)
				return
			}
			if isBlob(q) {
				http.Redirect(w, q, other.URL+q.URL.Path, http.StatusTemporaryRedirect)
				return
			}
			next.ServeHTTP(w, q)
		})
		certs := t.TempDir()
		hostDir := filepath.Join(certs, s.host())
		if err := os.MkdirAll(hostDir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(hostDir, "hosts.toml"), []byte("server = \""+s.URL+"\"\n[host.\""+s.URL+"\"]\ncapabilities = [\"pull\", \"resolve\", \"push\"]\n[host.\""+s.URL+"\".header]\nX-Secret = \"y\"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		r := newRig(t, func(o *Options) { o.RegistryDir = certs })
		if _, err := r.Pull(r.ctx, ref, PullOptions{Auth: &Auth{Username: user, Password: password}}); err != nil {
			t.Fatalf("%s: %v", scheme, err)
		}
		seen.Range(func(k, v any) bool {
			if strings.HasPrefix(k.(string), other.host()) {
				t.Errorf("%s: %s got %s", scheme, k, v)
			}
			return true
		})
		_, err := newRig(t).Pull(r.ctx, ref, PullOptions{})
		if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "pull access denied for "+s.host()+"/app, repository does not exist or may require 'docker login'") {
			t.Errorf("%s without credentials: %v", scheme, err)
		}
		_, err = newRig(t).Pull(r.ctx, ref, PullOptions{Auth: &Auth{Username: user, Password: "wr0ng"}})
		if !errdefs.IsUnauthorized(err) || strings.Contains(err.Error(), "wr0ng") {
			t.Errorf("%s with wrong credentials: %v", scheme, err)
		}
		// From docker's config.json.
		conf := t.TempDir()
		if err := os.WriteFile(filepath.Join(conf, "config.json"), marshal(t, map[string]any{"auths": map[string]any{s.host(): map[string]any{"username": user, "password": password}}}), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := newRig(t, func(o *Options) { o.Registry.DockerConfig = conf }).Pull(r.ctx, ref, PullOptions{}); err != nil {
			t.Errorf("%s from config.json: %v", scheme, err)
		}
	}
}

// TestFullDisk runs out of space in the middle of a layer; when there is space again,
// the same service goes on.
func TestFullDisk(t *testing.T) {
	needRoot(t)
	t.Parallel()
	root := t.TempDir()
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, "size=3m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(root, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	r, s := newRigAt(t, root), newServer(t)
	ref := s.push(t, "app", "v1", build(t, nil, bigLayer(t), tarOf(t, file("second", strings.Repeat("x", 1<<20)))))
	if _, err := r.Pull(r.ctx, ref, PullOptions{}); !errdefs.IsResourceExhausted(err) {
		t.Errorf("on a full disk: %v", err)
	}
	r.clean(t)
	if err := unix.Mount("tmpfs", root, "tmpfs", unix.MS_REMOUNT, "size=64m"); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Pull(r.ctx, ref, PullOptions{}); err != nil {
		t.Errorf("with space again: %v", err)
	}
}
