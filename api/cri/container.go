package cri

import (
	"context"
	"slices"
	"strings"

	"google.golang.org/grpc"
	api "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hako-engine/hako/engine"
)

func (s *runtimeService) CreateContainer(ctx context.Context, r *api.CreateContainerRequest) (*api.CreateContainerResponse, error) {
	sb, err := s.opt.Backend.Sandbox(ctx, r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	c, err := containerConfig(r.GetConfig(), sb.Config)
	if err != nil {
		return nil, err
	}
	id, err := s.opt.Backend.CreatePodContainer(ctx, sb.ID, c)
	if err != nil {
		return nil, err
	}
	return &api.CreateContainerResponse{ContainerId: id}, nil
}

// member finds a container of a pod: the door knows no others.
func (s *Server) member(ctx context.Context, ref string) (engine.Container, error) {
	v, err := s.opt.Backend.Container(ctx, ref)
	if err != nil {
		return v, err
	}
	if v.Config.Pod == nil {
		return v, notFoundf("container %q is in no pod", ref)
	}
	return v, nil
}

func (s *runtimeService) StartContainer(ctx context.Context, r *api.StartContainerRequest) (*api.StartContainerResponse, error) {
	v, err := s.member(ctx, r.GetContainerId())
	if err != nil {
		return nil, err
	}
	if err := s.opt.Backend.StartPodContainer(ctx, v.ID); err != nil {
		return nil, err
	}
	return &api.StartContainerResponse{}, nil
}

func (s *runtimeService) StopContainer(ctx context.Context, r *api.StopContainerRequest) (*api.StopContainerResponse, error) {
	v, err := s.member(ctx, r.GetContainerId())
	if notFound(err) {
		return &api.StopContainerResponse{}, nil
	} else if err != nil {
		return nil, err
	}
	timeout := int(max(r.GetTimeout(), 0))
	o := engine.StopOptions{Timeout: &timeout}
	if timeout == 0 {
		o.Signal = "SIGKILL"
		timeout = 10 // it cannot be handled: this is not a grace
	}
	if err := s.opt.Backend.StopContainer(ctx, v.ID, o); err != nil && !notModified(err) && !notFound(err) {
		return nil, err
	}
	return &api.StopContainerResponse{}, nil
}

func (s *runtimeService) RemoveContainer(ctx context.Context, r *api.RemoveContainerRequest) (*api.RemoveContainerResponse, error) {
	v, err := s.member(ctx, r.GetContainerId())
	if notFound(err) {
		return &api.RemoveContainerResponse{}, nil
	} else if err != nil {
		return nil, err
	}
	if err := s.opt.Backend.RemovePodContainer(ctx, v.ID); err != nil {
		return nil, err
	}
	return &api.RemoveContainerResponse{}, nil
}

func (s *runtimeService) ListContainers(ctx context.Context, r *api.ListContainersRequest) (*api.ListContainersResponse, error) {
	items, err := encodeContainers(s.listContainers(ctx, r.GetFilter()))
	if err != nil {
		return nil, err
	}
	resp := &api.ListContainersResponse{}
	resp.ProtoReflect().SetUnknown(items)
	return resp, nil
}

func (s *runtimeService) StreamContainers(r *api.StreamContainersRequest, to grpc.ServerStreamingServer[api.StreamContainersResponse]) error {
	return inParts(s.listContainers(to.Context(), r.GetFilter()), func(p []engine.PodContainer) error {
		items, err := encodeContainers(p)
		if err != nil {
			return err
		}
		resp := &api.StreamContainersResponse{}
		resp.ProtoReflect().SetUnknown(items)
		return to.Send(resp)
	})
}

func (s *runtimeService) listContainers(ctx context.Context, f *api.ContainerFilter) []engine.PodContainer {
	return slices.DeleteFunc(s.opt.Backend.PodContainers(ctx), func(v engine.PodContainer) bool {
		return f.GetId() != "" && !strings.HasPrefix(v.ID, f.GetId()) ||
			f.GetPodSandboxId() != "" && !strings.HasPrefix(v.Sandbox, f.GetPodSandboxId()) ||
			f.GetState() != nil && f.GetState().GetState() != containerState(v.Status) ||
			!matchLabels(v.Labels, f.GetLabelSelector())
	})
}

func (s *runtimeService) ContainerStatus(ctx context.Context, r *api.ContainerStatusRequest) (*api.ContainerStatusResponse, error) {
	v, err := s.member(ctx, r.GetContainerId())
	if err != nil {
		return nil, err
	}
	resp := &api.ContainerStatusResponse{Status: s.containerStatus(ctx, &v)}
	if r.GetVerbose() {
		more := map[string]any{
			"sandboxID": v.Config.Pod.Sandbox, "pid": v.State.Pid, "config": v.Config, "snapshotter": v.Snapshotter,
			"snapshotKey": v.SnapshotKey, "state": v.State, "mounts": v.Mounts, "args": append([]string{v.Path}, v.Args...), "env": v.Env,
		}
		if spec, err := s.opt.Backend.ContainerSpec(ctx, v.ID); err == nil { // it has none unless it runs
			more["runtimeSpec"] = spec
		}
		resp.Info = info(more)
	}
	return resp, nil
}

func (s *runtimeService) UpdateContainerResources(ctx context.Context, r *api.UpdateContainerResourcesRequest) (*api.UpdateContainerResourcesResponse, error) {
	v, err := s.member(ctx, r.GetContainerId())
	if err != nil {
		return nil, err
	}
	w := r.GetLinux()
	var adj *int
	if w.GetOomScoreAdj() != 0 {
		n := int(w.GetOomScoreAdj())
		adj = &n
	}
	if err := s.opt.Backend.UpdatePodContainer(ctx, v.ID, resources(w), adj); err != nil {
		return nil, err
	}
	return &api.UpdateContainerResourcesResponse{}, nil
}

func (s *runtimeService) ReopenContainerLog(ctx context.Context, r *api.ReopenContainerLogRequest) (*api.ReopenContainerLogResponse, error) {
	v, err := s.member(ctx, r.GetContainerId())
	if err != nil {
		return nil, err
	}
	if err := s.opt.Backend.ReopenLog(ctx, v.ID); err != nil {
		return nil, err
	}
	return &api.ReopenContainerLogResponse{}, nil
}

func (s *runtimeService) CheckpointContainer(ctx context.Context, r *api.CheckpointContainerRequest) (*api.CheckpointContainerResponse, error) {
	v, err := s.member(ctx, r.GetContainerId())
	if err != nil {
		return nil, err
	}
	if r.GetLocation() == "" {
		return nil, invalidf("no location of the archive was given")
	}
	if t := r.GetTimeout(); t > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, duration(t))
		defer cancel()
	}
	if err := s.opt.Backend.CheckpointContainer(ctx, v.ID, r.GetLocation()); err != nil {
		return nil, err
	}
	return &api.CheckpointContainerResponse{}, nil
}
