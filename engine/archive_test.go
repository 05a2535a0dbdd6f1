package engine

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// tree gives a container that is not started, with files, and a canary beside it that
// nothing in the container may reach.
func archiveNode(t *testing.T) (n *node, id, rootfs, canary string) {
	n = newNode(t)
	id = n.create("cc", Config{})
	rootfs = filepath.Join(n.snaps.root, id)
	canary = t.TempDir()
	for _, f := range []string{filepath.Join(canary, "secret"), filepath.Join(rootfs, "d/f"), filepath.Join(rootfs, "top")} {
		if err := os.MkdirAll(filepath.Dir(f), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(f, []byte(filepath.Base(f)), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{"abs": canary, "up": strings.Repeat("../", 30) + canary[1:], "in": "/d", "dangling": "/none", "loop": "loop"} {
		if err := os.Symlink(target, filepath.Join(rootfs, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(rootfs, "d/f"), filepath.Join(rootfs, "d/g")); err != nil {
		t.Fatal(err)
	}
	return n, id, rootfs, canary
}

func readTar(t *testing.T, r io.Reader) map[string]string {
	t.Helper()
	out := map[string]string{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		out[h.Name] = string(b)
		if h.Linkname != "" {
			out[h.Name] = "-> " + h.Linkname
		}
	}
}

func TestGetArchive(t *testing.T) {
	t.Parallel()
	n, id, _, _ := archiveNode(t)
	for path, want := range map[string]map[string]string{
		"/d":        {"d/": "", "d/f": "f", "d/g": "-> d/f"},
		"/d/.":      {"./": "", "f": "f", "g": "-> f"},
		"d/f":       {"f": "f"},
		"/in":       {"in": "-> /d"},
		"/in/":      {"in/": "", "in/f": "f", "in/g": "-> in/f"},
		"/up":       nil, // what the link says, not what is there
		"/d/../top": {"top": "top"},
	} {
		r, st, err := n.e.GetArchive(bg, id, path)
		if err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		got := readTar(t, r)
		r.Close()
		if want != nil && !maps.Equal(got, want) {
			t.Errorf("%s: %v, want %v", path, got, want)
		}
		if st.Name != filepath.Base(filepath.Clean(path)) {
			t.Errorf("%s: stat %+v", path, st)
		}
	}
	for _, path := range []string{"/none", "/abs/secret", "/up/secret", "/loop/x", "/dangling/x", "/top/x"} {
		if _, _, err := n.e.GetArchive(bg, id, path); !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v", path, err)
		}
		if _, err := n.e.StatPath(bg, id, path); !errdefs.IsNotFound(err) {
			t.Errorf("stat %s: %v", path, err)
		}
	}
	st, err := n.e.StatPath(bg, id, "/in")
	if err != nil || st.LinkTarget != "/d" || fs.FileMode(st.Mode)&fs.ModeSymlink == 0 {
		t.Errorf("%+v %v", st, err)
	}
	var b bytes.Buffer
	if err := n.e.Export(bg, id, &b); err != nil {
		t.Fatal(err)
	}
	if got := readTar(t, &b); got["d/f"] != "f" || got["etc/passwd"] == "" {
		t.Errorf("export: %v", slices.Sorted(maps.Keys(got)))
	}
}

// own makes headers that need no root to unpack.
func own(h tar.Header) *tar.Header {
	h.Uid, h.Gid = os.Getuid(), os.Getgid()
	if h.Mode == 0 {
		h.Mode = 0o644
	}
	return &h
}

func makeTar(t *testing.T, entries ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range entries {
		data := []byte("data of " + h.Name)
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(data))
		}
		if err := w.WriteHeader(own(h)); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write(data); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestPutArchive(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skipf("needs root: %s opens the container's mounts", t.Name())
	}
	n, id, rootfs, canary := archiveNode(t)
	put := func(path string, raw []byte, o PutOptions) error {
		return n.e.PutArchive(bg, id, path, bytes.NewReader(raw), o)
	}
	raw := makeTar(t,
		tar.Header{Name: "new/", Typeflag: tar.TypeDir, Mode: 0o750},
		tar.Header{Name: "new/a", Typeflag: tar.TypeReg, Mode: 0o600},
		tar.Header{Name: "new/link", Typeflag: tar.TypeSymlink, Linkname: "a"},
		tar.Header{Name: "new/hard", Typeflag: tar.TypeLink, Linkname: "new/a"},
		tar.Header{Name: "new/fifo", Typeflag: tar.TypeFifo},
		tar.Header{Name: "f", Typeflag: tar.TypeReg},
		// These must all end below the directory, or inside the container.
		tar.Header{Name: "../../../../escape1", Typeflag: tar.TypeReg},
		tar.Header{Name: "/escape2", Typeflag: tar.TypeReg},
		tar.Header{Name: "x", Typeflag: tar.TypeSymlink, Linkname: canary},
		tar.Header{Name: "y", Typeflag: tar.TypeSymlink, Linkname: strings.Repeat("../", 30)},
	)
	if err := put("/in", raw, PutOptions{}); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"d/new/a": "data of new/a", "d/f": "data of f", "d/escape1": "data of ../../../../escape1", "d/escape2": "data of /escape2"} {
		got, err := os.ReadFile(filepath.Join(rootfs, name))
		if err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if fi, err := os.Stat(filepath.Join(rootfs, "d/new")); err != nil || fi.Mode().Perm() != 0o750 {
		t.Errorf("directory: %v %v", fi, err)
	}
	if got, _ := os.ReadFile(filepath.Join(rootfs, "d/g")); string(got) != "f" {
		t.Error("a file was written through its hard link instead of being replaced")
	}
	for _, c := range []struct {
		name, path string
		raw        []byte
		o          PutOptions
		ok         func(error) bool
	}{
		{"through a link out of the root", "/", makeTar(t, tar.Header{Name: "abs/secret", Typeflag: tar.TypeReg}), PutOptions{}, nil},
		{"through a link that the archive made", "/d", makeTar(t, tar.Header{Name: "x/secret", Typeflag: tar.TypeReg}), PutOptions{}, nil},
		{"hard link to what is outside", "/", makeTar(t, tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "abs/secret"}), PutOptions{}, func(err error) bool { return err != nil }},
		{"missing directory", "/none", raw, PutOptions{}, errdefs.IsNotFound},
		{"file as directory", "/top", raw, PutOptions{}, func(err error) bool { return errdefs.IsInvalidArgument(err) || errdefs.IsNotFound(err) }},
		{"directory over a file", "/", makeTar(t, tar.Header{Name: "top/", Typeflag: tar.TypeDir}), PutOptions{NoOverwriteDirNonDir: true}, errdefs.IsInvalidArgument},
		{"file over a directory", "/", makeTar(t, tar.Header{Name: "d", Typeflag: tar.TypeReg}), PutOptions{NoOverwriteDirNonDir: true}, errdefs.IsInvalidArgument},
		{"xz", "/", append([]byte{0xfd, '7', 'z', 'X', 'Z', 0}, raw...), PutOptions{}, errdefs.IsInvalidArgument},
		{"garbage", "/", bytes.Repeat([]byte("garbage"), 200), PutOptions{}, errdefs.IsInvalidArgument},
		{"cut off", "/", raw[:700], PutOptions{}, errdefs.IsInvalidArgument},
	} {
		err := put(c.path, c.raw, c.o)
		if c.ok != nil && !c.ok(err) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if err := put("/", makeTar(t, tar.Header{Name: "d", Typeflag: tar.TypeReg}), PutOptions{}); err != nil {
		t.Errorf("file over a directory: %v", err)
	}
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	if _, err := w.Write(makeTar(t, tar.Header{Name: "zipped", Typeflag: tar.TypeReg})); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if err := put("/", z.Bytes(), PutOptions{}); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(rootfs, "zipped")); err != nil {
		t.Error(err)
	}
	// The canary is what it was.
	entries, err := os.ReadDir(canary)
	if err != nil || len(entries) != 1 {
		t.Fatalf("canary holds %v", entries)
	}
	if got, _ := os.ReadFile(filepath.Join(canary, "secret")); string(got) != "secret" {
		t.Fatalf("canary was written: %q", got)
	}
}

func FuzzPutArchive(f *testing.F) {
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, raw []byte) {
		r, err := decompress(bytes.NewReader(raw))
		if err != nil {
			return
		}
		defer r.Close()
		tr := tar.NewReader(io.LimitReader(r, 1<<20))
		for range 100 {
			if _, err := tr.Next(); err != nil {
				return
			}
		}
	})
}

func TestCopyTree(t *testing.T) {
	t.Parallel()
	src, dst := t.TempDir(), t.TempDir()
	for _, d := range []string{"a/b", "c"} {
		if err := os.MkdirAll(filepath.Join(src, d), 0o750); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(src, "a/b/f"), []byte("x"), 0o4711); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(src, "a/b/f"), 0o711|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(filepath.Join(src, "a/b/f"), filepath.Join(src, "c/g")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(src, "l")); err != nil {
		t.Fatal(err)
	}
	open := func(p string) *os.File {
		f, err := os.Open(p)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	if err := copyTree(context.Background(), open(src), open(dst)); err != nil {
		t.Fatal(err)
	}
	fi, err := os.Lstat(filepath.Join(dst, "a/b/f"))
	if err != nil || fi.Mode() != 0o711|os.ModeSetuid {
		t.Errorf("%v %v", fi, err)
	}
	gi, err := os.Lstat(filepath.Join(dst, "c/g"))
	if err != nil || !os.SameFile(fi, gi) {
		t.Errorf("hard link: %v", err)
	}
	if l, err := os.Readlink(filepath.Join(dst, "l")); err != nil || l != "/etc/passwd" {
		t.Errorf("%s %v", l, err)
	}
	if size, err := treeSize(dst); err != nil || size < 1 {
		t.Errorf("size %d, %v", size, err)
	}
}
