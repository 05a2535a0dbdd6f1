package mounts

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/safepath"
)

const (
	typeLoop    = "loop"
	kindFormat  = "format"
	kindMkdir   = "mkdir"
	kindMkfs    = "mkfs"
	mkdirOption = "X-containerd.mkdir.path="
)

// transform does what the kinds before a mount's type ask for (containerd's docs/mounts.md), the
// first one first, and gives the mount without them.
func transform(ctx context.Context, m mount.Mount, active []mount.ActiveMount) (mount.Mount, error) {
	m.Options = append([]string(nil), m.Options...)
	for {
		kind, rest, ok := strings.Cut(m.Type, "/")
		if !ok {
			return m, checkPaths(m, active)
		}
		m.Type = rest
		var err error
		switch kind {
		case kindFormat:
			err = format(&m, active)
		case kindMkdir:
			err = mkdir(&m, active)
		case kindMkfs:
			err = mkfs(ctx, &m, active)
		default:
			err = fmt.Errorf("kind %q of mount: %w", kind, errdefs.ErrNotImplemented)
		}
		if err != nil {
			return m, err
		}
	}
}

var placeholder = regexp.MustCompile(`\{\{\s*(source|target|mount|overlay)\s+(\d{1,4})(?:\s+(\d{1,4}))?\s*\}\}`)

// format fills in what is known of the mounts before.
func format(m *mount.Mount, active []mount.ActiveMount) error {
	for _, p := range append([]*string{&m.Source, &m.Target}, pointers(m.Options)...) {
		var failed error
		at := func(s string) mount.ActiveMount {
			i, err := strconv.Atoi(s)
			if err != nil || i >= len(active) {
				failed = fmt.Errorf("%q: there is no mount %s before it: %w", *p, s, errdefs.ErrInvalidArgument)
				return mount.ActiveMount{}
			}
			return active[i]
		}
		text := placeholder.ReplaceAllStringFunc(*p, func(found string) string {
			f := placeholder.FindStringSubmatch(found)
			if (f[1] == "overlay") != (f[3] != "") {
				failed = fmt.Errorf("%q: wrong number of arguments: %w", *p, errdefs.ErrInvalidArgument)
				return ""
			}
			switch f[1] {
			case "source":
				return at(f[2]).Source
			case "target":
				return at(f[2]).Target
			case "mount":
				return at(f[2]).MountPoint
			}
			from, _ := strconv.Atoi(f[2])
			to, _ := strconv.Atoi(f[3])
			step := 1
			if to < from {
				step = -1
			}
			var dirs []string
			for i := from; failed == nil; i += step {
				dirs = append(dirs, at(strconv.Itoa(i)).MountPoint)
				if i == to {
					break
				}
			}
			return strings.Join(dirs, ":")
		})
		if failed == nil && strings.Contains(text, "{{") {
			failed = fmt.Errorf("%q: unknown placeholder: %w", *p, errdefs.ErrInvalidArgument)
		}
		if failed != nil {
			return failed
		}
		*p = text
	}
	return nil
}

func pointers(list []string) (out []*string) {
	for i := range list {
		out = append(out, &list[i])
	}
	return out
}

// mkdir makes the directories that options ask for, PATH[:MODE[:UID:GID]], and takes these out.
func mkdir(m *mount.Mount, active []mount.ActiveMount) error {
	var rest []string
	for _, o := range m.Options {
		spec, ok := strings.CutPrefix(o, mkdirOption)
		if !ok {
			rest = append(rest, o)
			continue
		}
		f := strings.Split(spec, ":")
		mode, uid, gid := uint64(0o700), -1, -1
		var err error
		if len(f) > 1 {
			mode, err = strconv.ParseUint(f[1], 8, 12)
		}
		if err == nil && len(f) == 4 {
			if uid, err = strconv.Atoi(f[2]); err == nil {
				gid, err = strconv.Atoi(f[3])
			}
		}
		if err != nil || len(f) == 3 || len(f) > 4 || !filepath.IsAbs(f[0]) {
			return fmt.Errorf("option %q: %w", o, errdefs.ErrInvalidArgument)
		}
		if err := makeDir(f[0], uint32(mode), uid, gid, active); err != nil {
			return fmt.Errorf("directory %s: %w", f[0], err)
		}
	}
	m.Options = rest
	return nil
}

// below splits a path at the mount point that it lies below; "/" if it is on the host.
func below(path string, active []mount.ActiveMount) (root, inside string) {
	root, inside = "/", path
	for _, a := range active {
		if rel, ok := strings.CutPrefix(path, a.MountPoint+"/"); ok && len(a.MountPoint) > len(root) {
			root, inside = a.MountPoint, rel
		}
	}
	return root, inside
}

func makeDir(path string, mode uint32, uid, gid int, active []mount.ActiveMount) error {
	at, inside := below(path, active)
	root, err := safepath.OpenRoot(at)
	if err != nil {
		return err
	}
	defer root.Close()
	d, err := root.MkdirAll(inside, 0o700, func(fd int) error {
		self := fmt.Sprintf("/proc/self/fd/%d", fd)
		if uid >= 0 {
			if err := os.Chown(self, uid, gid); err != nil {
				return err
			}
		}
		return unix.Chmod(self, mode)
	})
	if err != nil {
		return err
	}
	return d.Close()
}

// checkPaths refuses a mount whose paths below an earlier mount go through a link there: it
// could lead out of it, to any place of the host.
func checkPaths(m mount.Mount, active []mount.ActiveMount) error {
	paths := []string{m.Source}
	for _, o := range m.Options {
		if _, v, ok := strings.Cut(o, "="); ok {
			paths = append(paths, strings.Split(v, ":")...)
		}
	}
	for _, p := range paths {
		root, inside := below(p, active)
		if root == "/" {
			continue
		}
		at := root
		for elem := range strings.SplitSeq(filepath.Clean(inside), "/") {
			if elem == ".." {
				return fmt.Errorf("path %q leaves its mount: %w", p, errdefs.ErrInvalidArgument)
			}
			at = filepath.Join(at, elem)
			if st, err := os.Lstat(at); err == nil && st.Mode()&os.ModeSymlink != 0 {
				return fmt.Errorf("path %q goes through a link: %w", p, errdefs.ErrPermissionDenied)
			}
		}
	}
	return nil
}
