package cri

import (
	"context"
	"strings"
	"time"

	"google.golang.org/grpc"
	api "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hako-engine/hako/engine"
)

func (s *runtimeService) RunPodSandbox(ctx context.Context, r *api.RunPodSandboxRequest) (*api.RunPodSandboxResponse, error) {
	c, err := sandboxConfig(r.GetConfig(), r.GetRuntimeHandler())
	if err != nil {
		return nil, err
	}
	id, err := s.opt.Backend.RunSandbox(ctx, c)
	if err != nil {
		return nil, err
	}
	return &api.RunPodSandboxResponse{PodSandboxId: id}, nil
}

func (s *runtimeService) StopPodSandbox(ctx context.Context, r *api.StopPodSandboxRequest) (*api.StopPodSandboxResponse, error) {
	if err := s.opt.Backend.StopSandbox(ctx, r.GetPodSandboxId()); err != nil && !notFound(err) {
		return nil, err
	}
	return &api.StopPodSandboxResponse{}, nil
}

func (s *runtimeService) RemovePodSandbox(ctx context.Context, r *api.RemovePodSandboxRequest) (*api.RemovePodSandboxResponse, error) {
	if err := s.opt.Backend.RemoveSandbox(ctx, r.GetPodSandboxId()); err != nil && !notFound(err) {
		return nil, err
	}
	return &api.RemovePodSandboxResponse{}, nil
}

func (s *runtimeService) PodSandboxStatus(ctx context.Context, r *api.PodSandboxStatusRequest) (*api.PodSandboxStatusResponse, error) {
	sb, err := s.opt.Backend.Sandbox(ctx, r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	// The time goes with the statuses of the containers, or not at all: one without the other
	// makes the kubelet believe that there are none. Both are as of the same moment.
	now := time.Now().UnixNano()
	resp := &api.PodSandboxStatusResponse{Status: sandboxStatus(sb), Timestamp: now}
	for _, c := range s.opt.Backend.SandboxContainers(ctx, sb.ID) {
		resp.ContainersStatuses = append(resp.ContainersStatuses, s.containerStatus(ctx, &c))
	}
	if len(resp.ContainersStatuses) == 0 {
		resp.Timestamp = 0
	}
	if r.GetVerbose() {
		more := map[string]any{
			"pid": sb.Pid, "netns": sb.NetNS, "config": sb.Config, "created": sb.Created, "state": sb.State, "ips": sb.IPs,
			"runtimeHandler": sb.Config.Runtime,
		}
		if spec, err := s.opt.Backend.SandboxSpec(ctx, sb.ID); err == nil {
			more["runtimeSpec"] = spec
		}
		resp.Info = info(more)
	}
	return resp, nil
}

func (s *runtimeService) UpdatePodSandboxResources(ctx context.Context, r *api.UpdatePodSandboxResourcesRequest) (*api.UpdatePodSandboxResourcesResponse, error) {
	err := s.opt.Backend.UpdateSandboxResources(ctx, r.GetPodSandboxId(), optionalResources(r.GetOverhead()), optionalResources(r.GetResources()))
	if err != nil {
		return nil, err
	}
	return &api.UpdatePodSandboxResourcesResponse{}, nil
}

func (s *runtimeService) ListPodSandbox(ctx context.Context, r *api.ListPodSandboxRequest) (*api.ListPodSandboxResponse, error) {
	return &api.ListPodSandboxResponse{Items: s.listSandboxes(ctx, r.GetFilter())}, nil
}

func (s *runtimeService) StreamPodSandboxes(r *api.StreamPodSandboxesRequest, to grpc.ServerStreamingServer[api.StreamPodSandboxesResponse]) error {
	return inParts(s.listSandboxes(to.Context(), r.GetFilter()), func(p []*api.PodSandbox) error {
		return to.Send(&api.StreamPodSandboxesResponse{PodSandboxes: p})
	})
}

func (s *runtimeService) listSandboxes(ctx context.Context, f *api.PodSandboxFilter) []*api.PodSandbox {
	var out []*api.PodSandbox
	for _, sb := range s.opt.Backend.Sandboxes(ctx) {
		if f.GetId() != "" && !strings.HasPrefix(sb.ID, f.GetId()) || !matchLabels(sb.Config.Labels, f.GetLabelSelector()) {
			continue
		}
		if f.GetState() != nil && f.GetState().GetState() != sandboxState(sb) {
			continue
		}
		out = append(out, sandboxOf(sb))
	}
	return out
}

// partLength is how many items one message of a streamed list holds.
const partLength = 256

// inParts sends a list in messages that are not too long: each item once, none empty.
func inParts[T any](items []T, send func([]T) error) error {
	for len(items) > 0 {
		n := min(len(items), partLength)
		if err := send(items[:n]); err != nil {
			return err
		}
		items = items[n:]
	}
	return nil
}

func matchLabels(have, want map[string]string) bool {
	for k, v := range want {
		if got, ok := have[k]; !ok || got != v {
			return false
		}
	}
	return true
}

func sandboxState(sb engine.Sandbox) api.PodSandboxState {
	if sb.State == engine.SandboxReady {
		return api.PodSandboxState_SANDBOX_READY
	}
	return api.PodSandboxState_SANDBOX_NOTREADY
}
