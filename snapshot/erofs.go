package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/durable"
	"github.com/hako-engine/hako/internal/erofs"
	"github.com/hako-engine/hako/store"
)

// NewErofs opens the snapshotter of EROFS images below root. state is where it mounts
// them: a directory that need not survive a reboot, and that nobody else uses. What is
// said of the names of directories at NewOverlay holds for both.
//
// A committed layer is an image in one file. While a snapshot builds upon it, it is mounted
// once for all, at state/N, or with all layers below it at state/N.merged; what the snapshotter gives to mount is a plain overlay of such
// directories, which any client can mount. The kernel only ever reads metadata that was
// written here (internal/erofs).
func NewErofs(root, state string, s *store.Store, o ErofsOptions) (*Snapshotter, error) {
	state, err := filepath.Abs(state)
	if err != nil {
		return nil, fmt.Errorf("open snapshotter erofs: %w", err)
	}
	root, err = filepath.Abs(root)
	if err != nil {
		return nil, fmt.Errorf("open snapshotter erofs: %w", err)
	}
	for _, dir := range []string{root, state} {
		if err := checkOverlayDir(dir); err != nil {
			return nil, fmt.Errorf("open snapshotter erofs: %w", err)
		}
	}
	if err := os.MkdirAll(state, 0o700); err != nil {
		return nil, fmt.Errorf("open snapshotter erofs: %w", err)
	}
	return open("erofs", root, s, newImages(state, o))
}

// ErofsOptions are of NewErofs.
type ErofsOptions struct {
	// MergeFrom is the number of layers from which on they are merged into one file system.
	// 0: where that was measured to pay; negative: never.
	MergeFrom int
	// Loop mounts through loop devices, as on kernels that do not mount files (before Linux 6.12).
	Loop bool
}

func newImages(state string, o ErofsOptions) *images {
	d := &images{overlay: overlay{options: layerOptions()}, state: state, pins: map[layer]int{}, mount: erofs.Mount, merged: newMerges(o.MergeFrom)}
	if o.Loop {
		d.mount = erofs.MountLoop
	}
	return d
}

// ErofsSupported tries whether the kernel mounts an EROFS image that lies in root, which must
// exist, below an overlay whose upper directory is there, and tells why not.
func ErofsSupported(root string) (err error) {
	if err := OverlaySupported(root); err != nil {
		return err
	}
	return erofs.Supported(root)
}

// images keeps committed layers as images. Those of directories that clients filled stay
// directories until their commit.
type images struct {
	overlay
	state string
	mount func(image string, devices ...string) (*os.File, error)

	// mu is held while mounts are made and ended.
	mu   sync.Mutex
	pins map[layer]int // layers in use by calls under way

	merged merges
}

// image is the file of a committed layer.
func (l layer) image() string { return filepath.Join(string(l), "layer.erofs") }

// partial is the image while it is written.
func (l layer) partial() string { return filepath.Join(string(l), "layer.part") }

// made is there if the image was made of the layer's directory, by a commit. If that failed the client may have gone
// on with the directory since.
func (l layer) made() string { return filepath.Join(string(l), "layer.made") }

func (d *images) mountPoint(l layer) string { return filepath.Join(d.state, filepath.Base(string(l))) }

// files is called for layers that are shown.
func (d *images) files(l layer) string {
	if _, err := os.Lstat(l.image()); err == nil {
		return d.mountPoint(l)
	}
	return l.fs()
}

func (d *images) show(layers []layer) (release func(), err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, l := range layers {
		if err := d.mountLayer(l); err != nil {
			return nil, err
		}
	}
	return d.pin(layers), nil
}

// pin keeps what is mounted of layers until release is called. d.mu is held.
func (d *images) pin(layers []layer) (release func()) {
	for _, l := range layers {
		d.pins[l]++
	}
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		for _, l := range layers {
			if d.pins[l]--; d.pins[l] == 0 {
				delete(d.pins, l)
			}
		}
	}
}

// mountLayer mounts an image unless it is mounted.
func (d *images) mountLayer(l layer) error {
	at := d.mountPoint(l)
	if mounted(at) {
		return nil
	}
	if there, err := exists(l.image()); err != nil || !there {
		return err
	}
	if err := os.MkdirAll(at, 0o700); err != nil {
		return err
	}
	m, err := d.mount(l.image())
	if err != nil {
		return err
	}
	return attach(m, at)
}

// attach puts a mount, which it closes, at a mount point.
func attach(m *os.File, at string) error {
	defer m.Close()
	return os.NewSyscallError("move_mount", unix.MoveMount(int(m.Fd()), "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH))
}

// mounted tells whether an image is mounted at a mount point. Nobody else mounts there.
func mounted(at string) bool {
	var st unix.Statfs_t
	return unix.Statfs(at, &st) == nil && st.Type == erofs.Magic
}

func (d *images) hide(used func() (map[layer]bool, error)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	entries, err := os.ReadDir(d.state)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil || len(entries) == 0 {
		return err
	}
	keep, err := used()
	if err != nil {
		return err
	}
	in := make(map[string]bool, len(keep)+len(d.pins))
	for l := range keep {
		in[filepath.Base(string(l))] = true
	}
	for l := range d.pins {
		in[filepath.Base(string(l))] = true
	}
	d.forgetMerged(in)
	var errs []error
	for _, e := range entries {
		if !in[strings.TrimSuffix(e.Name(), mergedSuffix)] {
			errs = append(errs, unmount(filepath.Join(d.state, e.Name())))
		}
	}
	return errors.Join(errs...)
}

func (d *images) drop(l layer) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return errors.Join(unmount(d.mountPoint(l)), d.dropMerged(l))
}

// isGiven tells whether the image of an active layer is what that holds (LayerFile).
func isGiven(l layer) (bool, error) {
	made, err := exists(l.made())
	if err != nil || made {
		return false, err
	}
	return exists(l.image())
}

// unmount removes a mount point with what is mounted there. Overlays that stand upon it have
// the mount for themselves and go on to work.
func unmount(at string) error {
	for range 8 {
		err := unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINVAL) {
			return &os.PathError{Op: "unmount", Path: at, Err: err}
		}
		if err != nil {
			break // nothing is mounted any more
		}
	}
	if err := os.Remove(at); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// UnmountAll ends the mounts of a state directory: when no container runs any more, and no
// snapshotter is open.
func UnmountAll(state string) error {
	entries, err := os.ReadDir(state)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, e := range entries {
		errs = append(errs, unmount(filepath.Join(state, e.Name())))
	}
	return errors.Join(errs...)
}

// rebase gives an image's root what a directory's gets.
func (d *images) rebase(_ context.Context, l layer, below []string) error {
	if len(below) == 0 {
		return nil
	}
	if given, err := isGiven(l); err != nil {
		return err
	} else if !given {
		return inheritRoot(below[0], l.fs())
	}
	f, err := os.OpenFile(l.image(), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := erofs.ReadInfo(f)
	if err != nil {
		return fmt.Errorf("%s: %w: %w", l.image(), err, errdefs.ErrDataLoss)
	}
	root := info.Root
	var st unix.Stat_t
	if err := unix.Lstat(below[0], &st); err != nil {
		return err
	}
	if !defaultRoot(root.UID, root.GID, root.Perm) || defaultRoot(st.Uid, st.Gid, st.Mode&0o7777) {
		return nil
	}
	root.UID, root.GID, root.Perm = st.Uid, st.Gid, st.Mode&0o7777
	if err := erofs.SetAttributes(f, info.RootOffset, root); err != nil {
		return err
	}
	if err := erofs.Reseal(f); err != nil {
		return err
	}
	return f.Sync()
}

// seal makes an image of a directory.
func (d *images) seal(ctx context.Context, l layer) (sealed, error) {
	given, err := isGiven(l)
	if err != nil {
		return sealed{}, err
	}
	if !given {
		if err := imageOf(ctx, l); err != nil {
			return sealed{}, err
		}
	}
	u, err := imageUsage(l.image())
	return sealed{durable: true, usage: &u}, err
}

// imageUsage is what an image takes up, and the number of files in it.
func imageUsage(name string) (u snapshots.Usage, err error) {
	f, err := os.Open(name)
	if err != nil {
		return u, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return u, &os.PathError{Op: "fstat", Path: name, Err: err}
	}
	info, err := erofs.ReadInfo(f)
	if err != nil {
		return u, fmt.Errorf("%s: %w: %w", name, err, errdefs.ErrDataLoss)
	}
	return snapshots.Usage{Size: st.Blocks * 512, Inodes: info.Nodes}, nil
}

// verifyImage reads an image from end to end, and compares it with what was noted when it was
// written, and the number of its files with what was recorded.
func verifyImage(name string, inodes int64) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if err := erofs.Verify(f, st.Size()); err != nil {
		return err
	}
	info, err := erofs.ReadInfo(f)
	if err != nil {
		return err
	}
	if info.Nodes < inodes {
		return fmt.Errorf("it has %d files, had %d when it was committed", info.Nodes, inodes)
	}
	return nil
}

// tidy removes what the image was made of.
func (d *images) tidy(l layer) error {
	return errors.Join(os.RemoveAll(l.fs()), os.RemoveAll(l.work()), os.RemoveAll(l.partial()), os.RemoveAll(l.made()))
}

// checkOverlayDir looks whether overlayfs's options can name directories below dir.
func checkOverlayDir(dir string) error {
	if strings.ContainsAny(dir, "\\:,") {
		return fmt.Errorf("directory %q has a backslash, colon or comma in its name: %w", dir, errdefs.ErrInvalidArgument)
	}
	if longest := layer(filepath.Join(dir, "snapshots", "18446744073709551615")).work(); len(longest) > maxOption {
		return fmt.Errorf("directory %q: its layers' names would be longer than %d bytes: %w", dir, maxOption, errdefs.ErrInvalidArgument)
	}
	return nil
}

// LayerFile is the image of a layer while it is written, in place of files in the
// directory of its active snapshot.
type LayerFile struct {
	*os.File
	l layer
}

// NewLayerFile begins an image for an active snapshot without parent: what the snapshot will
// hold when it is committed. It returns nil if the snapshotter keeps no images. The caller
// writes a whole image, Seals it, and closes it in any case.
func (sn *Snapshotter) NewLayerFile(ctx context.Context, key string) (*LayerFile, error) {
	if _, ok := sn.driver.(*images); !ok {
		return nil, nil
	}
	ns, err := store.Namespace(ctx)
	if err != nil {
		return nil, err
	}
	var r record
	err = sn.store.DB().View(ctx, func(tx *bolt.Tx) (err error) {
		r, err = sn.section(tx, ns).get(key)
		return err
	})
	if err == nil && (r.kind() != snapshots.KindActive || r.Parent != "") {
		err = fmt.Errorf("it is not active, or has a parent: %w", errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return nil, wrap(err, "layer file of snapshot %q", key)
	}
	l := sn.layer(r.ID)
	f, err := os.OpenFile(l.partial(), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, wrap(err, "layer file of snapshot %q", key)
	}
	return &LayerFile{f, l}, nil
}

// Seal makes the image durable, and the snapshot's contents.
func (f *LayerFile) Seal() error {
	return wrap(publish(f.File, f.l, false), "layer file %s", f.Name())
}

// publish gives the image its name. made tells that it was made of the layer's directory.
func publish(f *os.File, l layer, made bool) error {
	if err := f.Sync(); err != nil {
		return err
	}
	if made {
		if err := os.WriteFile(l.made(), nil, 0o600); err != nil {
			return err
		}
	}
	if err := os.Rename(l.partial(), l.image()); err != nil {
		return err
	}
	if !made {
		if err := os.RemoveAll(l.made()); err != nil {
			return err
		}
	}
	return errors.Join(durable.SyncDir(string(l)), durable.SyncDir(filepath.Dir(string(l))))
}
