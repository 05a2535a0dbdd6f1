//go:build linux && (amd64 || arm64)

package oci

import (
	"context"
	"errors"
	"os"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/oci/cgroup"
	"github.com/hako-engine/hako/oci/cgroup/systemd"
)

// unit is the container's unit in state.json.
type unit struct {
	systemd.Unit
	User bool `json:"user,omitempty"` // of the user's own systemd
}

// makeUnit prepares the cgroup driver systemd: it finds out where the unit is going to
// be. The unit itself can only be made with a process.
func (k *creation) makeUnit() error {
	user := os.Geteuid() != 0
	u, err := systemd.Parse(k.spec.Linux.CgroupsPath, k.c.ID(), user)
	if err != nil {
		return err
	}
	if k.properties, err = systemd.Annotated(k.spec.Annotations); err != nil {
		return err
	}
	if k.systemd, err = systemd.Connect(user); err != nil {
		return err
	}
	k.undo.Add("the connection to systemd", func(context.Context) error { return k.systemd.Close() })
	if k.cg, err = k.layout.At(u.Path(k.systemd.ControlGroup())); err != nil {
		return err
	}
	k.c.state.Unit, k.c.state.Cgroups = &unit{u, user}, k.cg.Paths()
	return nil
}

// startUnit makes the unit with the container's process in it.
func (k *creation) startUnit(pid int) error {
	v2, u := k.layout.Mode == cgroup.V2, k.c.state.Unit
	p := append(systemd.Resources(k.spec.Linux.Resources, v2, k.systemd.Version(), cgroup.WeightOfShares), k.properties...)
	if err := k.systemd.Start(u.Unit, k.c.ID(), pid, v2, p); err != nil {
		return err
	}
	k.unitStarted = true
	if err := k.layout.Join(k.cg, pid); err != nil {
		return err
	}
	k.c.state.Cgroups = k.cg.Paths()
	return nil
}

// undoUnit takes back what startUnit did.
func (k *creation) undoUnit(context.Context) error {
	if !k.unitStarted {
		return nil
	}
	return errors.Join(k.systemd.Stop(k.c.state.Unit.Unit), k.cg.Delete())
}

// stopUnit ends the container's unit, if it has one.
func (c *Container) stopUnit() error {
	u := c.state.Unit
	if u == nil {
		return nil
	}
	m, err := systemd.Connect(u.User)
	if err != nil {
		return err
	}
	defer m.Close()
	return m.Stop(u.Unit)
}

// updateUnit tells systemd what has been written into the files.
func (c *Container) updateUnit(r *specs.LinuxResources) error {
	u := c.state.Unit
	if u == nil {
		return nil
	}
	l, err := cgroup.Detect()
	if err != nil {
		return err
	}
	m, err := systemd.Connect(u.User)
	if err != nil {
		return err
	}
	defer m.Close()
	p := systemd.Resources(r, l.Mode == cgroup.V2, m.Version(), cgroup.WeightOfShares)
	if len(p) == 0 {
		return nil
	}
	return m.SetUnitProperties(u.Name, p)
}
