//go:build linux

package spec

import (
	"os"
	"slices"
	"strconv"
	"unicode/utf8"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// decode parses the usual configuration without reflection. encoding/json spends half a
// millisecond on learning the types of the specification, a tenth of a container's
// start, before it reads the first byte. Whatever is unusual here (an unknown or
// repeated key, null, a wrong type, an exotic escape) is left to it: decode then gives
// nil. A fuzz test holds that the two never disagree.
func decode(raw []byte) *specs.Spec {
	d := &decoder{b: raw}
	s := new(specs.Spec)
	d.spec(s)
	d.space()
	if d.bad || d.i != len(d.b) {
		return nil
	}
	return s
}

type decoder struct {
	b     []byte
	i     int
	depth int
	bad   bool
}

const maxNesting = 64

func (d *decoder) fail() { d.bad = true; d.i = len(d.b) }

func (d *decoder) space() {
	for d.i < len(d.b) && (d.b[d.i] == ' ' || d.b[d.i] == '\n' || d.b[d.i] == '\t' || d.b[d.i] == '\r') {
		d.i++
	}
}

// next skips white space and takes c if it is there.
func (d *decoder) next(c byte) bool {
	d.space()
	if d.i < len(d.b) && d.b[d.i] == c {
		d.i++
		return true
	}
	return false
}

// object calls field for each key; field reads the value.
func (d *decoder) object(field func(key string)) {
	if d.depth++; d.depth > maxNesting || !d.next('{') {
		d.fail()
		return
	}
	defer func() { d.depth-- }()
	if d.next('}') {
		return
	}
	var seen [40]string
	keys := seen[:0]
	for !d.bad {
		k := d.str()
		if slices.Contains(keys, k) || len(keys) == cap(keys) || !d.next(':') {
			d.fail()
			return
		}
		keys = append(keys, k)
		field(k)
		if d.next('}') {
			return
		}
		if !d.next(',') {
			d.fail()
		}
	}
}

// list calls item for each element. The result of encoding/json is never nil for [].
func list[T any](d *decoder, item func(*T)) []T {
	out := []T{}
	if d.depth++; d.depth > maxNesting || !d.next('[') {
		d.fail()
		return out
	}
	defer func() { d.depth-- }()
	if d.next(']') {
		return out
	}
	for !d.bad {
		var v T
		item(&v)
		out = append(out, v)
		if d.next(']') {
			return out
		}
		if !d.next(',') {
			d.fail()
		}
	}
	return out
}

func (d *decoder) str() string {
	if !d.next('"') {
		d.fail()
		return ""
	}
	start, plain := d.i, true
	for d.i < len(d.b) {
		switch c := d.b[d.i]; {
		case c == '"':
			raw := d.b[start:d.i]
			d.i++
			if plain {
				return string(raw)
			}
			return d.unescape(raw)
		case c < ' ':
			d.fail()
			return ""
		case c == '\\':
			plain = false
			d.i += 2
		case c >= utf8.RuneSelf:
			plain = false
			d.i++
		default:
			d.i++
		}
	}
	d.fail()
	return ""
}

func (d *decoder) unescape(raw []byte) string {
	if !utf8.Valid(raw) {
		d.fail()
		return ""
	}
	out := make([]byte, 0, len(raw))
	for i := 0; i < len(raw); i++ {
		if raw[i] != '\\' {
			out = append(out, raw[i])
			continue
		}
		i++
		switch raw[i] {
		case '"', '\\', '/':
			out = append(out, raw[i])
		case 'n':
			out = append(out, '\n')
		case 't':
			out = append(out, '\t')
		case 'r':
			out = append(out, '\r')
		case 'u': // as encoding/json writes <, > and &
			if i+5 > len(raw) {
				d.fail()
				return ""
			}
			n, err := strconv.ParseUint(string(raw[i+1:i+5]), 16, 16)
			if err != nil || n >= 0xd800 && n < 0xe000 {
				d.fail()
				return ""
			}
			out = utf8.AppendRune(out, rune(n))
			i += 4
		default:
			d.fail()
			return ""
		}
	}
	return string(out)
}

func (d *decoder) strs() []string { return list(d, func(s *string) { *s = d.str() }) }

func (d *decoder) boolean() bool {
	d.space()
	rest := d.b[d.i:]
	switch {
	case len(rest) >= 4 && string(rest[:4]) == "true":
		d.i += 4
		return true
	case len(rest) >= 5 && string(rest[:5]) == "false":
		d.i += 5
		return false
	}
	d.fail()
	return false
}

// number reads an integer. Fractions and exponents are unusual.
func (d *decoder) number() (text string) {
	d.space()
	start := d.i
	if d.i < len(d.b) && d.b[d.i] == '-' {
		d.i++
	}
	digits := d.i
	for d.i < len(d.b) && d.b[d.i] >= '0' && d.b[d.i] <= '9' {
		d.i++
	}
	if d.i == digits || d.b[digits] == '0' && d.i > digits+1 {
		d.fail()
		return "0"
	}
	return string(d.b[start:d.i])
}

func (d *decoder) int(bits int) int64 {
	n, err := strconv.ParseInt(d.number(), 10, bits)
	if err != nil {
		d.fail()
	}
	return n
}

func (d *decoder) uint(bits int) uint64 {
	n, err := strconv.ParseUint(d.number(), 10, bits)
	if err != nil {
		d.fail()
	}
	return n
}

func ptr[T any](v T) *T { return &v }

func (d *decoder) u32() uint32 { return uint32(d.uint(32)) }

func (d *decoder) strMap() map[string]string {
	m := map[string]string{}
	// Maps may be larger than object allows: annotations are left to encoding/json then.
	d.object(func(k string) { m[k] = d.str() })
	return m
}

func (d *decoder) spec(s *specs.Spec) {
	d.object(func(k string) {
		switch k {
		case "ociVersion":
			s.Version = d.str()
		case "process":
			s.Process = new(specs.Process)
			d.process(s.Process)
		case "root":
			s.Root = new(specs.Root)
			d.object(func(k string) {
				switch k {
				case "path":
					s.Root.Path = d.str()
				case "readonly":
					s.Root.Readonly = d.boolean()
				default:
					d.fail()
				}
			})
		case "hostname":
			s.Hostname = d.str()
		case "domainname":
			s.Domainname = d.str()
		case "mounts":
			s.Mounts = list(d, d.mount)
		case "annotations":
			s.Annotations = d.strMap()
		case "linux":
			s.Linux = new(specs.Linux)
			d.linux(s.Linux)
		case "hooks":
			s.Hooks = new(specs.Hooks)
			d.hooks(s.Hooks)
		default:
			d.fail()
		}
	})
}

func (d *decoder) process(p *specs.Process) {
	d.object(func(k string) {
		switch k {
		case "terminal":
			p.Terminal = d.boolean()
		case "consoleSize":
			p.ConsoleSize = new(specs.Box)
			d.object(func(k string) {
				switch k {
				case "height":
					p.ConsoleSize.Height = uint(d.uint(64))
				case "width":
					p.ConsoleSize.Width = uint(d.uint(64))
				default:
					d.fail()
				}
			})
		case "user":
			d.user(&p.User)
		case "args":
			p.Args = d.strs()
		case "env":
			p.Env = d.strs()
		case "cwd":
			p.Cwd = d.str()
		case "capabilities":
			p.Capabilities = new(specs.LinuxCapabilities)
			d.object(func(k string) {
				c := p.Capabilities
				set, ok := map[string]*[]string{
					"bounding": &c.Bounding, "effective": &c.Effective, "inheritable": &c.Inheritable,
					"permitted": &c.Permitted, "ambient": &c.Ambient,
				}[k]
				if !ok {
					d.fail()
					return
				}
				*set = d.strs()
			})
		case "rlimits":
			p.Rlimits = list(d, func(r *specs.POSIXRlimit) {
				d.object(func(k string) {
					switch k {
					case "type":
						r.Type = d.str()
					case "hard":
						r.Hard = d.uint(64)
					case "soft":
						r.Soft = d.uint(64)
					default:
						d.fail()
					}
				})
			})
		case "noNewPrivileges":
			p.NoNewPrivileges = d.boolean()
		case "apparmorProfile":
			p.ApparmorProfile = d.str()
		case "selinuxLabel":
			p.SelinuxLabel = d.str()
		case "oomScoreAdj":
			p.OOMScoreAdj = ptr(int(d.int(64)))
		default:
			d.fail()
		}
	})
}

func (d *decoder) user(u *specs.User) {
	d.object(func(k string) {
		switch k {
		case "uid":
			u.UID = d.u32()
		case "gid":
			u.GID = d.u32()
		case "umask":
			u.Umask = ptr(d.u32())
		case "additionalGids":
			u.AdditionalGids = list(d, func(g *uint32) { *g = d.u32() })
		default:
			d.fail()
		}
	})
}

func (d *decoder) mount(m *specs.Mount) {
	d.object(func(k string) {
		switch k {
		case "destination":
			m.Destination = d.str()
		case "type":
			m.Type = d.str()
		case "source":
			m.Source = d.str()
		case "options":
			m.Options = d.strs()
		default:
			d.fail()
		}
	})
}

func (d *decoder) hooks(h *specs.Hooks) {
	d.object(func(k string) {
		hooks, ok := map[string]*[]specs.Hook{
			"prestart": &h.Prestart, "createRuntime": &h.CreateRuntime, "createContainer": &h.CreateContainer, //nolint:staticcheck // prestart is deprecated, not gone
			"startContainer": &h.StartContainer, "poststart": &h.Poststart, "poststop": &h.Poststop,
		}[k]
		if !ok {
			d.fail()
			return
		}
		*hooks = list(d, func(h *specs.Hook) {
			d.object(func(k string) {
				switch k {
				case "path":
					h.Path = d.str()
				case "args":
					h.Args = d.strs()
				case "env":
					h.Env = d.strs()
				case "timeout":
					h.Timeout = ptr(int(d.int(64)))
				default:
					d.fail()
				}
			})
		})
	})
}

func (d *decoder) linux(l *specs.Linux) {
	maps := func(m *specs.LinuxIDMapping) {
		d.object(func(k string) {
			switch k {
			case "containerID":
				m.ContainerID = d.u32()
			case "hostID":
				m.HostID = d.u32()
			case "size":
				m.Size = d.u32()
			default:
				d.fail()
			}
		})
	}
	d.object(func(k string) {
		switch k {
		case "uidMappings":
			l.UIDMappings = list(d, maps)
		case "gidMappings":
			l.GIDMappings = list(d, maps)
		case "sysctl":
			l.Sysctl = d.strMap()
		case "resources":
			l.Resources = new(specs.LinuxResources)
			d.resources(l.Resources)
		case "cgroupsPath":
			l.CgroupsPath = d.str()
		case "namespaces":
			l.Namespaces = list(d, func(n *specs.LinuxNamespace) {
				d.object(func(k string) {
					switch k {
					case "type":
						n.Type = specs.LinuxNamespaceType(d.str())
					case "path":
						n.Path = d.str()
					default:
						d.fail()
					}
				})
			})
		case "devices":
			l.Devices = list(d, d.device)
		case "seccomp":
			l.Seccomp = new(specs.LinuxSeccomp)
			d.seccomp(l.Seccomp)
		case "rootfsPropagation":
			l.RootfsPropagation = d.str()
		case "maskedPaths":
			l.MaskedPaths = d.strs()
		case "readonlyPaths":
			l.ReadonlyPaths = d.strs()
		case "mountLabel":
			l.MountLabel = d.str()
		default:
			d.fail()
		}
	})
}

func (d *decoder) device(v *specs.LinuxDevice) {
	d.object(func(k string) {
		switch k {
		case "path":
			v.Path = d.str()
		case "type":
			v.Type = d.str()
		case "major":
			v.Major = d.int(64)
		case "minor":
			v.Minor = d.int(64)
		case "fileMode":
			v.FileMode = ptr(os.FileMode(d.u32()))
		case "uid":
			v.UID = ptr(d.u32())
		case "gid":
			v.GID = ptr(d.u32())
		default:
			d.fail()
		}
	})
}

func (d *decoder) resources(r *specs.LinuxResources) {
	d.object(func(k string) {
		switch k {
		case "devices":
			r.Devices = list(d, func(v *specs.LinuxDeviceCgroup) {
				d.object(func(k string) {
					switch k {
					case "allow":
						v.Allow = d.boolean()
					case "type":
						v.Type = d.str()
					case "major":
						v.Major = ptr(d.int(64))
					case "minor":
						v.Minor = ptr(d.int(64))
					case "access":
						v.Access = d.str()
					default:
						d.fail()
					}
				})
			})
		case "memory":
			r.Memory = new(specs.LinuxMemory)
			d.memory(r.Memory)
		case "cpu":
			r.CPU = new(specs.LinuxCPU)
			d.cpu(r.CPU)
		case "pids":
			r.Pids = new(specs.LinuxPids)
			d.object(func(k string) {
				if k != "limit" {
					d.fail()
					return
				}
				r.Pids.Limit = ptr(d.int(64))
			})
		case "unified":
			r.Unified = d.strMap()
		default:
			d.fail()
		}
	})
}

func (d *decoder) memory(m *specs.LinuxMemory) {
	d.object(func(k string) {
		switch k {
		case "limit":
			m.Limit = ptr(d.int(64))
		case "reservation":
			m.Reservation = ptr(d.int(64))
		case "swap":
			m.Swap = ptr(d.int(64))
		case "swappiness":
			m.Swappiness = ptr(d.uint(64))
		case "disableOOMKiller":
			m.DisableOOMKiller = ptr(d.boolean())
		default:
			d.fail()
		}
	})
}

func (d *decoder) cpu(c *specs.LinuxCPU) {
	d.object(func(k string) {
		switch k {
		case "shares":
			c.Shares = ptr(d.uint(64))
		case "quota":
			c.Quota = ptr(d.int(64))
		case "burst":
			c.Burst = ptr(d.uint(64))
		case "period":
			c.Period = ptr(d.uint(64))
		case "cpus":
			c.Cpus = d.str()
		case "mems":
			c.Mems = d.str()
		default:
			d.fail()
		}
	})
}

func (d *decoder) seccomp(s *specs.LinuxSeccomp) {
	d.object(func(k string) {
		switch k {
		case "defaultAction":
			s.DefaultAction = specs.LinuxSeccompAction(d.str())
		case "defaultErrnoRet":
			s.DefaultErrnoRet = ptr(uint(d.uint(64)))
		case "architectures":
			s.Architectures = list(d, func(a *specs.Arch) { *a = specs.Arch(d.str()) })
		case "flags":
			s.Flags = list(d, func(f *specs.LinuxSeccompFlag) { *f = specs.LinuxSeccompFlag(d.str()) })
		case "syscalls":
			s.Syscalls = list(d, func(c *specs.LinuxSyscall) {
				d.object(func(k string) {
					switch k {
					case "names":
						c.Names = d.strs()
					case "action":
						c.Action = specs.LinuxSeccompAction(d.str())
					case "errnoRet":
						c.ErrnoRet = ptr(uint(d.uint(64)))
					case "args":
						c.Args = list(d, d.seccompArg)
					default:
						d.fail()
					}
				})
			})
		default:
			d.fail()
		}
	})
}

func (d *decoder) seccompArg(a *specs.LinuxSeccompArg) {
	d.object(func(k string) {
		switch k {
		case "index":
			a.Index = uint(d.uint(64))
		case "value":
			a.Value = d.uint(64)
		case "valueTwo":
			a.ValueTwo = d.uint(64)
		case "op":
			a.Op = specs.LinuxSeccompOperator(d.str())
		default:
			d.fail()
		}
	})
}
