//go:build linux && (amd64 || arm64)

package oci

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hako-engine/hako/oci/netdev"
	"github.com/hako-engine/hako/oci/rdt"
)

// makeRdt makes the container's resctrl group.
func (k *creation) makeRdt() error {
	r := k.spec.Linux.IntelRdt
	if r == nil {
		return nil
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	root, err := rdt.Mount(mounts)
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
