package cli

import (
	"encoding/csv"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
)

// storage turns -v, --mount and --tmpfs into a request.
func (f *containerFlags) storage(c *container.Config, h *container.HostConfig) error {
	for _, v := range f.volumes {
		if !strings.Contains(v, ":") {
			if !filepath.IsAbs(v) {
				return usage("bad --volume %q: the path in the container must be absolute", v)
			}
			if c.Volumes == nil {
				c.Volumes = map[string]struct{}{}
			}
			c.Volumes[v] = struct{}{}
			continue
		}
		src, rest, _ := strings.Cut(v, ":")
		if src == "" {
			return usage("bad --volume %q: it names no source", v)
		}
		// A relative path is meant from here; the daemon cannot know where that is.
		if strings.HasPrefix(src, ".") || strings.HasPrefix(src, "~/") {
			if home, ok := strings.CutPrefix(src, "~/"); ok {
				dir, err := os.UserHomeDir()
				if err != nil {
					return usage("bad --volume %q: %s", v, err)
				}
				src = filepath.Join(dir, home)
			}
			abs, err := filepath.Abs(src)
			if err != nil {
				return usage("bad --volume %q: %s", v, err)
			}
			src = abs
		}
		h.Binds = append(h.Binds, src+":"+rest)
	}
	for _, s := range f.mounts {
		m, err := parseMount(s)
		if err != nil {
			return err
		}
		h.Mounts = append(h.Mounts, m)
	}
	for _, s := range f.tmpfs {
		target, opts, _ := strings.Cut(s, ":")
		if !filepath.IsAbs(target) {
			return usage("bad --tmpfs %q: the path must be absolute", s)
		}
		if h.Tmpfs == nil {
			h.Tmpfs = map[string]string{}
		}
		h.Tmpfs[target] = opts
	}
	return nil
}

// parseMount reads the comma-separated (CSV) form of --mount.
func parseMount(s string) (mount.Mount, error) {
	m := mount.Mount{Type: mount.TypeVolume}
	fields, err := csv.NewReader(strings.NewReader(s)).Read()
	if err != nil {
		return m, usage("bad --mount %q: %s", s, err)
	}
	bad := func(format string, args ...any) (mount.Mount, error) {
		return m, usage("bad --mount %q: %s", s, fmt.Sprintf(format, args...))
	}
	bind := func() *mount.BindOptions {
		if m.BindOptions == nil {
			m.BindOptions = &mount.BindOptions{}
		}
		return m.BindOptions
	}
	vol := func() *mount.VolumeOptions {
		if m.VolumeOptions == nil {
			m.VolumeOptions = &mount.VolumeOptions{}
		}
		return m.VolumeOptions
	}
	tmpfs := func() *mount.TmpfsOptions {
		if m.TmpfsOptions == nil {
			m.TmpfsOptions = &mount.TmpfsOptions{}
		}
		return m.TmpfsOptions
	}
	for _, f := range fields {
		k, v, has := strings.Cut(strings.TrimSpace(f), "=")
		k = strings.ToLower(k)
		flag := true
		if has {
			if b, err := strconv.ParseBool(v); err == nil {
				flag = b
			} else if k == "readonly" || k == "ro" || k == "volume-nocopy" {
				return bad("%q is not a boolean", v)
			}
		} else if k != "readonly" && k != "ro" && k != "volume-nocopy" && k != "bind-create-src" && k != "bind-nonrecursive" {
			return bad("%q needs a value", k)
		}
		switch k {
		case "type":
			m.Type = mount.Type(strings.ToLower(v))
		case "source", "src":
			m.Source = v
			if strings.HasPrefix(v, ".") {
				if m.Source, err = filepath.Abs(v); err != nil {
					return bad("%s", err)
				}
			}
		case "target", "destination", "dst":
			m.Target = v
		case "readonly", "ro":
			m.ReadOnly = flag
		case "bind-propagation":
			bind().Propagation = mount.Propagation(v)
		case "bind-create-src":
			bind().CreateMountpoint = flag
		case "bind-nonrecursive":
			bind().NonRecursive = flag
		case "bind-recursive":
			switch v {
			case "enabled":
			case "disabled":
				bind().NonRecursive = true
			case "writable":
				bind().ReadOnlyNonRecursive = true
			case "readonly":
				bind().ReadOnlyForceRecursive = true
			default:
				return bad("bind-recursive is enabled, disabled, writable or readonly")
			}
		case "volume-nocopy":
			vol().NoCopy = flag
		case "volume-subpath":
			vol().Subpath = v
		case "volume-label":
			lk, lv, _ := strings.Cut(v, "=")
			if vol().Labels == nil {
				vol().Labels = map[string]string{}
			}
			vol().Labels[lk] = lv
		case "volume-driver":
			if vol().DriverConfig == nil {
				vol().DriverConfig = &mount.Driver{}
			}
			vol().DriverConfig.Name = v
		case "volume-opt":
			ok, ov, _ := strings.Cut(v, "=")
			if vol().DriverConfig == nil {
				vol().DriverConfig = &mount.Driver{}
			}
			if vol().DriverConfig.Options == nil {
				vol().DriverConfig.Options = map[string]string{}
			}
			vol().DriverConfig.Options[ok] = ov
		case "tmpfs-size":
			n, err := units.RAMInBytes(v)
			if err != nil {
				return bad("%q is not a size", v)
			}
			tmpfs().SizeBytes = n
		case "tmpfs-mode":
			n, err := strconv.ParseUint(v, 8, 32)
			if err != nil {
				return bad("%q is not an octal mode", v)
			}
			tmpfs().Mode = os.FileMode(n)
		case "consistency":
			m.Consistency = mount.Consistency(v)
		default:
			return bad("unknown key %q", k)
		}
	}
	if m.Target == "" {
		return bad("it names no target")
	}
	for _, wrong := range []struct {
		set  bool
		kind mount.Type
	}{{m.BindOptions != nil, mount.TypeBind}, {m.VolumeOptions != nil, mount.TypeVolume}, {m.TmpfsOptions != nil, mount.TypeTmpfs}} {
		if wrong.set && m.Type != wrong.kind {
			return bad("options of a %s mount in one of type %s", wrong.kind, m.Type)
		}
	}
	return m, nil
}
