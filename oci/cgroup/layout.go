//go:build linux

// Package cgroup makes, limits, watches and removes the control groups of
// containers, by the files of cgroup v1, v2 and of both side by side.
//
// In flow the machine's mounts (a [Layout]), a path and the resources of the OCI
// specification; out flow directories, values written into them, statistics and
// events. Nothing is remembered between calls but directory names: a [Cgroup] can
// be made again from [Cgroup.Paths] in another process.
//
// A controller is used where the machine has it: in its own v1 hierarchy, or else
// in the v2 hierarchy. What was asked for and is not there is refused by name
// ([MissingError]), never dropped.
package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/hako-engine/hako/oci/internal/rawfile"
)

// Mode says which versions of cgroups the machine mounts.
type Mode string

// Modes.
const (
	V1     Mode = "v1"     // v1 hierarchies only
	Hybrid Mode = "hybrid" // v1 hierarchies, and a v2 hierarchy that may have some controllers
	V2     Mode = "v2"     // one v2 hierarchy
)

// Hierarchy is one mounted cgroup hierarchy.
type Hierarchy struct {
	// Controllers of a v1 hierarchy ("cpu", "cpuacct", or "name=systemd"), or those
	// that the v2 hierarchy offers at its top.
	Controllers []string
	V2          bool
	Mount       string // where it is mounted, absolute
	// Own is this process's cgroup as a directory below Mount, "/" for Mount itself.
	// It is empty if the process sits outside what is mounted.
	Own string
}

// Layout is the machine's set of cgroup hierarchies.
type Layout struct {
	Mode        Mode
	Hierarchies []Hierarchy // v1 ones in the kernel's order, then v2
}

// Detect reads the layout from /proc/self/mountinfo and /proc/self/cgroup. The
// error is errdefs.ErrFailedPrecondition if no cgroup file system is mounted.
func Detect() (Layout, error) { return DetectIn(nil) }

// DetectIn is Detect with what was read of /proc/self/mountinfo; nil: nothing.
func DetectIn(mounts []byte) (_ Layout, err error) {
	if mounts == nil {
		if mounts, err = rawfile.Read("/proc/self/mountinfo", 32<<10, maxFile); err != nil {
			return Layout{}, fmt.Errorf("detect cgroups: %w", err)
		}
	}
	own, err := rawfile.Read("/proc/self/cgroup", 4<<10, maxFile)
	if err != nil {
		return Layout{}, fmt.Errorf("detect cgroups: %w", err)
	}
	l, err := parseLayout(mounts, own)
	if err != nil {
		return Layout{}, fmt.Errorf("detect cgroups: %w", err)
	}
	for i := range l.Hierarchies {
		h := &l.Hierarchies[i]
		if !h.V2 {
			continue
		}
		c, err := readFile(h.Mount + "/cgroup.controllers")
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return Layout{}, fmt.Errorf("detect cgroups: %w", err)
		}
		h.Controllers = strings.Fields(string(c))
	}
	return l, nil
}

// parseLayout is the pure part of Detect. The controllers of v2 are left empty.
func parseLayout(mountinfo, selfCgroup []byte) (Layout, error) {
	var l Layout
	var mounts []cgroupMount
	for line := range bytes.Lines(mountinfo) {
		if m, ok := parseMount(line); ok {
			mounts = append(mounts, m)
		}
	}
	var v1, v2 bool
	var unified *Hierarchy
	for line := range bytes.Lines(selfCgroup) {
		// "4:memory:/path", "1:name=systemd:/path", "0::/path"; a path may hold colons.
		f := strings.SplitN(strings.TrimSuffix(string(line), "\n"), ":", 3)
		if len(f) != 3 || !strings.HasPrefix(f[2], "/") {
			continue
		}
		if f[1] == "" {
			if m, ok := bestMount(mounts, func(m cgroupMount) bool { return m.v2 }); ok {
				unified, v2 = &Hierarchy{V2: true, Mount: m.dir, Own: below(m.root, f[2])}, true
			}
			continue
		}
		controllers := strings.Split(f[1], ",")
		m, ok := bestMount(mounts, func(m cgroupMount) bool { return !m.v2 && m.has(controllers) })
		if !ok {
			continue
		}
		v1 = v1 || !strings.HasPrefix(controllers[0], "name=")
		l.Hierarchies = append(l.Hierarchies, Hierarchy{Controllers: controllers, Mount: m.dir, Own: below(m.root, f[2])})
	}
	if unified != nil {
		l.Hierarchies = append(l.Hierarchies, *unified)
	}
	switch {
	case v1 && v2:
		l.Mode = Hybrid
	case v2:
		l.Mode = V2
	case v1:
		l.Mode = V1
	default:
		return Layout{}, fmt.Errorf("no cgroup hierarchy is mounted: %w", errdefs.ErrFailedPrecondition)
	}
	return l, nil
}

// below gives cgroup as a path below root, the directory of the hierarchy that is
// visible in the mount.
func below(root, cgroup string) string {
	if strings.HasPrefix(root, "/..") || strings.HasPrefix(cgroup, "/..") {
		return "" // outside of the cgroup namespace
	}
	if root == "/" {
		return filepath.Clean(cgroup)
	}
	rest, ok := strings.CutPrefix(cgroup, root)
	if !ok || rest != "" && rest[0] != '/' {
		return ""
	}
	return filepath.Clean("/" + rest)
}

type cgroupMount struct {
	v2        bool
	root, dir string
	options   []string // of the super block
}

func (m cgroupMount) has(controllers []string) bool {
	for _, c := range controllers {
		if !slices.Contains(m.options, c) {
			return false
		}
	}
	return true
}

// parseMount reads one line of mountinfo, see proc_pid_mountinfo(5).
func parseMount(line []byte) (cgroupMount, bool) {
	head, tail, ok := bytes.Cut(line, []byte(" - "))
	if !ok || !bytes.HasPrefix(tail, []byte("cgroup")) {
		return cgroupMount{}, false
	}
	h, t := bytes.Fields(head), bytes.Fields(tail)
	if len(h) < 5 || len(t) < 3 {
		return cgroupMount{}, false
	}
	m := cgroupMount{root: unescape(h[3]), dir: unescape(h[4]), options: strings.Split(string(t[2]), ",")}
	switch string(t[0]) {
	case "cgroup":
	case "cgroup2":
		m.v2 = true
	default:
		return cgroupMount{}, false
	}
	return m, strings.HasPrefix(m.root, "/") && strings.HasPrefix(m.dir, "/")
}

// unescape resolves the octal escapes of mountinfo (\040 is a space).
func unescape(b []byte) string {
	if bytes.IndexByte(b, '\\') < 0 {
		return string(b)
	}
	out := make([]byte, 0, len(b))
	for i := 0; i < len(b); i++ {
		if b[i] == '\\' && i+3 < len(b) && isOctal(b[i+1]) && isOctal(b[i+2]) && isOctal(b[i+3]) {
			out = append(out, (b[i+1]-'0')<<6|(b[i+2]-'0')<<3|(b[i+3]-'0'))
			i += 3
			continue
		}
		out = append(out, b[i])
	}
	return string(out)
}

func isOctal(c byte) bool { return c >= '0' && c <= '7' }

// bestMount chooses among several mounts of one hierarchy (a container's root file
// system may show another one): the usual place, then the one that shows most, then
// the shortest name.
func bestMount(mounts []cgroupMount, fits func(cgroupMount) bool) (best cgroupMount, ok bool) {
	better := func(a, b cgroupMount) bool {
		usual := func(m cgroupMount) bool {
			return m.dir == "/sys/fs/cgroup" || strings.HasPrefix(m.dir, "/sys/fs/cgroup/")
		}
		if usual(a) != usual(b) {
			return usual(a)
		}
		if len(a.root) != len(b.root) {
			return len(a.root) < len(b.root)
		}
		return len(a.dir) < len(b.dir)
	}
	for _, m := range mounts {
		if fits(m) && (!ok || better(m, best)) {
			best, ok = m, true
		}
	}
	return best, ok
}
