package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/durable"
	"github.com/hako-engine/hako/store"
)

// maxOption is the longest string that fsconfig(2) takes, in bytes.
const maxOption = 255

// NewOverlay opens the overlayfs snapshotter below root. root must not hold
// characters that overlayfs's mount options give a meaning to (backslash, colon, comma).
func NewOverlay(root string, s *store.Store) (*Snapshotter, error) {
	abs, err := filepath.Abs(root)
	if err != nil {
		return nil, fmt.Errorf("open snapshotter overlayfs: %w", err)
	}
	if err := checkOverlayDir(abs); err != nil {
		return nil, fmt.Errorf("open snapshotter overlayfs: %w", err)
	}
	sn, err := open("overlayfs", abs, s, overlay{options: layerOptions()})
	if err != nil {
		return nil, err
	}
	sn.mapsIDs = mapsLayers(abs)
	return sn, nil
}

// OverlaySupported tries whether overlayfs works with directories below root, which
// must exist, and tells why not.
func OverlaySupported(root string) (err error) {
	dir, err := os.MkdirTemp(root, ".overlay-*")
	if err != nil {
		return fmt.Errorf("try overlayfs: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	top, bottom := layer(filepath.Join(dir, "top")), layer(filepath.Join(dir, "bottom"))
	for _, l := range []layer{bottom, top} {
		if err := mkdir(string(l), 0o700); err != nil {
			return err
		}
		if err := (overlay{}).fill(context.Background(), l, nil); err != nil {
			return err
		}
	}
	f, err := MountDetached(overlay{options: layerOptions()}.mounts(top, []string{bottom.fs()}, false))
	if err != nil {
		return fmt.Errorf("try overlayfs: %w", err)
	}
	return f.Close()
}

// overlay keeps each layer's difference to its parents in overlayfs's own form.
type overlay struct {
	directories
	options []string // of every mount
}

// layerOptions keep a kernel whose defaults are otherwise from writing layers that
// refer to other layers: a directory that was moved, or a file whose contents stayed
// below, could be neither compared nor put upon another parent.
func layerOptions() []string {
	options := []string{"index=off"}
	for _, o := range []string{"redirect_dir", "metacopy"} {
		v, err := os.ReadFile("/sys/module/overlay/parameters/" + o)
		if err == nil && strings.TrimSpace(string(v)) == "Y" {
			options = append(options, o+"=off")
		}
	}
	return options
}

func (overlay) fill(_ context.Context, l layer, below []string) error {
	if err := mkdir(l.fs(), 0o755); err != nil {
		return err
	}
	if len(below) > 0 {
		if err := copyRootAttributes(below[0], l.fs()); err != nil {
			return err
		}
	}
	return mkdir(l.work(), 0o711)
}

// rebase gives the root directory the parent's owner and mode, as fill would have.
// Only if the layer itself did not set them: most layers do not hold their root.
func (overlay) rebase(_ context.Context, l layer, below []string) error {
	if len(below) == 0 {
		return nil
	}
	return inheritRoot(below[0], l.fs())
}

func inheritRoot(from, to string) error {
	var st unix.Stat_t
	if err := unix.Lstat(to, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: to, Err: err}
	}
	if !defaultRoot(st.Uid, st.Gid, st.Mode&0o7777) {
		return nil
	}
	var parent unix.Stat_t
	if err := unix.Lstat(from, &parent); err != nil {
		return &os.PathError{Op: "lstat", Path: from, Err: err}
	}
	if parent.Uid == st.Uid && parent.Gid == st.Gid && parent.Mode == st.Mode {
		return nil
	}
	if err := copyRootAttributes(from, to); err != nil {
		return err
	}
	// The caller may have synced the layer before.
	return durable.SyncDir(to)
}

// defaultRoot tells whether a layer's root looks as it was made.
func defaultRoot(uid, gid, perm uint32) bool { return uid == 0 && gid == 0 && perm == 0o755 }

func (overlay) tidy(l layer) error { return os.RemoveAll(l.work()) }

func (overlay) whole() bool { return false }

func (o overlay) mounts(l layer, below []string, readonly bool) []mount.Mount {
	access := "rw"
	if readonly {
		access = "ro"
	}
	switch {
	case len(below) == 0:
		return []mount.Mount{{Type: "bind", Source: l.fs(), Options: []string{access, "rbind"}}}
	case readonly && len(below) == 1:
		return []mount.Mount{{Type: "bind", Source: below[0], Options: []string{access, "rbind"}}}
	}
	options := slices.Clone(o.options)
	if !readonly {
		options = append(options, "workdir="+l.work(), "upperdir="+l.fs())
	}
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: append(options, "lowerdir="+strings.Join(below, ":"))}}
}

// mkdir makes a directory with exactly this mode, whatever the umask is.
func mkdir(path string, mode os.FileMode) error {
	if err := os.Mkdir(path, mode); err != nil {
		return err
	}
	return os.Chmod(path, mode)
}

func copyRootAttributes(from, to string) error {
	var st unix.Stat_t
	if err := unix.Lstat(from, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: from, Err: err}
	}
	if err := os.Lchown(to, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	// After chown, which clears bits of the mode.
	if err := unix.Chmod(to, st.Mode&0o7777); err != nil {
		return &os.PathError{Op: "chmod", Path: to, Err: err}
	}
	return nil
}
