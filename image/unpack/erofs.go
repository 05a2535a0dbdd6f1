//go:build linux

package unpack

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/erofs"
)

// ErofsTar writes what is in a layer in EROFS form, of size bytes, as the tar archive of a layer: what the layer deletes is in
// it as image-spec has it. The image may come from anywhere. It is read here and not by the
// kernel, and whatever takes the archive looks at it as at any other. Compressed EROFS is
// errdefs.ErrNotImplemented.
func ErofsTar(ctx context.Context, w io.Writer, image io.ReaderAt, size int64, l Limits) error {
	l = l.withDefaults()
	img, err := erofs.Read(image, size, 0, erofs.ReadLimits{Nodes: int(l.Entries), Held: 4 * l.Names})
	if err == nil && len(img.Devices) > 0 {
		err = fmt.Errorf("%w: its files are in other images", erofs.ErrUnsupported)
	}
	switch {
	case errors.Is(err, erofs.ErrUnsupported):
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotImplemented)
	case errors.Is(err, erofs.ErrFormat):
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	case err != nil:
		return err
	}
	out := bufio.NewWriterSize(w, 64<<10)
	t := tarWriter{ctx: ctx, image: image, size: size, limits: l, tw: tar.NewWriter(out), names: map[*erofs.Node]string{}}
	if err := t.node("./", img.Root); err != nil {
		return err
	}
	if err := t.dir("", img.Root); err != nil {
		return err
	}
	if err := t.tw.Close(); err != nil {
		return err
	}
	return out.Flush()
}

type tarWriter struct {
	ctx   context.Context
	image io.ReaderAt
	tw    *tar.Writer
	names map[*erofs.Node]string // of files that may have more than one
	// Files may share data, or be holes: what they add up to, and may.
	total, size int64
	limits      Limits
}

// dir writes what is in a directory, whose name ends with a slash.
func (t *tarWriter) dir(name string, n *erofs.Node) error {
	if n.Xattr(opaqueXattr) == "y" {
		if err := t.mark(name + opaqueMarker); err != nil {
			return err
		}
	}
	names := make([]string, 0, len(n.Children))
	for c := range n.Children {
		names = append(names, c)
	}
	slices.Sort(names)
	for _, base := range names {
		if err := t.ctx.Err(); err != nil {
			return context.Cause(t.ctx)
		}
		c := n.Children[base]
		if strings.HasPrefix(base, whiteout) {
			return refused(name+base, "a file has the name of a deletion")
		}
		var err error
		switch {
		case c.IsWhiteout():
			err = t.mark(name + whiteout + base)
		case c.IsDir():
			if err = t.node(name+base+"/", c); err == nil {
				err = t.dir(name+base+"/", c)
			}
		default:
			err = t.node(name+base, c)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (t *tarWriter) mark(name string) error {
	return t.tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600})
}

// node writes one file.
func (t *tarWriter) node(name string, n *erofs.Node) error {
	h := &tar.Header{
		Name: name, Mode: int64(n.Mode & 0o7777), Uid: int(n.UID), Gid: int(n.GID), ModTime: time.Unix(0, n.Mtime),
		Devmajor: int64(n.Major), Devminor: int64(n.Minor), Format: tar.FormatPAX, PAXRecords: map[string]string{},
	}
	for _, x := range n.Xattrs {
		if x.Name != opaqueXattr {
			h.PAXRecords["SCHILY.xattr."+x.Name] = x.Value
		}
	}
	if first, ok := t.names[n]; ok {
		h.Typeflag, h.Linkname, h.PAXRecords = tar.TypeLink, first, nil
		return t.tw.WriteHeader(h)
	}
	switch n.Type() {
	case unix.S_IFDIR:
		h.Typeflag = tar.TypeDir
		return t.tw.WriteHeader(h)
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, n.Size
	case unix.S_IFLNK:
		h.Typeflag, h.Linkname = tar.TypeSymlink, n.Target
	case unix.S_IFCHR:
		h.Typeflag = tar.TypeChar
	case unix.S_IFBLK:
		h.Typeflag = tar.TypeBlock
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	default:
		return refused(name, "a socket")
	}
	t.names[n] = name
	if n.Type() == unix.S_IFREG {
		// No file is larger than 1<<62.
		if t.total += n.Size; t.total < 0 || t.total > t.limits.Size || t.total > t.limits.RatioFrom && t.total/t.limits.Ratio > t.size {
			return fmt.Errorf("layer entry %q: the files of an image of %d bytes are larger than the limit: %w", name, t.size, errdefs.ErrResourceExhausted)
		}
	}
	if err := t.tw.WriteHeader(h); err != nil {
		return fmt.Errorf("layer entry %q: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	return t.data(n)
}

// data writes a file's contents.
func (t *tarWriter) data(n *erofs.Node) error {
	extents := n.Extents
	switch {
	case n.Size == 0 || n.Type() != unix.S_IFREG:
		return nil
	case n.Holes != nil:
		left := n.Size
		for _, at := range n.Holes.Pieces {
			piece := min(left, 1<<n.Holes.Bits)
			extents = append(extents, erofs.Extent{At: at, Size: piece})
			left -= piece
		}
	case extents == nil:
		extents = []erofs.Extent{{At: n.Addr, Size: n.Size}}
	}
	for _, e := range extents {
		for e.Size > 0 {
			if err := t.ctx.Err(); err != nil {
				return context.Cause(t.ctx)
			}
			k := min(e.Size, 1<<20)
			var in io.Reader = io.LimitReader(zeroReader{}, k)
			if e.At != erofs.Hole {
				in = io.NewSectionReader(t.image, e.At, k)
				e.At += k
			}
			m, err := io.Copy(t.tw, in)
			if err == nil && m < k {
				err = io.ErrUnexpectedEOF
			}
			if err != nil {
				return err
			}
			e.Size -= k
		}
	}
	return nil
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
