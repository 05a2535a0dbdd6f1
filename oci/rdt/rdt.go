//go:build linux

// Package rdt puts containers into groups of Intel's Resource Director Technology.
//
// In flow linux.intelRdt of the OCI specification and the directory where a resctrl file
// system is mounted; out flow directories in it, what is written into their schemata, and
// what is to be removed with the container.
package rdt

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/internal/classed"
)

// ErrNotMounted says that there is no resctrl file system.
var ErrNotMounted = classed.Errorf(errdefs.ErrFailedPrecondition, "linux.intelRdt: no resctrl file system is mounted on the host")

// Mount finds where a resctrl file system is mounted, in the text of
// /proc/self/mountinfo.
func Mount(mountinfo []byte) (dir string, err error) {
	for line := range bytes.Lines(mountinfo) {
		head, tail, ok := bytes.Cut(line, []byte(" - "))
		if !ok || !bytes.HasPrefix(tail, []byte("resctrl ")) {
			continue
		}
		if f := bytes.Fields(head); len(f) > 4 && string(f[3]) == "/" {
			return string(f[4]), nil
		}
	}
	return "", ErrNotMounted
}

// Group is a container's place.
type Group struct {
	// Control is the directory whose tasks file takes the container's process, and
	// Monitor that of its monitoring group, or "".
	Control, Monitor string
	// Own: Control was made for this container, and goes with it.
	Own bool
}

// New makes the group of a container, or finds the one that it names. root is where
// resctrl is mounted. When New fails it has removed what it made.
func New(root, id string, r *specs.LinuxIntelRdt) (g *Group, err error) {
	var made []string
	defer func() {
		if err != nil {
			for _, dir := range slices.Backward(made) {
				unix.Rmdir(dir)
			}
			err = fmt.Errorf("linux.intelRdt: %w", err)
		}
	}()
	mkdir := func(dir string) (fresh bool, err error) {
		switch err := unix.Mkdir(dir, 0o755); {
		case err == nil:
			made = append(made, dir)
			return true, nil
		case errors.Is(err, unix.EEXIST):
			return false, nil
		case errors.Is(err, unix.ENOSPC):
			return false, classed.Errorf(errdefs.ErrFailedPrecondition, "make %s: the machine has no more groups of its kind", dir)
		default:
			return false, &os.PathError{Op: "mkdir", Path: dir, Err: err}
		}
	}
	name := r.ClosID
	if name == "" {
		name = id
	}
	g = &Group{Control: filepath.Join(root, name)}
	lines := schemata(r)
	switch {
	case r.ClosID == "/":
		g.Control = root
		err = g.compare(lines)
	case r.ClosID != "" && len(lines) == 0:
		if _, serr := os.Stat(g.Control); serr != nil {
			return nil, classed.Errorf(errdefs.ErrNotFound, "closID %q: there is no such group, and no schema to make it with", r.ClosID)
		}
	default:
		var fresh bool
		if fresh, err = mkdir(g.Control); err != nil {
			return nil, err
		}
		if r.ClosID != "" && !fresh {
			err = g.compare(lines)
			break
		}
		g.Own = fresh && r.ClosID == ""
		if len(lines) > 0 {
			err = write(g.Control, "schemata", strings.Join(lines, "\n")+"\n")
		}
	}
	if err != nil {
		return nil, err
	}
	if r.EnableMonitoring {
		g.Monitor = filepath.Join(g.Control, "mon_groups", id)
		fresh, err := mkdir(g.Monitor)
		if err == nil && !fresh {
			err = classed.Errorf(errdefs.ErrAlreadyExists, "%s exists", g.Monitor)
		}
		if err != nil {
			return nil, err
		}
	}
	return g, nil
}

// schemata gives the lines in the order of the specification.
func schemata(r *specs.LinuxIntelRdt) (lines []string) {
	for _, l := range append([]string{r.L3CacheSchema, r.MemBwSchema}, r.Schemata...) {
		if l != "" {
			lines = append(lines, l)
		}
	}
	return lines
}

// compare fails if a group that others made allows something else than is asked for.
func (g *Group) compare(lines []string) error {
	if len(lines) == 0 {
		return nil
	}
	raw, err := os.ReadFile(filepath.Join(g.Control, "schemata"))
	if err != nil {
		return err
	}
	have := parse(string(raw))
	for _, l := range lines {
		for resource, domains := range parse(l) {
			for domain, mask := range domains {
				if now, ok := have[resource][domain]; !ok || now != mask {
					return classed.Errorf(errdefs.ErrFailedPrecondition, "the group %s exists with another schema than %q: %s has %q for %s", g.Control, l, resource, now, domain)
				}
			}
		}
	}
	return nil
}

// parse reads lines like "L3:0=7f0;1=1f": by resource and domain, the value in a form
// that does not depend on zeroes in front.
func parse(text string) map[string]map[string]string {
	out := map[string]map[string]string{}
	for line := range strings.Lines(text) {
		resource, rest, ok := strings.Cut(strings.TrimSpace(line), ":")
		if !ok {
			continue
		}
		domains := map[string]string{}
		for d := range strings.SplitSeq(rest, ";") {
			k, v, _ := strings.Cut(strings.TrimSpace(d), "=")
			if v = strings.TrimLeft(strings.ToLower(strings.TrimSpace(v)), "0"); v == "" {
				v = "0"
			}
			domains[strings.TrimSpace(k)] = v
		}
		out[strings.TrimSpace(resource)] = domains
	}
	return out
}

func write(dir, name, value string) error {
	err := func() error {
		fd, err := unix.Open(filepath.Join(dir, name), unix.O_WRONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		_, err = unix.Write(fd, []byte(value))
		return err
	}()
	if err == nil {
		return nil
	}
	err = &os.PathError{Op: "write " + strconv.Quote(strings.TrimSpace(value)) + " to", Path: filepath.Join(dir, name), Err: err}
	// The kernel says what it did not like.
	if raw, rerr := os.ReadFile(filepath.Join(filepath.Dir(dir), "info/last_cmd_status")); rerr == nil {
		if s := strings.TrimSpace(string(raw)); s != "" && s != "ok" {
			err = fmt.Errorf("%w (%s)", err, s)
		}
	}
	if errors.Is(err, unix.EINVAL) {
		err = classed.As(errdefs.ErrInvalidArgument, err)
	}
	return err
}

// Add moves a process into the group.
func (g *Group) Add(pid int) error {
	for _, dir := range []string{g.Control, g.Monitor} {
		if dir == "" {
			continue
		}
		if err := write(dir, "tasks", strconv.Itoa(pid)); err != nil {
			return fmt.Errorf("linux.intelRdt: %w", err)
		}
	}
	return nil
}

// Purge removes the groups that New makes for a container whose creation was killed. Nothing
// tells whether it had got so far: a group with tasks is somebody else's, and stays.
func Purge(root, id string, r *specs.LinuxIntelRdt) error {
	name := r.ClosID
	if name == "" {
		name = id
	}
	control := filepath.Join(root, name)
	var dirs []string
	if r.EnableMonitoring {
		dirs = append(dirs, filepath.Join(control, "mon_groups", id))
	}
	if r.ClosID == "" {
		dirs = append(dirs, control)
	}
	for _, dir := range dirs {
		// Removing a group moves its tasks to the one above.
		tasks, err := os.ReadFile(filepath.Join(dir, "tasks"))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("linux.intelRdt: %w", err)
		}
		if len(bytes.TrimSpace(tasks)) > 0 {
			continue
		}
		if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("linux.intelRdt: %w", &os.PathError{Op: "rmdir", Path: dir, Err: err})
		}
	}
	return nil
}

// Delete removes what was made for the container. What is gone already is no error.
func (g *Group) Delete() error {
	var errs []error
	dirs := []string{g.Monitor}
	if g.Own {
		dirs = append(dirs, g.Control)
	}
	for _, dir := range dirs {
		if dir == "" {
			continue
		}
		if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, &os.PathError{Op: "rmdir", Path: dir, Err: err})
		}
	}
	return errors.Join(errs...)
}
