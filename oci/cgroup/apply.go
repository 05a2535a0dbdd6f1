//go:build linux

package cgroup

import (
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Apply sets the limits that r asks for; what r leaves out (nil, an empty string, a 0
// where the specification does not give 0 a meaning) stays as it is. When one fails,
// those that were set before it get their earlier values back, except in a cgroup that
// New has just made: that one is to be deleted.
func (c *Cgroup) Apply(r *specs.LinuxResources) error {
	return nil
}
