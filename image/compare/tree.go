// Package compare finds out in what two images differ: configuration, layers, files.
//
// In flow layers as streams, which are hostile; out flow differences. Nothing is unpacked:
// of each file its description and the hash of its contents are kept.
package compare

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/image/unpack"
	"github.com/hako-engine/hako/internal/ctxio"
)

const (
	// maxFiles bounds the files of one image, over all of its layers.
	maxFiles = 2_000_000
	// maxLayer bounds a layer's tar archive in bytes.
	maxLayer = 100 << 30
	maxPath  = 4096
	maxDepth = 256

	whiteout = ".wh."
	opaque   = ".wh..wh..opq"
	capsKey  = "SCHILY.xattr.security.capability"
)

// file is what is known of one file.
type file struct {
	kind     byte // tar's type
	mode     int64
	uid, gid int
	size     int64
	link     string
	sum      [sha256.Size]byte
	caps     string
	major    int64
	minor    int64
}

// node is a file with its place in a tree.
type node struct {
	file
	known    bool // an entry was there; else it is only on the way to others
	layer    int
	children map[string]*node
}

// Tree is the file system of an image, built a layer at a time.
type Tree struct {
	root  *node
	layer int
	files int
}

// NewTree gives an empty one.
func NewTree() *Tree { return &Tree{root: &node{}} }

// Clone gives an independent copy.
func (t *Tree) Clone() *Tree { return &Tree{t.root.clone(), t.layer, t.files} }

func (n *node) clone() *node {
	c := *n
	if n.children != nil {
		c.children = make(map[string]*node, len(n.children))
		for k, v := range n.children {
			c.children[k] = v.clone()
		}
	}
	return &c
}

// Add lays a layer over the tree. blob is compressed or not.
func (t *Tree) Add(ctx context.Context, blob io.Reader) error {
	dec, err := unpack.NewDecoder(ctxio.Reader(ctx, blob, nil), unpack.Limits{Size: maxLayer})
	if err != nil {
		return err
	}
	defer dec.Close()
	t.layer++
	tr := tar.NewReader(dec)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("not a tar archive, or a truncated one: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		if err := t.entry(h, tr); err != nil {
			return err
		}
	}
	// What follows the archive counts for the blob's digest.
	if _, err := io.Copy(io.Discard, dec); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, blob)
	return err
}

func (t *Tree) entry(h *tar.Header, r io.Reader) error {
	if t.files++; t.files > maxFiles {
		return fmt.Errorf("more than %d files: %w", maxFiles, errdefs.ErrResourceExhausted)
	}
	name := strings.TrimPrefix(path.Clean("/"+h.Name), "/")
	if len(name) > maxPath || strings.Count(name, "/") > maxDepth {
		return fmt.Errorf("a path of more than %d bytes or %d folders: %w", maxPath, maxDepth, errdefs.ErrInvalidArgument)
	}
	dir, base := path.Split(name)
	switch {
	case h.Typeflag == tar.TypeXGlobalHeader:
		return nil
	case base == opaque:
		if n := t.find(dir); n != nil {
			n.dropBelow(t.layer)
		}
		return nil
	case strings.HasPrefix(base, whiteout):
		if parent := t.find(dir); parent != nil {
			gone := strings.TrimPrefix(base, whiteout)
			if n := parent.children[gone]; n != nil {
				if n.dropBelow(t.layer); n.layer < t.layer && len(n.children) == 0 {
					delete(parent.children, gone)
				}
			}
		}
		return nil
	}
	f := file{kind: h.Typeflag, mode: h.Mode & 0o7777, uid: h.Uid, gid: h.Gid, link: h.Linkname, caps: h.PAXRecords[capsKey], major: h.Devmajor, minor: h.Devminor}
	switch h.Typeflag {
	case tar.TypeReg:
		sum := sha256.New()
		n, err := io.Copy(sum, r)
		if err != nil {
			return err
		}
		f.size = n
		sum.Sum(f.sum[:0])
	case tar.TypeLink:
		target := t.find(h.Linkname)
		if target == nil {
			return fmt.Errorf("a hard link to %q, which is not there: %w", h.Linkname, errdefs.ErrInvalidArgument)
		}
		f = target.file
	}
	t.put(name, f)
	return nil
}

// find gives a node by its path; nil: none.
func (t *Tree) find(name string) *node {
	n := t.root
	for part := range strings.SplitSeq(strings.TrimPrefix(path.Clean("/"+name), "/"), "/") {
		if part == "" {
			continue
		}
		if n = n.children[part]; n == nil {
			return nil
		}
	}
	return n
}

func (t *Tree) put(name string, f file) {
	n := t.root
	if name != "" {
		for part := range strings.SplitSeq(name, "/") {
			next := n.children[part]
			if next == nil {
				next = &node{layer: t.layer}
				if n.children == nil {
					n.children = map[string]*node{}
				}
				n.children[part] = next
			}
			n = next
		}
	}
	if f.kind != tar.TypeDir {
		n.children = nil // it takes the place of a folder
	}
	n.file, n.known, n.layer = f, true, t.layer
}

// dropBelow removes what is below a node and of lower layers.
func (n *node) dropBelow(layer int) {
	for name, c := range n.children {
		if c.dropBelow(layer); c.layer < layer && len(c.children) == 0 {
			delete(n.children, name)
		}
	}
}

// File is one difference.
type File struct {
	Change string `json:"change"` // A added, C changed, D deleted
	Path   string `json:"path"`
	Old    int64  `json:"old"` // bytes
	New    int64  `json:"new"` // bytes
	Note   string `json:"note,omitempty"`
}

// Diff lists what differs between two trees, by path. Times do not count.
func Diff(a, b *Tree) []File {
	var out []File
	walk("", a.root, b.root, &out)
	return out
}

func walk(dir string, a, b *node, out *[]File) {
	names := map[string]bool{}
	for k := range a.children {
		names[k] = true
	}
	for k := range b.children {
		names[k] = true
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		p := dir + "/" + name
		x, y := a.children[name], b.children[name]
		switch {
		case x == nil:
			added(p, y, "A", out)
		case y == nil:
			added(p, x, "D", out)
		default:
			if note := differs(x, y); note != "" {
				*out = append(*out, File{"C", p, x.size, y.size, note})
			}
			walk(p, x, y, out)
		}
	}
}

func added(p string, n *node, change string, out *[]File) {
	f := File{Change: change, Path: p}
	if change == "A" {
		f.New = n.size
	} else {
		f.Old = n.size
	}
	if n.kind == tar.TypeDir || !n.known {
		f.Path += "/"
	}
	*out = append(*out, f)
	for _, name := range slices.Sorted(maps.Keys(n.children)) {
		added(p+"/"+name, n.children[name], change, out)
	}
}

// differs says in what.
func differs(a, b *node) string {
	if !a.known || !b.known {
		return ""
	}
	if a.kind != b.kind {
		return "type"
	}
	var notes []string
	for _, d := range []struct {
		what string
		is   bool
	}{
		{"content", a.kind == tar.TypeReg && a.sum != b.sum},
		{"target", a.kind == tar.TypeSymlink && a.link != b.link},
		{"device", a.major != b.major || a.minor != b.minor},
		{"mode", a.kind != tar.TypeSymlink && a.mode != b.mode},
		{"owner", a.uid != b.uid || a.gid != b.gid},
		{"capabilities", a.caps != b.caps},
	} {
		if d.is {
			notes = append(notes, d.what)
		}
	}
	if a.mode != b.mode && a.kind != tar.TypeSymlink {
		notes = append(notes, fmt.Sprintf("%04o→%04o", a.mode, b.mode))
	}
	return strings.Join(notes, " ")
}
