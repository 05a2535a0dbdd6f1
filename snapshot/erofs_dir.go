package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/erofs"
)

// maxNodes bounds the tree that is held in memory while an image is made of a directory.
const maxNodes = 4 << 20

// imageOf makes the image of a layer that a client filled as a directory. A container may
// still be at work in it: directories are opened one below the other, and no link is
// followed.
func imageOf(ctx context.Context, l layer) (err error) {
	out, err := os.OpenFile(l.partial(), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	dir, err := os.OpenFile(l.fs(), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	p := packer{ctx: ctx, out: out, end: erofs.DataStart, linked: map[inode]*erofs.Node{}}
	root, err := p.describe(dir, ".")
	if err != nil {
		dir.Close()
		return err
	}
	if err := p.dir(dir, root, 0); err != nil {
		return err
	}
	if _, _, err := erofs.Write(out, root, p.end); err != nil {
		return err
	}
	if err := erofs.Seal(out, nil); err != nil {
		return err
	}
	return publish(out, l, true)
}

type packer struct {
	ctx    context.Context
	out    *os.File
	end    int64 // of the data, a block boundary
	nodes  int
	linked map[inode]*erofs.Node
}

// dir takes in what is in d, and closes it.
func (p *packer) dir(d *os.File, to *erofs.Node, depth int) error {
	defer d.Close()
	if err := p.ctx.Err(); err != nil {
		return err
	}
	if depth > maxTreeDepth {
		return fmt.Errorf("directories are nested deeper than %d: %w", maxTreeDepth, errdefs.ErrInvalidArgument)
	}
	names, err := d.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, name := range names {
		n, sub, err := p.entry(d, name)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ELOOP) {
			continue // removed or replaced meanwhile
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		to.Children[name] = n
		if sub != nil {
			if err := p.dir(sub, n, depth+1); err != nil {
				return err
			}
		}
	}
	return nil
}

// entry gives the node of a name, and the open directory if it is one.
func (p *packer) entry(d *os.File, name string) (n *erofs.Node, sub *os.File, err error) {
	f, err := openAt(d, name, unix.O_PATH, 0)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, nil, err
	}
	k := inode{uint64(st.Dev), st.Ino}
	if n := p.linked[k]; n != nil {
		return n, nil, nil
	}
	if n, err = p.describe(f, name); err != nil {
		return nil, nil, err
	}
	if st.Nlink > 1 && !n.IsDir() {
		p.linked[k] = n
	}
	switch n.Type() {
	case unix.S_IFDIR:
		sub, err = openAt(d, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	case unix.S_IFREG:
		// Through the descriptor: whatever the name means by now, it is this file.
		var in *os.File
		if in, err = os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd())); err == nil {
			err = errors.Join(p.data(in, n, st.Blocks*512), in.Close())
		}
	case unix.S_IFLNK:
		buf := make([]byte, unix.PathMax)
		var m int
		if m, err = unix.Readlinkat(int(f.Fd()), "", buf); err == nil {
			n.Target = string(buf[:m])
		}
	}
	return n, sub, err
}

// describe makes the node of an open file.
func (p *packer) describe(f *os.File, name string) (*erofs.Node, error) {
	if p.nodes++; p.nodes > maxNodes {
		return nil, fmt.Errorf("more than %d files: %w", maxNodes, errdefs.ErrResourceExhausted)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	n := &erofs.Node{
		Mode: st.Mode, UID: st.Uid, GID: st.Gid, Mtime: st.Mtim.Nano(),
		Major: unix.Major(st.Rdev), Minor: unix.Minor(st.Rdev),
	}
	if n.IsDir() {
		n.Children = map[string]*erofs.Node{}
	}
	if n.Type() == unix.S_IFLNK {
		return n, nil
	}
	path := fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	for _, attr := range listXattrs(path) {
		own, ok := strings.CutPrefix(attr, "trusted.overlay.")
		switch {
		case ok && (own == "redirect" || own == "metacopy"):
			return nil, fmt.Errorf("%s: the layer refers to another one (%s): %w", name, attr, errdefs.ErrFailedPrecondition)
		case ok && own != "opaque":
			continue // what overlayfs noted of the layers below it
		}
		v, err := getXattr(path, attr)
		if err != nil {
			return nil, fmt.Errorf("%s: read attribute %s: %w", name, attr, err)
		}
		n.SetXattr(attr, string(v))
	}
	return n, nil
}

// maxPieces bounds the map of a file with holes.
const maxPieces = 1 << 16

// data copies a file's contents; blocks is how many bytes of the disk they take.
func (p *packer) data(in *os.File, n *erofs.Node, blocks int64) error {
	st, err := in.Stat()
	if err != nil {
		return err
	}
	n.Size = st.Size()
	if n.Size == 0 {
		return nil
	}
	if blocks >= n.Size || n.Size <= erofs.BlockSize {
		n.Addr = p.end
		return p.copy(in, 0, n.Size)
	}
	h := &erofs.Holes{Bits: 12}
	for n.Size>>h.Bits > maxPieces {
		h.Bits++
	}
	piece := int64(1) << h.Bits
	next := int64(0) // where data begins that were not looked at yet
	for off := int64(0); off < n.Size; off += piece {
		if next < off+1 {
			next, err = in.Seek(off, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) {
				next = n.Size
			} else if err != nil {
				return err
			}
		}
		if next >= off+piece {
			h.Pieces = append(h.Pieces, erofs.Hole)
			continue
		}
		h.Pieces = append(h.Pieces, p.end)
		if err := p.copy(in, off, min(piece, n.Size-off)); err != nil {
			return err
		}
	}
	n.Holes = h
	return nil
}

// copy appends part of a file to the data.
func (p *packer) copy(in *os.File, off, n int64) error {
	to := p.end
	p.end += (n + erofs.BlockSize - 1) / erofs.BlockSize * erofs.BlockSize
	for n > 0 {
		if err := p.ctx.Err(); err != nil {
			return err
		}
		m, err := unix.CopyFileRange(int(in.Fd()), &off, int(p.out.Fd()), &to, int(min(n, 64<<20)), 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EXDEV), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS):
			_, err := io.Copy(io.NewOffsetWriter(p.out, to), io.NewSectionReader(in, off, n))
			return err
		case err != nil:
			return os.NewSyscallError("copy_file_range", err)
		case m == 0:
			return nil // it has become shorter
		}
		n -= int64(m)
	}
	return nil
}
