//go:build linux

package unpack

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/erofs"
)

// Pieces is a stream that hands out its own buffers: b until done is called. After
// the last one it gives io.EOF.
type Pieces interface {
	// Next gives the next buffer.
	Next() (b []byte, done func(), err error)
}

// ImageResult is what a layer came to as an image.
type ImageResult struct {
	Result
	implicit map[string]implicitDir
}

// implicitDir is a directory that the layer needs but does not describe.
type implicitDir struct {
	node   *erofs.Node
	linked bool // its name leads through a link of the layer
}

// imager makes an EROFS image of a layer: what applier does with system calls, it does
// with nodes in memory. The contents of files go to the image while they pass by.
type imager struct {
	ctx      context.Context
	o        Options
	in       *pieceReader
	tr       *tar.Reader
	root     *erofs.Node
	buf      []byte
	names    int64 // bytes of directories' names
	held     int64 // bytes of names, targets and attributes in memory
	size     int64 // bytes that files will have, with holes
	dirs     map[string]*erofs.Node
	implicit map[string]implicitDir
	res      Result
}

// Image turns a tar stream (already decompressed) into an EROFS image in f, an empty file, and
// reads the stream to its end. The image shows what Apply would have made in a directory,
// in mode Diff or Base; errors are the same, too. What is written is not synced.
func Image(ctx context.Context, f *os.File, in Pieces, o Options) (ImageResult, error) {
	o.Limits = o.Limits.withDefaults()
	if o.Mode == Merged {
		return ImageResult{}, fmt.Errorf("image of a merged layer: %w", errdefs.ErrNotImplemented)
	}
	src := &pieceReader{in: in, left: o.Limits.Size, out: dataWriter{f: f, pos: erofs.DataStart, writeback: o.Writeback, flushed: erofs.DataStart, sum: erofs.NewSum()}}
	defer src.release()
	m := &imager{
		ctx: ctx, o: o, in: src, tr: tar.NewReader(src), root: erofs.NewDir(0o755),
		dirs: map[string]*erofs.Node{}, implicit: map[string]implicitDir{},
	}
	m.implicit["."] = implicitDir{node: m.root}
	if err := m.run(); err != nil {
		return ImageResult{}, classify(err)
	}
	m.buf = m.bounce()
	if err := drain(src, m.buf); err != nil {
		return ImageResult{}, classify(err)
	}
	if src.release(); src.out.err != nil {
		return ImageResult{}, classify(src.out.err)
	}
	end, nodes, err := erofs.Write(f, m.root, src.out.aligned())
	if err == nil {
		err = erofs.Seal(f, src.out.sum)
	}
	if err != nil {
		return ImageResult{}, classify(err)
	}
	m.res.Disk, m.res.Inodes = end, nodes
	m.res.Implicit = slices.Sorted(maps.Keys(m.implicit))
	slices.SortFunc(m.res.Implicit, func(x, y string) int { return depth(x) - depth(y) })
	return ImageResult{m.res, m.implicit}, nil
}

func (m *imager) run() error {
	for {
		if err := m.ctx.Err(); err != nil {
			return context.Cause(m.ctx)
		}
		hdr, err := m.tr.Next()
		if errors.Is(err, io.EOF) {
			return m.in.out.err
		}
		if err != nil {
			return fmt.Errorf("read layer entry %d: %w", m.res.Entries+1, m.broken(err))
		}
		if m.res.Entries++; m.res.Entries > m.o.Limits.Entries {
			return fmt.Errorf("layer has more than %d entries: %w", m.o.Limits.Entries, errdefs.ErrResourceExhausted)
		}
		if err := m.entry(hdr); err != nil {
			return err
		}
	}
}

// broken is applier.broken.
func (m *imager) broken(err error) error {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if m.in.out.err != nil {
		return m.in.out.err
	}
	if m.in.err != nil && m.in.err != io.EOF { //nolint:errorlint // the bare end is no error
		return m.in.err
	}
	return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
}

// entry takes in one member of the tar.
func (m *imager) entry(hdr *tar.Header) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := cleanName(hdr.Name)
	if err != nil {
		return err
	}
	if name == "." {
		if hdr.Typeflag != tar.TypeDir {
			return refused(hdr.Name, "the root is not a directory")
		}
		return m.describe(name, m.root, hdr)
	}
	dirName, base := path.Split(name)
	dirName = path.Clean(dirName)
	if strings.HasPrefix(base, whiteout) {
		return m.whiteout(hdr, dirName, base)
	}
	dir, err := m.parent(dirName, hdr.Name)
	if err != nil {
		return err
	}
	if len(base) > erofs.MaxName {
		return refused(hdr.Name, "name of %d bytes", len(base))
	}
	switch hdr.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		return m.file(dir, base, hdr)
	case tar.TypeDir:
		return m.directory(dir, name, base, hdr)
	case tar.TypeSymlink:
		return m.symlink(dir, base, hdr)
	case tar.TypeLink:
		return m.link(dir, name, base, hdr)
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		return m.node(dir, base, hdr)
	}
	return refused(hdr.Name, "unknown type %q", hdr.Typeflag)
}

// hold accounts for what stays in memory until the end.
func (m *imager) hold(n int) error {
	const perNode = 256
	limit := m.o.Limits.Names * 8
	if m.held += int64(n) + perNode; m.held > limit {
		return fmt.Errorf("layer takes more than %d bytes of memory for its names: %w", limit, errdefs.ErrResourceExhausted)
	}
	return nil
}

// remember accounts for a directory's name as applier.remember does.
func (m *imager) remember(name string) error {
	if m.names += int64(len(name)) + 48; m.names > m.o.Limits.Names {
		return fmt.Errorf("layer has more than %d bytes of directory names: %w", m.o.Limits.Names, errdefs.ErrResourceExhausted)
	}
	return nil
}

// add puts a new node into a directory, in place of what is there, and tells whether that was
// a whiteout of the same layer.
func (m *imager) add(dir *erofs.Node, base string, n *erofs.Node) (hidden bool, err error) {
	if old := dir.Children[base]; old != nil {
		hidden = old.IsWhiteout()
		if t := old.Type(); t == unix.S_IFDIR || t == unix.S_IFLNK {
			clear(m.dirs) // names may lead elsewhere now
		}
	}
	held := len(base) + len(n.Target)
	for _, x := range n.Xattrs {
		held += len(x.Name) + len(x.Value)
	}
	// Cloned, here and below: a piece of a header would keep all of it in memory.
	dir.Children[strings.Clone(base)] = n
	return hidden, m.hold(held)
}

// newNode makes a node with what every type of entry has.
func (m *imager) newNode(hdr *tar.Header, format uint32) (*erofs.Node, error) {
	n := &erofs.Node{Mode: format}
	if format == unix.S_IFDIR {
		n.Children = map[string]*erofs.Node{}
	}
	return n, m.attributes(n, hdr)
}

func (m *imager) attributes(n *erofs.Node, hdr *tar.Header) error {
	uid, gid, err := ids(hdr)
	if err != nil {
		return err
	}
	perm := uint32(hdr.Mode) & permissions
	if n.Type() == unix.S_IFLNK {
		perm = 0o777
	}
	n.Mode = n.Type() | perm
	n.UID, n.GID, n.Mtime = uint32(uid), uint32(gid), timestamp(hdr.ModTime)
	if t := n.Type(); t != unix.S_IFREG && t != unix.S_IFDIR {
		return nil // Apply sets none on others either
	}
	kept, err := keptXattrs(hdr)
	if err != nil {
		return err
	}
	for _, attr := range kept {
		value := hdr.PAXRecords[xattrPrefix+attr]
		if len(attr) > 255 || attr == "user." || len(value) >= erofs.MaxXattrs/2 {
			return refused(hdr.Name, "extended attribute of %d and %d bytes", len(attr), len(value))
		}
		n.SetXattr(strings.Clone(attr), strings.Clone(value))
	}
	total := 0
	for _, x := range n.Xattrs {
		total += len(x.Name) + len(x.Value) + 8
	}
	if total > erofs.MaxXattrs/2 {
		return refused(hdr.Name, "extended attributes of %d bytes", total)
	}
	return nil
}

// file notes where the contents of a regular file go: they follow when the reader is
// asked for the next entry.
func (m *imager) file(dir *erofs.Node, base string, hdr *tar.Header) error {
	if m.size += hdr.Size; hdr.Size < 0 || m.size > m.o.Limits.Size || m.size < 0 {
		return fmt.Errorf("layer entry %q: files are larger than the limit: %w", hdr.Name, errdefs.ErrResourceExhausted)
	}
	n, err := m.newNode(hdr, unix.S_IFREG)
	if err != nil {
		return err
	}
	n.Size = hdr.Size
	m.res.Size += hdr.Size
	if hdr.Size > 0 {
		if isSparse(hdr) {
			err = m.sparse(n)
		} else {
			n.Addr = m.in.copyNext(hdr.Size)
		}
	}
	if err != nil {
		return err
	}
	_, err = m.add(dir, base, n)
	return err
}

// maxPieces bounds the map of a file with holes.
const maxPieces = 1 << 16

func (m *imager) bounce() []byte {
	if m.buf == nil {
		m.buf = make([]byte, copyBuffer)
	}
	return m.buf
}

// sparse reads a file that the tar reader puts together, and leaves out pieces of zeros.
func (m *imager) sparse(n *erofs.Node) error {
	h := &erofs.Holes{Bits: 12}
	for n.Size>>h.Bits > maxPieces {
		h.Bits++
	}
	piece := int64(1) << h.Bits
	buf := m.bounce()
	if int64(len(buf)) < piece {
		buf = make([]byte, piece)
	}
	for off := int64(0); off < n.Size; off += piece {
		if err := m.ctx.Err(); err != nil {
			return context.Cause(m.ctx)
		}
		b := buf[:min(piece, n.Size-off)]
		if _, err := io.ReadFull(m.tr, b); err != nil {
			return m.broken(err)
		}
		at := int64(erofs.Hole)
		if !isZero(b) {
			at = m.in.out.aligned()
			if err := m.in.out.writeAt(b, at); err != nil {
				return err
			}
		}
		h.Pieces = append(h.Pieces, at)
	}
	n.Holes = h
	return m.hold(8 * len(h.Pieces))
}

// directory makes a directory, or describes one that is there.
func (m *imager) directory(dir *erofs.Node, name, base string, hdr *tar.Header) error {
	if old := dir.Children[base]; old != nil && old.IsDir() {
		return m.describe(name, old, hdr)
	}
	n, err := m.newNode(hdr, unix.S_IFDIR)
	if err == nil {
		err = m.remember(name)
	}
	if err != nil {
		return err
	}
	hidden, err := m.add(dir, base, n)
	if hidden {
		// What lies below was removed by a whiteout of this layer before it made the directory anew.
		n.SetXattr(opaqueXattr, "y")
	}
	return err
}

func (m *imager) describe(name string, n *erofs.Node, hdr *tar.Header) error {
	delete(m.implicit, name)
	return m.attributes(n, hdr)
}

func (m *imager) symlink(dir *erofs.Node, base string, hdr *tar.Header) error {
	if hdr.Linkname == "" || len(hdr.Linkname) >= maxName || strings.ContainsRune(hdr.Linkname, 0) {
		return refused(hdr.Name, "target of the link")
	}
	n, err := m.newNode(hdr, unix.S_IFLNK)
	if err != nil {
		return err
	}
	n.Target = strings.Clone(hdr.Linkname)
	_, err = m.add(dir, base, n)
	return err
}

// node makes a device or a FIFO.
func (m *imager) node(dir *erofs.Node, base string, hdr *tar.Header) error {
	format := uint32(unix.S_IFIFO)
	var major, minor uint32
	if hdr.Typeflag != tar.TypeFifo {
		if hdr.Devmajor < 0 || hdr.Devmajor >= 1<<12 || hdr.Devminor < 0 || hdr.Devminor >= 1<<20 {
			return refused(hdr.Name, "device %d:%d", hdr.Devmajor, hdr.Devminor)
		}
		major, minor = uint32(hdr.Devmajor), uint32(hdr.Devminor)
		format = unix.S_IFCHR
		if hdr.Typeflag == tar.TypeBlock {
			format = unix.S_IFBLK
		} else if major == 0 && minor == 0 {
			return refused(hdr.Name, "device 0:0 would remove a name from the layers below")
		}
	}
	n, err := m.newNode(hdr, format)
	if err != nil {
		return err
	}
	n.Major, n.Minor = major, minor
	_, err = m.add(dir, base, n)
	return err
}

// link gives a node of this layer another name.
func (m *imager) link(dir *erofs.Node, name, base string, hdr *tar.Header) error {
	target, err := cleanName(hdr.Linkname)
	if err != nil {
		return refused(hdr.Name, "hard link to %q", hdr.Linkname)
	}
	if target == name {
		return refused(hdr.Name, "hard link to itself")
	}
	if target == "." || strings.HasPrefix(name, target+"/") {
		return refused(hdr.Name, "hard link to directory %q", hdr.Linkname)
	}
	from, err := m.lookup(path.Dir(target), false)
	if err != nil {
		return m.linkError(hdr, err)
	}
	n := from.Children[path.Base(target)]
	switch {
	case n == nil:
		return m.linkError(hdr, unix.ENOENT)
	case n.IsDir():
		return refused(hdr.Name, "hard link to directory %q", hdr.Linkname)
	case n.IsWhiteout():
		return refused(hdr.Name, "hard link to %q, which the layer removes", hdr.Linkname)
	}
	old := dir.Children[base]
	if old == n {
		return nil
	}
	if old != nil && old.IsDir() && strings.HasPrefix(target, name+"/") {
		return refused(hdr.Name, "hard link replaces the directory of its target")
	}
	_, err = m.add(dir, base, n)
	return err
}

func (m *imager) linkError(hdr *tar.Header, err error) error {
	if errors.Is(err, unix.ENOENT) && m.o.Mode == Diff {
		return fmt.Errorf("layer entry %q: hard link to %q: %w", hdr.Name, hdr.Linkname, ErrNeedsParent)
	}
	return refused(hdr.Name, "hard link to %q: %v", hdr.Linkname, err)
}

// whiteout takes in an entry whose name starts with ".wh.".
func (m *imager) whiteout(hdr *tar.Header, dirName, base string) error {
	if base == opaqueMarker {
		if m.o.Mode == Base {
			return nil
		}
		if dirName == "." {
			// overlayfs does not look for the marker on the root of a layer.
			return fmt.Errorf("layer entry %q: %w", hdr.Name, ErrNeedsParent)
		}
		dir, err := m.parent(dirName, hdr.Name)
		if err == nil {
			dir.SetXattr(opaqueXattr, "y")
		}
		return err
	}
	if strings.HasPrefix(base, whiteout+whiteout) {
		return nil // aufs's own bookkeeping
	}
	hidden := strings.TrimPrefix(base, whiteout)
	if hidden == "" || hidden == "." || hidden == ".." {
		return refused(hdr.Name, "whiteout of %q", hidden)
	}
	if m.o.Mode == Base {
		return nil
	}
	dir, err := m.parent(dirName, hdr.Name)
	if err != nil {
		return err
	}
	if n := dir.Children[hidden]; n != nil {
		// The layer has it as well: only what is below is hidden.
		if n.IsDir() {
			n.SetXattr(opaqueXattr, "y")
		}
		return nil
	}
	if len(hidden) > erofs.MaxName {
		return refused(hdr.Name, "name of %d bytes", len(hidden))
	}
	_, err = m.add(dir, hidden, &erofs.Node{Mode: unix.S_IFCHR})
	return err
}

// parent finds the directory that an entry goes into, and makes it if the layer did not.
func (m *imager) parent(dir, of string) (*erofs.Node, error) {
	n, err := m.lookup(dir, true)
	switch {
	case err == nil:
		return n, nil
	case errors.Is(err, unix.ENOENT):
		// A symbolic link on the way points to what this layer does not hold.
		if m.o.Mode == Diff {
			return nil, fmt.Errorf("layer entry %q: directory %q: %w", of, dir, ErrNeedsParent)
		}
		return nil, refused(of, "directory %q: dangling link", dir)
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENAMETOOLONG):
		return nil, refused(of, "directory %q: %v", dir, err)
	}
	return nil, err
}

// maxLinks is how many symbolic links the kernel follows in a name.
const maxLinks = 40

// lookup finds a directory as a process would whose root is the layer; with create it
// makes those of the name that are missing, but none that a link points to.
func (m *imager) lookup(dir string, create bool) (*erofs.Node, error) {
	if n, ok := m.dirs[dir]; ok {
		return n, nil
	}
	stack := []*erofs.Node{m.root}
	links := 0
	if dir != "." {
		for i := 0; i < len(dir); {
			elem := dir[i:]
			if j := strings.IndexByte(elem, '/'); j >= 0 {
				elem = elem[:j]
			}
			i += len(elem) + 1
			at := stack[len(stack)-1]
			if at.Children[elem] == nil && create {
				if len(elem) > erofs.MaxName {
					return nil, unix.ENAMETOOLONG
				}
				n := erofs.NewDir(0o755)
				m.implicit[dir[:i-1]] = implicitDir{n, links > 0}
				if _, err := m.add(at, elem, n); err != nil {
					return nil, err
				}
				if err := m.remember(dir[:i-1]); err != nil {
					return nil, err
				}
			}
			var err error
			if stack, err = m.step(stack, elem, &links); err != nil {
				return nil, err
			}
		}
	}
	n := stack[len(stack)-1]
	if len(m.dirs) > 4096 {
		clear(m.dirs)
	}
	m.dirs[dir] = n
	return n, nil
}

// step goes from the directory on top of the stack to one of its entries.
func (m *imager) step(stack []*erofs.Node, elem string, links *int) ([]*erofs.Node, error) {
	switch elem {
	case "", ".":
		return stack, nil
	case "..":
		return stack[:max(len(stack)-1, 1)], nil
	}
	n := stack[len(stack)-1].Children[elem]
	switch {
	case n == nil:
		return nil, unix.ENOENT
	case n.IsDir():
		return append(slices.Clip(stack), n), nil
	case n.Type() != unix.S_IFLNK:
		return nil, unix.ENOTDIR
	}
	if *links++; *links > maxLinks {
		return nil, unix.ELOOP
	}
	if strings.HasPrefix(n.Target, "/") {
		stack = stack[:1]
	}
	for e := range strings.SplitSeq(n.Target, "/") {
		var err error
		if stack, err = m.step(stack, e, links); err != nil {
			return nil, err
		}
	}
	return stack, nil
}

// InheritImage is Inherit for an image that Image has made in f, and that is not mounted yet.
func InheritImage(f *os.File, r ImageResult, lowers []*os.File) error {
	changed := false
	for _, name := range r.Implicit {
		dir := r.implicit[name]
		if name == "." || dir.node.Offset() == 0 {
			continue // the snapshotter sees to the root; others the layer removed again
		}
		if err := inheritImage(f, name, dir, lowers); err != nil {
			return classify(wrap(name, err))
		}
		changed = true
	}
	if !changed {
		return nil
	}
	return classify(erofs.Reseal(f))
}

func inheritImage(f *os.File, name string, dir implicitDir, lowers []*os.File) error {
	from, err := lowerDir(name, lowers)
	if err != nil || from < 0 {
		return err
	}
	defer unix.Close(from)
	if dir.linked {
		// The layers below may have another directory in mind.
		return fmt.Errorf("reached through a link: %w", ErrNeedsParent)
	}
	var st unix.Stat_t
	if err := unix.Fstat(from, &st); err != nil {
		return err
	}
	names, err := listXattr(from)
	if err != nil {
		return err
	}
	for _, attr := range names {
		if keep, err := allowXattr("", attr); err != nil || keep {
			// There is no room for it in the image.
			return fmt.Errorf("the directory below has attribute %s: %w", attr, ErrNeedsParent)
		}
	}
	return erofs.SetAttributes(f, dir.node.Offset(), erofs.Attributes{
		Perm: st.Mode & permissions, UID: st.Uid, GID: st.Gid, Mtime: unix.TimespecToNsec(st.Mtim),
	})
}
