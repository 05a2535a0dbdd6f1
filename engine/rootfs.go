//go:build linux

package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/safepath"
)

// How the engine itself reaches a container's files: through a descriptor of its
// root, never through a path that the container could have prepared. A running
// container's root is /proc/PID/root, volumes included. A stopped one's is a detached
// mount of its snapshot, which appears in no mount table and ends with the descriptor.

// openProcessRoot opens the root of a live process, with the mounts that it sees.
func openProcessRoot(pid int) (*safepath.Root, error) {
	r, err := safepath.OpenRoot(fmt.Sprintf("/proc/%d/root", pid))
	if err != nil {
		return nil, fmt.Errorf("open root of process %d: %w", pid, err)
	}
	return r, nil
}

// openSnapshot opens the snapshot of a container that does not run. With write, changes
// go to the container's layer: the caller holds the ticket, so that no second overlay
// is ever writing to it.
func (e *Engine) openSnapshot(ctx context.Context, v Container, write bool) (*safepath.Root, error) {
	sn := e.opt.Snapshotters[v.Snapshotter]
	if sn == nil {
		return nil, notFoundf("snapshotter %q of container %s is not there any more", v.Snapshotter, v.ID)
	}
	mounts, err := sn.Mounts(e.ns(ctx), v.SnapshotKey)
	if err != nil {
		return nil, fmt.Errorf("mounts of container %s: %w", v.ID, err)
	}
	r, err := openMounts(mounts, write)
	if err != nil {
		return nil, fmt.Errorf("open file system of container %s: %w", v.ID, err)
	}
	return r, nil
}

// overlayDirs are the directories of an overlay mount.
type overlayDirs struct {
	upper, work string
	lower       []string // top first
}

// parseOverlay reads the options of an overlay mount. Escaped colons and commas are
// not needed: the snapshotter makes the names.
func parseOverlay(options []string) (d overlayDirs, err error) {
	for _, o := range options {
		k, v, _ := strings.Cut(o, "=")
		switch k {
		case "upperdir":
			d.upper = v
		case "workdir":
			d.work = v
		case "lowerdir":
			d.lower = strings.Split(v, ":")
		}
	}
	for _, p := range append([]string{d.upper}, d.lower...) {
		if p != "" && !filepath.IsAbs(p) {
			return d, fmt.Errorf("overlay directory %q is not absolute", p)
		}
	}
	return d, nil
}

// openMounts gives the root of a snapshot's mounts as a detached mount.
func openMounts(mounts []mount.Mount, write bool) (*safepath.Root, error) {
	if len(mounts) != 1 {
		return nil, fmt.Errorf("cannot open a chain of %d mounts", len(mounts))
	}
	m := mounts[0]
	switch m.Type {
	case "bind", "rbind":
		return safepath.OpenRoot(m.Source)
	case "overlay":
		d, err := parseOverlay(m.Options)
		if err != nil {
			return nil, err
		}
		if !write {
			// The upper directory becomes the top lower one: such a mount takes no lock on
			// it and can stand beside the container's own.
			if d.upper != "" {
				d.lower = append([]string{d.upper}, d.lower...)
			}
			d.upper, d.work = "", ""
			if len(d.lower) == 1 {
				return safepath.OpenRoot(d.lower[0])
			}
		}
		f, err := detachedOverlay(d)
		if err != nil {
			return nil, fmt.Errorf("mount overlay: %w", err)
		}
		return safepath.NewRoot(f), nil
	}
	return nil, fmt.Errorf("cannot open a mount of type %q", m.Type)
}

// detachedOverlay mounts an overlay that is attached nowhere.
func detachedOverlay(d overlayDirs) (*os.File, error) {
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return overlayInNamespace(d)
	}
	defer unix.Close(fd)
	set := func(k, v string) error {
		if err := unix.FsconfigSetString(fd, k, v); err != nil {
			return fmt.Errorf("%s=%s: %w", k, v, err)
		}
		return nil
	}
	// One by one: a value of fsconfig(2) has at most 255 bytes. Kernels before 6.7 do
	// not know "lowerdir+".
	for _, l := range d.lower {
		if err := set("lowerdir+", l); err != nil {
			return overlayInNamespace(d)
		}
	}
	if d.upper != "" {
		if err := errors.Join(set("upperdir", d.upper), set("workdir", d.work)); err != nil {
			return overlayInNamespace(d)
		}
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return nil, err
	}
	mfd, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOSUID)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(mfd), "overlay"), nil
}

// overlayInNamespace does the same on older kernels: it mounts in a mount namespace
// of one thread, which ends at once; the descriptor outlives it.
func overlayInNamespace(d overlayDirs) (*os.File, error) {
	type result struct {
		f   *os.File
		err error
	}
	ch := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		f, err := func() (*os.File, error) {
			if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
				return nil, fmt.Errorf("unshare: %w", err)
			}
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				return nil, fmt.Errorf("make / private: %w", err)
			}
			opts := "lowerdir=" + strings.Join(d.lower, ":")
			if d.upper != "" {
				opts += ",upperdir=" + d.upper + ",workdir=" + d.work
			}
			if len(opts) >= os.Getpagesize() {
				return nil, errors.New("too many layers for this kernel")
			}
			target := d.lower[0]
			if err := unix.Mount("overlay", target, "overlay", unix.MS_NODEV|unix.MS_NOSUID, opts); err != nil {
				return nil, err
			}
			fd, err := unix.Open(target, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			if err != nil {
				return nil, err
			}
			return os.NewFile(uintptr(fd), "overlay"), nil
		}()
		ch <- result{f, err}
	}()
	r := <-ch
	return r.f, r.err
}

// isNotDir tells whether a path goes through something that is no directory.
func isNotDir(err error) bool { return errors.Is(err, unix.ENOTDIR) }
