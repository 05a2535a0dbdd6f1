package cri

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	api "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hako-engine/hako/engine"
)

// containerConfig makes the engine's form of a request for a container.
func containerConfig(w *api.ContainerConfig, pod engine.SandboxConfig) (engine.Config, error) {
	m := w.GetMetadata()
	if m.GetName() == "" {
		return engine.Config{}, invalidf("the configuration of a container must include metadata with a name")
	}
	log, err := logPath(pod.LogDirectory, w.GetLogPath())
	if err != nil {
		return engine.Config{}, err
	}
	sec := w.GetLinux().GetSecurityContext()
	ns := sec.GetNamespaceOptions()
	c := engine.Config{
		Image: w.GetImage().GetImage(), Entrypoint: w.GetCommand(), Cmd: w.GetArgs(), WorkingDir: w.GetWorkingDir(),
		Labels: w.GetLabels(), Annotations: w.GetAnnotations(), StopSignal: signalName(w.GetStopSignal()),
		TTY: w.GetTty(), OpenStdin: w.GetStdin(), StdinOnce: w.GetStdinOnce(),
		AttachStdin: w.GetStdin(), AttachStdout: true, AttachStderr: !w.GetTty(),
		Privileged:     sec.GetPrivileged(),
		CapAdd:         sec.GetCapabilities().GetAddCapabilities(),
		CapDrop:        sec.GetCapabilities().GetDropCapabilities(),
		ReadonlyRootfs: sec.GetReadonlyRootfs(),
		MaskedPaths:    exactly(sec.GetMaskedPaths()), ReadonlyPaths: exactly(sec.GetReadonlyPaths()),
		OOMScoreAdj: int(w.GetLinux().GetResources().GetOomScoreAdj()),
		Resources:   resources(w.GetLinux().GetResources()),
		Pod: &engine.PodMember{
			Name: m.GetName(), Attempt: m.GetAttempt(), LogPath: log,
			UserImage: w.GetImage().GetUserSpecifiedImage(), ImageAnnotations: w.GetImage().GetAnnotations(),
			RunAsUserName: sec.GetRunAsUsername(), Groups: sec.GetSupplementalGroups(),
			StrictGroups: sec.GetSupplementalGroupsPolicy() == api.SupplementalGroupsPolicy_Strict,
			PID:          mode(ns.GetPid()), PIDTarget: ns.GetTargetId(),
			AmbientCaps: sec.GetCapabilities().GetAddAmbientCapabilities(),
			StopSignal:  signalName(w.GetStopSignal()),
			SELinux:     selinux(sec.GetSelinuxOptions()),
		},
	}
	if sec.GetRunAsUser() != nil {
		uid := sec.GetRunAsUser().GetValue()
		c.Pod.RunAsUser = &uid
	}
	if sec.GetRunAsGroup() != nil {
		gid := sec.GetRunAsGroup().GetValue()
		c.Pod.RunAsGroup = &gid
	}
	for _, e := range w.GetEnvs() {
		if e.GetKey() == "" || strings.ContainsAny(e.GetKey(), "=\x00") {
			return c, invalidf("invalid name %q of an environment variable", e.GetKey())
		}
		c.Env = append(c.Env, e.GetKey()+"="+string(e.GetValue()))
	}
	for _, d := range w.GetDevices() {
		c.Resources.Devices = append(c.Resources.Devices, engine.Device{
			HostPath: d.GetHostPath(), ContainerPath: d.GetContainerPath(), Permissions: d.GetPermissions(),
		})
	}
	for _, d := range w.GetCDIDevices() {
		c.Pod.CDIDevices = append(c.Pod.CDIDevices, d.GetName())
	}
	for _, m := range w.GetMounts() {
		mount, err := mountOf(m)
		if err != nil {
			return c, err
		}
		c.Mounts = append(c.Mounts, mount)
	}
	if sec.GetNoNewPrivs() {
		c.SecurityOpt = append(c.SecurityOpt, "no-new-privileges")
	}
	opts, err := profiles(sec)
	c.SecurityOpt = append(c.SecurityOpt, opts...)
	return c, err
}

// exactly gives what was asked for, and not the default where that is nothing: the wire does not tell an empty list from none. The kubelet
// sends its defaults in full, and nothing for a container with procMount Unmasked.
func exactly(paths []string) []string {
	if paths == nil {
		return []string{}
	}
	return paths
}

// selinux gives nil where nothing is asked for.
func selinux(o *api.SELinuxOption) *engine.SELinux {
	s := engine.SELinux{User: o.GetUser(), Role: o.GetRole(), Type: o.GetType(), Level: o.GetLevel()}
	if s == (engine.SELinux{}) {
		return nil
	}
	return &s
}

// profiles gives the options for seccomp and AppArmor. A privileged container has neither.
func profiles(sec *api.LinuxContainerSecurityContext) (opts []string, err error) {
	if sec.GetPrivileged() {
		return []string{"seccomp=unconfined", "apparmor=unconfined"}, nil
	}
	seccomp := profile(sec.GetSeccomp(), sec.GetSeccompProfilePath()) //nolint:staticcheck // old clients still send it
	switch {
	case seccomp == nil || seccomp.GetProfileType() == api.SecurityProfile_Unconfined:
		opts = append(opts, "seccomp=unconfined")
	case seccomp.GetProfileType() == api.SecurityProfile_Localhost:
		b, err := readProfile(seccomp.GetLocalhostRef())
		if err != nil {
			return nil, invalidf("seccomp profile %s: %v", seccomp.GetLocalhostRef(), err)
		}
		opts = append(opts, "seccomp="+string(b))
	case seccomp.GetProfileType() != api.SecurityProfile_RuntimeDefault:
		return nil, invalidf("unknown type %d of a seccomp profile", seccomp.GetProfileType())
	}
	apparmor := profile(sec.GetApparmor(), sec.GetApparmorProfile()) //nolint:staticcheck // as above
	switch {
	case apparmor == nil:
	case apparmor.GetProfileType() == api.SecurityProfile_Unconfined:
		opts = append(opts, "apparmor=unconfined")
	case apparmor.GetProfileType() == api.SecurityProfile_Localhost:
		opts = append(opts, "apparmor="+apparmor.GetLocalhostRef())
	case apparmor.GetProfileType() != api.SecurityProfile_RuntimeDefault:
		return nil, invalidf("unknown type %d of an AppArmor profile", apparmor.GetProfileType())
	}
	return opts, nil
}

// maxProfile is the longest seccomp profile, in bytes.
const maxProfile = 1 << 20

// readProfile reads a seccomp profile of the host.
func readProfile(path string) ([]byte, error) {
	if !filepath.IsAbs(path) {
		return nil, errors.New("the path is not absolute")
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a FIFO does not block
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.New("it is no regular file")
	}
	b, err := io.ReadAll(io.LimitReader(f, maxProfile+1))
	switch {
	case err != nil:
		return nil, err
	case len(b) > maxProfile:
		return nil, fmt.Errorf("it is longer than %d bytes", maxProfile)
	case !json.Valid(b):
		return nil, errors.New("it is not JSON")
	}
	return b, nil
}

// profile reads the deprecated form of a profile, a string, where the new one is missing.
func profile(p *api.SecurityProfile, old string) *api.SecurityProfile {
	if p != nil || old == "" {
		return p
	}
	switch ref, local := strings.CutPrefix(old, "localhost/"); {
	case local:
		return &api.SecurityProfile{ProfileType: api.SecurityProfile_Localhost, LocalhostRef: ref}
	case old == "unconfined":
		return &api.SecurityProfile{ProfileType: api.SecurityProfile_Unconfined}
	}
	return &api.SecurityProfile{} // runtime/default, docker/default
}

// propagations are the engine's names.
var propagations = map[api.MountPropagation]string{
	api.MountPropagation_PROPAGATION_PRIVATE:           "rprivate",
	api.MountPropagation_PROPAGATION_HOST_TO_CONTAINER: "rslave",
	api.MountPropagation_PROPAGATION_BIDIRECTIONAL:     "rshared",
}

// mountOptions are what a client may ask of a mount.
var mountOptions = []string{"noexec", "nodev", "nosuid"}

func mountOf(w *api.Mount) (engine.Mount, error) {
	m := engine.Mount{
		Kind: engine.MountBind, Source: w.GetHostPath(), Target: w.GetContainerPath(), ReadOnly: w.GetReadonly(),
		Propagation: propagations[w.GetPropagation()], CreateSource: true, ReadOnlyNonRecur: !w.GetRecursiveReadOnly(),
		UIDs: idMaps(w.GetUidMappings()), GIDs: idMaps(w.GetGidMappings()), Options: w.GetMountOptions(),
		Relabel: w.GetSelinuxRelabel(),
	}
	if !strings.HasPrefix(m.Target, "/") {
		m.Target = "/" + m.Target
	}
	for _, o := range m.Options {
		if !slices.Contains(mountOptions, o) {
			return m, invalidf("mount option %q of %s is not one of %s", o, m.Target, strings.Join(mountOptions, ", "))
		}
	}
	if len(m.UIDs) != len(m.GIDs) {
		return m, invalidf("mount %s maps uids and not gids, or gids and not uids", m.Target)
	}
	if w.GetImage().GetImage() != "" {
		if m.Source != "" {
			return m, invalidf("mount %s names an image and a host path", m.Target)
		}
		if !w.GetReadonly() {
			return m, invalidf("ImageVolumeMountFailed: mount %s of an image must be read-only", m.Target)
		}
		m.Kind, m.Source, m.Subpath, m.CreateSource = engine.MountImage, w.GetImage().GetImage(), w.GetImageSubPath(), false
		return m, nil
	}
	if w.GetRecursiveReadOnly() && (!w.GetReadonly() || w.GetPropagation() != api.MountPropagation_PROPAGATION_PRIVATE) {
		return m, invalidf("mount %s: recursive read-only needs a read-only mount with private propagation", m.Target)
	}
	return m, nil
}

func wireMount(m engine.Mount) *api.Mount {
	w := &api.Mount{
		ContainerPath: m.Target, Readonly: m.ReadOnly, UidMappings: wireMaps(m.UIDs), GidMappings: wireMaps(m.GIDs),
		RecursiveReadOnly: m.ReadOnly && !m.ReadOnlyNonRecur, MountOptions: m.Options,
		SelinuxRelabel: m.Relabel,
	}
	for k, v := range propagations {
		if v == m.Propagation {
			w.Propagation = k
		}
	}
	if m.Kind == engine.MountImage {
		w.Image, w.ImageSubPath, w.RecursiveReadOnly = &api.ImageSpec{Image: m.Source, ImageRef: m.ImageID}, m.Subpath, false
		return w
	}
	w.HostPath = m.Source
	return w
}

func resources(w *api.LinuxContainerResources) engine.Resources {
	r := engine.Resources{
		CPUPeriod: w.GetCpuPeriod(), CPUQuota: w.GetCpuQuota(), CPUShares: w.GetCpuShares(),
		Memory: w.GetMemoryLimitInBytes(), MemorySwap: w.GetMemorySwapLimitInBytes(),
		CpusetCPUs: w.GetCpusetCpus(), CpusetMems: w.GetCpusetMems(), Unified: w.GetUnified(),
	}
	for _, h := range w.GetHugepageLimits() {
		if r.Hugepages == nil {
			r.Hugepages = map[string]uint64{}
		}
		r.Hugepages[h.GetPageSize()] = h.GetLimit()
	}
	return r
}

func wireResources(r engine.Resources, oomScoreAdj int) *api.LinuxContainerResources {
	w := &api.LinuxContainerResources{
		CpuPeriod: r.CPUPeriod, CpuQuota: r.CPUQuota, CpuShares: r.CPUShares,
		MemoryLimitInBytes: r.Memory, MemorySwapLimitInBytes: r.MemorySwap, OomScoreAdj: int64(oomScoreAdj),
		CpusetCpus: r.CpusetCPUs, CpusetMems: r.CpusetMems, Unified: r.Unified,
	}
	for size, limit := range r.Hugepages {
		w.HugepageLimits = append(w.HugepageLimits, &api.HugepageLimit{PageSize: size, Limit: limit})
	}
	slices.SortFunc(w.HugepageLimits, func(a, b *api.HugepageLimit) int { return strings.Compare(a.PageSize, b.PageSize) })
	return w
}

func containerState(s engine.Status) api.ContainerState {
	switch s {
	case engine.StatusCreated:
		return api.ContainerState_CONTAINER_CREATED
	case engine.StatusRunning, engine.StatusPaused, engine.StatusRestarting:
		return api.ContainerState_CONTAINER_RUNNING
	case engine.StatusExited, engine.StatusRemoving, engine.StatusDead:
		return api.ContainerState_CONTAINER_EXITED
	}
	return api.ContainerState_CONTAINER_UNKNOWN
}

// listField is the number of the field with the containers in the messages of lists (ListContainersResponse, StreamContainersResponse).
const listField = 1

// encodeContainers makes the items of a list as they go over the wire. The kubelet asks for them every second, and of a container nothing
// changes but its state: the rest is encoded once. A message takes the result as fields that it does not know, which it sends as they are.
func encodeContainers(list []engine.PodContainer) ([]byte, error) {
	var out, state []byte
	for i, v := range list {
		face, err := v.Encoded(encodeFace)
		if err != nil {
			return nil, fmt.Errorf("encode container %s: %w", v.ID, err)
		}
		if i == 0 || v.Status != list[i-1].Status {
			if state, err = proto.Marshal(&api.Container{State: containerState(v.Status)}); err != nil {
				return nil, err
			}
		}
		if i == 0 { // most are about as long as the first
			out = make([]byte, 0, len(list)*(len(face)+len(face)/8+8))
		}
		out = protowire.AppendTag(out, listField, protowire.BytesType)
		out = protowire.AppendVarint(out, uint64(len(face)+len(state)))
		out = append(append(out, face...), state...)
	}
	return out, nil
}

// encodeFace encodes a container without its state.
func encodeFace(f *engine.PodContainerFace) ([]byte, error) {
	return proto.Marshal(&api.Container{
		Id: f.ID, PodSandboxId: f.Sandbox, Metadata: &api.ContainerMetadata{Name: f.Name, Attempt: f.Attempt},
		Image:    &api.ImageSpec{Image: f.ImageName, UserSpecifiedImage: f.UserImage, Annotations: f.ImageAnnotations},
		ImageRef: f.ImageID, ImageId: f.ImageID, CreatedAt: f.Created.UnixNano(), Labels: f.Labels, Annotations: f.Annotations,
	})
}

// containerStatus is a container as it is. The names of its image are looked up: they change.
func (s *Server) containerStatus(ctx context.Context, v *engine.Container) *api.ContainerStatus {
	p := v.Config.Pod
	st := &api.ContainerStatus{
		Id: v.ID, Metadata: &api.ContainerMetadata{Name: p.Name, Attempt: p.Attempt}, State: containerState(v.State.Status),
		CreatedAt: v.Created.UnixNano(), Image: &api.ImageSpec{Image: v.ImageName, UserSpecifiedImage: p.UserImage, Annotations: p.ImageAnnotations}, ImageRef: v.ImageID, ImageId: v.ImageID,
		Labels: v.Config.Labels, Annotations: v.Config.Annotations, LogPath: p.LogPath,
		Resources:  &api.ContainerResources{Linux: wireResources(v.Config.Resources, v.Config.OOMScoreAdj)},
		StopSignal: wireSignal(v.StopSignal),
	}
	if img, err := s.opt.Backend.Image(ctx, v.ImageID); err == nil {
		if len(img.Names) > 0 {
			st.Image.Image = img.Names[0]
		}
		if len(img.Digests) > 0 {
			st.ImageRef = img.Digests[0]
		}
	}
	if !v.State.StartedAt.IsZero() && containerState(v.State.Status) != api.ContainerState_CONTAINER_CREATED {
		st.StartedAt = v.State.StartedAt.UnixNano()
	}
	if containerState(v.State.Status) == api.ContainerState_CONTAINER_EXITED {
		if !v.State.FinishedAt.IsZero() {
			st.FinishedAt = v.State.FinishedAt.UnixNano()
		}
		st.ExitCode = int32(v.State.ExitCode)
		st.Reason, st.Message = reason(v.State)
	}
	for _, m := range v.Mounts {
		if !m.FromImage {
			st.Mounts = append(st.Mounts, wireMount(m))
		}
	}
	if u := p.User; u != nil {
		l := &api.LinuxContainerUser{Uid: int64(u.UID), Gid: int64(u.GID)}
		for _, g := range u.Groups {
			l.SupplementalGroups = append(l.SupplementalGroups, int64(g))
		}
		st.User = &api.ContainerUser{Linux: l}
	}
	return st
}

// reason tells why a container has ended, in the words that the kubelet shows.
func reason(s engine.State) (reason, message string) {
	switch {
	case s.Lost:
		return "ContainerStatusUnknown", "nobody saw how the container ended"
	case s.StartedAt.IsZero():
		return "StartError", s.Error
	case s.OOMKilled:
		return "OOMKilled", ""
	case s.ExitCode == 0:
		return "Completed", ""
	}
	return "Error", ""
}
