package nri

import (
	"context"

	"github.com/containerd/nri/pkg/api"

	"github.com/hako-engine/hako/engine"
)

// The methods of engine.Hooks. The library asks the plugins one after the other, by their index.

// RunSandbox is engine.Hooks.
func (s *Server) RunSandbox(ctx context.Context, p engine.Sandbox) error {
	return s.adapt.RunPodSandbox(ctx, &api.RunPodSandboxRequest{Pod: wireSandbox(p)})
}

// UpdateSandbox is engine.Hooks.
func (s *Server) UpdateSandbox(ctx context.Context, p engine.Sandbox, overhead, resources *engine.Resources) error {
	_, err := s.adapt.UpdatePodSandbox(ctx, &api.UpdatePodSandboxRequest{
		Pod: wireSandbox(p), OverheadLinuxResources: wireResources(overhead), LinuxResources: wireResources(resources),
	})
	return err
}

// PostUpdateSandbox is engine.Hooks.
func (s *Server) PostUpdateSandbox(ctx context.Context, p engine.Sandbox) error {
	return s.adapt.PostUpdatePodSandbox(ctx, &api.PostUpdatePodSandboxRequest{Pod: wireSandbox(p)})
}

// StopSandbox is engine.Hooks.
func (s *Server) StopSandbox(ctx context.Context, p engine.Sandbox) error {
	return s.adapt.StopPodSandbox(ctx, &api.StopPodSandboxRequest{Pod: wireSandbox(p)})
}

// RemoveSandbox is engine.Hooks.
func (s *Server) RemoveSandbox(ctx context.Context, p engine.Sandbox) error {
	return s.adapt.RemovePodSandbox(ctx, &api.RemovePodSandboxRequest{Pod: wireSandbox(p)})
}

// CreateContainer is engine.Hooks.
func (s *Server) CreateContainer(ctx context.Context, p engine.Sandbox, c engine.HookContainer) (engine.Adjustment, []engine.ContainerUpdate, error) {
	req := &api.CreateContainerRequest{Pod: wireSandbox(p), Container: wireContainer(c)}
	resp, err := s.adapt.CreateContainer(ctx, req)
	if err != nil {
		return engine.Adjustment{}, nil, err
	}
	adj, err := adjustmentOf(resp.GetAdjust())
	if err != nil {
		return adj, nil, err
	}
	removedUnsaid(&adj, wireContainer(c), req.Container)
	updates, err := updatesOf(resp.GetUpdate())
	return adj, updates, err
}

// PostCreateContainer is engine.Hooks.
func (s *Server) PostCreateContainer(ctx context.Context, p engine.Sandbox, c engine.HookContainer) error {
	return s.adapt.PostCreateContainer(ctx, &api.PostCreateContainerRequest{Pod: wireSandbox(p), Container: wireContainer(c)})
}

// StartContainer is engine.Hooks.
func (s *Server) StartContainer(ctx context.Context, p engine.Sandbox, c engine.HookContainer) error {
	return s.adapt.StartContainer(ctx, &api.StartContainerRequest{Pod: wireSandbox(p), Container: wireContainer(c)})
}

// PostStartContainer is engine.Hooks.
func (s *Server) PostStartContainer(ctx context.Context, p engine.Sandbox, c engine.HookContainer) error {
	return s.adapt.PostStartContainer(ctx, &api.PostStartContainerRequest{Pod: wireSandbox(p), Container: wireContainer(c)})
}

// UpdateContainer is engine.Hooks.
func (s *Server) UpdateContainer(ctx context.Context, p engine.Sandbox, c engine.HookContainer, r engine.Resources) ([]engine.ContainerUpdate, error) {
	resp, err := s.adapt.UpdateContainer(ctx, &api.UpdateContainerRequest{
		Pod: wireSandbox(p), Container: wireContainer(c), LinuxResources: wireResources(&r),
	})
	if err != nil {
		return nil, err
	}
	return updatesOf(resp.GetUpdate())
}

// PostUpdateContainer is engine.Hooks.
func (s *Server) PostUpdateContainer(ctx context.Context, p engine.Sandbox, c engine.HookContainer) error {
	return s.adapt.PostUpdateContainer(ctx, &api.PostUpdateContainerRequest{Pod: wireSandbox(p), Container: wireContainer(c)})
}

// StopContainer is engine.Hooks.
func (s *Server) StopContainer(ctx context.Context, p engine.Sandbox, c engine.HookContainer) ([]engine.ContainerUpdate, error) {
	resp, err := s.adapt.StopContainer(ctx, &api.StopContainerRequest{Pod: wireSandbox(p), Container: wireContainer(c)})
	if err != nil {
		return nil, err
	}
	return updatesOf(resp.GetUpdate())
}

// RemoveContainer is engine.Hooks.
func (s *Server) RemoveContainer(ctx context.Context, p engine.Sandbox, c engine.HookContainer) error {
	return s.adapt.RemoveContainer(ctx, &api.RemoveContainerRequest{Pod: wireSandbox(p), Container: wireContainer(c)})
}
