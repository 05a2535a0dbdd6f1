//go:build linux

package spec

import (
	"os"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/oci/internal/plainjson"
)

// decode parses the usual configuration without reflection. encoding/json spends half a
// millisecond on learning the types of the specification, a tenth of a container's
// start, before it reads the first byte. Whatever is unusual here (an unknown or
// repeated key, null, a wrong type, an exotic escape) is left to it: decode then gives
// nil. A fuzz test holds that the two never disagree.
func decode(raw []byte) *specs.Spec {
	d := decoder{plainjson.New(raw)}
	s := new(specs.Spec)
	d.spec(s)
	if !d.Plain() {
		return nil
	}
	return s
}

type decoder struct{ *plainjson.Decoder }

func ptr[T any](v T) *T { return &v }

func (d decoder) u32() uint32 { return uint32(d.Uint(32)) }

func (d decoder) spec(s *specs.Spec) {
	d.Object(func(k string) {
		switch k {
		case "ociVersion":
			s.Version = d.Str()
		case "process":
			s.Process = new(specs.Process)
			d.process(s.Process)
		case "root":
			s.Root = new(specs.Root)
			d.Object(func(k string) {
				switch k {
				case "path":
					s.Root.Path = d.Str()
				case "readonly":
					s.Root.Readonly = d.Bool()
				default:
					d.Fail()
				}
			})
		case "hostname":
			s.Hostname = d.Str()
		case "domainname":
			s.Domainname = d.Str()
		case "mounts":
			s.Mounts = plainjson.List(d.Decoder, d.mount)
		case "annotations":
			s.Annotations = d.StrMap()
		case "linux":
			s.Linux = new(specs.Linux)
			d.linux(s.Linux)
		case "hooks":
			s.Hooks = new(specs.Hooks)
			d.hooks(s.Hooks)
		default:
			d.Fail()
		}
	})
}

func (d decoder) process(p *specs.Process) {
	d.Object(func(k string) {
		switch k {
		case "terminal":
			p.Terminal = d.Bool()
		case "consoleSize":
			p.ConsoleSize = new(specs.Box)
			d.Object(func(k string) {
				switch k {
				case "height":
					p.ConsoleSize.Height = uint(d.Uint(64))
				case "width":
					p.ConsoleSize.Width = uint(d.Uint(64))
				default:
					d.Fail()
				}
			})
		case "user":
			d.user(&p.User)
		case "args":
			p.Args = d.Strs()
		case "env":
			p.Env = d.Strs()
		case "cwd":
			p.Cwd = d.Str()
		case "capabilities":
			p.Capabilities = new(specs.LinuxCapabilities)
			d.Object(func(k string) {
				c := p.Capabilities
				set, ok := map[string]*[]string{
					"bounding": &c.Bounding, "effective": &c.Effective, "inheritable": &c.Inheritable,
					"permitted": &c.Permitted, "ambient": &c.Ambient,
				}[k]
				if !ok {
					d.Fail()
					return
				}
				*set = d.Strs()
			})
		case "rlimits":
			p.Rlimits = plainjson.List(d.Decoder, func(r *specs.POSIXRlimit) {
				d.Object(func(k string) {
					switch k {
					case "type":
						r.Type = d.Str()
					case "hard":
						r.Hard = d.Uint(64)
					case "soft":
						r.Soft = d.Uint(64)
					default:
						d.Fail()
					}
				})
			})
		case "noNewPrivileges":
			p.NoNewPrivileges = d.Bool()
		case "apparmorProfile":
			p.ApparmorProfile = d.Str()
		case "selinuxLabel":
			p.SelinuxLabel = d.Str()
		case "oomScoreAdj":
			p.OOMScoreAdj = ptr(int(d.Int(64)))
		default:
			d.Fail()
		}
	})
}

func (d decoder) user(u *specs.User) {
	d.Object(func(k string) {
		switch k {
		case "uid":
			u.UID = d.u32()
		case "gid":
			u.GID = d.u32()
		case "umask":
			u.Umask = ptr(d.u32())
		case "additionalGids":
			u.AdditionalGids = plainjson.List(d.Decoder, func(g *uint32) { *g = d.u32() })
		default:
			d.Fail()
		}
	})
}

func (d decoder) mount(m *specs.Mount) {
	d.Object(func(k string) {
		switch k {
		case "destination":
			m.Destination = d.Str()
		case "type":
			m.Type = d.Str()
		case "source":
			m.Source = d.Str()
		case "options":
			m.Options = d.Strs()
		default:
			d.Fail()
		}
	})
}

func (d decoder) hooks(h *specs.Hooks) {
	d.Object(func(k string) {
		hooks, ok := map[string]*[]specs.Hook{
			"prestart": &h.Prestart, "createRuntime": &h.CreateRuntime, "createContainer": &h.CreateContainer, //nolint:staticcheck // prestart is deprecated, not gone
			"startContainer": &h.StartContainer, "poststart": &h.Poststart, "poststop": &h.Poststop,
		}[k]
		if !ok {
			d.Fail()
			return
		}
		*hooks = plainjson.List(d.Decoder, func(h *specs.Hook) {
			d.Object(func(k string) {
				switch k {
				case "path":
					h.Path = d.Str()
				case "args":
					h.Args = d.Strs()
				case "env":
					h.Env = d.Strs()
				case "timeout":
					h.Timeout = ptr(int(d.Int(64)))
				default:
					d.Fail()
				}
			})
		})
	})
}

func (d decoder) linux(l *specs.Linux) {
	maps := func(m *specs.LinuxIDMapping) {
		d.Object(func(k string) {
			switch k {
			case "containerID":
				m.ContainerID = d.u32()
			case "hostID":
				m.HostID = d.u32()
			case "size":
				m.Size = d.u32()
			default:
				d.Fail()
			}
		})
	}
	d.Object(func(k string) {
		switch k {
		case "uidMappings":
			l.UIDMappings = plainjson.List(d.Decoder, maps)
		case "gidMappings":
			l.GIDMappings = plainjson.List(d.Decoder, maps)
		case "sysctl":
			l.Sysctl = d.StrMap()
		case "resources":
			l.Resources = new(specs.LinuxResources)
			d.resources(l.Resources)
		case "cgroupsPath":
			l.CgroupsPath = d.Str()
		case "namespaces":
			l.Namespaces = plainjson.List(d.Decoder, func(n *specs.LinuxNamespace) {
				d.Object(func(k string) {
					switch k {
					case "type":
						n.Type = specs.LinuxNamespaceType(d.Str())
					case "path":
						n.Path = d.Str()
					default:
						d.Fail()
					}
				})
			})
		case "devices":
			l.Devices = plainjson.List(d.Decoder, d.device)
		case "seccomp":
			l.Seccomp = new(specs.LinuxSeccomp)
			d.seccomp(l.Seccomp)
		case "rootfsPropagation":
			l.RootfsPropagation = d.Str()
		case "maskedPaths":
			l.MaskedPaths = d.Strs()
		case "readonlyPaths":
			l.ReadonlyPaths = d.Strs()
		case "mountLabel":
			l.MountLabel = d.Str()
		default:
			d.Fail()
		}
	})
}

func (d decoder) device(v *specs.LinuxDevice) {
	d.Object(func(k string) {
		switch k {
		case "path":
			v.Path = d.Str()
		case "type":
			v.Type = d.Str()
		case "major":
			v.Major = d.Int(64)
		case "minor":
			v.Minor = d.Int(64)
		case "fileMode":
			v.FileMode = ptr(os.FileMode(d.u32()))
		case "uid":
			v.UID = ptr(d.u32())
		case "gid":
			v.GID = ptr(d.u32())
		default:
			d.Fail()
		}
	})
}

func (d decoder) resources(r *specs.LinuxResources) {
	d.Object(func(k string) {
		switch k {
		case "devices":
			r.Devices = plainjson.List(d.Decoder, func(v *specs.LinuxDeviceCgroup) {
				d.Object(func(k string) {
					switch k {
					case "allow":
						v.Allow = d.Bool()
					case "type":
						v.Type = d.Str()
					case "major":
						v.Major = ptr(d.Int(64))
					case "minor":
						v.Minor = ptr(d.Int(64))
					case "access":
						v.Access = d.Str()
					default:
						d.Fail()
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
			d.Object(func(k string) {
				if k != "limit" {
					d.Fail()
					return
				}
				r.Pids.Limit = ptr(d.Int(64))
			})
		case "unified":
			r.Unified = d.StrMap()
		default:
			d.Fail()
		}
	})
}

func (d decoder) memory(m *specs.LinuxMemory) {
	d.Object(func(k string) {
		switch k {
		case "limit":
			m.Limit = ptr(d.Int(64))
		case "reservation":
			m.Reservation = ptr(d.Int(64))
		case "swap":
			m.Swap = ptr(d.Int(64))
		case "swappiness":
			m.Swappiness = ptr(d.Uint(64))
		case "disableOOMKiller":
			m.DisableOOMKiller = ptr(d.Bool())
		default:
			d.Fail()
		}
	})
}

func (d decoder) cpu(c *specs.LinuxCPU) {
	d.Object(func(k string) {
		switch k {
		case "shares":
			c.Shares = ptr(d.Uint(64))
		case "quota":
			c.Quota = ptr(d.Int(64))
		case "burst":
			c.Burst = ptr(d.Uint(64))
		case "period":
			c.Period = ptr(d.Uint(64))
		case "cpus":
			c.Cpus = d.Str()
		case "mems":
			c.Mems = d.Str()
		default:
			d.Fail()
		}
	})
}

func (d decoder) seccomp(s *specs.LinuxSeccomp) {
	d.Object(func(k string) {
		switch k {
		case "defaultAction":
			s.DefaultAction = specs.LinuxSeccompAction(d.Str())
		case "defaultErrnoRet":
			s.DefaultErrnoRet = ptr(uint(d.Uint(64)))
		case "architectures":
			s.Architectures = plainjson.List(d.Decoder, func(a *specs.Arch) { *a = specs.Arch(d.Str()) })
		case "flags":
			s.Flags = plainjson.List(d.Decoder, func(f *specs.LinuxSeccompFlag) { *f = specs.LinuxSeccompFlag(d.Str()) })
		case "syscalls":
			s.Syscalls = plainjson.List(d.Decoder, func(c *specs.LinuxSyscall) {
				d.Object(func(k string) {
					switch k {
					case "names":
						c.Names = d.Strs()
					case "action":
						c.Action = specs.LinuxSeccompAction(d.Str())
					case "errnoRet":
						c.ErrnoRet = ptr(uint(d.Uint(64)))
					case "args":
						c.Args = plainjson.List(d.Decoder, d.seccompArg)
					default:
						d.Fail()
					}
				})
			})
		default:
			d.Fail()
		}
	})
}

func (d decoder) seccompArg(a *specs.LinuxSeccompArg) {
	d.Object(func(k string) {
		switch k {
		case "index":
			a.Index = uint(d.Uint(64))
		case "value":
			a.Value = d.Uint(64)
		case "valueTwo":
			a.ValueTwo = d.Uint(64)
		case "op":
			a.Op = specs.LinuxSeccompOperator(d.Str())
		default:
			d.Fail()
		}
	})
}
