package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/safepath"
	"github.com/hako-engine/hako/store"
)

// ChangeKind tells what happened to a path. The values are those of the Docker API.
type ChangeKind int

// Kinds of changes.
const (
	Modified ChangeKind = 0
	Added    ChangeKind = 1
	Deleted  ChangeKind = 2
)

// Change is one path of a snapshot that differs from the parent.
type Change struct {
	Kind ChangeKind
	Path string // absolute, in the container
}

// maxChanges bounds the result of Changes.
const maxChanges = 4 << 20

// Changes gives what an active or committed snapshot changed of its parent, sorted by
// path: what "docker diff" shows. A directory is modified if it, or what is right
// below it, is. The container may be running.
func Changes(ctx context.Context, s snapshots.Snapshotter, key string) ([]Change, error) {
	sn, ok := s.(*Snapshotter)
	if !ok {
		return nil, fmt.Errorf("changes of snapshot %q: foreign snapshotter: %w", key, errdefs.ErrNotImplemented)
	}
	list, err := sn.changes(ctx, key)
	return list, wrap(err, "changes of snapshot %q", key)
}

func (sn *Snapshotter) changes(ctx context.Context, key string) ([]Change, error) {
	own, parents, err := sn.layers(ctx, key)
	if err != nil {
		return nil, err
	}
	if own == "" {
		return nil, nil // a view
	}
	release, err := sn.driver.show([]layer{own})
	if err != nil {
		return nil, err
	}
	defer release()
	below, releaseBelow, err := sn.driver.lower(parents)
	if err != nil {
		return nil, err
	}
	defer releaseBelow()
	upper, err := safepath.OpenRoot(sn.driver.files(own))
	if err != nil {
		return nil, err
	}
	defer upper.Close()
	d := differ{ctx: ctx, upper: upper, whole: sn.driver.whole()}
	for i, dir := range below {
		if d.whole && i > 0 {
			break // the nearest parent holds everything
		}
		r, err := safepath.OpenRoot(dir)
		if err != nil {
			return nil, err
		}
		defer r.Close()
		d.lower = append(d.lower, r)
	}
	if err := d.dir("/", folder{reported: true}); err != nil {
		return nil, err
	}
	slices.SortFunc(d.list, func(a, b Change) int { return strings.Compare(a.Path, b.Path) })
	return d.list, nil
}

// layers gives a snapshot's own directory ("" for a view of its parent) and those of
// its parents, the nearest first.
func (sn *Snapshotter) layers(ctx context.Context, key string) (own layer, parents []layer, err error) {
	ns, err := store.Namespace(ctx)
	if err != nil {
		return "", nil, err
	}
	err = sn.store.DB().View(ctx, func(tx *bolt.Tx) error {
		s := sn.section(tx, ns)
		r, err := s.get(key)
		if err != nil {
			return err
		}
		if r.ID != 0 {
			own = sn.layer(r.ID)
		}
		parents, err = sn.chain(s, r.Parent)
		return err
	})
	return own, parents, err
}

// differ compares a layer with those below it.
type differ struct {
	ctx   context.Context
	upper *safepath.Root
	lower []*safepath.Root
	whole bool // upper is not a difference but everything
	list  []Change
}

// folder is what is known of a directory when it is entered.
type folder struct {
	opaque   bool // nothing of the lower layers shows through
	fresh    bool // they have nothing of that name
	reported bool // it is in the list already
}

// dir compares a directory of the upper layer. Names are those that the kernel
// listed, and links are never followed.
func (d *differ) dir(name string, o folder) error {
	if err := d.ctx.Err(); err != nil {
		return err
	}
	f, err := d.upper.Open(name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil // replaced meanwhile
	}
	if err != nil {
		return err
	}
	o.opaque = o.opaque || isOpaque(f)
	names, err := f.Readdirnames(-1)
	f.Close()
	if err != nil {
		return err
	}
	before := len(d.list)
	for _, base := range names {
		if err := d.entry(path.Join(name, base), o); err != nil {
			return err
		}
	}
	if (o.opaque || d.whole) && !o.fresh {
		if err := d.hidden(name, names); err != nil {
			return err
		}
	}
	if len(d.list) > before && !o.reported {
		return d.add(Modified, name)
	}
	return nil
}

func (d *differ) add(k ChangeKind, name string) error {
	if len(d.list) == maxChanges {
		return fmt.Errorf("more than %d changes: %w", maxChanges, errdefs.ErrResourceExhausted)
	}
	d.list = append(d.list, Change{k, name})
	return nil
}

// entry compares one name.
func (d *differ) entry(name string, in folder) error {
	up, err := lstat(d.upper, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var low *unix.Stat_t
	var from *safepath.Root
	if !in.fresh {
		if low, from, err = d.below(name); err != nil {
			return err
		}
	}
	if isWhiteout(up) && !d.whole {
		if low == nil {
			return nil
		}
		return d.add(Deleted, name)
	}
	reported := true
	switch {
	case low == nil:
		err = d.add(Added, name)
	case d.same(name, from, up, low):
		reported = false // copied up and not changed, or a directory on the way to a change
	default:
		err = d.add(Modified, name)
	}
	if err == nil && up.Mode&unix.S_IFMT == unix.S_IFDIR {
		err = d.dir(name, folder{opaque: in.opaque, fresh: low == nil, reported: reported})
	}
	return err
}

// below finds a name in the lower layers as the container would see it without the
// upper one; nil if it is not there.
func (d *differ) below(name string) (*unix.Stat_t, *safepath.Root, error) {
	for _, r := range d.lower {
		st, hides, err := lookLower(r, name)
		if err != nil {
			return nil, nil, err
		}
		if st != nil {
			if isWhiteout(st) {
				return nil, nil, nil
			}
			return st, r, nil
		}
		if hides {
			return nil, nil, nil
		}
	}
	return nil, nil, nil
}

// lookLower looks at one layer. hides tells that it hides the name in layers below:
// an opaque directory, or something that is not a directory, on the way.
func lookLower(r *safepath.Root, name string) (st *unix.Stat_t, hides bool, err error) {
	elems := strings.Split(strings.TrimPrefix(name, "/"), "/")
	p := ""
	for i, e := range elems {
		p += "/" + e
		st, err := lstat(r, p)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
			return nil, hides, nil
		}
		if err != nil {
			return nil, false, err
		}
		if i == len(elems)-1 {
			return st, hides, nil
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return nil, true, nil
		}
		f, err := r.Open(p, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return nil, false, err
		}
		hides = hides || isOpaque(f)
		f.Close()
	}
	return nil, hides, nil
}

// hidden reports what the lower layers have in a directory and the upper one hides.
func (d *differ) hidden(name string, here []string) error {
	have := make(map[string]bool, len(here))
	for _, n := range here {
		have[n] = true
	}
	for _, r := range d.lower {
		f, err := r.Open(name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err != nil {
			continue // not a directory there
		}
		names, err := f.Readdirnames(-1)
		f.Close()
		if err != nil {
			return err
		}
		for _, n := range names {
			if have[n] {
				continue
			}
			have[n] = true
			low, _, err := d.below(path.Join(name, n))
			if err != nil {
				return err
			}
			if low == nil {
				continue
			}
			if err := d.add(Deleted, path.Join(name, n)); err != nil {
				return err
			}
		}
	}
	return nil
}

// sameContent tells whether files of one size and time of change hold the same. Tools set
// times back, and a tar has whole seconds only: then the contents are compared.
func (d *differ) sameContent(name string, from *safepath.Root, a, b *unix.Stat_t) bool {
	if a.Ino == b.Ino && a.Ctim == b.Ctim { // one inode, seen through two mounts
		return true
	}
	if d.whole && a.Mtim.Nsec != 0 {
		return true
	}
	f, err := d.upper.Open(name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	g, err := from.Open(name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer g.Close()
	x, y := make([]byte, 64<<10), make([]byte, 64<<10)
	for d.ctx.Err() == nil {
		n, err := io.ReadFull(f, x)
		m, _ := io.ReadFull(g, y)
		if !bytes.Equal(x[:n], y[:m]) {
			return false
		}
		if err != nil {
			return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		}
	}
	return false
}

// same tells whether a name is as it was below: type, owner, mode, device, size, time
// of change, contents, link target and extended attributes.
func (d *differ) same(name string, from *safepath.Root, a, b *unix.Stat_t) bool {
	if a.Mode != b.Mode || a.Uid != b.Uid || a.Gid != b.Gid || a.Rdev != b.Rdev {
		return false
	}
	switch a.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
	case unix.S_IFLNK:
		if readlink(d.upper, name) != readlink(from, name) {
			return false
		}
	case unix.S_IFREG:
		if a.Size != b.Size || a.Mtim != b.Mtim || !d.sameContent(name, from, a, b) {
			return false
		}
	}
	return bytes.Equal(xattrs(d.upper, name), xattrs(from, name))
}

func lstat(r *safepath.Root, name string) (*unix.Stat_t, error) {
	f, err := r.Open(name, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, &os.PathError{Op: "fstat", Path: name, Err: err}
	}
	return &st, nil
}

func readlink(r *safepath.Root, name string) string {
	f, err := r.Open(name, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return ""
	}
	defer f.Close()
	var buf [unix.PathMax]byte
	n, err := unix.Readlinkat(int(f.Fd()), "", buf[:])
	if err != nil {
		return ""
	}
	return string(buf[:n])
}

func isWhiteout(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}

// overlayPrefixes are of the attributes that overlayfs itself keeps.
var overlayPrefixes = []string{"trusted.overlay.", "user.overlay."}

func isOpaque(dir *os.File) bool {
	var buf [2]byte
	for _, p := range overlayPrefixes {
		n, err := unix.Fgetxattr(int(dir.Fd()), p+"opaque", buf[:])
		if err == nil && n == 1 && buf[0] == 'y' {
			return true
		}
	}
	return false
}

// xattrs gives a file's extended attributes in a form that can be compared, without
// overlayfs's own.
func xattrs(r *safepath.Root, name string) []byte {
	f, err := r.Open(name, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	// Of an O_PATH descriptor through its magic link, which leads to the file itself.
	p := fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	var buf bytes.Buffer
	for _, k := range listXattrs(p) {
		if slices.ContainsFunc(overlayPrefixes, func(p string) bool { return strings.HasPrefix(k, p) }) {
			continue
		}
		v, err := getXattr(p, k)
		if err == nil {
			fmt.Fprintf(&buf, "%d:%s=%d:", len(k), k, len(v))
			_, _ = io.Copy(&buf, bytes.NewReader(v))
		}
	}
	return buf.Bytes()
}

// listXattrs follows p, sorted.
func listXattrs(p string) []string {
	n, err := unix.Listxattr(p, nil)
	if err != nil || n == 0 {
		return nil
	}
	buf := make([]byte, n)
	if n, err = unix.Listxattr(p, buf); err != nil {
		return nil
	}
	list := strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00")
	slices.Sort(list)
	return list
}

func getXattr(p, key string) ([]byte, error) {
	n, err := unix.Getxattr(p, key, nil)
	if err != nil || n == 0 {
		return nil, err
	}
	buf := make([]byte, n)
	n, err = unix.Getxattr(p, key, buf)
	return buf[:max(n, 0)], err
}
