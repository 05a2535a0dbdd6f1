package containerd

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	api "github.com/containerd/containerd/api/services/introspection/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/hako-engine/hako/engine"
)

// Types of plugins that clients look for.
const (
	pluginGRPC        = "io.containerd.grpc.v1"
	pluginTTRPC       = "io.containerd.ttrpc.v1"
	pluginSnapshotter = "io.containerd.snapshotter.v1"
	pluginRuntime     = "io.containerd.runtime.v2"
	pluginSandbox     = "io.containerd.sandbox.controller.v1"
	pluginDiffer      = "io.containerd.differ.v1"
	pluginContent     = "io.containerd.content.v1"
	pluginEvent       = "io.containerd.event.v1"
	pluginLease       = "io.containerd.lease.v1"
	pluginStreaming   = "io.containerd.streaming.v1"
	pluginTransfer    = "io.containerd.transfer.v1"
)

type introspectionService struct {
	api.UnimplementedIntrospectionServer
	s *Server // not embedded: the API has a method of that name
}

func (i *introspectionService) Plugins(_ context.Context, req *api.PluginsRequest) (*api.PluginsResponse, error) {
	filter, err := filters.ParseAll(req.GetFilters()...)
	if err != nil {
		return nil, err
	}
	resp := &api.PluginsResponse{}
	for _, p := range i.s.plugins() {
		if filter.Match(adaptPlugin(p)) {
			resp.Plugins = append(resp.Plugins, p)
		}
	}
	return resp, nil
}

func (i *introspectionService) Server(context.Context, *emptypb.Empty) (*api.ServerResponse, error) {
	resp := &api.ServerResponse{UUID: i.s.opt.UUID, Pid: uint64(os.Getpid())}
	if link, err := os.Readlink("/proc/self/ns/pid"); err == nil { // pid:[4026531836]
		_, _ = fmt.Sscanf(link, "pid:[%d]", &resp.Pidns)
	}
	return resp, nil
}

func (i *introspectionService) PluginInfo(ctx context.Context, req *api.PluginInfoRequest) (*api.PluginInfoResponse, error) {
	list := i.s.plugins()
	at := slices.IndexFunc(list, func(p *api.Plugin) bool { return p.Type == req.GetType() && p.ID == req.GetID() })
	if at < 0 {
		return nil, fmt.Errorf("plugin %s.%s: %w", req.GetType(), req.GetID(), errdefs.ErrNotFound)
	}
	resp := &api.PluginInfoResponse{Plugin: list[at]}
	if req.GetOptions() == nil {
		return resp, nil
	}
	if req.GetType() != pluginRuntime || i.s.opt.RuntimeInfo == nil {
		return nil, fmt.Errorf("plugin %s.%s tells no more: %w", req.GetType(), req.GetID(), errdefs.ErrNotImplemented)
	}
	var rr types.RuntimeRequest
	if err := req.GetOptions().UnmarshalTo(&rr); err != nil {
		return nil, invalidf("options of plugin %s.%s: %v", req.GetType(), req.GetID(), err)
	}
	info, err := i.s.opt.RuntimeInfo(ctx, &rr)
	if err != nil {
		return nil, err
	}
	if resp.Extra, err = packed(info); err != nil {
		return nil, fmt.Errorf("information on runtime: %w", err)
	}
	return resp, nil
}

// described is what a snapshotter may tell of itself.
type described interface {
	Root() string
	Capabilities() []string
}

// plugins lists what is there; clients find features by it.
func (s *Server) plugins() []*api.Plugin {
	host := platforms.DefaultSpec()
	here := []*types.Platform{{OS: host.OS, Architecture: host.Architecture, Variant: host.Variant}}
	var out []*api.Plugin
	add := func(typ string, ids ...string) {
		for _, id := range ids {
			out = append(out, &api.Plugin{Type: typ, ID: id})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(s.opt.Snapshotters)) {
		p := &api.Plugin{Type: pluginSnapshotter, ID: name, Platforms: here}
		if d, ok := s.opt.Snapshotters[name].(described); ok {
			p.Exports, p.Capabilities = map[string]string{"root": d.Root()}, d.Capabilities()
		}
		out = append(out, p)
	}
	add(pluginContent, "content")
	add(pluginEvent, "exchange")
	add(pluginLease, "manager")
	add(pluginStreaming, "manager")
	if s.opt.Backend != nil {
		out = append(out, &api.Plugin{Type: pluginRuntime, ID: "task", Platforms: here, Exports: map[string]string{"log-uri-schemes": "binary,binary-v2,fifo,file"}})
	}
	if s.opt.Differ != nil {
		out = append(out, &api.Plugin{Type: pluginDiffer, ID: "walking", Platforms: here})
	}
	if s.opt.Transfer != nil {
		add(pluginTransfer, "local")
	}
	if s.opt.Backend != nil {
		add(pluginSandbox, engine.SandboxerShim, engine.SandboxerPods)
	}
	for _, p := range s.opt.Plugins {
		out = append(out, &api.Plugin{Type: p.Type, ID: p.ID, Requires: p.Requires, Exports: p.Exports, Capabilities: p.Capabilities})
	}
	services := slices.Sorted(maps.Keys(s.grpc.GetServiceInfo()))
	for _, name := range services {
		switch parts := strings.Split(name, "."); {
		case strings.HasPrefix(name, "containerd.services.") && len(parts) > 3:
			add(pluginGRPC, pluginID(strings.Join(parts[2:len(parts)-2], "-"), parts[len(parts)-1]))
		case name == "grpc.health.v1.Health":
			add(pluginGRPC, "healthcheck")
		case name == "runtime.v1.RuntimeService":
			add(pluginGRPC, "cri")
		}
	}
	add(pluginTTRPC, "events")
	return out
}

// pluginID is what containerd calls the plugin of a service.
func pluginID(name, service string) string {
	switch {
	case name == "sandbox" && service == "Controller":
		return "sandbox-controllers"
	case name == "sandbox":
		return "sandboxes"
	}
	return name
}

func adaptPlugin(p *api.Plugin) filters.Adaptor {
	return filters.AdapterFunc(func(path []string) (string, bool) {
		if len(path) == 0 {
			return "", false
		}
		switch path[0] {
		case "type":
			return p.Type, p.Type != ""
		case "id":
			return p.ID, p.ID != ""
		case "platforms":
			var all []string
			for _, pl := range p.Platforms {
				all = append(all, platforms.Format(toPlatform(pl)))
			}
			return strings.Join(all, ","), len(all) > 0
		case "capabilities":
			return strings.Join(p.Capabilities, ","), len(p.Capabilities) > 0
		}
		return "", false
	})
}
