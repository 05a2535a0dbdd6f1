package compare

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// entry is a file as a test writes it: "name", "name=contents", "name/" or "name->target".
func layer(t testing.TB, entries ...string) io.Reader {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, e := range entries {
		name, body, _ := strings.Cut(e, "=")
		h := &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(body))}
		if n, target, ok := strings.Cut(e, "->"); ok {
			h = &tar.Header{Name: n, Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777}
			body = ""
		} else if n, target, ok := strings.Cut(e, "=>"); ok && body != "" {
			h, body = &tar.Header{Name: n, Typeflag: tar.TypeLink, Linkname: target}, ""
		} else if strings.HasSuffix(name, "/") {
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		} else if strings.HasPrefix(name, "s:") {
			h.Name, h.Mode = name[2:], 0o4755
		}
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(tw, body); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return &buf
}

func tree(t testing.TB, layers ...io.Reader) *Tree {
	t.Helper()
	tr := NewTree()
	for _, l := range layers {
		if err := tr.Add(context.Background(), l); err != nil {
			t.Fatal(err)
		}
	}
	return tr
}

func show(list []File) string {
	var out []string
	for _, f := range list {
		out = append(out, strings.TrimSpace(fmt.Sprintf("%s %s %d>%d %s", f.Change, f.Path, f.Old, f.New, f.Note)))
	}
	return strings.Join(out, "; ")
}

func TestDiff(t *testing.T) {
	t.Parallel()
	base := []string{"etc/", "etc/motd=hello", "etc/keep=1", "bin/", "bin/sh->busybox", "bin/busybox=program", "data/", "data/a=1", "data/b=22"}
	for name, c := range map[string]struct {
		layers [][]string
		want   string
	}{
		"nothing":             {nil, ""},
		"the same again":      {[][]string{{"etc/motd=hello", "bin/"}}, ""},
		"contents":            {[][]string{{"etc/motd=hello, world"}}, "C /etc/motd 5>12 content"},
		"mode":                {[][]string{{"s:bin/busybox=program"}}, "C /bin/busybox 7>7 mode 0644→4755"},
		"link":                {[][]string{{"bin/sh->dash"}}, "C /bin/sh 0>0 target"},
		"added":               {[][]string{{"new/", "new/f=123"}}, "A /new/ 0>0; A /new/f 0>3"},
		"removed":             {[][]string{{"etc/.wh.motd"}}, "D /etc/motd 5>0"},
		"removed folder":      {[][]string{{".wh.data"}}, "D /data/ 0>0; D /data/a 1>0; D /data/b 2>0"},
		"opaque":              {[][]string{{"data/", "data/.wh..wh..opq", "data/c=3"}}, "D /data/a 1>0; D /data/b 2>0; A /data/c 0>1"},
		"opaque comes last":   {[][]string{{"data/", "data/a=1", "data/.wh..wh..opq"}}, "D /data/b 2>0"},
		"removed and back":    {[][]string{{"etc/.wh.motd"}, {"etc/motd=hello"}}, ""},
		"file for a folder":   {[][]string{{"data=x"}}, "C /data 0>1 type; D /data/a 1>0; D /data/b 2>0"},
		"hard link":           {[][]string{{"etc/copy=>etc/motd"}}, "A /etc/copy 0>5"},
		"paths with dots":     {[][]string{{"./etc/../etc/motd=x", "../../etc/up=1"}}, "C /etc/motd 5>1 content; A /etc/up 0>1"},
		"without a folder":    {[][]string{{"opt/app/x=1"}}, "A /opt/ 0>0; A /opt/app/ 0>0; A /opt/app/x 0>1"},
		"whiteout of nothing": {[][]string{{".wh.none", "none/.wh.x", "none/.wh..wh..opq"}}, ""},
	} {
		a := tree(t, layer(t, base...))
		b := a.Clone()
		for _, l := range c.layers {
			if err := b.Add(context.Background(), layer(t, l...)); err != nil {
				t.Fatal(err)
			}
		}
		if got := show(Diff(a, b)); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
		if got := Diff(a, a.Clone()); len(got) != 0 {
			t.Errorf("%s: the base changed: %v", name, got)
		}
	}
}

func TestHostileLayers(t *testing.T) {
	t.Parallel()
	for name, l := range map[string]io.Reader{
		"deep":        layer(t, strings.Repeat("a/", 300)+"x=1"),
		"long":        layer(t, strings.Repeat("a", 5000)+"=1"),
		"link to air": layer(t, "x=>y"),
		"no tar":      strings.NewReader(strings.Repeat("x", 2000)),
		"truncated":   io.LimitReader(layer(t, "x="+strings.Repeat("1", 3000)), 1024),
	} {
		if err := NewTree().Add(context.Background(), l); !errdefs.IsInvalidArgument(err) && err == nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := NewTree().Add(ctx, layer(t, "x=1")); err == nil {
		t.Error("went on after the end of the context")
	}
}

func FuzzTree(f *testing.F) {
	raw, err := io.ReadAll(layer(f, "a/", "a/b=1", "a/.wh.b", "c->d", "a/.wh..wh..opq"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Fuzz(func(t *testing.T, b []byte) {
		x, y := NewTree(), NewTree()
		_ = x.Add(context.Background(), bytes.NewReader(b))
		_ = y.Add(context.Background(), bytes.NewReader(b))
		if d := Diff(x, y); len(d) > 0 {
			t.Errorf("%v", d)
		}
	})
}
