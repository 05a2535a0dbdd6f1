package containerd

import (
	"context"

	api "github.com/containerd/containerd/api/services/leases/v1"
	"github.com/containerd/containerd/v2/core/leases"
	"google.golang.org/protobuf/types/known/emptypb"
)

type leaseService struct {
	api.UnimplementedLeasesServer
	*Server
}

func (s *leaseService) Create(ctx context.Context, req *api.CreateRequest) (*api.CreateResponse, error) {
	id := leases.WithRandomID()
	if req.GetID() != "" {
		id = leases.WithID(req.GetID())
	}
	l, err := s.opt.Leases.Create(ctx, id, leases.WithLabels(req.GetLabels()))
	if err != nil {
		return nil, err
	}
	return &api.CreateResponse{Lease: leaseOf(l)}, nil
}

func (s *leaseService) Delete(ctx context.Context, req *api.DeleteRequest) (*emptypb.Empty, error) {
	var opts []leases.DeleteOpt
	if req.GetSync() {
		opts = append(opts, leases.SynchronousDelete)
	}
	if err := s.opt.Leases.Delete(ctx, leases.Lease{ID: req.GetID()}, opts...); err != nil {
		return nil, err
	}
	return empty(), nil
}

func (s *leaseService) List(ctx context.Context, req *api.ListRequest) (*api.ListResponse, error) {
	list, err := s.opt.Leases.List(ctx, req.GetFilters()...)
	if err != nil {
		return nil, err
	}
	resp := &api.ListResponse{}
	for _, l := range list {
		resp.Leases = append(resp.Leases, leaseOf(l))
	}
	return resp, nil
}

func (s *leaseService) AddResource(ctx context.Context, req *api.AddResourceRequest) (*emptypb.Empty, error) {
	if err := s.opt.Leases.AddResource(ctx, leases.Lease{ID: req.GetID()}, toResource(req.GetResource())); err != nil {
		return nil, err
	}
	return empty(), nil
}

func (s *leaseService) DeleteResource(ctx context.Context, req *api.DeleteResourceRequest) (*emptypb.Empty, error) {
	if err := s.opt.Leases.DeleteResource(ctx, leases.Lease{ID: req.GetID()}, toResource(req.GetResource())); err != nil {
		return nil, err
	}
	return empty(), nil
}

func (s *leaseService) ListResources(ctx context.Context, req *api.ListResourcesRequest) (*api.ListResourcesResponse, error) {
	list, err := s.opt.Leases.ListResources(ctx, leases.Lease{ID: req.GetID()})
	if err != nil {
		return nil, err
	}
	resp := &api.ListResourcesResponse{}
	for _, r := range list {
		resp.Resources = append(resp.Resources, &api.Resource{ID: r.ID, Type: r.Type})
	}
	return resp, nil
}

func leaseOf(l leases.Lease) *api.Lease {
	return &api.Lease{ID: l.ID, CreatedAt: stampOf(l.CreatedAt), Labels: l.Labels}
}

func toResource(r *api.Resource) leases.Resource {
	return leases.Resource{ID: r.GetID(), Type: r.GetType()}
}
