//go:build linux

package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"golang.org/x/sys/unix"
)

// At gives the cgroup at an absolute path in all hierarchies without making it: systemd
// does, or Join.
func (l Layout) At(path string) (*Cgroup, error) {
	c := &Cgroup{v1: map[string]string{}, fresh: true}
	for _, h := range l.Hierarchies {
		dir, err := l.dir(h, path)
		if err != nil {
			return nil, fmt.Errorf("cgroup %s: %w", path, err)
		}
		if h.V2 {
			c.v2 = dir
			continue
		}
		for _, name := range h.Controllers {
			c.v1[name] = dir
		}
	}
	return c, nil
}

// Join moves a process into a cgroup that systemd has made, and makes it in those
// hierarchies that systemd has left out. Those that cannot be joined, because they
// belong to somebody else and no controller depends on them, are dropped.
func (l Layout) Join(c *Cgroup, pid int) error {
	for _, h := range l.Hierarchies {
		dir := c.v2
		if !h.V2 {
			dir = c.v1[h.Controllers[0]]
		}
		if dir == "" {
			continue
		}
		err := h.join(dir, pid)
		if err == nil {
			continue
		}
		if spare := h.V2 && len(h.Controllers) == 0; spare && l.Mode != V2 && (errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS)) {
			c.v2 = ""
			continue
		}
		return fmt.Errorf("join cgroup %s: %w", dir, err)
	}
	return nil
}

func (h Hierarchy) join(dir string, pid int) error {
	var made []string
	procs, err := readFile(dir + "/cgroup.procs")
	if err != nil {
		if !gone(err) {
			return err
		}
		if _, err := h.make(dir, &made); err != nil {
			return err
		}
	} else if slices.Contains(parsePids(nil, procs), pid) {
		return nil
	}
	if !h.V2 && slices.Contains(h.Controllers, "cpuset") {
		if err := h.inheritCpuset(dir, nil); err != nil {
			return err
		}
	}
	return writeFile(dir+"/cgroup.procs", fmt.Sprint(pid))
}

// WeightOfShares converts cpu.shares of v1 to cpu.weight of v2.
func WeightOfShares(shares uint64) uint64 { return weightOfShares(shares) }
