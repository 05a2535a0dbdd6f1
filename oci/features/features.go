//go:build linux

// Package features tells what the runtime supports, in the form of features.md of the
// OCI runtime specification.
//
// In flows a version; out flows the document that engines read before they use a
// feature (containerd looks for recursive read-only mounts, Docker for seccomp).
package features

import (
	"github.com/opencontainers/runtime-spec/specs-go/features"

	"github.com/hako-engine/hako/oci"
	"github.com/hako-engine/hako/oci/cgroup/systemd"
	"github.com/hako-engine/hako/oci/plan"
	"github.com/hako-engine/hako/oci/seccomp"
	"github.com/hako-engine/hako/oci/spec"
)

// Get gives the document. All lists come from the packages that do the work.
func Get(version string) *features.Features {
	yes := true
	known := seccomp.Supported()
	modes, flags := plan.MemoryPolicies()
	return &features.Features{
		OCIVersionMin: "1.0.0",
		OCIVersionMax: spec.Version,
		Hooks:         []string{"prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"},
		MountOptions:  plan.MountOptions(),
		Linux: &features.Linux{
			Namespaces:   plan.Namespaces(),
			Capabilities: plan.Capabilities(),
			Cgroup:       &features.Cgroup{V1: &yes, V2: &yes, Systemd: &yes, SystemdUser: &yes, Rdma: &yes},
			Seccomp: &features.Seccomp{
				Enabled: &yes, Actions: text(known.Actions), Operators: text(known.Operators), Archs: text(known.Archs),
				KnownFlags: text(known.Flags), SupportedFlags: text(seccomp.FlagsOfKernel()),
			},
			Apparmor:        &features.Apparmor{Enabled: &yes},
			Selinux:         &features.Selinux{Enabled: &yes},
			IntelRdt:        &features.IntelRdt{Enabled: &yes, Schemata: &yes, Monitoring: &yes},
			MemoryPolicy:    &features.MemoryPolicy{Modes: modes, Flags: flags},
			MountExtensions: &features.MountExtensions{IDMap: &features.IDMap{Enabled: &yes}},
			NetDevices:      &features.NetDevices{Enabled: &yes},
		},
		PotentiallyUnsafeConfigAnnotations: []string{systemd.AnnotationPrefix, oci.AnnotationCRIUConfig},
		Annotations: map[string]string{
			"io.github.hako-engine.version":              version,
			"org.opencontainers.runc.checkpoint.enabled": "true", // with a CRIU
		},
	}
}

func text[T ~string](list []T) []string {
	out := make([]string, len(list))
	for i, v := range list {
		out[i] = string(v)
	}
	return out
}
