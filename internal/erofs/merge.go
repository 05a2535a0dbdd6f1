package erofs

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"strings"
)

// overlayPrefix is that of the attributes in which overlayfs notes how layers stand upon each other;
// opaqueXattr, if "y", that a directory hides what is below it.
const (
	overlayPrefix = "trusted.overlay."
	opaqueXattr   = overlayPrefix + "opaque"
)

// Over puts a layer upon the tree of those below it (nil: there is none), as overlayfs would
// show them, and gives the tree of both: up, without the marks of what it deletes. low must not
// be used any more.
func Over(low, up *Node) *Node {
	opaque := up.Xattr(opaqueXattr) == "y"
	for i := 0; i < len(up.Xattrs); {
		if strings.HasPrefix(up.Xattrs[i].Name, overlayPrefix) {
			up.Xattrs = append(up.Xattrs[:i:i], up.Xattrs[i+1:]...)
		} else {
			i++
		}
	}
	if opaque || low != nil && !low.IsDir() {
		low = nil
	}
	for name, c := range up.Children {
		switch {
		case c.IsWhiteout():
			delete(up.Children, name)
			if low != nil {
				delete(low.Children, name)
			}
		case c.IsDir():
			var below *Node
			if low != nil {
				below = low.Children[name]
			}
			Over(below, c)
		}
	}
	if low != nil {
		for name, c := range low.Children {
			if up.Children[name] == nil {
				up.Children[name] = c
			}
		}
	}
	return up
}

// Part is a layer to merge.
type Part struct {
	Tag  string // of the layer's file; those of its devices follow it in the table, with tags of their own
	File *os.File
}

// Merge writes one file system to out, an empty file, which shows what an overlay of the layers
// would, the lowest first. It has metadata only: the files' data stay in the layers' files, which are its
// devices, in this order, each followed by its own devices.
func Merge(out *os.File, layers []Part) error {
	var devices []Device
	var root *Node
	for _, l := range layers {
		st, err := l.File.Stat()
		if err != nil {
			return err
		}
		img, err := Read(l.File, st.Size(), len(devices)+1, ReadLimits{})
		if err != nil {
			return fmt.Errorf("%s: %w", l.File.Name(), err)
		}
		devices = append(append(devices, Device{Tag: l.Tag, Size: up(st.Size(), BlockSize)}), img.Devices...)
		root = Over(root, img.Root)
	}
	if root == nil {
		return errTree
	}
	at := DataStart + TableSize(len(devices))
	if _, _, err := Write(out, root, at, devices...); err != nil {
		return err
	}
	return sign(out)
}

// sign notes in the superblock what the rest of the image is. As its UUID, so that overlayfs does not
// take a file of one version of an image for one of another.
func sign(f *os.File) error {
	block := make([]byte, BlockSize)
	if _, err := f.ReadAt(block, 0); err != nil {
		return err
	}
	sum, err := sumOf(f)
	if err != nil {
		return err
	}
	s := block[superOffset:]
	copy(s[48:64], sum)
	le.PutUint32(s[4:], checksum(s))
	_, err = f.WriteAt(block, 0)
	return err
}

func sumOf(f io.ReaderAt) ([]byte, error) {
	var h hash.Hash = sha256.New()
	if _, err := io.CopyBuffer(struct{ io.Writer }{h}, io.NewSectionReader(f, BlockSize, 1<<62), make([]byte, 1<<20)); err != nil {
		return nil, err
	}
	return h.Sum(nil)[:16], nil
}

// ReadMerged gives the devices of an image that Merge has written, whole and unchanged, or ErrFormat.
func ReadMerged(f *os.File) ([]Device, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	r := reader{f: f, size: st.Size()}
	if err := r.super(); err != nil {
		return nil, err
	}
	sum, err := sumOf(f)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(sum, r.uuid[:]) {
		return nil, damaged("its contents are not what was written")
	}
	return r.devices, nil
}

// IsDamaged tells whether an error is about what an image holds.
func IsDamaged(err error) bool { return errors.Is(err, ErrFormat) || errors.Is(err, ErrUnsupported) }
