package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/safepath"
	"github.com/hako-engine/hako/internal/undo"
)

// resolveMounts completes v.Mounts: the client's, those of other containers and the
// image's, with volumes made and their paths filled in. done must always be called, if it
// fails, too: until then the volumes cannot be removed.
func (e *Engine) resolveMounts(ctx context.Context, v *Container, imageVolumes map[string]struct{}, u *undo.Stack) (done func(), err error) {
	var held []func()
	done = func() {
		for _, f := range held {
			f()
		}
	}
	taken := map[string]bool{}
	var list []Mount
	for _, from := range v.Config.VolumesFrom {
		ref, mode, _ := strings.Cut(from, ":")
		if mode != "" && mode != "ro" && mode != "rw" {
			return done, invalidf("invalid mode for volumes-from: %s", mode)
		}
		other, err := e.containers.get(ref)
		if err != nil {
			return done, badRequest(err)
		}
		for _, m := range other.view().Mounts {
			m.NoCopy, m.FromImage = true, false
			if mode == "ro" {
				m.ReadOnly = true
			}
			list = append(list, m)
		}
	}
	own := map[string]bool{}
	for _, m := range v.Config.Mounts {
		if err := validateMount(m); err != nil {
			return done, err
		}
		t := path.Clean(m.Target)
		if own[t] {
			return done, invalidf("Duplicate mount point: %s", m.Target)
		}
		own[t] = true
		m.Target = t
		// A mount of the container itself goes over one that comes from another.
		list = slices.DeleteFunc(list, func(o Mount) bool { return o.Target == t })
		list = append(list, m)
	}
	for _, m := range list {
		taken[m.Target] = true
	}
	for target := range imageVolumes {
		t := path.Clean("/" + target)
		if t == "/" {
			return done, invalidf("invalid volume %q in the image: destination can't be '/'", target)
		}
		if !taken[t] {
			taken[t] = true
			list = append(list, Mount{Kind: MountVolume, Target: t, FromImage: true})
		}
	}
	slices.SortStableFunc(list, func(a, b Mount) int { return strings.Compare(a.Target, b.Target) })

	for i := range list {
		m := &list[i]
		switch m.Kind {
		case MountBind:
			if err := bindSource(m); err != nil {
				return done, err
			}
		case MountVolume:
			name, anonymous := m.Source, m.Source == ""
			if anonymous {
				name = newID()
			}
			release, err := e.useVolume(name) // before it is there: nobody has ever seen it unused
			if err != nil {
				return done, err
			}
			held = append(held, release)
			vol, made, err := e.createVolume(ctx, Volume{Name: name, Anonymous: anonymous, Driver: m.Driver, Options: m.DriverOpts, Labels: m.Labels})
			if err != nil {
				return done, badRequest(err)
			}
			if made {
				u.Add("volume "+vol.Name, func(ctx context.Context) error {
					err := e.removeVolume(ctx, vol.Name)
					if errdefs.IsNotFound(err) || errdefs.IsConflict(err) {
						return nil
					}
					return err
				})
				e.emitFor("volume", "create", vol.Name, "driver", vol.Driver)
			}
			m.Source, m.Driver, m.Resolved = vol.Name, vol.Driver, vol.Mountpoint
			if m.Subpath != "" {
				if !filepath.IsLocal(m.Subpath) {
					return done, invalidf("invalid mount config for type \"volume\": subpath must be a relative path within the volume")
				}
				m.NoCopy = true
			}
		}
	}
	v.Mounts = list
	return done, nil
}

func validateMount(m Mount) error {
	bad := func(format string, args ...any) error {
		return invalidf("invalid mount config for type %q: %s", m.Kind, fmt.Sprintf(format, args...))
	}
	if m.Target == "" {
		return bad("field Target must not be empty")
	}
	if !path.IsAbs(m.Target) {
		return bad("invalid mount path: '%s' mount path must be absolute", m.Target)
	}
	if path.Clean(m.Target) == "/" {
		return bad("invalid specification: destination can't be '/'")
	}
	if strings.ContainsRune(m.Target+m.Source, 0) {
		return bad("path holds a NUL byte")
	}
	switch m.Propagation {
	case "", "private", "rprivate", "slave", "rslave", "shared", "rshared":
	default:
		return bad("invalid propagation config: %s", m.Propagation)
	}
	switch m.Kind {
	case MountBind:
		if m.Source == "" {
			return bad("field Source must not be empty")
		}
		if !filepath.IsAbs(m.Source) {
			return bad("invalid mount path: '%s' mount path must be absolute", m.Source)
		}
	case MountImage:
		if m.Source == "" {
			return bad("field Source must not be empty")
		}
	case MountVolume:
		if m.Subpath != "" && m.Source == "" {
			return bad("must not set Subpath when using anonymous volumes")
		}
	case MountTmpfs:
		if m.Source != "" {
			return bad("field Source must not be specified")
		}
		for _, o := range m.Options {
			if name, value, has := strings.Cut(o, "="); !validTmpfsOption(name, has) {
				return invalidf("invalid tmpfs option %q", slices.DeleteFunc([]string{name, value}, func(s string) bool { return s == "" }))
			}
		}
	default:
		return invalidf("mount type %q unknown", m.Kind)
	}
	return nil
}

// bindSource finds, or makes, the host path of a bind. The path is the client's, who
// may name any path of the host.
func bindSource(m *Mount) error {
	m.Resolved = filepath.Clean(m.Source)
	_, err := os.Stat(m.Resolved)
	switch {
	case errors.Is(err, fs.ErrNotExist) && m.CreateSource:
		if err := os.MkdirAll(m.Resolved, 0o755); err != nil {
			return invalidf("error while creating mount source path '%s': %v", m.Source, err)
		}
	case errors.Is(err, fs.ErrNotExist):
		return invalidf("invalid mount config for type \"bind\": bind source path does not exist: %s", m.Source)
	case err != nil:
		return invalidf("invalid mount config for type \"bind\": stat %s: %v", m.Source, err)
	}
	return nil
}

// copyUps gives the mounts whose empty volume shall get what the image has in its place.
func (e *Engine) copyUps(v Container) []Mount {
	var out []Mount
	for _, m := range v.Mounts {
		if m.Kind != MountVolume || m.NoCopy {
			continue
		}
		dir, err := os.Open(m.Resolved)
		if err != nil {
			continue
		}
		names, err := readNames(dir)
		dir.Close()
		if err == nil && len(names) == 0 {
			out = append(out, m)
		}
	}
	return out
}

// copyUp copies the image's content below a volume's target into the volume.
func (e *Engine) copyUp(ctx context.Context, v Container, mounts []Mount) error {
	root, err := e.openSnapshot(e.ns(ctx), v, false)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, m := range mounts {
		if err := copyInto(ctx, root, m); err != nil {
			return fmt.Errorf("copy the image's %s into volume %s: %w", m.Target, m.Source, err)
		}
	}
	return nil
}

func copyInto(ctx context.Context, root *safepath.Root, m Mount) error {
	src, err := root.Open(m.Target, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if errors.Is(err, fs.ErrNotExist) || isNotDir(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(m.Resolved, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer dst.Close()
	if err := copyTree(ctx, src, dst); err != nil {
		return err
	}
	// As durable as the record that is written next.
	return os.NewSyscallError("syncfs", unix.Syncfs(int(dst.Fd())))
}
