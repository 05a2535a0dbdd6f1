package engine

import (
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// podInput is what a container's configuration takes from its sandbox.
type podInput struct {
	ID     string
	Config SandboxConfig
	UserNS string // path; "": the host's
	// held are files that paths of this process lead to, until the task is created.
	held []*os.File
}

// pod lays what only a pod's container has over Docker's specification.
func (in *specInput) pod(s *specs.Spec) {
	c, sc, p := in.C.Config, in.Pod.Config, in.C.Config.Pod
	s.Annotations = memberAnnotations(in.Pod.ID, sc, in.C)
	if in.Pod.UserNS != "" {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace, Path: in.Pod.UserNS})
		s.Linux.UIDMappings, s.Linux.GIDMappings = specMaps(sc.Userns.UIDs), specMaps(sc.Userns.GIDs)
		if sc.Network == NamespaceNode {
			shareSys(s)
		}
	}
	s.Process.SelinuxLabel, s.Linux.MountLabel = p.ProcessLabel, p.FileLabel
	// What is mounted below a shared mount in the container shows on the host only if the
	// container's root is shared, too. A slave mount needs nothing.
	for _, m := range c.Mounts {
		if strings.TrimPrefix(m.Propagation, "r") == "shared" {
			s.Linux.RootfsPropagation = "shared"
		}
	}
}

// addAmbient lets a program keep capabilities that run as another user than root. They are in all sets, whether the container had them or
// not, but for those that are dropped by name.
func addAmbient(set *specs.LinuxCapabilities, names, drop []string, h hostFacts) error {
	if len(names) == 0 {
		return nil
	}
	drop = slices.DeleteFunc(slices.Clone(drop), func(n string) bool { return strings.EqualFold(n, "ALL") })
	ambient, err := capabilities(false, names, []string{"ALL"})
	if err != nil {
		return err
	}
	left, err := capabilities(false, []string{"ALL"}, drop)
	if err != nil {
		return err
	}
	ambient = slices.DeleteFunc(h.availableCaps(ambient), func(n string) bool { return !slices.Contains(left, n) })
	for _, to := range []*[]string{&set.Bounding, &set.Effective, &set.Permitted, &set.Inheritable} {
		for _, n := range ambient {
			if !slices.Contains(*to, n) {
				*to = append(slices.Clip(*to), n)
			}
		}
	}
	set.Ambient = ambient
	return nil
}

// Annotations of the configuration, by which hooks, NRI plugins and other runtimes know pods.
const (
	annotationType      = "io.kubernetes.cri.container-type"
	annotationSandbox   = "io.kubernetes.cri.sandbox-id"
	annotationName      = "io.kubernetes.cri.container-name"
	annotationImage     = "io.kubernetes.cri.image-name"
	annotationPodName   = "io.kubernetes.cri.sandbox-name"
	annotationPodNS     = "io.kubernetes.cri.sandbox-namespace"
	annotationPodUID    = "io.kubernetes.cri.sandbox-uid"
	annotationLogFolder = "io.kubernetes.cri.sandbox-log-directory"
)

// sandboxAnnotations never hold the client's: these shall not steer a runtime.
func sandboxAnnotations(id string, c SandboxConfig, kind string) map[string]string {
	return map[string]string{
		annotationType: kind, annotationSandbox: id, annotationPodName: c.Name, annotationPodNS: c.Namespace,
		annotationPodUID: c.UID, annotationLogFolder: c.LogDirectory,
	}
}

func memberAnnotations(id string, sc SandboxConfig, v Container) map[string]string {
	a := sandboxAnnotations(id, sc, "container")
	maps.Copy(a, map[string]string{annotationName: v.Config.Pod.Name, annotationImage: v.ImageName})
	return a
}

// hugepageLimits makes the OCI form, sorted.
func hugepageLimits(limits map[string]uint64) []specs.LinuxHugepageLimit {
	var out []specs.LinuxHugepageLimit
	for _, size := range slices.Sorted(maps.Keys(limits)) {
		out = append(out, specs.LinuxHugepageLimit{Pagesize: size, Limit: limits[size]})
	}
	return out
}

// validUnified checks files of cgroup v2 that a client sets.
func (r *Resources) validUnified() error {
	for k, v := range r.Unified {
		if k == "" || path.Base(k) != k || strings.HasPrefix(k, "cgroup.") || strings.ContainsAny(v, "\x00") || !strings.Contains(k, ".") {
			return invalidf("unified cgroup setting %s=%s is not possible", k, strconv.Quote(v))
		}
	}
	return nil
}

// shareSys gives a container the host's sysfs, read-only and without what is mounted below it. A
// new one shows a network namespace, and only who owns that may mount it: in a user namespace
// nobody owns the host's.
func shareSys(s *specs.Spec) {
	for i, m := range s.Mounts {
		if m.Type == "sysfs" {
			s.Mounts[i] = specs.Mount{Destination: m.Destination, Type: "bind", Source: "/sys", Options: []string{"bind", "rprivate", "nosuid", "noexec", "nodev", "ro"}}
		}
	}
}
