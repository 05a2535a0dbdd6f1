//go:build linux

// Package spec reads, checks and writes OCI configurations.
//
// In flow the bytes of a config.json, which may come from anybody; out flows a
// specification of which the rest of the runtime may assume that it makes sense, or an
// errdefs.ErrInvalidArgument that names the field.
package spec

import (
	"encoding/json"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/internal/classed"
	"github.com/hako-engine/hako/oci/internal/rawfile"
)

// MaxSize bounds a config.json, in bytes.
const MaxSize = 16 << 20

// Version is the version of the runtime specification that is implemented.
const Version = "1.3.0"

// Read reads the configuration of a bundle, and gives its text too.
func Read(file string) (*specs.Spec, []byte, error) {
	raw, err := readBounded(file)
	if os.IsNotExist(err) {
		return nil, nil, classed.Errorf(errdefs.ErrNotFound, "JSON specification file %s not found in %s", path.Base(file), path.Dir(file))
	}
	if err != nil {
		return nil, nil, err
	}
	s, err := Parse(raw)
	return s, raw, err
}

func readBounded(file string) ([]byte, error) {
	fd, err := rawfile.Open(file, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: file, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > MaxSize {
		return nil, classed.Errorf(errdefs.ErrInvalidArgument, "%s: not a regular file of at most %d bytes", file, MaxSize)
	}
	raw, err := rawfile.ReadFD(fd, int(st.Size), MaxSize)
	if err != nil {
		return nil, &os.PathError{Op: "read", Path: file, Err: err}
	}
	return raw, nil
}

// Parse parses and checks a configuration.
func Parse(raw []byte) (*specs.Spec, error) {
	s, err := Decode(raw)
	if err != nil {
		return nil, err
	}
	return s, Validate(s)
}

// Decode is Parse without the checks, for what has passed them.
func Decode(raw []byte) (*specs.Spec, error) {
	if s := decode(raw); s != nil {
		return s, nil
	}
	s := new(specs.Spec)
	if err := json.Unmarshal(raw, s); err != nil {
		return nil, classed.Errorf(errdefs.ErrInvalidArgument, "config.json: %w", err)
	}
	return s, nil
}

func invalid(format string, a ...any) error {
	return classed.Errorf(errdefs.ErrInvalidArgument, format, a...)
}

// Validate checks what can be checked without looking at the host.
func Validate(s *specs.Spec) error {
	if v, _, _ := strings.Cut(s.Version, "."); v != "1" {
		return invalid("ociVersion %q is not supported (1.x is)", s.Version)
	}
	if s.Linux == nil {
		s.Linux = &specs.Linux{}
	}
	if s.Root == nil || s.Root.Path == "" {
		return invalid("root.path: missing")
	}
	if s.Solaris != nil || s.Windows != nil || s.VM != nil || s.ZOS != nil || s.FreeBSD != nil {
		return invalid("a configuration for another platform than linux")
	}
	if err := noNUL("root.path", s.Root.Path); err != nil {
		return err
	}
	if s.Process != nil {
		if err := ValidateProcess(s.Process); err != nil {
			return err
		}
	}
	if err := namespaces(s); err != nil {
		return err
	}
	if err := sysctls(s); err != nil {
		return err
	}
	if err := maps(s.Linux); err != nil {
		return err
	}
	for _, list := range [][]string{s.Linux.MaskedPaths, s.Linux.ReadonlyPaths} {
		for _, p := range list {
			if !path.IsAbs(p) || strings.IndexByte(p, 0) >= 0 {
				return invalid("linux.maskedPaths, readonlyPaths: %q is not an absolute path", p)
			}
		}
	}
	if len(s.Hostname) > 64 || len(s.Domainname) > 64 {
		return invalid("hostname, domainname: longer than 64 bytes")
	}
	for _, check := range []func(*specs.Spec) error{mounts, intelRdt, netDevices, seccomp} {
		if err := check(s); err != nil {
			return err
		}
	}
	return hooks(s.Hooks)
}

// ValidateProcess checks a process, of a container or for exec.
func ValidateProcess(p *specs.Process) error {
	if !path.IsAbs(p.Cwd) {
		return invalid("process.cwd: %q is not an absolute path", p.Cwd)
	}
	if len(p.Args) == 0 || p.Args[0] == "" {
		return invalid("process.args: empty")
	}
	for _, list := range [][]string{p.Args, p.Env, {p.Cwd, p.ApparmorProfile, p.SelinuxLabel}} {
		for _, v := range list {
			if err := noNUL("process", v); err != nil {
				return err
			}
		}
	}
	for _, e := range p.Env {
		if i := strings.IndexByte(e, '='); i <= 0 {
			return invalid("process.env: %q is not KEY=value", e)
		}
	}
	if o := p.OOMScoreAdj; o != nil && (*o < -1000 || *o > 1000) {
		return invalid("process.oomScoreAdj: %d is not within -1000 and 1000", *o)
	}
	if uint64(p.User.UID) == 1<<32-1 || uint64(p.User.GID) == 1<<32-1 || slices.Contains(p.User.AdditionalGids, 1<<32-1) {
		return invalid("process.user: %d is not an id", uint32(1<<32-1))
	}
	return nil
}

func noNUL(field, v string) error {
	if strings.IndexByte(v, 0) >= 0 {
		return invalid("%s: %q contains a NUL byte", field, v)
	}
	return nil
}

var namespaceTypes = []specs.LinuxNamespaceType{
	specs.PIDNamespace, specs.NetworkNamespace, specs.MountNamespace, specs.IPCNamespace,
	specs.UTSNamespace, specs.UserNamespace, specs.CgroupNamespace, specs.TimeNamespace,
}

// MaxPath is the kernel's PATH_MAX.
const MaxPath = 4096

func namespaces(s *specs.Spec) error {
	var seen []specs.LinuxNamespaceType
	for _, n := range s.Linux.Namespaces {
		if !slices.Contains(namespaceTypes, n.Type) {
			return invalid("linux.namespaces: unknown type %q", n.Type)
		}
		if slices.Contains(seen, n.Type) {
			return invalid("linux.namespaces: %s is given twice", n.Type)
		}
		seen = append(seen, n.Type)
		if n.Path != "" && !path.IsAbs(n.Path) || len(n.Path) >= MaxPath {
			return invalid("linux.namespaces: %s: %.40q is not an absolute path of less than %d bytes", n.Type, n.Path, MaxPath)
		}
		if err := noNUL("linux.namespaces", n.Path); err != nil {
			return err
		}
	}
	if (s.Hostname != "" || s.Domainname != "") && !slices.Contains(seen, specs.UTSNamespace) {
		return invalid("hostname, domainname: they need a uts namespace")
	}
	if len(s.Linux.TimeOffsets) > 0 && !isNew(s.Linux, specs.TimeNamespace) {
		return invalid("linux.timeOffsets: they need a new time namespace")
	}
	for clock, o := range s.Linux.TimeOffsets {
		if clock != "monotonic" && clock != "boottime" {
			return invalid("linux.timeOffsets: no such clock as %.40q, there are monotonic and boottime", clock)
		}
		if o.Nanosecs >= 1e9 {
			return invalid("linux.timeOffsets: %s: %d nanoseconds are not less than a second", clock, o.Nanosecs)
		}
	}
	return nil
}

func has(l *specs.Linux, t specs.LinuxNamespaceType) bool {
	return slices.ContainsFunc(l.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == t })
}

func isNew(l *specs.Linux, t specs.LinuxNamespaceType) bool {
	return slices.ContainsFunc(l.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == t && n.Path == "" })
}

// maxMaps is the kernel's limit of lines in a uid_map.
const maxMaps = 340

func maps(l *specs.Linux) error {
	if len(l.UIDMappings)+len(l.GIDMappings) == 0 {
		if isNew(l, specs.UserNamespace) {
			return invalid("linux.uidMappings, gidMappings: a new user namespace needs them")
		}
		return nil
	}
	if !has(l, specs.UserNamespace) {
		return invalid("linux.uidMappings, gidMappings: they need a user namespace")
	}
	return ranges("linux.uidMappings, gidMappings", l.UIDMappings, l.GIDMappings)
}

// ranges checks the maps of a user namespace.
func ranges(field string, lists ...[]specs.LinuxIDMapping) error {
	for _, m := range lists {
		if len(m) == 0 || len(m) > maxMaps {
			return invalid("%s: %d entries, at least 1 and at most %d are possible", field, len(m), maxMaps)
		}
		for _, e := range m {
			if e.Size == 0 || uint64(e.ContainerID)+uint64(e.Size) > 1<<32-1 || uint64(e.HostID)+uint64(e.Size) > 1<<32-1 {
				return invalid("%s: %d:%d:%d is out of range", field, e.ContainerID, e.HostID, e.Size)
			}
		}
	}
	return nil
}

func mounts(s *specs.Spec) error {
	for _, m := range s.Mounts {
		if len(m.UIDMappings)+len(m.GIDMappings) == 0 {
			continue
		}
		if err := ranges("mounts: "+m.Destination+": uidMappings, gidMappings", m.UIDMappings, m.GIDMappings); err != nil {
			return err
		}
	}
	return nil
}

func intelRdt(s *specs.Spec) error {
	r := s.Linux.IntelRdt
	if r == nil {
		return nil
	}
	if id := r.ClosID; id == "." || id == ".." || id != "/" && strings.ContainsAny(id, "/\n\x00") || len(id) > 255 {
		return invalid("linux.intelRdt.closID: %.40q is neither the name of a directory nor /", id)
	}
	for _, line := range append([]string{r.L3CacheSchema, r.MemBwSchema}, r.Schemata...) {
		if strings.ContainsAny(line, "\n\x00") {
			return invalid("linux.intelRdt: %.40q holds a line break", line)
		}
	}
	if r.MemBwSchema != "" && !strings.HasPrefix(r.MemBwSchema, "MB:") {
		return invalid("linux.intelRdt.memBwSchema: %.40q does not start with MB:", r.MemBwSchema)
	}
	return nil
}

// maxInterface is the length of a network device's name.
const maxInterface = 15

func netDevices(s *specs.Spec) error {
	if len(s.Linux.NetDevices) == 0 {
		return nil
	}
	if !has(s.Linux, specs.NetworkNamespace) {
		return invalid("linux.netDevices: they need a network namespace")
	}
	taken := map[string]string{}
	for host, d := range s.Linux.NetDevices {
		name := d.Name
		if name == "" {
			name = host
		}
		for _, n := range []string{host, name} {
			template := n == name && strings.HasSuffix(n, "%d") && strings.Count(n, "%") == 1
			if n == "" || len(n) > maxInterface || n == "." || n == ".." || strings.ContainsAny(n, "/: \t\n\v\f\r\x00") || strings.Contains(n, "%") && !template {
				return invalid("linux.netDevices: %.40q cannot be the name of a network device", n)
			}
		}
		if other, ok := taken[name]; ok && !strings.HasSuffix(name, "%d") {
			return invalid("linux.netDevices: %s and %s would both be called %s", host, other, name)
		}
		taken[name] = host
	}
	return nil
}

func seccomp(s *specs.Spec) error {
	p := s.Linux.Seccomp
	if p == nil {
		return nil
	}
	if p.ListenerMetadata != "" && p.ListenerPath == "" {
		return invalid("linux.seccomp.listenerMetadata: there is no listenerPath")
	}
	return noNUL("linux.seccomp.listenerPath", p.ListenerPath)
}

// ipcSysctls belong to the IPC namespace, as everything below fs/mqueue does.
var ipcSysctls = []string{
	"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced",
	"kernel.auto_msgmni", "kernel.msg_next_id", "kernel.sem_next_id", "kernel.shm_next_id",
}

// sysctls lets only those pass that are private to a namespace of the container: all
// others are the host's.
func sysctls(s *specs.Spec) error {
	for k, v := range s.Linux.Sysctl {
		if k == "" || strings.ContainsAny(k, "\x00\n \t") || strings.ContainsAny(v, "\x00\n") || len(v) > 4096 {
			return invalid("linux.sysctl: %q=%q: bad characters", k, v)
		}
		dotted := k
		if i := strings.IndexAny(k, "./"); i >= 0 && k[i] == '/' {
			dotted = strings.NewReplacer("/", ".", ".", "/").Replace(k)
		}
		if slices.ContainsFunc(strings.Split(dotted, "."), func(e string) bool { return e == "" || e == "/" || e == "//" }) {
			return invalid("linux.sysctl: %q: not a name", k)
		}
		var need specs.LinuxNamespaceType
		switch {
		case slices.Contains(ipcSysctls, dotted), strings.HasPrefix(dotted, "fs.mqueue."):
			need = specs.IPCNamespace
		case strings.HasPrefix(dotted, "net."):
			need = specs.NetworkNamespace
		case dotted == "kernel.domainname":
			need = specs.UTSNamespace
		case dotted == "kernel.hostname":
			return invalid("linux.sysctl: %q: use the field hostname", k)
		case strings.HasPrefix(dotted, "user."):
			need = specs.UserNamespace
		default:
			return invalid("linux.sysctl: %q is not in a separate kernel namespace", k)
		}
		if !has(s.Linux, need) {
			return invalid("linux.sysctl: %q is not allowed in the host's %s namespace", k, need)
		}
	}
	return nil
}

func hooks(h *specs.Hooks) error {
	if h == nil {
		return nil
	}
	for _, list := range [][]specs.Hook{h.Prestart, h.CreateRuntime, h.CreateContainer, h.StartContainer, h.Poststart, h.Poststop} { //nolint:staticcheck // prestart is deprecated, not gone
		for _, k := range list {
			if !path.IsAbs(k.Path) {
				return invalid("hooks: path %q is not absolute", k.Path)
			}
			if k.Timeout != nil && *k.Timeout <= 0 {
				return invalid("hooks: %s: timeout %d is not positive", k.Path, *k.Timeout)
			}
			for _, v := range append(append([]string{k.Path}, k.Args...), k.Env...) {
				if err := noNUL("hooks", v); err != nil {
					return err
				}
			}
		}
	}
	return nil
}
