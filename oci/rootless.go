//go:build linux && (amd64 || arm64)

package oci

import (
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/oci/internal/classed"
)

// withoutCgroup lets a container of a plain user, to whom no cgroup is delegated, do
// without one, unless it asks for limits. why is what making one has failed of.
func (k *creation) withoutCgroup(why error) error {
	if r := limits(k.spec.Linux.Resources); r != "" {
		return fmt.Errorf("linux.resources.%s needs a cgroup, and none is delegated to this user: %w", r, why)
	}
	k.cg, k.c.state.Cgroups = nil, nil
	k.r.log().Info("the container has no cgroup", "id", k.c.ID(), "error", why)
	return nil
}

// limits names a limit that resources ask for, "" if there is none. Rules for devices are
// none: devices of the host cannot be opened in a user namespace that nobody has prepared.
func limits(r *specs.LinuxResources) string {
	switch {
	case r == nil:
	case r.Memory != nil:
		return "memory"
	case r.CPU != nil:
		return "cpu"
	case r.Pids != nil && r.Pids.Limit != nil && *r.Pids.Limit > 0:
		return "pids"
	case r.BlockIO != nil:
		return "blockIO"
	case len(r.HugepageLimits) > 0:
		return "hugepageLimits"
	case r.Network != nil:
		return "network"
	case len(r.Rdma) > 0:
		return "rdma"
	case len(r.Unified) > 0:
		return "unified"
	}
	return ""
}

// needCgroup refuses what only a container with a cgroup can do.
func (c *Container) needCgroup() error {
	if len(c.state.Cgroups) > 0 {
		return nil
	}
	return classed.Errorf(errdefs.ErrFailedPrecondition, "container %q: it has no cgroup: none is delegated to the user who has made it", c.ID())
}
