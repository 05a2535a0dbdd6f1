package mirror

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/hako-engine/hako/image/registry"
	"github.com/hako-engine/hako/image/tools"
)

func TestVersions(t *testing.T) {
	t.Parallel()
	tags := strings.Fields("latest 1 1.2 v1.2.3 1.2.4-rc1 1.2.4 1.3.0 1.10.0 2.0.0-alpha.1 2.0.0-alpha.10 2.0.0 0.2.3 0.3.0 0.0.3 0.0.4 2024.01 sha-1234")
	for in, want := range map[string]string{
		">=1.2, <2":            "1.2 v1.2.3 1.2.4 1.3.0 1.10.0",
		"^1.2":                 "1.2 v1.2.3 1.2.4 1.3.0 1.10.0",
		"~1.2.3":               "v1.2.3 1.2.4",
		"~1.2":                 "1.2 v1.2.3 1.2.4",
		"1.2.x":                "1.2 v1.2.3 1.2.4",
		"1.2.4-rc1":            "1.2.4-rc1",
		">=1.2.4-rc1, <1.3":    "1.2.4-rc1 1.2.4",
		"^0.2.3":               "0.2.3",
		"^0.0.3":               "0.0.3",
		"=2.0.0 || 0.3.0":      "2.0.0 0.3.0",
		">1.3, <2024, !=2.0.0": "1.10.0",
		"<=1.2":                "1 1.2 v1.2.3 1.2.4 0.2.3 0.3.0 0.0.3 0.0.4",
		"2024.*":               "2024.01",
	} {
		c, err := parseConstraint(in)
		if err != nil {
			t.Errorf("%s: %v", in, err)
			continue
		}
		var got []string
		for _, tag := range tags {
			if v, ok := parseVersion(tag); ok && c.match(v) {
				got = append(got, tag)
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: %q, want %q", in, got, want)
		}
	}
	for _, in := range []string{"", "x", ">=", "1..2", "1.2 || ", "=> 1", ">=1,,2"} {
		if c, err := parseConstraint(in); err == nil {
			t.Errorf("%q: %v", in, c)
		}
	}
}

func TestParse(t *testing.T) {
	t.Parallel()
	reg := func(s string) string { return "registries:\n  a.example:\n    repositories:\n      app: " + s + "\n" }
	for name, text := range map[string]string{
		"list": reg("[\"1\", 'sha256:" + strings.Repeat("a", 64) + "']"), "all": reg("{}"), "null": reg(""), "regex": reg("{regex: '1.*'}"), "semver": reg("{semver: '^1'}"), "latest": reg("{semver: '^1', latest: 2}"),
		"options": reg("[x]") + "    platforms: [linux/amd64]\n    referrers: true\n    tls-verify: false\n",
	} {
		if _, err := Parse("f", strings.NewReader(text)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	const skopeo = "a.example:\n  images: {app: ['1', 'sha256:%s'], tool: []}\n  images-by-tag-regex: {web: '^1\\.2'}\n  images-by-semver: {db: '>= 3.12'}\n  credentials: {username: u, password: p}\n  tls-verify: false\n  cert-dir: /x\nb.example:\n  images: {x: []}\n"
	c, err := Parse("f", strings.NewReader(fmt.Sprintf(skopeo, strings.Repeat("a", 64))))
	if err != nil {
		t.Fatal(err)
	}
	a := c.Registries["a.example"]
	web, db := a.Repositories["web"], a.Repositories["db"]
	if len(c.Registries) != 2 || len(a.Repositories) != 4 || a.Username != "u" || *a.TLSVerify || !web.regex.MatchString("1.2.3-x") || web.regex.MatchString("11.2") || db.semver == nil {
		t.Errorf("skopeo's file: %+v", c)
	}
	for ref, want := range map[string]string{"docker://a.example/b/c": "a.example b/c []", "docker://a.example/b:1": "a.example b [1]", "docker://alpine": "docker.io library/alpine []"} {
		c, err := Single(ref, Registry{Platforms: []string{"linux/arm64"}})
		if err != nil {
			t.Errorf("%s: %v", ref, err)
			continue
		}
		for host, r := range c.Registries {
			for repo, s := range r.Repositories {
				if got := fmt.Sprint(host, " ", repo, " ", s.Tags); got != want || len(r.platforms) != 1 {
					t.Errorf("%s: %s", ref, got)
				}
			}
		}
	}
	for _, ref := range []string{"", "a.example/b", "docker://", "docker://UPPER"} {
		if c, err := Single(ref, Registry{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %+v %v", ref, c, err)
		}
	}
	for name, text := range map[string]string{
		"skopeo, twice": "a.example: {images: {x: []}, images-by-semver: {x: '1'}}", "skopeo, unknown key": "a.example: {image: {x: []}}", "skopeo, bad regex": "a.example: {images-by-tag-regex: {x: '('}}",
		"nothing": "", "unknown key": "registry: {}", "no registries": "destination: oci:x", "no repositories": "registries: {a.example: {}}", "two ways": reg("{regex: x, semver: '1'}"),
		"bad regex": reg("{regex: '('}"), "bad semver": reg("{semver: banana}"), "bad tag": reg("['a b']"), "bad digest": reg("['sha256:x']"), "unknown word": reg("{regexp: x}"),
		"bad platform": reg("[x]") + "    platforms: [a/b/c/d]\n", "repository with a tag": "registries: {a.example: {repositories: {'app:1': [x]}}}", "path": "registries: {a.example: {repositories: {'../x': [x]}}}",
		"host as path": "registries: {a: {repositories: {b: [x]}}}", "latest of a list": reg("{tags: [a], latest: 1}"), "not YAML": "{", "alias bomb": "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nregistries: *b",
	} {
		if c, err := Parse("f", strings.NewReader(text)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %+v %v", name, c, err)
		}
	}
}

// serve gives a registry with tiny images, by repository and tag.
func serve(t *testing.T, before func(http.ResponseWriter, *http.Request) bool, names ...string) string {
	t.Helper()
	inner := ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if before == nil || !before(w, r) {
			inner.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(s.Close)
	put := func(method, url, mt string, raw []byte) {
		req, err := http.NewRequest(method, s.URL+url, bytes.NewReader(raw))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", mt)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode >= 300 {
			t.Fatalf("%s: %s", url, resp.Status)
		}
	}
	for _, name := range names {
		repo, tag, _ := strings.Cut(name, ":")
		var plain, layer bytes.Buffer
		tw := tar.NewWriter(&plain)
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: tag + "/", Mode: 0o755}); err != nil {
			t.Fatal(err)
		}
		tw.Close()
		zw := gzip.NewWriter(&layer)
		zw.Write(plain.Bytes())
		zw.Close()
		config := fmt.Appendf(nil, `{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[%q]}}`, digest.FromBytes(plain.Bytes()))
		m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
		for i, raw := range [][]byte{config, layer.Bytes()} {
			d := digest.FromBytes(raw)
			put(http.MethodPost, "/v2/"+repo+"/blobs/uploads/?digest="+d.String(), "application/octet-stream", raw)
			desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: d, Size: int64(len(raw))}
			if i == 1 {
				desc.MediaType = ocispec.MediaTypeImageLayerGzip
				m.Layers = append(m.Layers, desc)
			} else {
				m.Config = desc
			}
		}
		raw, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		put(http.MethodPut, "/v2/"+repo+"/manifests/"+tag, m.MediaType, raw)
	}
	return strings.TrimPrefix(s.URL, "http://")
}

func kit(t *testing.T) *tools.Tools {
	t.Helper()
	return tools.New(tools.Options{Registry: registry.Options{Timeout: 5 * time.Minute, Backoff: time.Millisecond, Attempts: 2, DockerConfig: t.TempDir()}})
}

// run gives the sorted lines "SOURCE TAG: action".
func run(t *testing.T, text, host string, o Options) []string {
	t.Helper()
	c, err := Parse("f", strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var lines []string
	o.Report = func(l Line) {
		mu.Lock()
		defer mu.Unlock()
		lines = append(lines, strings.TrimPrefix(l.Source, "docker://"+host+"/")+": "+l.Action)
	}
	if err := Run(context.Background(), kit(t), c, o); err != nil {
		t.Fatal(err)
	}
	slices.Sort(lines)
	return lines
}

func TestRun(t *testing.T) {
	t.Parallel()
	src := serve(t, func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasPrefix(r.URL.Path, "/v2/team/broken/blobs/") && r.Method == http.MethodGet {
			w.WriteHeader(http.StatusForbidden)
			return true
		}
		return false
	}, "team/app:1.0.0", "team/app:1.1.0", "team/app:2.0.0", "team/app:2.1.0-rc1", "team/app:latest", "team/tool:a1", "team/tool:a2", "team/tool:b1", "team/broken:x", "all/of:1")
	dst := serve(t, nil)
	text := `
destination: docker://` + dst + `/mirror
registries:
  "` + src + `":
    repositories:
      team/app: {semver: ">=1.1"}
      team/tool: {regex: "a."}
      team/broken: [x]
      team/missing: {}
      team/nothing: [no-such-tag]
      all/of: {}
`
	want := []string{"all/of:1: would copy", "team/app:1.1.0: would copy", "team/app:2.0.0: would copy", "team/broken:x: would copy", "team/missing: failed", "team/nothing:no-such-tag: failed", "team/tool:a1: would copy", "team/tool:a2: would copy"}
	for i := range want {
		want[i] = strings.TrimSpace(want[i])
	}
	if got := run(t, text, src, Options{DryRun: true}); !slices.Equal(got, want) {
		t.Errorf("dry run: %q", got)
	}
	for i, w := range want {
		want[i] = strings.Replace(w, "would copy", "copied", 1)
		if strings.HasPrefix(w, "team/broken") {
			want[i] = "team/broken:x: failed"
		}
	}
	if got := run(t, text, src, Options{}); !slices.Equal(got, want) {
		t.Errorf("run: %q, want %q", got, want)
	}
	for i, w := range want {
		want[i] = strings.Replace(w, "copied", "up to date", 1)
	}
	if got := run(t, text, src, Options{}); !slices.Equal(got, want) {
		t.Errorf("again: %q", got)
	}
	if _, tags, err := kit(t).Tags(context.Background(), dst+"/mirror/team/app", tools.Access{}); err != nil || !slices.Equal(tags, []string{"1.1.0", "2.0.0"}) {
		t.Errorf("%q %v", tags, err)
	}
	// To a folder, by what the caller says.
	dir := t.TempDir()
	if got := run(t, text, src, Options{Destination: "oci:" + dir}); !slices.Contains(got, "team/tool:a2: copied") || !slices.Contains(got, "team/tool:a1: copied") {
		t.Errorf("folder: %q", got)
	}
	if got := run(t, text, src, Options{Destination: "oci:" + dir}); !slices.Contains(got, "team/tool:a2: up to date") {
		t.Errorf("folder again: %q", got)
	}
	if _, err := os.Stat(filepath.Join(dir, strings.ReplaceAll(src, ":", "-"), "team", "app", "index.json")); err != nil {
		t.Error(err)
	}
	// The newest versions.
	newest := strings.Replace(text, `{semver: ">=1.1"}`, `{latest: 2}`, 1)
	if got := run(t, newest, src, Options{DryRun: true, Destination: "docker://" + serve(t, nil)}); !slices.Contains(got, "team/app:2.1.0-rc1: would copy") || slices.Contains(got, "team/app:1.1.0: would copy") {
		t.Errorf("newest: %q", got)
	}
	// Two repositories with one destination are told before anything is copied.
	c, err := Parse("f", strings.NewReader("registries:\n  \""+src+"\": {repositories: {all/of: ['1']}}\n  localhost:"+src[strings.LastIndexByte(src, ':')+1:]+": {repositories: {all/of: ['1']}}\n"))
	if err != nil {
		t.Fatal(err)
	}
	if err := Run(context.Background(), kit(t), c, Options{Destination: "docker://" + dst}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "scoped") {
		t.Errorf("two to one: %v", err)
	}
	for _, bad := range []string{"", "dir:x", "docker://UPPER", "docker://" + dst + "/x:1", "oci:"} {
		if err := Run(context.Background(), kit(t), c, Options{Destination: bad}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("destination %q: %v", bad, err)
		}
	}
}

// keeper is a registry that knows which repository has which blob, and counts what it was sent.
type keeper struct {
	mu    sync.Mutex
	sent  map[string]int // by repository and digest, with blobs that were mounted as "mounted ..."
	under map[string]int
	twice []string // were sent again before the first had come
}

func (k *keeper) serve(inner http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		repo, rest, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/blobs/")
		what, q := "", r.URL.Query()
		switch {
		case r.Method == http.MethodHead && rest != "":
			k.mu.Lock()
			n := k.sent[repo+" "+rest] + k.sent["mounted "+repo+" "+rest]
			k.mu.Unlock()
			if n == 0 {
				w.WriteHeader(http.StatusNotFound)
				return
			}
		case r.Method == http.MethodPost && q.Get("mount") != "":
			k.mu.Lock()
			defer k.mu.Unlock()
			if k.sent[q.Get("from")+" "+q.Get("mount")] == 0 {
				w.WriteHeader(http.StatusForbidden)
				return
			}
			k.sent["mounted "+repo+" "+q.Get("mount")]++
			w.WriteHeader(http.StatusCreated)
			return
		case r.Method == http.MethodPatch:
			time.Sleep(10 * time.Millisecond) // so that others come meanwhile
		case r.Method == http.MethodPut && rest != "":
			what = repo + " " + q.Get("digest")
		case r.Method == http.MethodPut:
			what, _, _ = strings.Cut(repo, "/manifests/")
			what += " manifest"
		}
		if what != "" {
			k.mu.Lock()
			k.sent[what]++
			if k.under[what]++; k.under[what] > 1 {
				k.twice = append(k.twice, what)
			}
			k.mu.Unlock()
			defer func() {
				k.mu.Lock()
				k.under[what]--
				k.mu.Unlock()
			}()
		}
		inner.ServeHTTP(w, r)
	})
}

// TestSharedUploads: what images share goes to a repository once, also when they are copied side
// by side, and to a second repository of the registry not at all.
func TestSharedUploads(t *testing.T) {
	t.Parallel()
	src := serve(t, nil, "team/app:1", "team/tool:1") // their blobs are the same
	for _, tag := range []string{"2", "3", "4"} {
		if _, err := kit(t).Copy(t.Context(), "docker://"+src+"/team/app:1", "docker://"+src+"/team/app:"+tag, tools.CopyOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, jobs := range []int{1, 4} {
		k := &keeper{sent: map[string]int{}, under: map[string]int{}}
		dst := httptest.NewServer(k.serve(ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))))
		t.Cleanup(dst.Close)
		text := fmt.Sprintf("destination: docker://%s/m\nregistries: {%q: {repositories: {team/app: {}, team/tool: {}}}}\n", strings.TrimPrefix(dst.URL, "http://"), src)
		if got := run(t, text, src, Options{Jobs: jobs}); len(got) != 5 || slices.ContainsFunc(got, func(l string) bool { return !strings.HasSuffix(l, ": copied") }) {
			t.Errorf("%d jobs: %q", jobs, got)
		}
		if len(k.twice) > 0 {
			t.Errorf("%d jobs: sent twice at the same time: %q", jobs, k.twice)
		}
		mounted := 0
		for what, n := range k.sent {
			if n != 1 && !strings.HasSuffix(what, " manifest") {
				t.Errorf("%d jobs: %s: %d times", jobs, what, n)
			}
			if strings.HasPrefix(what, "mounted m/team/tool ") {
				mounted++
			}
		}
		// Who asks while the first repository is getting a blob sends it, too.
		if jobs == 1 && mounted != 2 {
			t.Errorf("%d blobs mounted of 2: %v", mounted, k.sent)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("registries: {a.example: {repositories: {b: {semver: '^1'}}}}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = Parse("f", bytes.NewReader(b))
	})
}
