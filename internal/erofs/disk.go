package erofs

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"strings"

	"golang.org/x/sys/unix"
)

// Sizes and numbers of the format.
const (
	superOffset = 1024
	superSize   = 128
	magic       = 0xe0f5e1e2

	featureChecksum = 1 << 0 // compatible ones
	featureMtime    = 1 << 1
	featurePadding  = 1 << 0 // incompatible; of compressed files, of which the image then has none
	featureChunks   = 1 << 2
	featureDevices  = 1 << 3

	inodeSize = 64 // extended inodes
	slotSize  = 32 // unit of node numbers

	layoutPlain  = 0
	layoutInline = 2
	layoutChunks = 4

	deviceSlot = 128 // unit of the table of devices
	tagSize    = 64
	// maxDevices keeps each inode's data findable in a short walk; the format has room for 65535.
	maxDevices = 1024

	direntSize  = 12
	xattrHeader = 12
	nullBlock   = 1<<32 - 1
)

var le = binary.LittleEndian

// write writes inodes, then directories, each in one go.
func (l *layout) write(w io.WriterAt, root *Node) error {
	b := newBlocks(w, l.meta)
	for _, n := range l.nodes {
		b.padTo(n.offset)
		l.inode(b, n)
	}
	b.padTo(up(l.pos, BlockSize))
	var buf []byte
	for _, n := range l.nodes {
		if n.data == 0 {
			continue
		}
		if n.IsDir() {
			buf = l.dirData(buf[:0], n)
			b.put(buf[:n.length-int64(n.inline)])
		} else {
			b.put([]byte(n.Target))
		}
		b.padTo(up(b.pos, BlockSize))
	}
	if b.pos != l.end && b.err == nil {
		b.err = fmt.Errorf("metadata ends at %d instead of %d: %w", b.pos, l.end, errTree)
	}
	if err := b.flush(); err != nil {
		return err
	}
	if len(l.devices) > 0 {
		if _, err := w.WriteAt(l.table(), DataStart); err != nil {
			return err
		}
	}
	_, err := w.WriteAt(l.super(root), 0)
	return err
}

// table makes the table of devices.
func (l *layout) table() []byte {
	b := make([]byte, TableSize(len(l.devices)))
	for i, d := range l.devices {
		slot := b[i*deviceSlot:]
		copy(slot[:tagSize], d.Tag)
		le.PutUint32(slot[tagSize:], uint32(d.Size/BlockSize))
		le.PutUint32(slot[tagSize+4:], uint32(l.starts[i+1]/BlockSize))
	}
	return b
}

// super makes the first block.
func (l *layout) super(root *Node) []byte {
	block := make([]byte, BlockSize)
	s := block[superOffset:]
	le.PutUint32(s[0:], magic)
	le.PutUint32(s[8:], featureChecksum|featureMtime)
	s[12] = blockBits
	le.PutUint16(s[14:], uint16(l.nid(root)))
	le.PutUint64(s[16:], uint64(len(l.nodes)))
	le.PutUint32(s[36:], uint32(l.end/BlockSize))
	le.PutUint32(s[40:], uint32(l.meta/BlockSize))
	features := uint32(0)
	if l.chunks {
		features |= featureChunks
	}
	if len(l.devices) > 0 {
		features |= featureDevices
		le.PutUint16(s[86:], uint16(len(l.devices)))
		le.PutUint16(s[88:], DataStart/deviceSlot)
	}
	le.PutUint32(s[80:], features)
	le.PutUint32(s[4:], checksum(s))
	return block
}

// checksum is the CRC-32C of the superblock's block from the superblock on (s), with a
// checksum of zero, and without the complement at the end.
func checksum(s []byte) uint32 {
	table := crc32.MakeTable(crc32.Castagnoli)
	crc := crc32.Update(0, table, s[:4])
	crc = crc32.Update(crc, table, make([]byte, 4))
	return ^crc32.Update(crc, table, s[8:])
}

// nid is the node's number.
func (l *layout) nid(n *Node) uint64 { return uint64(n.offset-l.meta) / slotSize }

func (l *layout) inode(b *blocks, n *Node) {
	var i [inodeSize]byte
	format, size, addr := layoutPlain, n.length, uint32(0)
	switch n.Type() {
	case unix.S_IFREG:
		size = n.Size
		if n.Holes != nil {
			format, addr = layoutChunks, uint32(n.Holes.Bits-blockBits)
		} else if size > 0 {
			addr = uint32((l.starts[n.Device] + n.Addr) / BlockSize)
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		addr = n.Minor&0xff | n.Major<<8 | n.Minor&^0xff<<12
	default:
		if n.inline > 0 {
			format = layoutInline
		}
		addr = uint32(n.data / BlockSize)
	}
	xattrs := putXattrs(n)
	le.PutUint16(i[0:], uint16(1|format<<1))
	if len(xattrs) > 0 {
		le.PutUint16(i[2:], uint16((len(xattrs)-xattrHeader)/4+1))
	}
	le.PutUint16(i[4:], uint16(n.Mode))
	le.PutUint64(i[8:], uint64(size))
	le.PutUint32(i[16:], addr)
	le.PutUint32(i[20:], n.ino)
	putAttributes(i[:], n.Mode, n.UID, n.GID, n.Mtime)
	le.PutUint32(i[44:], n.nlink)
	b.put(i[:])
	b.put(xattrs)
	switch {
	case n.Holes != nil:
		for _, at := range n.Holes.Pieces {
			block := uint32(nullBlock)
			if at != Hole {
				block = uint32((l.starts[n.Device] + at) / BlockSize)
			}
			b.put(le.AppendUint32(nil, block))
		}
	case n.inline > 0 && n.IsDir():
		data := l.dirData(nil, n)
		b.put(data[n.length-int64(n.inline):])
	case n.inline > 0:
		b.put([]byte(n.Target))
	}
}

func putAttributes(i []byte, mode, uid, gid uint32, mtime int64) {
	le.PutUint16(i[4:], uint16(mode))
	le.PutUint32(i[24:], uid)
	le.PutUint32(i[28:], gid)
	sec, nsec := mtime/1e9, mtime%1e9
	if nsec < 0 {
		sec, nsec = sec-1, nsec+1e9
	}
	le.PutUint64(i[32:], uint64(sec))
	le.PutUint32(i[40:], uint32(nsec))
}

// Attributes are what SetAttributes changes of an inode.
type Attributes struct {
	Perm     uint32
	UID, GID uint32
	Mtime    int64 // ns since 1970
}

// SetAttributes changes an inode of a written image, which must not be mounted.
func SetAttributes(f interface {
	io.ReaderAt
	io.WriterAt
}, offset int64, a Attributes) error {
	var i [inodeSize]byte
	if _, err := f.ReadAt(i[:], offset); err != nil {
		return fmt.Errorf("read inode: %w", err)
	}
	mode := uint32(le.Uint16(i[4:]))&unix.S_IFMT | a.Perm&0o7777
	putAttributes(i[:], mode, a.UID, a.GID, a.Mtime)
	if _, err := f.WriteAt(i[:], offset); err != nil {
		return fmt.Errorf("write inode: %w", err)
	}
	return nil
}

// Info is what the superblock and the root's inode of an image say.
type Info struct {
	Size       int64 // bytes
	Nodes      int64 // number of inodes
	RootOffset int64 // of the root's inode
	Root       Attributes
}

// ReadInfo reads it of an image that Write has written.
func ReadInfo(f io.ReaderAt) (info Info, err error) {
	block, meta, end, err := readHead(f)
	if err != nil {
		return info, err
	}
	s := block[superOffset:]
	info.Size = end
	info.Nodes = int64(le.Uint64(s[16:]))
	info.RootOffset = meta + int64(le.Uint16(s[14:]))*slotSize
	var i [inodeSize]byte
	if _, err := f.ReadAt(i[:], info.RootOffset); err != nil {
		return info, fmt.Errorf("read inode: %w", err)
	}
	info.Root = Attributes{
		Perm: uint32(le.Uint16(i[4:])) & 0o7777,
		UID:  le.Uint32(i[24:]), GID: le.Uint32(i[28:]),
		Mtime: int64(le.Uint64(i[32:]))*1e9 + int64(le.Uint32(i[40:])),
	}
	return info, nil
}

// entries gives a directory's names in their order on disk, its own and its parent's among them.
func entries(n *Node) func(yield func(string, *Node) bool) {
	return func(yield func(string, *Node) bool) {
		dots := [2]string{".", ".."}
		next := 0
		for _, name := range n.sorted {
			for next < 2 && dots[next] < name {
				if !yield(dots[next], n.dot(next)) {
					return
				}
				next++
			}
			if !yield(name, n.Children[name]) {
				return
			}
		}
		for ; next < 2; next++ {
			if !yield(dots[next], n.dot(next)) {
				return
			}
		}
	}
}

func (n *Node) dot(i int) *Node {
	if i == 0 {
		return n
	}
	return n.parent
}

// dirLength is how many bytes a directory takes: blocks of entries and names, all but the
// last full.
func dirLength(n *Node) int64 {
	full, used := int64(0), 0
	for name := range entries(n) {
		need := direntSize + len(name)
		if used+need > BlockSize {
			full, used = full+BlockSize, 0
		}
		used += need
	}
	return full + int64(used)
}

// dirData appends a directory's data.
func (l *layout) dirData(buf []byte, n *Node) []byte {
	type entry struct {
		name string
		node *Node
	}
	var block []entry
	used := 0
	flush := func() {
		start := len(buf)
		at := len(block) * direntSize
		for _, e := range block {
			buf = le.AppendUint64(buf, l.nid(e.node))
			buf = le.AppendUint16(buf, uint16(at))
			buf = append(buf, direntType(e.node), 0)
			at += len(e.name)
		}
		for _, e := range block {
			buf = append(buf, e.name...)
		}
		block, used = block[:0], len(buf)-start
	}
	for name, c := range entries(n) {
		need := direntSize + len(name)
		if used+need > BlockSize {
			flush()
			buf = append(buf, make([]byte, BlockSize-used)...)
			used = 0
		}
		block = append(block, entry{name, c})
		used += need
	}
	flush()
	return buf
}

func direntType(n *Node) byte {
	switch n.Type() {
	case unix.S_IFREG:
		return 1
	case unix.S_IFDIR:
		return 2
	case unix.S_IFCHR:
		return 3
	case unix.S_IFBLK:
		return 4
	case unix.S_IFIFO:
		return 5
	case unix.S_IFSOCK:
		return 6
	case unix.S_IFLNK:
		return 7
	}
	return 0
}

// xattrPrefixes are the beginnings of names that have a number.
var xattrPrefixes = []struct {
	index  byte
	prefix string
}{{1, "user."}, {4, "trusted."}, {6, "security."}}

func splitXattr(name string) (index byte, rest string, err error) {
	for _, p := range xattrPrefixes {
		if rest, ok := strings.CutPrefix(name, p.prefix); ok && rest != "" && len(rest) <= 255 {
			return p.index, rest, nil
		}
	}
	switch name {
	case "system.posix_acl_access":
		return 2, "", nil
	case "system.posix_acl_default":
		return 3, "", nil
	}
	return 0, "", fmt.Errorf("extended attribute %q: %w", name, errTree)
}

func xattrSize(n *Node) (int, error) {
	if len(n.Xattrs) == 0 {
		return 0, nil
	}
	size := xattrHeader
	for _, x := range n.Xattrs {
		_, rest, err := splitXattr(x.Name)
		if err != nil {
			return 0, err
		}
		size += (4 + len(rest) + len(x.Value) + 3) &^ 3
	}
	if size > MaxXattrs {
		return 0, fmt.Errorf("extended attributes of %d bytes: %w", size, errTree)
	}
	return size, nil
}

func putXattrs(n *Node) []byte {
	if len(n.Xattrs) == 0 {
		return nil
	}
	b := make([]byte, xattrHeader)
	for _, x := range n.Xattrs {
		index, rest, _ := splitXattr(x.Name) // which xattrSize has checked
		b = append(b, byte(len(rest)), index)
		b = le.AppendUint16(b, uint16(len(x.Value)))
		b = append(append(b, rest...), x.Value...)
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
	}
	return b
}

// blocks writes a sequence of bytes, and zeros between them.
type blocks struct {
	w   *bufio.Writer
	pos int64
	err error
}

func newBlocks(w io.WriterAt, at int64) *blocks {
	return &blocks{w: bufio.NewWriterSize(io.NewOffsetWriter(w, at), 256<<10), pos: at}
}

func (b *blocks) put(p []byte) {
	if b.err == nil {
		_, b.err = b.w.Write(p)
	}
	b.pos += int64(len(p))
}

var zeros [BlockSize]byte

func (b *blocks) padTo(at int64) {
	if at < b.pos && b.err == nil {
		b.err = fmt.Errorf("metadata is at %d behind %d: %w", b.pos, at, errTree)
	}
	for b.pos < at {
		b.put(zeros[:min(at-b.pos, BlockSize)])
	}
}

func (b *blocks) flush() error {
	if b.err != nil {
		return b.err
	}
	return b.w.Flush()
}
