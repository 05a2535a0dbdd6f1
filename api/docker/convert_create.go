package docker

import (
	"encoding/json"
	"maps"
	"net"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"github.com/hako-engine/hako/engine"
)

// words is a list of strings that old clients give as a single one.
type words []string

// UnmarshalJSON takes a list, a string or null.
func (w *words) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] == '"' {
		var s string
		if err := json.Unmarshal(b, &s); err != nil {
			return err
		}
		*w = words{s}
		return nil
	}
	return json.Unmarshal(b, (*[]string)(w))
}

// createRequest is the body of a create, with what old clients put elsewhere.
type createRequest struct {
	container.CreateRequest
	Cmd        words
	Entrypoint words
	MacAddress string // of the first network, before API 1.44
}

// configFrom makes the engine's configuration of a create. What the engine cannot
// give is an error; what has no effect is a warning.
func configFrom(req *createRequest) (c engine.Config, warnings []string, err error) {
	if req.Config == nil {
		req.Config = &container.Config{}
	}
	if req.HostConfig == nil {
		req.HostConfig = &container.HostConfig{}
	}
	w, h := req.Config, req.HostConfig
	if w.Image == "" {
		return c, nil, invalidf("no image specified")
	}
	c = engine.Config{
		Image:        w.Image,
		Hostname:     w.Hostname,
		Domainname:   w.Domainname,
		User:         w.User,
		Env:          w.Env,
		Cmd:          req.Cmd,
		WorkingDir:   w.WorkingDir,
		Labels:       w.Labels,
		StopSignal:   w.StopSignal,
		StopTimeout:  w.StopTimeout,
		Shell:        w.Shell,
		TTY:          w.Tty,
		OpenStdin:    w.OpenStdin,
		StdinOnce:    w.StdinOnce,
		AttachStdin:  w.AttachStdin,
		AttachStdout: w.AttachStdout,
		AttachStderr: w.AttachStderr,

		NetworkDisabled: w.NetworkDisabled,
		MacAddress:      req.MacAddress,
	}
	c.Entrypoint, c.EntrypointSet = req.Entrypoint, req.Entrypoint != nil
	if req.MacAddress != "" {
		if _, err := net.ParseMAC(req.MacAddress); err != nil {
			return c, nil, invalidf("invalid MAC address %q", req.MacAddress)
		}
	}
	c.Healthcheck = healthcheckFrom(w.Healthcheck)
	c.ExposedPorts = exposedFrom(w.ExposedPorts)
	if err := hostConfigInto(&c, h); err != nil {
		return c, nil, err
	}
	if c.Mounts, err = mountsFrom(w.Volumes, h); err != nil {
		return c, nil, err
	}
	if c.Resources, err = resourcesFrom(&h.Resources); err != nil {
		return c, nil, err
	}
	if c.Ports, err = portsFrom(h.PortBindings); err != nil {
		return c, nil, err
	}
	if c.Endpoints, err = endpointsFrom(c.NetworkMode, req.NetworkingConfig); err != nil {
		return c, nil, err
	}
	if len(c.Ports) > 0 && c.NetworkMode == network.NetworkHost {
		warnings = append(warnings, "Published ports are discarded when using host network mode")
	}
	return c, warnings, nil
}

// hostConfigInto takes over what needs no conversion of its own.
func hostConfigInto(c *engine.Config, h *container.HostConfig) error {
	c.GroupAdd = h.GroupAdd
	c.Annotations = h.Annotations
	c.ConsoleSize = h.ConsoleSize
	c.AutoRemove = h.AutoRemove
	c.Log = engine.LogConfig{Driver: h.LogConfig.Type, Options: h.LogConfig.Config}
	c.ContainerIDFile = h.ContainerIDFile
	c.Runtime = h.Runtime
	c.Init = h.Init
	c.NetworkMode = string(h.NetworkMode)
	if h.NetworkMode.IsDefault() {
		c.NetworkMode = ""
	}
	c.PidMode = string(h.PidMode)
	c.IpcMode = string(h.IpcMode)
	c.UTSMode = string(h.UTSMode)
	c.UsernsMode = string(h.UsernsMode)
	c.CgroupnsMode = string(h.CgroupnsMode)
	c.PublishAll = h.PublishAllPorts
	c.DNS, c.DNSOptions, c.DNSSearch = h.DNS, h.DNSOptions, h.DNSSearch
	c.ExtraHosts, c.Links = h.ExtraHosts, h.Links
	c.Privileged = h.Privileged
	c.CapAdd, c.CapDrop = h.CapAdd, h.CapDrop
	c.SecurityOpt = h.SecurityOpt
	c.ReadonlyRootfs = h.ReadonlyRootfs
	c.MaskedPaths, c.ReadonlyPaths = h.MaskedPaths, h.ReadonlyPaths
	c.Sysctls = h.Sysctls
	c.OOMScoreAdj = h.OomScoreAdj
	c.ShmSize = h.ShmSize
	c.VolumesFrom = h.VolumesFrom
	c.StorageOpt = h.StorageOpt
	c.Restart = restartFrom(h.RestartPolicy)
	switch {
	case !h.Isolation.IsValid():
		return invalidf("invalid isolation '%s' on linux", h.Isolation)
	case h.Cgroup != "":
		return notImplementedf("joining the cgroup of another container (HostConfig.Cgroup) is not in this version of hako")
	case h.Umask != nil:
		return notImplementedf("setting the umask of a container (HostConfig.Umask) is not in this version of hako")
	case len(h.DeviceRequests) > 0:
		r := h.DeviceRequests[0]
		return invalidf("could not select device driver %q with capabilities: %v", r.Driver, r.Capabilities)
	}
	return nil
}

func restartFrom(p container.RestartPolicy) engine.RestartPolicy {
	return engine.RestartPolicy{Name: string(p.Name), MaxRetries: p.MaximumRetryCount}
}

func healthcheckFrom(h *container.HealthConfig) *engine.Healthcheck {
	if h == nil {
		return nil
	}
	return &engine.Healthcheck{
		Test: h.Test, Interval: h.Interval, Timeout: h.Timeout,
		StartPeriod: h.StartPeriod, StartInterval: h.StartInterval, Retries: h.Retries,
	}
}

// endpointsFrom lists the networks of a container, the one of the network mode first.
func endpointsFrom(mode string, nc *network.NetworkingConfig) ([]engine.EndpointSettings, error) {
	asked := map[string]*network.EndpointSettings{}
	if nc != nil {
		for name, es := range nc.EndpointsConfig {
			if name == network.NetworkDefault {
				name = network.NetworkBridge
			}
			asked[name] = es
		}
	}
	first := mode
	switch {
	case mode == "":
		first = network.NetworkBridge
	case mode == network.NetworkHost, mode == network.NetworkNone, strings.HasPrefix(mode, "container:"):
		for name := range asked {
			if name != mode {
				return nil, invalidf("conflicting options: cannot attach both %s and user-defined networks", mode)
			}
		}
		return nil, nil
	}
	if len(asked) == 0 {
		return nil, nil // the engine joins the network of the mode
	}
	names := slices.Sorted(maps.Keys(asked))
	if i := slices.Index(names, first); i >= 0 {
		names = slices.Delete(names, i, i+1)
	}
	var out []engine.EndpointSettings
	for _, name := range append([]string{first}, names...) {
		es, err := endpointFrom(name, asked[name])
		if err != nil {
			return nil, err
		}
		out = append(out, es)
	}
	return out, nil
}

// endpointFrom converts what a client asks of one network; nil asks for nothing special.
func endpointFrom(name string, es *network.EndpointSettings) (engine.EndpointSettings, error) {
	out := engine.EndpointSettings{Network: name}
	if es == nil {
		return out, nil
	}
	out.Aliases, out.Links = es.Aliases, es.Links
	out.MAC = es.MacAddress.String()
	out.DriverOpts = es.DriverOpts
	out.GatewayPriority = es.GwPriority
	if ipam := es.IPAMConfig; ipam != nil {
		out.IPv4, out.IPv6 = ipam.IPv4Address, ipam.IPv6Address
		if out.IPv4.IsValid() && !out.IPv4.Unmap().Is4() {
			return out, invalidf("invalid endpoint settings: invalid IPv4 address: %s", out.IPv4)
		}
		out.IPv4 = out.IPv4.Unmap()
		if out.IPv6.IsValid() && !out.IPv6.Is6() {
			return out, invalidf("invalid endpoint settings: invalid IPv6 address: %s", out.IPv6)
		}
		if len(ipam.LinkLocalIPs) > 0 {
			return out, notImplementedf("link-local addresses of an endpoint are not in this version of hako")
		}
	}
	return out, nil
}

// psArgs splits ps_args as a shell would without quotes.
func psArgs(s string) ([]string, error) {
	if len(s) > 4096 {
		return nil, invalidf("ps_args is too long")
	}
	return strings.Fields(s), nil
}

// list makes null an empty list, which clients in strict languages need.
func list[T any](v []T) []T {
	if v == nil {
		return []T{}
	}
	return v
}

// dict makes null an empty object.
func dict[V any](m map[string]V) map[string]V {
	if m == nil {
		return map[string]V{}
	}
	return m
}
