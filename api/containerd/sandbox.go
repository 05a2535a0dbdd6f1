package containerd

import (
	"context"
	"time"

	api "github.com/containerd/containerd/api/services/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/typeurl/v2"
)

type sandboxStoreService struct {
	api.UnimplementedStoreServer
	*Server
}

func (s *sandboxStoreService) Create(ctx context.Context, req *api.StoreCreateRequest) (*api.StoreCreateResponse, error) {
	b, err := s.opt.Backend.SandboxStore().Create(ctx, toSandbox(req.GetSandbox()))
	if err != nil {
		return nil, err
	}
	return &api.StoreCreateResponse{Sandbox: sandboxOf(b)}, nil
}

func (s *sandboxStoreService) Update(ctx context.Context, req *api.StoreUpdateRequest) (*api.StoreUpdateResponse, error) {
	b, err := s.opt.Backend.SandboxStore().Update(ctx, toSandbox(req.GetSandbox()), req.GetFields()...)
	if err != nil {
		return nil, err
	}
	return &api.StoreUpdateResponse{Sandbox: sandboxOf(b)}, nil
}

func (s *sandboxStoreService) Delete(ctx context.Context, req *api.StoreDeleteRequest) (*api.StoreDeleteResponse, error) {
	if err := s.opt.Backend.SandboxStore().Delete(ctx, req.GetSandboxID()); err != nil {
		return nil, err
	}
	return &api.StoreDeleteResponse{}, nil
}

func (s *sandboxStoreService) List(ctx context.Context, req *api.StoreListRequest) (*api.StoreListResponse, error) {
	list, err := s.opt.Backend.SandboxStore().List(ctx, req.GetFilters()...)
	if err != nil {
		return nil, err
	}
	resp := &api.StoreListResponse{}
	for _, b := range list {
		resp.List = append(resp.List, sandboxOf(b))
	}
	return resp, nil
}

func (s *sandboxStoreService) Get(ctx context.Context, req *api.StoreGetRequest) (*api.StoreGetResponse, error) {
	b, err := s.opt.Backend.SandboxStore().Get(ctx, req.GetSandboxID())
	if err != nil {
		return nil, err
	}
	return &api.StoreGetResponse{Sandbox: sandboxOf(b)}, nil
}

func sandboxOf(b sandbox.Sandbox) *types.Sandbox {
	return &types.Sandbox{
		SandboxID: b.ID, Runtime: &types.Sandbox_Runtime{Name: b.Runtime.Name, Options: anyOf(b.Runtime.Options)}, Spec: anyOf(b.Spec), Labels: b.Labels,
		CreatedAt: stampOf(b.CreatedAt), UpdatedAt: stampOf(b.UpdatedAt), Extensions: anysOf(b.Extensions), Sandboxer: b.Sandboxer,
	}
}

func toSandbox(b *types.Sandbox) sandbox.Sandbox {
	return sandbox.Sandbox{
		ID: b.GetSandboxID(), Labels: b.GetLabels(), Runtime: sandbox.RuntimeOpts{Name: b.GetRuntime().GetName(), Options: toAny(b.GetRuntime().GetOptions())},
		Spec: toAny(b.GetSpec()), Sandboxer: b.GetSandboxer(), CreatedAt: timeOf(b.GetCreatedAt()), UpdatedAt: timeOf(b.GetUpdatedAt()),
		Extensions: toAnys(b.GetExtensions()),
	}
}

type sandboxControllerService struct {
	api.UnimplementedControllerServer
	*Server
}

func (s *sandboxControllerService) of(name string) (sandbox.Controller, error) {
	return s.opt.Backend.SandboxController(name)
}

func (s *sandboxControllerService) Create(ctx context.Context, req *api.ControllerCreateRequest) (*api.ControllerCreateResponse, error) {
	c, err := s.of(req.GetSandboxer())
	if err != nil {
		return nil, err
	}
	b := toSandbox(req.GetSandbox())
	if req.GetSandbox() == nil { // an older client: the record says the rest
		if b, err = s.opt.Backend.SandboxStore().Get(ctx, req.GetSandboxID()); err != nil {
			return nil, err
		}
	}
	b.ID = req.GetSandboxID()
	opts := []sandbox.CreateOpt{
		sandbox.WithRootFS(toMounts(req.GetRootfs())), sandbox.WithNetNSPath(req.GetNetnsPath()), sandbox.WithAnnotations(req.GetAnnotations()),
	}
	if o := req.GetOptions(); o != nil {
		opts = append(opts, func(c *sandbox.CreateOptions) error { c.Options = o; return nil })
	}
	if err := c.Create(ctx, b, opts...); err != nil {
		return nil, err
	}
	return &api.ControllerCreateResponse{SandboxID: req.GetSandboxID()}, nil
}

func (s *sandboxControllerService) Start(ctx context.Context, req *api.ControllerStartRequest) (*api.ControllerStartResponse, error) {
	c, err := s.of(req.GetSandboxer())
	if err != nil {
		return nil, err
	}
	i, err := c.Start(ctx, req.GetSandboxID())
	if err != nil {
		return nil, err
	}
	return &api.ControllerStartResponse{
		SandboxID: i.SandboxID, Pid: i.Pid, CreatedAt: stampOf(i.CreatedAt), Labels: i.Labels, Address: i.Address, Version: i.Version, Spec: anyOf(i.Spec),
	}, nil
}

func (s *sandboxControllerService) Platform(ctx context.Context, req *api.ControllerPlatformRequest) (*api.ControllerPlatformResponse, error) {
	c, err := s.of(req.GetSandboxer())
	if err != nil {
		return nil, err
	}
	p, err := c.Platform(ctx, req.GetSandboxID())
	if err != nil {
		return nil, err
	}
	return &api.ControllerPlatformResponse{Platform: &types.Platform{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant, OSVersion: p.OSVersion, OSFeatures: p.OSFeatures}}, nil
}

func (s *sandboxControllerService) Stop(ctx context.Context, req *api.ControllerStopRequest) (*api.ControllerStopResponse, error) {
	c, err := s.of(req.GetSandboxer())
	if err != nil {
		return nil, err
	}
	if err := c.Stop(ctx, req.GetSandboxID(), sandbox.WithTimeout(time.Duration(req.GetTimeoutSecs())*time.Second)); err != nil {
		return nil, err
	}
	return &api.ControllerStopResponse{}, nil
}

func (s *sandboxControllerService) Wait(ctx context.Context, req *api.ControllerWaitRequest) (*api.ControllerWaitResponse, error) {
	c, err := s.of(req.GetSandboxer())
	if err != nil {
		return nil, err
	}
	ctx, cancel := s.untilShutdown(ctx)
	defer cancel()
	x, err := c.Wait(ctx, req.GetSandboxID())
	if err != nil {
		return nil, err
	}
	return &api.ControllerWaitResponse{ExitStatus: x.ExitStatus, ExitedAt: stampOf(x.ExitedAt)}, nil
}

func (s *sandboxControllerService) Status(ctx context.Context, req *api.ControllerStatusRequest) (*api.ControllerStatusResponse, error) {
	c, err := s.of(req.GetSandboxer())
	if err != nil {
		return nil, err
	}
	st, err := c.Status(ctx, req.GetSandboxID(), req.GetVerbose())
	if err != nil {
		return nil, err
	}
	resp := &api.ControllerStatusResponse{
		SandboxID: st.SandboxID, Pid: st.Pid, State: st.State, Info: st.Info, CreatedAt: stampOf(st.CreatedAt), ExitedAt: stampOf(st.ExitedAt),
		Address: st.Address, Version: st.Version,
	}
	if st.Extra != nil {
		resp.Extra = typeurl.MarshalProto(st.Extra)
	}
	return resp, nil
}

func (s *sandboxControllerService) Shutdown(ctx context.Context, req *api.ControllerShutdownRequest) (*api.ControllerShutdownResponse, error) {
	c, err := s.of(req.GetSandboxer())
	if err != nil {
		return nil, err
	}
	if err := c.Shutdown(ctx, req.GetSandboxID()); err != nil {
		return nil, err
	}
	return &api.ControllerShutdownResponse{}, nil
}

func (s *sandboxControllerService) Metrics(ctx context.Context, req *api.ControllerMetricsRequest) (*api.ControllerMetricsResponse, error) {
	c, err := s.of(req.GetSandboxer())
	if err != nil {
		return nil, err
	}
	m, err := c.Metrics(ctx, req.GetSandboxID())
	if err != nil {
		return nil, err
	}
	return &api.ControllerMetricsResponse{Metrics: m}, nil
}

func (s *sandboxControllerService) Update(ctx context.Context, req *api.ControllerUpdateRequest) (*api.ControllerUpdateResponse, error) {
	c, err := s.of(req.GetSandboxer())
	if err != nil {
		return nil, err
	}
	if req.GetSandbox() == nil {
		return nil, invalidf("update sandbox %q: no sandbox", req.GetSandboxID())
	}
	if err := c.Update(ctx, req.GetSandboxID(), toSandbox(req.GetSandbox()), req.GetFields()...); err != nil {
		return nil, err
	}
	return &api.ControllerUpdateResponse{}, nil
}
