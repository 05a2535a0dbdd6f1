package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/manifest"
)

func TestPush(t *testing.T) {
	t.Parallel()
	r, s := newRig(t), newServer(t)
	img, err := r.Pull(r.ctx, s.push(t, "from", "v1", threeLayers(t)), PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	target := s.host() + "/to/here:v2"
	if err := r.Tag(r.ctx, img.ID.String(), target); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var requests, actions []string
	var mounted sync.Map // digests
	s.intercept(func(w http.ResponseWriter, q *http.Request, next http.Handler) {
		mu.Lock()
		requests = append(requests, q.Method+" "+q.URL.String())
		mu.Unlock()
		// The registry of the test keeps the blobs of all repositories together.
		d, blob := strings.CutPrefix(q.URL.Path, "/v2/to/here/blobs/")
		if _, ok := mounted.Load(d); blob && q.Method == http.MethodHead && !ok {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		if d := q.URL.Query().Get("mount"); d != "" && q.URL.Query().Get("from") == "from" {
			mounted.Store(d, true)
			w.WriteHeader(http.StatusCreated)
			return
		}
		next.ServeHTTP(w, q)
	})
	push := func() {
		t.Helper()
		requests, actions = nil, nil
		err := r.Push(r.ctx, target, PushOptions{Progress: func(p Progress) {
			mu.Lock()
			defer mu.Unlock()
			actions = append(actions, p.Action+p.Message)
		}})
		if err != nil {
			t.Fatal(err)
		}
	}
	push()
	if !slices.ContainsFunc(requests, func(q string) bool {
		return strings.HasPrefix(q, "POST") && strings.Contains(q, "from=from") && strings.Contains(q, "mount=")
	}) {
		t.Errorf("nothing was mounted: %q", requests)
	}
	if want := "v2: digest: " + img.Target.Digest.String(); !slices.ContainsFunc(actions, func(a string) bool { return strings.HasPrefix(a, want) }) {
		t.Errorf("progress is %q", actions)
	}
	if !slices.Contains(actions, "Mounted from from") {
		t.Errorf("progress is %q", actions)
	}
	push()
	if slices.ContainsFunc(requests, func(q string) bool { return strings.HasPrefix(q, "PUT") || strings.HasPrefix(q, "POST") }) {
		t.Errorf("second push sends: %q", requests)
	}
	if !slices.Contains(actions, "Layer already exists") {
		t.Errorf("second push says %q", actions)
	}
	other := newRig(t)
	got, err := other.Pull(other.ctx, target, PullOptions{})
	if err != nil || got.ID != img.ID || got.Target.Digest != img.Target.Digest {
		t.Errorf("pulled back: %+v %v", got, err)
	}
}

func TestPushToElsewhere(t *testing.T) {
	t.Parallel()
	r, s, fresh := newRig(t), newServer(t), newServer(t)
	img, err := r.Pull(r.ctx, s.push(t, "app", "v1", build(t, nil, bigLayer(t), tarOf(t, file("a", "a")))), PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	target := fresh.host() + "/app:v1"
	if err := r.Tag(r.ctx, img.ID.String(), target); err != nil {
		t.Fatal(err)
	}
	// The first uploads break.
	var n atomic.Int32
	fresh.intercept(func(w http.ResponseWriter, q *http.Request, next http.Handler) {
		if q.Method == http.MethodPut && strings.Contains(q.URL.Path, "/blobs/uploads/") && n.Add(1) <= 2 {
			panic(http.ErrAbortHandler)
		}
		next.ServeHTTP(w, q)
	})
	if err := r.Push(r.ctx, target, PushOptions{}); err != nil {
		t.Fatal(err)
	}
	other := newRig(t)
	if _, err := other.Pull(other.ctx, target, PullOptions{}); err != nil {
		t.Error(err)
	}
	if err := r.Push(r.ctx, fresh.host()+"/nothing", PushOptions{}); !errdefs.IsNotFound(err) {
		t.Errorf("push of nothing: %v", err)
	}
	fresh.intercept(func(w http.ResponseWriter, q *http.Request, next http.Handler) {
		w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
		w.WriteHeader(http.StatusUnauthorized)
	})
	if err := r.Push(r.ctx, target, PushOptions{}); !errdefs.IsUnauthorized(err) || !strings.Contains(err.Error(), "push access denied for") {
		t.Errorf("push without credentials: %v", err)
	}
}

// TestPushIndex pushes an index whole, if all of it is here.
func TestPushIndex(t *testing.T) {
	t.Parallel()
	r, s := newRig(t), newServer(t)
	amd := build(t, forPlatform("amd64", ""), tarOf(t, file("amd64", "")))
	arm := build(t, forPlatform("arm64", "v8"), tarOf(t, file("arm64", "")))
	ref := s.index(t, "app", "v1", amd, arm)
	img, err := r.Pull(r.ctx, ref, PullOptions{Platform: &ocispec.Platform{OS: "linux", Architecture: "arm64"}})
	if err != nil {
		t.Fatal(err)
	}
	target := s.host() + "/copy:v1"
	if err := r.Tag(r.ctx, ref, target); err != nil {
		t.Fatal(err)
	}
	if err := r.Push(r.ctx, target, PushOptions{}); err != nil {
		t.Fatal(err)
	}
	other := newRig(t)
	got, err := other.Pull(other.ctx, target, PullOptions{Platform: &img.Platform})
	if err != nil || got.Target.Digest != digest.FromBytes(arm.manifest) {
		t.Errorf("the part that is here: %+v %v", got, err)
	}
}

// legacy is an archive as docker save wrote it before version 25.
func legacy(t *testing.T, b *built, plain [][]byte, tags ...string) []byte {
	t.Helper()
	cfg := digest.FromBytes(b.config).Encoded() + ".json"
	members := []entry{file(cfg, string(b.config))}
	var layers []string
	for i, l := range plain {
		id := digest.FromBytes([]byte{byte(i)}).Encoded()
		members = append(members, dir(id+"/", 0o755), file(id+"/VERSION", "1.0"), file(id+"/json", "{}"))
		if i == 1 {
			// The same layer as before, as a link.
			members = append(members, link(tar.TypeSymlink, id+"/layer.tar", "../"+digest.FromBytes([]byte{0}).Encoded()+"/layer.tar"))
		} else {
			members = append(members, file(id+"/layer.tar", string(l)))
		}
		layers = append(layers, id+"/layer.tar")
	}
	members = append(members, file("manifest.json", string(marshal(t, []dockerImage{{Config: cfg, RepoTags: tags, Layers: layers}}))), file("repositories", "{}"))
	return tarOf(t, members...)
}

func TestLoadLegacy(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	l := tarOf(t, file("a", "a"))
	l3 := gzipped(tarOf(t, file("b", "b")))
	b := build(t, nil, l, l, tarOf(t, file("b", "b")))
	loaded, err := r.Load(r.ctx, bytes.NewReader(legacy(t, b, [][]byte{l, l, l3}, "old:v1")), LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(loaded) != 1 || loaded[0].Image.ID != digest.FromBytes(b.config) || !slices.Equal(loaded[0].Names, []string{"docker.io/library/old:v1"}) {
		t.Errorf("loaded %+v", loaded)
	}
	if got := names(t, r.mounted(t, loaded[0].Image)); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("files %q", got)
	}
	// Without a name it is kept, and found by its id.
	other := newRig(t)
	loaded, err = other.Load(other.ctx, bytes.NewReader(legacy(t, b, [][]byte{l, l, l3})), LoadOptions{})
	if err != nil || len(loaded[0].Names) != 0 {
		t.Fatalf("loaded %+v %v", loaded, err)
	}
	if _, err := other.store.GC(other.ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := other.Get(other.ctx, loaded[0].Image.ID.String(), nil); err != nil {
		t.Error(err)
	}
}

// TestSkopeo exchanges archives with another implementation.
func TestSkopeo(t *testing.T) {
	t.Parallel()
	skopeo, err := exec.LookPath("skopeo")
	if err != nil {
		t.Skipf("needs skopeo: %s exchanges archives with it", t.Name())
	}
	r, s := newRig(t), newServer(t)
	img, err := r.Pull(r.ctx, s.push(t, "app", "v1", threeLayers(t)), PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	policy := filepath.Join(dir, "policy.json")
	if err := os.WriteFile(policy, []byte(`{"default":[{"type":"insecureAcceptAnything"}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"docker", "oci"} {
		saved := filepath.Join(dir, kind+".tar")
		f, err := os.Create(saved)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Save(r.ctx, []string{s.host() + "/app:v1"}, SaveOptions{Format: kind}, f); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		back := filepath.Join(dir, kind+"-back.tar")
		from, to := kind+"-archive:"+saved, kind+"-archive:"+back+":example.com/back:v2"
		if kind == "oci" {
			from += ":v1"
		}
		if out, err := exec.Command(skopeo, "--tmpdir", dir, "--policy", policy, "copy", from, to).CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", kind, err, out)
			continue
		}
		archive, err := os.Open(back)
		if err != nil {
			t.Fatal(err)
		}
		other := newRig(t)
		loaded, err := other.Load(other.ctx, archive, LoadOptions{})
		archive.Close()
		if err != nil {
			t.Errorf("%s: %v", kind, err)
			continue
		}
		if len(loaded) != 1 || loaded[0].Image.ChainID != img.ChainID || !slices.Equal(loaded[0].Names, []string{"example.com/back:v2"}) {
			t.Errorf("%s: loaded %+v", kind, loaded)
		}
	}
}

func TestLoadHostile(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	l := tarOf(t, file("a", "a"))
	b := build(t, nil, l)
	cfg := string(b.config)
	good := digest.FromBytes(l).Encoded()
	unknown := digest.FromString("unknown").Encoded()
	invalidArg := errdefs.IsInvalidArgument
	manifest := func(s string) entry { return file("manifest.json", s) }
	for name, c := range map[string]struct {
		archive []byte
		want    func(error) bool
	}{
		"empty":                {nil, invalidArg},
		"empty tar":            {tarOf(t), invalidArg},
		"garbage":              {[]byte(strings.Repeat("x", 5000)), invalidArg},
		"truncated":            {legacy(t, b, [][]byte{l}, "x:y")[:3000], invalidArg},
		"truncated gzip":       {gzipped(legacy(t, b, [][]byte{l}, "x:y"))[:200], invalidArg},
		"no manifest":          {tarOf(t, file("a", "a")), invalidArg},
		"null":                 {tarOf(t, manifest("null")), invalidArg},
		"object":               {tarOf(t, manifest("{}")), invalidArg},
		"no images":            {tarOf(t, manifest("[]")), invalidArg},
		"null image":           {tarOf(t, manifest("[null]")), invalidArg},
		"config missing":       {tarOf(t, manifest(`[{"Config":"c.json","Layers":[]}]`)), invalidArg},
		"config climbing":      {tarOf(t, manifest(`[{"Config":"../../../../etc/passwd","Layers":[]}]`)), invalidArg},
		"config link climbing": {tarOf(t, link(tar.TypeSymlink, "c.json", "../../../etc/passwd"), manifest(`[{"Config":"c.json","Layers":[]}]`)), invalidArg},
		"config link loop":     {tarOf(t, link(tar.TypeSymlink, "c.json", "d.json"), link(tar.TypeSymlink, "d.json", "c.json"), manifest(`[{"Config":"c.json","Layers":[]}]`)), invalidArg},
		"config null":          {tarOf(t, file("c.json", "null"), manifest(`[{"Config":"c.json","Layers":[]}]`)), invalidArg},
		"layer missing":        {tarOf(t, file("c.json", cfg), manifest(`[{"Config":"c.json","Layers":["l"]}]`)), invalidArg},
		"layers too few":       {tarOf(t, file("c.json", cfg), manifest(`[{"Config":"c.json","Layers":[]}]`)), invalidArg},
		"layer is config":      {tarOf(t, file("c.json", cfg), manifest(`[{"Config":"c.json","Layers":["c.json"]}]`)), invalidArg},
		"layer of another":     {tarOf(t, file("c.json", cfg), file("l", string(tarOf(t, file("b", "b")))), manifest(`[{"Config":"c.json","Layers":["l"]}]`)), errdefs.IsDataLoss},
		"layer no tar":         {tarOf(t, file("c.json", cfg), file("l", string(gzipped([]byte("no tar")))), manifest(`[{"Config":"c.json","Layers":["l"]}]`)), invalidArg},
		"tag bad":              {tarOf(t, file("c.json", cfg), file("l", string(l)), manifest(`[{"Config":"c.json","RepoTags":["No Tag"],"Layers":["l"]}]`)), invalidArg},
		"tag claims a digest":  {tarOf(t, file("c.json", cfg), file("l", string(l)), manifest(`[{"Config":"c.json","RepoTags":["alpine@sha256:`+good+`"],"Layers":["l"]}]`)), invalidArg},
		"blob of another":      {tarOf(t, file("blobs/sha256/"+unknown, "something else")), errdefs.IsDataLoss},
		"blob climbing":        {tarOf(t, file("blobs/sha256/x", "x")), invalidArg},
		"blob of md5":          {tarOf(t, file("blobs/md5/d41d8cd98f00b204e9800998ecf8427e", "")), invalidArg},
		"index null":           {tarOf(t, file("oci-layout", "{}"), file("index.json", "null")), invalidArg},
		"index no list":        {tarOf(t, file("oci-layout", "{}"), file("index.json", `{"manifests":5}`)), invalidArg},
		"index empty":          {tarOf(t, file("oci-layout", "{}"), file("index.json", `{"schemaVersion":2,"manifests":[]}`)), errdefs.IsNotFound},
		"index of nothing":     {tarOf(t, file("oci-layout", "{}"), file("index.json", `{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:`+unknown+`","size":5}]}`)), errdefs.IsNotFound},
		"document too large":   {tarOf(t, file("manifest.json", strings.Repeat(" ", 17<<20))), errdefs.IsResourceExhausted},
	} {
		_, err := r.Load(r.ctx, bytes.NewReader(c.archive), LoadOptions{})
		if err == nil || !c.want(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	r.clean(t)
	if st, err := r.store.Content().ListStatuses(r.ctx); err != nil || len(st) != 0 {
		t.Errorf("ingests left: %v %v", st, err)
	}
}

// cancelledAtCommit is a store whose client goes away when all is written.
type cancelledAtCommit struct {
	content.Store
	cancel func()
}

func (c cancelledAtCommit) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	w, err := c.Store.Writer(ctx, opts...)
	return writerCancelledAtCommit{w, c.cancel}, err
}

type writerCancelledAtCommit struct {
	content.Writer
	cancel func()
}

func (w writerCancelledAtCommit) Commit(ctx context.Context, size int64, expected digest.Digest, opts ...content.Opt) error {
	w.cancel()
	return w.Writer.Commit(ctx, size, expected, opts...)
}

// TestDocumentCutShort: a load that fails ends the writing of its documents, of which nothing stays.
func TestDocumentCutShort(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	ctx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	r.o.Content = cancelledAtCommit{r.o.Content, cancel}
	body := []byte("{}")
	if err := r.storeDocument(ctx, digest.FromBytes(body), body, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if st, err := r.store.Content().ListStatuses(r.ctx); err != nil || len(st) != 0 {
		t.Errorf("ingests left: %v %v", st, err)
	}
}

func FuzzDocuments(f *testing.F) {
	b := build(f, nil, tarOf(f, file("a", "a")))
	f.Add(b.manifest, "")
	f.Add(b.config, ocispec.MediaTypeImageManifest)
	f.Add([]byte(`{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:x","size":5,"platform":null}]}`), ocispec.MediaTypeImageIndex)
	f.Fuzz(func(t *testing.T, body []byte, mediaType string) {
		if doc, err := parseDocument("doc", mediaType, body); err == nil {
			if (doc.manifest == nil) == (doc.index == nil) {
				t.Error("neither or both")
			}
			if doc.index != nil {
				manifest.Candidates(doc.index, matcher(nil))
			}
		}
		if c, err := parseConfig("config", body); err == nil {
			_ = c.platform()
		}
	})
}
