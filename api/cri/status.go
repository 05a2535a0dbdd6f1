package cri

import (
	"context"
	"encoding/json"
	"net/netip"
	"strings"

	api "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// kubeAPIVersion is the version of the kubelet's side of the interface.
const kubeAPIVersion = "0.1.0"

func (s *runtimeService) Version(context.Context, *api.VersionRequest) (*api.VersionResponse, error) {
	return &api.VersionResponse{Version: kubeAPIVersion, RuntimeName: "hako", RuntimeVersion: s.opt.Version, RuntimeApiVersion: "v1"}, nil
}

func (s *runtimeService) Status(ctx context.Context, r *api.StatusRequest) (*api.StatusResponse, error) {
	network := &api.RuntimeCondition{Type: "NetworkReady", Status: true}
	if err := s.opt.Backend.NetworkReady(ctx); err != nil {
		network.Status, network.Reason, network.Message = false, "NetworkPluginNotReady", err.Error()
	}
	features := s.opt.Backend.PodFeatures(ctx)
	resp := &api.StatusResponse{
		Status: &api.RuntimeStatus{Conditions: []*api.RuntimeCondition{{Type: "RuntimeReady", Status: true}, network}},
		Features: &api.RuntimeFeatures{
			SupplementalGroupsPolicy: true, MountOptions: true, UserNamespacesHostNetwork: features.UserNamespaces,
		},
	}
	for _, name := range append([]string{""}, s.handlers()...) {
		h := &api.RuntimeHandler{Name: name, Features: &api.RuntimeHandlerFeatures{}}
		if name == "" || name == "hako" { // of others nothing is known
			h.Features.RecursiveReadOnlyMounts, h.Features.UserNamespaces = features.RecursiveReadOnly, features.UserNamespaces
		}
		resp.RuntimeHandlers = append(resp.RuntimeHandlers, h)
	}
	if r.GetVerbose() {
		config := map[string]any{"stateDir": s.opt.StateDir, "rootDir": features.Root, "cgroupDriver": features.CgroupDriver}
		for k, v := range s.opt.Config {
			config[k] = v
		}
		raw, err := json.Marshal(config)
		if err != nil {
			return nil, err
		}
		resp.Info = map[string]string{"config": string(raw)}
	}
	return resp, nil
}

// handlers are the runtime handlers that have a name.
func (s *Server) handlers() []string {
	names := []string{"hako"}
	if s.opt.Handlers != nil {
		names = append(names, s.opt.Handlers()...)
	}
	return names
}

func (s *runtimeService) RuntimeConfig(ctx context.Context, _ *api.RuntimeConfigRequest) (*api.RuntimeConfigResponse, error) {
	driver := api.CgroupDriver_CGROUPFS
	if s.opt.Backend.PodFeatures(ctx).CgroupDriver == "systemd" {
		driver = api.CgroupDriver_SYSTEMD
	}
	return &api.RuntimeConfigResponse{Linux: &api.LinuxRuntimeConfiguration{CgroupDriver: driver}}, nil
}

func (s *runtimeService) UpdateRuntimeConfig(ctx context.Context, r *api.UpdateRuntimeConfigRequest) (*api.UpdateRuntimeConfigResponse, error) {
	var ranges []netip.Prefix
	for part := range strings.SplitSeq(r.GetRuntimeConfig().GetNetworkConfig().GetPodCidr(), ",") {
		if part = strings.TrimSpace(part); part == "" {
			continue
		}
		p, err := netip.ParsePrefix(part)
		if err != nil {
			return nil, invalidf("pod CIDR %q: %v", part, err)
		}
		ranges = append(ranges, p)
	}
	if err := s.opt.Backend.SetPodCIDR(ctx, ranges); err != nil {
		return nil, err
	}
	return &api.UpdateRuntimeConfigResponse{}, nil
}
