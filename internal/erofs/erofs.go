// Package erofs writes, reads and merges file system images in the EROFS format (kernel
// documentation, filesystems/erofs; the on-disk structures are those of fs/erofs/erofs_fs.h).
//
// In flow a tree of nodes, whose files' data is in the image already, or in other files
// ("devices"), and an open file; out flow the metadata behind that data, and the superblock
// before it. Metadata that came from elsewhere is read here and written anew: what the kernel
// will parse was written here.
//
//	0      superblock (at 1024)
//	4096   the table of devices, if there are any
//	...    data of files, each at a block boundary
//	...    inodes, with extended attributes, short directories, links' targets
//	...    longer directories
package erofs

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// BlockSize is the unit of addresses, in bytes. The smaller blocks that EROFS also knows
	// would take a tar's data as it lies, but programs read a file in pieces of its block
	// size (st_blksize), and kernels before 6.4 mount no others.
	BlockSize = 4096
	blockBits = 12
	// DataStart is where the data of files may begin.
	DataStart = BlockSize

	// MaxName is the longest name of a directory's entry.
	MaxName = 255
	// MaxXattrs is how many bytes the extended attributes of a node may take, names, values and
	// padding.
	MaxXattrs = 64 << 10
)

// Node is a file of any type. The same node in several directories is a file with
// several names.
type Node struct {
	Mode     uint32 // type and permissions, as in stat(2)
	UID, GID uint32
	Mtime    int64  // ns since 1970
	Major    uint32 // of a device
	Minor    uint32
	Size     int64  // bytes in a regular file
	Device   int    // that has the data: 0 is the image itself, else 1 + the place in the table
	Addr     int64  // where its data begins in the device: a multiple of BlockSize
	Holes    *Holes // of a file that is not in one piece: Addr says nothing
	// Extents are set by Read where neither Addr nor Holes can say where the data is: it has to
	// be copied before the tree can be written.
	Extents  []Extent
	Target   string // of a symbolic link
	Xattrs   []Xattr
	Children map[string]*Node // of a directory

	sorted []string
	parent *Node // of a directory: the first found
	nlink  uint32
	ino    uint32
	offset int64 // of the inode in the image
	data   int64 // where full blocks of a directory, or a long target, are
	length int64 // bytes of a directory's data
	inline int   // bytes of it behind the inode
}

// Holes is the map of a file with holes: addresses of pieces of 1<<Bits bytes, Hole for those
// that are all zeros.
type Holes struct {
	Bits   uint // at least 12
	Pieces []int64
}

// Hole stands for the address of a piece of zeros.
const Hole = -1

// Extent is a piece of a file's data, Size bytes at any address At, or Hole.
type Extent struct{ At, Size int64 }

// Device is a file beside the image that has data of its files.
type Device struct {
	Tag  string // says which one it is: at most 64 bytes, none of them zero
	Size int64  // bytes, a multiple of BlockSize
}

// TableSize is how many bytes the table of n devices takes, at DataStart.
func TableSize(n int) int64 { return up(int64(n)*deviceSlot, BlockSize) }

// Xattr is an extended attribute with its full name.
type Xattr struct{ Name, Value string }

// NewDir gives an empty directory.
func NewDir(perm uint32) *Node {
	return &Node{Mode: unix.S_IFDIR | perm, Children: map[string]*Node{}}
}

// Type gives the node's type, S_IFREG and so on.
func (n *Node) Type() uint32 { return n.Mode & unix.S_IFMT }

// IsDir tells whether n is a directory.
func (n *Node) IsDir() bool { return n.Type() == unix.S_IFDIR }

// IsWhiteout tells whether n is overlayfs's mark of a removed name.
func (n *Node) IsWhiteout() bool {
	return n.Type() == unix.S_IFCHR && n.Major == 0 && n.Minor == 0
}

// Offset is where Write put the node's inode; see SetAttributes.
func (n *Node) Offset() int64 { return n.offset }

// SetXattr adds an attribute or replaces its value.
func (n *Node) SetXattr(name, value string) {
	for i := range n.Xattrs {
		if n.Xattrs[i].Name == name {
			n.Xattrs[i].Value = value
			return
		}
	}
	n.Xattrs = append(n.Xattrs, Xattr{name, value})
}

// Xattr gives the value of an attribute, "" if there is none.
func (n *Node) Xattr(name string) string {
	for _, x := range n.Xattrs {
		if x.Name == name {
			return x.Value
		}
	}
	return ""
}

var errTree = errors.New("not a tree that can be written")

// Write writes the metadata of a tree at the offset at (a multiple of BlockSize, behind the
// table of devices and the data) and the superblock, and returns where the image ends and how many inodes it has. The tree must not change
// any more afterwards.
func Write(w io.WriterAt, root *Node, at int64, devices ...Device) (end, nodes int64, err error) {
	if at%BlockSize != 0 || at < DataStart+TableSize(len(devices)) || len(devices) > maxDevices || !root.IsDir() {
		return 0, 0, errTree
	}
	l := layout{meta: at, pos: at + rootOffset, devices: devices}
	if err := l.plan(root); err != nil {
		return 0, 0, fmt.Errorf("write EROFS image: %w", err)
	}
	l.placeData()
	l.starts = append(l.starts, 0)
	last := l.end
	for _, d := range devices {
		if d.Size < 0 || d.Size%BlockSize != 0 || d.Tag == "" || len(d.Tag) > tagSize {
			return 0, 0, fmt.Errorf("write EROFS image: device %q of %d bytes: %w", d.Tag, d.Size, errTree)
		}
		l.starts = append(l.starts, last)
		last += d.Size
	}
	if last/BlockSize >= 1<<32-1 {
		return 0, 0, fmt.Errorf("write EROFS image: %d bytes: %w", last, errTree)
	}
	if err := l.write(w, root); err != nil {
		return 0, 0, fmt.Errorf("write EROFS image: %w", err)
	}
	return l.end, int64(len(l.nodes)), nil
}

// rootOffset is where the root's inode is in the metadata. Not at its beginning: a node's
// number follows from its place, and programs take the number 0 for a removed entry.
const rootOffset = 64

type layout struct {
	meta    int64
	pos     int64
	end     int64
	nodes   []*Node // in the order of their inodes
	chunks  bool
	devices []Device
	starts  []int64 // of the devices in one space of addresses that all share, the image's first
}

// plan gives every node its inode's place: those of a directory side by side, so that
// listing them reads a few blocks.
func (l *layout) plan(root *Node) error {
	root.parent = root
	if err := l.node(root); err != nil {
		return err
	}
	queue := []*Node{root}
	for len(queue) > 0 {
		dir := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		for _, name := range slices.Backward(dir.sorted) {
			c := dir.Children[name]
			if c.IsDir() {
				if c.parent != nil {
					return fmt.Errorf("directory with two names, one is %q: %w", name, errTree)
				}
				c.parent = dir
				queue = append(queue, c)
			}
		}
		for _, name := range dir.sorted {
			c := dir.Children[name]
			if c.offset != 0 {
				c.nlink++
				continue
			}
			if err := l.node(c); err != nil {
				return fmt.Errorf("%q: %w", name, err)
			}
		}
	}
	return nil
}

// node plans one inode.
func (l *layout) node(n *Node) error {
	if len(l.nodes) >= 1<<31 {
		return fmt.Errorf("too many nodes: %w", errTree)
	}
	n.nlink = 1
	size, err := xattrSize(n)
	if err != nil {
		return err
	}
	size += inodeSize
	switch {
	case n.IsDir():
		n.nlink = 2
		n.sorted = make([]string, 0, len(n.Children))
		for name, c := range n.Children {
			if name == "" || len(name) > MaxName || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
				return fmt.Errorf("name %q: %w", name, errTree)
			}
			if c.IsDir() {
				n.nlink++
			}
			n.sorted = append(n.sorted, name)
		}
		slices.Sort(n.sorted)
		n.length = dirLength(n)
	case n.Type() == unix.S_IFLNK:
		n.length = int64(len(n.Target))
		if n.length == 0 || n.length > BlockSize {
			return fmt.Errorf("target of %d bytes: %w", n.length, errTree)
		}
	case n.Type() == unix.S_IFREG:
		if n.Size < 0 || n.Addr < 0 || n.Addr%BlockSize != 0 || n.Extents != nil || n.Device < 0 || n.Device > len(l.devices) {
			return fmt.Errorf("data of %d bytes at %d: %w", n.Size, n.Addr, errTree)
		}
		if h := n.Holes; h != nil {
			if h.Bits < blockBits || h.Bits > blockBits+31 || int64(len(h.Pieces)) != (n.Size+1<<h.Bits-1)>>h.Bits {
				return fmt.Errorf("map of %d holes: %w", len(h.Pieces), errTree)
			}
			l.chunks = true
			size += 4 * len(h.Pieces)
		}
	}
	tail := int(n.length % BlockSize)
	if tail > 0 && size+tail <= BlockSize {
		n.inline = tail
	}
	off := int(l.pos % BlockSize)
	// Neither the inode itself nor what is inline may lie across the end of a block.
	if off+inodeSize > BlockSize || n.inline > 0 && off+size+n.inline > BlockSize {
		l.pos = up(l.pos, BlockSize)
	}
	n.offset, n.ino = l.pos, uint32(len(l.nodes)+1)
	l.pos = up(l.pos+int64(size+n.inline), slotSize)
	l.nodes = append(l.nodes, n)
	return nil
}

// placeData puts what did not fit behind inodes at the end.
func (l *layout) placeData() {
	l.end = up(l.pos, BlockSize)
	for _, n := range l.nodes {
		if rest := n.length - int64(n.inline); rest > 0 {
			n.data = l.end
			l.end += up(rest, BlockSize)
		}
	}
}

func up(n, unit int64) int64 { return (n + unit - 1) / unit * unit }
