package verify

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sigstore/sigstore-go/pkg/testing/ca"
	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/theupdateframework/go-tuf/v2/metadata"
)

// tufRepository writes a repository with one target, and gives its folder.
func tufRepository(t *testing.T, target []byte, expires time.Time) string {
	t.Helper()
	dir := t.TempDir()
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	_, key, err := ed25519.GenerateKey(nil)
	ok(err)
	s, err := signature.LoadSigner(key, crypto.Hash(0))
	ok(err)
	pub, err := metadata.KeyFromPublicKey(key.Public())
	ok(err)
	root := metadata.Root(expires)
	for _, role := range []string{"root", "targets", "snapshot", "timestamp"} {
		ok(root.Signed.AddKey(pub, role))
	}
	_, err = root.Sign(s)
	ok(err)
	targets := metadata.Targets(expires)
	info, err := metadata.TargetFile().FromBytes(trustedRootTarget, target, "sha256")
	ok(err)
	targets.Signed.Targets[trustedRootTarget] = info
	_, err = targets.Sign(s)
	ok(err)
	snapshot := metadata.Snapshot(expires)
	_, err = snapshot.Sign(s)
	ok(err)
	timestamp := metadata.Timestamp(expires)
	_, err = timestamp.Sign(s)
	ok(err)
	ok(root.ToFile(filepath.Join(dir, "root.json"), false))
	ok(root.ToFile(filepath.Join(dir, "1.root.json"), false))
	ok(targets.ToFile(filepath.Join(dir, "1.targets.json"), false))
	ok(snapshot.ToFile(filepath.Join(dir, "1.snapshot.json"), false))
	ok(timestamp.ToFile(filepath.Join(dir, "timestamp.json"), false))
	ok(os.Mkdir(filepath.Join(dir, "targets"), 0o755))
	ok(os.WriteFile(filepath.Join(dir, "targets", fmt.Sprintf("%s.%s", info.Hashes["sha256"], trustedRootTarget)), target, 0o600))
	return dir
}

// TestMirror takes the trusted root from a repository of The Update Framework.
func TestMirror(t *testing.T) {
	t.Parallel()
	v, err := ca.NewVirtualSigstore()
	if err != nil {
		t.Fatal(err)
	}
	target, err := os.ReadFile(trustedRoot(t, v))
	if err != nil {
		t.Fatal(err)
	}
	const subject, issuer = "release@example.com", "https://issuer.example.com"
	p := newPlace()
	p.bundle(t, keyless(t, v, subject, issuer, statement(image1, signPredicate)))
	dir := tufRepository(t, target, time.Now().Add(time.Hour))
	var asked atomic.Int64
	files := http.FileServer(http.Dir(dir))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		files.ServeHTTP(w, r)
	}))
	defer srv.Close()
	rule := Rule{Identities: []Identity{{issuer, subject}}, TUFMirror: srv.URL, TUFRoot: filepath.Join(dir, "root.json")}
	check := func(r Rule, cache string, good bool) {
		t.Helper()
		read, err := readRule("", r, cache)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			before := asked.Load()
			sig, err := read.check(context.Background(), "app", image1, p)
			if good != (err == nil) || good && sig[0].Subject != subject {
				t.Errorf("%+v %v", sig, err)
			}
			if _, err := read.check(context.Background(), "app", image2, p); err == nil {
				t.Error("another image is good")
			}
			if good && before > 0 && asked.Load() > before+8 {
				t.Errorf("asked %d times", asked.Load()-before)
			}
		}
	}
	cache := t.TempDir()
	check(rule, "", true)
	check(rule, cache, true)
	read, err := readRule("", rule, "")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		before := asked.Load()
		if _, err := read.trusted.material(context.Background()); err != nil || i > 0 && asked.Load() != before {
			t.Errorf("%d: asked %d times, %v", i, asked.Load()-before, err)
		}
	}
	file := rule
	file.TUFMirror = "file://" + dir
	check(file, "", true)
	// The mirror is down: what it sent counts, until it expires.
	srv.Close()
	check(rule, cache, true)
	check(rule, t.TempDir(), false)
	check(rule, "", false)

	// Another repository's root, what has expired, and a target that was changed.
	other := tufRepository(t, target, time.Now().Add(time.Hour))
	file.TUFRoot = filepath.Join(other, "root.json")
	check(file, "", false)
	old := tufRepository(t, target, time.Now().Add(-time.Minute))
	file.TUFMirror, file.TUFRoot = "file://"+old, filepath.Join(old, "root.json")
	check(file, "", false)
	list, err := filepath.Glob(filepath.Join(dir, "targets", "*"))
	if err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	if err := os.WriteFile(list[0], append(target, ' '), 0o600); err != nil {
		t.Fatal(err)
	}
	file.TUFMirror, file.TUFRoot = "file://"+dir, filepath.Join(dir, "root.json")
	check(file, "", false)
}
