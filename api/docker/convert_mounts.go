package docker

import (
	"cmp"
	"io/fs"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"

	"github.com/hako-engine/hako/engine"
)

// volumeName is what Docker accepts as the name of a volume.
var volumeName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]+$`)

// Forms of engine.Mount.Shorthand, by which inspect gives a mount back in the form
// in which it was asked for.
const (
	shortBind   = "bind:"   // + the string of HostConfig.Binds
	shortVolume = "volume:" // + the path of Config.Volumes
	shortTmpfs  = "tmpfs:"  // + the options of HostConfig.Tmpfs
)

// mountsFrom gathers the mounts of a create from the four places where clients put
// them. A path that only Config.Volumes names again is no second mount.
func mountsFrom(volumes map[string]struct{}, h *container.HostConfig) ([]engine.Mount, error) {
	var out []engine.Mount
	seen := map[string]bool{}
	add := func(m engine.Mount) error {
		if seen[m.Target] {
			return invalidf("Duplicate mount point: %s", m.Target)
		}
		seen[m.Target] = true
		out = append(out, m)
		return nil
	}
	for _, b := range h.Binds {
		m, err := parseBind(b, h.VolumeDriver)
		if err != nil {
			return nil, err
		}
		if err := add(m); err != nil {
			return nil, err
		}
	}
	for i := range h.Mounts {
		m, err := mountFrom(&h.Mounts[i])
		if err != nil {
			return nil, err
		}
		if err := add(m); err != nil {
			return nil, err
		}
	}
	for _, target := range slices.Sorted(maps.Keys(h.Tmpfs)) {
		opts := h.Tmpfs[target]
		if err := checkTarget(target, target); err != nil {
			return nil, err
		}
		m := engine.Mount{Kind: engine.MountTmpfs, Target: path.Clean(target), Shorthand: shortTmpfs + opts}
		if opts != "" {
			m.Options = strings.Split(opts, ",")
		}
		m.ReadOnly = slices.Contains(m.Options, "ro")
		if err := add(m); err != nil {
			return nil, err
		}
	}
	for _, target := range slices.Sorted(maps.Keys(volumes)) {
		if err := checkTarget(target, target); err != nil {
			return nil, err
		}
		if clean := path.Clean(target); !seen[clean] {
			seen[clean] = true
			out = append(out, engine.Mount{Kind: engine.MountVolume, Target: clean, Driver: h.VolumeDriver, Shorthand: shortVolume + target})
		}
	}
	return out, nil
}

// checkTarget refuses mount points that no mount may have. whole is the text to show.
func checkTarget(target, whole string) error {
	if !path.IsAbs(target) {
		return invalidf("invalid volume specification: '%s': invalid mount path: '%s' mount path must be absolute", whole, target)
	}
	if path.Clean(target) == "/" {
		return invalidf("invalid volume specification: '%s': invalid specification: destination can't be '/'", whole)
	}
	if strings.ContainsRune(target, 0) {
		return invalidf("invalid volume specification: %q", whole)
	}
	return nil
}

// parseBind understands docker's -v: [SOURCE:]TARGET[:MODE].
func parseBind(s, driver string) (engine.Mount, error) {
	m := engine.Mount{Shorthand: shortBind + s}
	parts := strings.Split(s, ":")
	var source, mode string
	switch {
	case len(parts) == 1:
		m.Target = parts[0]
	case len(parts) == 2 && path.IsAbs(parts[0]) && !path.IsAbs(parts[1]) && bindMode(&engine.Mount{}, parts[1]) == nil:
		m.Target, mode = parts[0], parts[1]
	case len(parts) == 2:
		source, m.Target = parts[0], parts[1]
	case len(parts) == 3:
		source, m.Target, mode = parts[0], parts[1], parts[2]
	default:
		return m, invalidf("invalid volume specification: '%s'", s)
	}
	if len(parts) > 1 && source == "" && mode == "" || m.Target == "" {
		return m, invalidf("invalid volume specification: '%s'", s)
	}
	if err := checkTarget(m.Target, s); err != nil {
		return m, err
	}
	m.Target = path.Clean(m.Target)
	if err := bindMode(&m, mode); err != nil {
		return m, err
	}
	switch {
	case source == "":
		m.Kind, m.Driver = engine.MountVolume, driver
	case path.IsAbs(source):
		m.Kind, m.Source, m.CreateSource = engine.MountBind, path.Clean(source), true
		if m.NoCopy {
			return m, invalidf("invalid volume specification: '%s': invalid mode: %s", s, mode)
		}
	case volumeName.MatchString(source):
		m.Kind, m.Source, m.Driver = engine.MountVolume, source, driver
		if m.Propagation != "" {
			return m, invalidf("invalid volume specification: '%s': invalid mode: %s", s, mode)
		}
	default:
		return m, invalidf("invalid volume specification: '%s': %q includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed. If you intended to pass a host directory, use absolute path", s, source)
	}
	return m, nil
}

// bindMode applies the options of docker's -v, each kind of which may come once.
func bindMode(m *engine.Mount, mode string) error {
	if mode == "" {
		return nil
	}
	var access, propagation, label, copied, consistency int
	for opt := range strings.SplitSeq(mode, ",") {
		switch opt {
		case "ro":
			m.ReadOnly = true
			access++
		case "rw":
			access++
		case "shared", "rshared", "slave", "rslave", "private", "rprivate":
			m.Propagation = opt
			propagation++
		case "z", "Z":
			m.Options = append(m.Options, opt)
			label++
		case "nocopy":
			m.NoCopy = true
			copied++
		case "consistent", "cached", "delegated": // of macOS: no effect
			consistency++
		default:
			return invalidf("invalid mode: %s", mode)
		}
	}
	if max(access, propagation, label, copied, consistency) > 1 {
		return invalidf("invalid mode: %s", mode)
	}
	return nil
}

// mountFrom converts one of HostConfig.Mounts.
func mountFrom(w *mount.Mount) (engine.Mount, error) {
	bad := func(format string, args ...any) error {
		return invalidf("invalid mount config for type \"%s\": "+format, append([]any{w.Type}, args...)...)
	}
	m := engine.Mount{Kind: string(w.Type), Source: w.Source, Target: path.Clean(w.Target), ReadOnly: w.ReadOnly}
	if w.Target == "" {
		return m, bad("field Target must not be empty")
	}
	if !path.IsAbs(w.Target) {
		return m, bad("invalid mount path: '%s' mount path must be absolute", w.Target)
	}
	if m.Target == "/" {
		return m, bad("invalid specification: destination can't be '/'")
	}
	unexpected := func(name string) error { return bad("field %s must not be specified", name) }
	if w.BindOptions != nil && w.Type != mount.TypeBind {
		return m, unexpected("BindOptions")
	}
	if w.VolumeOptions != nil && w.Type != mount.TypeVolume {
		return m, unexpected("VolumeOptions")
	}
	if w.TmpfsOptions != nil && w.Type != mount.TypeTmpfs {
		return m, unexpected("TmpfsOptions")
	}
	switch w.Type {
	case mount.TypeBind:
		if w.Source == "" {
			return m, bad("field Source must not be empty")
		}
		if !path.IsAbs(w.Source) {
			return m, bad("invalid mount path: '%s' mount path must be absolute", w.Source)
		}
		m.Source = path.Clean(w.Source)
		if o := w.BindOptions; o != nil {
			if o.Propagation != "" && !slices.Contains(mount.Propagations, o.Propagation) {
				return m, bad("invalid propagation mode: %s", o.Propagation)
			}
			m.Propagation, m.NonRecursive, m.CreateSource = string(o.Propagation), o.NonRecursive, o.CreateMountpoint
			m.ReadOnlyNonRecur = o.ReadOnlyNonRecursive
			switch {
			case (o.ReadOnlyNonRecursive || o.ReadOnlyForceRecursive) && !w.ReadOnly:
				return m, bad("mount source must be read-only to be recursively read-only or not")
			case o.ReadOnlyNonRecursive && o.ReadOnlyForceRecursive:
				return m, bad("ReadOnlyForceRecursive and ReadOnlyNonRecursive cannot be used together")
			case o.ReadOnlyForceRecursive && cmp.Or(string(o.Propagation), "rprivate") != "rprivate":
				return m, bad("Propagation must be rprivate for a recursively read-only mount")
			}
		}
	case mount.TypeVolume:
		if w.Source != "" && !volumeName.MatchString(w.Source) {
			return m, bad("%q includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed. If you intended to pass a host directory, use absolute path", w.Source)
		}
		if o := w.VolumeOptions; o != nil {
			m.NoCopy, m.Labels, m.Subpath = o.NoCopy, o.Labels, o.Subpath
			if o.Subpath != "" && !fs.ValidPath(path.Clean(o.Subpath)) {
				return m, bad("subpath must be a relative path within the volume")
			}
			if w.Source == "" && o.Subpath != "" {
				return m, bad("must not set Subpath when using anonymous volumes")
			}
			if o.DriverConfig != nil {
				m.Driver, m.DriverOpts = o.DriverConfig.Name, o.DriverConfig.Options
			}
		}
	case mount.TypeTmpfs:
		if w.Source != "" {
			return m, unexpected("Source")
		}
		if o := w.TmpfsOptions; o != nil {
			if o.SizeBytes < 0 {
				return m, bad("size must not be negative")
			}
			m.TmpfsSize, m.TmpfsMode = o.SizeBytes, uint32(o.Mode.Perm())
			if o.Mode&fs.ModeSticky != 0 || uint32(o.Mode)&0o1000 != 0 {
				m.TmpfsMode |= 0o1000
			}
			for _, opt := range o.Options {
				if len(opt) == 0 || len(opt) > 2 {
					return m, bad("an option must be a name, or a name and a value")
				}
				m.Options = append(m.Options, strings.Join(opt, "="))
			}
		}
	case mount.TypeImage:
		return m, notImplementedf("mounts of type \"image\" are not in this version of hako")
	default:
		return m, invalidf("invalid mount config for type \"%s\": mount type unknown", w.Type)
	}
	return m, nil
}

// hostMounts gives mounts back in the four forms in which clients ask for them.
func hostMounts(mounts []engine.Mount) (binds []string, wire []mount.Mount, tmpfs map[string]string, volumes map[string]struct{}) {
	for i := range mounts {
		m := &mounts[i]
		if s, ok := strings.CutPrefix(m.Shorthand, shortBind); ok {
			binds = append(binds, s)
			continue
		}
		if opts, ok := strings.CutPrefix(m.Shorthand, shortTmpfs); ok {
			if tmpfs == nil {
				tmpfs = map[string]string{}
			}
			tmpfs[m.Target] = opts
			continue
		}
		if s, ok := strings.CutPrefix(m.Shorthand, shortVolume); ok {
			if volumes == nil {
				volumes = map[string]struct{}{}
			}
			volumes[s] = struct{}{}
			continue
		}
		wire = append(wire, wireMount(m))
	}
	return binds, wire, tmpfs, volumes
}

func wireMount(m *engine.Mount) mount.Mount {
	w := mount.Mount{Type: mount.Type(m.Kind), Source: m.Source, Target: m.Target, ReadOnly: m.ReadOnly}
	switch m.Kind {
	case engine.MountBind:
		o := mount.BindOptions{
			Propagation: mount.Propagation(m.Propagation), NonRecursive: m.NonRecursive,
			CreateMountpoint: m.CreateSource, ReadOnlyNonRecursive: m.ReadOnlyNonRecur,
		}
		if o != (mount.BindOptions{}) {
			w.BindOptions = &o
		}
	case engine.MountVolume:
		if m.NoCopy || len(m.Labels) > 0 || m.Subpath != "" || m.Driver != "" || len(m.DriverOpts) > 0 {
			w.VolumeOptions = &mount.VolumeOptions{NoCopy: m.NoCopy, Labels: m.Labels, Subpath: m.Subpath}
			if m.Driver != "" || len(m.DriverOpts) > 0 {
				w.VolumeOptions.DriverConfig = &mount.Driver{Name: m.Driver, Options: m.DriverOpts}
			}
		}
	case engine.MountTmpfs:
		if m.TmpfsSize != 0 || m.TmpfsMode != 0 || len(m.Options) > 0 {
			mode := fs.FileMode(m.TmpfsMode & 0o777)
			if m.TmpfsMode&0o1000 != 0 {
				mode |= fs.ModeSticky
			}
			w.TmpfsOptions = &mount.TmpfsOptions{SizeBytes: m.TmpfsSize, Mode: mode}
			for _, opt := range m.Options {
				name, value, ok := strings.Cut(opt, "=")
				pair := []string{name}
				if ok {
					pair = append(pair, value)
				}
				w.TmpfsOptions.Options = append(w.TmpfsOptions.Options, pair)
			}
		}
	}
	return w
}

// mountPoints describes the mounts that a container has.
func mountPoints(mounts []engine.Mount) []container.MountPoint {
	out := make([]container.MountPoint, 0, len(mounts))
	for i := range mounts {
		m := &mounts[i]
		if strings.HasPrefix(m.Shorthand, shortTmpfs) {
			continue // Docker lists those of HostConfig.Tmpfs there only
		}
		p := container.MountPoint{
			Type: mount.Type(m.Kind), Source: cmp.Or(m.Resolved, m.Source), Destination: m.Target, RW: !m.ReadOnly,
			Mode: bindModeOf(m.Shorthand),
		}
		switch m.Kind {
		case engine.MountBind:
			p.Propagation = mount.Propagation(cmp.Or(m.Propagation, "rprivate"))
		case engine.MountVolume:
			p.Name, p.Source = m.Source, m.Resolved
			p.Driver = cmp.Or(m.Driver, "local")
		case engine.MountTmpfs:
			p.Source = ""
		}
		out = append(out, p)
	}
	return out
}

// bindModeOf gives the options that a -v was given.
func bindModeOf(shorthand string) string {
	s, ok := strings.CutPrefix(shorthand, shortBind)
	if !ok {
		return ""
	}
	parts := strings.Split(s, ":")
	switch {
	case len(parts) == 3:
		return parts[2]
	case len(parts) == 2 && !path.IsAbs(parts[1]):
		return parts[1]
	}
	return ""
}
