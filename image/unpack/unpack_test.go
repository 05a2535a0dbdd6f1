//go:build linux

package unpack

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skipf("needs root: %s makes devices, owners and trusted attributes", t.Name())
	}
}

// member is an entry of a layer under test.
type member struct {
	tar.Header
	body string
}

func reg(name, body string) member {
	return member{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(body))}, body}
}

func folder(name string, mode int64) member {
	return member{Header: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode}}
}

func sym(name, target string) member {
	return member{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
}

func hard(name, target string) member {
	return member{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644}}
}

func dev(typ byte, name string, major, minor int64) member {
	return member{Header: tar.Header{Typeflag: typ, Name: name, Mode: 0o600, Devmajor: major, Devminor: minor}}
}

func (m member) with(change func(*tar.Header)) member {
	change(&m.Header)
	return m
}

func xattr(name, value string) func(*tar.Header) {
	return func(h *tar.Header) { h.PAXRecords = map[string]string{xattrPrefix + name: value} }
}

func pack(t testing.TB, members ...member) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, m := range members {
		h := m.Header
		if h.Format == tar.FormatUnknown && len(h.PAXRecords) > 0 {
			h.Format = tar.FormatPAX
		}
		if h.ModTime.IsZero() {
			h.ModTime = time.Unix(1_700_000_000, 0)
		}
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatalf("%q: %v", h.Name, err)
		}
		if _, err := io.WriteString(tw, m.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// raw makes a header that archive/tar's writer would refuse.
func raw(name, linkname string, typ byte, size int64) []byte {
	b := make([]byte, 512)
	copy(b[0:100], name)
	copy(b[100:], "0000644\x00")
	copy(b[108:], "0000000\x000000000\x00")
	copy(b[124:], fmt.Sprintf("%011o\x00", size))
	copy(b[136:], "14523537000\x00")
	b[156] = typ
	copy(b[157:257], linkname)
	copy(b[257:], "ustar\x0000")
	return sealed(b)
}

// sealed sets a header's checksum.
func sealed(b []byte) []byte {
	copy(b[148:156], "        ")
	sum := 0
	for _, c := range b[:512] {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

var end = make([]byte, 1024)

// apply unpacks into a fresh directory below base.
func apply(t testing.TB, o Options, root string, stream []byte) (Result, error) {
	t.Helper()
	if err := os.MkdirAll(root, 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return Apply(context.Background(), f, bytes.NewReader(stream), o)
}

// fingerprint describes a tree: names, types, modes, owners, times, contents.
func fingerprint(t testing.TB, root string) string {
	t.Helper()
	var out strings.Builder
	err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		fmt.Fprintf(&out, "%s %o %d:%d %d %d %d", strings.TrimPrefix(p, root), st.Mode, st.Uid, st.Gid, st.Mtim.Nano(), st.Nlink, st.Rdev)
		switch {
		case e.Type().IsRegular():
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			fmt.Fprintf(&out, " %x", sha256.Sum256(b))
		case e.Type()&fs.ModeSymlink != 0:
			l, err := os.Readlink(p)
			if err != nil {
				return err
			}
			out.WriteString(" -> " + l)
		}
		var x [256]byte
		if n, err := unix.Llistxattr(p, x[:]); err == nil && n > 0 {
			names := strings.Split(strings.Trim(string(x[:n]), "\x00"), "\x00")
			slices.Sort(names)
			fmt.Fprintf(&out, " %q", names)
		}
		out.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestApply(t *testing.T) {
	needRoot(t)
	t.Parallel()
	long := strings.Repeat("long-name/", 30) + strings.Repeat("x", 200)
	mtime := time.Unix(1_234_567_890, 123_456_789)
	root := filepath.Join(t.TempDir(), "root")
	res, err := apply(t, Options{Mode: Diff, Writeback: true}, root, pack(t,
		folder("./", 0o751),
		folder("dir/", 0o2775).with(func(h *tar.Header) { h.Uid, h.Gid, h.ModTime, h.Format = 12, 34, mtime, tar.FormatPAX }),
		reg("dir/file", "contents").with(func(h *tar.Header) { h.Mode, h.Uid, h.ModTime, h.Format = 0o4755, 77, mtime, tar.FormatPAX }),
		hard("dir/hard", "dir/file"),
		sym("dir/sym", "../etc/passwd").with(func(h *tar.Header) { h.Uid = 5 }),
		dev(tar.TypeChar, "null", 1, 3),
		dev(tar.TypeBlock, "sda", 8, 0),
		member{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "fifo", Mode: 0o622}},
		reg(long, "deep"),
		reg("big-uid", "").with(func(h *tar.Header) { h.Uid, h.Format = 4_000_000_000, tar.FormatGNU }),
		reg("world", "w").with(func(h *tar.Header) { h.Mode = 0o666 }),
		reg("cap", "c").with(xattr("security.capability", "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")),
		reg("attr", "a").with(xattr("user.note", "hello")),
		reg("label", "l").with(xattr("security.selinux", "system_u:object_r:x:s0")),
		reg(".wh.removed", ""),
		reg("dir/.wh..wh.opq", ""),
		reg(".wh..wh.plnk", ""),
		reg("/absolute", "inside"),
	))
	if err != nil {
		t.Fatal(err)
	}
	if want := int64(len("contents") + len("deep") + len("w") + len("cal") + len("inside")); res.Size != want {
		t.Errorf("size %d, want %d", res.Size, want)
	}
	stat := func(name string) (st unix.Stat_t) {
		t.Helper()
		if err := unix.Lstat(filepath.Join(root, name), &st); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		return st
	}
	if st := stat("."); st.Mode&0o7777 != 0o751 {
		t.Errorf("root has mode %o", st.Mode)
	}
	if st := stat("dir"); st.Mode&0o7777 != 0o2775 || st.Uid != 12 || st.Gid != 34 || st.Mtim.Nano() != mtime.UnixNano() {
		t.Errorf("dir: %o %d:%d %v", st.Mode, st.Uid, st.Gid, st.Mtim)
	}
	st := stat("dir/file")
	if st.Mode&0o7777 != 0o4755 || st.Uid != 77 || st.Mtim.Nano() != mtime.UnixNano() || st.Nlink != 2 {
		t.Errorf("file: %o uid %d links %d %v", st.Mode, st.Uid, st.Nlink, st.Mtim)
	}
	if h := stat("dir/hard"); h.Ino != st.Ino {
		t.Error("hard link is another file")
	}
	if st := stat("dir/sym"); st.Mode&unix.S_IFMT != unix.S_IFLNK || st.Uid != 5 {
		t.Errorf("sym: %o uid %d", st.Mode, st.Uid)
	}
	if st := stat("null"); st.Mode != unix.S_IFCHR|0o600 || st.Rdev != unix.Mkdev(1, 3) {
		t.Errorf("null: %o %d", st.Mode, st.Rdev)
	}
	if st := stat("sda"); st.Mode != unix.S_IFBLK|0o600 || st.Rdev != unix.Mkdev(8, 0) {
		t.Errorf("sda: %o %d", st.Mode, st.Rdev)
	}
	if st := stat("fifo"); st.Mode != unix.S_IFIFO|0o622 {
		t.Errorf("fifo: %o", st.Mode)
	}
	if st := stat("big-uid"); st.Uid != 4_000_000_000 {
		t.Errorf("uid %d", st.Uid)
	}
	if st := stat("world"); st.Mode&0o7777 != 0o666 {
		t.Errorf("world: %o", st.Mode)
	}
	if st := stat("removed"); !isWhiteout(&st) {
		t.Errorf("removed: %o %d", st.Mode, st.Rdev)
	}
	for name, want := range map[string]string{"cap\x00security.capability": "\x01\x00\x00\x02\x00\x04", "attr\x00user.note": "hello", "dir\x00" + opaqueXattr: "y"} {
		file, attr, _ := strings.Cut(name, "\x00")
		b := make([]byte, 64)
		n, err := unix.Lgetxattr(filepath.Join(root, file), attr, b)
		if err != nil || !strings.HasPrefix(string(b[:n]), want) {
			t.Errorf("%s %s is %q (%v)", file, attr, b[:max(n, 0)], err)
		}
	}
	if b, err := os.ReadFile(filepath.Join(root, long)); err != nil || string(b) != "deep" {
		t.Errorf("long name: %q %v", b, err)
	}
	if _, err := os.Lstat(filepath.Join(root, ".wh..wh.plnk")); !os.IsNotExist(err) {
		t.Errorf("aufs bookkeeping was unpacked: %v", err)
	}
	if len(res.Implicit) != 30 || res.Implicit[0] != "long-name" {
		t.Errorf("implicit: %q", res.Implicit)
	}
}

// TestSparse makes both of GNU's forms, and looks for the holes.
func TestSparse(t *testing.T) {
	needRoot(t)
	t.Parallel()
	const size = 64 << 20
	// PAX 1.0: the map comes first in the data (GNU tar manual, "PAX Format, Version 1.0").
	m := fmt.Sprintf("2\n0\n5\n%d\n3\n", size-3)
	body := m + strings.Repeat("\x00", 512-len(m)) + "start" + "end"
	var b bytes.Buffer
	pax := "22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n" + record("GNU.sparse.name", "sparse") + record("GNU.sparse.realsize", fmt.Sprint(size))
	b.Write(raw("PaxHeaders/x", "", 'x', int64(len(pax))))
	b.WriteString(pax + strings.Repeat("\x00", 512-len(pax)%512))
	b.Write(raw("GNUSparseFile/x", "", '0', int64(len(body))))
	b.WriteString(body + strings.Repeat("\x00", 512-len(body)%512))
	b.Write(end)
	root := filepath.Join(t.TempDir(), "root")
	if _, err := apply(t, Options{Mode: Base}, root, b.Bytes()); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(root, "sparse")
	var st unix.Stat_t
	if err := unix.Lstat(name, &st); err != nil {
		t.Fatal(err)
	}
	if st.Size != size || st.Blocks*512 > 1<<20 {
		t.Errorf("size %d in %d blocks", st.Size, st.Blocks)
	}
	got, err := os.ReadFile(name)
	if err != nil || !bytes.HasPrefix(got, []byte("start")) || !bytes.HasSuffix(got, []byte("end")) || !isZero(got[5:size-3]) {
		t.Errorf("contents are wrong (%v)", err)
	}
}

// record is a PAX record with its length.
func record(k, v string) string {
	n := len(k) + len(v) + 3
	for n != len(fmt.Sprintf("%d %s=%s\n", n, k, v)) {
		n++
	}
	return fmt.Sprintf("%d %s=%s\n", n, k, v)
}

// TestMerged applies a layer to a tree that shows those below.
func TestMerged(t *testing.T) {
	needRoot(t)
	t.Parallel()
	root := filepath.Join(t.TempDir(), "root")
	if _, err := apply(t, Options{Mode: Base}, root, pack(t,
		folder("usr", 0o755), folder("usr/bin", 0o755), sym("bin", "usr/bin"),
		folder("a", 0o755), reg("a/1", "1"), reg("a/2", "2"), folder("a/sub", 0o755), reg("a/sub/x", "x"),
		folder("b", 0o755), reg("b/1", "1"), reg("file", "old"), folder("dir", 0o755), reg("dir/in", "in"),
	)); err != nil {
		t.Fatal(err)
	}
	if _, err := apply(t, Options{Mode: Merged}, root, pack(t,
		reg("bin/tool", "tool"),
		reg("a/new", "new"), reg("a/.wh..wh.opq", ""), folder("a/sub", 0o700), reg("a/sub/y", "y"),
		reg("b/.wh.1", ""), reg("b/1", "again"), reg("b/.wh.nothing", ""),
		folder("file", 0o755), reg("dir", "now a file"),
		hard("linked", "usr/bin/tool"),
	)); err != nil {
		t.Fatal(err)
	}
	var got []string
	if err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if p != root {
			got = append(got, strings.TrimPrefix(p, root+"/"))
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	want := []string{"a", "a/new", "a/sub", "a/sub/y", "b", "b/1", "bin", "dir", "file", "linked", "usr", "usr/bin", "usr/bin/tool"}
	if !slices.Equal(got, want) {
		t.Errorf("tree is %q", got)
	}
	if b, err := os.ReadFile(filepath.Join(root, "b/1")); err != nil || string(b) != "again" {
		t.Errorf("b/1 is %q (%v)", b, err)
	}
}

func TestNeedsParent(t *testing.T) {
	needRoot(t)
	t.Parallel()
	for name, members := range map[string][]member{
		"hard link below":        {hard("new", "old")},
		"hard link in dir below": {hard("new", "dir/old")},
		"link to dir below":      {sym("lib", "usr/lib"), reg("lib/x", "x")},
		"opaque root":            {reg(".wh..wh.opq", "")},
	} {
		_, err := apply(t, Options{Mode: Diff}, filepath.Join(t.TempDir(), "root"), pack(t, members...))
		if !errors.Is(err, ErrNeedsParent) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestInherit(t *testing.T) {
	needRoot(t)
	t.Parallel()
	base := t.TempDir()
	open := func(name string, members ...member) *os.File {
		dir := filepath.Join(base, name)
		if _, err := apply(t, Options{Mode: Diff}, dir, pack(t, members...)); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	low := open("low", folder("a", 0o700).with(func(h *tar.Header) { h.Uid = 7 }), folder("a/b", 0o711), folder("c", 0o711), folder("d", 0o711), folder("d/e", 0o701), sym("s", "a"))
	mid := open("mid", folder("a", 0o750).with(func(h *tar.Header) { h.Uid = 8 }), reg(".wh.c", ""), folder("d", 0o755), reg("d/.wh..wh.opq", ""))
	res, err := apply(t, Options{Mode: Diff}, filepath.Join(base, "top"), pack(t, reg("a/b/x", ""), reg("c/x", ""), reg("d/e/x", "")))
	if err != nil {
		t.Fatal(err)
	}
	top, err := os.Open(filepath.Join(base, "top"))
	if err != nil {
		t.Fatal(err)
	}
	defer top.Close()
	if err := Inherit(top, res.Implicit, []*os.File{mid, low}); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string][2]uint32{"a": {0o750, 8}, "a/b": {0o711, 0}, "c": {0o755, 0}, "d": {0o755, 0}, "d/e": {0o755, 0}} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(base, "top", name), &st); err != nil || st.Mode&0o7777 != want[0] || st.Uid != want[1] {
			t.Errorf("%s: %o uid %d (%v), want %o uid %d", name, st.Mode&0o7777, st.Uid, err, want[0], want[1])
		}
	}
	if err := Inherit(top, []string{"s"}, []*os.File{mid, low}); !errors.Is(err, ErrNeedsParent) {
		t.Errorf("directory over a link: %v", err)
	}
}
