package erofs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrFormat tells that bytes are no image, or one that contradicts itself; ErrUnsupported that it uses what
// is not read here: compressed files above all.
var (
	ErrFormat      = errors.New("damaged EROFS image")
	ErrUnsupported = errors.New("EROFS image with unknown features")
)

// Image is what Read has read.
type Image struct {
	Root    *Node
	Devices []Device
	UUID    [16]byte
}

// ReadLimits bound the memory that an image takes to read. Zero: as for layers of images.
type ReadLimits struct {
	Nodes int   // names of files
	Held  int64 // bytes of names, targets, attributes and maps
}

// Limits of trees.
const (
	maxNodes = 4 << 20
	maxHeld  = 1 << 30
	maxDepth = 2048 // a name of 4096 bytes has no more
)

// Read reads the tree of an image of size bytes, which may come from anywhere: it bounds all that it
// believes, and never writes. Nodes' data are in device first if they are in the image itself, and
// behind it if they are in one of its devices.
func Read(f io.ReaderAt, size int64, first int, limits ReadLimits) (Image, error) {
	if limits.Nodes == 0 {
		limits.Nodes = maxNodes
	}
	if limits.Held == 0 {
		limits.Held = maxHeld
	}
	r := reader{f: f, size: size, first: first, limits: limits, nodes: map[uint64]*Node{}}
	if err := r.super(); err != nil {
		return Image{}, err
	}
	root, err := r.tree()
	return Image{Root: root, Devices: r.devices, UUID: r.uuid}, err
}

type reader struct {
	f       io.ReaderAt
	size    int64
	first   int
	limits  ReadLimits
	bits    uint // of blocks
	meta    int64
	shared  int64 // where shared attributes are
	root    uint64
	mtime   int64 // of short inodes
	uuid    [16]byte
	devices []Device
	starts  []int64
	nodes   map[uint64]*Node
	windows [windowCount]window
}

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrFormat}, args...)...)
}

func unsupported(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrUnsupported}, args...)...)
}

const (
	windowBits  = 16
	windowCount = 32
)

// window is a piece of the image in memory.
type window struct {
	n    int64 // 1 + its number; 0: none
	data []byte
}

// at gives bytes of the image, which stay as they are.
func (r *reader) at(off int64, n int) ([]byte, error) {
	if off < 0 || n < 0 || off > r.size-int64(n) {
		return nil, damaged("%d bytes at %d are outside", n, off)
	}
	if n == 0 {
		return nil, nil
	}
	i := off >> windowBits
	if (off+int64(n)-1)>>windowBits != i {
		b := make([]byte, n)
		_, err := r.f.ReadAt(b, off)
		return b, readError(err)
	}
	w := &r.windows[i%windowCount]
	if w.n != i+1 {
		start := i << windowBits
		w.n, w.data = 0, make([]byte, min(r.size-start, 1<<windowBits))
		if _, err := r.f.ReadAt(w.data, start); err != nil {
			return nil, readError(err)
		}
		w.n = i + 1
	}
	at := off & (1<<windowBits - 1)
	return w.data[at : at+int64(n) : at+int64(n)], nil
}

func readError(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return damaged("it ends too early")
	}
	return fmt.Errorf("read EROFS image: %w", err)
}

// hold counts memory that the tree keeps.
func (r *reader) hold(n int) error {
	if r.limits.Held -= int64(n); r.limits.Held < 0 {
		return unsupported("its names and attributes are too many bytes")
	}
	return nil
}

func (r *reader) super() error {
	head, err := r.at(superOffset, superSize)
	if err != nil {
		return err
	}
	if le.Uint32(head) != magic {
		return damaged("no superblock")
	}
	r.bits = uint(head[12])
	if r.bits < 9 || r.bits > blockBits {
		return unsupported("blocks of 1<<%d bytes", r.bits)
	}
	if compat := le.Uint32(head[8:]); compat&featureChecksum != 0 {
		// From the superblock to the end of its block.
		n := int64(1)<<r.bits - superOffset
		if n < superSize {
			n = 1 << r.bits
		}
		block, err := r.at(superOffset, int(n))
		if err != nil {
			return err
		}
		if checksum(block) != le.Uint32(head[4:]) {
			return damaged("the superblock's checksum is wrong")
		}
	}
	incompat := le.Uint32(head[80:])
	if other := incompat &^ (featurePadding | featureChunks | featureDevices); other != 0 {
		return unsupported("features %#x (compression, or a newer format)", other)
	}
	if head[90] != 0 {
		return unsupported("directories of large blocks")
	}
	r.meta = int64(le.Uint32(head[40:])) << r.bits
	r.shared = int64(le.Uint32(head[44:])) << r.bits
	r.root = uint64(le.Uint16(head[14:]))
	r.mtime = int64(le.Uint64(head[24:]))*1e9 + int64(le.Uint32(head[32:]))
	copy(r.uuid[:], head[48:])
	if incompat&featureDevices == 0 {
		return nil
	}
	n := int(le.Uint16(head[86:]))
	if n > maxDevices {
		return unsupported("%d devices", n)
	}
	table, err := r.at(int64(le.Uint16(head[88:]))*deviceSlot, n*deviceSlot)
	if err != nil {
		return err
	}
	for i := range n {
		slot := table[i*deviceSlot:]
		tag, _, _ := bytes.Cut(slot[:tagSize], []byte{0})
		r.devices = append(r.devices, Device{Tag: string(tag), Size: int64(le.Uint32(slot[tagSize:])) << r.bits})
		r.starts = append(r.starts, int64(le.Uint32(slot[tagSize+4:]))<<r.bits)
	}
	return nil
}

// locate gives the device and the address in it of n bytes of data.
func (r *reader) locate(addr, n int64) (device int, at int64, err error) {
	for i, start := range r.starts {
		if end := start + r.devices[i].Size; start > 0 && addr >= start && addr < end {
			if addr > end-n {
				return 0, 0, damaged("%d bytes at %d are outside of device %d", n, addr, i)
			}
			return r.first + 1 + i, addr - start, nil
		}
	}
	// The last block may be cut short where the file ends.
	if addr < 0 || addr > r.size-n {
		return 0, 0, damaged("%d bytes of data at %d are outside", n, addr)
	}
	return r.first, addr, nil
}

// pending is a directory whose entries are still to be read.
type pending struct {
	n     *Node
	i     inode
	depth int
}

// inode is what an inode says beyond its node.
type inode struct {
	layout int
	addr   uint32
	size   int64
	behind int64 // where what follows it begins
}

func (r *reader) tree() (*Node, error) {
	root, i, err := r.inode(r.root)
	if err != nil {
		return nil, err
	}
	if !root.IsDir() {
		return nil, damaged("the root is no directory")
	}
	r.nodes[r.root] = root
	queue := []pending{{root, i, 0}}
	for len(queue) > 0 {
		dir := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		if dir.depth > maxDepth {
			return nil, unsupported("directories are nested deeper than %d", maxDepth)
		}
		err := r.directory(dir.i, func(name string, nid uint64) error {
			if dir.n.Children[name] != nil {
				return damaged("two entries %q", name)
			}
			if r.limits.Nodes--; r.limits.Nodes < 0 {
				return unsupported("too many files")
			}
			if err := r.hold(len(name) + 64); err != nil {
				return err
			}
			n, known := r.nodes[nid]
			if known && n.IsDir() {
				return damaged("directory %q has two names", name)
			}
			if !known {
				var i inode
				var err error
				if n, i, err = r.inode(nid); err != nil {
					return fmt.Errorf("%q: %w", name, err)
				}
				r.nodes[nid] = n
				if n.IsDir() {
					queue = append(queue, pending{n, i, dir.depth + 1})
				}
			}
			dir.n.Children[name] = n
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return root, nil
}

// inode reads an inode and all that belongs to it but a directory's entries.
func (r *reader) inode(nid uint64) (*Node, inode, error) {
	if nid > uint64(r.size)/slotSize {
		return nil, inode{}, damaged("inode %d is outside", nid)
	}
	off := r.meta + int64(nid)*slotSize
	b, err := r.at(off, slotSize)
	if err != nil {
		return nil, inode{}, err
	}
	format := le.Uint16(b)
	if format>>4 != 0 {
		return nil, inode{}, unsupported("format %#x of inode %d", format, nid)
	}
	n := &Node{Mode: uint32(le.Uint16(b[4:]))}
	i := inode{layout: int(format >> 1 & 7), addr: le.Uint32(b[16:])}
	if format&1 == 0 {
		i.size, i.behind = int64(le.Uint32(b[8:])), off+slotSize
		n.UID, n.GID, n.Mtime = uint32(le.Uint16(b[24:])), uint32(le.Uint16(b[26:])), r.mtime
	} else {
		if b, err = r.at(off, inodeSize); err != nil {
			return nil, inode{}, err
		}
		i.behind = off + inodeSize
		size, sec, nsec := le.Uint64(b[8:]), int64(le.Uint64(b[32:])), le.Uint32(b[40:])
		if size > 1<<62 || nsec >= 1e9 || sec > 1<<33 || sec < -1<<33 {
			return nil, inode{}, damaged("inode %d: size %d, time %d", nid, size, sec)
		}
		i.size = int64(size)
		n.UID, n.GID, n.Mtime = le.Uint32(b[24:]), le.Uint32(b[28:]), sec*1e9+int64(nsec)
	}
	if err := r.hold(256); err != nil {
		return nil, i, err
	}
	if count := le.Uint16(b[2:]); count > 0 {
		size := xattrHeader + 4*(int(count)-1)
		if err := r.xattrs(n, i.behind, size); err != nil {
			return nil, i, err
		}
		i.behind += int64(size)
	}
	switch n.Type() {
	case unix.S_IFDIR:
		n.Children = map[string]*Node{}
	case unix.S_IFREG:
		n.Size = i.size
		err = r.data(n, i)
	case unix.S_IFLNK:
		if i.size == 0 || i.size > BlockSize-1 {
			return nil, i, damaged("target of %d bytes", i.size)
		}
		if err := r.hold(int(i.size)); err != nil {
			return nil, i, err
		}
		var target strings.Builder
		err = r.eachBlock(i, func(b []byte) error {
			target.Write(b)
			return nil
		})
		if n.Target = target.String(); strings.Contains(n.Target, "\x00") {
			return nil, i, damaged("target with a zero byte")
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		n.Major, n.Minor = i.addr>>8&0xfff, i.addr&0xff|i.addr>>12&0xfff00
	case unix.S_IFIFO, unix.S_IFSOCK:
	default:
		err = damaged("mode %#o of inode %d", n.Mode, nid)
	}
	return n, i, err
}

// tail tells how much of a file's data is behind its inode.
func (r *reader) tail(i inode) (full, tail int64, err error) {
	block := int64(1) << r.bits
	switch {
	case i.layout == layoutPlain:
		return i.size, 0, nil
	case i.layout != layoutInline:
		return 0, 0, unsupported("compressed file (layout %d)", i.layout)
	case i.size == 0:
		return 0, 0, nil
	}
	full = (i.size - 1) &^ (block - 1)
	if tail = i.size - full; i.behind&(block-1)+tail > block {
		return 0, 0, damaged("%d bytes behind an inode lie across a block's end", tail)
	}
	return full, tail, nil
}

// eachBlock gives the contents of a directory or a link, by blocks.
func (r *reader) eachBlock(i inode, fn func([]byte) error) error {
	full, tail, err := r.tail(i)
	if err != nil {
		return err
	}
	at, block := int64(i.addr)<<r.bits, int64(1)<<r.bits
	if full > r.size {
		return damaged("directory of %d bytes", i.size)
	}
	for off := int64(0); off < full; off += block {
		b, err := r.at(at+off, int(min(block, full-off)))
		if err == nil {
			err = fn(b)
		}
		if err != nil {
			return err
		}
	}
	if tail == 0 {
		return nil
	}
	b, err := r.at(i.behind, int(tail))
	if err != nil {
		return err
	}
	return fn(b)
}

// directory calls fn with the entries of a directory.
func (r *reader) directory(i inode, fn func(name string, nid uint64) error) error {
	return r.eachBlock(i, func(b []byte) error {
		if len(b) < direntSize {
			return damaged("piece of a directory of %d bytes", len(b))
		}
		names := int(le.Uint16(b[8:]))
		if names == 0 || names%direntSize != 0 || names > len(b) {
			return damaged("names at %d in a directory", names)
		}
		start := names
		for at := 0; at < names; at += direntSize {
			end := len(b)
			if at+direntSize < names {
				end = int(le.Uint16(b[at+direntSize+8:]))
			}
			if int(le.Uint16(b[at+8:])) != start || end < start || end > len(b) {
				return damaged("name from %d to %d in a directory", start, end)
			}
			name := string(b[start:end])
			if end == len(b) {
				name, _, _ = strings.Cut(name, "\x00")
			}
			start = end
			if name == "." || name == ".." {
				continue
			}
			if name == "" || len(name) > MaxName || strings.ContainsAny(name, "/\x00") {
				return damaged("name %q", name)
			}
			if err := fn(name, le.Uint64(b[at:])); err != nil {
				return err
			}
		}
		return nil
	})
}

// data finds the contents of a regular file.
func (r *reader) data(n *Node, i inode) (err error) {
	if i.size == 0 {
		return nil
	}
	if i.layout == layoutChunks {
		return r.chunks(n, i)
	}
	full, tail, err := r.tail(i)
	if err != nil {
		return err
	}
	var at int64
	n.Device = r.first
	if full > 0 {
		if n.Device, at, err = r.locate(int64(i.addr)<<r.bits, full); err != nil {
			return err
		}
	}
	if tail == 0 && at%BlockSize == 0 {
		n.Addr = at
		return nil
	}
	if n.Device != r.first {
		return unsupported("data of a device that is not in blocks of %d bytes", BlockSize)
	}
	if full > 0 {
		n.Extents = append(n.Extents, Extent{at, full})
	}
	if tail > 0 {
		if i.behind > r.size-tail {
			return damaged("the end of a file is outside")
		}
		n.Extents = append(n.Extents, Extent{i.behind, tail})
	}
	return nil
}

// chunks reads the map of a file in pieces.
func (r *reader) chunks(n *Node, i inode) error {
	format := uint16(i.addr)
	bits, entry := r.bits+uint(format&31), int64(4)
	if format&^0x3f != 0 || bits > 40 {
		return unsupported("format %#x of a file in pieces", format)
	}
	if format&0x20 != 0 {
		entry = 8
	}
	count := (i.size + 1<<bits - 1) >> bits
	start := up(i.behind, entry)
	if count > r.size/entry {
		return damaged("%d pieces of a file", count)
	}
	if err := r.hold(int(count) * 24); err != nil {
		return err
	}
	n.Device = -1
	aligned := bits >= blockBits
	extents := make([]Extent, count)
	for k := range extents {
		b, err := r.at(start+int64(k)*entry, int(entry))
		if err != nil {
			return err
		}
		piece := min(i.size-int64(k)<<bits, 1<<bits)
		block := le.Uint32(b)
		if entry == 8 {
			if le.Uint16(b) != 0 || le.Uint16(b[2:]) != 0 {
				return unsupported("piece of a file in another device")
			}
			block = le.Uint32(b[4:])
		}
		if block == nullBlock {
			extents[k] = Extent{Hole, piece}
			continue
		}
		device, at, err := r.locate(int64(block)<<r.bits, piece)
		if err != nil {
			return err
		}
		if n.Device >= 0 && n.Device != device {
			return unsupported("file in pieces of two devices")
		}
		n.Device, extents[k] = device, Extent{at, piece}
		aligned = aligned && at%BlockSize == 0
	}
	n.Device = max(n.Device, r.first)
	if !aligned {
		if n.Device != r.first {
			return unsupported("data of a device that is not in blocks of %d bytes", BlockSize)
		}
		n.Extents = extents
		return nil
	}
	n.Holes = &Holes{Bits: bits, Pieces: make([]int64, count)}
	for k, e := range extents {
		n.Holes.Pieces[k] = e.At
	}
	return nil
}

// xattrs reads the attributes of an inode, which take size bytes at off.
func (r *reader) xattrs(n *Node, off int64, size int) error {
	b, err := r.at(off, size)
	if err != nil {
		return err
	}
	shared := int(b[4])
	if xattrHeader+4*shared > size {
		return damaged("%d shared attributes in %d bytes", shared, size)
	}
	for i := range shared {
		at := r.shared + 4*int64(le.Uint32(b[xattrHeader+4*i:]))
		head, err := r.at(at, 4)
		if err != nil {
			return err
		}
		x, err := r.at(at, 4+int(head[0])+int(le.Uint16(head[2:])))
		if err != nil {
			return err
		}
		if err := r.xattr(n, x); err != nil {
			return err
		}
	}
	b = b[xattrHeader+4*shared:]
	for len(b) >= 4 {
		used := 4 + int(b[0]) + int(le.Uint16(b[2:]))
		if used == 4 && b[1] == 0 {
			break // padding
		}
		if used > len(b) {
			return damaged("attribute of %d bytes", used)
		}
		if err := r.xattr(n, b[:used]); err != nil {
			return err
		}
		b = b[min((used+3)&^3, len(b)):]
	}
	return nil
}

// xattr takes in one attribute.
func (r *reader) xattr(n *Node, b []byte) error {
	rest := string(b[4 : 4+int(b[0])])
	name := ""
	switch index := b[1]; {
	case index == 2 && rest == "":
		name = "system.posix_acl_access"
	case index == 3 && rest == "":
		name = "system.posix_acl_default"
	case index&0x80 != 0:
		return unsupported("prefixes of attributes")
	default:
		for _, p := range xattrPrefixes {
			if p.index == index && rest != "" {
				name = p.prefix + rest
			}
		}
	}
	if name == "" || strings.Contains(name, "\x00") {
		return damaged("attribute %d %q", b[1], rest)
	}
	if n.Xattr(name) != "" {
		return damaged("attribute %q twice", name)
	}
	if err := r.hold(len(b) + 64); err != nil {
		return err
	}
	n.Xattrs = append(n.Xattrs, Xattr{name, string(b[4+int(b[0]):])})
	return nil
}
