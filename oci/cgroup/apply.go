//go:build linux

package cgroup

import (
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Apply sets the limits that r asks for; what r leaves out (nil, an empty string, a 0
// where the specification does not give 0 a meaning) stays as it is. When one fails,
// those that were set before it get their earlier values back, except in a cgroup that
// New has just made: that one is to be deleted.
//
// Everything is checked before anything is written. An impossible request is
// errdefs.ErrInvalidArgument, one for a controller that is not there a *MissingError,
// one that the kernel refuses wraps its errno and names the file.
//
// Memory.Kernel is ignored: the kernel has given it up. Memory.KernelTCP is written where
// there is a file for it (v1).
func (c *Cgroup) Apply(r *specs.LinuxResources) error {
	_, err := c.Change(r)
	return err
}

// Change is Apply. It gives what takes the change back, but for device rules, for when
// something fails that belongs to it.
func (c *Cgroup) Change(r *specs.LinuxResources) (undo func() error, err error) {
	if r == nil {
		return func() error { return nil }, nil
	}
	p := planner{c: c, fresh: c.fresh}
	steps, err := p.plan(r)
	if err != nil {
		return nil, fmt.Errorf("apply resources: %w", err)
	}
	var rules *deviceRules
	if len(r.Devices) > 0 {
		if rules, err = parseDevices(r.Devices); err != nil {
			return nil, fmt.Errorf("apply resources: %w", err)
		}
		if c.v1["devices"] == "" && c.v2 == "" {
			return nil, fmt.Errorf("apply resources: %w", &MissingError{"devices", "devices"})
		}
	}
	old, err := run(steps, !c.fresh)
	// Devices come last: they are the one thing whose earlier state cannot always be
	// read back.
	if err == nil && rules != nil {
		err = c.applyDevices(rules)
	}
	if err != nil {
		if _, uerr := run(old, false); uerr != nil {
			return nil, fmt.Errorf("apply resources: %w; and restore earlier ones: %w", err, uerr)
		}
		return nil, fmt.Errorf("apply resources: %w", err)
	}
	c.fresh = false
	return func() error { _, err := run(old, false); return err }, nil
}

// step is one write.
type step struct {
	path, value string
	// key is set where the file holds a line for each device: what is restored is this
	// device's line, or none if it has no line now.
	key, none string
	// field is set where the file prints several fields and takes the bare value of one.
	field string
	// group joins neighbours whose order depends on the values that are there now (a
	// limit and a larger limit that must not cross). One that the kernel refuses with
	// EINVAL waits until the others of its group are written.
	group int
}

// run writes the steps in order. It gives the steps that restore what was there, in
// the order in which to write them; with save unset there are none.
func run(steps []step, save bool) (undo []step, err error) {
	for i := 0; i < len(steps); {
		n := 1
		for i+n < len(steps) && steps[i].group != 0 && steps[i+n].group == steps[i].group {
			n++
		}
		if undo, err = runGroup(steps[i:i+n], save, undo); err != nil {
			return undo, err
		}
		i += n
	}
	return undo, nil
}

func runGroup(todo []step, save bool, undo []step) ([]step, error) {
	for len(todo) > 0 {
		var later []step
		var refused error
		for _, s := range todo {
			var old step
			if save {
				var err error
				if old, err = s.restore(); err != nil {
					return undo, err
				}
			}
			err := writeFile(s.path, s.value)
			if errors.Is(err, unix.EINVAL) && len(todo) > 1 {
				later, refused = append(later, s), err
				continue
			}
			if err != nil {
				return undo, explain(s, err)
			}
			if save {
				undo = append([]step{old}, undo...)
			}
		}
		if len(later) == len(todo) {
			return undo, explain(later[len(later)-1], refused)
		}
		todo = later
	}
	return undo, nil
}

// restore gives the step that writes the present value back.
func (s step) restore() (step, error) {
	old := step{path: s.path, group: s.group}
	text, err := readString(s.path)
	if err != nil {
		return old, err
	}
	if s.key == "" && s.field == "" {
		// An empty cpuset is written as an empty line: a write of nothing is no write.
		old.value = text + "\n"
		return old, nil
	}
	old.value = s.key + " " + s.none
	for line := range strings.Lines(text) {
		switch k, v, ok := strings.Cut(strings.TrimSpace(line), " "); {
		case !ok:
		case s.key != "" && k == s.key:
			old.value = k + " " + v
		case s.field != "" && k == s.field:
			old.value = v
		}
	}
	return old, nil
}

// explain adds what the kernel means by an errno in this file.
func explain(s step, err error) error {
	name := s.path[strings.LastIndexByte(s.path, '/')+1:]
	hint := ""
	switch {
	case errors.Is(err, unix.ENOENT):
		hint = "this kernel does not have it, or the cgroup is gone"
	case errors.Is(err, unix.EBUSY) && strings.HasPrefix(name, "memory."):
		hint = "more than this is in use and cannot be reclaimed"
	case errors.Is(err, unix.EINVAL) && name == "memory.limit_in_bytes":
		hint = "the limit must not be above the limit of memory and swap together"
	case errors.Is(err, unix.EINVAL) && name == "memory.memsw.limit_in_bytes":
		hint = "it must not be below the memory limit"
	case errors.Is(err, unix.EINVAL) && strings.HasPrefix(name, "cpu.cfs"), errors.Is(err, unix.EINVAL) && strings.HasPrefix(name, "cpu.max"):
		hint = "the period is 1000 to 1000000 µs, the quota at least 1000 µs and within that of the cgroup above, the burst at most the quota"
	case errors.Is(err, unix.EINVAL) && strings.HasPrefix(name, "cpu.rt"):
		hint = "realtime time must be granted by the cgroup above, and fit into the period"
	case strings.HasPrefix(name, "cpuset.") && (errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ERANGE) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.E2BIG)):
		hint = "the list names what this machine, or the cgroup above, does not have"
	case errors.Is(err, unix.ENODEV):
		hint = "no such device"
	}
	// What was wrong with a value is the caller's to mend.
	var class error
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ERANGE), errors.Is(err, unix.E2BIG), errors.Is(err, unix.EOVERFLOW):
		class = errdefs.ErrInvalidArgument
	default:
		class = errdefs.ErrFailedPrecondition
	}
	if hint != "" {
		err = fmt.Errorf("%w (%s)", err, hint)
	}
	return classed(err, class)
}
