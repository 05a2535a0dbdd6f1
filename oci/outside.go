//go:build linux && (amd64 || arm64)

package oci

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/oci/internal/classed"
	"github.com/hako-engine/hako/oci/netdev"
	"github.com/hako-engine/hako/oci/rdt"
)

// makeRdt makes the container's resctrl group.
func (k *creation) makeRdt() error {
	r := k.spec.Linux.IntelRdt
	if r == nil {
		return nil
	}
	root, err := resctrl()
	if err != nil {
		return err
	}
	group, err := rdt.New(root, k.c.ID(), r)
	if err != nil {
		return err
	}
	k.c.state.Rdt = group
	k.undo.Add("the resctrl group", func(context.Context) error { return group.Delete() })
	return nil
}

// moveDevices moves network devices into the container, whose first process is pid. What
// fails later moves them back: the namespace is kept open for that long.
func (k *creation) moveDevices(pid int) error {
	devices := k.spec.Linux.NetDevices
	if len(devices) == 0 {
		return nil
	}
	path := fmt.Sprintf("/proc/%d/ns/net", pid)
	for _, n := range k.spec.Linux.Namespaces {
		if n.Type == specs.NetworkNamespace && n.Path != "" {
			path = n.Path
		}
	}
	namespace, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("linux.netDevices: %w", err)
	}
	k.namespace = namespace
	for _, from := range slices.Sorted(maps.Keys(devices)) {
		to := devices[from].Name
		if to == "" {
			to = from
		}
		m, err := netdev.Move(namespace, from, to)
		if err != nil {
			return fmt.Errorf("linux.netDevices: %w", err)
		}
		k.devices = append(k.devices, m)
	}
	return nil
}

// moveDevicesBack undoes moveDevices.
func (k *creation) moveDevicesBack(context.Context) error {
	var errs []error
	for _, m := range slices.Backward(k.devices) {
		errs = append(errs, m.Back(k.namespace))
	}
	return errors.Join(errs...)
}

// resctrl finds where the host has mounted it.
func resctrl() (string, error) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	return rdt.Mount(mounts)
}

// changeRdt changes the schemata of the container's resctrl group, and gives what takes it back.
func (c *Container) changeRdt(r *specs.LinuxIntelRdt) (undo func() error, err error) {
	if r == nil || r.L3CacheSchema == "" && r.MemBwSchema == "" && len(r.Schemata) == 0 {
		return func() error { return nil }, nil
	}
	root, err := resctrl()
	if err != nil {
		return nil, err
	}
	if c.state.Rdt == nil {
		return nil, classed.Errorf(errdefs.ErrFailedPrecondition, "linux.intelRdt: the container was created without it")
	}
	return c.state.Rdt.Update(root, r)
}

// IntelRdtStats reads the statistics of the container's resctrl group; nil if it has none.
func (c *Container) IntelRdtStats() (*rdt.Stats, error) {
	if c.state.Rdt == nil {
		return nil, nil
	}
	root, err := resctrl()
	if err != nil {
		return nil, err
	}
	return c.state.Rdt.Stats(root)
}
