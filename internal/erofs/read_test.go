package erofs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// list describes a tree, with the names of one file joined.
func list(root *Node) []string {
	var out []string
	first := map[*Node]string{}
	var walk func(name string, n *Node)
	walk = func(name string, n *Node) {
		line := fmt.Sprintf("%s %o %d:%d %d %d,%d %d %q", name, n.Mode, n.UID, n.GID, n.Mtime, n.Major, n.Minor, n.Size, n.Target)
		x := slices.Clone(n.Xattrs)
		slices.SortFunc(x, func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
		line += fmt.Sprintf(" %q", x)
		if n.Type() == unix.S_IFREG {
			line += fmt.Sprintf(" %d+%d", n.Device, n.Addr)
			if n.Holes != nil {
				line += fmt.Sprint(" ", n.Holes.Bits, n.Holes.Pieces)
			}
		}
		if f, ok := first[n]; ok {
			line += " = " + f
		} else {
			first[n] = name
		}
		out = append(out, line)
		names := make([]string, 0, len(n.Children))
		for c := range n.Children {
			names = append(names, c)
		}
		slices.Sort(names)
		for _, c := range names {
			walk(name+"/"+c, n.Children[c])
		}
	}
	walk("", root)
	return out
}

// randomTree makes a tree whose data would be in the first size bytes.
func randomTree(r *rand.Rand, size int64, depth int) *Node {
	n := NewDir(uint32(r.Intn(0o10000)))
	n.UID, n.GID, n.Mtime = uint32(r.Intn(1<<20)), uint32(r.Intn(9)), r.Int63n(1<<60)
	if r.Intn(4) == 0 {
		n.SetXattr("user.x", strings.Repeat("v", r.Intn(300)))
	}
	count := r.Intn(12)
	if r.Intn(8) == 0 {
		count, depth = 400, 0 // more than one block
	}
	var last *Node
	for i := range count {
		name := fmt.Sprintf("%d-%s", i, strings.Repeat("n", r.Intn(40)))
		var c *Node
		switch k := r.Intn(9); {
		case k < 2 && depth > 0:
			c = randomTree(r, size, depth-1)
		case k == 2:
			c = &Node{Mode: unix.S_IFLNK | 0o777, Target: strings.Repeat("t", 1+r.Intn(BlockSize-2))}
		case k == 3:
			c = &Node{Mode: unix.S_IFCHR | 0o600, Major: uint32(r.Intn(1 << 12)), Minor: uint32(r.Intn(1 << 20))}
		case k == 4 && last != nil:
			c = last
		case k == 5:
			h := &Holes{Bits: 12 + uint(r.Intn(3))}
			for range 1 + r.Intn(20) {
				at := int64(Hole)
				if r.Intn(2) == 0 {
					at = (1 + r.Int63n(size/BlockSize-9)) * BlockSize
				}
				h.Pieces = append(h.Pieces, at)
			}
			c = &Node{Mode: unix.S_IFREG | 0o644, Size: int64(len(h.Pieces)) << h.Bits, Holes: h}
		case k == 6:
			c = &Node{Mode: unix.S_IFIFO | 0o600}
		default:
			c = &Node{Mode: unix.S_IFREG | uint32(r.Intn(0o10000)), Size: r.Int63n(8 * BlockSize), Mtime: r.Int63n(1 << 60), UID: 7}
			if c.Size > 0 {
				c.Addr = (1 + r.Int63n(size/BlockSize-9)) * BlockSize
			}
			c.SetXattr("security.capability", "c")
			c.SetXattr("system.posix_acl_access", "acl")
			last = c
		}
		n.Children[name] = c
	}
	return n
}

func imageFile(t testing.TB, name string, root *Node, at int64, devices ...Device) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), name))
	must(t, err)
	t.Cleanup(func() { f.Close() })
	_, _, err = Write(f, root, at, devices...)
	must(t, err)
	return f
}

func readFile(t testing.TB, f *os.File, first int) Image {
	t.Helper()
	st, err := f.Stat()
	must(t, err)
	img, err := Read(f, st.Size(), first, ReadLimits{})
	must(t, err)
	return img
}

func TestReadIsWrite(t *testing.T) {
	t.Parallel()
	for seed := range int64(40) {
		r := rand.New(rand.NewSource(seed))
		const data = 64 * BlockSize
		root := randomTree(r, data, 4)
		devices := []Device{{"one", 8 * BlockSize}, {"two", 1 << 30}}
		in := root.Children
		in["device"] = &Node{Mode: unix.S_IFREG, Size: 1 << 29, Addr: 1 << 28, Device: 2}
		in["last"] = &Node{Mode: unix.S_IFREG, Size: BlockSize, Addr: 7 * BlockSize, Device: 1}
		want := list(root)
		img := readFile(t, imageFile(t, "image", root, data, devices...), 0)
		if got := list(img.Root); !slices.Equal(got, want) {
			t.Errorf("seed %d: wrote\n%s\nread\n%s", seed, strings.Join(want, "\n"), strings.Join(got, "\n"))
		}
		if !slices.Equal(img.Devices, devices) {
			t.Errorf("devices %v", img.Devices)
		}
	}
}

// A short image in the form of other programs: short inodes, data behind inodes, blocks of 512 bytes.
func TestReadOthers(t *testing.T) {
	t.Parallel()
	img := otherImage()
	got, err := Read(bytes.NewReader(img), int64(len(img)), 0, ReadLimits{})
	must(t, err)
	f := got.Root.Children["file"]
	if f == nil || f.Size != 520 || f.UID != 3 || f.Mtime != 9e9 || len(f.Extents) != 2 {
		t.Fatalf("%+v", f)
	}
	if want := []Extent{{2048, 512}, {1536 + 64 + 16, 8}}; !slices.Equal(f.Extents, want) {
		t.Errorf("extents %v", f.Extents)
	}
	if f.Xattr("user.shared") != "yes" {
		t.Errorf("attributes %q", f.Xattrs)
	}
}

func otherImage() []byte {
	b := make([]byte, 2560)
	s := b[1024:]
	put16, put32, put64 := binary.LittleEndian.PutUint16, binary.LittleEndian.PutUint32, binary.LittleEndian.PutUint64
	put32(s, magic)
	s[12] = 9
	put64(s[24:], 9)
	put32(s[40:], 3) // metadata at 1536
	put32(s[44:], 3)
	put32(s[80:], featurePadding)
	inode := func(nid int, layout, xattrs, mode int, size, addr uint32) []byte {
		i := b[1536+32*nid:]
		put16(i, uint16(layout<<1))
		put16(i[2:], uint16(xattrs))
		put16(i[4:], uint16(mode))
		put32(i[8:], size)
		put32(i[16:], addr)
		put16(i[24:], 3)
		return i
	}
	put16(s[14:], 10)
	root := inode(10, layoutInline, 0, unix.S_IFDIR|0o755, 0, 0)
	entries := []struct {
		nid  uint64
		name string
	}{{10, "."}, {10, ".."}, {1, "file"}}
	at := 36
	for i, e := range entries {
		put64(root[32+12*i:], e.nid)
		put16(root[32+12*i+8:], uint16(at))
		at += copy(root[32+at:], e.name)
	}
	put32(root[8:], uint32(at))
	// The file: a short inode, a shared attribute (its number behind the header), the end of its data.
	file := inode(1, layoutInline, 2, unix.S_IFREG|0o600, 520, 4)
	file[32+4] = 1
	put32(file[32+12:], 20*32/4)
	shared := b[1536+20*32:]
	shared[0], shared[1] = 6, 1
	put16(shared[2:], 3)
	copy(shared[4:], "sharedyes")
	return b
}

func TestReadRefuses(t *testing.T) {
	t.Parallel()
	root := NewDir(0o755)
	root.Children["d"] = NewDir(0o755)
	root.Children["f"] = &Node{Mode: unix.S_IFREG, Size: 5, Addr: BlockSize}
	f := imageFile(t, "image", root, 2*BlockSize)
	b, err := os.ReadFile(f.Name())
	must(t, err)
	inodeOf := func(name string) int { return int(root.Children[name].Offset()) }
	for name, change := range map[string]func(b []byte){
		"magic":            func(b []byte) { b[1024]++ },
		"checksum":         func(b []byte) { b[1024+60]++ },
		"data outside":     func(b []byte) { b[inodeOf("f")+16] = 200 },
		"size outside":     func(b []byte) { b[inodeOf("f")+13] = 9 },
		"compressed":       func(b []byte) { b[inodeOf("f")] = 1 | 3<<1 },
		"unknown type":     func(b []byte) { b[inodeOf("f")+5] = 0xf0 },
		"attributes":       func(b []byte) { b[inodeOf("f")+2] = 200; b[inodeOf("f")+3] = 200 },
		"directory's size": func(b []byte) { b[inodeOf("d")+9] = 0xff },
		"a loop": func(b []byte) {
			i := bytes.LastIndex(b, []byte("...df")) // names of the root
			binary.LittleEndian.PutUint64(b[i-48+24:], 2)
		},
	} {
		c := bytes.Clone(b)
		change(c)
		if _, err := Read(bytes.NewReader(c), int64(len(c)), 0, ReadLimits{}); !IsDamaged(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, l := range []ReadLimits{{Nodes: 1}, {Held: 300}} {
		if _, err := Read(bytes.NewReader(b), int64(len(b)), 0, l); !IsDamaged(err) {
			t.Errorf("%+v: %v", l, err)
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add(otherImage())
	// Small, because the fuzzer is as slow as its inputs are long; what it makes smaller by itself takes
	// all of its time without -fuzzminimizetime, which scripts/fuzz.sh sets.
	for seed := range int64(4) {
		r := rand.New(rand.NewSource(seed))
		img := imageFile(f, "image", randomTree(r, 11*BlockSize, 0), 11*BlockSize, Device{"d", BlockSize})
		b, err := os.ReadFile(img.Name())
		must(f, err)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		// The checksum is no secret.
		if len(b) >= BlockSize {
			s := b[superOffset:BlockSize]
			le.PutUint32(s[4:], checksum(s))
		}
		img, err := Read(bytes.NewReader(b), int64(len(b)), 0, ReadLimits{Nodes: 1000, Held: 1 << 20})
		if err != nil {
			return
		}
		// What was believed can be written, once data that lies anywhere has been copied.
		var place func(n *Node)
		place = func(n *Node) {
			if n.Extents != nil {
				n.Extents, n.Addr = nil, BlockSize
			}
			for _, c := range n.Children {
				place(c)
			}
		}
		place(img.Root)
		for i := range img.Devices {
			img.Devices[i].Tag, img.Devices[i].Size = "t", up(img.Devices[i].Size, BlockSize)
		}
		out := writerAt{}
		if _, _, err := Write(&out, Over(nil, img.Root), DataStart+TableSize(len(img.Devices)), img.Devices...); err != nil {
			t.Errorf("cannot be written: %v", err)
		}
	})
}

// writerAt takes everything.
type writerAt struct{}

func (*writerAt) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
