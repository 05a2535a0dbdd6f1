package containerd

import (
	"context"

	api "github.com/containerd/containerd/api/services/containers/v1"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
)

type containerService struct {
	api.UnimplementedContainersServer
	*Server
}

func (s *containerService) Get(ctx context.Context, req *api.GetContainerRequest) (*api.GetContainerResponse, error) {
	c, err := s.opt.Backend.ContainerStore().Get(ctx, req.GetID())
	if err != nil {
		return nil, err
	}
	return &api.GetContainerResponse{Container: containerOf(c)}, nil
}

func (s *containerService) List(ctx context.Context, req *api.ListContainersRequest) (*api.ListContainersResponse, error) {
	list, err := s.opt.Backend.ContainerStore().List(ctx, req.GetFilters()...)
	if err != nil {
		return nil, err
	}
	resp := &api.ListContainersResponse{}
	for _, c := range list {
		resp.Containers = append(resp.Containers, containerOf(c))
	}
	return resp, nil
}

func (s *containerService) ListStream(req *api.ListContainersRequest, out api.Containers_ListStreamServer) error {
	list, err := s.opt.Backend.ContainerStore().List(out.Context(), req.GetFilters()...)
	if err != nil {
		return err
	}
	for _, c := range list {
		if err := out.Send(&api.ListContainerMessage{Container: containerOf(c)}); err != nil {
			return err
		}
	}
	return nil
}

func (s *containerService) Create(ctx context.Context, req *api.CreateContainerRequest) (*api.CreateContainerResponse, error) {
	if req.GetContainer() == nil {
		return nil, invalidf("create container: no container")
	}
	c, err := s.opt.Backend.ContainerStore().Create(ctx, toContainer(req.GetContainer()))
	if err != nil {
		return nil, err
	}
	return &api.CreateContainerResponse{Container: containerOf(c)}, nil
}

func (s *containerService) Update(ctx context.Context, req *api.UpdateContainerRequest) (*api.UpdateContainerResponse, error) {
	if req.GetContainer().GetID() == "" {
		return nil, invalidf("update container: id is missing")
	}
	c, err := s.opt.Backend.ContainerStore().Update(ctx, toContainer(req.GetContainer()), req.GetUpdateMask().GetPaths()...)
	if err != nil {
		return nil, err
	}
	return &api.UpdateContainerResponse{Container: containerOf(c)}, nil
}

func (s *containerService) Delete(ctx context.Context, req *api.DeleteContainerRequest) (*emptypb.Empty, error) {
	if err := s.opt.Backend.ContainerStore().Delete(ctx, req.GetID()); err != nil {
		return nil, err
	}
	return empty(), nil
}

func anyOf(a typeurl.Any) *anypb.Any {
	if a == nil {
		return nil
	}
	return typeurl.MarshalProto(a)
}

// toAny keeps a missing message apart from an empty one.
func toAny(a *anypb.Any) typeurl.Any {
	if a == nil {
		return nil
	}
	return a
}

func anysOf(m map[string]typeurl.Any) map[string]*anypb.Any {
	out := make(map[string]*anypb.Any, len(m))
	for k, v := range m {
		out[k] = anyOf(v)
	}
	return out
}

func toAnys(m map[string]*anypb.Any) map[string]typeurl.Any {
	out := make(map[string]typeurl.Any, len(m))
	for k, v := range m {
		if v != nil {
			out[k] = v
		}
	}
	return out
}

func containerOf(c containers.Container) *api.Container {
	return &api.Container{
		ID: c.ID, Labels: c.Labels, Image: c.Image, Runtime: &api.Container_Runtime{Name: c.Runtime.Name, Options: anyOf(c.Runtime.Options)},
		Spec: anyOf(c.Spec), Snapshotter: c.Snapshotter, SnapshotKey: c.SnapshotKey, Sandbox: c.SandboxID,
		CreatedAt: stampOf(c.CreatedAt), UpdatedAt: stampOf(c.UpdatedAt), Extensions: anysOf(c.Extensions),
	}
}

func toContainer(c *api.Container) containers.Container {
	return containers.Container{
		ID: c.GetID(), Labels: c.GetLabels(), Image: c.GetImage(),
		Runtime: containers.RuntimeInfo{Name: c.GetRuntime().GetName(), Options: toAny(c.GetRuntime().GetOptions())},
		Spec:    toAny(c.GetSpec()), Snapshotter: c.GetSnapshotter(), SnapshotKey: c.GetSnapshotKey(), SandboxID: c.GetSandbox(),
		Extensions: toAnys(c.GetExtensions()),
	}
}
