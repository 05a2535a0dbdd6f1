package main

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/hako-engine/hako/oci/cgroup"
)

// checkCgroupPath refuses places where the daemon cannot be beside its containers.
func checkCgroupPath(path string) error {
	switch {
	case path == "":
		return nil
	case !filepath.IsAbs(path) || filepath.Clean(path) == "/":
		return fmt.Errorf("cgroup-path: %q is not an absolute path below the top of the hierarchies", path)
	case filepath.Clean(path) == "/hako":
		return fmt.Errorf("cgroup-path: %s is the parent of the containers, which on cgroup v2 takes no process", path)
	}
	return nil
}

// enterCgroup moves the daemon into a cgroup, which it makes where there is none. Shims that it
// starts from then on are in it, too; containers have cgroups of their own.
func enterCgroup(path string) error {
	if path == "" {
		return nil
	}
	layout, err := cgroup.Detect()
	if err != nil {
		return fmt.Errorf("cgroup-path: %w", err)
	}
	c, err := layout.At(filepath.Clean(path))
	if err != nil {
		return fmt.Errorf("cgroup-path: %w", err)
	}
	if err := layout.Join(c, os.Getpid()); err != nil {
		return fmt.Errorf("cgroup-path: %w", err)
	}
	return nil
}

// leaveCgroup removes the daemon's cgroup if nobody is in it.
func leaveCgroup(path string) {
	if path == "" {
		return
	}
	layout, err := cgroup.Detect()
	if err != nil {
		return
	}
	c, err := layout.At(filepath.Clean(path))
	if err != nil {
		return
	}
	for _, dir := range c.Paths() {
		_ = unix.Rmdir(dir)
	}
}
