package containerd

import (
	"context"
	"fmt"

	api "github.com/containerd/containerd/api/services/transfer/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/emptypb"
)

// Transfers moves images.
type Transfers any

type transferService struct {
	api.UnimplementedTransferServer
	*Server
}

func (s *transferService) Transfer(_ context.Context, req *api.TransferRequest) (*emptypb.Empty, error) {
	return nil, fmt.Errorf("transfer of %s to %s: %w", req.GetSource().GetTypeUrl(), req.GetDestination().GetTypeUrl(), errdefs.ErrNotImplemented)
}
