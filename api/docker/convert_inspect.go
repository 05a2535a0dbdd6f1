package docker

import (
	"cmp"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	wire "github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/storage"

	"github.com/hako-engine/hako/engine"
)

// timestamp formats a time as Docker's inspect does; the zero time is 0001-01-01T00:00:00Z.
func timestamp(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

// inspectOf describes a container completely, in the newest shape.
func inspectOf(ctr *engine.Container) *container.InspectResponse {
	out := &container.InspectResponse{
		ID:             ctr.ID,
		Created:        timestamp(ctr.Created),
		Path:           ctr.Path,
		Args:           list(ctr.Args),
		State:          stateOf(&ctr.State),
		Image:          ctr.ImageID,
		ResolvConfPath: ctr.ResolvPath,
		HostnamePath:   ctr.HostnamePath,
		HostsPath:      ctr.HostsPath,
		LogPath:        ctr.LogPath,
		Name:           "/" + ctr.Name,
		RestartCount:   ctr.RestartCount,
		Driver:         ctr.Snapshotter,
		Platform:       "linux",
		ExecIDs:        ctr.ExecIDs,

		AppArmorProfile: ctr.AppArmorProfile,
		HostConfig:      hostConfigOf(&ctr.Config),
		GraphDriver:     &storage.DriverData{Name: ctr.Snapshotter},
		SizeRw:          ctr.SizeRw,
		SizeRootFs:      ctr.SizeRootFs,
		Mounts:          mountPoints(ctr.Mounts),
		Config:          configOf(ctr),
		NetworkSettings: &container.NetworkSettings{
			SandboxID:  sandboxID(ctr),
			SandboxKey: ctr.SandboxKey,
			Ports:      published(ctr),
			Networks:   networksOf(ctr),
		},
	}
	return out
}

// sandboxID names a container's network stack, which has no id of its own, by its container.
func sandboxID(ctr *engine.Container) string {
	if ctr.SandboxKey == "" {
		return ""
	}
	return ctr.ID
}

func stateOf(s *engine.State) *container.State {
	out := &container.State{
		Status:     container.ContainerState(s.Status),
		Running:    s.Status == engine.StatusRunning || s.Status == engine.StatusPaused || s.Status == engine.StatusRestarting,
		Paused:     s.Status == engine.StatusPaused,
		Restarting: s.Status == engine.StatusRestarting,
		OOMKilled:  s.OOMKilled,
		Dead:       s.Status == engine.StatusDead,
		Pid:        s.Pid,
		ExitCode:   s.ExitCode,
		Error:      s.Error,
		StartedAt:  timestamp(s.StartedAt),
		FinishedAt: timestamp(s.FinishedAt),
	}
	if h := s.Health; h != nil {
		out.Health = &container.Health{
			Status: container.HealthStatus(h.Status), FailingStreak: h.FailingStreak,
			Log: []*container.HealthcheckResult{},
		}
		for _, r := range h.Log {
			out.Health.Log = append(out.Health.Log, &container.HealthcheckResult{
				Start: r.Start, End: r.End, ExitCode: r.ExitCode, Output: r.Output,
			})
		}
	}
	return out
}

// configOf is a container's configuration after the image's was merged in.
func configOf(ctr *engine.Container) *container.Config {
	c := &ctr.Config
	_, _, _, volumes := hostMounts(c.Mounts)
	for _, m := range ctr.Mounts {
		if m.FromImage {
			if volumes == nil {
				volumes = map[string]struct{}{}
			}
			volumes[m.Target] = struct{}{}
		}
	}
	out := &container.Config{
		Hostname: ctr.Hostname, Domainname: c.Domainname, User: ctr.User,
		AttachStdin: c.AttachStdin, AttachStdout: c.AttachStdout, AttachStderr: c.AttachStderr,
		ExposedPorts: exposedSet(ctr.ExposedPorts),
		Tty:          c.TTY, OpenStdin: c.OpenStdin, StdinOnce: c.StdinOnce,
		Env: list(ctr.Env), Cmd: ctr.Cmd, Image: cmp.Or(ctr.ImageName, c.Image), Volumes: volumes,
		WorkingDir: ctr.WorkingDir, Entrypoint: ctr.Entrypoint, NetworkDisabled: c.NetworkDisabled,
		Labels: dict(ctr.Labels), StopSignal: c.StopSignal, StopTimeout: c.StopTimeout, Shell: c.Shell,
	}
	if out.StopSignal == "" && ctr.StopSignal != "SIGTERM" {
		out.StopSignal = ctr.StopSignal
	}
	if h := ctr.Healthcheck; h != nil {
		out.Healthcheck = &container.HealthConfig{
			Test: h.Test, Interval: h.Interval, Timeout: h.Timeout,
			StartPeriod: h.StartPeriod, StartInterval: h.StartInterval, Retries: h.Retries,
		}
	}
	return out
}

// hostConfigOf gives back what was asked of the host.
func hostConfigOf(c *engine.Config) *container.HostConfig {
	binds, mounts, tmpfs, _ := hostMounts(c.Mounts)
	return &container.HostConfig{
		Binds:           binds,
		ContainerIDFile: c.ContainerIDFile,
		LogConfig:       container.LogConfig{Type: cmp.Or(c.Log.Driver, "json-file"), Config: dict(c.Log.Options)},
		NetworkMode:     container.NetworkMode(cmp.Or(c.NetworkMode, engine.DefaultNetwork)),
		PortBindings:    portBindings(c.Ports),
		RestartPolicy: container.RestartPolicy{
			Name:              container.RestartPolicyMode(cmp.Or(c.Restart.Name, string(container.RestartPolicyDisabled))),
			MaximumRetryCount: c.Restart.MaxRetries,
		},
		AutoRemove:      c.AutoRemove,
		VolumesFrom:     c.VolumesFrom,
		ConsoleSize:     c.ConsoleSize,
		Annotations:     c.Annotations,
		CapAdd:          c.CapAdd,
		CapDrop:         c.CapDrop,
		CgroupnsMode:    container.CgroupnsMode(c.CgroupnsMode),
		DNS:             list(c.DNS),
		DNSOptions:      list(c.DNSOptions),
		DNSSearch:       list(c.DNSSearch),
		ExtraHosts:      list(c.ExtraHosts),
		GroupAdd:        c.GroupAdd,
		IpcMode:         container.IpcMode(cmp.Or(c.IpcMode, string(container.IPCModePrivate))),
		Links:           c.Links,
		OomScoreAdj:     c.OOMScoreAdj,
		PidMode:         container.PidMode(c.PidMode),
		Privileged:      c.Privileged,
		PublishAllPorts: c.PublishAll,
		ReadonlyRootfs:  c.ReadonlyRootfs,
		SecurityOpt:     c.SecurityOpt,
		StorageOpt:      c.StorageOpt,
		Tmpfs:           tmpfs,
		UTSMode:         container.UTSMode(c.UTSMode),
		UsernsMode:      container.UsernsMode(c.UsernsMode),
		ShmSize:         cmp.Or(c.ShmSize, defaultShm),
		Sysctls:         c.Sysctls,
		Runtime:         cmp.Or(c.Runtime, defaultRuntime),
		Resources:       wireResources(&c.Resources),
		Mounts:          mounts,
		MaskedPaths:     c.MaskedPaths,
		ReadonlyPaths:   c.ReadonlyPaths,
		Init:            c.Init,
	}
}

const (
	defaultShm     = 64 << 20 // bytes of /dev/shm
	defaultRuntime = "hako"
)

// networksOf describes a container's endpoints by network: as they are, or, for a
// container that is not connected, as they were asked for.
func networksOf(ctr *engine.Container) map[string]*wire.EndpointSettings {
	out := map[string]*wire.EndpointSettings{}
	asked := ctr.Attached
	for i := range asked {
		out[asked[i].Network] = askedEndpoint(&asked[i])
	}
	for i := range ctr.Endpoints {
		ep := &ctr.Endpoints[i]
		settings := out[ep.NetworkName]
		for _, id := range []string{ep.NetworkID, ep.NetworkID[:min(12, len(ep.NetworkID))]} {
			if byID, ok := out[id]; ok && id != "" && settings == nil {
				delete(out, id)
				settings = byID
			}
		}
		if settings == nil {
			settings = &wire.EndpointSettings{Aliases: ep.Aliases}
		}
		fillEndpoint(settings, ep)
		out[ep.NetworkName] = settings
	}
	return out
}

func askedEndpoint(a *engine.EndpointSettings) *wire.EndpointSettings {
	es := &wire.EndpointSettings{
		Links: a.Links, Aliases: a.Aliases, DriverOpts: a.DriverOpts, GwPriority: a.GatewayPriority,
	}
	if a.IPv4.IsValid() || a.IPv6.IsValid() {
		es.IPAMConfig = &wire.EndpointIPAMConfig{IPv4Address: a.IPv4, IPv6Address: a.IPv6}
	}
	_ = es.MacAddress.UnmarshalText([]byte(a.MAC)) // was checked when it was asked for
	return es
}

func fillEndpoint(es *wire.EndpointSettings, ep *engine.Endpoint) {
	es.NetworkID, es.EndpointID = ep.NetworkID, ep.EndpointID
	es.Gateway, es.IPv6Gateway = ep.Gateway4, ep.Gateway6
	if ep.IPv4.IsValid() {
		es.IPAddress, es.IPPrefixLen = ep.IPv4.Addr(), ep.IPv4.Bits()
	}
	if ep.IPv6.IsValid() {
		es.GlobalIPv6Address, es.GlobalIPv6PrefixLen = ep.IPv6.Addr(), ep.IPv6.Bits()
	}
	es.DNSNames = ep.DNSNames
	_ = es.MacAddress.UnmarshalText([]byte(ep.MAC)) // made by the network room
}

// summaryOf is a container in a list.
func summaryOf(ctr *engine.Container, now time.Time) container.Summary {
	out := container.Summary{
		ID:         ctr.ID,
		Names:      []string{"/" + ctr.Name},
		Image:      cmp.Or(ctr.ImageName, ctr.Config.Image),
		ImageID:    ctr.ImageID,
		Command:    commandLine(ctr.Path, ctr.Args),
		Created:    ctr.Created.Unix(),
		Ports:      portSummaries(ctr),
		Labels:     dict(ctr.Labels),
		State:      container.ContainerState(ctr.State.Status),
		Status:     statusText(&ctr.State, now),
		Mounts:     mountPoints(ctr.Mounts),
		SizeRw:     deref(ctr.SizeRw),
		SizeRootFs: deref(ctr.SizeRootFs),
		NetworkSettings: &container.NetworkSettingsSummary{
			Networks: networksOf(ctr),
		},
	}
	out.HostConfig.NetworkMode = cmp.Or(ctr.Config.NetworkMode, engine.DefaultNetwork)
	out.HostConfig.Annotations = ctr.Config.Annotations
	if h := ctr.State.Health; h != nil {
		out.Health = &container.HealthSummary{Status: container.HealthStatus(h.Status), FailingStreak: h.FailingStreak}
	}
	return out
}

func deref(p *int64) int64 {
	if p == nil {
		return 0
	}
	return *p
}

// commandLine joins a command, quoting arguments with blanks as docker ps does.
func commandLine(name string, args []string) string {
	var b strings.Builder
	b.WriteString(name)
	for _, a := range args {
		b.WriteByte(' ')
		if strings.ContainsRune(a, ' ') {
			a = "'" + a + "'"
		}
		b.WriteString(a)
	}
	return b.String()
}

// statusText is the sentence that docker ps shows for a state.
func statusText(s *engine.State, now time.Time) string {
	switch s.Status {
	case engine.StatusRunning, engine.StatusPaused:
		text := "Up " + units.HumanDuration(now.Sub(s.StartedAt))
		switch {
		case s.Status == engine.StatusPaused:
			text += " (Paused)"
		case s.Health == nil || s.Health.Status == string(container.NoHealthcheck):
		case s.Health.Status == string(container.Starting):
			text += " (health: starting)"
		default:
			text += " (" + s.Health.Status + ")"
		}
		return text
	case engine.StatusRestarting:
		return "Restarting (" + strconv.Itoa(s.ExitCode) + ") " + units.HumanDuration(now.Sub(s.FinishedAt)) + " ago"
	case engine.StatusRemoving:
		return "Removal In Progress"
	case engine.StatusDead:
		return "Dead"
	case engine.StatusExited:
		if s.FinishedAt.IsZero() {
			return "Exited (" + strconv.Itoa(s.ExitCode) + ")"
		}
		return "Exited (" + strconv.Itoa(s.ExitCode) + ") " + units.HumanDuration(now.Sub(s.FinishedAt)) + " ago"
	default:
		return "Created"
	}
}
