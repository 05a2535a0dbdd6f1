//go:build linux

package safepath

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func tree(t *testing.T) (*Root, string, string) {
	t.Helper()
	outside, inside := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("canary"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{
		"abs": outside, "up": "../../../../../../.." + outside, "loop": "loop", "dangling": "/nowhere/at/all",
	} {
		if err := os.Symlink(target, filepath.Join(inside, name)); err != nil {
			t.Fatal(err)
		}
	}
	r, err := OpenRoot(inside)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r, inside, outside
}

func TestLinksStayInside(t *testing.T) {
	r, inside, outside := tree(t)
	for _, name := range []string{"abs/secret", "up/secret", "../../" + outside + "/secret", outside + "/secret", "loop", "a\x00b"} {
		if b, err := r.ReadFile(name, 100); err == nil {
			t.Errorf("ReadFile(%q) gave %q", name, b)
		}
	}
	// A link to a host directory that does not exist inside is dangling: nothing may be made through it.
	if _, err := r.MkdirAll("abs/new", 0o755, nil); err == nil {
		t.Error("MkdirAll went through a dangling link")
	}
	if _, err := os.Stat(filepath.Join(outside, "new")); err == nil {
		t.Error("MkdirAll made a directory on the host")
	}
	// Where the link's target exists inside the root, it leads there.
	if err := os.MkdirAll(filepath.Join(inside, outside), 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := r.MkdirAll("abs/new", 0o755, nil)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, err := os.Stat(filepath.Join(inside, outside, "new")); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(outside, "new")); err == nil {
		t.Error("MkdirAll made a directory on the host")
	}
}

func TestMkdirAllTellsWhatItMade(t *testing.T) {
	r, _, _ := tree(t)
	count := 0
	made := func(int) error { count++; return nil }
	for _, want := range []int{3, 3} {
		f, err := r.MkdirAll("/a/b/c", 0o700, made)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		if count != want {
			t.Fatalf("made %d directories in all, want %d", count, want)
		}
	}
}

func TestReadFileRefusesWhatBlocksOrIsHuge(t *testing.T) {
	r, inside, _ := tree(t)
	if err := unix.Mkfifo(filepath.Join(inside, "fifo"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(inside, "sparse"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(inside, "sparse"), 4<<30); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"fifo", "sparse", "."} {
		if _, err := r.ReadFile(name, 1<<20); err == nil {
			t.Errorf("ReadFile(%q) worked", name)
		}
	}
	if err := os.WriteFile(filepath.Join(inside, "ok"), []byte("hello"), 0o644); err != nil {
		t.Fatal(err)
	}
	if b, err := r.ReadFile("ok", 5); err != nil || string(b) != "hello" {
		t.Errorf("got %q, %v", b, err)
	}
}

func TestOpenParent(t *testing.T) {
	r, inside, _ := tree(t)
	if err := os.Mkdir(filepath.Join(inside, "d"), 0o755); err != nil {
		t.Fatal(err)
	}
	dir, base, err := r.OpenParent("/d/../d/x")
	if err != nil || base != "x" {
		t.Fatal(base, err)
	}
	dir.Close()
	for _, name := range []string{"/", "..", ""} {
		if _, _, err := r.OpenParent(name); err == nil {
			t.Errorf("OpenParent(%q) worked", name)
		}
	}
}
