package tools

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/image/convert"
	"github.com/hako-engine/hako/image/copier"
	"github.com/hako-engine/hako/image/manifest"
	"github.com/hako-engine/hako/image/registry"
	"github.com/hako-engine/hako/image/transport"
	"github.com/hako-engine/hako/internal/erofs"
)

var amd64 = []ocispec.Platform{{OS: "linux", Architecture: "amd64"}}

// TestEveryPlaceToEveryPlace copies an image on and on, and expects what it began with.
func TestEveryPlaceToEveryPlace(t *testing.T) {
	t.Parallel()
	k, ctx := kit(t), context.Background()
	first, top, b := source(t)
	host, dir := newRegistry(t, nil), t.TempDir()
	places := []string{
		"docker://" + host + "/a/app:1", "oci:" + dir + "/layout:v1", "oci-archive:" + dir + "/image.tar:v1", "dir:" + dir + "/dir", "docker://" + host + "/b/app:1",
		"oci:" + dir + "/layout2",
	}
	from := first
	for _, to := range places {
		for round, want := range []string{"copied", "up to date"} {
			res, err := k.Copy(ctx, from, to, CopyOptions{})
			if err != nil {
				t.Fatalf("%s to %s: %v", from, to, err)
			}
			if res.Top.Digest != top.Digest {
				t.Errorf("%s to %s: digest %s", from, to, res.Top.Digest)
			}
			if round == 1 && !strings.HasPrefix(to, "oci-archive") && (!res.UpToDate || res.Sent != 0) {
				t.Errorf("%s to %s again: want %s, got %+v", from, to, want, res)
			}
		}
		got, all := whole(t, k, to)
		if got != top.Digest || len(all) != len(b) {
			t.Errorf("%s: %s with %d parts, want %s with %d", to, got, len(all), top.Digest, len(b))
		}
		from = to
	}
	// One platform, by the form that holds one.
	res, err := k.Copy(ctx, from, "docker-archive:"+dir+"/docker.tar:example.com/app:1", CopyOptions{Options: copier.Options{Platforms: amd64}})
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := whole(t, k, "docker-archive:"+dir+"/docker.tar:example.com/app:1"); got != res.Top.Digest || got == top.Digest {
		t.Errorf("docker-archive has %s, copied %s", got, res.Top.Digest)
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) != 5 {
		t.Errorf("left behind: %v %v", names, err)
	}
}

func TestPlatforms(t *testing.T) {
	t.Parallel()
	k, ctx := kit(t), context.Background()
	src, top, _ := source(t)
	dir := t.TempDir()
	both := append([]ocispec.Platform{{OS: "linux", Architecture: "arm64"}}, amd64...)
	res, err := k.Copy(ctx, src, "oci:"+dir+":both", CopyOptions{Options: copier.Options{Platforms: both}})
	if err != nil || !manifest.IsIndex(res.Top.MediaType) {
		t.Fatalf("%+v %v", res, err)
	}
	if res, err = k.Copy(ctx, src, "oci:"+dir+":one", CopyOptions{Options: copier.Options{Platforms: amd64}}); err != nil || manifest.IsIndex(res.Top.MediaType) || res.Source != top.Digest {
		t.Fatalf("%+v %v", res, err)
	}
	_, err = k.Copy(ctx, src, "oci:"+dir+":none", CopyOptions{Options: copier.Options{Platforms: []ocispec.Platform{{OS: "linux", Architecture: "s390x"}}}})
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "linux/amd64, linux/arm64") {
		t.Errorf("a platform that is not there: %v", err)
	}
	// Both entries are in the layout, beside each other.
	if _, tags, err := k.Tags(ctx, "oci:"+dir, Access{}); err != nil || strings.Join(tags, " ") != "both one" {
		t.Errorf("%q %v", tags, err)
	}
}

// TestMounted copies within a registry without sending a byte.
func TestMounted(t *testing.T) {
	t.Parallel()
	k, ctx := kit(t), context.Background()
	var c counter
	host := newRegistry(t, func(w http.ResponseWriter, r *http.Request) bool {
		c.before(w, r)
		// The registry of the tests has one store for all repositories: it is told apart here.
		if strings.HasPrefix(r.URL.Path, "/v2/b/app/blobs/sha256:") && r.Method == http.MethodHead {
			w.WriteHeader(http.StatusNotFound)
			return true
		}
		if q := r.URL.Query(); r.Method == http.MethodPost && q.Get("mount") != "" && q.Get("from") == "a/app" {
			w.WriteHeader(http.StatusCreated)
			return true
		}
		return false
	})
	src, top, b := source(t)
	if _, err := k.Copy(ctx, src, "docker://"+host+"/a/app:1", CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	sent := c.patch.Load()
	res, err := k.Copy(ctx, "docker://"+host+"/a/app:1", "docker://"+host+"/b/app:1", CopyOptions{})
	if err != nil || res.Top.Digest != top.Digest {
		t.Fatal(res, err)
	}
	blobs := len(b) - 3 // without the documents
	if res.Mounted != blobs || res.Sent != 0 || c.patch.Load() != sent {
		t.Errorf("%+v, %d uploads; want %d mounted", res, c.patch.Load()-sent, blobs)
	}
}

// TestInterruptedUpload breaks an upload in its middle; it goes on there.
func TestInterruptedUpload(t *testing.T) {
	t.Parallel()
	k, ctx := kit(t), context.Background()
	var mu sync.Mutex
	had := map[string][]byte{} // by upload
	broken, resumed := false, int64(-1)
	blobsDone := map[string]bool{}
	host := newRegistry(t, func(w http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		if !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		if r.Method == http.MethodHead {
			if blobsDone[r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]] {
				w.WriteHeader(http.StatusOK)
			} else {
				w.WriteHeader(http.StatusNotFound)
			}
			return true
		}
		id := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
		loc := r.URL.Path
		switch r.Method {
		case http.MethodPost:
			id = fmt.Sprint("up", len(had))
			loc = r.URL.Path + id
			had[id] = nil
			w.Header().Set("Location", loc)
			w.WriteHeader(http.StatusAccepted)
		case http.MethodPatch:
			if cr := r.Header.Get("Content-Range"); cr != "" {
				fmt.Sscanf(cr, "%d-", &resumed)
				if resumed != int64(len(had[id])) {
					w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
					return true
				}
			}
			limit := int64(1 << 40)
			big := r.ContentLength > 1000
			if big && !broken {
				limit = 700
			}
			got, _ := io.ReadAll(io.LimitReader(r.Body, limit))
			had[id] = append(had[id], got...)
			if big && !broken {
				broken = true
				panic(http.ErrAbortHandler)
			}
			w.Header().Set("Location", loc)
			w.WriteHeader(http.StatusAccepted)
		case http.MethodGet:
			w.Header().Set("Location", loc)
			w.Header().Set("Range", fmt.Sprintf("0-%d", len(had[id])-1))
			w.WriteHeader(http.StatusNoContent)
		case http.MethodPut:
			want := r.URL.Query().Get("digest")
			if digest.FromBytes(had[id]).String() != want {
				w.WriteHeader(http.StatusBadRequest)
				return true
			}
			blobsDone[want] = true
			w.WriteHeader(http.StatusCreated)
		default:
			return false
		}
		return true
	})
	src, top, _ := source(t)
	res, err := k.Copy(ctx, src, "docker://"+host+"/app:1", CopyOptions{Options: copier.Options{Jobs: 1}})
	if err != nil || res.Top.Digest != top.Digest {
		t.Fatal(res, err)
	}
	if resumed <= 0 || resumed > 700 {
		t.Errorf("went on at byte %d", resumed)
	}
}

// TestUploadOfEarlierProcess ends a copy in the middle of an upload; the next one, of another
// process, asks the registry how far it came and goes on there, unless what is there is bad,
// the registry has forgotten it, or a process that lives is sending.
func TestUploadOfEarlierProcess(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		damage, forget, held bool
		resumes              bool
	}{
		"good": {resumes: true}, "damaged": {damage: true, resumes: true}, "forgotten": {forget: true}, "in use": {held: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			process := func() *Tools {
				return New(Options{Registry: registry.Options{Timeout: 5 * time.Minute, Backoff: 5 * time.Millisecond, Attempts: 3, DockerConfig: dir, UploadDir: filepath.Join(dir, "uploads"), UploadMin: 1000}})
			}
			ctx, kill := context.WithCancel(context.Background())
			defer kill()
			var mu sync.Mutex
			had := map[string][]byte{} // by upload
			var resumed []int64
			blobsDone := map[string]bool{}
			broken, begun := false, 0
			host := newRegistry(t, func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, "/blobs/") {
					return false
				}
				mu.Lock()
				defer mu.Unlock()
				id := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
				loc := r.URL.Path
				_, known := had[id]
				switch {
				case r.Method == http.MethodHead:
					if !blobsDone[id] {
						w.WriteHeader(http.StatusNotFound)
					}
					return true
				case r.Method == http.MethodPost:
					begun++
					id = fmt.Sprint("up", begun)
					loc = r.URL.Path + id
					had[id] = nil
				case !known:
					w.WriteHeader(http.StatusNotFound)
					return true
				case r.Method == http.MethodPatch:
					if cr := r.Header.Get("Content-Range"); cr != "" {
						var at int64
						fmt.Sscanf(cr, "%d-", &at)
						resumed = append(resumed, at)
						if at != int64(len(had[id])) {
							w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
							return true
						}
					}
					if r.ContentLength > 1000 && !broken {
						broken = true
						part := make([]byte, 700)
						_, _ = io.ReadFull(r.Body, part)
						if c.damage {
							part[0] ^= 1
						}
						if had[id] = part; c.forget {
							delete(had, id)
						}
						kill()
						panic(http.ErrAbortHandler)
					}
					got, _ := io.ReadAll(r.Body)
					had[id] = append(had[id], got...)
				case r.Method == http.MethodGet:
					w.Header().Set("Location", loc)
					w.Header().Set("Range", fmt.Sprintf("0-%d", len(had[id])-1))
					w.WriteHeader(http.StatusNoContent)
					return true
				case r.Method == http.MethodDelete:
					delete(had, id)
					w.WriteHeader(http.StatusNoContent)
					return true
				case r.Method == http.MethodPut:
					want := r.URL.Query().Get("digest")
					if digest.FromBytes(had[id]).String() != want {
						w.WriteHeader(http.StatusBadRequest)
						return true
					}
					blobsDone[want] = true
					w.WriteHeader(http.StatusCreated)
					return true
				}
				w.Header().Set("Location", loc)
				w.WriteHeader(http.StatusAccepted)
				return true
			})
			src, top, _ := source(t)
			to := "docker://" + host + "/app:1"
			if _, err := process().Copy(ctx, src, to, CopyOptions{Options: copier.Options{Jobs: 1}}); err == nil {
				t.Fatal("the first copy was not interrupted")
			}
			notes, err := filepath.Glob(filepath.Join(dir, "uploads", "*"))
			if err != nil || len(notes) != 1 {
				t.Fatalf("notes: %q, %v", notes, err)
			}
			if c.held {
				f, err := os.Open(notes[0])
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
					t.Fatal(err)
				}
			}
			res, err := process().Copy(context.Background(), src, to, CopyOptions{Options: copier.Options{Jobs: 1}})
			if err != nil || res.Top.Digest != top.Digest {
				t.Fatal(res, err)
			}
			if (len(resumed) > 0) != c.resumes || c.resumes && resumed[0] != 700 {
				t.Errorf("went on at %d", resumed)
			}
			if left, _ := filepath.Glob(filepath.Join(dir, "uploads", "*")); (len(left) > 0) != c.held {
				t.Errorf("notes left: %q", left)
			}
		})
	}
}

// TestInterruptedDownload ends a copy in the middle of a blob; the next one goes on there.
func TestInterruptedDownload(t *testing.T) {
	t.Parallel()
	k := kit(t)
	src, top, _ := source(t)
	var cut atomic.Bool
	var ranges atomic.Int32
	host := newRegistry(t, func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Range") != "" {
			ranges.Add(1)
		}
		return false
	})
	if _, err := k.Copy(context.Background(), src, "docker://"+host+"/app:1", CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	_, err := k.Copy(ctx, "docker://"+host+"/app:1", "oci:"+dir+":v1", CopyOptions{Options: copier.Options{Jobs: 1, Progress: func(e copier.Event) {
		if e.Action == "Copied" && cut.CompareAndSwap(false, true) {
			cancel()
		}
	}}})
	if !errors.Is(err, context.Canceled) && !errdefs.IsCanceled(err) {
		t.Fatalf("interrupted: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "index.json")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an index.json appeared: %v", err)
	}
	// Half of a blob, as a killed process leaves it, and half of another that is damaged.
	blobsDir := filepath.Join(dir, "blobs", "sha256")
	_, _, b := source(t)
	half := 0
	for d, raw := range b {
		if len(raw) < 300 || raw[0] == '{' { // documents are written at once
			continue
		}
		part := bytes.Clone(raw[:len(raw)/2])
		if half++; half == 2 {
			part[0] ^= 1
		}
		_ = os.Remove(filepath.Join(blobsDir, d.Encoded()))
		if err := os.WriteFile(filepath.Join(blobsDir, d.Encoded()+".partial"), part, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	res, err := k.Copy(context.Background(), "docker://"+host+"/app:1", "oci:"+dir+":v1", CopyOptions{})
	if err != nil || res.Top.Digest != top.Digest {
		t.Fatal(res, err)
	}
	if half < 1 || ranges.Load() == 0 {
		t.Errorf("%d halves, %d requests for a range", half, ranges.Load())
	}
	whole(t, k, "oci:"+dir+":v1")
	if left, _ := filepath.Glob(filepath.Join(blobsDir, "*.partial")); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// TestTags gives an image several tags.
func TestTags(t *testing.T) {
	t.Parallel()
	k, ctx := kit(t), context.Background()
	src, top, _ := source(t)
	dir, host := t.TempDir(), newRegistry(t, nil)
	for to, tags := range map[string][]string{"docker://" + host + "/app:1": {"latest", "2"}, "oci:" + dir + "/l:1": {"latest", "2"}, "oci-archive:" + dir + "/a.tar:1": {"latest", "2"}, "docker-archive:" + dir + "/d.tar:app:1": {"app:2", "other:1"}} {
		for range 2 { // the second time there is nothing to do but that
			if _, err := k.Copy(ctx, src, to, CopyOptions{Options: copier.Options{Tags: tags}}); err != nil {
				t.Fatalf("%s: %v", to, err)
			}
			if strings.Contains(to, ".tar") {
				break // archives are made anew
			}
		}
		place := to[:strings.LastIndexByte(to, ':')]
		if strings.HasPrefix(to, "docker-archive") {
			place = strings.TrimSuffix(place, ":app")
		}
		for _, tag := range tags {
			d, _, err := k.Open(ctx, place+":"+tag, transport.Registry, Access{})
			if err != nil {
				t.Errorf("%s:%s: %v", place, tag, err)
				continue
			}
			got, _, err := d.Top(ctx)
			if err != nil || got.Digest != top.Digest && !strings.HasPrefix(to, "docker-archive") {
				t.Errorf("%s:%s: %v %v", place, tag, got, err)
			}
			d.Close()
		}
	}
	for to, tag := range map[string]string{"docker://" + host + "/app:1": "a/b:c", "oci:" + dir + "/m": "", "docker-archive:" + dir + "/e.tar:app:1": "app", "dir:" + dir + "/dir": "x"} {
		if _, err := k.Copy(ctx, src, to, CopyOptions{Options: copier.Options{Tags: []string{tag}}}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s %q: %v", to, tag, err)
		}
	}
}

// TestReferrers takes signatures along, of both kinds.
func TestReferrers(t *testing.T) {
	t.Parallel()
	k, ctx := kit(t), context.Background()
	src, top, _ := source(t)
	host := newRegistry(t, nil)
	app := "docker://" + host + "/app"
	if _, err := k.Copy(ctx, src, app+":1", CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	sb := blobs{}
	subject := ocispec.Descriptor{MediaType: top.MediaType, Digest: top.Digest, Size: top.Size}
	empty := sb.add(ocispec.MediaTypeEmptyJSON, []byte("{}"))
	ref := sb.json(t, ocispec.MediaTypeImageManifest, ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: "application/x.sbom", Config: empty,
		Layers: []ocispec.Descriptor{sb.add("application/x.sbom", []byte("an sbom"))}, Subject: &subject})
	old := blobs{}
	sig := old.json(t, ocispec.MediaTypeImageManifest, ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: old.add(ocispec.MediaTypeImageConfig, []byte("{}")),
		Layers: []ocispec.Descriptor{old.add("application/vnd.dev.cosign.simplesigning.v1+json", []byte("signed"))}})
	tag := strings.Replace(top.Digest.String(), ":", "-", 1) + ".sig"
	for from, to := range map[string]string{"oci:" + sb.layout(t, ref) + ":v1": app + ":sbom", "oci:" + old.layout(t, sig) + ":v1": app + ":" + tag} {
		if _, err := k.Copy(ctx, from, to, CopyOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	with := CopyOptions{Options: copier.Options{Referrers: true}}
	dir := t.TempDir()
	from := app + ":1"
	for _, to := range []string{"docker://" + newRegistry(t, nil) + "/copy:1", "oci:" + dir + "/l:v1", "oci-archive:" + dir + "/a.tar:v1", "docker://" + newRegistry(t, nil) + "/last:1"} {
		res, err := k.Copy(ctx, from, to, with)
		if err != nil || res.Referrers != 2 {
			t.Fatalf("%s to %s: %+v %v", from, to, res, err)
		}
		rep, err := k.Inspect(ctx, to, InspectOptions{Referrers: true})
		if err != nil || len(rep.Referrers) != 2 || rep.Referrers[0].Digest != ref.Digest || rep.Referrers[1].Digest != sig.Digest {
			t.Fatalf("%s: %+v %v", to, rep, err)
		}
		from = to
	}
	if _, err := k.Copy(ctx, from, "dir:"+dir+"/d", with); !errdefs.IsNotImplemented(err) {
		t.Errorf("a folder that holds no referrers: %v", err)
	}
	with.Format = "docker"
	if _, err := k.Copy(ctx, from, "oci:"+dir+"/x", with); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a conversion with referrers: %v", err)
	}
}

// TestReferrersWithoutAPI keeps the list under the tag that the specification has for it.
func TestReferrersWithoutAPI(t *testing.T) {
	t.Parallel()
	k, ctx := kit(t), context.Background()
	host := newRegistry(t, func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/referrers/") {
			w.WriteHeader(http.StatusNotFound)
			return true
		}
		return false
	})
	src, top, _ := source(t)
	app := "docker://" + host + "/app"
	if _, err := k.Copy(ctx, src, app+":1", CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"one", "two"} {
		sb := blobs{}
		ref := sb.json(t, ocispec.MediaTypeImageManifest, ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: "application/x.note", Config: sb.add(ocispec.MediaTypeEmptyJSON, []byte("{}")),
			Layers: []ocispec.Descriptor{sb.add("text/plain", []byte(text))}, Subject: &ocispec.Descriptor{MediaType: top.MediaType, Digest: top.Digest, Size: top.Size}})
		if _, err := k.Copy(ctx, "oci:"+sb.layout(t, ref)+":v1", app+":"+text, CopyOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	rep, err := k.Inspect(ctx, app+":1", InspectOptions{Referrers: true})
	if err != nil || len(rep.Referrers) != 2 {
		t.Errorf("%+v %v", rep.Referrers, err)
	}
}

func TestFormats(t *testing.T) {
	t.Parallel()
	k, ctx := kit(t), context.Background()
	src, top, _ := source(t)
	dir := t.TempDir()
	docker, err := k.Copy(ctx, src, "oci:"+dir+":docker", CopyOptions{Options: copier.Options{Format: "docker"}})
	if err != nil || docker.Top.MediaType != manifest.DockerIndex || docker.Top.Digest == top.Digest {
		t.Fatalf("%+v %v", docker, err)
	}
	whole(t, k, "oci:"+dir+":docker")
	back, err := k.Copy(ctx, "oci:"+dir+":docker", "oci:"+dir+":oci", CopyOptions{Options: copier.Options{Format: "oci"}})
	if err != nil || back.Top.MediaType != ocispec.MediaTypeImageIndex {
		t.Fatalf("%+v %v", back, err)
	}
	rep, err := k.Diff(ctx, src, "oci:"+dir+":oci", Access{}, Access{}, &amd64[0], true)
	if err != nil || len(rep.Config) != 0 || len(rep.Layers) != 0 {
		t.Errorf("there and back: %+v %v", rep, err)
	}
}

// TestConvert has the same files in every form.
func TestConvert(t *testing.T) {
	t.Parallel()
	k, ctx := kit(t), context.Background()
	src, top, _ := source(t)
	dir := t.TempDir()
	from := src
	for i, c := range []struct {
		form  convert.Form
		level int
		same  bool // diff ids
	}{{convert.Zstd, 0, true}, {convert.Zstd, 9, true}, {convert.Plain, 0, true}, {convert.Gzip, 9, true}, {convert.EStargz, 0, false}, {convert.Zstd, 0, false}} {
		conv, err := convert.New(c.form, c.level)
		if err != nil {
			t.Fatal(err)
		}
		to := fmt.Sprintf("oci:%s:%d", dir, i)
		res, err := k.Copy(ctx, from, to, CopyOptions{Options: copier.Options{Convert: conv}})
		if cerr := conv.Close(); cerr != nil {
			t.Error(cerr)
		}
		if err != nil || res.Top.Digest == top.Digest {
			t.Fatalf("%s: %+v %v", c.form, res, err)
		}
		whole(t, k, to)
		rep, err := k.Diff(ctx, src, to, Access{}, Access{}, &amd64[0], true)
		if err != nil {
			t.Fatal(err)
		}
		if c.same != (len(rep.Layers) == 0) {
			t.Errorf("%s: layers %+v", c.form, rep.Layers)
		}
		for _, f := range rep.Files {
			if !strings.Contains(f.Path, "stargz") && !strings.Contains(f.Path, "landmark") {
				t.Errorf("%s: %+v", c.form, f)
			}
		}
		from = to
	}
	for form, level := range map[convert.Form]int{"lzma": 0, convert.Gzip: 10, convert.Zstd: -1, convert.Plain: 1} {
		if _, err := convert.New(form, level); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s %d: %v", form, level, err)
		}
	}
}

// TestDelete removes by digest, and so all tags.
func TestDelete(t *testing.T) {
	t.Parallel()
	k, ctx := kit(t), context.Background()
	src, top, _ := source(t)
	host := newRegistry(t, nil)
	for _, tag := range []string{":1", ":2"} {
		if _, err := k.Copy(ctx, src, "docker://"+host+"/app"+tag, CopyOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if d, err := k.Delete(ctx, host+"/app:1", Access{}, true); err != nil || d != top.Digest {
		t.Errorf("%s %v", d, err)
	}
	if _, _, err := k.Tags(ctx, host+"/app", Access{}); err != nil {
		t.Error(err)
	}
	if d, err := k.Delete(ctx, host+"/app:1", Access{}, false); err != nil || d != top.Digest {
		t.Errorf("%s %v", d, err)
	}
	if _, err := k.Delete(ctx, host+"/app:1@"+top.Digest.String(), Access{}, false); !errdefs.IsNotFound(err) {
		t.Errorf("again: %v", err)
	}
	if _, err := k.Delete(ctx, "oci:/x", Access{}, false); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
}

// TestConvertToEROFS mounts what the layers became.
func TestConvertToEROFS(t *testing.T) {
	t.Parallel()
	k, ctx := kit(t), context.Background()
	src, _, _ := source(t)
	dir := t.TempDir()
	conv, err := convert.New(convert.EROFS, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer conv.Close()
	res, err := k.Copy(ctx, src, "oci:"+dir+":erofs", CopyOptions{Options: copier.Options{Convert: conv}})
	if err != nil || res.Top.MediaType != ocispec.MediaTypeImageIndex {
		t.Fatal(res, err)
	}
	whole(t, k, "oci:"+dir+":erofs")
	rep, err := k.Inspect(ctx, "oci:"+dir+":erofs", InspectOptions{Platform: &amd64[0]})
	if err != nil || len(rep.Image.Layers) != 2 {
		t.Fatal(rep, err)
	}
	if l := rep.Image.Layers[0]; l.MediaType != "application/vnd.erofs.layer.v1" || l.DiffID != l.Digest {
		t.Errorf("%+v", l)
	}
	if os.Geteuid() != 0 {
		t.Skipf("the rest needs root: %s mounts a layer", t.Name())
	}
	m, err := erofs.Mount(filepath.Join(dir, "blobs/sha256", rep.Image.Layers[0].Digest.Encoded()))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	fd, err := unix.Openat(int(m.Fd()), "etc/motd", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "motd")
	defer f.Close()
	if b, err := io.ReadAll(f); err != nil || string(b) != "hello" {
		t.Errorf("%q %v", b, err)
	}
}
