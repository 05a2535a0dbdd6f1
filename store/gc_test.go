package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
)

func inNamespace(ns string) context.Context {
	return namespaces.WithNamespace(context.Background(), ns)
}

// blob stores text and gives its descriptor. labels come in pairs.
func blob(t testing.TB, ctx context.Context, s *Store, text string, labels ...string) ocispec.Descriptor {
	t.Helper()
	d := ocispec.Descriptor{MediaType: "text/plain", Digest: digest.FromString(text), Size: int64(len(text))}
	m := map[string]string{}
	for i := 0; i < len(labels); i += 2 {
		m[labels[i]] = labels[i+1]
	}
	must(t, content.WriteBlob(ctx, s.Content(), "ref-"+text, bytes.NewReader([]byte(text)), d, content.WithLabels(m)))
	return d
}

func there(t testing.TB, ctx context.Context, s *Store, d ocispec.Descriptor) bool {
	t.Helper()
	_, err := s.Content().Info(ctx, d.Digest)
	if err != nil && !errdefs.IsNotFound(err) {
		t.Fatal(err)
	}
	return err == nil
}

func onDisk(s *Store, d ocispec.Descriptor) bool {
	_, err := os.Stat(s.blobs.path(d.Digest))
	return err == nil
}

func collect(t testing.TB, s *Store) GCStats {
	t.Helper()
	st, err := s.GC(context.Background())
	must(t, err)
	return st
}

func TestGCKeepsWhatIsReachable(t *testing.T) {
	s := openTest(t, t.TempDir())
	ctx := inNamespace("a")
	layer := blob(t, ctx, s, "layer")
	config := blob(t, ctx, s, "config")
	manifest := blob(t, ctx, s, "manifest", labelRefContent+".l.0", layer.Digest.String(), labelRefContent+".config", config.Digest.String())
	root := blob(t, ctx, s, "root", labelRoot, "now")
	leased := blob(t, ctx, s, "leased")
	expired := blob(t, ctx, s, "expired")
	source := blob(t, ctx, s, "source")
	garbage := blob(t, ctx, s, "garbage", labelRefContent+"x", layer.Digest.String())
	other := blob(t, inNamespace("b"), s, "garbage") // the same bytes, elsewhere
	_, err := s.Images().Create(ctx, images.Image{Name: "img", Target: manifest})
	must(t, err)
	l, err := s.Leases().Create(ctx, leases.WithID("live"), leases.WithExpiration(time.Hour))
	must(t, err)
	must(t, s.Leases().AddResource(ctx, l, leases.Resource{ID: leased.Digest.String(), Type: "content"}))
	old, err := s.Leases().Create(ctx, leases.WithID("old"), leases.WithLabel(labelExpire, "2001-01-01T00:00:00Z"))
	must(t, err)
	must(t, s.Leases().AddResource(ctx, old, leases.Resource{ID: expired.Digest.String(), Type: "content"}))
	must(t, s.Leases().AddResource(ctx, old, leases.Resource{ID: leased.Digest.String(), Type: "content"}))
	s.AddSource(sourceFunc(func(_ context.Context, add func(Node)) error {
		add(ContentNode("a", source.Digest))
		add(ContentNode("b", other.Digest))
		return nil
	}))

	st := collect(t, s)
	if st.Content != 2 || st.Leases != 1 || st.Bytes != expired.Size || st.Marked != 7 {
		t.Errorf("%+v", st)
	}
	for _, d := range []ocispec.Descriptor{layer, config, manifest, root, leased, source} {
		if !there(t, ctx, s, d) || !onDisk(s, d) {
			t.Errorf("%s was collected", d.Digest)
		}
	}
	if there(t, ctx, s, expired) || onDisk(s, expired) || there(t, ctx, s, garbage) {
		t.Error("garbage is left")
	}
	if !there(t, inNamespace("b"), s, other) || !onDisk(s, other) {
		t.Error("a blob that another namespace has lost its file")
	}

	must(t, s.Images().Delete(ctx, "img", images.SynchronousDelete()))
	for _, d := range []ocispec.Descriptor{layer, config, manifest} {
		if there(t, ctx, s, d) || onDisk(s, d) {
			t.Errorf("%s is left", d.Digest)
		}
	}
	must(t, s.Leases().Delete(ctx, l, leases.SynchronousDelete))
	if there(t, ctx, s, leased) {
		t.Error("a blob outlived its lease")
	}
}

type sourceFunc func(context.Context, func(Node)) error

func (f sourceFunc) Roots(ctx context.Context, add func(Node)) error { return f(ctx, add) }

// What comes into use after the walk began, in whatever way, stays with all that it
// refers to.
func TestGCWriteBarrier(t *testing.T) {
	s := openTest(t, t.TempDir())
	ctx := inNamespace("a")
	var byImage, byLease, byLabel, byCommit, child, garbage ocispec.Descriptor
	child = blob(t, ctx, s, "child")
	byImage = blob(t, ctx, s, "image", labelRefContent, child.Digest.String())
	byLease = blob(t, ctx, s, "lease")
	byLabel = blob(t, ctx, s, "label")
	byCommit = blob(t, ctx, s, "commit")
	garbage = blob(t, ctx, s, "garbage")
	_, err := s.Leases().Create(ctx, leases.WithID("l"))
	must(t, err)
	// A source is asked after the walk: the moment at which everything below happens.
	s.AddSource(sourceFunc(func(context.Context, func(Node)) error {
		if _, err := s.Images().Create(ctx, images.Image{Name: "img", Target: byImage}); err != nil {
			return err
		}
		if err := s.Leases().AddResource(ctx, leases.Lease{ID: "l"}, leases.Resource{ID: byLease.Digest.String(), Type: "content"}); err != nil {
			return err
		}
		if _, err := s.Content().Update(ctx, content.Info{Digest: byLabel.Digest, Labels: map[string]string{labelRoot: "x"}}); err != nil {
			return err
		}
		// A pull that finds the blob there.
		_, err := s.Content().Writer(leases.WithLease(ctx, "l"), content.WithRef("r"), content.WithDescriptor(byCommit))
		if !errdefs.IsAlreadyExists(err) {
			return fmt.Errorf("open writer: %w", err)
		}
		return nil
	}))
	if st := collect(t, s); st.Content != 1 {
		t.Errorf("%+v", st)
	}
	for _, d := range []ocispec.Descriptor{child, byImage, byLease, byLabel, byCommit} {
		if !there(t, ctx, s, d) {
			t.Errorf("%s was collected while it came into use", d.Digest)
		}
	}
	if there(t, ctx, s, garbage) {
		t.Error("garbage is left")
	}
}

func TestGCStopsWithoutItsSources(t *testing.T) {
	s := openTest(t, t.TempDir())
	ctx := inNamespace("a")
	d := blob(t, ctx, s, "x")
	errAsk := errors.New("no answer")
	s.AddSource(sourceFunc(func(context.Context, func(Node)) error { return errAsk }))
	if _, err := s.GC(ctx); !errors.Is(err, errAsk) {
		t.Error(err)
	}
	if !there(t, ctx, s, d) {
		t.Error("collected without knowing what is in use")
	}
}

func TestGCFlatLeaseAndDamage(t *testing.T) {
	s := openTest(t, t.TempDir())
	ctx := inNamespace("a")
	child := blob(t, ctx, s, "child")
	top := blob(t, ctx, s, "top", labelRefContent, child.Digest.String())
	elsewhere := blob(t, inNamespace("b"), s, "elsewhere")
	l, err := s.Leases().Create(ctx, leases.WithID("l"), leases.WithLabel(labelFlat, "x"))
	must(t, err)
	must(t, s.Leases().AddResource(ctx, l, leases.Resource{ID: top.Digest.String(), Type: "content"}))
	// Who knows what the damaged image needs.
	must(t, s.DB().Update(ctx, func(tx *bolt.Tx) error {
		b, err := MakeNamespaceBucket(tx, "a", sectionImages)
		if err != nil {
			return err
		}
		return b.Put([]byte("bad"), []byte("{"))
	}))
	if st := collect(t, s); st.Content != 1 || !there(t, ctx, s, child) || there(t, inNamespace("b"), s, elsewhere) {
		t.Errorf("%+v", st)
	}
	must(t, s.Images().Delete(ctx, "bad"))
	if st := collect(t, s); st.Content != 1 || there(t, ctx, s, child) || !there(t, ctx, s, top) {
		t.Errorf("%+v", st)
	}
}

func TestGCFiles(t *testing.T) {
	s := openTest(t, t.TempDir())
	ctx := inNamespace("a")
	orphan := ocispec.Descriptor{Digest: digest.FromString("orphan")}
	must(t, os.WriteFile(s.blobs.path(orphan.Digest), []byte("orphan"), 0o444))
	foreign := filepath.Join(s.blobs.algDir(digest.SHA256), "README")
	must(t, os.WriteFile(foreign, nil, 0o644))
	ingest := func(ref string, age time.Duration) content.Writer {
		w, err := s.Content().Writer(ctx, content.WithRef(ref))
		must(t, err)
		_, err = w.Write([]byte("some"))
		must(t, err)
		dir := s.blobs.ingestDir(ingestName("a", ref))
		at := time.Now().Add(-age)
		for _, p := range []string{filepath.Join(dir, "data"), dir} {
			must(t, os.Chtimes(p, at, at))
		}
		return w
	}
	closeAt := func(w content.Writer, ref string, age time.Duration) {
		must(t, w.Close())
		at := time.Now().Add(-age)
		must(t, os.Chtimes(s.blobs.ingestDir(ingestName("a", ref)), at, at))
	}
	open := ingest("open", 48*time.Hour)
	defer open.Close()
	closeAt(ingest("young", time.Hour), "young", time.Hour)
	closeAt(ingest("old", 48*time.Hour), "old", 48*time.Hour)
	closeAt(ingest("kept", 48*time.Hour), "kept", 48*time.Hour)
	l, err := s.Leases().Create(ctx, leases.WithID("l"))
	must(t, err)
	must(t, s.Leases().AddResource(ctx, l, leases.Resource{ID: "kept", Type: "ingests"}))

	st := collect(t, s)
	if st.Orphans != 1 || st.Ingests != 1 || st.Bytes != 6+4 || onDisk(s, orphan) {
		t.Errorf("%+v", st)
	}
	if _, err := os.Stat(foreign); err != nil {
		t.Error("removed a file that is no blob")
	}
	list, err := s.Content().ListStatuses(ctx)
	must(t, err)
	if len(list) != 3 {
		t.Errorf("left %v", list)
	}
}

func TestScheduleGC(t *testing.T) {
	s, err := Open(t.TempDir(), Options{GCDelay: 10 * time.Millisecond})
	must(t, err)
	defer s.Close()
	ctx := inNamespace("a")
	d := blob(t, ctx, s, "x")
	_, err = s.Images().Create(ctx, images.Image{Name: "img", Target: d})
	must(t, err)
	must(t, s.Images().Delete(ctx, "img"))
	for range 30000 {
		if !there(t, ctx, s, d) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("was not collected in the background")
}

// collecting collects again and again until rest is called.
func collecting(t *testing.T, s *Store) (rest func()) {
	stop := make(chan struct{})
	var gc sync.WaitGroup
	gc.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				if _, err := s.GC(context.Background()); err != nil {
					t.Error(err)
				}
			}
		}
	})
	return func() {
		close(stop)
		gc.Wait()
	}
}

// Pulls, deletions and collections side by side: an image that exists has its blobs.
func TestGCBesideWork(t *testing.T) {
	s := openTest(t, t.TempDir())
	rest := collecting(t, s)
	var work sync.WaitGroup
	for w := range 4 {
		work.Go(func() {
			for i := range 25 {
				ctx := inNamespace([]string{"a", "b"}[w%2])
				name := fmt.Sprint("img", w)
				l, err := s.Leases().Create(ctx, leases.WithID(fmt.Sprint(w, "-", i)))
				must(t, err)
				lctx := leases.WithLease(ctx, l.ID)
				// The layers are everybody's, so they are often found, often just collected.
				layer := blob(t, lctx, s, fmt.Sprint("layer", i%3))
				target := blob(t, lctx, s, fmt.Sprint("manifest", w, i%3), labelRefContent, layer.Digest.String())
				// The blob may have been there without the label.
				_, err = s.Content().Update(lctx, content.Info{Digest: target.Digest, Labels: map[string]string{labelRefContent: layer.Digest.String()}})
				must(t, err)
				if _, err := s.Images().Create(lctx, images.Image{Name: name, Target: target}); err != nil {
					t.Error(err)
					return
				}
				must(t, s.Leases().Delete(ctx, l))
				time.Sleep(time.Millisecond)
				for _, d := range []ocispec.Descriptor{layer, target} {
					if _, err := content.ReadBlob(ctx, s.Content(), ocispec.Descriptor{Digest: d.Digest}); err != nil {
						t.Errorf("image %s in round %d: %v", name, i, err)
					}
				}
				must(t, s.Images().Delete(ctx, name))
			}
		})
	}
	work.Wait()
	rest()
	collect(t, s)
	if left, err := os.ReadDir(s.blobs.algDir(digest.SHA256)); err != nil || len(left) != 0 {
		t.Errorf("left %v, %v", left, err)
	}
	must(t, s.DB().View(context.Background(), func(tx *bolt.Tx) error {
		return EachNamespace(tx, func(ns string) error {
			if b := NamespaceBucket(tx, ns, sectionContent); b != nil {
				if k, _ := b.Cursor().First(); k != nil {
					t.Errorf("namespace %s still has %s", ns, k)
				}
			}
			return nil
		})
	}))
}

// An ingest whose digest is known at its end only finds out at the commit that its blob is
// there already, as garbage that is just being collected. Whatever comes first: a commit
// under a lease that succeeds, or finds the blob there, has the blob.
func TestCommitOfWhatIsBeingCollected(t *testing.T) {
	s := openTest(t, t.TempDir())
	rest := collecting(t, s)
	var work sync.WaitGroup
	for w := range 6 {
		work.Go(func() {
			for i := range 60 {
				ctx := inNamespace("a")
				l, err := s.Leases().Create(ctx, leases.WithID(fmt.Sprint(w, "-", i)))
				must(t, err)
				lctx := leases.WithLease(ctx, l.ID)
				text := fmt.Sprint("everybody's ", i%2)
				cw, err := s.Content().Writer(lctx, content.WithRef(fmt.Sprint("load-", w)))
				must(t, err)
				_, err = cw.Write([]byte(text))
				must(t, err)
				if err := cw.Commit(lctx, int64(len(text)), ""); err != nil && !errdefs.IsAlreadyExists(err) {
					t.Errorf("worker %d, round %d: %v", w, i, err)
				}
				got, err := content.ReadBlob(ctx, s.Content(), describe(text))
				if err != nil || string(got) != text {
					t.Errorf("worker %d, round %d: %q %v", w, i, got, err)
				}
				must(t, s.Leases().Delete(ctx, l))
			}
		})
	}
	work.Wait()
	rest()
	collect(t, s)
	if left, err := os.ReadDir(s.blobs.algDir(digest.SHA256)); err != nil || len(left) != 0 {
		t.Errorf("left %v, %v", left, err)
	}
}

// TestGCBackReferences: what refers back to something lives as long as that, and an image whose
// time is over only as long as something refers to it.
func TestGCBackReferences(t *testing.T) {
	s := openTest(t, t.TempDir())
	ctx := inNamespace("a")
	past := time.Now().Add(-time.Minute).Format(time.RFC3339)
	image := func(name string, target ocispec.Descriptor, labels map[string]string) {
		t.Helper()
		_, err := s.Images().Create(ctx, images.Image{Name: name, Target: target, Labels: labels})
		must(t, err)
	}
	index, child, note := blob(t, ctx, s, "index"), blob(t, ctx, s, "child"), blob(t, ctx, s, "note", labelBackRef+"content.x", digest.FromString("child").String())
	image("index", index, nil)
	image("child", child, map[string]string{labelExpire: past, labelBackRef + "image": "index"})
	image("over", child, map[string]string{labelExpire: past})
	image("named", child, map[string]string{labelExpire: past})
	image("names", index, map[string]string{labelRefImage + ".n": "named"})
	image("later", child, map[string]string{labelExpire: time.Now().Add(time.Hour).Format(time.RFC3339)})
	names := func() (out []string) {
		list, err := s.Images().List(ctx)
		must(t, err)
		for _, i := range list {
			out = append(out, i.Name)
		}
		return out
	}
	if st := collect(t, s); st.Images != 1 || st.Content != 0 {
		t.Errorf("%+v", st)
	}
	if got, want := fmt.Sprint(names()), "[child index later named names]"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	for _, n := range []string{"index", "names", "later"} {
		must(t, s.Images().Delete(ctx, n))
	}
	if st := collect(t, s); st.Images != 2 {
		t.Errorf("%+v", st)
	}
	for _, d := range []ocispec.Descriptor{index, child, note} {
		if there(t, ctx, s, d) {
			t.Errorf("%s stayed", d.Digest)
		}
	}
	if got := names(); len(got) != 0 {
		t.Errorf("%v stayed", got)
	}
}

// TestGCMeetsNewLease: a lease of the name of one that expires just now is another one.
func TestGCMeetsNewLease(t *testing.T) {
	s := openTest(t, t.TempDir())
	ctx := inNamespace("a")
	_, err := s.Leases().Create(ctx, leases.WithID("l"), leases.WithLabel(labelExpire, "2001-01-01T00:00:00Z"))
	must(t, err)
	var d ocispec.Descriptor
	s.AddSource(sourceFunc(func(context.Context, func(Node)) error { // while the collection is under way
		if err := s.Leases().Delete(ctx, leases.Lease{ID: "l"}); err != nil {
			return err
		}
		if _, err := s.Leases().Create(ctx, leases.WithID("l"), leases.WithExpiration(time.Hour)); err != nil {
			return err
		}
		d = blob(t, leases.WithLease(ctx, "l"), s, "text")
		return nil
	}))
	if st := collect(t, s); st.Leases != 0 {
		t.Errorf("%+v", st)
	}
	if list, err := s.Leases().ListResources(ctx, leases.Lease{ID: "l"}); err != nil || len(list) != 1 || !there(t, ctx, s, d) {
		t.Errorf("the lease holds %v, %v", list, err)
	}
}
