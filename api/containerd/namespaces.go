package containerd

import (
	"context"

	api "github.com/containerd/containerd/api/services/namespaces/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/emptypb"
)

type namespaceService struct {
	api.UnimplementedNamespacesServer
	*Server
}

func (s *namespaceService) Get(ctx context.Context, req *api.GetNamespaceRequest) (*api.GetNamespaceResponse, error) {
	// One that nobody has written to has no labels. Clients ask for defaults in the first namespace that they use.
	labels, err := s.opt.Namespaces.Labels(ctx, req.GetName())
	if err != nil && !errdefs.IsNotFound(err) {
		return nil, err
	}
	return &api.GetNamespaceResponse{Namespace: &api.Namespace{Name: req.GetName(), Labels: labels}}, nil
}

func (s *namespaceService) List(ctx context.Context, _ *api.ListNamespacesRequest) (*api.ListNamespacesResponse, error) {
	names, err := s.opt.Namespaces.List(ctx)
	if err != nil {
		return nil, err
	}
	resp := &api.ListNamespacesResponse{}
	for _, n := range names {
		labels, err := s.opt.Namespaces.Labels(ctx, n)
		if err != nil {
			continue // removed meanwhile
		}
		resp.Namespaces = append(resp.Namespaces, &api.Namespace{Name: n, Labels: labels})
	}
	return resp, nil
}

func (s *namespaceService) Create(ctx context.Context, req *api.CreateNamespaceRequest) (*api.CreateNamespaceResponse, error) {
	ns := req.GetNamespace()
	if err := s.opt.Namespaces.Create(ctx, ns.GetName(), ns.GetLabels()); err != nil {
		return nil, err
	}
	return &api.CreateNamespaceResponse{Namespace: &api.Namespace{Name: ns.GetName(), Labels: ns.GetLabels()}}, nil
}

func (s *namespaceService) Update(ctx context.Context, req *api.UpdateNamespaceRequest) (*api.UpdateNamespaceResponse, error) {
	ns := req.GetNamespace()
	labels, err := s.opt.Namespaces.Relabel(ctx, ns.GetName(), ns.GetLabels(), req.GetUpdateMask().GetPaths()...)
	if err != nil {
		return nil, err
	}
	return &api.UpdateNamespaceResponse{Namespace: &api.Namespace{Name: ns.GetName(), Labels: labels}}, nil
}

func (s *namespaceService) Delete(ctx context.Context, req *api.DeleteNamespaceRequest) (*emptypb.Empty, error) {
	if err := s.opt.Namespaces.Delete(ctx, req.GetName()); err != nil {
		return nil, err
	}
	return empty(), nil
}
