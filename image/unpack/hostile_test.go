//go:build linux

package unpack

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// outcome of a hostile layer.
type outcome int

const (
	refusedOutcome outcome = iota // errdefs.ErrInvalidArgument
	exhausted                     // errdefs.ErrResourceExhausted
	confined                      // unpacked, all of it inside the root
	either                        // refused or confined, by the kernel's limits
	parent                        // ErrNeedsParent
)

// TestHostile unpacks layers that try to reach, or wear out, what is outside. Each runs
// as Diff and as Merged; a tree beside the root must not change by a bit.
func TestHostile(t *testing.T) {
	needRoot(t)
	t.Parallel()
	canary := filepath.Join(t.TempDir(), "canary")
	makeCanary(t, canary)
	before := fingerprint(t, canary)
	abs := canary
	up := strings.Repeat("../", 30) + strings.TrimPrefix(canary, "/")
	for _, c := range corpus(t, abs, up) {
		modes := map[string]Mode{"diff": Diff, "merged": Merged, "base": Base}
		for name, mode := range modes {
			t.Run(c.name+"/"+name, func(t *testing.T) {
				// Beside the canary, so that ../canary would find it.
				root := filepath.Join(filepath.Dir(canary), strings.NewReplacer(" ", "-", "/", "-").Replace(t.Name()))
				_, err := apply(t, Options{Mode: mode, Limits: c.limits}, root, c.stream)
				want := c.want
				if mode != Diff && want == parent {
					want = c.otherwise
				}
				checkOutcome(t, want, err)
				if after := fingerprint(t, canary); after != before {
					t.Fatalf("canary changed:\n%s\nwas:\n%s", after, before)
				}
				if err := os.RemoveAll(root); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}

func checkOutcome(t *testing.T, want outcome, err error) {
	t.Helper()
	ok := false
	switch want {
	case refusedOutcome:
		ok = errdefs.IsInvalidArgument(err)
	case exhausted:
		ok = errdefs.IsResourceExhausted(err)
	case confined:
		ok = err == nil
	case either:
		ok = err == nil || errdefs.IsInvalidArgument(err)
	case parent:
		ok = errors.Is(err, ErrNeedsParent)
	}
	if !ok {
		t.Errorf("outcome is %v", err)
	}
}

func makeCanary(t *testing.T, dir string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, "sub"), 0o750); err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{"file", "sub/file"} {
		if err := os.WriteFile(filepath.Join(dir, n), []byte("canary"), 0o640); err != nil {
			t.Fatal(err)
		}
	}
}

type hostile struct {
	name      string
	stream    []byte
	want      outcome
	otherwise outcome // in the modes in which ErrNeedsParent cannot be
	limits    Limits
}

func corpus(t *testing.T, abs, up string) []hostile {
	p := func(members ...member) []byte { return pack(t, members...) }
	mode := func(m int64) func(*tar.Header) { return func(h *tar.Header) { h.Mode = m } }
	cat := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	good := p(reg("ok", "ok"))
	return []hostile{
		{name: "dotdot", stream: cat(raw("../canary/file", "", '0', 0), end)},
		{name: "dotdot deep", stream: cat(raw("a/../../canary/file", "", '0', 0), end)},
		{name: "dotdot inside", stream: cat(raw("a/../b", "", '0', 0), end)},
		{name: "dotdot last", stream: cat(raw("a/..", "", '5', 0), end)},
		{name: "dotdot only", stream: cat(raw("..", "", '5', 0), end)},
		{name: "dotdot dir", stream: cat(raw("../", "", '5', 0), end)},
		{name: "dotdot many", stream: cat(raw(up[:min(99, len(up))], "", '0', 0), end)},
		{name: "dotdot pax", stream: paxNamed("../canary/file")},
		{name: "absolute file", stream: p(reg(abs+"/file", "evil")), want: confined},
		{name: "absolute dir", stream: p(folder(abs, 0o777)), want: confined},
		{name: "absolute slashes", stream: p(reg("//"+abs+"/file", "evil")), want: confined},
		{name: "nul pax", stream: paxNamed("a\x00b")},
		{name: "name too long", stream: p(reg(strings.Repeat("a", 300), "")), want: refusedOutcome},
		{name: "path too long", stream: p(reg(strings.Repeat("a/", 3000)+"x", "")), want: refusedOutcome},
		{name: "path deep", stream: p(reg(strings.Repeat("a/", 2000)+"x", "")), want: either},
		{name: "root as file", stream: cat(raw(".", "", '0', 0), end), want: refusedOutcome},
		{name: "root as link", stream: p(sym(".", abs)), want: refusedOutcome},
		{name: "empty name", stream: cat(raw("", "", '0', 0), end), want: refusedOutcome},

		{name: "link then write", stream: p(sym("l", abs), reg("l/file", "evil")), want: parent, otherwise: refusedOutcome},
		{name: "relative link then write", stream: p(sym("l", "../canary"), reg("l/file", "evil")), want: parent, otherwise: refusedOutcome},
		{name: "climbing link then write", stream: p(sym("l", up), reg("l/file", "evil")), want: parent, otherwise: refusedOutcome},
		{name: "link to root then write", stream: p(sym("l", "/"), reg("l/file", "inside")), want: confined},
		{name: "link to dotdot then write", stream: p(sym("l", "../../.."), reg("l/file", "inside")), want: confined},
		{name: "link chain", stream: p(sym("a", "b"), sym("b", "c"), sym("c", abs), reg("a/file", "evil")), want: parent, otherwise: refusedOutcome},
		{name: "link loop", stream: p(sym("a", "b"), sym("b", "a"), reg("a/file", "evil")), want: refusedOutcome},
		{name: "link to itself", stream: p(sym("a", "a"), reg("a/file", "evil")), want: refusedOutcome},
		{name: "file over link", stream: p(sym("l", abs+"/file"), reg("l", "evil")), want: confined},
		{name: "dir over link", stream: p(sym("l", abs), folder("l", 0o777), reg("l/file", "evil")), want: confined},
		{name: "dir mode through link", stream: p(sym("l", abs), folder("l/", 0o777)), want: confined},
		{name: "dir mode through link below", stream: p(sym("l", filepath.Dir(abs)), folder("l/canary", 0o777)), want: parent, otherwise: refusedOutcome},
		{name: "link over link", stream: p(sym("l", abs), sym("l", abs+"/sub"), reg("l/file", "evil")), want: parent, otherwise: refusedOutcome},
		{name: "link over dir then write", stream: p(folder("d", 0o755), reg("d/x", ""), sym("d", abs), reg("d/file", "evil")), want: parent, otherwise: refusedOutcome},
		{name: "link over cached dir", stream: p(folder("d", 0o755), folder("d/sub", 0o755), reg("d/sub/a", ""), sym("d", abs), reg("d/sub/file", "evil")), want: parent, otherwise: refusedOutcome},
		{name: "proc link", stream: p(sym("l", "/proc/self/root"+abs), reg("l/file", "evil")), want: parent, otherwise: refusedOutcome},
		{name: "proc fd link", stream: p(sym("l", "/proc/self/cwd"), reg("l/file", "evil")), want: parent, otherwise: refusedOutcome},
		{name: "empty link", stream: cat(raw("l", "", '2', 0), end), want: refusedOutcome},

		{name: "hard link absolute", stream: p(hard("h", abs+"/file"), reg("h", "evil")), want: parent, otherwise: refusedOutcome},
		{name: "hard link dotdot", stream: p(hard("h", "../canary/file")), want: refusedOutcome},
		{name: "hard link climbing", stream: p(hard("h", up+"/file")), want: refusedOutcome},
		{name: "hard link through link", stream: p(sym("l", abs), hard("h", "l/file"), reg("h", "evil")), want: parent, otherwise: refusedOutcome},
		{name: "hard link to link", stream: p(sym("l", abs+"/file"), hard("h", "l"), reg("h", "evil")), want: confined},
		{name: "hard link to link then chmod", stream: p(sym("l", abs+"/file"), hard("h", "l"), folder("h", 0o777)), want: confined},
		{name: "hard link to link, attributes", stream: p(sym("l", abs+"/file"), hard("h", "l").with(mode(0o6777)).with(xattr("user.x", "y"))), want: confined},
		{name: "hard link to dir", stream: p(folder("d", 0o755), hard("h", "d")), want: refusedOutcome},
		{name: "hard link to root", stream: p(hard("h", "/")), want: refusedOutcome},
		{name: "hard link to itself", stream: p(reg("h", "x"), hard("h", "h")), want: refusedOutcome},
		{name: "hard link over its dir", stream: p(folder("d", 0o755), reg("d/f", "x"), hard("d", "d/f")), want: refusedOutcome},
		{name: "hard link below itself", stream: p(reg("f", "x"), hard("f/g", "f")), want: refusedOutcome},
		{name: "hard link empty", stream: cat(raw("h", "", '1', 0), end), want: refusedOutcome},

		{name: "whiteout dotdot", stream: p(reg(".wh...", "")), want: refusedOutcome},
		{name: "whiteout dot", stream: p(reg(".wh..", "")), want: refusedOutcome},
		{name: "whiteout nothing", stream: p(reg(".wh.", "")), want: refusedOutcome},
		{name: "whiteout dotdot below", stream: p(folder("d", 0o755), reg("d/.wh...", "")), want: refusedOutcome},
		{name: "whiteout in dotdot", stream: cat(raw("../canary/.wh.file", "", '0', 0), end), want: refusedOutcome},
		{name: "whiteout through link", stream: p(sym("l", abs), reg("l/.wh.file", "")), want: parent, otherwise: either},
		{name: "opaque through link", stream: p(sym("l", abs), reg("l/.wh..wh.opq", "")), want: parent, otherwise: either},
		{name: "whiteout as link", stream: p(sym(".wh.x", abs), reg("x/file", "evil")), want: either},
		{name: "whiteout as dir", stream: p(folder(".wh.x", 0o777)), want: confined},
		{name: "opaque as link", stream: p(folder("d", 0o755), sym("d/.wh..wh.opq", abs)), want: confined},
		{name: "whiteout then hard link", stream: p(reg(".wh.x", ""), hard("h", "x")), want: either, otherwise: refusedOutcome},
		{name: "whiteout device", stream: p(dev(tar.TypeChar, "x", 0, 0)), want: refusedOutcome},
		{name: "whiteout of a link", stream: p(sym("l", abs), reg(".wh.l", "")), want: confined},
		{name: "whiteout twice", stream: p(reg(".wh.x", ""), reg(".wh.x", ""), folder("x", 0o755), reg("x/y", "")), want: confined},

		{name: "overlay opaque attribute", stream: p(folder("d", 0o755).with(xattr("trusted.overlay.opaque", "y"))), want: refusedOutcome},
		{name: "overlay redirect attribute", stream: p(folder("d", 0o755).with(xattr("trusted.overlay.redirect", abs))), want: refusedOutcome},
		{name: "overlay metacopy attribute", stream: p(reg("f", "").with(xattr("trusted.overlay.metacopy", ""))), want: refusedOutcome},
		{name: "user overlay attribute", stream: p(folder("d", 0o755).with(xattr("user.overlay.redirect", abs))), want: refusedOutcome},
		{name: "attribute through link", stream: p(sym("l", abs+"/file"), sym("l", abs+"/file").with(xattr("user.x", "y"))), want: confined},
		{name: "attribute without name", stream: p(reg("f", "").with(xattr("user.", "y"))), want: refusedOutcome},
		{name: "attribute too large", stream: p(reg("f", "").with(xattr("user.x", strings.Repeat("y", 100<<10)))), want: either},

		{name: "device number", stream: p(dev(tar.TypeChar, "d", 1<<13, 1)), want: refusedOutcome},
		{name: "device minor", stream: p(dev(tar.TypeBlock, "d", 8, 1<<20)), want: refusedOutcome},
		{name: "device then write", stream: p(dev(tar.TypeBlock, "sda", 8, 0), reg("sda", "evil")), want: confined},
		{name: "fifo then write", stream: p(member{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "f", Mode: 0o644}}, reg("f", "not blocked")), want: confined},
		{name: "below a fifo", stream: p(member{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "f", Mode: 0o644}}, reg("f/x", "")), want: refusedOutcome},
		{name: "below a file", stream: p(reg("f", ""), reg("f/x", "")), want: refusedOutcome},
		{name: "owner negative", stream: p(reg("f", "").with(func(h *tar.Header) { h.Uid, h.Format = -1, tar.FormatGNU })), want: refusedOutcome},
		{name: "owner too large", stream: p(reg("f", "").with(func(h *tar.Header) { h.Gid, h.Format = 1<<32-1, tar.FormatGNU })), want: refusedOutcome},
		{name: "mode bits", stream: p(reg("f", "").with(mode(0o7777777))), want: confined},
		{name: "time far", stream: p(reg("f", "").with(func(h *tar.Header) { h.ModTime, h.Format = time.Unix(1<<40, 0), tar.FormatGNU })), want: confined},
		{name: "time before", stream: p(reg("f", "").with(func(h *tar.Header) { h.ModTime, h.Format = time.Unix(-1<<40, 0), tar.FormatGNU })), want: confined},
		{name: "unknown type", stream: cat(raw("f", "", 'Z', 0), end), want: refusedOutcome},
		{name: "duplicates", stream: p(reg("f", "1"), folder("f", 0o755), reg("f/g", ""), sym("f", "/"), reg("f", "2"), hard("g", "f"), reg("f", "3")), want: confined},

		{name: "truncated header", stream: good[:300]},
		{name: "truncated body", stream: cat(raw("f", "", '0', 4096), []byte("short"))},
		{name: "no end", stream: good[:1024], want: confined},
		{name: "garbage", stream: []byte(strings.Repeat("garbage!", 1000))},
		{name: "garbage after the end", stream: cat(good, []byte("garbage"))},
		{name: "layer after the end", stream: cat(good, good)},
		{name: "zeros after the end", stream: cat(good, make([]byte, 100<<10)), want: confined},
		{name: "nothing", stream: nil, want: confined},
		{name: "bad checksum", stream: cat(bytes.Replace(good, []byte("ok"), []byte("zz"), 1))},
		{name: "pax size", stream: cat(raw("x", "", 'x', 1<<40), end), want: refusedOutcome},
		{name: "pax nonsense", stream: cat(raw("x", "", 'x', 512), bytes.Repeat([]byte("9"), 512), end)},
		{name: "pax negative size", stream: cat(raw("x", "", 'x', 20), padded("12 size=-99\n"), raw("f", "", '0', 0), end)},
		{name: "long name too long", stream: cat(raw("././@LongLink", "", 'L', 1<<30), end)},
		{name: "sparse map too long", stream: sparsePax("1000000\n" + strings.Repeat("0\n0\n", 200)), want: refusedOutcome},
		{name: "sparse past the end", stream: sparsePax("1\n99999999999\n5\n"), want: refusedOutcome},
		{name: "sparse overlapping", stream: sparsePax("2\n5\n5\n0\n5\n"), want: refusedOutcome},

		{name: "too many entries", stream: p(reg("a", ""), reg("b", ""), reg("c", "")), want: exhausted, limits: Limits{Entries: 2}},
		{name: "too large", stream: p(reg("a", strings.Repeat("x", 100<<10))), want: exhausted, limits: Limits{Size: 64 << 10}},
		{name: "size bomb", stream: cat(raw("f", "", '0', 0o77777777777), []byte("x")), want: exhausted, limits: Limits{Size: 1 << 30}},
		{name: "sparse bomb", stream: sparseGNU(1 << 40), want: exhausted, limits: Limits{Size: 1 << 30}},
		{name: "too many directories", stream: p(folder("aaaaaaaaaaaaaaaa", 0o755), folder("bbbbbbbbbbbbbbb", 0o755)), want: exhausted, limits: Limits{Names: 100}},
		{name: "too many implicit directories", stream: p(reg("a/b/c/d/e/f/g/h/i", "")), want: exhausted, limits: Limits{Names: 100}},
	}
}

func padded(s string) []byte {
	return append([]byte(s), make([]byte, 512-len(s)%512)...)
}

// paxNamed is an empty file whose name is in a PAX record.
func paxNamed(name string) []byte {
	r := record("path", name)
	return bytes.Join([][]byte{raw("x", "", 'x', int64(len(r))), padded(r), raw("f", "", '0', 0), end}, nil)
}

// sparsePax is a sparse file of 10 bytes with a map.
func sparsePax(m string) []byte {
	r := "22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n" + record("GNU.sparse.name", "s") + record("GNU.sparse.realsize", "10")
	body := padded(m)
	return bytes.Join([][]byte{raw("x", "", 'x', int64(len(r))), padded(r), raw("s", "", '0', int64(len(body))), body, end}, nil)
}

// sparseGNU is a file of the old GNU format that is all hole.
func sparseGNU(size int64) []byte {
	b := raw("s", "", 'S', 0)
	copy(b[257:], "ustar  \x00")
	n := size // base-256, as it does not fit into 11 octal digits
	for i := 494; i > 483; i-- {
		b[i] = byte(n)
		n >>= 8
	}
	b[483] |= 0x80
	return append(sealed(b), end...)
}

func TestDecoder(t *testing.T) {
	t.Parallel()
	plain := bytes.Repeat([]byte("0123456789abcdef"), 10_000)
	var gz bytes.Buffer
	z := gzip.NewWriter(&gz)
	_, _ = z.Write(plain)
	_ = z.Close()
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	zs := enc.EncodeAll(plain, nil)
	flip := func(b []byte) []byte { b = bytes.Clone(b); b[len(b)/2] ^= 0xff; return b }
	for _, c := range []struct {
		name   string
		in     []byte
		bad    bool
		kind   Compression
		double bool
	}{
		{name: "plain", in: plain},
		{name: "gzip", in: gz.Bytes(), kind: Gzip},
		{name: "gzip members", in: append(bytes.Clone(gz.Bytes()), gz.Bytes()...), kind: Gzip, double: true},
		{name: "gzip truncated", in: gz.Bytes()[:gz.Len()-10], kind: Gzip, bad: true},
		{name: "gzip garbage after", in: append(bytes.Clone(gz.Bytes()), "garbage"...), kind: Gzip, bad: true},
		{name: "gzip flipped", in: flip(gz.Bytes()), kind: Gzip, bad: true},
		{name: "gzip header only", in: gz.Bytes()[:10], kind: Gzip, bad: true},
		{name: "zstd", in: zs, kind: Zstd},
		{name: "zstd truncated", in: zs[:len(zs)-5], kind: Zstd, bad: true},
		{name: "zstd flipped", in: flip(zs), kind: Zstd, bad: true},
		{name: "zstd garbage after", in: append(bytes.Clone(zs), "garbage"...), kind: Zstd, bad: true},
		{name: "empty", in: nil},
	} {
		d, err := NewDecoder(bytes.NewReader(c.in), Limits{})
		var got []byte
		if err == nil {
			got, err = io.ReadAll(d)
			if d.Compression != c.kind {
				t.Errorf("%s: compression %q", c.name, d.Compression)
			}
			d.Close()
		}
		want := plain
		switch {
		case len(c.in) == 0:
			want = nil
		case c.double:
			want = append(bytes.Clone(plain), plain...)
		}
		if c.bad != (err != nil) || c.bad && !errdefs.IsInvalidArgument(err) || !c.bad && !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", c.name, len(got), err)
		}
	}
}

// TestDecoderPassesErrors keeps errors of the network apart from those of the stream.
func TestDecoderPassesErrors(t *testing.T) {
	t.Parallel()
	var gz bytes.Buffer
	z := gzip.NewWriter(&gz)
	_, _ = z.Write(make([]byte, 1<<20))
	_ = z.Close()
	broken := errors.New("network")
	d, err := NewDecoder(io.MultiReader(bytes.NewReader(gz.Bytes()[:500]), failing{broken}), Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, d); !errors.Is(err, broken) || errdefs.IsInvalidArgument(err) {
		t.Errorf("error is %v", err)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// TestBombs decompresses 10 GiB of zeros, or rather does not.
func TestBombs(t *testing.T) {
	needRoot(t)
	var gz bytes.Buffer
	z := gzip.NewWriter(&gz)
	block := make([]byte, 1<<20)
	for range 64 {
		_, _ = z.Write(block)
	}
	_ = z.Close()
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	zs := enc.EncodeAll(make([]byte, 64<<20), nil)
	for name, unit := range map[string][]byte{"gzip": gz.Bytes(), "zstd": zs} {
		var many []io.Reader
		for range 160 {
			many = append(many, bytes.NewReader(unit))
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		start := time.Now()
		d, err := NewDecoder(io.MultiReader(many...), Limits{RatioFrom: 64 << 20, Ratio: 100})
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, d)
		d.Close()
		runtime.ReadMemStats(&after)
		if !errdefs.IsResourceExhausted(err) || n > 128<<20 {
			t.Errorf("%s: %d bytes, %v", name, n, err)
		}
		if grown := int64(after.Sys) - int64(before.Sys); grown > 256<<20 {
			t.Errorf("%s: memory grew by %d bytes", name, grown)
		}
		if took := time.Since(start); took > 10*time.Minute {
			t.Errorf("%s: took %v", name, took)
		}
	}
}

// TestManyTruncated leaves no descriptor behind.
func TestManyTruncated(t *testing.T) {
	needRoot(t)
	stream := pack(t, folder("a", 0o755), reg("a/b", strings.Repeat("x", 2000)), folder("a/c", 0o755), sym("a/d", "/"), hard("a/e", "a/b"))
	count := func() int {
		l, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(l)
	}
	base := t.TempDir()
	before := count()
	for i := range 500 {
		root := filepath.Join(base, "r")
		if err := os.MkdirAll(root, 0o755); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(root)
		if err != nil {
			t.Fatal(err)
		}
		_, err = Apply(context.Background(), f, bytes.NewReader(stream[:i*len(stream)/500]), Options{Mode: Diff})
		f.Close()
		if err != nil && !errdefs.IsInvalidArgument(err) {
			t.Fatalf("cut %d: %v", i, err)
		}
		if err := os.RemoveAll(root); err != nil {
			t.Fatal(err)
		}
	}
	if after := count(); after > before+5 {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

func FuzzApply(f *testing.F) {
	if os.Geteuid() != 0 {
		f.Skip("needs root: FuzzApply makes devices and trusted attributes")
	}
	f.Add(pack(f, folder("a", 0o755), reg("a/b", "x"), sym("a/c", "/"), hard("a/d", "a/b"), reg("a/.wh.x", ""), dev(tar.TypeChar, "n", 1, 3)), uint8(0))
	f.Add(paxNamed("../x"), uint8(1))
	f.Add(sparsePax("1\n0\n5\n"), uint8(2))
	base := f.TempDir()
	f.Fuzz(func(t *testing.T, stream []byte, mode uint8) {
		top, err := os.MkdirTemp(base, "")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(top)
		canary := filepath.Join(top, "canary")
		makeCanary(t, canary)
		before := fingerprint(t, canary)
		_, err = apply(t, Options{Mode: Mode(mode % 3), Limits: Limits{Size: 1 << 20, Entries: 1000}}, filepath.Join(top, "root"), stream)
		if err != nil && !errdefs.IsInvalidArgument(err) && !errdefs.IsResourceExhausted(err) && !errors.Is(err, ErrNeedsParent) {
			t.Errorf("error without class: %v", err)
		}
		if fingerprint(t, canary) != before {
			t.Error("canary changed")
		}
	})
}

func FuzzDecoder(f *testing.F) {
	var gz bytes.Buffer
	z := gzip.NewWriter(&gz)
	_, _ = z.Write([]byte("hello hello hello"))
	_ = z.Close()
	f.Add(gz.Bytes())
	f.Add([]byte{0x28, 0xb5, 0x2f, 0xfd, 0, 0, 0})
	f.Fuzz(func(t *testing.T, in []byte) {
		d, err := NewDecoder(bytes.NewReader(in), Limits{Size: 1 << 20})
		if err != nil {
			return
		}
		defer d.Close()
		_, _ = io.Copy(io.Discard, d)
	})
}
