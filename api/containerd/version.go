package containerd

import (
	"context"

	api "github.com/containerd/containerd/api/services/version/v1"
	"google.golang.org/protobuf/types/known/emptypb"
)

type versionService struct {
	api.UnimplementedVersionServer
	*Server
}

func (s *versionService) Version(context.Context, *emptypb.Empty) (*api.VersionResponse, error) {
	return &api.VersionResponse{Version: s.opt.Version, Revision: s.opt.Revision}, nil
}
