//go:build linux

package unpack

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/erofs"
)

// cut hands out a stream in pieces of n bytes.
type cut struct {
	r io.Reader
	n int
}

func (c *cut) Next() ([]byte, func(), error) {
	b := make([]byte, c.n)
	n, err := c.r.Read(b)
	if n > 0 {
		return b[:n], func() { clear(b) }, nil // nothing may use it afterwards
	}
	return nil, nil, err
}

// makeImage makes an image of a stream and mounts it.
func makeImage(t testing.TB, o Options, stream []byte, piece int) (root string, r ImageResult, err error) {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err = Image(context.Background(), f, &cut{bytes.NewReader(stream), piece}, o)
	if err != nil {
		return "", r, err
	}
	verify(t, f)
	return mountImage(t, name), r, nil
}

// verify compares an image with what was noted while it was written.
func verify(t testing.TB, f *os.File) {
	t.Helper()
	st, err := f.Stat()
	if err == nil {
		err = erofs.Verify(f, st.Size())
	}
	if err != nil {
		t.Fatal(err)
	}
}

func mountImage(t testing.TB, name string) string {
	t.Helper()
	m, err := erofs.Mount(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return fmt.Sprintf("/proc/self/fd/%d/", m.Fd())
}

func needErofs(t testing.TB) {
	t.Helper()
	needRoot(t)
	if err := erofs.Supported(t.TempDir()); err != nil {
		t.Skipf("needs a kernel with EROFS: %s (%v)", t.Name(), err)
	}
}

// same compares an image with the directory that Apply made, but for the times of directories
// and whiteouts that the layer does not describe: the image has none.
func same(t testing.TB, dir, image string) {
	t.Helper()
	lines := func(root string) (out []string) {
		for line := range strings.Lines(fingerprint(t, root)) {
			out = append(out, "/"+strings.TrimLeft(line, "/"))
		}
		return out
	}
	a, b := lines(dir), lines(image)
	for i := range max(len(a), len(b)) {
		if i >= len(a) {
			t.Fatalf("the image has more: %s", b[i])
		}
		if i >= len(b) {
			t.Fatalf("the image lacks: %s", a[i])
		}
		x, y := strings.SplitN(a[i], " ", 5), strings.SplitN(b[i], " ", 5)
		if y[3] == "0" && (strings.HasPrefix(y[1], "4") || strings.HasPrefix(y[1], "2000")) {
			x[3] = "0"
		}
		if !slices.Equal(x, y) {
			t.Fatalf("directory: %s\nimage:     %s", a[i], b[i])
		}
	}
}

// TestImageIsLikeDirectory makes directories and images of the same layers.
func TestImageIsLikeDirectory(t *testing.T) {
	needErofs(t)
	t.Parallel()
	var many []member
	for i := range 3000 {
		many = append(many, reg(fmt.Sprintf("many/%0*d", 1+i%200, i), strings.Repeat("x", i)))
	}
	r := rand.New(rand.NewSource(1))
	big := make([]byte, 3<<20+17)
	r.Read(big)
	layers := map[string][]byte{
		"empty": pack(t),
		"many":  pack(t, many...),
		"all": pack(t,
			folder("./", 0o751), folder("dir/", 0o2775).with(func(h *tar.Header) { h.Uid, h.Gid = 12, 34 }),
			reg("dir/file", "contents").with(func(h *tar.Header) { h.Mode, h.Uid, h.Gid = 0o6755, 77, 1<<30 }),
			reg("dir/.first", ""), reg("dir/!", "before the dots"), reg("big", string(big)), reg("dir/after", "big"),
			hard("dir/hard", "dir/file"), hard("hard", "dir/hard"), sym("dir/sym", "../etc/passwd"),
			sym("long", strings.Repeat("a/", 2000)), sym("longer", strings.Repeat("b/", 2047)+"x"),
			dev(tar.TypeChar, "null", 1, 3), dev(tar.TypeBlock, "sda", 259, 70000),
			member{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "fifo", Mode: 0o622}},
			reg("cap", "c").with(xattr("security.capability", "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")),
			reg("attr", "a").with(func(h *tar.Header) {
				h.PAXRecords = map[string]string{xattrPrefix + "user.a": "1", xattrPrefix + "user.big": strings.Repeat("v", 3000), xattrPrefix + "user.empty": ""}
			}),
			folder("attrs", 0o700).with(xattr("user.x", "y")), reg("attrs/in", ""),
			reg("old", "").with(func(h *tar.Header) { h.ModTime, h.Format = time.Unix(-5, 5), tar.FormatPAX }),
			reg(strings.Repeat("n", 255), ""), reg("implicit/below/file", "f")),
		"replaced": pack(t, reg("a", "1"), folder("a", 0o755), reg("a/b", "2"), reg("a", "3"), folder("d", 0o700), reg("d/x", "x"), folder("d", 0o711), sym("d/x", "y"), reg("implicit/x", ""), reg("implicit", "file")),
		"linked":   pack(t, folder("usr", 0o755), folder("usr/lib", 0o755), sym("lib", "usr/lib"), reg("lib/x", "x"), reg("lib/new/x", "y"), sym("up", "usr/../usr/lib/.."), reg("up/z", "z"), hard("hard", "lib/x")),
		"removed":  pack(t, reg(".wh.gone", ""), reg("d/.wh..wh.opq", ""), reg("d/x", ""), folder("e", 0o755), reg(".wh.e", ""), reg(".wh.f", ""), folder("f", 0o755), reg(".wh.g", ""), reg("g", "again")),
	}
	for name, stream := range layers {
		for _, mode := range []Mode{Diff, Base} {
			for _, piece := range []int{1 << 17, 777} {
				t.Run(fmt.Sprintf("%s/%d/%d", name, mode, piece), func(t *testing.T) {
					dir := filepath.Join(t.TempDir(), "dir")
					want, err := apply(t, Options{Mode: mode}, dir, stream)
					if err != nil {
						t.Fatal(err)
					}
					image, r, err := makeImage(t, Options{Mode: mode, Writeback: true}, stream, piece)
					if err != nil {
						t.Fatal(err)
					}
					same(t, dir, image)
					if r.Size != want.Size || r.Entries != want.Entries {
						t.Errorf("%d bytes in %d entries, of the directory %d in %d", r.Size, r.Entries, want.Size, want.Entries)
					}
				})
			}
		}
	}
}

func TestImageHostile(t *testing.T) {
	needErofs(t)
	t.Parallel()
	canary := filepath.Join(t.TempDir(), "canary")
	for _, c := range corpus(t, canary, strings.Repeat("../", 30)+canary[1:]) {
		for name, mode := range map[string]Mode{"diff": Diff, "base": Base} {
			t.Run(c.name+"/"+name, func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "dir")
				_, derr := apply(t, Options{Mode: mode, Limits: c.limits}, dir, c.stream)
				image, _, err := makeImage(t, Options{Mode: mode, Limits: c.limits}, c.stream, 4000)
				want := c.want
				if mode == Base && want == parent {
					want = c.otherwise
				}
				checkOutcome(t, want, err)
				if (err == nil) != (derr == nil) {
					t.Fatalf("directory: %v, image: %v", derr, err)
				}
				if err == nil {
					same(t, dir, image)
				}
			})
		}
	}
}

func TestImageSparse(t *testing.T) {
	needErofs(t)
	t.Parallel()
	const size = 1 << 30
	m := fmt.Sprintf("3\n0\n5\n%d\n7\n%d\n3\n", 99<<20, size-3)
	body := m + strings.Repeat("\x00", 512-len(m)) + "start" + "between" + "end"
	var b bytes.Buffer
	pax := "22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n" + record("GNU.sparse.name", "sparse") + record("GNU.sparse.realsize", fmt.Sprint(size))
	b.Write(raw("PaxHeaders/x", "", 'x', int64(len(pax))))
	b.WriteString(pax + strings.Repeat("\x00", 512-len(pax)%512))
	b.Write(raw("GNUSparseFile/x", "", '0', int64(len(body))))
	b.WriteString(body + strings.Repeat("\x00", 512-len(body)%512))
	b.Write(pack(t, reg("behind", "it")))
	root, r, err := makeImage(t, Options{Mode: Base}, b.Bytes(), 5000)
	if err != nil {
		t.Fatal(err)
	}
	if r.Disk > 1<<20 {
		t.Errorf("the image takes %d bytes", r.Disk)
	}
	f, err := os.Open(root + "sparse")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for at, want := range map[int64]string{0: "start\x00", 99<<20 - 1: "\x00between\x00", size - 4: "\x00end", 50 << 20: "\x00\x00"} {
		got := make([]byte, len(want))
		if _, err := f.ReadAt(got, at); err != nil || string(got) != want {
			t.Errorf("at %d: %q (%v)", at, got, err)
		}
	}
	if at, err := f.Seek(1<<20, 3); err != nil || at < 98<<20 || at > 99<<20 { // SEEK_DATA
		t.Errorf("data begin at %d (%v)", at, err)
	}
	if b, err := os.ReadFile(root + "behind"); err != nil || string(b) != "it" {
		t.Errorf("the file behind: %q (%v)", b, err)
	}
}

func TestInheritImage(t *testing.T) {
	needErofs(t)
	t.Parallel()
	low := filepath.Join(t.TempDir(), "low")
	if _, err := apply(t, Options{Mode: Base}, low, pack(t, folder("d", 0o2750).with(func(h *tar.Header) { h.Uid, h.Gid = 5, 6 }), folder("d/e", 0o700), folder("x", 0o755).with(xattr("user.a", "b")))); err != nil {
		t.Fatal(err)
	}
	lower, err := os.Open(low)
	if err != nil {
		t.Fatal(err)
	}
	defer lower.Close()
	inherit := func(members ...member) (string, error) {
		name := filepath.Join(t.TempDir(), "image")
		f, err := os.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		r, err := Image(context.Background(), f, &cut{bytes.NewReader(pack(t, members...)), 10000}, Options{Mode: Diff})
		if err != nil {
			t.Fatal(err)
		}
		if err := InheritImage(f, r, []*os.File{lower}); err != nil {
			return name, err
		}
		verify(t, f)
		return name, nil
	}
	name, err := inherit(reg("d/e/f", "x"), reg("d/new/g", "y"), reg("gone/x", ""), reg("gone", "a file now"))
	if err != nil {
		t.Fatal(err)
	}
	root := mountImage(t, name)
	var st unix.Stat_t
	for name, want := range map[string][3]uint32{"d": {0o2750, 5, 6}, "d/e": {0o700, 0, 0}, "d/new": {0o755, 0, 0}} {
		if err := unix.Lstat(root+name, &st); err != nil || st.Mode&0o7777 != want[0] || st.Uid != want[1] || st.Gid != want[2] {
			t.Errorf("%s: %o %d:%d (%v)", name, st.Mode, st.Uid, st.Gid, err)
		}
	}
	if b, err := os.ReadFile(root + "d/e/f"); err != nil || string(b) != "x" {
		t.Errorf("%q (%v)", b, err)
	}
	for what, m := range map[string][]member{
		"attributes": {reg("x/y", "")},
		"a link":     {folder("o", 0o755), sym("d", "o"), reg("d/e/f", "")},
	} {
		if _, err := inherit(m...); !errors.Is(err, ErrNeedsParent) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// FuzzImage compares what the kernel shows of an image with what Apply does.
func FuzzImage(f *testing.F) {
	needErofs(f)
	f.Add(pack(f, folder("a", 0o755), reg("a/b", "x"), sym("a/c", "/"), hard("a/d", "a/b"), reg("a/.wh.x", ""), dev(tar.TypeChar, "n", 1, 3)), uint8(0), uint16(100))
	f.Add(pack(f, sym("l", "a/../b"), folder("b", 0o755), reg("l/x", "y"), reg("b/.wh..wh.opq", "")), uint8(0), uint16(512))
	f.Add(sparsePax("1\n0\n5\n"), uint8(1), uint16(9))
	f.Fuzz(func(t *testing.T, stream []byte, mode uint8, piece uint16) {
		dir := filepath.Join(t.TempDir(), "dir")
		o := Options{Mode: Mode(mode % 2), Limits: Limits{Size: 1 << 20, Entries: 1000}}
		_, derr := apply(t, o, dir, stream)
		image, _, err := makeImage(t, o, stream, int(piece)+1)
		if err != nil && !errdefs.IsInvalidArgument(err) && !errdefs.IsResourceExhausted(err) && !errors.Is(err, ErrNeedsParent) {
			t.Errorf("error without class: %v", err)
		}
		if (err == nil) != (derr == nil) {
			t.Fatalf("directory: %v, image: %v", derr, err)
		}
		if err == nil {
			same(t, dir, image)
		}
	})
}
