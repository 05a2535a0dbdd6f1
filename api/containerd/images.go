package containerd

import (
	"context"

	api "github.com/containerd/containerd/api/services/images/v1"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/epoch"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

type imageService struct {
	api.UnimplementedImagesServer
	*Server
}

func (s *imageService) Get(ctx context.Context, req *api.GetImageRequest) (*api.GetImageResponse, error) {
	img, err := s.opt.Images.Get(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	return &api.GetImageResponse{Image: imageOf(img)}, nil
}

func (s *imageService) List(ctx context.Context, req *api.ListImagesRequest) (*api.ListImagesResponse, error) {
	list, err := s.opt.Images.List(ctx, req.GetFilters()...)
	if err != nil {
		return nil, err
	}
	resp := &api.ListImagesResponse{}
	for _, img := range list {
		resp.Images = append(resp.Images, imageOf(img))
	}
	return resp, nil
}

func (s *imageService) Create(ctx context.Context, req *api.CreateImageRequest) (*api.CreateImageResponse, error) {
	if req.GetImage().GetName() == "" {
		return nil, invalidf("create image: name is missing")
	}
	img, err := s.opt.Images.Create(atEpoch(ctx, req.GetSourceDateEpoch()), toImage(req.GetImage()))
	if err != nil {
		return nil, err
	}
	return &api.CreateImageResponse{Image: imageOf(img)}, nil
}

func (s *imageService) Update(ctx context.Context, req *api.UpdateImageRequest) (*api.UpdateImageResponse, error) {
	if req.GetImage().GetName() == "" {
		return nil, invalidf("update image: name is missing")
	}
	img, err := s.opt.Images.Update(atEpoch(ctx, req.GetSourceDateEpoch()), toImage(req.GetImage()), req.GetUpdateMask().GetPaths()...)
	if err != nil {
		return nil, err
	}
	return &api.UpdateImageResponse{Image: imageOf(img)}, nil
}

func (s *imageService) Delete(ctx context.Context, req *api.DeleteImageRequest) (*emptypb.Empty, error) {
	var opts []images.DeleteOpt
	if req.GetSync() {
		opts = append(opts, images.SynchronousDelete())
	}
	if t := req.GetTarget(); t != nil {
		d := toDescriptor(t)
		opts = append(opts, images.DeleteTarget(&d))
	}
	if err := s.opt.Images.Delete(ctx, req.GetName(), opts...); err != nil {
		return nil, err
	}
	return empty(), nil
}

// atEpoch makes records of a call carry a given time (SOURCE_DATE_EPOCH).
func atEpoch(ctx context.Context, t *timestamppb.Timestamp) context.Context {
	if t == nil {
		return ctx
	}
	at := t.AsTime()
	return epoch.WithSourceDateEpoch(ctx, &at)
}

func imageOf(img images.Image) *api.Image {
	return &api.Image{
		Name: img.Name, Labels: img.Labels, Target: descriptorOf(img.Target), CreatedAt: stampOf(img.CreatedAt), UpdatedAt: stampOf(img.UpdatedAt),
	}
}

func toImage(img *api.Image) images.Image {
	return images.Image{
		Name: img.GetName(), Labels: img.GetLabels(), Target: toDescriptor(img.GetTarget()),
		CreatedAt: timeOf(img.GetCreatedAt()), UpdatedAt: timeOf(img.GetUpdatedAt()),
	}
}
