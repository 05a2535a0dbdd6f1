//go:build linux

package engine

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/safepath"
	"github.com/hako-engine/hako/snapshot"
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

// openSnapshot opens the snapshot of a container that does not run, in the context's namespace. With write, changes
// go to the container's layer: the caller holds the ticket, so that no second overlay
// is ever writing to it.
func (e *Engine) openSnapshot(ctx context.Context, v Container, write bool) (*safepath.Root, error) {
	sn := e.opt.Snapshotters[v.Snapshotter]
	if sn == nil {
		return nil, notFoundf("snapshotter %q of container %s is not there any more", v.Snapshotter, v.ID)
	}
	mounts, err := sn.Mounts(ctx, v.SnapshotKey)
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
	if !write {
		ro := make([]mount.Mount, len(mounts))
		for i, m := range mounts {
			var err error
			if ro[i], err = readOnly(m); err != nil {
				return nil, err
			}
		}
		mounts = ro
		if len(ro) == 1 && ro[0].Type == "bind" { // to read a directory takes no mount
			return safepath.OpenRoot(ro[0].Source)
		}
	}
	f, err := snapshot.MountAny(mounts)
	if err != nil {
		return nil, err
	}
	return safepath.NewRoot(f), nil
}

// readOnly gives the same files for reading alone. An overlay's upper directory
// becomes the top lower one: such a mount takes no lock on it, so that it can stand
// beside the container's own.
func readOnly(m mount.Mount) (mount.Mount, error) {
	if m.Type != "overlay" {
		m.Options = append(slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool { return o == "rw" }), "ro")
		return m, nil
	}
	d, err := parseOverlay(m.Options)
	if err != nil {
		return m, err
	}
	if d.upper == "" {
		return m, nil
	}
	layers := append([]string{d.upper}, d.lower...)
	if len(layers) == 1 { // an overlay of one layer is refused by the kernel
		return mount.Mount{Type: "bind", Source: d.upper, Options: []string{"bind", "ro"}}, nil
	}
	out := mount.Mount{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=" + strings.Join(layers, ":")}}
	for _, o := range m.Options {
		k, _, _ := strings.Cut(o, "=")
		if !slices.Contains([]string{"upperdir", "workdir", "lowerdir", "volatile", "index", "rw"}, k) {
			out.Options = append(out.Options, o)
		}
	}
	return out, nil
}

// isNotDir tells whether a path goes through something that is no directory.
func isNotDir(err error) bool { return errors.Is(err, unix.ENOTDIR) }
