//go:build linux

package engine

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/internal/safepath"
)

// SELinux is what a client asks of a label: empty parts are the policy's, or the pod's.
type SELinux struct {
	User  string `json:"user,omitempty"`
	Role  string `json:"role,omitempty"`
	Type  string `json:"type,omitempty"`
	Level string `json:"level,omitempty"`
}

// selinux labels pods where SELinux is on. Containers outside pods have no label, as with Docker's
// daemon unless it is told otherwise.
type selinux struct {
	check string // selinuxfs's file that says whether the policy has a context
	// Contexts of a container's processes and files, from the policy's lxc_contexts: user:role:type:level.
	process, file SELinux
}

// spcType is the type of processes that are not confined, in the policies that know containers.
const spcType = "spc_t"

// categories is how many there are in a policy with MCS. Two of them, which no other pod has, keep a pod
// apart.
const categories = 1024

// probeSELinux gives nil where SELinux is off, or its policy knows no containers; why then says so.
func probeSELinux(sys, etc string) (s *selinux, why string) {
	dir := filepath.Join(sys, "fs/selinux")
	if _, err := os.Stat(filepath.Join(dir, "enforce")); err != nil {
		return nil, ""
	}
	policy := "targeted"
	raw, _ := os.ReadFile(filepath.Join(etc, "selinux/config"))
	for line := range strings.Lines(string(raw)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "SELINUXTYPE="); ok {
			policy = strings.TrimSpace(v)
		}
	}
	path := filepath.Join(etc, "selinux", policy, "contexts/lxc_contexts")
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Sprintf("the SELinux policy %q knows no containers (container-selinux is not installed?): %v", policy, err)
	}
	s = &selinux{check: filepath.Join(dir, "context")}
	for line := range strings.Lines(string(raw)) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), "=")
		c, ok := parseSELinux(strings.Trim(strings.TrimSpace(v), `"`))
		if !ok {
			continue
		}
		switch strings.TrimSpace(k) {
		case "process":
			s.process = c
		case "file":
			s.file = c
		}
	}
	if s.process.Type == "" || s.file.Type == "" {
		return nil, path + " names no context of processes or files"
	}
	return s, ""
}

// parseSELinux reads user:role:type[:level]; a level has colons of its own.
func parseSELinux(context string) (SELinux, bool) {
	f := strings.SplitN(context, ":", 4)
	if len(f) < 3 || slices.Contains(f[:3], "") {
		return SELinux{}, false
	}
	c := SELinux{User: f[0], Role: f[1], Type: f[2]}
	if len(f) == 4 {
		c.Level = f[3]
	}
	return c, true
}

func (c SELinux) String() string {
	s := c.User + ":" + c.Role + ":" + c.Type
	if c.Level != "" {
		s += ":" + c.Level
	}
	return s
}

// over lays what is asked for over c.
func (c SELinux) over(o *SELinux) SELinux {
	if o == nil {
		return c
	}
	for _, f := range []struct {
		to   *string
		from string
	}{{&c.User, o.User}, {&c.Role, o.Role}, {&c.Type, o.Type}, {&c.Level, o.Level}} {
		if f.from != "" {
			*f.to = f.from
		}
	}
	return c
}

// level chooses the level of a pod: the one asked for, or one that no other has.
func (s *selinux) level(asked *SELinux, taken map[string]bool) (string, error) {
	if asked != nil && asked.Level != "" {
		return asked.Level, s.valid(s.process.over(asked))
	}
	base, _, _ := strings.Cut(s.process.Level, ":")
	if base == "" {
		return "", nil // a policy without levels
	}
	for range 100 * categories {
		a, b := rand.IntN(categories), rand.IntN(categories)
		if a == b {
			continue
		}
		l := fmt.Sprintf("%s:c%d,c%d", base, min(a, b), max(a, b))
		if !taken[l] {
			return l, nil
		}
	}
	return "", errors.New("no SELinux level is free for the pod")
}

// labels are those of the processes and files of a container: what it asks for, laid over what its pod does.
func (s *selinux) labels(pod, own *SELinux, level string, privileged bool) (process, file string, err error) {
	p, f := s.process, s.file
	p.Level, f.Level = level, level
	if privileged {
		p.Type = spcType
	}
	p = p.over(pod).over(own)
	if own == nil || own.Level == "" {
		p.Level = level
	}
	f.Level = p.Level
	for _, c := range []SELinux{p, f} {
		if err := s.valid(c); err != nil {
			return "", "", err
		}
	}
	return p.String(), f.String(), nil
}

// valid asks the kernel whether the policy has a context.
func (s *selinux) valid(c SELinux) error {
	if strings.ContainsAny(c.String(), " \n\x00") {
		return invalidf("SELinux context %q is not valid", c.String())
	}
	f, err := os.OpenFile(s.check, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("ask for SELinux context %s: %w", c, err)
	}
	_, err = f.WriteString(c.String())
	err = errors.Join(err, f.Close())
	if errors.Is(err, unix.EINVAL) {
		return invalidf("the policy does not have the SELinux context %q", c.String())
	}
	if err != nil {
		return fmt.Errorf("ask for SELinux context %s: %w", c, err)
	}
	return nil
}

// sandboxLevel chooses the SELinux level of a new sandbox.
func (e *Engine) sandboxLevel(c SandboxConfig) (string, error) {
	if e.host.SELinux == nil {
		return "", nil
	}
	taken := map[string]bool{}
	for _, s := range e.pods.all() {
		taken[s.rec.SELinuxLevel] = true
	}
	return e.host.SELinux.level(c.SELinux, taken)
}

// labelMember fills in the labels of a pod's container.
func (e *Engine) labelMember(p *PodMember, s *sandbox, privileged bool) (err error) {
	if e.host.SELinux == nil {
		return nil // what a client asks for has no effect then, as with other runtimes
	}
	p.ProcessLabel, p.FileLabel, err = e.host.SELinux.labels(s.rec.Config.SELinux, p.SELinux, s.rec.SELinuxLevel, privileged)
	return err
}

// sandboxLabels are the labels of what a sandbox itself has: its init, and the files that its containers share.
func (e *Engine) sandboxLabels(s *sandbox) (process, file string, err error) {
	if e.host.SELinux == nil {
		return "", "", nil
	}
	return e.host.SELinux.labels(s.rec.Config.SELinux, nil, s.rec.SELinuxLevel, s.rec.Config.Privileged)
}

const xattrSELinux = "security.selinux"

// neverRelabelled are folders of the host that lose what they are for with the label of a container.
var neverRelabelled = []string{"/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib64", "/proc", "/root", "/run", "/sbin", "/srv", "/sys", "/tmp", "/usr", "/var", "/var/lib"}

// relabelMounts gives the sources of a container's mounts the label of its files, where that is asked for.
func relabelMounts(v *Container) error {
	p := v.Config.Pod
	if p == nil || p.FileLabel == "" {
		return nil
	}
	for _, m := range v.Mounts {
		if !m.Relabel || m.Kind != MountBind {
			continue
		}
		if err := relabel(m.Source, p.FileLabel); err != nil {
			return fmt.Errorf("relabel %s: %w", m.Source, err)
		}
	}
	return nil
}

// relabel labels a file, or a tree, at a path of the host. The name is looked up once: what is checked is what is
// labelled. It follows no link in the tree, and enters no mount, of whatever file system: another mount has a label of
// its own, and may be the host's.
func relabel(path, label string) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return invalidf("%v", err)
	}
	root := os.NewFile(uintptr(fd), path)
	defer root.Close()
	name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return err
	}
	if slices.Contains(neverRelabelled, name) {
		return invalidf("%s is a folder of the system, which keeps its SELinux label", name)
	}
	return relabelTree(root, label)
}

// relabelTree labels what a descriptor (O_PATH) is of, and what is below it.
func relabelTree(f *os.File, label string) error {
	err := unix.Setxattr(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), xattrSELinux, []byte(label), 0)
	if errors.Is(err, unix.ENOTSUP) {
		return nil // a file system without labels has one for all
	} else if err != nil {
		return err
	}
	dir, err := safepath.Reopen(f, unix.O_RDONLY|unix.O_DIRECTORY)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil
	} else if err != nil {
		return err
	}
	root := safepath.NewRoot(dir)
	defer root.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, name := range names {
		sub, err := root.OpenNoXdev(name, unix.O_PATH|unix.O_NOFOLLOW, 0)
		if errors.Is(err, unix.EXDEV) || errors.Is(err, fs.ErrNotExist) {
			continue // a mount, or gone meanwhile
		} else if err != nil {
			return err
		}
		err = relabelTree(sub, label)
		sub.Close()
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}
