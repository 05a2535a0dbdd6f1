package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/safepath"
	"github.com/hako-engine/hako/snapshot"
)

// whiteoutPrefix marks a deletion (OCI image-spec, layer.md).
const whiteoutPrefix = ".wh."

// LayerOptions of WriteLayer.
type LayerOptions struct {
	// Epoch is the latest time that a file may have in the layer; nil: any.
	Epoch *time.Time
}

// WriteLayer writes what changed as a layer: a tar with whiteouts for what was deleted. What
// was added or modified is read at root, and never through a link; what is gone by now is left
// out. errdefs.ErrInvalidArgument for a file whose name is a whiteout's: it would delete another.
func WriteLayer(ctx context.Context, root *safepath.Root, changes []snapshot.Change, out io.Writer, o LayerOptions) error {
	w := layerWriter{o: o, root: root, tw: tar.NewWriter(out), links: map[[2]uint64]string{}, buf: make([]byte, 64<<10)}
	for _, ch := range changes {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if err := w.change(ch); err != nil {
			return fmt.Errorf("%s: %w", ch.Path, err)
		}
	}
	return w.tw.Close()
}

// layerWriter writes objects that it reaches only through descriptors.
type layerWriter struct {
	o     LayerOptions
	root  *safepath.Root
	tw    *tar.Writer
	links map[[2]uint64]string // device and inode → first name
	buf   []byte               // for attributes: XATTR_SIZE_MAX, and XATTR_LIST_MAX
}

func (w *layerWriter) change(ch snapshot.Change) error {
	name := strings.TrimPrefix(ch.Path, "/")
	if strings.HasPrefix(path.Base(name), whiteoutPrefix) {
		return fmt.Errorf("a file of this name cannot be in a layer, where it would delete another one: %w", errdefs.ErrInvalidArgument)
	}
	if ch.Kind == snapshot.Deleted {
		// Without a time: when something was deleted is not known.
		h := &tar.Header{Typeflag: tar.TypeReg, Name: path.Join(path.Dir(name), whiteoutPrefix+path.Base(name)), ModTime: time.Unix(0, 0), Format: tar.FormatPAX}
		return w.tw.WriteHeader(h)
	}
	f, err := w.root.Open(name, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	return w.object(f, name)
}

// object writes a header, and the content of a regular file. f was opened with O_PATH.
func (w *layerWriter) object(f *os.File, name string) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	h := &tar.Header{Name: name, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid), ModTime: w.time(st.Mtim), Format: tar.FormatPAX}
	var content *os.File
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, st.Size
	case unix.S_IFLNK:
		n, err := unix.Readlinkat(int(f.Fd()), "", w.buf)
		if err != nil {
			return err
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, string(w.buf[:n])
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeChar
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(unix.Major(uint64(st.Rdev))), int64(unix.Minor(uint64(st.Rdev)))
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	default:
		return nil // sockets mean nothing in a layer
	}
	if h.Typeflag != tar.TypeDir && st.Nlink > 1 {
		key := [2]uint64{uint64(st.Dev), st.Ino}
		if first, ok := w.links[key]; ok {
			h.Typeflag, h.Size, h.Linkname = tar.TypeLink, 0, first
		} else {
			w.links[key] = name
		}
	}
	if h.Typeflag != tar.TypeLink {
		h.PAXRecords = w.xattrs(f)
	}
	if h.Typeflag == tar.TypeReg {
		var err error
		if content, err = safepath.Reopen(f, unix.O_RDONLY|unix.O_NONBLOCK); err != nil {
			return err
		}
		defer content.Close()
	}
	if err := w.tw.WriteHeader(h); err != nil || content == nil {
		return err
	}
	n, err := io.Copy(w.tw, io.LimitReader(content, h.Size))
	if err != nil {
		return err
	}
	_, err = io.CopyN(w.tw, zeros{}, h.Size-n) // it became shorter meanwhile
	return err
}

func (w *layerWriter) time(t unix.Timespec) time.Time {
	at := time.Unix(t.Unix())
	if w.o.Epoch != nil && at.After(*w.o.Epoch) {
		return *w.o.Epoch
	}
	return at
}

// xattrs gives the attributes that a layer holds: the users' and files' capabilities, but
// not what the host's own security modules and file systems keep there.
func (w *layerWriter) xattrs(f *os.File) map[string]string {
	// Of an O_PATH descriptor through its magic link, which leads to the file itself.
	p := fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	n, err := unix.Listxattr(p, w.buf)
	if err != nil || n == 0 {
		return nil
	}
	var records map[string]string
	for name := range strings.SplitSeq(strings.TrimSuffix(string(w.buf[:n]), "\x00"), "\x00") {
		if name != "security.capability" && !strings.HasPrefix(name, "user.") || strings.HasPrefix(name, "user.overlay.") || strings.ContainsAny(name, "=\n") {
			continue
		}
		if n, err := unix.Getxattr(p, name, w.buf); err == nil {
			if records == nil {
				records = map[string]string{}
			}
			records["SCHILY.xattr."+name] = string(w.buf[:n])
		}
	}
	return records
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
