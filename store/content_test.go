package store

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
)

func newWriter(t testing.TB, ctx context.Context, s *Store, ref string, d ocispec.Descriptor) content.Writer {
	t.Helper()
	w, err := s.Content().Writer(ctx, content.WithRef(ref), content.WithDescriptor(d))
	must(t, err)
	return w
}

func offset(t testing.TB, w content.Writer) int64 {
	t.Helper()
	st, err := w.Status()
	must(t, err)
	return st.Offset
}

func describe(text string) ocispec.Descriptor {
	return ocispec.Descriptor{Digest: digest.FromString(text), Size: int64(len(text))}
}

func TestNamespaceIsNeeded(t *testing.T) {
	s := openTest(t, t.TempDir())
	for _, ctx := range []context.Context{context.Background(), namespaces.WithNamespace(context.Background(), "../x")} {
		_, err1 := s.Content().Info(ctx, describe("x").Digest)
		_, err2 := s.Content().Writer(ctx, content.WithRef("x"))
		_, err3 := s.Images().Get(ctx, "x")
		_, err4 := s.Leases().Create(ctx, leases.WithID("x"))
		for _, err := range []error{err1, err2, err3, err4} {
			if err == nil || !errdefs.IsFailedPrecondition(err) && !errdefs.IsInvalidArgument(err) {
				t.Error(err)
			}
		}
	}
}

func TestIngestSurvivesRestart(t *testing.T) {
	root := t.TempDir()
	ctx := inNamespace("a")
	text := strings.Repeat("0123456789", 1000)
	want := describe(text)
	s := openTest(t, root)
	w := newWriter(t, ctx, s, "layer", want)
	_, err := io.WriteString(w, text[:6000])
	must(t, err)
	if _, err := s.Content().Writer(ctx, content.WithRef("layer")); !errdefs.IsUnavailable(err) {
		t.Error("a second writer:", err)
	}
	if err := s.Content().Abort(ctx, "layer"); !errdefs.IsUnavailable(err) {
		t.Error("abort of a running one:", err)
	}
	if st, err := s.Content().Status(ctx, "layer"); err != nil || st.Offset != 6000 || st.Total != want.Size || st.Expected != want.Digest {
		t.Error(st, err)
	}
	if _, err := s.Content().Status(inNamespace("b"), "layer"); !errdefs.IsNotFound(err) {
		t.Error("another namespace sees it:", err)
	}
	// The process ends without a word.
	must(t, s.Close())
	s = openTest(t, root)
	w = newWriter(t, ctx, s, "layer", want)
	if offset(t, w) != 6000 || w.Digest() != digest.FromString(text[:6000]) {
		t.Fatalf("took up at %d", offset(t, w))
	}
	_, err = io.WriteString(w, text[6000:])
	must(t, err)
	must(t, w.Commit(ctx, want.Size, want.Digest))
	got, err := content.ReadBlob(ctx, s.Content(), ocispec.Descriptor{Digest: want.Digest})
	if err != nil || string(got) != text {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if list, err := s.Content().ListStatuses(ctx); err != nil || len(list) != 0 {
		t.Error(list, err)
	}
}

// After a power cut, bytes that were not synced may be anything.
func TestIngestAfterPowerCut(t *testing.T) {
	root := t.TempDir()
	ctx := inNamespace("a")
	s := openTest(t, root)
	w := newWriter(t, ctx, s, "layer", ocispec.Descriptor{})
	_, err := io.WriteString(w, "synced")
	must(t, err)
	must(t, w.(content.Syncer).Sync())
	_, err = io.WriteString(w, " and not synced")
	must(t, err)
	must(t, s.Close())
	path := filepath.Join(s.blobs.ingestDir(ingestName("a", "layer")), "ingest.json")
	raw, err := os.ReadFile(path)
	must(t, err)
	must(t, os.WriteFile(path, bytes.ReplaceAll(raw, []byte(bootID()), []byte("another boot")), 0o600))
	s = openTest(t, root)
	w = newWriter(t, ctx, s, "layer", ocispec.Descriptor{})
	if offset(t, w) != 6 || w.Digest() != digest.FromString("synced") {
		t.Errorf("took up at %d", offset(t, w))
	}
	must(t, w.Close())

	// A record that cannot be read begins anew.
	for _, bad := range []string{"", "{", `{"namespace":"a","ref":"other"}`, `{"namespace":"a","ref":"layer","synced":-1}`} {
		must(t, os.WriteFile(path, []byte(bad), 0o600))
		w = newWriter(t, ctx, s, "layer", ocispec.Descriptor{})
		if offset(t, w) != 0 {
			t.Errorf("%q: took up at %d", bad, offset(t, w))
		}
		must(t, w.Close())
	}
}

func TestCommitRefuses(t *testing.T) {
	s := openTest(t, t.TempDir())
	ctx := inNamespace("a")
	fill := func() content.Writer {
		w := newWriter(t, ctx, s, "x", ocispec.Descriptor{})
		must(t, w.Truncate(0))
		_, err := io.WriteString(w, "hello")
		must(t, err)
		return w
	}
	if err := fill().Commit(ctx, 4, ""); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	if err := fill().Commit(ctx, 5, digest.FromString("other")); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	if err := fill().Commit(ctx, 5, "", content.WithLabels(map[string]string{"k": strings.Repeat("v", 5000)})); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	if err := fill().Commit(leases.WithLease(ctx, "none"), 5, ""); !errdefs.IsNotFound(err) {
		t.Error("under a lease that does not exist:", err)
	}
	if there(t, ctx, s, describe("hello")) {
		t.Error("a refused commit left the blob")
	}
	w := fill()
	must(t, w.Commit(ctx, 5, digest.SHA512.FromString("hello")))
	if _, err := w.Write(nil); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	if err := w.Commit(ctx, 5, ""); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	must(t, w.Close())
	if _, err := os.Stat(filepath.Join(s.root, "content", "blobs", "sha512", digest.SHA512.FromString("hello").Encoded())); err != nil {
		t.Error(err)
	}
	for _, bad := range []ocispec.Descriptor{{Digest: "sha256:xyz"}, {Digest: "../../etc/passwd"}, {Digest: "md5:d41d8cd98f00b204e9800998ecf8427e"}} {
		if _, err := s.Content().Writer(ctx, content.WithRef("bad"), content.WithDescriptor(bad)); !errdefs.IsInvalidArgument(err) {
			t.Error(bad.Digest, err)
		}
		if _, err := s.Content().ReaderAt(ctx, bad); !errdefs.IsNotFound(err) {
			t.Error(bad.Digest, err)
		}
	}
}

func TestLeaseHoldsWhatWasMadeUnderIt(t *testing.T) {
	s := openTest(t, t.TempDir())
	ctx := inNamespace("a")
	l, err := s.Leases().Create(ctx, leases.WithID("l"))
	must(t, err)
	lctx := leases.WithLease(ctx, l.ID)
	old := blob(t, ctx, s, "old")
	blob(t, lctx, s, "new")
	blob(t, lctx, s, "old") // found
	w := newWriter(t, lctx, s, "unforeseen", ocispec.Descriptor{})
	blob(t, ctx, s, "third")
	_, err = io.WriteString(w, "third")
	must(t, err)
	if err := w.Commit(lctx, 0, ""); !errdefs.IsAlreadyExists(err) {
		t.Error(err)
	}
	list, err := s.Leases().ListResources(ctx, l)
	must(t, err)
	if len(list) != 3 {
		t.Errorf("holds %v", list)
	}
	if st := collect(t, s); st.Content != 0 {
		t.Errorf("%+v", st)
	}
	must(t, s.Leases().DeleteResource(ctx, l, leases.Resource{ID: old.Digest.String(), Type: "content"}))
	if collect(t, s); there(t, ctx, s, old) {
		t.Error("a blob outlived its place in the lease")
	}
}

func TestDeleteAndDamage(t *testing.T) {
	s := openTest(t, t.TempDir())
	a, b := inNamespace("a"), inNamespace("b")
	d := blob(t, a, s, "x")
	blob(t, b, s, "x")
	r, err := s.Content().ReaderAt(a, d)
	must(t, err)
	must(t, s.Content().Delete(a, d.Digest))
	if err := s.Content().Delete(a, d.Digest); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	if !onDisk(s, d) {
		t.Error("the file went while a namespace has it")
	}
	must(t, s.Content().Delete(b, d.Digest))
	if onDisk(s, d) {
		t.Error("the file is left")
	}
	if got, err := io.ReadAll(io.NewSectionReader(r, 0, r.Size())); err != nil || string(got) != "x" {
		t.Error("an open blob was lost:", got, err)
	}
	must(t, r.Close())

	// A file that somebody removed or cut is an error, and a pull brings it back.
	d = blob(t, a, s, "whole")
	must(t, os.Remove(s.blobs.path(d.Digest)))
	must(t, os.WriteFile(s.blobs.path(d.Digest), []byte("who"), 0o600))
	if _, err := s.Content().ReaderAt(a, d); !errdefs.IsDataLoss(err) {
		t.Error(err)
	}
	blob(t, b, s, "whole")
	if got, err := content.ReadBlob(a, s.Content(), ocispec.Descriptor{Digest: d.Digest}); err != nil || string(got) != "whole" {
		t.Error(got, err)
	}

	// A damaged record does not hide the others.
	must(t, s.DB().Update(a, func(tx *bolt.Tx) error {
		return NamespaceBucket(tx, "a", sectionContent).Put([]byte(describe("y").Digest), []byte("{"))
	}))
	n := 0
	must(t, s.Content().Walk(a, func(content.Info) error { n++; return nil }))
	if n != 1 {
		t.Errorf("walked %d", n)
	}
	if _, err := s.Content().Info(a, describe("y").Digest); !errdefs.IsDataLoss(err) {
		t.Error(err)
	}
}

func TestWalkFilters(t *testing.T) {
	s := openTest(t, t.TempDir())
	ctx := inNamespace("a")
	x := blob(t, ctx, s, "x", "kind", "one", "containerd.io/distribution.source.docker.io", "library/x")
	blob(t, ctx, s, "y", "kind", "two")
	for filter, want := range map[string]int{
		"": 2, "labels.kind==one": 1, "digest==" + x.Digest.String(): 1, "labels.kind": 2, "labels.none": 0,
		`labels."containerd.io/distribution.source.docker.io"==library/x`: 1,
	} {
		n := 0
		must(t, s.Content().Walk(ctx, func(content.Info) error { n++; return nil }, filter))
		if n != want {
			t.Errorf("%s: %d, want %d", filter, n, want)
		}
	}
	if err := s.Content().Walk(ctx, nil, "((("); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
}

func TestListStatuses(t *testing.T) {
	s := openTest(t, t.TempDir())
	ctx := inNamespace("a")
	for _, ref := range []string{"layer-1", "layer-2", "manifest"} {
		must(t, newWriter(t, ctx, s, ref, ocispec.Descriptor{}).Close())
	}
	must(t, newWriter(t, inNamespace("b"), s, "layer-3", ocispec.Descriptor{}).Close())
	for filter, want := range map[string]int{"": 3, "ref==manifest": 1, `ref~="^layer-"`: 2, "^layer-": 2, "^(layer-1|manifest)$": 2} {
		list, err := s.Content().ListStatuses(ctx, filter)
		if err != nil || len(list) != want {
			t.Errorf("%q: %v, %v", filter, list, err)
		}
	}
	if _, err := s.Content().ListStatuses(ctx, "("); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	must(t, s.Content().Abort(ctx, "manifest"))
	if err := s.Content().Abort(ctx, "manifest"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
}

// TestLeftIngestGoes: half a blob is dropped when it turns out that the blob is there.
func TestLeftIngestGoes(t *testing.T) {
	s := openTest(t, t.TempDir())
	ctx := inNamespace("a")
	d := ocispec.Descriptor{Digest: digest.FromString("text"), Size: 4}
	for _, ref := range []string{"left", "other"} {
		desc := d
		if ref == "other" {
			desc = ocispec.Descriptor{}
		}
		w := newWriter(t, ctx, s, ref, desc)
		_, err := w.Write([]byte("te"))
		must(t, err)
		must(t, w.Close())
	}
	blob(t, ctx, s, "text")
	for _, ref := range []string{"left", "other"} {
		if _, err := s.Content().Writer(ctx, content.WithRef(ref), content.WithDescriptor(d)); !errdefs.IsAlreadyExists(err) {
			t.Errorf("%s: %v", ref, err)
		}
	}
	if list, err := s.Content().ListStatuses(ctx); err != nil || len(list) != 1 || list[0].Ref != "other" {
		t.Errorf("%v, %v", list, err)
	}
}

func FuzzRecords(f *testing.F) {
	f.Add([]byte(`{"size":1,"created":"2026-01-01T00:00:00Z","labels":{"a":"b"}}`))
	f.Add([]byte(`{"target":{"digest":"sha256:00","size":1},"labels":null}`))
	f.Add([]byte(`{"namespace":"a","ref":"b","synced":3,"total":-1}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var b blobRecord
		if decode(raw, &b) == nil {
			labelRefs("ns", b.Labels)
			adaptBlob(b.info("x")).Field([]string{"labels", "a"})
		}
		var i imageRecord
		if decode(raw, &i) == nil {
			imageRefs("ns", i)
			_ = validateImage(i.image("x"))
		}
		var l leaseRecord
		if decode(raw, &l) == nil {
			l.expired(now())
		}
		if r, err := parseIngest(raw); err == nil {
			if r.Total < 0 || r.Synced < 0 || r.Ref == "" {
				t.Errorf("accepted %+v", r)
			}
		}
	})
}
