package cri

import (
	"encoding/json"
	"net/netip"
	"path"
	"path/filepath"

	api "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hako-engine/hako/engine"
)

// sandboxConfig makes the engine's form of a request for a sandbox.
func sandboxConfig(w *api.PodSandboxConfig, handler string) (engine.SandboxConfig, error) {
	m := w.GetMetadata()
	if m == nil {
		return engine.SandboxConfig{}, invalidf("the configuration of a sandbox must include metadata")
	}
	sec := w.GetLinux().GetSecurityContext()
	if sec.GetRunAsGroup() != nil && sec.GetRunAsUser() == nil {
		return engine.SandboxConfig{}, invalidf("run_as_group of a sandbox needs run_as_user")
	}
	ns := sec.GetNamespaceOptions()
	c := engine.SandboxConfig{
		Name: m.GetName(), Namespace: m.GetNamespace(), UID: m.GetUid(), Attempt: m.GetAttempt(),
		Hostname: w.GetHostname(), LogDirectory: w.GetLogDirectory(),
		Labels: w.GetLabels(), Annotations: w.GetAnnotations(),
		CgroupParent: w.GetLinux().GetCgroupParent(), Sysctls: w.GetLinux().GetSysctls(),
		Network: mode(ns.GetNetwork()), PID: mode(ns.GetPid()), IPC: mode(ns.GetIpc()),
		Privileged: sec.GetPrivileged(), Runtime: handler, SELinux: selinux(sec.GetSelinuxOptions()),
	}
	if d := w.GetDnsConfig(); d != nil {
		c.DNS = &engine.DNS{Servers: d.GetServers(), Searches: d.GetSearches(), Options: d.GetOptions()}
	}
	for _, p := range w.GetPortMappings() {
		port, err := portMapping(p)
		if err != nil {
			return c, err
		}
		c.Ports = append(c.Ports, port)
	}
	var err error
	if c.Userns, err = userns(ns.GetUsernsOptions()); err != nil {
		return c, err
	}
	c.Overhead, c.Resources = optionalResources(w.GetLinux().GetOverhead()), optionalResources(w.GetLinux().GetResources())
	return c, nil
}

// optionalResources gives nil for limits that are not there.
func optionalResources(w *api.LinuxContainerResources) *engine.Resources {
	if w == nil {
		return nil
	}
	r := resources(w)
	return &r
}

func portMapping(p *api.PortMapping) (engine.PortMapping, error) {
	out := engine.PortMapping{}
	switch p.GetProtocol() {
	case api.Protocol_TCP:
		out.Proto = "tcp"
	case api.Protocol_UDP:
		out.Proto = "udp"
	case api.Protocol_SCTP:
		out.Proto = "sctp"
	default:
		return out, invalidf("unknown protocol %d of a port mapping", p.GetProtocol())
	}
	for _, n := range []int32{p.GetContainerPort(), p.GetHostPort()} {
		if n < 0 || n > 65535 {
			return out, invalidf("port %d is out of range", n)
		}
	}
	out.ContainerPort, out.HostPort = uint16(p.GetContainerPort()), uint16(p.GetHostPort())
	if p.GetHostIp() != "" {
		ip, err := netip.ParseAddr(p.GetHostIp())
		if err != nil {
			return out, invalidf("host address of port %d: %v", p.GetHostPort(), err)
		}
		if !ip.IsUnspecified() {
			out.HostIP = ip
		}
	}
	return out, nil
}

func userns(u *api.UserNamespace) (*engine.Userns, error) {
	if u == nil {
		return nil, nil
	}
	switch u.GetMode() {
	case api.NamespaceMode_NODE:
		return nil, nil
	case api.NamespaceMode_POD:
		return &engine.Userns{UIDs: idMaps(u.GetUids()), GIDs: idMaps(u.GetGids())}, nil
	}
	return nil, invalidf("user namespace mode %s is not supported", u.GetMode())
}

func idMaps(from []*api.IDMapping) []engine.IDMap {
	var out []engine.IDMap
	for _, m := range from {
		out = append(out, engine.IDMap{Container: m.GetContainerId(), Host: m.GetHostId(), Size: m.GetLength()})
	}
	return out
}

func wireMaps(from []engine.IDMap) []*api.IDMapping {
	var out []*api.IDMapping
	for _, m := range from {
		out = append(out, &api.IDMapping{ContainerId: m.Container, HostId: m.Host, Length: m.Size})
	}
	return out
}

var modes = map[api.NamespaceMode]engine.NamespaceMode{
	api.NamespaceMode_POD: engine.NamespacePod, api.NamespaceMode_CONTAINER: engine.NamespaceContainer,
	api.NamespaceMode_NODE: engine.NamespaceNode, api.NamespaceMode_TARGET: engine.NamespaceTarget,
}

// mode gives the engine's name; one that it does not know is refused by it.
func mode(m api.NamespaceMode) engine.NamespaceMode {
	if n, ok := modes[m]; ok {
		return n
	}
	return engine.NamespaceMode(m.String())
}

func wireMode(m engine.NamespaceMode) api.NamespaceMode {
	for w, n := range modes {
		if n == m {
			return w
		}
	}
	return api.NamespaceMode_POD
}

func sandboxMetadata(c engine.SandboxConfig) *api.PodSandboxMetadata {
	return &api.PodSandboxMetadata{Name: c.Name, Namespace: c.Namespace, Uid: c.UID, Attempt: c.Attempt}
}

func sandboxOf(sb engine.Sandbox) *api.PodSandbox {
	c := sb.Config
	return &api.PodSandbox{
		Id: sb.ID, Metadata: sandboxMetadata(c), State: sandboxState(sb), CreatedAt: sb.Created.UnixNano(),
		Labels: c.Labels, Annotations: c.Annotations, RuntimeHandler: c.Runtime,
	}
}

func sandboxStatus(sb engine.Sandbox) *api.PodSandboxStatus {
	c := sb.Config
	st := &api.PodSandboxStatus{
		Id: sb.ID, Metadata: sandboxMetadata(c), State: sandboxState(sb), CreatedAt: sb.Created.UnixNano(),
		Labels: c.Labels, Annotations: c.Annotations, RuntimeHandler: c.Runtime,
		Network: &api.PodSandboxNetworkStatus{},
		Linux: &api.LinuxPodSandboxStatus{Namespaces: &api.Namespace{Options: &api.NamespaceOption{
			Network: wireMode(c.Network), Pid: wireMode(c.PID), Ipc: wireMode(c.IPC),
		}}},
	}
	if c.Userns != nil {
		st.Linux.Namespaces.Options.UsernsOptions = &api.UserNamespace{
			Mode: api.NamespaceMode_POD, Uids: wireMaps(c.Userns.UIDs), Gids: wireMaps(c.Userns.GIDs),
		}
	}
	for i, ip := range sb.IPs {
		if i == 0 {
			st.Network.Ip = ip.String()
			continue
		}
		st.Network.AdditionalIps = append(st.Network.AdditionalIps, &api.PodIP{Ip: ip.String()})
	}
	return st
}

// info is what verbose answers carry: JSON under the key that crictl shows.
func info(v map[string]any) map[string]string {
	b, err := json.Marshal(v)
	if err != nil {
		return map[string]string{"error": err.Error()}
	}
	return map[string]string{"info": string(b)}
}

// logPath joins the two parts of the path of a container's log, which lies in the sandbox's folder.
func logPath(dir, name string) (string, error) {
	if dir == "" || name == "" {
		return "", nil
	}
	if !filepath.IsLocal(name) {
		return "", invalidf("log path %q leads out of the sandbox's log directory", name)
	}
	return path.Join(dir, name), nil
}
